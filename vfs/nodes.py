"""What a transport asks of a mount: an inode table with system calls, without a protocol's types.

A node is a number that means one file or directory for as long as anybody holds it, whatever
becomes of its names; ROOT is the mount's own directory. There are no open files: whatever is read
or written names the node, so a server has nothing that its successor would need.

An operating system's refusal leaves as OSError with its errno. A byte that can not be had leaves as
PropmasterError, and stands in the error ledger.

Source of names and semantics: the POSIX functions of the same names, and inode(7).

Concurrency: any thread may call anything. Only what takes a `Cancellation` waits for the store.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from agent_plugin.content.store import Cancellation


class Attributes(NamedTuple):
    """What stat(2) tells of a node; times in nanoseconds since the epoch, perhaps negative.

    Attributes:
        node: Its number.
        mode: Type and permissions.
        size: In bytes.
        blocks: Of BLOCK_BYTES.
    """

    node: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


# A name in a directory: its position from 1 on, the name, and its node. A name keeps its position
# for as long as it is there, whatever becomes of others, so that a reader can go on after it.
Listed = tuple[int, bytes, int]


class Space(NamedTuple):
    """What statvfs(3) tells; in blocks of `block_bytes`."""

    block_bytes: int
    blocks: int
    free: int
    available: int
    files: int
    files_free: int


class Nodes(Protocol):
    """Names, attributes and bytes."""

    @property
    def writable(self) -> "WritableNodes | None":
        """The same nodes, with what changes them; None when nothing may."""

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, None if there is none or it is no directory."""

    def parent(self, directory: int) -> int:
        """Return the directory above a directory; that of the root is the root."""

    def path(self, node: int) -> str:
        """Return one of the node's paths below the root, for messages."""

    def attributes(self, node: int) -> Attributes:
        """Return what is known of a node.

        Raises:
            OSError: ESTALE: there is no such node.
        """

    def listing(self, directory: int) -> Sequence[Listed]:
        """Return a directory's names by ascending position, without `.` and `..`.

        Raises:
            OSError: ENOTDIR: it is none.
        """

    def readlink(self, node: int) -> bytes:
        """Return where a symbolic link leads.

        Raises:
            OSError: EINVAL: it is none.
        """

    def read_now(self, node: int, offset: int, buffer: memoryview) -> int:
        """Read into a buffer what can be read without waiting.

        Returns:
            The number of bytes, which is that of the buffer but at the file's end; -1 when
            `read` has to be called, which may take long.
        """

    def read(self, node: int, offset: int, length: int, cancellation: Cancellation) -> bytes:
        """Return part of a file, fetched if need be; shorter only at the file's end.

        Raises:
            CancelledError: The reader is gone.
            PropmasterError: It can not be had; that is in the error ledger, with the path.
        """

    def getxattr(self, node: int, name: bytes) -> bytes | None:
        """Return an extended attribute, None when there is none of that name."""

    def listxattr(self, node: int) -> list[bytes]:
        """Return the names of the extended attributes that are to be copied with the file."""

    def statvfs(self) -> Space:
        """Return how much there is, and how much more could be."""

    def hold(self, node: int, count: int = 1) -> None:
        """Keep a node, though its last name may go: it was told to a kernel, or opened."""

    def forget(self, node: int, count: int = 1) -> None:
        """Give back what was held; a node without names goes with the last."""


class Notifier(Protocol):
    """How a transport has the kernel forget what it was told; never waits."""

    def forget_names(self, names: Sequence[tuple[int, bytes]]) -> None:
        """Have names, each with its directory's node, looked up again."""

    def forget_content(self, nodes: Iterable[int]) -> None:
        """Have all that was read of files read again."""


class Caller(NamedTuple):
    """Who makes a file: it will be theirs."""

    uid: int
    gid: int


def listed_for(uid: int, names: list[bytes]) -> list[bytes]:
    """Return the names of extended attributes that a user is shown: `trusted.` ones are root's.

    As on a disk; of who asks for one of them, the kernel sees to it itself.
    """
    return [name for name in names if not (uid and name.startswith(b"trusted."))]


class Changes(NamedTuple):
    """New attributes; None leaves one as it is.

    Attributes:
        mode: Permissions; the type of the file stays.
        size: In bytes.
        atime_ns, mtime_ns: In nanoseconds since the epoch; NOW is the moment of the change.
        kills_privileges: Set-user-ID and set-group-ID go, as when others write.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    kills_privileges: bool = False


# No time of any file.
NOW: Final = -(1 << 63)
# Source: linux/fs.h.
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2


class WritableNodes(Nodes, Protocol):
    """What can be changed, too.

    `again` says that the request was sent before, and that a server which was killed may have
    carried it out: then to find it done is to have done it.

    All raise OSError as the system call of that name does, EDQUOT and ENOSPC among others; what
    failed has changed nothing that can be seen.
    """

    def mknod(
        self,
        directory: int,
        name: bytes,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        again: bool = False,
    ) -> int:
        """Make a file that is no directory and no link, regular or special; return its node."""

    def mkdir(
        self, directory: int, name: bytes, mode: int, caller: Caller, *, again: bool = False
    ) -> int:
        """Make a directory; return its node."""

    def symlink(
        self, directory: int, name: bytes, target: bytes, caller: Caller, *, again: bool = False
    ) -> int:
        """Make a symbolic link; return its node."""

    def link(self, node: int, directory: int, name: bytes, *, again: bool = False) -> None:
        """Give a file one more name."""

    def unlink(self, directory: int, name: bytes, *, again: bool = False) -> None:
        """Take away a name that is no directory's."""

    def rmdir(self, directory: int, name: bytes, *, again: bool = False) -> None:
        """Take away an empty directory."""

    def rename(
        self,
        directory: int,
        name: bytes,
        to_directory: int,
        to_name: bytes,
        *,
        flags: int = 0,
        again: bool = False,
    ) -> None:
        """Rename; `flags` are 0, RENAME_NOREPLACE or RENAME_EXCHANGE."""

    def can_write(self, node: int) -> bool:
        """Whether the content can be changed at once; otherwise it has to be `prepare`d."""

    def prepare(self, node: int, cancellation: Cancellation) -> None:
        """Fetch an input's content, so that part of it can be changed; may take long.

        Raises:
            CancelledError: The writer is gone.
            PropmasterError: It can not be had; that is in the error ledger. Nothing has changed.
            OSError: It can not be kept. Nothing has changed.
        """

    def write(
        self,
        node: int,
        offset: int,
        data: bytes | memoryview,
        *,
        kills_privileges: bool = False,
    ) -> int:
        """Write all of `data` to a file that `can_write`; return the number of bytes."""

    def setattr(self, node: int, changes: Changes) -> Attributes:
        """Change attributes; return all. A size above 0 needs a file that `can_write`."""

    def fallocate(self, node: int, mode: int, offset: int, length: int) -> None:
        """Reserve space or make a hole in a file that `can_write`; `mode` as the system call's."""

    def lseek(self, node: int, offset: int, whence: int) -> int:
        """Return where data (SEEK_DATA) or a hole (SEEK_HOLE) is next."""

    def fsync(self, node: int, *, data_only: bool) -> None:
        """Bring to the disk what was written."""

    def setxattr(self, node: int, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute; `flags` are 0, XATTR_CREATE or XATTR_REPLACE."""

    def removexattr(self, node: int, name: bytes) -> None:
        """Take away an extended attribute."""
