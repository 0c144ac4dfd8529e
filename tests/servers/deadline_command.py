"""The real `deadline` command: bundles go in, outputs come out."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.servers.deadline_jobs import JSON
from tests.servers.deadline_peers import CLIENT_PYTHON, PeerFailedError
from tests.servers.deadline_service import FARM_ID
from tests.servers.worker_host import OFFLINE

_COMMAND: Final = CLIENT_PYTHON.with_name("deadline")
# Far above anything measured: the client hashes, asks and uploads file by file.
_SECONDS: Final = 900.0


class DeadlineCommand:
    """The command of one user.

    Args:
        home: Its configuration and caches live there.
        environment: Where the services are, and the user's credentials.
    """

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._home = home
        self._environment = {
            "PATH": os.defpath,
            "HOME": str(home),
            "LANG": "C.UTF-8",
            **OFFLINE,
            **environment,
        }

    def submit(self, bundle: Path, queue_id: str, *, file_system: str = "COPIED") -> str:
        """Submit a bundle; return the job's id."""
        how = ("--yes", "--job-attachments-file-system", file_system)
        printed = self._run("bundle", "submit", *_of(queue_id), *how, bundle)
        if (found := re.search(r"\bjob-[0-9a-f]{32}\b", printed)) is None:
            raise PeerFailedError(f"bundle submit names no job: {printed}")
        return found[0]

    def download_output(self, job_id: str, queue_id: str) -> str:
        """Download a job's outputs to where it was submitted from, over what is there."""
        return self._run(
            *("job", "download-output", *_of(queue_id), "--job-id", job_id, "--yes"),
            *("--conflict-resolution", "overwrite"),
        )

    def sync_output(self, queue_id: str, *, storage_profile_id: str | None = None) -> str:
        """Download what is new of all jobs of a queue.

        To where they were submitted from, or to where the storage profile of this host says.
        """
        profile: tuple[str, ...] = ("--ignore-storage-profiles",)
        if storage_profile_id is not None:
            profile = ("--storage-profile-id", storage_profile_id)
        return self._run(
            *("queue", "sync-output", *_of(queue_id), *profile),
            *("--bootstrap-lookback-minutes", "600"),
            *("--checkpoint-dir", self._home / "checkpoints"),
        )

    def _run(self, *words: str | Path) -> str:
        done = subprocess.run(
            [_COMMAND, *words],
            env=self._environment,
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode:
            raise PeerFailedError(f"deadline {words}: {done.stdout}{done.stderr}")
        return done.stdout


def write_bundle(directory: Path, template: JSON) -> Path:
    """Write a job bundle; its inputs are already in its directory."""
    (directory / "template.json").write_text(json.dumps(template, indent=1))
    return directory


def step(
    name: str, script: str, *, frames: str | None = None, depends_on: str | None = None
) -> dict[str, Any]:
    """Return a step whose tasks run a bash script in the directory of the parameter `DataDir`.

    Args:
        name: Of the step.
        script: What a task does; `$FRAME` is its frame.
        frames: A range such as `1-3`, one task for each.
        depends_on: The name of a step before it.
    """
    frame = "{{Task.Param.Frame}}" if frames else ""
    text = f"set -euo pipefail\nFRAME={frame}\ncd '{{{{Param.DataDir}}}}'\n{script}\n"
    found: dict[str, Any] = {
        "name": name,
        "script": {
            "actions": {"onRun": {"command": "bash", "args": ["{{Task.File.Run}}"]}},
            "embeddedFiles": [{"name": "Run", "type": "TEXT", "data": text}],
        },
    }
    if frames:
        definition = {"name": "Frame", "type": "INT", "range": frames}
        found["parameterSpace"] = {"taskParameterDefinitions": [definition]}
    if depends_on:
        found["dependencies"] = [{"dependsOn": depends_on}]
    return found


def job_template(*steps: JSON) -> JSON:
    """Return the template of a job whose inputs and outputs are the bundle's directory `data`."""
    return {
        "specificationVersion": "jobtemplate-2023-09",
        "name": "tests",
        "parameterDefinitions": [
            {
                "name": "DataDir",
                "type": "PATH",
                "objectType": "DIRECTORY",
                "dataFlow": "INOUT",
                "default": "data",
            }
        ],
        "steps": list(steps),
    }


def _of(queue_id: str) -> tuple[str, ...]:
    return ("--farm-id", FARM_ID, "--queue-id", queue_id)
