"""How many bytes the blob cache has, as all processes of the host count together.

The file `usage` holds two numbers: the bytes of all blobs, with the room that is reserved for
those on their way; and all that was ever added to it. It is a hint, kept on the high side, that
scans correct: a scan takes long, so that what was added since it began is added to what it found.
What it found as well counts twice until the next one, and nothing is forgotten.
"""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from agent_plugin.content.blob_cache_leases import lock_within

_COUNTER: Final = struct.Struct("<qq")
# More bytes than ever were; no sum of two such numbers is too large to be written.
_GARBAGE_FROM: Final = 2**62
# Others hold the lock for microseconds, but a busy host may keep one of them from its core. With a
# peer that was stopped we go on without.
_LOCK_WAIT_SECONDS: Final = 5.0


class Usage(NamedTuple):
    """What the counter says.

    Attributes:
        total: Bytes of all blobs and reserved room.
        added: Bytes that were added so far; what was given back is not taken off.
    """

    total: int
    added: int


class UsageCounter:
    """The file `usage`; for use from any thread.

    Args:
        fd: The file, open for reading and writing; closed by `close`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # The file's lock is the process's: it does not keep threads apart.
        self._lock = threading.Lock()
        self._wait_seconds = _LOCK_WAIT_SECONDS

    def read(self) -> Usage | None:
        """Return what it says; None for a new file or garbage: then only a scan can tell.

        Raises:
            OSError: The file could not be read.
        """
        data = os.pread(self._fd, _COUNTER.size + 1, 0)
        if len(data) != _COUNTER.size:
            return None
        usage = Usage(*_COUNTER.unpack(data))
        return usage if min(usage) >= 0 and max(usage) < _GARBAGE_FROM else None

    def add(self, delta: int) -> int | None:
        """Count `delta` bytes, or take them off; return the new total, None when it is not known.

        When somebody keeps the lock, what is returned is the best guess, and the file says from
        then on that the total is not known.

        Raises:
            OSError: The file could not be read or written.
        """
        with self._locked() as locked:
            usage = self.read()
            if usage is None:
                return None
            total = max(0, usage.total + delta)
            if delta and locked:
                self._write(Usage(total, usage.added + max(0, delta)))
            elif delta:
                # Written, it would undo what others count meanwhile; a scan sees it all.
                os.ftruncate(self._fd, 0)
            return total

    def correct(self, found: int, since: Usage | None) -> int:
        """Set the total to what a scan found and what was added meanwhile; return it.

        What became unknown since the scan began stays so: the scan may have missed what did it.

        Args:
            found: Bytes that the scan found, less what was evicted.
            since: What the counter said before the scan began.

        Raises:
            OSError: The file could not be read or written.
        """
        with self._locked():
            added = self.added_since(since)
            usage = self.read()
            if usage or not since:
                self._write(Usage(found + added, usage.added if usage else 0))
            return found + added

    def added_since(self, since: Usage | None) -> int:
        """Return the bytes that were added since; 0 when that is not known.

        Raises:
            OSError: The file could not be read.
        """
        usage = self.read()
        return max(0, usage.added - since.added) if usage and since else 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _write(self, usage: Usage) -> None:
        os.ftruncate(self._fd, _COUNTER.size)
        os.pwrite(self._fd, _COUNTER.pack(*usage), 0)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the lock, or go on without it (False) when somebody keeps it."""
        with self._lock:
            locked = lock_within(self._fd, fcntl.LOCK_EX, self._wait_seconds)
            # Whoever is stopped in the middle of it is waited for once, not for each blob.
            self._wait_seconds = _LOCK_WAIT_SECONDS if locked else 0.0
            try:
                yield locked
            finally:
                if locked:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
