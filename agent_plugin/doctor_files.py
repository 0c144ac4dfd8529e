"""What the file systems of the blob cache and of the sessions can do; part of the doctor."""

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

import msgspec

from agent_plugin.settings import Settings
from agent_plugin.transfer.placement import FICLONE, REFLINK_MIN_BYTES
from agent_plugin.transfer.plan import SPARE_BYTES
from agent_plugin.transfer.progress import format_bytes

# Locks, modes or renames may mean something else there.
NETWORK: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "glusterfs"})

_SCRATCH: Final = ".propmaster-doctor-"
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


class Probe(msgspec.Struct, frozen=True):
    """One thing that was tried.

    Attributes:
        ok: Whether the host can do it; "unknown" when it could not be tried.
        reason: What was found.
        consequence: What it means if it is not ok, or what it is for.
        needed: Whether COPIED can not do without it.
    """

    name: str
    ok: bool | Literal["unknown"]
    reason: str
    consequence: str
    needed: bool = False


def file_probes(settings: Settings, session_dir: Path) -> Iterator[Probe]:
    """Yield what is to be known of the cache's directory and of the sessions'."""
    cache_dir = settings.paths.cache_dir
    yield _cache_directory(cache_dir)
    yield _cache_space(settings)
    with ExitStack() as stack:
        try:
            scratch = _scratch(session_dir, stack)
        except OSError as error:
            yield _session_directory(session_dir, error)
            return
        yield _session_directory(session_dir, None)
        yield _folding(scratch)
        yield _try("o_tmpfile", lambda: _o_tmpfile(scratch), "nothing: names are used instead")
        yield _try(
            "user_xattr",
            lambda: _user_xattr(scratch),
            "only a mount that is written to without overlayfs uses them",
        )
        try:
            cached = _scratch(cache_dir, stack)
        except OSError as error:
            reason = f"{nearest_existing(cache_dir)} can not be written: {error.strerror}"
            yield Probe("cache_to_session", "unknown", reason, "copies from the cache")
            return
        yield from _copy_probes(cached, scratch)


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - links stay as they are
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), Path("/"))


def privacy_fault(directory: Path, *, may_be_link: bool) -> str | None:
    """Return why others could change what is in a directory; None if not, or if it is not there.

    The rules of services.state_directory (links are followed) and of blob_cache_directory.py.
    """
    try:
        status = directory.stat() if may_be_link else directory.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"can not be looked at: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return "is a link or no directory"
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def privacy_of(directory: Path) -> str:
    """Return what is right with a directory that has no fault."""
    if directory.exists():
        return "can be written by this user alone"
    return "is not there yet, and will be private"


def writing_fault(directory: Path) -> str | None:
    """Return why a directory can not be written, or not be made; None if it can."""
    above = nearest_existing(directory)
    if os.access(above, os.W_OK | os.X_OK):
        return None
    if above == directory:
        return "may not be written"
    return f"is not there, and {above} may not be written"


def file_system_of(path: Path) -> str:
    """Return the type of the file system that a path is on, `ext4` for example, or `unknown`."""
    real = os.fsencode(os.path.realpath(nearest_existing(path)))
    best, kind = b"", "unknown"
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return kind
    for line in lines:
        # proc(5): … root, mount point, options …, a hyphen, type, source.
        fields, _, rest = line.partition(b" - ")
        point = _OCTAL.sub(lambda octal: bytes([int(octal[1], 8)]), fields.split()[4])
        inside = real == point or real.startswith(point.rstrip(b"/") + b"/")
        # Of two mounts on one point the later one is seen.
        if inside and len(point) >= len(best):
            best, kind = point, os.fsdecode(rest.split()[0])
    return kind


def _cache_directory(directory: Path) -> Probe:
    name = "cache_directory"
    fault = privacy_fault(directory, may_be_link=False)
    if fault is not None:
        consequence = "no session can start: what is in the cache can not be trusted"
        return Probe(name, False, f"{directory} {fault}", consequence, needed=True)
    kind = file_system_of(directory)
    consequence = "without it each session fetches all its inputs"
    if fault := writing_fault(directory):
        return Probe(name, False, f"{directory} {fault}", consequence)
    if kind in NETWORK:
        consequence = "hosts may fetch a blob twice, and evict what another one needs"
        return Probe(name, False, f"{directory} is on a network ({kind})", consequence)
    return Probe(name, True, f"{directory} {privacy_of(directory)}; {kind}", consequence)


def _cache_space(settings: Settings) -> Probe:
    directory = settings.paths.cache_dir
    most = settings.cache.max_bytes_on(directory)
    least = settings.cache.min_free_bytes_on(directory)
    free = _free_bytes(directory)
    return Probe(
        "cache_space",
        ok=free >= least,
        reason=f"{format_bytes(free)} free; the cache takes up to {format_bytes(most)} and leaves"
        f" {format_bytes(least)}",
        consequence="below that, blobs are evicted, and then the cache is done without",
    )


def _session_directory(directory: Path, error: OSError | None) -> Probe:
    name, place = "session_directory", nearest_existing(directory)
    if error is not None:
        reason = f"{place} can not be written: {error.strerror}"
        return Probe(name, False, reason, "no session can start there", needed=True)
    free = _free_bytes(directory)
    return Probe(
        name,
        ok=free > SPARE_BYTES,
        reason=f"{place}: {file_system_of(place)}, {format_bytes(free)} free",
        consequence="a session starts only if its inputs fit",
        needed=True,
    )


def _folding(scratch: Path) -> Probe:
    (scratch / "Fold").touch()
    folds = (scratch / "fOLD").exists()
    return Probe(
        "name_folding",
        ok=not folds,
        reason="Fold and fOLD are " + ("one file" if folds else "two files"),
        consequence="where they are one, jobs with names that differ in case alone are refused",
    )


def _copy_probes(cached: Path, scratch: Path) -> Iterator[Probe]:
    """Try to copy from the cache to a session by what the two file systems may share."""
    size = REFLINK_MIN_BYTES
    (cached / "blob").write_bytes(os.urandom(size))
    source = os.open(cached / "blob", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with (scratch / "reflink").open("wb") as target:
            yield _try(
                "reflink",
                lambda: _reflink(source, target.fileno()),
                "files are copied from cache to session: that takes time, and space twice",
            )
        with (scratch / "copy").open("wb") as target:
            yield _try(
                "copy_file_range",
                lambda: _copy_file_range(source, target.fileno(), size),
                "files are read and written, which takes longer",
            )
    finally:
        os.close(source)


def _reflink(source: int, target: int) -> str:
    fcntl.ioctl(target, FICLONE, source)
    return "cache and sessions share blocks"


def _copy_file_range(source: int, target: int, size: int) -> str:
    os.copy_file_range(source, target, size)
    return "the kernel copies from cache to session"


def _o_tmpfile(scratch: Path) -> str:
    os.close(os.open(scratch, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
    return "files can be made without a name"


def _user_xattr(scratch: Path) -> str:
    (scratch / "xattr").touch()
    os.setxattr(scratch / "xattr", "user.propmaster", b"1")
    return "extended attributes can be set"


def _try(name: str, attempt: Callable[[], str], consequence: str) -> Probe:
    try:
        return Probe(name, True, attempt(), consequence)
    except OSError as error:
        return Probe(name, False, error.strerror or str(error), consequence)


def _scratch(directory: Path, stack: ExitStack) -> Path:
    """Return a new directory on the file system where `directory` is, or would be made."""
    place = nearest_existing(directory)
    made = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=place, ignore_cleanup_errors=True)
    return Path(stack.enter_context(made))


def _free_bytes(directory: Path) -> int:
    filesystem = os.statvfs(nearest_existing(directory))
    return filesystem.f_bavail * filesystem.f_frsize
