"""What becomes of a task whose publishers fail, and where the results of all are found."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import (
    KeyExistsError,
    StoreAccessError,
)
from agent_plugin.publish.result_documents import (
    MAX_RESULTS_BYTES,
    find_results,
    results_prefix,
)
from agent_plugin.session.submit import SubmitResult
from agent_plugin.sources.access import SourceServers
from agent_plugin.sources.resolve import resolve
from agent_plugin.sources.spec import decode_source
from tests.servers.hooks import FARM, JOB, QUEUE, Host, action, job_of
from tests.servers.publishing import (
    MEBIBYTE,
    Publishing,
    host_of,
)
from tests.servers.s3_server import S3Server
from tests.servers.sessions import MTIME_NS
from tests.servers.trees import write_files
from tests.unit.ledger_reads import published as published_by

# --------------------------------------------------------------------- sessions, and required


@pytest.mark.usefixtures("declined")
def test_a_required_publisher_that_fails_fails_the_task_and_loses_no_output(
    publishing: Publishing,
) -> None:
    publishing.start(publishing.publisher(Required=True), publishing.publisher("all/b"))
    publishing.write({"0001.exr": 10})
    publishing.put("renders/0001.exr", b"somebody's")
    run = action(1, 0)

    with pytest.raises(KeyExistsError, match=r"publishers\[0\]: renders/0001.exr|exists already"):
        publishing.finish(run)

    assert len(publishing.sessions.outputs()) == 1
    assert "all/b/renders/0001.exr" in publishing.published()
    [document] = documents(publishing)
    assert [failure.required for failure in document.failures] == [True]

    publishing.s3.client().delete_object(
        Bucket=publishing.s3.bucket, Key=f"{publishing.prefix}/renders/0001.exr"
    )
    result = publishing.finish(run)

    assert [params.params.key for params in result.results] == [
        f"{publishing.prefix}/",
        f"{publishing.prefix}/all/b/",
    ]
    [document] = documents(publishing)
    assert (document.results, document.failures) == (result.results, [])


@pytest.mark.usefixtures("declined")
def test_a_publisher_that_fails_is_a_warning_and_keeps_no_other_from_its_turn(
    publishing: Publishing,
) -> None:
    publishing.start(
        {"Type": "s3", "Params": {"Bucket": "no-such-bucket", "Key": "a"}},
        publishing.publisher("{taskID}"),
    )
    publishing.write({"0001.exr": 10})

    result = publishing.finish()

    assert [failure.publisher for failure in result.publish_failures] == [0]
    assert result.publish_failures[0].error == "E_ACCESS"
    assert result.publish_failures[0].hint == "check the publisher's Bucket"
    assert len(result.results) == 1


@pytest.mark.usefixtures("declined")
def test_who_may_not_write_there_is_told(publishing: Publishing, tmp_path: Path) -> None:
    config = tmp_path / "aws-config"
    config.write_text(
        "[profile reader]\n"
        f"aws_access_key_id = {publishing.s3.read_only_access_key}\n"
        f"aws_secret_access_key = {publishing.s3.read_only_secret_key}\n"
    )
    publishing.host.environment["AWS_CONFIG_FILE"] = str(config)
    publishing.start(publishing.publisher(Profile="reader", Required=True))
    publishing.write({"0001.exr": 10})

    with pytest.raises(StoreAccessError, match=r"publishers\[0\]"):
        publishing.finish()

    assert publishing.published() == []


def test_what_a_failed_task_left_is_not_published(publishing: Publishing) -> None:
    publishing.start(publishing.publisher())
    publishing.write({"0001.exr": 10})

    result = publishing.finish(failed=True, upload_failed=True)

    assert result.files == 1
    assert result.results == []
    assert publishing.published() == []


def test_a_task_without_outputs_publishes_nothing(publishing: Publishing) -> None:
    publishing.start(publishing.publisher("all", Encoding="gzip", Required=True))

    result = publishing.finish()

    assert (result.files, result.results, publishing.published()) == (0, [], [])


# ------------------------------------------------------------------------------- O5: results


def documents(publishing: Publishing) -> list[Any]:
    with publishing.host.services() as context:
        return find_results(context, (FARM, QUEUE, JOB))


def test_o5_all_executions_of_a_job_are_found_in_the_store_from_any_host(
    s3: S3Server, tmp_path: Path
) -> None:
    publishing = Publishing(s3, tmp_path, host_of(s3, tmp_path / "host"))
    publishing.host.environment["DEADLINE_WORKER_ID"] = "worker-of-the-farm"
    publishing.start(publishing.publisher("{nodeID}/{executionID}"))
    runs = [action(1, 0), action(1, None), action(1, 1)]
    for number, run in enumerate(runs):
        publishing.write({f"000{number}.exr": 10 + number})
        publishing.finish(run)
    publishing.host = Host(
        tmp_path / "elsewhere", publishing.host.store_url, environment=s3.environment
    )

    found = documents(publishing)

    assert [each.execution_id for each in found] == [run.session_action_id for run in runs]
    assert [each.task_id for each in found] == [run.task_id for run in runs]
    assert {each.node_id for each in found} == {"worker-of-the-farm"}
    assert [each.results[0].params.key for each in found] == [
        f"{publishing.prefix}/worker-of-the-farm/{run.session_action_id}/" for run in runs
    ]
    with publishing.host.services() as context:
        only = find_results(
            context, (FARM, QUEUE, JOB), step_id=runs[2].step_id, task_id=runs[2].task_id
        )
    assert [each.execution_id for each in only] == [runs[2].session_action_id]


def test_o5_results_are_where_the_services_own_readers_never_list(publishing: Publishing) -> None:
    publishing.start(publishing.publisher("{executionID}"))
    publishing.write({"0001.exr": 10})
    publishing.finish()

    with publishing.host.services() as context:
        store = context.open_store()
        of_job = [info.key for info in store.list_documents(f"{FARM}/{QUEUE}/{JOB}/")]
        results = [info.key for info in store.list_documents(results_prefix((FARM, QUEUE, JOB)))]

    assert [key for key in of_job if not re.search(r"step-.*/.*/.*output.*", key)] == []
    assert sorted(key.rpartition(".")[2] for key in results) == ["files", "json"]
    assert [key for key in results if re.search(r"step-.*/.*/.*output.*", key)] == []
    assert list(publishing.sessions.outputs()) == ["renders/0001.exr"]


def test_o5_a_result_is_an_input_source_as_it_is(publishing: Publishing) -> None:
    publishing.start(publishing.publisher("a"), publishing.publisher("b", Encoding="zstd"))
    publishing.write({"x/0001.exr": 10, "0002.exr": 20})
    result = json.loads(msgspec.json.encode(publishing.finish()))
    servers = SourceServers(publishing.s3.environment)

    plain, archive = (
        resolve(decode_source(each, source="a result"), servers) for each in result["results"]
    )

    assert [entry.path for entry in plain.entries] == ["renders/0002.exr", "renders/x/0001.exr"]
    assert [entry.path for entry in archive.entries] == ["b.tar.zst"]


@pytest.mark.expected_events(events.RESULTS_SKIPPED)
def test_o5_what_somebody_put_among_the_results_hides_none(publishing: Publishing) -> None:
    """Seen to fail, since nothing was found any more, when a large document was a failure."""
    publishing.start(publishing.publisher("{executionID}"))
    publishing.write({"0001.exr": 10})
    publishing.finish()
    prefix = results_prefix((FARM, QUEUE, JOB))
    with publishing.host.services() as context:
        store = context.open_store()
        [key] = [i.key for i in store.list_documents(prefix) if i.key.endswith(".json")]
        data = store.get_document(key, max_bytes=MEBIBYTE).data
        store.put_document(f"{prefix}a.json", b"{}", {})
        store.put_document(f"{prefix}b.json", data, {})
        store.put_document(f"{prefix}c.json", b"\xff" * 100, {})
        store.put_document(f"{prefix}large.json", data + b" " * MAX_RESULTS_BYTES, {})
        # An instant that no calendar has.
        store.put_document(
            f"{prefix}d.json", re.sub(rb'(?<="publishedAt":)[^,]*', b"1e300", data), {}
        )

    assert len(documents(publishing)) == 1


@pytest.mark.slow
@pytest.mark.expected_events(events.RESULTS_SKIPPED)
def test_o5_a_coded_object_among_the_results_hides_none(publishing: Publishing) -> None:
    """Seen to fail when only what is missing, or no JSON, was passed over."""
    publishing.start(publishing.publisher("{executionID}"))
    publishing.write({"0001.exr": 10})
    publishing.finish()
    above = publishing.host.store_url.partition(f"{publishing.s3.bucket}/")[2]
    publishing.s3.client().put_object(
        Bucket=publishing.s3.bucket,
        Key=f"{above}/Manifests/{results_prefix((FARM, QUEUE, JOB))}a.json",
        Body=b"{}",
        ContentEncoding="gzip",
    )

    assert len(documents(publishing)) == 1


def test_o5_a_publication_is_a_transfer_with_a_task_for_each_output(
    publishing: Publishing,
) -> None:
    publishing.start(publishing.publisher("a"), publishing.publisher("b", Encoding="gzip"))
    publishing.write({"0001.exr": 10, "0002.exr": 20})

    result = publishing.finish()

    rows = [row for row in publishing.host.transfers() if row.kind == "publish"]
    assert [(row.status, row.size, row.done) for row in rows] == [("done", 30, 30)] * 2
    with publishing.host.services() as context:
        tasks = [context.ledger.tasks(row.id) for row in rows]
    kept = published_by(publishing.host.state_dir / "ledger.db")
    assert [[(task.source, task.status) for task in each] for each in tasks] == [
        [("renders/0001.exr", "done"), ("renders/0002.exr", "done")]
    ] * 2
    assert tasks[0][0].destination == f"{publishing.prefix}/a/renders/0001.exr"
    assert [(each[0], each[3]) for each in kept] == [
        (JOB, msgspec.to_builtins(published)) for published in result.results
    ]


def test_o5_the_session_keeps_what_was_answered(publishing: Publishing) -> None:
    publishing.start(publishing.publisher("{executionID}"))
    publishing.write({"0001.exr": 10})

    result = publishing.finish()

    state = publishing.host.read_state(publishing.sessions.session_dir)
    assert state is not None
    assert state.answered is not None
    assert state.answered.result.results == result.results
    assert state.answered.is_published


# ------------------------------------------------------------------------------- the commands


def test_o1_submit_takes_publishers_and_finish_task_prints_results(
    publishing: Publishing,
) -> None:
    write_files(publishing.sessions.source, {"scene": b"usd"}, mtime_ns=MTIME_NS)
    place = f"s3://{publishing.s3.bucket}/{publishing.prefix}/{{jobID}}"
    submitted = publishing.host.run(
        *("submit", publishing.sessions.source, "--store", publishing.host.store_url),
        *("--farm-id", FARM, "--queue-id", QUEUE, "--output-dir", "renders", "--json"),
        *("-p", place, "--publisher", f"{place}/all,opt=compress=true"),
    )
    assert submitted.returncode == 0, submitted.stderr
    document = json.loads(submitted.stdout)
    assert [each["Params"].get("Encoding") for each in document["publishers"]] == [None, "gzip"]
    job = job_of(msgspec.json.decode(submitted.stdout, type=SubmitResult))
    publishing.root = publishing.sessions.started(job)
    publishing.write({"0001.exr": 10})

    done = publishing.host.run(*publishing.arguments(action(1, 0)))

    assert done.returncode == 0, done.stderr
    keys = [result["Params"]["Key"] for result in json.loads(done.stdout)["results"]]
    assert keys == [f"{publishing.prefix}/{JOB}/", f"{publishing.prefix}/{JOB}/all.tar.gz"]
    completed = [
        json.loads(line) for line in done.stderr.splitlines() if '"publish.completed"' in line
    ]
    assert next(event["bytes_sent"] for event in completed) == 0
    assert publishing.s3.secret_key not in done.stderr + done.stdout
