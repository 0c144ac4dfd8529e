"""Names and attributes as the kernel gets them: single ones, and whole directories.

A directory is encoded whole, and one ahead of whoever walks a tree: the kernel and its caller need
longer for what they get than it takes to encode as much. Next comes the first directory below the
one before, else the next beside it, else beside one above; `ls -R`, `find`, os.walk and rsync all
go that way.
"""

import stat
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from vfs.nodes import Attributes, Nodes
from vfs.transports import kernel_protocol as protocol
from vfs.transports.kernel_protocol import FOREVER

PAGE_BYTES: Final = 4096
# The block size of a directory. The C library lists with a buffer of that size, so a directory of
# 1,000 files takes two messages and not seven; a larger buffer costs more than it saves.
LISTING_BYTES: Final = 256 * 1024
# For "." and "..": the kernel looks up nothing for a node 0.
NOTHING: Final = bytes(protocol.ENTRY_ATTR.size)
# Encoded listings that are kept; a large directory is asked for in many pieces.
LISTINGS: Final = 64
# A request that comes while a directory is encoded ahead waits for that: some 10 ms at most.
NAMES_AHEAD: Final = 4096
_NS: Final = 1_000_000_000
# Names end on multiples of 8, as the header before them does.
_PADDING: Final = tuple(bytes(-length % 8) for length in range(8))


def attr_out(attributes: Attributes) -> bytes:
    """Return attributes as GETATTR and SETATTR are answered."""
    return protocol.ATTR_OUT.pack(FOREVER, 0, 0) + entry_out(attributes)[protocol.ENTRY.size :]


def entry_out(attributes: Attributes) -> bytes:
    """Return a node as LOOKUP is answered."""
    node, mode, nlink, uid, gid, rdev, size, blocks, atime, mtime, ctime = attributes
    modified, modified_ns = divmod(mtime, _NS)
    accessed, accessed_ns = (modified, modified_ns) if atime == mtime else divmod(atime, _NS)
    changed, changed_ns = (modified, modified_ns) if ctime == mtime else divmod(ctime, _NS)
    block = LISTING_BYTES if stat.S_ISDIR(mode) else PAGE_BYTES
    return protocol.ENTRY_ATTR.pack(
        node, 0, FOREVER, FOREVER, 0, 0,
        node, size, blocks,
        accessed, modified, changed, accessed_ns, modified_ns, changed_ns,
        mode, nlink, uid, gid, rdev, block, 0,
    )  # fmt: skip


def dirent(position: int, name: bytes, node: int, mode: int) -> bytes:
    """Return a name as READDIR is answered, and READDIRPLUS after what `entry_out` gives."""
    length = len(name)
    # The type as DT_DIR and the others have it.
    header = protocol.DIRENT.pack(node, position, length, mode >> 12)
    return header + name + _PADDING[length & 7]


@dataclass(frozen=True, slots=True)
class Listing:
    """A directory's entries, encoded.

    Attributes:
        encoded: One after another.
        ends: Where each ends.
        directories: Those of them that are directories.
        places: Of each directory, where it is among these.
        changes: How many changes of names there had been before.
    """

    encoded: bytes
    ends: Sequence[int]
    directories: Sequence[int]
    places: dict[int, int]
    changes: int


class Listings:
    """The encoded directories of nodes that do not change."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._kept: OrderedDict[int, Listing] = OrderedDict()
        self._changes = 0
        # What somebody began to list last, and whether a walk came to it from the one before.
        self._last = 0
        self._is_walk = False

    def forget(self) -> None:
        """Encode all anew: names are changing, perhaps while another thread encodes them."""
        self._changes += 1

    def begin(self, node: int) -> None:
        """Note that somebody begins to list a directory."""
        self._is_walk = self._after(self._last) == node
        self._last = node

    def get(self, node: int) -> Listing:
        """Return a directory.

        Raises:
            OSError: It is none.
        """
        changes = self._changes
        kept = self._kept.get(node)
        if kept is not None and kept.changes == changes:
            return kept
        listing = self._kept[node] = self._encode(node, changes)
        if len(self._kept) > LISTINGS:
            self._kept.popitem(last=False)
        return listing

    def encode_ahead(self) -> None:
        """Encode what comes next, if somebody walks the tree."""
        if not self._is_walk:
            return
        following = self._after(self._last)
        if following is not None and len(self._nodes.listing(following)) <= NAMES_AHEAD:
            self.get(following)

    def _after(self, node: int) -> int | None:
        """Return the directory that a walk comes to after one, as far as listings are kept."""
        listing = self._kept.get(node)
        if listing is not None and listing.directories:
            return listing.directories[0]
        while (above := self._nodes.parent(node) if node else node) != node:
            listing = self._kept.get(above)
            place = listing.places.get(node) if listing is not None else None
            if listing is None or place is None:
                return None
            if place + 1 < len(listing.directories):
                # A walk comes back to it many listings later.
                self._kept.move_to_end(above)
                return listing.directories[place + 1]
            node = above
        return None

    def _encode(self, node: int, changes: int) -> Listing:
        attributes_of = self._nodes.attributes
        dots = [(b".", node), (b"..", self._nodes.parent(node))]
        pieces = [
            NOTHING + dirent(position, name, found, attributes_of(found).mode)
            for position, (name, found) in enumerate(dots, start=1)
        ]
        directories = []
        for position, (_, name, found) in enumerate(self._nodes.listing(node), start=len(dots) + 1):
            attributes = attributes_of(found)
            if stat.S_ISDIR(attributes.mode):
                directories.append(found)
            pieces.append(entry_out(attributes) + dirent(position, name, found, attributes.mode))
        return Listing(
            encoded=b"".join(pieces),
            ends=[*accumulate(map(len, pieces))],
            directories=directories,
            places={found: place for place, found in enumerate(directories)},
            changes=changes,
        )
