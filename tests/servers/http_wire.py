"""HTTP/1.1 messages as bytes on a socket, no cleverer than a proxy needs.

Heads are kept as they were sent, name case and order included, because signatures cover them.
Not for more than one thread per connection.
"""

import contextlib
import fcntl
import math
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

CHUNK_BYTES = 256 * 1024
_MAX_HEAD_BYTES = 64 * 1024
_FLUSH_SECONDS = 5.0
_POLL_SECONDS = 0.2


class WireError(Exception):
    """The other end is gone, or does not speak HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first line of a message and its fields, without the blank line."""

    first_line: str
    fields: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, data: bytes) -> "Head":
        first_line, *lines = data.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        return cls(first_line, tuple((name, value.strip()) for name, _, value in fields))

    def encode(self) -> bytes:
        lines = [self.first_line, *(f"{name}: {value}" for name, value in self.fields)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.fields if key.lower() == name), None)

    def without(self, *names: str) -> "Head":
        kept = tuple((key, value) for key, value in self.fields if key.lower() not in names)
        return Head(self.first_line, kept)

    def with_field(self, name: str, value: str) -> "Head":
        """Replace a field in its place, or append it."""
        if self.get(name.lower()) is None:
            return Head(self.first_line, (*self.fields, (name, value)))
        fields = tuple(
            (key, value if key.lower() == name.lower() else old) for key, old in self.fields
        )
        return Head(self.first_line, fields)

    @property
    def status(self) -> int:
        """Of a response."""
        return int(self.first_line.split(" ", 2)[1])

    @property
    def closes(self) -> bool:
        """Whether the sender means to close the connection after this message."""
        return (self.get("connection") or "").lower() == "close" or "HTTP/1.0" in self.first_line


class Wire:
    """A connected socket with what has been read from it too early."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._early = b""

    def read_head(self) -> Head | None:
        """Return the next message's head; None when the other end has closed before it."""
        while (end := self._early.find(b"\r\n\r\n")) < 0:
            data = self.socket.recv(CHUNK_BYTES)
            if not data:
                return None
            self._early += data
            if len(self._early) > _MAX_HEAD_BYTES and b"\r\n\r\n" not in self._early:
                raise WireError("the head is too long")
        head, self._early = self._early[:end], self._early[end + 4 :]
        return Head.parse(head)

    def body(self, head: Head, *, raw: bool) -> Iterator[bytes]:
        """Yield the body that belongs to a head; chunked framing is kept if `raw`, else removed."""
        if (head.get("transfer-encoding") or "").lower() == "chunked":
            yield from self._chunks(raw=raw)
        elif (length := head.get("content-length")) is not None:
            yield from self._exactly(int(length))
        elif head.first_line.startswith("HTTP/"):
            yield from self._to_the_end()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def is_stale(self) -> bool:
        """Whether the other end has closed, or spoken unasked."""
        return bool(self._early or select.select([self.socket], [], [], 0)[0])

    def flush(self) -> None:
        """Wait until what was sent has reached the other end's kernel."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        while time.monotonic() < deadline:
            waiting = fcntl.ioctl(self.socket, termios.TIOCOUTQ, b"\0" * 4)
            if not struct.unpack("i", waiting)[0]:
                return
            time.sleep(0.001)

    def wait(self, seconds: float | None, released: threading.Event | None = None) -> None:
        """Do nothing for a time, for ever if None, or until an event.

        Raises:
            WireError: The other end closed meanwhile, or we did.
        """
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        # Not by reading: what the other end sent before it closed may lie unread here, for ever.
        hung_up = select.poll()
        hung_up.register(self.socket, select.POLLRDHUP)
        while (left := deadline - time.monotonic()) > 0:
            if released is not None and released.is_set():
                return
            if hung_up.poll(min(_POLL_SECONDS, left) * 1000):
                raise WireError("closed while waiting")

    def wake(self) -> None:
        """Make whoever reads or waits on this stop; from any thread."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Close so that the other end gets ECONNRESET, once it has read what was flushed."""
        self.flush()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _some(self, at_most: int) -> bytes:
        if self._early:
            data, self._early = self._early[:at_most], self._early[at_most:]
            return data
        data = self.socket.recv(min(at_most, CHUNK_BYTES))
        if not data:
            raise WireError("closed within a body")
        return data

    def _exactly(self, length: int) -> Iterator[bytes]:
        while length:
            data = self._some(length)
            length -= len(data)
            yield data

    def _to_the_end(self) -> Iterator[bytes]:
        with contextlib.suppress(WireError):
            while True:
                yield self._some(CHUNK_BYTES)

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            line += self._some(1)
        return line

    def _chunks(self, *, raw: bool) -> Iterator[bytes]:
        size = -1
        while size:
            line = self._line()
            size = int(line.split(b";")[0], 16)
            if raw:
                yield line
            if size:
                yield from self._exactly(size)
                end = self._line()
                if raw:
                    yield end
        while (trailer := self._line()) != b"\r\n":
            if raw:
                yield trailer
        if raw:
            yield trailer
