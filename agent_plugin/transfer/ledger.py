"""The transfer ledger: what is moving, what moved, what failed and why, in one SQLite file.

Who writes: the process that holds a transfer's lease writes what becomes of it; any process may
read, and may change what people may change (ledger_control.py, ledger_create.py), which the engine
reads at its next beat. A lease names its owner by process id and start time, so that the lease of a
killed engine is taken over at once. Task states are buffered (`note`) and written in batches
(`flush`): a kill loses at most the last batch, and the engine never trusts a row over the file it
speaks of. Losing the whole ledger therefore loses history, not data; a corrupt file is set aside
and a new one begun.

One connection, used under one lock (ledger_file.py): SQLite serialises writers anyway, and rows are
few. What is noted (ledger_notes.py) is under another, so that no crew thread waits for the disk.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from agent_plugin.content.errors import PropmasterError
from agent_plugin.content.store import Cancellation, SentPart
from agent_plugin.transfer.ledger_archive import ACTIVE_SECONDS, TRANSFERS_KEPT_SECONDS
from agent_plugin.transfer.ledger_begin import (
    LEASE_SECONDS,
    Beginning,
    lease_holder,
    lease_owner,
    renew_lease,
)
from agent_plugin.transfer.ledger_file import (
    BUSY_TIMEOUT_SECONDS,
    LedgerBusyError,
    from_sql,
    to_sql,
)
from agent_plugin.transfer.ledger_finish import end, go_on, let_go
from agent_plugin.transfer.ledger_news import News, read_news
from agent_plugin.transfer.ledger_notes import Notes
from agent_plugin.transfer.ledger_people import PeoplesLedger
from agent_plugin.transfer.ledger_rows import (
    TASK_COLUMNS,
    TRANSFER_COLUMNS,
    DeadUpload,
    TaskRow,
    TaskSpec,
    TransferRow,
    TransferSpec,
    from_json,
    task_row,
    transfer_row,
)
from agent_plugin.transfer.states import LIVE, TaskStatus, TransferStatus

__all__ = [
    "ACTIVE_SECONDS",
    "LEASE_SECONDS",
    "NOTES_AT_ONCE",
    "SAMPLE_WINDOW_SECONDS",
    "Ledger",
    "News",
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
# Of a thread that begins an upload in parts, which takes seconds anyway; a beat writes it then.
UPLOAD_PATIENCE_SECONDS: Final = 0.5
BEATS_MISSED_SECONDS: Final = 50.0
# In one transaction, so that others do not wait: 99,000 a second were measured.
NOTES_AT_ONCE: Final = 10_000


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


class Ledger(PeoplesLedger):
    """The ledger file, open. May be used from any thread; close() when done."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        super().__init__(path, clock)
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
        return cls(path, clock)

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

        The caller holds the lease afterwards and the transfer is running, or paused if it was.
        Tasks that are there already keep their state, but what a dead engine had begun, or what
        failed, is queued; what is not done and no longer asked for is excluded. What a person has
        excluded or held stays so, within a session also in a new transfer of the same spec.

        Raises:
            TransferStateError: A living process is running it right now.
            TransferAbortedError: A person aborted it meanwhile.
            CancelledError: Cancellation was wished; the next begin goes on with what is there.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        cancellation = cancellation or Cancellation()
        transfer_id = Beginning(self._file, spec, self._clock, cancellation).run(tasks)
        self._pulses[transfer_id] = _Pulse(self._clock())
        return self.transfer(transfer_id)

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

    def news(self, transfer_id: int, since: int | None = None) -> News:
        """Return the tasks of a transfer, or those that people have changed since.

        Args:
            transfer_id: The transfer.
            since: `News.last` of the news before; None: all tasks.
        """
        with self._file.read() as connection:
            return read_news(connection, transfer_id, since)

    def outranked(self, transfer_id: int) -> int | None:
        """Return a transfer of higher priority that runs on this host now, if there is one."""
        now = self._clock()
        with self._file.read() as connection:
            higher = connection.execute(
                "SELECT id, lease_owner, lease_until FROM transfer WHERE status = 'running'"
                " AND priority > (SELECT priority FROM transfer WHERE id = ?)"
                " ORDER BY priority DESC, id",
                (transfer_id,),
            ).fetchall()
        return next(
            (other for other, owner, until in higher if lease_holder(owner, until, now)), None
        )

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

    def note_moved(self, task_id: int, size: int) -> None:
        """Remember further bytes of a task that is under way. Never waits for the disk."""
        self._notes.moved(task_id, size)

    def note_upload(self, task_id: int, upload_id: str, parts: Sequence[SentPart]) -> None:
        """Remember how far an upload in parts is; no id: there is none.

        Never waits for the disk.
        """
        self._notes.upload(task_id, upload_id, parts)

    def write_upload(self, task_id: int, upload_id: str) -> None:
        """Write that an upload in parts has begun, unless the ledger is busy for long.

        Nothing else of what was noted: what is done counts when the index knows it as well.

        Raises:
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        with (
            suppress(LedgerBusyError),
            self._file.write(patience=UPLOAD_PATIENCE_SECONDS) as connection,
        ):
            connection.execute(
                "UPDATE task SET upload_id = ?, parts = '[]' WHERE id = ?", (upload_id, task_id)
            )

    def upload_of(self, task_id: int) -> tuple[str, list[SentPart]]:
        """Return the id and the parts of a task's upload that is not complete; no id: none."""
        with self._file.read() as connection:
            upload_id, parts = connection.execute(
                "SELECT upload_id, parts FROM task WHERE id = ?", (task_id,)
            ).fetchone()
        return upload_id, [SentPart(*part) for part in from_json(parts)]

    def left_uploads(self, destination: str) -> list[tuple[int, str, int, str]]:
        """Return what nobody will go on with: uploads to a store that a killed engine had begun.

        Those of a transfer that has failed so long ago that it would be archived, too.

        Returns:
            Of each the task's id, the blob's hash and size, and the upload's id.
        """
        with self._file.read() as connection:
            return connection.execute(
                "SELECT task.id, task.destination, task.size, task.upload_id FROM task"
                " JOIN transfer ON transfer.id = task.transfer WHERE task.upload_id != ''"
                " AND transfer.destination = ? AND (transfer.status IN ('done', 'aborted')"
                " OR task.status = 'excluded'"
                " OR (transfer.status = 'failed' AND transfer.finished < ?))",
                (to_sql(destination), self._clock() - TRANSFERS_KEPT_SECONDS),
            ).fetchall()

    def dead_uploads(self, kind: str, *, source: str, session: str) -> list[DeadUpload]:
        """Return the uploads of transfers of a kind that no living process carries out.

        Args:
            kind: Of the transfers.
            source: Of transfers from there,
            session: or of those of this session; empty for no such.
        """
        now = self._clock()
        self.flush()
        with self._file.read() as connection:
            rows = connection.execute(
                "SELECT task.id, transfer.destination, task.destination, task.metadata,"
                " task.upload_id, transfer.lease_owner, transfer.lease_until FROM task"
                " JOIN transfer ON transfer.id = task.transfer WHERE task.upload_id != ''"
                " AND transfer.kind = ?1 AND ((?2 != '' AND transfer.source = ?2)"
                " OR (?3 != '' AND transfer.session = ?3))",
                (kind, to_sql(source), session),
            ).fetchall()
        return [
            DeadUpload(task, from_sql(above), from_sql(destination), from_json(metadata), upload_id)
            for task, above, destination, metadata, upload_id, owner, until in rows
            if lease_holder(owner, until, now) is None
        ]

    def flush(self) -> None:
        """Write what was noted.

        Raises:
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        while self._notes:
            with self._notes.to_write(NOTES_AT_ONCE) as notes, self._file.write() as connection:
                notes.write(connection, self._clock())

    def beat(
        self, transfer_id: int, moved: int, found: int = 0, *, yielding: bool = False
    ) -> TransferStatus:
        """Renew the lease, record what is done since the last beat, and write what was noted.

        What a busy ledger does not take is written by a later beat.

        Args:
            transfer_id: A transfer that this process has begun.
            moved: Further bytes that were moved.
            found: Further bytes that turned out to be there; they count as done, and say nothing
                about speed. Negative if some of what was told is not done after all.
            yielding: Whether it gives way to a transfer of higher priority; it is waiting then.

        Returns:
            The transfer's state, which another process may have changed. One that is waiting while
            this process holds its lease was resumed: it is running again.

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
            with (
                self._notes.to_write(NOTES_AT_ONCE) as notes,
                self._file.write(patience=patience) as connection,
            ):
                renew_lease(connection, transfer_id, now)
                notes.write(connection, now)
                self._add(connection, transfer_id, pulse, now)
                go_on(connection, transfer_id, yielding=yielding)
        except LedgerBusyError:
            if overdue:
                raise
        else:
            self._pulses[transfer_id] = _Pulse(now)
        # Reading waits for nobody who writes.
        return self._status(transfer_id)

    def _status(self, transfer_id: int) -> TransferStatus:
        with self._file.read() as connection:
            (status,) = connection.execute(
                "SELECT status FROM transfer WHERE id = ?", (transfer_id,)
            ).fetchone()
        return TransferStatus(status)

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

    def hold(self, transfer_id: int) -> None:
        """Pause a transfer that this process has begun, since all that is left of it is held.

        Unless a person has said something else meanwhile.

        Raises:
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        with self._file.write() as connection:
            connection.execute(
                "UPDATE transfer SET status = 'paused' WHERE id = ? AND status = 'running'"
                " AND lease_owner = ?",
                (transfer_id, lease_owner()),
            )

    def unhold(self, transfer_id: int) -> None:
        """Let a transfer go on that `hold` has paused, at the next beat."""
        with self._file.write() as connection:
            connection.execute(
                "UPDATE transfer SET status = 'waiting' WHERE id = ? AND status = 'paused'"
                " AND lease_owner = ?",
                (transfer_id, lease_owner()),
            )

    def finish(self, transfer_id: int, error: PropmasterError | None = None) -> TransferRow:
        """Let go of a transfer in the state that follows from its tasks and the error, if any.

        A cancelled transfer goes back to waiting, so that the next begin() resumes it; if it was
        paused, it is aborted. One that another process has taken over, or that was ended meanwhile,
        stays as it is.
        """
        self.flush()
        now = self._clock()
        with self._file.write() as connection:
            current = _status_held(connection, transfer_id)
            if current is not None:
                let_go(connection, transfer_id, current, now)
                if current not in (TransferStatus.ABORTED, TransferStatus.DONE):
                    end(connection, transfer_id, current, error, now)
        self._pulses.pop(transfer_id, None)
        return self.transfer(transfer_id)

    def leave(self, transfer_id: int) -> None:
        """Let go of a transfer with which somebody goes on later; if it is paused it stays so.

        Raises:
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        self.flush()
        now = self._clock()
        with self._file.write() as connection:
            current = _status_held(connection, transfer_id)
            if current is not None:
                let_go(connection, transfer_id, current, now)
                connection.execute(
                    "UPDATE transfer SET status = 'waiting' WHERE id = ? AND status = 'running'",
                    (transfer_id,),
                )
        self._pulses.pop(transfer_id, None)

    def forget_session(self, session: str) -> None:
        """End the transfers of a session that is over, and put away what is old.

        What is still live becomes aborted.
        """
        now = self._clock()
        with self._file.write() as connection:
            connection.executemany(
                "UPDATE transfer SET status = 'aborted', lease_owner = '', finished = ?,"
                " modified = ? WHERE session = ? AND status = ?",
                [(now, now, session, status) for status in LIVE],
            )
        self.housekeep()


def _status_held(connection: sqlite3.Connection, transfer_id: int) -> TransferStatus | None:
    """Return the status of a transfer that this process has the lease of, or None."""
    row = connection.execute(
        "SELECT status FROM transfer WHERE id = ? AND lease_owner = ?",
        (transfer_id, lease_owner()),
    ).fetchone()
    return None if row is None else TransferStatus(row[0])
