"""The demonstration store serves, asks for its keys, and is gone when it should be."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from agent_plugin.cli.demo_store import DemoStore, find_weed
from agent_plugin.content.errors import (
    LocalWriteError,
    StoreProtocolError,
    StoreUnavailableError,
    UnsupportedPlatformError,
)
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server

CHILD = """
import json, sys, time
from pathlib import Path
from agent_plugin.cli.demo_store import DemoStore
with DemoStore(Path(sys.argv[1])) as store:
    print(json.dumps([store.pid, store.endpoint_url]), flush=True)
    time.sleep(600)
"""


def _server(store: DemoStore, *, bucket: str = "demo") -> S3Server:
    return S3Server(
        endpoint_url=store.endpoint_url,
        access_key=store.access_key,
        secret_key=store.secret_key,
        read_only_access_key=store.read_only_access_key,
        read_only_secret_key=store.read_only_secret_key,
        bucket=bucket,
    )


def _listening(pid: int) -> list[tuple[str, int]]:
    return [
        (connection.laddr[0], connection.laddr[1])
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr
    ]


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


def _sockets_in_tmp(ports: set[int]) -> list[Path]:
    found = Path("/tmp").glob("seaweedfs-*-grpc-*.sock")
    return [path for path in found if int(path.stem.rpartition("-")[2]) in ports]


def test_it_serves_on_loopback_only_keeps_its_data_and_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    # Of servers that were killed some time ago, with one of this one's ports for another service.
    before = set(Path("/tmp").glob("seaweedfs-*-grpc-*.sock"))
    with DemoStore(directory) as store:
        store.create_bucket("demo")
        store.create_bucket("demo")
        server = _server(store)
        server.client().put_object(Bucket="demo", Key="k", Body=b"kept")
        listening = _listening(store.pid)
        modes = {
            name: stat.S_IMODE((directory / name).stat().st_mode)
            for name in (".", "s3.json", "weed.out", "data")
        }
        pid = store.pid
    ports = {port for _, port in listening}

    assert {host for host, _ in listening} == {"127.0.0.1"}
    assert urlsplit(server.endpoint_url).port in ports
    assert modes == {".": 0o700, "s3.json": 0o600, "weed.out": 0o600, "data": 0o700}
    assert not psutil.pid_exists(pid)
    assert set(_sockets_in_tmp(ports)) <= before
    with DemoStore(directory) as again:
        assert again.secret_key != server.secret_key
        kept = _server(again).client().get_object(Bucket="demo", Key="k")
        assert kept["Body"].read() == b"kept"


def test_its_environment_is_all_that_a_client_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DemoStore(tmp_path / "store") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="made-by-boto3")

        assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["made-by-boto3"]
        with pytest.raises(StoreProtocolError, match="InvalidBucketName"):
            store.create_bucket("b")


def test_a_wrong_secret_is_refused(s3: S3Server, s3_prefix: str) -> None:
    client = s3.client(secret_key="0" * 40)

    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/k", Body=b"")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_the_read_only_identity_reads_and_nothing_else(s3: S3Server, s3_prefix: str) -> None:
    key = f"{s3_prefix}/k"
    s3.client().put_object(Bucket=s3.bucket, Key=key, Body=b"read me")
    client = s3.client(read_only=True)

    assert client.get_object(Bucket=s3.bucket, Key=key)["Body"].read() == b"read me"
    assert client.list_objects_v2(Bucket=s3.bucket, Prefix=s3_prefix)["KeyCount"] == 1
    for attempt in (
        lambda: client.put_object(Bucket=s3.bucket, Key=key, Body=b"no"),
        lambda: client.delete_object(Bucket=s3.bucket, Key=key),
    ):
        with pytest.raises(ClientError) as refused:
            attempt()
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_an_absent_bucket_is_not_made_by_a_put(s3: S3Server) -> None:
    with pytest.raises(ClientError, match="NoSuchBucket"):
        s3.client().put_object(Bucket="never-made", Key="k", Body=b"")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(tmp_path: Path, end: signal.Signals) -> None:
    argv = [sys.executable, "-c", CHILD, str(tmp_path / "store")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, endpoint_url = json.loads(parent.stdout.readline())
        ports = {port for _, port in _listening(pid)}
        parent.send_signal(end)
        parent.wait(10)

    until(lambda: _is_gone(pid))
    port = urlsplit(endpoint_url).port or 0
    # A killed process is a zombie already while its last threads still hold the sockets.
    until(lambda: _refuses_connections(port))
    for leftover in _sockets_in_tmp(ports):
        leftover.unlink()


def test_a_server_that_can_not_start_is_reported_with_what_it_said(tmp_path: Path) -> None:
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho the disk is made of cheese\nexit 3\n")
    program.chmod(0o700)

    with (
        pytest.raises(StoreUnavailableError, match="made of cheese"),
        DemoStore(tmp_path / "store", weed=program),
    ):
        pass


def test_a_missing_server_is_reported_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(UnsupportedPlatformError) as missing:
        find_weed()
    assert missing.value.hint == "Run: pip install 'propmaster[demo]'"


def test_the_server_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "weed"
    program.touch(mode=0o700)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "other" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + "/nonexistent")

    assert find_weed() == program


def test_a_directory_that_can_not_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(LocalWriteError, match="Not a directory"), DemoStore(tmp_path / "file/x"):
        pass
