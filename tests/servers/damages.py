"""What becomes of a blob in the cache: by a dying disk, by carelessness, or by an attacker."""

import os
from collections.abc import Callable
from pathlib import Path


def shorter(blob: Path) -> None:
    blob.chmod(0o600)
    os.truncate(blob, blob.stat().st_size - 1)
    blob.chmod(0o400)


def empty(blob: Path) -> None:
    blob.chmod(0o600)
    os.truncate(blob, 0)
    blob.chmod(0o400)


def flipped(blob: Path) -> None:
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    blob.chmod(0o400)


def link(blob: Path) -> None:
    blob.unlink()
    blob.symlink_to("/etc/passwd")


def directory(blob: Path) -> None:
    blob.unlink()
    blob.mkdir()


def fifo(blob: Path) -> None:
    blob.unlink()
    os.mkfifo(blob)


def no_mode(blob: Path) -> None:
    blob.chmod(0)


def from_the_future(blob: Path) -> None:
    os.utime(blob, (2**32, 2**32))


def hard_linked(blob: Path) -> None:
    os.link(blob, blob.with_name("f" * 32))


def gone(blob: Path) -> None:
    blob.unlink()


# All that can become of a file in the cache.
DAMAGES: list[Callable[[Path], None]] = [
    shorter, empty, flipped, link, directory, fifo, no_mode, from_the_future, hard_linked,
    gone,
]  # fmt: skip
