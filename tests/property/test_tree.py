"""Whatever layers it is made of, a tree is what a dictionary of paths is.

Mutations seen to fail here: a later layer's file does not replace an earlier one's; what it
replaces still counts; a name in a directory that was there before is not reported, or one in a new
directory is; a clash is looked for with the entry's own directory only, and not with those above.
"""

import os

from hypothesis import given
from hypothesis import strategies as st

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import PathClashError
from agent_plugin.content.manifest import FileEntry, Manifest
from vfs.tree import ROOT, Tree

Model = dict[str, FileEntry]

NAMES = st.sampled_from(["a", "b", "ab", "A", "日本", "🎬", os.fsdecode(b"\xff"), "\n"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
LAYERS = st.lists(
    st.dictionaries(PATHS, st.binary(max_size=2), min_size=1, max_size=8), min_size=1, max_size=4
)


def above(path: str) -> list[str]:
    """Return all directories that lead to a path, the root too."""
    names = path.split("/")[:-1]
    return ["/".join(names[:depth]) for depth in range(len(names) + 1)]


def directories_of(model: Model) -> set[str]:
    return {directory for path in model for directory in above(path)} | {""}


def clash(model: Model) -> bool:
    return bool(directories_of(model) & model.keys())


def meanings(model: Model) -> dict[tuple[str, bytes], FileEntry | None]:
    """Return what each name in each directory is; None is a directory."""
    paths = {path: None for path in directories_of(model) if path} | model
    return {
        (path.rpartition("/")[0], os.fsencode(path.rpartition("/")[2])): what
        for path, what in paths.items()
    }


def path_of(tree: Tree, node: int) -> str:
    names: list[bytes] = []
    while node != ROOT:
        up = tree.parent(node)
        names += [name for name, found in tree.names(up).items() if found == node]
        node = up
    return os.fsdecode(b"/".join(reversed(names)))


def seen(tree: Tree) -> dict[tuple[str, bytes], FileEntry | None]:
    """Return the same as `meanings`, by asking the tree for names from the root on."""
    found: dict[tuple[str, bytes], FileEntry | None] = {}
    pending = [("", ROOT)]
    while pending:
        directory, node = pending.pop()
        for name, child in tree.names(node).items():
            assert tree.exists(child)
            assert tree.parent(child) == node
            assert tree.lookup(node, name) == child
            path = f"{directory}/{os.fsdecode(name)}" if directory else os.fsdecode(name)
            assert tree.find(path) == child
            is_directory = tree.is_directory(child)
            found[directory, name] = None if is_directory else tree.entry(child)
            if is_directory:
                pending.append((path, child))
    return found


@given(layers=LAYERS)
def test_a_tree_is_what_a_dictionary_of_paths_is(layers: list[dict[str, bytes]]) -> None:
    tree = Tree()
    model: Model = {}
    for number, files in enumerate(layers):
        added = {
            path: FileEntry(Digest.of(content).hex, number % 2, path, len(content))
            for path, content in files.items()
        }
        if clash(added):
            continue  # No manifest can hold that.
        both = model | added
        nodes = len(tree)
        try:
            changed = tree.add(Manifest.of(added.values()))
        except PathClashError:
            assert clash(both)
            assert len(tree) == nodes
        else:
            assert not clash(both)
            old, new = meanings(model), meanings(both)
            known = directories_of(model)
            assert sorted((path_of(tree, node), name) for node, name in changed) == sorted(
                key for key, what in new.items() if key[0] in known and old.get(key, 0) != what
            )
            model = both
        assert seen(tree) == meanings(model)
        assert {entry.path: entry for entry in tree.walk()} == model
        assert tree.files == len(model)
        assert tree.bytes == sum(entry.size for entry in model.values())
        assert tree.find("no such name") is None
