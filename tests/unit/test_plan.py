"""What has to move is what is not in place already, proven by its bytes."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    CancelledError,
    LocalReadError,
    NoSpaceError,
    PathClashError,
    PropmasterError,
    UnsafePathError,
)
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.store import Cancellation
from agent_plugin.session.copy_room import CopyRoom
from agent_plugin.transfer.plan import (
    EMPTY,
    SPARE_BYTES,
    DownloadPlan,
    plan_download,
    survey,
)
from tests.servers.disks import MEBIBYTE, image_mounted, read_only, tmpfs_mounted, use_up_inodes

MTIME_US = 1_622_505_600_123_457


def entry(path: str, data: bytes, *, mtime: int = MTIME_US) -> FileEntry:
    digest = Digest.of(data)
    return FileEntry(hash=digest.hex, mtime=mtime, path=path, size=digest.size)


def manifest(**files: bytes) -> Manifest:
    return Manifest.of([entry(path.replace("__", "/"), data) for path, data in files.items()])


def put(path: Path, data: bytes, *, mtime: int = MTIME_US) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(mtime * 1000, mtime * 1000))


def paths(entries: list[FileEntry]) -> list[str]:
    return sorted(found.path for found in entries)


def wanted(plan: DownloadPlan) -> dict[Digest, list[str]]:
    return {digest: paths(entries) for digest, entries in plan.wanted.items()}


def test_in_an_empty_place_everything_is_wanted_once_per_digest(tmp_path: Path) -> None:
    plan = plan_download(
        manifest(a=b"same", b__c=b"same", d=b"other", e=b""), tmp_path / "root", None
    )

    assert wanted(plan) == {
        Digest.of(b"same"): ["a", "b/c"], Digest.of(b"other"): ["d"], EMPTY: ["e"],
    }  # fmt: skip
    assert (plan.files_to_place, plan.bytes_to_place, plan.kept) == (4, 13, [])
    assert (tmp_path / "root").is_dir()


def test_a_time_that_differs_below_the_microsecond_is_no_other_time(tmp_path: Path) -> None:
    """A manifest has no more, and the file may be a job's own, whose time is not ours to set."""
    put(tmp_path / "a", b"same")
    os.utime(tmp_path / "a", ns=(MTIME_US * 1000 + 999,) * 2)

    plan = plan_download(manifest(a=b"same"), tmp_path, None)

    assert (paths(plan.kept), plan.retimed) == (["a"], [])


def test_what_is_in_place_stays(tmp_path: Path) -> None:
    put(tmp_path / "a", b"same")
    put(tmp_path / "b/c", b"same", mtime=MTIME_US + 1)
    put(tmp_path / "mine", b"not in the manifest")

    plan = plan_download(manifest(a=b"same", b__c=b"same", d=b"other"), tmp_path, None)

    assert wanted(plan) == {Digest.of(b"other"): ["d"]}
    assert (paths(plan.kept), paths(plan.retimed)) == (["a", "b/c"], ["b/c"])
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["a", "b", "c", "mine"]


@pytest.mark.parametrize("there", [b"sane", b"same!", b"", b"sam"])
def test_size_and_time_are_no_proof(tmp_path: Path, there: bytes) -> None:
    put(tmp_path / "a", there)

    assert wanted(plan_download(manifest(a=b"same"), tmp_path, None)) == {Digest.of(b"same"): ["a"]}


@pytest.mark.parametrize("kind", ["link to a file", "link to nothing", "directory", "fifo"])
def test_something_else_in_a_files_place_is_not_that_file(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "other", b"same")
    match kind:
        case "link to a file":
            (tmp_path / "a").symlink_to("other")
        case "link to nothing":
            (tmp_path / "a").symlink_to("nowhere")
        case "directory":
            (tmp_path / "a").mkdir()
        case _:
            os.mkfifo(tmp_path / "a")

    plan = plan_download(manifest(a=b"same"), tmp_path, None)

    assert wanted(plan) == {Digest.of(b"same"): ["a"]}


def test_a_link_on_the_way_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    put(outside / "c", b"same")
    root = tmp_path / "root"
    put(root / "a", b"same")
    (root / "b").symlink_to(outside)

    with pytest.raises(UnsafePathError, match="root/b"):
        plan_download(manifest(a=b"same", b__c=b"same"), root, None)
    assert sorted(found.name for found in root.iterdir()) == ["a", "b"]


def test_a_file_where_a_directory_must_be_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "root/b", b"a file")

    with pytest.raises(PathClashError, match="root/b is a file where a directory must be"):
        plan_download(manifest(b__c=b"same"), tmp_path / "root", None)


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "root", b"a file")

    with pytest.raises(PathClashError, match="root is not a directory"):
        plan_download(manifest(a=b"same"), tmp_path / "root", None)


def test_a_root_that_can_not_be_written_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with (
        read_only(tmp_path / "root"),
        pytest.raises(PropmasterError, match="root: Read-only file system") as caught,
    ):
        plan_download(manifest(a=b"same"), tmp_path / "root", None)
    assert caught.value.code == "E_WRITE"


def test_a_root_on_a_full_disk_is_told_by_name(tmp_path: Path) -> None:
    with image_mounted("ext4", tmp_path / "image", tmp_path / "disk") as disk:
        (disk / "root").mkdir()
        use_up_inodes(disk)
        for root in (disk / "root", disk / "other"):
            with pytest.raises(NoSpaceError, match=f"{root}: No space left"):
                plan_download(manifest(a=b"same"), root, None)


@pytest.mark.parametrize("name", [".propmaster-Fold.partial", ".propmaster-fOLD.partial"])
def test_no_link_that_was_planted_makes_planning_write_outside(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    root.mkdir()
    (root / name).symlink_to(outside)

    plan_download(manifest(a=b"same"), root, None)

    assert not outside.exists()
    assert [found.name for found in root.iterdir()] == [name]


def test_what_a_kill_has_left_of_asking_the_file_system_is_gone_after_the_next_plan(
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    program = """if True:
        import os, sys
        from pathlib import Path
        from tests.unit.test_plan import manifest, plan_download
        os.unlink = lambda *_, **__: os.kill(os.getpid(), 9)
        plan_download(manifest(a=b""), Path(sys.argv[1]), None)
    """
    killed = subprocess.run([sys.executable, "-c", program, root], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [found.name for found in root.iterdir()] == [".propmaster-Fold.partial"]

    plan_download(manifest(a=b"same"), root, None)

    assert list(root.iterdir()) == []


def test_runs_that_ask_the_file_system_at_once_answer_the_same(tmp_path: Path) -> None:
    """Seen to fail when the name is not locked."""
    with image_mounted("exfat", tmp_path / "image", tmp_path / "disk") as disk:
        root = disk / "root"
        root.mkdir()
        clashing = manifest(a=b"same", A=b"same")

        def refused(_number: int) -> bool:
            with pytest.raises(PathClashError, match="one name on the file system"):
                plan_download(clashing, root, None)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(refused, range(400)))
        assert list(root.iterdir()) == []


@pytest.mark.parametrize("there", ["nothing", "a file"])
def test_a_root_that_may_be_no_link_is_refused_and_nothing_is_made_where_it_leads(
    tmp_path: Path, there: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    if there != "nothing":
        (outside / "a").write_bytes(b"same")
    (tmp_path / "root").symlink_to(outside)
    before = outside.stat().st_mtime_ns

    with pytest.raises(UnsafePathError, match="root is a symbolic link"):
        plan_download(manifest(a=b"same"), tmp_path / "root", None, follow_root=False)

    assert outside.stat().st_mtime_ns == before


@pytest.mark.parametrize("path", [".propmaster-7-5f5e100.partial", "a/.propmaster-x.partial"])
def test_an_entry_with_the_name_of_a_temporary_file_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(PathClashError, match=f"{path} has a name that is kept"):
        plan_download(Manifest.of([entry(path, b"1")]), tmp_path / "root", None)

    assert not (tmp_path / "root").exists()


def test_planning_leaves_nothing_behind(tmp_path: Path) -> None:
    plan_download(manifest(a=b"same"), tmp_path / "root", None)

    assert list((tmp_path / "root").iterdir()) == []


# ---------------------------------------------------------------------------------------- space


def content(size: int, of: int = 0) -> bytes:
    return bytes([of]) * size


def plan_of(root: Path, *sizes: int) -> DownloadPlan:
    root.mkdir(parents=True, exist_ok=True)
    plan = DownloadPlan(root)
    for at, size in enumerate(sizes):
        found = entry(str(at), content(size, at))
        plan.wanted[found.digest] = [found]
    return plan


def cache_at(directory: Path) -> BlobCache:
    return BlobCache.open(directory, store_url="file:///store", max_bytes=1 << 40, min_free_bytes=0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 8 MiB besides what is always left free."""
    with tmpfs_mounted(tmp_path / "disk", size=SPARE_BYTES + 8 * MEBIBYTE) as mounted:
        yield mounted


def test_what_fits_with_something_to_spare_is_accepted(disk: Path) -> None:
    survey([plan_of(disk, 7 * MEBIBYTE)], None, Cancellation())


def test_what_does_not_fit_is_refused_with_what_is_needed_and_what_is_free(disk: Path) -> None:
    plan = plan_of(disk, 4 * MEBIBYTE, 5 * MEBIBYTE)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize

    with pytest.raises(
        NoSpaceError, match=f"disk: {9 * MEBIBYTE} bytes are needed and {free} are free"
    ):
        survey([plan], None, Cancellation())


def test_two_roots_on_one_disk_are_counted_together(disk: Path) -> None:
    plans = [plan_of(disk / "a", 5 * MEBIBYTE), plan_of(disk / "b", 5 * MEBIBYTE)]

    survey(plans[:1], None, Cancellation())
    with pytest.raises(NoSpaceError):
        survey(plans, None, Cancellation())


def test_a_cache_on_the_same_disk_counts_for_what_it_lacks(disk: Path) -> None:
    with cache_at(disk / "cache") as cache:
        plan = plan_of(disk / "root", 5 * MEBIBYTE)
        with pytest.raises(NoSpaceError):
            survey([plan], cache, Cancellation())
        # Then it has the blob, and the root needs 2 MiB of the 3 that are left.
        digest = next(iter(plan.wanted))
        small = plan_of(disk / "root", 2 * MEBIBYTE)
        cache.add(next(iter(small.wanted)), content(2 * MEBIBYTE))
        survey([small], cache, Cancellation())
        assert small.cached == set(small.wanted)
        assert digest not in small.cached


def test_a_cache_on_another_disk_does_not_count(disk: Path, tmp_path: Path) -> None:
    with cache_at(tmp_path / "cache") as cache:
        survey([plan_of(disk, 7 * MEBIBYTE)], cache, Cancellation())


def test_a_cache_that_somebody_removes_counts_for_the_disk_that_it_is_on(disk: Path) -> None:
    with cache_at(disk / "cache") as cache:
        plan = plan_of(disk / "root", 5 * MEBIBYTE)
        shutil.rmtree(disk / "cache")

        with pytest.raises(NoSpaceError):
            survey([plan], cache, Cancellation())
        assert CopyRoom(disk, cache).with_also(manifest(a=b"12345"), is_stored=True) == 10


def test_a_cache_that_can_not_be_looked_into_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    with cache_at(tmp_path / "cache") as cache:
        plan = plan_of(tmp_path / "root", 5)
        [digest] = plan.wanted
        cache.add(digest, content(5))
        wanted = Manifest.of([entry("0", content(5))])
        assert CopyRoom(tmp_path, cache).with_also(wanted, is_stored=True) == 5

        def refuse(_digest: Digest) -> bool:
            raise LocalReadError("Input/output error")

        monkeypatch.setattr(cache, "contains", refuse)
        survey([plan], cache, Cancellation())

        assert plan.cached == set()
        assert CopyRoom(tmp_path, cache).with_also(wanted, is_stored=True) == 10


def test_nothing_to_write_needs_no_space(tmp_path: Path) -> None:
    with tmpfs_mounted(tmp_path / "disk", size=MEBIBYTE) as disk:
        survey([plan_of(disk)], None, Cancellation())


def test_a_wish_to_stop_ends_the_comparison_with_files_in_place(tmp_path: Path) -> None:
    put(tmp_path / "a", b"same")
    cancellation = Cancellation()
    cancellation.cancel()

    with pytest.raises(CancelledError):
        plan_download(manifest(a=b"same"), tmp_path, None, cancellation=cancellation)


def test_a_root_that_is_gone_by_then_is_told(tmp_path: Path) -> None:
    with pytest.raises(LocalReadError, match=r"root: No such file"):
        survey([DownloadPlan(tmp_path / "root")], None, Cancellation())


def test_looking_what_the_cache_has_ends_with_a_wish_to_stop(tmp_path: Path) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    plan = DownloadPlan(tmp_path, wanted={Digest.of(b"x"): [entry("x", b"x")]})

    with (
        BlobCache.open(
            tmp_path / "cache", store_url="file:///s", max_bytes=1 << 20, min_free_bytes=0
        ) as cache,
        pytest.raises(CancelledError),
    ):
        survey([plan], cache, cancellation)


def test_looking_what_is_in_place_ends_with_a_wish_to_stop(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    cancellation = Cancellation()
    cancellation.cancel()

    with pytest.raises(CancelledError):
        plan_download(manifest(a=b"a"), tmp_path, None, cancellation=cancellation)
