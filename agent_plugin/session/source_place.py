"""Where an input source is in a session directory, reached past whatever a job has put there.

A job may write to its session directory, and replace directories in it by links; hooks may run with
rights that it has not. So everything goes from descriptor to descriptor, and follows no link.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import local_write_error
from agent_plugin.content.leftovers import remove_tree
from agent_plugin.session.inputs import hidden_root
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.state import COPIED, RootState, SessionState
from agent_plugin.session.virtual import work_dir_name

# O_PATH, since a job may have taken the right to read it away.
_OPEN: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def way_to(directory: str, names: Sequence[str]) -> Iterator[list[int]]:
    """Open a directory and those below it, each in the one before.

    Args:
        directory: Opened as it is, links followed.
        names: Of the others, which are no links.

    Returns:
        As a context manager: their descriptors, of `directory` first.

    Raises:
        FileNotFoundError, NotADirectoryError: One is not there, or no directory.
        OSError: One can not be opened.
    """
    with ExitStack() as opened:
        fds: list[int] = []
        for name in (directory, *names):
            below = {"dir_fd": fds[-1]} if fds else {}
            fd = os.open(name, _OPEN | (os.O_NOFOLLOW if fds else 0), **below)
            opened.callback(os.close, fd)
            fds.append(fd)
        yield fds


def names_above(root: RootState, state: SessionState) -> tuple[str, ...]:
    """Return the names of the directories between a session's and what is in its place."""
    # Only an input source may be further down.
    if root.source is None:
        return ()
    return Path(root.local_root).parent.relative_to(state.session_dir).parts


def set_aside(root: RootState, state: SessionState, mounts: Mounts) -> None:
    """Take the part of a source away from where tasks see it; nothing happens if none is there.

    A copied part waits under its hidden name, where the next part takes over what they share and
    removes the rest. A mounted one ends, and what was written to it goes. The root's state is
    changed and not written: whoever calls has written before that the part is not in place.

    Raises:
        PropmasterError: It can not be unmounted, renamed or removed.
    """
    place = Path(root.local_root)
    stays = root.part is not None and root.file_system == COPIED
    if root.file_system != COPIED or mounts.knows(place):
        mounts.end(place)
    root.part, root.file_system, root.written_to, root.control = None, COPIED, "", ""
    root.errors_told = 0
    if root.snapshot:
        _take_away(root, state, keep=stays)


def remove_hidden(root: RootState, state: SessionState) -> None:
    """Remove what waits under a source's hidden name.

    Raises:
        PropmasterError: It can not be removed.
    """
    with _in_place(root, state) as fd:
        if fd is not None:
            remove_tree(fd, hidden_root(Path(root.local_root)).name)


def _take_away(root: RootState, state: SessionState, *, keep: bool) -> None:
    place = Path(root.local_root)
    with _in_place(root, state) as fd:
        if fd is None:
            return
        remove_tree(fd, work_dir_name(place))
        if keep:
            hidden = hidden_root(place).name
            with suppress(FileNotFoundError):
                os.stat(place.name, dir_fd=fd, follow_symlinks=False)
                remove_tree(fd, hidden)
                os.rename(place.name, hidden, src_dir_fd=fd, dst_dir_fd=fd)
        else:
            # Of a part that never came to its place, or a job's own: no task is to find it.
            remove_tree(fd, place.name)


@contextmanager
def _in_place(root: RootState, state: SessionState) -> Iterator[int | None]:
    """Open the directory that a source is in; None where a job has put something else."""
    with ExitStack() as opened:
        try:
            try:
                way = way_to(os.path.realpath(state.session_dir), names_above(root, state))
                fd = opened.enter_context(way)[-1]
            except (FileNotFoundError, NotADirectoryError):
                fd = None
            yield fd
        except OSError as error:
            raise local_write_error(error, root.local_root) from error
