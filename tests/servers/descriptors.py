"""Which of this process's descriptors are of certain files.

Not how many it has in all: threads of earlier tests, and their connections, come and go meanwhile.
"""

import os
from contextlib import suppress
from pathlib import Path

_OWN = Path("/proc/self/fd")


def open_below(directory: Path) -> int:
    """Return how many descriptors there are of a directory and of what is below it."""
    found = 0
    for fd in _OWN.iterdir():
        # Gone already: the one of this very listing, or another thread's.
        with suppress(OSError):
            found += fd.readlink().is_relative_to(directory)
    return found


def open_of(file: os.stat_result) -> int:
    """Return how many descriptors there are of a file, which may have no name any more."""
    found = 0
    for fd in _OWN.iterdir():
        with suppress(OSError):
            found += os.path.samestat(fd.stat(), file)
    return found
