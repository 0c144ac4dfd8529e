"""Who may ask for which directory, by what is on the way to it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.errors import NotAllowedError, SettingsInvalidError
from agent_plugin.settings import WorkerSettings
from agent_plugin.workers.call import JobUser
from agent_plugin.workers.rights import (
    Peer,
    check_mapped_root,
    check_mount_point,
    check_session_directory,
)

JOB_USER = JobUser(uid=61002, gid=61012)
PEER = Peer(pid=1, uid=61002, gid=61002, groups=frozenset({61012}))
SETTINGS = WorkerSettings()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on the way to which everything is root's."""
    if os.geteuid() != 0:
        pytest.skip("giving files to others needs root")
    directory = Path(tempfile.mkdtemp(prefix="propmaster-rights-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def made(path: Path, *, owner: int = 0, group: int = 0, mode: int = 0o755) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, owner, group)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("uid", "groups", "mode", "allowed"),
    [
        (61002, {61012}, 0o770, True),
        (61002, {61012}, 0o750, False),
        (61002, {61012}, 0o2770, True),
        (61002, set(), 0o770, False),
        (61002, set(), 0o775, False),
        (0, set(), 0o700, True),
    ],
)
def test_a_peer_may_ask_for_what_the_kernel_would_let_it_write_to(
    place: Path, uid: int, groups: set[int], mode: int, allowed: bool
) -> None:
    session_dir = made(place / "s", group=61012, mode=mode)
    peer = Peer(1, uid, uid, frozenset(groups))

    if not allowed:
        with pytest.raises(NotAllowedError):
            check_session_directory(str(session_dir), peer, SETTINGS)
    else:
        expected = None if uid == 0 else JobUser(uid, 61012)
        assert check_session_directory(str(session_dir), peer, SETTINGS) == expected


def test_only_the_agents_user_makes_session_directories(place: Path) -> None:
    """A directory that many share, such as a spool of root's, is none."""
    theirs = made(place / "spool", group=61012, mode=0o770)
    settings = WorkerSettings(agent_user="nobody")
    made(place / "agents", owner=65534, group=61012, mode=0o770)

    assert check_session_directory(str(place / "agents"), PEER, settings) == JOB_USER
    with pytest.raises(NotAllowedError):
        check_session_directory(str(theirs), PEER, settings)
    with pytest.raises(SettingsInvalidError, match="no-such-user"):
        check_session_directory(str(theirs), PEER, WorkerSettings(agent_user="no-such-user"))


def test_session_directories_are_below_the_listed_roots(place: Path) -> None:
    session_dir = made(place / "sessions/s", group=61012, mode=0o770)

    listed = WorkerSettings(session_roots=[place / "sessions"])
    assert check_session_directory(str(session_dir), PEER, listed) == JOB_USER
    with pytest.raises(NotAllowedError, match="none of the directories"):
        check_session_directory(
            str(session_dir), PEER, WorkerSettings(session_roots=[place / "other"])
        )


@pytest.mark.parametrize(("owner", "mode"), [(0, 0o775), (0, 0o777), (61002, 0o755)])
def test_a_directory_on_the_way_that_others_can_change_is_refused(
    place: Path, owner: int, mode: int
) -> None:
    session_dir = made(place / "way/s", group=61012, mode=0o770)
    made(place / "way", owner=owner, group=61012, mode=mode)

    with pytest.raises(NotAllowedError, match="could be changed by others"):
        check_session_directory(str(session_dir), PEER, SETTINGS)


def test_a_sticky_directory_on_the_way_is_as_good_as_a_closed_one(place: Path) -> None:
    session_dir = made(place / "way/s", group=61012, mode=0o770)
    made(place / "way", mode=0o1777)

    assert check_session_directory(str(session_dir), PEER, SETTINGS) == JOB_USER


# ------------------------------------------------------------------------------- roots elsewhere


def check(root: Path, settings: WorkerSettings = SETTINGS, user: JobUser | None = JOB_USER) -> bool:
    try:
        check_mapped_root(root, Path("/sessions/s"), user, settings)
    except NotAllowedError:
        return False
    return True


def test_a_job_may_have_its_files_in_a_directory_that_it_may_write_to(place: Path) -> None:
    assert check(made(place / "own", owner=61002, mode=0o700))
    assert check(made(place / "shared", group=61012, mode=0o770))
    assert not check(made(place / "closed", mode=0o755))
    assert not check(place / "absent")
    assert check(place / "closed", user=None)


def test_a_root_that_the_job_could_replace_by_a_link_is_refused(place: Path) -> None:
    """Else the service would write where the link leads, with rights that the job has not."""
    made(place / "home", owner=61002)
    assert not check(made(place / "home/files", owner=61002))
    made(place / "many", mode=0o1777)
    assert not check(made(place / "many/files", owner=61002))
    (place / "link").symlink_to(made(place / "own", owner=61002))
    assert not check(place / "link")


def test_in_the_session_a_root_is_right_in_its_directory() -> None:
    """All that is deeper is below a name that the job can put a link in the place of."""
    assert check(Path("/sessions/s/assetroot"))
    assert not check(Path("/sessions/s/jobs-own/assetroot"))
    assert check(Path("/sessions/s/jobs-own/assetroot"), user=None)


def test_the_operator_lists_roots_that_jobs_may_use(place: Path) -> None:
    listed = WorkerSettings(mapped_roots=[place / "show"])
    made(place / "show", mode=0o755)
    made(place / "show/shot")
    made(place / "show/open", mode=0o777)

    assert check(place / "show", listed)
    assert check(place / "show/shot", listed)
    assert check(place / "show/absent", listed)
    assert not check(place / "show/open/inside", listed), "a job could put a link there"
    assert not check(place / "shows", listed)
    assert not check(place / "show/../closed", listed)


def test_a_job_mounts_over_no_directory_that_it_shares_with_others(place: Path) -> None:
    """Such as /var/tmp, which would be the job's then."""

    def check_mount(at: Path, settings: WorkerSettings = SETTINGS) -> bool:
        try:
            check_mount_point(at, Path("/sessions/s"), JOB_USER, settings)
        except NotAllowedError:
            return False
        return True

    sticky = made(place / "sticky", mode=0o1777)
    shared = made(place / "shared", group=61012, mode=0o770)

    assert check(sticky)
    assert not check_mount(sticky)
    assert not check_mount(shared)
    assert not check_mount(place / "closed")
    assert check_mount(shared, WorkerSettings(mapped_roots=[shared]))
    assert check_mount(made(place / "own", owner=61002, mode=0o700))
    assert check_mount(Path("/sessions/s/assetroot"))
