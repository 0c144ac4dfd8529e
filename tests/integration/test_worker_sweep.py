"""A session that the agent has ended leaves nothing, though nobody said that it has."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.mount_table import read_mounts
from agent_plugin.workers.notes import note_session, noted_sessions
from agent_plugin.workers.sweep import sweep
from tests.servers.hooks import Host
from tests.servers.proxied_object import until
from tests.servers.service_host import service_host
from tests.servers.sessions import Sessions


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "host", f"file://{tmp_path}/store")
    yield host
    for mount in reversed(read_mounts()):
        if mount.mountpoint.startswith(f"{tmp_path}/sessions/"):
            host.mounts.end(Path(mount.mountpoint))


@pytest.fixture
def sessions(tmp_path: Path, host: Host) -> Sessions:
    return Sessions(tmp_path, host)


def noted(host: Host) -> list[str]:
    return [note.session_dir for note in noted_sessions(host.state_dir)]


def test_a_session_whose_directory_is_gone_is_ended(sessions: Sessions, host: Host) -> None:
    job = sessions.submitted()
    sessions.started(job)
    other = sessions.session_dir.with_name("session-2")
    host.start(job, other)
    note_session(host.state_dir, sessions.session_dir, os.getuid())
    note_session(host.state_dir, other, os.getuid())

    sweep(host.settings)
    assert host.read_state(sessions.session_dir) is not None
    shutil.rmtree(sessions.session_dir)
    sweep(host.settings)

    assert host.read_state(sessions.session_dir) is None
    assert host.read_state(other) is not None
    assert noted(host) == [str(other)]
    leases = [path.name for path in host.cache_dir.rglob("leases/*")]
    assert len(leases) <= 1


def test_a_session_that_nobody_noted_is_ended_as_well(sessions: Sessions, host: Host) -> None:
    sessions.session_dir = sessions.session_dir.with_name(os.fsdecode(b"scene\xe9"))
    sessions.started(sessions.submitted())
    shutil.rmtree(sessions.session_dir)

    sweep(host.settings)

    assert host.read_state(sessions.session_dir) is None


def test_a_directory_on_a_disk_that_is_not_there_is_not_gone(
    sessions: Sessions, host: Host
) -> None:
    sessions.started(sessions.submitted())
    sessions.session_dir.parent.rename(sessions.tmp_path / "elsewhere")

    sweep(host.settings)
    (sessions.tmp_path / "elsewhere").rename(sessions.session_dir.parent)

    assert host.read_state(sessions.session_dir) is not None


def test_a_session_that_a_call_works_on_is_left_until_it_has_ended(
    sessions: Sessions, host: Host
) -> None:
    sessions.started(sessions.submitted())
    shutil.rmtree(sessions.session_dir)

    with host.state(sessions.session_dir) as state_file:
        sweep(host.settings)
        assert state_file.read() is not None
    sweep(host.settings)

    assert host.read_state(sessions.session_dir) is None


def test_what_the_agent_could_not_remove_for_a_mount_is_removed(
    sessions: Sessions, host: Host
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    job = sessions.submitted()
    sessions.session_dir.mkdir(parents=True)
    manifests = sessions.session_dir / "manifests"
    manifests.mkdir()
    root = Path(host.start(job, sessions.session_dir, file_system="VIRTUAL").roots[0].local_root)
    note_session(host.state_dir, sessions.session_dir, os.getuid())
    sweep(host.settings)
    assert (root / "scene.usd").exists()

    manifests.rmdir()
    sweep(host.settings)

    assert not any(str(root) in mount.mountpoint for mount in read_mounts())
    assert not sessions.session_dir.exists()
    assert host.read_state(sessions.session_dir) is None
    assert noted(host) == []


def test_the_service_sweeps_when_it_starts() -> None:
    with service_host() as made:
        made.write_config()
        made.start()
        gone = made.session("gone")
        assert made.ask(gone, "who").returncode == 7
        state_dir = made.home / "private/state"
        assert [note.session_dir for note in noted_sessions(state_dir)] == [str(gone)]
        made.end()
        gone.rmdir()

        made.start()

        until(lambda: not [*noted_sessions(state_dir)])
