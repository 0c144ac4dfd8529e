"""A job's outputs, for whoever wants them back: what there is, and where it goes."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from agent_plugin.content.errors import JobInvalidError, PathClashError
from agent_plugin.content.manifest import FileEntry, Manifest, merge
from agent_plugin.session.manifests import find_outputs, merge_by_root
from agent_plugin.session.roots import session_directory_name
from agent_plugin.transfer.asking import Asking
from agent_plugin.transfer.conflicts import Conflict, settle
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import download
from agent_plugin.transfer.ledger import TransferSpec
from agent_plugin.transfer.plan import plan_download, survey


class OutputRoot(msgspec.Struct, rename="camel", omit_defaults=True):
    """The outputs below one of the job's roots.

    Attributes:
        root_path: As the job has it.
        location: The file system location's name, if it has one.
        files: Their paths below the root, sizes in bytes, times in microseconds, hashes.
        local_root: Where they were downloaded to, if they were.
    """

    root_path: str
    location: str | None
    files: list[FileEntry]
    local_root: str | None = None


class OutputsResult(msgspec.Struct, rename="camel"):
    """What `outputs list` and `outputs get` print; sizes in bytes.

    Attributes:
        left: Files that were not placed because something stands at their path.
        copies: Whole paths of files that were placed under another name.
    """

    roots: list[OutputRoot]
    files: int
    bytes: int
    bytes_fetched: int
    seconds: float
    left: int = 0
    copies: list[str] = []


def list_outputs(
    asking: Asking,
    job: tuple[str, str, str],
    *,
    step_id: str | None = None,
    task_id: str | None = None,
) -> OutputsResult:
    """Return what a job's tasks left behind: of each task its last run, later manifests winning.

    Args:
        asking: Of the job's store.
        job: Its farm id, queue id and job id.
        step_id: Only of this step.
        task_id: Only of this task; needs the step.

    Raises:
        PropmasterError: Any of the tree; no outputs is no error.
    """
    begun = time.monotonic()
    merged = _merged(asking, job, step_id, task_id)
    return _result(
        [OutputRoot(root, location, list(m.entries)) for (location, root), m in merged.items()],
        fetched=0,
        begun=begun,
    )


def get_outputs(
    context: TransferContext,
    job: tuple[str, str, str],
    to: Path | None,
    *,
    by_root: bool = False,
    conflict: Conflict = Conflict.OVERWRITE,
    step_id: str | None = None,
    task_id: str | None = None,
) -> OutputsResult:
    """Download what a job's tasks left behind, verified; files that are in place stay.

    Where a file goes follows from the arguments alone, and not from what else has arrived: a second
    root's outputs must not move those of the first.

    Args:
        context: The services.
        job: Its farm id, queue id and job id.
        to: A directory for the files of all roots. None: the roots' own paths, which must be
            absolute paths of this host.
        by_root: Each root gets a directory of its own in `to`, however many there are.
        conflict: The rule for files of other content that stand in the way.
        step_id: Only of this step.
        task_id: Only of this task; needs the step.

    Raises:
        JobInvalidError: `to` is None and a root is no absolute path of this host.
        PathClashError: Two roots that go to one directory have a file of one path.
        PropmasterError: Any other of the tree.
    """
    begun = time.monotonic()
    roots = []
    places: dict[Path, dict[str, Manifest]] = {}
    for (location, root_path), manifest in _merged(context, job, step_id, task_id).items():
        shown = f"{location or ''}{root_path}"
        place = to / session_directory_name(shown) if to and by_root else to or _own(root_path)
        roots.append(OutputRoot(root_path, location, list(manifest.entries), os.fspath(place)))
        places.setdefault(place, {})[shown] = manifest
    plans = [
        plan_download(
            _together(place, manifests), place, context.index, cancellation=context.cancellation
        )
        for place, manifests in places.items()
    ]
    settled = [settle(plan, conflict, context.index, context.cancellation) for plan in plans]
    survey(plans, context.cache, context.cancellation)
    fetched = 0
    with context.leased(job[2], {digest for plan in plans for digest in plan.wanted}):
        for plan in plans:
            spec = TransferSpec(
                kind="outputs",
                source=context.store_url,
                destination=os.fspath(plan.root),
                job=job[2],
                step=step_id or "",
                task=task_id or "",
            )
            fetched += download(plan, context, spec).bytes_fetched
    result = _result(roots, fetched=fetched, begun=begun)
    result.left = sum(len(each.left) for each in settled)
    result.copies = [
        f"{plan.root}/{path}"
        for plan, each in zip(plans, settled, strict=True)
        for path in each.copies
    ]
    return result


def _merged(
    asking: Asking,
    job: tuple[str, str, str],
    step_id: str | None,
    task_id: str | None,
) -> dict[tuple[str | None, str], Manifest]:
    outputs = find_outputs(asking, job, step_id=step_id, task_id=task_id)
    return merge_by_root(outputs)


def _together(place: Path, manifests: Mapping[str, Manifest]) -> Manifest:
    """Return the files of the roots that go to one place; no two may have a path.

    Raises:
        PathClashError: Two have, or one has a file where another needs a directory.
    """
    roots: dict[str, str] = {}
    for root, manifest in manifests.items() if len(manifests) > 1 else ():
        for entry in manifest.entries:
            if entry.path in roots:
                raise PathClashError(
                    f"{entry.path} is an output of {roots[entry.path]} and of {root}, which both"
                    f" go to {place}",
                    hint="give each root a directory of its own: --to DIRECTORY --by-root",
                )
            roots[entry.path] = root
    together = merge(manifests.values())
    assert together is not None  # noqa: S101 - each place has a root
    return together


def _own(root_path: str) -> Path:
    if not root_path.startswith("/") or ".." in Path(root_path).parts:
        raise JobInvalidError(
            f"the root {root_path!r} is not an absolute path of this host",
            hint="say where the files are to go with --to",
        )
    return Path(root_path)


def _result(roots: list[OutputRoot], *, fetched: int, begun: float) -> OutputsResult:
    return OutputsResult(
        roots=roots,
        files=sum(len(root.files) for root in roots),
        bytes=sum(entry.size for root in roots for entry in root.files),
        bytes_fetched=fetched,
        seconds=round(time.monotonic() - begun, 3),
    )
