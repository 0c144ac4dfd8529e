"""Waiting for what another thread brings, as long as whoever waits is wanted."""

from concurrent.futures import Future, wait
from typing import Final, TypeVar

from agent_plugin.content.store import Cancellation

# How often who waits looks whether it is still wanted, in seconds: less and less often, since a
# thousand may wait for a store that hangs.
POLL_SECONDS: Final = 0.1
LONGEST_POLL_SECONDS: Final = 1.0

_T = TypeVar("_T")


def result_of(future: "Future[_T]", cancellation: Cancellation) -> _T:
    """Return what a future gives, or raise what it raises.

    Raises:
        CancelledError: Cancellation was wished.
    """
    seconds = POLL_SECONDS
    while not future.done():
        cancellation.check()
        wait([future], timeout=seconds)
        seconds = min(2 * seconds, LONGEST_POLL_SECONDS)
    return future.result()
