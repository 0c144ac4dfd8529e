"""What programs do with files, each as a call whose outcome two file systems must agree on.

Run as a program it is a process with one user's rights, which does what it is told below the
directory it was sent to. So the same words can be said to two of them, one in a mount and one in a
directory of ext4, and the answers compared. An answer has no inode numbers, no `st_dev` and no
times of now; all that a program may rely on is in it.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from select import select
from typing import Any, Final, Self

REPOSITORY: Final = Path(__file__).resolve().parents[2]
# The user `nobody`, and a group that it is in besides its own.
NOBODY: Final = 65534
GROUP: Final = 100
# Times that are set are before this, in ns; times of now are after it.
NOW_NS: Final = 1_700_000_000_000_000_000
# Far above anything measured: only a hang meets it.
ANSWER_SECONDS: Final = 60.0
# More of a file than this is answered as its hash.
_SHOWN_BYTES: Final = 64
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_HELD_RULES: Final = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "none": fcntl.F_UNLCK}


def pattern(seed: int, size: int) -> bytes:
    """Return bytes that are a function of both, and differ from place to place."""
    return (bytes((seed + at) % 251 for at in range(251)) * (size // 251 + 1))[:size]


def shown(data: bytes) -> object:
    """Return what tells one content from another."""
    if len(data) <= _SHOWN_BYTES:
        return data
    return len(data), hashlib.blake2b(data, digest_size=12).hexdigest()


class Either(int):
    """A number that is equal to another one too."""

    other: int

    def __new__(cls, value: int, other: int) -> Self:
        made = super().__new__(cls, value)
        made.other = other
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[int, int]]:
        return type(self), (int(self), self.other)

    def __eq__(self, other: object) -> bool:
        return other in (int(self), self.other)

    __hash__ = int.__hash__


def facts(status: os.stat_result, *, touched: bool = False) -> tuple[object, ...]:
    """Return what programs may rely on; a directory's size and links are the file system's own.

    Args:
        status: Of a file.
        touched: Whether another file system may say of it that it changed now, and that it has a
            name when it has none.
    """
    mtime, links = min(status.st_mtime_ns, NOW_NS), status.st_nlink
    if touched:
        mtime, links = Either(mtime, NOW_NS), links or Either(0, 1)
    what = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, mtime)
    if stat.S_ISDIR(status.st_mode):
        return what
    return (*what, links, status.st_size)


class Operations:
    """Each method is one; what it raises is an answer too.

    Handles are open files, by a number that whoever asks has chosen.
    """

    def __init__(self) -> None:
        self._handles: dict[int, int] = {}
        self._touched: frozenset[int] = frozenset()

    def enter(self, directory: str, uid: int, gid: int, touched: frozenset[int]) -> None:
        """Begin anew: nothing open, in another directory, as a user with no other rights.

        Args:
            directory: Where.
            uid: The user, and its group `gid`.
            gid: See `uid`.
            touched: Inodes of files of which overlayfs may say other times and links (`facts`).
        """
        self._touched = touched
        for number in list(self._handles):
            self.close(number)
        os.umask(0o022)
        # Root again, since nobody else may pass the directories above.
        os.seteuid(0)
        os.setegid(0)
        os.chdir(directory)
        if uid:
            os.setgroups([GROUP])
            os.setresgid(gid, gid, 0)
            os.setresuid(uid, uid, 0)

    def _facts(self, status: os.stat_result) -> tuple[object, ...]:
        return facts(status, touched=status.st_ino in self._touched)

    # ------------------------------------------------------------------ whole files

    def create(self, path: str, flags: int, mode: int, seed: int, size: int) -> int:
        with _opened(path, os.O_WRONLY | os.O_CREAT | flags, mode) as fd:
            return os.write(fd, pattern(seed, size))

    def write_at(self, path: str, offset: int, seed: int, size: int) -> int:
        with _opened(path, os.O_WRONLY) as fd:
            return os.pwrite(fd, pattern(seed, size), offset)

    def append(self, path: str, seed: int, size: int) -> tuple[int, int]:
        with _opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            return os.write(fd, pattern(seed, size)), os.lseek(fd, 0, os.SEEK_CUR)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(path, size)

    def read(self, path: str) -> object:
        with _opened(path, os.O_RDONLY) as fd:
            return shown(b"".join(iter(lambda: os.read(fd, 1 << 20), b"")))

    def read_at(self, path: str, offset: int, size: int) -> object:
        with _opened(path, os.O_RDONLY) as fd:
            return shown(os.pread(fd, size, offset))

    def read_into(self, path: str, offset: int, sizes: list[int]) -> object:
        buffers = [bytearray(size) for size in sizes]
        with _opened(path, os.O_RDONLY) as fd:
            return os.preadv(fd, buffers, offset), shown(b"".join(buffers))

    def replace(self, path: str, seed: int, size: int) -> None:
        """Save as careful programs do: beside it, synced, renamed over it."""
        with _opened(f"{path}~", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640) as fd:
            os.write(fd, pattern(seed, size))
            os.fsync(fd)
        self.rename(f"{path}~", path)
        with _opened(os.path.dirname(path) or ".", os.O_DIRECTORY) as fd:  # noqa: PTH120
            os.fsync(fd)

    def map_and_write(self, path: str, offset: int, seed: int, size: int, how: str) -> object:
        flags = mmap.MAP_PRIVATE if how == "private" else mmap.MAP_SHARED
        with _opened(path, os.O_RDWR) as fd:
            length = os.fstat(fd).st_size
            if length == 0:
                # Python refuses to map it, and no file system is asked.
                return b""
            with closing(mmap.mmap(fd, length, flags=flags)) as mapped:
                data = pattern(seed, size)[: max(length - offset, 0)]
                mapped[offset : offset + len(data)] = data
                if how == "flushed":
                    mapped.flush()
                return shown(mapped[:]), shown(os.pread(fd, length, 0))

    def map_and_read(self, path: str) -> object:
        with _opened_file(path) as fd:
            length = os.fstat(fd).st_size
            if length == 0:
                return b""
            with closing(mmap.mmap(fd, length, prot=mmap.PROT_READ)) as mapped:
                return shown(mapped[:])

    def allocate(self, path: str, mode: int, offset: int, size: int) -> None:
        with _opened(path, os.O_RDWR) as fd:
            _check(_LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(size)))

    def copy_range(
        self, path: str, to: str, from_offset: int, to_offset: int, size: int, how: str
    ) -> object:
        with _opened_file(path) as source, _opened(to, os.O_RDWR) as target:
            copied = 0
            while copied < size:
                at, left = from_offset + copied, size - copied
                count = -1
                if how == "copy_file_range":
                    # As programs must do: an input is on another file system than what is written.
                    with _allowing(errno.EXDEV):
                        count = os.copy_file_range(source, target, left, at, to_offset + copied)
                if count < 0:
                    os.lseek(target, to_offset + copied, os.SEEK_SET)
                    count = os.sendfile(target, source, at, left)
                if count == 0:
                    break
                copied += count
            return copied

    def seek(self, path: str, offset: int) -> object:
        """Ask for data and holes: where they are is the file system's, what they mean is not."""
        with _opened_file(path) as fd:
            size = os.fstat(fd).st_size
            if offset >= size:
                return os.lseek(fd, offset, os.SEEK_DATA)
            data = size
            with _allowing(errno.ENXIO):
                data = os.lseek(fd, offset, os.SEEK_DATA)
            skipped = os.pread(fd, data - offset, offset)
            hole = os.lseek(fd, offset, os.SEEK_HOLE)
            return skipped.strip(b"\0"), offset <= data <= size, offset <= hole <= size

    # ------------------------------------------------------------------ names

    def rename(self, path: str, to: str) -> None:
        os.rename(path, to)  # noqa: PTH104 - names as given

    def rename_with(self, path: str, to: str, flags: int) -> None:
        here = -100  # AT_FDCWD
        names = (os.fsencode(path), os.fsencode(to))
        _check(_LIBC.renameat2(here, names[0], here, names[1], flags))

    def link(self, path: str, to: str, *, follow: bool) -> None:
        os.link(path, to, follow_symlinks=follow)

    def symlink(self, leads_to: str, path: str) -> None:
        os.symlink(leads_to, path)  # noqa: PTH211 - names as given

    def readlink(self, path: str) -> str:
        return os.readlink(path)  # noqa: PTH115 - names as given

    def unlink(self, path: str) -> None:
        os.unlink(path)  # noqa: PTH108 - names as given

    def rmdir(self, path: str) -> None:
        os.rmdir(path)  # noqa: PTH106 - names as given

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)  # noqa: PTH102 - names as given

    def make_node(self, path: str, kind: int, mode: int) -> None:
        os.mknod(path, kind | mode)

    def remove_tree(self, path: str) -> object:
        """Remove all that may be removed; answer what may not."""
        kept: list[tuple[str, int]] = []

        def keep(_call: object, name: str, error: tuple[Any, Any, Any]) -> None:
            kept.append((name, error[1].errno))

        if not stat.S_ISDIR(os.lstat(path).st_mode):
            # Python would open it to see, and wait for the other end of a fifo.
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        shutil.rmtree(path, onerror=keep)
        # The order is that of the directory.
        return sorted(kept)

    # ------------------------------------------------------------------ attributes

    def stat(self, path: str, *, follow: bool) -> object:
        return self._facts(os.stat(path, follow_symlinks=follow))  # noqa: PTH116 - names as given

    def access(self, path: str, mode: int, *, effective: bool) -> bool:
        return os.access(path, mode, effective_ids=effective)

    def chmod(self, path: str, mode: int) -> object:
        os.chmod(path, mode)  # noqa: PTH101 - names as given
        return self.stat(path, follow=True)

    def chown(self, path: str, uid: int, gid: int, *, follow: bool) -> object:
        os.chown(path, uid, gid, follow_symlinks=follow)
        return self.stat(path, follow=follow)

    def utime(self, path: str, times: tuple[int, int], *, follow: bool) -> object:
        """Set times in ns; -1 is now, -2 leaves one as it is."""
        nanoseconds = {-1: (1 << 30) - 1, -2: (1 << 30) - 2}
        packed = b"".join(
            struct.pack("qq", *((0, nanoseconds[ns]) if ns < 0 else divmod(ns, 1_000_000_000)))
            for ns in times
        )
        flags = 0 if follow else 0x100  # AT_SYMLINK_NOFOLLOW
        _check(_LIBC.utimensat(-100, os.fsencode(path), packed, flags))
        status = os.stat(path, follow_symlinks=follow)  # noqa: PTH116 - names as given
        return status.st_atime_ns if times[0] >= 0 else None, self._facts(status)

    def set_xattr(self, path: str, name: str, value: bytes, flags: int, *, follow: bool) -> None:
        os.setxattr(path, name, value, flags, follow_symlinks=follow)

    def get_xattr(self, path: str, name: str, *, follow: bool) -> bytes:
        with _none_for_not_supported():
            return os.getxattr(path, name, follow_symlinks=follow)

    def remove_xattr(self, path: str, name: str, *, follow: bool) -> None:
        with _none_for_not_supported():
            os.removexattr(path, name, follow_symlinks=follow)

    def list_xattrs(self, path: str) -> list[str]:
        names: list[str] = []
        with _allowing(errno.ENOTSUP):
            names = os.listxattr(path, follow_symlinks=False)
        return sorted(names)

    def limits(self, path: str) -> int:
        return os.statvfs(path).f_namemax

    def umask(self, mask: int) -> int:
        return os.umask(mask)

    # ------------------------------------------------------------------ directories

    def listing(self, path: str) -> object:
        return sorted(os.listdir(path))  # noqa: PTH208 - names

    def scan(self, path: str) -> object:
        with os.scandir(path) as entries:
            return sorted(
                (
                    entry.name,
                    (entry.is_dir(), entry.is_file(), entry.is_symlink()),
                    entry.is_dir(follow_symlinks=False),
                    self._facts(entry.stat(follow_symlinks=False)),
                )
                for entry in entries
            )

    def walk(self, path: str) -> object:
        return sorted((above, sorted(dirs), sorted(files)) for above, dirs, files in os.walk(path))

    def names(self) -> tuple[list[str], list[str]]:
        """Return the paths of all that is no directory, and of the directories."""
        files, directories = [], []
        for folder, below, names in os.walk("."):
            above = "" if folder == "." else folder[2:] + "/"
            directories.append(folder.removeprefix("./"))
            links = {name for name in below if os.path.islink(above + name)}  # noqa: PTH114
            files += [above + name for name in (*names, *links)]
        return sorted(files), sorted(directories)

    def tree(self) -> dict[str, object]:
        """Return all there is, with its content: for root, who may read it."""
        found: dict[str, object] = {}
        linked: dict[tuple[int, int], str] = {}
        for folder, directories, names in os.walk("."):
            for name in sorted([*directories, *names]):
                path = os.path.join(folder, name)  # noqa: PTH118 - names as given
                status = os.lstat(path)
                content: object = None
                if stat.S_ISREG(status.st_mode):
                    content = self.read(path)
                elif stat.S_ISLNK(status.st_mode):
                    content = self.readlink(path)
                attributes = [
                    (name, os.getxattr(path, name, follow_symlinks=False))
                    for name in self.list_xattrs(path)
                ]
                found[path] = (self._facts(status), content, attributes)
                if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                    linked.setdefault((status.st_dev, status.st_ino), path)
                    found[path] = (found[path], linked[status.st_dev, status.st_ino])
            directories.sort()
        return found

    # ------------------------------------------------------------------ what is open

    def open(self, number: int, path: str, flags: int, mode: int) -> object:
        # A fifo would wait for its other end.
        self._handles[number] = os.open(path, flags | os.O_NONBLOCK, mode)
        return self._facts(os.fstat(self._handles[number]))

    def open_nameless(self, number: int, path: str) -> object:
        self._handles[number] = os.open(path, os.O_TMPFILE | os.O_RDWR, 0o644)
        return self._facts(os.fstat(self._handles[number]))

    def name(self, number: int, path: str) -> None:
        """Give a file that is open a name."""
        source = f"/proc/self/fd/{self._handles[number]}"
        here = os.open(".", os.O_RDONLY)
        try:
            os.link(source, path, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=True)
        finally:
            os.close(here)

    def open_below(self, number: int, above: int, path: str, flags: int) -> object:
        self._handles[number] = os.open(
            path, flags | os.O_NONBLOCK, 0o644, dir_fd=self._handles[above]
        )
        return self._facts(os.fstat(self._handles[number]))

    def duplicate(self, number: int, of: int) -> None:
        self._handles[number] = os.dup(self._handles[of])

    def close(self, number: int) -> None:
        os.close(self._handles.pop(number))

    def read_on(self, number: int, size: int) -> object:
        return shown(os.read(self._handles[number], size))

    def write_on(self, number: int, seed: int, size: int) -> object:
        fd = self._handles[number]
        return os.write(fd, pattern(seed, size)), os.lseek(fd, 0, os.SEEK_CUR)

    def move_to(self, number: int, offset: int, whence: int) -> int:
        return os.lseek(self._handles[number], offset, whence)

    def read_open_at(self, number: int, offset: int, size: int) -> object:
        return shown(os.pread(self._handles[number], size, offset))

    def write_open_at(self, number: int, offset: int, seed: int, size: int) -> int:
        return os.pwrite(self._handles[number], pattern(seed, size), offset)

    def truncate_open(self, number: int, size: int) -> None:
        os.ftruncate(self._handles[number], size)

    def stat_open(self, number: int) -> object:
        return self._facts(os.fstat(self._handles[number]))

    def list_open(self, number: int) -> object:
        return sorted(os.listdir(self._handles[number]))  # noqa: PTH208 - it has no name

    def change_open(self, number: int, mode: int, uid: int, gid: int) -> object:
        os.fchmod(self._handles[number], mode)
        os.fchown(self._handles[number], uid, gid)
        return self.stat_open(number)

    def utime_open(self, number: int, ns: int) -> object:
        os.utime(self._handles[number], ns=(ns, ns))
        return self.stat_open(number)

    def xattr_open(self, number: int, name: str, value: bytes) -> object:
        os.setxattr(self._handles[number], name, value)
        return os.getxattr(self._handles[number], name)

    def sync(self, number: int, *, data_only: bool) -> None:
        (os.fdatasync if data_only else os.fsync)(self._handles[number])

    def lock_range(self, number: int, held: str, start: int, length: int) -> None:
        wanted = struct.pack("hhqqi", _HELD_RULES[held], os.SEEK_SET, start, length, 0)
        fcntl.fcntl(self._handles[number], fcntl.F_SETLK, wanted)

    def lock_holder(self, number: int, held: str, start: int, length: int) -> object:
        wanted = struct.pack("hhqqi", _HELD_RULES[held], os.SEEK_SET, start, length, 0)
        found = fcntl.fcntl(self._handles[number], fcntl.F_GETLK, wanted)
        kind, _, begins, lasts, pid = struct.unpack("hhqqi", found)
        return (kind, begins, lasts) if pid else kind

    def lock(self, number: int, how: int) -> None:
        fcntl.flock(self._handles[number], how | fcntl.LOCK_NB)


@contextmanager
def _opened(path: str, flags: int, mode: int = 0o644) -> Iterator[int]:
    # A fifo would wait for its other end.
    fd = os.open(path, flags | os.O_NONBLOCK, mode)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _opened_file(path: str) -> Iterator[int]:
    """A directory is refused: each file system has its own idea of seeking in one."""
    with _opened(path, os.O_RDONLY) as fd:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield fd


@contextmanager
def _allowing(code: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != code:
            raise


@contextmanager
def _none_for_not_supported() -> Iterator[None]:
    """That it has no attributes is said by an input with another error than by a disk's file."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from error
        raise


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Worker:
    """A process that does what it is told, as one user."""

    def __init__(self, uid: int) -> None:
        self._uid = uid
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.mount.file_operations import main; main()"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def enter(self, directory: Path, *, touched: frozenset[int] = frozenset()) -> None:
        """Begin anew in a directory."""
        self.ask("enter", str(directory), self._uid, self._uid, touched)
        assert self.answer() == ("is", None)

    def ask(self, what: str, *arguments: object, **named: object) -> None:
        assert self._process.stdin
        pickle.dump((what, arguments, named), self._process.stdin)
        self._process.stdin.flush()

    def answer(self) -> tuple[str, object]:
        """Return `is` and what came of it, or what was raised and its errno."""
        assert self._process.stdout
        assert select([self._process.stdout], [], [], ANSWER_SECONDS)[0], "it hangs"
        found: tuple[str, object] = pickle.load(self._process.stdout)
        return found

    def close(self) -> None:
        """End the process, and with it all that it has open."""
        assert self._process.stdin
        assert self._process.stdout
        # It has nothing to clean up, and may wait for what never comes.
        self._process.kill()
        self._process.wait(ANSWER_SECONDS)
        self._process.stdin.close()
        self._process.stdout.close()


def main() -> None:
    operations = Operations()
    with suppress(EOFError):
        while True:
            what, arguments, named = pickle.load(sys.stdin.buffer)
            answer: tuple[str, object]
            try:
                answer = ("is", getattr(operations, what)(*arguments, **named))
            except OSError as error:
                answer = (what, errno.errorcode.get(error.errno or 0, str(error)))
            pickle.dump(answer, sys.stdout.buffer)
            sys.stdout.buffer.flush()
