"""`propmaster` as a process, on a host of its own: what it prints, and the code it exits with."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Far above anything measured, so that only a hang meets it.
CALL_SECONDS = 100.0


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.stdout)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was logged."""
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]


class Command:
    """The command with caches and state below `home`, whoever runs the tests.

    Attributes:
        cache_dir, state_dir: Of the host; made by the command when it needs them. Without
            `caches_by_environment` it is for a settings file to say where caches are.
    """

    def __init__(
        self,
        home: Path,
        environment: Mapping[str, str] | None = None,
        *,
        caches_by_environment: bool = True,
    ) -> None:
        self.cache_dir = home / "cache"
        self.state_dir = home / "state"
        self._environment = {
            **os.environ,
            **(environment or {}),
            "PROPMASTER_CACHE_DIR": str(self.cache_dir) if caches_by_environment else "",
            "PROPMASTER_STATE_DIR": str(self.state_dir),
        }

    def popen(
        self, *arguments: str | Path, stdout: int = subprocess.PIPE
    ) -> "subprocess.Popen[bytes]":
        """Start a command whose streams are pipes; stdout may be one that was made before."""
        return subprocess.Popen(
            [sys.executable, "-m", "agent_plugin", *map(str, arguments)],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )

    def __call__(self, *arguments: str | Path, stdin: bytes = b"") -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "agent_plugin", *map(str, arguments)],
            env=self._environment,
            input=stdin,
            capture_output=True,
            timeout=CALL_SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr.decode())
