"""What is noted of tasks while they move, written to the ledger a batch at a time."""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

from agent_plugin.content.errors import PropmasterError
from agent_plugin.content.store import SentPart
from agent_plugin.transfer.ledger_file import to_sql
from agent_plugin.transfer.ledger_rows import to_json
from agent_plugin.transfer.states import TaskStatus

# A task that a person has taken out, or held, meanwhile does not begin by a note that is older:
# what its engine had of it is dropped. What is done is done.
_SQL = (
    "UPDATE task SET status = CASE WHEN modifier != '' AND status IN ('excluded', 'onhold')"
    " AND ?1 IN ('booting', 'executing') THEN status ELSE coalesce(?1, status) END,"
    " modifier = CASE WHEN ?1 IN ('excluded', 'done', 'failed') THEN '' ELSE modifier END,"
    " error_code = coalesce(?2, error_code), error = coalesce(?3, error), tries = tries + ?4,"
    " not_before = coalesce(?5, not_before),"
    " started = coalesce(started, ?6),"
    " finished = CASE WHEN ?1 IN ('done', 'failed') THEN ?6 END,"
    " done = CASE WHEN ?1 = 'done' THEN size WHEN ?1 IN ('queued', 'excluded') THEN 0"
    " ELSE max(0, min(size, done + ?7)) END,"
    " upload_id = CASE WHEN ?1 = 'done' THEN '' ELSE coalesce(?8, upload_id) END,"
    " parts = CASE WHEN ?1 = 'done' THEN '[]' ELSE coalesce(?9, parts) END WHERE id = ?10"
)


@dataclass(slots=True)
class _Note:
    """What has become of a task since its row was written; None for what has not changed."""

    status: TaskStatus | None = None
    error_code: str | None = None
    error: str | None = None
    attempts: int = 0
    not_before: float | None = None
    moved: int = 0
    upload_id: str | None = None
    parts: Sequence[SentPart] | None = None

    def add(self, later: "_Note") -> None:
        """Take what was noted after this one."""
        self.attempts += later.attempts
        self.moved += later.moved
        for name in ("status", "error_code", "error", "not_before", "upload_id", "parts"):
            if (value := getattr(later, name)) is not None:
                setattr(self, name, value)


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

    def moved(self, task_id: int, size: int) -> None:
        """Note further bytes of a task that is under way."""
        with self._lock:
            self._notes.setdefault(task_id, _Note()).moved += size

    def upload(self, task_id: int, upload_id: str, parts: Sequence[SentPart]) -> None:
        """Note how far an upload in parts is; no id: there is none any more."""
        with self._lock:
            note = self._notes.setdefault(task_id, _Note())
            note.upload_id, note.parts = upload_id, parts

    @contextmanager
    def to_write(self, most: int) -> Iterator["Batch"]:
        """Lend what writes up to so many notes; when that comes to nothing, they are kept."""
        batch = Batch(self._take, most)
        try:
            yield batch
        except BaseException:
            self._put_back(batch.taken)
            raise

    def _take(self, most: int) -> list[tuple[int, _Note]]:
        with self._lock:
            return [self._notes.popitem() for _ in range(min(most, len(self._notes)))]

    def _put_back(self, taken: Sequence[tuple[int, _Note]]) -> None:
        with self._lock:
            for task_id, note in taken:
                if (later := self._notes.get(task_id)) is not None:
                    note.add(later)
                self._notes[task_id] = note


class Batch:
    """Notes of one transaction; made by Notes.to_write, within which it ends."""

    def __init__(self, take: Callable[[int], list[tuple[int, _Note]]], most: int) -> None:
        self._take = take
        self._most = most
        self.taken: Sequence[tuple[int, _Note]] = ()

    def write(self, connection: sqlite3.Connection, now: float) -> None:
        """Write them, in the caller's transaction."""
        self.taken = self._take(self._most)
        connection.executemany(
            _SQL,
            (
                (
                    note.status,
                    note.error_code,
                    None if note.error is None else to_sql(note.error),
                    note.attempts,
                    note.not_before,
                    now,
                    note.moved,
                    note.upload_id,
                    None if note.parts is None else to_json([astuple(p) for p in note.parts]),
                    task_id,
                )
                for task_id, note in self.taken
            ),
        )
