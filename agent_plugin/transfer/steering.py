"""How a running transfer obeys: what people want of it is read at each beat, and done.

The engine's own thread calls `tick` wherever it has a moment, at least at each part boundary. A
pause is wished of `halt`, so that the crew begins nothing further; `tick` does not return before it
is over. What is aborted ends by an error, what is called done by hand by `EndedByHandError`, which
the engine takes for its end. Which tasks are set aside by hand is known here, and looked at before
each is placed or sent.

A transfer of lower priority gives way: while one of higher priority runs on this host it begins
nothing further. What it has in hand comes to its end, and then it holds nothing that the other one
could need; only the claim on a large blob that it is in the middle of, for which the other one
waits a minute at most.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.errors import TransferStateError
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.engine import TICK_SECONDS
from agent_plugin.transfer.ledger import TransferRow
from agent_plugin.transfer.ledger_begin import aborted
from agent_plugin.transfer.ledger_news import TaskNews
from agent_plugin.transfer.progress import Meter, SilentView, View
from agent_plugin.transfer.states import DEFAULT_PRIORITY, TaskStatus, TransferStatus, aggregate

log = events.get_logger()

BEAT_SECONDS: Final = 0.5
# A task in one of these is not for the engine, unless its engine has put it there.
_ASIDE: Final = frozenset(
    {TaskStatus.EXCLUDED, TaskStatus.ONHOLD, TaskStatus.FAILED, TaskStatus.DONE}
)


class EndedByHandError(TransferStateError):
    """A person has said that a transfer is done, before it was; not every engine can end so."""


class Steering:
    """What people want of one running transfer, and what the ledger is told of it.

    Args:
        context: The services.
        row: The transfer, which this process has begun.
        halt: The crew's.
        meter: Counts what is in place.
        on_news: Told tasks that people have changed, on the thread that calls `tick`.

    Attributes:
        tasks: The ids of the tasks, by source and destination.
        meter: As it was given.
        view: Shows how far it is.
        on_pause: Told why, when it is paused, on the thread that calls `tick`; what it raises ends
            the transfer's engine, which otherwise waits.
    """

    def __init__(
        self,
        context: TransferContext,
        row: TransferRow,
        halt: Cancellation,
        meter: Meter,
        on_news: Callable[[Collection[TaskNews]], None],
    ) -> None:
        self._context = context
        self._row = row
        self._halt = halt
        self.meter = meter
        self._on_news = on_news
        self.view: View = SilentView()
        self.on_pause: Callable[[str], None] = lambda _reason: None
        news = context.ledger.news(row.id)
        self._last_news = news.last
        self.tasks = {(task.source, task.destination): task.id for task in news.tasks.values()}
        self._priorities = {
            task.id: task.priority
            for task in news.tasks.values()
            if task.priority != DEFAULT_PRIORITY
        }
        self._aside = {task.id: task.status for task in news.tasks.values() if _is_set_aside(task)}
        # Tasks that were done when a killed run had begun are in the ledger's count already.
        self._left = {
            task.id
            for task in news.tasks.values()
            if task.status not in (TaskStatus.DONE, TaskStatus.EXCLUDED)
        }
        # Whether it is paused because all that is left is held, and not by a person.
        self._holding = row.status is TransferStatus.PAUSED and (
            aggregate({task.status for task in news.tasks.values()}) is TransferStatus.PAUSED
        )
        self._held_before = frozenset(self._aside.items())
        if row.status is TransferStatus.PAUSED:
            # Before the first beat, since the crew begins as soon as it is asked.
            halt.pause()
        self._yielding = False
        self._settled: set[int] = set()
        self._counting = threading.Lock()
        self._moved = 0
        self._found = 0
        self._next_beat = 0.0

    # ------------------------------------------------------------------------------ its tasks

    def is_open(self, task: int) -> bool:
        """Whether a task is still to be done, and not excluded, held or settled by hand."""
        return task not in self._aside and task not in self._settled

    def is_excluded(self, task: int) -> bool:
        """Whether a task was taken out by hand."""
        return self._aside.get(task) is TaskStatus.EXCLUDED

    def is_held(self, task: int) -> bool:
        """Whether a task is held by hand."""
        return self._aside.get(task) is TaskStatus.ONHOLD

    def is_settled(self, task: int) -> bool:
        """Whether this engine has done a task."""
        return task in self._settled

    def settle(self, task: int) -> None:
        """Note that a task is done."""
        self._settled.add(task)
        self._context.ledger.note(task, TaskStatus.DONE)

    def plan(self, task: int, size: int) -> None:
        """Take into account, before anything moves, what had been set aside of a task's bytes."""
        aside = self._aside.get(task)
        if aside is TaskStatus.EXCLUDED:
            self.meter.expect(-size, files=-1)
        elif aside is TaskStatus.DONE:
            self.meter.advance(size, files=1)

    @property
    def sets_aside(self) -> bool:
        """Whether any task is set aside."""
        return bool(self._aside)

    def priority(self, tasks: Iterable[int]) -> int:
        """Return the highest priority of some tasks."""
        if not self._priorities:
            return DEFAULT_PRIORITY
        return max(
            (self._priorities.get(task, DEFAULT_PRIORITY) for task in tasks),
            default=DEFAULT_PRIORITY,
        )

    @property
    def holds(self) -> bool:
        """Whether a task is held by hand."""
        return bool(self._aside) and TaskStatus.ONHOLD in self._aside.values()

    def refuse_given_up(self) -> None:
        """See that no task was set to failed by hand.

        Raises:
            TransferStateError: One was.
        """
        given_up = [task for task, status in self._aside.items() if status is TaskStatus.FAILED]
        if given_up:
            raise TransferStateError(
                f"{len(given_up)} tasks of transfer {self._row.id} were set to failed by hand",
                hint="exclude them, and run the same command again",
            )

    # -------------------------------------------------------------------------------- counting

    def count(self, task: int, size: int, *, files: int = 0, moved: bool = True) -> None:
        """Count bytes of a task that are in place now; any thread may call this.

        Args:
            task: The task.
            size: Further bytes; negative if some that were counted are not in place after all.
            files: Further files that are complete.
            moved: Whether they were moved, rather than found to be there.
        """
        self.meter.advance(size, files=files)
        if task in self._left:
            with self._counting:
                if moved:
                    self._moved += size
                else:
                    self._found += size

    # -------------------------------------------------------------------------------- obeying

    def tick(self) -> None:
        """Stop or wait if that is wished, and say now and then how far it is.

        Raises:
            CancelledError: Cancellation was wished.
            TransferAbortedError: A person aborted the transfer.
            EndedByHandError: A person has said that it is done.
        """
        self._context.cancellation.check()
        if self.beats_now:
            self.beat()

    @property
    def beats_now(self) -> bool:
        """Whether it is time for a beat."""
        return time.monotonic() >= self._next_beat

    def beat(self) -> None:
        """Say how far it is now, and do what is wished; see `tick`."""
        waits_for = self._beat("")
        while waits_for:
            if not self._yielding:
                self.on_pause(waits_for)
            self._halt.pause()
            self._context.cancellation.sleep(TICK_SECONDS)
            if self.beats_now:
                waits_for = self._beat(waits_for)
        self._halt.resume()

    def wait_for_held(self) -> None:
        """Pause, since all that is left is held by hand, until people change something of that."""
        self._holding = True
        self._context.ledger.hold(self._row.id)
        self._held_before = frozenset(self._aside.items())
        self.beat()
        # It was not to be paused if that took no time.
        self._context.cancellation.sleep(TICK_SECONDS)

    def finish(self) -> None:
        """Say how far it is at its end, when nothing is left that could wait."""
        self._beat("")

    def _beat(self, waited_for: str) -> str:
        """Tell the ledger how far it is; return why nothing is to move, empty if that is not so."""
        self._next_beat = time.monotonic() + BEAT_SECONDS
        with self._counting:
            moved, self._moved = self._moved, 0
            found, self._found = self._found, 0
        ledger = self._context.ledger
        status = ledger.beat(self._row.id, moved, found, yielding=self._yielding)
        news = ledger.news(self._row.id, self._last_news)
        if status is TransferStatus.ABORTED:
            raise aborted(self._row.id, news.modifier)
        if status is TransferStatus.DONE:
            raise EndedByHandError(
                f"transfer {self._row.id} was called done by hand before it was",
                hint="run the same command again for what is missing",
            )
        self._last_news = news.last
        if news.tasks:
            self._take_news(list(news.tasks.values()))
        waits_for = self._waits_for(status, news.modifier)
        if waits_for and waits_for != waited_for:
            extra = {"transfer": self._row.id, "reason": waits_for}
            log.info(events.TRANSFER_HELD, extra=extra)
        if waited_for and not waits_for:
            log.info(events.TRANSFER_CONTINUED, extra={"transfer": self._row.id})
        self.view.show(self.meter.snapshot(waits_for))
        return waits_for

    def _waits_for(self, status: TransferStatus, modifier: str) -> str:
        ledger = self._context.ledger
        if status is TransferStatus.PAUSED:
            if not self._holding:
                return f"transfer {self._row.id} is paused by {modifier or 'nobody'}"
            if frozenset(self._aside.items()) == self._held_before:
                return f"all that is left of transfer {self._row.id} is on hold"
            ledger.unhold(self._row.id)
        self._holding = False
        other = ledger.outranked(self._row.id)
        self._yielding = other is not None
        return f"transfer {self._row.id} gives way to transfer {other}" if other else ""

    def _take_news(self, tasks: Collection[TaskNews]) -> None:
        for task in tasks:
            self._priorities[task.id] = task.priority
            if task.id in self._settled:
                if not (task.by_hand and task.status is TaskStatus.QUEUED):
                    # It was done before that was read.
                    continue
                self._settled.discard(task.id)
                self.count(task.id, -task.size, files=-1, moved=False)
            before = self._aside.pop(task.id, None)
            after = task.status if _is_set_aside(task) else None
            if after is not None:
                self._aside[task.id] = after
            self._move_aside(task, before, after)
        self._on_news(tasks)

    def _move_aside(
        self, task: TaskNews, before: TaskStatus | None, after: TaskStatus | None
    ) -> None:
        """Count a task among what is expected, or done, as it is now."""
        if (before is TaskStatus.EXCLUDED) != (after is TaskStatus.EXCLUDED):
            sign = -1 if after is TaskStatus.EXCLUDED else 1
            self.meter.expect(sign * task.size, files=sign)
        if before is not None and after is None:
            self._left.add(task.id)
        if (before is TaskStatus.DONE) != (after is TaskStatus.DONE):
            sign = 1 if after is TaskStatus.DONE else -1
            self._left.add(task.id)
            self.count(task.id, sign * task.size, files=sign, moved=False)


def _is_set_aside(task: TaskNews) -> bool:
    """Whether a task is not for the engine.

    What is done, or failed, by an engine's word is for it if it finds that it is to be done.
    """
    return task.status in _ASIDE and (
        task.by_hand or task.status in (TaskStatus.EXCLUDED, TaskStatus.ONHOLD)
    )
