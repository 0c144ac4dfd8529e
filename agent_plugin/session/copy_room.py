"""What inputs that are copied take of a session's disk, so that AUTO copies what fits beside it.

Counted as the survey of a download does (transfer/plan.py): each file, and on that same disk each
blob that the host's cache has not got yet. Objects of input sources get to no cache.
"""

from pathlib import Path

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import Manifest
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.plan import find_cached


class CopyRoom:
    """The bytes of what is going to be copied to one disk; the cache is looked at when asked.

    Args:
        session_dir: On that disk.
        cache: Where fetched blobs are kept as well; None for nowhere.
    """

    def __init__(self, session_dir: Path, cache: BlobCache | None) -> None:
        self._session_dir = session_dir
        self._cache = cache
        self._files = 0
        self._blobs: set[Digest] = set()
        self._to_look_at: list[Manifest] = []

    def add(self, manifest: Manifest, *, is_stored: bool) -> None:
        """Count what is going to be copied; `is_stored` if it comes from the job's store."""
        self._files += manifest.total_bytes
        if is_stored:
            self._to_look_at.append(manifest)

    def with_also(self, manifest: Manifest, *, is_stored: bool) -> int:
        """Return the bytes that all of it takes, and another manifest with it.

        Raises:
            CacheUnsafeError: Others can write to the cache.
        """
        while self._to_look_at:
            self._blobs |= self._coming(self._to_look_at.pop())
        blobs = self._blobs | self._coming(manifest) if is_stored else self._blobs
        return self._files + manifest.total_bytes + sum(digest.size for digest in blobs)

    def _coming(self, manifest: Manifest) -> set[Digest]:
        """Return the blobs that the cache is going to keep on this disk, and has not got."""
        cache = self._cache
        if cache is None or cache.device != self._session_dir.stat().st_dev:
            return set()
        digests = {entry.digest for entry in manifest.entries}
        return digests - find_cached(cache, digests, Cancellation())
