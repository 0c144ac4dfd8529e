"""Publishing at a task's end: after its output manifests are stored, so that no output is lost.

The state file remembers when it began and what became of it. So an action that is run again fills
placeholders as before, asks no publisher twice that has published, and answers the same.
"""

import time
from collections.abc import Sequence

from agent_plugin.content import events
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.publish.outputs import RootOutputs
from agent_plugin.publish.placeholders import Execution
from agent_plugin.publish.publisher import publish
from agent_plugin.publish.result_documents import ResultsDocument, keep_results
from agent_plugin.session.state import AnsweredAction, SessionState, StateFile
from agent_plugin.transfer.context import TransferContext

log = events.get_logger()


def publish_outputs(
    roots: Sequence[RootOutputs],
    answered: AnsweredAction,
    state: SessionState,
    context: TransferContext,
    state_file: StateFile,
) -> None:
    """Have the job's publishers publish what an action left, and complete its answer.

    Args:
        roots: What it left; with files.
        answered: The action and its answer, which is in the state.
        state: The session's.
        context: The services.
        state_file: Of the session.

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
    answered.published, refused = publish(
        state.job.publishers, roots, execution, context, answered.published
    )
    answered.result.results = [
        published.result for published in answered.published if published.result is not None
    ]
    answered.result.publish_failures = [
        published.failure for published in answered.published if published.failure is not None
    ]
    not_kept = _keep(answered, execution, state, context)
    refused = refused or not_kept
    # What failed and is required is tried again by the same action.
    answered.is_published = refused is None
    state_file.write(state)
    if refused is not None:
        raise refused


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


def _keep(
    answered: AnsweredAction,
    execution: Execution,
    state: SessionState,
    context: TransferContext,
) -> PropmasterError | None:
    """Put the results where readers find them; return why not, if a publisher is required."""
    document = ResultsDocument.of(
        execution, answered.result.results, answered.result.publish_failures
    )
    try:
        context.ask(lambda store: keep_results(store, document))
    except CancelledError:
        raise
    except PropmasterError as error:
        extra = {"key": document.key, "code": error.code, "reason": error.message}
        log.warning(events.RESULTS_NOT_KEPT, extra=extra)
        if any(publisher.params.required for publisher in state.job.publishers):
            return error
    return None
