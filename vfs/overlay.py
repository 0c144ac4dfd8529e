"""Writes above a tree that never changes: our own overlay, where the kernel's can not be had.

What is written lies in an upper directory as overlayfs would have it, marks included, so whoever
looks for a session's outputs need not know which of the two it was. The directory is all the state
there is: a server that is killed at any moment is followed by one that finds the same nodes in it.

A request that was carried out and not answered before the server was killed comes again, marked.
The kernel holds the directories it concerns meanwhile and knows what is in them, so a name that is
found made, or gone, against what the kernel knows is that request's own work.

Concurrency: one lock around the names; content is read and written beside it. Nothing but `read`
and `prepare` waits for a store.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final

import xxhash

from agent_plugin.content.errors import BlobCorruptError
from agent_plugin.content.store import Cancellation
from vfs.nodes import (
    NOW,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    Attributes,
    Caller,
    Changes,
    Listed,
    Space,
    WritableNodes,
)
from vfs.overlay_copy import CopyUp
from vfs.overlay_index import HIDDEN, Index, Object
from vfs.overlay_upper import (
    NEW,
    Descriptor,
    Place,
    Upper,
    allocate,
    change_mode,
    kill_privileges,
    rename_at,
    set_times,
)
from vfs.service import BLOCK_BYTES, XATTR_HASH, XATTR_STATE, NodeService
from vfs.tree import ROOT

NAME_BYTES: Final = 255
# Listings that are kept; a large directory is asked for in many pieces.
LISTINGS: Final = 64
_NOTHING: Final[dict[bytes, int]] = {}
# Above the positions that a tree's names have.
_MADE_POSITION: Final = 1 << 61
# The clock by which the kernel stamps files: a later write is never earlier than this "now".
_KERNEL_CLOCK: Final = 5  # CLOCK_REALTIME_COARSE; source: linux/time.h


class Overlay:
    """The nodes of a mount that takes writes.

    Args:
        lower: The inputs.
        upper: Where writes go.
        instance: Tells this mount from others that used the same directory.
        again: Whether a server of this mount was killed.
    """

    def __init__(
        self, lower: NodeService, upper: Upper, instance: str, *, again: bool = False
    ) -> None:
        self._lower = lower
        self._tree = lower.tree
        self._upper = upper
        self._again = again
        self._lock = threading.RLock()
        self._index = Index(lower.tree, upper, instance, again=again)
        self._copy = CopyUp(self._index, upper, lower, self._lock)
        self._held: dict[int, int] = {}
        # Inputs that were removed while they were in use, since the server started.
        self._removed: set[int] = set()
        # With the tree's names, which are others after an update.
        self._listings: dict[int, tuple[Mapping[bytes, int], list[Listed]]] = {}
        self._subdirectories: dict[int, int] = {}
        # Of directories of inputs, when their attributes were changed, since the server started.
        self._touched: dict[int, int] = {}

    @property
    def writable(self) -> WritableNodes:
        """This."""
        return self

    def close(self) -> None:
        """Leave nothing but the upper directory, when the mount is gone."""
        self._upper.clear_work()

    # ------------------------------------------------------------------ names and attributes

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Return the node of a name in a directory, None if there is none."""
        with self._lock:
            return self._index.lookup(directory, name) or None

    def parent(self, directory: int) -> int:
        """Return the directory above; that of the root, and of one that is gone, is the root."""
        with self._lock:
            place = self._index.place(directory)
        return place[0] if place else ROOT

    def path(self, node: int) -> str:
        """Return one of the node's paths below the root, for messages."""
        names: list[str] = []
        with self._lock:
            while node != ROOT and (place := self._index.place(node)) is not None:
                names.append(os.fsdecode(place[1]))
                node = place[0]
        return "/".join(reversed(names))

    def attributes(self, node: int) -> Attributes:
        """Return what is known of a node.

        Raises:
            OSError: ESTALE: there is no such node.
        """
        with self._lock:
            found = self._index.objects.get(node)
            if found is not None:
                return self._attributes(found)
            attributes = self._lower.attributes(node)
            if stat.S_ISDIR(attributes.mode):
                return attributes._replace(nlink=2 + self._count_subdirectories(node))
            return attributes._replace(nlink=0) if node in self._removed else attributes

    def listing(self, directory: int) -> Sequence[Listed]:
        """Return a directory's names: the tree's in its order, then those that were made.

        Raises:
            OSError: ENOTDIR: it is none.
        """
        with self._lock:
            names = self._index.names.get(directory)
            if names is None:
                return self._lower.listing(directory)
            lower = self._index.lower(directory)
            below = self._tree.names(lower) if lower else _NOTHING
            known = self._listings.get(directory)
            if known is not None and known[0] is below:
                return known[1]
            listing = _list(below, names)
            self._listings[directory] = below, listing
            if len(self._listings) > LISTINGS:
                del self._listings[next(iter(self._listings))]
            return listing

    def readlink(self, node: int) -> bytes:
        """Return where a symbolic link leads.

        Raises:
            OSError: EINVAL: it is none.
        """
        with self._lock:
            found = self._index.objects.get(node)
            if found is None:
                return self._lower.readlink(node)
            above, name = self._copy.at(found)
            return os.readlink(name, dir_fd=above.fd)

    def statvfs(self) -> Space:
        """Return the space of the disk that is written to."""
        found = os.fstatvfs(self._upper.root.fd)
        return Space(
            found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail,
            found.f_files, found.f_ffree,
        )  # fmt: skip

    def hold(self, node: int, count: int = 1) -> None:
        """Keep a node, though its last name may go."""
        with self._lock:
            self._held[node] = self._held.get(node, 0) + count

    def forget(self, node: int, count: int = 1) -> None:
        """Give back what was held; a node without names goes with the last."""
        with self._lock:
            left = self._held.pop(node, 0) - count
            if left > 0:
                self._held[node] = left
                return
            self._removed.discard(node)
            found = self._index.objects.get(node)
            if found is not None and not found.places:
                self._destroy(found)

    # ------------------------------------------------------------------ content

    def read_now(self, node: int, offset: int, buffer: memoryview) -> int:
        """Read into a buffer what can be read without waiting; -1 if nothing can."""
        opened = self._content(node)
        if opened is None:
            return self._lower.read_now(self._below(node), offset, buffer)
        return os.preadv(opened.fd, [buffer], offset)

    def read(self, node: int, offset: int, length: int, cancellation: Cancellation) -> bytes:
        """Return part of a file, fetched if need be; shorter only at the file's end.

        Raises:
            CancelledError: The reader is gone.
            PropmasterError: It can not be had; that is in the error ledger, with the path.
        """
        opened = self._content(node)
        if opened is None:
            return self._lower.read(self._below(node), offset, length, cancellation)
        return os.pread(opened.fd, length, offset)

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

    def lseek(self, node: int, offset: int, whence: int) -> int:
        """Return where data or a hole is next; an input is all data."""
        opened = self._content(node)
        if opened is not None:
            return os.lseek(opened.fd, offset, whence)
        size = self._lower.attributes(self._below(node)).size
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return offset if whence == os.SEEK_DATA else size

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
                uid = -1 if changes.uid is None else changes.uid
                gid = -1 if changes.gid is None else changes.gid
                os.chown(name, uid, gid, dir_fd=above.fd, follow_symlinks=False)
            if changes.mode is not None:
                change_mode(above.fd, name, stat.S_IMODE(changes.mode))
            if changes.atime_ns is not None or changes.mtime_ns is not None:
                self._set_times(found, (above.fd, name), changes)
            self._touch(found)
            return self._attributes(found)

    def getxattr(self, node: int, name: bytes) -> bytes | None:
        """Return an extended attribute, None when there is none of that name.

        Raises:
            OSError: EOPNOTSUPP: none of that kind can be.
        """
        if not self._upper.may_be(name):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        with self._lock:
            found = self._index.objects.get(node)
            if name in (XATTR_HASH, XATTR_STATE):
                shown = found is None or found.shows
                return self._lower.getxattr(self._below(node), name) if shown else None
            if found is None or self._upper.is_private(name) or not _may_have_xattrs(found):
                return None
            try:
                return os.getxattr(self._copy.open(found).fd, name)
            except OSError as error:
                if error.errno == errno.ENODATA:
                    return None
                raise

    def listxattr(self, node: int) -> list[bytes]:
        """Return the names of the extended attributes that were set."""
        with self._lock:
            found = self._index.objects.get(node)
            if found is None or not _may_have_xattrs(found):
                return []
            names = map(os.fsencode, os.listxattr(self._copy.open(found).fd))
            upper = self._upper
            return [name for name in names if upper.may_be(name) and not upper.is_private(name)]

    def setxattr(self, node: int, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute.

        Raises:
            OSError: EOPNOTSUPP: it is of another kind. EPERM: it is one of ours.
        """
        with self._lock:
            os.setxattr(self._for_xattr(node, name), name, value, flags)
            self._touch(self._index.objects[node])

    def removexattr(self, node: int, name: bytes) -> None:
        """Take away an extended attribute.

        Raises:
            OSError: ENODATA: there is none. The others are those of `setxattr`.
        """
        with self._lock:
            os.removexattr(self._for_xattr(node, name), name)
            self._touch(self._index.objects[node])

    # ------------------------------------------------------------------ making

    def mknod(
        self,
        directory: int,
        name: bytes,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        again: bool = False,
    ) -> int:
        """Make a file that is no directory and no link; return its node."""
        if stat.S_ISCHR(mode) and rdev == 0:
            # It would be a whiteout.
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        if not stat.S_IFMT(mode):
            mode |= stat.S_IFREG
        return self._make(directory, name, mode, caller, rdev=rdev, again=again)

    def mkdir(
        self, directory: int, name: bytes, mode: int, caller: Caller, *, again: bool = False
    ) -> int:
        """Make a directory; return its node."""
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        return self._make(directory, name, mode, caller, again=again)

    def symlink(
        self, directory: int, name: bytes, target: bytes, caller: Caller, *, again: bool = False
    ) -> int:
        """Make a symbolic link; return its node."""
        mode = stat.S_IFLNK | 0o777
        return self._make(directory, name, mode, caller, target=target, again=again)

    def link(self, node: int, directory: int, name: bytes, *, again: bool = False) -> None:
        """Give a file one more name."""
        with self._lock:
            there = self._free(directory, name, again=again)
            if there:
                return
            found = self._copy.any(node)
            if found.is_directory:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            if not found.places:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            to = self._copy.directory(directory)
            self._mark_origin(found)
            above, old = self._copy.at(found)
            if self._index.names[directory].get(name) == HIDDEN:
                self._upper.clear(NEW)
                os.link(
                    old, NEW, src_dir_fd=above.fd, dst_dir_fd=self._upper.work.fd,
                    follow_symlinks=False,
                )  # fmt: skip
                os.rename(NEW, name, src_dir_fd=self._upper.work.fd, dst_dir_fd=to.fd)
            else:
                os.link(old, name, src_dir_fd=above.fd, dst_dir_fd=to.fd, follow_symlinks=False)
            self._index.put(found, (directory, name))
            self._changed(directory)

    def _make(
        self,
        directory: int,
        name: bytes,
        mode: int,
        caller: Caller,
        *,
        rdev: int = 0,
        target: bytes = b"",
        again: bool,
    ) -> int:
        with self._lock:
            there = self._free(directory, name, again=again)
            above = self._copy.directory(directory)
            inherited = os.fstat(above.fd)
            if inherited.st_mode & stat.S_ISGID:
                caller = Caller(caller.uid, inherited.st_gid)
                mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
            if there:
                # The killed server may not have come further than to make it.
                self._upper.give((above.fd, name), mode, caller)
                return there
            if self._index.names[directory].get(name) == HIDDEN:
                status = self._make_over(above, name, mode, caller, rdev, target)
            else:
                status = self._upper.make((above.fd, name), mode, caller, rdev=rdev, target=target)
            made = self._index.made(status, (directory, name))
            self._changed(directory, subdirectories=int(made.is_directory))
            return made.node

    def _make_over(
        self, above: Descriptor, name: bytes, mode: int, caller: Caller, rdev: int, target: bytes
    ) -> os.stat_result:
        """Make something where a whiteout is, which goes in the same moment."""
        work = self._upper.work.fd
        self._upper.clear(NEW)
        status = self._upper.make((work, NEW), mode, caller, rdev=rdev, target=target)
        try:
            if stat.S_ISDIR(mode):
                opened = self._upper.open_new()
                self._upper.mark_opaque(opened)
                rename_at((work, NEW), (above.fd, name), RENAME_EXCHANGE)
            else:
                os.rename(NEW, name, src_dir_fd=work, dst_dir_fd=above.fd)
        finally:
            self._upper.clear(NEW)
        return status

    # ------------------------------------------------------------------ removing and renaming

    def unlink(self, directory: int, name: bytes, *, again: bool = False) -> None:
        """Take away a name that is no directory's."""
        with self._lock:
            node = self._existing(directory, name, again=again)
            if not node:
                return
            if self._is_directory(node):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._remove(node, (directory, name), hides=bool(self._index.below(directory, name)))

    def rmdir(self, directory: int, name: bytes, *, again: bool = False) -> None:
        """Take away an empty directory."""
        with self._lock:
            node = self._existing(directory, name, again=again)
            if not node:
                return
            self._refuse_full(node)
            self._remove(node, (directory, name), hides=bool(self._index.below(directory, name)))

    def rename(
        self,
        directory: int,
        name: bytes,
        to_directory: int,
        to_name: bytes,
        *,
        flags: int = 0,
        again: bool = False,
    ) -> None:
        """Rename; `flags` are 0 or RENAME_NOREPLACE, others are refused with EINVAL."""
        if flags not in (0, RENAME_NOREPLACE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with self._lock:
            node = self._existing(directory, name, again=again)
            if not node:
                return
            if len(to_name) > NAME_BYTES:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            target = self._index.lookup(to_directory, to_name)
            if target and flags == RENAME_NOREPLACE:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            if node == target:
                return
            self._refuse_rename(node, to_directory, target)
            self._rename(node, (directory, name), (to_directory, to_name), target)

    def _rename(self, node: int, place: Place, to_place: Place, target: int) -> None:
        found = self._copy.any(node)
        to = self._copy.directory(to_place[0])
        above = self._copy.directory(place[0])
        source, there = (above.fd, place[1]), (to.fd, to_place[1])
        self._mark_origin(found)
        if found.is_directory and not found.lower and self._index.below(*to_place):
            self._upper.mark_opaque(self._copy.open(found))
        hides = bool(self._index.below(*place))
        if target and (hides or found.is_directory):
            self._remove(target, to_place, hides=True)
            target = 0
        covered = self._index.names[to_place[0]].get(to_place[1]) == HIDDEN
        if hides or (found.is_directory and covered):
            # What was hidden stays hidden in the same moment as the name appears elsewhere.
            if not covered:
                self._upper.whiteout(there)
                self._index.take(None, to_place, hides=True)
            rename_at(source, there, RENAME_EXCHANGE)
            if not hides:
                os.unlink(source[1], dir_fd=source[0])
        else:
            gone = self._index.objects.get(target)
            if gone is not None:
                self._keep_gone(gone, to_place)
            elif target:
                self._removed.add(target)
            os.rename(source[1], there[1], src_dir_fd=source[0], dst_dir_fd=there[0])
            if gone is not None:
                self._index.take(gone, to_place, hides=False)
                self._settle(gone)
        self._index.take(found, place, hides=hides)
        self._index.put(found, to_place)
        self._touch(found)
        self._changed(place[0], subdirectories=-int(found.is_directory))
        self._changed(to_place[0], subdirectories=int(found.is_directory))

    def _keep_gone(self, gone: Object, place: Place) -> None:
        """Have a file that is about to be replaced stay for those who have it open."""
        if len(gone.places) == 1:
            above = self._copy.directory(place[0])
            name = self._upper.gone_name(gone.node)
            self._upper.clear(name)
            os.link(
                place[1], name, src_dir_fd=above.fd, dst_dir_fd=self._upper.work.fd,
                follow_symlinks=False,
            )  # fmt: skip

    def _remove(self, node: int, place: Place, *, hides: bool) -> None:
        """Take a name away, leaving a whiteout if something is to be hidden."""
        directory, name = place
        above = self._copy.directory(directory)
        found = self._index.objects.get(node)
        last = found is not None and len(found.places) == 1
        gone, work = self._upper.gone_name(node), self._upper.work.fd
        if last:
            if hides:
                self._upper.stage_whiteout(gone, above.fd)
                rename_at((work, gone), (above.fd, name), RENAME_EXCHANGE)
            else:
                self._upper.clear(gone)
                os.rename(name, gone, src_dir_fd=above.fd, dst_dir_fd=work)
        elif hides:
            self._upper.whiteout((above.fd, name))
        else:
            os.unlink(name, dir_fd=above.fd)
        self._index.take(found, place, hides=hides)
        self._changed(directory, subdirectories=-int(self._is_directory(node)))
        if found is None:
            self._removed.add(node)
        else:
            self._settle(found)

    def _settle(self, found: Object) -> None:
        """Destroy what has lost its last name, unless somebody has it."""
        # A successor does not know what the kernel held when it came: that will be told.
        if not found.places and not self._again and not self._held.get(found.node):
            self._destroy(found)

    def _destroy(self, found: Object) -> None:
        self._copy.let_go(found.node)
        self._index.drop(found.node)
        self._listings.pop(found.node, None)
        self._upper.clear(self._upper.gone_name(found.node))

    # ------------------------------------------------------------------ their parts

    def _free(self, directory: int, name: bytes, *, again: bool) -> int:
        """Return 0 if a name can be given, or its node when it was given to this request before."""
        if len(name) > NAME_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        there = self._index.lookup(directory, name)
        if there and not again:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        return there

    def _existing(self, directory: int, name: bytes, *, again: bool) -> int:
        """Return the node of a name, 0 when this request took it away before."""
        node = self._index.lookup(directory, name)
        if not node and not again:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return node

    def _is_directory(self, node: int) -> bool:
        found = self._index.objects.get(node)
        return found.is_directory if found is not None else self._tree.is_directory(node)

    def _refuse_full(self, node: int) -> None:
        if not self._is_directory(node):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if self.listing(node):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    def _refuse_rename(self, node: int, to_directory: int, target: int) -> None:
        if self._is_directory(node):
            above = to_directory
            while above not in (ROOT, node):
                above = self.parent(above)
            if above == node:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if target:
                self._refuse_full(target)
        elif target and self._is_directory(target):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    def _mark_origin(self, found: Object) -> None:
        """See that an input is known for what it is under any name."""
        if found.lower and (found.is_directory or found.shows):
            self._upper.mark_origin(self._copy.open(found), self._lower.path(found.lower))

    def _touch(self, found: Object) -> None:
        if found.is_directory and found.lower:
            self._touched[found.node] = time.clock_gettime_ns(_KERNEL_CLOCK)

    def _changed(self, directory: int, *, subdirectories: int = 0) -> None:
        """Note that a directory's names have changed, and how many subdirectories came or went."""
        self._listings.pop(directory, None)
        if directory in self._subdirectories:
            self._subdirectories[directory] += subdirectories

    def _count_subdirectories(self, directory: int) -> int:
        count = self._subdirectories.get(directory)
        if count is None:
            count = sum(self._is_directory(node) for _, _, node in self.listing(directory))
            self._subdirectories[directory] = count
        return count

    def _attributes(self, found: Object) -> Attributes:
        status = self._status(found)
        nlink, size, blocks = len(found.places), status.st_size, status.st_blocks
        ctime_ns = status.st_ctime_ns
        if found.is_directory:
            nlink = 2 + self._count_subdirectories(found.node) if found.places else 0
            if found.lower:
                # As if it had not been brought in, of which the kernel knows nothing.
                size = blocks = 0
                ctime_ns = max(status.st_mtime_ns, self._touched.get(found.node, 0))
        elif found.shows:
            blocks = -(-size // BLOCK_BYTES)
        return Attributes(
            found.node, status.st_mode, nlink, status.st_uid, status.st_gid, status.st_rdev,
            size, blocks, status.st_atime_ns, status.st_mtime_ns, ctime_ns,
        )  # fmt: skip

    def _status(self, found: Object) -> os.stat_result:
        opened = self._copy.find(found.node)
        if opened is not None:
            return os.fstat(opened.fd)
        above, name = self._copy.at(found)
        return os.stat(name, dir_fd=above.fd, follow_symlinks=False)

    def _below(self, node: int) -> int:
        """Return the tree's node of a file that shows it."""
        found = self._index.objects.get(node)
        return node if found is None else found.lower

    def _content(self, node: int) -> Descriptor | None:
        """Return a file of the upper directory; None when its content is the tree's."""
        with self._lock:
            found = self._index.objects.get(node)
            if found is None or found.shows:
                return None
            return self._copy.open(found)

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
            os.removexattr(opened.fd, self._upper.marks.metacopy)

    def _set_times(self, found: Object, at: Place, changes: Changes) -> None:
        set_times(at, changes.atime_ns, changes.mtime_ns)
        status = os.stat(at[1], dir_fd=at[0], follow_symlinks=False)
        self._copy.keeps_times(found.node, (status.st_atime_ns, status.st_mtime_ns))

    def _for_xattr(self, node: int, name: bytes) -> int:
        if not self._upper.may_be(name):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if self._upper.is_private(name):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        found = self._copy.any(node)
        if not _may_have_xattrs(found):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return self._copy.open(found).fd


def _may_have_xattrs(found: Object) -> bool:
    return found.mode in (stat.S_IFREG, stat.S_IFDIR)


def _list(below: Mapping[bytes, int], names: dict[bytes, int]) -> list[Listed]:
    shown = [
        (position, name, names.get(name, node))
        for position, (name, node) in enumerate(below.items(), start=1)
    ]
    made = [
        (_MADE_POSITION | xxhash.xxh3_64_intdigest(name) >> 3, name, node)
        for name, node in names.items()
        if name not in below
    ]
    return [listed for listed in (*shown, *sorted(made)) if listed[2] != HIDDEN]
