"""A large blob that is read while it comes: aligned parts on demand, and more ahead of a reader.

Its parts go to one file at their places. Until all are there nothing can be verified: that is the
`stream` policy, and the only way by which an unverified byte reaches a reader. When the last part
has come the whole is hashed; if it is right the file becomes the blob in the cache, if not every
later read fails, and the error ledger says so.

A reader that goes on where it stopped gets twice as much fetched ahead each time, up to
`ahead_bytes`; one that jumps gets only what it asks for.
"""

import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache, Staged
from agent_plugin.content.digest import Digest, hash_fd
from agent_plugin.content.errors import (
    BlobCorruptError,
    CancelledError,
    LocalError,
    LocalReadError,
    PropmasterError,
    local_write_error,
)
from agent_plugin.content.parts import write_all
from agent_plugin.content.store import Cancellation, Store
from vfs.statistics import Statistics
from vfs.waiting import result_of

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class StreamPolicy:
    """How large blobs are read.

    Attributes:
        may_stream: Before they are verified, and verified when complete; else only whole.
        part_bytes: What is fetched at least, aligned to multiples of itself.
        ahead_bytes: What is fetched at most beyond what a sequential reader has asked for.
    """

    may_stream: bool = True
    part_bytes: int = 4 * 1024 * 1024
    ahead_bytes: int = 64 * 1024 * 1024


class Streamed:
    """One large blob under way; may be used from any thread.

    Args:
        digest: The blob.
        store: Where its parts come from.
        cache: Where it goes when it is complete, or None.
        spool: A directory for its file when the cache can not take it.
        policy: Sizes.
        threads: Where parts are fetched.
        statistics: What is counted.
        on_complete: Given the digest and a descriptor of the verified blob, which is then theirs.
        on_corrupt: Told when the blob turned out wrong.

    Raises:
        NoSpaceError, LocalWriteError: No file could be made.
    """

    def __init__(
        self,
        digest: Digest,
        store: Store,
        cache: BlobCache | None,
        spool: Path,
        policy: StreamPolicy,
        *,
        threads: ThreadPoolExecutor,
        statistics: Statistics,
        on_complete: Callable[[Digest, int], None],
        on_corrupt: Callable[[Digest, PropmasterError], None],
    ) -> None:
        self._digest = digest
        self._store = store
        self._cache = cache
        self._policy = policy
        self._threads = threads
        self._statistics = statistics
        self._on_complete = on_complete
        self._on_corrupt = on_corrupt
        self._lock = threading.Lock()
        parts = -(-digest.size // policy.part_bytes)
        self._here = bytearray(parts)
        self._left = parts
        self._under_way: dict[int, Future[None]] = {}
        self._failure: PropmasterError | None = None
        self._expected = 0
        self._window = 0
        self._is_closed = False
        self._files = ExitStack()
        self._staged: Staged | None = None
        self._fd = self._make_file(cache, spool)

    def read_now(self, offset: int, buffer: memoryview) -> int:
        """Read what is here already into a buffer; return its length, or -1 if some is not here.

        Raises:
            OSError: The disk does not give it.
        """
        first, last = self._parts(offset, len(buffer))
        if self._failure is not None or not all(self._here[first : last + 1]):
            return -1
        self._fetch_ahead(offset, len(buffer))
        return os.preadv(self._fd, [buffer], offset)

    def read(self, offset: int, length: int, cancellation: Cancellation) -> bytes:
        """Return part of the blob, fetched if need be.

        Raises:
            CancelledError: Cancellation was wished; what was begun goes on.
            BlobCorruptError: The blob turned out wrong when it was complete.
            PropmasterError: A part could not be had.
        """
        first, last = self._parts(offset, length)
        futures = [future for at in range(first, last + 1) if (future := self._want(at))]
        self._fetch_ahead(offset, length)
        for future in futures:
            result_of(future, cancellation)
        if self._failure is not None:
            raise self._failure
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise LocalReadError(f"{self._digest} can not be read: {error.strerror}") from error

    def close(self) -> None:
        """Give up what is not complete; what is still fetched is dropped when it comes."""
        with self._lock:
            self._is_closed = True
            self._fd = -1
            self._files.close()

    def _parts(self, offset: int, length: int) -> tuple[int, int]:
        size = self._policy.part_bytes
        return offset // size, (offset + length - 1) // size

    def _want(self, part: int) -> Future[None] | None:
        """Return what brings a part, None when it is here."""
        with self._lock:
            if self._here[part]:
                return None
            future = self._under_way.get(part)
            if future is None:
                future = self._threads.submit(self._fetch, part)
                self._under_way[part] = future
            return future

    def _fetch_ahead(self, offset: int, length: int) -> None:
        with self._lock:
            # Several requests of one reader may arrive in any order.
            near = abs(offset - self._expected) <= self._policy.part_bytes
            self._expected = offset + length
            if not near:
                self._window = 0
                return
            self._window = min(
                self._policy.ahead_bytes, max(self._policy.part_bytes, 2 * self._window)
            )
            first, last = self._parts(offset + length, self._window)
        for part in range(first, min(last + 1, len(self._here))):
            self._want(part)

    def _fetch(self, part: int) -> None:
        is_here = False
        try:
            self._bring(part)
            with self._lock:
                self._left -= 1
                complete = not self._left
            if complete:
                # The last part is not given out before all is verified, so nobody gets the whole of
                # a wrong blob without an error.
                self._complete()
            is_here = True
        finally:
            with self._lock:
                # Both at once: whoever saw neither would fetch it a second time.
                del self._under_way[part]
                self._here[part] = is_here

    def _bring(self, part: int) -> None:
        offset = part * self._policy.part_bytes
        length = min(self._policy.part_bytes, self._digest.size - offset)
        data = self._from_cache(offset, length)
        if data is None:
            data = self._store.read_range(self._digest, offset, length)
            self._statistics.count(bytes_fetched=length)
        with self._lock:
            if self._is_closed:
                raise CancelledError("the mount is gone")
            # Of its own, since after `close` the number may be another file's.
            fd = os.dup(self._fd)
        try:
            write_all(fd, data, offset)
        except OSError as error:
            raise local_write_error(error, f"the file of {self._digest}") from error
        finally:
            os.close(fd)

    def _from_cache(self, offset: int, length: int) -> bytes | None:
        """Return part of the blob if somebody else on this host has got all of it by now."""
        try:
            fd = self._cache.open_blob(self._digest) if self._cache is not None else None
        except LocalError:
            return None  # The store has it as well.
        if fd is None:
            return None
        try:
            data = os.pread(fd, length, offset)
        except OSError:
            return None
        finally:
            os.close(fd)
        return data if len(data) == length else None

    def _complete(self) -> None:
        try:
            actual = hash_fd(self._fd)
            if actual != self._digest:
                self._failure = BlobCorruptError(f"{self._digest} is stored as {actual}")
        except OSError as error:
            self._failure = LocalReadError(f"{self._digest} can not be read: {error.strerror}")
        if self._failure is not None:
            # What was read so far may have been wrong, and nobody may read on to find out.
            self._on_corrupt(self._digest, self._failure)
            return
        self._statistics.count(blobs_fetched=1)
        fd = os.dup(self._fd)
        if self._staged is not None:
            try:
                self._staged.publish(self._digest)
            except LocalError as error:
                log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
        self._on_complete(self._digest, fd)

    def _make_file(self, cache: BlobCache | None, spool: Path) -> int:
        if cache is not None:
            try:
                staged = self._files.enter_context(cache.staging(self._digest.size))
                os.ftruncate(staged.fd, self._digest.size)
            except (LocalError, OSError) as error:
                log.warning(events.CACHE_BYPASSED, extra={"reason": str(error)})
            else:
                self._staged = staged
                return staged.fd
        try:
            return self._files.enter_context(tempfile.TemporaryFile(dir=spool)).fileno()
        except OSError as error:
            raise local_write_error(error, os.fspath(spool)) from error

    def __del__(self) -> None:
        self._files.close()
