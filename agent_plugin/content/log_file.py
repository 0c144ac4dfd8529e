"""A file to which the events of several processes go, beside their standard errors.

A line is written whole, by one call, at the file's end, so that processes need not know of each
other. A log that can not be written is told of once and done without.
"""

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import LocalWriteError

log = events.get_logger()


class LogPlace(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Where events go.

    Attributes:
        path: The file; it is made by the first event, 0600, and its directory, 0700.
        max_bytes: Nothing is added to a file that has as much.
    """

    path: str
    max_bytes: int


class LogFile(logging.Handler):
    """Writes events to a file.

    Args:
        place: Which file.
    """

    def __init__(self, place: LogPlace) -> None:
        super().__init__()
        self.setFormatter(events.JsonFormatter())
        self._place = place
        self._fd = -1
        self._is_usable = True

    def emit(self, record: logging.LogRecord) -> None:
        """Write an event, unless that has failed before."""
        if not self._is_usable:
            return
        try:
            if self._fd < 0:
                self._fd = _open(Path(self._place.path))
            line = self.format(record).encode() + b"\n"
            if os.fstat(self._fd).st_size + len(line) > self._place.max_bytes:
                raise LocalWriteError(f"it has {self._place.max_bytes} bytes")  # noqa: TRY301 - one way out
            os.write(self._fd, line)
        except (OSError, LocalWriteError) as error:
            self._is_usable = False
            reason = error.message if isinstance(error, LocalWriteError) else error.strerror
            extra = {"path": self._place.path, "reason": reason}
            log.warning(events.LOG_UNAVAILABLE, extra=extra)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()


@contextmanager
def writing_to(place: LogPlace | None) -> Iterator[None]:
    """Have the events of the block written to a file as well; to none if there is no place."""
    if place is None:
        yield
        return
    handler = LogFile(place)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def open_log_directory(path: Path) -> int:
    """Return a descriptor of a directory in which only we can write.

    Raises:
        LocalWriteError: Others could.
        OSError: It is not there, or can not be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(fd)
        raise LocalWriteError(f"others can write to {path}")
    return fd


def _open(path: Path) -> int:
    # What is above it as well: the state directory may be about to be made, closed to others.
    for above in (*reversed(path.parent.parents), path.parent):
        with suppress(OSError):
            above.mkdir(mode=0o700)
    directory = open_log_directory(path.parent)
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        # Not held up by a pipe in its place.
        fd = os.open(path.name, flags | os.O_NONBLOCK, 0o600, dir_fd=directory)
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise LocalWriteError("it is no regular file")
    return fd
