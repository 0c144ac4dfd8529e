"""What a mount's server is asked by other processes, over the control socket of its place."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.flight import Lanes
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.store import Cancellation

# A server answers from memory, but may have to wait for a core.
ANSWER_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02


def ask_mount(control: str, question: Mapping[str, object]) -> bytes:
    """Return what a mount's server answers, one line of JSON.

    Raises:
        MountFailedError: There is none, or it does not answer.
    """
    place = Path(control)
    try:
        directory = os.open(place.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(ANSWER_SECONDS)
                # By its directory's descriptor: a socket's path has 107 bytes at most.
                connection.connect(f"/proc/self/fd/{directory}/{place.name}")
                connection.sendall(json.dumps(question).encode("ascii") + b"\n")
                with connection.makefile("rb") as answer:
                    line = answer.readline()
        finally:
            os.close(directory)
    except OSError as error:
        raise MountFailedError(
            f"the server of the mount does not answer at {place}: {error.strerror or error}",
            hint="look into `log` beside it; if that is gone, so is the mount: start the session"
            " again",
        ) from error
    if not line.endswith(b"\n"):
        raise MountFailedError(f"the mount at {place} broke off its answer")
    return line


def ask_whoever_serves(
    control: str, question: Mapping[str, object], cancellation: Cancellation
) -> bytes:
    """Ask, and ask again if the server was replaced meanwhile: only for what can be asked twice.

    Raises:
        MountFailedError: As ask_mount, for ANSWER_SECONDS.
        CancelledError: Cancellation was wished; the server may have done it, or do it still.
    """
    until = time.monotonic() + ANSWER_SECONDS
    # No signal is noticed by a thread that waits for a server, which may be stopped.
    lanes = Lanes(1)
    while True:
        try:
            return lanes.run(lambda: ask_mount(control, question), cancellation)
        except MountFailedError:
            if time.monotonic() > until:
                raise
            cancellation.sleep(_POLL_SECONDS)


def files_of_mount(
    control: str, paths: Sequence[str], cancellation: Cancellation
) -> list[list[FileEntry]]:
    """Return the inputs of a mount that are at each path or below it.

    Raises:
        MountFailedError: Its server does not answer.
        CancelledError: Cancellation was wished.
    """
    question = {"ask": "files", "paths": list(paths)}
    answer = json.loads(ask_whoever_serves(control, question, cancellation))
    return msgspec.convert(answer, list[list[FileEntry]])
