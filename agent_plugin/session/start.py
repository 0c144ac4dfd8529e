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

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import (
    PropmasterError,
    SessionStateError,
    local_write_error,
)
from agent_plugin.content.manifest import Manifest, merge
from agent_plugin.session.bring import bring
from agent_plugin.session.input_sources import (
    SourceResult,
    open_servers,
    open_sources,
    source_result,
    source_roots,
)
from agent_plugin.session.job import JobDocument
from agent_plugin.session.manifests import fetch_input_manifest
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.roots import (
    LocalRoot,
    choose_local_roots,
    path_mapping_rules,
)
from agent_plugin.session.source_place import set_aside
from agent_plugin.session.start_result import NOTHING_MOVED, RootResult, StartResult, root_result
from agent_plugin.session.state import (
    COPIED,
    VERSION,
    RootState,
    SessionState,
    StateFile,
    session_id,
)
from agent_plugin.transfer.context import TransferContext

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
        wished=file_system or job.attachments.file_system,
    )
    if before is not None:
        _carry_over(before, state)
    state_file.write(state)
    try:
        servers = partial(open_servers, environment, mounts)
        found = open_sources(state, state_file, sources, context, servers)
        for root in sources:
            if root.is_parted:
                # Who starts a session again has no task, and so no part of anything.
                set_aside(root, state, mounts)
        manifests = {root.local_root: _manifest_of(root, job, context, given) for root in roots}
        manifests |= {
            root.local_root: found.opened[root.local_root].manifest
            for root in sources
            if root.local_root in found.opened and not root.is_parted
        }
        moved, reasons = bring(
            manifests,
            found,
            state.wished,
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


def _carry_over(before: SessionState, state: SessionState) -> None:
    state.was_ready = before.ready or before.was_ready
    state.unfinished_steps = before.unfinished_steps
    state.answered, state.left = before.answered, before.left
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
                root.part, root.heard = same.part, same.heard


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
