"""A session that is starting, steered by commands from other processes."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.transfer.api import Session
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host
from tests.servers.proxied_object import until, until_unchanged
from tests.servers.s3_server import S3Server
from tests.servers.sessions import Sessions
from tests.servers.trees import files_below

FILES: dict[str | bytes, bytes | int] = {f"tex/{at:03}.tx": 5_000 + at for at in range(200)}


class Started:
    """A session whose start waits for the store, which has answered twenty times, until it may."""

    def __init__(self, tmp_path: Path, s3: S3Server, prefix: str, proxy: FaultProxy) -> None:
        url = f"s3://{s3.bucket}/{prefix}"
        self.sessions = Sessions(
            tmp_path, Host(tmp_path / "artist", url, environment=s3.environment)
        )
        job = self.sessions.submitted(dict(FILES))
        environment = s3.environment_at(proxy.url)
        self.host = self.sessions.host = Host(tmp_path / "worker", url, environment=environment)
        self.proxy = proxy
        proxy.inject(Fault.STALL, key="Data/", skip=20)
        self._told = tmp_path / "told"
        with self._told.open("w") as told:
            self.process = subprocess.Popen(
                self.host.argv(*self.host.start_arguments(job, self.sessions.session_dir)),
                env=self.host.process_environment(), stdout=subprocess.DEVNULL, stderr=told,
            )  # fmt: skip

    def until_running(self) -> None:
        session = Session(self.host.state_dir / "ledger.db")
        until(lambda: session.find_one("job WHERE status=running AND done>0") is not None)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self.host.run(*words, "--json")

    def told(self, *words: str) -> list[dict[str, Any]]:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        [found] = json.loads(done.stdout).values()
        return list(found)

    def until_told(self, text: str) -> None:
        """Wait until the start tells something."""
        until(lambda: text in self._told.read_text())

    def ends(self, code: int) -> str:
        self.process.wait(100)
        errors = self._told.read_text()
        assert self.process.returncode == code, errors
        return errors


@pytest.fixture
def started(
    tmp_path: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy
) -> Iterator[Started]:
    made = Started(tmp_path, s3, s3_prefix, fault_proxy)
    try:
        made.until_running()
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()


def test_t9_t10_a_start_is_paused_relieved_of_a_file_and_resumed_by_commands(
    started: Started,
) -> None:
    [paused] = started.told("transfer", "pause", "--where", "kind=sync-in AND status=running")
    started.until_told("transfer 1 is paused by ")
    started.proxy.release()
    asked = until_unchanged(lambda: started.proxy.count("GET", "Data/"))
    [one] = started.told("task", "find", "job.id=1 and status=queued", "--limit", "1")
    [excluded] = started.told("task", "exclude", str(one["id"]))
    [shown] = started.told("transfer", "find", "parent=job-*", "--attributes", "status,etr,size")

    assert paused["status"] == shown["status"] == "paused"
    assert (shown["etr"], excluded["status"]) == ("", "excluded")
    assert started.process.poll() is None, "a start waits while it is paused"
    assert started.proxy.count("GET", "Data/") == asked < len(FILES)
    assert started.told("transfer", "resume", "1")[0]["status"] in ("waiting", "running")
    started.ends(0)
    left = {path.partition("/")[2] for path in files_below(started.sessions.session_dir)}
    assert left == {str(name) for name in FILES} - {one["destination"]["path"]}
    watched = started.host.run("transfer", "watch", "1")
    assert watched.returncode == 0
    assert watched.stdout.startswith("transfer 1 done: 100 %, ")
    assert "199 of 199 files, 1 excluded" in watched.stdout


def test_t9_a_start_is_aborted_by_a_command(started: Started) -> None:
    [found] = started.told("transfer", "abort", "1")
    errors = started.ends(100)

    assert found["status"] == "aborted"
    assert "error[transfer-aborted]" in errors
    whole = files_below(started.sessions.source)
    for path, found_there in files_below(started.sessions.session_dir).items():
        assert found_there == whole.get(path.partition("/")[2]), "nothing half-written stays"
    assert [each["id"] for each in started.told("transfer", "find", "status=aborted")] == [1]
    assert started.run("transfer", "watch", "1").returncode == 1
