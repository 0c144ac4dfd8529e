"""Every fault of an object store under a finish-task: survived with the same outputs, or told.

Told means: the documented exit code, and a message with path, hash, key and cause. Nothing is
presented as complete: no manifest names what is not stored, no upload in parts is left behind; and
the same command succeeds once the fault is gone.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import hash_fd
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.store import Cancellation
from agent_plugin.session.finish_task import TaskAction
from agent_plugin.session.state import FinishResult
from agent_plugin.transfer.states import TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.gate import always
from tests.servers.hooks import Host, action, job_with_outputs
from tests.servers.promptness import STOP_SECONDS
from tests.servers.s3_server import S3Server
from tests.servers.trees import FileFacts, files_below, write_files

SMALL: Mapping[str | bytes, bytes | int] = {
    **{f"renders/beauty/{at:04}.exr": 2000 + at for at in range(16)},
    "renders/twice/a": b"the same in two places" * 20,
    "renders/twice/b": b"the same in two places" * 20,
    "renders/empty": b"",
    b"renders/latin-\xe9.tx": 500,
}
LARGE: Mapping[str | bytes, bytes | int] = {"renders/deep.exr": 9_000_000, "renders/log": 700}
DISTINCT = {"small": 19, "large": 2}

IMPATIENT = {
    "attempts": 3, "deadline_seconds": 4.0, "read_timeout": 0.4, "connect_timeout": 1.0,
}  # fmt: skip
PATIENT = {"read_timeout": 0.5}
ALL_METHODS = frozenset({"GET", "HEAD", "PUT", "POST"})


@dataclass
class Case:
    """A session with a task that has just written its outputs, on a host behind a proxy."""

    host: Host
    proxy: FaultProxy
    s3: S3Server
    session_dir: Path
    root: Path
    run: TaskAction
    written: dict[str, FileFacts]

    def finish(self, cancellation: Cancellation | None = None) -> FinishResult:
        return self.host.finish_task(self.session_dir, self.run, cancellation=cancellation)

    def refused(self) -> PropmasterError:
        with pytest.raises(PropmasterError) as caught:
            self.finish()
        self.assert_nothing_is_presented_as_complete()
        return caught.value

    @property
    def prefix(self) -> str:
        return self.host.store_url.rpartition("/")[2]

    def keys(self, below: str) -> list[str]:
        listed = self.s3.client().list_objects_v2(
            Bucket=self.s3.bucket, Prefix=f"{self.prefix}/{below}"
        )
        return [found["Key"] for found in listed.get("Contents", [])]

    def assert_nothing_is_presented_as_complete(self) -> None:
        assert [key for key in self.keys("Manifests/") if key.endswith("_output")] == []
        assert self.uploads_in_parts() == []
        assert files_below(self.root / "renders").keys() == {
            path.removeprefix("renders/") for path in self.written
        }, "what the task wrote stays"

    def uploads_in_parts(self) -> list[str]:
        listed = self.s3.client().list_multipart_uploads(Bucket=self.s3.bucket, Prefix=self.prefix)
        return [found["Key"] for found in listed.get("Uploads", [])]

    def abort_uploads(self) -> None:
        client = self.s3.client()
        listed = client.list_multipart_uploads(Bucket=self.s3.bucket, Prefix=self.prefix)
        for found in listed["Uploads"]:
            client.abort_multipart_upload(
                Bucket=self.s3.bucket, Key=found["Key"], UploadId=found["UploadId"]
            )

    def assert_complete(self, result: FinishResult, to: Path) -> None:
        assert result.files == len(self.written)
        [path] = [
            manifest.output_manifest_path
            for manifest in result.manifests
            if manifest.output_manifest_path
        ]
        assert self.keys("Manifests/") == [f"{self.prefix}/Manifests/{path}"]
        # Another host, which asks the store itself and has nothing in a cache.
        reader = Host(to / "reader", self.host.store_url, environment=self.s3.environment)
        reader.get_outputs(to / "outputs")
        assert files_below(to / "outputs") == self.written
        assert self.uploads_in_parts() == []
        outcomes = {row.status for row in self.host.transfers() if row.kind == "sync-out"}
        assert outcomes == {TransferStatus.DONE}

    def key_of(self, path: str) -> str:
        with (self.root / path).open("rb") as file:
            return f"{hash_fd(file.fileno()).hex}.xxh128"


@pytest.fixture
def make_case(fault_proxy: FaultProxy, s3: S3Server, tmp_path: Path) -> Callable[..., Case]:
    """Return a session with outputs to upload, to a store of its own behind the proxy.

    The job has outputs only, so that nothing is asked of the store before.
    """

    def make(name: str, **store: float) -> Case:
        root_path = "/projects/show"
        url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
        environment = s3.environment_at(fault_proxy.url)
        host = Host(tmp_path / "host", url, environment=environment, store=store)
        job = job_with_outputs(url, root_path)
        session_dir = tmp_path / "session"
        root = Path(host.start(job, session_dir).roots[0].local_root)
        write_files(root, {"small": SMALL, "large": LARGE}[name], mtime_ns=1_650_000_000 * 10**9)
        assert fault_proxy.requests == []
        return Case(host, fault_proxy, s3, session_dir, root, action(), files_below(root))

    return make


@pytest.fixture(autouse=True)
def _an_upload_may_be_left(expected_events: set[str]) -> None:
    """Aborting an upload in parts can fail by the same fault that made it necessary."""
    expected_events.add(events.UPLOAD_LEFT)


# ------------------------------------------------------------ faults that pass

TRANSIENT = [
    Fault.UNAVAILABLE, Fault.SLOW_DOWN, Fault.INTERNAL_ERROR, Fault.RESET, Fault.NOT_HTTP,
    Fault.REPLY_LOST, Fault.STALL, Fault.DUPLICATE_LENGTH, Fault.EMPTY_OK, Fault.XML_OK,
]  # fmt: skip


def survives(case: Case, tmp_path: Path, fault: Fault, rate: float) -> None:
    rule = case.proxy.inject(fault, rate=rate, methods=ALL_METHODS, key="Data/")

    case.assert_complete(case.finish(), tmp_path)

    assert rule.hits or rate < 0.1
    assert case.proxy.count("PUT", "Data/") <= 2.2 * DISTINCT["small"]


@pytest.mark.parametrize("fault", always(Fault.RESET, Fault.STALL, Fault.XML_OK, of=TRANSIENT))
def test_faults_of_a_tenth_of_all_requests_are_survived(
    make_case: Callable[..., Case], tmp_path: Path, fault: Fault
) -> None:
    survives(make_case("small", **PATIENT), tmp_path, fault, 0.1)


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.REPLY_LOST, Fault.EMPTY_OK])
def test_faults_of_a_third_of_all_requests_are_survived(
    make_case: Callable[..., Case], tmp_path: Path, fault: Fault
) -> None:
    survives(make_case("small", **PATIENT), tmp_path, fault, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_faults_of_any_share_of_all_requests_are_survived(
    make_case: Callable[..., Case], tmp_path: Path, fault: Fault, rate: float
) -> None:
    survives(make_case("small", **PATIENT), tmp_path, fault, rate)


OPERATIONS = {
    "head": ("HEAD", 0), "create": ("POST", 0), "first part": ("PUT", 0), "last part": ("PUT", 1),
    "complete": ("POST", 1),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault.UNAVAILABLE, marks=pytest.mark.slow),
        pytest.param(Fault.RESET, marks=pytest.mark.slow),
        Fault.REPLY_LOST,
        Fault.EMPTY_OK,
        pytest.param(Fault.XML_OK, marks=pytest.mark.slow),
    ],
)
def test_a_large_file_arrives_though_any_one_request_fails(
    make_case: Callable[..., Case], tmp_path: Path, fault: Fault, operation: str
) -> None:
    case = make_case("large", **PATIENT)
    method, skip = OPERATIONS[operation]
    key = case.key_of("renders/deep.exr")
    case.proxy.inject(fault, times=1, skip=skip, methods={method}, key=key)

    result = case.finish()

    if (fault, operation) == (Fault.REPLY_LOST, "create"):
        # Nobody learned that upload's id; a lifecycle rule removes such (docs/OPERATING.md).
        case.abort_uploads()
    case.assert_complete(result, tmp_path)


def test_an_upload_that_fails_with_status_200_is_completed_again(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    """S3 may say so to CompleteMultipartUpload, after it has begun to answer with 200.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html
    """
    case = make_case("large", **PATIENT)
    case.proxy.inject(
        Fault.XML_OK, times=1, skip=1, methods={"POST"}, key=case.key_of("renders/deep.exr")
    )

    case.assert_complete(case.finish(), tmp_path)


@pytest.mark.parametrize(
    "fault", always(Fault.UNAVAILABLE, Fault.REPLY_LOST, Fault.EMPTY_OK, of=TRANSIENT)
)
def test_a_manifest_is_stored_though_its_request_fails(
    make_case: Callable[..., Case], tmp_path: Path, fault: Fault
) -> None:
    case = make_case("small", **PATIENT)
    case.proxy.inject(fault, times=2, methods={"PUT"}, key="Manifests/")

    case.assert_complete(case.finish(), tmp_path)


def test_a_store_that_refuses_connections_for_a_while_is_waited_for(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    case = make_case("small", **PATIENT)
    case.proxy.inject(Fault.REFUSE, times=1, seconds=1.5, methods={"PUT"}, key="Data/")

    case.assert_complete(case.finish(), tmp_path)


# ------------------------------------------------------------ faults that last

LASTING = [
    (Fault.UNAVAILABLE, 68, "503 ServiceUnavailable"),
    (Fault.SLOW_DOWN, 68, "503 SlowDown"),
    (Fault.INTERNAL_ERROR, 68, "500 InternalError"),
    (Fault.FORBIDDEN, 70, "403 AccessDenied"),
    (Fault.EXPIRED_TOKEN, 70, "400 ExpiredToken"),
    (Fault.NOT_FOUND, 82, "404 NoSuchKey"),
    (Fault.REDIRECT_301, 82, "another region"),
    (Fault.REDIRECT_307, 82, "another region"),
    (Fault.EMPTY_OK, 82, ""),
    (Fault.XML_OK, 82, ""),
    (Fault.RESET, 68, "Connection reset by peer"),
    (Fault.NOT_HTTP, 68, "the connection was lost"),
    (Fault.REPLY_LOST, 68, "Connection reset by peer"),
    (Fault.STALL, 68, "timed out"),
    (Fault.DUPLICATE_LENGTH, 68, "the connection was lost"),
]


@pytest.mark.parametrize(
    ("fault", "exit_code", "cause"),
    always(
        *(Fault.UNAVAILABLE, Fault.FORBIDDEN, Fault.REDIRECT_301, Fault.EMPTY_OK),
        *(Fault.RESET, Fault.STALL),
        of=LASTING,
    ),
)
def test_a_fault_that_lasts_is_told_and_once_it_is_gone_the_same_command_succeeds(
    make_case: Callable[..., Case], tmp_path: Path, fault: Fault, exit_code: int, cause: str
) -> None:
    case = make_case("small", **IMPATIENT)
    path = "renders/beauty/0007.exr"
    case.proxy.inject(fault, methods=ALL_METHODS, key=case.key_of(path))

    error = case.refused()

    assert (error.exit_code, cause in error.message) == (exit_code, True), error.message
    for named in (path, case.key_of(path), f"{case.host.store_url}/Data/"):
        assert named in error.message
    [row] = [row for row in case.host.transfers() if row.kind == "sync-out"]
    assert (row.status, row.error_code, row.error) == (
        TransferStatus.FAILED, error.code, error.message,
    )  # fmt: skip
    case.proxy.clear()
    case.assert_complete(case.finish(), tmp_path)


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [
        pytest.param(Fault.UNAVAILABLE, 68, marks=pytest.mark.slow),
        pytest.param(Fault.RESET, 68, marks=pytest.mark.slow),
        (Fault.FORBIDDEN, 70),
        (Fault.REPLY_LOST, 68),
        pytest.param(Fault.EMPTY_OK, 82, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("operation", ["create", "part", "complete"])
def test_a_large_file_that_does_not_arrive_is_told_and_leaves_nothing(
    make_case: Callable[..., Case], tmp_path: Path, fault: Fault, exit_code: int, operation: str
) -> None:
    case = make_case("large", **IMPATIENT)
    key = case.key_of("renders/deep.exr")
    methods = {"part": {"PUT"}}.get(operation, {"POST"})
    case.proxy.inject(fault, methods=methods, skip=operation == "complete", key=key)

    if (operation, fault) == ("create", Fault.REPLY_LOST):
        # As above.
        with pytest.raises(PropmasterError) as caught:
            case.finish()
        error = caught.value
        case.abort_uploads()
    else:
        error = case.refused()
    assert error.exit_code == exit_code, error.message
    for named in ("renders/deep.exr", key):
        assert named in error.message
    case.proxy.clear()
    case.assert_complete(case.finish(), tmp_path)


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [(Fault.UNAVAILABLE, 68), (Fault.FORBIDDEN, 70), (Fault.NOT_FOUND, 82), (Fault.STALL, 68)],
)
def test_a_manifest_that_can_not_be_stored_is_told_and_its_content_is_not_sent_again(
    make_case: Callable[..., Case], fault: Fault, exit_code: int
) -> None:
    case = make_case("small", **IMPATIENT)
    case.proxy.inject(fault, methods={"PUT"}, key="Manifests/")

    error = case.refused()

    assert error.exit_code == exit_code
    assert case.run.session_action_id in error.message
    assert len(case.keys("Data/")) == DISTINCT["small"], "the content is there before the manifest"
    case.proxy.clear()
    case.proxy.forget()
    result = case.finish()
    assert result.bytes_uploaded == 0
    assert case.proxy.count("PUT", "Data/") == 0
    assert result.files == len(case.written)


def test_a_host_name_that_does_not_exist_is_told(
    make_case: Callable[..., Case], s3: S3Server
) -> None:
    case = make_case("small", **IMPATIENT)
    case.host.environment = s3.environment_at("http://no-such-host.invalid:9000")

    assert case.refused().exit_code == 68


# ------------------------------------------------------------ cancelled


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("what", ["Data/", "Manifests/"])
def test_a_store_that_hangs_does_not_delay_a_wish_to_stop(
    make_case: Callable[..., Case], tmp_path: Path, name: str, what: str
) -> None:
    case = make_case(name)
    stall = case.proxy.inject(Fault.STALL, methods={"PUT"}, key=what)
    cancellation = Cancellation()
    wished: list[float] = []

    def wish() -> None:
        while not stall.hits:
            time.sleep(0.01)
        wished.append(time.monotonic())
        cancellation.cancel()

    wishing = threading.Thread(target=wish)
    wishing.start()
    with pytest.raises(CancelledError):
        case.finish(cancellation)
    stopped = time.monotonic()
    wishing.join()

    assert stopped - wished[0] < STOP_SECONDS
    case.proxy.clear()
    case.assert_complete(case.finish(), tmp_path)


# ------------------------------------------------------------ as a real command


@pytest.mark.parametrize(
    ("fault", "exit_code", "reference"),
    [
        (Fault.FORBIDDEN, 70, "store-access-denied"),
        (Fault.UNAVAILABLE, 68, "store-throttled"),
        (Fault.RESET, 68, "store-unavailable"),
    ],
)
def test_the_command_ends_with_the_documented_exit_code(
    make_case: Callable[..., Case], fault: Fault, exit_code: int, reference: str
) -> None:
    case = make_case("small", **IMPATIENT)
    path = "renders/beauty/0007.exr"
    case.proxy.inject(fault, methods=ALL_METHODS, key=case.key_of(path))
    arguments = [
        "session", "finish-task", "--session-dir", str(case.session_dir),
        "--step-id", case.run.step_id, "--task-id", str(case.run.task_id),
        "--session-action-id", case.run.session_action_id,
        "--started-at", repr(case.run.started_at), "--json",
    ]  # fmt: skip

    failed = case.host.run(*arguments)

    assert failed.returncode == exit_code, failed.stderr
    assert failed.stdout == ""
    error = next(line for line in failed.stderr.splitlines() if line.startswith("error["))
    assert error.startswith(f"error[{reference}]: {path}: ")
    assert case.key_of(path) in error
    case.assert_nothing_is_presented_as_complete()
    case.proxy.clear()
    healed = case.host.run(*arguments)
    assert healed.returncode == 0, healed.stderr
    assert json.loads(healed.stdout)["files"] == len(case.written)
