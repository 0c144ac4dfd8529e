"""From a source to the snapshot of what it brings: the one time that the bucket is looked into.

A key that names one object has to be there; there is no falling back to others that begin like it.
Anything else is listed, and what is found goes through the filter and the partition in turn.
Objects whose keys end with a slash stand for directories, and are left out.
"""

import base64
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    SourceEmptyError,
    SourceInvalidError,
    StoreAccessError,
)
from agent_plugin.content.object_snapshot import (
    MAX_OBJECTS,
    ObjectSnapshot,
    SnapshotEntry,
    too_many,
)
from agent_plugin.content.objects import SHA256, ObjectInfo
from agent_plugin.content.pattern import Pattern, PatternTooSlowError
from agent_plugin.content.s3_errors import NOT_OPEN, BucketAbsentError
from agent_plugin.content.s3_objects import S3Objects
from agent_plugin.content.store import Cancellation
from agent_plugin.sources.access import SourceServers
from agent_plugin.sources.archives import refuse_archived
from agent_plugin.sources.mapping import path_of, prefix_of
from agent_plugin.sources.partition import Share
from agent_plugin.sources.parts import share_of
from agent_plugin.sources.spec import DEFAULT_TARGET, InputSource

# What some servers and clients keep for a directory.
_DIRECTORY_TYPE: Final = "application/x-directory"
# Behind the SHA-256 of an object that was uploaded in parts: it is none of the content.
_PARTS_MARK: Final = "-"
_HEX: Final = re.compile(r"[0-9a-f]{64}")

log = events.get_logger()


@dataclass(slots=True)
class _Found:
    """What there was, before it is shared out; `is_single` if it was one object by its key."""

    listed: int = 0
    matching: int = 0
    is_single: bool = False


def resolve(
    source: InputSource,
    servers: SourceServers,
    *,
    index: int | None = None,
    cancellation: Cancellation | None = None,
) -> ObjectSnapshot:
    """Return the objects that a source brings, as they are now.

    Args:
        source: The source.
        servers: Where it is asked.
        index: Which part of its partition, from 0; None for what the partition itself says, and for
            all parts together where a task parameter says it.
        cancellation: Checked while objects are listed.

    Raises:
        ObjectNotFoundError: There is not the one object, or not that version of it.
        ObjectChangedError: It has not the SHA-256 that the source demands.
        SourceEmptyError: No object is left, and the source does not allow that.
        SourceInvalidError: The partition has no such part, a pattern takes too long, S3 has no
            SHA-256 to compare, or there are more than MAX_OBJECTS objects.
        UnsafePathError, PathClashError: What would come of the objects can not be files together.
        ObjectArchivedError, ObjectRestoringError: Objects have to be restored before they are read.
        StoreError: Any other that a request ended with.
        CancelledError: Cancellation was wished.
    """
    begun = time.monotonic()
    share = share_of(source, index)
    access = servers.access_of(source)
    objects = servers.objects(access)
    found = _Found()
    try:
        entries, doubtful = _entries(source, share, objects, found, cancellation)
    except StoreAccessError as error:
        if not source.no_sign or isinstance(error, BucketAbsentError):
            raise
        raise StoreAccessError(error.message, hint=NOT_OPEN) from error
    snapshot = ObjectSnapshot(access, source.bucket, entries)
    if not len(snapshot) and source.on_empty == "error":
        raise _empty(source, found, share)
    refuse_archived(source.name, doubtful, objects, cancellation)
    log.info(
        events.SOURCE_RESOLVED,
        extra={
            "source": source.name,
            "objects": len(snapshot),
            "bytes": snapshot.total_bytes,
            "listed": found.listed,
            "ignored": _ignored(source, is_single=found.is_single),
            "seconds": round(time.monotonic() - begun, 3),
        },
    )
    return snapshot


def _entries(
    source: InputSource,
    share: Share,
    objects: S3Objects,
    found: _Found,
    cancellation: Cancellation | None,
) -> tuple[list[SnapshotEntry], list[ObjectInfo]]:
    """Return the objects that are taken, and those of them that may be in an archive."""
    single = _head(source, objects)
    if single is not None:
        found.listed = found.matching = 1
        found.is_single = True
        entries = [_single_entry(source, single)] if share.has(single.key) else []
        return entries, [single] if entries and single.archive else []
    entries, doubtful = [], []
    for info in _matching(source, objects, found, cancellation):
        if not share.has(info.key):
            continue
        if len(entries) == MAX_OBJECTS:
            raise too_many(source.bucket)
        entries.append(SnapshotEntry.of(info, path_of(info.key, share.prefix)))
        if info.archive:
            doubtful.append(info)
    return entries, doubtful


def _head(source: InputSource, objects: S3Objects) -> ObjectInfo | None:
    """Return the one object that a source names; None if it names several, or a directory."""
    if not source.is_single:
        return None
    try:
        info = objects.head(source.bucket, source.key, version=source.version_id)
    except ObjectNotFoundError as error:
        colon = "; a key with a colon, as src=" if source.target != DEFAULT_TARGET else ""
        raise ObjectNotFoundError(
            error.message,
            hint="check bucket and key, and whether it was deleted; what several objects begin with"
            f" is named with / or * at its end: {source.url}/{colon}",
        ) from error
    return None if info.content_type.startswith(_DIRECTORY_TYPE) else info


def _single_entry(source: InputSource, info: ObjectInfo) -> SnapshotEntry:
    wanted = source.checksum_sha256
    if wanted:
        _check_checksum(source, info)
    return SnapshotEntry.of(
        info,
        path_of(info.key, source.key),
        checksum_sha256="" if _PARTS_MARK in wanted else wanted,
    )


def _check_checksum(source: InputSource, info: ObjectInfo) -> None:
    """Compare what S3 keeps with what the source demands, as far as the two can be compared.

    S3 keeps a SHA-256 of SHA-256s for what was uploaded in parts. If the source demands one of the
    content, it is compared when the content is here. What we publish tells it as metadata, too.
    """
    wanted = source.checksum_sha256
    stored = info.checksum_sha256 or _told_by_publisher(info)
    if not stored and not info.checksum_of_parts:
        raise SourceInvalidError(
            f"{source.url}: S3 keeps no SHA-256 of it that ChecksumSHA256 could be compared with",
            hint="leave ChecksumSHA256 out, or upload the object again with a SHA-256",
        )
    if _PARTS_MARK in wanted:
        stored = info.checksum_of_parts or stored
    elif not stored:
        return
    if stored != wanted:
        raise ObjectChangedError(
            f"{source.url}: S3 keeps the SHA-256 {stored}, ChecksumSHA256 is {wanted}",
            hint="it is another content: correct ChecksumSHA256, or name the version that is meant",
        )


def _told_by_publisher(info: ObjectInfo) -> str:
    """Return the SHA-256 that an object's metadata tells, in base64; empty if it tells none."""
    told = info.metadata.get(SHA256, "")
    if not _HEX.fullmatch(told):
        return ""
    return base64.b64encode(bytes.fromhex(told)).decode("ascii")


def _matching(
    source: InputSource,
    objects: S3Objects,
    found: _Found,
    cancellation: Cancellation | None,
) -> Iterator[ObjectInfo]:
    """Yield the objects that a source's key and filter leave."""
    prefix = source.key if source.is_single else prefix_of(source.key)
    # Of a directory that was named without its slash, and of no sibling that begins like it.
    listed = f"{prefix}/" if source.is_single else prefix
    pattern = Pattern(source.filter, anchored=source.anchored) if source.filter else None
    for info in objects.list(source.bucket, listed, cancellation=cancellation):
        if info.key.endswith("/"):
            continue
        found.listed += 1
        if pattern is not None and not _fits(pattern, info.key.removeprefix(prefix)):
            continue
        found.matching += 1
        yield info


def _fits(pattern: Pattern, rest: str) -> bool:
    try:
        return pattern.search(rest) is not None
    except PatternTooSlowError as error:
        raise SourceInvalidError(
            f"Filter: {error}", hint="use a simpler regular expression"
        ) from error


def _empty(source: InputSource, found: _Found, share: Share) -> SourceEmptyError:
    if not found.listed:
        reason = "no object has a key that begins so"
    elif not found.matching:
        reason = f"Filter leaves none of {found.listed} objects"
    else:
        reason = f"part {share.index} of {share.count} has none of {found.matching} objects"
    return SourceEmptyError(
        f"{source.name}: {reason}", hint="correct the source, or say OnEmpty: ok if that is fine"
    )


def _ignored(source: InputSource, *, is_single: bool) -> Sequence[str]:
    """Return the fields that a source has and that mean nothing for what its key names."""
    if is_single:
        return ["Filter"] if source.filter else []
    of_one = {"VersionID": source.version_id, "ChecksumSHA256": source.checksum_sha256}
    return [field for field, value in of_one.items() if value]
