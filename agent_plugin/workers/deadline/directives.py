"""What the attachment drop-ins print: the lines that the agent and its OpenJD runtime understand.

A line is understood by how it begins (`openjd_progress: `, `ja_upload: `, …), so no other text may
begin like that; what is printed here for people begins with words of ours. The service keeps each
line of a session, so there are at most one line of progress and one of status a second.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from agent_plugin.session.state import OutputManifestResult
from agent_plugin.transfer.progress import Snapshot, format_bytes, format_duration

PROGRESS_SECONDS: Final = 1.0
# An upload's progress is only in the log: the agent reports none of it.
LOG_SECONDS: Final = 10.0

Say = Callable[[str], None]


class Progress:
    """How far all transfers of a download are together, told to the agent.

    Args:
        say: Prints a line.
        clock: Seconds; only differences matter.
    """

    def __init__(self, say: Say, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._next = clock() + PROGRESS_SECONDS
        self._total_files = 0
        self._total_bytes = 0
        self._files = 0
        self._bytes = 0

    def expect(self, files: int, size: int) -> None:
        """Take what all the transfers that follow are going to place."""
        self._total_files += files
        self._total_bytes += size

    def view(self, _title: str) -> "TransferView":
        """Return what shows one transfer."""
        return TransferView(self._show, self._done)

    def finish(self) -> None:
        """Tell that everything is in place."""
        self._say("openjd_progress: 100.0")
        self._say(f"openjd_status: {self._status(self._total_files, self._total_bytes)}")

    def _done(self, last: Snapshot) -> None:
        self._files += last.files
        self._bytes += last.bytes

    def _show(self, snapshot: Snapshot) -> None:
        now = self._clock()
        if now < self._next:
            return
        self._next = now + PROGRESS_SECONDS
        files, size = self._files + snapshot.files, self._bytes + snapshot.bytes
        self._say(f"openjd_progress: {self._percent(files, size):.1f}")
        status = snapshot.waits_for or self._status(files, size, snapshot.speed)
        self._say(f"openjd_status: {status}")

    def _percent(self, files: int, size: int) -> float:
        """Return 0 to 99.9, cut off: 100 is for when all is in place."""
        done, total = (size, self._total_bytes) if self._total_bytes else (files, self._total_files)
        return min(999, 1000 * done // max(1, total)) / 10

    def _status(self, files: int, size: int, speed: float = 0.0) -> str:
        left = self._total_bytes - size
        remaining = f", {format_duration(int(left / speed / 1e6))} left" if left and speed else ""
        rate = f", {speed:.1f} MB/s" if speed else ""
        return (
            f"{files} of {self._total_files} files,"
            f" {format_bytes(size)} of {format_bytes(self._total_bytes)}{rate}{remaining}"
        )


class LogProgress:
    """How far an upload is, in a line for people now and then.

    Args:
        say: Prints a line.
        clock: Seconds; only differences matter.
    """

    def __init__(self, say: Say, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._next = clock() + LOG_SECONDS

    def view(self, _title: str) -> "TransferView":
        """Return what shows one transfer."""
        return TransferView(self._show, lambda _last: None)

    def _show(self, snapshot: Snapshot) -> None:
        now = self._clock()
        if now < self._next:
            return
        self._next = now + LOG_SECONDS
        rate = snapshot.waits_for or f"{snapshot.speed:.1f} MB/s"
        self._say(
            f"uploading: {snapshot.files} of {snapshot.total_files} files,"
            f" {format_bytes(snapshot.bytes)} of {format_bytes(max(0, snapshot.total_bytes))},"
            f" {rate}"
        )


@dataclass(slots=True)
class TransferView:
    """Shows one transfer; see `View` of agent_plugin/transfer/progress.py.

    Attributes:
        on_snapshot: Told how far it is.
        on_end: Told how far it was at its end.
    """

    on_snapshot: Callable[[Snapshot], None]
    on_end: Callable[[Snapshot], None]
    last: Snapshot | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.last is not None:
            self.on_end(self.last)

    def show(self, snapshot: Snapshot) -> None:
        """Show how far it is."""
        self.last = snapshot
        self.on_snapshot(snapshot)


def say_snapshot(say: Say, local_root: str, manifest: str) -> None:
    """Tell the agent of a manifest of what changed below a root.

    Args:
        say: Prints a line.
        local_root: The root as the agent has it: it looks its roots up by this text.
        manifest: Where the manifest is, relative to the session directory.
    """
    say(f"ja_snapshot: {json.dumps({'root': local_root, 'manifest': manifest})}")


def say_uploads(say: Say, uploads: Sequence[tuple[str, OutputManifestResult]]) -> None:
    """Tell the agent which output manifests are in the store, for its answer to the service.

    Args:
        say: Prints a line.
        uploads: For each root that has outputs its root path, and its manifest.
    """
    infos = [
        {
            "output_manifest_path": manifest.output_manifest_path,
            "output_manifest_hash": manifest.output_manifest_hash,
            "source_path": root_path,
        }
        for root_path, manifest in uploads
    ]
    say(f"ja_upload: {json.dumps(infos)}")
