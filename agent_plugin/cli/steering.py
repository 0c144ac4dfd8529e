"""What the commands about transfers and those about tasks share: queries, ids, changes."""

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.tables import lines, room, with_errors
from agent_plugin.content.errors import PropmasterError, QueryInvalidError, TransferStateError
from agent_plugin.settings import load
from agent_plugin.transfer.api import Session
from agent_plugin.transfer.entities import Found
from agent_plugin.transfer.find import EVERYWHERE, Scopes
from agent_plugin.transfer.progress import format_bytes
from agent_plugin.transfer.query import ENTITY_WORDS, Entity, Place, refuse, where
from agent_plugin.transfer.states import DEFAULT_PRIORITY, DROPPED
from agent_plugin.transfers import clear_copies, ledger_path, open_session

R = TypeVar("R")

_WHOLE: Final = re.compile(rf"\s*({'|'.join(ENTITY_WORDS)})\s*(?:$|\swhere\b)", re.IGNORECASE)
_VOCABULARY: Final = (Entity.ATTRIBUTES, Entity.ENTITYTYPES)
_BYTES: Final = frozenset({"size", "done"})
# Of what was changed; there may be a hundred thousand.
_SAID: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Noun:
    """What a group of commands finds and steers.

    Attributes:
        entity: What its queries are about.
        titles, cells: The table of what was found; see tables.lines.
        result: Makes the JSON of it.
        absent: What is said when nothing is found.
        settable: The states that people may set.
        change: Changes those with some ids, or that a query finds.
        name: What one is called.
    """

    entity: Entity
    titles: Sequence[str]
    cells: Callable[[Found], Sequence[str]]
    result: Callable[[list[Found]], msgspec.Struct]
    absent: str
    settable: Collection[str]
    change: "Callable[[Session, Choice, Change], Changed]"
    name: Callable[[Found], str]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a command is to change: by ids, by a query, or both."""

    ids: Sequence[int]
    condition: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """What a command is to set, and keys of the metadata."""

    attributes: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def only_status(self) -> str | None:
        """The state, if nothing else is to be set."""
        alone = len(self.attributes) == 1 and not self.metadata
        return self.attributes.get("status") if alone else None

    def of(self, found: Found) -> dict[str, Any]:
        """Return what is to be set of something that has `metadata`; a key without value leaves."""
        if not self.metadata:
            return dict(self.attributes)
        both = {**found["metadata"], **self.metadata}
        kept = {key: value for key, value in both.items() if key not in self.metadata or value}
        return {**self.attributes, "metadata": kept}


@dataclass(frozen=True, slots=True)
class Changed:
    """What a command has changed, as it is afterwards, and the ids of what was so already."""

    found: list[Found]
    already: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a command is to find, and how much of it."""

    query: Sequence[str]
    scopes: Scopes
    limit: int | None
    skip: int
    attributes: Sequence[str] | None


def reading(config: Path | None) -> Session:
    """Return the transfers of this host, to be looked at; nothing is made on it."""
    return Session(ledger_path(load(config)))


def writing(config: Path | None) -> Session:
    """Return the transfers of this host, to be changed.

    Raises:
        LocalWriteError: The state directory can not be made, or others could write to it.
    """
    # What is left half-written is removed together, at the end, and told.
    return open_session(load(config), clears=False)


# ------------------------------------------------------------------------------------- finding


def find_help(about: str, examples: Sequence[str], entity: Entity) -> str:
    """Return the help of a command that finds: what a query is, as much as most need.

    Args:
        about: What the command does.
        examples: Queries.
        entity: What they are about.
    """
    # The backspace keeps click from filling the lines of a paragraph.
    lines_of_examples = "\n".join(f"  {example}" for example in examples)
    return (
        f"{about}\n\n\b\nQUERY compares attributes, as in\n{lines_of_examples}\n\n"
        "By = != < > <= >= IN, CONTAINS and MATCHES, with NOT before each of these words. An"
        " asterisk stands for anything; a value with blanks needs quotation marks.\n\n"
        f"\b\nThe attributes are listed by\n"
        f"  propmaster {entity} find 'attributes WHERE entitytype={entity}'"
    )


def find_options(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command a query, and what says where and how much to find, as `wanted`."""

    @click.argument("query", nargs=-1)
    @click.option("--finished", is_flag=True, help="What ended more than an hour ago.")
    @click.option("--archived", is_flag=True, help="What ended two weeks ago, or was deleted.")
    @click.option("--all", "everywhere", is_flag=True, help="Active, finished and archived.")
    @click.option("--limit", type=click.IntRange(0), metavar="N", help="How many at most.")
    @click.option(
        *("--skip",),
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="How many to leave out before.",
    )
    @click.option("--attributes", metavar="NAME,NAME", help="Only these, in this order.")
    @functools.wraps(command)
    def wrapped(
        *,
        query: tuple[str, ...],
        finished: bool,
        archived: bool,
        everywhere: bool,
        limit: int | None,
        skip: int,
        attributes: str | None,
        **more: object,
    ) -> R:
        scopes = Scopes(active=not (finished or archived), finished=finished, archived=archived)
        names = None
        if attributes is not None:
            names = [name.strip() for name in attributes.split(",") if name.strip()]
        wanted = Wanted(query, EVERYWHERE if everywhere else scopes, limit, skip, names)
        return command(wanted=wanted, **more)

    return wrapped


def print_found(
    noun: Noun, session: Session, wanted: Wanted, *, as_json: bool, transfer: int | None = None
) -> None:
    """Print what a query finds, or which attributes there are.

    Args:
        noun: What is looked for.
        session: The host's transfers.
        wanted: What to find.
        as_json: Whether as JSON.
        transfer: Only tasks of this one.

    Raises:
        QueryInvalidError: With the column in what was typed.
    """
    page: dict[str, Any] = {"limit": wanted.limit, "skip": wanted.skip}
    text = " ".join(wanted.query)
    entity = _entity_of(text)
    if entity in _VOCABULARY:
        found = session.search(text, scopes=Scopes(), attributes=wanted.attributes, **page)
        if as_json:
            print_json({str(entity): found})
        elif found:
            _print_all(table_of(found, list(found[0])))
        return
    names = wanted.attributes
    found = found_by(
        session,
        noun.entity,
        text,
        scopes=wanted.scopes,
        transfer=transfer,
        attributes=names,
        **page,
    )
    if as_json:
        print_json(noun.result(found))
    elif not found:
        say(noun.absent)
    elif names is not None:
        _print_all(table_of(found, names))
    else:
        _print_all(with_errors(noun.titles, [noun.cells(each) for each in found], found))


def _print_all(made: Iterable[str]) -> None:
    for line in made:
        print(line)


def _entity_of(text: str) -> Entity | None:
    """Return what a text is about that is a whole query, and no condition."""
    whole = _WHOLE.match(text)
    return None if whole is None else ENTITY_WORDS[whole[1].lower()]


def found_by(
    session: Session,
    entity: Entity,
    text: str,
    **search: Any,  # noqa: ANN401 - Session.search checks them
) -> list[Found]:
    """Return what a query on the command line finds.

    Args:
        session: The host's transfers.
        entity: What is looked for, which need not be said again.
        text: A condition, or a whole query, or nothing.
        search: As Session.search has it.

    Raises:
        QueryInvalidError: With the column in what was typed.
    """
    if not text.strip():
        return session.search(entity, **search)
    said = _entity_of(text)
    if said is not None:
        if said is not entity and (said, entity) != (Entity.ARTIFACT, Entity.TASK):
            column = len(text) - len(text.lstrip()) + 1
            other = Entity.TASK if said is Entity.ARTIFACT else said
            refuse(
                f'{entity}s are meant here, and the query is about "{said}"',
                Place(1, column),
                hint=f"`propmaster {other}` is about those" if other not in _VOCABULARY else "",
            )
        return session.search(text, **search)
    try:
        # On a line of its own, where its columns are those of what was typed.
        return session.search(f"{entity} WHERE\n{text}", **search)
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
    """Return the value of an attribute for people; as queries take it, where that is one line."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}Z"
    if key in _BYTES and isinstance(value, int):
        return format_bytes(value) if value >= 0 else "-"
    if key == "speed":
        return f"{value:.1f} MB/s"
    if isinstance(value, dict) and "path" in value:
        return str(value["path"])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------ changing


def choice_options(noun: Noun) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command ids and --where, as `choice`."""

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        metavar = f"{noun.entity.upper()}..."
        text = f"All {noun.entity}s that it finds among active ones."

        @click.argument("ids", type=int, nargs=-1, metavar=metavar)
        @click.option("--where", "condition", metavar="QUERY", help=text)
        @functools.wraps(command)
        def wrapped(*, ids: tuple[int, ...], condition: str | None, **more: object) -> R:
            if not ids and condition is None:
                raise click.UsageError(f"name a {noun.entity} by its id, or several by --where")
            return command(choice=Choice(ids, condition), **more)

        return wrapped

    return decorate


def set_command(noun: Noun, about: str, *options: click.Option) -> click.Command:
    """Return the command that sets attributes.

    Args:
        noun: What it changes.
        about: Its help.
        options: Further attributes that it can set.
    """

    @click.option("--status", type=click.Choice(sorted(noun.settable)), help="What it is to do.")
    @click.option("--priority", metavar="N", help="0 to 1000, higher first; or high, medium, low.")
    @click.option(
        *("--metadata",),
        multiple=True,
        callback=pairs,
        metavar="K=V",
        help="Kept with it; K= removes K.",
    )
    @choice_options(noun)
    @common_options
    def command(
        *,
        choice: Choice,
        metadata: dict[str, str],
        as_json: bool,
        config: Path | None,
        **given: str | None,
    ) -> None:
        attributes = {key: value for key, value in given.items() if value is not None}
        if not attributes and not metadata:
            raise click.UsageError("say what is to be set")
        changed = noun.change(writing(config), choice, Change(attributes, metadata))
        print_changed(noun, changed, as_json=as_json)
        _clear_left(noun, changed, config)

    made = click.command(name="set", help=about)(command)
    # After --status and --priority.
    made.params[2:2] = options
    return made


def steering_command(noun: Noun, name: str, status: str, about: str) -> click.Command:
    """Return a command that sets one status.

    Args:
        noun: What it changes.
        name: Of the command.
        status: What is set.
        about: Its help.
    """

    @click.command(name=name, help=about)
    @choice_options(noun)
    @common_options
    def command(*, choice: Choice, as_json: bool, config: Path | None) -> None:
        changed = noun.change(writing(config), choice, Change({"status": status}, {}))
        print_changed(noun, changed, as_json=as_json)
        _clear_left(noun, changed, config)

    return command


def print_changed(noun: Noun, changed: Changed, *, as_json: bool) -> None:
    """Print what was changed, as it is afterwards."""
    if as_json:
        print_json(noun.result(changed.found))
        return
    for each in changed.found[:_SAID]:
        was, so = ("was", " already") if each["id"] in changed.already else ("is", "")
        say(f"{noun.name(each)} {was} {each['status']}{so}{_priority(each)}")
    if len(changed.found) > _SAID:
        say(f"and {len(changed.found) - _SAID} more")
    if not changed.found:
        say(f"no {noun.entity} was found; --where looks among active ones")


def _clear_left(noun: Noun, changed: Changed, config: Path | None) -> None:
    """See that nothing half-written stays of what nobody goes on with, or say that it does."""
    key = "job" if noun.entity is Entity.TASK else "id"
    transfers = {each[key] for each in changed.found if each["status"] in DROPPED}
    left = clear_copies(load(config), transfers) if transfers else []
    for each in left[:_SAID]:
        say(
            f"{each.destination}: something half-written is left: {each.reason}; the same command"
            " again, or the next `propmaster transfer run`, removes it",
            err=True,
        )


def _priority(each: Found) -> str:
    return "" if each["priority"] == DEFAULT_PRIORITY else f", priority {each['priority']}"


def each_of(ids: Iterable[int], change: Callable[[int], Found]) -> list[Found]:
    """Change several transfers one after the other, and tell at the end if one could not be.

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


def chosen(session: Session, choice: Choice) -> list[int]:
    """Return the ids of the transfers that a command is about: those given, and those found."""
    found: list[Found] = []
    if choice.condition is not None:
        found = found_by(
            session, Entity.TRANSFER, choice.condition, scopes=Scopes(), attributes=["id"]
        )
    return list(dict.fromkeys([*choice.ids, *(each["id"] for each in found)]))


def absent(transfer: int) -> TransferStateError:
    """Return what is said of a transfer that is not there."""
    return TransferStateError(
        f"there is no transfer {transfer}",
        hint="`propmaster transfer find --all` lists those that there are",
    )
