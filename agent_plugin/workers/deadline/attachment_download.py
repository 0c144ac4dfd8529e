"""In place of the agent's `attachment_download.py`: brings a session's inputs to their roots.

The agent calls it at a session's start, with the roots that have inputs, and then for each step
that depends on others, with what those have left. The job's inputs are fetched by the keys that the
job names, and compared with their hashes; what other steps have left is taken as the agent has
merged it, and replaces what stands there.
"""

import os
import sys

from agent_plugin.content.digest import hash_name, hash_of
from agent_plugin.content.manifest import MAX_MANIFEST_BYTES, Manifest, decode
from agent_plugin.queue_settings import settings_of_queue
from agent_plugin.session.start import start
from agent_plugin.session.start_result import StartResult
from agent_plugin.session.state import COPIED
from agent_plugin.session.sync_step import sync_given
from agent_plugin.settings import Settings
from agent_plugin.transfer.progress import format_bytes
from agent_plugin.workers.call import ATTACHMENT_DOWNLOAD, Call
from agent_plugin.workers.deadline.directives import Progress
from agent_plugin.workers.deadline.open_session import (
    Asked,
    OpenSession,
    know_session,
    open_session,
    read_call,
    summary,
)
from agent_plugin.workers.deadline.properties import given_inputs


def run(call: Call, settings: Settings) -> int:
    """Bring in what a call names; see `Call`.

    Raises:
        PropmasterError: Of the tree; nothing that was placed is half written.
    """
    asked = read_call(call, settings)
    progress = Progress(call.say)
    with open_session(call, settings, asked, view=progress.view, expect=progress.expect) as session:
        if any(root.brings_step_outputs for root in asked.roots):
            result = _bring_step_outputs(asked, session)
        else:
            result = _start(call, asked, session, settings)
    for root in result.roots:
        if root.reason:
            call.say(f"{root.local_root}: {root.file_system}, {root.reason}")
    progress.finish()
    call.say(
        summary(
            sum(root.files for root in result.roots),
            f"{format_bytes(sum(root.bytes_fetched for root in result.roots))} fetched",
            f"{format_bytes(sum(root.bytes_reused for root in result.roots))} reused",
            seconds=result.seconds,
        )
    )
    return 0


def _start(call: Call, asked: Asked, session: OpenSession, settings: Settings) -> StartResult:
    # The agent calls this only where it does not mount: what the job wishes it has seen to.
    file_system = settings_of_queue(settings, asked.job.queue_id).inputs.wished or COPIED
    session.mounts.clear_stale(call.cancellation)
    return start(
        asked.job,
        asked.directory.path,
        session.context,
        session.state_file,
        mounts=session.mounts,
        file_system=file_system,
        environment={**os.environ, **call.environment},
        given=given_inputs(asked.roots, asked.directory),
    )


def _bring_step_outputs(asked: Asked, session: OpenSession) -> StartResult:
    state = know_session(asked, session, brings=True)
    given: dict[int, Manifest] = {}
    label = ""
    for root in asked.roots:
        if root.input_manifest is None:
            continue
        data = asked.directory.read(root.input_manifest, most=MAX_MANIFEST_BYTES)
        given[state.job.attachments.manifests.index(root.properties)] = decode(
            data, source=root.input_manifest
        )
        label = hash_name(label + hash_of(data))
    return sync_given(
        f"step-outputs-{label[:16]}",
        given,
        session.context,
        session.state_file,
        mounts=session.mounts,
    )


if __name__ == "__main__":
    from agent_plugin.workers.front import main

    sys.exit(main(ATTACHMENT_DOWNLOAD, sys.argv[1:]))
