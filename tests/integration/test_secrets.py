"""No credential is told or kept, whatever goes wrong and whatever the server repeats of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.servers.command import Command, Done
from tests.servers.hooks import FARM, JOB, QUEUE, job_with_outputs
from tests.servers.scripted_answers import ScriptedAnswers
from tests.servers.trees import write_files

STORE = "s3://bucket/show"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAMARKEDMARKED1111",
    "AWS_SECRET_ACCESS_KEY": "marked/secret+key/of/40/characters/xxxxx",
    "AWS_SESSION_TOKEN": "marked-token-that-is-long-in-reality",
}
# What S3 adds to a refused signature: what it was given, the token's header included.
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html#RESTErrorResponses
ECHO = (
    f"<AWSAccessKeyId>{SECRETS['AWS_ACCESS_KEY_ID']}</AWSAccessKeyId>"
    f"<StringToSign>{SECRETS['AWS_SECRET_ACCESS_KEY']}</StringToSign>"
    f"<CanonicalRequest>x-amz-security-token:{SECRETS['AWS_SESSION_TOKEN']}</CanonicalRequest>"
)
# As loud as the libraries can be made, without a line of code.
LOUD = {"RUST_LOG": "trace", "RUST_BACKTRACE": "full", "PYTHONDEVMODE": "1", "PYTHONWARNINGS": ""}


@pytest.fixture
def server() -> Iterator[ScriptedAnswers]:
    with ScriptedAnswers() as answers:
        yield answers


def _commands(home: Path) -> list[list[str]]:
    """Return commands that ask the store, of each kind of request."""
    tree = home / "tree"
    write_files(tree, {"scene.usd": b"a scene", "big.abc": 9_000_000}, mtime_ns=0)
    job = job_with_outputs(STORE, "/projects/show")
    document = json.loads(msgspec.json.encode(job))
    document["attachments"]["manifests"][0]["inputManifestPath"] = "a/manifest"
    (home / "job.json").write_text(json.dumps(document))
    ids = ["--store", STORE, "--farm-id", FARM, "--queue-id", QUEUE]
    session = ["--session-dir", str(home / "session")]
    return [
        ["submit", str(tree), *ids],
        ["outputs", "list", JOB, *ids, "--json"],
        ["outputs", "get", JOB, *ids, "--to", str(home / "to")],
        ["session", "start", *session, "--job", str(home / "job.json")],
        ["doctor", *session, "--store", STORE, "--write-probe"],
        ["doctor", *session, "--store", STORE, "--write-probe", "--json"],
    ]


def _told(done: Done) -> bytes:
    return done.stdout + done.stderr.encode()


@pytest.mark.parametrize("source", ["variables", "profile"])
@pytest.mark.parametrize(
    "failure", ["SignatureDoesNotMatch", "InvalidAccessKeyId", "no XML", "unreachable"]
)
def test_no_credential_is_in_what_is_told_or_kept(
    server: ScriptedAnswers, tmp_path: Path, failure: str, source: str
) -> None:
    endpoint = server.url if failure != "unreachable" else "http://127.0.0.1:9"
    if failure == "no XML":
        server.status, server.body = 403, ECHO.encode()
    else:
        server.error(403, failure, more=ECHO)
    home = tmp_path / "host"
    variables = {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCOUNT_ID": "000000000000", **LOUD}
    if source == "variables":
        variables |= SECRETS
    else:
        profile = tmp_path / "credentials"
        lines = [f"{name.lower()} = {value}\n" for name, value in SECRETS.items()]
        profile.write_text("[default]\n" + "".join(lines))
        variables["AWS_SHARED_CREDENTIALS_FILE"] = str(profile)
    settings = tmp_path / "settings.toml"
    settings.write_text("[store]\nattempts = 2\ndeadline_seconds = 2.0\nread_timeout = 1.0\n")
    command = Command(home, variables | {"PROPMASTER_CONFIG": str(settings)})

    results = [command(*words) for words in _commands(home)]

    assert all(done.code in (1, 68, 70) for done in results), [done.stderr for done in results]
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert {"ledger.db", "index.db"} <= {path.name for path in kept}
    for name, secret in SECRETS.items():
        assert secret.encode() not in b"".join(map(_told, results)), name
        assert [path for path in kept if secret.encode() in path.read_bytes()] == [], name
