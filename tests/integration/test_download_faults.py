"""Every fault of an object store under a session start: survived with the same tree, or told.

Told means: the documented exit code, and a message with the file's path, its hash, its key and the
cause. Nothing is presented as complete: the session is not ready, no wrong byte stands under a
file's name, no temporary file is left; and the same command succeeds once the fault is gone.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import hash_fd
from agent_plugin.content.errors import (
    CancelledError,
    ManifestInvalidError,
    PropmasterError,
    StoreUnavailableError,
)
from agent_plugin.content.store import Cancellation
from agent_plugin.session.job import JobDocument
from agent_plugin.transfer.states import TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, job_of
from tests.servers.promptness import STOP_SECONDS
from tests.servers.s3_server import S3Server
from tests.servers.trees import FileFacts, files_below, write_files

SMALL: dict[str | bytes, bytes | int] = {
    **{f"shots/{at % 3}/plate-{at}.exr": 2000 + at for at in range(20)},
    "twice/a": b"the same in two places" * 20,
    "twice/b": b"the same in two places" * 20,
    "empty": b"",
    b"latin-\xe9.tx": 500,
}
# Fetched in two ranges, since a whole blob has 8 MiB at most.
LARGE: dict[str | bytes, bytes | int] = {"big.abc": 9_000_000, "little.txt": 700}
DISTINCT = {"small": 22, "large": 3}

# As few tries and as little patience as there can be, for faults that last.
IMPATIENT = {
    "attempts": 3, "deadline_seconds": 4.0, "read_timeout": 1.0, "connect_timeout": 1.0,
}  # fmt: skip
# Stalls are noticed early, and everything else as by default.
PATIENT = {"read_timeout": 1.0}


@dataclass(frozen=True)
class Submitted:
    """A job in the bucket, and the tree that it was made of."""

    job: JobDocument
    source: Path
    facts: dict[str, FileFacts]
    store_url: str


@pytest.fixture(scope="module")
def submitted(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Submitted]:
    """Return the job of small files, or of a large one, submitted once for all tests."""
    made: dict[str, Submitted] = {}

    def get(name: str) -> Submitted:
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            source = home / "source"
            write_files(
                source, {"small": SMALL, "large": LARGE}[name], mtime_ns=1_600_000_000 * 10**9
            )
            url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
            result, _ = Host(home / "host", url, environment=s3.environment).submit(
                source, output_directories=["renders"]
            )
            made[name] = Submitted(job_of(result), source, files_below(source), url)
        return made[name]

    return get


@dataclass
class Case:
    """A fresh host behind a proxy, about to start a session of a job."""

    host: Host
    proxy: FaultProxy
    job: JobDocument
    source: Submitted
    session_dir: Path

    def start(self, cancellation: Cancellation | None = None) -> Path:
        """Start the session; return its one local root."""
        result = self.host.start(self.job, self.session_dir, cancellation=cancellation)
        return Path(result.roots[0].local_root)

    def refused(self) -> PropmasterError:
        """Start the session, which fails; return how, and see that nothing looks complete."""
        with pytest.raises(PropmasterError) as caught:
            self.start()
        self.assert_nothing_is_presented_as_complete()
        return caught.value

    def assert_nothing_is_presented_as_complete(self) -> None:
        state = self.host.read_state(self.session_dir)
        assert state is not None
        assert not state.ready
        placed = files_below(self.session_dir)
        for path, facts in placed.items():
            assert facts == self.source.facts.get(path.partition("/")[2]), f"wrong: {path}"
        assert len(placed) < len(self.source.facts)
        self.assert_the_cache_holds_nothing_wrong()

    def assert_the_cache_holds_nothing_wrong(self) -> None:
        temporary = self.host.cache_dir / "v1/tmp"
        assert list(temporary.iterdir()) == []
        with BlobCache.open(
            self.host.cache_dir,
            store_url=self.source.store_url,
            max_bytes=1 << 30,
            min_free_bytes=0,
        ) as cache:
            assert cache.verify().corrupt == ()

    def assert_complete(self, root: Path) -> None:
        assert files_below(root) == self.source.facts
        state = self.host.read_state(self.session_dir)
        assert state is not None
        assert state.ready
        assert [row.status for row in self.host.transfers()] == [TransferStatus.DONE]
        self.assert_the_cache_holds_nothing_wrong()

    def key_of(self, path: str) -> str:
        """Return the last component of the key of a file's blob."""
        with (self.source.source / path).open("rb") as file:
            return f"{hash_fd(file.fileno()).hex}.xxh128"


@pytest.fixture
def make_case(
    submitted: Callable[[str], Submitted], fault_proxy: FaultProxy, s3: S3Server, tmp_path: Path
) -> Callable[..., Case]:
    """Return a fresh host, for a job by name, with the settings of its store as keywords."""

    def make(name: str, **store: Any) -> Case:
        source = submitted(name)
        environment = s3.environment_at(fault_proxy.url)
        host = Host(tmp_path / "host", source.store_url, environment=environment, store=store)
        return Case(host, fault_proxy, source.job, source, tmp_path / "session")

    return make


@pytest.fixture(autouse=True)
def _a_start_may_fail(expected_events: set[str]) -> None:
    expected_events.add(events.SESSION_START_FAILED)


# ------------------------------------------------------------ faults that pass

TRANSIENT = [
    Fault.UNAVAILABLE, Fault.SLOW_DOWN, Fault.INTERNAL_ERROR, Fault.EMPTY_OK, Fault.XML_OK,
    Fault.RESET, Fault.NOT_HTTP, Fault.REPLY_LOST, Fault.RESET_MID_BODY, Fault.SHORT_BODY,
    Fault.SHORT_OBJECT, Fault.LONG_OBJECT, Fault.TRAILING_BYTES, Fault.WRONG_BYTES,
    Fault.FLIPPED_BIT, Fault.STALL, Fault.DUPLICATE_LENGTH, Fault.GZIP_HEADER, Fault.WRONG_RANGE,
]  # fmt: skip


def survives(make_case: Callable[..., Case], fault: Fault, rate: float) -> None:
    case = make_case("small", **PATIENT)
    rule = case.proxy.inject(fault, rate=rate, key="Data/")

    case.assert_complete(case.start())

    wanted = DISTINCT["small"]
    assert rule.hits or rate < 0.1
    assert case.proxy.count("GET", "Data/") <= 2.2 * wanted


@pytest.mark.parametrize("fault", TRANSIENT)
def test_faults_of_a_tenth_of_all_requests_are_survived(
    make_case: Callable[..., Case], fault: Fault
) -> None:
    survives(make_case, fault, 0.1)


@pytest.mark.parametrize(
    "fault", [Fault.UNAVAILABLE, Fault.RESET_MID_BODY, Fault.FLIPPED_BIT, Fault.XML_OK]
)
def test_faults_of_a_third_of_all_requests_are_survived(
    make_case: Callable[..., Case], fault: Fault
) -> None:
    survives(make_case, fault, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_faults_of_any_share_of_all_requests_are_survived(
    make_case: Callable[..., Case], fault: Fault, rate: float
) -> None:
    survives(make_case, fault, rate)


@pytest.mark.parametrize(
    "fault",
    [
        Fault.UNAVAILABLE, Fault.RESET, Fault.RESET_MID_BODY, Fault.SHORT_BODY, Fault.FLIPPED_BIT,
        Fault.WRONG_RANGE, Fault.WHOLE_FOR_RANGE, Fault.GZIP_HEADER, Fault.EMPTY_OK, Fault.STALL,
        Fault.ETAG_CHANGED, Fault.TRAILING_BYTES, Fault.SHORT_OBJECT, Fault.XML_OK,
    ],
)  # fmt: skip
def test_a_large_blob_whose_parts_fail_once_comes_whole(
    make_case: Callable[..., Case], fault: Fault
) -> None:
    case = make_case("large", **PATIENT)
    case.proxy.inject(fault, times=1, key=case.key_of("big.abc"))

    case.assert_complete(case.start())

    assert case.proxy.count("GET", case.key_of("big.abc")) <= 4


@pytest.mark.parametrize("kibibytes", [0, 64, 128, 4096, 8128])
def test_a_large_blob_cut_off_at_any_place_comes_whole(
    make_case: Callable[..., Case], kibibytes: int
) -> None:
    case = make_case("large", **PATIENT)
    case.proxy.inject(
        Fault.RESET_MID_BODY, times=1, offset=kibibytes * 1024, key=case.key_of("big.abc")
    )

    case.assert_complete(case.start())


def test_a_body_that_stands_still_and_goes_on_is_waited_for(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("large", read_timeout=10.0)
    case.proxy.inject(Fault.STALL, offset=100_000, seconds=0.3, key="Data/")

    case.assert_complete(case.start())
    assert case.proxy.count("GET", "Data/") == DISTINCT["large"], "no request was sent again"


def test_a_slow_store_is_waited_for(make_case: Callable[..., Case]) -> None:
    case = make_case("small", read_timeout=3.0)
    case.proxy.inject(Fault.DRIP, bytes_per_second=512, key="Data/", times=3)

    case.assert_complete(case.start())
    assert case.proxy.count("GET", "Data/") == DISTINCT["small"]


def test_a_store_that_refuses_connections_for_a_while_is_waited_for(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("small", **PATIENT)
    case.proxy.inject(Fault.REFUSE, times=1, seconds=1.5, key="Data/")

    case.assert_complete(case.start())


@pytest.mark.slow
def test_a_store_that_refuses_connections_for_half_a_minute_is_waited_for(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("small")
    case.proxy.inject(Fault.REFUSE, times=1, seconds=30, key="Data/")

    case.assert_complete(case.start())


@pytest.mark.slow
def test_a_store_that_throttles_for_a_minute_is_waited_for(
    make_case: Callable[..., Case],
) -> None:
    # The default of 12 tries is spent after 31 to 63 s.
    case = make_case("small", attempts=30)
    case.proxy.inject(Fault.SLOW_DOWN, for_seconds=60, key="Data/")

    case.assert_complete(case.start())


@pytest.mark.parametrize(
    "fault",
    [
        Fault.UNAVAILABLE, Fault.RESET_MID_BODY, Fault.SHORT_BODY, Fault.SHORT_OBJECT,
        Fault.LONG_OBJECT, Fault.FLIPPED_BIT, Fault.WRONG_BYTES, Fault.EMPTY_OK, Fault.XML_OK,
        Fault.STALL, Fault.GZIP_HEADER,
    ],
)  # fmt: skip
def test_a_manifest_that_comes_damaged_is_asked_for_again(
    make_case: Callable[..., Case], fault: Fault
) -> None:
    case = make_case("small", **PATIENT)
    case.proxy.inject(fault, times=2, key="Manifests/")

    case.assert_complete(case.start())


# ------------------------------------------------------------ faults that last

LASTING = [
    (Fault.UNAVAILABLE, 68, "503 ServiceUnavailable"),
    (Fault.SLOW_DOWN, 68, "503 SlowDown"),
    (Fault.INTERNAL_ERROR, 68, "500 InternalError"),
    (Fault.FORBIDDEN, 70, "403 AccessDenied"),
    (Fault.EXPIRED_TOKEN, 70, "400 ExpiredToken"),
    (Fault.NOT_FOUND, 69, "404 NoSuchKey"),
    (Fault.RANGE_NOT_SATISFIABLE, 82, "416 InvalidRange"),
    (Fault.REDIRECT_301, 82, "another region"),
    (Fault.REDIRECT_307, 82, "another region"),
    (Fault.EMPTY_OK, 71, "is stored as 0 bytes"),
    (Fault.XML_OK, 71, "is stored as 166 bytes"),
    (Fault.RESET, 68, "Connection reset by peer"),
    (Fault.NOT_HTTP, 68, "the connection was lost"),
    (Fault.REPLY_LOST, 68, "Connection reset by peer"),
    (Fault.RESET_MID_BODY, 68, "Connection reset by peer"),
    (Fault.SHORT_BODY, 68, "the connection was cut"),
    (Fault.SHORT_OBJECT, 71, "is stored as 1003 bytes"),
    (Fault.LONG_OBJECT, 71, "is stored as 2014 bytes"),
    (Fault.WRONG_BYTES, 71, "is stored as xxh128:"),
    (Fault.FLIPPED_BIT, 71, "is stored as xxh128:"),
    (Fault.WRONG_RANGE, 71, "is stored as xxh128:"),
    (Fault.STALL, 68, "timed out"),
    (Fault.DUPLICATE_LENGTH, 68, "the connection was lost"),
]


@pytest.mark.parametrize(("fault", "exit_code", "cause"), LASTING)
def test_a_fault_that_lasts_is_told_and_once_it_is_gone_the_same_start_succeeds(
    make_case: Callable[..., Case], fault: Fault, exit_code: int, cause: str
) -> None:
    case = make_case("small", **IMPATIENT)
    path = "shots/1/plate-7.exr"
    key = case.key_of(path)
    case.proxy.inject(fault, key=key)

    error = case.refused()

    assert (error.exit_code, cause in error.message) == (exit_code, True), error.message
    for named in (path, key, f"{case.source.store_url}/Data/"):
        assert named in error.message
    [row] = case.host.transfers()
    assert (row.status, row.error_code, row.error) == (
        TransferStatus.FAILED, error.code, error.message,
    )  # fmt: skip
    finished = {blob.name for blob in case.host.cache_dir.rglob("*") if len(blob.name) == 32}
    case.proxy.clear()
    case.proxy.forget()

    case.assert_complete(case.start())

    fetched = {request.key.rpartition("/")[2][:32] for request in case.proxy.requests}
    assert not fetched & finished, "a finished blob was fetched again"


LASTING_ON_RANGES = [
    (Fault.UNAVAILABLE, 68, "503 ServiceUnavailable"),
    (Fault.FORBIDDEN, 70, "403 AccessDenied"),
    (Fault.NOT_FOUND, 69, "404 NoSuchKey"),
    (Fault.RANGE_NOT_SATISFIABLE, 71, "is stored as 0 bytes or less"),
    (Fault.EMPTY_OK, 82, "non-partial response"),
    (Fault.XML_OK, 82, "non-partial response"),
    (Fault.WHOLE_FOR_RANGE, 82, "non-partial response"),
    (Fault.RESET_MID_BODY, 68, "Connection reset by peer"),
    (Fault.SHORT_BODY, 68, "the connection was cut"),
    (Fault.SHORT_OBJECT, 82, ""),
    (Fault.FLIPPED_BIT, 71, "is stored as xxh128:"),
    (Fault.WRONG_RANGE, 82, ""),
    (Fault.GZIP_HEADER, 82, "coded as 'gzip'"),
    (Fault.STALL, 68, "timed out"),
]


@pytest.mark.parametrize(("fault", "exit_code", "cause"), LASTING_ON_RANGES)
def test_a_fault_that_lasts_on_a_large_blob_is_told_and_leaves_nothing(
    make_case: Callable[..., Case], fault: Fault, exit_code: int, cause: str
) -> None:
    case = make_case("large", **IMPATIENT)
    key = case.key_of("big.abc")
    case.proxy.inject(fault, key=key)

    error = case.refused()

    assert (error.exit_code, cause in error.message) == (exit_code, True), error.message
    for named in ("big.abc", key, f"{case.source.store_url}/Data/"):
        assert named in error.message
    case.proxy.clear()
    case.assert_complete(case.start())


def test_a_blob_that_a_head_finds_and_a_get_does_not_is_not_found(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("small", **IMPATIENT)
    case.proxy.inject(Fault.NOT_FOUND, methods={"GET"}, key=case.key_of("shots/1/plate-7.exr"))

    assert case.refused().exit_code == 69


def test_an_object_replaced_between_two_ranges_is_never_put_together(
    make_case: Callable[..., Case], s3: S3Server
) -> None:
    case = make_case("large", attempts=3)
    key = f"{case.source.store_url.rpartition('/')[2]}/Data/{case.key_of('big.abc')}"
    client = s3.client()
    right = client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()
    # One part gets its answer when the object has been replaced.
    stall = case.proxy.inject(Fault.STALL, times=1, key=key)

    def replace() -> None:
        while not stall.hits:
            time.sleep(0.01)
        client.put_object(Bucket=s3.bucket, Key=key, Body=right[::-1])
        stall.released.set()

    replacing = threading.Thread(target=replace)
    replacing.start()
    try:
        assert case.refused().exit_code == 71
    finally:
        replacing.join(30)
        client.put_object(Bucket=s3.bucket, Key=key, Body=right)
    case.assert_complete(case.start())


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [(Fault.NOT_FOUND, 79), (Fault.FORBIDDEN, 70), (Fault.UNAVAILABLE, 68), (Fault.FLIPPED_BIT, 65),
     (Fault.EMPTY_OK, 65), (Fault.SHORT_OBJECT, 65)],
)  # fmt: skip
def test_a_manifest_that_can_not_be_had_is_told_before_anything_is_written(
    make_case: Callable[..., Case], fault: Fault, exit_code: int
) -> None:
    case = make_case("small", **IMPATIENT)
    case.proxy.inject(fault, key="Manifests/")

    error = case.refused()

    assert error.exit_code == exit_code
    assert str(case.job.attachments.manifests[0].input_manifest_path) in error.message
    assert files_below(case.session_dir) == {}
    assert case.proxy.count("GET", "Data/") == 0
    case.proxy.clear()
    case.assert_complete(case.start())


def test_a_manifest_that_is_not_what_the_job_says_is_refused(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("small", **IMPATIENT)
    manifest = msgspec.structs.replace(
        case.job.attachments.manifests[0], input_manifest_hash="0" * 32
    )
    attachments = msgspec.structs.replace(case.job.attachments, manifests=(manifest,))
    case.job = msgspec.structs.replace(case.job, attachments=attachments)

    error = case.refused()

    assert isinstance(error, ManifestInvalidError)
    assert "0" * 32 in error.message
    assert files_below(case.session_dir) == {}


def test_a_host_name_that_does_not_exist_is_told(
    make_case: Callable[..., Case], s3: S3Server
) -> None:
    case = make_case("small", **IMPATIENT)
    case.host.environment = s3.environment_at("http://no-such-host.invalid:9000")

    error = case.refused()

    assert isinstance(error, StoreUnavailableError)
    assert error.exit_code == 68


# ------------------------------------------------------------ cancelled while the store hangs


@pytest.mark.parametrize("what", ["Manifests/", "Data/"])
@pytest.mark.parametrize("name", ["small", "large"])
def test_a_store_that_hangs_does_not_delay_a_wish_to_stop(
    make_case: Callable[..., Case], what: str, name: str
) -> None:
    case = make_case(name)
    stall = case.proxy.inject(Fault.STALL, key=what)
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
        case.start(cancellation)
    stopped = time.monotonic()
    wishing.join()

    assert stopped - wished[0] < STOP_SECONDS
    case.assert_nothing_is_presented_as_complete()
    case.proxy.clear()
    case.assert_complete(case.start())


# ------------------------------------------------------------ as a real command


@pytest.mark.parametrize(
    ("fault", "exit_code", "reference"),
    [
        (Fault.NOT_FOUND, 69, "blob-not-found"),
        pytest.param(Fault.FORBIDDEN, 70, "store-access-denied", marks=pytest.mark.slow),
        pytest.param(Fault.WRONG_BYTES, 71, "blob-corrupt", marks=pytest.mark.slow),
        (Fault.UNAVAILABLE, 68, "store-throttled"),
        pytest.param(Fault.REDIRECT_301, 82, "store-protocol", marks=pytest.mark.slow),
    ],
)
def test_the_command_ends_with_the_documented_exit_code(
    make_case: Callable[..., Case], fault: Fault, exit_code: int, reference: str
) -> None:
    case = make_case("small", **IMPATIENT)
    path = "shots/1/plate-7.exr"
    case.proxy.inject(fault, key=case.key_of(path))
    arguments = case.host.start_arguments(case.job, case.session_dir)

    failed = case.host.run(*arguments)

    assert failed.returncode == exit_code, failed.stderr
    assert failed.stdout == ""
    error = next(line for line in failed.stderr.splitlines() if line.startswith("error["))
    assert error.startswith(f"error[{reference}]: {path}: ")
    assert case.key_of(path) in error
    logged = [json.loads(line) for line in failed.stderr.splitlines() if line.startswith("{")]
    assert [line["event"] for line in logged if line["level"] in ("warning", "error")] == [
        events.SESSION_START_FAILED
    ]
    case.assert_nothing_is_presented_as_complete()
    case.proxy.clear()
    healed = case.host.run(*arguments)
    assert healed.returncode == 0, healed.stderr
    case.assert_complete(Path(json.loads(healed.stdout)["roots"][0]["localRoot"]))


def test_the_command_survives_a_store_that_fails_a_third_of_the_time(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("small", **PATIENT)
    for fault in (Fault.UNAVAILABLE, Fault.RESET_MID_BODY, Fault.FLIPPED_BIT):
        case.proxy.inject(fault, rate=0.12)

    done = case.host.run(*case.host.start_arguments(case.job, case.session_dir))

    assert done.returncode == 0, done.stderr
    case.assert_complete(Path(json.loads(done.stdout)["roots"][0]["localRoot"]))
