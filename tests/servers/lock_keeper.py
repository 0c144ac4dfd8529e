"""A process that was stopped while it had something locked."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent_plugin.content.lock_holder import Holder
from tests.servers.proxied_object import until

_KEEP = """
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_EX)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@contextmanager
def kept_locked(directory: Path) -> Iterator[int]:
    """Have a directory locked by a process that is stopped; lend its id."""
    with subprocess.Popen([sys.executable, "-c", _KEEP, str(directory)]) as process:
        try:
            until(lambda: (holder := Holder.of(process.pid)) is not None and holder.stopped)
            yield process.pid
        finally:
            process.kill()
