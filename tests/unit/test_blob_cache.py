"""The blob cache as one process sees it: what it keeps, what it trusts, what it evicts."""

import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import pytest

from agent_plugin.content import blob_cache_collect, blob_cache_usage, events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.blob_cache_collect import FoundBlob, scan
from agent_plugin.content.blob_cache_directory import CacheDirectory, namespace_of
from agent_plugin.content.blob_cache_usage import UsageCounter
from agent_plugin.content.digest import EMPTY_HASH, Digest, hash_fd
from agent_plugin.content.errors import (
    BlobCorruptError,
    CacheUnsafeError,
    CancelledError,
    LocalWriteError,
    NoSpaceError,
)
from agent_plugin.content.store import Cancellation
from tests.servers.descriptors import open_below

URL = "s3://bucket/prefix"
DAY = 24 * 3600.0
PLENTY = 1 << 40


class Clock:
    """Now, and as much later as the test says."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(directory: Path, **settings: object) -> BlobCache:
    defaults: dict[str, object] = {
        "store_url": URL,
        "max_bytes": PLENTY,
        "min_free_bytes": 0,
    }
    return BlobCache.open(directory, **(defaults | settings))  # type: ignore[arg-type]  # tests pass what they vary


@pytest.fixture
def cache(directory: Path, clock: Clock) -> Iterator[BlobCache]:
    with opened(directory, clock=clock) as cache:
        yield cache


def numbered(number: int, size: int = 1000) -> tuple[Digest, bytes]:
    data = number.to_bytes(4, "big") + bytes(size - 4)
    return Digest.of(data), data


def place(directory: Path, digest: Digest, url: str = URL) -> Path:
    return directory / "v1" / namespace_of(url, "", shared=False) / digest.hex[:2] / digest.hex


def read(cache: BlobCache, digest: Digest) -> bytes | None:
    fd = cache.open_blob(digest)
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read()


def used_at(directory: Path, digest: Digest, when: float) -> None:
    os.utime(place(directory, digest), (when, when))


def test_a_blob_that_was_added_can_be_read_and_not_be_written(
    cache: BlobCache, directory: Path
) -> None:
    digest, data = numbered(1)

    cache.add(digest, data)

    assert cache.contains(digest)
    assert read(cache, digest) == data
    assert stat.S_IMODE(place(directory, digest).stat().st_mode) == 0o400


def test_a_blob_that_nobody_added_is_not_there(cache: BlobCache) -> None:
    digest, _data = numbered(1)

    assert not cache.contains(digest)
    assert cache.open_blob(digest) is None


def test_the_empty_blob_is_a_blob(cache: BlobCache) -> None:
    empty = Digest(EMPTY_HASH, 0)

    cache.add(empty, b"")

    assert read(cache, empty) == b""


def test_adding_a_blob_again_leaves_the_one_that_is_there(
    cache: BlobCache, directory: Path
) -> None:
    digest, data = numbered(1)
    cache.add(digest, data)
    inode = place(directory, digest).stat().st_ino

    cache.add(digest, data)

    assert place(directory, digest).stat().st_ino == inode
    assert cache.usage().temporary == 0


def test_bytes_of_another_length_are_refused(cache: BlobCache) -> None:
    digest, data = numbered(1)

    with pytest.raises(BlobCorruptError, match="999 bytes"):
        cache.add(digest, data[:-1])

    assert cache.usage().blobs == 0


def test_everything_is_closed_to_others(cache: BlobCache, directory: Path) -> None:
    cache.add(*numbered(1))
    cache.lease("session", [numbered(1)[0]]).close()

    modes = {
        path.relative_to(directory): stat.S_IMODE(path.stat().st_mode)
        for path in [directory, *directory.rglob("*")]
    }

    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


def test_stores_do_not_see_each_others_blobs_unless_told_so(directory: Path) -> None:
    digest, data = numbered(1)
    with (
        opened(directory, store_url="s3://a/x") as one,
        opened(directory, store_url="s3://b/x") as other,
        opened(directory, store_url="s3://a/x", shared=True) as shared_one,
        opened(directory, store_url="s3://b/x", shared=True) as shared_other,
    ):
        one.add(digest, data)
        assert not other.contains(digest)
        assert not shared_one.contains(digest)

        shared_one.add(digest, data)
        assert shared_other.contains(digest)


def test_a_staged_file_becomes_the_blob(cache: BlobCache, directory: Path) -> None:
    digest, data = numbered(1)

    with cache.staging(digest.size) as staged:
        os.pwrite(staged.fd, data[500:], 500)
        os.pwrite(staged.fd, data[:500], 0)
        staged.publish(digest)
        assert hash_fd(staged.fd) == digest, "still readable, to place it from here"

    assert read(cache, digest) == data
    assert stat.S_IMODE(place(directory, digest).stat().st_mode) == 0o400
    assert cache.usage().temporary == 0


def test_a_staged_file_that_is_not_published_is_gone(cache: BlobCache) -> None:
    def fetch() -> None:
        with cache.staging(10) as staged:
            os.write(staged.fd, b"half")
            raise CancelledError("stopped on request")

    with pytest.raises(CancelledError):
        fetch()

    assert cache.usage().temporary == 0


def test_a_staged_file_of_another_length_is_not_published(cache: BlobCache) -> None:
    digest, data = numbered(1)

    with cache.staging(digest.size) as staged:
        os.write(staged.fd, data[:-1])
        with pytest.raises(BlobCorruptError, match="999 bytes"):
            staged.publish(digest)

    assert not cache.contains(digest)
    assert cache.usage().temporary == 0


def test_a_claim_excludes_others_until_it_is_released(directory: Path) -> None:
    digest, other_digest = numbered(1)[0], numbered(2)[0]
    with opened(directory) as first, opened(directory) as second:
        claim = first.claim(digest)
        assert claim is not None
        assert first.claim(digest) is None, "not for another thread"
        assert second.claim(digest) is None, "not for another process"
        other = second.claim(other_digest)
        assert other is not None, "another blob is free"

        claim.release()
        claim.release()

        again = second.claim(digest)
        assert again is not None
        claim.release()
        assert first.claim(digest) is None, "a claim released twice is not released for others"


def test_a_late_release_keeps_the_descriptor_until_it_is_done(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another file's as soon as it is closed."""
    cache = opened(directory)
    claim = cache.claim(numbered(1)[0])
    assert claim is not None
    begun, go_on = threading.Event(), threading.Event()
    call = fcntl.fcntl

    def held_up(fd: int, command: int, argument: bytes) -> object:
        begun.set()
        go_on.wait(30)
        return call(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", held_up)
    with ThreadPoolExecutor(2) as pool:
        releasing = pool.submit(claim.release)
        assert begun.wait(30)
        closing = pool.submit(cache.close)
        assert wait([closing], timeout=0.2).not_done
        go_on.set()
        closing.result(30)
        releasing.result(30)
    claim.release()


def test_claims_of_different_stores_do_not_exclude_each_other(directory: Path) -> None:
    digest, _data = numbered(1)
    with (
        opened(directory, store_url="s3://a/x") as one,
        opened(directory, store_url="s3://b/x") as other,
    ):
        assert one.claim(digest) is not None
        assert other.claim(digest) is not None


def test_of_many_threads_one_gets_the_claim(cache: BlobCache) -> None:
    digest, _data = numbered(1)
    barrier = threading.Barrier(8)
    claims = []

    def want() -> None:
        barrier.wait()
        claims.append(cache.claim(digest))

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(claim is not None for claim in claims) == 1


def test_waiting_ends_when_the_blob_comes(cache: BlobCache) -> None:
    digest, data = numbered(1)
    claim = cache.claim(digest)
    assert claim is not None
    threading.Timer(0.1, lambda: cache.add(digest, data)).start()

    assert cache.wait_for(digest, 30, Cancellation())


def test_waiting_ends_when_the_claim_is_given_up(cache: BlobCache) -> None:
    digest, _data = numbered(1)
    claim = cache.claim(digest)
    assert claim is not None
    threading.Timer(0.1, claim.release).start()

    assert not cache.wait_for(digest, 30, Cancellation())


def test_waiting_ends_when_somebody_wishes_to_stop(cache: BlobCache) -> None:
    digest, _data = numbered(1)
    claim = cache.claim(digest)
    assert claim is not None
    cancellation = Cancellation()
    threading.Timer(0.1, cancellation.cancel).start()

    with pytest.raises(CancelledError):
        cache.wait_for(digest, 30, cancellation)


class CountedSleeps(Cancellation):
    """Counts for how long somebody wished to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        super().sleep(seconds)


def test_who_holds_many_claims_and_was_stopped_is_waited_for_once(directory: Path) -> None:
    """Seen to be waited for with each of them."""
    held = [numbered(number)[0] for number in range(8)]
    with opened(directory) as stopped, opened(directory) as other:
        claims = [stopped.claim(digest) for digest in held]
        assert None not in claims
        waits = []
        for digest in held:
            sleeps = CountedSleeps()
            assert other.claim_or_wait(digest, 1.0, sleeps) is None
            waits.append(sleeps.slept)
        assert waits[0] > 0.8
        assert max(waits[1:]) < 0.3

        # It goes on.
        coming, data = numbered(100)
        assert stopped.claim(coming) is not None
        stopped.add(coming, data)
        assert other.claim_or_wait(coming, 1.0, CountedSleeps()) is None
        patient = CountedSleeps()
        assert other.claim_or_wait(held[1], 1.0, patient) is None
        assert patient.slept > 0.8


def test_nobody_waits_for_a_blob_that_nobody_fetches(cache: BlobCache) -> None:
    # Longer than any test may last.
    assert not cache.wait_for(numbered(1)[0], 3600, Cancellation())


def test_a_collection_evicts_the_least_recently_used_down_to_below_the_quota(
    directory: Path, clock: Clock
) -> None:
    blobs = [numbered(number) for number in range(20)]
    with opened(directory, max_bytes=10_000, clock=clock) as cache:
        for number, (digest, data) in enumerate(blobs):
            cache.add(digest, data)
            used_at(directory, digest, time.time() - 10_000 + number)

        report = cache.collect()

        kept = [number for number, (digest, _data) in enumerate(blobs) if cache.contains(digest)]
        assert kept == list(range(12, 20)), "80 % of the quota, the last used"
        assert (report.blobs, report.bytes) == (8, 8000)
        assert (report.evicted_blobs, report.evicted_bytes) == (12, 12_000)
        assert report.within_limits


def test_a_blob_that_was_read_counts_as_used(directory: Path) -> None:
    blobs = [numbered(number) for number in range(4)]
    with opened(directory) as cache:
        for digest, data in blobs:
            cache.add(digest, data)
            used_at(directory, digest, time.time() - 3600)
        read(cache, blobs[0][0])

        cache.collect(to_bytes=1000)

        assert [cache.contains(digest) for digest, _data in blobs] == [True, False, False, False]


def test_a_use_within_a_minute_of_the_last_is_not_written(
    cache: BlobCache, directory: Path
) -> None:
    digest, data = numbered(1)
    cache.add(digest, data)
    recently = time.time() - 30
    used_at(directory, digest, recently)

    read(cache, digest)

    assert place(directory, digest).stat().st_mtime == pytest.approx(recently)


def test_a_use_in_the_far_future_counts_as_none(cache: BlobCache, directory: Path) -> None:
    planted, used = numbered(1), numbered(2)
    for digest, data in (planted, used):
        cache.add(digest, data)
    used_at(directory, planted[0], time.time() + 1000 * DAY)

    cache.collect(to_bytes=1000)

    assert not cache.contains(planted[0])
    assert cache.contains(used[0])


def test_leased_blobs_stay_even_over_the_quota(directory: Path, clock: Clock) -> None:
    blobs = [numbered(number) for number in range(10)]
    with opened(directory, max_bytes=5000, clock=clock) as cache:
        for digest, data in blobs:
            cache.add(digest, data)
        with cache.lease("session", [digest for digest, _data in blobs[:7]]):
            report = cache.collect()

            assert [cache.contains(digest) for digest, _data in blobs] == [True] * 7 + [False] * 3
            assert not report.within_limits

        assert cache.collect().blobs == 4


def test_a_lease_may_outlive_its_maker_until_it_expires(directory: Path, clock: Clock) -> None:
    digest, data = numbered(1)
    with opened(directory, clock=clock) as maker:
        maker.add(digest, data)
        with maker.lease("session", [digest], keep_seconds=100):
            pass
    with opened(directory, clock=clock) as cache:
        cache.clear()
        assert cache.contains(digest)

        clock.ahead = 101
        report = cache.clear()
        assert not cache.contains(digest)
        assert report.leases_removed == 1


def test_a_kept_lease_can_be_ended_by_name_from_anywhere(directory: Path) -> None:
    digest, data = numbered(1)
    name = "session-1/../ö"
    with opened(directory) as maker:
        maker.add(digest, data)
        maker.lease(name, [digest], keep_seconds=DAY).close()
        maker.lease(name, [digest], keep_seconds=DAY).close()
        maker.lease("session-10", [], keep_seconds=DAY).close()
    with opened(directory) as cache:
        assert cache.release_lease(name) == 2
        assert cache.release_lease(name) == 0
        assert cache.usage().leases == 1
        cache.clear()
        assert not cache.contains(digest)


def test_a_lease_covers_its_own_store_only(directory: Path) -> None:
    digest, data = numbered(1)
    with (
        opened(directory, store_url="s3://a/x") as one,
        opened(directory, store_url="s3://b/x") as other,
    ):
        one.add(digest, data)
        other.add(digest, data)
        with one.lease("session", [digest]):
            one.clear()
            assert one.contains(digest)
            assert not other.contains(digest)


@pytest.mark.expected_events(events.CACHE_QUARANTINED)
def test_odd_files_among_the_leases_hold_nothing_and_are_removed(
    cache: BlobCache, directory: Path
) -> None:
    leases = directory / "v1" / "leases"
    (leases / "garbage").write_bytes(b"x" * 100)
    (leases / "short").write_bytes(b"")
    (leases / "link").symlink_to("/etc/passwd")
    (leases / "directory").mkdir()
    os.mkfifo(leases / "fifo")
    digest, data = numbered(1)
    cache.add(digest, data)

    cache.clear()

    assert not cache.contains(digest)
    assert list(leases.iterdir()) == []


def test_adding_over_the_quota_collects_by_itself(directory: Path) -> None:
    with opened(directory, max_bytes=100_000) as cache:
        for number in range(500):
            cache.add(*numbered(number))

        assert cache.usage().bytes <= 100_000 + 64 * 1000


def test_processes_count_together(directory: Path) -> None:
    with opened(directory, max_bytes=100_000) as one, opened(directory, max_bytes=100_000) as two:
        for number in range(250):
            one.add(*numbered(number))
            two.add(*numbered(number + 1000))

        assert one.usage().bytes <= 100_000 + 2 * 64 * 1000


def test_a_cache_full_of_leased_blobs_takes_no_more_and_is_not_scanned_again_and_again(
    directory: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", events.LOGGER_NAME)
    blobs = [numbered(number) for number in range(640)]
    added = 0
    with opened(directory, max_bytes=1000, clock=clock) as cache:
        with cache.lease("session", [digest for digest, _data in blobs]):
            for digest, data in blobs:
                with suppress(NoSpaceError):
                    cache.add(digest, data)
                    added += 1
            collections = caplog.messages.count(events.CACHE_COLLECTED)
            assert (added, collections) == (64, 1), "what is counted at a time, and one look"
            clock.ahead = 61
            with pytest.raises(NoSpaceError, match="1000 bytes do not fit"):
                cache.add(*numbered(1000))
            assert caplog.messages.count(events.CACHE_COLLECTED) == 2
        with pytest.raises(NoSpaceError):
            cache.add(*numbered(1000))
        clock.ahead = 122
        cache.add(*numbered(1000))
        assert cache.usage().bytes == 1000


def test_a_cache_that_was_full_takes_blobs_as_soon_as_there_is_room(directory: Path) -> None:
    blobs = [numbered(number) for number in range(64)]
    with opened(directory, max_bytes=1000) as cache:
        with cache.lease("session", [digest for digest, _data in blobs]):
            for digest, data in blobs:
                cache.add(digest, data)
        with pytest.raises(NoSpaceError):
            cache.add(*numbered(64))
        cache.clear()

        for number in range(64):
            cache.add(*numbered(number + 1000))

        assert cache.usage().bytes <= 64_000


def counted(directory: Path) -> int:
    """Return how many bytes all processes think there are."""
    return int.from_bytes((directory / "v1" / "usage").read_bytes()[:8], "little", signed=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 8,
        b"\xff" * 16,
        b"\x7f" * 16,
        bytes(8) + b"\xff" * 8,
        b"much too long for it",
    ],
)
def test_a_counter_that_makes_no_sense_is_counted_anew(directory: Path, content: bytes) -> None:
    with opened(directory) as cache:
        cache.add(*numbered(1))
    counter = directory / "v1" / "usage"
    counter.write_bytes(content)

    with opened(directory, max_bytes=10_000) as cache:
        cache.make_room(1000)

    assert counted(directory) == 1000


def test_what_others_add_during_a_collection_is_counted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the scan came too early for."""

    def slow_scan(cache_directory: CacheDirectory) -> Iterator[FoundBlob]:
        yield from scan(cache_directory)
        for number in range(10, 18):
            stage(other, number)

    with opened(directory, max_bytes=10_000) as cache, opened(directory) as other:
        cache.make_room(1)
        for number in range(8):
            stage(cache, number)
        with monkeypatch.context() as patched:
            patched.setattr(blob_cache_collect, "scan", slow_scan)
            report = cache.collect()

        assert report.within_limits
        assert report.evicted_blobs == 8, "those it found, to make up for those it did not"
        assert counted(directory) == cache.usage().bytes == 8000


def test_what_is_added_while_nobody_knows_the_total_is_counted_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_scan(cache_directory: CacheDirectory) -> Iterator[FoundBlob]:
        yield from scan(cache_directory)
        for number in range(100):
            other.add(*numbered(number))

    with opened(directory) as cache, opened(directory) as other:
        with monkeypatch.context() as patched:
            patched.setattr(blob_cache_collect, "scan", slow_scan)
            cache.collect()
        other.close()

        assert counted(directory) == cache.usage().bytes == 100_000


def stage(cache: BlobCache, number: int) -> None:
    digest, data = numbered(number)
    with cache.staging(digest.size) as staged:
        os.write(staged.fd, data)
        staged.publish(digest)


def test_room_for_a_staged_blob_is_kept_until_it_comes_or_is_given_up(directory: Path) -> None:
    """Whatever other processes do meanwhile, and if they scan the cache."""
    with opened(directory, max_bytes=2500) as cache, opened(directory, max_bytes=2500) as other:
        with cache.staging(1000) as given_up, cache.staging(1000) as coming:
            for _ in range(2):
                with pytest.raises(NoSpaceError, match="do not fit"):
                    other.staging(1000)
                with pytest.raises(NoSpaceError, match="do not fit"):
                    other.make_room(1000)
                assert other.collect().within_limits
                assert counted(directory) == 2000
            assert given_up.fd != coming.fd
            digest, data = numbered(1)
            os.write(coming.fd, data)
            coming.publish(digest)
        assert counted(directory) == 1000
        with other.staging(1500):
            assert counted(directory) == 2500
            assert other.contains(digest), "there was room for both"
        with other.staging(1501):
            assert not other.contains(digest)


def test_room_that_others_take_at_the_last_moment_is_not_given_twice(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(directory, max_bytes=1500) as cache, opened(directory, max_bytes=1500) as other:
        make = cache._room.make
        taken = []

        def make_room_for_others(size: int) -> None:
            make(size)
            taken.append(other.staging(1000))

        monkeypatch.setattr(cache._room, "make", make_room_for_others)
        with pytest.raises(NoSpaceError, match="1000 bytes do not fit"):
            cache.staging(1000)
        with taken[0]:
            assert counted(directory) == 1000


def test_a_staged_blob_of_another_size_counts_as_what_it_is(directory: Path) -> None:
    digest, data = numbered(1)
    with opened(directory) as cache:
        cache.make_room(1)
        with cache.staging(5000) as staged:
            os.write(staged.fd, data)
            staged.publish(digest)

    assert counted(directory) == 1000


def test_threads_that_count_at_once_lose_nothing(tmp_path: Path) -> None:
    with (tmp_path / "usage").open("wb+") as file, ThreadPoolExecutor(4) as pool:
        counter = UsageCounter(file.fileno())
        counter.correct(0, None)
        for _ in range(4):
            pool.submit(lambda: [counter.add(1) for _ in range(2000)])
        pool.shutdown()

        assert counter.read() == (8000, 8000)


def test_who_counts_while_another_holds_the_lock_for_a_moment_loses_nothing(tmp_path: Path) -> None:
    """The other has read the total, and is kept from its core before it writes a new one."""
    with (tmp_path / "usage").open("wb+") as file, (tmp_path / "usage").open("rb+") as others:
        counter, other = UsageCounter(file.fileno()), UsageCounter(others.fileno())
        counter.correct(1000, None)
        fcntl.flock(others, fcntl.LOCK_EX)
        # Its own add ends with giving the lock back.
        late = threading.Timer(0.3, other.add, (20,))
        late.start()

        assert counter.add(3) == 1023
        late.join()
        assert counter.read() == (1023, 23)


def test_with_a_lock_that_is_never_given_back_a_scan_tells_the_total(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_cache_usage, "_LOCK_WAIT_SECONDS", 1.0)
    with opened(directory, max_bytes=10_000) as cache:
        stage(cache, 1)
        with (directory / "v1" / "usage").open("rb") as stopped:
            fcntl.flock(stopped, fcntl.LOCK_EX)
            stage(cache, 2)
            assert (directory / "v1" / "usage").read_bytes() == b"", "no total is made up"
            started = time.monotonic()
            for number in range(3, 30):
                stage(cache, number)
            assert time.monotonic() - started < 27, "it is not waited for each time"
            assert cache.usage().bytes <= 10_000
        cache.make_room(1)
        stage(cache, 30)

        assert counted(directory) == cache.usage().bytes


def test_threads_and_processes_that_stage_at_once_count_together(directory: Path) -> None:
    with opened(directory) as one, opened(directory) as two:
        one.make_room(1)
        with ThreadPoolExecutor(8) as pool:
            for number in range(400):
                pool.submit(stage, one if number % 2 else two, number)

        assert counted(directory) == one.usage().bytes == 400_000


def test_room_is_made_by_eviction(directory: Path) -> None:
    with opened(directory, max_bytes=10_000) as cache:
        for number in range(9):
            cache.add(*numbered(number))

        cache.make_room(5000)

        assert cache.usage().bytes <= 5000


def test_room_that_is_there_costs_nothing(directory: Path) -> None:
    with opened(directory, max_bytes=10_000) as cache:
        cache.add(*numbered(1))

        cache.make_room(9000)

        assert cache.usage().blobs == 1


@pytest.mark.parametrize("size", [10_001, PLENTY])
def test_more_than_the_quota_never_fits(directory: Path, size: int) -> None:
    with opened(directory, max_bytes=10_000) as cache:
        cache.add(*numbered(1))

        with pytest.raises(NoSpaceError, match="do not fit"):
            cache.make_room(size)
        with pytest.raises(NoSpaceError, match="do not fit"):
            cache.staging(size)

        assert cache.usage().blobs == 1, "nothing is evicted for what can not come"


def test_no_room_can_be_made_of_leased_blobs(directory: Path) -> None:
    digest, data = numbered(1)
    with opened(directory, max_bytes=1500) as cache:
        cache.add(digest, data)
        with (
            cache.lease("session", [digest]),
            pytest.raises(NoSpaceError, match="1000 bytes do not fit") as failure,
        ):
            cache.make_room(1000)

    assert "lease" in failure.value.hint


def test_free_space_below_the_floor_evicts_what_is_not_leased(directory: Path) -> None:
    with opened(directory, min_free_bytes=PLENTY) as cache:
        kept, gone = numbered(1), numbered(2)
        cache.add(*kept)
        cache.add(*gone)
        with cache.lease("session", [kept[0]]):
            report = cache.collect()

            assert (report.evicted_blobs, report.within_limits) == (1, False)
            assert cache.contains(kept[0])


@pytest.mark.expected_events(events.CACHE_QUARANTINED)
def test_a_blob_found_wrong_by_a_reader_is_quarantined_and_can_be_added_again(
    cache: BlobCache,
) -> None:
    digest, data = numbered(1)
    cache.add(digest, data)

    assert cache.quarantine(digest, "wrong content")
    assert not cache.quarantine(digest, "wrong content"), "gone already"

    assert not cache.contains(digest)
    assert cache.usage().quarantined == 1
    cache.add(digest, data)
    assert read(cache, digest) == data


@pytest.mark.expected_events(events.CACHE_QUARANTINED)
def test_verifying_finds_changed_bytes(cache: BlobCache, directory: Path) -> None:
    good, bad = numbered(1), numbered(2)
    for digest, data in (good, bad):
        cache.add(digest, data)
    file = place(directory, bad[0])
    file.chmod(0o600)
    file.write_bytes(b"!" + bad[1][1:])
    file.chmod(0o400)

    report = cache.verify()

    assert (report.blobs, report.bytes, report.corrupt) == (2, 2000, (bad[0].hex,))
    assert cache.contains(good[0])
    assert not cache.contains(bad[0])


def test_verifying_can_be_stopped(cache: BlobCache) -> None:
    cache.add(*numbered(1))
    cancellation = Cancellation()
    cancellation.cancel()

    with pytest.raises(CancelledError):
        cache.verify(cancellation)


@pytest.mark.expected_events(events.CACHE_QUARANTINED)
def test_quarantine_is_emptied_after_seven_days(cache: BlobCache, clock: Clock) -> None:
    digest, data = numbered(1)
    cache.add(digest, data)
    cache.quarantine(digest, "wrong content")

    clock.ahead = 6 * DAY
    assert cache.collect().quarantined_removed == 0
    clock.ahead = 7 * DAY + 1
    assert cache.collect().quarantined_removed == 1


def test_leftovers_of_dead_processes_go_and_other_containers_files_go_after_a_day(
    cache: BlobCache, directory: Path, clock: Clock
) -> None:
    tmp = directory / "v1" / "tmp"
    with cache.staging(1):
        [own] = list(tmp.iterdir())
        pid, started, rest = own.name.split("-", 2)
        space = rest.split(".")[0]
        dead = f"{pid}-{int(started) + 1}-{space}.abc.0"
        foreign = f"{pid}-{int(started) + 1}-{int(space, 16) + 1:x}.abc.0"
        for name in (dead, foreign, "not-ours"):
            (tmp / name).write_bytes(b"half")

        assert cache.collect().temporary_removed == 1
        assert {path.name for path in tmp.iterdir()} == {own.name, foreign, "not-ours"}
        clock.ahead = DAY + 60
        assert cache.collect().temporary_removed == 2
        assert list(tmp.iterdir()) == [own]


def _make_fifo(path: Path) -> None:
    os.mkfifo(path, 0o400)


def _make_socket(path: Path) -> None:
    # A socket's path is at most 107 bytes long; relative to the directory it is short.
    fd = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{fd}/{path.name}")
    os.close(fd)
    path.chmod(0o400)


def _make_directory(path: Path) -> None:
    path.mkdir()
    (path / "file").write_bytes(b"")


def _with_mode(mode: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(numbered(1)[1])
        path.chmod(mode)

    return make


def _with_bytes(data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(data)
        path.chmod(0o400)

    return make


def _make_hard_link(path: Path) -> None:
    _with_mode(0o400)(path)
    os.link(path, path.parents[4] / "elsewhere")


def _make_foreign(path: Path) -> None:
    _with_mode(0o400)(path)
    os.chown(path, 65534, 65534)


HOSTILE = {
    "a link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a FIFO": _make_fifo,
    "a socket": _make_socket,
    "a directory": _make_directory,
    "mode 0000": _with_mode(0o000),
    "mode 0600": _with_mode(0o600),
    "mode 0666": _with_mode(0o666),
    "mode 0420": _with_mode(0o420),
    "set-uid": _with_mode(0o4400),
    "no bytes": _with_bytes(b""),
    "a byte too few": _with_bytes(numbered(1)[1][:-1]),
    "a byte too many": _with_bytes(numbered(1)[1] + b"!"),
    "a hard link": _make_hard_link,
    "another user's": _make_foreign,
}


def open_now(cache: BlobCache, digest: Digest) -> int:
    """Open a blob; again if somebody has just dropped what the kernel has in memory."""
    for _ in range(10):
        assert cache.contains(digest)
        fd = cache.open_blob_now(digest)
        if fd is not None:
            return fd
    raise AssertionError("never in memory")


@pytest.mark.expected_events(events.CACHE_QUARANTINED)
@pytest.mark.parametrize("fault", HOSTILE)
@pytest.mark.parametrize("first", ["open", "open now", "add", "collect"])
def test_what_can_not_be_a_blob_is_never_read_and_does_not_stay(
    cache: BlobCache, directory: Path, fault: str, first: str
) -> None:
    if fault == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    digest, data = numbered(1)
    path = place(directory, digest)
    path.parent.mkdir(mode=0o700)
    HOSTILE[fault](path)
    assert not cache.contains(digest)

    if first == "open":
        assert cache.open_blob(digest) is None
        assert not os.path.lexists(path)
    elif first == "open now":
        assert cache.open_blob_now(digest) is None
        assert os.path.lexists(path)
    elif first == "collect":
        cache.collect()

    cache.add(digest, data)
    assert read(cache, digest) == data
    fd = open_now(cache, digest)
    assert os.read(fd, 10_000) == data
    os.close(fd)
    assert Path("/etc/passwd").read_bytes().startswith(b"root:")


def test_a_size_that_lies_does_not_cost_the_blob(cache: BlobCache) -> None:
    digest, data = numbered(1)
    cache.add(digest, data)

    assert cache.open_blob(Digest(digest.hex, digest.size + 1)) is None

    assert read(cache, digest) == data


@pytest.mark.expected_events(events.CACHE_QUARANTINED)
def test_unexpected_names_among_the_blobs_are_moved_away_by_a_collection(
    cache: BlobCache, directory: Path
) -> None:
    cache.add(*numbered(1))
    shard = place(directory, numbered(1)[0]).parent
    wrong_shard = "00" if shard.name != "00" else "01"
    (shard / "readme").write_bytes(b"")
    (shard / f"{wrong_shard}{'0' * 30}").write_bytes(b"")
    (shard / ("x" * 255)).write_bytes(b"")
    (shard.parent / "readme").write_bytes(b"")

    report = cache.collect()

    assert report.blobs == 1
    assert cache.usage().quarantined == 4


def _make_world_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def _make_group_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def _make_foreign_directory(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)


UNSAFE = {
    "world-writable": _make_world_writable,
    "group-writable": _make_group_writable,
    "another user's": _make_foreign_directory,
    "a link to a directory": lambda path: path.symlink_to("/"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a file": lambda path: path.write_bytes(b""),
    "a FIFO": _make_fifo,
}


@pytest.mark.parametrize("fault", UNSAFE)
@pytest.mark.parametrize(
    "where", [".", "v1", "v1/tmp", "v1/leases", "v1/quarantine", "v1/namespace"]
)
def test_a_directory_that_others_could_write_is_refused(
    directory: Path, where: str, fault: str
) -> None:
    if fault == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    path = directory / where.replace("namespace", namespace_of(URL, "", shared=False))
    for parent in reversed(path.relative_to(directory.parent).parents[:-1]):
        (directory.parent / parent).mkdir(mode=0o700)
    UNSAFE[fault](path)

    with pytest.raises(CacheUnsafeError, match="cache") as failure:
        opened(directory)

    assert str(path) in failure.value.message
    assert failure.value.hint


@pytest.mark.parametrize("fault", UNSAFE)
def test_a_blobs_directory_that_others_could_write_is_refused(
    cache: BlobCache, directory: Path, fault: str
) -> None:
    if fault == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    digest, data = numbered(1)
    UNSAFE[fault](place(directory, digest).parent)

    for use in (
        lambda: cache.contains(digest),
        lambda: cache.open_blob(digest),
        lambda: cache.add(digest, data),
        cache.collect,
    ):
        with pytest.raises(CacheUnsafeError):
            use()
    assert list((directory / "v1" / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["locks", "usage"])
@pytest.mark.parametrize("fault", ["a link", "a FIFO", "a directory", "mode 0666"])
def test_a_file_of_ours_that_others_could_write_is_refused(
    directory: Path, name: str, fault: str
) -> None:
    opened(directory).close()
    path = directory / "v1" / name
    path.unlink()
    {
        "a link": lambda path: path.symlink_to("/etc/passwd"),
        "a FIFO": _make_fifo,
        "a directory": _make_directory,
        "mode 0666": _with_mode(0o666),
    }[fault](path)

    with pytest.raises(CacheUnsafeError):
        opened(directory)


def test_a_cache_where_a_file_is_in_the_way_can_not_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(LocalWriteError, match="can not open"):
        opened(tmp_path / "file" / "cache")


def test_refusing_a_cache_leaves_no_descriptor_open(directory: Path) -> None:
    opened(directory).close()
    (directory / "v1" / "tmp").chmod(0o777)
    before = open_below(directory)

    for _ in range(10):
        with pytest.raises(CacheUnsafeError):
            opened(directory)

    assert open_below(directory) == before


def test_a_cache_removed_under_us_is_an_error_and_not_a_crash(
    cache: BlobCache, directory: Path
) -> None:
    digest, data = numbered(1)
    cache.add(digest, data)
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()

    assert cache.open_blob(digest) is None
    assert not cache.contains(digest)
    with pytest.raises(LocalWriteError):
        cache.add(digest, data)


def test_a_blobs_directory_that_vanishes_is_made_again(cache: BlobCache, directory: Path) -> None:
    digest, data = numbered(1)
    cache.add(digest, data)
    place(directory, digest).unlink()
    place(directory, digest).parent.rmdir()

    cache.add(digest, data)

    assert read(cache, digest) == data


def test_closing_twice_is_fine_and_the_count_is_kept(directory: Path) -> None:
    with opened(directory) as cache:
        cache.make_room(1)
        cache.add(*numbered(1))
        cache.close()

    assert counted(directory) == 1000
