"""Objects made of parts, sent from a file or copied by the store, also over several attempts.

Parts that the store has already are asked for, because who was killed may not have written down the
last ones; where the store tells nobody, what was written down counts.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from agent_plugin.content import parts
from agent_plugin.content.errors import ObjectNotFoundError, StoreAccessError
from agent_plugin.content.objects import ObjectInfo, Unfinished
from agent_plugin.content.s3_buckets import Buckets
from agent_plugin.content.s3_errors import UnsupportedByStoreError, UploadGoneError
from agent_plugin.content.s3_upload import Upload, key_exists
from agent_plugin.content.store import Cancellation, Progress

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, CompleteMultipartUploadOutputTypeDef

# Told an upload, a part's number (from 1), its position, its bytes and when to stop, returns what
# moves that part. Called in the order of the parts by one thread, as soon as there is room for
# another; what it returns is called by any.
MovePart: TypeAlias = (
    "Callable[[Upload, int, int, int, Cancellation], Callable[[], CompletedPartTypeDef]]"
)

MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class PartSizes:
    """From which sizes on objects are moved in parts, and in how large ones; bytes.

    Attributes:
        send_from: What is sent in parts if it is larger.
        copy_from: What is copied in parts if it is not smaller; S3 copies 5 GiB at once at most.
        copy_part: Each part that is copied, or twice as much, and so on, for larger objects.
        copies: How many parts are copied at once.
    """

    send_from: int = 8 * MEBIBYTE
    copy_from: int = 500 * MEBIBYTE
    copy_part: int = 64 * MEBIBYTE
    copies: int = 64

    def to_copy(self, size: int) -> int:
        """Return how large the parts are in which so many bytes are copied."""
        part = self.copy_part
        while -(-size // part) > parts.MAX_PARTS:
            part *= 2
        return part


@dataclass(frozen=True, slots=True)
class Target:
    """What is made, and where.

    Attributes:
        headers: What the object is to have, as boto3 names it.
        overwrite: Whether what is at the key may be replaced.
        size: Bytes in all, > 0.
        part_bytes: How large the parts are.
        window: How many parts are under way at once.
    """

    bucket: str
    key: str
    headers: Mapping[str, Any]
    overwrite: bool
    size: int
    part_bytes: int
    window: int


def make_of_parts(
    buckets: Buckets,
    target: Target,
    move: MovePart,
    *,
    cancellation: Cancellation,
    progress: Progress,
    unfinished: Unfinished | None,
    check: Callable[[], None] = lambda: None,
) -> "CompleteMultipartUploadOutputTypeDef | None":
    """Make an object; return the answer to the last request, None if it got lost.

    It got lost also if an earlier attempt had completed the upload, and not lived to hear of it.

    Args:
        buckets: Where.
        target: What.
        move: Moves the parts.
        cancellation: Checked at every part boundary.
        progress: Told each byte that this call has moved.
        unfinished: Where the upload is written down, and what there is of it; then its owner
            aborts it. None: it is aborted unless it is completed.
        check: Called before the object is made of its parts; may raise.

    Raises:
        KeyExistsError: Something is at the key.
        CancelledError: Cancellation was wished.
    """
    sent: dict[int, CompletedPartTypeDef] = {}
    upload = _upload(buckets, target, unfinished.upload_id if unfinished else "")
    part_bytes = target.part_bytes
    if unfinished is not None and upload.id:
        part_bytes = unfinished.part_bytes
        found = buckets.lanes.run(
            partial(_stored, upload, target.size, unfinished, cancellation), cancellation
        )
        if found is None:
            # Who completed it may have been killed before the answer came.
            made = partial(_is_made, buckets, target, unfinished, cancellation)
            if buckets.lanes.run(made, cancellation):
                return None
            upload, part_bytes = _upload(buckets, target, ""), target.part_bytes
        else:
            sent = found
            upload.kept = True
    try:
        if not upload.id:
            buckets.lanes.run(partial(upload.create, cancellation), cancellation)
            if unfinished is not None:
                unfinished.begun(upload.id, part_bytes)
                upload.kept = True
        _move_all(
            buckets, target, part_bytes, upload, sent, move, cancellation, progress, unfinished
        )
        check()
        ordered = [sent[number] for number in sorted(sent)]
        if unfinished is not None:
            unfinished.completes({part["PartNumber"]: part["ETag"] for part in ordered})
        complete = partial(_complete, buckets, target, upload, ordered, cancellation)
        return buckets.lanes.run(complete, cancellation)
    finally:
        if unfinished is not None and unfinished.drops():
            upload.kept = False
        upload.end(cancellation)


def abort(buckets: Buckets, bucket: str, key: str, upload_id: str) -> None:
    """Abort an upload that nobody goes on with; what is left is logged."""
    upload = Upload(buckets.of(bucket), key, {}, 0, upload_id=upload_id)
    upload.end(Cancellation())


def drop(buckets: Buckets, bucket: str, key: str, upload_id: str) -> None:
    """Abort an upload that nobody goes on with, or say why it is there still.

    Raises:
        StoreError: It is.
    """
    Upload(buckets.of(bucket), key, {}, 0, upload_id=upload_id).drop()


def _upload(buckets: Buckets, target: Target, upload_id: str) -> Upload:
    def is_complete(sent: "Sequence[CompletedPartTypeDef]", cancellation: Cancellation) -> bool:
        return _is_of_parts(buckets, target, [part["ETag"] for part in sent], cancellation)

    return Upload(
        buckets.of(target.bucket),
        target.key,
        {},
        target.size,
        headers=target.headers,
        exclusive=not target.overwrite,
        upload_id=upload_id,
        is_complete=is_complete,
    )


def _is_made(
    buckets: Buckets, target: Target, unfinished: Unfinished, cancellation: Cancellation
) -> bool:
    """Tell whether an upload that is gone was completed: what is at the key has its parts."""
    count = -(-target.size // unfinished.part_bytes)
    etags = [unfinished.parts.get(number, "") for number in range(1, count + 1)]
    return all(etags) and _is_of_parts(buckets, target, etags, cancellation)


def _is_of_parts(
    buckets: Buckets, target: Target, etags: Sequence[str], cancellation: Cancellation
) -> bool:
    try:
        there = buckets.head(target.bucket, target.key, cancellation=cancellation)
    except ObjectNotFoundError:
        return False
    return there["ContentLength"] == target.size and there["ETag"] == etag_of_parts(etags)


def etag_of_parts(etags: Sequence[str]) -> str:
    """Return the ETag that S3 gives an object of these parts; empty if theirs are no MD5.

    Not documented, and the same on every server tried.
    """
    try:
        joined = b"".join(bytes.fromhex(etag.strip('"')) for etag in etags)
    except ValueError:
        return ""
    return f'"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(etags)}"'


def _stored(
    upload: Upload, size: int, unfinished: Unfinished, cancellation: Cancellation
) -> "dict[int, CompletedPartTypeDef] | None":
    """Return the parts that need not be moved again; None if the upload is gone."""
    try:
        found = upload.stored(cancellation)
    except UploadGoneError:
        return None
    except StoreAccessError:
        return {
            number: {"PartNumber": number, "ETag": etag}
            for number, etag in unfinished.parts.items()
        }
    count = -(-size // unfinished.part_bytes)
    last = size - (count - 1) * unfinished.part_bytes
    return {
        number: part
        for number, (part, length) in found.items()
        if number <= count and length == (last if number == count else unfinished.part_bytes)
    }


def _move_all(
    buckets: Buckets,
    target: Target,
    part_bytes: int,
    upload: Upload,
    sent: "dict[int, CompletedPartTypeDef]",
    move: MovePart,
    cancellation: Cancellation,
    progress: Progress,
    unfinished: Unfinished | None,
) -> None:
    offsets = range(0, target.size, part_bytes)
    with parts.stopping(cancellation) as stop:

        def tasks() -> "Iterator[tuple[int, Callable[[], CompletedPartTypeDef]]]":
            for number, offset in enumerate(offsets, start=1):
                if number not in sent:
                    length = min(part_bytes, target.size - offset)
                    yield number, move(upload, number, offset, length, stop)

        moved = parts.in_order(tasks(), buckets.lanes, cancellation, target.window, upload.pending)
        for number, part in moved:
            sent[number] = part
            progress(min(part_bytes, target.size - offsets[number - 1]))
            if unfinished is not None:
                unfinished.sent(number, part["ETag"])


def _complete(
    buckets: Buckets,
    target: Target,
    upload: Upload,
    sent: "Sequence[CompletedPartTypeDef]",
    cancellation: Cancellation,
) -> "CompleteMultipartUploadOutputTypeDef | None":
    try:
        return upload.complete(sent, cancellation)
    except UnsupportedByStoreError:
        if target.overwrite:
            raise
        insist_absent(buckets, target.bucket, target.key, cancellation)
        upload.without_condition()
        return upload.complete(sent, cancellation)


def insist_absent(
    buckets: Buckets, bucket: str, key: str, cancellation: Cancellation | None = None
) -> None:
    """Look whether a key is free, for a store that can not be told to see to it itself.

    Raises:
        KeyExistsError: It is not.
    """
    try:
        buckets.head(bucket, key, cancellation=cancellation)
    except ObjectNotFoundError:
        return
    raise key_exists(buckets.of(bucket).place(key))


def info_of_answer(
    bucket: str, key: str, size: int, answer: Mapping[str, Any], modified: float
) -> ObjectInfo:
    """Return what the answer to a PUT or to the completion of an upload says of an object."""
    etag = str(answer.get("ETag", ""))
    if etag and not etag.endswith('"'):
        # Some servers leave the quotation marks out in bodies, and want them in conditions.
        etag = f'"{etag}"'
    return ObjectInfo(bucket, key, size, etag, str(answer.get("VersionId", "")), modified)
