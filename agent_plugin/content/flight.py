"""Requests in flight: the threads that wait for them, and how many there may be at once.

The threads are daemons and nobody joins them, because a request that hangs can not be interrupted:
whoever wants to stop leaves the thread behind, and it ends when the request times out. So what runs
here must hold no resource that its caller will close or reuse.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Final, TypeVar

from agent_plugin.content import events
from agent_plugin.content.errors import StoreThrottledError
from agent_plugin.content.store import Cancellation

T = TypeVar("T")

# How late a wish to stop may be noticed, in seconds; users are promised one second.
POLL_SECONDS: Final = 0.1
# Requests that were sent before the cut still come back throttled; they are no reason for another.
CUT_INTERVAL_SECONDS: Final = 1.0

log = events.get_logger()


class Lanes:
    """Daemon threads, started when first needed, that run what they are given.

    Args:
        most: Threads at most, >= 1; further work waits for one of them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._threads = 0
        # Tasks that have not ended.
        self._unfinished = 0

    def submit(self, fn: Callable[[], T]) -> "Future[T]":
        """Have `fn` run by a thread, in the caller's context (contextvars).

        The future can be cancelled until it begins.

        Raises:
            RuntimeError: The host gives no thread, and there is none yet.
        """
        future: Future[T] = Future()
        context = copy_context()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn()
            except BaseException as error:  # noqa: BLE001 - it is raised in the waiting thread
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if self._unfinished >= self._threads and self._threads < self._most:
                self._grow()
            self._unfinished += 1
            self._tasks.put(partial(context.run, run))
        return future

    def run(self, fn: Callable[[], T], cancellation: Cancellation) -> T:
        """Return what `fn` returns when run by a thread, or leave it behind.

        Raises:
            CancelledError: Cancellation was wished; `fn` goes on, nobody learns how it ended.
        """
        return self.result(self.submit(fn), cancellation)

    def result(self, future: "Future[T]", cancellation: Cancellation) -> T:
        """Return the future's result as soon as there is one.

        Raises:
            CancelledError: Cancellation was wished.
        """
        while not future.done():
            cancellation.check()
            wait([future], timeout=POLL_SECONDS)
        return future.result()

    def _grow(self) -> None:
        """Start a thread; the lock is held."""
        try:
            threading.Thread(target=self._work, name="propmaster-lane", daemon=True).start()
        except RuntimeError:
            # The host gives no more: what comes next waits for one of those there are.
            if not self._threads:
                raise
        else:
            self._threads += 1

    def _work(self) -> None:
        while True:
            self._tasks.get()()
            with self._lock:
                self._unfinished -= 1


class AdaptiveLimit:
    """How many requests may be under way: halved when the store throttles, then grown again.

    Additive increase, multiplicative decrease, as TCP does it: one more for each limit's worth of
    requests that went well.

    Args:
        ceiling: Requests at most, >= 1; where it starts.
        clock: Seconds, monotonic.
    """

    def __init__(self, ceiling: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ceiling = float(ceiling)
        self._clock = clock
        self._changed = threading.Condition()
        self._allowed = self._ceiling
        self._active = 0
        self._waiting = 0
        self._last_cut = float("-inf")

    @property
    def allowed(self) -> int:
        """Requests that may be under way now, at least 1."""
        return max(1, int(self._allowed))

    @contextmanager
    def slot(self, cancellation: Cancellation | None = None) -> Iterator[None]:
        """Hold one of the places; what is raised inside decides how many there will be.

        Raises:
            CancelledError: Cancellation was wished while waiting for a place.
        """
        self._enter(cancellation)
        try:
            yield
        except StoreThrottledError:
            self.cut()
            raise
        else:
            if self._allowed < self._ceiling:
                self._grow()
        finally:
            with self._changed:
                self._active -= 1
                if self._waiting:
                    self._changed.notify()

    def cut(self) -> None:
        """Halve the limit, unless that was done a moment ago."""
        with self._changed:
            now = self._clock()
            if now - self._last_cut < CUT_INTERVAL_SECONDS:
                return
            self._last_cut = now
            self._allowed = max(1.0, min(self._allowed, self._active) / 2)
            allowed = self.allowed
        log.info(events.STORE_THROTTLED, extra={"requests_allowed": allowed})

    def _enter(self, cancellation: Cancellation | None) -> None:
        with self._changed:
            while self._active >= self.allowed:
                if cancellation is not None:
                    cancellation.check()
                self._waiting += 1
                self._changed.wait(POLL_SECONDS)
                self._waiting -= 1
            self._active += 1

    def _grow(self) -> None:
        with self._changed:
            self._allowed = min(self._ceiling, self._allowed + 1 / self._allowed)
