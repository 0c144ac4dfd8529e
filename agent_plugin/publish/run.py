"""One publisher's transfer while it runs: its ledger rows, its progress and its threads.

Crew threads publish; the calling thread keeps the ledger, looks for a wish to stop and shows how
far it is, like an upload (transfer/upload.py). It can be paused and aborted, gives way, and obeys
what people want of its tasks, as any transfer (transfer/steering.py).
"""

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from agent_plugin.content.errors import CancelledError, PropmasterError, TransferStateError
from agent_plugin.content.objects import Unfinished
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.outputs import Output
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.engine import TICK_SECONDS, Crew, Halts, Products
from agent_plugin.transfer.ledger import TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.ledger_news import TaskNews
from agent_plugin.transfer.progress import Meter
from agent_plugin.transfer.states import TaskStatus
from agent_plugin.transfer.steering import Steering

T = TypeVar("T")
Order = TypeVar("Order", bound=Hashable)
Product = TypeVar("Product")

# Users are promised an end within a second of their wish.
STOP_SECONDS: Final = 0.6


class PutOffError(TransferStateError):
    """A publication is paused, and nobody waits for it here."""

    retryable = True


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
        self.steering = Steering(context, row, self.halt, meter, self._take_news)
        # Of single outputs, by their paths.
        self._halts: Halts[str] = Halts(self.halt)
        if not row.required:
            self.steering.on_pause = _put_off
        ids = self.steering.tasks
        self._tasks = {output.path: ids[output.path, key] for output, key in planned}
        for output, _ in planned:
            self.steering.plan(self._tasks[output.path], output.entry.size)
        self._counting = threading.Lock()

    def all(self, work: Callable[[Output], None], outputs: Sequence[Output]) -> None:
        """Have crew threads do something for each output that people want published.

        The first is done before all others begin. What is held is waited for when nothing else is
        left to be done; what is excluded, or done by another's word, is left out.

        Raises:
            PropmasterError: Of the first output that failed.
            TransferStateError: A person has set one to failed.
            CancelledError: Cancellation was wished.
        """
        most = 1
        while self._holds(outputs) or self.open(outputs):
            if to_do := self.open(outputs)[:most]:
                self.each(work, to_do)
                if any(self.steering.is_settled(self._tasks[each.path]) for each in to_do):
                    most = len(outputs)
            else:
                self.steering.wait_for_held()
        self.steering.refuse_given_up()

    def chosen(self, outputs: Sequence[Output]) -> list[Output]:
        """Return the outputs that people want published, when none of them is held any more.

        Raises:
            TransferStateError: A person has set one to failed.
            CancelledError: Cancellation was wished.
        """
        self.tick()
        while self._holds(outputs):
            self.steering.wait_for_held()
        self.steering.refuse_given_up()
        return self.open(outputs)

    def open(self, outputs: Iterable[Output]) -> list[Output]:
        """Return those that are still to be published, by all that is known of it now."""
        return [out for out in outputs if self.steering.is_open(self._tasks[out.path])]

    def wanted(self, outputs: Iterable[Output]) -> list[Output]:
        """Return those that are still to be published, held ones included."""
        return [out for out in outputs if self._holds([out]) or self.open([out])]

    def excluded(self, outputs: Iterable[Output]) -> list[Output]:
        """Return those that people have taken out, before they were published."""
        steering, tasks = self.steering, self._tasks
        return [
            output
            for output in outputs
            if steering.is_excluded(tasks[output.path])
            and not steering.is_settled(tasks[output.path])
        ]

    def _holds(self, outputs: Iterable[Output]) -> bool:
        """Whether a person holds one of them."""
        return any(self.steering.is_held(self._tasks[output.path]) for output in outputs)

    def each(
        self, work: Callable[[Output], None], outputs: Iterable[Output], *, settle: bool = True
    ) -> None:
        """Have crew threads do something for each output; the first failure ends it.

        Args:
            work: For one output.
            outputs: Which.
            settle: Whether the output is published then; one that people have taken out or held
                meanwhile is left, also in the middle of it.

        Raises:
            PropmasterError: Of the first output that failed.
            CancelledError: Cancellation was wished.
        """

        def do(output: Output) -> bool:
            if settle and not self.steering.is_open(self._tasks[output.path]):
                return False
            work(output)
            return settle

        with self._crew(do, self.context.concurrency) as (crew, products):
            outstanding = 0
            for output in outputs:
                self._halts.over(output.path)
                crew.order(output, self.steering.priority([self._tasks[output.path]]))
                outstanding += 1
            while outstanding:
                self.tick()
                if (taken := products.take(TICK_SECONDS)) is None:
                    continue
                outstanding -= 1
                output, done = taken
                if isinstance(done, CancelledError) and not self.halt.wished:
                    continue
                if isinstance(done, BaseException):
                    raise self._blamed(output, done)
                if done:
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
            self._halts.end_all()
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
    def attempt(self, output: Output) -> Iterator[Cancellation]:
        """Note that an output is tried, and lend what tells it to stop; for crew threads."""
        task = self._tasks[output.path]
        with self.context.attempt(task), self._halts.heeding(output.path) as halt:
            self.context.ledger.note(task, TaskStatus.EXECUTING)
            yield halt

    def _take_news(self, tasks: Collection[TaskNews]) -> None:
        """Have nothing more sent of what people have taken out or held."""
        changed = {task.id for task in tasks if not self.steering.is_open(task.id)}
        for path, task in self._tasks.items():
            if task in changed and not self.steering.is_settled(task):
                self._halts.end(path)

    def unfinished(self, output: Output) -> Unfinished:
        """Return where an upload in parts is noted; for crew threads.

        It is aborted however this run ends, but by a kill: then by the next publication. So the
        ledger knows of it before anything is sent.
        """
        task = self._tasks[output.path]

        def changed(upload: Unfinished) -> None:
            self.context.ledger.note_upload(task, upload.upload_id, ())
            if upload.upload_id and not upload.parts:
                self.context.ledger.write_upload(task, upload.upload_id)

        return Unfinished(changed=changed, drops=lambda: True)

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
    context: TransferContext,
    spec: TransferSpec,
    planned: Sequence[tuple[Output, str]],
    metadata: Mapping[str, Any],
) -> Iterator[Run]:
    """Begin a publish transfer and let go of it in the state that follows from how it went.

    Args:
        context: The services.
        spec: The transfer.
        planned: Each output with the key it goes to.
        metadata: What the ledger is to keep with each of them.

    Raises:
        TransferStateError: A living process is at it right now, or a person has called it done.
        TransferAbortedError: A person aborted it.
        PutOffError: It is paused, and not required.
        NoSpaceError, LocalWriteError: The ledger can not be written.
    """
    tasks = [
        TaskSpec(output.path, key, output.entry.size, metadata=metadata) for output, key in planned
    ]
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
        if isinstance(error, PutOffError):
            context.ledger.leave(row.id)
        else:
            context.ledger.finish(row.id, error)


def _put_off(reason: str) -> None:
    raise PutOffError(reason, hint="resume it; what is not required is waited for by nobody")
