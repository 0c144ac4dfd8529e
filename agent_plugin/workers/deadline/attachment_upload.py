"""In place of the agent's `attachment_upload.py`: stores what a task has left behind.

The agent calls it after each task that succeeded, with all roots of the session. It learns from
what is printed where each root's output manifest is in the store, and hands a copy of it, from the
session directory, to all later calls.
"""

import sys
from typing import Final

from agent_plugin.content.digest import Digest, hash_name, hash_of
from agent_plugin.content.errors import ManifestInvalidError
from agent_plugin.content.manifest import MAX_MANIFEST_BYTES, FileEntry
from agent_plugin.session.finish_task import TaskAction, finish_task
from agent_plugin.session.job import ManifestProperties
from agent_plugin.session.state import FinishResult
from agent_plugin.settings import Settings
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.placement import Placer
from agent_plugin.transfer.progress import format_bytes
from agent_plugin.workers.call import ATTACHMENT_UPLOAD, Call
from agent_plugin.workers.deadline.directives import LogProgress, say_snapshot, say_uploads
from agent_plugin.workers.deadline.open_session import (
    Asked,
    know_session,
    open_session,
    read_call,
    summary,
)
from agent_plugin.workers.deadline.properties import task_action

# As the agent's own script has it.
SNAPSHOTS: Final = "manifest_snapshot"


def run(call: Call, settings: Settings) -> int:
    """Store what a task has left behind; see `Call`.

    Raises:
        PropmasterError: Of the tree; no manifest names what is not stored.
    """
    action = task_action(call.environment)
    asked = read_call(call, settings)
    for root in asked.roots:
        if not root.properties.output_relative_directories:
            call.say(f"{root.shown}: no output directories")
    manifests: dict[int, bytes] = {}
    with open_session(call, settings, asked, view=LogProgress(call.say).view) as session:
        state = know_session(asked, session, brings=False)
        result = finish_task(
            action,
            session.context,
            session.state_file,
            mounts=session.mounts,
            publishers=settings.for_queue(asked.job.queue_id).outputs.publishers,
            on_manifest=manifests.__setitem__,
        )
        roots = state.job.attachments.manifests
        _answer(call, asked, action, session.context, roots, result, manifests)
    for published in result.results:
        call.say(f"propmaster: published {published.url}")
    for failure in result.publish_failures:
        call.say(f"propmaster: not published ({failure.error}): {failure.message}")
        if failure.hint:
            call.say(f"propmaster: hint: {failure.hint}")
    for excluded in result.publish_excluded:
        call.say(f"propmaster: excluded by hand: {excluded.files} files of {excluded.url}")
    call.say(
        summary(
            result.files,
            f"{format_bytes(result.bytes_uploaded)} uploaded",
            f"{format_bytes(result.bytes_reused)} were in the store",
            seconds=result.seconds,
        )
    )
    return 0


def _answer(
    call: Call,
    asked: Asked,
    action: TaskAction,
    context: TransferContext,
    roots: tuple[ManifestProperties, ...],
    result: FinishResult,
    manifests: dict[int, bytes],
) -> None:
    """Tell the agent what was stored, and leave copies of the manifests for later calls."""
    shown = {root.properties: root.shown for root in asked.roots}
    stored = [
        (index, properties, manifest)
        for index, (properties, manifest) in enumerate(zip(roots, result.manifests, strict=True))
        if manifest.output_manifest_path
    ]
    if not stored:
        call.say("no outputs to upload")
        # Without it the agent reports what the session's task before has left as this one's.
        say_uploads(call.say, [])
        return
    label = f"snapshot-{action.session_action_id}"
    placer = Placer(asked.directory.path, label, follow=False, owner=asked.owner)
    with placer:
        for index, properties, manifest in stored:
            data = manifests.get(index)
            if data is None:
                # Of an answer that is given again.
                data = _fetch(context, manifest.output_manifest_path, manifest.output_manifest_hash)
            root = shown[properties]
            path = f"{SNAPSHOTS}/output-{hash_name(root)}-{action.session_action_id}.manifest"
            digest = Digest.of(data)
            mtime = int(action.started_at * 1_000_000)
            placer.place_data(FileEntry(digest.hex, mtime, path, digest.size), data)
            say_snapshot(call.say, root, path)
    say_uploads(call.say, [(properties.root_path, manifest) for _, properties, manifest in stored])


def _fetch(context: TransferContext, key: str, hash_: str) -> bytes:
    document = context.ask(lambda store: store.get_document(key, max_bytes=MAX_MANIFEST_BYTES))
    if hash_of(document.data) != hash_:
        raise ManifestInvalidError(
            f"{key} is not the manifest that was stored", hint="run the task again"
        )
    return document.data


if __name__ == "__main__":
    from agent_plugin.workers.front import main

    sys.exit(main(ATTACHMENT_UPLOAD, sys.argv[1:]))
