"""A blob that is open, and how it is read."""

import errno
import os
import time
from concurrent.futures import Future


class OpenBlob:
    """A blob's descriptor, closed when the last reader has let go of it.

    Attributes:
        is_verified: Its bytes have been hashed, and are right.
        verifying: What hashes it beside the reading, if that is so.
        kept_at: When that began, monotonic seconds.
        was_read: Somebody has read of it before it was verified.
        is_spooled: Only this mount has it, in a file without a name.
        is_wrong: It was found to be damaged; what was read before one has seen that is none.
    """

    __slots__ = (
        *("fd", "is_spooled", "is_verified"),
        *("is_wrong", "kept_at", "verifying", "was_read"),
    )

    def __init__(self, fd: int, *, is_verified: bool = True, is_spooled: bool = False) -> None:
        self.fd = fd
        self.is_verified = is_verified
        self.is_spooled = is_spooled
        self.verifying: Future[None] | None = None
        self.kept_at = time.monotonic()
        self.was_read = self.is_wrong = False

    def part_now(self, offset: int, buffer: memoryview) -> int:
        """Read what is in the page cache; return the number of bytes, or -1 if they are wrong.

        Raises:
            OSError: EAGAIN: nothing of it is there. Any other: the disk does not give it.
        """
        self._note_reading()
        count = in_memory(self.fd, buffer, offset)
        return -1 if self.is_wrong else count

    def part(self, offset: int, length: int) -> bytes | None:
        """Return a part, shorter at the end of the blob; None if it is wrong.

        Raises:
            OSError: The disk does not give it.
        """
        self._note_reading()
        data = os.pread(self.fd, length, offset)
        # The kernel keeps what it is given as the mount's pages; as the blob's they would take the
        # memory twice, and making room for them costs as much time as the disk does.
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)
        return None if self.is_wrong else data

    def _note_reading(self) -> None:
        if not self.is_verified:
            # Noted before and looked at after: one of both sees what the other does.
            self.was_read = True

    def __del__(self) -> None:
        os.close(self.fd)


def in_memory(fd: int, buffer: memoryview, offset: int) -> int:
    """Read what is in the page cache; fewer bytes, or EAGAIN, if that is not all."""
    try:
        return os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # A file system that can not tell, such as an old overlayfs.
        return os.preadv(fd, [buffer], offset)
