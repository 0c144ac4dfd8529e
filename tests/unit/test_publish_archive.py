"""Archives of outputs: the same outputs make the same bytes, and nothing else is ever finished."""

import hashlib
import io
import itertools
import os
import random
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import CancelledError, FileChangedError, PathClashError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.archive import (
    KEPT_BYTES,
    PIECE_BYTES,
    InOrder,
    archive,
    measure,
    read_verified,
)
from agent_plugin.publish.outputs import Output, RootOutputs, opened
from tests.servers.trees import write_files

MTIME = 1_700_000_000_123_456


def root_of(directory: Path, *paths: str | bytes, name: str = "assetroot-0") -> RootOutputs:
    entries = []
    for path in paths:
        shown = os.fsdecode(path)
        data = Path(directory, shown).read_bytes()
        entries.append(FileEntry(Digest.of(data).hex, MTIME, shown, len(data)))
    return RootOutputs(directory, follow=True, directory=name, entries=entries)


@contextmanager
def outputs_of(root: RootOutputs, *more: RootOutputs) -> Iterator[list[Output]]:
    with opened([root, *more], by_root=False, owner=None) as outputs:
        yield outputs


def bytes_of(outputs: list[Output], encoding: str = "gzip", *, zero_mtime: bool = False) -> bytes:
    pieces = archive(outputs, encoding, zero_mtime=zero_mtime, cancellation=Cancellation())
    return b"".join(pieces)


def plain(data: bytes, encoding: str) -> tarfile.TarFile:
    if encoding == "zstd":
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        return tarfile.open(fileobj=io.BytesIO(data), mode="r:")
    return tarfile.open(fileobj=io.BytesIO(data), mode="r:gz")


NAMES: tuple[str | bytes, ...] = (
    "b/0002.exr",
    "a",
    "b/0001.exr",
    "empty",
    "ä/日本.exr",
    b"latin-\xe9",
    "x" * 200 + "/" + "y" * 200,
    "line\nbreak",
)


@pytest.fixture
def root(tmp_path: Path) -> RootOutputs:
    sizes = {name: 0 if name == "empty" else 1000 + 511 * at for at, name in enumerate(NAMES)}
    write_files(tmp_path / "root", dict(sizes), mtime_ns=0)
    return root_of(tmp_path / "root", *NAMES)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_o2_an_archive_holds_the_outputs_and_nothing_of_the_host(
    root: RootOutputs, encoding: str
) -> None:
    with outputs_of(root) as outputs:
        data = bytes_of(outputs, encoding)

    with plain(data, encoding) as found:
        members = found.getmembers()
        held = {member.name: found.extractfile(member) for member in members}
        assert {name: file and file.read() for name, file in held.items()} == {
            entry.path: (root.local_root / entry.path).read_bytes() for entry in root.entries
        }
    order = [os.fsencode(member.name) for member in members]
    assert order == sorted(order)
    assert {(m.uid, m.gid, m.uname, m.gname, m.mode, m.mtime) for m in members} == {
        (0, 0, "", "", 0o644, MTIME // 1_000_000)
    }
    assert all(member.isreg() for member in members)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_o2_the_same_outputs_make_the_same_archive(
    root: RootOutputs, encoding: str, tmp_path: Path
) -> None:
    """Times, owners and modes of the files on this host, and their order, say nothing."""
    other = tmp_path / "other"
    for entry in reversed(root.entries):
        path = other / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((root.local_root / entry.path).read_bytes())
        path.chmod(0o700)
    copy = RootOutputs(other, follow=True, directory="x", entries=root.entries[::-1])

    with outputs_of(root) as ones, outputs_of(copy) as others:
        assert bytes_of(ones, encoding) == bytes_of(others, encoding)


def test_o2_with_times_of_zero_only_names_and_bytes_count(root: RootOutputs) -> None:
    later = [FileEntry(e.hash, e.mtime + 10**9, e.path, e.size) for e in root.entries]
    touched = RootOutputs(root.local_root, follow=True, directory="x", entries=later)

    with outputs_of(root) as ones, outputs_of(touched) as others:
        assert bytes_of(ones, zero_mtime=True) == bytes_of(others, zero_mtime=True)
        assert bytes_of(ones) != bytes_of(others)
        with plain(bytes_of(ones, zero_mtime=True), "gzip") as found:
            assert {member.mtime for member in found} == {0}


def test_o2_programs_of_others_read_it(root: RootOutputs, tmp_path: Path) -> None:
    with outputs_of(root) as outputs:
        (tmp_path / "a.tar.gz").write_bytes(bytes_of(outputs))
    (tmp_path / "out").mkdir()

    subprocess.run(
        ["tar", "-xzf", tmp_path / "a.tar.gz", "-C", tmp_path / "out"], check=True, timeout=30
    )

    for entry in root.entries:
        assert (tmp_path / "out" / entry.path).read_bytes() == (
            root.local_root / entry.path
        ).read_bytes()


@pytest.mark.parametrize("mtime", [-(10**15), 0, 2**33 * 1_000_000, 253_402_300_799_000_000])
def test_o2_any_time_that_an_output_can_have_is_kept(tmp_path: Path, mtime: int) -> None:
    (tmp_path / "a").write_bytes(b"a")
    entry = FileEntry(Digest.of(b"a").hex, mtime, "a", 1)

    with outputs_of(RootOutputs(tmp_path, follow=True, directory="", entries=[entry])) as outputs:
        data = bytes_of(outputs)

    with plain(data, "gzip") as found:
        assert [member.mtime for member in found] == [mtime // 1_000_000]


@pytest.mark.parametrize("change", ["longer", "shorter", "other", "gone", "a link out"])
def test_o2_a_file_that_is_not_what_was_stored_makes_no_archive(
    root: RootOutputs, change: str
) -> None:
    path = root.local_root / "b/0001.exr"
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        changed = {"longer": data + b"x", "shorter": data[:-1]}.get(change, b"x" + data[1:])
        path.write_bytes(changed)

    with outputs_of(root) as outputs, pytest.raises(FileChangedError, match=r"b/0001\.exr"):
        bytes_of(outputs)


def test_o2_whoever_asks_for_parts_gets_the_measured_bytes_or_not_the_last(
    root: RootOutputs,
) -> None:
    with outputs_of(root) as outputs:
        data = bytes_of(outputs)
    whole = measure(iter([data]))
    part = len(data) // 3 + 1
    offsets = range(0, len(data), part)

    def parts_of(pieces: list[bytes], sha256: str = whole.sha256) -> list[bytes]:
        reader = InOrder(iter(pieces), len(data), sha256)
        return [reader.read(at, min(part, len(data) - at)) for at in offsets]

    assert b"".join(parts_of([data])) == data
    assert b"".join(parts_of([data[at : at + 7] for at in range(0, len(data), 7)])) == data
    for pieces in ([data, b"x"], [data[:-1]], [data[:-1] + b"x"]):
        with pytest.raises(FileChangedError):
            parts_of(pieces)


def test_o2_what_is_measured_is_kept_only_if_it_is_small() -> None:
    small = measure([b"a", b"", b"bc"])
    large = measure(itertools.repeat(bytes(PIECE_BYTES), KEPT_BYTES // PIECE_BYTES + 1))

    assert (small.size, small.data) == (3, b"abc")
    assert small.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert small.checksum == "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="
    assert (large.size, large.data) == (KEPT_BYTES + PIECE_BYTES, None)
    assert large.sha256 == hashlib.sha256(bytes(KEPT_BYTES + PIECE_BYTES)).hexdigest()


def test_o2_memory_is_bounded_whatever_the_size_of_a_file(tmp_path: Path) -> None:
    size = 96 * 1024 * 1024
    data = random.Random(0).randbytes(1024 * 1024) * 96
    (tmp_path / "large").write_bytes(data)
    root = root_of(tmp_path, "large")
    del data

    with outputs_of(root) as outputs:
        tracemalloc.start()
        pieces = archive(outputs, "zstd", zero_mtime=False, cancellation=Cancellation())
        seen = sum(map(len, pieces))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    assert seen > 1024 * 1024
    assert peak < size // 8


def test_o2_an_archive_that_nobody_wants_any_more_stops(root: RootOutputs) -> None:
    cancellation = Cancellation()
    cancellation.cancel()

    with outputs_of(root) as outputs, pytest.raises(CancelledError):
        list(archive(outputs, "gzip", zero_mtime=False, cancellation=cancellation))


def test_o1_what_is_read_is_what_was_stored(root: RootOutputs) -> None:
    with outputs_of(root) as outputs:
        for output in outputs:
            read = b"".join(read_verified(output))
            assert Digest.of(read) == output.entry.digest


# ------------------------------------------------------------------------------- several roots


def test_o1_files_of_two_roots_stand_beside_each_other(tmp_path: Path) -> None:
    write_files(tmp_path / "one", {"a/x": b"1"}, mtime_ns=0)
    write_files(tmp_path / "two", {"a/y": b"2"}, mtime_ns=0)

    with outputs_of(root_of(tmp_path / "one", "a/x"), root_of(tmp_path / "two", "a/y")) as outputs:
        assert [output.path for output in outputs] == ["a/x", "a/y"]


@pytest.mark.parametrize(("one", "two"), [("a/x", "a/x"), ("a", "a/x"), ("a/b/c", "a")])
def test_o1_files_of_two_roots_that_clash_are_refused_unless_each_root_has_a_name(
    tmp_path: Path, one: str, two: str
) -> None:
    write_files(tmp_path / "one", {one: b"1"}, mtime_ns=0)
    write_files(tmp_path / "two", {two: b"2"}, mtime_ns=0)
    roots = [
        root_of(tmp_path / "one", one, name="assetroot-1"),
        root_of(tmp_path / "two", two, name="assetroot-2"),
    ]

    with (
        pytest.raises(PathClashError, match="can not both be published"),
        opened(roots, by_root=False, owner=None),
    ):
        pass
    with opened(roots, by_root=True, owner=None) as outputs:
        assert [output.path for output in outputs] == [f"assetroot-1/{one}", f"assetroot-2/{two}"]
