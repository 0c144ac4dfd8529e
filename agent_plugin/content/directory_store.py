"""The content store in a directory: for one machine, or for a farm that shares a disk.

The layout is that of the store in S3 (layout.py). A file appears under its name whole and synced to
the disk, or not at all (directory_files.py). What S3 would keep as a document's metadata is in
`.<name>.metadata.json` beside it, written first.

After a power cut everything is there that came before a document which is there: the names of blobs
are synced when a document is put, and not for each blob, which would double the cost of small ones.

Everything below the store's directory may have been put there by somebody else, and is opened with
that in mind (directory_root.py). Blobs are hashed whenever they are read.

Concurrency: nothing is shared but the directory, where any number of threads, processes and hosts
may work at once; `link` and `rename` decide who was first.
"""

import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import quote

import xxhash

from agent_plugin.content import events, layout, parts
from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.digest import READ_BYTES, Digest
from agent_plugin.content.directory_files import STAGING, new_file, tidy_staging, write_file
from agent_plugin.content.directory_root import (
    DirectoryRoot,
    closing_fd,
    entries_of,
    open_file,
    read_exactly,
    refuse_odd,
    store_errors,
)
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    DocumentNotFoundError,
    FileChangedError,
    ManifestInvalidError,
    StoreProtocolError,
    UnsafePathError,
)
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.store import (
    Cancellation,
    Document,
    DocumentInfo,
    Hashed,
    Progress,
    UploadMemory,
    ignore_bytes,
    ignore_progress,
)

# A sidecar is small; more is not ours, and reading it would cost memory.
MAX_METADATA_BYTES: Final = 64 * 1024

_METADATA: Final = ".metadata.json"
_BLOBS: Final = layout.BLOB_PREFIX.rstrip("/")
_DOCUMENTS: Final = layout.DOCUMENT_PREFIX.rstrip("/")

log = events.get_logger()


class DirectoryStore:
    """A store in a directory; see the protocol `Store` for what the methods do.

    Every method raises, besides what the protocol says, UnsafePathError for a link or anything else
    than a regular file in a file's place, and those that write raise NoSpaceError.

    Args:
        root: The directory, absolute; made by the first write if only itself is missing, so that a
            reader's mistake leaves no trace. Links that lead to it are followed: it is the
            operator's choice.
        bandwidth: How much may move; as much as there is by default.

    Raises:
        StoreAccessError: It can not be opened, or is missing together with what should hold it.
    """

    def __init__(self, root: Path, *, bandwidth: Bandwidth | None = None) -> None:
        self._root = DirectoryRoot(root)
        self._bandwidth = bandwidth or Bandwidth()
        # The directories for unfinished files that this process has tidied; `add` is atomic.
        self._tidied: set[str] = set()

    @property
    def url(self) -> str:
        """`file:///directory`, percent-encoded."""
        return f"file://{quote(os.fsencode(self._root.path))}"

    @property
    def identity(self) -> str:
        """The URL."""
        return self.url

    def make(self) -> None:
        """Make the directory, as the first write does, if only itself is missing.

        Raises:
            StoreAccessError, NoSpaceError: It can not be made.
        """
        self._root.make()

    def see_that_it_is_there(self) -> None:
        """Refuse to go on without the directory, for who only reads.

        Raises:
            StoreAccessError, UnsafePathError: It can not be opened.
        """
        self._root.see_that_it_is_there()

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Look for each blob; the legacy key does not count."""
        with self._root.open(_BLOBS) as directory:
            if directory is None:
                return set(digests)
            return {digest for digest in digests if _size_of(directory, digest) != digest.size}

    def get(self, digest: Digest) -> bytes:
        """See Store.get."""
        self._bandwidth.download.take(digest.size)
        with self._blob(digest) as fd:
            data = read_exactly(fd, 0, digest.size)
        if (actual := Digest.of(data)) != digest:
            raise BlobCorruptError(f"{digest} is stored as {actual}")
        return data

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
        hashing = xxhash.xxh3_128()
        with self._blob(digest) as source:
            if digest.size:
                parts.reserve(fd, digest.size)
            for offset in range(0, digest.size, READ_BYTES):
                cancellation.pass_boundary()
                self._bandwidth.download.take(min(READ_BYTES, digest.size - offset), cancellation)
                data = read_exactly(source, offset, min(READ_BYTES, digest.size - offset))
                hashing.update(data)
                parts.write_all(fd, data, offset)
                hashed(memoryview(data), offset)
                progress(len(data))
        if hashing.hexdigest() != digest.hex:
            raise BlobCorruptError(f"{digest} is stored as xxh128:{hashing.hexdigest()}")

    def read_range(self, digest: Digest, offset: int, length: int) -> bytes:
        """See Store.read_range.

        Raises:
            BlobCorruptError: The file has another size than the digest.
        """
        length = min(length, digest.size - offset)
        if length <= 0:
            return b""
        self._bandwidth.download.take(length)
        with self._blob(digest) as fd:
            return read_exactly(fd, offset, length)

    def put(self, digest: Digest, data: bytes) -> bool:
        """See Store.put."""
        if (actual := Digest.of(data)) != digest:
            raise FileChangedError(f"{digest} is not what was read: {actual}")

        def write(target: int) -> None:
            self._bandwidth.upload.take(len(data))
            parts.write_all(target, data, 0)

        return self._put_blob(digest, write)

    def put_file(
        self,
        digest: Digest,
        fd: int,
        *,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        memory: UploadMemory | None = None,  # noqa: ARG002 - a file is written in one go
    ) -> bool:
        """See Store.put_file."""

        def write(target: int) -> None:
            hashing = xxhash.xxh3_128()
            offset = 0
            # One byte more than there should be, to see whether the file has grown.
            while data := parts.read_all(fd, offset, min(READ_BYTES, digest.size + 1 - offset)):
                cancellation.pass_boundary()
                self._bandwidth.upload.take(len(data), cancellation)
                hashing.update(data)
                parts.write_all(target, data, offset)
                offset += len(data)
                progress(len(data))
            if (offset, hashing.hexdigest()) != (digest.size, digest.hex):
                raise FileChangedError(
                    f"{digest} is not what was read: xxh128:{hashing.hexdigest()} ({offset} bytes)"
                )

        cancellation.check()
        return self._put_blob(digest, write)

    def abort_upload(self, digest: Digest, upload_id: str) -> None:
        """See Store.abort_upload; a directory has no uploads in parts."""

    def list_blobs(self) -> Iterator[Digest]:
        """See Store.list_blobs."""
        with self._root.open(_BLOBS) as directory, store_errors(f"{self._root.path}/{_BLOBS}"):
            entries = [] if directory is None else entries_of(directory)
        for name, status in entries:
            digest = layout.blob_at(name, status.st_size)
            if digest is not None and stat.S_ISREG(status.st_mode):
                yield digest

    def get_document(self, key: str, *, max_bytes: int) -> Document:
        """See Store.get_document."""
        place, name = _document_place(key)
        path = f"{self._root.path}/{place}/{name}"
        with self._root.open(place) as directory, store_errors(path):
            fd = None if directory is None else open_file(directory, name, path)
            if directory is None or fd is None:
                raise DocumentNotFoundError(
                    f"{path} does not exist",
                    hint="Check the job's manifest paths and the queue's root prefix.",
                )
            with closing_fd(fd):
                status = os.fstat(fd)
                if status.st_size > max_bytes:
                    raise ManifestInvalidError(
                        f"{path} has {status.st_size} bytes, more than {max_bytes}"
                    )
                self._bandwidth.download.take(status.st_size)
                data = read_exactly(fd, 0, status.st_size)
            metadata = _read_metadata(directory, name, path)
        return Document(DocumentInfo(key, len(data), status.st_mtime), data, metadata)

    def put_document(self, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        """See Store.put_document; the names of all blobs are synced before."""
        place, name = _document_place(key)
        sidecar = json.dumps(layout.checked_metadata(metadata), sort_keys=True).encode()
        staging = partial(self._staging, _DOCUMENTS)
        self._bandwidth.upload.take(len(data))
        self.make()
        self._sync_blob_names()
        with self._root.make_below(place) as directory, store_errors(f"{place}/{name}"):
            refuse_odd(directory, name, f"{self._root.path}/{place}/{name}")
            if metadata:
                write_file(directory, staging, _sidecar(name), partial(_write, sidecar))
            else:
                with suppress(FileNotFoundError):
                    os.unlink(_sidecar(name), dir_fd=directory)
            write_file(directory, staging, name, partial(_write, data))
            os.fsync(directory)

    def list_documents(self, prefix: str) -> Iterator[DocumentInfo]:
        """See Store.list_documents."""
        layout.document_prefix(prefix)
        yield from self._walk(prefix.rpartition("/")[0], prefix)

    def _walk(self, place: str, start: str) -> Iterator[DocumentInfo]:
        """Yield the documents below a directory; none stays open meanwhile."""
        path = f"{_DOCUMENTS}/{place}" if place else _DOCUMENTS
        with self._root.open(path) as directory, store_errors(f"{self._root.path}/{path}"):
            entries = [] if directory is None else entries_of(directory)
        base = f"{place}/" if place else ""
        # S3 sorts by whole keys, where a directory's name is followed by a slash.
        keyed = [
            (base + name + "/" * stat.S_ISDIR(status.st_mode), status)
            for name, status in entries
            if not _is_hidden(name)
        ]
        for key, status in sorted(keyed, key=lambda entry: entry[0]):
            if not key.startswith(start):
                continue
            if not layout.is_document_key(key.rstrip("/")):
                log.info(events.FILE_SKIPPED, extra={"key": key, "reason": "its name"})
            elif stat.S_ISDIR(status.st_mode):
                yield from self._walk(key.rstrip("/"), start)
            elif stat.S_ISREG(status.st_mode):
                yield DocumentInfo(key, status.st_size, status.st_mtime)
            else:
                log.info(events.FILE_SKIPPED, extra={"key": key, "reason": "no regular file"})

    def _put_blob(self, digest: Digest, write: Callable[[int], None]) -> bool:
        name = _blob_name(digest)
        path = f"{self._root.path}/{_BLOBS}/{name}"
        with self._root.make_below(_BLOBS) as directory, store_errors(path):
            if _size_of(directory, digest) == digest.size:
                return False
            with new_file(directory, partial(self._staging, _BLOBS)) as new:
                write(new.fd)
                if not new.publish(name):
                    if _size_of(directory, digest) == digest.size:
                        return False
                    # It was cut off.
                    new.replace(name)
        return True

    def _sync_blob_names(self) -> None:
        # Of blobs that other processes put as well: they were found, and so not put again.
        with self._root.open(_BLOBS) as directory, store_errors(f"{self._root.path}/{_BLOBS}"):
            if directory is not None:
                os.fsync(directory)

    @contextmanager
    def _staging(self, top: str) -> Iterator[int]:
        """Lend the directory for unfinished files of `Data` or `Manifests`."""
        with self._root.make_below(f"{top}/{STAGING}") as directory:
            if top not in self._tidied:
                tidy_staging(directory)
                self._tidied.add(top)
            yield directory

    @contextmanager
    def _blob(self, digest: Digest) -> Iterator[int]:
        """Lend a blob's file, which has the right size."""
        path = f"{self._root.path}/{layout.blob_key(digest)}"
        with self._root.open(_BLOBS) as directory:
            fd = None
            with store_errors(path):
                for key in (layout.blob_key(digest), layout.legacy_blob_key(digest)):
                    if directory is not None and fd is None:
                        name = key.removeprefix(layout.BLOB_PREFIX)
                        fd = open_file(directory, name, f"{self._root.path}/{key}")
            if fd is None:
                raise BlobNotFoundError(
                    f"{path} does not exist",
                    hint="It was deleted: submit again with --force-store-check.",
                )
            with closing_fd(fd):
                if (size := os.fstat(fd).st_size) != digest.size:
                    raise BlobCorruptError(f"{digest} is stored as {size} bytes")
                yield fd


def _blob_name(digest: Digest) -> str:
    return layout.blob_key(digest).removeprefix(layout.BLOB_PREFIX)


def _document_place(key: str) -> tuple[str, str]:
    place, _, name = layout.document_key(key).rpartition("/")
    if _is_hidden(name) or any(map(is_partial, place.split("/"))):
        raise UnsafePathError(
            f"{key[:200]!r} can not be a manifest's key: such files are the store's own"
        )
    return place, name


def _sidecar(name: str) -> str:
    return f".{name}{_METADATA}"


def _is_hidden(name: str) -> bool:
    return is_partial(name) or (name.startswith(".") and name.endswith(_METADATA))


def _size_of(directory: int, digest: Digest) -> int | None:
    name = _blob_name(digest)
    with store_errors(name):
        return refuse_odd(directory, name, f"{_BLOBS}/{name}")


def _read_metadata(directory: int, name: str, path: str) -> dict[str, str]:
    fd = open_file(directory, _sidecar(name), path)
    if fd is None:
        return {}
    with closing_fd(fd):
        text = read_exactly(fd, 0, min(os.fstat(fd).st_size, MAX_METADATA_BYTES))
    try:
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError("it is no object")  # noqa: TRY004, TRY301 - joins the other reasons
        return layout.checked_metadata({name: str(value) for name, value in metadata.items()})
    except ValueError as error:
        raise StoreProtocolError(
            f"the metadata of {path} can not be read: {error}", hint="Store the manifest again."
        ) from error


def _write(data: bytes, fd: int) -> None:
    parts.write_all(fd, data, 0)
