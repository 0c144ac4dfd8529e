"""`propmaster source resolve`: what a source would bring, before a job asks for it."""

import json
from pathlib import Path

import pytest

from tests.servers.command import Command
from tests.servers.s3_server import S3Server


@pytest.fixture
def propmaster(tmp_path: Path, s3: S3Server) -> Command:
    return Command(tmp_path / "host", s3.environment)


@pytest.fixture
def stored(s3: S3Server, s3_prefix: str) -> str:
    """The URL of three objects, with its slash."""
    client = s3.client()
    for name, data in (("b.exr", b"bb"), ("a.exr", b"a"), ("sub/line\nbreak", b"ccc")):
        client.put_object(Bucket=s3.bucket, Key=f"{s3_prefix}/{name}", Body=data)
    return f"s3://{s3.bucket}/{s3_prefix}/"


def test_s1_resolve_prints_the_snapshot(propmaster: Command, s3: S3Server, stored: str) -> None:
    done = propmaster("source", "resolve", f"{stored}:/plates", "--json")

    assert done.code == 0, done.stderr
    result = done.json
    assert (result["files"], result["bytes"], result["target"]) == (3, 6, "plates")
    assert (result["bucket"], result["endpoint"]) == (s3.bucket, s3.endpoint_url)
    assert [entry["path"] for entry in result["entries"]] == ["a.exr", "b.exr", "sub/line\nbreak"]
    [event] = done.events
    assert event["event"] == "source.resolved"
    assert (event["objects"], event["listed"], event["ignored"]) == (3, 3, [])

    lines = propmaster("source", "resolve", f"{stored}*", "--limit", "2").text.splitlines()
    assert lines[0] == f"3 files, 6 bytes (6 bytes), for inputs; sha256 {result['digest']}"
    assert [line.split()[0::2] for line in lines[2:4]] == [["1", "a.exr"], ["2", "b.exr"]]
    assert lines[4:] == ["1 more files; leave out --limit to see them"]
    # A name can not begin a line of its own.
    assert r" sub/line\nbreak" in propmaster("source", "resolve", f"{stored}sub*").text


def test_s8_resolve_shows_one_part(propmaster: Command, s3: S3Server, stored: str) -> None:
    source = {
        "Bucket": s3.bucket,
        "Key": stored.partition(f"{s3.bucket}/")[2],
        "Partition": {"Type": "object", "Count": 2, "IndexParameter": "Part"},
        "OnEmpty": "ok",
    }
    spec = json.dumps(source)

    parts = [
        propmaster("source", "resolve", spec, "--json", "--partition-index", str(index)).json
        for index in range(2)
    ]

    assert sum(part["files"] for part in parts) == 3
    whole = propmaster("source", "resolve", spec)
    assert whole.code == 0
    assert whole.text.splitlines()[1].startswith(
        "each task has one of 2 parts, by its parameter Pa"
    )
    assert propmaster("source", "resolve", spec, "--json").json["files"] == 3


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ("{", 97, "error[source-invalid]: the source: not a JSON object: "),
        ("{stored}none/", 98, "error[source-empty]: "),
        ("{stored}none", 91, "error[object-not-found]: "),
    ],
)
def test_s1_a_source_that_brings_nothing_is_told_with_what_to_do(
    propmaster: Command, stored: str, spec: str, code: int, message: str
) -> None:
    done = propmaster("source", "resolve", spec.replace("{stored}", stored))

    assert (done.code, done.stdout) == (code, b""), done.stderr
    assert message in done.stderr
    assert "hint: " in done.stderr


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{stored}", "what several objects begin with is named with / or * at its end"),
        ("{stored}t:1.exr", "a key with a colon, as src="),
        ("show/plates/", "it does not begin with s3://"),
        ("s3://no-such-bucket/a/", "hint: Check the bucket's name."),
        ("{stored}/,opt=nosign=true", "The bucket is not open to everybody"),
    ],
)
def test_s1_what_is_easily_written_wrong_is_told_how_it_is_right(
    propmaster: Command, stored: str, spec: str, said: str
) -> None:
    """Each was met by hand, with a hint that did not help."""
    done = propmaster("source", "resolve", spec.replace("{stored}", stored.rstrip("/")))

    assert done.code > 64
    assert said in done.stderr
