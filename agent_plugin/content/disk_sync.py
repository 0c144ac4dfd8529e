"""Having what was written on its disk, so that a power cut takes none of it."""

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


def sync_names(directory: Path) -> None:
    """Wait until the names in a directory are on its disk; raises OSError."""
    fd = os.open(directory, _FLAGS)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file_systems(directories: Iterable[Path]) -> None:
    """Wait until all that was written to the file systems of directories is on their disks.

    Names as well as content, and whoever has written it: for thousands of files that takes a
    fraction of what syncing each of them does.

    Args:
        directories: Those that are not there are left out.

    Raises:
        OSError: Something could not be written.
    """
    synced: set[int] = set()
    for directory in directories:
        with suppress(FileNotFoundError):
            fd = os.open(directory, _FLAGS)
            try:
                device = os.fstat(fd).st_dev
                if device not in synced and _libc.syncfs(fd):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), os.fspath(directory))
                synced.add(device)
            finally:
                os.close(fd)
