"""`propmaster outputs`: list or download what a job's tasks left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from agent_plugin.cli.options import (
    common_options,
    farm_option,
    print_json,
    queue_option,
    say,
    store_option,
)
from agent_plugin.cli.outputs_sync import conflict_option, sync_command
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.services import ask_store, open_services
from agent_plugin.session.job import check_id
from agent_plugin.session.outputs import OutputsResult, get_outputs, list_outputs
from agent_plugin.settings import load
from agent_plugin.transfer.conflicts import Conflict
from agent_plugin.transfer.progress import format_bytes

P = ParamSpec("P")
R = TypeVar("R")


@click.group(name="outputs")
def command() -> None:
    """List or download what jobs' tasks left behind."""


command.add_command(sync_command)


def _which(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command the arguments that say whose outputs are meant."""
    for decorate in (
        click.option("--task-id", metavar="TASK", help="Only of this task; needs --step-id."),
        click.option("--step-id", metavar="STEP", help="Only of this step."),
        queue_option,
        farm_option,
        store_option,
        click.argument("job_id", metavar="JOB"),
    ):
        function = decorate(function)
    return function


@command.command(name="list")
@_which
@common_options
def list_command(
    job_id: str,
    store_url: str,
    farm_id: str,
    queue_id: str,
    step_id: str | None,
    task_id: str | None,
    as_json: bool,
    config: Path | None,
) -> None:
    """List the output files of JOB with size and hash."""
    _check(farm_id, queue_id, job_id, step_id, task_id)
    settings = load(config)
    with cancel_on_signals() as cancellation:
        asking = ask_store(settings, store_url, cancellation=cancellation, queue_id=queue_id)
        result = list_outputs(asking, (farm_id, queue_id, job_id), step_id=step_id, task_id=task_id)
    if as_json:
        print_json(result)
        return
    for root in result.roots:
        say(f"root {root.root_path}:")
        for entry in root.files:
            say(f"  {entry.size:>14} {entry.hash} {entry.path}")
    _print_total(result)


@command.command(name="get")
@_which
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where the files of all roots go; otherwise to the job's own root paths.",
)
@click.option("--by-root", is_flag=True, help="Give each root a directory of its own below --to.")
@conflict_option(Conflict.OVERWRITE)
@common_options
def get_command(
    job_id: str,
    store_url: str,
    farm_id: str,
    queue_id: str,
    step_id: str | None,
    task_id: str | None,
    to: Path | None,
    by_root: bool,
    conflict_resolution: str,
    as_json: bool,
    config: Path | None,
) -> None:
    """Download the output files of JOB, verified; what is in place already stays."""
    _check(farm_id, queue_id, job_id, step_id, task_id)
    if by_root and to is None:
        raise click.UsageError("--by-root needs --to")
    with (
        cancel_on_signals() as cancellation,
        open_services(
            load(config), store_url, cancellation=cancellation, queue_id=queue_id
        ) as context,
    ):
        result = get_outputs(
            context,
            (farm_id, queue_id, job_id),
            to,
            by_root=by_root,
            conflict=Conflict(conflict_resolution.lower()),
            step_id=step_id,
            task_id=task_id,
        )
    if as_json:
        print_json(result)
        return
    for root in result.roots:
        say(f"root {root.root_path} -> {root.local_root}: {len(root.files)} files")
    for copy in result.copies:
        say(f"copy {copy}")
    if result.left:
        say(f"{result.left} files left out: something stands at their path")
    _print_total(result)


def _check(
    farm_id: str, queue_id: str, job_id: str, step_id: str | None, task_id: str | None
) -> None:
    check_id(farm_id, "farm")
    check_id(queue_id, "queue")
    check_id(job_id, "job")
    if step_id is not None:
        check_id(step_id, "step")
    if task_id is not None:
        check_id(task_id, "task")
        if step_id is None:
            raise click.UsageError("--task-id needs --step-id")


def _print_total(result: OutputsResult) -> None:
    if not result.files:
        say("no outputs")
        return
    say(
        f"{result.files} files, {format_bytes(result.bytes)},"
        f" {format_bytes(result.bytes_fetched)} fetched, {result.seconds} s"
    )
