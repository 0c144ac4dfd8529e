"""mount(2) for the lower file system and the writable one above it, and their orderly end.

Needs CAP_SYS_ADMIN, but for the lower one, which fusermount can make and take away for who has it
not. How a mount ends, each step with a limit in time: asked nicely; who holds it is
named; taken out of the tree, while those who have something open keep it for a moment; then the
server ends, and whoever still reads gets an error.
"""

import ctypes
import errno
import os
import time
from pathlib import Path
from typing import Final

from agent_plugin.content import events, fusermount
from agent_plugin.content.errors import LocalError, LocalWriteError, local_write_error
from agent_plugin.content.fusermount import may_administer
from agent_plugin.content.mount_probe import may_allow_other
from agent_plugin.content.mount_table import holders, is_mounted, read_mounts, unmount
from agent_plugin.content.pinned import pinned
from agent_plugin.content.writes_probe import SPECIAL_CHARACTERS
from vfs.transports.kernel_transport import MAX_READ_BYTES

_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
# Source: linux/mount.h, asm-generic/unistd.h; the numbers are the same on all platforms.
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_AT_FDCWD: Final = -100
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_MOVE_MOUNT_BENEATH: Final = 0x200
# How long whoever is just leaving the mount is waited for.
BUSY_SECONDS: Final = 2.0
_BUSY_POLL_SECONDS: Final = 0.05
# The kernel's default of 128 KiB makes eight requests of one.
READ_AHEAD_KIB: Final = MAX_READ_BYTES // 1024
FUSE_KIND: Final = "propmaster"
_ORIGIN: Final = "trusted.overlay.origin"

log = events.get_logger()


def mount_fuse(at: Path, name: str, *, writable: bool = False) -> int:
    """Mount a FUSE file system; return /dev/fuse, on which INIT waits to be answered.

    Args:
        at: An existing directory.
        name: What stands in the mount table as the source.
        writable: Whether anything may be changed there.

    Raises:
        LocalWriteError: The host can not, or this process may not.
    """
    if not may_administer():
        return _mount_by_fusermount(at, name, writable=writable)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(f"/dev/fuse: {error.strerror}") from error
    options = (
        f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
        f",allow_other,default_permissions,max_read={MAX_READ_BYTES}"
    )
    try:
        # Read-only if it can be: otherwise each read makes the kernel ask for the time of access.
        flags = _MS_NOSUID | _MS_NODEV | (0 if writable else _MS_RDONLY)
        _mount(name, at, f"fuse.{FUSE_KIND}", flags, options)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount_by_fusermount(at: Path, name: str, *, writable: bool) -> int:
    options = [
        "rw" if writable else "ro",
        "nosuid",
        "nodev",
        "default_permissions",
        f"max_read={MAX_READ_BYTES}",
    ]
    options += [f"fsname={name}", f"subtype={FUSE_KIND}"]
    if may_allow_other():
        options.append("allow_other")
    try:
        return fusermount.mount(at, options)
    except OSError as error:
        raise _refused(f"fuse.{FUSE_KIND} can not be mounted at {at}: {error.strerror}") from error


def mount_overlay(lower: Path, upper: Path, work: Path, at: Path, name: str) -> None:
    """Mount a writable view of `lower`; what is written goes to `upper`.

    Renaming a directory of inputs and changing a mode or owner copy no content (redirect_dir,
    metacopy). All but `at` are directories that this process has made, without `,` and `:`.

    Raises:
        LocalWriteError: The host can not, or this process may not.
    """
    for directory in (lower, upper, work):
        if set(os.fspath(directory)) & SPECIAL_CHARACTERS:
            raise _refused(f"{directory} has a character that overlayfs takes for its own")
    try:
        with pinned(lower) as below, pinned(upper) as above, pinned(work) as beside:
            _forget_origins(above)
            # xino: otherwise a file gets another number and device when it is changed first.
            options = (
                f"lowerdir={below},upperdir={above},workdir={beside}"
                ",metacopy=on,redirect_dir=on,index=off,xino=on"
            )
            _mount(name, at, "overlay", _MS_NOSUID | _MS_NODEV, options)
    except OSError as error:
        raise _refused(f"{error.filename}: {error.strerror}") from error


def _forget_origins(upper: Path) -> None:
    """Take away what overlayfs has noted of the inputs that files in `upper` are copies of.

    It notes their node numbers, which are others in the next mount of the same inputs: then it
    takes one file for another, and refuses both (ESTALE, EIO). It does without.
    """
    for folder, _, names in os.walk(upper):
        for path in (folder, *(os.path.join(folder, name) for name in names)):  # noqa: PTH118
            try:
                os.removexattr(path, _ORIGIN, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.ENOTSUP, errno.ENOENT):
                    raise local_write_error(error, path) from error


def swap_in(staged: Path, at: Path) -> None:
    """Put what is mounted at `staged`, and nobody uses, in the place of what is mounted at `at`.

    Whoever looks there sees the one or the other, never what is below; on kernels before 6.5 only
    nearly never.

    Raises:
        OSError: That is not possible.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    tree = libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(staged), flags)
    if tree < 0:
        raise OSError(ctypes.get_errno(), "open_tree", os.fspath(staged))
    try:
        unmount(staged, lazily=True)
        move = (_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(at))
        if not libc.syscall(*move, _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_BENEATH):
            unmount(at, lazily=True)
            return
        unmount(at, lazily=True)
        if libc.syscall(*move, _MOVE_MOUNT_F_EMPTY_PATH):
            raise OSError(ctypes.get_errno(), "move_mount", os.fspath(at))
    finally:
        os.close(tree)


def device_of(at: Path) -> str:
    """Return the device, `major:minor`, of what is mounted at a path; empty if nothing is."""
    # By the kernel's table: a server that has just died can not answer stat().
    mounts = reversed(read_mounts())
    return next((mount.device for mount in mounts if mount.mountpoint == str(at)), "")


def raise_read_ahead(at: Path) -> None:
    """Have the kernel ask for larger pieces; without the right to, nothing changes."""
    path = Path(f"/sys/class/bdi/{device_of(at)}/read_ahead_kb")
    try:
        path.write_text(str(READ_AHEAD_KIB), encoding="ascii")
    except OSError as error:
        log.info(events.MOUNT_READ_AHEAD_KEPT, extra={"reason": error.strerror})


def end_mount(at: Path, name: str) -> None:
    """Take the mount of that name away; who keeps it from going at once is logged."""
    until = time.monotonic() + BUSY_SECONDS
    while is_mounted(at, name):
        try:
            unmount(at)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() < until:
                time.sleep(_BUSY_POLL_SECONDS)
                continue
            log.warning(
                events.MOUNT_BUSY, extra={"mountpoint": os.fspath(at), "holders": holders(at)}
            )
            unmount(at, lazily=True)


def _mount(source: str, at: Path, kind: str, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with pinned(at) as place:
            arguments = (source.encode(), os.fsencode(place), kind.encode())
            failed = libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options))
            reason = os.strerror(ctypes.get_errno())
    except OSError as error:
        failed, reason = True, str(error.strerror)
    if failed:
        raise _refused(f"{kind} can not be mounted at {at}: {reason}")


def _refused(message: str) -> LocalError:
    return LocalWriteError(message, hint="`propmaster doctor` says what this host can do")
