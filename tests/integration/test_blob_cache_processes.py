"""The blob cache under several real processes, some of which die or stop."""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent_plugin.content.blob_cache import CollectReport
from agent_plugin.content.digest import hash_fd
from agent_plugin.content.store import Cancellation
from tests.servers.cache_worker import blob, open_cache, start

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_worker() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str | Path | int) -> subprocess.Popen[str]:
        started.append(start(*arguments))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def wait_until_held(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"


def test_of_eight_processes_that_want_a_blob_exactly_one_fetches_it(
    tmp_path: Path, start_worker: Start
) -> None:
    log = tmp_path / "log"
    workers = [start_worker("fetch", tmp_path / "cache", log) for _ in range(8)]

    for worker in workers:
        go(worker)

    assert [worker.wait(30) for worker in workers] == [0] * 8
    assert len(log.read_text().splitlines()) == 1
    with open_cache(tmp_path / "cache") as cache:
        assert cache.contains(blob(1)[0])


def test_a_claim_is_free_again_when_its_holder_was_killed(
    tmp_path: Path, start_worker: Start
) -> None:
    digest, _data = blob(1)
    with open_cache(tmp_path / "cache") as cache:
        worker = start_worker("hold", tmp_path / "cache", "claim")
        wait_until_held(worker)
        assert cache.claim(digest) is None

        worker.kill()

        claim = None

        def claimed() -> bool:
            nonlocal claim
            claim = cache.claim(digest)
            return claim is not None

        assert until(claimed)


def test_nobody_waits_forever_for_a_fetcher_that_was_stopped(
    tmp_path: Path, start_worker: Start
) -> None:
    digest, _data = blob(1)
    with open_cache(tmp_path / "cache") as cache:
        worker = start_worker("hold", tmp_path / "cache", "claim")
        wait_until_held(worker)
        worker.send_signal(signal.SIGSTOP)

        started = time.monotonic()
        came = cache.wait_for(digest, 0.5, Cancellation())

        assert not came
        assert time.monotonic() - started > 0.4


def test_whoever_waits_learns_that_the_fetcher_died(tmp_path: Path, start_worker: Start) -> None:
    digest, _data = blob(1)
    with open_cache(tmp_path / "cache") as cache:
        worker = start_worker("hold", tmp_path / "cache", "claim")
        wait_until_held(worker)
        threading.Timer(0.2, worker.kill).start()

        # Longer than any test may last.
        assert not cache.wait_for(digest, 3600, Cancellation())


def test_a_lease_holds_while_its_process_lives_and_no_longer(
    tmp_path: Path, start_worker: Start
) -> None:
    digest, data = blob(1)
    with open_cache(tmp_path / "cache") as cache:
        cache.add(digest, data)
        worker = start_worker("hold", tmp_path / "cache", "lease")
        wait_until_held(worker)

        cache.clear()
        assert cache.contains(digest)

        worker.kill()
        worker.wait()
        cache.clear()
        assert not cache.contains(digest)
        assert cache.usage().leases == 0


def test_a_file_being_written_stays_until_its_writer_is_dead(
    tmp_path: Path, start_worker: Start
) -> None:
    with open_cache(tmp_path / "cache") as cache:
        worker = start_worker("hold", tmp_path / "cache", "staging")
        wait_until_held(worker)

        assert cache.collect().temporary_removed == 0
        # Not waited for: a zombie writes nothing more either.
        worker.kill()
        assert until(lambda: cache.collect().temporary_removed == 1)
        assert cache.usage().temporary == 0


def test_processes_killed_at_any_moment_leave_whole_blobs_and_removable_files(
    tmp_path: Path, start_worker: Start
) -> None:
    chance = random.Random(20)
    for number in range(20):
        worker = start_worker("add", tmp_path / "cache", number * 100_000)
        if number == 0:
            assert until(lambda: any((tmp_path / "cache").glob("v1/*/??/*")))
        time.sleep(chance.uniform(0, 0.08))
        worker.kill()
        worker.wait()

    with open_cache(tmp_path / "cache") as cache:
        verified = cache.verify()
        cache.collect()
        usage = cache.usage()

    assert verified.corrupt == ()
    assert verified.blobs > 0
    assert usage.bytes == verified.blobs * 16384, "every blob has its whole size"
    assert (usage.temporary, usage.quarantined) == (0, 0)


def test_readers_never_see_a_wrong_byte_while_blobs_are_evicted(
    tmp_path: Path, start_worker: Start
) -> None:
    readers = [start_worker("read", tmp_path / "cache", 40) for _ in range(2)]
    evicted = 0
    with open_cache(tmp_path / "cache") as cache:
        assert until(lambda: cache.usage().blobs == 40)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            evicted += cache.collect(to_bytes=20 * 16384).evicted_blobs

        outputs = [reader.communicate(timeout=30)[0] for reader in readers]

        assert [reader.returncode for reader in readers] == [0, 0]
        assert all(int(output) > 0 for output in outputs)
        assert evicted > 0
        assert cache.verify().corrupt == ()
        assert cache.usage().quarantined == 0


def test_one_collector_at_a_time_and_the_others_do_not_wait(tmp_path: Path) -> None:
    with open_cache(tmp_path / "cache") as first, open_cache(tmp_path / "cache") as second:
        for number in range(500):
            first.add(*blob(number, 10))
        reports: list[CollectReport] = []

        def collect() -> None:
            reports.extend(second.collect() for _ in range(20))

        thread = threading.Thread(target=collect)
        thread.start()
        reports.extend(first.collect() for _ in range(20))
        thread.join()

        done = [report for report in reports if not report.busy]
        assert done, "somebody collected"
        assert {report.blobs for report in done} == {500}
        assert {report.blobs for report in reports if report.busy} <= {0}


def test_blobs_stay_readable_through_a_descriptor_that_was_open_before_eviction(
    tmp_path: Path,
) -> None:
    digest, data = blob(1)
    with open_cache(tmp_path / "cache") as cache:
        cache.add(digest, data)
        fd = cache.open_blob(digest)
        assert fd is not None

        cache.clear()

        assert not cache.contains(digest)
        assert hash_fd(fd) == digest
        os.close(fd)
