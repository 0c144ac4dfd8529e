"""The content store in a directory: for one machine, or for a farm that shares a disk.

The layout is that of the store in S3 (layout.py). A file appears under its name whole and synced to
the disk, or not at all (directory_files.py). What S3 would keep as a document's metadata is in
`.<name>.metadata.json` beside it, written first.

After a power cut everything is there that came before a document which is there: the names of blobs
are synced when a document is put, and not for each blob, which would double the cost of small ones.

Everything below the store's directory may have been put there by somebody else. Directories are
opened one by one and links are not followed; what is not a regular file is refused. Blobs are
hashed whenever they are read.

Concurrency: nothing is shared but the directory, where any number of threads, processes and hosts
may work at once; `link` and `rename` decide who was first.
"""

import errno
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
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    DocumentNotFoundError,
    FileChangedError,
    ManifestInvalidError,
    NoSpaceError,
    PropmasterError,
    StoreAccessError,
    StoreProtocolError,
    StoreUnavailableError,
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

_ROOT: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PARENT: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY: Final = _ROOT | os.O_NOFOLLOW
# O_NONBLOCK: opening a fifo that took a file's place would wait for its writer.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# A farm shares the directory; the umask says with whom.
_DIRECTORY_MODE: Final = 0o755
_METADATA: Final = ".metadata.json"
_BLOBS: Final = layout.BLOB_PREFIX.rstrip("/")
_DOCUMENTS: Final = layout.DOCUMENT_PREFIX.rstrip("/")
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ODD: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG})

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
        self._root = root
        self._bandwidth = bandwidth or Bandwidth()
        # The directories for unfinished files that this process has tidied; `add` is atomic.
        self._tidied: set[str] = set()
        # Once it was there it is never made again: its disk may have gone meanwhile.
        self._may_be_made = not os.path.lexists(root)
        with _store_errors(str(root)):
            # Who may write into what holds it need not be allowed to read that.
            os.close(os.open(root.parent, _PARENT) if self._may_be_made else self._open_root())

    @property
    def url(self) -> str:
        """`file:///directory`, percent-encoded."""
        return f"file://{quote(os.fsencode(self._root))}"

    @property
    def identity(self) -> str:
        """The URL."""
        return self.url

    def make(self) -> None:
        """Make the directory, as the first write does, if only itself is missing.

        Raises:
            StoreAccessError, NoSpaceError: It can not be made.
        """
        with _store_errors(str(self._root)), suppress(FileExistsError):
            if self._may_be_made:
                self._root.mkdir(_DIRECTORY_MODE)
                _sync_names(self._root.parent)
        self._may_be_made = False

    def see_that_it_is_there(self) -> None:
        """Refuse to go on without the directory, for who only reads.

        Raises:
            StoreAccessError, UnsafePathError: It can not be opened.
        """
        os.close(self._open_root())

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Look for each blob; the legacy key does not count."""
        with self._directory(_BLOBS) as directory:
            if directory is None:
                return set(digests)
            return {digest for digest in digests if _size_of(directory, digest) != digest.size}

    def get(self, digest: Digest) -> bytes:
        """See Store.get."""
        self._bandwidth.download.take(digest.size)
        with self._blob(digest) as fd:
            data = _read(fd, 0, digest.size)
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
                data = _read(source, offset, min(READ_BYTES, digest.size - offset))
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
            return _read(fd, offset, length)

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
        with self._directory(_BLOBS) as directory, _store_errors(f"{self._root}/{_BLOBS}"):
            entries = [] if directory is None else _entries(directory)
        for name, status in entries:
            digest = layout.blob_at(name, status.st_size)
            if digest is not None and stat.S_ISREG(status.st_mode):
                yield digest

    def get_document(self, key: str, *, max_bytes: int) -> Document:
        """See Store.get_document."""
        place, name = _document_place(key)
        path = f"{self._root}/{place}/{name}"
        with self._directory(place) as directory, _store_errors(path):
            fd = None if directory is None else _open_file(directory, name, path)
            if directory is None or fd is None:
                raise DocumentNotFoundError(
                    f"{path} does not exist",
                    hint="Check the job's manifest paths and the queue's root prefix.",
                )
            with _closing(fd):
                status = os.fstat(fd)
                if status.st_size > max_bytes:
                    raise ManifestInvalidError(
                        f"{path} has {status.st_size} bytes, more than {max_bytes}"
                    )
                self._bandwidth.download.take(status.st_size)
                data = _read(fd, 0, status.st_size)
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
        with self._made_directory(place) as directory, _store_errors(f"{place}/{name}"):
            _refuse_odd(directory, name, f"{self._root}/{place}/{name}")
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
        with self._directory(path) as directory, _store_errors(f"{self._root}/{path}"):
            entries = [] if directory is None else _entries(directory)
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
        path = f"{self._root}/{_BLOBS}/{name}"
        with self._made_directory(_BLOBS) as directory, _store_errors(path):
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
        with self._directory(_BLOBS) as directory, _store_errors(f"{self._root}/{_BLOBS}"):
            if directory is not None:
                os.fsync(directory)

    @contextmanager
    def _staging(self, top: str) -> Iterator[int]:
        """Lend the directory for unfinished files of `Data` or `Manifests`."""
        with self._made_directory(f"{top}/{STAGING}") as directory:
            if top not in self._tidied:
                tidy_staging(directory)
                self._tidied.add(top)
            yield directory

    @contextmanager
    def _blob(self, digest: Digest) -> Iterator[int]:
        """Lend a blob's file, which has the right size."""
        path = f"{self._root}/{layout.blob_key(digest)}"
        with self._directory(_BLOBS) as directory:
            fd = None
            with _store_errors(path):
                for key in (layout.blob_key(digest), layout.legacy_blob_key(digest)):
                    if directory is not None and fd is None:
                        name = key.removeprefix(layout.BLOB_PREFIX)
                        fd = _open_file(directory, name, f"{self._root}/{key}")
            if fd is None:
                raise BlobNotFoundError(
                    f"{path} does not exist",
                    hint="It was deleted: submit again with --force-store-check.",
                )
            with _closing(fd):
                if (size := os.fstat(fd).st_size) != digest.size:
                    raise BlobCorruptError(f"{digest} is stored as {size} bytes")
                yield fd

    @contextmanager
    def _directory(self, place: str) -> Iterator[int | None]:
        """Lend a directory below the root, or None if there is none."""
        with _store_errors(f"{self._root}/{place}"):
            fd: int | None = self._open_root()
            for name in place.split("/"):
                parent = fd
                assert parent is not None  # noqa: S101 - the loop ends when it is
                with _closing(parent):
                    fd = _open_directory(parent, name)
                if fd is None:
                    break
        if fd is None:
            yield None
            return
        with _closing(fd):
            yield fd

    @contextmanager
    def _made_directory(self, place: str) -> Iterator[int]:
        """Lend a directory below the root, making what is missing."""
        with _store_errors(f"{self._root}/{place}"):
            self.make()
            fd = self._open_root()
            for name in place.split("/"):
                with _closing(fd):
                    fd = _make_directory(fd, name)
        with _closing(fd):
            yield fd

    def _open_root(self) -> int:
        with _store_errors(str(self._root)):
            return os.open(self._root, _ROOT)


def _sync_names(directory: Path) -> None:
    # Who may write there need not be allowed to read it, which this takes.
    with suppress(PermissionError), _closing(os.open(directory, _ROOT)) as fd:
        os.fsync(fd)


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


def _entries(directory: int) -> list[tuple[str, os.stat_result]]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            # It may have been removed since.
            with suppress(FileNotFoundError):
                found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def _size_of(directory: int, digest: Digest) -> int | None:
    name = _blob_name(digest)
    with _store_errors(name):
        return _refuse_odd(directory, name, f"{_BLOBS}/{name}")


def _refuse_odd(directory: int, name: str, path: str) -> int | None:
    """Return the size of the file of that name, None if there is nothing."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePathError(f"{path} is not a regular file", hint="Remove it.")
    return status.st_size


def _open_file(directory: int, name: str, path: str) -> int | None:
    try:
        fd = os.open(name, _READ, dir_fd=directory)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnsafePathError(f"{path} is not a regular file", hint="Remove it.")
    return fd


def _open_directory(parent: int, name: str) -> int | None:
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return None


def _make_directory(parent: int, name: str) -> int:
    fd = _open_directory(parent, name)
    if fd is not None:
        return fd
    with suppress(FileExistsError):
        os.mkdir(name, _DIRECTORY_MODE, dir_fd=parent)
    # Also if somebody else made it just now, who may not have come to this yet.
    os.fsync(parent)
    return os.open(name, _DIRECTORY, dir_fd=parent)


def _read(fd: int, offset: int, length: int) -> bytes:
    with _store_errors("a file of the store"):
        data = os.pread(fd, length, offset)
        while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
            data += more
    if len(data) < length:
        raise BlobCorruptError(f"a file of the store ended at {offset + len(data)} bytes")
    return data


def _read_metadata(directory: int, name: str, path: str) -> dict[str, str]:
    fd = _open_file(directory, _sidecar(name), path)
    if fd is None:
        return {}
    with _closing(fd):
        text = _read(fd, 0, min(os.fstat(fd).st_size, MAX_METADATA_BYTES))
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


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _store_errors(path: str) -> Iterator[None]:
    """Raise errors of ours for the operating system's."""
    try:
        yield
    except OSError as error:
        raise _error_of(error, path) from error


def _error_of(error: OSError, path: str) -> PropmasterError:
    reason = f"{path}: {error.strerror}"
    if error.errno in _FULL:
        return NoSpaceError(reason, hint="Free space in the store's file system.")
    if error.errno == errno.ENOENT:
        return StoreAccessError(reason, hint="Mount the disk that has it, or correct the URL.")
    if error.errno in _FORBIDDEN:
        return StoreAccessError(reason, hint="Check who may use the store's directory.")
    if error.errno in _ODD:
        return UnsafePathError(
            f"{path} has a link, or something else than a directory, on its way: {error.strerror}",
            hint="Remove it.",
        )
    return StoreUnavailableError(reason, hint="Check the file system of the store.")
