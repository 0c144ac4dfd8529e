"""`propmaster ls`: the result files of a job."""

from pathlib import Path

import click
import msgspec

from agent_plugin.cli.job_results import (
    by_root_option,
    check_ids,
    executions_of,
    job_and_path,
    of_a_job,
)
from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.errors import JobInvalidError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.publish.results import files_of
from agent_plugin.services import ask_store
from agent_plugin.settings import load
from agent_plugin.transfer.progress import format_bytes


class ListedExecution(msgspec.Struct):
    """The files of one execution; `task` is empty for a chunk of tasks."""

    execution: str
    step: str
    task: str
    started: str
    files: list[FileEntry]


class ListResult(msgspec.Struct):
    """What `ls` prints; `files` and `bytes` are those of all executions."""

    job: str
    executions: list[ListedExecution]
    files: int
    bytes: int


@click.command(name="ls")
@of_a_job("JOB[/PATH]")
@by_root_option
@common_options
def command(
    job: str,
    store_url: str,
    farm_id: str,
    queue_id: str,
    step_id: str | None,
    task_id: str | None,
    only: tuple[str, ...],
    by_root: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """List the result files of JOB, or those below PATH; JOB may be the beginning of an id."""
    check_ids(farm_id, queue_id, step_id, task_id)
    name, path = job_and_path(job)
    with cancel_on_signals() as cancellation:
        asking = ask_store(load(config), store_url, cancellation=cancellation, queue_id=queue_id)
        job_id, executions = executions_of(
            asking, name, (farm_id, queue_id), step_id=step_id, task_id=task_id, only=only
        )
    listed = [
        ListedExecution(
            execution.id,
            execution.step,
            execution.task,
            execution.started,
            [
                msgspec.structs.replace(entry, path=at)
                for at, entry in files_of(execution, path, by_root=by_root).items()
            ],
        )
        for execution in executions
    ]
    listed = [execution for execution in listed if execution.files]
    entries = [entry for execution in listed for entry in execution.files]
    if path and not entries:
        raise JobInvalidError(
            f"there is no result {path} of {job_id}",
            hint="without a path, `ls` lists all that there are",
        )
    result = ListResult(job_id, listed, len(entries), sum(entry.size for entry in entries))
    if as_json:
        print_json(result)
        return
    _print(result)


def _print(result: ListResult) -> None:
    if not result.files:
        say(f"no results of {result.job}")
        return
    for execution in result.executions:
        if len(result.executions) > 1:
            say(f"execution {execution.execution}:")
        for entry in execution.files:
            say(f"  {format_bytes(entry.size):>10}  {entry.path}")
    say(f"{result.files} files, {format_bytes(result.bytes)}, of {result.job}")
