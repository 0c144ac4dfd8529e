"""What a mount has done so far, counted for the control socket and the session's summary."""

import threading
from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counts:
    """Since the server started; sizes in bytes.

    Attributes:
        blobs_fetched, bytes_fetched: From the store; of blobs read in parts, the parts.
        blobs_from_cache, bytes_from_cache: Found in the host's cache, counted when first opened.
        blobs_quarantined: Found damaged there.
        files_passed_through: Opened to be read by the kernel itself; those that are open several
            times, once.
        reads_failed: Reads that a job saw fail.
        reads_waited: Reads that had to wait for a fetch.
        reads_interrupted: Of those, the ones that the kernel gave up with their reader. It gives up
            those past the page cache only: one that fills the page cache is nobody's, and goes on.
    """

    blobs_fetched: int = 0
    bytes_fetched: int = 0
    blobs_from_cache: int = 0
    bytes_from_cache: int = 0
    blobs_quarantined: int = 0
    files_passed_through: int = 0
    reads_failed: int = 0
    reads_waited: int = 0
    reads_interrupted: int = 0


class Statistics:
    """Counts that any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def count(self, **more: int) -> None:
        """Add to the counts of these names."""
        with self._lock:
            for name, number in more.items():
                setattr(self._counts, name, getattr(self._counts, name) + number)

    def snapshot(self) -> dict[str, int]:
        """Return all counts by name."""
        with self._lock:
            return asdict(self._counts)
