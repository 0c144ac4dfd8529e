"""The publishers of a job document, and their spelling on a command line."""

import json
from typing import Any

import msgspec
import pytest

from agent_plugin.content.errors import JobInvalidError, PlaceholderUnknownError
from agent_plugin.publish.spec import Publisher, parse_all
from agent_plugin.session.job import JobDocument
from tests.servers.hooks import FARM, JOB, QUEUE


def decoded(*publishers: Any) -> tuple[Publisher, ...]:
    document = {
        "farmId": FARM,
        "queueId": QUEUE,
        "jobId": JOB,
        "store": "file:///store",
        "attachments": {"manifests": []},
        "publishers": list(publishers),
    }
    return JobDocument.decode(json.dumps(document).encode(), "the job").publishers


def s3(**params: Any) -> dict[str, Any]:
    return {"Type": "s3", "Params": {"Bucket": "results", "Key": "a/{jobID}", **params}}


def test_o1_a_publisher_is_plain_and_its_key_a_prefix() -> None:
    [publisher] = decoded(s3())

    assert (publisher.encoding, publisher.key_template) == ("plain", "a/{jobID}/")
    assert not publisher.params.overwrite
    assert not publisher.params.required


def test_o1_names_and_words_are_taken_in_any_case() -> None:
    """As the seed's own example has it, `Type: S3`."""
    spelled = {"TYPE": "S3", "params": {"bucket": "results", "KEY": "a", "encoding": "GZip"}}

    [publisher] = decoded(spelled)

    assert publisher == decoded(s3(Key="a", Encoding="gzip"))[0]


def test_o1_a_publisher_survives_the_state_file() -> None:
    [publisher] = decoded(s3(Compress=True, Endpoint="http://10.0.0.1:9000", ByRoot=True))

    data = msgspec.json.encode(publisher)

    assert msgspec.json.decode(data, type=Publisher) == publisher
    assert decoded(json.loads(data)) == (publisher,)


@pytest.mark.parametrize(
    ("params", "encoding", "key"),
    [
        ({}, "plain", "k/"),
        ({"Compress": False}, "plain", "k/"),
        ({"Compress": True}, "gzip", "k.tar.gz"),
        ({"Encoding": "gzip"}, "gzip", "k.tar.gz"),
        ({"Encoding": "zstd"}, "zstd", "k.tar.zst"),
        ({"Encoding": "gzip", "Key": "k.tgz"}, "gzip", "k.tgz"),
        ({"Encoding": "gzip", "Key": "k.tar.gz"}, "gzip", "k.tar.gz"),
        ({"Encoding": "plain", "Key": "k.tar.gz"}, "plain", "k.tar.gz/"),
        ({"Encoding": "gzip", "Compress": True}, "gzip", "k.tar.gz"),
        ({"Encoding": "plain", "Compress": False}, "plain", "k/"),
    ],
)
def test_o2_compress_is_the_older_spelling_of_an_encoding(
    params: dict[str, Any], encoding: str, key: str
) -> None:
    [publisher] = decoded(s3(**{"Key": "k", **params}))

    assert (publisher.encoding, publisher.key_template) == (encoding, key)


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("plain", True), ("gzip", False), ("zstd", True), ("zstd", False)],
)
def test_o2_compress_and_encoding_that_disagree_are_refused(encoding: str, compress: bool) -> None:
    with pytest.raises(JobInvalidError, match=r"publishers\[0\].Params.Encoding: .* Compress"):
        decoded(s3(Encoding=encoding, Compress=compress))


@pytest.mark.parametrize(
    ("publisher", "message", "hint"),
    [
        (s3(Bukcet="x"), r"publishers\[0\].Params.Bukcet: unknown key", "did you mean Bucket?"),
        (s3(bucket="x"), r"publishers\[0\].Params.bucket: unknown key", "did you mean Bucket?"),
        ({"Type": "ipfs", "Params": {}}, r"publishers\[0\].Type: 'ipfs' is not allowed", "s3"),
        ({"Type": "s3"}, r"publishers\[0\].Params: missing", ""),
        ("s3://b/k", r"publishers\[0\]: expected", "Type, Params"),
        (s3(Bucket="a/b"), r"Params.Bucket: 'a/b' is no bucket's name", "it has 3 to 63 letters"),
        (s3(Bucket="ab"), r"Params.Bucket: 'ab' is no bucket's name", "it has 3 to 63 letters"),
        (s3(Key=""), r"Params.Key: it is empty", "give a prefix, such as results/{jobID}"),
        (s3(Key=""), r"Params.Key", ""),
        (s3(Key="/a"), r"Params.Key: '/a' has an empty", ""),
        (s3(Key="a//b"), r"Params.Key: 'a//b' has an empty", ""),
        (s3(Key="a/../b"), r"Params.Key: 'a/../b' has an empty, `.` or `..`", ""),
        (s3(Key="./a"), r"Params.Key", ""),
        (s3(Key="/"), r"Params.Key", ""),
        (s3(Key="a/", Encoding="gzip"), r"Params.Key: 'a/' has an empty", "only a prefix of plain"),
        (s3(Key="a\nb"), r"Params.Key: .* has a control character", ""),
        (s3(Key="a" * 1025), r"Params.Key", ""),
        (s3(Encoding="zip"), r"Params.Encoding: 'zip' is not allowed", "gzip, plain, zstd"),
        (s3(Compress="yes"), r"Params.Compress: expected `bool", "true, false"),
        (s3(Endpoint="s3.example.com"), r"Params.Endpoint: it is no endpoint", "https://"),
        (s3(Endpoint="http://u:secret@h"), r"Params.Endpoint: it is no endpoint", "https://"),
        (s3(Endpoint="http://h:port"), r"Params.Endpoint: it is no endpoint", "https://"),
        (s3(Region="us east"), r"Params.Region", ""),
    ],
    ids=str,
)
def test_o1_what_is_no_publisher_is_refused_by_its_key(
    publisher: Any, message: str, hint: str
) -> None:
    with pytest.raises(JobInvalidError, match=message) as caught:
        decoded(publisher)

    assert hint in caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint


def test_o4_two_publishers_of_one_key_are_refused() -> None:
    with pytest.raises(JobInvalidError, match=r"publishers\[1\].Params.Key: .* publishers\[0\]"):
        decoded(s3(Key="a"), s3(Key="a/", Encoding="plain"))

    assert len(decoded(s3(Key="a"), s3(Key="a", Encoding="gzip"), s3(Key="b"))) == 3


def test_o1_a_job_has_ten_publishers_at_most() -> None:
    with pytest.raises(JobInvalidError, match="publishers"):
        decoded(*(s3(Key=f"{number}") for number in range(11)))


def test_o3_an_unknown_placeholder_is_told_when_the_job_is_read() -> None:
    with pytest.raises(PlaceholderUnknownError) as caught:
        decoded(s3(), s3(Key="renders/{jobid}"))

    assert caught.value.message == (
        "publishers[1].Params.Key, column 9: there is no placeholder {jobid}"
    )
    assert caught.value.hint.startswith("did you mean {jobID}? known: {executionID}, {jobID},")


# ------------------------------------------------------------------------------ the command line


def test_o1_a_command_line_spells_a_publisher() -> None:
    text = (
        "s3://results/a, b/{jobID},opt=endpoint=http://10.0.0.1:9000,OPT=Region=us-east-1"
        ",option=compress=true,opt=Required=TRUE"
    )

    [publisher] = parse_all([text], "--publisher")

    assert (
        publisher
        == decoded(
            s3(
                Key="a, b/{jobID}",
                Endpoint="http://10.0.0.1:9000",
                Region="us-east-1",
                Compress=True,
                Required=True,
            )
        )[0]
    )


@pytest.mark.parametrize("key", ["what?", "50%", "a#b", "a,b", "ä=ö", "{{x}}"])
def test_o1_a_key_is_taken_as_it_is(key: str) -> None:
    [publisher] = parse_all([f"s3://results/{key},opt=encoding=plain"], "--publisher")

    assert publisher.params.key == key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("results/a", "is no publisher"),
        ("s3://results", "Params.Key"),
        ("s3://results/a,opt=colour=red", r"publishers\[0\].Params.colour: unknown key"),
        ("s3://results/a,opt=regionn=x", r"publishers\[0\].Params.regionn: unknown key"),
        ("s3://results/a,opt=compress", "opt=compress is no option"),
        ("s3://results/a,opt=compress=maybe", "Params.Compress: expected `bool"),
        ("s3://results/a,opt=key=b", "opt=key=b is no option"),
        ("s3://results/a,opt=encoding=gzip,opt=compress=false", "Params.Encoding"),
    ],
)
def test_o1_a_command_line_that_spells_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(JobInvalidError, match=message) as caught:
        parse_all([text], "--publisher")

    assert "--publisher" in caught.value.message
