"""How what is written to a mount can be kept on this host, found out by trying.

Overlayfs keeps it at the kernel's own speed, and needs CAP_SYS_ADMIN and a file system of a kind.
Our server's own overlay needs neither, and writes the same directory.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.detached_mount import mount_detached
from agent_plugin.content.errors import local_write_error
from agent_plugin.content.mount_spec import OVERLAY, OVERLAYFS
from agent_plugin.content.overlay_marks import OPAQUE, TRUSTED_MARKS, USER_MARKS, marks_of
from agent_plugin.content.pinned import own_directory

AUTO: Final = "auto"
# What overlayfs takes for its own in a path among its options.
SPECIAL_CHARACTERS: Final = frozenset(",:\\")


@dataclass(frozen=True, slots=True)
class WritesChoice:
    """Which of the two was chosen, and why."""

    writes: str
    reason: str


def choose_writes(wished: str, work_dir: Path) -> WritesChoice:
    """Decide for one mount.

    Args:
        wished: `auto`, or what was asked for.
        work_dir: The mount's; made if need be.

    Raises:
        NoSpaceError, LocalWriteError: Nothing can be written there.
    """
    if wished != AUTO:
        return WritesChoice(wished, "it was asked for")
    obstacle = overlayfs_obstacle(work_dir)
    if obstacle:
        return WritesChoice(OVERLAY, obstacle)
    return WritesChoice(OVERLAYFS, "it is the faster one, and this host can")


def overlayfs_obstacle(work_dir: Path) -> str:
    """Return why overlayfs can not keep what is written there; empty if it can.

    Raises:
        NoSpaceError, LocalWriteError: Nothing can be written there.
    """
    if set(os.fspath(work_dir)) & SPECIAL_CHARACTERS:
        return f"{work_dir} has a character that overlayfs takes for its own"
    if marks_of(work_dir / "upper") == USER_MARKS:
        return f"what is in {work_dir} was not written by way of overlayfs"
    try:
        with (
            own_directory(work_dir, make=True) as fd,
            tempfile.TemporaryDirectory(dir=f"/proc/self/fd/{fd}", prefix="probe-") as scratch,
        ):
            return _try(Path(scratch))
    except OSError as error:
        raise local_write_error(error, os.fspath(work_dir)) from error


def _try(scratch: Path) -> str:
    for name in ("lower", "upper", "work"):
        (scratch / name).mkdir()
    try:
        os.setxattr(scratch / "upper", TRUSTED_MARKS.opaque, OPAQUE)
        os.removexattr(scratch / "upper", TRUSTED_MARKS.opaque)
    except OSError as error:
        # In a user namespace overlayfs mounts all the same, and then forgets what was removed.
        return f"overlayfs's marks can not be set: {error.strerror}"
    directories = {f"{name}dir": f"{scratch}/{name}" for name in ("lower", "upper", "work")}
    try:
        options = directories | {"metacopy": "on", "redirect_dir": "on", "index": "off"}
        os.close(mount_detached(b"overlay", options))
    except OSError as error:
        return f"overlayfs can not be mounted: {error.strerror}"
    return ""
