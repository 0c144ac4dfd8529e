"""Whose turn it is among the tasks of copying transfers: by priority, and not by who was first.

The rule is that of all transfers (steering.py): while one of higher priority moves something on
this host, one of lower begins nothing further. Within a transfer, what has the higher priority has
the places: what it takes one from pauses at its next part, and goes on when there is a place again.
Pure.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

WAITING: Final = 0
PAUSED: Final = 1
MOVING: Final = 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A task that could move something now.

    Attributes:
        id: Of the task; a lower one is older.
        transfer_priority, priority: Of its transfer, and its own.
        state: WAITING, PAUSED for another one's sake, or MOVING.
    """

    id: int
    transfer_priority: int
    priority: int
    state: int


@dataclass(frozen=True, slots=True)
class Turns:
    """Whose turn it is.

    Attributes:
        moving: The tasks under way that go on; the others pause.
        free: How many of those that wait can begin.
        priority: Transfers of a lower one give way.
    """

    moving: frozenset[int]
    free: int
    priority: int


def turns(candidates: Iterable[Candidate], places: int, elsewhere: int) -> Turns:
    """Return whose turn it is.

    Args:
        candidates: All that are under way, and as many of those that wait as there are places.
        places: How many tasks may move at once.
        elsewhere: The highest priority of what other processes move; -1 for nothing.
    """
    known = list(candidates)
    highest = max((each.transfer_priority for each in known), default=-1)
    priority = max(highest, elsewhere)
    # What was begun goes before what has the same priority, so that it comes to an end.
    ordered = sorted(
        (each for each in known if each.transfer_priority == priority),
        key=lambda each: (-each.priority, -each.state, each.id),
    )
    chosen = ordered[:places]
    return Turns(
        frozenset(each.id for each in chosen if each.state != WAITING),
        sum(each.state == WAITING for each in chosen),
        priority,
    )
