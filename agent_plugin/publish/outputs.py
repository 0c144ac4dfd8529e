"""The outputs of one run of a task, as they are to be published: each with its path and its bytes.

The bytes come from the local root, where the task left them; who reads them compares them with
what was stored.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent_plugin.content.errors import FileChangedError, PathClashError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.owner import Owner
from agent_plugin.content.safe_path import Root


@dataclass(frozen=True, slots=True)
class RootOutputs:
    """What a task left below one local root.

    Attributes:
        local_root: The directory.
        follow: Whether it may be a link.
        directory: What its files are put below where each root has a name of its own.
        entries: The files, as their manifest has them.
    """

    local_root: Path
    follow: bool
    directory: str
    entries: Sequence[FileEntry]


@dataclass(frozen=True, slots=True)
class Output:
    """One file to be published.

    Attributes:
        path: Below the key, or in the archive.
        entry: As its manifest has it.
        root: Where it is, open.
    """

    path: str
    entry: FileEntry
    root: Root

    @property
    def shown(self) -> str:
        """Where it is, for people."""
        return f"{self.root.path}/{self.entry.path}"

    def open(self) -> int:
        """Open the file and return its descriptor, which the caller closes.

        Raises:
            FileChangedError: It is not there any more.
            UnsafePathError, LocalReadError: It can not be opened.
        """
        try:
            return self.root.open_file(self.entry.path)
        except FileNotFoundError as error:
            raise self.changed() from error

    def changed(self) -> FileChangedError:
        """Return what to raise when the file is not what was stored."""
        return FileChangedError(
            f"{self.shown} is not what it was when it was stored",
            hint="the task must have ended, and closed its files, before finish-task",
        )


def published_path(root: RootOutputs, entry: FileEntry, *, by_root: bool) -> str:
    """Return what a file is called below a key, or in an archive."""
    return f"{root.directory}/{entry.path}" if by_root else entry.path


def shown_path(text: str) -> str:
    """Return a path, or a text with one, as documents may hold it: a name need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def opened(
    roots: Sequence[RootOutputs], *, by_root: bool, owner: Owner | None
) -> Iterator[list[Output]]:
    """Open the roots and lend their outputs, in the order of their paths' bytes.

    Args:
        roots: Of one task.
        by_root: Whether each root's files are below its own name.
        owner: Whose the files are; None: this process's user's.

    Raises:
        PathClashError: Two roots have a file of one path, or one has a file where another has a
            directory.
    """
    with ExitStack() as stack:
        outputs = []
        for root in roots:
            place = stack.enter_context(Root(root.local_root, follow=root.follow, owner=owner))
            outputs += [
                Output(published_path(root, entry, by_root=by_root), entry, place)
                for entry in root.entries
            ]
        outputs.sort(key=lambda output: os.fsencode(output.path))
        if len(roots) > 1:
            _refuse_clashes(outputs)
        yield outputs


def _refuse_clashes(outputs: Sequence[Output]) -> None:
    seen: dict[str, Output] = {}
    for output in outputs:
        if (other := seen.setdefault(output.path, output)) is not output:
            raise _clash(other, output)
    for output in outputs:
        above = output.path
        while above := above.rpartition("/")[0]:
            if above in seen:
                raise _clash(seen[above], output)


def _clash(one: Output, other: Output) -> PathClashError:
    return PathClashError(
        f"{one.shown} and {other.shown} can not both be published below one key",
        hint="give each root a name of its own: ByRoot: true",
    )
