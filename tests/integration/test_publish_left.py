"""Publications that are not required, and can not be made when their task ends."""

from typing import Any

import pytest

from agent_plugin.content.store import Cancellation
from agent_plugin.ending import ending_publications
from agent_plugin.publish.result_documents import find_results
from agent_plugin.services import open_records
from agent_plugin.session.end import end
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import FARM, JOB, QUEUE, action
from tests.servers.publishing import (
    WAIT_SECONDS,
    Publishing,
    await_that,
    in_background,
)


@pytest.fixture
def patient(watched: Publishing) -> Publishing:
    """A host that soon gives up a request, so that what fails for a while fails at once."""
    text = watched.host.config.read_text()
    watched.host.config.write_text(f'{text}[queues."{QUEUE}"]\nstore.deadline_seconds = 0.5\n')
    return watched


def ended(publishing: Publishing) -> str:
    """End the session by the command; return what it logged."""
    done = publishing.host.run("session", "end", "--session-dir", publishing.sessions.session_dir)
    assert done.returncode == 0, done.stderr
    assert not publishing.root.exists()
    return done.stderr


def documents(publishing: Publishing) -> list[Any]:
    with publishing.host.services() as context:
        return find_results(context, (FARM, QUEUE, JOB))


@pytest.mark.usefixtures("declined")
def test_o1_what_could_not_be_published_for_a_while_is_when_the_session_ends(
    patient: Publishing, fault_proxy: FaultProxy
) -> None:
    """Plain objects and an archive, of an action that is not the last one.

    Seen to fail when what is not required was given up at the end of its task.
    """
    patient.start(patient.publisher("{taskID}"), patient.publisher("all{taskID}", Encoding="gzip"))
    patient.write({"0001.exr": 10})
    fault_proxy.inject(Fault.UNAVAILABLE, methods={"PUT"}, key="published-")
    first, second = action(1, 0), action(1, 1)
    failed = patient.finish(first)
    assert [(each.error, each.later) for each in failed.publish_failures] == [
        ("E_THROTTLED", True)
    ] * 2
    assert documents(patient)[0].failures == failed.publish_failures
    fault_proxy.clear()
    patient.write({"0002.exr": 20})
    assert patient.finish(second).publish_failures == []

    ended(patient)

    assert patient.published() == [
        f"all{first.task_id}.tar.gz",
        f"all{second.task_id}.tar.gz",
        f"{first.task_id}/renders/0001.exr",
        f"{second.task_id}/renders/0002.exr",
    ]
    one = documents(patient)[0]
    assert (one.execution_id, len(one.results), one.failures) == (first.session_action_id, 2, [])
    assert len(one.contents) == 2


@pytest.mark.usefixtures("declined")
def test_o1_what_could_not_be_published_is_when_the_session_was_started_again(
    patient: Publishing, fault_proxy: FaultProxy
) -> None:
    """Seen to fail when the second start forgot what was left, and nobody published it."""
    patient.start(patient.publisher())
    patient.write({"0001.exr": 10})
    fault_proxy.inject(Fault.UNAVAILABLE, methods={"PUT"}, key="published-")
    assert patient.finish().publish_failures[0].later
    fault_proxy.clear()
    state = patient.host.read_state(patient.sessions.session_dir)
    assert state is not None
    patient.host.start(state.job, patient.sessions.session_dir)

    ended(patient)

    assert patient.published() == ["renders/0001.exr"]
    [document] = documents(patient)
    assert (len(document.results), document.failures) == (1, [])


@pytest.mark.slow
@pytest.mark.usefixtures("declined")
def test_o1_what_can_not_be_published_at_the_end_either_is_told_and_holds_up_nothing(
    patient: Publishing, fault_proxy: FaultProxy
) -> None:
    patient.start(patient.publisher())
    patient.write({"0001.exr": 10})
    fault_proxy.inject(Fault.UNAVAILABLE, methods={"PUT"}, key="published-")
    patient.finish()

    logged = ended(patient)

    assert '"publish.failed"' in logged
    [document] = documents(patient)
    assert [(each.error, each.later) for each in document.failures] == [("E_THROTTLED", False)]


@pytest.mark.slow
@pytest.mark.expected_events("publications.left", "publish.failed", "request.retried")
def test_o1_the_end_of_a_session_waits_no_longer_for_a_store_than_it_may(
    patient: Publishing, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient.start(patient.publisher())
    patient.write({"0001.exr": 10})
    fault_proxy.inject(Fault.UNAVAILABLE, methods={"PUT"}, key="published-")
    assert patient.finish().publish_failures[0].later
    fault_proxy.clear()
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="published-", seconds=WAIT_SECONDS)
    for name, value in patient.host.environment.items():
        monkeypatch.setenv(name, value)
    with patient.host.state(patient.sessions.session_dir) as state_file:
        end(
            patient.sessions.session_dir,
            open_records(patient.host.settings, queue_id=QUEUE),
            state_file,
            mounts=patient.host.mounts,
            publications=ending_publications(patient.host.settings, Cancellation(), seconds=1.0),
        )

    assert bool(fault_proxy.count("PUT", "published-"))
    # Had it ended by itself, by its own timeout, it would not be left to a later try any more.
    assert [each.later for each in documents(patient)[0].failures] == [True]
    assert not patient.root.exists()


@pytest.mark.usefixtures("declined")
def test_t9_a_paused_publication_that_is_not_required_does_not_hold_up_the_task(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    """It is resumed, and made when the session ends.

    Seen to fail, since the task never ended, when every paused publication was waited for.
    """
    watched.start(watched.publisher())
    watched.write({f"{number:04}.exr": 10 for number in range(5)})
    fault_proxy.inject(
        Fault.STALL, methods={"PUT"}, key=r"published.*0000\.exr", seconds=WAIT_SECONDS, times=1
    )
    waiting = in_background(watched.finish)
    await_that(lambda: bool(fault_proxy.count("PUT", "published")))
    [row] = [row for row in watched.host.transfers() if row.kind == "publish"]
    assert not row.required
    with Ledger.open(watched.host.state_dir / "ledger.db") as ledger:
        ledger.set_transfer(row.id, status=TransferStatus.PAUSED, modifier="0:somebody")
        result = waiting()
        assert [each.later for each in result.publish_failures] == [True]
        assert ledger.transfer(row.id).status is TransferStatus.PAUSED
        ledger.set_transfer(row.id, status=TransferStatus.WAITING, modifier="0:somebody")

    ended(watched)

    assert len(watched.published()) == 5
    assert [len(each.results) for each in documents(watched)] == [1]


@pytest.mark.slow
@pytest.mark.usefixtures("declined")
def test_t10_a_held_output_of_a_publication_that_is_not_required_does_not_hold_up_the_task(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    """All others are published, and it is when the session ends, if it is held no more.

    Seen to fail, since the task never ended, when such a publication waited as a required one does.
    """
    watched.start(watched.publisher())
    watched.write({f"{number:04}.exr": 10 for number in range(5)})
    first = r"published.*0000\.exr"
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=first, seconds=WAIT_SECONDS)
    waiting = in_background(watched.finish)
    await_that(lambda: bool(fault_proxy.count("PUT", first)))
    [row] = [row for row in watched.host.transfers() if row.kind == "publish"]
    with Ledger.open(watched.host.state_dir / "ledger.db") as ledger:
        [held] = [task.id for task in ledger.tasks(row.id) if task.source.endswith("3.exr")]
        ledger.set_tasks(row.id, {held: {"status": TaskStatus.ONHOLD}}, "0:somebody")
        watched.await_beats()
        fault_proxy.release()
        result = waiting()
        assert [each.later for each in result.publish_failures] == [True]
        assert len(watched.published()) == 4
        ledger.set_tasks(row.id, {held: {"status": TaskStatus.QUEUED}}, "0:somebody")

    ended(watched)

    assert len(watched.published()) == 5
    assert [len(each.results) for each in documents(watched)] == [1]
