"""The directory of a store, in which somebody else may have put whatever they like.

Directories are opened one by one and links are not followed; what is not a regular file is refused.
Links that lead to the directory itself are followed: it is the operator's choice.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import (
    BlobCorruptError,
    NoSpaceError,
    PropmasterError,
    StoreAccessError,
    StoreUnavailableError,
    UnsafePathError,
)

_ROOT: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PARENT: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY: Final = _ROOT | os.O_NOFOLLOW
# O_NONBLOCK: opening a fifo that took a file's place would wait for its writer.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# A farm shares the directory; the umask says with whom.
_DIRECTORY_MODE: Final = 0o755
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ODD: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG})


class DirectoryRoot:
    """Where a store's directories and files are; all errors are those of a store.

    Attributes:
        path: The directory, absolute.

    Raises:
        StoreAccessError: It can not be opened, or is missing together with what should hold it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Once it was there it is never made again: its disk may have gone meanwhile.
        self._may_be_made = not os.path.lexists(path)
        with store_errors(str(path)):
            # Who may write into what holds it need not be allowed to read that.
            os.close(os.open(path.parent, _PARENT) if self._may_be_made else self._open())

    def make(self) -> None:
        """Make the directory if only itself is missing.

        Raises:
            StoreAccessError, NoSpaceError: It can not be made.
        """
        with store_errors(str(self.path)), suppress(FileExistsError):
            if self._may_be_made:
                self.path.mkdir(_DIRECTORY_MODE)
                _sync_names(self.path.parent)
        self._may_be_made = False

    def see_that_it_is_there(self) -> None:
        """Refuse to go on without it.

        Raises:
            StoreAccessError, UnsafePathError: It can not be opened.
        """
        os.close(self._open())

    @contextmanager
    def open(self, place: str) -> Iterator[int | None]:
        """Lend a directory below the root, or None if there is none."""
        with store_errors(f"{self.path}/{place}"):
            fd: int | None = self._open()
            for name in place.split("/"):
                parent = fd
                assert parent is not None  # noqa: S101 - the loop ends when it is
                with closing_fd(parent):
                    fd = _open_directory(parent, name)
                if fd is None:
                    break
        if fd is None:
            yield None
            return
        with closing_fd(fd):
            yield fd

    @contextmanager
    def make_below(self, place: str) -> Iterator[int]:
        """Lend a directory below the root, making what is missing."""
        with store_errors(f"{self.path}/{place}"):
            self.make()
            fd = self._open()
            for name in place.split("/"):
                with closing_fd(fd):
                    fd = _make_directory(fd, name)
        with closing_fd(fd):
            yield fd

    def _open(self) -> int:
        with store_errors(str(self.path)):
            return os.open(self.path, _ROOT)


def _sync_names(directory: Path) -> None:
    # Who may write there need not be allowed to read it, which this takes.
    with suppress(PermissionError), closing_fd(os.open(directory, _ROOT)) as fd:
        os.fsync(fd)


def entries_of(directory: int) -> list[tuple[str, os.stat_result]]:
    """Return the names in a directory, each with its own stat; raises OSError."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            # It may have been removed since.
            with suppress(FileNotFoundError):
                found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def refuse_odd(directory: int, name: str, path: str) -> int | None:
    """Return the size of the file of that name, None if there is nothing.

    Raises:
        UnsafePathError: It is something else than a regular file; `path` is what it is called.
        OSError: It can not be looked at.
    """
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePathError(f"{path} is not a regular file", hint="Remove it.")
    return status.st_size


def open_file(directory: int, name: str, path: str) -> int | None:
    """Return a descriptor of the file of that name, None if there is nothing.

    Raises:
        UnsafePathError: It is something else than a regular file; `path` is what it is called.
        OSError: It can not be opened.
    """
    try:
        fd = os.open(name, _READ, dir_fd=directory)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnsafePathError(f"{path} is not a regular file", hint="Remove it.")
    return fd


def _open_directory(parent: int, name: str) -> int | None:
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return None


def _make_directory(parent: int, name: str) -> int:
    fd = _open_directory(parent, name)
    if fd is not None:
        return fd
    with suppress(FileExistsError):
        os.mkdir(name, _DIRECTORY_MODE, dir_fd=parent)
    # Also if somebody else made it just now, who may not have come to this yet.
    os.fsync(parent)
    return os.open(name, _DIRECTORY, dir_fd=parent)


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """Return so many bytes of a file.

    Raises:
        BlobCorruptError: It ends before.
    """
    with store_errors("a file of the store"):
        data = os.pread(fd, length, offset)
        while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
            data += more
    if len(data) < length:
        raise BlobCorruptError(f"a file of the store ended at {offset + len(data)} bytes")
    return data


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Lend a descriptor, which is closed then."""
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Raise errors of ours for the operating system's."""
    try:
        yield
    except OSError as error:
        raise _error_of(error, path) from error


def _error_of(error: OSError, path: str) -> PropmasterError:
    reason = f"{path}: {error.strerror}"
    if error.errno in _FULL:
        return NoSpaceError(reason, hint="Free space in the store's file system.")
    if error.errno == errno.ENOENT:
        return StoreAccessError(reason, hint="Mount the disk that has it, or correct the URL.")
    if error.errno in _FORBIDDEN:
        return StoreAccessError(reason, hint="Check who may use the store's directory.")
    if error.errno in _ODD:
        return UnsafePathError(
            f"{path} has a link, or something else than a directory, on its way: {error.strerror}",
            hint="Remove it.",
        )
    return StoreUnavailableError(reason, hint="Check the file system of the store.")
