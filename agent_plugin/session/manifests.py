"""Where a session's manifests come from: the job's inputs, and the outputs of other tasks.

How output manifests are found follows what the service's own readers do, since all of them must
find the same: of a task only its last run counts, by the name of its folder; runs of chunks all
count; what is left is merged by the store's time of each manifest, the later wins.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.digest import Digest, hash_name
from agent_plugin.content.errors import CacheUnsafeError, LocalError, ManifestInvalidError
from agent_plugin.content.manifest import MAX_MANIFEST_BYTES, Manifest, decode, merge
from agent_plugin.content.store import Document, DocumentInfo, Store
from agent_plugin.session.job import JobDocument, ManifestProperties
from agent_plugin.session.roots import location_from_metadata, root_from_metadata
from agent_plugin.transfer.asking import Asking
from agent_plugin.transfer.context import TransferContext

# What is not a manifest may have been damaged on the way: it is fetched again so many times.
DAMAGED_RETRIES: Final = 3

_OUTPUT_KEY: Final = re.compile(r"step-.*/.*/.*output.*")
# Of one run of a task, or of a chunk of tasks; below the queue.
_OUTPUT_OF_JOB: Final = re.compile(
    r"(?P<job>job-[0-9a-f]{32})/step-[0-9a-f]{32}/(?:task-[0-9a-f]{32}-[0-9]{1,10}/)?"
    r"[^/]*_sessionaction-[^/]+/[^/]*output[^/]*"
)

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class OutputManifest:
    """A manifest of what a task left behind.

    Attributes:
        key: Below `Manifests/`.
        root_path: The asset root as the job has it.
        location: The file system location's name, or None.
        last_modified: By the store's clock, seconds since the epoch.
    """

    key: str
    root_path: str
    location: str | None
    last_modified: float
    manifest: Manifest


def fetch_input_manifest(
    properties: ManifestProperties, context: TransferContext
) -> Manifest | None:
    """Return a root's input manifest, verified; None when the root has only outputs.

    A manifest whose hash the job names is kept in the blob cache like any other content, so that a
    further session of the job need not ask the store.

    Raises:
        ManifestInvalidError: It breaks a rule, or is not what the job's hash says.
        DocumentNotFoundError, StoreAccessError, StoreUnavailableError: It can not be had.
        CacheUnsafeError: Others can write to the cache.
    """
    key = properties.input_manifest_path
    if key is None:
        return None
    expected = properties.input_manifest_hash
    if expected and (cached := _cached(context, expected)) is not None:
        return decode(cached, source=key)
    data, manifest = _fetch_decoded(context, key, expected)
    if expected and context.cache is not None:
        # If that fails only a copy is lost; the transfer that follows tells what is wrong.
        with suppress(LocalError):
            context.cache.add(Digest.of(data), data)
    return manifest


def _cached(context: TransferContext, hash_: str) -> bytes | None:
    """Return a manifest that the cache has; a cache that can not be read is done without."""
    if context.cache is None:
        return None
    try:
        return context.cache.read_by_hash(hash_, max_bytes=MAX_MANIFEST_BYTES)
    except CacheUnsafeError:
        raise
    except LocalError as error:
        log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
        return None


def _fetch_decoded(
    context: TransferContext, key: str, expected: str | None
) -> tuple[bytes, Manifest]:
    for last in (*[False] * DAMAGED_RETRIES, True):
        document = context.ask(lambda store: store.get_document(key, max_bytes=MAX_MANIFEST_BYTES))
        try:
            return document.data, decode(document.data, source=key, expected_hash=expected)
        except ManifestInvalidError as error:
            if last or (expected and Digest.of(document.data).hex == expected):
                raise
            _log_damaged(key, error)
    raise AssertionError("unreachable: the last one returns or raises")


def _log_damaged(key: str, error: ManifestInvalidError) -> None:
    log.info(
        events.REQUEST_RETRIED,
        extra={"request": f"get manifest {key}", "error": error.code, "reason": error.message},
    )


def find_outputs(
    asking: Asking,
    job: JobDocument | tuple[str, str, str],
    *,
    step_id: str | None = None,
    task_id: str | None = None,
) -> list[OutputManifest]:
    """Return the output manifests that count, ascending by the store's time.

    Args:
        asking: Of the job's store.
        job: The job, or its (farm id, queue id, job id).
        step_id: Only of this step.
        task_id: Only of this task; needs the step.

    Raises:
        ManifestInvalidError: One breaks a rule, or does not tell its root.
        StoreAccessError, StoreUnavailableError: They can not be had.
    """
    ids = (job.farm_id, job.queue_id, job.job_id) if isinstance(job, JobDocument) else job
    prefix = "/".join([*ids, *([step_id] if step_id else []), *([task_id] if task_id else [])])
    infos = _that_count(asking.ask(lambda store: list(store.list_documents(f"{prefix}/"))))
    found = asking.ask_each(fetch_output, infos)
    # Stable: manifests of one second stay in the order of their keys, chunks before tasks.
    return sorted(found, key=lambda output: output.last_modified)


def merge_by_root(outputs: Iterable[OutputManifest]) -> dict[tuple[str | None, str], Manifest]:
    """Return one manifest for each (location, root path), later ones winning path by path."""
    groups: dict[tuple[str | None, str], list[Manifest]] = {}
    for output in outputs:
        groups.setdefault((output.location, output.root_path), []).append(output.manifest)
    merged = {}
    for root, manifests in groups.items():
        manifest = merge(manifests)
        if manifest is not None:
            merged[root] = manifest
    return merged


def _that_count(infos: Iterable[DocumentInfo]) -> list[DocumentInfo]:
    chunks: list[DocumentInfo] = []
    runs: dict[str, dict[str, list[DocumentInfo]]] = {}
    for info in infos:
        if not _OUTPUT_KEY.search(info.key):
            continue
        parts = info.key.split("/")
        at = next((i for i, part in enumerate(parts) if "task-" in part), None)
        if at is None or at + 1 >= len(parts) - 1:
            chunks.append(info)
            continue
        task = "/".join(parts[: at + 1])
        runs.setdefault(task, {}).setdefault(parts[at + 1], []).append(info)
    last_runs = [folders[max(folders)] for _, folders in sorted(runs.items())]
    return [*chunks, *(info for run in last_runs for info in run)]


def list_output_manifests(
    asking: Asking, farm_id: str, queue_id: str, job_ids: Iterable[str] = ()
) -> dict[str, list[DocumentInfo]]:
    """Return what a queue's tasks have left, every run of them, by job; ascending by key.

    Args:
        asking: Of the queue's store.
        farm_id: The farm.
        queue_id: The queue.
        job_ids: Only of these jobs; of all jobs when there are none.

    Raises:
        StoreAccessError, StoreUnavailableError: They can not be had.
    """
    queue = f"{farm_id}/{queue_id}/"
    prefixes = [f"{queue}{job_id}/" for job_id in dict.fromkeys(job_ids)] or [f"{queue}job-"]
    found: dict[str, list[DocumentInfo]] = {}
    for listed in asking.ask_each(lambda store, at: list(store.list_documents(at)), prefixes):
        for info in listed:
            if match := _OUTPUT_OF_JOB.fullmatch(info.key, len(queue)):
                found.setdefault(match["job"], []).append(info)
    return found


def fetch_output(store: Store, info: DocumentInfo) -> OutputManifest:
    """Return an output manifest that a listing has named.

    Raises:
        ManifestInvalidError: It breaks a rule, or does not tell its root.
        DocumentNotFoundError, StoreAccessError, StoreUnavailableError: It can not be had.
    """
    for _ in range(DAMAGED_RETRIES):
        try:
            return _read(store.get_document(info.key, max_bytes=MAX_MANIFEST_BYTES))
        except ManifestInvalidError as error:
            # Nobody knows its hash, so it is asked for again whatever is wrong with it.
            _log_damaged(info.key, error)
    return _read(store.get_document(info.key, max_bytes=MAX_MANIFEST_BYTES))


def _read(document: Document) -> OutputManifest:
    key = document.info.key
    try:
        root = root_from_metadata(document.metadata)
        location = location_from_metadata(document.metadata)
    except ManifestInvalidError as error:
        raise ManifestInvalidError(f"{key}: {error.message}", hint=error.hint) from error
    if not key.rpartition("/")[2].startswith(hash_name(f"{location or ''}{root}")):
        raise ManifestInvalidError(
            f"{key}: its name is not that of the root {root!r} which its metadata name",
            hint="the object was copied or its metadata changed; run the task again",
        )
    return OutputManifest(
        key=key,
        root_path=root,
        location=location,
        last_modified=document.info.last_modified,
        manifest=decode(document.data, source=key),
    )
