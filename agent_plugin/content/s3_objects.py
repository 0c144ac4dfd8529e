"""Plain objects of any bucket: looked at, listed, read, stored, copied, deleted, linked to.

Whoever reads or copies an object names the one that was looked at or listed before (ObjectInfo),
and gets that one or an error: every request has its ETag as a condition, and its version if there
is one. What is stored replaces nothing unless that is wished; where a store can not be told so, it
is looked at first, and who writes between the look and the request is overwritten.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

from agent_plugin.content import parts, s3_copy, s3_multipart, s3_ranges
from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.objects import (
    ARCHIVE_CLASSES,
    ARCHIVED,
    ObjectAccess,
    ObjectInfo,
    Unfinished,
    checked_key,
)
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_access import Access
from agent_plugin.content.s3_buckets import REQUESTS, Buckets, checked_seconds
from agent_plugin.content.s3_delete import delete
from agent_plugin.content.s3_multipart import PartSizes
from agent_plugin.content.s3_put import Content, NewObject
from agent_plugin.content.store import Cancellation, Progress, ignore_progress

__all__ = ["ObjectAccess", "ObjectInfo", "S3Objects", "Unfinished", "open_objects"]

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/ShareObjectPreSignedURL.html
MAX_LINK_SECONDS: Final = 7 * 86_400


class S3Objects:
    """Plain objects of any bucket, at one endpoint with one identity; for any thread.

    Every method raises StoreAccessError (401, 403, no such bucket), StoreUnavailableError (the
    retry budget is spent), StoreProtocolError (an answer that makes no sense), SettingsInvalidError
    (no name of a bucket) and UnsafePathError (no key of an object), besides what it names itself.

    Args:
        access: Which identity, and which endpoint.
        environment: AWS variables.
        policy: When requests are sent again.
        bandwidth: How much may move; as much as there is by default. Copies are not ours to slow.
        sizes: From which sizes on objects move in parts.
        like: Whose credentials are taken instead, and whose bucket's owner is expected.

    Raises:
        SettingsInvalidError: Profile or endpoint make no sense.
        StoreAccessError: There are no credentials.
    """

    def __init__(
        self,
        access: ObjectAccess,
        *,
        environment: Mapping[str, str],
        policy: RetryPolicy | None = None,
        bandwidth: Bandwidth | None = None,
        sizes: PartSizes | None = None,
        like: Access | None = None,
    ) -> None:
        self.access = access
        self._sizes = sizes or PartSizes()
        self._buckets = Buckets(
            access,
            environment=environment,
            policy=policy or RetryPolicy(),
            bandwidth=bandwidth or Bandwidth(),
            like=like,
        )

    @classmethod
    def like(cls, access: Access, *, policy: RetryPolicy, bandwidth: Bandwidth) -> Self:
        """Return the objects that the identity of a store's access sees where the store is."""
        return cls(ObjectAccess(), environment={}, policy=policy, bandwidth=bandwidth, like=access)

    @property
    def endpoint(self) -> str:
        """URL of the server, without a slash at its end; empty for AWS's own."""
        return self._buckets.endpoint

    def head(
        self,
        bucket: str,
        key: str,
        *,
        version: str = "",
        cancellation: Cancellation | None = None,
    ) -> ObjectInfo:
        """Return what the store says of an object, of its newest version by default.

        Raises:
            ObjectNotFoundError: It is not there, or a delete marker is.
        """
        head = self._buckets.head(bucket, key, version=version, cancellation=cancellation)
        return s3_copy.info_of_head(bucket, key, head)

    def look_again(
        self, infos: Iterable[ObjectInfo], *, cancellation: Cancellation | None = None
    ) -> Iterator[ObjectInfo]:
        """Yield what the store says of each object, in their order; many are asked for at once.

        Raises:
            ObjectNotFoundError: One is not there any more.
            CancelledError: Cancellation was wished.
        """
        cancellation = cancellation or Cancellation()
        tasks = (
            (0, partial(self.head, info.bucket, info.key, cancellation=cancellation))
            for info in infos
        )
        lanes, window = self._buckets.lanes, REQUESTS
        for _, info in parts.in_order(tasks, lanes, cancellation, window, deque()):
            yield info

    def list(
        self, bucket: str, prefix: str, *, cancellation: Cancellation | None = None
    ) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with a prefix, ascending by the bytes of the key.

        AWS lists in that order, 1,000 a request, while they are taken. What other servers list,
        each by an order of its own, is complete before the first is yielded.
        """
        requests = self._buckets.of(bucket)
        found = (
            ObjectInfo(
                bucket,
                entry["Key"],
                entry["Size"],
                entry.get("ETag", ""),
                "",
                entry["LastModified"].timestamp(),
                _class(entry.get("StorageClass", "")),
                archive=ARCHIVED if entry.get("StorageClass") in ARCHIVE_CLASSES else "",
            )
            for entry in requests.list_below(prefix, cancellation)
        )
        location = requests.access.location
        # https://docs.aws.amazon.com/AmazonS3/latest/userguide/s3-express-differences.html
        if location.is_aws and not bucket.endswith("--x-s3"):
            yield from found
        else:
            yield from sorted(found, key=lambda info: info.key.encode("utf-8", "surrogatepass"))

    def read(self, info: ObjectInfo, offset: int, length: int) -> bytes:
        """Return part of an object, exactly min(length, size - offset) bytes.

        Raises:
            ObjectChangedError: It is another one by now, or gone.
        """
        return s3_ranges.read(self._buckets, info, offset, length)

    def fetch(
        self,
        info: ObjectInfo,
        fd: int,
        *,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        have: Collection[int] = (),
        arrived: Callable[[int, int], None] = lambda _offset, _length: None,
    ) -> None:
        """Write an object to a file open for writing, in ranges and in parallel.

        The file has the object's size afterwards. Ranges arrive in any order; what has arrived is
        in the file, so that another call can go on with the others.

        Args:
            info: The object.
            fd: The file.
            cancellation: Checked while ranges are awaited.
            progress: Told how many bytes have arrived; called from any thread.
            have: The positions of the ranges that the file has already, as `arrived` told them.
            arrived: Told position and length of each range that is in the file; from any thread,
                and by threads that were left behind also after CancelledError.

        Raises:
            ObjectChangedError: It is another one by now, or gone.
            CancelledError: Cancellation was wished. A range may still be written.
            OSError: The file could not be written; ENOSPC among others.
        """

        def told(offset: int, length: int) -> None:
            arrived(offset, length)
            progress(length)

        s3_ranges.fetch(self._buckets, info, fd, have=have, cancellation=cancellation, arrived=told)

    def put(
        self,
        bucket: str,
        key: str,
        data: bytes,
        *,
        overwrite: bool,
        content_type: str = "",
        metadata: Mapping[str, str] | None = None,
        cancellation: Cancellation | None = None,
    ) -> ObjectInfo:
        """Store an object by one request.

        Raises:
            KeyExistsError: Something is there, and `overwrite` is False.
        """
        new = self._new(bucket, key, overwrite, content_type, metadata)
        return new.put(data, cancellation)

    def put_file(
        self,
        bucket: str,
        key: str,
        fd: int,
        *,
        overwrite: bool,
        content_type: str = "",
        metadata: Mapping[str, str] | None = None,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        size: int | None = None,
        unfinished: Unfinished | None = None,
    ) -> ObjectInfo:
        """Store a file's content, in parts if it is large.

        Args:
            bucket: Where to.
            key: Where to.
            fd: The file, read by position from its beginning.
            overwrite: Whether what is there may be replaced.
            content_type: Of the object.
            metadata: Of the object; ASCII.
            cancellation: Checked at part boundaries.
            progress: Told each byte that this call has sent.
            size: What the file is expected to have, bytes; by default what it has now.
            unfinished: Where an upload in parts is written down that another call may go on with;
                then it is left as it is on any error. Without it nothing is left.

        Raises:
            KeyExistsError: Something is there, and `overwrite` is False.
            FileChangedError: The file has another size than at the beginning; nothing was stored.
            CancelledError: Cancellation was wished. A request that is under way may take effect.
        """
        new = self._new(bucket, key, overwrite, content_type, metadata)
        content = Content.of_file(fd, size)
        return new.put_content(content, self._sizes, cancellation, progress, unfinished)

    def put_stream(
        self,
        bucket: str,
        key: str,
        size: int,
        read: Callable[[int, int], bytes],
        *,
        overwrite: bool,
        content_type: str = "",
        metadata: Mapping[str, str] | None = None,
        headers: Mapping[str, Any] | None = None,
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        unfinished: Unfinished | None = None,
        check: Callable[[], None] = lambda: None,
        in_order: bool = True,
    ) -> ObjectInfo:
        """Store what a function reads; the rest as put_file does it.

        Args:
            size: Bytes in all.
            headers: Of the object, as ObjectInfo has them.
            read: Given position and length, returns that many bytes. What an unfinished upload has
                is not read again.
            in_order: Whether `read` is called by one thread at a time, from the beginning to the
                end; otherwise by several at once, in any order.
            check: Called when all was read, before the object is there; may raise.
            bucket: As for put_file, as all that follows.
            key: The same.
            overwrite: The same.
            content_type: The same.
            metadata: The same.
            cancellation: The same.
            progress: The same.
            unfinished: The same.

        Raises:
            KeyExistsError, FileChangedError, CancelledError: As for put_file.
        """
        new = self._new(bucket, key, overwrite, content_type, metadata, headers)
        content = Content(size, read, check, in_order)
        return new.put_content(content, self._sizes, cancellation, progress, unfinished)

    def copy(
        self,
        info: ObjectInfo,
        bucket: str,
        key: str,
        *,
        overwrite: bool,
        metadata: Mapping[str, str] | None = None,
        content_type: str = "",
        cancellation: Cancellation,
        progress: Progress = ignore_progress,
        unfinished: Unfinished | None = None,
    ) -> ObjectInfo:
        """Have the store copy an object, in parts if it is large; no byte comes here.

        Args:
            info: The object.
            bucket: Where to.
            key: Where to.
            overwrite: Whether what is there may be replaced.
            metadata: Instead of the object's own, and of all else that it has, such as the type.
            content_type: Instead of the object's own.
            cancellation: Checked at part boundaries.
            progress: Told each byte that this call has had copied.
            unfinished: As for put_file.

        Raises:
            ObjectChangedError: It is another one by now, or gone.
            KeyExistsError: Something is there, and `overwrite` is False.
            CancelledError: Cancellation was wished. A request that is under way may take effect.
        """
        checked_key(key)
        return s3_copy.copy(
            self._buckets,
            info,
            bucket,
            key,
            sizes=self._sizes,
            overwrite=overwrite,
            metadata=metadata,
            content_type=content_type,
            cancellation=cancellation,
            progress=progress,
            unfinished=unfinished,
        )

    def abort(self, bucket: str, key: str, upload_id: str) -> None:
        """Abort an upload that nobody goes on with; what can not be aborted is logged."""
        s3_multipart.abort(self._buckets, bucket, key, upload_id)

    def drop_upload(self, bucket: str, key: str, upload_id: str) -> None:
        """Abort an upload that nobody goes on with; one that is gone is no error."""
        s3_multipart.drop(self._buckets, bucket, key, upload_id)

    def delete(self, bucket: str, keys: Collection[str]) -> None:
        """Delete the newest versions of objects; those that are not there are no error.

        Raises:
            StoreError: Some could not be deleted; others may have been.
        """
        delete(self._buckets, bucket, [checked_key(key) for key in keys])

    def presign(self, info: ObjectInfo, seconds: int) -> tuple[str, float]:
        """Return a URL by which anybody may get an object, and when it really ends.

        That is the earliest of: the time that was asked for, seven days, and the end of the
        credentials that sign it, as far as they tell. The URL holds the version if there is one.

        Args:
            info: The object.
            seconds: For how long, >= 1.

        Returns:
            The URL, and seconds since the epoch.

        Raises:
            SettingsInvalidError: That is no time.
            StoreAccessError: The access is anonymous, or its credentials have ended.
        """
        seconds = checked_seconds(seconds, MAX_LINK_SECONDS)
        url = self._buckets.presign(info, seconds)
        signed = parse_qs(urlsplit(url).query)
        begins = datetime.strptime(signed["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        ends = begins.timestamp() + int(signed["X-Amz-Expires"][0])
        expiry = self._buckets.of(info.bucket).access.expiry
        return url, ends if expiry is None else min(ends, expiry)

    def _new(
        self,
        bucket: str,
        key: str,
        overwrite: bool,
        content_type: str,
        metadata: Mapping[str, str] | None,
        headers: Mapping[str, Any] | None = None,
    ) -> NewObject:
        return NewObject(
            self._buckets,
            bucket,
            key,
            overwrite=overwrite,
            content_type=content_type,
            metadata=metadata,
            headers=headers,
        )


def open_objects(
    access: ObjectAccess,
    *,
    environment: Mapping[str, str],
    policy: RetryPolicy | None = None,
    bandwidth: Bandwidth | None = None,
) -> S3Objects:
    """Return the objects that an access sees.

    Args:
        access: Which identity, and which endpoint.
        environment: AWS variables.
        policy: When requests are sent again.
        bandwidth: How much may move.

    Raises:
        SettingsInvalidError: Profile or endpoint make no sense.
        StoreAccessError: There are no credentials.
    """
    return S3Objects(access, environment=environment, policy=policy, bandwidth=bandwidth)


def _class(storage_class: str) -> str:
    # What HEAD leaves out is spelled out in listings.
    return "" if storage_class == "STANDARD" else storage_class
