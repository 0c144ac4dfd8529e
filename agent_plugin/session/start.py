"""Session start and step sync: the job's inputs get to their local roots.

The order: read every manifest and refuse a bad one, plan every root, see that the disk holds it
all, and only then write. The state file says `ready` last; until then no other hook works.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import (
    MountFailedError,
    PropmasterError,
    SessionStateError,
    UnsafePathError,
    local_write_error,
)
from agent_plugin.content.manifest import Manifest, merge
from agent_plugin.content.snapshot import walk
from agent_plugin.session.inputs import materialise
from agent_plugin.session.job import JobDocument, PathMappingRule
from agent_plugin.session.lay_over import lay_over
from agent_plugin.session.manifests import fetch_input_manifest, find_outputs, merge_by_root
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.roots import (
    LocalRoot,
    choose_local_roots,
    is_below,
    path_mapping_rules,
    session_directory_name,
)
from agent_plugin.session.state import (
    COPIED,
    VERSION,
    VIRTUAL,
    BaselineFile,
    RootState,
    SessionState,
    StateFile,
    session_id,
)
from agent_plugin.session.virtual import Choice, choose, fall_back, mount
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import TransferResult

# Of a mounted root: its bytes come when they are read.
NOTHING_MOVED: Final = TransferResult(files=0, bytes=0, bytes_fetched=0, bytes_reused=0, seconds=0)

log = events.get_logger()


class RootResult(msgspec.Struct, rename="camel"):
    """What start did for one local root; sizes in bytes.

    Attributes:
        reason: Why the file system is not the one that was wished, or why AUTO chose it.
    """

    root_path: str
    local_root: str
    file_system: str
    files: int
    bytes: int
    bytes_fetched: int
    bytes_reused: int
    reason: str = ""


class StartResult(msgspec.Struct, rename="camel"):
    """What start did; printed by `session start --json`."""

    roots: list[RootResult]
    path_mapping_rules: list[PathMappingRule]
    seconds: float


def start(
    job: JobDocument,
    session_dir: Path,
    context: TransferContext,
    state_file: StateFile,
    *,
    mounts: Mounts,
    file_system: str | None = None,
    environment: Mapping[str, str] = os.environ,
    given: Mapping[int, Manifest] = MappingProxyType({}),
) -> StartResult:
    """Bring a job's inputs to their local roots, or go on where a killed start stopped.

    A session that has started before keeps what stands in its output directories, and what it knows
    of them: tasks may have worked there. Only what is missing comes back.

    Args:
        job: The job.
        session_dir: The session's directory.
        context: The services.
        state_file: Of the session.
        mounts: The host's.
        file_system: `COPIED`, `VIRTUAL` or `AUTO`; None for what the job says.
        environment: Of the mounts' processes.
        given: Further inputs, over those of the job's manifest with that index.

    Raises:
        SessionStateError: Another job's session was started in this directory.
        PropmasterError: Any other of the tree; the session is then not ready, no task may run.
    """
    begun = time.monotonic()
    _make_session_dir(session_dir)
    before = _state_before(state_file, job, session_dir)
    roots = _root_states(job, choose_local_roots(job, session_dir))
    state = SessionState(
        version=VERSION,
        session_id=session_id(session_dir),
        session_dir=os.fspath(session_dir),
        ready=False,
        job=job,
        roots=[*roots],
        account_id=_account_id(context),
    )
    if before is not None:
        _carry_over(before, state)
    state_file.write(state)
    try:
        manifests = wanted = [_manifest_of(root, job, context, given) for root in roots]
        wish = file_system or job.attachments.file_system
        reasons = [
            _mount(root, manifest, wish, state, context, mounts, environment)
            for root, manifest in zip(roots, manifests, strict=True)
        ]
        if state.was_ready:
            manifests = [
                _without_outputs(manifest, root)
                for root, manifest in zip(roots, manifests, strict=True)
            ]
        copied = [
            (root, manifest)
            for root, manifest in zip(roots, manifests, strict=True)
            if root.file_system == COPIED
        ]
        done = iter(materialise(copied, state, context, kind="sync-in"))
        results = [next(done) if root.file_system == COPIED else NOTHING_MOVED for root in roots]
        for root, manifest in copied:
            found = _baseline(root, manifest, state, context, only_known=state.was_ready)
            root.baseline = {**root.baseline, **found}
    except PropmasterError as error:
        log.error(  # noqa: TRY400 - an expected failure: its text says all, a trace says nothing
            events.SESSION_START_FAILED,
            extra={"session": state.session_id, "code": error.code, "reason": error.message},
        )
        raise
    state.ready = True
    state.account_id = _account_id(context)
    state_file.write(state)
    result = StartResult(
        roots=[
            _root_result(root, manifest, moved, reason)
            for root, manifest, moved, reason in zip(roots, wanted, results, reasons, strict=True)
        ],
        path_mapping_rules=path_mapping_rules(job, session_dir),
        seconds=round(time.monotonic() - begun, 3),
    )
    log.info(
        events.SESSION_STARTED,
        extra={
            "session": state.session_id,
            "job": job.job_id,
            "files": sum(root.files for root in result.roots),
            "bytes": sum(root.bytes for root in result.roots),
            "bytes_fetched": sum(root.bytes_fetched for root in result.roots),
            "seconds": result.seconds,
        },
    )
    return result


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
            root.baseline.update(_baseline(root, manifest, state, context, only_known=True))
    state.unfinished_steps.remove(step_id)
    state_file.write(state)
    result = StartResult(
        roots=[
            _root_result(root, manifest, moved)
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


def _state_before(
    state_file: StateFile, job: JobDocument, session_dir: Path
) -> SessionState | None:
    """Return the state of the session that was started here before, if it is this job's."""
    before = state_file.read()
    if before is not None and before.job.job_id != job.job_id:
        raise SessionStateError(
            f"a session of {before.job.job_id} was started in {session_dir}, not of {job.job_id}",
            hint="end it first: `propmaster session end` with the same --session-dir",
        )
    return before


def _mount(
    root: RootState,
    manifest: Manifest | None,
    wish: str,
    state: SessionState,
    context: TransferContext,
    mounts: Mounts,
    environment: Mapping[str, str],
) -> str:
    """Mount a root if it is to be; return why it is not, or why AUTO chose so."""
    if root.file_system == VIRTUAL:
        # Of a session that is started again: as it was.
        choice = Choice(VIRTUAL)
    elif state.was_ready:
        return ""
    else:
        choice = choose(wish, root, manifest, state)
    if choice.file_system == COPIED or manifest is None:
        if mounts.knows(Path(root.local_root)):
            # Of a start that failed, when something else was wished.
            mounts.end(Path(root.local_root))
        return choice.reason
    try:
        mount(root, manifest, state, context, mounts, environment)
    except MountFailedError as error:
        if state.was_ready:
            raise
        return fall_back(root, error)
    root.file_system = VIRTUAL
    return choice.reason


def _carry_over(before: SessionState, state: SessionState) -> None:
    state.was_ready = before.ready or before.was_ready
    state.unfinished_steps = before.unfinished_steps
    state.answered = before.answered
    local_roots = {root.local_root for root in state.roots}
    # A sync made them, or the job was mapped otherwise: they are to be removed when it all ends.
    state.roots += [
        msgspec.structs.replace(root, manifests=[], output_directories=[], baseline={})
        for root in before.roots
        if root.local_root not in local_roots
    ]
    if state.was_ready:
        known = {root.local_root: root for root in before.roots}
        for root in state.roots:
            if (same := known.get(root.local_root)) is not None:
                root.baseline = same.baseline
                root.file_system, root.written_to = same.file_system, same.written_to
                root.control, root.gone = same.control, same.gone
                root.layers, root.errors_told = same.layers, same.errors_told


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


def _make_session_dir(session_dir: Path) -> None:
    try:
        session_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise local_write_error(error, os.fspath(session_dir)) from error


def _root_states(job: JobDocument, local_roots: Sequence[LocalRoot]) -> list[RootState]:
    states = []
    for root in local_roots:
        if root.inside is not None:
            log.info(
                events.ROOT_NESTED,
                extra={"root": os.fspath(root.path), "inside": os.fspath(root.inside)},
            )
        manifests = [job.attachments.manifests[index] for index in root.manifests]
        directories = dict.fromkeys(
            directory for manifest in manifests for directory in manifest.output_directories
        )
        states.append(
            RootState(
                local_root=os.fspath(root.path),
                root_path=manifests[0].root_path,
                file_system=COPIED,
                manifests=list(root.manifests),
                output_directories=list(directories),
            )
        )
    return states


def _manifest_of(
    root: RootState, job: JobDocument, context: TransferContext, given: Mapping[int, Manifest]
) -> Manifest | None:
    manifests = []
    for index in root.manifests:
        manifests.append(fetch_input_manifest(job.attachments.manifests[index], context))
        manifests.append(given.get(index))
    return merge([manifest for manifest in manifests if manifest is not None])


def _baseline(
    root: RootState,
    manifest: Manifest | None,
    state: SessionState,
    context: TransferContext,
    *,
    only_known: bool,
) -> dict[str, BaselineFile]:
    """Return what is in the root's output directories now, with the manifest's hashes.

    A file that the manifest does not name (a mapped root may hold some) was there before the task
    as well; it gets no hash and counts as changed as soon as anything about it changes.
    """
    if not root.output_directories:
        return {}
    entries = manifest.by_path() if manifest is not None else {}
    baseline = {}
    for found in walk(
        Path(root.local_root),
        root.output_directories,
        follow_root=not state.owns(root),
        owner=context.owner,
        cancellation=context.cancellation,
    ):
        entry = entries.get(found.path)
        if entry is not None and (found.size, found.mtime_ns) != (entry.size, entry.mtime * 1000):
            # Somebody has written to it since it was placed, or the file system can not keep such
            # a time: content must decide, so nothing that stat() says is that of a known file.
            baseline[found.path] = BaselineFile(entry.hash, entry.size, entry.mtime, -1, -1, -1)
        elif entry is not None or not only_known:
            baseline[found.path] = BaselineFile(
                hash=entry.hash if entry else "",
                size=found.size,
                mtime=found.mtime_us,
                mtime_ns=found.mtime_ns,
                ctime_ns=found.ctime_ns,
                inode=found.inode,
            )
    return baseline


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


def _account_id(context: TransferContext) -> str | None:
    return getattr(context.open_store, "account_id", None)


def _root_result(
    root: RootState, manifest: Manifest | None, done: TransferResult, reason: str = ""
) -> RootResult:
    """Return what is in place: the manifest, placed or kept, but for what people took out."""
    return RootResult(
        root_path=root.root_path,
        local_root=root.local_root,
        file_system=root.file_system,
        files=len(manifest) - len(done.excluded) if manifest is not None else 0,
        bytes=(
            manifest.total_bytes - sum(entry.size for entry in done.excluded)
            if manifest is not None
            else 0
        ),
        bytes_fetched=done.bytes_fetched,
        bytes_reused=done.bytes_reused,
        reason=reason,
    )
