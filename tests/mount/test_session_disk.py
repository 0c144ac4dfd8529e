"""What sessions take of a disk that has little room, and perhaps the blob cache as well."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.session.job import JobDocument
from agent_plugin.transfer.plan import SPARE_BYTES
from tests.servers.disks import MEBIBYTE, tmpfs_mounted
from tests.servers.hooks import Host, job_of
from tests.servers.sessions import MTIME_NS
from tests.servers.trees import write_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

ROOM = 8 * MEBIBYTE


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs_mounted(tmp_path / "disk", size=SPARE_BYTES + ROOM) as mounted:
        yield mounted


@pytest.fixture
def host(tmp_path: Path, disk: Path) -> Host:
    cache = {"max_bytes": "1 GiB", "min_free": 0}
    return Host(disk / "host", f"file://{tmp_path}/store", settings={"cache": cache})


def submitted(host: Host, source: Path, *sizes: int) -> JobDocument:
    """Return a job of one file of each size, each with a content of its own."""
    files: dict[str | bytes, bytes | int] = {
        f"{at}.tx": bytes([at]) * size for at, size in enumerate(sizes)
    }
    write_files(source, files, mtime_ns=MTIME_NS)
    result, _ = host.submit(source, output_directories=("renders",))
    return job_of(result)


def test_auto_counts_what_the_cache_keeps_on_the_same_disk(
    host: Host, disk: Path, tmp_path: Path
) -> None:
    """Caught: the files alone compared with the free space, so that no session started."""
    job = submitted(host, tmp_path / "show", 5 * MEBIBYTE)
    session_dir = disk / "session"

    [root] = host.start(job, session_dir, file_system="AUTO").roots

    try:
        assert root.file_system == "VIRTUAL"
        assert root.reason.startswith(
            f"{5 * MEBIBYTE} bytes do not fit beside {5 * MEBIBYTE} of other inputs and of the blob"
        )
        assert Path(root.local_root, "0.tx").read_bytes() == bytes(5 * MEBIBYTE)
    finally:
        host.end(session_dir)


def test_auto_counts_no_blob_that_the_cache_has_and_none_twice(
    host: Host, disk: Path, tmp_path: Path
) -> None:
    """Caught: the blobs of all files counted, those that the cache has among them."""
    job = submitted(host, tmp_path / "show", 3 * MEBIBYTE)
    host.start(job, disk / "session-1", file_system="COPIED")
    host.end(disk / "session-1")
    more = submitted(host, tmp_path / "more", 3 * MEBIBYTE, MEBIBYTE // 2)

    [root] = host.start(more, disk / "session-2", file_system="AUTO").roots
    host.end(disk / "session-2")

    # 3.5 MiB of files and half a MiB for the cache, where it has left 5 MiB.
    few = f"2 files of {7 * MEBIBYTE // 2} bytes are few"
    assert (root.file_system, root.reason) == ("COPIED", few)


def test_what_a_mount_keeps_is_measured_by_the_disk_of_its_session(
    disk: Path, tmp_path: Path
) -> None:
    """Caught: a floor of so many percent of the cache's disk, and one for sources alone."""
    settings = {"cache": {"min_free": "25 %"}, "mounts": {"source_bytes": "50 %"}}
    host = Host(tmp_path / "host", f"file://{tmp_path}/store", settings=settings)
    job = submitted(host, tmp_path / "show", 1000)

    [root] = host.start(job, disk / "session", file_system="VIRTUAL").roots
    known = host.mounts.spec_of(Path(root.local_root))
    host.end(disk / "session")

    assert known is not None
    spec, _ = known
    assert (spec.spool_max_bytes, spec.spool_min_free_bytes) == (
        (SPARE_BYTES + ROOM) // 2,
        (SPARE_BYTES + ROOM) // 4,
    )
