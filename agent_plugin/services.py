"""Builds what a command needs to move bytes, from settings and a store URL.

Nothing here is opened before it is needed: a finish-task that uploads nothing never opens the
store, and so never loads an S3 client.
"""

import os
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent_plugin.content import events
from agent_plugin.content.bandwidth import Limit
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.errors import LocalError, LocalWriteError
from agent_plugin.content.local_index import LocalIndex
from agent_plugin.content.mount_spec import StoreLimits
from agent_plugin.content.objects import ObjectAccess
from agent_plugin.content.open_store import build_store
from agent_plugin.content.owner import Owner
from agent_plugin.content.store import Cancellation, Store
from agent_plugin.settings import Settings
from agent_plugin.transfer.asking import Asking
from agent_plugin.transfer.context import Records, TransferContext
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.progress import SilentView, View

if TYPE_CHECKING:
    from agent_plugin.content.s3_environment import Keys
    from agent_plugin.content.s3_objects import S3Objects
    from agent_plugin.transfer.copying import Copying

# What the worker agent of AWS Deadline Cloud tells its sessions; other hosts have their name.
_WORKER_ID: Final = "DEADLINE_WORKER_ID"

log = events.get_logger()


class LazyStore:
    """Opens the store at the first call, once; may be called from any thread."""

    def __init__(
        self,
        url: str,
        limits: StoreLimits,
        environment: Mapping[str, str],
        account_id: str | None,
        keys: "Keys | None" = None,
    ) -> None:
        self._url = url
        self._limits = limits
        self._environment = environment
        self._account_id = account_id
        self._keys = keys
        self._lock = threading.Lock()
        self._store: Store | None = None

    def __call__(self) -> Store:
        """Return the store, opened."""
        with self._lock:
            if self._store is None:
                limits = self._limits
                self._store = build_store(
                    self._url,
                    environment=self._environment,
                    policy=limits.retry_policy(),
                    account_id=self._account_id,
                    concurrency=limits.concurrency,
                    bandwidth=limits.bandwidth(),
                    keys=self._keys,
                )
            return self._store

    @property
    def account_id(self) -> str | None:
        """The account that must own the bucket: empty when unknown, None when not looked up."""
        with self._lock:
            if self._store is None:
                return self._account_id
            return getattr(self._store, "account_id", None)


class OpenObjects:
    """Opens what reaches plain objects, once for each access; may be called from any thread."""

    def __init__(self, limits: StoreLimits, environment: Mapping[str, str]) -> None:
        self._limits = limits
        self._environment = environment
        self._lock = threading.Lock()
        self._opened: dict[ObjectAccess, S3Objects] = {}

    def __call__(self, access: ObjectAccess) -> "S3Objects":
        """Return it, opened."""
        # Imported here because it brings the libraries for S3.
        from agent_plugin.content.s3_objects import open_objects  # noqa: PLC0415

        with self._lock:
            if access not in self._opened:
                self._opened[access] = open_objects(
                    access, environment=self._environment, policy=self._limits.retry_policy()
                )
            return self._opened[access]


def store_limits(settings: Settings, queue_id: str = "") -> StoreLimits:
    """Return how the store is talked to for a queue's jobs, by commands and mounts alike."""
    store = settings.for_queue(queue_id).store
    return StoreLimits(
        concurrency=store.concurrency,
        attempts=store.attempts,
        deadline_seconds=store.deadline_seconds,
        connect_timeout=store.connect_timeout,
        read_timeout=store.read_timeout,
        least_bytes_per_second=store.least_bytes_per_second,
        download=_limit(settings, queue_id, "download", store.download_limit.bytes),
        upload=_limit(settings, queue_id, "upload", store.upload_limit.bytes),
    )


def _limit(
    settings: Settings, queue_id: str, direction: str, bytes_per_second: int
) -> Limit | None:
    """Return a limit that holds for all for whom it was set together.

    That is a queue with a limit of its own, or all without one.
    """
    if not bytes_per_second:
        return None
    is_own = settings.is_own(queue_id, f"store.{direction}_limit")
    name = f"{direction}-{queue_id}" if is_own else direction
    account = settings.paths.state_dir / "limits" / name
    return Limit(bytes_per_second, os.fspath(account))


def state_directory(settings: Settings) -> Path:
    """Return the directory of ledger, index and session states, private to this user.

    Raises:
        LocalWriteError: It can not be made, or others could write to it.
    """
    directory = settings.paths.state_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise LocalWriteError(
            f"{directory}: {error.strerror}",
            hint="set [paths] state_dir, or PROPMASTER_STATE_DIR, to a directory you own",
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise LocalWriteError(
            f"{directory} is not private: others could change what sessions rely on",
            hint=f"make it yours and closed to others: chown and chmod 700 {directory}",
        )
    return directory


def scope_of(settings: Settings, queue_id: str, user_id: int | None) -> str:
    """Return for whom content is moved: what one has fetched or seen is nothing to another.

    By the job's user as well: a job can claim to be of another queue, and not to be another user.

    Args:
        settings: The queue's.
        queue_id: The queue; empty for what is done for none.
        user_id: Whose the files are; None for this process's user.
    """
    if settings.cache.shared_between_queues:
        return ""
    return f"{queue_id or 'no queue'}, user {os.geteuid() if user_id is None else user_id}"


def open_cache(
    settings: Settings, store_url: str, *, queue_id: str = "", user_id: int | None = None
) -> BlobCache | None:
    """Open the shared blob cache; None, with a warning, when this host can not have one.

    Args:
        settings: The host's.
        store_url: Where blobs come from.
        queue_id: For which queue's jobs; empty for none.
        user_id: For which job user; None for this process's user.

    Raises:
        CacheUnsafeError: Others could write to it. That is for the operator to mend.
    """
    settings = settings.for_queue(queue_id)
    try:
        return BlobCache.open(
            settings.paths.cache_dir,
            store_url=store_url,
            max_bytes=settings.cache.max_bytes_on(settings.paths.cache_dir),
            min_free_bytes=settings.cache.min_free_bytes_on(settings.paths.cache_dir),
            shared=settings.cache.shared_between_stores,
            scope=scope_of(settings, queue_id, user_id),
        )
    except LocalError as error:
        if error.code == "E_CACHE_UNSAFE":
            raise
        log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
        return None


def ask_store(
    settings: Settings,
    store_url: str,
    *,
    cancellation: Cancellation,
    queue_id: str = "",
    environment: Mapping[str, str] = os.environ,
    keys: "Keys | None" = None,
) -> Asking:
    """Return what asks a store, for a command that needs nothing else of this host.

    Args:
        settings: The host's settings.
        store_url: The store.
        cancellation: Ends the wait for an answer.
        queue_id: Whose settings hold; empty for none.
        environment: Where credentials and endpoints come from.
        keys: As build_store has them.
    """
    open_store = LazyStore(store_url, store_limits(settings, queue_id), environment, None, keys)
    return Asking(open_store=open_store, cancellation=cancellation)


@contextmanager
def open_services(
    settings: Settings,
    store_url: str,
    *,
    cancellation: Cancellation,
    queue_id: str = "",
    user_id: int | None = None,
    account_id: str | None = None,
    quiet: bool = False,
    existence_max_age: int | None = None,
    environment: Mapping[str, str] = os.environ,
    keys: "Keys | None" = None,
    owner: Owner | None = None,
    view: Callable[[str], View] | None = None,
    expect: Callable[[int, int], None] = lambda _files, _bytes: None,
) -> Iterator[TransferContext]:
    """Open ledger, index and cache, and close them afterwards.

    Args:
        settings: The host's settings.
        store_url: Of the job's store.
        cancellation: Checked by every transfer.
        queue_id: Whose settings hold, and for whose jobs content is moved; empty for none.
        user_id: For which job user; None for this process's user.
        account_id: Of the bucket's owner when known; empty when known to be unknown.
        quiet: Show no progress.
        owner: Whose the files below local roots are; None: this process's user's.
        view: Shows progress instead of what suits stderr.
        expect: As TransferContext has it.
        existence_max_age: Overrides the setting, in seconds; 0 asks the store for every blob.
        environment: Where credentials and endpoints come from.
        keys: As build_store has them.
    """
    records = open_records(settings, queue_id=queue_id, user_id=user_id)
    limits = store_limits(settings, queue_id)
    settings = settings.for_queue(queue_id)
    with ExitStack() as stack:
        cache = records.open_cache(store_url)
        if cache is not None:
            stack.callback(_close, cache)
        index = records.open_index()
        stack.callback(index.close)
        ledger = stack.enter_context(records.open_ledger())
        yield TransferContext(
            open_store=LazyStore(store_url, limits, environment, account_id, keys),
            store_url=store_url,
            cache=cache,
            index=index,
            ledger=ledger,
            open_objects=OpenObjects(limits, environment),
            worker_id=environment.get(_WORKER_ID) or socket.gethostname(),
            cancellation=cancellation,
            view=view or (_silent if quiet else _view),
            concurrency=settings.store.concurrency,
            existence_max_age=(
                settings.store.existence_max_age if existence_max_age is None else existence_max_age
            ),
            scope=scope_of(settings, queue_id, user_id),
            owner=owner,
            expect=expect,
        )


def _close(cache: BlobCache) -> None:
    """Close the cache after use; what it could not count is nobody's failure."""
    try:
        cache.close()
    except LocalError as error:
        log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})


def open_records(settings: Settings, *, queue_id: str = "", user_id: int | None = None) -> Records:
    """Return how cache, index and ledger of this host are opened, each by itself.

    Args:
        settings: The host's.
        queue_id: Whose cache; empty for none.
        user_id: For which job user; None for this process's user.

    Raises:
        LocalWriteError: The state directory can not be made, or others could write to it.
    """
    directory = state_directory(settings)
    return Records(
        open_cache=lambda store_url: open_cache(
            settings, store_url, queue_id=queue_id, user_id=user_id
        ),
        open_index=lambda: LocalIndex.open(directory / "index.db"),
        open_ledger=lambda: Ledger.open(directory / "ledger.db"),
    )


def open_copying(
    settings: Settings,
    ledger: Ledger,
    *,
    cancellation: Cancellation,
    only: Collection[int] | None = None,
    told: Callable[[int], None] = lambda _bytes: None,
    environment: Mapping[str, str] = os.environ,
) -> "Copying":
    """Return the engine that carries out the copying transfers of this host: its `run`.

    Args:
        settings: The host's.
        ledger: Where the transfers are.
        cancellation: Ends the run; what is not done waits for the next.
        only: The transfers that are meant; None for all that wait.
        told: Told now and then how many bytes have moved since.
        environment: Where credentials and endpoints come from.
    """
    # Imported here because the hooks need neither.
    from agent_plugin.content.s3_objects import open_objects  # noqa: PLC0415 - see above
    from agent_plugin.transfer.copying import Copying, request_policy  # noqa: PLC0415 - see above

    limits = store_limits(settings)
    policy = request_policy(limits.retry_policy())
    return Copying(
        ledger,
        open_objects=lambda access, bandwidth: open_objects(
            access, environment=environment, policy=policy, bandwidth=bandwidth
        ),
        cancellation=cancellation,
        bandwidth=limits.bandwidth(),
        account=lambda transfer: os.fspath(
            settings.paths.state_dir / "limits" / f"transfer-{transfer}"
        ),
        concurrency=settings.store.concurrency,
        only=only,
        told=told,
    )


def _silent(_title: str) -> View:
    return SilentView()


def _view(title: str) -> View:
    from agent_plugin.transfer.progress import view_for  # noqa: PLC0415 - decides by the terminal

    return view_for(title)
