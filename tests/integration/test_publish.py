"""What publishers make of a task's outputs: plain objects and archives, on a real S3 server."""

import base64
import hashlib
import io
import json
import subprocess
import tarfile
import uuid
from pathlib import Path

import msgspec
import pytest
import zstandard

from agent_plugin.content import events
from agent_plugin.content.objects import SHA256
from agent_plugin.publish.destination import EXECUTION, HASH
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import JOB, Host, action
from tests.servers.publishing import (
    LARGE,
    MEBIBYTE,
    Publishing,
    host_of,
    params_of,
)
from tests.servers.s3_server import S3Server

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
    host = host_of(s3, tmp_path / "host")
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
