"""What was written above a mount: read from an overlay's upper directory, whatever lies below.

The cost is that of what changed, not of the inputs. Where something is not in the upper directory
as it stands (a renamed directory of inputs, a file whose mode alone was changed) its content is
that of an input, and the mount says which.
"""

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent_plugin.content import events
from agent_plugin.content.errors import LocalReadError
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.overlay_marks import OPAQUE, Marks, marks_of, read_mark, redirected
from agent_plugin.content.pinned import own_directory
from agent_plugin.content.snapshot import FoundFile
from agent_plugin.content.store import Cancellation
from agent_plugin.session.roots import is_below

# Given paths below the root, returns for each the inputs that are at it or below it.
Inputs = Callable[[Sequence[str]], Sequence[Sequence[FileEntry]]]

log = events.get_logger()


@dataclass(slots=True)
class Written:
    """What is not as the inputs have it, in the output directories.

    Attributes:
        files: Regular files with content of their own, by path.
        moved: Inputs that stand under another path, by that path.
        links: Symbolic links.
        gone: Inputs that are not at their path any more.
    """

    files: dict[str, FoundFile] = field(default_factory=dict)
    moved: dict[str, FileEntry] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    gone: dict[str, FileEntry] = field(default_factory=dict)


def find_written(
    upper: Path, directories: Sequence[str], inputs: Inputs, cancellation: Cancellation
) -> Written:
    """Return what was written in the output directories.

    Args:
        upper: The upper directory.
        directories: Relative to the root, `/` separated; `.` is all.
        inputs: Asks the mount.
        cancellation: Checked at each directory.

    Raises:
        CancelledError: Cancellation was wished.
        LocalReadError: A directory or its marks can not be read.
    """
    walk = _Walk(inputs, directories, cancellation, marks_of(upper))
    try:
        with own_directory(upper.parent) as above:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(upper.name, flags, dir_fd=above)
    except OSError as error:
        raise LocalReadError(f"{upper}: {error.strerror}") from error
    walk.enter(fd, "", "")
    return walk.finished()


class _Walk:
    def __init__(
        self, inputs: Inputs, directories: Sequence[str], cancellation: Cancellation, marks: Marks
    ) -> None:
        self._marks = marks
        self._inputs = inputs
        self._directories = directories
        self._cancellation = cancellation
        self._written = Written()
        # Paths of which all inputs are hidden, and (from, to) of what shows through elsewhere.
        self._hidden: list[str] = []
        # Inputs that are what they were but for their attributes, and stand in the upper layer.
        self._touched: set[str] = set()
        self._shown: list[tuple[str, str]] = []

    def enter(self, fd: int, path: str, below: str | None) -> None:
        """Look through a directory, whose descriptor is closed.

        Args:
            fd: The directory in the upper layer.
            path: Where it is seen.
            below: Where the directory of inputs is that shows through; None if none does.
        """
        self._cancellation.check()
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    self._visit(fd, path, below, entry)
        except OSError as error:
            raise LocalReadError(f"{path or '.'}: {error.strerror}") from error
        finally:
            os.close(fd)

    def _visit(self, fd: int, above: str, below: str | None, entry: os.DirEntry[str]) -> None:
        if is_partial(entry.name) and self._pass_over(above, entry):
            return
        path = f"{above}/{entry.name}" if above else entry.name
        try:
            self._look_at(fd, path, below, entry)
        except PermissionError as error:
            # Who is not root can close files to himself; where no output is that is no matter.
            if self._has_outputs(path):
                raise LocalReadError(f"{path}: {error.strerror}") from error

    def _look_at(self, fd: int, path: str, below: str | None, entry: os.DirEntry[str]) -> None:
        lower = None if below is None else f"{below}/{entry.name}" if below else entry.name
        status = entry.stat(follow_symlinks=False)
        if self._marks.is_whiteout(fd, entry.name, status):
            if lower is not None:
                self._hidden.append(path)
        elif stat.S_ISDIR(status.st_mode):
            self._visit_directory(fd, entry.name, path, lower)
        elif stat.S_ISREG(status.st_mode):
            self._visit_file(fd, entry.name, path, lower, status)
        elif stat.S_ISLNK(status.st_mode):
            if lower is not None:
                self._hidden.append(path)
            if self._is_output(path):
                self._written.links.append(path)
        else:
            if lower is not None:
                self._hidden.append(path)
            extra = {"path": path, "reason": "not a regular file"}
            log.warning(events.FILE_SKIPPED, extra=extra)

    def _pass_over(self, above: str, entry: os.DirEntry[str]) -> bool:
        """Whether something has its name from us, and is nobody's output."""
        if entry.is_file(follow_symlinks=False):
            extra = {"path": f"{above}/{entry.name}", "reason": "a temporary file of ours"}
            log.warning(events.FILE_SKIPPED, extra=extra)
            return True
        # From where the outputs of another step came to their places.
        return not above

    def _visit_directory(self, fd: int, name: str, path: str, lower: str | None) -> None:
        opened = os.open(
            name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd
        )
        redirect = read_mark(opened, self._marks.redirect)
        if redirect is not None:
            origin = redirected(redirect, lower or path)
            if origin != path:
                self._hidden.append(path)
                self._shown.append((origin, path))
            lower = origin
        elif read_mark(opened, self._marks.opaque) == OPAQUE:
            self._hidden.append(path)
            lower = None
        self.enter(opened, path, lower)

    def _visit_file(
        self, fd: int, name: str, path: str, lower: str | None, status: os.stat_result
    ) -> None:
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        # A directory of inputs may have been in its place.
        self._hidden.append(path)
        try:
            if read_mark(opened, self._marks.metacopy) is None:
                if self._is_output(path):
                    self._written.files[path] = FoundFile.of(path, status)
                return
            redirect = read_mark(opened, self._marks.redirect)
        finally:
            os.close(opened)
        origin = lower or path
        self._touched.add(path)
        if redirect is not None:
            origin = redirected(redirect, origin)
        if origin != path:
            self._shown.append((origin, path))

    def _is_output(self, path: str) -> bool:
        return is_below(path, self._directories)

    def _has_outputs(self, path: str) -> bool:
        """Whether an output can be at a path or below it."""
        return self._is_output(path) or any(
            is_below(directory, [path]) for directory in self._directories
        )

    def finished(self) -> Written:
        """Ask the mount, once for all, what was hidden and what shows through elsewhere."""
        written = self._written
        asked = [*self._hidden, *(origin for origin, _ in self._shown)]
        answers = self._inputs(asked) if asked else []
        hidden = set(self._hidden)
        for (origin, path), entries in zip(self._shown, answers[len(self._hidden) :], strict=True):
            for entry in entries:
                seen = path + entry.path[len(origin) :]
                if self._is_output(seen) and not self._is_covered(path, seen, hidden):
                    written.moved[seen] = entry
        for entries in answers[: len(self._hidden)]:
            for entry in entries:
                if self._is_output(entry.path) and not (
                    entry.path in written.files
                    or entry.path in written.moved
                    or entry.path in self._touched
                ):
                    written.gone[entry.path] = entry
        return written

    def _is_covered(self, directory: str, seen: str, hidden: set[str]) -> bool:
        """Whether an input that a moved directory holds was replaced or removed since."""
        if seen in self._written.files:
            return True
        while seen != directory:
            if seen in hidden:
                return True
            seen = seen.rpartition("/")[0]
        return False
