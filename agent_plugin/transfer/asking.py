"""Questions to the store, asked by threads that nobody has to wait for."""

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from agent_plugin.content.flight import POLL_SECONDS, Lanes
from agent_plugin.content.store import Cancellation, Store

Item = TypeVar("Item")
T = TypeVar("T")

# Sixteen threads were the fastest for blobs of 16 KiB here (docs/decisions/0001-data-plane.md).
CONCURRENCY: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What is needed to ask a store; it leaves nothing on this host.

    Attributes:
        open_store: Opens the store at the first call and returns the same one ever after; called
            only when something has to be asked of it, because opening costs time.
        cancellation: Ends the wait for an answer.
        lanes: The threads that ask.
    """

    open_store: Callable[[], Store]
    cancellation: Cancellation
    lanes: Lanes = field(default_factory=lambda: Lanes(CONCURRENCY))

    def ask(
        self, question: Callable[[Store], T], meanwhile: Callable[[], None] = lambda: None
    ) -> T:
        """Return what `question` returns of the store, unless there is a wish to stop before.

        For requests that the calling thread would make itself: no signal is noticed by a thread
        that waits for a server. A request that is left behind ends with its time limit.

        Args:
            question: Called on a thread of its own.
            meanwhile: Called several times a second while that takes.

        Raises:
            CancelledError: Cancellation was wished.
        """
        future = self.lanes.submit(lambda: question(self.open_store()))
        while not future.done():
            self.cancellation.check()
            wait([future], timeout=POLL_SECONDS)
            meanwhile()
        return future.result()

    def ask_each(self, question: Callable[[Store, Item], T], items: Sequence[Item]) -> list[T]:
        """Return what `question` returns for each item, in order; several are asked at once.

        Raises:
            CancelledError: Cancellation was wished.
        """

        def ask_of(item: Item) -> T:
            return question(self.open_store(), item)

        asked = [self.lanes.submit(partial(ask_of, item)) for item in items]
        return [self.lanes.result(future, self.cancellation) for future in asked]
