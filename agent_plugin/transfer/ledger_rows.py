"""What the ledger is asked for and what it tells: transfers and tasks as values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent_plugin.transfer.ledger_file import from_sql
from agent_plugin.transfer.states import TaskStatus, TransferStatus


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What a transfer is to do, and for whom.

    Attributes:
        kind: `sync-in`, `sync-step`, `sync-out`, `submit` or `outputs`.
        source: A store URL or a directory.
        destination: A directory or a store URL.
        session: Key of the session's state file; empty outside sessions.
    """

    kind: str
    source: str
    destination: str
    session: str = ""
    job: str = ""
    step: str = ""
    task: str = ""

    @property
    def name(self) -> str:
        """A line for people."""
        return f"{self.kind} {self.source} -> {self.destination}"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One file of a transfer: where from, where to, how many bytes."""

    source: str
    destination: str
    size: int


@dataclass(frozen=True, slots=True)
class TransferRow:
    """A transfer as the ledger has it; sizes in bytes, times in seconds since the epoch."""

    id: int
    name: str
    kind: str
    status: TransferStatus
    source: str
    destination: str
    session: str
    size: int
    done: int
    error_code: str
    error: str
    created: float
    finished: float | None


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as the ledger has it.

    Attributes:
        tries: How many attempts were begun.
        not_before: When the request that failed last is sent again, seconds since the epoch.
    """

    id: int
    status: TaskStatus
    source: str
    destination: str
    size: int
    tries: int
    not_before: float
    error_code: str
    error: str


TRANSFER_COLUMNS: Final = (
    "id, name, kind, status, source, destination, session, size, done,"
    " error_code, error, created, finished"
)
TASK_COLUMNS: Final = "id, status, source, destination, size, tries, not_before, error_code, error"


def transfer_row(row: Sequence[Any]) -> TransferRow:
    """Return what TRANSFER_COLUMNS selected."""
    return TransferRow(
        row[0], from_sql(row[1]), row[2], TransferStatus(row[3]), from_sql(row[4]),
        from_sql(row[5]), row[6], row[7], row[8], row[9], from_sql(row[10]), row[11], row[12],
    )  # fmt: skip


def task_row(row: Sequence[Any]) -> TaskRow:
    """Return what TASK_COLUMNS selected."""
    return TaskRow(
        row[0], TaskStatus(row[1]), from_sql(row[2]), from_sql(row[3]), row[4], row[5], row[6],
        row[7], from_sql(row[8]),
    )  # fmt: skip
