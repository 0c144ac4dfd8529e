"""What a mount's control socket does with questions of any kind."""

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_plugin.content import events
from agent_plugin.content.errors import SessionStateError
from vfs.control import ControlSocket


def ask(path: Path, question: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(question + b"\n")
        with connection.makefile("rb") as answer:
            return answer.readline()


def test_a_question_that_can_not_be_answered_is_not_the_last_one(
    tmp_path: Path, expected_events: set[str]
) -> None:
    def fail(_question: Mapping[str, Any]) -> object:
        raise SessionStateError("the spec is damaged")

    expected_events.add(events.MOUNT_REQUEST_CRASHED)
    path = tmp_path / "control"
    ControlSocket(path, {"add": fail, "status": lambda _: {"files": 3}})
    for question in (b"no JSON", b"[1]", b'{"ask": "nothing"}', b'{"ask": "add"}'):
        assert ask(path, question) == b""
        assert json.loads(ask(path, b'{"ask": "status"}')) == {"files": 3}
