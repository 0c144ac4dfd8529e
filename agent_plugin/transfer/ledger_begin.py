"""How a transfer begins: it is made, or claimed, then expanded into tasks piece by piece.

A transfer may have a million tasks. Each piece is a transaction of its own, so that other processes
get their turn in between. Until all tasks are there the transfer is `init`, or `waiting` when it is
taken up again, and its lease keeps others off; whoever stops or dies meanwhile has begun nothing
that the next one does not take up. What a person has paused stays paused, what a person has
excluded or held stays so, also in the next transfer of the same session that is to do the same.
"""

import os
import sqlite3
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final

from agent_plugin.content import events
from agent_plugin.content.errors import TransferAbortedError, TransferStateError
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.ledger_file import LedgerFile, to_sql
from agent_plugin.transfer.ledger_news import STATE_SET_BY
from agent_plugin.transfer.ledger_rows import TaskSpec, TransferSpec, to_json
from agent_plugin.transfer.states import TaskStatus, TransferStatus

# An engine renews its lease every few seconds; one that is silent for so long is taken for dead
# even if a process of its id and start time exists (it may be stopped).
LEASE_SECONDS: Final = 60.0
# 70 ms: no other process waits for long, and no signal.
TASKS_PER_PIECE: Final = 10_000

log = events.get_logger()


def lease_owner(pid: int | None = None) -> str | None:
    """Return `pid:start-time` of a process (this one by default), or None when it is gone.

    Source: proc(5), field 22 of /proc/PID/stat, clock ticks since boot; a reused id has another.
    """
    return _own_lease(os.getpid()) if pid is None else _lease_of(pid)


# Asked for with every task that a transfer settles; a child that was forked is told from its parent
# by the id.
@lru_cache(maxsize=1)
def _own_lease(pid: int) -> str | None:
    return _lease_of(pid)


def _lease_of(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    # A zombie is gone; in a container nobody may ever reap it.
    return None if fields[0] in "ZX" else f"{pid}:{fields[19]}"


def lease_holder(owner: str, until: float, now: float) -> int | None:
    """Return the id of the living process that holds a lease, or None when nobody does."""
    if not owner or until <= now:
        return None
    pid = int(owner.partition(":")[0])
    return pid if lease_owner(pid) == owner else None


def renew_lease(connection: sqlite3.Connection, transfer_id: int, now: float) -> None:
    """Say, in the caller's transaction, that this process still runs the transfer.

    Raises:
        TransferStateError: The lease ran out, and another process has taken the transfer over.
    """
    ours = connection.execute(
        "UPDATE transfer SET lease_until = ?, modified = ? WHERE id = ? AND lease_owner = ?",
        (now + LEASE_SECONDS, now, transfer_id, lease_owner()),
    )
    if ours.rowcount == 0:
        raise TransferStateError(
            f"transfer {transfer_id} was taken over while this process stood still",
            hint="leave it to the process that has it now",
        )


def sizes(connection: sqlite3.Connection, transfer_id: int) -> dict[TaskStatus, int]:
    """Return how many bytes a transfer's tasks have in each state that one of them has."""
    rows = connection.execute(
        "SELECT status, sum(size) FROM task WHERE transfer = ? GROUP BY status", (transfer_id,)
    )
    return {TaskStatus(status): size for status, size in rows}


class Beginning:
    """The beginning of one transfer.

    Args:
        file: The ledger.
        spec: The transfer.
        clock: Seconds since the epoch.
        cancellation: Checked before each piece.
    """

    def __init__(
        self,
        file: LedgerFile,
        spec: TransferSpec,
        clock: Callable[[], float],
        cancellation: Cancellation,
    ) -> None:
        self._file = file
        self._spec = spec
        self._clock = clock
        self._cancellation = cancellation
        self._id = 0

    def run(self, tasks: Iterable[TaskSpec]) -> int:
        """Make the transfer run, with these tasks; return its number.

        Raises:
            TransferStateError: A living process is running it right now.
            TransferAbortedError: A person aborted it meanwhile.
            CancelledError: Cancellation was wished.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        self._cancellation.check()
        before = self._claim()
        known: dict[tuple[object, object], int] = {}
        if before is None:
            tasks = list(tasks)
            self._queue_again()
            known = self._pairs()
            self._settle_known(known, tasks)
        self._write_all(INSERT_TASK, self._new_rows(tasks, known))
        if before:
            self._carry_over(before)
        with self._file.write() as connection:
            renew_lease(connection, self._id, self._clock())
            _refuse_aborted(connection, self._id)
            size = sizes(connection, self._id)
            size.pop(TaskStatus.EXCLUDED, 0)
            connection.execute(
                "UPDATE transfer SET status = CASE status WHEN 'paused' THEN 'paused'"
                " ELSE 'running' END, size = ?, done = ? WHERE id = ?",
                (sum(size.values()), size.get(TaskStatus.DONE, 0), self._id),
            )
        return self._id

    def _new_rows(
        self, tasks: Iterable[TaskSpec], known: dict[tuple[object, object], int]
    ) -> Iterable[tuple[Any, ...]]:
        now = self._clock()
        with self._file.read() as connection:
            first = next_number(connection, self._id)
        new = (
            task for task in tasks if (to_sql(task.source), to_sql(task.destination)) not in known
        )
        for number, task in enumerate(new, start=first):
            yield task_values(self._id, number, TaskStatus.QUEUED, task, now)

    def _claim(self) -> int | None:
        """Take the lease of the transfer, which is made if need be.

        Returns:
            None when it was there; else the number of the one that did the same for the same
            session before, 0 when there is none.
        """
        spec, now = self._spec, self._clock()
        with self._file.write() as connection:
            found = connection.execute(
                "SELECT id, lease_owner, lease_until, status FROM transfer WHERE session = ?"
                " AND kind = ? AND source = ? AND destination = ? AND step = ? AND task = ?"
                " ORDER BY status IN ('done', 'aborted'), id DESC LIMIT 1",
                (spec.session, spec.kind, to_sql(spec.source), to_sql(spec.destination),
                 spec.step, spec.task),
            ).fetchone()  # fmt: skip
            if found is None or found[3] in (TransferStatus.DONE, TransferStatus.ABORTED):
                self._id = insert_transfer(connection, spec, now)
                return found[0] if found is not None and spec.session else 0
            self._id = found[0]
            self._refuse_lease(found[1], found[2], now)
            connection.execute(
                "UPDATE transfer SET status = CASE WHEN status IN ('init', 'paused') THEN status"
                " ELSE 'waiting' END, lease_owner = ?, lease_until = ?, modified = ?,"
                " finished = NULL, error_code = '', error = '' WHERE id = ?",
                (lease_owner(), now + LEASE_SECONDS, now, self._id),
            )
        log.info(events.TRANSFER_RESUMED, extra={"transfer": self._id})
        return None

    def _refuse_lease(self, owner: str, until: float, now: float) -> None:
        pid = lease_holder(owner, until, now)
        if pid is not None and owner != lease_owner():
            raise TransferStateError(
                f"process {pid} is running transfer {self._id} already",
                hint="wait until it has finished, or end that process and try again",
            )

    def _queue_again(self) -> None:
        """Queue what a dead engine had begun, what failed, and what had no destination yet."""
        with self._file.read() as connection:
            begun = connection.execute(
                "SELECT id FROM task WHERE transfer = ?"
                " AND status IN ('booting', 'executing', 'failed', 'pending')",
                (self._id,),
            ).fetchall()
        self._write_all(
            "UPDATE task SET status = 'queued', not_before = 0, done = 0 WHERE id = ?", begun
        )

    def _pairs(self) -> dict[tuple[object, object], int]:
        with self._file.read() as connection:
            rows = connection.execute(
                "SELECT source, destination, id FROM task WHERE transfer = ?", (self._id,)
            )
            return {(source, destination): task for source, destination, task in rows}

    def _settle_known(
        self, known: dict[tuple[object, object], int], tasks: Collection[TaskSpec]
    ) -> None:
        """Exclude what is queued and no longer asked for; queue what an engine had excluded."""
        wanted = {known.get((to_sql(task.source), to_sql(task.destination)), 0) for task in tasks}
        with self._file.read() as connection:
            open_ones = connection.execute(
                "SELECT id, status FROM task WHERE transfer = ? AND (status = 'queued'"
                " OR (status = 'excluded' AND modifier = ''))",
                (self._id,),
            ).fetchall()
        self._write_all(
            "UPDATE task SET status = ?, error_code = '', error = '', modifier = '' WHERE id = ?",
            [
                (TaskStatus.QUEUED if task in wanted else TaskStatus.EXCLUDED, task)
                for task, status in open_ones
                if (task in wanted) != (status == TaskStatus.QUEUED)
            ],
        )

    def _carry_over(self, before: int) -> None:
        """Exclude and hold what a person had excluded or held in a transfer before."""
        with self._file.read() as connection:
            by_hand = connection.execute(
                "SELECT status, modifier, ?, source, destination FROM task WHERE transfer = ?"
                " AND status IN ('excluded', 'onhold') AND modifier != ''",
                (self._id, before),
            ).fetchall()
        self._write_all(
            "UPDATE task SET status = ?, modifier = ?"
            " WHERE transfer = ? AND source = ? AND destination = ?",
            by_hand,
        )

    def _write_all(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        remaining = iter(rows)
        while piece := list(islice(remaining, TASKS_PER_PIECE)):
            self._cancellation.check()
            with self._file.write() as connection:
                renew_lease(connection, self._id, self._clock())
                _refuse_aborted(connection, self._id)
                connection.executemany(sql, piece)


def _refuse_aborted(connection: sqlite3.Connection, transfer_id: int) -> None:
    (status, modifier) = connection.execute(
        f"SELECT status, {STATE_SET_BY} FROM transfer WHERE id = ?",  # noqa: S608 - a constant
        (transfer_id,),
    ).fetchone()
    if status == TransferStatus.ABORTED:
        raise aborted(transfer_id, modifier)


def aborted(transfer_id: int, modifier: str) -> TransferAbortedError:
    """Return what an engine ends with whose transfer a person has aborted."""
    return TransferAbortedError(
        f"transfer {transfer_id} was aborted by {modifier or 'the end of its session'}",
        hint="run the same command again to begin anew",
    )


INSERT_TASK: Final = (
    "INSERT INTO task (transfer, uri, status, source, destination, size, priority, metadata,"
    " created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
)


def next_number(connection: sqlite3.Connection, transfer_id: int) -> int:
    """Return the number of a transfer's next task; a pair that came twice has left a gap."""
    (last,) = connection.execute(
        "SELECT max(CAST(uri AS INTEGER)) FROM task WHERE transfer = ?", (transfer_id,)
    ).fetchone()
    return 0 if last is None else int(last) + 1


def task_values(
    transfer_id: int, number: int, status: TaskStatus, task: TaskSpec, now: float
) -> tuple[Any, ...]:
    """Return what INSERT_TASK takes for a new task."""
    return (
        transfer_id, task.uri or str(number), status, to_sql(task.source),
        to_sql(task.destination), task.size, task.priority,
        to_json(task.metadata) if task.metadata else "{}", now,
    )  # fmt: skip


def insert_transfer(connection: sqlite3.Connection, spec: TransferSpec, now: float) -> int:
    """Make a transfer in the caller's transaction: `init`, and this process's; return its id."""
    cursor = connection.execute(
        "INSERT INTO transfer (name, kind, status, source, destination, session, job, step,"
        " task, required, lease_owner, lease_until, created, modified)"
        " VALUES (?, ?, 'init', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (to_sql(spec.name), spec.kind, to_sql(spec.source), to_sql(spec.destination),
         spec.session, spec.job, spec.step, spec.task, spec.required, lease_owner(),
         now + LEASE_SECONDS, now, now),
    )  # fmt: skip
    assert cursor.lastrowid is not None  # noqa: S101 - an INSERT that did not raise has one
    return cursor.lastrowid
