"""Copies that somebody asks for by commands: made, carried out, gone on with."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.transfers import open_session
from tests.servers.hooks import Host
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files

INPUTS: dict[str | bytes, bytes | int] = {"a.exr": 5_000, "sub/b.exr": b"b", "sub/c.tmp": b"c"}


class Copies:
    """A host with a directory to copy from, a bucket, and a directory to copy to."""

    def __init__(self, tmp_path: Path, s3: S3Server, prefix: str) -> None:
        self.host = Host(tmp_path / "host", f"file://{tmp_path}/store", environment=s3.environment)
        self.inputs = tmp_path / "in"
        self.outputs = tmp_path / "out"
        self.url = f"s3://{s3.bucket}/{prefix}/"
        write_files(self.inputs, INPUTS, mtime_ns=1_600_000_000 * 10**9)

    def run(self, *words: str, code: int = 0) -> Any:
        done = self.host.run(*words, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    def refused(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self.host.run(*words)


@pytest.fixture
def copies(tmp_path: Path, s3: S3Server, s3_prefix: str) -> Copies:
    return Copies(tmp_path, s3, s3_prefix)


def test_t4_a_tree_goes_to_a_bucket_and_back_again(copies: Copies) -> None:
    made = copies.run(
        *("transfer", "create", f"{copies.inputs}/", copies.url),
        *("--name", "frames", "--priority", "high", "--metadata", "shot=sh010"),
    )["transfer"]
    assert (made["status"], made["code"], made["priority"]) == ("waiting", "frames", 999)
    assert (made["size"], made["metadata"], made["kind"]) == (5_002, {"shot": "sh010"}, "copy")

    done = copies.run("transfer", "run")

    assert [(each["id"], each["status"]) for each in done["transfers"]] == [(made["id"], "done")]
    assert (done["files"], done["bytes"], done["failed"]) == (3, 5_002, 0)
    back = copies.run("transfer", "create", copies.url, f"{copies.outputs}/", "--exclude", "*tmp")
    copies.run("transfer", "run", str(back["transfer"]["id"]))
    found = {path: facts.sha256 for path, facts in files_below(copies.outputs).items()}
    wanted = {path: facts.sha256 for path, facts in files_below(copies.inputs).items()}
    del wanted["sub/c.tmp"]
    assert found == wanted


def test_t15_what_is_told_by_options_is_heeded(copies: Copies) -> None:
    copies.outputs.mkdir()
    (copies.outputs / "a.exr").write_bytes(b"was there")

    made = copies.run(
        *("transfer", "create", f"{copies.inputs}/", f"{copies.outputs}/"),
        *("--include", "*.exr", "--ignore-existing", "--speed-limit", "10MB"),
    )["transfer"]
    copies.run("transfer", "run")

    assert made["settings"]["speed_limit"] == 10_000_000
    assert (copies.outputs / "a.exr").read_bytes() == b"was there"
    assert sorted(files_below(copies.outputs)) == ["a.exr", "sub/b.exr"]


def test_t4_t8_t10_what_is_missing_is_excluded_and_what_was_forgotten_is_added(
    copies: Copies,
) -> None:
    document = {
        "tasks": [f"{copies.inputs}/a.exr", f"{copies.inputs}/gone.exr"],
        "destination": copies.url,
        "status": "paused",
    }
    made = copies.run("transfer", "create", "--spec", json.dumps(document))["transfer"]
    assert (made["status"], made["code"]) == ("paused", "a.exr")
    assert copies.run("transfer", "run")["transfers"] == []
    copies.run("transfer", "resume", "1")
    failed = copies.run("transfer", "run", code=1)
    assert (failed["transfers"][0]["status"], failed["failed"]) == ("failed", 1)

    copies.run("task", "exclude", "--where", "job.id=1 and status=failed")
    [added] = copies.run("task", "add", "1", f"{copies.inputs}/sub/b.exr")["tasks"]
    assert added["destination"]["path"] == f"{copies.url}b.exr"
    refused = copies.refused("task", "add", "1", f"{copies.inputs}/a.exr", "--reject-duplicates")
    assert "nothing was added" in refused.stderr
    done = copies.run("transfer", "run", "1")

    assert [each["status"] for each in done["transfers"]] == ["done"]
    shown = copies.run("transfer", "show", "1")
    assert shown["tasks"] == {"done": 2, "excluded": 1}


def test_t5_what_waits_for_a_destination_is_copied_when_it_has_one(copies: Copies) -> None:
    session = open_session(copies.host.settings, environment=copies.host.environment)
    made = session.create("job", {"source": f"{copies.inputs}/sub/"})
    assert (made["status"], made["code"]) == ("pending", "sub")

    copies.run("transfer", "set", "1", "--destination", f"{copies.outputs}/", "--status", "waiting")
    copies.run("transfer", "run")

    assert sorted(files_below(copies.outputs)) == ["b.exr", "c.tmp"]
    assert session.find_one("job WHERE status=done")["code"] == "sub"  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["create", "relative", "/out/"], 66, "'relative' is no place"),
        (["create", "s3://", "/out/"], 66, "has no bucket"),
        (["create", "/in", "/out", "--include", "re('(')"], 66, "no regular expression"),
        (["create", "--spec", "{"], 66, "no JSON object"),
        (["create"], 2, "give SOURCE and DESTINATION, or --spec"),
        (["create", "/in", "/out", "--speed-limit", "fast"], 2, "is no size"),
        (["run", "7"], 83, "there is no transfer 7"),
    ],
)
def test_t4_what_makes_no_sense_is_refused(
    copies: Copies, words: list[str], code: int, message: str
) -> None:
    done = copies.refused("transfer", *words)

    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert open_session(copies.host.settings).find("job") == []
