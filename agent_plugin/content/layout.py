"""Where things are in a store: `Data/<hash>.xxh128` and `Manifests/<key>`, in every kind of store.

Source: the object layout that AWS Deadline Cloud's job attachments use (docs/PROTOCOL.md).
"""

import re
from collections.abc import Mapping
from typing import Final

from agent_plugin.content.digest import HASH_ALGORITHM, Digest
from agent_plugin.content.errors import UnsafePathError

BLOB_PREFIX: Final = "Data/"
DOCUMENT_PREFIX: Final = "Manifests/"
# S3's limit for a whole key, in bytes of UTF-8:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
MAX_KEY_BYTES: Final = 1024

_BLOB_NAME: Final = re.compile(rf"([0-9a-f]{{32}})\.{HASH_ALGORITHM}")
_METADATA_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def blob_key(digest: Digest) -> str:
    """Return where a blob is stored."""
    return f"{BLOB_PREFIX}{digest.hex}.{HASH_ALGORITHM}"


def legacy_blob_key(digest: Digest) -> str:
    """Return where old clients stored a blob: without suffix. Read, never written."""
    return f"{BLOB_PREFIX}{digest.hex}"


def blob_at(name: str, size: int) -> Digest | None:
    """Return the blob that an object below `Data/` is by its name and size, None if it is none."""
    match = _BLOB_NAME.fullmatch(name)
    if match is None:
        return None
    try:
        return Digest(match[1], size)
    except ValueError:
        return None


def document_key(key: str) -> str:
    """Return where the document `key` is stored.

    Raises:
        UnsafePathError: The key is empty, absolute, too long or not UTF-8, has a control character,
            or an empty, `.` or `..` component.
    """
    _refuse_unsafe(key, key.split("/"))
    return DOCUMENT_PREFIX + key


def document_prefix(prefix: str) -> str:
    """Return the prefix of the places of all documents whose key starts with `prefix`.

    Raises:
        UnsafePathError: As for document_key, but it may be empty or end anywhere.
    """
    _refuse_unsafe(prefix, prefix.split("/")[:-1])
    return DOCUMENT_PREFIX + prefix


def is_document_key(key: str) -> bool:
    """Return whether document_key takes the key."""
    try:
        document_key(key)
    except UnsafePathError:
        return False
    return True


def checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a document, which any store can keep.

    Raises:
        ValueError: A name is not of lower-case letters, digits and hyphens; or a value is not
            printable ASCII, is empty, or has a space at an end, which a header does not keep. That
            is a mistake in the program.
    """
    for name, value in metadata.items():
        kept = value.isascii() and value.isprintable() and value == value.strip() != ""
        if not kept or not _METADATA_NAME.fullmatch(name):
            raise ValueError(f"not metadata: {name!r}: {value!r}")
    return dict(metadata)


def _refuse_unsafe(key: str, components: list[str]) -> None:
    reason = ""
    if any(component in ("", ".", "..") for component in components):
        reason = "it is empty, absolute, or has an empty, `.` or `..` component"
    elif _CONTROL.search(key):
        reason = "it has a control character"
    else:
        try:
            if len(key.encode()) > MAX_KEY_BYTES - len(DOCUMENT_PREFIX):
                reason = f"it is longer than {MAX_KEY_BYTES} bytes"
        except UnicodeEncodeError:
            reason = "it is not valid Unicode"
    if reason:
        raise UnsafePathError(
            f"{key[:200]!r} can not be a manifest's key: {reason}",
            hint="Check the manifest paths in the job document.",
        )
