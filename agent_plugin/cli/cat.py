"""`propmaster cat`: one result file of a job, on standard output."""

import sys
from pathlib import Path

import click

from agent_plugin.cli.job_results import (
    by_root_option,
    check_ids,
    executions_of,
    job_and_path,
    of_a_job,
)
from agent_plugin.content.safe_path import split
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.reading import choose, read_out
from agent_plugin.publish.results import files_of
from agent_plugin.services import ask_store
from agent_plugin.settings import load


@click.command(name="cat")
@of_a_job("JOB/PATH")
@by_root_option
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Settings file; otherwise PROPMASTER_CONFIG or /etc/propmaster/config.toml.",
)
def command(
    job: str,
    store_url: str,
    farm_id: str,
    queue_id: str,
    step_id: str | None,
    task_id: str | None,
    only: tuple[str, ...],
    by_root: bool,
    config: Path | None,
) -> None:
    """Print the result file PATH of JOB as it is, verified; JOB may be the beginning of an id."""
    check_ids(farm_id, queue_id, step_id, task_id)
    name, given = job_and_path(job)
    path = "/".join(split(given))
    # Signals raise in this thread, which may be waiting for whoever reads our output.
    cancellation = Cancellation()
    asking = ask_store(load(config), store_url, cancellation=cancellation, queue_id=queue_id)
    try:
        _, executions = executions_of(
            asking, name, (farm_id, queue_id), step_id=step_id, task_id=task_id, only=only
        )
        files = {each.id: files_of(each, path, by_root=by_root) for each in executions}
        read_out(asking, choose(files, path).digest, sys.stdout.buffer.write)
    finally:
        cancellation.cancel()
