"""`get`: a job's results as files on this host.

Results of several executions go to a directory each, or together into one. What stands in the way
is found before anything is moved (clashes.py), and nothing is seen before all of it has come
(arrival.py).
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from agent_plugin.content.errors import InputError, LocalError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.publish.arrival import Arrival, arriving
from agent_plugin.publish.clashes import find_clashes, refuse
from agent_plugin.publish.published import Replaced
from agent_plugin.publish.results import JobExecution, files_of
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import download
from agent_plugin.transfer.ledger import TransferSpec
from agent_plugin.transfer.plan import plan_download, survey


class GotExecution(msgspec.Struct):
    """What came of one execution; `bytes` are those of all its files."""

    execution: str
    directory: str
    files: int
    bytes: int


class GetResult(msgspec.Struct, rename="camel"):
    """What `get` prints; sizes in bytes.

    Attributes:
        job: The job's id.
        to: The directory that everything is in.
        merged: Whether several executions share it.
        executions: Those that had what was asked for.
        files, bytes: In place at the end.
        bytes_fetched: Of the distinct bytes, those that came from the store.
        replaced: Of published results, what later executions have replaced; it did not come.
        excluded: What people have taken out of the transfer: paths below `to`, or of published
            results the URLs of their objects.
    """

    job: str
    to: str
    merged: bool
    executions: list[GotExecution]
    files: int
    bytes: int
    bytes_fetched: int
    seconds: float
    replaced: list[Replaced] = []
    excluded: list[str] = []


def get(
    executions: Sequence[JobExecution],
    context: TransferContext,
    job_id: str,
    to: Path,
    *,
    path: str = "",
    merge: bool = False,
    by_root: bool = False,
    overwrite: bool = False,
) -> GetResult:
    """Bring the files of executions, verified; what is in place already stays.

    Args:
        executions: Of one job.
        context: The services.
        job_id: The job.
        to: Where they go; absolute. Made when missing, and then not before all has come.
        path: Only this file, or those in this directory.
        merge: Have the files of all executions in one directory.
        by_root: Each root's files in a directory of its own.
        overwrite: Whether other files that stand there give way.

    Raises:
        ResultClashError: Files that are to be in one place differ, or something else is there; all
            such places are found before anything is written.
        UnsafePathError: `path` leaves the results.
        PropmasterError: Any other of the tree.
    """
    begun = time.monotonic()
    files = {execution.id: files_of(execution, path, by_root=by_root) for execution in executions}
    files = {execution: found for execution, found in files.items() if found}
    apart = len(files) > 1 and not merge
    if not apart:
        refuse(
            find_clashes(
                {e: {p: f.digest for p, f in found.items()} for e, found in files.items()}
            ),
            "executions have different files of one path",
            "leave --merge out, or take one execution with --execution",
        )
    placed = _placed(files, apart=apart)
    fetched, excluded = 0, frozenset[str]()
    if placed:
        fetched, excluded = _bring(placed, context, job_id, to, overwrite=overwrite)
    for at in excluded:
        del placed[at]
    for execution, found in files.items():
        for name in [*found]:
            if (f"{execution}/{name}" if apart else name) in excluded:
                del found[name]
    return GetResult(
        job=job_id,
        to=os.fspath(to),
        merged=merge and len(files) > 1,
        executions=[
            GotExecution(
                execution,
                os.fspath(to / execution if apart else to),
                len(found),
                sum(entry.size for entry in found.values()),
            )
            for execution, found in files.items()
        ],
        files=len(placed),
        bytes=sum(entry.size for entry in placed.values()),
        bytes_fetched=fetched,
        seconds=round(time.monotonic() - begun, 3),
        excluded=sorted(excluded),
    )


def _placed(files: Mapping[str, Mapping[str, FileEntry]], *, apart: bool) -> dict[str, FileEntry]:
    """Return every file by its path below the target; of equal ones the last execution's."""
    placed = {}
    for execution, found in files.items():
        for path, entry in found.items():
            at = f"{execution}/{path}" if apart else path
            placed[at] = msgspec.structs.replace(entry, path=at)
    return placed


def _bring(
    placed: Mapping[str, FileEntry],
    context: TransferContext,
    job_id: str,
    to: Path,
    *,
    overwrite: bool,
) -> tuple[int, frozenset[str]]:
    """Have the files in place; return how many bytes came, and the paths that were excluded."""
    with arriving(to) as arrival:
        try:
            lacking = _lacking(placed, context, arrival, overwrite=overwrite)
            fetched, excluded = _fetch(lacking, context, job_id, arrival)
        except (InputError, LocalError):
            # Trying again changes nothing before somebody has done something.
            arrival.remove()
            raise
        except BaseException:
            # What has come is kept: the next run goes on with it.
            arrival.remove_empty()
            raise
        moves = {path: path for path in lacking if path not in excluded}
        if arrival.fresh and moves:
            arrival.reveal()
        else:
            if not arrival.fresh:
                arrival.move_in(moves, overwrite=overwrite)
            arrival.remove()
        return fetched, excluded


def _lacking(
    placed: Mapping[str, FileEntry],
    context: TransferContext,
    arrival: Arrival,
    *,
    overwrite: bool,
) -> dict[str, FileEntry]:
    """Return the files that the target lacks.

    Raises:
        ResultClashError: Something else stands where one has to go, and may not be replaced.
    """
    if arrival.fresh:
        return dict(placed)
    plan = plan_download(
        Manifest.of(placed.values()),
        arrival.target,
        context.index,
        cancellation=context.cancellation,
    )
    kept = {entry.path for entry in plan.kept}
    lacking = {path: entry for path, entry in placed.items() if path not in kept}
    arrival.refuse_standing(lacking, overwrite=overwrite)
    return lacking


def _fetch(
    lacking: Mapping[str, FileEntry], context: TransferContext, job_id: str, arrival: Arrival
) -> tuple[int, frozenset[str]]:
    arrival.keep_only(list(lacking))
    if not lacking:
        return 0, frozenset()
    plan = plan_download(
        Manifest.of(lacking.values()),
        arrival.hidden,
        context.index,
        hidden=True,
        exclusive=True,
        follow_root=False,
        cancellation=context.cancellation,
    )
    survey([plan], context.cache, context.cancellation)
    spec = TransferSpec(
        kind="get",
        source=context.store_url,
        destination=os.fspath(arrival.target),
        job=job_id,
    )
    with context.leased(job_id, set(plan.wanted)):
        done = download(plan, context, spec)
    return done.bytes_fetched, frozenset(entry.path for entry in done.excluded)
