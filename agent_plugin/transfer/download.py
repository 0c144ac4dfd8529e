"""Downloads: a plan becomes files under its root.

The calling thread places files; a crew of threads obtains blobs that the cache lacks. A small blob
travels in memory and is published to the cache by the calling thread (file creation does not gain
from more threads); a large one is written by its crew thread into a staged file under the root, and
copied from there into the cache. While a blob is fetched its claim is held, so that another process
waits for it instead of fetching it too; the claim is released after publication. Without a cache,
or when the cache fails, blobs only go to their places.

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
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Self

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache, Claim
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    CacheUnsafeError,
    CancelledError,
    InputError,
    LocalError,
    PropmasterError,
    local_write_error,
)
from agent_plugin.content.layout import blob_key
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Progress
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.engine import TICK_SECONDS, ByteBudget, Crew, Halts, Products
from agent_plugin.transfer.ledger import TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.ledger_news import TaskNews
from agent_plugin.transfer.placement import CacheCopy, Placer, StagedFile
from agent_plugin.transfer.plan import EMPTY, DownloadPlan
from agent_plugin.transfer.progress import Meter
from agent_plugin.transfer.states import TaskStatus
from agent_plugin.transfer.steering import EndedByHandError, Steering

log = events.get_logger()

# For so long another process's fetch of the same blob is waited for; then we fetch it as well,
# since that process may be stopped or very slow.
SINGLE_FLIGHT_SECONDS: Final = 60.0
# Large blobs are fetched in parallel parts each, so a few at once fill any link.
LARGE_AT_ONCE: Final = 3
_MEND: Final = "Delete that object, then submit the job again, with --force-store-check."
# Users are promised an end within a second; a fetch in parts looks every 0.1 s whether to stop.
LARGE_STOP_SECONDS: Final = 0.4
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


@dataclass(slots=True)
class _Obtained:
    """A blob that a crew thread obtained: in memory, in a staged file, or in the cache."""

    data: bytes | None = None
    staged: StagedFile | None = None
    claim: Claim | None = None
    fetched: bool = True

    def close(self) -> None:
        if self.staged is not None:
            self.staged.close()
        if self.claim is not None:
            self.claim.release()


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
        # Blobs are read from the one and added to the other: a full cache can still be read. Crew
        # threads may set both to None, so each method takes its own copy first.
        cache = context.cache if plan.origin is None else None
        self._cache: BlobCache | None = cache
        self._filling: BlobCache | None = cache
        self._open_origin = context.open_store if plan.origin is None else plan.origin.open
        # Of an origin, what is wanted by what the ledger calls it; made when first needed.
        self._digests: dict[str, Digest] = {}
        self._halt = Cancellation()
        meter = Meter(plan.files_to_place, plan.bytes_to_place)
        self._steering = Steering(context, row, self._halt, meter, self._take_news)
        self._tasks = self._steering.tasks
        self._budget = ByteBudget()
        self._halts: Halts[Digest] = Halts(self._halt)
        self._obtained: Products[Digest, _Obtained] = Products(drop=_Obtained.close)
        self._small = Crew(self._obtain, self._obtained, context.concurrency, self._halt)
        self._large = Crew(self._obtain, self._obtained, LARGE_AT_ONCE, self._halt)
        # Blobs that the crew has been asked for, and those that are to be had without it.
        self._ordered: set[Digest] = set()
        self._ready: OrderedDict[Digest, None] = OrderedDict()
        # Small ones that the crew is still asked for, and that nobody waits for.
        self._left: set[Digest] = set()
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
        self._ended_by_hand = False
        self.counts = _Counts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.cancel()
        self._halts.end_all()
        self._small.close()
        self._large.close()
        # They remove what they had begun to write; a small blob's thread has nothing of the kind.
        self._large.join(LARGE_STOP_SECONDS)
        self._placer.close()
        # What the crew had ready when the transfer stopped: its claims and files are given back.
        self._obtained.close()

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
            while self._ordered or self._ready or self._steering.holds:
                self._tick()
                if not (self._ordered or self._ready):
                    # What was left may have been taken out at this moment.
                    if self._steering.holds:
                        self._steering.wait_for_held()
                    continue
                taken = self._obtained.take(0 if self._ready else TICK_SECONDS)
                if taken is not None:
                    self._ordered.discard(taken[0])
                    self._left.discard(taken[0])
                    self._halts.over(taken[0])
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
        if digest in self._left:
            if entries:
                self._left.discard(digest)
                self._ordered.add(digest)
            return
        if digest in self._ordered:
            if not self._crew(digest).withdraw(digest):
                if not entries:
                    self._let_go(digest)
                return
            self._ordered.discard(digest)
        self._ready.pop(digest, None)
        if not entries:
            return
        if digest == EMPTY or (digest in self._plan.cached and digest not in self.counts.repairs):
            self._ready[digest] = None
        else:
            self._order(digest, priority)

    def _let_go(self, digest: Digest) -> None:
        """Do without a blob that is being asked for."""
        self._halts.end(digest)
        if digest.size <= WHOLE_BLOB_BYTES:
            # A request that was sent can not be ended.
            self._ordered.discard(digest)
            self._left.add(digest)

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

    def _crew(self, digest: Digest) -> Crew[Digest, _Obtained]:
        return self._small if digest.size <= WHOLE_BLOB_BYTES else self._large

    def _order(self, digest: Digest, priority: int) -> None:
        self._ordered.add(digest)
        self._crew(digest).order(digest, priority)

    def _keep(self) -> None:
        for entry in self._plan.retimed:
            self._placer.retime(entry)
        for entry in self._plan.kept:
            # A killed run had placed it, and its note was lost.
            task = self._tasks.get((_source_of(self._plan, entry), entry.path))
            if task is not None:
                self._context.ledger.note(task, TaskStatus.DONE)

    def _is_cached(self, digest: Digest) -> bool:
        cache = self._cache
        if cache is None:
            return False
        try:
            return cache.contains(digest)
        except LocalError as error:
            self._abandon(error)
            return False

    # ------------------------------------------------------------------ on the crew's threads

    def _obtain(self, digest: Digest) -> _Obtained:
        first = next(iter(self._open(digest)), self._plan.wanted[digest][0])
        task = self._task_of(first)
        with self._context.attempt(task), self._halts.heeding(digest) as halt:
            return self._obtain_for(digest, task, halt)

    def _obtain_for(self, digest: Digest, task: int, halt: Cancellation) -> _Obtained:
        claim = self._claim(digest, halt)
        try:
            if claim is None and self._is_cached(digest):
                return _Obtained(fetched=False)
            self._context.ledger.note(task, TaskStatus.EXECUTING)
            if digest.size <= WHOLE_BLOB_BYTES:
                self._budget.acquire(digest.size, halt)
                try:
                    data = self._open_origin().get(digest)
                except BaseException:
                    self._budget.release(digest.size)
                    raise
                return _Obtained(data=data, claim=claim)
            return self._obtain_large(digest, claim, task, halt)
        except BaseException:
            if claim is not None:
                claim.release()
            raise

    def _claim(self, digest: Digest, halt: Cancellation) -> Claim | None:
        """Return the right to fetch; None when the blob has come, or there is no cache."""
        cache = self._filling
        if cache is None:
            return None
        try:
            return cache.claim_or_wait(digest, SINGLE_FLIGHT_SECONDS, halt)
        except LocalError as error:
            self._bypass(error)
            return None

    def _obtain_large(
        self, digest: Digest, claim: Claim | None, task: int, halt: Cancellation
    ) -> _Obtained:
        staged: StagedFile | None = None
        try:
            staged = self._placer.stage()
            self._fetch(digest, staged, task, halt)
        except BaseException as error:
            if staged is not None:
                staged.close()
            if isinstance(error, OSError):
                raise local_write_error(error, os.fspath(self._plan.root)) from error
            raise
        return _Obtained(staged=staged, claim=claim)

    def _fetch(self, digest: Digest, staged: StagedFile, task: int, halt: Cancellation) -> None:
        with ExitStack() as files:
            copy = self._copy_for_cache(digest, staged, files)
            told = self._told(digest, task)
            if copy is None:
                self._open_origin().fetch(digest, staged.fd, cancellation=halt, progress=told)
            else:
                self._context.open_store().fetch(
                    digest, staged.fd, cancellation=halt, progress=told, hashed=copy.take
                )
                try:
                    copy.publish(digest)
                except (LocalError, BlobCorruptError, OSError) as error:
                    self._bypass(error)

    def _copy_for_cache(
        self, digest: Digest, staged: StagedFile, files: ExitStack
    ) -> CacheCopy | None:
        cache = self._filling
        if cache is None:
            return None
        try:
            kept = files.enter_context(cache.staging(digest.size))
        except LocalError as error:
            self._bypass(error)
            return None
        return CacheCopy(kept, staged, clones=self._placer.can_clone(staged, kept.fd))

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

    def _place_obtained(self, digest: Digest, obtained: _Obtained | BaseException) -> None:
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
                self._publish(digest, obtained.data)
                data = obtained.data
                self._place_all(
                    self._open(digest), lambda entry: self._placer.place_data(entry, data)
                )
            elif obtained.staged is not None:
                self._place_staged(digest, obtained.staged)
            else:
                self._place_cached(digest)
        finally:
            if obtained.data is not None:
                self._budget.release(digest.size)
            obtained.close()
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
        cache = self._cache
        if cache is None:
            self._again(digest)
            return
        try:
            fd = cache.open_blob(digest)
        except LocalError as error:
            self._abandon(error)
            fd = None
        if fd is None:
            self._again(digest)
            return
        try:
            self._place_all(self._open(digest), lambda entry: self._placer.place_copy(entry, fd))
        except BlobCorruptError as error:
            self._quarantine(cache, digest, error)
            self._again(digest)
        finally:
            os.close(fd)

    def _again(self, digest: Digest) -> None:
        repairs = self.counts.repairs.get(digest, 0) + 1
        self.counts.repairs[digest] = repairs
        if repairs > CACHE_REPAIRS:
            # Evicted or damaged again and again: the cache is of no use for this transfer.
            self._abandon(BlobCorruptError(f"{digest} does not stay whole in the cache"))
        if entries := self._open(digest):
            tasks = [self._task_of(entry) for entry in entries]
            self._order(digest, self._steering.priority(tasks))

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

    def _publish(self, digest: Digest, data: bytes) -> None:
        cache = self._filling
        if cache is None:
            return
        try:
            cache.add(digest, data)
        except (LocalError, OSError) as error:
            self._bypass(error)

    def _bypass(self, error: Exception) -> None:
        """Add nothing to the cache any more.

        Raises:
            CacheUnsafeError: When that is the reason; it is for the operator to mend.
        """
        if isinstance(error, CacheUnsafeError):
            raise error
        if self._filling is None:
            return
        self._filling = None
        log.warning(events.CACHE_BYPASSED, extra={"reason": str(error)})

    def _abandon(self, error: Exception) -> None:
        """Neither read the cache nor add to it any more."""
        self._bypass(error)
        self._cache = None

    def _quarantine(self, cache: BlobCache, digest: Digest, error: BlobCorruptError) -> None:
        try:
            cache.quarantine(digest, error.message)
        except LocalError as failure:
            self._abandon(failure)

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
