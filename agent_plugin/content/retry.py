"""When a request is sent again, and when we give up."""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeVar

from agent_plugin.content import events
from agent_plugin.content.errors import (
    BlobCorruptError,
    PropmasterError,
    StoreProtocolError,
    StoreThrottledError,
)
from agent_plugin.content.store import Cancellation

T = TypeVar("T")

# What arrives damaged may be damaged at its source, so it is not worth many tries.
DAMAGED: Final = (BlobCorruptError, StoreProtocolError)

# Told why an attempt failed and after how many seconds the next one begins; must not block.
Retried = Callable[[PropmasterError, float], None]
_RETRIED: Final[ContextVar[Retried | None]] = ContextVar("retried", default=None)

# Its own: who seeds the process's generator would make all its workers wait alike, and a request
# that was left behind would draw from it beside whoever counts on its order.
_GENERATOR: Final = random.Random()  # noqa: S311 - a wait is no secret

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long a request is tried, with exponential backoff and equal jitter.

    The waits between 12 attempts add up to 31 to 63 s, so an outage of 30 s is outlived.

    Attributes:
        attempts: Tries in all, >= 1; those that the store asked to come later do not count.
        deadline_seconds: No try begins later than this after the first one failed, not counting the
            time in which something moved (Movement).
        initial_seconds: The longest first wait; each further one is twice as long.
        cap_seconds: The longest wait.
        damaged_retries: Tries after an answer that was damaged (DAMAGED), besides the first. With
            three, one blob in 120 would fail where 30 % of the answers are damaged.
        damaged_cap_seconds: The longest wait after one: it is no sign of an overload.
        connect_timeout: Seconds for a connection to be made.
        read_timeout: Seconds without a byte from the store.
        least_bytes_per_second: What is slower than this, on the average, is not waited for. On a
            line of 20 Mbit/s each of 64 requests has 38 KiB/s.
        random: Evenly distributed in [0, 1).
        clock: Seconds, monotonic.
        sleep: Used where no cancellation is given.

    Source of the jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    attempts: int = 12
    deadline_seconds: float = 120.0
    initial_seconds: float = 0.2
    cap_seconds: float = 10.0
    damaged_retries: int = 9
    damaged_cap_seconds: float = 1.0
    connect_timeout: float = 5.0
    read_timeout: float = 15.0
    least_bytes_per_second: float = 16 * 1024
    random: Callable[[], float] = _GENERATOR.random
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def call(
        self,
        fn: Callable[[], T],
        *,
        what: str,
        cancellation: Cancellation | None = None,
        only: type[PropmasterError] = PropmasterError,
        movement: "Movement | None" = None,
    ) -> T:
        """Return what `fn` returns, trying again while it raises an error that is `retryable`.

        Args:
            fn: One attempt.
            what: The attempt in words for the log, such as "get s3://bucket/key".
            cancellation: Checked before each attempt; ends a wait at once. No attempt begins in a
                pause, whose time does not count.
            only: Other errors are raised as they are, also if they are retryable.
            movement: What `fn` keeps of its attempts; its seconds put the deadline off.

        Raises:
            PropmasterError: The last error, when it is not retryable or the budget is spent; in the
                latter case the message says after how many attempts and seconds.
            CancelledError: Cancellation was wished.
        """
        started = self.clock()
        failing_since: float | None = None
        damaged = counted = 0
        paused = 0.0
        for attempt in itertools.count(1):
            if cancellation is not None:
                paused += cancellation.pass_boundary()
            try:
                return fn()
            except only as error:
                if not error.retryable:
                    raise
                damaged += isinstance(error, DAMAGED)
                counted += not isinstance(error, StoreThrottledError)
                elapsed = self.clock() - started - paused
                # As on a clock that stands still while something moves.
                still = elapsed - (movement.seconds if movement else 0.0)
                failing_since = still if failing_since is None else failing_since
                wait = self.wait_after(attempt)
                if isinstance(error, DAMAGED):
                    wait = min(wait, self.damaged_cap_seconds)
                if (
                    counted >= self.attempts
                    or damaged > self.damaged_retries
                    or still - failing_since + wait > self.deadline_seconds
                ):
                    raise _given_up(error, attempt, elapsed) from error
                _tell_retry(error, what, attempt, wait)
            if cancellation is None:
                self.sleep(wait)
            else:
                cancellation.sleep(wait)
        raise AssertionError("unreachable: the loop has no end of its own")

    def longest(self, length: int) -> float:
        """Return the seconds that a request for so many bytes may last, whatever moves."""
        return self.read_timeout + length / self.least_bytes_per_second

    def wait_after(self, attempt: int) -> float:
        """Return the seconds to wait after the attempt of that number (from 1), jittered."""
        # 2**30 is past every cap; without a bound the power would overflow a float.
        longest = min(self.cap_seconds, self.initial_seconds * 2.0 ** min(attempt - 1, 30))
        return longest * (0.5 + 0.5 * self.random())


@dataclass(slots=True)
class Movement:
    """For how long something moved in the attempts of one request, whichever way they ended.

    Large requests on a slow line take minutes. If those counted, a second passing fault would be
    taken for a lasting one. What hangs must count, so an attempt counts for as long as one can last
    in which nothing moves; and one that was ended for being too slow counts whole.

    Attributes:
        silence: Seconds after which an attempt ends by itself in which nothing moves.
        too_slow: Seconds after which an attempt ends by itself although something moves.
        seconds: So far, of all attempts.
    """

    silence: float
    too_slow: float = math.inf
    seconds: float = 0.0

    def held_back(self, seconds: float) -> None:
        """Take a time into account in which nothing was to move."""
        self.seconds += seconds

    def add(self, lasted: float) -> None:
        """Take an attempt into account that lasted so many seconds."""
        if lasted < self.too_slow:
            self.seconds += max(0.0, lasted - self.silence)


@contextmanager
def telling(retried: Retried) -> Iterator[None]:
    """Have `retried` called for each request of the block that is sent again.

    Also for those that other threads send for it (flight.Lanes); it is called on their threads, and
    by one that was left behind also after the block.
    """
    token = _RETRIED.set(retried)
    try:
        yield
    finally:
        _RETRIED.reset(token)


def _tell_retry(error: PropmasterError, what: str, attempt: int, wait: float) -> None:
    if (retried := _RETRIED.get()) is not None:
        retried(error, wait)
    log.info(
        events.REQUEST_RETRIED,
        extra={
            "request": what,
            "attempt": attempt,
            "wait_seconds": round(wait, 3),
            "error": error.code,
            "reason": error.message,
        },
    )


def _given_up(error: PropmasterError, attempts: int, elapsed: float) -> PropmasterError:
    times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return type(error)(
        f"{error.message} (given up after {times} in {elapsed:.1f} s)", hint=error.hint
    )
