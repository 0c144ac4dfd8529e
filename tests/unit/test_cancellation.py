"""A wish to stop, or to pause, and who heeds it where."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import CancelledError, StoreUnavailableError
from agent_plugin.content.flight import Lanes
from agent_plugin.content.parts import PART_BYTES, HighWater, Part, Write, receive
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.store import Cancellation
from tests.servers.promptness import STOP_SECONDS
from tests.servers.proxied_object import until, until_unchanged


def test_t9_a_boundary_is_passed_when_the_pause_is_over() -> None:
    cancellation = Cancellation()
    assert cancellation.pass_boundary() == 0.0
    cancellation.pause()
    begun = threading.Event()

    def go_on() -> float:
        begun.set()
        return cancellation.pass_boundary()

    with ThreadPoolExecutor(1) as threads:
        going_on = threads.submit(go_on)
        begun.wait(60)
        assert wait([going_on], timeout=0.3).not_done
        cancellation.resume()

        assert going_on.result(60) > 0


def test_t9_a_pause_ends_by_a_wish_to_stop() -> None:
    cancellation = Cancellation()
    cancellation.pause()
    threading.Timer(0.2, cancellation.cancel).start()
    started = time.monotonic()

    with pytest.raises(CancelledError):
        cancellation.pass_boundary()
    assert time.monotonic() - started < STOP_SECONDS


def test_t9_a_pause_holds_for_what_pauses_with_it_and_a_stop_does_not() -> None:
    outer = Cancellation()
    inner = Cancellation(pauses_with=outer)
    outer.pause()
    while_paused = inner.paused
    outer.resume()
    outer.cancel()
    inner.check()

    assert (while_paused, inner.paused) == (True, False)


def test_a_signal_may_wish_it_at_any_moment_of_the_sleep_it_interrupts() -> None:
    """Seen to hang with threading.Event, whose set() waits for the lock that wait() holds."""
    reached = [0]
    ended = threading.Event()

    def sleep_interrupted_everywhere() -> None:
        while _sleep_wished_at(reached[0]):
            reached[0] += 1
        ended.set()

    threading.Thread(target=sleep_interrupted_everywhere, daemon=True).start()

    assert ended.wait(60), f"hangs when wished at instruction {reached[0]}"
    assert reached[0] > 20


def _sleep_wished_at(number: int) -> bool:
    """Sleep, and wish its end before that instruction; return whether there is such a one."""
    cancellation = Cancellation()
    instructions = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal instructions
        frame.f_trace_opcodes = True
        if event == "opcode":
            if instructions == number:
                cancellation.cancel()
            instructions += 1
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]  # a function that returns itself has no type
    try:
        with suppress(CancelledError):
            cancellation.sleep(0.001)
    finally:
        sys.settrace(None)
    return cancellation.wished


def test_a_wish_ends_the_sleep_of_every_thread() -> None:
    cancellation = Cancellation()
    with ThreadPoolExecutor(8) as threads:
        sleeps = [threads.submit(cancellation.sleep, 60) for _ in range(8)]
        assert wait(sleeps, timeout=0.2).not_done
        cancellation.cancel()
        cancellation.cancel()

        assert [type(each.exception(10)) for each in sleeps] == [CancelledError] * 8
    with pytest.raises(CancelledError):
        cancellation.sleep(60)


@pytest.mark.parametrize("seconds", [0.05, 0, -1])
def test_a_sleep_nobody_ends_takes_its_time(seconds: float) -> None:
    started = time.monotonic()
    Cancellation().sleep(seconds)

    assert seconds <= time.monotonic() - started < 10


def test_t9_the_time_of_a_pause_does_not_count_for_a_request_that_is_tried_again() -> None:
    cancellation = Cancellation()
    attempts = []

    def ask() -> int:
        attempts.append(time.monotonic())
        if len(attempts) == 1:
            cancellation.pause()
            threading.Timer(2.5, cancellation.resume).start()
        if len(attempts) < 3:
            raise StoreUnavailableError("no")
        return 7

    policy = RetryPolicy(deadline_seconds=2.0, initial_seconds=0.01)

    assert policy.call(ask, what="ask", cancellation=cancellation) == 7
    assert attempts[1] - attempts[0] > 2.4, "no attempt begins in a pause"


def test_t9_in_a_pause_no_further_part_is_read_and_what_came_counts(tmp_path: Path) -> None:
    data = os.urandom(PART_BYTES) * 12
    cancellation = Cancellation()
    asked: list[int] = []
    told: list[int] = []

    def read_part(offset: int, length: int, _stop: Cancellation, write: Write) -> Part:
        asked.append(offset)
        if len(asked) == 3:
            cancellation.pause()
        write(data[offset : offset + length], offset)
        return Part("v", len(data))

    def receive_all() -> None:
        with (tmp_path / "file").open("wb+") as file:
            receive(
                Digest.of(data), file.fileno(), read_part,
                lanes=Lanes(2), cancellation=cancellation, progress=HighWater(told.append),
            )  # fmt: skip

    receiving = threading.Thread(target=receive_all)
    receiving.start()
    until(lambda: cancellation.paused)
    # Those of the window are still handed to the two threads that read.
    under_way = until_unchanged(lambda: len(asked), seconds=0.5)
    until(lambda: sum(told) >= len(asked) * PART_BYTES)

    assert under_way < 12
    assert sum(told) == len(asked) * PART_BYTES
    cancellation.resume()
    receiving.join(30)
    assert (sorted(asked), sum(told)) == (list(range(0, len(data), PART_BYTES)), len(data))
