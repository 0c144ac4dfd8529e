"""The real OpenJD runtime (`openjd run` of `.peers/openjd`) with our environment templates."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers.deadline_peers import REPOSITORY, PeerFailedError

OPENJD = REPOSITORY / ".peers" / "openjd" / "bin" / "openjd"
TEMPLATES = REPOSITORY / "packaging" / "openjd"
WRAP = "queue-environment-wrap.yaml"
PLAIN = "queue-environment.yaml"
COMMAND = Path(sys.executable).with_name("propmaster")
# Far above anything measured, so that only a hang meets it.
RUN_SECONDS = 200.0

_TIME = re.compile(r"^[0-9:.]+\t", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class LocalSession:
    """A session that has ended.

    Attributes:
        log: Its lines, without the times before them.
        codes: The exit codes of its actions, in order.
    """

    succeeded: bool
    log: str
    codes: list[int] = field(default_factory=list)


class OpenJDRuntime:
    """Runs steps of job templates in local sessions, whose directories it removes afterwards.

    Args:
        home: Where state, cache and session directories are.
        environment: AWS variables.
    """

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None) -> None:
        if not OPENJD.exists():
            raise PeerFailedError(f"{OPENJD} is missing: `make peers` makes it")
        home.mkdir(parents=True)
        self.home = home
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TMPDIR": str(home),
            # A test may wait for a line.
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PROPMASTER_CACHE_DIR": str(home / "cache"),
            "PROPMASTER_STATE_DIR": str(home / "state"),
            **(environment or {}),
        }

    def popen(
        self,
        template: str,
        job: Mapping[str, Any],
        step: str,
        *,
        environments: Sequence[Path] = (),
        rules: Path | None = None,
        **parameters: str,
    ) -> "subprocess.Popen[str]":
        """Start `openjd run` of one step, in our environment and then in others."""
        path = self.home / "job.json"
        path.write_text(json.dumps({"specificationVersion": "jobtemplate-2023-09", **job}))
        given = {"PropmasterCommand": str(COMMAND), **parameters}
        argv = [OPENJD, "run", path, "--step", step, "--environment", TEMPLATES / template]
        for other in environments:
            argv += ["--environment", other]
        for name, value in given.items():
            argv += ["-p", f"{name}={value}"]
        if rules is not None:
            argv += ["--path-mapping-rules", f"file://{rules}"]
        return subprocess.Popen(
            list(map(str, argv)),
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self,
        template: str,
        job: Mapping[str, Any],
        step: str,
        *,
        environments: Sequence[Path] = (),
        rules: Path | None = None,
        **parameters: str,
    ) -> LocalSession:
        """Run one step to its end."""
        with self.popen(
            template, job, step, environments=environments, rules=rules, **parameters
        ) as process:
            try:
                output, _ = process.communicate(timeout=RUN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return session_of(output, process.returncode)

    def state_files(self) -> list[str]:
        """Return what sessions have left in the state directory."""
        return sorted(path.name for path in (self.home / "state" / "sessions").glob("*"))


def session_of(output: str, code: int) -> LocalSession:
    """Return what `openjd run` printed, as a session."""
    log = _TIME.sub("", output)
    codes = [int(found) for found in re.findall(r"exited with code: (-?[0-9]+)", log)]
    return LocalSession(code == 0, log, codes)


def bash_step(
    name: str, script: str, *, frames: str = "", depends_on: Sequence[str] = (), **action: Any
) -> dict[str, Any]:
    """Return a step that runs a script, once for each frame if there are frames."""
    on_run = {"command": "bash", "args": ["-euc", script], **action}
    step: dict[str, Any] = {"name": name, "script": {"actions": {"onRun": on_run}}}
    if frames:
        frame = {"name": "Frame", "type": "INT", "range": frames}
        step["parameterSpace"] = {"taskParameterDefinitions": [frame]}
    if depends_on:
        step["dependencies"] = [{"dependsOn": each} for each in depends_on]
    return step
