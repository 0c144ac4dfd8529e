"""A worker host with the host service, and job users that ask it.

The service runs as root, or as a user without rights; the agent is played by the tests, which make
session directories as it does; job users are ids that no account has.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers.hooks import CALL_SECONDS, REPOSITORY

# Nobody has these.
SERVICE_USER = 61001
JOB_USER = 61002
OTHER_JOB_USER = 61003
JOB_GROUP = 61012
OTHER_JOB_GROUP = 61013

_PYTHONPATH = f"{REPOSITORY}:{sysconfig.get_paths()['purelib']}"
_ASK = """
import sys
from agent_plugin.workers.front import main
sys.exit(main(sys.argv[1], sys.argv[2:]))
"""
# The fallback starts a Python from a Python.
_LOOK = """
import msgspec, os, sys
pid = os.posix_spawn(sys.argv[1], [sys.argv[1], "-c", ""], os.environ)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


class ServiceHost:
    """One host; made by `service_host`.

    Attributes:
        home: Everybody may enter it.
        user: Whom the service runs as.
        log: What the service has written.
    """

    def __init__(self, home: Path, user: int, python: str) -> None:
        self.home = home
        self.user = user
        self.python = python
        self.config = home / "config.toml"
        self.state_dir = home / "state"
        self.socket = home / "run/worker.socket"
        self.log = home / "service.log"
        self.sessions = home / "sessions"
        self.settings: dict[str, Mapping[str, object]] = {}
        self._service: subprocess.Popen[bytes] | None = None
        for directory in ("run", "sessions", "private"):
            (home / directory).mkdir()
            os.chown(home / directory, user, user)
        (home / "private").chmod(0o700)

    def start(self, environment: Mapping[str, str] | None = None, *argv: str) -> None:
        """Start the service, and wait until it can be asked."""
        self.write_config()
        words = argv or ("-m", "tests.servers.worker_calls", self.socket, self.config)
        # The agent's user is in the groups of job users; root's own groups are no job's.
        groups = [JOB_GROUP] if self.user else [SERVICE_USER]
        with self.log.open("ab") as log:
            self._service = subprocess.Popen(
                [*_become(self.user, self.user, groups), self.python, "-P", *words],
                env={**_environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._service.stdout is not None
        assert self._service.stdout.readline().startswith(b"ready"), self.log.read_text()

    def write_config(self) -> None:
        """Write the settings that the service and job users read."""
        tables: dict[str, Mapping[str, object]] = {
            "paths": {
                "cache_dir": str(self.home / "private/cache"),
                "state_dir": str(self.home / "private/state"),
            },
            "worker": {"socket": str(self.socket)},
            **self.settings,
        }
        self.config.write_text(
            "".join(
                f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items())
                for name, table in tables.items()
            )
        )

    @property
    def pid(self) -> int:
        """The service's process."""
        assert self._service is not None
        return self._service.pid

    def end(self, number: int = signal.SIGTERM) -> int:
        """End the service by a signal; return its exit code."""
        assert self._service is not None
        self._service.send_signal(number)
        with self._service:
            return self._service.wait(CALL_SECONDS)

    def session(
        self, name: str, *, group: int = JOB_GROUP, owner: int | None = None, mode: int = 0o2770
    ) -> Path:
        """Make a session directory as the agent does."""
        directory = self.sessions / name
        directory.mkdir()
        os.chown(directory, self.user if owner is None else owner, group)
        directory.chmod(mode)
        return directory

    def begin(
        self,
        session_dir: Path,
        *words: str,
        user: int = JOB_USER,
        group: int = JOB_GROUP,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> "subprocess.Popen[str]":
        """Start a drop-in as a job's user in a session directory."""
        return subprocess.Popen(
            [*_become(user, group, []), self.python, "-P", "-c", _ASK, *words],
            cwd=cwd or session_dir,
            env={
                **_environment(),
                "PROPMASTER_CONFIG": str(self.config),
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(
        self,
        session_dir: Path,
        *words: str,
        user: int = JOB_USER,
        group: int = JOB_GROUP,
        environment: Mapping[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a drop-in to its end."""
        process = self.begin(session_dir, *words, user=user, group=group, environment=environment)
        stdout, stderr = process.communicate(timeout=CALL_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def send(self, data: bytes, *, user: int = JOB_USER, group: int = JOB_GROUP) -> bytes:
        """Send bytes to the service as a user; return all that it answers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(CALL_SECONDS)
            with _being(user, group):
                # Who asks is who connects.
                connection.connect(os.fspath(self.socket))
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def environment(self) -> dict[str, str]:
        """Return what a process of a job's user has in its environment by itself."""
        return _environment()

    def calls(self) -> list[int]:
        """Return the processes of the calls that are under way."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


@contextmanager
def service_host(*, user: int = 0) -> Iterator[ServiceHost]:
    """Make such a host; end its service and remove it."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to be several users")
    home = Path(tempfile.mkdtemp(prefix="propmaster-worker-"))
    # pytest's own directories are closed to others.
    home.chmod(0o755)
    host = ServiceHost(home, user, _python_for_others())
    try:
        yield host
    finally:
        if host._service is not None and host._service.poll() is None:
            host.end()
        shutil.rmtree(home)


@contextmanager
def _being(user: int, group: int) -> Iterator[None]:
    """Make this process, all its threads, another user for a moment."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def _become(user: int, group: int, groups: Sequence[int]) -> list[str]:
    given = [f"--groups={','.join(map(str, groups))}"] if groups else ["--clear-groups"]
    return ["setpriv", f"--reuid={user}", f"--regid={group}", *given, "--"]


def _environment() -> dict[str, str]:
    return {"PATH": os.defpath, "HOME": "/", "LANG": "C.UTF-8", "PYTHONPATH": _PYTHONPATH}


def _python_for_others() -> str:
    """Return a Python that everybody may run; that of the tests may be below a closed home."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, shutil.which(version, path=os.defpath)):
        argv = [*_become(JOB_USER, JOB_GROUP, []), str(python), "-P", "-c", _LOOK, str(python)]
        if (
            python
            and not subprocess.run(
                argv, env=_environment(), capture_output=True, check=False
            ).returncode
        ):
            return python
    pytest.skip("there is no Python of this version that others may run")
