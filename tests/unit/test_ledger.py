"""The ledger: what was begun is remembered, taken up again by one process, and survives damage."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import (
    CancelledError,
    LocalWriteError,
    NoSpaceError,
    StoreUnavailableError,
    TransferStateError,
)
from agent_plugin.content.store import Cancellation, SentPart
from agent_plugin.transfer.ledger import (
    LEASE_SECONDS,
    SAMPLE_WINDOW_SECONDS,
    Ledger,
    TaskSpec,
    TransferSpec,
    lease_owner,
)
from agent_plugin.transfer.ledger_file import LedgerFile
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from tests.servers.promptness import STOP_SECONDS
from tests.unit.ledger_reads import rows

SPEC = TransferSpec(
    kind="sync-in", source="s3://b/p", destination="/tmp/root", session="s1", job="job-1"
)
TASKS = (TaskSpec("aa", "one", 10), TaskSpec("bb", "two", 200), TaskSpec("bb", "three", 200))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(path: Path, clock: Clock) -> Iterator[Ledger]:
    with Ledger.open(path, clock=clock) as opened:
        yield opened


def test_a_signal_that_raises_in_the_middle_of_a_write_keeps_nobody_from_the_ledger(
    ledger: Ledger, path: Path
) -> None:
    """Seen to keep all others from writing, if it came as soon as the transaction had begun."""
    reached = 0
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
        while _write_interrupted_at(reached, ledger.file):
            reached += 1
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
    assert reached > 20


def _write_interrupted_at(number: int, file: LedgerFile) -> bool:
    """Write, and raise before that instruction; return whether there is such a one."""
    instructions = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal instructions
        frame.f_trace_opcodes = True
        if event == "opcode":
            instructions += 1
            if instructions > number:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]  # a function that returns itself has no type
    try:
        with file.write():
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def ids(ledger: Ledger, transfer: int) -> dict[str, int]:
    return {task.destination: task.id for task in ledger.tasks(transfer)}


def by_destination(ledger: Ledger, transfer: int) -> dict[str, tuple[str, int]]:
    return {task.destination: (str(task.status), task.tries) for task in ledger.tasks(transfer)}


def test_a_transfer_that_began_runs_with_all_its_tasks_queued(ledger: Ledger, clock: Clock) -> None:
    row = ledger.begin(SPEC, TASKS)

    assert (row.status, row.size, row.done, row.finished) == (TransferStatus.RUNNING, 410, 0, None)
    assert (row.kind, row.source, row.destination) == ("sync-in", "s3://b/p", "/tmp/root")
    assert row.name == "sync-in s3://b/p -> /tmp/root"
    assert row.created == clock.now
    assert [(t.source, t.destination, t.size, t.status) for t in ledger.tasks(row.id)] == [
        (task.source, task.destination, task.size, TaskStatus.QUEUED) for task in TASKS
    ]
    assert {(task.source, task.destination) for task in ledger.news(row.id).tasks.values()} == {
        ("aa", "one"), ("bb", "two"), ("bb", "three"),
    }  # fmt: skip
    assert [task.uri for task in ledger.tasks(row.id)] == ["0", "1", "2"]


def test_a_transfer_of_nothing_is_done(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, ())

    assert (row.size, ledger.finish(row.id).status) == (0, TransferStatus.DONE)


def test_a_transfer_whose_tasks_are_all_done_is_done_and_the_next_one_is_new(
    ledger: Ledger, clock: Clock
) -> None:
    row = ledger.begin(SPEC, TASKS)
    for task in ids(ledger, row.id).values():
        ledger.note(task, TaskStatus.DONE)
    clock.now += 5

    done = ledger.finish(row.id)

    assert (done.status, done.done, done.size) == (TransferStatus.DONE, 410, 410)
    assert (done.finished, done.error, done.error_code) == (clock.now, "", "")
    assert ledger.begin(SPEC, TASKS).id != row.id


def test_a_failed_transfer_names_its_error_and_is_taken_up_again(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    tasks = ids(ledger, row.id)
    error = StoreUnavailableError("two: get s3://b/p/Data/bb: timed out")
    ledger.note(tasks["one"], TaskStatus.DONE)
    ledger.note(tasks["two"], TaskStatus.BOOTING)
    ledger.note(tasks["two"], TaskStatus.FAILED, error)

    failed = ledger.finish(row.id, error)

    assert (failed.status, failed.error_code, failed.error) == (
        TransferStatus.FAILED, "E_NETWORK", error.message,
    )  # fmt: skip
    assert [(task.error_code, task.error) for task in ledger.tasks(row.id)] == [
        ("", ""), ("E_NETWORK", error.message), ("", ""),
    ]  # fmt: skip
    again = ledger.begin(SPEC, TASKS)
    assert again.id == row.id
    assert (again.status, again.error, again.error_code, again.finished) == (
        TransferStatus.RUNNING, "", "", None,
    )  # fmt: skip
    assert by_destination(ledger, row.id) == {
        "one": ("done", 0), "two": ("queued", 1), "three": ("queued", 0),
    }  # fmt: skip


def test_each_failed_run_counts_as_a_try(ledger: Ledger) -> None:
    for tries in range(4):
        row = ledger.begin(SPEC, TASKS[:1])
        assert by_destination(ledger, row.id) == {"one": ("queued", tries)}
        ledger.note(ids(ledger, row.id)["one"], TaskStatus.BOOTING)
        ledger.note(ids(ledger, row.id)["one"], TaskStatus.FAILED)
        ledger.finish(row.id, StoreUnavailableError("no"))


def test_every_attempt_counts_as_a_try_however_many_there_are_between_two_writes(
    ledger: Ledger, clock: Clock
) -> None:
    row = ledger.begin(SPEC, TASKS)
    tasks = ids(ledger, row.id)
    error = StoreUnavailableError("get s3://b/p/Data/aa: timed out")
    ledger.note(tasks["one"], TaskStatus.BOOTING)
    ledger.note(tasks["one"], TaskStatus.EXECUTING)
    ledger.note_retry(tasks["one"], error, 0.4)
    ledger.note_retry(tasks["one"], error, 0.8)

    one, two, _ = ledger.tasks(row.id)
    assert (one.status, one.tries, one.not_before) == (TaskStatus.EXECUTING, 3, clock.now + 0.8)
    assert (one.error_code, one.error) == ("E_NETWORK", error.message)
    assert (two.status, two.tries, two.not_before) == (TaskStatus.QUEUED, 0, 0.0)
    ledger.note_retry(tasks["one"], error, 1.6)
    assert ledger.tasks(row.id)[0].status is TaskStatus.EXECUTING, "as it was"
    ledger.note(tasks["one"], TaskStatus.DONE)
    one = ledger.tasks(row.id)[0]
    assert (one.status, one.tries, one.not_before, one.error) == (TaskStatus.DONE, 4, 0.0, "")


def test_what_waits_for_its_next_try_is_queued_at_once_when_it_is_taken_up_again(
    ledger: Ledger,
) -> None:
    row = ledger.begin(SPEC, TASKS[:1])
    task = ids(ledger, row.id)["one"]
    ledger.note(task, TaskStatus.BOOTING)
    ledger.note_retry(task, StoreUnavailableError("no"), 60)
    ledger.flush()

    ledger.begin(SPEC, TASKS[:1])

    [one] = ledger.tasks(row.id)
    assert (one.status, one.tries, one.not_before) == (TaskStatus.QUEUED, 2, 0.0)


def test_no_note_waits_for_a_busy_ledger(ledger: Ledger, path: Path) -> None:
    row = ledger.begin(SPEC, TASKS)
    one = ids(ledger, row.id)["one"]
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing = threading.Thread(target=ledger.flush)
    ledger.note(one, TaskStatus.BOOTING)
    writing.start()
    started = time.monotonic()
    ledger.note(one, TaskStatus.EXECUTING)
    ledger.note_retry(one, StoreUnavailableError("no"), 1)
    seconds = time.monotonic() - started
    other.execute("ROLLBACK")
    other.close()
    writing.join(30)

    assert seconds < STOP_SECONDS, "whoever waits for the ledger waits for 10 s"
    assert by_destination(ledger, row.id)["one"] == ("executing", 2)


def test_bytes_that_were_found_are_done_and_say_nothing_about_speed(
    ledger: Ledger, path: Path
) -> None:
    row = ledger.begin(SPEC, TASKS)

    ledger.beat(row.id, 10, 200)

    assert ledger.transfer(row.id).done == 210
    assert rows(path, "SELECT bytes FROM sample") == [(10,)]


def test_a_cancelled_transfer_waits_to_be_taken_up_again(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    ledger.note(ids(ledger, row.id)["one"], TaskStatus.EXECUTING)

    stopped = ledger.finish(row.id, CancelledError("stopped on request"))

    assert (stopped.status, stopped.finished) == (TransferStatus.WAITING, None)
    assert by_destination(ledger, row.id)["one"] == ("queued", 0)
    assert ledger.begin(SPEC, TASKS).id == row.id


def test_bytes_that_were_done_before_are_not_counted_twice(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    ledger.note(ids(ledger, row.id)["two"], TaskStatus.DONE)
    ledger.beat(row.id, 200)
    ledger.finish(row.id, CancelledError("stopped on request"))

    assert ledger.begin(SPEC, TASKS).done == 200
    ledger.beat(row.id, 10)
    assert ledger.transfer(row.id).done == 210


def test_what_is_no_longer_asked_for_leaves_the_transfer(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    ledger.note(ids(ledger, row.id)["one"], TaskStatus.DONE)
    ledger.finish(row.id, CancelledError("stopped on request"))

    again = ledger.begin(SPEC, TASKS[2:])
    ledger.note(ids(ledger, row.id)["three"], TaskStatus.DONE)

    assert (again.id, again.size) == (row.id, 210)
    assert by_destination(ledger, row.id) == {
        "one": ("done", 0), "two": ("excluded", 0), "three": ("done", 0),
    }  # fmt: skip
    assert ledger.finish(row.id).status is TransferStatus.DONE


@pytest.mark.parametrize("field", ["kind", "source", "destination", "session", "step", "task"])
def test_a_transfer_of_something_else_is_another_one(ledger: Ledger, field: str) -> None:
    first = ledger.begin(SPEC, TASKS)
    other = TransferSpec(
        **{
            name: getattr(SPEC, name) + ("-2" if name == field else "")
            for name in ("kind", "source", "destination", "session", "job", "step", "task")
        }
    )

    assert ledger.begin(other, TASKS).id != first.id
    assert len(ledger.transfers()) == 2


def test_a_session_sees_its_own_transfers(ledger: Ledger) -> None:
    first = ledger.begin(SPEC, TASKS)
    ledger.begin(TransferSpec("sync-in", "s3://b/p", "/tmp/other", session="s2"), TASKS)

    assert [row.id for row in ledger.transfers(session="s1")] == [first.id]
    assert ledger.transfers(session="s3") == []


def test_a_transfer_that_is_not_there_is_an_error(ledger: Ledger) -> None:
    with pytest.raises(TransferStateError, match="there is no transfer 7"):
        ledger.transfer(7)


def test_the_last_note_wins_and_is_written_when_flushed(ledger: Ledger, path: Path) -> None:
    row = ledger.begin(SPEC, TASKS)
    one = ids(ledger, row.id)["one"]

    def in_the_file() -> str:
        with sqlite3.connect(path) as other:
            found = other.execute("SELECT status FROM task WHERE id = ?", (one,)).fetchone()[0]
        other.close()
        return str(found)

    ledger.note(one, TaskStatus.FAILED, StoreUnavailableError("no"))
    ledger.note(one, TaskStatus.DONE)
    assert in_the_file() == "queued"
    ledger.flush()
    assert in_the_file() == "done"
    assert ledger.tasks(row.id)[0].error == ""


def test_closing_writes_what_was_noted(path: Path) -> None:
    with Ledger.open(path) as ledger:
        row = ledger.begin(SPEC, TASKS)
        for task in ids(ledger, row.id).values():
            ledger.note(task, TaskStatus.DONE)

    with Ledger.open(path) as ledger:
        assert {task.status for task in ledger.tasks(row.id)} == {TaskStatus.DONE}


def test_notes_for_which_there_was_no_room_are_written_when_there_is(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, TASKS)
    tasks = ids(ledger, row.id)
    parts = [SentPart(1, "tag", "", "aa")]
    writes: list[Callable[[], object]] = [ledger.flush, lambda: ledger.beat(row.id, 0)]
    for write in writes:
        ledger.note_upload(tasks["two"], "upload-2", parts)
        ledger.note(tasks["one"], TaskStatus.BOOTING, StoreUnavailableError("n" * 1_000_000))
        ledger.note_moved(tasks["three"], 30)
        with _no_room(ledger), pytest.raises(NoSpaceError):
            write()
        ledger.note_moved(tasks["three"], 20)
        ledger.note(tasks["one"], TaskStatus.DONE)

    ledger.flush()

    found = {task.destination: task for task in ledger.tasks(row.id)}
    assert ledger.upload_of(tasks["two"]) == ("upload-2", parts)
    assert (found["one"].status, found["one"].tries) == (TaskStatus.DONE, 2)
    assert found["three"].done == 100


@contextmanager
def _no_room(ledger: Ledger) -> Iterator[None]:
    """Keep the ledger as large as it is."""
    with ledger.file.read() as connection:
        (most,) = connection.execute("PRAGMA max_page_count").fetchone()
        connection.execute("PRAGMA max_page_count = 1")
    try:
        yield
    finally:
        with ledger.file.read() as connection:
            connection.execute(f"PRAGMA max_page_count = {most}")


def test_notes_of_many_threads_are_all_written(ledger: Ledger) -> None:
    row = ledger.begin(SPEC, [TaskSpec("aa", str(at), 1) for at in range(400)])
    tasks = list(ids(ledger, row.id).values())

    def note(part: list[int]) -> None:
        for task in part:
            ledger.note(task, TaskStatus.DONE)
            ledger.flush()

    threads = [threading.Thread(target=note, args=(tasks[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert ledger.finish(row.id).status is TransferStatus.DONE


def test_a_beat_counts_bytes_keeps_a_minute_of_samples_and_renews_the_lease(
    ledger: Ledger, path: Path, clock: Clock
) -> None:
    row = ledger.begin(SPEC, TASKS)
    began = clock.now
    for _ in range(100):
        clock.now += 1
        assert ledger.beat(row.id, 7) is TransferStatus.RUNNING

    assert ledger.transfer(row.id).done == 700
    samples = rows(path, "SELECT time, bytes FROM sample ORDER BY time")
    assert samples == [(began + at, 7) for at in range(40, 101)]
    assert samples[0][0] == clock.now - SAMPLE_WINDOW_SECONDS
    with sqlite3.connect(path) as other:
        until = other.execute("SELECT lease_until FROM transfer").fetchone()[0]
    other.close()
    assert until == clock.now + LEASE_SECONDS


def test_two_beats_at_the_same_time_are_one_sample(ledger: Ledger, path: Path) -> None:
    row = ledger.begin(SPEC, TASKS)

    ledger.beat(row.id, 3)
    ledger.beat(row.id, 4)

    assert rows(path, "SELECT bytes FROM sample") == [(7,)]


NAMES = [b"latin-\xe9.txt", b"\xff\xfe", "snow☃ \U0001f3ac".encode(), b"new\nline", b"quote'; --"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_every_name_that_a_file_can_have_comes_back_as_it_was(ledger: Ledger, name: bytes) -> None:
    text = os.fsdecode(name)
    spec = TransferSpec("sync-out", f"/roots/{text}", "s3://b/p", session="s1")
    task = TaskSpec(text, "aa", 1)
    row = ledger.begin(spec, [task])
    error = StoreUnavailableError(f"{text}: no")

    assert (row.source, row.name) == (spec.source, spec.name)
    assert ledger.tasks(row.id)[0].source == text
    [news] = ledger.news(row.id).tasks.values()
    assert (news.id, news.source) == (ledger.tasks(row.id)[0].id, text)
    ledger.note(ledger.tasks(row.id)[0].id, TaskStatus.FAILED, error)
    assert ledger.finish(row.id, error).error == error.message
    assert ledger.tasks(row.id)[0].error == error.message
    assert ledger.begin(spec, [task]).id == row.id, "it must be found again by such a name"
    assert len(ledger.tasks(row.id)) == 1


# ------------------------------------------------------------------------------------ leases

HOLDER = """
import sys, time
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
from agent_plugin.transfer.states import TaskStatus
spec = TransferSpec(kind="sync-in", source="s3://b/p", destination="/tmp/root", session="s1",
                    job="job-1")
ledger = Ledger.open(Path(sys.argv[1]))
row = ledger.begin(spec, [TaskSpec("aa", "one", 10)])
for task in ledger.tasks(row.id):
    ledger.note(task.id, TaskStatus.BOOTING)
    ledger.note(task.id, TaskStatus.EXECUTING)
ledger.flush()
print(row.id, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs the transfer and stands still."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_lease_of_a_living_process_is_refused(
    path: Path, holder: subprocess.Popen[str]
) -> None:
    with (
        Ledger.open(path) as ledger,
        pytest.raises(TransferStateError, match=f"process {holder.pid} is running transfer 1"),
    ):
        ledger.begin(SPEC, TASKS)


def test_the_lease_of_a_killed_process_is_taken_over_at_once(
    path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()

    with Ledger.open(path) as ledger:
        assert ledger.begin(SPEC, TASKS).id == 1
        assert len(ledger.tasks(1)) == 3


def test_the_lease_of_a_killed_process_that_nobody_has_reaped_is_taken_over_at_once(
    path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    # Waits until it is dead, and leaves it a zombie.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)

    with Ledger.open(path) as ledger:
        assert ledger.begin(SPEC, TASKS).id == 1


def test_the_lease_of_a_stopped_process_is_taken_over_when_it_has_run_out(
    path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)

    with (
        Ledger.open(path, clock=lambda: time.time() + LEASE_SECONDS - 10) as early,
        pytest.raises(TransferStateError),
    ):
        early.begin(SPEC, TASKS)
    with Ledger.open(path, clock=lambda: time.time() + LEASE_SECONDS + 10) as late:
        assert late.begin(SPEC, TASKS).id == 1


def test_a_process_that_has_lost_its_lease_learns_it_and_changes_nothing(
    path: Path, clock: Clock
) -> None:
    with Ledger.open(path, clock=clock) as ours:
        row = ours.begin(SPEC, TASKS)
        with sqlite3.connect(path) as other:
            other.execute("UPDATE transfer SET lease_owner = '1:1'")
            other.execute("UPDATE task SET status = 'executing' WHERE destination = 'one'")
        other.close()

        with pytest.raises(TransferStateError, match="transfer 1 was taken over"):
            ours.beat(row.id, 10)
        assert ours.finish(row.id).status is TransferStatus.RUNNING
        assert ours.transfer(row.id).done == 0
        assert by_destination(ours, row.id)["one"] == ("executing", 0), "the other one moves it"


def test_a_reused_process_id_is_another_process(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.begin(SPEC, TASKS)
        with sqlite3.connect(path) as other:
            other.execute(f"UPDATE transfer SET lease_owner = '{os.getppid()}:1'")
        other.close()

        assert ledger.begin(SPEC, TASKS).id == 1


def test_a_process_that_is_gone_has_no_lease_owner() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()

    assert lease_owner(process.pid) is None
    assert lease_owner() == lease_owner(os.getpid())


def test_a_child_that_was_forked_holds_no_lease_of_its_parent() -> None:
    """Seen to fail when a process remembers its owner for whichever process asks."""
    program = (
        "import os\n"
        "from agent_plugin.transfer.ledger import lease_owner\n"
        "print(lease_owner(), flush=True)\n"
        "if os.fork() == 0: print(lease_owner(), lease_owner(os.getpid()), flush=True)\n"
        "else: os.wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    parent, child, of_child = done.stdout.split()
    assert child == of_child != parent


def test_what_a_dead_engine_had_begun_is_queued_again_and_counted(
    path: Path, holder: subprocess.Popen[str]
) -> None:
    with Ledger.open(path) as ledger:
        assert by_destination(ledger, 1) == {"one": ("executing", 1)}
        holder.kill()
        holder.wait()

        ledger.begin(SPEC, TASKS)
        assert by_destination(ledger, 1) == {
            "one": ("queued", 1), "two": ("queued", 0), "three": ("queued", 0),
        }  # fmt: skip


def test_what_a_person_held_or_excluded_stays_so(path: Path, clock: Clock) -> None:
    with Ledger.open(path, clock=clock) as ledger:
        row = ledger.begin(SPEC, TASKS)
        tasks = ids(ledger, row.id)
        ledger.set_tasks(
            row.id,
            {tasks["one"]: {"status": "onhold"}, tasks["two"]: {"status": "excluded"}},
            "0:root",
        )
        ledger.finish(row.id, CancelledError("stopped on request"))

        again = ledger.begin(SPEC, TASKS)

        assert again.size == 210
        assert [str(task.status) for task in ledger.tasks(row.id)] == [
            "onhold", "excluded", "queued",
        ]  # fmt: skip
        ledger.note(tasks["three"], TaskStatus.DONE)
        assert ledger.finish(row.id).status is TransferStatus.PAUSED


def test_ending_a_session_ends_what_is_live_of_it(ledger: Ledger) -> None:
    live = ledger.begin(SPEC, TASKS)
    done = ledger.begin(TransferSpec("sync-step", "s3://b/p", "/tmp/root", session="s1"), ())
    ledger.finish(done.id)
    other = ledger.begin(TransferSpec("sync-in", "s3://b/p", "/tmp/root", session="s2"), TASKS)

    ledger.forget_session("s1")

    assert [str(ledger.transfer(row.id).status) for row in (live, done, other)] == [
        "aborted", "done", "running",
    ]  # fmt: skip
    assert ledger.begin(SPEC, TASKS).id not in {live.id, done.id, other.id}


# ------------------------------------------------------------------------------------ the file


def test_the_file_is_private(path: Path) -> None:
    before = os.umask(0)
    try:
        with Ledger.open(path) as ledger:
            ledger.begin(SPEC, TASKS)
            modes = {
                found.name: stat.S_IMODE(found.stat().st_mode) for found in path.parent.iterdir()
            }
    finally:
        os.umask(before)

    assert modes == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}


@pytest.mark.parametrize(
    "garbage", [b"not a database, " * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_file_that_is_no_ledger_is_set_aside(
    path: Path, garbage: bytes, clock: Clock, expected_events: set[str]
) -> None:
    expected_events.add(events.LEDGER_QUARANTINED)
    path.write_bytes(garbage)

    with Ledger.open(path, clock=clock) as ledger:
        assert ledger.begin(SPEC, TASKS).id == 1
    assert path.with_name("ledger.db.unreadable-1000000").read_bytes() == garbage


def test_a_ledger_of_another_version_is_set_aside(
    path: Path, clock: Clock, expected_events: set[str]
) -> None:
    expected_events.add(events.LEDGER_QUARANTINED)
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()

    with Ledger.open(path, clock=clock) as ledger:
        assert ledger.begin(SPEC, TASKS).id == 1
    assert path.with_name("ledger.db.unreadable-1000000").exists()


def test_damage_that_is_found_late_fails_the_command_and_not_the_next_one(
    path: Path, expected_events: set[str]
) -> None:
    expected_events.add(events.LEDGER_QUARANTINED)
    with Ledger.open(path) as ledger:
        row = ledger.begin(SPEC, [TaskSpec("aa", f"{at:0500}", 1) for at in range(200)])
        ledger.finish(row.id, CancelledError("stopped on request"))
    content = bytearray(path.read_bytes())
    # Behind what the tables are, which is read when it is opened.
    content[24 * 4096 :] = b"\xa5" * (len(content) - 24 * 4096)
    path.write_bytes(content)

    with Ledger.open(path) as ledger, pytest.raises(LocalWriteError, match="malformed") as caught:
        ledger.begin(SPEC, TASKS)
    assert str(path) in caught.value.message
    with Ledger.open(path) as ledger:
        assert ledger.begin(SPEC, TASKS).id == 1
    assert len(list(path.parent.glob("ledger.db.unreadable-*"))) == 1


DIES_AT_STATEMENT = """
import os, signal, sqlite3, sys
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger

left = int(sys.argv[2])
connect = sqlite3.connect

def count(statement):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def connect_counting(*arguments, **more):
    connection = connect(*arguments, **more)
    connection.set_trace_callback(count)
    return connection

sqlite3.connect = connect_counting
Ledger.open(Path(sys.argv[1])).close()
"""


def test_a_ledger_whose_maker_was_killed_at_any_statement_is_made_by_the_next(
    tmp_path: Path,
) -> None:
    killed = 0
    for statements in range(100):
        path = tmp_path / f"ledger-{statements}.db"
        maker = subprocess.run(
            [sys.executable, "-c", DIES_AT_STATEMENT, path, str(statements)], check=False
        )

        with Ledger.open(path) as ledger:
            row = ledger.begin(SPEC, TASKS)
            ledger.beat(row.id, 1)
            assert len(ledger.tasks(row.id)) == 3
        if maker.returncode == 0:
            break
        assert maker.returncode == -signal.SIGKILL
        killed += 1

    assert 8 <= killed < 100, "between any two of the tables, at least"
    assert list(tmp_path.glob("*.unreadable-*")) == []


OPENER = """
import sys, time
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
spec = TransferSpec("sync-in", "s3://b/p", f"/roots/{sys.argv[1]}", session=sys.argv[1])
for line in sys.stdin:
    path, moment = line.split()
    time.sleep(max(0, float(moment) - time.time()))
    with Ledger.open(Path(path)) as ledger:
        row = ledger.begin(spec, [TaskSpec("aa", "one", 1)])
        ledger.finish(row.id)
    print("opened", flush=True)
"""


class Openers:
    """Twenty processes that open a ledger at the same moment and carry a transfer out."""

    def __init__(self) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", OPENER, str(at)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for at in range(20)
        ]  # fmt: skip

    def open(self, path: Path, moment: float) -> list[str]:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{path} {moment}\n")
            process.stdin.flush()
        return [process.stdout.readline() for process in self.processes if process.stdout]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def openers() -> Iterator[Openers]:
    started = Openers()
    yield started
    started.close()


def test_twenty_processes_that_open_a_fresh_ledger_at_once_all_succeed(
    openers: Openers, tmp_path: Path
) -> None:
    for number in range(6):
        path = tmp_path / f"ledger-{number}.db"

        # The first time they are still starting.
        opened = openers.open(path, time.time() + 0.1)

        assert opened == ["opened\n"] * 20
        with Ledger.open(path) as ledger:
            assert len(ledger.transfers()) == 20
    assert list(tmp_path.glob("*.unreadable-*")) == []


def test_twenty_processes_that_open_a_damaged_ledger_at_once_set_it_aside_once(
    openers: Openers, path: Path
) -> None:
    openers.open(path.with_name("other.db"), 0.0)
    path.write_bytes(b"not a database, " * 100)

    assert openers.open(path, time.time() + 0.1) == ["opened\n"] * 20
    with Ledger.open(path) as ledger:
        assert len(ledger.transfers()) == 20
    assert len(list(path.parent.glob("*.unreadable-*"))) == 1


def test_a_fresh_ledger_is_made_though_another_is_about_to_make_it(path: Path) -> None:
    """SQLite does not wait for a writer when it switches to the write-ahead log."""
    path.touch(0o600)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    leaving = threading.Timer(0.5, other.close)
    leaving.start()

    with Ledger.open(path) as ledger:
        assert ledger.begin(SPEC, TASKS).id == 1
    leaving.join()


def test_a_statement_that_fails_is_no_damage(ledger: Ledger, path: Path) -> None:
    row = ledger.begin(SPEC, TASKS)
    with sqlite3.connect(path) as other:
        other.execute("ALTER TABLE sample RENAME TO held")
    other.close()

    with pytest.raises(LocalWriteError, match="no such table: sample"):
        ledger.beat(row.id, 1)
    with sqlite3.connect(path) as other:
        other.execute("ALTER TABLE held RENAME TO sample")
    other.close()
    ledger.beat(row.id, 1)
    assert list(path.parent.glob("*.unreadable-*")) == []


def test_a_ledger_without_a_table_is_set_aside_when_it_is_opened(
    path: Path, expected_events: set[str]
) -> None:
    expected_events.add(events.LEDGER_QUARANTINED)
    with Ledger.open(path):
        pass
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE sample")
    other.close()

    with Ledger.open(path) as ledger:
        ledger.beat(ledger.begin(SPEC, TASKS).id, 1)
    assert len(list(path.parent.glob("*.unreadable-*"))) == 1


def test_a_link_in_the_ledgers_place_is_not_followed(path: Path) -> None:
    target = path.with_name("precious")
    path.symlink_to(target)

    with pytest.raises(Exception, match="a symbolic link stands in the way"):
        Ledger.open(path)
    assert not target.exists()


def test_a_ledger_that_can_not_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(LocalWriteError, match=r"absent/ledger\.db"):
        Ledger.open(tmp_path / "absent" / "ledger.db")


@pytest.mark.slow
def test_a_hundred_thousand_tasks_are_begun_noted_and_finished(
    path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The time is reported, not judged; 1.4 s was measured for the insertion alone."""
    tasks = [
        TaskSpec(f"{at:032x}", f"textures/set-{at % 100}/{at}.tx", at) for at in range(100_000)
    ]
    with Ledger.open(path) as ledger:
        started = time.perf_counter()
        row = ledger.begin(SPEC, tasks)
        begun = time.perf_counter()
        for task in ledger.news(row.id).tasks:
            ledger.note(task, TaskStatus.DONE)
        ledger.flush()
        noted = time.perf_counter()

        done = ledger.finish(row.id)

    assert (done.status, done.done) == (TransferStatus.DONE, sum(range(100_000)))
    record_property("begin_seconds", round(begun - started, 3))
    record_property("note_seconds", round(noted - begun, 3))
    print(f"begin {begun - started:.2f} s, note {noted - begun:.2f} s", file=sys.stderr)


SMALL_TRANSFERS = """
import sys, time
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
with Ledger.open(Path(sys.argv[1])) as ledger:
    print(flush=True)
    for number in range(1_000_000):
        spec = TransferSpec("sync-in", "s3://b/p", "/tmp/small", session=f"small-{number}")
        row = ledger.begin(spec, [TaskSpec("aa", "one", 1)])
        ledger.beat(row.id, 1)
        ledger.finish(row.id)
        print(time.time(), flush=True)
"""


@contextmanager
def small_transfers(path: Path) -> Iterator[IO[str]]:
    """Let another process carry out one transfer after the other; lend what it prints."""
    with subprocess.Popen(
        [sys.executable, "-c", SMALL_TRANSFERS, path], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "\n"
            yield other.stdout
        finally:
            other.kill()


def test_others_write_while_a_large_transfer_begins(path: Path) -> None:
    """The one that begins waits in its middle: SQLite takes no turns among those who write."""
    finished = 0

    def tasks() -> Iterator[TaskSpec]:
        nonlocal finished
        for at in range(50_000):
            if at == 25_000:
                [row] = [row for row in ledger.transfers() if row.session == SPEC.session]
                assert len(ledger.tasks(row.id)) == 20_000, "it is in the middle of its writing"
                started = time.time()
                while finished < 2:
                    line = lines.readline()
                    assert line, "the other process gave up"
                    finished += float(line) > started
            yield TaskSpec("aa", f"textures/{at}.tx", 1)

    with Ledger.open(path) as ledger, small_transfers(path) as lines:
        begun = ledger.begin(SPEC, tasks())

    assert (begun.status, begun.size) == (TransferStatus.RUNNING, 50_000)
    assert finished == 2


BEGINNER = """
import os, signal, sys
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
spec = TransferSpec(kind="sync-in", source="s3://b/p", destination="/tmp/root", session="s1",
                    job="job-1")

def tasks():
    for at in range(25_000):
        yield TaskSpec("aa", str(at), 1)
    print("most are there", flush=True)
    sys.stdin.readline()

Ledger.open(Path(sys.argv[1])).begin(spec, tasks())
"""


@pytest.fixture
def beginner(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, in the middle of a begin."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGINNER, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "most are there\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_transfer_that_is_being_expanded_is_init_and_nobody_elses(
    path: Path, beginner: subprocess.Popen[str]
) -> None:
    with Ledger.open(path) as ledger:
        [row] = ledger.transfers()
        assert (row.status, row.size, row.done) == (TransferStatus.INIT, -1, 0)
        with pytest.raises(TransferStateError, match=f"process {beginner.pid} is running"):
            ledger.begin(SPEC, TASKS)


def test_a_begin_that_was_killed_is_taken_up_by_the_next(
    path: Path, beginner: subprocess.Popen[str]
) -> None:
    beginner.kill()
    beginner.wait()

    with Ledger.open(path) as ledger:
        assert len(ledger.tasks(1)) == 20_000
        row = ledger.begin(SPEC, [TaskSpec("aa", str(at), 1) for at in range(5_000, 30_000)])

        assert (row.id, row.status, row.size) == (1, TransferStatus.RUNNING, 25_000)
        states = [str(task.status) for task in ledger.tasks(1)]
    assert (states.count("queued"), states.count("excluded")) == (25_000, 5_000)


def test_a_begin_stops_when_that_is_wished_and_goes_on_later(ledger: Ledger) -> None:
    cancellation = Cancellation()

    def tasks() -> Iterator[TaskSpec]:
        for at in range(1_000_000):
            if at == 15_000:
                cancellation.cancel()
            yield TaskSpec("aa", str(at), 1)

    with pytest.raises(CancelledError):
        ledger.begin(SPEC, tasks(), cancellation)
    assert len(ledger.tasks(1)) == 10_000
    again = ledger.begin(SPEC, [TaskSpec("aa", str(at), 1) for at in range(12_000)])
    assert (again.id, again.status, again.size) == (1, TransferStatus.RUNNING, 12_000)


def test_a_busy_ledger_delays_no_beat_and_gets_all_of_them_later(
    ledger: Ledger, path: Path, clock: Clock
) -> None:
    row = ledger.begin(SPEC, TASKS)
    one = ids(ledger, row.id)["one"]
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    for _ in range(3):
        clock.now += 15
        ledger.note(one, TaskStatus.DONE)
        assert ledger.beat(row.id, 10) is TransferStatus.RUNNING
    seconds = time.monotonic() - started
    other.execute("ROLLBACK")
    other.close()

    assert seconds < STOP_SECONDS, "whoever beats has other things to do"
    assert ledger.transfer(row.id).done == 0
    ledger.beat(row.id, 1)
    assert ledger.transfer(row.id).done == 31
    assert by_destination(ledger, row.id)["one"] == ("done", 0)


def test_a_ledger_that_stays_busy_until_the_lease_runs_out_is_an_error(
    ledger: Ledger, path: Path, clock: Clock
) -> None:
    row = ledger.begin(SPEC, TASKS)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    clock.now += LEASE_SECONDS - 15
    ledger.beat(row.id, 1)
    clock.now += 6

    with pytest.raises(LocalWriteError, match="database is locked") as caught:
        ledger.beat(row.id, 1)
    assert "another process is writing to it" in caught.value.hint
    other.close()


def test_a_beat_that_comes_late_waits_for_a_ledger_that_is_busy_for_a_moment(
    ledger: Ledger, path: Path, clock: Clock
) -> None:
    """As after the process was stopped, or the machine slept."""
    row = ledger.begin(SPEC, TASKS)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    clock.now += LEASE_SECONDS * 10
    release = threading.Timer(0.5, other.execute, ("ROLLBACK",))
    release.start()

    assert ledger.beat(row.id, 10) is TransferStatus.RUNNING

    release.join()
    other.close()
    assert ledger.transfer(row.id).done == 10


WRITER = """
import sys
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
from agent_plugin.transfer.states import TaskStatus
with Ledger.open(Path(sys.argv[1])) as ledger:
    spec = TransferSpec(kind="sync-in", source="s3://b/p", destination=sys.argv[2], session="s1")
    row = ledger.begin(spec, [TaskSpec("aa", str(at), 1) for at in range(300)])
    for task in ledger.news(row.id).tasks:
        ledger.note(task, TaskStatus.DONE)
        ledger.beat(row.id, 1)
    print(ledger.finish(row.id).status)
"""


def test_two_processes_write_at_the_same_time(path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, f"/roots/{at}"], stdout=subprocess.PIPE, text=True
        )
        for at in range(2)
    ]

    assert [writer.communicate(timeout=60)[0] for writer in writers] == ["done\n", "done\n"]
    with Ledger.open(path) as ledger:
        assert [(row.status, row.done) for row in ledger.transfers()] == [
            (TransferStatus.DONE, 300), (TransferStatus.DONE, 300),
        ]  # fmt: skip


def test_what_is_old_goes_when_a_session_ends(tmp_path: Path) -> None:
    now = [1_000_000.0]
    with Ledger.open(tmp_path / "ledger.db", clock=lambda: now[0]) as ledger:
        spec = TransferSpec(kind="sync-in", source="s", destination="d", session="one")
        row = ledger.begin(spec, [TaskSpec("a", "b", 1)])
        for task in ledger.tasks(row.id):
            ledger.note(task.id, TaskStatus.DONE)
        ledger.finish(row.id)
        ledger.forget_session("one")
        young = len(ledger.tasks(row.id))
        now[0] += 2 * 86_400
        ledger.forget_session("two")
        tasks_gone = (len(ledger.tasks(row.id)), len(ledger.transfers()))
        now[0] += 13 * 86_400
        ledger.forget_session("two")

        assert young == 1
        assert tasks_gone == (0, 1)
        assert ledger.transfers() == []
