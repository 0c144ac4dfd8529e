"""Which process keeps a ledger to itself: who has SQLite's lock for writing, as the kernel tells.

Source: proc_locks(5); the bytes of the shared-memory file that are locked:
https://sqlite.org/walformat.html#locks
"""

import os
from pathlib import Path
from typing import Final

from agent_plugin.content.lock_holder import Holder

# To write, to move the log into the file, and to recover.
_LOCKED_BYTES: Final = frozenset({120, 121, 122})


def holder_of(path: Path) -> Holder | None:
    """Return who writes to a ledger now; None if nobody does, or it can not be seen from here.

    The file is not opened for it: closing it would drop this process's own locks.
    """
    try:
        inode = Path(f"{path}-shm").stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        # `1: POSIX  ADVISORY  WRITE 4711 08:01:1234 120 120`; who waits has an arrow.
        fields = line.split()
        if len(fields) != 8 or fields[3] != "WRITE" or fields[6] == "EOF":  # noqa: PLR2004 - see above
            continue
        pid, place, start = int(fields[4]), fields[5].rpartition(":")[2], int(fields[6])
        if place == str(inode) and start in _LOCKED_BYTES and pid not in (os.getpid(), -1, 0):
            return Holder.of(pid)
    return None
