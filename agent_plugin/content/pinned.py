"""Directories that are held by a descriptor, where others could put a link in their place.

Who mounts, unmounts or gives away by a path does it wherever the path leads at that moment, and a
job may write in the directory that its roots and what belongs to them are in. So the directory is
opened, seen to be the one that was meant, and used by `/proc/self/fd`.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def pinned(directory: Path) -> Iterator[Path]:
    """Give a path that leads to a directory whatever happens to its name meanwhile.

    Args:
        directory: Absolute, without links, as the kernel's mount table has it.

    Raises:
        OSError: It can not be opened; ELOOP: it is a link, or is reached by one.
    """
    fd = _open(directory, os.O_PATH)
    try:
        _see_that_it_is(fd, directory)
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


@contextmanager
def own_directory(directory: Path, *, make: bool = False) -> Iterator[int]:
    """Give a descriptor of a directory that this user made, and that nobody else can write.

    Args:
        directory: As for `pinned`.
        make: Make it, closed to others, and those above it if they are missing.

    Raises:
        OSError: It can not be opened; ELOOP: as `pinned`; EPERM: it is somebody else's, or open to
            others.
    """
    if make and not directory.is_symlink():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = _open(directory, os.O_RDONLY)
    try:
        _see_that_it_is(fd, directory)
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(errno.EPERM, "not this user's alone", os.fspath(directory))
        yield fd
    finally:
        os.close(fd)


def _open(directory: Path, flags: int) -> int:
    try:
        return os.open(directory, flags | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError as error:
        if directory.is_symlink():
            raise _leads_elsewhere(directory) from error
        raise


def _leads_elsewhere(directory: Path) -> OSError:
    return OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(directory))


def _see_that_it_is(fd: int, directory: Path) -> None:
    """The kernel tells by which path a descriptor is reached now, without any link."""
    if Path(f"/proc/self/fd/{fd}").readlink() != directory:
        raise _leads_elsewhere(directory)
