"""The portable way: libfuse 2 through fusepy, on any kernel, and as any user by its setuid program.

Importing this module loads libfuse, so only the server's process does, in the thread where the loop
is to run. libfuse mounts by itself, and the mount dies with the process.

What fusepy gets wrong is mended here: it answers a failure without an errno with garbage, and one
it does not know with EINVAL; it can not carry UTIME_NOW and UTIME_OMIT; it wants paths in UTF-8 (as
latin-1 each byte is a character); and it copies each byte that is read once more than it must. Its
loop is libfuse's, and ours is in fusepy_loop.py.

What has nothing to do here is None, so that libfuse answers it in C: opening and closing, to begin
with. So nothing is fetched when a file is opened, which could not be killed; and the kernel
remembers all that it is told, as with the other transport. A mount that takes writes does without
the one and most of the other, for the reasons that are told there.
"""

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, TypeAlias

import fuse

from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.mount_probe import may_allow_other
from vfs.nodes import NOW, Attributes, Changes, Nodes
from vfs.service import PAGE_BYTES
from vfs.transports.failures import errno_of
from vfs.transports.fusepy_loop import Loop
from vfs.transports.fusepy_operations import ReadingOperations, WritingOperations

# All that libfuse 2 asks for at once.
MAX_READ_BYTES: Final = 128 * 1024
# Reads that wait for the store at once; the kernel's default is 12. When three quarters hang, it
# reads nothing ahead any more: cached files neither, and who waits can not be killed.
MAX_BACKGROUND: Final = 1024
# In seconds; longer than any mount.
FOREVER: Final = 1 << 31

# fusepy has no types.
Pointer: TypeAlias = Any
Structure: TypeAlias = Any
Option: TypeAlias = Any


class FusepyTransport:
    """Mounts, serves, and returns when the mount is gone.

    Args:
        nodes: What is served.
        at: An existing, empty directory.
        seen_at: Where the mount is when it is served, if it is moved.
        name: What stands in the mount table as the source.
        kind: What stands there as the type, behind `fuse.`.
        xattrs: Tell hash and state of files as extended attributes.
    """

    def __init__(
        self,
        nodes: Nodes,
        at: Path,
        name: str,
        kind: str,
        *,
        xattrs: bool,
        seen_at: Path | None = None,
    ) -> None:
        self._nodes = nodes
        self._at = at
        self._seen_at = seen_at or at
        self._xattrs = xattrs
        self._options = {
            "fsname": name,
            "subtype": kind,
            "allow_other": may_allow_other(),
            "default_permissions": True,
            "use_ino": True,
            # Otherwise writes come in pages.
            "big_writes": True,
            # Names change by the kernel's own doing alone.
            "entry_timeout": FOREVER,
            "negative_timeout": FOREVER,
            "max_read": MAX_READ_BYTES,
            "max_background": MAX_BACKGROUND,
            # A file of two names is two files to libfuse, and one that changes by the other.
            **(
                {"attr_timeout": 0}
                if nodes.writable
                else {"ro": True, "kernel_cache": True, "attr_timeout": FOREVER}
            ),
        }

    def forget_names(self, names: Sequence[tuple[int, bytes]]) -> None:
        """Do nothing: libfuse numbers its nodes by itself, and tells nobody.

        What comes to a mount in use has a directory of a name that nobody has asked for.
        """

    def forget_content(self, nodes: Iterable[int]) -> None:
        """Have all pages of files asked for again; never waits."""
        paths = [self._seen_at / self._nodes.path(node) for node in nodes]
        threading.Thread(target=_drop_pages, args=(paths,), name="forget", daemon=True).start()

    def _operations(self) -> ReadingOperations:
        writable = self._nodes.writable
        if writable is not None:
            return WritingOperations(writable)
        return ReadingOperations(self._nodes, xattrs=self._xattrs)

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount, and serve until the mount is gone.

        Args:
            on_ready: Called when the kernel's first request is answered.

        Raises:
            MountFailedError: libfuse could not mount; it has said why on stderr.
        """
        mounted = _Mounted(self._operations(), on_ready=on_ready)
        if not mounted.serve(self._at, self._options):
            raise MountFailedError(
                f"libfuse could not mount at {self._at}", hint="see what it wrote before this"
            )


class _Mounted(fuse.FUSE):  # type: ignore[misc]  # fusepy has no types
    """fusepy's callbacks, but for those that it gets wrong or that are called most.

    Their arguments are C's, as fusepy declares them.
    """

    def __init__(self, operations: ReadingOperations, *, on_ready: Callable[[], None]) -> None:
        # Not fusepy's own, which mounts, serves and ends. Its callbacks want these:
        self.operations = operations
        self.raw_fi = True
        self.encoding = "latin-1"
        self.use_ns = True
        self._served = operations
        self._on_ready = on_ready
        self._loop = Loop(operations.halt.cancel)

    def serve(self, at: Path, options: Mapping[str, Option]) -> bool:
        """Mount, and serve until the mount is gone; return whether it was mounted."""
        written = ",".join(self._normalize_fuse_options(**options))
        # `-f`: this process is to serve.
        arguments = [b"fuse", b"-f", b"-o", os.fsencode(written), os.fsencode(at)]
        return self._loop.run(arguments, self._callbacks())

    def _callbacks(self) -> Structure:
        callbacks = fuse.fuse_operations()
        for name, kind, *_ in callbacks._fields_:
            # Those of what is open are asked for by what they are without.
            wanted = getattr(self._served, _BY_PATH.get(name, name), None)
            if wanted is None:
                continue
            if hasattr(kind, "argtypes"):
                call = self._wrapper if name in _ANSWERED_AT_ONCE else self._call_that_may_wait
                wanted = kind(partial(call, getattr(self, name)))
            setattr(callbacks, name, wanted)
        return callbacks

    def _call_that_may_wait(self, function: Callable[..., int | None], *arguments: Pointer) -> int:
        with self._loop:
            return self._wrapper(function, *arguments)

    @staticmethod
    def _wrapper(function: Callable[..., int | None], *arguments: Pointer) -> int:
        """Call, and answer what libfuse takes: 0 or more, or an errno below 0."""
        try:
            return function(*arguments) or 0
        except BaseException as error:  # noqa: BLE001 - the errno boundary: nothing may pass
            return -errno_of(error)

    def init(self, _connection: int) -> None:
        self._on_ready()

    def getattr(self, path: bytes, buf: Pointer) -> None:
        served = self._served
        packed = _packed(served.nodes.attributes(served.node_at(path)))
        ctypes.memmove(buf, packed, _STAT_BYTES)

    def fgetattr(self, path: bytes, buf: Pointer, fip: Pointer) -> None:
        served = self._served
        packed = _packed(served.nodes.attributes(served.opened(path, fip)))
        ctypes.memmove(buf, packed, _STAT_BYTES)

    def read(self, path: bytes, buf: Pointer, size: int, offset: int, fip: Pointer) -> int:
        served = self._served
        node = served.opened(path, fip)
        # Where libfuse wants it, without a copy in between.
        buffer = _view_of(buf, size, _WRITABLE)
        count = served.nodes.read_now(node, offset, buffer)
        if count < 0:
            data = served.nodes.read(node, offset, size, served.halt)
            count = len(data)
            ctypes.memmove(buf, data, count)
        return count

    def write(self, path: bytes, buf: Pointer, size: int, offset: int, fip: Pointer) -> int:
        served = self._writing()
        return served.write_at(served.opened(path, fip), offset, _view_of(buf, size, _READABLE))

    def utimens(self, path: bytes, buf: Pointer) -> None:
        changes = Changes(atime_ns=NOW, mtime_ns=NOW)
        if buf:
            times = buf.contents
            changes = Changes(atime_ns=_time(times.actime), mtime_ns=_time(times.modtime))
        served = self._writing()
        served.change(served.node_at(path), changes)

    def _writing(self) -> WritingOperations:
        assert isinstance(self._served, WritingOperations)  # noqa: S101 - or it is not asked
        return self._served

    def readdir(
        self, path: bytes, buf: Pointer, filler: Pointer, _offset: int, fip: Pointer
    ) -> None:
        nodes = self._served.nodes
        status = fuse.c_stat()
        for name, node in self._names(self._served.opened(path, fip)):
            attributes = nodes.attributes(node)
            # All that libfuse takes of it.
            status.st_ino, status.st_mode = attributes.node, attributes.mode
            if filler(buf, name, status, 0):
                break

    def _names(self, directory: int) -> Iterator[tuple[bytes, int]]:
        nodes = self._served.nodes
        yield b".", directory
        yield b"..", nodes.parent(directory)
        for _, name, node in nodes.listing(directory):
            yield name, node


_STAT_BYTES: Final = ctypes.sizeof(fuse.c_stat)
# What is known of a file, by the names that struct stat's fields have in fusepy, times as two.
_FACTS: Final = (
    *("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blocks"),
    *("st_blksize", "st_atimespec", "", "st_mtimespec", "", "st_ctimespec", ""),
)


def _layout_of_stat() -> tuple[struct.Struct, Callable[[Sequence[int]], Sequence[int]]]:
    """Return what packs a struct stat of this machine, and what puts the facts in its order."""
    layout, order, end = "=", [], 0
    kinds = {field[0]: field[1] for field in fuse.c_stat._fields_}
    for name in sorted(filter(None, _FACTS), key=lambda name: getattr(fuse.c_stat, name).offset):
        place, fact = getattr(fuse.c_stat, name), _FACTS.index(name)
        layout += f"{place.offset - end}x"
        if kinds[name] is fuse.c_timespec:
            layout += {8: "ii", 16: "qq"}[place.size]
            order += [fact, fact + 1]
        else:
            layout += {2: "H", 4: "I", 8: "q"}[place.size]
            order.append(fact)
        end = place.offset + place.size
    return struct.Struct(f"{layout}{_STAT_BYTES - end}x"), itemgetter(*order)


_STAT, _in_order = _layout_of_stat()
_BY_PATH: Final = {"fgetattr": "getattr", "ftruncate": "truncate"}
# The others may wait, for the store, a disk or who else changes something.
_ANSWERED_AT_ONCE: Final = frozenset({"getattr", "fgetattr", "readdir", "readlink", "init"})
# Of C's memory, which nobody may keep. Source: Python's C API, PyMemoryView_FromMemory.
_view_of: Final = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
)(("PyMemoryView_FromMemory", ctypes.pythonapi))
_READABLE: Final = 0x100
_WRITABLE: Final = 0x200
# Source: utimensat(2).
_UTIME_NOW: Final = (1 << 30) - 1
_UTIME_OMIT: Final = (1 << 30) - 2


def _packed(attributes: Attributes) -> bytes:
    """Return attributes as a struct stat."""
    node, mode, nlink, uid, gid, rdev, size, blocks, atime_ns, mtime_ns, ctime_ns = attributes
    facts = (
        node, mode, nlink, uid, gid, rdev, size, blocks, PAGE_BYTES,
        *divmod(atime_ns, 1_000_000_000), *divmod(mtime_ns, 1_000_000_000),
        *divmod(ctime_ns, 1_000_000_000),
    )  # fmt: skip
    return _STAT.pack(*_in_order(facts))


def _drop_pages(paths: Sequence[Path]) -> None:
    """Have the kernel forget what was read of files, as any of their readers could."""
    for path in paths:
        with suppress(OSError):
            # Opening is answered by another thread, which needs no lock that this one holds.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _time(at: Structure) -> int | None:
    """Return a time to be set, in nanoseconds since the epoch; None to leave it."""
    if at.tv_nsec == _UTIME_OMIT:
        return None
    if at.tv_nsec == _UTIME_NOW:
        return NOW
    return int(at.tv_sec * 1_000_000_000 + at.tv_nsec)
