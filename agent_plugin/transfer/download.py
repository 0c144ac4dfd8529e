"""Downloads: a plan becomes files under its root.

The calling thread places files; threads obtain the blobs that the cache lacks (fetching.py). A
small one is published to the cache by the calling thread: file creation does not gain from more
threads. Without a cache, or when it fails, blobs only go to their places (download_cache.py).

What people want of it meanwhile is done at each beat (steering.py): a file that is excluded or held
is not placed, and its blob not asked for unless another file needs it. If it is being asked for,
a large one ends at its next part, and a small one is not waited for.

A failure of one file stops the transfer: a session whose inputs are not complete must not start.
What is complete stays, in place and in the cache, for the next try.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    CancelledError,
    InputError,
    LocalError,
    PropmasterError,
    local_write_error,
)
from agent_plugin.content.layout import blob_key
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.store import Cancellation, Progress
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download_cache import DownloadCache
from agent_plugin.transfer.engine import TICK_SECONDS
from agent_plugin.transfer.fetching import Fetching, Obtained
from agent_plugin.transfer.ledger import TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.ledger_news import TaskNews
from agent_plugin.transfer.placement import Placer, StagedFile
from agent_plugin.transfer.plan import EMPTY, DownloadPlan
from agent_plugin.transfer.progress import Meter
from agent_plugin.transfer.states import TaskStatus
from agent_plugin.transfer.steering import EndedByHandError, Steering

log = events.get_logger()

_MEND: Final = "Delete that object, then submit the job again, with --force-store-check."
# How often a blob that turns out to be damaged in the cache is fetched anew.
CACHE_REPAIRS: Final = 2


@dataclass(frozen=True, slots=True)
class TransferResult:
    """What a transfer did; sizes in bytes.

    Attributes:
        files, bytes: In place at the end.
        bytes_fetched: Of the distinct bytes, those that came from the store.
        bytes_reused: Those that were on this host already.
        excluded: What people took out: it is not in place, and not in the counts.
    """

    files: int
    bytes: int
    bytes_fetched: int
    bytes_reused: int
    seconds: float
    excluded: tuple[FileEntry, ...] = ()


class _Boundary(Cancellation):
    """Takes each check for a part boundary, at which people's wishes are heeded."""

    def __init__(self, heed: Callable[[], None]) -> None:
        super().__init__()
        self._heed = heed

    def check(self) -> None:
        self._heed()


class _NotWantedError(CancelledError):
    """The file that is being placed was excluded, or is held, meanwhile."""


@dataclass(slots=True)
class _Counts:
    fetched: int = 0
    seen: list[Digest] = field(default_factory=list)
    repairs: dict[Digest, int] = field(default_factory=dict)


def download(plan: DownloadPlan, context: TransferContext, spec: TransferSpec) -> TransferResult:
    """Carry a plan out.

    Raises:
        BlobNotFoundError, BlobCorruptError, StoreAccessError, StoreUnavailableError: For a file
            named in the message.
        NoSpaceError, PathClashError, UnsafePathError, LocalWriteError: On this host.
        CancelledError: On request.
        TransferAbortedError: A person aborted it.
        TransferStateError: Another process carries the same transfer out right now, or a person has
            set one of its files to failed.
    """
    started = time.monotonic()
    row = context.ledger.begin(
        spec,
        (
            TaskSpec(_source_of(plan, entry), entry.path, digest.size)
            for digest, entries in plan.wanted.items()
            for entry in entries
        ),
        context.cancellation,
    )
    error: PropmasterError | None = None
    try:
        with _Download(plan, context, row) as running:
            running.run()
    except PropmasterError as failure:
        error = failure
        raise
    except BaseException:
        error = CancelledError("interrupted")
        raise
    finally:
        context.ledger.finish(row.id, error)
    result = running.result(time.monotonic() - started)
    log.info(
        events.TRANSFER_COMPLETED,
        extra={
            "transfer": row.id,
            "kind": spec.kind,
            "files": result.files,
            "bytes": result.bytes,
            "bytes_fetched": result.bytes_fetched,
            "excluded": len(result.excluded),
            "seconds": round(result.seconds, 3),
        },
    )
    return result


def _source_of(plan: DownloadPlan, entry: FileEntry) -> str:
    """Return what the ledger calls where a file comes from."""
    return entry.hash if plan.origin is None else plan.origin.names[entry.path]


class _Download:
    """One run of one plan; see the module's docstring for who does what."""

    def __init__(self, plan: DownloadPlan, context: TransferContext, row: TransferRow) -> None:
        self._plan = plan
        self._context = context
        self._row = row
        # Of an origin, what is wanted by what the ledger calls it; made when first needed.
        self._digests: dict[str, Digest] = {}
        self._halt = Cancellation()
        meter = Meter(plan.files_to_place, plan.bytes_to_place)
        self._steering = Steering(context, row, self._halt, meter, self._take_news)
        self._tasks = self._steering.tasks
        # Blobs that are to be had without being fetched.
        self._ready: OrderedDict[Digest, None] = OrderedDict()
        # The task whose file is being placed.
        self._placing = 0
        # Bytes of large blobs that came and are not in place yet; a blob has one thread at a time.
        self._arrived: dict[Digest, int] = {}
        # The time as well, since another host's ledger may have the same id for the same root.
        label = f"{row.id}-{int(row.created * 1_000_000):x}"
        self._placer = Placer(
            plan.root,
            label,
            direct=plan.hidden,
            exclusive=plan.exclusive,
            follow=plan.follow_root,
            owner=plan.owner,
            cancellation=_Boundary(self._heed),
        )
        self._cache = DownloadCache(context.cache if plan.origin is None else None)
        self._fetching = Fetching(
            plan,
            context,
            self._cache,
            self._placer,
            task_of=self._first_task_of,
            told=self._told,
            halt=self._halt,
        )
        self._ended_by_hand = False
        self.counts = _Counts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.cancel()
        self._fetching.end()
        self._placer.close()
        self._fetching.drop()

    def run(self) -> None:
        """Place all that people want placed; what they call done is left as it is."""
        try:
            self._place_wanted()
        except EndedByHandError:
            self._ended_by_hand = True

    def _place_wanted(self) -> None:
        self._keep()
        wanted = self._plan.wanted
        if self._steering.sets_aside:
            for entry in (entry for entries in wanted.values() for entry in entries):
                self._steering.plan(self._task_of(entry), entry.size)
        for digest in wanted:
            self._want(digest)
        with self._context.view(self._row.kind) as self._steering.view:
            while self._fetching.is_awaited or self._ready or self._steering.holds:
                self._tick()
                if not (self._fetching.is_awaited or self._ready):
                    # What was left may have been taken out at this moment.
                    if self._steering.holds:
                        self._steering.wait_for_held()
                    continue
                taken = self._fetching.take(0 if self._ready else TICK_SECONDS)
                if taken is not None:
                    self._place_obtained(*taken)
                elif self._ready:
                    self._place_cached(self._ready.popitem(last=False)[0])
            self._tell_seen()
            self._steering.finish()
        self._steering.refuse_given_up()

    def result(self, seconds: float) -> TransferResult:
        """Return what it did."""
        plan = self._plan
        distinct = sum(digest.size for digest in plan.wanted)
        excluded: list[FileEntry] = []
        if self._steering.sets_aside or self._ended_by_hand:
            distinct = 0
            for digest, entries in plan.wanted.items():
                missing = [e for e in entries if not self._steering.is_settled(self._task_of(e))]
                excluded += missing
                distinct += digest.size if len(missing) < len(entries) else 0
        kept = sum(entry.size for entry in plan.kept)
        return TransferResult(
            files=plan.files_to_place + len(plan.kept) - len(excluded),
            bytes=plan.bytes_to_place + kept - sum(entry.size for entry in excluded),
            bytes_fetched=self.counts.fetched,
            bytes_reused=max(0, distinct + kept - self.counts.fetched),
            seconds=seconds,
            excluded=tuple(excluded),
        )

    def _task_of(self, entry: FileEntry) -> int:
        return self._tasks[_source_of(self._plan, entry), entry.path]

    def _open(self, digest: Digest) -> list[FileEntry]:
        """Return the files that are still to be placed of a blob, of those that people want."""
        entries = self._plan.wanted[digest]
        return [entry for entry in entries if self._steering.is_open(self._task_of(entry))]

    def _want(self, digest: Digest) -> None:
        """See that a blob comes if a file needs it, as urgently as that is by now."""
        entries = self._open(digest)
        priority = self._steering.priority(self._task_of(entry) for entry in entries)
        if not self._fetching.withdraw(digest, wanted=bool(entries)):
            return
        self._ready.pop(digest, None)
        if not entries:
            return
        if digest == EMPTY or (digest in self._plan.cached and digest not in self.counts.repairs):
            self._ready[digest] = None
        else:
            self._fetching.order(digest, priority)

    def _digest_of(self, task: TaskNews) -> Digest | None:
        """Return what content a task brings; None for one of an origin that is not of this plan."""
        if self._plan.origin is None:
            return Digest(task.source, task.size)
        if not self._digests:
            self._digests = {
                _source_of(self._plan, entry): digest
                for digest, entries in self._plan.wanted.items()
                for entry in entries
            }
        return self._digests.get(task.source)

    def _take_news(self, tasks: Collection[TaskNews]) -> None:
        """Do what people want of some tasks: place them, or not, and sooner or later."""
        kept = {
            self._tasks.get((_source_of(self._plan, entry), entry.path))
            for entry in self._plan.kept
        }
        digests: dict[Digest, None] = {}
        for task in tasks:
            digest = self._digest_of(task)
            if task.id in kept and task.status is TaskStatus.QUEUED:
                self._context.ledger.note(task.id, TaskStatus.DONE)
            elif digest is not None and digest in self._plan.wanted:
                digests[digest] = None
        for digest in digests:
            self._want(digest)

    def _tick(self) -> None:
        """Stop or wait if that is wished, and say now and then how far it is."""
        if self._steering.beats_now:
            self._tell_seen()
        self._steering.tick()

    def _heed(self) -> None:
        """The same in the middle of a file, which people may not want any more.

        Raises:
            _NotWantedError: They do not.
        """
        self._tick()
        if self._placing and not self._steering.is_open(self._placing):
            raise _NotWantedError("a person has taken it out")

    def _tell_seen(self) -> None:
        seen, self.counts.seen = self.counts.seen, []
        self._context.remember_present(seen)

    def _keep(self) -> None:
        for entry in self._plan.retimed:
            self._placer.retime(entry)
        for entry in self._plan.kept:
            # A killed run had placed it, and its note was lost.
            task = self._tasks.get((_source_of(self._plan, entry), entry.path))
            if task is not None:
                self._context.ledger.note(task, TaskStatus.DONE)

    # ------------------------------------------------------------------ on the crew's threads

    def _first_task_of(self, digest: Digest) -> int:
        first = next(iter(self._open(digest)), self._plan.wanted[digest][0])
        return self._task_of(first)

    def _told(self, digest: Digest, task: int) -> Progress:
        """Return what counts the bytes of a large blob as they come, those of its first file."""

        def count(size: int) -> None:
            # A blob that has to be fetched again comes twice.
            size = min(size, digest.size - self._arrived.get(digest, 0))
            self._arrived[digest] = self._arrived.get(digest, 0) + size
            self._steering.count(task, size)
            self._context.ledger.note_moved(task, size)

        return count

    # ------------------------------------------------------------------ on the calling thread

    def _place_obtained(self, digest: Digest, obtained: Obtained | BaseException) -> None:
        """Place what the crew obtained."""
        if isinstance(obtained, BaseException):
            # It may have been ended since people took all of its files out while it was asked for.
            ended = isinstance(obtained, CancelledError) and not self._halt.wished
            if not ended and (self._open(digest) or isinstance(obtained, CancelledError)):
                raise self._failure(digest, obtained) from obtained
            self._uncount(digest)
            # They may want some again.
            self._want(digest)
            return
        try:
            if obtained.fetched:
                self.counts.fetched += digest.size
                if self._plan.origin is None:
                    self.counts.seen.append(digest)
            if obtained.data is not None:
                self._cache.add(digest, obtained.data)
                data = obtained.data
                self._place_all(
                    self._open(digest), lambda entry: self._placer.place_data(entry, data)
                )
            elif obtained.staged is not None:
                self._place_staged(digest, obtained.staged)
            else:
                self._place_cached(digest)
        finally:
            self._fetching.give_back(digest, obtained)
        self._uncount(digest)

    def _uncount(self, digest: Digest) -> None:
        """Take back what was counted of a large blob that no file needs any more."""
        if arrived := self._arrived.pop(digest, 0):
            task = self._task_of(self._plan.wanted[digest][0])
            self._steering.count(task, -arrived, moved=False)

    def _place_staged(self, digest: Digest, staged: StagedFile) -> None:
        entries = self._open(digest)
        # The copies first: once the file has its name, a job may write to it.
        self._place_all(entries[1:], lambda entry: self._placer.place_copy(entry, staged.fd))
        self._place_all(entries[:1], lambda entry: self._placer.place_staged(entry, staged))

    def _place_cached(self, digest: Digest) -> None:
        """Place a blob out of the cache, or have it fetched again."""
        if digest == EMPTY:
            self._place_all(self._open(digest), lambda entry: self._placer.place_data(entry, b""))
            return
        fd = self._cache.open(digest)
        if fd is None:
            self._again(digest)
            return
        try:
            self._place_all(self._open(digest), lambda entry: self._placer.place_copy(entry, fd))
        except BlobCorruptError as error:
            self._cache.quarantine(digest, error)
            self._again(digest)
        finally:
            os.close(fd)

    def _again(self, digest: Digest) -> None:
        repairs = self.counts.repairs.get(digest, 0) + 1
        self.counts.repairs[digest] = repairs
        if repairs > CACHE_REPAIRS:
            # Evicted or damaged again and again: the cache is of no use for this transfer.
            self._cache.abandon(BlobCorruptError(f"{digest} does not stay whole in the cache"))
        if entries := self._open(digest):
            tasks = [self._task_of(entry) for entry in entries]
            self._fetching.order(digest, self._steering.priority(tasks))

    def _place_all(self, entries: Sequence[FileEntry], place: Callable[[FileEntry], None]) -> None:
        for entry in entries:
            self._tick()
            task = self._task_of(entry)
            if not self._steering.is_open(task):
                continue
            self._placing = task
            try:
                place(entry)
            except _NotWantedError:
                continue
            except (LocalError, InputError) as error:
                self._context.ledger.note(task, TaskStatus.FAILED, error)
                raise
            finally:
                self._placing = 0
            self._steering.settle(task)
            # What was counted as it came is that of one file.
            self._steering.count(task, entry.size - self._arrived.pop(entry.digest, 0), files=1)

    def _failure(self, digest: Digest, error: BaseException) -> BaseException:
        """Record that a blob could not be had; return what to raise, naming the files."""
        entries = self._plan.wanted[digest]
        if isinstance(error, OSError):
            error = local_write_error(error, os.fspath(self._plan.root / entries[0].path))
        if not isinstance(error, PropmasterError) or isinstance(error, CancelledError):
            return error
        if isinstance(error, BlobNotFoundError):
            self._context.index.forget(self._context.remembered_as, digest)
        others = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        key = named = _source_of(self._plan, entries[0])
        if self._plan.origin is None:
            key = blob_key(digest)
            named = f"{self._context.store_url}/{key}"
        place = "" if key in error.message else f"{named}: "
        hint = error.hint or (_MEND if isinstance(error, BlobCorruptError) else "")
        failure = type(error)(f"{entries[0].path}{others}: {place}{error.message}", hint=hint)
        for entry in self._open(digest):
            self._context.ledger.note(self._task_of(entry), TaskStatus.FAILED, failure)
        return failure
