"""Faults of the blob cache: full, read-only, damaged, hostile.

The cache saves fetches and nothing else, so a session goes on without it; only a cache that others
could write to stops everything.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content import blob_cache_files, events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.directory_store import DirectoryStore
from agent_plugin.content.errors import CacheUnsafeError
from tests.servers.damages import DAMAGES, flipped
from tests.servers.disks import (
    MEBIBYTE,
    fill,
    image_mounted,
    read_only,
    shut_down,
    tmpfs_mounted,
)
from tests.servers.hooks import Host
from tests.servers.local_farm import FILES, LARGE, Farm
from tests.servers.other_user import NOBODY, run_as_nobody
from tests.servers.trees import files_below, write_files


def blobs_of(host: Host) -> list[Path]:
    return sorted(path for path in host.cache_dir.rglob("*") if len(path.name) == 32)


@pytest.mark.parametrize("files", [FILES, LARGE], ids=["small", "large"])
def test_a_full_cache_disk_is_bypassed(
    farm: Farm, files: dict[str | bytes, bytes | int], expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    job = farm.submit(files)
    with tmpfs_mounted(farm.tmp_path / "disk", size=4 * MEBIBYTE) as disk:
        host = farm.host(cache_dir=disk / "cache")
        with host.services():
            pass
        fill(disk)

        farm.assert_starts(host, job)
        assert host.read_state(farm.tmp_path / "session").ready  # type: ignore[union-attr] # it is there


def test_a_full_cache_disk_does_not_make_the_command_fail(farm: Farm) -> None:
    job = farm.submit(FILES)
    with tmpfs_mounted(farm.tmp_path / "disk", size=4 * MEBIBYTE) as disk:
        host = farm.host(cache_dir=disk / "cache")
        with host.services():
            pass
        fill(disk)
        session = farm.tmp_path / "session"

        for arguments in (
            host.start_arguments(job, session),
            ["session", "end", "--session-dir", str(session)],
        ):
            done = host.run(*arguments)
            assert done.returncode == 0, done.stderr


def test_what_a_full_cache_has_is_still_used(farm: Farm, expected_events: set[str]) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    job = farm.submit(FILES)
    with tmpfs_mounted(farm.tmp_path / "disk", size=4 * MEBIBYTE) as disk:
        host = farm.host(cache_dir=disk / "cache")
        farm.assert_starts(host, job)
        write_files(farm.source, {"one more": 40_000}, mtime_ns=1_600_000_000 * 10**9)
        job = farm.submit(FILES | {"one more": 40_000})
        fill(disk)

        result = host.start(job, farm.tmp_path / "second")

        # Some of it was evicted, to make room for the new blob.
        assert result.roots[0].bytes_reused > 300_000
        assert files_below(Path(result.roots[0].local_root)) == files_below(farm.source)


def test_a_read_only_cache_is_bypassed(farm: Farm, expected_events: set[str]) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    job = farm.submit(FILES)
    host = farm.host()
    farm.assert_starts(host, job)
    with read_only(host.cache_dir):
        farm.assert_starts(host, job, "second")


def test_a_damaged_manifest_in_a_read_only_cache_is_fetched_anew(
    farm: Farm, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    job = farm.submit(FILES)
    host = farm.host()
    farm.assert_starts(host, job)
    manifest = job.attachments.manifests[0].input_manifest_hash
    [cached] = [blob for blob in blobs_of(host) if blob.name == manifest]
    flipped(cached)
    quarantine = host.cache_dir / "v1/quarantine"
    with read_only(quarantine):
        farm.assert_starts(host, job, "second")

    assert manifest in {blob.name for blob in blobs_of(host)}, "it could not be taken away"


def test_a_cache_that_this_user_may_not_make_is_bypassed(open_farm: Farm) -> None:
    """A service that runs as a user without rights on the directory that the cache is to be in."""
    farm = open_farm
    job = farm.submit(FILES)
    home = farm.tmp_path / "home of nobody"
    closed = farm.tmp_path / "closed"
    closed.mkdir(mode=0o755)
    host = farm.host(home, cache_dir=closed / "cache")
    arguments = host.start_arguments(job, home / "session")

    done = run_as_nobody(host, arguments)

    assert done.returncode == 0, done.stderr
    bypassed = [line for line in done.stderr.splitlines() if events.CACHE_BYPASSED in line]
    assert len(bypassed) == 1
    assert str(closed / "cache") in bypassed[0]
    root = Path(json.loads(done.stdout)["roots"][0]["localRoot"])
    assert files_below(root) == files_below(farm.source)


@pytest.mark.parametrize("how", ["mode", "link", "owner", "file"])
def test_a_cache_that_others_could_write_stops_the_session_with_75(farm: Farm, how: str) -> None:
    job = farm.submit(FILES)
    host = farm.host()
    match how:
        case "mode":
            host.cache_dir.mkdir()
            host.cache_dir.chmod(0o777)
        case "link":
            (farm.tmp_path / "elsewhere").mkdir()
            host.cache_dir.symlink_to(farm.tmp_path / "elsewhere")
        case "owner":
            host.cache_dir.mkdir(mode=0o700)
            os.chown(host.cache_dir, NOBODY, NOBODY)
        case _:
            host.cache_dir.write_bytes(b"")

    done = host.run(*host.start_arguments(job, farm.tmp_path / "session"))

    assert done.returncode == 75, done.stderr
    assert "error[cache-unsafe]" in done.stderr
    assert str(host.cache_dir) in done.stderr
    assert not (farm.tmp_path / "session").exists()


def test_a_directory_of_the_cache_that_becomes_writable_by_others_stops_the_session(
    farm: Farm,
) -> None:
    job = farm.submit(FILES)
    host = farm.host()
    farm.assert_starts(host, job)
    for shard in {blob.parent for blob in blobs_of(host)}:
        shard.chmod(0o777)

    with pytest.raises(CacheUnsafeError):
        host.start(job, farm.tmp_path / "second")


# ------------------------------------------------------------ damage in the cache


@pytest.mark.parametrize("files", [FILES, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_blob_in_the_cache_is_fetched_anew_and_never_reaches_a_session(
    farm: Farm,
    damage: Callable[[Path], None],
    files: dict[str | bytes, bytes | int],
    expected_events: set[str],
) -> None:
    expected_events.add(events.CACHE_QUARANTINED)
    job = farm.submit(files)
    host = farm.host()
    farm.assert_starts(host, job)
    sizes = {facts.size for facts in files_below(farm.source).values()}
    damaged = [blob for blob in blobs_of(host) if blob.stat().st_size in sizes][::3]
    for blob in damaged:
        damage(blob)

    farm.assert_starts(host, job, "second")
    farm.assert_starts(host, job, "third")
    with BlobCache.open(
        host.cache_dir, store_url=farm.store_url, max_bytes=1 << 30, min_free_bytes=0
    ) as cache:
        assert cache.verify().corrupt == ()


def test_a_directory_that_its_disk_does_not_give_is_done_without(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    job = farm.submit(FILES)
    host = farm.host()
    farm.assert_starts(host, job)

    def refuse(name: str, *_args: object, **_options: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    monkeypatch.setattr(blob_cache_files, "open_directory", refuse)

    farm.assert_starts(host, job, "second")


@pytest.mark.parametrize(
    ("files", "call"), [(FILES, "get_document"), (FILES, "get"), (LARGE, "fetch")]
)
def test_a_cache_whose_disk_dies_while_it_is_used_is_done_without(
    farm: Farm,
    files: dict[str | bytes, bytes | int],
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    expected_events: set[str],
) -> None:
    """What was counted, leased and staged there can not be taken back any more."""
    expected_events.add(events.CACHE_BYPASSED)
    job = farm.submit(files)
    real = getattr(DirectoryStore, call)
    with image_mounted(
        "ext4", farm.tmp_path / "image", farm.tmp_path / "disk", size=64 << 20
    ) as at:

        def die(*args: Any, **options: Any) -> Any:
            monkeypatch.undo()
            answer = real(*args, **options)
            shut_down(at)
            return answer

        monkeypatch.setattr(DirectoryStore, call, die)
        host = farm.host(cache_dir=at / "cache")

        farm.assert_starts(host, job)
        host.end(farm.tmp_path / "session")


def test_a_disk_that_does_not_give_a_blob_back_is_done_without(
    farm: Farm, expected_events: set[str]
) -> None:
    """The file system's checksum tells, so that reading gives EIO, as a dying disk does."""
    expected_events.update({events.CACHE_QUARANTINED, events.CACHE_BYPASSED})
    marker = b"marker of the one blob in the image " * 4096
    job = farm.submit({"marked": marker})
    image, at = farm.tmp_path / "image", farm.tmp_path / "disk"
    with image_mounted("btrfs", image, at) as disk:
        farm.assert_starts(farm.host(cache_dir=disk / "cache"), job)
    place = image.read_bytes().index(marker[:4096])
    with image.open("r+b") as file:
        file.seek(place)
        file.write(b"damaged")

    with image_mounted("btrfs", image, at) as disk:
        farm.assert_starts(farm.host(cache_dir=disk / "cache"), job, "second")
