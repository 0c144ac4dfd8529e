"""Roots that the worker agent's own command mounts, outside of what a session knows.

The agent has a root mounted before anybody starts a session of ours, takes it away, and has it
mounted again with more inputs; it says nothing of what was written meanwhile. That lies in the
session directory, is there again with the next mount, and is what becomes the outputs.

Between two mounts it is given to the job's user, who at a session's end removes what is in the
session directory (the agent has it do that); so it is not looked at as if it were ours alone before
it was taken back.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent_plugin.content.digest import hash_name
from agent_plugin.content.errors import local_write_error
from agent_plugin.content.leftovers import partial_name, remove_tree
from agent_plugin.content.mount_spec import INPUTS
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.state import VIRTUAL, SessionState
from agent_plugin.session.virtual import work_dir_name

# What is there again with the next mount, and of which kind it has to be.
_KEPT: Final = {"upper": stat.S_ISDIR, INPUTS: stat.S_ISREG}
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def adopt_mounts(state: SessionState, mounts: Mounts) -> bool:
    """Have a session know the roots that are mounted: their outputs are what was written to them.

    Call it before `finish_task`, on what is then written to the state file. Roots that the session
    has mounted itself stay as they are.

    Args:
        state: The session; its roots are changed.
        mounts: The host's.

    Returns:
        Whether a root was found that was mounted, or mounted anew, since this was last asked.

    Raises:
        SessionStateError: What is known of a mount can not be read.
    """
    adopted = False
    for root in state.roots:
        found = mounts.spec_of(Path(root.local_root))
        if found is None:
            continue
        spec, process = found
        if not process or root.served_by == process or not spec.gives_back:
            continue
        root.file_system = VIRTUAL
        root.written_to, root.control = os.fspath(spec.upper), spec.control
        root.served_by, root.errors_told = process, 0
        adopted = True
    return adopted


def kept_writes(local_root: Path, session_dir: Path) -> Path:
    """Return where what is written to a root is kept: in the session directory, by its name."""
    if local_root.parent == session_dir:
        return session_dir / work_dir_name(local_root)
    name = f"{local_root.name[:100]}-{hash_name(os.fspath(local_root))[:16]}-mount"
    return session_dir / partial_name(name)


def take_back(work_dir: Path, uid: int) -> None:
    """Make what a user was given when a root was unmounted this process's own again.

    Nothing happens if it was not given, or is not there.

    Args:
        work_dir: Absolute, without links above it.
        uid: To whom it was given.

    Raises:
        LocalWriteError: It can not be made so.
    """
    if os.geteuid() != 0 or uid == 0:
        return
    try:
        fd = os.open(work_dir, _DIRECTORY)
    except OSError:
        # Not there, or in a way that whoever mounts refuses.
        return
    try:
        if os.fstat(fd).st_uid != uid:
            return
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o700)
        # From here on nobody else changes what is in it. All but what was written is made anew.
        for name in os.listdir(fd):  # noqa: PTH208 - a descriptor
            is_kept = name in _KEPT and _KEPT[name](_mode(fd, name))
            if not is_kept:
                remove_tree(fd, name)
    except OSError as error:
        raise local_write_error(error, os.fspath(work_dir)) from error
    finally:
        os.close(fd)


def _mode(directory: int, name: str) -> int:
    with suppress(FileNotFoundError):
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    return 0
