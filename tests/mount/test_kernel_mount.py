"""Real mounts by the kernel transport: what a job sees, what moves, and how a mount ends.

`none` is the mount of the inputs alone, `overlayfs` a writable one above it, `overlay` one that
takes writes itself.
"""

import errno
import fcntl
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import MountFailedError, SessionStateError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.mount_spec import VERSION
from agent_plugin.content.mount_table import is_mounted, unmount
from agent_plugin.content.store import Cancellation
from agent_plugin.session.mounts import Mounts
from agent_plugin.transfer.ledger import lease_owner
from tests.mount.conftest import (
    END_SECONDS,
    Mounter,
    by_each_transport,
    by_each_transport_in_time,
    gone,
)
from tests.servers.disks import tmpfs_mounted
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import REPOSITORY
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files

MTIME_NS = 1_600_000_000_123_456_000
FILES: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "tex/wood.tx": 50_000,
    "tex/copy of wood.tx": b"the same" * 10,
    "tex/another copy": b"the same" * 10,
    "geo/big.abc": 9_000_001,
    "empty": b"",
    ".hidden/.rc": b"dots",
    b"latin-\xe9/\xff.tx": b"not UTF-8",
    "\U0001f3ac \u65e5\u672c/\u00e9.bin": 7000,
    "line\nbreak/tab\t": b"odd",
    "n" * 255: b"a long name",
    "d" * 255 + "/" + "e" * 255: b"a longer one",
    "/".join(f"d{depth}" for depth in range(50)) + "/deep": b"at depth 50",
    **{f"shots/{at:02}/plate.exr": 3000 + at for at in range(30)},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_files(source, FILES, mtime_ns=MTIME_NS)
    return source


@pytest.fixture
def inputs(mounter: Mounter, source: Path) -> Manifest:
    return mounter.stored(source)


@pytest.fixture
def mnt(mounter: Mounter, inputs: Manifest, kept_by: str) -> Path:
    """A writable mount."""
    return mounter.mount(inputs, writes=kept_by)


def drop_pages(path: Path) -> None:
    """Have the kernel forget what it has read of a file, so that it asks the server again."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


# ------------------------------------------------------------------ reading


@by_each_transport
def test_the_tree_is_that_of_the_manifest(
    mounter: Mounter, inputs: Manifest, source: Path, writes: str
) -> None:
    at = mounter.mount(inputs, writes=writes)

    assert files_below(at) == files_below(source)
    assert sorted(folder for folder, _, _ in os.walk(at)) == sorted(
        f"{at}{folder.removeprefix(str(source))}" for folder, _, _ in os.walk(source)
    )
    assert mounter.ready[at].files == len(FILES)
    for path in (at, at / "tex", at / "tex/wood.tx"):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        assert stat.S_IMODE(status.st_mode) == (0o755 if path.is_dir() else 0o644)
    assert (at / "geo/big.abc").stat().st_mtime_ns % 1_000_000_000 != 0
    assert mounter.errors(at) == []


@by_each_transport
def test_looking_at_a_tree_fetches_nothing(mounter: Mounter, inputs: Manifest, writes: str) -> None:
    at = mounter.mount(inputs, writes=writes)
    assert sum(len(names) for _, _, names in os.walk(at)) == len(FILES)
    assert (at / "geo/big.abc").stat().st_size == 9_000_001
    assert (at / "empty").read_bytes() == b""
    assert mounter.fetched(at) == 0
    (at / "tex/wood.tx").read_bytes()
    assert mounter.fetched(at) == 50_000
    (at / "tex/copy of wood.tx").read_bytes()
    (at / "tex/another copy").read_bytes()
    assert mounter.fetched(at) == 50_080


@by_each_transport_in_time
def test_a_directory_of_ten_thousand_files_is_listed_whole(mounter: Mounter, writes: str) -> None:
    names = {f"frame.{number:05}.{'x' * (number % 60)}exr" for number in range(10_000)}
    digest = Digest.of(b"the same")
    at = mounter.mount(
        Manifest.of(FileEntry(digest.hex, 0, name, digest.size) for name in names), writes=writes
    )

    with os.scandir(at) as entries:
        found = [(entry.name, entry.is_file(), entry.stat().st_size) for entry in entries]
    assert sorted(found) == sorted((name, True, 8) for name in names)
    # A second reader begins anew, and both go on from where they are.
    with os.scandir(at) as first, os.scandir(at) as second:
        assert next(first).name == next(second).name
        assert len([*first, *second]) == 2 * 10_000 - 2


@by_each_transport_in_time
def test_what_is_not_there_is_not_found(mounter: Mounter, inputs: Manifest, writes: str) -> None:
    at = mounter.mount(inputs, writes=writes)
    for missing in ("nothing", "tex/nothing", "tex/wood.txt", "TEX"):
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                (at / missing).stat()
    with pytest.raises(NotADirectoryError):
        (at / "scene.usd/below").stat()
    with pytest.raises(OSError, match="name too long"):
        (at / ("x" * 256)).stat()
    assert os.statvfs(at).f_namemax == 255


@by_each_transport
def test_parts_of_a_file_are_read_as_from_a_disk(
    mounter: Mounter, inputs: Manifest, source: Path, writes: str
) -> None:
    at = mounter.mount(inputs, writes=writes)
    data = (source / "geo/big.abc").read_bytes()
    chance = random.Random(5)
    fd = os.open(at / "geo/big.abc", os.O_RDONLY)
    try:
        for _ in range(200):
            offset, length = chance.randrange(len(data) + 5000), chance.randrange(1, 300_000)
            assert os.pread(fd, length, offset) == data[offset : offset + length]
        assert os.pread(fd, 10, len(data)) == b""
        assert os.pread(fd, 10, len(data) + 1_000_000_000_000) == b""
        assert os.pread(fd, 10, len(data) - 3) == data[-3:]
        assert os.lseek(fd, -1, os.SEEK_END) == len(data) - 1
        assert os.read(fd, 100) == data[-1:]
        with closing(mmap.mmap(fd, 0, prot=mmap.PROT_READ)) as mapped:
            assert len(mapped) == len(data)
            assert mapped[4095:8193] == data[4095:8193]
            assert mapped[-1:] == data[-1:]
            assert mapped.find(data[-100:]) == len(data) - 100
    finally:
        os.close(fd)


def test_a_program_runs_from_the_mount_once_it_may(mnt: Path, mounter: Mounter) -> None:
    (mnt / "tool").write_bytes(Path("/bin/true").read_bytes())
    (mnt / "tool").chmod(0o755)
    assert subprocess.run([mnt / "tool"], check=False).returncode == 0
    assert mounter.fetched(mnt) == 0


# ------------------------------------------------------------------ writing


def _opened_for(mode: str) -> Callable[[Path, Path], None]:
    def write(file: Path, _new: Path) -> None:
        with file.open(mode) as opened:
            opened.write(b"x")

    return write


def _fifo(_file: Path, new: Path) -> None:
    os.mkfifo(new)
    # Whoever reads the whole tree would wait for a writer.
    new.unlink()


# Each is given an input of its own, and a name beside it that nothing has.
WRITES: dict[str, Callable[[Path, Path], object]] = {
    "create": lambda _, new: new.write_bytes(b"x"),
    "overwrite": _opened_for("wb"),
    "change": _opened_for("r+b"),
    "append": _opened_for("ab"),
    "truncate": lambda file, _: os.truncate(file, 0),
    "lengthen": lambda file, _: os.truncate(file, 1_000_000),
    "remove": lambda file, _: file.unlink(),
    "rename": lambda file, new: file.rename(new),
    "replace": lambda file, _: file.rename(file.parent.parent / "00/plate.exr"),
    "make a directory": lambda _, new: new.mkdir(),
    "rename a directory": lambda file, _: file.parent.rename(file.parent.with_name("away")),
    "change a mode": lambda file, _: file.chmod(0o600),
    "change an owner": lambda file, _: os.chown(file, 1, 1),
    "change a time": lambda file, _: os.utime(file),
    "link": os.link,
    "link by name": lambda file, new: new.symlink_to(file),
    "set an attribute": lambda file, _: os.setxattr(file, "user.a", b"x"),
    "make a fifo": _fifo,
}


@pytest.mark.parametrize(
    ("transport", "writes"),
    [
        *itertools.product(["kernel"], ["none", "overlayfs", "overlay"]),
        pytest.param("fusepy", "none", marks=pytest.mark.slow),
        pytest.param("fusepy", "overlayfs", marks=pytest.mark.slow),
    ],
)
def test_a_mount_takes_all_kinds_of_writes_or_refuses_each(
    mounter: Mounter, inputs: Manifest, source: Path, writes: str
) -> None:
    at = mounter.mount(inputs, writes=writes)
    writable = writes != "none"
    for number, (what, write) in enumerate(WRITES.items(), start=1):
        file = at / f"shots/{number:02}/plate.exr"
        if writable:
            write(file, file.with_name("new"))
            continue
        with pytest.raises(OSError, match="Read-only file system") as caught:
            write(file, file.with_name("new"))
        assert caught.value.errno == errno.EROFS, what
    assert os.access(at / "scene.usd", os.W_OK) == writable
    assert (files_below(at) == files_below(source)) != writable
    assert mounter.errors(at) == []


def test_a_file_that_is_made_is_there_and_stays_out_of_the_inputs(
    mounter: Mounter, mnt: Path, inputs: Manifest
) -> None:
    (mnt / "renders/a").mkdir(parents=True)
    (mnt / "renders/a/1.exr").write_bytes(b"pixels")
    assert (mnt / "renders/a/1.exr").read_bytes() == b"pixels"
    upper = mounter.home / "mnt-work/upper"
    assert (upper / "renders/a/1.exr").read_bytes() == b"pixels"
    assert stat.S_IMODE(upper.stat().st_mode) == 0o755
    other = mounter.mount(inputs, name="other")
    assert not (other / "renders").exists()


def test_an_input_that_is_appended_to_has_both(mounter: Mounter, mnt: Path, source: Path) -> None:
    with (mnt / "tex/wood.tx").open("ab") as file:
        file.write(b"more")
        file.flush()
        os.fsync(file.fileno())
    assert (mnt / "tex/wood.tx").read_bytes() == (source / "tex/wood.tx").read_bytes() + b"more"
    assert mounter.fetched(mnt) == 50_000
    assert (mounter.host.cache_dir).is_dir()


def test_owner_and_mode_of_the_root_are_there_when_it_is_mounted_again(
    mounter: Mounter, inputs: Manifest, mnt: Path, kept_by: str
) -> None:
    assert stat.S_IMODE(mnt.stat().st_mode) == 0o755
    mnt.chmod(0o1770)
    os.chown(mnt, 1, 2)
    for _ in range(2):
        status = mnt.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o1770, 1, 2)
        assert mounter.host.mounts.end(mnt)
        mounter.mount(inputs, writes=kept_by)


def test_a_page_of_an_input_is_changed_through_a_map(mnt: Path, source: Path) -> None:
    before = (source / "tex/wood.tx").read_bytes()
    with (mnt / "tex/wood.tx").open("r+b") as file, closing(mmap.mmap(file.fileno(), 0)) as mapped:
        mapped[10_000:10_004] = b"here"
        mapped.flush()
    after = (mnt / "tex/wood.tx").read_bytes()
    assert after == before[:10_000] + b"here" + before[10_004:]


@by_each_transport_in_time
def test_truncating_an_input_fetches_nothing(mounter: Mounter, mnt: Path) -> None:
    (mnt / "geo/big.abc").write_bytes(b"")
    with (mnt / "tex/wood.tx").open("wb") as file:
        file.write(b"anew")
    assert (mnt / "geo/big.abc").stat().st_size == 0
    assert (mnt / "tex/wood.tx").read_bytes() == b"anew"
    assert mounter.fetched(mnt) == 0


@by_each_transport_in_time
def test_renaming_a_directory_of_inputs_fetches_nothing(
    mounter: Mounter, mnt: Path, source: Path
) -> None:
    (mnt / "shots").rename(mnt / "plates")
    (mnt / "tex").rename(mnt / "plates/tex")
    assert not (mnt / "shots").exists()
    assert mounter.fetched(mnt) == 0
    assert files_below(mnt / "plates/07") == files_below(source / "shots/07")
    assert files_below(mnt / "plates/tex") == files_below(source / "tex")
    assert mounter.fetched(mnt) == 3007 + 50_000 + 80


@by_each_transport_in_time
def test_mode_owner_and_times_of_an_input_change_without_its_content(
    mounter: Mounter, mnt: Path, source: Path
) -> None:
    file = mnt / "geo/big.abc"
    file.chmod(0o600)
    os.chown(file, 1, 2)
    os.utime(file, ns=(1_000_000_007, 1_500_000_000_000_000_001))
    status = file.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o600, 1, 2)
    assert status.st_mtime_ns == 1_500_000_000_000_000_001
    assert mounter.fetched(mnt) == 0
    assert file.read_bytes() == (source / "geo/big.abc").read_bytes()
    assert mounter.fetched(mnt) == 9_000_001


@by_each_transport_in_time
def test_what_is_removed_is_gone_and_still_read_by_who_has_it_open(
    mounter: Mounter, mnt: Path, source: Path
) -> None:
    with (mnt / "tex/wood.tx").open("rb") as file:
        (mnt / "tex/wood.tx").unlink()
        assert not (mnt / "tex/wood.tx").exists()
        assert "wood.tx" not in os.listdir(mnt / "tex")  # noqa: PTH208 - names
        assert file.read() == (source / "tex/wood.tx").read_bytes()
    shutil.rmtree(mnt / "tex")
    (mnt / "tex").mkdir()
    assert list((mnt / "tex").iterdir()) == [], "what was below it does not come back"
    assert mounter.errors(mnt) == []


def test_links_lead_to_inputs(mounter: Mounter, mnt: Path) -> None:
    os.link(mnt / "scene.usd", mnt / "hard")
    (mnt / "soft").symlink_to("scene.usd")
    (mnt / "nowhere").symlink_to("/no/such/thing")
    assert (mnt / "hard").read_bytes() == (mnt / "soft").read_bytes() == b"#usda 1.0\n"
    assert (mnt / "hard").samefile(mnt / "scene.usd")
    (mnt / "hard").write_bytes(b"changed")
    assert (mnt / "scene.usd").read_bytes() == b"changed"
    assert (mnt / "nowhere").readlink() == Path("/no/such/thing")
    assert mounter.errors(mnt) == []


@by_each_transport_in_time
def test_files_are_locked_between_processes(
    mounter: Mounter, inputs: Manifest, writes: str
) -> None:
    at = mounter.mount(inputs, writes=writes)
    look = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1])\n"
        "try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(7)\n"
    )
    command = [sys.executable, "-c", look, str(at / "scene.usd")]
    with (at / "scene.usd").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert subprocess.run(command, check=False).returncode == 7
        fcntl.flock(file, fcntl.LOCK_UN)
        assert subprocess.run(command, check=False).returncode == 0


# ------------------------------------------------------------------ failures


@by_each_transport
def test_a_file_that_can_not_be_had_is_an_error_and_never_short(
    mounter: Mounter, source: Path, writes: str
) -> None:
    at = mounter.mount(mounter.stored(source, without="tex/wood.tx"), writes=writes)
    lost = at / "tex/wood.tx"
    for read in (Path.read_bytes, _tail_of, lambda path: shutil.copyfile(path, "/dev/null")):
        with pytest.raises(OSError, match="Input/output error"):
            read(lost)
    assert mounter.errors(at) == [("tex/wood.tx", "E_NOT_FOUND")]
    assert (at / "scene.usd").read_bytes() == b"#usda 1.0\n"
    assert mounter.status(at)["counts"]["reads_failed"] >= 1


def _tail_of(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(-100, os.SEEK_END)
        return file.read(100)


@by_each_transport_in_time
def test_a_failed_file_is_read_as_soon_as_it_can_be_had(mounter: Mounter, inputs: Manifest) -> None:
    blobs = mounter.home / "store/Data"
    blobs.rename(blobs.with_name("away"))
    name = os.fsdecode(b"latin-\xe9/\xff.tx")
    at = mounter.mount(inputs)
    with pytest.raises(OSError, match="Input/output error"):
        (at / name).read_bytes()

    blobs.with_name("away").rename(blobs)
    assert (at / name).read_bytes() == b"not UTF-8"
    assert mounter.errors(at) == [(name, "E_NOT_FOUND")]


def test_a_killed_server_is_replaced_and_nobody_sees_more_than_a_pause(
    mounter: Mounter, inputs: Manifest, source: Path, kept_by: str
) -> None:
    at = mounter.mount(inputs, writes=kept_by)
    names = ["geo/big.abc", *(f"shots/{number:02}/plate.exr" for number in range(30))]
    right = {name: (source / name).read_bytes() for name in names}
    done = threading.Event()
    reads: list[str] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        while not done.is_set():
            name = chance.choice(names)
            assert (at / name).read_bytes() == right[name]
            drop_pages(at / name)
            reads.append(name)

    def write(number: int) -> bytes:
        written = b""
        with (at / f"renders-{number}").open("wb") as file:
            while not done.is_set():
                written += b"line %d\n" % len(written)
                file.seek(0)
                file.write(written)
                file.flush()
                done.wait(0.005)
        return written

    with ThreadPoolExecutor(10) as threads:
        readers = [threads.submit(read, seed) for seed in range(8)]
        writers = [threads.submit(write, number) for number in range(2)]
        try:
            for number in range(1, 5):
                _until_more(reads, 30 * number)
                _kill_server(mounter, at)
        finally:
            done.set()
        for reader in readers:
            reader.result(20)
        for number, writer in enumerate(writers):
            assert (at / f"renders-{number}").read_bytes() == writer.result(20)
    assert mounter.errors(at) == []
    assert [event["event"] for event in mounter.log_of(at)].count("mount.server_died") == 4
    assert mounter.host.mounts.is_served(at)


def _until_more(reads: list[str], than: int) -> None:
    until(lambda: len(reads) > than, seconds=30)


def _kill_server(mounter: Mounter, at: Path) -> None:
    """Kill the server, and wait for the next one."""
    before = mounter.status(at)["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: _answers(mounter, at) not in (None, before))


def _answers(mounter: Mounter, at: Path) -> int | None:
    """Return the server's process id, None while there is none."""
    try:
        pid: int = mounter.status(at)["pid"]
    except MountFailedError:
        return None
    return pid


@pytest.fixture
def slow(
    tmp_path: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy
) -> Iterator[Mounter]:
    """Mounts from the S3 server, behind the proxy."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    environment = s3.environment_at(fault_proxy.url)
    mounter = Mounter(tmp_path, f"s3://{s3.bucket}/{s3_prefix}", environment=environment)
    yield mounter
    mounter.close()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_reader_that_waits_for_a_store_that_hangs_can_be_killed(
    slow: Mounter, source: Path, s3: S3Server, fault_proxy: FaultProxy, writes: str, by: int
) -> None:
    at = slow.mount(slow.stored(source, past_the_proxy=s3), writes=writes)
    stall = fault_proxy.inject(Fault.STALL)
    # Whoever runs the tests in the background has SIGINT ignored, and so have its children.
    command = ["env", "--default-signal=INT", "cat", f"{at}/tex/wood.tx"]
    reader = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until(lambda: stall.hits == 1)
        reader.send_signal(by)
        reader.wait(20)
    finally:
        reader.kill()
        reader.wait()
    assert slow.errors(at) == []
    # The mount is none the worse for it.
    fault_proxy.refuse(0)
    fault_proxy.clear()
    assert (at / "tex/wood.tx").read_bytes() == (source / "tex/wood.tx").read_bytes()


def test_a_read_past_the_page_cache_is_given_up_with_its_reader(
    slow: Mounter, source: Path, s3: S3Server, fault_proxy: FaultProxy
) -> None:
    """Reading ahead is nobody's, and goes on; this is what the kernel sends INTERRUPT for."""
    at = slow.mount(slow.stored(source, past_the_proxy=s3))
    stall = fault_proxy.inject(Fault.STALL)
    command = ["dd", f"if={at}/tex/wood.tx", "of=/dev/null", "bs=4096", "iflag=direct"]
    reader = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(lambda: stall.hits == 1)
        reader.kill()
        reader.wait(20)
    finally:
        reader.kill()
        reader.wait()
    until(lambda: slow.status(at)["counts"]["reads_interrupted"] == 1)
    assert slow.errors(at) == []


def test_who_answers_goes_before_others_and_who_fetches_does_not(
    mounter: Mounter, source: Path
) -> None:
    at = mounter.mount(mounter.stored(source))
    for path in ("tex/wood.tx", "geo/big.abc", "scene.usd"):
        assert (at / path).read_bytes() == (source / path).read_bytes()

    server = mounter.status(at)["pid"]
    threads = [int(thread.name) for thread in Path(f"/proc/{server}/task").iterdir()]
    niceness = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
    ours = os.nice(0)
    assert niceness.pop(server) == -10
    assert len(niceness) > 1
    # What was there before it is as the tests are; what it starts is as everybody is.
    assert set(niceness.values()) <= {ours, 0}
    assert os.getpriority(os.PRIO_PROCESS, mounter.status(at)["supervisor"]) == ours


# ------------------------------------------------------------------ how it ends


@by_each_transport_in_time
def test_a_mount_that_is_ended_while_a_file_is_open_goes_and_tells_who_held_it(
    mounter: Mounter, inputs: Manifest, writes: str
) -> None:
    at = mounter.mount(inputs, writes=writes)
    with (at / "tex/wood.tx").open("rb", buffering=0) as file:
        file.read(10)
        os.kill(mounter.ready[at].pid, signal.SIGTERM)
        until(lambda: gone(at), seconds=END_SECONDS)
        assert file.read(10) != b"", "who has it open keeps it for a moment"
        [busy] = [event for event in mounter.log_of(at) if event["event"] == "mount.busy"]
        assert [holder.split()[0] for holder in busy["holders"]] == [str(os.getpid())]
    assert not mounter.host.mounts.is_served(at)
    ended = mounter.host.mounts.end(at)
    assert ended is not None
    assert ended.holders == busy["holders"]
    mounter.assert_nothing_is_left()


@by_each_transport_in_time
def test_a_mount_that_nobody_uses_is_ended_at_once(
    mounter: Mounter, inputs: Manifest, writes: str
) -> None:
    at = mounter.mount(inputs, writes=writes)
    (at / "tex/wood.tx").read_bytes()
    ended = mounter.host.mounts.end(at)
    assert ended is not None
    assert not ended.holders
    assert not mounter.host.mounts.end(at)
    mounter.assert_nothing_is_left()


@by_each_transport_in_time
def test_what_a_killed_supervisor_left_is_cleared(
    mounter: Mounter, inputs: Manifest, writes: str
) -> None:
    at, other = mounter.mount(inputs, writes=writes), mounter.mount(inputs, name="other")
    mounts = mounter.host.mounts
    assert mounts.clear_stale() == []
    os.kill(mounter.ready[at].pid, signal.SIGKILL)
    until(lambda: not mounts.is_served(at))
    assert is_mounted(at), "its server goes on"

    assert mounts.clear_stale() == [at]
    assert gone(at)
    assert (other / "scene.usd").read_bytes() == b"#usda 1.0\n"
    assert mounts.end(other)
    mounter.assert_nothing_is_left()


@by_each_transport
def test_what_killed_supervisor_and_server_left_is_cleared_without_touching_it(
    mounter: Mounter, inputs: Manifest, writes: str
) -> None:
    at = mounter.mount(inputs, writes=writes)
    server = mounter.status(at)["pid"]
    os.kill(mounter.ready[at].pid, signal.SIGKILL)
    os.kill(server, signal.SIGKILL)
    until(lambda: mounter.processes() == [] and not mounter.host.mounts.is_served(at))
    assert is_mounted(at)

    assert mounter.host.mounts.clear_stale() == [at]
    mounter.assert_nothing_is_left()
    again = mounter.mount(inputs, writes=writes)
    assert (again / "scene.usd").read_bytes() == b"#usda 1.0\n"


@by_each_transport_in_time
def test_a_mount_goes_with_the_process_it_was_made_for(
    mounter: Mounter, inputs: Manifest, writes: str
) -> None:
    owner = subprocess.Popen(["sleep", "60"])
    try:
        at = mounter.mount(inputs, writes=writes, owner_pid=owner.pid)
        assert (at / "scene.usd").read_bytes() == b"#usda 1.0\n"
    finally:
        owner.kill()
        owner.wait()
    until(lambda: gone(at), seconds=END_SECONDS)
    until(lambda: mounter.processes() == [], seconds=END_SECONDS)


def test_a_mount_for_a_process_that_is_gone_already_goes_at_once(
    mounter: Mounter, inputs: Manifest
) -> None:
    owner = subprocess.Popen(["true"])
    owner.wait()
    at = mounter.mount(inputs, owner_pid=owner.pid)
    until(lambda: gone(at), seconds=END_SECONDS)


@by_each_transport_in_time
def test_whoever_unmounts_it_by_hand_ends_all_of_it(
    mounter: Mounter, inputs: Manifest, writes: str
) -> None:
    at = mounter.mount(inputs, writes=writes)
    unmount(at)
    until(lambda: mounter.processes() == [], seconds=END_SECONDS)
    assert mounter.mounted() == []
    # What is known of it does not keep the next one out.
    assert (mounter.mount(inputs, writes=writes) / "scene.usd").read_bytes() == b"#usda 1.0\n"


@pytest.mark.slow
@by_each_transport
def test_twenty_mounts_leave_nothing_behind(
    mounter: Mounter, inputs: Manifest, transport: str
) -> None:
    at = mounter.home / "mnt"
    all_writes = ("none", "overlayfs", "overlay" if transport == "kernel" else "none")
    for number in range(20):
        mounter.mount(inputs, writes=all_writes[number % 3])
        assert (at / "tex/wood.tx").stat().st_size == 50_000
        assert (at / f"shots/{number:02}/plate.exr").read_bytes() != b""
        assert mounter.host.mounts.end(at)
        assert gone(at)
        shutil.rmtree(at.with_name("mnt-work"), ignore_errors=True)
    mounter.assert_nothing_is_left()
    assert list(at.iterdir()) == []
    assert [path for path in mounter.host.cache_dir.rglob("tmp/*") if path.is_file()] == []


# ------------------------------------------------------------------ how it begins


def test_nothing_of_the_working_directory_is_run(
    mounter: Mounter, inputs: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_a_job = tmp_path / "session"
    of_a_job.mkdir()
    for name in ("vfs.py", "json.py"):
        (of_a_job / name).write_bytes(b"raise SystemExit(3)\n")
    monkeypatch.chdir(of_a_job)

    at = mounter.mount(inputs)

    assert (at / "scene.usd").read_bytes() == FILES["scene.usd"]


def test_a_second_mount_at_one_place_is_refused(
    mounter: Mounter, inputs: Manifest, mnt: Path
) -> None:
    with pytest.raises(SessionStateError, match="mounted at"):
        mounter.host.mounts.start(
            mounter.request(inputs, mnt, "none", 0),
            cancellation=Cancellation(),
            environment=mounter.host.process_environment(),
        )
    assert (mnt / "scene.usd").read_bytes() == b"#usda 1.0\n"
    assert mounter.host.mounts.is_served(mnt)


@by_each_transport
def test_names_that_are_not_utf_8_are_mounted_at(mounter: Mounter, inputs: Manifest) -> None:
    at = mounter.mount(inputs, name=os.fsdecode(b"a b\\c\n\xff"))
    assert (at / "scene.usd").read_bytes() == b"#usda 1.0\n"
    assert mounter.status(at)["mountpoint"] == str(at)
    assert mounter.host.mounts.end(at)
    mounter.assert_nothing_is_left()


def test_what_somebody_else_mounted_is_left_alone(mounter: Mounter, inputs: Manifest) -> None:
    with tmpfs_mounted(mounter.home / "theirs", size=1 << 20) as theirs:
        with pytest.raises(SessionStateError, match="no mount of this"):
            mounter.host.mounts.end(theirs)
        (mounter.home / "file").write_bytes(b"")
        spec = _spec_of(mounter, inputs, mountpoint=str(theirs), workDir=f"{mounter.home}/file/w")
        assert _serve(spec).returncode == 84
        assert is_mounted(theirs)


@by_each_transport
def test_a_mount_that_can_not_be_made_leaves_nothing(mounter: Mounter, inputs: Manifest) -> None:
    # A comma is overlayfs's own.
    with pytest.raises(MountFailedError, match="overlayfs takes"):
        mounter.mount(inputs, writes="overlayfs", name="a,b")
    mounter.assert_nothing_is_left()


@by_each_transport_in_time
def test_cancelling_a_mount_leaves_nothing(mounter: Mounter, inputs: Manifest) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    (mounter.home / "mnt").mkdir()
    with pytest.raises(Exception, match="stopped on request"):
        mounter.host.mounts.start(
            mounter.request(inputs, mounter.home / "mnt", "none", 0),
            cancellation=cancellation,
            environment=mounter.host.process_environment(),
        )
    mounter.assert_nothing_is_left()


def _spec_of(mounter: Mounter, inputs: Manifest, **changes: Any) -> Path:
    """Write a spec as the plugin does, but for what is changed."""
    spec: dict[str, Any] = {
        "version": VERSION,
        "name": "propmaster:test",
        "mountpoint": f"{mounter.home}/mnt",
        "manifests": [str(mounter.manifest_file(inputs))],
        "storeUrl": mounter.host.store_url,
        "accountId": "",
        "cacheDir": "",
        "cacheMaxBytes": 1 << 40,
        "cacheMinFreeBytes": 0,
        "cacheShared": False,
        "workDir": f"{mounter.home}/work",
        "writes": "none",
        "uid": 0,
        "gid": 0,
        "stream": True,
        "xattrs": False,
        "errors": f"{mounter.home}/errors",
        "control": f"{mounter.home}/control",
    }
    path = mounter.home / "spec.json"
    path.write_text(json.dumps(spec | changes))
    return path


def _serve(spec: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vfs", spec, *more],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


BAD_SPECS: dict[str, tuple[dict[str, Any], int, str]] = {
    "of another version": ({"version": 99}, 76, "version 99"),
    "with a key that nobody knows": ({"colour": "red"}, 76, "colour"),
    "with a wrong type": ({"uid": "root"}, 76, "uid"),
    "with a manifest that is missing": ({"manifests": ["/no/such/manifest"]}, 85, "No such file"),
    "with a manifest that is none": ({"manifests": ["/etc/passwd"]}, 65, "JSON"),
    "with a mount point that is missing": ({"mountpoint": "/no/such/place"}, 80, "No such file"),
    "with a work directory below a file": ({"workDir": "/etc/passwd/w"}, 84, "passwd"),
}


@pytest.mark.parametrize("what", BAD_SPECS)
def test_a_bad_spec_is_refused_with_its_reason(
    mounter: Mounter, inputs: Manifest, what: str
) -> None:
    changes, code, reason = BAD_SPECS[what]
    (mounter.home / "mnt").mkdir()
    done = _serve(_spec_of(mounter, inputs, **changes))
    assert (done.returncode, done.stdout) == (code, "")
    assert "error[" in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    mounter.assert_nothing_is_left()


def test_a_spec_that_is_none_is_refused(mounter: Mounter) -> None:
    path = mounter.home / "spec.json"
    for text in (b"{", b"[]", b"\xff", b""):
        path.write_bytes(text)
        assert _serve(path).returncode == 76
    assert _serve(mounter.home / "missing").returncode == 76
    assert _serve(path, "more").returncode == 2


# ------------------------------------------------------------------ the commands


def test_a_manifest_is_mounted_and_unmounted_by_command(
    mounter: Mounter, inputs: Manifest, source: Path
) -> None:
    host, at = mounter.host, mounter.home / "mnt"
    manifest = mounter.manifest_file(inputs)
    done = host.run("mount", manifest, at, "--store", host.store_url, "--json")
    assert done.returncode == 0, done.stderr
    ready = json.loads(done.stdout)
    assert (ready["writes"], ready["files"]) == ("none", len(FILES))
    assert files_below(at) == files_below(source)

    again = host.run("mount", manifest, at, "--store", host.store_url)
    assert again.returncode == 76
    assert "something is mounted at" in again.stderr
    held = os.open(at / "scene.usd", os.O_RDONLY)
    told = host.run("unmount", at)
    with suppress(OSError):
        os.close(held)
    assert told.returncode == 0
    assert f"unmounted {at}\nit was in use by {os.getpid()} " in told.stdout + told.stderr
    nothing = {"ended": False, "holders": []}
    assert json.loads(host.run("unmount", at, "--json").stdout) == nothing
    mounter.assert_nothing_is_left()


def test_a_writable_mount_by_command_keeps_what_is_written(
    mounter: Mounter, inputs: Manifest
) -> None:
    host, at, work = mounter.host, mounter.home / "mnt", mounter.home / "work"
    (work / "host").mkdir(parents=True)
    done = host.run(
        "mount", mounter.manifest_file(inputs), at, "--store", host.store_url, "--work-dir", work
    )
    assert done.returncode == 0, done.stderr
    assert "writable" in done.stdout
    (at / "new").write_bytes(b"written")
    # overlayfs keeps the mark of what is removed among what it works with.
    (at / "scene.usd").unlink()
    assert host.run("unmount", f"{mounter.home}/host/../mnt/").returncode == 0
    assert (work / "upper/new").read_bytes() == b"written"
    assert sorted(path.name for path in work.iterdir()) == ["host", "upper"]
    mounter.assert_nothing_is_left()


def test_a_store_that_is_not_there_is_told_before_anything_is_mounted(
    mounter: Mounter, inputs: Manifest
) -> None:
    host, at = mounter.host, mounter.home / "mnt"
    manifest = mounter.manifest_file(inputs)
    for url, code, reason in [
        (f"file://{mounter.home}/nowhere", 70, f"{mounter.home}/nowhere: No such file"),
        ("file:///no/where", 70, "/no/where: No such file"),
        ("store", 67, "'store' is not a store"),
    ]:
        done = host.run("mount", manifest, at, "--store", url)
        assert (done.returncode, reason in done.stderr) == (code, True), done.stderr
    assert not at.exists()
    mounter.assert_nothing_is_left()


def test_a_directory_that_is_not_empty_is_not_mounted_over(
    mounter: Mounter, inputs: Manifest
) -> None:
    host, at = mounter.host, mounter.home / "mnt"
    at.mkdir()
    (at / "precious").write_bytes(b"")
    manifest = mounter.manifest_file(inputs)
    done = host.run("mount", manifest, at, "--store", host.store_url)
    assert (done.returncode, "not empty" in done.stderr) == (80, True)
    (mounter.home / "link").symlink_to(mounter.home)
    done = host.run("mount", manifest, mounter.home / "link", "--store", host.store_url)
    assert (done.returncode, "is a link" in done.stderr) == (80, True)
    other = mounter.home / "other"
    assert host.run("mount", at / "none", other, "--store", host.store_url).returncode == 85
    mounter.assert_nothing_is_left()


def test_mounts_that_are_made_at_one_time_leave_each_other_alone(
    mounter: Mounter, inputs: Manifest
) -> None:
    host = mounter.host
    manifest = mounter.manifest_file(inputs)
    # Each command clears what is stale, and none of the others is.
    places = [mounter.home / f"mnt-{number}" for number in range(4)]
    commands = [host.popen("mount", manifest, at, "--store", host.store_url) for at in places]
    ended = [(command.communicate(timeout=60)[1], command.returncode) for command in commands]
    assert [code for _, code in ended] == [0] * 4, ended
    for at in places:
        assert (at / "scene.usd").read_bytes() == b"#usda 1.0\n"
        assert host.mounts.end(at)
    mounter.assert_nothing_is_left()


def test_a_mount_that_is_noted_down_while_others_look_is_not_stale(
    mounter: Mounter, inputs: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = mounter.host.mounts
    place = mounts._place(mounter.mount(inputs))
    record, later = place / "record.json", place / "later"
    record.rename(later)
    starter = subprocess.Popen(["sleep", "60"])
    (place / "starter").write_text(lease_owner(starter.pid) or "")
    is_served = Mounts._is_served

    def note() -> None:
        if later.exists():
            later.rename(record)
        starter.kill()
        starter.wait()

    def served_and_noted_right_after(self: Mounts, place: Path) -> bool:
        answer = is_served(self, place)
        note()
        return answer

    monkeypatch.setattr(Mounts, "_is_served", served_and_noted_right_after)
    try:
        assert mounts.clear_stale() == []
    finally:
        note()


@by_each_transport_in_time
def test_only_its_owner_may_ask_a_mount(mounter: Mounter, inputs: Manifest) -> None:
    at = mounter.mount(inputs)
    control = Path(mounter.host.mounts.control_of(at))
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    assert stat.S_IMODE(control.parent.stat().st_mode) == 0o700
    status = mounter.status(at)
    assert (status["writes"], status["files"]) == ("none", len(FILES))
    assert status["supervisor"] == mounter.ready[at].pid
