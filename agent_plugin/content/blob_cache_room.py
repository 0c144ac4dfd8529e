"""What room the blob cache has: bytes are counted, made room for by eviction, and reserved.

A process counts in memory what it adds, and writes it down now and then, for all others; blobs that
are written in place are counted before they come. Who finds no room collects
(blob_cache_collect.py); what can not be got back is not looked for again and again.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from agent_plugin.content.blob_cache_collect import Collector, CollectReport, Limits
from agent_plugin.content.blob_cache_directory import CacheDirectory, local_failure
from agent_plugin.content.blob_cache_files import BlobFiles, Staged
from agent_plugin.content.blob_cache_leases import Leases
from agent_plugin.content.blob_cache_usage import UsageCounter
from agent_plugin.content.errors import NoSpaceError

# What a process may have added before the others know: it keeps a lock out of most adds. Room for
# staged blobs is counted before they come.
_UNCOUNTED_BLOBS: Final = 64
_UNCOUNTED_BYTES: Final = 16 * 1024 * 1024
# After a collection that could not get below the limits (all is leased), the next adds are refused
# and do not scan everything again and again.
_FUTILE_SECONDS: Final = 60
_POLL_SECONDS: Final = 0.05
# Others may take the room that was just made.
_RESERVE_TRIES: Final = 3
_OTHER_COLLECTOR_SECONDS: Final = 5.0
_FULL_DISK_MARK: Final = 0.8


class Room:
    """The room of one cache, as this process knows it; from any thread."""

    def __init__(
        self,
        directory: CacheDirectory,
        counter: UsageCounter,
        leases: Leases,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._counter = counter
        self._limits = limits
        self._clock = clock
        self._collector = Collector(directory, counter, leases, limits, clock)
        self._lock = threading.Lock()
        self._uncounted_blobs = 0
        self._uncounted_bytes = 0
        self._futile_until = float("-inf")

    def close(self) -> None:
        """Write the count of bytes and close its file.

        Raises:
            NoSpaceError, LocalWriteError: It could not be written; the file is closed.
        """
        try:
            self._count()
        finally:
            self._counter.close()

    def stage(self, files: BlobFiles, size: int) -> Staged:
        """See BlobCache.staging."""
        for _ in range(_RESERVE_TRIES):
            self.make(size)
            staged = self._reserve(files, size)
            if staged is not None:
                return staged
        raise self._none_for(size)

    def insist(self, size: int) -> None:
        """Make room for a blob that is to be added, when it has been found wanting before.

        Raises:
            NoSpaceError: There is none, and there was none a moment ago.
        """
        if self._futile_until == float("-inf"):
            return
        if not self._collector.fits(self._count(), size):
            if self._clock() < self._futile_until:
                raise self._none_for(size)
            self._futile_until = self._clock() + _FUTILE_SECONDS
            self.make(size)
        self._futile_until = float("-inf")

    def account(self, size: int) -> None:
        """Take notice of a published blob; collect when that was too much."""
        with self._lock:
            self._uncounted_blobs += 1
            self._uncounted_bytes += size
            if (
                self._uncounted_blobs < _UNCOUNTED_BLOBS
                and self._uncounted_bytes < _UNCOUNTED_BYTES
            ):
                return
        if self._collector.fits(self._count(), 0) or self._clock() < self._futile_until:
            return
        while True:
            report = self.collect()
            if report.busy or report.within_limits:
                return
            # Otherwise it is others who add, and what they added can go as well.
            if not report.evicted_bytes:
                break
        self._futile_until = self._clock() + _FUTILE_SECONDS

    def make(self, size: int) -> None:
        """See BlobCache.make_room."""
        if self._collector.fits(self._count(), size):
            return
        if size <= self._limits.max_bytes:
            for _ in range(round(_OTHER_COLLECTOR_SECONDS / _POLL_SECONDS)):
                report = self.collect(room=size)
                if report.within_limits:
                    return
                if report.busy:
                    time.sleep(_POLL_SECONDS)
                elif not report.evicted_bytes:
                    break
        raise self._none_for(size)

    def collect(self, *, room: int = 0, to_bytes: int | None = None) -> CollectReport:
        """See BlobCache.collect."""
        self._count()
        with self._lock:
            # Nobody knew the total, or they were counted; what is left the scan will see.
            blobs, size = self._uncounted_blobs, self._uncounted_bytes
            self._uncounted_blobs = self._uncounted_bytes = 0
        scanned = False
        try:
            report = self._collector.collect(room=room, to_bytes=to_bytes)
            scanned = not report.busy
        finally:
            if not scanned:
                with self._lock:
                    self._uncounted_blobs += blobs
                    self._uncounted_bytes += size
        return report

    def collect_on_full_disk(self, size: int) -> None:
        """Evict a fifth of everything: the disk is full, whatever statvfs says (quota, inodes)."""
        report = self.collect(room=size)
        if not report.busy:
            self.collect(room=size, to_bytes=int(report.bytes * _FULL_DISK_MARK))

    def _reserve(self, files: BlobFiles, size: int) -> Staged | None:
        """Stage a blob and count its bytes; None when they do not fit now."""
        # The file first: a collection sees it, or else what is counted after it began.
        staged = files.stage(size)
        with ExitStack() as undo:
            undo.enter_context(staged)
            total = self._count(size)
            if total is None:
                return None
            staged.on_published = lambda actual: self.account(actual - size)
            staged.on_dropped = lambda: self._count(-size)
            if not self._collector.fits(total - size, size):
                return None
            undo.pop_all()
        return staged

    def _count(self, more: int = 0) -> int | None:
        """Write down `more` bytes and what is not counted yet; return the total, None if unknown.

        When it is unknown nothing is written down.
        """
        with self._lock:
            try:
                total = self._counter.add(self._uncounted_bytes + more)
            except OSError as error:
                raise local_failure("can not count bytes", error) from error
            if total is not None:
                self._uncounted_blobs = self._uncounted_bytes = 0
        return total

    def _none_for(self, size: int) -> NoSpaceError:
        return NoSpaceError(
            f"{size} bytes do not fit into the blob cache {self._directory.path}",
            hint="raise the cache's quota, free disk space, or end sessions that hold leases",
        )
