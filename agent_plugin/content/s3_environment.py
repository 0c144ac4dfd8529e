"""What the environment says of S3: where a bucket is, with which credentials, whose it is.

There is one source of credentials. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY come first, as in
botocore's own chain, and are taken as they are, because importing botocore costs 200 of the 300 ms
that a finish-task may take. Everything else (profiles, credential processes, SSO, containers,
instance roles) is botocore's, which also renews what expires.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from agent_plugin.content.errors import PropmasterError, SettingsInvalidError, StoreAccessError
from agent_plugin.content.flight import Lanes
from agent_plugin.content.s3_errors import error_of_boto

if TYPE_CHECKING:
    import botocore.session
    from botocore.credentials import Credentials as BotoCredentials
    from obstore.store import S3Credential

DEFAULT_REGION: Final = "us-east-1"
# obstore asks the provider again when less than 5 minutes are left; botocore renews 10 to 15
# minutes before expiry. So it asks once a minute, and what it gets is always good for longer.
_CREDENTIALS_LEASE: Final = timedelta(minutes=6)
_METHOD: Final = "custom-process"
_NEVER: Final = "9999-12-31T00:00:00+00:00"
_STS_CONNECT_SECONDS: Final = 1.0
_STS_READ_SECONDS: Final = 2.0
# Looking up a host name knows no timeout.
_STS_TOTAL_SECONDS: Final = 4.0
_PARTITIONS: Final = {"cn-": "amazonaws.com.cn"}
_TRUE: Final = frozenset({"true", "1"})
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html, and the upper case
# and underscores of other servers.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f?#\\]")
# A label of a host name, as botocore has it: a region becomes a part of the server's name, and is
# not only the operator's to say.
_REGION: Final = re.compile(r"(?![0-9]+\Z)(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


# Keys in the form of `keys_of`, or what finds them whenever it is asked.
Keys = Mapping[str, object] | Callable[[], Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Location:
    """A bucket and where it is.

    Attributes:
        bucket: Its name.
        prefix: The queue's root prefix; keys are `prefix + "/" + …`, whatever slashes it has.
        region: Used in signatures.
        endpoint_url: What the environment or profile sets, None for AWS's own.
        bucket_url: Where the bucket is, without a trailing slash.
    """

    bucket: str
    prefix: str
    region: str
    endpoint_url: str | None
    bucket_url: str

    def key(self, below: str) -> str:
        """Return the whole key of what is stored below the prefix."""
        return f"{self.prefix}/{below}" if self.prefix else below

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    @property
    def is_aws(self) -> bool:
        """Whether it is AWS's own S3, which knows what other servers do not."""
        host = urlsplit(self.bucket_url).hostname or ""
        return host.endswith((".amazonaws.com", *_PARTITIONS.values()))


class Credentials:
    """Keys from the environment, or botocore's chain.

    Args:
        environment: AWS variables.
        keys: What `keys_of` has found elsewhere, and then the chain is asked when they expire; or
            what is asked for keys, then and to begin with.

    Attributes:
        fixed: Whether reading them again would give the same.

    Raises:
        StoreAccessError: There are none.
        SettingsInvalidError: The profile or its file makes no sense.
    """

    def __init__(self, environment: Mapping[str, str], keys: Keys | None = None) -> None:
        self._environment = environment
        self.fixed = bool(
            environment.get("AWS_ACCESS_KEY_ID") and environment.get("AWS_SECRET_ACCESS_KEY")
        )
        self._chain: BotoCredentials | None = None
        if not self.fixed:
            session = _botocore_session(environment)
            if keys is not None:
                _provide(session, environment, keys)
            with boto_errors("find credentials"):
                self._chain = session.get_credentials()
            self.provide()

    def provide(self) -> "S3Credential":
        """Return the keys of this moment, as obstore wants them.

        Raises:
            StoreAccessError: There are none, or they can not be renewed.
        """
        if self.fixed:
            return {
                "access_key_id": self._environment["AWS_ACCESS_KEY_ID"],
                "secret_access_key": self._environment["AWS_SECRET_ACCESS_KEY"],
                "token": self._environment.get("AWS_SESSION_TOKEN") or None,
                "expires_at": None,
            }
        if self._chain is None:
            raise _none_found()
        from botocore.credentials import RefreshableCredentials  # noqa: PLC0415 - is loaded by now

        with boto_errors("read credentials"):
            keys = self._chain.get_frozen_credentials()
        if keys.access_key is None or keys.secret_key is None:
            raise _none_found()
        renewed = isinstance(self._chain, RefreshableCredentials)
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LEASE if renewed else None,
        }

    @property
    def source(self) -> str:
        """Where the keys come from, for people; never the keys."""
        if self._chain is None:
            return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return f"{self._chain.method}, found by botocore"

    @property
    def account_id(self) -> str | None:
        """The account as far as the credentials themselves know it."""
        if named := self._environment.get("AWS_ACCOUNT_ID"):
            return named
        if self._chain is None:
            return None
        with boto_errors("read credentials"):
            # Older versions of botocore do not know it.
            return getattr(self._chain.get_frozen_credentials(), "account_id", None)

    @property
    def expiry(self) -> float | None:
        """When the keys of this moment end, seconds since the epoch; None if nobody says.

        Of keys in variables AWS_CREDENTIAL_EXPIRATION says it, if whoever set them was so kind:
        https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
        """
        if self._chain is not None:
            # botocore has no other way to tell.
            expiry = getattr(self._chain, "_expiry_time", None)
            return None if expiry is None else float(expiry.timestamp())
        try:
            said = datetime.fromisoformat(self._environment.get("AWS_CREDENTIAL_EXPIRATION", ""))
        except ValueError:
            return None
        return said.timestamp() if said.tzinfo else None

    def session(self) -> "botocore.session.Session":
        """Return a botocore session with these credentials, a new one each time.

        What boto3 adds to a session it may add only once, so each client needs one of its own.
        """
        session = _botocore_session(self._environment)
        if self._chain is not None:
            _find_always(session, self._chain)
            return session
        session.set_credentials(
            self._environment["AWS_ACCESS_KEY_ID"],
            self._environment["AWS_SECRET_ACCESS_KEY"],
            self._environment.get("AWS_SESSION_TOKEN"),
        )
        return session


class Anonymous:
    """No keys: what is asked is not signed, which is enough for what everybody may read."""

    fixed = True
    account_id = None
    expiry = None
    source = "nowhere: requests are not signed"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def session(self) -> "botocore.session.Session":
        """Return a botocore session, in which nobody has looked for credentials."""
        return _botocore_session(self._environment)


def keys_of(environment: Mapping[str, str]) -> dict[str, object]:
    """Return the keys of this moment in the form that a credential process prints.

    Raises:
        StoreAccessError: There are none.
        SettingsInvalidError: The profile or its file makes no sense.

    Source: https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html
    """
    keys = Credentials(environment).session().get_credentials()
    if keys is None:
        raise _none_found()
    with boto_errors("read credentials"):
        frozen = keys.get_frozen_credentials()
    # Of keys that expire, which botocore has no other way to tell.
    expiry = getattr(keys, "_expiry_time", None)
    return {
        "Version": 1,
        "AccessKeyId": frozen.access_key,
        "SecretAccessKey": frozen.secret_key,
        **({"SessionToken": frozen.token} if frozen.token else {}),
        **({"Expiration": expiry.isoformat()} if expiry is not None else {}),
    }


def _provide(
    session: "botocore.session.Session",
    environment: Mapping[str, str],
    keys: Keys,
) -> None:
    """Give a session keys that were found elsewhere, and what they are renewed by."""
    from botocore.credentials import RefreshableCredentials  # noqa: PLC0415 - see the module

    find = partial(keys_of, environment) if isinstance(keys, Mapping) else keys
    chain = RefreshableCredentials.create_from_metadata(
        _metadata(keys if isinstance(keys, Mapping) else keys()),
        refresh_using=lambda: _metadata(find()),
        method=_METHOD,
    )
    _find_always(session, chain)


def _find_always(session: "botocore.session.Session", keys: "BotoCredentials") -> None:
    """Have a session look nowhere else for keys; they renew themselves if they can."""
    from botocore.credentials import (  # noqa: PLC0415 - see the module
        CredentialProvider,
        CredentialResolver,
    )

    class Found(CredentialProvider):
        METHOD = CANONICAL_NAME = _METHOD

        def load(self) -> "BotoCredentials":
            return keys

    session.register_component("credential_provider", CredentialResolver([Found()]))


def _metadata(keys: Mapping[str, object]) -> dict[str, object]:
    """Return keys as botocore's renewal wants them."""
    return {
        "access_key": keys["AccessKeyId"],
        "secret_key": keys["SecretAccessKey"],
        "token": keys.get("SessionToken"),
        "expiry_time": keys.get("Expiration", _NEVER),
    }


def region_of(environment: Mapping[str, str]) -> str | None:
    """Return the region that variables or profile say.

    Raises:
        SettingsInvalidError: The profile or its file makes no sense.
    """
    named = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if named or "region" not in _config_text(environment):
        return named
    with boto_errors("read the AWS configuration"):
        region: str | None = _botocore_session(environment).get_config_variable("region")
        return region


def endpoint_of(environment: Mapping[str, str]) -> str:
    """Return the endpoint that variables or profile say, as they say it; empty for AWS's own.

    Raises:
        SettingsInvalidError: The profile or its file makes no sense.
    """
    return _region_and_endpoint(environment)[1] or ""


def preload() -> None:
    """Load the S3 libraries, for a process whose children need them; starts no thread."""
    import boto3.session  # noqa: F401, PLC0415 - see the module
    import botocore.config  # noqa: PLC0415
    import botocore.credentials  # noqa: F401, PLC0415
    import obstore.store  # noqa: F401, PLC0415


def _none_found() -> StoreAccessError:
    return StoreAccessError(
        "there are no AWS credentials",
        hint="Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    )


def locate(bucket: str, prefix: str, environment: Mapping[str, str]) -> Location:
    """Return where a bucket is, by the same variables and files as the AWS tools.

    Raises:
        SettingsInvalidError: Bucket, prefix, region or endpoint make no sense, or a file can not be
            read.
    """
    if not _BUCKET.fullmatch(bucket):
        raise SettingsInvalidError(
            f"{bucket[:100]!r} is not a bucket name",
            hint="A bucket has 3 to 63 letters, digits, dots, hyphens.",
        )
    if _CONTROL.search(prefix) or {".", ".."} & set(prefix.split("/")):
        raise SettingsInvalidError(
            f"{prefix[:100]!r} is not a root prefix",
            hint="Use letters, digits, hyphens, underscores and slashes.",
        )
    region, endpoint = _region_and_endpoint(environment)
    if not _REGION.fullmatch(region):
        raise SettingsInvalidError(
            f"{region[:100]!r} is no region", hint="AWS_REGION is like us-west-2"
        )
    if endpoint is None:
        bucket_url = _aws_bucket_url(bucket, region, environment)
    else:
        if not _is_endpoint(endpoint):
            raise SettingsInvalidError(
                f"{endpoint[:200]!r} is not an endpoint",
                hint="AWS_ENDPOINT_URL_S3 is like https://s3.example.com:9000",
            )
        bucket_url = f"{endpoint.rstrip('/')}/{bucket}"
    return Location(bucket, prefix, region, endpoint, bucket_url)


def _is_endpoint(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        # Reading the port is what checks it.
        is_sound = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_sound and parts.scheme in ("http", "https") and not parts.query


def resolve_account_id(
    environment: Mapping[str, str], location: Location, credentials: Credentials | Anonymous
) -> str:
    """Return the account that the credentials belong to; empty if that can not be found out.

    In this order: AWS_ACCOUNT_ID, the credentials, STS GetCallerIdentity, which is asked once and
    for 4 s at most. STS is not asked about a store that is not AWS's, unless it has its own.

    Raises:
        StoreAccessError: The credentials can not be read.
    """
    if account := credentials.account_id:
        return account
    if not _sts_endpoint(environment) and not location.is_aws:
        return ""
    asked = Lanes(1).submit(lambda: _ask_sts(environment, location.region, credentials))
    try:
        return asked.result(timeout=_STS_TOTAL_SECONDS)
    except (PropmasterError, TimeoutError):
        return ""


def _ask_sts(
    environment: Mapping[str, str], region: str, credentials: Credentials | Anonymous
) -> str:
    import boto3  # noqa: PLC0415 - 300 ms that most commands do not need
    from botocore.config import Config  # noqa: PLC0415 - as above

    with boto_errors("ask STS for the account"):
        sts = boto3.session.Session(botocore_session=credentials.session()).client(
            "sts",
            region_name=region,
            endpoint_url=_sts_endpoint(environment),
            config=Config(
                connect_timeout=_STS_CONNECT_SECONDS,
                read_timeout=_STS_READ_SECONDS,
                retries={"total_max_attempts": 1},
            ),
        )
        return sts.get_caller_identity()["Account"]


def _sts_endpoint(environment: Mapping[str, str]) -> str | None:
    if _ignores_endpoints(environment):
        return None
    return environment.get("AWS_ENDPOINT_URL_STS") or environment.get("AWS_ENDPOINT_URL")


def _ignores_endpoints(environment: Mapping[str, str]) -> bool:
    return environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() in _TRUE


@contextmanager
def boto_errors(what: str) -> Iterator[None]:
    """Raise errors of ours for what boto3 raises inside.

    Args:
        what: The request in words, naming bucket and key.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - 200 ms, see above
    from botocore.parsers import ResponseParserError  # noqa: PLC0415 - as above

    try:
        yield
    except (BotoCoreError, ClientError, ResponseParserError) as error:
        raise error_of_boto(error, what) from error


def _botocore_session(environment: Mapping[str, str]) -> "botocore.session.Session":
    import botocore.session  # noqa: PLC0415 - 200 ms, not needed for keys from the environment

    session = botocore.session.Session()
    for variable, name in (
        ("profile", "AWS_PROFILE"),
        ("config_file", "AWS_CONFIG_FILE"),
        ("credentials_file", "AWS_SHARED_CREDENTIALS_FILE"),
    ):
        if value := environment.get(name):
            session.set_config_variable(variable, value)
    return session


def _region_and_endpoint(environment: Mapping[str, str]) -> tuple[str, str | None]:
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if ignore := _ignores_endpoints(environment):
        endpoint = None
    config = _config_text(environment)
    # The file is searched for the words first: reading it properly needs botocore.
    if (region is None and "region" in config) or (
        endpoint is None and not ignore and "endpoint_url" in config
    ):
        with boto_errors("read the AWS configuration"):
            session = _botocore_session(environment)
            region = region or session.get_config_variable("region")
            if not (ignore or session.get_config_variable("ignore_configured_endpoint_urls")):
                endpoint = endpoint or _profile_endpoint(session)
    return region or DEFAULT_REGION, endpoint


def _profile_endpoint(session: "botocore.session.Session") -> str | None:
    # https://docs.aws.amazon.com/sdkref/latest/guide/feature-ss-endpoints.html
    profile = session.get_scoped_config()
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    of_s3 = services.get("s3", {})
    return (of_s3.get("endpoint_url") if isinstance(of_s3, dict) else None) or profile.get(
        "endpoint_url"
    )


def _config_text(environment: Mapping[str, str]) -> str:
    path = Path(environment.get("AWS_CONFIG_FILE") or "~/.aws/config")
    try:
        return path.expanduser().read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError, RuntimeError):
        return ""
    except OSError as error:
        raise SettingsInvalidError(
            f"{path} can not be read: {error.strerror}", hint="Check AWS_CONFIG_FILE."
        ) from error


def _aws_bucket_url(bucket: str, region: str, environment: Mapping[str, str]) -> str:
    domain = next(
        (name for start, name in _PARTITIONS.items() if region.startswith(start)), "amazonaws.com"
    )
    service = "s3"
    if environment.get("AWS_USE_FIPS_ENDPOINT", "").lower() in _TRUE:
        service += "-fips"
    if environment.get("AWS_USE_DUALSTACK_ENDPOINT", "").lower() in _TRUE:
        service += ".dualstack"
    host = f"{service}.{region}.{domain}"
    # A wildcard certificate does not cover further dots.
    return f"https://{host}/{bucket}" if "." in bucket else f"https://{bucket}.{host}"
