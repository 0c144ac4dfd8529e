"""The blob cache on real small disks: full, out of inodes, read-only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import LocalWriteError, NoSpaceError
from tests.servers.cache_worker import STORE_URL, blob, open_cache

KIB = 1024
DISK_BYTES = 4 * 1024 * KIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=60)


def mount_tmpfs(_image: Path, target: Path, options: str = "") -> None:
    run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700{options}", "tmpfs", target)


def mount_ext4(image: Path, target: Path) -> None:
    with image.open("wb") as file:
        file.truncate(2 * DISK_BYTES)
    run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
    run("mount", "-o", "loop", image, target)


@pytest.fixture(params=[mount_tmpfs, mount_ext4], ids=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "disk"
    target.mkdir()
    request.param(tmp_path / "image", target)
    yield target
    run("umount", target)


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (64 * KIB, 4 * KIB, 1):
            with suppress(OSError):
                for _ in range(10 * DISK_BYTES // size):
                    file.write(bytes(size))
    return filler


def fetch(cache: BlobCache, number: int) -> Digest:
    digest, data = blob(number, 64 * KIB)
    cache.add(digest, data)
    return digest


def test_a_full_disk_makes_the_cache_evict_and_keep_the_new_blob(disk: Path) -> None:
    with open_cache(disk / "cache") as cache:
        digests = [fetch(cache, number) for number in range(10)]
        for age, digest in enumerate(reversed(digests)):
            [path] = disk.glob(f"cache/v1/*/*/{digest.hex}")
            os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))
        fill(disk)

        new = fetch(cache, 100)

        assert cache.contains(new)
        assert not cache.contains(digests[0]), "the oldest went"
        assert cache.contains(digests[9])
        assert cache.usage().temporary == 0
        assert cache.verify().corrupt == ()


def test_a_disk_full_of_others_files_is_an_error_and_leaves_nothing(disk: Path) -> None:
    with open_cache(disk / "cache") as cache:
        fill(disk)

        with pytest.raises(NoSpaceError) as failure:
            fetch(cache, 1)

        assert failure.value.hint
        usage = cache.usage()
        assert (usage.blobs, usage.temporary, usage.quarantined) == (0, 0, 0)


def test_leased_blobs_survive_a_full_disk(disk: Path) -> None:
    with open_cache(disk / "cache") as cache:
        digest = fetch(cache, 1)
        with cache.lease("session", [digest]):
            fill(disk)

            with pytest.raises(NoSpaceError):
                fetch(cache, 2)

            assert cache.contains(digest)


def test_room_on_a_full_disk_is_made_or_refused_before_anything_is_written(disk: Path) -> None:
    with open_cache(disk / "cache") as cache:
        for number in range(10):
            fetch(cache, number)
        filler = fill(disk)

        cache.make_room(256 * KIB)
        with pytest.raises(NoSpaceError, match="do not fit"):
            cache.staging(DISK_BYTES * 4)
        filler.unlink()
        assert cache.verify().corrupt == ()


def test_a_lease_that_can_not_be_written_is_an_error(disk: Path) -> None:
    many = [Digest(f"{number:032x}", 1) for number in range(1, 20_000)]
    with open_cache(disk / "cache") as cache:
        fill(disk)

        with pytest.raises(NoSpaceError):
            cache.lease("session", many)

        assert cache.usage().leases == 0
        assert cache.usage().temporary == 0


def test_a_cache_can_not_be_begun_on_a_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.mkdir()
    # 3 inodes: the root, and two of the cache's directories.
    mount_tmpfs(tmp_path, target, ",nr_inodes=3")
    try:
        with pytest.raises(NoSpaceError, match="can not open"):
            open_cache(target / "cache")
    finally:
        run("umount", target)


def test_running_out_of_inodes_is_running_out_of_space(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    target.mkdir()
    mount_tmpfs(tmp_path, target, ",nr_inodes=40")
    try:
        with open_cache(target / "cache") as cache:
            for number in range(100):
                try:
                    cache.add(*blob(number, 100))
                except NoSpaceError:
                    break
            else:
                pytest.fail("40 inodes hold no 100 blobs")

            assert cache.usage().temporary == 0
            assert cache.verify().corrupt == ()
    finally:
        run("umount", target)


def test_a_cache_on_a_read_only_disk_can_not_be_opened(disk: Path) -> None:
    open_cache(disk / "cache").close()
    run("mount", "-o", "remount,ro", disk)

    with pytest.raises(LocalWriteError, match="Read-only file system"):
        BlobCache.open(disk / "cache", store_url=STORE_URL, max_bytes=1, min_free_bytes=0)
