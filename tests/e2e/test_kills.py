"""Commands killed at random moments and run again: the same result, and nothing fetched twice.

The moment is drawn from the time that a whole run takes here, measured first; the seed is fixed.
"""

import json
import random
import re
import signal
import subprocess
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import decode
from agent_plugin.session.job import JobDocument
from agent_plugin.transfer.states import TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action, job_of, job_with_outputs
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import FileFacts, files_below, write_files

FILES: dict[str | bytes, bytes | int] = {
    **{f"tex/{at % 5}/{at}.tx": 20_000 + at for at in range(100)},
    "twice/a": 30_000,
    "empty": b"",
    "big.abc": 20_000_000,
}
MTIME_NS = 1_600_000_000_123_457_000


@dataclass
class Worker:
    """Where sessions of one job are started and killed, each time on a fresh host.

    Attributes:
        facts: Of the job's inputs.
        seconds: What a whole start takes.
        hits: How many kills met a process that was still at work.
    """

    tmp_path: Path
    proxy: FaultProxy
    s3: S3Server
    url: str
    job: JobDocument
    facts: dict[str, FileFacts]
    seconds: float = 0.0
    hits: int = 0

    def host(self, name: str) -> Host:
        return Host(
            self.tmp_path / name, self.url, environment=self.s3.environment_at(self.proxy.url)
        )

    def kill_and_resume(self, name: str, moments: list[float]) -> None:
        """Start a session, kill it after each of the moments, and let it finish at last."""
        host = self.host(name)
        session = self.tmp_path / f"{name}-session"
        arguments = host.start_arguments(self.job, session)
        finished: set[str] = set()
        for moment in moments:
            process = host.popen(*arguments)
            time.sleep(moment)
            process.kill()
            process.communicate()
            self.hits += process.returncode == -signal.SIGKILL
            # What the killed process had sent is still being read.
            until(lambda: not self.proxy._open_connections())
            self.assert_fetched_none_of(finished)
            finished = finished_blobs(host)
            self.proxy.forget()
        resumed = host.run(*arguments)

        assert resumed.returncode == 0, resumed.stderr
        root = Path(json.loads(resumed.stdout)["roots"][0]["localRoot"])
        assert files_below(root) == self.facts
        assert [path.name for path in session.iterdir()] == [root.name]
        self.assert_fetched_none_of(finished)
        twice = [blob for blob, count in self.fetched().items() if count > 1]
        assert twice == [], "fetched twice in one run"
        # More than one if a kill came between the last file and the end of the command.
        assert {row.status for row in host.transfers()} == {TransferStatus.DONE}

    def assert_fetched_none_of(self, finished: set[str]) -> None:
        again = finished & {blob for blob, _ in self.fetched()}
        assert not again, "a finished blob was fetched again"

    def fetched(self) -> Counter[tuple[str, str]]:
        """Return how often each range of each blob was asked for."""
        return Counter(
            (request.key.rpartition("/")[2][:32], request.headers.get("range", ""))
            for request in self.proxy.requests
            if request.method == "GET" and "/Data/" in request.key
        )


def finished_blobs(host: Host) -> set[str]:
    """Return the hashes of the blobs that the cache has under their names."""
    return {
        path.name
        for path in host.cache_dir.glob("v1/*/??/*")
        if re.fullmatch("[0-9a-f]{32}", path.name)
    }


@pytest.fixture
def worker(s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path) -> Worker:
    source = tmp_path / "source"
    write_files(source, FILES, mtime_ns=MTIME_NS)
    (source / "twice/b").write_bytes((source / "twice/a").read_bytes())
    url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
    submitter = Host(tmp_path / "submitter", url, environment=s3.environment)
    job = job_of(submitter.submit(source)[0])
    big = Digest.of((source / "big.abc").read_bytes()).hex
    # So that a start is mostly fetching: a sixth of a second for each small blob.
    fault_proxy.inject(Fault.DRIP, key=f"Data/(?!{big})", bytes_per_second=120_000)
    worker = Worker(tmp_path, fault_proxy, s3, url, job, files_below(source))
    started = time.monotonic()
    worker.kill_and_resume("unharmed", [])
    worker.seconds = time.monotonic() - started
    return worker


def kill_many(worker: Worker, rounds: int) -> None:
    chance = random.Random(20_261_122)
    for at in range(rounds):
        # Every fourth session is killed a second time while it goes on.
        moments = [chance.uniform(0, worker.seconds) for _ in range(1 + (at % 4 == 3))]
        worker.kill_and_resume(f"round-{at}", moments)
    assert worker.hits >= rounds * 3 // 4, "the kills came too late to show anything"


def test_five_kills_of_a_start_lose_nothing(worker: Worker) -> None:
    kill_many(worker, 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_of_a_start_lose_nothing(worker: Worker) -> None:
    kill_many(worker, 40)


# ------------------------------------------------------------------------------------- finish-task


def outputs_are_whole(s3: S3Server, url: str) -> int:
    """See that every output manifest names only blobs that are there; return how many there are."""
    client = s3.client()
    prefix = url.rpartition("/")[2]
    keys = [
        found["Key"]
        for found in client.list_objects_v2(Bucket=s3.bucket, Prefix=f"{prefix}/").get(
            "Contents", []
        )
    ]
    manifests = [key for key in keys if key.endswith("_output")]
    for key in manifests:
        data = client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()
        for entry in decode(data, source=key).entries:
            assert f"{prefix}/Data/{entry.hash}.xxh128" in keys
    return len(manifests)


def finish_and_kill(s3: S3Server, proxy: FaultProxy, tmp_path: Path, rounds: int) -> None:
    chance = random.Random(20_261_123)
    seconds = 0.0
    for at in range(rounds + 1):
        url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
        host = Host(tmp_path / f"host-{at}", url, environment=s3.environment_at(proxy.url))
        session = tmp_path / f"session-{at}"
        started = host.start(job_with_outputs(url, "/show", "renders"), session)
        root = Path(started.roots[0].local_root)
        write_files(root, {f"renders/{n}.exr": 20_000 + n for n in range(60)}, mtime_ns=MTIME_NS)
        run = action(started_at=1_700_000_000.0)
        arguments = [
            "session", "finish-task", "--session-dir", str(session), "--step-id", run.step_id,
            "--task-id", str(run.task_id), "--session-action-id", run.session_action_id,
            "--started-at", repr(run.started_at), "--json",
        ]  # fmt: skip
        begun = time.monotonic()
        if at:
            process = host.popen(*arguments)
            time.sleep(chance.uniform(0, seconds))
            process.kill()
            process.communicate()
            outputs_are_whole(s3, url)
        done = host.run(*arguments)
        seconds = seconds or time.monotonic() - begun
        _assert_finished(done, outputs_are_whole(s3, url))
        assert sorted(files_below(root)) == sorted(f"renders/{n}.exr" for n in range(60))


def _assert_finished(done: "subprocess.CompletedProcess[str]", manifests: int) -> None:
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    # Killed after the state was written, it had finished, and there is nothing left to do.
    assert printed["files"] in (0, 60)
    assert manifests == 1


def test_a_task_whose_finish_was_killed_is_finished_by_the_next_try(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    finish_and_kill(s3, fault_proxy, tmp_path, 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_of_a_finish_lose_nothing(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    finish_and_kill(s3, fault_proxy, tmp_path, 50)
