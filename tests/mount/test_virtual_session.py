"""A mounted session is a copied one to everybody but the network: same tree, same outputs."""

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import (
    BlobNotFoundError,
    MountFailedError,
    MountReadFailedError,
    SessionStateError,
)
from agent_plugin.content.events import fields_of
from agent_plugin.content.mount_table import read_mounts
from agent_plugin.content.store import Cancellation
from agent_plugin.session.job import JobDocument
from agent_plugin.session.mount_control import ask_mount, files_of_mount
from agent_plugin.session.state import FinishResult
from tests.servers.disks import tmpfs_mounted
from tests.servers.gate import always
from tests.servers.hooks import Host, action, job_with_outputs, step
from tests.servers.proxied_object import until
from tests.servers.sessions import Sessions, manifest_at
from tests.servers.trees import files_below

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

FILES: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "tex/wood.tx": 50_000,
    "tex/copy of wood.tx": 50_000,
    "tex/deep/er/stone.tx": 30_000,
    ".hidden/.rc": b"dots",
    "empty": b"",
    b"latin-\xe9/\xff": b"not UTF-8",
    "\U0001f3ac/\u00e9.bin": 7000,
    "renders/reference.exr": b"an input in an output directory",
    "renders/old/1.exr": 4000,
    "renders/old/2.exr": 5000,
}


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Where sessions are: below a directory of the name that is asked for."""
    return tmp_path / getattr(request, "param", "")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "host", f"file://{tmp_path}/store")
    yield host
    for mount in reversed(read_mounts()):
        if mount.mountpoint.startswith(f"{tmp_path}/"):
            host.mounts.end(Path(mount.mountpoint))
    assert [m for m in read_mounts() if m.mountpoint.startswith(f"{tmp_path}/")] == []


@pytest.fixture
def sessions(place: Path, host: Host) -> Sessions:
    return Sessions(place, host)


@pytest.fixture
def job(sessions: Sessions) -> JobDocument:
    return sessions.submitted(dict(FILES), "renders", "tex")


def start(sessions: Sessions, job: JobDocument, file_system: str = "VIRTUAL") -> Path:
    [root] = sessions.host.start(job, sessions.session_dir, file_system=file_system).roots
    assert (root.file_system, root.reason) == (file_system, "")
    return Path(root.local_root)


def fetched(host: Host, root: Path) -> int:
    answer = ask_mount(host.mounts.control_of(root), {"ask": "status"})
    count: int = json.loads(answer)["counts"]["bytes_fetched"]
    return count


def outputs_of(host: Host, result: FinishResult) -> dict[str, tuple[str, int]]:
    return {
        entry.path: (entry.hash, entry.size)
        for found in result.manifests
        if found.output_manifest_path
        for entry in manifest_at(host, found.output_manifest_path).entries
    }


def test_the_tree_is_the_submitted_one_and_only_what_is_read_moves(
    sessions: Sessions, job: JobDocument
) -> None:
    root = start(sessions, job)

    assert fetched(sessions.host, root) == 0
    assert (root / "tex/wood.tx").stat().st_size == 50_000
    assert fetched(sessions.host, root) == 0
    (root / "tex/wood.tx").read_bytes()
    assert fetched(sessions.host, root) == 50_000
    assert files_below(root) == files_below(sessions.source)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def _anew(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "1.exr").write_bytes(b"another")


def _renamed_and_touched(root: Path) -> None:
    (root / "tex/wood.tx").rename(root / "renders/w.tx")
    os.utime(root / "renders/w.tx", ns=(0, 1_700_000_000_000_000_000))


def _renamed_and_changed(root: Path) -> None:
    (root / "renders/old").rename(root / "renders/b")
    (root / "renders/b/1.exr").unlink()
    (root / "renders/b/2.exr").write_bytes(b"changed")
    (root / "renders/b/3.exr").write_bytes(b"new")


def _renamed_twice(root: Path) -> None:
    (root / "tex/deep").rename(root / "renders/deep")
    (root / "renders/deep/er").rename(root / "renders/er")


def _becomes_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(b"inside")


def _becomes_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"a file now")


def _becomes_fifo(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    os.mkfifo(path)


def _becomes_link(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def _swapped(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def _linked_and_removed(root: Path) -> None:
    os.link(root / "tex/wood.tx", root / "renders/hard")
    (root / "tex/wood.tx").unlink()


def _renamed_and_touched_inside(root: Path) -> None:
    (root / "renders/old").rename(root / "renders/b")
    (root / "renders/b/1.exr").chmod(0o600)


def _renamed_and_partly_back(root: Path) -> None:
    (root / "renders/old").rename(root / "renders/b")
    (root / "renders/old").mkdir()
    (root / "renders/b/1.exr").rename(root / "renders/old/1.exr")


def _renamed_over_emptied(root: Path) -> None:
    for path in (root / "renders/old").iterdir():
        path.unlink()
    (root / "tex/deep").rename(root / "renders/old")


def _touched_then_renamed_above(root: Path) -> None:
    (root / "renders/old/1.exr").chmod(0o600)
    (root / "renders/old").rename(root / "renders/b")
    (root / "renders/b/1.exr").rename(root / "renders/one")
    (root / "renders/one").rename(root / "renders/b/2.exr")


def _renamed_and_back(root: Path) -> None:
    (root / "renders/old").rename(root / "tex/old")
    (root / "tex/old/2.exr").unlink()
    (root / "tex/old").rename(root / "renders/old")


EDITS: dict[str, Callable[[Path], object]] = {
    "a new file": lambda root: (root / "renders/new.exr").write_bytes(b"new"),
    "a new directory": lambda root: shutil.copytree(root / "tex", root / "renders/tex"),
    "a dotfile": lambda root: (root / "renders/.state").write_bytes(b"dot"),
    "an input that is appended to": lambda root: _append(root / "tex/wood.tx"),
    "an input that is truncated": lambda root: (root / "renders/old/1.exr").write_bytes(b""),
    "an input written as it was": lambda root: _rewrite(root / "renders/reference.exr"),
    "an input that is touched": lambda root: os.utime(root / "tex/wood.tx"),
    "an input whose mode changes": lambda root: (root / "tex/wood.tx").chmod(0o600),
    "an input that is removed": lambda root: (root / "renders/old/2.exr").unlink(),
    "a directory that is removed": lambda root: shutil.rmtree(root / "renders/old"),
    "a directory made anew": lambda root: _anew(root / "renders/old"),
    "an input that is renamed": lambda root: (root / "tex/wood.tx").rename(root / "renders/w.tx"),
    "an input renamed and touched": _renamed_and_touched,
    "an input renamed over another": lambda root: (root / "tex/wood.tx").replace(
        root / "renders/old/1.exr"
    ),
    "a directory that is renamed": lambda root: (root / "renders/old").rename(root / "renders/b"),
    "a directory renamed out": lambda root: (root / "renders/old").rename(root / "elsewhere"),
    "a directory renamed in": lambda root: (root / ".hidden").rename(root / "renders/in"),
    "a directory renamed, and changed": _renamed_and_changed,
    "a directory renamed twice": _renamed_twice,
    "a link to a file": lambda root: (root / "renders/link").symlink_to("../scene.usd"),
    "a link to a directory": lambda root: (root / "renders/link").symlink_to("../tex"),
    "a link that leaves the root": lambda root: (root / "renders/link").symlink_to("/etc/passwd"),
    "a file that becomes a directory": lambda root: _becomes_directory(root / "tex/wood.tx"),
    "a directory that becomes a file": lambda root: _becomes_file(root / "renders/old"),
    "a hard link": lambda root: os.link(root / "tex/wood.tx", root / "renders/hard"),
    "a fifo in place of an input": lambda root: _becomes_fifo(root / "renders/old/1.exr"),
    "a fifo in place of a directory": lambda root: _becomes_fifo(root / "renders/old"),
    "a link in place of an input": lambda root: _becomes_link(
        root / "renders/old/1.exr", "../../scene.usd"
    ),
    "a link out in place of an input": lambda root: _becomes_link(
        root / "renders/old/1.exr", "/etc/passwd"
    ),
    "two inputs swapped": lambda root: _swapped(
        root / "renders/old/1.exr", root / "renders/old/2.exr"
    ),
    "two directories swapped": lambda root: _swapped(root / "renders/old", root / "tex/deep"),
    "a hard link, and the input removed": _linked_and_removed,
    "a directory renamed, and touched inside": _renamed_and_touched_inside,
    "a directory renamed, and partly back": _renamed_and_partly_back,
    "a directory renamed over an emptied one": _renamed_over_emptied,
    "an input touched, and renamed with its directory": _touched_then_renamed_above,
    "a directory renamed, and back": _renamed_and_back,
    "nothing": lambda _root: None,
}


# Overlayfs takes no path with a comma, so our own overlay is used there.
KEPT_BY_US = pytest.param("a, b", id="overlay")
KEPT_BY_US_SLOWLY = pytest.param("a, b", id="overlay", marks=pytest.mark.slow)
KEPT_BY_OVERLAYFS = pytest.param("", id="overlayfs")


@pytest.mark.expected_events(events.FILE_SKIPPED)
@pytest.mark.parametrize(
    "edit",
    always(
        *("a new file", "a new directory", "an input that is appended to", "nothing"),
        *("an input written as it was", "an input that is touched", "an input that is removed"),
        *("a directory that is removed", "an input that is renamed", "a link to a file"),
        *("a directory that is renamed", "a directory renamed, and changed"),
        "a file that becomes a directory",
        of=EDITS,
    ),
)
@pytest.mark.parametrize("place", [KEPT_BY_OVERLAYFS, KEPT_BY_US_SLOWLY], indirect=True)
def test_outputs_are_those_of_a_copied_session(
    tmp_path: Path, sessions: Sessions, job: JobDocument, edit: str
) -> None:
    copied = Sessions(tmp_path / "copied", Host(tmp_path / "other", sessions.host.store_url))
    results = []
    for at, (which, file_system) in enumerate([(sessions, "VIRTUAL"), (copied, "COPIED")]):
        root = start(which, job, file_system)
        EDITS[edit](root)
        first = which.host.finish_task(which.session_dir, action(1, 2 * at))
        (root / "renders/second.exr").write_bytes(b"of the second task")
        second = which.host.finish_task(which.session_dir, action(1, 2 * at + 1))
        results.append([(outputs_of(which.host, r), r.deleted) for r in (first, second)])

    assert results[0] == results[1]


@pytest.mark.expected_events(events.FILE_SKIPPED)
@pytest.mark.parametrize("place", [KEPT_BY_OVERLAYFS, KEPT_BY_US], indirect=True)
def test_outputs_of_many_edits_are_those_of_a_copied_session(
    tmp_path: Path, sessions: Sessions, job: JobDocument
) -> None:
    """Ten tasks, each of which makes some of the edits that are still possible."""
    copied = Sessions(tmp_path / "copied", Host(tmp_path / "other", sessions.host.store_url))
    told: list[list[object]] = []
    for which, file_system in [(sessions, "VIRTUAL"), (copied, "COPIED")]:
        root = start(which, job, file_system)
        chance = random.Random(5)
        told.append([])
        for number in range(10):
            for edit in chance.sample(sorted(EDITS), 4):
                try:
                    EDITS[edit](root)
                except OSError:
                    continue  # The input is gone by now, in both.
            result = which.host.finish_task(which.session_dir, action(1, number))
            told[-1].append((outputs_of(which.host, result), result.deleted))
        told[-1].append(files_below(root).keys())

    assert told[0] == told[1]


@pytest.mark.parametrize("place", [KEPT_BY_OVERLAYFS, KEPT_BY_US], indirect=True)
def test_changing_what_is_not_read_moves_nothing(sessions: Sessions, job: JobDocument) -> None:
    root = start(sessions, job)

    (root / "tex/wood.tx").chmod(0o600)
    (root / "tex/copy of wood.tx").write_bytes(b"")
    (root / "tex/deep").rename(root / "renders/deep")
    result = sessions.finish()

    assert fetched(sessions.host, root) == 0
    assert outputs_of(sessions.host, result).keys() == {
        "tex/copy of wood.tx", "renders/deep/er/stone.tx",
    }  # fmt: skip


def test_a_steps_outputs_come_over_the_inputs_and_are_nobodys_outputs(
    tmp_path: Path, sessions: Sessions, job: JobDocument
) -> None:
    first = Sessions(tmp_path / "first", sessions.host)
    (start(first, job) / "renders/reference.exr").write_bytes(b"of step 1")
    sessions.host.finish_task(first.session_dir, action(1, 0))
    root = start(sessions, job)

    sessions.host.sync_step(sessions.session_dir, step(2), [step(1)])
    result = sessions.host.finish_task(sessions.session_dir, action(2, 0))

    assert (root / "renders/reference.exr").read_bytes() == b"of step 1"
    assert result.files == 0
    sessions.host.end(first.session_dir)


@pytest.mark.parametrize("place", [KEPT_BY_OVERLAYFS, KEPT_BY_US], indirect=True)
def test_a_session_that_lost_its_mount_is_started_again_and_keeps_what_was_written(
    sessions: Sessions, job: JobDocument
) -> None:
    root = start(sessions, job)
    (root / "renders/new.exr").write_bytes(b"written before")
    pid = json.loads(ask_mount(sessions.host.mounts.control_of(root), {"ask": "status"}))[
        "supervisor"
    ]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not sessions.host.mounts.is_served(root))

    assert start(sessions, job) == root
    assert (root / "renders/new.exr").read_bytes() == b"written before"
    assert (root / "scene.usd").read_bytes() == b"#usda 1.0\n"
    assert outputs_of(sessions.host, sessions.finish()).keys() == {"renders/new.exr"}


@pytest.mark.expected_events(events.MOUNT_BUSY)
def test_an_end_leaves_nothing_even_with_a_file_open(
    sessions: Sessions, job: JobDocument, caplog: pytest.LogCaptureFixture
) -> None:
    root = start(sessions, job)
    held = os.open(root / "tex/wood.tx", os.O_RDONLY)

    sessions.host.end(sessions.session_dir)

    # Closing tells the server of it, which is gone, unless the kernel reads the file itself.
    with suppress(OSError):
        os.close(held)
    assert list(sessions.session_dir.iterdir()) == []
    assert not any((sessions.host.state_dir / "mounts").iterdir())
    [busy] = [record for record in caplog.records if record.getMessage() == events.MOUNT_BUSY]
    [holder] = cast("list[str]", fields_of(busy)["holders"])
    assert holder.split()[0] == str(os.getpid())


@pytest.mark.parametrize("place", [KEPT_BY_OVERLAYFS], indirect=True)
def test_a_directory_of_ours_that_a_job_has_moved_leaves_no_mount(
    sessions: Sessions, job: JobDocument
) -> None:
    root = start(sessions, job)
    [ours] = sessions.session_dir.glob(".propmaster-*-mount.partial")
    ours.rename(sessions.session_dir / "moved")
    inside = f"{sessions.session_dir.resolve()}/"
    assert len([m for m in read_mounts() if m.mountpoint.startswith(inside)]) == 2

    sessions.host.end(sessions.session_dir)

    assert not root.exists()
    assert [m for m in read_mounts() if m.mountpoint.startswith(inside)] == []


def test_an_end_goes_on_past_a_mount_that_is_not_ours(sessions: Sessions, job: JobDocument) -> None:
    [more] = sessions.submitted({"a.tx": 10}, "out", root="more").attachments.manifests
    manifests = [*job.attachments.manifests, more]
    both = msgspec.structs.replace(
        job, attachments=msgspec.structs.replace(job.attachments, manifests=manifests)
    )
    roots = sessions.host.start(both, sessions.session_dir, file_system="VIRTUAL").roots
    first, second = (Path(root.local_root) for root in roots)
    sessions.host.mounts.end(first)
    with tmpfs_mounted(first, size=1 << 20):
        (first / "theirs").write_bytes(b"somebody else's")
        with pytest.raises(SessionStateError, match="is no mount of this state directory"):
            sessions.host.end(sessions.session_dir)
        assert (first / "theirs").exists()
        assert not second.exists()

    sessions.host.end(sessions.session_dir)

    assert list(sessions.session_dir.iterdir()) == []


@pytest.mark.expected_events(events.MOUNT_READ_FAILED)
def test_a_task_that_was_refused_a_byte_has_failed_whatever_it_says(
    tmp_path: Path, sessions: Sessions, job: JobDocument
) -> None:
    root = start(sessions, job)
    for blob in (tmp_path / "store/Data").iterdir():
        if blob.stat().st_size == 30_000:
            blob.unlink()
    with pytest.raises(OSError, match="Input/output error"):
        (root / "tex/deep/er/stone.tx").read_bytes()
    (root / "renders/new.exr").write_bytes(b"rendered with a texture less")

    with pytest.raises(MountReadFailedError, match=r"tex/deep/er/stone\.tx") as caught:
        sessions.finish()

    assert caught.value.exit_code == 87
    assert sessions.outputs() == {}
    start(sessions, job)
    assert outputs_of(sessions.host, sessions.finish(1)).keys() == {"renders/new.exr"}


def test_every_task_that_was_refused_a_byte_has_failed(
    tmp_path: Path, sessions: Sessions, job: JobDocument
) -> None:
    """However soon after one that was refused the same."""
    root = start(sessions, job)
    for blob in (tmp_path / "store/Data").iterdir():
        if blob.stat().st_size == 30_000:
            blob.unlink()
    for task in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            (root / "tex/deep/er/stone.tx").read_bytes()
        (root / f"renders/{task}.exr").write_bytes(b"rendered with a texture less")
        with pytest.raises(MountReadFailedError, match=r"tex/deep/er/stone\.tx"):
            sessions.finish(task)
    assert sessions.outputs() == {}


def test_what_a_task_wrote_where_a_mount_was_is_not_taken_for_no_output(
    sessions: Sessions, job: JobDocument
) -> None:
    root = start(sessions, job)
    sessions.host.mounts.end(root)
    (root / "renders").mkdir()
    (root / "renders/late.exr").write_bytes(b"written to the bare directory")

    with pytest.raises(MountFailedError, match="not mounted any more"):
        sessions.finish()


def test_a_task_whose_mount_has_no_server_any_more_has_failed(
    sessions: Sessions, job: JobDocument
) -> None:
    root = start(sessions, job)
    status = json.loads(ask_mount(sessions.host.mounts.control_of(root), {"ask": "status"}))
    os.kill(status["supervisor"], signal.SIGKILL)
    os.kill(status["pid"], signal.SIGKILL)
    until(lambda: not Path(f"/proc/{status['pid']}").exists())

    with pytest.raises(MountFailedError, match="does not answer at"):
        sessions.finish()


@pytest.mark.expected_events(events.SESSION_START_FAILED)
@pytest.mark.parametrize("again", ["", "COPIED"])
def test_what_a_failed_start_had_mounted_is_ended(
    again: str, tmp_path: Path, sessions: Sessions, job: JobDocument
) -> None:
    """Of two roots one is mounted, and the other one, for it is small, can not be copied."""
    many: dict[str | bytes, bytes | int] = {f"{at}.tx": 10 for at in range(600)}
    [mounted] = sessions.submitted(many, "renders", root="many").attachments.manifests
    [copied] = sessions.submitted({"gone.bin": 77_777}, "out", root="few").attachments.manifests
    both = msgspec.structs.replace(
        job, attachments=msgspec.structs.replace(job.attachments, manifests=[mounted, copied])
    )
    [blob] = (b for b in (tmp_path / "store/Data").iterdir() if b.stat().st_size == 77_777)
    data = blob.read_bytes()
    blob.unlink()
    with pytest.raises(BlobNotFoundError):
        sessions.host.start(both, sessions.session_dir, file_system="AUTO")
    if again:
        blob.write_bytes(data)
        result = sessions.host.start(both, sessions.session_dir, file_system=again)
        assert [len(files_below(Path(root.local_root))) for root in result.roots] == [600, 1]
        assert [m for m in read_mounts() if m.mountpoint.startswith(f"{tmp_path}/")] == []

    sessions.host.end(sessions.session_dir)

    assert list(sessions.session_dir.iterdir()) == []
    assert not any((sessions.host.state_dir / "mounts").iterdir())


def test_what_a_killed_start_was_mounting_is_ended(sessions: Sessions, job: JobDocument) -> None:
    host, known = sessions.host, sessions.host.state_dir / "mounts"
    arguments = host.start_arguments(job, sessions.session_dir)
    process = host.popen(*arguments, "--file-system", "VIRTUAL")
    until(lambda: any(known.glob("*/spec.json")))
    process.kill()
    process.communicate()
    # On a busy host it may have finished before, which has to end as well.
    assert process.returncode in (-signal.SIGKILL, 0)

    done = host.run("session", "end", "--session-dir", sessions.session_dir)

    assert done.returncode == 0, done.stderr
    assert list(sessions.session_dir.iterdir()) == []
    assert not any(known.iterdir())


def test_inputs_are_asked_for_again_while_a_killed_server_is_replaced(
    sessions: Sessions, job: JobDocument
) -> None:
    control = Path(sessions.host.mounts.control_of(start(sessions, job)))
    away = control.with_name("away")
    control.rename(away)
    replaced = threading.Timer(0.5, away.rename, [control])
    replaced.start()
    try:
        [found] = files_of_mount(os.fspath(control), ["tex/wood.tx"], Cancellation())
    finally:
        replaced.join()
    assert [entry.path for entry in found] == ["tex/wood.tx"]


def test_auto_copies_what_is_small_and_says_so(sessions: Sessions, job: JobDocument) -> None:
    [root] = sessions.host.start(job, sessions.session_dir, file_system="AUTO").roots

    assert root.file_system == "COPIED"
    assert "are few" in root.reason


def test_auto_mounts_what_is_many_and_says_so(sessions: Sessions) -> None:
    many: dict[str | bytes, bytes | int] = {f"{at}.tx": 10 for at in range(600)}
    job = sessions.submitted(many, "renders")

    [root] = sessions.host.start(job, sessions.session_dir, file_system="AUTO").roots

    assert root.file_system == "VIRTUAL"
    assert "are many" in root.reason


def test_a_root_without_inputs_is_a_directory(sessions: Sessions) -> None:
    job = job_with_outputs(sessions.host.store_url, "/mnt/show", "renders")

    [root] = sessions.host.start(job, sessions.session_dir, file_system="VIRTUAL").roots

    assert (root.file_system, root.reason) == ("COPIED", "the root has no inputs")


def test_a_person_is_told_why_a_root_is_not_mounted(sessions: Sessions) -> None:
    job = job_with_outputs(sessions.host.store_url, "/mnt/show", "renders")
    arguments = sessions.host.start_arguments(job, sessions.session_dir)

    told = sessions.host.run(*arguments[:-1], "--file-system", "VIRTUAL")

    assert "(COPIED: the root has no inputs)" in told.stderr + told.stdout
