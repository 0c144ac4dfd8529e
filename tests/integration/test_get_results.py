"""`ls`, `cat` and `get`: what a job's executions left, as its user asks for it on any machine.

The outputs are made by real sessions; the commands are run as processes where their exit code or
their streams are the matter.
"""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobNotFoundError,
    JobInvalidError,
    ResultClashError,
    TransferStateError,
    UnsafePathError,
)
from agent_plugin.content.leftovers import is_partial
from agent_plugin.publish.arrival import arriving
from agent_plugin.publish.getting import GetResult, get
from agent_plugin.publish.results import find_executions, find_job
from agent_plugin.session.job import JobDocument
from agent_plugin.transfer.states import TaskStatus
from tests.servers.hooks import FARM, JOB, QUEUE, Host, action, job_of, step
from tests.servers.published import set_get_tasks, waits
from tests.servers.publishing import await_that, in_background
from tests.servers.s3_server import S3Server
from tests.servers.sessions import MTIME_NS, Sessions
from tests.servers.trees import write_files as write_files_at

MEBIBYTE = 1024 * 1024


def write_files(root: Path, files: dict[str | bytes, bytes | int]) -> None:
    write_files_at(root, files, mtime_ns=MTIME_NS)


@dataclass
class User:
    """Who wants results, on a machine that has seen nothing of the job."""

    host: Host
    to: Path

    def get(self, **options: Any) -> GetResult:
        with self.host.services() as context:
            executions = find_executions(context, (FARM, QUEUE, JOB))
            return get(executions, context, JOB, self.to, **options)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.host.run(*self.arguments(*arguments))

    def arguments(self, command: str | Path, *arguments: str | Path) -> list[str | Path]:
        where = ["--store", self.host.store_url, "--farm-id", FARM, "--queue-id", QUEUE]
        return [command, *arguments, *where]

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.to).as_posix(): path.read_bytes()
            for path in sorted(self.to.rglob("*"))
            if path.is_file()
        }

    def leftovers(self) -> list[str]:
        """Return what is hidden where results arrive."""
        places = [self.to.parent, *([self.to] if self.to.exists() else [])]
        return [path.name for place in places for path in place.iterdir() if is_partial(path.name)]


@pytest.fixture
def user(any_sessions: Sessions) -> User:
    return user_of(any_sessions)


@pytest.fixture
def local_user(sessions: Sessions) -> User:
    return user_of(sessions)


@pytest.fixture
def s3_sessions(s3: S3Server, s3_prefix: str, tmp_path: Path) -> Sessions:
    url = f"s3://{s3.bucket}/{s3_prefix}"
    return Sessions(tmp_path, Host(tmp_path / "host", url, environment=s3.environment))


@pytest.fixture
def s3_user(s3_sessions: Sessions) -> User:
    return user_of(s3_sessions)


def user_of(s: Sessions) -> User:
    host = Host(s.tmp_path / "user", s.host.store_url, environment=s.host.environment)
    return User(host, s.tmp_path / "user/results")


def ran(
    s: Sessions, *runs: dict[str | bytes, bytes | int], job: JobDocument | None = None
) -> list[str]:
    """Have a session run tasks that leave these files; return the executions' ids."""
    root = s.started(job or s.submitted())
    ids = []
    for number, files in enumerate(runs):
        write_files(root, files)
        run = action(1, number, started_at=1_700_000_000.0 + number, number=number)
        s.host.finish_task(s.session_dir, run)
        ids.append(run.session_action_id)
    return ids


# ------------------------------------------------------------ get


def test_o7_get_brings_the_files_of_one_execution_and_a_second_time_nothing(
    any_sessions: Sessions, user: User
) -> None:
    [run] = ran(any_sessions, {"renders/1.exr": 5000, "renders/a/2.exr": b"two", "renders/0": b""})

    first = user.get()
    second = user.get()

    assert user.files().keys() == {"renders/1.exr", "renders/a/2.exr", "renders/0"}
    assert user.files()["renders/a/2.exr"] == b"two"
    assert (first.files, first.bytes, first.bytes_fetched) == (3, 5003, 5003)
    assert [each.execution for each in first.executions] == [run]
    assert (second.files, second.bytes_fetched) == (3, 0)
    assert user.leftovers() == []


def test_o7_each_of_several_executions_has_a_folder_of_its_own(
    sessions: Sessions, local_user: User
) -> None:
    one, two = ran(sessions, {"renders/log": b"one"}, {"renders/log": b"two"})

    result = local_user.get()

    assert local_user.files() == {f"{one}/renders/log": b"one", f"{two}/renders/log": b"two"}
    assert [(e.execution, e.directory, e.files) for e in result.executions] == [
        (one, str(local_user.to / one), 1), (two, str(local_user.to / two), 1),
    ]  # fmt: skip


def test_o7_of_the_executions_that_are_named_only_these_come(
    sessions: Sessions, local_user: User
) -> None:
    one, two = ran(sessions, {"renders/log": b"one"}, {"renders/log": b"two"})

    got = local_user.run("get", JOB, "--execution", two, "--to", local_user.to)
    refused = local_user.run("get", JOB, "--execution", f"{one}x", "--to", local_user.to)

    assert got.returncode == 0, got.stderr
    assert local_user.files() == {"renders/log": b"two"}
    assert refused.returncode == JobInvalidError.exit_code
    assert f"no execution {one}x" in refused.stderr


def test_o7_merged_results_are_in_one_directory(sessions: Sessions, local_user: User) -> None:
    ran(
        sessions,
        {"renders/0001.exr": b"1", "renders/same": b"x"},
        {"renders/0002.exr": b"2", "renders/same": b"x"},
    )

    result = local_user.get(merge=True)

    assert local_user.files() == {
        "renders/0001.exr": b"1", "renders/0002.exr": b"2", "renders/same": b"x",
    }  # fmt: skip
    assert (result.merged, result.files) == (True, 3)


def test_o7_a_merge_that_clashes_names_every_clash_and_places_nothing(
    any_sessions: Sessions, user: User
) -> None:
    """What Bacalhau's `get` does in this case: it fails after half of the files were moved."""
    one, two = ran(
        any_sessions,
        {"renders/0001.exr": b"1", "renders/log": b"one", "renders/z/log": b"one"},
        {"renders/0002.exr": b"2", "renders/log": b"two", "renders/z/log": b"two"},
    )

    with pytest.raises(ResultClashError) as caught:
        user.get(merge=True)

    runs = ", ".join(sorted([one, two]))
    assert f"2 paths: renders/log: {runs}; renders/z/log: {runs}" in caught.value.message
    assert "--execution" in caught.value.hint
    assert not user.to.exists()
    assert user.leftovers() == []


def test_o7_what_else_stands_there_stays_unless_it_may_be_replaced(
    sessions: Sessions, local_user: User
) -> None:
    ran(sessions, {"renders/a": b"a", "renders/b": b"b", "renders/c": b"c"})
    write_files(local_user.to, {"renders/b": b"mine", "renders/c": b"c", "own": b"stays"})
    (local_user.to / "renders/d").mkdir()

    with pytest.raises(ResultClashError, match=r"1 path: renders/b: something else is there"):
        local_user.get()

    assert local_user.files() == {"renders/b": b"mine", "renders/c": b"c", "own": b"stays"}
    assert local_user.leftovers() == []

    assert local_user.get(overwrite=True).bytes_fetched == 2
    assert local_user.files() == {
        "own": b"stays", "renders/a": b"a", "renders/b": b"b", "renders/c": b"c",
    }  # fmt: skip
    assert local_user.leftovers() == []


def test_o7_a_directory_gives_way_to_no_file(sessions: Sessions, local_user: User) -> None:
    ran(sessions, {"renders/a": b"a", "renders/b": b"b"})
    write_files(local_user.to, {"renders/b/own": b"mine"})

    with pytest.raises(ResultClashError, match=r"renders/b: a directory is there"):
        local_user.get(overwrite=True)

    assert local_user.files() == {"renders/b/own": b"mine"}
    assert local_user.leftovers() == []


def test_o7_a_part_of_the_results_can_be_asked_for(sessions: Sessions, local_user: User) -> None:
    one, two = ran(
        sessions,
        {"renders/a/1": b"1", "renders/ab": b"2"},
        {"renders/a/2": b"3", "renders/c": b"4"},
    )

    assert local_user.get(path="renders/a").files == 2
    assert local_user.files() == {f"{one}/renders/a/1": b"1", f"{two}/renders/a/2": b"3"}


def test_o7_a_path_that_leaves_the_results_is_refused(sessions: Sessions, local_user: User) -> None:
    ran(sessions, {"renders/a": b"a"})

    with pytest.raises(UnsafePathError):
        local_user.get(path="renders/../../etc")


def test_o7_two_roots_with_a_file_of_one_path_are_refused_unless_each_has_its_directory(
    sessions: Sessions, local_user: User
) -> None:
    s = sessions
    for name in ("one", "two"):
        write_files(s.tmp_path / name, {"in": name.encode()})
    submitted = [
        s.host.submit(s.tmp_path / name, output_directories=["renders"])[0]
        for name in ("one", "two")
    ]
    roots = s.host.start(job_of(*submitted), s.session_dir).roots
    for root, name in zip(roots, ("one", "two"), strict=True):
        write_files(Path(root.local_root), {"renders/log": name.encode()})
    s.finish()

    with pytest.raises(ResultClashError, match="renders/log is an output of") as caught:
        local_user.get()
    assert "--by-root" in caught.value.hint

    local_user.get(by_root=True)
    assert sorted(local_user.files().values()) == [b"one", b"two"]


def test_o7_only_one_process_has_results_arrive_in_a_directory(
    sessions: Sessions, local_user: User
) -> None:
    ran(sessions, {"renders/a": b"a"})

    with arriving(local_user.to), pytest.raises(TransferStateError, match="another process"):
        local_user.get()

    assert local_user.get().files == 1


def test_o7_a_job_without_results_has_nothing_to_get(local_user: User) -> None:
    (local_user.host.home.parent / "store").mkdir()

    result = local_user.get()

    assert (result.files, result.executions) == (0, [])
    assert not local_user.to.exists()


@pytest.mark.slow
def test_o7_after_a_kill_nothing_looks_finished_and_the_next_get_goes_on(
    s3_sessions: Sessions, s3_user: User
) -> None:
    files: dict[str | bytes, bytes | int] = {
        f"renders/{n:03}": os.urandom(200_000) for n in range(30)
    }
    ran(s3_sessions, files)
    slow = Host(
        s3_user.host.home,
        s3_user.host.store_url,
        environment=s3_user.host.environment,
        store={"download_limit": "2 MiB"},
        settings={"cache": {"max_bytes": 1, "min_free": 0}},
    )
    command = User(slow, s3_user.to)
    process = slow.popen(*command.arguments("get", JOB, "--to", s3_user.to))
    deadline = time.monotonic() + 60
    while not any(
        p.is_file() for h in s3_user.to.parent.glob(".propmaster-*") for p in h.rglob("0*")
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)

    assert not s3_user.to.exists()
    assert len(s3_user.leftovers()) == 1

    result = s3_user.get()

    assert s3_user.files() == {os.fsdecode(path): data for path, data in files.items()}
    assert 0 < result.bytes_fetched < result.bytes
    assert s3_user.leftovers() == []


# ------------------------------------------------------------ the commands


def test_o7_the_commands_list_print_and_download(s3_sessions: Sessions, s3_user: User) -> None:
    one, two = ran(
        s3_sessions, {"renders/1.exr": b"one", "renders/bad\nname": b""}, {"renders/2.exr": b"two"}
    )

    listed = s3_user.run("ls", JOB[:12])
    printed = s3_user.run("cat", f"{JOB}/renders//2.exr")
    got = s3_user.run("get", JOB, "--to", s3_user.to, "--merge", "--json")
    as_json = json.loads(s3_user.run("ls", f"{JOB}/renders/1.exr", "--json").stdout)

    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.splitlines() == [
        f"execution {one}:",
        "     3 bytes  renders/1.exr",
        "     0 bytes  renders/bad\\nname",
        f"execution {two}:",
        "     3 bytes  renders/2.exr",
        f"3 files, 6 bytes, of {JOB}",
    ]
    assert (printed.returncode, printed.stdout) == (0, "two")
    assert json.loads(got.stdout)["files"] == 3
    [execution] = as_json["executions"]
    assert (execution["execution"], execution["step"], as_json["job"]) == (one, step(1), JOB)
    assert [entry["path"] for entry in execution["files"]] == ["renders/1.exr"]
    assert execution["files"][0]["hash"] == Digest.of(b"one").hex
    assert (s3_user.to / "renders/2.exr").read_bytes() == b"two"


def test_o7_without_to_a_folder_of_the_jobs_name_is_made_where_one_is(
    sessions: Sessions, local_user: User
) -> None:
    ran(sessions, {"renders/1": b"1"})
    local_user.host.home.mkdir(exist_ok=True)

    done = subprocess.run(
        local_user.host.argv(*local_user.arguments("get", JOB)),
        env=local_user.host.process_environment(),
        cwd=local_user.host.home,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert (local_user.host.home / JOB / "renders/1").read_bytes() == b"1"
    assert f"to {local_user.host.home / JOB}:" in done.stdout


REFUSED: list[tuple[list[str], int, str]] = [
    (["cat", f"{JOB}/renders/none"], 91, "there is no result renders/none"),
    (["cat", f"{JOB}/renders"], 66, "is a directory of results, with renders/1"),
    (["cat", f"{JOB}/renders/log"], 101, "renders/log: sessionaction-"),
    (["cat", f"{JOB}/renders/log"], 101, "hint: say which one is meant: --execution ID"),
    (["get", f"{JOB}/none"], 91, "there is no result none"),
    (["ls", "job-7777/../x"], 73, "below its root"),
    (["ls", "7777"], 66, "nor the beginning of one"),
    (["ls", "job-12345"], 66, "no job with outputs begins with job-12345"),
    (["ls", JOB, "--task-id", f"task-{'1' * 32}-0"], 2, "--task-id needs --step-id"),
]


def test_o7_what_can_not_be_done_is_told(sessions: Sessions, local_user: User) -> None:
    ran(sessions, {"renders/1": b"1", "renders/log": b"one"}, {"renders/log": b"two"})
    running = [local_user.host.popen(*local_user.arguments(*words)) for words, _, _ in REFUSED]

    for process, (_, code, words) in zip(running, REFUSED, strict=True):
        printed, told = process.communicate(timeout=60)
        assert words in told
        assert (process.returncode, printed) == (code, "")
    assert not (local_user.host.home / JOB).exists()


@pytest.mark.parametrize("is_there", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_t10_a_result_that_is_excluded_is_left_out_and_the_rest_comes(
    sessions: Sessions, local_user: User, is_there: bool
) -> None:
    """Seen to fail, where there was a directory, when the move looks for what did not come."""
    ran(sessions, {"renders/1": b"1", "renders/2": b"lost"})
    (sessions.tmp_path / f"store/Data/{Digest.of(b'lost').hex}.xxh128").unlink()
    if is_there:
        local_user.to.mkdir()
    with pytest.raises(BlobNotFoundError):
        local_user.get()
    set_get_tasks(local_user.host, ["renders/2"], TaskStatus.ONHOLD)
    waiting = in_background(local_user.get)
    await_that(lambda: waits(local_user.host))
    set_get_tasks(local_user.host, ["renders/2"], TaskStatus.EXCLUDED)

    result = waiting()

    assert local_user.files() == {"renders/1": b"1"}
    assert (result.files, result.excluded) == (1, ["renders/2"])
    assert local_user.leftovers() == []


def test_o7_the_beginning_of_an_id_that_several_jobs_have_is_refused(
    sessions: Sessions, local_user: User
) -> None:
    write_files(sessions.source, {"a": b"a"})
    submitted, _ = sessions.host.submit(sessions.source, output_directories=["renders"])
    ids = ["job-" + "ab" + "c" * 29 + last for last in "12"]
    for number, job_id in enumerate(ids):
        session_dir = sessions.tmp_path / f"sessions/{number}"
        job = job_of(submitted, jobId=job_id)
        root = Path(sessions.host.start(job, session_dir).roots[0].local_root)
        write_files(root, {"renders/a": b"1"})
        sessions.host.finish_task(session_dir, action(1, 0))

    with local_user.host.services() as context:
        assert find_job(context, FARM, QUEUE, ids[0]) == ids[0]
        with pytest.raises(
            JobInvalidError, match=f"2 jobs begin with job-abcc: {ids[0]}, {ids[1]}"
        ):
            find_job(context, FARM, QUEUE, "job-abcc")


# ------------------------------------------------------------ cat


def test_o7_cat_prints_large_files_and_ends_quietly_when_nobody_reads(
    s3_sessions: Sessions, s3_user: User
) -> None:
    data = os.urandom(12 * MEBIBYTE + 123)
    ran(s3_sessions, {"renders/big": data})
    arguments = s3_user.arguments("cat", f"{JOB}/renders/big")

    whole = subprocess.run(
        s3_user.host.argv(*arguments),
        env=s3_user.host.process_environment(),
        capture_output=True,
        check=False,
        timeout=60,
    )
    process = subprocess.Popen(
        s3_user.host.argv(*arguments),
        env=s3_user.host.process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(10) == data[:10]
    process.stdout.close()
    _, errors = process.communicate(timeout=60)

    assert (whole.returncode, whole.stderr) == (0, b"")
    assert whole.stdout == data
    assert errors == b""
    assert process.returncode == 1


@pytest.mark.parametrize("size", [1000, 9 * MEBIBYTE])
def test_o7_cat_of_damaged_content_fails_and_prints_nothing_of_a_small_one(
    sessions: Sessions, local_user: User, size: int, expected_events: set[str]
) -> None:
    expected_events.add(events.REQUEST_RETRIED)
    data = os.urandom(size)
    ran(sessions, {"renders/x": data})
    blob = sessions.tmp_path / f"store/Data/{Digest.of(data).hex}.xxh128"
    blob.chmod(0o644)
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    done = subprocess.run(
        local_user.host.argv(*local_user.arguments("cat", f"{JOB}/renders/x")),
        env=local_user.host.process_environment(),
        capture_output=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 71
    assert len(done.stdout) == (0 if size == 1000 else size)
    assert b"error[blob-corrupt]" in done.stderr
