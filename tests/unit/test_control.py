"""What a mount's control socket does with questions of any kind."""

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agent_plugin.content import events
from agent_plugin.content.errors import SessionStateError
from vfs.control import ControlSocket


def ask(path: Path, question: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
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


# Has no descriptor to spare for a while, and prints how long it ran meanwhile.
WITHOUT_DESCRIPTORS = """
import os, resource, sys, time
from pathlib import Path
from vfs.control import ControlSocket
ControlSocket(Path(sys.argv[1]), {"status": lambda _: {"files": 3}})
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    print("none is free", flush=True)
sys.stdin.readline()
before = time.process_time()
time.sleep(1)
print(time.process_time() - before, flush=True)
for fd in taken:
    os.close(fd)
sys.stdin.readline()
"""


def test_who_asks_waits_for_a_free_descriptor_and_the_server_does_nothing_meanwhile(
    tmp_path: Path,
) -> None:
    path = tmp_path / "control"
    with subprocess.Popen(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(ask, path, b'{"ask": "status"}')
            process.stdin.write(b"go on\n")
            process.stdin.flush()
            # Of a second; a loop takes all that it is given.
            assert float(process.stdout.readline()) < 0.2
            assert json.loads(asked.result(60)) == {"files": 3}
