"""Input sources of a session: objects of any bucket that come to directories of their own.

Each is a local root like those of manifests, but for where its content comes from. It is resolved
once, when the session starts for the first time; which objects it is, and in which state, is kept
with the session's state, and nothing lists the bucket again. What is written below a source is
nobody's output.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import (
    CancelledError,
    LocalReadError,
    PathClashError,
    PropmasterError,
    SessionStateError,
    UnsafePathError,
)
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.manifest import Manifest
from agent_plugin.content.object_snapshot import ObjectSnapshot
from agent_plugin.content.snapshot_store import SnapshotStore, manifest_of
from agent_plugin.session.job import JobDocument
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.roots import SESSION_DIRECTORY_PREFIX
from agent_plugin.session.state import COPIED, RootState, SessionState, StateFile
from agent_plugin.sources.parts import part_of
from agent_plugin.sources.spec import InputSource, is_below
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import TransferResult
from agent_plugin.transfer.plan import Origin

if TYPE_CHECKING:
    from agent_plugin.sources.access import SourceServers

_END_FIRST: Final = "end the session (`propmaster session end`) and start it again"

log = events.get_logger()


class SourceResult(msgspec.Struct, rename="camel"):
    """What start did for one input source; sizes in bytes.

    Attributes:
        file_system: `COPIED` or `VIRTUAL`; empty for one that could be done without, and was.
        reason: Why it could not be had, or why the file system is not the one that was wished.
        index_parameter: The task parameter that says which part a task has; empty if none does.
        part: Which part is in place; None for what has no parts, and where none is.
    """

    source: str
    alias: str
    local_root: str
    file_system: str
    files: int
    bytes: int
    bytes_fetched: int
    bytes_reused: int
    reason: str = ""
    index_parameter: str = ""
    part: int | None = None


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source whose objects are known.

    Attributes:
        snapshot: Which objects, in which state.
        manifest: Their tree, with names in the place of hashes; None if there are none.
        store: Where the content comes from.
    """

    snapshot: ObjectSnapshot
    manifest: Manifest | None
    store: SnapshotStore

    def origin(self) -> Origin:
        """Return where a download takes the content from."""
        names = {entry.path: self.snapshot.info(entry).url for entry in self.snapshot.entries}
        return Origin(lambda: self.store, names)


def with_part(source: OpenSource, root: RootState, index: int) -> OpenSource:
    """Return of a source what one task takes.

    Raises:
        SourceEmptyError: The part has no objects, and the source does not allow that.
        SourceInvalidError: There is no such part, or the partition's pattern takes too long.
    """
    assert root.source is not None  # noqa: S101 - only sources are opened
    part = part_of(root.source, source.snapshot, index)
    return OpenSource(part, manifest_of(part), source.store)


@dataclass(frozen=True, slots=True)
class FoundSources:
    """What is known of the sources of a session, by local root.

    Attributes:
        opened: Those that are had.
        new: Those that were not resolved when the session was started before.
        skipped: Why the others could not be had, which can be done without.
    """

    opened: dict[str, OpenSource] = field(default_factory=dict)
    new: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, root: RootState, error: PropmasterError) -> None:
        """Do without a source."""
        extra = {"source": root.root_path, "code": error.code, "reason": error.message}
        log.warning(events.SOURCE_SKIPPED, extra=extra)
        self.skipped[root.local_root] = error.message


def source_roots(
    job: JobDocument, session_dir: Path, roots: Sequence[RootState], before: SessionState | None
) -> list[RootState]:
    """Return where the job's input sources go, before anything of it is made.

    Args:
        job: The job; its sources have targets that are not nested.
        session_dir: The session's directory.
        roots: The local roots of the job's manifests.
        before: What is known of the session, if it was started before.

    Raises:
        PathClashError: A target is where a root of the job is or may come to be, or holds
            something already.
        UnsafePathError: A target is behind a link that stands in the session directory.
        SessionStateError: The session was started with another source of that target.
    """
    made = []
    known = {root.local_root: root for root in before.roots} if before is not None else {}
    # What these put where a source was done without is kept, and the source comes in beside it.
    had_tasks = before is not None and (before.ready or before.was_ready)
    for source in job.input_sources:
        local = session_dir / source.target_path
        _refuse_clash(source, local, session_dir, roots)
        root = RootState(
            local_root=os.fspath(local),
            root_path=source.url,
            file_system=COPIED,
            manifests=[],
            output_directories=[],
            source=source,
        )
        same = known.get(root.local_root)
        if same is None or not (same.snapshot or had_tasks):
            _refuse_what_is_there(source, local, session_dir)
        elif same.snapshot and same.source != source:
            raise SessionStateError(
                f"{local}: the session was started with another source at this place",
                hint=_END_FIRST,
            )
        else:
            root.snapshot = same.snapshot
        made.append(root)
    return made


def _refuse_clash(
    source: InputSource, local: Path, session_dir: Path, roots: Sequence[RootState]
) -> None:
    shown = f"the Target {source.target} of {source.name}"
    first = PurePosixPath(source.target_path).parts[0]
    if first.startswith(SESSION_DIRECTORY_PREFIX) or any(map(is_partial, local.parts)):
        raise PathClashError(
            f"{shown} has a name that is kept for roots of jobs and temporary files",
            hint="give the source another Target",
        )
    for root in roots:
        if is_below(os.path.realpath(root.local_root), os.path.realpath(local)):
            raise PathClashError(
                f"{shown} is in or above {root.local_root}, where {root.root_path} goes",
                hint="give the source another Target",
            )
    refuse_link_above(source, local, session_dir)


def refuse_link_above(source: InputSource, local: Path, session_dir: Path) -> None:
    """See that a source's place is reached without a link below the session directory.

    Raises:
        UnsafePathError: A link is on the way: a job's, or whoever's who planted it there.
    """
    above, inside = os.path.realpath(local.parent), os.path.realpath(session_dir)
    if above != os.path.normpath(os.path.join(inside, os.path.dirname(source.target_path))):  # noqa: PTH118, PTH120 - normalised as text
        raise UnsafePathError(
            f"the Target {source.target} of {source.name} is behind a symbolic link, at {above}",
            hint="remove the link; see what the job did to its session directory",
        )


def _refuse_what_is_there(source: InputSource, local: Path, session_dir: Path) -> None:
    """See that nothing of anybody's is where a source is to be, since all goes with the session."""
    try:
        there = os.path.lexists(local) and (not local.is_dir() or any(local.iterdir()))
    except OSError as error:
        raise LocalReadError(f"{local}: {error.strerror}") from error
    if there or local == session_dir:
        raise PathClashError(
            f"the Target {source.target} of {source.name}: {local} is there already, and not empty",
            hint="give the source another Target",
        )


def open_sources(
    state: SessionState,
    state_file: StateFile,
    roots: Sequence[RootState],
    context: TransferContext,
    servers: "Callable[[], SourceServers]",
) -> FoundSources:
    """Return the sources; what is not known yet is resolved, and kept for good.

    Args:
        state: The session; its roots are given their snapshots.
        state_file: Of the session; written when any was resolved.
        roots: Those of sources.
        context: The services.
        servers: Makes what sources are asked by.

    Raises:
        SourceEmptyError, SourceInvalidError, ObjectNotFoundError, StoreAccessError: Of a source
            that is required; nothing was kept of any.
        CancelledError: Cancellation was wished.
    """
    found = FoundSources()
    if not roots:
        return found
    asking = servers()
    snapshots = _resolve([root for root in roots if not root.snapshot], context, asking, found)
    for root in roots:
        snapshot = snapshots.get(root.local_root)
        if snapshot is not None:
            root.snapshot = state_file.keep_snapshot(snapshot.encode())
            found.new.add(root.local_root)
        try:
            opened = open_source(root, snapshot, asking)
        except PropmasterError as error:
            if is_required(root):
                raise
            found.skip(root, error)
            continue
        if opened is not None:
            found.opened[root.local_root] = opened
    if snapshots:
        state_file.write(state)
    return found


def open_source(
    root: RootState, snapshot: ObjectSnapshot | None, servers: "SourceServers"
) -> OpenSource | None:
    """Return a source by its snapshot, or by the one that is kept; None if it has neither.

    Raises:
        SessionStateError, SourceInvalidError: What is kept is gone or damaged.
        StoreAccessError, SettingsInvalidError: There are no credentials, or they make no sense.
    """
    if snapshot is None:
        if not root.snapshot:
            return None
        snapshot = _read(root.snapshot)
    store = SnapshotStore(snapshot, servers.objects(snapshot.access))
    return OpenSource(snapshot, manifest_of(snapshot), store)


def _resolve(
    roots: Sequence[RootState],
    context: TransferContext,
    servers: "SourceServers",
    found: FoundSources,
) -> dict[str, ObjectSnapshot]:
    """Return the snapshots by local root; what can be done without, and is not had, is skipped."""
    # Here, because it loads libraries for S3 that sessions without sources do without.
    from agent_plugin.sources.resolve import resolve  # noqa: PLC0415 - see above

    asked = [
        (
            root,
            context.lanes.submit(
                partial(resolve, root.source, servers, cancellation=context.cancellation)
            ),
        )
        for root in roots
        if root.source is not None
    ]
    snapshots = {}
    for root, answer in asked:
        try:
            snapshots[root.local_root] = context.lanes.result(answer, context.cancellation)
        except CancelledError:
            raise
        except PropmasterError as error:
            if is_required(root):
                raise
            found.skip(root, error)
    return snapshots


def _read(path: str) -> ObjectSnapshot:
    try:
        return ObjectSnapshot.decode(Path(path).read_bytes(), source=path)
    except OSError as error:
        raise SessionStateError(f"{path}: {error.strerror}", hint=_END_FIRST) from error


def wish_for(root: RootState, wish: str) -> str:
    """Return how a root is to be brought in: a source may say so itself."""
    mode = root.source.mode if root.source is not None else None
    return wish if mode is None else mode.upper()


def is_required(root: RootState) -> bool:
    """Whether a session can not start without a root; only a source may say so."""
    return root.source is None or root.source.required


def source_result(
    root: RootState, found: FoundSources, done: TransferResult, reason: str
) -> SourceResult:
    """Return what became of a source.

    Args:
        root: The source's root.
        found: What is known of sources.
        done: What was copied.
        reason: Why the file system is not the one that was wished, or why AUTO chose it.
    """
    skipped = found.skipped.get(root.local_root)
    opened = found.opened.get(root.local_root) if skipped is None else None
    manifest = opened.manifest if opened is not None else None
    source = root.source
    waits = root.is_parted and root.part is None and skipped is None
    if waits and source is not None:
        reason = f"each task has the part that its parameter {source.index_parameter} says"
    return SourceResult(
        source=root.root_path,
        alias=source.alias if source is not None else "",
        local_root=root.local_root,
        file_system=root.file_system if skipped is None and not waits else "",
        files=len(manifest) - len(done.excluded) if manifest is not None else 0,
        bytes=(
            manifest.total_bytes - sum(entry.size for entry in done.excluded)
            if manifest is not None
            else 0
        ),
        bytes_fetched=done.bytes_fetched,
        bytes_reused=done.bytes_reused,
        reason=reason if skipped is None else skipped,
        index_parameter=source.index_parameter if source is not None else "",
        part=root.part if skipped is None else None,
    )


def open_servers(environment: Mapping[str, str], mounts: Mounts) -> "SourceServers":
    """Return how sources are reached, with the host's limits.

    Args:
        environment: The AWS variables.
        mounts: The host's, which have the limits as well.
    """
    # Here, because it loads libraries for S3 that sessions without sources do without.
    from agent_plugin.sources.access import SourceServers  # noqa: PLC0415 - see above

    limits = mounts.store_limits
    if limits is None:
        return SourceServers(environment)
    return SourceServers(environment, policy=limits.retry_policy(), bandwidth=limits.bandwidth())
