"""Faults of this host's disks under a mount: full, read-only, damaged, hostile; few descriptors.

Whatever the cache does, the right bytes are read. What can not be read or written is an error that
the job sees: of writing the disk's own, of reading an input/output error, with the ledger telling
which file and why. Nothing is read or written anywhere else.
"""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.manifest import Manifest
from tests.mount.conftest import Mounter
from tests.servers.damages import DAMAGES
from tests.servers.disks import MEBIBYTE, fill, image_mounted, read_only, use_up_inodes
from tests.servers.mount_reader import read_all
from tests.servers.other_user import NOBODY
from tests.servers.trees import files_below, write_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

# What is fetched at once, what in ranges to a file, and what is read while it comes.
FILES: dict[str | bytes, bytes | int] = {
    **{f"tex/{at}.tx": 30_000 + at for at in range(40)},
    "middle.abc": 9_000_000,
}
HUGE: dict[str | bytes, bytes | int] = {"huge.vdb": 65 * MEBIBYTE}
DISK_BYTES = 64 * MEBIBYTE


class Disks:
    """A tree in a directory store, mounted by hosts whose cache is anywhere."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()
        self.source = self.home / "source"
        self.mounters: list[Mounter] = []

    def mounter(self, cache_dir: Path | None = None) -> Mounter:
        number = len(self.mounters)
        host = self.home / f"{number}"
        host.mkdir()
        paths = {
            "cache_dir": str(cache_dir or host / "cache"),
            "state_dir": str(host / "state"),
        }
        mounter = Mounter(host, f"file://{self.home}/store", settings={"paths": paths})
        mounter.host.cache_dir = Path(paths["cache_dir"])
        mounter.host.state_dir = Path(paths["state_dir"])
        self.mounters.append(mounter)
        return mounter

    def stored(self, files: dict[str | bytes, bytes | int]) -> Manifest:
        write_files(self.source, files, mtime_ns=1_600_000_000 * 10**9)
        return self.mounter().stored(self.source)

    def assert_reads_right(self, mounter: Mounter, at: Path) -> None:
        facts = files_below(self.source)
        for path, seen in read_all(at, sorted(facts)).items():
            assert (seen.errno, seen.sha256) == (0, facts[path].sha256), path
        assert mounter.errors(at) == []

    def assert_ends(self, mounter: Mounter, at: Path) -> None:
        assert mounter.host.mounts.end(at)
        mounter.assert_nothing_is_left()

    def assert_is_read_right_without_its_cache(self, manifest: Manifest, cache_dir: Path) -> None:
        mounter = self.mounter(cache_dir)
        at = mounter.mount(manifest)
        self.assert_reads_right(mounter, at)
        self.assert_ends(mounter, at)

    def close(self) -> None:
        for mounter in self.mounters:
            mounter.close()


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    disks = Disks(tmp_path)
    yield disks
    disks.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB."""
    with image_mounted("ext4", tmp_path / "image", tmp_path / "disk", size=DISK_BYTES) as disk:
        yield disk


# ------------------------------------------------------------ the cache's disk


def test_a_cache_whose_disk_is_full_is_done_without(disks: Disks, disk: Path) -> None:
    manifest = disks.stored(FILES)
    fill(disk)
    disks.assert_is_read_right_without_its_cache(manifest, disk / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("files", [FILES, HUGE], ids=["files", "huge"])
@pytest.mark.parametrize("kibibytes", [4, 64, 512, 2048, 8192, 20_000])
def test_a_cache_whose_disk_fills_at_any_moment_is_done_without(
    disks: Disks, disk: Path, files: dict[str | bytes, bytes | int], kibibytes: int
) -> None:
    manifest = disks.stored(files)
    fill(disk, leave=kibibytes * 1024)
    disks.assert_is_read_right_without_its_cache(manifest, disk / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("files", [FILES, HUGE], ids=["files", "huge"])
@pytest.mark.parametrize("left", [0, 5, 20, 50])
def test_a_cache_whose_disk_has_no_inodes_left_is_done_without(
    disks: Disks, disk: Path, files: dict[str | bytes, bytes | int], left: int
) -> None:
    manifest = disks.stored(files)
    use_up_inodes(disk, leave=left)
    disks.assert_is_read_right_without_its_cache(manifest, disk / "cache")


@pytest.mark.slow
def test_a_read_only_cache_is_done_without_and_what_it_has_is_used(
    disks: Disks, tmp_path: Path
) -> None:
    manifest = disks.stored(FILES)
    cache = tmp_path / "cache"
    disks.assert_is_read_right_without_its_cache(manifest, cache)
    half = sorted(path for path in cache.rglob("*") if len(path.name) == 32)[::2]
    for blob in half:
        blob.unlink()
    with read_only(cache):
        disks.assert_is_read_right_without_its_cache(manifest, cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("mode", r"can be written by others \(mode 0777\)"),
        ("link", "is a link or no directory"),
        ("owner", f"belongs to user {NOBODY}, we are 0"),
        ("file", "is a link or no directory"),
    ],
)
def test_a_cache_that_others_could_write_is_not_mounted_from(
    disks: Disks, how: str, reason: str
) -> None:
    manifest = disks.stored(FILES)
    mounter = disks.mounter()
    cache = mounter.host.cache_dir
    match how:
        case "mode":
            cache.mkdir()
            cache.chmod(0o777)
        case "link":
            (disks.home / "elsewhere").mkdir()
            cache.symlink_to(disks.home / "elsewhere")
        case "owner":
            cache.mkdir(mode=0o700)
            os.chown(cache, NOBODY, NOBODY)
        case _:
            cache.write_bytes(b"")

    with pytest.raises(MountFailedError, match=f"could not be mounted: {cache} {reason}"):
        mounter.mount(manifest)
    mounter.assert_nothing_is_left()
    assert list(disks.home.glob("elsewhere/*")) == []


@pytest.mark.slow
def test_a_cache_that_others_can_write_from_now_on_is_not_read_any_more(disks: Disks) -> None:
    manifest = disks.stored(FILES)
    mounter = disks.mounter()
    disks.assert_is_read_right_without_its_cache(manifest, mounter.host.cache_dir)
    at = mounter.mount(manifest)
    for path in [mounter.host.cache_dir, *mounter.host.cache_dir.rglob("*")]:
        if path.is_dir():
            path.chmod(0o777)
    for blob in mounter.host.cache_dir.rglob("*"):
        if len(blob.name) == 32:
            size = blob.stat().st_size
            blob.unlink()
            blob.write_bytes(bytes(size))
            blob.chmod(0o444)
    disks.assert_reads_right(mounter, at)
    disks.assert_ends(mounter, at)


def _whole(cache: Path) -> None:
    shutil.rmtree(cache)


def _blobs(cache: Path) -> None:
    for blob in cache.rglob("*"):
        if len(blob.name) == 32:
            blob.unlink()


def _what_is_under_way(cache: Path) -> None:
    shutil.rmtree(cache / "v1/tmp")


def _locks_and_usage(cache: Path) -> None:
    for name in ("locks", "usage"):
        (cache / "v1" / name).write_bytes(os.urandom(5000))


def _a_file_in_its_place(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.write_bytes(b"")


def _a_link_in_its_place(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.symlink_to("/etc")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        _whole, _blobs, _what_is_under_way, _locks_and_usage, _a_file_in_its_place,
        _a_link_in_its_place,
    ],
    ids=lambda damage: damage.__name__.strip("_"),
)  # fmt: skip
def test_a_cache_that_is_taken_away_under_a_mount_is_done_without(
    disks: Disks, damage: Callable[[Path], None]
) -> None:
    manifest = disks.stored(FILES | HUGE)
    before = set(os.listdir("/etc"))  # noqa: PTH208 - names
    mounter = disks.mounter()
    at = mounter.mount(manifest)
    facts = files_below(disks.source)
    first = sorted(facts)[:20]
    found = read_all(at, first)
    assert {seen.sha256 for seen in found.values()} == {facts[path].sha256 for path in first}
    with (at / "huge.vdb").open("rb", buffering=0) as file:
        assert len(file.read(100)) == 100
        damage(mounter.host.cache_dir)
        disks.assert_reads_right(mounter, at)
    disks.assert_ends(mounter, at)
    assert set(os.listdir("/etc")) == before  # noqa: PTH208 - names


# ------------------------------------------------------------ damage in the cache


def test_damaged_blobs_in_the_cache_never_reach_a_reader(
    disks: Disks, expected_events: set[str]
) -> None:
    """One file for each kind of damage: links are not followed, FIFOs are not waited for."""
    names = [damage.__name__ for damage in DAMAGES]
    manifest = disks.stored(
        {f"{name}/{size}": size + at for at, name in enumerate(names) for size in (5_000, 900_000)}
    )
    cache = disks.home / "cache"
    disks.assert_is_read_right_without_its_cache(manifest, cache)
    passwd = Path("/etc/passwd").read_bytes()
    for entry in manifest.entries:
        [blob] = cache.rglob(entry.hash)
        next(d for d in DAMAGES if d.__name__ == entry.path.partition("/")[0])(blob)

    # What has a name of its own is found by `verify`.
    expected_events.add(events.CACHE_QUARANTINED)
    for _ in range(2):
        disks.assert_is_read_right_without_its_cache(manifest, cache)

    with BlobCache.open(
        cache, store_url=disks.mounters[0].host.store_url, max_bytes=1 << 40, min_free_bytes=0
    ) as opened:
        assert opened.verify().corrupt == ()
    assert Path("/etc/passwd").read_bytes() == passwd


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("files", [{"middle.abc": 9_000_000}, HUGE], ids=["middle", "huge"])
def test_a_damaged_large_blob_in_the_cache_is_mended(
    disks: Disks, damage: Callable[[Path], None], files: dict[str | bytes, bytes | int]
) -> None:
    """A bit that is wrong in a huge blob may be read before it is found, which is told."""
    manifest = disks.stored(files)
    cache = disks.home / "cache"
    disks.assert_is_read_right_without_its_cache(manifest, cache)
    [blob] = cache.rglob(manifest.entries[0].hash)
    damage(blob)

    mounter = disks.mounter(cache)
    at = mounter.mount(manifest)
    [path] = files_below(disks.source)
    [seen] = read_all(at, [path]).values()
    is_wrong = (seen.errno, seen.sha256) != (0, files_below(disks.source)[path].sha256)
    told = mounter.errors(at)
    assert not is_wrong or told == [(path, "E_CHECKSUM")]
    assert not told or damage.__name__ == "flipped"
    disks.assert_ends(mounter, at)
    disks.assert_is_read_right_without_its_cache(manifest, cache)


@pytest.mark.slow
def test_a_disk_that_does_not_give_a_blob_back_is_done_without(
    disks: Disks, tmp_path: Path
) -> None:
    """The file system's checksum tells, so that reading gives EIO, as a dying disk does."""
    marker = b"marker of the one blob in the image " * 4096
    manifest = disks.stored({"marked": marker})
    image, place = tmp_path / "image", tmp_path / "disk"
    with image_mounted("btrfs", image, place) as disk:
        disks.assert_is_read_right_without_its_cache(manifest, disk / "cache")
    at = image.read_bytes().index(marker[:4096])
    with image.open("r+b") as file:
        file.seek(at)
        file.write(b"damaged")
    with image_mounted("btrfs", image, place) as disk:
        disks.assert_is_read_right_without_its_cache(manifest, disk / "cache")


# ------------------------------------------------------------ the disk that is written to


@pytest.mark.slow
def test_a_disk_that_is_full_refuses_writes_and_keeps_what_there_is(
    disks: Disks, disk: Path
) -> None:
    manifest = disks.stored(FILES)
    mounter = disks.mounter()
    # The work directory is beside the mount point.
    mounter.home = disk.resolve()
    at = mounter.mount(manifest, writes="overlayfs")
    (at / "before").write_bytes(b"written before")
    filler = fill(disk)

    with pytest.raises(OSError, match="No space left"):
        (at / "new").write_bytes(bytes(1_000_000))
    with pytest.raises(OSError, match="No space left"), (at / "middle.abc").open("ab") as file:
        file.write(b"more")
    (at / "new").unlink()

    assert (at / "before").read_bytes() == b"written before"
    (at / "before").unlink()
    disks.assert_reads_right(mounter, at)
    filler.unlink()
    with (at / "middle.abc").open("ab") as file:
        file.write(b"more")
    assert (at / "middle.abc").stat().st_size == 9_000_004
    disks.assert_ends(mounter, at)


@pytest.mark.slow
def test_no_room_anywhere_is_told_and_read_as_soon_as_there_is_some(
    disks: Disks, disk: Path
) -> None:
    """The cache's disk and the one for what the cache can not take are one, and full."""
    manifest = disks.stored(FILES | HUGE)
    mounter = disks.mounter(disk / "cache")
    mounter.home = disk.resolve()
    at = mounter.mount(manifest, writes="overlayfs")
    filler = fill(disk)
    for path in ("tex/3.tx", "middle.abc", "huge.vdb"):
        [seen] = read_all(at, [path]).values()
        assert seen.errno == errno.EIO
        assert seen.size < manifest.total_bytes
    told = mounter.errors(at)
    assert {code for _, code in told} == {"E_NO_SPACE"}
    assert [path for path, _ in told] == ["tex/3.tx", "middle.abc", "huge.vdb"]
    filler.unlink()

    facts = files_below(disks.source)
    # The third is larger than the disk.
    for path, seen in read_all(at, ["tex/3.tx", "middle.abc"]).items():
        assert (seen.errno, seen.sha256) == (0, facts[path].sha256)
    disks.assert_ends(mounter, at)


# ------------------------------------------------------------ descriptors


@contextmanager
def limited(mounter: Mounter, manifest: Manifest, descriptors: int) -> Iterator[Path]:
    """Mount, with so many descriptors for each process."""
    at = mounter.home / "mnt"
    host = mounter.host
    file = mounter.manifest_file(manifest)
    words: list[str | Path] = ["mount", file, at, "--store", host.store_url, "--json"]
    done = subprocess.run(
        ["prlimit", f"--nofile={descriptors}:{descriptors}", *host.argv(*words)],
        env=host.process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["writes"] == "none"
    yield at
    assert host.run("unmount", at).returncode == 0


@pytest.mark.slow
def test_sixty_four_descriptors_are_enough(disks: Disks) -> None:
    manifest = disks.stored(FILES | HUGE | {f"many/{at}": 10_000 + at for at in range(300)})
    mounter = disks.mounter()
    facts = files_below(disks.source)
    with limited(mounter, manifest, 64) as at:
        for threads in (1, 32):
            for path, seen in read_all(at, sorted(facts), threads=threads).items():
                assert (seen.errno, seen.sha256) == (0, facts[path].sha256), path
        assert mounter.errors(at) == []
    mounter.assert_nothing_is_left()
