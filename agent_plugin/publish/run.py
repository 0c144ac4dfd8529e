"""One publisher's transfer while it runs: its ledger rows, its progress and its threads.

Crew threads publish; the calling thread keeps the ledger, looks for a wish to stop and shows how
far it is, like an upload (transfer/upload.py). It can be paused and aborted, and gives way, as any
transfer (transfer/steering.py). Which outputs it publishes follows from the publisher alone: what
people change of its tasks changes nothing.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.objects import Unfinished
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.outputs import Output
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.engine import TICK_SECONDS, Crew, Products
from agent_plugin.transfer.ledger import TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.progress import Meter
from agent_plugin.transfer.states import TaskStatus
from agent_plugin.transfer.steering import Steering

T = TypeVar("T")
Order = TypeVar("Order", bound=Hashable)
Product = TypeVar("Product")

# Users are promised an end within a second of their wish.
STOP_SECONDS: Final = 0.6


class Run:
    """A publish transfer that this process carries out; made by `running`.

    Attributes:
        halt: Wished when its threads are to stop.
        steering: What people want of it.
        moved: Bytes that went from this host to the destination.
    """

    def __init__(
        self, context: TransferContext, row: TransferRow, planned: Sequence[tuple[Output, str]]
    ) -> None:
        self.context = context
        self.row = row
        self.halt = Cancellation()
        self.moved = 0
        meter = Meter(len(planned), sum(output.entry.size for output, _ in planned))
        self.steering = Steering(context, row, self.halt, meter, lambda _tasks: None)
        ids = self.steering.tasks
        self._tasks = {output.path: ids[output.path, key] for output, key in planned}
        self._counting = threading.Lock()

    def each(
        self, work: Callable[[Output], None], outputs: Iterable[Output], *, settle: bool = True
    ) -> None:
        """Have crew threads do something for each output; the first failure ends it.

        Args:
            work: For one output.
            outputs: Which.
            settle: Whether the output is published then.

        Raises:
            PropmasterError: Of the first output that failed.
            CancelledError: Cancellation was wished.
        """
        with self._crew(work, self.context.concurrency) as (crew, products):
            outstanding = 0
            for output in outputs:
                crew.order(output)
                outstanding += 1
            while outstanding:
                self.tick()
                if (taken := products.take(TICK_SECONDS)) is None:
                    continue
                outstanding -= 1
                output, failure = taken
                if isinstance(failure, BaseException):
                    raise self._blamed(output, failure)
                if settle:
                    self.settle(output)

    def alone(self, work: Callable[[], T]) -> T:
        """Return what one call returns, which is made on a thread of its own."""

        def call(_order: str) -> T:
            return work()

        with self._crew(call, 1) as (crew, products):
            crew.order("")
            while (taken := products.take(TICK_SECONDS)) is None:
                self.tick()
            if isinstance(taken[1], BaseException):
                raise taken[1]
            return taken[1]

    @contextmanager
    def _crew(
        self, work: Callable[[Order], Product], size: int
    ) -> Iterator[tuple[Crew[Order, Product], Products[Order, Product]]]:
        """Lend a crew, which is told to stop if the block fails."""
        products: Products[Order, Product] = Products()
        crew = Crew(work, products, size, self.halt)
        try:
            yield crew, products
        except BaseException:
            self.halt.cancel()
            raise
        finally:
            crew.close()
            products.close()
            # Who was uploading in parts aborts it.
            crew.join(STOP_SECONDS)

    def tick(self) -> None:
        """Look for a wish to stop; beat when it is time for it.

        Raises:
            CancelledError: There is one.
            TransferAbortedError: A person aborted the transfer.
        """
        self.steering.tick()

    @contextmanager
    def attempt(self, output: Output) -> Iterator[None]:
        """Note that an output is tried; for crew threads."""
        task = self._tasks[output.path]
        with self.context.attempt(task):
            self.context.ledger.note(task, TaskStatus.EXECUTING)
            yield

    def unfinished(self, output: Output) -> Unfinished:
        """Return where an upload in parts is noted for the next run; for crew threads.

        It is aborted however this run ends, but by a kill.
        """
        task = self._tasks[output.path]

        def changed(upload: Unfinished) -> None:
            self.context.ledger.note_upload(task, upload.upload_id, ())

        return Unfinished(changed=changed, drops=lambda: True)

    def left_upload(self, output: Output) -> str:
        """Return the id of an upload in parts in which an earlier run was killed, or nothing."""
        return self.context.ledger.upload_of(self._tasks[output.path])[0]

    def sent(self, size: int) -> None:
        """Count bytes that went from this host; for any thread."""
        with self._counting:
            self.moved += size

    def placed(self, output: Output, size: int) -> None:
        """Count bytes of an output that are where they are to be; for any thread."""
        self.steering.count(self._tasks[output.path], size)

    def settle(self, output: Output) -> None:
        """Note that an output is published."""
        task = self._tasks[output.path]
        self.steering.count(task, 0, files=1)
        self.steering.settle(task)

    def _blamed(self, output: Output, failure: BaseException) -> BaseException:
        """Note and return the failure of one output, with its path."""
        if isinstance(failure, CancelledError) or not isinstance(failure, PropmasterError):
            return failure
        blamed = failure
        if output.path not in failure.message:
            blamed = type(failure)(f"{output.path}: {failure.message}", hint=failure.hint)
            blamed.__cause__ = failure
        self.context.ledger.note(self._tasks[output.path], TaskStatus.FAILED, blamed)
        return blamed


@contextmanager
def running(
    context: TransferContext, spec: TransferSpec, planned: Sequence[tuple[Output, str]]
) -> Iterator[Run]:
    """Begin a publish transfer and let go of it in the state that follows from how it went.

    Args:
        context: The services.
        spec: The transfer.
        planned: Each output with the key it goes to.

    Raises:
        TransferStateError: A living process is at it right now, or a person has called it done.
        TransferAbortedError: A person aborted it.
        NoSpaceError, LocalWriteError: The ledger can not be written.
    """
    tasks = [TaskSpec(output.path, key, output.entry.size) for output, key in planned]
    row = context.ledger.begin(spec, tasks, context.cancellation)
    error: PropmasterError | None = None
    run = Run(context, row, planned)
    try:
        with context.view(spec.kind) as run.steering.view:
            yield run
    except PropmasterError as failure:
        error = failure
        raise
    except BaseException:
        error = CancelledError("interrupted")
        raise
    finally:
        context.ledger.finish(row.id, error)
