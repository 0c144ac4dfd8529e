"""Roots that a session comes to know after its start.

The worker agent tells of a root without inputs when the first task has ended, and of a session that
its own script has started it tells as if we had. What a session knows of its roots (the job it is
of, where they are, what is in their output directories) is brought up to what a call says.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent_plugin.content.errors import JobInvalidError, SessionStateError
from agent_plugin.content.manifest import Manifest
from agent_plugin.session.job import JobDocument, ManifestProperties
from agent_plugin.session.roots import is_below
from agent_plugin.session.state import (
    COPIED,
    VERSION,
    BaselineFile,
    RootState,
    SessionState,
    session_id,
)

# Of the service, for a job.
_MOST_MANIFESTS = 10


def started_elsewhere(job: JobDocument, session_dir: Path) -> SessionState:
    """Return the state of a session that somebody else has brought the inputs of, without roots."""
    attachments = msgspec.structs.replace(job.attachments, manifests=())
    return SessionState(
        version=VERSION,
        session_id=session_id(session_dir),
        session_dir=os.fspath(session_dir),
        ready=True,
        job=msgspec.structs.replace(job, attachments=attachments),
        roots=[],
    )


def know_roots(
    state: SessionState, job: JobDocument, local_roots: Sequence[Path]
) -> dict[int, RootState]:
    """Have a session know the roots that a call tells of.

    Args:
        state: Of the session; it is changed, and not written.
        job: As the call has it.
        local_roots: Where the job's manifests are on this host, in their order.

    Returns:
        The manifests that the session did not know, by their index in `job`, with their roots. What
        is in the output directories of these counts as new.

    Raises:
        SessionStateError: The call is about another job, or another store; or a root has become
            another one.
        JobInvalidError: There would be more roots than a job can have.
    """
    for name, before, now in (
        ("job", state.job.job_id, job.job_id),
        ("queue", state.job.queue_id, job.queue_id),
        ("farm", state.job.farm_id, job.farm_id),
        ("store", state.job.store_url, job.store_url),
    ):
        if before != now:
            raise SessionStateError(
                f"the session in {state.session_dir} is of {name} {before}, not of {now}",
                hint="end it first: `propmaster session end` with the same --session-dir",
            )
    added = {}
    manifests = [*state.job.attachments.manifests]
    for index, (properties, place) in enumerate(
        zip(job.attachments.manifests, local_roots, strict=True)
    ):
        known = next(
            (at for at, manifest in enumerate(manifests) if _same_root(manifest, properties)), None
        )
        if known is not None:
            _refuse_change(state, manifests[known], properties, known, place)
            continue
        added[index] = _add(state, properties, len(manifests), place)
        manifests.append(properties)
    if len(manifests) > _MOST_MANIFESTS:
        raise JobInvalidError(f"{len(manifests)} roots; a job has at most {_MOST_MANIFESTS}")
    rules = dict.fromkeys((*state.job.path_mapping_rules, *job.path_mapping_rules))
    state.job = msgspec.structs.replace(
        state.job,
        attachments=msgspec.structs.replace(state.job.attachments, manifests=tuple(manifests)),
        path_mapping_rules=tuple(rules),
    )
    return added


def baseline_of(manifest: Manifest | None, root: RootState) -> dict[str, BaselineFile]:
    """Return what a manifest says of a root's output directories; only content tells of changes."""
    if manifest is None:
        return {}
    return {
        entry.path: BaselineFile(entry.hash, entry.size, entry.mtime, -1, -1, -1)
        for entry in manifest.entries
        if is_below(entry.path, root.output_directories)
    }


def _same_root(one: ManifestProperties, other: ManifestProperties) -> bool:
    return (one.file_system_location_name, one.root_path) == (
        other.file_system_location_name,
        other.root_path,
    )


def _refuse_change(
    state: SessionState,
    before: ManifestProperties,
    now: ManifestProperties,
    index: int,
    place: Path,
) -> None:
    root = next(root for root in state.roots if index in root.manifests)
    if before != now or root.local_root != os.fspath(place):
        raise SessionStateError(
            f"root {now.root_path!r} at {place} is not what it was when the session was told of it",
            hint="a job's roots stay as they are from the start of a session to its end",
        )


def _add(state: SessionState, properties: ManifestProperties, index: int, place: Path) -> RootState:
    directories = properties.output_directories
    for root in state.roots:
        if root.local_root == os.fspath(place):
            root.manifests.append(index)
            root.output_directories = list(dict.fromkeys((*root.output_directories, *directories)))
            return root
    root = RootState(
        local_root=os.fspath(place),
        root_path=properties.root_path,
        file_system=COPIED,
        manifests=[index],
        output_directories=list(directories),
        baseline={},
    )
    state.roots.append(root)
    return root
