"""How many bytes a second move between this host and its stores, whoever of the host moves them.

Whoever is about to move bytes takes them first, in pieces. A piece is granted when all that was
granted before is paid for by the time that has passed; then the piece is owed. What is owed stands
in an account, a file of eight bytes that all processes of the host share: until when all is paid,
by the monotonic clock, which all of them read alike. So nobody ever owes more than one piece, and a
process that is killed leaves nothing behind that others would have to wait for.

Where the account can not be had, each process keeps the limit for itself.

Concurrency: any thread may call anything; of a process one thread at a time waits for a grant.
"""

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fcntl import LOCK_EX
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.content import events
from agent_plugin.content.blob_cache_leases import lock_within
from agent_plugin.content.store import Cancellation

# So much at a time; less than the smallest is not worth the question.
GRANT_SECONDS: Final = 0.05
LEAST_GRANT_BYTES: Final = 16 * 1024
MOST_GRANT_BYTES: Final = 4 * 1024 * 1024
# For so long back what nobody took can still be had: nobody wakes up on time.
SAVED_SECONDS: Final = 0.1
# The account is locked for as long as eight bytes take.
_LOCK_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.1
_PAID: Final = struct.Struct("<d")

log = events.get_logger()


class Limit(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """So many bytes a second for all who share an account.

    Attributes:
        bytes_per_second: More than 0.
        account: The account's file; its directory is made, closed to others.
    """

    bytes_per_second: int
    account: str


class Allowance:
    """What may be moved in one direction.

    Args:
        limit: None for as much as there is.
        clock: Seconds, monotonic, the same for all processes of the host.
        sleep: Waits, at most as long as it is told.
    """

    def __init__(
        self,
        limit: Limit | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limit = limit
        self._clock = clock
        self._sleep = sleep
        self._waiting = threading.Lock()
        self._own_paid = 0.0
        self._is_shared = True
        # Whoever is stopped with the account is waited for once, not for each piece.
        self._lock_seconds = _LOCK_SECONDS

    def take(self, count: int, cancellation: Cancellation | None = None) -> float:
        """Wait until so many bytes may be moved; return the seconds that took.

        Raises:
            CancelledError: Cancellation was wished; what was granted so far is lost.
        """
        if self._limit is None or count <= 0:
            return 0.0
        begun = self._clock()
        rate = self._limit.bytes_per_second
        most = min(max(int(rate * GRANT_SECONDS), LEAST_GRANT_BYTES), MOST_GRANT_BYTES)
        for position in range(0, count, most):
            with self._turn(cancellation):
                piece = min(most, count - position)
                while (wait := self._ask(piece / rate, most / rate)) > 0:
                    self._pause(min(wait, _POLL_SECONDS), cancellation)
        return self._clock() - begun

    @contextmanager
    def _turn(self, cancellation: Cancellation | None) -> Iterator[None]:
        while not self._waiting.acquire(timeout=_POLL_SECONDS):
            if cancellation is not None:
                cancellation.check()
        try:
            yield
        finally:
            self._waiting.release()

    def _pause(self, seconds: float, cancellation: Cancellation | None) -> None:
        if cancellation is not None:
            cancellation.check()
        self._sleep(seconds)

    def _ask(self, seconds: float, most: float) -> float:
        """Take what `seconds` pay for and return 0, or return how long to wait before asking again.

        Args:
            seconds: What the piece costs.
            most: What the largest one does.
        """
        if self._is_shared:
            try:
                with self._account() as fd:
                    if fd is not None:
                        paid, wait = self._grant(_read(fd), seconds, most)
                        if not wait:
                            os.pwrite(fd, _PAID.pack(paid), 0)
                        return wait
            except OSError as error:
                self._is_shared = False
                extra = {"reason": f"{error.filename or self._limit}: {error.strerror}"}
                log.warning(events.LIMIT_NOT_SHARED, extra=extra)
        self._own_paid, wait = self._grant(self._own_paid, seconds, most)
        return wait

    def _grant(self, paid: float, seconds: float, most: float) -> tuple[float, float]:
        """Return until when all is paid, with what is granted now, and how long to wait for it."""
        now = self._clock()
        # More is never owed: the host has started anew since, or the file is damaged.
        if not paid <= now + most + _LOCK_SECONDS:
            paid = now
        if paid > now:
            return paid, paid - now
        return max(paid, now - SAVED_SECONDS) + seconds, 0.0

    @contextmanager
    def _account(self) -> Iterator[int | None]:
        """Lend the account, locked; None if somebody holds it, stopped perhaps."""
        assert self._limit is not None  # noqa: S101 - nobody asks without
        path = Path(self._limit.account)
        # Opened each time: a lock belongs to who opened the file, and mounts fork.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, flags, 0o600)
        try:
            is_locked = lock_within(fd, LOCK_EX, self._lock_seconds)
            self._lock_seconds = _LOCK_SECONDS if is_locked else 0.0
            yield fd if is_locked else None
        finally:
            os.close(fd)


class Both(Allowance):
    """What may be moved when two limits hold at once.

    Args:
        one, other: The limits.
    """

    def __init__(self, one: Allowance, other: Allowance) -> None:
        super().__init__(None)
        self._both = (one, other)

    def take(self, count: int, cancellation: Cancellation | None = None) -> float:
        """Wait until both allow so many bytes; return the seconds that took.

        Raises:
            CancelledError: Cancellation was wished; what was granted so far is lost.
        """
        return sum(limit.take(count, cancellation) for limit in self._both)


def _read(fd: int) -> float:
    data = os.pread(fd, _PAID.size, 0)
    paid: float = _PAID.unpack(data)[0] if len(data) == _PAID.size else 0.0
    return paid


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What may be moved from and to a store; by default as much as there is."""

    download: Allowance = field(default_factory=lambda: Allowance(None))
    upload: Allowance = field(default_factory=lambda: Allowance(None))
