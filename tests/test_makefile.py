"""The set-up that `make demo` and `make test` do, on machines that lack something."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
NOBODY = 65534
# Making an environment takes 5 s; only a hang meets this.
MAKE_SECONDS = 300.0
# What pip is asked for instead of an installation, which would need the network.
OFFLINE = "PIP_FLAGS=--help"


@pytest.fixture
def project() -> Iterator[Path]:
    """A directory with the Makefile and what it depends on, that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        shutil.copy(MAKEFILE, directory)
        (directory / "pyproject.toml").touch()
        (directory / "packaging").mkdir()
        (directory / "packaging/constraints.txt").touch()
        yield directory


def make(project: Path, *words: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words],
        cwd=project,
        env={"PATH": os.environ["PATH"], "HOME": str(project)},
        user=user,
        capture_output=True,
        text=True,
        timeout=MAKE_SECONDS,
        check=False,
    )


def as_nobody() -> int | None:
    return NOBODY if os.geteuid() == 0 else None


def test_missing_packages_are_named_on_one_line_that_can_be_pasted(project: Path) -> None:
    done = make(project, "system", "TEST_PACKAGES=no-such-a bash no-such-b", user=as_nobody())

    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if "apt-get" in line]
    assert len(told) == 1
    command = told[0].partition("Run:  ")[2].split()
    assert command[:3] == ["sudo", "apt-get", "install"]
    assert set(command[3:]) - {"python3-venv"} == {"no-such-a", "no-such-b"}


def test_the_demonstration_needs_no_package_of_the_tests(project: Path) -> None:
    python = project / "a python"
    # New enough, and without what makes environments.
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    python.chmod(0o755)
    packages = ("VENV_PACKAGES=no-such-venv", "TEST_PACKAGES=no-such-povray")
    done = make(project, "install", f"PYTHON={python}", *packages, user=as_nobody())

    assert done.returncode == 2
    assert "Run:  sudo apt-get install no-such-venv\n" in done.stderr
    assert "no-such-povray" not in done.stdout + done.stderr


@pytest.mark.timeout(MAKE_SECONDS)
def test_an_environment_that_was_interrupted_is_made_again(project: Path) -> None:
    python = project / "a python"
    python.symlink_to(sys.executable)
    interrupted = [sys.executable, "-m", "venv", "--without-pip", str(project / ".venv")]
    subprocess.run(interrupted, check=True)
    done = make(project, "install", f"PYTHON={python}", OFFLINE)

    assert done.returncode == 0, done.stderr
    made = (project / ".venv/bin/python").lstat()
    assert subprocess.run(
        [project / ".venv/bin/python", "-m", "pip", "--version"], capture_output=True, check=True
    ).stdout
    (project / "pyproject.toml").touch()
    assert make(project, "install", f"PYTHON={python}", OFFLINE).returncode == 0
    assert (project / ".venv/bin/python").lstat().st_ino == made.st_ino, "a whole one is kept"


def test_a_machine_without_python_is_told_so(project: Path) -> None:
    done = make(project, "install", "PYTHON=", OFFLINE)

    assert done.returncode == 2
    assert "there is no python3 in PATH. Try: make PYTHON=/path/to/python3.11" in done.stderr
