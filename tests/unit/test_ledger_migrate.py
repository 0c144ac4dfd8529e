"""A ledger of version 1, as it was made then, becomes one of ours with all that is in it."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.errors import CancelledError
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from tests.unit.ledger_reads import rows
from tests.unit.test_ledger import DIES_AT_STATEMENT

VERSION_1 = Path(__file__).with_name("ledger_version_1.sql").read_text(encoding="utf-8")
SPEC = TransferSpec("sync-in", "s3://b/p", "/tmp/root", session="s1", job="job-1")


def make_version_1(path: Path) -> None:
    """Make a ledger as version 1 made it: a done transfer, and one that was killed."""
    path.touch(0o600)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(f"BEGIN IMMEDIATE;\n{VERSION_1}\nCOMMIT;")
    connection.execute("PRAGMA foreign_keys = ON")
    for number, status in ((1, "done"), (7, "running")):
        connection.execute(
            "INSERT INTO transfer (id, name, kind, status, source, destination, session, job, size,"
            " done, error_code, error, created, modified, finished) VALUES (?, 'a name', 'sync-in',"
            " ?, 's3://b/p', '/tmp/root', 's1', 'job-1', 30, 10, 'E_NETWORK', ?, 1000.5, 1001, ?)",
            (number, status, b"shot\xe9", 1002.0 if status == "done" else None),
        )
    # Of two transfers that ran at once.
    for transfer, path_, state in ((1, "x", "done"), (7, "one", "executing"), (1, "y", "done"),
                                   (7, b"tw\xe9", "queued"), (7, "three", "done")):  # fmt: skip
        connection.execute(
            "INSERT INTO task (transfer, status, source, destination, size, tries, started)"
            " VALUES (?, ?, 'aa', ?, 10, 2, 1000.7)",
            (transfer, state, path_),
        )
    connection.execute("INSERT INTO sample VALUES (7, 1000.9, 10)")
    connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "ledger.db"
    make_version_1(made)
    yield made
    assert list(tmp_path.glob("*.unreadable-*")) == []


def test_t1_a_ledger_of_version_1_keeps_all_that_is_in_it(path: Path) -> None:
    with Ledger.open(path, clock=lambda: 1001.0) as ledger:
        done, killed = ledger.transfers()
        assert (done.id, done.status, done.finished) == (1, TransferStatus.DONE, 1002.0)
        assert (killed.id, killed.status, killed.size, killed.done) == (
            7, TransferStatus.RUNNING, 30, 10,
        )  # fmt: skip
        assert (killed.error_code, os.fsencode(killed.error)) == ("E_NETWORK", b"shot\xe9")
        assert (killed.created, killed.priority, killed.required) == (1000.5, 500, True)
        assert (killed.settings, killed.metadata, killed.modifier) == ({}, {}, "")
        one, two, three = ledger.tasks(7)
        assert [task.uri for task in ledger.tasks(1)] == ["0", "1"]
        assert [task.uri for task in (one, two, three)] == ["0", "1", "2"]
        assert (one.status, one.tries, one.started, one.created) == (
            TaskStatus.EXECUTING, 2, 1000.7, 1000.5,
        )  # fmt: skip
        assert (os.fsencode(two.destination), two.metadata, two.done) == (b"tw\xe9", {}, 0)
        assert three.done == 10
        assert rows(path, "SELECT time, bytes FROM sample") == [(1000.9, 10)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_t1_a_transfer_of_version_1_is_taken_up_and_steered(path: Path) -> None:
    specs = [TaskSpec("aa", name, 10) for name in ("one", os.fsdecode(b"tw\xe9"), "three")]
    with Ledger.open(path) as ledger:
        row = ledger.begin(SPEC, [*specs, TaskSpec("bb", "four", 10)])
        assert (row.id, row.size, row.done) == (7, 40, 10)
        tasks = {task.uri: task for task in ledger.tasks(7)}
        assert [tasks[uri].status for uri in "0123"] == [
            TaskStatus.QUEUED, TaskStatus.QUEUED, TaskStatus.DONE, TaskStatus.QUEUED,
        ]  # fmt: skip
        ledger.set_tasks(7, {tasks["1"].id: {"status": "excluded"}}, "0:root")
        assert ledger.finish(7, CancelledError("stopped")).size == 30


def test_t1_a_migrated_ledger_has_the_same_tables_as_a_new_one(path: Path, tmp_path: Path) -> None:
    Ledger.open(path).close()
    fresh = tmp_path / "fresh.db"
    Ledger.open(fresh).close()

    assert columns(path) == columns(fresh)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()


def columns(path: Path) -> dict[str, object]:
    """Return what tables and indexes there are, and their columns, in any order."""
    connection = sqlite3.connect(path)
    names = connection.execute("SELECT type, name FROM sqlite_master ORDER BY name").fetchall()
    found: dict[str, object] = {
        name: sorted(
            # Of a table's all but its place, of an index's its name.
            tuple(column[1:] if kind == "table" else column[2:])
            for column in connection.execute(f"PRAGMA {kind}_info({name})")
        )
        for kind, name in names
    }
    found["version"] = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return {
        name: sorted(tuple(map(str, column)) for column in value)
        if isinstance(value, list)
        else value
        for name, value in found.items()
    }


def test_t1_a_number_is_never_given_twice(path: Path) -> None:
    with Ledger.open(path, clock=lambda: 1_000_000.0) as ledger:
        ledger.set_transfer(7, status=TransferStatus.ABORTED)
        ledger.archive(7)
        assert ledger.begin(SPEC, ()).id == 8


def test_t1_an_engine_of_version_1_goes_on_writing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    make_version_1(path)
    old = sqlite3.connect(path, isolation_level=None)
    old.execute("SELECT * FROM task").fetchall()

    with Ledger.open(path) as ledger:
        old.execute(
            "INSERT INTO task (transfer, status, source, destination, size)"
            " VALUES (7, 'queued', 'cc', 'five', 5) ON CONFLICT DO NOTHING"
        )
        old.execute("UPDATE task SET status = 'done' WHERE destination = 'five'")
        old.execute("INSERT INTO sample VALUES (7, 1, 1)")
        assert ledger.tasks(7)[-1].status is TaskStatus.DONE
    old.close()


@pytest.mark.slow
def test_t1_a_migration_that_was_killed_at_any_statement_is_done_by_the_next(
    tmp_path: Path,
) -> None:
    killed = 0
    for statements in range(100):
        path = tmp_path / f"ledger-{statements}.db"
        make_version_1(path)
        mover = subprocess.run(
            [sys.executable, "-c", DIES_AT_STATEMENT, path, str(statements)], check=False
        )

        with Ledger.open(path) as ledger:
            assert [len(ledger.tasks(number)) for number in (1, 7)] == [2, 3]
        if mover.returncode == 0:
            break
        assert mover.returncode == -signal.SIGKILL
        killed += 1

    assert 15 <= killed < 100, "between any two statements, at least"
    assert list(tmp_path.glob("*.unreadable-*")) == []
