"""Finds transfers and tasks: a query, asked of the ledger and its archive, answered with dicts.

Nothing is written: a ledger that is not there is empty. A transfer with its tasks and its speed is
told as of one moment, whatever engines do meanwhile.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

from agent_plugin.transfer.entities import (
    DERIVED,
    Found,
    attributes_for,
    end_of_task,
    keys_of,
    value_of,
)
from agent_plugin.transfer.ledger_archive import ACTIVE_SECONDS, archive_path
from agent_plugin.transfer.ledger_file import ARCHIVE, from_sql
from agent_plugin.transfer.ledger_rows import TRANSFER_COLUMNS
from agent_plugin.transfer.ledger_view import (
    Event,
    archived_events,
    events,
    measure,
    measure_archive,
    unpacked,
    viewed,
)
from agent_plugin.transfer.query import ENTITY_WORDS, Entity, Query
from agent_plugin.transfer.query_attributes import ABOUT, ATTRIBUTES
from agent_plugin.transfer.query_sql import prepare, translate

_TASKS: Final = "task JOIN transfer ON transfer.id = task.transfer"
_FROM: Final = {
    Entity.TRANSFER: "transfer",
    Entity.TASK: _TASKS,
    Entity.ARTIFACT: _TASKS,
    Entity.ATTRIBUTES: "attribute",
    Entity.ENTITYTYPES: "entitytype",
}
# Old ones come first, so that a page stays what it was while transfers are added.
_ORDER: Final = {
    Entity.TRANSFER: "transfer.created, transfer.id",
    Entity.TASK: "task.transfer, task.id",
    Entity.ARTIFACT: "task.transfer, task.id",
    Entity.ATTRIBUTES: "attribute.rowid",
    Entity.ENTITYTYPES: "entitytype.rowid",
}


@dataclass(frozen=True, slots=True)
class Scopes:
    """Where to look; several together.

    Attributes:
        active: What has not ended, or ended within the last hour.
        finished: What ended before, within the last two weeks.
        archived: What ended before that.
    """

    active: bool = True
    finished: bool = False
    archived: bool = False


EVERYWHERE: Final = Scopes(active=True, finished=True, archived=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What to find, and how much of it.

    Attributes:
        query: What is asked.
        now: Seconds since the epoch.
        scopes: Where to look.
        transfer: Only this one, or only its tasks; None for all.
        attributes: Which keys the dicts are to have; None for all.
        limit: How many at most; None for all.
        skip: How many to leave out before.
    """

    query: Query
    now: float
    scopes: Scopes = field(default_factory=Scopes)
    transfer: int | None = None
    attributes: Sequence[str] | None = None
    limit: int | None = None
    skip: int = 0


def find(ledger: Path, search: Search) -> list[Found]:
    """Return what a search finds, oldest first.

    Args:
        ledger: The file; its archive is beside it. Neither has to exist.
        search: What to find.

    Raises:
        QueryInvalidError: An attribute that there is not, or a value that it does not take.
        LocalReadError: A file can not be read, or is no ledger.
    """
    statement = _Statement(search)
    found = islice(_found(ledger, statement), statement.most)
    return list(islice(found, search.skip, None))


def count_tasks(ledger: Path, transfers: Sequence[int]) -> dict[int, dict[str, int]]:
    """Return of each transfer how many tasks in the ledger have which status.

    Raises:
        LocalReadError: The ledger can not be read.
    """
    counts: dict[int, dict[str, int]] = {}
    with viewed(ledger) as connection:
        if connection is None:
            return counts
        for transfer in transfers:
            rows = connection.execute(
                "SELECT status, count(*) FROM task WHERE transfer = ? GROUP BY status", (transfer,)
            )
            counts[transfer] = dict(rows)
    return counts


def find_events(ledger: Path, transfer: int) -> list[Found]:
    """Return what people have changed of a transfer, wherever it is, oldest first.

    Raises:
        LocalReadError: A file can not be read.
    """
    told: list[Event] = []
    with viewed(ledger) as connection:
        if connection is not None:
            told = events(connection, transfer)
    if not told:
        with viewed(archive_path(ledger), ARCHIVE) as archive:
            told = [] if archive is None else archived_events(archive, transfer)
    return [
        {"time": datetime.fromtimestamp(moment, UTC), "task": task, "what": what, "who": who}
        for moment, task, what, who in told
    ]


def _found(ledger: Path, statement: "_Statement") -> Iterator[Found]:
    scopes = statement.search.scopes
    if statement.search.query.entity in (Entity.ATTRIBUTES, Entity.ENTITYTYPES):
        with _vocabulary() as connection:
            yield from statement.run(connection)
        return
    with viewed(archive_path(ledger), ARCHIVE) as archive:
        if archive is not None and scopes.archived:
            if statement.of_tasks:
                yield from _packed_tasks(archive, archive, statement, "1", {})
            else:
                measure_archive(archive)
                yield from statement.run(archive)
        if not (scopes.active or scopes.finished):
            return
        with viewed(ledger) as connection:
            if connection is not None:
                yield from _in_ledger(connection, archive, statement)


def _in_ledger(
    connection: sqlite3.Connection, archive: sqlite3.Connection | None, statement: "_Statement"
) -> Iterator[Found]:
    search = statement.search
    scope, values = _ended(search.scopes, search.now)
    if statement.of_tasks and search.scopes.finished and archive is not None:
        # The tasks of those that are done are packed after a day.
        unpackable = f"({scope}) AND id NOT IN (SELECT transfer FROM task)"  # noqa: S608 - ours
        yield from _packed_tasks(connection, archive, statement, unpackable, values)
    measure(connection, search.now)
    yield from statement.run(connection, scope, values)


def _ended(scopes: Scopes, now: float) -> tuple[str, dict[str, float]]:
    if scopes.active and scopes.finished:
        return "1", {}
    active = "(transfer.finished IS NULL OR transfer.finished > :ended)"
    return (active if scopes.active else f"NOT {active}"), {"ended": now - ACTIVE_SECONDS}


def _packed_tasks(
    transfers: sqlite3.Connection,
    archive: sqlite3.Connection,
    statement: "_Statement",
    scope: str,
    values: Mapping[str, float],
) -> Iterator[Found]:
    """Find among tasks that were packed, transfer by transfer: a job may have a million of them."""
    wanted = statement.search.transfer
    rows = transfers.execute(
        f"SELECT {TRANSFER_COLUMNS} FROM transfer WHERE {scope}"  # noqa: S608 - all ours
        f"{'' if wanted is None else ' AND id = :wanted'} ORDER BY created, id",
        {**values, "wanted": wanted},
    )
    columns = TRANSFER_COLUMNS.split(", ")
    for row in rows.fetchall():
        key = (row[columns.index("id")], row[columns.index("created")])
        packed = archive.execute(
            "SELECT tasks FROM packed WHERE transfer = ? AND created = ?", key
        ).fetchone()
        if packed is not None:
            with unpacked(row, packed[0]) as connection:
                yield from statement.run(connection)


class _Statement:
    """A search as SQL, to be run against any file that has its tables."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.most = None if search.limit is None else search.skip + search.limit
        self._entity = search.query.entity
        self.of_tasks = self._entity in (Entity.TASK, Entity.ARTIFACT)
        self._condition = translate(search.query, search.now)
        self._keys = keys_of(self._entity, search.attributes)
        self._attributes = attributes_for(self._entity, self._keys)

    def run(
        self,
        connection: sqlite3.Connection,
        scope: str = "1",
        values: Mapping[str, float] | None = None,
    ) -> Iterator[Found]:
        """Yield what is found; `scope` is a further condition, with its values."""
        columns = [attribute.sql for attribute in self._attributes]
        if self.of_tasks:
            columns += ["transfer.source", "transfer.destination"]
        conditions = [self._condition.sql, scope]
        parameters: dict[str, Any] = {**self._condition.parameters, **(values or {})}
        if self.search.transfer is not None:
            conditions.append("transfer.id = :wanted")
            parameters["wanted"] = self.search.transfer
        if self._entity is Entity.ARTIFACT:
            conditions.append("transfer.kind = 'artifact'")
        parameters["most"] = -1 if self.most is None else self.most
        rows = connection.execute(
            f"SELECT {', '.join(columns)} FROM {_FROM[self._entity]}"  # noqa: S608 - query_sql.py
            f" WHERE {' AND '.join(f'({condition})' for condition in conditions)}"
            f" ORDER BY {_ORDER[self._entity]} LIMIT :most",
            parameters,
        )
        for row in rows:
            yield self._dict(row)

    def _dict(self, row: Sequence[Any]) -> Found:
        values = {
            attribute.name: value_of(attribute, raw)
            for attribute, raw in zip(self._attributes, row, strict=False)
        }
        if self.of_tasks:
            for name, place in zip(("source", "destination"), row[-2:], strict=True):
                if name in values:
                    values[name] = end_of_task(values[name], from_sql(place))
        derived = DERIVED.get(self._entity, {})
        return {
            key: derived[key][1](values[derived[key][0]]) if key in derived else values[key]
            for key in self._keys
        }


@contextmanager
def _vocabulary() -> Iterator[sqlite3.Connection]:
    """Lend what `attributes` and `entitytypes` are about."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute(
            'CREATE TABLE attribute (entitytype, name, type, "create", "update", about)'
        )
        connection.execute("CREATE TABLE entitytype (entitytype, about)")
        connection.executemany("INSERT INTO entitytype VALUES (?, ?)", ABOUT.items())
        connection.executemany(
            "INSERT INTO attribute VALUES (?, ?, ?, ?, ?, ?)",
            (
                (word, each.name, each.kind, each.create, each.update, each.about)
                for word, entity in ENTITY_WORDS.items()
                for each in ATTRIBUTES[entity]
            ),
        )
        prepare(connection)
        yield connection
