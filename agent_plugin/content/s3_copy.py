"""Copies that the store makes by itself: no byte of them comes here.

An object is copied by one request, or in parts if it is large, on the condition that it is still
the one that was looked at, and that the key is free unless overwriting is allowed. When a condition
does not hold, the store does not say which one in every case, so both objects are looked at.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from agent_plugin.content.errors import ObjectNotFoundError, StoreUnavailableError
from agent_plugin.content.objects import ObjectInfo, Unfinished, archive_of, object_url
from agent_plugin.content.s3_access import CONTENT_TYPE
from agent_plugin.content.s3_buckets import Buckets
from agent_plugin.content.s3_errors import (
    ConditionRacedError,
    ObjectAbsentError,
    ObjectExistsError,
    UnsupportedByStoreError,
)
from agent_plugin.content.s3_multipart import (
    PartSizes,
    Target,
    info_of_answer,
    insist_absent,
    make_of_parts,
)
from agent_plugin.content.s3_ranges import changed
from agent_plugin.content.s3_requests import told
from agent_plugin.content.s3_upload import Upload, key_exists
from agent_plugin.content.store import Cancellation, Progress

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, CopyObjectOutputTypeDef

_HEADERS: Final = (
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "Expires",
)
# What one request copies along, and an object made of parts has to be given.
_KEPT: Final = (*_HEADERS, "ContentType", "Metadata")


def copy(
    buckets: Buckets,
    info: ObjectInfo,
    bucket: str,
    key: str,
    *,
    sizes: PartSizes,
    overwrite: bool,
    metadata: Mapping[str, str] | None,
    content_type: str,
    cancellation: Cancellation,
    progress: Progress,
    unfinished: Unfinished | None,
) -> ObjectInfo:
    """Copy an object; see S3Objects.copy."""
    made = _Copy(buckets, info, bucket, key, overwrite=overwrite, cancellation=cancellation)
    if info.size >= max(1, sizes.copy_from):
        headers = buckets.lanes.run(partial(made.headers, metadata, content_type), cancellation)
        return made.in_parts(sizes, headers, progress, unfinished)
    copied = buckets.lanes.run(partial(made.at_once, metadata, content_type), cancellation)
    progress(info.size)
    return copied


class _Copy:
    """One copy.

    Args:
        buckets: Both source and destination.
        info: The source.
        bucket, key: The destination.
        overwrite: Whether what is there may be replaced.
        cancellation: Checked between requests.
    """

    def __init__(
        self,
        buckets: Buckets,
        info: ObjectInfo,
        bucket: str,
        key: str,
        *,
        overwrite: bool,
        cancellation: Cancellation,
    ) -> None:
        self._buckets = buckets
        self._info = info
        self._bucket = bucket
        self._key = key
        self._overwrite = overwrite
        self._cancellation = cancellation
        self._what = f"copy {info.url} to {object_url(bucket, key)}"
        owner = buckets.of(info.bucket).access.account_id
        self._source: dict[str, Any] = {
            "CopySource": {
                "Bucket": info.bucket,
                "Key": info.key,
                **({"VersionId": info.version} if info.version else {}),
            },
            **({"CopySourceIfMatch": info.etag} if info.etag else {}),
            **({"ExpectedSourceBucketOwner": owner} if owner else {}),
        }

    def at_once(self, metadata: Mapping[str, str] | None, content_type: str) -> ObjectInfo:
        """Copy by one request."""
        changes: dict[str, Any] = {"MetadataDirective": "COPY"}
        if metadata is not None or content_type:
            changes = {"MetadataDirective": "REPLACE", **self.headers(metadata, content_type)}
        condition: dict[str, Any] = {} if self._overwrite else {"IfNoneMatch": "*"}
        try:
            answer = self._ask(changes, condition)
        except UnsupportedByStoreError:
            if not condition:
                raise
            insist_absent(self._buckets, self._bucket, self._key, self._cancellation)
            answer = self._ask(changes, {})
        result = answer["CopyObjectResult"]
        modified = result.get("LastModified")
        return info_of_answer(
            self._bucket,
            self._key,
            self._info.size,
            {**answer, "ETag": result.get("ETag", "")},
            modified.timestamp() if isinstance(modified, datetime) else self._info.modified,
        )

    def in_parts(
        self,
        sizes: PartSizes,
        headers: Mapping[str, Any],
        progress: Progress,
        unfinished: Unfinished | None,
    ) -> ObjectInfo:
        """Copy part by part."""
        target = Target(
            self._bucket,
            self._key,
            headers,
            self._overwrite,
            self._info.size,
            sizes.to_copy(self._info.size),
            sizes.copies,
        )
        make_of_parts(
            self._buckets,
            target,
            self._part,
            cancellation=self._cancellation,
            progress=progress,
            unfinished=unfinished,
        )
        return self._buckets.lanes.run(
            lambda: info_of_head(
                self._bucket,
                self._key,
                self._buckets.head(self._bucket, self._key, cancellation=self._cancellation),
            ),
            self._cancellation,
        )

    def headers(self, metadata: Mapping[str, str] | None, content_type: str) -> dict[str, Any]:
        """Return what the copy is to have, as boto3 names it."""
        if metadata is not None:
            return {"ContentType": content_type or CONTENT_TYPE, "Metadata": dict(metadata)}
        head = self._head_of_source()
        kept = {name: head[name] for name in _KEPT if head.get(name)}
        return {"ContentType": CONTENT_TYPE, **kept, **_type(content_type)}

    def _part(
        self, upload: Upload, number: int, offset: int, length: int, stop: Cancellation
    ) -> "Callable[[], CompletedPartTypeDef]":
        span = f"bytes={offset}-{offset + length - 1}"

        def copy_part() -> "CompletedPartTypeDef":
            try:
                return upload.copy(number, {**self._source, "CopySourceRange": span}, stop)
            except (ObjectExistsError, ObjectAbsentError) as error:
                raise changed(self._info) from error

        return copy_part

    def _ask(
        self, changes: Mapping[str, Any], condition: Mapping[str, Any]
    ) -> "CopyObjectOutputTypeDef":
        tries = 0

        def ask(client: "S3Client", common: dict[str, Any]) -> "CopyObjectOutputTypeDef":
            nonlocal tries
            tries += 1
            answer = client.copy_object(
                **common, Key=self._key, **self._source, **changes, **condition
            )
            told(answer.get("CopyObjectResult", {}), "ETag", self._what)
            return answer

        try:
            return self._buckets.boto(self._bucket, ask, self._what, self._cancellation)
        except ConditionRacedError as error:
            raise StoreUnavailableError(
                error.message, hint="Somebody wrote the same key meanwhile; try again."
            ) from error
        except (ObjectExistsError, ObjectAbsentError) as error:
            # Raises if it is the source that was meant.
            self._head_of_source()
            if isinstance(error, ObjectExistsError) and condition:
                if tries > 1 and (copied := self._copied(changes.get("Metadata"))) is not None:
                    return copied
                raise key_exists(object_url(self._bucket, self._key)) from error
            raise

    def _head_of_source(self) -> Mapping[str, Any]:
        """Return what is said of the source.

        Raises:
            ObjectChangedError: It is another one by now, or gone.
        """
        info = self._info
        try:
            head = self._buckets.head(
                info.bucket, info.key, version=info.version, cancellation=self._cancellation
            )
        except ObjectNotFoundError as error:
            raise changed(info) from error
        if (info.etag and head["ETag"] != info.etag) or head["ContentLength"] != info.size:
            raise changed(info)
        return head

    def _copied(self, metadata: Mapping[str, str] | None) -> "CopyObjectOutputTypeDef | None":
        """Return what an answer that got lost must have said, if what is there is the copy.

        Args:
            metadata: What the copy has been given; None if it has the source's. By it the copy is
                told from one that somebody else made of the same content.
        """
        try:
            head = self._buckets.head(self._bucket, self._key, cancellation=self._cancellation)
        except ObjectNotFoundError:
            return None
        if head["ETag"] != self._info.etag or head["ContentLength"] != self._info.size:
            return None
        if metadata is not None and not has_metadata(head.get("Metadata", {}), metadata):
            return None
        answer: Any = {
            "CopyObjectResult": {"ETag": head["ETag"], "LastModified": head["LastModified"]},
            "VersionId": head.get("VersionId", ""),
        }
        return answer  # type: ignore[no-any-return]


def _type(content_type: str) -> dict[str, str]:
    return {"ContentType": content_type} if content_type else {}


def has_metadata(found: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Tell whether an object has the metadata that it was given, in whatever case of the names."""
    return _folded(found) == _folded(given)


def _folded(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in metadata.items()}


def info_of_head(bucket: str, key: str, head: Mapping[str, Any]) -> ObjectInfo:
    """Return what the answer to HEAD says of an object."""
    checksum = str(head.get("ChecksumSHA256", ""))
    # That of an object made of parts is a hash of hashes, and ends in their number.
    is_of_parts = "-" in checksum
    storage_class = str(head.get("StorageClass", ""))
    return ObjectInfo(
        bucket,
        key,
        head["ContentLength"],
        str(head.get("ETag", "")),
        str(head.get("VersionId", "")),
        head["LastModified"].timestamp(),
        storage_class,
        "" if is_of_parts else checksum,
        str(head.get("ContentType", "")),
        # S3 folds names to lower case; other servers need not.
        _folded(head.get("Metadata", {})),
        checksum if is_of_parts else "",
        {name: head[name] for name in _HEADERS if head.get(name)},
        archive_of(storage_class, str(head.get("Restore", "")), str(head.get("ArchiveStatus", ""))),
    )
