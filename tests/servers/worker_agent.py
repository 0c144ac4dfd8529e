"""The real worker agent as a process, on a `WorkerHost`, against a `DeadlineService`.

It has its own directories for logs, state and sessions, which are kept until the host is gone.
"""

import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Self

from tests.servers.deadline_service import FARM_ID, FLEET_ID
from tests.servers.worker_host import OFFLINE, WorkerHost

# The agent gives what runs four seconds, and tells the service.
STOP_SECONDS: Final = 60.0


class WorkerAgent:
    """The agent; entered it runs, left it has ended.

    Args:
        host: Where it runs.
        python: The agent's; see `WorkerHost.agent_python`.
        environment: Where the services are, and the credentials to register with.
        user: Whom it runs as: the host's agent user, or root.
        arguments: More for its command line, `--run-jobs-as-agent-user` for instance.
        more: Variables that only the agent's process has.
        within: A command that runs it, in another namespace for instance.

    Attributes:
        logs: The directory of its logs; those of sessions in one directory for each queue.
        sessions: The directory of session directories.
        persistence: The directory of its state, with the queues' credentials.
    """

    def __init__(
        self,
        host: WorkerHost,
        python: Path,
        environment: Mapping[str, str],
        *,
        user: str | None = None,
        arguments: Sequence[str] = (),
        more: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        self.user = user or host.agent
        root = host.directory / f"worker-{len(list(host.directory.iterdir()))}"
        self.logs, self.sessions = root / "logs", root / "sessions"
        self.persistence = root / "persistence"
        for directory in (root, self.logs, self.sessions, self.persistence):
            directory.mkdir(mode=0o755)
            os.chown(directory, *_ids(self.user))
        self._output_path = root / "agent.out"
        self._environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(host.home(host.agent)),
            "USER": self.user,
            "LANG": "C.UTF-8",
            **OFFLINE,
            **environment,
            **(more or {}),
        }
        words: list[str | Path] = [python, "-m", "deadline_worker_agent"]
        words += ["--farm-id", FARM_ID, "--fleet-id", FLEET_ID, "--no-shutdown"]
        words += ["--logs-dir", self.logs, "--persistence-dir", self.persistence]
        words += ["--session-root-dir", self.sessions, "--no-host-metrics-logging", *arguments]
        self._argv = [*within, *host.argv_as(self.user, words)]
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id, while entered."""
        assert self._process is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output_path.read_text(errors="replace")

    def session_log(self, queue_id: str, session_id: str) -> str:
        """Return the log of one session so far."""
        return (self.logs / queue_id / f"{session_id}.log").read_text(errors="replace")

    def __enter__(self) -> Self:
        self._output = self._output_path.open("wb")
        self._process = subprocess.Popen(
            self._argv,
            env=self._environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self._process is not None
        assert self._output is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._output.close()


def _ids(user: str) -> tuple[int, int]:
    entry = pwd.getpwnam(user)
    return entry.pw_uid, entry.pw_gid
