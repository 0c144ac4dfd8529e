"""`propmaster doctor --agent` looks at an installation as the agent and its job users use it."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.workers.deadline import agent_status
from tests.servers.command import CALL_SECONDS
from tests.servers.deadline_peers import AGENT_PYTHON
from tests.servers.worker_host import WorkerHost, open_host

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def host() -> Iterator[WorkerHost]:
    with open_host() as opened:
        yield opened


@dataclass
class Installed:
    """A host with settings and a worker agent.

    Attributes:
        config: The settings' file.
        agent_python: Of the agent's environment.
        sessions: Where the agent makes sessions.
    """

    host: WorkerHost
    config: Path
    agent_python: Path
    sessions: Path

    def propmaster(self, *words: str | Path) -> list[str]:
        argv = [self.host.own_python(), "-P", "-m", "agent_plugin", *words]
        return [*map(str, argv), "--config", str(self.config), "--json"]

    def run(self, *words: str | Path) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            self.propmaster(*words), capture_output=True, timeout=CALL_SECONDS, check=False
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def faults(self, *words: str | Path) -> Mapping[str, str]:
        """Return the probes of the agent that are not ok, and what was found."""
        options = ("--session-dir", self.sessions, "--agent-python", self.agent_python)
        code, told = self.run("doctor", "--agent", *options, *words)
        names = [probe["name"] for probe in told["probes"]]
        of_agent = told["probes"][names.index("agent") :]
        needed = [probe for probe in of_agent if probe["needed"] and probe["ok"] is False]
        assert told["agent"] is not bool(needed)
        assert (code == 0) is (told["copied"] and told["agent"])
        return {probe["name"]: probe["reason"] for probe in of_agent if probe["ok"] is False}


@pytest.fixture
def installed(host: WorkerHost, tmp_path: Path) -> Iterator[Installed]:
    home = host.directory / tmp_path.name
    for name in ("run", "state", "cache", "sessions"):
        (home / name).mkdir(parents=True)
    shutil.chown(home / "sessions", host.agent, host.agent)
    config = home / "config.toml"
    config.write_text(
        f'[paths]\nstate_dir = "{home}/state"\ncache_dir = "{home}/cache"\n'
        f'[worker]\nsocket = "{home}/run/worker.socket"\nagent_user = "{host.agent}"\n'
    )
    yield Installed(host, config, host.agent_python(AGENT_PYTHON), home / "sessions")
    shutil.rmtree(home)


def test_an_installation_is_whole_once_the_document_was_followed(
    installed: Installed, host: WorkerHost
) -> None:
    job = ("--job-user", host.job)
    faults = installed.faults(*job)
    assert {"attachment_download", "attachment_upload", "service", "job_user"} <= set(faults)
    assert faults["attachment_download"] == "the agent's own"

    code, _ = installed.run("worker", "install", "--agent-python", installed.agent_python)
    assert code == 0
    with subprocess.Popen(installed.propmaster("worker", "serve"), stdout=subprocess.PIPE) as serve:
        assert serve.stdout is not None
        assert "ready" in json.loads(serve.stdout.readline())
        try:
            # What is left may be so: nobody has said that VIRTUAL jobs are wanted.
            assert set(installed.faults(*job)) <= {"vfs", "systemd"}

            installed.config.chmod(0o600)
            assert "can not be read" in installed.faults(*job)["job_user"]
            installed.config.chmod(0o644)
            installed.sessions.chmod(0o777)
            assert "others may write to it" in installed.faults(*job)["session_root"]
            installed.sessions.chmod(0o755)
            sudoers = Path("/etc/sudoers.d", host.agent)
            rule = sudoers.read_text()
            sudoers.write_text(rule.replace(f"{host.job},", ""))
            assert {"sudo", "sudo_environment"} <= set(installed.faults(*job))
            sudoers.write_text(rule)
        finally:
            serve.send_signal(signal.SIGTERM)
            assert serve.wait(CALL_SECONDS) == 0


def test_a_service_that_systemd_can_not_start_does_not_answer(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting to it works: systemd listens in its place."""
    monkeypatch.setattr(agent_status, "_ANSWER_SECONDS", 0.5)
    path = installed.sessions.parent / "run/worker.socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        waiting = agent_status.answers(path)
        # Whoever has given up is first in the queue.
        listener.accept()[0].close()
        monkeypatch.setattr(agent_status, "_ANSWER_SECONDS", 30.0)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(agent_status.answers, path)
            listener.accept()[0].close()
            gone = asked.result()

    assert (waiting.ok, gone.ok) == (False, False)
    assert waiting.reason == f"nobody has answered at {path} for 0 s"
    assert gone.reason == f"who listens at {path} does not answer"


def test_an_agent_whose_jobs_are_its_own_user_needs_no_service(installed: Installed) -> None:
    installed.run("worker", "install", "--agent-python", installed.agent_python)

    assert installed.faults() == {}


def test_users_that_are_not_there_are_named(installed: Installed) -> None:
    installed.config.write_text(
        installed.config.read_text().replace('agent_user = "', 'agent_user = "no')
    )

    faults = installed.faults("--job-user", "nobody-of-that-name")
    assert "nobody-of-that-name" in faults["job_user"]
    assert f"no{installed.host.agent}" in faults["agent_user"]


def test_what_goes_with_agent_is_refused_without_it(installed: Installed) -> None:
    done = subprocess.run(
        installed.propmaster("doctor", "--job-user", "root"),
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )

    assert done.returncode == 2
    assert "--job-user go with --agent" in done.stderr
