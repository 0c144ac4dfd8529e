"""Objects that are stored from here: by one request, or in parts if they are large.

Nothing is replaced unless that is wished; where a store can not be told so, it is looked at first.
When the answer to a request got lost, what the store has then is looked at: it may be ours.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from agent_plugin.content import parts, s3_copy, s3_multipart, s3_ranges
from agent_plugin.content.errors import (
    FileChangedError,
    ObjectNotFoundError,
    StoreUnavailableError,
)
from agent_plugin.content.objects import ObjectInfo, Unfinished, checked_key, object_url
from agent_plugin.content.s3_access import CONTENT_TYPE
from agent_plugin.content.s3_buckets import Buckets
from agent_plugin.content.s3_errors import (
    ConditionRacedError,
    ObjectExistsError,
    UnsupportedByStoreError,
)
from agent_plugin.content.s3_multipart import PartSizes, Target, info_of_answer
from agent_plugin.content.s3_requests import told
from agent_plugin.content.s3_upload import Upload, key_exists
from agent_plugin.content.store import Cancellation, Progress

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, PutObjectOutputTypeDef


@dataclass(frozen=True, slots=True)
class Content:
    """What is stored, and how it is had.

    Attributes:
        size: Bytes in all.
        read: Given position and length, returns that many bytes.
        check: Called when all was read, before the object is there; may raise.
        in_order: Whether `read` is called by one thread at a time, from the beginning to the end;
            otherwise by several at once, in any order.
    """

    size: int
    read: Callable[[int, int], bytes]
    check: Callable[[], None]
    in_order: bool = True

    @classmethod
    def of_file(cls, fd: int, size: int | None) -> "Content":
        """Return a file's, read by position; its size is what it has now, unless it is said."""
        expected = parts.size_of(fd) if size is None else size
        return cls(
            expected,
            partial(parts.read_all, fd),
            lambda: _insist_size(parts.size_of(fd), expected),
        )


class NewObject:
    """An object that is to be stored.

    Args:
        buckets: Where to.
        bucket, key: Where to.
        overwrite: Whether what is there may be replaced.
        content_type: Of the object; empty for bytes of any kind.
        metadata: Of the object; ASCII.
        headers: What else it has, as boto3 names it.

    Raises:
        UnsafePathError: There can be no such key.
    """

    def __init__(
        self,
        buckets: Buckets,
        bucket: str,
        key: str,
        *,
        overwrite: bool,
        content_type: str,
        metadata: Mapping[str, str] | None,
        headers: Mapping[str, Any] | None = None,
    ) -> None:
        self._buckets = buckets
        self._bucket = bucket
        self._key = checked_key(key)
        self._overwrite = overwrite
        self._headers: dict[str, Any] = {
            **(headers or {}),
            "ContentType": content_type or CONTENT_TYPE,
            "Metadata": dict(metadata or {}),
        }

    def put(self, data: bytes, cancellation: Cancellation | None) -> ObjectInfo:
        """Store it by one request; see S3Objects.put."""
        condition = {} if self._overwrite else {"IfNoneMatch": "*"}
        try:
            answer = self._send(data, {**self._headers, **condition}, cancellation)
        except UnsupportedByStoreError:
            if self._overwrite:
                raise
            s3_multipart.insist_absent(self._buckets, self._bucket, self._key, cancellation)
            answer = self._send(data, self._headers, cancellation)
        except ConditionRacedError as error:
            raise StoreUnavailableError(
                error.message, hint="Somebody wrote the same key meanwhile; try again."
            ) from error
        except ObjectExistsError as error:
            raise key_exists(object_url(self._bucket, self._key)) from error
        if answer is None:
            return self._head(cancellation)
        return info_of_answer(self._bucket, self._key, len(data), answer, _date(answer))

    def put_content(
        self,
        content: Content,
        sizes: PartSizes,
        cancellation: Cancellation,
        progress: Progress,
        unfinished: Unfinished | None,
    ) -> ObjectInfo:
        """Store it, in parts if it is large; see S3Objects.put_stream."""
        if content.size <= sizes.send_from:
            put = partial(self._put_at_once, content, cancellation)
            info = self._buckets.lanes.run(put, cancellation)
            progress(content.size)
            return info
        part_bytes = parts.part_size(content.size)
        window = max(2, min(parts.WINDOW_PARTS, parts.WINDOW_BYTES // part_bytes))

        def part_of(offset: int, length: int) -> bytes:
            data = content.read(offset, length)
            _insist_size(offset + len(data), offset + length)
            return data

        def send(
            upload: Upload, number: int, offset: int, length: int, stop: Cancellation
        ) -> "Callable[[], CompletedPartTypeDef]":
            if content.in_order:
                return partial(upload.send, number, part_of(offset, length), stop)
            return lambda: upload.send(number, part_of(offset, length), stop)

        answer = s3_multipart.make_of_parts(
            self._buckets,
            Target(
                *(self._bucket, self._key, self._headers, self._overwrite),
                *(content.size, part_bytes, window),
            ),
            send,
            cancellation=cancellation,
            progress=progress,
            unfinished=unfinished,
            check=content.check,
        )
        if answer is None:
            return self._buckets.lanes.run(partial(self._head, cancellation), cancellation)
        return info_of_answer(self._bucket, self._key, content.size, answer, _date(answer))

    def _put_at_once(self, content: Content, cancellation: Cancellation) -> ObjectInfo:
        data = content.read(0, content.size)
        _insist_size(len(data), content.size)
        content.check()
        return self.put(data, cancellation)

    def _send(
        self, data: bytes, headers: Mapping[str, Any], cancellation: Cancellation | None
    ) -> "PutObjectOutputTypeDef | None":
        """Send it; return the answer, None if it got lost."""
        tries = 0
        what = f"put {object_url(self._bucket, self._key)}"

        def ask(client: "S3Client", common: dict[str, Any]) -> "PutObjectOutputTypeDef":
            nonlocal tries
            tries += 1
            answer = client.put_object(**common, Key=self._key, Body=data, **headers)
            told(answer, "ETag", what)
            return answer

        try:
            return self._buckets.boto(self._bucket, ask, what, cancellation, sends=len(data))
        except ObjectExistsError:
            # It may be ours, if the answer to an earlier attempt got lost.
            if tries == 1 or not self._is_there(data):
                raise
            return None

    def _is_there(self, data: bytes) -> bool:
        try:
            info = self._head(None)
        except ObjectNotFoundError:
            return False
        # Somebody else may have stored the same bytes.
        is_like = info.size == len(data) and s3_copy.has_metadata(
            info.metadata, self._headers["Metadata"]
        )
        return is_like and s3_ranges.read(self._buckets, info, 0, info.size) == data

    def _head(self, cancellation: Cancellation | None) -> ObjectInfo:
        head = self._buckets.head(self._bucket, self._key, version="", cancellation=cancellation)
        return s3_copy.info_of_head(self._bucket, self._key, head)


def _date(answer: Mapping[str, Any]) -> float:
    """Return when an answer was given, which is about when the object was stored."""
    said = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return parsedate_to_datetime(said).timestamp()
    except ValueError:
        return float(int(time.time()))


def _insist_size(found: int, size: int) -> None:
    if found != size:
        raise FileChangedError(
            f"a file had {size} bytes and has {found} now",
            hint="Send it when nobody writes to it any more.",
        )
