"""Task completion: what the task left behind becomes blobs and a manifest, only what is new.

The output directories are walked once and compared with the baseline of the state file. Whatever
the file system says is untouched (size, times, inode) is not read; the rest is hashed, and content
decides: a file that was only touched, or rewritten with what it held, is no output. What this very
task had left behind when it ran before is one again, even if it came out the same: readers take
only a task's last manifest. Of a chunk of tasks that is so for the same session action, whose key a
second manifest would have. An action that is run again because its answer was lost gets the answer
that the state keeps. All blobs of all roots are stored before the first manifest is, since a
manifest is what readers go by.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    FileChangedError,
    MountReadFailedError,
    SessionStateError,
)
from agent_plugin.content.local_index import SETTLED_NS
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.content.safe_path import Root
from agent_plugin.content.snapshot import FoundFile, hash_files, walk, walk_links
from agent_plugin.content.store import Store
from agent_plugin.publish.spec import Publisher
from agent_plugin.session.mount_control import files_of_mount
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.roots import (
    is_below,
    output_manifest_key,
    output_metadata,
    session_directory_name,
)
from agent_plugin.session.state import (
    VIRTUAL,
    AnsweredAction,
    BaselineFile,
    FinishResult,
    OutputManifestResult,
    RootState,
    SessionState,
    StateFile,
)
from agent_plugin.session.virtual import refuse_failed_reads, refuse_lost_mounts
from agent_plugin.session.written import find_written
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.ledger import TransferSpec
from agent_plugin.transfer.upload import Tally, upload

log = events.get_logger()

# How often files that changed while they were uploaded are looked at again.
ROUNDS: Final = 4
_SECOND_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class TaskAction:
    """Which session action ran which task.

    Attributes:
        task_id: None for a chunk of tasks.
        started_at: When the action started, seconds since the epoch; names the run's folder.
    """

    step_id: str
    task_id: str | None
    session_action_id: str
    started_at: float

    @property
    def owner(self) -> str:
        """What the files that it leaves are known by: the task, or for a chunk the action."""
        return self.task_id or self.session_action_id


@dataclass(slots=True)
class _Changes:
    """What became of one root's output directories.

    Attributes:
        follow: Whether the root may be a link.
        gone: Inputs of a mounted root that are not at their path any more.
        inputs: Of the changed content of a mounted root, what is that of inputs: it came from the
            store, and to read it would fetch it.
    """

    root: RootState
    follow: bool
    changed: dict[str, FileEntry] = field(default_factory=dict)
    baseline: dict[str, BaselineFile] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    inputs: set[Digest] = field(default_factory=set)

    def differ(self) -> bool:
        """Whether anything is not as the state has it."""
        return self.baseline != self.root.baseline or self.gone != self.root.gone


def finish_task(
    action: TaskAction,
    context: TransferContext,
    state_file: StateFile,
    *,
    mounts: Mounts,
    publishers: Sequence[Publisher] = (),
    leaves: bool = False,
    failed: bool = False,
    upload_failed: bool = False,
    on_manifest: Callable[[int, bytes], object] = lambda _index, _data: None,
) -> FinishResult:
    """Store what a task left behind.

    Args:
        action: The task's session action.
        context: The services.
        state_file: Of a started session.
        mounts: The host's.
        publishers: The operator's, who have their turn after the job's own.
        leaves: Whether publishers that are not required, and fail for a reason that may pass, are
            tried again when the session ends.
        failed: The task failed; then nothing is stored,
        upload_failed: unless this asks for it.
        on_manifest: Told each output manifest that is stored, with its index in the job's list;
            not those of an answer that is given again.

    Raises:
        SessionStateError: The session has not started, or the sync of a step did not finish.
        MountReadFailedError: The task was refused bytes of its inputs; nothing was stored.
        MountFailedError: A root is not mounted any more; nothing was stored.
        FileChangedError: A file kept changing while it was read.
        PropmasterError: Any other of the tree; no manifest names what is not stored.
    """
    begun = time.monotonic()
    state = state_file.read_ready()
    if state.unfinished_steps:
        raise SessionStateError(
            f"the sync of {', '.join(state.unfinished_steps)} did not finish",
            hint="run `propmaster session sync-step` for it again; it goes on where it stopped",
        )
    try:
        refuse_failed_reads(state.roots, mounts)
    except MountReadFailedError:
        state_file.write(state)
        raise
    refuse_lost_mounts(state.roots, mounts)
    if failed and not upload_failed:
        result = _empty_result(state)
    else:
        result, found = _store_outputs(state, action, context, state_file, on_manifest)
        publishers = (*state.job.publishers, *publishers)
        if result.files and publishers and not failed:
            _publish(publishers, state, found, context, state_file, leaves=leaves)
    result.seconds = round(time.monotonic() - begun, 3)
    log.info(
        events.TASK_FINISHED,
        extra={
            "session": state.session_id,
            "step": action.step_id,
            "task": action.task_id,
            "files": result.files,
            "bytes_uploaded": result.bytes_uploaded,
            "bytes_reused": result.bytes_reused,
            "deleted": len(result.deleted),
            "seconds": result.seconds,
        },
    )
    return result


def _empty_result(state: SessionState) -> FinishResult:
    manifests = [OutputManifestResult() for _ in state.job.attachments.manifests]
    return FinishResult(manifests, 0, 0, 0, [], 0.0)


def _store_outputs(
    state: SessionState,
    action: TaskAction,
    context: TransferContext,
    state_file: StateFile,
    on_manifest: Callable[[int, bytes], object],
) -> tuple[FinishResult, list[_Changes]]:
    """Store what became of all roots, and note it; what was stored and noted is told again."""
    found = [
        _find_changes(root, state, action, context)
        for root in state.roots
        if root.output_directories
    ]
    if not any(changes.differ() for changes in found) and (answer := _answer_before(state, action)):
        return answer, found
    result = _empty_result(state)
    found = [_store_changes(changes, state, action, context, result) for changes in found]
    _store_manifests(state, found, action, context, result, on_manifest)
    result.deleted = [path for changes in found for path in changes.deleted]
    if result.files or any(changes.differ() for changes in found):
        for changes in found:
            changes.root.baseline = changes.baseline
            changes.root.gone = changes.gone
        state.answered = AnsweredAction(
            action.step_id, action.task_id, action.session_action_id, result
        )
        state.account_id = getattr(context.open_store, "account_id", None)
        state_file.write(state)
    return result, found


def _publish(
    publishers: Sequence[Publisher],
    state: SessionState,
    found: Sequence[_Changes],
    context: TransferContext,
    state_file: StateFile,
    *,
    leaves: bool,
) -> None:
    """Publish what the action left whose answer the state has, and complete the answer."""
    # Loaded here: it brings the libraries for S3, which a task without publishers does without.
    from agent_plugin.publish.outputs import RootOutputs  # noqa: PLC0415
    from agent_plugin.session.publishing import publish_outputs  # noqa: PLC0415

    assert state.answered is not None  # noqa: S101 - who has stored files has an answer
    roots = [
        RootOutputs(
            Path(changes.root.local_root),
            changes.follow,
            session_directory_name(changes.root.root_path),
            list(changes.changed.values()),
        )
        for changes in found
        if changes.changed
    ]
    publish_outputs(publishers, roots, state.answered, state, context, state_file, leaves=leaves)


def _answer_before(state: SessionState, action: TaskAction) -> FinishResult | None:
    """Return what this very action was answered before, if it was the last that stored anything."""
    answered = state.answered
    if answered is None or not answered.is_of(
        action.step_id, action.task_id, action.session_action_id
    ):
        return None
    return answered.result


def _store_changes(
    changes: _Changes,
    state: SessionState,
    action: TaskAction,
    context: TransferContext,
    result: FinishResult,
) -> _Changes:
    """Store the changed content of a root; return its changes as they were stored."""
    restless: list[str] = []
    tally = Tally()
    for _ in range(ROUNDS):
        restless = _upload(changes, state, action, context, tally)
        if not restless:
            result.bytes_uploaded += tally.bytes_uploaded
            result.bytes_reused += tally.bytes_reused
            return changes
        changes = _find_changes(changes.root, state, action, context)
    raise FileChangedError(
        f"{restless[0]} in {changes.root.local_root} kept changing while it was uploaded"
        f" ({len(restless)} such files)",
        hint="the task must have ended, and closed its files, before finish-task",
    )


def _find_changes(
    root: RootState, state: SessionState, action: TaskAction, context: TransferContext
) -> _Changes:
    if root.file_system == VIRTUAL:
        return _find_written(root, state, action, context)
    changes = _Changes(root, follow=not state.owns(root))
    suspects: list[FoundFile] = []
    local_root = Path(root.local_root)
    cancellation = context.cancellation
    for found in walk(
        local_root,
        root.output_directories,
        follow_root=changes.follow,
        owner=context.owner,
        cancellation=cancellation,
    ):
        known = root.baseline.get(found.path)
        if known is None or not _untouched(known, found):
            suspects.append(found)
            continue
        _keep(changes, found.path, known, action.owner)
    if suspects:
        with Root(local_root, follow=changes.follow, owner=context.owner) as opened:
            for found, digest in hash_files(
                opened, suspects, context.index, cancellation=cancellation
            ):
                _compare(changes, found, digest, root.baseline.get(found.path), action.owner)
    # Also what was found and had vanished when it was to be read.
    changes.deleted = sorted(root.baseline.keys() - changes.baseline.keys())
    return changes


def _find_written(
    root: RootState, state: SessionState, action: TaskAction, context: TransferContext
) -> _Changes:
    """Return what became of a mounted root, by what was written above the mount."""
    changes = _Changes(root, follow=not state.owns(root))
    local_root = Path(root.local_root)
    upper = Path(root.written_to)
    inputs = partial(files_of_mount, root.control, cancellation=context.cancellation)
    written = find_written(upper, root.output_directories, inputs, context.cancellation)
    found_files = list(written.files.values())
    if written.links:
        found_files += walk_links(
            local_root,
            written.links,
            follow_root=changes.follow,
            owner=context.owner,
            cancellation=context.cancellation,
        )
    suspects: list[FoundFile] = []
    for found in found_files:
        known = root.baseline.get(found.path)
        if known is None or not _untouched(known, found):
            suspects.append(found)
        else:
            _keep(changes, found.path, known, action.owner)
    if suspects:
        entries = {
            entry.path: entry
            for below in inputs([found.path for found in suspects])
            for entry in below
        }
        with Root(local_root, follow=changes.follow, owner=context.owner) as opened:
            for found, digest in hash_files(
                opened, suspects, context.index, cancellation=context.cancellation
            ):
                known = root.baseline.get(found.path)
                if known is None and found.path in entries:
                    known = _as_input(entries[found.path])
                _compare(changes, found, digest, known, action.owner)
    for path, entry in written.moved.items():
        moved = _as_input(entry, owner=action.owner)
        known = root.baseline.get(path)
        if known is not None and (known.hash, known.size) == (moved.hash, moved.size):
            moved = known
        else:
            changes.changed[path] = FileEntry(entry.hash, entry.mtime, path, entry.size)
            changes.inputs.add(entry.digest)
        _keep(changes, path, moved, action.owner)
    # In place of an input may be a link to what counts for it.
    gone = written.gone.keys() - root.gone - changes.baseline.keys()
    changes.gone = sorted(written.gone)
    changes.deleted = sorted(gone | (root.baseline.keys() - changes.baseline.keys() - gone))
    return changes


def _as_input(entry: FileEntry, *, owner: str = "") -> BaselineFile:
    """Return an input as a file that only its content tells from what is there now."""
    return BaselineFile(entry.hash, entry.size, entry.mtime, -1, -1, -1, owner)


def _keep(changes: _Changes, path: str, known: BaselineFile, owner: str) -> None:
    """Note that a file is as the state has it; what this very task left is an output again."""
    changes.baseline[path] = known
    if known.owner == owner:
        changes.changed[path] = FileEntry(known.hash, known.mtime, path, known.size)


def _compare(
    changes: _Changes, found: FoundFile, digest: Digest, known: BaselineFile | None, owner: str
) -> None:
    """Note what became of one file that is not as it was."""
    same = known is not None and (known.hash, known.size) == (digest.hex, digest.size)
    own = known is not None and known.owner == owner
    if not same or own:
        changes.changed[found.path] = FileEntry(
            hash=digest.hex, mtime=found.mtime_us, path=found.path, size=digest.size
        )
    mtime_ns, ctime_ns, inode = _told_by(found)
    changes.baseline[found.path] = BaselineFile(
        hash=digest.hex,
        size=digest.size,
        mtime=known.mtime if same and known and not own else found.mtime_us,
        mtime_ns=mtime_ns,
        ctime_ns=ctime_ns,
        inode=inode,
        owner=known.owner if same and known else owner,
    )


def _told_by(found: FoundFile) -> tuple[int, int, int]:
    """Return the times and the inode by which a file is known to be untouched.

    All -1 while another write could leave the same. Where times are whole seconds, that is so until
    the next one; finer clocks have ticked before another task begins.
    """
    is_whole = found.ctime_ns % _SECOND_NS == 0
    if is_whole and found.ctime_ns + SETTLED_NS > time.time_ns():
        return -1, -1, -1
    return found.mtime_ns, found.ctime_ns, found.inode


def _untouched(known: BaselineFile, found: FoundFile) -> bool:
    return (known.size, known.mtime_ns, known.ctime_ns, known.inode) == (
        found.size,
        found.mtime_ns,
        found.ctime_ns,
        found.inode,
    )


def _upload(
    changes: _Changes,
    state: SessionState,
    action: TaskAction,
    context: TransferContext,
    tally: Tally,
) -> list[str]:
    """Store the content of one root's changed files; return those that have changed meanwhile."""
    files: dict[Digest, list[str]] = {}
    for entry in changes.changed.values():
        files.setdefault(entry.digest, []).append(entry.path)
    if changes.inputs:
        there = changes.inputs - context.ask(lambda store: store.find_missing(changes.inputs))
        tally.reuse(there)
        for digest in there:
            files.pop(digest, None)
    if not files:
        return []
    spec = TransferSpec(
        kind="sync-out",
        source=changes.root.local_root,
        destination=context.store_url,
        session=state.session_id,
        job=state.job.job_id,
        step=action.step_id,
        task=action.task_id or "",
    )
    place = Path(changes.root.local_root)
    with Root(place, follow=changes.follow, owner=context.owner) as opened:
        done = upload(opened, files, context, spec)
    tally.add(files, done)
    for path in done.changed:
        log.info(events.FILE_REREAD, extra={"path": path})
    for path in done.excluded:
        # No manifest may name what the store may lack.
        changes.changed.pop(path, None)
    return done.changed


def _store_manifests(
    state: SessionState,
    all_changes: Sequence[_Changes],
    action: TaskAction,
    context: TransferContext,
    result: FinishResult,
    on_manifest: Callable[[int, bytes], object],
) -> None:
    """Store one manifest for each of the job's manifests that has outputs."""
    for changes in all_changes:
        for index in changes.root.manifests:
            properties = state.job.attachments.manifests[index]
            entries = [
                entry
                for entry in changes.changed.values()
                if is_below(entry.path, properties.output_directories)
            ]
            if not entries:
                continue
            data = encode(Manifest.of(entries))
            key = output_manifest_key(
                state.job.farm_id,
                state.job.queue_id,
                state.job.job_id,
                action.step_id,
                action.task_id,
                action.started_at,
                action.session_action_id,
                properties,
            )
            metadata = output_metadata(properties.root_path, properties.file_system_location_name)
            context.ask(partial(_put, key=key, data=data, metadata=metadata))
            on_manifest(index, data)
            result.manifests[index] = OutputManifestResult(key, Digest.of(data).hex)
            result.files += len(entries)


def _put(store: Store, *, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
    store.put_document(key, data, metadata)
