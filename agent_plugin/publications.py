"""What a session's end does for what the session has published."""

from collections.abc import Callable

from agent_plugin.content.store import Cancellation
from agent_plugin.publish.leftovers import abort_left
from agent_plugin.services import open_services
from agent_plugin.session.state import SessionState
from agent_plugin.settings import Settings


def ending_publications(
    settings: Settings, cancellation: Cancellation
) -> Callable[[SessionState], None]:
    """Return what ends the publications of a session; see `session.end`.

    Uploads that killed ones have left are aborted.

    Args:
        settings: The host's.
        cancellation: Ends the wait for the store.
    """

    def end(state: SessionState) -> None:
        outputs = settings.for_queue(state.job.queue_id).outputs
        if not (state.job.publishers or outputs.publishers):
            return
        with open_services(
            settings,
            state.job.store_url,
            cancellation=cancellation,
            queue_id=state.job.queue_id,
            account_id=state.account_id,
            quiet=True,
        ) as context:
            abort_left(context, session=state.session_id)

    return end
