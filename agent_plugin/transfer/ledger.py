"""The transfer ledger: what is moving, what moved, what failed and why, in one SQLite file.

Who writes: the process that holds a transfer's lease writes its rows; any process may read. A
lease names its owner by process id and start time, so that the lease of a killed engine is taken
over at once. Task states are buffered (`note`) and written in batches (`flush`): a kill loses at
most the last batch, and the engine never trusts a row over the file it speaks of. Losing the whole
ledger therefore loses history, not data; a corrupt file is set aside and a new one begun.

One connection, used under one lock (ledger_file.py): SQLite serialises writers anyway, and rows are
few. What is noted is under a lock of its own, so that no crew thread waits for the disk.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from agent_plugin.content import events
from agent_plugin.content.errors import PropmasterError, TransferStateError
from agent_plugin.transfer.ledger_file import LedgerFile, from_sql, to_sql
from agent_plugin.transfer.states import (
    TaskStatus,
    TransferStatus,
    aggregate,
    check_transfer_change,
)

log = events.get_logger()

# An engine renews its lease every few seconds; one that is silent for so long is taken for dead
# even if a process of its id and start time exists (it may be stopped).
LEASE_SECONDS: Final = 60.0
SAMPLE_WINDOW_SECONDS: Final = 60.0
# A task's row takes about 300 bytes, and a job may have a million of them.
TASKS_KEPT_SECONDS: Final = 86_400.0
TRANSFERS_KEPT_SECONDS: Final = 14 * 86_400.0


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What a transfer is to do, and for whom.

    Attributes:
        kind: `sync-in`, `sync-step`, `sync-out`, `submit` or `outputs`.
        source: A store URL or a directory.
        destination: A directory or a store URL.
        session: Key of the session's state file; empty outside sessions.
    """

    kind: str
    source: str
    destination: str
    session: str = ""
    job: str = ""
    step: str = ""
    task: str = ""

    @property
    def name(self) -> str:
        """A line for people."""
        return f"{self.kind} {self.source} -> {self.destination}"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One file of a transfer: where from, where to, how many bytes."""

    source: str
    destination: str
    size: int


@dataclass(frozen=True, slots=True)
class TransferRow:
    """A transfer as the ledger has it; sizes in bytes, times in seconds since the epoch."""

    id: int
    name: str
    kind: str
    status: TransferStatus
    source: str
    destination: str
    session: str
    size: int
    done: int
    error_code: str
    error: str
    created: float
    finished: float | None


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as the ledger has it."""

    id: int
    status: TaskStatus
    source: str
    destination: str
    size: int
    tries: int
    error_code: str
    error: str


_TRANSFER_COLUMNS = (
    "id, name, kind, status, source, destination, session, size, done,"
    " error_code, error, created, finished"
)
_TASK_COLUMNS = "id, status, source, destination, size, tries, error_code, error"


def lease_owner(pid: int | None = None) -> str | None:
    """Return `pid:start-time` of a process (this one by default), or None when it is gone.

    Source: proc(5), field 22 of /proc/PID/stat, clock ticks since boot; a reused id has another.
    """
    pid = os.getpid() if pid is None else pid
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return f"{pid}:{stat.rpartition(')')[2].split()[19]}"


class Ledger:
    """The ledger file, open. May be used from any thread; close() when done."""

    def __init__(self, file: LedgerFile, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._notes: dict[int, tuple[TaskStatus, str, str]] = {}

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

    def begin(self, spec: TransferSpec, tasks: Iterable[TaskSpec]) -> TransferRow:
        """Create a transfer with its tasks, or take one of the same spec up again that is not done.

        The caller holds the lease afterwards and the transfer is running. Tasks that are there
        already keep their state, but what a dead engine had begun, or what failed, is queued; what
        is not done and no longer asked for is excluded.

        Raises:
            TransferStateError: A living process is running it right now.
            LocalWriteError: The ledger can not be written.
        """
        with self._file.write() as connection:
            now = self._clock()
            found = connection.execute(
                "SELECT id, lease_owner, lease_until FROM transfer WHERE session = ? AND kind = ?"
                " AND source = ? AND destination = ? AND step = ? AND task = ?"
                " AND status NOT IN ('done', 'aborted') ORDER BY id DESC LIMIT 1",
                (spec.session, spec.kind, to_sql(spec.source), to_sql(spec.destination),
                 spec.step, spec.task),
            ).fetchone()  # fmt: skip
            if found is None:
                transfer_id = self._insert(connection, spec, now)
            else:
                transfer_id = found[0]
                tasks = list(tasks)
                self._take_over(connection, transfer_id, found[1], found[2], now)
                self._exclude_others(connection, transfer_id, tasks)
            connection.executemany(
                "INSERT INTO task (transfer, status, source, destination, size)"
                " VALUES (?, 'queued', ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    (transfer_id, to_sql(task.source), to_sql(task.destination), task.size)
                    for task in tasks
                ),
            )
            connection.execute(
                "UPDATE transfer SET status = ?, lease_owner = ?, lease_until = ?, modified = ?,"
                " finished = NULL, error_code = '', error = '',"
                " size = (SELECT coalesce(sum(size), 0) FROM task"
                "         WHERE transfer = transfer.id AND status <> 'excluded'),"
                " done = (SELECT coalesce(sum(size), 0) FROM task"
                "         WHERE transfer = transfer.id AND status = 'done')"
                " WHERE id = ?",
                (TransferStatus.RUNNING, lease_owner(), now + LEASE_SECONDS, now, transfer_id),
            )
        return self.transfer(transfer_id)

    @staticmethod
    def _insert(connection: sqlite3.Connection, spec: TransferSpec, now: float) -> int:
        cursor = connection.execute(
            "INSERT INTO transfer (name, kind, status, source, destination, session, job, step,"
            " task, created, modified) VALUES (?, ?, 'init', ?, ?, ?, ?, ?, ?, ?, ?)",
            (to_sql(spec.name), spec.kind, to_sql(spec.source), to_sql(spec.destination),
             spec.session, spec.job, spec.step, spec.task, now, now),
        )  # fmt: skip
        assert cursor.lastrowid is not None  # noqa: S101 - an INSERT that did not raise has one
        return cursor.lastrowid

    @staticmethod
    def _take_over(
        connection: sqlite3.Connection, transfer_id: int, owner: str, until: float, now: float
    ) -> None:
        if owner and owner != lease_owner() and until > now:
            pid = int(owner.partition(":")[0])
            if lease_owner(pid) == owner:
                raise TransferStateError(
                    f"process {pid} is running transfer {transfer_id} already",
                    hint="wait until it has finished, or end that process and try again",
                )
        connection.execute(
            "UPDATE task SET status = 'queued', tries = tries + 1"
            " WHERE transfer = ? AND status IN ('booting', 'executing', 'failed')",
            (transfer_id,),
        )
        log.info(events.TRANSFER_RESUMED, extra={"transfer": transfer_id})

    @staticmethod
    def _exclude_others(
        connection: sqlite3.Connection, transfer_id: int, tasks: Collection[TaskSpec]
    ) -> None:
        wanted = {(to_sql(task.source), to_sql(task.destination)) for task in tasks}
        rows = connection.execute(
            "SELECT id, source, destination FROM task WHERE transfer = ? AND status = 'queued'",
            (transfer_id,),
        ).fetchall()
        connection.executemany(
            "UPDATE task SET status = 'excluded' WHERE id = ?",
            [(row[0],) for row in rows if row[1:] not in wanted],
        )

    def transfer(self, transfer_id: int) -> TransferRow:
        """Return one transfer.

        Raises:
            TransferStateError: There is none of that id.
        """
        with self._file.read() as connection:
            row = connection.execute(
                f"SELECT {_TRANSFER_COLUMNS} FROM transfer WHERE id = ?",  # noqa: S608 - constant
                (transfer_id,),
            ).fetchone()
        if row is None:
            raise TransferStateError(f"there is no transfer {transfer_id}")
        return _transfer_row(row)

    def transfers(self, *, session: str | None = None) -> list[TransferRow]:
        """Return all transfers, or those of one session, oldest first."""
        where, arguments = ("WHERE session = ?", (session,)) if session is not None else ("", ())
        with self._file.read() as connection:
            rows = connection.execute(
                f"SELECT {_TRANSFER_COLUMNS} FROM transfer {where} ORDER BY id",  # noqa: S608
                arguments,
            ).fetchall()
        return [_transfer_row(row) for row in rows]

    def tasks(self, transfer_id: int) -> list[TaskRow]:
        """Return a transfer's tasks in the order in which they were planned."""
        self.flush()
        with self._file.read() as connection:
            rows = connection.execute(
                f"SELECT {_TASK_COLUMNS} FROM task WHERE transfer = ? ORDER BY id",  # noqa: S608
                (transfer_id,),
            ).fetchall()
        return [
            TaskRow(
                id=row[0],
                status=TaskStatus(row[1]),
                source=from_sql(row[2]),
                destination=from_sql(row[3]),
                size=row[4],
                tries=row[5],
                error_code=row[6],
                error=from_sql(row[7]),
            )
            for row in rows
        ]

    def task_ids(self, transfer_id: int) -> dict[tuple[str, str], int]:
        """Return the ids of a transfer's tasks by (source, destination)."""
        with self._file.read() as connection:
            rows = connection.execute(
                "SELECT source, destination, id FROM task WHERE transfer = ?", (transfer_id,)
            ).fetchall()
        return {(from_sql(source), from_sql(dest)): task_id for source, dest, task_id in rows}

    def note(self, task_id: int, status: TaskStatus, error: PropmasterError | None = None) -> None:
        """Remember a task's new state; written at the next flush, the last note wins."""
        code, text = (error.code, error.message) if error else ("", "")
        with self._lock:
            self._notes[task_id] = (status, code, text)

    def flush(self) -> None:
        """Write the noted states in one transaction.

        Raises:
            LocalWriteError: The ledger can not be written.
        """
        if not self._notes:
            return
        now = self._clock()
        with self._file.write() as connection:
            # Taken in here, so that of two threads none writes a task's older state last.
            with self._lock:
                notes, self._notes = self._notes, {}
            connection.executemany(
                "UPDATE task SET status = ?1, error_code = ?2, error = ?3,"
                " started = coalesce(started, ?4),"
                " finished = CASE WHEN ?1 IN ('done', 'failed') THEN ?4 END WHERE id = ?5",
                (
                    (status, code, to_sql(text), now, task_id)
                    for task_id, (status, code, text) in notes.items()
                ),
            )

    def beat(self, transfer_id: int, moved: int) -> TransferStatus:
        """Renew the lease, record the bytes moved since the last beat, and flush.

        Returns:
            The transfer's state, which another process may have changed.

        Raises:
            TransferStateError: The lease ran out, and another process has taken the transfer over.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        self.flush()
        with self._file.write() as connection:
            now = self._clock()
            ours = connection.execute(
                "UPDATE transfer SET lease_until = ?, done = done + ?, modified = ?"
                " WHERE id = ? AND lease_owner = ?",
                (now + LEASE_SECONDS, moved, now, transfer_id, lease_owner()),
            )
            if ours.rowcount == 0:
                raise TransferStateError(
                    f"transfer {transfer_id} was taken over while this process stood still",
                    hint="leave it to the process that has it now",
                )
            connection.execute(
                "INSERT INTO sample VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
                " bytes = bytes + excluded.bytes",
                (transfer_id, now, moved),
            )
            connection.execute(
                "DELETE FROM sample WHERE transfer = ? AND time < ?",
                (transfer_id, now - SAMPLE_WINDOW_SECONDS),
            )
        return self.transfer(transfer_id).status

    def finish(self, transfer_id: int, error: PropmasterError | None = None) -> TransferRow:
        """Let go of a transfer in the state that follows from its tasks and the error, if any.

        A cancelled transfer goes back to waiting, so that the next begin() resumes it. One that
        another process has taken over, or that was ended meanwhile, stays as it is.
        """
        self.flush()
        with self._file.write() as connection:
            now = self._clock()
            status = self._final_status(connection, transfer_id, error)
            check_transfer_change(TransferStatus.RUNNING, status)
            connection.execute(
                "UPDATE task SET status = 'queued' WHERE transfer = ?"
                " AND status IN ('booting', 'executing')",
                (transfer_id,),
            )
            connection.execute(
                "UPDATE transfer SET status = ?1, error_code = ?2, error = ?3, lease_owner = '',"
                " lease_until = 0, modified = ?4,"
                " finished = CASE WHEN ?1 IN ('done', 'failed', 'aborted') THEN ?4 END,"
                " size = (SELECT coalesce(sum(size), 0) FROM task"
                "         WHERE transfer = ?5 AND status <> 'excluded'),"
                " done = (SELECT coalesce(sum(size), 0) FROM task"
                "         WHERE transfer = ?5 AND status = 'done')"
                " WHERE id = ?5 AND lease_owner = ?6",
                (
                    status,
                    error.code if error else "",
                    to_sql(error.message) if error else "",
                    now,
                    transfer_id,
                    lease_owner(),
                ),
            )
        return self.transfer(transfer_id)

    @staticmethod
    def _final_status(
        connection: sqlite3.Connection, transfer_id: int, error: PropmasterError | None
    ) -> TransferStatus:
        if error is not None:
            if error.code == "E_ABORTED":
                return TransferStatus.WAITING
            return TransferStatus.FAILED
        rows = connection.execute(
            "SELECT DISTINCT status FROM task WHERE transfer = ?", (transfer_id,)
        ).fetchall()
        return aggregate([TaskStatus(status) for (status,) in rows])

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
        with self._file.write() as connection:
            now = self._clock()
            connection.execute(
                "UPDATE transfer SET status = 'aborted', lease_owner = '', finished = ?,"
                " modified = ? WHERE session = ?"
                " AND status NOT IN ('done', 'aborted', 'failed')",
                (now, now, session),
            )
            connection.execute(
                "DELETE FROM task WHERE transfer IN"
                " (SELECT id FROM transfer WHERE status = 'done' AND finished < ?)",
                (now - TASKS_KEPT_SECONDS,),
            )
            connection.execute(
                "DELETE FROM transfer WHERE finished < ?", (now - TRANSFERS_KEPT_SECONDS,)
            )


def _transfer_row(row: Sequence[Any]) -> TransferRow:
    return TransferRow(
        row[0], from_sql(row[1]), row[2], TransferStatus(row[3]), from_sql(row[4]),
        from_sql(row[5]), row[6], row[7], row[8], row[9], from_sql(row[10]), row[11], row[12],
    )  # fmt: skip
