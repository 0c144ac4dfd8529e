"""Directories as READDIRPLUS gives them, and which one is encoded before it is asked for."""

import stat
from collections.abc import Sequence
from typing import cast

import pytest

from agent_plugin.content.digest import EMPTY_HASH
from agent_plugin.content.manifest import FileEntry, Manifest
from vfs.nodes import Attributes, Listed, Nodes
from vfs.transports import kernel_protocol as protocol
from vfs.transports.kernel_entries import LISTING_BYTES, LISTINGS, NAMES_AHEAD, Listings, entry_out
from vfs.tree import Tree


class Names:
    """The names of a tree."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def attributes(self, node: int) -> Attributes:
        is_directory = self.tree.is_directory(node)
        mode = stat.S_IFDIR | 0o755 if is_directory else stat.S_IFREG | 0o644
        return Attributes(node, mode, 1, 0, 0, 0, 0, 0, 0, 0, 0)

    def listing(self, directory: int) -> Sequence[Listed]:
        names = self.tree.names(directory).items()
        return [(at, name, node) for at, (name, node) in enumerate(names, start=1)]

    def parent(self, directory: int) -> int:
        return self.tree.parent(directory)


class Rig:
    """A tree whose directories are listed."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.tree = Tree()
        self.tree.add(Manifest.of([FileEntry(EMPTY_HASH, 0, path, 0) for path in paths]))
        # No more than this is asked of nodes.
        self.listings = Listings(cast("Nodes", Names(self.tree)))

    def is_ahead(self, path: str) -> bool:
        """List a directory as the kernel does; return whether it had been encoded ahead."""
        node = self.tree.find(path)
        assert node is not None
        was_ahead = node in self.listings._kept
        names = names_of(self.listings.get(node).encoded)
        assert names == [b".", b"..", *self.tree.names(node)]
        self.listings.begin(node)
        self.listings.encode_ahead()
        return was_ahead

    def walk(self, path: str = "") -> list[bool]:
        """List a directory and all below it, as `find` does."""
        node = self.tree.find(path)
        assert node is not None
        ahead = [self.is_ahead(path)]
        for name, found in self.tree.names(node).items():
            if self.tree.is_directory(found):
                ahead += self.walk(f"{path}/{name.decode()}")
        return ahead


def names_of(encoded: bytes) -> list[bytes]:
    names, at = [], 0
    while at < len(encoded):
        at += protocol.ENTRY_ATTR.size
        _, _, length, _ = protocol.DIRENT.unpack_from(encoded, at)
        at += protocol.DIRENT.size
        names.append(encoded[at : at + length])
        at += length + -length % 8
    return names


def test_a_walk_finds_each_directory_encoded_but_the_first_two() -> None:
    rig = Rig([f"{a}/{b}/{c}" for a in "abc" for b in "xyz" for c in ("file", "below/file")])

    first, second, *others = rig.walk()

    assert (first, second) == (False, False)
    assert len(others) == 20
    assert all(others)


def test_a_walk_comes_back_to_a_directory_that_it_left_long_ago() -> None:
    rig = Rig([f"a{at:04}/b/file" for at in range(2 * LISTINGS)])

    assert rig.walk()[2:] == [True] * (4 * LISTINGS - 1)


def test_who_does_not_walk_has_nothing_encoded_ahead() -> None:
    rig = Rig([f"{a}/file" for a in "abcdef"])

    order = ("", "f", "d", "b", "e", "c", "a")
    assert [rig.is_ahead(path) for path in order] == [False] * 7


def test_a_large_directory_is_not_encoded_ahead_since_others_would_wait() -> None:
    rig = Rig(["a/file", *(f"b/{at}" for at in range(NAMES_AHEAD + 1)), "c/file"])

    assert rig.walk() == [False, False, False, True]


def test_what_was_encoded_ahead_is_not_given_once_names_have_changed() -> None:
    rig = Rig(["a/file", "b/file", "c/file"])
    assert [rig.is_ahead(path) for path in ("", "a")] == [False, False]

    rig.tree.add(Manifest.of([FileEntry(EMPTY_HASH, 0, "b/new", 0)]))
    rig.listings.forget()

    assert rig.is_ahead("b")


@pytest.mark.parametrize(("mode", "bytes_"), [(stat.S_IFDIR, LISTING_BYTES), (stat.S_IFREG, 4096)])
def test_a_directory_is_listed_with_a_large_buffer(mode: int, bytes_: int) -> None:
    entry = entry_out(Attributes(2, mode | 0o755, 1, 0, 0, 0, 0, 0, 0, 0, 0))

    *_, block, _flags = protocol.ENTRY_ATTR.unpack(entry)
    assert block == bytes_
