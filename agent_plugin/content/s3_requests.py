"""Requests to S3, each made until it succeeds or is given up, and counted while under way.

Trying again is done here and only here: both clients try once. Credentials that expired are renewed
once for each attempt. A 404 means absent only once the bucket is known to exist, because an answer
to HEAD has no body that would tell a missing bucket from a missing object.

Concurrency: any thread may call anything; what is shared is guarded by s3_access.py and flight.py,
but for two flags that only ever change once.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import obstore
from obstore.exceptions import BaseError as ObstoreError

from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.flight import AdaptiveLimit
from agent_plugin.content.retry import Movement, RetryPolicy
from agent_plugin.content.s3_access import QUICK_BODY_BYTES, Access, Clients
from agent_plugin.content.s3_environment import boto_errors
from agent_plugin.content.s3_errors import (
    DamagedAnswerError,
    ExpiredCredentialsError,
    ObjectAbsentError,
    ObjectExistsError,
    RequestRefusedError,
    UnsupportedByStoreError,
    error_of_obstore,
)
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef, ObjectTypeDef

T = TypeVar("T")

# Bodies whose bytes differ from the object's; decoding them is not ours to do.
_CODED: Final = "Content-Encoding"
_NOT_CODED: Final = frozenset({"", "identity", "aws-chunked"})
# What every listing has, and every entry of one:
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
_PAGE: Final = frozenset({"Name", "IsTruncated"})
_ENTRY: Final = frozenset({"Key", "Size", "LastModified"})


class Requests:
    """What is asked of one bucket, below one prefix.

    Args:
        access: The bucket and the clients for it.
        policy: When requests are sent again.
        limit: How many may be under way.
        bandwidth: How much may move; it is taken before a request is sent, so that no store waits
            for us with a connection open, and a request that is slow is slow by itself.

    Attributes:
        bucket_seen: Whether a request succeeded, so that the bucket exists.
    """

    def __init__(
        self,
        access: Access,
        *,
        policy: RetryPolicy,
        limit: AdaptiveLimit,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        self.access = access
        self.policy = policy
        self._limit = limit
        self.bandwidth = bandwidth or Bandwidth()
        self._conditional_puts = True
        self.bucket_seen = False

    def place(self, below: str) -> str:
        """Return a key below the prefix as a URL, for messages."""
        location = self.access.location
        return f"s3://{location.bucket}/{location.key(below)}"

    def make(
        self,
        ask: Callable[[Clients], T],
        what: str,
        cancellation: Cancellation | None = None,
        *,
        policy: RetryPolicy | None = None,
        silence: float | None = None,
        receives: int = 0,
        sends: int = 0,
    ) -> T:
        """Return what `ask` returns, which makes one request and may be called again.

        Args:
            ask: Lets exceptions of obstore pass; those of boto3 it converts itself.
            what: The request in words, naming bucket and key.
            cancellation: Checked between attempts; a request under way is not interrupted.
            policy: Instead of the usual one.
            silence: Seconds after which `ask` gives up while nothing moves; by default as long as
                the client for reading does.
            receives: Bytes that an attempt is to receive.
            sends: Bytes that it is to send.

        Raises:
            StoreError: Whatever s3_errors.py makes of the last answer.
            CancelledError: Cancellation was wished.
        """
        movement = Movement(
            self.access.silence() if silence is None else silence,
            too_slow=self.policy.longest(WHOLE_BLOB_BYTES),
        )

        def attempt() -> T:
            held = self.bandwidth.download.take(receives, cancellation)
            movement.held_back(held + self.bandwidth.upload.take(sends, cancellation))
            return self._ask(ask, what, cancellation, movement)

        return (policy or self.policy).call(
            attempt,
            what=what,
            cancellation=cancellation,
            movement=movement,
        )

    def boto(
        self,
        ask: "Callable[[S3Client, dict[str, Any]], T]",
        what: str,
        cancellation: Cancellation | None = None,
        *,
        policy: RetryPolicy | None = None,
        sends: int = 0,
    ) -> T:
        """As `make`, with boto3; `ask` gets the client and the arguments every call is given."""
        location = self.access.location
        common = {"Bucket": location.bucket, **self.access.owner}

        def ask_boto(clients: Clients) -> T:
            with boto_errors(what):
                return ask(clients.boto(), common)

        silence = self.access.boto_silence
        return self.make(ask_boto, what, cancellation, policy=policy, silence=silence, sends=sends)

    def size(self, below: str, cancellation: Cancellation | None = None) -> int | None:
        """Return an object's size in bytes, None if it is absent."""
        what = f"head {self.place(below)}"
        return self.make(lambda clients: self._size(clients, below, what), what, cancellation)

    def put_if_absent(
        self, below: str, data: bytes, cancellation: Cancellation | None = None
    ) -> bool:
        """Store an object unless one of the same size is there; return whether it was stored."""
        what = f"put {self.place(below)}"
        return self.make(
            lambda clients: self._put_if_absent(clients, below, data, what),
            what,
            cancellation,
            silence=self.access.silence(len(data)),
            sends=len(data),
        )

    def put(self, below: str, data: bytes, metadata: dict[str, str]) -> None:
        """Store an object, replacing one that is there."""

        def ask(clients: Clients) -> None:
            store = _for_body(clients, data)
            obstore.put(store, below, data, attributes=metadata, use_multipart=False)

        silence = self.access.silence(len(data))
        self.make(ask, f"put {self.place(below)}", silence=silence, sends=len(data))

    def list_below(
        self, start: str, cancellation: Cancellation | None = None
    ) -> "Iterator[ObjectTypeDef]":
        """Yield what boto3 says of the objects whose keys below the prefix start with `start`.

        Each has key, size and time. What is no listing of them, such as a proxy's page with status
        200, would look like an empty one, so it is asked for again.
        """
        key = self.access.location.key(start)
        what = f"list {self.place(start)}"
        token = ""

        def ask(client: "S3Client", common: dict[str, Any]) -> "ListObjectsV2OutputTypeDef":
            if token:
                common = {**common, "ContinuationToken": token}
            page = client.list_objects_v2(**common, Prefix=key)
            if not _lists(page, key):
                raise DamagedAnswerError(f"{what}: the answer is no listing of that")
            if page["IsTruncated"] and page.get("NextContinuationToken", "") in ("", token):
                raise DamagedAnswerError(f"{what}: the listing does not go on")
            return page

        while True:
            page = self.boto(ask, what, cancellation)
            yield from page.get("Contents", [])
            if not page["IsTruncated"]:
                return
            token = page["NextContinuationToken"]

    def _ask(
        self,
        ask: Callable[[Clients], T],
        what: str,
        cancellation: Cancellation | None,
        movement: Movement,
    ) -> T:
        clients = self.access.clients
        try:
            return self._send(ask, clients, what, cancellation, movement)
        except ExpiredCredentialsError:
            if not self.access.renew(clients):
                raise
            return self._send(ask, self.access.clients, what, cancellation, movement)

    def _send(
        self,
        ask: Callable[[Clients], T],
        clients: Clients,
        what: str,
        cancellation: Cancellation | None,
        movement: Movement,
    ) -> T:
        with self._limit.slot(cancellation):
            begun = self.policy.clock()
            try:
                result = ask(clients)
            # ValueError is how obstore refuses a path.
            except (ObstoreError, FileNotFoundError, ValueError) as error:
                raise error_of_obstore(error, what) from error
            finally:
                movement.add(self.policy.clock() - begun)
        self.bucket_seen = True
        return result

    def _size(self, clients: Clients, below: str, what: str) -> int | None:
        try:
            return obstore.head(clients.reader, below)["size"]
        except (ObstoreError, FileNotFoundError) as error:
            reason = error_of_obstore(error, what)
            if reason.retryable:
                raise reason from error
            if isinstance(reason, ObjectAbsentError) and self.bucket_seen:
                return None
        # GET is refused with a reason; if it is not refused, its body is not read.
        try:
            return obstore.get(clients.reader, below).meta["size"]
        except (ObstoreError, FileNotFoundError) as error:
            reason = error_of_obstore(error, what)
            if isinstance(reason, ObjectAbsentError):
                return None
            raise reason from error

    def _put_if_absent(self, clients: Clients, below: str, data: bytes, what: str) -> bool:
        store = _for_body(clients, data)
        refused = False
        if self._conditional_puts:
            try:
                obstore.put(store, below, data, mode="create", use_multipart=False)
            except ObstoreError as error:
                reason = error_of_obstore(error, what)
                refused = isinstance(reason, RequestRefusedError)
                if isinstance(reason, UnsupportedByStoreError):
                    self._conditional_puts = False
                elif not refused and not isinstance(reason, ObjectExistsError):
                    raise reason from error
            else:
                return True
        # Of another size, it was cut off; absent, somebody deletes or writes it at this moment.
        if self._size(clients, below, what) == len(data):
            return False
        obstore.put(store, below, data, use_multipart=False)
        if refused:
            # Without the condition it was taken, so that was what the store refused.
            self._conditional_puts = False
        return True


def told(answer: Mapping[str, Any], field: str, what: str) -> str:
    """Return what an answer has to tell; with status 200 but without it, something broke it.

    Raises:
        DamagedAnswerError: It does not.
    """
    value = answer.get(field)
    if not value:
        raise DamagedAnswerError(f"{what}: the answer has no {field}")
    return str(value)


def refuse_coded(attributes: "obstore.Attributes", place: str) -> None:
    """Accept only bodies that are the object's bytes.

    Raises:
        DamagedAnswerError: The body is compressed or otherwise coded.
    """
    if (coding := attributes.get(_CODED, "")) not in _NOT_CODED:
        raise DamagedAnswerError(f"{place}: the answer is coded as {coding[:40]!r}")


def _lists(page: "ListObjectsV2OutputTypeDef", prefix: str) -> bool:
    """Return whether an answer is a listing, and of nothing but what starts with the prefix."""
    return page.keys() >= _PAGE and all(
        entry.keys() >= _ENTRY and entry["Key"].startswith(prefix)
        for entry in page.get("Contents", [])
    )


def _for_body(clients: Clients, data: bytes) -> "obstore.store.S3Store":
    return clients.reader if len(data) <= QUICK_BODY_BYTES else clients.writer()
