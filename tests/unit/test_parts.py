"""Large blobs in parts: what is in memory, in which order, and what late threads may touch."""

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent_plugin.content import parts
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import BlobCorruptError, CancelledError, FileChangedError
from agent_plugin.content.flight import Lanes
from agent_plugin.content.store import Cancellation, ignore_progress
from tests.servers.descriptors import open_of
from tests.servers.proxied_object import until

if TYPE_CHECKING:
    from typing_extensions import Buffer

DATA = os.urandom(9 * parts.PART_BYTES + 1)
DIGEST = Digest.of(DATA)
THIRD_PART = 2 * parts.PART_BYTES
PIECE_BYTES = 1024 * 1024


def receive(
    read_part: "ReadPart", file: int, cancellation: Cancellation | None = None, most: int = 16
) -> None:
    parts.receive(
        DIGEST,
        file,
        read_part,
        lanes=Lanes(most),
        cancellation=cancellation or Cancellation(),
        progress=parts.HighWater(ignore_progress),
    )


class ReadPart:
    """Reads from memory; counts how many parts were begun and not yet let go of."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.lock = threading.Lock()

    def __call__(
        self, offset: int, length: int, stop: Cancellation, write: parts.Write
    ) -> parts.Part:
        del stop
        with self.lock:
            self.begun.append(offset)
        data, version, size = self.part(offset, DATA[offset : offset + length])
        for start in range(0, len(data), PIECE_BYTES):
            write(data[start : start + PIECE_BYTES], offset + start)
        return parts.Part(version, size)

    def part(self, offset: int, data: bytes) -> tuple[bytes, str, int]:
        del offset
        return data, "v1", len(DATA)


def stop_when_begun(read_part: ReadPart, cancellation: Cancellation) -> None:
    """Wish to stop when a window's parts are begun, and others would have been as well."""
    until(lambda: len(read_part.begun) >= parts.WINDOW_PARTS)
    time.sleep(0.2)
    cancellation.cancel()


def test_parts_that_arrive_in_any_order_make_the_blob() -> None:
    class LastFirst(ReadPart):
        def part(self, offset: int, data: bytes) -> tuple[bytes, str, int]:
            time.sleep(0.002 * (9 - offset // parts.PART_BYTES % 6))
            return super().part(offset, data)

    with tempfile.TemporaryFile() as file:
        receive(LastFirst(), file.fileno())
        assert os.pread(file.fileno(), len(DATA) + 1, 0) == DATA


def test_what_was_received_out_of_order_stays_within_the_window() -> None:
    """While the first part is awaited, no more are begun than the window has."""
    first = threading.Event()
    cancellation = Cancellation()

    class FirstHangs(ReadPart):
        def part(self, offset: int, data: bytes) -> tuple[bytes, str, int]:
            if offset == 0:
                first.wait(60)
            return super().part(offset, data)

    read_part = FirstHangs()
    stopping = threading.Thread(target=stop_when_begun, args=(read_part, cancellation))
    with tempfile.TemporaryFile() as file:
        stopping.start()
        with pytest.raises(CancelledError):
            receive(read_part, file.fileno(), cancellation)
    first.set()
    assert len(read_part.begun) == parts.WINDOW_PARTS


def test_parts_of_two_versions_are_not_mixed() -> None:
    class Replaced(ReadPart):
        def part(self, offset: int, data: bytes) -> tuple[bytes, str, int]:
            return data, "v1" if offset < 20_000_000 else "v2", len(DATA)

    with tempfile.TemporaryFile() as file, pytest.raises(BlobCorruptError, match="replaced"):
        receive(Replaced(), file.fileno())


def test_a_part_of_another_blob_is_found_out() -> None:
    class Wrong(ReadPart):
        def part(self, offset: int, data: bytes) -> tuple[bytes, str, int]:
            return super().part(offset, data if offset else bytes(len(data)))

    class Longer(ReadPart):
        def part(self, offset: int, data: bytes) -> tuple[bytes, str, int]:
            del offset
            return data, "v1", len(DATA) + 1

    with tempfile.TemporaryFile() as file:
        with pytest.raises(BlobCorruptError, match="stored as xxh128"):
            receive(Wrong(), file.fileno())
        with pytest.raises(BlobCorruptError, match=f"stored as {len(DATA) + 1} bytes"):
            receive(Longer(), file.fileno())


def test_a_late_part_is_written_nowhere_and_no_descriptor_is_kept() -> None:
    """The caller's descriptor number is free again, and soon somebody else's."""
    late = threading.Event()
    done = threading.Semaphore(0)
    cancellation = Cancellation()

    class Late(ReadPart):
        def part(self, offset: int, data: bytes) -> tuple[bytes, str, int]:
            late.wait(60)
            done.release()
            return super().part(offset, data)

    read_part = Late()
    threading.Thread(target=stop_when_begun, args=(read_part, cancellation)).start()
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as other:
        received = os.fstat(file.fileno())
        with pytest.raises(CancelledError):
            receive(read_part, file.fileno(), cancellation)
        # Closes it, and whatever else the process opens, the number is the other file's.
        os.dup2(other.fileno(), file.fileno())
        late.set()
        for _ in range(parts.WINDOW_PARTS):
            assert done.acquire(timeout=10)
        time.sleep(0.1)
        assert os.fstat(other.fileno()).st_size == 0
    assert open_of(received) == 0


class HeldUp:
    """Has the first write at a position wait, as a disk may that has much to write back.

    Such a disk can not be had on order, so it is os.pwrite that waits.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held_up_at: int) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        write = os.pwrite

        def pwrite(fd: int, data: "Buffer", offset: int) -> int:
            if offset == held_up_at and not self.begun.is_set():
                self.begun.set()
                self.go_on.wait(30)
            return write(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)


class ReplacedMeanwhile(ReadPart):
    """Of the third part other bytes come, and a replaced object is noticed while they are written.

    `stop` is wished when the attempt has failed.
    """

    def __init__(self, held_up: HeldUp) -> None:
        super().__init__()
        self.held_up = held_up
        self.stop = Cancellation()

    def __call__(
        self, offset: int, length: int, stop: Cancellation, write: parts.Write
    ) -> parts.Part:
        self.stop = stop
        return super().__call__(offset, length, stop, write)

    def part(self, offset: int, data: bytes) -> tuple[bytes, str, int]:
        if offset == THIRD_PART:
            data = bytes(len(data))
        if offset == parts.PART_BYTES:
            self.held_up.begun.wait(30)
            return data, "v2", len(DATA)
        return super().part(offset, data)


def test_no_write_of_a_failed_attempt_comes_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would change what the next attempt has verified."""
    held_up = HeldUp(monkeypatch, THIRD_PART)
    replaced = ReplacedMeanwhile(held_up)
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(1) as pool:
        attempt = pool.submit(receive, replaced, file.fileno())
        until(lambda: replaced.stop.wished)
        # Longer than the wait looks for a wish to stop.
        assert wait([attempt], timeout=0.3).not_done, "a write was still under way"
        held_up.go_on.set()
        with pytest.raises(BlobCorruptError, match="replaced"):
            attempt.result(10)
        receive(ReadPart(), file.fileno())
        assert os.pread(file.fileno(), len(DATA) + 1, 0) == DATA


@pytest.mark.parametrize("make", [ReplacedMeanwhile, lambda _held_up: ReadPart()])
def test_a_write_that_does_not_end_does_not_delay_a_wish_to_stop(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[HeldUp], ReadPart]
) -> None:
    """Whether the attempt has failed already and awaits its end, or has not."""
    held_up = HeldUp(monkeypatch, THIRD_PART)
    read_part = make(held_up)
    cancellation = Cancellation()
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(1) as pool:
        received = os.fstat(file.fileno())
        attempt = pool.submit(receive, read_part, file.fileno(), cancellation)
        until(held_up.begun.is_set)
        if isinstance(read_part, ReplacedMeanwhile):
            until(lambda: read_part.stop.wished)
        cancellation.cancel()
        with pytest.raises(CancelledError):
            attempt.result(20)
        assert open_of(received) == 2, "its own, and the held up writer's"
    held_up.go_on.set()
    until(lambda: open_of(received) == 0)


def test_what_is_wrong_with_the_file_is_the_systems_own_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open("rb") as readable, pytest.raises(OSError, match="descriptor"):
        receive(ReadPart(), readable.fileno())


def send(data: bytes, size: int, cancellation: Cancellation | None = None) -> tuple[str, list[int]]:
    return parts.send(
        size,
        lambda offset, length: data[offset : offset + length],
        lambda number, part, _stop: number * 1000 + len(part) % 1000,
        lanes=Lanes(4),
        cancellation=cancellation or Cancellation(),
        progress=parts.HighWater(ignore_progress),
        pending=deque(),
    )


def test_what_is_sent_is_hashed_and_numbered_in_order() -> None:
    digest, sent = send(DATA, len(DATA))
    assert digest == DIGEST.hex
    assert sent == [number * 1000 + parts.PART_BYTES % 1000 for number in range(1, 10)] + [10_001]


def test_fewer_bytes_than_promised_are_a_changed_file() -> None:
    with pytest.raises(FileChangedError, match=f"{len(DATA)} bytes were there"):
        send(DATA, len(DATA) + 5)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 8),
        (1024**3 - 1, 8),
        (1024**3, 16),
        (10_000 * 16 * 1024**2, 16),
        (10_000 * 16 * 1024**2 + 1, 17),
        (5 * 1024**4, 525),
    ],
)
def test_parts_grow_so_that_there_are_never_too_many(size: int, expected: int) -> None:
    assert parts.part_size(size) == expected * 1024**2
    assert -(-size // parts.part_size(size)) <= parts.MAX_PARTS


def test_space_is_claimed_before_anything_is_written(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file:
        parts.reserve(file.fileno(), 1024**2)
        status = os.fstat(file.fileno())
    assert status.st_size == 1024**2
    assert status.st_blocks * 512 >= 1024**2


def test_progress_is_told_once() -> None:
    told: list[int] = []
    water = parts.HighWater(told.append)
    for position in [10, 30, 10, 30, 40]:
        water.reached(position)
    assert told == [10, 20, 10]
