"""Objects deleted, many by one request where the server can do that."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from agent_plugin.content.errors import StoreProtocolError
from agent_plugin.content.objects import object_url
from agent_plugin.content.s3_buckets import Buckets
from agent_plugin.content.s3_errors import UnsupportedByStoreError
from agent_plugin.content.s3_requests import told

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

# https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html
DELETED_AT_ONCE: Final = 1000


def delete(buckets: Buckets, bucket: str, keys: Sequence[str]) -> None:
    """Delete the newest versions of objects; see S3Objects.delete."""
    # XML can not hold control characters.
    several = [key for key in keys if key.isprintable()]
    single = [key for key in keys if not key.isprintable()]
    for start in range(0, len(several), DELETED_AT_ONCE):
        some = several[start : start + DELETED_AT_ONCE]
        try:
            _delete_several(buckets, bucket, some)
        except UnsupportedByStoreError:
            single += some
    for key in single:
        _delete_one(buckets, bucket, key)


def _delete_several(buckets: Buckets, bucket: str, keys: Sequence[str]) -> None:
    what = f"delete {len(keys)} objects of {bucket}"

    def ask(client: "S3Client", common: dict[str, Any]) -> "list[Any]":
        # Not quietly: then the answer to a success would be like none at all.
        answer = client.delete_objects(**common, Delete={"Objects": [{"Key": key} for key in keys]})
        failed = answer.get("Errors", [])
        if not failed:
            told(answer, "Deleted", what)
        return failed

    failed = buckets.boto(bucket, ask, what)
    if failed:
        key, code = failed[0].get("Key", ""), failed[0].get("Code", "")
        raise StoreProtocolError(
            f"{len(failed)} of {len(keys)} objects could not be deleted,"
            f" {object_url(bucket, key)} for one: {code}",
            hint="Check the identity's rights (s3:DeleteObject).",
        )


def _delete_one(buckets: Buckets, bucket: str, key: str) -> None:
    buckets.boto(
        bucket,
        lambda client, common: client.delete_object(**common, Key=key),
        f"delete {object_url(bucket, key)}",
    )
