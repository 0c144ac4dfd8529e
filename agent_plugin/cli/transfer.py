"""`propmaster transfer`: find, make, carry out and steer what moves bytes on this host."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.steering import (
    absent,
    cell,
    chosen,
    each_of,
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
from agent_plugin.cli.transfer_create import create_command, run_command
from agent_plugin.cli.transfer_watch import watch_command
from agent_plugin.transfer.entities import DERIVED, Found
from agent_plugin.transfer.query import Entity
from agent_plugin.transfer.states import SETTABLE_TRANSFER, TransferStatus, is_so_already

_TITLES: Final = (">ID", "STATUS", ">%", ">SIZE", ">SPEED", ">LEFT", "NAME")
_FAILED_SHOWN: Final = 10
_STATUSES: Final = sorted(status.value for status in SETTABLE_TRANSFER)


class TransfersResult(msgspec.Struct):
    """What `find`, and whatever changes transfers, prints."""

    transfers: list[Found]


class ShowResult(msgspec.Struct):
    """What `transfer show` prints.

    Attributes:
        transfer: The transfer.
        tasks: By status, how many.
        failed: Tasks that failed, some of them.
    """

    transfer: Found
    tasks: dict[str, int]
    failed: list[Found]


@click.group(name="transfer")
def command() -> None:
    """Look at and steer what moves bytes on this host: session inputs, outputs, copies.

    A QUERY is a condition such as  status=failed AND size>1GB  (docs/PROTOCOL.md, Queries).
    """


@command.command(name="find")
@find_options
@common_options
def find_command(
    query: tuple[str, ...],
    finished: bool,
    archived: bool,
    everywhere: bool,
    limit: int | None,
    skip: int,
    attributes: str | None,
    as_json: bool,
    config: Path | None,
) -> None:
    """List transfers, those that QUERY finds, or all that are active."""
    scopes = scopes_of(finished=finished, archived=archived, everywhere=everywhere)
    names = names_of(attributes)
    found = found_by(
        reading(config),
        "transfer",
        query,
        scopes=scopes,
        attributes=names,
        limit=limit,
        skip=skip,
    )
    if as_json:
        print_json(TransfersResult(found))
    elif not found:
        say("no transfer was found; `--all` looks at finished and archived ones as well")
    elif names is not None:
        _say_all(table_of(found, names))
    else:
        _say_all(with_errors(_TITLES, [transfer_cells(each) for each in found], found))


def transfer_cells(each: Found) -> list[str]:
    """Return a transfer as the cells of a row: how far, how large, how fast, how long still."""
    running = each["status"] == "running"
    return [
        str(each["id"]),
        each["status"],
        str(each["progress"]),
        cell("size", each["size"]),
        f"{each['speed']:.1f} MB/s" if running else "",
        each["etr"] if running else "",
        each["code"],
    ]


@command.command(name="show")
@click.argument("transfer", type=int)
@common_options
def show_command(transfer: int, as_json: bool, config: Path | None) -> None:
    """Show all about one TRANSFER, and what its tasks are doing."""
    session = reading(config)
    found = session.get("transfer", transfer)
    if found is None:
        raise absent(transfer)
    tasks = session.find("task", entityid=transfer, attributes=["status"])
    failed = session.find("task WHERE status=failed", entityid=transfer, limit=_FAILED_SHOWN)
    result = ShowResult(found, dict(Counter(task["status"] for task in tasks)), failed)
    if as_json:
        print_json(result)
        return
    plain = {key: value for key, value in found.items() if key not in DERIVED[Entity.TRANSFER]}
    widest = max(map(len, plain))
    for key, value in plain.items():
        if value not in ("", None, {}):
            say(f"{key:<{widest}}  {cell(key, value)}")
    counted = ", ".join(f"{number} {status}" for status, number in sorted(result.tasks.items()))
    say(f"{'tasks':<{widest}}  {counted or 'none'}")
    for task in failed:
        say(f"task {task['id']} failed: {cell('source', task['source'])}: {task['error']}")


# ------------------------------------------------------------------------------------- steering


@command.command(name="set")
@click.argument("transfer", type=int)
@click.option("--status", type=click.Choice(_STATUSES), help="What it is to do.")
@click.option("--priority", metavar="N", help="0 to 1000, higher first; or high, medium, low.")
@click.option("--destination", metavar="PLACE", help="Where to, while it is pending.")
@click.option(
    "--metadata", multiple=True, callback=pairs, metavar="K=V", help="Kept with it; K= removes K."
)
@common_options
def set_command(
    transfer: int,
    status: str | None,
    priority: str | None,
    destination: str | None,
    metadata: dict[str, str],
    as_json: bool,
    config: Path | None,
) -> None:
    """Change a TRANSFER; whoever carries it out obeys within a second."""
    session = writing(config)
    given = {"status": status, "priority": priority, "destination": destination}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if metadata:
        found = session.get("transfer", transfer, ["metadata"])
        changes["metadata"] = merged(found["metadata"] if found else {}, metadata)
    _print_changed([session.update("transfer", transfer, changes)], as_json=as_json)


def _steering(name: str, status: str, text: str) -> None:
    """Add a command that sets one status of several transfers."""

    @command.command(name=name, help=text)
    @click.argument("transfers", type=int, nargs=-1, metavar="TRANSFER...")
    @click.option("--where", "condition", metavar="QUERY", help="All active ones that it finds.")
    @common_options
    def steer(
        transfers: tuple[int, ...], condition: str | None, as_json: bool, config: Path | None
    ) -> None:
        session = writing(config)
        already: set[int] = set()

        def change(transfer: int) -> Found:
            before = session.get("transfer", transfer, ["status"])
            if before and is_so_already(TransferStatus(before["status"]), TransferStatus(status)):
                already.add(transfer)
            return session.update("transfer", transfer, {"status": status})

        changed = each_of(chosen(session, transfers, condition), change)
        _print_changed(changed, as_json=as_json, already=already)


_steering("pause", "paused", "Hold transfers; what is under way stops at the next part.")
_steering("resume", "waiting", "Let transfers go on that are paused or pending.")
_steering("abort", "aborted", "Stop transfers, and leave nothing half-written behind.")
_steering("retry", "waiting", "Try again what failed of transfers that have ended.")


@command.command(name="delete")
@click.argument("transfers", type=int, nargs=-1, required=True, metavar="TRANSFER...")
@common_options
def delete_command(transfers: tuple[int, ...], as_json: bool, config: Path | None) -> None:
    """Put transfers that have ended into the archive, with their tasks."""
    session = writing(config)

    def put_away(transfer: int) -> Found:
        session.delete_one("transfer", transfer)
        return session.get("transfer", transfer) or {}

    _print_changed(each_of(transfers, put_away), as_json=as_json)


def _print_changed(changed: list[Found], *, as_json: bool, already: Collection[int] = ()) -> None:
    if as_json:
        print_json(TransfersResult(changed))
        return
    for each in changed:
        if each["id"] in already:
            say(f"transfer {each['id']} was {each['status']} already")
        else:
            say(f"transfer {each['id']} is {each['status']}, priority {each['priority']}")


def _say_all(made: list[str]) -> None:
    for line in made:
        print(line)


command.add_command(create_command)
command.add_command(run_command)
command.add_command(watch_command)
