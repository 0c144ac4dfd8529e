"""The engine behind the transfers that people create: files and objects, copied as they wish.

It works on all such transfers of the ledger at once, in the order that the ledger tells, and looks
four times a second what people have said meanwhile. What is paused stops at the next part and goes
on there later; what is aborted or excluded stops and leaves nothing behind. What has to give way to
something of higher priority keeps what it has in hand, and pauses at its next part. An attempt that
fails for a reason that may pass is made again after 1, 2, 4, 8 and 16 seconds, or so.

Concurrency: one thread runs the engine; each task has a thread of its own, which may be left behind
in a request when it is to stop, and then changes nothing any more. Only the ledger is shared.
"""

import queue
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from agent_plugin.content import events
from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.errors import (
    CancelledError,
    LocalReadError,
    PropmasterError,
)
from agent_plugin.content.flight import Lanes
from agent_plugin.content.objects import ObjectAccess
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.copy_notes import Outcome
from agent_plugin.transfer.copy_order import MOVING, PAUSED, Candidate, turns
from agent_plugin.transfer.copy_places import Place
from agent_plugin.transfer.copy_queue import CopyQueue, CopyTask, Standing
from agent_plugin.transfer.copy_servers import Servers
from agent_plugin.transfer.copy_settings import CopySettings
from agent_plugin.transfer.copy_task import Attempt, Halt, drop
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.ledger_file import BUSY_TIMEOUT_SECONDS
from agent_plugin.transfer.states import TaskStatus, TransferStatus

if TYPE_CHECKING:
    from agent_plugin.content.s3_objects import S3Objects

# Of tasks at once; each of them moves several parts at once.
CONCURRENCY: Final = 16
# How late the engine may learn what people say, in seconds; users are promised one.
BEAT_SECONDS: Final = 0.25
RETRY_FIRST_SECONDS: Final = 1.0
RETRY_CAP_SECONDS: Final = 30.0
# A task is tried again, so that its requests need not be tried for long.
REQUEST_ATTEMPTS: Final = 3
REQUEST_DEADLINE_SECONDS: Final = 10.0
# How long tasks that were told to stop are waited for.
_STOP_SECONDS: Final = 1.0
# Of those that pause for the sake of others; more of them would be threads and open files for none.
_PAUSED_AT_MOST: Final = 2
_BEGUN: Final = frozenset({TaskStatus.BOOTING, TaskStatus.EXECUTING})
_DROPPED: Final = frozenset({TaskStatus.EXCLUDED, TaskStatus.DONE, TaskStatus.FAILED})
_DROPPING: Final = frozenset({TransferStatus.ABORTED, TransferStatus.DONE, TransferStatus.FAILED})
_GENERATOR: Final = random.Random()  # noqa: S311 - a wait is no secret

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What a run of the engine has done.

    Attributes:
        transfers: The state of each transfer that it let go of, by number.
        files: Tasks that were done.
        bytes: That moved, copies by the stores included.
        failed: Tasks that gave up.
        seconds: How long it took.
    """

    transfers: Mapping[int, TransferStatus]
    files: int
    bytes: int
    failed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Left:
    """What could not be removed of a task that nobody goes on with.

    Attributes:
        destination: Of the task.
        reason: Why.
    """

    destination: str
    reason: str


@dataclass(slots=True)
class _Active:
    task: CopyTask
    halt: Halt = field(default_factory=Halt)

    @property
    def state(self) -> int:
        """As `turns` has it."""
        return PAUSED if self.halt.paused else MOVING


class Copying:
    """The engine.

    Args:
        ledger: Where the transfers are.
        open_objects: Returns the objects that an access sees, given what may move.
        cancellation: Ends the run; what is not done waits for the next.
        bandwidth: What may move, of all transfers together.
        account: Returns the file in which processes share a transfer's speed limit, by its number.
        concurrency: Tasks at once.
        only: The transfers that are meant; None for all.
        told: Told at each beat how many bytes have moved since the one before.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        open_objects: "Callable[[ObjectAccess, Bandwidth], S3Objects]",
        cancellation: Cancellation,
        bandwidth: Bandwidth,
        account: Callable[[int], str],
        concurrency: int = CONCURRENCY,
        only: Collection[int] | None = None,
        told: Callable[[int], None] = lambda _bytes: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue = CopyQueue(ledger.file, clock, only)
        self._servers = Servers(open_objects, bandwidth, account)
        self._cancellation = cancellation
        self._concurrency = concurrency
        self._told = told
        self._clock = clock
        self._lanes = Lanes((2 + _PAUSED_AT_MOST) * concurrency)
        self._ended: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
        self._active: dict[int, _Active] = {}
        # Of our transfers, of the tasks under way, and of what other processes move.
        self._standing: tuple[dict[int, Standing], dict[int, Standing], int] = ({}, {}, -1)
        self._yielding: frozenset[int] = frozenset()
        self._free = 0
        self._settings: dict[int, CopySettings] = {}
        self._tries: dict[int, int] = {}
        self._moved: dict[int, int] = {}
        self._counting = threading.Lock()
        self._bytes = self._files = self._failed = 0
        self._leaves = True
        self._clearing: Future[list[Left]] | None = None
        # What no attempt should end with.
        self._crash: BaseException | None = None
        self._next_beat = 0.0
        self._transfers: dict[int, TransferStatus] = {}

    def run(self) -> CopyResult:
        """Carry out what waits, and what is added meanwhile; return when nothing is left to do.

        Raises:
            CancelledError: Cancellation was wished.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        begun = time.monotonic()
        try:
            while self._turn():
                self._cancellation.check()
        finally:
            self._stop()
        result = CopyResult(
            self._transfers, self._files, self._bytes, self._failed, time.monotonic() - begun
        )
        log.info(
            events.COPIES_COMPLETED,
            extra={
                "transfers": len(result.transfers),
                "files": result.files,
                "failed": result.failed,
                "bytes": result.bytes,
                "seconds": round(result.seconds, 3),
            },
        )
        return result

    def clear(self, patience: float) -> list[Left]:
        """Remove what is left of tasks that nobody goes on with; return what could not be.

        What could not be removed is tried again by the next run.

        Args:
            patience: Seconds to wait for servers.
        """
        future = self._lanes.submit(self._clear_all)
        wait([future], timeout=patience)
        if future.done():
            return future.result()
        left = [
            Left(task.destination, f"it was not done within {patience:g} s")
            for task in self._queue.leftovers()
        ]
        for each in left:
            _tell(each)
        return left

    def _clear_all(self) -> list[Left]:
        left: list[Left] = []
        unreachable: dict[object, str] = {}
        for task in self._queue.leftovers():
            access: object = None
            try:
                settings = self._settings_of(task.transfer)
                access = settings.destination.access if task.upload_id else None
                reason = unreachable.get(access, "")
                # A server that does not answer is not asked for each of a thousand tasks.
                if not reason:
                    drop(task, settings, self._servers.opener(task.transfer, settings))
                    self._queue.forget(task)
                    continue
            except PropmasterError as error:
                reason = error.message
                if error.retryable:
                    unreachable[access] = reason
            left.append(Left(task.destination, reason))
            _tell(left[-1])
        return left

    # ------------------------------------------------------------------------------ one turn

    def _turn(self) -> bool:
        """Begin what there is room for, look around, and wait a moment; False at the end."""
        if time.monotonic() >= self._next_beat:
            self._beat()
        elif any(active.halt.paused for active in self._active.values()):
            # What pauses goes on before anything of the same priority begins.
            self._rank()
        else:
            self._free = self._concurrency - len(self._active)
        begun = self._begin()
        if not (begun or self._active):
            # Nothing is left, unless people have said something since the last beat.
            self._beat()
            begun = self._begin()
        if self._active:
            self._await(self._next_beat - time.monotonic())
            return True
        if begun:
            return True
        due = self._queue.next_due()
        clearing = self._clearing is not None and not self._clearing.done()
        if self._yielding or self._queue.behind or clearing:
            due = self._clock() + BEAT_SECONDS
        if due is None:
            return False
        self._cancellation.sleep(max(0.01, min(due - self._clock(), BEAT_SECONDS)))
        return True

    def _beat(self) -> None:
        """Take what waits, and look around."""
        self._next_beat = time.monotonic() + BEAT_SECONDS
        for transfer in self._queue.take(self._yielding):
            # What it is told may be another thing than when it was paused.
            self._settings.pop(transfer, None)
            self._transfers.pop(transfer, None)
        self._look()
        self._clear_meanwhile()
        self._rank()

    def _begin(self) -> bool:
        """Begin the tasks whose turn it is; return whether there were any."""
        claimed = self._queue.claim(self._free, self._active, self._yielding)
        for task in claimed:
            self._start(task)
        return bool(claimed)

    def _rank(self) -> None:
        """See who may move something now; the others pause, and their transfers give way."""
        transfers, tasks, elsewhere = self._standing
        candidates = self._queue.waiting(self._concurrency, self._active)
        for task_id, active in self._active.items():
            transfer, task = transfers.get(active.task.transfer), tasks.get(task_id)
            # One that began since the last beat has the priorities that it had then.
            if transfer is not None and not active.halt.wished:
                priority = task.priority if task else active.task.priority
                candidates.append(Candidate(task_id, transfer.priority, priority, active.state))
        now = turns(candidates, self._concurrency, elsewhere)
        self._free = now.free
        paused = 0
        for task_id, active in self._active.items():
            if task_id in now.moving:
                active.halt.resume()
            elif not active.halt.wished:
                active.halt.pause()
                paused += 1
                if paused > _PAUSED_AT_MOST * self._concurrency:
                    active.halt.stop(drops=False)
        before = self._yielding
        self._yielding = frozenset(
            transfer for transfer, standing in transfers.items() if standing.priority < now.priority
        )
        if before != self._yielding:
            self._queue.give_way(self._yielding, before)

    def _clear_meanwhile(self) -> None:
        """Have removed what tasks have left, on another thread: a server may take its time."""
        if self._clearing is not None and not self._clearing.done():
            return
        self._clearing = None
        if self._leaves:
            self._leaves = False
            self._clearing = self._lanes.submit(self._clear_all)

    def _start(self, task: CopyTask) -> None:
        """Have a claimed task carried out by a thread of its own."""
        try:
            settings = self._settings_of(task.transfer)
            admitted = settings.names.admits(_name(task.source))
        except PropmasterError as error:
            self._settle([Outcome(task.id, TaskStatus.FAILED, error)])
            return
        if not admitted:
            self._settle([Outcome(task.id, TaskStatus.EXCLUDED)])
            return
        active = self._active[task.id] = _Active(task)

        def measured(size: int) -> None:
            if size != task.size:
                self._queue.notes.measured(task.id, size)

        attempt = Attempt(
            task,
            settings,
            self._servers.opener(task.transfer, settings),
            active.halt,
            partial(self._count, task.transfer),
            partial(self._queue.notes.keep, task.id),
            measured,
            time.monotonic,
            self._servers.limit(task.transfer, settings),
        )

        def carry_out() -> None:
            try:
                attempt.run()
            except BaseException as error:  # noqa: BLE001 - the engine's thread deals with it
                self._ended.put((task.id, error))
            else:
                self._ended.put((task.id, None))

        self._lanes.submit(carry_out)

    def _look(self) -> None:
        """Tell the ledger how far we are; stop, or let go of, what people do not want any more."""
        with self._counting:
            moved, self._moved = self._moved, {}
        transfers, tasks = self._queue.beat(moved, list(self._active))
        self._standing = transfers, tasks, self._queue.elsewhere()
        self._told(sum(moved.values()))
        for task_id, active in self._active.items():
            # Absent: another engine has taken it over, and goes on with what there is.
            transfer = transfers.get(active.task.transfer)
            task = tasks.get(task_id)
            if transfer is None or task is None:
                active.halt.stop(drops=False)
            elif transfer.status in _DROPPING or task.status in _DROPPED:
                active.halt.stop(drops=True)
            elif not self._goes_on(active.task.transfer, transfer) or task.status not in _BEGUN:
                active.halt.stop(drops=False)
        busy = {active.task.transfer for active in self._active.values()}
        self._transfers.update(self._queue.let_go(busy, stopping=False))

    def _goes_on(self, transfer: int, standing: Standing) -> bool:
        """Whether a transfer runs, if only others did not come first."""
        if standing.status == TransferStatus.WAITING:
            return transfer in self._yielding
        return standing.status == TransferStatus.RUNNING

    def _await(self, seconds: float) -> None:
        """Deal with tasks that have ended; wait for one, no longer than that, if none has."""
        ended = []
        with suppress(queue.Empty):
            ended.append(self._ended.get(timeout=max(0.0, seconds)))
            while len(ended) < len(self._active):
                ended.append(self._ended.get_nowait())
        # Written at once: the rest of the engine waits for this thread.
        self._settle([self._outcome(*each) for each in ended])
        if self._crash is not None:
            raise self._crash

    def _outcome(self, task_id: int, error: BaseException | None) -> Outcome:
        """Return what becomes of a task whose attempt has ended."""
        active = self._active.pop(task_id)
        self._leaves = self._leaves or error is not None
        if error is None:
            self._files += 1
            return Outcome(task_id, TaskStatus.DONE)
        if isinstance(error, CancelledError) or active.halt.wished:
            # What an aborted one has left, `clear` removes.
            return Outcome(task_id, TaskStatus.QUEUED)
        if isinstance(error, PropmasterError):
            return self._failure(active.task, error)
        if isinstance(error, OSError):
            place = error.filename or active.task.source
            failure = LocalReadError(f"{place}: {error.strerror or error}")
            return self._failure(active.task, failure)
        self._crash = error
        return Outcome(task_id, TaskStatus.QUEUED)

    def _failure(self, task: CopyTask, error: PropmasterError) -> Outcome:
        """Return what becomes of a task that has failed: it is tried again, or given up."""
        tries = self._tries[task.id] = self._tries.get(task.id, 0) + 1
        if error.retryable and tries < self._settings_of(task.transfer).max_tries:
            wait = retry_wait(tries, _GENERATOR.random())
            return Outcome(task.id, TaskStatus.QUEUED, error, self._clock() + wait)
        self._failed += 1
        return Outcome(task.id, TaskStatus.FAILED, error)

    def _settle(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.status is not TaskStatus.QUEUED:
                # A person who has it tried again gives it all its tries.
                self._tries.pop(outcome.task_id, None)
        self._queue.notes.settle(outcomes)

    # ---------------------------------------------------------------------------------- end

    def _stop(self) -> None:
        """Let go of everything."""
        for active in self._active.values():
            active.halt.stop(drops=False)
        until = time.monotonic() + _STOP_SECONDS
        while self._active and (left := until - time.monotonic()) > 0:
            try:
                task_id, error = self._ended.get(timeout=left)
            except queue.Empty:
                break
            del self._active[task_id]
            self._files += error is None
            status = TaskStatus.QUEUED if error else TaskStatus.DONE
            self._queue.notes.settle([Outcome(task_id, status)])
        if self._clearing is not None:
            wait([self._clearing], timeout=max(0.0, until - time.monotonic()))
        with self._counting:
            moved, self._moved = self._moved, {}
        # Who was told to stop is to end; the next engine finds that this one is gone.
        patience = _STOP_SECONDS if self._cancellation.wished else BUSY_TIMEOUT_SECONDS
        self._queue.beat(moved, (), patience)
        let_go = self._queue.let_go((), stopping=True, patience=patience)
        self._transfers.update(let_go)

    def _count(self, transfer: int, size: int) -> None:
        with self._counting:
            self._bytes += size
            self._moved[transfer] = self._moved.get(transfer, 0) + size

    def _settings_of(self, transfer: int) -> CopySettings:
        found = self._settings.get(transfer)
        if found is None:
            found = self._settings[transfer] = CopySettings.read(self._queue.settings(transfer))
        return found


def retry_wait(tries: int, drawn: float) -> float:
    """Return the seconds to wait after so many tries (from 1).

    Args:
        tries: That failed.
        drawn: Evenly distributed in [0, 1).
    """
    longest = min(RETRY_CAP_SECONDS, RETRY_FIRST_SECONDS * 2.0 ** min(tries - 1, 30))
    return longest * (0.75 + 0.5 * drawn)


def request_policy(policy: RetryPolicy) -> RetryPolicy:
    """Return how requests of copying transfers are sent again."""
    return replace(
        policy,
        attempts=min(policy.attempts, REQUEST_ATTEMPTS),
        # Attempts that the store asks to come later do not count, only their time does.
        deadline_seconds=min(policy.deadline_seconds, REQUEST_DEADLINE_SECONDS),
    )


def _tell(left: Left) -> None:
    extra = {"object": left.destination, "reason": left.reason}
    log.warning(events.UPLOAD_LEFT, extra=extra)


def _name(source: str) -> str:
    place = Place.parse(source)
    return place.key or place.path
