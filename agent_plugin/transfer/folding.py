"""File systems to which some names are one, such as `a` and `A`: what would be lost there."""

import fcntl
import os
import secrets
import struct
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import PathClashError
from agent_plugin.content.leftovers import lock_partial, partial_name
from agent_plugin.content.manifest_rules import folded

# One for all runs, so that what a kill leaves is gone after the next run.
_PROBE: Final = partial_name("Fold")
_NEW_PROBE: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
# linux/fs.h: _IOR('f', 1, long), and what says of single directories that they fold names.
_GET_FLAGS: Final = 0x80086601
_CASEFOLD: Final = 0x40000000
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class KeptApart:
    """Paths of files that are to be made, each refused if it would be another one's file."""

    def __init__(self) -> None:
        self._folds: dict[str, bool] = {}
        # By st_dev: a hundred thousand files may each have a directory of its own.
        self._devices: dict[int, bool] = {}
        # By what they are to a file system that folds names.
        self._paths: dict[str, str] = {}

    def folds(self, directory: str) -> bool:
        """Return whether names are folded in a directory, or where it will be made.

        Where that can not be tried they count as kept apart: nobody can make files there either.
        """
        found = self._folds.get(directory)
        if found is None:
            found = self._folds[directory] = self._folds_below(Path(directory))
        return found

    def _folds_below(self, directory: Path) -> bool:
        for existing in (directory, *directory.parents):
            try:
                fd = os.open(existing, _DIRECTORY)
            except FileNotFoundError:
                continue
            except OSError:
                return False
            try:
                return _is_marked(fd) or self._folds_on_device(fd)
            except OSError:
                return False
            finally:
                os.close(fd)
        return False

    def _folds_on_device(self, directory: int) -> bool:
        device = os.fstat(directory).st_dev
        if device not in self._devices:
            self._devices[device] = folds_names(directory)
        return self._devices[device]

    def refuse_another(self, path: str) -> None:
        """Take a path of a file system that folds names.

        Raises:
            PathClashError: One that was taken before is the same there.
        """
        first = self._paths.setdefault(folded(path), path)
        if first != path:
            raise PathClashError(
                f"{first} and {path} are one name on the file system there",
                hint="use a file system that keeps upper and lower case apart, or rename the files",
            )


def _is_marked(directory: int) -> bool:
    """Return whether names are folded in this directory, and not on all of its file system."""
    try:
        flags = fcntl.ioctl(directory, _GET_FLAGS, bytes(8))
    except OSError:
        # No such flags here.
        return False
    return bool(struct.unpack("=Q", flags)[0] & _CASEFOLD)


def folds_names(directory: int) -> bool:
    """See whether a file is found under its name in other letters, by making one.

    Raises:
        OSError: None can be made there.
    """
    name = _PROBE
    try:
        fd = os.open(name, _NEW_PROBE | os.O_NONBLOCK, 0o600, dir_fd=directory)
    except OSError:
        # Another user's, or no file at all.
        return _folds_a_new_name(directory)
    try:
        # Runs that ask at once would take the name away from each other.
        if not lock_partial(fd) or not _is_named(name, fd, directory):
            return _folds_a_new_name(directory)
        try:
            other = os.stat(_in_other_letters(name), dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        finally:
            os.unlink(name, dir_fd=directory)
        # Somebody may have put a file there.
        return os.path.samestat(other, os.fstat(fd)) or _folds_a_new_name(directory)
    finally:
        os.close(fd)


def _folds_a_new_name(directory: int) -> bool:
    """The same by a name that nobody else has; a kill at this moment leaves it."""
    name = partial_name(f"Fold-{secrets.token_hex(8)}")
    os.close(os.open(name, _NEW_PROBE | os.O_EXCL, 0o600, dir_fd=directory))
    try:
        os.stat(_in_other_letters(name), dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    else:
        return True
    finally:
        os.unlink(name, dir_fd=directory)


def _in_other_letters(name: str) -> str:
    return name.replace("-Fold", "-fOLD")


def _is_named(name: str, fd: int, directory: int) -> bool:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(fd))
