"""Where a render application has its own packages in PYTHONPATH, propmaster uses its own.

A queue environment, or the shell that an artist's application opens, sets it for what it starts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.hooks import CALL_SECONDS, REPOSITORY

# What each of our processes needs, and a module of Python's that is not loaded at its start.
THEIRS = ("click", "msgspec", "xxhash", "structlog", "argparse")
INSTALLED = Path(sys.executable).with_name("propmaster")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory of packages of which none is of any use to us."""
    directory = tmp_path / "of-the-application"
    for name in THEIRS:
        (directory / name).mkdir(parents=True)
        (directory / name / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    (directory / "only_theirs.py").touch()
    return directory


def run(theirs: Path, *argv: str | Path) -> "subprocess.CompletedProcess[str]":
    before = os.environ.get("PYTHONPATH")
    return subprocess.run(
        argv,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(theirs), before]))},
        cwd=REPOSITORY.parent,
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [[INSTALLED], [sys.executable, "-P", "-m", "agent_plugin"]],
    ids=["installed", "module"],
)
def test_the_command_runs_and_what_it_runs_has_the_variable(
    theirs: Path, command: list[str | Path]
) -> None:
    shell = ["sh", "-c", 'echo "$PYTHONPATH"']

    done = run(theirs, *command, "openjd", "run", "--", *shell)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(theirs))


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("vfs", "usage"),
        ("agent_plugin.workers", "attachment-download"),
        ("agent_plugin.workers.deadline.start_download", "openjd_fail: command line"),
    ],
)
def test_processes_of_ours_that_others_start_run(theirs: Path, module: str, says: str) -> None:
    done = run(theirs, sys.executable, "-P", "-m", module)

    assert says in done.stdout + done.stderr
    assert "the wrong one" not in done.stdout + done.stderr


def test_what_only_they_have_is_found_still(theirs: Path) -> None:
    """Who has put our libraries there, and nowhere else, goes on having them."""
    code = "import agent_plugin.cli, only_theirs, sys; print(sys.path[-1])"

    done = run(theirs, sys.executable, "-P", "-c", code)

    assert done.returncode == 0, done.stderr
