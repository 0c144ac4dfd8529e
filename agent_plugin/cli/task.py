"""`propmaster task`: the files of transfers, one by one: find, hold, exclude, try again, add."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.cli.steering import (
    cell,
    find_options,
    found_by,
    merged,
    names_of,
    pairs,
    reading,
    scopes_of,
    table_of,
    writing,
)
from agent_plugin.cli.tables import with_errors
from agent_plugin.content.errors import TransferStateError
from agent_plugin.settings import load
from agent_plugin.transfer.api import Session
from agent_plugin.transfer.entities import Found
from agent_plugin.transfer.find import EVERYWHERE, Scopes
from agent_plugin.transfer.states import SETTABLE_TASK
from agent_plugin.transfers import open_session

_TITLES: Final = (">ID", ">JOB", "STATUS", ">SIZE", ">TRIES", "SOURCE -> DESTINATION")
_STATUSES: Final = sorted(status.value for status in SETTABLE_TASK)


class TasksResult(msgspec.Struct):
    """What the commands about tasks print."""

    tasks: list[Found]


@click.group(name="task")
def command() -> None:
    """Look at and steer single files of transfers.

    A QUERY is a condition such as  job.id=7 AND status=failed  (docs/PROTOCOL.md, Queries).
    """


@command.command(name="find")
@find_options
@click.option("--transfer", type=int, metavar="ID", help="Only tasks of this one.")
@common_options
def find_command(
    query: tuple[str, ...],
    finished: bool,
    archived: bool,
    everywhere: bool,
    limit: int | None,
    skip: int,
    attributes: str | None,
    transfer: int | None,
    as_json: bool,
    config: Path | None,
) -> None:
    """List tasks, those that QUERY finds, or all of active transfers."""
    scopes = scopes_of(finished=finished, archived=archived, everywhere=everywhere)
    if transfer is not None and not (finished or archived):
        scopes = EVERYWHERE
    names = names_of(attributes)
    found = found_by(
        reading(config),
        "task",
        query,
        scopes=scopes,
        transfer=transfer,
        attributes=names,
        limit=limit,
        skip=skip,
    )
    if as_json:
        print_json(TasksResult(found))
        return
    if not found:
        say("no task was found; `--all` looks at finished and archived transfers as well")
        return
    for line in (
        with_errors(_TITLES, [_cells(each) for each in found], found)
        if names is None
        else table_of(found, names)
    ):
        print(line)


def _cells(each: Found) -> list[str]:
    ends = f"{cell('source', each['source'])} -> {cell('destination', each['destination'])}"
    size = cell("size", each["size"])
    return [str(each["id"]), str(each["job"]), each["status"], size, str(each["tries"]), ends]


# ------------------------------------------------------------------------------------- steering


@command.command(name="set")
@click.argument("tasks", type=int, nargs=-1, metavar="TASK...")
@click.option("--where", "condition", metavar="QUERY", help="All of active ones that it finds.")
@click.option("--status", type=click.Choice(_STATUSES), help="What is to become of them.")
@click.option("--priority", metavar="N", help="0 to 1000, higher first; or high, medium, low.")
@click.option(
    "--metadata", multiple=True, callback=pairs, metavar="K=V", help="Kept with them; K= removes K."
)
@common_options
def set_command(
    tasks: tuple[int, ...],
    condition: str | None,
    status: str | None,
    priority: str | None,
    metadata: dict[str, str],
    as_json: bool,
    config: Path | None,
) -> None:
    """Change tasks, all of one transfer or none; whoever carries it out obeys within a second."""
    given = {"status": status, "priority": priority}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    _change(tasks, condition, changes, metadata, as_json=as_json, config=config)


def _steering(name: str, status: str, text: str) -> None:
    """Add a command that sets one status of several tasks."""

    @command.command(name=name, help=text)
    @click.argument("tasks", type=int, nargs=-1, metavar="TASK...")
    @click.option("--where", "condition", metavar="QUERY", help="All of active ones it finds.")
    @common_options
    def steer(
        tasks: tuple[int, ...], condition: str | None, as_json: bool, config: Path | None
    ) -> None:
        _change(tasks, condition, {"status": status}, {}, as_json=as_json, config=config)


_steering("exclude", "excluded", "Take tasks out, so that the rest can be completed without them.")
_steering("hold", "onhold", "Hold tasks until they are retried.")
_steering("retry", "queued", "Queue tasks that failed, were held or excluded, or are done.")


def _change(
    ids: Sequence[int],
    condition: str | None,
    changes: dict[str, Any],
    metadata: dict[str, str],
    *,
    as_json: bool,
    config: Path | None,
) -> None:
    session = writing(config)
    by_transfer: dict[int, list[dict[str, Any]]] = defaultdict(list)
    already: set[int] = set()
    for task in _chosen(session, ids, condition):
        if changes == {"status": task["status"]} and not metadata:
            already.add(task["id"])
        change = {"id": task["id"], **changes}
        if metadata:
            change["metadata"] = merged(task["metadata"], metadata)
        by_transfer[task["job"]].append(change)
    changed: list[Found] = []
    for transfer, each in by_transfer.items():
        changed += session.update_many("task", transfer, each)
    _print_tasks(changed, as_json=as_json, already=already)


def _chosen(session: Session, ids: Sequence[int], condition: str | None) -> list[Found]:
    """Return what a change has to know of each task that is meant.

    Raises:
        click.UsageError: None is named.
        TransferStateError: There is none of that id.
    """
    if condition is None and not ids:
        raise click.UsageError("name a task by its id, or several by --where")
    known = ["id", "job", "status", "metadata"]
    tasks: dict[int, Found] = {}
    if condition is not None:
        # Together, since there may be a hundred thousand.
        found = found_by(session, "task", [condition], scopes=Scopes(), attributes=known)
        tasks = {task["id"]: task for task in found}
    for task_id in ids:
        task = tasks.get(task_id) or session.get("task", task_id, known)
        if task is None:
            raise TransferStateError(
                f"there is no task {task_id}",
                hint="`propmaster task find` lists those that there are",
            )
        tasks[task_id] = task
    return list(tasks.values())


@command.command(name="add")
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
    _print_tasks(made["tasks"], as_json=as_json)


def _print_tasks(tasks: list[Found], *, as_json: bool, already: Collection[int] = ()) -> None:
    if as_json:
        print_json(TasksResult(tasks))
        return
    for task in tasks:
        was, so = ("was", " already") if task["id"] in already else ("is", "")
        say(f"task {task['id']} of transfer {task['job']} {was} {task['status']}{so}")
