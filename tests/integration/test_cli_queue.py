"""What an operator sets for a queue holds for its sessions, above what the jobs say."""

import json
from pathlib import Path

import msgspec
import pytest

from tests.servers.hooks import QUEUE, Host
from tests.servers.sessions import Sessions


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path, Host(tmp_path / "host", f"file://{tmp_path}/store"))


def shown(host: Host) -> list[dict[str, str | None]]:
    queues: list[dict[str, str | None]] = json.loads(host.run("queue", "show", "--json").stdout)[
        "queues"
    ]
    return queues


def test_what_is_set_for_a_queue_is_shown_until_it_is_set_again(sessions: Sessions) -> None:
    host = sessions.host
    assert shown(host) == []
    for chosen in ("VIRTUAL", "AUTO", "JOB"):
        assert host.run("queue", "set", QUEUE, "--file-system", chosen).returncode == 0
        expected = None if chosen == "JOB" else chosen
        assert shown(host) == [{"queueId": QUEUE, "fileSystem": expected}]
    [file] = (host.state_dir / "queues").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert host.run("queue", "set", "../queue", "--file-system", "AUTO").returncode == 66
    file.write_bytes(b"{")
    assert host.run("queue", "show").returncode == 76


def test_a_session_does_what_is_set_for_its_queue_unless_the_command_says_otherwise(
    tmp_path: Path, sessions: Sessions
) -> None:
    host = sessions.host
    job = tmp_path / "job.json"
    job.write_bytes(msgspec.json.encode(sessions.submitted({"a": b"a"}, "renders")))
    start = ["session", "start", "--session-dir", str(sessions.session_dir), "--job", str(job)]

    def reason(*more: str) -> str:
        done = host.run(*start, "--json", *more)
        assert done.returncode == 0, done.stderr
        told: str = json.loads(done.stdout)["roots"][0]["reason"]
        assert host.run("session", "end", *start[2:4]).returncode == 0
        return told

    assert reason() == ""
    assert host.run("queue", "set", QUEUE, "--file-system", "AUTO").returncode == 0
    assert reason() == "1 files of 1 bytes are few"
    assert reason("--file-system", "COPIED") == ""
