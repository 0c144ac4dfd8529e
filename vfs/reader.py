"""Where the bytes of a file come from: an open blob, the blob cache, or the store.

What has been verified is read by position from a descriptor. What is not here is fetched once,
however many readers and processes of the host want it, verified, and kept in the cache that all
sessions share. A blob of more than STRICT_BYTES can be read while it comes (streaming.py): once for
all readers of this process; others on the host may want other parts, and fetch for themselves until
one of them has all.

A blob that was in the cache already is hashed again before it is read for the first time, since a
disk may have damaged it; one that is too large for that to go unnoticed is hashed beside the
reading. Whatever is wrong goes to quarantine and is fetched anew.

What the cache has is looked at by threads of their own: those that fetch may all be waiting for a
store that hangs, and what is on this host is read all the same.

Concurrency: any thread may call anything. `read_now` never waits for a store, another process or
a disk.
"""

import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Final
from weakref import ref

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import EMPTY_HASH, Digest
from agent_plugin.content.errors import (
    BlobCorruptError,
    CancelledError,
    LocalError,
    LocalReadError,
    PropmasterError,
)
from agent_plugin.content.store import BlobSource, Cancellation
from vfs.kept_bytes import KeptBytes
from vfs.open_blob import OpenBlob
from vfs.statistics import Statistics
from vfs.streaming import Streamed, StreamPolicy
from vfs.threads import Threads
from vfs.waiting import result_of
from vfs.whole_blobs import WholeBlobs

# Above, a blob may be read before all of it is here and verified.
STRICT_BYTES: Final = 64 * 1024 * 1024
# What is read of the cache at once and not kept open: as much as the kernel asks for at once.
SMALL_BYTES: Final = 1024 * 1024
# How long who opens a large blob waits for it to be hashed, so that the kernel can read it itself;
# what was hashed meanwhile is in memory and read the faster.
VERIFY_SECONDS: Final = 0.25
# Blobs that are kept open, whose space the disk does not get back when the cache lets go of them.
MOST_OPEN: Final = 4096
# Threads that fetch, at most: with 30 ms to the store, 32 bring 1,000 small files a second.
FETCHES_AT_ONCE: Final = 32
# As many blobs that were used are told to the cache at once.
USES_AT_ONCE: Final = 256
# Threads that look for blobs on this host, and hash them; large ones apart, since a few of them
# keep a disk busy for long.
LOOKS_AT_ONCE: Final = 8
LARGE_LOOKS_AT_ONCE: Final = 4
# How often the cache is told what was used, in seconds; it evicts what was used least recently, by
# the minute.
USE_SECONDS: Final = 60.0

# Who has read some of a blob that turned out wrong, and goes on, gets an error and not the rest of
# a better copy. Renderers go on within less.
WRONG_SECONDS: Final = 5.0

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class WrongBlob:
    """What came wrong once: refused for a time, then read again, but only verified as a whole.

    Attributes:
        streamed: Who had some of it, as long as somebody reads of that.
        error: What readers are told, each by a copy: one that was raised keeps what its raisers
            had, the blob's file with it.
        until: Monotonic seconds.
    """

    streamed: "ref[Streamed]"
    error: PropmasterError
    until: float


def _part(blob: OpenBlob, offset: int, length: int) -> tuple[bytes | None, str]:
    """Return a part of a blob, None if it is wrong, and why it can not be had."""
    try:
        data = blob.part(offset, length)
    except OSError as error:
        return None, f"can not be read: {error.strerror}"
    if data is not None and len(data) != length:
        return None, f"ends at {offset + len(data)}"
    return data, ""


def _close_all(dropped: "SimpleQueue[ExitStack | None]") -> None:
    """Close what is dropped, until None is."""
    while (files := dropped.get()) is not None:
        try:
            files.close()
        except (PropmasterError, OSError) as error:
            log.warning(events.CACHE_BYPASSED, extra={"reason": str(error)})


def _tell_nobody(_digest: Digest, _error: PropmasterError) -> None:
    """Take no notice."""


class BlobReader:
    """The blobs of one store.

    Attributes:
        on_corrupt: Told of a blob that turned out wrong when some of it may have been read.

    Args:
        cache: The host's cache, or None to do without. What it can not take is kept in unnamed
            files as long as it is among the last that were read.
        open_store: Opens the store; called when something has to be fetched, from any thread.
        spool: A directory for those files.
        statistics: What is counted.
        policy: How large blobs are read.
        fetches_at_once: Threads that fetch.
        most_bytes: The most that is kept in those files; None for no limit. A blob that is verified
            when all of it has come is counted from then on.
        min_free_bytes: What their disk is left, as far as keeping less does it.
    """

    def __init__(
        self,
        cache: BlobCache | None,
        open_store: Callable[[], BlobSource],
        spool: Path,
        statistics: Statistics,
        *,
        policy: StreamPolicy,
        fetches_at_once: int = FETCHES_AT_ONCE,
        most_bytes: int | None = None,
        min_free_bytes: int = 0,
    ) -> None:
        self.on_corrupt: Callable[[Digest, PropmasterError], None] = _tell_nobody
        self._cache = cache
        self._open_store = open_store
        self._spool = spool
        self._statistics = statistics
        self._policy = policy
        self._lock = threading.Lock()
        self._open: OrderedDict[str, OpenBlob] = OrderedDict()
        # A quarter of what this process may have open; the kernel's limit, not the job's.
        self._most_streamed = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._most_open = min(self._most_streamed, MOST_OPEN)
        self._streamed: dict[str, Streamed] = {}
        self._wrong: dict[str, WrongBlob] = {}
        self._under_way: dict[str, Future[OpenBlob]] = {}
        self._beginning: dict[str, Future[Streamed | None]] = {}
        self._checks: dict[str, Future[OpenBlob | None]] = {}
        self._used: set[str] = set()
        self._tells_use = False
        self._threads = Threads(fetches_at_once, thread_name_prefix="fetch")
        self._disk = Threads(LOOKS_AT_ONCE, thread_name_prefix="look")
        self._large = Threads(LARGE_LOOKS_AT_ONCE, thread_name_prefix="look-large")
        self._halt = Cancellation()
        self._whole = WholeBlobs(cache, open_store, spool, statistics, self._halt)
        self._kept: KeptBytes | None = None
        # To be read once more only when all of it is verified. Of what was let go of: who has read
        # some of it would else be given the rest of what nobody ever completes.
        self._only_whole: set[str] = set()
        # Files of large blobs that nobody reads any more. They are closed by a thread of their own:
        # it takes locks to give their room back, and who happens to drop one may have them.
        self._dropped: SimpleQueue[ExitStack | None] = SimpleQueue()
        dropping = threading.Thread(target=_close_all, args=(self._dropped,), daemon=True)
        dropping.start()
        if most_bytes is not None:
            self._kept = KeptBytes(most_bytes, min_free_bytes, spool, self._keep_no_more)

    def close(self) -> None:
        """Stop fetching; descriptors are closed as their readers let go of them."""
        self._halt.cancel()
        if self._cache is not None:
            self._cache.note_uses()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._disk.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            wrong = [blob.streamed() for blob in self._wrong.values()]
            for streamed in (*self._streamed.values(), *wrong):
                if streamed is not None:
                    streamed.close()
            self._streamed.clear()
        self._dropped.put(None)

    def read_now(self, digest: Digest, offset: int, buffer: memoryview) -> int:
        """Read what is here already; return the number of bytes, or -1 when it has to be fetched.

        Args:
            digest: The blob, of more than 0 bytes.
            offset: In bytes, below the blob's size.
            buffer: As long as what is wanted, and not reaching past the blob's end.

        Raises:
            OSError: The cache's disk does not give it.
        """
        blob = self._open.get(digest.hex)
        if blob is not None:
            self._note_use(digest)
            return blob.part_now(offset, buffer)
        streamed = self._streamed.get(digest.hex)
        if streamed is not None:
            return streamed.read_now(offset, buffer)
        if len(buffer) == digest.size <= SMALL_BYTES and digest.hex not in self._under_way:
            return self._read_small_now(digest, buffer)
        return -1

    def read(self, digest: Digest, offset: int, length: int, cancellation: Cancellation) -> bytes:
        """Return exactly that part of a blob, after fetching what it takes.

        Raises:
            CancelledError: Cancellation was wished; the fetch goes on for whoever wants it next.
            PropmasterError: Any of the store's or this host's.
        """
        if digest.hex == EMPTY_HASH:
            return b""
        wrong = self._wrong.get(digest.hex)
        if wrong is not None and time.monotonic() < wrong.until:
            raise copy(wrong.error)
        if self._may_stream(digest):
            streamed = self._stream(digest, cancellation)
            if streamed is not None:
                return streamed.read(offset, length, cancellation)
        if length == digest.size <= SMALL_BYTES and (small := self._read_small(digest)) is not None:
            return small
        failed = False
        while True:
            blob = self.open(digest, cancellation)
            data, reason = _part(blob, offset, length)
            if not reason and data is not None:
                return data
            if reason and failed:
                raise LocalReadError(f"{digest} {reason}")
            # The disk has damaged it since it was verified: that is seen when it is hashed again.
            failed = failed or bool(reason)
            self._let_go(digest, blob)

    def open(self, digest: Digest, cancellation: Cancellation) -> OpenBlob:
        """Return a whole, verified blob, after fetching it if need be.

        Raises:
            CancelledError, PropmasterError: As `read`.
        """
        with self._lock:
            blob = self._open.get(digest.hex)
            if blob is not None:
                self._open.move_to_end(digest.hex)
                return blob
            future = self._under_way.get(digest.hex)
            is_first = future is None
            if future is None:
                future = self._under_way[digest.hex] = Future()
        if is_first:
            looks = self._large if digest.size > STRICT_BYTES else self._disk
            try:
                looks.submit(self._obtain, digest, future, self._from_cache)
            except (PropmasterError, RuntimeError) as error:
                # Whoever wants it next would wait for ever.
                self._arrived(digest, future, error)
        return result_of(future, cancellation)

    def _let_go(self, digest: Digest, blob: OpenBlob) -> None:
        with self._lock:
            if self._open.get(digest.hex) is blob:
                del self._open[digest.hex]
                self._count_gone(digest.hex)

    def _keep_no_more(self, hex_: str) -> None:
        """Let go of what is too much; its file goes with the last who reads of it just now."""
        with self._lock:
            self._open.pop(hex_, None)
            self._streamed.pop(hex_, None)
            if self._policy.by_hash:
                self._only_whole.add(hex_)

    def _count_gone(self, hex_: str) -> None:
        if self._kept is not None:
            self._kept.gone(hex_)

    def _count_part(self, digest: Digest, length: int) -> None:
        # What is to be verified has to be let come to its end.
        if self._kept is not None and not self._policy.by_hash:
            self._kept.grew(digest.hex, length)

    def _count_whole(self, digest: Digest, blob: OpenBlob, *, stays: bool) -> None:
        if self._kept is not None and blob.is_spooled:
            # Of one that was let go of while it came, not all has been counted.
            self._kept.gone(digest.hex)
            self._kept.grew(digest.hex, digest.size, stays=stays)

    def note_uses(self) -> None:
        """Tell the cache what was read since this was called before.

        A blob that is open is not looked for again; without this it would seem to have been used
        when it was opened, and make room for what others fetch.
        """
        if self._cache is not None:
            self._cache.note_uses()
        used, self._used = self._used, set()
        for hex_ in used:
            blob = self._open.get(hex_)
            if blob is not None:
                # Of a disk that has become read-only all is read as before.
                with suppress(OSError):
                    os.utime(blob.fd)

    def verified_now(self, digest: Digest) -> OpenBlob | None:
        """Return a whole, verified blob that is open already."""
        blob = self._open.get(digest.hex)
        if blob is None or not blob.is_verified:
            return None
        self._note_use(digest)
        return blob

    def verified_cached(self, digest: Digest) -> OpenBlob | None:
        """Return a whole, verified blob that is on this host; of several threads, one reads it.

        None when it is not here, is under way, or is hashed for longer than VERIFY_SECONDS though
        it may be read meanwhile.
        """
        blob = self._cached(digest)
        if blob is not None and blob.verifying is not None:
            wait([blob.verifying], timeout=blob.kept_at + VERIFY_SECONDS - time.monotonic())
        return blob if blob is not None and blob.is_verified else None

    def _cached(self, digest: Digest) -> OpenBlob | None:
        with self._lock:
            blob = self._open.get(digest.hex)
            if blob is not None or digest.hex in self._streamed or digest.hex in self._under_way:
                return blob
            future = self._checks.get(digest.hex)
            is_first = future is None
            if future is None:
                future = self._checks[digest.hex] = Future()
        if is_first:
            try:
                blob = self._from_cache(digest)
                if blob is not None:
                    self._keep(digest, blob)
                future.set_result(blob)
            except BaseException as error:
                future.set_exception(error)
                raise
            finally:
                with self._lock:
                    del self._checks[digest.hex]
        return future.result()

    def _read_small_now(self, digest: Digest, buffer: memoryview) -> int:
        count = self._whole.read_small_now(digest, buffer)
        if count >= 0 and self._cache is not None and self._cache.uses_to_note >= USES_AT_ONCE:
            self._disk.submit(self._cache.note_uses)
        return count

    def _read_small(self, digest: Digest) -> bytes | None:
        is_known = digest.hex in self._open or digest.hex in self._under_way
        return None if is_known else self._whole.read_small(digest)

    def _from_cache(self, digest: Digest) -> OpenBlob | None:
        # What may be read while it comes may be read while it is hashed.
        may_be_wrong = self._may_stream(digest) and digest.hex not in self._only_whole
        return self._whole.from_cache(digest, is_verified=not may_be_wrong)

    def _note_use(self, digest: Digest) -> None:
        self._used.add(digest.hex)
        if self._kept is not None:
            self._kept.used(digest.hex)
        with suppress(KeyError):  # Another thread has just let go of it.
            self._open.move_to_end(digest.hex)

    def _may_stream(self, digest: Digest) -> bool:
        """Whether some of a blob may be read before all of it is verified."""
        above = self._policy.above_bytes
        return digest.size > (STRICT_BYTES if above is None else above) and self._policy.may_stream

    def is_local(self, digest: Digest) -> bool:
        """Whether the blob is on this host, as far as can be told without reading it."""
        return digest.hex == EMPTY_HASH or digest.hex in self._open or self._is_cached(digest)

    def _is_cached(self, digest: Digest) -> bool:
        try:
            return self._cache is not None and self._cache.contains(digest)
        except LocalError:
            return False

    # ------------------------------------------------------------------ on threads of their own

    def _obtain(
        self,
        digest: Digest,
        future: "Future[OpenBlob]",
        obtain: Callable[[Digest], OpenBlob | None],
    ) -> None:
        """Take a blob from the cache, or else leave it to those that fetch."""
        try:
            blob = obtain(digest)
            if blob is None:
                self._threads.submit(self._obtain, digest, future, self._whole.fetched)
                return
            self._keep(digest, blob)
        except BaseException as error:  # noqa: BLE001 - it is raised for those who wait
            self._arrived(digest, future, error)
        else:
            self._arrived(digest, future, blob)

    def _arrived(
        self, digest: Digest, future: "Future[OpenBlob]", outcome: OpenBlob | BaseException
    ) -> None:
        with self._lock:
            self._under_way.pop(digest.hex, None)
        if isinstance(outcome, OpenBlob):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    def _tell_use(self) -> None:
        with suppress(CancelledError):
            while True:
                self._halt.sleep(USE_SECONDS)
                self.note_uses()

    def _keep(self, digest: Digest, blob: OpenBlob) -> None:
        with self._lock:
            self._open[digest.hex] = blob
            while len(self._open) > self._most_open:
                self._count_gone(self._open.popitem(last=False)[0])
            begin = self._cache is not None and not self._tells_use
            self._tells_use = self._tells_use or begin
        # It can only be had whole, and readers wait for it.
        self._count_whole(digest, blob, stays=True)
        if begin:
            try:
                threading.Thread(target=self._tell_use, name="use", daemon=True).start()
            except RuntimeError:
                # The host gives no more threads; the next blob tries again.
                self._tells_use = False
        if not blob.is_verified:
            # Not before it is kept, or a wrong one would be kept after it was thrown out.
            blob.verifying = self._large.submit(self._verify_beside, digest, blob)

    def _verify_beside(self, digest: Digest, blob: OpenBlob) -> None:
        if self._whole.is_right(digest, blob):
            blob.is_verified = True
            return
        blob.is_wrong = True
        if self._is_cached(digest):
            # It can not be moved. Read as it comes, it would be this one again.
            with self._lock:
                self._only_whole.add(digest.hex)
        self._let_go(digest, blob)
        if blob.was_read:
            self.on_corrupt(
                digest, BlobCorruptError(f"{digest} was damaged in the cache when read")
            )

    # ------------------------------------------------------------------ large blobs

    def _stream(self, digest: Digest, cancellation: Cancellation) -> Streamed | None:
        """Return the large blob as it comes; None when it is here or can only be had whole."""
        with self._lock:
            if (
                digest.hex in self._open
                or digest.hex in self._under_way
                or digest.hex in self._wrong
                or digest.hex in self._only_whole
            ):
                return None
            if digest.hex in self._streamed:
                if self._kept is not None:
                    self._kept.used(digest.hex)
                return self._streamed[digest.hex]
            future = self._beginning.get(digest.hex)
            is_first = future is None
            if future is None:
                # Each has a file open until all of it is here, which may be never.
                if len(self._streamed) + len(self._beginning) >= self._most_streamed:
                    return None
                future = self._beginning[digest.hex] = Future()
        if is_first:
            try:
                self._disk.submit(self._begin, digest, future)
            except (PropmasterError, RuntimeError) as error:
                # As in `open`.
                self._begun(digest, future, error)
        return result_of(future, cancellation)

    def _begin(self, digest: Digest, future: "Future[Streamed | None]") -> None:
        """Take a large blob from the cache, or begin to read it as it comes."""
        outcome: Streamed | BaseException | None = None
        try:
            blob = self._from_cache(digest)
            if blob is not None:
                blob.was_read = True  # Very soon.
                self._keep(digest, blob)
            else:
                outcome = Streamed(
                    digest,
                    self._open_store(),
                    self._cache,
                    self._spool,
                    self._policy,
                    threads=self._threads,
                    statistics=self._statistics,
                    on_complete=self._completed,
                    on_corrupt=self._came_wrong,
                    on_part=self._count_part,
                    drop=self._dropped.put,
                )
        except BaseException as error:  # noqa: BLE001 - it is raised for those who wait
            outcome = error
        self._begun(digest, future, outcome)

    def _begun(
        self,
        digest: Digest,
        future: "Future[Streamed | None]",
        outcome: Streamed | BaseException | None,
    ) -> None:
        with self._lock:
            if isinstance(outcome, Streamed):
                self._streamed[digest.hex] = outcome
            del self._beginning[digest.hex]
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _came_wrong(self, digest: Digest, error: PropmasterError) -> None:
        with self._lock:
            # Its file goes with the last who reads of it just now.
            streamed = self._streamed.pop(digest.hex, None)
            self._count_gone(digest.hex)
            if streamed is not None:
                until = time.monotonic() + WRONG_SECONDS
                self._wrong[digest.hex] = WrongBlob(ref(streamed), copy(error), until)
        self.on_corrupt(digest, error)

    def _completed(self, digest: Digest, blob: OpenBlob) -> None:
        with self._lock:
            self._open[digest.hex] = blob
            self._streamed.pop(digest.hex, None)
        self._count_whole(digest, blob, stays=self._policy.by_hash)
