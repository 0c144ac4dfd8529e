"""A proxy in front of an S3 endpoint that breaks what it is told to, and remembers every request.

Requests reach the store as the client sent them, the Host field included, so signatures hold. One
thread accepts, and each client connection has a thread with a connection to the store of its own;
what they share is behind one lock. When the proxy is closed all of them have ended.
"""

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Collection
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.servers.faults import ANSWERS, Fault, Request, Rule, alter, answer
from tests.servers.http_wire import CHUNK_BYTES, Head, Wire, WireError

_CONNECT_SECONDS = 10
_STORE_SECONDS = 60
_JOIN_SECONDS = 10
_BACKLOG = 256
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# The alert "handshake failure": https://www.rfc-editor.org/rfc/rfc5246#section-7.2
_TLS_ALERT = b"\x15\x03\x03\x00\x02\x02\x28"
_DRIPS_PER_SECOND = 10


class FaultProxy:
    """Listens on a loopback port of its own while entered.

    Args:
        upstream_url: The store, `http://host:port`.
        seed: Chooses which requests suffer from a rule with a rate, and which bit flips.
        credentials: Access and secret key, only for WHOLE_FOR_RANGE: that asks the store for
            something the client did not sign.
    """

    def __init__(
        self, upstream_url: str, *, seed: int, credentials: tuple[str, str] | None = None
    ) -> None:
        upstream = urlsplit(upstream_url)
        self.upstream = (upstream.hostname or "127.0.0.1", upstream.port or 80)
        self.seed = seed
        self.credentials = credentials
        self.faults: list[Rule] = []
        self._injected: list[Rule] = []
        self._requests: list[Request] = []
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._closing = threading.Event()
        self._resume = threading.Event()
        self._listening = threading.Event()
        self._refuse_seconds = 0.0
        # Bound, but never listening: it keeps the port ours while connections are refused.
        self._reservation = _bound(0)
        self._port: int = self._reservation.getsockname()[1]
        self._listener = _bound(self._port)
        self._thread = threading.Thread(target=self._accept, name="fault-proxy", daemon=True)

    @property
    def url(self) -> str:
        """`http://127.0.0.1:<port>`."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in the order in which they arrived."""
        with self._lock:
            return self._requests[:]

    def count(self, method: str, key: str = "") -> int:
        """Return how many requests there were whose object key matches a regular expression."""
        return sum(
            request.method == method and bool(re.search(key, request.key))
            for request in self.requests
        )

    def inject(
        self,
        fault: Fault,
        *,
        rate: float = 1.0,
        methods: Collection[str] = frozenset({"GET"}),
        key: str | None = None,
        times: int | None = None,
        **details: Any,
    ) -> Rule:
        """Add a rule, after those there are; of several that match the first one strikes.

        `details` are the other fields of Rule: header, what, skip, for_seconds, offset, seconds,
        bytes_per_second.
        """
        if fault is Fault.WHOLE_FOR_RANGE and self.credentials is None:
            raise ValueError(f"{fault} needs a proxy with credentials")
        rule = Rule(
            fault,
            rate=rate,
            methods=frozenset(methods),
            key=None if key is None else re.compile(key),
            times=times,
            seed=f"{self.seed} {len(self.faults)}",
            **details,
        )
        self.faults.append(rule)
        self._injected.append(rule)
        return rule

    def clear(self) -> None:
        """Heal: drop all rules, and accept connections again."""
        self.faults.clear()
        self._resume.set()
        if not self._closing.is_set():
            self._listening.wait(_JOIN_SECONDS)

    def release(self) -> None:
        """Heal, and let all that stands still go on."""
        self.clear()
        for rule in self._injected:
            rule.released.set()

    def forget(self) -> None:
        """Drop the record of requests so far."""
        with self._lock:
            self._requests.clear()

    def refuse(self, seconds: float, *, spare: "_Connection | None" = None) -> None:
        """Close all connections and refuse new ones for a time; returns once it is so."""
        self._refuse_seconds = seconds
        self._resume.clear()
        self._listening.clear()
        _stop_listening(self._listener)
        for connection in self._open_connections():
            if connection is not spare:
                connection.wake()

    def __enter__(self) -> Self:
        self._listener.listen(_BACKLOG)
        self._listening.set()
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._resume.set()
        _stop_listening(self._listener)
        self._thread.join(_JOIN_SECONDS)
        for connection in self._open_connections():
            connection.wake()
            connection.thread.join(_JOIN_SECONDS)
        self._reservation.close()
        left = [thread for thread in threading.enumerate() if thread.name.startswith(self.url)]
        assert not left, f"threads did not end: {left}"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                self._listener.close()
                if self._closing.is_set():
                    return
                self._resume.wait(self._refuse_seconds)
                if self._closing.is_set():
                    return
                self._listener = _bound(self._port)
                self._listener.listen(_BACKLOG)
                self._listening.set()
                continue
            connection = _Connection(self, Wire(client))
            with self._lock:
                self._connections.add(connection)
            connection.thread.start()

    def _open_connections(self) -> list["_Connection"]:
        with self._lock:
            return list(self._connections)

    def ended(self, connection: "_Connection") -> None:
        with self._lock:
            self._connections.discard(connection)

    def record(self, request: Request) -> Rule | None:
        """Remember a request and return the rule that strikes it."""
        with self._lock:
            self._requests.append(request)
        for rule in self.faults[:]:
            if rule.strikes(request):
                request.fault = rule.fault
                return rule
        return None


class _Connection:
    """A client's connection, served by a thread of its own."""

    def __init__(self, proxy: FaultProxy, client: Wire) -> None:
        self._proxy = proxy
        self._client = client
        self._store: Wire | None = None
        # A daemon, so that one that does not end fails its test and not the whole run.
        name = f"{proxy.url} client"
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def wake(self) -> None:
        self._client.wake()
        if store := self._store:
            store.wake()

    def _run(self) -> None:
        try:
            with contextlib.suppress(OSError, WireError):
                while self._serve_one():
                    pass
        finally:
            self._client.socket.close()
            if self._store:
                self._store.socket.close()
            self._proxy.ended(self)

    def _serve_one(self) -> bool:
        """Serve a request; False when the connection is at its end."""
        head = self._client.read_head()
        if head is None:
            return False
        request = _request_of(head)
        rule = self._proxy.record(request)
        if rule is None:
            reply, store = self._forward(head, request)
            self._pass_on(reply, store, request)
            return not (head.closes or reply.closes)
        if rule.fault in ANSWERS and not _passes_if_match(rule, request):
            self._read_body(head, request)
            reply, body = answer(rule.fault, request, self._proxy.url)
            self._send(request, reply, body)
            return not head.closes
        if self._break_connection(rule, head, request):
            return False
        return self._break_reply(rule, head, request) and not head.closes

    def _break_connection(self, rule: Rule, head: Head, request: Request) -> bool:
        """Whether that was the fault; then the connection is at its end."""
        match rule.fault:
            case Fault.RESET:
                self._read_body(head, request, at_most=rule.offset)
                self._client.reset()
            case Fault.NOT_HTTP:
                self._read_body(head, request)
                self._client.send(_TLS_ALERT)
            case Fault.REFUSE:
                seconds = 1.0 if rule.seconds is None else rule.seconds
                self._proxy.refuse(seconds, spare=self)
                self._client.reset()
            case _:
                return False
        return True

    def _break_reply(self, rule: Rule, head: Head, request: Request) -> bool:
        """Let the store answer and send that broken; False when the connection is at its end."""
        if rule.fault is Fault.STALL and rule.offset is None:
            self._client.wait(rule.seconds, rule.released)
        if rule.fault is Fault.WHOLE_FOR_RANGE and "range" in request.headers:
            self._read_body(head, request)
            return not self._pass_on_whole(rule, request).closes
        reply, store = self._forward(head, request)
        body = b"".join(store.body(reply, raw=False)) if _has_body(reply, request) else b""
        if rule.fault is Fault.REPLY_LOST:
            self._client.reset()
            return False
        reply = reply.without("transfer-encoding")
        if rule.fault is Fault.NO_ETAG:
            reply = reply.without("etag")
        if request.method != "HEAD":
            reply, body = alter(rule, request, reply, body)
        return self._send_badly(rule, request, reply, body) and not reply.closes

    def _send_badly(self, rule: Rule, request: Request, reply: Head, body: bytes) -> bool:
        cut = len(body) // 2 if rule.offset is None else min(rule.offset, len(body))
        match rule.fault:
            case Fault.RESET_MID_BODY:
                self._send(request, reply, body[:cut])
                self._client.reset()
                return False
            case Fault.SHORT_BODY:
                self._send(request, reply, body[:cut])
                return False
            case Fault.TRAILING_BYTES:
                self._send(request, reply, body + b"surplus")
            case Fault.STALL if rule.offset is not None:
                self._send(request, reply, body[:cut])
                self._client.wait(rule.seconds, rule.released)
                self._client.send(body[cut:])
            case Fault.DRIP:
                self._send(request, reply, b"")
                step = max(1, rule.bytes_per_second // _DRIPS_PER_SECOND)
                for start in range(0, len(body), step):
                    self._client.send(body[start : start + step])
                    self._client.wait(step / rule.bytes_per_second, rule.released)
            case _:
                self._send(request, reply, body)
        return True

    def _send(self, request: Request, head: Head, body: bytes) -> None:
        request.status = head.status
        self._client.send(head.encode() + (b"" if request.method == "HEAD" else body))

    def _read_body(self, head: Head, request: Request, at_most: int | None = None) -> None:
        """Take the request's body, or its first bytes, without telling the store."""
        if head.get("expect"):
            self._client.send(_CONTINUE)
        for data in self._client.body(head, raw=True):
            request.body_length += len(data)
            if at_most is not None and request.body_length >= at_most:
                return

    def _store_wire(self) -> Wire:
        if self._store is not None and self._store.is_stale():
            self._store.socket.close()
            self._store = None
        if self._store is None:
            store = socket.create_connection(self._proxy.upstream, _CONNECT_SECONDS)
            store.settimeout(_STORE_SECONDS)
            self._store = Wire(store)
        return self._store

    def _forward(self, head: Head, request: Request) -> tuple[Head, Wire]:
        """Send a request to the store as it is; return the answer's head, and where its body is.

        Only Expect is ours to handle; botocore.auth.SIGNED_HEADERS_BLACKLIST leaves it out.
        """
        store = self._store_wire()
        pending = head.without("expect").encode()
        if head.get("expect"):
            self._client.send(_CONTINUE)
        for data in self._client.body(head, raw=True):
            request.body_length += len(data)
            pending += data
            if len(pending) >= CHUNK_BYTES:
                store.send(pending)
                pending = b""
        store.send(pending)
        while (reply := store.read_head()) and reply.status < 200:
            pass
        if reply is None:
            raise WireError("the store closed without an answer")
        return reply, store

    def _pass_on(self, reply: Head, store: Wire, request: Request) -> None:
        request.status = reply.status
        pending = reply.encode()
        if _has_body(reply, request):
            for data in store.body(reply, raw=True):
                pending += data
                if len(pending) >= CHUNK_BYTES:
                    self._client.send(pending)
                    pending = b""
        self._client.send(pending)

    def _pass_on_whole(self, rule: Rule, request: Request) -> Head:
        """Pass on the store's answer to the same request without Range, as it comes."""
        assert self._proxy.credentials
        host, port = self._proxy.upstream
        signed = AWSRequest("GET", f"http://{host}:{port}{request.path}")
        S3SigV4Auth(Credentials(*self._proxy.credentials), "s3", "us-east-1").add_auth(signed)
        connection = http.client.HTTPConnection(host, port, timeout=_STORE_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", request.path, headers=dict(signed.headers.items()))
            response = connection.getresponse()
            first_line = f"HTTP/1.1 {response.status} {response.reason}"
            head = Head(first_line, tuple(response.getheaders()))
            self._send(request, head, b"")
            if rule.offset is not None:
                self._client.send(response.read(rule.offset))
                self._client.wait(rule.seconds, rule.released)
            while piece := response.read(CHUNK_BYTES):
                self._client.send(piece)
        return head


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _stop_listening(listener: socket.socket) -> None:
    # Unlike close, this wakes the thread that accepts.
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


def _request_of(head: Head) -> Request:
    match head.first_line.split(" "):
        case [method, target, "HTTP/1.1"]:
            pass
        case _:
            raise WireError(f"not a request: {head.first_line!r}")
    path, _, query = target.partition("?")
    _, _, key = path.removeprefix("/").partition("/")
    headers = {name.lower(): value for name, value in head.fields}
    return Request(method, path, query, headers, unquote(key))


def _has_body(reply: Head, request: Request) -> bool:
    return request.method != "HEAD" and reply.status not in {204, 304}


def _passes_if_match(rule: Rule, request: Request) -> bool:
    return rule.fault is Fault.ETAG_CHANGED and "if-match" not in request.headers
