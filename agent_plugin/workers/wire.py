"""What a drop-in and the host service say to each other over the socket: lines of JSON.

The drop-in sends one line, the request, and keeps the connection open; that it closes, or is
killed, is how it cancels. The service answers with a line that says it has begun, one for each line
of the agent's log, and a last one with the exit code. Who asks for nothing gets the first line.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final, TypeVar

import msgspec

from agent_plugin.content.errors import NotAllowedError

_T = TypeVar("_T")

VERSION: Final = 1

# An environment, and the path of a file: a fiftieth of this in practice.
MAX_REQUEST_BYTES: Final = 256 * 1024
# A request is sent at once; who says nothing for so long never will.
REQUEST_SECONDS: Final = 10.0
# A reader that has been stopped may go on; nobody waits for it for ever.
REPLY_SECONDS: Final = 60.0
# What the longest line that is passed on has, in characters.
MAX_LINE: Final = 64 * 1024
_PIECE_BYTES: Final = 64 * 1024


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """What a drop-in asks; paths may hold lone surrogates."""

    version: int
    kind: str
    arguments: list[str]
    session_dir: str
    environment: dict[str, str]


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the answer; one of the three is given.

    Attributes:
        begun: The version of who answers: the request has come.
        line: For the agent's log.
        exit: The exit code; nothing comes after it.
    """

    begun: str | None = None
    line: str | None = None
    exit: int | None = None


def encode(message: Request | Reply) -> bytes:
    """Return a message as its line."""
    # msgspec refuses the lone surrogates of names that are not UTF-8; json escapes them.
    return json.dumps(msgspec.to_builtins(message)).encode("ascii") + b"\n"


def read_request(connection: socket.socket) -> Request | None:
    """Return the request that comes over a connection; None if it was only to see who answers.

    Raises:
        NotAllowedError: None came in time, or it is too long, or makes no sense.
    """
    until = time.monotonic() + REQUEST_SECONDS
    data = bytearray()
    while not data.endswith(b"\n"):
        left = until - time.monotonic()
        connection.settimeout(max(left, 0.001))
        try:
            piece = connection.recv(_PIECE_BYTES)
        except TimeoutError as error:
            raise NotAllowedError(f"no request came within {REQUEST_SECONDS:.0f} s") from error
        if not piece and not data:
            return None
        if not piece:
            raise NotAllowedError("the request broke off")
        data += piece
        if len(data) > MAX_REQUEST_BYTES:
            raise NotAllowedError(f"a request has at most {MAX_REQUEST_BYTES} bytes")
    request = _convert(bytes(data), Request)
    if request.version != VERSION:
        raise NotAllowedError(
            f"the request is of version {request.version}, this service answers {VERSION}",
            hint="restart the service after propmaster was updated",
        )
    return request


def read_replies(connection: socket.socket) -> Iterator[Reply]:
    """Yield the lines of an answer until the connection ends.

    Raises:
        OSError: The connection broke.
        NotAllowedError: What came makes no sense.
    """
    with connection.makefile("rb") as lines:
        for line in lines:
            yield _convert(line, Reply)


def _convert(line: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(json.loads(line), kind)
    except (ValueError, RecursionError) as error:
        # Not the text of the error: it may quote what was sent, and that may be a secret.
        raise NotAllowedError(f"that was no {kind.__name__.lower()}") from error


class Answer:
    """The service's side of a connection; any thread may say something."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._gone = False

    def begin(self, version: str) -> None:
        """Say that the request has come."""
        self._send(Reply(begun=version))

    def say(self, line: str) -> None:
        """Pass a line on."""
        self._send(Reply(line=line[:MAX_LINE]))

    def end(self, code: int) -> None:
        """Say the exit code."""
        self._send(Reply(exit=code))

    def _send(self, reply: Reply) -> None:
        with self._lock:
            if self._gone:
                return
            try:
                self._connection.settimeout(REPLY_SECONDS)
                self._connection.sendall(encode(reply))
            except OSError:
                self._gone = True
                # Whoever watches the connection sees it, and so does a reader that goes on late.
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)


def request_of(
    kind: str, arguments: list[str], session_dir: str, environment: Mapping[str, str]
) -> Request:
    """Return the request for a call."""
    return Request(VERSION, kind, arguments, session_dir, dict(environment))
