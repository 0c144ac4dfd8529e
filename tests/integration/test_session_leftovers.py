"""What a killed hook, or a job, left in the way of the next hook."""

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.leftovers import partial_name
from agent_plugin.session.inputs import hidden_root
from agent_plugin.session.roots import session_directory_name
from tests.servers.disks import MEBIBYTE, fill, tmpfs_mounted
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action, step
from tests.servers.local_farm import FILES, Farm
from tests.servers.other_user import NOBODY, run_as_nobody
from tests.servers.s3_server import S3Server
from tests.servers.sessions import Sessions, paths_of
from tests.servers.trees import files_below

# Of three parts, of which those after the first do not come while `held_up` holds them up.
LARGE_BYTES = 20 * MEBIBYTE
LATER_PARTS = re.compile(r"^GET .* bytes=(?!0-)")


@pytest.fixture
def held_up(s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, tmp_path: Path) -> Sessions:
    """Sessions on a host behind the proxy."""
    environment = s3.environment_at(fault_proxy.url)
    url = f"s3://{s3.bucket}/{s3_prefix}"
    return Sessions(tmp_path, Host(tmp_path / "host", url, environment=environment))


# ---------------------------------------------------------------------------------- hidden roots


def test_a_root_shows_nothing_that_a_killed_start_of_another_job_left(sessions: Sessions) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    sessions.host.end(sessions.session_dir)
    hidden = hidden_root(root)
    for name in ("tex/of another job", "whole/directory/x", partial_name("Fold-x"), "scene.usd"):
        (hidden / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).write_bytes(b"of another job")
    (hidden / "link").symlink_to("/etc")

    assert sessions.started(job) == root

    assert files_below(root) == files_below(sessions.source)
    assert not (root / "whole").exists()
    assert not (root / "link").is_symlink()
    assert sorted(sessions.session_dir.iterdir()) == [root]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_a_job_puts_in_a_hidden_roots_place_is_removed_and_not_followed(
    sessions: Sessions, kind: str
) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    sessions.host.end(sessions.session_dir)
    outside = sessions.tmp_path / "outside"
    outside.mkdir()
    if kind == "link":
        hidden_root(root).symlink_to(outside)
    else:
        hidden_root(root).write_bytes(b"")

    assert sessions.started(job) == root

    assert not root.is_symlink()
    assert files_below(root) == files_below(sessions.source)
    assert list(outside.iterdir()) == []


def test_an_empty_root_that_is_there_keeps_its_owner_and_mode(sessions: Sessions) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    sessions.host.end(sessions.session_dir)
    root.mkdir()
    owner = (65534, 65534) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(root, *owner)
    root.chmod(0o2750)

    sessions.started(job)

    status = root.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o2750, *owner)
    assert files_below(root) == files_below(sessions.source)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_an_empty_root_that_is_a_mount_point_is_filled_in_place(
    sessions: Sessions, kind: str
) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    sessions.host.end(sessions.session_dir)
    with tmpfs_mounted(root, size=80 * MEBIBYTE):
        other = sessions.tmp_path / "other"
        other.mkdir()
        if kind == "bind":
            subprocess.run(["umount", root], check=True)
            subprocess.run(["mount", "--bind", other, root], check=True)

        sessions.started(job)

        assert files_below(root) == files_below(sessions.source)
        assert root.stat().st_dev == (other.stat().st_dev if kind == "bind" else root.stat().st_dev)
        sessions.host.end(sessions.session_dir)
        assert list(root.iterdir()) == []


# ------------------------------------------------------------------------------- temporary files


def await_partial(directory: Path, label: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not list(directory.glob(partial_name(label))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the command placed nothing"
        time.sleep(0.001)


def test_what_a_killed_sync_step_left_is_no_output_and_goes_with_the_next_step(
    held_up: Sessions, fault_proxy: FaultProxy
) -> None:
    sessions = held_up
    root = sessions.started(sessions.submitted())
    with (root / "renders/large").open("wb") as file:
        file.truncate(LARGE_BYTES)
    sessions.host.finish_task(sessions.session_dir, action(1, 0))
    (root / "renders/note").write_bytes(b"of step 2")
    sessions.host.finish_task(sessions.session_dir, action(2, 0))
    (root / "renders/large").unlink()
    (root / "renders/note").unlink()
    shutil.rmtree(sessions.host.cache_dir)
    fault_proxy.inject(Fault.STALL, what=LATER_PARTS)

    process = sessions.host.popen(
        "session", "sync-step", "--session-dir", sessions.session_dir,
        "--step-id", step(3), "--depends-on", step(1),
    )  # fmt: skip
    # Of a transfer, whose number it begins with; planning makes a file for a moment as well.
    await_partial(root, "[0-9]*", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    fault_proxy.clear()
    [left] = root.glob(partial_name("[0-9]*"))

    sessions.host.sync_step(sessions.session_dir, step(4), [step(2)])
    assert not left.exists()
    assert (root / "renders/note").read_bytes() == b"of step 2"
    sessions.host.sync_step(sessions.session_dir, step(3), [step(1)])
    left = root / "renders" / left.name
    left.write_bytes(b"as if the kill had come now, to a small file")
    finished = sessions.host.finish_task(sessions.session_dir, action(4, 0))
    assert paths_of(sessions.host, finished) == [[]]
    assert left.exists(), "finish-task changes no files"


# -------------------------------------------------------------------------------------------- end


@pytest.mark.parametrize("restarted", [False, True])
def test_a_root_that_a_killed_sync_step_added_goes_with_the_session(
    held_up: Sessions, fault_proxy: FaultProxy, restarted: bool
) -> None:
    sessions = held_up
    elsewhere = sessions.tmp_path / "sessions/other"
    other = sessions.submitted({"a": b"a"}, "out", root="other")
    made = Path(sessions.host.start(other, elsewhere).roots[0].local_root) / "out"
    made.mkdir()
    with (made / "large").open("wb") as file:
        file.truncate(LARGE_BYTES)
    sessions.host.finish_task(elsewhere, action(1, 0))
    job = sessions.submitted()
    root = sessions.started(job)
    shutil.rmtree(sessions.host.cache_dir)
    fault_proxy.inject(Fault.STALL, what=LATER_PARTS)

    process = sessions.host.popen(
        "session", "sync-step", "--session-dir", sessions.session_dir,
        "--step-id", step(2), "--depends-on", step(1),
    )  # fmt: skip
    await_partial(sessions.session_dir, "assetroot-*", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    fault_proxy.clear()
    added = root.with_name(session_directory_name(str(sessions.tmp_path / "other")))
    assert [path for path in sessions.session_dir.iterdir() if path != root] == [hidden_root(added)]
    if restarted:
        sessions.started(job)
    removed = sessions.host.end(sessions.session_dir).removed

    assert sorted(removed) == sorted([str(root), str(added)])
    assert list(sessions.session_dir.iterdir()) == []


def test_a_session_that_is_started_again_has_the_roots_of_its_job(sessions: Sessions) -> None:
    elsewhere = sessions.tmp_path / "sessions/other"
    other = sessions.submitted({"a": b"a"}, "out", root="other")
    made = Path(sessions.host.start(other, elsewhere).roots[0].local_root) / "out"
    made.mkdir()
    (made / "x").write_bytes(b"x")
    sessions.host.finish_task(elsewhere, action(1, 0))
    job = sessions.submitted()
    root = sessions.started(job)
    [added] = sessions.host.sync_step(sessions.session_dir, step(2), [step(1)]).roots

    again = sessions.host.start(job, sessions.session_dir)

    assert [found.local_root for found in again.roots] == [str(root)]
    assert sessions.host.sync_step(sessions.session_dir, step(2), [step(1)]).roots == [
        msgspec.structs.replace(added, bytes_fetched=0, bytes_reused=1)
    ]
    assert len(sessions.host.end(sessions.session_dir).removed) == 2


def test_a_session_on_a_full_disk_is_ended_and_its_files_go(farm: Farm) -> None:
    job = farm.submit(FILES)
    with tmpfs_mounted(farm.tmp_path / "disk", size=72 * MEBIBYTE) as disk:
        host = farm.host(state_dir=disk / "state")
        session = disk / "session"
        root = Path(host.start(job, session).roots[0].local_root)
        for path in host.state_dir.glob("ledger.db*"):
            path.unlink()
        fill(disk)

        done = host.run("session", "end", "--session-dir", session)

        assert done.returncode == 0, done.stderr
        assert not root.exists()
        assert list((host.state_dir / "sessions").iterdir()) == []


def test_a_session_is_ended_without_a_ledger(farm: Farm, expected_events: set[str]) -> None:
    expected_events.add(events.LEDGER_UNAVAILABLE)
    job = farm.submit(FILES)
    host = farm.host()
    root = farm.assert_starts(host, job)
    for path in host.state_dir.glob("ledger.db*"):
        path.unlink()
    (host.state_dir / "ledger.db").mkdir()

    assert host.end(farm.tmp_path / "session").removed == [str(root)]

    assert not root.exists()
    assert host.read_state(farm.tmp_path / "session") is None


def test_a_session_is_ended_with_a_cache_that_others_could_write(
    farm: Farm, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    job = farm.submit(FILES)
    host = farm.host()
    root = farm.assert_starts(host, job)
    host.cache_dir.chmod(0o777)

    assert host.end(farm.tmp_path / "session").removed == [str(root)]

    assert not root.exists()
    assert host.read_state(farm.tmp_path / "session") is None


@pytest.fixture
def of_nobody(open_farm: Farm) -> Path:
    """Return a started session's directory; service and job are one user here, and not root.

    Root is kept from nothing by a mode.
    """
    place = open_farm.tmp_path / "place"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    session = place / "session"
    arguments = open_farm.host().start_arguments(open_farm.submit(FILES), session)
    started = run_as_nobody(open_farm.host(), arguments)
    assert started.returncode == 0, started.stderr
    return session


def test_what_a_task_made_read_only_goes_at_the_end(open_farm: Farm, of_nobody: Path) -> None:
    [root] = of_nobody.iterdir()
    (root / "cache/deep").mkdir(parents=True)
    (root / "cache/deep/x").write_bytes(b"1")
    for path in (root / "cache/deep/x", root / "cache/deep", root / "cache", root, of_nobody):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o555)

    ended = run_as_nobody(open_farm.host(), ["session", "end", "--session-dir", of_nobody])

    assert ended.returncode == 0, ended.stderr
    assert list(of_nobody.iterdir()) == []
    assert list((open_farm.host().state_dir / "sessions").iterdir()) == []


def test_what_can_not_be_removed_at_the_end_is_named_and_the_end_can_be_tried_again(
    open_farm: Farm, of_nobody: Path
) -> None:
    [root] = of_nobody.iterdir()
    (root / "theirs/deep").mkdir(parents=True)
    arguments = ["session", "end", "--session-dir", str(of_nobody)]

    ended = run_as_nobody(open_farm.host(), arguments)

    assert ended.returncode == 80, ended.stderr
    assert f"error[local-write-failed]: {root}/theirs/deep: Permission denied" in ended.stderr
    os.chown(root / "theirs", NOBODY, NOBODY)
    again = run_as_nobody(open_farm.host(), arguments)
    assert again.returncode == 0, again.stderr
    assert list(of_nobody.iterdir()) == []


def test_links_that_a_job_put_in_the_places_of_roots_are_removed_at_the_end(
    sessions: Sessions,
) -> None:
    root = sessions.started(sessions.submitted())
    outside = sessions.tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"mine")
    root.rename(outside / "moved")
    root.symlink_to(outside)
    hidden_root(root).symlink_to(outside)

    assert sessions.host.end(sessions.session_dir).removed == [str(root)]

    assert list(sessions.session_dir.iterdir()) == []
    assert (outside / "precious").read_bytes() == b"mine"
