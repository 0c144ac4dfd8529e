"""What killed runs leave behind: temporary names, and how they and whole trees are removed.

Our temporary files, and a root that is not complete yet, are named `.propmaster-….partial`. Such a
file is never an input or output of a job, whoever made it.

Nothing here follows a link: everything is named relative to the descriptor of its directory.
"""

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from agent_plugin.content.safe_path import Root

# Far longer than any one file is written; until then only its writer knows that nobody writes it.
ABANDONED_SECONDS: Final = 3600.0

_PREFIX: Final = ".propmaster-"
_SUFFIX: Final = ".partial"
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Writable, since a network file system may refuse an exclusive lock otherwise (flock(2), NFS).
_OPEN_FILE: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def partial_name(label: str) -> str:
    """Return the name of something that is not complete; no entry of a manifest may have it."""
    return f"{_PREFIX}{label}{_SUFFIX}"


def is_partial(name: str) -> bool:
    """Tell whether the last component of a path is a name that `partial_name` may return."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def remove_partials(directory: int, *, exclusive: bool) -> None:
    """Remove the temporary files in a directory that nobody writes any more.

    Args:
        directory: Its descriptor.
        exclusive: Nobody else has business in it, so that every temporary file is a leftover.
            Otherwise one is if it was not touched for ABANDONED_SECONDS and nobody has it locked.

    Raises:
        OSError: The directory can not be listed, or a leftover not be removed.
    """
    with os.scandir(directory) as entries:
        partials = [entry.name for entry in entries if is_partial(entry.name)]
    for name in partials:
        with suppress(FileNotFoundError):
            mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                continue
            if exclusive:
                os.unlink(name, dir_fd=directory)
            elif stat.S_ISREG(mode):
                _remove_abandoned(directory, name)


def _remove_abandoned(directory: int, name: str) -> None:
    try:
        fd = os.open(name, _OPEN_FILE, dir_fd=directory)
    except PermissionError:
        # Of another user, who will remove it.
        return
    try:
        # Not the time of content: that is set to the entry's before the file gets its name.
        if os.fstat(fd).st_ctime + ABANDONED_SECONDS > time.time():
            return
        if lock_partial(fd):
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(fd)


def lock_partial(fd: int) -> bool:
    """Take an open file as one's own until it is closed; tell whether that could be done."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # Somebody else's, or on a file system without locks, where nobody removes it either.
        return False
    return True


def prune(root: Root, name: str, paths: Collection[str]) -> None:
    """Remove everything in a directory that is neither a named file nor a directory on its way.

    What is no directory goes itself; nothing happens if nothing is there.

    Args:
        root: Where the directory is.
        name: Of the directory.
        paths: Of the files that stay, relative to it, `/` separated, normalised.

    Raises:
        OSError: Something can not be listed or removed.
        PropmasterError: A directory was swapped meanwhile.
    """
    with suppress(FileNotFoundError):
        if not _is_directory(root.fd, name):
            os.unlink(name, dir_fd=root.fd)
            return
        files = {f"{name}/{path}" for path in paths}
        directories = {parent for path in files for parent in _parents(path)}
        pending = [name]
        while pending:
            directory = pending.pop()
            with root.holding(directory, create=False) as fd:
                with os.scandir(fd) as entries:
                    found = list(entries)
                for entry in found:
                    path = f"{directory}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        if path in directories:
                            pending.append(path)
                            continue
                    elif path in files and entry.is_file(follow_symlinks=False):
                        continue
                    remove_tree(fd, entry.name)


def _parents(path: str) -> Iterator[str]:
    parent = path.rpartition("/")[0]
    while parent:
        yield parent
        parent = parent.rpartition("/")[0]


def remove_tree(parent: int, name: str) -> None:
    """Remove whatever has a name in a directory; nothing happens if nothing has.

    However deep a tree is, it takes two descriptors: what is deeper is moved up and then removed.
    Directories of ours get the rights that it takes, if whoever made them took these away, and so
    does the one that the tree is in. An empty mount point stays.

    Args:
        parent: The directory's descriptor, which may be opened with O_PATH.
        name: What to remove.

    Raises:
        OSError: Something can not be removed, whose path from `parent` is its `filename`; what is
            left can be tried again.
    """
    with suppress(FileNotFoundError):
        try:
            _remove_tree(parent, name)
        except PermissionError:
            if not _take_rights(parent):
                raise
            _remove_tree(parent, name)


def remove_path(path: Path) -> None:
    """Remove whatever is at a path whose directory no job can change; as `remove_tree` does.

    Raises:
        OSError: As `remove_tree`, or the directory that it is in can not be opened.
    """
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(parent, path.name)
    finally:
        os.close(parent)


def _remove_tree(parent: int, name: str) -> None:
    if not _is_directory(parent, name):
        os.unlink(name, dir_fd=parent)
        return
    with _opened(parent, name) as top, _below(name):
        pending = _remove_files(top)
        while pending:
            directory = pending.pop()
            with _opened(top, directory) as fd, _below(directory):
                pending += [
                    moved for deeper in _remove_files(fd) if (moved := _move_up(fd, deeper, top))
                ]
            os.rmdir(directory, dir_fd=top)
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise


def _move_up(directory: int, name: str, top: int) -> str:
    """Move a directory to another one; return its new name, or nothing if it was empty and went."""
    try:
        # Moving takes the right to write in it, removing does not.
        os.rmdir(name, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        moved = partial_name(secrets.token_hex(8))
        try:
            os.rename(name, moved, src_dir_fd=directory, dst_dir_fd=top)
        except PermissionError:
            # Moving a directory takes the right to write in it as well: opening takes it.
            with _opened(directory, name):
                os.rename(name, moved, src_dir_fd=directory, dst_dir_fd=top)
        return moved
    return ""


def _is_directory(parent: int, name: str) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


@contextmanager
def _opened(parent: int, name: str) -> Iterator[int]:
    """Open a directory to remove what is in it, with the rights that this takes."""
    try:
        fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
    except PermissionError:
        closed = os.open(name, _OPEN_PATH, dir_fd=parent)
        try:
            _take_rights(closed)
        finally:
            os.close(closed)
        fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
    try:
        _take_rights(fd)
        yield fd
    finally:
        os.close(fd)


def _take_rights(directory: int) -> bool:
    """Give a directory's owner all rights; False if he has them, or we may not give them."""
    mode = stat.S_IMODE(os.fstat(directory).st_mode)
    if mode & stat.S_IRWXU == stat.S_IRWXU:
        return False
    try:
        # By way of /proc, since fchmod() refuses a descriptor of O_PATH.
        Path(f"/proc/self/fd/{directory}").chmod(mode | stat.S_IRWXU)
    except OSError:
        return False
    return True


@contextmanager
def _below(name: str) -> Iterator[None]:
    """Let an error tell its path from the directory above."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        # That of a descriptor is a number.
        path = f"{name}/{error.filename}" if isinstance(error.filename, str) else name
        raise OSError(error.errno, error.strerror, path) from error


def _remove_files(directory: int) -> list[str]:
    """Remove what is no directory; return the directories."""
    with os.scandir(directory) as entries:
        found = list(entries)
    for entry in found:
        if not entry.is_dir(follow_symlinks=False):
            with suppress(FileNotFoundError):
                os.unlink(entry.name, dir_fd=directory)
    return [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
