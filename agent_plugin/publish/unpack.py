"""Archives of results, unpacked so that they can do no more than make files below a directory.

An archive comes from a bucket that others may write to, so every part of it is hostile: a member's
path, type, link and size, and how much it grows. Members are made one by one by way of
safe_path.Root, which opens no link on the way; the tar reader only says what there is. What
Python's own extraction filters would refuse is refused here, since early releases of 3.11 do not
have them.

Kept of a member are its path, bytes, time, and whether its owner may execute it; owners, other
rights and attributes are not.
"""

import gzip
import io
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Final, NoReturn, Protocol, Self

from agent_plugin.content.errors import (
    ArchiveUnsafeError,
    PathClashError,
    UnsafePathError,
    local_write_error,
)
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.manifest import MAX_ENTRIES
from agent_plugin.content.parts import write_all
from agent_plugin.content.safe_path import Root, split
from agent_plugin.content.store import Cancellation

# What Bacalhau's `get` allows a file, and ten of them.
FILE_BYTES: Final = 100 * 1024**3
TOTAL_BYTES: Final = 1024**4
# Linux's NAME_MAX, of every file system that matters here.
MAX_NAME_BYTES: Final = 255
# What a member says of itself besides its content, a long name for example: tarfile reads it into
# memory, and a chain of some 300 before Python's limit on recursion ends it. A path has 4,096 bytes
# at most, an extended attribute 64 KiB.
MAX_HEADER_BYTES: Final = 256 * 1024
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# Of a frame that is skipped; pzstd begins with one. https://www.rfc-editor.org/rfc/rfc8878#section-3.1.2
_SKIPPED_MAGIC: Final = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
# What Zstandard's own program decompresses without being told that more memory may be used.
MAX_WINDOW_BYTES: Final = 128 * 1024 * 1024
# What the tar format adds to a member at most, headers of ordinary members and padding.
_OVERHEAD_BYTES: Final = 16 * 1024
_READ_BYTES: Final = 256 * 1024
_FIRST_SECOND: Final = -62_135_596_800  # the year 1
_LAST_SECOND: Final = 253_402_300_799  # the year 9999
_HEADERS: Final = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)
_KINDS: Final = {
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a fifo",
}
_HINT: Final = "the archive was not made by propmaster; --raw brings it as it is"


class _Stream(Protocol):
    """What bytes are read from, one after the other."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes, and none at the end."""


@dataclass(frozen=True, slots=True)
class UnpackLimits:
    """How much an archive may become.

    Attributes:
        file_bytes: Of one file.
        total_bytes: Of all files.
        members: Files, directories and links.
    """

    file_bytes: int = FILE_BYTES
    total_bytes: int = TOTAL_BYTES
    members: int = MAX_ENTRIES


@dataclass(slots=True)
class Unpacked:
    """What an archive held.

    Attributes:
        files: Regular files by path, with their size in bytes.
        links: Symbolic links by path, with their target.
        directories: Directories that the archive names itself.
    """

    files: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)

    @property
    def paths(self) -> list[str]:
        """Of files and links."""
        return [*self.files, *self.links]


def unpack(
    archive: IO[bytes],
    root: Root,
    limits: UnpackLimits,
    *,
    source: str,
    below: str = "",
    only: str = "",
    cancellation: Cancellation,
) -> Unpacked:
    """Make the files that a compressed tar archive holds, below a directory.

    On any error what was made stays; the caller removes the directory.

    Args:
        archive: The archive's bytes, open for reading at their start; they are read a second time
            if hard links in `only` are to files that are not.
        root: Where the files go.
        limits: How much it may become.
        source: What to call the archive in messages.
        below: A directory below the root that everything goes to.
        only: Only this member, or those below it; empty for all.
        cancellation: Checked all the time.

    Raises:
        ArchiveUnsafeError: It is damaged, holds something that can not be made safely, or becomes
            too much. The message has the member and the reason.
        NoSpaceError, LocalWriteError: A file can not be written.
        CancelledError: Cancellation was wished.
    """
    return _Unpacking(root, limits, source, below, only, cancellation).run(archive)


class _RefusedError(Exception):
    """What is wrong with the stream, not with one member; tarfile lets this through."""


def _header_class() -> type[tarfile.TarInfo]:
    """Return what reads the headers of one archive.

    It refuses what tarfile would read into memory, however large, and what tarfile takes for the
    end of the archive although it is none.
    """
    of_all = 0

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            nonlocal of_all
            try:
                info = super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                    raise
                raise _RefusedError(f"it is damaged: {error}") from error
            if info.type in _HEADERS:
                of_all += info.size if info.type == tarfile.XGLTYPE else 0
                if not 0 <= info.size <= MAX_HEADER_BYTES or of_all > MAX_HEADER_BYTES:
                    raise _RefusedError(f"a header has more than {MAX_HEADER_BYTES} bytes")
            return info

    return Header


class _Bounded(io.RawIOBase):
    """A stream that ends in an error after so many bytes, so that nothing inflates for ever."""

    def __init__(self, stream: _Stream, most: int, cancellation: Cancellation) -> None:
        self._stream = stream
        self._most = self._left = most
        self._cancellation = cancellation

    def read(self, size: int = -1, /) -> bytes:
        self._cancellation.check()
        data = self._stream.read(_READ_BYTES if size < 0 else size)
        self._left -= len(data)
        if self._left < 0:
            raise _RefusedError(f"it becomes more than {self._most} bytes")
        return data


class _Unpacking:
    def __init__(
        self,
        root: Root,
        limits: UnpackLimits,
        source: str,
        below: str,
        only: str,
        cancellation: Cancellation,
    ) -> None:
        self._root = root
        self._limits = limits
        self._source = source
        self._below = below
        self._only = "/".join(split(only))
        self._cancellation = cancellation
        self._made = Unpacked()
        self._seen: set[str] = set()
        # Of files that are not wanted, where their bytes are; and who wants these by another name.
        self._left_out: dict[str, str] = {}
        self._second_names: dict[str, list[str]] = {}
        self._bytes = 0
        self._member = ""

    def run(self, archive: IO[bytes]) -> Unpacked:
        self._read(archive, self._take)
        if self._second_names:
            archive.seek(0)
            self._read(archive, self._take_under_second_names)
        return self._made

    def _read(
        self, archive: IO[bytes], take: Callable[[tarfile.TarFile, tarfile.TarInfo], None]
    ) -> None:
        most = self._limits.total_bytes + _OVERHEAD_BYTES * self._limits.members
        try:
            with (
                decompressed(archive) as stream,
                _Bounded(stream, most, self._cancellation) as rest,
                tarfile.open(
                    fileobj=rest,
                    mode="r|",
                    bufsize=_READ_BYTES,
                    tarinfo=_header_class(),
                    encoding="utf-8",
                    errors="surrogateescape",
                ) as tar,
            ):
                while (member := tar.next()) is not None:
                    take(tar, member)
                    # tarfile keeps all that it has read, for members that are asked for later.
                    tar.members.clear()  # type: ignore[attr-defined] # not in the type stubs
                # The checksum comes last, and tarfile reads no further than it has to.
                while rest.read(_READ_BYTES):
                    pass
        except _RefusedError as error:
            self._refuse(str(error))
        except (tarfile.TarError, zlib.error, EOFError, ValueError, RecursionError) as error:
            raise self._unsafe(f"it is damaged: {error or type(error).__name__}") from error
        except gzip.BadGzipFile as error:
            raise self._unsafe(f"it is damaged: {error}") from error

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._cancellation.check()
        self._member = member.name
        if len(self._seen) >= self._limits.members:
            self._refuse(f"there are more than {self._limits.members} members")
        path = self._path(member.name)
        if not path:
            # The directory itself, as `tar -C directory .` gives it.
            if not member.isdir():
                self._refuse("it stands for the directory itself and is none")
            return
        again = path in self._seen
        self._seen.add(path)
        if again and not member.isdir():
            self._refuse("it stands there twice")
        if self._only and path != self._only and not path.startswith(f"{self._only}/"):
            self._leave_out(member, path)
            return
        with self._errors(path):
            self._make(tar, member, path)

    def _leave_out(self, member: tarfile.TarInfo, path: str) -> None:
        if member.isreg():
            self._left_out[path] = path
        elif member.islnk():
            with suppress(UnsafePathError):
                first = "/".join(split(member.linkname))
                if first in self._left_out:
                    self._left_out[path] = self._left_out[first]

    def _take_under_second_names(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Make a file that is wanted by the names of hard links to it, and not by its own."""
        self._cancellation.check()
        self._member = member.name
        if not member.isreg():
            return
        first, *others = self._second_names.pop(self._path(member.name), None) or ("",)
        if not first:
            return
        with self._errors(first):
            self._make(tar, member, first)
            for path in others:
                self._link(first, path, self._at(path))

    def _at(self, path: str) -> str:
        return f"{self._below}/{path}" if self._below else path

    def _path(self, name: str) -> str:
        try:
            parts = split(name)
        except UnsafePathError:
            self._refuse("its path is absolute, or has a `..` or a NUL")
        for part in parts:
            if len(os.fsencode(part)) > MAX_NAME_BYTES:
                self._refuse(f"a name in its path is longer than {MAX_NAME_BYTES} bytes")
            if is_partial(part):
                self._refuse("its name is kept for temporary files")
        return "/".join(parts)

    def _make(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        at = self._at(path)
        if member.isdir():
            self._root.directory(at)
            self._made.directories.add(path)
        elif member.issparse():
            self._refuse("it is a sparse file")
        elif member.isreg():
            self._make_file(tar, member, path, at)
        elif member.issym():
            self._make_link(member.linkname, path, at)
        elif member.islnk():
            self._make_second_name(member.linkname, path, at)
        else:
            self._refuse(f"it is {_KINDS.get(member.type, 'of an unknown type')}")

    def _make_file(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, at: str) -> None:
        if member.size < 0:
            self._refuse(f"it has {member.size} bytes")
        if member.size > self._limits.file_bytes:
            self._refuse(f"its {member.size} bytes are more than {self._limits.file_bytes}")
        self._bytes += member.size
        if self._bytes > self._limits.total_bytes:
            self._refuse(f"all files together have more than {self._limits.total_bytes} bytes")
        content = tar.extractfile(member)
        assert content is not None  # noqa: S101 - it is a regular file
        parent, _, name = at.rpartition("/")
        mode = 0o777 if member.mode & stat.S_IXUSR else 0o666
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, mode, dir_fd=self._root.directory(parent))
        try:
            offset = 0
            while piece := content.read(_READ_BYTES):
                write_all(fd, piece, offset)
                offset += len(piece)
            if offset != member.size:
                self._refuse(f"it has {offset} of its {member.size} bytes")
            seconds = min(max(float(member.mtime), _FIRST_SECOND), _LAST_SECOND)
            os.utime(fd, (seconds, seconds))
        finally:
            os.close(fd)
        self._made.files[path] = member.size

    def _make_link(self, target: str, path: str, at: str) -> None:
        if not leads_inside(path, target):
            self._refuse(f"it is a link to {target!r}, which may lead out")
        parent, _, name = at.rpartition("/")
        os.symlink(target, name, dir_fd=self._root.directory(parent))
        self._made.links[path] = target

    def _make_second_name(self, target: str, path: str, at: str) -> None:
        """Make a hard link to what this archive has made; nothing else can be meant."""
        try:
            first = "/".join(split(target))
        except UnsafePathError:
            first = ""
        if first in self._made.files:
            self._link(first, path, at)
        elif (origin := self._left_out.get(first)) is not None:
            # It has gone by, and comes again.
            self._left_out[path] = origin
            self._second_names.setdefault(origin, []).append(path)
        else:
            self._refuse(f"it is a hard link to {target!r}, which is no file of the archive so far")

    def _link(self, first: str, path: str, at: str) -> None:
        above, _, old = self._at(first).rpartition("/")
        parent, _, name = at.rpartition("/")
        with self._root.holding(above, create=False) as source, self._root.holding(parent) as fd:
            os.link(old, name, src_dir_fd=source, dst_dir_fd=fd, follow_symlinks=False)
        self._made.files[path] = self._made.files[first]

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except (UnsafePathError, PathClashError) as error:
            raise self._unsafe(f"another member is in the way: {error.message}") from error
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise self._unsafe(f"another member is in the way: {error.strerror}") from error
        except OSError as error:
            if isinstance(error, gzip.BadGzipFile):
                raise
            raise local_write_error(error, f"{self._root.path}/{path}") from error

    def _refuse(self, reason: str) -> NoReturn:
        raise self._unsafe(reason)

    def _unsafe(self, reason: str) -> ArchiveUnsafeError:
        member = f", member {self._member[:MAX_NAME_BYTES]!r}" if self._member else ""
        return ArchiveUnsafeError(f"{self._source}{member}: {reason}", hint=_HINT)


def leads_inside(path: str, target: str) -> bool:
    """Tell whether a symbolic link surely leads to a place in the directory that it is in.

    Its target may go up, first and no further than the top, and then down: what is on the way down
    may be a link that is held to the same rule. A `..` after a name may stand for anything.

    Args:
        path: Of the link, relative to the directory, normalised.
        target: As the link has it.
    """
    if not target or target.startswith("/") or "\0" in target:
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = 0
    while up < len(parts) and parts[up] == "..":
        up += 1
    return up <= path.count("/") and ".." not in parts[up:]


@contextmanager
def decompressed(archive: IO[bytes]) -> Iterator[_Stream]:
    """Lend what a compressed file holds, gzip or Zstandard; by its first bytes, not by its name."""
    start = archive.read(len(_ZSTD_MAGIC))
    archive.seek(0)
    if start != _ZSTD_MAGIC and not _SKIPPED_MAGIC.fullmatch(start):
        with gzip.GzipFile(fileobj=archive, mode="rb") as stream:
            yield stream
        return
    # Loaded here: few archives need it.
    import zstandard  # noqa: PLC0415

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(archive, read_across_frames=True) as stream:
            yield stream
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
