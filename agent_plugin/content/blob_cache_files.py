"""The blobs of one namespace as files: finding, checking, writing and publishing them.

Knows nothing of quotas, leases or who else is fetching; blob_cache.py puts those around it.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from agent_plugin.content.blob_cache_directory import (
    BLOB_MODE,
    READ_FLAGS,
    CacheDirectory,
    blob_fault,
    local_failure,
    open_directory,
)
from agent_plugin.content.digest import Digest, hash_fd
from agent_plugin.content.errors import BlobCorruptError, LocalReadError

Bytes = bytes | bytearray | memoryview

# The same number on all platforms; struct open_how: flags, mode, resolve.
_OPENAT2: Final = 437
_OPEN_HOW: Final = struct.Struct("<QQQ")
_RESOLVE_CACHED: Final = 0x20
_libc: Final = ctypes.CDLL(None)

# A blob's last use is this exact; more would be a write to the inode for each open.
_USE_RESOLUTION_SECONDS: Final = 60
# What open says of a planted link, socket or unreadable file; anything else is our own trouble.
_PLANTED: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM})


class Staged:
    """An empty file for a blob that is fetched in parts; gone with its `with` unless published.

    Attributes:
        fd: Open for reading and writing until the block ends, after `publish` too.
        on_published: Told the size of the blob when it is there.
        on_dropped: Called before the file goes without having been published.
    """

    def __init__(self, files: "BlobFiles", name: str, fd: int) -> None:
        self._files = files
        self._name: str | None = name
        self.fd = fd
        self.on_published: Callable[[int], None] | None = None
        self.on_dropped: Callable[[], object] | None = None

    def publish(self, digest: Digest) -> None:
        """Make the file the blob. The caller has verified its bytes and writes no more.

        Raises:
            BlobCorruptError: The file has another size; it is not published.
            NoSpaceError, LocalWriteError: It could not be published.
        """
        if self._name is None:
            raise ValueError("already published")
        size = os.fstat(self.fd).st_size
        if size != digest.size:
            raise BlobCorruptError(f"{digest}: the file for the cache has {size} bytes")
        try:
            os.fchmod(self.fd, BLOB_MODE)
        except OSError as error:
            raise local_failure(f"can not publish {digest}", error) from error
        self._files.publish(self._name, digest)
        self._name = None
        if self.on_published is not None:
            self.on_published(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)
        if self._name is None:
            return
        try:
            # First: a collector that no longer sees the file must not count it either.
            if self.on_dropped is not None:
                self.on_dropped()
        finally:
            self._files.remove_temporary(self._name)


class BlobFiles:
    """The blobs of a cache's namespace; may be used from any thread.

    Args:
        directory: The cache.
        clock: Seconds since the epoch.
    """

    def __init__(self, directory: CacheDirectory, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._clock = clock
        # The `ab` directories that were found to be ours; a set's add is atomic.
        self._shards: set[str] = set()
        self._used: set[Digest] = set()

    def contains(self, digest: Digest) -> bool:
        """Whether `open_blob` would find the blob, as things are now; one stat.

        Raises:
            CacheUnsafeError: Its directory is not ours alone.
        """
        if not self._has_shard(digest):
            return False
        try:
            info = os.stat(
                _place(digest), dir_fd=self._directory.namespace_fd, follow_symlinks=False
            )
        except OSError:
            return False
        return info.st_size == digest.size and not blob_fault(info, owner=self._directory.owner)

    def find(self, hash_: str) -> Digest | None:
        """Return the digest that a blob of this hash has by its file's size; None without one."""
        place = f"{hash_[:2]}/{hash_}"
        try:
            info = os.stat(place, dir_fd=self._directory.namespace_fd, follow_symlinks=False)
        except OSError:
            return None
        return Digest(hash_, info.st_size) if info.st_size else None

    def open_blob(self, digest: Digest) -> int | None:
        """Return a descriptor of a blob, or None when it is not there or was no blob.

        Raises:
            CacheUnsafeError: Its directory is not ours alone.
            LocalReadError: It could not be opened, for want of descriptors or the like.
            LocalWriteError: Something wrong could not be moved to quarantine.
        """
        if not self._has_shard(digest):
            return None
        try:
            fd = os.open(_place(digest), READ_FLAGS, dir_fd=self._directory.namespace_fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in _PLANTED:
                message = f"blob cache: can not open {digest}: {error.strerror}"
                raise LocalReadError(message) from error
            self.quarantine(digest, f"can not be opened: {error.strerror}")
            return None
        info = os.fstat(fd)
        fault = blob_fault(info, owner=self._directory.owner)
        if fault is None and info.st_size == digest.size:
            self._note_use(fd, info)
            return fd
        try:
            fault = fault or _size_fault(fd, info, digest)
        finally:
            os.close(fd)
        if fault:
            self.quarantine(digest, fault)
        return None

    def open_blob_now(self, digest: Digest) -> int | None:
        """As `open_blob`, but never waiting for a disk: None too when that would take one.

        What is wrong is left as it is. That a blob was used is told by `note_uses`.
        """
        if digest.hex[:2] not in self._shards:
            return None
        fd = open_cached(_place(digest), self._directory.namespace_fd)
        if fd < 0:
            return None
        info = os.fstat(fd)
        if info.st_size != digest.size or blob_fault(info, owner=self._directory.owner):
            os.close(fd)
            return None
        if abs(self._clock() - info.st_mtime) > _USE_RESOLUTION_SECONDS:
            self._used.add(digest)
        return fd

    @property
    def uses_to_note(self) -> int:
        """How many blobs `note_uses` would tell of."""
        return len(self._used)

    def note_uses(self) -> None:
        """Tell the disk of the blobs that `open_blob_now` has opened."""
        used, self._used = self._used, set()
        now = self._clock()
        for digest in list(used):  # Another thread may just be adding one.
            # Evicted since, or the disk has become read-only.
            with suppress(OSError):
                os.utime(
                    _place(digest),
                    (now, now),
                    dir_fd=self._directory.namespace_fd,
                    follow_symlinks=False,
                )

    def write(self, data: Bytes) -> str:
        """Write a file in tmp/ that is ready to be published; return its name.

        Raises:
            OSError: It could not be written; nothing is left.
        """
        name, fd = self._directory.write_temporary(data, mode=BLOB_MODE)
        os.close(fd)
        return name

    def stage(self, reserved: int) -> Staged:
        """Return an empty file in tmp/ that collectors take to have `reserved` bytes.

        Raises:
            NoSpaceError, LocalWriteError: It could not be made.
        """
        name = self._directory.names.new(reserved)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self._directory.temporary_fd)
        except OSError as error:
            raise local_failure("can not make a file", error) from error
        return Staged(self, name, fd)

    def publish(self, name: str, digest: Digest) -> None:
        """Make a file in tmp/ the blob, in place of whatever stands there.

        Raises:
            CacheUnsafeError: The blob's directory is not ours alone.
            NoSpaceError, LocalWriteError: It could not be done. The file is gone in each case.
        """
        published = False
        try:
            published = self._rename(name, digest) or self._rename(name, digest)
            if not published:
                message = f"something keeps removing {self._shown(digest).parent}"
                raise local_failure(message, FileNotFoundError(errno.ENOENT, "not found"))
        except OSError as error:
            raise local_failure(f"can not publish {digest}", error) from error
        finally:
            if not published:
                self.remove_temporary(name)

    def remove_temporary(self, name: str) -> None:
        """Remove a file from tmp/.

        Raises:
            LocalWriteError: It could not be removed.
        """
        self._directory.remove_temporary(name)

    def quarantine(self, digest: Digest, reason: str) -> bool:
        """Take what stands in a blob's place away; False when nothing does.

        Raises:
            LocalWriteError: It could not be moved.
        """
        return self._directory.quarantine(
            _place(digest),
            reason,
            dir_fd=self._directory.namespace_fd,
            shown=self._shown(digest),
        )

    def _rename(self, name: str, digest: Digest) -> bool:
        """Put the file in its place; False when what was in the way is gone, to try again."""
        directory = self._directory
        self._make_shard(digest)
        try:
            os.rename(
                name,
                _place(digest),
                src_dir_fd=directory.temporary_fd,
                dst_dir_fd=directory.namespace_fd,
            )
        except IsADirectoryError:
            self.quarantine(digest, "not a regular file")
            return False
        except FileNotFoundError:
            self._shards.discard(digest.hex[:2])
            return False
        return True

    def _has_shard(self, digest: Digest) -> bool:
        if digest.hex[:2] in self._shards:
            return True
        try:
            self._open_shard(digest, create=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            message = f"blob cache: can not open {self._shown(digest).parent}: {error.strerror}"
            raise LocalReadError(message) from error
        return True

    def _make_shard(self, digest: Digest) -> None:
        if digest.hex[:2] not in self._shards:
            self._open_shard(digest, create=True)

    def _open_shard(self, digest: Digest, *, create: bool) -> None:
        shard = digest.hex[:2]
        shown = self._shown(digest).parent
        namespace_fd = self._directory.namespace_fd
        os.close(open_directory(shard, shown, dir_fd=namespace_fd, create=create))
        self._shards.add(shard)

    def _shown(self, digest: Digest) -> Path:
        return self._directory.shown(self._directory.namespace, _place(digest))

    def _note_use(self, fd: int, info: os.stat_result) -> None:
        now = self._clock()
        if abs(now - info.st_mtime) > _USE_RESOLUTION_SECONDS:
            # The disk may have become read-only; the blob is as good for reading as before.
            with suppress(OSError):
                os.utime(fd, (now, now))


def open_cached(path: str, dir_fd: int) -> int:
    """Open a file if the kernel has all of its path in memory; return -1 if not, or on any error.

    By openat2(2) with RESOLVE_CACHED, Linux 5.12; earlier ones refuse it.
    """
    how = _OPEN_HOW.pack(READ_FLAGS, 0, _RESOLVE_CACHED)
    fd: int = _libc.syscall(_OPENAT2, dir_fd, path.encode(), how, len(how))
    return fd


def _place(digest: Digest) -> str:
    return f"{digest.hex[:2]}/{digest.hex}"


def _size_fault(fd: int, info: os.stat_result, digest: Digest) -> str | None:
    # The size wanted comes from a manifest: when it is that which lies, the blob stays.
    try:
        return None if hash_fd(fd).hex == digest.hex else f"{info.st_size} bytes"
    except OSError as error:
        return f"can not be read: {error.strerror}"
