"""The control socket of a mount: who asks gets an answer, one line of JSON for each connection.

A Unix socket with mode 0600; besides, only the user that serves the mount, and root, are answered
(unix(7), SO_PEERCRED).
"""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from agent_plugin.content import events

_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_PATIENCE_SECONDS: Final = 5.0
_NEXT_TRY_SECONDS: Final = 0.1
# Room for all the paths of a large session.
_MOST_BYTES: Final = 256 * 1024 * 1024

log = events.get_logger()


class ControlSocket:
    """Answers from a thread of its own, one question at a time.

    Args:
        path: Of the socket; one that a killed server left is replaced.
        answers: By the word of the question, what returns the answer to it.
    """

    def __init__(
        self, path: Path, answers: Mapping[str, Callable[[Mapping[str, Any]], object]]
    ) -> None:
        self._answers = answers
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # By its directory's descriptor: a socket's path has 107 bytes at most.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        before = os.umask(0o177)
        try:
            self._listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.umask(before)
            os.close(directory)
        self._listener.listen()
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                # No descriptor is free, say: whoever asks waits until one is.
                time.sleep(_NEXT_TRY_SECONDS)
                continue
            try:
                with connection:
                    self._answer(connection)
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue  # All but OSError: what was asked is no question.
            except Exception:
                # Whoever asks next is answered all the same.
                log.exception(events.MOUNT_REQUEST_CRASHED)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_PATIENCE_SECONDS)
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(raw)
        if uid not in (0, os.geteuid()):
            return
        with connection.makefile("rb") as asked:
            question = json.loads(asked.readline(_MOST_BYTES))
        answer = self._answers.get(str(question.get("ask"))) if isinstance(question, dict) else None
        if answer is not None:
            connection.sendall(json.dumps(answer(question)).encode("ascii") + b"\n")
