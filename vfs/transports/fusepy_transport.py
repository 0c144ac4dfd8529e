"""The portable way: libfuse 2 through fusepy, on any kernel, and as any user by its setuid program.

Importing this module loads libfuse, so only the server's process does, in the thread where the loop
is to run. libfuse mounts by itself, and the mount dies with the process.

What fusepy gets wrong is mended here: it answers a failure without an errno with garbage, and one
it does not know with EINVAL; it can not carry UTIME_NOW and UTIME_OMIT; it wants paths in UTF-8 (as
latin-1 each byte is a character); and it copies each byte that is read once more than it must.

What has nothing to do here is None, so that libfuse answers it in C: opening and closing, to begin
with. So nothing is fetched when a file is opened, which could not be killed; and the kernel
remembers all that it is told, as with the other transport.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import fuse

from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.mount_probe import may_allow_other
from agent_plugin.content.store import Cancellation
from vfs.nodes import Attributes, Nodes
from vfs.transports.failures import errno_of
from vfs.tree import ROOT

# All that libfuse 2 asks for at once.
MAX_READ_BYTES: Final = 128 * 1024
NAME_BYTES: Final = 255
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
        name: What stands in the mount table as the source.
        kind: What stands there as the type, behind `fuse.`.
        xattrs: Tell hash and state of files as extended attributes.
    """

    def __init__(self, nodes: Nodes, at: Path, name: str, kind: str, *, xattrs: bool) -> None:
        self._nodes = nodes
        self._at = at
        self._xattrs = xattrs
        self._options = {
            "fsname": name,
            "subtype": kind,
            "ro": True,
            "allow_other": may_allow_other(),
            "default_permissions": True,
            "use_ino": True,
            "kernel_cache": True,
            "big_writes": True,
            "entry_timeout": FOREVER,
            "negative_timeout": FOREVER,
            "attr_timeout": FOREVER,
            "max_read": MAX_READ_BYTES,
            "max_background": MAX_BACKGROUND,
        }

    def forget_names(self, names: Sequence[tuple[int, bytes]]) -> None:
        """Do nothing: libfuse numbers its nodes by itself, and tells nobody.

        What comes to a mount in use has a directory of a name that nobody has asked for.
        """

    def forget_content(self, nodes: Iterable[int]) -> None:
        """Do nothing, as for names."""

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount, and serve until the mount is gone.

        Args:
            on_ready: Called when the kernel's first request is answered.

        Raises:
            MountFailedError: libfuse could not mount; it has said why on stderr.
        """
        operations = _Operations(self._nodes, xattrs=self._xattrs)
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


class _Operations(fuse.Operations):  # type: ignore[misc]  # fusepy has no types
    """What is answered, by path; see `_Mounted` for what is not told by fusepy's own protocol."""

    use_ns = True
    # libfuse answers these.
    access = open = release = opendir = releasedir = flush = fsync = fsyncdir = destroy = None
    # The kernel does not ask for these, since the mount is read-only.
    chmod = chown = create = link = mkdir = mknod = removexattr = rename = rmdir = None
    setxattr = symlink = truncate = unlink = utimens = write = ioctl = None

    def __init__(self, nodes: Nodes, *, xattrs: bool) -> None:
        self.nodes = nodes
        self.halt = Cancellation()
        for name in () if xattrs else ("getxattr", "listxattr"):
            # libfuse says once that there are none, and is not asked again.
            setattr(self, name, None)

    def node_at(self, path: bytes) -> int:
        """Return the node of a path, which begins with a slash.

        Raises:
            OSError: ENOENT, ENAMETOOLONG.
        """
        node = ROOT
        for name in path.split(b"/"):
            if name:
                found = self.nodes.lookup(node, name)
                if found is None:
                    too_long = len(name) > NAME_BYTES
                    raise OSError(errno.ENAMETOOLONG if too_long else errno.ENOENT, "not there")
                node = found
        return node

    def readlink(self, path: str) -> str:
        return self.nodes.readlink(self.node_at(path.encode("latin-1"))).decode("latin-1")

    def statfs(self, _path: str) -> dict[str, int]:
        space = self.nodes.statvfs()
        return {
            "f_bsize": space.block_bytes,
            "f_frsize": space.block_bytes,
            "f_blocks": space.blocks,
            "f_bfree": space.free,
            "f_bavail": space.available,
            "f_files": space.files,
            "f_ffree": space.files_free,
            "f_favail": space.files_free,
            "f_namemax": NAME_BYTES,
        }

    def getxattr(self, path: str, name: str) -> bytes:
        node = self.node_at(path.encode("latin-1"))
        value = self.nodes.getxattr(node, name.encode("latin-1"))
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute")
        return value

    def listxattr(self, path: str) -> list[str]:
        node = self.node_at(path.encode("latin-1"))
        return [name.decode("latin-1") for name in self.nodes.listxattr(node)]


class _Mounted(fuse.FUSE):  # type: ignore[misc]  # fusepy has no types
    """fusepy's callbacks, but for those that it gets wrong or that are called most.

    Their arguments are C's, as fusepy declares them. Making one mounts, serves and ends.
    """

    def __init__(
        self,
        operations: _Operations,
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

    def fgetattr(self, path: bytes, buf: Pointer, _fip: Pointer) -> None:
        served = self._served
        ctypes.memset(buf, 0, _STAT_BYTES)
        _fill(buf.contents, served.nodes.attributes(served.node_at(path)))

    def read(self, path: bytes, buf: Pointer, size: int, offset: int, _fip: Pointer) -> int:
        served = self._served
        node = served.node_at(path)
        # Where libfuse wants it, without a copy in between.
        buffer = _view_of(buf, size, _WRITABLE)
        count = served.nodes.read_now(node, offset, buffer)
        if count < 0:
            data = served.nodes.read(node, offset, size, served.halt)
            count = len(data)
            ctypes.memmove(buf, data, count)
        return count

    def readdir(
        self, path: bytes, buf: Pointer, filler: Pointer, _offset: int, _fip: Pointer
    ) -> None:
        nodes = self._served.nodes
        status = fuse.c_stat()
        for name, node in self._names(path):
            attributes = nodes.attributes(node)
            # All that libfuse takes of it.
            status.st_ino, status.st_mode = attributes.node, attributes.mode
            if filler(buf, name, status, 0):
                break

    def _names(self, path: bytes) -> Iterator[tuple[bytes, int]]:
        nodes = self._served.nodes
        directory = self._served.node_at(path)
        yield b".", directory
        yield b"..", nodes.parent(directory)
        for _, name, node in nodes.listing(directory):
            yield name, node


_STAT_BYTES: Final = ctypes.sizeof(fuse.c_stat)
# Of C's memory, which nobody may keep. Source: Python's C API, PyMemoryView_FromMemory.
_view_of: Final = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
)(("PyMemoryView_FromMemory", ctypes.pythonapi))
_WRITABLE: Final = 0x200


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
