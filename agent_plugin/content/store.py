"""What a content store is: blobs by digest, and documents (manifests) by key.

A store is `s3://bucket/prefix` or `file:///dir`; both have `Data/<hash>.xxh128` and `Manifests/…`
below them. Every method may be called from any thread. A method has done what it says when it
returns, or it raises: nothing is skipped silently. Only an answer of 404 means absent.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import CancelledError

# Blobs up to this size are moved whole and in memory; larger ones in parts, through a file.
WHOLE_BLOB_BYTES: Final = 8 * 1024 * 1024

# How late the end of a pause may be noticed, in seconds.
PAUSE_POLL_SECONDS: Final = 0.1

# Told the number of further bytes that have moved; called from any thread, must not block.
Progress = Callable[[int], None]


# Told the bytes of a blob in order, with the position of each piece, when they count for its hash;
# may keep none of them. Begins anew with position 0 when a blob has to be fetched again.
Hashed: TypeAlias = "Callable[[memoryview, int], None]"


def ignore_progress(_bytes: int) -> None:
    """Take no notice of progress."""


def ignore_bytes(_piece: memoryview, _offset: int) -> None:
    """Take no notice of bytes."""


class Cancellation:
    """Somebody's wish that work stops, or that it pauses; heeded at every part boundary.

    Args:
        pauses_with: Another one: while a pause of that is wished, one of this is.
    """

    def __init__(self, *, pauses_with: "Cancellation | None" = None) -> None:
        # Not threading.Event: its lock may be held by the very thread that a signal interrupts.
        self._wished = False
        self._sleepers: list[threading.Lock] = []
        self._pauses_with = pauses_with
        self._paused = False

    def cancel(self) -> None:
        """Wish it; may be called from a signal handler, and more than once."""
        self._wished = True
        while self._sleepers:
            # Another cancel may be doing the same.
            with suppress(IndexError):
                self._sleepers.pop().release()

    @property
    def wished(self) -> bool:
        """Whether work should stop."""
        return self._wished

    def pause(self) -> None:
        """Wish that nothing further begins until `resume`; what is under way comes to its end."""
        self._paused = True

    def resume(self) -> None:
        """Let work go on."""
        self._paused = False

    @property
    def paused(self) -> bool:
        """Whether nothing further should begin."""
        return self._paused or (self._pauses_with is not None and self._pauses_with.paused)

    def check(self) -> None:
        """Go on, or stop; does not wait for the end of a pause.

        Raises:
            CancelledError: Somebody wished it.
        """
        if self._wished:
            raise CancelledError("stopped on request")

    def pass_boundary(self) -> float:
        """Wait for the end of a pause, then go on; return how many seconds that took.

        To be called where the next part of something begins, and where nothing is held that others
        wait for.

        Raises:
            CancelledError: Somebody wished to stop.
        """
        self.check()
        begun: float | None = None
        while self.paused:
            begun = begun or time.monotonic()
            self.sleep(PAUSE_POLL_SECONDS)
        return 0.0 if begun is None else time.monotonic() - begun

    def sleep(self, seconds: float) -> None:
        """Wait, at most until somebody wishes to stop.

        Raises:
            CancelledError: Somebody wished it.
        """
        # Held from the start, and released by whoever takes it out of the list.
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        try:
            # Looked at only now: a wish from here on finds the sleeper.
            if not self._wished:
                sleeper.acquire(timeout=min(max(seconds, 0), threading.TIMEOUT_MAX))
        finally:
            with suppress(ValueError):
                self._sleepers.remove(sleeper)
        self.check()


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part of an upload that the store has.

    Attributes:
        number: From 1.
        tag: What the store called it.
        checksum: What the store has taken of it besides; empty if nothing.
        hash: xxh128 of the bytes that were sent.
    """

    number: int
    tag: str
    checksum: str
    hash: str


class UploadMemory(Protocol):
    """Remembers an upload in parts, so that a later process can go on with it.

    Every method may be called from any thread, and must not block for long.
    """

    def recall(self) -> tuple[str, Sequence[SentPart]]:
        """Return the id of an upload that did not come to its end, and its parts; no id: none."""

    def remember(self, upload_id: str, parts: Sequence[SentPart]) -> None:
        """Remember what the store has of an upload; no id: there is none any more."""


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """What a listing says of a document.

    Attributes:
        key: Below `Manifests/`, without that prefix.
        size: Bytes.
        last_modified: Seconds since the epoch by the store's clock; S3 gives whole seconds.
    """

    key: str
    size: int
    last_modified: float


@dataclass(frozen=True, slots=True)
class Document:
    """A document's bytes with what the store knows of it; `metadata` keys are lower case."""

    info: DocumentInfo
    data: bytes
    metadata: Mapping[str, str] = field(default_factory=dict)


class BlobSource(Protocol):
    """Where content is read from: a store, or the objects of a snapshot (snapshot_store.py).

    What a digest says of the bytes is the source's matter: a store's digests are hashes, which it
    has verified when it returns; those of a snapshot are names for one state of an object. The
    methods raise what `Store` says besides what they name.
    """

    def get(self, digest: Digest) -> bytes:
        """Return the whole content; see Store.get."""

    def fetch(
        self,
        digest: Digest,
        fd: int,
        *,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
    ) -> None:
        """Write the whole content to an empty file; see Store.fetch."""

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """Return part of the content, min(length, size - offset) bytes; see Store.read_range."""


class Store(Protocol):
    """A content-addressed store and the manifests beside it.

    Every method raises `StoreAccessError` (401, 403), `StoreUnavailableError` (the retry budget is
    spent) and `StoreProtocolError` (an answer that makes no sense), besides what it names itself.
    """

    @property
    def url(self) -> str:
        """`s3://bucket/prefix` or `file:///dir`, without a trailing slash."""

    @property
    def identity(self) -> str:
        """What tells it from every other store: the URL, and for S3 the endpoint."""

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Return those of the digests that the store lacks; an object of another size counts."""

    def get(self, digest: Digest) -> bytes:
        """Return a whole blob, verified. For blobs up to WHOLE_BLOB_BYTES; larger ones use memory.

        Raises:
            BlobNotFoundError: The store answered 404, for the legacy key (no suffix) as well.
            BlobCorruptError: Its bytes are something else, also when fetched again.
        """

    def fetch(
        self,
        digest: Digest,
        fd: int,
        *,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        hashed: Hashed = ignore_bytes,
    ) -> None:
        """Write a whole blob to an empty file open for reading and writing, verified on return.

        On any error the file's content is undefined and the caller drops it; on return, and on any
        error but CancelledError, nobody writes to it any more. Parts are fetched in parallel and
        hashed while they arrive; what is hashed is given to `hashed`. Progress tells each byte of
        the blob once; bytes fetched a second time are not told again.

        Raises:
            BlobNotFoundError, BlobCorruptError: As for get.
            CancelledError: Cancellation was wished. A write may still be under way, so that the
                file must not be used, not even as an empty one.
            OSError: The file could not be written; ENOSPC among others.
        """

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """Return part of a blob, as POSIX read does: exactly min(length, size - offset) bytes.

        Not verified: a part can not be checked against the digest of the whole.

        Raises:
            BlobNotFoundError: As for get.
        """

    def put(self, digest: Digest, data: bytes) -> bool:
        """Store a blob of at most WHOLE_BLOB_BYTES unless it is there; True when it was stored.

        Raises:
            FileChangedError: `data` is not `digest`; nothing was stored.
        """

    def put_file(
        self,
        digest: Digest,
        fd: int,
        *,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        memory: UploadMemory | None = None,
    ) -> bool:
        """Store a file's whole content unless it is there; True when it was stored.

        The bytes are hashed as they are sent; an upload whose bytes turn out different is aborted
        and leaves nothing behind. `fd` is read from offset 0 by position. What `memory` has of an
        upload that a killed process had begun is not sent again, if it is what is read now.

        Raises:
            FileChangedError: The bytes read are not `digest`; nothing was stored.
            CancelledError: Cancellation was wished; nothing was stored.
        """

    def abort_upload(self, digest: Digest, upload_id: str) -> None:
        """Remove what a killed process has sent of an upload in parts; none of that id is fine."""

    def list_blobs(self) -> Iterator[Digest]:
        """Yield every blob under its current key, in no order; other names are passed over."""

    def get_document(self, key: str, *, max_bytes: int) -> Document:
        """Return the document at `Manifests/<key>`.

        Raises:
            DocumentNotFoundError: The store answered 404.
            ManifestInvalidError: It is larger than `max_bytes`; it was not read further.
        """

    def put_document(self, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        """Store a document, replacing one of the same key. Metadata is ASCII.

        What a document survives, a power cut of the store's host for one, is survived by the blobs
        as well that were put before it, by whoever. A blob alone need not survive as much.
        """

    def list_documents(self, prefix: str) -> Iterator[DocumentInfo]:
        """Yield the documents whose key starts with `prefix`, ascending by key; none is no error.

        `prefix` is a plain string prefix: end it with `/` or `job-1` also finds `job-10`.
        """
