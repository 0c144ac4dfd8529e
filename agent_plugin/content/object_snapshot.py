"""Which objects of a bucket a source brings, frozen: a snapshot, and its canonical document.

A source names objects of a bucket that may change at any time. It is resolved once; from then on
only the snapshot counts, in which each object stands with the version and the ETag it had. Whoever
reads an object later names them, so that another content under the same key is an error.

Nobody knows the content's hash before it is read. What stands in its place is an `ObjectIdentity`,
which is another type, twice as long, and never compared with a digest.

Everything here may come from others: a key of a hostile bucket, a document that was damaged. A
snapshot that exists has passed the rules of manifest paths (manifest_rules.py), and never changes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Final, Self

import msgspec

from agent_plugin.content import manifest_rules as rules
from agent_plugin.content.errors import PathClashError, SourceInvalidError, UnsafePathError
from agent_plugin.content.objects import REPLACEABLE_VERSIONS, ObjectAccess, ObjectInfo

VERSION: Final = 1
# As many as the files of a manifest: what one root can have.
MAX_OBJECTS: Final = 1_000_000
# A million objects with the longest keys that S3 has, 1024 bytes, each in `key` and in `path`.
MAX_SNAPSHOT_BYTES: Final = 3 * 1024 * 1024 * 1024

_IDENTITY: Final = re.compile(r"[0-9a-f]{64}")
_IDENTITY_MARK: Final = "propmaster object 1"
_CHUNK_ENTRIES: Final = 4096
_SHOWN_CHARACTERS: Final = 200
_MICROSECONDS: Final = 1_000_000

_RENAME_HINT: Final = "rename the object, or leave it out by Key or Filter"


@dataclass(frozen=True, slots=True, order=True)
class ObjectIdentity:
    """Which object of which server, in which state; not a hash of its content.

    Two of one identity have the same bytes, as far as a server keeps to what an ETag and a version
    mean. Two that differ may have the same bytes nevertheless.

    Attributes:
        hex: SHA-256 over endpoint, bucket, key, version, ETag and size, 64 hexadecimal digits. A
            blob's hash has 32: neither can be taken for the other.
        size: Bytes.

    Raises:
        ValueError: On creation, when the two can not be an identity.
    """

    hex: str
    size: int

    def __post_init__(self) -> None:
        if not _IDENTITY.fullmatch(self.hex) or self.size < 0:
            raise ValueError(f"not the identity of an object: {self.hex!r} ({self.size} bytes)")

    def __str__(self) -> str:
        return f"object:{self.hex} ({self.size} bytes)"


class SnapshotEntry(
    msgspec.Struct,
    frozen=True,
    gc=False,
    rename="camel",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """One object, and the file that it becomes.

    Attributes:
        path: Below the source's target, separated by `/`.
        size: Bytes.
        mtime: When the object was last modified, in microseconds since the epoch.
        key: The object's, whole.
        etag: As the server spells it, with its quotes if it has any; names the content.
        version: Empty when the bucket keeps none, or the listing did not say.
        checksum_sha256: SHA-256 of the content in base64, if the source demands one; else empty.
    """

    path: str
    size: Annotated[int, msgspec.Meta(ge=0, le=rules.MAX_SIZE_BYTES)]
    mtime: Annotated[int, msgspec.Meta(ge=rules.MIN_MTIME_US, le=rules.MAX_MTIME_US)]
    key: str
    etag: str
    version: str = ""
    checksum_sha256: str = ""

    @classmethod
    def of(cls, info: ObjectInfo, path: str, *, checksum_sha256: str = "") -> Self:
        """Return the entry of an object as the server tells it.

        Args:
            info: The object.
            path: The file that it becomes.
            checksum_sha256: What its content has to have; empty when nothing is demanded.
        """
        mtime = round(info.modified * _MICROSECONDS)
        return cls(
            path=path,
            size=info.size,
            mtime=max(rules.MIN_MTIME_US, min(mtime, rules.MAX_MTIME_US)),
            key=info.key,
            etag=info.etag,
            version=info.version,
            checksum_sha256=checksum_sha256,
        )


class SnapshotDocument(
    msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True
):
    """A snapshot as it is kept; of the fields that are its own, `version` is VERSION."""

    version: int
    bucket: str
    entries: tuple[SnapshotEntry, ...]
    endpoint: str = ""
    region: str = ""
    profile: str = ""
    anonymous: bool = False


@dataclass(frozen=True, slots=True, init=False, repr=False)
class ObjectSnapshot:
    """Objects of one bucket, reached in one way; valid and immutable. It may have none.

    Args:
        access: How they are reached.
        bucket: The bucket.
        entries: In any order.

    Attributes:
        entries: Ascending by the code points of their paths.
        total_bytes: The sum of the sizes.

    Raises:
        UnsafePathError: On creation, when a path would leave its directory or can not be a name on
            Linux. It names the object.
        PathClashError: Two objects become one file, or one a file where another needs a directory.
        SourceInvalidError: They are more than MAX_OBJECTS or too many bytes, a key is no text, or
            of one that is not empty nothing tells its state.
    """

    access: ObjectAccess
    bucket: str
    entries: Sequence[SnapshotEntry]
    total_bytes: int

    def __init__(self, access: ObjectAccess, bucket: str, entries: Iterable[SnapshotEntry]) -> None:
        ordered = sorted(entries, key=attrgetter("path"))
        if len(ordered) > MAX_OBJECTS:
            raise too_many(bucket)
        _check_paths(bucket, ordered)
        _check_clashes(bucket, ordered)
        _check_states(bucket, ordered)
        total_bytes = sum(entry.size for entry in ordered)
        if total_bytes > rules.MAX_SIZE_BYTES:
            raise SourceInvalidError(
                f"s3://{bucket}: the sizes add up to more than {rules.MAX_SIZE_BYTES} bytes",
                hint="the server can not be right: ask whoever runs it",
            )
        object.__setattr__(self, "access", access)
        object.__setattr__(self, "bucket", bucket)
        object.__setattr__(self, "entries", tuple(ordered))
        object.__setattr__(self, "total_bytes", total_bytes)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"<ObjectSnapshot of s3://{self.bucket}: {len(self)} objects>"

    def info(self, entry: SnapshotEntry) -> ObjectInfo:
        """Return what reads an entry's object, and no other content that its key may have now."""
        return ObjectInfo(
            bucket=self.bucket,
            key=entry.key,
            size=entry.size,
            etag=entry.etag,
            version=entry.version,
            modified=entry.mtime / _MICROSECONDS,
            checksum_sha256=entry.checksum_sha256,
        )

    def identity(self, entry: SnapshotEntry) -> ObjectIdentity:
        """Return which object an entry is, in place of the hash that nobody knows."""
        named = [
            _IDENTITY_MARK,
            self.access.endpoint,
            self.bucket,
            entry.key,
            entry.version,
            entry.etag,
            entry.size,
        ]
        # JSON, because it keeps the parts apart, whatever characters they hold.
        data = json.dumps(named, ensure_ascii=True, separators=(",", ":")).encode("ascii")
        return ObjectIdentity(sha256(data).hexdigest(), entry.size)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical document, 64 hexadecimal digits: equal snapshots have one."""
        return sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        """Return the canonical document: one for equal snapshots, in UTF-8, without a newline."""
        return msgspec.json.encode(
            SnapshotDocument(
                version=VERSION,
                bucket=self.bucket,
                entries=tuple(self.entries),
                endpoint=self.access.endpoint,
                region=self.access.region,
                profile=self.access.profile,
                anonymous=self.access.anonymous,
            )
        )

    @classmethod
    def decode(cls, data: bytes, *, source: str) -> Self:
        """Return the snapshot that a document holds; nothing in it is believed.

        Args:
            data: The document.
            source: What to call it in messages, its file name for example.

        Raises:
            SourceInvalidError: It is damaged, of another version, or larger than
                MAX_SNAPSHOT_BYTES.
            UnsafePathError, PathClashError: As on creation.
        """
        if len(data) > MAX_SNAPSHOT_BYTES:
            raise SourceInvalidError(f"{source}: {len(data)} bytes, more than {MAX_SNAPSHOT_BYTES}")
        try:
            document = _DECODER.decode(data)
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
            raise SourceInvalidError(
                f"{source}: not the snapshot of a source: {error}", hint=_DAMAGED_HINT
            ) from error
        if document.version != VERSION:
            raise SourceInvalidError(
                f"{source}: a snapshot of version {document.version}, not {VERSION}",
                hint=_DAMAGED_HINT,
            )
        access = ObjectAccess(
            endpoint=document.endpoint,
            region=document.region,
            profile=document.profile,
            anonymous=document.anonymous,
        )
        return cls(access, document.bucket, document.entries)


# Made here, by one thread: msgspec crashes when two are the first to decode a type.
_DECODER: Final = msgspec.json.Decoder(SnapshotDocument)
_DAMAGED_HINT: Final = (
    "end the session (`propmaster session end`) and start it again, which resolves its sources anew"
)


def too_many(bucket: str) -> SourceInvalidError:
    """Return the failure of a source that has more than MAX_OBJECTS objects."""
    return SourceInvalidError(
        f"s3://{bucket}: more than {MAX_OBJECTS} objects",
        hint="take fewer by a longer Key, or by Filter or Partition",
    )


def _check_paths(bucket: str, entries: Sequence[SnapshotEntry]) -> None:
    for start in range(0, len(entries), _CHUNK_ENTRIES):
        chunk = entries[start : start + _CHUNK_ENTRIES]
        if rules.are_paths([entry.path for entry in chunk]) and _is_text(chunk):
            continue
        for entry in chunk:
            if defect := rules.path_defect(entry.path):
                raise UnsafePathError(
                    f"{_shown(bucket, entry)} can not become a file: its {defect}",
                    hint=_RENAME_HINT,
                )
            if not _is_text([entry]):
                raise SourceInvalidError(
                    f"{_shown(bucket, entry)}: its key is not UTF-8", hint=_RENAME_HINT
                )


def _is_text(entries: Sequence[SnapshotEntry]) -> bool:
    try:
        "".join(f"{entry.path}{entry.key}{entry.version}{entry.etag}" for entry in entries).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_clashes(bucket: str, ordered: Sequence[SnapshotEntry]) -> None:
    for first, second in pairwise(ordered):
        if first.path == second.path:
            raise PathClashError(
                f"{_shown(bucket, first)} and {_shown(bucket, second)} both become {first.path!r}",
                hint=_RENAME_HINT,
            )
    clash = next(rules.iter_clashes([entry.path for entry in ordered]), None)
    if clash is not None:
        file, below = clash
        by_path = {entry.path: entry for entry in ordered}
        raise PathClashError(
            f"{_shown(bucket, by_path[file])} becomes a file where"
            f" {_shown(bucket, by_path[below])} needs a directory",
            hint=_RENAME_HINT,
        )


def _check_states(bucket: str, entries: Sequence[SnapshotEntry]) -> None:
    for entry in entries:
        if entry.size and not entry.etag and entry.version in REPLACEABLE_VERSIONS:
            raise SourceInvalidError(
                f"the server tells neither ETag nor version of {_shown(bucket, entry)}",
                hint="without one nobody notices when an object changes: use a server that has"
                " ETags",
            )


def _shown(bucket: str, entry: SnapshotEntry) -> str:
    key = entry.key
    shown = key if len(key) <= _SHOWN_CHARACTERS else f"{key[:_SHOWN_CHARACTERS]}…"
    return f"s3://{bucket}/{shown.encode('utf-8', 'backslashreplace').decode()}"
