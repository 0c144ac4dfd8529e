"""What programs do to a file system that they did not expect to be special, in every stack.

Each test has a directory of its own in a mount that the tests of this module share; those that end
the mount, or wait in it, have one of theirs.
"""

import fcntl
import mmap
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry, Manifest
from tests.mount.conftest import Mounter, gone
from tests.mount.stacks import Stack
from tests.mount.test_xattrs import error_of
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files

MTIME_NS = 1_600_000_000_123_456_000
# Of each tree of inputs; every test has one.
FILES: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "tex/wood.tx": 50_000,
    "tex/deep/er/fur.tx": 3000,
    "geo/big.abc": 300_000,
    "tool": b'#!/bin/sh\necho "$0 $1"\n',
}
TREES = 60
# Only a hang meets it.
HANG_SECONDS = 60.0


@pytest.fixture
def transport(stack: Stack) -> str:
    return stack.transport


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_files(source, FILES, mtime_ns=MTIME_NS)
    return source


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, stack: Stack, source: Path
) -> Iterator[Iterator[Path]]:
    """Trees of inputs in one mount, each for one test."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    home = tmp_path_factory.mktemp("applications")
    mounter = Mounter(home, f"file://{home}/store", transport=stack.transport)
    entries = mounter.stored(source).entries
    many = Manifest.of(
        FileEntry(entry.hash, entry.mtime, f"{number}/{entry.path}", entry.size)
        for number in range(TREES)
        for entry in entries
    )
    at = mounter.mount(many, writes=stack.writes)
    yield (at / str(number) for number in range(TREES))
    assert mounter.errors(at) == []
    assert mounter.host.mounts.end(at)
    mounter.close()


@pytest.fixture
def tree(shared: Iterator[Path]) -> Path:
    """A tree of inputs that nobody else uses."""
    return next(shared)


# ------------------------------------------------------------------ names and sizes


def test_names_are_bytes_and_are_kept_apart(tree: Path) -> None:
    names = [
        unicodedata.normalize("NFC", "\u00e9"),
        unicodedata.normalize("NFD", "\u00e9"),
        "a\nb",
        "a\tb ",
        " ",
        "\U0001f3ac",
        os.fsdecode(b"\xff\xfe"),
        "A",
        "a",
        ".wh.a",
        "-rf",
        "\\",
        ",:",
        "n" * 255,
        "\u540d" * 85,
    ]
    for name in names:
        (tree / name).write_bytes(os.fsencode(name))
    assert sorted(path.name for path in tree.iterdir() if path.is_file()) == sorted(
        [*names, "scene.usd", "tool"]
    )
    assert [(tree / name).read_bytes() for name in names] == [os.fsencode(name) for name in names]
    for name in names:
        (tree / name).rename(tree / "tex" / name)
        (tree / "tex" / name).unlink()
    with pytest.raises(OSError, match="name too long"):
        (tree / ("\u540d" * 86)).touch()


def test_a_path_may_be_as_long_as_paths_may_be(tree: Path) -> None:
    here = os.open(tree, os.O_RDONLY)
    try:
        # A path that is given to the kernel has 4,095 bytes at the most.
        names = ["d" * 99] * 40
        path = "/".join([*names, "f" * (4095 - 40 * 100)])
        assert len(path) == 4095
        for depth in range(1, len(names) + 1):
            os.mkdir("/".join(names[:depth]), dir_fd=here)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
            file.write(b"far")
        assert os.stat(path, dir_fd=here).st_size == 3
        with pytest.raises(OSError, match="name too long"):
            os.stat(f"{path}x", dir_fd=here)
    finally:
        os.close(here)


def test_directories_are_as_deep_as_somebody_goes(tree: Path, stack: Stack) -> None:
    depth = 50 if "speed" in stack.lacks else 500
    fd = os.open(tree / "tex/deep", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("end", os.O_CREAT, dir_fd=fd))
    os.close(fd)
    assert sum(1 for _ in os.walk(tree / "tex/deep")) == depth + 2
    assert (tree / "tex/deep" / "/".join(["d"] * depth) / "end").is_file()
    shutil.rmtree(tree / "tex/deep")
    assert not (tree / "tex/deep").exists()


def test_a_sparse_file_is_as_large_as_it_says(tree: Path) -> None:
    terabyte = 1 << 40
    for path in (tree / "sparse", tree / "geo/big.abc"):
        before = path.read_bytes() if path.exists() else b""
        path.touch()
        with path.open("r+b") as file:
            file.truncate(terabyte)
            file.seek(-3, os.SEEK_END)
            file.write(b"end")
        assert path.stat().st_size == terabyte
        assert path.stat().st_blocks * 512 < 1 << 30
        with path.open("rb") as opened:
            assert os.pread(opened.fileno(), 10, terabyte - 3) == b"end"
            assert os.pread(opened.fileno(), len(before) + 5, 0) == before + b"\0" * 5
        path.unlink()


# ------------------------------------------------------------------ what is removed and made anew


def test_what_takes_the_place_of_an_input_is_new(tree: Path) -> None:
    (tree / "scene.usd").unlink()
    (tree / "scene.usd").mkdir()
    (tree / "scene.usd/inside").write_bytes(b"new")
    shutil.rmtree(tree / "tex")
    (tree / "tex").write_bytes(b"a file")
    shutil.rmtree(tree / "geo")
    (tree / "geo").mkdir()
    assert list((tree / "geo").iterdir()) == []
    (tree / "geo/big.abc").mkdir()
    assert [path.relative_to(tree).as_posix() for path in sorted(tree.rglob("*"))] == [
        *("geo", "geo/big.abc", "scene.usd", "scene.usd/inside", "tex", "tool")
    ]
    shutil.rmtree(tree)
    assert not tree.exists()
    tree.mkdir()
    assert list(tree.iterdir()) == []


def test_a_directory_of_inputs_is_renamed_again_and_again(tree: Path, source: Path) -> None:
    (tree / "tex").rename(tree / "a")
    (tree / "a/deep").rename(tree / "geo/deep")
    (tree / "tex").mkdir()
    (tree / "geo").rename(tree / "tex/geo")
    (tree / "a").rename(tree / "geo")
    (tree / "tex/geo/deep/er").rename(tree / "er")
    assert files_below(tree / "er") == files_below(source / "tex/deep/er")
    assert (tree / "tex/geo/big.abc").read_bytes() == (source / "geo/big.abc").read_bytes()
    assert (tree / "geo/wood.tx").read_bytes() == (source / "tex/wood.tx").read_bytes()
    assert list((tree / "tex/geo/deep").iterdir()) == []
    with pytest.raises(OSError, match="Invalid argument"):
        (tree / "tex").rename(tree / "tex/geo/tex")
    with pytest.raises(OSError, match="not empty"):
        (tree / "er").rename(tree / "tex")


def test_a_file_is_replaced_while_it_is_open(tree: Path, source: Path) -> None:
    """As renderers save: beside it, synced, renamed over it."""
    before = (source / "tex/wood.tx").read_bytes()
    with (tree / "tex/wood.tx").open("rb") as held, closing(_mapped(held.fileno())) as mapped:
        with (tree / "tex/wood.tx~").open("wb") as new:
            new.write(b"saved")
            new.flush()
            os.fsync(new.fileno())
        (tree / "tex/wood.tx~").replace(tree / "tex/wood.tx")
        assert (tree / "tex/wood.tx").read_bytes() == b"saved"
        assert held.read() == before
        assert mapped[:] == before
    assert sorted(path.name for path in (tree / "tex").iterdir()) == ["deep", "wood.tx"]


def _mapped(fd: int) -> mmap.mmap:
    return mmap.mmap(fd, 0, prot=mmap.PROT_READ)


def test_a_removed_file_lives_as_long_as_it_is_open(tree: Path) -> None:
    for path in (tree / "scratch", tree / "tex/wood.tx"):
        with path.open("a+b") as file:
            path.unlink()
            file.write(b"x" * 5000)
            file.flush()
            file.seek(-5000, os.SEEK_END)
            assert file.read() == b"x" * 5000
            file.truncate(10)
            status = os.fstat(file.fileno())
            assert (status.st_nlink, status.st_size) == (0, 10)
        assert not path.exists()


# ------------------------------------------------------------------ many at once


def test_lines_of_two_writers_are_whole(tree: Path) -> None:
    """As logs are written: O_APPEND, by processes that know nothing of each other."""
    lines = 500
    write = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        f"for at in range({lines}): os.write(fd, f'{{sys.argv[2]}} {{at}}\\n'.encode())\n"
    )
    log = tree / "tex/wood.tx"
    before = log.read_bytes()
    writers = [
        subprocess.Popen([sys.executable, "-c", write, log, name]) for name in ("one", "two")
    ]
    assert [writer.wait(HANG_SECONDS) for writer in writers] == [0, 0]
    after = log.read_bytes()
    assert after.startswith(before)
    found = after[len(before) :].decode().splitlines()
    for name in ("one", "two"):
        mine = [line for line in found if line.startswith(name)]
        assert mine == [f"{name} {at}" for at in range(lines)]
    assert len(found) == 2 * lines


def test_what_one_maps_another_reads(tree: Path) -> None:
    shared = tree / "tex/wood.tx"
    change = (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'r+b') as file, mmap.mmap(file.fileno(), 0) as mapped:\n"
        "    mapped[10_000:10_005] = b'there'\n"
    )
    with shared.open("r+b") as file, closing(mmap.mmap(file.fileno(), 0)) as mapped:
        mapped[0:4] = b"here"
        subprocess.run([sys.executable, "-c", change, shared], check=True)
        assert mapped[10_000:10_005] == b"there"
        assert os.pread(file.fileno(), 4, 0) == b"here"
        os.pwrite(file.fileno(), b"everywhere", 20_000)
        assert mapped[20_000:20_010] == b"everywhere"
    assert shared.stat().st_size == 50_000


def test_a_range_is_locked_against_other_processes(tree: Path) -> None:
    look = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, int(sys.argv[2]))\n"
        "    except BlockingIOError: sys.exit(7)\n"
    )

    def locked(at: int) -> int:
        command = [sys.executable, "-c", look, str(tree / "scene.usd"), str(at)]
        return subprocess.run(command, check=False).returncode

    with (tree / "scene.usd").open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 20)
        assert (locked(0), locked(15), locked(25), locked(30)) == (0, 7, 7, 0)
        fcntl.lockf(file, fcntl.LOCK_UN, 10, 20)
        assert locked(20) == 0


def test_a_lock_goes_with_its_holder(tree: Path) -> None:
    hold = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", hold, str(tree / "scene.usd")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with (tree / "scene.usd").open("rb") as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder.kill()
            fcntl.flock(file, fcntl.LOCK_EX)


# ------------------------------------------------------------------ programs


def test_an_input_is_run_once_it_may_be(tree: Path) -> None:
    with pytest.raises(PermissionError):
        subprocess.run([tree / "tool", "x"], check=False)
    (tree / "tool").chmod(0o755)
    done = subprocess.run(["./tool", "x"], cwd=tree, capture_output=True, text=True, check=True)
    assert done.stdout == "./tool x\n"


def test_a_program_that_runs_is_not_written_to(tree: Path) -> None:
    program = tree / "sleep"
    shutil.copy("/bin/sleep", program)
    running = subprocess.Popen([program, "600"])
    try:
        # Until it is another program than this one.
        until(lambda: Path(f"/proc/{running.pid}/comm").read_text() == "sleep\n")
        with pytest.raises(OSError, match="Text file busy"):
            program.open("r+b")
        program.unlink()
    finally:
        running.kill()
        assert running.wait() == -signal.SIGKILL


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_a_database_survives_a_writer_that_is_killed(tree: Path, journal: str) -> None:
    path = tree / "tex/jobs.db"
    with closing(sqlite3.connect(path)) as database:
        assert database.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal.lower(),)
        database.execute("CREATE TABLE frames (number INTEGER PRIMARY KEY)")
        database.commit()
    write = (
        "import itertools, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1])\n"
        "for at in itertools.count():\n"
        "    with database: database.execute('INSERT INTO frames VALUES (?)', (at,))\n"
        "    print(at, flush=True)\n"
    )
    command = [sys.executable, "-c", write, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        for _ in range(20):
            last = int(writer.stdout.readline())
        writer.kill()
        last = max([last, *(int(line) for line in writer.stdout)])
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        [frames] = database.execute("SELECT count(*) FROM frames").fetchone()
        assert frames in (last + 1, last + 2)


def test_a_tree_goes_into_an_archive_and_comes_out(tree: Path, source: Path) -> None:
    (tree / "link").symlink_to("tex/wood.tx")
    os.link(tree / "tex/wood.tx", tree / "hard")
    subprocess.run(["tar", "cf", "all.tar", "tex", "geo", "link", "hard"], cwd=tree, check=True)
    with tarfile.open(tree / "all.tar") as archive:
        kinds = {member.name: member.type for member in archive}
    assert (kinds["link"], kinds["hard"]) == (tarfile.SYMTYPE, tarfile.LNKTYPE)
    (tree / "out").mkdir()
    subprocess.run(["tar", "xf", "../all.tar"], cwd=tree / "out", check=True)
    assert (tree / "out/hard").samefile(tree / "out/tex/wood.tx")
    for folder in ("tex", "geo"):
        compare = ["diff", "-r", str(tree / "out" / folder), str(source / folder)]
        assert subprocess.run(compare, check=False).returncode == 0
    # tar has whole seconds.
    copied, input_ = (tree / "out/geo/big.abc").stat(), (source / "geo/big.abc").stat()
    assert int(copied.st_mtime) == int(input_.st_mtime)


def test_modes_and_owners_are_kept_by_a_copy(tree: Path) -> None:
    (tree / "tex/wood.tx").chmod(0o640)
    os.chown(tree / "tex/wood.tx", 1, 2)
    os.setxattr(tree / "tex/wood.tx", "user.colour", b"brown")
    subprocess.run(["cp", "-a", tree / "tex", tree / "copy"], check=True)
    for name in ("wood.tx", "deep/er/fur.tx"):
        original, copy = (tree / "tex" / name).stat(), (tree / "copy" / name).stat()
        assert copy.st_mode == original.st_mode
        assert (copy.st_uid, copy.st_gid) == (original.st_uid, original.st_gid)
        assert copy.st_mtime_ns == original.st_mtime_ns
    assert os.getxattr(tree / "copy/wood.tx", "user.colour") == b"brown"


def test_what_is_no_file_and_no_directory_has_attributes_of_its_own(tree: Path) -> None:
    """Of a link, not of what it leads to; users may set none of it, only root."""
    (tree / "link").symlink_to("tex")
    os.mkfifo(tree / "fifo")
    for path in (tree / "link", tree / "fifo"):
        with pytest.raises(PermissionError):
            os.setxattr(path, "user.a", b"x", follow_symlinks=False)
        os.setxattr(path, "trusted.a", b"x", follow_symlinks=False)
        with pytest.raises(FileExistsError):
            os.setxattr(path, "trusted.a", b"y", os.XATTR_CREATE, follow_symlinks=False)
        path.rename(moved := path.with_name("moved"))
        assert os.getxattr(moved, "trusted.a", follow_symlinks=False) == b"x"
        assert os.listxattr(moved, follow_symlinks=False) == ["trusted.a"]
        assert error_of(tree / "tex", "trusted.a") in ("ENODATA", "ENOTSUP")
        os.removexattr(moved, "trusted.a", follow_symlinks=False)
        assert os.listxattr(moved, follow_symlinks=False) == []
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(moved, "trusted.a", follow_symlinks=False)
        moved.unlink()


def test_a_size_that_is_set_to_what_it_is_changes_the_time(tree: Path) -> None:
    """As on a disk, which takes it for a change; first of an input, then of what was written."""
    file = tree / "geo/big.abc"
    for how in (os.truncate, _truncate_open):
        before = file.stat()
        how(file, before.st_size)
        after = file.stat()
        assert after.st_size == before.st_size
        assert after.st_mtime_ns > before.st_mtime_ns
        os.truncate(file, before.st_size + 1)
        os.utime(file, ns=(MTIME_NS, MTIME_NS))


def _truncate_open(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        os.ftruncate(file.fileno(), size)


def test_opening_an_input_for_writing_changes_nothing_of_it(tree: Path, source: Path) -> None:
    before = (tree / "geo/big.abc").stat()
    with (tree / "geo/big.abc").open("r+b") as file:
        file.seek(100)
    after = (tree / "geo/big.abc").stat()
    assert after.st_mtime_ns == before.st_mtime_ns == (source / "geo/big.abc").stat().st_mtime_ns
    assert (after.st_mode, after.st_size) == (before.st_mode, before.st_size)


def test_a_directory_whose_files_come_and_go_is_listed_while_they_do(tree: Path) -> None:
    """What is there all the time is seen once, whatever else changes."""
    stays = {f"stays{at:03}" for at in range(200)}
    for name in stays:
        (tree / "geo" / name).touch()
    seen: list[str] = []
    with os.scandir(tree / "geo") as entries:
        for number, entry in zip(count(), entries, strict=False):
            seen.append(entry.name)
            (tree / "geo" / f"new{number % 20}").touch()
            if entry.name.startswith("new"):
                Path(entry.path).unlink()
            assert number < 5000, "the listing does not end"
    assert sorted(name for name in seen if name in stays) == sorted(stays)
    assert {"big.abc"} <= set(seen)


def test_a_file_is_the_same_file_after_it_was_changed(tree: Path) -> None:
    """By its number and device, which all tools go by that walk a tree or compare files."""
    file = tree / "tex/wood.tx"
    before = file.stat()
    with file.open("ab") as opened:
        opened.write(b"more")
    after = file.stat()
    assert (after.st_ino, after.st_dev) == (before.st_ino, before.st_dev)
    (tree / "new").touch()
    for folder, directories, names in os.walk(tree):
        with os.scandir(folder) as entries:
            numbers = {entry.name: entry.inode() for entry in entries}
        for name in (*directories, *names):
            status = Path(folder, name).stat()
            assert (numbers[name], tree.stat().st_dev) == (status.st_ino, status.st_dev)


def test_no_touch_is_earlier_than_the_one_before(tree: Path) -> None:
    times = []
    for number in range(30):
        file = tree / f"touched-{number}"
        file.write_bytes(b"")
        times.append(file.stat().st_mtime_ns)
        for _ in range(2):
            file.touch()
            times.append(file.stat().st_mtime_ns)
    assert times == sorted(times)


def test_what_is_not_as_on_a_disk_is_as_it_is_said_to_be(tree: Path, stack: Stack) -> None:
    """So that what test_twin.py passes over, and docs/SEMANTICS.md names, is no more than that."""
    if stack.writes != "overlayfs":
        pytest.skip("these are overlayfs's own")
    wood, fur, big = tree / "tex/wood.tx", tree / "tex/deep/er/fur.tx", tree / "geo/big.abc"
    with pytest.raises(OSError, match="not supported"):
        os.getxattr(wood, "user.none")
    with (tree / "new").open("w+b") as new, wood.open("rb") as old:
        with pytest.raises(OSError, match="cross-device"):
            os.copy_file_range(old.fileno(), new.fileno(), 100)
        # Which is what programs fall back from.
        subprocess.run(["cp", wood, tree / "copy"], check=True)
        assert (tree / "copy").read_bytes() == wood.read_bytes()
    with big.open("rb") as held, closing(_mapped(held.fileno())) as mapped:
        before = mapped[:10]
        with big.open("r+b") as file:
            file.write(b"0123456789")
        assert (held.read(10), mapped[:10]) == (b"0123456789", before)
    wood.chmod(0o600)
    assert wood.stat().st_mtime_ns < MTIME_NS + 60_000_000_000
    wood.open("r+b").close()
    assert wood.stat().st_mtime_ns > MTIME_NS + 60_000_000_000
    with fur.open("rb") as file:
        fur.unlink()
        assert os.fstat(file.fileno()).st_nlink == 1
    (tree / "full/file").parent.mkdir()
    (tree / "full/file").touch()
    with pytest.raises(OSError, match="not empty"):
        (tree / "tex/deep").rename(tree / "full")
    assert (tree / "tex").stat().st_mtime_ns > MTIME_NS
    assert (tree / "tex").stat().st_nlink == 1


# ------------------------------------------------------------------ how it ends


@pytest.fixture
def own(mounter: Mounter, source: Path, stack: Stack) -> Path:
    """A mount of its own."""
    return mounter.mount(mounter.stored(source), writes=stack.writes)


HOLDS = [
    "os.chdir(tree + '/tex')",
    "file = open(tree + '/new', 'wb')",
    "file = open(tree + '/geo/big.abc', 'r+b'); mapped = mmap.mmap(file.fileno(), 0)",
    "file = open(tree + '/scene.usd', 'r+b'); fcntl.lockf(file, fcntl.LOCK_EX)",
    "os.chdir(tree); forked = os.fork() and sys.exit()",
]


def test_whatever_everybody_holds_the_mount_ends(mounter: Mounter, own: Path) -> None:
    """A directory that somebody is in, a file, a map, a lock, and a process that nobody awaits."""
    holders: list[subprocess.Popen[str]] = []
    pids: list[int] = []
    try:
        for hold in HOLDS:
            program = (
                "import fcntl, mmap, os, sys, time\n"
                f"tree = sys.argv[1]\n{hold}\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"
            )
            command = [sys.executable, "-c", program, str(own)]
            holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            holders.append(holder)
            assert holder.stdout
            with holder.stdout:
                pids.append(int(holder.stdout.readline()))
        assert pids[-1] != holders[-1].pid
        assert mounter.host.mounts.end(own)
        assert gone(own)
        mounter.assert_nothing_is_left()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for holder in holders:
            holder.wait(HANG_SECONDS)


READS: dict[str, str] = {
    "open": "fd = os.open(path, os.O_RDONLY); started(); os.pread(fd, 100, 0)",
    "read": "file = open(path, 'rb', buffering=0); started(); file.read()",
    "map": (
        "file = open(path, 'rb'); mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ);"
        " started(); mapped[:]"
    ),
    "copy": "started(); shutil.copyfile(path, path + '~')",
    "change": "started(); open(path, 'r+b', 0).write(b'x')",
    "append": "started(); open(path, 'ab', 0).write(b'x')",
}


@pytest.fixture
def stalled(
    tmp_path: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, transport: str
) -> Iterator[Mounter]:
    """Mounts from the S3 server, behind the proxy."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    environment = s3.environment_at(fault_proxy.url)
    store_url = f"s3://{s3.bucket}/{s3_prefix}"
    mounter = Mounter(tmp_path, store_url, environment=environment, transport=transport)
    yield mounter
    mounter.close()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=[] if how in ("map", "change") else [pytest.mark.slow])
        for how in READS
    ],
)
def test_whoever_waits_for_a_store_that_hangs_can_be_killed(
    stalled: Mounter, source: Path, s3: S3Server, fault_proxy: FaultProxy, stack: Stack, how: str
) -> None:
    if stack.writes == "overlay" and how in ("change", "append"):
        pytest.skip("opening fetches nothing there")
    at = stalled.mount(stalled.stored(source, past_the_proxy=s3), writes=stack.writes)
    stall = fault_proxy.inject(Fault.STALL)
    program = (
        "import mmap, os, shutil, sys\npath = sys.argv[1]\n"
        f"def started(): print(flush=True)\n{READS[how]}\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", program, at / "geo/big.abc"], stdout=subprocess.DEVNULL
    )
    try:
        until(lambda: stall.hits >= 1, seconds=HANG_SECONDS)
        reader.send_signal(signal.SIGKILL)
        reader.wait(20)
    finally:
        reader.kill()
        reader.wait()
    # Others are not kept from what is there.
    assert sorted(path.name for path in at.iterdir()) == ["geo", "scene.usd", "tex", "tool"]
    fault_proxy.refuse(0)
    fault_proxy.clear()
    assert (at / "geo/big.abc").read_bytes() == (source / "geo/big.abc").read_bytes()


# ------------------------------------------------------------------ and begins again


def test_what_was_changed_is_there_when_it_is_mounted_again(tmp_path: Path, source: Path) -> None:
    """By a server that numbers files as they are asked for: each has another's number."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounter = Mounter(tmp_path, f"file://{tmp_path}/store", transport="fusepy")
    inputs = mounter.stored(source)
    changed, *others = sorted(files_below(source))
    try:
        at = mounter.mount(inputs, writes="overlayfs")
        with (at / changed).open("ab") as file:
            file.write(b"more")
        assert mounter.host.mounts.end(at)

        mounter.mount(inputs, writes="overlayfs")
        # Files of the root first: one of them now has the number that the changed one had.
        for name in sorted(others, key=len):
            assert (at / name).read_bytes() == (source / name).read_bytes()
        assert (at / changed).read_bytes() == (source / changed).read_bytes() + b"more"
        assert mounter.host.mounts.end(at)
    finally:
        mounter.close()


# ------------------------------------------------------------------ large directories


@pytest.mark.slow
def test_fifty_thousand_inputs_in_one_directory_are_changed(mounter: Mounter, stack: Stack) -> None:
    digest = Digest.of(b"the same")
    many = 2000 if "speed" in stack.lacks else 50_000
    names = [f"frame.{number:05}.exr" for number in range(many)]
    at = mounter.mount(
        Manifest.of(FileEntry(digest.hex, 0, f"in/{name}", digest.size) for name in names),
        writes=stack.writes,
    )
    directory = at / "in"
    for name in names[::10]:
        (directory / name).unlink()
    for number in range(many // 10):
        (directory / f"new.{number:05}").touch()
    for name in names[1::10]:
        (directory / name).rename(directory / f"{name}.moved")
    left = {name for at, name in enumerate(names) if at % 10 > 1}
    left |= {f"new.{number:05}" for number in range(many // 10)}
    left |= {f"{name}.moved" for name in names[1::10]}
    assert set(os.listdir(directory)) == left  # noqa: PTH208 - names
    with os.scandir(directory) as entries:
        sizes = {entry.stat().st_size for entry in entries if not entry.name.startswith("new")}
    assert sizes == {8}


@pytest.mark.slow
def test_fifty_thousand_files_are_made_in_one_directory(
    mounter: Mounter, own: Path, stack: Stack
) -> None:
    directory = own / "geo"
    many = 2000 if "speed" in stack.lacks else 50_000
    for number in range(many):
        (directory / f"{number}").touch()
    assert len(os.listdir(directory)) == many + 1  # noqa: PTH208 - names
    shutil.rmtree(directory)
    assert not directory.exists()
    assert mounter.errors(own) == []
