"""The kernel's table of mounts, read and cleared, with names that need escapes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent_plugin.content.mount_table import (
    holders,
    is_mounted,
    read_mounts,
    unmount,
    unmount_all,
)
from tests.servers.disks import tmpfs_mounted
from tests.servers.proxied_object import until

ODD_NAMES = [
    b"plain",
    b"two words",
    b"a tab\tin it",
    b"line\nbreak",
    b"return\rhere",
    b"back\\slash",
    b"like an escape \\040",
    b"not utf-8 \xff\xe9",
    b"hash#and - dash",
    "🎬 日本".encode(),
]


Mount = Callable[..., None]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path.resolve() / "place"
    place.mkdir()
    return place


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts by command, for the test alone: what is left in the end is taken away."""
    mounted: list[Path] = []

    def call(at: Path, *arguments: str | Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        at.mkdir(exist_ok=True)
        command = ["mount", *arguments, at]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this host mounts nothing: {done.stderr.strip()}")
        mounted.append(at)

    yield call
    for at in reversed(mounted):
        subprocess.run(["umount", "--lazy", at], capture_output=True, check=False)


@pytest.fixture
def mounted(place: Path) -> Iterator[Path]:
    """A small file system of its own, with a file."""
    with tmpfs_mounted(place / "mnt", size=1 << 20) as at:
        (at / "file").write_bytes(b"content" * 1000)
        yield at


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_mount_is_known_by_the_name_it_has_whatever_bytes_are_in_it(
    place: Path, mount: Mount, name: bytes
) -> None:
    at = place / os.fsdecode(name)
    mount(at, "--bind", place)

    assert is_mounted(at)
    unmount(at)
    assert not is_mounted(at)


def test_a_line_has_device_kind_and_source(place: Path) -> None:
    with tmpfs_mounted(place / "mnt", size=1 << 20) as at:
        [found] = [found for found in read_mounts() if found.mountpoint == os.fspath(at)]
        device = at.stat().st_dev
        assert found.device == f"{os.major(device)}:{os.minor(device)}"
        assert (found.kind, found.source) == ("tmpfs", "tmpfs")


def test_a_source_is_told_unescaped(place: Path, mount: Mount) -> None:
    at = place / "mnt"
    mount(at, "-t", "tmpfs", "a b\\c")
    [found] = [found for found in read_mounts() if found.mountpoint == os.fspath(at)]
    assert found.source == "a b\\c"


def test_a_directory_that_is_no_mount_point_is_not_mounted(mounted: Path) -> None:
    assert not is_mounted(mounted.parent)
    assert not is_mounted(mounted / "file")
    assert not is_mounted(mounted.with_name("mn"))
    with pytest.raises(OSError, match="Invalid argument"):
        unmount(mounted.parent)


def test_stacked_mounts_are_all_taken_away(place: Path, mount: Mount) -> None:
    at = place / "mnt"
    for _ in range(3):
        mount(at, "--bind", place)
    assert sum(found.mountpoint == os.fspath(at) for found in read_mounts()) == 3

    unmount_all(at)
    assert not is_mounted(at)
    unmount_all(at)


def test_a_mount_in_use_goes_lazily(place: Path, mount: Mount) -> None:
    at = place / "mnt"
    mount(at, "-t", "tmpfs", "tmpfs")
    (at / "file").write_bytes(b"content")
    with (at / "file").open("rb") as file:
        with pytest.raises(OSError, match="busy"):
            unmount(at)
        unmount_all(at)
        assert not is_mounted(at)
        assert file.read() == b"content"


def test_a_link_to_a_mount_point_is_not_followed(mounted: Path) -> None:
    link = mounted.with_name("link")
    link.symlink_to(mounted)
    with pytest.raises(OSError, match="Invalid argument"):
        unmount(link)
    assert is_mounted(mounted)


def test_nobody_holds_what_nobody_uses(mounted: Path) -> None:
    (mounted.parent / "mnt-beside").write_bytes(b"")
    with (mounted.parent / "mnt-beside").open("rb"):
        assert holders(mounted) == []


def test_whoever_has_a_file_open_holds_the_mount(mounted: Path) -> None:
    with (mounted / "file").open("rb") as file:
        assert holders(mounted) == [f"{os.getpid()} {_name()} (descriptor {file.fileno()})"]


def test_whoever_works_in_it_holds_the_mount(mounted: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        cwd=mounted,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        [holder] = holders(mounted)
        assert holder.startswith(f"{process.pid} ")
        assert holder.endswith("(working directory)")
    finally:
        process.kill()
        process.communicate()
    assert holders(mounted) == []


@pytest.mark.parametrize("name", ["mnt", "line\nbreak", "re\rturn", "\\", os.fsdecode(b"\xff")])
def test_whoever_maps_a_file_holds_the_mount(place: Path, name: str) -> None:
    with tmpfs_mounted(place / name, size=1 << 20) as at:
        # What a program is run from is mapped, and no descriptor of it is open.
        program = shutil.copy("/bin/sleep", at / "sleep")
        process = subprocess.Popen([program, "60"])
        try:
            # A program that is being started is mapped a moment after its starter goes on.
            until(lambda: holders(at) == [f"{process.pid} sleep (memory map)"])
        finally:
            process.kill()
            process.wait()


def _name() -> str:
    return Path("/proc/self/comm").read_text().strip()
