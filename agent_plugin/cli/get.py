"""`propmaster get`: the result files of a job, on this host."""

from pathlib import Path

import click

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
from agent_plugin.publish.getting import GetResult, get
from agent_plugin.services import open_services
from agent_plugin.settings import load
from agent_plugin.transfer.progress import format_bytes


@click.command(name="get")
@of_a_job("JOB[/PATH]")
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where the files go; otherwise ./JOB, with the whole id.",
)
@click.option(
    "--merge",
    is_flag=True,
    help="Have the files of several executions in one directory; none if any differ.",
)
@click.option("--overwrite", is_flag=True, help="Replace other files that stand there.")
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
    to: Path | None,
    merge: bool,
    overwrite: bool,
    by_root: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Download the result files of JOB, or those below PATH; JOB may be the beginning of an id.

    Each execution's files go to a directory of its own where there are several.
    """
    check_ids(farm_id, queue_id, step_id, task_id)
    name, path = job_and_path(job)
    with (
        cancel_on_signals() as cancellation,
        open_services(
            load(config), store_url, cancellation=cancellation, queue_id=queue_id
        ) as context,
    ):
        job_id, executions = executions_of(
            context, name, (farm_id, queue_id), step_id=step_id, task_id=task_id, only=only
        )
        result = get(
            executions,
            context,
            job_id,
            to or Path.cwd() / job_id,
            path=path,
            merge=merge,
            by_root=by_root,
            overwrite=overwrite,
        )
    if path and not result.files:
        raise JobInvalidError(
            f"there is no result {path} of {job_id}", hint="`propmaster ls JOB` lists what there is"
        )
    if as_json:
        print_json(result)
        return
    _print(result)


def _print(result: GetResult) -> None:
    if not result.files:
        say(f"no results of {result.job}")
        return
    for execution in result.executions if len(result.executions) > 1 else ():
        files = "1 file" if execution.files == 1 else f"{execution.files} files"
        say(f"execution {execution.execution}: {files}")
    say(f"to {result.to}:")
    say(
        f"{result.files} files, {format_bytes(result.bytes)},"
        f" {format_bytes(result.bytes_fetched)} fetched, {result.seconds} s"
    )
