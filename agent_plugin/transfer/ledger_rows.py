"""What the ledger is asked for and what it tells: transfers, tasks, results, as values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agent_plugin.transfer.ledger_file import from_sql
from agent_plugin.transfer.states import DEFAULT_PRIORITY, TaskStatus, TransferStatus

# The kind of what people create.
COPY: Final = "copy"


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What a transfer is to do, and for whom.

    Attributes:
        kind: `sync-in`, `sync-step`, `sync-out`, `submit`, `outputs`, or another's.
        source: A store URL or a directory.
        destination: A directory or a store URL; empty while it is not known.
        session: Key of the session's state file; empty outside sessions.
        title: Its name for people; empty for one that says what it does.
        required: Whether its session action waits for it.
    """

    kind: str
    source: str
    destination: str
    session: str = ""
    job: str = ""
    step: str = ""
    task: str = ""
    title: str = ""
    required: bool = True

    @property
    def name(self) -> str:
        """A line for people."""
        return self.title or f"{self.kind} {self.source} -> {self.destination}"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One file of a transfer: where from, where to, how many bytes, and how urgent.

    Attributes:
        uri: Its name within the transfer; empty for the next number.
    """

    source: str
    destination: str
    size: int
    priority: int = DEFAULT_PRIORITY
    metadata: Mapping[str, Any] = field(default_factory=dict)
    uri: str = ""


@dataclass(frozen=True, slots=True)
class TransferRow:
    """A transfer as the ledger has it; sizes in bytes, times in seconds since the epoch.

    Attributes:
        size: Of the tasks that are not excluded; -1 in init.
        modifier: `uid:name` of who changed it last by hand; empty if nobody has.
        settings: What its engine is to heed.
        metadata: Whatever its owner wants to keep with it.
        lease_owner: `pid:start-time` of the process that carries it out; empty for none.
        lease_until: Until when that is believed.
    """

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
    priority: int
    required: bool
    job: str
    step: str
    task: str
    modifier: str
    settings: Mapping[str, Any]
    metadata: Mapping[str, Any]
    modified: float
    lease_owner: str
    lease_until: float


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as the ledger has it.

    Attributes:
        tries: How many attempts were begun.
        not_before: When the request that failed last is sent again, seconds since the epoch.
        uri: Its name within the transfer: what it was given, or its number as text.
        done: Bytes that have moved.
        modifier: `uid:name` of who set its status by hand; empty if its engine has.
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
    transfer: int
    uri: str
    priority: int
    done: int
    modifier: str
    metadata: Mapping[str, Any]
    created: float
    started: float | None
    finished: float | None


@dataclass(frozen=True, slots=True)
class DeadUpload:
    """An upload in parts that its process has not lived to end.

    Attributes:
        task: The task's id.
        transfer_destination: Of its transfer.
        destination: The task's own.
        metadata: The task's.
        upload_id: The store's.
    """

    task: int
    transfer_destination: str
    destination: str
    metadata: Mapping[str, Any]
    upload_id: str


TRANSFER_COLUMNS: Final = (
    "id, name, kind, status, source, destination, session, size, done,"
    " error_code, error, created, finished, priority, required, job, step, task, modifier,"
    " settings, metadata, modified, lease_owner, lease_until"
)
TASK_COLUMNS: Final = (
    "id, status, source, destination, size, tries, not_before, error_code, error, transfer, uri,"
    " priority, done, modifier, metadata, created, started, finished"
)


def transfer_row(row: Sequence[Any]) -> TransferRow:
    """Return what TRANSFER_COLUMNS selected."""
    return TransferRow(
        row[0], from_sql(row[1]), row[2], TransferStatus(row[3]), from_sql(row[4]),
        from_sql(row[5]), row[6], row[7], row[8], row[9], from_sql(row[10]), row[11], row[12],
        row[13], bool(row[14]), row[15], row[16], row[17], row[18], from_json(row[19]),
        from_json(row[20]), *row[21:],
    )  # fmt: skip


def task_row(row: Sequence[Any]) -> TaskRow:
    """Return what TASK_COLUMNS selected."""
    return TaskRow(
        row[0], TaskStatus(row[1]), from_sql(row[2]), from_sql(row[3]), row[4], row[5], row[6],
        row[7], from_sql(row[8]), row[9], row[10], row[11], row[12], row[13], from_json(row[14]),
        *row[15:],
    )  # fmt: skip


def to_json(value: object) -> str:
    """Return a value as the ledger keeps it; what is not UTF-8 is escaped."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def from_json(text: str) -> Any:  # noqa: ANN401 - whatever it is
    """Return what `to_json` was given."""
    return json.loads(text) if text != "{}" else {}
