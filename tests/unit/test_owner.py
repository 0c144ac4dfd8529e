"""Files and directories for another user: with whose rights they are made, and whose they are."""

import codecs
import os
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import LocalReadError, LocalWriteError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.owner import Owner, acting, make_directories
from agent_plugin.content.safe_path import Root
from agent_plugin.transfer.placement import REFLINK_MIN_BYTES, Placer
from agent_plugin.transfer.plan import plan_download
from tests.servers.disks import image_mounted
from tests.servers.other_user import NOBODY

GROUP = 54321
MTIME = 1_622_505_600_123_457

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others can get to: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="propmaster-owner-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture
def session(place: Path) -> Path:
    """A session directory, as the agent makes it for a job's user."""
    directory = place / "session"
    directory.mkdir()
    directory.chmod(0o770)
    if os.geteuid() == 0:
        os.chown(directory, -1, NOBODY)
    return directory


@contextmanager
def being_in_group(group: int) -> Iterator[None]:
    """Make this process a user that is not root, and in a group."""
    # Loaded now: the Python that runs the tests may be in a directory of root's.
    codecs.lookup("ascii")
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups([group])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def entry(path: str, data: bytes) -> FileEntry:
    digest = Digest.of(data)
    return FileEntry(digest.hex, MTIME, path, digest.size)


def facts(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def place_all(directory: Path, owner: Owner | None, *, follow: bool) -> None:
    """Place a small file, a copy and a staged file, in directories of their own."""
    with Placer(directory, "label", follow=follow, owner=owner) as placer:
        placer.place_data(entry("small/er/file", b"small"), b"small")
        source = os.memfd_create("blob")
        os.write(source, b"copied")
        placer.place_copy(entry("copy/file", b"copied"), source)
        os.close(source)
        staged = placer.stage()
        os.write(staged.fd, b"staged")
        placer.place_staged(entry("staged/file", b"staged"), staged)
        staged.close()


@needs_root
@pytest.mark.parametrize(
    ("follow", "file_mode", "directory_mode"), [(False, 0o660, 0o770), (True, 0o644, 0o755)]
)
def test_everything_that_is_made_is_the_users(
    session: Path, follow: bool, file_mode: int, directory_mode: int
) -> None:
    """Whatever this process's umask is."""
    root = session / "made" / "root"
    umask = os.umask(0o077)
    try:
        place_all(root, Owner(NOBODY, NOBODY), follow=follow)
    finally:
        os.umask(umask)

    found = {path: facts(path) for path in (root.parent, root, *root.rglob("*"))}
    assert {path.name for path in found if path.is_file()} == {"file"}
    assert len(found) == 9
    for path, fact in found.items():
        mode = file_mode if path.is_file() else (0o755 if follow else 0o770)
        assert fact == (NOBODY, NOBODY, mode), path
        if path.is_file():
            assert path.stat().st_mtime_ns == MTIME * 1000
    assert directory_mode in {mode for _, _, mode in found.values()}


def place_until_killed(directory: Path, owner: Owner, call: str) -> None:
    """Place a small file in a process that is killed when it comes to one of the owner's calls."""
    child = os.fork()
    if child == 0:
        setattr(Owner, call, lambda *_args, **_rights: os.kill(os.getpid(), signal.SIGKILL))
        with Placer(directory, "label", direct=True, follow=False, owner=owner) as placer:
            placer.place_data(entry("file", b"small"), b"small")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@needs_root
@pytest.mark.parametrize("call", ["give_file", "_mode"])
def test_what_was_not_the_users_yet_when_its_process_was_killed_is_placed_anew(
    session: Path, call: str
) -> None:
    """All of its bytes are there, and he may not read them."""
    owner, root = Owner(NOBODY, NOBODY), session / "hidden"
    make_directories(root, owner, shared=False)
    place_until_killed(root, owner, call)
    assert (root / "file").read_bytes() == b"small"

    manifest = Manifest.of([entry("file", b"small")])
    plan = plan_download(
        manifest, root, None, hidden=True, exclusive=True, follow_root=False, owner=owner
    )
    assert (list(plan.wanted), plan.kept) == ([entry("file", b"small").digest], [])
    with Placer(root, "label", direct=True, follow=False, owner=owner) as placer:
        placer.place_data(entry("file", b"small"), b"small")

    assert facts(root / "file") == (NOBODY, NOBODY, 0o660)
    plan = plan_download(
        manifest, root, None, hidden=True, exclusive=True, follow_root=False, owner=owner
    )
    assert (list(plan.wanted), len(plan.kept)) == ([], 1), "what is the user's stays"


@needs_root
def test_without_root_too_what_was_not_the_users_yet_is_placed_anew(session: Path) -> None:
    os.chown(session, NOBODY, GROUP)
    owner, root = Owner(NOBODY - 1, GROUP), session / "hidden"
    manifest = Manifest.of([entry("file", b"small"), entry("given", b"small")])
    with being_in_group(GROUP):
        make_directories(root, owner, shared=False)
        place_until_killed(root, owner, "give_file")
        with Placer(root, "label", direct=True, follow=False, owner=owner) as placer:
            placer.place_data(entry("given", b"small"), b"small")
        plan = plan_download(
            manifest, root, None, hidden=True, exclusive=True, follow_root=False, owner=owner
        )

    [[wanted]] = plan.wanted.values()
    assert (wanted.path, [kept.path for kept in plan.kept]) == ("file", ["given"])


@needs_root
@pytest.mark.parametrize("groups", [(GROUP,), ()], ids=["member", "no member"])
@pytest.mark.parametrize("owned", [True, False], ids=["for the user", "for oneself"])
def test_a_file_gets_the_group_of_a_directory_that_gives_its_own(
    place: Path, groups: tuple[int, ...], owned: bool
) -> None:
    """A large one is made above, where files may get another."""
    for name in ("copy", "small/er", "staged"):
        (place / name).mkdir(parents=True)
        os.chown(place / name, NOBODY, GROUP)
        (place / name).chmod(0o2775)
    place.chmod(0o777)
    owner = Owner(NOBODY, NOBODY, groups) if owned else None

    place_all(place, owner, follow=True)

    # Who is in no such group can not give it to a file that is there already.
    given = GROUP if groups or not owned else NOBODY
    found = [facts(place / name / "file")[1] for name in ("copy", "small/er", "staged")]
    assert found == [GROUP, GROUP, given]


@needs_root
def test_what_a_job_moves_in_the_place_of_a_new_directory_is_not_given_to_it(
    session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own directory it may move what is another user's, and is closed to it."""
    (session / "theirs").mkdir(mode=0o700)
    make = os.mkdir

    def make_and_swap(name: str, *, dir_fd: int) -> None:
        make(name, dir_fd=dir_fd)
        (session / name).rename(session / "aside")
        (session / "theirs").rename(session / name)

    with Root(session, follow=False, owner=Owner(NOBODY, NOBODY)) as root:
        monkeypatch.setattr(os, "mkdir", make_and_swap)
        with pytest.raises(LocalWriteError, match="Operation not permitted"):
            root.directory("new")

    assert facts(session / "new") == (0, 0, 0o700)
    assert (session / "aside").stat().st_uid == NOBODY


@needs_root
def test_a_staged_file_is_nobody_elses_until_it_has_its_place(session: Path) -> None:
    """Who could write to it could put bytes into the cache that were not verified."""
    owner = Owner(NOBODY, NOBODY)
    with Placer(session / "root", "label", follow=False, owner=owner) as placer:
        staged = placer.stage()
        status = os.fstat(staged.fd)
        clonable = placer._maker is None
        staged.close()

    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o600)
    assert clonable


@needs_root
@pytest.mark.parametrize("follow", [False, True])
def test_the_cache_shares_nothing_with_a_staged_file_that_is_the_users(
    place: Path, tmp_path: Path, follow: bool
) -> None:
    """On a file system whose files can share blocks."""
    owner = Owner(NOBODY, NOBODY)
    with image_mounted("xfs", tmp_path / "image", place / "disk") as disk:
        root = disk / "root"
        root.mkdir()
        os.chown(root, NOBODY, NOBODY)
        with Placer(root, "label", follow=follow, owner=owner) as placer:
            staged = placer.stage()
            os.truncate(staged.fd, 2 * REFLINK_MIN_BYTES)
            kept = os.open(disk / "kept", os.O_RDWR | os.O_CREAT, 0o600)
            whose, shares = os.fstat(staged.fd).st_uid, placer.can_clone(staged, kept)
            os.close(kept)
            staged.close()
        left = [*root.iterdir()]

    assert (whose, shares) == ((NOBODY, False) if follow else (0, True))
    assert left == []


@needs_root
def test_a_root_that_may_be_a_link_is_written_with_the_users_rights(
    place: Path, session: Path
) -> None:
    (place / "closed").mkdir(mode=0o700)
    (session / "root").symlink_to(place / "closed")
    owner = Owner(NOBODY, NOBODY)

    with pytest.raises((LocalWriteError, LocalReadError)):
        place_all(session / "root", owner, follow=True)
    assert [*(place / "closed").iterdir()] == []


@needs_root
def test_a_root_that_may_be_a_link_is_read_with_the_users_rights(
    place: Path, session: Path
) -> None:
    (place / "closed" / "below").mkdir(mode=0o755, parents=True)
    (session / "root").symlink_to(place)
    (session / "closed").symlink_to(place / "closed")
    (place / "closed").chmod(0o700)
    owner = Owner(NOBODY, NOBODY)

    with Root(session / "root", owner=owner) as root, pytest.raises(LocalReadError):
        root.directory("closed", create=False)
    with pytest.raises(LocalReadError):
        Root(session / "closed", owner=owner)


@needs_root
def test_the_groups_of_the_user_count(place: Path) -> None:
    (place / "project").mkdir()
    (place / "project").chmod(0o2770)
    os.chown(place / "project", 0, GROUP)

    with pytest.raises((LocalWriteError, LocalReadError)):
        place_all(place / "project", Owner(NOBODY, NOBODY), follow=True)
    place_all(place / "project", Owner(NOBODY, NOBODY, (GROUP,)), follow=True)

    assert facts(place / "project" / "copy" / "file") == (NOBODY, GROUP, 0o644)


@needs_root
def test_a_file_that_the_user_may_not_read_is_not_read_for_him(session: Path) -> None:
    """He may have linked to it, where the kernel lets him."""
    (session / "secret").write_text("secret")
    (session / "secret").chmod(0o600)
    (session / "shared").write_text("shared")
    (session / "shared").chmod(0o644)

    with Root(session, follow=False, owner=Owner(NOBODY, NOBODY)) as root:
        os.close(root.open_file("shared"))
        with pytest.raises(LocalReadError, match="Permission denied"):
            root.open_file("secret")


@needs_root
def test_the_rights_are_those_of_one_thread_and_end_with_the_block(place: Path) -> None:
    (place / "closed").mkdir(mode=0o700)
    owner = Owner(NOBODY, NOBODY, (GROUP,))
    groups, acting_now, others = os.getgroups(), threading.Event(), []

    def try_meanwhile() -> None:
        acting_now.wait(60)
        others.append(_may_write(place / "closed"))

    thread = threading.Thread(target=try_meanwhile)
    thread.start()
    with owner.acting(), owner.acting():
        mine = _may_write(place / "closed")
        acting_now.set()
        thread.join(60)
    with pytest.raises(ValueError, match="stopped"), acting(owner):
        raise ValueError("stopped")

    assert (mine, others, _may_write(place / "closed")) == (False, [True], True)
    assert os.getgroups() == groups


def _may_write(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "probe", os.O_WRONLY | os.O_CREAT, 0o600))
    except PermissionError:
        return False
    return True


@needs_root
def test_without_root_the_group_can_do_all_and_what_it_makes_stays_in_reach(place: Path) -> None:
    session = place / "session"
    session.mkdir()
    session.chmod(0o770)
    os.chown(session, NOBODY, GROUP)

    with being_in_group(GROUP):
        place_all(session / "root", Owner(NOBODY - 1, GROUP), follow=False)

    assert facts(session / "root") == (NOBODY, GROUP, 0o2770)
    assert facts(session / "root" / "small" / "er") == (NOBODY, GROUP, 0o2770)
    for name in ("small/er", "copy", "staged"):
        assert facts(session / "root" / name / "file") == (NOBODY, GROUP, 0o660)


@needs_root
@pytest.mark.parametrize(
    ("uid", "gid", "mode", "is_read"),
    [
        (NOBODY, 0, 0o600, False),
        (NOBODY, GROUP, 0o600, False),
        (NOBODY, 0, 0o640, False),
        (NOBODY, GROUP, 0o640, True),
        (NOBODY, GROUP + 1, 0o640, True),
        (NOBODY, 0, 0o604, True),
        (NOBODY - 1, GROUP, 0o640, True),
    ],
)
def test_without_root_a_file_that_the_user_may_not_read_is_not_read_for_him(
    session: Path, uid: int, gid: int, mode: int, is_read: bool
) -> None:
    """He may move there what this process can read, from a directory that he may write to."""
    (session / "file").write_text("of the agent's")
    os.chown(session / "file", uid, gid)
    (session / "file").chmod(mode)
    owner = Owner(NOBODY - 1, GROUP, (GROUP + 1,))

    with being_in_group(GROUP), Root(session, follow=False, owner=owner) as root:
        if is_read:
            os.close(root.open_file("file"))
            return
        with pytest.raises(LocalReadError, match="may not be read by user"):
            root.open_file("file")


@needs_root
def test_without_root_and_without_the_group_it_fails_by_name(place: Path) -> None:
    session = place / "session"
    session.mkdir()
    session.chmod(0o777)

    with being_in_group(GROUP + 1), pytest.raises(LocalWriteError, match="Operation not permitted"):
        place_all(session / "root", Owner(NOBODY - 1, GROUP), follow=False)


def test_a_file_where_a_directory_must_be_is_told(place: Path) -> None:
    (place / "file").touch()

    with pytest.raises(FileExistsError):
        make_directories(place / "file", Owner(os.geteuid(), os.getegid()), shared=False)
