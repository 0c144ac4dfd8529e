"""The portable way: libfuse 2 through fusepy, on any kernel, and as any user by its setuid program.

Importing this module loads libfuse, so only the server's process does, in the thread where the loop
is to run. libfuse mounts by itself, and the mount dies with the process.

What fusepy gets wrong is mended here: it answers a failure without an errno with garbage, and one
it does not know with EINVAL; it can not carry UTIME_NOW and UTIME_OMIT; it wants paths in UTF-8 (as
latin-1 each byte is a character); and it copies each byte that is read once more than it must.

What has nothing to do here is None, so that libfuse answers it in C: opening and closing, to begin
with. So nothing is fetched when a file is opened, which could not be killed; and the kernel
remembers all that it is told, as with the other transport. A mount that takes writes does without
the one and most of the other, for the reasons that are told there.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

import fuse

from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.mount_probe import may_allow_other
from vfs.nodes import NOW, Attributes, Changes, Nodes
from vfs.transports.failures import errno_of
from vfs.transports.fusepy_operations import ReadingOperations, WritingOperations

# All that libfuse 2 asks for at once.
MAX_READ_BYTES: Final = 128 * 1024
# Reads that wait for the store at once; the kernel's default is 12.
MAX_BACKGROUND: Final = 64
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
        operations = self._operations()
        try:
            _Mounted(
                operations,
                # Options and mount point travel as latin-1, too.
                os.fsencode(self._at).decode("latin-1"),
                on_ready=on_ready,
                encoding="latin-1",
                foreground=True,
                **self._options,
            )
        except RuntimeError as error:
            raise MountFailedError(
                f"libfuse could not mount at {self._at}", hint="see what it wrote before this"
            ) from error
        finally:
            operations.halt.cancel()


class _Mounted(fuse.FUSE):  # type: ignore[misc]  # fusepy has no types
    """fusepy's callbacks, but for those that it gets wrong or that are called most.

    Their arguments are C's, as fusepy declares them. Making one mounts, serves and ends.
    """

    def __init__(
        self,
        operations: ReadingOperations,
        mountpoint: str,
        *,
        on_ready: Callable[[], None],
        **options: Option,
    ) -> None:
        self._on_ready = on_ready
        self._served = operations
        super().__init__(operations, mountpoint, raw_fi=True, **options)

    @staticmethod
    def _wrapper(function: Callable[..., int | None], *arguments: Pointer) -> int:
        """Call, and answer what libfuse takes: 0 or more, or an errno below 0."""
        try:
            return function(*arguments) or 0
        except BaseException as error:  # noqa: BLE001 - the errno boundary: nothing may pass
            return -errno_of(error)

    def init(self, _connection: int) -> None:
        self._on_ready()

    def fgetattr(self, path: bytes, buf: Pointer, fip: Pointer) -> None:
        served = self._served
        ctypes.memset(buf, 0, _STAT_BYTES)
        _fill(buf.contents, served.nodes.attributes(served.opened(path, fip)))

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
# Of C's memory, which nobody may keep. Source: Python's C API, PyMemoryView_FromMemory.
_view_of: Final = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
)(("PyMemoryView_FromMemory", ctypes.pythonapi))
_READABLE: Final = 0x100
_WRITABLE: Final = 0x200
# Source: utimensat(2).
_UTIME_NOW: Final = (1 << 30) - 1
_UTIME_OMIT: Final = (1 << 30) - 2


def _fill(status: Structure, attributes: Attributes) -> None:
    """Write attributes to a struct stat that is all zeros."""
    status.st_ino = attributes.node
    status.st_mode = attributes.mode
    status.st_nlink = attributes.nlink
    status.st_uid = attributes.uid
    status.st_gid = attributes.gid
    status.st_rdev = attributes.rdev
    status.st_size = attributes.size
    status.st_blocks = attributes.blocks
    status.st_blksize = 4096
    for at, time_ns in (
        (status.st_atimespec, attributes.atime_ns),
        (status.st_mtimespec, attributes.mtime_ns),
        (status.st_ctimespec, attributes.ctime_ns),
    ):
        at.tv_sec, at.tv_nsec = divmod(time_ns, 1_000_000_000)


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
