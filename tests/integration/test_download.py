"""What a session start does while it is at work: how it stops, what it says, what it needs."""

import signal
import threading
import time
from pathlib import Path

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.blob_cache import Claim
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import BlobNotFoundError
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.content.parts import PART_BYTES, WINDOW_PARTS
from agent_plugin.content.store import Cancellation
from agent_plugin.session.job import JobDocument
from agent_plugin.transfer.download_cache import DownloadCache
from agent_plugin.transfer.ledger import Ledger, TaskRow
from agent_plugin.transfer.states import TaskStatus
from tests.servers.disks import MEBIBYTE, tmpfs_mounted
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, job_of
from tests.servers.promptness import STOP_SECONDS
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files, write_random

MANY = 60_000


def _job_of_copies(host: Host, source: Path) -> JobDocument:
    """Return a job with many files of one content."""
    write_files(source, {"one": 15_000}, mtime_ns=1_600_000_000 * 10**9)
    job = job_of(host.submit(source, output_directories=["renders"])[0])
    digest = Digest.of((source / "one").read_bytes())
    manifest = Manifest.of(
        [
            FileEntry(hash=digest.hex, size=digest.size, mtime=0, path=f"{at % 200}/{at}")
            for at in range(MANY)
        ]
    )
    data = encode(manifest)
    [root] = job.attachments.manifests
    assert root.input_manifest_path
    path = f"{root.input_manifest_path}-of-copies"
    with host.services() as context:
        context.open_store().put_document(path, data, {})
    copies = msgspec.structs.replace(
        root, input_manifest_path=path, input_manifest_hash=Digest.of(data).hex
    )
    attachments = msgspec.structs.replace(job.attachments, manifests=(copies,))
    return msgspec.structs.replace(job, attachments=attachments)


def test_a_signal_stops_a_start_that_places_one_content_many_times(tmp_path: Path) -> None:
    host = Host(tmp_path / "host", f"file://{tmp_path}/store")
    job = _job_of_copies(host, tmp_path / "source")
    session_dir = tmp_path / "session"
    running = host.popen(*host.start_arguments(job, session_dir))
    # What is in place is told while one content is placed.
    until(lambda: host.transfers()[-1].kind == "sync-in" and host.transfers()[-1].done > 0)

    running.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    _, errors = running.communicate(timeout=60)
    stopped = time.monotonic() - signalled

    assert running.returncode == 77, errors
    assert stopped < STOP_SECONDS
    assert host.transfers()[-1].done < host.transfers()[-1].size


def test_the_bytes_of_a_large_blob_are_counted_while_they_come(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    url = f"s3://{s3.bucket}/{s3_prefix}"
    source = tmp_path / "source"
    size = (WINDOW_PARTS + 2) * PART_BYTES
    write_files(source, {"large": size}, mtime_ns=1_600_000_000 * 10**9)
    job = job_of(Host(tmp_path / "submitter", url, environment=s3.environment).submit(source)[0])
    host = Host(tmp_path / "host", url, environment=s3.environment_at(fault_proxy.url))
    # One of the parts that are asked for only when the first has come.
    fault_proxy.inject(Fault.STALL, key="Data/", skip=WINDOW_PARTS, times=1)
    running = host.popen(*host.start_arguments(job, tmp_path / "session"))

    until(lambda: host.state_dir.joinpath("ledger.db").exists())
    until(lambda: any(PART_BYTES <= row.done < row.size for row in host.transfers()))
    fault_proxy.release()
    _, errors = running.communicate(timeout=60)

    assert running.returncode == 0, errors
    [transfer] = host.transfers()
    assert transfer.done == transfer.size == size


@pytest.mark.expected_events(events.CACHE_BYPASSED)
def test_a_large_blob_needs_its_size_once_on_the_disk_of_the_session(tmp_path: Path) -> None:
    """Also when the cache, on another disk, can not take it."""
    url = f"file://{tmp_path}/store"
    source = tmp_path / "source"
    source.mkdir()
    write_random(source / "large", 120 * MEBIBYTE, seed="large")
    job = job_of(Host(tmp_path / "submitter", url).submit(source)[0])
    with (
        tmpfs_mounted(tmp_path / "cache-disk", size=20 * MEBIBYTE) as cache_disk,
        tmpfs_mounted(tmp_path / "disk", size=(120 + 64 + 20) * MEBIBYTE) as disk,
    ):
        paths = {"cache_dir": str(cache_disk / "cache"), "state_dir": str(tmp_path / "state")}
        host = Host(tmp_path / "host", url, settings={"paths": paths})

        [root] = host.start(job, disk / "session").roots

        assert root.bytes_fetched == 120 * MEBIBYTE
        assert files_below(Path(root.local_root)) == files_below(source)


@pytest.mark.expected_events(events.SESSION_START_FAILED)
def test_a_thread_that_is_left_behind_finds_no_fault_with_a_cache_that_was_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail, with an event of a cache that is bypassed, when it still comes to the cache."""
    url = f"file://{tmp_path}/store"
    source = tmp_path / "source"
    write_files(source, {"lost": 900, "late": 901}, mtime_ns=1_600_000_000 * 10**9)
    job = job_of(Host(tmp_path / "submitter", url).submit(source)[0])
    lost, late = (Digest.of((source / name).read_bytes()) for name in ("lost", "late"))
    (tmp_path / f"store/Data/{lost.hex}.xxh128").unlink()
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    claim = DownloadCache.claim

    def claim_late(self: DownloadCache, digest: Digest, halt: Cancellation) -> Claim | None:
        if digest != late:
            assert begun.wait(30)
            return claim(self, digest, halt)
        begun.set()
        assert go_on.wait(30)
        try:
            return claim(self, digest, halt)
        finally:
            ended.set()

    monkeypatch.setattr(DownloadCache, "claim", claim_late)
    with pytest.raises(BlobNotFoundError):
        Host(tmp_path / "host", url).start(job, tmp_path / "session")
    go_on.set()

    assert ended.wait(30)


def test_the_ledger_says_which_file_is_under_way_and_how_often_it_was_tried(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    url = f"s3://{s3.bucket}/{s3_prefix}"
    source = tmp_path / "source"
    write_files(source, {"tried": 900, "at once": 901}, mtime_ns=1_600_000_000 * 10**9)
    job = job_of(Host(tmp_path / "submitter", url, environment=s3.environment).submit(source)[0])
    host = Host(tmp_path / "host", url, environment=s3.environment_at(fault_proxy.url))
    key = Digest.of((source / "tried").read_bytes()).hex
    fault_proxy.inject(Fault.UNAVAILABLE, key=key, times=2)
    fault_proxy.inject(Fault.STALL, key=key, times=1)
    running = host.popen(*host.start_arguments(job, tmp_path / "session"))

    def tasks() -> dict[str, TaskRow]:
        with Ledger.open(host.state_dir / "ledger.db") as ledger:
            rows = [row for transfer in ledger.transfers() for row in ledger.tasks(transfer.id)]
        return {row.destination: row for row in rows}

    until(lambda: host.state_dir.joinpath("ledger.db").exists())
    until(lambda: "tried" in tasks() and tasks()["tried"].tries == 3)
    assert tasks()["tried"].status == TaskStatus.EXECUTING
    fault_proxy.release()
    _, errors = running.communicate(timeout=60)

    assert running.returncode == 0, errors
    found = {path: (row.status, row.tries) for path, row in tasks().items()}
    assert found == {"tried": (TaskStatus.DONE, 3), "at once": (TaskStatus.DONE, 1)}
