"""What publishers make of a task's outputs, with a real S3 server and real processes.

The job has one root with the output directory `renders`; each test has a prefix of its own in the
shared bucket, for what is published and for the store.
"""

import base64
import hashlib
import io
import json
import re
import signal
import subprocess
import tarfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from agent_plugin.content import events
from agent_plugin.content.errors import (
    CancelledError,
    KeyExistsError,
    StoreAccessError,
)
from agent_plugin.content.objects import SHA256, ObjectAccess, ObjectInfo
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.destination import EXECUTION, HASH, Destination
from agent_plugin.publish.result_documents import find_results, results_prefix
from agent_plugin.session.finish_task import TaskAction
from agent_plugin.session.state import FinishResult
from agent_plugin.session.submit import SubmitResult
from agent_plugin.sources.access import SourceServers
from agent_plugin.sources.resolve import resolve
from agent_plugin.sources.spec import decode_source
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import FARM, JOB, QUEUE, Host, action, job_of
from tests.servers.s3_server import S3Server
from tests.servers.sessions import MTIME_NS, Sessions
from tests.servers.trees import write_files

MEBIBYTE = 1024 * 1024
# Two parts, and some.
LARGE = 12 * MEBIBYTE
# Far above anything measured, so that only a hang meets it.
WAIT_SECONDS = 30.0


class Publishing:
    """A session whose task publishes to a prefix of its own.

    Attributes:
        sessions: The host and the job.
        prefix: What all published keys begin with, without a slash at the end.
        root: Where the task's outputs go.
    """

    def __init__(self, s3: S3Server, tmp_path: Path, host: Host) -> None:
        self.s3 = s3
        self.tmp_path = tmp_path
        self.prefix = f"published-{uuid.uuid4().hex}"
        self.sessions = Sessions(tmp_path, host)
        self.root = Path()

    @property
    def host(self) -> Host:
        return self.sessions.host

    @host.setter
    def host(self, host: Host) -> None:
        self.sessions.host = host

    def publisher(self, key: str = "", **params: Any) -> dict[str, Any]:
        """Return a publisher whose key is below the prefix."""
        key = f"{self.prefix}/{key}" if key else self.prefix
        return {"Type": "s3", "Params": {"Bucket": self.s3.bucket, "Key": key, **params}}

    def start(self, *publishers: dict[str, Any]) -> None:
        job = self.sessions.submitted({"scene": b"usd"}, publishers=list(publishers))
        self.root = self.sessions.started(job)

    def write(self, files: dict[str | bytes, bytes | int]) -> None:
        write_files(
            self.root, {_below(name): data for name, data in files.items()}, mtime_ns=MTIME_NS
        )

    def finish(self, run: TaskAction | None = None, **options: Any) -> FinishResult:
        run = run or action(1, 0, started_at=1_700_000_000.0)
        return self.host.finish_task(self.sessions.session_dir, run, **options)

    def published(self) -> list[str]:
        """Return the published keys below the prefix."""
        pages = (
            self.s3.client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.s3.bucket, Prefix=f"{self.prefix}")
        )
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key.removeprefix(f"{self.prefix}/") for key in found]

    def get(self, key: str) -> bytes:
        found = self.s3.client().get_object(Bucket=self.s3.bucket, Key=f"{self.prefix}/{key}")
        return found["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.s3.client().put_object(Bucket=self.s3.bucket, Key=f"{self.prefix}/{key}", Body=data)

    def metadata(self, key: str) -> dict[str, str]:
        head = self.s3.client().head_object(Bucket=self.s3.bucket, Key=f"{self.prefix}/{key}")
        return head["Metadata"]

    def uploads(self) -> list[str]:
        """Return the keys of uploads in parts that nobody has ended."""
        answer = self.s3.client().list_multipart_uploads(Bucket=self.s3.bucket, Prefix=self.prefix)
        return [upload["Key"] for upload in answer.get("Uploads", [])]

    def arguments(self, run: TaskAction) -> list[str]:
        """Return the arguments of `session finish-task` for an action."""
        assert run.task_id is not None
        return [
            *("session", "finish-task", "--session-dir", str(self.sessions.session_dir)),
            *("--step-id", run.step_id, "--task-id", run.task_id),
            *("--session-action-id", run.session_action_id, "--json"),
        ]


def _below(name: str | bytes) -> str | bytes:
    return b"renders/" + name if isinstance(name, bytes) else f"renders/{name}"


def _host(s3: S3Server, home: Path, endpoint_url: str | None = None) -> Host:
    url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
    return Host(home, url, environment=s3.environment_at(endpoint_url or s3.endpoint_url))


@pytest.fixture
def publishing(s3: S3Server, tmp_path: Path) -> Publishing:
    return Publishing(s3, tmp_path, _host(s3, tmp_path / "host"))


@pytest.fixture
def watched(s3: S3Server, tmp_path: Path, fault_proxy: FaultProxy) -> Publishing:
    """As `publishing`, with every request seen by the proxy."""
    return Publishing(s3, tmp_path, _host(s3, tmp_path / "host", fault_proxy.url))


def params_of(result: FinishResult, index: int = 0) -> Any:
    return result.results[index].params


# ---------------------------------------------------------------------------- O1: plain objects


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_o1_the_store_copies_by_itself_and_no_byte_of_an_output_passes_the_host(
    watched: Publishing, fault_proxy: FaultProxy, count: int
) -> None:
    watched.start(watched.publisher())
    watched.write({f"{number:04}.exr": 1000 + number for number in range(count)})
    fault_proxy.forget()

    result = watched.finish()

    requests = [
        request
        for request in fault_proxy.requests
        if request.key.startswith(watched.prefix) or "x-amz-copy-source" in request.headers
    ]
    # The first question about an object that is not there sees that there is a bucket, by GET.
    assert {
        (request.method, request.body_length > 0)
        for request in requests
        if (request.method, request.status) != ("GET", 404)
    } == {("HEAD", False), ("PUT", False)}
    assert sum(request.method == "PUT" for request in requests) == count
    assert fault_proxy.count("GET", "Data/") == 0
    assert watched.published() == [f"renders/{number:04}.exr" for number in range(count)]
    assert watched.get("renders/0007.exr") == (watched.root / "renders/0007.exr").read_bytes()
    assert result.publish_failures == []


def test_o1_the_result_is_the_prefix_and_says_nothing_that_is_not_so(
    publishing: Publishing,
) -> None:
    publishing.start(publishing.publisher("{jobID}/{taskID}"))
    publishing.write({"a/0001.exr": 10, "0002.exr": 20})
    run = action(1, 3)

    result = publishing.finish(run)

    assert json.loads(msgspec.json.encode(result.results)) == [
        {
            "Type": "s3",
            "Params": {
                "Bucket": publishing.s3.bucket,
                "Key": f"{publishing.prefix}/{JOB}/{run.task_id}/",
                "Endpoint": "",
                "Region": "",
                "Filter": "",
                "VersionID": "",
                "ChecksumSHA256": "",
                "Partition": None,
            },
        }
    ]
    assert publishing.published() == [
        f"{JOB}/{run.task_id}/renders/0002.exr",
        f"{JOB}/{run.task_id}/renders/a/0001.exr",
    ]
    published = publishing.metadata(f"{JOB}/{run.task_id}/renders/0002.exr")
    assert published[EXECUTION] == run.session_action_id
    assert len(published[HASH]) == 32


def test_o1_links_are_published_as_what_they_lead_to_and_empty_directories_not_at_all(
    publishing: Publishing,
) -> None:
    publishing.start(publishing.publisher())
    publishing.write({"0001.exr": b"frame"})
    (publishing.root / "renders/latest.exr").symlink_to("0001.exr")
    (publishing.root / "renders/empty").mkdir()

    publishing.finish()

    assert publishing.published() == ["renders/0001.exr", "renders/latest.exr"]
    assert publishing.get("renders/latest.exr") == b"frame"


def test_o1_an_object_has_the_type_that_its_name_says(publishing: Publishing) -> None:
    publishing.start(publishing.publisher())
    publishing.write({"preview.png": b"png", "scene.unheard-of": b"?"})

    publishing.finish()

    heads = [
        publishing.s3.client().head_object(
            Bucket=publishing.s3.bucket, Key=f"{publishing.prefix}/renders/{name}"
        )["ContentType"]
        for name in ("preview.png", "scene.unheard-of")
    ]
    assert heads == ["image/png", "binary/octet-stream"]


@pytest.mark.parametrize("store", ["s3", "directory"])
def test_o1_to_another_endpoint_the_bytes_are_sent_and_are_those_that_were_stored(
    s3: S3Server, tmp_path: Path, fault_proxy: FaultProxy, store: str
) -> None:
    host = _host(s3, tmp_path / "host")
    if store == "directory":
        host = Host(tmp_path / "host", f"file://{tmp_path}/store", environment=s3.environment)
    publishing = Publishing(s3, tmp_path, host)
    publishing.start(publishing.publisher(Endpoint=fault_proxy.url))
    publishing.write({"0001.exr": 5000, "large.abc": LARGE, "empty": b""})

    result = publishing.finish()

    assert params_of(result).endpoint == fault_proxy.url
    assert publishing.published() == ["renders/0001.exr", "renders/empty", "renders/large.abc"]
    for name in ("0001.exr", "large.abc", "empty"):
        sent = publishing.get(f"renders/{name}")
        assert sent == (publishing.root / "renders" / name).read_bytes()
        assert publishing.metadata(f"renders/{name}")[EXECUTION]
    [event_bytes] = [
        sum(r.body_length for r in fault_proxy.requests if r.method == "PUT" and r.key)
    ]
    assert event_bytes >= 5000 + LARGE


def test_o1_a_store_in_a_directory_publishes_to_the_endpoint_of_the_environment(
    s3: S3Server, tmp_path: Path
) -> None:
    host = Host(tmp_path / "host", f"file://{tmp_path}/store", environment=s3.environment)
    publishing = Publishing(s3, tmp_path, host)
    publishing.start(publishing.publisher(), publishing.publisher("all", Encoding="gzip"))
    publishing.write({"0001.exr": 5000})

    result = publishing.finish()

    assert publishing.published() == ["all.tar.gz", "renders/0001.exr"]
    assert len(result.results) == 2


def test_o1_a_name_that_no_key_can_have_is_told_and_an_archive_keeps_it(
    publishing: Publishing, expected_events: set[str]
) -> None:
    expected_events.add(events.PUBLISH_FAILED)
    publishing.start(publishing.publisher(), publishing.publisher("all", Encoding="gzip"))
    publishing.write({b"latin-\xe9": b"1", "fine": b"2"})

    result = publishing.finish()

    [failure] = result.publish_failures
    assert (failure.publisher, failure.error, failure.required) == (0, "E_BAD_PATH", False)
    assert publishing.published() == ["all.tar.gz"]
    with tarfile.open(fileobj=io.BytesIO(publishing.get("all.tar.gz"))) as archive:
        assert [member.name for member in archive] == ["renders/fine", "renders/latin-\udce9"]


def test_o1_who_may_not_read_the_store_there_sends_the_bytes(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    watched.start(watched.publisher())
    watched.write({"0001.exr": 1000, "0002.exr": 2000})
    fault_proxy.inject(Fault.FORBIDDEN, methods={"PUT"}, header="x-amz-copy-source")

    result = watched.finish()

    assert result.publish_failures == []
    assert watched.published() == ["renders/0001.exr", "renders/0002.exr"]
    assert watched.get("renders/0002.exr") == (watched.root / "renders/0002.exr").read_bytes()


def test_o1_a_profile_publishes_with_its_own_credentials(
    publishing: Publishing, tmp_path: Path
) -> None:
    """Those of the environment may only read."""
    config = tmp_path / "aws-config"
    config.write_text(
        "[profile results]\n"
        f"aws_access_key_id = {publishing.s3.access_key}\n"
        f"aws_secret_access_key = {publishing.s3.secret_key}\n"
    )
    environment = publishing.s3.read_only_environment | {"AWS_CONFIG_FILE": str(config)}
    publishing.host = Host(tmp_path / "host", f"file://{tmp_path}/store", environment=environment)
    publishing.start(publishing.publisher(Profile="results"))
    publishing.write({"0001.exr": 10})

    result = publishing.finish()

    assert result.publish_failures == []
    assert publishing.published() == ["renders/0001.exr"]


# ------------------------------------------------------------------------------- O2: archives


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_o2_the_sha256_of_a_downloaded_archive_is_that_of_the_result(
    publishing: Publishing, encoding: str, tmp_path: Path
) -> None:
    """12 MiB are two parts: what S3 itself says of them is the hash of hashes."""
    publishing.start(publishing.publisher("{jobID}", Encoding=encoding))
    publishing.write({"noise.abc": LARGE, "0001.exr": 5000})

    result = publishing.finish()

    [key] = publishing.published()
    assert key == {"gzip": f"{JOB}.tar.gz", "zstd": f"{JOB}.tar.zst"}[encoding]
    file = tmp_path / "downloaded"
    file.write_bytes(publishing.get(key))
    assert file.stat().st_size > LARGE
    told = subprocess.run(["sha256sum", file], capture_output=True, check=True, timeout=30)
    sha256 = told.stdout.split()[0].decode()
    assert base64.b64decode(params_of(result).checksum_sha256).hex() == sha256
    assert publishing.metadata(key)[SHA256] == sha256
    assert params_of(result).key == f"{publishing.prefix}/{key}"
    data = file.read_bytes()
    if encoding == "zstd":
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["renders/0001.exr", "renders/noise.abc"]
        noise = archive.extractfile("renders/noise.abc")
        assert noise is not None
        assert noise.read() == (publishing.root / "renders/noise.abc").read_bytes()


@pytest.mark.slow
def test_o2_an_archive_that_is_too_large_to_be_kept_is_made_twice_and_is_the_same(
    publishing: Publishing,
) -> None:
    publishing.start(publishing.publisher("large", Encoding="zstd"))
    publishing.write({"one.abc": 40 * MEBIBYTE, "two.abc": 30 * MEBIBYTE})

    result = publishing.finish()

    data = publishing.get("large.tar.zst")
    assert len(data) > 70 * MEBIBYTE
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
    assert params_of(result).checksum_sha256 == checksum


def test_o2_in_a_bucket_with_versions_the_result_has_that_of_the_archive(
    publishing: Publishing,
) -> None:
    client, bucket = publishing.s3.client(), f"versions-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    place = {"Bucket": bucket, "Key": "all", "Encoding": "gzip", "Overwrite": True}
    publishing.start({"Type": "s3", "Params": place})
    versions = []
    for number in range(2):
        publishing.write({f"{number}.exr": 10})
        versions.append(params_of(publishing.finish(action(1, number))).version_id)

    assert len({*versions, ""}) == 3
    [first, second] = [
        client.get_object(Bucket=bucket, Key="all.tar.gz", VersionId=version)["Body"].read()
        for version in versions
    ]
    assert first != second


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


@pytest.fixture
def declined(expected_events: set[str]) -> None:
    expected_events.add(events.PUBLISH_FAILED)


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


@pytest.mark.parametrize("encoding", ["plain", "gzip"])
def test_o4_of_two_executions_that_publish_to_one_key_at_once_exactly_one_wins(
    s3: S3Server, tmp_path: Path, encoding: str
) -> None:
    """Two processes on two hosts, with different outputs of the same names."""
    hosts = [
        Publishing(s3, tmp_path / f"{number}", _host(s3, tmp_path / f"{number}/host"))
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
    fault_proxy.inject(
        Fault.STALL, methods={"PUT"}, key=r"published.*0020\.exr", seconds=1.5, times=1
    )
    waiting = _in_background(watched.finish)
    _await(lambda: bool(fault_proxy.count("PUT", r"published.*0020\.exr")))
    watched.put("renders/0020.exr", b"somebody's")

    result = waiting()

    [failure] = result.publish_failures
    assert failure.error == "E_KEY_EXISTS"
    assert watched.get("renders/0020.exr") == b"somebody's"
    assert "renders/0000.exr" in watched.published()


# ------------------------------------------------------------------ being stopped, and going on


@pytest.mark.parametrize(
    ("encoding", "number"),
    [
        ("plain", signal.SIGKILL),
        ("gzip", signal.SIGTERM),
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
    _await(lambda: bool(fault_proxy.count("PUT", late)))
    # Twice as long as the ledger takes to write down what is told to it.
    time.sleep(1.0)
    process.send_signal(number)
    process.communicate(timeout=WAIT_SECONDS)
    fault_proxy.clear()
    assert process.returncode in (77, -signal.SIGKILL)
    before = watched.published()
    assert not any(key.endswith(".tar.gz") for key in before)
    if number is signal.SIGTERM:
        _await(lambda: not watched.uploads())
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
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="published", seconds=WAIT_SECONDS)
    cancellation = Cancellation()
    waiting = _in_background(lambda: watched.finish(cancellation=cancellation))
    _await(lambda: bool(fault_proxy.count("PUT", "published")))
    begun = time.monotonic()

    cancellation.cancel()

    with pytest.raises(CancelledError):
        waiting()
    assert time.monotonic() - begun < 1.0


@pytest.mark.slow
def test_t9_a_publication_is_paused_and_resumed_from_another_process(
    watched: Publishing, fault_proxy: FaultProxy
) -> None:
    watched.start(watched.publisher())
    watched.write({f"{number:04}.exr": 10 for number in range(60)})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="published", seconds=0.5)
    waiting = _in_background(watched.finish)
    _await(lambda: fault_proxy.count("PUT", "published") > 1)
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
    waiting = _in_background(watched.finish)
    _await(lambda: fault_proxy.count("PUT", r"\.tar\.zst") > 0)
    [row] = [row for row in watched.host.transfers() if row.kind == "publish"]
    with Ledger.open(watched.host.state_dir / "ledger.db") as ledger:
        ledger.set_transfer(row.id, status=TransferStatus.ABORTED, modifier="0:somebody")

    result = waiting()

    assert [failure.error for failure in result.publish_failures] == ["E_ABORTED"]
    assert watched.published() == ["plain/renders/large.abc"]
    fault_proxy.clear()
    _await(lambda: not watched.uploads())


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
    publishing = Publishing(s3, tmp_path, _host(s3, tmp_path / "host"))
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
    assert len(results) == 1
    assert not re.search(r"step-.*/.*/.*output.*", results[0])
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
    publishing.start(publishing.publisher("{executionID}"))
    publishing.write({"0001.exr": 10})
    publishing.finish()
    prefix = results_prefix((FARM, QUEUE, JOB))
    with publishing.host.services() as context:
        store = context.open_store()
        [key] = [info.key for info in store.list_documents(prefix)]
        data = store.get_document(key, max_bytes=MEBIBYTE).data
        store.put_document(f"{prefix}a.json", b"{}", {})
        store.put_document(f"{prefix}b.json", data, {})
        store.put_document(f"{prefix}c.json", b"\xff" * 100, {})

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
        kept = context.ledger.results(job=JOB)
    assert [[(task.source, task.status) for task in each] for each in tasks] == [
        [("renders/0001.exr", "done"), ("renders/0002.exr", "done")]
    ] * 2
    assert tasks[0][0].destination == f"{publishing.prefix}/a/renders/0001.exr"
    assert [each.spec for each in kept] == [
        msgspec.to_builtins(published) for published in result.results
    ]
    assert [each.transfer for each in kept] == [row.id for row in rows]


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


# ---------------------------------------------------------------------------------- machinery


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def _in_background(work: Callable[[], FinishResult]) -> Callable[[], FinishResult]:
    """Start work on a thread of its own; return what awaits its result."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return lambda: future.result(WAIT_SECONDS)
