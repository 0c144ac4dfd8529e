"""Locks of this host that are not waited for for ever, and whom people wait for.

Whoever holds one may have been stopped, or wait for a disk that does not answer.

Source: flock(2), proc_locks(5).
"""

import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import LocalWriteError
from agent_plugin.content.store import Cancellation

_POLL_SECONDS: Final = 0.02
_STOPPED: Final = frozenset("Tt")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that others wait for.

    Attributes:
        pid: Its id.
        name: Of its program, at most 15 characters.
        stopped: Whether it was stopped, by a signal or a debugger.
    """

    pid: int
    name: str
    stopped: bool

    @classmethod
    def of(cls, pid: int) -> "Holder | None":
        """Return what is known of a process; None if it is gone."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        name, _, rest = text.partition("(")[2].rpartition(")")
        return cls(pid, name, rest.split()[0] in _STOPPED)

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name}{', stopped' if self.stopped else ''})"


def take_flock(
    fd: int, shown: str, *, seconds: float, cancellation: Cancellation | None = None
) -> None:
    """Have a file or directory locked until its descriptor is closed.

    Args:
        fd: The descriptor.
        shown: What it is called in messages.
        seconds: How long others are waited for.
        cancellation: Ends the wait.

    Raises:
        LocalWriteError: Another process kept it for longer; the message says which.
        CancelledError: Cancellation was wished.
        OSError: Its file system has no such locks.
    """
    cancellation = cancellation or Cancellation()
    until = time.monotonic() + seconds
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > until:
            break
        cancellation.sleep(_POLL_SECONDS)
    holder = _holder_of_flock(fd)
    hint = "see with `fuser` which, and whether it comes to its end"
    if holder is not None:
        hint = "see whether it comes to its end, then try again"
        hint = f"let it go on: kill -CONT {holder.pid}" if holder.stopped else hint
    raise LocalWriteError(
        f"another process has kept {shown} locked for {seconds:.0f} s"
        + (f": {holder}" if holder is not None else ""),
        hint=hint,
    )


def _holder_of_flock(fd: int) -> Holder | None:
    """Return who holds a flock of an open file; None if that can not be seen from here."""
    inode = str(os.fstat(fd).st_ino)
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        # `1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF`; who waits has an arrow.
        _, kind, *rest = line.split()
        if kind == "FLOCK" and rest[3].rpartition(":")[2] == inode and int(rest[2]) > 0:
            return Holder.of(int(rest[2]))
    return None
