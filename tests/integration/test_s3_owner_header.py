"""Every request names the account that must own the bucket, and signs that."""

import os
import re
import tempfile

import boto3
import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import SettingsInvalidError, StoreAccessError
from agent_plugin.content.open_store import build_store
from agent_plugin.content.s3_store import S3Store
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Store
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.s3_server import S3Server

ACCOUNT = "123456789012"
OWNER = "x-amz-expected-bucket-owner"


def store_at(
    proxy: FaultProxy, s3: S3Server, prefix: str, account_id: str | None, **environment: str
) -> Store:
    return build_store(
        f"s3://{s3.bucket}/{prefix}",
        environment=s3.environment_at(proxy.url) | environment,
        account_id=account_id,
    )


def do_everything(store: Store) -> None:
    small, large = b"small", os.urandom(WHOLE_BLOB_BYTES + 1)
    cancellation = Cancellation()
    store.find_missing([Digest.of(small)])
    store.put(Digest.of(small), small)
    store.put(Digest.of(small), small)
    store.get(Digest.of(small))
    store.read_range(Digest.of(small), 1, 2)
    with tempfile.TemporaryFile() as file:
        file.write(large)
        file.flush()
        store.put_file(Digest.of(large), file.fileno(), cancellation=cancellation)
    with tempfile.TemporaryFile() as file:
        store.fetch(Digest.of(large), file.fileno(), cancellation=cancellation)
    store.put_document("a/b", b"{}", {"asset-root": "/a"})
    store.get_document("a/b", max_bytes=10)
    list(store.list_documents("a/"))
    list(store.list_blobs())


def test_every_request_names_the_owner_and_signs_it(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str
) -> None:
    """S3 refuses x-amz- headers that are not signed, and any other owner."""
    do_everything(store_at(fault_proxy, s3, s3_prefix, ACCOUNT))

    asked = {
        (request.method, re.sub(r"=[^&]*", "", request.query)) for request in fault_proxy.requests
    }
    assert {method for method, _ in asked} == {"HEAD", "GET", "PUT", "POST"}
    assert ("POST", "uploads") in {(method, query.split("&")[0]) for method, query in asked}
    for request in fault_proxy.requests:
        signed = re.search(r"SignedHeaders=([^,]*)", request.headers["authorization"])
        assert request.headers.get(OWNER) == ACCOUNT, request
        assert signed, request
        assert OWNER in signed[1].split(";"), request


def test_no_owner_is_named_when_none_is_known(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str
) -> None:
    do_everything(store_at(fault_proxy, s3, s3_prefix, ""))

    assert fault_proxy.requests
    assert not [request for request in fault_proxy.requests if OWNER in request.headers]


def test_another_owner_is_no_access_rather_than_absence(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str
) -> None:
    """The proxy answers as S3 does when the account is not the bucket's."""
    store = store_at(fault_proxy, s3, s3_prefix, ACCOUNT)
    fault_proxy.inject(Fault.FORBIDDEN, methods={"GET", "PUT", "HEAD", "POST"})
    digest = Digest.of(b"x")

    for call in (
        lambda: store.find_missing([digest]),
        lambda: store.get(digest),
        lambda: store.put(digest, b"x"),
        lambda: store.get_document("a", max_bytes=1),
        lambda: list(store.list_documents("")),
    ):
        with pytest.raises(StoreAccessError, match="403 AccessDenied"):
            call()


def test_the_environment_may_name_the_account(
    fault_proxy: FaultProxy, s3: S3Server, s3_prefix: str
) -> None:
    store = store_at(fault_proxy, s3, s3_prefix, None, AWS_ACCOUNT_ID=ACCOUNT)
    assert isinstance(store, S3Store)
    assert store.account_id == ACCOUNT
    with pytest.raises(SettingsInvalidError, match="account"):
        store_at(fault_proxy, s3, s3_prefix, None, AWS_ACCOUNT_ID="me")


def test_sts_is_asked_for_the_account(
    moto: str, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy
) -> None:
    # The first answer of this server takes seconds on a busy machine: it loads what it needs.
    client = boto3.client(
        "sts", endpoint_url=moto, region_name="us-east-1",
        aws_access_key_id="a", aws_secret_access_key="b",
    )  # fmt: skip
    assert client.get_caller_identity()["Account"] == ACCOUNT

    store = store_at(fault_proxy, s3, s3_prefix, None, AWS_ENDPOINT_URL_STS=moto)
    assert isinstance(store, S3Store)
    assert store.account_id == ACCOUNT


def test_an_unknown_account_is_one_event(
    s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """STS that refuses, and a store that is not AWS's and has no STS."""
    fault_proxy.inject(Fault.FORBIDDEN, methods={"POST"})
    for environment in ({"AWS_ENDPOINT_URL_STS": fault_proxy.url}, {}):
        with caplog.at_level("INFO", logger=events.LOGGER_NAME):
            caplog.clear()
            store = store_at(fault_proxy, s3, s3_prefix, None, **environment)
        assert isinstance(store, S3Store)
        assert store.account_id == ""
        assert [record.getMessage() for record in caplog.records] == [events.OWNER_UNKNOWN]
    assert fault_proxy.count("POST") == 1
