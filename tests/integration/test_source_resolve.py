"""Which objects a source brings, asked of real servers: SeaweedFS, and moto for hostile keys."""

import base64
import hashlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import msgspec
import pytest

from agent_plugin.content.errors import (
    CancelledError,
    ObjectArchivedError,
    ObjectChangedError,
    ObjectNotFoundError,
    ObjectRestoringError,
    PathClashError,
    PropmasterError,
    SourceEmptyError,
    SourceInvalidError,
    StoreAccessError,
    UnsafePathError,
)
from agent_plugin.content.object_snapshot import ObjectSnapshot
from agent_plugin.content.objects import SHA256
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.result_documents import Result, ResultParams
from agent_plugin.sources.access import SourceServers
from agent_plugin.sources.partition import Partition
from agent_plugin.sources.resolve import resolve
from agent_plugin.sources.spec import InputSource, decode_source
from tests.servers.s3_server import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.literals import StorageClassType

SET = {
    "set1/001.txt": b"001\n",
    "set1/002.txt": b"002\n",
    "set2/201.txt": b"201\n",
    "set2/nested/301.txt": b"301\n",
}
MULTIPART_BYTES = 5 * 1024 * 1024
ONCE = RetryPolicy(attempts=1)


@pytest.fixture(scope="module")
def servers(s3: S3Server) -> SourceServers:
    return SourceServers(s3.environment)


def _store(s3: S3Server, prefix: str) -> str:
    """Store the set, and what stands for a directory; return the prefix, with its slash."""
    client = s3.client()
    for name, data in SET.items():
        client.put_object(Bucket=s3.bucket, Key=f"{prefix}/{name}", Body=data)
    client.put_object(Bucket=s3.bucket, Key=f"{prefix}/set2/empty/")
    return f"{prefix}/"


@pytest.fixture(scope="module")
def stored(s3: S3Server) -> str:
    """The prefix of the set, which no test changes."""
    return _store(s3, f"root-{uuid.uuid4().hex}")


@pytest.fixture
def changing(s3: S3Server, s3_prefix: str) -> str:
    """The prefix of a set of the test's own."""
    return _store(s3, s3_prefix)


def paths(snapshot: ObjectSnapshot) -> list[str]:
    return [entry.path for entry in snapshot.entries]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("set1/001.txt", ["001.txt"]),
        ("set1/", ["001.txt", "002.txt"]),
        ("set1/*", ["001.txt", "002.txt"]),
        ("set*", ["set1/001.txt", "set1/002.txt", "set2/201.txt", "set2/nested/301.txt"]),
        ("set1/00*", ["001.txt", "002.txt"]),
        ("set2/", ["201.txt", "nested/301.txt"]),
        ("*", sorted(SET)),
    ],
)
def test_s2_a_key_is_one_object_or_what_several_begin_with(
    s3: S3Server, servers: SourceServers, stored: str, key: str, expected: list[str]
) -> None:
    snapshot = resolve(InputSource(s3.bucket, stored + key), servers)

    assert paths(snapshot) == expected
    assert snapshot.total_bytes == 4 * len(expected)
    assert snapshot.access.endpoint == s3.endpoint_url
    heads = s3.client()
    for entry in snapshot.entries:
        answer = heads.head_object(Bucket=s3.bucket, Key=entry.key)
        assert (entry.etag, entry.size) == (answer["ETag"], answer["ContentLength"])
        assert abs(entry.mtime / 1e6 - answer["LastModified"].timestamp()) < 1.0


def test_s2_an_object_that_is_not_there_is_no_beginning_of_others(
    s3: S3Server, servers: SourceServers, stored: str
) -> None:
    with pytest.raises(ObjectNotFoundError, match="set1/00: there is no such object"):
        resolve(InputSource(s3.bucket, f"{stored}set1/00"), servers)


def test_s2_a_snapshot_is_the_same_until_an_object_changes(
    s3: S3Server, servers: SourceServers, changing: str
) -> None:
    source = InputSource(s3.bucket, changing)
    first = resolve(source, servers)
    assert resolve(source, servers).encode() == first.encode()

    s3.client().put_object(Bucket=s3.bucket, Key=f"{changing}set1/001.txt", Body=b"one\n")

    second = resolve(source, servers)
    assert second.digest != first.digest
    assert paths(second) == paths(first)
    objects = servers.objects(first.access)
    with pytest.raises(ObjectChangedError):
        objects.read(first.info(first.entries[0]), 0, 4)
    assert objects.read(second.info(second.entries[0]), 0, 4) == b"one\n"
    assert objects.read(first.info(first.entries[1]), 0, 4) == b"002\n"
    assert first.identity(first.entries[0]) != second.identity(second.entries[0])
    assert first.identity(first.entries[1]) == second.identity(second.entries[1])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"key": "none/"}, "no object has a key that begins so"),
        ({"key": "set2/empty/"}, "no object has a key that begins so"),
        ({"key": "set1/", "filter": "exr"}, "Filter leaves none of 2 objects"),
        (
            {"key": "set1/", "partition": Partition("substring", end_index=9, count=2, index=1)},
            "part 1 of 2 has none of 2 objects",
        ),
    ],
)
def test_s2_a_source_that_brings_nothing_fails_unless_that_is_fine(
    s3: S3Server, servers: SourceServers, stored: str, changed: dict[str, Any], reason: str
) -> None:
    fields = changed | {"key": stored + changed["key"], "alias": "plates"}

    with pytest.raises(SourceEmptyError) as caught:
        resolve(InputSource(s3.bucket, **fields), servers)
    assert caught.value.message == f"plates: {reason}"
    assert "OnEmpty: ok" in caught.value.hint

    allowed = resolve(InputSource(s3.bucket, **fields, on_empty="ok"), servers)
    assert (len(allowed), allowed.total_bytes) == (0, 0)
    assert ObjectSnapshot.decode(allowed.encode(), source="x") == allowed


@pytest.mark.parametrize(
    ("key", "changed", "expected"),
    [
        ("", {"filter": "/3"}, ["set2/nested/301.txt"]),
        ("set*", {"filter": r"^2/.*\d\.txt$"}, ["set2/201.txt", "set2/nested/301.txt"]),
        ("set1/", {"filter": "set1"}, []),
        ("set1/", {"filter": "00[12]"}, ["001.txt", "002.txt"]),
        ("set1/", {"filter": "00[12]", "anchored": True}, []),
        ("set1/", {"filter": r"00[12]\.txt", "anchored": True}, ["001.txt", "002.txt"]),
        ("set1/001.txt", {"filter": "nothing"}, ["001.txt"]),
    ],
)
def test_s4_a_filter_looks_at_the_rest_of_the_key(
    s3: S3Server,
    servers: SourceServers,
    stored: str,
    key: str,
    changed: dict[str, Any],
    expected: list[str],
) -> None:
    source = InputSource(s3.bucket, stored + key, on_empty="ok", **changed)

    assert paths(resolve(source, servers)) == expected


def test_s4_a_filter_that_takes_too_long_ends_the_source(
    s3: S3Server, servers: SourceServers, changing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_plugin.content.pattern.MAX_SEARCH_SECONDS", 0.05)
    s3.client().put_object(Bucket=s3.bucket, Key=f"{changing}{'a' * 200}!", Body=b"")

    source = InputSource(s3.bucket, changing, filter="(.*)(.*)(.*)(.*)(.*)[^!]$")
    with pytest.raises(SourceInvalidError, match=r"Filter: '\(.* was not done with 'aaa"):
        resolve(source, servers)


def test_s8_tasks_take_each_object_once(s3: S3Server, servers: SourceServers, stored: str) -> None:
    partition = Partition("object", count=3, index_parameter="Part")
    source = InputSource(s3.bucket, stored, partition=partition, on_empty="ok")

    parts = [paths(resolve(source, servers, index=index)) for index in range(3)]

    assert sorted(path for part in parts for path in part) == sorted(SET)
    assert paths(resolve(source, servers)) == sorted(SET), "a session keeps what all tasks have"


def test_s2_a_listing_stops_when_that_is_wished(
    s3: S3Server, servers: SourceServers, stored: str
) -> None:
    cancellation = Cancellation()
    cancellation.cancel()

    with pytest.raises(CancelledError):
        resolve(InputSource(s3.bucket, stored), servers, cancellation=cancellation)


# ------------------------------------------------------------------------------------- checksums


def _sha256(*parts: bytes) -> str:
    return base64.b64encode(hashlib.sha256(b"".join(parts)).digest()).decode()


def test_s2_a_checksum_is_compared_before_anything_is_fetched(
    s3: S3Server, servers: SourceServers, s3_prefix: str
) -> None:
    key = f"{s3_prefix}/a.tar.gz"
    s3.client().put_object(Bucket=s3.bucket, Key=key, Body=b"abc", ChecksumSHA256=_sha256(b"abc"))
    source = InputSource(s3.bucket, key, checksum_sha256=_sha256(b"abc"))

    [entry] = resolve(source, servers).entries

    assert entry.checksum_sha256 == _sha256(b"abc")
    with pytest.raises(ObjectChangedError, match="S3 keeps the SHA-256 ungWv48B") as caught:
        resolve(InputSource(s3.bucket, key, checksum_sha256=_sha256(b"xyz")), servers)
    assert caught.value.code == "E_SOURCE_CHANGED"


def test_s2_an_object_without_a_checksum_fails_one_that_is_demanded(
    s3: S3Server, servers: SourceServers, stored: str
) -> None:
    source = InputSource(s3.bucket, f"{stored}set1/001.txt", checksum_sha256=_sha256(b"001\n"))

    with pytest.raises(SourceInvalidError, match="S3 keeps no SHA-256 of it"):
        resolve(source, servers)
    # Of several objects it means nothing.
    directory = InputSource(s3.bucket, f"{stored}set1/", checksum_sha256=_sha256(b""))
    assert [entry.checksum_sha256 for entry in resolve(directory, servers).entries] == ["", ""]


def test_s2_the_checksum_of_an_upload_in_parts_is_none_of_the_content(
    s3: S3Server, servers: SourceServers, s3_prefix: str
) -> None:
    """The content's own is compared when the content is here: the entry has it."""
    key = f"{s3_prefix}/parts"
    pieces = (b"a" * MULTIPART_BYTES, b"b")
    composite = _put_in_parts(s3.client(), s3.bucket, key, pieces)
    assert composite.endswith("-2")

    whole = _sha256(*pieces)
    [entry] = resolve(InputSource(s3.bucket, key, checksum_sha256=whole), servers).entries
    assert entry.checksum_sha256 == whole

    [entry] = resolve(InputSource(s3.bucket, key, checksum_sha256=composite), servers).entries
    assert entry.checksum_sha256 == ""

    wrong = f"{_sha256(b'')}-2"
    with pytest.raises(ObjectChangedError, match="S3 keeps the SHA-256 "):
        resolve(InputSource(s3.bucket, key, checksum_sha256=wrong), servers)


def test_s1_a_published_result_is_a_source_as_it_is(
    s3: S3Server, servers: SourceServers, s3_prefix: str
) -> None:
    """Of an archive, with the SHA-256 that its metadata has, since S3 has none of the content."""
    client, data = s3.client(), b"an archive"
    for name in ("1.tar.gz", "2.tar.gz"):
        client.put_object(
            Bucket=s3.bucket,
            Key=f"{s3_prefix}/{name}",
            Body=data,
            Metadata={SHA256: hashlib.sha256(data).hexdigest()},
        )
    archive, plain = (
        msgspec.to_builtins(Result("s3", ResultParams(s3.bucket, key, checksum_sha256=checksum)))
        for key, checksum in ((f"{s3_prefix}/1.tar.gz", _sha256(data)), (f"{s3_prefix}/", ""))
    )

    [entry] = resolve(decode_source(archive, source="x"), servers).entries
    assert entry.checksum_sha256 == _sha256(data)
    assert paths(resolve(decode_source(plain, source="x"), servers)) == ["1.tar.gz", "2.tar.gz"]

    archive["Params"]["ChecksumSHA256"] = _sha256(b"another")
    with pytest.raises(ObjectChangedError, match="S3 keeps the SHA-256 "):
        resolve(decode_source(archive, source="x"), servers)


def _put_in_parts(client: "S3Client", bucket: str, key: str, pieces: tuple[bytes, ...]) -> str:
    upload = client.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="SHA256")
    names: Any = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"]}
    done: list[Any] = []
    for number, piece in enumerate(pieces, start=1):
        sent = client.upload_part(
            **names, PartNumber=number, Body=piece, ChecksumSHA256=_sha256(piece)
        )
        done.append({"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": _sha256(piece)})
    client.complete_multipart_upload(**names, MultipartUpload={"Parts": done})
    head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    return head["ChecksumSHA256"]


# ----------------------------------------------------------------------------------- identities


def test_s9_who_may_only_read_can_bring_sources_in(s3: S3Server, stored: str) -> None:
    servers = SourceServers(s3.read_only_environment)

    assert paths(resolve(InputSource(s3.bucket, f"{stored}set1/"), servers)) == [
        "001.txt",
        "002.txt",
    ]


def test_s9_who_has_no_right_is_told_so(s3: S3Server, stored: str) -> None:
    environment = s3.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}

    for key in ("set1/", "set1/001.txt"):
        with pytest.raises(StoreAccessError):
            resolve(InputSource(s3.bucket, stored + key), SourceServers(environment, policy=ONCE))


def test_s9_a_profile_has_keys_of_its_own(s3: S3Server, stored: str, tmp_path: Path) -> None:
    """And they come before those of the environment, which are the queue's."""
    (tmp_path / "credentials").write_text(
        f"[vendor]\naws_access_key_id = {s3.read_only_access_key}\n"
        f"aws_secret_access_key = {s3.read_only_secret_key}\n"
    )
    environment = s3.environment | {
        "AWS_SECRET_ACCESS_KEY": "wrong",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }
    servers = SourceServers(environment, policy=ONCE)

    snapshot = resolve(InputSource(s3.bucket, f"{stored}set1/", profile="vendor"), servers)

    assert paths(snapshot) == ["001.txt", "002.txt"]
    assert snapshot.access.profile == "vendor"
    assert s3.read_only_secret_key.encode() not in snapshot.encode()
    with pytest.raises(PropmasterError, match="nobody"):
        resolve(InputSource(s3.bucket, stored, profile="nobody"), servers)


def test_s9_nobody_is_let_in_without_a_signature_unless_the_bucket_is_open(
    s3: S3Server, servers: SourceServers, stored: str
) -> None:
    with pytest.raises(StoreAccessError):
        resolve(InputSource(s3.bucket, f"{stored}set1/", no_sign=True), servers)


def test_s9_an_endpoint_of_the_source_comes_before_that_of_the_environment(
    s3: S3Server, stored: str
) -> None:
    servers = SourceServers(s3.environment_at("http://127.0.0.1:1"), policy=ONCE)

    snapshot = resolve(InputSource(s3.bucket, f"{stored}set1/", endpoint=s3.endpoint_url), servers)

    assert snapshot.access.endpoint == s3.endpoint_url


def test_s9_one_client_serves_all_sources_of_one_identity(s3: S3Server, stored: str) -> None:
    servers = SourceServers(s3.environment)
    first, second = (
        servers.access_of(InputSource(bucket, key, alias=key))
        for bucket, key in ((s3.bucket, stored), ("another", "x"))
    )

    assert servers.objects(first) is servers.objects(second)
    other = servers.access_of(InputSource(s3.bucket, region="eu-west-1"))
    assert servers.objects(other) is not servers.objects(first)


# ---------------------------------------------------------------------------------- hostile keys


@pytest.fixture(scope="module")
def moto_environment(moto: str) -> Mapping[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": moto,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def bucket(moto_client: "S3Client") -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    moto_client.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="module")
def moto_client(moto: str) -> "S3Client":
    return boto3.client(
        "s3",
        endpoint_url=moto,
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
    )


@pytest.fixture(scope="module")
def moto_servers(moto_environment: Mapping[str, str]) -> SourceServers:
    return SourceServers(moto_environment)


@pytest.mark.parametrize(
    ("keys", "key", "failure"),
    [
        (["d/ok", "d/../../../etc/passwd"], "d/", UnsafePathError),
        (["d/ok", "d//etc/passwd"], "d/", UnsafePathError),
        (["d/ok", "d/a/./b"], "d/", UnsafePathError),
        (["/etc/passwd"], "", UnsafePathError),
        (["d/.."], "d/..", UnsafePathError),
        (["d/ok", f"d/{'x' * 256}"], "d/", UnsafePathError),
        (["d/a", "d/a/b"], "d/", PathClashError),
        (["d/a/b/c", "d/a", "d/a-b"], "", PathClashError),
    ],
)
def test_s3_hostile_keys_are_refused_before_anything_is_fetched(
    moto_client: "S3Client",
    moto_servers: SourceServers,
    bucket: str,
    keys: list[str],
    key: str,
    failure: type[PropmasterError],
) -> None:
    for each in keys:
        moto_client.put_object(Bucket=bucket, Key=each, Body=b"x")

    with pytest.raises(failure, match=f"s3://{bucket}/"):
        resolve(InputSource(bucket, key), moto_servers)


@pytest.mark.parametrize("key", ["a?b#c%25 +é.exr", "/lead", "d//double", "d/back\\slash", "a=b,c"])
def test_s1_keys_are_taken_as_they_are(
    moto_client: "S3Client", moto_servers: SourceServers, bucket: str, key: str
) -> None:
    moto_client.put_object(Bucket=bucket, Key=key, Body=b"x")

    [single] = resolve(InputSource(bucket, key), moto_servers).entries
    assert (single.key, single.path) == (key, key.rpartition("/")[2])

    directory = key[: key.rfind("/") + 1]
    [listed] = resolve(InputSource(bucket, f"{directory}*"), moto_servers).entries
    assert (listed.key, listed.path, listed.etag) == (key, single.path, single.etag)


def test_s2_an_empty_key_is_the_whole_bucket(
    moto_client: "S3Client", moto_servers: SourceServers, bucket: str
) -> None:
    for key in ("b/c", "a", "b/d/e"):
        moto_client.put_object(Bucket=bucket, Key=key, Body=b"x")

    assert paths(resolve(InputSource(bucket), moto_servers)) == ["a", "b/c", "b/d/e"]


def test_s2_a_directory_that_is_named_without_its_slash_is_listed(
    moto_client: "S3Client", moto_servers: SourceServers, bucket: str
) -> None:
    moto_client.put_object(
        Bucket=bucket, Key="d/sub", Body=b"", ContentType="application/x-directory; charset=UTF-8"
    )
    for key in ("d/sub/a", "d/sub2/b"):
        moto_client.put_object(Bucket=bucket, Key=key, Body=b"x")

    assert paths(resolve(InputSource(bucket, "d/sub"), moto_servers)) == ["sub/a"]


def test_s2_a_version_is_that_of_the_source(
    moto_client: "S3Client", moto_servers: SourceServers, bucket: str
) -> None:
    moto_client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first, second = (
        moto_client.put_object(Bucket=bucket, Key="d/a", Body=data)["VersionId"]
        for data in (b"1", b"22")
    )

    [newest] = resolve(InputSource(bucket, "d/a"), moto_servers).entries
    assert (newest.size, newest.version) == (2, second)
    [old] = resolve(InputSource(bucket, "d/a", version_id=first), moto_servers).entries
    assert (old.size, old.version) == (1, first)
    # Of several objects it means nothing.
    [listed] = resolve(InputSource(bucket, "d/", version_id=first), moto_servers).entries
    assert listed.size == 2

    moto_client.delete_object(Bucket=bucket, Key="d/a")
    with pytest.raises(ObjectNotFoundError):
        resolve(InputSource(bucket, "d/a"), moto_servers)
    assert resolve(InputSource(bucket, "d/a", version_id=first), moto_servers).total_bytes == 1


def test_s9_a_bucket_that_is_open_to_everybody_needs_no_credentials(
    moto: str, moto_client: "S3Client", bucket: str
) -> None:
    moto_client.put_object(Bucket=bucket, Key="d/a", Body=b"x")
    environment = {"AWS_ENDPOINT_URL_S3": moto, "AWS_EC2_METADATA_DISABLED": "true"}

    with pytest.raises(StoreAccessError, match="no AWS credentials"):
        resolve(InputSource(bucket, "d/"), SourceServers(environment, policy=ONCE))
    snapshot = resolve(InputSource(bucket, "d/", no_sign=True), SourceServers(environment))
    assert (paths(snapshot), snapshot.access.anonymous) == (["a"], True)


# ------------------------------------------------------------------------------- archive classes


@pytest.fixture
def restoring() -> Iterator[None]:
    """Restores of moto take some looks, and not none."""
    from moto.moto_api import state_manager  # noqa: PLC0415 - seconds that few tests need

    state_manager.set_transition("s3::keyrestore", {"progression": "manual", "times": 3})
    yield
    state_manager.unset_transition("s3::keyrestore")


@pytest.mark.parametrize("listed", [True, False])
def test_s2_objects_in_archive_classes_are_refused_by_name_before_anything_is_fetched(
    moto_client: "S3Client", moto_servers: SourceServers, bucket: str, listed: bool
) -> None:
    """The mutation that was caught: no look at the class, so that the first read fails."""
    key = "d/" if listed else "d/cold.exr"
    classes: dict[str, StorageClassType] = {
        "cold.exr": "GLACIER",
        "deep.exr": "DEEP_ARCHIVE",
        "instant.exr": "GLACIER_IR",
        "warm.exr": "STANDARD_IA",
    }
    for name, storage_class in classes.items():
        moto_client.put_object(
            Bucket=bucket, Key=f"d/{name}", Body=b"x", StorageClass=storage_class
        )
    # Nothing of it is ever read.
    moto_client.put_object(Bucket=bucket, Key="d/empty", StorageClass="GLACIER")

    with pytest.raises(ObjectArchivedError, match=rf"s3://{bucket}/d/cold\.exr") as caught:
        resolve(InputSource(bucket, key), moto_servers)

    assert (caught.value.code, caught.value.exit_code) == ("E_ARCHIVED", 102)
    assert f"s3://{bucket}/d/deep.exr" in caught.value.message or not listed
    assert not {"instant", "warm", "empty"} & set(caught.value.message.replace("/", ".").split("."))
    if listed:
        left = resolve(InputSource(bucket, key, filter="instant|warm|empty"), moto_servers)
        assert paths(left) == ["empty", "instant.exr", "warm.exr"]


@pytest.mark.usefixtures("restoring")
def test_s2_objects_that_were_restored_are_taken_and_those_that_are_being_restored_are_not(
    moto_client: "S3Client", moto_servers: SourceServers, bucket: str
) -> None:
    for name in ("a", "b"):
        moto_client.put_object(Bucket=bucket, Key=f"d/{name}", Body=b"x", StorageClass="GLACIER")
        moto_client.restore_object(Bucket=bucket, Key=f"d/{name}", RestoreRequest={"Days": 1})

    with pytest.raises(ObjectRestoringError, match=f"s3://{bucket}/d/a, s3://{bucket}/d/b") as told:
        resolve(InputSource(bucket, "d/"), moto_servers)
    for _ in range(3):
        for name in ("a", "b"):
            moto_client.head_object(Bucket=bucket, Key=f"d/{name}")

    assert (told.value.code, told.value.exit_code) == ("E_RESTORING", 103)
    snapshot = resolve(InputSource(bucket, "d/"), moto_servers)
    assert paths(snapshot) == ["a", "b"]
    objects = moto_servers.objects(snapshot.access)
    assert objects.read(snapshot.info(snapshot.entries[0]), 0, 1) == b"x"


def test_s2_an_object_that_is_archived_after_it_was_listed_is_told_as_such(
    moto_client: "S3Client", moto_servers: SourceServers, bucket: str
) -> None:
    """A lifecycle rule may do it at any time, and the ETag stays.

    The mutation that was caught: what the store calls InvalidObjectState taken for a lack of
    rights, since its status is 403.
    """
    moto_client.put_object(Bucket=bucket, Key="a", Body=b"x")
    snapshot = resolve(InputSource(bucket, "a"), moto_servers)
    moto_client.put_object(Bucket=bucket, Key="a", Body=b"x", StorageClass="GLACIER")

    with pytest.raises(ObjectArchivedError, match="InvalidObjectState"):
        moto_servers.objects(snapshot.access).read(snapshot.info(snapshot.entries[0]), 0, 1)
