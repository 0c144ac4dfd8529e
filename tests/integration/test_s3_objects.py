"""Plain objects on a real server: got as they were looked at, stored without overwriting."""

import json
import os
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import obstore
import obstore.store
import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobNotFoundError,
    CancelledError,
    FileChangedError,
    KeyExistsError,
    ObjectChangedError,
    ObjectNotFoundError,
    SettingsInvalidError,
    StoreAccessError,
    UnsafePathError,
)
from agent_plugin.content.layout import legacy_blob_key
from agent_plugin.content.objects import ObjectAccess, ObjectInfo, Unfinished, split_url
from agent_plugin.content.open_store import build_store
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_environment import locate
from agent_plugin.content.s3_multipart import PartSizes
from agent_plugin.content.s3_objects import S3Objects, open_objects
from agent_plugin.content.s3_store import S3Store
from agent_plugin.content.store import Cancellation
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.gate import always
from tests.servers.s3_server import S3Server

QUICK = RetryPolicy(initial_seconds=0.01, cap_seconds=0.1, read_timeout=2.0, deadline_seconds=10.0)
MIB = 1024 * 1024
SMALL_PARTS = PartSizes(send_from=MIB, copy_from=6 * MIB, copy_part=5 * MIB)
ODD_KEYS = [
    "with space",
    "plus+plus",
    "percent%20%2F",
    "hash#tag",
    "question?mark=1&x",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    "deep/er/key",
    "a'\"&<>;:@=,$!*()",
]


@pytest.fixture
def objects(s3: S3Server) -> S3Objects:
    return S3Objects(ObjectAccess(), environment=s3.environment, policy=QUICK, sizes=SMALL_PARTS)


@pytest.fixture
def seen(s3: S3Server, fault_proxy: FaultProxy) -> S3Objects:
    """As `objects`, with the proxy in between."""
    environment = s3.environment_at(fault_proxy.url)
    return S3Objects(ObjectAccess(), environment=environment, policy=QUICK, sizes=SMALL_PARTS)


@pytest.fixture(scope="module")
def versioned(s3: S3Server) -> str:
    """A bucket that keeps versions."""
    bucket = f"versions-{uuid.uuid4().hex[:12]}"
    client = s3.client()
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    return bucket


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as temporary:
        yield temporary.fileno()


def put(objects: S3Objects, s3: S3Server, key: str, data: bytes) -> ObjectInfo:
    objects.put(s3.bucket, key, data, overwrite=True)
    return objects.head(s3.bucket, key)


def uploads(s3: S3Server, prefix: str) -> list[str]:
    answer = s3.client().list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix)
    return [upload["Key"] for upload in answer.get("Uploads", [])]


def write(fd: int, data: bytes) -> None:
    os.pwrite(fd, data, 0)


# ----------------------------------------------------------------------------------- looking


def test_an_object_is_told_as_it_is(objects: S3Objects, s3: S3Server, s3_prefix: str) -> None:
    before = time.time()
    stored = objects.put(
        s3.bucket,
        f"{s3_prefix}/a",
        b"content",
        overwrite=False,
        content_type="text/plain",
        metadata={"who": "me"},
    )

    info = objects.head(s3.bucket, f"{s3_prefix}/a")

    assert (info.size, info.content_type, info.metadata) == (7, "text/plain", {"who": "me"})
    assert info.etag == stored.etag
    assert abs(info.modified - before) < 60
    assert info.url == f"s3://{s3.bucket}/{s3_prefix}/a"
    [listed] = objects.list(s3.bucket, f"{s3_prefix}/a")
    assert (listed.key, listed.size, listed.etag) == (info.key, info.size, info.etag)


@pytest.mark.parametrize("bucket", ["shared", "absent-bucket"])
def test_what_is_absent_is_told_from_a_bucket_that_is(
    objects: S3Objects, s3: S3Server, s3_prefix: str, bucket: str
) -> None:
    if bucket == "shared":
        with pytest.raises(ObjectNotFoundError, match="no such object"):
            objects.head(s3.bucket, f"{s3_prefix}/absent")
    else:
        with pytest.raises(StoreAccessError, match="bucket itself is missing"):
            objects.head(bucket, f"{s3_prefix}/absent")


@pytest.mark.parametrize("key", always(*ODD_KEYS[:5], ODD_KEYS[-1], of=ODD_KEYS))
def test_a_key_is_taken_as_it_is(
    objects: S3Objects, s3: S3Server, s3_prefix: str, key: str, file: int
) -> None:
    data = key.encode()
    whole = f"{s3_prefix}/{key}"
    info = put(objects, s3, whole, data)

    assert objects.read(info, 0, 1000) == data
    objects.fetch(info, file, cancellation=Cancellation())
    assert os.pread(file, 1000, 0) == data
    copied = objects.copy(
        info, s3.bucket, f"{whole} copy", overwrite=False, cancellation=Cancellation()
    )
    assert objects.read(copied, 0, 1000) == data
    assert [each.key for each in objects.list(s3.bucket, f"{s3_prefix}/")] == [
        whole,
        f"{whole} copy",
    ]
    assert urllib.request.urlopen(objects.presign(info, 60)[0], timeout=10).read() == data
    objects.delete(s3.bucket, [whole, f"{whole} copy"])
    assert list(objects.list(s3.bucket, f"{s3_prefix}/")) == []


def test_both_forms_of_a_letter_are_two_objects(
    objects: S3Objects, s3: S3Server, s3_prefix: str
) -> None:
    for form in ("NFC", "NFD"):
        key = unicodedata.normalize(form, f"{s3_prefix}/é")
        objects.put(s3.bucket, key, form.encode(), overwrite=False)

    found = [info.key for info in objects.list(s3.bucket, f"{s3_prefix}/")]
    assert found == [f"{s3_prefix}/e\N{COMBINING ACUTE ACCENT}", f"{s3_prefix}/\xe9"]


@pytest.mark.parametrize("key", ["", "x" * 1025, "nul\0", "\udcff"])
def test_a_key_that_no_object_can_have_is_refused(
    objects: S3Objects, s3: S3Server, key: str
) -> None:
    with pytest.raises(UnsafePathError):
        objects.head(s3.bucket, key)
    with pytest.raises(UnsafePathError):
        objects.put(s3.bucket, key, b"", overwrite=True)


def test_a_listing_of_more_than_a_page_is_whole_and_ascending(
    objects: S3Objects, s3: S3Server, s3_prefix: str
) -> None:
    """`-` is before `/` and `/` before `0`: a server that lists by directories mixes them up."""
    keys = [f"{s3_prefix}/{n % 7}{'-/0'[n % 3]}{n:04}" for n in range(1005)]
    # Not by boto3, which takes six times as long.
    server = obstore.store.S3Store(
        s3.bucket,
        endpoint=s3.endpoint_url,
        access_key_id=s3.access_key,
        secret_access_key=s3.secret_key,
        region=s3.region,
        client_options={"allow_http": True},
    )
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: obstore.put(server, key, b"x"), keys))

    listed = [info.key for info in objects.list(s3.bucket, f"{s3_prefix}/")]

    assert listed == sorted(keys)
    objects.delete(s3.bucket, keys)
    assert list(objects.list(s3.bucket, f"{s3_prefix}/")) == []


def test_a_deleted_object_is_absent_and_its_versions_are_not(
    objects: S3Objects, versioned: str, s3_prefix: str
) -> None:
    first = objects.put(versioned, f"{s3_prefix}/a", b"first", overwrite=True)
    second = objects.put(versioned, f"{s3_prefix}/a", b"second", overwrite=True)
    assert first.version
    assert first.version != second.version
    assert objects.head(versioned, f"{s3_prefix}/a").version == second.version
    objects.delete(versioned, [f"{s3_prefix}/a"])

    with pytest.raises(ObjectNotFoundError):
        objects.head(versioned, f"{s3_prefix}/a")
    assert objects.read(first, 0, 100) == b"first"
    assert objects.head(versioned, f"{s3_prefix}/a", version=second.version).size == 6
    link, _ = objects.presign(first, 60)
    assert urllib.request.urlopen(link, timeout=10).read() == b"first"
    copied = objects.copy(
        first, versioned, f"{s3_prefix}/b", overwrite=False, cancellation=Cancellation()
    )
    assert objects.read(copied, 0, 100) == b"first"


def test_a_delete_marker_is_no_object(
    objects: S3Objects, s3: S3Server, versioned: str, s3_prefix: str
) -> None:
    objects.put(versioned, f"{s3_prefix}/a", b"first", overwrite=True)
    marker = s3.client().delete_object(Bucket=versioned, Key=f"{s3_prefix}/a")["VersionId"]

    with pytest.raises(ObjectNotFoundError):
        objects.head(versioned, f"{s3_prefix}/a", version=marker)


# ----------------------------------------------------------------------------------- reading


def test_s5_a_range_is_what_was_asked_for(objects: S3Objects, s3: S3Server, s3_prefix: str) -> None:
    info = put(objects, s3, f"{s3_prefix}/a", bytes(range(100)))

    assert objects.read(info, 10, 5) == bytes(range(10, 15))
    assert objects.read(info, 90, 50) == bytes(range(90, 100))
    assert objects.read(info, 100, 5) == b""
    assert objects.read(info, 0, 0) == b""


@pytest.mark.parametrize("size", [100, 9 * MIB])
def test_s5_an_object_that_was_replaced_is_not_got(
    objects: S3Objects, s3: S3Server, s3_prefix: str, file: int, size: int
) -> None:
    """Also one of the same size, and one that is gone."""
    info = put(objects, s3, f"{s3_prefix}/a", bytes(size))
    put(objects, s3, f"{s3_prefix}/a", b"x" * size)

    for _ in range(2):
        with pytest.raises(ObjectChangedError) as failed:
            objects.read(info, 10, 20)
        assert failed.value.code == "E_SOURCE_CHANGED"
        with pytest.raises(ObjectChangedError):
            objects.fetch(info, file, cancellation=Cancellation())
        objects.delete(s3.bucket, [f"{s3_prefix}/a"])


def test_s5_an_empty_object_that_was_replaced_is_not_got(
    objects: S3Objects, s3: S3Server, s3_prefix: str, file: int
) -> None:
    info = put(objects, s3, f"{s3_prefix}/a", b"")
    objects.fetch(info, file, cancellation=Cancellation())
    put(objects, s3, f"{s3_prefix}/a", b"x")

    with pytest.raises(ObjectChangedError):
        objects.fetch(info, file, cancellation=Cancellation())


def test_s5_what_was_replaced_while_it_came_is_not_got(
    seen: S3Objects, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, file: int
) -> None:
    """The first parts come, and the proxy answers the later ones as S3 does then."""
    info = put(seen, s3, f"{s3_prefix}/a", os.urandom(26 * MIB))
    fault_proxy.inject(Fault.ETAG_CHANGED, skip=2)

    with pytest.raises(ObjectChangedError):
        seen.fetch(info, file, cancellation=Cancellation())


def test_s5_a_large_object_comes_in_parts_and_goes_on_where_it_was(
    seen: S3Objects, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, file: int
) -> None:
    data = os.urandom(20 * MIB)
    info = put(seen, s3, f"{s3_prefix}/a", data)
    arrived: list[int] = []
    moved: list[int] = []
    seen.fetch(
        info,
        file,
        cancellation=Cancellation(),
        progress=moved.append,
        arrived=lambda offset, _: arrived.append(offset),
    )
    assert os.pread(file, 30 * MIB, 0) == data
    assert sum(moved) == len(data)
    assert sorted(arrived) == [0, 8 * MIB, 16 * MIB]
    fault_proxy.forget()

    os.pwrite(file, bytes(9), 8 * MIB)
    seen.fetch(info, file, cancellation=Cancellation(), have=[0, 16 * MIB])

    assert os.pread(file, 30 * MIB, 0) == data
    assert [request.headers["range"] for request in fault_proxy.requests] == [
        f"bytes={8 * MIB}-{16 * MIB - 1}"
    ]
    assert all(request.headers["if-match"] == info.etag for request in fault_proxy.requests)


def test_faults_are_outlived_and_nothing_wrong_is_got(
    seen: S3Objects, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy
) -> None:
    data = os.urandom(100_000)
    info = put(seen, s3, f"{s3_prefix}/a", data)
    for fault in (
        Fault.SLOW_DOWN,
        Fault.INTERNAL_ERROR,
        Fault.RESET,
        Fault.SHORT_BODY,
        Fault.REPLY_LOST,
    ):
        fault_proxy.inject(fault, methods={"GET", "HEAD", "PUT"}, times=1)

        assert seen.read(seen.head(s3.bucket, info.key), 0, len(data)) == data
        seen.put(s3.bucket, f"{s3_prefix}/{fault}", data, overwrite=False)
        fault_proxy.clear()


@pytest.mark.parametrize("fault", [Fault.EMPTY_OK, Fault.XML_OK])
@pytest.mark.parametrize("way", ["put", "copy", "head", "delete"])
def test_what_is_no_answer_is_asked_again(
    seen: S3Objects,
    objects: S3Objects,
    s3: S3Server,
    s3_prefix: str,
    fault_proxy: FaultProxy,
    way: str,
    fault: Fault,
) -> None:
    """Status 200 with nothing, or with an error, as body: the store has not done it.

    Seen to fail when what has no ETag counted as stored, copied or deleted, and was an object.
    """
    source = put(objects, s3, f"{s3_prefix}/source", b"content")
    key, halt = f"{s3_prefix}/a", Cancellation()
    methods = {"put": "PUT", "copy": "PUT", "head": "HEAD", "delete": "POST"}
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: seen.put(s3.bucket, key, b"content", overwrite=True),
        "copy": lambda: seen.copy(source, s3.bucket, key, overwrite=True, cancellation=halt),
        "head": lambda: seen.head(s3.bucket, key),
        "delete": lambda: seen.delete(s3.bucket, [key]),
    }
    if way in ("head", "delete"):
        put(objects, s3, key, b"content")
    fault_proxy.inject(fault, methods={methods[way]}, times=1)

    calls[way]()

    if way == "delete":
        with pytest.raises(ObjectNotFoundError):
            objects.head(s3.bucket, key)
    else:
        assert objects.read(objects.head(s3.bucket, key), 0, 100) == b"content"


@pytest.mark.parametrize("key", ["a", "a//b"])
@pytest.mark.parametrize(
    "fault", [Fault.WRONG_RANGE, Fault.WHOLE_FOR_RANGE, Fault.EMPTY_OK, Fault.XML_OK]
)
def test_s5_what_is_another_range_is_asked_for_again(
    seen: S3Objects, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, fault: Fault, key: str
) -> None:
    """By both ways in which ranges are had. Seen to fail by the second, with wrong bytes."""
    data = os.urandom(1000)
    info = put(seen, s3, f"{s3_prefix}/{key}", data)
    fault_proxy.inject(fault, times=1)

    assert seen.read(info, 100, 200) == data[100:300]


# ----------------------------------------------------------------------------------- storing


def test_o4_nothing_is_replaced_unless_that_is_wished(
    objects: S3Objects, s3: S3Server, s3_prefix: str, file: int
) -> None:
    """By one request, by a file in parts, by a copy, and by a copy in parts."""
    taken = f"{s3_prefix}/taken"
    put(objects, s3, taken, b"first")
    small = put(objects, s3, f"{s3_prefix}/small", b"small")
    write(file, os.urandom(9 * MIB))
    large = objects.put_file(
        s3.bucket, f"{s3_prefix}/large", file, overwrite=False, cancellation=Cancellation()
    )

    def all_ways(*, overwrite: bool) -> Iterator[object]:
        halt = Cancellation()
        yield lambda: objects.put(s3.bucket, taken, b"x", overwrite=overwrite)
        yield lambda: objects.put_file(
            s3.bucket, taken, file, overwrite=overwrite, cancellation=halt
        )
        for info in (small, large):
            yield lambda info=info: objects.copy(
                info, s3.bucket, taken, overwrite=overwrite, cancellation=halt
            )

    for way in all_ways(overwrite=False):
        with pytest.raises(KeyExistsError) as failed:
            way()  # type: ignore[operator]
        assert failed.value.code == "E_KEY_EXISTS"
        assert s3.client().get_object(Bucket=s3.bucket, Key=taken)["Body"].read() == b"first"
    assert uploads(s3, s3_prefix) == []
    for way in all_ways(overwrite=True):
        info = way()  # type: ignore[operator]
        assert objects.head(s3.bucket, taken).etag == info.etag


def test_o4_of_several_at_once_one_stores(objects: S3Objects, s3: S3Server, s3_prefix: str) -> None:
    """By one request: of uploads in parts, SeaweedFS may complete two at the same moment."""
    outcomes: list[str] = []

    def store(number: int) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(bytes([number]) * 1000)
            file.flush()
            try:
                objects.put_file(
                    s3.bucket,
                    f"{s3_prefix}/a",
                    file.fileno(),
                    overwrite=False,
                    cancellation=Cancellation(),
                )
                outcomes.append(f"stored {number}")
            except KeyExistsError:
                outcomes.append("refused")

    threads = [threading.Thread(target=store, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    [stored] = [outcome for outcome in outcomes if outcome != "refused"]
    assert len(outcomes) == 4
    info = objects.head(s3.bucket, f"{s3_prefix}/a")
    assert objects.read(info, 0, 1) == bytes([int(stored[-1])])


@pytest.mark.parametrize("size", [1000, 9 * MIB])
def test_o4_an_answer_that_got_lost_is_no_clash_with_oneself(
    seen: S3Objects,
    s3: S3Server,
    s3_prefix: str,
    fault_proxy: FaultProxy,
    file: int,
    size: int,
) -> None:
    write(file, os.urandom(size))
    # In parts, it is the request that completes the upload whose answer gets lost.
    if size > MIB:
        fault_proxy.inject(Fault.REPLY_LOST, methods={"POST"}, times=1, skip=1)
    else:
        fault_proxy.inject(Fault.REPLY_LOST, methods={"PUT"}, times=1)

    seen.put_file(s3.bucket, f"{s3_prefix}/a", file, overwrite=False, cancellation=Cancellation())

    info = seen.head(s3.bucket, f"{s3_prefix}/a")
    assert seen.read(info, 0, size) == os.pread(file, size, 0)
    with pytest.raises(KeyExistsError):
        seen.put_file(
            s3.bucket, f"{s3_prefix}/a", file, overwrite=False, cancellation=Cancellation()
        )


@pytest.mark.parametrize("way", ["put", "copy"])
def test_o4_what_somebody_else_made_of_the_same_bytes_is_not_taken_for_ones_own(
    seen: S3Objects, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, way: str
) -> None:
    source = seen.put(s3.bucket, f"{s3_prefix}/source", b"same", overwrite=False)
    seen.put(s3.bucket, f"{s3_prefix}/a", b"same", overwrite=False, metadata={"run": "other"})
    # As an answer that got lost, it is asked for twice.
    fault_proxy.inject(Fault.UNAVAILABLE, methods={"PUT"}, times=1)

    key, own = f"{s3_prefix}/a", {"run": "own"}
    calls: dict[str, Callable[[], ObjectInfo]] = {
        "put": lambda: seen.put(s3.bucket, key, b"same", overwrite=False, metadata=own),
        "copy": lambda: seen.copy(
            source, s3.bucket, key, overwrite=False, metadata=own, cancellation=Cancellation()
        ),
    }

    with pytest.raises(KeyExistsError):
        calls[way]()


def test_o4_a_store_without_conditions_is_looked_at_first(
    seen: S3Objects, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, file: int
) -> None:
    fault_proxy.inject(Fault.NOT_IMPLEMENTED, methods={"PUT", "POST"}, header="if-none-match")
    write(file, os.urandom(9 * MIB))
    small = seen.put(s3.bucket, f"{s3_prefix}/a", b"first", overwrite=False)
    halt = Cancellation()
    seen.put_file(s3.bucket, f"{s3_prefix}/b", file, overwrite=False, cancellation=halt)
    seen.copy(small, s3.bucket, f"{s3_prefix}/c", overwrite=False, cancellation=halt)

    for key in "abc":
        with pytest.raises(KeyExistsError):
            seen.put(s3.bucket, f"{s3_prefix}/{key}", b"x", overwrite=False)
        with pytest.raises(KeyExistsError):
            seen.put_file(s3.bucket, f"{s3_prefix}/{key}", file, overwrite=False, cancellation=halt)
        with pytest.raises(KeyExistsError):
            seen.copy(small, s3.bucket, f"{s3_prefix}/{key}", overwrite=False, cancellation=halt)


def test_a_file_that_grew_while_it_was_sent_is_not_stored(
    objects: S3Objects, s3: S3Server, s3_prefix: str, file: int
) -> None:
    write(file, bytes(6 * MIB))

    for size in (5 * MIB, 7 * MIB, 100):
        with pytest.raises(FileChangedError):
            objects.put_file(
                s3.bucket,
                f"{s3_prefix}/a",
                file,
                size=size,
                overwrite=False,
                cancellation=Cancellation(),
            )
    assert list(objects.list(s3.bucket, s3_prefix)) == []
    assert uploads(s3, s3_prefix) == []


def test_an_upload_that_is_stopped_leaves_nothing(
    seen: S3Objects, s3: S3Server, s3_prefix: str, file: int
) -> None:
    write(file, os.urandom(36 * MIB))
    halt = Cancellation()

    with pytest.raises(CancelledError):
        seen.put_file(
            s3.bucket,
            f"{s3_prefix}/a",
            file,
            overwrite=False,
            cancellation=halt,
            progress=lambda _: halt.cancel(),
        )

    deadline = time.monotonic() + 10
    while uploads(s3, s3_prefix) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert uploads(s3, s3_prefix) == []
    assert list(seen.list(s3.bucket, s3_prefix)) == []


def test_an_upload_is_gone_on_with(
    seen: S3Objects, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, file: int
) -> None:
    """The parts that the store has are not sent again, also those that nobody wrote down."""
    data = os.urandom(36 * MIB)
    write(file, data)
    written: list[tuple[str, int]] = []
    unfinished = Unfinished(changed=lambda now: written.append((now.upload_id, len(now.parts))))
    halt = Cancellation()
    with pytest.raises(CancelledError):
        seen.put_file(
            s3.bucket,
            f"{s3_prefix}/a",
            file,
            overwrite=False,
            cancellation=halt,
            progress=lambda _: halt.cancel(),
            unfinished=unfinished,
        )
    assert uploads(s3, s3_prefix) == [f"{s3_prefix}/a"]
    assert [count for _, count in written] == [0, 1]
    _await_quiet(fault_proxy)
    sent = _parts_sent(fault_proxy)
    fault_proxy.forget()

    again = Unfinished(upload_id=unfinished.upload_id, part_bytes=unfinished.part_bytes)
    info = seen.put_file(
        s3.bucket,
        f"{s3_prefix}/a",
        file,
        overwrite=False,
        cancellation=Cancellation(),
        unfinished=again,
    )

    assert sorted(sent + _parts_sent(fault_proxy)) == list(range(1, 6))
    with tempfile.TemporaryFile() as got:
        seen.fetch(info, got.fileno(), cancellation=Cancellation())
        assert got.read() == data
    assert uploads(s3, s3_prefix) == []


def test_an_upload_that_somebody_aborted_is_begun_anew(
    objects: S3Objects, s3: S3Server, s3_prefix: str, file: int
) -> None:
    write(file, os.urandom(9 * MIB))

    objects.put_file(
        s3.bucket,
        f"{s3_prefix}/a",
        file,
        overwrite=False,
        cancellation=Cancellation(),
        unfinished=Unfinished(upload_id="0" * 32, part_bytes=8 * MIB, parts={1: "gone"}),
    )

    assert objects.head(s3.bucket, f"{s3_prefix}/a").size == 9 * MIB


def _parts_sent(proxy: FaultProxy) -> list[int]:
    return [
        int(parse_qs(request.query)["partNumber"][0])
        for request in proxy.requests
        if request.method == "PUT" and "partNumber" in request.query and request.status == 200
    ]


def _await_quiet(proxy: FaultProxy) -> None:
    """Wait until the requests have ended that were left behind."""
    deadline = time.monotonic() + 20
    while any(request.status is None for request in proxy.requests):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ----------------------------------------------------------------------------------- copying


@pytest.mark.parametrize("size", [100_000, 9 * MIB])
def test_r4_a_copy_moves_no_byte_through_this_host(
    seen: S3Objects,
    s3: S3Server,
    s3_prefix: str,
    fault_proxy: FaultProxy,
    file: int,
    size: int,
) -> None:
    data = os.urandom(size)
    write(file, data)
    seen.put_file(
        s3.bucket,
        f"{s3_prefix}/a",
        file,
        overwrite=False,
        content_type="text/x",
        metadata={"who": "me"},
        cancellation=Cancellation(),
    )
    info = seen.head(s3.bucket, f"{s3_prefix}/a")
    fault_proxy.forget()
    moved: list[int] = []

    seen.copy(
        info,
        s3.bucket,
        f"{s3_prefix}/b",
        overwrite=False,
        cancellation=Cancellation(),
        progress=moved.append,
    )

    assert fault_proxy.count("GET") == 0
    assert (
        sum(request.body_length for request in fault_proxy.requests if request.method == "PUT") == 0
    )
    conditions = [
        request.headers["x-amz-copy-source-if-match"]
        for request in fault_proxy.requests
        if "x-amz-copy-source" in request.headers
    ]
    assert set(conditions) == {info.etag}
    assert len(conditions) == -(-size // (5 * MIB)) if size > MIB else 1
    assert sum(moved) == size
    copied = seen.head(s3.bucket, f"{s3_prefix}/b")
    assert (copied.content_type, copied.metadata) == ("text/x", {"who": "me"})
    assert seen.read(copied, 0, size) == data


@pytest.mark.parametrize("size", [1000, 9 * MIB])
def test_r4_a_source_that_was_replaced_is_not_copied(
    objects: S3Objects, s3: S3Server, s3_prefix: str, size: int
) -> None:
    info = put(objects, s3, f"{s3_prefix}/a", bytes(size))
    put(objects, s3, f"{s3_prefix}/a", b"x" * size)

    for _ in range(2):
        with pytest.raises(ObjectChangedError):
            objects.copy(
                info, s3.bucket, f"{s3_prefix}/b", overwrite=False, cancellation=Cancellation()
            )
        objects.delete(s3.bucket, [f"{s3_prefix}/a"])
    assert list(objects.list(s3.bucket, f"{s3_prefix}/b")) == []
    assert uploads(s3, s3_prefix) == []


def test_r4_metadata_and_type_of_a_copy_are_those_that_were_given(
    objects: S3Objects, s3: S3Server, s3_prefix: str
) -> None:
    objects.put(
        s3.bucket,
        f"{s3_prefix}/a",
        b"x",
        overwrite=False,
        content_type="text/x",
        metadata={"who": "me"},
    )
    info = objects.head(s3.bucket, f"{s3_prefix}/a")

    def copied(**changes: object) -> tuple[str, dict[str, str]]:
        objects.copy(
            info,
            s3.bucket,
            f"{s3_prefix}/b",
            overwrite=True,
            cancellation=Cancellation(),
            **changes,  # type: ignore[arg-type]
        )
        found = objects.head(s3.bucket, f"{s3_prefix}/b")
        return found.content_type, dict(found.metadata)

    assert copied() == ("text/x", {"who": "me"})
    assert copied(content_type="text/y") == ("text/y", {"who": "me"})
    assert copied(metadata={"a": "b"}) == ("binary/octet-stream", {"a": "b"})
    assert copied(metadata={}, content_type="text/z") == ("text/z", {})


def test_r4_parts_are_doubled_until_there_are_few_enough() -> None:
    sizes = PartSizes()

    assert sizes.to_copy(500 * MIB) == 64 * MIB
    assert sizes.to_copy(10_000 * 64 * MIB) == 64 * MIB
    assert sizes.to_copy(10_000 * 64 * MIB + 1) == 128 * MIB


# ---------------------------------------------------------------------------------- identity


def test_o1_the_blobs_of_a_store_are_objects(s3: S3Server, s3_prefix: str) -> None:
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}/queue", environment=s3.environment, policy=QUICK
    )
    assert isinstance(store, S3Store)
    old = Digest.of(b"of an old client")
    legacy = f"{s3_prefix}/queue/{legacy_blob_key(old)}"
    s3.client().put_object(Bucket=s3.bucket, Key=legacy, Body=b"of an old client")
    store.put(Digest.of(b"blob"), b"blob")

    for data in (b"blob", b"of an old client"):
        info = store.object_of(Digest.of(data))
        copied = store.objects.copy(
            info,
            s3.bucket,
            f"{s3_prefix}/{len(data)}",
            overwrite=False,
            cancellation=Cancellation(),
        )
        assert store.objects.read(copied, 0, 100) == data
    with pytest.raises(BlobNotFoundError):
        store.object_of(Digest.of(b"absent"))
    assert store.objects.endpoint == s3.endpoint_url


def test_o1_only_the_stores_own_bucket_has_an_owner(
    s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, versioned: str
) -> None:
    """Others may be anybody's; who reads out of ours names its owner also when it is copied."""
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment_at(fault_proxy.url),
        account_id="123456789012",
        policy=QUICK,
    )
    assert isinstance(store, S3Store)
    store.put(Digest.of(b"blob"), b"blob")
    info = store.object_of(Digest.of(b"blob"))
    fault_proxy.forget()

    store.objects.copy(
        info, versioned, f"{s3_prefix}/a", overwrite=False, cancellation=Cancellation()
    )

    [request] = fault_proxy.requests
    assert request.headers["x-amz-source-expected-bucket-owner"] == "123456789012"
    assert "x-amz-expected-bucket-owner" not in request.headers


def test_s9_a_public_bucket_needs_no_credentials(s3: S3Server, s3_prefix: str, file: int) -> None:
    bucket = f"public-{uuid.uuid4().hex[:12]}"
    client = s3.client()
    client.create_bucket(Bucket=bucket)
    statement = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    client.put_bucket_policy(
        Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
    client.put_object(Bucket=bucket, Key="a b", Body=b"public")
    anybody = open_objects(
        ObjectAccess(endpoint=s3.endpoint_url, anonymous=True), environment={}, policy=QUICK
    )

    [info] = anybody.list(bucket, "")
    assert anybody.head(bucket, "a b").etag == info.etag
    assert anybody.read(info, 0, 100) == b"public"
    anybody.fetch(info, file, cancellation=Cancellation())
    with pytest.raises(StoreAccessError):
        anybody.put(bucket, "b", b"x", overwrite=True)
    with pytest.raises(StoreAccessError):
        list(anybody.list(s3.bucket, s3_prefix))
    with pytest.raises(StoreAccessError, match="without credentials"):
        anybody.presign(info, 60)


def test_s9_a_profile_brings_its_keys_and_an_access_its_endpoint(
    s3: S3Server, s3_prefix: str, tmp_path: Path, objects: S3Objects
) -> None:
    (tmp_path / "credentials").write_text(
        f"[reader]\naws_access_key_id = {s3.read_only_access_key}\n"
        f"aws_secret_access_key = {s3.read_only_secret_key}\n"
    )
    environment = s3.environment_at("http://127.0.0.1:9") | {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")
    }
    info = put(objects, s3, f"{s3_prefix}/a", b"x")
    reader = open_objects(
        ObjectAccess(endpoint=s3.endpoint_url, profile="reader"),
        environment=environment,
        policy=QUICK,
    )

    assert reader.read(info, 0, 1) == b"x"
    with pytest.raises(StoreAccessError):
        reader.put(s3.bucket, f"{s3_prefix}/a", b"y", overwrite=True)
    with pytest.raises(SettingsInvalidError, match="absent"):
        open_objects(ObjectAccess(profile="absent"), environment=environment)


def test_s9_other_servers_are_spared_checksums_that_nobody_asked_for(
    seen: S3Objects, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, file: int
) -> None:
    write(file, os.urandom(9 * MIB))
    seen.put(s3.bucket, f"{s3_prefix}/a", b"x", overwrite=True)
    seen.put_file(s3.bucket, f"{s3_prefix}/b", file, overwrite=True, cancellation=Cancellation())

    assert fault_proxy.requests
    for request in fault_proxy.requests:
        assert not [name for name in request.headers if name.startswith("x-amz-checksum")]
        assert "aws-chunked" not in request.headers.get("content-encoding", "")
        assert request.path.startswith(f"/{s3.bucket}/")
    assert not locate("bucket", "", s3.environment).is_aws
    assert locate("bucket", "", {}).is_aws


# ------------------------------------------------------------------------------------- links


def test_o6_a_link_is_good_for_as_long_as_was_asked(
    objects: S3Objects, s3: S3Server, s3_prefix: str
) -> None:
    info = put(objects, s3, f"{s3_prefix}/a b", b"linked")

    for asked, lasts in ((60, 60), (7 * 86400, 7 * 86400), (30 * 86400, 7 * 86400)):
        url, ends = objects.presign(info, asked)
        assert abs(ends - time.time() - lasts) < 5
        assert urllib.request.urlopen(url, timeout=10).read() == b"linked"
    with pytest.raises(SettingsInvalidError, match="0 s"):
        objects.presign(info, 0)


def test_o6_a_link_ends_with_the_credentials_that_signed_it(
    s3: S3Server, s3_prefix: str, objects: S3Objects
) -> None:
    info = put(objects, s3, f"{s3_prefix}/a", b"linked")
    expiry = datetime.now(UTC) + timedelta(minutes=30)
    environment = s3.environment | {"AWS_CREDENTIAL_EXPIRATION": expiry.isoformat()}
    temporary = open_objects(ObjectAccess(), environment=environment)

    _, ends = temporary.presign(info, 3600)
    assert ends == pytest.approx(expiry.timestamp(), abs=1)
    _, ends = temporary.presign(info, 60)
    assert ends < expiry.timestamp()


def test_o6_a_link_that_has_ended_is_refused(
    objects: S3Objects, s3: S3Server, s3_prefix: str
) -> None:
    info = put(objects, s3, f"{s3_prefix}/a", b"linked")
    url, ends = objects.presign(info, 1)
    time.sleep(max(0.0, ends - time.time()) + 1.1)

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=10)
    refused.value.close()
    assert refused.value.code == 403


def test_o6_a_link_is_to_the_version_that_was_named(
    objects: S3Objects, versioned: str, s3_prefix: str
) -> None:
    first = objects.put(versioned, f"{s3_prefix}/a", b"first", overwrite=True)
    objects.put(versioned, f"{s3_prefix}/a", b"second", overwrite=True)

    url, _ = objects.presign(first, 60)

    assert parse_qs(urlsplit(url).query)["versionId"] == [first.version]
    assert urllib.request.urlopen(url, timeout=10).read() == b"first"
    other = url.replace(first.version, "0" * len(first.version))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(other, timeout=10)
    refused.value.close()
    assert refused.value.code == 403


def test_the_url_of_an_object_is_split_and_nothing_in_it_is_special() -> None:
    assert split_url("s3://bucket/a%20b?c#d/") == ("bucket", "a%20b?c#d/")
    for url in ("s3://bucket", "s3://bucket/", "s3:///key", "http://bucket/key", "bucket/key"):
        with pytest.raises(SettingsInvalidError):
            split_url(url)
    assert replace(ObjectInfo("b", "k", 0, "", "", 0.0), metadata={"a": "b"}) == ObjectInfo(
        "b", "k", 0, "", "", 0.0
    )
