"""Every blob of a store as a file, `/<ab>/<hash>.<size>`: what kernels compose mounts from.

A name says all that there is to know, so nothing is looked for when it is looked up: whoever opens
a blob that the store has not got gets an error of input and output. A node is made when its name is
asked for the first time, and is then told to the kernel, which keeps it. So it is also written to a
file that outlives this process, and a server that takes the place of a killed one has it.

Directories list none of their files, since nobody knows what all the store has.

Concurrency: any thread may call anything.
"""

import os
import re
import struct
import threading
from collections.abc import Mapping
from typing import Final

from agent_plugin.content.digest import EMPTY_HASH, Digest
from agent_plugin.content.errors import LocalReadError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.manifest_rules import MAX_SIZE_BYTES
from agent_plugin.content.parts import write_all
from vfs.tree import ROOT

_DIRECTORIES: Final = 256
_FIRST_FILE: Final = ROOT + 1 + _DIRECTORIES
_NAME: Final = re.compile(rb"([0-9a-f]{32})\.(0|[1-9][0-9]{0,18})")
# What is kept of each node, in the order of their numbers: hash and size.
_RECORD: Final = struct.Struct("<16sq")


class ByHash:
    """Names of all blobs there could be; in place of a `Tree`.

    Args:
        told: A descriptor of the file that says which nodes there are, empty at first. It stays the
            caller's, who keeps it for the next server; one server at a time writes to it.

    Raises:
        LocalReadError: It can not be read.
    """

    def __init__(self, told: int) -> None:
        self._told = told
        self._lock = threading.Lock()
        self._directories = {b"%02x" % at: ROOT + 1 + at for at in range(_DIRECTORIES)}
        self._blobs: list[Digest] = []
        self._nodes: dict[Digest, int] = {}
        try:
            known = os.pread(told, os.fstat(told).st_size, 0)
        except OSError as error:
            raise LocalReadError(f"the nodes by hash can not be read: {error.strerror}") from error
        # What a killed server had not written whole, it had not told either.
        whole = len(known) // _RECORD.size * _RECORD.size
        for hash_, size in _RECORD.iter_unpack(known[:whole]):
            self._add(Digest(hash_.hex(), size))

    def __len__(self) -> int:
        """How many nodes there are."""
        return ROOT + _DIRECTORIES + len(self._blobs)

    @property
    def files(self) -> int:
        """How many files were looked up."""
        return len(self._blobs)

    def exists(self, node: int) -> bool:
        """Whether there is such a node."""
        return 0 < node <= len(self)

    def is_directory(self, node: int) -> bool:
        """Whether the node is a directory; otherwise it is a file."""
        return node < _FIRST_FILE

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, which a name of the right form always has.

        Raises:
            OSError: A new node can not be kept.
        """
        if directory == ROOT:
            return self._directories.get(name)
        found = _NAME.fullmatch(name)
        if found is None or self._directories[name[:2]] != directory:
            return None
        hash_, size = found[1].decode(), int(found[2])
        if size > MAX_SIZE_BYTES or (size == 0) != (hash_ == EMPTY_HASH):
            return None
        digest = Digest(hash_, size)
        node = self._nodes.get(digest)
        if node is not None:
            return node
        with self._lock:
            if digest not in self._nodes:
                record = _RECORD.pack(bytes.fromhex(digest.hex), digest.size)
                write_all(self._told, record, len(self._blobs) * _RECORD.size)
                self._add(digest)
            return self._nodes[digest]

    def names(self, directory: int) -> Mapping[bytes, int]:
        """Return the directories of the root, and no names of any other.

        Raises:
            NotADirectoryError: The node is a file.
        """
        if not self.is_directory(directory):
            raise NotADirectoryError(f"node {directory} is a file")
        return self._directories if directory == ROOT else {}

    def find(self, path: str) -> int | None:
        """Return the node at a path below the root, None if there is none."""
        node: int | None = ROOT
        for name in path.encode("utf-8", "surrogateescape").split(b"/"):
            if name not in (b"", b".") and node is not None:
                node = self.lookup(node, name) if self.is_directory(node) else None
        return node

    def parent(self, node: int) -> int:
        """Return the node of the directory above; that of the root is the root."""
        if node < _FIRST_FILE:
            return ROOT
        return self._directories[self.digest(node).hex[:2].encode()]

    def entry(self, node: int) -> FileEntry:
        """Return a file as a manifest would have it.

        Raises:
            IsADirectoryError: The node is a directory.
        """
        digest = self.digest(node)
        return FileEntry(digest.hex, 0, f"{digest.hex[:2]}/{digest.hex}.{digest.size}", digest.size)

    def digest(self, node: int) -> Digest:
        """Return what blob a file is.

        Raises:
            IsADirectoryError: The node is a directory.
        """
        if node < _FIRST_FILE:
            raise IsADirectoryError(f"node {node} is a directory")
        return self._blobs[node - _FIRST_FILE]

    def size(self, node: int) -> int:
        """Return the bytes of a file, 0 for a directory."""
        return 0 if node < _FIRST_FILE else self.digest(node).size

    def mtime_ns(self, _node: int) -> int:
        """0: blobs have no time, and those who compose mounts take that of a manifest."""
        return 0

    def nodes_of(self, hash_: str) -> list[int]:
        """Return the nodes of all files with a content."""
        return [_FIRST_FILE + at for at, digest in enumerate(self._blobs) if digest.hex == hash_]

    @property
    def bytes(self) -> int:
        """0: what was looked up may be nowhere."""
        return 0

    def _add(self, digest: Digest) -> None:
        # Last what makes it found: others look without the lock.
        self._blobs.append(digest)
        self._nodes[digest] = _FIRST_FILE + len(self._blobs) - 1
