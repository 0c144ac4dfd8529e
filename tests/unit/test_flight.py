"""Threads that are left behind, and the limit that reacts to throttling."""

import threading
import time

import pytest

from agent_plugin.content.errors import CancelledError, StoreThrottledError
from agent_plugin.content.flight import AdaptiveLimit, Lanes
from agent_plugin.content.store import Cancellation
from tests.servers.promptness import STOP_SECONDS


def test_a_lane_returns_what_was_returned_and_raises_what_was_raised() -> None:
    lanes = Lanes(2)
    assert lanes.run(lambda: 7, Cancellation()) == 7
    with pytest.raises(ZeroDivisionError):
        lanes.run(lambda: 1 // 0, Cancellation())
    assert lanes.run(lambda: 8, Cancellation()) == 8


def test_whoever_cancels_does_not_wait_for_what_hangs() -> None:
    lanes = Lanes(1)
    release = threading.Event()
    cancellation = Cancellation()
    threading.Timer(0.05, cancellation.cancel).start()
    begun = time.monotonic()

    with pytest.raises(CancelledError):
        lanes.run(lambda: release.wait(30), cancellation)
    assert time.monotonic() - begun < STOP_SECONDS
    release.set()
    assert lanes.run(lambda: "free again", Cancellation()) == "free again"


def test_no_more_threads_run_than_allowed_and_all_work_is_done() -> None:
    lanes = Lanes(3)
    lock, together = threading.Lock(), threading.Barrier(3)
    running = most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        # Fewer would wait for ever; a fourth would have come by the time that they go on.
        together.wait(30)
        time.sleep(0.002)
        with lock:
            running -= 1

    for future in [lanes.submit(work) for _ in range(51)]:
        future.result(30)
    assert most == 3


def refuse_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no thread begin any more, as where pids.max of a cgroup is reached."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_a_thread_that_the_host_did_not_give_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen to wait for ever: as many as may be were taken to be there."""
    lanes = Lanes(2)
    refuse_threads(monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't start"):
            lanes.submit(int)
    monkeypatch.undo()

    assert lanes.submit(lambda: 7).result(10) == 7


def test_where_the_host_gives_no_further_thread_those_there_are_do_all_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lanes = Lanes(2)
    release = threading.Event()
    first = lanes.submit(lambda: release.wait(10))
    refuse_threads(monkeypatch)
    others = [lanes.submit(lambda: "done") for _ in range(3)]
    monkeypatch.undo()
    release.set()
    assert first.result(10)
    assert [each.result(10) for each in others] == ["done"] * 3

    both = threading.Barrier(2)
    at_once = [lanes.submit(lambda: both.wait(10)) for _ in range(2)]
    assert {each.result(20) for each in at_once} == {0, 1}, "there are two again"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def throttled(limit: AdaptiveLimit) -> None:
    with pytest.raises(StoreThrottledError), limit.slot():
        raise StoreThrottledError("slow down")


def test_throttling_halves_what_was_under_way_but_once_for_one_burst() -> None:
    clock = Clock()
    limit = AdaptiveLimit(64, clock=clock)
    with limit.slot(), limit.slot(), limit.slot():
        throttled(limit)
        assert limit.allowed == 2

        clock.now += 0.5
        with limit._changed:
            limit._active -= 2  # Places, so that one more may enter.
        throttled(limit)
        assert limit.allowed == 2
        clock.now += 0.6
        throttled(limit)
        assert limit.allowed == 1
        with limit._changed:
            limit._active += 2


def test_what_went_well_lets_the_limit_grow_to_where_it_was() -> None:
    limit = AdaptiveLimit(4, clock=Clock())
    throttled(limit)
    assert limit.allowed == 1
    seen = []
    for _ in range(12):
        with limit.slot():
            pass
        seen.append(limit.allowed)

    assert seen == sorted(seen)
    assert seen[0] == 2
    assert seen[-1] == 4


def test_a_place_is_waited_for_and_can_be_cancelled() -> None:
    limit = AdaptiveLimit(1)
    cancellation = Cancellation()
    with limit.slot():
        threading.Timer(0.05, cancellation.cancel).start()
        with pytest.raises(CancelledError), limit.slot(cancellation):
            pass
    entered = threading.Event()

    def enter() -> None:
        with limit.slot():
            entered.set()

    with limit.slot():
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(60)
    thread.join(60)
