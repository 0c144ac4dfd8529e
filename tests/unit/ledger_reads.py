"""What is in a ledger's files, read as sqlite3 shows it to anybody."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from agent_plugin.transfer.ledger import TransferRow
from agent_plugin.transfer.ledger_rows import TRANSFER_COLUMNS, transfer_row


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """Return what a statement selects."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def archived(ledger: Path) -> list[TransferRow]:
    """Return the transfers in a ledger's archive, oldest first."""
    path = ledger.with_name("archive.db")
    if not path.exists():
        return []
    selected = rows(path, f"SELECT {TRANSFER_COLUMNS} FROM transfer ORDER BY created, id")
    return [transfer_row(row) for row in selected]


def told(ledger: Path) -> list[tuple[int | None, str, str]]:
    """Return who changed what: task, attribute and value, and who."""
    return rows(ledger, "SELECT task, what, who FROM event ORDER BY id")


def published(path: Path) -> list[tuple[Any, ...]]:
    """Return job, step, task and document of each result."""
    found = rows(path, "SELECT job, step, task, spec FROM result ORDER BY id")
    return [(*row[:3], json.loads(row[3])) for row in found]
