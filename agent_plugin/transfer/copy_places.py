"""Where a copying transfer reads and writes: files of this host and objects, as their URLs.

A place is `s3://bucket/key`, the key as it is, or `file:///path`, percent-encoded, or an absolute
path. One that ends with a slash is a directory or a prefix: all below it is copied, each thing to
its own place below the destination, and no name leads out of that.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
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
from agent_plugin.transfer.folding import KeptApart
from agent_plugin.transfer.ledger import TaskSpec

if TYPE_CHECKING:
    from agent_plugin.content.s3_objects import S3Objects

# Returns the objects that an access sees.
OpenObjects = Callable[[ObjectAccess], "S3Objects"]

MAX_NAME_BYTES: Final = 255
_S3: Final = "s3://"
_READ_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
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
    wanted: Iterable[TaskSpec],
    settings: CopySettings,
    open_objects: OpenObjects,
    cancellation: Cancellation,
) -> Iterator[TaskSpec]:
    """Yield the tasks that copy each source to its destination, with their sizes.

    A source that is missing has a size of 0, and fails when it is copied, so that it can be
    excluded and the rest goes on. What patterns leave out is left out.

    Args:
        wanted: What is to be copied, by URLs or paths. What is below a tree gets its priority and
            metadata, and no uri.
        settings: Of the transfer.
        open_objects: Returns the objects that an access sees.
        cancellation: Checked while things are looked at.

    Raises:
        JobInvalidError: A source or destination is no place; a tree goes to what is none.
        PathClashError: Two files would be one to the destination's file system.
        UnsafePathError: A name can not be had at the destination.
        LocalReadError: A directory can not be read.
        StoreError: A listing or a look fails.
    """
    names = settings.names
    targets: _Targets | None = None
    apart, folds = KeptApart(), False
    for task in wanted:
        cancellation.check()
        source = Place.parse(task.source)
        # Of many tasks it is mostly the same.
        if targets is None or task.destination != targets.said:
            targets = _Targets(task.destination)
            folds = apart.folds(targets.directory) if targets.directory else False
        if source.is_tree and not targets.is_tree:
            raise JobInvalidError(
                f"{task.source} is a tree and {task.destination} is not",
                hint="End the destination with a slash.",
            )
        if source.is_tree:
            found = _below(source, settings, open_objects, cancellation)
        else:
            name = (source.key or source.path).rpartition("/")[2]
            size = _size(source, settings, open_objects, cancellation)
            found = iter([(source.url, name, size)])
        uri = "" if source.is_tree else task.uri
        for url, relative, size in found:
            if names.admits(relative):
                target = targets.url(relative)
                if folds:
                    apart.refuse_another(targets.path(relative))
                yield TaskSpec(url, target, size, task.priority, task.metadata, uri)


class _Targets:
    """The URLs of things at a destination.

    Args:
        said: A tree, or the place of one thing, as a URL or path.

    Attributes:
        said: As given.
        is_tree: Whether there may be several.
        directory: The one that has all of them; empty for objects.

    Raises:
        JobInvalidError, UnsafePathError: As `Place.parse`.
    """

    def __init__(self, said: str) -> None:
        self.said = said
        self._destination = destination = Place.parse(said)
        self.is_tree = destination.is_tree
        self.directory = destination.path.rpartition("/")[0] + "/" if destination.path else ""
        self._is_object, self._key = destination.is_object, destination.key
        self._url = destination.url
        # Of the directory asked for last: what comes one after another is mostly of the same.
        self._directory: str | None = None
        self._directory_url = ""

    def path(self, relative: str) -> str:
        """Return the path of the file that is called so."""
        return self._destination.path + (relative if self.is_tree else "")

    def url(self, relative: str) -> str:
        """Return the URL of what is called so.

        Raises:
            UnsafePathError: As `Place.below`.
        """
        if not self.is_tree:
            return self._url
        if self._is_object:
            checked_key(self._key + relative)
            return self._url + relative
        directory, _, name = relative.rpartition("/")
        known = directory == self._directory and name not in ("", ".", "..") and "\0" not in name
        encoded = os.fsencode(name) if known else b""
        if known and len(encoded) <= MAX_NAME_BYTES:
            return self._directory_url + quote_from_bytes(encoded)
        url = self._destination.below(relative).url
        self._directory, self._directory_url = directory, url[: url.rindex("/") + 1]
        return url


def _below(
    source: Place,
    settings: CopySettings,
    open_objects: OpenObjects,
    cancellation: Cancellation,
) -> Iterator[tuple[str, str, int]]:
    """Yield the URL of each thing below a tree, what it is called below that, and its size."""
    if not source.is_object:
        yield from _files_below(source, cancellation)
        return
    objects = open_objects(settings.source.access)
    for info in objects.list(source.bucket, source.key, cancellation=cancellation):
        relative = info.key.removeprefix(source.key)
        # Such keys stand for directories.
        if relative and not relative.endswith("/"):
            yield info.url, relative, info.size


def _files_below(source: Place, cancellation: Cancellation) -> Iterator[tuple[str, str, int]]:
    """Yield what `_below` does, the files of a directory before what is in its directories."""
    waiting = [source.path]
    while waiting:
        directory = waiting.pop()
        names, directories = _listed(directory, cancellation, follow=directory == source.path)
        url, below = Place(path=directory).url, directory[len(source.path) :]
        for name, size in names:
            yield url + quote_from_bytes(os.fsencode(name)), below + name, size
        waiting += [f"{directory}{name}/" for name in reversed(directories)]


def _listed(
    directory: str, cancellation: Cancellation, *, follow: bool
) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the files of a directory with their sizes, and its directories, each sorted.

    Each name is looked at once, by the directory's descriptor: a directory that has become a link
    meanwhile is not followed.
    """
    files: list[tuple[str, int]] = []
    directories: list[str] = []
    path = directory
    try:
        # With a slash at its end a link would be followed.
        name = directory if follow else directory.rstrip("/")
        fd = os.open(name, _READ_DIRECTORY if follow else _READ_DIRECTORY | os.O_NOFOLLOW)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    path = directory + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.name)
                        continue
                    cancellation.check()
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            files.append((entry.name, status.st_size))
                        else:
                            extra = {"path": path, "reason": "it is no regular file"}
                            log.info(events.FILE_SKIPPED, extra=extra)
        finally:
            os.close(fd)
    except OSError as error:
        raise LocalReadError(f"{path}: {error.strerror}") from error
    files.sort()
    directories.sort()
    return files, directories


def _size(
    source: Place,
    settings: CopySettings,
    open_objects: OpenObjects,
    cancellation: Cancellation,
) -> int:
    try:
        if not source.is_object:
            return os.stat(source.path).st_size  # noqa: PTH116 - half the time of Path
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
