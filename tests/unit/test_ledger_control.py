"""What people change of transfers and tasks: within the tables, all or nothing, and told."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.errors import (
    CancelledError,
    JobInvalidError,
    ReadOnlyAttributeError,
    StoreUnavailableError,
    TransferAbortedError,
    TransferStateError,
)
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer import ledger_create
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.states import (
    SETTABLE_TRANSFER,
    TRANSFER_CHANGES,
    TaskStatus,
    TransferStatus,
    is_so_already,
)
from tests.unit.ledger_reads import told

SPEC = TransferSpec("copy", "/from", "/to", job="job-1")
TASKS = (TaskSpec("a", "one", 10), TaskSpec("b", "two", 200), TaskSpec("c", "three", 3000))
WHO = "1000:ada"


@pytest.fixture
def now() -> list[float]:
    return [1_000_000.0]


@pytest.fixture
def ledger(tmp_path: Path, now: list[float]) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.db", clock=lambda: now[0]) as opened:
        yield opened


def states(ledger: Ledger, transfer: int) -> list[str]:
    return [str(task.status) for task in ledger.tasks(transfer)]


def ids(ledger: Ledger, transfer: int) -> list[int]:
    return [task.id for task in ledger.tasks(transfer)]


def finished(ledger: Ledger, *, failed: tuple[int, ...] = ()) -> TransferRow:
    """Return a transfer of which all tasks are done, but those that failed."""
    row = ledger.begin(SPEC, TASKS)
    for at, task in enumerate(ids(ledger, row.id)):
        ledger.note(task, TaskStatus.FAILED if at in failed else TaskStatus.DONE)
    error = StoreUnavailableError("no") if failed else None
    return ledger.finish(row.id, error)


# -------------------------------------------------------------------------------------- create


def test_t4_a_new_transfer_waits_with_its_tasks_and_is_nobodys(ledger: Ledger) -> None:
    row = ledger.create(
        SPEC, TASKS, priority="high", metadata={"shot": "sc010"}, settings={"a": 1}, modifier=WHO
    )

    assert (row.status, row.size, row.done, row.priority) == (
        TransferStatus.WAITING, 3210, 0, 999,
    )  # fmt: skip
    assert (row.metadata, row.settings, row.modifier) == ({"shot": "sc010"}, {"a": 1}, WHO)
    assert (row.lease_owner, row.lease_until, row.required) == ("", 0.0, False)
    assert states(ledger, row.id) == ["queued"] * 3
    assert [task.uri for task in ledger.tasks(row.id)] == ["0", "1", "2"]
    assert ledger.begin(SPEC, TASKS).id == row.id, "whoever carries it out begins it"


def test_t4_a_new_transfer_may_be_paused(ledger: Ledger) -> None:
    row = ledger.create(SPEC, TASKS, status=TransferStatus.PAUSED)

    assert (row.status, row.size) == (TransferStatus.PAUSED, 3210), "its size is measured"
    assert ledger.begin(SPEC, TASKS).status is TransferStatus.PAUSED


def test_t4_a_transfer_without_a_destination_is_pending_until_it_has_one(ledger: Ledger) -> None:
    row = ledger.create(TransferSpec("copy", "/from", ""), TASKS)

    assert (row.status, states(ledger, row.id)) == (TransferStatus.PENDING, ["pending"] * 3)
    with pytest.raises(TransferStateError, match="has no destination"):
        ledger.set_transfer(row.id, status=TransferStatus.WAITING)
    row = ledger.set_transfer(row.id, destination="/there")
    assert (row.destination, row.name) == ("/there", "copy /from -> /there")
    row = ledger.set_transfer(row.id, status=TransferStatus.WAITING)
    assert (row.status, states(ledger, row.id)) == (TransferStatus.WAITING, ["queued"] * 3)


def test_t5_what_was_aborted_while_it_was_pending_can_be_tried_again(ledger: Ledger) -> None:
    row = ledger.create(SPEC, TASKS, status=TransferStatus.PENDING)
    other = ledger.create(SPEC, TASKS, status=TransferStatus.PENDING)
    nowhere = ledger.create(TransferSpec("copy", "/from", ""), TASKS)
    for each in (row, other, nowhere):
        ledger.set_transfer(each.id, status=TransferStatus.ABORTED)

    ledger.set_transfer(row.id, status=TransferStatus.WAITING)
    ledger.add_tasks(other.id, [TaskSpec("d", "four", 4)])

    assert states(ledger, row.id) == ["queued"] * 3
    assert states(ledger, other.id) == ["queued"] * 4
    with pytest.raises(TransferStateError, match="has no destination"):
        ledger.set_transfer(nowhere.id, status=TransferStatus.WAITING)


def test_t6_no_two_tasks_have_the_same_uri(ledger: Ledger) -> None:
    """Whatever came twice when the transfer was made."""
    row = ledger.create(SPEC, [TASKS[0], TASKS[0], TASKS[1]])
    ledger.add_tasks(row.id, [TASKS[2]])
    ledger.begin(SPEC, [*TASKS, TaskSpec("d", "four", 4)])

    assert [task.uri for task in ledger.tasks(row.id)] == ["0", "2", "3", "4"]


@pytest.mark.parametrize("status", ["init", "running", "failed", "aborted", "done"])
def test_t4_a_new_transfer_can_not_be_anything_else(ledger: Ledger, status: str) -> None:
    with pytest.raises(TransferStateError, match=f"a new transfer can not be {status}"):
        ledger.create(SPEC, TASKS, status=TransferStatus(status))
    assert ledger.transfers() == []


def test_t4_what_could_not_be_made_whole_is_no_transfer_that_anyone_runs(ledger: Ledger) -> None:
    cancellation = Cancellation()

    def tasks() -> Iterator[TaskSpec]:
        for at in range(25_000):
            if at == 15_000:
                cancellation.cancel()
            yield TaskSpec("a", str(at), 1)

    with pytest.raises(CancelledError):
        ledger.create(SPEC, tasks(), cancellation=cancellation)
    [row] = ledger.transfers()
    assert (row.status, row.size) == (TransferStatus.ABORTED, -1)
    assert row.error == "whoever made it ended before all of its tasks were there; make it again"


# -------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("wanted", TransferStatus)
@pytest.mark.parametrize("current", TransferStatus)
def test_t5_a_transfer_is_set_only_as_the_tables_say(
    ledger: Ledger, tmp_path: Path, current: TransferStatus, wanted: TransferStatus
) -> None:
    row = ledger.create(SPEC, TASKS)
    with sqlite3.connect(tmp_path / "ledger.db") as other:
        other.execute("UPDATE transfer SET status = ?", (current,))
    other.close()

    if wanted in SETTABLE_TRANSFER and is_so_already(current, wanted):
        after = ledger.set_transfer(row.id, status=wanted, modifier=WHO)
        assert (after.status, after.modifier) == (current, ""), "nobody has changed anything"
        assert told(tmp_path / "ledger.db") == [(None, "created=waiting", "")]
        return
    if wanted in SETTABLE_TRANSFER and wanted in TRANSFER_CHANGES[current]:
        assert ledger.set_transfer(row.id, status=wanted, modifier=WHO).status is wanted
        assert told(tmp_path / "ledger.db")[-1] == (None, f"status={wanted}", WHO)
        return
    with pytest.raises(TransferStateError) as caught:
        ledger.set_transfer(row.id, status=wanted, priority=7, modifier=WHO)
    assert str(wanted) in caught.value.message
    assert caught.value.hint
    assert ledger.transfer(row.id).status is current
    assert ledger.transfer(row.id).priority == 500, "all or nothing"


def test_t5_priority_and_metadata_can_be_changed_at_any_time(
    ledger: Ledger, tmp_path: Path
) -> None:
    row = finished(ledger)

    row = ledger.set_transfer(row.id, priority="low", metadata={"note": "shot\udce9"}, modifier=WHO)

    assert (row.priority, row.metadata, row.modifier) == (1, {"note": "shot\udce9"}, WHO)
    assert row.status is TransferStatus.DONE
    assert told(tmp_path / "ledger.db") == [(None, "priority=1", WHO), (None, "metadata", WHO)]


@pytest.mark.parametrize("priority", [-1, 1001, "urgent", True, 5.5, None, "99999999999999"])
def test_t11_a_priority_is_a_number_to_1000_or_a_name(ledger: Ledger, priority: object) -> None:
    row = ledger.create(SPEC, TASKS)
    if priority is None:
        assert ledger.set_transfer(row.id, priority=None).priority == 500
        return
    with pytest.raises(JobInvalidError, match="is no priority"):
        ledger.set_transfer(row.id, priority=priority)  # type: ignore[arg-type]
    assert ledger.transfer(row.id).priority == 500


def test_t5_the_destination_can_be_changed_while_a_transfer_is_pending_only(
    ledger: Ledger,
) -> None:
    row = ledger.create(SPEC, TASKS)

    with pytest.raises(ReadOnlyAttributeError, match="which is waiting, can not be changed"):
        ledger.set_transfer(row.id, destination="/elsewhere", priority=3)
    assert (ledger.transfer(row.id).destination, ledger.transfer(row.id).priority) == ("/to", 500)
    ledger.set_transfer(row.id, status=TransferStatus.PENDING)
    assert states(ledger, row.id) == ["pending"] * 3
    assert ledger.set_transfer(row.id, destination="/elsewhere").destination == "/elsewhere"


def test_t5_what_failed_is_tried_again_when_a_transfer_is_resumed(ledger: Ledger) -> None:
    row = finished(ledger, failed=(1,))
    assert (row.status, row.error_code) == (TransferStatus.FAILED, "E_NETWORK")

    row = ledger.set_transfer(row.id, status=TransferStatus.WAITING)

    assert states(ledger, row.id) == ["done", "queued", "done"]
    assert (row.error_code, row.error, row.finished) == ("", "", None)
    assert (row.size, row.done) == (3210, 3010)


def test_t10_what_is_left_of_a_transfer_that_is_called_done_is_excluded(
    ledger: Ledger, now: list[float]
) -> None:
    row = ledger.begin(SPEC, TASKS)
    one, two, three = ids(ledger, row.id)
    ledger.note(one, TaskStatus.DONE)
    ledger.note(two, TaskStatus.EXECUTING)
    ledger.set_tasks(row.id, {three: {"status": "onhold"}}, WHO)
    ledger.finish(row.id, CancelledError("stopped"))

    row = ledger.set_transfer(row.id, status=TransferStatus.DONE, modifier=WHO)

    assert states(ledger, row.id) == ["done", "excluded", "excluded"]
    assert (row.size, row.done, row.finished) == (10, 10, now[0])


def test_t5_there_is_no_transfer_of_that_number(ledger: Ledger) -> None:
    with pytest.raises(TransferStateError, match="there is no transfer 9"):
        ledger.set_transfer(9, priority=1)
    with pytest.raises(TransferStateError, match="there is no transfer 9"):
        ledger.set_tasks(9, {}, WHO)
    with pytest.raises(TransferStateError, match="there is no transfer 9"):
        ledger.add_tasks(9, TASKS)


# --------------------------------------------------------------------------------- update many


def test_t6_tasks_are_changed_all_or_none(ledger: Ledger, tmp_path: Path) -> None:
    row = finished(ledger, failed=(1,))
    one, two, three = ids(ledger, row.id)
    before = ledger.tasks(row.id)

    with pytest.raises(TransferStateError, match="task 1 is done, and can not become onhold"):
        ledger.set_tasks(
            row.id,
            {two: {"status": "excluded"}, three: {"priority": 9}, one: {"status": "onhold"}},
            WHO,
        )
    with pytest.raises(TransferStateError, match=f"there is no task 99 in transfer {row.id}"):
        ledger.set_tasks(row.id, {two: {"status": "excluded"}, 99: {"priority": 9}}, WHO)
    with pytest.raises(ReadOnlyAttributeError, match="source of a task can not be changed") as e:
        ledger.set_tasks(row.id, {two: {"priority": 1}, one: {"source": "x"}}, WHO)
    assert e.value.code == "E_READONLY"
    with pytest.raises(JobInvalidError):
        ledger.set_tasks(row.id, {two: {"status": "excluded"}, one: {"priority": "x"}}, WHO)
    for wanted in ("booting", "executing", "pending", "nonsense"):
        with pytest.raises(TransferStateError) as caught:
            ledger.set_tasks(row.id, {two: {"status": wanted}}, WHO)
        assert "excluded" in caught.value.hint
    assert ledger.tasks(row.id) == before
    assert told(tmp_path / "ledger.db") == []


def test_t6_several_attributes_of_several_tasks_are_changed_at_once(
    ledger: Ledger, tmp_path: Path
) -> None:
    row = ledger.create(SPEC, TASKS)
    one, two, three = ids(ledger, row.id)

    row = ledger.set_tasks(
        row.id,
        {
            one: {"status": "EXCLUDED", "priority": "high"},
            two: {"status": "onhold", "metadata": {"why": "late"}},
            three: {"priority": 7},
        },
        WHO,
    )

    found = [(str(t.status), t.priority, t.metadata, t.modifier) for t in ledger.tasks(row.id)]
    assert found == [
        ("excluded", 999, {}, WHO), ("onhold", 500, {"why": "late"}, WHO), ("queued", 7, {}, ""),
    ]  # fmt: skip
    assert row.size == 3200
    assert told(tmp_path / "ledger.db")[1:] == [
        (one, "priority=999", WHO), (one, "status=excluded", WHO), (two, "metadata", WHO),
        (two, "status=onhold", WHO), (three, "priority=7", WHO),
    ]  # fmt: skip


def test_t10_what_is_under_way_can_be_excluded_and_held(ledger: Ledger) -> None:
    """It leaves the size at once; what is held keeps what there is of it."""
    row = ledger.begin(SPEC, TASKS)
    one, two, three = ids(ledger, row.id)
    ledger.note(one, TaskStatus.BOOTING)
    for task in (two, three):
        ledger.note(task, TaskStatus.EXECUTING)
        ledger.note_moved(task, 100)
    ledger.flush()

    changes = {
        one: {"status": "excluded"},
        two: {"status": "excluded"},
        three: {"status": "onhold"},
    }
    row = ledger.set_tasks(row.id, changes, WHO)
    ledger.note(two, TaskStatus.EXECUTING)

    assert states(ledger, row.id) == ["excluded", "excluded", "onhold"]
    assert row.size == 3000
    assert [task.done for task in ledger.tasks(row.id)] == [0, 0, 100]


def test_t10_to_wish_what_a_task_is_already_changes_nothing(ledger: Ledger, tmp_path: Path) -> None:
    """But that a wait for another try ends, and that what was excluded by an engine stays so."""
    row = ledger.begin(SPEC, TASKS)
    one, two, three = ids(ledger, row.id)
    ledger.note(one, TaskStatus.EXCLUDED)
    ledger.note(two, TaskStatus.DONE)
    ledger.note_retry(three, StoreUnavailableError("no"), 60.0)
    ledger.finish(row.id, CancelledError("stopped"))

    words = {one: "excluded", two: "done", three: "queued"}
    ledger.set_tasks(row.id, {task: {"status": word} for task, word in words.items()}, WHO)

    found = ledger.tasks(row.id)
    assert [(str(task.status), task.modifier) for task in found] == [
        ("excluded", WHO), ("done", ""), ("queued", ""),
    ]  # fmt: skip
    assert found[2].not_before == 0
    assert told(tmp_path / "ledger.db") == []


# ------------------------------------------------------------------------- what the tasks make it


def test_t2_a_transfer_whose_failed_task_is_excluded_is_done(ledger: Ledger) -> None:
    row = finished(ledger, failed=(1,))

    row = ledger.set_tasks(row.id, {ids(ledger, row.id)[1]: {"status": "excluded"}}, WHO)

    assert (row.status, row.size, row.done) == (TransferStatus.DONE, 3010, 3010)
    assert (row.error_code, row.error) == ("", "")


def test_t2_a_transfer_whose_failed_task_is_held_is_paused(ledger: Ledger) -> None:
    row = finished(ledger, failed=(1,))
    two = ids(ledger, row.id)[1]

    row = ledger.set_tasks(row.id, {two: {"status": "onhold"}}, WHO)
    assert (row.status, row.finished) == (TransferStatus.PAUSED, None)
    assert ledger.set_tasks(row.id, {two: {"status": "queued"}}, WHO).status == "waiting"
    assert ledger.set_tasks(row.id, {two: {"status": "done"}}, WHO).status == "done"
    assert ledger.transfer(row.id).done == 3210
    assert ledger.set_tasks(row.id, {two: {"status": "queued"}}, WHO).status == "waiting"
    assert ledger.set_tasks(row.id, {two: {"status": "failed"}}, WHO).status == "waiting", (
        "a waiting transfer has not failed; its engine finds out"
    )


def test_t2_what_a_person_has_paused_stays_paused_when_tasks_change(ledger: Ledger) -> None:
    row = ledger.create(SPEC, TASKS, status=TransferStatus.PAUSED)
    one, two, three = ids(ledger, row.id)

    assert ledger.set_tasks(row.id, {one: {"status": "onhold"}}, WHO).status == "paused"
    assert ledger.set_tasks(row.id, {one: {"status": "queued"}}, WHO).status == "paused"
    changes = {task: {"status": "excluded"} for task in (one, two, three)}
    assert ledger.set_tasks(row.id, changes, WHO).status == "done", "nothing is left to pause"


# ------------------------------------------------------------------------------------ add tasks


def test_t8_new_tasks_revive_a_transfer_that_has_ended(ledger: Ledger, tmp_path: Path) -> None:
    row = finished(ledger)

    added = ledger.add_tasks(row.id, [TaskSpec("d", "four", 5)], modifier=WHO)

    row = ledger.transfer(row.id)
    assert (row.status, row.size, row.done, row.finished) == (
        TransferStatus.WAITING, 3215, 3210, None,
    )  # fmt: skip
    four = ledger.tasks(row.id)[-1]
    assert ([four.id], four.uri, four.status) == (added, "3", TaskStatus.QUEUED)
    assert told(tmp_path / "ledger.db")[-1] == (four.id, "added", WHO)


def test_t8_a_duplicate_is_tried_again(ledger: Ledger) -> None:
    row = finished(ledger, failed=(1,))

    added = ledger.add_tasks(row.id, [TASKS[1], TaskSpec("c", "three", 99)])

    assert added == ids(ledger, row.id)[1:]
    two, three = ledger.tasks(row.id)[1:]
    assert (two.status, two.error_code, two.tries) == (TaskStatus.QUEUED, "", 0)
    assert (three.status, three.size, three.done) == (TaskStatus.QUEUED, 3000, 0)
    assert ledger.transfer(row.id).done == 10


def test_t8_a_duplicate_is_rejected_and_nothing_added(ledger: Ledger) -> None:
    row = finished(ledger)

    with pytest.raises(TransferStateError, match="has the source b and the destination two"):
        ledger.add_tasks(row.id, [TaskSpec("d", "four", 5), TASKS[1]], duplicates="reject")
    assert (states(ledger, row.id), ledger.transfer(row.id)) == (["done"] * 3, row)
    with pytest.raises(TransferStateError):
        ledger.add_tasks(row.id, [TaskSpec("d", "4", 5)] * 2, duplicates="reject")


def test_t8_a_duplicate_replaces_what_was_there(ledger: Ledger) -> None:
    row = finished(ledger)

    ledger.add_tasks(
        row.id,
        [TaskSpec("b", "two", 7, priority=3, metadata={"take": 2})],
        duplicates="replace",
    )

    two = ledger.tasks(row.id)[1]
    assert (two.status, two.size, two.priority, two.metadata) == (
        TaskStatus.QUEUED, 7, 3, {"take": 2},
    )  # fmt: skip
    assert ledger.transfer(row.id).size == 3017


@pytest.mark.parametrize("duplicates", ["retry", "replace"])
def test_t8_what_is_under_way_is_never_touched(ledger: Ledger, duplicates: str) -> None:
    row = ledger.begin(SPEC, TASKS)
    one = ids(ledger, row.id)[0]
    ledger.note(one, TaskStatus.BOOTING)
    ledger.note(one, TaskStatus.EXECUTING)
    ledger.flush()

    ledger.add_tasks(row.id, [TaskSpec("a", "one", 77)], duplicates=duplicates)  # type: ignore[arg-type]

    assert (states(ledger, row.id)[0], ledger.tasks(row.id)[0].size) == ("executing", 10)
    assert ledger.transfer(row.id).status is TransferStatus.RUNNING


@pytest.mark.parametrize("kind", ["sync-in", "source", "publish"])
def test_t8_a_session_actions_transfer_takes_no_tasks_of_others(ledger: Ledger, kind: str) -> None:
    spec = TransferSpec(kind, "s3://b/p", "/root", session="s1")
    row = ledger.begin(spec, TASKS)
    ledger.finish(row.id, StoreUnavailableError("no"))

    with pytest.raises(JobInvalidError, match="follows from its job"):
        ledger.add_tasks(row.id, [TASKS[0], TaskSpec("d", "four", 5)])
    assert len(ledger.tasks(row.id)) == 3
    ledger.add_tasks(row.id, [TASKS[0]])
    assert ledger.transfer(row.id).status is TransferStatus.WAITING


# ----------------------------------------------------------------------- engines, dead and alive


def test_t9_the_engine_reads_at_its_beat_what_was_wished(
    ledger: Ledger, tmp_path: Path, now: list[float]
) -> None:
    row = ledger.begin(SPEC, TASKS)
    news = ledger.news(row.id)
    with Ledger.open(tmp_path / "ledger.db", clock=lambda: now[0]) as other:
        two = ids(other, row.id)[1]
        other.set_transfer(row.id, status=TransferStatus.PAUSED, modifier=WHO)
        other.set_tasks(row.id, {two: {"status": "onhold", "priority": 3}}, WHO)

        assert ledger.beat(row.id, 0) is TransferStatus.PAUSED
        changed = ledger.news(row.id, news.last)
        assert [(t.id, t.status, t.priority, t.by_hand) for t in changed.tasks.values()] == [
            (two, TaskStatus.ONHOLD, 3, True)
        ]
        assert changed.modifier == WHO
        assert ledger.news(row.id, changed.last).tasks == {}
        other.set_transfer(row.id, status=TransferStatus.WAITING)
        assert ledger.beat(row.id, 0) is TransferStatus.RUNNING, "it was resumed"
        assert other.transfer(row.id).status is TransferStatus.RUNNING
        other.set_transfer(row.id, status=TransferStatus.ABORTED)
        assert ledger.beat(row.id, 0) is TransferStatus.ABORTED
    assert ledger.finish(row.id, TransferAbortedError("no")).status is TransferStatus.ABORTED


def test_t9_a_paused_transfer_whose_action_is_cancelled_is_aborted(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    ledger.set_transfer(row.id, status=TransferStatus.PAUSED)

    row = ledger.finish(row.id, CancelledError("stopped"))

    assert (row.status, row.finished is not None) == (TransferStatus.ABORTED, True)
    assert ledger.begin(SPEC, TASKS).id != row.id


def test_t9_a_pause_without_an_engine_holds_the_next_one(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    ledger.finish(row.id, CancelledError("stopped"))
    ledger.set_transfer(row.id, status=TransferStatus.PAUSED)

    again = ledger.begin(SPEC, TASKS)

    assert (again.id, again.status) == (row.id, TransferStatus.PAUSED)
    assert ledger.beat(row.id, 0) is TransferStatus.PAUSED


def test_t10_a_note_that_is_older_does_not_begin_what_was_held_meanwhile(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    one, two, three = ids(ledger, row.id)
    ledger.note(one, TaskStatus.BOOTING)
    ledger.note(two, TaskStatus.EXECUTING)
    ledger.note(three, TaskStatus.DONE)
    held = {task: {"status": "onhold"} for task in (one, two, three)}
    ledger.set_tasks(row.id, held, WHO)

    ledger.flush()

    assert states(ledger, row.id) == ["onhold", "onhold", "done"], "what is done is done"


def test_t10_what_is_excluded_leaves_the_size_and_comes_back_with_it(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    three = ids(ledger, row.id)[2]

    assert ledger.set_tasks(row.id, {three: {"status": "excluded"}}, WHO).size == 210
    assert ledger.set_tasks(row.id, {three: {"status": "queued"}}, WHO).size == 3210


def test_t10_exclusions_hold_in_the_next_transfer_of_the_session(ledger: Ledger) -> None:
    spec = TransferSpec("sync-in", "s3://b/p", "/root", session="s1")
    row = ledger.begin(spec, TASKS)
    one, two, three = ids(ledger, row.id)
    ledger.note(one, TaskStatus.DONE)
    ledger.note(two, TaskStatus.FAILED)
    ledger.note(three, TaskStatus.DONE)
    ledger.finish(row.id, StoreUnavailableError("no"))
    assert ledger.set_tasks(row.id, {two: {"status": "excluded"}}, WHO).status == "done"

    again = ledger.begin(spec, TASKS)

    assert (again.id != row.id, again.size) == (True, 3010)
    assert states(ledger, again.id) == ["queued", "excluded", "queued"]
    elsewhere = ledger.begin(TransferSpec("sync-in", "s3://b/p", "/root", session="s2"), TASKS)
    assert states(ledger, elsewhere.id) == ["queued"] * 3


def test_t10_an_exclusion_outside_of_a_session_is_for_one_transfer(ledger: Ledger) -> None:
    spec = TransferSpec("submit", "/show", "s3://b/p")
    row = ledger.begin(spec, TASKS)
    ledger.set_tasks(row.id, {task: {"status": "excluded"} for task in ids(ledger, row.id)}, WHO)
    assert ledger.finish(row.id).status is TransferStatus.DONE

    assert states(ledger, ledger.begin(spec, TASKS).id) == ["queued"] * 3


def test_t10_what_an_engine_has_excluded_is_queued_when_it_is_asked_for_again(
    ledger: Ledger,
) -> None:
    row = ledger.begin(SPEC, TASKS)
    ledger.note(ids(ledger, row.id)[0], TaskStatus.EXCLUDED, StoreUnavailableError("changed"))
    ledger.finish(row.id, CancelledError("stopped"))

    ledger.begin(SPEC, TASKS)

    assert states(ledger, row.id) == ["queued"] * 3
    assert ledger.tasks(row.id)[0].error == ""


DIES = """
import os, signal, sys
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
from agent_plugin.transfer.states import TaskStatus
ledger = Ledger.open(Path(sys.argv[1]))
row = ledger.begin(TransferSpec("copy", "/from", "/to"), [TaskSpec("a", "one", 10)])
[task] = ledger.tasks(row.id)
ledger.note(task.id, TaskStatus.BOOTING)
ledger.note(task.id, TaskStatus.EXECUTING)
ledger.beat(row.id, 5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_t10_what_a_killed_engine_had_in_hand_can_be_excluded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    subprocess.run([sys.executable, "-c", DIES, path], check=False)
    with Ledger.open(path) as ledger:
        [task] = ledger.tasks(1)
        assert task.status is TaskStatus.EXECUTING

        row = ledger.set_tasks(1, {task.id: {"status": "excluded"}}, WHO)

        assert (row.status, row.size, row.lease_owner) == (TransferStatus.DONE, 0, "")


def test_t11_a_transfer_gives_way_to_one_of_higher_priority_that_runs(
    ledger: Ledger, now: list[float]
) -> None:
    low = ledger.begin(SPEC, TASKS)
    high = ledger.begin(TransferSpec("copy", "/from", "/elsewhere"), TASKS)
    assert ledger.outranked(low.id) is None
    ledger.set_transfer(high.id, priority=501)

    assert (ledger.outranked(low.id), ledger.outranked(high.id)) == (high.id, None)
    assert ledger.beat(low.id, 0, yielding=True) is TransferStatus.WAITING
    ledger.set_transfer(high.id, status=TransferStatus.PAUSED)
    assert ledger.outranked(low.id) is None, "who waits for nothing needs nothing"
    ledger.set_transfer(high.id, status=TransferStatus.WAITING)
    ledger.beat(high.id, 0)
    assert ledger.outranked(low.id) == high.id
    now[0] += 3600
    assert ledger.outranked(low.id) is None, "its engine is silent"
    assert ledger.beat(low.id, 0) is TransferStatus.RUNNING


@pytest.mark.parametrize("word", ["paused", "aborted"])
def test_t9_who_has_held_or_stopped_a_transfer_is_told_whoever_changed_it_since(
    ledger: Ledger, word: str
) -> None:
    """Seen to fail when whoever changed anything last is told."""
    row = ledger.begin(SPEC, TASKS)
    ledger.set_transfer(row.id, status=TransferStatus(word), modifier=WHO)
    ledger.set_transfer(row.id, priority=7, modifier="1001:bob")

    assert ledger.news(row.id).modifier == WHO
    assert ledger.transfer(row.id).modifier == "1001:bob"


def test_t10_who_wishes_of_tasks_what_is_so_already_has_changed_nothing(
    ledger: Ledger, now: list[float]
) -> None:
    """Seen to fail when the transfer is said to be changed by whoever asked."""
    row = ledger.create(SPEC, TASKS, modifier=WHO)
    one, two, _ = ids(ledger, row.id)
    now[0] += 10

    same = ledger.set_tasks(row.id, {one: {"status": "queued"}}, "1001:bob")
    assert (same.modifier, same.modified) == (WHO, row.modified)
    ledger.set_tasks(row.id, {one: {"status": "queued", "priority": 7}}, "1001:bob")
    assert ledger.transfer(row.id).modifier == "1001:bob"
    ledger.set_tasks(row.id, {two: {"status": "onhold"}}, WHO)
    assert ledger.transfer(row.id).modifier == WHO


def test_t5_what_has_not_got_all_of_its_tasks_does_not_go_on_without_them(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when whoever made it was killed. Also when it was aborted, and a task changed.

    Seen to fail when it can be resumed, tried again or added to.
    """
    monkeypatch.setattr(ledger_create, "TASKS_PER_PIECE", 2)

    def tasks() -> Iterator[TaskSpec]:
        yield from TASKS[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.create(SPEC, tasks(), modifier=WHO)
    words = (TransferStatus.WAITING, TransferStatus.PENDING)

    for status in (TransferStatus.ABORTED, TransferStatus.INIT):
        with sqlite3.connect(tmp_path / "ledger.db") as other:
            other.execute("UPDATE transfer SET status = ?", (status,))
        other.close()
        for word in words:
            with pytest.raises(TransferStateError, match="has not got all of its tasks") as caught:
                ledger.set_transfer(1, status=word)
            assert caught.value.hint.endswith("abort it and make it again")
        with pytest.raises(TransferStateError, match="has not got all of its tasks"):
            ledger.add_tasks(1, TASKS)
        ledger.set_transfer(1, status=TransferStatus.ABORTED)
        ledger.set_tasks(1, {ids(ledger, 1)[0]: {"priority": 7}})
