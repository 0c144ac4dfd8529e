"""Commands as another user than the one that runs the tests: root is refused nothing.

Becoming somebody else needs root, and a Python that everybody may run; where those are not to be
had the test is skipped, with the reason.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers.hooks import Host

# The user `nobody`, on every Linux.
NOBODY = 65534


def run_as_nobody(host: Host, arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a command as a user who owns the host's home.

    The home must be where everybody may enter; pytest's own directories are closed to others.
    """
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becoming another user needs root and setpriv")
    for path in (host.home, *host.home.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    environment = host.process_environment()
    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    look = f"import agent_plugin, msgspec, os; os.stat({str(host.config)!r})"
    probe = [*argv, host.argv()[0], "-c", look]
    if subprocess.run(probe, capture_output=True, env=environment, check=False).returncode:
        pytest.skip("this Python may not be run, or the tests' directory not entered, by others")
    return subprocess.run(
        [*argv, *host.argv(*arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def being_nobody() -> Iterator[None]:
    """Make this process, all its threads, the other user; what is open stays open."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
