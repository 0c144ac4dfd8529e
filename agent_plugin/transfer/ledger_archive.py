"""What becomes of transfers that have ended: packed, then archived, and kept beside the ledger.

A day after its end the tasks of a transfer that was done are packed, since a job may have a million
of them; two weeks after its end a transfer leaves for the archive as a whole. What is written comes
first and what is removed second, each in a transaction of its file: whoever is killed in between
leaves something that is in both, and the next one does it again.
"""

import json
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from agent_plugin.content.errors import TransferStateError
from agent_plugin.transfer.ledger_begin import lease_holder
from agent_plugin.transfer.ledger_control import settle_lease
from agent_plugin.transfer.ledger_create import abandon
from agent_plugin.transfer.ledger_file import ARCHIVE, LedgerFile, from_sql, to_sql
from agent_plugin.transfer.ledger_rows import (
    TASK_COLUMNS,
    TRANSFER_COLUMNS,
    TaskRow,
    TransferRow,
    task_row,
)
from agent_plugin.transfer.states import FINISHED, TransferStatus

# After that a transfer that has ended is no longer among the active ones.
ACTIVE_SECONDS: Final = 3600.0
# A task's row takes about 300 bytes, packed 60.
TASKS_KEPT_SECONDS: Final = 86_400.0
TRANSFERS_KEPT_SECONDS: Final = 14 * 86_400.0
# What has left something half-written stays, so that somebody removes that: the next run of copies,
# the next upload to that store, the next publication from it. Perhaps there is none.
LEFTOVERS_KEPT_SECONDS: Final = 90 * 86_400.0
ROWS_REMOVED_AT_ONCE: Final = 10_000
# Of one look at what is old, so that a session's end does not take long for it.
PACKED_AT_ONCE: Final = 200

_HAS_LEFT: Final = (
    "EXISTS (SELECT 1 FROM task WHERE task.transfer = transfer.id"
    " AND (upload_id != '' OR parts != '[]'))"
)
_PAIR: Final = "transfer = ? AND created = ?"


def archive_path(ledger: Path) -> Path:
    """Return where the archive of a ledger is."""
    return ledger.with_name("archive.db")


class Archive:
    """The archive beside a ledger; made when something is first put there.

    Args:
        file: The ledger.
        path: Of the ledger.
        clock: Seconds since the epoch.
    """

    def __init__(self, file: LedgerFile, path: Path, clock: Callable[[], float]) -> None:
        self._ledger = file
        self._path = archive_path(path)
        self._clock = clock

    @contextmanager
    def opened(self) -> Iterator[LedgerFile]:
        """Lend the file, open.

        Raises:
            NoSpaceError, LocalWriteError: It can not be opened or made.
        """
        file = LedgerFile(self._path, self._clock, ARCHIVE)
        try:
            yield file
        finally:
            file.close()

    # ------------------------------------------------------------------- putting things there

    def housekeep(self) -> None:
        """Take back what the dead had or were making, pack and archive what is old."""
        now = self._clock()
        self._release_dead(now)
        packed = self._ids(
            "SELECT id FROM transfer WHERE status = 'done' AND finished < ?"  # noqa: S608 - constants
            " AND EXISTS (SELECT 1 FROM task WHERE task.transfer = transfer.id)"
            f" AND (finished < ? OR NOT {_HAS_LEFT}) LIMIT ?",
            now - TASKS_KEPT_SECONDS,
            now - LEFTOVERS_KEPT_SECONDS,
        )
        archived = self._ids(
            "SELECT id FROM transfer WHERE finished < ?"  # noqa: S608 - constants
            f" AND (finished < ? OR NOT {_HAS_LEFT}) LIMIT ?",
            now - TRANSFERS_KEPT_SECONDS,
            now - LEFTOVERS_KEPT_SECONDS,
        )
        if not packed and not archived:
            return
        with self.opened() as archive:
            for transfer_id in packed:
                self._pack(archive, transfer_id)
            for transfer_id in archived:
                self._move(archive, transfer_id)

    def archive(self, transfer_id: int) -> None:
        """See Ledger.archive."""
        now = self._clock()
        with self._ledger.write() as connection:
            held = settle_lease(connection, transfer_id, now)
            (status,) = connection.execute(
                "SELECT status FROM transfer WHERE id = ?", (transfer_id,)
            ).fetchone()
        if held and TransferStatus(status) in FINISHED:
            raise TransferStateError(
                f"transfer {transfer_id} is {status}, and a process still lets go of it",
                hint="try again in a moment",
            )
        if TransferStatus(status) not in FINISHED:
            raise TransferStateError(
                f"transfer {transfer_id} is {status}, and only one that has ended can be archived",
                hint="abort it first",
            )
        with self.opened() as archive:
            if not self._move(archive, transfer_id):
                raise TransferStateError(
                    f"transfer {transfer_id} was taken up again meanwhile",
                    hint="archive it when it has ended",
                )

    def _ids(self, sql: str, *before: float) -> list[int]:
        with self._ledger.read() as connection:
            return [row[0] for row in connection.execute(sql, (*before, PACKED_AT_ONCE))]

    def _release_dead(self, now: float) -> None:
        with self._ledger.read() as connection:
            leased = connection.execute(
                "SELECT id, lease_owner, lease_until FROM transfer WHERE lease_owner != ''"
            ).fetchall()
        for transfer_id, owner, until in leased:
            if lease_holder(owner, until, now) is not None:
                continue
            with self._ledger.write() as connection:
                if not settle_lease(connection, transfer_id, now):
                    abandon(connection, transfer_id, now)

    def _pack(self, archive: LedgerFile, transfer_id: int) -> None:
        """Put a transfer's tasks and events there, and remove them from the ledger.

        Somebody may try it again meanwhile; then the tasks stay.
        """
        with self._ledger.read() as connection:
            found = connection.execute(
                "SELECT created FROM transfer WHERE id = ?", (transfer_id,)
            ).fetchone()
            tasks = connection.execute(
                f"SELECT {TASK_COLUMNS} FROM task WHERE transfer = ? ORDER BY id",  # noqa: S608
                (transfer_id,),
            ).fetchall()
            told = connection.execute(
                "SELECT time, transfer, task, what, who FROM event WHERE transfer = ? ORDER BY id",
                (transfer_id,),
            ).fetchall()
        if found is None:
            return
        # Whoever was killed while it removed them has left only some.
        rows = {row[0]: row for row in _packed(archive, transfer_id, found[0])}
        rows.update({row[0]: row for row in tasks})
        if rows or told:
            whole = [rows[task_id] for task_id in sorted(rows)]
            with archive.write() as connection:
                connection.execute(
                    "INSERT OR REPLACE INTO packed VALUES (?, ?, ?, ?)",
                    (transfer_id, found[0], _pack(whole), _pack(told)),
                )
        removed = ROWS_REMOVED_AT_ONCE
        while removed == ROWS_REMOVED_AT_ONCE:
            with self._ledger.write() as connection:
                if not _has_ended(connection, transfer_id):
                    return
                removed = connection.execute(
                    "DELETE FROM task WHERE id IN (SELECT id FROM task WHERE transfer = ? LIMIT ?)",
                    (transfer_id, ROWS_REMOVED_AT_ONCE),
                ).rowcount

    def _move(self, archive: LedgerFile, transfer_id: int) -> bool:
        """Put a transfer there with all that belongs to it, and remove it from the ledger.

        Returns:
            False if it stays, since somebody has taken it up again meanwhile.
        """
        self._pack(archive, transfer_id)
        with self._ledger.read() as connection:
            row = connection.execute(
                f"SELECT {TRANSFER_COLUMNS} FROM transfer WHERE id = ?",  # noqa: S608 - constant
                (transfer_id,),
            ).fetchone()
            results = connection.execute(
                "SELECT id, transfer, job, step, task, spec, created FROM result"
                " WHERE transfer = ?",
                (transfer_id,),
            ).fetchall()
        if row is None:
            return True
        with archive.write() as connection:
            marks = ", ".join("?" * (len(row) + 1))
            connection.execute(
                f"INSERT OR REPLACE INTO transfer ({TRANSFER_COLUMNS}, archived)"  # noqa: S608
                f" VALUES ({marks})",
                (*row, self._clock()),
            )
            connection.executemany(
                "INSERT OR REPLACE INTO result VALUES (?, ?, ?, ?, ?, ?, ?)", results
            )
        with self._ledger.write() as connection:
            if not _has_ended(connection, transfer_id):
                return False
            connection.execute("DELETE FROM result WHERE transfer = ?", (transfer_id,))
            connection.execute("DELETE FROM event WHERE transfer = ?", (transfer_id,))
            connection.execute("DELETE FROM transfer WHERE id = ?", (transfer_id,))
        return True

    def tasks(self, row: TransferRow) -> list[TaskRow]:
        """Return the tasks of a transfer that were packed; none if there are none."""
        if not self._path.exists():
            return []
        with self.opened() as archive:
            return [task_row(task) for task in _packed(archive, row.id, row.created)]

    def restore(self, connection: sqlite3.Connection, transfer_id: int) -> None:
        """Bring back, in the caller's transaction on the ledger, the tasks that were packed.

        Whoever lets a transfer go on that is done calls this first: what comes again has to meet
        the task that it is a duplicate of. Somebody may be packing them right now; what is in the
        ledger still counts.
        """
        status, created = connection.execute(
            "SELECT status, created FROM transfer WHERE id = ?", (transfer_id,)
        ).fetchone()
        if status != TransferStatus.DONE or not self._path.exists():
            return
        with self.opened() as archive:
            packed = _packed(archive, transfer_id, created)
        there = {
            row[0]
            for row in connection.execute("SELECT id FROM task WHERE transfer = ?", (transfer_id,))
        }
        marks = ", ".join("?" * len(TASK_COLUMNS.split(",")))
        connection.executemany(
            f"INSERT INTO task ({TASK_COLUMNS}) VALUES ({marks})",  # noqa: S608 - constants
            (row for row in packed if row[0] not in there),
        )


def _packed(archive: LedgerFile, transfer_id: int, created: float) -> Sequence[Sequence[Any]]:
    """Return the rows of a transfer's tasks that were packed; none if there are none."""
    with archive.read() as connection:
        found = connection.execute(
            f"SELECT tasks FROM packed WHERE {_PAIR}",  # noqa: S608 - a constant
            (transfer_id, created),
        ).fetchone()
    return unpack(found[0]) if found is not None else []


def _has_ended(connection: sqlite3.Connection, transfer_id: int) -> bool:
    found = connection.execute(
        "SELECT status FROM transfer WHERE id = ?", (transfer_id,)
    ).fetchone()
    return found is not None and TransferStatus(found[0]) in FINISHED


def _pack(rows: Sequence[Sequence[Any]]) -> bytes:
    # What is not UTF-8 is bytes in a row, and lone surrogates here, which are escaped.
    plain = [[from_sql(v) if isinstance(v, bytes) else v for v in row] for row in rows]
    return zlib.compress(json.dumps(plain, separators=(",", ":")).encode("ascii"))


def unpack(data: bytes) -> list[list[Any]]:
    """Return the rows that were packed."""
    rows: list[list[Any]] = json.loads(zlib.decompress(data))
    return [[to_sql(v) if isinstance(v, str) else v for v in row] for row in rows]
