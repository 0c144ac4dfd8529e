"""How a ledger of an older version becomes one of ours, in place and in one transaction.

An engine of the older version may have the file open and go on writing: every column that it does
not know has a default.
"""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_KEPT: Final = (
    "id, name, kind, status, priority, required, source, destination, session, job, step, task,"
    " size, done, error_code, error, lease_owner, lease_until, created, modified, finished"
)
_KEPT_OF_TASKS: Final = (
    "id, transfer, status, priority, source, destination, size, tries, not_before, error_code,"
    " error, started, finished"
)


def from_version_1(connection: sqlite3.Connection) -> None:
    """Bring a ledger of version 1 to version 2, within the caller's transaction.

    The tables of transfers and tasks are made anew, since SQLite gives no table AUTOINCREMENT
    afterwards. Those that refer to them do so by their names, and foreign keys are off until the
    file is ours, so that nothing goes with them. They are not renamed: SQLite would rename them in
    the other tables as well.
    """
    kept = {"transfer": _KEPT, "task": _KEPT_OF_TASKS}
    for table, columns in kept.items():
        connection.execute(f"CREATE TEMP TABLE {table}_before AS SELECT {columns} FROM {table}")  # noqa: S608 - constants
    for table in kept:
        connection.execute(f"DROP TABLE {table}")
    for statement in _statements():
        connection.execute(statement)
    for table, columns in kept.items():
        connection.execute(
            f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {table}_before"  # noqa: S608 - constants
        )
        connection.execute(f"DROP TABLE {table}_before")
    connection.executemany("UPDATE task SET uri = ? WHERE id = ?", _numbered(connection))
    connection.execute(
        "UPDATE task SET done = CASE status WHEN 'done' THEN size ELSE 0 END,"
        " created = (SELECT created FROM transfer WHERE transfer.id = task.transfer)"
    )


def _numbered(connection: sqlite3.Connection) -> list[tuple[str, int]]:
    """Return each task's number within its transfer, and its id."""
    numbered = []
    last, number = None, 0
    for task_id, transfer in connection.execute(
        "SELECT id, transfer FROM task ORDER BY transfer, id"
    ):
        number = number + 1 if transfer == last else 0
        last = transfer
        numbered.append((str(number), task_id))
    return numbered


def _statements() -> Iterator[Any]:
    """Yield the statements of the schema one by one, since a script would end the transaction."""
    statement = ""
    schema = Path(__file__).with_name("ledger.sql").read_text(encoding="utf-8")
    for line in schema.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
