"""Whose the files of a local root are, when they are another user's than this process's.

As root, what is made is given to that user. Where this process may have no business, in a directory
of the host's that a root was mapped to, and whenever one of his files is read, that happens with
his rights: the kernel then judges each path as if he had opened it himself, so that a link that he
has put in the way leads nowhere he could not go, and a network file system that does not trust root
knows him. They are the rights of one thread, in file systems only (setfsuid(2)); the cache and the
records of this host are reached with this process's own. It costs some 20 us each time, too much
for each of many small files that are placed.

Without root, what is made gets the user's group, and modes that let the group do all it can; a file
is read for him only if its mode lets him.
"""

import ctypes
import errno
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# The calls of the kernel, since those of the C library are for all threads of a process.
_SYS_SETGROUPS: Final = {"x86_64": 116, "aarch64": 159}
_ASK: Final = ctypes.c_uint32(0xFFFFFFFF)
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Owner:
    """A user for whom files are placed and read.

    A directory or file is either private to a session, whose directory lets nobody else in, or
    shared: below a directory of the host that others may have business in.

    Attributes:
        uid: The user.
        gid: The group of what is made.
        groups: The user's further groups; they count for what he may do.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @property
    def is_impersonated(self) -> bool:
        """Whether this process can have the user's rights: it is root, and he is not."""
        return os.geteuid() == 0 and self.uid != 0

    def may_read(self, status: os.stat_result) -> bool:
        """Whether the user may read an open file that this process could open for him.

        Where it has his rights, the kernel has said so. Else it may read what he may not: a file of
        its own, which he has moved to where it reads for him.
        """
        if self.is_impersonated or self.uid in (0, os.geteuid()):
            return True
        if status.st_uid == self.uid:
            return bool(status.st_mode & stat.S_IRUSR)
        in_group = status.st_gid in (self.gid, *self.groups)
        return bool(status.st_mode & (stat.S_IRGRP if in_group else stat.S_IROTH))

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Give the calling thread the user's rights in file systems, if this process can have them.

        A thread that is started meanwhile would keep them: start none.

        Raises:
            PermissionError: The process is root and may not become others.
        """
        if not self.is_impersonated or (before := _libc.setfsuid(self.uid)) == self.uid:
            # The latter: within another such block.
            yield
            return
        group, groups = _libc.setfsgid(self.gid), os.getgroups()
        try:
            _set_groups(self.groups)
            if (_libc.setfsuid(_ASK), _libc.setfsgid(_ASK)) != (self.uid, self.gid):
                raise PermissionError(errno.EPERM, f"the rights of user {self.uid} can not be had")
            yield
        finally:
            _set_groups(groups)
            _libc.setfsgid(group)
            _libc.setfsuid(before)

    def give_file(self, fd: int, *, shared: bool) -> None:
        """Give the user an open file that this process has made, whoever it was made as.

        Raises:
            OSError: It can not be given; without root, this process is not in the user's group.
        """
        self._give(fd)
        os.fchmod(fd, self._mode(0o666, shared=shared))

    def has_file(self, status: os.stat_result, *, shared: bool) -> bool:
        """Whether a file that this process has made was given to the user, and nobody changed that.

        A process that was killed in between leaves one that he can do nothing with.
        """
        given = status.st_uid == self.uid if self.is_impersonated else status.st_gid == self.gid
        return given and stat.S_IMODE(status.st_mode) == self._mode(0o666, shared=shared)

    def give_directory(self, fd: int, *, shared: bool) -> None:
        """Give the user an open directory that this process has made.

        Raises:
            OSError: As for a file.
        """
        self._give(fd)
        mode = self._mode(0o777, shared=shared) | os.fstat(fd).st_mode & stat.S_ISGID
        # What the job makes in it must stay within reach of this process.
        os.fchmod(fd, mode if self.is_impersonated else mode | stat.S_ISGID)

    def _give(self, fd: int) -> None:
        if self.is_impersonated:
            status = os.fstat(fd)
            if status.st_uid != self.uid:
                os.fchown(fd, self.uid, self.gid)
        elif os.fstat(fd).st_gid != self.gid:
            os.fchown(fd, -1, self.gid)

    def _mode(self, most: int, *, shared: bool) -> int:
        if not shared:
            return most & ~0o007
        # As an own program of his would leave it; but what is not his he can only have as a group.
        return most & ~(0o022 if self.is_impersonated else 0o002)


def acting(owner: Owner | None) -> AbstractContextManager[None]:
    """Give the calling thread the rights of the owner, if there is one."""
    return nullcontext() if owner is None else owner.acting()


def make_directories(path: Path, owner: Owner | None, *, shared: bool) -> None:
    """Make a directory, and those above it that are missing, for their owner.

    Raises:
        OSError: One can not be made, or something else stands there.
    """
    if owner is None:
        path.mkdir(parents=True, exist_ok=True)
        return
    with owner.acting():
        missing = [at for at in (path, *path.parents) if not os.path.lexists(at)]
        for at in reversed(missing):
            try:
                at.mkdir()
            except FileExistsError:
                continue
            fd = os.open(at, _OPEN_DIRECTORY)
            try:
                owner.give_directory(fd, shared=shared)
            finally:
                os.close(fd)
        # Tells of a file that stands there.
        path.mkdir(exist_ok=True)


def _set_groups(groups: tuple[int, ...] | list[int]) -> None:
    array = (ctypes.c_uint32 * len(groups))(*groups)
    number = _SYS_SETGROUPS[platform.machine()]
    if _libc.syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), array):
        code = ctypes.get_errno()
        raise PermissionError(code, os.strerror(code))
