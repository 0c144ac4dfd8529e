"""libfuse's loop, in threads that are Python's.

libfuse makes threads as it needs them and ends those that are idle, and Python knows nothing of
them: for each request it makes what it has of a thread and throws it away again, memory map and
all, which costs more than answering it. What it has of its own threads it keeps.

Two threads read requests and answer them. Whoever may wait, for a store or a disk, says so first,
and if there are not two left that do not, one more is made. None ends before the mount does: a
hundred that sleep cost next to nothing.
"""

import ctypes
import time
from collections.abc import Callable
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Final, TypeAlias

import fuse

# Threads that do not wait.
SPARE: Final = 2
# How long those that wait may take to notice that the mount is gone, in seconds.
END_SECONDS: Final = 1.5

# fusepy has no types.
Structure: TypeAlias = Any

_libfuse: Final = fuse._libfuse  # noqa: SLF001 - the library that fusepy has loaded
# Source: libfuse 2.9, include/fuse.h.
_libfuse.fuse_setup.restype = ctypes.c_void_p
_libfuse.fuse_loop.argtypes = (ctypes.c_void_p,)
_libfuse.fuse_teardown.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
_libfuse.fuse_teardown.restype = None


class Loop:
    """The threads that answer one mount's requests.

    In a `with` block a thread of the loop may wait.

    Args:
        on_end: Called when the mount is gone, perhaps more than once, to wake those that wait.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._lock = Lock()
        self._fuse = 0
        self._threads: list[Thread] = []
        # There is always the one that has called `run`.
        self._count = 1
        self._waiting = 0

    def run(self, arguments: list[bytes], operations: Structure) -> bool:
        """Mount, and answer requests until the mount is gone; return whether it was mounted.

        Args:
            arguments: As a program's that is a file system, its name first.
            operations: A struct fuse_operations.
        """
        argv = (ctypes.c_char_p * len(arguments))(*arguments)
        mountpoint, threads = ctypes.c_void_p(), ctypes.c_int()
        self._fuse = _libfuse.fuse_setup(
            len(arguments),
            argv,
            ctypes.byref(operations),
            ctypes.c_size_t(ctypes.sizeof(operations)),
            ctypes.byref(mountpoint),
            ctypes.byref(threads),
            None,
        )
        if not self._fuse:
            return False
        with self._lock:
            self._grow()
        self._answer()
        until = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            _libfuse.fuse_teardown(self._fuse, mountpoint)
        return True

    def __enter__(self) -> None:
        with self._lock:
            self._waiting += 1
            self._grow()

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._waiting -= 1

    def _answer(self) -> None:
        _libfuse.fuse_loop(self._fuse)
        self._on_end()

    def _grow(self) -> None:
        """See that there are threads that do not wait; the lock is held."""
        while self._count - self._waiting < SPARE:
            thread = Thread(target=self._answer, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The host gives no more: what comes next waits for one of those there are.
                return
            self._count += 1
            self._threads.append(thread)
