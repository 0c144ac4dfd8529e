"""Any bucket at one endpoint, asked as one identity, and what is at its keys.

A bucket is asked where it is: at AWS that may be another region than the one that is set, which
boto3 finds out by itself and obstore does not.

Concurrency: any thread may call anything; the requests to a bucket are made once, under a lock.
"""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.errors import (
    ObjectNotFoundError,
    SettingsInvalidError,
    StoreAccessError,
)
from agent_plugin.content.flight import AdaptiveLimit, Lanes
from agent_plugin.content.objects import ObjectAccess, ObjectInfo, checked_key, object_url
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_access import Access
from agent_plugin.content.s3_environment import Anonymous, Credentials, endpoint_of
from agent_plugin.content.s3_errors import ObjectAbsentError
from agent_plugin.content.s3_requests import Requests, told
from agent_plugin.content.store import Cancellation

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

T = TypeVar("T")

# Requests under way at once, to all buckets together.
REQUESTS: Final = 64
# What a delete marker answers to who asks for it by its version:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/DeleteMarker.html
_NOT_ALLOWED: Final = 405
_KEYS: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CREDENTIAL_EXPIRATION",
    "AWS_ACCOUNT_ID",
)


def environment_of(access: ObjectAccess, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the AWS variables by which an access is made, in an environment."""
    changed = dict(environment)
    if access.profile:
        # Whoever names a profile wants its keys, and variables would come first.
        for name in _KEYS:
            changed.pop(name, None)
        changed["AWS_PROFILE"] = access.profile
    if access.region:
        changed["AWS_REGION"] = access.region
    if access.endpoint:
        changed["AWS_ENDPOINT_URL_S3"] = access.endpoint
        changed.pop("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", None)
    return changed


class Buckets:
    """The buckets that one identity sees at one endpoint.

    Args:
        access: Which identity, and which endpoint.
        environment: AWS variables.
        policy: When requests are sent again.
        bandwidth: How much may move.
        like: Whose credentials are taken instead, and whose bucket has its owner.

    Raises:
        SettingsInvalidError: Profile or endpoint make no sense.
        StoreAccessError: There are no credentials.
    """

    def __init__(
        self,
        access: ObjectAccess,
        *,
        environment: Mapping[str, str],
        policy: RetryPolicy,
        bandwidth: Bandwidth,
        like: Access | None = None,
    ) -> None:
        self.policy = policy
        self.bandwidth = bandwidth
        self.lanes = Lanes(REQUESTS)
        self._limit = AdaptiveLimit(REQUESTS)
        self._access = access
        self._environment = environment_of(access, environment)
        self._like = like
        self._credentials: Credentials | Anonymous | None = None
        if like is None:
            self._credentials = (
                Anonymous(self._environment) if access.anonymous else Credentials(self._environment)
            )
        self._lock = threading.Lock()
        self._requests: dict[str, Requests] = {}
        self._signers: dict[str, S3Client] = {}

    @property
    def endpoint(self) -> str:
        """URL of the server, without a slash at its end; empty for AWS's own."""
        if self._like is not None:
            endpoint = self._like.location.endpoint_url or ""
        else:
            endpoint = endpoint_of(self._environment)
        return endpoint.rstrip("/")

    def of(self, bucket: str) -> Requests:
        """Return what requests to a bucket are made with; keys are whole there.

        Raises:
            SettingsInvalidError: That is not a bucket's name.
        """
        with self._lock:
            found = self._requests.get(bucket)
            if found is None:
                found = self._requests[bucket] = Requests(
                    self._open(bucket),
                    policy=self.policy,
                    limit=self._limit,
                    bandwidth=self.bandwidth,
                )
            return found

    def boto(
        self,
        bucket: str,
        ask: "Callable[[S3Client, dict[str, Any]], T]",
        what: str,
        cancellation: Cancellation | None = None,
        *,
        sends: int = 0,
    ) -> T:
        """As `Requests.boto`, to a bucket."""
        return self.of(bucket).boto(ask, what, cancellation, sends=sends)

    def head(
        self,
        bucket: str,
        key: str,
        *,
        version: str = "",
        cancellation: Cancellation | None = None,
    ) -> "HeadObjectOutputTypeDef":
        """Return what the store says of an object.

        Raises:
            ObjectNotFoundError: It is not there, or a delete marker is.
            UnsafePathError: No object can have that key.
        """
        requests = self.of(bucket)
        place = object_url(bucket, checked_key(key))
        what = f"head {place}"
        names: dict[str, Any] = {"Key": key, **({"VersionId": version} if version else {})}

        def ask(client: "S3Client", common: dict[str, Any]) -> "HeadObjectOutputTypeDef":
            from botocore.exceptions import ClientError  # noqa: PLC0415 - loaded with the client

            try:
                answer = client.head_object(**common, **names, ChecksumMode="ENABLED")
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == _NOT_ALLOWED:
                    raise ObjectAbsentError(f"{what}: a delete marker") from error
                raise
            told(answer, "LastModified", what)
            return answer

        try:
            return requests.boto(ask, what, cancellation)
        except ObjectAbsentError as error:
            self._insist_bucket(requests, names, what, cancellation)
            raise ObjectNotFoundError(
                f"{place}: there is no such object",
                hint="Check bucket and key, and whether it was deleted.",
            ) from error

    def presign(self, info: ObjectInfo, seconds: int) -> str:
        """Return a URL by which anybody may get an object for a time.

        Raises:
            StoreAccessError: The access is anonymous.
        """
        access = self.of(info.bucket).access
        if access.is_anonymous:
            raise StoreAccessError(
                f"{info.url}: without credentials no link can be signed",
                hint="Use an access that is not anonymous.",
            )
        with self._lock:
            if info.bucket not in self._signers:
                # By default boto3 signs links as version 2, which most servers refuse.
                client = access.boto_client(signature_version="s3v4")
                self._signers[info.bucket] = client
        return self._signers[info.bucket].generate_presigned_url(
            "get_object",
            Params={
                "Bucket": info.bucket,
                "Key": info.key,
                **({"VersionId": info.version} if info.version else {}),
            },
            ExpiresIn=seconds,
        )

    def _open(self, bucket: str) -> Access:
        if self._like is not None:
            same = bucket == self._like.location.bucket
            return self._like.beside(bucket, account_id=self._like.account_id if same else "")
        access = Access(
            bucket,
            "",
            environment=self._environment,
            policy=self.policy,
            # Who names a bucket may mean anybody's, and often a public one.
            account_id="",
            credentials=self._credentials,
            spare_checksums=True,
        )
        if access.location.endpoint_url is None and not self._access.region:
            region = region_of_bucket(access)
            if region and region != access.location.region:
                return access.beside(bucket, account_id="", region=region)
        return access

    def _insist_bucket(
        self,
        requests: Requests,
        names: Mapping[str, Any],
        what: str,
        cancellation: Cancellation | None,
    ) -> None:
        """See that it is the object which is missing: an answer to HEAD has no words for it."""
        if requests.bucket_seen:
            return

        def ask(client: "S3Client", common: dict[str, Any]) -> None:
            client.get_object(**common, **names, Range="bytes=0-0")["Body"].close()

        try:
            requests.boto(ask, what, cancellation)
        except ObjectAbsentError:
            requests.bucket_seen = True


def region_of_bucket(access: Access) -> str:
    """Return the region in which a bucket is; empty if nobody says.

    S3 says it in its answers, also where it refuses something:
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadBucket.html
    """
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - 200 ms

    try:
        answer = access.clients.boto().head_bucket(Bucket=access.location.bucket)
        said: Mapping[str, Any] = answer["ResponseMetadata"]
    except ClientError as error:
        said = error.response.get("ResponseMetadata", {})
    except BotoCoreError:
        # Whatever it is, the request that is wanted will tell it, and be sent again.
        return ""
    return str(said.get("HTTPHeaders", {}).get("x-amz-bucket-region", ""))


def checked_seconds(seconds: int, most: int) -> int:
    """Return for how long a link is to be good, at most so long.

    Raises:
        SettingsInvalidError: That is no time at all.
    """
    if seconds < 1:
        raise SettingsInvalidError(
            f"a link can not be good for {seconds} s", hint="Ask for 1 s to 7 days."
        )
    return min(seconds, most)
