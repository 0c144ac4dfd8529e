"""How manifests become local roots: plan all, see that the disks hold all, then move.

A root of the session that holds nothing yet is built beside its place under a hidden name, and gets
its own name when everything in it is complete. So nobody ever sees half a root, and the files in it
need no temporary names, which would cost as much as the files. A root that holds something already
(one that a rule maps to a directory of the host, or one to which a step's dependencies are added)
is changed in place, file by file, each by rename; so is an empty one that something is mounted on,
because nothing can take its name.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from agent_plugin.content.errors import UnsafePathError, local_write_error
from agent_plugin.content.leftovers import partial_name, prune
from agent_plugin.content.manifest import Manifest
from agent_plugin.content.owner import Owner, acting, make_directories
from agent_plugin.content.safe_path import Root
from agent_plugin.session.state import RootState, SessionState
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import TransferResult, download
from agent_plugin.transfer.ledger import TransferSpec
from agent_plugin.transfer.plan import DownloadPlan, Origin, plan_download, survey

SOURCE: Final = "source"


def materialise(
    roots: Sequence[tuple[RootState, Manifest | None]],
    state: SessionState,
    context: TransferContext,
    *,
    kind: str,
    step: str = "",
    origins: Mapping[str, Origin] = MappingProxyType({}),
) -> list[TransferResult]:
    """Bring the files of manifests to their local roots.

    Args:
        roots: Each local root with its files; None makes an empty directory.
        state: The session.
        context: The services.
        kind: Of the transfers, for the ledger; those of input sources are `source`.
        step: The step they are for, for the ledger.
        origins: Of input sources, by local root, where their content comes from.

    Raises:
        NoSpaceError: A disk does not hold all that is to come; nothing was written.
        PropmasterError: Any other of the tree.
    """
    plans = [
        _plan(root, manifest, state, context, origins.get(root.local_root))
        for root, manifest in roots
    ]
    survey(plans, context.cache, context.cancellation)
    context.expect(
        sum(plan.files_to_place for plan in plans), sum(plan.bytes_to_place for plan in plans)
    )
    results = []
    stored = [plan for plan in plans if plan.origin is None]
    with context.leased(state.session_id, {digest for plan in stored for digest in plan.wanted}):
        for plan, (root, _) in zip(plans, roots, strict=True):
            spec = TransferSpec(
                kind=kind if plan.origin is None else SOURCE,
                source=context.store_url if plan.origin is None else root.root_path,
                destination=root.local_root,
                session=state.session_id,
                job=state.job.job_id,
                step=step,
            )
            results.append(download(plan, context, spec))
            if plan.hidden:
                _reveal(plan.root, Path(root.local_root), plan.owner)
    return results


def hidden_root(local_root: Path) -> Path:
    """Return where a root is built before it gets its name."""
    return local_root.with_name(partial_name(local_root.name))


def _plan(
    root: RootState,
    manifest: Manifest | None,
    state: SessionState,
    context: TransferContext,
    origin: Origin | None,
) -> DownloadPlan:
    place = Path(root.local_root)
    owner = context.owner
    own = state.owns(root)
    if place.is_symlink() if own else root.source is not None:
        # Now, before anything is written; a link that comes later is refused where it is opened.
        raise UnsafePathError(
            f"{place} is {'' if own else 'behind '}a symbolic link where a directory must be",
            hint="remove the link; see what the job did to its session directory",
        )
    try:
        if manifest is None:
            make_directories(place, owner, shared=not own)
            return DownloadPlan(place, follow_root=not own, owner=owner, origin=origin)
        hidden = own and not _holds_anything(place) and not _is_mount_point(place)
        if hidden:
            _clear(hidden_root(place), manifest, owner)
    except OSError as error:
        raise local_write_error(error, os.fspath(place)) from error
    return plan_download(
        manifest,
        hidden_root(place) if hidden else place,
        context.index,
        hidden=hidden,
        exclusive=own,
        follow_root=not own,
        owner=owner,
        cancellation=context.cancellation,
        origin=origin,
    )


def _holds_anything(directory: Path) -> bool:
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is not None
    except FileNotFoundError:
        # A broken link is something; a root must not be made where it leads.
        return directory.is_symlink()


def _is_mount_point(directory: Path) -> bool:
    """Tell whether a directory is on another mount than the one above; False if it is not there.

    The ids are compared, since a directory that is bound to one of the same device has its number.
    Source: proc(5), /proc/PID/fdinfo, `mnt_id`.
    """
    try:
        return _mount_of(directory) != _mount_of(directory.parent)
    except FileNotFoundError:
        return False


def _mount_of(directory: Path) -> str:
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        facts = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
    finally:
        os.close(fd)
    return next(line for line in facts.splitlines() if line.startswith("mnt_id:"))


def _clear(hidden: Path, manifest: Manifest, owner: Owner | None) -> None:
    """Remove what a killed start left that is not of this manifest, or what a job planted."""
    if os.path.lexists(hidden):
        # From the directory above, since a job may put a link in its place at any time.
        with Root(hidden.parent, owner=owner) as above, acting(owner):
            prune(above, hidden.name, [entry.path for entry in manifest.entries])


def _reveal(hidden: Path, place: Path, owner: Owner | None) -> None:
    try:
        if owner is None:
            _take_after(hidden, place)
        with acting(owner):
            hidden.rename(place)
    except OSError as error:
        raise local_write_error(error, os.fspath(place)) from error


def _take_after(hidden: Path, place: Path) -> None:
    """Give a root the owner and mode of the empty directory that it replaces, if there is one."""
    try:
        status = place.lstat()
    except FileNotFoundError:
        return
    fd = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.geteuid() == 0:
            os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
    finally:
        os.close(fd)
