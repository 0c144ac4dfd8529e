"""A limit holds for all who share its account, and nobody who is killed leaves others waiting."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent_plugin.content import bandwidth, events
from agent_plugin.content.bandwidth import (
    GRANT_SECONDS,
    LEAST_GRANT_BYTES,
    MOST_GRANT_BYTES,
    SAVED_SECONDS,
    Allowance,
    Limit,
)
from agent_plugin.content.blob_cache_leases import lock_within
from agent_plugin.content.errors import CancelledError
from agent_plugin.content.store import Cancellation

KIB = 1024
MIB = 1024 * KIB


class Clock:
    """A clock that goes on while somebody sleeps, and not otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[[int], Allowance]:
    def made(bytes_per_second: int) -> Allowance:
        limit = Limit(bytes_per_second, str(tmp_path / "limits" / "download"))
        return Allowance(limit, clock=clock, sleep=clock.sleep)

    return made


@pytest.mark.parametrize("rate", [16 * KIB, MIB, 100 * MIB, 1_000 * MIB])
def test_so_many_bytes_a_second_are_granted(
    make: Callable[[int], Allowance], clock: Clock, rate: int
) -> None:
    allowance = make(rate)
    begun = clock.now

    taken = 0
    for size in (1, 8 * KIB, rate // 3, rate, 2 * rate):
        allowance.take(size)
        taken += size

    elapsed = clock.now - begun
    # The last piece is granted before it is paid for, and a moment's worth may be had at once.
    piece = min(max(rate * GRANT_SECONDS, LEAST_GRANT_BYTES), MOST_GRANT_BYTES)
    assert taken <= (elapsed + SAVED_SECONDS) * rate + piece + 1
    assert elapsed * rate <= taken


def test_all_who_share_the_account_have_the_limit_together(
    make: Callable[[int], Allowance], clock: Clock
) -> None:
    first, second = make(MIB), make(MIB)
    begun = clock.now

    for _ in range(32):
        first.take(256 * KIB)
        second.take(256 * KIB)

    assert clock.now - begun == pytest.approx(16, abs=0.5)


def test_what_nobody_took_for_long_is_not_saved(
    make: Callable[[int], Allowance], clock: Clock
) -> None:
    allowance = make(MIB)
    allowance.take(MIB)
    clock.now += 3600
    begun = clock.now

    allowance.take(10 * MIB)

    assert clock.now - begun == pytest.approx(10, abs=0.5)


def test_without_a_limit_nothing_waits_and_nothing_is_written(tmp_path: Path) -> None:
    assert Allowance(None).take(1 << 60) == 0.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", [b"", b"\xff" * 8, b"\0" * 3, b"\x00\x00\x00\x00\x00\x00\xf8\x7f"]
)
def test_a_damaged_account_holds_nobody_up(
    make: Callable[[int], Allowance], clock: Clock, tmp_path: Path, damage: bytes
) -> None:
    (tmp_path / "limits").mkdir()
    (tmp_path / "limits/download").write_bytes(damage)
    begun = clock.now

    make(MIB).take(MIB)

    assert 0.8 <= clock.now - begun <= 1.2


def test_a_host_that_has_started_anew_owes_nothing(
    make: Callable[[int], Allowance], clock: Clock
) -> None:
    clock.now = 1_000_000.0
    make(MIB).take(MIB)
    clock.now = begun = 10.0

    make(MIB).take(MIB)

    assert clock.now - begun <= 1.2


def test_an_account_is_closed_to_others(make: Callable[[int], Allowance], tmp_path: Path) -> None:
    make(MIB).take(1)

    assert (tmp_path / "limits").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "limits/download").stat().st_mode & 0o777 == 0o600


def test_without_an_account_a_process_keeps_the_limit_for_itself_and_says_so_once(
    tmp_path: Path,
    clock: Clock,
    expected_events: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected_events.add(events.LIMIT_NOT_SHARED)
    (tmp_path / "file").write_bytes(b"")
    limit = Limit(MIB, str(tmp_path / "file" / "download"))
    allowance = Allowance(limit, clock=clock, sleep=clock.sleep)
    begun = clock.now

    allowance.take(4 * MIB)

    assert clock.now - begun == pytest.approx(4, abs=0.5)
    told = [each.getMessage() for each in caplog.records]
    assert told.count(events.LIMIT_NOT_SHARED) == 1


def test_who_waits_can_be_cancelled(tmp_path: Path) -> None:
    allowance = Allowance(Limit(16 * KIB, str(tmp_path / "limits" / "upload")))
    cancellation = Cancellation()
    failures: list[BaseException] = []

    def take() -> None:
        try:
            allowance.take(1 << 40, cancellation)
        except CancelledError as error:
            failures.append(error)

    threads = [threading.Thread(target=take, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    cancellation.cancel()
    for thread in threads:
        thread.join(60)

    assert len(failures) == 3


TAKER = """
import sys
from agent_plugin.content.bandwidth import Allowance, Limit
allowance = Allowance(Limit(int(sys.argv[1]), sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    allowance.take(16384)
    print("taken", flush=True)
"""


@pytest.fixture
def taker(tmp_path: Path) -> Iterator[Callable[[int, int], "subprocess.Popen[str]"]]:
    """Start processes that take 16 KiB so often, once told to."""
    running: list[subprocess.Popen[str]] = []

    def started(rate: int, times: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", TAKER, str(rate), str(tmp_path / "limits/x"), str(times)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield started
    for process in running:
        process.kill()
        process.communicate()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_have_the_limit_together(
    taker: Callable[[int, int], "subprocess.Popen[str]"],
) -> None:
    """Two processes of 24 pieces each at 16 a second: 3 s, where one alone would take 1.5."""
    processes = [taker(256 * KIB, 24) for _ in range(2)]
    begun = time.monotonic()
    for process in processes:
        go(process)
    for process in processes:
        process.wait(120)

    # A busy machine takes longer, none takes less.
    assert time.monotonic() - begun >= 2.7


def test_a_killed_process_leaves_nobody_waiting(
    taker: Callable[[int, int], "subprocess.Popen[str]"],
) -> None:
    """It was granted a second's worth at most, whatever it still wanted."""
    killed, other = taker(16 * KIB, 1 << 20), taker(16 * KIB, 2)
    go(killed)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "taken\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(60)
    go(other)

    assert other.wait(120) == 0


def test_a_process_that_is_stopped_with_the_account_holds_nobody_up(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "_LOCK_SECONDS", 0.01)
    account = tmp_path / "download"
    with account.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        begun = clock.now
        Allowance(Limit(MIB, str(account)), clock=clock, sleep=clock.sleep).take(2 * MIB)

    assert clock.now - begun == pytest.approx(2, abs=0.5)


def test_a_process_that_is_stopped_with_the_account_is_waited_for_once(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to be waited for a second with each piece, of a twentieth of one."""
    waits: list[float] = []

    def counted(fd: int, operation: int, seconds: float) -> bool:
        waits.append(seconds)
        return lock_within(fd, operation, 0)

    monkeypatch.setattr(bandwidth, "lock_within", counted)
    account = tmp_path / "download"
    allowance = Allowance(Limit(MIB, str(account)), clock=clock, sleep=clock.sleep)
    with account.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        allowance.take(MIB)
    assert waits[0] > 0
    assert set(waits[1:]) == {0.0}

    # It has gone on.
    allowance.take(MIB)
    assert waits[-1] > 0
