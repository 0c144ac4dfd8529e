"""The credentials of a call: the job's own, never the service's.

A job's AWS files may name a program to run (`credential_process`), and files to read; with the
service's rights that would be a way to have them. So as root the service looks nothing up itself.
It gives botocore a configuration of its own, whose credential process is this module: it becomes
the job's user, for good, and only then reads what the job's profile says. No secret is in that
file, nor in the arguments of the process. Without root the service can not become anybody, and
takes only files that nobody but its user and root could have written, and that the job's user may
read.

Keys in the environment of a call are used as they are, and stay in memory.
"""

import json
import os
import pwd
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from agent_plugin.content import events
from agent_plugin.content.errors import (
    PropmasterError,
    SettingsInvalidError,
    StoreAccessError,
)
from agent_plugin.content.s3_environment import keys_of, preload, region_of
from agent_plugin.workers.call import OF_THE_HOST, JobUser
from agent_plugin.workers.notes import write_note
from agent_plugin.workers.rights import Peer, check_private_file, peer_of_user

PROFILE: Final = "propmaster"
# What a credential process, or a look into a file on a share that hangs, may take.
LOOK_UP_SECONDS: Final = 60.0

_FILES: Final = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
_CONFIG: Final = "aws-config"
_PIECE_BYTES: Final = 64 * 1024
_MOST_BYTES: Final = 1024 * 1024


def environment_of(
    given: Mapping[str, str], peer: Peer, job_user: JobUser | None, place: Path
) -> dict[str, str]:
    """Return the environment of a call, of which nothing is the service's.

    Args:
        given: What whoever asked has set.
        peer: Who asked.
        job_user: Whose the call's files are; None: the service's user asks itself.
        place: The directory of what is noted of the session.

    Raises:
        NotAllowedError: A file could be changed by others, or is not for the peer to read.
        SettingsInvalidError: The job's AWS files make no sense.
    """
    environment = {name: value for name, value in given.items() if name not in OF_THE_HOST}
    if job_user is None:
        return environment
    # The host's role is not the job's.
    environment["AWS_EC2_METADATA_DISABLED"] = "true"
    if os.geteuid() != 0:
        for name in _FILES:
            path = os.path.realpath(environment[name]) if name in environment else os.devnull
            if path != os.devnull:
                check_private_file(path, peer)
            environment[name] = path
        return environment
    asked = {name: environment.pop(name) for name in (*_FILES, "AWS_PROFILE") if name in given}
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & given.keys() and "AWS_CONFIG_FILE" in given:
        region = ask_as(peer, lambda: region_of(_environment_as(peer, asked)))
        if isinstance(region, str):
            environment["AWS_REGION"] = region
    environment |= dict.fromkeys(_FILES, os.devnull)
    if not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= given.keys():
        environment["AWS_PROFILE"] = PROFILE
        environment["AWS_CONFIG_FILE"] = os.fspath(place / _CONFIG)
        write_note(place, _CONFIG, _configuration(job_user, asked))
    return environment


def ask_as(peer: Peer, question: Callable[[], object]) -> object:
    """Return what a function returns, as JSON can say it, in a process of another user.

    Only while this process has one thread.

    Raises:
        SettingsInvalidError, StoreAccessError: The function failed, or did not answer in time.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            # What is open is the service's: states, the socket of the asker.
            os.closerange(3, writer)
            os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))
            become(peer)
            _write_whole(writer, json.dumps(_answer(question)).encode("ascii"))
        except BaseException:  # noqa: BLE001 - the last door of this process
            events.get_logger().exception(events.COMMAND_CRASHED)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        answer = _read_whole(reader, time.monotonic() + LOOK_UP_SECONDS)
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if "error" in answer:
        kind = StoreAccessError if answer.get("access") else SettingsInvalidError
        raise kind(str(answer["error"]), hint=str(answer.get("hint", "")))
    return answer.get("value")


def become(peer: Peer) -> None:
    """Be another user for good, in all of this process; needs root.

    The kernel then lets no process of that user look into this one's memory.

    Raises:
        OSError: It could not be done.
    """
    os.setgroups(sorted(peer.groups))
    os.setresgid(peer.gid, peer.gid, peer.gid)
    os.setresuid(peer.uid, peer.uid, peer.uid)
    os.chdir("/")


def _answer(question: Callable[[], object]) -> dict[str, object]:
    try:
        return {"value": question()}
    except PropmasterError as error:
        return {
            "error": error.message,
            "hint": error.hint,
            "access": isinstance(error, StoreAccessError),
        }


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


def _read_whole(fd: int, until: float) -> dict[str, Any]:
    data = b""
    while True:
        left = until - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return {"error": f"the job's AWS files could not be read in {LOOK_UP_SECONDS:.0f} s"}
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
    # What a program of the job's does is the job's: it ends with this process.
    signal.signal(signal.SIGALRM, lambda _number, _frame: os.killpg(0, signal.SIGKILL))
    signal.alarm(round(LOOK_UP_SECONDS))
    answer = _answer(lambda: keys_of(_environment_as(peer, subject["environment"])))
    if "error" in answer:
        print(answer["error"], file=sys.stderr)  # noqa: T201 - botocore reads it
        return StoreAccessError.exit_code
    print(json.dumps(answer["value"]))  # noqa: T201 - as above
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
