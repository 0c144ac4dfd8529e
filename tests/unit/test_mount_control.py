"""Questions to a mount's server that does not answer."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.errors import CancelledError
from agent_plugin.content.store import Cancellation
from agent_plugin.session.mount_control import files_of_mount
from tests.servers.promptness import STOP_SECONDS


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The control socket of a server that was stopped, and what it would read it by."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        yield str(tmp_path / "control"), listener


def test_who_asks_a_server_that_was_stopped_heeds_a_wish_to_stop(
    stopped: tuple[str, socket.socket],
) -> None:
    """Seen to go on for half a minute."""
    control, listener = stopped
    cancellation = Cancellation()
    outcome: list[BaseException] = []

    def ask() -> None:
        try:
            files_of_mount(control, ["a"], cancellation)
        except CancelledError as error:
            outcome.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as asked:
        assert json.loads(asked.readline()) == {"ask": "files", "paths": ["a"]}
        cancellation.cancel()
        asking.join(STOP_SECONDS)
        assert outcome
