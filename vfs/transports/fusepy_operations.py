"""What libfuse asks by path, put to the nodes: the part of a mount by fusepy that it gets right.

Paths and names come as latin-1, each byte a character, so that none is refused or changed. They are
libfuse's own, which holds them while they are asked about.

A file that is removed while somebody has it open is not removed by libfuse, but renamed to a name
that it thinks nobody knows (`.fuse_hidden...`), and removed with the last who closes it. Such a
name would be in the way of whoever removes the directory, and stay among the outputs when the
server is killed. So here it is an alias, in no directory and on no disk: what libfuse renames
to it is removed at once, and held until libfuse removes it.
"""

import errno
import re
import stat
from typing import Any, Final, TypeAlias

import fuse

from agent_plugin.content.store import Cancellation
from vfs.nodes import Attributes, Caller, Changes, Nodes, WritableNodes, listed_for
from vfs.tree import ROOT

NAME_BYTES: Final = 255
# Paths of directories that are remembered.
DIRECTORIES: Final = 10_000

# Of libfuse 2.9, lib/fuse.c, hidden_name().
_HIDDEN: Final = re.compile(rb"\.fuse_hidden[0-9a-f]{16}")

# struct fuse_file_info; fusepy has no types.
FileInfo: TypeAlias = Any


class ReadingOperations(fuse.Operations):  # type: ignore[misc]  # fusepy has no types
    """The operations of a mount that takes no writes.

    Args:
        nodes: What is served.
        xattrs: Tell of extended attributes.

    Attributes:
        halt: Cancelled when the mount is gone.
    """

    use_ns = True

    def __init__(self, nodes: Nodes, *, xattrs: bool) -> None:
        self.nodes = nodes
        self.halt = Cancellation()
        # Directories by path, so that who goes deep does not pay for each level each time.
        self._directories: dict[bytes, int] = {b"": ROOT}
        for name in () if xattrs else ("getxattr",):
            # libfuse says once that there are none, and is not asked again.
            setattr(self, name, None)

    def node_at(self, path: bytes) -> int:
        """Return the node of a path, which begins with a slash.

        Raises:
            OSError: ENOENT, ENAMETOOLONG.
        """
        above, _, name = path.rpartition(b"/")
        unknown = []
        while (directory := self._directories.get(above)) is None:
            unknown.append(above)
            above = above.rpartition(b"/")[0]
        for place in reversed(unknown):
            directory = self._below(directory, place.rpartition(b"/")[2])
            self._directories[place] = directory
        if len(self._directories) > DIRECTORIES:
            self.forget_paths()
        return self._below(directory, name) if name else directory

    def _below(self, directory: int, name: bytes) -> int:
        found = self.lookup(directory, name)
        if found is None:
            too_long = len(name) > NAME_BYTES
            raise OSError(errno.ENAMETOOLONG if too_long else errno.ENOENT, "not there")
        return found

    def forget_paths(self) -> None:
        """Look all directories up again: some mean something else now.

        Nobody asks about the old ones meanwhile: libfuse lets go of no path that is asked about.
        """
        self._directories = {b"": ROOT}

    def opened(self, path: bytes, _file: FileInfo) -> int:
        """Return the node of what is open, which is known by its path alone.

        Raises:
            OSError: As `node_at`.
        """
        return self.node_at(path)

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, None if there is none."""
        return self.nodes.lookup(directory, name)

    def readlink(self, path: str) -> str:
        """Return where a symbolic link leads."""
        return self.nodes.readlink(self.node_at(path.encode("latin-1"))).decode("latin-1")

    def statfs(self, _path: str) -> dict[str, int]:
        """Return what statvfs(3) tells."""
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
        """Return an extended attribute, or refuse with ENODATA."""
        if self.nodes.writable is None and not name.startswith("user."):
            # Not ENODATA: who lists files then asks for labels and ACLs once for the file system.
            raise OSError(errno.EOPNOTSUPP, "only users' attributes are there")
        node = self.node_at(path.encode("latin-1"))
        value = self.nodes.getxattr(node, name.encode("latin-1"))
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute")
        return value


for _name in (
    # libfuse answers these by itself, without a word of Python.
    "access", "open", "release", "opendir", "releasedir", "flush", "fsync", "fsyncdir", "destroy",
    "ioctl",
    # Nothing is listed, or every tool that copies attributes would copy ours.
    "listxattr",
    # The kernel does not ask for these, since the mount is read-only.
    "chmod", "chown", "create", "link", "mkdir", "mknod", "removexattr", "rename", "rmdir",
    "setxattr", "symlink", "truncate", "unlink", "utimens", "write",
):  # fmt: skip
    setattr(ReadingOperations, _name, None)


class WritingOperations(ReadingOperations):
    """The operations of a mount that takes writes.

    What is open has its node for a handle, so that it can be read and written when neither it nor
    its directory has a name any more.

    Two names of one file are two files to libfuse, and to the kernel. Such a file is read and
    written past the kernel's pages, or what is written by one name would not be seen by the other.

    Args:
        nodes: What is served, and changed.
    """

    # Paths of what is open and has no name are null; times may be left as they are.
    flag_nullpath_ok = 1
    flag_utime_omit_ok = 1

    def __init__(self, nodes: WritableNodes) -> None:
        super().__init__(nodes, xattrs=True)
        self._writable = nodes
        self._hidden: dict[tuple[int, bytes], int] = {}
        # What has, or had, several names: the kernel may have old pages of it.
        self._linked: set[int] = set()

    def opened(self, path: bytes | None, file: FileInfo) -> int:
        """Return the node of what is open, or of the path if nothing is.

        Raises:
            OSError: As `node_at`.
        """
        if file:
            return int(file.contents.fh)
        if path is None:
            raise OSError(errno.ESTALE, "it has no name any more")
        return self.node_at(path)

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, None if there is none."""
        found = self.nodes.lookup(directory, name)
        return self._hidden.get((directory, name)) if found is None else found

    def change(self, node: int, changes: Changes) -> Attributes:
        """Change attributes; content is fetched if it takes that."""
        if changes.size:
            self.prepare(node)
        return self._writable.setattr(node, changes)

    def prepare(self, node: int) -> None:
        """Fetch what has to be there before part of it is changed."""
        if not self._writable.can_write(node):
            self._writable.prepare(node, self.halt)

    def write_at(self, node: int, offset: int, data: memoryview) -> int:
        """Write; return the number of bytes."""
        self.prepare(node)
        return self._writable.write(node, offset, data)

    # ------------------------------------------------------------------ what is open

    def open(self, path: str, file: FileInfo) -> int:
        """Open, without reading anything: who opens can not be killed."""
        node = self._node(path)
        self._hold(node, file)
        if self.nodes.attributes(node).nlink > 1:
            self._linked.add(node)
        if node in self._linked:
            file.direct_io = 1
        else:
            file.keep_cache = 1
        return 0

    def create(self, path: str, mode: int, file: FileInfo) -> int:
        """Make a file and open it."""
        self._hold(self._make(path, stat.S_IFREG | stat.S_IMODE(mode)), file)
        file.keep_cache = 1
        return 0

    def release(self, _path: str | None, file: FileInfo) -> int:
        """Close what was opened or created."""
        self.nodes.forget(file.fh)
        return 0

    def opendir(self, path: str) -> int:
        """Open a directory."""
        node = self._node(path)
        self.nodes.hold(node)
        return node

    def releasedir(self, _path: str | None, node: int) -> int:
        """Close a directory."""
        self.nodes.forget(node)
        return 0

    def fsync(self, _path: str | None, data_only: int, file: FileInfo) -> int:
        """Bring a file to the disk."""
        self._writable.fsync(file.fh, data_only=bool(data_only))
        return 0

    def fsyncdir(self, _path: str | None, data_only: int, node: int) -> int:
        """Bring a directory to the disk."""
        self._writable.fsync(node, data_only=bool(data_only))
        return 0

    # ------------------------------------------------------------------ names

    def mknod(self, path: str, mode: int, device: int) -> int:
        """Make a file that is no directory and no link."""
        self._make(path, mode, device)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        """Make a directory."""
        self._writable.mkdir(*self._place(path), stat.S_IMODE(mode), _caller())
        return 0

    def symlink(self, path: str, target: str) -> int:
        """Make a symbolic link."""
        self._writable.symlink(*self._place(path), target.encode("latin-1"), _caller())
        return 0

    def link(self, path: str, source: str) -> int:
        """Give a file one more name."""
        node = self._node(source)
        self._linked.add(node)
        self._writable.link(node, *self._place(path))
        return 0

    def unlink(self, path: str) -> int:
        """Remove a name, or let go of what was removed while it was open."""
        place = self._place(path)
        hidden = self._hidden.pop(place, None)
        if hidden is None:
            self._writable.unlink(*place)
        else:
            self.nodes.forget(hidden)
        return 0

    def rmdir(self, path: str) -> int:
        """Remove an empty directory."""
        self._writable.rmdir(*self._place(path))
        self.forget_paths()
        return 0

    def rename(self, old: str, new: str) -> int:
        """Rename, or remove what is open."""
        source, target = self._place(old), self._place(new)
        if _HIDDEN.fullmatch(target[1]) and source[0] == target[0]:
            self._hide(source, target)
        else:
            self._writable.rename(*source, *target)
            self.forget_paths()
        return 0

    def _hide(self, source: tuple[int, bytes], alias: tuple[int, bytes]) -> None:
        node = self.lookup(*source)
        if node is None:
            raise OSError(errno.ENOENT, "not there")
        self.nodes.hold(node)
        try:
            self._writable.unlink(*source)
        except BaseException:
            self.nodes.forget(node)
            raise
        self._hidden[alias] = node

    # ------------------------------------------------------------------ attributes

    def chmod(self, path: str, mode: int) -> int:
        """Change the permissions."""
        self.change(self._node(path), Changes(mode=stat.S_IMODE(mode)))
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        """Change the owner."""
        # -1 leaves it as it is.
        owner = Changes(uid=None if uid < 0 else uid, gid=None if gid < 0 else gid)
        self.change(self._node(path), owner)
        return 0

    def truncate(self, path: str | None, length: int, file: FileInfo = None) -> int:
        """Change the size."""
        node = int(file.fh) if file else self._node(path or "")
        self.change(node, Changes(size=length))
        return 0

    def listxattr(self, path: str) -> list[str]:
        """Return the names of the extended attributes."""
        node = self.node_at(path.encode("latin-1"))
        names = listed_for(_caller().uid, self.nodes.listxattr(node))
        return [name.decode("latin-1") for name in names]

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> int:
        """Set an extended attribute."""
        self._writable.setxattr(self._node(path), name.encode("latin-1"), value, flags)
        return 0

    def removexattr(self, path: str, name: str) -> int:
        """Take away an extended attribute."""
        self._writable.removexattr(self._node(path), name.encode("latin-1"))
        return 0

    # `_Mounted` answers these with C's arguments.

    def utimens(self, path: str, times: object) -> int:
        """Never: only that there is one counts."""
        raise NotImplementedError

    def write(self, path: str, data: bytes, offset: int, file: FileInfo) -> int:
        """Never: only that there is one counts."""
        raise NotImplementedError

    # ------------------------------------------------------------------ their parts

    def _node(self, path: str) -> int:
        return self.node_at(path.encode("latin-1"))

    def _place(self, path: str) -> tuple[int, bytes]:
        above, _, name = path.encode("latin-1").rpartition(b"/")
        if len(name) > NAME_BYTES:
            raise OSError(errno.ENAMETOOLONG, "the name is too long")
        return self.node_at(above), name

    def _make(self, path: str, mode: int, device: int = 0) -> int:
        return self._writable.mknod(*self._place(path), mode, _caller(), rdev=device)

    def _hold(self, node: int, file: FileInfo) -> None:
        self.nodes.hold(node)
        file.fh = node


def _caller() -> Caller:
    """Return who asks; only where libfuse has called."""
    uid, gid, _ = fuse.fuse_get_context()
    return Caller(uid, gid)
