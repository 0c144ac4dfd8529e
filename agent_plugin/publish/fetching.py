"""Published objects, fetched into a hidden directory; what was fetched before a kill is used again.

An object is fetched under a temporary name and verified before it gets its own. Which ranges of a
large one have come is written down beside it as they come, so that the next run asks only for the
others; that this was right is seen when the whole is verified.

Crew threads fetch; the calling thread keeps the ledger and shows how far it is. The transfer can be
paused and aborted, and gives way, as any (transfer/steering.py).
"""

import os
import struct
import threading
import time
from collections.abc import Sequence
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
from agent_plugin.transfer.engine import TICK_SECONDS, Crew, Products
from agent_plugin.transfer.ledger import TaskSpec, TransferSpec
from agent_plugin.transfer.progress import Meter
from agent_plugin.transfer.states import TaskStatus
from agent_plugin.transfer.steering import Steering

log = events.get_logger()

# Each fetches a large object in parallel ranges by itself.
AT_ONCE: Final = 8
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
) -> int:
    """Have every object in its place, verified; return how many bytes were fetched.

    Args:
        wanted: The objects.
        root: The hidden directory.
        context: The services.
        spec: The transfer.

    Raises:
        ObjectChangedError: An object is another one by now, or not what its publisher says.
        ArchiveUnsafeError: An archive is not what was published.
        StoreError: An object can not be had.
        NoSpaceError, LocalWriteError: A file can not be written.
        CancelledError: On request. What has come is used by the next run.
        TransferStateError: Another process carries the same transfer out right now.
    """
    tasks = [TaskSpec(_source(w), w.at, w.published.info.size) for w in wanted]
    row = context.ledger.begin(spec, tasks, context.cancellation)
    halt = Cancellation()
    failure: PropmasterError | None = None
    begun = time.monotonic()
    size = sum(task.size for task in tasks)
    try:
        meter = Meter(len(tasks), size)
        steering = Steering(context, row, halt, meter, lambda _tasks: None)
        with context.view(spec.kind) as steering.view:
            fetched = _Fetch(root, context, halt, steering).run(wanted)
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
            "files": len(tasks),
            "bytes": size,
            "bytes_fetched": fetched,
            "seconds": round(time.monotonic() - begun, 3),
        },
    )
    return fetched


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
    def __init__(
        self, root: Root, context: TransferContext, halt: Cancellation, steering: Steering
    ) -> None:
        self._root = root
        self._context = context
        self._halt = halt
        self._steering = steering
        self._fetched = 0

    def run(self, wanted: Sequence[Wanted]) -> int:
        products: Products[Wanted, int] = Products()
        crew = Crew(self._bring, products, AT_ONCE, self._halt)
        try:
            for each in wanted:
                crew.order(each)
            outstanding = len(wanted)
            while outstanding:
                self._steering.tick()
                if (taken := products.take(TICK_SECONDS)) is None:
                    continue
                outstanding -= 1
                self._settle(*taken)
            self._steering.finish()
        finally:
            crew.close()
            products.close()
        return self._fetched

    def _task(self, wanted: Wanted) -> int:
        return self._steering.tasks[_source(wanted), wanted.at]

    def _settle(self, wanted: Wanted, result: int | BaseException) -> None:
        task = self._task(wanted)
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
        self._fetched += result
        self._steering.settle(task)
        self._steering.count(task, 0, files=1)

    # ------------------------------------------------------------------ on the crew's threads

    def _bring(self, wanted: Wanted) -> int:
        """Have one object in its place; return how many bytes came."""
        published = wanted.published
        parent, _, name = wanted.at.rpartition("/")
        with self._root.holding(parent) as directory:
            task = self._task(wanted)
            if self._is_there(published, name, directory):
                self._steering.count(task, published.info.size, moved=False)
                return 0
            with self._context.attempt(task):
                return self._fetch(wanted, name, directory)

    def _is_there(self, published: PublishedObject, name: str, directory: int) -> bool:
        """Tell whether an earlier run has brought it: then it has its name, time and content."""
        with suppress(FileNotFoundError):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                status = os.fstat(fd)
                if (status.st_size, status.st_mtime_ns) == (
                    published.info.size,
                    _mtime_ns(published),
                ):
                    self._verify(published, fd)
                    return True
            except (ObjectChangedError, ArchiveUnsafeError):
                return False
            finally:
                os.close(fd)
        return False

    def _fetch(self, wanted: Wanted, name: str, directory: int) -> int:
        info = wanted.published.info
        label = hash_name(f"{info.url} {info.version} {info.etag} {wanted.at}")
        data_name, ranges_name = partial_name(f"data-{label}"), partial_name(f"ranges-{label}")
        top = self._root.fd
        fd = os.open(data_name, _FLAGS, 0o666, dir_fd=top)
        try:
            with _Ranges(os.open(ranges_name, _FLAGS | os.O_APPEND, 0o600, dir_fd=top)) as ranges:
                fetched = self._fill(wanted, fd, ranges)
            try:
                self._verify(wanted.published, fd)
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

    def _fill(self, wanted: Wanted, fd: int, ranges: "_Ranges") -> int:
        info = wanted.published.info
        task = self._task(wanted)
        count = partial(self._steering.count, task)
        if info.size <= WHOLE_BLOB_BYTES:
            os.ftruncate(fd, 0)
            wanted.of.objects.fetch(info, fd, cancellation=self._halt, progress=count)
            return info.size
        have = ranges.read()
        self._steering.count(task, sum(have.values()), moved=False)
        wanted.of.objects.fetch(
            info,
            fd,
            cancellation=self._halt,
            have=have.keys(),
            arrived=ranges.append,
            progress=count,
        )
        return max(0, info.size - sum(have.values()))

    def _verify(self, published: PublishedObject, fd: int) -> None:
        url = published.info.url
        if published.entry is not None:
            content = hash_fd(fd, cancellation=self._halt)
            if content != published.entry.digest:
                raise ObjectChangedError(
                    f"{url} is {content}, not {published.entry.digest} as it was published",
                    hint="somebody changed the object or its metadata; the store may have it still",
                )
        if published.sha256:
            actual = sha256_of(fd, self._halt)
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
