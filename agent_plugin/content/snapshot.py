"""What is in a directory: its regular files as entries, and their digests.

Decided here: what counts as a file. Regular files do, hidden ones too; a symbolic link counts as
what it leads to, under its own path, if that is inside the root; everything else is skipped with a
`file.skipped` event. Directories themselves, empty ones among them, are no entries.

Nothing here changes a file, and nothing waits for one. The tree may change while it is walked: a
file that was there throughout is found, one that comes or goes meanwhile may be or not.
"""

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Protocol, Self

import msgspec

from agent_plugin.content import events
from agent_plugin.content.digest import Digest, hash_fd
from agent_plugin.content.errors import (
    FileChangedError,
    LocalReadError,
    PathClashError,
    UnsafePathError,
)
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.local_index import SETTLED_NS
from agent_plugin.content.owner import Owner
from agent_plugin.content.safe_path import NotRegularError, Root, split
from agent_plugin.content.store import Cancellation

# A file that changed this often while it was read is being written; its writer should finish first.
READ_ATTEMPTS: Final = 4
# One query and one transaction of the hash cache each.
_BATCH_FILES: Final = 1000

log = events.get_logger()


class FoundFile(msgspec.Struct, frozen=True, gc=False):
    """A regular file as it was when it was looked at.

    Attributes:
        path: Relative to the root, `/` separated; bytes that are not UTF-8 are lone surrogates.
        size: Bytes.
        mtime_us: Microseconds since the epoch, floor of mtime_ns / 1000; may be negative.
        mtime_ns: Time of the last change of content, nanoseconds since the epoch.
        ctime_ns: Time of the last change of content or inode, nanoseconds since the epoch.
        inode: Number of the inode; for a link, of the file it leads to.
        device: Number of the device the inode is on.
        mode: Permission bits, 0 to 0o7777.
    """

    path: str
    size: int
    mtime_us: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int
    mode: int

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> Self:
        """Return the entry for a path and what stat() said of it."""
        mtime_ns = status.st_mtime_ns
        return cls(
            path,
            status.st_size,
            mtime_ns // 1000,
            mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
            status.st_dev,
            status.st_mode & 0o7777,
        )


class HashCache(Protocol):
    """What `LocalIndex` knows of files: the digests of those that have not changed since."""

    def lookup_hashes(self, files: Iterable[tuple[bytes, os.stat_result]]) -> dict[bytes, Digest]:
        """Return the digests it knows, by absolute path; see LocalIndex."""

    def remember_hashes(self, rows: Iterable[tuple[bytes, os.stat_result, Digest]]) -> None:
        """Keep digests of files that were read just as they are described; see LocalIndex."""


def walk(
    root: Path,
    directories: Sequence[str] = (".",),
    *,
    follow_root: bool = True,
    owner: Owner | None = None,
    cancellation: Cancellation | None = None,
) -> Iterator[FoundFile]:
    """Yield every file in the given directories below `root`, each path once, in no order.

    A directory that does not exist holds no files; nor does a `root` that does not exist. A link is
    skipped, with an event, when it leaves `root`, is broken, or leads to a directory on its own
    path. So is a socket, fifo or device, and a temporary file of ours that a killed run left.

    Args:
        root: The directory that paths are relative to and that links must not leave.
        directories: Relative to `root`, `/` separated; they may overlap.
        follow_root: Whether `root` may be a link itself.
        owner: With whose rights the directories are opened; None: this process's.
        cancellation: Checked at each directory, or None.

    Raises:
        CancelledError: Cancellation was wished.
        UnsafePathError: One of `directories` is absolute or has a `..` component, or `root` is a
            link and may not be one.
        LocalReadError: A directory may not be read, or a file not looked at; names it.
    """
    starts = _outermost(directories)
    try:
        opened = Root(root, follow=follow_root, owner=owner)
    except FileNotFoundError:
        return
    with opened:
        for start in starts:
            yield from _Walk(opened, cancellation or Cancellation()).files(start)


def walk_links(
    root: Path,
    links: Sequence[str],
    *,
    follow_root: bool = True,
    owner: Owner | None = None,
    cancellation: Cancellation | None = None,
) -> Iterator[FoundFile]:
    """Yield what symbolic links count as: the file one leads to, or all below a directory.

    Args:
        root: The directory that paths are relative to and that links must not leave.
        links: Relative to `root`, `/` separated. What is no link any more is passed over.
        follow_root: Whether `root` may be a link itself.
        owner: With whose rights the directories are opened; None: this process's.
        cancellation: Checked at each directory, or None.

    Raises:
        CancelledError, LocalReadError: As `walk`.
    """
    with Root(root, follow=follow_root, owner=owner) as opened:
        for link in links:
            yield from _Walk(opened, cancellation or Cancellation()).behind(link)


def hash_files(
    root: Root,
    files: Iterable[FoundFile],
    index: HashCache | None,
    *,
    cancellation: Cancellation | None = None,
    clock: Callable[[], int] = time.time_ns,
) -> Iterator[tuple[FoundFile, Digest]]:
    """Yield each file with the digest of its content, in the order given.

    A file that is gone by now, or has become something else, is passed over with a `file.skipped`
    event, as one that vanishes during the walk is.

    The file yielded is as it was when its content was read, which may be later than it was found.
    Each digest is of the file at one time: had it changed while it was read, it was read again.

    Args:
        root: Below which the files are.
        files: As `walk` found them.
        index: Where digests of unchanged files are looked up and new ones are kept, or None. A
            digest is kept only if the file was last changed SETTLED_NS before it was read: a
            change soon after another may leave the same times.
        cancellation: Checked every READ_BYTES, or None; what was hashed before is kept.
        clock: Nanoseconds since the epoch.

    Raises:
        CancelledError: Cancellation was wished.
        FileChangedError: A file kept changing.
        UnsafePathError: A link to a file has come to lead out of the root.
        LocalReadError: A file can not be read.
    """
    cancellation = cancellation or Cancellation()
    remaining = iter(files)
    while batch := list(islice(remaining, _BATCH_FILES)):
        keys = [os.fsencode(f"{root.real_path}/{file.path}") for file in batch]
        known = {}
        if index is not None:
            known = index.lookup_hashes(zip(keys, map(_status_of, batch), strict=True))
        fresh = []
        try:
            for key, file in zip(keys, batch, strict=True):
                cancellation.check()
                if (digest := known.get(key)) is not None:
                    yield file, digest
                    continue
                started_ns = clock()
                if (hashed := _hash(root, file.path, cancellation)) is None:
                    _note_vanished(root, file.path)
                    continue
                read, digest = hashed
                if read.ctime_ns + SETTLED_NS <= started_ns:
                    fresh.append((key, _status_of(read), digest))
                yield read, digest
        finally:
            if index is not None and fresh:
                index.remember_hashes(fresh)


def _status_of(file: FoundFile) -> os.stat_result:
    """Return what stat() said of a file, as far as it was kept."""
    mode, seconds = stat.S_IFREG | file.mode, file.mtime_ns // 1_000_000_000
    return os.stat_result(
        (mode, file.inode, file.device, 1, 0, 0, file.size, 0, seconds, 0),
        {"st_mtime_ns": file.mtime_ns, "st_ctime_ns": file.ctime_ns},
    )


def _hash(root: Root, path: str, cancellation: Cancellation) -> tuple[FoundFile, Digest] | None:
    """Return a file and its digest, None when it is gone."""
    shown = f"{root.path}/{path}"
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            fd = root.open_file(path)
        except (FileNotFoundError, NotRegularError):
            # Something else stands there since it was found: the file is gone all the same.
            return None
        try:
            before = FoundFile.of(path, os.fstat(fd))
            digest = hash_fd(fd, cancellation=cancellation)
            after = FoundFile.of(path, os.fstat(fd))
        except OSError as error:
            raise LocalReadError(f"{shown} can not be read: {error.strerror}") from error
        finally:
            os.close(fd)
        if before == after and digest.size == before.size:
            return before, digest
        if attempt < READ_ATTEMPTS:
            log.warning(events.FILE_REREAD, extra={"path": shown, "attempt": attempt})
    raise FileChangedError(
        f"{shown} changed each of the {READ_ATTEMPTS} times it was read",
        hint="let the program that writes it finish before the task ends",
    )


def _note_vanished(root: Root, path: str) -> None:
    extra = {"path": f"{root.path}/{path}", "reason": "it vanished"}
    log.info(events.FILE_SKIPPED, extra=extra)


def _outermost(directories: Sequence[str]) -> list[list[str]]:
    kept: list[list[str]] = []
    for parts in sorted(split(directory) for directory in directories):
        if not kept or parts[: len(kept[-1])] != kept[-1]:
            kept.append(parts)
    return kept


@dataclass(slots=True)
class _Directory:
    """A directory on the way: the path it is shown under, and the one without links."""

    shown: str
    real: str
    above: "_Directory | None" = None
    linked: bool = False
    device: int = -1
    inode: int = -1

    def repeats_above(self) -> bool:
        # Only a link can lead back, so trees without links are spared the comparison.
        above = self.above if self.linked else None
        while above is not None:
            if (above.inode, above.device) == (self.inode, self.device):
                return True
            above = above.above
        return False


class _Walk:
    def __init__(self, root: Root, cancellation: Cancellation) -> None:
        self._root = root
        self._cancellation = cancellation
        self._pending: list[_Directory] = []

    def files(self, start: list[str]) -> Iterator[FoundFile]:
        self._pending = [_Directory("", "")]
        for name in start:
            self._visit(self._pending.pop(), only=name)
            if not self._pending:
                return
        while self._pending:
            yield from self._visit(self._pending.pop())

    def behind(self, link: str) -> Iterator[FoundFile]:
        above, _, name = link.rpartition("/")
        file = self._follow(_Directory(above, above), name)
        if file is not None:
            yield file
        while self._pending:
            yield from self._visit(self._pending.pop())

    def _visit(self, directory: _Directory, *, only: str | None = None) -> list[FoundFile]:
        """Return a directory's files, and put its directories with the pending ones."""
        self._cancellation.check()
        try:
            with self._root.holding(directory.real, create=False) as fd:
                status = os.fstat(fd)
                directory.device, directory.inode = status.st_dev, status.st_ino
                if directory.repeats_above():
                    self._skip(directory.shown, "the link leads to a directory it is in")
                    return []
                if only is not None:
                    self._start_at(directory, only, fd)
                    return []
                return self._list(directory, fd)
        except (FileNotFoundError, PathClashError, UnsafePathError):
            # The root's own descriptor is open, so this is a directory that was there a moment ago.
            _note_vanished(self._root, directory.shown)
            return []
        except OSError as error:
            raise self._unreadable(directory.shown, error) from error

    def _start_at(self, directory: _Directory, name: str, fd: int) -> None:
        path = _join(directory.shown, name)
        try:
            mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            self._enter(directory, name)
        elif not stat.S_ISLNK(mode) or self._follow(directory, name) is not None:
            self._skip(path, "not a directory")

    def _list(self, directory: _Directory, fd: int) -> list[FoundFile]:
        found = []
        prefix = directory.shown + "/" if directory.shown else ""
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name
                try:
                    if is_partial(name) and not entry.is_dir(follow_symlinks=False):
                        self._partial(prefix + name)
                        continue
                    if entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            found.append(FoundFile.of(prefix + name, status))
                            continue
                    if entry.is_dir(follow_symlinks=False):
                        self._enter(directory, name)
                    elif not entry.is_symlink():
                        self._skip(prefix + name, "not a regular file")
                    elif (file := self._follow(directory, name)) is not None:
                        found.append(file)
                except FileNotFoundError:
                    _note_vanished(self._root, prefix + name)
                except OSError as error:
                    raise self._unreadable(prefix + name, error) from error
        return found

    def _enter(self, above: _Directory, name: str) -> None:
        shown, real = _join(above.shown, name), _join(above.real, name)
        self._pending.append(_Directory(shown, real, above, above.linked))

    def _follow(self, directory: _Directory, name: str) -> FoundFile | None:
        """Return the file a link leads to; a directory goes with the pending ones."""
        shown = _join(directory.shown, name)
        try:
            parts = self._root.resolve(_join(directory.real, name))
            status = self._status(parts)
        except FileNotFoundError:
            self._skip(shown, "the link is broken")
            return None
        except (UnsafePathError, PathClashError) as error:
            self._skip(shown, error.message)
            return None
        if stat.S_ISDIR(status.st_mode):
            self._pending.append(_Directory(shown, "/".join(parts), directory, linked=True))
            return None
        if not stat.S_ISREG(status.st_mode):
            self._skip(shown, "the link leads to something that is not a regular file")
            return None
        return FoundFile.of(shown, status)

    def _status(self, parts: list[str]) -> os.stat_result:
        if not parts:
            return os.fstat(self._root.fd)
        with self._root.holding("/".join(parts[:-1]), create=False) as fd:
            return os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)

    def _skip(self, path: str, reason: str) -> None:
        extra = {"path": f"{self._root.path}/{path}", "reason": reason}
        log.warning(events.FILE_SKIPPED, extra=extra)

    def _partial(self, path: str) -> None:
        extra = {"path": f"{self._root.path}/{path}", "reason": "it is a temporary file of ours"}
        log.info(events.FILE_SKIPPED, extra=extra)

    def _unreadable(self, path: str, error: OSError) -> LocalReadError:
        return LocalReadError(
            f"{self._root.path}/{path} can not be read: {error.strerror}",
            hint="give the user that runs this the right to read it",
        )


def _join(above: str, name: str) -> str:
    return f"{above}/{name}" if above else name
