"""What a session's end does for what the session publishes, while its files are still there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from agent_plugin.content.store import Cancellation
from agent_plugin.publish.leftovers import abort_left
from agent_plugin.services import open_services
from agent_plugin.session.publishing import finish_left
from agent_plugin.session.state import SessionState
from agent_plugin.settings import Settings

# An agent that ends a session waits for it, and may kill it.
END_SECONDS: Final = 60.0


def ending_publications(
    settings: Settings, cancellation: Cancellation, *, seconds: float = END_SECONDS
) -> Callable[[SessionState], None]:
    """Return what ends the publications of a session; see `session.end`.

    Those that were left are tried once more, and uploads that killed ones have left are aborted.

    Args:
        settings: The host's.
        cancellation: Ends it.
        seconds: Nothing is published any more when they are over.
    """

    def end(state: SessionState) -> None:
        outputs = settings.for_queue(state.job.queue_id).outputs
        if not (state.left or state.job.publishers or outputs.publishers):
            return
        with (
            _no_longer_than(seconds, cancellation),
            open_services(
                settings,
                state.job.store_url,
                cancellation=cancellation,
                queue_id=state.job.queue_id,
                account_id=state.account_id,
                quiet=True,
            ) as context,
        ):
            abort_left(context, session=state.session_id)
            finish_left(state, context)

    return end


@contextmanager
def _no_longer_than(seconds: float, cancellation: Cancellation) -> Iterator[None]:
    timer = threading.Timer(seconds, cancellation.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
