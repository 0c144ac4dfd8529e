"""The clients for one bucket, and the bucket's expected owner, which every request names.

obstore reads the environment by itself, so all that it might find there is set explicitly, and keys
reach it only through the provider.

Concurrency: any thread may call anything. `clients` are immutable; `renew` puts others in their
place, under a lock, once for all the threads that saw the same ones fail.
"""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, TypeVar
from urllib.parse import quote

import obstore.store

from agent_plugin import __version__
from agent_plugin.content import events
from agent_plugin.content.errors import SettingsInvalidError
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_environment import (
    Anonymous,
    Credentials,
    Keys,
    locate,
    resolve_account_id,
)
from agent_plugin.content.store import WHOLE_BLOB_BYTES

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from obstore.store import ClientConfig

T = TypeVar("T")

# S3's default where a PUT names none, which is what the Deadline library leaves it at.
CONTENT_TYPE: Final = "binary/octet-stream"
# reqwest counts the whole sending of a body as time without a byte read, so uploads need patience:
# a share of 128 KiB/s is what 16 uploads have on a line of 2 MiB/s. Smaller bodies fit into the
# kernel's buffers and need none.
UPLOAD_BYTES_PER_SECOND: Final = 128 * 1024
UPLOAD_PATIENCE_SECONDS: Final = WHOLE_BLOB_BYTES / UPLOAD_BYTES_PER_SECOND
QUICK_BODY_BYTES: Final = 256 * 1024
# S3 closes connections that were idle for about 20 s; a request sent just then is lost.
_IDLE_TIMEOUT: Final = timedelta(seconds=15)

_ACCOUNT: Final = re.compile(r"[0-9]{12}")

log = events.get_logger()


class Lazily(Generic[T]):
    """A thing that is made when first called for, once, whichever thread calls.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._lock = threading.Lock()

    def __call__(self) -> T:
        """Return it."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


@dataclass(frozen=True, slots=True)
class Clients:
    """What requests are made with; replaced as a whole when credentials are renewed.

    Attributes:
        generation: Counts the renewals.
        reader: For reading up to WHOLE_BLOB_BYTES, and for bodies up to QUICK_BODY_BYTES. Keys are
            below the prefix.
        patient: Makes one for reading so many bytes at once; keys as for the reader. It costs 8 ms.
        writer: For larger bodies; keys as for the reader. Making it costs 8 ms.
        boto: Keys are whole. Making it costs 300 ms.
    """

    generation: int
    reader: obstore.store.S3Store
    patient: Callable[[int], obstore.store.S3Store]
    writer: Lazily[obstore.store.S3Store]
    boto: "Lazily[S3Client]"

    def reader_of(self, length: int) -> obstore.store.S3Store:
        """Return what so many bytes are read with: a client has one time limit for all requests."""
        return self.reader if length <= WHOLE_BLOB_BYTES else self.patient(length)


class Access:
    """Everything that requests to one bucket need.

    Args:
        bucket: Its name.
        prefix: The root prefix; may be empty, and have slashes anywhere.
        environment: AWS variables; what botocore resolves by itself, such as container roles, it
            takes from the process's own environment.
        policy: For the timeouts.
        account_id: 12 digits; empty if it is known to be unknown; None to find out.
        keys: As Credentials has them.
        credentials: What was found already, or Anonymous; None to look for them.
        spare_checksums: Whether servers that are not AWS's are spared the checksums that botocore
            sends and wants by itself, since some refuse the coding of bodies that goes with them.
            Bodies are signed as a whole then.

    Raises:
        SettingsInvalidError: Bucket, prefix, endpoint, account or profile make no sense.
        StoreAccessError: There are no credentials.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        environment: Mapping[str, str],
        policy: RetryPolicy,
        account_id: str | None,
        keys: Keys | None = None,
        credentials: Credentials | Anonymous | None = None,
        spare_checksums: bool = False,
    ) -> None:
        self._environment = environment
        self._policy = policy
        self._spare_checksums = spare_checksums
        self._lock = threading.Lock()
        self.location = locate(bucket, prefix, environment)
        self._credentials: Credentials | Anonymous = credentials or Credentials(environment, keys)
        # Those that were found once are of no use when they are refused.
        self._find_keys = None if isinstance(keys, Mapping) else keys
        if account_id is None:
            account_id = resolve_account_id(environment, self.location, self._credentials)
            if not account_id:
                log.info(events.OWNER_UNKNOWN, extra={"bucket": bucket})
        self.account_id = _checked_account(account_id) if account_id else ""
        self.clients = self._make_clients(0)

    def beside(self, bucket: str, *, account_id: str, region: str = "") -> "Access":
        """Return the access of the same identity to all of another bucket, or of this one.

        Args:
            bucket: Its name.
            account_id: Its expected owner; empty if anybody may own it.
            region: Where it is; empty for the region of this one.

        Raises:
            SettingsInvalidError: That is not a bucket's name.
        """
        environment = {**self._environment, **({"AWS_REGION": region} if region else {})}
        return Access(
            bucket,
            "",
            environment=environment,
            policy=self._policy,
            account_id=account_id,
            credentials=self._credentials,
            spare_checksums=True,
        )

    @property
    def expiry(self) -> float | None:
        """When the credentials of this moment end, seconds since the epoch; None if unknown."""
        return self._credentials.expiry

    @property
    def is_anonymous(self) -> bool:
        """Whether requests are not signed."""
        return isinstance(self._credentials, Anonymous)

    @property
    def owner(self) -> dict[str, str]:
        """What every call of boto3 is given besides, to name the bucket's expected owner."""
        return {"ExpectedBucketOwner": self.account_id} if self.account_id else {}

    @property
    def boto_silence(self) -> float:
        """Seconds after which a request through boto3 ends while nothing moves."""
        return self._policy.connect_timeout + self._policy.read_timeout + _BOTO_PATIENCE_SECONDS

    def silence(self, body_bytes: int = 0) -> float:
        """Return the seconds after which a request through obstore ends while nothing moves."""
        patience = UPLOAD_PATIENCE_SECONDS if body_bytes > QUICK_BODY_BYTES else 0.0
        return self._policy.connect_timeout + self._policy.read_timeout + patience

    def renew(self, clients: Clients) -> bool:
        """Read the credentials anew; False if they are fixed, so that it would change nothing.

        Args:
            clients: Those that were refused; if they were replaced already, that is enough.

        Raises:
            StoreAccessError: There are no credentials any more.
        """
        with self._lock:
            if clients.generation == self.clients.generation:
                if self._credentials.fixed:
                    return False
                self._credentials = Credentials(self._environment, self._find_keys)
                self.clients = self._make_clients(clients.generation + 1)
            return True

    def _make_clients(self, generation: int) -> Clients:
        read_timeout = self._policy.read_timeout
        credentials = self._credentials
        return Clients(
            generation,
            reader=self._obstore(read_timeout, credentials),
            patient=lambda length: self._obstore(read_timeout, credentials, length),
            writer=Lazily(
                lambda: self._obstore(read_timeout + UPLOAD_PATIENCE_SECONDS, credentials)
            ),
            boto=Lazily(lambda: self.boto_client(credentials)),
        )

    def _obstore(
        self,
        read_timeout: float,
        credentials: Credentials | Anonymous,
        most_bytes: int = WHOLE_BLOB_BYTES,
    ) -> obstore.store.S3Store:
        options: ClientConfig = {
            "allow_http": self.location.bucket_url.startswith("http://"),
            "connect_timeout": timedelta(seconds=self._policy.connect_timeout),
            "default_content_type": CONTENT_TYPE,
            "default_headers": (
                {"x-amz-expected-bucket-owner": self.account_id} if self.account_id else {}
            ),
            "http1_only": True,
            "pool_idle_timeout": _IDLE_TIMEOUT,
            "read_timeout": timedelta(seconds=read_timeout),
            # Of a whole request: read_timeout alone lets a store that drips go on for hours.
            "timeout": timedelta(seconds=self._policy.longest(most_bytes)),
            "user_agent": f"propmaster/{__version__}",
        }
        if bundle := self._environment.get("AWS_CA_BUNDLE"):
            options["root_certificate"] = _read_bundle(Path(bundle))
        # obstore's paths can not have empty components, and prefixes may: so the prefix is part of
        # the endpoint, which obstore takes as it is when the style is virtual-hosted.
        prefix = f"/{quote(self.location.prefix)}" if self.location.prefix else ""
        return obstore.store.S3Store(
            self.location.bucket,
            config={
                # obstore reads AWS_ENDPOINT_URL_S3 from the process by itself, and would prefer
                # that to the key `endpoint`.
                "aws_endpoint_url_s3": self.location.bucket_url + prefix,
                "region": self.location.region,
                "virtual_hosted_style_request": True,
                "skip_signature": isinstance(credentials, Anonymous),
                "unsigned_payload": False,
            },
            client_options=options,
            retry_config={"max_retries": 0},
            credential_provider=(
                credentials.provide if isinstance(credentials, Credentials) else None
            ),
        )

    def boto_client(
        self, credentials: Credentials | Anonymous | None = None, **options: object
    ) -> "S3Client":
        """Return a client of boto3 of its own.

        Args:
            credentials: Those of this moment by default.
            **options: Of botocore's Config, besides ours.
        """
        import boto3  # noqa: PLC0415 - 300 ms that most commands do not need
        from botocore import UNSIGNED  # noqa: PLC0415 - as above
        from botocore.config import Config  # noqa: PLC0415 - as above

        credentials = credentials or self._credentials
        if isinstance(credentials, Anonymous):
            options["signature_version"] = UNSIGNED
        if self._spare_checksums and not self.location.is_aws:
            options["request_checksum_calculation"] = "when_required"
            options["response_checksum_validation"] = "when_required"
        config = Config(
            connect_timeout=self._policy.connect_timeout,
            read_timeout=self._policy.read_timeout + _BOTO_PATIENCE_SECONDS,
            retries={"total_max_attempts": 1},
            max_pool_connections=_BOTO_CONNECTIONS,
            s3={"addressing_style": "path" if self.location.endpoint_url else "auto"},
            user_agent_extra=f"propmaster/{__version__}",
        ).merge(Config(**options))  # type: ignore[arg-type]
        return boto3.session.Session(botocore_session=credentials.session()).client(
            "s3",
            region_name=self.location.region,
            endpoint_url=self.location.endpoint_url,
            config=config,
        )


# While the kernel still sends what it has buffered (some MiB), nothing arrives.
_BOTO_PATIENCE_SECONDS: Final = 30.0
_BOTO_CONNECTIONS: Final = 64


def _checked_account(account_id: str) -> str:
    if not _ACCOUNT.fullmatch(account_id):
        raise SettingsInvalidError(
            f"{account_id[:40]!r} is not an account id", hint="AWS_ACCOUNT_ID has 12 digits."
        )
    return account_id


def _read_bundle(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalidError(
            f"the certificates in {path} can not be read: {error}", hint="Check AWS_CA_BUNDLE."
        ) from error
