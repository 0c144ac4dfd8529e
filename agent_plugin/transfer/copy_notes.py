"""What the copying engine writes of its tasks; kept back while another process has the ledger.

Nobody who moves bytes waits for the ledger for longer than a moment. What could not be written is
written by the next beat, in the order in which it was told. A kill loses what was kept back: then
the task is found as it was, and what has moved is found at its place.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any, Final

from agent_plugin.content.errors import PropmasterError
from agent_plugin.transfer.ledger_begin import lease_owner
from agent_plugin.transfer.ledger_file import LedgerBusyError, LedgerFile, to_sql
from agent_plugin.transfer.states import TaskStatus

# A beat comes four times a second, and is not to be held up.
PATIENCE_SECONDS: Final = 0.1
# After a wait in vain, so that threads do not queue up for the next one.
_LEFT_ALONE_SECONDS: Final = 0.2
# Of a task whose transfer another engine may have taken over, while this process stood still.
_OURS: Final = "(SELECT lease_owner FROM transfer WHERE id = task.transfer) = ?"
_KEEP: Final = (
    f"UPDATE task SET upload_id = ?, parts = ?, done = min(size, ?) WHERE id = ? AND {_OURS}"  # noqa: S608 - constant
)
_MEASURE: Final = f"UPDATE task SET size = ? WHERE id = ? AND {_OURS}"  # noqa: S608 - constant
_SETTLE: Final = (
    "UPDATE task SET status = ?1, error_code = ?2, error = ?3, not_before = ?4,"  # noqa: S608 - constant
    " finished = CASE WHEN ?1 IN ('done', 'failed') THEN ?5 END,"
    " done = CASE ?1 WHEN 'done' THEN size ELSE done END,"
    " upload_id = CASE ?1 WHEN 'done' THEN '' ELSE upload_id END,"
    " parts = CASE ?1 WHEN 'done' THEN '[]' ELSE parts END"
    f" WHERE id = ?6 AND status IN ('booting', 'executing') AND {_OURS}7"
)


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


@dataclass(slots=True)
class _Note:
    """What is to be written of a task; None for what has not changed."""

    size: int | None = None
    kept: tuple[str, str, int] | None = None
    settled: tuple[Outcome, float] | None = None


class CopyNotes:
    """The notes of one engine; from any thread.

    Args:
        file: The ledger.
        clock: Seconds since the epoch.
    """

    def __init__(self, file: LedgerFile, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._notes: dict[int, _Note] = {}
        self._alone_until = 0.0

    @property
    def pending(self) -> bool:
        """Whether something could not be written yet."""
        return bool(self._notes)

    def keep(self, task_id: int, upload_id: str, kept: Mapping[str, Any], done: int) -> None:
        """Write down what there is of a task, so that another attempt can go on from there."""
        document = json.dumps(kept) if kept else "[]"
        with self._lock:
            self._notes.setdefault(task_id, _Note()).kept = upload_id, document, done
        self.write()

    def measured(self, task_id: int, size: int) -> None:
        """Write down how large the source turned out to be."""
        with self._lock:
            self._notes.setdefault(task_id, _Note()).size = size
        self.write()

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Write what has become of tasks, unless a person has said something else meanwhile.

        Nothing is written either of a task whose transfer is another engine's by now.
        """
        if not outcomes:
            return
        now = self._clock()
        with self._lock:
            for outcome in outcomes:
                self._notes.setdefault(outcome.task_id, _Note()).settled = outcome, now
        self.write()

    def write(self, patience: float = 0.0) -> None:
        """Write what is there to be written, or leave it for later.

        Args:
            patience: Seconds to wait for another process that writes; 0: a moment, and an error is
                none.

        Raises:
            LedgerBusyError: It took longer than was to be waited.
            NoSpaceError, LocalWriteError: The ledger can not be written.
        """
        with self._lock:
            if not self._notes or (not patience and time.monotonic() < self._alone_until):
                return
            try:
                with self._file.write(patience=patience or PATIENCE_SECONDS) as connection:
                    owner = lease_owner()
                    for task_id, note in self._notes.items():
                        _write(connection, task_id, note, owner)
            except LedgerBusyError:
                if patience:
                    raise
                self._alone_until = time.monotonic() + _LEFT_ALONE_SECONDS
            else:
                self._notes.clear()


def _write(connection: Connection, task_id: int, note: _Note, owner: str | None) -> None:
    if note.size is not None:
        connection.execute(_MEASURE, (note.size, task_id, owner))
    if note.kept is not None:
        connection.execute(_KEEP, (*note.kept, task_id, owner))
    if note.settled is not None:
        outcome, now = note.settled
        error = outcome.error
        code, message = (error.code, to_sql(error.message)) if error else ("", "")
        values = (outcome.status, code, message, outcome.not_before, now, task_id, owner)
        connection.execute(_SETTLE, values)
