"""The ledger as the copying engine works through it: whose turn it is, and what has become of it.

The engine holds the leases of all transfers that it works on, and takes their tasks in the order of
the transfers' priority, the tasks' priority, and age. People change the rows meanwhile; the engine
looks at each beat what they say, and what a person has said is never written over.

Every method is one transaction. One that another process keeps from writing for longer than a
moment does nothing, and the engine goes on with what it has; what can be read is read nevertheless.
"""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from agent_plugin.transfer.copy_notes import PATIENCE_SECONDS, CopyNotes
from agent_plugin.transfer.copy_order import WAITING, Candidate
from agent_plugin.transfer.ledger import BEATS_MISSED_SECONDS, SAMPLE_WINDOW_SECONDS
from agent_plugin.transfer.ledger_begin import LEASE_SECONDS, lease_holder, lease_owner
from agent_plugin.transfer.ledger_file import (
    BUSY_TIMEOUT_SECONDS,
    LedgerBusyError,
    LedgerFile,
    from_sql,
)
from agent_plugin.transfer.ledger_rows import COPY
from agent_plugin.transfer.states import (
    DEFAULT_PRIORITY,
    FINISHED,
    TaskStatus,
    TransferStatus,
    aggregate,
)

# No wait is as long: one that ends later was written before the clock was set back.
LONGEST_WAIT_SECONDS: Final = 60.0
# Tasks are summed up, 50 ms for 100,000, in no more than a twentieth of the time: the engine waits.
COUNT_SHARE: Final = 20

_T = TransferStatus
_K = TaskStatus


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A task that is to be carried out.

    Attributes:
        id, transfer: In the ledger.
        source, destination: As URLs or paths.
        size: Bytes, as far as it is known.
        upload_id: Of an upload to go on with; empty for none.
        kept: What an earlier attempt has left of it; see copy_task.py.
        priority: Its own.
        tries: Attempts that were begun before.
        created: When it was, seconds since the epoch; with the number it tells it from the tasks of
            other ledgers.
    """

    id: int
    transfer: int
    source: str
    destination: str
    size: int
    upload_id: str
    kept: Mapping[str, Any]
    priority: int = DEFAULT_PRIORITY
    tries: int = 0
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What the row of a transfer or task says."""

    status: str
    priority: int


class CopyQueue:
    """The copying transfers of a ledger; for one thread, but for `notes`.

    Args:
        file: The ledger.
        clock: Seconds since the epoch.
        only: The transfers that are meant; None for all.

    Attributes:
        notes: Writes what becomes of tasks; from any thread.
        behind: Whether something could not be read or written the last time, since another process
            had the ledger.
    """

    def __init__(
        self, file: LedgerFile, clock: Callable[[], float], only: Collection[int] | None = None
    ) -> None:
        self._file = file
        self._clock = clock
        self._only = only
        self.notes = CopyNotes(file, clock)
        self.behind = False
        # Bytes by transfer, and when the leases were renewed.
        self._moved: Counter[int] = Counter()
        self._renewed = clock()
        # When the sums may be made again, seconds, monotonic.
        self._next_count = float("-inf")
        self._uncounted: set[int] = set()

    @contextmanager
    def _write(self, patience: float = PATIENCE_SECONDS) -> Iterator[sqlite3.Connection | None]:
        """Lend the ledger in a transaction; None: not now, and `patience` was a moment."""
        lent = False
        try:
            with self._file.write(patience=patience) as connection:
                lent = True
                yield connection
        except LedgerBusyError:
            if lent or patience > PATIENCE_SECONDS:
                raise
            self.behind = True
            yield None

    def take(self, yielding: Collection[int] = ()) -> list[int]:
        """Take the leases of all that waits, and of what dead engines had; return their numbers.

        Args:
            yielding: Transfers of ours that wait because they give way.
        """
        now = self._clock()
        taken: list[int] = []
        with self._write() as connection:
            if connection is None:
                return taken
            rows = connection.execute(
                "SELECT id, lease_owner, lease_until FROM transfer"
                " WHERE kind = ? AND (status = 'waiting' OR"
                " (status = 'running' AND lease_owner != ?))",
                (COPY, lease_owner()),
            ).fetchall()
            for transfer_id, owner, until in rows:
                holder = lease_holder(owner, until, now)
                ours = owner == lease_owner()
                if (
                    (self._only is not None and transfer_id not in self._only)
                    or (holder is not None and not ours)
                    or (ours and transfer_id in yielding)
                ):
                    continue
                connection.execute(
                    "UPDATE transfer SET status = 'running', lease_owner = ?, lease_until = ?,"
                    " modified = ?, finished = NULL, error_code = '', error = '' WHERE id = ?",
                    (lease_owner(), now + LEASE_SECONDS, now, transfer_id),
                )
                if not ours:
                    connection.execute(
                        "UPDATE task SET status = 'queued', not_before = 0"
                        " WHERE transfer = ? AND status IN ('booting', 'executing')",
                        (transfer_id,),
                    )
                # From now on it moves, so that the first part to arrive tells how fast.
                connection.execute(
                    "INSERT INTO sample VALUES (?, ?, 0) ON CONFLICT DO NOTHING",
                    (transfer_id, now),
                )
                taken.append(transfer_id)
        return taken

    def settings(self, transfer_id: int) -> Mapping[str, Any]:
        """Return what a transfer is told."""
        with self._file.read() as connection:
            (text,) = connection.execute(
                "SELECT settings FROM transfer WHERE id = ?", (transfer_id,)
            ).fetchone()
        document: Mapping[str, Any] = json.loads(text)
        return document

    def claim(
        self, most: int, executing: Collection[int], yielding: Collection[int] = ()
    ) -> list[CopyTask]:
        """Return the tasks whose turn it is; they are executing from now on.

        Args:
            most: How many at most.
            executing: Tasks of which an attempt is under way; a person may have queued them again.
            yielding: Transfers that give way.
        """
        claimed: list[CopyTask] = []
        if most <= 0:
            return claimed
        now = self._clock()
        with self._write() as connection:
            if connection is None:
                return claimed
            columns = "id, transfer, source, destination, size, upload_id, parts, priority, tries"
            columns += ", created"
            rows = self._queued(connection, columns, most, executing, yielding, now)
            claimed = [_task_of(row) for row in rows]
            connection.executemany(
                "UPDATE task SET status = 'executing', tries = tries + 1, not_before = 0,"
                " started = coalesce(started, ?), finished = NULL, error_code = '', error = ''"
                " WHERE id = ?",
                [(now, task.id) for task in claimed],
            )
        return claimed

    def waiting(self, most: int, executing: Collection[int]) -> list[Candidate]:
        """Return the tasks that `claim` would return if none of our transfers gave way."""
        with self._file.read() as connection:
            priorities = dict(
                connection.execute(
                    "SELECT id, priority FROM transfer WHERE kind = ? AND lease_owner = ?",
                    (COPY, lease_owner()),
                ).fetchall()
            )
            rows = self._queued(
                connection, "id, transfer, priority", most, executing, (), self._clock()
            )
        return [Candidate(row[0], priorities[row[1]], row[2], WAITING) for row in rows]

    @staticmethod
    def _queued(
        connection: sqlite3.Connection,
        columns: str,
        most: int,
        executing: Collection[int],
        yielding: Collection[int],
        now: float,
    ) -> list[tuple[Any, ...]]:
        """Return columns of the tasks that may begin, those first whose turn it is."""
        transfers = connection.execute(
            "SELECT id FROM transfer WHERE kind = ? AND status IN ('running', 'waiting')"
            " AND lease_owner = ? ORDER BY priority DESC, id",
            (COPY, lease_owner()),
        ).fetchall()
        marks = ", ".join("?" * len(executing))
        found: list[tuple[Any, ...]] = []
        for (transfer_id,) in transfers:
            if len(found) < most and transfer_id not in yielding:
                found += connection.execute(
                    f"SELECT {columns} FROM task WHERE transfer = ? AND status = 'queued'"  # noqa: S608 - question marks, and columns of ours
                    " AND (not_before <= ? OR not_before > ?)"
                    f" AND id NOT IN ({marks}) ORDER BY priority DESC, id LIMIT ?",
                    (
                        *(transfer_id, now, now + LONGEST_WAIT_SECONDS),
                        *(*executing, most - len(found)),
                    ),
                ).fetchall()
        return found

    def elsewhere(self) -> int:
        """Return the highest priority of what other processes of this host move; -1 for none."""
        now = self._clock()
        with self._file.read() as connection:
            rows = connection.execute(
                "SELECT priority, lease_owner, lease_until FROM transfer WHERE status = 'running'"
                " AND lease_owner NOT IN ('', ?) ORDER BY priority DESC",
                (lease_owner(),),
            ).fetchall()
        return next((row[0] for row in rows if lease_holder(row[1], row[2], now)), -1)

    def give_way(self, yielding: Collection[int], before: Collection[int]) -> None:
        """Say which transfers of ours wait because they give way, and which run again.

        Args:
            yielding: Those that give way now.
            before: Those that did.
        """
        with self._write() as connection:
            if connection is None:
                return
            for wanted, current, transfers in (
                (_T.WAITING, _T.RUNNING, yielding),
                (_T.RUNNING, _T.WAITING, set(before) - set(yielding)),
            ):
                connection.executemany(
                    "UPDATE transfer SET status = ?, modified = ? WHERE id = ? AND status = ?"
                    " AND lease_owner = ?",
                    [
                        (wanted, self._clock(), transfer, current, lease_owner())
                        for transfer in transfers
                    ],
                )

    def next_due(self) -> float | None:
        """Return when the next task that waits for another try may be claimed; None for never."""
        with self._file.read() as connection:
            (due,) = connection.execute(
                "SELECT min(task.not_before) FROM task JOIN transfer ON transfer.id ="
                " task.transfer WHERE transfer.kind = ? AND transfer.status = 'running'"
                " AND transfer.lease_owner = ? AND task.status = 'queued'",
                (COPY, lease_owner()),
            ).fetchone()
        return None if due is None else float(due)

    def forget(self, task: CopyTask) -> None:
        """Write down that nothing is left of a task that nobody goes on with."""
        with self._write() as connection:
            if connection is None:
                return
            forgotten = connection.execute(
                "UPDATE task SET upload_id = '', parts = '[]', done = 0 WHERE id = ?"
                " AND status NOT IN ('booting', 'executing')",
                (task.id,),
            )
            if forgotten.rowcount:
                self._count(connection, task.transfer)

    def beat(
        self,
        moved: Mapping[int, int],
        executing: Collection[int],
        patience: float = PATIENCE_SECONDS,
    ) -> tuple[dict[int, Standing], dict[int, Standing]]:
        """Renew the leases, and return what the rows say of our transfers and of these tasks.

        Args:
            moved: Bytes by transfer since the beat before.
            executing: Tasks.
            patience: Seconds to wait for another process that writes.

        Raises:
            LedgerBusyError: It took longer, and the leases are about to run out.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        now = self._clock()
        self._moved.update(moved)
        self.behind = False
        if now - self._renewed > BEATS_MISSED_SECONDS:
            patience = BUSY_TIMEOUT_SECONDS
        self.notes.write(patience if patience > PATIENCE_SECONDS else 0.0)
        marks = ", ".join("?" * len(executing))
        with self._write(patience) as connection:
            if connection is not None:
                self._renew(connection, now)
                taken_out = connection.execute(
                    f"SELECT DISTINCT transfer FROM task WHERE id IN ({marks})"  # noqa: S608 - question marks
                    " AND status NOT IN ('booting', 'executing')",
                    tuple(executing),
                ).fetchall()
                self._count_some(connection, {*self._moved, *(row[0] for row in taken_out)})
        if connection is not None:
            self._renewed = now
            self._moved.clear()
        with self._file.read() as connection:
            transfers = connection.execute(
                "SELECT id, status, priority FROM transfer WHERE kind = ? AND lease_owner = ?",
                (COPY, lease_owner()),
            ).fetchall()
            tasks = connection.execute(
                f"SELECT id, status, priority FROM task WHERE id IN ({marks})",  # noqa: S608 - question marks
                tuple(executing),
            ).fetchall()
        self.behind = self.behind or self.notes.pending
        return (
            {transfer_id: Standing(*rest) for transfer_id, *rest in transfers},
            {task_id: Standing(*rest) for task_id, *rest in tasks},
        )

    def _renew(self, connection: sqlite3.Connection, now: float) -> None:
        connection.execute(
            "UPDATE transfer SET lease_until = ?, modified = ? WHERE kind = ? AND lease_owner = ?",
            (now + LEASE_SECONDS, now, COPY, lease_owner()),
        )
        for transfer_id, count in self._moved.items():
            connection.execute(
                "INSERT INTO sample VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
                " bytes = bytes + excluded.bytes",
                (transfer_id, now, count),
            )
            connection.execute(
                "DELETE FROM sample WHERE transfer = ? AND time < ?",
                (transfer_id, now - SAMPLE_WINDOW_SECONDS),
            )

    def let_go(
        self, busy: Collection[int], *, stopping: bool, patience: float = PATIENCE_SECONDS
    ) -> dict[int, TransferStatus]:
        """Let go of the transfers in which nothing is left to be done; return their states.

        Args:
            busy: Transfers of which tasks are in hand.
            stopping: Whether all others are let go of as well; they wait for the next engine.
            patience: Seconds to wait for another process that writes.

        Raises:
            LedgerBusyError: It took longer than a moment, and that was allowed.
        """
        ended: dict[int, TransferStatus] = {}
        now = self._clock()
        with self._write(patience) as connection:
            if connection is None:
                return ended
            rows = connection.execute(
                "SELECT id, status FROM transfer WHERE kind = ? AND lease_owner = ?",
                (COPY, lease_owner()),
            ).fetchall()
            for transfer_id, status in rows:
                if transfer_id in busy:
                    continue
                after = TransferStatus(status)
                if after is _T.RUNNING:
                    after = self._state_of_tasks(connection, transfer_id)
                    if after in (_T.WAITING, _T.RUNNING) and not stopping:
                        continue
                    after = _T.WAITING if after is _T.RUNNING else after
                elif after is _T.WAITING and not stopping:
                    continue
                self._end(connection, transfer_id, after, now)
                ended[transfer_id] = after
        return ended

    def leftovers(self) -> list[CopyTask]:
        """Return tasks that nobody will go on with, of which something is left.

        Not those of transfers that another engine has, which sees to them itself.
        """
        now = self._clock()
        with self._file.read() as connection:
            rows = connection.execute(
                "SELECT task.id, transfer, task.source, task.destination, task.size, upload_id,"
                " parts, task.priority, task.tries, task.created, lease_owner, lease_until"
                " FROM task JOIN transfer ON transfer.id = task.transfer WHERE kind = ?"
                " AND parts != '[]' AND (transfer.status IN ('aborted', 'done')"
                " OR task.status IN ('excluded', 'done', 'failed'))"
                " AND task.status NOT IN ('booting', 'executing')",
                (COPY,),
            ).fetchall()
        return [
            _task_of(row)
            for row in rows
            if (self._only is None or row[1] in self._only)
            and (row[10] == lease_owner() or lease_holder(row[10], row[11], now) is None)
        ]

    @staticmethod
    def _state_of_tasks(connection: sqlite3.Connection, transfer_id: int) -> TransferStatus:
        # One look into an index each; DISTINCT would look at all tasks.
        return aggregate(
            [
                status
                for status in TaskStatus
                if connection.execute(
                    "SELECT 1 FROM task WHERE transfer = ? AND status = ? LIMIT 1",
                    (transfer_id, status),
                ).fetchone()
            ]
        )

    def _end(
        self, connection: sqlite3.Connection, transfer_id: int, status: TransferStatus, now: float
    ) -> None:
        error_code, error = "", ""
        if status is _T.FAILED:
            error_code, error = connection.execute(
                "SELECT error_code, error FROM task WHERE transfer = ? AND status = 'failed'"
                " ORDER BY id LIMIT 1",
                (transfer_id,),
            ).fetchone()
        connection.execute(
            "UPDATE transfer SET status = ?, finished = ?, lease_owner = '', lease_until = 0,"
            " modified = ?, error_code = ?, error = ? WHERE id = ?",
            (status, now if status in FINISHED else None, now, error_code, error, transfer_id),
        )
        connection.execute(
            "UPDATE task SET status = CASE ? WHEN 'done' THEN 'excluded' ELSE 'queued' END"
            " WHERE transfer = ? AND status IN ('booting', 'executing')",
            (status, transfer_id),
        )
        self._count(connection, transfer_id)

    def _count_some(self, connection: sqlite3.Connection, changed: Iterable[int]) -> None:
        """Sum transfers up in which something has moved, unless that takes too much of the time."""
        self._uncounted.update(changed)
        begun = time.monotonic()
        if begun < self._next_count:
            return
        for transfer_id in self._uncounted:
            self._count(connection, transfer_id)
        self._uncounted.clear()
        ended = time.monotonic()
        self._next_count = ended + COUNT_SHARE * (ended - begun)

    @staticmethod
    def _count(connection: sqlite3.Connection, transfer_id: int) -> None:
        connection.execute(
            "UPDATE transfer SET (size, done) = (SELECT coalesce(sum(size), 0), coalesce(sum("
            " CASE status WHEN 'done' THEN size ELSE min(done, size) END), 0) FROM task"
            " WHERE transfer = ?1 AND status != 'excluded') WHERE id = ?1",
            (transfer_id,),
        )


def _task_of(row: Sequence[Any]) -> CopyTask:
    source, destination = from_sql(row[2]), from_sql(row[3])
    return CopyTask(
        *(row[0], row[1], source, destination, row[4], row[5], _kept(row[6])),
        *(row[7], row[8], row[9]),
    )


def _kept(text: str) -> Mapping[str, Any]:
    kept = json.loads(text)
    return kept if isinstance(kept, dict) else {}
