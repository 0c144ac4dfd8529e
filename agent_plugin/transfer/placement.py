"""How a verified blob becomes a file under a root: temporary file, content, times, rename.

A file appears under its name whole, with its time set, or not at all; in a new root all files
appear at once, because the root itself is renamed when they are complete. One thread places, since
creating files from several threads was slower here (two threads 271 us a file, one 191 us; the
directory's lock and the GIL). Content comes from the blob cache by reflink where the file system
can, else by copy_file_range, and what arrived in the target is hashed before it counts, so that
damage in the cache can not reach a job. Never by hard link: names that share content have their own
times, and a job could write through one into the cache. A large blob is fetched right into the file
that gets its name in the end, and copied from there into the cache.

Where the root is another user's, files are given to that user; a staged one when it gets its place,
since the cache may share its blocks, and nobody else may write to it until then. In a directory of
the host's, where this process may have no rights, all happens with that user's, and the cache
shares nothing with what it makes.
"""

import errno
import fcntl
import itertools
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import xxhash

from agent_plugin.content.blob_cache import Staged
from agent_plugin.content.digest import READ_BYTES, Digest, hash_fd
from agent_plugin.content.errors import BlobCorruptError, local_write_error
from agent_plugin.content.leftovers import lock_partial, partial_name, remove_partials
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.owner import Owner, acting, make_directories
from agent_plugin.content.parts import write_all
from agent_plugin.content.safe_path import Root
from agent_plugin.content.store import Cancellation

# linux/fs.h: _IOW(0x94, 9, int)
FICLONE: Final = 0x40049409
# Below this a reflink took longer than copying (64 KiB on XFS: 111 against 103 us).
REFLINK_MIN_BYTES: Final = 128 * 1024
# How much the kernel is asked to copy at once, since nothing interrupts it: at 100 MB/s, 0.7 s.
COPY_BYTES: Final = 64 * 1024 * 1024

# Direct I/O needs positions and lengths that are multiples of the disk's blocks.
BLOCK_BYTES: Final = 4096
# A disk that is slower than that would hold the session up: memory takes what it can not yet.
DIRECT_BYTES_PER_SECOND: Final = 150e6
DIRECT_TRIAL_BYTES: Final = 32 * 1024 * 1024

_Fill = Callable[[int], None]

_NO_REFLINK: Final = frozenset(
    {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ENOSYS}
)


class StagedFile:
    """A file at the top of a root, under a temporary name, to be filled with a blob.

    Args:
        name: The temporary name.
        directory: The descriptor of the root.
        maker: With whose rights it is made; None: this process's.

    Attributes:
        fd: Open for reading and writing, until `close`.
    """

    def __init__(self, name: str, directory: int, maker: Owner | None) -> None:
        # Of its own, since the root may be closed while a thread that was left behind has this.
        self._directory = os.dup(directory)
        self._name: str | None = name
        self._maker = maker
        try:
            # Closed to others while it has no place: what was verified must stay as it is.
            with acting(maker):
                self.fd = _create(name, self._directory, mode=0o600)
        except OSError:
            os.close(self._directory)
            raise

    def rename(self, name: str, directory: int) -> None:
        """Give the file its place; a file that stands there is replaced.

        Raises:
            OSError: That is not possible; the file keeps its temporary name.
        """
        if self._name is None:
            raise ValueError("it has its place")
        os.rename(self._name, name, src_dir_fd=self._directory, dst_dir_fd=directory)
        self._name = None

    def close(self) -> None:
        """Close the file, and remove it unless it got a place."""
        os.close(self.fd)
        if self._name is not None:
            with suppress(FileNotFoundError), acting(self._maker):
                os.unlink(self._name, dir_fd=self._directory)
        os.close(self._directory)


class CacheCopy:
    """The copy of a large blob for the cache, made of what is hashed while it is fetched.

    By direct I/O as long as the disk is quick: nobody is going to read the copy soon, and fresh
    memory for the page cache cost more here than the network (docs/decisions/0006-placement.md).
    Where the file system can, it shares the blocks of the staged file instead. Whatever goes wrong
    is told by `publish`: it costs the cache a blob, and not the transfer its own.

    Args:
        kept: A file of the cache, empty.
        staged: The file that the blob is fetched into.
        clones: Whether the two can share blocks.
    """

    def __init__(self, kept: Staged, staged: StagedFile, *, clones: bool) -> None:
        self._kept = kept
        self._staged = staged
        self._clones = clones
        self._failure: OSError | None = None
        self._direct = not clones and _set_direct(kept.fd, wanted=True)
        # Of what was written, with a start that one slow write does not decide.
        self._bytes = DIRECT_TRIAL_BYTES
        self._seconds = 0.001

    def take(self, piece: memoryview, offset: int) -> None:
        """Write what was hashed; never raises."""
        if self._clones or self._failure is not None:
            return
        try:
            if self._direct and (len(piece) | offset) % BLOCK_BYTES:
                self._direct = _set_direct(self._kept.fd, wanted=False)
            begun = time.monotonic()
            self._write(piece, offset)
            self._seconds += time.monotonic() - begun
            self._bytes += len(piece)
            if self._direct and self._bytes / self._seconds < DIRECT_BYTES_PER_SECOND:
                self._direct = _set_direct(self._kept.fd, wanted=False)
        except OSError as error:
            self._failure = error

    def publish(self, digest: Digest) -> None:
        """Make it the blob in the cache; all of it was taken, and turned out right.

        Raises:
            OSError, NoSpaceError, LocalWriteError: It could not be written or published.
            BlobCorruptError: Not all of it was taken.
        """
        if self._failure is not None:
            raise self._failure
        if self._clones:
            fcntl.ioctl(self._kept.fd, FICLONE, self._staged.fd)
        elif self._direct:
            _set_direct(self._kept.fd, wanted=False)
        self._kept.publish(digest)

    def _write(self, piece: memoryview, offset: int) -> None:
        try:
            write_all(self._kept.fd, piece, offset)
        except OSError as error:
            # The memory is not aligned, or its blocks are larger than we think.
            if not self._direct or error.errno != errno.EINVAL:
                raise
            self._direct = _set_direct(self._kept.fd, wanted=False)
            write_all(self._kept.fd, piece, offset)


class Placer:
    """Puts files under one root; used by one thread but for `stage`; close() when done.

    Args:
        directory: The root; made when missing.
        label: Names the temporary files, so that a later run of the same transfer removes what a
            killed one left. No two transfers may have the same, of whatever host: the root may be
            on a disk that several share.
        direct: Write each file under its own name at once. For a root that nobody looks at before
            it is renamed as a whole: the second name costs as much as the file.
        exclusive: Nobody else places files here meanwhile, so that every temporary file in a
            directory where one is placed is what a killed run left, and is removed.
        follow: Whether the root may be a link; not where others can put one.
        owner: Whose the files are; None: this process's user's.
        cancellation: Checked while a large file is copied and hashed, or None.

    Raises:
        NoSpaceError, PathClashError, LocalWriteError: The root can not be made.
        UnsafePathError: It is a link, and `follow` is false.
        LocalReadError: It can not be opened.
    """

    def __init__(
        self,
        directory: Path,
        label: str,
        *,
        direct: bool = False,
        exclusive: bool = False,
        follow: bool = True,
        owner: Owner | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        try:
            make_directories(directory, owner, shared=follow)
        except OSError as error:
            raise local_write_error(error, os.fspath(directory)) from error
        self._root = Root(directory, follow=follow, owner=owner)
        self._owner = owner
        self._shared = follow
        # With whose rights everything is done.
        self._maker = owner if follow else None
        self._label = directory
        self._transfer = label
        self._temporary = None if direct else partial_name(label)
        self._exclusive = exclusive
        self._swept: set[str] = set()
        self._staged = itertools.count(1)
        # A thread that was left behind may stage when the root is closed.
        self._staging = threading.Lock()
        self._closed = False
        self._umask = _umask()
        self._reflink = True
        self._cancellation = cancellation or Cancellation()
        if self._temporary:
            # Now, before `stage` makes any; and planning makes a file there, to see whether the
            # file system folds names.
            with acting(self._maker):
                self._sweep("", self._root.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the root's descriptors back."""
        with self._staging:
            self._closed = True
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

    def stage(self) -> StagedFile:
        """Return an empty file for a large blob; from any thread. The caller closes it.

        Raises:
            OSError: It can not be made.
        """
        name = partial_name(f"{self._transfer}-{next(self._staged)}")
        with self._staging:
            if self._closed:
                raise OSError(errno.EBADF, "the transfer has ended")
            staged = StagedFile(name, self._root.fd, self._maker)
        if not self._exclusive:
            lock_partial(staged.fd)
        return staged

    def place_staged(self, entry: FileEntry, staged: StagedFile) -> None:
        """Place a file that was filled with verified content.

        Raises:
            NoSpaceError, PathClashError, UnsafePathError, LocalWriteError: Naming the file.
        """
        parent, _, name = entry.path.rpartition("/")
        nanoseconds = entry.mtime * 1000
        try:
            with acting(self._maker):
                os.utime(staged.fd, ns=(nanoseconds, nanoseconds))
                directory = self._root.directory(parent, create=True)
                _take_group(staged.fd, directory)
                self._finish(staged.fd)
                _flush(staged.fd)
                if self._temporary:
                    self._sweep(parent, directory)
                staged.rename(name, directory)
        except OSError as error:
            raise local_write_error(error, os.fspath(self._label / entry.path)) from error

    def can_clone(self, staged: StagedFile, target: int) -> bool:
        """Whether an empty file of the blob cache can share blocks with a staged one."""
        if self._maker is not None:
            return False
        return self._clone(staged.fd, target, REFLINK_MIN_BYTES)

    def retime(self, entry: FileEntry) -> None:
        """Give a file that is in place already the entry's time.

        Raises:
            UnsafePathError, LocalWriteError: Naming the file.
        """
        parent, _, name = entry.path.rpartition("/")
        nanoseconds = entry.mtime * 1000
        try:
            with acting(self._maker):
                directory = self._root.directory(parent, create=False)
                os.utime(
                    name, ns=(nanoseconds, nanoseconds), dir_fd=directory, follow_symlinks=False
                )
        except OSError as error:
            raise local_write_error(error, os.fspath(self._label / entry.path)) from error

    def _place(self, entry: FileEntry, fill: _Fill) -> None:
        try:
            with acting(self._maker):
                self._place_as_maker(entry, fill)
        except OSError as error:
            raise local_write_error(error, os.fspath(self._label / entry.path)) from error

    def _place_as_maker(self, entry: FileEntry, fill: _Fill) -> None:
        parent, _, name = entry.path.rpartition("/")
        nanoseconds = entry.mtime * 1000
        directory = self._root.directory(parent, create=True)
        written = self._temporary or name
        if self._temporary:
            self._sweep(parent, directory)
        fd = _create(written, directory, mode=0o666 if self._owner is None else 0o600)
        try:
            if self._temporary and not self._exclusive:
                lock_partial(fd)
            fill(fd)
            if self._owner is not None:
                self._owner.give_file(fd, shared=self._shared)
            os.utime(fd, ns=(nanoseconds, nanoseconds))
            _flush(fd)
            if written != name:
                os.rename(written, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(written, dir_fd=directory)
            raise
        finally:
            os.close(fd)

    def _finish(self, fd: int) -> None:
        """Make a staged file its owner's."""
        if self._owner is not None:
            self._owner.give_file(fd, shared=self._shared)
        else:
            os.fchmod(fd, 0o666 & ~self._umask)

    def _sweep(self, parent: str, directory: int) -> None:
        """Remove what killed runs left in a directory, at the first file that is placed there."""
        if parent not in self._swept:
            self._swept.add(parent)
            remove_partials(directory, exclusive=self._exclusive)

    def _copy(self, source: int, target: int, size: int) -> None:
        if self._clone(source, target, size):
            return
        copied = 0
        while copied < size:
            self._cancellation.check()
            length = min(size - copied, COPY_BYTES)
            try:
                count = os.copy_file_range(source, target, length, copied, copied)
            except OSError:
                # Not offered here, or worse: if neither side is at fault, this succeeds.
                count = _copy_part(source, target, copied)
            if count == 0:
                break
            copied += count

    def _clone(self, source: int, target: int, size: int) -> bool:
        """Share the blocks of a whole file, if it is worth it and the file system can.

        What else it fails for is no error: the file may be too new (ZFS), and who copies it is told
        what is wrong with the disk.
        """
        if not self._reflink or size < REFLINK_MIN_BYTES:
            return False
        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError as error:
            self._reflink = error.errno not in _NO_REFLINK
            return False
        return True


def _set_direct(fd: int, *, wanted: bool) -> bool:
    """Have a file written past the page cache, or not; return whether it is."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError:
        # The file system has no direct I/O.
        return False
    return wanted


def _create(name: str, directory: int, *, mode: int = 0o666) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, mode, dir_fd=directory)
    except FileExistsError:
        # What a killed run of the same transfer left; it was not whole, or it would be kept.
        os.unlink(name, dir_fd=directory)
        return os.open(name, flags, mode, dir_fd=directory)


def _flush(fd: int) -> None:
    """Have a network file system say now what it would say when the file is closed.

    NFS sends what it has not sent when any descriptor of the file is closed: close(2). Elsewhere
    this does nothing; it is no sync.

    Raises:
        OSError: The bytes are not where they belong.
    """
    os.close(os.dup(fd))


def _take_group(fd: int, directory: int) -> None:
    """Give a file the group that a new one would get in a directory that gives its own."""
    above = os.fstat(directory)
    if above.st_mode & stat.S_ISGID and os.fstat(fd).st_gid != above.st_gid:
        # Who is not in that group has no right to, though a new file of his would get it.
        with suppress(PermissionError):
            os.fchown(fd, -1, above.st_gid)


def _umask() -> int:
    """Return this process's umask without changing it, since other threads make files meanwhile.

    Source: proc_pid_status(5), since Linux 4.7.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(
        int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:")
    )


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
