"""`propmaster transfer`: find, make, carry out and steer what moves bytes on this host."""

from collections import Counter
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.steering import (
    Change,
    Changed,
    Choice,
    Noun,
    Wanted,
    absent,
    cell,
    chosen,
    each_of,
    find_help,
    find_options,
    print_found,
    reading,
    set_command,
    steering_command,
    writing,
)
from agent_plugin.cli.transfer_create import create_command, run_command
from agent_plugin.cli.transfer_watch import watch_command
from agent_plugin.transfer.api import Session
from agent_plugin.transfer.entities import DERIVED, Found
from agent_plugin.transfer.query import Entity
from agent_plugin.transfer.states import SETTABLE_TRANSFER, TransferStatus, is_so_already

_FAILED_SHOWN: Final = 10
_EVENTS_SHOWN: Final = 10


class TransfersResult(msgspec.Struct):
    """What `find`, and whatever changes transfers, prints."""

    transfers: list[Found]


class ShowResult(msgspec.Struct):
    """What `transfer show` prints.

    Attributes:
        transfer: The transfer.
        tasks: By status, how many.
        failed: Tasks that failed, some of them.
        events: What people have changed, the last of it or all.
    """

    transfer: Found
    tasks: dict[str, int]
    failed: list[Found]
    events: list[Found]


def _cells(each: Found) -> list[str]:
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


def _change(session: Session, choice: Choice, change: Change) -> Changed:
    """Change transfers, one after the other."""
    already: set[int] = set()

    def set_one(transfer: int) -> Found:
        before = session.get("transfer", transfer, ["status", "metadata"])
        if before is None:
            raise absent(transfer)
        wish = change.only_status
        if wish and is_so_already(TransferStatus(before["status"]), TransferStatus(wish)):
            already.add(transfer)
        return session.update("transfer", transfer, change.of(before))

    return Changed(each_of(chosen(session, choice), set_one), already)


_TRANSFERS: Final = Noun(
    entity=Entity.TRANSFER,
    titles=(">ID", "STATUS", ">%", ">SIZE", ">SPEED", ">LEFT", "NAME"),
    cells=_cells,
    result=TransfersResult,
    absent="no transfer was found; `--all` looks at finished and archived ones as well",
    settable=[status.value for status in SETTABLE_TRANSFER],
    change=_change,
    name=lambda each: f"transfer {each['id']}",
)


@click.group(name="transfer")
def command() -> None:
    """Look at and steer what moves bytes on this host: session inputs, outputs, copies.

    A QUERY is a condition such as  status=failed AND size>1GB  (transfer find --help).
    """


_FIND: Final = find_help(
    "List transfers, those that QUERY finds, or all that are active.",
    (
        "status=failed AND size>1GB",
        "code CONTAINS edit OR metadata.shot IN (sh010, sh020)",
        "created>-2h AND user NOT IN (anna, bob)",
    ),
    Entity.TRANSFER,
)


@command.command(name="find", help=_FIND)
@find_options
@common_options
def find_command(wanted: Wanted, as_json: bool, config: Path | None) -> None:
    """List transfers."""
    print_found(_TRANSFERS, reading(config), wanted, as_json=as_json)


@command.command(name="show")
@click.argument("transfer", type=int)
@click.option("--events", "all_events", is_flag=True, help="All changes, not only the last ten.")
@common_options
def show_command(transfer: int, all_events: bool, as_json: bool, config: Path | None) -> None:
    """Show all about one TRANSFER.

    And how many of its tasks are doing what, which failed, and what people have changed.
    """
    session = reading(config)
    found = session.get("transfer", transfer)
    if found is None:
        raise absent(transfer)
    tasks = session.find("task", entityid=transfer, attributes=["status"])
    failed = session.find("task WHERE status=failed", entityid=transfer, limit=_FAILED_SHOWN)
    events = session.events(transfer)
    shown = events if all_events else events[-_EVENTS_SHOWN:]
    counts = dict(Counter(task["status"] for task in tasks))
    if as_json:
        print_json(ShowResult(found, counts, failed, shown))
        return
    plain = {key: value for key, value in found.items() if key not in DERIVED[Entity.TRANSFER]}
    if found["status"] != "running":
        del plain["speed"]
    widest = max(map(len, plain))
    for key, value in plain.items():
        if value not in ("", None, {}):
            say(f"{key:<{widest}}  {cell(key, value)}")
    counted = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    say(f"{'tasks':<{widest}}  {counted or 'none'}")
    for task in failed:
        say(f"task {task['id']} failed: {cell('source', task['source'])}: {task['error']}")
    if len(shown) < len(events):
        say(f"{len(events) - len(shown)} earlier changes: --events")
    for event in shown:
        say(_event_line(event))


def _event_line(event: dict[str, Any]) -> str:
    task = "" if event["task"] is None else f"task {event['task']}: "
    return f"at {cell('time', event['time'])} by {event['who'] or 'nobody'}: {task}{event['what']}"


# ------------------------------------------------------------------------------------- steering

_DESTINATION: Final = click.Option(
    ["--destination"], metavar="PLACE", help="Where to, while it is pending."
)
command.add_command(
    set_command(
        _TRANSFERS, "Change transfers; whoever carries one out obeys within a second.", _DESTINATION
    )
)
for _name, _status, _about in (
    ("pause", "paused", "Hold transfers; what is under way stops at the next part."),
    ("resume", "waiting", "Let transfers go on that are paused or pending."),
    ("abort", "aborted", "Stop transfers, and leave nothing half-written behind."),
    ("retry", "waiting", "Try again what failed of transfers that have ended."),
):
    command.add_command(steering_command(_TRANSFERS, _name, _status, _about))


@command.command(name="delete")
@click.argument("transfers", type=int, nargs=-1, required=True, metavar="TRANSFER...")
@common_options
def delete_command(transfers: tuple[int, ...], as_json: bool, config: Path | None) -> None:
    """Put transfers that have ended into the archive, with their tasks."""
    session = writing(config)

    def put_away(transfer: int) -> Found:
        session.delete_one("transfer", transfer)
        return session.get("transfer", transfer) or {}

    put = each_of(transfers, put_away)
    if as_json:
        print_json(TransfersResult(put))
        return
    for each in put:
        say(f"transfer {each['id']} is in the archive; it was {each['status']}")


command.add_command(create_command)
command.add_command(run_command)
command.add_command(watch_command)
