"""Which roots of a session are mounted instead of copied, why, and how they are.

A root can be mounted when the host can (/dev/fuse, and CAP_SYS_ADMIN or fusermount3), when it has
inputs, and when it is a directory of the session that no other root is in. Everything else is
copied, and the result says why.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.errors import MountFailedError, MountReadFailedError, local_write_error
from agent_plugin.content.fusermount import may_administer
from agent_plugin.content.leftovers import partial_name
from agent_plugin.content.manifest import Manifest
from agent_plugin.content.mount_probe import fusepy_obstacle, kernel_obstacle, may_allow_other
from agent_plugin.content.mount_table import is_mounted
from agent_plugin.content.owner import Owner, make_directories
from agent_plugin.content.writes_probe import AUTO as WRITES_AUTO
from agent_plugin.content.writes_probe import choose_writes
from agent_plugin.session.copy_room import CopyRoom
from agent_plugin.session.mount_control import ask_mount
from agent_plugin.session.mount_request import MountRequest
from agent_plugin.session.mounts import FailedRead, Mounts
from agent_plugin.session.state import COPIED, VIRTUAL, RootState, SessionState
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.plan import SPARE_BYTES

AUTO: Final = "AUTO"
# What is copied in about as long as a mount takes, and is faster afterwards.
AUTO_COPIED_BYTES: Final = 64 * 1024 * 1024
AUTO_COPIED_FILES: Final = 500

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class Choice:
    """How a root is brought in, and why not as it was wished, or as AUTO found best."""

    file_system: str
    reason: str = ""


def mount_obstacle(session_dir: Path) -> str:
    """Return why this host can not mount, or that it may not; empty if nothing is known to stop it.

    Without root a mount may be for its user alone. That is no obstacle where only that user gets to
    the session directory; where it is open to others, jobs are run by another user.
    """
    obstacle = kernel_obstacle()
    if obstacle and fusepy_obstacle():
        return obstacle
    if may_administer() or may_allow_other():
        return ""
    mode = os.stat(session_dir).st_mode  # noqa: PTH116 - its mode, of a path as text
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return (
            f"{session_dir} is open to others, whom a mount made without root lets in only with"
            " user_allow_other in /etc/fuse.conf"
        )
    return ""


def choose(
    wished: str,
    root: RootState,
    manifest: Manifest | None,
    state: SessionState,
    room: CopyRoom,
) -> Choice:
    """Decide for one root.

    Args:
        wished: `COPIED`, `VIRTUAL` or `AUTO`.
        root: The root.
        manifest: Its inputs, None if it has none.
        state: The session.
        room: What is going to be copied to the session's disk besides.

    Raises:
        CacheUnsafeError: Others can write to the cache.
    """
    if wished == COPIED:
        return Choice(COPIED)
    obstacle = _obstacle(root, manifest, state)
    if obstacle or manifest is None:
        return Choice(COPIED, obstacle)
    if wished == VIRTUAL:
        return Choice(VIRTUAL)
    if len(manifest) > AUTO_COPIED_FILES or manifest.total_bytes > AUTO_COPIED_BYTES:
        return Choice(VIRTUAL, f"{len(manifest)} files of {manifest.total_bytes} bytes are many")
    filesystem = os.statvfs(state.session_dir)
    free = filesystem.f_bavail * filesystem.f_frsize
    needed = room.with_also(manifest, is_stored=root.source is None)
    if manifest.total_bytes and needed + SPARE_BYTES > free:
        more = needed - manifest.total_bytes
        beside = f" beside {more} of other inputs and of the blob cache" if more else ""
        return Choice(
            VIRTUAL, f"{manifest.total_bytes} bytes do not fit{beside} where {free} are free"
        )
    return Choice(COPIED, f"{len(manifest)} files of {manifest.total_bytes} bytes are few")


def _obstacle(root: RootState, manifest: Manifest | None, state: SessionState) -> str:
    if manifest is None:
        return "the root has no inputs"
    if not state.owns(root):
        return "the root is a directory of the host's own"
    place = Path(root.local_root)
    for other in state.roots:
        if other is not root and (
            Path(other.local_root).is_relative_to(place) or place.is_relative_to(other.local_root)
        ):
            return f"{other.local_root} is nested with it"
    return mount_obstacle(Path(state.session_dir))


def mount(
    root: RootState,
    manifest: Manifest,
    state: SessionState,
    context: TransferContext,
    mounts: Mounts,
    environment: Mapping[str, str],
) -> None:
    """Mount a root, or leave it mounted if it is; what was written to it before is still there.

    Raises:
        MountFailedError: That could not be done; nothing is mounted.
        PropmasterError: Any other of the tree.
    """
    place = Path(root.local_root)
    root.written_to = os.fspath(_work_dir(place) / "upper")
    root.control = mounts.control_of(place)
    if mounts.is_served(place):
        return
    if is_mounted(place):
        mounts.end(place)
    # Its error ledger is a new one.
    root.errors_told = 0
    session_dir = os.stat(state.session_dir)  # noqa: PTH116 - of a path as text
    owner = context.owner or Owner(session_dir.st_uid, session_dir.st_gid)
    try:
        if root.source is not None:
            make_directories(place.parent, context.owner, shared=False)
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise local_write_error(error, os.fspath(place)) from error
    writes = choose_writes(WRITES_AUTO, _work_dir(place))
    request = MountRequest(
        manifest=manifest,
        mountpoint=place,
        work_dir=_work_dir(place),
        store_url=context.store_url if root.source is None else root.root_path,
        account_id=getattr(context.open_store, "account_id", None) or "",
        writes=writes.writes,
        writes_reason=writes.reason,
        uid=owner.uid,
        gid=owner.gid,
        layers=root.layers,
        session=state.session_id,
        snapshot=root.snapshot,
        strict=root.source is not None and root.source.checksum_sha256 != "",
    )
    mounts.start(request, cancellation=context.cancellation, environment=environment)


def work_dir_name(local_root: Path) -> str:
    """Return the name, beside a root, of what its mount needs and of what is written to it."""
    return partial_name(f"{local_root.name}-mount")


def _work_dir(local_root: Path) -> Path:
    return local_root.with_name(work_dir_name(local_root))


def fall_back(root: RootState, error: MountFailedError) -> str:
    """Note that a root is copied after all; return why."""
    root.file_system, root.written_to, root.control = COPIED, "", ""
    log.warning(events.MOUNT_FELL_BACK, extra={"root": root.local_root, "reason": error.message})
    return error.message


def refuse_lost_mounts(roots: Sequence[RootState], mounts: Mounts) -> None:
    """See that what tasks wrote to mounted roots went to the mounts.

    Raises:
        MountFailedError: A mount is gone: what was written since is in the bare directory, where
            nobody looks for outputs. Or it has no server any more.
    """
    for root in roots:
        if root.file_system != VIRTUAL:
            continue
        place = Path(root.local_root)
        if not mounts.is_there(place):
            raise MountFailedError(
                f"{root.local_root} is not mounted any more: outputs of the task may be lost",
                hint="start the session again, which keeps what was written to the mount, and run"
                " the task again",
            )
        if not mounts.is_served(place):
            # A server may go on without its supervisor. Without one, reads fail unnoted.
            ask_mount(root.control, {"ask": "status"})


def refuse_failed_reads(roots: Sequence[RootState], mounts: Mounts) -> None:
    """See that no task was refused bytes of its inputs since this was asked before.

    Raises:
        MountReadFailedError: One was; names the first file. It is told once.
    """
    failed: list[tuple[str, FailedRead]] = []
    for root in roots:
        if root.file_system == VIRTUAL:
            errors = mounts.errors_to_tell(Path(root.local_root))
            failed += [(root.local_root, error) for error in errors[root.errors_told :]]
            root.errors_told = len(errors)
    if failed:
        local_root, first = failed[0]
        # `.` is what a mount has that died as a whole.
        what = local_root if first.path == "." else f"{first.path} in {local_root}"
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise MountReadFailedError(
            f"{what}{more} could not be read by the task: {first.reason}",
            hint="mend what the reason names, then run the task again",
        )
