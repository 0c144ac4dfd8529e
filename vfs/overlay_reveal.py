"""What was written over some inputs is laid over others: what came since is not to be hidden.

The worker agent takes a root away and mounts it again with the outputs of other steps among its
inputs. Above the old ones lie marks that hide whatever is below: overlayfs makes a directory opaque
that a job has made where nothing was, and a whiteout hides all of its name. So before such a mount
is made, marks are narrowed to what they hid: inputs that are the same now stay hidden, one by one
where they must be, and those that are new or others show.

What a job wrote stays in any case. Of a file whose attributes alone were changed the content was
the input's; where that is another one now, the job's change to it is dropped.

Nothing is mounted meanwhile, and the directory is this process's alone.
"""

import os
import stat
from collections.abc import Callable
from functools import cached_property

from agent_plugin.content import events
from agent_plugin.content.overlay_marks import OPAQUE, read_mark, redirected
from vfs.nodes import Caller
from vfs.overlay_upper import Descriptor, Upper, open_directory
from vfs.tree import Tree

_DIRECTORY_MODE = stat.S_IFDIR | 0o755

log = events.get_logger()


class Revealing:
    """Narrows the marks of an upper directory.

    Args:
        upper: The directory.
        before: Makes the tree that it was written over; asked if there is a mark at all.
        after: The tree that it will be seen over.
        owner: Whose the directories are that are made for what shows through.
    """

    def __init__(
        self, upper: Upper, before: Callable[[], Tree], after: Tree, owner: Caller
    ) -> None:
        self._upper = upper
        self._make_before = before
        self._after = after
        self._owner = owner
        self._news: dict[tuple[int, int], bool] = {}

    @cached_property
    def _before(self) -> Tree:
        return self._make_before()

    def run(self) -> None:
        """Do it; what was killed in between can be done again.

        Raises:
            OSError: The directory can not be changed.
            ManifestInvalidError: What it was written over is not known any more.
        """
        self._merged(self._upper.root, "")

    def _merged(self, directory: Descriptor, path: str) -> None:
        """Look through a directory through which inputs show."""
        for name, status in _entries(directory):
            below = f"{path}/{os.fsdecode(name)}".lstrip("/")
            if self._upper.marks.is_whiteout(directory.fd, name, status):
                if self._has_news(*self._nodes(below)):
                    os.unlink(name, dir_fd=directory.fd)
                    self._hide_old(directory, name, below)
            elif stat.S_ISREG(status.st_mode):
                self._see_file(directory, name, below)
            elif stat.S_ISDIR(status.st_mode):
                opened = open_directory(name, directory.fd)
                marks = self._upper.marks
                if read_mark(opened.fd, marks.redirect) is not None:
                    continue
                if read_mark(opened.fd, marks.opaque) != OPAQUE:
                    self._merged(opened, below)
                elif self._has_news(*self._nodes(below)):
                    self._covering(opened, below)

    def _covering(self, directory: Descriptor, path: str) -> None:
        """Have a directory that hides all below it hide only what is old."""
        entries = dict(_entries(directory))
        for name in self._names(path):
            below = f"{path}/{os.fsdecode(name)}"
            status = entries.get(name)
            if status is None:
                self._hide_old(directory, name, below)
            elif stat.S_ISDIR(status.st_mode):
                opened = open_directory(name, directory.fd)
                if read_mark(opened.fd, self._upper.marks.redirect) is not None:
                    continue
                if self._has_news(*self._nodes(below)):
                    self._covering(opened, below)
                else:
                    self._upper.mark_opaque(opened)
        # At last: until then it still hides everything.
        if read_mark(directory.fd, self._upper.marks.opaque) == OPAQUE:
            os.removexattr(directory.fd, self._upper.marks.opaque)

    def _hide_old(self, directory: Descriptor, name: bytes, path: str) -> None:
        """Hide of a name that a directory lacks what is the same as it was."""
        was, now = self._nodes(path)
        if not was or not now:
            return
        if not self._has_news(was, now):
            self._upper.whiteout((directory.fd, name))
        elif self._before.is_directory(was) and self._after.is_directory(now):
            self._upper.make((directory.fd, name), _DIRECTORY_MODE, self._owner)
            opened = open_directory(name, directory.fd)
            for inside in self._names(path):
                self._hide_old(opened, inside, f"{path}/{os.fsdecode(inside)}")

    def _see_file(self, directory: Descriptor, name: bytes, path: str) -> None:
        """Drop a file without content of its own, if its content is another one now."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
        try:
            if read_mark(fd, self._upper.marks.metacopy) is None:
                return
            redirect = read_mark(fd, self._upper.marks.redirect)
        finally:
            os.close(fd)
        origin = path if redirect is None else redirected(redirect, path)
        if self._has_news(*self._nodes(origin)):
            os.unlink(name, dir_fd=directory.fd)
            reason = "its attributes were changed, and its content is another one now"
            log.warning(events.MOUNT_CHANGE_DROPPED, extra={"path": path, "reason": reason})

    def _names(self, path: str) -> list[bytes]:
        now = self._after.find(path)
        return list(self._after.names(now)) if now and self._after.is_directory(now) else []

    def _nodes(self, path: str) -> tuple[int, int]:
        """Return what is at a path in both trees; 0 for nothing."""
        return self._before.find(path) or 0, self._after.find(path) or 0

    def _has_news(self, was: int, now: int) -> bool:
        """Whether anything at or below a place is new, or has another content than it had."""
        if not now:
            return False
        known = self._news.get((was, now))
        if known is None:
            known = self._news[was, now] = self._look_for_news(was, now)
        return known

    def _look_for_news(self, was: int, now: int) -> bool:
        before, after = self._before, self._after
        if not after.is_directory(now):
            same = was and not before.is_directory(was)
            return not (same and before.digest(was) == after.digest(now))
        if not was or not before.is_directory(was):
            return True
        names = before.names(was)
        return any(
            self._has_news(names.get(name, 0), node) for name, node in after.names(now).items()
        )


def _entries(directory: Descriptor) -> list[tuple[bytes, os.stat_result]]:
    with os.scandir(directory.fd) as entries:
        return [(os.fsencode(entry.name), entry.stat(follow_symlinks=False)) for entry in entries]
