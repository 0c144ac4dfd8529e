"""One large blob moved in parts, several at a time, hashed in order while they pass.

Parts are submitted in order and waited for in order, so what was received but not yet hashed never
exceeds the window, however unevenly the parts arrive. Whoever stops early leaves the threads of the
other parts behind (flight.py). One of them may be in the middle of a write, which a busy disk can
hold up for long: the file is not given back before that is over, because what is written into it
next, and verified, would be changed by it. Only a wish to stop does not wait, and the file is then
nobody's: the threads write through a descriptor of their own, closed by the last of them, so that
they never touch a file that got the caller's descriptor number meanwhile.
"""

import errno
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeAlias, TypeVar

import xxhash

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobCorruptError,
    CancelledError,
    FileChangedError,
    LocalReadError,
)
from agent_plugin.content.flight import POLL_SECONDS, Lanes
from agent_plugin.content.store import Cancellation, Hashed, Progress, ignore_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")
# Puts bytes at a position of a file.
Write: TypeAlias = "Callable[[Buffer, int], None]"
# Parts under way in order, each with a position.
Pending: TypeAlias = deque[tuple[int, Future[T]]]

PART_BYTES: Final = 8 * 1024 * 1024
# How much is hashed at a time; larger pieces keep a disk busier that they are written on to.
PIECE_BYTES: Final = 4 * 1024 * 1024
# Larger parts save requests where there are many; S3 takes 10,000 parts of 5 MiB to 5 GiB:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
LARGE_PART_BYTES: Final = 16 * 1024 * 1024
LARGE_PARTS_FROM_BYTES: Final = 1024 * 1024 * 1024
MAX_PARTS: Final = 10_000
# Six parts of 8 MiB fill a line of 1 GB/s at 50 ms; what is in memory stays below 64 MiB.
WINDOW_PARTS: Final = 6
WINDOW_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Part:
    """What a store says of the object that a part was read of.

    Attributes:
        version: Changes when the object is replaced; empty if the store does not say.
        blob_size: Bytes of the whole object.
    """

    version: str
    blob_size: int


class HighWater:
    """Progress that tells each byte once, also if a blob is moved again from its start."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told = 0

    def reached(self, position: int) -> None:
        """Tell what was not told yet of the first `position` bytes."""
        if position > self._told:
            self._progress(position - self._told)
            self._told = position


def receive(
    digest: Digest,
    fd: int,
    read_part: Callable[[int, int, Cancellation, Write], Part],
    *,
    lanes: Lanes,
    cancellation: Cancellation,
    progress: HighWater,
    hashed: Hashed = ignore_bytes,
) -> None:
    """Read a blob's parts into a file and verify the whole.

    Nobody writes to the file any more when this has returned or raised, unless it raised
    CancelledError: then a write may still be under way, and the file must not be used.

    Args:
        digest: The blob, of more than 0 bytes.
        fd: The file, at least as long as the blob or growing as it is written.
        read_part: Given offset, length, a cancellation and where to write, writes exactly that
            part, in pieces that it need not keep; retries.
        lanes: Where the parts are read.
        cancellation: Checked while parts, and the ends of late writes, are awaited; in a pause no
            further part is read.
        progress: Told when a part is written and hashed.
        hashed: Given what is hashed, PIECE_BYTES of page-aligned memory at a time.

    Raises:
        BlobCorruptError: The bytes are something else, or the object was replaced meanwhile.
        CancelledError: Cancellation was wished.
        OSError: The file could not be written.
    """
    hashing = xxhash.xxh3_128()
    version = None
    # Mapped, and so aligned: whoever writes it on can do so by direct I/O.
    buffer = memoryview(mmap.mmap(-1, PIECE_BYTES))
    # The other parts are stopped before the end of what they write is awaited.
    with SharedFile(fd, cancellation) as file, stopping(cancellation) as stop:

        def move(offset: int) -> Part:
            return read_part(offset, min(PART_BYTES, digest.size - offset), stop, file.write)

        tasks = ((offset, partial(move, offset)) for offset in range(0, digest.size, PART_BYTES))
        for offset, part in in_order(tasks, lanes, cancellation, WINDOW_PARTS, deque()):
            if part.blob_size != digest.size:
                raise BlobCorruptError(f"{digest} is stored as {part.blob_size} bytes")
            if version not in (None, part.version):
                raise BlobCorruptError(f"{digest} was replaced in the store while it was read")
            version = part.version
            end = min(offset + PART_BYTES, digest.size)
            for piece, position in _read_back(fd, offset, end, buffer):
                hashing.update(piece)
                hashed(piece, position)
            progress.reached(end)
    if hashing.hexdigest() != digest.hex:
        raise BlobCorruptError(f"{digest} is stored as xxh128:{hashing.hexdigest()}")


def send(
    size: int,
    read: Callable[[int, int], bytes],
    send_part: Callable[[int, bytes, Cancellation], T],
    *,
    lanes: Lanes,
    cancellation: Cancellation,
    progress: HighWater,
    pending: "Pending[T]",
) -> tuple[str, list[T]]:
    """Send bytes in parts and hash exactly what was sent.

    Args:
        size: Bytes in all, > 0.
        read: Given offset and length, returns at most that many bytes.
        send_part: Given the part's number (from 1), its bytes and a cancellation; retries.
        lanes: Where the parts are sent.
        cancellation: Checked while parts are awaited; in a pause no further part is sent.
        progress: Told when a part was sent.
        pending: Empty; holds the parts under way, also after an error.

    Returns:
        The hash of the bytes in hex, and what send_part returned, in order.

    Raises:
        FileChangedError: There were fewer bytes.
        CancelledError: Cancellation was wished.
    """
    hashing = xxhash.xxh3_128()
    part_bytes = part_size(size)
    sent: list[T] = []
    with stopping(cancellation) as stop:

        def tasks() -> Iterator[tuple[int, Callable[[], T]]]:
            for number, offset in enumerate(range(0, size, part_bytes), start=1):
                length = min(part_bytes, size - offset)
                data = read(offset, length)
                if len(data) != length:
                    raise FileChangedError(
                        f"{offset + len(data)} bytes were there to be read instead of {size}"
                    )
                hashing.update(data)
                yield offset + length, partial(send_part, number, data, stop)

        window = max(2, min(WINDOW_PARTS, WINDOW_BYTES // part_bytes))
        for end, result in in_order(tasks(), lanes, cancellation, window, pending):
            sent.append(result)
            progress.reached(end)
    return hashing.hexdigest(), sent


def _read_back(
    fd: int, start: int, end: int, buffer: memoryview
) -> Iterator[tuple[memoryview, int]]:
    """Yield pieces of a file that were written a moment ago, each in the buffer, and where.

    Keeping what arrived until it is its turn would take fresh memory for each part: the kernel
    took twice as long for that as for reading it back.
    """
    while start < end:
        count = os.preadv(fd, [buffer[: min(len(buffer), end - start)]], start)
        if count == 0:
            raise LocalReadError(f"a file ends at {start}, before what was written to it")
        yield buffer[:count], start
        start += count


def part_size(size: int) -> int:
    """Return in which pieces to send so many bytes: whole MiB, MAX_PARTS pieces at most."""
    if size < LARGE_PARTS_FROM_BYTES:
        return PART_BYTES
    mebibyte = 1024 * 1024
    return max(LARGE_PART_BYTES, -(-size // (MAX_PARTS * mebibyte)) * mebibyte)


def write_all(fd: int, data: "Buffer", offset: int) -> None:
    """Write all of `data` at a position.

    Raises:
        OSError: It could not be written; ENOSPC among others.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_all(fd: int, offset: int, length: int) -> bytes:
    """Return bytes from a position; fewer than `length` only at the end of the file.

    Raises:
        LocalReadError: They could not be read.
    """
    try:
        data = os.pread(fd, length, offset)
        # A network file system may give less than there is.
        while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
            data += more
    except OSError as error:
        raise LocalReadError(f"a file can not be read at {offset}: {error.strerror}") from error
    return data


def size_of(fd: int) -> int:
    """Return how many bytes a file has now."""
    return os.fstat(fd).st_size


def reserve(fd: int, size: int) -> None:
    """Make a file `size` bytes long and claim the space, so that a full disk shows at once.

    Raises:
        OSError: ENOSPC, EDQUOT, EFBIG among others.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def in_order(
    tasks: Iterator[tuple[int, Callable[[], T]]],
    lanes: Lanes,
    cancellation: Cancellation,
    window: int,
    pending: "Pending[T]",
) -> Iterator[tuple[int, T]]:
    """Yield what the tasks return, each with its position, in their order.

    Args:
        tasks: Each with a position; taken when there is room in the window.
        lanes: Where they are carried out.
        cancellation: Checked while results are awaited; in a pause no further task is taken.
        window: How many are under way at once.
        pending: Empty; holds those under way, also after an error.

    Raises:
        CancelledError: Cancellation was wished.
    """
    while True:
        if cancellation.paused:
            # What is under way comes to its end, and counts.
            while pending:
                yield _first_of(pending, lanes, cancellation)
        cancellation.pass_boundary()
        following = next(tasks, None)
        if following is None:
            break
        position, task = following
        pending.append((position, lanes.submit(task)))
        cancellation.check()
        if len(pending) >= window:
            yield _first_of(pending, lanes, cancellation)
    while pending:
        cancellation.check()
        yield _first_of(pending, lanes, cancellation)


def _first_of(pending: "Pending[T]", lanes: Lanes, cancellation: Cancellation) -> tuple[int, T]:
    position, future = pending[0]
    result = lanes.result(future, cancellation)
    pending.popleft()
    return position, result


@contextmanager
def stopping(cancellation: Cancellation) -> Iterator[Cancellation]:
    """Lend a cancellation that is wished when the context is left, and pauses with another."""
    stop = Cancellation(pauses_with=cancellation)
    try:
        yield stop
    finally:
        stop.cancel()


class SharedFile:
    """A file written by threads that may be slower than whoever lent it.

    Leaving it waits until no write is under way.

    Args:
        fd: The file; a copy of the descriptor is kept until the last write has ended.
        cancellation: Ends the wait with CancelledError, and the file is abandoned.
    """

    def __init__(self, fd: int, cancellation: Cancellation) -> None:
        self._fd = os.dup(fd)
        self._cancellation = cancellation
        self._changed = threading.Condition()
        self._writers = 0
        self._left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._left = True
            self._close_if_unused()
            while self._writers:
                self._cancellation.check()
                self._changed.wait(POLL_SECONDS)

    def write(self, data: "Buffer", offset: int) -> None:
        """Write all of `data` at a position.

        Raises:
            CancelledError: The file was left.
            OSError: It could not be written.
        """
        with self._changed:
            if self._left:
                raise CancelledError("the transfer has ended")
            self._writers += 1
        try:
            write_all(self._fd, data, offset)
        finally:
            with self._changed:
                self._writers -= 1
                self._close_if_unused()
                self._changed.notify_all()

    def _close_if_unused(self) -> None:
        if self._left and self._writers == 0:
            os.close(self._fd)
