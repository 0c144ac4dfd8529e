"""Step sync: what other steps left behind comes over what a session's local roots hold."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent_plugin.content import events
from agent_plugin.content.errors import UnsafePathError
from agent_plugin.content.manifest import Manifest
from agent_plugin.session.baseline import baseline_of
from agent_plugin.session.inputs import materialise
from agent_plugin.session.lay_over import lay_over
from agent_plugin.session.manifests import find_outputs, merge_by_root
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.roots import session_directory_name
from agent_plugin.session.start_result import NOTHING_MOVED, StartResult, root_result
from agent_plugin.session.state import COPIED, VIRTUAL, RootState, SessionState, StateFile
from agent_plugin.transfer.context import TransferContext

log = events.get_logger()


def sync_step(
    step_id: str,
    depends_on: Sequence[str] | None,
    context: TransferContext,
    state_file: StateFile,
    *,
    mounts: Mounts,
) -> StartResult:
    """Bring the outputs of the steps that a step depends on, over what is there.

    To a mounted root they come without their bytes.

    Args:
        step_id: The step about to run.
        depends_on: The steps it depends on, in order; None takes them from the job document.
        context: The services.
        state_file: Of a started session.
        mounts: The host's.

    Raises:
        SessionStateError: The session has not started.
        PropmasterError: Any other of the tree.
    """
    begun = time.monotonic()
    state = state_file.read_ready()
    if depends_on is None:
        depends_on = state.job.step_dependencies.get(step_id, ())
    _note_unfinished(step_id, state, state_file)
    outputs = [
        output
        for dependency in depends_on
        for output in find_outputs(context, state.job, step_id=dependency)
    ]
    known = len(state.roots)
    merged = [
        (_state_of_root(state, location, root_path), manifest)
        for (location, root_path), manifest in merge_by_root(outputs).items()
    ]
    if len(state.roots) > known:
        # Who ends the session removes what the state names, so it is named before it is made.
        state_file.write(state)
    return _bring(step_id, merged, state, context, state_file, mounts, begun)


def sync_given(
    label: str,
    given: Mapping[int, Manifest],
    context: TransferContext,
    state_file: StateFile,
    *,
    mounts: Mounts,
) -> StartResult:
    """Bring given files over what is there, as `sync_step` brings those that it has found.

    Args:
        label: Stands for the step: after a kill, the same brings it to its end.
        given: The files of roots, by the index of one of the job's manifests.
        context: The services.
        state_file: Of a started session.
        mounts: The host's.

    Raises:
        SessionStateError: The session has not started.
        PropmasterError: Any other of the tree.
    """
    begun = time.monotonic()
    state = state_file.read_ready()
    _note_unfinished(label, state, state_file)
    merged = [
        (next(root for root in state.roots if index in root.manifests), manifest)
        for index, manifest in given.items()
    ]
    return _bring(label, merged, state, context, state_file, mounts, begun)


def _note_unfinished(step_id: str, state: SessionState, state_file: StateFile) -> None:
    if step_id not in state.unfinished_steps:
        # Until all is there nobody may take what has come for a task's own output.
        state.unfinished_steps.append(step_id)
        state_file.write(state)


def _bring(
    step_id: str,
    merged: Sequence[tuple[RootState, Manifest]],
    state: SessionState,
    context: TransferContext,
    state_file: StateFile,
    mounts: Mounts,
    begun: float,
) -> StartResult:
    """Bring the outputs that a step depends on, and note that they are there."""
    copied = [(root, manifest) for root, manifest in merged if root.file_system == COPIED]
    done = iter(materialise(copied, state, context, kind="sync-step", step=step_id))
    results = [next(done) if root.file_system == COPIED else NOTHING_MOVED for root, _ in merged]
    for root, manifest in merged:
        if root.file_system == VIRTUAL:
            lay_over(root, manifest, state, state_file, mounts, context.cancellation)
        else:
            root.baseline.update(baseline_of(root, manifest, state, context, only_known=True))
    state.unfinished_steps.remove(step_id)
    state_file.write(state)
    result = StartResult(
        roots=[
            root_result(root, manifest, moved)
            for (root, manifest), moved in zip(merged, results, strict=True)
        ],
        path_mapping_rules=[],
        seconds=round(time.monotonic() - begun, 3),
    )
    log.info(
        events.STEP_SYNCED,
        extra={
            "session": state.session_id,
            "step": step_id,
            "files": sum(root.files for root in result.roots),
            "bytes_fetched": sum(root.bytes_fetched for root in result.roots),
            "seconds": result.seconds,
        },
    )
    return result


def _state_of_root(state: SessionState, location: str | None, root_path: str) -> RootState:
    """Return the root that another step's outputs belong to; one is added if the job has none."""
    for root in state.roots:
        for index in root.manifests:
            properties = state.job.attachments.manifests[index]
            if (properties.file_system_location_name, properties.root_path) == (
                location,
                root_path,
            ):
                return root
    local = Path(state.session_dir) / session_directory_name(root_path)
    if not local.resolve().is_relative_to(Path(state.session_dir).resolve()):
        raise UnsafePathError(f"{local} is outside the session directory", hint="remove the link")
    for root in state.roots:
        if root.local_root == os.fspath(local):
            return root
    added = RootState(
        local_root=os.fspath(local),
        root_path=root_path,
        file_system=COPIED,
        manifests=[],
        output_directories=[],
    )
    state.roots.append(added)
    return added
