"""The nodes of a mount that takes no writes: the tree's names, and content as the reader has it.

Everything but `read` answers at once, from memory or from an open file.

Concurrency: any thread may call anything.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import count
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import CancelledError, LocalReadError, PropmasterError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.mount_spec import path_below_layer
from agent_plugin.content.store import Cancellation
from vfs.error_ledger import ErrorLedger
from vfs.nodes import Attributes, Listed, Notifier, Space, WritableNodes
from vfs.open_blob import OpenBlob
from vfs.reader import BlobReader
from vfs.statistics import Statistics
from vfs.tree import ROOT, Names

XATTR_HASH: Final = b"user.propmaster.hash"
XATTR_STATE: Final = b"user.propmaster.state"
BLOCK_BYTES: Final = 512
PAGE_BYTES: Final = 4096
# A reader's read-ahead that failed is asked for once more, page by page, before the reader is told;
# that comes at once. Trying anew would make readers wait twice as long as the store is given.
SECOND_ASK_SECONDS: Final = 0.2

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class Ownership:
    """To whom files seem to belong, and what may be done with them."""

    uid: int
    gid: int
    file_mode: int = 0o644
    directory_mode: int = 0o755


@dataclass(frozen=True, slots=True, eq=False)
class Refusal:
    """A read that was refused, until when it may be asked for once more, and by which error."""

    until: float
    offset: int
    length: int
    error: PropmasterError

    def is_asked_again(self, offset: int, length: int) -> bool:
        """Whether a read is the reader's own after its read-ahead: by pages, not all at once.

        Several requests that were ahead of one reader are refused, and only one is asked for again:
        the others are not to be told to whoever reads next.
        """
        is_part = length < self.length or self.length <= PAGE_BYTES
        return is_part and self.offset <= offset < self.offset + self.length


class NobodyToNotify:
    """For who serves no kernel, or none that can be told anything."""

    def forget_names(self, names: Sequence[tuple[int, bytes]]) -> None:
        """Do nothing."""

    def forget_content(self, nodes: Iterable[int]) -> None:
        """Do nothing."""


class NodeService:
    """A tree and its content.

    Attributes:
        notifier: Set by a transport that can tell the kernel something.

    Args:
        tree: The names: a manifest's, or those of all blobs by their hash.
        reader: The bytes.
        errors: Where failed reads are kept.
        statistics: What is counted.
        owner: Whose the files are.
        by_hash: Whether the tree's digests are hashes of content, and so worth telling.
        object_of: Says of which object a digest is the name, by its URL and version, both empty if
            that is not known; None where it is a hash of content.
    """

    def __init__(
        self,
        tree: Names,
        reader: BlobReader,
        errors: ErrorLedger,
        statistics: Statistics,
        owner: Ownership,
        *,
        by_hash: bool = True,
        object_of: Callable[[Digest], tuple[str, str] | None] = lambda _digest: None,
    ) -> None:
        self.tree = tree
        self.owner = owner
        self._reader = reader
        self._errors = errors
        self._statistics = statistics
        self._by_hash = by_hash
        self._object_of = object_of
        self._uid, self._gid = owner.uid, owner.gid
        self._file_mode = stat.S_IFREG | owner.file_mode
        self.notifier: Notifier = NobodyToNotify()
        self._directory_mode = stat.S_IFDIR | owner.directory_mode
        self._refusals_lock = threading.Lock()
        self._refusals: dict[int, list[Refusal]] = {}
        reader.on_corrupt = self._tell_corrupt

    @property
    def writable(self) -> WritableNodes | None:
        """None: nothing may be changed."""
        return None

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, None if there is none."""
        return self.tree.lookup(directory, name)

    def parent(self, directory: int) -> int:
        """Return the directory above; that of the root is the root."""
        return self.tree.parent(directory)

    def attributes(self, node: int) -> Attributes:
        """Return what is known of a node.

        Raises:
            OSError: ESTALE: there is no such node.
        """
        tree = self.tree
        if not tree.exists(node):
            raise OSError(errno.ESTALE, "no such node")
        size, mtime_ns = tree.size(node), tree.mtime_ns(node)
        mode, nlink = (self._directory_mode, 2) if tree.is_directory(node) else (self._file_mode, 1)
        blocks = -(-size // BLOCK_BYTES)
        uid, gid = self._uid, self._gid
        return Attributes(
            node, mode, nlink, uid, gid, 0, size, blocks, mtime_ns, mtime_ns, mtime_ns
        )

    def listing(self, directory: int) -> Sequence[Listed]:
        """Return a directory's names, in the order they were added.

        Raises:
            OSError: ENOTDIR: it is none.
        """
        if not self.tree.is_directory(directory):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        names = self.tree.names(directory)
        return list(zip(count(1), names.keys(), names.values(), strict=False))

    def readlink(self, node: int) -> bytes:
        """Refuse: a manifest has no links.

        Raises:
            OSError: EINVAL.
        """
        raise OSError(errno.EINVAL, f"node {node} is no symbolic link")

    def statvfs(self) -> Space:
        """Return the size of all files, none of it free."""
        blocks = -(-self.tree.bytes // PAGE_BYTES)
        return Space(PAGE_BYTES, blocks, 0, 0, len(self.tree), 0)

    def hold(self, node: int, count: int = 1) -> None:
        """Nodes stay."""

    def forget(self, node: int, count: int = 1) -> None:
        """Nodes stay."""

    def path(self, node: int) -> str:
        """Return the path of a node below the root, for messages."""
        if not self.tree.is_directory(node):
            return self.tree.entry(node).path
        names: list[str] = []
        while node != ROOT:
            above = self.tree.parent(node)
            names += [
                os.fsdecode(name) for name, found in self.tree.names(above).items() if found == node
            ]
            node = above
        return "/".join(reversed(names))

    def read_now(self, node: int, offset: int, buffer: memoryview) -> int:
        """Read into a buffer what can be read without waiting.

        Returns:
            The number of bytes, which is that of the buffer but at the file's end; -1 when
            `read` has to be called, which may take long.
        """
        entry = self.tree.entry(node)
        length = min(len(buffer), entry.size - offset)
        if length <= 0:
            return 0
        try:
            count = self._reader.read_now(entry.digest, offset, buffer[:length])
        except OSError:
            # `read` finds out what is wrong, and tells.
            return -1
        return count if count == length else -1

    def read(self, node: int, offset: int, length: int, cancellation: Cancellation) -> bytes:
        """Return part of a file, fetched if need be; shorter only at the file's end.

        Raises:
            CancelledError: The reader is gone.
            PropmasterError: It can not be had; that is in the error ledger, with the path.
        """
        entry = self.tree.entry(node)
        length = min(length, entry.size - offset)
        if length <= 0:
            return b""
        self._statistics.count(reads_waited=1)
        refused = self._refused_just_now(node, offset, length)
        try:
            with self._telling(entry):
                if refused is not None:
                    raise refused
                data = self._reader.read(entry.digest, offset, length, cancellation)
                if len(data) != length:
                    raise LocalReadError(f"{entry.digest}: {len(data)} bytes at {offset}")
        except CancelledError:
            self._statistics.count(reads_interrupted=1)
            raise
        except PropmasterError as error:
            if refused is None:
                self._expect_second_ask(node, offset, length, error)
            raise
        return data

    @contextmanager
    def _telling(self, entry: FileEntry) -> Iterator[None]:
        """Have whatever a file can not be had for in the error ledger.

        Raises:
            CancelledError: As it came.
            PropmasterError: Whatever else came.
        """
        try:
            yield
        except CancelledError:
            raise
        except PropmasterError as error:
            self._statistics.count(reads_failed=1)
            self._tell(entry, error)
            raise
        except Exception as error:
            # Nobody further out knows for which file it is, and of that the task has failed.
            log.exception(events.MOUNT_REQUEST_CRASHED)
            failure = LocalReadError(f"{entry.digest} can not be read: {error!r}")
            self._statistics.count(reads_failed=1)
            self._tell(entry, failure)
            raise failure from error

    def _expect_second_ask(
        self, node: int, offset: int, length: int, error: PropmasterError
    ) -> None:
        until = time.monotonic() + SECOND_ASK_SECONDS
        with self._refusals_lock:
            refusals = self._refusals.setdefault(node, [])
            # A copy: one that was raised keeps what its raisers had.
            refusals.append(Refusal(until, offset, length, copy(error)))

    def _refused_just_now(self, node: int, offset: int, length: int) -> PropmasterError | None:
        """Return what a read of that was refused with a moment ago; each counts once."""
        with self._refusals_lock:
            now = time.monotonic()
            refusals = [r for r in self._refusals.pop(node, ()) if r.until >= now]
            found = next((r for r in refusals if r.is_asked_again(offset, length)), None)
            if found is not None:
                refusals.remove(found)
            if refusals:
                self._refusals[node] = refusals
        return None if found is None else found.error

    def whole_now(self, node: int) -> OpenBlob | None:
        """Return the blob of a file if it is open, whole and verified."""
        return self._reader.verified_now(self.tree.digest(node))

    def whole(self, node: int) -> OpenBlob | None:
        """Return the blob of a file if it is on this host, whole and verified; may take a while."""
        digest = self.tree.digest(node)
        return self._reader.verified_cached(digest) if digest.size else None

    def content(self, node: int, cancellation: Cancellation) -> OpenBlob:
        """Return the whole content of a file, fetched if need be.

        Raises:
            CancelledError: It is not wanted any more.
            PropmasterError: It can not be had; that is in the error ledger, with the path.
        """
        entry = self.tree.entry(node)
        with self._telling(entry):
            return self._reader.open(entry.digest, cancellation)

    def tell_corrupt(self, node: int, error: PropmasterError) -> None:
        """Keep that the content of a file turned out wrong after it was opened."""
        self._statistics.count(reads_failed=1)
        self._tell(self.tree.entry(node), error)

    def _tell_corrupt(self, digest: Digest, error: PropmasterError) -> None:
        """Keep that files were read, perhaps, before their blob turned out wrong."""
        nodes = self.tree.nodes_of(digest.hex)
        for node in nodes:
            self._tell(self.tree.entry(node), error)
        # Nor may anybody go on reading what the kernel keeps of it.
        self.notifier.forget_content(nodes)

    def _tell(self, entry: FileEntry, error: PropmasterError) -> None:
        path = path_below_layer(entry.path)
        source = self._object_of(entry.digest)
        if source is None:
            log.error(
                events.MOUNT_READ_FAILED,
                extra={"path": path, "hash": entry.hash, "reason": error.message},
            )
        else:
            url, version = source
            log.error(
                events.MOUNT_READ_FAILED,
                extra={"path": path, "object": url, "version": version, "reason": error.message},
            )
        self._errors.record(path, entry.digest, error, source)

    def getxattr(self, node: int, name: bytes) -> bytes | None:
        """Return an extended attribute, None when there is none of that name.

        `user.propmaster.hash` is a file's hash, if it is known; `user.propmaster.state` is `local`
        or `remote`.
        """
        if self.tree.is_directory(node):
            return None
        if name == XATTR_HASH and self._by_hash:
            return self.tree.entry(node).hash.encode()
        if name == XATTR_STATE:
            return b"local" if self._reader.is_local(self.tree.digest(node)) else b"remote"
        return None

    def listxattr(self, node: int) -> list[bytes]:  # noqa: ARG002 - it is so for all
        """Return no name: every tool that copies attributes would copy ours."""
        return []
