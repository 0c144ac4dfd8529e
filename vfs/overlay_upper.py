"""The directory that holds what is written: how things lie in it, and how they change.

Everything is reached from a descriptor of the directory it is in, and no link is followed: a path
never leaves the upper directory. What is made under a name that means something already is made in
the work directory first and brought in by one rename, so whoever is killed leaves the old or the
new. A file that has lost its last name, but is still open, lies in the work directory as
`gone-<node>` until it is let go.

Concurrency: whoever calls holds the overlay's lock; a `Descriptor` stays open for as long as
somebody has it.
"""

import ctypes
import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import LocalWriteError, local_write_error
from agent_plugin.content.overlay_marks import (
    HAS_WHITEOUT_FILES,
    OPAQUE,
    TRUSTED_MARKS,
    USER_MARKS,
    Marks,
    note_marks,
    read_mark,
)
from vfs.nodes import NOW, RENAME_EXCHANGE, RENAME_NOREPLACE, Caller

# Descriptors that are kept of each kind, files and directories.
KEPT_OPEN: Final = 256
NEW: Final = b"new"
_GONE: Final = "gone-"
_NO_LINK: Final = os.O_NOFOLLOW | os.O_CLOEXEC

# A name in a directory.
Place = tuple[int, bytes]

# Source: linux/stat.h and linux/fcntl.h.
_UTIME_NOW: Final = (1 << 30) - 1
_UTIME_OMIT: Final = (1 << 30) - 2
_AT_SYMLINK_NOFOLLOW: Final = 0x100

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Descriptor:
    """Something open, closed when the last who has it lets go."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Upper:
    """An upper directory and its work directory, on one file system.

    Attributes:
        root, work: Both, open.
        marks: Which attributes are used.
        node_mark: On what came from an input: which node it is, for a server's successor.
        has_devices: Whether a whiteout may be a character device.
        shown_owner: Whose everything seems to be; None: whose it is.

    Args:
        upper: Exists.
        work: Beside it; exists, and is this overlay's own.
        privileged: False to keep to what needs no privilege, on a host of any kind.
        shown_owner: See above: for who serves another user, and may give nothing away. Everything
            in the directory is then this process's own.

    Raises:
        LocalWriteError: The file system lacks what can not be done without.
        NoSpaceError: It is full.
    """

    def __init__(
        self,
        upper: Path,
        work: Path,
        *,
        privileged: bool = True,
        shown_owner: Caller | None = None,
    ) -> None:
        self.shown_owner = shown_owner
        try:
            self.root = open_directory(os.fspath(upper))
            self.work = open_directory(os.fspath(work))
            self.clear(NEW)
            self.clear(b"probe")
            self.has_devices = privileged and self._allows_devices()
            self.marks = self._find_marks(upper, privileged=privileged)
        except OSError as error:
            raise local_write_error(error, os.fspath(upper)) from error
        self.node_mark = f"{self.marks.space}.propmaster.node"
        note_marks(upper, self.marks)

    # ------------------------------------------------------------------ marks

    def whiteout(self, at: Place) -> None:
        """Make a whiteout, in place of the file or whiteout that may be there."""
        self.stage_whiteout(NEW, at[0])
        os.rename(NEW, at[1], src_dir_fd=self.work.fd, dst_dir_fd=at[0])

    def stage_whiteout(self, name: bytes, directory: int) -> None:
        """Make a whiteout in the work directory, that is to go to a directory."""
        self.clear(name)
        if self.has_devices:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=self.work.fd)
            return
        with_mark = self.make_regular(name, 0o600)
        os.setxattr(with_mark.fd, self.marks.whiteout, OPAQUE)
        with permitted(directory):
            if read_mark(directory, self.marks.opaque) is None:
                os.setxattr(directory, self.marks.opaque, HAS_WHITEOUT_FILES)

    def mark_opaque(self, directory: Descriptor) -> None:
        """Have a directory hide what is below it."""
        with permitted(directory.fd):
            os.setxattr(directory.fd, self.marks.opaque, OPAQUE)

    def mark_origin(self, opened: Descriptor, path: str) -> None:
        """Note which input something is, wherever it stands; `path` is below the root."""
        with permitted(opened.fd):
            os.setxattr(opened.fd, self.marks.redirect, b"/" + os.fsencode(path))

    def mark_own_content(self, opened: Descriptor, node_mark: bytes) -> None:
        """Note that a file shows no input's content any more, and which node it is."""
        with permitted(opened.fd):
            # First: until then it is known by the input that it shows.
            os.setxattr(opened.fd, self.node_mark, node_mark)
            os.removexattr(opened.fd, self.marks.metacopy)

    def is_private(self, name: bytes) -> bool:
        """Whether an attribute's name is one of ours, that nobody else may see or set."""
        return name.partition(b".")[2].startswith((b"overlay.", b"propmaster."))

    def may_be(self, name: bytes) -> bool:
        """Whether an attribute is of a kind that is kept; whose they are the kernel sees to."""
        return name.startswith((b"user.", b"trusted.") if self.marks == TRUSTED_MARKS else b"user.")

    # ------------------------------------------------------------------ making

    def make_regular(self, name: bytes, mode: int, directory: int = -1) -> Descriptor:
        """Make a file, in the work directory unless another is named."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK
        where = self.work.fd if directory < 0 else directory
        return Descriptor(os.open(name, flags, mode, dir_fd=where))

    def make(
        self, at: Place, mode: int, caller: Caller, *, rdev: int = 0, target: bytes = b""
    ) -> os.stat_result:
        """Make a file, directory or link of an owner, with exactly that mode, in the place given.

        Args:
            at: A directory's descriptor, and a name that nothing has.
            mode: Type and permissions.
            caller: The owner.
            rdev: Of a device.
            target: Of a symbolic link.

        Returns:
            Its status.

        Raises:
            OSError: Nothing was made.
        """
        directory, name = at
        try:
            if stat.S_ISDIR(mode):
                os.mkdir(name, 0o700, dir_fd=directory)
            elif stat.S_ISLNK(mode):
                os.symlink(target, name, dir_fd=directory)
            elif stat.S_ISREG(mode):
                self.make_regular(name, stat.S_IMODE(mode), directory)
            else:
                os.mknod(name, stat.S_IFMT(mode) | 0o600, rdev, dir_fd=directory)
            return self.give(at, mode, caller)
        except FileExistsError:
            raise
        except OSError:
            with suppress(OSError):
                remove(directory, name)
            raise

    def give(self, at: Place, mode: int, caller: Caller) -> os.stat_result:
        """Set owner and permissions of what was just made; return its status."""
        directory, name = at
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if self.shown_owner is None and (status.st_uid, status.st_gid) != caller:
            os.chown(name, caller.uid, caller.gid, dir_fd=directory, follow_symlinks=False)
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISLNK(mode) and stat.S_IMODE(status.st_mode) != stat.S_IMODE(mode):
            change_mode(directory, name, stat.S_IMODE(mode))
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return status

    def give_away(self, at: Place, uid: int | None, gid: int | None) -> None:
        """Change an owner; None leaves it as it is.

        Raises:
            PermissionError: It may not be changed.
        """
        directory, name = at
        owner = -1 if uid is None else uid, -1 if gid is None else gid
        if self.shown_owner is None:
            os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
        elif any(
            new not in (-1, shown) for new, shown in zip(owner, self.shown_owner, strict=True)
        ):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    # ------------------------------------------------------------------ what is gone

    def gone_name(self, node: int) -> bytes:
        """Return the name, in the work directory, of what has no other any more."""
        return b"%s%d" % (_GONE.encode(), node)

    def gone(self) -> Iterator[tuple[int, bytes, os.stat_result]]:
        """Yield what a killed server kept for those who have it open: node, name and status."""
        for name in os.listdir(self.work.fd):  # noqa: PTH208 - a descriptor
            digits = name.removeprefix(_GONE)
            if digits != name and digits.isdecimal():
                raw = os.fsencode(name)
                yield int(digits), raw, os.stat(raw, dir_fd=self.work.fd, follow_symlinks=False)

    def let_move(self, at: Place) -> None:
        """See that something which is about to go can be brought to the work directory.

        Of a directory the kernel wants that its mode lets it be written to.
        """
        if os.geteuid() == 0:
            return
        directory, name = at
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode) and not status.st_mode & stat.S_IWUSR:
            change_mode(directory, name, stat.S_IMODE(status.st_mode) | stat.S_IWUSR)

    def clear_work(self) -> None:
        """Remove what an earlier mount left."""
        for name in os.listdir(self.work.fd):  # noqa: PTH208 - a descriptor
            remove(self.work.fd, os.fsencode(name))

    def open_new(self) -> Descriptor:
        """Open a directory that was made as NEW."""
        return open_directory(NEW, self.work.fd)

    def destroy(self, name: bytes) -> None:
        """Remove something from the work directory; of a directory, the whiteouts in it too."""
        remove(self.work.fd, name)

    def clear(self, name: bytes) -> None:
        """Remove something from the work directory if it is there."""
        with suppress(FileNotFoundError):
            remove(self.work.fd, name)

    # ------------------------------------------------------------------ what the disk can do

    def _allows_devices(self) -> bool:
        try:
            os.mknod(b"probe", stat.S_IFCHR, 0, dir_fd=self.work.fd)
        except PermissionError:
            return False
        remove(self.work.fd, b"probe")
        return True

    def _find_marks(self, upper: Path, *, privileged: bool) -> Marks:
        try:
            probe = self.make_regular(b"probe", 0o600)
            self.make_regular(NEW, 0o600)
            rename_at((self.work.fd, b"probe"), (self.work.fd, NEW), RENAME_EXCHANGE)
            marks = TRUSTED_MARKS if privileged else USER_MARKS
            try:
                os.setxattr(probe.fd, marks.metacopy, b"")
            except PermissionError:
                marks = USER_MARKS
                os.setxattr(probe.fd, marks.metacopy, b"")
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            raise LocalWriteError(
                f"{upper}: its file system has no extended attributes, or can not exchange files",
                hint="put it on ext4, XFS, btrfs or tmpfs",
            ) from error
        else:
            return marks
        finally:
            self.clear(b"probe")
            self.clear(NEW)


class Kept:
    """The descriptors that were used last, by node."""

    def __init__(self, most: int = KEPT_OPEN) -> None:
        self._most = most
        self._kept: OrderedDict[int, Descriptor] = OrderedDict()

    def get(self, node: int, open_it: Callable[[], Descriptor]) -> Descriptor:
        """Return a node's descriptor."""
        found = self._kept.get(node)
        if found is None:
            found = self._kept[node] = open_it()
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(node)
        return found

    def find(self, node: int) -> Descriptor | None:
        """Return a node's descriptor if there is one."""
        return self._kept.get(node)

    def drop(self, node: int) -> None:
        """Let go of a node."""
        self._kept.pop(node, None)


def open_directory(name: str | bytes, directory: int | None = None) -> Descriptor:
    """Open a directory, in another one if that is given, whatever its mode allows its owner.

    Raises:
        OSError: It is none, or a link.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | _NO_LINK
    if directory is None:
        return Descriptor(os.open(name, flags))
    return _open_as_owner((directory, os.fsencode(name)), flags, stat.S_IRUSR)


def open_regular(at: Place) -> Descriptor:
    """Open a file for reading and writing, whatever its mode allows its owner.

    Raises:
        OSError: It is a link, or can not be opened.
    """
    flags = os.O_RDWR | os.O_NONBLOCK | _NO_LINK
    return _open_as_owner(at, flags, stat.S_IRUSR | stat.S_IWUSR)


def _open_as_owner(at: Place, flags: int, needed: int) -> Descriptor:
    directory, name = at
    try:
        return Descriptor(os.open(name, flags, dir_fd=directory))
    except PermissionError:
        # Ours, but closed to us: whoever opened it when it was not may go on.
        mode = stat.S_IMODE(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
        change_mode(directory, name, mode | needed)
        try:
            return Descriptor(os.open(name, flags, dir_fd=directory))
        finally:
            change_mode(directory, name, mode)


@contextmanager
def permitted(fd: int) -> Iterator[None]:
    """Have the owner of a file or directory, who is not root, do what its mode does not allow.

    Raises:
        OSError: It is not ours.
    """
    mode = os.fstat(fd).st_mode
    needed = stat.S_IRWXU if stat.S_ISDIR(mode) else stat.S_IRUSR | stat.S_IWUSR
    if os.geteuid() == 0 or mode & needed == needed:
        yield
        return
    os.fchmod(fd, stat.S_IMODE(mode) | needed)
    try:
        yield
    finally:
        os.fchmod(fd, stat.S_IMODE(mode))


def open_path(at: Place) -> Descriptor:
    """Open something to name it: anything, and of a link itself.

    Raises:
        OSError: It is not there.
    """
    directory, name = at
    return Descriptor(os.open(name, os.O_PATH | _NO_LINK, dir_fd=directory))


def path_of(opened: Descriptor) -> str:
    """Return a path of what is open, which leads to nothing else, also where that is a link."""
    return f"/proc/self/fd/{opened.fd}"


def change_mode(directory: int, name: bytes, mode: int) -> None:
    """Set the permissions of something that is no link.

    Raises:
        OSError: It is one, or not ours.
    """
    opened = open_path((directory, name))
    if stat.S_ISLNK(os.fstat(opened.fd).st_mode):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    # fchmod does not take such a descriptor.
    os.chmod(path_of(opened), mode)  # noqa: PTH101 - not a file's path


def kill_privileges(fd: int) -> None:
    """Take set-user-ID and, of what a group may run, set-group-ID from an open file."""
    mode = os.fstat(fd).st_mode
    killed = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        killed &= ~stat.S_ISGID
    if killed != mode:
        os.fchmod(fd, stat.S_IMODE(killed))


def remove(directory: int, name: bytes) -> None:
    """Remove a file, or a directory with all that is in it, without following a link.

    Raises:
        OSError: It is not there, or can not be removed.
    """
    try:
        os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        opened = open_directory(name, directory)
        if inside := os.listdir(opened.fd):  # noqa: PTH208 - a descriptor
            os.fchmod(opened.fd, stat.S_IRWXU)
        for each in inside:
            remove(opened.fd, os.fsencode(each))
        os.rmdir(name, dir_fd=directory)


def rename_at(at: Place, to: Place, flags: int) -> None:
    """renameat2(2): RENAME_NOREPLACE or RENAME_EXCHANGE.

    Raises:
        OSError: As the system call.
    """
    assert flags in (RENAME_NOREPLACE, RENAME_EXCHANGE)  # noqa: S101 - the others are os.rename's
    if _libc.renameat2(at[0], at[1], to[0], to[1], flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_times(at: Place, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set times, as utimensat(2): NOW is the kernel's, which no clock of ours is level with.

    Args:
        at: What gets them; not what a link leads to.
        atime_ns: In nanoseconds since the epoch, NOW, or None to leave it as it is.
        mtime_ns: The same.

    Raises:
        OSError: As the system call.
    """
    times = (_Timespec * 2)(_timespec(atime_ns), _timespec(mtime_ns))
    if _libc.utimensat(at[0], at[1], times, _AT_SYMLINK_NOFOLLOW):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _timespec(time_ns: int | None) -> _Timespec:
    if time_ns is None:
        return _Timespec(0, _UTIME_OMIT)
    if time_ns == NOW:
        return _Timespec(0, _UTIME_NOW)
    return _Timespec(*divmod(time_ns, 1_000_000_000))


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Reserve space or make a hole, as fallocate(2).

    Raises:
        OSError: As the system call.
    """
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
