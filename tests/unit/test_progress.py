"""How far, how fast and how long still, by a clock that a test moves."""

import io
import os
import pty
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_plugin.transfer.ledger import TransferRow
from agent_plugin.transfer.progress import (
    Meter,
    PlainView,
    Progress,
    Snapshot,
    TerminalView,
    describe,
    describe_transfer,
    format_bytes,
    format_duration,
    view_for,
)
from agent_plugin.transfer.states import TransferStatus


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_known_before_the_size_is(clock: Clock) -> None:
    meter = Meter(0, -1, clock=clock)
    clock.now += 1
    meter.advance(5_000_000, files=1)

    shown = meter.snapshot()

    assert (shown.total_bytes, shown.percent, shown.remaining) == (-1, 0, "")
    assert shown.speed == 5.0


@pytest.mark.parametrize(
    ("done", "total", "percent"),
    [(0, 3, 0), (1, 3, 33), (2, 3, 66), (3, 3, 100), (1, 101, 0), (999, 1000, 99), (1, 1000, 0)],
)
def test_the_percentage_is_rounded_down(done: int, total: int, percent: int, clock: Clock) -> None:
    meter = Meter(1, total, clock=clock)
    meter.advance(done, files=done == total)

    assert meter.snapshot().percent == percent


def test_the_percentage_is_100_only_when_every_file_is_in_place(clock: Clock) -> None:
    meter = Meter(2, 10, clock=clock)
    meter.advance(10, files=1)
    assert meter.snapshot().percent == 99, "an empty file is still missing"

    meter.advance(0, files=1)
    assert meter.snapshot().percent == 100


def test_a_transfer_of_empty_files_is_measured_in_files(clock: Clock) -> None:
    meter = Meter(4, 0, clock=clock)
    shown = []
    for _ in range(4):
        shown.append(meter.snapshot().percent)
        meter.advance(0, files=1)

    assert [*shown, meter.snapshot().percent] == [0, 25, 50, 75, 100]


def test_a_transfer_of_nothing_is_complete(clock: Clock) -> None:
    assert Meter(0, 0, clock=clock).snapshot() == Snapshot(0, 0, 0, 0, 100, 0.0, "0:00:00")


def test_more_than_was_promised_is_not_complete_before_its_files_are(clock: Clock) -> None:
    meter = Meter(2, 10, clock=clock)
    meter.advance(25, files=1)

    assert meter.snapshot().percent == 99


def test_speed_is_of_the_last_minute_only(clock: Clock) -> None:
    meter = Meter(1, 10**12, clock=clock)
    for _ in range(100):
        clock.now += 1
        meter.advance(9_000_000)
        meter.snapshot()
    assert meter.snapshot().speed == pytest.approx(9.0)

    for _ in range(61):
        clock.now += 1
        meter.advance(1_000_000)
        meter.snapshot()
    assert meter.snapshot().speed == pytest.approx(1.0)


def test_a_transfer_that_stands_still_for_a_minute_has_no_speed_and_no_end(clock: Clock) -> None:
    meter = Meter(1, 10**9, clock=clock)
    clock.now += 1
    meter.advance(1_000_000)
    assert meter.snapshot().remaining == "0:16:39"

    for _ in range(61):
        clock.now += 1
        meter.snapshot()
    shown = meter.snapshot()
    assert (shown.speed, shown.remaining) == (0.0, "")


def test_time_left_is_empty_until_something_has_moved(clock: Clock) -> None:
    meter = Meter(1, 100, clock=clock)
    assert meter.snapshot().remaining == ""

    clock.now += 10
    assert meter.snapshot().remaining == ""
    meter.advance(10)
    assert meter.snapshot().remaining == "0:01:30"
    meter.advance(90, files=1)
    assert meter.snapshot().remaining == "0:00:00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59, "0:00:59"), (60, "0:01:00"), (3599, "0:59:59"), (3600, "1:00:00"),
     (360_000, "100:00:00"), (3661, "1:01:01")],
)  # fmt: skip
def test_durations_are_hours_minutes_and_seconds(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_250_000, "1.2 MB"),
     (3_000_000_000, "3.0 GB"), (4e12, "4.0 TB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_sizes_are_in_powers_of_1000(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(0.1, 5)), min_size=1, max_size=40),
    st.booleans(),
)
def test_what_is_shown_never_goes_back_and_never_lies(
    steps: list[tuple[int, float]], empty_last: bool
) -> None:
    """The percentage only grows, is 100 exactly at the end, and speed is never negative.

    Seen to fail with these mutations: `round` for `//`; `min(99, …)` taken away; the bytes alone
    deciding on 100; more files than there are deciding on it; the speed's sign turned.
    """
    clock = Clock()
    sizes = [size for size, _ in steps] + ([0] if empty_last else [])
    meter = Meter(len(sizes), sum(sizes), clock=clock)
    before = -1
    for at, size in enumerate(sizes, start=1):
        clock.now += steps[min(at, len(steps)) - 1][1]
        meter.advance(size, files=1)
        shown = meter.snapshot()
        assert shown.percent >= before
        assert (shown.percent == 100) == (at == len(sizes))
        floor = 100 * sum(sizes[:at]) // sum(sizes) if sum(sizes) else 100 * at // len(sizes)
        assert shown.percent == (100 if at == len(sizes) else min(99, floor))
        assert shown.speed >= 0
        assert shown.files == at
        before = shown.percent


SHOWN = Snapshot(3, 10, 2_500_000, 10_000_000, 25, 1.25, "0:00:06")


def test_a_line_of_text_has_all_that_is_known() -> None:
    assert describe(SHOWN) == "25 %, 3 of 10 files, 2.5 MB of 10.0 MB, 1.2 MB/s, 0:00:06 left"
    unknown = Snapshot(0, 0, 0, -1, 0, 0.0, "")
    assert describe(unknown) == "0 %, 0 of 0 files, 0 bytes of 0 bytes, 0.0 MB/s"


def test_logs_get_a_line_every_ten_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    with PlainView("sync-in", stream, clock=clock) as view:
        for _ in range(50):
            clock.now += 0.5
            view.show(SHOWN)

    assert stream.getvalue() == f"sync-in: {describe(SHOWN)}\n" * 2


def test_a_stream_that_is_no_terminal_gets_lines_of_text() -> None:
    assert isinstance(view_for("sync-in", io.StringIO()), PlainView)


def test_a_terminal_gets_a_bar() -> None:
    leader, follower = pty.openpty()
    try:
        with open(follower, "w", encoding="utf-8", closefd=False) as stream:
            assert isinstance(view_for("sync-in", stream), TerminalView)
    finally:
        os.close(leader)
        os.close(follower)


def test_a_bar_can_be_shown_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with TerminalView("sync-in") as view:
        view.show(SHOWN)
        time.sleep(0)
    assert "Traceback" not in capfd.readouterr().err


def transfer(status: str, done: int, size: int) -> TransferRow:
    return TransferRow(
        1, "", "copy", TransferStatus(status), "", "", "", size, done, "", "", 0.0, None, 500,
        True, "", "", "", "", {}, {}, 0.0, "", 0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "done", "size", "percent"),
    [
        ("init", 0, -1, 0), ("running", 0, 0, 0), ("done", 0, 0, 100), ("running", 999, 1000, 99),
        ("running", 1000, 1000, 99), ("done", 1000, 1000, 100), ("running", 1, 3, 33),
        ("running", -5, 10, 0), ("paused", 50, 100, 50), ("failed", 1999, 2000, 99),
    ],
)  # fmt: skip
def test_t12_the_percentage_is_rounded_down_and_100_only_when_it_is_done(
    status: str, done: int, size: int, percent: int
) -> None:
    assert describe_transfer(transfer(status, done, size), [], 0.0).percent == percent


def test_t12_speed_and_remaining_time_come_from_the_last_minute() -> None:
    row = transfer("running", 40_000_000, 100_000_000)
    # 2 MB/s by now; a minute ago much more moved.
    samples = [(900.0, 9**9), (935.0, 9**9), *((940.0 + at, 1_000_000) for at in range(1, 60, 1))]
    samples = [(moment, 2 * size if moment > 940 else size) for moment, size in samples]

    found = describe_transfer(row, samples, 1000.0)

    assert (found.percent, found.etr) == (40, "0:00:30")
    assert found.speed == pytest.approx(58 * 2 / 59)


@pytest.mark.parametrize(
    ("left", "etr"), [(0, "0:00:00"), (59, "0:00:59"), (3661, "1:01:01"), (360_000, "100:00:00")]
)
def test_t12_the_remaining_time_is_hours_minutes_seconds(left: int, etr: str) -> None:
    row = transfer("running", 0, left * 1_000_000)

    found = describe_transfer(row, [(99.0, 5), (100.0, 1_000_000)], 100.0)

    assert (found.speed, found.etr) == (1.0, etr)


@pytest.mark.parametrize("samples", [[], [(100.0, 5_000_000)], [(99.0, 5), (100.0, 0)], [(1.0, 9)]])
def test_t12_what_can_not_be_told_is_empty(samples: list[tuple[float, int]]) -> None:
    assert describe_transfer(transfer("running", 5, 10), samples, 100.0) == Progress(50, 0.0, "")


@pytest.mark.parametrize("status", ["paused", "waiting", "failed", "aborted"])
def test_t12_what_does_not_move_has_no_speed(status: str) -> None:
    samples = [(99.0, 5), (100.0, 1_000_000)]

    assert describe_transfer(transfer(status, 5, 10), samples, 100.0) == Progress(50, 0.0, "")


def test_t10_what_is_excluded_leaves_the_percentage(clock: Clock) -> None:
    meter = Meter(2, 1000, clock=clock)
    meter.advance(500, files=1)
    meter.expect(-500, files=-1)

    assert meter.snapshot().percent == 100


def test_t9_who_waits_says_so_at_once_and_why() -> None:
    stream = io.StringIO()
    clock = Clock()
    view = PlainView("sync-in", stream, clock=clock)
    shown = Snapshot(1, 4, 10, 40, 25, 0.0, "", waits_for="transfer 7 is paused by 0:root")

    view.show(shown)
    clock.now += 1
    view.show(shown)
    assert stream.getvalue() == ("sync-in: transfer 7 is paused by 0:root; 25 %, 1 of 4 files\n")
    view.show(Snapshot(1, 4, 10, 40, 25, 0.0, ""))
    assert stream.getvalue().count("\n") == 2
