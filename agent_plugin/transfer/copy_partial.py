"""The file beside a destination, in which what is copied grows until it is whole.

What identifies it is written down when it is made. The next attempt goes on with it if that is
still the same; the host's start is part of it, because a power cut may take what is in a file and
leave the ledger that speaks of it.
"""

import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent_plugin.content.errors import KeyExistsError, LocalWriteError, local_write_error
from agent_plugin.content.leftovers import lock_partial

_WRITE: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class PartialFile:
    """The file, open.

    Attributes:
        fd: Of the file, to be read and written.
        path: Of the file.
        destination: Where it goes when it is whole.
        identity: What is written down of it, with whatever there is of it.
        kept: What an earlier attempt has written down of it; empty if it is new.
    """

    fd: int
    path: Path
    destination: Path
    identity: Mapping[str, Any]
    kept: Mapping[str, Any]

    def place(self, modified: float, *, overwrite: bool) -> None:
        """Give it its destination's name.

        Args:
            modified: The time that it is to have, seconds since the epoch.
            overwrite: Whether what is there may be replaced.

        Raises:
            KeyExistsError: Something is there.
            LocalWriteError: Another attempt has begun the file anew.
        """
        # By its name it is moved, and an engine that stood still may have lost the name to another.
        if not os.path.samestat(self.path.lstat(), os.fstat(self.fd)):
            raise LocalWriteError(
                f"{self.path}: another attempt has begun it anew",
                hint="leave it to the process that has the transfer now",
            )
        os.utime(self.fd, (modified, modified))
        if overwrite:
            self.path.replace(self.destination)
            return
        try:
            self.destination.hardlink_to(self.path)
        except FileExistsError as error:
            raise KeyExistsError(
                f"{self.destination}: something is there already",
                hint="Choose another place, or allow overwriting.",
            ) from error
        finally:
            self.path.unlink(missing_ok=True)


@contextmanager
def growing(
    destination: Path,
    name: str,
    facts: Mapping[str, Any],
    kept: Mapping[str, Any],
    *,
    begun: Callable[[Mapping[str, Any]], None],
    drops: Callable[[], bool],
) -> Iterator[PartialFile]:
    """Lend the file beside a destination: what an earlier attempt has left, or a new one.

    Args:
        destination: Its directory is made if it is missing.
        name: Of the file; no other task's in that directory, of whatever host.
        facts: What is another when the source is; `size` among it, in bytes.
        kept: What was written down by an earlier attempt.
        begun: Given what identifies a new file, writes it down.
        drops: Tells at the end whether nobody goes on with it; then it is removed.

    Raises:
        NoSpaceError, LocalWriteError: Instead of any OSError.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        path = destination.with_name(name)
        identity = {**facts, "partial": os.fspath(path), "boot": boot_id()}
        fd = _taken_up(path, identity, kept)
        goes_on = fd is not None
        if fd is None:
            # Not truncated: somebody who was left behind may still write to the old one.
            for old in {os.fspath(path), str(kept.get("partial", path))}:
                Path(old).unlink(missing_ok=True)
            fd = os.open(path, _WRITE | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if not goes_on:
                begun(identity)
            lock_partial(fd)
            yield PartialFile(fd, path, destination, identity, kept if goes_on else {})
        finally:
            os.close(fd)
            if drops():
                path.unlink(missing_ok=True)
    except OSError as error:
        raise local_write_error(error, os.fspath(destination)) from error


def _taken_up(path: Path, identity: Mapping[str, Any], kept: Mapping[str, Any]) -> int | None:
    """Open the file if it is what was written down of it."""
    if not kept or any(kept.get(name) != value for name, value in identity.items()):
        return None
    with suppress(FileNotFoundError):
        fd = os.open(path, _WRITE)
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size == identity["size"]:
            return fd
        os.close(fd)
    return None


class Ranges:
    """Which parts of a file are there, as few numbers.

    Args:
        part_bytes: How large they are.
    """

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._numbers: set[int] = set()
        self._lock = threading.Lock()

    def add(self, offset: int) -> None:
        """Take down that a part is there."""
        with self._lock:
            self._numbers.add(offset // self._part_bytes)

    def read(self, document: list[list[int]]) -> None:
        """Take down what `document` had said."""
        with self._lock:
            for first, last in document:
                self._numbers.update(range(first, last + 1))

    @property
    def document(self) -> list[list[int]]:
        """First and last number of each row of parts that are there."""
        rows: list[list[int]] = []
        with self._lock:
            for number in sorted(self._numbers):
                if rows and rows[-1][1] == number - 1:
                    rows[-1][1] = number
                else:
                    rows.append([number, number])
        return rows

    @property
    def offsets(self) -> frozenset[int]:
        """Where the parts begin that are there."""
        with self._lock:
            return frozenset(number * self._part_bytes for number in self._numbers)

    @property
    def count(self) -> int:
        """How many there are."""
        with self._lock:
            return len(self._numbers)


def boot_id() -> str:
    """Return what is another after each start of the host; empty where nothing tells it."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
