"""What has to move: one fetch per digest, however many paths want it.

Reads the disk and moves nothing.
"""

import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import EMPTY_HASH, Digest
from agent_plugin.content.errors import (
    CacheUnsafeError,
    LocalError,
    LocalReadError,
    NoSpaceError,
    PathClashError,
    local_write_error,
)
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.manifest import FileEntry, Manifest, find_folding_clashes
from agent_plugin.content.owner import Owner, acting, make_directories
from agent_plugin.content.safe_path import Root
from agent_plugin.content.snapshot import FoundFile, HashCache, hash_files
from agent_plugin.content.store import BlobSource, Cancellation
from agent_plugin.transfer.folding import folds_names

# Left free besides what is going to be written, for logs and the job's own temporary files.
SPARE_BYTES: Final = 64 * 1024 * 1024

EMPTY: Final = Digest(EMPTY_HASH, 0)

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where content comes from that is no store's: objects whose hashes nobody knows.

    The digests of such a plan are names, not hashes. So the blob cache and what is remembered of
    stores have nothing to do with it, and a file in place is told by size and time.

    Attributes:
        open: Opens it at the first call; any thread may call it.
        names: What the content of each path is called, in the ledger and in messages.
    """

    open: Callable[[], BlobSource]
    names: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What a root lacks.

    Attributes:
        root: Where the files go.
        wanted: The entries to place, by digest, in the manifest's order.
        kept: Entries whose file is in place already, verified.
        retimed: Of the kept entries those whose file has another time than the entry.
        hidden: Nobody looks at the root before it gets its real name, so that files may be written
            under theirs.
        exclusive: Nobody else places files under the root meanwhile.
        follow_root: Whether the root may be a link.
        owner: Whose its files are; None: this process's user's.
        cached: Of the wanted digests those that the blob cache had when it was asked.
        origin: Where the content comes from; None for the job's store.
    """

    root: Path
    wanted: dict[Digest, list[FileEntry]] = field(default_factory=dict)
    kept: list[FileEntry] = field(default_factory=list)
    retimed: list[FileEntry] = field(default_factory=list)
    hidden: bool = False
    exclusive: bool = False
    follow_root: bool = True
    owner: Owner | None = None
    cached: set[Digest] = field(default_factory=set)
    origin: Origin | None = None

    @property
    def bytes_to_place(self) -> int:
        """Bytes of all files to place."""
        return sum(digest.size * len(entries) for digest, entries in self.wanted.items())

    @property
    def files_to_place(self) -> int:
        """Number of files to place."""
        return sum(len(entries) for entries in self.wanted.values())


def plan_download(
    manifest: Manifest,
    root: Path,
    hash_cache: HashCache | None,
    *,
    hidden: bool = False,
    exclusive: bool = False,
    follow_root: bool = True,
    owner: Owner | None = None,
    cancellation: Cancellation | None = None,
    origin: Origin | None = None,
) -> DownloadPlan:
    """Compare a manifest with what is at its root.

    A file that is there counts only if its bytes hash to the entry's digest; size and time are not
    proof. But of an origin nobody knows the hashes: there a file counts that has the entry's size
    and time, which it gets when all of it has come. Files that the manifest does not name are left
    alone.

    Raises:
        UnsafePathError: A link stands where a directory must be, the root itself included unless
            `follow_root` is set.
        PathClashError: A file stands where a directory must be, or the file system folds names
            that the manifest keeps apart, or an entry has the name of a temporary file of ours.
        LocalReadError, FileChangedError: A file that is there can not be read.
        CancelledError: Cancellation was wished while such a file was read.
        NoSpaceError, LocalWriteError: The root can not be made, or not be written.
    """
    _refuse_partials(manifest)
    plan = DownloadPlan(
        root,
        hidden=hidden,
        exclusive=exclusive,
        follow_root=follow_root,
        owner=owner,
        origin=origin,
    )
    present = {}
    if _has_entries(root, owner):
        with Root(root, follow=follow_root, owner=owner) as opened:
            files = _stat_all(
                opened, manifest.entries, cancellation or Cancellation(), hidden=hidden
            )
            present = (
                _present(manifest, opened, files, hash_cache, cancellation)
                if origin is None
                else _present_by_time(manifest, files)
            )
    try:
        make_directories(root, owner, shared=follow_root)
        with Root(root, follow=follow_root, owner=owner) as opened, acting(owner):
            _check_folding(manifest, opened)
    except OSError as error:
        raise local_write_error(error, os.fspath(root)) from error
    for entry in manifest.entries:
        found = present.get(entry.path)
        if found is None:
            plan.wanted.setdefault(entry.digest, []).append(entry)
            continue
        plan.kept.append(entry)
        # Below the microsecond there is nothing to set, and a job's own file is not ours to change.
        if found.mtime_ns // 1000 != entry.mtime:
            plan.retimed.append(entry)
    return plan


def survey(
    plans: Sequence[DownloadPlan], cache: BlobCache | None, cancellation: Cancellation
) -> None:
    """Note what the cache has, and see that the disks hold what is to come.

    Args:
        plans: What is to come, several roots may share a disk; their `cached` is filled in.
        cache: Where fetched blobs are kept as well, or None.
        cancellation: Checked at each blob.

    Raises:
        CancelledError: Cancellation was wished.
        LocalReadError: A root is gone, or not to be looked at.
        NoSpaceError: Naming what is needed and what is free; nothing was written.
        CacheUnsafeError: Others can write to the cache.
    """
    if cache is not None:
        _look_into(cache, plans, cancellation or Cancellation())
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for plan in plans:
        try:
            with acting(plan.owner):
                device = plan.root.stat().st_dev
        except OSError as error:
            raise LocalReadError(f"{plan.root}: {error.strerror}") from error
        places.setdefault(device, plan.root)
        needed[device] = needed.get(device, 0) + plan.bytes_to_place
    for device in needed:
        # Only what shares a disk with a root: the cache evicts, or is done without, elsewhere.
        if cache is not None and cache.device == device:
            fetched = {
                digest
                for plan in plans
                if plan.origin is None
                for digest in plan.wanted.keys() - plan.cached
            }
            needed[device] += sum(digest.size for digest in fetched)
    for device, size in needed.items():
        filesystem = os.statvfs(places[device])
        free = filesystem.f_bavail * filesystem.f_frsize
        if size and size + SPARE_BYTES > free:
            raise NoSpaceError(
                f"{places[device]}: {size} bytes are needed and {free} are free",
                hint="free some space, or use another disk for sessions or for the blob cache",
            )


def find_cached(
    cache: BlobCache, digests: Iterable[Digest], cancellation: Cancellation
) -> set[Digest]:
    """Return those blobs that a cache has, as far as it can be looked into.

    Raises:
        CancelledError: Cancellation was wished.
        CacheUnsafeError: Others can write to the cache.
    """
    found = set()
    try:
        for digest in digests:
            cancellation.check()
            if cache.contains(digest):
                found.add(digest)
    except CacheUnsafeError:
        raise
    except LocalError as error:
        log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
    return found


def _has_entries(root: Path, owner: Owner | None) -> bool:
    try:
        with acting(owner), os.scandir(root) as entries:
            return next(entries, None) is not None
    except FileNotFoundError:
        return False
    except NotADirectoryError as error:
        raise PathClashError(f"{root} is not a directory", hint="remove it") from error
    except OSError as error:
        raise LocalReadError(f"{root}: {error.strerror}") from error


def _present(
    manifest: Manifest,
    root: Root,
    files: Iterable[FoundFile],
    hash_cache: HashCache | None,
    cancellation: Cancellation | None,
) -> dict[str, FoundFile]:
    """Return the files that stand at their entry's path with the entry's bytes, by path."""
    entries = manifest.by_path()
    candidates = [found for found in files if found.size == entries[found.path].size]
    return {
        found.path: found
        for found, digest in hash_files(root, candidates, hash_cache, cancellation=cancellation)
        if digest.hex == entries[found.path].hash
    }


def _present_by_time(manifest: Manifest, files: Iterable[FoundFile]) -> dict[str, FoundFile]:
    """Return the files that have their entry's size and time, by path."""
    entries = manifest.by_path()
    return {
        found.path: found
        for found in files
        if (found.size, found.mtime_ns // 1000)
        == (entries[found.path].size, entries[found.path].mtime)
    }


def _stat_all(
    root: Root, entries: Sequence[FileEntry], cancellation: Cancellation, *, hidden: bool
) -> Iterable[FoundFile]:
    # In a hidden root a file has its name before it is its owner's (placement.py).
    owner = root.owner if hidden else None
    for entry in entries:
        cancellation.check()
        parent, _, name = entry.path.rpartition("/")
        try:
            directory = root.directory(parent, create=False)
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LocalReadError(f"{root.path}/{entry.path}: {error.strerror}") from error
        is_given = owner is None or owner.has_file(status, shared=root.follow)
        if stat.S_ISREG(status.st_mode) and is_given:
            yield FoundFile.of(entry.path, status)


def _look_into(cache: BlobCache, plans: Sequence[DownloadPlan], cancellation: Cancellation) -> None:
    for plan in plans:
        if plan.origin is None:
            plan.cached.update(find_cached(cache, plan.wanted, cancellation))


def _refuse_partials(manifest: Manifest) -> None:
    for entry in manifest.entries:
        if is_partial(entry.path.rpartition("/")[2]):
            raise PathClashError(
                f"{entry.path} has a name that is kept for temporary files",
                hint="rename the file, or leave it out",
            )


def _check_folding(manifest: Manifest, root: Root) -> None:
    """Refuse names that this file system would not keep apart, before any is written."""
    if not folds_names(root.fd):
        return
    clashes = find_folding_clashes([entry.path for entry in manifest.entries])
    if clashes:
        first, second = clashes[0]
        raise PathClashError(
            f"{first} and {second} are one name on the file system of {root.path}"
            f" ({len(clashes)} such pairs)",
            hint="use a file system that keeps upper and lower case apart, or rename the files",
        )
