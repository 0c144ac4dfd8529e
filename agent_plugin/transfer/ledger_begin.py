"""How a transfer begins: it is made, or claimed, then expanded into tasks piece by piece.

A transfer may have a million tasks. Each piece is a transaction of its own, so that other processes
get their turn in between. Until all tasks are there the transfer is `init`, or `waiting` when it is
taken up again, and its lease keeps others off; whoever stops or dies meanwhile has begun nothing
that the next one does not take up.
"""

import os
import sqlite3
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Final

from agent_plugin.content import events
from agent_plugin.content.errors import TransferStateError
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.ledger_file import LedgerFile, to_sql
from agent_plugin.transfer.ledger_rows import TaskSpec, TransferSpec
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
    pid = os.getpid() if pid is None else pid
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    # A zombie is gone; in a container nobody may ever reap it.
    return None if fields[0] in "ZX" else f"{pid}:{fields[19]}"


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
            CancelledError: Cancellation was wished.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        self._cancellation.check()
        if self._claim():
            tasks = list(tasks)
            self._queue_again()
            self._exclude_others(tasks)
        self._write_all(
            "INSERT INTO task (transfer, status, source, destination, size)"
            " VALUES (?, 'queued', ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                (self._id, to_sql(task.source), to_sql(task.destination), task.size)
                for task in tasks
            ),
        )
        with self._file.read() as connection:
            size = sizes(connection, self._id)
        size.pop(TaskStatus.EXCLUDED, 0)
        with self._file.write() as connection:
            renew_lease(connection, self._id, self._clock())
            connection.execute(
                "UPDATE transfer SET status = ?, size = ?, done = ? WHERE id = ?",
                (
                    TransferStatus.RUNNING,
                    sum(size.values()),
                    size.get(TaskStatus.DONE, 0),
                    self._id,
                ),
            )
        return self._id

    def _claim(self) -> bool:
        """Take the lease of the transfer, which is made if need be; return whether it was there."""
        spec, now = self._spec, self._clock()
        with self._file.write() as connection:
            found = connection.execute(
                "SELECT id, lease_owner, lease_until FROM transfer WHERE session = ? AND kind = ?"
                " AND source = ? AND destination = ? AND step = ? AND task = ?"
                " AND status NOT IN ('done', 'aborted') ORDER BY id DESC LIMIT 1",
                (spec.session, spec.kind, to_sql(spec.source), to_sql(spec.destination),
                 spec.step, spec.task),
            ).fetchone()  # fmt: skip
            if found is None:
                self._id = _insert(connection, spec, now)
                return False
            self._id = found[0]
            self._refuse_lease(found[1], found[2], now)
            connection.execute(
                "UPDATE transfer SET status = CASE status WHEN 'init' THEN 'init' ELSE 'waiting'"
                " END, lease_owner = ?, lease_until = ?, modified = ?, finished = NULL,"
                " error_code = '', error = '' WHERE id = ?",
                (lease_owner(), now + LEASE_SECONDS, now, self._id),
            )
        log.info(events.TRANSFER_RESUMED, extra={"transfer": self._id})
        return True

    def _refuse_lease(self, owner: str, until: float, now: float) -> None:
        if owner and owner != lease_owner() and until > now:
            pid = int(owner.partition(":")[0])
            if lease_owner(pid) == owner:
                raise TransferStateError(
                    f"process {pid} is running transfer {self._id} already",
                    hint="wait until it has finished, or end that process and try again",
                )

    def _queue_again(self) -> None:
        """Queue what a dead engine had begun, and what failed."""
        with self._file.read() as connection:
            begun = connection.execute(
                "SELECT id FROM task WHERE transfer = ?"
                " AND status IN ('booting', 'executing', 'failed')",
                (self._id,),
            ).fetchall()
        self._write_all("UPDATE task SET status = 'queued', not_before = 0 WHERE id = ?", begun)

    def _exclude_others(self, tasks: Collection[TaskSpec]) -> None:
        """Exclude what is queued and no longer asked for."""
        wanted = {(to_sql(task.source), to_sql(task.destination)) for task in tasks}
        with self._file.read() as connection:
            others = [
                (task_id,)
                for task_id, *pair in connection.execute(
                    "SELECT id, source, destination FROM task"
                    " WHERE transfer = ? AND status = 'queued'",
                    (self._id,),
                )
                if tuple(pair) not in wanted
            ]
        self._write_all("UPDATE task SET status = 'excluded' WHERE id = ?", others)

    def _write_all(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        remaining = iter(rows)
        while piece := list(islice(remaining, TASKS_PER_PIECE)):
            self._cancellation.check()
            with self._file.write() as connection:
                renew_lease(connection, self._id, self._clock())
                connection.executemany(sql, piece)


def _insert(connection: sqlite3.Connection, spec: TransferSpec, now: float) -> int:
    cursor = connection.execute(
        "INSERT INTO transfer (name, kind, status, source, destination, session, job, step,"
        " task, lease_owner, lease_until, created, modified)"
        " VALUES (?, ?, 'init', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (to_sql(spec.name), spec.kind, to_sql(spec.source), to_sql(spec.destination),
         spec.session, spec.job, spec.step, spec.task, lease_owner(), now + LEASE_SECONDS, now,
         now),
    )  # fmt: skip
    assert cursor.lastrowid is not None  # noqa: S101 - an INSERT that did not raise has one
    return cursor.lastrowid
