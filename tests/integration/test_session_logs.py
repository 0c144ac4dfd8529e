"""What sessions and mounts tell is kept in a file for each session, for as long as wished."""

import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.log_file import LogPlace, writing_to
from agent_plugin.content.store import Cancellation
from agent_plugin.session.state import session_id
from agent_plugin.session_logs import LogsCollected, collect_logs, log_place
from agent_plugin.settings import Settings
from agent_plugin.workers.call import ATTACHMENT_DOWNLOAD, VFS_UNMOUNT, Call, carry_out
from tests.servers.hooks import Host, action
from tests.servers.sessions import Sessions

DAY = 86400.0


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path, Host(tmp_path / "host", f"file://{tmp_path}/store"))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def started(sessions: Sessions, tmp_path: Path, file_system: str) -> list[str]:
    job = sessions.submitted({"a": b"a"}, "renders")
    (tmp_path / "job.json").write_bytes(msgspec.json.encode(job))
    return ["start", "--job", str(tmp_path / "job.json"), "--file-system", file_system]


def run(sessions: Sessions, command: str, *more: str) -> list[dict[str, Any]]:
    """Run a session command; return the events that it had on its standard error."""
    directory = str(sessions.session_dir)
    done = sessions.host.run("session", command, "--session-dir", directory, *more)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def test_a_session_has_a_file_with_all_that_its_commands_and_mounts_told(
    sessions: Sessions, tmp_path: Path
) -> None:
    task = action()
    told = [
        *run(sessions, *started(sessions, tmp_path, "VIRTUAL")),
        *run(
            sessions,
            *("finish-task", "--step-id", task.step_id),
            *("--session-action-id", task.session_action_id),
        ),
        *run(sessions, "end"),
    ]

    [file] = (sessions.host.state_dir / "logs").iterdir()
    assert file.name == f"{session_id(sessions.session_dir)}.jsonl"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    # What the mount wrote beside it is gone with the mount.
    assert list((sessions.host.state_dir / "mounts").iterdir()) == []
    kept = lines_of(file)
    assert [line for line in kept if line in told] == told
    assert {line["event"] for line in kept if line not in told} >= {
        events.MOUNT_STARTED,
        events.MOUNT_ENDED,
    }


def test_what_the_workers_scripts_tell_is_in_the_sessions_file(
    sessions: Sessions, tmp_path: Path, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_BYPASSED)

    def call(kind: str, directory: Path) -> Call:
        return Call(kind, [], directory, {}, None, lambda _line: None, Cancellation())

    def drop_in(_call: Call, _settings: Settings) -> int:
        events.get_logger().warning(events.CACHE_BYPASSED, extra={"reason": "a test"})
        return 7

    settings = sessions.host.settings
    assert carry_out(call(ATTACHMENT_DOWNLOAD, tmp_path), settings, drop_in) == 7
    # Of a directory that nobody has looked at there is no file.
    assert carry_out(call(VFS_UNMOUNT, tmp_path / "x"), settings, drop_in) == 7

    [file] = (sessions.host.state_dir / "logs").iterdir()
    assert file.name == f"{session_id(tmp_path)}.jsonl"
    assert sessions.host.state_dir.stat().st_mode & 0o777 == 0o700
    [line] = lines_of(file)
    assert (line["event"], line["reason"]) == (events.CACHE_BYPASSED, "a test")


def test_without_days_nothing_is_kept(sessions: Sessions) -> None:
    with sessions.host.config.open("a") as file:
        file.write("[logs]\nkeep_days = 0\n")

    assert log_place(sessions.host.settings, "s") is None


def test_where_a_log_can_not_be_written_the_session_goes_on_with_one_warning(
    sessions: Sessions, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with sessions.host.config.open("a") as file:
        file.write(f'[logs]\ndirectory = "{tmp_path}/file/logs"\n')

    for command in (started(sessions, tmp_path, "COPIED"), ["end"]):
        told = run(sessions, *command)
        [warning] = [line for line in told if line["event"] == events.LOG_UNAVAILABLE]
        assert warning["path"].startswith(f"{tmp_path}/file/logs/")
        assert warning["reason"] == "Not a directory"


@pytest.mark.parametrize("fault", ["open directory", "link", "pipe"])
def test_what_others_could_have_put_there_is_not_written_to(
    tmp_path: Path, fault: str, expected_events: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected_events.update((events.LOG_UNAVAILABLE, events.CACHE_BYPASSED))
    logs = tmp_path / "logs"
    logs.mkdir(mode=0o700)
    file = logs / "session.jsonl"
    (tmp_path / "victim").write_bytes(b"")
    if fault == "open directory":
        logs.chmod(0o770)
    elif fault == "link":
        file.symlink_to(tmp_path / "victim")
    else:
        os.mkfifo(file)

    with writing_to(LogPlace(str(file), 1 << 20)):
        for _ in range(3):
            events.get_logger().warning(events.CACHE_BYPASSED, extra={"reason": "a test"})

    assert (tmp_path / "victim").read_bytes() == b""
    told = [record.getMessage() for record in caplog.records]
    assert told.count(events.LOG_UNAVAILABLE) == 1


def test_a_log_ends_at_the_most_bytes_that_all_may_have(
    tmp_path: Path, expected_events: set[str]
) -> None:
    expected_events.update((events.LOG_UNAVAILABLE, events.CACHE_BYPASSED))
    file = tmp_path / "logs/session.jsonl"
    with writing_to(LogPlace(str(file), 1000)):
        for _ in range(50):
            events.get_logger().warning(events.CACHE_BYPASSED, extra={"reason": "a test"})

    assert 800 < file.stat().st_size <= 1000
    assert all(line["event"] == events.CACHE_BYPASSED for line in lines_of(file))


class Kept:
    """A host's logs, made by hand."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.now = time.time()
        self.directory = host.state_dir / "logs"
        self.directory.mkdir(mode=0o700, parents=True)

    def make(self, name: str, size: int, *, days: float) -> None:
        path = self.directory / name
        path.write_bytes(b"x" * size)
        os.utime(path, (self.now - days * DAY, self.now - days * DAY))

    def settings(self, text: str) -> Settings:
        self.host.config.write_text(
            f'[paths]\nstate_dir = "{self.host.state_dir}"\n'
            f'cache_dir = "{self.host.cache_dir}"\n[logs]\n{text}\n'
        )
        return self.host.settings

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(Host(tmp_path / "host", f"file://{tmp_path}/store"))


def test_logs_are_removed_when_they_are_old(kept: Kept) -> None:
    kept.make("old.jsonl", 10, days=8)
    kept.make("new.jsonl", 10, days=6)
    kept.make("old.txt", 10, days=8)

    assert collect_logs(kept.settings("keep_days = 7"), now=kept.now) == LogsCollected(1, 1, 10)
    assert kept.names() == ["new.jsonl", "old.txt"]


def test_the_oldest_logs_are_removed_when_all_have_too_much(kept: Kept) -> None:
    for days in range(1, 6):
        kept.make(f"{days}.jsonl", 300, days=days)

    settings = kept.settings("max_bytes = 1000")

    assert collect_logs(settings, now=kept.now) == LogsCollected(2, 3, 900)
    assert kept.names() == ["1.jsonl", "2.jsonl", "3.jsonl"]


def test_logs_of_what_has_not_ended_stay(kept: Kept) -> None:
    for name in ("session", "mount-0123", "other"):
        kept.make(f"{name}.jsonl", 300, days=100)
    (kept.host.state_dir / "sessions").mkdir()
    (kept.host.state_dir / "sessions/session.json").write_bytes(b"{}")
    (kept.host.state_dir / "mounts/0123").mkdir(parents=True)

    collect_logs(kept.settings("max_bytes = 1"), now=kept.now)

    assert kept.names() == ["mount-0123.jsonl", "session.jsonl"]


@pytest.mark.parametrize("command", [["cache", "collect"], ["session", "end"]])
def test_commands_remove_old_logs(kept: Kept, tmp_path: Path, command: list[str]) -> None:
    kept.make("old.jsonl", 10, days=15)
    more = ["--session-dir", str(tmp_path / "none")] if command[0] == "session" else []

    done = kept.host.run(*command, *more)

    assert done.returncode == 0, done.stderr
    # A session that was never there leaves no log either.
    assert kept.names() == []
    [told] = [json.loads(line) for line in done.stderr.splitlines() if events.LOG_COLLECTED in line]
    assert (told["removed"], told["files"], told["bytes"]) == (1, 0, 0)


def test_a_directory_that_others_could_write_is_not_collected(
    kept: Kept, expected_events: set[str]
) -> None:
    expected_events.add(events.LOG_UNAVAILABLE)
    kept.make("old.jsonl", 10, days=15)
    kept.directory.chmod(0o777)

    collect_logs(kept.settings(""), now=kept.now)

    assert kept.names() == ["old.jsonl"]


def test_a_directory_of_ones_own_can_be_named(kept: Kept, tmp_path: Path) -> None:
    settings = kept.settings(f'directory = "{tmp_path}/elsewhere"')

    assert log_place(settings, "s") == LogPlace(f"{tmp_path}/elsewhere/s.jsonl", 256 * 1024**2)
