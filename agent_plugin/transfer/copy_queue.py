"""The ledger as the copying engine works through it: whose turn it is, and what has become of it.

The engine holds the leases of all transfers that it works on, and takes their tasks in the order of
the transfers' priority, the tasks' priority, and age. People change the rows meanwhile; the engine
looks at each beat what they say, and what a person has said is never written over.

Every method is one transaction. From any thread.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent_plugin.content.errors import PropmasterError
from agent_plugin.transfer.ledger import SAMPLE_WINDOW_SECONDS
from agent_plugin.transfer.ledger_begin import LEASE_SECONDS, lease_holder, lease_owner
from agent_plugin.transfer.ledger_file import LedgerFile, from_sql, to_sql
from agent_plugin.transfer.states import FINISHED, TaskStatus, TransferStatus, aggregate

KIND: Final = "copy"

# Tasks are summed up, 50 ms for 100,000, in no more than a twentieth of the time: the engine waits.
COUNT_SHARE: Final = 20

_T = TransferStatus
_K = TaskStatus
# Of a task whose transfer another engine may have taken over, while this process stood still.
_OURS: Final = "(SELECT lease_owner FROM transfer WHERE id = task.transfer) = ?"


@dataclass(frozen=True, slots=True)
class CopyTask:
    """A task that is to be carried out.

    Attributes:
        id, transfer: In the ledger.
        source, destination: As URLs or paths.
        size: Bytes, as far as it is known.
        upload_id: Of an upload to go on with; empty for none.
        kept: What an earlier attempt has left of it; see copy_task.py.
    """

    id: int
    transfer: int
    source: str
    destination: str
    size: int
    upload_id: str
    kept: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of a task that was executing.

    Attributes:
        task_id: In the ledger.
        status: Done, failed, excluded, or queued again.
        error: Why.
        not_before: When it may be claimed again.
    """

    task_id: int
    status: TaskStatus
    error: PropmasterError | None = None
    not_before: float = 0.0


class CopyQueue:
    """The copying transfers of a ledger.

    Args:
        file: The ledger.
        clock: Seconds since the epoch.
        only: The transfers that are meant; None for all.
    """

    def __init__(
        self, file: LedgerFile, clock: Callable[[], float], only: Collection[int] | None = None
    ) -> None:
        self._file = file
        self._clock = clock
        self._only = only
        # When the sums may be made again, seconds, monotonic.
        self._next_count = float("-inf")
        self._uncounted: set[int] = set()

    def take(self) -> list[int]:
        """Take the leases of all that waits, and of what dead engines had; return their numbers."""
        now = self._clock()
        taken = []
        with self._file.write() as connection:
            rows = connection.execute(
                "SELECT id, lease_owner, lease_until FROM transfer"
                " WHERE kind = ? AND (status = 'waiting' OR"
                " (status = 'running' AND lease_owner != ?))",
                (KIND, lease_owner()),
            ).fetchall()
            for transfer_id, owner, until in rows:
                holder = lease_holder(owner, until, now)
                if (self._only is not None and transfer_id not in self._only) or (
                    holder is not None and owner != lease_owner()
                ):
                    continue
                connection.execute(
                    "UPDATE transfer SET status = 'running', lease_owner = ?, lease_until = ?,"
                    " modified = ?, finished = NULL, error_code = '', error = '' WHERE id = ?",
                    (lease_owner(), now + LEASE_SECONDS, now, transfer_id),
                )
                if owner != lease_owner():
                    connection.execute(
                        "UPDATE task SET status = 'queued', not_before = 0"
                        " WHERE transfer = ? AND status IN ('booting', 'executing')",
                        (transfer_id,),
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

    def claim(self, most: int, executing: Collection[int]) -> list[CopyTask]:
        """Return the tasks whose turn it is; they are executing from now on.

        Args:
            most: How many at most.
            executing: Tasks of which an attempt is under way; a person may have queued them again.
        """
        now = self._clock()
        claimed: list[CopyTask] = []
        marks = ", ".join("?" * len(executing))
        with self._file.write() as connection:
            transfers = connection.execute(
                "SELECT id FROM transfer WHERE kind = ? AND status = 'running' AND lease_owner = ?"
                " ORDER BY priority DESC, id",
                (KIND, lease_owner()),
            ).fetchall()
            for (transfer_id,) in transfers:
                if len(claimed) == most:
                    break
                rows = connection.execute(
                    "SELECT id, transfer, source, destination, size, upload_id, parts FROM task"  # noqa: S608 - question marks
                    " WHERE transfer = ? AND status = 'queued' AND not_before <= ?"
                    f" AND id NOT IN ({marks}) ORDER BY priority DESC, id LIMIT ?",
                    (transfer_id, now, *executing, most - len(claimed)),
                )
                claimed += [
                    CopyTask(
                        row[0], row[1], from_sql(row[2]), from_sql(row[3]), row[4], row[5],
                        _kept(row[6]),
                    )
                    for row in rows
                ]  # fmt: skip
            connection.executemany(
                "UPDATE task SET status = 'executing', tries = tries + 1, not_before = 0,"
                " started = coalesce(started, ?), finished = NULL, error_code = '', error = ''"
                " WHERE id = ?",
                [(now, task.id) for task in claimed],
            )
        return claimed

    def next_due(self) -> float | None:
        """Return when the next task that waits for another try may be claimed; None for never."""
        with self._file.read() as connection:
            (due,) = connection.execute(
                "SELECT min(task.not_before) FROM task JOIN transfer ON transfer.id ="
                " task.transfer WHERE transfer.kind = ? AND transfer.status = 'running'"
                " AND transfer.lease_owner = ? AND task.status = 'queued'",
                (KIND, lease_owner()),
            ).fetchone()
        return None if due is None else float(due)

    def keep(self, task_id: int, upload_id: str, kept: Mapping[str, Any], done: int) -> None:
        """Write down what there is of a task, so that another attempt can go on from there."""
        with self._file.write() as connection:
            connection.execute(
                "UPDATE task SET upload_id = ?, parts = ?, done = min(size, ?)"  # noqa: S608 - constant
                f" WHERE id = ? AND {_OURS}",
                (upload_id, json.dumps(kept) if kept else "[]", done, task_id, lease_owner()),
            )

    def forget(self, task_id: int) -> None:
        """Write down that nothing is left of a task that nobody goes on with."""
        with self._file.write() as connection:
            connection.execute(
                "UPDATE task SET upload_id = '', parts = '[]', done = 0 WHERE id = ?"
                " AND status NOT IN ('booting', 'executing')",
                (task_id,),
            )

    def measured(self, task_id: int, size: int) -> None:
        """Write down how large the source turned out to be."""
        with self._file.write() as connection:
            connection.execute(
                f"UPDATE task SET size = ? WHERE id = ? AND {_OURS}",  # noqa: S608 - constant
                (size, task_id, lease_owner()),
            )

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Write what has become of tasks, unless a person has said something else meanwhile.

        Nothing is written either of a task whose transfer is another engine's by now.
        """
        if not outcomes:
            return
        now = self._clock()
        with self._file.write() as connection:
            connection.executemany(
                "UPDATE task SET status = ?1, error_code = ?2, error = ?3, not_before = ?4,"  # noqa: S608 - constant
                " finished = CASE WHEN ?1 IN ('done', 'failed') THEN ?5 END,"
                " done = CASE ?1 WHEN 'done' THEN size ELSE done END,"
                " upload_id = CASE ?1 WHEN 'done' THEN '' ELSE upload_id END,"
                " parts = CASE ?1 WHEN 'done' THEN '[]' ELSE parts END"
                f" WHERE id = ?6 AND status IN ('booting', 'executing') AND {_OURS}7",
                [
                    (
                        outcome.status,
                        outcome.error.code if outcome.error else "",
                        to_sql(outcome.error.message) if outcome.error else "",
                        outcome.not_before,
                        now,
                        outcome.task_id,
                        lease_owner(),
                    )
                    for outcome in outcomes
                ],
            )

    def beat(
        self, moved: Mapping[int, int], executing: Collection[int]
    ) -> tuple[dict[int, TransferStatus], dict[int, TaskStatus]]:
        """Renew the leases, and return what the rows say of our transfers and of these tasks.

        Args:
            moved: Bytes by transfer since the beat before.
            executing: Tasks.
        """
        now = self._clock()
        with self._file.write() as connection:
            connection.execute(
                "UPDATE transfer SET lease_until = ?, modified = ? WHERE kind = ?"
                " AND lease_owner = ?",
                (now + LEASE_SECONDS, now, KIND, lease_owner()),
            )
            for transfer_id, count in moved.items():
                connection.execute(
                    "INSERT INTO sample VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
                    " bytes = bytes + excluded.bytes",
                    (transfer_id, now, count),
                )
                connection.execute(
                    "DELETE FROM sample WHERE transfer = ? AND time < ?",
                    (transfer_id, now - SAMPLE_WINDOW_SECONDS),
                )
            self._count_some(connection, moved)
            transfers = connection.execute(
                "SELECT id, status FROM transfer WHERE kind = ? AND lease_owner = ?",
                (KIND, lease_owner()),
            ).fetchall()
            marks = ", ".join("?" * len(executing))
            tasks = connection.execute(
                f"SELECT id, status FROM task WHERE id IN ({marks})",  # noqa: S608 - question marks
                tuple(executing),
            ).fetchall()
        return (
            {transfer_id: TransferStatus(status) for transfer_id, status in transfers},
            {task_id: TaskStatus(status) for task_id, status in tasks},
        )

    def let_go(self, busy: Collection[int], *, stopping: bool) -> dict[int, TransferStatus]:
        """Let go of the transfers in which nothing is left to be done; return their states.

        Args:
            busy: Transfers of which tasks are in hand.
            stopping: Whether all others are let go of as well; they wait for the next engine.
        """
        ended: dict[int, TransferStatus] = {}
        now = self._clock()
        with self._file.write() as connection:
            rows = connection.execute(
                "SELECT id, status FROM transfer WHERE kind = ? AND lease_owner = ?",
                (KIND, lease_owner()),
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
        """Return tasks that nobody will go on with, of which something is left."""
        with self._file.read() as connection:
            rows = connection.execute(
                "SELECT task.id, transfer, task.source, task.destination, task.size, upload_id,"
                " parts FROM task JOIN transfer ON transfer.id = task.transfer WHERE kind = ?"
                " AND parts != '[]' AND (transfer.status IN ('aborted', 'done')"
                " OR task.status IN ('excluded', 'done', 'failed'))"
                " AND task.status NOT IN ('booting', 'executing')",
                (KIND,),
            ).fetchall()
        return [
            CopyTask(
                row[0], row[1], from_sql(row[2]), from_sql(row[3]), row[4], row[5], _kept(row[6])
            )
            for row in rows
            if self._only is None or row[1] in self._only
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

    def _count_some(self, connection: sqlite3.Connection, moved: Iterable[int]) -> None:
        """Sum transfers up in which something has moved, unless that takes too much of the time."""
        self._uncounted.update(moved)
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


def _kept(text: str) -> Mapping[str, Any]:
    kept = json.loads(text)
    return kept if isinstance(kept, dict) else {}
