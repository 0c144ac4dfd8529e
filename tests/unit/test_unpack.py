"""Hostile archives, made with tarfile and by hand: each is refused, and nothing gets out."""

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from agent_plugin.content.errors import ArchiveUnsafeError, CancelledError
from agent_plugin.content.safe_path import Root
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.unpack import (
    MAX_HEADER_BYTES,
    Unpacked,
    UnpackLimits,
    leads_inside,
    unpack,
)

MEBIBYTE = 1024 * 1024
LIMITS = UnpackLimits(file_bytes=MEBIBYTE, total_bytes=4 * MEBIBYTE, members=1000)

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", **changes: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    return member(name, type=kind, linkname=target)


def directory(name: str) -> Member:
    return member(name, type=tarfile.DIRTYPE, mode=0o755)


def tar_of(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=form, errors="surrogateescape") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


class Place:
    """A directory to unpack to, in one that nothing may change."""

    def __init__(self, tmp_path: Path) -> None:
        self.outside = tmp_path
        self.directory = tmp_path / "results"
        self.directory.mkdir()
        (tmp_path / "victim").write_bytes(b"mine")

    def unpack(
        self,
        tar: bytes,
        *,
        limits: UnpackLimits = LIMITS,
        cancellation: Cancellation | None = None,
        **more: str,
    ) -> Unpacked:
        with Root(self.directory) as root:
            return unpack(
                io.BytesIO(gzip.compress(tar, 1)),
                root,
                limits,
                source="s3://bucket/run.tar.gz",
                cancellation=cancellation or Cancellation(),
                **more,
            )

    def names(self) -> list[str]:
        return sorted(
            path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*")
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_o7_an_archive_becomes_its_files_with_time_and_the_right_to_execute(place: Place) -> None:
    made = place.unpack(
        tar_of(
            directory("."),
            directory("empty"),
            member("./a/b.exr", b"pixels", mtime=1_700_000_000.25, mode=0o600),
            member("run.sh", b"#!", mode=0o6755),
            member(os.fsdecode(b"latin-\xe9"), b"1"),
            link("a/latest", "b.exr"),
            link("a/second", "a/b.exr", tarfile.LNKTYPE),
        )
    )

    assert made.files == {"a/b.exr": 6, "run.sh": 2, os.fsdecode(b"latin-\xe9"): 1, "a/second": 6}
    assert made.links == {"a/latest": "b.exr"}
    assert (place.directory / "a/latest").read_bytes() == b"pixels"
    assert (place.directory / "a/second").read_bytes() == b"pixels"
    assert (place.directory / "empty").is_dir()
    facts = (place.directory / "a/b.exr").stat()
    assert facts.st_mtime_ns == 1_700_000_000_250_000_000
    assert stat.S_IMODE(facts.st_mode) & 0o111 == 0
    mode = stat.S_IMODE((place.directory / "run.sh").stat().st_mode)
    assert mode & 0o100
    assert not mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX)


HOSTILE: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "absolute": (lambda: tar_of(member("/tmp/x", b"1")), "/tmp/x", "absolute"),
    "parent": (lambda: tar_of(member("a/../../victim", b"1")), "a/../../victim", "`..`"),
    "parent directory": (lambda: tar_of(directory("..")), "..", "`..`"),
    "link to the root": (lambda: tar_of(link("x", "/etc")), "x", "link to '/etc'"),
    "link up": (lambda: tar_of(link("a/x", "../../victim")), "a/x", "may lead out"),
    "link up after a name": (lambda: tar_of(link("x", "a/../../victim")), "x", "may lead out"),
    "through a link": (
        lambda: tar_of(directory("d"), link("x", "d"), member("x/y", b"1")),
        "x/y",
        "another member is in the way",
    ),
    "a link that a file replaces": (
        lambda: tar_of(link("x", "y"), member("x", b"1")),
        "x",
        "twice",
    ),
    "hard link out": (
        lambda: tar_of(link("x", "../victim", tarfile.LNKTYPE)),
        "x",
        "hard link to '../victim'",
    ),
    "hard link to a link": (
        lambda: tar_of(link("y", "z"), link("x", "y", tarfile.LNKTYPE)),
        "x",
        "no file of the archive",
    ),
    "device": (
        lambda: tar_of(member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
        "null",
        "a character device",
    ),
    "block device": (lambda: tar_of(member("sda", type=tarfile.BLKTYPE)), "sda", "a block device"),
    "fifo": (lambda: tar_of(member("pipe", type=tarfile.FIFOTYPE)), "pipe", "a fifo"),
    "unknown type": (lambda: tar_of(member("x", type=b"Z")), "x", ""),
    "twice": (lambda: tar_of(member("x", b"1"), member("./x", b"2")), "./x", "twice"),
    "file and directory": (
        lambda: tar_of(member("x", b"1"), member("x/y", b"2")),
        "x/y",
        "another member is in the way",
    ),
    "long name": (lambda: tar_of(member("x" * 256, b"1")), "x", "longer than 255"),
    "our temporary name": (
        lambda: tar_of(member(".propmaster-x.partial", b"1")),
        ".propmaster-x.partial",
        "kept for temporary files",
    ),
    "the top as a file": (lambda: tar_of(member(".", b"1")), ".", "directory itself"),
    "a file that is too large": (
        lambda: tar_of(member("big", bytes(MEBIBYTE + 1))),
        "big",
        f"{MEBIBYTE + 1} bytes are more than {MEBIBYTE}",
    ),
    "all together too large": (
        lambda: tar_of(*(member(f"f{n}", bytes(MEBIBYTE)) for n in range(5))),
        "f4",
        "all files together",
    ),
    "too many": (
        lambda: tar_of(*(member(f"f{n}") for n in range(1001))),
        "f1000",
        "more than 1000 members",
    ),
    "sparse": (
        lambda: tar_of(
            member(
                "x",
                b"0\n".ljust(512, b"\0"),
                pax_headers={
                    "GNU.sparse.major": "1",
                    "GNU.sparse.minor": "0",
                    "GNU.sparse.name": "hole",
                    "GNU.sparse.realsize": "1000",
                },
            )
        ),
        "hole",
        "sparse",
    ),
    "negative size": (
        lambda: tar_of(member("x", pax_headers={"size": "-512"}), member("y", b"1")),
        "x",
        "",
    ),
    "no number for a time": (
        lambda: tar_of(member("x", b"1", pax_headers={"mtime": "nan"})),
        "x",
        "damaged",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_o7_a_hostile_member_is_refused_by_name_and_reason(place: Place, kind: str) -> None:
    make, name, reason = HOSTILE[kind]

    with pytest.raises(ArchiveUnsafeError) as caught:
        place.unpack(make())

    assert "s3://bucket/run.tar.gz" in caught.value.message
    assert f"member {name!r}"[:40].rstrip("'") in caught.value.message
    assert reason in caught.value.message
    assert (place.outside / "victim").read_bytes() == b"mine"
    assert {path.name for path in place.outside.iterdir()} == {"victim", "results"}


def test_o7_a_long_path_of_short_names_is_a_files(place: Place) -> None:
    name = "/".join(["directory" * 10] * 12)

    assert place.unpack(tar_of(member(name, b"deep"))).files == {name: 4}


def test_o7_a_stream_that_inflates_for_ever_ends_at_the_limit(place: Place) -> None:
    """Nobody asked for the large member, so only the stream that is passed over can be counted."""
    limits = UnpackLimits(file_bytes=MEBIBYTE, total_bytes=MEBIBYTE, members=10)
    bomb = tar_of(member("x", b"1"), member("y", bytes(64 * MEBIBYTE)), member("z", b"2"))

    with pytest.raises(ArchiveUnsafeError, match="it becomes more than 1212416 bytes"):
        place.unpack(bomb, limits=limits, only="x")
    assert place.names() == ["x"]


def test_o7_a_header_that_announces_gigabytes_is_refused_before_it_is_read(place: Place) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 8 * 1024**3
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * MEBIBYTE)

    with pytest.raises(ArchiveUnsafeError, match=f"more than {MAX_HEADER_BYTES} bytes"):
        place.unpack(data)


def test_o7_a_chain_of_headers_ends_as_an_error_of_the_archive(place: Place) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 1
    data = (info.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 5000

    with pytest.raises(ArchiveUnsafeError, match="damaged"):
        place.unpack(data)


@pytest.mark.parametrize("cut", [600, 1100, 2000])
def test_o7_an_archive_that_ends_early_is_damaged(place: Place, cut: int) -> None:
    whole = tar_of(member("a", bytes(1000)), member("b", bytes(1000)))

    with pytest.raises(ArchiveUnsafeError, match="damaged"):
        place.unpack(whole[:cut])


@pytest.mark.parametrize("padding", [0, 100_000, 256 * 1024])
def test_o7_an_archive_is_read_to_its_checksum(tmp_path: Path, padding: int) -> None:
    """Python's reader ends where the tar archive does; seen if that is a multiple of 256 KiB."""
    tar = tar_of(member("a", bytes(250_000)))[: 256 * 1024].ljust(256 * 1024, b"\0")
    data = bytearray(gzip.compress(tar + bytes(padding), 1))
    data[-8] ^= 1

    with Root(tmp_path) as root, pytest.raises(ArchiveUnsafeError, match="damaged: CRC"):
        unpack(io.BytesIO(data), root, LIMITS, source="x", cancellation=Cancellation())


def test_o7_a_zstandard_archive_may_have_frames_that_are_skipped(tmp_path: Path) -> None:
    """Program pzstd begins each frame with one."""
    tar = tar_of(member("a", b"1"), member("b", b"2"))
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00size"
    data = b"".join(skipped + zstandard.compress(part) for part in (tar[:1000], tar[1000:]))

    with Root(tmp_path) as root:
        made = unpack(io.BytesIO(data), root, LIMITS, source="x", cancellation=Cancellation())

    assert made.files == {"a": 1, "b": 1}


def test_o7_a_header_that_was_changed_is_no_end_of_the_archive(place: Place) -> None:
    """Python's reader takes a wrong checksum for the end, and would leave the rest out."""
    whole = bytearray(tar_of(member("a", b"1"), member("b", b"2"), form=tarfile.USTAR_FORMAT))
    whole[1024] ^= 1

    with pytest.raises(ArchiveUnsafeError, match="damaged: bad checksum"):
        place.unpack(bytes(whole))


@pytest.mark.parametrize(
    "data", [b"", b"\x1f\x8b", b"no archive at all", gzip.compress(b"x", mtime=0)[:12]]
)
def test_o7_what_is_no_archive_is_said_to_be_damaged(tmp_path: Path, data: bytes) -> None:
    with Root(tmp_path) as root, pytest.raises(ArchiveUnsafeError, match="damaged"):
        unpack(io.BytesIO(data), root, LIMITS, source="x", cancellation=Cancellation())


def test_o7_only_what_was_asked_for_is_made_and_below_the_given_directory(place: Place) -> None:
    tar = tar_of(member("a/1", b"1"), member("a/b/2", b"2"), member("ab", b"3"), member("c", b"4"))

    made = place.unpack(tar, only="a", below="run-1")

    assert made.files == {"a/1": 1, "a/b/2": 1}
    assert place.names() == ["run-1", "run-1/a", "run-1/a/1", "run-1/a/b", "run-1/a/b/2"]


def test_o7_a_hard_link_that_was_asked_for_has_the_bytes_of_a_file_that_was_not(
    place: Place,
) -> None:
    """Seen to be refused as a link to no file of the archive."""
    tar = tar_of(
        member("a/one", b"one", mtime=5),
        link("a/second", "a/one", tarfile.LNKTYPE),
        link("b/third", "a/second", tarfile.LNKTYPE),
        link("b/fourth", "b/third", tarfile.LNKTYPE),
        link("b/fifth", "a/one", tarfile.LNKTYPE),
        member("b/other", b"other"),
        link("b/sixth", "b/other", tarfile.LNKTYPE),
    )

    made = place.unpack(tar, below="there", only="b")

    links = {"b/third": 3, "b/fourth": 3, "b/fifth": 3}
    assert made.files == {"b/other": 5, "b/sixth": 5, **links}
    assert place.names() == ["there", "there/b", *sorted(f"there/{path}" for path in made.files)]
    for path in links:
        file = place.directory / "there" / path
        assert (file.read_bytes(), file.stat().st_mtime) == (b"one", 5)
    with pytest.raises(ArchiveUnsafeError, match="3 bytes are more than 2"):
        place.unpack(tar, limits=UnpackLimits(2, 2, 99), below="again", only="b/third")


def test_o7_unpacking_ends_on_request(place: Place) -> None:
    cancellation = Cancellation()
    cancellation.cancel()

    with pytest.raises(CancelledError):
        place.unpack(tar_of(member("x", b"1")), cancellation=cancellation)


@pytest.mark.parametrize(
    ("path", "target", "inside"),
    [
        ("x", "y", True),
        ("x", "./y/z", True),
        ("a/x", "../y", True),
        ("a/b/x", "../../y", True),
        ("x", "../y", False),
        ("a/x", "../../y", False),
        ("a/x", "b/../y", False),
        ("x", "/y", False),
        ("x", "", False),
        ("x", "y\0", False),
        ("a/x", "..", True),
        ("x", "..", False),
    ],
)
def test_o7_a_link_leads_inside_only_if_that_is_sure(path: str, target: str, inside: bool) -> None:
    assert leads_inside(path, target) is inside
