"""What every transfer of a process shares: store, cache, index, ledger, cancellation, view."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import CacheUnsafeError, LocalError, PropmasterError
from agent_plugin.content.local_index import LocalIndex
from agent_plugin.content.objects import ObjectAccess
from agent_plugin.content.owner import Owner
from agent_plugin.content.retry import telling
from agent_plugin.transfer.asking import CONCURRENCY, Asking
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.progress import SilentView, View
from agent_plugin.transfer.states import TaskStatus

if TYPE_CHECKING:
    from agent_plugin.content.s3_objects import S3Objects

log = events.get_logger()

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferContext(Asking):
    """The services a transfer uses.

    Attributes:
        store_url: The store's URL, known without opening it.
        cache: The shared blob cache, or None when there is none to be used.
        index: Hash cache and existence cache.
        scope: For whom content is moved; what one has seen in a store proves nothing to another.
        existence_max_age: For how many seconds a blob seen in the store is asked for before it
            would be sent.
        owner: Whose the files below local roots are; None: this process's user's.
        open_objects: Opens what reaches plain objects, of any bucket, as an access says; the same
            one for the same access. Opening costs time.
        worker_id: Of this host, as its farm or its network knows it.
        expect: Told what several transfers are going to place together, before the first begins:
            files and bytes.
    """

    store_url: str
    cache: BlobCache | None
    index: LocalIndex
    ledger: Ledger
    open_objects: "Callable[[ObjectAccess], S3Objects]"
    worker_id: str
    view: Callable[[str], View] = field(default=lambda _title: SilentView())
    concurrency: int = CONCURRENCY
    existence_max_age: int = EXISTENCE_MAX_AGE_SECONDS
    scope: str = ""
    owner: Owner | None = None
    expect: Callable[[int, int], None] = field(default=lambda _files, _bytes: None)

    @contextmanager
    def leased(self, name: str, digests: Iterable[Digest]) -> Iterator[None]:
        """Keep blobs from eviction while the block runs, as far as the cache can be written.

        What is evicted nevertheless is fetched again.

        Raises:
            CacheUnsafeError: Others can write the cache.
        """
        lease = None
        if self.cache is not None:
            with _doing_without_cache():
                lease = self.cache.lease(name, digests)
        try:
            yield
        finally:
            if lease is not None:
                # If its file stays it holds nothing any more.
                with _doing_without_cache():
                    lease.close()

    @property
    def remembers_store(self) -> bool:
        """Whether to remember what the store has; a look at a directory costs no more than that."""
        return self.store_url.startswith("s3:")

    @property
    def remembered_as(self) -> str:
        """By what the store is remembered; the store is opened for it."""
        identity = self.open_store().identity
        return f"{identity} for {self.scope}" if self.scope else identity

    def remember_present(self, digests: Sequence[Digest]) -> None:
        """Remember that the store has these blobs now, if it is one that is remembered."""
        if digests and self.remembers_store:
            self.index.remember_present(self.remembered_as, digests)

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


@contextmanager
def _doing_without_cache() -> Iterator[None]:
    """Tell of a cache that fails, and go on; only an unsafe one is an error."""
    try:
        yield
    except CacheUnsafeError:
        raise
    except LocalError as error:
        log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
