"""`propmaster session`: start, sync-step, begin-task, finish-task and end: what runtimes call."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from agent_plugin.cli.options import (
    common_options,
    open_document,
    parameters_option,
    print_json,
    say,
    session_dir_option,
)
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.errors import JobInvalidError, LocalReadError, SessionStateError
from agent_plugin.content.log_file import writing_to
from agent_plugin.ending import ending_publications
from agent_plugin.mounting import open_mounts
from agent_plugin.queue_settings import settings_of_queue
from agent_plugin.services import open_records, open_services, state_directory
from agent_plugin.session.begin_task import begin_task
from agent_plugin.session.end import end
from agent_plugin.session.finish_task import TaskAction, finish_task
from agent_plugin.session.input_sources import SourceResult
from agent_plugin.session.job import MAX_JOB_BYTES, JobDocument, check_id, with_sources
from agent_plugin.session.roots import LAST_SECOND
from agent_plugin.session.start import start
from agent_plugin.session.start_result import StartResult
from agent_plugin.session.state import StateFile, locked_state, session_id
from agent_plugin.session.sync_step import sync_step
from agent_plugin.session_logs import collect_logs, log_place
from agent_plugin.settings import Settings, load
from agent_plugin.sources.command_line import parse_source
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.progress import format_bytes
from agent_plugin.workers.openjd.hooks import SESSION_VARIABLE


def _seconds(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    # Not a number is in no range, so the question is asked this way round.
    if value is None or 0 <= value <= LAST_SECOND:
        return value
    raise click.BadParameter(
        f"{value:g} is no time: seconds since the epoch are meant, not milliseconds"
    )


@click.group(name="session")
def command() -> None:
    """What the worker agent calls: start; for each task sync-step, begin-task, finish-task; end."""


@command.command(name="start")
@session_dir_option
@click.option(
    "--job",
    "job_file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="The job document (docs/PROTOCOL.md); - reads standard input.",
)
@click.option(
    "--file-system",
    type=click.Choice(["COPIED", "VIRTUAL", "AUTO"]),
    help="How inputs are brought in; otherwise what is set for the queue, or what the job says.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SOURCE",
    help="One more input source: s3://bucket/key:/target,opt=name=value (docs/PROTOCOL.md).",
)
@common_options
def start_command(
    session_dir: Path,
    job_file: Path,
    file_system: str | None,
    inputs: tuple[str, ...],
    as_json: bool,
    config: Path | None,
) -> None:
    """Bring the job's inputs to the session directory. Start it again to go on after a kill."""
    job = with_sources(_read_job(job_file), [parse_source(text) for text in inputs])
    settings = settings_of_queue(load(config), job.queue_id)
    if file_system is None:
        file_system = settings.inputs.wished
    with (
        cancel_on_signals() as cancellation,
        locked_state(state_directory(settings), session_dir) as state_file,
        writing_to(log_place(settings, session_id(session_dir))),
        open_services(
            settings, job.store_url, cancellation=cancellation, queue_id=job.queue_id
        ) as context,
    ):
        mounts = open_mounts(settings, queue_id=job.queue_id)
        mounts.clear_stale(cancellation)
        result = start(
            job, session_dir, context, state_file, mounts=mounts, file_system=file_system
        )
    _print_started(result, as_json=as_json)


@command.command(name="sync-step")
@session_dir_option
@click.option("--step-id", required=True, metavar="STEP", help="The step about to run.")
@click.option(
    "--depends-on",
    multiple=True,
    metavar="STEP",
    help="A step whose outputs it needs, in order; otherwise what the job document says.",
)
@common_options
def sync_step_command(
    session_dir: Path,
    step_id: str,
    depends_on: tuple[str, ...],
    as_json: bool,
    config: Path | None,
) -> None:
    """Bring the outputs of the steps that a step depends on, over what is there."""
    for step in (step_id, *depends_on):
        check_id(step, "step")
    if step_id in depends_on:
        raise JobInvalidError(
            f"--depends-on {step_id}: the step would depend on itself",
            hint="name the steps whose outputs it needs",
        )
    settings = load(config)
    with _started(settings, session_dir) as (context, state_file, queue_id):
        mounts = open_mounts(settings, queue_id=queue_id)
        result = sync_step(step_id, depends_on or None, context, state_file, mounts=mounts)
    _print_started(result, as_json=as_json)


@command.command(name="begin-task")
@click.option(
    "--session-dir",
    required=True,
    envvar=SESSION_VARIABLE,
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="The session's directory; in an OpenJD session it is known.",
)
@parameters_option
@common_options
def begin_task_command(
    session_dir: Path, parameters: Mapping[str, str], as_json: bool, config: Path | None
) -> None:
    """Bring the task's part of each source that an IndexParameter parts, before the task runs."""
    settings = load(config)
    with _started(settings, session_dir) as (context, state_file, queue_id):
        mounts = open_mounts(settings, queue_id=queue_id)
        result = begin_task(parameters, context, state_file, mounts=mounts)
    if as_json:
        print_json(result)
        return
    _print_sources(result.sources)
    if not result.sources:
        say("no source of the session has parts that a task parameter says")
    say(f"{result.seconds} s")


@command.command(name="finish-task")
@session_dir_option
@click.option("--step-id", required=True, metavar="STEP", help="The task's step.")
@click.option("--task-id", metavar="TASK", help="The task; leave it out for a chunk of tasks.")
@click.option("--session-action-id", required=True, metavar="ID", help="Of the task's run.")
@click.option(
    "--started-at",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    help="When the action started, since the epoch; otherwise now.",
)
@click.option("--failed", is_flag=True, help="The task failed: its outputs are not uploaded.")
@click.option("--upload-failed", is_flag=True, help="Upload them even then.")
@common_options
def finish_task_command(
    session_dir: Path,
    step_id: str,
    task_id: str | None,
    session_action_id: str,
    started_at: float | None,
    failed: bool,
    upload_failed: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Upload what the task left behind, only what the store lacks, and then its manifest."""
    check_id(step_id, "step")
    check_id(session_action_id, "sessionaction")
    if task_id is not None:
        check_id(task_id, "task")
    settings = load(config)
    action = TaskAction(
        step_id=step_id,
        task_id=task_id,
        session_action_id=session_action_id,
        started_at=time.time() if started_at is None else started_at,
    )
    with _started(settings, session_dir) as (context, state_file, queue_id):
        outputs = settings.for_queue(queue_id).outputs
        result = finish_task(
            action,
            context,
            state_file,
            mounts=open_mounts(settings, queue_id=queue_id),
            publishers=outputs.publishers,
            leaves=True,
            failed=failed,
            upload_failed=upload_failed or outputs.upload_failed,
        )
    if as_json:
        print_json(result)
        return
    say(
        f"{result.files} output files, {format_bytes(result.bytes_uploaded)} uploaded,"
        f" {format_bytes(result.bytes_reused)} were in the store, {len(result.deleted)} deleted,"
        f" {result.seconds} s"
    )
    for manifest in result.manifests:
        if manifest.output_manifest_path:
            say(f"manifest {manifest.output_manifest_path}")
    for published in result.results:
        say(f"published {published.url}")
    for failure in result.publish_failures:
        later = "; it is tried again when the session ends" if failure.later else ""
        say(f"not published ({failure.error}): {failure.message}{later}")
        if failure.hint:
            say(f"hint: {failure.hint}")
    for excluded in result.publish_excluded:
        say(f"excluded by hand: {excluded.files} files of {excluded.url}")


@command.command(name="end")
@session_dir_option
@click.option("--keep-files", is_flag=True, help="Leave the session's local roots as they are.")
@common_options
def end_command(session_dir: Path, keep_files: bool, as_json: bool, config: Path | None) -> None:
    """Remove what the session has on this host. Ending it twice does no harm."""
    settings = load(config)
    with (
        # An end that has begun goes on to its end, half a root helps nobody; only what is published
        # is given up.
        cancel_on_signals() as cancellation,
        locked_state(state_directory(settings), session_dir) as state_file,
        # A mistyped directory leaves no log.
        writing_to(log_place(settings, session_id(session_dir)) if state_file.exists else None),
    ):
        mounts = open_mounts(settings)
        records = open_records(settings, queue_id=_queue_of(state_file))
        result = end(
            session_dir,
            records,
            state_file,
            mounts=mounts,
            publications=ending_publications(settings, cancellation),
            keep_files=keep_files,
        )
    collect_logs(settings)
    if as_json:
        print_json(result)
        return
    for directory_name in result.removed:
        say(f"removed {directory_name}")


@contextmanager
def _started(
    settings: Settings, session_dir: Path
) -> Iterator[tuple[TransferContext, StateFile, str]]:
    """Open what a hook of a started session needs; the last is the queue."""
    with (
        cancel_on_signals() as cancellation,
        locked_state(state_directory(settings), session_dir) as state_file,
    ):
        state = state_file.read_ready()
        with (
            writing_to(log_place(settings, state.session_id)),
            open_services(
                settings,
                state.job.store_url,
                cancellation=cancellation,
                queue_id=state.job.queue_id,
                account_id=state.account_id,
            ) as context,
        ):
            yield context, state_file, state.job.queue_id


def _queue_of(state_file: StateFile) -> str:
    """Return the queue of a session, empty if it is not known any more."""
    try:
        state = state_file.read()
    except SessionStateError:
        return ""
    return state.job.queue_id if state is not None else ""


def _read_job(job_file: Path) -> JobDocument:
    source = "standard input" if os.fspath(job_file) == "-" else os.fspath(job_file)
    try:
        with open_document(job_file) as file:
            data = file.read(MAX_JOB_BYTES + 1)
    except FileNotFoundError as error:
        raise JobInvalidError(
            f"{source}: there is no such file", hint="give the job document's path to --job"
        ) from error
    except OSError as error:
        raise LocalReadError(f"{source}: {error.strerror}") from error
    return JobDocument.decode(data, source)


def _print_started(result: StartResult, *, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    for root in result.roots:
        why = f": {root.reason}" if root.reason else ""
        say(
            f"root {root.root_path} -> {root.local_root}: {root.files} files,"
            f" {format_bytes(root.bytes)}, {format_bytes(root.bytes_fetched)} fetched,"
            f" {format_bytes(root.bytes_reused)} reused ({root.file_system}{why})"
        )
    _print_sources(result.sources)
    say(f"{result.seconds} s")


def _print_sources(sources: Sequence[SourceResult]) -> None:
    for source in sources:
        what = f"source {source.source}"
        if source.part is not None:
            what += f", part {source.part}"
        if not source.file_system:
            waits = source.index_parameter and source.files
            found = f"{source.files} files, {format_bytes(source.bytes)}; " if waits else ""
            say(f"{what}: {found or 'done without: '}{source.reason}")
            continue
        why = f": {source.reason}" if source.reason else ""
        say(
            f"{what} -> {source.local_root}: {source.files} files,"
            f" {format_bytes(source.bytes)}, {format_bytes(source.bytes_fetched)} fetched,"
            f" {format_bytes(source.bytes_reused)} reused ({source.file_system}{why})"
        )
