"""Before a task: of each source that is parted by a task parameter, this task's part.

Which objects a source has was settled when the session started; which of them a task takes follows
from their keys and the parameter, so that no bucket is listed here. What the task before had is
taken away first, and the state says so before that: a task never finds another one's part, whoever
is killed when. The part that is in place already stays as it is.

Why it is so: docs/decisions/0020-parts-of-a-source-by-task.md.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import PropmasterError, SourceInvalidError
from agent_plugin.session.bring import bring
from agent_plugin.session.input_sources import (
    FoundSources,
    SourceResult,
    is_required,
    open_servers,
    open_source,
    refuse_link_above,
    source_result,
    with_part,
)
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.source_place import remove_hidden, set_aside
from agent_plugin.session.start_result import NOTHING_MOVED
from agent_plugin.session.state import VIRTUAL, RootState, SessionState, StateFile
from agent_plugin.sources.parts import index_of
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import TransferResult

if TYPE_CHECKING:
    from agent_plugin.sources.access import SourceServers

log = events.get_logger()


class BeginResult(msgspec.Struct, rename="camel"):
    """What begin-task did; printed by `session begin-task --json`."""

    sources: list[SourceResult]
    seconds: float


def begin_task(
    parameters: Mapping[str, str],
    context: TransferContext,
    state_file: StateFile,
    *,
    mounts: Mounts,
    environment: Mapping[str, str] = os.environ,
) -> BeginResult:
    """Bring the parts of sources that a task takes, in place of those of the task before.

    Args:
        parameters: Of the task, by their names, as the runtime writes them; those that no source
            asks for do not matter.
        context: The services.
        state_file: Of a started session.
        mounts: The host's.
        environment: Of the mounts' processes, and how sources are reached.

    Raises:
        SessionStateError: The session has not started.
        SourceInvalidError: A parameter was not told, is no whole number, or says no part.
        SourceEmptyError: A part has no objects, and the source does not allow that.
        PropmasterError: Any other of the tree. After each of these the task must not run, and what
            another task had is not in place.
    """
    begun = time.monotonic()
    state = state_file.read_ready()
    parted = [root for root in state.roots if root.is_parted]
    try:
        wanted = {root.local_root: _wanted(root, parameters) for root in parted}
    except SourceInvalidError:
        put_aside(parted, state, state_file, mounts)
        raise
    stale = [root for root in parted if not _is_in_place(root, wanted[root.local_root], mounts)]
    put_aside(stale, state, state_file, mounts)
    found = _opened(parted, wanted, open_servers(environment, mounts))
    coming = [root for root in stale if root.local_root in found.opened]
    for root in coming:
        assert root.source is not None  # noqa: S101 - they have parts
        refuse_link_above(root.source, Path(root.local_root), Path(state.session_dir))
        found.new.add(root.local_root)
    manifests = {root.local_root: found.opened[root.local_root].manifest for root in coming}
    moved, reasons = bring(manifests, found, state.wished, state, context, mounts, environment)
    for root in coming:
        if root.local_root not in found.skipped:
            root.part = wanted[root.local_root]
        if root.file_system == VIRTUAL:
            remove_hidden(root, state)
    state_file.write(state)
    sources = [
        source_result(
            root,
            found,
            moved.get(root.local_root) or _kept(root, found),
            reasons.get(root.local_root, ""),
        )
        for root in parted
    ]
    return _told(BeginResult(sources, round(time.monotonic() - begun, 3)), state)


def put_aside(
    roots: Sequence[RootState], state: SessionState, state_file: StateFile, mounts: Mounts
) -> None:
    """Take away the parts that are in place, so that no task finds one that is not its own.

    Raises:
        PropmasterError: One can not be taken away, or the state not be written.
    """
    before = [(root, root.part) for root in roots]
    for root in roots:
        root.part = None
    state_file.write(state)
    for root, part in before:
        root.part = part
        set_aside(root, state, mounts)
    state_file.write(state)


def awaited_parameters(state: SessionState) -> dict[str, list[str]]:
    """Return the task parameters that say parts, each with the names of the sources."""
    awaited: dict[str, list[str]] = {}
    for root in state.roots:
        if root.is_parted and root.source is not None and root.snapshot:
            awaited.setdefault(root.source.index_parameter, []).append(root.source.name)
    return awaited


def _wanted(root: RootState, parameters: Mapping[str, str]) -> int:
    """Return which part of a source is wanted."""
    assert root.source is not None  # noqa: S101 - only sources have parts
    name = root.source.index_parameter
    if name not in parameters:
        told = f"told: {', '.join(sorted(parameters))}" if parameters else "none was told"
        raise SourceInvalidError(
            f"task parameter {name}, which says the part of {root.source.name}, was not told"
            f" ({told})",
            hint=f"give it before the task runs: --parameter {name}=NUMBER; an OpenJD template has"
            f" it as {{{{Task.Param.{name}}}}}",
        )
    return index_of(root.source, parameters[name])


def _is_in_place(root: RootState, index: int, mounts: Mounts) -> bool:
    """Whether a part is where a task finds it, as far as nobody has to look at its files."""
    if root.part != index:
        return False
    place = Path(root.local_root)
    if root.file_system == VIRTUAL:
        return mounts.is_served(place)
    return place.is_dir() and not place.is_symlink()


def _opened(
    roots: Sequence[RootState], wanted: Mapping[str, int], servers: "SourceServers"
) -> FoundSources:
    """Return the wanted parts; what can be done without, and is not had, is skipped."""
    found = FoundSources()
    for root in roots:
        try:
            whole = open_source(root, None, servers)
            if whole is None:
                found.skipped[root.local_root] = "it could not be had when the session started"
            else:
                found.opened[root.local_root] = with_part(whole, root, wanted[root.local_root])
        except PropmasterError as error:
            if is_required(root):
                raise
            found.skip(root, error)
    return found


def _kept(root: RootState, found: FoundSources) -> TransferResult:
    """Return what it came to that a part was in place already."""
    opened = found.opened.get(root.local_root)
    if root.file_system == VIRTUAL or opened is None or opened.manifest is None:
        return NOTHING_MOVED
    return replace(NOTHING_MOVED, bytes_reused=opened.manifest.total_bytes)


def _told(result: BeginResult, state: SessionState) -> BeginResult:
    log.info(
        events.TASK_BEGUN,
        extra={
            "session": state.session_id,
            "sources": len(result.sources),
            "files": sum(source.files for source in result.sources),
            "bytes_fetched": sum(source.bytes_fetched for source in result.sources),
            "seconds": result.seconds,
        },
    )
    return result
