"""What the kernel is told without having asked: to forget names and pages.

The kernel takes the locks of what it is to forget while it takes the message, and whoever holds
them may be waiting for an answer of the server: the thread that answers would wait for itself, and
so would the end of a killed server for any thread of it. So a process of its own carries the
messages (kernel_messenger.py), from the first of them on.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

from vfs.transports import kernel_messenger
from vfs.transports import kernel_protocol as protocol

_NEXT_TRY_SECONDS: Final = 0.5


class Notifier:
    """Messages to the kernel of one mount; may be used from any thread, and never waits.

    Args:
        fd: /dev/fuse, after INIT.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: SimpleQueue[bytes] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def forget_names(self, names: Sequence[tuple[int, bytes]]) -> None:
        """Have names looked up again, and their directories listed again.

        Args:
            names: Each with its directory's node.
        """
        for directory, name in names:
            body = protocol.INVAL_ENTRY.pack(directory, len(name), 0) + name + b"\0"
            self._send(protocol.NOTIFY_INVAL_ENTRY, body)
        # A name that the kernel does not know is not found, and its directory then left as it is.
        self.forget_content(dict.fromkeys(directory for directory, _ in names))

    def forget_content(self, nodes: Iterable[int]) -> None:
        """Have all pages and the attributes of nodes asked for again."""
        for node in nodes:
            self._send(protocol.NOTIFY_INVAL_INODE, protocol.INVAL_INODE.pack(node, 0, 0))

    def _send(self, code: int, body: bytes) -> None:
        header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(body), code, 0)
        self._queue.put(header + body)
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="notify", daemon=True)
                # Where the host gives none, the next message tries again.
                with suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def _work(self) -> None:
        messenger = self._messenger()
        while True:
            message = self._queue.get()
            while not _give(messenger, message):
                messenger.wait()
                messenger = self._messenger()

    def _messenger(self) -> "subprocess.Popen[bytes]":
        while True:
            # Where the host gives no process now, what is to be forgotten is so later.
            with suppress(OSError):
                # Its stdin is closed with this process, however that ends; then it ends, too.
                return subprocess.Popen(  # noqa: S603 - a fixed argv
                    [sys.executable, "-I", "-S", kernel_messenger.__file__],
                    stdin=subprocess.PIPE,
                    stdout=self._fd,
                    bufsize=0,
                )
            time.sleep(_NEXT_TRY_SECONDS)


def _give(messenger: "subprocess.Popen[bytes]", message: bytes) -> bool:
    """Hand a message over; False when the messenger has been killed."""
    assert messenger.stdin is not None  # noqa: S101 - it is a pipe
    with suppress(BrokenPipeError):
        return messenger.stdin.write(message) == len(message)
    return False
