"""The threads that move bytes: a crew that works through a queue and can be told to stop or pause.

The crew's threads talk to the store and to nothing else that is shared; what they obtain goes to
the thread that called, through one bounded queue. They are daemon threads: a request that hangs
must neither delay a cancellation nor the process's end. A crew whose owner has stopped drops what
it still obtains. Orders are taken by priority, those of one priority in the order they came.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.states import DEFAULT_PRIORITY

Order = TypeVar("Order", bound=Hashable)
Product = TypeVar("Product")

# What may be in memory between the crew and its owner: 16 threads with a blob of 8 MiB each.
MAX_BYTES_IN_MEMORY: Final = 128 * 1024 * 1024
# How soon a wish to stop and the ledger's clock are looked at.
TICK_SECONDS: Final = 0.2


class Products(Generic[Order, Product]):
    """Where crews put what they have made, or why they could not; one owner takes it.

    Args:
        drop: Called with each product that nobody will take, on whichever thread has it.
    """

    def __init__(self, drop: Callable[[Product], None] = lambda _product: None) -> None:
        self._queue: queue.SimpleQueue[tuple[Order, Product | BaseException]] = queue.SimpleQueue()
        self._drop = drop
        self._lock = threading.Lock()
        self._closed = False

    def put(self, order: Order, product: Product | BaseException) -> None:
        """Hand over a product or a failure; dropped when the owner has gone."""
        with self._lock:
            if not self._closed:
                self._queue.put((order, product))
                return
        if not isinstance(product, BaseException):
            self._drop(product)

    def close(self) -> None:
        """Drop what was not taken, and from now on whatever is put."""
        with self._lock:
            self._closed = True
        while (taken := self.take(0)) is not None:
            if not isinstance(taken[1], BaseException):
                self._drop(taken[1])

    def take(self, timeout: float) -> tuple[Order, Product | BaseException] | None:
        """Return a finished order with its product or failure, or None after `timeout` seconds."""
        try:
            if timeout <= 0:
                return self._queue.get_nowait()
            return self._queue.get(timeout=timeout)
        except queue.Empty:
            return None


class Crew(Generic[Order, Product]):
    """Threads that turn orders into products.

    Args:
        work: Called on a crew thread for each order; an exception becomes the order's failure.
        products: Where the results go; crews may share it.
        size: The number of threads; each starts when an order finds the others busy.
        halt: Wished when the crew is to stop; `work` should heed it as well. In a pause no order is
            begun.
    """

    def __init__(
        self,
        work: Callable[[Order], Product],
        products: Products[Order, Product],
        size: int,
        halt: Cancellation,
    ) -> None:
        self._work = work
        self._products = products
        self._size = size
        self._halt = halt
        # By priority; what is ordered is a key, since it may be withdrawn.
        self._orders: dict[int, OrderedDict[Order, None]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def order(self, order: Order, priority: int = DEFAULT_PRIORITY) -> None:
        """Queue an order, which is not queued yet; higher priorities are taken first.

        A thread is started for it while there are fewer than allowed.

        Raises:
            RuntimeError: The host gives no thread, and there is none yet.
        """
        with self._changed:
            self._orders.setdefault(priority, OrderedDict())[order] = None
            if len(self._threads) < self._size:
                self._grow()
            self._changed.notify()

    def withdraw(self, order: Order) -> bool:
        """Take an order back; False if it is not queued, because it was begun for one."""
        with self._changed:
            for queued in self._orders.values():
                if order in queued:
                    del queued[order]
                    return True
            return False

    def close(self) -> None:
        """Let the threads end; orders not begun are dropped."""
        with self._changed:
            self._closed = True
            self._orders.clear()
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for threads that are still at work, no longer than that in all."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _grow(self) -> None:
        thread = threading.Thread(target=self._run, daemon=True, name="propmaster-crew")
        try:
            thread.start()
        except RuntimeError:
            # The host gives no more: what is ordered waits for one of those there are.
            if not self._threads:
                raise
        else:
            self._threads.append(thread)

    def _run(self) -> None:
        while (order := self._next()) is not None:
            try:
                product: Product | BaseException = self._work(order[0])
            except BaseException as error:  # noqa: BLE001 - handed to the owner, which raises it
                product = error
            self._products.put(order[0], product)

    def _next(self) -> tuple[Order] | None:
        with self._changed:
            while not (self._closed or self._halt.wished):
                if not self._halt.paused and (first := self._take()) is not None:
                    return first
                self._changed.wait(TICK_SECONDS)
            return None

    def _take(self) -> tuple[Order] | None:
        while self._orders:
            highest = max(self._orders)
            if queued := self._orders[highest]:
                return (queued.popitem(last=False)[0],)
            del self._orders[highest]
        return None


class Halts(Generic[Order]):
    """Ends single orders of crews, since nobody wants what they would bring; from any thread.

    Args:
        halt: The crews'; ends and pauses all of them.
    """

    def __init__(self, halt: Cancellation) -> None:
        self._halt = halt
        self._lock = threading.Lock()
        self._under_way: dict[Order, Cancellation] = {}
        # A thread has taken these from the queue, and has not come to `heeding`.
        self._early: set[Order] = set()
        self._ended = False

    @contextmanager
    def heeding(self, order: Order) -> Iterator[Cancellation]:
        """Lend, to the thread that carries an order out, what tells it to stop."""
        own = Cancellation(pauses_with=self._halt)
        with self._lock:
            self._under_way[order] = own
            if self._ended or self._halt.wished or order in self._early:
                own.cancel()
        try:
            yield own
        finally:
            with self._lock:
                if self._under_way.get(order) is own:
                    del self._under_way[order]

    def end(self, order: Order) -> None:
        """Have an order that was begun ended, at its next part boundary."""
        with self._lock:
            if own := self._under_way.get(order):
                own.cancel()
            else:
                self._early.add(order)

    def over(self, order: Order) -> None:
        """Take down that an order has come to its end; the next one of that name is another."""
        with self._lock:
            self._early.discard(order)

    def end_all(self) -> None:
        """Have all orders ended, also those that are begun later."""
        with self._lock:
            self._ended = True
            for own in self._under_way.values():
                own.cancel()


class ByteBudget:
    """Bounds the bytes in memory; an amount above the bound is taken as the bound."""

    def __init__(self, bound: int = MAX_BYTES_IN_MEMORY) -> None:
        self._bound = bound
        self._free = bound
        self._changed = threading.Condition()

    def acquire(self, size: int, halt: Cancellation) -> None:
        """Wait until `size` bytes are free, and take them.

        Raises:
            CancelledError: Halt was wished.
        """
        size = min(size, self._bound)
        with self._changed:
            while self._free < size:
                halt.check()
                self._changed.wait(TICK_SECONDS)
            self._free -= size

    def release(self, size: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._free += min(size, self._bound)
            self._changed.notify_all()
