"""What a host remembers to have seen in a store is never taken for what the store has now."""

import signal
import sqlite3
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import decode
from agent_plugin.transfer.states import TransferStatus
from agent_plugin.transfer.upload import ASKED_ALWAYS, GRANTED_SECONDS, SAMPLED
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import FARM, QUEUE, Host, action
from tests.servers.promptness import STOP_SECONDS, seconds_until_end
from tests.servers.s3_server import S3Server
from tests.servers.sessions import Sessions, paths_of

SEVERAL = 300
MANY = ASKED_ALWAYS + 100


class Remembered(Sessions):
    """Sessions on a host that has seen all its content in the store, behind a proxy."""

    def __init__(self, tmp_path: Path, s3: S3Server, proxy: FaultProxy) -> None:
        url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
        host = Host(tmp_path / "host", url, environment=s3.environment_at(proxy.url))
        super().__init__(tmp_path, host)
        self.s3 = s3
        self.proxy = proxy
        self.prefix = url.rpartition("/")[2]

    def write(self, directory: Path, count: int, *, starting: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for at in range(count):
            (directory / f"{starting}{at}.tx").write_bytes(content(at))

    def submit(self) -> str:
        """Submit the source directory; return its manifest's key."""
        result, _ = self.host.submit(self.source, output_directories=["renders"])
        return result.attachments.manifests[0].input_manifest_path or ""

    def delete(self, *numbers: int) -> None:
        keys = [f"{self.prefix}/Data/{Digest.of(content(at)).hex}.xxh128" for at in numbers]
        self.s3.client().delete_objects(
            Bucket=self.s3.bucket, Delete={"Objects": [{"Key": key} for key in keys]}
        )

    def lacking(self, manifest: str) -> int:
        """Return how much of what a manifest names the store lacks."""
        with self.host.services(environment=self.s3.environment) as context:
            store = context.open_store()
            data = store.get_document(manifest, max_bytes=1 << 24).data
            return len(store.find_missing([e.digest for e in decode(data, source="").entries]))

    def age(self, seconds: float) -> None:
        """Make what the host remembers so much older."""
        with sqlite3.connect(self.host.state_dir / "index.db") as index:
            index.execute(f"UPDATE existence_cache SET last_seen = last_seen - {int(seconds)}")
        index.close()


def content(at: int) -> bytes:
    return b"content %d" % at


@pytest.fixture
def remembered(s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path) -> Remembered:
    return Remembered(tmp_path, s3, fault_proxy)


def test_a_blob_that_was_deleted_is_stored_again_by_the_next_submission(
    remembered: Remembered,
) -> None:
    s = remembered
    s.write(s.source, SEVERAL)
    s.submit()
    s.delete(77)
    s.proxy.forget()

    assert s.lacking(s.submit()) == 0
    assert s.proxy.count("PUT", "Data/") == 1


@pytest.mark.parametrize("count", [SEVERAL, MANY])
def test_a_blob_that_was_deleted_is_stored_again_by_the_next_task_that_leaves_it(
    remembered: Remembered, count: int
) -> None:
    """However many there are: what a task left is gone with its session."""
    s = remembered
    root = s.started(s.submitted({"scene": b"scene"}))
    s.write(root / "renders", count)
    s.finish(0)
    s.delete(77)
    s.proxy.forget()
    s.write(root / "renders", count, starting="again-")

    result = s.finish(1)

    assert len(paths_of(s.host, result)[0]) == count
    assert s.lacking(result.manifests[0].output_manifest_path) == 0
    assert s.proxy.count("PUT", "Data/") == 1


def test_a_large_submission_asks_for_a_sample_of_what_was_seen_within_the_hour(
    remembered: Remembered,
) -> None:
    s = remembered
    s.write(s.source, MANY)
    s.submit()
    s.proxy.forget()

    s.submit()

    # One more looks whether the store is there.
    assert s.proxy.count("HEAD", "Data/") <= SAMPLED + 1
    assert s.proxy.count("PUT", "Data/") == 0


def test_a_large_submission_asks_for_all_that_was_seen_earlier(remembered: Remembered) -> None:
    s = remembered
    s.write(s.source, MANY)
    s.submit()
    s.age(GRANTED_SECONDS + 1)
    s.delete(77, 1077)
    s.proxy.forget()

    assert s.lacking(s.submit()) == 0
    assert s.proxy.count("PUT", "Data/") == 2
    s.proxy.forget()
    s.submit()
    assert s.proxy.count("HEAD", "Data/") <= SAMPLED + 1, "now all was seen anew"


def test_when_a_sample_is_missing_everything_is_asked_for(remembered: Remembered) -> None:
    s = remembered
    s.write(s.source, MANY)
    s.submit()
    s.delete(*range(0, MANY, 2))

    assert s.lacking(s.submit()) == 0


def test_a_question_that_fails_names_the_file_and_the_same_command_succeeds_later(
    remembered: Remembered,
) -> None:
    s = remembered
    s.write(s.source, 5)
    s.submit()
    key = f"{Digest.of(content(3)).hex}.xxh128"
    s.proxy.inject(Fault.FORBIDDEN, methods={"HEAD", "GET"}, key=key)

    failed = s.host.run(*submit_arguments(s))

    assert failed.returncode == 70, failed.stderr
    assert "error[store-access-denied]: 3.tx: " in failed.stderr
    assert f"{s.prefix}/Data/{key}" in failed.stderr
    assert s.host.transfers()[-1].status is TransferStatus.FAILED
    s.proxy.clear()
    assert s.lacking(s.submit()) == 0


def submit_arguments(s: Remembered) -> list[str]:
    return [
        "submit", str(s.source), "--store", s.host.store_url, "--farm-id", FARM,
        "--queue-id", QUEUE, "--json",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ cancelled


def lease(s: Remembered) -> float:
    """Return until when the last transfer is somebody's."""
    with sqlite3.connect(s.host.state_dir / "ledger.db") as ledger:
        [(until,)] = ledger.execute("SELECT lease_until FROM transfer ORDER BY id DESC LIMIT 1")
    ledger.close()
    return float(until)


def stopped(s: Remembered, process: subprocess.Popen[str], hang: str) -> tuple[float, str]:
    """Send SIGTERM once a request has hung; return the seconds until the end, and stderr."""
    deadline = time.monotonic() + 60
    while not s.proxy.count("HEAD", hang):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the command asked for nothing"
        time.sleep(0.01)
    hung = lease(s)
    while lease(s) <= hung:
        assert time.monotonic() < deadline, "whoever waits for an answer must renew its lease"
        time.sleep(0.05)
    seconds = seconds_until_end(process, signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 77, stderr
    return seconds, stderr


@pytest.mark.parametrize("command", ["finish-task", "submit"])
def test_a_signal_stops_a_command_whose_question_is_not_answered(
    remembered: Remembered, command: str
) -> None:
    s = remembered
    s.write(s.source, 5)
    root = s.started(s.submitted({"scene": b"scene"}))
    (root / "renders").mkdir()
    (root / "renders/known").write_bytes(content(3))
    run = action()
    finish_arguments = [
        "session", "finish-task", "--session-dir", str(s.session_dir), "--step-id", run.step_id,
        "--task-id", str(run.task_id), "--session-action-id", run.session_action_id,
    ]  # fmt: skip
    key = Digest.of(content(3)).hex
    s.proxy.forget()
    s.proxy.inject(Fault.STALL, methods={"HEAD"}, key=key)
    arguments = submit_arguments(s) if command == "submit" else finish_arguments

    seconds, stderr = stopped(s, s.host.popen(*arguments), key)

    assert "error[cancelled]: stopped on request" in stderr
    assert seconds < STOP_SECONDS
    assert s.host.transfers()[-1].status is TransferStatus.WAITING
    s.proxy.clear()
    assert s.finish().files == 1
