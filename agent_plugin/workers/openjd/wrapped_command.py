"""Runs the command of a task in its wrapper: same streams, same environment, its exit code.

It stays in this process's group, so that a runtime which kills the group kills it, too. A time
limit and the way to cancel are those of the wrapped action, which the runtime leaves to its
wrapper (RFC 0008 of Open Job Description).
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import psutil

from agent_plugin.content.store import Cancellation

# As the shell and timeout(1) have them.
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
TIMED_OUT: Final = 124
_SIGNALLED: Final = 128
# What was killed needs no longer to be gone, unless it waits for a disk.
_KILL_SECONDS: Final = 30.0
# What the environment templates keep away from propmaster: the rest of the name is the variable's.
_OF_TASK: Final = "PROPMASTER_OF_TASK_"
# How long a wish to stop may wait; the end of a command is seen earlier.
_LOOK_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code, or one of those above; 128 and the signal's number if one ended it.
        reason: Why it did not end by itself; empty if it did.
        cancelled: Whether somebody asked us to stop.
    """

    code: int
    reason: str = ""
    cancelled: bool = False


def run_wrapped(
    argv: Sequence[str],
    *,
    seconds: float | None,
    notify_seconds: float,
    cancellation: Cancellation,
) -> Ended:
    """Run a command to its end.

    Args:
        argv: The command.
        seconds: How long it may take; None for as long as it likes.
        notify_seconds: How long it has between SIGTERM and SIGKILL when it is stopped; 0 sends
            SIGKILL at once.
        cancellation: Stops it. Not an exception that a signal raises: that could come when the
            command runs already, and nobody knows its process yet.
    """
    try:
        process = subprocess.Popen(argv, env=environment_of_task(os.environ))  # noqa: S603 - the job's own command, no shell
    except FileNotFoundError:
        return Ended(NOT_FOUND, f"{argv[0]}: there is no such command")
    except OSError as error:
        return Ended(NOT_EXECUTABLE, f"{argv[0]}: {error.strerror}")
    latest = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            code = process.wait(_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            if cancellation.wished:
                _stop(process, notify_seconds)
                return Ended(_SIGNALLED + signal.SIGTERM, "the task was cancelled", cancelled=True)
            if latest is not None and time.monotonic() >= latest:
                _stop(process, notify_seconds)
                return Ended(TIMED_OUT, f"the task's command took longer than {seconds:.0f} s")
        else:
            return Ended(code if code >= 0 else _SIGNALLED - code)


def environment_of_task(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a command, with what the templates have kept away from us."""
    kept = {name: value for name, value in environment.items() if not name.startswith(_OF_TASK)}
    return kept | {
        name.removeprefix(_OF_TASK): value
        for name, value in environment.items()
        if name.startswith(_OF_TASK)
    }


def _stop(process: "subprocess.Popen[bytes]", notify_seconds: float) -> None:
    # Looked up before the first of them is gone, which leaves its children to init.
    descendants = _descendants(process.pid)
    if notify_seconds > 0:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(notify_seconds)
    descendants = {*descendants, *_descendants(process.pid)}
    process.kill()
    for each in descendants:
        with suppress(psutil.Error):
            # psutil compares start times: a number that was given anew is not killed.
            each.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()
