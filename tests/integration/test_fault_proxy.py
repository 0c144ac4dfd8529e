"""The fault proxy changes nothing unasked, remembers everything, and chooses as its rules say."""

import http.client
import random
import socket
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil
import pytest
from botocore.exceptions import ClientError

from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.proxied_object import ProxiedObject, until
from tests.servers.s3_server import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

CONTENT = random.Random(1).randbytes(200_000)


@pytest.fixture
def thing(fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str) -> ProxiedObject:
    return ProxiedObject.stored_at(fault_proxy, s3, f"{s3_prefix}/Data/a b+ü.xxh128", CONTENT)


def test_without_a_rule_every_operation_is_what_it_is_without_the_proxy(
    thing: ProxiedObject,
) -> None:
    client, bucket, key = thing.client, thing.s3.bucket, thing.key

    client.put_object(Bucket=bucket, Key=key, Body=CONTENT[:70_000], Metadata={"a": "b"})
    head = client.head_object(Bucket=bucket, Key=key)
    part = client.get_object(Bucket=bucket, Key=key, Range="bytes=100-199")["Body"].read()
    listed = client.list_objects_v2(Bucket=bucket, Prefix=key)
    client.copy_object(Bucket=bucket, Key=key + "2", CopySource={"Bucket": bucket, "Key": key})
    copied = client.get_object(Bucket=bucket, Key=key + "2")["Body"].read()
    client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key + "2"}]})

    assert (head["ContentLength"], head["Metadata"]) == (70_000, {"a": "b"})
    assert part == CONTENT[100:200]
    assert [entry["Key"] for entry in listed["Contents"]] == [key]
    assert copied == CONTENT[:70_000]
    with pytest.raises(ClientError, match="404"):
        client.head_object(Bucket=bucket, Key=key + "2")


def test_a_multipart_upload_passes(thing: ProxiedObject) -> None:
    client, bucket, key = thing.client, thing.s3.bucket, thing.key
    content = random.Random(2).randbytes(6 * 1024 * 1024)
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    parts: list[CompletedPartTypeDef] = []
    for number, data in enumerate((content[: 5 << 20], content[5 << 20 :]), start=1):
        sent = client.upload_part(
            Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=data
        )
        parts.append({"ETag": sent["ETag"], "PartNumber": number})
    client.complete_multipart_upload(
        Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
    )

    assert thing.stored() == content
    puts = [request for request in thing.proxy.requests if request.method == "PUT"]
    assert [request.body_length for request in puts] == [5 << 20, 1 << 20]


def test_a_chunked_request_body_passes(thing: ProxiedObject) -> None:
    parts = urlsplit(thing.url("put_object"))
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    pieces = iter([CONTENT[:10], CONTENT[10:5000]])
    connection.request("PUT", f"{parts.path}?{parts.query}", pieces, encode_chunked=True)
    status = connection.getresponse().status
    connection.close()

    assert (status, thing.stored()) == (200, CONTENT[:5000])


def test_a_wrong_secret_is_still_refused_by_the_store(thing: ProxiedObject) -> None:
    client = thing.s3.client(endpoint_url=thing.proxy.url, secret_key="wrong")

    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client.get_object(Bucket=thing.s3.bucket, Key=thing.key)


def test_every_request_is_remembered_with_what_became_of_it(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.INTERNAL_ERROR, times=1)
    thing.get({"Range": "bytes=0-9"})
    thing.get({"Range": "bytes=0-9"})
    thing.get(url=thing.url("put_object"), method="PUT", body=b"four")

    told = [
        (request.method, request.key, request.status, request.fault, request.body_length)
        for request in thing.proxy.requests
    ]
    assert told == [
        ("GET", thing.key, 500, Fault.INTERNAL_ERROR, 0),
        ("GET", thing.key, 206, None, 0),
        ("PUT", thing.key, 200, None, 4),
    ]
    assert thing.proxy.requests[0].headers["range"] == "bytes=0-9"
    assert "%C3%BC" in thing.proxy.requests[0].path
    assert "X-Amz-Signature" in thing.proxy.requests[0].query
    assert thing.proxy.count("GET", r"\.xxh128$") == 2
    thing.proxy.forget()
    assert thing.proxy.requests == []


def test_a_rule_strikes_only_what_it_names(thing: ProxiedObject) -> None:
    rule = thing.proxy.inject(Fault.UNAVAILABLE, key=r"/Data/[^/]+$", skip=1, times=2)
    thing.proxy.inject(Fault.FORBIDDEN, key="^Manifests")

    assert thing.get(method="HEAD", url=thing.url("head_object")).status == 200
    assert [thing.get().status for _ in range(5)] == [200, 503, 503, 200, 200]
    assert rule.hits == 2
    thing.proxy.inject(Fault.NOT_FOUND)
    assert thing.get().status == 404
    thing.proxy.clear()
    thing.proxy.inject(Fault.NOT_IMPLEMENTED, header="if-match")
    assert thing.get().status == 200
    assert thing.get({"If-Match": "*"}).status == 501


def test_a_burst_lasts_as_long_as_it_is_told_to(thing: ProxiedObject) -> None:
    thing.proxy.inject(Fault.SLOW_DOWN, for_seconds=0.5)

    start = time.monotonic()
    assert thing.get().status == 503
    until(lambda: thing.get().status == 200)
    assert time.monotonic() - start >= 0.5


def _struck(s3: S3Server, bucket_path: str, order: Iterable[int], seed: int) -> set[int]:
    struck = set()
    with FaultProxy(s3.endpoint_url, seed=seed) as proxy:
        proxy.inject(Fault.UNAVAILABLE, rate=0.3)
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
        for number in order:
            connection.request("GET", f"{bucket_path}/blob-{number}")
            response = connection.getresponse()
            response.read()
            if response.status == 503:
                struck.add(number)
        connection.close()
    return struck


def test_a_rate_strikes_its_share_and_the_same_ones_in_any_order(s3: S3Server) -> None:
    first = _struck(s3, f"/{s3.bucket}/one", range(300), seed=7)
    second = _struck(s3, f"/{s3.bucket}/two", reversed(range(300)), seed=7)
    other = _struck(s3, f"/{s3.bucket}/one", range(300), seed=8)

    assert first == second
    assert first != other
    assert 60 <= len(first) <= 120


def test_a_closed_proxy_leaves_no_thread_and_no_socket(s3: S3Server) -> None:
    store_port = urlsplit(s3.endpoint_url).port or 0
    before = _sockets_with(store_port)
    with FaultProxy(s3.endpoint_url, seed=0) as proxy:
        port = urlsplit(proxy.url).port or 0
        clients = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(5)]
        clients[0].sendall(b"GET /b/k HTTP/1.1\r\nHost: x\r\n\r\n")
        assert clients[0].recv(8) == b"HTTP/1.1"
        proxy.inject(Fault.STALL)
        clients[1].sendall(b"GET /b/k HTTP/1.1\r\nHost: x\r\n\r\n")
        clients[2].sendall(b"PUT /b/k HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        clients[3].sendall(b"no request at all\r\n\r\n")
        assert clients[3].recv(1) == b""
        until(lambda: len(proxy.requests) == 3)
    for client in clients:
        client.close()

    assert [t.name for t in threading.enumerate() if t.name.startswith(proxy.url)] == []
    assert _sockets_with(port) == set()
    assert _sockets_with(store_port) <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)


def test_a_stalled_request_ends_with_its_connection_though_its_body_is_unread(
    s3: S3Server,
) -> None:
    with FaultProxy(s3.endpoint_url, seed=0) as proxy:
        proxy.inject(Fault.STALL)
        client = socket.create_connection(("127.0.0.1", urlsplit(proxy.url).port or 0), 10)
        client.sendall(b"GET /b/k HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        until(lambda: len(proxy.requests) == 1)
        client.sendall(b"body")
        client.close()
        until(lambda: not [t for t in threading.enumerate() if t.name == f"{proxy.url} client"])


def _sockets_with(port: int) -> set[int]:
    found = psutil.Process().net_connections(kind="inet")
    return {
        connection.fd
        for connection in found
        if port in {*connection.laddr[1:], *connection.raddr[1:]}
    }


def test_a_store_that_is_gone_ends_the_connection(s3: S3Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with FaultProxy(f"http://127.0.0.1:{port}", seed=0) as proxy:
            connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
            connection.request("GET", f"/{s3.bucket}")
            with pytest.raises(http.client.RemoteDisconnected):
                connection.getresponse()
            connection.close()
