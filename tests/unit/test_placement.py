"""A file is under its name whole, right and with its time, or not at all; on every file system."""

import errno
import fcntl
import mmap
import os
import random
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobCorruptError,
    CancelledError,
    LocalWriteError,
    NoSpaceError,
    PathClashError,
    PropmasterError,
    UnsafePathError,
)
from agent_plugin.content.leftovers import partial_name
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer import placement
from agent_plugin.transfer.placement import CacheCopy, Placer
from tests.servers.descriptors import open_below
from tests.servers.disks import fill, image_mounted, tmpfs_mounted, use_up_inodes

MEBIBYTE = 1024 * 1024
LABEL = "7-5f5e100"
# 2021-06-01 and a bit; every digit counts.
MTIME_US = 1_622_505_600_123_457
# ext4 ends in 2446: https://www.kernel.org/doc/html/latest/filesystems/ext4/inodes.html
LAST_US = 15_032_385_534_999_999


def entry(path: str | bytes, data: bytes, *, mtime: int = MTIME_US) -> FileEntry:
    digest = Digest.of(data)
    return FileEntry(hash=digest.hex, mtime=mtime, path=os.fsdecode(path), size=digest.size)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def placer(root: Path) -> Iterator[Placer]:
    with Placer(root, LABEL) as opened:
        yield opened


def everything_below(root: Path) -> list[str]:
    return sorted(os.fspath(path.relative_to(root)) for path in root.rglob("*"))


def source_of(data: bytes, directory: Path) -> int:
    """Return a descriptor of an unnamed file on a file system; the caller closes it."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(data)
        file.flush()
        return os.dup(file.fileno())


def place_copy(placer: Placer, wanted: FileEntry, data: bytes, *, source_on: Path) -> None:
    fd = source_of(data, source_on)
    try:
        placer.place_copy(wanted, fd)
    finally:
        os.close(fd)


# -------------------------------------------------------------------------------- what is staged


def test_a_staged_file_gets_its_place_whole_and_with_its_time(placer: Placer, root: Path) -> None:
    data = random.Random(3).randbytes(100_000)
    (root / "a").mkdir()
    (root / "a/b").write_bytes(b"old")

    staged = placer.stage()
    os.pwrite(staged.fd, data, 0)
    assert (root / "a/b").read_bytes() == b"old"
    placer.place_staged(entry("a/b", data), staged)
    staged.close()

    assert everything_below(root) == ["a", "a/b"]
    assert (root / "a/b").read_bytes() == data
    assert (root / "a/b").stat().st_mtime_ns == MTIME_US * 1000


def test_a_staged_file_that_gets_no_place_is_gone(placer: Placer, root: Path) -> None:
    (root / "in the way").mkdir()
    first, second = placer.stage(), placer.stage()

    with pytest.raises(PathClashError, match="in the way"):
        placer.place_staged(entry("in the way", b""), first)
    first.close()
    second.close()

    assert everything_below(root) == ["in the way"]


def test_a_staged_file_is_gone_though_the_root_was_closed_before(root: Path) -> None:
    """A thread that was left behind may be the last to have it."""
    with Placer(root, LABEL) as placer:
        staged = placer.stage()

    staged.close()

    assert everything_below(root) == []


def test_what_a_killed_run_had_staged_is_removed_by_the_next(root: Path) -> None:
    killed = Placer(root, LABEL, exclusive=True)
    killed.stage()
    assert len(everything_below(root)) == 1

    with Placer(root, "8-0", exclusive=True) as placer:
        staged = placer.stage()
        placer.place_staged(entry("sub/one", b""), staged)
        staged.close()

    killed.close()
    assert everything_below(root) == ["sub", "sub/one"]


def test_what_another_transfer_has_staged_stays(root: Path) -> None:
    with Placer(root, "1-aa") as first, Placer(root, "1-bb") as second:
        staged = first.stage()
        second.place_data(entry("one", b"1"), b"1")
        first.place_staged(entry("two", b""), staged)
        staged.close()

    assert everything_below(root) == ["one", "two"]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlobCache]:
    with BlobCache.open(
        tmp_path / "cache", store_url="file:///s", max_bytes=1 << 30, min_free_bytes=0
    ) as opened:
        yield opened


def copied(cache: BlobCache, placer: Placer, data: bytes, *, piece: int, aligned: bool) -> bytes:
    """Return what is in the cache of a blob that was given to a CacheCopy piece by piece."""
    digest = Digest.of(data)
    staged = placer.stage()
    os.pwrite(staged.fd, data, 0)
    with cache.staging(digest.size) as kept, mmap.mmap(-1, piece + 1) as memory:
        copy = CacheCopy(kept, staged, clones=placer.can_clone(staged, kept.fd))
        buffer = memoryview(memory)[0 if aligned else 1 :]
        for offset in range(0, len(data), piece):
            part = data[offset : offset + piece]
            buffer[: len(part)] = part
            copy.take(buffer[: len(part)], offset)
        buffer.release()
        copy.publish(digest)
    staged.close()
    found = cache.read_by_hash(digest.hex, max_bytes=len(data))
    assert found is not None
    return found


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("piece", [placement.BLOCK_BYTES * 16, 100_001])
@pytest.mark.parametrize("size", [1, placement.BLOCK_BYTES * 48, 3_000_001])
def test_the_copy_for_the_cache_is_what_was_hashed(
    cache: BlobCache, placer: Placer, size: int, piece: int, aligned: bool
) -> None:
    data = random.Random(size).randbytes(size)

    assert copied(cache, placer, data, piece=piece, aligned=aligned) == data


def test_the_copy_for_the_cache_is_the_same_blocks_where_that_can_be(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 * MEBIBYTE)
    with (
        image_mounted("xfs", tmp_path / "image", tmp_path / "disk") as disk,
        Placer(disk / "root", LABEL) as placer,
        BlobCache.open(
            disk / "cache", store_url="file:///s", max_bytes=1 << 30, min_free_bytes=0
        ) as cache,
    ):
        staged = placer.stage()
        with cache.staging(len(data)) as kept:
            assert placer.can_clone(staged, kept.fd)
        staged.close()
        assert copied(cache, placer, data, piece=MEBIBYTE, aligned=True) == data


def test_a_copy_for_the_cache_that_lacks_something_is_not_published(
    cache: BlobCache, placer: Placer
) -> None:
    staged = placer.stage()
    with cache.staging(9) as kept:
        copy = CacheCopy(kept, staged, clones=False)
        copy.take(memoryview(b"x" * 8), 0)
        with pytest.raises(BlobCorruptError):
            copy.publish(Digest.of(b"x" * 9))
    staged.close()

    assert not cache.contains(Digest.of(b"x" * 9))


def test_a_copy_that_can_not_be_written_is_told_when_it_is_to_be_published(
    placer: Placer, tmp_path: Path
) -> None:
    data = bytes(8 * MEBIBYTE)
    staged = placer.stage()
    with (
        tmpfs_mounted(tmp_path / "disk", size=MEBIBYTE) as disk,
        BlobCache.open(
            disk / "cache", store_url="file:///s", max_bytes=1 << 30, min_free_bytes=0
        ) as cache,
        cache.staging(1) as kept,
    ):
        copy = CacheCopy(kept, staged, clones=False)
        copy.take(memoryview(data), 0)
        with pytest.raises(OSError, match="No space"):
            copy.publish(Digest.of(data))
    staged.close()


def test_a_staged_file_is_closed_to_others_until_it_has_its_place(root: Path) -> None:
    before = os.umask(0o027)
    try:
        with Placer(root, LABEL) as placer:
            staged = placer.stage()
            assert stat.S_IMODE(os.fstat(staged.fd).st_mode) == 0o600
            placer.place_staged(entry("one", b""), staged)
            staged.close()
    finally:
        os.umask(before)

    assert stat.S_IMODE((root / "one").stat().st_mode) == 0o640


def test_nothing_is_staged_once_the_root_is_closed(root: Path) -> None:
    with Placer(root, LABEL) as placer:
        pass

    with pytest.raises(OSError, match="ended"):
        placer.stage()
    assert everything_below(root) == []


# -------------------------------------------------------------------------------- what is placed


@pytest.mark.parametrize("mtime", [0, 1, -1, -1_000_001, MTIME_US, LAST_US])
def test_the_time_is_exact_to_the_microsecond(placer: Placer, root: Path, mtime: int) -> None:
    placer.place_data(entry("a/b", b"content", mtime=mtime), b"content")

    assert (root / "a/b").read_bytes() == b"content"
    assert (root / "a/b").stat().st_mtime_ns == mtime * 1000


@pytest.mark.parametrize(
    "path",
    [
        "x" * 255, "d" * 255 + "/" + "e" * 255, b"latin-\xe9/\xff\xfe", "snow\u2603/\U0001f3ac",
        "a\nb", " ", "-rf", ".hidden/..twodots", "a/b/c/d/e/f/g/h/i/j/k",
    ],
    ids=ascii,
)  # fmt: skip
def test_every_name_that_a_file_can_have_is_placed(
    placer: Placer, root: Path, path: str | bytes
) -> None:
    placer.place_data(entry(path, b"content"), b"content")

    assert (root / os.fsdecode(path)).read_bytes() == b"content"
    assert partial_name(LABEL) not in {found.name for found in root.rglob("*")}


def test_a_file_that_is_there_is_replaced(placer: Placer, root: Path) -> None:
    (root / "one").write_bytes(b"old and longer")
    linked = root / "linked"
    os.link(root / "one", linked)

    placer.place_data(entry("one", b"new"), b"new")

    assert (root / "one").read_bytes() == b"new"
    assert linked.read_bytes() == b"old and longer", "never written through"


def test_an_empty_file_is_placed(placer: Placer, root: Path) -> None:
    placer.place_data(entry("empty", b""), b"")

    assert (root / "empty").stat().st_size == 0


def test_modes_follow_the_umask(root: Path) -> None:
    before = os.umask(0o027)
    try:
        with Placer(root, LABEL) as placer:
            placer.place_data(entry("a/b", b"x"), b"x")
    finally:
        os.umask(before)

    modes = [stat.S_IMODE((root / name).stat().st_mode) for name in ("a", "a/b")]
    assert modes == [0o750, 0o640]


def test_a_file_in_place_gets_another_time(placer: Placer, root: Path) -> None:
    placer.place_data(entry("a/b", b"x"), b"x")

    placer.retime(entry("a/b", b"x", mtime=-5))

    assert (root / "a/b").stat().st_mtime_ns == -5000


def test_a_file_that_has_gone_can_not_get_another_time(placer: Placer) -> None:
    for gone in ("gone", "gone/deeper"):
        with pytest.raises(LocalWriteError, match=gone):
            placer.retime(entry(gone, b"x"))


# ------------------------------------------------------------------------------------- copying


@pytest.fixture(params=["xfs", "btrfs", "ext4", "tmpfs", "this"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of each kind; `this` is the one that tests run on."""
    with ExitStack() as stack:
        at = tmp_path / "disk"
        if request.param == "this":
            at.mkdir()
            yield at
        elif request.param == "tmpfs":
            yield stack.enter_context(tmpfs_mounted(at, size=64 * MEBIBYTE))
        else:
            image = tmp_path / "image"
            yield stack.enter_context(image_mounted(request.param, image, at, size=48 * MEBIBYTE))


SIZES = [
    0, 1, 4096, placement.REFLINK_MIN_BYTES - 1, placement.REFLINK_MIN_BYTES,
    MEBIBYTE, 3 * MEBIBYTE + 1,
]  # fmt: skip


def test_a_copy_on_the_same_file_system_is_the_same(disk: Path) -> None:
    chance = random.Random(1)
    with Placer(disk / "root", LABEL) as placer:
        for size in SIZES:
            data = chance.randbytes(size)
            wanted = entry(f"f/{size}", data)
            place_copy(placer, wanted, data, source_on=disk)
            placed = disk / "root" / wanted.path
            assert placed.read_bytes() == data
            assert placed.stat().st_mtime_ns == MTIME_US * 1000


def test_a_copy_from_another_file_system_is_the_same(disk: Path, tmp_path: Path) -> None:
    chance = random.Random(2)
    with Placer(disk / "root", LABEL) as placer:
        for size in SIZES:
            data = chance.randbytes(size)
            wanted = entry(f"f/{size}", data)
            place_copy(placer, wanted, data, source_on=tmp_path)
            assert (disk / "root" / wanted.path).read_bytes() == data


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_where_the_file_system_can_a_copy_shares_its_blocks_with_the_cache(
    kind: str, tmp_path: Path
) -> None:
    data = random.Random(3).randbytes(8 * MEBIBYTE)
    with image_mounted(kind, tmp_path / "image", tmp_path / "disk") as disk:
        source = disk / "blob"
        source.write_bytes(data)
        os.sync()
        before = os.statvfs(disk)
        with Placer(disk / "root", LABEL) as placer, source.open("rb") as file:
            for at in range(8):
                placer.place_copy(entry(f"copy-{at}", data), file.fileno())
        os.sync()
        after = os.statvfs(disk)
        used = (before.f_bfree - after.f_bfree) * before.f_frsize

        assert used < 8 * MEBIBYTE, "eight copies must take less than one"
        (disk / "root/copy-0").write_bytes(b"written by a job")
        assert source.read_bytes() == data, "and yet a job can not write into the cache"


def test_where_it_can_not_a_reflink_is_tried_once(tmp_path: Path) -> None:
    data = random.Random(4).randbytes(placement.REFLINK_MIN_BYTES)
    with (
        tmpfs_mounted(tmp_path / "disk", size=16 * MEBIBYTE) as disk,
        Placer(disk / "root", LABEL) as placer,
    ):
        tries_one = []
        for size in (len(data) - 1, len(data)):
            place_copy(placer, entry(str(size), data[:size]), data[:size], source_on=disk)
            tries_one.append(placer._reflink)
        assert tries_one == [True, False]
        assert (disk / f"root/{len(data)}").read_bytes() == data


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOSPC, errno.EIO])
def test_what_can_not_be_reflinked_just_now_is_copied(
    placer: Placer, root: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZFS answers EAGAIN for a blob that was written a moment ago."""
    data = random.Random(4).randbytes(placement.REFLINK_MIN_BYTES)
    tries = []

    def refuse(*_args: object) -> int:
        tries.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    for name in ("one", "two"):
        place_copy(placer, entry(name, data), data, source_on=tmp_path)
        assert (root / name).read_bytes() == data

    staged = placer.stage()
    assert not placer.can_clone(staged, staged.fd), "it is the cache's matter, not the transfer's"
    staged.close()
    assert len(tries) == 3, "the next one may be"


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADF, errno.EPERM])
def test_what_the_kernel_does_not_copy_is_read_and_written(
    placer: Placer, root: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems answer so where only this call fails: CIFS before Linux 5.19."""
    data = random.Random(4).randbytes(3 * MEBIBYTE)

    def refuse(*_args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    place_copy(placer, entry("one", data), data, source_on=tmp_path)

    assert (root / "one").read_bytes() == data


@pytest.mark.parametrize("size", [10, placement.REFLINK_MIN_BYTES, 2 * MEBIBYTE])
@pytest.mark.parametrize("damage", ["bit", "short", "long", "empty"])
def test_a_corrupt_source_is_refused_and_nothing_is_placed(
    placer: Placer, root: Path, tmp_path: Path, size: int, damage: str
) -> None:
    data = random.Random(5).randbytes(size)
    damaged = {
        "bit": data[:-1] + bytes([data[-1] ^ 1]), "short": data[:-1], "long": data + b"x",
        "empty": b"",
    }[damage]  # fmt: skip

    if damage == "long":
        # What is beyond the blob's size is not copied, unless by reflink, which shares all of it.
        place_copy(placer, entry("sub/one", data), damaged, source_on=tmp_path)
        assert (root / "sub/one").read_bytes() == data
        return
    with pytest.raises(BlobCorruptError, match="sub/one: the copy is not xxh128:"):
        place_copy(placer, entry("sub/one", data), damaged, source_on=tmp_path)
    assert everything_below(root) == ["sub"]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_reflink_of_a_longer_source_is_refused(kind: str, tmp_path: Path) -> None:
    data = random.Random(6).randbytes(2 * MEBIBYTE)
    with (
        image_mounted(kind, tmp_path / "image", tmp_path / "disk") as disk,
        Placer(disk / "root", LABEL) as placer,
    ):
        with pytest.raises(BlobCorruptError):
            place_copy(placer, entry("one", data), data + b"x", source_on=disk)
        assert everything_below(disk / "root") == []


def test_a_source_that_its_disk_does_not_give_is_corrupt_and_not_our_failure_to_write(
    tmp_path: Path,
) -> None:
    data = b"marker of the blob in the image " * 8192
    image, at = tmp_path / "image", tmp_path / "disk"
    with image_mounted("btrfs", image, at) as disk:
        (disk / "blob").write_bytes(data)
    content = image.read_bytes()
    place = content.index(data[:4096])
    with image.open("r+b") as file:
        file.seek(place + 100)
        file.write(b"damaged")

    with (
        image_mounted("btrfs", image, at) as disk,
        Placer(tmp_path / "root", LABEL) as placer,
        (disk / "blob").open("rb") as source,
    ):
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(source.fileno(), 4096, 0)
        with pytest.raises(BlobCorruptError, match=r"one: the copy of xxh128:.* can not be read"):
            placer.place_copy(entry("one", data), source.fileno())
    assert everything_below(tmp_path / "root") == []


# -------------------------------------------------------------------------- what stands in the way


def test_a_link_in_a_files_place_is_replaced_and_not_followed(
    placer: Placer, root: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    (root / "one").symlink_to(precious)

    placer.place_data(entry("one", b"new"), b"new")

    assert precious.read_bytes() == b"mine"
    assert not (root / "one").is_symlink()
    assert (root / "one").read_bytes() == b"new"


@pytest.mark.parametrize("way", ["sub", "sub/deeper"])
def test_a_link_on_the_way_is_refused(placer: Placer, root: Path, tmp_path: Path, way: str) -> None:
    outside = tmp_path / "outside"
    (outside / "deeper").mkdir(parents=True)
    (root / way).parent.mkdir(exist_ok=True)
    (root / way).symlink_to(outside)

    with pytest.raises(UnsafePathError, match=way):
        placer.place_data(entry("sub/deeper/one", b"new"), b"new")
    assert everything_below(outside) == ["deeper"]


def test_a_link_that_comes_after_its_directory_was_used_leads_nowhere(
    placer: Placer, root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    placer.place_data(entry("sub/one", b"new"), b"new")
    (root / "sub").rename(root / "moved")
    (root / "sub").symlink_to(outside)

    placer.place_data(entry("sub/two", b"new"), b"new")

    assert everything_below(outside) == []
    assert (root / "moved/two").read_bytes() == b"new"


def test_a_directory_in_a_files_place_is_a_clash_that_names_it(placer: Placer, root: Path) -> None:
    (root / "one/two").mkdir(parents=True)

    with pytest.raises(PathClashError, match="root/one: Is a directory"):
        placer.place_data(entry("one", b"new"), b"new")
    assert everything_below(root) == ["one", "one/two"]


def test_a_file_in_a_directorys_place_is_a_clash_that_names_it(placer: Placer, root: Path) -> None:
    (root / "one").write_bytes(b"mine")

    with pytest.raises(PathClashError, match="root/one is a file where a directory must be"):
        placer.place_data(entry("one/two", b"new"), b"new")
    assert (root / "one").read_bytes() == b"mine"


def test_a_root_that_may_be_no_link_is_refused_if_it_is_one(root: Path, tmp_path: Path) -> None:
    root.symlink_to(tmp_path)

    with pytest.raises(UnsafePathError, match="root is a symbolic link"):
        Placer(root, LABEL, follow=False)
    with Placer(root, LABEL) as placer:
        placer.place_data(entry("one", b"new"), b"new")
    assert (tmp_path / "one").read_bytes() == b"new"


def test_what_a_killed_run_left_is_removed(placer: Placer, root: Path) -> None:
    left = root / partial_name(LABEL)
    left.write_bytes(b"half of som")

    placer.place_data(entry("one", b"new"), b"new")

    assert everything_below(root) == ["one"]


def test_a_link_in_the_temporary_files_place_is_not_followed(
    placer: Placer, root: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    (root / partial_name(LABEL)).symlink_to(precious)

    placer.place_data(entry("one", b"new"), b"new")

    assert precious.read_bytes() == b"mine"
    assert everything_below(root) == ["one"]


def test_a_directory_in_the_temporary_files_place_is_a_clash(placer: Placer, root: Path) -> None:
    (root / partial_name(LABEL)).mkdir()

    with pytest.raises(PathClashError, match="root/one"):
        placer.place_data(entry("one", b"new"), b"new")


def test_two_transfers_do_not_use_the_same_temporary_name(root: Path) -> None:
    with Placer(root, "1-aa") as first, Placer(root, "1-bb") as second:

        def fill_late(fd: int) -> None:
            os.write(fd, b"fi")
            second.place_data(entry("two", b"second"), b"second")
            os.write(fd, b"rst")

        first._place(entry("one", b"first"), fill_late)

    assert (root / "one").read_bytes() == b"first"
    assert (root / "two").read_bytes() == b"second"


# -------------------------------------------------------------------------------- the disk is full


@pytest.mark.parametrize("copy", [False, True], ids=["from memory", "from the cache"])
def test_a_full_disk_leaves_no_temporary_file_and_is_told_with_the_files_name(
    tmp_path: Path, copy: bool
) -> None:
    data = random.Random(8).randbytes(MEBIBYTE)
    wanted = entry("shots/001/plate.exr", data)

    def place(placer: Placer) -> None:
        if copy:
            place_copy(placer, wanted, data, source_on=tmp_path)
        else:
            placer.place_data(wanted, data)

    with tmpfs_mounted(tmp_path / "disk", size=8 * MEBIBYTE) as disk:
        with Placer(disk / "root", LABEL) as placer:
            fill(disk, leave=300_000)
            with pytest.raises(NoSpaceError, match=r"root/shots/001/plate\.exr: No space left"):
                place(placer)
            assert everything_below(disk / "root") == ["shots", "shots/001"]
            (disk / "filler").unlink()
            placer.place_data(wanted, data)
        assert (disk / "root/shots/001/plate.exr").read_bytes() == data


@pytest.mark.parametrize("way", ["data", "staged"])
def test_what_closing_tells_is_known_before_the_file_gets_its_name(
    placer: Placer, root: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS writes to its server then, and tells then that a quota is used up."""
    (root / "one").write_bytes(b"old")
    staged = placer.stage() if way == "staged" else None
    close = os.close
    failed: list[int] = []

    def fail_once(fd: int) -> None:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        close(fd)
        if is_file and not failed:
            failed.append(fd)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    place = partial(placer.place_data, entry("one", b"new"), b"new")
    if staged is not None:
        os.pwrite(staged.fd, b"new", 0)
        place = partial(placer.place_staged, entry("one", b"new"), staged)

    monkeypatch.setattr(os, "close", fail_once)
    with pytest.raises(NoSpaceError, match="one"):
        place()
    if staged is not None:
        staged.close()

    assert failed, "or nothing was told"
    assert everything_below(root) == ["one"]
    assert (root / "one").read_bytes() == b"old"


@pytest.mark.parametrize("what", ["shots/001/plate.exr", "plate.exr"])
def test_a_disk_without_inodes_is_full(tmp_path: Path, what: str) -> None:
    with (
        image_mounted("ext4", tmp_path / "image", tmp_path / "disk") as disk,
        Placer(disk / "root", LABEL) as placer,
    ):
        use_up_inodes(disk)
        with pytest.raises(NoSpaceError, match=r"shots|plate"):
            placer.place_data(entry(what, b"x"), b"x")
        assert everything_below(disk / "root") == []


def test_a_file_that_may_not_be_so_large_is_told_with_its_name(placer: Placer, root: Path) -> None:
    import resource  # noqa: PLC0415 - only here
    import signal  # noqa: PLC0415 - only here

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(NoSpaceError, match="root/one: File too large"):
            placer.place_data(entry("one", b"x" * 2000), b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert everything_below(root) == []


def test_a_root_that_can_not_be_made_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(PropmasterError, match="file/root") as caught:
        Placer(tmp_path / "file/root", LABEL)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOTDIR


def test_closing_gives_every_descriptor_back(root: Path) -> None:
    before = open_below(root)
    with Placer(root, LABEL) as placer:
        for at in range(20):
            placer.place_data(entry(f"d{at}/one", b"x"), b"x")

    assert open_below(root) == before


@pytest.mark.parametrize("direct", [True, False])
def test_a_wish_to_stop_ends_a_large_copy_and_leaves_nothing(
    root: Path, tmp_path: Path, direct: bool
) -> None:
    cancellation = Cancellation()
    data = bytes(2 * MEBIBYTE)
    with Placer(root, LABEL, direct=direct, cancellation=cancellation) as placer:
        place_copy(placer, entry("first", data), data, source_on=tmp_path)
        cancellation.cancel()
        with pytest.raises(CancelledError):
            place_copy(placer, entry("a/second", data), data, source_on=tmp_path)

    assert everything_below(root) == ["a", "first"]
