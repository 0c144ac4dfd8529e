"""How a transfer that an engine has is left: in which state, and with what of it begun."""

import sqlite3
from collections.abc import Collection

from agent_plugin.content.errors import CancelledError, PropmasterError, TransferAbortedError
from agent_plugin.transfer.ledger_begin import sizes
from agent_plugin.transfer.ledger_file import to_sql
from agent_plugin.transfer.states import (
    TaskStatus,
    TransferStatus,
    aggregate,
    check_transfer_change,
)


def go_on(connection: sqlite3.Connection, transfer_id: int, *, yielding: bool) -> None:
    """Say, in the caller's transaction, whether a transfer that is not held moves or waits."""
    wanted, other = (
        (TransferStatus.WAITING, TransferStatus.RUNNING)
        if yielding
        else (TransferStatus.RUNNING, TransferStatus.WAITING)
    )
    connection.execute(
        "UPDATE transfer SET status = ? WHERE id = ? AND status = ?", (wanted, transfer_id, other)
    )


def let_go(
    connection: sqlite3.Connection, transfer_id: int, status: TransferStatus, now: float
) -> None:
    """Give the lease back, and what was begun; of one that was ended by hand nothing is left."""
    left = TaskStatus.EXCLUDED if status is TransferStatus.DONE else TaskStatus.QUEUED
    connection.execute(
        "UPDATE task SET status = ?, done = 0 WHERE transfer = ?"
        " AND status IN ('booting', 'executing')",
        (left, transfer_id),
    )
    size = sizes(connection, transfer_id)
    size.pop(TaskStatus.EXCLUDED, 0)
    connection.execute(
        "UPDATE transfer SET lease_owner = '', lease_until = 0, modified = ?, size = ?, done = ?"
        " WHERE id = ?",
        (now, sum(size.values()), size.get(TaskStatus.DONE, 0), transfer_id),
    )


def end(
    connection: sqlite3.Connection,
    transfer_id: int,
    current: TransferStatus,
    error: PropmasterError | None,
    now: float,
) -> None:
    """Give a transfer its last state, in the caller's transaction."""
    status = _final_status(sizes(connection, transfer_id).keys(), current, error)
    if current is not TransferStatus.RUNNING and status is TransferStatus.FAILED:
        # It was moving until now, whatever a person has just wished.
        current = TransferStatus.RUNNING
    if status is not current:
        check_transfer_change(current, status)
    connection.execute(
        "UPDATE transfer SET status = ?1, error_code = ?2, error = ?3,"
        " finished = CASE WHEN ?1 IN ('done', 'failed', 'aborted') THEN ?4 END WHERE id = ?5",
        (
            status,
            error.code if error else "",
            to_sql(error.message) if error else "",
            now,
            transfer_id,
        ),
    )


def _final_status(
    tasks: Collection[TaskStatus], current: TransferStatus, error: PropmasterError | None
) -> TransferStatus:
    if error is None:
        return aggregate(tasks)
    if isinstance(error, TransferAbortedError):
        return TransferStatus.ABORTED
    if isinstance(error, CancelledError):
        paused = current is TransferStatus.PAUSED
        return TransferStatus.ABORTED if paused else TransferStatus.WAITING
    return TransferStatus.FAILED
