"""One host, whose hooks are called as functions in this process, or as the command.

As functions they take a tenth of the time, and a test can look at what is shared. What they share
is what a host shares: the state directory and the blob cache. Each call opens and closes its own.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent_plugin.cli.main import propmaster
from agent_plugin.content.errors import PropmasterError
from agent_plugin.content.store import Cancellation
from agent_plugin.mounting import open_mounts
from agent_plugin.services import open_records, open_services, state_directory
from agent_plugin.session.begin_task import BeginResult, begin_task
from agent_plugin.session.end import EndResult, end
from agent_plugin.session.finish_task import TaskAction, finish_task
from agent_plugin.session.job import JobDocument
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.outputs import OutputsResult, get_outputs, list_outputs
from agent_plugin.session.start import start
from agent_plugin.session.start_result import StartResult
from agent_plugin.session.state import FinishResult, SessionState, StateFile, locked_state
from agent_plugin.session.submit import SubmitResult, SubmitSummary, submit
from agent_plugin.session.sync_step import sync_step
from agent_plugin.settings import Settings, load
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.ledger import Ledger, TransferRow

REPOSITORY = Path(__file__).resolve().parents[2]
FARM = "farm-" + "f" * 32
QUEUE = "queue-" + "9" * 32
JOB = "job-" + "7" * 32
# Far above anything measured, so that only a hang meets it.
CALL_SECONDS = 60.0


def step(number: int) -> str:
    """Return the id of a step."""
    return f"step-{number:032x}"


def task(number: int, *, of_step: int = 1) -> str:
    """Return the id of a task of a step."""
    return f"task-{of_step:032x}-{number}"


def action(
    step_number: int = 1,
    task_number: int | None = 0,
    *,
    started_at: float | None = None,
    number: int = 0,
) -> TaskAction:
    """Return the session action of a task, or of a chunk when there is no task number."""
    return TaskAction(
        step_id=step(step_number),
        task_id=None if task_number is None else task(task_number, of_step=step_number),
        session_action_id=f"sessionaction-{uuid.uuid4().hex}-{number}",
        started_at=time.time() if started_at is None else started_at,
    )


def job_of(*submitted: SubmitResult, **changes: Any) -> JobDocument:
    """Return the job of one or more submissions; `changes` are further keys of the document."""
    document = json.loads(msgspec.json.encode(submitted[0]))
    for other in submitted[1:]:
        document["attachments"]["manifests"] += json.loads(msgspec.json.encode(other))[
            "attachments"
        ]["manifests"]
    document |= {"farmId": FARM, "queueId": QUEUE, "jobId": JOB, **changes}
    return JobDocument.decode(json.dumps(document).encode(), "the test's job")


def job_with_outputs(store_url: str, root_path: str, *directories: str) -> JobDocument:
    """Return a job with one root that has no inputs."""
    document = {
        "farmId": FARM,
        "queueId": QUEUE,
        "jobId": JOB,
        "store": store_url,
        "attachments": {
            "manifests": [
                {
                    "rootPath": root_path,
                    "rootPathFormat": "posix",
                    "outputRelativeDirectories": list(directories or ("renders",)),
                }
            ]
        },
    }
    return JobDocument.decode(json.dumps(document).encode(), "the test's job")


class Host:
    """A worker host, or a submitter's.

    Args:
        home: Where state, cache and settings are; made when missing.
        store_url: Of the store that all its jobs use.
        environment: AWS variables.
        store: The settings of the table [store], such as `attempts`.
        settings: Further tables, by name.
    """

    def __init__(
        self,
        home: Path,
        store_url: str,
        *,
        environment: Mapping[str, str] | None = None,
        store: Mapping[str, float | str] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.store_url = store_url
        self.environment = dict(environment or {})
        self.cache_dir = home / "cache"
        self.state_dir = home / "state"
        self.config = home / "config.toml"
        tables: dict[str, Mapping[str, Any]] = {
            "paths": {"cache_dir": str(self.cache_dir), "state_dir": str(self.state_dir)},
            "cache": {"max_bytes": "1 GiB", "min_free": 0},
            "store": dict(store or {}),
            **(settings or {}),
        }
        self.config.write_text(
            "".join(
                f"[{table}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
                for table, values in tables.items()
            )
        )

    @property
    def settings(self) -> Settings:
        return load(self.config, environment={})

    @property
    def mounts(self) -> Mounts:
        return open_mounts(self.settings, queue_id=QUEUE)

    @contextmanager
    def services(
        self,
        *,
        cancellation: Cancellation | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[TransferContext]:
        """Open what a command opens, for this process."""
        with open_services(
            self.settings,
            self.store_url,
            cancellation=cancellation or Cancellation(),
            queue_id=QUEUE,
            # Known to be unknown, so that nobody asks STS.
            account_id="",
            quiet=True,
            environment=self.environment if environment is None else environment,
        ) as context:
            yield context

    @contextmanager
    def state(self, session_dir: Path) -> Iterator[StateFile]:
        with locked_state(state_directory(self.settings), session_dir) as state_file:
            yield state_file

    def read_state(self, session_dir: Path) -> SessionState | None:
        with self.state(session_dir) as state_file:
            return state_file.read()

    def submit(
        self, root: Path, *, output_directories: Sequence[str] = ()
    ) -> tuple[SubmitResult, SubmitSummary]:
        with self.services() as context:
            return submit(
                root,
                context,
                farm_id=FARM,
                queue_id=QUEUE,
                output_directories=output_directories,
            )

    def start(
        self,
        job: JobDocument,
        session_dir: Path,
        *,
        cancellation: Cancellation | None = None,
        file_system: str | None = None,
    ) -> StartResult:
        with (
            self.state(session_dir) as state_file,
            self.services(cancellation=cancellation) as all_,
        ):
            return start(
                job,
                session_dir,
                all_,
                state_file,
                mounts=self.mounts,
                file_system=file_system,
                environment={**os.environ, **self.environment},
            )

    def sync_step(
        self, session_dir: Path, step_id: str, depends_on: Sequence[str] | None = None
    ) -> StartResult:
        with self.state(session_dir) as state_file, self.services() as context:
            return sync_step(step_id, depends_on, context, state_file, mounts=self.mounts)

    def begin_task(self, session_dir: Path, **parameters: str) -> BeginResult:
        with self.state(session_dir) as state_file, self.services() as all_:
            return begin_task(
                parameters,
                all_,
                state_file,
                mounts=self.mounts,
                environment={**os.environ, **self.environment},
            )

    def finish_task(
        self,
        session_dir: Path,
        run: TaskAction,
        *,
        failed: bool = False,
        upload_failed: bool = False,
        cancellation: Cancellation | None = None,
    ) -> FinishResult:
        with (
            self.state(session_dir) as state_file,
            self.services(cancellation=cancellation) as all_,
        ):
            return finish_task(
                run,
                all_,
                state_file,
                mounts=self.mounts,
                publishers=self.settings.for_queue(QUEUE).outputs.publishers,
                leaves=True,
                failed=failed,
                upload_failed=upload_failed,
            )

    def end(self, session_dir: Path, *, keep_files: bool = False) -> EndResult:
        with self.state(session_dir) as state_file:
            records = open_records(self.settings, queue_id=QUEUE)
            return end(session_dir, records, state_file, mounts=self.mounts, keep_files=keep_files)

    def outputs(self, **only: str) -> OutputsResult:
        with self.services() as context:
            return list_outputs(context, (FARM, QUEUE, JOB), **only)

    def get_outputs(
        self,
        to: Path | None,
        *,
        by_root: bool = False,
        step_id: str | None = None,
        task_id: str | None = None,
    ) -> OutputsResult:
        with self.services() as context:
            return get_outputs(
                context,
                (FARM, QUEUE, JOB),
                to,
                by_root=by_root,
                step_id=step_id,
                task_id=task_id,
            )

    def transfers(self) -> list[TransferRow]:
        with Ledger.open(self.state_dir / "ledger.db") as ledger:
            return ledger.transfers()

    # ------------------------------------------------------------------- the same as a command

    def argv(self, *arguments: str | Path) -> list[str]:
        """Return the command line of `propmaster <arguments>` with this host's settings."""
        words = [str(argument) for argument in arguments]
        return [sys.executable, "-m", "agent_plugin", *words, "--config", str(self.config)]

    def process_environment(self, **more: str) -> dict[str, str]:
        """Return what the command gets: nothing of whoever runs the tests but the path."""
        return {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.home),
            "AWS_EC2_METADATA_DISABLED": "true",
            # What hangs and is ended by SIGABRT tells where it was.
            "PYTHONFAULTHANDLER": "1",
            # Known, so that nobody asks STS.
            "AWS_ACCOUNT_ID": "000000000000",
            "PYTHONPATH": str(REPOSITORY),
            **self.environment,
            **more,
        }

    def run(self, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever its exit code."""
        return subprocess.run(
            self.argv(*arguments),
            env=self.process_environment(**more),
            capture_output=True,
            text=True,
            timeout=CALL_SECONDS,
            check=False,
        )

    def call(self, *arguments: str | Path, code: int = 0) -> Any:
        """Run a command with --json in this process; return its result, or what is said of failure.

        A process of its own takes a second of a core to load what the Deadline API and S3 need.
        """
        here = {"PATH", "PYTHONPATH", "PYTHONFAULTHANDLER"}
        printed = io.BytesIO()
        stdout = io.TextIOWrapper(printed, encoding="utf-8", write_through=True)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout):
            for name in ("PROPMASTER_CACHE_DIR", "PROPMASTER_STATE_DIR"):
                patch.delenv(name, raising=False)
            for name, value in self.process_environment().items():
                if name not in here:
                    patch.setenv(name, value)
            failure: PropmasterError | None = None
            try:
                words = [*map(str, arguments), "--json", "--config", str(self.config)]
                propmaster.main(words, standalone_mode=False)
            except PropmasterError as error:
                failure = error
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        assert (failure.exit_code if failure else 0) == code, failure
        told = printed.getvalue()
        return msgspec.json.decode(told) if told or failure is None else failure.message

    def popen(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            self.argv(*arguments),
            env=self.process_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def job_file(self, job: JobDocument) -> Path:
        """Return a file with the job document."""
        path = self.home / f"job-{uuid.uuid4().hex}.json"
        path.write_bytes(msgspec.json.encode(job))
        return path

    def start_arguments(self, job: JobDocument, session_dir: Path) -> list[str]:
        """Return the arguments of `session start --json`."""
        file = str(self.job_file(job))
        return ["session", "start", "--session-dir", str(session_dir), "--job", file, "--json"]
