"""Files that a user names: a pipe is read, and one that nobody writes to is not waited for.

Those of pipes without a writer were seen to hang when files are opened without O_NONBLOCK.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.cli.main import propmaster
from agent_plugin.content.errors import PropmasterError
from agent_plugin.content.named_file import open_named
from agent_plugin.session.sync_checkpoint import VERSION, Header, open_checkpoint
from tests.servers.hooks import FARM, QUEUE

IDS = ["--farm-id", FARM, "--queue-id", QUEUE, "--store", "file:///nowhere"]
SYNC = ["outputs", "sync", *IDS]
COMMANDS: list[list[str]] = [
    [*SYNC, "--path-mapping-rules", "PIPE"],
    [*SYNC, "--config", "PIPE"],
    ["outputs", "get", f"job-{'0' * 32}", *IDS, "--config", "PIPE"],
    ["session", "start", "--session-dir", "DIRECTORY/session", "--job", "PIPE"],
    ["openjd", "enter", "--job", "PIPE", "--session-dir", "DIRECTORY/session"],
    ["manifest", "show", "PIPE"],
    ["mount", "PIPE", "DIRECTORY/mount", "--store", "file:///"],
    ["transfer", "create", "--spec", "PIPE"],
]


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe; what commands do with signals is undone afterwards."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path / "pipe"
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(words: list[str], pipe: Path) -> None:
    named = [word.replace("PIPE", str(pipe)) for word in words]
    arguments = [word.replace("DIRECTORY", str(pipe.parent)) for word in named]
    propmaster.main(arguments, standalone_mode=False)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2] + words[-2:-1]))
def test_a_pipe_that_nobody_writes_to_is_told_and_not_waited_for(
    words: list[str], pipe: Path
) -> None:
    with pytest.raises(PropmasterError) as refused:
        run(words, pipe)

    assert str(pipe) in refused.value.message
    kind = "no regular file" if words[0] == "mount" else "nobody writes to this pipe"
    assert kind in refused.value.message


def test_a_pipe_is_read_to_its_end_however_slowly_it_is_written(pipe: Path) -> None:
    """As of a shell's `<(…)`."""
    opened = threading.Event()

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            opened.set()
            for piece in (b"[", b" " * 100_000, b"]"):
                time.sleep(0.05)
                file.write(piece)

    # Without a reader there is no writer.
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writing = threading.Thread(target=write)
    writing.start()
    opened.wait()

    with open_named(pipe) as file:
        os.close(reader)
        assert file.read() == b"[" + b" " * 100_000 + b"]"

    writing.join()


def test_what_is_no_file_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), open_named(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), open_named(tmp_path / "absent"):
        pass
    with open_named(Path(os.devnull)) as file:
        assert file.read() == b""
    with (
        pytest.raises(OSError, match="no regular file"),
        open_named(Path(os.devnull), regular=True),
    ):
        pass


@pytest.mark.parametrize("which", ["", ".lock", ".new"])
def test_a_pipe_in_a_checkpoints_place_is_not_waited_for(tmp_path: Path, which: str) -> None:
    """A new file is written in place of what a sync may have left."""
    checkpoint = tmp_path / "sync.jsonl"
    header = Header(VERSION, "file:///store", FARM, QUEUE, "own", 0.0)
    with open_checkpoint(checkpoint, header, anew=False, keep=False):
        pass
    place = tmp_path / f"sync.jsonl{which}"
    place.unlink(missing_ok=True)
    os.mkfifo(place)

    if which == ".new":
        with open_checkpoint(checkpoint, header, anew=False, keep=False) as opened:
            assert not opened.is_new
        assert not place.exists()
        return
    with (
        pytest.raises(PropmasterError, match="no regular file"),
        open_checkpoint(checkpoint, header, anew=False, keep=False),
    ):
        pass
    assert place.is_fifo()
