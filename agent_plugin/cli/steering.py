"""What the commands about transfers and those about tasks share: queries, ids, changes."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import click

from agent_plugin.cli.options import say
from agent_plugin.cli.tables import lines, room
from agent_plugin.content.errors import PropmasterError, QueryInvalidError, TransferStateError
from agent_plugin.settings import load
from agent_plugin.transfer.api import Session
from agent_plugin.transfer.entities import Found
from agent_plugin.transfer.find import EVERYWHERE, Scopes
from agent_plugin.transfer.progress import format_bytes
from agent_plugin.transfer.query import Place, where
from agent_plugin.transfers import ledger_path, open_session

P = ParamSpec("P")
R = TypeVar("R")

_WHOLE: Final = re.compile(
    r"\s*(?:transfer|job|task|artifact|attributes|entitytypes)\s*(?:$|\swhere\b)", re.IGNORECASE
)
_BYTES: Final = frozenset({"size", "done"})


def reading(config: Path | None) -> Session:
    """Return the transfers of this host, to be looked at; nothing is made on it."""
    return Session(ledger_path(load(config)))


def writing(config: Path | None) -> Session:
    """Return the transfers of this host, to be changed.

    Raises:
        LocalWriteError: The state directory can not be made, or others could write to it.
    """
    return open_session(load(config))


def find_options(command: Callable[P, R]) -> Callable[P, R]:
    """Give a command a query, and what says where and how much to find."""

    @click.argument("query", nargs=-1)
    @click.option("--finished", is_flag=True, help="What ended more than an hour ago.")
    @click.option("--archived", is_flag=True, help="What ended more than two weeks ago.")
    @click.option("--all", "everywhere", is_flag=True, help="Active, finished and archived.")
    @click.option("--limit", type=click.IntRange(0), help="How many at most.")
    @click.option("--skip", type=click.IntRange(0), default=0, help="How many to leave out before.")
    @click.option(
        "--attributes", metavar="NAME,NAME", help="Only these, of those in docs/PROTOCOL.md."
    )
    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        return command(*args, **kwargs)

    return wrapped


def scopes_of(*, finished: bool, archived: bool, everywhere: bool) -> Scopes:
    """Return where to look."""
    if everywhere:
        return EVERYWHERE
    return Scopes(active=not (finished or archived), finished=finished, archived=archived)


def names_of(attributes: str | None) -> list[str] | None:
    """Return the attributes that were asked for."""
    if attributes is None:
        return None
    return [name.strip() for name in attributes.split(",") if name.strip()]


def found_by(
    session: Session,
    noun: str,
    words: Sequence[str],
    **search: Any,  # noqa: ANN401 - Session.search checks them
) -> list[Found]:
    """Return what a query on the command line finds.

    Args:
        session: The host's transfers.
        noun: `transfer` or `task`, which need not be said again.
        words: A condition, or a whole query.
        search: As Session.search has it.

    Raises:
        QueryInvalidError: With the column in what was typed.
    """
    text = " ".join(words)
    if not text.strip():
        return session.search(noun, **search)
    if _WHOLE.match(text):
        return session.search(text, **search)
    try:
        # On a line of its own, where its columns are those of what was typed.
        return session.search(f"{noun} WHERE\n{text}", **search)
    except QueryInvalidError as error:
        if error.line <= 1:
            raise
        place = Place(error.line - 1, error.column)
        reason = error.message.partition(": ")[2]
        raise QueryInvalidError(
            f"{where(place)}: {reason}", hint=error.hint, line=place.line, column=place.column
        ) from error


def table_of(found: Sequence[Found], keys: Sequence[str]) -> list[str]:
    """Return chosen attributes as the lines of a table."""
    rows = [[cell(key, each[key]) for key in keys] for each in found]
    return lines([key.upper() for key in keys], rows, width=room())


def cell(key: str, value: object) -> str:
    """Return the value of an attribute for people."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if key in _BYTES and isinstance(value, int):
        return format_bytes(value) if value >= 0 else "-"
    if key == "speed":
        return f"{value:.1f} MB/s"
    if isinstance(value, dict) and "path" in value:
        return str(value["path"])
    return str(value)


def each_of(ids: Iterable[int], change: Callable[[int], Found]) -> list[Found]:
    """Change several things one after the other, and tell at the end if one could not be.

    Raises:
        PropmasterError: What the first one that could not be changed was refused for.
    """
    changed, refused = [], []
    for id_ in ids:
        try:
            changed.append(change(id_))
        except PropmasterError as error:
            refused.append(error)
    if refused:
        for done in changed:
            say(f"transfer {done['id']} is {done['status']}", err=True)
        for other in refused[1:]:
            say(f"error[{other.reference}]: {other.message}", err=True)
        raise refused[0]
    return changed


def pairs(_ctx: click.Context, _param: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """Return the `key=value` pairs that an option was given."""
    found: dict[str, str] = {}
    for pair in given:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"{pair!r} is no key=value")
        found[key] = value
    return found


def merged(old: Mapping[str, Any], new: Mapping[str, str]) -> dict[str, Any]:
    """Return metadata with some keys set anew; an empty value removes its key."""
    both = {**old, **new}
    return {key: value for key, value in both.items() if key not in new or value}


def chosen(session: Session, ids: Sequence[int], condition: str | None) -> list[int]:
    """Return the ids of the transfers that a command is about: those given, and those found.

    Raises:
        click.UsageError: Neither was given.
    """
    if condition is None:
        if not ids:
            raise click.UsageError("name a transfer by its id, or several by --where")
        return list(dict.fromkeys(ids))
    found = found_by(session, "transfer", [condition], scopes=Scopes(), attributes=["id"])
    return list(dict.fromkeys([*ids, *(each["id"] for each in found)]))


def absent(transfer: int) -> TransferStateError:
    """Return what is said of a transfer that is not there."""
    return TransferStateError(
        f"there is no transfer {transfer}",
        hint="`propmaster transfer find --all` lists those that there are",
    )
