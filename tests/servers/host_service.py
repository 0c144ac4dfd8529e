"""propmaster on a `WorkerHost`: installed into the agent, its host service running.

Job users find its settings by PROPMASTER_CONFIG, as an administrator would set it who does not use
/etc/propmaster/config.toml; see worker_host.py for how it gets there.
"""

import json
import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Self

from tests.servers.worker_host import OFFLINE, WorkerHost

_READY_SECONDS: Final = 60.0
# What runs is told to stop and waited for; only a hang meets this.
_STOP_SECONDS: Final = 60.0


class PropmasterHost:
    """What an operator has set up on a host; entered, its service runs.

    Args:
        host: The worker.
        user: Whom the service runs as: root, or the agent's user.
        environment: Where S3 is; no credentials.
        tables: More for the settings' file.
        within: A command that runs its commands, in another namespace for instance.

    Attributes:
        config: The settings' file, which everybody may read.
        cache_dir, state_dir: The service user's.
    """

    def __init__(
        self,
        host: WorkerHost,
        *,
        user: str,
        environment: Mapping[str, str],
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        self._host = host
        self._within = within
        self.user = user
        self.root = host.directory / f"service-{len(list(host.directory.iterdir()))}"
        self.root.mkdir(mode=0o755)
        entry = pwd.getpwnam(user)
        os.chown(self.root, entry.pw_uid, entry.pw_gid)
        self.config = self.root / "config.toml"
        self.cache_dir, self.state_dir = self.root / "cache", self.root / "state"
        self.socket = self.root / "worker.socket"
        self._python = host.own_python()
        self._environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(host.home(user) if user != "root" else self.root),
            "LANG": "C.UTF-8",
            **OFFLINE,
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._tables: Mapping[str, Mapping[str, Any]] = {
            "paths": {"cache_dir": str(self.cache_dir), "state_dir": str(self.state_dir)},
            "cache": {"max_bytes": "4 GiB", "min_free": 0},
            "worker": {
                "socket": str(self.socket),
                "agent_user": host.agent,
                # The directories of agents are made later, below this one.
                "session_roots": [str(host.directory)],
            },
            **(tables or {}),
        }
        self._write_settings()

    @property
    def job_environment(self) -> dict[str, str]:
        """What the job users' environment needs."""
        return {"PROPMASTER_CONFIG": str(self.config)}

    @property
    def log(self) -> str:
        """What the service has written so far."""
        return (self.root / "service.log").read_text(errors="replace")

    def run(self, *words: str | Path) -> str:
        """Run a propmaster command as the service's user; return what it printed.

        Raises:
            AssertionError: It failed.
        """
        done = subprocess.run(
            self._argv(*words),
            env=self._environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=_READY_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def install_into(self, agent_python: Path) -> None:
        """Have an agent call propmaster; root does that, whoever runs the service."""
        done = subprocess.run(
            [
                *(self._python, "-m", "agent_plugin", "worker", "install"),
                *("--agent-python", agent_python, "--config", self._root_config()),
            ],
            env=self._environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=_READY_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    def forget(self) -> None:
        """Empty the cache, as on a host that has never run; only while it is not entered.

        The files stay on the disk until the host goes: freed inodes would slow down whoever makes
        files next.
        """
        if self.cache_dir.exists():
            aside = self.root / f"cache-{len(list(self.root.iterdir()))}"
            self.cache_dir.rename(aside)

    def __enter__(self) -> Self:
        self._log = (self.root / "service.log").open("ab")
        self._process = subprocess.Popen(
            self._argv("worker", "serve"),
            env=self._environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert ready.startswith(b"ready"), f"{ready!r} {self.log}"
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self._process is not None
        assert self._log is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._log.close()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def _argv(self, *words: str | Path) -> list[str]:
        argv: Sequence[str | Path] = [self._python, "-m", "agent_plugin", *words]
        return [*self._within, *self._host.argv_as(self.user, [*argv, "--config", self.config])]

    def _root_config(self) -> Path:
        """Return settings for commands of root, with a state directory of its own."""
        path = self.root / "root.toml"
        paths = {"cache_dir": str(self.root / "root-cache"), "state_dir": str(self.root / "root")}
        _write_toml(path, {"paths": paths})
        return path

    def _write_settings(self) -> None:
        _write_toml(self.config, self._tables)


def _write_toml(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    path.write_text(
        "".join(
            f"[{table}]\n"
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rows.items())
            for table, rows in tables.items()
        )
    )
