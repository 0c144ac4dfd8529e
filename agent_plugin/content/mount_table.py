"""The kernel's mounts: read from its table, and taken away, without touching what is mounted.

A mount whose server is gone or hangs blocks whoever looks at it, for ever perhaps. So nothing here
ever stats, lists or opens a path on one; umount2(2) with UMOUNT_NOFOLLOW is told its name.
"""

import ctypes
import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content import fusermount
from agent_plugin.content.pinned import pinned

_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the table.

    Attributes:
        device: `major:minor`.
        mountpoint: Where it is; bytes that are not UTF-8 are lone surrogates.
        kind: The file system's type, such as `overlay` or `fuse.propmaster`.
        source: What was mounted, as whoever mounted it named it.
    """

    device: str
    mountpoint: str
    kind: str
    source: str


def read_mounts() -> list[Mount]:
    """Return all mounts that this process sees, in the order in which they cover each other.

    Source: proc_pid_mountinfo(5).
    """
    mounts = []
    # A carriage return is no escape and no end of a line.
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]:
        fields, _, rest = line.partition(b" - ")
        _, _, device, _, mountpoint, *_ = fields.split(b" ")
        kind, source, *_ = rest.split(b" ")
        mounts.append(
            Mount(device.decode(), _unescape(mountpoint), _unescape(kind), _unescape(source))
        )
    return mounts


def is_mounted(at: Path, source: str = "") -> bool:
    """Whether something, or that source, is mounted at a path, normalised and without links."""
    return any(
        mount.mountpoint == os.fspath(at) and (not source or mount.source == source)
        for mount in read_mounts()
    )


def kind_of_file_system(path: Path) -> str:
    """Return the type of the file system that a path is on, such as `ext4`; empty if unknown."""
    real = os.path.realpath(path)
    found = ("", "")
    for mount in read_mounts():
        above = mount.mountpoint.rstrip("/")
        # Of two at one place the later one covers the other.
        if (real == above or real.startswith(f"{above}/")) and len(above) >= len(found[0]):
            found = (above, mount.kind)
    return found[1]


def unmount(at: Path, *, lazily: bool = False, force: bool = False) -> None:
    """Take the uppermost mount at a path away.

    Who may not, has fusermount do it, if it is a FUSE mount of its own.

    Args:
        at: The mount point.
        lazily: Take it out of the tree now, and end it when nobody has anything of it open.
        force: Fail the requests of those who wait for a FUSE server.

    Raises:
        OSError: EBUSY: somebody uses it. EINVAL: nothing is mounted there. ELOOP: a link leads
            there.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0) | (_MNT_FORCE if force else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    # The directory above is looked at, which no server of ours can hang.
    with pinned(at.parent) as above:
        failed = libc.umount2(os.fsencode(above / at.name), flags)
        number = ctypes.get_errno()
    if failed:
        if number == errno.EPERM and fusermount.find() is not None:
            fusermount.unmount(at, lazily=lazily or force)
            return
        raise OSError(number, os.strerror(number), os.fspath(at))


def unmount_all(at: Path) -> None:
    """Take everything at a path away, at once if nobody uses it and lazily otherwise.

    Raises:
        OSError: That is not possible, for want of rights.
    """
    while is_mounted(at):
        try:
            unmount(at)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            unmount(at, lazily=True)


def holders(at: Path) -> list[str]:
    """Return who uses something below a path: `pid name (what)`, as far as it can be seen.

    By the names of what processes have open, which the kernel tells without asking the mount.
    """
    inside = os.fspath(at)
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        what = _use_of(process, inside)
        if what:
            try:
                name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
            except OSError:
                continue
            found.append(f"{process.name} {name} ({what})")
    return found


def _use_of(process: Path, inside: str) -> str:
    links = {"working directory": process / "cwd", "root": process / "root"}
    try:
        links |= {f"descriptor {fd.name}": fd for fd in (process / "fd").iterdir()}
        maps = (process / "maps").read_bytes()
    except OSError:
        maps = b""
    for what, link in links.items():
        try:
            target = os.fspath(link.readlink())
        except OSError:
            continue
        if target == inside or target.startswith(inside + "/"):
            return what
    # Of all characters only line breaks are escaped there.
    mapped = b" " + os.fsencode(inside).replace(b"\n", rb"\012") + b"/"
    return "memory map" if mapped in maps else ""


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), field))
