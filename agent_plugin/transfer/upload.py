"""Uploads: files whose digest is known become blobs of the store, only those it lacks.

The crew's threads read, hash what they send, and store; the calling thread keeps the ledger. A
file whose bytes turn out to be something else is not stored: its path is reported back, and the
caller hashes it again (`FileChangedError` after a few rounds is the caller's to raise).
"""

import os
import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    CancelledError,
    FileChangedError,
    LocalReadError,
    PropmasterError,
    StoreError,
)
from agent_plugin.content.safe_path import Root
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Progress, Store
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.engine import TICK_SECONDS, ByteBudget, Crew, Products
from agent_plugin.transfer.ledger import NOTES_AT_ONCE, TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.progress import Meter, SilentView, View
from agent_plugin.transfer.states import TaskStatus

log = events.get_logger()

LARGE_AT_ONCE = 2
BEAT_SECONDS = 0.5
# What the store is remembered to have is asked for before a manifest names it: 4,000 a second were
# measured. A large submission takes for granted what was seen within an hour, if a sample of it is
# there: who submits again has the files still (docs/decisions/0005-upload-without-asking.md).
ASKED_ALWAYS = 1000
GRANTED_SECONDS = 3600
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
        context.cancellation,
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
        self._meter = Meter(
            sum(len(paths) for paths in files.values()),
            sum(digest.size * len(paths) for digest, paths in files.items()),
        )
        # Tasks that were done when a killed run had begun are in the ledger's count already.
        self._left = context.ledger.left(row.id)
        self._counting = threading.Lock()
        self._moved = 0
        self._found = 0
        # Bytes of large blobs that were sent while the blob is not there yet.
        self._sent: dict[Digest, int] = {}
        self._next_beat = 0.0
        self._view: View = SilentView()
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
        with self._context.view(self._row.kind) as self._view:
            known = self._known()
            outstanding = 0
            for digest in self._files:
                if digest not in known:
                    crew = self._small if digest.size <= WHOLE_BLOB_BYTES else self._large
                    crew.order(digest)
                    outstanding += 1
            self._settle_known(known)
            while outstanding:
                self._context.cancellation.check()
                taken = self._stored.take(TICK_SECONDS)
                if taken is not None:
                    outstanding -= 1
                    self._take(*taken)
                self._tick()

    def _tick(self) -> None:
        """Beat, when it is time for it."""
        if time.monotonic() >= self._next_beat:
            self._beat()

    def _beat(self) -> None:
        self._next_beat = time.monotonic() + BEAT_SECONDS
        with self._counting:
            moved, self._moved = self._moved, 0
            found, self._found = self._found, 0
        self._context.ledger.beat(self._row.id, moved, found)
        self._remember()
        self._view.show(self._meter.snapshot())

    def _settle_known(self, known: set[Digest]) -> None:
        """Note what is there already, in pieces, between which a wish to stop is noticed."""
        remaining = iter(known)
        while piece := list(islice(remaining, NOTES_AT_ONCE)):
            self._context.cancellation.check()
            for digest in piece:
                self._settle(digest, stored=False)
            if len(piece) == NOTES_AT_ONCE:
                self._beat()

    def _known(self) -> set[Digest]:
        """Return what the store has of what this host remembers to have seen there.

        Somebody may delete from the store, a lifecycle rule for one; then nothing is taken for
        granted any more.
        """
        if not self._context.remembers_store:
            return set()
        index, identity = self._context.index, self._context.remembered_as
        known = index.known(identity, self._files, self._context.existence_max_age)
        asked = known - self._granted(known)
        missing = self._missing(asked)
        if missing:
            index.forget_store(identity)
            missing |= self._missing(known - asked)
            asked = known
        self._present.extend(asked - missing)
        return known - missing

    def _granted(self, known: set[Digest]) -> set[Digest]:
        if self._row.kind != "submit" or len(known) <= ASKED_ALWAYS:
            return set()
        recent = self._context.index.known(
            self._context.remembered_as,
            known,
            min(GRANTED_SECONDS, self._context.existence_max_age),
        )
        chance = random.Random()  # noqa: S311 - a sample is no secret
        return recent - set(chance.sample(sorted(recent), min(len(recent), SAMPLED)))

    def _missing(self, digests: Iterable[Digest]) -> set[Digest]:
        missing: set[Digest] = set()
        remaining = iter(digests)
        while batch := list(islice(remaining, ASKED_ALWAYS)):
            try:
                missing |= self._context.ask(partial(_find_missing, batch), self._tick)
            except StoreError as error:
                raise self._blamed(error, batch) from error
        return missing

    def _blamed(self, error: StoreError, asked: Sequence[Digest]) -> StoreError:
        """Return the error with the name of a file, if it is about one of these blobs."""
        for digest in asked:
            if digest.hex in error.message:
                failure = type(error)(f"{self._files[digest][0]}: {error.message}", hint=error.hint)
                self._note(digest, TaskStatus.FAILED, failure)
                return failure
        return error

    def _store(self, digest: Digest) -> bool:
        """Store one blob, on a crew thread; True when it was sent."""
        path = self._files[digest][0]
        task = self._tasks[path, digest.hex]
        with self._context.attempt(task):
            return self._send(digest, path, task)

    def _send(self, digest: Digest, path: str, task: int) -> bool:
        store = self._context.open_store()
        try:
            fd = self._root.open_file(path)
        except FileNotFoundError as error:
            raise FileChangedError(f"{path} vanished before it was uploaded") from error
        try:
            if digest.size > WHOLE_BLOB_BYTES:
                told = self._told(digest, task)
                return store.put_file(digest, fd, cancellation=self._halt, progress=told)
            self._budget.acquire(digest.size, self._halt)
            try:
                self._context.ledger.note(task, TaskStatus.EXECUTING)
                return store.put(digest, _read(fd, digest.size + 1))
            finally:
                self._budget.release(digest.size)
        except OSError as error:
            raise LocalReadError(f"{path}: {error.strerror}") from error
        finally:
            os.close(fd)

    def _told(self, digest: Digest, task: int) -> Progress:
        """Return what counts the bytes of a large blob as they go, those of its first file."""

        def count(size: int) -> None:
            if digest not in self._sent:
                self._context.ledger.note(task, TaskStatus.EXECUTING)
            # The last one counts when the blob is there.
            size = min(size, digest.size - 1 - self._sent.get(digest, 0))
            self._sent[digest] = self._sent.get(digest, 0) + size
            self._count(task, size, sent=True)

        return count

    def _take(self, digest: Digest, stored: bool | BaseException) -> None:
        if isinstance(stored, bool):
            self._present.append(digest)
            self._settle(digest, stored=stored)
            return
        path = self._files[digest][0]
        if isinstance(stored, FileChangedError):
            # Another path may still have the content; hashing all of them again tells.
            self.result.changed.extend(self._files[digest])
            first = self._tasks[path, digest.hex]
            self._count(first, -self._sent.pop(digest, 0), sent=False)
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
        else:
            self.result.bytes_reused += digest.size
            self.result.blobs_reused += 1
        # One file's bytes were sent, maybe counted as they went; the others' are there by that.
        counted = self._sent.pop(digest, 0)
        for path in self._files[digest]:
            self._count(self._tasks[path, digest.hex], digest.size - counted, sent=stored, files=1)
            stored, counted = False, 0
        self._note(digest, TaskStatus.DONE)

    def _count(self, task: int, size: int, *, sent: bool, files: int = 0) -> None:
        """Count bytes of a file that are in the store now; crew threads call this as well."""
        self._meter.advance(size, files=files)
        if task in self._left:
            with self._counting:
                if sent:
                    self._moved += size
                else:
                    self._found += size

    def _note(
        self, digest: Digest, status: TaskStatus, error: PropmasterError | None = None
    ) -> None:
        for path in self._files[digest]:
            self._context.ledger.note(self._tasks[path, digest.hex], status, error)

    def _remember(self) -> None:
        present, self._present = self._present, []
        self._context.remember_present(present)


def _find_missing(digests: Sequence[Digest], store: Store) -> set[Digest]:
    return store.find_missing(digests)


def _read(fd: int, limit: int) -> bytes:
    """Read at most `limit` bytes: one more than expected shows that a file has grown."""
    parts = []
    while limit > 0 and (part := os.read(fd, limit)):
        parts.append(part)
        limit -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
