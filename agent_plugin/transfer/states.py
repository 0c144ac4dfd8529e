"""Which states a transfer and a task can have, and which changes are allowed. Pure.

A transfer is one movement of one snapshot; a task is one file of it. The engine moves both along;
a person may set some states by hand (`SETTABLE_…`), within the same tables.
"""

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Final

from agent_plugin.content.errors import JobInvalidError, TransferStateError


class TransferStatus(StrEnum):
    """What a transfer is doing."""

    INIT = "init"  # being expanded into tasks; its size is not known yet
    PENDING = "pending"  # waits for a destination or a confirmation
    WAITING = "waiting"  # queued
    RUNNING = "running"  # an engine holds its lease and moves bytes
    PAUSED = "paused"  # held by a person, or only held tasks are left
    FAILED = "failed"  # at least one task gave up
    ABORTED = "aborted"  # stopped by a person
    DONE = "done"  # every task that counts is done


class TaskStatus(StrEnum):
    """What a task is doing."""

    PENDING = "pending"  # its transfer has no destination yet
    QUEUED = "queued"  # may be claimed
    BOOTING = "booting"  # claimed; no byte has moved
    EXECUTING = "executing"  # bytes are moving
    FAILED = "failed"  # gave up; the error is in the row
    ONHOLD = "onhold"  # held by a person
    EXCLUDED = "excluded"  # taken out by a person; leaves size and progress
    DONE = "done"


_T = TransferStatus
_K = TaskStatus

LIVE: Final = frozenset({_T.INIT, _T.PENDING, _T.WAITING, _T.RUNNING, _T.PAUSED})
FINISHED: Final = frozenset({_T.FAILED, _T.ABORTED, _T.DONE})

# Higher first. Queues of farms have these three names for it.
DEFAULT_PRIORITY: Final = 500
MAX_PRIORITY: Final = 1000
PRIORITIES: Final[Mapping[str, int]] = {"high": 999, "medium": DEFAULT_PRIORITY, "low": 1}

TRANSFER_CHANGES: Final[Mapping[TransferStatus, frozenset[TransferStatus]]] = {
    _T.INIT: frozenset({_T.WAITING, _T.PENDING, _T.FAILED, _T.ABORTED}),
    _T.PENDING: frozenset({_T.WAITING, _T.ABORTED, _T.DONE}),
    _T.WAITING: frozenset({_T.RUNNING, _T.PAUSED, _T.ABORTED, _T.DONE, _T.PENDING}),
    _T.RUNNING: frozenset({_T.WAITING, _T.PAUSED, _T.FAILED, _T.ABORTED, _T.DONE}),
    _T.PAUSED: frozenset({_T.WAITING, _T.ABORTED, _T.DONE, _T.PENDING}),
    _T.FAILED: frozenset({_T.WAITING, _T.PAUSED, _T.DONE, _T.PENDING}),
    _T.ABORTED: frozenset({_T.WAITING, _T.PENDING}),
    _T.DONE: frozenset({_T.WAITING, _T.PENDING}),
}

TASK_CHANGES: Final[Mapping[TaskStatus, frozenset[TaskStatus]]] = {
    _K.PENDING: frozenset({_K.QUEUED, _K.ONHOLD, _K.EXCLUDED}),
    _K.QUEUED: frozenset({_K.BOOTING, _K.ONHOLD, _K.EXCLUDED, _K.FAILED, _K.DONE}),
    _K.BOOTING: frozenset({_K.EXECUTING, _K.QUEUED, _K.ONHOLD, _K.EXCLUDED, _K.FAILED, _K.DONE}),
    _K.EXECUTING: frozenset({_K.QUEUED, _K.ONHOLD, _K.EXCLUDED, _K.FAILED, _K.DONE}),
    _K.FAILED: frozenset({_K.QUEUED, _K.ONHOLD, _K.EXCLUDED, _K.DONE}),
    _K.ONHOLD: frozenset({_K.QUEUED, _K.EXCLUDED, _K.FAILED, _K.DONE}),
    _K.EXCLUDED: frozenset({_K.QUEUED}),
    _K.DONE: frozenset({_K.QUEUED}),
}

SETTABLE_TRANSFER: Final = frozenset({_T.PENDING, _T.WAITING, _T.PAUSED, _T.ABORTED, _T.DONE})
SETTABLE_TASK: Final = frozenset({_K.QUEUED, _K.ONHOLD, _K.EXCLUDED, _K.FAILED, _K.DONE})
# Of transfers and tasks: nobody goes on with what there is of these.
DROPPED: Final = frozenset({_T.ABORTED.value, _T.DONE.value, _K.EXCLUDED.value, _K.FAILED.value})
# Tasks in these states need nothing more from the engine.
SETTLED_TASK: Final = frozenset({_K.FAILED, _K.EXCLUDED, _K.DONE})


def is_so_already(
    current: TransferStatus | TaskStatus, wanted: TransferStatus | TaskStatus
) -> bool:
    """Whether nothing has to change for what a person wishes.

    A transfer that runs waits no longer: who resumes it has what was wished.
    """
    return current == wanted or (current is _T.RUNNING and wanted is _T.WAITING)


def check_settable(
    wanted: TransferStatus | TaskStatus, settable: Collection[TransferStatus | TaskStatus]
) -> None:
    """Refuse a state that only the engine sets.

    Raises:
        TransferStateError: Naming those that may be set.
    """
    if wanted not in settable:
        raise TransferStateError(
            f"{wanted} is not for people to set",
            hint=f"what can be set: {', '.join(sorted(settable))}",
        )


def priority_of(value: object) -> int:
    """Return a priority, given as a number or by its name.

    Raises:
        JobInvalidError: It is neither.
    """
    number = PRIORITIES.get(value.lower(), value) if isinstance(value, str) else value
    if isinstance(number, str) and number.isascii() and number.isdigit():
        number = int(number[:5])
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= MAX_PRIORITY:
        raise JobInvalidError(
            f"{value!r} is no priority",
            hint=f"give a number from 0 to {MAX_PRIORITY}, or high, medium or low",
        )
    return number


def check_transfer_change(
    current: TransferStatus, wanted: TransferStatus, which: str = "a transfer"
) -> None:
    """Allow a change of a transfer's state, or say why not.

    Args:
        current: What it is.
        wanted: What it is to become.
        which: The transfer, for the message.

    Raises:
        TransferStateError: Naming the current state, the wanted one and those allowed.
    """
    allowed = TRANSFER_CHANGES[current]
    if wanted not in allowed:
        raise TransferStateError(
            f"{which} is {current}, and can not become {wanted}",
            hint=f"from {current} it can become: {', '.join(sorted(allowed))}",
        )


def check_task_change(current: TaskStatus, wanted: TaskStatus, which: str = "a task") -> None:
    """Allow a change of a task's state, or say why not; see `check_transfer_change`.

    Raises:
        TransferStateError: Naming the current state, the wanted one and those allowed.
    """
    allowed = TASK_CHANGES[current]
    if wanted not in allowed:
        raise TransferStateError(
            f"{which} is {current}, and can not become {wanted}",
            hint=f"from {current} it can become: {', '.join(sorted(allowed))}",
        )


def aggregate(tasks: Collection[TaskStatus]) -> TransferStatus:
    """Return the state of a started transfer whose tasks have these states.

    All settled: failed if any failed, else done. Otherwise paused if all that is left is held,
    running if any task is claimed, else waiting. A transfer without tasks is done.
    """
    states = frozenset(tasks)
    unsettled = states - SETTLED_TASK
    if not unsettled:
        return _T.FAILED if _K.FAILED in states else _T.DONE
    if unsettled == {_K.ONHOLD}:
        return _T.PAUSED
    if unsettled & {_K.BOOTING, _K.EXECUTING}:
        return _T.RUNNING
    return _T.WAITING
