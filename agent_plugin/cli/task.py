"""`propmaster task`: the files of transfers, one by one: find, hold, exclude, try again, add."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from agent_plugin.cli.options import common_options
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.cli.steering import (
    Change,
    Changed,
    Choice,
    Noun,
    Wanted,
    cell,
    find_help,
    find_options,
    found_by,
    print_changed,
    print_found,
    reading,
    set_command,
    steering_command,
)
from agent_plugin.content.errors import TransferStateError
from agent_plugin.settings import load
from agent_plugin.transfer.api import Session
from agent_plugin.transfer.entities import Found
from agent_plugin.transfer.find import EVERYWHERE, Scopes
from agent_plugin.transfer.query import Entity
from agent_plugin.transfer.states import SETTABLE_TASK
from agent_plugin.transfers import open_session


class TasksResult(msgspec.Struct):
    """What the commands about tasks print."""

    tasks: list[Found]


def _cells(each: Found) -> list[str]:
    ends = f"{cell('source', each['source'])} -> {cell('destination', each['destination'])}"
    size = cell("size", each["size"])
    return [str(each["id"]), str(each["job"]), each["status"], size, str(each["tries"]), ends]


def _change(session: Session, choice: Choice, change: Change) -> Changed:
    """Change tasks, all of one transfer or none."""
    by_transfer: dict[int, list[dict[str, Any]]] = defaultdict(list)
    already: set[int] = set()
    for task in _chosen(session, choice):
        if change.only_status == task["status"]:
            already.add(task["id"])
        by_transfer[task["job"]].append({"id": task["id"], **change.of(task)})
    changed: list[Found] = []
    for transfer, changes in by_transfer.items():
        changed += session.update_many("task", transfer, changes)
    return Changed(changed, already)


def _chosen(session: Session, choice: Choice) -> list[Found]:
    """Return what a change has to know of each task that is meant.

    Raises:
        TransferStateError: There is none of that id.
    """
    known = ["id", "job", "status", "metadata"]
    tasks: dict[int, Found] = {}
    if choice.condition is not None:
        # Together, since there may be a hundred thousand.
        found = found_by(session, Entity.TASK, choice.condition, scopes=Scopes(), attributes=known)
        tasks = {task["id"]: task for task in found}
    for task_id in choice.ids:
        task = tasks.get(task_id) or session.get("task", task_id, known)
        if task is None:
            raise TransferStateError(
                f"there is no task {task_id}",
                hint="`propmaster task find` lists those that there are",
            )
        tasks[task_id] = task
    return list(tasks.values())


_TASKS: Final = Noun(
    entity=Entity.TASK,
    titles=(">ID", ">JOB", "STATUS", ">SIZE", ">TRIES", "SOURCE -> DESTINATION"),
    cells=_cells,
    result=TasksResult,
    absent="no task was found; `--all` looks at finished and archived transfers as well",
    settable=[status.value for status in SETTABLE_TASK],
    change=_change,
    name=lambda task: f"task {task['id']} of transfer {task['job']}",
)


@click.group(name="task")
def command() -> None:
    """Look at and steer single files of transfers.

    A QUERY is a condition such as  job.id=7 AND status=failed  (task find --help).
    """


_FIND: Final = find_help(
    "List tasks, those that QUERY finds, or all of active transfers.",
    (
        "status=failed AND error CONTAINS space",
        r"size>1GB AND source MATCHES '\.exr$'",
        "job.code=frames AND status NOT IN (done, excluded)",
    ),
    Entity.TASK,
)


@command.command(name="find", help=_FIND)
@click.option("--transfer", type=int, metavar="ID", help="Only tasks of this one, in any scope.")
@find_options
@common_options
def find_command(wanted: Wanted, transfer: int | None, as_json: bool, config: Path | None) -> None:
    """List tasks."""
    if transfer is not None and wanted.scopes == Scopes():
        wanted = replace(wanted, scopes=EVERYWHERE)
    print_found(_TASKS, reading(config), wanted, as_json=as_json, transfer=transfer)


command.add_command(set_command(_TASKS, "Change tasks, of each transfer all of them or none."))
for _name, _status, _about in (
    ("exclude", "excluded", "Take tasks out, so that the rest can be completed without them."),
    ("hold", "onhold", "Hold tasks until they are retried."),
    ("retry", "queued", "Queue tasks that failed, were held or excluded, or are done."),
):
    command.add_command(steering_command(_TASKS, _name, _status, _about))


@command.command(name="add", short_help="Add a file, or all below a directory, to a TRANSFER.")
@click.argument("transfer", type=int)
@click.argument("source")
@click.argument("destination", required=False)
@click.option("--priority", metavar="N", help="0 to 1000, higher first; or high, medium, low.")
@click.option("--reject-duplicates", is_flag=True, help="Refuse what is there already.")
@click.option("--replace-duplicates", is_flag=True, help="Try it again with its new size.")
@common_options
def add_command(
    transfer: int,
    source: str,
    destination: str | None,
    priority: str | None,
    reject_duplicates: bool,
    replace_duplicates: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Add SOURCE to a TRANSFER, to go below its destination or to DESTINATION.

    What is there already is tried again. A transfer that had ended is waiting again.
    """
    given = {"source": source, "destination": destination, "priority": priority}
    task = {key: value for key, value in given.items() if value is not None}
    with cancel_on_signals() as cancellation:
        session = open_session(load(config), cancellation=cancellation)
        made = session.create(
            "task",
            {"tasks": [task]},
            transfer,
            allow_duplicates=not reject_duplicates,
            replace_duplicates=replace_duplicates,
        )
    print_changed(_TASKS, Changed(made["tasks"]), as_json=as_json)
