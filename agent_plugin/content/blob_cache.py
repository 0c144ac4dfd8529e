"""The local cache of verified blobs that all sessions and processes of a host use at once.

The cache saves fetches and nothing else: whoever can not use it goes on without it. A blob gets
its name by a rename when all its bytes are there and verified, so a process may die anywhere and
leaves whole blobs and a file in tmp/. Where files stand and why they are trusted is in
blob_cache_directory.py, blobs as files in blob_cache_files.py, single-flight in
blob_cache_claims.py, what must stay in blob_cache_leases.py, what fits in blob_cache_room.py,
eviction in blob_cache_collect.py.

A cache may be used from any thread; `close` needs the others to be done. After a fork without
exec the child opens its own. Not synced: after a power cut a file system may hold a blob of the
right name and wrong length, which is quarantined, or (rarely) wrong content, which `verify` finds.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from agent_plugin.content.blob_cache_claims import Claim, Claims
from agent_plugin.content.blob_cache_collect import (
    CacheUsage,
    CollectReport,
    Limits,
    VerifyReport,
    count_usage,
    verify_blobs,
)
from agent_plugin.content.blob_cache_directory import (
    OUT_OF_SPACE,
    CacheDirectory,
    local_failure,
    namespace_of,
    open_private_file,
)
from agent_plugin.content.blob_cache_files import BlobFiles, Bytes, Staged
from agent_plugin.content.blob_cache_leases import Lease, Leases
from agent_plugin.content.blob_cache_room import Room
from agent_plugin.content.blob_cache_usage import UsageCounter
from agent_plugin.content.digest import Digest, hash_name
from agent_plugin.content.errors import BlobCorruptError, LocalReadError
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation

__all__ = [
    "BlobCache",
    "CacheUsage",
    "Claim",
    "CollectReport",
    "Lease",
    "Staged",
    "VerifyReport",
]

_POLL_SECONDS: Final = 0.05
# For a small blob that somebody fetches, when another one has not come in all the time given.
_IMPATIENT_SECONDS: Final = 0.1


class BlobCache:
    """Verified blobs in a directory; made by `open`."""

    def __init__(
        self,
        directory: CacheDirectory,
        counter: UsageCounter,
        claims: Claims,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._claims = claims
        self._limits = limits
        self._files = BlobFiles(directory, clock)
        self._leases = Leases(directory, clock)
        self._room = Room(directory, counter, self._leases, limits, clock)
        # Whether a small blob was waited for in vain: whoever fetches it is stopped, or paused.
        self._in_vain = False
        self._closed = False

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        store_url: str,
        max_bytes: int,
        min_free_bytes: int,
        clock: Callable[[], float] = time.time,
        shared: bool = False,
        scope: str = "",
    ) -> Self:
        """Open a cache, and make it when it is not there. Takes no scan, whatever its size.

        Args:
            directory: Absolute; made with mode 0700. Links above it are followed, itself not.
            store_url: The store that blobs come from; only caches of one store share blobs.
            max_bytes: Quota for all blobs of all stores, staged ones too. Each process may pass it
                by 16 MiB, and by what it is given to `add` at this moment.
            min_free_bytes: What has to stay free on the file system; looked at with each 16 MiB
                that are added, and before a blob is staged.
            clock: Seconds since the epoch.
            shared: Share blobs with all stores that are opened so. Whoever can write to one of
                them can then feed wrong blobs to all: xxh128 is no defence against an attacker.
            scope: For whom blobs are fetched; only caches of one scope share blobs.

        Raises:
            CacheUnsafeError: Others can write the directory, or could; nothing in it is trusted.
            NoSpaceError, LocalWriteError: It could not be made or opened for writing.
        """
        namespace = namespace_of(store_url, scope, shared=shared)
        with ExitStack() as undo:
            opened = CacheDirectory.open(directory, namespace)
            undo.callback(opened.close)
            fds = {}
            for name in ("locks", "usage"):
                try:
                    fds[name] = open_private_file(
                        name, opened.shown(name), dir_fd=opened.version_fd
                    )
                except OSError as error:
                    raise local_failure(f"can not open {opened.shown(name)}", error) from error
                undo.callback(os.close, fds[name])
            undo.pop_all()
        claims = Claims(fds["locks"], int(hash_name(namespace)[:15], 16))
        limits = Limits(max_bytes, min_free_bytes)
        return cls(opened, UsageCounter(fds["usage"]), claims, limits, clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The directory."""
        return self._directory.path

    @property
    def device(self) -> int:
        """The disk that the cache is on, as `st_dev`; also when its directory was removed since."""
        return self._directory.device

    def close(self) -> None:
        """Write the count of bytes and close all files; a second time does nothing.

        Raises:
            NoSpaceError, LocalWriteError: The count could not be written; the files are closed.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._room.close()
        finally:
            self._claims.close()
            self._directory.close()

    def contains(self, digest: Digest) -> bool:
        """Whether `open_blob` would find the blob, as things are now; one stat.

        Raises:
            CacheUnsafeError: Its directory is not ours alone.
        """
        return self._files.contains(digest)

    def open_blob(self, digest: Digest) -> int | None:
        """Return a descriptor to read a blob from, or None when the cache has not got it.

        What stands in the blob's place and can not be a blob (a link, a FIFO, a file of another
        size or that could be written) is quarantined. The caller closes the descriptor; its bytes
        stay whatever happens to the cache.

        Raises:
            CacheUnsafeError: Its directory is not ours alone.
            LocalReadError: It could not be opened, for want of descriptors or the like.
            LocalWriteError: Something wrong could not be moved to quarantine.
        """
        return self._files.open_blob(digest)

    def open_blob_now(self, digest: Digest) -> int | None:
        """As `open_blob`, but None too when the disk would have to be waited for.

        What is wrong with a blob is left to `open_blob`. That it was used is written later, by
        `note_uses`.
        """
        return self._files.open_blob_now(digest)

    @property
    def uses_to_note(self) -> int:
        """How many blobs have been used that `note_uses` has not told of."""
        return self._files.uses_to_note

    def note_uses(self) -> None:
        """Write down which blobs `open_blob_now` has opened, so that others are evicted first."""
        self._files.note_uses()

    def read_by_hash(self, hash_: str, *, max_bytes: int) -> bytes | None:
        """Return a blob of which only the hash is known, verified; None when it is not here.

        Raises:
            CacheUnsafeError, LocalReadError, LocalWriteError: As for open_blob.
        """
        digest = self._files.find(hash_)
        if digest is None or digest.size > max_bytes:
            return None
        fd = self.open_blob(digest)
        if fd is None:
            return None
        try:
            with os.fdopen(fd, "rb") as file:
                data = file.read(max_bytes)
        except OSError as error:
            raise self._unreadable(error) from error
        if Digest.of(data) != digest:
            self.quarantine(digest, "its bytes are not what its name says")
            return None
        return data

    def add(self, digest: Digest, data: Bytes) -> bool:
        """Keep a blob whose bytes the caller has verified; one that is there already is fine.

        Returns:
            Whether it is the caller's bytes that are there now. Those that were there already may
            be damaged, where a blob that was found so can not be quarantined.

        Raises:
            BlobCorruptError: `data` has another length than the blob; nothing was kept.
            NoSpaceError: The disk is full, after eviction as well; or a limit has been passed, and
                nothing can be evicted.
            LocalWriteError: It could not be written.
            CacheUnsafeError: Its directory is not ours alone.
        """
        if len(data) != digest.size:
            raise BlobCorruptError(f"{digest}: {len(data)} bytes were given to the cache")
        if self._files.contains(digest):
            return False
        self._room.insist(digest.size)
        try:
            try:
                name = self._files.write(data)
            except OSError as error:
                if error.errno not in OUT_OF_SPACE:
                    raise
                self._room.collect_on_full_disk(digest.size)
                name = self._files.write(data)
        except OSError as error:
            raise local_failure(f"can not write {digest}", error) from error
        self._files.publish(name, digest)
        self._room.account(digest.size)
        return True

    def staging(self, size: int) -> Staged:
        """Return an empty file to write a blob of `size` bytes to, for use in a `with`.

        The room is reserved until the blob is published or the block ends.

        Raises:
            NoSpaceError: `size` bytes do not fit, after eviction as well.
            LocalWriteError: The file could not be made.
        """
        return self._room.stage(self._files, size)

    def claim(self, digest: Digest) -> Claim | None:
        """Return the right to fetch a blob, or None when somebody on this host fetches it now.

        Look once more with `open_blob` when you have it: it may have come in between.

        Raises:
            LocalWriteError: The lock file failed.
        """
        try:
            return self._claims.take(digest)
        except OSError as error:
            raise local_failure(f"can not claim {digest}", error) from error

    def wait_for(self, digest: Digest, timeout: float, cancellation: Cancellation) -> bool:
        """Wait until a blob that somebody else fetches is there; True when it is.

        False when the claim became free without it, or after `timeout` seconds: fetch it
        yourself then, without a claim if need be, because the other may be stopped for good.

        Raises:
            CancelledError: Cancellation was wished.
            LocalWriteError: The lock file failed.
        """
        for _ in range(max(1, round(timeout / _POLL_SECONDS))):
            if self._files.contains(digest):
                return True
            try:
                if self._claims.is_free(digest):
                    break
            except OSError as error:
                raise local_failure(f"can not wait for {digest}", error) from error
            cancellation.sleep(_POLL_SECONDS)
        return self._files.contains(digest)

    def claim_or_wait(
        self, digest: Digest, timeout: float, cancellation: Cancellation
    ) -> Claim | None:
        """Return the right to fetch a blob that is not here, waiting for whoever fetches it now.

        None when the blob has come meanwhile, or nothing came in `timeout` seconds: look with
        `open_blob`, and fetch it without a claim if it is not there. A stopped process may hold
        the claims on thousands of small blobs, so when one was waited for in vain, others are not
        waited for as long until one comes.

        Raises:
            CancelledError: Cancellation was wished.
            CacheUnsafeError, LocalWriteError: As for `contains`, `claim` and `wait_for`.
        """
        is_small = digest.size <= WHOLE_BLOB_BYTES
        if is_small and self._in_vain:
            timeout = min(timeout, _IMPATIENT_SECONDS)
        deadline = time.monotonic() + timeout
        while (claim := self.claim(digest)) is None:
            left = deadline - time.monotonic()
            has_come = left > 0 and self.wait_for(digest, left, cancellation)
            if has_come or left <= 0:
                if is_small:
                    self._in_vain = not has_come
                return None
        try:
            if not self.contains(digest):
                return claim
        except BaseException:
            claim.release()
            raise
        claim.release()
        return None

    def lease(
        self, name: str, digests: Iterable[Digest], *, keep_seconds: float | None = None
    ) -> Lease:
        """Keep blobs from eviction while the lease is held; lease first, then look what is there.

        Args:
            name: Of the session, or whoever needs them; any text.
            digests: The blobs, whether they are here already or not.
            keep_seconds: Hold on this long from now, even when the lease is closed or this
                process dies; `release_lease` ends it early.

        Raises:
            NoSpaceError, LocalWriteError: It could not be written.
        """
        return self._leases.make(name, digests, keep_seconds)

    def release_lease(self, name: str) -> int:
        """End all leases of that name, whoever made them; return how many there were.

        Raises:
            LocalReadError, LocalWriteError: They could not be listed, or one not be removed.
        """
        return self._leases.release(name)

    def make_room(self, size: int) -> None:
        """Make sure that `size` more bytes fit, by eviction if need be; cheap when they do.

        Raises:
            NoSpaceError: They do not, because the rest is leased, or is not ours.
            LocalWriteError: Something could not be evicted.
        """
        self._room.make(size)

    def collect(self, *, room: int = 0, to_bytes: int | None = None) -> CollectReport:
        """Remove what is stale, and evict until the limits hold with `room` bytes to spare.

        Args:
            room: Bytes that are about to be added.
            to_bytes: Evict until this much is left at most, instead of what the quota says.

        Raises:
            CacheUnsafeError: A directory of the cache is not ours alone.
            LocalWriteError: Something could not be removed.
        """
        return self._room.collect(room=room, to_bytes=to_bytes)

    def clear(self) -> CollectReport:
        """Evict every blob that is not leased. Raises as `collect`."""
        return self.collect(to_bytes=0)

    def verify(self, cancellation: Cancellation | None = None) -> VerifyReport:
        """Hash every blob again and quarantine what is wrong.

        Raises:
            CancelledError: Cancellation was wished; what was found so far is in quarantine.
            CacheUnsafeError: A directory of the cache is not ours alone.
            LocalReadError, LocalWriteError: It could not be read, or a file not be moved.
        """
        try:
            return verify_blobs(self._directory, cancellation or Cancellation())
        except OSError as error:
            raise self._unreadable(error) from error

    def usage(self) -> CacheUsage:
        """Count what is in the cache, file by file.

        Raises:
            CacheUnsafeError: A directory of the cache is not ours alone.
            LocalReadError, LocalWriteError: It could not be read, or an odd file not be moved.
        """
        try:
            return count_usage(self._directory, self._leases, self._limits)
        except OSError as error:
            raise self._unreadable(error) from error

    def quarantine(self, digest: Digest, reason: str) -> bool:
        """Take a blob that turned out wrong away from its place; False when it was gone.

        Raises:
            LocalWriteError: It could not be moved.
        """
        return self._files.quarantine(digest, reason)

    def _unreadable(self, error: OSError) -> LocalReadError:
        message = f"blob cache: can not read {self._directory.path}: {error.strerror}"
        return LocalReadError(message, hint="check the cache directory's disk")
