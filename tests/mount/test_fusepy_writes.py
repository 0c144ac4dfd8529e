"""Our own overlay served by libfuse: what fusepy and libfuse 2 would get wrong about writing."""

import mmap
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.mount.conftest import Mounter
from tests.mount.file_operations import RENAME_EXCHANGE, RENAME_NOREPLACE, Operations
from tests.mount.test_fusepy_mount import DEAD, Tries, _kill_server
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.other_user import NOBODY, being_nobody
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files

FILES: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "tex/wood.tx": 500_001,
    "tex/stone.tx": 30_000,
    **{f"shots/{at:02}/plate.exr": 3000 + at for at in range(5)},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_files(source, FILES, mtime_ns=1_600_000_000_000_000_000)
    return source


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[Mounter]:
    """One host whose mount `mnt` all tests share, each with a directory of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    home = tmp_path_factory.mktemp("fusepy-overlay")
    mounter = Mounter(home, f"file://{home}/store", transport="fusepy")
    mounter.mount(mounter.stored(source), writes="overlay")
    yield mounter
    mounter.host.mounts.end(mounter.home / "mnt")
    mounter.assert_nothing_is_left()
    mounter.close()


@pytest.fixture
def at(mounted: Mounter, request: pytest.FixtureRequest) -> Path:
    """A directory of the mount."""
    name: str = request.node.name
    at = mounted.home / "mnt" / name
    at.mkdir()
    return at


@pytest.fixture
def upper(at: Path, mounted: Mounter) -> Path:
    """Where what is written to that directory lies."""
    return mounted.home / "mnt-work/upper" / at.name


def test_a_time_is_set_left_or_now_as_it_is_asked(at: Path) -> None:
    """Seen to fail without `flag_utime_omit_ok`, and with the times as fusepy adds them up."""
    file = at / "file"
    file.write_bytes(b"")
    os.utime(file, ns=(5_000_000_006, 7_000_000_008))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (5_000_000_006, 7_000_000_008)
    # As numbers of nanoseconds, these two are UTIME_NOW and UTIME_OMIT.
    os.utime(file, ns=(1_073_741_823, 1_073_741_822))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (1_073_741_823, 1_073_741_822)
    os.system(f"touch -m '{file}'")
    assert file.stat().st_atime_ns == 1_073_741_823, "left"
    assert file.stat().st_mtime_ns > 1_600_000_000_000_000_000, "now"
    os.system(f"touch -a -d @9 '{file}'")
    assert file.stat().st_atime_ns == 9_000_000_000
    assert file.stat().st_mtime_ns > 1_600_000_000_000_000_000, "left"
    os.utime(file)
    assert file.stat().st_atime_ns > 1_600_000_000_000_000_000
    os.utime(file, ns=(-1_500_000_000, -1))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (-1_500_000_000, -1)


def test_much_is_written_at_once(at: Path, mounted: Mounter) -> None:
    """Seen to fail without `big_writes`: a message for each page."""
    server = mounted.status(mounted.home / "mnt")["pid"]
    before = _reads_of(server)
    with (at / "file").open("wb", buffering=0) as file:
        assert file.write(b"x" * (8 << 20)) == 8 << 20
    # 64 of 128 KiB each, and a few for names; pages would be 2048.
    calls = _reads_of(server) - before
    assert calls < 500
    assert (at / "file").stat().st_size == 8 << 20


def _reads_of(pid: int) -> int:
    """Return how often a process has called read(2); each request is one."""
    facts = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in facts if line.startswith("syscr:"))


def test_names_and_targets_are_bytes(at: Path, upper: Path) -> None:
    """Seen to fail with UTF-8 for the encoding."""
    name = os.fsdecode(b"latin-\xe9 \xff")
    (at / name).mkdir()
    (at / name / name).write_bytes(b"x")
    (at / name / name).rename(at / f"{name}2")
    (at / "link").symlink_to(f"{name}2")
    os.link(at / f"{name}2", at / f"{name}3")
    assert sorted(os.listdir(at)) == sorted([name, f"{name}2", f"{name}3", "link"])  # noqa: PTH208
    assert (at / "link").read_bytes() == b"x"
    assert os.fsencode((at / "link").readlink()) == b"latin-\xe9 \xff2"
    assert os.fsencode(f"{name}3") in os.listdir(os.fsencode(upper))  # noqa: PTH208
    os.setxattr(at / "link", "user.\u00e9", b"\x00\xff", follow_symlinks=True)
    assert os.getxattr(at / f"{name}2", "user.\u00e9") == b"\x00\xff"
    assert os.listxattr(at / f"{name}3") == ["user.\u00e9"]
    os.removexattr(at / f"{name}2", "user.\u00e9")
    assert os.listxattr(at / f"{name}2") == []
    with pytest.raises(OSError, match="name too long"):
        (at / ("x" * 256)).write_bytes(b"")


def test_what_is_removed_while_it_is_open_is_nowhere_and_goes_on(at: Path, upper: Path) -> None:
    """Seen to fail when libfuse's rename to a hidden name is one on the disk."""
    (at / "d").mkdir()
    with (at / "d/file").open("w+b", buffering=0) as file, (at / "gone").open("w+b") as gone:
        file.write(b"before")
        (at / "d/file").unlink()
        assert list((at / "d").iterdir()) == list((upper / "d").iterdir()) == []
        assert (os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_nlink) == (6, 0)
        file.write(b" and after")
        os.fchmod(file.fileno(), 0o600)
        os.ftruncate(file.fileno(), 10)
        # The name is free, and the directory can go.
        (at / "d/file").write_bytes(b"another")
        (at / "d/file").unlink()
        (at / "d").rmdir()
        file.seek(0)
        assert file.read() == b"before and"
        gone.write(b"x")
        (at / "gone").unlink()
        with pytest.raises(FileNotFoundError):
            (at / "gone").stat()
    assert list(at.iterdir()) == list(upper.iterdir()) == []


def test_a_file_takes_the_place_of_one_that_is_open(at: Path, upper: Path) -> None:
    (at / "old").write_bytes(b"old")
    (at / "new").write_bytes(b"new")
    with (at / "old").open("rb", buffering=0) as held:
        (at / "new").rename(at / "old")
        assert held.read() == b"old"
        assert (at / "old").read_bytes() == b"new"
        assert [path.name for path in at.iterdir()] == ["old"]
    assert [path.name for path in upper.iterdir()] == ["old"]


def test_an_input_that_is_removed_while_it_is_open_is_read_on(
    mounted: Mounter, source: Path
) -> None:
    file = mounted.home / "mnt/tex/stone.tx"
    with file.open("rb", buffering=0) as held:
        file.unlink()
        assert not file.exists()
        assert held.read() == (source / "tex/stone.tx").read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["wood.tx"]


def test_what_is_written_by_one_name_is_seen_by_the_other(at: Path) -> None:
    """Seen to fail with pages kept, and with attributes kept, for a file of two names."""
    (at / "a").write_bytes(b"x" * 10_000)
    assert (at / "a").read_bytes() == b"x" * 10_000
    os.link(at / "a", at / "b")
    assert (at / "a").stat().st_nlink == (at / "b").stat().st_nlink == 2
    assert (at / "a").samefile(at / "b")
    with (at / "a").open("rb", buffering=0) as a, (at / "b").open("r+b", buffering=0) as b:
        assert a.read(5) == b"xxxxx"
        b.write(b"y" * 10_000)
        assert a.read(5) == b"yyyyy"
        b.truncate(7)
        assert os.fstat(a.fileno()).st_size == 7
    assert (at / "a").read_bytes() == b"y" * 7
    (at / "b").write_bytes(b"whole anew")
    assert (at / "a").read_bytes() == b"whole anew"
    (at / "b").chmod(0o640)
    assert (at / "a").stat().st_mode & 0o777 == 0o640
    (at / "b").unlink()
    assert (at / "a").stat().st_nlink == 1
    assert (at / "a").read_bytes() == b"whole anew"


def test_a_shared_map_of_a_file_of_one_name_is_written_back(at: Path) -> None:
    (at / "file").write_bytes(bytes(10_000))
    with (at / "file").open("r+b") as file, closing(mmap.mmap(file.fileno(), 0)) as mapped:
        mapped[4094:4098] = b"here"
        mapped.flush()
    assert (at / "file").read_bytes()[4094:4098] == b"here"


def test_who_makes_a_file_owns_it(at: Path) -> None:
    at.chmod(0o777)
    # By its descriptor: others may not enter the directories of the tests.
    directory = os.open(at, os.O_RDONLY | os.O_DIRECTORY)
    before = os.umask(0o027)
    try:
        with being_nobody():
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o666, dir_fd=directory))
            os.mkdir("d", dir_fd=directory)
            os.mkfifo("p", dir_fd=directory)
            os.symlink("file", "link", dir_fd=directory)
            with pytest.raises(PermissionError):
                os.chown("file", 0, 0, dir_fd=directory)
    finally:
        os.umask(before)
        os.close(directory)
    for name, mode in (("file", 0o640), ("d", 0o750), ("p", 0o640), ("link", 0o777)):
        status = (at / name).lstat()
        assert (name, status.st_uid, status.st_mode & 0o777) == (name, NOBODY, mode)


def test_who_is_not_root_is_not_shown_roots_attributes(at: Path) -> None:
    (at / "file").write_bytes(b"")
    os.setxattr(at / "file", "user.a", b"")
    os.setxattr(at / "file", "trusted.a", b"")
    with (at / "file").open("rb") as file:
        assert sorted(os.listxattr(file.fileno())) == ["trusted.a", "user.a"]
        with being_nobody():
            assert os.listxattr(file.fileno()) == ["user.a"]


def test_what_libfuse_2_can_not_do_is_refused(at: Path) -> None:
    """And docs/SEMANTICS.md says so; the C library's own posix_fallocate writes zeros instead."""
    (at / "other").write_bytes(b"other")
    (at / "file").write_bytes(b"")
    operations = Operations()
    with pytest.raises(OSError, match="not supported"):
        operations.allocate(os.fspath(at / "file"), 0, 0, 100_000)
    for to, flags in (("new", RENAME_NOREPLACE), ("other", RENAME_EXCHANGE)):
        with pytest.raises(OSError, match="Invalid argument"):
            operations.rename_with(os.fspath(at / "file"), os.fspath(at / to), flags)
    with pytest.raises(OSError, match="not supported"):
        operations.open_nameless(1, os.fspath(at))
    assert sorted(path.name for path in at.iterdir()) == ["file", "other"]
    os.link(at / "other", at / "second")
    with (at / "second").open("r+b") as two:
        with pytest.raises(OSError, match="No such device"):
            mmap.mmap(two.fileno(), 0)
        with closing(mmap.mmap(two.fileno(), 0, flags=mmap.MAP_PRIVATE)) as mapped:
            assert mapped[:] == b"other"
    with (at / "file").open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 100_000)
        assert os.fstat(file.fileno()).st_size == 100_000


def test_opening_for_writing_waits_for_no_store(
    tmp_path: Path, source: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    environment = s3.environment_at(fault_proxy.url)
    url = f"s3://{s3.bucket}/{s3_prefix}"
    mounter = Mounter(tmp_path, url, environment=environment, transport="fusepy")
    try:
        at = mounter.mount(mounter.stored(source, past_the_proxy=s3), writes="overlay")
        stall = fault_proxy.inject(Fault.STALL)
        os.close(os.open(at / "tex/wood.tx", os.O_RDWR))
        (at / "tex/stone.tx").write_bytes(b"anew")
        (at / "tex").rename(at / "moved")
        (at / "moved/wood.tx").chmod(0o600)
        assert (at / "moved/stone.tx").read_bytes() == b"anew"
        assert stall.hits == 0
    finally:
        mounter.close()


@pytest.mark.parametrize("transport", ["fusepy"])
def test_what_was_written_outlives_a_server_and_nothing_hidden_is_left(
    mounter: Mounter, source: Path
) -> None:
    at = mounter.mount(mounter.stored(source), writes="overlay")
    upper = mounter.home / "mnt-work/upper"
    (at / "before").write_bytes(b"written before")
    (at / "shots/03").rename(at / "renamed")
    (at / "open").write_bytes(b"removed while it is open")
    held = os.open(at / "open", os.O_RDONLY)
    (at / "open").unlink()
    writer = Tries(lambda number: (at / f"new-{number}").write_bytes(b"%d" % number))
    try:
        for deaths in (1, 2):
            _kill_server(mounter, at, deaths=deaths)
    finally:
        writer.end()

    assert writer.done
    assert writer.refused <= DEAD
    for number in writer.done:
        assert (at / f"new-{number}").read_bytes() == b"%d" % number
    assert (at / "before").read_bytes() == b"written before"
    assert files_below(at / "renamed") == files_below(source / "shots/03")
    assert not any("hidden" in path.name or path.name == "open" for path in upper.rglob("*"))
    (at / "large").write_bytes(b"removed by who comes after")
    (at / "large").unlink()
    # Nor on the disk, whose space others need.
    until(lambda: not list((mounter.home / "mnt-work/work").iterdir()))
    with pytest.raises(OSError, match=r"not connected|abort|Input/output"):
        os.read(held, 1)
    os.close(held)
    assert mounter.host.mounts.end(at)
    assert list(at.iterdir()) == [], "nothing was written to what is below"
    mounter.assert_nothing_is_left()
