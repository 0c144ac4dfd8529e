"""The errors that readers of a mount have seen: one JSON object a line, in a file closed to others.

`finish-task` reads it: a render that was refused a byte has failed for the farm's reasons, whatever
the renderer made of it. It marks the file with a time (TOLD_NS) before that, so that what the next
task is refused is not taken for what this one was. The form is in docs/PROTOCOL.md.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import PropmasterError
from agent_plugin.content.mount_spec import TOLD_NS

# A reader that is refused a file asks again for each of its pages.
REPEAT_SECONDS: Final = 10.0
# No more than this many lines; then only the counts go on, and one line for each time it was told.
MOST_LINES: Final = 10_000
# How soon what could not be written is tried again: a disk that a task has filled may be cleared up
# before the task ends.
NEXT_TRY_SECONDS: Final = 0.2

log = events.get_logger()


class ErrorLedger:
    """Appends to a file; may be used from any thread.

    Args:
        path: The file; made with mode 0600 at the first error.
        clock: Seconds since the epoch.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], float] = {}
        self._lines = 0
        # What could not be written.
        self._late = b""
        # Whether there is a thread that tries it again.
        self._retries = False

    def record(
        self,
        path: str,
        digest: Digest,
        error: PropmasterError,
        source: tuple[str, str] | None = None,
    ) -> None:
        """Keep a failed read, unless the same one was kept a moment ago and nobody was told since.

        Args:
            path: Of the file, below the root.
            digest: Its content.
            error: Why it could not be read.
            source: URL and version of the object that the digest is a name of; None where it is a
                hash of content.
        """
        what = (
            {"hash": digest.hex}
            if source is None
            else dict(zip(("object", "version"), source, strict=True))
        )
        now = self._clock()
        with self._lock:
            was_told = self._was_told()
            if was_told:
                self._last.clear()
            key = (path, error.code)
            if now - self._last.get(key, float("-inf")) < REPEAT_SECONDS:
                return
            self._last[key] = now
            self._lines += 1
            if self._lines > MOST_LINES and not was_told:
                return
            line = json.dumps(
                {
                    "time": round(now, 3),
                    "path": path,
                    **what,
                    "size": digest.size,
                    "code": error.code,
                    "reference": error.reference,
                    "reason": error.message,
                }
            )
            try:
                self._append(self._late + line.encode("ascii") + b"\n")
                self._late = b""
            except OSError as failure:
                # The reader is refused its bytes all the same, by the error that it is.
                log.error(  # noqa: TRY400 - an expected failure: its text says all
                    events.MOUNT_READ_FAILED,
                    extra={"path": path, "reason": f"{self._path}: {failure.strerror}"},
                )
                self._write_later(line.encode("ascii") + b"\n")

    def _write_later(self, line: bytes) -> None:
        """Have a line written as soon as it can be; of several the first, which tells enough."""
        self._late = self._late or line
        if self._retries:
            return
        self._retries = True
        try:
            threading.Thread(target=self._write_late, name="late", daemon=True).start()
        except RuntimeError:
            # The host gives none; the next line takes this one along, or has another try.
            self._retries = False

    def _write_late(self) -> None:
        while self._retries:
            time.sleep(NEXT_TRY_SECONDS)
            with self._lock, suppress(OSError):
                if self._late:
                    self._append(self._late)
                    self._late = b""
                self._retries = False

    def _was_told(self) -> bool:
        try:
            return os.stat(self._path).st_mtime_ns == TOLD_NS  # noqa: PTH116 - as it is opened
        except OSError:
            return False

    def _append(self, line: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, line) < len(line):
                os.ftruncate(fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)
