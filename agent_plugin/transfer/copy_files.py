"""The bytes of one file of this host, copied to another in pieces.

Each piece is about as large as the disks move in a fifth of a second, so that a wish to stop is
heeded soon after it, and counts when it is there. The kernel copies, or shares blocks, where the
file systems let it.
"""

import errno
import os
import time
from collections.abc import Callable
from typing import Final

from agent_plugin.content import parts
from agent_plugin.content.bandwidth import Allowance
from agent_plugin.content.store import Cancellation

FIRST_BYTES: Final = 8 * 1024 * 1024
LEAST_BYTES: Final = 64 * 1024
# On quick disks larger ones gain nothing any more.
MOST_BYTES: Final = 64 * 1024 * 1024
# By process memory, where the kernel does not copy.
_READ_BYTES: Final = 8 * 1024 * 1024
# A piece that took longer is followed by a smaller one, one that took a quarter of it by a larger.
PIECE_SECONDS: Final = 0.2
_NOT_BY_KERNEL: Final = frozenset(
    {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ETXTBSY}
)


def copy_bytes(
    source: int,
    target: int,
    start: int,
    size: int,
    *,
    halt: Cancellation,
    limit: Allowance,
    rate: int,
    copied: Callable[[int, int], None],
) -> int:
    """Copy bytes from one position to the same of another file; return where it ended.

    Args:
        source: An open file.
        target: Likewise, for writing.
        start: The position of the first byte.
        size: Of the source; it ends there, or where the source does by now.
        halt: Checked before each piece; in its pause no further piece is copied.
        limit: How much may be copied.
        rate: The bytes a second that `limit` allows; 0 for as many as there are.
        copied: Told of each piece how long it is, and where it ends.

    Raises:
        CancelledError: The halt was wished; what was told is there.
        LocalReadError: The source can not be read.
        OSError: One of them can not be read or written.
    """
    by_kernel = True
    # So that each is there, and counts, soon after it was granted.
    most = max(LEAST_BYTES, min(MOST_BYTES, int(rate * PIECE_SECONDS))) if rate else MOST_BYTES
    length = min(FIRST_BYTES, most)
    while start < size:
        halt.pass_boundary()
        length = min(length, size - start)
        limit.take(length, halt)
        begun = time.monotonic()
        count, by_kernel = _copy_piece(source, target, start, length, by_kernel=by_kernel)
        if count == 0:
            break
        start += count
        copied(count, start)
        took = time.monotonic() - begun
        if took > PIECE_SECONDS:
            length = max(LEAST_BYTES, count // 2)
        elif took < PIECE_SECONDS / 4:
            length = min(most, 2 * count)
    return start


def _copy_piece(
    source: int, target: int, offset: int, length: int, *, by_kernel: bool
) -> tuple[int, bool]:
    """Return how many bytes were copied, and whether the kernel did it."""
    if by_kernel:
        try:
            return os.copy_file_range(source, target, length, offset, offset), True
        except OSError as error:
            if error.errno not in _NOT_BY_KERNEL:
                raise
    data = parts.read_all(source, offset, min(length, _READ_BYTES))
    parts.write_all(target, data, offset)
    return len(data), False
