"""`outputs sync`: what the tasks of a queue have left since the last time, each thing once.

Found from the store alone: a manifest of outputs is there if and only if a task has succeeded and
all it left is stored (docs/decisions/0019-sync-from-the-store.md). Every run of a task counts. What
several manifests have at one place of this host is the newest's, by the store's time, also across
the jobs that are asked for, and whether that one comes now or has come before.

Job after job is brought and then noted in the checkpoint. A failure that is one job's own (content
that is missing or damaged, a path that can not be written) leaves the others alone, and keeps back
the files of the manifests at fault; it is tried again by the next syncs, MAX_TRIES times in all.
What the store refuses, or can not deliver, while it answers otherwise is one job's own, too, and
tried by every sync: whoever mends it does so in the store. Any other failure ends the sync.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec

from agent_plugin.content import events
from agent_plugin.content.disk_sync import sync_file_systems
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    CacheUnsafeError,
    DocumentNotFoundError,
    InputError,
    ManifestInvalidError,
    NoSpaceError,
    PropmasterError,
    StateError,
    StoreAccessError,
    StoreProtocolError,
    StoreUnavailableError,
    UnsafePathError,
    local_write_error,
)
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.store import DocumentInfo, Store
from agent_plugin.session.manifests import OutputManifest, fetch_output, list_output_manifests
from agent_plugin.session.path_rules import JobRules, PathRules
from agent_plugin.session.sync_checkpoint import Advance, Checkpoint, mark_of
from agent_plugin.transfer.conflicts import Conflict, settle
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.download import download
from agent_plugin.transfer.ledger import TransferSpec
from agent_plugin.transfer.plan import DownloadPlan, plan_download, survey

# Of one manifest, however the store answers for others.
_OF_A_MANIFEST: Final = (
    ManifestInvalidError,
    DocumentNotFoundError,
    StoreAccessError,
    StoreProtocolError,
    BlobCorruptError,
    UnsafePathError,
)
# As often as the Deadline client tries.
MAX_TRIES: Final = 5
# Of the paths of a job that no rule maps, so many are named.
SHOWN_PATHS: Final = 20

_END_THE_SYNC: Final = (NoSpaceError, CacheUnsafeError, StateError)
_OF_THE_STORE: Final = (StoreUnavailableError, StoreAccessError)
_LOST: Final = (BlobNotFoundError, BlobCorruptError)
_RUN_AGAIN: Final = (
    f"the task that made it has to run again; otherwise it is given up after {MAX_TRIES} syncs"
)

log = events.get_logger()


class SyncedJob(msgspec.Struct, rename="camel"):
    """What a sync did for one job; sizes in bytes.

    Attributes:
        state: `synced`; `failed`: not all could be brought, and the next sync tries again;
            `given-up`: there is nothing but what was given up; `skipped`: nobody can say where its
            files belong, until there are rules.
        manifests: How many were new.
        given_up: How many were not brought in MAX_TRIES syncs; no sync tries again unless the job
            is named.
        files, bytes: Of the files that are in place now, or would be.
        bytes_fetched: Of these, what came from the store.
        left: Files that were not placed because something stands at their path.
        copies: Whole paths of files that were placed under another name.
        unmapped_files: Files that no rule maps. They come when other rules do.
        unmapped: Some of their paths, as the job has them.
        roots: The directories of this host that its files are below.
        reason: Why it is not synced.
    """

    job_id: str
    state: Literal["synced", "failed", "given-up", "skipped"]
    manifests: int = 0
    given_up: int = 0
    files: int = 0
    bytes: int = 0
    bytes_fetched: int = 0
    left: int = 0
    copies: list[str] = []
    unmapped_files: int = 0
    unmapped: list[str] = []
    roots: list[str] = []
    reason: str = ""


class SyncResult(msgspec.Struct, rename="camel"):
    """What `outputs sync` prints; sizes in bytes.

    Attributes:
        first: There was no checkpoint.
        since: Older outputs were not wanted, seconds since the epoch.
        dry_run: Nothing was done.
        failed: Jobs that failed in this sync.
    """

    checkpoint: str
    first: bool
    since: float
    dry_run: bool
    jobs: list[SyncedJob]
    files: int
    bytes: int
    bytes_fetched: int
    failed: int
    seconds: float


# Returns the rules for a job's outputs; told the profile of its submitter, if that is known.
RulesFor = Callable[[str, str | None], JobRules]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRequest:
    """What is to be synced.

    Attributes:
        farm_id, queue_id: Of the queue.
        job_ids: Only these jobs, and all of their outputs that were not brought; none: all jobs.
        rules_for: Where files belong.
        conflict: The rule for files of other content that stand there.
        dry_run: Only tell what would be done; the checkpoint stays.
    """

    farm_id: str
    queue_id: str
    rules_for: RulesFor
    job_ids: tuple[str, ...] = ()
    conflict: Conflict = Conflict.OVERWRITE
    dry_run: bool = False


@dataclass(slots=True)
class _Job:
    """One job's part.

    Attributes:
        infos: Its manifests that are new, by their keys.
        told: What will be told of it.
        files: By manifest, and by the directory they go below, the files that are the newest of
            their path.
        broken: The keys of manifests that are of no use.
        refused: The keys of manifests of which the store refuses something, and not all.
        unplaced: The keys of manifests of which a file has no place here.
        failure: Why something can not be brought.
    """

    infos: dict[str, DocumentInfo]
    told: SyncedJob
    files: dict[str, dict[Path, list[FileEntry]]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    unplaced: set[str] = field(default_factory=set)
    failure: PropmasterError | None = None

    @property
    def newest(self) -> float:
        return max((info.last_modified for info in self.infos.values()), default=0.0)

    def marks(self, keys: Iterable[str]) -> list[str]:
        return [mark_of(self.infos[key]) for key in keys]

    def fail(self, error: PropmasterError) -> None:
        """Remember the first thing that went wrong."""
        if self.failure is None:
            message = f"{self.told.job_id}: {error.message}"
            hint = _RUN_AGAIN if isinstance(error, _LOST) else error.hint
            self.failure = type(error)(message, hint=hint)
            self.told.state, self.told.reason = "failed", error.message


def sync(
    context: TransferContext, checkpoint: Checkpoint, request: SyncRequest, shown_as: Path
) -> tuple[SyncResult, list[PropmasterError]]:
    """Bring what is new; return what was done, and the failures of single jobs.

    Args:
        context: The services.
        checkpoint: Open, and of this request's queue.
        request: What is to be synced.
        shown_as: The checkpoint's path.

    Raises:
        StoreAccessError, StoreUnavailableError, NoSpaceError, CacheUnsafeError: What was brought
            until then is noted.
        CancelledError: As for those.
    """
    begun = time.monotonic()
    running = _Sync(context, checkpoint, request)
    running.run()
    jobs = [job.told for job in running.jobs.values()]
    result = SyncResult(
        checkpoint=os.fspath(shown_as),
        first=checkpoint.is_new,
        since=checkpoint.header.since,
        dry_run=request.dry_run,
        jobs=jobs,
        files=sum(job.files for job in jobs),
        bytes=sum(job.bytes for job in jobs),
        bytes_fetched=sum(job.bytes_fetched for job in jobs),
        failed=sum(job.state == "failed" for job in jobs),
        seconds=round(time.monotonic() - begun, 3),
    )
    log.info(
        events.OUTPUTS_SYNCED,
        extra={
            "queue_id": request.queue_id,
            "jobs": len(jobs),
            "files": result.files,
            "bytes_fetched": result.bytes_fetched,
            "failed": result.failed,
            "seconds": result.seconds,
        },
    )
    return result, [job.failure for job in running.jobs.values() if job.failure is not None]


class _Sync:
    """One sync; see the module's docstring."""

    def __init__(
        self, context: TransferContext, checkpoint: Checkpoint, request: SyncRequest
    ) -> None:
        self._context = context
        self._checkpoint = checkpoint
        self._request = request
        self._found_rules: dict[str, JobRules] = {}
        self._rules: dict[str, PathRules] = {}
        self.jobs: dict[str, _Job] = {}

    def run(self) -> None:
        request = self._request
        listed = list_output_manifests(
            self._context, request.farm_id, request.queue_id, request.job_ids
        )
        self._select(listed)
        self._map()
        self._share_out(self._fetched(listed))
        for job_id, job in sorted(self.jobs.items(), key=lambda item: item[1].newest):
            self._context.cancellation.check()
            self._bring(job_id, job)
        if not request.dry_run:
            marks = {job_id: set(map(mark_of, infos)) for job_id, infos in listed.items()}
            self._checkpoint.compact(marks, whole=not request.job_ids)

    def _select(self, listed: dict[str, list[DocumentInfo]]) -> None:
        """Find the jobs with manifests that were not brought."""
        checkpoint = self._checkpoint
        for job_id, infos in listed.items():
            named = job_id in self._request.job_ids
            placeable = self._placeable(job_id, named=named)
            new, given_up = {}, 0
            for info in infos:
                mark = mark_of(info)
                if checkpoint.has(job_id, mark):
                    if mark not in placeable:
                        continue
                elif not (named or info.last_modified >= checkpoint.header.since):
                    continue
                if not named and checkpoint.tries(job_id, mark) >= MAX_TRIES:
                    given_up += 1
                else:
                    new[info.key] = info
            if new or given_up:
                told = SyncedJob(job_id, "synced", manifests=len(new), given_up=given_up)
                self.jobs[job_id] = _Job(new, told)
                if not new:
                    told.state = "given-up"
                    told.reason = f"{MAX_TRIES} syncs have failed; name the job to try it again"

    def _placeable(self, job_id: str, *, named: bool) -> set[str]:
        """Return the manifests of which a file had no place, and may have one by now."""
        unplaced = self._checkpoint.unplaced(job_id)
        if named or not unplaced:
            return {*unplaced}
        try:
            mark = self._rules_of(job_id).mark
        except InputError:
            # Of a job or profile that the farm has forgotten: as it was.
            return set()
        return {each for each, then in unplaced.items() if then != mark}

    def _rules_of(self, job_id: str) -> JobRules:
        if job_id not in self._found_rules:
            known = self._checkpoint.profile(job_id)
            self._found_rules[job_id] = self._request.rules_for(job_id, known)
        return self._found_rules[job_id]

    def _map(self) -> None:
        """Find out where the jobs' files belong."""
        for job_id, job in self.jobs.items():
            if not job.infos:
                continue
            try:
                found = self._rules_of(job_id)
            except InputError as error:
                job.broken.update(job.infos)
                job.fail(error)
                continue
            if found.rules is not None:
                self._rules[job_id] = found.rules
            else:
                job.told.state, job.told.reason = "skipped", found.reason
                job.unplaced.update(job.infos)

    def _fetched(self, listed: dict[str, list[DocumentInfo]]) -> list[tuple[str, OutputManifest]]:
        """Return all manifests that have a say in what is the newest of a path, in their order."""
        new = {key: info for at in self._rules for key, info in self.jobs[at].infos.items()}
        if not new:
            return []
        oldest = min(info.last_modified for info in new.values())
        asked = [
            (job_id, info)
            for job_id, infos in listed.items()
            for info in infos
            if info.key in new or (info.last_modified >= oldest and self._is_in_place(job_id, info))
        ]
        found = []
        answers = self._context.ask_each(_fetch, [info for _, info in asked])
        refused = [answer for answer in answers if isinstance(answer, StoreAccessError)]
        if refused and len(refused) == len(answers):
            raise refused[0]
        for (job_id, info), answer in zip(asked, answers, strict=True):
            if isinstance(answer, OutputManifest):
                found.append((job_id, answer))
            elif info.key in new:
                self._break(self.jobs[job_id], info.key, answer)
        return sorted(found, key=lambda each: (each[1].last_modified, each[1].key))

    def _is_in_place(self, job_id: str, info: DocumentInfo) -> bool:
        """Whether the files of a manifest were brought, and it is known where to."""
        if not self._checkpoint.has(job_id, mark_of(info)):
            return False
        if job_id not in self._rules and job_id not in self.jobs:
            with suppress(InputError):
                if (rules := self._rules_of(job_id).rules) is not None:
                    self._rules[job_id] = rules
        return job_id in self._rules

    def _share_out(self, manifests: Sequence[tuple[str, OutputManifest]]) -> None:
        """Give each path of this host to the newest manifest that has it."""
        owners: dict[str, tuple[_Job | None, str, Path, FileEntry]] = {}
        for job_id, output in manifests:
            job = self.jobs.get(job_id)
            if job is not None and output.key not in job.infos:
                job = None
            try:
                placed = list(self._placed(job, job_id, output))
            except UnsafePathError as error:
                if job is not None:
                    self._break(job, output.key, error)
                continue
            for root, entry in placed:
                owners[f"{root}/{entry.path}"] = (job, output.key, root, entry)
        for owner, key, root, entry in owners.values():
            if owner is not None:
                owner.files.setdefault(key, {}).setdefault(root, []).append(entry)

    def _placed(
        self, job: _Job | None, job_id: str, output: OutputManifest
    ) -> Iterator[tuple[Path, FileEntry]]:
        place = self._rules[job_id].below(output.root_path)
        for entry in output.manifest.entries:
            found = place(entry.path)
            if found is not None:
                root, path = found
                same = path == entry.path
                yield root, entry if same else msgspec.structs.replace(entry, path=path)
            elif job is not None:
                job.unplaced.add(output.key)
                job.told.unmapped_files += 1
                if len(job.told.unmapped) < SHOWN_PATHS:
                    job.told.unmapped.append(f"{output.root_path}: {entry.path}")

    def _break(self, job: _Job, key: str, error: PropmasterError) -> None:
        job.broken.add(key)
        if isinstance(error, _OF_THE_STORE):
            job.refused.add(key)
        job.fail(error)

    def _bring(self, job_id: str, job: _Job) -> None:
        """Place a job's files, and note how far that came."""
        done = job.infos.keys() - job.broken
        if job_id in self._rules:
            done = self._place_all(job_id, job, sorted(done))
        if self._request.dry_run or not job.infos:
            return
        if done and self._is_on_disk(job):
            step = Advance(job_id, taken=job.marks(sorted(done)))
            if unplaced := sorted(done & job.unplaced):
                by = self._rules_of(job_id)
                step = msgspec.structs.replace(
                    step, unplaced=job.marks(unplaced), rules=by.mark, profile=by.profile
                )
            self._checkpoint.advance(step)
        else:
            done = set()
        by_tries: dict[int, list[str]] = {}
        for mark in job.marks(sorted(job.infos.keys() - done - job.refused)):
            tries = min(self._checkpoint.tries(job_id, mark) + 1, MAX_TRIES)
            by_tries.setdefault(tries, []).append(mark)
        for tries, marks in by_tries.items():
            self._checkpoint.advance(Advance(job_id, failed=marks, tries=tries))

    @staticmethod
    def _is_on_disk(job: _Job) -> bool:
        """See that what the checkpoint is about to name outlives a power cut, as that does."""
        try:
            sync_file_systems(map(Path, job.told.roots))
        except OSError as error:
            failure = local_write_error(error, str(error.filename))
            if isinstance(failure, _END_THE_SYNC):
                raise failure from error
            job.fail(failure)
            return False
        return True

    def _place_all(self, job_id: str, job: _Job, keys: Sequence[str]) -> set[str]:
        """Place the files of a job's manifests; return those whose files are all in place."""
        try:
            self._place(job_id, job, keys)
        except _END_THE_SYNC:
            raise
        except _OF_THE_STORE as error:
            if not self._store_answers():
                raise
            job.fail(error)
            if len(keys) == 1:
                job.refused.update(keys)
        except PropmasterError as error:
            job.fail(error)
        else:
            return {*keys}
        # One of them is at fault; what the others' tasks have left is wanted all the same.
        alone = keys if len(keys) > 1 else ()
        return {key for each in alone for key in self._place_all(job_id, job, [each])}

    def _store_answers(self) -> bool:
        """Whether a failure was about one object, and not about all of the store."""
        prefix = f"{self._request.farm_id}/{self._request.queue_id}/"
        with suppress(*_OF_THE_STORE):
            self._context.ask(lambda store: next(iter(store.list_documents(prefix)), None))
            return True
        return False

    def _place(self, job_id: str, job: _Job, keys: Sequence[str]) -> None:
        told, context = job.told, self._context
        files: dict[Path, list[FileEntry]] = {}
        for key in keys:
            for root, entries in job.files.get(key, {}).items():
                files.setdefault(root, []).extend(entries)
        told.roots = sorted({*told.roots, *map(os.fspath, files)})
        # Checked before anything is written: two files may want what only one can have.
        manifests = {
            root: Manifest(entries, source=f"what {job_id} has left")
            for root, entries in files.items()
        }
        if self._request.dry_run:
            told.files += sum(len(manifest.entries) for manifest in manifests.values())
            told.bytes += sum(manifest.total_bytes for manifest in manifests.values())
            return
        plans = [
            plan_download(manifest, root, context.index, cancellation=context.cancellation)
            for root, manifest in manifests.items()
        ]
        conflict = self._request.conflict
        settled = [settle(plan, conflict, context.index, context.cancellation) for plan in plans]
        survey(plans, context.cache, context.cancellation)
        with context.leased(job_id, {digest for plan in plans for digest in plan.wanted}):
            for plan in plans:
                told.bytes_fetched += self._download(job_id, plan)
        for plan, each in zip(plans, settled, strict=True):
            told.left += len(each.left)
            told.copies += [f"{plan.root}/{path}" for path in each.copies]
            told.files += plan.files_to_place + len(plan.kept)
            told.bytes += plan.bytes_to_place + sum(entry.size for entry in plan.kept)

    def _download(self, job_id: str, plan: DownloadPlan) -> int:
        """Carry a plan out, if there is anything to do; return the bytes that were fetched."""
        if not plan.wanted and not plan.retimed:
            return 0
        spec = TransferSpec(
            kind="outputs",
            source=self._context.store_url,
            destination=os.fspath(plan.root),
            session=f"sync {job_id}",
            job=job_id,
        )
        return download(plan, self._context, spec).bytes_fetched


def _fetch(store: Store, info: DocumentInfo) -> OutputManifest | PropmasterError:
    """Return a manifest, or why this one can not be had."""
    try:
        return fetch_output(store, info)
    except _OF_A_MANIFEST as error:
        return error
