"""What is seen of an overlay: names, attributes and content, of inputs and of what was written.

Concurrency: as overlay.py says.
"""

import errno
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from typing import Final

import xxhash

from agent_plugin.content.store import Cancellation
from vfs.nodes import (
    Attributes,
    Listed,
    Space,
)
from vfs.overlay_copy import CopyUp
from vfs.overlay_index import HIDDEN, Index, Object
from vfs.overlay_upper import (
    Descriptor,
    Upper,
    path_of,
)
from vfs.service import BLOCK_BYTES, XATTR_HASH, XATTR_STATE, NodeService
from vfs.tree import ROOT

# Listings that are kept; a large directory is asked for in many pieces.
LISTINGS: Final = 64
_NOTHING: Final[dict[bytes, int]] = {}
# Above the positions that a tree's names have.
_MADE_POSITION: Final = 1 << 61


class OverlayNodes:
    """The nodes, as they are.

    Args:
        lower: The inputs.
        upper: What was written.
        instance: Tells this mount from others that used the same directory.
        again: Whether a server of this mount was killed.
    """

    def __init__(
        self, lower: NodeService, upper: Upper, instance: str, *, again: bool = False
    ) -> None:
        self._lower = lower
        self._tree = lower.tree
        self._upper = upper
        self._again = again
        self._lock = threading.RLock()
        self._index = Index(lower.tree, upper, instance, again=again)
        self._copy = CopyUp(self._index, upper, lower, self._lock)
        self._held: dict[int, int] = {}
        # Inputs that were removed and may be in use: since the server started, or before it did.
        self._removed: set[int] = self._index.removed() if again else set()
        # Both with the tree's names, which are others after an update.
        self._listings: dict[int, tuple[Mapping[bytes, int], list[Listed]]] = {}
        self._subdirectories: dict[int, tuple[Mapping[bytes, int], int]] = {}
        # Of directories of inputs, when their attributes were changed, since the server started.
        self._touched: dict[int, int] = {}

    def close(self) -> None:
        """Leave nothing but the upper directory, when the mount is gone."""
        self._upper.clear_work()

    # ------------------------------------------------------------------ names and attributes

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, None if there is none."""
        with self._lock:
            return self._index.lookup(directory, name) or None

    def parent(self, directory: int) -> int:
        """Return the directory above; that of the root, and of one that is gone, is the root."""
        with self._lock:
            place = self._index.place(directory)
        return place[0] if place else ROOT

    def path(self, node: int) -> str:
        """Return one of the node's paths below the root, for messages."""
        names: list[str] = []
        with self._lock:
            while node != ROOT and (place := self._index.place(node)) is not None:
                names.append(os.fsdecode(place[1]))
                node = place[0]
        return "/".join(reversed(names))

    def attributes(self, node: int) -> Attributes:
        """Return what is known of a node.

        Raises:
            OSError: ESTALE: there is no such node.
        """
        with self._lock:
            found = self._index.objects.get(node)
            if found is not None:
                return self._attributes(found)
            attributes = self._lower.attributes(node)
            if stat.S_ISDIR(attributes.mode):
                return attributes._replace(nlink=2 + self._count_subdirectories(node))
            return attributes._replace(nlink=0) if node in self._removed else attributes

    def listing(self, directory: int) -> Sequence[Listed]:
        """Return a directory's names: the tree's in its order, then those that were made.

        Raises:
            OSError: ENOTDIR: it is none.
        """
        with self._lock:
            names = self._index.names.get(directory)
            if names is None:
                return self._lower.listing(directory)
            below = self._names_below(directory)
            known = self._listings.get(directory)
            if known is not None and known[0] is below:
                return known[1]
            listing = _list(below, names)
            self._listings[directory] = below, listing
            if len(self._listings) > LISTINGS:
                del self._listings[next(iter(self._listings))]
            return listing

    def readlink(self, node: int) -> bytes:
        """Return where a symbolic link leads.

        Raises:
            OSError: EINVAL: it is none.
        """
        with self._lock:
            found = self._index.objects.get(node)
            if found is None:
                return self._lower.readlink(node)
            above, name = self._copy.at(found)
            return os.readlink(name, dir_fd=above.fd)

    def statvfs(self) -> Space:
        """Return the space of the disk that is written to."""
        found = os.fstatvfs(self._upper.root.fd)
        return Space(
            found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail,
            found.f_files, found.f_ffree,
        )  # fmt: skip

    def hold(self, node: int, count: int = 1) -> None:
        """Keep a node, though its last name may go."""
        with self._lock:
            self._held[node] = self._held.get(node, 0) + count

    def forget(self, node: int, count: int = 1) -> None:
        """Give back what was held; a node without names goes with the last."""
        with self._lock:
            left = self._held.pop(node, 0) - count
            if left > 0:
                self._held[node] = left
                return
            self._removed.discard(node)
            found = self._index.objects.get(node)
            if found is not None and not found.places:
                self._destroy(found)

    # ------------------------------------------------------------------ content

    def read_now(self, node: int, offset: int, buffer: memoryview) -> int:
        """Read into a buffer what can be read without waiting; -1 if nothing can."""
        opened = self._content(node)
        if opened is None:
            return self._lower.read_now(self._below(node), offset, buffer)
        return os.preadv(opened.fd, [buffer], offset)

    def read(self, node: int, offset: int, length: int, cancellation: Cancellation) -> bytes:
        """Return part of a file, fetched if need be; shorter only at the file's end.

        Raises:
            CancelledError: The reader is gone.
            PropmasterError: It can not be had; that is in the error ledger, with the path.
        """
        opened = self._content(node)
        if opened is None:
            return self._lower.read(self._below(node), offset, length, cancellation)
        return os.pread(opened.fd, length, offset)

    def lseek(self, node: int, offset: int, whence: int) -> int:
        """Return where data or a hole is next; an input is all data."""
        opened = self._content(node)
        if opened is not None:
            return os.lseek(opened.fd, offset, whence)
        size = self._lower.attributes(self._below(node)).size
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return offset if whence == os.SEEK_DATA else size

    # ------------------------------------------------------------------ extended attributes

    def getxattr(self, node: int, name: bytes) -> bytes | None:
        """Return an extended attribute, None when there is none of that name.

        Raises:
            OSError: EOPNOTSUPP: none of that kind can be.
        """
        if not self._upper.may_be(name):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        with self._lock:
            found = self._index.objects.get(node)
            if name in (XATTR_HASH, XATTR_STATE):
                shown = found is None or found.shows
                return self._lower.getxattr(self._below(node), name) if shown else None
            if found is None or self._upper.is_private(name):
                return None
            opened = self._copy.named(found)
            try:
                return os.getxattr(path_of(opened), name)
            except OSError as error:
                if error.errno == errno.ENODATA:
                    return None
                raise

    def listxattr(self, node: int) -> list[bytes]:
        """Return the names of the extended attributes that were set."""
        with self._lock:
            found = self._index.objects.get(node)
            if found is None:
                return []
            opened = self._copy.named(found)
            names = map(os.fsencode, os.listxattr(path_of(opened)))
            upper = self._upper
            return [name for name in names if upper.may_be(name) and not upper.is_private(name)]

    # ------------------------------------------------------------------ their parts

    def _destroy(self, found: Object) -> None:
        self._copy.let_go(found.node)
        self._index.drop(found.node)
        self._listings.pop(found.node, None)
        self._upper.clear(self._upper.gone_name(found.node))

    def _is_directory(self, node: int) -> bool:
        found = self._index.objects.get(node)
        return found.is_directory if found is not None else self._tree.is_directory(node)

    def _count_subdirectories(self, directory: int) -> int:
        below = self._names_below(directory)
        known, count = self._subdirectories.get(directory, (None, 0))
        if known is not below:
            count = sum(self._is_directory(node) for _, _, node in self.listing(directory))
            self._subdirectories[directory] = below, count
        return count

    def _names_below(self, directory: int) -> Mapping[bytes, int]:
        """Return the names of the tree that would be seen if nothing of them had changed."""
        lower = self._index.lower(directory)
        return self._tree.names(lower) if lower else _NOTHING

    def _attributes(self, found: Object) -> Attributes:
        status = self._status(found)
        nlink, size, blocks = len(found.places), status.st_size, status.st_blocks
        ctime_ns = status.st_ctime_ns
        if found.is_directory:
            nlink = 2 + self._count_subdirectories(found.node) if found.places else 0
            if found.lower:
                # As if it had not been brought in, of which the kernel knows nothing.
                size = blocks = 0
                ctime_ns = max(status.st_mtime_ns, self._touched.get(found.node, 0))
        elif found.shows:
            blocks = -(-size // BLOCK_BYTES)
        uid, gid = self._upper.shown_owner or (status.st_uid, status.st_gid)
        return Attributes(
            found.node, status.st_mode, nlink, uid, gid, status.st_rdev,
            size, blocks, status.st_atime_ns, status.st_mtime_ns, ctime_ns,
        )  # fmt: skip

    def _status(self, found: Object) -> os.stat_result:
        opened = self._copy.find(found.node)
        if opened is not None:
            return os.fstat(opened.fd)
        above, name = self._copy.at(found)
        return os.stat(name, dir_fd=above.fd, follow_symlinks=False)

    def _below(self, node: int) -> int:
        """Return the tree's node of a file that shows it."""
        found = self._index.objects.get(node)
        return node if found is None else found.lower

    def _content(self, node: int) -> Descriptor | None:
        """Return a file of the upper directory; None when its content is the tree's."""
        with self._lock:
            found = self._index.objects.get(node)
            if found is None or found.shows:
                return None
            return self._copy.open(found)


def _list(below: Mapping[bytes, int], names: dict[bytes, int]) -> list[Listed]:
    shown = [
        (position, name, names.get(name, node))
        for position, (name, node) in enumerate(below.items(), start=1)
    ]
    made = [
        (_MADE_POSITION | xxhash.xxh3_64_intdigest(name) >> 3, name, node)
        for name, node in names.items()
        if name not in below
    ]
    return [listed for listed in (*shown, *sorted(made)) if listed[2] != HIDDEN]
