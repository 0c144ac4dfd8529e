"""What the kernel is told without having asked: to forget names and pages.

From a thread of its own. The kernel takes the locks of what it is to forget while it takes the
message, and whoever holds them may be waiting for an answer of the server: the thread that answers
would wait for itself.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from vfs.transports import kernel_protocol as protocol


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
                self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            message = self._queue.get()
            # ENOENT: the kernel knew nothing of it. ENODEV: the mount is gone.
            with suppress(OSError):
                os.write(self._fd, message)
