"""The objects of a snapshot, read as blobs: each digest is a name for one state of one object.

So what moves blobs moves objects: the download engine copies them, the mount reads them. But these
digests are no hashes of content. They must not get to where something is found by its hash, the
blob cache above all. And nothing here proves the bytes but the store's answer to `If-Match`: it
gives those of the state that the snapshot has, or refuses.

Why it is so: docs/decisions/0017-sources-as-a-store.md.

Any method may be called from any thread.
"""

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeVar

from agent_plugin.content import events
from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.digest import EMPTY_HASH, READ_BYTES, Digest
from agent_plugin.content.errors import BlobCorruptError, BlobNotFoundError, ObjectChangedError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.object_snapshot import ObjectSnapshot, SnapshotEntry
from agent_plugin.content.objects import ObjectInfo
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.store import Cancellation, Progress, ignore_progress

if TYPE_CHECKING:
    from agent_plugin.content.s3_objects import S3Objects

T = TypeVar("T")

# How often content is asked for again whose SHA-256 is not the one that was demanded.
DAMAGED_RETRIES: Final = 2
_HASH_DIGITS: Final = len(EMPTY_HASH)
_CHANGED_HINT: Final = (
    "end the session (`propmaster session end`) and start it anew: it then has what is there now"
)
_CHECKSUM_HINT: Final = "correct ChecksumSHA256, or store the object again"


log = events.get_logger()


def digest_of(snapshot: ObjectSnapshot, entry: SnapshotEntry) -> Digest:
    """Return the name of an entry's content, in the form of a digest.

    It is half of the entry's identity. What is empty has the hash of nothing, as anywhere.
    """
    if not entry.size:
        return Digest(EMPTY_HASH, 0)
    return Digest(snapshot.identity(entry).hex[:_HASH_DIGITS], entry.size)


def manifest_of(snapshot: ObjectSnapshot) -> Manifest | None:
    """Return the tree of a snapshot, with names in the place of hashes; None if it is empty.

    Raises:
        ManifestInvalidError: It breaks a rule that holds for trees and not for snapshots.
    """
    if not snapshot.entries:
        return None
    return Manifest(
        (
            FileEntry(digest_of(snapshot, entry).hex, entry.mtime, entry.path, entry.size)
            for entry in snapshot.entries
        ),
        source=f"the objects of s3://{snapshot.bucket}",
    )


class SnapshotStore:
    """Reads the objects of one snapshot; a `BlobSource`.

    Every method raises what `S3Objects` does, ObjectChangedError among others for an object that
    is not as the snapshot has it any more; nothing of it is given out then.

    Args:
        snapshot: Which objects.
        objects: How they are reached.
    """

    def __init__(self, snapshot: ObjectSnapshot, objects: "S3Objects") -> None:
        self._snapshot = snapshot
        self._objects = objects

    @cached_property
    def _entries(self) -> dict[Digest, SnapshotEntry]:
        """The entries by the names of their content; made when something is read at first.

        Two threads may make it at once, and it is the same.
        """
        snapshot = self._snapshot
        return {digest_of(snapshot, entry): entry for entry in snapshot.entries if entry.size}

    def get(self, digest: Digest) -> bytes:
        """Return the whole content of an object.

        Raises:
            BlobNotFoundError: The snapshot has no such object.
            BlobCorruptError: Its SHA-256 is not the one that was demanded.
        """
        info = self._info(digest)

        def read() -> bytes:
            data = self._objects.read(info, 0, info.size)
            if info.checksum_sha256:
                _check(info, hashlib.sha256(data))
            return data

        return _until_right(f"get {info.url}", read)

    def fetch(
        self,
        digest: Digest,
        fd: int,
        *,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
    ) -> None:
        """Write the whole content of an object to an empty file; see BlobSource.fetch.

        Raises:
            BlobNotFoundError, BlobCorruptError: As for get.
            CancelledError: Cancellation was wished.
            OSError: The file could not be written.
        """
        info = self._info(digest)

        def receive() -> None:
            self._objects.fetch(info, fd, cancellation=cancellation, progress=progress)
            if info.checksum_sha256:
                _check(info, _sha256_of(fd, cancellation))

        _until_right(f"get {info.url}", receive)

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """Return part of an object's content: exactly min(length, size - offset) bytes.

        Raises:
            BlobNotFoundError: The snapshot has no such object.
        """
        with _telling_what_to_do():
            return self._objects.read(self._info(digest), offset, length)

    def object_of(self, digest: Digest) -> ObjectInfo | None:
        """Return which object a digest is the name of; None if the snapshot has none."""
        entry = self._entries.get(digest)
        return None if entry is None else self._snapshot.info(entry)

    def _info(self, digest: Digest) -> ObjectInfo:
        info = self.object_of(digest)
        if info is None:
            raise BlobNotFoundError(f"{digest} is no object of s3://{self._snapshot.bucket}")
        return info


def open_snapshot_store(
    document: bytes,
    *,
    source: str,
    environment: Mapping[str, str],
    policy: RetryPolicy | None = None,
    bandwidth: Bandwidth | None = None,
) -> SnapshotStore:
    """Return the store of the snapshot that a document holds.

    Args:
        document: A snapshot, encoded.
        source: What to call it in messages.
        environment: Where AWS variables are looked up.
        policy: When requests are sent again.
        bandwidth: How much may move; as much as there is by default.

    Raises:
        SourceInvalidError, UnsafePathError, PathClashError: It is no snapshot.
        SettingsInvalidError, StoreAccessError: As for `open_objects`.
    """
    # Here, because a snapshot may be looked at where no network library is needed.
    from agent_plugin.content.s3_objects import open_objects  # noqa: PLC0415 - see above

    snapshot = ObjectSnapshot.decode(document, source=source)
    objects = open_objects(
        snapshot.access, environment=environment, policy=policy, bandwidth=bandwidth
    )
    return SnapshotStore(snapshot, objects)


def _until_right(what: str, read: Callable[[], T]) -> T:
    """Return what `read` returns; content that came damaged is asked for again."""
    with _telling_what_to_do():
        for _ in range(DAMAGED_RETRIES):
            try:
                return read()
            except BlobCorruptError as error:
                log.info(
                    events.REQUEST_RETRIED,
                    extra={"request": what, "error": error.code, "reason": error.message},
                )
        return read()


@contextmanager
def _telling_what_to_do() -> Iterator[None]:
    try:
        yield
    except ObjectChangedError as error:
        raise ObjectChangedError(error.message, hint=_CHANGED_HINT) from error


def _sha256_of(fd: int, cancellation: Cancellation) -> "hashlib._Hash":
    hashing = hashlib.sha256()
    position = 0
    while chunk := os.pread(fd, READ_BYTES, position):
        cancellation.check()
        hashing.update(chunk)
        position += len(chunk)
    return hashing


def _check(info: ObjectInfo, hashed: "hashlib._Hash") -> None:
    actual = base64.b64encode(hashed.digest()).decode("ascii")
    if actual != info.checksum_sha256:
        raise BlobCorruptError(
            f"{info.url}: its SHA-256 is {actual}, not {info.checksum_sha256}", hint=_CHECKSUM_HINT
        )
