"""The S3 store in front of a real server that misbehaves.

What heals is outlived, what does not heal is the right error in time, and nothing wrong is ever
delivered.
"""

import logging
import os
import random
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from agent_plugin.content import events, layout
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    CancelledError,
    PropmasterError,
    StoreAccessError,
    StoreProtocolError,
    StoreThrottledError,
    StoreUnavailableError,
)
from agent_plugin.content.open_store import build_store
from agent_plugin.content.parts import PART_BYTES
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Store
from agent_plugin.services import LazyStore, store_limits
from agent_plugin.settings import load
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.promptness import STOP_SECONDS
from tests.servers.s3_server import S3Server

# As patient as the usual one, in attempts, but not in seconds.
QUICK = RetryPolicy(initial_seconds=0.01, cap_seconds=0.1, read_timeout=2.0, deadline_seconds=10.0)
SMALL = b"a small blob, but not so small that half of it is nothing"
SMALL_DIGEST = Digest.of(SMALL)
MIB = 1024 * 1024
READS = frozenset({"GET", "HEAD"})
WRITES = frozenset({"PUT", "POST"})
CONDITION = "if-none-match"

OUTLIVED = [
    Fault.UNAVAILABLE,
    Fault.SLOW_DOWN,
    Fault.INTERNAL_ERROR,
    Fault.XML_OK,
    Fault.EMPTY_OK,
    Fault.RESET,
    Fault.NOT_HTTP,
    Fault.REFUSE,
    Fault.REPLY_LOST,
    Fault.RESET_MID_BODY,
    Fault.SHORT_BODY,
    Fault.SHORT_OBJECT,
    Fault.LONG_OBJECT,
    Fault.TRAILING_BYTES,
    Fault.WRONG_BYTES,
    Fault.FLIPPED_BIT,
    Fault.DUPLICATE_LENGTH,
    Fault.GZIP_HEADER,
    Fault.REDIRECT_307,
]


@pytest.fixture(scope="module")
def large() -> bytes:
    return random.Random(7).randbytes(3 * PART_BYTES + 12_345)


@pytest.fixture
def store(fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str) -> Store:
    return build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        policy=QUICK,
        account_id="",
    )


@pytest.fixture
def behind(s3: S3Server, s3_prefix: str) -> Callable[[str, bytes], None]:
    """Store something past the proxy."""

    def write(name: str, data: bytes) -> None:
        s3.client().put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/{name}", Body=data)

    return write


def fetched(store: Store, digest: Digest, cancellation: Cancellation | None = None) -> bytes:
    with tempfile.TemporaryFile() as file:
        store.fetch(digest, file.fileno(), cancellation=cancellation or Cancellation())
        return os.pread(file.fileno(), digest.size + 1, 0)


def put_file(store: Store, data: bytes, cancellation: Cancellation | None = None) -> bool:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return store.put_file(
            Digest.of(data), file.fileno(), cancellation=cancellation or Cancellation()
        )


def uploads_of(s3: S3Server, prefix: str) -> list[str]:
    listing = s3.client().list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix)
    return [upload["Key"] for upload in listing.get("Uploads", [])]


@pytest.mark.parametrize("fault", OUTLIVED)
def test_a_fault_that_passes_is_outlived_when_reading(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None], fault: Fault
) -> None:
    """Twice in a row for a small blob, and once in each part of a large one."""
    behind(layout.blob_key(SMALL_DIGEST), SMALL)
    rule = fault_proxy.inject(fault, times=2, seconds=0.2)

    assert store.get(SMALL_DIGEST) == SMALL
    assert rule.hits > 0


@pytest.mark.parametrize(
    "fault", [*(fault for fault in OUTLIVED if fault is not Fault.REFUSE), Fault.WRONG_RANGE]
)
def test_a_fault_that_passes_is_outlived_when_fetching_in_parts(
    store: Store,
    fault_proxy: FaultProxy,
    behind: Callable[[str, bytes], None],
    large: bytes,
    fault: Fault,
) -> None:
    digest = Digest.of(large)
    behind(layout.blob_key(digest), large)
    rule = fault_proxy.inject(fault, times=2)

    assert fetched(store, digest) == large
    assert rule.hits == 2


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET_MID_BODY, Fault.FLIPPED_BIT])
def test_where_a_third_of_all_answers_fails_everything_still_arrives(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None], fault: Fault
) -> None:
    """With not much more requests than faults, though 8 threads are at it."""
    blobs = [random.Random(number).randbytes(10_000) for number in range(40)]
    for blob in blobs:
        behind(layout.blob_key(Digest.of(blob)), blob)
    # At 30 % four damaged answers in a row are likely enough to fail one of 100 tests.
    rule = fault_proxy.inject(fault, rate=0.1 if fault is Fault.FLIPPED_BIT else 0.3)

    with ThreadPoolExecutor(8) as threads:
        arrived = list(threads.map(lambda blob: store.get(Digest.of(blob)), blobs))
    assert arrived == blobs
    assert fault_proxy.count("GET") == len(blobs) + rule.hits


@pytest.mark.parametrize(
    "fault",
    [
        Fault.UNAVAILABLE,
        Fault.INTERNAL_ERROR,
        Fault.RESET,
        Fault.REPLY_LOST,
        Fault.NOT_HTTP,
    ],
)
def test_a_fault_that_passes_is_outlived_when_writing(
    store: Store,
    fault_proxy: FaultProxy,
    s3: S3Server,
    s3_prefix: str,
    large: bytes,
    fault: Fault,
) -> None:
    """Also when the store did its part and only the answer was lost."""
    rule = fault_proxy.inject(fault, methods=WRITES | {"HEAD"}, times=2)
    store.put(SMALL_DIGEST, SMALL)
    store.put_document("a/b", SMALL, {"asset-root": "/a"})
    assert rule.hits == 2
    fault_proxy.inject(fault, methods=WRITES, times=3)
    put_file(store, large)

    assert store.get(SMALL_DIGEST) == SMALL
    assert store.get_document("a/b", max_bytes=100).data == SMALL
    assert fetched(store, Digest.of(large)) == large
    if fault is not Fault.REPLY_LOST:
        # An upload that was begun twice, because the first id got lost, can not be ended by us.
        assert uploads_of(s3, s3_prefix) == []


def test_a_completion_whose_answer_was_lost_is_a_success(
    store: Store, fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, large: bytes
) -> None:
    rule = fault_proxy.inject(Fault.REPLY_LOST, methods={"POST"}, skip=1, times=1)

    assert put_file(store, large) is True

    assert rule.hits == 1
    assert fetched(store, Digest.of(large)) == large
    assert uploads_of(s3, s3_prefix) == []


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_a_completion_whose_answer_came_empty_is_a_success_if_the_object_is_there(
    store: Store,
    fault_proxy: FaultProxy,
    s3: S3Server,
    s3_prefix: str,
    large: bytes,
    times: int | None,
) -> None:
    fault_proxy.inject(Fault.SHORT_OBJECT, offset=0, methods={"POST"}, skip=1, times=times)

    assert put_file(store, large) is True

    assert fetched(store, Digest.of(large)) == large
    assert uploads_of(s3, s3_prefix) == []


def test_a_completion_whose_answer_came_empty_is_none_if_the_object_is_not_there(
    store: Store, fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, large: bytes
) -> None:
    fault_proxy.inject(Fault.EMPTY_OK, methods={"POST"}, skip=1)

    with pytest.raises(StoreProtocolError, match="the answer has no ETag"):
        put_file(store, large)

    assert store.find_missing([Digest.of(large)]) == {Digest.of(large)}
    assert uploads_of(s3, s3_prefix) == []


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.FORBIDDEN, StoreAccessError),
        (Fault.EXPIRED_TOKEN, StoreAccessError),
        (Fault.NOT_FOUND, BlobNotFoundError),
        (Fault.REDIRECT_301, StoreProtocolError),
        (Fault.XML_OK, BlobCorruptError),
        (Fault.EMPTY_OK, BlobCorruptError),
        (Fault.SHORT_OBJECT, BlobCorruptError),
        (Fault.WRONG_BYTES, BlobCorruptError),
        (Fault.SLOW_DOWN, StoreThrottledError),
        (Fault.INTERNAL_ERROR, StoreUnavailableError),
        (Fault.RESET, StoreUnavailableError),
        (Fault.SHORT_BODY, StoreUnavailableError),
    ],
)
def test_a_fault_that_stays_is_the_right_error(
    store: Store,
    fault_proxy: FaultProxy,
    behind: Callable[[str, bytes], None],
    fault: Fault,
    expected: type[PropmasterError],
) -> None:
    """Tried 12 times, 10 times if it may be damage at the source, once if it will not change.

    When the store asks to be slower it is tried for as long as the deadline allows.
    """
    behind(layout.blob_key(SMALL_DIGEST), SMALL)
    rule = fault_proxy.inject(fault)

    with pytest.raises(expected) as raised:
        store.get(SMALL_DIGEST)

    assert SMALL_DIGEST.hex in raised.value.message
    if expected.retryable:
        if expected is not StoreThrottledError:
            assert rule.hits == (10 if expected is BlobCorruptError else 12)
        assert f"given up after {rule.hits} attempts" in raised.value.message


def test_a_large_blob_is_fetched_again_but_not_for_ever(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None], large: bytes
) -> None:
    digest = Digest.of(large)
    behind(layout.blob_key(digest), large)
    fault_proxy.inject(Fault.FLIPPED_BIT)
    told: list[int] = []

    with tempfile.TemporaryFile() as file, pytest.raises(BlobCorruptError, match="4 attempts"):
        store.fetch(digest, file.fileno(), cancellation=Cancellation(), progress=told.append)
    assert fault_proxy.count("GET") == 4 * 4
    assert sum(told) == digest.size


def test_a_large_blob_is_fetched_again_however_long_that_takes(
    store: Store, fault_proxy: FaultProxy, s3: S3Server, large: bytes
) -> None:
    """Each time everything came, so that only the number of tries counts."""
    digest = Digest.of(large)
    hasty = build_store(
        store.url,
        environment=s3.environment_at(fault_proxy.url),
        policy=replace(QUICK, deadline_seconds=0.001),
        account_id="",
    )
    put_file(store, large)
    rule = fault_proxy.inject(Fault.FLIPPED_BIT, times=3)

    assert fetched(hasty, digest) == large
    assert rule.hits == 3


def test_the_time_in_which_bytes_came_does_not_count_against_the_deadline(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, behind: Callable[[str, bytes], None]
) -> None:
    """As on a slow line: each try lasts 5 s, and 2 s of silence would end it.

    If all of it counted, the third damaged answer would be the last. One that the machine, busy
    with others, lets time out comes on top.
    """
    data = b"d" * 1000
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        policy=RetryPolicy(
            connect_timeout=1.0,
            read_timeout=1.0,
            deadline_seconds=9.5,
            damaged_retries=3,
            initial_seconds=0.01,
        ),
        account_id="",
    )
    behind(layout.blob_key(Digest.of(data)), data[::-1].replace(b"d", b"e", 1))
    fault_proxy.inject(Fault.DRIP, bytes_per_second=200)

    with pytest.raises(BlobCorruptError, match=r"given up after [4-6] attempts"):
        store.get(Digest.of(data))


def test_an_object_replaced_between_ranges_is_not_mixed(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None], large: bytes
) -> None:
    digest = Digest.of(large)
    behind(layout.blob_key(digest), large)
    rule = fault_proxy.inject(Fault.ETAG_CHANGED, skip=1, times=1)

    assert fetched(store, digest) == large
    assert rule.hits == 1
    assert fault_proxy.count("GET") > 4


def test_the_whole_for_a_range_is_refused_without_waiting_for_its_body(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, behind: Callable[[str, bytes], None]
) -> None:
    """The body never comes; who read it before looking at the status would time out."""
    behind(layout.blob_key(SMALL_DIGEST), SMALL)
    rule = fault_proxy.inject(Fault.WHOLE_FOR_RANGE, offset=0)
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        policy=replace(QUICK, damaged_retries=1),
        account_id="",
    )

    with pytest.raises(StoreProtocolError, match="non-partial response"):
        store.read_range(SMALL_DIGEST, 1, 5)
    assert rule.hits == 2


def test_a_compressed_answer_to_a_range_is_refused(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None]
) -> None:
    """What can not be verified must at least be what was asked for."""
    behind(layout.blob_key(SMALL_DIGEST), SMALL)
    behind("Manifests/a", SMALL)
    fault_proxy.inject(Fault.GZIP_HEADER)

    with pytest.raises(StoreProtocolError, match="coded as 'gzip'"):
        store.read_range(SMALL_DIGEST, 1, 5)
    with pytest.raises(StoreProtocolError, match="coded as 'gzip'"):
        store.get_document("a", max_bytes=1000)


def test_errors_when_asking_for_presence_do_not_mean_absence(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None]
) -> None:
    behind(layout.blob_key(SMALL_DIGEST), SMALL)
    for fault, expected in [
        (Fault.FORBIDDEN, StoreAccessError),
        (Fault.UNAVAILABLE, StoreThrottledError),
        (Fault.REDIRECT_301, StoreProtocolError),
        (Fault.EXPIRED_TOKEN, StoreAccessError),
        (Fault.RESET, StoreUnavailableError),
    ]:
        fault_proxy.clear()
        fault_proxy.inject(fault, methods=READS)
        with pytest.raises(expected):
            store.find_missing([SMALL_DIGEST])
    fault_proxy.clear()
    assert store.find_missing([SMALL_DIGEST]) == set()


def test_a_head_that_is_refused_though_the_object_can_be_read_is_not_believed(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None]
) -> None:
    behind(layout.blob_key(SMALL_DIGEST), SMALL)
    fault_proxy.inject(Fault.FORBIDDEN, methods={"HEAD"})
    assert store.find_missing([SMALL_DIGEST]) == set()


def test_throttling_lowers_the_number_of_requests_under_way(
    store: Store,
    fault_proxy: FaultProxy,
    behind: Callable[[str, bytes], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    blobs = [random.Random(number).randbytes(100) for number in range(30)]
    for blob in blobs:
        behind(layout.blob_key(Digest.of(blob)), blob)
    fault_proxy.inject(Fault.SLOW_DOWN, times=20)

    with (
        caplog.at_level(logging.INFO, logger=events.LOGGER_NAME),
        ThreadPoolExecutor(16) as threads,
    ):
        assert list(threads.map(lambda blob: store.get(Digest.of(blob)), blobs)) == blobs
    cuts = [
        events.fields_of(record)["requests_allowed"]
        for record in caplog.records
        if record.getMessage() == events.STORE_THROTTLED
    ]
    assert cuts
    assert all(isinstance(allowed, int) and 1 <= allowed <= 8 for allowed in cuts)


def cancel_when(
    truth: Callable[[], bool], cancellation: Cancellation, moments: list[float]
) -> None:
    """Cancel once something is so, 30 s later at the most; add the moment to `moments`."""
    deadline = time.monotonic() + 30
    while not truth() and time.monotonic() < deadline:
        time.sleep(0.01)
    moments.append(time.monotonic())
    cancellation.cancel()


@pytest.mark.parametrize("size", [1000, 3 * PART_BYTES], ids=["small", "large"])
def test_a_fetch_from_a_store_that_went_silent_can_be_cancelled_at_once(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, size: int
) -> None:
    """And what still arrives afterwards is written nowhere."""
    data = os.urandom(size)
    digest = Digest.of(data)
    s3.client().put_object(
        Bucket=s3.bucket, Key=f"{s3_prefix}/{layout.blob_key(digest)}", Body=data
    )
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        account_id="",
    )
    fault_proxy.inject(Fault.STALL, seconds=STOP_SECONDS + 1)
    cancellation = Cancellation()
    cancelled: list[float] = []
    thread = threading.Thread(
        target=cancel_when,
        args=(lambda: fault_proxy.count("GET") > 0, cancellation, cancelled),
    )
    thread.start()
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as other:
        with pytest.raises(CancelledError):
            store.fetch(digest, file.fileno(), cancellation=cancellation)
        assert time.monotonic() - cancelled[0] < STOP_SECONDS
        thread.join(10)
        # From now on the descriptor's number is another file's, as when it was used again.
        os.dup2(other.fileno(), file.fileno())
        deadline = time.monotonic() + 60
        while any(request.status is None for request in fault_proxy.requests):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        assert os.fstat(other.fileno()).st_size == 0


def test_an_upload_to_a_store_that_went_silent_can_be_cancelled_and_leaves_nothing(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, large: bytes
) -> None:
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        account_id="",
    )
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, seconds=STOP_SECONDS + 1)
    cancellation = Cancellation()
    cancelled: list[float] = []
    thread = threading.Thread(
        target=cancel_when,
        args=(lambda: fault_proxy.count("PUT") >= 2, cancellation, cancelled),
    )
    thread.start()
    with pytest.raises(CancelledError):
        put_file(store, large, cancellation)
    assert time.monotonic() - cancelled[0] < STOP_SECONDS
    thread.join(10)
    deadline = time.monotonic() + 60
    while uploads_of(s3, s3_prefix):
        assert time.monotonic() < deadline, "the upload was not aborted"
        time.sleep(0.05)
    assert store.find_missing([Digest.of(large)]) == {Digest.of(large)}


def test_an_upload_that_fails_is_aborted(
    store: Store, fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, large: bytes
) -> None:
    fault_proxy.inject(Fault.FORBIDDEN, methods={"PUT"}, skip=1)

    with pytest.raises(StoreAccessError):
        put_file(store, large)
    assert uploads_of(s3, s3_prefix) == []


def test_an_upload_that_can_not_even_be_aborted_is_told(
    store: Store, fault_proxy: FaultProxy, large: bytes, expected_events: set[str]
) -> None:
    expected_events.add(events.UPLOAD_LEFT)
    fault_proxy.inject(Fault.FORBIDDEN, methods={"PUT", "DELETE"})

    with pytest.raises(StoreAccessError):
        put_file(store, large)
    assert fault_proxy.count("DELETE") == 1


def test_a_store_without_conditional_writes_is_asked_first(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None]
) -> None:
    """Found out once, by its answer 501."""
    behind(layout.blob_key(Digest.of(b"there")), b"there")
    rule = fault_proxy.inject(Fault.NOT_IMPLEMENTED, methods={"PUT"}, header=CONDITION)

    assert store.put(Digest.of(b"there"), b"there") is False
    assert (rule.hits, fault_proxy.count("PUT")) == (1, 1)
    fault_proxy.forget()
    assert store.put(Digest.of(b"there"), b"there") is False
    assert fault_proxy.count("PUT") == 0
    assert store.put(Digest.of(b"new"), b"new") is True
    assert store.put(Digest.of(b"new"), b"new") is False
    assert (rule.hits, fault_proxy.count("PUT")) == (1, 1)
    assert store.get(Digest.of(b"new")) == b"new"


def test_a_condition_is_unknown_to_a_store_that_takes_the_same_without(
    store: Store, fault_proxy: FaultProxy, behind: Callable[[str, bytes], None]
) -> None:
    """Servers also answer 400, which by itself says nothing of conditions."""
    behind(layout.blob_key(Digest.of(b"there")), b"there")
    rule = fault_proxy.inject(Fault.INVALID_ARGUMENT, methods={"PUT"}, header=CONDITION)

    assert store.put(Digest.of(b"there"), b"there") is False
    assert store.put(Digest.of(b"new"), b"new") is True
    assert rule.hits == 2, "what is there proves nothing"
    assert store.put(Digest.of(b"new"), b"new") is False
    assert store.put(Digest.of(b"newer"), b"newer") is True
    assert rule.hits == 2
    assert store.get(Digest.of(b"newer")) == b"newer"


def test_a_write_that_is_refused_without_condition_too_is_an_error(
    store: Store, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(Fault.INVALID_ARGUMENT, methods={"PUT"})

    with pytest.raises(StoreProtocolError, match="400 InvalidArgument"):
        store.put(SMALL_DIGEST, SMALL)

    fault_proxy.clear()
    fault_proxy.forget()
    assert store.put(SMALL_DIGEST, SMALL) is True
    [request] = fault_proxy.requests
    assert request.headers[CONDITION] == "*", "nothing was concluded"


def test_expired_credentials_are_renewed_once(
    fault_proxy: FaultProxy,
    s3: S3Server,
    s3_prefix: str,
    tmp_path: Path,
    behind: Callable[[str, bytes], None],
) -> None:
    """By asking the profile's process again; if that does not help, it is an error."""
    behind(layout.blob_key(SMALL_DIGEST), SMALL)
    asked = tmp_path / "asked"
    process = tmp_path / "credentials.sh"
    process.write_text(
        f"#!/bin/sh\necho asked >> {asked}\n"
        f'echo \'{{"Version": 1, "AccessKeyId": "{s3.access_key}",'
        f' "SecretAccessKey": "{s3.secret_key}", "Expiration": "2100-01-01T00:00:00Z"}}\'\n'
    )
    process.chmod(stat.S_IRWXU)
    config = tmp_path / "config"
    config.write_text(f"[profile queue]\ncredential_process = {process}\n")
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment={
            "AWS_PROFILE": "queue",
            "AWS_CONFIG_FILE": str(config),
            "AWS_ENDPOINT_URL_S3": fault_proxy.url,
        },
        policy=QUICK,
        account_id="",
    )

    def times_asked() -> int:
        return asked.read_text().count("asked")

    before = times_asked()
    fault_proxy.inject(Fault.EXPIRED_TOKEN, times=1)
    assert store.get(SMALL_DIGEST) == SMALL
    assert times_asked() == before + 1

    fault_proxy.inject(Fault.EXPIRED_TOKEN, times=2)
    with pytest.raises(StoreAccessError, match="ExpiredToken"):
        store.get(SMALL_DIGEST)
    assert times_asked() == before + 2
    assert store.get(SMALL_DIGEST) == SMALL


def test_keys_from_a_source_of_their_own_are_asked_for_there_again(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, behind: Callable[[str, bytes], None]
) -> None:
    """Before they end, and when they are refused; nothing else is asked for keys.

    Seen to fail when the environment's chain is asked instead.
    """
    behind(layout.blob_key(SMALL_DIGEST), SMALL)
    ends = iter(["2001-01-01T00:00:00Z", "2100-01-01T00:00:00Z", "2100-01-01T00:00:00Z"])
    asked: list[str] = []

    def find() -> dict[str, object]:
        asked.append(end := next(ends))
        keys = {"AccessKeyId": s3.access_key, "SecretAccessKey": s3.secret_key}
        return {"Version": 1, **keys, "SessionToken": "", "Expiration": end}

    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment={"AWS_CONFIG_FILE": os.devnull, "AWS_ENDPOINT_URL_S3": fault_proxy.url},
        policy=QUICK,
        account_id="",
        keys=find,
    )
    assert store.get(SMALL_DIGEST) == SMALL
    assert len(asked) == 2

    fault_proxy.inject(Fault.EXPIRED_TOKEN, times=1)
    assert store.get(SMALL_DIGEST) == SMALL
    assert len(asked) == 3


def test_a_prefix_with_a_trailing_slash_gives_two(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str
) -> None:
    """As the Deadline client has it; seen in the requests, since not every server keeps both."""
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}/",
        environment=s3.environment_at(fault_proxy.url),
        policy=QUICK,
        account_id="",
    )
    assert store.url == f"s3://{s3.bucket}/{s3_prefix}/"
    store.put(SMALL_DIGEST, SMALL)
    store.find_missing([SMALL_DIGEST])
    list(store.list_documents("a/"))

    paths = {request.path for request in fault_proxy.requests if request.method in {"PUT", "HEAD"}}
    assert paths == {f"/{s3.bucket}/{s3_prefix}//Data/{SMALL_DIGEST.hex}.xxh128"}
    queries = [request.query for request in fault_proxy.requests if request.query]
    assert any(f"prefix={s3_prefix}%2F%2FManifests%2Fa%2F" in query for query in queries)


def test_the_process_environment_does_not_change_where_a_store_is(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client library reads variables by itself; only what was passed in may count."""
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "other",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "other",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        "AWS_REGION": "eu-west-1",
    }.items():
        monkeypatch.setenv(name, value)
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        policy=QUICK,
        account_id="",
    )
    store.put(SMALL_DIGEST, SMALL)
    store.put_document("a", SMALL, {})
    assert store.get(SMALL_DIGEST) == SMALL
    assert [info.key for info in store.list_documents("")] == ["a"]
    assert all("x-amz-security-token" not in request.headers for request in fault_proxy.requests)


def test_slow_uploads_are_given_more_time_than_slow_answers(
    s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy
) -> None:
    """The time that sending a body takes counts as silence of the store."""
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        policy=RetryPolicy(attempts=1, read_timeout=1.0),
        account_id="",
    )
    data = os.urandom(WHOLE_BLOB_BYTES)
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, seconds=2, times=1)

    assert store.put(Digest.of(data), data) is True


def waiting_for_a_fast_line(
    s3: S3Server, prefix: str, proxy: FaultProxy, *, deadline_seconds: float = 1.0
) -> Store:
    """Return a store that gives 8 MiB 2 s, and what is larger a further second for each 8 MiB.

    With the deadline it tries twice, or more often where the machine lets an answer time out.
    """
    return build_store(
        f"s3://{s3.bucket}/{prefix}",
        environment=s3.environment_at(proxy.url),
        policy=RetryPolicy(
            read_timeout=1.0,
            least_bytes_per_second=8 * MIB,
            initial_seconds=0.01,
            deadline_seconds=deadline_seconds,
        ),
        account_id="",
    )


@pytest.mark.parametrize("size", [100_000, PART_BYTES + 100_000], ids=["whole", "in parts"])
def test_a_store_that_drips_is_given_up_after_twice_the_time_that_a_request_has(
    fault_proxy: FaultProxy,
    s3: S3Server,
    s3_prefix: str,
    behind: Callable[[str, bytes], None],
    size: int,
) -> None:
    """At 1 KiB/s, though a byte comes within each read timeout; a second try may be luckier."""
    data = random.Random(size).randbytes(size)
    digest = Digest.of(data)
    behind(layout.blob_key(digest), data)
    store = waiting_for_a_fast_line(s3, s3_prefix, fault_proxy)
    fault_proxy.inject(Fault.DRIP)
    begun = time.monotonic()

    with pytest.raises(StoreUnavailableError, match=r"timed out.*given up after [2-4] attempts"):
        fetched(store, digest)
    # At its rate the blob would take 98 s at the least.
    assert 2.0 <= time.monotonic() - begun < 40
    fault_proxy.clear()
    fault_proxy.inject(Fault.DRIP, times=1)
    patient = waiting_for_a_fast_line(s3, s3_prefix, fault_proxy, deadline_seconds=60)
    assert fetched(patient, digest) == data


def test_the_least_rate_is_what_the_settings_say(
    fault_proxy: FaultProxy,
    s3: S3Server,
    s3_prefix: str,
    behind: Callable[[str, bytes], None],
    tmp_path: Path,
) -> None:
    data = random.Random(1).randbytes(100_000)
    digest = Digest.of(data)
    behind(layout.blob_key(digest), data)
    config = tmp_path / "config.toml"
    config.write_text(
        f"[store]\nread_timeout = 1.0\nattempts = 1\nleast_bytes_per_second = {8 * MIB}\n"
    )
    open_store = LazyStore(
        f"s3://{s3.bucket}/{s3_prefix}",
        store_limits(load(config)),
        s3.environment_at(fault_proxy.url),
        "",
    )
    fault_proxy.inject(Fault.DRIP)

    # At its rate the blob would take 98 s, of which the default lets all pass.
    with pytest.raises(StoreUnavailableError, match=r"timed out.*given up after 1 attempt"):
        fetched(open_store(), digest)


def test_a_manifest_has_time_by_its_size(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str, behind: Callable[[str, bytes], None]
) -> None:
    """2.5 s at 16 MiB/s; 8 MiB have 2 s and 40 MiB have 6 s. One that drips has an end too."""
    data = random.Random(40).randbytes(40 * MIB)
    behind("Manifests/large", data)
    store = waiting_for_a_fast_line(s3, s3_prefix, fault_proxy)
    patient = waiting_for_a_fast_line(s3, s3_prefix, fault_proxy, deadline_seconds=60)
    rule = fault_proxy.inject(Fault.DRIP, bytes_per_second=16 * MIB)

    assert patient.get_document("large", max_bytes=len(data)).data == data

    behind("Manifests/small", data[:100_000])
    rule.bytes_per_second = 1024
    with pytest.raises(StoreUnavailableError, match=r"given up after [2-4] attempts"):
        store.get_document("small", max_bytes=len(data))
