"""The content store in an S3 bucket.

Whole blobs, ranges and documents go through obstore, called from as many threads as want something:
16 threads got 2,094 blobs of 16 KiB a second for 0.26 ms of CPU each, its async calls 1,389 for
0.52 ms, boto3 530 for 2 ms (docs/decisions/0001-data-plane.md). boto3 does what obstore can not:
multipart uploads that can be aborted, and listing, because obstore (object_store 0.14) leaves the
owner header out of the signature there, which S3 refuses, and fails at keys it can not express,
such as `a//b`.

What is read is hashed before anyone gets it, and what is sent is hashed as it is sent.
"""

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import obstore
import xxhash

from agent_plugin.content import events, layout, parts
from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    DocumentNotFoundError,
    FileChangedError,
    ManifestInvalidError,
    ObjectNotFoundError,
)
from agent_plugin.content.flight import AdaptiveLimit, Lanes
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_access import Access, Clients, Lazily
from agent_plugin.content.s3_errors import (
    DamagedAnswerError,
    ObjectAbsentError,
    RangeUnsatisfiableError,
)
from agent_plugin.content.s3_objects import ObjectInfo, S3Objects
from agent_plugin.content.s3_requests import Requests, refuse_coded
from agent_plugin.content.s3_upload import Upload
from agent_plugin.content.store import (
    WHOLE_BLOB_BYTES,
    Cancellation,
    Document,
    DocumentInfo,
    Hashed,
    Progress,
    UploadMemory,
    ignore_bytes,
    ignore_progress,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

# A large blob moves in several parts at once, for each of the callers' threads.
REQUESTS_PER_CALLER: Final = 4
# A blob up to here is sent without asking whether it is there: a question costs half as much as
# the answer (docs/decisions/0005-upload-without-asking.md). Above, a useless body costs more.
ASK_FIRST_BYTES: Final = 256 * 1024
# In what pieces a part is taken off the network: memory of this size is used again and again.
PIECE_BYTES: Final = 256 * 1024
# How often a large blob is fetched anew whose parts all came and which is wrong as a whole.
WHOLE_RETRIES: Final = 3
# obstore gives these among the user's metadata, in this spelling; the user's are lower case.
_HEADERS: Final = frozenset(
    {
        "Cache-Control",
        "Content-Disposition",
        "Content-Encoding",
        "Content-Language",
        "Content-Type",
        "Storage-Class",
    }
)

log = events.get_logger()


class S3Store:
    """A store in `s3://bucket/prefix`; see the protocol `Store` for what the methods do.

    Args:
        access: The bucket and the clients for it.
        policy: When requests are sent again.
        concurrency: Threads that are expected to call at once, >= 1.
        bandwidth: How much may move; as much as there is by default.
    """

    def __init__(
        self,
        access: Access,
        *,
        policy: RetryPolicy,
        concurrency: int = 16,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        requests = concurrency * REQUESTS_PER_CALLER
        self._access = access
        self._policy = policy
        self._concurrency = concurrency
        self._requests = Requests(
            access, policy=policy, limit=AdaptiveLimit(requests), bandwidth=bandwidth
        )
        self._lanes = Lanes(requests)
        self._objects = Lazily(
            partial(S3Objects.like, access, policy=policy, bandwidth=self._requests.bandwidth)
        )

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`, with the slashes that the prefix has."""
        return self._access.location.url

    @property
    def identity(self) -> str:
        """The URL and the endpoint: two servers may have buckets of one name."""
        return f"{self.url} at {self._access.location.endpoint_url or 'AWS'}"

    @property
    def account_id(self) -> str:
        """The account that must own the bucket, empty if unknown; for the next process."""
        return self._access.account_id

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Ask for each blob with HEAD, in parallel; the legacy key does not count."""
        waiting = iter(set(digests))
        taking = threading.Lock()
        stop = Cancellation()

        def ask_on() -> set[Digest]:
            missing: set[Digest] = set()
            while True:
                with taking:
                    digest = next(waiting, None)
                if digest is None:
                    return missing
                if self._requests.size(layout.blob_key(digest), stop) != digest.size:
                    missing.add(digest)

        threads = min(self._concurrency, len(digests))
        asked = [self._lanes.submit(ask_on) for _ in range(threads)]
        try:
            # Waiting here can be interrupted by a signal, unlike a request.
            return set().union(*(self._lanes.result(future, stop) for future in asked))
        finally:
            stop.cancel()

    def get(self, digest: Digest) -> bytes:
        """See Store.get."""
        return self._get(digest, None)

    def fetch(
        self,
        digest: Digest,
        fd: int,
        *,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        hashed: Hashed = ignore_bytes,
    ) -> None:
        """See Store.fetch."""
        if digest.size <= WHOLE_BLOB_BYTES:
            data = self._lanes.run(lambda: self._get(digest, cancellation), cancellation)
            parts.write_all(fd, data, 0)
            hashed(memoryview(data), 0)
            progress(digest.size)
            return
        parts.reserve(fd, digest.size)
        told = parts.HighWater(progress)
        # No deadline: everything moved, and each part has one of its own.
        replace(self._policy, damaged_retries=WHOLE_RETRIES, deadline_seconds=math.inf).call(
            lambda: self._receive(digest, fd, cancellation, told, hashed),
            what=f"fetch {self._requests.place(layout.blob_key(digest))}",
            cancellation=cancellation,
            # Each part was tried often enough.
            only=BlobCorruptError,
        )

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """See Store.read_range.

        Raises:
            BlobCorruptError: The object has another size than the digest.
        """
        length = min(length, digest.size - offset)
        if length <= 0:
            return b""
        data = bytearray(length)
        view = memoryview(data)

        def write(piece: "Buffer", position: int) -> None:
            received = memoryview(piece)
            view[position - offset :][: received.nbytes] = received

        part = _of_either_key(
            digest, lambda key: self._read_part(key, digest, offset, length, None, write)
        )
        if part.blob_size != digest.size:
            raise BlobCorruptError(f"{digest} is stored as {part.blob_size} bytes")
        return bytes(data)

    def put(self, digest: Digest, data: bytes) -> bool:
        """See Store.put."""
        return self._put(digest, data, None)

    def put_file(
        self,
        digest: Digest,
        fd: int,
        *,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        memory: UploadMemory | None = None,
    ) -> bool:
        """See Store.put_file; a request that was sent before cancellation may still take effect."""
        if digest.size <= WHOLE_BLOB_BYTES:
            # One byte more than there should be, to see whether the file has grown.
            data = parts.read_all(fd, 0, digest.size + 1)
            stored = self._lanes.run(lambda: self._put(digest, data, cancellation), cancellation)
            if stored:
                progress(digest.size)
            return stored
        key = layout.blob_key(digest)
        size = self._lanes.run(lambda: self._requests.size(key, cancellation), cancellation)
        if size == digest.size:
            return False
        self._upload(
            key,
            digest,
            partial(parts.read_all, fd),
            {},
            cancellation=cancellation,
            progress=parts.HighWater(progress),
            memory=memory,
        )
        return True

    @property
    def objects(self) -> S3Objects:
        """Plain objects of any bucket there, as the identity that this store is used as."""
        return self._objects()

    def object_of(self, digest: Digest) -> ObjectInfo:
        """Return a blob as an object of `objects`, under whichever key it has.

        Raises:
            BlobNotFoundError: As for get.
            BlobCorruptError: The object has another size than the digest.
        """
        location = self._access.location

        def look(key: str) -> ObjectInfo:
            try:
                return self.objects.head(location.bucket, location.key(key))
            except ObjectNotFoundError as error:
                raise ObjectAbsentError(error.message) from error

        info = _of_either_key(digest, look)
        if info.size != digest.size:
            raise BlobCorruptError(f"{digest} is stored as {info.size} bytes")
        return info

    def abort_upload(self, digest: Digest, upload_id: str) -> None:
        """See Store.abort_upload."""
        key = layout.blob_key(digest)
        Upload(self._requests, key, {}, digest.size, upload_id=upload_id).end(Cancellation())

    def list_blobs(self) -> Iterator[Digest]:
        """See Store.list_blobs."""
        start = len(self._access.location.key(layout.BLOB_PREFIX))
        for entry in self._requests.list_below(layout.BLOB_PREFIX):
            digest = layout.blob_at(entry["Key"][start:], entry["Size"])
            if digest is not None:
                yield digest

    def get_document(self, key: str, *, max_bytes: int) -> Document:
        """See Store.get_document.

        Raises:
            UnsafePathError: The key can not be a document's.
        """
        place = layout.document_key(key)

        def ask(clients: Clients) -> Document:
            answer = self._open_document(clients, place, max_bytes)
            meta = answer.meta
            refuse_coded(answer.attributes, self._requests.place(place))
            data = bytes(answer.bytes())
            info = DocumentInfo(key, len(data), meta["last_modified"].timestamp())
            metadata = {
                name.lower(): value
                for name, value in answer.attributes.items()
                if name not in _HEADERS
            }
            return Document(info, data, metadata)

        try:
            document = self._requests.make(ask, f"get {self._requests.place(place)}")
        except ObjectAbsentError as error:
            raise DocumentNotFoundError(
                error.message, hint="Check the job's manifest paths and the queue's root prefix."
            ) from error
        # How large it is was not known before.
        self._requests.bandwidth.download.take(len(document.data))
        return document

    def put_document(self, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        """See Store.put_document.

        Raises:
            UnsafePathError: The key can not be a document's.
            ValueError: The metadata are not printable ASCII.
        """
        place = layout.document_key(key)
        attributes = layout.checked_metadata(metadata)
        if len(data) > WHOLE_BLOB_BYTES:
            self._upload(
                place,
                Digest.of(data),
                lambda offset, length: data[offset : offset + length],
                attributes,
                cancellation=Cancellation(),
                progress=parts.HighWater(ignore_progress),
            )
            return

        self._requests.put(place, data, attributes)

    def list_documents(self, prefix: str) -> Iterator[DocumentInfo]:
        """See Store.list_documents.

        Raises:
            UnsafePathError: The prefix can not be one of documents.
        """
        start = len(self._access.location.key(layout.DOCUMENT_PREFIX))
        found = []
        for entry in self._requests.list_below(layout.document_prefix(prefix)):
            key = entry["Key"][start:]
            if layout.is_document_key(key):
                found.append(DocumentInfo(key, entry["Size"], entry["LastModified"].timestamp()))
            else:
                log.info(events.FILE_SKIPPED, extra={"key": entry["Key"], "reason": "its name"})
        # S3 lists in this order, other servers by directories.
        yield from sorted(found, key=lambda info: info.key)

    def _open_document(self, clients: Clients, place: str, max_bytes: int) -> "obstore.GetResult":
        answer = obstore.get(clients.reader, place)
        if WHOLE_BLOB_BYTES < answer.meta["size"] <= max_bytes:
            # Only now it is known for how many bytes there has to be time.
            answer = obstore.get(clients.reader_of(answer.meta["size"]), place)
        if (size := answer.meta["size"]) > max_bytes:
            raise ManifestInvalidError(
                f"{self._requests.place(place)} has {size} bytes, more than {max_bytes}"
            )
        return answer

    def _get(self, digest: Digest, cancellation: Cancellation | None) -> bytes:
        return _of_either_key(digest, lambda key: self._get_at(key, digest, cancellation))

    def _get_at(self, key: str, digest: Digest, cancellation: Cancellation | None) -> bytes:
        def ask(clients: Clients) -> bytes:
            data = bytes(obstore.get(clients.reader_of(digest.size), key).bytes())
            if len(data) != digest.size:
                raise BlobCorruptError(f"{digest} is stored as {len(data)} bytes")
            if (actual := xxhash.xxh3_128_hexdigest(data)) != digest.hex:
                raise BlobCorruptError(f"{digest} is stored as xxh128:{actual}")
            return data

        what = f"get {self._requests.place(key)}"
        return self._requests.make(ask, what, cancellation, receives=digest.size)

    def _receive(
        self,
        digest: Digest,
        fd: int,
        cancellation: Cancellation,
        told: parts.HighWater,
        hashed: Hashed,
    ) -> None:
        def receive(key: str) -> None:
            parts.receive(
                digest,
                fd,
                lambda offset, length, stop, write: self._read_part(
                    key, digest, offset, length, stop, write
                ),
                lanes=self._lanes,
                cancellation=cancellation,
                progress=told,
                hashed=hashed,
            )

        _of_either_key(digest, receive)

    def _read_part(
        self,
        key: str,
        digest: Digest,
        offset: int,
        length: int,
        stop: Cancellation | None,
        write: parts.Write,
    ) -> parts.Part:
        """Have exactly that part written, piece by piece, also when some of it comes twice."""

        def ask(clients: Clients) -> parts.Part:
            reader = clients.reader_of(length)
            answer = obstore.get(reader, key, options={"range": (offset, offset + length)})
            meta = answer.meta
            if meta["size"] != digest.size:
                return parts.Part("", meta["size"])
            refuse_coded(answer.attributes, self._requests.place(key))
            received = 0
            for piece in answer.stream(min_chunk_size=PIECE_BYTES):
                if received + len(piece) <= length:
                    write(piece, offset + received)
                received += len(piece)
            if received != length:
                raise DamagedAnswerError(
                    f"{self._requests.place(key)}: {received} bytes instead of {length}"
                )
            return parts.Part(meta["e_tag"] or "", meta["size"])

        try:
            what = f"get {self._requests.place(key)} from {offset}"
            return self._requests.make(ask, what, stop, receives=length)
        except RangeUnsatisfiableError as error:
            raise BlobCorruptError(f"{digest} is stored as {offset} bytes or less") from error

    def _put(self, digest: Digest, data: bytes, cancellation: Cancellation | None) -> bool:
        if len(data) != digest.size or xxhash.xxh3_128_hexdigest(data) != digest.hex:
            raise FileChangedError(f"{digest} is not what was read: {Digest.of(data)}")
        key = layout.blob_key(digest)
        if len(data) > ASK_FIRST_BYTES and self._requests.size(key, cancellation) == digest.size:
            return False
        return self._requests.put_if_absent(key, data, cancellation)

    def _upload(
        self,
        key: str,
        digest: Digest,
        read: Callable[[int, int], bytes],
        metadata: Mapping[str, str],
        *,
        cancellation: Cancellation,
        progress: parts.HighWater,
        memory: UploadMemory | None = None,
    ) -> None:
        upload = Upload(self._requests, key, metadata, digest.size, memory=memory)
        try:
            self._lanes.run(partial(upload.begin, cancellation), cancellation)
            actual, sent = parts.send(
                digest.size,
                read,
                upload.send,
                lanes=self._lanes,
                cancellation=cancellation,
                progress=progress,
                pending=upload.pending,
            )
            if actual != digest.hex or read(digest.size, 1):
                raise FileChangedError(f"{digest} is not what was read: xxh128:{actual}")
            self._lanes.run(partial(upload.complete, sent, cancellation), cancellation)
        finally:
            upload.end(cancellation)


def _of_either_key(digest: Digest, read: Callable[[str], T]) -> T:
    """Read a blob at its key, or where old clients stored it."""
    try:
        return read(layout.blob_key(digest))
    except ObjectAbsentError as error:
        try:
            return read(layout.legacy_blob_key(digest))
        except ObjectAbsentError:
            raise BlobNotFoundError(
                error.message,
                hint="It was deleted, by a lifecycle rule perhaps:"
                " submit the job again, with --force-store-check.",
            ) from error
