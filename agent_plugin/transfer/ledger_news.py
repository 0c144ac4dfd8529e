"""What an engine reads of its tasks: all when it begins, then what people have changed since."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from agent_plugin.transfer.ledger_file import from_sql
from agent_plugin.transfer.states import TaskStatus


@dataclass(frozen=True, slots=True)
class TaskNews:
    """A task as its engine has to know it.

    Attributes:
        size: Bytes.
        by_hand: Whether a person has set its status.
    """

    id: int
    source: str
    destination: str
    size: int
    status: TaskStatus
    priority: int
    by_hand: bool


@dataclass(frozen=True, slots=True)
class News:
    """What an engine has not read yet.

    Attributes:
        last: Number of the last event that is in here, or before it.
        tasks: By their ids.
        modifier: `uid:name` of who has set the transfer's state last by hand.
    """

    last: int
    tasks: Mapping[int, TaskNews] = field(default_factory=dict)
    modifier: str = ""


# Of a transfer that is held or stopped; others may have changed something else of it since.
STATE_SET_BY: Final = (
    "CASE WHEN status IN ('paused', 'aborted') THEN coalesce((SELECT who FROM event"
    " WHERE event.transfer = transfer.id AND event.task IS NULL AND what = 'status=' || status"
    " ORDER BY event.id DESC LIMIT 1), modifier) ELSE modifier END"
)
_COLUMNS: Final = "id, source, destination, size, status, priority, modifier"


def read_news(connection: sqlite3.Connection, transfer_id: int, since: int | None) -> News:
    """Return all tasks of a transfer, or those that were changed by hand after an event."""
    # First, so that what comes in between is told again rather than missed.
    (last, modifier) = connection.execute(
        f"SELECT coalesce((SELECT max(id) FROM event WHERE transfer = ?1), 0), {STATE_SET_BY}"  # noqa: S608 - a constant
        " FROM transfer WHERE id = ?1",
        (transfer_id,),
    ).fetchone()
    if since is not None and last <= since:
        return News(since, modifier=modifier)
    changed = " AND id IN (SELECT task FROM event WHERE transfer = ?1 AND id > ?2)"
    arguments = (transfer_id,) if since is None else (transfer_id, since)
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM task WHERE transfer = ?1"  # noqa: S608 - constants
        f"{'' if since is None else changed} ORDER BY id",
        arguments,
    )
    return News(
        last,
        {
            row[0]: TaskNews(
                row[0],
                from_sql(row[1]),
                from_sql(row[2]),
                row[3],
                TaskStatus(row[4]),
                row[5],
                bool(row[6]),
            )
            for row in rows
        },
        modifier,
    )
