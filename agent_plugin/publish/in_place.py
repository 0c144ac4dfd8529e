"""What of published results is in place already, and what of two places is the same."""

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from agent_plugin.content.digest import READ_BYTES, hash_fd
from agent_plugin.content.errors import InputError, LocalReadError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.safe_path import Root
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.arrival import Arrival
from agent_plugin.publish.published import PublishedObject
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.plan import plan_download


def find_kept(
    files: Mapping[str, FileEntry], arrival: Arrival, context: TransferContext
) -> frozenset[str]:
    """Return the paths in the target whose file has the bytes that it is to have.

    Args:
        files: What is to be there, by path in the target; they can stand together.
        arrival: The target.
        context: The services.

    Raises:
        UnsafePathError, PathClashError: A link or a file stands where a directory must be.
        LocalReadError, LocalWriteError, NoSpaceError: On this host.
    """
    if arrival.fresh or not files:
        return frozenset()
    plan = plan_download(
        Manifest.of(msgspec.structs.replace(entry, path=at) for at, entry in files.items()),
        arrival.target,
        context.index,
        cancellation=context.cancellation,
    )
    return frozenset(entry.path for entry in plan.kept)


def is_archive_kept(
    archive: PublishedObject, path: str, arrival: Arrival, cancellation: Cancellation
) -> bool:
    """Tell whether an archive is in place as it is, by its SHA-256.

    Args:
        archive: The archive.
        path: In the target.
        arrival: The target.
        cancellation: Checked all the time.
    """
    if arrival.fresh or not archive.sha256:
        return False
    parent, _, name = path.rpartition("/")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with Root(arrival.target) as root, suppress(OSError, InputError, LocalReadError):
        with root.holding(parent, create=False) as directory:
            fd = os.open(name, flags, dir_fd=directory)
        try:
            status = os.fstat(fd)
            is_like_it = stat.S_ISREG(status.st_mode) and status.st_size == archive.info.size
            return is_like_it and sha256_of(fd, cancellation) == archive.sha256
        finally:
            os.close(fd)
    return False


def sha256_of(fd: int, cancellation: Cancellation) -> str:
    """Return the SHA-256 of an open file in hexadecimal digits, without moving its position."""
    hashing = hashlib.sha256()
    position = 0
    while piece := os.pread(fd, READ_BYTES, position):
        cancellation.check()
        hashing.update(piece)
        position += len(piece)
    return hashing.hexdigest()


def content_of(root: Root, path: str, cancellation: Cancellation) -> object:
    """Return something that is equal for equal content only; None if nothing is there."""
    parent, _, name = path.rpartition("/")
    try:
        with root.holding(parent, create=False) as directory:
            mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                return ("link", os.readlink(name, dir_fd=directory))
            if not stat.S_ISREG(mode):
                return ("other", path)
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalReadError(f"{root.path}/{path}: {error.strerror}") from error
    try:
        return hash_fd(fd, cancellation=cancellation)
    finally:
        os.close(fd)
