"""Downloads for the agent that are cancelled, killed or out of space; and uploads after that."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from agent_plugin.content import events
from agent_plugin.content.store import Cancellation
from agent_plugin.session.job import JobDocument
from agent_plugin.workers.call import ATTACHMENT_DOWNLOAD, JobUser
from tests.servers.attachment_calls import AgentSession, Said
from tests.servers.disks import tmpfs_mounted
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import REPOSITORY, Host, job_of
from tests.servers.other_user import NOBODY
from tests.servers.promptness import STOP_SECONDS
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files

MTIME_NS = 1_622_505_600_123_457_000
INPUTS: dict[str | bytes, bytes | int] = {
    **{f"tex/{at}.tx": 20_000 + at for at in range(40)},
    "big.abc": 20_000_000,
}
WAIT_SECONDS = 60.0


class Waiting(NamedTuple):
    """A session whose blobs hang, after some have come."""

    session: AgentSession
    proxy: FaultProxy
    source: Path
    job: JobDocument

    def await_requests(self, count: int) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while self.proxy.count("GET", "Data/") < count:
            assert time.monotonic() < deadline, "nothing was asked for"
            time.sleep(0.005)

    def has_come(self) -> bool:
        """Whether a blob is in the host's cache besides the manifest."""
        return len([*self.session.host.cache_dir.glob("v1/*/??/*")]) > 1

    def left(self) -> list[str]:
        """Return what of ours is in the session directory."""
        return [path.name for path in self.session.directory.rglob(".propmaster*")]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others can get to: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="propmaster-interrupted-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture
def waiting(
    s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, tmp_path: Path, place: Path
) -> Waiting:
    url = f"s3://{s3.bucket}/{s3_prefix}"
    write_files(tmp_path / "source", INPUTS, mtime_ns=MTIME_NS)
    submitter = Host(tmp_path / "submitter", url, environment=s3.environment)
    job = job_of(submitter.submit(tmp_path / "source", output_directories=["renders"])[0])
    host = Host(tmp_path / "worker", url, environment=s3.environment_at(fault_proxy.url))
    job_user = JobUser(NOBODY, NOBODY) if os.geteuid() == 0 else None
    session = AgentSession(host, job, place / "session", job_user=job_user)
    fault_proxy.inject(Fault.STALL, key="Data/", skip=10)
    return Waiting(session, fault_proxy, tmp_path / "source", job)


def test_a_cancelled_download_ends_while_the_store_hangs_and_goes_on_later(
    waiting: Waiting, expected_events: set[str]
) -> None:
    expected_events |= {events.SESSION_START_FAILED}
    cancellation = Cancellation()
    ended: list[Said] = []

    def bring_in() -> None:
        ended.append(waiting.session.sync_job(cancellation=cancellation))

    thread = threading.Thread(target=bring_in)
    thread.start()
    waiting.await_requests(15)
    cancelled = time.monotonic()
    cancellation.cancel()
    thread.join(WAIT_SECONDS)
    seconds = time.monotonic() - cancelled
    shown = waiting.session.root().exists()
    had_come = waiting.has_come()
    waiting.proxy.clear()
    again = waiting.session.sync_job()

    assert (ended[0].exit_code, shown) == (77, False)
    assert seconds < STOP_SECONDS
    assert again.exit_code == 0, again.lines
    assert files_below(waiting.session.root()) == files_below(waiting.source)
    assert waiting.left() == []
    # Those that pass may all be parts of the large one, or not be whole yet.
    assert (", 0 bytes reused" not in again.plain[-1]) is had_come, "what had come is kept"


def test_a_killed_download_goes_on(waiting: Waiting) -> None:
    session = waiting.session
    session.job_user = None
    session.directory.chmod(0o700)
    roots = [*session.roots.values()]
    argv = [sys.executable, "-P", "-m", "agent_plugin.workers", ATTACHMENT_DOWNLOAD]
    argv += ["-s3", session.job.store_url, "-wp", os.fspath(session.write(roots))]
    environment = session.host.process_environment(
        PROPMASTER_CONFIG=os.fspath(session.host.config),
        DEADLINE_FARM_ID=session.job.farm_id,
        DEADLINE_QUEUE_ID=session.job.queue_id,
        DEADLINE_JOB_ID=session.job.job_id,
        PYTHONPATH=os.fspath(REPOSITORY),
    )
    process = subprocess.Popen(argv, cwd=session.directory, env=environment)
    waiting.await_requests(15)

    process.send_signal(signal.SIGKILL)
    process.wait(WAIT_SECONDS)
    shown = session.root().exists()
    waiting.proxy.clear()
    again = session.sync_job()

    assert (process.returncode, shown) == (-signal.SIGKILL, False)
    assert again.exit_code == 0, again.lines
    assert files_below(session.root()) == files_below(waiting.source)
    assert waiting.left() == []


def test_a_disk_that_does_not_hold_the_inputs_is_told_before_anything_is_written(
    waiting: Waiting, place: Path, expected_events: set[str]
) -> None:
    expected_events |= {events.SESSION_START_FAILED}
    waiting.proxy.clear()
    with tmpfs_mounted(place / "disk", size=16 * 1024 * 1024) as disk:
        session = AgentSession(waiting.session.host, waiting.job, disk / "session")

        said = session.sync_job()

        assert said.exit_code == 72
        assert "bytes are needed" in said.told("openjd_fail")[0]
        assert not session.root().exists()
