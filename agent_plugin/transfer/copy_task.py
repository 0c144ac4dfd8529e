"""One task of a copying transfer: a file or object to its destination, gone on with after a kill.

What an attempt leaves behind is written down with the task: of an upload its id, and by which file
or object it was begun; of a download the file beside the destination (copy_partial.py), and which
ranges it has; of a copy from file to file the same, and how far it is. The next attempt goes on
from there if the source is still the same.

Nothing has its destination's name before it is whole.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
    StoreProtocolError,
    local_write_error,
)
from agent_plugin.content.leftovers import partial_name
from agent_plugin.content.objects import ObjectInfo, Unfinished
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Progress
from agent_plugin.transfer.copy_files import copy_bytes
from agent_plugin.transfer.copy_partial import PartialFile, Ranges, growing
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
            headers=info.headers,
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
        facts = {"etag": info.etag, "version": info.version, "size": info.size}
        with self._growing(destination, facts) as file:
            ranges = Ranges(parts.PART_BYTES)
            ranges.read(file.kept.get("have", []))

            def arrived(offset: int, length: int) -> None:
                ranges.add(offset)
                document = {**file.identity, "have": ranges.document}
                self._write_down("", document, ranges.count * parts.PART_BYTES)
                self.progress(length)

            objects.fetch(
                info, file.fd, cancellation=self.halt, have=ranges.offsets, arrived=arrived
            )
            file.place(info.modified, overwrite=self.settings.overwrite)

    def _copy_file(self, source: Place, destination: Place) -> None:
        with _opened(source.path) as (from_fd, status):
            self.measured(status.st_size)
            facts = {"file": _identity(status), "size": status.st_size}
            with self._growing(destination, facts) as file:
                parts.reserve(file.fd, status.st_size)
                end = self._copy_from(from_fd, file)
                if end < status.st_size or _identity(os.fstat(from_fd)) != facts["file"]:
                    raise FileChangedError(
                        f"{source.path}: it was written to while it was copied",
                        hint="Copy it when nobody writes to it any more.",
                    )
                file.place(status.st_mtime, overwrite=self.settings.overwrite)

    def _growing(
        self, destination: Place, facts: Mapping[str, Any]
    ) -> AbstractContextManager[PartialFile]:
        return growing(
            Path(destination.path),
            # The time as well, since another host's ledger may have the same id for that directory.
            partial_name(f"copy-{self.task.id}-{int(self.task.created * 1_000_000):x}"),
            facts,
            self.task.kept,
            begun=lambda identity: self._write_down("", identity, 0),
            drops=lambda: self.halt.drops,
        )

    def _copy_from(self, source: int, file: PartialFile) -> int:
        """Copy a file from where it is, and write down now and then how far that is."""
        identity, start = file.identity, int(file.kept.get("copied", 0))
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
                file.fd,
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

    # -------------------------------------------------------------------------------- either

    def _look(self, source: Place) -> ObjectInfo:
        objects = self.open_objects(self.settings.source.access)
        info = objects.head(source.bucket, source.key, cancellation=self.halt)
        self.measured(info.size)
        if info.size > WHOLE_BLOB_BYTES and not info.tells_its_state:
            raise StoreProtocolError(
                f"{info.url}: the server tells neither ETag nor version of it, so that its parts"
                " could be of two objects",
                hint="Use a server that has ETags.",
            )
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
            # As PartialFile.place leaves a file. Before that, what there is of it is written down.
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


def _identity(status: os.stat_result) -> list[int]:
    """Return what is another number when a file is another one, or was written to."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
