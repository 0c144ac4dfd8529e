"""The life of a session in an OpenJD runtime: entered, tasks in it, left.

It is the session hooks, said in the runtime's words: `openjd_…` lines on standard output.
Everything runs as whoever the runtime runs its actions as, which is the job's user.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import PropmasterError, local_write_error
from agent_plugin.content.store import Cancellation
from agent_plugin.ending import ending_publications
from agent_plugin.mounting import open_mounts
from agent_plugin.queue_settings import settings_of_queue
from agent_plugin.services import open_records, open_services, state_directory
from agent_plugin.session.begin_task import awaited_parameters, begin_task, put_aside
from agent_plugin.session.end import end
from agent_plugin.session.finish_task import TaskAction, finish_task
from agent_plugin.session.input_sources import SourceResult
from agent_plugin.session.job import JobDocument, PathMappingRule, check_id
from agent_plugin.session.start import start
from agent_plugin.session.start_result import RootResult
from agent_plugin.session.state import FinishResult, SessionState, locked_state
from agent_plugin.session.sync_step import sync_step
from agent_plugin.settings import Settings
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.progress import SilentView, Snapshot, describe, format_bytes
from agent_plugin.workers.openjd.document import session_action_id, step_id, task_id

SESSION_VARIABLE: Final = "PROPMASTER_SESSION_DIR"
# What `openjd run` tells another one within it: the session whose task it runs already.
RUN_VARIABLE: Final = "PROPMASTER_TASK_RUN"
ROOT_VARIABLE: Final = "PROPMASTER_ROOT_"
SOURCE_VARIABLE: Final = "PROPMASTER_SOURCE_"
RULES_VARIABLE: Final = "PROPMASTER_PATH_MAPPING_FILE"

_RULES: Final = ".propmaster-path-mapping.json"
_SYNCED: Final = ".propmaster-synced-steps"
# Of what a session leaves at its end; no step of a template can have this name, with its NUL.
_WHOLE_SESSION: Final = "the session\0"
_PROGRESS_SECONDS: Final = 1.0

Say = Callable[[str], None]


class ProgressView(SilentView):
    """Tells the runtime how far a transfer is, once a second at most."""

    def __init__(
        self, title: str, say: Say, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._say = say
        self._clock = clock
        self._next = clock() + _PROGRESS_SECONDS

    def show(self, snapshot: Snapshot) -> None:
        """Write a pair of lines when it is time for one."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + _PROGRESS_SECONDS
        self._say(f"openjd_progress: {snapshot.percent}")
        self._say(f"openjd_status: {self._title}: {describe(snapshot)}")


def enter(
    job: JobDocument,
    session_dir: Path,
    settings: Settings,
    *,
    cancellation: Cancellation,
    say: Say,
) -> None:
    """Bring the job's inputs in, and set the variables by which tasks find them.

    Raises:
        PropmasterError: As session start does.
    """
    settings = settings_of_queue(settings, job.queue_id)
    with (
        locked_state(state_directory(settings), session_dir) as state_file,
        open_services(
            settings, job.store_url, cancellation=cancellation, queue_id=job.queue_id
        ) as context,
    ):
        mounts = open_mounts(settings, queue_id=job.queue_id)
        mounts.clear_stale(cancellation)
        result = start(
            job,
            session_dir,
            replace(context, view=lambda title: ProgressView(title, say)),
            state_file,
            mounts=mounts,
            file_system=settings.inputs.wished,
        )
        state = state_file.read_ready()
    rules = _write_rules(session_dir, result.path_mapping_rules)
    inputs: list[RootResult | SourceResult] = [*result.roots, *result.sources]
    fetched = sum(root.bytes_fetched for root in inputs)
    say("openjd_progress: 100")
    say(
        f"openjd_status: {sum(root.files for root in inputs)} files in place,"
        f" {format_bytes(fetched)} fetched"
    )
    for root in state.roots:
        for index in root.manifests:
            say(_variable(f"{ROOT_VARIABLE}{index}", root.local_root))
    for index, source in enumerate(result.sources):
        if source.file_system or (source.index_parameter and source.files):
            say(_variable(f"{SOURCE_VARIABLE}{index}", source.local_root))
    say(_variable(RULES_VARIABLE, os.fspath(rules)))
    # Last: whoever has it can rely on the session.
    say(_variable(SESSION_VARIABLE, os.fspath(session_dir)))


def sync_before_task(
    session_dir: Path,
    step_name: str,
    settings: Settings,
    environment: Mapping[str, str],
    *,
    cancellation: Cancellation,
    say: Say,
) -> None:
    """Bring the outputs that a step needs, before its first task in this session.

    Raises:
        PropmasterError: As session sync-step does.
    """
    with locked_state(state_directory(settings), session_dir) as state_file:
        state = state_file.read_ready()
        step = step_id(state.job.job_id, step_name, environment)
        synced = session_dir / _SYNCED
        if not state.job.step_dependencies.get(step) or step in _lines(synced):
            return
        with _services(settings, state, cancellation) as context:
            mounts = open_mounts(settings, queue_id=state.job.queue_id)
            result = sync_step(step, None, context, state_file, mounts=mounts)
        try:
            with synced.open("a", encoding="ascii") as file:
                file.write(f"{step}\n")
        except OSError as error:
            raise local_write_error(error, os.fspath(synced)) from error
    say(f"openjd_status: {sum(root.files for root in result.roots)} files of other steps in place")


def begin(
    session_dir: Path,
    parameters: Mapping[str, str],
    settings: Settings,
    *,
    cancellation: Cancellation,
    say: Say,
) -> None:
    """Bring the parts of sources that a task takes; without parameters see that it finds none.

    A wrap hook is told no parameters of the task that it wraps. There the task's own command says
    them, which comes here a second time.

    Raises:
        PropmasterError: As session begin-task does.
    """
    with locked_state(state_directory(settings), session_dir) as state_file:
        state = state_file.read_ready()
        parted = [root for root in state.roots if root.is_parted]
        if not parted:
            return
        mounts = open_mounts(settings, queue_id=state.job.queue_id)
        if not parameters:
            put_aside(parted, state, state_file, mounts)
            for name, sources in awaited_parameters(state).items():
                say(f"openjd_status: {', '.join(sources)}: until the task says --parameter {name}")
            return
        with _services(settings, state, cancellation) as context:
            result = begin_task(parameters, context, state_file, mounts=mounts)
    say(f"openjd_status: {sum(source.files for source in result.sources)} files of parts in place")


def finish(
    session_dir: Path,
    step_name: str,
    settings: Settings,
    environment: Mapping[str, str],
    *,
    started_at: float,
    failed: bool,
    cancellation: Cancellation,
    say: Say,
) -> None:
    """Store what a task has left; of a failed one, what the settings say.

    Raises:
        PropmasterError: As session finish-task does.
    """
    with locked_state(state_directory(settings), session_dir) as state_file:
        state = state_file.read_ready()
        step = step_id(state.job.job_id, step_name, environment)
        task = task_id(environment)
        action = _action(step, task, environment, started_at)
        outputs = settings.for_queue(state.job.queue_id).outputs
        with _services(settings, state, cancellation) as context:
            result = finish_task(
                action,
                context,
                state_file,
                mounts=open_mounts(settings, queue_id=state.job.queue_id),
                publishers=outputs.publishers,
                leaves=True,
                failed=failed,
                upload_failed=outputs.upload_failed,
            )
    _tell_finished(result, say)


def leave(
    session_dir: Path,
    settings: Settings,
    environment: Mapping[str, str],
    *,
    upload: bool,
    cancellation: Cancellation,
    say: Say,
) -> None:
    """End the session, whatever became of it; before that, store what is not stored yet.

    Args:
        session_dir: Of a session that was entered, or was not.
        settings: The host's.
        environment: Of the runtime's action.
        upload: Store what stands in output directories and no task's run has stored.
        cancellation: Of the upload; the end goes on to its end.
        say: Takes the lines.

    Raises:
        PropmasterError: Something could not be stored, or removed.
    """
    failure: PropmasterError | None = None
    with locked_state(state_directory(settings), session_dir) as state_file:
        state = state_file.read()
        if state is None:
            return
        queue_id = state.job.queue_id
        mounts = open_mounts(settings, queue_id=queue_id)
        if upload and state.ready:
            step = step_id(state.job.job_id, _WHOLE_SESSION, {})
            action = _action(step, None, environment, time.time())
            publishers = settings.for_queue(queue_id).outputs.publishers
            try:
                with _services(settings, state, cancellation) as context:
                    result = finish_task(
                        action,
                        context,
                        state_file,
                        mounts=mounts,
                        publishers=publishers,
                        leaves=True,
                    )
                _tell_finished(result, say)
            except PropmasterError as error:
                failure = error
        end(
            session_dir,
            open_records(settings, queue_id=queue_id),
            state_file,
            mounts=mounts,
            publications=ending_publications(settings, cancellation),
        )
    for name in (_RULES, _SYNCED):
        (session_dir / name).unlink(missing_ok=True)
    if failure is not None:
        raise failure


def _action(
    step: str, task: str | None, environment: Mapping[str, str], started_at: float
) -> TaskAction:
    if task is not None:
        check_id(task, "task")
    return TaskAction(
        step_id=check_id(step, "step"),
        task_id=task,
        session_action_id=check_id(session_action_id(environment), "sessionaction"),
        started_at=started_at,
    )


def _services(
    settings: Settings, state: SessionState, cancellation: Cancellation
) -> AbstractContextManager[TransferContext]:
    return open_services(
        settings,
        state.job.store_url,
        cancellation=cancellation,
        queue_id=state.job.queue_id,
        account_id=state.account_id,
    )


def _tell_finished(result: FinishResult, say: Say) -> None:
    say(
        f"openjd_status: {result.files} output files,"
        f" {format_bytes(result.bytes_uploaded)} uploaded"
    )
    for published in result.results:
        say(f"openjd_status: published {published.url}")
    for failure in result.publish_failures:
        later = "; it is tried again when the session ends" if failure.later else ""
        say(f"propmaster: not published ({failure.error}): {failure.message}{later}")
        if failure.hint:
            say(f"propmaster: hint: {failure.hint}")
    for excluded in result.publish_excluded:
        say(f"propmaster: excluded by hand: {excluded.files} files of {excluded.url}")


def _write_rules(session_dir: Path, rules: list[PathMappingRule]) -> Path:
    """Write the session's rules as the runtime writes its own, `pathmapping-1.0`."""
    path = session_dir / _RULES
    document = {
        "version": "pathmapping-1.0",
        "path_mapping_rules": [
            {
                "source_path_format": rule.source_path_format.upper(),
                "source_path": rule.source_path,
                "destination_path": rule.destination_path,
            }
            for rule in rules
        ],
    }
    try:
        path.write_text(json.dumps(document), encoding="ascii")
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error
    return path


def _variable(name: str, value: str) -> str:
    line = f"{name}={value}"
    # JSON where a line would end too early, and then only: older runtimes know no JSON here.
    return f"openjd_env: {line if line.isprintable() else json.dumps(line)}"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return []
