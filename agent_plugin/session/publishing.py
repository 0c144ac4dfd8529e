"""Publishing at a task's end: after its output manifests are stored, so that no output is lost.

The state file remembers when it began and what became of it. So an action that is run again fills
placeholders as before, asks no publisher twice that has published, and answers the same.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.publish.contents import list_contents
from agent_plugin.publish.outputs import RootOutputs
from agent_plugin.publish.placeholders import Execution
from agent_plugin.publish.publisher import publish
from agent_plugin.publish.result_documents import Published, ResultsDocument, keep_results
from agent_plugin.publish.spec import Publisher
from agent_plugin.session.state import (
    AnsweredAction,
    LeftPublication,
    LeftRoot,
    SessionState,
    StateFile,
)
from agent_plugin.transfer.context import TransferContext

log = events.get_logger()


def publish_outputs(
    publishers: Sequence[Publisher],
    roots: Sequence[RootOutputs],
    answered: AnsweredAction,
    state: SessionState,
    context: TransferContext,
    state_file: StateFile,
    *,
    leaves: bool,
) -> None:
    """Have publishers publish what an action left, and complete its answer.

    Args:
        publishers: The job's, and then the host's.
        roots: What it left; with files.
        answered: The action and its answer, which is in the state.
        state: The session's.
        context: The services.
        state_file: Of the session.
        leaves: Whether what is not required, and fails for a reason that may pass, is tried again
            when the session ends.

    Raises:
        PropmasterError: Of the first publisher that is required and has failed; what became of the
            others is in the state and in the store.
        CancelledError: On request; when the action is run again it goes on.
    """
    if answered.is_published:
        return
    if not answered.publishing_since:
        answered.publishing_since = time.time()
        state_file.write(state)
    execution = _execution(answered, state, context)
    before = _before(answered, publishers)
    answered.published, refused = publish(
        publishers, roots, execution, context, before, leaves=leaves
    )
    answered.publishers = tuple(publishers)
    document = ResultsDocument.of(execution, answered.published)
    answered.result.results = document.results
    answered.result.publish_failures = document.failures
    answered.result.publish_excluded = document.excluded
    document, lists = list_contents(document, answered.published, publishers, roots)
    not_kept = _keep(document, lists, publishers, context)
    refused = refused or not_kept
    state.left = [
        left for left in state.left if left.action.session_action_id != answered.session_action_id
    ]
    if any(_is_left(turn) for turn in answered.published):
        state.left.append(LeftPublication(answered, [_left_root(root) for root in roots]))
    # What failed and is required is tried again by the same action.
    answered.is_published = refused is None
    state_file.write(state)
    if refused is not None:
        raise refused


def finish_left(state: SessionState, context: TransferContext) -> None:
    """Try again what actions of a session could not publish, before its files go.

    Raises:
        CancelledError: On request, as for what can not be published now: it is not published.
    """
    for left in state.left:
        action = left.action
        execution = _execution(action, state, context)
        roots = [
            RootOutputs(Path(root.local_root), root.follow, root.directory, root.entries)
            for root in left.roots
        ]
        before = [turn for turn in action.published if not _is_left(turn)]
        published, _ = publish(action.publishers, roots, execution, context, before)
        document = ResultsDocument.of(execution, published)
        document, lists = list_contents(document, published, action.publishers, roots)
        _keep(document, lists, action.publishers, context)


def _is_left(turn: Published) -> bool:
    return turn.failure is not None and turn.failure.later


def _left_root(root: RootOutputs) -> LeftRoot:
    return LeftRoot(os.fspath(root.local_root), root.follow, root.directory, [*root.entries])


def _execution(
    answered: AnsweredAction, state: SessionState, context: TransferContext
) -> Execution:
    job = state.job
    return Execution(
        farm_id=job.farm_id,
        queue_id=job.queue_id,
        job_id=job.job_id,
        step_id=answered.step_id,
        task_id=answered.task_id,
        execution_id=answered.session_action_id,
        session_id=state.session_id,
        node_id=context.worker_id,
        instant=answered.publishing_since,
    )


def _before(answered: AnsweredAction, publishers: Sequence[Publisher]) -> list[Published]:
    """Return the turns of those that had published at an earlier run, by their places now.

    The operator may have changed the host's meanwhile.
    """
    turns = {answered.publishers[turn.publisher]: turn for turn in answered.published}
    return [
        msgspec.structs.replace(turns[publisher], publisher=index)
        for index, publisher in enumerate(publishers)
        if publisher in turns and turns[publisher].result is not None
    ]


def _keep(
    document: ResultsDocument,
    lists: Mapping[str, bytes],
    publishers: Sequence[Publisher],
    context: TransferContext,
) -> PropmasterError | None:
    """Put the results where readers find them; return why not, if a publisher is required."""
    try:
        context.ask(lambda store: keep_results(store, document, lists))
    except CancelledError:
        raise
    except PropmasterError as error:
        extra = {"key": document.key, "code": error.code, "reason": error.message}
        log.warning(events.RESULTS_NOT_KEPT, extra=extra)
        if any(publisher.params.required for publisher in publishers):
            return error
    return None
