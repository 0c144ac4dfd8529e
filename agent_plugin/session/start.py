"""Session start: the job's inputs get to their local roots.

The order: read every manifest and refuse a bad one, plan every root, see that the disk holds it
all, and only then write. The state file says `ready` last; until then no other hook works.
"""

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import (
    CancelledError,
    MountFailedError,
    PropmasterError,
    SessionStateError,
    local_write_error,
)
from agent_plugin.content.manifest import Manifest, merge
from agent_plugin.session.baseline import baseline_of
from agent_plugin.session.input_sources import (
    FoundSources,
    SourceResult,
    is_required,
    open_sources,
    source_result,
    source_roots,
    wish_for,
)
from agent_plugin.session.inputs import materialise
from agent_plugin.session.job import JobDocument
from agent_plugin.session.manifests import fetch_input_manifest
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.roots import (
    LocalRoot,
    choose_local_roots,
    is_below,
    path_mapping_rules,
)
from agent_plugin.session.start_result import NOTHING_MOVED, RootResult, StartResult, root_result
from agent_plugin.session.state import (
    COPIED,
    VERSION,
    VIRTUAL,
    RootState,
    SessionState,
    StateFile,
    session_id,
)
from agent_plugin.session.virtual import Choice, choose, fall_back, mount
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import TransferResult

if TYPE_CHECKING:
    from agent_plugin.sources.access import SourceServers

log = events.get_logger()


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
        environment: Of the mounts' processes, and how input sources are reached.
        given: Further inputs, over those of the job's manifest with that index.

    Raises:
        SessionStateError: Another job's session was started in this directory.
        PropmasterError: Any other of the tree; the session is then not ready, no task may run.
    """
    begun = time.monotonic()
    _make_session_dir(session_dir)
    before = _state_before(state_file, job, session_dir)
    roots = _root_states(job, choose_local_roots(job, session_dir))
    sources = source_roots(job, session_dir, roots, before)
    state = SessionState(
        version=VERSION,
        session_id=session_id(session_dir),
        session_dir=os.fspath(session_dir),
        ready=False,
        job=job,
        roots=[*roots, *sources],
        account_id=_account_id(context),
    )
    if before is not None:
        _carry_over(before, state)
    state_file.write(state)
    try:
        servers = partial(_servers, environment, mounts)
        found = open_sources(state, state_file, sources, context, servers)
        manifests = {root.local_root: _manifest_of(root, job, context, given) for root in roots}
        manifests |= {local_root: source.manifest for local_root, source in found.opened.items()}
        moved, reasons = _bring(
            manifests,
            found,
            file_system or job.attachments.file_system,
            state,
            context,
            mounts,
            environment,
        )
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
            root_result(
                root,
                manifests[root.local_root],
                moved.get(root.local_root, NOTHING_MOVED),
                reasons[root.local_root],
            )
            for root in roots
        ],
        path_mapping_rules=path_mapping_rules(job, session_dir),
        seconds=round(time.monotonic() - begun, 3),
        sources=[
            source_result(
                root,
                found,
                moved.get(root.local_root, NOTHING_MOVED),
                reasons.get(root.local_root, ""),
            )
            for root in sources
        ],
    )
    inputs: list[RootResult | SourceResult] = [*result.roots, *result.sources]
    log.info(
        events.SESSION_STARTED,
        extra={
            "session": state.session_id,
            "job": job.job_id,
            "files": sum(root.files for root in inputs),
            "bytes": sum(root.bytes for root in inputs),
            "bytes_fetched": sum(root.bytes_fetched for root in inputs),
            "seconds": result.seconds,
        },
    )
    return result


def _bring(
    manifests: Mapping[str, Manifest | None],
    found: FoundSources,
    wish: str,
    state: SessionState,
    context: TransferContext,
    mounts: Mounts,
    environment: Mapping[str, str],
) -> tuple[dict[str, TransferResult], dict[str, str]]:
    """Mount or copy roots and sources.

    Returns:
        By local root what was copied, and why the file system is not the one that was wished, or
        why AUTO chose so.
    """
    inputs = [root for root in state.roots if root.local_root in manifests]
    reasons = {}
    copied = []
    for root in inputs:
        manifest = manifests[root.local_root]
        # What was ready once stays as it is, but for a source that was not known then.
        again = state.was_ready and root.local_root not in found.new
        reasons[root.local_root] = _mount(
            root, manifest, wish, state, context, mounts, environment, again=again
        )
        if root.file_system == COPIED:
            copied.append((root, _without_outputs(manifest, root) if state.was_ready else manifest))
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


def _servers(environment: Mapping[str, str], mounts: Mounts) -> "SourceServers":
    # Here, because it loads libraries for S3 that sessions without sources do without.
    from agent_plugin.sources.access import SourceServers  # noqa: PLC0415 - see above

    limits = mounts.store_limits
    if limits is None:
        return SourceServers(environment)
    return SourceServers(environment, policy=limits.retry_policy(), bandwidth=limits.bandwidth())


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
    *,
    again: bool,
) -> str:
    """Mount a root if it is to be; return why it is not, or why AUTO chose so.

    `again` says that it was in place before, in a session that was ready.
    """
    if root.file_system == VIRTUAL:
        # Of a session that is started again: as it was.
        choice = Choice(VIRTUAL)
    elif again:
        return ""
    else:
        choice = choose(wish_for(root, wish), root, manifest, state)
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


def _account_id(context: TransferContext) -> str | None:
    return getattr(context.open_store, "account_id", None)
