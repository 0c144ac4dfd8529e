"""Plain objects, of any bucket: how they are reached, and what is known of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from agent_plugin.content.errors import SettingsInvalidError, UnsafePathError

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
MAX_KEY_BYTES: Final = 1024
# User metadata of archives that we publish: the SHA-256 of the content, 64 hexadecimal digits. What
# S3 keeps of an upload in parts is none of the content, and other servers keep none at all.
SHA256: Final = "propmaster-sha256"
_SCHEME: Final = "s3://"
# Those whose objects have to be restored before they are read; GLACIER_IR is read as it is:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-class-intro.html
ARCHIVE_CLASSES: Final = frozenset({"GLACIER", "DEEP_ARCHIVE"})
ARCHIVED: Final = "archived"
RESTORING: Final = "restoring"


@dataclass(frozen=True, slots=True)
class ObjectAccess:
    """As whom objects are asked for, and where; what is empty is what the environment says.

    Attributes:
        endpoint: URL of a server; AWS's own if the environment names none either.
        region: Of the buckets.
        profile: Of the AWS configuration; its keys come before those in variables.
        anonymous: Whether requests are not signed.
    """

    endpoint: str = ""
    region: str = ""
    profile: str = ""
    anonymous: bool = False


# `null` is that of what was stored while a bucket kept none, and can be overwritten:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/AddingObjectstoVersionSuspendedBuckets.html
REPLACEABLE_VERSIONS: Final = ("", "null")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says of an object.

    Attributes:
        bucket, key: Where it is.
        size: Bytes.
        etag: As the store spells it, with its quotation marks; empty if it says none. Not a hash of
            the content in general.
        version: Empty for a bucket without versions, and for what was listed.
        modified: Seconds since the epoch; S3 gives whole seconds.
        storage_class: Empty for the standard one.
        checksum_sha256: Of the whole content, in base64; empty if the store has none, and for what
            was listed.
        content_type: Empty for what was listed.
        metadata: Of the user; names are lower case. Empty for what was listed.
        checksum_of_parts: Of an object made of parts, the SHA-256 of the parts' SHA-256s, in
            base64, with `-` and their number; no hash of the content. Empty for what was listed.
        headers: What else belongs to the content, as `Content-Encoding`, by its name in boto3;
            empty for what was listed.
        archive: Why it can not be read as it is: ARCHIVED, or RESTORING while it is being restored;
            empty if it can. What was listed as ARCHIVED may be one of the others.
    """

    bucket: str
    key: str
    size: int
    etag: str
    version: str
    modified: float
    storage_class: str = ""
    checksum_sha256: str = ""
    content_type: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False)
    checksum_of_parts: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict, compare=False)
    archive: str = field(default="", compare=False)

    @property
    def url(self) -> str:
        """`s3://bucket/key`, the key as it is."""
        return object_url(self.bucket, self.key)

    @property
    def tells_its_state(self) -> bool:
        """Whether anything of it is another when its content is."""
        return bool(self.etag) or self.version not in REPLACEABLE_VERSIONS


@dataclass(slots=True)
class Unfinished:
    """An upload in parts that can be gone on with, by another process perhaps.

    Attributes:
        upload_id: Empty until it has begun.
        part_bytes: How large the parts are, but the last one; 0 until it has begun.
        parts: The ETags of those that the store has, by number (from 1).
        whole: Whether the store has all of them, and is about to be told to make the object.
        changed: Called when any of that has changed, before anything else is done.
        drops: Tells whether nobody will go on with it, so that it is aborted when it ends.
    """

    upload_id: str = ""
    part_bytes: int = 0
    parts: dict[int, str] = field(default_factory=dict)
    whole: bool = False
    changed: "Callable[[Unfinished], None]" = lambda _unfinished: None
    drops: Callable[[], bool] = lambda: False

    def begun(self, upload_id: str, part_bytes: int) -> None:
        """Take down that it has begun."""
        self.upload_id, self.part_bytes = upload_id, part_bytes
        self.parts.clear()
        self.whole = False
        self.changed(self)

    def sent(self, number: int, etag: str) -> None:
        """Take down that the store has a part."""
        self.parts[number] = etag
        self.changed(self)

    def completes(self, etags: Mapping[int, str]) -> None:
        """Take down that the store has all parts, and is about to make the object of them.

        Whoever is killed before the answer has come leaves an object that only these tell.
        """
        self.parts = dict(etags)
        self.whole = True
        self.changed(self)


def archive_of(storage_class: str, restore: str, tier: str) -> str:
    """Return `ObjectInfo.archive` of what the answer to HEAD says.

    Args:
        storage_class: `x-amz-storage-class`.
        restore: `x-amz-restore`: empty unless somebody has had it restored.
        tier: `x-amz-archive-status`, of INTELLIGENT_TIERING: empty unless it is in an archive.

    Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html
    """
    if 'ongoing-request="true"' in restore:
        return RESTORING
    if 'ongoing-request="false"' in restore:
        return ""
    return ARCHIVED if tier or storage_class in ARCHIVE_CLASSES else ""


def object_url(bucket: str, key: str) -> str:
    """Return `s3://bucket/key`, the key as it is."""
    return f"{_SCHEME}{bucket}/{key}"


def split_url(url: str) -> tuple[str, str]:
    """Return bucket and key of `s3://bucket/key`; nothing in a key is decoded or special.

    Raises:
        SettingsInvalidError: It is no such URL, or has no key.
        UnsafePathError: The key can be no object's.
    """
    bucket, slash, key = url.removeprefix(_SCHEME).partition("/")
    if not url.startswith(_SCHEME) or not bucket or not slash or not key:
        raise SettingsInvalidError(
            f"{url[:200]!r} is not the URL of an object", hint="It is like s3://bucket/key."
        )
    return bucket, checked_key(key)


def checked_key(key: str) -> str:
    """Return a key that an object can have.

    Raises:
        UnsafePathError: It is empty, longer than 1,024 bytes, not UTF-8, or has a NUL.
    """
    try:
        length = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        length = 0
    if not 0 < length <= MAX_KEY_BYTES or "\0" in key:
        raise UnsafePathError(
            f"{key[:200]!r} can not be an object's key",
            hint="A key has 1 to 1,024 bytes of UTF-8, and no NUL.",
        )
    return key
