"""Files below a directory, reached so that no path can lead out of it.

Everything goes component by component from a descriptor of the root, and no component that is a
link is ever opened. Where a link may be followed (reading, and only to a place inside the root), it
is first resolved by name and the result is then opened the same way; so what is opened is inside
the root even if somebody swaps directories in between. The one thing not prevented: a directory
that is moved elsewhere while its descriptor is held stays open where it went.

Concurrency: a `Root` may be used by many threads; its lock covers the directory descriptors and is
held while missing directories are made. A descriptor that `directory` returned may be closed once
MAX_DIRECTORIES others were asked for, so threads that share a `Root` use `holding` instead.
"""

import errno
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

from agent_plugin.content.errors import (
    LocalReadError,
    PathClashError,
    UnsafePathError,
    local_write_error,
)
from agent_plugin.content.owner import Owner, acting

# A quarter of the usual soft limit on open files (1,024), which sockets and temp files share.
MAX_DIRECTORIES: Final = 256

_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a fifo that took the file's place would wait for its writer.
_OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def split(path: str) -> list[str]:
    """Return the components of a relative path; "" and "." are the root itself and have none.

    Single dots and doubled or trailing slashes are dropped, as the kernel does.

    Raises:
        UnsafePathError: The path is absolute, has a `..` component or a NUL.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise UnsafePathError(
            f"{path!r} is not a path below its root",
            hint="use a relative path without `..`",
        )
    return parts


class NotRegularError(LocalReadError):
    """What was to be read is no regular file: a directory, a fifo, a socket, a device."""


@dataclass(slots=True)
class _Directory:
    fd: int
    holders: int = 0
    evicted: bool = False


class Root:
    """A directory, open; files are read and directories made below it and never outside.

    It remembers the directories it has opened. Where others may have moved or removed directories
    since, open a new one, or it may still see (safely) what was there before.

    Args:
        path: The directory. Links in the path that leads to it are followed: it is ours.
        follow: Whether the directory may be a link itself; not where others can put one.
        max_directories: How many descriptors of directories below it may stay open, >= 2; None is
            MAX_DIRECTORIES, or a quarter of what this process may have if that is less.
        owner: Whose everything is that is made, and with whose rights files are opened; if the
            directory may be a link, with his rights all is done. None: this process's user.

    Attributes:
        path: The directory as it was given.
        real_path: The same without links.
        fd: Its descriptor, open until `close`.
        follow, owner: As given.

    Raises:
        FileNotFoundError: There is no such directory.
        UnsafePathError: It is a link, and `follow` is false.
        LocalReadError: It can not be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        follow: bool = True,
        max_directories: int | None = None,
        owner: Owner | None = None,
    ) -> None:
        self.path = path
        self.follow = follow
        self.owner = owner
        self._maker = owner if follow else None
        self._lock = threading.Lock()
        if max_directories is None:
            soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            unlimited = soft_limit == resource.RLIM_INFINITY
            max_directories = (
                MAX_DIRECTORIES if unlimited else min(MAX_DIRECTORIES, soft_limit // 4)
            )
        self._max = max(2, max_directories)
        self._directories: OrderedDict[str, _Directory] = OrderedDict()
        try:
            with acting(self._maker):
                above = os.path.realpath(path if follow else path.parent, strict=True)
                self.real_path = above if follow else os.fspath(Path(above, path.name))
                self.fd = os.open(self.real_path, _OPEN_DIRECTORY)
        except FileNotFoundError:
            raise
        except OSError as error:
            if path.is_symlink() and not follow:
                raise UnsafePathError(
                    f"{path} is a symbolic link where a directory must be",
                    hint="remove the link; see who put it there",
                ) from error
            raise LocalReadError(f"{path} can not be opened: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor but those being held; what `directory` returned is invalid."""
        with self._lock:
            while self._directories:
                self._evict_oldest()
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1

    def open_file(self, path: str) -> int:
        """Open a regular file for reading and return its descriptor, which the caller closes.

        A link on the way, or the file itself being one, is followed if it leads to a place inside
        the root. Never waits, whatever stands at the path.

        Args:
            path: Relative to the root, `/` separated.

        Raises:
            FileNotFoundError: Nothing is there.
            UnsafePathError: The path, or a link on it, leaves the root; or links form a loop.
            NotRegularError: It is no regular file.
            LocalReadError: It may not be read.
        """
        parts = split(path)
        with acting(self.owner):
            try:
                return self._open_file(parts)
            except UnsafePathError:
                return self._open_file(self.resolve(path))

    def resolve(self, path: str) -> list[str]:
        """Return the components of the path without links that `path` stands for.

        By name only: open the result with this class, which follows no further link.

        Raises:
            FileNotFoundError: Nothing is there; a link may be broken.
            UnsafePathError: It is outside the root, or links form a loop, or the path is longer
                than the kernel resolves (4,096 bytes).
            LocalReadError: A directory on the way may not be read.
        """
        named = "/".join([self.real_path, *split(path)])
        shown = f"{self.path}/{path}"
        with acting(self.owner):
            try:
                real = os.path.realpath(named, strict=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise _absent(shown) from error
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                    message = f"{shown} can not be followed: {error.strerror}"
                    raise UnsafePathError(message) from error
                # What may not be looked at can still be outside: that is the better answer.
                self._below(os.path.realpath(named), shown)
                raise LocalReadError(f"{shown} can not be read: {error.strerror}") from error
        return self._below(real, shown)

    def _below(self, real: str, shown: str) -> list[str]:
        prefix = self.real_path.rstrip("/") + "/"
        if not (real + "/").startswith(prefix):
            raise UnsafePathError(
                f"{shown} leads out of its root, to {real}",
                hint="copy the file into the directory instead of linking to it",
            )
        return split(real[len(prefix) :])

    def directory(self, relative: str, *, create: bool = True) -> int:
        """Return the descriptor of a directory below the root, made if it is missing.

        It is borrowed: it stays open until MAX_DIRECTORIES other directories were asked for, the
        least recently used being closed first. Do not close it. Threads use `holding`.

        Args:
            relative: Relative to the root, `/` separated; "" and "." are the root.
            create: Make missing directories: the owner's, or with mode 0777 less the umask.

        Raises:
            FileNotFoundError: It does not exist and `create` is false, or it was removed meanwhile.
            UnsafePathError: A component is a symbolic link, or the path leaves the root.
            PathClashError: A component is something else than a directory.
            NoSpaceError: A directory could not be made for lack of space or inodes.
            LocalWriteError: A directory could not be made or opened; perhaps one on the way was
                opened earlier and has been removed since.
            LocalReadError: As LocalWriteError, if `create` is false.
        """
        with self._lock:
            if relative in self._directories:
                self._directories.move_to_end(relative)
                return self._directories[relative].fd
            parts = split(relative)
            return self._walk(parts, create=create).fd if parts else self.fd

    @contextmanager
    def holding(self, relative: str, *, create: bool = True) -> Iterator[int]:
        """Lend the descriptor of a directory that stays open while the context lasts.

        Args and Raises: As for `directory`.
        """
        parts = split(relative)
        if not parts:
            yield self.fd
            return
        with self._lock:
            directory = self._walk(parts, create=create)
            directory.holders += 1
        try:
            yield directory.fd
        finally:
            with self._lock:
                directory.holders -= 1
                if directory.evicted and directory.holders == 0:
                    os.close(directory.fd)

    def _walk(self, parts: list[str], *, create: bool) -> _Directory:
        with acting(self._maker):
            return self._walk_as_maker(parts, create=create)

    def _walk_as_maker(self, parts: list[str], *, create: bool) -> _Directory:
        known = len(parts)
        while known and "/".join(parts[:known]) not in self._directories:
            known -= 1
        directory = _Directory(self.fd)
        if known:
            path = "/".join(parts[:known])
            self._directories.move_to_end(path)
            directory = self._directories[path]
        for depth in range(known, len(parts)):
            path = "/".join(parts[: depth + 1])
            shown = f"{self.path}/{path}"
            fd = self._open_component(directory.fd, parts[depth], shown, create=create)
            directory = self._keep(path, fd)
        return directory

    def _open_component(self, parent: int, name: str, path: str, *, create: bool) -> int:
        if not create:
            return _open_existing(parent, name, path, create=create)
        # Most directories exist already, so they are asked for before they are made.
        with suppress(FileNotFoundError):
            return _open_existing(parent, name, path, create=create)
        made = True
        try:
            # The owner may move another directory there before it is opened: with his own rights it
            # gets no mode, and he no directory, that he could not have given and had himself.
            with acting(self.owner):
                os.mkdir(name, dir_fd=parent)
        except FileExistsError:
            made = False  # Another thread or process was first.
        except OSError as error:
            _refuse_component(error, parent, name, path, create=create)
        fd = _open_existing(parent, name, path, create=create)
        if made and self.owner is not None:
            try:
                with self.owner.acting():
                    self.owner.give_directory(fd, shared=self.follow)
            except OSError as error:
                os.close(fd)
                raise local_write_error(error, f"directory {path}") from error
        return fd

    def _keep(self, path: str, fd: int) -> _Directory:
        directory = self._directories[path] = _Directory(fd)
        while len(self._directories) > self._max:
            self._evict_oldest()
        return directory

    def _evict_oldest(self) -> None:
        _, oldest = self._directories.popitem(last=False)
        oldest.evicted = True
        if oldest.holders == 0:
            os.close(oldest.fd)

    def _open_file(self, parts: list[str]) -> int:
        shown = "/".join([str(self.path), *parts])
        if not parts:
            raise NotRegularError(f"{shown} is a directory, not a file")
        try:
            with self.holding("/".join(parts[:-1]), create=False) as directory:
                fd = os.open(parts[-1], _OPEN_FILE, dir_fd=directory)
        except (FileNotFoundError, PathClashError) as error:
            raise _absent(shown) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UnsafePathError(f"{shown} is a symbolic link") from error
            if error.errno == errno.ENXIO:
                raise NotRegularError(f"{shown} is not a regular file") from error
            raise LocalReadError(f"{shown} can not be opened: {error.strerror}") from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise NotRegularError(f"{shown} is not a regular file")
        if self.owner is not None and not self.owner.may_read(status):
            os.close(fd)
            raise LocalReadError(f"{shown} may not be read by user {self.owner.uid}")
        return fd


def _absent(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _open_existing(parent: int, name: str, path: str, *, create: bool) -> int:
    try:
        return os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
    except FileNotFoundError as error:
        raise _absent(path) from error
    except OSError as error:
        _refuse_component(error, parent, name, path, create=create)


def _refuse_component(
    error: OSError, parent: int, name: str, path: str, *, create: bool
) -> NoReturn:
    # With O_DIRECTORY, a link answers ENOTDIR like a file does.
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        if _is_link(parent, name):
            raise UnsafePathError(
                f"{path} is a symbolic link where a directory must be",
                hint="remove the link",
            ) from error
        raise PathClashError(
            f"{path} is a file where a directory must be", hint="rename one of the two"
        ) from error
    if create:
        raise local_write_error(error, f"directory {path}") from error
    raise LocalReadError(f"directory {path} can not be opened: {error.strerror}") from error


def _is_link(parent: int, name: str) -> bool:
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(mode)
