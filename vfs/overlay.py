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
from typing import Final

from vfs.nodes import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    Caller,
    WritableNodes,
)
from vfs.overlay_files import OverlayFiles
from vfs.overlay_index import HIDDEN, Object
from vfs.overlay_upper import (
    NEW,
    Descriptor,
    Place,
    permitted,
    rename_at,
)
from vfs.tree import ROOT

NAME_BYTES: Final = 255


class Overlay(OverlayFiles):
    """The nodes of a mount that takes writes: here what changes names; as `OverlayNodes`."""

    @property
    def writable(self) -> WritableNodes:
        """This."""
        return self

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
                with permitted(opened.fd):
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
                self._upper.let_move((above.fd, name))
                rename_at((work, gone), (above.fd, name), RENAME_EXCHANGE)
            else:
                self._upper.clear(gone)
                self._upper.let_move((above.fd, name))
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

    def _changed(self, directory: int, *, subdirectories: int = 0) -> None:
        """Note that a directory's names have changed, and how many subdirectories came or went."""
        self._listings.pop(directory, None)
        if directory in self._subdirectories:
            below, count = self._subdirectories[directory]
            self._subdirectories[directory] = below, count + subdirectories
