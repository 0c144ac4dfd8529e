"""One whole blob, verified: from the host's cache, or else from the store, once for the host.

What is fetched is kept in the cache; what that can not take, in an unnamed file.

Concurrency: any thread may call anything. Who else of this process wants a blob is not known here.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache, Claim
from agent_plugin.content.digest import Digest, hash_fd, hash_of
from agent_plugin.content.errors import LocalError, local_write_error
from agent_plugin.content.parts import write_all
from agent_plugin.content.store import WHOLE_BLOB_BYTES, BlobSource, Cancellation
from vfs.open_blob import OpenBlob, in_memory
from vfs.statistics import Statistics

# As long as another process's fetch is waited for; it may have been stopped.
SINGLE_FLIGHT_SECONDS: Final = 60.0

log = events.get_logger()


class WholeBlobs:
    """The blobs of one store.

    Args:
        cache: The host's cache, or None to do without.
        open_store: Opens the store; called when something has to be fetched, from any thread.
        spool: A directory for what the cache can not take.
        statistics: What is counted.
        halt: Cancelled when nothing is wanted any more.
    """

    def __init__(
        self,
        cache: BlobCache | None,
        open_store: Callable[[], BlobSource],
        spool: Path,
        statistics: Statistics,
        halt: Cancellation,
    ) -> None:
        self._cache = cache
        self._open_store = open_store
        self._spool = spool
        self._statistics = statistics
        self._halt = halt

    def read_small_now(self, digest: Digest, buffer: memoryview) -> int:
        """Read a small blob whole, verified, if cache and page cache have it; otherwise -1."""
        cache = self._cache
        fd = cache.open_blob_now(digest) if cache is not None else None
        if fd is None or cache is None:
            return -1
        try:
            count = in_memory(fd, buffer, 0)
        finally:
            os.close(fd)
        if count != digest.size or hash_of(buffer) != digest.hex:
            return -1
        self._statistics.count(blobs_from_cache=1, bytes_from_cache=count)
        return count

    def read_small(self, digest: Digest) -> bytes | None:
        """Return a small blob whole and verified if the cache has it, read by this thread.

        Hashing it again when more of it is asked for costs less than another thread and a
        descriptor do.
        """
        if self._cache is None:
            return None
        try:
            fd = self._cache.open_blob(digest)
            if fd is None:
                return None
            try:
                data = os.pread(fd, digest.size, 0)
            finally:
                os.close(fd)
        except (LocalError, OSError):
            return None
        if hash_of(data) != digest.hex:
            return None  # Found once more, by who throws it out.
        self._statistics.count(blobs_from_cache=1, bytes_from_cache=digest.size)
        return data

    def from_cache(self, digest: Digest, *, is_verified: bool = True) -> OpenBlob | None:
        """Return a blob that the cache has, verified or as it is.

        Args:
            digest: The blob.
            is_verified: Whether to hash it first; what is wrong goes to quarantine.
        """
        if self._cache is None:
            return None
        try:
            fd = self._cache.open_blob(digest)
        except LocalError as error:
            log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
            return None
        if fd is None:
            return None
        blob = OpenBlob(fd, is_verified=is_verified)
        if blob.is_verified and not self.is_right(digest, blob):
            return None
        self._statistics.count(blobs_from_cache=1, bytes_from_cache=digest.size)
        return blob

    def is_right(self, digest: Digest, blob: OpenBlob) -> bool:
        """Hash what the cache has; what is wrong goes to quarantine."""
        try:
            reason = "" if hash_fd(blob.fd) == digest else "its bytes are not what its name says"
        except OSError as error:
            reason = f"can not be read: {error.strerror}"
        if reason and self._cache is not None:
            self._statistics.count(blobs_quarantined=1)
            try:
                self._cache.quarantine(digest, reason)
            except LocalError as error:
                log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
        return not reason

    def fetched(self, digest: Digest) -> OpenBlob:
        """Return a blob from the store, verified, unless another process has just fetched it.

        Raises:
            CancelledError, PropmasterError: It can not be had.
        """
        claim = self._claim(digest)
        try:
            if claim is None and (blob := self.from_cache(digest, is_verified=True)) is not None:
                return blob
            blob = self._fetch_small(digest) if digest.size <= WHOLE_BLOB_BYTES else None
            blob = blob or self._fetch_to_file(digest)
        finally:
            if claim is not None:
                claim.release()
        self._statistics.count(blobs_fetched=1, bytes_fetched=digest.size)
        return blob

    def _claim(self, digest: Digest) -> Claim | None:
        """Return the right to fetch; None when the blob has come, or there is no cache."""
        if self._cache is None:
            return None
        try:
            return self._cache.claim_or_wait(digest, SINGLE_FLIGHT_SECONDS, self._halt)
        except LocalError as error:
            log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
            return None

    def _fetch_small(self, digest: Digest) -> OpenBlob | None:
        data = self._open_store().get(digest)
        if self._cache is not None:
            try:
                is_ours = self._cache.add(digest, data)
                fd = self._cache.open_blob(digest)
                blob = None if fd is None else OpenBlob(fd)
                # What was there already is another process's, or damaged and not to be moved.
                if blob is not None and (is_ours or self.is_right(digest, blob)):
                    return blob
            except LocalError as error:
                log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
        return self._spooled(lambda fd: write_all(fd, data, 0))

    def _fetch_to_file(self, digest: Digest) -> OpenBlob:
        store = self._open_store()
        if self._cache is not None:
            try:
                with self._cache.staging(digest.size) as staged:
                    store.fetch(digest, staged.fd, cancellation=self._halt)
                    blob = OpenBlob(os.dup(staged.fd))
                    staged.publish(digest)
            except (LocalError, OSError) as error:
                log.warning(events.CACHE_BYPASSED, extra={"reason": str(error)})
            else:
                return blob
        return self._spooled(lambda fd: store.fetch(digest, fd, cancellation=self._halt))

    def _spooled(self, fill: Callable[[int], None]) -> OpenBlob:
        try:
            with tempfile.TemporaryFile(dir=self._spool) as file:
                fill(file.fileno())
                return OpenBlob(os.dup(file.fileno()), is_spooled=True)
        except OSError as error:
            raise local_write_error(error, os.fspath(self._spool)) from error
