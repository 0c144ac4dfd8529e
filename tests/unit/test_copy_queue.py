"""The ledger as the copying engine works through it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.transfer.copy_queue import KIND, CopyQueue, Outcome
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
from agent_plugin.transfer.states import TaskStatus, TransferStatus

SIZE = 10


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.db") as opened:
        tasks = [TaskSpec(f"/from/{n}", f"/to/{n}", SIZE) for n in range(3)]
        opened.create(TransferSpec(KIND, "/from/", "/to/"), tasks)
        yield opened


@pytest.fixture
def queue(ledger: Ledger) -> CopyQueue:
    queue = CopyQueue(ledger.file, lambda: 1_000_000.0)
    assert queue.take() == [1]
    return queue


def done(queue: CopyQueue, *tasks: int) -> None:
    queue.settle([Outcome(task, TaskStatus.DONE) for task in tasks])
    queue.beat({1: SIZE * len(tasks)}, ())


def test_a_transfer_is_summed_up_again_at_a_beat_only_if_that_took_little_of_the_time(
    ledger: Ledger, queue: CopyQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 15,000 tasks the sums had taken a third of the engine's time.

    Seen to fail when they are made at each beat, and when what was left out is forgotten.
    """
    monkeypatch.setattr("agent_plugin.transfer.copy_queue.COUNT_SHARE", 1e12)
    first, second, third = (task.id for task in queue.claim(3, ()))
    done(queue, first)
    assert ledger.transfer(1).done == SIZE
    done(queue, second)
    assert ledger.transfer(1).done == SIZE

    monkeypatch.setattr(queue, "_next_count", 0.0)
    queue.beat({}, ())
    assert ledger.transfer(1).done == 2 * SIZE

    done(queue, third)
    assert queue.let_go((), stopping=False) == {1: TransferStatus.DONE}
    assert ledger.transfer(1).done == 3 * SIZE


def test_what_has_ended_together_is_written_together(ledger: Ledger, queue: CopyQueue) -> None:
    """Seen to fail when each outcome has a transaction of its own."""
    claimed = queue.claim(3, ())
    statements: list[str] = []
    with ledger.file.read() as connection:
        connection.set_trace_callback(statements.append)
        queue.settle([Outcome(task.id, TaskStatus.DONE) for task in claimed])
        queue.settle([])
        connection.set_trace_callback(None)

    assert statements.count("COMMIT") == 1
    assert {task.status for task in ledger.tasks(1)} == {TaskStatus.DONE}
