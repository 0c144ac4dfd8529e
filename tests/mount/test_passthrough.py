"""Cached files that the kernel reads itself: on real mounts, through every change of what is here.

That a file is passed through shows in that it is read while the server is stopped.
"""

import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_plugin.content.manifest import Manifest
from tests.mount.conftest import END_SECONDS, Mounter
from tests.mount.test_verification import flip_last_bit, in_the_store
from tests.servers.proxied_object import until
from vfs.reader import STRICT_BYTES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1024 * 1024
SIZES = {"a.exr": 2 * MIB, "b.exr": 3 * MIB + 17, "deep/c.exr": 2 * MIB, "none": 0}
COPY_OF_A = "another a.exr"


def content(name: str) -> bytes:
    name = "a.exr" if name == COPY_OF_A else name
    return random.Random(name).randbytes(SIZES[name])


@pytest.fixture
def stored(mounter: Mounter) -> Manifest:
    for name in (*SIZES, COPY_OF_A):
        path = mounter.home / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(name))
    return mounter.stored(mounter.home / "source")


@pytest.fixture
def at(mounter: Mounter, stored: Manifest) -> Path:
    """A mount of files that are larger than a MiB on average, none of them here yet."""
    return mounter.mount(stored)


class Files:
    """Files of a mount that this test has open.

    Attributes:
        opened: The descriptors.
    """

    def __init__(self, mounter: Mounter, at: Path) -> None:
        self._mounter = mounter
        self._at = at
        self.opened: list[int] = []

    def open(self, name: str) -> int:
        fd = os.open(self._at / name, os.O_RDONLY)
        self.opened.append(fd)
        return fd

    def close(self) -> None:
        while self.opened:
            os.close(self.opened.pop())

    def fetch(self, name: str) -> None:
        """Bring a file into the cache."""
        assert (self._at / name).read_bytes() == content(name)

    def passed(self) -> int:
        """Return how often a file was opened to be read by the kernel itself."""
        count: int = self._mounter.status(self._at)["counts"]["files_passed_through"]
        return count

    @contextmanager
    def server_stopped(self) -> Iterator[None]:
        server = self._mounter.status(self._at)["pid"]
        os.kill(server, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(server, signal.SIGCONT)

    def kill_server(self) -> None:
        before = self._mounter.status(self._at)["pid"]
        os.kill(before, signal.SIGKILL)
        until(lambda: self._new_server(before), seconds=END_SECONDS)

    def _new_server(self, before: int) -> bool:
        try:
            return bool(self._mounter.status(self._at)["pid"] != before)
        except Exception:  # noqa: BLE001 - there is none for a moment
            return False


@pytest.fixture
def files(mounter: Mounter, at: Path) -> Iterator[Files]:
    files = Files(mounter, at)
    yield files
    files.close()


def read(fd: int) -> bytes:
    """Read all of a file, from the disk."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, 16 * MIB, 0)


def cached(mounter: Mounter, name: str, manifest: Manifest) -> Path:
    [entry] = [entry for entry in manifest.entries if entry.path == name]
    [path] = [*mounter.host.cache_dir.rglob(entry.hash)] or [Path()]
    return path


# ------------------------------------------------------------------ when


def test_a_cached_file_is_read_without_the_server(files: Files) -> None:
    files.fetch("a.exr")
    files.fetch("deep/c.exr")
    fd, other = files.open("a.exr"), files.open("deep/c.exr")
    with files.server_stopped():
        assert read(fd) == content("a.exr")
        with mmap.mmap(other, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == content("deep/c.exr")
    assert files.passed() == 2


def test_a_cached_file_is_read_without_the_server_below_overlayfs_too(
    mounter: Mounter, stored: Manifest
) -> None:
    at = mounter.mount(stored, writes="overlayfs")
    files = Files(mounter, at)
    files.fetch("b.exr")
    fd = files.open("b.exr")
    with files.server_stopped():
        assert read(fd) == content("b.exr")
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == content("b.exr")
    with (at / "b.exr").open("r+b") as file:
        file.write(b"mine")
    assert (at / "b.exr").read_bytes() == b"mine" + content("b.exr")[4:]
    assert read(fd) in (content("b.exr"), b"mine" + content("b.exr")[4:])
    files.close()


def test_which_mounts_pass_files_through_is_chosen_by_the_size_of_their_files_and_told(
    mounter: Mounter, tmp_path: Path, stored: Manifest, at: Path
) -> None:
    large = mounter.status(at)["passthrough"]
    (tmp_path / "small").mkdir()
    for number in range(3):
        (tmp_path / f"small/{number}").write_bytes(b"small" * number)
    small = mounter.mount(mounter.stored(tmp_path / "small"), name="small-mnt")
    off = Mounter(tmp_path, mounter.host.store_url, settings={"mounts": {"passthrough": "off"}})
    none = off.mount(stored, name="off-mnt")

    assert large == {"used": True, "reason": "files of 1.80 MiB on average"}
    assert mounter.status(small)["passthrough"] == {
        "used": False,
        "reason": "files of 0.00 MiB on average",
    }
    assert off.status(none)["passthrough"] == {"used": False, "reason": "the settings say so"}
    Files(off, none).fetch("a.exr")
    Files(off, none).fetch("a.exr")
    assert Files(off, none).passed() == 0


@pytest.mark.parametrize(("writes", "used"), [("none", True), ("overlayfs", False)])
def test_where_the_kernel_has_no_room_for_one_more_file_system_the_server_reads(
    mounter: Mounter, stored: Manifest, writes: str, used: bool
) -> None:
    """As in a container, whose root is an overlayfs: two on each other is the most."""
    below, cache = mounter.home / "below", mounter.host.cache_dir
    for folder in (below / "lower", below / "upper", below / "work", cache):
        folder.mkdir(parents=True)
    options = ",".join(f"{name}dir={below}/{name}" for name in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "below", "-o", options, cache], check=True)
    cache.chmod(0o700)
    try:
        at = mounter.mount(stored, writes=writes)
        files = Files(mounter, at)
        files.fetch("a.exr")
        files.fetch("a.exr")
        told = mounter.status(at)["passthrough"]
        assert told["used"] is used, told
        assert files.passed() == used
        if not used:
            assert told["reason"] == f"{cache}: Too many levels of symbolic links"
        assert mounter.host.mounts.end(at)
    finally:
        subprocess.run(["umount", "-l", cache], check=True)


# ------------------------------------------------------------------ all openings of a file agree


def test_a_file_that_is_opened_before_it_is_here_stays_with_the_server_until_its_last_close(
    files: Files,
) -> None:
    first = files.open("a.exr")
    assert os.pread(first, 100, 0) == content("a.exr")[:100]
    # Now it is here, but to open it in another way would be an error.
    second = files.open("a.exr")
    with mmap.mmap(second, 0, prot=mmap.PROT_READ) as mapped:
        os.close(files.opened.pop())
        os.close(files.opened.pop())
        # A map holds it open as well as a descriptor.
        third = files.open("a.exr")
        assert read(third) == content("a.exr")
        assert mapped[:] == content("a.exr")
        assert files.passed() == 0
        files.close()
    files.open("a.exr")
    assert files.passed() == 1


def test_a_second_name_of_a_content_that_is_open_is_opened_in_its_own_way(files: Files) -> None:
    first = files.open("a.exr")
    assert read(first) == content("a.exr")
    other = files.open(COPY_OF_A)
    assert files.passed() == 1
    with files.server_stopped():
        assert read(other) == content("a.exr")
    assert read(first) == content("a.exr")


@pytest.mark.parametrize("loss", ["evicted", "damaged", "replaced"])
def test_a_file_that_is_open_is_read_whatever_becomes_of_the_cache(
    mounter: Mounter, stored: Manifest, files: Files, loss: str
) -> None:
    files.fetch("a.exr")
    first = files.open("a.exr")
    blob = cached(mounter, "a.exr", stored)
    if loss != "evicted":
        aside = blob.with_name("aside")
        aside.write_bytes(b"x" * blob.stat().st_size)
        aside.chmod(0o400)
        blob.unlink()
        if loss == "damaged":
            aside.rename(blob)
        else:
            blob.mkdir()
            aside.unlink()
    else:
        blob.unlink()
    # Forgets what it has open and has verified.
    files.kill_server()
    second = files.open("a.exr")
    with files.server_stopped():
        assert read(first) == content("a.exr")
        assert read(second) == content("a.exr")
    files.close()
    third = files.open("a.exr")
    assert read(third) == content("a.exr")
    assert mounter.errors(mounter.home / "mnt") == []


# ------------------------------------------------------------------ content that is wrong


@pytest.fixture
def large(mounter: Mounter) -> Manifest:
    """A file that may be read before it is verified; it is damaged in the cache."""
    source = mounter.home / "large"
    source.mkdir()
    (source / "big.vdb").write_bytes(bytes(STRICT_BYTES) + b"tail")
    manifest = mounter.stored(source)
    with mounter.host.services() as context:
        assert context.cache is not None
        [entry] = manifest.entries
        context.cache.add(entry.digest, in_the_store(mounter, manifest).read_bytes())
    flip_last_bit(cached(mounter, "big.vdb", manifest))
    return manifest


@pytest.mark.parametrize("verify", ["stream", "strict"])
def test_what_is_passed_through_was_verified_however_large(
    tmp_path: Path, mounter: Mounter, large: Manifest, verify: str
) -> None:
    mounter = Mounter(tmp_path, mounter.host.store_url, settings={"mounts": {"verify": verify}})
    at = mounter.mount(large)
    files = Files(mounter, at)
    fd = files.open("big.vdb")
    assert files.passed() == 0
    assert os.pread(fd, 10, STRICT_BYTES) == b"tail"
    assert mounter.status(at)["counts"]["blobs_quarantined"] == 1
    # Nobody had read of it.
    assert mounter.errors(at) == []
    os.pread(fd, STRICT_BYTES, 0)
    until(lambda: bool(cached(mounter, "big.vdb", large).name), seconds=END_SECONDS)
    assert files.passed() == 0
    files.close()
    files.open("big.vdb")
    assert files.passed() == 1
    files.close()


# ------------------------------------------------------------------ servers that die, limits


def test_files_that_are_open_when_the_server_is_killed_stay_so_for_the_next(files: Files) -> None:
    served = files.open("b.exr")
    files.fetch("b.exr")
    files.fetch("a.exr")
    passed = files.open("a.exr")
    mapped = mmap.mmap(passed, 0, prot=mmap.PROT_READ)
    for _ in range(2):
        files.kill_server()
        again, also = files.open("a.exr"), files.open("b.exr")
        for fd in (passed, again):
            assert read(fd) == content("a.exr")
        for fd in (served, also):
            assert read(fd) == content("b.exr")
        assert mapped[:] == content("a.exr")
        # The one passed through already, the other not while it is open.
        assert files.passed() == 0
    files.close()
    mapped.close()
    files.open("a.exr")
    files.open("b.exr")
    assert files.passed() == 2


def test_no_limit_of_open_files_reaches_a_job(mounter: Mounter, tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(150):
        (source / f"{number}").write_bytes(b"%d" % number)
    manifest = mounter.stored(source)
    on = Mounter(tmp_path, mounter.host.store_url, settings={"mounts": {"passthrough": "on"}})
    at = on.home / "many-mnt"
    words = ("mount", on.manifest_file(manifest), at, "--store", on.host.store_url)
    # The hard limit: the mount takes all that it may.
    subprocess.run(
        ["prlimit", "--nofile=64:64", *on.host.argv(*words)],
        env=on.host.process_environment(),
        check=True,
        capture_output=True,
    )
    files = Files(on, at)
    for number in range(150):
        assert (at / f"{number}").read_bytes() == b"%d" % number
    opened = [files.open(f"{number}") for number in range(150)]
    assert files.passed() == 150
    assert [os.pread(fd, 10, 0) for fd in opened] == [b"%d" % number for number in range(150)]
    told = {line["event"] for line in on.log_of(at)}
    assert not told & {"cache.bypassed", "mount.passthrough_refused", "mount.request_crashed"}
    files.close()


class Reader(threading.Thread):
    """Opens, reads and closes files by chance; holds some open, and empties the cache at times.

    Attributes:
        wrong: What it saw that a disk would not have shown.
    """

    def __init__(self, mounter: Mounter, at: Path, seed: int, done: threading.Event) -> None:
        super().__init__()
        self.wrong: list[object] = []
        self._mounter = mounter
        self._at = at
        self._chance = random.Random(seed)
        self._done = done
        self._held: list[tuple[str, int]] = []

    def run(self) -> None:
        try:
            while not self._done.is_set():
                self._step()
        except OSError as error:
            self.wrong.append(error)
        for _, fd in self._held:
            os.close(fd)

    def _step(self) -> None:
        name = self._chance.choice([*SIZES, COPY_OF_A])
        self._held.append((name, os.open(self._at / name, os.O_RDONLY)))
        self.wrong += [name for name, fd in self._held if read(fd) != content(name)]
        # Mostly closed at once, so that every file is open by nobody now and then.
        while self._held and self._chance.random() < 0.9:
            os.close(self._held.pop(self._chance.randrange(len(self._held)))[1])
        if self._chance.random() < 0.01:
            for blob in self._mounter.host.cache_dir.rglob("?" * 32):
                blob.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("writes", ["none", "overlayfs"])
def test_readers_that_open_and_close_while_servers_are_killed_see_nothing_of_it(
    mounter: Mounter, stored: Manifest, writes: str
) -> None:
    """Seen to catch: a number that is given back while it is open."""
    at = mounter.mount(stored, writes=writes)
    files = Files(mounter, at)
    chosen = mounter.status(at)["passthrough"]
    assert chosen["used"], chosen
    done = threading.Event()
    readers = [Reader(mounter, at, seed, done) for seed in range(8)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(8):
            # Each server comes to pass files through, also where eight readers take it long.
            until(lambda: files.passed() > 0, seconds=60)
            time.sleep(0.5)
            files.kill_server()
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert [wrong for reader in readers for wrong in reader.wrong] == []
    assert mounter.errors(at) == []
