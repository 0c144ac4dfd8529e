"""What a worker agent starts in place of its own script: run the call here, or have it run.

Who owns the session directory is the agent's user, whose jobs run as itself: the call runs in this
process. Anybody else is a job's user, who asks the host service. Where that does not answer, the
agent's own script runs as if propmaster were not installed (PROPMASTER_ORIGINAL, which the
installed stub sets, with PROPMASTER_ORIGINAL_PYTHON to run it); where there is none, the call
fails.
"""

import os
import pwd
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.errors import (
    LocalReadError,
    PropmasterError,
    ServiceUnavailableError,
    SettingsInvalidError,
)
from agent_plugin.content.store import Cancellation
from agent_plugin.settings import Settings, load
from agent_plugin.workers.call import (
    DROP_INS,
    Call,
    carry_out,
    find_drop_in,
    forwarded,
    one_line,
    tell,
)
from agent_plugin.workers.rights import peer_of
from agent_plugin.workers.wire import encode, read_replies, request_of

ORIGINAL_VARIABLE: Final = "PROPMASTER_ORIGINAL"
ORIGINAL_PYTHON_VARIABLE: Final = "PROPMASTER_ORIGINAL_PYTHON"

# The service takes a connection at once and forks; a host under load takes longer.
_CONNECT_SECONDS: Final = 30.0


def main(kind: str, arguments: Sequence[str], *, session_dir: Path | None = None) -> int:
    """Carry out a call of the worker agent's; return the exit code.

    Args:
        kind: Which drop-in.
        arguments: Its command line, without the program.
        session_dir: Where the session is; None: this process was started in it.
    """
    session_dir = session_dir or Path.cwd()
    try:
        settings = load(environment=_with_home())
    except SettingsInvalidError as error:
        return _fall_back(arguments, error)
    if _is_ours(session_dir, settings):
        return _run_here(kind, arguments, session_dir, settings)
    try:
        connection = _connect(settings.worker.socket)
    except ServiceUnavailableError as error:
        return _fall_back(arguments, error)
    with connection:
        try:
            request = request_of(
                kind, list(arguments), os.fspath(session_dir), forwarded(os.environ)
            )
            connection.sendall(encode(request))
            return _pass_on(connection)
        except OSError as error:
            return tell(_lost(settings.worker.socket, error.strerror or str(error)), _say)
        except PropmasterError as error:
            return tell(error, _say)


def _with_home() -> dict[str, str]:
    """Return the environment; a process that sudo started may have no HOME."""
    environment = dict(os.environ)
    with suppress(KeyError):
        environment.setdefault("HOME", pwd.getpwuid(os.geteuid()).pw_dir)
    return environment


def _is_ours(session_dir: Path, settings: Settings) -> bool:
    """Whether the session is this user's, and its states can be."""
    try:
        if session_dir.stat().st_uid != os.geteuid():
            return False
    except OSError:
        return False
    for directory in (settings.paths.state_dir, *settings.paths.state_dir.parents):
        with suppress(FileNotFoundError):
            if directory == settings.paths.state_dir:
                return directory.stat().st_uid == os.geteuid()
            directory.stat()
            return os.access(directory, os.W_OK)
    return False


def _run_here(kind: str, arguments: Sequence[str], session_dir: Path, settings: Settings) -> int:
    try:
        run = find_drop_in(DROP_INS[kind])
    except ImportError as error:
        # Half of a propmaster that is just being replaced.
        return _fall_back(arguments, ServiceUnavailableError(f"propmaster can not start: {error}"))
    # The agent's log has the directives; events below warnings say the same again.
    events.configure(level=30)
    cancellation = Cancellation()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: cancellation.cancel())
    call = Call(
        kind=kind,
        arguments=tuple(arguments),
        session_dir=session_dir,
        environment=forwarded(os.environ),
        job_user=None,
        say=_say,
        cancellation=cancellation,
    )
    return carry_out(call, settings, run)


def _connect(path: Path) -> socket.socket:
    """Return a connection to the host service.

    Raises:
        ServiceUnavailableError: Nothing listens there, or somebody who is not the service.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A socket that has Python's timeout does not wait for its turn behind others: EAGAIN.
        limit = struct.pack("@ll", round(_CONNECT_SECONDS), 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection.connect(os.fspath(path))
        connection.settimeout(_CONNECT_SECONDS)
        listener = peer_of(connection).uid
        owner = path.parent.stat().st_uid
    except OSError as error:
        connection.close()
        raise ServiceUnavailableError(
            f"no propmaster service answers at {path}: {error.strerror or error}",
            hint="start it on this host: `systemctl start propmaster`",
        ) from error
    # Credentials are sent: whoever could make a socket here must not get them.
    if listener not in (0, owner):
        connection.close()
        raise ServiceUnavailableError(
            f"what listens at {path} belongs to the user with id {listener}, not to the service",
            hint="look who can write to the socket's directory",
        )
    return connection


def _pass_on(connection: socket.socket) -> int:
    """Print what the service says; return the exit code it gives.

    Raises:
        ServiceUnavailableError: It went away before.
        OSError: As above.
    """
    for reply in read_replies(connection):
        # It has begun; a call may then be silent for hours.
        connection.settimeout(None)
        if reply.line is not None:
            _say(reply.line)
        if reply.exit is not None:
            return reply.exit
    raise ServiceUnavailableError(
        "the propmaster service went away before it had answered",
        hint="what was finished is kept; run the task again when the service runs",
    )


def _lost(path: Path, reason: str) -> ServiceUnavailableError:
    return ServiceUnavailableError(f"the propmaster service at {path} does not answer: {reason}")


def _fall_back(arguments: Sequence[str], reason: PropmasterError) -> int:
    """Become the agent's own script, if there is one; else tell the reason."""
    original, python = (
        os.environ.get(name) for name in (ORIGINAL_VARIABLE, ORIGINAL_PYTHON_VARIABLE)
    )
    if not original or not python:
        return tell(reason, _say)
    _say(f"propmaster: {reason.message}")
    _say("openjd_status: propmaster is not running on this host; the agent's own script runs")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PROPMASTER_")
    }
    try:
        os.execve(python, [python, original, *arguments], environment)  # noqa: S606 - as intended
    except OSError as error:
        return tell(LocalReadError(f"{python} {original}: {error.strerror}"), _say)


def _say(line: str) -> None:
    # The name of a file need not be UTF-8, nor the job user's locale: a line is no reason to fail.
    encoding = sys.stdout.encoding or "utf-8"
    text = one_line(line).encode(encoding, "backslashreplace").decode(encoding)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
