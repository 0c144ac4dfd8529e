"""All blobs there could be, as files by their hash."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_plugin.content.digest import EMPTY_HASH, Digest
from agent_plugin.content.errors import LocalReadError
from vfs.by_hash import ByHash
from vfs.tree import ROOT

BLOB = Digest.of(b"a blob")
NAME = f"{BLOB.hex}.{BLOB.size}".encode()


@pytest.fixture
def told() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def found(names: ByHash, digest: Digest) -> int:
    directory = names.lookup(ROOT, digest.hex[:2].encode())
    assert directory is not None
    node = names.lookup(directory, f"{digest.hex}.{digest.size}".encode())
    assert node is not None
    return node


def test_every_blob_is_found_by_its_name_and_is_what_that_says(told: int) -> None:
    names = ByHash(told)
    blobs = [BLOB, Digest.of(), *(Digest.of(b"%d" % at) for at in range(1000))]
    nodes = [found(names, digest) for digest in blobs]

    assert len(set(nodes)) == len(blobs)
    assert nodes == [found(names, digest) for digest in blobs]
    for node, digest in zip(nodes, blobs, strict=True):
        assert names.exists(node)
        assert not names.is_directory(node)
        assert (names.digest(node), names.size(node)) == (digest, digest.size)
        assert names.entry(node).path == f"{digest.hex[:2]}/{digest.hex}.{digest.size}"
        assert names.parent(node) == names.lookup(ROOT, digest.hex[:2].encode())
        assert names.nodes_of(digest.hex) == [node]
        assert names.find(names.entry(node).path) == node
    assert names.files == len(blobs)
    assert not names.exists(len(names) + 1)


def test_directories_are_those_of_the_first_two_digits_and_list_no_blobs(told: int) -> None:
    names = ByHash(told)
    node = found(names, BLOB)
    directories = names.names(ROOT)
    assert list(directories) == [b"%02x" % at for at in range(256)]
    assert names.names(names.parent(node)) == {}
    for directory in directories.values():
        assert names.is_directory(directory)
        assert names.parent(directory) == ROOT
        with pytest.raises(IsADirectoryError):
            names.entry(directory)
    with pytest.raises(NotADirectoryError):
        names.names(node)
    assert names.find(names.entry(node).path + "/x") is None
    assert names.find("ab/x") is None


@pytest.mark.parametrize(
    "name",
    [
        b"", b".", b"..", b"x", NAME[:-1], NAME + b"0" * 20, NAME + b"\n", NAME.upper(),
        b" " + NAME,
        BLOB.hex.encode(), BLOB.hex.encode() + b".", BLOB.hex.encode() + b".06",
        BLOB.hex.encode() + b".-6", BLOB.hex.encode() + b".0", EMPTY_HASH.encode() + b".1",
        BLOB.hex.encode() + b".9223372036854775808", NAME + b"/x",
    ],
)  # fmt: skip
def test_a_name_of_another_form_is_nothing_and_makes_no_node(told: int, name: bytes) -> None:
    names = ByHash(told)
    before = len(names)
    directory = names.lookup(ROOT, BLOB.hex[:2].encode())
    assert directory is not None
    assert names.lookup(directory, name) is None
    assert names.lookup(ROOT, NAME) is None
    assert names.lookup(directory + 1, NAME) is None
    assert len(names) == before
    assert os.fstat(told).st_size == 0


@given(st.lists(st.binary(max_size=6), max_size=30), st.integers(0, 23))
def test_whoever_comes_after_a_killed_server_has_the_same_nodes(
    contents: list[bytes], written: int
) -> None:
    """Seen to fail when a record that was not written whole is left where it is."""
    with tempfile.TemporaryFile() as file:
        first = ByHash(file.fileno())
        nodes = {digest: found(first, digest) for digest in map(Digest.of, contents)}
        # Killed while one more was written.
        os.pwrite(file.fileno(), b"\xff" * written, os.fstat(file.fileno()).st_size)
        second = ByHash(file.fileno())
        assert {digest: second.digest(node) for digest, node in nodes.items()} == {
            digest: digest for digest in nodes
        }
        new = found(second, BLOB)
        third = ByHash(file.fileno())
        assert third.digest(new) == BLOB
        assert len(third) == len(second)
        assert all(found(third, digest) == node for digest, node in nodes.items())


def test_a_file_of_nodes_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(LocalReadError, match="nodes by hash"):
            ByHash(fd)
    finally:
        os.close(fd)
