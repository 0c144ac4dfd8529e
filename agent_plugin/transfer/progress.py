"""How far a transfer is, how fast, and how that is told to a person.

Speed and remaining time come from the last minute. The percentage is 100 only when everything is
in place. Counters may be advanced from any thread; a view is asked to show them by the one thread
that runs the transfer.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self, TextIO

from agent_plugin.transfer.ledger_rows import TransferRow
from agent_plugin.transfer.states import TransferStatus

WINDOW_SECONDS: Final = 60.0
# A line of text now and then; nobody reads more, and farms pay for log lines.
PLAIN_INTERVAL_SECONDS: Final = 10.0
_KILO: Final = 1000
_HOUR_SECONDS: Final = 3600
_MINUTE_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a transfer is.

    Attributes:
        files, bytes: In place.
        total_files, total_bytes: In place at the end; total_bytes is -1 while it is not known.
        percent: 0 to 100, rounded down; 100 only when everything is in place.
        speed: 10^6 bytes a second over the last minute.
        remaining: `H:MM:SS`, or empty when it can not be told.
        waits_for: Why nothing moves: it is paused, or gives way; empty when that is not so.
    """

    files: int
    total_files: int
    bytes: int
    total_bytes: int
    percent: int
    speed: float
    remaining: str
    waits_for: str = ""


class Meter:
    """Counts what is in place.

    Args:
        total_files: How many files there will be.
        total_bytes: How many bytes, or -1 while that is not known.
        clock: Seconds; only differences matter.
    """

    def __init__(
        self, total_files: int, total_bytes: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._started = clock()
        self._total_files = total_files
        self._total_bytes = total_bytes
        self._files = 0
        self._bytes = 0
        self._window: deque[tuple[float, int]] = deque([(self._started, 0)])

    def advance(self, size: int, *, files: int = 0) -> None:
        """Count further bytes, and files that are complete."""
        with self._lock:
            self._bytes += size
            self._files += files

    def expect(self, size: int, *, files: int) -> None:
        """Count further bytes and files among those there will be; negative: they leave."""
        with self._lock:
            self._total_bytes += size
            self._total_files += files

    def snapshot(self, waits_for: str = "") -> Snapshot:
        """Return how far it is now.

        Args:
            waits_for: Why nothing moves, if that is so.
        """
        with self._lock:
            now = self._clock()
            while len(self._window) > 1 and self._window[1][0] <= now - WINDOW_SECONDS:
                self._window.popleft()
            since, before = self._window[0]
            elapsed = now - since
            rate = (self._bytes - before) / elapsed if elapsed > 0 else 0.0
            if now - self._window[-1][0] >= 1.0:
                self._window.append((now, self._bytes))
            return Snapshot(
                files=self._files,
                total_files=self._total_files,
                bytes=self._bytes,
                total_bytes=self._total_bytes,
                percent=self._percent(),
                speed=rate / 1e6,
                remaining="" if waits_for else self._remaining(rate),
                waits_for=waits_for,
            )

    def _percent(self) -> int:
        if self._total_bytes < 0:
            return 0
        if self._files >= self._total_files and self._bytes >= self._total_bytes:
            return 100
        if self._total_bytes == 0:
            return min(99, 100 * self._files // self._total_files)
        return max(0, min(99, 100 * self._bytes // self._total_bytes))

    def _remaining(self, rate: float) -> str:
        left = self._total_bytes - self._bytes
        if self._total_bytes < 0 or (left > 0 and rate <= 0):
            return ""
        return format_duration(int(max(0, left) / rate) if left > 0 else 0)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is, by what the ledger says of it.

    Attributes:
        percent: 0 to 100, rounded down; 100 only when it is done.
        speed: 10^6 bytes a second over the last minute.
        etr: The estimated time that remains, `H:MM:SS`; empty when it can not be told.
    """

    percent: int
    speed: float
    etr: str


def describe_transfer(
    row: TransferRow, samples: Sequence[tuple[float, int]], now: float
) -> Progress:
    """Return how far a transfer is, for whoever does not carry it out.

    Args:
        row: The transfer.
        samples: When, and how many bytes moved since the one before; oldest first.
        now: Seconds since the epoch.
    """
    share = percent(row.status, row.size, row.done)
    recent = [(moment, size) for moment, size in samples if moment > now - WINDOW_SECONDS]
    if row.status is not TransferStatus.RUNNING or len(recent) < 2:  # noqa: PLR2004 - a span of time
        return Progress(share, 0.0, "")
    # What moved before the first of them moved in a time that nothing tells.
    moved = sum(size for _, size in recent[1:])
    rate = moved / max(now - recent[0][0], 1e-3)
    left = row.size - row.done
    etr = format_duration(int(left / rate)) if rate > 0 else ""
    return Progress(share, rate / 1e6, etr)


def percent(status: TransferStatus, size: int, done: int) -> int:
    """Return how much of a transfer is in place, rounded down; 100 only when it is done."""
    if status is TransferStatus.DONE:
        return 100
    return max(0, min(99, 100 * done // size)) if size > 0 else 0


def format_duration(seconds: int) -> str:
    """Return whole seconds as `H:MM:SS`."""
    hours, rest = divmod(seconds, _HOUR_SECONDS)
    minutes, rest = divmod(rest, _MINUTE_SECONDS)
    return f"{hours}:{minutes:02}:{rest:02}"


def format_bytes(size: float) -> str:
    """Return a size for people, in powers of 1000: `5 bytes`, `1.2 MB`."""
    if size < _KILO:
        return f"{int(size)} bytes"
    for unit in ("kB", "MB", "GB"):
        size /= _KILO
        if size < _KILO:
            return f"{size:.1f} {unit}"
    return f"{size / _KILO:.1f} TB"


class View(Protocol):
    """Shows progress; used as a context manager around the transfer."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop showing."""

    def show(self, snapshot: Snapshot) -> None:
        """Show how far it is; called about twice a second."""


class SilentView:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, snapshot: Snapshot) -> None:
        """Show nothing."""


class PlainView(SilentView):
    """A line of text every ten seconds, for logs."""

    def __init__(
        self, title: str, stream: TextIO, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._next = clock() + PLAIN_INTERVAL_SECONDS
        self._waited_for = ""

    def show(self, snapshot: Snapshot) -> None:
        """Write a line when it is time for one, and when it begins or ends to wait."""
        now = self._clock()
        if now < self._next and snapshot.waits_for == self._waited_for:
            return
        self._waited_for = snapshot.waits_for
        self._next = now + PLAIN_INTERVAL_SECONDS
        self._stream.write(f"{self._title}: {describe(snapshot)}\n")
        self._stream.flush()


def describe(snapshot: Snapshot) -> str:
    """Return how far it is as half a line of text."""
    if snapshot.waits_for:
        return (
            f"{snapshot.waits_for}; {snapshot.percent} %, {snapshot.files} of"
            f" {snapshot.total_files} files"
        )
    remaining = f", {snapshot.remaining} left" if snapshot.remaining else ""
    return (
        f"{snapshot.percent} %, {snapshot.files} of {snapshot.total_files} files,"
        f" {format_bytes(snapshot.bytes)} of {format_bytes(max(0, snapshot.total_bytes))},"
        f" {snapshot.speed:.1f} MB/s{remaining}"
    )


class TerminalView(SilentView):
    """A progress bar, by rich."""

    def __init__(self, title: str) -> None:
        # Imported here: rich takes 60 ms that a hook without a terminal need not spend.
        from rich import progress as bars  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415

        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bars.add_task(title, total=100, text="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Move the bar."""
        remaining = f" {snapshot.remaining} left" if snapshot.remaining else ""
        text = snapshot.waits_for or f"{snapshot.speed:.1f} MB/s{remaining}"
        self._bars.update(
            self._task,
            completed=snapshot.percent,
            text=f"{snapshot.files}/{snapshot.total_files} files"
            f" {format_bytes(snapshot.bytes)} {text}",
        )


def view_for(title: str, stream: TextIO = sys.stderr) -> View:
    """Return a progress bar if `stream` is a terminal, else lines of text."""
    return TerminalView(title) if stream.isatty() else PlainView(title, stream)
