"""How a ledger of an older version becomes one of ours, in place and in one transaction.

An engine of the older version may have the file open and go on writing: every column that it does
not know has a default.
"""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

# What the new columns of `task` are in a ledger that had them not.
_NEW_TASK_COLUMNS: Final = (
    "uri TEXT NOT NULL DEFAULT ''",
    "done INTEGER NOT NULL DEFAULT 0",
    "modifier TEXT NOT NULL DEFAULT ''",
    "metadata TEXT NOT NULL DEFAULT '{}'",
    "upload_id TEXT NOT NULL DEFAULT ''",
    "parts TEXT NOT NULL DEFAULT '[]'",
    "created REAL NOT NULL DEFAULT 0",
)
_KEPT: Final = (
    "id, name, kind, status, priority, required, source, destination, session, job, step, task,"
    " size, done, error_code, error, lease_owner, lease_until, created, modified, finished"
)


def from_version_1(connection: sqlite3.Connection) -> None:
    """Bring a ledger of version 1 to version 2, within the caller's transaction.

    The table of transfers is made anew, since SQLite gives no table AUTOINCREMENT afterwards. The
    tables that refer to it do so by its name, and foreign keys are off until the file is ours, so
    that nothing goes with it. It is not renamed: SQLite would rename it in those tables as well.
    """
    connection.execute(f"CREATE TEMP TABLE before AS SELECT {_KEPT} FROM transfer")  # noqa: S608 - constants
    for column in _NEW_TASK_COLUMNS:
        connection.execute(f"ALTER TABLE task ADD COLUMN {column}")
    connection.executemany("UPDATE task SET uri = ? WHERE id = ?", _numbered(connection))
    connection.execute(
        "UPDATE task SET done = CASE status WHEN 'done' THEN size ELSE 0 END,"
        " created = (SELECT created FROM transfer WHERE transfer.id = task.transfer)"
    )
    connection.execute("DROP TABLE transfer")
    for statement in _statements():
        connection.execute(statement)
    connection.execute(f"INSERT INTO transfer ({_KEPT}) SELECT {_KEPT} FROM before")  # noqa: S608 - constants
    connection.execute("DROP TABLE before")


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
