"""A large blob that is read while it comes: aligned parts on demand, and more ahead of a reader.

Its parts go to one file at their places. Until all are there nothing can be verified: that is the
`stream` policy, and the only way by which an unverified byte reaches a reader. When the last part
has come the whole is hashed; if it is right the file becomes the blob in the cache, if not every
later read fails, and the error ledger says so.

A reader that goes on where it stopped has half as much fetched ahead as it has read, up to
`ahead_bytes`; one that jumps gets only what it asks for (read_ahead.py). Parts are small, for those
that jump; whatever is missing side by side comes with one request.
"""

import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from copy import copy
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
from agent_plugin.content.store import BlobSource, Cancellation
from vfs.open_blob import OpenBlob
from vfs.read_ahead import ReadAhead
from vfs.statistics import Statistics
from vfs.threads import Threads
from vfs.waiting import result_of

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class StreamPolicy:
    """How large blobs are read.

    Attributes:
        may_stream: Before they are verified, and verified when complete; else only whole.
        above_bytes: Only blobs of more than that; None for what is so where they are verified.
        by_hash: Whether a digest is the hash of the bytes; else it names the state of an object,
            for each part the source has seen to it that it is of that state, and there is nothing
            to verify when all is complete.
        part_bytes: What is fetched at least, aligned to multiples of itself.
        request_bytes: What is fetched at most with one request, a multiple of `part_bytes`.
        ahead_bytes: What is fetched at most beyond what a sequential reader has asked for.
    """

    may_stream: bool = True
    above_bytes: int | None = None
    by_hash: bool = True
    part_bytes: int = 256 * 1024
    request_bytes: int = 4 * 1024 * 1024
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
        on_complete: Given the digest and the verified blob.
        on_corrupt: Told when the blob turned out wrong.
        on_part: Told how many bytes have come to the file.
        drop: Given what is open when nobody has this any more, to be closed. Called from anywhere,
            by the garbage collector too, and so must take no lock.

    Raises:
        NoSpaceError, LocalWriteError: No file could be made.
    """

    def __init__(
        self,
        digest: Digest,
        store: BlobSource,
        cache: BlobCache | None,
        spool: Path,
        policy: StreamPolicy,
        *,
        threads: Threads,
        statistics: Statistics,
        on_complete: Callable[[Digest, OpenBlob], None],
        on_corrupt: Callable[[Digest, PropmasterError], None],
        on_part: Callable[[Digest, int], None] = lambda _digest, _length: None,
        drop: Callable[[ExitStack], None],
    ) -> None:
        self._drop = drop
        self._files = ExitStack()
        self._digest = digest
        self._store = store
        self._cache = cache
        self._policy = policy
        self._threads = threads
        self._statistics = statistics
        self._on_complete = on_complete
        self._on_corrupt = on_corrupt
        self._on_part = on_part
        self._lock = threading.Lock()
        parts = -(-digest.size // policy.part_bytes)
        self._here = bytearray(parts)
        self._left = parts
        self._under_way: dict[int, Future[None]] = {}
        self._failure: PropmasterError | None = None
        self._read_ahead = ReadAhead(
            part_bytes=policy.part_bytes,
            request_bytes=policy.request_bytes,
            most_bytes=policy.ahead_bytes,
        )
        self._is_closed = False
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
        self._want(last + 1, self._last_ahead(offset, len(buffer)))
        return os.preadv(self._fd, [buffer], offset)

    def read(self, offset: int, length: int, cancellation: Cancellation) -> bytes:
        """Return part of the blob, fetched if need be.

        Raises:
            CancelledError: Cancellation was wished; what was begun goes on.
            BlobCorruptError: The blob turned out wrong when it was complete.
            PropmasterError: A part could not be had.
        """
        first, last = self._parts(offset, length)
        ahead = self._last_ahead(offset, length)
        futures = self._want(first, last)
        self._want(last + 1, ahead)
        for future in futures:
            result_of(future, cancellation)
        if self._failure is not None:
            # One that was raised keeps what its raisers had: this.
            raise copy(self._failure)
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

    def _last_ahead(self, offset: int, length: int) -> int:
        """Return the last part that is worth fetching, now that this was asked for."""
        with self._lock:
            end = self._read_ahead.after(offset, length)
        return min(-(-end // self._policy.part_bytes), len(self._here)) - 1

    def _want(self, first: int, last: int) -> list[Future[None]]:
        """Return what brings those of the parts that are not here, in order."""
        futures: dict[Future[None], None] = {}
        most = self._policy.request_bytes // self._policy.part_bytes
        with self._lock:
            missing: list[int] = []
            for part in range(first, last + 1):
                future = self._under_way.get(part)
                if future is not None:
                    futures[future] = None
                elif not self._here[part]:
                    missing.append(part)
            while missing:
                count = 1
                while count < min(most, len(missing)) and missing[count] == missing[0] + count:
                    count += 1
                future = self._threads.submit(self._fetch, missing[0], count)
                self._under_way.update(dict.fromkeys(missing[:count], future))
                futures[future] = None
                del missing[:count]
        return list(futures)

    def _fetch(self, first: int, count: int) -> None:
        parts = range(first, first + count)
        is_here, counted = False, 0
        try:
            self._bring(first, count)
            with self._lock:
                counted = count
                self._left -= counted
                complete = not self._left
            if complete:
                # The last part is not given out before all is verified, so nobody gets the whole of
                # a wrong blob without an error.
                self._complete()
            is_here = True
        finally:
            with self._lock:
                if not is_here:
                    # They will come again, and all is to be verified then.
                    self._left += counted
                # Both at once: whoever saw neither would fetch it a second time.
                for part in parts:
                    del self._under_way[part]
                    self._here[part] = is_here

    def _bring(self, first: int, count: int) -> None:
        offset = first * self._policy.part_bytes
        length = min(count * self._policy.part_bytes, self._digest.size - offset)
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
        self._on_part(self._digest, length)

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
            actual = hash_fd(self._fd) if self._policy.by_hash else self._digest
            if actual != self._digest:
                self._failure = BlobCorruptError(f"{self._digest} is stored as {actual}")
        except OSError as error:
            self._failure = LocalReadError(f"{self._digest} can not be read: {error.strerror}")
        if self._failure is not None:
            # What was read so far may have been wrong, and nobody may read on to find out.
            self._on_corrupt(self._digest, self._failure)
            return
        blob = OpenBlob(os.dup(self._fd), is_spooled=True)
        self._statistics.count(blobs_fetched=1)
        # Once: what fails after it comes here again.
        staged, self._staged = self._staged, None
        if staged is not None:
            try:
                staged.publish(self._digest)
                blob.is_spooled = False
            except LocalError as error:
                log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
        self._on_complete(self._digest, blob)

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
        self._drop(self._files)
