"""What killed runs left goes, and nothing else."""

import os
from pathlib import Path

import pytest

from agent_plugin.content import leftovers
from agent_plugin.content.leftovers import (
    is_partial,
    lock_partial,
    partial_name,
    prune,
    remove_partials,
    remove_tree,
)
from agent_plugin.content.safe_path import Root
from tests.servers.other_user import NOBODY, being_nobody


def everything_below(root: Path) -> list[str]:
    return sorted(os.fspath(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (partial_name("7-5f5e100"), True),
        (".propmaster-.partial", True),
        (".propmaster-notes", False),
        ("render.partial", False),
        ("x.propmaster-1.partial", False),
    ],
)
def test_only_our_own_names_are_reserved(name: str, expected: bool) -> None:
    assert is_partial(name) is expected


def test_pruning_leaves_the_named_files_and_the_directories_on_their_way(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("a/b/kept", "a/b/half", "a/other/deep/x", "kept", "wrong/x", "a/.propmaster-1"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1")
    outside.mkdir()
    (outside / "precious").write_bytes(b"mine")
    (root / "link").symlink_to(outside)
    (root / "linked").symlink_to(outside)
    (root / "empty/one").mkdir(parents=True)
    os.mkfifo(root / "a/fifo")
    (root / "a/named fifo").parent.mkdir(exist_ok=True)
    os.mkfifo(root / "a/named fifo")

    with Root(tmp_path) as opened:
        prune(opened, "missing", ["a"])
        prune(
            opened,
            "root",
            ["a/b/kept", "kept", "wrong", "linked/precious", "a/named fifo", "new/x"],
        )

    assert everything_below(root) == ["a", "a/b", "a/b/kept", "kept"]
    assert (outside / "precious").read_bytes() == b"mine"


def test_a_tree_deeper_than_descriptors_and_paths_allow_is_removed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    name = "tree"
    for _ in range(3000):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd, name = below, "d" * 20
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)

    with Root(tmp_path) as opened:
        remove_tree(opened.fd, "tree")
        remove_tree(opened.fd, "tree")

    assert everything_below(tmp_path) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").write_bytes(b"mine")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/inside").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(tmp_path / "outside")

    with Root(tmp_path) as opened:
        remove_tree(opened.fd, "root")
        remove_tree(opened.fd, "link")

    assert everything_below(tmp_path) == ["outside", "outside/precious"]


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o222, 0o444, 0o555])
def test_a_tree_is_removed_whose_owner_took_his_own_rights_away(tmp_path: Path, mode: int) -> None:
    for name in ("tree/a/b/c/x", "tree/x", "tree/a/x", "tree/empty/below/deeper/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    everything = sorted(tmp_path.rglob("*"), reverse=True)
    for path in (*everything, tmp_path):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(mode)
    parent = os.open(tmp_path, os.O_PATH)

    try:
        with being_nobody():
            remove_tree(parent, "tree")
    finally:
        os.close(parent)

    assert everything_below(tmp_path) == []


def test_what_belongs_to_somebody_else_is_told_by_its_path_and_removed_later(
    tmp_path: Path,
) -> None:
    (tmp_path / "tree/a/theirs").mkdir(parents=True)
    (tmp_path / "tree/a/theirs/x").write_bytes(b"1")
    for path in (tmp_path, tmp_path / "tree", tmp_path / "tree/a"):
        os.chown(path, NOBODY, NOBODY)
    with Root(tmp_path) as opened:
        with being_nobody(), pytest.raises(PermissionError) as caught:
            remove_tree(opened.fd, "tree")
        assert caught.value.filename == "tree/a/theirs"
        os.chown(tmp_path / "tree/a/theirs", NOBODY, NOBODY)
        with being_nobody():
            remove_tree(opened.fd, "tree")

    assert everything_below(tmp_path) == []


def test_where_nobody_else_writes_every_temporary_file_is_a_leftover(tmp_path: Path) -> None:
    (tmp_path / partial_name("1-aa")).write_bytes(b"half")
    (tmp_path / partial_name("link")).symlink_to("/etc/passwd")
    (tmp_path / partial_name("directory")).mkdir()
    (tmp_path / "mine").write_bytes(b"mine")

    with Root(tmp_path) as opened:
        remove_partials(opened.fd, exclusive=True)

    assert everything_below(tmp_path) == [partial_name("directory"), "mine"]


def test_where_others_write_a_file_goes_that_nobody_touched_for_an_hour_or_has_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, left = tmp_path / partial_name("held"), tmp_path / partial_name("left")
    for path in (held, left):
        path.write_bytes(b"half")
        # The entry's time is set before the file gets its name, and may be of any year.
        os.utime(path, (0, 0))

    with Root(tmp_path) as opened, held.open("r+b") as file:
        assert lock_partial(file.fileno())
        remove_partials(opened.fd, exclusive=False)
        assert everything_below(tmp_path) == [held.name, left.name]
        # Nothing can set a ctime back.
        monkeypatch.setattr(leftovers, "ABANDONED_SECONDS", -1.0)
        remove_partials(opened.fd, exclusive=False)

    assert everything_below(tmp_path) == [held.name]
