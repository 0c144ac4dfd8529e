"""Which blobs a collector must leave alone, because a session still needs them.

A lease is a file in `leases/`: a header (magic, expiry, namespace) and the blobs' hashes, sorted,
16 bytes each. It holds while its maker lives (a flock on the file, which dies with the process) or
until its expiry, whichever is later. Each lease has a file of its own that is never replaced, so a
collector that found one stale removes that one and no other.

Lease before you look: a lease that has been made protects every blob that is there then. To make
that strict, the collector evicts in small batches under an exclusive flock on the directory, with
the directory listed anew inside it; a maker puts its file in place and then waits for that flock
once. Both waits are bounded: a stopped process may cost a blob, and never blocks anybody.
"""

import errno
import fcntl
import os
import re
import stat
import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, Self

from agent_plugin.content.blob_cache_directory import (
    DIRECTORY_FLAGS,
    READ_FLAGS,
    CacheDirectory,
    list_directory,
    local_failure,
)
from agent_plugin.content.digest import Digest, hash_name
from agent_plugin.content.errors import LocalReadError

HASH_BYTES: Final = 16

# Magic, expiry in seconds since the epoch (0: none), namespace padded with zero bytes.
_HEADER: Final = struct.Struct("<8sd16s")
_MAGIC: Final = b"pmlease1"
_LOCK_WAIT_SECONDS: Final = 1.0
_LOCK_POLL_SECONDS: Final = 0.005


def lock_within(fd: int, operation: int, seconds: float) -> bool:
    """Take a flock, trying for at most `seconds`; False when somebody holds it all that time."""
    for attempt in range(max(1, round(seconds / _LOCK_POLL_SECONDS))):
        if attempt:
            time.sleep(_LOCK_POLL_SECONDS)
        with suppress(BlockingIOError):
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return True
    return False


class Lease:
    """Blobs that stay; ends with its `with` block, unless it was made to be kept.

    Args:
        leases: Where it stands.
        file_name: Its file's name.
        fd: Its file, locked.
        kept: Whether the file outlives this object.
    """

    def __init__(self, leases: "Leases", file_name: str, fd: int, *, kept: bool) -> None:
        self._leases = leases
        self._file_name = file_name
        self._fd = fd
        self._kept = kept

    def close(self) -> None:
        """Stop holding it: gone now, or at its expiry if it was made with `keep_seconds`.

        Raises:
            LocalWriteError: Its file could not be removed, and is stale.
        """
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            if not self._kept:
                self._leases.remove_file(self._file_name)
        finally:
            os.close(fd)

    def release(self) -> None:
        """End it now, whatever its expiry."""
        self._kept = False
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Leases:
    """The leases of a cache directory, all namespaces."""

    def __init__(self, directory: CacheDirectory, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._clock = clock

    def make(self, name: str, digests: Iterable[Digest], keep_seconds: float | None) -> Lease:
        """Write and lock a lease.

        Raises:
            NoSpaceError, LocalWriteError: It could not be written; nothing is leased.
        """
        directory = self._directory
        expiry = 0.0 if keep_seconds is None else self._clock() + keep_seconds
        hashes = sorted({bytes.fromhex(digest.hex) for digest in digests})
        header = _HEADER.pack(_MAGIC, expiry, directory.namespace.encode())
        fd = -1
        try:
            temporary, fd = directory.write_temporary(header + b"".join(hashes), mode=0o600)
            file_name = f"{self._prefix(name)}{temporary}"
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.rename(
                temporary,
                file_name,
                src_dir_fd=directory.temporary_fd,
                dst_dir_fd=directory.leases_fd,
            )
            self._wait_for_collector()
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise local_failure(f"can not write lease {name!r}", error) from error
        return Lease(self, file_name, fd, kept=keep_seconds is not None)

    def release(self, name: str) -> int:
        """End all leases of that name in our namespace, whoever made them; return how many."""
        prefix = self._prefix(name)
        found = [entry for entry in self.names() if entry.startswith(prefix)]
        for entry in found:
            self.remove_file(entry)
        return len(found)

    def names(self) -> list[str]:
        """Return the file names of all leases, stale ones too."""
        return list_directory(self._directory.leases_fd)

    def remove_file(self, file_name: str) -> None:
        """Remove one lease's file.

        Raises:
            LocalWriteError: It could not be removed.
        """
        shown = self._directory.shown("leases", file_name)
        leases_fd = self._directory.leases_fd
        try:
            with suppress(FileNotFoundError):
                os.unlink(file_name, dir_fd=leases_fd)
        except IsADirectoryError:
            self._directory.quarantine(
                file_name, "a directory among the leases", dir_fd=leases_fd, shown=shown
            )
        except OSError as error:
            raise local_failure(f"can not remove {shown}", error) from error

    def read(self, file_name: str) -> tuple[str, bytes] | None:
        """Return namespace and sorted hashes of a lease that holds; None for one that does not.

        Raises:
            LocalReadError: It could not be read, so nobody knows.
        """
        try:
            fd = os.open(file_name, READ_FLAGS, dir_fd=self._directory.leases_fd)
        except OSError as error:
            # ELOOP, ENXIO: a link or a socket, which no lease is.
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                return None
            raise self._unreadable(file_name, error) from error
        try:
            return self._read(fd)
        except OSError as error:
            raise self._unreadable(file_name, error) from error
        finally:
            os.close(fd)

    def _read(self, fd: int) -> tuple[str, bytes] | None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        data = _read_all(fd)
        if len(data) < _HEADER.size:
            return None
        magic, expiry, namespace = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            return None
        if expiry <= self._clock() and lock_within(fd, fcntl.LOCK_SH, 0):
            return None
        return namespace.rstrip(b"\0").decode("ascii", "replace"), data[_HEADER.size :]

    def _unreadable(self, file_name: str, error: OSError) -> LocalReadError:
        shown = self._directory.shown("leases", file_name)
        return LocalReadError(f"blob cache: can not read lease {shown}: {error.strerror}")

    def _prefix(self, name: str) -> str:
        readable = re.sub(r"[^A-Za-z0-9-]", "_", name)[:80]
        return f"{readable}-{hash_name(f'{self._directory.namespace}/{name}')[:16]}."

    @contextmanager
    def locked_directory(self, operation: int, seconds: float) -> Iterator[bool]:
        """Hold a flock on the directory, or go on without it (False) after `seconds`."""
        fd = os.open(".", DIRECTORY_FLAGS, dir_fd=self._directory.leases_fd)
        try:
            yield lock_within(fd, operation, seconds)
        finally:
            os.close(fd)

    def _wait_for_collector(self) -> None:
        # When the lock is ours, any batch that began before our file was in place is over.
        with self.locked_directory(fcntl.LOCK_SH, _LOCK_WAIT_SECONDS):
            return


class LeasedBlobs:
    """What a collector knows of the leases; reads each lease's file once."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._known: dict[str, tuple[str, bytes]] = {}
        self._wait_seconds = _LOCK_WAIT_SECONDS
        self.stale_removed = 0

    @property
    def live(self) -> int:
        """How many leases hold."""
        return len(self._known)

    def refresh(self) -> None:
        """Take notice of new leases and of ended ones; stale files are removed.

        Raises:
            LocalWriteError: A stale lease could not be removed.
        """
        names = self._leases.names()
        known = {name: self._known[name] for name in names if name in self._known}
        for name in names:
            if name in known:
                continue
            lease = self._leases.read(name)
            if lease is None:
                self._leases.remove_file(name)
                self.stale_removed += 1
            else:
                known[name] = lease
        self._known = known

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Know all leases, and let no new one be counted on until the block ends."""
        with self._leases.locked_directory(fcntl.LOCK_EX, self._wait_seconds) as locked:
            # Somebody is stopped in the middle of it: waiting again for each batch is no use.
            self._wait_seconds = _LOCK_WAIT_SECONDS if locked else 0.0
            self.refresh()
            yield

    def holds(self, namespace: str, blob: bytes) -> bool:
        """Whether a blob, by its 16-byte hash, is leased."""
        return any(
            leased_namespace == namespace and _is_among(blob, hashes)
            for leased_namespace, hashes in self._known.values()
        )


def _is_among(blob: bytes, hashes: bytes) -> bool:
    def at(index: int) -> bytes:
        return hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]

    length = len(hashes) // HASH_BYTES
    index = bisect_left(range(length), blob, key=at)
    return index < length and at(index) == blob


def _read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1024 * 1024):
        parts.append(part)
    return b"".join(parts)
