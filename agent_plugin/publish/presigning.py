"""Links that give result files to whoever has them, until a time that is told as it is.

A link is signed with the keys of whoever makes it, and dies with them: keys of a role live for some
hours, whatever was asked for. Of plain objects each has a link of its own; of a bucket with
versions it is to the version that there was.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Final

import msgspec

from agent_plugin.content.errors import SettingsInvalidError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.objects import ObjectInfo
from agent_plugin.content.s3_objects import S3Objects
from agent_plugin.content.s3_store import S3Store
from agent_plugin.publish.published import PublishedResult
from agent_plugin.publish.result_documents import ResultParams
from agent_plugin.transfer.asking import Asking

# S3's limit for a signed URL:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-presigned-url.html
MAX_SECONDS: Final = 7 * 24 * 3600

_DURATION: Final = re.compile(
    r"(?:(?P<d>[0-9]{1,6})d)?(?:(?P<h>[0-9]{1,6})h)?(?:(?P<m>[0-9]{1,6})m)?(?:(?P<s>[0-9]{1,6})s)?"
)
_UNIT_SECONDS: Final = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


class PresignedParams(msgspec.Struct, frozen=True):
    """A link, and the object that it is to, as an input source."""

    presigned_url: str = msgspec.field(name="PreSignedURL")
    source_spec: ResultParams = msgspec.field(name="SourceSpec")


class PresignedResult(msgspec.Struct, frozen=True, kw_only=True):
    """A signed result in the form of Bacalhau's, with what is needed to use it.

    Attributes:
        type: Always `s3PreSigned`.
        execution: Whose result it is.
        path: In the execution's results; of an archive its name.
        expires: When the link ends, seconds since the epoch.
    """

    type: str = msgspec.field(name="Type", default="s3PreSigned")
    params: PresignedParams = msgspec.field(name="Params")
    execution: str = msgspec.field(name="ExecutionID")
    path: str = msgspec.field(name="Path")
    expires: float = msgspec.field(name="Expires")


def parse_duration(text: str) -> int:
    """Return the seconds that a duration such as `1h`, `30m` or `1d12h` says.

    Raises:
        ValueError: It is none, or not of 1 second to 7 days.
    """
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise ValueError(f"{text!r} is no duration; it is like 30m, 12h, 7d or 1h30m")
    seconds = sum(
        int(number) * _UNIT_SECONDS[unit] for unit, number in match.groupdict().items() if number
    )
    if not 1 <= seconds <= MAX_SECONDS:
        raise ValueError(f"{text!r} is not between 1s and 7d, which is what S3 allows")
    return seconds


def presign(published: PublishedResult, seconds: int, asking: Asking) -> list[PresignedResult]:
    """Return a link to each object of a result.

    Args:
        published: The result.
        seconds: For how long they are to work, 1 to MAX_SECONDS; the keys may end earlier.
        asking: Whose threads sign: temporary keys may have to be renewed.

    Raises:
        StoreAccessError: There are no keys to sign with.
    """
    endpoint, region = published.result.params.endpoint, published.result.params.region
    signed = []
    for found in published.found:
        url, expires = _sign(published.objects, found.info, seconds, asking)
        spec = ResultParams(
            bucket=found.info.bucket,
            key=found.info.key,
            endpoint=endpoint,
            region=region,
            version_id=found.info.version,
            checksum_sha256=published.result.params.checksum_sha256 if found.is_archive else "",
        )
        signed.append(
            PresignedResult(
                params=PresignedParams(url, spec),
                execution=published.execution,
                path=found.path,
                expires=expires,
            )
        )
    return signed


def presign_files(
    execution: str, files: Mapping[str, FileEntry], seconds: int, asking: Asking
) -> list[PresignedResult]:
    """Return a link to each file of an execution that is in the store itself, by its content.

    Args:
        execution: The execution.
        files: Its files by their path in its results.
        seconds: As for `presign`.
        asking: Of the store.

    Raises:
        SettingsInvalidError: The store is a directory, which nobody can be given a link to.
        BlobNotFoundError: The store lacks one.
        StoreAccessError: There are no keys to sign with.
    """
    store = asking.ask(lambda opened: opened)
    if not isinstance(store, S3Store):
        raise SettingsInvalidError(
            f"{store.url} is a directory: there are no links to its files",
            hint="links are to results that were published to S3, or are in a store in S3",
        )
    infos = asking.ask_each(lambda _store, entry: store.object_of(entry.digest), [*files.values()])
    signed = []
    for path, info in zip(files, infos, strict=True):
        url, expires = _sign(store.objects, info, seconds, asking)
        spec = ResultParams(bucket=info.bucket, key=info.key, version_id=info.version)
        signed.append(
            PresignedResult(
                params=PresignedParams(url, spec), execution=execution, path=path, expires=expires
            )
        )
    return signed


def _sign(objects: S3Objects, info: ObjectInfo, seconds: int, asking: Asking) -> tuple[str, float]:
    return asking.lanes.run(partial(objects.presign, info, seconds), asking.cancellation)
