"""Files that arrive in a directory together: built under a hidden name, then moved into place.

A directory that is not there yet is built beside its place and renamed when it is complete. Into
one that is there, files are moved one by one, after all of them have come and none of them would
take the place of something else; what comes to such a place meanwhile stays, and those that were
moved before are moved back. So neither a failure nor a kill leaves what looks finished and is not;
only a kill while files are being moved leaves some of them moved, and the next run moves the
others.

What has come is kept under the hidden name, and a next run goes on with it. Whoever fills it holds
a lock on it, which the kernel lets go of with the process.
"""

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.digest import hash_name
from agent_plugin.content.errors import (
    LocalReadError,
    PathClashError,
    PropmasterError,
    TransferStateError,
    local_write_error,
)
from agent_plugin.content.leftovers import lock_partial, partial_name, prune, remove_tree
from agent_plugin.content.rename import rename_new
from agent_plugin.content.safe_path import Root
from agent_plugin.publish.clashes import Clash, refuse

_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Arrival:
    """A directory that files arrive in.

    Attributes:
        target: Where they go in the end.
        hidden: Where they are until all have come.
        fresh: Whether the target was not there.
    """

    target: Path
    hidden: Path
    fresh: bool

    def standing(self, paths: Collection[str]) -> list[tuple[str, bool]]:
        """Return those of the paths where something stands in the target.

        Returns:
            The path, and whether it is a directory that stands there.

        Raises:
            UnsafePathError, PathClashError: A link or a file stands where a directory must be.
            LocalReadError: It can not be looked at.
        """
        found: list[tuple[str, bool]] = []
        if self.fresh:
            return found
        with Root(self.target) as root:
            for path in paths:
                parent, _, name = path.rpartition("/")
                with suppress(FileNotFoundError):
                    directory = root.directory(parent, create=False)
                    mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
                    found.append((path, stat.S_ISDIR(mode)))
        return found

    def keep_only(self, paths: Collection[str]) -> None:
        """Remove from the hidden directory what an earlier run brought and this one does not want.

        Raises:
            LocalWriteError: It can not be removed.
        """
        try:
            with Root(self.hidden.parent) as above:
                prune(above, self.hidden.name, paths)
        except OSError as error:
            raise local_write_error(error, os.fspath(self.hidden)) from error

    def reveal(self) -> None:
        """Give the hidden directory its name, with all that is in it.

        Raises:
            PathClashError: Something has come there meanwhile.
            LocalWriteError: It can not be renamed.
        """
        try:
            with Root(self.hidden.parent) as above:
                rename_new((above.fd, self.hidden.name), (above.fd, self.target.name))
        except FileExistsError as error:
            raise PathClashError(
                f"{self.target} has come into being meanwhile", hint="run the same command again"
            ) from error
        except OSError as error:
            raise local_write_error(error, os.fspath(self.target)) from error

    def move_in(self, moves: Mapping[str, str], *, overwrite: bool) -> None:
        """Give files that have arrived their places in a target that is there.

        Args:
            moves: By the path in the target, that below the hidden directory.
            overwrite: Whether files that stand there give way.

        Raises:
            ResultClashError: Something stands there; nothing was moved.
            UnsafePathError, PathClashError, LocalWriteError: On this host.
        """
        self.refuse_standing(moves, overwrite=overwrite)
        try:
            with Root(self.hidden, follow=False) as source, Root(self.target) as root:
                move(moves, source, root, replace=overwrite)
        except FileExistsError as error:
            # It has come between the look and the move.
            self.refuse_standing(moves, overwrite=overwrite)
            raise local_write_error(error, os.fspath(self.target)) from error
        except OSError as error:
            raise local_write_error(error, os.fspath(self.target)) from error

    def refuse_standing(self, paths: Collection[str], *, overwrite: bool) -> None:
        """Do nothing if nothing stands at any of the paths.

        Args:
            paths: Of files.
            overwrite: Whether files may stand there. Directories may not.

        Raises:
            ResultClashError: Something does.
        """
        refuse(
            [
                Clash(path, ("a directory is there" if directory else "something else is there",))
                for path, directory in self.standing(paths)
                if directory or not overwrite
            ],
            f"{self.target} has other content",
            "choose another directory with --to"
            if overwrite
            else "choose another directory with --to, or have files replaced with --overwrite",
        )

    def remove_empty(self) -> None:
        """Remove the hidden directory if nothing has arrived."""
        with suppress(OSError):
            self.hidden.rmdir()

    def remove(self) -> None:
        """Remove what has arrived and has no place.

        Raises:
            LocalWriteError: It can not be removed.
        """
        try:
            with Root(self.hidden.parent) as above:
                remove_tree(above.fd, self.hidden.name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise local_write_error(error, os.fspath(self.hidden)) from error


def move(moves: Mapping[str, str], source: Root, root: Root, *, replace: bool = False) -> None:
    """Rename files from below one directory to below another on the same file system.

    All of them have moved, or none has, unless what stood there was replaced.

    Args:
        moves: By the new path, the old one.
        source: Where the old paths are.
        root: Where the new ones are; missing directories are made.
        replace: Whether files that have a new name give way.

    Raises:
        FileExistsError: Something has a new name, and may not be replaced.
        OSError: A file can not be renamed.
        UnsafePathError, PathClashError: A link or a file stands where a directory must be.
    """
    missing = [] if replace else _missing(moves, root)
    moved: list[tuple[str, str]] = []
    try:
        for path, old in moves.items():
            _rename(source, old, root, path, replace=replace)
            moved.append((old, path))
    except (OSError, PropmasterError):
        if not replace:
            for old, path in reversed(moved):
                with suppress(OSError, PropmasterError):
                    _rename(root, path, source, old, replace=False)
            for directory in missing:
                parent, _, name = directory.rpartition("/")
                with suppress(OSError), root.holding(parent, create=False) as above:
                    os.rmdir(name, dir_fd=above)
        raise


def _rename(source: Root, old: str, root: Root, path: str, *, replace: bool) -> None:
    parent, _, name = path.rpartition("/")
    above, _, old_name = old.rpartition("/")
    with source.holding(above, create=False) as there, root.holding(parent) as here:
        if replace:
            os.rename(old_name, name, src_dir_fd=there, dst_dir_fd=here)
        else:
            rename_new((there, old_name), (here, name))


def _missing(paths: Collection[str], root: Root) -> list[str]:
    """Return the directories that the paths need and the root lacks, the deepest first."""
    needed: set[str] = set()
    for path in paths:
        above = path.rpartition("/")[0]
        while above and above not in needed:
            needed.add(above)
            above = above.rpartition("/")[0]
    missing = set()
    for directory in sorted(needed):
        if directory.rpartition("/")[0] in missing:
            missing.add(directory)
            continue
        try:
            root.directory(directory, create=False)
        except FileNotFoundError:
            missing.add(directory)
    return sorted(missing, reverse=True)


@contextmanager
def arriving(target: Path) -> Iterator[Arrival]:
    """Lend a hidden directory for what is to arrive in `target`, to this process alone.

    Args:
        target: A directory, or nothing yet; absolute. It may be a link to a directory.

    Raises:
        PathClashError: Something else is there.
        TransferStateError: Another process has files arrive there.
        LocalWriteError, NoSpaceError: The hidden directory can not be made.
        LocalReadError: The target can not be looked at.
    """
    fresh = _is_absent(target)
    name = partial_name(f"get-{hash_name(target.name)}")
    above = target.parent if fresh else target
    arrival = Arrival(target, above / name, fresh)
    try:
        above.mkdir(parents=True, exist_ok=True)
        fd = _locked(arrival.hidden)
    except OSError as error:
        raise local_write_error(error, os.fspath(arrival.hidden)) from error
    try:
        yield arrival
    finally:
        os.close(fd)


def _is_absent(target: Path) -> bool:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if target.is_symlink():
            raise PathClashError(
                f"{target} is a link that leads nowhere", hint="remove it, or choose another --to"
            ) from None
        return True
    except OSError as error:
        raise LocalReadError(f"{target}: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise PathClashError(
            f"{target} is not a directory", hint="remove it, or choose another --to"
        )
    return False


def _locked(hidden: Path) -> int:
    """Make the directory unless it is there, and return its descriptor, locked."""
    while True:
        with suppress(FileExistsError):
            hidden.mkdir()
        try:
            fd = os.open(hidden, _OPEN)
        except FileNotFoundError:
            continue
        if not lock_partial(fd):
            os.close(fd)
            raise TransferStateError(
                f"another process has results arrive in {hidden.parent}",
                hint="wait until it has ended",
            )
        # Another process may have given it its place before we had the lock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), hidden.lstat()):
                return fd
        os.close(fd)
