"""What a sync of outputs has brought already: a journal, one JSON document a line.

The first line says what is synced; every further line is one job's step forward, written and
flushed to the disk when all that it tells of is in place, and on its disk. So a sync may be killed
at any moment, and the power be cut: what the next one finds is true, and a line that was not
finished is the last and counts for nothing. At the end of a sync the journal is written anew,
without what the store no longer has.

A manifest is remembered by a hash of its key and its time, and not by a time alone: clocks, the
order in which a store shows new objects, and objects that are copied later do not matter then.

The file is 0600, and is replaced whole by rename. Beside it is a lock that the one sync holds.
"""

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from agent_plugin.content.disk_sync import sync_names
from agent_plugin.content.errors import TransferStateError, local_write_error
from agent_plugin.content.parts import write_all
from agent_plugin.content.store import DocumentInfo

VERSION: Final = 1

_LOCK_SUFFIX: Final = ".lock"
_NEW_SUFFIX: Final = ".new"


class Header(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The first line.

    Attributes:
        version: Of the format.
        store_url: What was synced.
        farm_id, queue_id: Of the queue.
        scope: By which rules paths are mapped; `own` when roots are at their own paths.
        since: Older manifests are not wanted unless their job is named; seconds since the epoch.
    """

    version: int
    store_url: str
    farm_id: str
    queue_id: str
    scope: str
    since: float


class Advance(
    msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True
):
    """One job's line.

    Attributes:
        job_id: The job.
        taken: Marks of manifests whose files are in place, or are not wanted.
        failed: Marks of manifests whose files could not be brought.
        tries: How often that was tried.
        unplaced: Marks of taken ones of which a file had no place on this host.
        rules: The mark of the rules by which it had none; empty: there were no rules.
        profile: The storage profile of whoever submitted the job; None if nobody asked.
    """

    job_id: str
    taken: list[str] = []
    failed: list[str] = []
    tries: int = 0
    unplaced: list[str] = []
    rules: str = ""
    profile: str | None = None


def mark_of(info: DocumentInfo) -> str:
    """Return by what a manifest is remembered: one that was written anew has another mark."""
    moment = round(info.last_modified * 1_000_000)
    return xxhash.xxh3_64_hexdigest(os.fsencode(f"{info.key}\n{moment}"))


class Checkpoint:
    """What was brought, by job; made by `open_checkpoint`, which holds the lock.

    Attributes:
        header: What is synced.
        is_new: There was no checkpoint: this is the first sync, or a new beginning was wished.
    """

    def __init__(self, path: Path, header: Header, *, is_new: bool) -> None:
        self.header = header
        self.is_new = is_new
        self._path = path
        self._taken: dict[str, set[str]] = {}
        self._tries: dict[str, dict[str, int]] = {}
        self._unplaced: dict[str, dict[str, str]] = {}
        self._profiles: dict[str, str] = {}

    def has(self, job_id: str, mark: str) -> bool:
        """Whether a manifest's files were brought."""
        return mark in self._taken.get(job_id, ())

    def tries(self, job_id: str, mark: str) -> int:
        """Return in how many syncs a manifest's files could not be brought."""
        return self._tries.get(job_id, {}).get(mark, 0)

    def unplaced(self, job_id: str) -> dict[str, str]:
        """Return the manifests of which a file had no place, with the mark of the rules then."""
        return self._unplaced.get(job_id, {})

    def profile(self, job_id: str) -> str | None:
        """Return the storage profile of whoever submitted a job, as far as it is known."""
        return self._profiles.get(job_id)

    def advance(self, step: Advance) -> None:
        """Remember a step forward; on return it is on the disk.

        Raises:
            NoSpaceError, LocalWriteError: It can not be written; what was remembered stays.
        """
        data = msgspec.json.encode(step) + b"\n"
        try:
            fd = _open(self._path, os.O_WRONLY)
            try:
                size = os.fstat(fd).st_size
                try:
                    write_all(fd, memoryview(data), size)
                    os.fsync(fd)
                except OSError:
                    # Half a line would be damage as soon as another one follows.
                    os.ftruncate(fd, size)
                    raise
            finally:
                os.close(fd)
        except OSError as error:
            raise local_write_error(error, os.fspath(self._path)) from error
        self.apply(step)

    def apply(self, step: Advance) -> None:
        """Take a step that is on the disk."""
        self._taken.setdefault(step.job_id, set()).update(step.taken)
        tries = self._tries.setdefault(step.job_id, {})
        unplaced = self._unplaced.setdefault(step.job_id, {})
        for mark in step.taken:
            tries.pop(mark, None)
            unplaced.pop(mark, None)
        tries.update(dict.fromkeys(step.failed, step.tries))
        unplaced.update(dict.fromkeys(step.unplaced, step.rules))
        if step.profile is not None:
            self._profiles[step.job_id] = step.profile

    def compact(self, listed: dict[str, set[str]], *, whole: bool) -> None:
        """Write the journal anew, without manifests that the store has no longer.

        Args:
            listed: The marks of all manifests that a listing has shown, by job.
            whole: Whether all jobs were listed; if not, the others stay as they are.

        Raises:
            NoSpaceError, LocalWriteError: It can not be written; the journal stays.
        """
        for job_id in [*self._taken]:
            if not whole and job_id not in listed:
                continue
            marks = listed.get(job_id, set())
            self._taken[job_id] &= marks
            tries, unplaced = self._tries[job_id], self._unplaced[job_id]
            self._tries[job_id] = {mark: tries[mark] for mark in tries.keys() & marks}
            self._unplaced[job_id] = {mark: unplaced[mark] for mark in unplaced.keys() & marks}
        self.write()

    def write(self) -> None:
        """Write the whole journal, replacing what is there.

        Raises:
            NoSpaceError, LocalWriteError: It can not be written; what is there stays.
        """
        temporary = self._path.with_name(self._path.name + _NEW_SUFFIX)
        try:
            # What a killed sync has left, or something that can not be written to.
            temporary.unlink(missing_ok=True)
            fd = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with os.fdopen(fd, "wb") as file:
                for document in (self.header, *self._lines()):
                    file.write(_encoded(document) + b"\n")
                file.flush()
                os.fsync(fd)
            temporary.replace(self._path)
            sync_names(self._path.parent)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise local_write_error(error, os.fspath(self._path)) from error

    def _lines(self) -> Iterator[Advance]:
        for job_id in sorted(self._taken):
            tries, unplaced = self._tries[job_id], self._unplaced[job_id]
            if taken := self._taken[job_id]:
                yield Advance(job_id, sorted(taken))
            for number in sorted(set(tries.values())):
                failed = sorted(mark for mark, tried in tries.items() if tried == number)
                yield Advance(job_id, failed=failed, tries=number)
            profile = self._profiles.get(job_id)
            for rules in sorted(set(unplaced.values())):
                marks = sorted(mark for mark, by in unplaced.items() if by == rules)
                yield Advance(job_id, unplaced=marks, rules=rules, profile=profile)


@contextmanager
def open_checkpoint(path: Path, header: Header, *, anew: bool, keep: bool) -> Iterator[Checkpoint]:
    """Lock a checkpoint for one sync, and read it; a missing one is begun.

    Args:
        path: The file; its directory is made when missing.
        header: What is to be synced; its `since` counts only for a new beginning.
        anew: Forget what was brought.
        keep: Lock and write nothing: for a look at what a sync would do.

    Raises:
        TransferStateError: Another sync has the lock; or the file is damaged, of another version
            or of something else than is to be synced.
        NoSpaceError, LocalWriteError: It can not be written.
    """
    if keep:
        found = None if anew else _read(path, header)
        yield found or Checkpoint(path, header, is_new=True)
        return
    lock = _locked(path)
    try:
        found = None if anew else _read(path, header)
        checkpoint = found or Checkpoint(path, header, is_new=True)
        # Anew each time: a line that a kill has cut short must not be appended to.
        checkpoint.write()
        yield checkpoint
    finally:
        os.close(lock)


def _locked(path: Path) -> int:
    lock = path.with_name(path.name + _LOCK_SUFFIX)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = _open(lock, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise local_write_error(error, os.fspath(lock)) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise TransferStateError(
            f"another sync works with {path} right now",
            hint="wait until it has finished, or use another --checkpoint-dir",
        ) from error
    except OSError as error:
        os.close(fd)
        raise local_write_error(error, os.fspath(lock)) from error
    return fd


def _open(path: Path, flags: int) -> int:
    """Open a regular file and nothing else: a pipe in its place would be waited for."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return fd


def _read(path: Path, wanted: Header) -> Checkpoint | None:
    try:
        with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    # What follows the last line's end was being written when the sync was killed.
    lines = lines[:-1]
    if not lines:
        raise _damaged(path, "it has no first line")
    checkpoint = Checkpoint(path, _header(path, lines[0], wanted), is_new=False)
    for number, line in enumerate(lines[1:], start=2):
        try:
            checkpoint.apply(msgspec.json.decode(line, type=Advance))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _damaged(path, f"line {number}: {error}") from error
    return checkpoint


def _header(path: Path, line: bytes, wanted: Header) -> Header:
    try:
        document = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, f"line 1: {error}") from error
    version = document.get("version") if isinstance(document, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise TransferStateError(
            f"{path} is of version {version}, this program writes {VERSION}",
            hint="use the propmaster that wrote it, or begin anew with --force-bootstrap",
        )
    try:
        found = msgspec.convert(document, Header)
    except msgspec.ValidationError as error:
        raise _damaged(path, f"line 1: {error}") from error
    for field in ("store_url", "farm_id", "queue_id", "scope"):
        was, is_now = getattr(found, field), getattr(wanted, field)
        if was != is_now:
            raise TransferStateError(
                f"{path} is of a sync with {field.replace('_', ' ')} {was!r}, not {is_now!r}",
                hint="use another --checkpoint-dir, or begin anew with --force-bootstrap",
            )
    return found


def _damaged(path: Path, reason: str) -> TransferStateError:
    return TransferStateError(
        f"the checkpoint {path} can not be read: {reason}",
        hint="put an intact copy in its place, or begin anew with --force-bootstrap and"
        " --bootstrap-lookback-minutes: files that are in place are not fetched again",
    )


def _encoded(document: msgspec.Struct) -> bytes:
    try:
        return msgspec.json.encode(document)
    except UnicodeEncodeError:
        # A store in a directory whose name is not UTF-8; json escapes what msgspec refuses.
        return json.dumps(msgspec.to_builtins(document)).encode("ascii")
