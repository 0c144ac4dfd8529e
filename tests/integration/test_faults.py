"""Each fault is what it says it is, as a client sees it, in front of the real store."""

import http.client
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError, ResponseStreamingError

from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.promptness import STOP_SECONDS
from tests.servers.proxied_object import ProxiedObject, until
from tests.servers.s3_server import S3Server

CONTENT = random.Random(1).randbytes(200_000)
PUT = frozenset({"PUT"})


@pytest.fixture
def thing(fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str) -> ProxiedObject:
    return ProxiedObject.stored_at(fault_proxy, s3, f"{s3_prefix}/Data/a b+ü.xxh128", CONTENT)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault.UNAVAILABLE, 503, b"<Code>ServiceUnavailable</Code>"),
        (Fault.SLOW_DOWN, 503, b"<Code>SlowDown</Code>"),
        (Fault.INTERNAL_ERROR, 500, b"<Code>InternalError</Code>"),
        (Fault.FORBIDDEN, 403, b"<Code>AccessDenied</Code>"),
        (Fault.EXPIRED_TOKEN, 400, b"<Code>ExpiredToken</Code>"),
        (Fault.INVALID_ARGUMENT, 400, b"<Code>InvalidArgument</Code>"),
        (Fault.NOT_IMPLEMENTED, 501, b"<Code>NotImplemented</Code>"),
        (Fault.NOT_FOUND, 404, b"<Code>NoSuchKey</Code>"),
        (Fault.RANGE_NOT_SATISFIABLE, 416, b"<Code>InvalidRange</Code>"),
        (Fault.REDIRECT_301, 301, b"<Code>PermanentRedirect</Code>"),
        (Fault.REDIRECT_307, 307, b"<Code>TemporaryRedirect</Code>"),
        (Fault.XML_OK, 200, b"<Code>InternalError</Code>"),
        (Fault.EMPTY_OK, 200, b""),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_an_invented_answer_comes_once_and_never_from_the_store(
    thing: ProxiedObject, method: str, fault: Fault, status: int, code: bytes
) -> None:
    thing.proxy.inject(fault, times=1, methods={method})
    url = thing.url("get_object" if method == "GET" else "put_object")
    body = b"new" if method == "PUT" else None

    seen = thing.get(method=method, url=url, body=body)
    assert (seen.status, seen.error) == (status, None)
    assert code in seen.body
    assert bool(seen.body) == bool(code)
    if status in {301, 307}:
        assert seen.header("location") == url
    assert thing.stored() == CONTENT
    again = thing.get(method=method, url=url, body=body)
    assert again.status == 200
    assert thing.stored() == (b"new" if method == "PUT" else CONTENT)


def test_boto3_sees_the_error_codes(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.EXPIRED_TOKEN, times=1)
    thing.proxy.inject(Fault.SLOW_DOWN, methods=PUT)

    with pytest.raises(ClientError, match="ExpiredToken"):
        thing.client.get_object(Bucket=thing.s3.bucket, Key=thing.key)
    with pytest.raises(ClientError, match="SlowDown"):
        thing.client.put_object(Bucket=thing.s3.bucket, Key=thing.key, Body=b"new")


def test_head_says_yes_and_get_says_404(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.NOT_FOUND)

    assert thing.get(method="HEAD", url=thing.url("head_object")).status == 200
    assert thing.get().status == 404


def test_an_answer_to_head_has_no_body(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.FORBIDDEN, methods={"HEAD"}, times=1)
    parts = urlsplit(thing.url("head_object"))
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)

    statuses = []
    for _ in range(2):
        connection.request("HEAD", f"{parts.path}?{parts.query}")
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()
    assert statuses == [403, 200], "the second answer must be found where the first one ended"


def test_reset_comes_before_the_head_and_the_store_never_hears(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.RESET, methods={"GET", "PUT"}, offset=1000)

    with pytest.raises(ConnectionResetError):
        thing.get()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        thing.get(url=thing.url("put_object"), method="PUT", body=CONTENT * 20)
    assert thing.stored() == CONTENT
    assert 1000 <= thing.proxy.requests[1].body_length < len(CONTENT) * 20
    assert [request.status for request in thing.proxy.requests] == [None, None]


def test_reply_lost_stores_and_then_resets(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.REPLY_LOST, methods=PUT)

    with pytest.raises(ConnectionResetError):
        thing.get(url=thing.url("put_object"), method="PUT", body=b"stored")
    assert thing.stored() == b"stored"


def test_not_http_is_not_http(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.NOT_HTTP)

    with pytest.raises(http.client.BadStatusLine):
        thing.get()


@pytest.mark.parametrize("offset", [0, 1, 65536, 131072, 196608, len(CONTENT) - 1])
def test_reset_mid_body_delivers_exactly_so_many_bytes(thing: ProxiedObject, offset: int) -> None:
    thing.proxy.inject(Fault.RESET_MID_BODY, offset=offset)

    seen = thing.get()
    assert seen.header("content-length") == str(len(CONTENT))
    assert seen.body == CONTENT[:offset]
    assert seen.error is ConnectionResetError


def test_short_body_closes_in_order_before_the_stated_length(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.SHORT_BODY)

    seen = thing.get()
    assert seen.header("content-length") == str(len(CONTENT))
    assert seen.body == CONTENT[: len(CONTENT) // 2]
    assert seen.error is http.client.IncompleteRead
    body = thing.client.get_object(Bucket=thing.s3.bucket, Key=thing.key)["Body"]
    with pytest.raises(ResponseStreamingError):
        body.read()


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        (Fault.SHORT_OBJECT, CONTENT[: len(CONTENT) // 2]),
        (Fault.LONG_OBJECT, CONTENT + b"surplus"),
        (Fault.WRONG_BYTES, bytes(byte ^ 0xFF for byte in CONTENT)),
    ],
)
def test_a_wrong_object_looks_right(thing: ProxiedObject, fault: Fault, body: bytes) -> None:
    thing.proxy.inject(fault)

    seen = thing.get()
    assert (seen.status, seen.error) == (200, None)
    assert seen.body == body
    assert seen.header("content-length") == str(len(body))


def test_trailing_bytes_follow_a_right_body(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.TRAILING_BYTES)
    parts = urlsplit(thing.url())
    with socket.create_connection((parts.hostname or "", parts.port or 0), 10) as sock:
        request = f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        sock.sendall(f"{request}Connection: close\r\n\r\n".encode())
        received = b""
        while data := sock.recv(65536):
            received += data

    head, _, body = received.partition(b"\r\n\r\n")
    assert f"\r\ncontent-length: {len(CONTENT)}\r\n" in head.decode().lower() + "\r\n"
    assert body == CONTENT + b"surplus"


@pytest.mark.parametrize("offset", [None, 0, 150_000])
def test_exactly_one_bit_is_flipped(thing: ProxiedObject, offset: int | None) -> None:
    thing.proxy.inject(Fault.FLIPPED_BIT, offset=offset)

    body = thing.get().body
    differing = [
        (place, (ours ^ theirs).bit_count())
        for place, (ours, theirs) in enumerate(zip(CONTENT, body, strict=True))
        if ours != theirs
    ]
    assert [bits for _, bits in differing] == [1]
    assert offset in {None, differing[0][0]}


def test_wrong_range_says_which_range_it_is(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.WRONG_RANGE)

    seen = thing.get({"Range": "bytes=1000-1999"})
    assert (seen.status, seen.error) == (206, None)
    assert seen.header("content-range") == f"bytes 1001-2000/{len(CONTENT)}"
    assert seen.body[:-1] == CONTENT[1001:2000]
    assert len(seen.body) == 1000


def test_the_whole_comes_for_a_range(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.WHOLE_FOR_RANGE)

    seen = thing.get({"Range": "bytes=1000-1999"})
    assert (seen.status, seen.body) == (200, CONTENT)
    assert seen.header("content-range") is None
    signed = thing.client.get_object(Bucket=thing.s3.bucket, Key=thing.key, Range="bytes=5-9")
    assert signed["Body"].read() == CONTENT


def test_there_are_two_lengths(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.DUPLICATE_LENGTH)

    seen = thing.get()
    lengths = [value for name, value in seen.headers if name.lower() == "content-length"]
    assert lengths == [str(len(CONTENT)), str(len(CONTENT) + 1)]
    assert seen.body == CONTENT


def test_gzip_is_claimed(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.GZIP_HEADER)

    seen = thing.get()
    assert seen.header("content-encoding") == "gzip"
    assert seen.body == CONTENT


def test_the_etag_changes_between_ranges(thing: ProxiedObject) -> None:
    true_etag = thing.get().header("etag")
    thing.proxy.inject(Fault.ETAG_CHANGED, skip=1)

    seen = [thing.get({"Range": f"bytes={start}-{start + 9}"}) for start in (0, 10, 20)]
    etags = [response.header("etag") for response in seen]
    assert etags[0] == true_etag
    assert len(set(etags)) == 3
    assert b"".join(response.body for response in seen) == CONTENT[:30]
    refused = thing.get({"If-Match": true_etag or ""})
    assert refused.status == 412
    assert b"PreconditionFailed" in refused.body


def test_drip_keeps_to_its_rate(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.DRIP, bytes_per_second=10_000)

    start = time.monotonic()
    seen = thing.get({"Range": "bytes=0-4999"})
    assert seen.body == CONTENT[:5000]
    # A busy machine takes longer, none takes less.
    assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize("offset", [None, 0, 1000])
def test_a_stall_can_end(thing: ProxiedObject, offset: int | None) -> None:
    thing.proxy.inject(Fault.STALL, seconds=0.3, offset=offset)

    start = time.monotonic()
    seen = thing.get()
    assert (seen.status, seen.body, seen.error) == (200, CONTENT, None)
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("offset", [None, 1000])
def test_a_stall_for_ever_goes_on_when_the_proxy_lets_it(
    thing: ProxiedObject, offset: int | None
) -> None:
    stall = thing.proxy.inject(Fault.STALL, offset=offset)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(thing.get, timeout=60)
        until(lambda: stall.hits == 1)
        thing.proxy.clear()
        assert not waiting.done()

        thing.proxy.release()
        seen = waiting.result(60)

    assert (seen.status, seen.body, seen.error) == (200, CONTENT, None)
    assert thing.get().body == CONTENT, "it is healed"


@pytest.mark.parametrize("offset", [None, 1000])
def test_a_stall_for_ever_ends_only_with_the_client_or_the_proxy(
    thing: ProxiedObject, offset: int | None
) -> None:
    thing.proxy.inject(Fault.STALL, offset=offset)
    if offset is None:
        with pytest.raises(TimeoutError):
            thing.get(timeout=0.5)
    else:
        seen = thing.get(timeout=4)
        assert (seen.body, seen.error) == (CONTENT[:offset], TimeoutError)

    waiting = threading.Thread(target=_suffer, args=(thing,))
    waiting.start()
    until(lambda: thing.proxy.count("GET") == 2)
    start = time.monotonic()
    thing.proxy.__exit__(None, None, None)
    waiting.join(30)
    assert not waiting.is_alive()
    assert time.monotonic() - start < STOP_SECONDS


def _suffer(thing: ProxiedObject) -> None:
    try:
        thing.get(timeout=30)
    except (OSError, http.client.HTTPException):
        return


def test_connections_are_refused_for_a_while(thing: ProxiedObject) -> None:
    url = thing.url()
    thing.proxy.refuse(60)

    with pytest.raises(ConnectionRefusedError):
        thing.get(url=url)
    thing.proxy.clear()
    assert thing.get(url=url).body == CONTENT
    thing.proxy.refuse(0.2)
    until(lambda: _answers(thing, url))


def test_refusing_as_a_fault_takes_the_other_connections_with_it(thing: ProxiedObject) -> None:
    url = thing.url()
    parts = urlsplit(url)
    idle = socket.create_connection((parts.hostname or "", parts.port or 0), 10)
    until(lambda: len(thing.proxy._open_connections()) == 1)
    thing.proxy.inject(Fault.REFUSE, seconds=30)

    with pytest.raises(ConnectionResetError):
        thing.get(url=url)
    with pytest.raises(ConnectionRefusedError):
        thing.get(url=url)
    assert idle.recv(1) == b""
    idle.close()
    thing.proxy.clear()
    assert thing.get(url=url).body == CONTENT


def _answers(thing: ProxiedObject, url: str) -> bool:
    try:
        return thing.get(url=url).status == 200
    except ConnectionRefusedError:
        return False
