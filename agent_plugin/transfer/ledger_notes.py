"""What is noted of tasks while they move, written to the ledger a batch at a time."""

import sqlite3
import threading
from dataclasses import dataclass

from agent_plugin.content.errors import PropmasterError
from agent_plugin.transfer.ledger_file import to_sql
from agent_plugin.transfer.states import TaskStatus

_SQL = (
    "UPDATE task SET status = coalesce(?1, status), error_code = ?2, error = ?3,"
    " tries = tries + ?4, not_before = ?5, started = coalesce(started, ?6),"
    " finished = CASE WHEN ?1 IN ('done', 'failed') THEN ?6 END WHERE id = ?7"
)


@dataclass(slots=True)
class _Note:
    """What has become of a task since its row was written; no status if that has not changed."""

    status: TaskStatus | None = None
    error_code: str = ""
    error: str = ""
    attempts: int = 0
    not_before: float = 0.0


class Notes:
    """The last state of each task, and how many attempts of it were begun meanwhile.

    From any thread: the lock is held for moments only, and never while the disk is waited for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notes: dict[int, _Note] = {}

    def __bool__(self) -> bool:
        return bool(self._notes)

    def state(self, task_id: int, status: TaskStatus, error: PropmasterError | None) -> None:
        """Note a state; `booting` begins an attempt."""
        with self._lock:
            note = self._notes.setdefault(task_id, _Note())
            note.status = status
            note.error_code, note.error = (error.code, error.message) if error else ("", "")
            note.attempts += status is TaskStatus.BOOTING
            note.not_before = 0.0

    def retry(self, task_id: int, error: PropmasterError, not_before: float) -> None:
        """Note that an attempt has failed, and when the next one begins."""
        with self._lock:
            note = self._notes.setdefault(task_id, _Note())
            note.error_code, note.error = error.code, error.message
            note.attempts += 1
            note.not_before = not_before

    def write(self, connection: sqlite3.Connection, now: float, most: int) -> None:
        """Write up to so many notes, in the caller's transaction, and drop them."""
        with self._lock:
            notes = [self._notes.popitem() for _ in range(min(most, len(self._notes)))]
        connection.executemany(
            _SQL,
            (
                (
                    note.status,
                    note.error_code,
                    to_sql(note.error),
                    note.attempts,
                    note.not_before,
                    now,
                    task_id,
                )
                for task_id, note in notes
            ),
        )
