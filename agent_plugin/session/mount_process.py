"""The process of a mount: started, waited for, asked to end, and what it wrote.

It outlives whoever starts it. What it writes to stderr is in the file `log` of the mount's place:
events, one JSON object a line, and the error that ended it, as a command tells one.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.content import events
from agent_plugin.content.errors import ManifestInvalidError, MountFailedError, PropmasterError
from agent_plugin.content.mount_spec import Ready
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.ledger import lease_owner

# A mount of 1,000,000 files takes some 4 s here; hosts under load take longer.
READY_SECONDS: Final = 60.0
# The process itself gives leavers 2 s and last readers 5 s; then it is killed.
END_SECONDS: Final = 15.0
# As the mount process gives them: a server that is left without it goes on as long as it is asked.
LAST_READERS_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.02
_LOG_TAIL_BYTES: Final = 2000


def lives(pid: int, process: str) -> bool:
    """Whether a process, known by its id and `pid:start-time`, is there."""
    # If it is a child of this process it has to be reaped before it is gone.
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return lease_owner(pid) == process


def end_process(pid: int, process: str) -> None:
    """Ask a process to unmount and end, and kill it if it does not."""
    if not lives(pid, process):
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + END_SECONDS
    while lives(pid, process):
        if time.monotonic() > until:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(_POLL_SECONDS)


def end_servers(spec: Path) -> None:
    """Kill the servers of a mount that is gone; they end by themselves, if they can."""
    until = time.monotonic() + LAST_READERS_SECONDS
    while servers := servers_of(spec):
        if time.monotonic() > until:
            for server in servers:
                with suppress(ProcessLookupError):
                    os.kill(server, signal.SIGKILL)
            return
        time.sleep(_POLL_SECONDS)


def servers_of(spec: Path) -> list[int]:
    """Return what is left of a mount's processes: a server has the supervisor's command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            is_ours = process.stat().st_uid == os.geteuid()
            if is_ours and os.fsencode(spec) in words and b"vfs" in words:
                found.append(int(process.name))
    return found


def spawn(place: Path, environment: Mapping[str, str]) -> tuple[int, int]:
    """Start the mount process; return its id and where its stdout can be read."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(writer, True)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    written = os.open(place / "log", flags, 0o600)
    try:
        # Not subprocess: the process is to outlive whoever starts it.
        pid = os.posix_spawn(
            sys.executable,
            # -P: a job may have put a `vfs` or a `json` where this process happens to be.
            [sys.executable, "-P", "-m", "vfs", os.fspath(place / "spec.json")],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, writer, 1),
                (os.POSIX_SPAWN_DUP2, written, 2),
            ],
            # The agent may end the group of a hook that has finished.
            setsid=True,
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        for fd in (writer, null, written):
            os.close(fd)
    return pid, reader


def await_ready(stdout: int, place: Path, mountpoint: Path, cancellation: Cancellation) -> Ready:
    """Return what a process says when its mount can be used.

    Raises:
        MountFailedError: It ended before, or took more than READY_SECONDS.
        ManifestInvalidError: It ended, because the manifest is none.
        CancelledError: Cancellation was wished.
    """
    until = time.monotonic() + READY_SECONDS
    line = b""
    while not line.endswith(b"\n"):
        cancellation.check()
        if time.monotonic() > until:
            raise MountFailedError(f"{mountpoint} was not mounted within {READY_SECONDS:.0f} s")
        if not select.select([stdout], [], [], _POLL_SECONDS)[0]:
            continue
        piece = os.read(stdout, 4096)
        if not piece:
            raise _failure(place, mountpoint)
        line += piece
    return msgspec.json.decode(line, type=Ready)


def told_holders(written: Path) -> list[str]:
    """Return who held a mount, as its process has logged it before it let go."""
    holders: list[str] = []
    try:
        lines = written.read_bytes().splitlines()
    except OSError:
        return holders
    for line in lines:
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") == events.MOUNT_BUSY:
                holders += [holder for holder in event["holders"] if holder not in holders]
    return holders


def _failure(place: Path, mountpoint: Path) -> PropmasterError:
    """Return why a process ended before there was a mount."""
    told = last_error(place)
    if told is None:
        lines = _log_lines(place)
        reason = lines[-1][-_LOG_TAIL_BYTES:] if lines else "it said nothing"
    elif told[0] == ManifestInvalidError.reference:
        return ManifestInvalidError(told[1], hint=told[2])
    else:
        reason = told[1]
    return MountFailedError(
        f"{mountpoint} could not be mounted: {reason}",
        hint="`propmaster doctor` says what this host can do",
    )


def last_error(place: Path) -> tuple[str, str, str] | None:
    """Return reference, message and hint of the last error that a process told."""
    lines = _log_lines(place)
    # What a server said comes before what its supervisor made of it.
    at = next((at for at, line in enumerate(lines) if line.startswith("error[")), None)
    if at is None:
        return None
    reference, _, message = lines[at].removeprefix("error[").partition("]: ")
    after = lines[at + 1] if at + 1 < len(lines) else ""
    hint = after.removeprefix("hint: ") if after.startswith("hint: ") else ""
    return reference, message[-_LOG_TAIL_BYTES:], hint


def _log_lines(place: Path) -> list[str]:
    try:
        return (place / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
