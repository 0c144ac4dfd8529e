"""The credentials of a call: the job's own, never the service's.

A job's AWS files may name a program to run (`credential_process`), and files to read; with the
service's rights that would be a way to have them. So as root the service looks nothing up itself:
a process becomes the job's user, for good, and only then reads what the job's profile says.

The first keys of a call come from a fork of the call's process, which has botocore loaded (see
`ask_as`). Threads have started by the time that keys expire, and a process that mounts is another
program: there a new Python does it, this module, which is the credential process of a configuration
that is written for botocore. No secret is in that file, nor in the arguments of a process.

Without root the service can not become anybody, and takes only files that the agent has made for
the job user's sessions: nobody but its user and root could have written them, and they are of the
job's group and closed to others, as is the directory that they are in.

Keys in the environment of a call are used as they are, and stay in memory.
"""

import ctypes
import json
import os
import pwd
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agent_plugin.content.errors import (
    CancelledError,
    PropmasterError,
    SettingsInvalidError,
    StoreAccessError,
)
from agent_plugin.content.s3_environment import keys_of, preload, region_of
from agent_plugin.workers.call import OF_THE_HOST, JobUser
from agent_plugin.workers.notes import write_note
from agent_plugin.workers.rights import Peer, check_given_file, peer_of_user

PROFILE: Final = "propmaster"
# What a credential process, or a look into a file on a share that hangs, may take.
LOOK_UP_SECONDS: Final = 60.0
# What was killed is gone at once, unless the file system that it asks can not be interrupted.
_REAP_SECONDS: Final = 2.0

_FILES: Final = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
_CONFIG: Final = "aws-config"
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PIECE_BYTES: Final = 64 * 1024
_MOST_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Found:
    """What a call asks a store with.

    Attributes:
        environment: Of which nothing is the service's.
        keys: As `s3_environment.keys_of` has them; None where the environment alone says it.
    """

    environment: dict[str, str]
    keys: Mapping[str, object] | None = field(default=None, repr=False)


def find_credentials(
    given: Mapping[str, str],
    peer: Peer,
    job_user: JobUser | None,
    place: Path,
    *,
    asker: socket.socket,
) -> Found:
    """Return the environment of a call, of which nothing is the service's, and its keys.

    Args:
        given: What whoever asked has set.
        peer: Who asked.
        job_user: Whose the call's files are; None: the service's user asks itself.
        place: The directory of what is noted of the session.
        asker: The connection; its end ends the look-up.

    Raises:
        NotAllowedError: A file could be changed by others, or was not made for the peer.
        SettingsInvalidError: The job's AWS files make no sense.
        CancelledError: The asker is gone.
    """
    environment = {name: value for name, value in given.items() if name not in OF_THE_HOST}
    if job_user is None:
        return Found(environment)
    # The host's role is not the job's.
    environment["AWS_EC2_METADATA_DISABLED"] = "true"
    if os.geteuid() != 0:
        for name in _FILES:
            path = os.path.realpath(environment[name]) if name in environment else os.devnull
            if path != os.devnull:
                check_given_file(path, job_user, peer)
            environment[name] = path
        return Found(environment)
    asked = {name: environment.pop(name) for name in (*_FILES, "AWS_PROFILE") if name in given}
    needs_region = "AWS_CONFIG_FILE" in given and not (
        {"AWS_REGION", "AWS_DEFAULT_REGION"} & given.keys()
    )
    needs_keys = not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= given.keys()
    environment |= dict.fromkeys(_FILES, os.devnull)
    if needs_keys:
        environment["AWS_PROFILE"] = PROFILE
        environment["AWS_CONFIG_FILE"] = os.fspath(place / _CONFIG)
        write_note(place, _CONFIG, _configuration(job_user, asked))
    if not needs_keys and not needs_region:
        return Found(environment)

    def look_up() -> dict[str, object]:
        variables = _environment_as(peer, asked)
        found: dict[str, object] = {"region": region_of(variables) if needs_region else None}
        if needs_keys:
            # A call may need none. If it does, it looks again, and fails then.
            with suppress(PropmasterError):
                found["keys"] = keys_of(variables)
        return found

    found = ask_as(peer, look_up, asker)
    region, keys = found.get("region"), found.get("keys")
    if isinstance(region, str):
        environment["AWS_REGION"] = region
    return Found(environment, keys if isinstance(keys, dict) else None)


def ask_as(
    peer: Peer, question: Callable[[], dict[str, object]], asker: socket.socket
) -> dict[str, object]:
    """Return what a function returns, as JSON can say it, in a process of another user.

    That process has the memory of this one. In it are the program, the service's environment and
    what this peer has sent, but nothing of other jobs: the service reads a request only in the
    child that answers it. `become` closes it to the peer, who has no part in it: a program that a
    profile names is executed, and has nothing of it.

    It ends with this process, and so do the programs that it has started.

    Args:
        peer: Whom to ask as.
        question: The function; it is called with no file open but the standard ones.
        asker: Nothing is waited for when it is gone.

    Only while this process has one thread.

    Raises:
        SettingsInvalidError, StoreAccessError: The function failed, or did not answer in time.
        CancelledError: The asker is gone.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        try:
            _leave_service(writer)
            become(peer)
            _end_in_time(parent)
            _write_whole(writer, json.dumps(_answer(question)).encode("ascii"))
        finally:
            os._exit(0)
    os.close(writer)
    answer: dict[str, Any] = {}
    try:
        answer = _read_whole(reader, time.monotonic() + LOOK_UP_SECONDS, asker)
    finally:
        os.close(reader)
        if "value" not in answer:
            # What a program of the job's does ends, too.
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _reap(pid)
    if "error" in answer:
        kind = StoreAccessError if answer.get("access") else SettingsInvalidError
        raise kind(str(answer["error"]), hint=str(answer.get("hint", "")))
    value: dict[str, object] = answer.get("value", {})
    return value


def become(peer: Peer) -> None:
    """Be another user for good, in all of this process; needs root.

    No process of that user can look into this one's memory, not even for a moment: until it is
    closed to them, the saved user is root, and whoever looks would have to be that, too. By itself
    the kernel closes it where /proc/sys/fs/suid_dumpable is not 1. Programs that are executed are
    open again, and have memory of their own.

    Raises:
        OSError: It could not be done.

    Source: ptrace(2), "Ptrace access mode checking"; PR_SET_DUMPABLE in prctl(2)
    """
    os.setgroups(sorted(peer.groups))
    os.setresgid(peer.gid, peer.gid, peer.gid)
    os.setresuid(peer.uid, peer.uid, 0)
    _prctl(_PR_SET_DUMPABLE, 0)
    os.setresuid(peer.uid, peer.uid, peer.uid)
    os.chdir("/")


def _leave_service(writer: int) -> None:
    """Let go of what a call's process has: states, the asker's socket, the log, what ends it."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        # botocore's log may quote what a program of the job's has written.
        os.dup2(nothing, standard)
    os.closerange(3, writer)
    os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))


def _end_in_time(parent: int) -> None:
    """Have this process end, with what it starts, after a while, and with its parent."""
    signal.signal(signal.SIGALRM, lambda _number, _frame: os.killpg(0, signal.SIGKILL))
    signal.alarm(round(LOOK_UP_SECONDS))
    # Becoming another user has undone it, so not before.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGALRM)
    if os.getppid() != parent:
        os._exit(0)


def _reap(pid: int) -> None:
    """Wait for a process that was killed, but not for a file system that it waits for."""
    ended = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        if poll.poll(_REAP_SECONDS * 1000):
            os.waitpid(pid, 0)
    finally:
        os.close(ended)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _answer(question: Callable[[], object]) -> dict[str, object]:
    try:
        return {"value": question()}
    except PropmasterError as error:
        return {
            "error": error.message,
            "hint": error.hint,
            "access": isinstance(error, StoreAccessError),
        }
    except Exception as error:  # noqa: BLE001 - the last door of this process
        return {"error": f"the job's AWS files could not be read: {type(error).__name__}"}


def _environment_as(peer: Peer, asked: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that a job's user looks its credentials up in, and make it ours."""
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8"}
    with suppress(KeyError):
        entry = pwd.getpwuid(peer.uid)
        environment |= {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
    environment |= {name: os.environ[name] for name in OF_THE_HOST if name in os.environ}
    environment |= asked
    os.environ.clear()
    os.environ.update(environment)
    return environment


def _configuration(job_user: JobUser, asked: Mapping[str, str]) -> bytes:
    subject = json.dumps({"uid": job_user.uid, "gid": job_user.gid, "environment": dict(asked)})
    command = shlex.join([sys.executable, "-P", "-m", __spec__.name, subject])
    return f"[profile {PROFILE}]\ncredential_process = {command}\n".encode("ascii")


def _write_whole(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _read_whole(fd: int, until: float, asker: socket.socket) -> dict[str, Any]:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    # Nothing more is to come from there, so whatever comes is as good as an end.
    poll.register(asker, select.POLLIN | select.POLLRDHUP)
    data = b""
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(max(until - time.monotonic(), 0) * 1000)}
        if not ready:
            return {"error": f"the job's AWS files could not be read in {LOOK_UP_SECONDS:.0f} s"}
        if fd not in ready:
            raise CancelledError("whoever asked is gone")
        piece = os.read(fd, _PIECE_BYTES)
        data += piece
        if not piece:
            break
        if len(data) > _MOST_BYTES:
            break
    try:
        answer = json.loads(data)
    except ValueError:
        return {"error": "the job's AWS files could not be read by its user"}
    return answer if isinstance(answer, dict) else {}


def main(arguments: list[str]) -> int:
    """Print the keys of a job's user as a credential process does; started by botocore, as root."""
    subject = json.loads(arguments[0])
    peer = peer_of_user(JobUser(int(subject["uid"]), int(subject["gid"])))
    os.setsid()
    # What this program is made of may be closed to the job's user.
    preload()
    become(peer)
    _end_in_time(os.getppid())
    answer = _answer(lambda: keys_of(_environment_as(peer, subject["environment"])))
    if "error" in answer:
        print(answer["error"], file=sys.stderr)  # noqa: T201 - botocore reads it
        return StoreAccessError.exit_code
    print(json.dumps(answer["value"]))  # noqa: T201 - as above
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
