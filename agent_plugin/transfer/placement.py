"""How a verified blob becomes a file under a root: temporary file, content, times, rename.

A file appears under its name whole, with its time set, or not at all; in a new root all files
appear at once, because the root itself is renamed when they are complete. One thread places, since
creating files from several threads was slower here (two threads 271 us a file, one 191 us; the
directory's lock and the GIL). Content comes from the blob cache by reflink where the file system
can, else by copy_file_range, and what arrived in the target is hashed before it counts, so that
damage in the cache can not reach a job. Never by hard link: names that share content have their own
times, and a job could write through one into the cache.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import xxhash

from agent_plugin.content.digest import READ_BYTES, Digest, hash_fd
from agent_plugin.content.errors import BlobCorruptError, local_write_error
from agent_plugin.content.leftovers import lock_partial, partial_name, remove_partials
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.safe_path import Root
from agent_plugin.content.store import Cancellation

# linux/fs.h: _IOW(0x94, 9, int)
FICLONE: Final = 0x40049409
# Below this a reflink took longer than copying (64 KiB on XFS: 111 against 103 us).
REFLINK_MIN_BYTES: Final = 128 * 1024
# How much the kernel is asked to copy at once, since nothing interrupts it: at 100 MB/s, 0.7 s.
COPY_BYTES: Final = 64 * 1024 * 1024

_Fill = Callable[[int], None]

_NO_REFLINK: Final = frozenset(
    {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ENOSYS}
)


class Placer:
    """Puts files under one root; used by one thread; close() when done.

    Args:
        directory: The root; made when missing.
        label: Names the temporary file, of which there is at most one at a time, so that a later
            run of the same transfer removes what a killed one left. No two transfers may have the
            same, of whatever host: the root may be on a disk that several share.
        direct: Write each file under its own name at once. For a root that nobody looks at before
            it is renamed as a whole: the second name costs as much as the file.
        exclusive: Nobody else places files here meanwhile, so that every temporary file in a
            directory where one is placed is what a killed run left, and is removed.
        cancellation: Checked while a large file is copied and hashed, or None.

    Raises:
        NoSpaceError, PathClashError, LocalWriteError: The root can not be made.
        LocalReadError: It can not be opened.
    """

    def __init__(
        self,
        directory: Path,
        label: str,
        *,
        direct: bool = False,
        exclusive: bool = False,
        cancellation: Cancellation | None = None,
    ) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise local_write_error(error, os.fspath(directory)) from error
        self._root = Root(directory)
        self._label = directory
        self._temporary = None if direct else partial_name(label)
        self._exclusive = exclusive
        self._swept: set[str] = set()
        self._reflink = True
        self._cancellation = cancellation or Cancellation()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the root's descriptors back."""
        self._root.close()

    def place_data(self, entry: FileEntry, data: bytes) -> None:
        """Place a file whose verified content is in memory.

        Raises:
            NoSpaceError, PathClashError, UnsafePathError, LocalWriteError: Naming the file.
        """
        self._place(entry, lambda fd: _write_all(fd, data))

    def place_copy(self, entry: FileEntry, source_fd: int) -> None:
        """Place a file whose content is that of an open file, and verify what was copied.

        Raises:
            BlobCorruptError: The source's bytes are not the entry's digest, or its disk does not
                give them; nothing was placed.
            CancelledError: Cancellation was wished; nothing was placed.
            NoSpaceError, PathClashError, UnsafePathError, LocalWriteError: Naming the file.
        """
        digest = entry.digest

        def fill(fd: int) -> None:
            try:
                self._copy(source_fd, fd, digest.size)
                actual = _digest_of(fd, digest.size, self._cancellation)
            except OSError as error:
                # The same code for both sides: asking the source alone tells which disk it was.
                if error.errno == errno.EIO and not _is_readable(source_fd, self._cancellation):
                    raise BlobCorruptError(
                        f"{entry.path}: the copy of {digest} on this host can not be read"
                    ) from error
                raise
            if actual != digest:
                raise BlobCorruptError(f"{entry.path}: the copy is not {digest}")

        self._place(entry, fill)

    def retime(self, entry: FileEntry) -> None:
        """Give a file that is in place already the entry's time.

        Raises:
            UnsafePathError, LocalWriteError: Naming the file.
        """
        parent, _, name = entry.path.rpartition("/")
        nanoseconds = entry.mtime * 1000
        try:
            directory = self._root.directory(parent, create=False)
            os.utime(name, ns=(nanoseconds, nanoseconds), dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            raise local_write_error(error, os.fspath(self._label / entry.path)) from error

    def _place(self, entry: FileEntry, fill: _Fill) -> None:
        parent, _, name = entry.path.rpartition("/")
        nanoseconds = entry.mtime * 1000
        try:
            directory = self._root.directory(parent, create=True)
            written = self._temporary or name
            if self._temporary:
                self._sweep(parent, directory)
            fd = _create(written, directory)
            try:
                if self._temporary and not self._exclusive:
                    lock_partial(fd)
                fill(fd)
                os.utime(fd, ns=(nanoseconds, nanoseconds))
                if written != name:
                    os.rename(written, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(written, dir_fd=directory)
                raise
            finally:
                os.close(fd)
        except OSError as error:
            raise local_write_error(error, os.fspath(self._label / entry.path)) from error

    def _sweep(self, parent: str, directory: int) -> None:
        """Remove what killed runs left in a directory, at the first file that is placed there."""
        if not self._swept:
            # Planning makes a file there, to see whether the file system folds names.
            self._swept.add("")
            remove_partials(self._root.fd, exclusive=self._exclusive)
        if parent not in self._swept:
            self._swept.add(parent)
            remove_partials(directory, exclusive=self._exclusive)

    def _copy(self, source: int, target: int, size: int) -> None:
        if self._reflink and size >= REFLINK_MIN_BYTES:
            try:
                fcntl.ioctl(target, FICLONE, source)
            except OSError as error:
                if error.errno not in _NO_REFLINK:
                    raise
                self._reflink = False
            else:
                return
        copied = 0
        while copied < size:
            self._cancellation.check()
            length = min(size - copied, COPY_BYTES)
            try:
                count = os.copy_file_range(source, target, length, copied, copied)
            except OSError as error:
                if error.errno not in _NO_REFLINK:
                    raise
                count = _copy_part(source, target, copied)
            if count == 0:
                break
            copied += count


def _create(name: str, directory: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, 0o666, dir_fd=directory)
    except FileExistsError:
        # What a killed run of the same transfer left; it was not whole, or it would be kept.
        os.unlink(name, dir_fd=directory)
        return os.open(name, flags, 0o666, dir_fd=directory)


def _copy_part(source: int, target: int, offset: int) -> int:
    chunk = os.pread(source, READ_BYTES, offset)
    written = 0
    while written < len(chunk):
        written += os.pwrite(target, chunk[written:], offset + written)
    return written


def _write_all(fd: int, data: bytes) -> None:
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, data[written:])


def _is_readable(fd: int, cancellation: Cancellation) -> bool:
    try:
        hash_fd(fd, cancellation=cancellation)
    except OSError:
        return False
    return True


def _digest_of(fd: int, size: int, cancellation: Cancellation) -> Digest:
    if size >= READ_BYTES:
        return hash_fd(fd, cancellation=cancellation)
    data = os.pread(fd, size + 1, 0)
    return Digest(xxhash.xxh3_128_hexdigest(data), len(data))
