"""How transfers are made ahead of their engine, and how tasks are added to them, by people.

A transfer that is made here is nobody's when it is complete: whoever carries it out begins it.
"""

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, Final, Literal

from agent_plugin.content.errors import JobInvalidError, PropmasterError, TransferStateError
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.ledger_begin import (
    INSERT_TASK,
    TASKS_PER_PIECE,
    insert_transfer,
    next_number,
    renew_lease,
    task_values,
)
from agent_plugin.transfer.ledger_control import (
    QUEUED_ANEW,
    Restore,
    recount,
    refuse_unmade,
    settle_lease,
    status_of,
    tell,
)
from agent_plugin.transfer.ledger_file import LedgerFile, from_sql, place_of, to_sql
from agent_plugin.transfer.ledger_rows import TaskSpec, TransferSpec, to_json
from agent_plugin.transfer.states import FINISHED, TaskStatus, TransferStatus, priority_of

Duplicates = Literal["retry", "reject", "replace"]

_T = TransferStatus
_K = TaskStatus
# What these are to move follows from a job alone.
OF_HOOKS: Final = frozenset(
    {"sync-in", "source", "sync-step", "sync-out", "publish", "submit", "outputs", "get"}
)
_UNMADE: Final = "whoever made it ended before all of its tasks were there; make it again"
_BEGUN: Final = frozenset({_K.BOOTING, _K.EXECUTING})


class New:
    """New transfers, and new tasks of transfers.

    Args:
        file: The ledger.
        clock: Seconds since the epoch.
        restore: Called before a transfer that is done goes on.
    """

    def __init__(self, file: LedgerFile, clock: Callable[[], float], restore: Restore) -> None:
        self._file = file
        self._clock = clock
        self._restore = restore

    def create(
        self,
        spec: TransferSpec,
        tasks: Iterable[TaskSpec],
        *,
        status: TransferStatus,
        priority: int | str,
        required: bool,
        settings: Mapping[str, Any],
        metadata: Mapping[str, Any],
        modifier: str,
        cancellation: Cancellation,
    ) -> int:
        """See Ledger.create."""
        if status not in (_T.WAITING, _T.PENDING, _T.PAUSED):
            raise TransferStateError(
                f"a new transfer can not be {status}",
                hint="it can be paused, pending or waiting",
            )
        if not spec.destination:
            status = _T.PENDING
        now, number = self._clock(), priority_of(priority)
        with self._file.write() as connection:
            transfer_id = insert_transfer(connection, spec, now)
            connection.execute(
                "UPDATE transfer SET priority = ?, required = ?, settings = ?, metadata = ?,"
                " modifier = ? WHERE id = ?",
                (number, required, to_json(settings), to_json(metadata), modifier, transfer_id),
            )
        state = _K.PENDING if status is _T.PENDING else _K.QUEUED
        rows = (task_values(transfer_id, at, state, task, now) for at, task in enumerate(tasks))
        try:
            while piece := list(islice(rows, TASKS_PER_PIECE)):
                cancellation.check()
                with self._file.write() as connection:
                    renew_lease(connection, transfer_id, self._clock())
                    connection.executemany(INSERT_TASK, piece)
            with self._file.write() as connection:
                renew_lease(connection, transfer_id, self._clock())
                connection.execute(
                    "UPDATE transfer SET status = CASE status WHEN 'init' THEN ? ELSE status END,"
                    " lease_owner = '', lease_until = 0 WHERE id = ?",
                    (status, transfer_id),
                )
                recount(connection, transfer_id, held=False)
                tell(connection, now, transfer_id, None, f"created={status}", modifier)
        except BaseException:
            # If this can not be noted either, housekeeping does.
            with suppress(PropmasterError), self._file.write() as connection:
                abandon(connection, transfer_id, self._clock())
            raise
        return transfer_id

    def add_tasks(
        self,
        transfer_id: int,
        tasks: Iterable[TaskSpec],
        *,
        duplicates: Duplicates,
        modifier: str,
    ) -> list[int]:
        """See Ledger.add_tasks."""
        now = self._clock()
        with self._file.write() as connection:
            held = settle_lease(connection, transfer_id, now)
            status, kind = status_of(connection, transfer_id)
            refuse_unmade(connection, transfer_id)
            self._restore(connection, transfer_id)
            new = _K.PENDING if status is _T.PENDING else _K.QUEUED
            known = connection.execute(
                "SELECT source, destination, id, status FROM task WHERE transfer = ?",
                (transfer_id,),
            )
            pairs = {(row[0], row[1]): (row[2], TaskStatus(row[3])) for row in known}
            number = next_number(connection, transfer_id)
            changed: list[int] = []
            for task in tasks:
                pair = (to_sql(task.source), to_sql(task.destination))
                if pair in pairs:
                    task_id = self._again(connection, pairs[pair], task, duplicates, new)
                else:
                    _refuse_fixed(transfer_id, kind, task)
                    _refuse_taken(connection, transfer_id, task)
                    row = task_values(transfer_id, number, new, task, now)
                    number += 1
                    task_id = connection.execute(INSERT_TASK, row).lastrowid or 0
                    pairs[pair] = (task_id, new)
                changed.append(task_id)
                tell(connection, now, transfer_id, task_id, "added", modifier)
            if changed and status in FINISHED:
                connection.execute(
                    "UPDATE transfer SET status = 'waiting', finished = NULL, error_code = '',"
                    " error = '' WHERE id = ?",
                    (transfer_id,),
                )
                # It may have been aborted while it was pending.
                connection.execute(
                    "UPDATE task SET status = 'queued' WHERE transfer = ? AND status = 'pending'",
                    (transfer_id,),
                )
            connection.execute(
                "UPDATE transfer SET modifier = ?, modified = ? WHERE id = ?",
                (modifier, now, transfer_id),
            )
            recount(connection, transfer_id, held=held)
        return changed

    @staticmethod
    def _again(
        connection: sqlite3.Connection,
        known: tuple[int, TaskStatus],
        task: TaskSpec,
        duplicates: Duplicates,
        new: TaskStatus,
    ) -> int:
        """Treat a task that is there already as it is wished; one that is under way is let be."""
        task_id, status = known
        if duplicates == "reject":
            source, destination = (
                from_sql(place_of(to_sql(place))) for place in (task.source, task.destination)
            )
            raise TransferStateError(
                f"task {task_id} has the source {source} and the destination {destination} already;"
                " nothing was added",
                hint="allow duplicates to have it tried again",
            )
        if status in _BEGUN:
            return task_id
        if duplicates == "replace":
            connection.execute(
                "UPDATE task SET size = ?, priority = ?, metadata = ? WHERE id = ?",
                (task.size, task.priority, to_json(task.metadata), task_id),
            )
        connection.execute(
            f"UPDATE task SET {QUEUED_ANEW}, modifier = '' WHERE id = ?",  # noqa: S608 - constant
            (task_id,),
        )
        connection.execute("UPDATE task SET status = ? WHERE id = ?", (new, task_id))
        return task_id


def abandon(connection: sqlite3.Connection, transfer_id: int, now: float) -> None:
    """End, in the caller's transaction, a person's transfer whose maker has not come to its end.

    Nobody can go on with it. What a hook makes is made whole when the hook runs again.
    """
    status, kind = status_of(connection, transfer_id)
    if status is not _T.INIT or kind in OF_HOOKS:
        return
    connection.execute(
        "UPDATE transfer SET status = 'aborted', finished = ?, lease_owner = '', lease_until = 0,"
        " error_code = ?, error = ? WHERE id = ?",
        (now, TransferStateError.code, _UNMADE, transfer_id),
    )
    tell(connection, now, transfer_id, None, "status=aborted", "")


def _refuse_taken(connection: sqlite3.Connection, transfer_id: int, task: TaskSpec) -> None:
    taken = (
        task.uri
        and connection.execute(
            "SELECT id FROM task WHERE transfer = ? AND uri = ?", (transfer_id, task.uri)
        ).fetchone()
    )
    if taken:
        raise TransferStateError(
            f"task {taken[0]} of transfer {transfer_id} has the uri {task.uri!r} already; nothing"
            " was added",
            hint="give another uri, or none",
        )


def _refuse_fixed(transfer_id: int, kind: str, task: TaskSpec) -> None:
    if kind in OF_HOOKS:
        raise JobInvalidError(
            f"{task.source} can not be added to transfer {transfer_id}: what a {kind} moves"
            " follows from its job",
            hint="make a transfer of its own for it",
        )
