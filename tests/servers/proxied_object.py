"""An object behind a fault proxy, fetched by a client that reports what it saw."""

import http.client
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3_server import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@dataclass(frozen=True, slots=True)
class Seen:
    """A response as far as it came, and what ended it."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    error: type[Exception] | None = None

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


@dataclass(frozen=True, slots=True)
class ProxiedObject:
    """One object, reached through the proxy."""

    proxy: FaultProxy
    s3: S3Server
    key: str

    @classmethod
    def stored_at(cls, proxy: FaultProxy, s3: S3Server, key: str, data: bytes) -> Self:
        """Store it, past the proxy."""
        s3.client().put_object(Bucket=s3.bucket, Key=key, Body=data)
        return cls(proxy, s3, key)

    @property
    def client(self) -> "S3Client":
        return self.s3.client(endpoint_url=self.proxy.url)

    def url(self, operation: str = "get_object") -> str:
        wanted = {"Bucket": self.s3.bucket, "Key": self.key}
        return self.client.generate_presigned_url(operation, Params=wanted)

    def get(
        self,
        headers: dict[str, str] | None = None,
        *,
        method: str = "GET",
        url: str | None = None,
        body: bytes | None = None,
        timeout: float = 10,
    ) -> Seen:
        """Send one request on a connection of its own, presigned, and take what comes."""
        parts = urlsplit(url or self.url())
        connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
        try:
            connection.request(method, f"{parts.path}?{parts.query}", body, headers or {})
            response = connection.getresponse()
            received = b""
            error: type[Exception] | None = None
            try:
                while data := response.read1():
                    received += data
                if response.length:
                    error = http.client.IncompleteRead
            except OSError as failure:
                error = type(failure)
            response.close()
            return Seen(response.status, response.getheaders(), received, error)
        finally:
            connection.close()

    def stored(self) -> bytes:
        """What the store has, asked directly."""
        found = self.s3.client().get_object(Bucket=self.s3.bucket, Key=self.key)
        return found["Body"].read()


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait for something that will be so; bounded."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def until_unchanged(count: Callable[[], int], *, seconds: float = 2) -> int:
    """Wait until a count has stayed as it is for some seconds; return it."""
    deadline = time.monotonic() + 60
    while True:
        before = count()
        time.sleep(seconds)
        if count() == before:
            return before
        assert time.monotonic() < deadline, "waited in vain"
