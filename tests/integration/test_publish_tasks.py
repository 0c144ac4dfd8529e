"""What people say of a publication's tasks, and what a killed publication leaves."""

import io
import json
import re
import signal
import sqlite3
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import pytest

from agent_plugin.content.errors import CancelledError, KeyExistsError
from agent_plugin.publish.contents import read_contents
from agent_plugin.publish.leftovers import abort_left
from agent_plugin.publish.placeholders import Execution
from agent_plugin.publish.publisher import publish
from agent_plugin.publish.result_documents import find_results
from agent_plugin.publish.spec import Publisher, parse_all
from agent_plugin.session.finish_task import TaskAction
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import FARM, JOB, QUEUE, action
from tests.servers.publishing import (
    LARGE,
    WAIT_SECONDS,
    Publishing,
    await_that,
    in_background,
)
from tests.servers.sessions import Sessions
from tests.unit.ledger_reads import published as published_by

WHO = "0:somebody"


def publication(publishing: Publishing) -> TransferRow:
    [row] = [row for row in publishing.host.transfers() if row.kind == "publish"]
    return row


def set_tasks(publishing: Publishing, names: Sequence[str], status: TaskStatus) -> None:
    """Say of outputs what a person says."""
    row = publication(publishing)
    with Ledger.open(publishing.host.state_dir / "ledger.db") as ledger:
        ids = {task.source: task.id for task in ledger.tasks(row.id)}
        changes = {ids[f"renders/{name}"]: {"status": status} for name in names}
        ledger.set_tasks(row.id, changes, WHO)


# -------------------------------------------------------------------- T10: excluded and held


def failed_once(publishing: Publishing, taken: str, **params: str) -> TaskAction:
    """Have a publication of ten outputs fail at a key that is taken, and free the key."""
    key = "all" if params else ""
    publishing.start(publishing.publisher(key, Required=True, **params))
    publishing.write({f"{number:04}.exr": 10 for number in range(10)})
    publishing.put(taken, b"somebody's")
    run = action(1, 0)
    with pytest.raises(KeyExistsError):
        publishing.finish(run)
    publishing.s3.client().delete_object(
        Bucket=publishing.s3.bucket, Key=f"{publishing.prefix}/{taken}"
    )
    return run


def names(*left_out: int) -> list[str]:
    return [f"renders/{number:04}.exr" for number in range(10) if number not in left_out]


@pytest.mark.usefixtures("declined")
def test_t10_excluded_outputs_are_not_published_and_the_results_say_so(
    publishing: Publishing,
) -> None:
    """Seen to fail when a publication took no notice of what people change of its tasks.

    And when the list of what is published had what was excluded.
    """
    run = failed_once(publishing, "renders/0003.exr")
    set_tasks(publishing, ["0000.exr", "0003.exr"], TaskStatus.EXCLUDED)
    # What is excluded is not asked for.
    publishing.put("renders/0003.exr", b"somebody's")

    result = publishing.finish(run)

    assert publishing.get("renders/0003.exr") == b"somebody's"
    assert publishing.published() == names(0)
    told = [(each.publisher, each.key, each.paths) for each in result.publish_excluded]
    assert told == [(0, f"{publishing.prefix}/", ["renders/0000.exr", "renders/0003.exr"])]
    assert len(result.results) == 1
    with publishing.host.services() as context:
        [document] = find_results(context, (FARM, QUEUE, JOB))
        listed = read_contents(context.open_store(), document, 0)
    assert document.excluded == result.publish_excluded
    assert listed is not None
    assert sorted(listed) == names(0, 3)
    row = publication(publishing)
    assert (row.status, row.size, row.done) == (TransferStatus.DONE, 80, 80)
    assert len(publishing.sessions.outputs()) == 10


@pytest.mark.usefixtures("declined")
def test_t10_held_outputs_are_waited_for_until_somebody_says_what_becomes_of_them(
    publishing: Publishing,
) -> None:
    """Seen to fail when a publication is over as soon as all that is left is held."""
    run = failed_once(publishing, "renders/0003.exr")
    set_tasks(publishing, ["0000.exr", "0001.exr"], TaskStatus.ONHOLD)
    waiting = in_background(lambda: publishing.finish(run))
    await_that(lambda: publication(publishing).status is TransferStatus.PAUSED)
    assert publishing.published() == names(0, 1)
    # While it runs: an engine obeys within a second.
    set_tasks(publishing, ["0000.exr"], TaskStatus.EXCLUDED)
    set_tasks(publishing, ["0001.exr"], TaskStatus.QUEUED)

    result = waiting()

    assert publishing.published() == names(0)
    assert [each.paths for each in result.publish_excluded] == [["renders/0000.exr"]]


@pytest.mark.slow
def test_t10_what_is_excluded_before_its_turn_is_not_published(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    """While others are under way; seen to fail when a thread publishes whatever it was told to."""
    text = watched.host.config.read_text()
    watched.host.config.write_text(f'{text}[queues."{QUEUE}"]\nstore.concurrency = 2\n')
    watched.start(watched.publisher())
    watched.write({f"{number:04}.exr": 10 for number in range(10)})
    under_way = r"published.*000[12]\.exr"
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=under_way, seconds=WAIT_SECONDS)
    waiting = in_background(watched.finish)
    await_that(lambda: fault_proxy.count("PUT", under_way) == 2)

    set_tasks(watched, ["0009.exr"], TaskStatus.EXCLUDED)
    watched.await_beats()
    fault_proxy.release()
    result = waiting()

    assert watched.published() == names(9)
    assert [each.paths for each in result.publish_excluded] == [["renders/0009.exr"]]


@pytest.mark.slow
@pytest.mark.usefixtures("declined")
def test_t10_an_archive_waits_for_held_outputs_and_holds_none_that_is_excluded(
    publishing: Publishing,
) -> None:
    run = failed_once(publishing, "all.tar.gz", Encoding="gzip")
    set_tasks(publishing, ["0001.exr"], TaskStatus.EXCLUDED)
    set_tasks(publishing, ["0002.exr"], TaskStatus.ONHOLD)
    waiting = in_background(lambda: publishing.finish(run))
    await_that(lambda: publication(publishing).status is TransferStatus.PAUSED)
    assert publishing.published() == []
    set_tasks(publishing, ["0002.exr"], TaskStatus.QUEUED)

    result = waiting()

    with tarfile.open(fileobj=io.BytesIO(publishing.get("all.tar.gz"))) as archive:
        assert archive.getnames() == names(1)
    assert [each.paths for each in result.publish_excluded] == [["renders/0001.exr"]]


@pytest.mark.usefixtures("declined")
@pytest.mark.parametrize(
    "params",
    [pytest.param({}, marks=pytest.mark.slow), {"Encoding": "gzip"}],
    ids=["plain", "archive"],
)
def test_t10_of_a_publication_whose_outputs_are_all_excluded_there_is_no_result(
    publishing: Publishing, params: dict[str, str]
) -> None:
    taken = "all.tar.gz" if params else "renders/0003.exr"
    run = failed_once(publishing, taken, **params)
    set_tasks(publishing, [f"{number:04}.exr" for number in range(10)], TaskStatus.EXCLUDED)

    result = publishing.finish(run)

    assert (result.results, result.publish_failures) == ([], [])
    assert [len(each.paths) for each in result.publish_excluded] == [10]
    assert publishing.published() == []


@pytest.mark.parametrize("word", ["excluded", pytest.param("onhold", marks=pytest.mark.slow)])
def test_t10_an_output_is_taken_out_while_it_is_sent(
    publishing: Publishing, fault_proxy: FaultProxy, word: str
) -> None:
    """Of its later parts nothing comes any more, and nobody waits for them; held, it comes again.

    So does what was to come after it. Seen to fail when only what was not begun is left out, when
    what is left out ends the publication, and when what was held before it began never begins.
    """
    text = publishing.host.config.read_text()
    publishing.host.config.write_text(f'{text}[queues."{QUEUE}"]\nstore.concurrency = 1\n')
    publishing.start(publishing.publisher(Endpoint=fault_proxy.url, Required=True))
    publishing.write({"0000.exr": 10, "large.abc": LARGE, "z.exr": 10})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="large", what=re.compile(r" (?!1$)\d+$"))
    waiting = in_background(publishing.finish)
    await_that(lambda: fault_proxy.count("PUT", "large") > 1)
    both = ["large.abc", "z.exr"]
    set_tasks(publishing, both, TaskStatus(word))
    if word == "onhold":
        await_that(lambda: publication(publishing).status is TransferStatus.PAUSED)
        assert (publishing.published(), publishing.uploads()) == (["renders/0000.exr"], [])
        fault_proxy.clear()
        set_tasks(publishing, both, TaskStatus.QUEUED)

    result = waiting()

    paths = [f"renders/{name}" for name in both]
    left_out = [] if word == "onhold" else [paths]
    assert [each.paths for each in result.publish_excluded] == left_out
    assert publishing.published() == ["renders/0000.exr", *([] if left_out else paths)]
    assert publishing.uploads() == []
    assert publication(publishing).status is TransferStatus.DONE


# --------------------------------------------------------------------------- O5: after a kill


def test_o5_a_kill_before_the_state_is_written_leaves_one_result_when_it_is_run_again(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    """Killed when all is published, and the document of the results is being stored.

    Seen to fail, with two rows, when the ledger took a result down each time it was told one.
    """
    watched.start(watched.publisher("{time}"), watched.publisher("all{time}", Encoding="gzip"))
    watched.write({"0001.exr": 10, "0002.exr": 20})
    run = action(1, 0)
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="/Results/", seconds=WAIT_SECONDS)
    process = watched.host.popen(*watched.arguments(run))
    await_that(lambda: bool(fault_proxy.count("PUT", "/Results/")))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=WAIT_SECONDS)
    fault_proxy.clear()
    time.sleep(1.1)  # So that another instant would have another key.
    before = watched.published()

    done = watched.host.run(*watched.arguments(run))

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert watched.published() == before
    kept = published_by(watched.host.state_dir / "ledger.db")
    assert sorted(each[3]["Params"]["Key"] for each in kept) == sorted(
        each["Params"]["Key"] for each in answer["results"]
    )
    with watched.host.services() as context:
        [document] = find_results(context, (FARM, QUEUE, JOB))
    assert len(document.results) == 2


def killed_in_an_upload(publishing: Publishing, proxy: FaultProxy) -> None:
    """Kill a publication that has just begun to send an archive in parts.

    Seen to leave an upload for good when the ledger learns of it at the next beat.
    """
    publishing.write({"large.abc": LARGE})
    late = r"published.*\.tar\.gz"
    proxy.inject(Fault.STALL, methods={"PUT"}, key=late, seconds=WAIT_SECONDS)
    process = publishing.host.popen(*publishing.arguments(action(1, 0)))
    await_that(lambda: bool(proxy.count("PUT", late)))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=WAIT_SECONDS)
    proxy.clear()
    assert publishing.uploads() == [f"{publishing.prefix}/all.tar.gz"]


@pytest.mark.slow
def test_o4_the_end_of_a_session_aborts_the_upload_of_a_killed_publication(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    """Seen to fail when only another run of the same action did."""
    watched.start(watched.publisher("all", Encoding="gzip"))
    killed_in_an_upload(watched, fault_proxy)

    done = watched.host.run("session", "end", "--session-dir", watched.sessions.session_dir)

    assert done.returncode == 0, done.stderr
    assert watched.uploads() == []
    assert not watched.root.exists()


@pytest.mark.slow
def test_o4_the_next_publication_on_the_host_aborts_the_upload_of_a_killed_one(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    """Of another session, whose job publishes somewhere else."""
    watched.start(watched.publisher("all", Encoding="gzip"))
    killed_in_an_upload(watched, fault_proxy)
    other = Sessions(watched.tmp_path / "other", watched.host)
    watched.sessions = other
    watched.start(watched.publisher("other"))
    watched.write({"0001.exr": 10})

    watched.finish()

    assert watched.uploads() == []
    assert watched.published() == ["other/renders/0001.exr"]


def leave_uploads(
    publishing: Publishing, context: TransferContext, metadata: Sequence[Mapping[str, Any]]
) -> None:
    """Have the ledger tell of uploads that a killed publication has left."""
    where = f"s3://{publishing.s3.bucket}/{publishing.prefix}/"
    spec = TransferSpec(kind="publish", source=context.store_url, destination=where)
    tasks = [
        TaskSpec("x", f"{publishing.prefix}/{n}", 1, metadata=each)
        for n, each in enumerate(metadata)
    ]
    row = context.ledger.begin(spec, tasks)
    for task in context.ledger.tasks(row.id):
        context.ledger.note_upload(task.id, "an-upload", ())
    context.ledger.finish(row.id, KeyExistsError("it was killed"))


def test_o4_nobody_waits_for_a_server_that_is_silent_about_uploads_that_were_left(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    """All are aborted at once, and who wishes to stop does.

    Seen to fail when one was waited for before the next was asked for: each takes up to 10 s.
    """
    fault_proxy.inject(Fault.STALL, methods={"DELETE"}, key="published", seconds=WAIT_SECONDS)
    with watched.host.services() as context:
        leave_uploads(watched, context, [{}] * 8)
        waiting = in_background(lambda: abort_left(context, source=context.store_url))
        await_that(lambda: fault_proxy.count("DELETE", "published") == 8)

        context.cancellation.cancel()

        with pytest.raises(CancelledError):
            waiting()
    fault_proxy.release()


@pytest.mark.expected_events("upload.left_behind")
def test_o4_what_people_say_of_a_task_keeps_nobody_from_publishing(publishing: Publishing) -> None:
    """The metadata of a task are theirs to change, and tell where a dead upload is.

    Seen to fail, with every further publication of the host, when they were taken for ours.
    """
    publishing.start(publishing.publisher())
    publishing.write({"0001.exr": 10})
    with publishing.host.services() as context:
        leave_uploads(publishing, context, [{"endpoint": ["odd"]}])

    assert len(publishing.finish().results) == 1

    with publishing.host.services() as context:
        dead = context.ledger.dead_uploads("publish", source=context.store_url, session="")
    assert dead == []


@pytest.mark.usefixtures("declined")
@pytest.mark.expected_events("ledger.unavailable")
def test_a_ledger_that_fails_is_a_failure_of_publishers_and_not_of_the_task(
    publishing: Publishing,
) -> None:
    """Seen to fail when the look for uploads that were left failed the task."""
    publishing.start()
    where = decode_publishers(publishing)
    execution = Execution(FARM, QUEUE, JOB, "step", "task", "run", "session", "worker", 1.7e9)
    with publishing.host.services() as context:
        with closing(sqlite3.connect(publishing.host.state_dir / "ledger.db")) as connection:
            connection.execute("ALTER TABLE task RENAME TO lost")

        published, refused = publish(where, [], execution, context)

    assert refused is None
    assert [each.failure is not None for each in published] == [True]


def decode_publishers(publishing: Publishing) -> tuple[Publisher, ...]:
    return parse_all([f"s3://{publishing.s3.bucket}/{publishing.prefix}"], "a test")


@pytest.mark.expected_events("publications.left")
def test_a_session_ends_although_its_uploads_can_not_be_aborted(publishing: Publishing) -> None:
    publishing.start(publishing.publisher("all", Encoding="gzip"))
    publishing.write({"0001.exr": 10})
    ledger = publishing.host.state_dir / "ledger.db"
    publishing.finish()
    ledger.unlink()
    ledger.mkdir()

    done = publishing.host.run("session", "end", "--session-dir", publishing.sessions.session_dir)

    assert "publications.left" in done.stderr
    assert not publishing.root.exists()
