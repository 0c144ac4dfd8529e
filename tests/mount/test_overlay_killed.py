"""Our own overlay's server is killed while names are made, changed and removed: nobody sees it.

A request that was carried out and not answered is sent again to the next server. Seen to fail here:
`again` that is never set (a name is said to exist, or to be missing); nodes that are numbered as
they come; files that are removed from the disk with their last name.
"""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from agent_plugin.content.errors import MountFailedError
from tests.mount.conftest import Mounter
from tests.servers.proxied_object import until
from tests.servers.trees import files_below, write_files

KILLS = 8
WRITERS = 4


def test_names_are_made_and_removed_while_servers_are_killed(mounter: Mounter) -> None:
    _go_on_while_servers_are_killed(mounter, KILLS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_names_are_made_and_removed_while_servers_are_killed_for_long(mounter: Mounter) -> None:
    for _ in range(10):
        _go_on_while_servers_are_killed(mounter, KILLS)
        assert mounter.host.mounts.end(mounter.home / "mnt")


def test_an_input_that_an_earlier_mount_has_touched_is_written_on_after_a_kill(
    mounter: Mounter,
) -> None:
    source = mounter.home / "source"
    write_files(source, {"a": b"an input"}, mtime_ns=1_600_000_000 * 10**9)
    inputs = mounter.stored(source)
    at = mounter.mount(inputs, writes="overlay")
    (at / "a").chmod(0o600)
    mounter.host.mounts.end(at)
    mounter.mount(inputs, writes="overlay")
    fd = os.open(at / "a", os.O_RDWR)
    try:
        os.pwrite(fd, b"My", 0)
        _kill(mounter, at)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pwrite(fd, b"!", 8)
        assert os.pread(fd, 100, 0) == b"My input!"
    finally:
        os.close(fd)
    assert (at / "a").read_bytes() == b"My input!"
    mounter.host.mounts.end(at)
    assert (mounter.home / "mnt-work/upper/a").read_bytes() == b"My input!"


def _go_on_while_servers_are_killed(mounter: Mounter, kills: int) -> None:
    source = mounter.home / "source"
    write_files(
        source,
        {f"{writer}/in/{at}": 3000 + at for writer in range(WRITERS) for at in range(40)},
        mtime_ns=1_600_000_000_000_000_000,
    )
    at = mounter.mount(mounter.stored(source), writes="overlay")
    done = threading.Event()
    rounds = [0] * WRITERS
    with ThreadPoolExecutor(WRITERS) as threads:
        writers = [
            threads.submit(_write, at / str(number), source / str(number), number, rounds, done)
            for number in range(WRITERS)
        ]
        try:
            for _ in range(kills):
                before = list(rounds)
                until(
                    lambda before=before: (
                        any(writer.done() for writer in writers)  # type: ignore[misc]
                        or all(now > then for now, then in zip(rounds, before, strict=True))
                    ),
                    seconds=60,
                )
                _kill(mounter, at)
        finally:
            done.set()
        for writer in writers:
            writer.result(60)
    assert mounter.errors(at) == []
    died = [event["event"] for event in mounter.log_of(at)].count("mount.server_died")
    assert died == kills
    left = files_below(at)
    assert mounter.host.mounts.end(at)
    mounter.assert_nothing_is_left()
    again = mounter.mount(mounter.stored(source), writes="overlay")
    assert files_below(again) == left


def _write(at: Path, source: Path, number: int, rounds: list[int], done: threading.Event) -> None:
    """Do what a server must not do twice, and see that each has been done once."""
    turn = 0
    while not done.is_set():
        name = f"{turn % 40}"
        new, other = at / f"new-{turn}", at / f"other-{turn}"
        fd = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o640)
        for piece in range(4):
            assert os.write(fd, b"%d of %d\n" % (piece, turn)) > 0
        content = b"".join(b"%d of %d\n" % (piece, turn) for piece in range(4))
        os.link(new, other)
        new.unlink()
        assert os.fstat(fd).st_nlink == 1
        other.rename(new)
        assert new.read_bytes() == content
        with new.open("rb") as held:
            new.unlink()
            (at / f"d-{turn}").mkdir()
            assert held.read() == content
        os.close(fd)
        (at / f"d-{turn}/link").symlink_to("nowhere")
        (at / f"d-{turn}").rename(at / f"e-{turn}")
        assert os.listdir(at / f"e-{turn}") == ["link"]  # noqa: PTH208 - names
        (at / f"e-{turn}/link").unlink()
        (at / f"e-{turn}").rmdir()
        moved = at / f"moved-{turn}"
        if (at / "in" / name).exists():
            (at / "in" / name).rename(moved)
            with moved.open("r+b") as file:
                file.write(b"changed")
            assert moved.read_bytes() == b"changed" + (source / "in" / name).read_bytes()[7:]
            os.setxattr(moved, "user.turn", b"%d" % turn, os.XATTR_CREATE)
            if turn % 3:
                moved.unlink()
        turn += 1
        rounds[number] = turn


def _kill(mounter: Mounter, at: Path) -> None:
    """Kill the server, and wait for the next one."""
    before = mounter.status(at)["pid"]
    os.kill(before, signal.SIGKILL)

    def is_another() -> bool:
        with suppress(MountFailedError):
            return bool(mounter.status(at)["pid"] != before)
        return False

    until(is_another, seconds=60)
