"""What the plugin tells the mount process: one JSON file, closed to others, with a version.

The process is `python -m vfs SPEC`. It answers with one line of JSON on stdout when the mount can
be used (`Ready`), and serves until it is unmounted.
"""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.content.bandwidth import Allowance, Bandwidth, Limit
from agent_plugin.content.errors import SessionStateError, local_write_error
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.log_file import LogPlace
from agent_plugin.content.pinned import own_directory
from agent_plugin.content.retry import RetryPolicy

VERSION: Final = 1
# What becomes of writing: kept above the inputs by the kernel, kept by the server, or refused.
OVERLAYFS: Final = "overlayfs"
OVERLAY: Final = "overlay"
NO_WRITES: Final = "none"
WRITES: Final = (OVERLAYFS, OVERLAY, NO_WRITES)
# In the work directory of a mount that may be made again with others: what it was written over.
INPUTS: Final = "inputs"
# The modification time of an error ledger of which somebody has been told: what fails from then on
# has lines of its own, however often it has failed before.
TOLD_NS: Final = 0


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was added to a mount after it began.

    Attributes:
        manifest: The file that holds the manifest; never changes.
        at: The directory at the top in which its files are; empty: over those that were there.
    """

    manifest: str
    at: str


class StoreLimits(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """How the store is talked to, as the settings' table `[store]` has it.

    Attributes:
        download, upload: How much may move; None for as much as there is.
    """

    concurrency: int
    attempts: int
    deadline_seconds: float
    connect_timeout: float
    read_timeout: float
    least_bytes_per_second: float
    download: Limit | None = None
    upload: Limit | None = None

    def retry_policy(self) -> RetryPolicy:
        """Return when requests are sent again."""
        return RetryPolicy(
            attempts=self.attempts,
            deadline_seconds=self.deadline_seconds,
            connect_timeout=self.connect_timeout,
            read_timeout=self.read_timeout,
            least_bytes_per_second=self.least_bytes_per_second,
        )

    def bandwidth(self) -> Bandwidth:
        """Return what may move, for one process of those that share the limits."""
        return Bandwidth(Allowance(self.download), Allowance(self.upload))


class MountSpec(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """One mount; all paths are absolute.

    Attributes:
        version: VERSION.
        name: Tells this mount from all others of the host; stands in the mount table.
        mountpoint: An empty directory.
        manifests: Files that hold manifests; of a path that stands in several the last counts.
        store_url: Where content comes from.
        account_id: The bucket's expected owner, empty if unknown.
        cache_dir: The host's blob cache; empty to do without.
        cache_max_bytes, cache_min_free_bytes, cache_shared: As the settings have them.
        work_dir: A directory of this mount alone, closed to others: `lower` is where the inputs
            are mounted for overlayfs, `upper` holds what is written, `work` is for what keeps it,
            `spool` is for content that the cache can not take.
        writes: One of WRITES.
        writes_reason: Why.
        uid, gid: To whom files and directories seem to belong.
        stream: Whether large blobs may be read before all of them is here and verified.
        xattrs: Whether to tell a file's hash and state as extended attributes; overlayfs then asks
            for one of its own for each file that is looked up.
        errors: The error ledger's file.
        control: The control socket's path.
        passthrough: Whether the kernel is to read cached blobs itself, if it can: `on`, `off`, or
            `auto` to decide by the size of the files.
        owner_pid: The process without which the mount goes away; 0 for none. Such a mount's own
            process is no child of whoever starts it, and so is left to clear up when all of the
            owner's processes are killed at once.
        layers: What was added, in that order.
        store_limits: None for what they are by default.
        transport: `auto`, `kernel` or `fusepy`.
        log: Where events go beside the process's standard error, if anywhere.
        cache_scope: For whom blobs are fetched (BlobCache.open).
        called: What the manifest is called in messages; empty for its own path.
        snapshot: The file that holds the snapshot whose objects the content comes from
            (object_snapshot.py), of which the manifests have the tree; then there is no cache, and
            `store_url` only says what it is. Empty for a store.
        spool_max_bytes: The most that is kept in `spool`; 0 for no limit.
        spool_min_free_bytes: What its disk is left, as far as keeping less there does it.
        gives_back: Whether the work directory is given to `uid` when nothing is mounted any more,
            and removed if nothing was written, so that its user can remove it.
    """

    version: int
    name: str
    mountpoint: str
    manifests: list[str]
    store_url: str
    account_id: str
    cache_dir: str
    cache_max_bytes: int
    cache_min_free_bytes: int
    cache_shared: bool
    work_dir: str
    writes: str
    uid: int
    gid: int
    stream: bool
    xattrs: bool
    errors: str
    control: str
    passthrough: str = "auto"
    owner_pid: int = 0
    layers: list[Layer] = []
    writes_reason: str = ""
    store_limits: StoreLimits | None = None
    transport: str = "auto"
    cache_scope: str = ""
    called: str = ""
    gives_back: bool = False
    log: LogPlace | None = None
    snapshot: str = ""
    spool_max_bytes: int = 0
    spool_min_free_bytes: int = 0

    @property
    def lower(self) -> Path:
        """Where the server's own mount is: below the work directory if overlayfs is above it."""
        return Path(self.work_dir, "lower") if self.writes == OVERLAYFS else Path(self.mountpoint)

    @property
    def staged(self) -> Path:
        """Where a mount is made that takes the place of a dead one when it can be used."""
        return Path(self.work_dir, "staged")

    @property
    def mounted(self) -> list[Path]:
        """Where something of this mount may be mounted, what is above something else first."""
        return list(dict.fromkeys((Path(self.mountpoint), self.lower, self.staged)))

    @property
    def upper(self) -> Path:
        """Where what is written goes."""
        return Path(self.work_dir, "upper")


class Ready(msgspec.Struct, frozen=True, rename="camel"):
    """What the mount process prints when the mount can be used.

    Attributes:
        pid: Of the supervisor: SIGTERM unmounts.
        transport, writes: What was chosen.
        reason: Why that transport.
        writes_reason: Why, as far as writes go.
        files, bytes: In the tree.
        seconds: Since the process began.
    """

    pid: int
    transport: str
    writes: str
    files: int
    bytes: int
    seconds: float
    reason: str = ""
    writes_reason: str = ""


def path_below_layer(path: str) -> str:
    """Return a path without the directory at the top that a layer is in, if it is in one."""
    above, _, below = path.partition("/")
    return below if below and is_partial(above) else path


def write_spec(spec: MountSpec, path: Path) -> None:
    """Write a spec, closed to others, in place of what it was.

    Raises:
        NoSpaceError, LocalWriteError: It can not be written.
    """
    try:
        new = path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            # Not by msgspec: paths from the operating system may hold lone surrogates.
            file.write(json.dumps(msgspec.to_builtins(spec)).encode("ascii"))
        new.replace(path)
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error


def leave_only_upper(spec: MountSpec) -> None:
    """Remove from the work directory what was ours, when nothing is mounted any more.

    One by one and only what is empty, since the directory is one that a user may have named, and
    the marks that overlayfs keeps there: they mean nothing by themselves.
    """
    with suppress(OSError), own_directory(Path(spec.work_dir)) as work_dir:
        # Below a directory of ours that nobody else can write, names lead nowhere else.
        place = Path(f"/proc/self/fd/{work_dir}")
        with suppress(OSError):
            for kept in (place / "work/work").iterdir():
                status = kept.lstat()
                if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                    kept.unlink()
        for name in ("lower", "staged", "spool", "work/work", "work"):
            with suppress(OSError):
                (place / name).rmdir()
        if spec.gives_back:
            _give_back(spec, place, work_dir)


def _give_back(spec: MountSpec, place: Path, work_dir: int) -> None:
    with suppress(OSError):
        (place / "upper").rmdir()
    if not (place / "upper").exists():
        for name in ("marks", INPUTS):
            (place / name).unlink(missing_ok=True)
        Path(spec.work_dir).rmdir()
    elif os.geteuid() == 0:
        os.fchown(work_dir, spec.uid, spec.gid)


def read_spec(path: Path) -> MountSpec:
    """Read a spec.

    Raises:
        SessionStateError: It is not there, damaged, or of another version.
    """
    try:
        spec = msgspec.convert(json.loads(path.read_bytes()), MountSpec)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise SessionStateError(f"{path} can not be read: {error}") from error
    if spec.version != VERSION:
        raise SessionStateError(f"{path} is of version {spec.version}, not {VERSION}")
    if spec.writes not in WRITES:
        raise SessionStateError(
            f"{path}: writes is {spec.writes!r}, not one of {', '.join(WRITES)}"
        )
    return spec
