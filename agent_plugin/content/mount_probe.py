"""By which transport this host can mount, found out without mounting anything.

`kernel` is our own server on /dev/fuse, `fusepy` goes through libfuse 2, which works as well where
only its setuid program `fusermount` may mount.
"""

import ctypes
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content import fusermount
from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.fusermount import may_administer

AUTO: Final = "auto"
KERNEL: Final = "kernel"
FUSEPY: Final = "fusepy"
TRANSPORTS: Final = (AUTO, FUSEPY, KERNEL)

LIBFUSE2: Final = "libfuse.so.2"


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """Which transport was chosen, and why."""

    transport: str
    reason: str


def choose_transport(wished: str, *, kernel_refused: str = "") -> TransportChoice:
    """Decide for one mount.

    Args:
        wished: One of TRANSPORTS.
        kernel_refused: Why the kernel transport turned out impossible when it was tried.

    Raises:
        MountFailedError: This host can not mount by what is wished.
    """
    hint = "`propmaster doctor` says what this host can do"
    kernel = kernel_refused or (kernel_obstacle() if wished != FUSEPY else "")
    if wished == KERNEL and kernel:
        raise MountFailedError(f"the kernel transport can not be used: {kernel}", hint=hint)
    if wished == KERNEL:
        return TransportChoice(KERNEL, "it was asked for")
    if wished == AUTO and not kernel:
        return TransportChoice(KERNEL, "it is the faster one, and this host can")
    fusepy = fusepy_obstacle()
    if fusepy and kernel:
        raise MountFailedError(f"no transport can be used: {kernel}; fusepy: {fusepy}", hint=hint)
    if fusepy:
        raise MountFailedError(f"the fusepy transport can not be used: {fusepy}", hint=hint)
    return TransportChoice(
        FUSEPY, f"the kernel transport: {kernel}" if kernel else "it was asked for"
    )


def kernel_obstacle() -> str:
    """Return why the kernel transport can not be used; empty if nothing is known to stop it.

    That the kernel's protocol is new enough turns out when it is mounted.
    """
    if not may_administer() and fusermount.find() is None:
        return (
            "mounting needs CAP_SYS_ADMIN, which this process has not, or the setuid program"
            " fusermount3 (Debian's package fuse3)"
        )
    return _device_obstacle()


def fusepy_obstacle() -> str:
    """Return why the fusepy transport can not be used; empty if nothing is known to stop it."""
    if importlib.util.find_spec("fuse") is None:
        return "the Python package fusepy is not installed"
    try:
        ctypes.CDLL(os.environ.get("FUSE_LIBRARY_PATH") or LIBFUSE2)
    except OSError as error:
        return f"libfuse 2 can not be loaded (Debian's package libfuse2): {error}"
    if may_administer():
        return _device_obstacle()
    if shutil.which("fusermount") is None:
        return "there is no fusermount in PATH (Debian's package fuse3), and no CAP_SYS_ADMIN"
    return _device_obstacle()


def may_allow_other() -> bool:
    """Whether other users may be let into a mount that this user makes.

    Source: mount.fuse3(8), user_allow_other in /etc/fuse.conf.
    """
    if os.geteuid() == 0:
        return True
    try:
        lines = Path("/etc/fuse.conf").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _device_obstacle() -> str:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse that can be used"
    return ""
