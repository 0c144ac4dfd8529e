"""What a source may say, in each of its shapes, and what is told about one that is wrong."""

import re
from typing import Any

import msgspec
import pytest

from agent_plugin.content.errors import JobInvalidError, SourceInvalidError
from agent_plugin.sources.partition import Partition
from agent_plugin.sources.spec import InputSource, decode_source, decode_sources

SHA256 = "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="
# As a published result has it.
PARAMS = {
    "Bucket": "show",
    "Key": "results/a.tar.gz",
    "Endpoint": "",
    "Region": "eu-west-1",
    "Filter": "",
    "VersionID": "oS7n.lY5BYHPMNOfbBS1n5VLl4ppVS4h",
    "ChecksumSHA256": SHA256,
    "Partition": None,
}


def decode(document: object) -> InputSource:
    return decode_source(document, source="job.json", prefix="inputSources[0]")


@pytest.mark.parametrize(
    ("document", "source"),
    [
        ({"Bucket": "show"}, InputSource("show")),
        (
            {"bucket": "show", "KEY": "d/", "filter": "x", "anchored": True},
            InputSource("show", "d/", filter="x", anchored=True),
        ),
        (
            {"Bucket": "show", "Key": "a b?#%41.exr", "versionId": "v", "checksumSha256": SHA256},
            InputSource("show", "a b?#%41.exr", version_id="v", checksum_sha256=SHA256),
        ),
        (
            {"Bucket": "show", "Mode": "VIRTUAL", "OnEmpty": "OK", "Required": False},
            InputSource("show", mode="virtual", on_empty="ok", required=False),
        ),
        (
            {"Bucket": "show", "NoSign": True, "Region": "us-east-1", "Alias": "plates"},
            InputSource("show", no_sign=True, region="us-east-1", alias="plates"),
        ),
        (
            {"Bucket": "show", "Profile": "vendor", "Endpoint": "https://s3.vendor.example:9000"},
            InputSource("show", profile="vendor", endpoint="https://s3.vendor.example:9000"),
        ),
        (
            {
                "Bucket": "show",
                "Partition": {"type": "Regex", "Pattern": r"\d", "count": 4, "index": 3},
            },
            InputSource("show", partition=Partition("regex", r"\d", count=4, index=3)),
        ),
        (
            {"Bucket": "show", "Partition": {"Type": ""}},
            InputSource("show", partition=Partition()),
        ),
        (
            {"Type": "s3", "Params": PARAMS},
            InputSource(
                "show",
                "results/a.tar.gz",
                region="eu-west-1",
                version_id="oS7n.lY5BYHPMNOfbBS1n5VLl4ppVS4h",
                checksum_sha256=SHA256,
            ),
        ),
        (
            {
                "Source": {"Type": "S3", "Params": {"Bucket": "show", "Key": "d/"}},
                "Target": "/plates/bg",
                "Alias": "background",
            },
            InputSource("show", "d/", target="/plates/bg", alias="background"),
        ),
    ],
)
def test_s1_a_source_is_read_in_each_of_its_shapes(
    document: dict[str, Any], source: InputSource
) -> None:
    assert decode(document) == source
    # It is kept as it reads itself.
    assert decode(msgspec.json.decode(msgspec.json.encode(source))) == source


WITHOUT = {"Bucket": "show"}


@pytest.mark.parametrize(
    ("document", "message", "hint"),
    [
        ({}, "inputSources[0].Bucket: missing", ""),
        ([], "inputSources[0]: expected an object", "an object of Bucket, "),
        ({"Bukcet": "show"}, "inputSources[0].Bukcet: unknown key", "did you mean Bucket? known: "),
        (
            WITHOUT | {"version-id": "v"},
            "inputSources[0].version-id: unknown key",
            "did you mean VersionID? ",
        ),
        (WITHOUT | {"bucket": "b"}, "inputSources[0].Bucket: it stands there twice", "say it once"),
        ({"Bucket": 7}, "inputSources[0].Bucket: expected `str`, got `int`", ""),
        ({"Bucket": ""}, "inputSources[0].Bucket: empty", "a bucket has 3 to 63 letters"),
        ({"Bucket": "a/b"}, "inputSources[0].Bucket: 'a/b' is not a bucket name", ""),
        (WITHOUT | {"Key": None}, "inputSources[0].Key: expected `str`, got `null`", ""),
        (
            WITHOUT | {"Key": "é" * 513},
            "inputSources[0].Key: it has 1026 bytes, more than 1024",
            "",
        ),
        (WITHOUT | {"Key": "a\0"}, "inputSources[0].Key: it has a NUL character", ""),
        (WITHOUT | {"Key": "a\udc80"}, "inputSources[0].Key: it is not UTF-8", ""),
        (
            WITHOUT | {"Filter": "("},
            "inputSources[0].Filter: no regular expression: missing )",
            "it has the syntax of Python's re",
        ),
        (WITHOUT | {"Anchored": True}, "inputSources[0].Anchored: there is no Filter", ""),
        (
            WITHOUT | {"Required": "yes"},
            "inputSources[0].Required: expected `bool`, got `str`",
            "allowed: true, false",
        ),
        (
            WITHOUT | {"Mode": "auto"},
            "inputSources[0].Mode: 'auto' is not allowed",
            "allowed: copied, virtual",
        ),
        (WITHOUT | {"OnEmpty": "skip"}, "inputSources[0].OnEmpty: 'skip' is not allowed", ""),
        (
            WITHOUT | {"ChecksumSHA256": "abc"},
            "inputSources[0].ChecksumSHA256: 'abc' is not a SHA-256 in base64",
            "",
        ),
        (
            WITHOUT | {"Endpoint": "s3.example.com"},
            "inputSources[0].Endpoint: 's3.example.com'",
            "",
        ),
        (WITHOUT | {"Endpoint": "http://a:b"}, "inputSources[0].Endpoint: it is no URL: ", ""),
        (
            WITHOUT | {"Endpoint": "https://key:secret@s3.example.com"},
            "inputSources[0].Endpoint: it holds a user or a password",
            "",
        ),
        (
            WITHOUT | {"NoSign": True, "Profile": "p"},
            "inputSources[0].Profile: there is NoSign as well",
            "",
        ),
        (WITHOUT | {"Profile": "p\n"}, "inputSources[0].Profile: it has control characters", ""),
        (
            WITHOUT | {"Partition": {"Type": "hash"}},
            "inputSources[0].Partition.Type: 'hash' is not allowed",
            "allowed: date, none, object, regex, substring",
        ),
        (
            WITHOUT | {"Partition": {"Kind": "date"}},
            "inputSources[0].Partition.Kind: unknown key",
            "known: Type, Pattern, StartIndex, EndIndex, DateFormat, Count, Index, IndexParameter",
        ),
        (
            WITHOUT | {"Partition": {"Type": "object", "Count": 0}},
            "inputSources[0].Partition.Count: expected `int` >= 1",
            "",
        ),
        (
            WITHOUT | {"Partition": {"Type": "object", "Count": 2, "Index": 2}},
            "inputSources[0].Partition.Index: 2 is not one of the 2 parts",
            "they are 0 to 1",
        ),
        (
            {"Type": "s3PreSigned", "Params": {"SourceSpec": PARAMS}},
            "inputSources[0].Type: 's3PreSigned' is no source of objects",
            "allowed: s3; of a result of Type s3PreSigned, give its SourceSpec",
        ),
        (
            {"Source": {"Type": "ipfs", "Params": {"CID": "Qm"}}},
            "inputSources[0].Source.Type: 'ipfs' is no source of objects",
            "",
        ),
        (
            {"Source": {"Type": "s3", "Params": {"Bucket": "show", "Key": 1}}},
            "inputSources[0].Source.Params.Key: expected `str`, got `int`",
            "",
        ),
        (
            {"Params": {"Bucket": "show", "Params": {}}},
            "inputSources[0].Params.Params: unknown key",
            "",
        ),
        (
            {"Params": {"Bucket": "show"}, "Bucket": "show"},
            "inputSources[0].Bucket: it is also said by Params.Bucket",
            "say it once",
        ),
    ],
)
def test_s1_what_is_wrong_is_told_by_its_path(document: object, message: str, hint: str) -> None:
    with pytest.raises(SourceInvalidError) as caught:
        decode(document)

    assert caught.value.message.startswith(f"job.json: {message}")
    assert hint in caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("target", "path"),
    [("/inputs", "inputs"), ("inputs/", "inputs"), ("/a/b/", "a/b"), ("/größe", "größe")],
)
def test_s1_a_target_is_a_directory_of_the_session(target: str, path: str) -> None:
    assert decode(WITHOUT | {"Target": target}).target_path == path
    assert decode(WITHOUT).target_path == "inputs"


@pytest.mark.parametrize(
    "target", ["", "/", "//", "..", "/../x", "a/../b", "a//b", ".", "/./a", "C:/x", "a\0", "\udc80"]
)
def test_s1_a_target_outside_the_session_is_refused(target: str) -> None:
    with pytest.raises(SourceInvalidError, match=r"inputSources\[0\].Target: .* is no directory"):
        decode(WITHOUT | {"Target": target})


def test_s1_sources_are_decoded_together_and_fail_as_the_job_does() -> None:
    one, other = decode_sources(
        [{"Bucket": "show"}, {"Bucket": "vendor", "Target": "plates"}], source="job.json"
    )
    assert (one.name, other.name) == ("s3://show/", "s3://vendor/")

    with pytest.raises(JobInvalidError, match=r"job.json: inputSources\[1\]: expected an object"):
        decode_sources([{"Bucket": "show"}, 1], source="job.json", failure=JobInvalidError)


@pytest.mark.parametrize("documents", [None, {}, "abc", 7])
def test_s1_what_is_no_list_of_sources_is_refused(documents: object) -> None:
    with pytest.raises(SourceInvalidError, match=r"job\.json: inputSources: expected a list"):
        decode_sources(documents, source="job.json")


def test_s1_there_are_not_more_sources_than_one_can_look_at() -> None:
    documents = [{"Bucket": "show", "Target": f"d{number}"} for number in range(101)]

    with pytest.raises(SourceInvalidError, match="101 sources, more than 100"):
        decode_sources(documents, source="job.json")


@pytest.mark.parametrize(
    ("one", "other"), [("/inputs", "inputs/"), ("/a", "/a/b"), ("/a/b/c", "/a")]
)
def test_s1_two_sources_can_not_share_a_directory(one: str, other: str) -> None:
    with pytest.raises(
        SourceInvalidError,
        match=re.escape(f"inputSources[1].Target: {other} is also in or above the Target"),
    ):
        decode_sources(
            [{"Bucket": "show", "Target": one}, {"Bucket": "show", "Target": other}], source="x"
        )
    decode_sources(
        [{"Bucket": "show", "Target": "/a"}, {"Bucket": "show", "Target": "/ab"}], source="x"
    )
