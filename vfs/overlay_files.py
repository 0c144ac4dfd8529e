"""Files of an overlay are changed: their content, which an input gets first, and attributes.

Concurrency: as overlay.py says.
"""

import errno
import os
import stat
import time
from typing import Final

from agent_plugin.content.errors import BlobCorruptError
from agent_plugin.content.store import Cancellation
from vfs.nodes import (
    NOW,
    Attributes,
    Changes,
)
from vfs.overlay_index import Object
from vfs.overlay_nodes import OverlayNodes
from vfs.overlay_upper import (
    Descriptor,
    Place,
    allocate,
    change_mode,
    kill_privileges,
    path_of,
    set_times,
)

# The clock by which the kernel stamps files: a later write is never earlier than this "now".
_KERNEL_CLOCK: Final = 5  # CLOCK_REALTIME_COARSE; source: linux/time.h


class OverlayFiles(OverlayNodes):
    """The nodes, with what changes one of them; as `OverlayNodes`."""

    # ------------------------------------------------------------------ content

    def can_write(self, node: int) -> bool:
        """Whether the content can be changed at once."""
        found = self._index.objects.get(node)
        return found is not None and not found.shows

    def prepare(self, node: int, cancellation: Cancellation) -> None:
        """Copy an input's content up, fetched if need be.

        Raises:
            CancelledError: The writer is gone.
            PropmasterError: It can not be had. Nothing has changed.
            OSError: It can not be kept. Nothing has changed.
        """
        if self.can_write(node):
            return
        below = self._below(node)
        if not self._tree.size(below):
            with self._lock:
                self._resize(self._copy.file(node), 0)
            return
        blob = self._lower.content(below, cancellation)
        try:
            self._copy.fill(node, blob, cancellation)
        except BlobCorruptError as error:
            self._lower.tell_corrupt(below, error)
            raise

    def write(
        self,
        node: int,
        offset: int,
        data: bytes | memoryview,
        *,
        kills_privileges: bool = False,
    ) -> int:
        """Write to a file that `can_write`; return the number of bytes."""
        opened = self._own_content(node)
        count = os.pwrite(opened.fd, data, offset)
        if kills_privileges:
            kill_privileges(opened.fd)
        return count

    def fallocate(self, node: int, mode: int, offset: int, length: int) -> None:
        """Reserve space or make a hole in a file that `can_write`; `mode` as the system call's."""
        allocate(self._own_content(node).fd, mode, offset, length)

    def fsync(self, node: int, *, data_only: bool) -> None:
        """Bring to the disk what was written."""
        with self._lock:
            found = self._index.objects.get(node)
            if found is None or found.mode not in (stat.S_IFREG, stat.S_IFDIR):
                return
            opened = self._copy.open(found)
        if data_only:
            os.fdatasync(opened.fd)
        else:
            os.fsync(opened.fd)

    # ------------------------------------------------------------------ attributes

    def setattr(self, node: int, changes: Changes) -> Attributes:
        """Change attributes; return all. A size above 0 needs a file that `can_write`."""
        with self._lock:
            if changes.size == 0 and self._index.is_file(node):
                found = self._copy.file(node, empty=True)
            else:
                found = self._copy.any(node)
            if changes.size is not None:
                self._resize(found, changes.size)
            if found.mode == stat.S_IFREG and changes.kills_privileges:
                kill_privileges(self._copy.open(found).fd)
            above, name = self._copy.at(found)
            if changes.uid is not None or changes.gid is not None:
                self._upper.give_away((above.fd, name), changes.uid, changes.gid)
            if changes.mode is not None:
                change_mode(above.fd, name, stat.S_IMODE(changes.mode))
            if changes.atime_ns is not None or changes.mtime_ns is not None:
                self._set_times(found, (above.fd, name), changes)
            self._touch(found)
            return self._attributes(found)

    def setxattr(self, node: int, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute.

        Raises:
            OSError: EOPNOTSUPP: it is of another kind. EPERM: it is one of ours.
        """
        with self._lock:
            opened = self._for_xattr(node, name)
            os.setxattr(path_of(opened), name, value, flags)
            self._touch(self._index.objects[node])

    def removexattr(self, node: int, name: bytes) -> None:
        """Take away an extended attribute.

        Raises:
            OSError: ENODATA: there is none. The others are those of `setxattr`.
        """
        with self._lock:
            opened = self._for_xattr(node, name)
            os.removexattr(path_of(opened), name)
            self._touch(self._index.objects[node])

    # ------------------------------------------------------------------ their parts

    def _own_content(self, node: int) -> Descriptor:
        opened = self._content(node)
        if opened is None:
            raise OSError(errno.EIO, "the content of an input was not prepared")
        return opened

    def _resize(self, found: Object, size: int) -> None:
        if found.is_directory:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        opened = self._copy.open(found)
        if found.shows and size:
            if size == os.fstat(opened.fd).st_size:
                above, name = self._copy.at(found)
                self._set_times(found, (above.fd, name), Changes(mtime_ns=NOW))
                return
            raise OSError(errno.EIO, "the content of an input was not prepared")
        os.ftruncate(opened.fd, size)
        if found.shows:
            found.shows = False
            self._upper.mark_own_content(opened, self._index.node_mark(found.node))

    def _set_times(self, found: Object, at: Place, changes: Changes) -> None:
        set_times(at, changes.atime_ns, changes.mtime_ns)
        status = os.stat(at[1], dir_fd=at[0], follow_symlinks=False)
        self._copy.keeps_times(found.node, (status.st_atime_ns, status.st_mtime_ns))

    def _touch(self, found: Object) -> None:
        if found.is_directory and found.lower:
            self._touched[found.node] = time.clock_gettime_ns(_KERNEL_CLOCK)

    def _for_xattr(self, node: int, name: bytes) -> Descriptor:
        if not self._upper.may_be(name):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if self._upper.is_private(name):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return self._copy.named(self._copy.any(node))
