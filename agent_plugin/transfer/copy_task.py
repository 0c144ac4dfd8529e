"""One task of a copying transfer: a file or object to its destination, gone on with after a kill.

What an attempt leaves behind is written down with the task: of an upload its id, and by which file
or object it was begun; of a download the file beside the destination, and which ranges it has; of
a copy from file to file the same, and how far it is. The next attempt goes on from there if the
source is still the same. What is in a file counts only until the host starts anew, because a power
cut may take it and leave the ledger that speaks of it.

Nothing has its destination's name before it is whole.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from agent_plugin.content import parts
from agent_plugin.content.bandwidth import Allowance
from agent_plugin.content.errors import (
    CancelledError,
    FileChangedError,
    KeyExistsError,
    LocalReadError,
    ObjectNotFoundError,
    local_write_error,
)
from agent_plugin.content.leftovers import lock_partial, partial_name
from agent_plugin.content.objects import ObjectInfo, Unfinished
from agent_plugin.content.store import Cancellation, Progress
from agent_plugin.transfer.copy_files import copy_bytes
from agent_plugin.transfer.copy_places import OpenObjects, Place
from agent_plugin.transfer.copy_queue import CopyTask
from agent_plugin.transfer.copy_settings import CopySettings

# Told the id of an upload, what is kept, and how many bytes of the source that is.
Keep = Callable[[str, Mapping[str, Any], int], None]

# Written down more often, an upload of 10,000 parts would write its list 10,000 times. What is
# missing in it the store knows.
PARTS_WRITTEN_SECONDS: Final = 1.0
# What is sent by one request, whose ETag is an MD5 on most servers.
_COMPARED_BYTES: Final = 8 * 1024 * 1024
# Times are set as binary fractions, which are some tenths of a microsecond apart.
_SAME_TIME_SECONDS: Final = 1e-5
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITE: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Halt(Cancellation):
    """A wish that a task stops, and what is to become of what it has so far.

    Attributes:
        drops: Whether nobody will go on with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drops = False

    def stop(self, *, drops: bool) -> None:
        """Wish it; whoever wishes that nothing stays has the last word."""
        self.drops = self.drops or drops
        self.cancel()


@dataclass(slots=True)
class Attempt:
    """One attempt at a task.

    Attributes:
        task: The task.
        settings: Of its transfer.
        open_objects: Returns the objects that an access sees.
        halt: Checked at every part boundary.
        progress: Told each byte that moves; from any thread.
        keep: Writes down what there is so far; from any thread.
        measured: Told how large the source is.
        clock: Seconds, monotonic.
        limit: How much may be copied within this host.
    """

    task: CopyTask
    settings: CopySettings
    open_objects: OpenObjects
    halt: Halt
    progress: Progress
    keep: Keep
    measured: Callable[[int], None]
    clock: Callable[[], float]
    limit: Allowance
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: bool = False

    def run(self) -> None:
        """Bring the source to its destination.

        Raises:
            KeyExistsError: Something is there, and may not be replaced.
            ObjectNotFoundError, LocalReadError: The source is not there.
            ObjectChangedError, FileChangedError: It changed meanwhile.
            CancelledError: The halt was wished.
            PropmasterError: Whatever else store and file system refuse.
        """
        source, destination = Place.parse(self.task.source), Place.parse(self.task.destination)
        try:
            if self.settings.ignore_existing and self._exists(destination):
                return
            if source.is_object and destination.is_object:
                self._copy_object(source, destination)
            elif source.is_object:
                self._download(source, destination)
            elif destination.is_object:
                self._upload(source, destination)
            else:
                self._copy_file(source, destination)
        except KeyExistsError:
            # An engine that was killed may have made it, and not come to write that down.
            if not self._is_made(source, destination):
                raise
        finally:
            with self._lock:
                # Threads that were left behind write nothing down any more.
                self._over = True

    # ------------------------------------------------------------------------------- uploads

    def _upload(self, source: Place, destination: Place) -> None:
        objects = self.open_objects(self.settings.destination.access)
        with _opened(source.path) as (fd, status):
            self.measured(status.st_size)
            identity = _identity(status)
            unfinished = self._unfinished({"file": identity}, destination, status.st_size)
            changed = False

            def check() -> None:
                nonlocal changed
                if _identity(os.fstat(fd)) != identity:
                    # What was sent of it is of no use to the next attempt.
                    changed = True
                    raise FileChangedError(
                        f"{source.path}: it was written to while it was sent",
                        hint="Copy it when nobody writes to it any more.",
                    )

            unfinished.drops = lambda: changed or self.halt.drops
            objects.put_stream(
                destination.bucket,
                destination.key,
                status.st_size,
                partial(parts.read_all, fd),
                overwrite=self.settings.overwrite,
                cancellation=self.halt,
                progress=self.progress,
                unfinished=unfinished,
                check=check,
            )

    def _copy_object(self, source: Place, destination: Place) -> None:
        from_access = self.settings.source.access
        to_access = self.settings.destination.access
        info = self._look(source)
        unfinished = self._unfinished(
            {"etag": info.etag, "version": info.version}, destination, info.size
        )
        if from_access == to_access and not self.settings.stream:
            self.open_objects(to_access).copy(
                info,
                destination.bucket,
                destination.key,
                overwrite=self.settings.overwrite,
                cancellation=self.halt,
                progress=self.progress,
                unfinished=unfinished,
            )
            return
        read = partial(self.open_objects(from_access).read, info)
        self.open_objects(to_access).put_stream(
            destination.bucket,
            destination.key,
            info.size,
            read,
            overwrite=self.settings.overwrite,
            content_type=info.content_type,
            metadata=info.metadata,
            cancellation=self.halt,
            progress=self.progress,
            unfinished=unfinished,
            in_order=False,
        )

    def _unfinished(self, identity: Mapping[str, Any], destination: Place, size: int) -> Unfinished:
        """Return the upload that an earlier attempt has left, if it was of this source."""
        kept = self.task.kept
        written = float("-inf")

        def changed(unfinished: Unfinished) -> None:
            nonlocal written
            is_soon = self.clock() < written + PARTS_WRITTEN_SECONDS
            if unfinished.parts and is_soon and not unfinished.whole:
                return
            written = self.clock()
            document = {
                **identity,
                "partBytes": unfinished.part_bytes,
                "parts": {str(number): etag for number, etag in unfinished.parts.items()},
            }
            done = min(size, len(unfinished.parts) * unfinished.part_bytes)
            self._write_down(unfinished.upload_id, document, done)

        unfinished = Unfinished(changed=changed, drops=lambda: self.halt.drops)
        if self.task.upload_id:
            if all(kept.get(name) == value for name, value in identity.items()):
                unfinished.upload_id = self.task.upload_id
                unfinished.part_bytes = int(kept["partBytes"])
                unfinished.parts = {int(number): tag for number, tag in kept["parts"].items()}
            else:
                objects = self.open_objects(self.settings.destination.access)
                objects.abort(destination.bucket, destination.key, self.task.upload_id)
                self._write_down("", {}, 0)
        return unfinished

    # ----------------------------------------------------------------------------- downloads

    def _download(self, source: Place, destination: Place) -> None:
        info = self._look(source)
        objects = self.open_objects(self.settings.source.access)
        path = Path(destination.path)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_path = path.with_name(partial_name(f"copy-{self.task.id}"))
            ranges = _Ranges(parts.PART_BYTES)
            identity = {
                "etag": info.etag,
                "version": info.version,
                "size": info.size,
                "partial": os.fspath(partial_path),
                "boot": _boot_id(),
            }
            fd, goes_on = self._open_partial(partial_path, identity)
            if goes_on:
                ranges.read(self.task.kept.get("have", []))
            try:
                lock_partial(fd)

                def arrived(offset: int, length: int) -> None:
                    ranges.add(offset)
                    document = {**identity, "have": ranges.document}
                    self._write_down("", document, ranges.count * parts.PART_BYTES)
                    self.progress(length)

                objects.fetch(
                    info, fd, cancellation=self.halt, have=ranges.offsets, arrived=arrived
                )
                self._place(fd, partial_path, path, info.modified)
            finally:
                os.close(fd)
                if self.halt.drops:
                    partial_path.unlink(missing_ok=True)

    def _open_partial(self, path: Path, identity: Mapping[str, Any]) -> tuple[int, bool]:
        """Open a file to go on with; whether it is what an earlier attempt has left, or new."""
        kept = self.task.kept
        if kept and all(kept.get(name) == value for name, value in identity.items()):
            with suppress(FileNotFoundError):
                fd = os.open(path, _WRITE)
                status = os.fstat(fd)
                if stat.S_ISREG(status.st_mode) and status.st_size == identity["size"]:
                    return fd, True
                os.close(fd)
        # Not truncated: somebody who was left behind may still write to the old one.
        for name in {os.fspath(path), str(kept.get("partial", path))}:
            Path(name).unlink(missing_ok=True)
        fd = os.open(path, _WRITE | os.O_CREAT | os.O_EXCL, 0o666)
        self._write_down("", identity, 0)
        return fd, False

    def _copy_file(self, source: Place, destination: Place) -> None:
        path = Path(destination.path)
        with _opened(source.path) as (from_fd, status), _writing(path):
            self.measured(status.st_size)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_path = path.with_name(partial_name(f"copy-{self.task.id}"))
            identity = {
                "file": _identity(status),
                "size": status.st_size,
                "partial": os.fspath(partial_path),
                "boot": _boot_id(),
            }
            fd, goes_on = self._open_partial(partial_path, identity)
            try:
                lock_partial(fd)
                parts.reserve(fd, status.st_size)
                start = int(self.task.kept.get("copied", 0)) if goes_on else 0
                end = self._copy_from(from_fd, fd, start, identity)
                if end < status.st_size or _identity(os.fstat(from_fd)) != identity["file"]:
                    raise FileChangedError(
                        f"{source.path}: it was written to while it was copied",
                        hint="Copy it when nobody writes to it any more.",
                    )
                self._place(fd, partial_path, path, status.st_mtime)
            finally:
                os.close(fd)
                if self.halt.drops:
                    partial_path.unlink(missing_ok=True)

    def _copy_from(self, source: int, target: int, start: int, identity: Mapping[str, Any]) -> int:
        """Copy a file from a position on, and write down now and then how far that is."""
        written, reached = self.clock(), start

        def copied(count: int, end: int) -> None:
            nonlocal written, reached
            reached = end
            self.progress(count)
            if self.clock() >= written + PARTS_WRITTEN_SECONDS:
                written = self.clock()
                self._write_down("", {**identity, "copied": end}, end)

        try:
            return copy_bytes(
                source,
                target,
                start,
                identity["size"],
                halt=self.halt,
                limit=self.limit,
                rate=self.settings.speed_limit,
                copied=copied,
            )
        except CancelledError:
            self._write_down("", {**identity, "copied": reached}, reached)
            raise

    def _place(self, fd: int, partial_path: Path, path: Path, modified: float) -> None:
        os.utime(fd, (modified, modified))
        if self.settings.overwrite:
            partial_path.replace(path)
            return
        try:
            path.hardlink_to(partial_path)
        except FileExistsError as error:
            raise KeyExistsError(
                f"{path}: something is there already",
                hint="Choose another place, or allow overwriting.",
            ) from error
        finally:
            partial_path.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------- either

    def _look(self, source: Place) -> ObjectInfo:
        objects = self.open_objects(self.settings.source.access)
        info = objects.head(source.bucket, source.key, cancellation=self.halt)
        self.measured(info.size)
        return info

    def _exists(self, destination: Place) -> bool:
        if not destination.is_object:
            return os.path.lexists(destination.path)
        objects = self.open_objects(self.settings.destination.access)
        try:
            objects.head(destination.bucket, destination.key, cancellation=self.halt)
        except ObjectNotFoundError:
            return False
        return True

    def _is_made(self, source: Place, destination: Place) -> bool:
        """Tell whether an earlier attempt has made what is at the destination.

        Of objects that are made of parts the store tells that (s3_multipart.py), if it is asked
        for the upload; they are taken for somebody else's here.
        """
        if not destination.is_object:
            there = Path(destination.path).lstat()
            size, modified = self._facts(source)
            # As _place leaves a file. Before that, what there is of it is written down.
            return (
                bool(self.task.kept)
                and stat.S_ISREG(there.st_mode)
                and there.st_size == size
                and abs(there.st_mtime - modified) < _SAME_TIME_SECONDS
            )
        if not self.task.tries:
            return False
        objects = self.open_objects(self.settings.destination.access)
        made = objects.head(destination.bucket, destination.key, cancellation=self.halt)
        if source.is_object:
            info = self._look(source)
            return bool(info.etag) and (made.size, made.etag) == (info.size, info.etag)
        with _opened(source.path) as (fd, status):
            if status.st_size != made.size or made.size > _COMPARED_BYTES:
                return False
            data = parts.read_all(fd, 0, status.st_size)
        return made.etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()

    def _facts(self, source: Place) -> tuple[int, float]:
        """Return size and time of a source; seconds since the epoch."""
        if source.is_object:
            info = self._look(source)
            return info.size, info.modified
        status = Path(source.path).stat()
        return status.st_size, status.st_mtime

    def _write_down(self, upload_id: str, kept: Mapping[str, Any], done: int) -> None:
        with self._lock:
            if not self._over:
                self.keep(upload_id, kept, done)


class _Ranges:
    """Which parts of a file are there, as few numbers.

    Args:
        part_bytes: How large they are.
    """

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._numbers: set[int] = set()
        self._lock = threading.Lock()

    def add(self, offset: int) -> None:
        """Take down that a part is there."""
        with self._lock:
            self._numbers.add(offset // self._part_bytes)

    def read(self, document: list[list[int]]) -> None:
        """Take down what `document` had said."""
        with self._lock:
            for first, last in document:
                self._numbers.update(range(first, last + 1))

    @property
    def document(self) -> list[list[int]]:
        """First and last number of each row of parts that are there."""
        rows: list[list[int]] = []
        with self._lock:
            for number in sorted(self._numbers):
                if rows and rows[-1][1] == number - 1:
                    rows[-1][1] = number
                else:
                    rows.append([number, number])
        return rows

    @property
    def offsets(self) -> frozenset[int]:
        """Where the parts begin that are there."""
        with self._lock:
            return frozenset(number * self._part_bytes for number in self._numbers)

    @property
    def count(self) -> int:
        """How many there are."""
        with self._lock:
            return len(self._numbers)


def drop(task: CopyTask, settings: CopySettings, open_objects: OpenObjects) -> None:
    """Remove what an attempt has left of a task that nobody goes on with.

    Raises:
        PropmasterError: It is there still.
    """
    if task.upload_id:
        destination = Place.parse(task.destination)
        objects = open_objects(settings.destination.access)
        objects.drop_upload(destination.bucket, destination.key, task.upload_id)
    if name := task.kept.get("partial"):
        try:
            Path(str(name)).unlink(missing_ok=True)
        except NotADirectoryError:
            # What was its directory is gone, and it with that.
            return
        except OSError as error:
            raise local_write_error(error, str(name)) from error


@contextmanager
def _opened(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Lend a regular file, open for reading, and its status.

    Raises:
        LocalReadError: It is none, or can not be read.
    """
    try:
        fd = os.open(path, _READ)
    except OSError as error:
        raise LocalReadError(
            f"{path}: {error.strerror}",
            hint="Check that it is there and can be read, or exclude its task.",
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise LocalReadError(f"{path}: it is no regular file", hint="Exclude its task.")
        yield fd, status
    finally:
        os.close(fd)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error


def _identity(status: os.stat_result) -> list[int]:
    """Return what is another number when a file is another one, or was written to."""
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
