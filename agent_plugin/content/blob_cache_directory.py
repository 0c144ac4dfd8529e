"""Where the blob cache keeps its files, and why nothing that others could write is trusted.

    <directory>/v1/<namespace>/<ab>/<hash>    verified blobs, 0400, named by their xxh128
    <directory>/v1/tmp/                       files being written (TemporaryNames)
    <directory>/v1/leases/                    which blobs must stay (blob_cache_leases.py)
    <directory>/v1/quarantine/                what turned out wrong, kept for 7 days
    <directory>/v1/locks, usage               single-flight locks; the counter of bytes

A blob is verified once, before it gets its name; afterwards name, size and mode are believed. That
holds only while nobody else can write here, so each directory must be a real one, be ours and be
closed to writing by others: checked when it is opened, and from then on it is used by descriptor.
"""

import base64
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.errors import (
    CacheUnsafeError,
    LocalError,
    LocalWriteError,
    NoSpaceError,
)

NAMESPACE: Final = re.compile(r"[0-9a-z]{16}|shared")
SHARD: Final = re.compile(r"[0-9a-f]{2}")
BLOB_NAME: Final = re.compile(r"[0-9a-f]{32}")
SHARED_NAMESPACE: Final = "shared"
OUT_OF_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# O_NONBLOCK: opening a FIFO that somebody planted must not wait for a writer.
READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
BLOB_MODE: Final = 0o400

_LAYOUT_VERSION: Final = "v1"
_HINT: Final = "remove the cache directory, or point the cache at a directory only this user writes"
_TEMPORARY_NAME: Final = re.compile(
    r"(\d{1,10})-(\d{1,20})-([0-9a-f]{1,16})\.[0-9a-f]+\.[0-9]+(?:\.([0-9]{1,19}))?"
)
# Of a process that can not be looked up from here (another container's) nothing is known but age.
_FOREIGN_LEFTOVER_SECONDS: Final = 24 * 3600

log = events.get_logger()


def namespace_of(store_url: str, scope: str, *, shared: bool) -> str:
    """Return the name of the directory of those blobs that may serve each other's readers.

    Of a hash that nobody can find another source for: a job chooses the URL of its store, and must
    not get at another's blobs by choosing well.

    Args:
        store_url: The store that blobs come from.
        scope: For whom they were fetched; empty if that makes no difference.
        shared: Whether their store makes none.
    """
    if shared and not scope:
        return SHARED_NAMESPACE
    source = "\n".join((scope, "" if shared else store_url))
    # As long as a lease's header has room for.
    hashed = hashlib.sha256(source.encode(errors="surrogateescape")).digest()
    return base64.b32encode(hashed)[:16].decode().lower()


def local_failure(action: str, error: OSError) -> LocalError:
    """Return the error of our tree for a failed write: NoSpaceError or LocalWriteError."""
    message = f"blob cache: {action}: {error.strerror or error}"
    if error.errno in OUT_OF_SPACE:
        return NoSpaceError(message, hint="free space on the cache's disk, or lower its quota")
    return LocalWriteError(message, hint="check the cache directory's disk and permissions")


def blob_fault(info: os.stat_result, *, owner: int) -> str | None:
    """Return why a file in a blob's place can not be a blob that we published, or None.

    A link count of 0 is no fault: somebody evicted or replaced the file after it was opened, and
    its bytes are as right as before.
    """
    if not stat.S_ISREG(info.st_mode):
        return "not a regular file"
    if info.st_uid != owner:
        return "owned by another user"
    if info.st_mode & 0o7222 or not info.st_mode & 0o400:
        return f"mode {stat.S_IMODE(info.st_mode):04o}"
    if info.st_nlink > 1:
        return "hard-linked"
    return None


def open_directory(name: str | Path, shown: Path, *, dir_fd: int | None, create: bool) -> int:
    """Open a directory that only we can write; make it, 0700, when `create` is set.

    Args:
        name: Relative to `dir_fd`, or absolute with `dir_fd` None.
        shown: What messages call it.
        dir_fd: The directory that holds it.
        create: Whether an absent one is made.

    Raises:
        CacheUnsafeError: It is a link or no directory, not ours, or others may write it.
        OSError: It could not be made or opened.
    """
    if create:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=dir_fd)
    try:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise CacheUnsafeError(f"{shown} is a link or no directory", hint=_HINT) from error
        raise
    return _insist_private(fd, stat.S_ISDIR, shown)


def open_private_file(name: str, shown: Path, *, dir_fd: int) -> int:
    """Open a file of ours for reading and writing, 0600, made when it is absent.

    Raises:
        CacheUnsafeError: It is a link or no regular file, not ours, or others may write it.
        OSError: It could not be made or opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise CacheUnsafeError(f"{shown} is no regular file", hint=_HINT) from error
        raise
    return _insist_private(fd, stat.S_ISREG, shown)


def _insist_private(fd: int, is_right_kind: Callable[[int], bool], shown: Path) -> int:
    """Return `fd` when only we can write what it is; close it and raise otherwise."""
    info = os.fstat(fd)
    mode = stat.S_IMODE(info.st_mode)
    if not is_right_kind(info.st_mode):
        fault = "is not what belongs there"
    elif info.st_uid != os.geteuid():
        fault = f"belongs to user {info.st_uid}, we are {os.geteuid()}"
    elif mode & 0o022:
        fault = f"can be written by others (mode {mode:04o})"
    else:
        return fd
    os.close(fd)
    raise CacheUnsafeError(f"{shown} {fault}", hint=_HINT)


def list_directory(fd: int) -> list[str]:
    """Return the names in an open directory.

    Opens it anew: all listings through one descriptor share its position, other threads' too.

    Raises:
        OSError: It could not be read.
    """
    own = os.open(".", DIRECTORY_FLAGS, dir_fd=fd)
    try:
        return os.listdir(own)  # noqa: PTH208 - pathlib does not know descriptors
    finally:
        os.close(own)


class TemporaryNames:
    """Names in tmp/ that tell who writes the file, so that dead writers' files can be removed.

    `<pid>-<start time>-<pid namespace>.<random>.<number>[.<reserved bytes>]`. Start time (clock
    ticks since boot) tells a process from a later one of the same pid: proc(5), /proc/pid/stat
    field 22. The namespace is there because a pid means nothing in another container.
    """

    def __init__(self) -> None:
        # 0 where /proc is not to be had; liveness is not asked of such names.
        started = _process_start(os.getpid()) or 0
        self._knows_processes = started != 0
        self._space = f"{_pid_namespace():x}"
        self._prefix = f"{os.getpid()}-{started}-{self._space}.{os.urandom(6).hex()}."
        self._numbers = count()

    def new(self, reserved: int | None = None) -> str:
        """Return a name that nobody uses; may be called from any thread.

        Args:
            reserved: For how many bytes room is kept while the file is there.
        """
        name = f"{self._prefix}{next(self._numbers)}"
        return name if reserved is None else f"{name}.{reserved}"

    def reserved(self, name: str) -> int:
        """Return for how many bytes the writer of `name` keeps room."""
        match = _TEMPORARY_NAME.fullmatch(name)
        return int(match[4] or 0) if match else 0

    def is_leftover(self, name: str, *, age_seconds: float) -> bool:
        """Whether the writer of `name`, last written `age_seconds` ago, is gone."""
        match = _TEMPORARY_NAME.fullmatch(name)
        known = match is not None and match[2] != "0" and match[3] == self._space
        if match is None or not known or not self._knows_processes:
            return age_seconds > _FOREIGN_LEFTOVER_SECONDS
        return _process_start(int(match[1])) != int(match[2])


def _pid_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _process_start(pid: int) -> int | None:
    """Return when a process started; None for one that is gone or a zombie (its files are shut)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - Path.open costs 10 times this
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass(frozen=True, slots=True)
class CacheDirectory:
    """The open directories of a cache; descriptors stay open until `close`.

    Attributes:
        path: The cache's directory, as given; for messages only.
        version_fd: `v1`, whose flock is held by the one collector.
        namespace_fd: The namespace of our store.
        temporary_fd: `tmp`.
        leases_fd: `leases`.
        quarantine_fd: `quarantine`.
        namespace: The name of the namespace.
        names: Makes names for `tmp`.
        owner: Our effective user id.
    """

    path: Path
    version_fd: int
    namespace_fd: int
    temporary_fd: int
    leases_fd: int
    quarantine_fd: int
    namespace: str
    names: TemporaryNames
    owner: int

    @classmethod
    def open(cls, path: Path, namespace: str) -> "CacheDirectory":
        """Open a cache's directories and make those that are absent. Scans nothing.

        Raises:
            CacheUnsafeError: Others could have written here.
            NoSpaceError, LocalWriteError: A directory could not be made or opened.
        """
        version = path / _LAYOUT_VERSION
        with ExitStack() as opened:

            def enter(name: str | Path, shown: Path, dir_fd: int | None) -> int:
                fd = open_directory(name, shown, dir_fd=dir_fd, create=True)
                opened.callback(os.close, fd)
                return fd

            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                root_fd = enter(path, path, None)
                version_fd = enter(_LAYOUT_VERSION, version, root_fd)
                namespace_fd, temporary_fd, leases_fd, quarantine_fd = [
                    enter(name, version / name, version_fd)
                    for name in (namespace, "tmp", "leases", "quarantine")
                ]
            except OSError as error:
                raise local_failure(f"can not open {path}", error) from error
            opened.pop_all()
        os.close(root_fd)
        return cls(
            path=path,
            version_fd=version_fd,
            namespace_fd=namespace_fd,
            temporary_fd=temporary_fd,
            leases_fd=leases_fd,
            quarantine_fd=quarantine_fd,
            namespace=namespace,
            names=TemporaryNames(),
            owner=os.geteuid(),
        )

    @property
    def device(self) -> int:
        """The disk that it is on, as `st_dev`."""
        return os.fstat(self.version_fd).st_dev

    def shown(self, *names: str) -> Path:
        """Return the path of something in the cache, for messages."""
        return self.path.joinpath(_LAYOUT_VERSION, *names)

    def write_temporary(
        self, data: bytes | bytearray | memoryview, *, mode: int
    ) -> tuple[str, int]:
        """Write a new file in tmp/; return its name and its descriptor, open for writing.

        Raises:
            OSError: It could not be written; nothing is left.
        """
        name = self.names.new()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, mode, dir_fd=self.temporary_fd)
        try:
            written = os.write(fd, data)
            # A write may be short when the disk fills up; the next one then says why.
            while written < len(data):
                written += os.write(fd, memoryview(data)[written:])
        except OSError:
            os.close(fd)
            self.remove_temporary(name)
            raise
        return name, fd

    def remove_temporary(self, name: str) -> None:
        """Remove a file from tmp/; one that is gone already is as good.

        Raises:
            LocalWriteError: It is still there.
        """
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.temporary_fd)
        except OSError as error:
            raise local_failure(f"can not remove {self.shown('tmp', name)}", error) from error

    def quarantine(self, name: str, reason: str, *, dir_fd: int, shown: Path) -> bool:
        """Move whatever is at `name` out of the way and tell; False when nothing was there.

        Raises:
            LocalWriteError: It could not be moved.
        """
        leaf = name.rpartition("/")[2]
        # Cut: a name of 255 bytes, the most there can be, would not fit with the addition.
        aside = leaf if BLOB_NAME.fullmatch(leaf) else os.fsencode(leaf)[:64].hex()
        try:
            os.rename(
                name,
                f"{aside}.{self.names.new()}",
                src_dir_fd=dir_fd,
                dst_dir_fd=self.quarantine_fd,
            )
        except FileNotFoundError:
            return False
        except OSError as error:
            raise local_failure(f"can not quarantine {shown}", error) from error
        log.warning(events.CACHE_QUARANTINED, extra={"path": str(shown), "reason": reason})
        return True

    def close(self) -> None:
        """Close the directories."""
        for fd in (
            self.version_fd,
            self.namespace_fd,
            self.temporary_fd,
            self.leases_fd,
            self.quarantine_fd,
        ):
            os.close(fd)
