"""Where a copying transfer reads and writes: files of this host and objects, as their URLs.

A place is `s3://bucket/key`, the key as it is, or `file:///path`, percent-encoded, or an absolute
path. One that ends with a slash is a directory or a prefix: all below it is copied, each thing to
its own place below the destination, and no name leads out of that.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

from agent_plugin.content import events
from agent_plugin.content.errors import (
    JobInvalidError,
    LocalReadError,
    ObjectNotFoundError,
    UnsafePathError,
)
from agent_plugin.content.objects import ObjectAccess, checked_key, object_url
from agent_plugin.content.safe_path import split
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.copy_settings import CopySettings
from agent_plugin.transfer.ledger import TaskSpec

if TYPE_CHECKING:
    from agent_plugin.content.s3_objects import S3Objects

# Returns the objects that an access sees.
OpenObjects = Callable[[ObjectAccess], "S3Objects"]

MAX_NAME_BYTES: Final = 255
_S3: Final = "s3://"
_HINT: Final = "A place is s3://bucket/key, file:///path or an absolute path."

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class Place:
    """A file or an object, or all below a directory or a prefix.

    Attributes:
        bucket: Empty for a file.
        key: Of the object; with a slash at its end, or empty, a prefix.
        path: Of the file; empty for an object.
    """

    bucket: str = ""
    key: str = ""
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Return the place that a URL or path says.

        Raises:
            JobInvalidError: It says none.
            UnsafePathError: No object can have that key, or the path has `..` or a NUL.
        """
        if text.startswith(_S3):
            bucket, _, key = text.removeprefix(_S3).partition("/")
            if not bucket:
                raise JobInvalidError(f"{text[:200]!r} has no bucket", hint=_HINT)
            return cls(bucket, checked_key(key) if key else "")
        path = _path_of(text)
        if not path.startswith("/"):
            raise JobInvalidError(f"{text[:200]!r} is no place", hint=_HINT)
        parts = split(path.lstrip("/"))
        return cls(path="/" + "/".join(parts) + ("/" if parts and path.endswith("/") else ""))

    @property
    def url(self) -> str:
        """As the ledger has it."""
        if self.bucket:
            return object_url(self.bucket, self.key)
        return f"file://{quote_from_bytes(os.fsencode(self.path))}"

    @property
    def is_object(self) -> bool:
        """Whether it is in a bucket."""
        return bool(self.bucket)

    @property
    def is_tree(self) -> bool:
        """Whether it is all below a directory or prefix."""
        return (self.key == "" or self.key.endswith("/")) if self.bucket else self.path[-1] == "/"

    def below(self, relative: str) -> "Place":
        """Return the place of something below this one, which is a tree.

        Raises:
            UnsafePathError: A file can not have that name, or it would be somewhere else.
        """
        if self.bucket:
            return Place(self.bucket, checked_key(f"{self.key}{relative}"))
        parts = split(relative)
        # What the kernel would drop: two keys could become one file.
        too_long = any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts)
        if not parts or "/".join(parts) != relative or too_long:
            raise UnsafePathError(
                f"{relative[:200]!r} can not be a file below {self.path}",
                hint="Copy it by itself, to a name that a file can have.",
            )
        return Place(path=f"{self.path}{relative}")


def plan_copies(
    pairs: Iterable[tuple[str, str]],
    settings: CopySettings,
    open_objects: OpenObjects,
    cancellation: Cancellation,
) -> Iterator[TaskSpec]:
    """Yield the tasks that copy each source to its destination, with their sizes.

    A source that is missing has a size of 0, and fails when it is copied, so that it can be
    excluded and the rest goes on. What patterns leave out is left out.

    Args:
        pairs: Source and destination, as URLs or paths.
        settings: Of the transfer.
        open_objects: Returns the objects that an access sees.
        cancellation: Checked while things are looked at.

    Raises:
        JobInvalidError: A source or destination is no place; a tree goes to what is none.
        UnsafePathError: A name can not be had at the destination.
        LocalReadError: A directory can not be read.
        StoreError: A listing or a look fails.
    """
    names = settings.names
    for source_url, destination_url in pairs:
        cancellation.check()
        source, destination = Place.parse(source_url), Place.parse(destination_url)
        if source.is_tree and not destination.is_tree:
            raise JobInvalidError(
                f"{source_url} is a tree and {destination_url} is not",
                hint="End the destination with a slash.",
            )
        if source.is_tree:
            found = _below(source, settings, open_objects, cancellation)
        else:
            name = (source.key or source.path).rpartition("/")[2]
            target = destination.below(name) if destination.is_tree else destination
            size = _size(source, settings, open_objects, cancellation)
            found = iter([(source, target, size)])
        for each, relative, size in found:
            if names.admits(each.url if each.is_object else each.path):
                target = destination.below(relative) if isinstance(relative, str) else relative
                yield TaskSpec(each.url, target.url, size)


def _below(
    source: Place,
    settings: CopySettings,
    open_objects: OpenObjects,
    cancellation: Cancellation,
) -> Iterator[tuple[Place, str | Place, int]]:
    if not source.is_object:
        yield from _files_below(source, cancellation)
        return
    objects = open_objects(settings.source.access)
    for info in objects.list(source.bucket, source.key, cancellation=cancellation):
        relative = info.key.removeprefix(source.key)
        # Such keys stand for directories.
        if relative and not relative.endswith("/"):
            yield Place(info.bucket, info.key), relative, info.size


def _files_below(
    source: Place, cancellation: Cancellation
) -> Iterator[tuple[Place, str | Place, int]]:
    def refuse(error: OSError) -> None:
        raise LocalReadError(f"{error.filename}: {error.strerror}") from error

    for directory, directories, names in os.walk(source.path, onerror=refuse):
        cancellation.check()
        directories.sort()
        for name in sorted(names):
            path = Path(directory, name)
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                relative = os.fspath(path)[len(source.path) :]
                yield Place(path=os.fspath(path)), relative, status.st_size
            else:
                extra = {"path": os.fspath(path), "reason": "it is no regular file"}
                log.info(events.FILE_SKIPPED, extra=extra)


def _size(
    source: Place,
    settings: CopySettings,
    open_objects: OpenObjects,
    cancellation: Cancellation,
) -> int:
    try:
        if not source.is_object:
            return Path(source.path).stat().st_size
        objects = open_objects(settings.source.access)
        return objects.head(source.bucket, source.key, cancellation=cancellation).size
    except (ObjectNotFoundError, OSError):
        return 0


def _path_of(text: str) -> str:
    if not text.startswith("file://"):
        return text
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise JobInvalidError(f"{text[:200]!r} is no place", hint=_HINT)
    return os.fsdecode(unquote_to_bytes(parts.path))
