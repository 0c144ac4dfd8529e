"""A ledger or an archive, opened to be looked at: nothing is written, made or set aside.

What is lent is one moment of the file, whatever engines write meanwhile, and has the functions that
queries call (query_sql.py). A ledger of version 1 is brought up to date in memory.
"""

import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from agent_plugin.content.errors import LocalReadError, QueryInvalidError
from agent_plugin.transfer.ledger_archive import unpack
from agent_plugin.transfer.ledger_file import BUSY_TIMEOUT_SECONDS, LEDGER, Schema, from_sql
from agent_plugin.transfer.ledger_rows import TASK_COLUMNS, TRANSFER_COLUMNS, transfer_row
from agent_plugin.transfer.progress import describe_transfer, percent
from agent_plugin.transfer.query_sql import prepare
from agent_plugin.transfer.query_values import parse_duration
from agent_plugin.transfer.states import TransferStatus

# SQLite has no codes of its own for these.
_OF_THE_QUERY: Final = {
    "parser stack overflow": "the query is nested too deep",
    "Expression tree is too large": "the query is nested too deep",
    "user-defined function raised exception": "a regular expression of the query took too long",
}
# What samples of the last minute say of a transfer: MB/s, and seconds that are left if known.
Pace = tuple[float, float | None]
# When, of which task (None: of the transfer itself), what, and who.
Event = tuple[float, int | None, str, str]


@contextmanager
def viewed(path: Path, schema: Schema = LEDGER) -> Iterator[sqlite3.Connection | None]:
    """Lend a file, for reading; None if there is none, or one in which nothing has been made yet.

    Args:
        path: Of the ledger or the archive.
        schema: What it has to hold.

    Raises:
        LocalReadError: It can not be read, or is something else.
        QueryInvalidError: A statement is too deep, or an expression in it too slow.
    """
    if not path.exists():
        yield None
        return
    try:
        with closing(_opened_anyhow(path)) as file:
            connection = _up_to_date(file, schema)
            if connection is None:
                yield None
                return
            with closing(connection):
                prepare(connection)
                yield connection
    except sqlite3.DatabaseError as error:
        for words, message in _OF_THE_QUERY.items():
            if words in str(error):
                raise QueryInvalidError(message, hint="ask for something simpler") from error
        raise LocalReadError(
            f"{path}: {error}",
            hint="check who owns it; `propmaster transfer find` needs the right to read it",
        ) from error


def _opened_anyhow(path: Path) -> sqlite3.Connection:
    try:
        return _opened(path, "mode=ro")
    except sqlite3.OperationalError:
        # Who may not write the directory can not make what readers and writers share. Where there
        # is no log there is no writer either, and the file may be taken as it is.
        if Path(f"{path}-wal").exists():
            raise
        return _opened(path, "immutable=1")


def _up_to_date(file: sqlite3.Connection, schema: Schema) -> sqlite3.Connection | None:
    """Return the file, or one in memory that has what is in it; None if it is empty."""
    (version,) = file.execute("PRAGMA user_version").fetchone()
    if version == schema.version:
        return file
    if version in schema.older:
        newer = sqlite3.connect(":memory:", isolation_level=None)
        file.backup(newer)
        schema.older[version][1](newer)
        return newer
    # Its tables and its version come in one transaction; before that it counts as empty.
    if version == 0 and not file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return None
    raise sqlite3.DatabaseError(f"is of version {version}, not {schema.version}")


def _opened(path: Path, how: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(os.fspath(path))}?{how}",
        uri=True,
        timeout=BUSY_TIMEOUT_SECONDS,
        isolation_level=None,
    )
    try:
        # From now on it is one moment: a maker may commit version and tables in the next.
        connection.execute("BEGIN")
        # Opening has read nothing yet.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


# ------------------------------------------------------------------- what is not in one column


def measure(connection: sqlite3.Connection, now: float) -> None:
    """Give a ledger the functions that tell how fast its transfers are, and who made them."""
    makers = dict(
        connection.execute(
            "SELECT transfer, who FROM event WHERE task IS NULL AND what GLOB 'created=*'"
        )
    )
    _give(connection, _paces(connection, now), lambda id_, _created: makers.get(id_, ""))


def measure_archive(connection: sqlite3.Connection) -> None:
    """Give an archive the same functions; nothing in it moves any more."""
    packed = connection.execute("SELECT transfer, created, events FROM packed")
    events = {(transfer_id, created): told for transfer_id, created, told in packed}

    def maker(transfer_id: int, created: float) -> str:
        for _time, task, what, who in _told(events.get((transfer_id, created))):
            if task is None and what.startswith("created="):
                return who
        return ""

    _give(connection, {}, maker)


def events(connection: sqlite3.Connection, transfer_id: int) -> list[Event]:
    """Return what people have changed of a transfer that is in the ledger, oldest first."""
    rows = connection.execute(
        "SELECT time, task, what, who FROM event WHERE transfer = ? ORDER BY id", (transfer_id,)
    )
    return [(moment, task, from_sql(what), who) for moment, task, what, who in rows]


def archived_events(connection: sqlite3.Connection, transfer_id: int) -> list[Event]:
    """Return the same of one that is in the archive; of several lives of a ledger, of the last."""
    packed = connection.execute(
        "SELECT events FROM packed WHERE transfer = ? ORDER BY created DESC LIMIT 1",
        (transfer_id,),
    ).fetchone()
    return [] if packed is None else _told(packed[0])


def _told(packed: bytes | None) -> list[Event]:
    rows = unpack(packed) if packed else []
    return [(row[0], row[2], from_sql(row[3]), row[4]) for row in rows]


def _paces(connection: sqlite3.Connection, now: float) -> dict[int, Pace]:
    """Return how fast each transfer is that is under way."""
    samples: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for transfer_id, moment, size in connection.execute(
        "SELECT transfer, time, bytes FROM sample ORDER BY transfer, time"
    ):
        samples[transfer_id].append((moment, size))
    running = connection.execute(
        f"SELECT {TRANSFER_COLUMNS} FROM transfer WHERE status = 'running'"  # noqa: S608 - constant
    )
    paces: dict[int, Pace] = {}
    for row in map(transfer_row, running):
        progress = describe_transfer(row, samples[row.id], now)
        left = parse_duration(progress.etr) if progress.etr else None
        paces[row.id] = (progress.speed, left)
    return paces


def _give(
    connection: sqlite3.Connection,
    paces: Mapping[int, Pace],
    maker: Callable[[int, float], str],
) -> None:
    still: Pace = (0.0, None)
    connection.create_function(
        "progress_of", 3, lambda status, size, done: percent(TransferStatus(status), size, done)
    )
    connection.create_function("speed_of", 1, lambda id_: paces.get(id_, still)[0])
    connection.create_function("etr_of", 1, lambda id_: paces.get(id_, still)[1])
    connection.create_function("user_of", 2, maker)


@contextmanager
def unpacked(row: Sequence[Any], packed: bytes) -> Iterator[sqlite3.Connection]:
    """Lend a ledger in memory with one transfer and its tasks, which had been packed.

    Args:
        row: The transfer, as TRANSFER_COLUMNS selects it.
        packed: Its tasks, from the archive.
    """
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.executescript(LEDGER.read())
        _insert(connection, "transfer", TRANSFER_COLUMNS, [row])
        _insert(connection, "task", TASK_COLUMNS, unpack(packed))
        prepare(connection)
        _give(connection, {}, lambda _id, _created: "")
        yield connection


def _insert(
    connection: sqlite3.Connection, table: str, columns: str, rows: Iterable[Sequence[Any]]
) -> None:
    marks = ", ".join("?" * len(columns.split(",")))
    connection.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)  # noqa: S608
