"""What is in the upper directory, in memory: which node each name is, and what shows through.

The directory alone is what counts: the index is read from it when a server starts, and then follows
what the server does. A node that came from an input keeps the input's number, so whoever has it
open goes on; one that was made here is its inode's number above MADE. Both are found again by a
server's successor, since an inode is not given up before the kernel has forgotten its node.
"""

import errno
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from agent_plugin.content.overlay_marks import OPAQUE, read_mark, redirected
from vfs.overlay_upper import Descriptor, Place, Upper, open_directory, open_regular, permitted
from vfs.tree import ROOT, Names

# Nodes that were made here; below are the tree's.
MADE: Final = 1 << 62
# In place of a node: there is nothing of that name, whatever is below.
HIDDEN: Final = 0


@dataclass(slots=True)
class Object:
    """Something in the upper directory.

    Attributes:
        node: Its number.
        mode: The type, as S_IFMT gives it.
        lower: Of a directory, the tree's whose names show through; of a file, the tree's it was
            once, for its content too as long as `shows` says so. 0 for none.
        shows: Whether a file's content is still the tree's.
        places: Directories, by node, and names; none when it is gone and still open.
    """

    node: int
    mode: int
    lower: int = 0
    shows: bool = False
    places: list[Place] = field(default_factory=list)

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return self.mode == stat.S_IFDIR


class Index:
    """The objects, and their names by directory.

    Args:
        tree: What is below.
        upper: What is read.
        instance: Which mount this is: other mounts' numbers of nodes mean nothing.
        again: Whether there was a server before, whose nodes the kernel knows.
    """

    def __init__(self, tree: Names, upper: Upper, instance: str, *, again: bool) -> None:
        self._tree = tree
        self._upper = upper
        self._instance = instance
        self.objects: dict[int, Object] = {}
        self.names: dict[int, dict[bytes, int]] = {}
        self._add(Object(ROOT, stat.S_IFDIR, ROOT, places=[(ROOT, b".")]))
        self._read()
        if again:
            self._read_gone()
        else:
            upper.clear_work()

    def node_mark(self, node: int) -> bytes:
        """Return what a file that came from an input is marked with."""
        return f"{self._instance}:{node}".encode("ascii")

    def lower(self, directory: int) -> int:
        """Return the tree's directory whose names show through; 0 for none."""
        found = self.objects.get(directory)
        if found is not None:
            return found.lower if found.is_directory else 0
        tree = self._tree
        return directory if tree.exists(directory) and tree.is_directory(directory) else 0

    def below(self, directory: int, name: bytes) -> int:
        """Return what a name would be if the upper directory had nothing of it; 0 for nothing."""
        lower = self.lower(directory)
        return (self._tree.lookup(lower, name) or 0) if lower else 0

    def lookup(self, directory: int, name: bytes) -> int:
        """Return the node of a name; 0 for none."""
        names = self.names.get(directory)
        if names is not None:
            found = names.get(name)
            if found is not None:
                return found
        return self.below(directory, name)

    def place(self, node: int) -> Place | None:
        """Return one place where a node is seen; None when its last name is gone.

        Raises:
            OSError: ESTALE: there is no such node.
        """
        found = self.objects.get(node)
        if found is not None:
            return found.places[0] if found.places else None
        if not self._tree.exists(node):
            raise OSError(errno.ESTALE, "no such node")
        place = self._place_in_tree(node)
        above = place
        # What is in the upper directory and has a name is in directories that have one.
        while above is not None and above[0] not in self.objects:
            above = self._place_in_tree(above[0])
        return place if above is not None and self.objects[above[0]].places else None

    def removed(self) -> set[int]:
        """Return the files of the tree that are seen nowhere any more and were never brought in."""
        covered = [
            below
            for directory, names in self.names.items()
            for name, node in names.items()
            if (below := self.below(directory, name)) not in (0, node)
        ]
        removed: set[int] = set()
        while covered:
            node = covered.pop()
            found = self.objects.get(node)
            if not self._tree.is_directory(node):
                if found is None:
                    removed.add(node)
            elif found is None or not found.places:
                # It was empty when it went; one that was moved has its names elsewhere.
                covered.extend(self._tree.names(node).values())
        return removed

    def _place_in_tree(self, node: int) -> Place | None:
        above = self._tree.parent(node)
        name = self._name(node, above)
        return (above, name) if self.lookup(above, name) == node else None

    def made(self, status: os.stat_result, place: Place, *, lower: int = 0) -> Object:
        """Note what was made under a new name; return it."""
        made = Object(MADE | status.st_ino, stat.S_IFMT(status.st_mode), lower)
        self._add(made)
        self.put(made, place)
        return made

    def copied(self, node: int, mode: int, place: Place | None, *, shows: bool) -> Object:
        """Note that a node of the tree is in the upper directory now; return it."""
        copied = Object(node, mode, node, shows)
        self._add(copied)
        if place is not None:
            self.put(copied, place)
        return copied

    def put(self, found: Object, place: Place) -> None:
        """Note one more name."""
        found.places.append(place)
        self.names[place[0]][place[1]] = found.node

    def take(self, found: Object | None, place: Place, *, hides: bool) -> None:
        """Note that a name is gone, and whether it hides what is below."""
        if found is not None:
            found.places.remove(place)
        if hides:
            self.names[place[0]][place[1]] = HIDDEN
        else:
            self.names[place[0]].pop(place[1], None)

    def drop(self, node: int) -> None:
        """Forget a node that is gone."""
        del self.objects[node]
        self.names.pop(node, None)

    def _add(self, added: Object) -> None:
        self.objects[added.node] = added
        if added.is_directory:
            self.names[added.node] = {}

    def _name(self, node: int, above: int) -> bytes:
        if not self._tree.is_directory(node):
            path = self._tree.entry(node).path
            return path.rpartition("/")[2].encode("utf-8", "surrogateescape")
        names = self._tree.names(above)
        return (
            next(name for name, found in names.items() if found == node) if node != above else b""
        )

    # ------------------------------------------------------------------ from the disk

    def _read(self) -> None:
        linked: dict[int, Object] = {}
        # Depth first, with the directories on the way open: their number is that of a path's parts.
        way = [(ROOT, self._upper.root, _entries(self._upper.root), ExitStack())]
        while way:
            directory, opened, entries, shuts = way[-1]
            if not entries:
                shuts.close()
                way.pop()
                continue
            name, status = entries.pop()
            place = directory, name
            if self._upper.marks.is_whiteout(opened.fd, name, status):
                self.names[directory][name] = HIDDEN
            elif stat.S_ISDIR(status.st_mode):
                inside, shuts = open_directory(name, opened.fd), ExitStack()
                shuts.enter_context(permitted(inside.fd))
                found = self._directory(inside, status, place)
                self.put(found, place)
                way.append((found.node, inside, _entries(inside), shuts))
            else:
                known = linked.get(status.st_ino)
                if known is None:
                    known = self._file((opened.fd, name), status, place)
                    if status.st_nlink > 1:
                        linked[status.st_ino] = known
                self.put(known, place)

    def _directory(self, opened: Descriptor, status: os.stat_result, place: Place) -> Object:
        marks = self._upper.marks
        redirect = read_mark(opened.fd, marks.redirect)
        if redirect is not None:
            lower = self._origin(redirect, place)
        elif read_mark(opened.fd, marks.opaque) == OPAQUE:
            lower = 0
        else:
            lower = self.below(*place)
        if lower and (not self._tree.is_directory(lower) or lower in self.objects):
            lower = 0
        found = Object(lower or MADE | status.st_ino, stat.S_IFDIR, lower)
        self._add(found)
        return found

    def _file(
        self, at: Place, status: os.stat_result, place: Place | None, *, gone: int = 0
    ) -> Object:
        """Note a file that lies in a directory, by its descriptor, and is seen in a place.

        Args:
            at: The directory, and the name in it.
            status: The file's.
            place: None if it is seen nowhere any more.
            gone: The node that it was then.
        """
        found = Object(MADE | status.st_ino, stat.S_IFMT(status.st_mode))
        if stat.S_ISREG(status.st_mode):
            opened = open_regular(at)
            marks = self._upper.marks
            with permitted(opened.fd):
                mark = read_mark(opened.fd, self._upper.node_mark) or b""
                shows = read_mark(opened.fd, marks.metacopy) is not None
                redirect = read_mark(opened.fd, marks.redirect)
            instance, _, node = mark.partition(b":")
            lower = 0
            if instance == self._instance.encode("ascii") and self.is_file(int(node)):
                found.node = lower = int(node)
            elif self.is_file(gone):
                found.node = lower = gone
            elif shows and place is not None:
                lower = self.below(*place) if redirect is None else self._origin(redirect, place)
                if self.is_file(lower) and lower not in self.objects:
                    found.node = lower
            found.lower, found.shows = lower, shows
        self._add(found)
        return found

    def is_file(self, node: int) -> bool:
        """Whether a node is a file of the tree."""
        return self._tree.exists(node) and not self._tree.is_directory(node)

    def _read_gone(self) -> None:
        """Take over what has no names and may still be open."""
        for node, name, status in self._upper.gone():
            at = self._upper.work.fd, name
            if self._upper.marks.is_whiteout(*at, status) or node in self.objects:
                self._upper.destroy(name)
            elif stat.S_ISDIR(status.st_mode):
                self._add(Object(node, stat.S_IFDIR))
            else:
                self._file(at, status, None, gone=node)

    def _origin(self, redirect: bytes, place: Place) -> int:
        above = self.lower(place[0])
        beside = f"{self._path(above)}/{os.fsdecode(place[1])}" if above else ""
        return self._tree.find(redirected(redirect, beside)) or 0

    def _path(self, directory: int) -> str:
        names: list[str] = []
        while directory != ROOT:
            above = self._tree.parent(directory)
            names.append(os.fsdecode(self._name(directory, above)))
            directory = above
        return "/".join(reversed(names))


def _entries(opened: Descriptor) -> list[tuple[bytes, os.stat_result]]:
    with os.scandir(opened.fd) as entries:
        return [(os.fsencode(entry.name), entry.stat(follow_symlinks=False)) for entry in entries]
