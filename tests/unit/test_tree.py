"""The inode tree: what a manifest, or several, look like as a file system."""

import os
import time
from collections.abc import Mapping

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import PathClashError
from agent_plugin.content.manifest import FileEntry, Manifest
from vfs.tree import ROOT, Tree

MTIME_US = 1_600_000_000_123_456


def entry(path: str, content: bytes = b"content", *, mtime: int = MTIME_US) -> FileEntry:
    digest = Digest.of(content)
    return FileEntry(hash=digest.hex, mtime=mtime, path=path, size=digest.size)


def layer(files: Mapping[str, bytes]) -> Manifest:
    return Manifest.of(entry(path, content) for path, content in files.items())


def tree_of(*layers: Mapping[str, bytes]) -> Tree:
    tree = Tree()
    for files in layers:
        tree.add(layer(files))
    return tree


def found(tree: Tree, path: str) -> int:
    node = tree.find(path)
    assert node is not None, path
    return node


def test_an_empty_tree_is_a_root_that_is_its_own_parent() -> None:
    tree = Tree(mtime_ns=7)
    assert (len(tree), tree.files, tree.bytes) == (1, 0, 0)
    assert tree.exists(ROOT)
    assert tree.is_directory(ROOT)
    assert tree.parent(ROOT) == ROOT
    assert tree.names(ROOT) == {}
    assert (tree.size(ROOT), tree.mtime_ns(ROOT)) == (0, 7)
    assert list(tree.walk()) == []


def test_a_file_is_found_by_its_path_and_has_the_facts_of_its_entry() -> None:
    tree = tree_of({"shots/010/plate.exr": b"pixels", "notes.txt": b""})
    node = found(tree, "shots/010/plate.exr")

    assert not tree.is_directory(node)
    assert tree.size(node) == 6
    assert tree.mtime_ns(node) == MTIME_US * 1000
    assert tree.digest(node) == Digest.of(b"pixels")
    assert tree.entry(node).path == "shots/010/plate.exr"
    above = tree.parent(node)
    assert tree.is_directory(above)
    assert tree.lookup(above, b"plate.exr") == node
    assert list(tree.names(above)) == [b"plate.exr"]
    assert tree.parent(tree.parent(above)) == ROOT
    assert (tree.files, tree.bytes) == (2, 6)


def test_a_time_before_1970_stays_negative() -> None:
    tree = Tree()
    tree.add(Manifest.of([entry("old", mtime=-1)]))
    assert tree.mtime_ns(found(tree, "old")) == -1000


@pytest.mark.parametrize("path", ["", ".", "/", "./a", "a/", "/a//b", "a/./b"])
def test_empty_names_and_dots_in_a_path_are_passed_over(path: str) -> None:
    assert tree_of({"a/b": b"x"}).find(path) is not None


@pytest.mark.parametrize("path", ["b", "a/c", "a/b/c", "A", "a/b/", ".."])
def test_nothing_is_found_where_nothing_is(path: str) -> None:
    # A trailing slash is passed over, also behind a file.
    assert (tree_of({"a/b": b"x"}).find(path) is not None) == (path == "a/b/")


def test_names_that_are_not_utf_8_are_their_bytes() -> None:
    name = b"latin-\xe9"
    tree = tree_of({f"{os.fsdecode(name)}/{os.fsdecode(name)}.tx": b"x", "日本/🎬": b"y"})
    directory = tree.lookup(ROOT, name)
    assert directory is not None
    assert list(tree.names(directory)) == [name + b".tx"]
    assert tree.find(os.fsdecode(name) + "/" + os.fsdecode(name) + ".tx") is not None
    assert tree.lookup(found(tree, "日本"), "🎬".encode()) is not None


def test_no_node_beyond_those_that_there_are_exists() -> None:
    tree = tree_of({"a/b": b"x"})
    assert [node for node in range(-2, 9) if tree.exists(node)] == [1, 2, 3]


def test_a_file_has_no_names_and_a_directory_no_content() -> None:
    tree = tree_of({"a/b": b"x"})
    file, directory = found(tree, "a/b"), found(tree, "a")
    assert tree.lookup(file, b"b") is None
    with pytest.raises(NotADirectoryError):
        tree.names(file)
    with pytest.raises(IsADirectoryError):
        tree.entry(directory)
    with pytest.raises(IsADirectoryError):
        tree.digest(directory)


def test_a_later_layer_hides_what_has_its_path_and_adds_the_rest() -> None:
    tree = tree_of({"a/b": b"one", "a/c": b"two"})
    before = found(tree, "a/b")
    changed = tree.add(layer({"a/b": b"three!", "d/e/f": b"four"}))

    assert tree.digest(found(tree, "a/b")) == Digest.of(b"three!")
    assert tree.digest(found(tree, "a/c")) == Digest.of(b"two")
    assert tree.digest(found(tree, "d/e/f")) == Digest.of(b"four")
    assert tree.digest(before) == Digest.of(b"one"), "who has the old one open goes on reading it"
    assert sorted(changed) == [(ROOT, b"d"), (found(tree, "a"), b"b")]
    assert (tree.files, tree.bytes) == (3, 13)
    assert {file.path for file in tree.walk()} == {"a/b", "a/c", "d/e/f"}
    assert {file.path for file in tree.walk(found(tree, "d"))} == {"d/e/f"}


def test_a_layer_that_says_nothing_new_changes_nothing() -> None:
    tree = tree_of({"a/b": b"one", "c": b"two"})
    nodes = len(tree)
    assert tree.add(layer({"a/b": b"one", "c": b"two"})) == []
    assert (len(tree), tree.files, tree.bytes) == (nodes, 2, 6)


def test_new_names_in_new_directories_are_not_reported_one_by_one() -> None:
    tree = tree_of({"known/a": b"x"})
    changed = tree.add(layer({"known/new/b": b"x", "known/new/deep/c": b"x", "known/new/d": b"x"}))
    assert changed == [(found(tree, "known"), b"new")]


@pytest.mark.parametrize(
    "clash",
    [
        pytest.param({"a": b"file"}, id="a file where a directory is"),
        pytest.param({"a/b": b"file"}, id="a file where a deeper directory is"),
        pytest.param({"a/b/c/d": b"file"}, id="a directory where a file is"),
        pytest.param({"a/b/c/d/e/f": b"file"}, id="directories where a file is"),
    ],
)
def test_a_clash_is_refused_and_nothing_is_added(clash: dict[str, bytes]) -> None:
    tree = tree_of({"a/b/c": b"first", "z": b"last"})
    before = (len(tree), tree.files, tree.bytes, sorted(file.path for file in tree.walk()))

    with pytest.raises(PathClashError):
        # The entries before and behind it would go in if it were noticed on the way.
        tree.add(layer({"0/new": b"x", "z": b"changed", "zz": b"x"} | clash))

    assert before == (
        len(tree), tree.files, tree.bytes, sorted(file.path for file in tree.walk()),
    )  # fmt: skip
    assert tree.find("0") is None
    assert tree.digest(found(tree, "z")) == Digest.of(b"last")


def test_a_hundred_thousand_files_take_a_fraction_of_a_second() -> None:
    """Of this process's own time, whatever others do to the machine."""
    manifest = Manifest.of(
        entry(f"dir-{at // 1000:03}/sub/file-{at:06}.exr", b"same") for at in range(100_000)
    )
    tree = Tree()
    begun = time.process_time()
    assert tree.add(manifest) == [(ROOT, b"dir-%03d" % at) for at in range(100)]
    assert time.process_time() - begun < 2

    assert (tree.files, len(tree), tree.bytes) == (100_000, 100_201, 400_000)
    for at in (0, 999, 1000, 55_555, 99_999):
        node = found(tree, f"dir-{at // 1000:03}/sub/file-{at:06}.exr")
        assert tree.entry(node) is not None
    assert len(tree.names(found(tree, "dir-042/sub"))) == 1000
    assert sum(1 for _ in tree.walk()) == 100_000


def test_a_layer_may_be_put_in_a_directory_of_its_own() -> None:
    tree = tree_of({"a/b": b"one"})
    assert tree.add(layer({"a/b": b"two", "c": b"three"}), "layer") == [(ROOT, b"layer")]

    assert tree.digest(found(tree, "a/b")) == Digest.of(b"one")
    assert tree.digest(found(tree, "layer/a/b")) == Digest.of(b"two")
    assert [entry.path for entry in tree.at_or_below("layer/c")] == ["layer/c"]
    assert tree.files == 3


def test_who_goes_through_names_while_a_layer_comes_sees_them_as_they_were() -> None:
    """Seen to fail where names are added in place: a dictionary changes while it is read."""
    tree = tree_of({"a/b": b"one", "a/c": b"two"})
    names = iter(tree.names(found(tree, "a")))
    entries = tree.walk()
    seen, walked = [next(names)], [next(entries).path]
    tree.add(layer({"a/d": b"three", "e": b"four"}))

    assert [*seen, *names] == [b"b", b"c"]
    assert [*walked, *(entry.path for entry in entries)] == ["a/b", "a/c"]
    assert list(tree.names(found(tree, "a"))) == [b"b", b"c", b"d"]


def test_the_nodes_of_a_content_are_all_that_were_ever_told() -> None:
    tree = tree_of({"a": b"same", "b": b"same", "c": b"other"})
    nodes = [found(tree, "a"), found(tree, "b")]
    tree.add(layer({"a": b"another"}))
    assert tree.nodes_of(Digest.of(b"same").hex) == nodes
