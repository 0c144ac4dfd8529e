"""The directories that a mount works in: its lower mount, and what is written through it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import local_write_error
from agent_plugin.content.mount_spec import NO_WRITES, MountSpec
from agent_plugin.content.pinned import own_directory

# As a root of a session that is copied; the directory above is closed to others.
_UPPER_MODE: Final = 0o755


def make_work_directory(spec: MountSpec) -> None:
    """Make what is missing of them; an upper directory that is there stays as it is.

    Raises:
        LocalWriteError, NoSpaceError: One could not be made.
    """
    try:
        with own_directory(Path(spec.work_dir), make=True) as work_dir:
            for name in ("lower", "work", "spool"):
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=work_dir)
            if spec.writes != NO_WRITES:
                _make_upper(spec, work_dir)
    except OSError as error:
        raise local_write_error(error, spec.work_dir) from error


def _make_upper(spec: MountSpec, work_dir: int) -> None:
    """Make the upper directory, if none is there that has an owner and mode already."""
    with suppress(FileNotFoundError):
        os.stat("upper", dir_fd=work_dir, follow_symlinks=False)
        return
    # Elsewhere, so that whoever is killed leaves none that is not its owner's yet.
    new = "work/upper"
    with suppress(FileExistsError):
        os.mkdir(new, 0o700, dir_fd=work_dir)
    # What is written belongs to the job's user, its root included, if it can.
    if os.geteuid() in (0, spec.uid):
        os.chown(new, spec.uid, spec.gid, dir_fd=work_dir, follow_symlinks=False)
    os.chmod(new, _UPPER_MODE, dir_fd=work_dir)
    os.rename(new, "upper", src_dir_fd=work_dir, dst_dir_fd=work_dir)
