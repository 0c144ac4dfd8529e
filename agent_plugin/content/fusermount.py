"""Mounting and unmounting FUSE by the setuid program of libfuse, for who lacks CAP_SYS_ADMIN.

`fusermount3`, or `fusermount` of libfuse 2, which speaks the same. It opens /dev/fuse with the
rights of whoever calls it, mounts with its own, and passes the descriptor through a socket. It
checks that the mount point is its caller's, and takes `allow_other` only where /etc/fuse.conf has
`user_allow_other`.

Source: fusermount3(1); util/fusermount.c of libfuse, _FUSE_COMMFD.
"""

import array
import errno
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# It asks only the kernel, which may be busy.
_SECONDS: Final = 20.0
_CAP_SYS_ADMIN: Final = 21


def find() -> str | None:
    """Return the program's path, None if there is none that could mount for this process.

    The first of that name may be a script that stands for it, such as a drop-in's.
    """
    if not _has("CapBnd"):
        return None
    for name in ("fusermount3", "fusermount"):
        for directory in os.get_exec_path():
            program = shutil.which(name, path=directory)
            if program is not None and _is_setuid_root(program):
                return program
    return None


def may_administer() -> bool:
    """Whether mount(2) is open to this process, in its own user namespace perhaps.

    Source: capabilities(7); proc_pid_status(5), CapEff.
    """
    return _has("CapEff")


def mount(at: Path, options: Sequence[str]) -> int:
    """Mount FUSE; return /dev/fuse, on which INIT waits to be answered.

    Args:
        at: An existing directory of this user.
        options: As fusermount takes them: words without `,`, or `name=value` pairs.

    Raises:
        OSError: It was refused; the text says why.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, its:
        _run(
            ["-o", ",".join(options), "--", os.fspath(at)],
            environment={"_FUSE_COMMFD": str(its.fileno())},
            passed=[its.fileno()],
        )
        its.close()
        ours.settimeout(_SECONDS)
        descriptors = array.array("i")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_LEN(descriptors.itemsize))
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data)
    if not descriptors:
        raise OSError(errno.EPROTO, "it passed no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def unmount(at: Path, *, lazily: bool = False) -> None:
    """Take the uppermost mount at a path away, if it is a FUSE mount of this user.

    Raises:
        OSError: EBUSY: somebody uses it. EPERM: any other refusal; the text says why.
    """
    _run(["-u", "-z", "--", os.fspath(at)] if lazily else ["-u", "--", os.fspath(at)])


def _is_setuid_root(program: str) -> bool:
    status = os.stat(program)  # noqa: PTH116 - of a path as text
    return status.st_uid == 0 and bool(status.st_mode & stat.S_ISUID)


def _run(
    arguments: list[str], *, environment: dict[str, str] | None = None, passed: Sequence[int] = ()
) -> None:
    program = find()
    if program is None:
        raise OSError(errno.EPERM, "there is no setuid fusermount3 in PATH")
    try:
        done = subprocess.run(  # noqa: S603 - our own argv, no shell
            [program, *arguments],
            env={**os.environ, **(environment or {}), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=passed,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.EBUSY, f"{program} did not end within {_SECONDS:.0f} s") from error
    if done.returncode:
        reason = done.stderr.strip() or f"exit code {done.returncode}"
        number = errno.EBUSY if "resource busy" in reason else errno.EPERM
        raise OSError(number, reason)


def _has(which: str) -> bool:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith(f"{which}:"))
    return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
