"""walk finds what os.walk finds, on any tree without links.

Mutations seen to fail here: leaving out names that begin with a dot, or empty files; leaving out
the last directory that was found; comparing overlapping directories by string prefix instead of by
component, or not at all.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_plugin.content.snapshot import walk

NAMES = st.sampled_from(["a", "ab", "a b", ".hidden", "日本", os.fsdecode(b"\xff"), "\n"])
TREES = st.recursive(
    st.binary(max_size=3),
    lambda below: st.dictionaries(NAMES, below, max_size=4),
    max_leaves=20,
)
# Two directories of which one's name begins with the other's are always there.
ROOTS = st.fixed_dictionaries(
    {name: st.dictionaries(NAMES, TREES, max_size=3) for name in ("a", "ab")},
    optional=dict.fromkeys((".hidden", "file"), TREES),
)
Tree = dict[str, "Tree"] | bytes


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walk")


def plant(tree: Tree, path: Path) -> None:
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, below in tree.items():
        plant(below, path / name)


def expected(root: Path, directories: list[str]) -> Iterator[tuple[str, int, int]]:
    seen = set()
    for directory in directories:
        for above, _, names in os.walk(root / directory):
            for name in names:
                file = Path(above, name)
                relative = os.path.relpath(file, root)
                if relative not in seen:
                    seen.add(relative)
                    yield relative, file.stat().st_size, file.stat().st_mtime_ns


def directories_of(tree: Tree, path: str = ".") -> Iterator[str]:
    if isinstance(tree, dict):
        yield path
        for name, below in tree.items():
            yield from directories_of(below, f"{path}/{name}".removeprefix("./"))


@given(tree=ROOTS, data=st.data())
@pytest.mark.expected_events("file.skipped")
def test_walk_finds_what_os_walk_finds(scratch: Path, tree: Tree, data: st.DataObject) -> None:
    root = Path(tempfile.mkdtemp(dir=scratch)) / "root"
    plant(tree, root)
    known = st.sampled_from(["a", "./ab/", *directories_of(tree), "missing"])
    directories = data.draw(st.lists(known, min_size=1, max_size=4))

    found = [(file.path, file.size, file.mtime_ns) for file in walk(root, directories)]

    assert sorted(found) == sorted(expected(root, directories))
    shutil.rmtree(root.parent)
