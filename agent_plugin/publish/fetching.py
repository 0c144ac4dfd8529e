"""Published objects, fetched into a hidden directory; what was fetched before a kill is used again.

An object is fetched under a temporary name and verified before it gets its own. Which ranges of a
large one have come is written down beside it as they come, so that the next run asks only for the
others; that this was right is seen when the whole is verified. After a start of the host that does
not count: a power cut may take what is in a file and leave the note of it.

Crew threads fetch; the calling thread keeps the ledger and shows how far it is. The transfer can be
paused and aborted, and gives way, as any (transfer/steering.py); an object that is excluded is left
out, and one that is held is waited for.
"""

import os
import struct
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Self

from agent_plugin.content import events
from agent_plugin.content.digest import hash_fd, hash_name
from agent_plugin.content.errors import (
    ArchiveUnsafeError,
    CancelledError,
    ObjectChangedError,
    PropmasterError,
    StoreError,
    local_write_error,
)
from agent_plugin.content.leftovers import partial_name
from agent_plugin.content.safe_path import Root
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation
from agent_plugin.publish.in_place import sha256_of
from agent_plugin.publish.published import PublishedObject, PublishedResult
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.copy_partial import boot_id
from agent_plugin.transfer.engine import TICK_SECONDS, Crew, Halts, Products
from agent_plugin.transfer.ledger import TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.ledger_news import TaskNews
from agent_plugin.transfer.progress import Meter
from agent_plugin.transfer.states import TaskStatus
from agent_plugin.transfer.steering import EndedByHandError, Steering

log = events.get_logger()

# Each fetches a large object in parallel ranges by itself.
AT_ONCE: Final = 8
# Users are promised an end within a second of their wish.
STOP_SECONDS: Final = 0.4
_RANGE: Final = struct.Struct("<QQ")
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_NS: Final = 1_000_000_000
_NS_PER_US: Final = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object, the result that it is of, and the place of its file below the hidden directory."""

    of: PublishedResult
    published: PublishedObject
    at: str


def fetch(
    wanted: Sequence[Wanted], root: Root, context: TransferContext, spec: TransferSpec
) -> tuple[int, frozenset[Wanted]]:
    """Have every object in its place, verified, but for those that people take out meanwhile.

    Args:
        wanted: The objects.
        root: The hidden directory.
        context: The services.
        spec: The transfer.

    Returns:
        How many bytes were fetched, and which objects were excluded by hand: nothing is in their
        place.

    Raises:
        ObjectChangedError: An object is another one by now, or not what its publisher says.
        ArchiveUnsafeError: An archive is not what was published.
        StoreError: An object can not be had.
        NoSpaceError, LocalWriteError: A file can not be written.
        CancelledError: On request. What has come is used by the next run.
        TransferStateError: Another process carries the same transfer out right now, or a person has
            set one of its objects to failed.
    """
    tasks = [TaskSpec(_source(w), w.at, w.published.info.size) for w in wanted]
    row = context.ledger.begin(spec, tasks, context.cancellation)
    halt = Cancellation()
    failure: PropmasterError | None = None
    begun = time.monotonic()
    size = sum(task.size for task in tasks)
    try:
        meter = Meter(len(tasks), size)
        running = _Fetch(root, context, halt, row, meter)
        with context.view(spec.kind) as running.steering.view:
            excluded = running.run(wanted)
    except PropmasterError as error:
        failure = error
        raise
    except BaseException:
        failure = CancelledError("interrupted")
        raise
    finally:
        halt.cancel()
        context.ledger.finish(row.id, failure)
    log.info(
        events.TRANSFER_COMPLETED,
        extra={
            "transfer": row.id,
            "kind": spec.kind,
            "files": len(tasks) - len(excluded),
            "bytes": size - sum(each.published.info.size for each in excluded),
            "bytes_fetched": running.fetched,
            "excluded": len(excluded),
            "seconds": round(time.monotonic() - begun, 3),
        },
    )
    return running.fetched, excluded


class _Ranges:
    """The note of which ranges of an object have come; closed when the context ends.

    Args:
        fd: Its file, open for reading and appending.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            os.close(self._fd)
            self._fd = -1

    def read(self) -> dict[int, int]:
        """Return the length of each range that has come, by its position."""
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        # A kill may have cut the last record off.
        whole = data[: len(data) // _RANGE.size * _RANGE.size]
        return dict(_RANGE.iter_unpack(whole))

    def append(self, offset: int, length: int) -> None:
        """Note a range; by a thread that was left behind perhaps, when nobody listens any more."""
        with self._lock:
            if self._fd >= 0:
                os.write(self._fd, _RANGE.pack(offset, length))


class _Fetch:
    """One run; what people want of its tasks is done at each beat, as in a download."""

    def __init__(
        self,
        root: Root,
        context: TransferContext,
        halt: Cancellation,
        row: TransferRow,
        meter: Meter,
    ) -> None:
        self._root = root
        self._context = context
        self._halt = halt
        self.steering = Steering(context, row, halt, meter, self._take_news)
        self.fetched = 0
        self._halts: Halts[Wanted] = Halts(halt)
        self._products: Products[Wanted, int] = Products()
        self._crew = Crew(self._bring, self._products, AT_ONCE, halt)
        self._by_task: dict[int, Wanted] = {}
        self._ordered: set[Wanted] = set()
        # Of each object the bytes that were counted; it has one thread at a time.
        self._counted: dict[Wanted, int] = {}

    def run(self, wanted: Sequence[Wanted]) -> frozenset[Wanted]:
        """Bring all that people want brought; return the rest."""
        self._by_task = {self._task(each): each for each in wanted}
        try:
            self._bring_all(wanted)
        except EndedByHandError:
            self._halts.end_all()
            self._crew.join(STOP_SECONDS)
        finally:
            self._halts.end_all()
            self._crew.close()
            self._products.close()
        excluded = frozenset(
            each for each in wanted if not self.steering.is_settled(self._task(each))
        )
        for each in excluded:
            # It may have come before it was excluded.
            parent, _, name = each.at.rpartition("/")
            with suppress(FileNotFoundError), self._root.holding(parent) as directory:
                os.unlink(name, dir_fd=directory)
        return excluded

    def _bring_all(self, wanted: Sequence[Wanted]) -> None:
        for each in wanted:
            self.steering.plan(self._task(each), each.published.info.size)
            self._want(each)
        while self._ordered or self.steering.holds:
            self.steering.tick()
            if not self._ordered:
                # What was left may have been taken out at this moment.
                if self.steering.holds:
                    self.steering.wait_for_held()
            elif (taken := self._products.take(TICK_SECONDS)) is not None:
                self._ordered.discard(taken[0])
                self._halts.over(taken[0])
                self._settle(*taken)
        self.steering.finish()
        self.steering.refuse_given_up()

    def _task(self, wanted: Wanted) -> int:
        return self.steering.tasks[_source(wanted), wanted.at]

    def _take_news(self, tasks: Collection[TaskNews]) -> None:
        for task in tasks:
            if (wanted := self._by_task.get(task.id)) is not None:
                self._want(wanted)

    def _want(self, wanted: Wanted) -> None:
        """See that an object comes if people want it, as urgently as they do by now."""
        task = self._task(wanted)
        if wanted in self._ordered:
            if not self._crew.withdraw(wanted):
                if not self.steering.is_open(task):
                    self._halts.end(wanted)
                return
            self._ordered.discard(wanted)
        if self.steering.is_open(task):
            self._crew.order(wanted, self.steering.priority([task]))
            self._ordered.add(wanted)

    def _settle(self, wanted: Wanted, result: int | BaseException) -> None:
        task = self._task(wanted)
        is_let_go = isinstance(result, CancelledError) and not self._halt.wished
        if is_let_go or not self.steering.is_open(task):
            self.steering.count(task, -self._counted.pop(wanted, 0), moved=False)
            # People may want it again by now.
            self._want(wanted)
            return
        if isinstance(result, BaseException):
            if isinstance(result, OSError):
                failure: BaseException = local_write_error(result, f"{self._root.path}/{wanted.at}")
                failure.__cause__ = result
            else:
                failure = result
            if isinstance(failure, PropmasterError) and not isinstance(failure, CancelledError):
                self._context.ledger.note(task, TaskStatus.FAILED, failure)
            if isinstance(failure, ArchiveUnsafeError | StoreError):
                raise wanted.of.publication.origin.blamed(failure)
            raise failure
        self.fetched += result
        self.steering.settle(task)
        self.steering.count(task, 0, files=1)

    def _count(self, wanted: Wanted, size: int, *, moved: bool = True) -> None:
        """Count bytes of an object that are here; on its thread, or those that fetch it."""
        self._counted[wanted] = self._counted.get(wanted, 0) + size
        self.steering.count(self._task(wanted), size, moved=moved)

    # ------------------------------------------------------------------ on the crew's threads

    def _bring(self, wanted: Wanted) -> int:
        """Have one object in its place; return how many bytes came."""
        published = wanted.published
        parent, _, name = wanted.at.rpartition("/")
        with self._root.holding(parent) as directory, self._halts.heeding(wanted) as halt:
            if self._is_there(published, name, directory, halt):
                self._count(wanted, published.info.size, moved=False)
                return 0
            with self._context.attempt(self._task(wanted)):
                return self._fetch(wanted, name, directory, halt)

    def _is_there(
        self, published: PublishedObject, name: str, directory: int, halt: Cancellation
    ) -> bool:
        """Tell whether an earlier run has brought it: then it has its name, time and content."""
        with suppress(FileNotFoundError):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                status = os.fstat(fd)
                if (status.st_size, status.st_mtime_ns) == (
                    published.info.size,
                    _mtime_ns(published),
                ):
                    self._verify(published, fd, halt)
                    return True
            except (ObjectChangedError, ArchiveUnsafeError):
                return False
            finally:
                os.close(fd)
        return False

    def _fetch(self, wanted: Wanted, name: str, directory: int, halt: Cancellation) -> int:
        info = wanted.published.info
        label = hash_name(f"{info.url} {info.version} {info.etag} {wanted.at}")
        data_name = partial_name(f"data-{label}")
        ranges_name = partial_name(f"ranges-{hash_name(f'{label} {boot_id()}')}")
        top = self._root.fd
        fd = os.open(data_name, _FLAGS, 0o666, dir_fd=top)
        try:
            with _Ranges(os.open(ranges_name, _FLAGS | os.O_APPEND, 0o600, dir_fd=top)) as ranges:
                fetched = self._fill(wanted, fd, ranges, halt)
            try:
                self._verify(wanted.published, fd, halt)
            except (ObjectChangedError, ArchiveUnsafeError):
                # Before the note of what it has: a file without one is fetched anew.
                os.unlink(ranges_name, dir_fd=top)
                os.unlink(data_name, dir_fd=top)
                raise
            moment = _mtime_ns(wanted.published)
            os.utime(fd, ns=(moment, moment))
            os.rename(data_name, name, src_dir_fd=top, dst_dir_fd=directory)
            os.unlink(ranges_name, dir_fd=top)
        finally:
            os.close(fd)
        return fetched

    def _fill(self, wanted: Wanted, fd: int, ranges: "_Ranges", halt: Cancellation) -> int:
        info = wanted.published.info
        count = partial(self._count, wanted)
        if info.size <= WHOLE_BLOB_BYTES:
            os.ftruncate(fd, 0)
            wanted.of.objects.fetch(info, fd, cancellation=halt, progress=count)
            return info.size
        have = ranges.read()
        self._count(wanted, sum(have.values()), moved=False)
        wanted.of.objects.fetch(
            info,
            fd,
            cancellation=halt,
            have=have.keys(),
            arrived=ranges.append,
            progress=count,
        )
        return max(0, info.size - sum(have.values()))

    def _verify(self, published: PublishedObject, fd: int, halt: Cancellation) -> None:
        url = published.info.url
        if published.entry is not None:
            content = hash_fd(fd, cancellation=halt)
            if content != published.entry.digest:
                raise ObjectChangedError(
                    f"{url} is {content}, not {published.entry.digest} as it was published",
                    hint="somebody changed the object or its metadata; the store may have it still",
                )
        if published.sha256:
            actual = sha256_of(fd, halt)
            if actual != published.sha256:
                raise ArchiveUnsafeError(
                    f"{url} is not what was published: its SHA-256 is {actual}, not"
                    f" {published.sha256}",
                    hint="somebody replaced the object, or several executions share its key;"
                    " without --published the files come from the store",
                )


def _source(wanted: Wanted) -> str:
    return wanted.published.info.url


def _mtime_ns(published: PublishedObject) -> int:
    if published.entry is not None:
        return published.entry.mtime * _NS_PER_US
    return int(published.info.modified) * _NS
