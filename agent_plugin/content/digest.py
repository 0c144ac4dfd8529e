"""The identity of a blob: the xxh128 of its bytes, and how many there are.

xxh128 is XXH3 with 128 bits and seed 0, as lower-case hex in canonical (big-endian) order, because
Deadline Cloud's manifests need it. It finds damage; it does not resist an attacker who may write
to the store (docs/OPERATING.md, Security).
"""

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import xxhash

if TYPE_CHECKING:
    # At run time that module imports this one.
    from agent_plugin.content.store import Cancellation

HASH_ALGORITHM: Final = "xxh128"
EMPTY_HASH: Final = "99aa06d3014798d86001c324468d497f"
# xxhash's update() releases the GIL; below 64 KiB the switching costs more than it gives, above
# 1 MiB nothing is gained (docs/BENCHMARKS.md, Other measurements).
READ_BYTES: Final = 1024 * 1024

_HEX: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """What a blob is, wherever it is.

    Attributes:
        hex: 32 lower-case hexadecimal digits.
        size: Bytes, >= 0.

    Raises:
        ValueError: On creation, when the two can not be a digest.
    """

    hex: str
    size: int

    def __post_init__(self) -> None:
        if not _HEX.fullmatch(self.hex) or self.size < 0:
            raise ValueError(f"not a digest: {self.hex!r} ({self.size} bytes)")
        if (self.size == 0) != (self.hex == EMPTY_HASH):
            raise ValueError(f"{self.hex} can not be the hash of {self.size} bytes")

    @classmethod
    def of(cls, *parts: bytes) -> Self:
        """Return the digest of the parts' bytes, one after another."""
        hashing = xxhash.xxh3_128()
        for part in parts:
            hashing.update(part)
        return cls(hashing.hexdigest(), sum(len(part) for part in parts))

    def __str__(self) -> str:
        return f"{HASH_ALGORITHM}:{self.hex} ({self.size} bytes)"


def hash_name(name: str) -> str:
    """Return the 32 hex digits that name manifests: xxh128 of the UTF-8 bytes of `name`.

    Names from the operating system may hold lone surrogates; they become the bytes they stand for.
    """
    return xxhash.xxh3_128_hexdigest(os.fsencode(name))


def hash_of(data: "bytes | bytearray | memoryview") -> str:
    """Return the 32 hex digits of the xxh128 of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_fd(fd: int, *, offset: int = 0, cancellation: "Cancellation | None" = None) -> Digest:
    """Return the digest of a file from `offset` to its end, without moving its position.

    Args:
        fd: An open file.
        offset: Where to begin, in bytes.
        cancellation: Checked every READ_BYTES, or None.

    Raises:
        OSError: The file could not be read.
        CancelledError: Cancellation was wished.
    """
    hashing = xxhash.xxh3_128()
    position = offset
    while chunk := os.pread(fd, READ_BYTES, position):
        if cancellation is not None:
            cancellation.check()
        hashing.update(chunk)
        position += len(chunk)
    return Digest(hashing.hexdigest(), position - offset)
