"""Uploads: files whose digest is known become blobs of the store, only those it lacks.

The crew's threads read, hash what they send, and store; the calling thread keeps the ledger. A
file whose bytes turn out to be something else is not stored: its path is reported back, and the
caller hashes it again (`FileChangedError` after a few rounds is the caller's to raise).
"""

import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    CancelledError,
    FileChangedError,
    LocalReadError,
    PropmasterError,
)
from agent_plugin.content.safe_path import Root
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.engine import TICK_SECONDS, ByteBudget, Crew, Products
from agent_plugin.transfer.ledger import TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.progress import Meter
from agent_plugin.transfer.states import TaskStatus

log = events.get_logger()

LARGE_AT_ONCE = 2
BEAT_SECONDS = 0.5
# Of the blobs that the store is remembered to have, so many are asked for. They are few requests,
# at once, and find a store that lost a tenth of its blobs in four of five cases.
SAMPLED = 16


@dataclass(slots=True)
class UploadResult:
    """What an upload did; sizes in bytes of distinct content.

    Attributes:
        bytes_uploaded: Sent, because the store lacked them.
        bytes_reused: There already.
        changed: Paths whose bytes were not what they had been hashed to; nothing was stored for
            them.
    """

    bytes_uploaded: int = 0
    bytes_reused: int = 0
    blobs_uploaded: int = 0
    blobs_reused: int = 0
    changed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def upload(
    root: Root,
    files: Mapping[Digest, Sequence[str]],
    context: TransferContext,
    spec: TransferSpec,
) -> UploadResult:
    """Store the files' content.

    Args:
        root: Below which the paths are.
        files: For each digest the paths that had it when they were hashed, at least one.
        context: The services.
        spec: The transfer, for the ledger.

    Raises:
        StoreAccessError, StoreUnavailableError, StoreProtocolError: Naming a file.
        LocalReadError, UnsafePathError: A file can not be read.
        CancelledError: On request.
    """
    started = time.monotonic()
    row = context.ledger.begin(
        spec,
        [
            TaskSpec(path, digest.hex, digest.size)
            for digest, paths in files.items()
            for path in paths
        ],
    )
    error: PropmasterError | None = None
    running = _Upload(root, files, context, row)
    try:
        running.run()
    except PropmasterError as failure:
        error = failure
        raise
    except BaseException:
        error = CancelledError("interrupted")
        raise
    finally:
        running.close()
        context.ledger.finish(row.id, error)
    result = running.result
    result.seconds = time.monotonic() - started
    log.info(
        events.TRANSFER_COMPLETED,
        extra={
            "transfer": row.id,
            "kind": spec.kind,
            "files": sum(len(paths) for paths in files.values()),
            "bytes_uploaded": result.bytes_uploaded,
            "bytes_reused": result.bytes_reused,
            "seconds": round(result.seconds, 3),
        },
    )
    return result


class _Upload:
    def __init__(
        self,
        root: Root,
        files: Mapping[Digest, Sequence[str]],
        context: TransferContext,
        row: TransferRow,
    ) -> None:
        self._root = root
        self._files = files
        self._context = context
        self._row = row
        self._tasks = context.ledger.task_ids(row.id)
        self._halt = Cancellation()
        self._budget = ByteBudget()
        self._stored: Products[Digest, bool] = Products()
        self._small = Crew(self._store, self._stored, context.concurrency, self._halt)
        self._large = Crew(self._store, self._stored, LARGE_AT_ONCE, self._halt)
        self._meter = Meter(len(files), sum(digest.size for digest in files))
        self._moved = 0
        self._present: list[Digest] = []
        self.result = UploadResult()

    def close(self) -> None:
        self._halt.cancel()
        self._small.close()
        self._large.close()
        self._remember()

    def run(self) -> None:
        # Here, so that no file is blamed for a store that can not be opened.
        self._context.ask(lambda _store: None)
        known = self._known()
        outstanding = 0
        for digest in self._files:
            if digest in known:
                self._settle(digest, stored=False)
                continue
            crew = self._small if digest.size <= WHOLE_BLOB_BYTES else self._large
            crew.order(digest)
            outstanding += 1
        next_beat = 0.0
        with self._context.view(self._row.kind) as view:
            while outstanding:
                self._context.cancellation.check()
                taken = self._stored.take(TICK_SECONDS)
                if taken is not None:
                    outstanding -= 1
                    self._take(*taken)
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + BEAT_SECONDS
                    moved, self._moved = self._moved, 0
                    self._context.ledger.beat(self._row.id, moved)
                    self._remember()
                    view.show(self._meter.snapshot())

    def _known(self) -> set[Digest]:
        """Return what the store has by this host's memory, if a sample of it still is there.

        Somebody may have emptied the store, or a lifecycle rule; then nothing is believed of it.
        """
        if not self._context.remembers_store:
            return set()
        store = self._context.open_store()
        known = self._context.index.known(
            store.identity, self._files, self._context.existence_max_age
        )
        sample = random.sample(sorted(known), min(len(known), SAMPLED))
        if self._context.ask(lambda store: store.find_missing(sample)):
            self._context.index.forget_store(store.identity)
            return set()
        return known

    def _store(self, digest: Digest) -> bool:
        """Store one blob, on a crew thread; True when it was sent."""
        path = self._files[digest][0]
        store = self._context.open_store()
        try:
            fd = self._root.open_file(path)
        except FileNotFoundError as error:
            raise FileChangedError(f"{path} vanished before it was uploaded") from error
        try:
            if digest.size > WHOLE_BLOB_BYTES:
                return store.put_file(digest, fd, cancellation=self._halt)
            self._budget.acquire(digest.size, self._halt)
            try:
                return store.put(digest, _read(fd, digest.size + 1))
            finally:
                self._budget.release(digest.size)
        except OSError as error:
            raise LocalReadError(f"{path}: {error.strerror}") from error
        finally:
            os.close(fd)

    def _take(self, digest: Digest, stored: bool | BaseException) -> None:
        if isinstance(stored, bool):
            self._present.append(digest)
            self._settle(digest, stored=stored)
            return
        path = self._files[digest][0]
        if isinstance(stored, FileChangedError):
            # Another path may still have the content; hashing all of them again tells.
            self.result.changed.extend(self._files[digest])
            self._note(digest, TaskStatus.EXCLUDED, stored)
            return
        if isinstance(stored, CancelledError) or not isinstance(stored, PropmasterError):
            raise stored
        failure = type(stored)(f"{path}: {stored.message}", hint=stored.hint)
        self._note(digest, TaskStatus.FAILED, failure)
        raise failure from stored

    def _settle(self, digest: Digest, *, stored: bool) -> None:
        if stored:
            self.result.bytes_uploaded += digest.size
            self.result.blobs_uploaded += 1
            self._moved += digest.size
        else:
            self.result.bytes_reused += digest.size
            self.result.blobs_reused += 1
        self._meter.advance(digest.size, files=1)
        self._note(digest, TaskStatus.DONE)

    def _note(
        self, digest: Digest, status: TaskStatus, error: PropmasterError | None = None
    ) -> None:
        for path in self._files[digest]:
            self._context.ledger.note(self._tasks[path, digest.hex], status, error)

    def _remember(self) -> None:
        present, self._present = self._present, []
        self._context.remember_present(present)


def _read(fd: int, limit: int) -> bytes:
    """Read at most `limit` bytes: one more than expected shows that a file has grown."""
    parts = []
    while limit > 0 and (part := os.read(fd, limit)):
        parts.append(part)
        limit -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
