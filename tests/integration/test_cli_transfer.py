"""`propmaster transfer` and `propmaster task`: what they print, and what they change."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import click
import pytest
from rich.cells import cell_len

from agent_plugin.cli.main import propmaster
from agent_plugin.content.errors import QueryInvalidError, TransferStateError
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
from tests.servers.command import Command

LONG = "s3://studio-jobs/DeadlineCloud/with a long prefix that no terminal has room for"


class Here:
    """The commands, called in this process: a process of its own takes half a second."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir

    def __call__(self, *words: str) -> Any:
        """Return what a command prints, as JSON."""
        return json.loads(self.text(*words, "--json"))

    def text(self, *words: str) -> str:
        raw = io.BytesIO()
        with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding="utf-8")) as stdout:
            propmaster.main(args=list(words), prog_name="propmaster", standalone_mode=False)
            stdout.flush()
            return raw.getvalue().decode()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """The commands as processes, on the host of `here`."""
    return Command(tmp_path / "host")


@pytest.fixture
def here(command: Command, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setenv("PROPMASTER_STATE_DIR", str(command.state_dir))
    return Here(command.state_dir)


@pytest.fixture
def ledger(command: Command) -> Iterator[Ledger]:
    command.state_dir.mkdir(mode=0o700, parents=True)
    with Ledger.open(command.state_dir / "ledger.db") as opened:
        yield opened


@pytest.fixture
def filled(here: Here, ledger: Ledger) -> Here:
    """A host with a transfer into a session, one out of it, and one without a destination."""
    inputs = [TaskSpec(f"{at:032x}", f"tex/wood_{at}.tx", 1_000_000) for at in range(4)]
    spec = TransferSpec(kind="sync-in", source=LONG, destination="/sessions/é/名前/a\nb")
    ledger.create(spec, inputs)
    outputs = [TaskSpec("renders/1.exr", "ab" * 16, 5)]
    ledger.create(TransferSpec(kind="sync-out", source="/s", destination=LONG), outputs)
    ledger.create(TransferSpec(kind="copy", source="/a", destination=""), ())
    return here


def write(command: Here, sql: str, *values: object) -> None:
    with sqlite3.connect(command.state_dir / "ledger.db") as connection:
        connection.execute(sql, values)
    connection.close()


@pytest.fixture
def busy(filled: Here) -> Here:
    """The same, of which one is running and one has failed."""
    command, now = filled, time.time()
    write(command, "UPDATE transfer SET status = 'running', done = 2500000 WHERE id = 1")
    for at in range(21):
        write(command, "INSERT INTO sample VALUES (1, ?, 100000)", now - 20 + at)
    write(command, "UPDATE task SET status = 'done', done = size WHERE id < 3")
    write(
        command,
        "UPDATE task SET status = 'executing', error_code = 'E_NETWORK',"
        " error = 'the store answered 503', not_before = ? WHERE id = 3",
        now + 5,
    )
    write(
        command,
        "UPDATE transfer SET status = 'failed', finished = ?, error_code = 'E_NOT_FOUND',"
        " error = 'renders/1.exr vanished' WHERE id = 2",
        now - 5,
    )
    return command


def test_t9_t10_what_is_so_already_is_no_error_and_is_said(filled: Here) -> None:
    """Seen to fail when the tables are asked also where nothing has to change."""

    def steer(*words: str) -> list[str]:
        lines = filled.text(*words).splitlines()
        return [line.partition(", priority")[0] for line in lines]

    both = ["--where", "kind=sync-in OR kind=sync-out"]
    assert steer("transfer", "pause", "1") == ["transfer 1 is paused"]
    assert steer("transfer", "pause", *both) == [
        "transfer 1 was paused already", "transfer 2 is paused",
    ]  # fmt: skip
    assert steer("transfer", "resume", "1") == ["transfer 1 is waiting"]
    assert steer("transfer", "resume", "1") == ["transfer 1 was waiting already"]
    write(filled, "UPDATE transfer SET status = 'running' WHERE id = 1")
    assert steer("transfer", "resume", *both) == [
        "transfer 1 was running already", "transfer 2 is waiting",
    ]  # fmt: skip
    assert steer("transfer", "abort", "2", "2") == ["transfer 2 is aborted"]
    assert steer("transfer", "abort", *both) == [
        "transfer 1 is aborted", "transfer 2 was aborted already",
    ]  # fmt: skip
    assert steer("task", "exclude", "1") == ["task 1 of transfer 1 is excluded"]
    assert steer("task", "hold", "2") == ["task 2 of transfer 1 is onhold"]
    assert steer("task", "exclude", "1", "3") == [
        "task 1 of transfer 1 was excluded already", "task 3 of transfer 1 is excluded",
    ]  # fmt: skip
    assert steer("task", "hold", "2") == ["task 2 of transfer 1 was onhold already"]
    assert steer("task", "retry", "4") == ["task 4 of transfer 1 was queued already"]
    with pytest.raises(TransferStateError, match="is aborted, and can not become paused"):
        steer("transfer", "pause", "1")


STOPPED = """
import os, signal, sqlite3, sys
ledger = sqlite3.connect(sys.argv[1], isolation_level=None)
ledger.execute("BEGIN IMMEDIATE")
os.kill(os.getpid(), signal.SIGSTOP)
ledger.execute("ROLLBACK")
"""


def test_t9_a_command_that_waits_for_the_ledger_says_for_whom(
    command: Command, filled: Here
) -> None:
    """And goes on when it can. Seen to fail when nothing is said before the wait is over."""
    arguments = [sys.executable, "-c", STOPPED, str(filled.state_dir / "ledger.db")]
    with subprocess.Popen(arguments) as writer:
        try:
            os.waitpid(writer.pid, os.WUNTRACED)
            pausing = command.popen("transfer", "pause", "1")
            assert pausing.stderr is not None
            told = json.loads(pausing.stderr.readline())
            assert told["event"] == "ledger.busy"
            assert told["holder"].startswith(f"process {writer.pid} (")
            assert told["holder"].endswith(", stopped)")
        finally:
            writer.send_signal(signal.SIGCONT)
        output, _ = pausing.communicate(timeout=60)
    assert (pausing.returncode, output) == (0, b"transfer 1 is paused\n")


def on_terminal(command: Command, *words: str, columns: int, seconds: float = 0.0) -> str:
    """Return what a command writes to a terminal of 24 lines; Ctrl-C after some seconds."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "agent_plugin", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**command._environment, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""},
        start_new_session=True,
    )
    os.close(theirs)
    began, told, interrupted = time.monotonic(), b"", not seconds
    with process:
        while time.monotonic() < began + 60:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    told += os.read(ours, 65_536)
                except OSError:
                    break
            if not interrupted and b"UTC" in told and time.monotonic() > began + seconds:
                process.send_signal(signal.SIGINT)
                interrupted = True
        else:
            process.kill()
    os.close(ours)
    assert process.returncode == 0, told
    return told.decode()


# ------------------------------------------------------------------------------------------ find


def test_t3_find_without_a_ledger_finds_nothing_and_makes_nothing(
    here: Here, command: Command
) -> None:
    assert here("transfer", "find") == {"transfers": []}
    assert here("task", "find", "--transfer", "1") == {"tasks": []}
    assert here("transfer", "watch", "--where", "id=1") == {"transfers": []}
    assert "no transfer was found" in here.text("transfer", "find")
    done = command("transfer", "show", "1")
    assert (done.code, done.stdout) == (83, b"")
    assert "error[transfer-state]: there is no transfer 1\nhint: `propmaster" in done.stderr
    assert not here.state_dir.exists()


def test_t3_find_takes_a_condition_in_several_words_or_a_whole_query(busy: Here) -> None:
    def ids(*words: str) -> list[int]:
        return [each["id"] for each in busy("transfer", "find", *words)["transfers"]]

    assert ids() == [1, 2, 3]
    assert ids("status=failed") == [2]
    assert ids("status", "=", "failed", "or", "size>1MB") == [1, 2]
    assert ids("Job where status=failed") == [2]
    assert ids("--limit", "1", "--skip", "1") == [2]
    assert ids("kind=copy", "--all") == [3]
    assert ids("--finished") == ids("--archived") == []
    found = busy("task", "find", "--transfer", "1", "status=executing")["tasks"]
    assert [each["error_code"] for each in found] == ["E_NETWORK"]
    [chosen] = busy("transfer", "find", "id=1", "--attributes", "id,progress,created")["transfers"]
    assert list(chosen) == ["id", "progress", "created"]
    assert chosen["created"].endswith("Z")


def test_t3_the_attributes_and_entities_are_listed(here: Here) -> None:
    """Seen to fail when they are printed as transfers are."""
    query = "attributes WHERE entitytype=task AND update=true"
    listed = here("transfer", "find", query)["attributes"]

    assert [each["name"] for each in listed] == ["status", "priority", "metadata"]
    assert here("task", "find", query, "--limit", "1", "--skip", "1")["attributes"] == listed[1:2]
    text = here.text("task", "find", query).splitlines()
    assert text[0].split() == ["ENTITYTYPE", "NAME", "TYPE", "CREATE", "UPDATE", "ABOUT"]
    assert text[1].split()[:5] == ["task", "status", "status", "false", "true"]
    assert "artifact" in here.text("transfer", "find", "entitytypes")


@pytest.mark.parametrize(
    ("words", "column"),
    [
        (("transfer", "pause", "--where", "task where status=queued"), 1),
        (("transfer", "find", " artifact"), 2),
        (("transfer", "watch", "--where", "attributes"), 1),
        (("task", "hold", "--where", "Job where status=waiting"), 1),
        (("task", "find", "transfer where status=waiting"), 1),
    ],
)
def test_t3_a_query_about_other_things_is_refused_and_changes_nothing(
    filled: Here, ledger: Ledger, words: tuple[str, ...], column: int
) -> None:
    """Seen to fail when any whole query will do: transfers were paused that have tasks' numbers."""
    before = [ledger.transfer(1), *ledger.tasks(1)]

    with pytest.raises(QueryInvalidError, match=f"column {column}: .*s are meant here"):
        filled(*words)

    assert [ledger.transfer(1), *ledger.tasks(1)] == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("staus=done", 'query, column 1: transfer has no attribute "staus"; did you mean status?'),
        ("status=done adn size>5", 'query, column 13: expected AND, OR or the end; found "adn"'),
        ("status=done\nadn x=5", "query, line 2, column 1: expected AND, OR or the end; found"),
        ("job where size=big", "query, column 16: size: expected a size"),
    ],
)
def test_t3_a_wrong_query_is_told_with_the_column_that_was_typed(
    here: Here, words: str, message: str
) -> None:
    with pytest.raises(QueryInvalidError) as caught:
        here("transfer", "find", words)

    assert caught.value.message.startswith(message)


def test_t3_tables_fit_a_terminal_and_are_whole_without_one(busy: Here, command: Command) -> None:
    for columns in (80, 120):
        told = on_terminal(command, "transfer", "find", columns=columns)
        lines = told.replace("\r\n", "\n").splitlines()
        assert max(map(cell_len, lines)) <= columns
        assert "\x1b" not in told
        assert len(lines) == 5
    whole = busy.text("transfer", "find")
    assert LONG in whole
    assert r"a\nb" in whole
    assert "      E_NOT_FOUND: renders/1.exr vanished" in whole


def test_t3_show_tells_all_of_a_transfer(busy: Here) -> None:
    shown = busy("transfer", "show", "1")

    assert (shown["transfer"]["id"], shown["failed"]) == (1, [])
    assert shown["tasks"] == {"done": 2, "executing": 1, "queued": 1}
    assert shown["transfer"]["progress"] == 62
    assert 0.05 < shown["transfer"]["speed"] < 0.2
    text = busy.text("transfer", "show", "2")
    assert "error_code   E_NOT_FOUND" in text
    assert "source_hr" not in text
    assert "required     false" in text


def test_t14_show_tells_who_changed_what(filled: Here) -> None:
    """The last ten, or all; also of what is in the archive."""
    filled("task", "hold", "--where", "job.id=1")
    for priority in range(11):
        filled("transfer", "set", "1", "--priority", str(priority))
    filled("transfer", "abort", "1")

    shown = filled("transfer", "show", "1")["events"]
    everything = filled("transfer", "show", "1", "--events")["events"]

    assert [each["what"] for each in shown][-2:] == ["priority=10", "status=aborted"]
    assert (len(shown), shown) == (10, everything[-10:])
    assert [(each["task"], each["what"]) for each in everything[:3]] == [
        *((None, "created=waiting"), (1, "status=onhold"), (2, "status=onhold")),
    ]
    text = filled.text("transfer", "show", "1")
    assert f"{len(everything) - 10} earlier changes: --events" in text
    assert re.search(r"(?m)^at \S+ \S+Z by \d+:\w+: status=aborted$", text)
    filled("transfer", "delete", "1")
    assert filled("transfer", "show", "1", "--events")["events"] == everything


# --------------------------------------------------------------------------------------- steering


def test_t5_a_transfer_is_paused_resumed_aborted_retried_and_put_away(filled: Here) -> None:
    def status(*words: str) -> str:
        [found] = filled("transfer", *words)["transfers"]
        return str(found["status"])

    assert status("pause", "1") == "paused"
    assert status("resume", "1") == "waiting"
    assert status("abort", "1") == "aborted"
    assert status("retry", "1") == "waiting"
    assert status("set", "1", "--status", "done", "--priority", "high") == "done"
    assert status("delete", "1") == "done"
    assert filled("transfer", "find", "id=1")["transfers"] == []
    assert len(filled("task", "find", "--transfer", "1")["tasks"]) == 4


def test_t5_all_that_a_query_finds_are_steered_and_refusals_are_told(
    filled: Here, command: Command
) -> None:
    paused = filled("transfer", "pause", "--where", "kind in (sync-in, sync-out)")["transfers"]
    assert [each["status"] for each in paused] == ["paused", "paused"]

    done = command("transfer", "resume", "1", "77", "2")

    assert done.code == 83
    assert "transfer 1 is waiting\ntransfer 2 is waiting\n" in done.stderr
    assert "error[transfer-state]: there is no transfer 77" in done.stderr
    with pytest.raises(click.UsageError, match="name a transfer by its id"):
        filled("transfer", "pause")


def test_t5_several_are_set_at_once_and_nothing_is_no_change(filled: Here) -> None:
    found = filled("transfer", "set", "--where", "kind<>copy", "3", "--priority", "high")
    assert [(each["id"], each["priority"]) for each in found["transfers"]] == [
        *((3, 999), (1, 999), (2, 999)),
    ]
    assert filled("transfer", "pause", "--where", "id>100") == {"transfers": []}
    assert filled.text("transfer", "pause", "--where", "id>100").startswith("no transfer was found")
    for noun in ("transfer", "task"):
        with pytest.raises(click.UsageError, match="say what is to be set"):
            filled(noun, "set", "1")
        with pytest.raises(click.UsageError, match=f"name a {noun} by its id"):
            filled(noun, "set", "--priority", "1")


def test_t7_what_is_in_the_archive_is_told_and_not_changed(filled: Here) -> None:
    filled("transfer", "abort", "1")
    assert "transfer 1 is in the archive" in filled.text("transfer", "delete", "1")

    for words in (("transfer", "resume", "1"), ("transfer", "delete", "1"), ("task", "hold", "1")):
        with pytest.raises(TransferStateError, match="transfer 1 is in the archive"):
            filled(*words)


def test_t5_metadata_is_set_key_by_key(filled: Here) -> None:
    def metadata(*words: str) -> Any:
        return filled("transfer", "set", "1", *words)["transfers"][0]["metadata"]

    assert metadata("--metadata", "shot=sh010", "--metadata", "take=3=a") == {
        "shot": "sh010",
        "take": "3=a",
    }
    assert metadata("--metadata", "shot=") == {"take": "3=a"}
    with pytest.raises(click.BadParameter):
        metadata("--metadata", "x")
    found = filled("transfer", "find", "metadata.take contains '='")["transfers"]
    assert [each["id"] for each in found] == [1]


def test_t10_tasks_are_excluded_held_and_retried(filled: Here) -> None:
    def statuses(*words: str) -> list[str]:
        return [task["status"] for task in filled("task", *words)["tasks"]]

    assert statuses("exclude", "1", "2") == ["excluded", "excluded"]
    assert statuses("hold", "--where", "job.id=1 and status=queued") == ["onhold", "onhold"]
    assert filled("transfer", "find", "id=1")["transfers"][0]["status"] == "paused"
    assert statuses("retry", "--where", "job.id=1 and status<>executing") == ["queued"] * 4
    assert statuses("set", "1", "--priority", "high", "--status", "onhold") == ["onhold"]
    with pytest.raises(TransferStateError, match="no task 999"):
        statuses("exclude", "999")


def test_t10_many_tasks_are_changed_as_few_are(
    filled: Here, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ledger opened as often: one by one, a hundred thousand took minutes."""
    opened: list[object] = []
    connect = sqlite3.connect

    def counting(*words: Any, **more: Any) -> sqlite3.Connection:
        opened.append(words)
        opening: sqlite3.Connection = connect(*words, **more)
        return opening

    monkeypatch.setattr(sqlite3, "connect", counting)
    filled("task", "hold", "--where", "job.id=1")
    few = len(opened)
    tasks = [TaskSpec(f"/{at}", f"/to/{at}", 1) for at in range(400)]
    many = ledger.create(TransferSpec(kind="copy", source="/", destination="/to/"), tasks).id
    opened.clear()

    held = filled("task", "hold", "--where", f"job.id={many}")["tasks"]

    assert len(opened) == few
    assert [task["status"] for task in held] == ["onhold"] * 400
    said = filled.text("task", "retry", "--where", f"job.id={many}").splitlines()
    assert (len(said), said[-1]) == (21, "and 380 more")


# ------------------------------------------------------------------------------------------ watch


def test_t12_watch_writes_a_line_when_something_changes(busy: Here, command: Command) -> None:
    process = command.popen("transfer", "watch", "1", "--interval", "0.1")
    assert process.stdout is not None
    first = process.stdout.readline().decode()
    write(busy, "UPDATE transfer SET done = 3000000 WHERE id = 1")
    second = process.stdout.readline().decode()
    write(busy, "UPDATE transfer SET status = 'done', done = size, finished = 5 WHERE id = 1")
    third = process.stdout.readline().decode()
    _, stderr = process.communicate(timeout=30)

    assert process.returncode == 0, stderr
    assert first.startswith("transfer 1 running: 62 %, 2.5 MB of 4.0 MB, 2 of 4 files, 0.")
    assert "E_NETWORK: the store answered 503; sync-in" in first
    assert second.startswith("transfer 1 running: 75 %, 3.0 MB of 4.0 MB")
    assert third.startswith("transfer 1 done: 100 %, 4.0 MB of 4.0 MB")


def test_t12_watch_ends_when_what_was_named_has_ended_and_says_how(
    busy: Here, command: Command
) -> None:
    done = command("transfer", "watch", "2", "--json")

    assert done.code == 1
    [line] = done.text.splitlines()
    [found] = json.loads(line)["transfers"]
    assert (found["status"], found["trouble"]) == ("failed", "E_NOT_FOUND: renders/1.exr vanished")
    assert found["files"] == {"queued": 1}
    with pytest.raises(TransferStateError, match="there is no transfer 9"):
        busy("transfer", "watch", "9")


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_t12_watch_draws_a_picture_that_fits_and_leaves_on_ctrl_c(
    command: Command, columns: int
) -> None:
    words = ("transfer", "watch", "--interval", "0.2")
    told = on_terminal(command, *words, columns=columns, seconds=0.5)

    assert told.index("\x1b[?25l") < told.rindex("\x1b[?25h")
    picture = _last_picture(told)
    assert max(map(cell_len, picture)) <= columns
    assert [line.split()[:2] for line in picture if "━" in line] == [
        *(["1", "running"], ["3", "pending"], ["2", "failed"]),
    ]
    assert "62 %" in picture[0]
    assert re.search(r"━  +62 %.* 0:00:\d\d$", picture[0]), "whole, whatever the room"
    assert ("2.5 / 4.0 MB" in picture[0]) == (columns >= 70)
    assert ("0.1 MB/s" in picture[0]) == (columns >= 50)
    assert picture[1].startswith("      2 of 4 files  s")
    assert picture[1].endswith(r"a\nb")
    assert picture[2] == "      E_NETWORK: the store answered 503"
    assert picture[-1].startswith("3 transfers: 1 run")


def _last_picture(told: str) -> list[str]:
    drawn = told[: told.rindex("UTC") + 3].rpartition("\x1b[1A")[2]
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", drawn)
    lines = [line.rstrip() for line in plain.replace("\r", "").split("\n")]
    return [line for line in lines if line]
