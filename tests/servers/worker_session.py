"""A worker's session as `propmaster` commands: what an agent, or an OpenJD hook, would run.

Every call is one process of the installed command, in an environment of its own, so a test sees
what a farm sees: exit codes, stdout, and nothing carried over in memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.servers.deadline_peers import REPOSITORY, Submission, TaskRun, environment_of_host

COMMAND = Path(sys.executable).with_name("propmaster")

# As for the peers: far above anything measured, so that only a hang meets it.
CALL_SECONDS = 600.0


class PropmasterFailedError(Exception):
    """The command did not exit with 0; the message has its arguments, code and stderr."""

    def __init__(self, arguments: Sequence[str], exit_code: int, stderr: str) -> None:
        super().__init__(f"propmaster {' '.join(arguments)} exited with {exit_code}:\n{stderr}")
        self.exit_code = exit_code
        self.stderr = stderr


class StartedRoot(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A root as `session start` reports it; sizes in bytes."""

    root_path: str
    local_root: str
    file_system: str
    files: int
    bytes: int
    bytes_fetched: int
    bytes_reused: int


class Started(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What `session start --json` prints."""

    roots: list[StartedRoot]
    path_mapping_rules: list[dict[str, str]]
    seconds: float


class Finished(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What `session finish-task --json` prints; `manifests` is parallel to the job's list."""

    manifests: list[dict[str, str]]
    files: int
    bytes_uploaded: int
    bytes_reused: int
    deleted: list[Any]
    seconds: float


class Propmaster:
    """The command with one host's home directory: its caches, state and settings.

    Args:
        aws: `AWS_…` variables: endpoint and credentials.
        home: The home directory of the host; made when missing.
    """

    def __init__(self, *, aws: Mapping[str, str], home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._environment = environment_of_host(aws=aws, home=home)
        # Root's directories are the host's own, whatever HOME says.
        self._environment["PROPMASTER_CACHE_DIR"] = str(home / "cache")
        self._environment["PROPMASTER_STATE_DIR"] = str(home / "state")
        # So that coverage sees what these processes run (pyproject.toml, patch = ["subprocess"]).
        if started := os.environ.get("COVERAGE_PROCESS_CONFIG"):
            self._environment["COVERAGE_PROCESS_CONFIG"] = started

    @property
    def drop_ins(self) -> dict[str, list[str]]:
        """What an agent runs instead of each of its scripts, in `drop_in_environment`."""
        workers = [sys.executable, "-P", "-m", "agent_plugin.workers"]
        return {
            "attachment_download.py": [*workers, "attachment-download"],
            "attachment_upload.py": [*workers, "attachment-upload"],
        }

    @property
    def drop_in_environment(self) -> dict[str, str]:
        """The variables of this host for a process that an agent starts."""
        return {**self._environment, "PYTHONPATH": str(REPOSITORY)}

    def run(self, *arguments: str | Path) -> bytes:
        """Run `propmaster <arguments> --json` and return its stdout.

        Raises:
            PropmasterFailedError: It did not exit with 0.
        """
        argv = [*map(str, arguments), "--json"]
        done = subprocess.run(
            [COMMAND, *argv],
            env=self._environment,
            capture_output=True,
            timeout=CALL_SECONDS,
            check=False,
        )
        if done.returncode:
            raise PropmasterFailedError(argv, done.returncode, done.stderr.decode(errors="replace"))
        return done.stdout

    def submit(
        self,
        root: Path,
        *,
        store: str,
        farm_id: str,
        queue_id: str,
        output_directories: Sequence[str],
    ) -> Submission:
        """Upload everything below `root` as job inputs.

        Raises:
            PropmasterFailedError: The command failed.
        """
        outputs = [word for output in output_directories for word in ("--output-dir", output)]
        ids = ["--farm-id", farm_id, "--queue-id", queue_id]
        printed = json.loads(self.run("submit", root, "--store", store, *ids, *outputs))
        return Submission(
            farm_id=farm_id,
            queue_id=queue_id,
            job_attachment_settings=printed["jobAttachmentSettings"],
            attachments=printed["attachments"],
        )


class WorkerSession:
    """One session of one job.

    Args:
        propmaster: The command of the host the session is on.
        directory: The session directory; made here, as the agent makes it, with mode 0700.
        submission: The job's attachments and store.
        job_id: The job.
        publishers: The job document's.
    """

    def __init__(
        self,
        propmaster: Propmaster,
        *,
        directory: Path,
        submission: Submission,
        job_id: str,
        publishers: Sequence[Mapping[str, object]] = (),
    ) -> None:
        directory.mkdir(mode=0o700, parents=True)
        self._propmaster = propmaster
        self.directory = directory
        self._job = directory.with_name(f"{directory.name}-job.json")
        document = {**submission.of_job(job_id), "publishers": list(publishers)}
        self._job.write_text(json.dumps(document))
        self._roots: dict[str, str] = {}

    def start(self, *, file_system: str | None = None) -> Started:
        """Bring the job's inputs into the session directory."""
        wanted = ["--file-system", file_system] if file_system else []
        printed = self._session("start", "--job", self._job, *wanted)
        started = msgspec.json.decode(printed, type=Started)
        self._roots = {f"ROOT_{at}": root.local_root for at, root in enumerate(started.roots)}
        return started

    def sync_step(self, step_id: str, *, depends_on: Sequence[str]) -> None:
        """Bring what the steps `depends_on` have left into the session directory."""
        steps = [word for step in depends_on for word in ("--depends-on", step)]
        self._session("sync-step", "--step-id", step_id, *steps)

    def run_command(self, task: TaskRun) -> None:
        """Run the task's command as the agent would; `$ROOT_0` is the first root's directory.

        Raises:
            subprocess.CalledProcessError: The command failed.
        """
        subprocess.run(
            ["/bin/bash", "-euc", task.command],
            cwd=self.directory,
            env={**os.environ, **self._roots, **task.environment},
            check=True,
        )

    def finish_task(self, task: TaskRun, *, failed: bool = False) -> Finished:
        """Upload what the task left behind."""
        ids = ["--step-id", task.step_id, "--session-action-id", task.session_action_id]
        if task.task_id:
            ids += ["--task-id", task.task_id]
        flags = ["--failed"] if failed else []
        started_at = ["--started-at", repr(task.started_at)]
        printed = self._session("finish-task", *ids, *started_at, *flags)
        return msgspec.json.decode(printed, type=Finished)

    def run_task(self, task: TaskRun) -> Finished:
        """Run the task's command, then upload what it left behind."""
        self.run_command(task)
        return self.finish_task(task)

    def end(self, *, keep_files: bool = False) -> None:
        """End the session."""
        self._session("end", *(["--keep-files"] if keep_files else []))

    def _session(self, verb: str, *arguments: str | Path) -> bytes:
        return self._propmaster.run("session", verb, "--session-dir", self.directory, *arguments)
