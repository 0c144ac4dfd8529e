"""The inode tree: what a manifest looks like as a file system, decided here and only here.

Nodes are numbered from ROOT (1) on and never change or go away, so the kernel may remember for ever
what it was told of one. Layers that come later (the outputs of other steps) hide what has the same
path and add the rest: a file that is replaced gets a new node, and whoever has the old one open
goes on reading the old content.

Pure: no disk, no store, no kernel. Readers need no lock; `add` is for one thread at a time, and a
reader that runs beside it sees each directory as it was before or as it is after.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import PathClashError
from agent_plugin.content.manifest import FileEntry, Manifest

ROOT: Final = 1


class Names(Protocol):
    """A tree of names that never change what they mean; as `Tree` has them."""

    def __len__(self) -> int:
        """How many nodes there are."""

    def exists(self, node: int) -> bool:
        """Whether there is such a node."""

    def is_directory(self, node: int) -> bool:
        """Whether the node is a directory; otherwise it is a file."""

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, None if there is none."""

    def names(self, directory: int) -> Mapping[bytes, int]:
        """Return a directory's names and their nodes."""

    def find(self, path: str) -> int | None:
        """Return the node at a path below the root, None if there is none."""

    def parent(self, node: int) -> int:
        """Return the node of the directory above; that of the root is the root."""

    def entry(self, node: int) -> FileEntry:
        """Return the manifest's entry of a file."""

    def digest(self, node: int) -> Digest:
        """Return what blob a file is."""

    def size(self, node: int) -> int:
        """Return the bytes of a file, 0 for a directory."""

    def mtime_ns(self, node: int) -> int:
        """Return when the content changed, in nanoseconds since the epoch."""

    def nodes_of(self, hash_: str) -> list[int]:
        """Return the nodes of all files with a content."""

    @property
    def bytes(self) -> int:
        """Of all files."""


class Tree:
    """Directories and files of one or more manifests.

    Attributes:
        files, bytes: That no later layer hides.

    Args:
        mtime_ns: Of the directories, since manifests have none, in nanoseconds since the epoch.
    """

    def __init__(self, *, mtime_ns: int = 0) -> None:
        self._mtime_ns = mtime_ns
        # By node. Files have no children, directories no entry; node 0 does not exist.
        self._children: list[dict[bytes, int] | None] = [None, {}]
        self._entries: list[FileEntry | None] = [None, None]
        self._parents = array("q", [0, ROOT])
        self._directories: dict[str, int] = {"": ROOT}
        self.files = 0
        self.bytes = 0

    def __len__(self) -> int:
        """How many nodes there are, those that later layers hide among them."""
        return len(self._children) - 1

    def add(self, manifest: Manifest, at: str = "") -> list[tuple[int, bytes]]:
        """Put a manifest on top.

        Args:
            manifest: The layer.
            at: A directory that it is put in, made if need be; the root if empty.

        Returns:
            The names that mean something else than before, each with its directory's node: what
            the kernel has to forget.

        Raises:
            PathClashError: A file is to be where a directory is, or the other way round. Nothing
                was added.
        """
        layer = _moved(manifest.entries, at)
        self._refuse_clashes(layer)
        changed: list[tuple[int, bytes]] = []
        known = len(self._children)
        # Of directories that there were: their names are replaced at once when all is known.
        renewed: dict[int, dict[bytes, int]] = {}
        directories, children = self._directories, self._children
        entries, parents = self._entries, self._parents
        directory, last = ROOT, ""
        names = self._names_to_change(ROOT, known, renewed)
        for entry in layer:
            above, _, name = entry.path.rpartition("/")
            # Most files stand beside the one before.
            if above != last:
                found = directories.get(above)
                if found is None:
                    found = self._make_directory(above, known, changed, renewed)
                directory, last = found, above
                names = self._names_to_change(directory, known, renewed)
            encoded = name.encode("utf-8", "surrogateescape")
            before = names.get(encoded)
            if before is not None:
                if entries[before] == entry:
                    continue
                self._discount(before)
            if directory < known:
                changed.append((directory, encoded))
            node = len(children)
            children.append(None)
            entries.append(entry)
            parents.append(directory)
            names[encoded] = node
            self.files += 1
            self.bytes += entry.size
        for directory, names in renewed.items():
            children[directory] = names
        return changed

    def exists(self, node: int) -> bool:
        """Whether there is such a node; the kernel's numbers are checked with it."""
        return 0 < node < len(self._children)

    def is_directory(self, node: int) -> bool:
        """Whether the node is a directory; otherwise it is a file."""
        return self._children[node] is not None

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, None if there is none."""
        names = self._children[directory]
        return names.get(name) if names is not None else None

    def names(self, directory: int) -> dict[bytes, int]:
        """Return a directory's names and their nodes, in the order they were added; read only.

        Raises:
            NotADirectoryError: The node is a file.
        """
        names = self._children[directory]
        if names is None:
            raise NotADirectoryError(f"node {directory} is a file")
        return names

    def parent(self, node: int) -> int:
        """Return the node of the directory above; that of the root is the root."""
        return self._parents[node]

    def entry(self, node: int) -> FileEntry:
        """Return the manifest's entry of a file.

        Raises:
            IsADirectoryError: The node is a directory.
        """
        entry = self._entries[node]
        if entry is None:
            raise IsADirectoryError(f"node {node} is a directory")
        return entry

    def digest(self, node: int) -> Digest:
        """Return what blob a file is.

        Raises:
            IsADirectoryError: The node is a directory.
        """
        return self.entry(node).digest

    def size(self, node: int) -> int:
        """Return the bytes of a file, 0 for a directory."""
        entry = self._entries[node]
        return 0 if entry is None else entry.size

    def mtime_ns(self, node: int) -> int:
        """Return when the content changed, in nanoseconds since the epoch; may be negative."""
        entry = self._entries[node]
        return self._mtime_ns if entry is None else entry.mtime * 1000

    def find(self, path: str) -> int | None:
        """Return the node at a path below the root, None if there is none."""
        node = ROOT
        for name in path.encode("utf-8", "surrogateescape").split(b"/"):
            if name in (b"", b"."):
                continue
            found = self.lookup(node, name)
            if found is None:
                return None
            node = found
        return node

    def at_or_below(self, path: str) -> list[FileEntry]:
        """Return the file at a path, or all files below it; none if nothing is there."""
        node = self.find(path)
        if node is None:
            return []
        return list(self.walk(node)) if self.is_directory(node) else [self.entry(node)]

    def walk(self, directory: int = ROOT) -> Iterator[FileEntry]:
        """Yield the entries of all files below a directory that no layer hides, in no order."""
        pending = [directory]
        while pending:
            for node in self.names(pending.pop()).values():
                entry = self._entries[node]
                if entry is None:
                    pending.append(node)
                else:
                    yield entry

    def nodes_of(self, hash_: str) -> list[int]:
        """Return the nodes of all files with a content, those that later layers hide as well."""
        return [
            node
            for node, entry in enumerate(self._entries)
            if entry is not None and entry.hash == hash_
        ]

    def larger_than(self, size: int) -> list[int]:
        """Return the nodes of all files of more bytes, those that later layers hide as well."""
        return [
            node
            for node, entry in enumerate(self._entries)
            if entry is not None and entry.size > size
        ]

    def _discount(self, node: int) -> None:
        self.files -= 1
        self.bytes -= self.size(node)

    def _names_to_change(
        self, directory: int, known: int, renewed: dict[int, dict[bytes, int]]
    ) -> dict[bytes, int]:
        if directory in renewed:
            return renewed[directory]
        names = self._children[directory]
        assert names is not None  # noqa: S101 - it was looked up among the directories
        if directory < known:
            names = renewed[directory] = dict(names)
        return names

    def _make_directory(
        self,
        path: str,
        known: int,
        changed: list[tuple[int, bytes]],
        renewed: dict[int, dict[bytes, int]],
    ) -> int:
        missing = []
        while (directory := self._directories.get(path)) is None:
            missing.append(path)
            path = path.rpartition("/")[0]
        for path in reversed(missing):
            name = path.rpartition("/")[2].encode("utf-8", "surrogateescape")
            names = self._names_to_change(directory, known, renewed)
            if directory < known:
                changed.append((directory, name))
            node = len(self._children)
            self._children.append({})
            self._entries.append(None)
            self._parents.append(directory)
            self._directories[path] = node
            names[name] = node
            directory = node
        return directory

    def _refuse_clashes(self, layer: Sequence[FileEntry]) -> None:
        """A manifest has none in itself, so the first one has none at all."""
        if not self.files:
            return
        checked = set()
        for entry in layer:
            if entry.path in self._directories:
                raise PathClashError(f"{entry.path} is a file here and a directory elsewhere")
            above = entry.path.rpartition("/")[0]
            while above and above not in checked and above not in self._directories:
                checked.add(above)
                node = self.find(above)
                if node is not None and not self.is_directory(node):
                    raise PathClashError(f"{above} is a directory here and a file elsewhere")
                above = above.rpartition("/")[0]


def _moved(entries: Sequence[FileEntry], at: str) -> Sequence[FileEntry]:
    if not at:
        return entries
    return [
        FileEntry(entry.hash, entry.mtime, f"{at}/{entry.path}", entry.size) for entry in entries
    ]
