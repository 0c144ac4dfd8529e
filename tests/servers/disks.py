"""Small file systems of their own, to be filled, damaged and written protected.

They need root, and the kernel's loop devices; where those are not to be had the test is skipped,
with the reason.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MEBIBYTE = 1024 * 1024
# The least that mkfs makes: 300 MiB for XFS, 109 MiB for btrfs (xfsprogs 6.1, btrfs-progs 6.2).
LEAST_BYTES = {
    "xfs": 300 * MEBIBYTE,
    "btrfs": 110 * MEBIBYTE,
    "ext4": 4 * MEBIBYTE,
    "exfat": 8 * MEBIBYTE,
}
# XFS_IOC_GOINGDOWN, which ext4 has as well: _IOR('X', 125, __u32); what is in its log stays there.
_SHUTDOWN = 0x8004587D
_WITHOUT_LOG = 2
_OPTIONS = {
    "xfs": ["-q", "-m", "reflink=1"],
    "btrfs": ["-q"],
    # Nothing is kept for root, so that full is full.
    "ext4": ["-q", "-F", "-m", "0"],
    "exfat": [],
}


@contextmanager
def image_mounted(kind: str, image: Path, at: Path, *, size: int = 0) -> Iterator[Path]:
    """Mount a file as a file system; it is made and formatted when it is not there.

    Args:
        kind: `xfs`, `btrfs`, `ext4`, or `exfat`, on which `a` and `A` are one name.
        image: The file; stays when the context ends, so that it can be damaged and mounted again.
        at: The mount point; made when missing.
        size: Of the file system in bytes; 0 is the least there can be.
    """
    if not image.exists():
        if shutil.which(f"mkfs.{kind}") is None:
            pytest.skip(f"mkfs.{kind} is not installed")
        with image.open("wb") as file:
            file.truncate(max(size, LEAST_BYTES[kind]))
        subprocess.run([f"mkfs.{kind}", *_OPTIONS[kind], image], check=True, capture_output=True)
    if kind == "exfat" and not _kernel_has(kind):
        kind = "exfat-fuse"
    with _mounted(at, "-o", "loop", "-t", kind, os.fspath(image)) as mounted:
        yield mounted


def _kernel_has(kind: str) -> bool:
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "--quiet", kind], check=False)
    return f"\t{kind}\n" in Path("/proc/filesystems").read_text()


@contextmanager
def tmpfs_mounted(at: Path, *, size: int) -> Iterator[Path]:
    """Mount a file system in memory, of `size` bytes."""
    with _mounted(at, "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as mounted:
        yield mounted


@contextmanager
def read_only(directory: Path) -> Iterator[Path]:
    """Make a directory a file system that can not be written, not by root either."""
    with _mounted(directory, "--bind", os.fspath(directory)):
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield directory


def shut_down(mounted: Path) -> None:
    """Have a file system of ext4 or XFS refuse everything, as one whose disk has died does."""
    fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, _WITHOUT_LOG.to_bytes(4, sys.byteorder))
    finally:
        os.close(fd)


def fill(directory: Path, *, leave: int = 0) -> Path:
    """Write a file until at most `leave` bytes of a file system are free; return the file."""
    path = directory / "filler"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for piece in (MEBIBYTE, 4096, 512):
            try:
                while _free(directory) - piece >= leave:
                    os.write(fd, b"\0" * piece)
            except OSError:
                continue
    finally:
        os.close(fd)
    return path


def _free(directory: Path) -> int:
    filesystem = os.statvfs(directory)
    return filesystem.f_bavail * filesystem.f_frsize


@contextmanager
def _mounted(at: Path, *arguments: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    at.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, at], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this host mounts nothing: {done.stderr.strip()}")
    try:
        yield at
    finally:
        # Lazily if something still has a file open, so that one failure does not become many.
        if subprocess.run(["umount", at], capture_output=True, check=False).returncode:
            subprocess.run(["umount", "--lazy", at], check=True)


def use_up_inodes(directory: Path, *, leave: int = 0) -> None:
    """Make empty files `i0`, `i1`, … until a file system has at most `leave` inodes free."""
    for at in range(os.statvfs(directory).f_favail - leave):
        (directory / f"i{at}").touch()
