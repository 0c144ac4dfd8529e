"""Who fetches a blob now: one of all the threads and processes of this host, the others wait.

A claim is an open-file-description lock on one byte of the file `locks`, at an offset made from
namespace and hash. The kernel drops it when its process dies, however it dies. Such locks do not
conflict within one open file, so threads exclude each other by a set. A claim only saves work:
when it can not be had, fetching anyway is right, only dearer. Source: fcntl_locking(2).

A file system without such locks (some network file systems) leaves exclusion within the process.
The lock lives as long as any copy of the open file: do not fork without exec while claims are held.
"""

import errno
import fcntl
import os
import struct
import threading
from types import TracebackType
from typing import Final, Self

from agent_plugin.content.digest import Digest

# struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for these locks).
_FLOCK: Final = struct.Struct("@hhqqi4x")
_HELD_ELSEWHERE: Final = frozenset({errno.EAGAIN, errno.EACCES})
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


class Claim:
    """The right to fetch a blob; given up by `release`, at the end of a `with`, or by dying."""

    def __init__(self, claims: "Claims", offset: int) -> None:
        self._claims = claims
        self._offset = offset

    def release(self) -> None:
        """Give the claim up; a second time does nothing."""
        self._claims.release(self._offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Claims:
    """The claims of this process on the blobs of one namespace; for use from any thread.

    Args:
        fd: The file `locks`, open for writing; closed by `close`.
        namespace_key: Any number that tells namespaces apart, 0 <= n < 2**60.
    """

    def __init__(self, fd: int, namespace_key: int) -> None:
        self._fd = fd
        self._namespace_key = namespace_key
        self._lock = threading.Condition(threading.Lock())
        self._held: set[int] = set()
        self._leaving: set[int] = set()
        # Calls to the kernel that are under way; the descriptor has to outlast them.
        self._calls = 0
        self._is_closed = False

    def take(self, digest: Digest) -> Claim | None:
        """Return the claim on a blob, or None when somebody else fetches it now."""
        offset = self._offset(digest)
        with self._lock:
            if offset in self._held:
                return None
            self._begin_call()
            self._held.add(offset)
        # Not under the lock: whoever holds it over a call to the kernel has to wait for the
        # interpreter afterwards, and all other threads for both.
        is_ours = False
        try:
            is_ours = self._set(fcntl.F_WRLCK, offset)
        finally:
            self._end_call(None if is_ours else offset)
        return Claim(self, offset) if is_ours else None

    def is_free(self, digest: Digest) -> bool:
        """Whether nobody holds the claim on a blob at this moment."""
        offset = self._offset(digest)
        with self._lock:
            if offset in self._held:
                return False
            self._begin_call()
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
        try:
            answer: bytes = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, request)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return True
            raise
        finally:
            self._end_call()
        found: int = _FLOCK.unpack(answer)[0]
        return found == fcntl.F_UNLCK

    def release(self, offset: int) -> None:
        """Give up the claim at an offset; one that is not held is passed over."""
        with self._lock:
            if offset not in self._held or offset in self._leaving:
                return
            self._begin_call()
            self._leaving.add(offset)
        # Who takes it meanwhile in this process is told that it is held; it was, just now.
        try:
            self._set(fcntl.F_UNLCK, offset)
        finally:
            self._end_call(offset)

    def close(self) -> None:
        """Give up all claims; late threads of who is done with them may still release theirs."""
        with self._lock:
            self._held.clear()
            self._is_closed = True
            # None of them waits for anything but the kernel.
            self._lock.wait_for(lambda: self._calls == 0)
            os.close(self._fd)

    def _begin_call(self) -> None:
        if self._is_closed:
            # The number may be another file's already.
            raise OSError(errno.EBADF, "the claims are closed")
        self._calls += 1

    def _end_call(self, offset: int | None = None) -> None:
        with self._lock:
            if offset is not None:
                self._held.discard(offset)
                self._leaving.discard(offset)
            self._calls -= 1
            if self._is_closed:
                self._lock.notify_all()

    def _offset(self, digest: Digest) -> int:
        # 60 bits: the sum stays a valid (signed, 64-bit) offset.
        return int(digest.hex[:15], 16) ^ self._namespace_key

    def _set(self, kind: int, offset: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                return False
            if error.errno not in _UNSUPPORTED:
                raise
        return True
