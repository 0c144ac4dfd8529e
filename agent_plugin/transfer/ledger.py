"""The transfer ledger: what is moving, what moved, what failed and why, in one SQLite file.

Who writes: the process that holds a transfer's lease writes its rows; any process may read. A
lease names its owner by process id and start time, so that the lease of a killed engine is taken
over at once. Task states are buffered (`note`) and written in batches (`flush`): a kill loses at
most the last batch, and the engine never trusts a row over the file it speaks of. Losing the whole
ledger therefore loses history, not data; a corrupt file is set aside and a new one begun.

One connection, used under one lock (ledger_file.py): SQLite serialises writers anyway, and rows are
few. What is noted (ledger_notes.py) is under another, so that no crew thread waits for the disk.
"""

import sqlite3
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from agent_plugin.content.errors import PropmasterError, TransferStateError
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.ledger_begin import (
    LEASE_SECONDS,
    Beginning,
    lease_owner,
    renew_lease,
    sizes,
)
from agent_plugin.transfer.ledger_file import (
    BUSY_TIMEOUT_SECONDS,
    LedgerBusyError,
    LedgerFile,
    from_sql,
    to_sql,
)
from agent_plugin.transfer.ledger_notes import Notes
from agent_plugin.transfer.ledger_rows import (
    TASK_COLUMNS,
    TRANSFER_COLUMNS,
    TaskRow,
    TaskSpec,
    TransferRow,
    TransferSpec,
    task_row,
    transfer_row,
)
from agent_plugin.transfer.states import (
    TaskStatus,
    TransferStatus,
    aggregate,
    check_transfer_change,
)

__all__ = [
    "LEASE_SECONDS",
    "NOTES_AT_ONCE",
    "SAMPLE_WINDOW_SECONDS",
    "Ledger",
    "TaskRow",
    "TaskSpec",
    "TransferRow",
    "TransferSpec",
    "lease_owner",
]

SAMPLE_WINDOW_SECONDS: Final = 60.0
# A beat is made by the thread that looks whether to stop, so it leaves a busy ledger be and writes
# later; not for ever, because it renews the lease.
BEAT_PATIENCE_SECONDS: Final = 0.1
BEATS_MISSED_SECONDS: Final = 50.0
# In one transaction, so that others do not wait: 99,000 a second were measured.
NOTES_AT_ONCE: Final = 10_000
# A task's row takes about 300 bytes, and a job may have a million of them.
TASKS_KEPT_SECONDS: Final = 86_400.0
TRANSFERS_KEPT_SECONDS: Final = 14 * 86_400.0
ROWS_REMOVED_AT_ONCE: Final = 10_000


@dataclass(slots=True)
class _Pulse:
    """What the next beat of a transfer has to write.

    Attributes:
        renewed: When the last one was written, seconds since the epoch.
        moved, found: Bytes since then.
    """

    renewed: float
    moved: int = 0
    found: int = 0


class Ledger:
    """The ledger file, open. May be used from any thread; close() when done."""

    def __init__(self, file: LedgerFile, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._notes = Notes()
        self._pulses: dict[int, _Pulse] = {}

    @classmethod
    def open(cls, path: Path, *, clock: Callable[[], float] = time.time) -> Self:
        """Open the ledger, making it when there is none.

        Args:
            path: The file; its directory exists and is private to this user.
            clock: Seconds since the epoch.

        Raises:
            NoSpaceError, LocalWriteError: It can not be opened or made.
        """
        return cls(LedgerFile(path, clock), clock)

    def close(self) -> None:
        """Write what is buffered and close the file.

        Raises:
            NoSpaceError, LocalWriteError: It could not be written; the file is closed.
        """
        try:
            self.flush()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(
        self,
        spec: TransferSpec,
        tasks: Iterable[TaskSpec],
        cancellation: Cancellation | None = None,
    ) -> TransferRow:
        """Create a transfer with its tasks, or take one of the same spec up again that is not done.

        The caller holds the lease afterwards and the transfer is running. Tasks that are there
        already keep their state, but what a dead engine had begun, or what failed, is queued; what
        is not done and no longer asked for is excluded.

        Raises:
            TransferStateError: A living process is running it right now.
            CancelledError: Cancellation was wished; the next begin goes on with what is there.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        cancellation = cancellation or Cancellation()
        transfer_id = Beginning(self._file, spec, self._clock, cancellation).run(tasks)
        self._pulses[transfer_id] = _Pulse(self._clock())
        return self.transfer(transfer_id)

    def transfer(self, transfer_id: int) -> TransferRow:
        """Return one transfer.

        Raises:
            TransferStateError: There is none of that id.
        """
        with self._file.read() as connection:
            row = connection.execute(
                f"SELECT {TRANSFER_COLUMNS} FROM transfer WHERE id = ?",  # noqa: S608 - constant
                (transfer_id,),
            ).fetchone()
        if row is None:
            raise TransferStateError(f"there is no transfer {transfer_id}")
        return transfer_row(row)

    def transfers(self, *, session: str | None = None) -> list[TransferRow]:
        """Return all transfers, or those of one session, oldest first."""
        where, arguments = ("WHERE session = ?", (session,)) if session is not None else ("", ())
        with self._file.read() as connection:
            rows = connection.execute(
                f"SELECT {TRANSFER_COLUMNS} FROM transfer {where} ORDER BY id",  # noqa: S608
                arguments,
            ).fetchall()
        return [transfer_row(row) for row in rows]

    def tasks(self, transfer_id: int) -> list[TaskRow]:
        """Return a transfer's tasks in the order in which they were planned."""
        self.flush()
        with self._file.read() as connection:
            rows = connection.execute(
                f"SELECT {TASK_COLUMNS} FROM task WHERE transfer = ? ORDER BY id",  # noqa: S608
                (transfer_id,),
            ).fetchall()
        return [task_row(row) for row in rows]

    def task_ids(self, transfer_id: int) -> dict[tuple[str, str], int]:
        """Return the ids of a transfer's tasks by (source, destination)."""
        with self._file.read() as connection:
            rows = connection.execute(
                "SELECT source, destination, id FROM task WHERE transfer = ?", (transfer_id,)
            ).fetchall()
        return {(from_sql(source), from_sql(dest)): task_id for source, dest, task_id in rows}

    def left(self, transfer_id: int) -> set[int]:
        """Return the ids of a transfer's tasks whose bytes are in its size and not in `done`."""
        with self._file.read() as connection:
            rows = connection.execute(
                "SELECT id FROM task WHERE transfer = ? AND status NOT IN ('done', 'excluded')",
                (transfer_id,),
            )
            return {task_id for (task_id,) in rows}

    def note(self, task_id: int, status: TaskStatus, error: PropmasterError | None = None) -> None:
        """Remember a task's new state; written at the next flush or beat, the last note wins.

        `booting` begins an attempt, which counts as a try. Never waits for the disk.
        """
        self._notes.state(task_id, status, error)

    def note_retry(self, task_id: int, error: PropmasterError, wait_seconds: float) -> None:
        """Remember that an attempt has failed and that the next one begins after a wait.

        Counts as a try. Never waits for the disk.
        """
        self._notes.retry(task_id, error, self._clock() + wait_seconds)

    def flush(self) -> None:
        """Write what was noted.

        Raises:
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        while self._notes:
            with self._file.write() as connection:
                self._notes.write(connection, self._clock(), NOTES_AT_ONCE)

    def beat(self, transfer_id: int, moved: int, found: int = 0) -> TransferStatus:
        """Renew the lease, record what is done since the last beat, and write what was noted.

        What a busy ledger does not take is written by a later beat.

        Args:
            transfer_id: A transfer that this process has begun.
            moved: Further bytes that were moved.
            found: Further bytes that turned out to be there; they count as done, and say nothing
                about speed. Negative if some of what was told is not done after all.

        Returns:
            The transfer's state, which another process may have changed.

        Raises:
            TransferStateError: The lease ran out, and another process has taken the transfer over.
            NoSpaceError, LocalWriteError: The ledger can not be written, also because it was busy
                until the lease was about to run out.
        """
        now = self._clock()
        pulse = self._pulses.setdefault(transfer_id, _Pulse(now))
        pulse.moved += moved
        pulse.found += found
        # An overdue one need not mean a busy ledger: the process was stopped, or the clock set.
        overdue = now - pulse.renewed > BEATS_MISSED_SECONDS
        patience = BUSY_TIMEOUT_SECONDS if overdue else BEAT_PATIENCE_SECONDS
        try:
            with self._file.write(patience=patience) as connection:
                renew_lease(connection, transfer_id, now)
                self._notes.write(connection, now, NOTES_AT_ONCE)
                self._add(connection, transfer_id, pulse, now)
        except LedgerBusyError:
            if overdue:
                raise
            return TransferStatus.RUNNING
        self._pulses[transfer_id] = _Pulse(now)
        return self.transfer(transfer_id).status

    @staticmethod
    def _add(connection: sqlite3.Connection, transfer_id: int, pulse: _Pulse, now: float) -> None:
        connection.execute(
            "UPDATE transfer SET done = done + ? WHERE id = ?",
            (pulse.moved + pulse.found, transfer_id),
        )
        connection.execute(
            "INSERT INTO sample VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
            " bytes = bytes + excluded.bytes",
            (transfer_id, now, pulse.moved),
        )
        connection.execute(
            "DELETE FROM sample WHERE transfer = ? AND time < ?",
            (transfer_id, now - SAMPLE_WINDOW_SECONDS),
        )

    def finish(self, transfer_id: int, error: PropmasterError | None = None) -> TransferRow:
        """Let go of a transfer in the state that follows from its tasks and the error, if any.

        A cancelled transfer goes back to waiting, so that the next begin() resumes it. One that
        another process has taken over, or that was ended meanwhile, stays as it is.
        """
        self.flush()
        with self._file.read() as connection:
            size = sizes(connection, transfer_id)
            begun = connection.execute(
                "SELECT id FROM task WHERE transfer = ? AND status IN ('booting', 'executing')",
                (transfer_id,),
            ).fetchall()
        status = _final_status(size.keys(), error)
        check_transfer_change(TransferStatus.RUNNING, status)
        size.pop(TaskStatus.EXCLUDED, 0)
        with self._file.write() as connection:
            ours = connection.execute(
                "UPDATE transfer SET status = ?1, error_code = ?2, error = ?3, lease_owner = '',"
                " lease_until = 0, modified = ?4,"
                " finished = CASE WHEN ?1 IN ('done', 'failed', 'aborted') THEN ?4 END,"
                " size = ?5, done = ?6 WHERE id = ?7 AND lease_owner = ?8",
                (
                    status,
                    error.code if error else "",
                    to_sql(error.message) if error else "",
                    self._clock(),
                    sum(size.values()),
                    size.get(TaskStatus.DONE, 0),
                    transfer_id,
                    lease_owner(),
                ),
            )
            if ours.rowcount:
                connection.executemany("UPDATE task SET status = 'queued' WHERE id = ?", begun)
        self._pulses.pop(transfer_id, None)
        return self.transfer(transfer_id)

    def samples(self, transfer_id: int) -> list[tuple[float, int]]:
        """Return (time, bytes moved since the sample before) of the last minute, oldest first."""
        with self._file.read() as connection:
            return list(
                connection.execute(
                    "SELECT time, bytes FROM sample WHERE transfer = ? AND time >= ? ORDER BY time",
                    (transfer_id, self._clock() - SAMPLE_WINDOW_SECONDS),
                )
            )

    def forget_session(self, session: str) -> None:
        """End the transfers of a session that is over, and remove what is old.

        What is still live becomes aborted. The tasks of transfers that were done a day ago go, and
        transfers that finished two weeks ago, so that the file does not grow for ever.
        """
        now = self._clock()
        with self._file.write() as connection:
            connection.execute(
                "UPDATE transfer SET status = 'aborted', lease_owner = '', finished = ?,"
                " modified = ? WHERE session = ?"
                " AND status NOT IN ('done', 'aborted', 'failed')",
                (now, now, session),
            )
        removed = ROWS_REMOVED_AT_ONCE
        while removed == ROWS_REMOVED_AT_ONCE:
            with self._file.write() as connection:
                removed = connection.execute(
                    "DELETE FROM task WHERE id IN (SELECT task.id FROM task JOIN transfer"
                    " ON transfer.id = task.transfer WHERE transfer.finished < ?"
                    " OR (transfer.status = 'done' AND transfer.finished < ?) LIMIT ?)",
                    (
                        now - TRANSFERS_KEPT_SECONDS,
                        now - TASKS_KEPT_SECONDS,
                        ROWS_REMOVED_AT_ONCE,
                    ),
                ).rowcount
        with self._file.write() as connection:
            connection.execute(
                "DELETE FROM transfer WHERE finished < ?", (now - TRANSFERS_KEPT_SECONDS,)
            )


def _final_status(tasks: Collection[TaskStatus], error: PropmasterError | None) -> TransferStatus:
    if error is None:
        # What was begun and not finished is queued again.
        begun = {TaskStatus.BOOTING, TaskStatus.EXECUTING}
        return aggregate([TaskStatus.QUEUED if task in begun else task for task in tasks])
    return TransferStatus.WAITING if error.code == "E_ABORTED" else TransferStatus.FAILED
