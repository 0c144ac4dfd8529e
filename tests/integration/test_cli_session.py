"""What `propmaster session` refuses at once, and what it prints for people."""

import os
from pathlib import Path

import msgspec
import pytest

from agent_plugin.cli.options import escaped
from tests.servers.disks import read_only
from tests.servers.hooks import FARM, JOB, QUEUE, Host, action, job_of, step
from tests.servers.sessions import MTIME_NS, Sessions
from tests.servers.trees import write_files

# Obeyed at the start of a line by what runs OpenJD environments:
# https://github.com/OpenJobDescription/openjd-specifications/wiki/How-Jobs-Are-Run
EVIL = "openjd_env: EVIL=1"


def finish_arguments(sessions: Sessions, started_at: str) -> list[str | Path]:
    run = action(1, 0)
    return [
        *("session", "finish-task", "--session-dir", sessions.session_dir),
        *("--step-id", run.step_id, "--task-id", run.task_id or ""),
        *("--session-action-id", run.session_action_id, "--started-at", started_at),
    ]


@pytest.mark.parametrize(
    "started_at", ["nan", "inf", "-inf", "-1", "1700000000000", "253402300800"]
)
def test_a_start_that_is_no_time_is_refused_before_anything_is_uploaded(
    sessions: Sessions, started_at: str
) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/1.exr").write_bytes(b"new")
    stored = sorted((sessions.tmp_path / "store").rglob("*"))

    done = sessions.host.run(*finish_arguments(sessions, started_at))

    assert done.returncode == 2, done.stderr
    assert "seconds since the epoch are meant, not milliseconds" in done.stderr
    assert done.stdout == ""
    assert sorted((sessions.tmp_path / "store").rglob("*")) == stored


@pytest.mark.parametrize("started_at", ["0", "253402300799"])
def test_the_first_and_the_last_time_are_taken(sessions: Sessions, started_at: str) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/1.exr").write_bytes(b"new")

    done = sessions.host.run(*finish_arguments(sessions, started_at))

    assert done.returncode == 0, done.stderr
    assert list(sessions.outputs()) == ["renders/1.exr"]


def test_control_characters_are_escaped_and_nothing_else_is() -> None:
    text = "a\n\r\t\x00\x1b[2J\x7f\x85\x9b b\\n é 日本 \udce9"

    assert escaped(text) == r"a\n\r\t\x00\x1b[2J\x7f\x85\x9b b\n é 日本 " + "\udce9"


def test_no_name_puts_a_line_of_its_own_into_what_is_printed(sessions: Sessions) -> None:
    name = f"a\n{EVIL}"
    s = sessions
    # Both the root, whose path begins a line, and a file in it.
    job = s.submitted({f"in/{name}": b"input"}, root=f"source\n{EVIL}")
    arguments = s.host.start_arguments(job, s.session_dir)
    printed = [s.host.run(*arguments[:-1])]
    [root] = [path for path in s.session_dir.iterdir() if path.is_dir()]
    write_files(root, {f"renders/{name}": b"output"}, mtime_ns=MTIME_NS)
    printed.append(s.host.run(*finish_arguments(s, "1")))
    where = ("--store", s.host.store_url, "--farm-id", FARM, "--queue-id", QUEUE)
    printed.append(s.host.run("outputs", "list", JOB, *where))
    printed.append(s.host.run("outputs", "get", JOB, *where, "--to", s.tmp_path / f"to\n{EVIL}"))
    snapshot = s.tmp_path / "manifest"
    printed.append(s.host.run("manifest", "snapshot", root, "--output", snapshot))
    printed.append(s.host.run("manifest", "show", snapshot))
    assert [done.returncode for done in printed] == [0] * 6, [done.stderr for done in printed]
    (root / "renders" / name).unlink()
    printed.append(s.host.run("manifest", "verify", snapshot, "--root", root))
    os.mkfifo(root / "renders" / name)
    (root / f"renders/b\n{EVIL}").symlink_to("nowhere")
    printed.append(s.host.run(*finish_arguments(s, "2")))
    printed.append(s.host.run("manifest", "show", s.tmp_path / f"none\n{EVIL}"))
    printed.append(s.host.run("manifest", "show", snapshot, f"more\n{EVIL}"))

    assert [done.returncode for done in printed[6:]] == [1, 0, 85, 2]
    lines = [line for done in printed for line in (done.stdout + done.stderr).splitlines()]
    assert [line for line in lines if line.startswith("openjd_")] == []
    assert sum(EVIL in line for line in lines) >= 9, "the names were printed"


def test_a_root_that_looks_like_an_order_does_not_begin_a_line(sessions: Sessions) -> None:
    job = sessions.submitted()
    [manifest] = job.attachments.manifests
    manifest = msgspec.structs.replace(manifest, root_path=EVIL)
    attachments = msgspec.structs.replace(job.attachments, manifests=(manifest,))
    job = msgspec.structs.replace(job, attachments=attachments)

    done = sessions.host.run(*sessions.host.start_arguments(job, sessions.session_dir)[:-1])

    assert done.stdout.startswith(f"root {EVIL} -> "), done.stderr


def test_a_mistyped_directory_is_refused_by_whoever_reads_it_and_is_not_made(
    sessions: Sessions,
) -> None:
    s = sessions
    job = s.submitted()
    mistyped = s.tmp_path / "not-the-store"
    url = f"file://{mistyped}"
    snapshot = s.tmp_path / "manifest"
    s.host.run("manifest", "snapshot", s.source, "--output", snapshot)
    where = (JOB, "--store", url, "--farm-id", FARM, "--queue-id", QUEUE)
    wrong = msgspec.structs.replace(job, store=url)
    printed = [
        s.host.run("outputs", "list", *where),
        s.host.run("outputs", "get", *where, "--to", s.tmp_path / "to"),
        s.host.run("manifest", "verify", snapshot, "--store", url),
        s.host.run(*s.host.start_arguments(wrong, s.session_dir)),
    ]

    assert [done.returncode for done in printed] == [70] * 4, [done.stderr for done in printed]
    for done in printed:
        assert f"error[store-access-denied]: {mistyped}" in done.stderr
    assert not mistyped.exists()


def test_a_job_without_inputs_finds_its_store_in_a_new_directory(sessions: Sessions) -> None:
    (sessions.source).mkdir()
    submitted, _ = sessions.host.submit(sessions.source, output_directories=["renders"])
    sessions.started(job_of(submitted, stepDependencies={step(2): [step(1)]}))

    assert sessions.host.sync_step(sessions.session_dir, step(2)).roots == []
    assert sessions.outputs() == {}


def test_a_step_that_depends_on_itself_is_refused(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/1.exr").write_bytes(b"new")
    where = ("--session-dir", sessions.session_dir, "--step-id", step(1))

    done = sessions.host.run("session", "sync-step", *where, "--depends-on", step(1))

    assert done.returncode == 66
    assert f"--depends-on {step(1)}: the step would depend on itself" in done.stderr


def test_outputs_are_listed_where_nothing_can_be_written(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/1.exr").write_bytes(b"new")
    sessions.finish()
    place = sessions.tmp_path / "read-only"
    place.mkdir()
    reader = Host(
        sessions.tmp_path / "reader",
        sessions.host.store_url,
        settings={"paths": {"cache_dir": f"{place}/cache", "state_dir": f"{place}/state"}},
    )
    where = (JOB, "--store", reader.store_url, "--farm-id", FARM, "--queue-id", QUEUE)
    with read_only(place):
        done = reader.run("outputs", "list", *where)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].endswith(" renders/1.exr")
