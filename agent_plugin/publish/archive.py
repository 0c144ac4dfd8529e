"""A task's outputs as one archive: a tar whose bytes follow from the outputs alone, compressed.

Files come in the order of their paths; owner and group are 0 without a name, the mode is 0644, and
directories have no entries of their own. So the same outputs make the same archive on any host, as
long as the compression library is the same. What is read of a file is hashed as it passes: an
archive that holds anything else than the outputs is never finished.

Nothing here holds more than a piece of a file.
"""

import base64
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import xxhash

from agent_plugin.content.errors import FileChangedError, LocalReadError
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.outputs import Output

PIECE_BYTES: Final = 1024 * 1024
# What is measured is kept up to here, so that a small archive is made once.
KEPT_BYTES: Final = 32 * 1024 * 1024
FILE_MODE: Final = 0o644
# zlib's own middle way, and what it calls a gzip stream; its header has no name and the time 0.
GZIP_LEVEL: Final = 6
_GZIP_WINDOW: Final = 31
# Zstandard's default: twice as small as its fastest, at several hundred MB/s.
ZSTD_LEVEL: Final = 3

CONTENT_TYPES: Final = {"gzip": "application/gzip", "zstd": "application/zstd"}


class Compressor(Protocol):
    """A stream that is compressed piece by piece."""

    def compress(self, data: bytes, /) -> bytes:
        """Return what is ready."""

    def flush(self) -> bytes:
        """Return the rest."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What an archive is, before anybody has it.

    Attributes:
        size: Bytes.
        sha256: Of all of it, 64 hex digits.
        data: The archive itself if it is small, else None.
    """

    size: int
    sha256: str
    data: bytes | None

    @property
    def checksum(self) -> str:
        """The SHA-256 in base64, as S3 spells it."""
        return base64.b64encode(bytes.fromhex(self.sha256)).decode("ascii")


def archive(
    outputs: Iterable[Output],
    encoding: str,
    *,
    zero_mtime: bool,
    cancellation: Cancellation,
) -> Iterator[bytes]:
    """Yield the bytes of an archive, in pieces of any length.

    Args:
        outputs: In the order in which they are to be.
        encoding: `gzip` or `zstd`.
        zero_mtime: Whether files have the time 0 instead of their own, which is in whole seconds.
        cancellation: Checked before each piece.

    Raises:
        FileChangedError: A file is not what it was when it was stored.
        LocalReadError: A file can not be read.
        CancelledError: Cancellation was wished.
    """
    compressor = _compressor(encoding)
    for piece in _tar(outputs, zero_mtime=zero_mtime):
        cancellation.check()
        if data := compressor.compress(piece):
            yield data
    yield compressor.flush()


def measure(pieces: Iterable[bytes]) -> Measured:
    """Return what an archive is whose bytes these are; what is large is not kept."""
    hashing = hashlib.sha256()
    kept: list[bytes] = []
    size = 0
    for piece in pieces:
        hashing.update(piece)
        size += len(piece)
        if size <= KEPT_BYTES:
            kept.append(piece)
        else:
            kept.clear()
    return Measured(size, hashing.hexdigest(), b"".join(kept) if size <= KEPT_BYTES else None)


class InOrder:
    """Bytes for somebody who asks for them part by part, from the first to the last.

    Args:
        pieces: The bytes, in pieces of any length.
        size: How many there are.
        sha256: What they are, 64 hex digits; empty if whoever makes the pieces sees to it.
    """

    def __init__(self, pieces: Iterator[bytes], size: int, sha256: str = "") -> None:
        self._pieces = pieces
        self._size = size
        self._sha256 = sha256
        self._hashing = hashlib.sha256()
        self._left = bytearray()

    def read(self, offset: int, length: int) -> bytes:
        """Return the next bytes; of the last ones only if all were what they should be.

        Raises:
            FileChangedError: They are not, or are more or fewer.
            PropmasterError: As the pieces do.
        """
        is_last = offset + length >= self._size
        # Beyond the end, to see that it is one.
        wanted = length + 1 if is_last else length
        while len(self._left) < wanted and (piece := next(self._pieces, None)) is not None:
            if self._sha256:
                self._hashing.update(piece)
            self._left += piece
        if len(self._left) != length if is_last else len(self._left) < length:
            raise _changed()
        if is_last and self._sha256 and self._hashing.hexdigest() != self._sha256:
            raise _changed()
        data = bytes(self._left[:length])
        del self._left[:length]
        return data


def _changed() -> FileChangedError:
    return FileChangedError(
        "an output changed while it was published",
        hint="the task must have ended, and closed its files, before finish-task",
    )


def _tar(outputs: Iterable[Output], *, zero_mtime: bool) -> Iterator[bytes]:
    written = 0
    for output in outputs:
        member = tarfile.TarInfo(output.path)
        member.size = output.entry.size
        member.mode = FILE_MODE
        member.mtime = 0 if zero_mtime else output.entry.mtime // 1_000_000
        header = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        yield header
        yield from read_verified(output)
        padding = -member.size % tarfile.BLOCKSIZE
        if padding:
            yield bytes(padding)
        written += len(header) + member.size + padding
    # Two empty blocks end it, and it ends with a whole record.
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(written + end) % tarfile.RECORDSIZE)


def read_verified(output: Output) -> Iterator[bytes]:
    """Yield the bytes of a file, which are those that were stored, or the last piece is refused.

    Raises:
        FileChangedError: It is not what it was when it was stored.
        LocalReadError: It can not be read.
    """
    hashing = xxhash.xxh3_128()
    left = output.entry.size
    fd = output.open()
    try:
        while left and (data := _read(fd, min(PIECE_BYTES, left), output)):
            hashing.update(data)
            left -= len(data)
            if not left and hashing.hexdigest() != output.entry.hash:
                raise output.changed()
            yield data
        if left or _read(fd, 1, output):
            raise output.changed()
    finally:
        os.close(fd)


def _read(fd: int, length: int, output: Output) -> bytes:
    try:
        return os.read(fd, length)
    except OSError as error:
        raise LocalReadError(f"{output.shown}: {error.strerror}") from error


def _compressor(encoding: str) -> Compressor:
    if encoding == "gzip":
        return zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    # Loaded here: only those who wish for it need it.
    import zstandard  # noqa: PLC0415

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj()
