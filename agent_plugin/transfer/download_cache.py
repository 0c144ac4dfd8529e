"""The blob cache as a download uses it: done without as soon as it fails, since it only saves time.

Blobs are read from it and added to it, and either may end before the other: a full cache can still
be read. Any thread may find that it fails, so each method looks once whether it is still used.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache, Claim
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import BlobCorruptError, CacheUnsafeError, LocalError
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.placement import CacheCopy, Placer, StagedFile

log = events.get_logger()

# For so long another process's fetch of the same blob is waited for; then we fetch it as well,
# since that process may be stopped or very slow.
SINGLE_FLIGHT_SECONDS: Final = 60.0


class DownloadCache:
    """The cache of one download; all methods but `abandon` do nothing when there is none.

    Each raises CacheUnsafeError when that is why the cache fails; it is for the operator to mend.
    """

    def __init__(self, cache: BlobCache | None) -> None:
        self._cache = cache
        self._reading = cache
        self._filling = cache

    def has(self, digest: Digest) -> bool:
        """Whether a blob is there."""
        cache = self._reading
        if cache is None:
            return False
        try:
            return cache.contains(digest)
        except LocalError as error:
            self.abandon(error)
            return False

    def open(self, digest: Digest) -> int | None:
        """Return a descriptor to read a blob from, which the caller closes; None if it is gone."""
        cache = self._reading
        if cache is None:
            return None
        try:
            return cache.open_blob(digest)
        except LocalError as error:
            self.abandon(error)
            return None

    def claim(self, digest: Digest, halt: Cancellation) -> Claim | None:
        """Return the right to fetch; None when the blob has come, or there is no cache.

        Raises:
            CancelledError: `halt` was wished while another process fetched it.
        """
        cache = self._filling
        if cache is None:
            return None
        try:
            return cache.claim_or_wait(digest, SINGLE_FLIGHT_SECONDS, halt)
        except LocalError as error:
            self._bypass(error)
            return None

    def add(self, digest: Digest, data: bytes) -> None:
        """Keep a small blob that was verified."""
        cache = self._filling
        if cache is None:
            return
        try:
            cache.add(digest, data)
        except (LocalError, OSError) as error:
            self._bypass(error)

    @contextmanager
    def copying(
        self, digest: Digest, staged: StagedFile, placer: Placer
    ) -> Iterator[CacheCopy | None]:
        """Lend what copies a large blob into the cache while it is fetched; None without one."""
        files = ExitStack()
        try:
            copy = None
            if (cache := self._filling) is not None:
                try:
                    kept = files.enter_context(cache.staging(digest.size))
                except LocalError as error:
                    self._bypass(error)
                else:
                    copy = CacheCopy(kept, staged, clones=placer.can_clone(staged, kept.fd))
            yield copy
        finally:
            try:
                files.close()
            except (LocalError, OSError) as error:
                self._bypass(error)

    def publish(self, copy: CacheCopy, digest: Digest) -> None:
        """Make what was copied the blob in the cache."""
        try:
            copy.publish(digest)
        except (LocalError, BlobCorruptError, OSError) as error:
            self._bypass(error)

    def quarantine(self, digest: Digest, error: BlobCorruptError) -> None:
        """Take a blob away that turned out wrong."""
        if self._cache is None:
            return
        try:
            self._cache.quarantine(digest, error.message)
        except LocalError as failure:
            self.abandon(failure)

    def leave(self) -> None:
        """Have nothing more to do with the cache, which its owner may close from now on.

        A thread that was left behind may come to it later, and nothing is wrong with it then.
        """
        self._reading = self._filling = None

    def abandon(self, error: Exception) -> None:
        """Neither read the cache nor add to it any more."""
        self._bypass(error)
        self._reading = None

    def _bypass(self, error: Exception) -> None:
        """Add nothing to the cache any more."""
        if isinstance(error, CacheUnsafeError):
            raise error
        if self._filling is None:
            return
        self._filling = None
        log.warning(events.CACHE_BYPASSED, extra={"reason": str(error)})
