"""Publishing to keys that are taken, publishing that is ended, and publishing again."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.errors import (
    CancelledError,
    KeyExistsError,
)
from agent_plugin.content.objects import ObjectAccess, ObjectInfo
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.destination import EXECUTION, HASH, Destination
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import action
from tests.servers.publishing import (
    LARGE,
    WAIT_SECONDS,
    Publishing,
    await_that,
    host_of,
    in_background,
)
from tests.servers.s3_server import S3Server

# ----------------------------------------------------------------------------- O4: collisions


def test_o4_an_execution_knows_what_it_has_written_and_replaces_nothing_of_others(
    publishing: Publishing,
) -> None:
    """As when a request of a killed process arrives between the look and the write."""
    with publishing.host.services() as context:
        objects = context.open_objects(ObjectAccess())
    bucket, key = publishing.s3.bucket, f"{publishing.prefix}/a"
    ours = Destination(objects, bucket, overwrite=False, execution_id="ours")
    theirs = Destination(objects, bucket, overwrite=False, execution_id="theirs")

    def write(destination: Destination, data: bytes, *, arrives: bytes | None = None) -> ObjectInfo:
        metadata = destination.metadata(**{HASH: data.decode()})

        def put(replace: bool) -> ObjectInfo:
            if arrives is not None and not replace:
                before = destination.metadata(**{HASH: arrives.decode()})
                objects.put(bucket, key, arrives, overwrite=True, metadata=before)
            return objects.put(bucket, key, data, overwrite=replace, metadata=metadata)

        return destination.write(key, metadata, put)

    assert write(ours, b"one", arrives=b"one").size == 3
    write(ours, b"another")
    assert publishing.get("a") == b"another"
    with pytest.raises(KeyExistsError, match=f"{key} exists already"):
        write(theirs, b"third")
    assert publishing.get("a") == b"another"


@pytest.mark.usefixtures("declined")
@pytest.mark.parametrize(
    ("params", "taken"),
    [({}, "renders/0002.exr"), ({"Key": "", "Encoding": "gzip"}, "")],
    ids=["plain", "archive"],
)
def test_o4_what_somebody_has_written_stays_and_nothing_is_written_beside_it(
    publishing: Publishing, params: dict[str, Any], taken: str
) -> None:
    params.pop("Key", None)
    is_archive = bool(params)
    publishing.start(publishing.publisher("all" if is_archive else "", **params))
    publishing.write({f"000{number}.exr": 10 for number in range(5)})
    key = "all.tar.gz" if is_archive else taken
    publishing.put(key, b"somebody's")

    result = publishing.finish()

    assert publishing.published() == [key]
    assert publishing.get(key) == b"somebody's"
    assert result.results == []
    [failure] = result.publish_failures
    assert failure.error == "E_KEY_EXISTS"
    assert f"{publishing.prefix}/{key} exists already" in failure.message
    assert len(publishing.sessions.outputs()) == 5


def test_o4_what_is_there_is_replaced_where_the_publisher_says_so(publishing: Publishing) -> None:
    publishing.start(
        publishing.publisher(Overwrite=True),
        publishing.publisher("all", Encoding="gzip", Overwrite=True),
    )
    publishing.write({"0001.exr": b"new"})
    publishing.put("renders/0001.exr", b"old")
    publishing.put("all.tar.gz", b"old")

    result = publishing.finish()

    assert len(result.results) == 2
    assert publishing.get("renders/0001.exr") == b"new"
    assert publishing.get("all.tar.gz") != b"old"


@pytest.mark.parametrize("encoding", ["plain", pytest.param("gzip", marks=pytest.mark.slow)])
def test_o4_of_two_executions_that_publish_to_one_key_at_once_exactly_one_wins(
    s3: S3Server, tmp_path: Path, encoding: str
) -> None:
    """Two processes on two hosts, with different outputs of the same names."""
    hosts = [
        Publishing(s3, tmp_path / f"{number}", host_of(s3, tmp_path / f"{number}/host"))
        for number in range(2)
    ]
    for number, each in enumerate(hosts):
        each.prefix = hosts[0].prefix
        each.start(each.publisher("same", Encoding=encoding))
        each.write({f"{name:03}.exr": b"%d" % number for name in range(20)})
    runs = [action(1, 0) for _ in hosts]

    processes = [
        each.host.popen(*each.arguments(run)) for each, run in zip(hosts, runs, strict=True)
    ]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in processes]

    assert [process.returncode for process in processes] == [0, 0]
    winners = [number for number, answer in enumerate(answers) if answer["results"]]
    assert len(winners) == 1
    [loser] = {0, 1} - {*winners}
    assert [failure["error"] for failure in answers[loser]["publishFailures"]] == ["E_KEY_EXISTS"]
    if encoding == "plain":
        keys = [key for key in hosts[0].published() if key.startswith("same/")]
        assert len(keys) == 20
        assert {hosts[0].get(key) for key in keys} == {b"%d" % winners[0]}
    else:
        executions = {hosts[0].metadata("same.tar.gz")[EXECUTION]}
        assert executions == {runs[winners[0]].session_action_id}


@pytest.mark.usefixtures("declined")
def test_o4_what_was_written_before_a_key_turned_out_to_be_taken_stays_and_is_told(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    """Somebody writes the key between the look and the copy: the look of all others had passed."""
    watched.start(watched.publisher())
    watched.write({f"{number:04}.exr": 10 for number in range(30)})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=r"published.*0020\.exr", times=1)
    waiting = in_background(watched.finish)
    await_that(lambda: bool(fault_proxy.count("PUT", r"published.*0020\.exr")))
    watched.put("renders/0020.exr", b"somebody's")
    fault_proxy.release()

    result = waiting()

    [failure] = result.publish_failures
    assert failure.error == "E_KEY_EXISTS"
    assert watched.get("renders/0020.exr") == b"somebody's"
    assert "renders/0000.exr" in watched.published()


# ------------------------------------------------------------------ being stopped, and going on


@pytest.mark.parametrize(
    ("encoding", "number"),
    [
        ("gzip", signal.SIGTERM),
        pytest.param("plain", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("plain", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("gzip", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_o4_a_publication_that_is_ended_leaves_nothing_half_and_goes_on(
    watched: Publishing, fault_proxy: FaultProxy, encoding: str, number: signal.Signals
) -> None:
    watched.start(watched.publisher("x{date}{time}", Encoding=encoding))
    watched.write({"0000.exr": 10, "large.abc": LARGE, **{f"{n:04}.exr": n for n in range(1, 9)}})
    run = action(1, 0)
    late = r"published.*(0005\.exr|\.tar\.gz)"
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=late, seconds=WAIT_SECONDS)
    process = watched.host.popen(*watched.arguments(run))
    await_that(lambda: bool(fault_proxy.count("PUT", late)))
    # Twice as long as the ledger takes to write down what is told to it.
    time.sleep(1.0)
    process.send_signal(number)
    process.communicate(timeout=WAIT_SECONDS)
    fault_proxy.clear()
    assert process.returncode in (77, -signal.SIGKILL)
    before = watched.published()
    assert not any(key.endswith(".tar.gz") for key in before)
    if number is signal.SIGTERM:
        await_that(lambda: not watched.uploads())
    else:
        assert bool(watched.uploads()) == (encoding == "gzip")
    time.sleep(1.1)  # so that another instant would have another key

    done = watched.host.run(*watched.arguments(run))

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    [result] = answer["results"]
    assert watched.uploads() == []
    after = watched.published()
    assert {key.partition("/")[0] for key in after} == {
        result["Params"]["Key"].removeprefix(f"{watched.prefix}/").rstrip("/")
    }
    assert set(before) <= set(after)
    assert len(after) == (10 if encoding == "plain" else 1)
    assert json.loads(watched.host.run(*watched.arguments(run)).stdout)["results"] == [result]


def test_o4_an_object_whose_answer_got_lost_is_known_again(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    watched.start(watched.publisher(), watched.publisher("all", Encoding="gzip"))
    watched.write({"0001.exr": 10, "0002.exr": 20})
    fault_proxy.inject(Fault.REPLY_LOST, methods={"PUT"}, key="published", times=2)

    result = watched.finish()

    assert result.publish_failures == []
    assert len(result.results) == 2


def test_o4_the_same_action_answers_the_same_and_publishes_nothing_again(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    watched.start(watched.publisher("{time}{executionID}"))
    watched.write({"0001.exr": 10})
    run = action(1, 0)
    first = watched.finish(run)
    fault_proxy.forget()

    again = watched.finish(run)

    assert again.results == first.results
    assert again.manifests == first.manifests
    assert fault_proxy.count("PUT") == 0


def test_o4_another_run_of_the_task_is_another_execution(publishing: Publishing) -> None:
    publishing.start(publishing.publisher("{executionID}"))
    publishing.write({"0001.exr": 10})
    runs = [action(1, 0), action(1, 0)]

    results = [publishing.finish(run) for run in runs]

    assert [len(result.results) for result in results] == [1, 1]
    assert {key.partition("/")[0] for key in publishing.published()} == {
        run.session_action_id for run in runs
    }


def test_o4_a_publication_that_is_cancelled_stops_soon(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    watched.start(watched.publisher())
    watched.write({f"{number:04}.exr": 10 for number in range(10)})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="published")
    cancellation = Cancellation()
    waiting = in_background(lambda: watched.finish(cancellation=cancellation))
    await_that(lambda: bool(fault_proxy.count("PUT", "published")))

    cancellation.cancel()

    # What was asked for is never answered.
    with pytest.raises(CancelledError):
        waiting()


@pytest.mark.slow
def test_t9_a_publication_is_paused_and_resumed_from_another_process(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    watched.start(watched.publisher(Required=True))
    watched.write({f"{number:04}.exr": 10 for number in range(60)})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="published", seconds=0.5)
    waiting = in_background(watched.finish)
    await_that(lambda: fault_proxy.count("PUT", "published") > 1)
    [row] = [row for row in watched.host.transfers() if row.kind == "publish"]
    with Ledger.open(watched.host.state_dir / "ledger.db") as ledger:
        ledger.set_transfer(row.id, status=TransferStatus.PAUSED, modifier="0:somebody")
        time.sleep(1.0)
        paused = fault_proxy.count("PUT", "published")
        time.sleep(1.5)
        assert fault_proxy.count("PUT", "published") == paused < 60
        ledger.set_transfer(row.id, status=TransferStatus.WAITING, modifier="0:somebody")

    result = waiting()

    assert result.publish_failures == []
    assert len(watched.published()) == 60


@pytest.mark.usefixtures("declined")
def test_t9_a_publication_that_somebody_aborts_is_a_failure_and_leaves_no_upload(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    watched.start(watched.publisher("large", Encoding="zstd"), watched.publisher("plain"))
    watched.write({"large.abc": LARGE})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=r"\.tar\.zst", seconds=WAIT_SECONDS)
    waiting = in_background(watched.finish)
    await_that(lambda: fault_proxy.count("PUT", r"\.tar\.zst") > 0)
    [row] = [row for row in watched.host.transfers() if row.kind == "publish"]
    with Ledger.open(watched.host.state_dir / "ledger.db") as ledger:
        ledger.set_transfer(row.id, status=TransferStatus.ABORTED, modifier="0:somebody")

    result = waiting()

    assert [failure.error for failure in result.publish_failures] == ["E_ABORTED"]
    assert watched.published() == ["plain/renders/large.abc"]
    fault_proxy.clear()
    await_that(lambda: not watched.uploads())
