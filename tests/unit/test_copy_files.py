"""Files of this host, copied piece by piece."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from agent_plugin.content.bandwidth import Allowance
from agent_plugin.content.errors import CancelledError
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.copy_files import LEAST_BYTES, copy_bytes


@pytest.mark.parametrize("way", ["resumed", "cancelled"])
def test_t11_what_gives_way_copies_no_further_piece_until_it_goes_on(
    tmp_path: Path, way: str
) -> None:
    """Seen to fail when the pause, or the wish to stop, is not looked at before each piece."""
    data = os.urandom(4 * LEAST_BYTES)
    (tmp_path / "a").write_bytes(data)
    halt, first = Cancellation(), threading.Event()
    pieces: list[int] = []

    def copied(size: int, _end: int) -> None:
        pieces.append(size)
        if len(pieces) == 1:
            halt.pause()
            first.set()

    def copy() -> None:
        with (
            (tmp_path / "a").open("rb") as source,
            (tmp_path / "b").open("wb") as target,
            suppress(CancelledError),
        ):
            copy_bytes(
                source.fileno(), target.fileno(), 0, len(data),
                halt=halt, limit=Allowance(None), rate=1, copied=copied,
            )  # fmt: skip

    thread = threading.Thread(target=copy)
    thread.start()
    assert first.wait(30)
    # For so long the others have had room.
    time.sleep(0.3)
    before = list(pieces)
    if way == "resumed":
        halt.resume()
    else:
        halt.cancel()
    thread.join(30)

    assert not thread.is_alive()
    assert before == [LEAST_BYTES]
    left = data if way == "resumed" else data[:LEAST_BYTES]
    assert (tmp_path / "b").read_bytes() == left
