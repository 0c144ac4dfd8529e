"""`propmaster worker install` on agents that the real pip installs, updates and removes."""

import subprocess
import sys
from pathlib import Path

import pytest

from agent_plugin.workers.deadline.agent_environment import (
    KNOWN_SHA256,
    SCRIPTS,
    find_agent,
    sha256_of,
)
from tests.servers.agent_copies import SCRIPTS as SCRIPTS_DIRECTORY
from tests.servers.agent_copies import tree_of
from tests.servers.command import Command

pytestmark = [pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(500)]

PIP_SECONDS = 300.0
PACKAGE = "deadline-cloud-worker-agent"


class PipEnvironment:
    """A virtual environment with pip, and the agent alone, without what it needs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.python = directory / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", directory], check=True, timeout=PIP_SECONDS)
        [self.site] = directory.glob("lib/python3*/site-packages")

    def pip(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, "-m", "pip", "--disable-pip-version-check", *words],
            capture_output=True,
            text=True,
            timeout=PIP_SECONDS,
            check=False,
        )

    def has(self, version: str) -> None:
        done = self.pip("install", "--no-deps", f"{PACKAGE}=={version}")
        assert done.returncode == 0, done.stderr

    def hashes(self) -> dict[str, str]:
        directory = self.site / SCRIPTS_DIRECTORY
        return {name: sha256_of((directory / name).read_bytes()) for name in SCRIPTS}

    def ours(self) -> list[str]:
        """Return what propmaster has left in the environment."""
        return [path.name for path in self.site.rglob("*propmaster*")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> PipEnvironment:
    return PipEnvironment(tmp_path_factory.mktemp("pip") / "agent")


@pytest.fixture
def run(tmp_path: Path) -> Command:
    return Command(tmp_path / "host")


def states(run: Command, *words: str | Path) -> list[str]:
    return [script["state"] for script in run("worker", *words, "--json").json["scripts"]]


@pytest.mark.parametrize("version", ["0.29.0", "0.33.6"])
def test_a_real_agent_is_as_it_was_after_install_and_uninstall(
    environment: PipEnvironment, run: Command, version: str
) -> None:
    environment.has(version)
    before = tree_of(environment.directory)
    check = environment.pip("check")
    assert environment.hashes() == KNOWN_SHA256[version]

    assert states(run, "install", "--agent-python", environment.python) == ["ours"] * 2
    status = run("worker", "status", "--same-user", "--json")
    assert status.code == 0, status.text
    assert status.json["agentVersion"] == version
    again = environment.pip("check")
    assert (again.returncode, again.stdout) == (check.returncode, check.stdout)

    assert states(run, "uninstall") == ["original"] * 2
    assert tree_of(environment.directory) == before


def test_a_real_agent_of_another_version_is_refused(
    environment: PipEnvironment, run: Command
) -> None:
    environment.has("0.28.21")
    before = tree_of(environment.directory)

    refused = run("worker", "install", "--agent-python", environment.python, "--force")

    assert refused.code == 90
    assert "deadline-cloud-worker-agent 0.28.21" in refused.stderr
    assert tree_of(environment.directory) == before


def test_pip_updates_and_removes_an_agent_that_propmaster_is_in(
    environment: PipEnvironment, run: Command
) -> None:
    environment.has("0.29.0")
    assert states(run, "install", "--agent-python", environment.python) == ["ours"] * 2
    environment.has("0.33.6")

    status = run("worker", "status", "--same-user", "--json")
    assert status.code == 1
    assert [script["state"] for script in status.json["scripts"]] == ["original"] * 2
    assert states(run, "install", "--agent-python", environment.python) == ["ours"] * 2
    assert run("worker", "status", "--same-user").code == 0
    assert states(run, "uninstall") == ["original"] * 2
    assert environment.hashes() == KNOWN_SHA256["0.33.6"]
    assert environment.ours() == []

    # Updated and uninstalled without an installation in between.
    environment.has("0.29.0")
    assert states(run, "install", "--agent-python", environment.python) == ["ours"] * 2
    environment.has("0.33.6")
    assert states(run, "uninstall") == ["original"] * 2
    assert environment.hashes() == KNOWN_SHA256["0.33.6"]
    assert environment.ours() == []

    # Removed by pip first.
    assert states(run, "install", "--agent-python", environment.python) == ["ours"] * 2
    removed = environment.pip("uninstall", "--yes", PACKAGE)
    assert removed.returncode == 0, removed.stderr
    assert find_agent(environment.python).version == ""
    assert run("worker", "uninstall").code == 0
    assert environment.ours() == []
    assert not (environment.site / "deadline_worker_agent").exists()
