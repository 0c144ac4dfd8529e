"""The ways in which a fault proxy breaks, and the rules by which it chooses when."""

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto
from urllib.parse import parse_qs

from tests.servers.http_wire import Head


class Fault(StrEnum):
    """What goes wrong. Unless said otherwise a body that is empty stays as it is."""

    # The proxy answers, and the store never hears of the request.
    UNAVAILABLE = auto()  # 503 ServiceUnavailable
    SLOW_DOWN = auto()  # 503 SlowDown
    INTERNAL_ERROR = auto()  # 500
    FORBIDDEN = auto()  # 403 AccessDenied
    EXPIRED_TOKEN = auto()  # 400
    INVALID_ARGUMENT = auto()  # 400
    NOT_IMPLEMENTED = auto()  # 501
    NOT_FOUND = auto()  # 404 NoSuchKey
    RANGE_NOT_SATISFIABLE = auto()  # 416
    REDIRECT_301 = auto()  # to the same place
    REDIRECT_307 = auto()
    EMPTY_OK = auto()  # 200 without a body; a PUT is not stored
    XML_OK = auto()  # 200 with an error document as body; a PUT is not stored

    # The connection suffers, and the store never hears of the request.
    RESET = auto()  # after `offset` bytes of the request's body, by default all
    NOT_HTTP = auto()  # what a TLS endpoint says to a client that does not speak TLS
    REFUSE = auto()  # reset it, close all others, refuse new ones for `seconds` (default 1)

    # The store does its part, and the answer suffers.
    REPLY_LOST = auto()  # reset before the answer; a PUT is stored
    RESET_MID_BODY = auto()  # after `offset` bytes, default half
    SHORT_BODY = auto()  # right Content-Length, closed in order after `offset` bytes, default half
    SHORT_OBJECT = auto()  # Content-Length and body agree on `offset` bytes, default half
    LONG_OBJECT = auto()  # Content-Length and body agree, and are 7 bytes too long
    TRAILING_BYTES = auto()  # right Content-Length, and 7 bytes more on the connection
    WRONG_BYTES = auto()  # right length, every byte another
    FLIPPED_BIT = auto()  # in the byte at `offset`, by default somewhere
    WRONG_RANGE = auto()  # 206 with one byte further on than asked for, and says so
    WHOLE_FOR_RANGE = auto()  # 200 with the whole object; only ranged requests suffer; with
    # `offset` it stands still there, as STALL does
    DRIP = auto()  # `bytes_per_second`
    STALL = auto()  # for `seconds` (None: for ever), before the head or after `offset` bytes
    DUPLICATE_LENGTH = auto()  # a second Content-Length, 1 higher
    GZIP_HEADER = auto()  # Content-Encoding: gzip, though it is not
    NO_ETAG = auto()  # also in answers to HEAD
    ETAG_CHANGED = auto()  # another ETag each time; 412 if the request has If-Match


@dataclass(frozen=True, slots=True)
class Answer:
    """A status with S3's code and message for it."""

    status: int
    reason: str
    code: str
    message: str


# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html#ErrorCodeList
ANSWERS: Mapping[Fault, Answer] = {
    Fault.UNAVAILABLE: Answer(
        503, "Service Unavailable", "ServiceUnavailable", "Service is unable to handle request."
    ),
    Fault.SLOW_DOWN: Answer(503, "Slow Down", "SlowDown", "Please reduce your request rate."),
    Fault.INTERNAL_ERROR: Answer(
        500, "Internal Server Error", "InternalError", "We encountered an internal error."
    ),
    Fault.FORBIDDEN: Answer(403, "Forbidden", "AccessDenied", "Access Denied"),
    Fault.EXPIRED_TOKEN: Answer(
        400, "Bad Request", "ExpiredToken", "The provided token has expired."
    ),
    Fault.INVALID_ARGUMENT: Answer(400, "Bad Request", "InvalidArgument", "Invalid Argument"),
    Fault.NOT_IMPLEMENTED: Answer(
        501,
        "Not Implemented",
        "NotImplemented",
        "A header you provided implies functionality that is not implemented",
    ),
    Fault.NOT_FOUND: Answer(404, "Not Found", "NoSuchKey", "The specified key does not exist."),
    Fault.RANGE_NOT_SATISFIABLE: Answer(
        416, "Range Not Satisfiable", "InvalidRange", "The requested range is not satisfiable"
    ),
    Fault.REDIRECT_301: Answer(
        301, "Moved Permanently", "PermanentRedirect", "Use the specified endpoint."
    ),
    Fault.REDIRECT_307: Answer(
        307, "Temporary Redirect", "TemporaryRedirect", "Please re-send to the other endpoint."
    ),
    Fault.EMPTY_OK: Answer(200, "OK", "", ""),
    Fault.XML_OK: Answer(200, "OK", "InternalError", "We encountered an internal error."),
    # Not a fault of its own: what ETAG_CHANGED says to If-Match.
    Fault.ETAG_CHANGED: Answer(
        412, "Precondition Failed", "PreconditionFailed", "At least one condition did not hold."
    ),
}


@dataclass(slots=True)
class Request:
    """What a client asked, and what became of it.

    Attributes:
        path: As sent, percent-encoded.
        query: As sent, without the question mark.
        headers: Names in lower case.
        body_length: Bytes of body received, framing of chunks included.
        status: What the client was told; None if it was told nothing, or not yet.
        fault: What was injected.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    key: str  # decoded, without the bucket; empty for a request about a bucket
    body_length: int = 0
    status: int | None = None
    fault: Fault | None = None

    @property
    def what(self) -> str:
        """The same for the same wish in another run, whatever the bucket and prefix."""
        part = parse_qs(self.query).get("partNumber", [""])[0]
        name = self.key.rpartition("/")[2]
        return f"{self.method} {name} {self.headers.get('range', '')} {part}"


@dataclass(slots=True)
class Rule:
    """When a fault happens, and how exactly. `hits` is how often it did.

    Attributes:
        rate: The share of matching requests that suffer, 0 to 1, drawn from the seed, the request
            and how often it was repeated; threads racing each other change nothing.
        key: Found anywhere in the object key.
        header: Only requests that have it, in lower case.
        what: Found anywhere in what is wished (Request.what), which has the range or the part.
        times: Suffers at most; None is no limit.
        skip: The first so many matches are spared.
        for_seconds: From the first hit on; None is for ever.
        offset, seconds, bytes_per_second: See the fault.
        released: Once it is set, what stands still goes on.
    """

    fault: Fault
    rate: float = 1.0
    methods: frozenset[str] = frozenset({"GET"})
    key: re.Pattern[str] | None = None
    header: str | None = None
    what: re.Pattern[str] | None = None
    times: int | None = None
    skip: int = 0
    for_seconds: float | None = None
    offset: int | None = None
    seconds: float | None = None
    bytes_per_second: int = 1024
    seed: str = ""
    hits: int = 0
    released: threading.Event = field(default_factory=threading.Event, repr=False)
    _matches: int = 0
    _seen: Counter[str] = field(default_factory=Counter)
    _first_hit: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def strikes(self, request: Request) -> bool:
        """Decide about a request, and count it."""
        if request.method not in self.methods or (self.key and not self.key.search(request.key)):
            return False
        if self.header is not None and self.header not in request.headers:
            return False
        if self.what is not None and not self.what.search(request.what):
            return False
        with self._lock:
            self._matches += 1
            self._seen[request.what] += 1
            if self._matches <= self.skip or self._is_over():
                return False
            draw = random.Random(f"{self.seed} {request.what} {self._seen[request.what]}").random()
            if draw >= self.rate:
                return False
            self.hits += 1
            self._first_hit = self._first_hit or time.monotonic()
            return True

    def _is_over(self) -> bool:
        if self.times is not None and self.hits >= self.times:
            return True
        if self.for_seconds is None or self._first_hit is None:
            return False
        return time.monotonic() > self._first_hit + self.for_seconds


def answer(fault: Fault, request: Request, endpoint_url: str) -> tuple[Head, bytes]:
    """Return the response that a fault of the first group is."""
    said = ANSWERS[fault]
    body = b""
    if said.code:
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{said.code}</Code>'
            f"<Message>{said.message}</Message><RequestId>fault-proxy</RequestId></Error>"
        ).encode()
    fields = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    if said.status in {301, 307}:
        query = f"?{request.query}" if request.query else ""
        fields.append(("Location", f"{endpoint_url}{request.path}{query}"))
    return Head(f"HTTP/1.1 {said.status} {said.reason}", tuple(fields)), body


def alter(rule: Rule, request: Request, head: Head, body: bytes) -> tuple[Head, bytes]:
    """Return the store's response as a fault of the third group leaves it."""
    half = len(body) // 2 if rule.offset is None else min(rule.offset, len(body))
    match rule.fault:
        case Fault.SHORT_OBJECT:
            body = body[:half]
        case Fault.LONG_OBJECT:
            body += b"surplus"
        case Fault.WRONG_BYTES:
            body = bytes(byte ^ 0xFF for byte in body)
        case Fault.FLIPPED_BIT if body:
            chance = random.Random(f"{rule.seed} {request.what} {rule.hits}")
            place = chance.randrange(len(body)) if rule.offset is None else rule.offset
            bit = 1 << chance.randrange(8)
            body = body[:place] + bytes([body[place] ^ bit]) + body[place + 1 :]
        case Fault.WRONG_RANGE if body:
            head, body = _wrong_range(head, body)
        case Fault.GZIP_HEADER:
            head = head.with_field("Content-Encoding", "gzip")
        case Fault.ETAG_CHANGED:
            head = head.with_field("ETag", f'"{rule.hits:032x}"')
    head = head.with_field("Content-Length", str(len(body)))
    if rule.fault is Fault.DUPLICATE_LENGTH:
        head = Head(head.first_line, (*head.fields, ("Content-Length", str(len(body) + 1))))
    return head, body


def _wrong_range(head: Head, body: bytes) -> tuple[Head, bytes]:
    stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", head.get("content-range") or "")
    first = int(stated[1]) if stated else 0
    total = int(stated[3]) if stated else len(body)
    body = body[1:] + b"?"
    head = Head("HTTP/1.1 206 Partial Content", head.fields)
    return head.with_field("Content-Range", f"bytes {first + 1}-{first + len(body)}/{total}"), body
