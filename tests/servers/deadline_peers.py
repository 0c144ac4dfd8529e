"""The real Deadline client and the real worker agent's scripts, as functions.

Each call is one process of the peer's own Python (`.peers/`, made by `make peers`) that runs a
script of `tests/servers/peers/`; JSON goes in on stdin and comes back on stdout. The peers read
their S3 endpoint and credentials from the environment given, never from this process's own.
"""

import json
import os
import subprocess
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

REPOSITORY = Path(__file__).parents[2]
CLIENT_PYTHON = REPOSITORY / ".peers" / "client" / "bin" / "python"
AGENT_PYTHON = REPOSITORY / ".peers" / "agent" / "bin" / "python"
# Only `make test-slow` makes it.
OLDEST_AGENT_PYTHON = REPOSITORY / ".peers" / "agent-oldest" / "bin" / "python"
SCRIPTS = Path(__file__).with_name("peers")

FARM_ID = "farm-" + "a" * 32
QUEUE_ID = "queue-" + "b" * 32

# The longest single call, the client's submit of 100,000 files, took two minutes here.
CALL_SECONDS = 600.0

# Nothing may reach the outside: the account id is given, so STS is not asked, and if it is asked
# after all, the discard port of the loopback interface refuses at once.
_OFFLINE = {
    "AWS_ACCOUNT_ID": "123456789012",
    "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
    "DEADLINE_CLOUD_TELEMETRY_OPT_OUT": "true",
}


class PeerFailedError(Exception):
    """A peer's process failed; the message has what it wrote on stderr."""


class Submission(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What the client would hand to CreateJob, and where it put the inputs.

    Attributes:
        job_attachment_settings: `s3BucketName` and `rootPrefix`.
        attachments: `manifests` and `fileSystem`, as the Deadline API has them.
        files: Input files; zero for an output-only root.
        files_uploaded: Those whose content the bucket lacked.
        seconds: What the library's upload took, without imports and hashing.
    """

    farm_id: str
    queue_id: str
    job_attachment_settings: dict[str, str]
    attachments: dict[str, Any]
    files: int = 0
    files_uploaded: int = 0
    seconds: float = 0.0

    @property
    def root_paths(self) -> list[str]:
        """The job's roots, in the submitter's spelling and in the job's order."""
        return [manifest["rootPath"] for manifest in self.attachments["manifests"]]

    def joined_with(self, other: Self) -> Self:
        """Return one job with the roots of both; the store and file system stay this one's."""
        manifests = [*self.attachments["manifests"], *other.attachments["manifests"]]
        attachments = {**self.attachments, "manifests": manifests}
        return msgspec.structs.replace(
            self, attachments=attachments, files=self.files + other.files
        )

    def under_prefix(self, root_prefix: str) -> Self:
        """Return the same job, as it reads when the store is below another prefix."""
        settings = {**self.job_attachment_settings, "rootPrefix": root_prefix}
        return msgspec.structs.replace(self, job_attachment_settings=settings)

    def of_job(self, job_id: str) -> dict[str, Any]:
        """Return the job document of propmaster, which is also what the peers' scripts read."""
        return {
            "farmId": self.farm_id,
            "queueId": self.queue_id,
            "jobId": job_id,
            "jobAttachmentSettings": self.job_attachment_settings,
            "attachments": self.attachments,
        }


class Download(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What the client found and downloaded.

    Attributes:
        paths: The relative paths of all outputs, sorted, by the job's root.
        session_actions: With `scan_keys`, each session action id with its `manifests`.
    """

    paths: dict[str, list[str]]
    files: int
    bytes: int
    session_actions: list[dict[str, Any]]


class TaskRun(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One task: a shell command below the session directory, and the ids of its session action.

    In the command `$ROOT_0` is the local directory of the job's first root, and so on.
    `task_id=None` makes it a chunk. `started_at` is in seconds since the epoch.
    """

    command: str
    step_id: str
    task_id: str | None
    session_action_id: str
    started_at: float
    environment: dict[str, str] = {}
    kind: Literal["task"] = "task"


class SyncJob(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The agent's sync of the job's inputs; without `download` it only writes the manifests."""

    download: bool = True
    kind: Literal["syncJob"] = "syncJob"


class SyncStep(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """The agent's sync of what the steps that this one depends on have left."""

    depends_on: list[str]
    kind: Literal["syncStep"] = "syncStep"


class ActionResult(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What a script did: its wall time as a process, its output, what the agent understood."""

    seconds: float
    output: str
    uploads: list[dict[str, str]]
    snapshots: list[dict[str, str]]
    progress: list[float]
    statuses: list[str]
    failures: list[str]


class WorkerRun(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A session of the agent: local directory by root, and the results of the actions."""

    roots: dict[str, str]
    actions: list[ActionResult]


class DeadlinePeers:
    """The real client and the real agent against one S3 server.

    Args:
        aws: `AWS_…` variables: endpoint and credentials.
        home: The peers' home directory; their configuration and caches live there.
    """

    def __init__(self, *, aws: Mapping[str, str], home: Path) -> None:
        self._home = home
        self._environment = environment_of_host(aws=aws, home=home)

    def submit(
        self,
        root: Path,
        *,
        bucket: str,
        root_prefix: str,
        output_directories: Sequence[str] = (),
        file_system: Literal["COPIED", "VIRTUAL"] = "COPIED",
    ) -> Submission:
        """Upload everything below `root` as `deadline bundle submit` does.

        Raises:
            PeerFailedError: The client failed.
        """
        cache = self._home / f"submit-cache-{root_prefix.replace('/', '-')}"
        request = {
            "root": str(root),
            "bucket": bucket,
            "rootPrefix": root_prefix,
            "farmId": FARM_ID,
            "queueId": QUEUE_ID,
            "outputDirectories": list(output_directories),
            "fileSystem": file_system,
            "cacheDirectory": str(cache),
        }
        return msgspec.convert(self._call(CLIENT_PYTHON, "submit.py", request), Submission)

    def download(
        self,
        submission: Submission,
        job_id: str,
        *,
        to: Mapping[str, Path],
        step_id: str | None = None,
        task_id: str | None = None,
        session_action_id: str | None = None,
        scan_keys: bool = False,
    ) -> Download:
        """Download outputs as `deadline job download-output` does, overwriting what is there.

        Args:
            submission: The job's attachments and store.
            job_id: The job.
            to: For every root that has outputs, the directory to download to.
            step_id: Only this step's.
            task_id: Only this task's; needs the step.
            session_action_id: Only what this action uploaded; needs step and task.
            scan_keys: Also attribute every manifest key as `deadline queue sync-output` does.

        Raises:
            PeerFailedError: The client failed, or refused a key.
        """
        request = {
            **submission.of_job(job_id),
            "stepId": step_id,
            "taskId": task_id,
            "sessionActionId": session_action_id,
            "roots": {root: str(directory) for root, directory in to.items()},
            "conflict": "OVERWRITE",
            "scanKeys": scan_keys,
        }
        return msgspec.convert(self._call(CLIENT_PYTHON, "download.py", request), Download)

    def work(
        self,
        submission: Submission,
        job_id: str,
        *,
        session_directory: Path,
        actions: Iterable[SyncJob | SyncStep | TaskRun],
        scripts: Mapping[str, Sequence[str]] | None = None,
        script_environment: Mapping[str, str] | None = None,
        path_mapping: Mapping[str, Path] | None = None,
    ) -> WorkerRun:
        """Run one session with the worker agent's own attachment scripts, or others in their place.

        Args:
            submission: The job's attachments and store.
            job_id: The job.
            session_directory: Made when missing.
            actions: What the agent is to do.
            scripts: By the name of the agent's script what is run instead, without its arguments.
            script_environment: What the scripts have besides the peers' variables.
            path_mapping: Where roots with a file system location are on the host, by root path.

        Raises:
            PeerFailedError: A script or a task's command failed.
        """
        request = {
            **submission.of_job(job_id),
            "sessionDirectory": str(session_directory),
            "actions": msgspec.to_builtins(list(actions)),
            "scripts": scripts,
            "scriptEnvironment": script_environment,
            "pathMapping": {root: str(at) for root, at in (path_mapping or {}).items()},
        }
        return msgspec.convert(self._call(AGENT_PYTHON, "worker.py", request), WorkerRun)

    def _call(self, python: Path, script: str, request: Mapping[str, object]) -> Any:
        """Run a script with a peer's Python, request on stdin; return its answer.

        Raises:
            PeerFailedError: It did not exit with 0.
        """
        if not python.exists():
            raise PeerFailedError(f"{python} is missing: `make peers` makes it")
        self._home.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [python, SCRIPTS / script],
            # JSON escapes: paths may hold lone surrogates, which have no UTF-8.
            input=json.dumps(request).encode("ascii"),
            env=self._environment,
            capture_output=True,
            timeout=CALL_SECONDS,
            check=False,
        )
        if done.returncode:
            raise PeerFailedError(f"{script}: {done.stderr.decode(errors='replace')}")
        # Not msgspec: it refuses the lone surrogates that stand for names that are not UTF-8.
        return json.loads(done.stdout)


def environment_of_host(*, aws: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return all the variables of a process on a host that can reach the S3 server only."""
    host = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}
    return {**host, **_OFFLINE, **aws}


def new_job_id() -> str:
    """Return a job id that no other test has."""
    return f"job-{uuid.uuid4().hex}"
