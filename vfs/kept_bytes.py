"""How much of what was read, and no cache can take, a mount keeps in files of its own.

They have no names, so that the kernel gives their space back when nobody reads them any more, and
nothing is left of a mount that is killed. What was used least recently goes first; who reads it
again has it fetched again.

Thread-safe. `let_go` is called without the lock, and may come back here.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

# How much may come between two looks at how full the disk is.
_LOOK_BYTES: Final = 16 * 1024 * 1024
# What is kept however full the disk is: less, and what is read ahead would go before it is read.
_LEAST_BYTES: Final = 64 * 1024 * 1024


class KeptBytes:
    """A limit of bytes.

    Args:
        most_bytes: The most that is kept; what is being read just now may come on top.
        min_free_bytes: What the disk is left, as far as that is to be had by keeping less, but
            never less than 64 MiB.
        directory: On that disk.
        let_go: Given the hash of a blob that is not to be kept any more.
    """

    def __init__(
        self,
        most_bytes: int,
        min_free_bytes: int,
        directory: Path,
        let_go: Callable[[str], None],
    ) -> None:
        self._most = most_bytes
        self._min_free = min_free_bytes
        self._directory = directory
        self._let_go = let_go
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._total = 0
        self._until_look = 0

    def grew(self, hex_: str, length: int, *, stays: bool = False) -> None:
        """Count further bytes of a blob, and let go of what is too much.

        Args:
            hex_: The blob's hash.
            length: Of what has come.
            stays: Whether this one is kept even if it is more than all that may be: because it can
                only be had whole.
        """
        with self._lock:
            self._sizes[hex_] = self._sizes.get(hex_, 0) + length
            self._sizes.move_to_end(hex_)
            self._total += length
            self._until_look -= length
            most = self._allowed()
            gone = []
            while self._total > most:
                oldest = next(iter(self._sizes))
                if oldest == hex_ and stays:
                    break
                self._total -= self._sizes.pop(oldest)
                gone.append(oldest)
        for each in gone:
            self._let_go(each)

    def used(self, hex_: str) -> None:
        """Note that a blob was read."""
        with self._lock, suppress(KeyError):
            self._sizes.move_to_end(hex_)

    def gone(self, hex_: str) -> None:
        """Count a blob no longer."""
        with self._lock:
            self._total -= self._sizes.pop(hex_, 0)

    def _allowed(self) -> int:
        if self._until_look > 0:
            return self._most
        self._until_look = _LOOK_BYTES
        try:
            filesystem = os.statvfs(self._directory)
        except OSError:
            return self._most
        free = filesystem.f_bavail * filesystem.f_frsize
        return min(self._most, max(_LEAST_BYTES, self._total + free - self._min_free))
