"""Keeping the blob cache within its quota and the disk's free space above a floor.

Nothing is scanned until a limit is passed. Then one process (flock on the directory) lists all
blobs, and unlinks those least recently used that no lease holds, down to a mark well below the
limit, so that the next scan is far away. Last use is the file's modification time, which
`BlobCache.open_blob` keeps within a minute: access times are useless with relatime, see mount(8).
A reader that has a blob open keeps its bytes, whatever is unlinked here.
"""

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

from agent_plugin.content import events
from agent_plugin.content.blob_cache_directory import (
    BLOB_NAME,
    DIRECTORY_FLAGS,
    NAMESPACE,
    READ_FLAGS,
    SHARD,
    CacheDirectory,
    blob_fault,
    list_directory,
    local_failure,
    open_directory,
)
from agent_plugin.content.blob_cache_leases import LeasedBlobs, Leases, lock_within
from agent_plugin.content.blob_cache_usage import UsageCounter
from agent_plugin.content.digest import hash_fd
from agent_plugin.content.store import Cancellation

QUARANTINE_KEPT_SECONDS: Final = 7 * 24 * 3600

# Hysteresis: a collection ends this far inside the limits that it was started for.
_QUOTA_MARK: Final = 0.8
_FREE_MARK: Final = 1.1
# The counter, leases and directories take blocks too, on a disk that was full.
_FREE_SLACK_BYTES: Final = 64 * 1024
# How many blobs go between two looks at the leases; a maker of a lease waits for one batch.
_BATCH_BLOBS: Final = 64
# One blob in 34 bytes that sort by last use; a million take 80 MB as objects, a third of a tuple.
_ENTRY: Final = struct.Struct(">QQH16s")
# A use this far in the future is a clock gone wrong or a planted file: it counts as never used.
_FUTURE_SECONDS: Final = 24 * 3600

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cache may use.

    Attributes:
        max_bytes: Of blobs, all namespaces together.
        min_free_bytes: That stay free on the cache's file system.
    """

    max_bytes: int
    min_free_bytes: int


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a collection did.

    Attributes:
        busy: Another process was collecting, so nothing was done; all else is 0 then.
        within_limits: Whether everything, what was added meanwhile and the room asked for fit now.
        blobs: How many are left.
        bytes: Of the blobs that are left.
        evicted_blobs: How many were removed.
        evicted_bytes: Of the blobs that were removed.
        temporary_removed: Files of dead writers that were removed.
        quarantined_removed: Files that were in quarantine long enough, or in the way.
        leases_removed: Leases that no longer held.
    """

    busy: bool = False
    within_limits: bool = False
    blobs: int = 0
    bytes: int = 0
    evicted_blobs: int = 0
    evicted_bytes: int = 0
    temporary_removed: int = 0
    quarantined_removed: int = 0
    leases_removed: int = 0


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """What is in the cache, all namespaces, counted file by file.

    Attributes:
        blobs: How many.
        bytes: Of the blobs.
        leases: How many hold.
        quarantined: Files and directories in quarantine.
        temporary: Files being written, or left by dead processes.
        max_bytes: The quota.
    """

    blobs: int
    bytes: int
    leases: int
    quarantined: int
    temporary: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What re-hashing all blobs showed.

    Attributes:
        blobs: How many were read.
        bytes: How many bytes were read.
        corrupt: Names (hash) of those that were not what they should be, now in quarantine.
    """

    blobs: int
    bytes: int
    corrupt: tuple[str, ...]


class FoundBlob(NamedTuple):
    """A well-formed file in a blob's place.

    Attributes:
        namespace: Where it stands.
        path: Relative to the directory `v1`.
        hash: 32 hex digits, its name.
        info: Its lstat.
    """

    namespace: str
    path: str
    hash: str
    info: os.stat_result


def scan(directory: CacheDirectory) -> Iterator[FoundBlob]:
    """Yield every blob of every namespace, in no order; what is no blob goes to quarantine.

    Raises:
        CacheUnsafeError: A directory among ours is a link, not ours, or others may write it.
        LocalWriteError: Something could not be put in quarantine.
        OSError: A directory could not be read.
    """
    for namespace in filter(NAMESPACE.fullmatch, list_directory(directory.version_fd)):
        for shard in _list(directory, namespace):
            place = f"{namespace}/{shard}"
            if not SHARD.fullmatch(shard):
                _reject(directory, place, "unexpected name")
                continue
            yield from _scan_shard(directory, namespace, shard)


def _scan_shard(directory: CacheDirectory, namespace: str, shard: str) -> Iterator[FoundBlob]:
    prefix = f"{namespace}/{shard}/"
    for name in _list(directory, f"{namespace}/{shard}"):
        path = prefix + name
        if not (BLOB_NAME.fullmatch(name) and name.startswith(shard)):
            _reject(directory, path, "unexpected name")
            continue
        try:
            info = os.stat(path, dir_fd=directory.version_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if fault := blob_fault(info, owner=directory.owner):
            _reject(directory, path, fault)
        else:
            yield FoundBlob(namespace, path, name, info)


def _list(directory: CacheDirectory, path: str) -> list[str]:
    shown = directory.shown(path)
    fd = open_directory(path, shown, dir_fd=directory.version_fd, create=False)
    try:
        return list_directory(fd)
    finally:
        os.close(fd)


def _reject(directory: CacheDirectory, path: str, reason: str) -> None:
    directory.quarantine(path, reason, dir_fd=directory.version_fd, shown=directory.shown(path))


class Collector:
    """Evicts, and tidies up; may be used from any thread.

    Args:
        directory: The cache.
        counter: Corrected by each collection.
        leases: What must stay.
        limits: What the cache may use.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        directory: CacheDirectory,
        counter: UsageCounter,
        leases: Leases,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._counter = counter
        self._leases = leases
        self._limits = limits
        self._clock = clock

    def fits(self, total: int | None, room: int) -> bool:
        """Whether `room` more bytes fit, when blobs have `total` (None: unknown) bytes now."""
        if total is None or total + room > self._limits.max_bytes:
            return False
        return self._free_bytes() - room >= self._limits.min_free_bytes

    def collect(self, *, room: int = 0, to_bytes: int | None = None) -> CollectReport:
        """Remove what is stale, and evict until the limits hold with `room` bytes to spare.

        Args:
            room: Bytes that are about to be added.
            to_bytes: Evict until this much is left at most, instead of what the quota says.

        Raises:
            CacheUnsafeError: As for `scan`.
            LocalWriteError: Something could not be removed.
        """
        # A descriptor of its own, so that threads of this process exclude each other as well.
        try:
            fd = os.open(".", DIRECTORY_FLAGS, dir_fd=self._directory.version_fd)
        except OSError as error:
            raise local_failure("can not collect", error) from error
        try:
            if not lock_within(fd, fcntl.LOCK_EX, 0):
                return CollectReport(busy=True)
            return self._collect(room, to_bytes)
        except OSError as error:
            raise local_failure("can not collect", error) from error
        finally:
            os.close(fd)

    def _collect(self, room: int, to_bytes: int | None) -> CollectReport:
        since = self._counter.read()
        # Before the blobs: one that gets its name meanwhile counts twice, rather than not at all.
        temporary, reserved = self._remove_leftovers()
        under_pressure = self._free_bytes() - room < self._limits.min_free_bytes
        kept_seconds = 0 if under_pressure or to_bytes == 0 else QUARANTINE_KEPT_SECONDS
        quarantined = self._empty_quarantine(kept_seconds)
        namespaces: list[str] = []
        entries = [self._pack(blob, namespaces) for blob in scan(self._directory)]
        total = sum(_ENTRY.unpack(entry)[1] for entry in entries)
        leased = LeasedBlobs(self._leases)
        leased.refresh()
        coming = reserved + self._counter.added_since(since)
        excess = self._excess(total, coming, room, to_bytes)
        blobs, evicted = self._evict(entries, excess, namespaces, leased)
        used = self._counter.correct(total + reserved - evicted, since)
        report = CollectReport(
            within_limits=self.fits(used, room),
            blobs=len(entries) - blobs,
            bytes=total - evicted,
            evicted_blobs=blobs,
            evicted_bytes=evicted,
            temporary_removed=temporary,
            quarantined_removed=quarantined,
            leases_removed=leased.stale_removed,
        )
        log.info(
            events.CACHE_COLLECTED,
            extra={"blobs": report.blobs, "bytes": report.bytes, "evicted_bytes": evicted},
        )
        return report

    def _pack(self, blob: FoundBlob, namespaces: list[str]) -> bytes:
        if blob.namespace not in namespaces:
            namespaces.append(blob.namespace)
        used = blob.info.st_mtime_ns
        if used > (self._clock() + _FUTURE_SECONDS) * 1_000_000_000:
            used = 0
        return _ENTRY.pack(
            max(0, used),
            blob.info.st_size,
            namespaces.index(blob.namespace),
            bytes.fromhex(blob.hash),
        )

    def _excess(self, found: int, coming: int, room: int, to_bytes: int | None) -> int:
        """Return how many bytes have to go of those found, when others are on their way."""
        limits = self._limits
        total = found + coming
        excess = 0
        if to_bytes is not None:
            excess = found - to_bytes
        elif total + room > limits.max_bytes:
            excess = total - min(int(limits.max_bytes * _QUOTA_MARK), limits.max_bytes - room)
        free = self._free_bytes()
        if free - room < limits.min_free_bytes:
            mark = max(
                int(limits.min_free_bytes * _FREE_MARK), limits.min_free_bytes + _FREE_SLACK_BYTES
            )
            excess = max(excess, mark + room - free)
        return max(0, excess)

    def _evict(
        self, entries: list[bytes], excess: int, namespaces: list[str], leased: LeasedBlobs
    ) -> tuple[int, int]:
        """Unlink the least recently used until `excess` bytes are gone; return blobs and bytes."""
        blobs = evicted = 0
        remaining = iter(sorted(entries) if excess > 0 else ())
        while evicted < excess and (batch := list(islice(remaining, _BATCH_BLOBS))):
            with leased.frozen():
                for entry in batch:
                    _used, size, index, blob = _ENTRY.unpack(entry)
                    if evicted >= excess or leased.holds(namespaces[index], blob):
                        continue
                    name: str = blob.hex()
                    with suppress(FileNotFoundError):
                        os.unlink(
                            f"{namespaces[index]}/{name[:2]}/{name}",
                            dir_fd=self._directory.version_fd,
                        )
                    blobs += 1
                    evicted += size
        return blobs, evicted

    def _remove_leftovers(self) -> tuple[int, int]:
        """Return how many files of dead writers went, and what the living ones have reserved."""
        directory = self._directory
        removed = reserved = 0
        for name in list_directory(directory.temporary_fd):
            try:
                info = os.stat(name, dir_fd=directory.temporary_fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if directory.names.is_leftover(name, age_seconds=self._clock() - info.st_mtime):
                _remove(name, directory.temporary_fd)
                removed += 1
            else:
                reserved += directory.names.reserved(name)
        return removed, reserved

    def _empty_quarantine(self, kept_seconds: float) -> int:
        quarantine_fd = self._directory.quarantine_fd
        removed = 0
        for name in list_directory(quarantine_fd):
            # The change time is when it was moved here: a rename keeps the modification time.
            moved = os.stat(name, dir_fd=quarantine_fd, follow_symlinks=False).st_ctime
            if self._clock() - moved >= kept_seconds:
                _remove(name, quarantine_fd)
                removed += 1
        return removed

    def _free_bytes(self) -> int:
        try:
            info = os.fstatvfs(self._directory.version_fd)
        except OSError as error:
            raise local_failure("can not ask for free space", error) from error
        return info.f_bavail * info.f_frsize


def _remove(name: str, dir_fd: int) -> None:
    try:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=dir_fd)
    except IsADirectoryError:
        import shutil  # noqa: PLC0415 - costs 5 ms, and only planted directories need it

        shutil.rmtree(name, dir_fd=dir_fd)


def count_usage(directory: CacheDirectory, leases: Leases, limits: Limits) -> CacheUsage:
    """Count what is in the cache; evicts nothing, but odd files and stale leases go.

    Raises:
        CacheUnsafeError, LocalWriteError, OSError: As for `scan`.
    """
    leased = LeasedBlobs(leases)
    leased.refresh()
    sizes = [blob.info.st_size for blob in scan(directory)]
    return CacheUsage(
        blobs=len(sizes),
        bytes=sum(sizes),
        leases=leased.live,
        quarantined=len(list_directory(directory.quarantine_fd)),
        temporary=len(list_directory(directory.temporary_fd)),
        max_bytes=limits.max_bytes,
    )


def verify_blobs(directory: CacheDirectory, cancellation: Cancellation) -> VerifyReport:
    """Hash every blob of every namespace again; what is wrong goes to quarantine.

    Raises:
        CancelledError: Cancellation was wished; what was found so far is in quarantine.
        CacheUnsafeError, LocalWriteError: As for `scan`.
        OSError: A directory could not be read.
    """
    blobs = size = 0
    corrupt = []
    for blob in scan(directory):
        cancellation.check()
        blobs += 1
        size += blob.info.st_size
        if fault := _content_fault(directory, blob, cancellation):
            _reject(directory, blob.path, fault)
            corrupt.append(blob.hash)
    return VerifyReport(blobs, size, tuple(corrupt))


def _content_fault(
    directory: CacheDirectory, blob: FoundBlob, cancellation: Cancellation
) -> str | None:
    try:
        fd = os.open(blob.path, READ_FLAGS, dir_fd=directory.version_fd)
    except FileNotFoundError:
        return None
    try:
        right = hash_fd(fd, cancellation=cancellation).hex == blob.hash
    except OSError as error:
        return f"can not be read: {error.strerror}"
    finally:
        os.close(fd)
    return None if right else "wrong content"
