"""What people change of transfers and tasks, from any process, within the tables of states.py.

Who changes something writes the row, and an event that tells who did it. The engine that holds the
transfer's lease reads the events at each beat (control.py) and obeys. Where no engine is at work,
the state of the transfer is made to follow from its tasks here.
"""

import sqlite3
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from agent_plugin.content.errors import ReadOnlyAttributeError, TransferStateError
from agent_plugin.transfer.ledger_begin import (
    INSERT_TASK,
    lease_holder,
    next_number,
    sizes,
    task_values,
)
from agent_plugin.transfer.ledger_file import LedgerFile, from_sql, to_sql
from agent_plugin.transfer.ledger_rows import COPY, TaskSpec, from_json, to_json
from agent_plugin.transfer.states import (
    FINISHED,
    SETTABLE_TASK,
    SETTABLE_TRANSFER,
    TRANSFER_CHANGES,
    TaskStatus,
    TransferStatus,
    aggregate,
    check_settable,
    check_task_change,
    check_transfer_change,
    is_so_already,
    priority_of,
)

_T = TransferStatus
_K = TaskStatus
_CHANGEABLE: Final = frozenset({"status", "priority", "metadata"})
QUEUED_ANEW: Final = (
    "status = 'queued', error_code = '', error = '', not_before = 0, done = 0, finished = NULL"
)
# Brings back, in a transaction, what was packed of a transfer that is done; see Archive.restore.
Restore = Callable[[sqlite3.Connection, int], None]
# From a task's source and destination to its new destination; None: it keeps the one it has.
Redirect = Callable[[str, str], str | None]


class ByHand:
    """Changes of the ledger by people.

    Args:
        file: The ledger.
        clock: Seconds since the epoch.
        restore: Called before a transfer that is done goes on.
    """

    def __init__(self, file: LedgerFile, clock: Callable[[], float], restore: Restore) -> None:
        self._file = file
        self._clock = clock
        self._restore = restore

    # -------------------------------------------------------------------------- one transfer

    def set_transfer(
        self,
        transfer_id: int,
        *,
        status: TransferStatus | None,
        priority: int | str | None,
        metadata: Mapping[str, Any] | None,
        destination: str | None,
        redirect: Redirect | None,
        tasks: Collection[TaskSpec],
        modifier: str,
    ) -> None:
        """See Ledger.set_transfer."""
        now = self._clock()
        with self._file.write() as connection:
            held = settle_lease(connection, transfer_id, now)
            changed = False
            # First, since a destination can be set then.
            if status is _T.PENDING:
                changed = self._set_status(connection, transfer_id, status, modifier, held=held)
            if destination is not None:
                self._set_destination(connection, transfer_id, destination)
                if redirect is not None:
                    _redirect_tasks(connection, transfer_id, redirect, now)
                _insert_tasks(connection, transfer_id, tasks, now)
                recount(connection, transfer_id, held=held)
                tell(connection, now, transfer_id, None, f"destination={destination}", modifier)
            if priority is not None:
                number = priority_of(priority)
                connection.execute(
                    "UPDATE transfer SET priority = ? WHERE id = ?", (number, transfer_id)
                )
                tell(connection, now, transfer_id, None, f"priority={number}", modifier)
            if metadata is not None:
                connection.execute(
                    "UPDATE transfer SET metadata = ? WHERE id = ?",
                    (to_json(metadata), transfer_id),
                )
                tell(connection, now, transfer_id, None, "metadata", modifier)
            if status is not None and status is not _T.PENDING:
                changed = self._set_status(connection, transfer_id, status, modifier, held=held)
            if not changed and destination is None and priority is None and metadata is None:
                # Who had wished it before stays the one who did.
                return
            connection.execute(
                "UPDATE transfer SET modifier = ?, modified = ? WHERE id = ?",
                (modifier, now, transfer_id),
            )

    @staticmethod
    def _set_destination(
        connection: sqlite3.Connection, transfer_id: int, destination: str
    ) -> None:
        current, kind = status_of(connection, transfer_id)
        if kind != COPY:
            raise ReadOnlyAttributeError(
                f"the destination of transfer {transfer_id} can not be changed: that of a {kind}"
                " follows from its job"
            )
        if current is not _T.PENDING:
            raise ReadOnlyAttributeError(
                f"the destination of transfer {transfer_id}, which is {current}, can not be"
                " changed: it is set while a transfer is pending",
                hint="make it pending first" if _T.PENDING in TRANSFER_CHANGES[current] else "",
            )
        connection.execute(
            # A name that was given stays.
            "UPDATE transfer SET destination = ?1, name = CASE"
            " WHEN name = kind || ' ' || source || ' -> ' || destination"
            " THEN kind || ' ' || source || ' -> ' || ?1 ELSE name END WHERE id = ?2",
            (to_sql(destination), transfer_id),
        )

    def _set_status(
        self,
        connection: sqlite3.Connection,
        transfer_id: int,
        wanted: TransferStatus,
        modifier: str,
        *,
        held: bool,
    ) -> bool:
        """Set a state that may be set; the tasks follow. False: it is so already."""
        now = self._clock()
        current, _ = status_of(connection, transfer_id)
        check_settable(wanted, SETTABLE_TRANSFER)
        if is_so_already(current, wanted):
            return False
        check_transfer_change(current, wanted, f"transfer {transfer_id}")
        if wanted in (_T.WAITING, _T.PENDING, _T.DONE):
            refuse_unmade(connection, transfer_id)
        self._restore(connection, transfer_id)
        if wanted is _T.WAITING:
            self._resume(connection, transfer_id, current)
        elif wanted is _T.PENDING:
            _make_pending(connection, transfer_id, current, held=held)
        elif wanted is _T.DONE:
            # What an engine has in hand it lets go of by itself.
            connection.execute(
                "UPDATE task SET status = 'excluded' WHERE transfer = ?"
                " AND status NOT IN ('done', 'excluded', 'booting', 'executing')",
                (transfer_id,),
            )
        connection.execute(
            "UPDATE transfer SET status = ?, finished = ?,"
            " error_code = '', error = '' WHERE id = ?",
            (wanted, now if wanted in FINISHED else None, transfer_id),
        )
        # Nothing else changes what counts, and counting takes long where there are many tasks.
        if wanted is _T.DONE or current in FINISHED:
            recount(connection, transfer_id, held=held)
        tell(connection, now, transfer_id, None, f"status={wanted}", modifier)
        return True

    @staticmethod
    def _resume(connection: sqlite3.Connection, transfer_id: int, current: TransferStatus) -> None:
        """Let a transfer that was held, or had ended, go on: what failed is tried again."""
        (destination,) = connection.execute(
            "SELECT destination FROM transfer WHERE id = ?", (transfer_id,)
        ).fetchone()
        if not destination:
            pending = current is _T.PENDING
            raise TransferStateError(
                f"transfer {transfer_id} has no destination",
                hint="give it one first" if pending else "make a new one that has",
            )
        # It may have been aborted while it was pending.
        connection.execute(
            "UPDATE task SET status = 'queued' WHERE transfer = ? AND status = 'pending'",
            (transfer_id,),
        )
        if current in FINISHED:
            connection.execute(
                f"UPDATE task SET {QUEUED_ANEW} WHERE transfer = ? AND status = 'failed'",  # noqa: S608
                (transfer_id,),
            )

    # ---------------------------------------------------------------------------- its tasks

    def set_tasks(
        self, transfer_id: int, changes: Mapping[int, Mapping[str, Any]], modifier: str
    ) -> None:
        """See Ledger.set_tasks."""
        now = self._clock()
        with self._file.write() as connection:
            held = settle_lease(connection, transfer_id, now)
            self._restore(connection, transfer_id)
            status, _ = status_of(connection, transfer_id)
            before = _task_states(connection, transfer_id)
            changed = [
                self._set_task(connection, transfer_id, task_id, change, modifier)
                for task_id, change in changes.items()
            ]
            if any(changed):
                connection.execute(
                    "UPDATE transfer SET modifier = ?, modified = ? WHERE id = ?",
                    (modifier, now, transfer_id),
                )
            if _is_made(connection, transfer_id):
                recount(connection, transfer_id, held=held)
            if not held:
                self._follow_tasks(connection, transfer_id, status, before, now)

    def _set_task(
        self,
        connection: sqlite3.Connection,
        transfer_id: int,
        task_id: int,
        change: Mapping[str, Any],
        modifier: str,
    ) -> bool:
        """Change a task; False: it is so already."""
        now = self._clock()
        if unknown := sorted(change.keys() - _CHANGEABLE):
            raise ReadOnlyAttributeError(
                f"{', '.join(unknown)} of a task can not be changed",
                hint=f"what can be: {', '.join(sorted(_CHANGEABLE))}",
            )
        found = connection.execute(
            "SELECT status, modifier FROM task WHERE id = ? AND transfer = ?",
            (task_id, transfer_id),
        ).fetchone()
        if found is None:
            raise TransferStateError(f"there is no task {task_id} in transfer {transfer_id}")
        if "priority" in change:
            number = priority_of(change["priority"])
            connection.execute("UPDATE task SET priority = ? WHERE id = ?", (number, task_id))
            tell(connection, now, transfer_id, task_id, f"priority={number}", modifier)
        if "metadata" in change:
            connection.execute(
                "UPDATE task SET metadata = ? WHERE id = ?", (to_json(change["metadata"]), task_id)
            )
            tell(connection, now, transfer_id, task_id, "metadata", modifier)
        if "status" in change:
            wanted = _task_status(change["status"])
            check_settable(wanted, SETTABLE_TASK)
            if is_so_already(TaskStatus(found[0]), wanted):
                _confirm(connection, task_id, wanted, modifier)
                return len(change) > 1
            check_task_change(TaskStatus(found[0]), wanted, f"task {task_id}")
            _set_task_status(connection, task_id, wanted, modifier, now)
            tell(connection, now, transfer_id, task_id, f"status={wanted}", modifier)
        return bool(change)

    @staticmethod
    def _follow_tasks(
        connection: sqlite3.Connection,
        transfer_id: int,
        status: TransferStatus,
        before: frozenset[TaskStatus],
        now: float,
    ) -> None:
        """Give a transfer that no engine has the state that follows from its tasks."""
        if status in (_T.INIT, _T.PENDING, _T.ABORTED):
            return
        after = aggregate(_task_states(connection, transfer_id))
        # A person has paused it; that its last task is released is another matter.
        by_hand = status is _T.PAUSED and aggregate(before) is not _T.PAUSED
        if by_hand and after not in FINISHED:
            return
        if after is status or after not in TRANSFER_CHANGES[status]:
            return
        connection.execute(
            "UPDATE transfer SET status = ?, finished = ?, error_code = CASE ? WHEN 'failed'"
            " THEN error_code ELSE '' END, error = CASE ? WHEN 'failed' THEN error ELSE '' END"
            " WHERE id = ?",
            (after, now if after in FINISHED else None, after, after, transfer_id),
        )


def _is_made(connection: sqlite3.Connection, transfer_id: int) -> bool:
    """Whether whoever made a transfer has come to the end of its tasks, and not been killed."""
    (size,) = connection.execute(
        "SELECT size FROM transfer WHERE id = ?", (transfer_id,)
    ).fetchone()
    return bool(size >= 0)


def refuse_unmade(connection: sqlite3.Connection, transfer_id: int) -> None:
    """See that a transfer has all of its tasks.

    Raises:
        TransferStateError: It is still being made, or its maker was stopped.
    """
    if not _is_made(connection, transfer_id):
        raise TransferStateError(
            f"transfer {transfer_id} has not got all of its tasks yet",
            hint="if whoever made it was stopped, abort it and make it again",
        )


def _make_pending(
    connection: sqlite3.Connection, transfer_id: int, current: TransferStatus, *, held: bool
) -> None:
    """Let a transfer wait for a destination; of one that had ended, all is to be sent again."""
    if held:
        raise TransferStateError(
            f"transfer {transfer_id} is being carried out, and can not become pending",
            hint="abort it, or wait until it has ended",
        )
    if current in FINISHED:
        connection.execute(
            f"UPDATE task SET {QUEUED_ANEW}, modifier = '' WHERE transfer = ?"  # noqa: S608 - constant
            " AND status IN ('failed', 'done')",
            (transfer_id,),
        )
    connection.execute(
        "UPDATE task SET status = 'pending' WHERE transfer = ? AND status = 'queued'",
        (transfer_id,),
    )


def _redirect_tasks(
    connection: sqlite3.Connection, transfer_id: int, redirect: Redirect, now: float
) -> None:
    """Have what is not done go to another place."""
    left = connection.execute(
        "SELECT id, source, destination, size, priority, metadata, status, modifier,"
        " upload_id = '' AND parts IN ('[]', '{}') FROM task"
        " WHERE transfer = ? AND status != 'done' ORDER BY id",
        (transfer_id,),
    ).fetchall()
    taken = {
        (row[0], row[1])
        for row in connection.execute(
            "SELECT source, destination FROM task WHERE transfer = ?", (transfer_id,)
        )
    }
    for task_id, source, before, size, priority, metadata, status, modifier, nothing_kept in left:
        after = redirect(from_sql(source), from_sql(before))
        if after is None or to_sql(after) == before:
            continue
        pair = (source, to_sql(after))
        if nothing_kept and pair not in taken:
            connection.execute("UPDATE task SET destination = ? WHERE id = ?", (pair[1], task_id))
        else:
            # What an engine has kept of it is beside the old destination, and goes with the task.
            connection.execute("UPDATE task SET status = 'excluded' WHERE id = ?", (task_id,))
            spec = TaskSpec(from_sql(source), after, size, priority, from_json(metadata))
            _insert_tasks(connection, transfer_id, [spec], now)
            connection.execute(
                "UPDATE task SET status = ?, modifier = ? WHERE transfer = ? AND source = ?"
                " AND destination = ? AND status != 'done'",
                (status, modifier, transfer_id, *pair),
            )
        taken.add(pair)


def _insert_tasks(
    connection: sqlite3.Connection, transfer_id: int, tasks: Collection[TaskSpec], now: float
) -> None:
    """Give a transfer that is pending new tasks; those that are there stay as they are."""
    first = next_number(connection, transfer_id) if tasks else 0
    connection.executemany(
        INSERT_TASK,
        (
            task_values(transfer_id, number, _K.PENDING, task, now)
            for number, task in enumerate(tasks, start=first)
        ),
    )


def settle_lease(connection: sqlite3.Connection, transfer_id: int, now: float) -> bool:
    """Take back what a dead engine had in hand; return whether a living one holds the lease."""
    found = connection.execute(
        "SELECT lease_owner, lease_until, status FROM transfer WHERE id = ?", (transfer_id,)
    ).fetchone()
    if found is None:
        raise TransferStateError(f"there is no transfer {transfer_id}")
    if lease_holder(found[0], found[1], now) is not None:
        return True
    if found[0]:
        release(connection, transfer_id)
    return False


def release(connection: sqlite3.Connection, transfer_id: int) -> None:
    """Take a transfer from an engine that is dead, in the caller's transaction."""
    connection.execute(
        "UPDATE task SET status = 'queued', done = 0 WHERE transfer = ?"
        " AND status IN ('booting', 'executing')",
        (transfer_id,),
    )
    connection.execute(
        "UPDATE transfer SET lease_owner = '', lease_until = 0,"
        " status = CASE status WHEN 'running' THEN 'waiting' ELSE status END WHERE id = ?",
        (transfer_id,),
    )
    if _is_made(connection, transfer_id):
        recount(connection, transfer_id, held=False)


def status_of(connection: sqlite3.Connection, transfer_id: int) -> tuple[TransferStatus, str]:
    """Return the state and the kind of a transfer that is there."""
    status, kind = connection.execute(
        "SELECT status, kind FROM transfer WHERE id = ?", (transfer_id,)
    ).fetchone()
    return TransferStatus(status), kind


def _task_states(connection: sqlite3.Connection, transfer_id: int) -> frozenset[TaskStatus]:
    rows = connection.execute("SELECT DISTINCT status FROM task WHERE transfer = ?", (transfer_id,))
    return frozenset(TaskStatus(status) for (status,) in rows)


def _task_status(value: object) -> TaskStatus:
    try:
        return TaskStatus(str(value).lower())
    except ValueError:
        raise TransferStateError(
            f"{value!r} is no state of a task",
            hint=f"what can be set: {', '.join(sorted(SETTABLE_TASK))}",
        ) from None


def _set_task_status(
    connection: sqlite3.Connection, task_id: int, wanted: TaskStatus, modifier: str, now: float
) -> None:
    if wanted is _K.QUEUED:
        connection.execute(
            f"UPDATE task SET {QUEUED_ANEW}, modifier = ? WHERE id = ?",  # noqa: S608 - constant
            (modifier, task_id),
        )
        return
    connection.execute(
        "UPDATE task SET status = ?1, modifier = ?2, finished = ?3,"
        # What is held goes on with what there is of it.
        " done = CASE ?1 WHEN 'done' THEN size WHEN 'onhold' THEN done ELSE 0 END WHERE id = ?4",
        (wanted, modifier, now if wanted in (_K.DONE, _K.FAILED) else None, task_id),
    )


def _confirm(
    connection: sqlite3.Connection, task_id: int, status: TaskStatus, modifier: str
) -> None:
    """Do what it still means that a person wishes a state which a task has already."""
    if status is _K.QUEUED:
        # It may have waited for another try.
        connection.execute("UPDATE task SET not_before = 0 WHERE id = ?", (task_id,))
    elif status is _K.EXCLUDED:
        # What an engine has excluded comes back when it is asked for again; this does not.
        connection.execute(
            "UPDATE task SET modifier = ? WHERE id = ? AND modifier = ''", (modifier, task_id)
        )


def recount(connection: sqlite3.Connection, transfer_id: int, *, held: bool) -> None:
    """Count a transfer's bytes anew; an engine counts what it has in place by itself."""
    size = sizes(connection, transfer_id)
    size.pop(_K.EXCLUDED, 0)
    done = size.get(_K.DONE, 0)
    connection.execute(
        "UPDATE transfer SET size = ? WHERE id = ?", (sum(size.values()), transfer_id)
    )
    if not held:
        connection.execute("UPDATE transfer SET done = ? WHERE id = ?", (done, transfer_id))


def tell(
    connection: sqlite3.Connection,
    now: float,
    transfer_id: int,
    task_id: int | None,
    what: str,
    who: str,
) -> None:
    """Note who changed what, in the caller's transaction."""
    connection.execute(
        "INSERT INTO event (time, transfer, task, what, who) VALUES (?, ?, ?, ?, ?)",
        (now, transfer_id, task_id, to_sql(what), who),
    )
