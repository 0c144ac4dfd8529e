"""Uploads: files whose digest is known become blobs of the store, only those it lacks.

The crew's threads read, hash what they send, and store; the calling thread keeps the ledger. A
file whose bytes turn out to be something else is not stored: its path is reported back, and the
caller hashes it again (`FileChangedError` after a few rounds is the caller's to raise).

What people want of it meanwhile is done at each beat (steering.py): a file that is excluded is not
sent, and the caller is told that it was not, since no manifest may name it. If it is being sent, a
large one ends at its next part, and a small one is not waited for.
"""

import os
import random
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
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
    UnsafePathError,
)
from agent_plugin.content.safe_path import NotRegularError, Root
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Progress, Store
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.engine import TICK_SECONDS, ByteBudget, Crew, Halts, Products
from agent_plugin.transfer.ledger import NOTES_AT_ONCE, TaskSpec, TransferRow, TransferSpec
from agent_plugin.transfer.ledger_news import TaskNews
from agent_plugin.transfer.progress import Meter
from agent_plugin.transfer.states import TaskStatus
from agent_plugin.transfer.steering import EndedByHandError, Steering
from agent_plugin.transfer.upload_memory import TaskUpload

log = events.get_logger()

LARGE_AT_ONCE = 2
# Users are promised an end within a second, and an upload in parts is to be aborted before that.
LARGE_STOP_SECONDS = 0.6
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
        excluded: Paths that people took out. The store may lack what they had.
    """

    bytes_uploaded: int = 0
    bytes_reused: int = 0
    blobs_uploaded: int = 0
    blobs_reused: int = 0
    changed: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class Tally:
    """What uploads of the same files have done, of which each goes on after some had changed.

    Attributes:
        bytes_uploaded, bytes_reused: Of distinct content; what one of them has sent is not reused
            by the next.
    """

    bytes_uploaded: int = 0
    bytes_reused: int = 0
    _there: set[Digest] = field(default_factory=set)

    def add(self, files: Mapping[Digest, Sequence[str]], done: UploadResult) -> None:
        """Take the result of one of them, which was given these files."""
        again = sum(digest.size for digest in files if digest in self._there)
        self.bytes_uploaded += done.bytes_uploaded
        self.bytes_reused += max(0, done.bytes_reused - again)
        if done.changed:
            open_ = {*done.changed, *done.excluded}
            self._there.update(digest for digest, paths in files.items() if open_.isdisjoint(paths))

    def reuse(self, digests: Iterable[Digest]) -> None:
        """Take what the store was seen to have."""
        new = {*digests} - self._there
        self.bytes_reused += sum(digest.size for digest in new)
        self._there |= new


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
        TransferAbortedError: A person aborted it.
        TransferStateError: Another process carries the same transfer out right now, or a person has
            set one of its files to failed.
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
            "excluded": len(result.excluded),
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
        self._halt = Cancellation()
        meter = Meter(
            sum(len(paths) for paths in files.values()),
            sum(digest.size * len(paths) for digest, paths in files.items()),
        )
        self._steering = Steering(context, row, self._halt, meter, self._take_news)
        self._tasks = self._steering.tasks
        self._budget = ByteBudget()
        self._halts: Halts[Digest] = Halts(self._halt)
        self._stored: Products[Digest, bool] = Products()
        self._small = Crew(self._store, self._stored, context.concurrency, self._halt)
        self._large = Crew(self._store, self._stored, LARGE_AT_ONCE, self._halt)
        # Blobs that the crew has been asked for, and those that the store has by now.
        self._ordered: set[Digest] = set()
        self._there: set[Digest] = set()
        # Small ones that are still being sent, and that nobody waits for.
        self._left: set[Digest] = set()
        # Those that are in the result.
        self._summed: set[Digest] = set()
        # Bytes of large blobs that were sent while the blob is not there yet.
        self._sent: dict[Digest, int] = {}
        self._present: list[Digest] = []
        self.result = UploadResult()

    def close(self) -> None:
        self._halt.cancel()
        self._halts.end_all()
        self._small.close()
        self._large.close()
        # They abort what they had begun to send.
        self._large.join(LARGE_STOP_SECONDS)
        self._remember()

    def run(self) -> None:
        """Store all that people want stored; what they call done is left as it is."""
        ended_by_hand = False
        try:
            self._store_wanted()
        except EndedByHandError:
            ended_by_hand = True
        if self._steering.sets_aside or ended_by_hand:
            changed = {*self.result.changed}
            self.result.excluded = [
                path
                for digest, paths in self._files.items()
                for path in paths
                if path not in changed and not self._is_stored(path, digest)
            ]

    def _store_wanted(self) -> None:
        # Here, so that no file is blamed for a store that can not be opened.
        self._context.ask(lambda _store: None)
        self._abort_left()
        if self._steering.sets_aside:
            for digest, paths in self._files.items():
                for path in paths:
                    self._steering.plan(self._tasks[path, digest.hex], digest.size)
        with self._context.view(self._row.kind) as self._steering.view:
            self._there = self._known()
            for digest in self._files:
                if digest not in self._there:
                    self._want(digest)
            self._settle_known(set(self._there))
            while self._ordered or self._steering.holds:
                self._tick()
                if not self._ordered:
                    # What was left may have been taken out at this moment.
                    if self._steering.holds:
                        self._steering.wait_for_held()
                    continue
                taken = self._stored.take(TICK_SECONDS)
                if taken is not None:
                    self._ordered.discard(taken[0])
                    self._left.discard(taken[0])
                    self._halts.over(taken[0])
                    self._take(*taken)
            self._remember()
            self._steering.finish()
        self._steering.refuse_given_up()

    def _abort_left(self) -> None:
        """Have the store drop the uploads of killed transfers that nobody goes on with."""
        ledger = self._context.ledger
        for task, name, size, upload_id in ledger.left_uploads(self._row.destination):
            digest = Digest(name, size)
            self._context.ask(partial(_abort, digest, upload_id))
            ledger.note_upload(task, "", ())

    def _is_stored(self, path: str, digest: Digest) -> bool:
        """Whether a manifest may name a file: it was stored, or set to done and is there."""
        task = self._tasks[path, digest.hex]
        if self._steering.is_settled(task):
            return True
        return digest in self._there and not self._steering.is_excluded(task)

    def _open(self, digest: Digest) -> list[str]:
        """Return the paths of a blob that are still to be stored, of those that people want."""
        return [
            path
            for path in self._files[digest]
            if self._steering.is_open(self._tasks[path, digest.hex])
        ]

    def _want(self, digest: Digest) -> None:
        """See that a blob is stored if a path needs it, as urgently as that is by now."""
        paths = self._open(digest)
        crew = self._small if digest.size <= WHOLE_BLOB_BYTES else self._large
        if digest in self._left:
            if paths:
                self._left.discard(digest)
                self._ordered.add(digest)
            return
        if digest in self._ordered:
            if not crew.withdraw(digest):
                if not paths:
                    self._let_go(digest)
                return
            self._ordered.discard(digest)
        if digest in self._there:
            self._settle(digest, stored=False)
        elif paths:
            self._ordered.add(digest)
            tasks = (self._tasks[path, digest.hex] for path in paths)
            crew.order(digest, self._steering.priority(tasks))

    def _let_go(self, digest: Digest) -> None:
        """Do without a blob that is being sent."""
        self._halts.end(digest)
        if digest.size <= WHOLE_BLOB_BYTES:
            # A request that was sent can not be ended.
            self._ordered.discard(digest)
            self._left.add(digest)

    def _take_news(self, tasks: Collection[TaskNews]) -> None:
        """Do what people want of some tasks: store them, or not, and sooner or later."""
        for digest in dict.fromkeys(Digest(task.destination, task.size) for task in tasks):
            if digest in self._files:
                self._want(digest)

    def _tick(self) -> None:
        """Stop or wait if that is wished, and say now and then how far it is."""
        if self._steering.beats_now:
            self._remember()
        self._steering.tick()

    def _settle_known(self, known: set[Digest]) -> None:
        """Note what is there already, in pieces, between which a wish to stop is noticed."""
        remaining = iter(known)
        while piece := list(islice(remaining, NOTES_AT_ONCE)):
            self._context.cancellation.check()
            for digest in piece:
                self._settle(digest, stored=False)
            if len(piece) == NOTES_AT_ONCE:
                self._remember()
                self._steering.beat()

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
                self._note_open(digest, TaskStatus.FAILED, failure)
                return failure
        return error

    def _store(self, digest: Digest) -> bool:
        """Store one blob, on a crew thread; True when it was sent."""
        path = next(iter(self._open(digest)), self._files[digest][0])
        task = self._tasks[path, digest.hex]
        with self._context.attempt(task), self._halts.heeding(digest) as halt:
            return self._send(digest, path, task, halt)

    def _send(self, digest: Digest, path: str, task: int, halt: Cancellation) -> bool:
        store = self._context.open_store()
        try:
            fd = self._root.open_file(path)
        except FileNotFoundError as error:
            raise FileChangedError(f"{path} vanished before it was uploaded") from error
        except (NotRegularError, UnsafePathError) as error:
            # It was a file below the root when it was hashed; whoever looks again finds what it is.
            raise FileChangedError(f"{error.message}, and was one before") from error
        try:
            if digest.size > WHOLE_BLOB_BYTES:
                told = self._told(digest, task)
                memory = TaskUpload(self._context.ledger, task)
                return store.put_file(digest, fd, cancellation=halt, progress=told, memory=memory)
            self._budget.acquire(digest.size, halt)
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
            self._steering.count(task, size)
            self._context.ledger.note_moved(task, size)

        return count

    def _take(self, digest: Digest, stored: bool | BaseException) -> None:
        if isinstance(stored, bool):
            self._present.append(digest)
            self._there.add(digest)
            self._settle(digest, stored=stored)
            return
        paths = self._open(digest)
        first = self._tasks[self._files[digest][0], digest.hex]
        self._steering.count(first, -self._sent.pop(digest, 0), moved=False)
        # It may have been ended since people took all of its paths out while it was sent.
        ended = isinstance(stored, CancelledError) and not self._halt.wished
        if not isinstance(stored, PropmasterError):
            raise stored
        if ended or (not paths and not isinstance(stored, CancelledError)):
            # They may want some again.
            self._want(digest)
            return
        if isinstance(stored, CancelledError):
            raise stored
        if isinstance(stored, FileChangedError):
            # Another path may still have the content; hashing all of them again tells.
            self.result.changed.extend(self._files[digest])
            self._note_open(digest, TaskStatus.EXCLUDED, stored)
            return
        failure = type(stored)(f"{paths[0]}: {stored.message}", hint=stored.hint)
        self._note_open(digest, TaskStatus.FAILED, failure)
        raise failure from stored

    def _settle(self, digest: Digest, *, stored: bool) -> None:
        """Note that a blob is there, for all paths that people want stored."""
        if digest in self._summed:
            # A path of it was held until now.
            pass
        elif stored:
            self.result.bytes_uploaded += digest.size
            self.result.blobs_uploaded += 1
        else:
            self.result.bytes_reused += digest.size
            self.result.blobs_reused += 1
        self._summed.add(digest)
        # One file's bytes were sent, maybe counted as they went; the others' are there by that.
        counted = self._sent.pop(digest, 0)
        for path in self._open(digest):
            task = self._tasks[path, digest.hex]
            self._steering.settle(task)
            self._steering.count(task, digest.size - counted, moved=stored, files=1)
            stored, counted = False, 0
        if counted:
            first = self._tasks[self._files[digest][0], digest.hex]
            self._steering.count(first, -counted, moved=False)

    def _note_open(self, digest: Digest, status: TaskStatus, error: PropmasterError) -> None:
        for path in self._open(digest):
            self._context.ledger.note(self._tasks[path, digest.hex], status, error)

    def _remember(self) -> None:
        present, self._present = self._present, []
        self._context.remember_present(present)


def _find_missing(digests: Sequence[Digest], store: Store) -> set[Digest]:
    return store.find_missing(digests)


def _abort(digest: Digest, upload_id: str, store: Store) -> None:
    store.abort_upload(digest, upload_id)


def _read(fd: int, limit: int) -> bytes:
    """Read at most `limit` bytes: one more than expected shows that a file has grown."""
    parts = []
    while limit > 0 and (part := os.read(fd, limit)):
        parts.append(part)
        limit -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
