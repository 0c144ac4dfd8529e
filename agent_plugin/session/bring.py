"""Inputs come to their local roots: each is mounted, or copied, as was wished and can be done.

What can be mounted is mounted first, since nothing of it moves; then all that is copied is planned
together, so that what does not fit is told before the first byte.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from agent_plugin.content.errors import CancelledError, MountFailedError, PropmasterError
from agent_plugin.content.manifest import Manifest
from agent_plugin.session.baseline import baseline_of
from agent_plugin.session.copy_room import CopyRoom
from agent_plugin.session.input_sources import FoundSources, is_required, wish_for
from agent_plugin.session.inputs import materialise
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.roots import is_below
from agent_plugin.session.state import COPIED, VIRTUAL, RootState, SessionState
from agent_plugin.session.virtual import AUTO, Choice, choose, fall_back, mount
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import TransferResult


def bring(
    manifests: Mapping[str, Manifest | None],
    found: FoundSources,
    wish: str,
    state: SessionState,
    context: TransferContext,
    mounts: Mounts,
    environment: Mapping[str, str],
) -> tuple[dict[str, TransferResult], dict[str, str]]:
    """Mount or copy roots and sources.

    AUTO has its turn last: what it copies has to fit beside all that is copied anyway.

    Args:
        manifests: What is brought, by local root.
        found: The sources among them.
        wish: `COPIED`, `VIRTUAL` or `AUTO`, for those that say nothing themselves.
        state: The session.
        context: The services.
        mounts: The host's.
        environment: Of the mounts' processes.

    Returns:
        By local root what was copied, and why the file system is not the one that was wished, or
        why AUTO chose so.

    Raises:
        PropmasterError: As `start`.
    """
    inputs = [root for root in state.roots if root.local_root in manifests]
    reasons = {}
    room = CopyRoom(Path(state.session_dir), context.cache)
    for root in sorted(inputs, key=lambda root: wish_for(root, wish) == AUTO):
        manifest = manifests[root.local_root]
        # What was ready once stays as it is, but for a source that was not known then.
        again = state.was_ready and root.local_root not in found.new
        reasons[root.local_root] = _mount(
            root, manifest, wish, state, context, mounts, environment, again=again, room=room
        )
        if root.file_system == COPIED and not again and manifest and state.owns(root):
            room.add(manifest, is_stored=root.source is None)
    copied = [
        (root, _without_outputs(manifest, root) if state.was_ready else manifest)
        for root in inputs
        if root.file_system == COPIED
        for manifest in [manifests[root.local_root]]
    ]
    moved = _copy(copied, state, context, found)
    for root, manifest in copied:
        baseline = baseline_of(root, manifest, state, context, only_known=state.was_ready)
        root.baseline = {**root.baseline, **baseline}
    return moved, reasons


def _copy(
    copied: Sequence[tuple[RootState, Manifest | None]],
    state: SessionState,
    context: TransferContext,
    found: FoundSources,
) -> dict[str, TransferResult]:
    """Bring what is copied; return what moved, by local root.

    A source that can be done without comes after all else, and is skipped if it can not be had.
    """
    origins = {
        root.local_root: found.opened[root.local_root].origin()
        for root, _ in copied
        if root.local_root in found.opened
    }
    bring = partial(materialise, state=state, context=context, kind="sync-in", origins=origins)
    needed = [(root, manifest) for root, manifest in copied if is_required(root)]
    done = bring(needed)
    moved = {root.local_root: result for (root, _), result in zip(needed, done, strict=True)}
    for root, manifest in copied:
        if is_required(root):
            continue
        try:
            [moved[root.local_root]] = bring([(root, manifest)])
        except CancelledError:
            raise
        except PropmasterError as error:
            found.skip(root, error)
    return moved


def _mount(
    root: RootState,
    manifest: Manifest | None,
    wish: str,
    state: SessionState,
    context: TransferContext,
    mounts: Mounts,
    environment: Mapping[str, str],
    *,
    again: bool,
    room: CopyRoom,
) -> str:
    """Mount a root if it is to be; return why it is not, or why AUTO chose so.

    `again` says that it was in place before, in a session that was ready; `room`, what is
    going to be copied besides.
    """
    if root.file_system == VIRTUAL:
        # Of a session that is started again: as it was.
        choice = Choice(VIRTUAL)
    elif again:
        return ""
    else:
        choice = choose(wish_for(root, wish), root, manifest, state, room)
    if choice.file_system == COPIED or manifest is None:
        if mounts.knows(Path(root.local_root)):
            # Of a start that failed, when something else was wished.
            mounts.end(Path(root.local_root))
        return choice.reason
    try:
        mount(root, manifest, state, context, mounts, environment)
    except MountFailedError as error:
        if again:
            raise
        return fall_back(root, error)
    root.file_system = VIRTUAL
    return choice.reason


def _without_outputs(manifest: Manifest | None, root: RootState) -> Manifest | None:
    """Return the manifest without what stands in the output directories, a task's work perhaps."""
    if manifest is None:
        return None
    entries = [
        entry
        for entry in manifest.entries
        if not is_below(entry.path, root.output_directories)
        or not os.path.lexists(os.path.join(root.local_root, entry.path))  # noqa: PTH118 - speed
    ]
    return Manifest.of(entries) if entries else None
