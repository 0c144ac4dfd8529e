"""When a request is tried again, and when it is given up. Time is the test's own."""

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    CancelledError,
    PropmasterError,
    StoreAccessError,
    StoreThrottledError,
    StoreUnavailableError,
)
from agent_plugin.content.flight import Lanes
from agent_plugin.content.retry import Movement, RetryPolicy, telling
from agent_plugin.content.s3_errors import DamagedAnswerError
from agent_plugin.content.store import Cancellation


@dataclass
class Time:
    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


def policy(time: Time, *, chance: float = 0.0, **limits: float) -> RetryPolicy:
    return RetryPolicy(
        random=lambda: chance,
        clock=time.clock,
        sleep=time.sleep,
        **limits,  # type: ignore[arg-type]  # the attempts are an int
    )


def failing(errors: list[PropmasterError]) -> Callable[[], str]:
    """Raise one error after another, then return."""
    coming: Iterator[PropmasterError] = iter(errors)

    def attempt() -> str:
        for error in coming:
            raise error
        return "done"

    return attempt


def test_success_is_returned_without_waiting(time: Time) -> None:
    assert policy(time).call(lambda: 7, what="ask") == 7
    assert time.slept == []


def test_a_passing_failure_is_outlived(time: Time) -> None:
    errors: list[PropmasterError] = [StoreUnavailableError("no"), StoreThrottledError("slow")]

    assert policy(time).call(failing(errors), what="ask") == "done"
    assert time.slept == [0.1, 0.2]


def test_waits_double_up_to_the_cap_and_are_half_chance(time: Time) -> None:
    longest = [policy(time, chance=1.0).wait_after(attempt) for attempt in range(1, 9)]
    shortest = [policy(time, chance=0.0).wait_after(attempt) for attempt in range(1, 9)]

    assert longest == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10])
    assert shortest == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert policy(time, chance=1.0).wait_after(10_000) == 10


def test_the_chance_is_not_that_of_the_process() -> None:
    before = random.getstate()

    RetryPolicy().wait_after(1)

    assert random.getstate() == before


def test_an_outage_of_thirty_seconds_is_outlived_even_with_the_shortest_waits(time: Time) -> None:
    healthy_at = time.now + 30

    def attempt() -> str:
        if time.now < healthy_at:
            raise StoreUnavailableError("refused")
        return "done"

    assert policy(time).call(attempt, what="ask") == "done"


@pytest.mark.parametrize("error", [StoreAccessError("403"), BlobNotFoundError("404")])
def test_what_will_not_change_is_not_tried_again(time: Time, error: PropmasterError) -> None:
    with pytest.raises(type(error)) as raised:
        policy(time).call(failing([error]), what="ask")

    assert raised.value is error
    assert time.slept == []


def test_the_last_error_says_how_long_it_was_tried(time: Time) -> None:
    errors: list[PropmasterError] = [
        StoreUnavailableError(f"number {number}", hint="Wait.") for number in range(20)
    ]

    with pytest.raises(StoreUnavailableError, match="number 11") as raised:
        policy(time).call(failing(errors), what="ask")

    assert raised.value.message == "number 11 (given up after 12 attempts in 31.3 s)"
    assert raised.value.hint == "Wait."
    assert raised.value.__cause__ is errors[11]
    assert len(time.slept) == 11


def lasting(time: Time, seconds: float, error: PropmasterError) -> Callable[[], None]:
    """Fail each time, after so many seconds."""

    def attempt() -> None:
        time.now += seconds
        raise error

    return attempt


def test_nothing_is_tried_after_the_deadline(time: Time) -> None:
    begun = time.now
    with pytest.raises(StoreThrottledError, match="given up after 4 attempts in 200"):
        policy(time).call(lasting(time, 50, StoreThrottledError("slow")), what="ask")
    assert time.now - begun == pytest.approx(200.7)


@pytest.mark.parametrize("error", [StoreUnavailableError("reset"), BlobCorruptError("bits")])
def test_the_deadline_begins_with_the_first_failure(time: Time, error: PropmasterError) -> None:
    """However long something went well before it."""
    fails = iter([True, False])

    def attempt() -> str:
        time.now += 1000
        if next(fails):
            raise error
        return "done"

    assert policy(time).call(attempt, what="fetch") == "done"


def test_a_store_that_hangs_is_given_up_at_the_deadline(time: Time) -> None:
    """Two attempts that hang may be outside of it: the first, and one that began just before."""
    begun = time.now
    attempt = lasting(time, 15, StoreUnavailableError("timed out"))

    with pytest.raises(StoreUnavailableError, match="given up after 8 attempts"):
        policy(time, chance=1.0).call(attempt, what="ask")
    assert 120 < time.now - begun < 15 + 120 + 15


def test_the_time_in_which_something_moved_puts_the_deadline_off(time: Time) -> None:
    movement = Movement(silence=20)

    def attempt() -> None:
        time.now += 300
        movement.add(300)
        raise StoreUnavailableError("reset")

    with pytest.raises(StoreUnavailableError, match="given up after 7 attempts"):
        policy(time).call(attempt, what="fetch", movement=movement)
    assert movement.seconds == 7 * 280


def test_an_attempt_in_which_nothing_may_have_moved_puts_nothing_off() -> None:
    movement = Movement(silence=20)
    for lasted in (0.1, 15, 20):
        movement.add(lasted)
    assert movement.seconds == 0


def test_an_attempt_that_was_ended_for_being_too_slow_puts_nothing_off(time: Time) -> None:
    """So that a store which drips is given up with the second one."""
    movement = Movement(silence=20, too_slow=527)

    def attempt() -> None:
        time.now += 527
        movement.add(527)
        raise StoreUnavailableError("timed out")

    with pytest.raises(StoreUnavailableError, match="given up after 2 attempts"):
        policy(time).call(attempt, what="fetch", movement=movement)


def test_a_request_may_last_by_its_length() -> None:
    assert RetryPolicy().longest(0) == 15
    assert RetryPolicy().longest(8 * 1024 * 1024) == 15 + 512


@pytest.mark.parametrize("damage", [BlobCorruptError("bits"), DamagedAnswerError("range")])
def test_damage_is_tried_again_nine_times(time: Time, damage: PropmasterError) -> None:
    assert policy(time).call(failing([damage] * 9), what="ask") == "done"
    with pytest.raises(type(damage), match="given up after 10 attempts"):
        policy(time).call(failing([damage] * 10), what="ask")


def test_an_answer_to_come_later_counts_only_against_the_time(time: Time) -> None:
    errors: list[PropmasterError] = [StoreThrottledError("slow down")] * 14

    assert policy(time).call(failing(errors), what="ask") == "done"


def test_damage_and_other_failures_are_counted_apart(time: Time) -> None:
    errors: list[PropmasterError] = [BlobCorruptError("bits"), StoreUnavailableError("no")] * 3

    assert policy(time).call(failing(errors), what="ask") == "done"


def test_other_errors_than_those_wanted_are_raised_as_they_are(time: Time) -> None:
    error = StoreUnavailableError("no")
    with pytest.raises(StoreUnavailableError) as raised:
        policy(time).call(failing([error]), what="ask", only=BlobCorruptError)
    assert raised.value is error


def test_cancellation_is_seen_before_each_attempt_and_ends_a_wait() -> None:
    cancellation = Cancellation()
    calls = 0

    def attempt() -> None:
        nonlocal calls
        calls += 1
        cancellation.cancel()
        raise StoreUnavailableError("no")

    patient = RetryPolicy(initial_seconds=600, cap_seconds=600, deadline_seconds=3600)
    with pytest.raises(CancelledError):
        patient.call(attempt, what="ask", cancellation=cancellation)
    with pytest.raises(CancelledError):
        patient.call(attempt, what="ask", cancellation=cancellation)
    assert calls == 1


def test_each_retry_is_an_event(time: Time, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=events.LOGGER_NAME):
        policy(time).call(failing([StoreThrottledError("slow")]), what="get s3://b/k")

    [record] = caplog.records
    assert record.getMessage() == events.REQUEST_RETRIED
    assert record.levelno == logging.INFO
    assert dict(events.fields_of(record)) == {
        "request": "get s3://b/k",
        "attempt": 1,
        "wait_seconds": 0.1,
        "error": "E_THROTTLED",
        "reason": "slow",
    }


def test_whoever_asks_is_told_of_each_attempt_that_is_made_again(time: Time) -> None:
    told: list[tuple[str, float]] = []
    error = StoreUnavailableError("no")

    with telling(lambda error, wait: told.append((error.code, wait))):
        policy(time).call(failing([error, error]), what="x")
    policy(time).call(failing([error]), what="another's")

    assert told == [("E_NETWORK", wait) for wait in time.slept[:2]]


def test_whoever_asks_is_told_what_other_threads_send_again_for_it(time: Time) -> None:
    told: list[str] = []
    lanes = Lanes(1)
    error = StoreUnavailableError("no")

    with telling(lambda error, _wait: told.append(error.code)):
        future = lanes.submit(lambda: policy(time).call(failing([error]), what="x"))
        assert lanes.result(future, Cancellation()) == "done"
    future = lanes.submit(lambda: policy(time).call(failing([error]), what="another's"))
    lanes.result(future, Cancellation())

    assert told == ["E_NETWORK"]
