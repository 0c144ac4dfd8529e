"""Bringing inputs into the upper directory: attributes at once, content when it is changed.

An input that is touched first becomes a file of its size without content, marked as overlayfs marks
a metadata-only copy; readers still get the input's bytes. When its content is to be changed the
whole blob is copied in, and only then the mark taken away, in one step: whoever is killed, or
refused space, leaves the input as it was.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from agent_plugin.content.digest import hash_fd
from agent_plugin.content.errors import BlobCorruptError
from agent_plugin.content.parts import write_all
from agent_plugin.content.store import Cancellation
from vfs.nodes import RENAME_NOREPLACE, Caller
from vfs.open_blob import OpenBlob
from vfs.overlay_index import Index, Object
from vfs.overlay_upper import (
    NEW,
    Descriptor,
    Kept,
    Place,
    Upper,
    open_directory,
    open_path,
    open_regular,
    permitted,
    rename_at,
)
from vfs.service import NodeService
from vfs.tree import ROOT

# How much is copied before others get their turn.
PIECE_BYTES: Final = 4 * 1024 * 1024
_POLL_SECONDS: Final = 0.1
# What copy_file_range(2) says where only reading and writing will do.
_UNABLE: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
)


class CopyUp:
    """Where nodes lie in the upper directory; puts them there if they do not.

    Args:
        index: What is there.
        upper: The directory.
        lower: The inputs.
        lock: The overlay's, held by whoever calls anything but `fill`.
    """

    def __init__(
        self, index: Index, upper: Upper, lower: NodeService, lock: "threading.RLock"
    ) -> None:
        self._index = index
        self._upper = upper
        self._lower = lower
        self._lock = lock
        self._directories = Kept()
        self._files = Kept()
        # Of files whose content is being copied, the times they are to have afterwards.
        self._times: dict[int, tuple[int, int]] = {}
        self._turns: dict[int, threading.Lock] = {}

    def directory(self, node: int) -> Descriptor:
        """Return a directory's part in the upper one, made if need be.

        Raises:
            OSError: ENOENT: it was removed.
        """
        missing: list[tuple[int, Place]] = []
        while True:
            found = self._upper.root if node == ROOT else self._directories.find(node)
            if found is not None:
                break
            place = self._index.place(node)
            if place is None:
                raise FileNotFoundError(errno.ENOENT, "the directory was removed")
            missing.append((node, place))
            node = place[0]
        for at, place in reversed(missing):
            found = self._enter(at, place, found)
        return found

    def at(self, found: Object) -> tuple[Descriptor, bytes]:
        """Return where an object lies: the directory it is in, and its name there."""
        if found.places:
            directory, name = found.places[0]
            return self.directory(directory), name
        return self._upper.work, self._upper.gone_name(found.node)

    def open(self, found: Object) -> Descriptor:
        """Return an object's descriptor; a file's to read and write.

        Raises:
            OSError: It is neither file nor directory, or can not be opened.
        """
        if found.is_directory:
            if found.places:
                return self.directory(found.node)
            return open_directory(self._upper.gone_name(found.node), self._upper.work.fd)
        if found.mode != stat.S_IFREG:
            raise OSError(errno.EINVAL, "not a regular file")

        def open_it() -> Descriptor:
            above, name = self.at(found)
            return open_regular((above.fd, name))

        return self._files.get(found.node, open_it)

    def named(self, found: Object) -> Descriptor:
        """Return a descriptor of anything, of a link itself: for `path_of`, and not to be read.

        Raises:
            OSError: It can not be opened.
        """
        if found.mode in (stat.S_IFREG, stat.S_IFDIR):
            return self.open(found)

        def name_it() -> Descriptor:
            above, name = self.at(found)
            return open_path((above.fd, name))

        return self._files.get(found.node, name_it)

    def find(self, node: int) -> Descriptor | None:
        """Return what is open of a node."""
        return self._files.find(node) or self._directories.find(node)

    def let_go(self, node: int) -> None:
        """Close what is open of a node."""
        self._directories.drop(node)
        self._files.drop(node)

    def any(self, node: int) -> Object:
        """Return a node's object, made if need be."""
        found = self._index.objects.get(node)
        if found is not None:
            return found
        if not self._index.is_file(node):
            self.directory(node)
            return self._index.objects[node]
        return self.file(node)

    def file(self, node: int, *, empty: bool = False) -> Object:
        """Return a file's object; an input gets one, with its content shown or without any."""
        found = self._index.objects.get(node)
        if found is not None:
            return found
        attributes = self._lower.attributes(node)
        place = self._index.place(node)
        above = self.directory(place[0]) if place else self._upper.work
        name = place[1] if place else self._upper.gone_name(node)
        with self._staged():
            made = self._upper.make_regular(NEW, stat.S_IMODE(attributes.mode))
            self._upper.give(
                (self._upper.work.fd, NEW), attributes.mode, Caller(attributes.uid, attributes.gid)
            )
            os.setxattr(made.fd, self._upper.node_mark, self._index.node_mark(node))
            if not empty:
                os.setxattr(made.fd, self._upper.marks.metacopy, b"")
                os.ftruncate(made.fd, attributes.size)
            os.utime(made.fd, ns=(attributes.atime_ns, attributes.mtime_ns))
            self._bring_in(above, name)
        return self._index.copied(node, stat.S_IFREG, place, shows=not empty)

    def keeps_times(self, node: int, times: tuple[int, int]) -> None:
        """Have a file whose content is being copied get these times afterwards."""
        if node in self._times:
            self._times[node] = times

    def shows(self, node: int) -> bool:
        """Whether the content of a file is that of an input still."""
        found = self._index.objects.get(node)
        return found is None or found.shows

    def fill(self, node: int, blob: OpenBlob, cancellation: Cancellation) -> None:
        """Copy an input's content into its file; the lock is not held.

        Raises:
            BlobCorruptError: The blob was damaged in the cache.
            OSError: ENOSPC: there is no room; the file still shows the input.
            CancelledError: Cancellation was wished; so does it.
        """
        with self._lock:
            turn = self._turns.setdefault(node, threading.Lock())
        while not turn.acquire(timeout=_POLL_SECONDS):
            cancellation.check()
        try:
            self._fill(node, blob, cancellation)
        finally:
            turn.release()

    def _fill(self, node: int, blob: OpenBlob, cancellation: Cancellation) -> None:
        if not blob.is_verified and hash_fd(blob.fd) != self._lower.tree.digest(node):
            raise BlobCorruptError(f"{self._lower.path(node)} was damaged in the cache")
        with self._lock:
            found = self.file(node)
            if not found.shows:
                return
            opened = self.open(found)
            status = os.fstat(opened.fd)
            self._times[node] = status.st_atime_ns, status.st_mtime_ns
        try:
            for offset in range(0, status.st_size, PIECE_BYTES):
                cancellation.check()
                with self._lock:
                    if not self.shows(node):
                        return  # It was truncated.
                    _copy(blob.fd, opened.fd, offset, min(PIECE_BYTES, status.st_size - offset))
            with self._lock:
                if self.shows(node):
                    os.utime(opened.fd, ns=self._times[node])
                    self._upper.mark_own_content(opened, self._index.node_mark(node))
                    found.shows = False
        except BaseException:
            with self._lock:
                if self.shows(node):
                    os.ftruncate(opened.fd, 0)
                    os.ftruncate(opened.fd, status.st_size)
                    os.utime(opened.fd, ns=self._times[node])
            raise
        finally:
            with self._lock:
                del self._times[node]

    @contextmanager
    def _staged(self) -> Iterator[None]:
        """What fails leaves nothing under NEW."""
        self._upper.clear(NEW)
        try:
            yield
        except BaseException:
            self._upper.clear(NEW)
            raise

    def _enter(self, node: int, place: Place, above: Descriptor) -> Descriptor:
        name = place[1]
        if node not in self._index.objects:
            attributes = self._lower.attributes(node)
            new = self._upper.work.fd, NEW
            with self._staged():
                self._upper.make(new, attributes.mode, Caller(attributes.uid, attributes.gid))
                os.utime(NEW, ns=(attributes.atime_ns, attributes.mtime_ns), dir_fd=new[0])
                self._bring_in(above, name)
            self._index.copied(node, stat.S_IFDIR, place, shows=False)
        return self._directories.get(node, lambda: open_directory(name, above.fd))

    def _bring_in(self, above: Descriptor, name: bytes) -> None:
        """Put what is NEW in its place; nobody sees that the directory has changed."""
        before = os.fstat(above.fd)
        # Whoever may make nothing there may change what there is.
        with permitted(above.fd):
            rename_at((self._upper.work.fd, NEW), (above.fd, name), RENAME_NOREPLACE)
        os.utime(above.fd, ns=(before.st_atime_ns, before.st_mtime_ns))


def _copy(source: int, to: int, offset: int, length: int) -> None:
    """Copy part of a file; where both lie on one file system that can, without copying bytes."""
    end = offset + length
    while offset < end:
        try:
            count = os.copy_file_range(source, to, end - offset, offset, offset)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            data = os.pread(source, end - offset, offset)
            write_all(to, data, offset)
            count = len(data)
        if not count:
            raise OSError(errno.EIO, "the content is shorter than its size")
        offset += count
