"""What every transfer of a process shares: store, cache, index, ledger, cancellation, view."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import CacheUnsafeError, LocalError, PropmasterError
from agent_plugin.content.flight import POLL_SECONDS, Lanes
from agent_plugin.content.local_index import LocalIndex
from agent_plugin.content.retry import telling
from agent_plugin.content.store import Cancellation, Store
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.progress import SilentView, View
from agent_plugin.transfer.states import TaskStatus

Item = TypeVar("Item")
T = TypeVar("T")

log = events.get_logger()

# Sixteen threads were the fastest for blobs of 16 KiB here (docs/decisions/0001-data-plane.md).
CONCURRENCY: Final = 16
EXISTENCE_MAX_AGE_SECONDS: Final = 86_400


@dataclass(frozen=True, slots=True)
class Records:
    """How that is opened in which the host has something of a session, each by itself.

    Attributes:
        open_cache: The blob cache for jobs of a store, by its URL (empty when it is not known), or
            None when there is none to be used.
        open_index: Hash cache and existence cache.
        open_ledger: The transfer ledger.
    """

    open_cache: Callable[[str], BlobCache | None]
    open_index: Callable[[], LocalIndex]
    open_ledger: Callable[[], Ledger]


@dataclass(frozen=True, slots=True)
class TransferContext:
    """The services a transfer uses.

    Attributes:
        open_store: Opens the store at the first call and returns the same one ever after; called
            only when something has to be asked of it, because opening costs time.
        store_url: The store's URL, known without opening it.
        cache: The shared blob cache, or None when there is none to be used.
        index: Hash cache and existence cache.
        existence_max_age: For how many seconds a blob seen in the store is asked for before it
            would be sent.
        lanes: The threads that `ask` uses.
    """

    open_store: Callable[[], Store]
    store_url: str
    cache: BlobCache | None
    index: LocalIndex
    ledger: Ledger
    cancellation: Cancellation
    view: Callable[[str], View] = field(default=lambda _title: SilentView())
    concurrency: int = CONCURRENCY
    existence_max_age: int = EXISTENCE_MAX_AGE_SECONDS
    lanes: Lanes = field(default_factory=lambda: Lanes(CONCURRENCY))

    def leased(self, name: str, digests: Iterable[Digest]) -> AbstractContextManager[object]:
        """Keep blobs from eviction while the block runs, as far as the cache can be written.

        What is evicted nevertheless is fetched again.

        Raises:
            CacheUnsafeError: Others can write the cache.
        """
        if self.cache is None:
            return nullcontext()
        try:
            return self.cache.lease(name, digests)
        except CacheUnsafeError:
            raise
        except LocalError as error:
            log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
            return nullcontext()

    @property
    def remembers_store(self) -> bool:
        """Whether to remember what the store has; a look at a directory costs no more than that."""
        return self.store_url.startswith("s3:")

    def remember_present(self, digests: Sequence[Digest]) -> None:
        """Remember that the store has these blobs now, if it is one that is remembered."""
        if digests and self.remembers_store:
            self.index.remember_present(self.open_store().identity, digests)

    @contextmanager
    def attempt(self, task_id: int) -> Iterator[None]:
        """Note that a task is tried, and each request that the block sends again.

        For crew threads: nothing here waits for the disk.
        """
        self.ledger.note(task_id, TaskStatus.BOOTING)
        under_way = True

        def retried(error: PropmasterError, wait_seconds: float) -> None:
            # Threads that were left behind have no say in what became of the task.
            if under_way:
                self.ledger.note_retry(task_id, error, wait_seconds)

        try:
            with telling(retried):
                yield
        finally:
            under_way = False

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
