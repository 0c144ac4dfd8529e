"""How a file of a store in a directory comes to be: under its name whole and synced, or not at all.

It is written without a name (O_TMPFILE) and linked to its place, so that nothing is left of a
writer that was killed. Not every file system can do that (NFS and SMB can not), and a link replaces
nothing. Then the file has a name before its time, in a directory for such files, and is locked
while it is written; what nobody writes any more is removed by the next process that needs the
directory (leftovers.py).

The file is synced, its name is not: that is for whoever counts on it (DirectoryStore.put_document).

Sources: open(2), O_TMPFILE; linkat(2).
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

from agent_plugin.content.leftovers import lock_partial, partial_name, remove_partials

# Where files have names before their time; below `Data` and `Manifests`, in their file systems.
STAGING: Final = partial_name("staging")

# A farm shares the directory; the umask says with whom.
_FILE_MODE: Final = 0o644
_UNNAMED: Final = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# EISDIR: a kernel that does not know the flag takes it for O_DIRECTORY.
_NO_UNNAMED: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

# Lends the directory STAGING.
Staging = Callable[[], AbstractContextManager[int]]


class NewFile(Protocol):
    """A file that has no place yet; gone with its `with` unless it got one.

    Attributes:
        fd: Open for reading and writing.
    """

    fd: int

    def publish(self, name: str) -> bool:
        """Sync the file and give it its place; False if there is something already.

        Where the file system has no links, it replaces what comes in between.
        """

    def replace(self, name: str) -> None:
        """Give the file, after `publish` returned False, the place of what is there."""


@contextmanager
def new_file(directory: int, staging: Staging) -> Iterator[NewFile]:
    """Lend a new file that is to stand in a directory.

    Raises:
        OSError: It could not be made; ENOSPC among others.
    """
    fd = _open_unnamed(directory)
    if fd is not None:
        try:
            yield _UnnamedFile(fd, directory, staging)
        finally:
            os.close(fd)
        return
    with staging() as staged:
        name = _temporary_name()
        fd = os.open(name, _CREATE, _FILE_MODE, dir_fd=staged)
        try:
            # Without locks the file would not be removed if this process was killed.
            lock_partial(fd)
            yield _NamedFile(fd, name, staged, directory)
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=staged)


def write_file(directory: int, staging: Staging, name: str, write: Callable[[int], None]) -> None:
    """Write a file to its place, whatever is there.

    Raises:
        OSError: It could not be written; ENOSPC among others.
    """
    with new_file(directory, staging) as new:
        write(new.fd)
        if not new.publish(name):
            new.replace(name)


def tidy_staging(staging: int) -> None:
    """Remove the files of writers that were killed, and let in whoever may write beside it."""
    beside = os.stat("..", dir_fd=staging)
    # The umask of the first writer must not keep the others of a farm out.
    with suppress(PermissionError):
        if stat.S_IMODE(os.fstat(staging).st_mode) != stat.S_IMODE(beside.st_mode):
            os.fchmod(staging, stat.S_IMODE(beside.st_mode))
    # Another user's in a sticky directory, which that user will remove.
    with suppress(PermissionError):
        remove_partials(staging, exclusive=False)


def _open_unnamed(directory: int) -> int | None:
    """Return a file without a name, or None where one can not be made or get a name later."""
    try:
        fd = os.open(".", _UNNAMED, _FILE_MODE, dir_fd=directory)
    except OSError as error:
        if error.errno in _NO_UNNAMED:
            return None
        raise
    if not Path(_by_descriptor(fd)).exists():
        os.close(fd)
        return None
    return fd


def _by_descriptor(fd: int) -> str:
    # To link a file by its descriptor alone takes a capability that users do not have.
    return f"/proc/self/fd/{fd}"


def _temporary_name() -> str:
    return partial_name(secrets.token_hex(16))


class _UnnamedFile:
    def __init__(self, fd: int, directory: int, staging: Staging) -> None:
        self.fd = fd
        self._directory = directory
        self._staging = staging

    def publish(self, name: str) -> bool:
        os.fsync(self.fd)
        try:
            os.link(_by_descriptor(self.fd), name, dst_dir_fd=self._directory)
        except FileExistsError:
            return False
        return True

    def replace(self, name: str) -> None:
        with self._staging() as staged:
            temporary = _temporary_name()
            os.link(_by_descriptor(self.fd), temporary, dst_dir_fd=staged)
            try:
                os.rename(temporary, name, src_dir_fd=staged, dst_dir_fd=self._directory)
            except OSError:
                os.unlink(temporary, dir_fd=staged)
                raise


class _NamedFile:
    def __init__(self, fd: int, name: str, staged: int, directory: int) -> None:
        self.fd = fd
        self._name = name
        self._staged = staged
        self._directory = directory

    def publish(self, name: str) -> bool:
        os.fsync(self.fd)
        try:
            os.link(self._name, name, src_dir_fd=self._staged, dst_dir_fd=self._directory)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self.replace(name)
        return True

    def replace(self, name: str) -> None:
        os.rename(self._name, name, src_dir_fd=self._staged, dst_dir_fd=self._directory)
