"""Where bytes come from: what is verified when, fetched how often, and what a failure leaves.

The store is a directory, or the S3 server behind a proxy that counts and breaks requests.
"""

import errno
import gc
import json
import os
import random
import resource
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import vfs.reader
import vfs.service
import vfs.streaming
import vfs.whole_blobs
from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.blob_cache_usage import Usage, UsageCounter
from agent_plugin.content.digest import Digest, hash_fd
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    CancelledError,
    LocalReadError,
    LocalWriteError,
    PropmasterError,
    StoreUnavailableError,
)
from agent_plugin.content.layout import blob_key
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.mount_spec import TOLD_NS
from agent_plugin.content.open_store import build_store
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.store import Cancellation, Store
from tests.servers.disks import fill, tmpfs_mounted
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from vfs.error_ledger import MOST_LINES, REPEAT_SECONDS, ErrorLedger
from vfs.open_blob import OpenBlob
from vfs.reader import WRONG_SECONDS, BlobReader
from vfs.service import NodeService, Ownership
from vfs.statistics import Statistics
from vfs.streaming import Streamed, StreamPolicy
from vfs.tree import ROOT, Tree

PLENTY = 1 << 40
KIBIBYTE = 1024
# A blob is large from 64 KiB on in these tests, and comes in parts of 16 KiB.
LARGE_BYTES = 64 * KIBIBYTE
SMALL_PARTS = StreamPolicy(
    part_bytes=16 * KIBIBYTE, request_bytes=32 * KIBIBYTE, ahead_bytes=64 * KIBIBYTE
)
# A store that asks to come later is asked until the deadline.
QUICK = RetryPolicy(attempts=2, deadline_seconds=0.5, initial_seconds=0.01, damaged_retries=1)


def blob(seed: int, size: int = 5000) -> tuple[Digest, bytes]:
    data = random.Random(seed).randbytes(size)
    return Digest.of(data), data


def flip_a_bit(path: Path, at: int) -> None:
    """Change a file's content and nothing else that a cache could notice."""
    before = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class Rig:
    """A store, a cache, and readers of them."""

    def __init__(self, home: Path, store: Store, past_the_proxy: Store | None = None) -> None:
        self.home = home
        self.store = store
        self._direct = past_the_proxy or store
        self.cache_dir = home / "cache"
        self.spool = home / "spool"
        self.spool.mkdir()
        self.caches: list[BlobCache] = []
        self.readers: list[BlobReader] = []
        self.statistics = Statistics()

    def put(self, digest: Digest, data: bytes) -> None:
        """Store a blob; the proxy hears nothing of it."""
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            self._direct.put_file(digest, file.fileno(), cancellation=Cancellation())

    def cache(self, *, max_bytes: int = PLENTY, at: Path | None = None) -> BlobCache:
        cache = BlobCache.open(
            at or self.cache_dir, store_url="s3://a/b", max_bytes=max_bytes, min_free_bytes=0
        )
        self.caches.append(cache)
        return cache

    def reader(
        self,
        cache: BlobCache | None,
        *,
        policy: StreamPolicy = SMALL_PARTS,
        statistics: Statistics | None = None,
        most_bytes: int | None = None,
    ) -> BlobReader:
        reader = BlobReader(
            cache,
            lambda: self.store,
            self.spool,
            statistics or self.statistics,
            policy=policy,
            most_bytes=most_bytes,
        )
        self.readers.append(reader)
        return reader

    def cached(self, digest: Digest) -> Path:
        """Return where a blob is in the cache."""
        [path] = self.cache_dir.rglob(digest.hex)
        return path

    def count(self, name: str) -> int:
        return self.statistics.snapshot()[name]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
            reader._threads.shutdown(wait=True)
        for cache in self.caches:
            cache.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, build_store(f"file://{tmp_path}/store"))
    yield rig
    rig.close()


@pytest.fixture
def s3_rig(tmp_path: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy) -> Iterator[Rig]:
    url = f"s3://{s3.bucket}/{s3_prefix}"
    environment = s3.environment_at(fault_proxy.url)
    store = build_store(url, environment=environment, policy=QUICK, account_id="")
    rig = Rig(tmp_path, store, build_store(url, environment=s3.environment, account_id=""))
    yield rig
    # Whoever is held up by the proxy is let go first.
    fault_proxy.refuse(0)
    fault_proxy.clear()
    rig.close()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vfs.reader, "STRICT_BYTES", LARGE_BYTES)


def read(reader: BlobReader, digest: Digest, offset: int = 0, length: int | None = None) -> bytes:
    length = digest.size if length is None else length
    return reader.read(digest, offset, length, Cancellation())


def read_now(reader: BlobReader, digest: Digest, offset: int, length: int) -> bytes | None:
    buffer = bytearray(length)
    count = reader.read_now(digest, offset, memoryview(buffer))
    return None if count < 0 else bytes(buffer[:count])


# ------------------------------------------------------------------ blobs that are read whole


def test_a_blob_is_fetched_once_and_read_from_the_cache_afterwards(rig: Rig) -> None:
    digest, data = blob(1)
    rig.put(digest, data)
    reader = rig.reader(rig.cache())

    assert read_now(reader, digest, 0, 10) is None
    assert not reader.is_local(digest)
    assert read(reader, digest, 100, 200) == data[100:300]
    assert read_now(reader, digest, 4000, 1000) == data[4000:]
    assert reader.is_local(digest)
    assert (rig.count("blobs_fetched"), rig.count("bytes_fetched")) == (1, 5000)
    assert rig.cached(digest).read_bytes() == data

    later = Statistics()
    assert read(rig.reader(rig.cache(), statistics=later), digest) == data
    assert later.snapshot()["blobs_fetched"] == 0
    assert later.snapshot()["bytes_from_cache"] == 5000


def test_a_cached_blob_that_can_not_be_read_any_more_is_fetched_anew(
    rig: Rig, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_QUARANTINED)
    digest, data = blob(44)
    rig.put(digest, data)
    reader = rig.reader(rig.cache())
    assert read(reader, digest, 100, 200) == data[100:300]
    path = rig.cached(digest)
    path.chmod(0o600)
    os.truncate(path, 1000)
    path.chmod(0o444)

    assert read_now(reader, digest, 500, 1000) != data[500:1500]
    assert read(reader, digest, 500, 1000) == data[500:1500]
    assert rig.cached(digest).read_bytes() == data
    assert rig.count("blobs_fetched") == 2


def test_nothing_is_read_of_an_empty_blob(rig: Rig) -> None:
    digest = Digest.of()
    assert read(rig.reader(None), digest) == b""
    assert rig.reader(None).is_local(digest)


def test_a_blob_of_more_than_a_request_is_fetched_through_a_file(s3_rig: Rig) -> None:
    digest, data = blob(2, 9_000_000)
    s3_rig.put(digest, data)
    reader = s3_rig.reader(s3_rig.cache())

    assert read(reader, digest, 8_500_000, 500_000) == data[8_500_000:]
    assert s3_rig.cached(digest).read_bytes() == data


def test_a_cached_blob_with_a_flipped_bit_is_quarantined_and_fetched_anew(
    rig: Rig, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_QUARANTINED)
    digest, data = blob(3)
    rig.put(digest, data)
    rig.cache().add(digest, data)
    flip_a_bit(rig.cached(digest), 2500)
    reader = rig.reader(rig.cache())

    assert read(reader, digest) == data
    assert rig.count("blobs_quarantined") == 1
    assert rig.count("blobs_fetched") == 1
    assert rig.count("blobs_from_cache") == 0
    [quarantined] = (path for path in rig.cache_dir.rglob("quarantine/*") if path.is_file())
    assert quarantined.stat().st_size == digest.size
    # It is the good one that is in its place now.
    [path] = (path for path in rig.cache_dir.rglob(digest.hex) if "quarantine" not in path.parts)
    assert path.read_bytes() == data


@pytest.mark.parametrize("size", [5000, 2_000_000])
def test_a_damaged_blob_that_stays_in_its_place_is_never_read(rig: Rig, size: int) -> None:
    """It can not be moved: the cache's disk has become read-only, or somebody has cleared up."""
    digest, data = blob(45, size)
    rig.put(digest, data)
    rig.cache().add(digest, data)
    flip_a_bit(rig.cached(digest), 2500)
    reader = rig.reader(rig.cache())
    [quarantine] = rig.cache_dir.rglob("quarantine")
    quarantine.rmdir()

    assert read(reader, digest) == data
    assert read(reader, digest, 2400, 200) == data[2400:2600]
    assert rig.cached(digest).read_bytes() != data


def test_a_cached_blob_is_verified_once_and_not_for_each_read(rig: Rig) -> None:
    digest, data = blob(4)
    rig.cache().add(digest, data)
    reader = rig.reader(rig.cache())
    assert read(reader, digest, 0, 10) == data[:10]

    # What happens to the disk behind an open file is not looked for again.
    flip_a_bit(rig.cached(digest), 4999)
    assert read(reader, digest, 0, 10) == data[:10]
    assert read_now(reader, digest, 4999, 1) != data[4999:]
    assert rig.count("blobs_quarantined") == 0


def read_at_once(reader: BlobReader, digest: Digest) -> bytes | None:
    """Read all of a blob without waiting.

    Again, by waiting, if the disk would have been needed: to look at the cache's directory for the
    first time, or because somebody has just dropped what the kernel has in memory.
    """
    for _ in range(10):
        data = read_now(reader, digest, 0, digest.size)
        if data is not None:
            return data
        read(reader, digest)
    return None


def test_a_small_blob_is_read_whole_at_once_and_verified_each_time(
    rig: Rig, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_QUARANTINED)
    digest, data = blob(4)
    rig.put(digest, data)
    rig.cache().add(digest, data)
    reader = rig.reader(rig.cache())
    assert read_at_once(reader, digest) == data
    assert list(reader._open) == []
    flip_a_bit(rig.cached(digest), 4999)
    assert read_now(reader, digest, 0, len(data)) is None
    assert read(reader, digest) == data
    assert rig.count("blobs_quarantined") == 1
    assert rig.count("blobs_fetched") == 1


def test_what_is_read_at_once_counts_as_used(rig: Rig) -> None:
    digest, data = blob(4)
    rig.cache().add(digest, data)
    reader = rig.reader(rig.cache())
    assert read(reader, digest) == data
    os.utime(rig.cached(digest), (1, 1))
    assert read_at_once(reader, digest) == data
    reader.close()
    assert rig.cached(digest).stat().st_mtime > 1_000_000_000


def test_what_was_read_least_recently_is_closed_first(rig: Rig) -> None:
    reader = rig.reader(rig.cache())
    reader._most_open = 2
    blobs = [blob(60 + number) for number in range(3)]
    for digest, data in blobs[:2]:
        rig.put(digest, data)
        assert read(reader, digest, 0, 10) == data[:10]
    assert read_now(reader, blobs[0][0], 0, 10) is not None
    rig.put(*blobs[2])
    read(reader, blobs[2][0], 0, 10)
    assert list(reader._open) == [blobs[0][0].hex, blobs[2][0].hex]


def test_sixteen_readers_share_one_fetch(s3_rig: Rig, fault_proxy: FaultProxy) -> None:
    digest, data = blob(5)
    s3_rig.put(digest, data)
    fault_proxy.inject(Fault.STALL, seconds=0.3)
    reader = s3_rig.reader(s3_rig.cache())
    begin = threading.Barrier(16)

    def one(number: int) -> bytes:
        begin.wait(60)
        return read(reader, digest, number, 1000)

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(one, range(16))) == [data[at : at + 1000] for at in range(16)]
    assert fault_proxy.count("GET", digest.hex) == 1
    assert s3_rig.count("blobs_fetched") == 1


def test_two_servers_with_one_cache_share_one_fetch(s3_rig: Rig, fault_proxy: FaultProxy) -> None:
    digest, data = blob(6)
    s3_rig.put(digest, data)
    fault_proxy.inject(Fault.STALL, seconds=0.3)
    readers = [s3_rig.reader(s3_rig.cache()) for _ in range(2)]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda reader: read(reader, digest), readers)) == [data, data]
    assert fault_proxy.count("GET", digest.hex) == 1


def test_who_gives_up_waiting_takes_nothing_from_the_others(
    s3_rig: Rig, fault_proxy: FaultProxy
) -> None:
    digest, data = blob(7)
    s3_rig.put(digest, data)
    stall = fault_proxy.inject(Fault.STALL)
    reader = s3_rig.reader(s3_rig.cache())
    impatient = Cancellation()

    with ThreadPoolExecutor(2) as threads:
        gone = threads.submit(reader.read, digest, 0, 10, impatient)
        until(lambda: stall.hits == 1)
        patient = threads.submit(read, reader, digest)
        impatient.cancel()
        with pytest.raises(CancelledError):
            gone.result(20)
        assert not patient.done()
        fault_proxy.release()
        assert patient.result(20) == data
    assert fault_proxy.count("GET", digest.hex) == 1


def test_a_blob_that_could_not_be_had_is_asked_for_again_by_the_next_reader(
    s3_rig: Rig, fault_proxy: FaultProxy, expected_events: set[str]
) -> None:
    expected_events.add(events.REQUEST_RETRIED)
    digest, data = blob(8)
    s3_rig.put(digest, data)
    fault_proxy.inject(Fault.UNAVAILABLE)
    reader = s3_rig.reader(s3_rig.cache())
    with pytest.raises(StoreUnavailableError):
        read(reader, digest)

    fault_proxy.clear()
    assert read(reader, digest) == data


def test_wrong_bytes_from_the_store_are_refused_and_not_kept(
    s3_rig: Rig, fault_proxy: FaultProxy, expected_events: set[str]
) -> None:
    expected_events.add(events.REQUEST_RETRIED)
    digest, data = blob(9)
    s3_rig.put(digest, data)
    fault_proxy.inject(Fault.FLIPPED_BIT)
    cache = s3_rig.cache()
    with pytest.raises(BlobCorruptError):
        read(s3_rig.reader(cache), digest)
    assert not cache.contains(digest)


# ------------------------------------------------------------------ without room in the cache


def test_without_a_cache_blobs_are_kept_in_files_without_names(rig: Rig) -> None:
    small, large_one = blob(10), blob(11, 9_000_000)
    reader = rig.reader(None)
    for digest, data in (small, large_one):
        rig.put(digest, data)
        assert read(reader, digest, 100, 4000) == data[100:4100]
        assert read_now(reader, digest, 0, 4000) == data[:4000]
    assert list(rig.spool.iterdir()) == []
    assert rig.count("blobs_fetched") == 2


@pytest.mark.parametrize("size", [5000, 9_000_000])
def test_what_does_not_fit_into_the_cache_is_spooled(
    rig: Rig, expected_events: set[str], size: int
) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    digest, data = blob(12, size)
    rig.put(digest, data)
    with tmpfs_mounted(rig.home / "disk", size=256 * KIBIBYTE) as disk:
        cache = rig.cache(at=disk / "cache")
        (disk / "filler").write_bytes(bytes(_free(disk)))
        reader = rig.reader(cache)

        assert read(reader, digest, 1000, 3000) == data[1000:4000]
        assert read_now(reader, digest, 1000, 3000) == data[1000:4000]
        assert not cache.contains(digest)
        assert list(rig.spool.iterdir()) == []
        # Its count can not be written down on a full disk.
        (disk / "filler").unlink()
        rig.close()
        rig.caches.clear()


def _free(directory: Path) -> int:
    filesystem = os.statvfs(directory)
    return filesystem.f_bavail * filesystem.f_frsize


def spooled(rig: Rig) -> int:
    """Return the bytes of the files in the spool that this process has open."""
    sizes = {}
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            if str(fd.readlink()).startswith(f"{rig.spool}/"):
                status = fd.stat()
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def test_what_the_cache_can_not_take_is_kept_as_long_as_there_is_room_for_it(
    rig: Rig, expected_events: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caught: no limit where there is a cache; one that counts what the cache has as well."""
    expected_events.add(events.CACHE_BYPASSED)
    # Of what comes in one piece a cache takes some more than it may have.
    monkeypatch.setattr(vfs.whole_blobs, "WHOLE_BLOB_BYTES", 1000)
    blobs = [blob(70 + at) for at in range(8)]
    taken, data_of_taken = blob(80, 900)
    for digest, data in (*blobs, (taken, data_of_taken)):
        rig.put(digest, data)
    reader = rig.reader(rig.cache(max_bytes=1000), most_bytes=10_000)

    for digest, data in blobs:
        assert read(reader, digest, 1000, 3000) == data[1000:4000]
        until(lambda: spooled(rig) <= 10_000)
    assert read(reader, taken, 100, 500) == data_of_taken[100:600]
    assert spooled(rig) == 10_000, "what the cache has takes no room from the others"
    for digest, data in blobs[-2:]:
        assert read(reader, digest, 1000, 3000) == data[1000:4000]
    assert rig.count("blobs_fetched") == 9
    first, data = blobs[0]
    assert read(reader, first, 1000, 3000) == data[1000:4000]
    assert rig.count("blobs_fetched") == 10


@pytest.mark.usefixtures("large")
def test_a_large_blob_that_only_the_spool_takes_comes_to_its_end_once_and_is_verified(
    rig: Rig, expected_events: set[str]
) -> None:
    """Caught: one that is let go of while it comes, as those that nobody verifies may be."""
    expected_events.add(events.CACHE_BYPASSED)
    (right, data), (wrong, _) = blobs = [blob(81 + at, 5 * LARGE_BYTES) for at in range(2)]
    for each, content in blobs:
        rig.put(each, content)
    flip_a_bit(rig.home / "store" / blob_key(wrong), 100)
    reader = rig.reader(rig.cache(max_bytes=1000), most_bytes=LARGE_BYTES)

    def read_on(digest: Digest) -> list[bytes]:
        step = 16 * KIBIBYTE
        return [read(reader, digest, offset, step) for offset in range(0, digest.size, step)]

    assert b"".join(read_on(right)) == data
    assert rig.count("bytes_fetched") == right.size
    with pytest.raises(BlobCorruptError):
        read_on(wrong)


@pytest.mark.usefixtures("large")
def test_a_large_blob_that_the_spool_has_let_go_of_is_read_again_only_when_it_is_verified(
    rig: Rig, expected_events: set[str]
) -> None:
    """Caught: its rest streamed to who has read its beginning, so that nobody verifies it."""
    expected_events.add(events.CACHE_BYPASSED)
    (digest, data), (other, _) = blobs = [blob(83 + at, 5 * LARGE_BYTES) for at in range(2)]
    for each, content in blobs:
        rig.put(each, content)
    reader = rig.reader(rig.cache(max_bytes=1000), most_bytes=LARGE_BYTES)
    assert read(reader, digest) == data
    until(lambda: not reader._streamed)
    read(reader, other)
    until(lambda: digest.hex not in reader._open)
    flip_a_bit(rig.home / "store" / blob_key(digest), digest.size - 1)

    with pytest.raises(BlobCorruptError):
        read(reader, digest, digest.size - 16 * KIBIBYTE, 10)


def test_a_cache_that_others_could_write_is_neither_read_nor_written(
    rig: Rig, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    digest, data = blob(13)
    rig.put(digest, data)
    cache = rig.cache()
    cache.add(digest, data)
    rig.cached(digest).parent.chmod(0o777)
    fresh = rig.cache()

    assert read(rig.reader(fresh), digest) == data
    assert rig.count("blobs_fetched") == 1


def test_a_spool_that_can_not_be_written_is_an_error_of_this_host(rig: Rig) -> None:
    digest, data = blob(14)
    rig.put(digest, data)
    rig.spool.rmdir()
    with pytest.raises(LocalWriteError):
        read(rig.reader(None), digest)


# ------------------------------------------------------------------ what a job is told


@pytest.fixture
def served(rig: Rig) -> Callable[..., tuple[NodeService, Path]]:
    """Serves files of a content that the store has, or has not."""

    def serve(
        files: dict[str, Digest], reader: BlobReader | None = None
    ) -> tuple[NodeService, Path]:
        tree = Tree()
        tree.add(
            Manifest.of(
                FileEntry(digest.hex, 0, path, digest.size) for path, digest in files.items()
            )
        )
        errors = rig.home / "errors"
        service = NodeService(
            tree,
            reader or rig.reader(rig.cache()),
            ErrorLedger(errors),
            rig.statistics,
            Ownership(os.geteuid(), os.getegid()),
        )
        return service, errors

    return serve


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


Serve = Callable[..., tuple[NodeService, Path]]


def test_a_missing_blob_is_an_error_with_one_line_in_the_ledger(
    rig: Rig, served: Serve, expected_events: set[str]
) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    there, data = blob(20)
    missing, _ = blob(21, 300)
    rig.put(there, data)
    name = os.fsdecode(b"lost-\xff.tx")
    service, errors = served({name: missing, "there.tx": there})
    lost, found = service.lookup(ROOT, os.fsencode(name)), service.lookup(ROOT, b"there.tx")
    assert lost is not None
    assert found is not None

    for _ in range(3):
        with pytest.raises(BlobNotFoundError):
            service.read(lost, 0, 100, Cancellation())
    assert service.read(found, 4990, 100, Cancellation()) == data[4990:]

    [line] = lines_of(errors)
    assert (line["path"], line["hash"], line["size"]) == (name, missing.hex, 300)
    assert (line["code"], line["reference"]) == ("E_NOT_FOUND", "blob-not-found")
    assert missing.hex in str(line["reason"])
    assert errors.stat().st_mode & 0o777 == 0o600
    assert rig.count("reads_failed") == 3


@pytest.mark.parametrize("failure", [OSError(errno.EMFILE, "too many"), KeyError("a defect")])
def test_whatever_a_reader_is_refused_for_is_in_the_ledger(
    rig: Rig,
    served: Serve,
    monkeypatch: pytest.MonkeyPatch,
    expected_events: set[str],
    failure: Exception,
) -> None:
    def fail(_digest: Digest) -> bytes:
        raise failure

    expected_events.update({events.MOUNT_READ_FAILED, events.MOUNT_REQUEST_CRASHED})
    monkeypatch.setattr(rig.store, "get", fail)
    service, errors = served({"read.tx": blob(47)[0], "opened.tx": blob(48)[0]})
    read, opened = service.lookup(ROOT, b"read.tx"), service.lookup(ROOT, b"opened.tx")
    assert read is not None
    assert opened is not None
    with pytest.raises(LocalReadError):
        service.read(read, 0, 10, Cancellation())
    with pytest.raises(LocalReadError):
        service.content(opened, Cancellation())
    assert [line["path"] for line in lines_of(errors)] == ["read.tx", "opened.tx"]
    assert rig.count("reads_failed") == 2


def test_a_read_past_the_end_is_empty_and_needs_no_blob(served: Serve) -> None:
    missing, _ = blob(22, 300)
    service, errors = served({"a": missing})
    node = service.lookup(ROOT, b"a")
    assert node is not None
    assert service.read(node, 300, 10, Cancellation()) == b""
    assert service.read_now(node, 1000, memoryview(bytearray(10))) == 0
    assert not errors.exists()


def test_whoever_is_gone_is_counted_and_is_no_failure(rig: Rig, served: Serve) -> None:
    missing, _ = blob(23, 300)
    service, errors = served({"a": missing})
    node = service.lookup(ROOT, b"a")
    assert node is not None
    gone = Cancellation()
    gone.cancel()
    with pytest.raises(CancelledError):
        service.read(node, 0, 10, gone)
    assert rig.count("reads_interrupted") == 1
    assert rig.count("reads_failed") == 0
    assert not errors.exists()


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def test_the_ledger_keeps_an_error_of_a_file_once_in_ten_seconds(tmp_path: Path) -> None:
    clock = Clock()
    ledger = ErrorLedger(tmp_path / "errors", clock=clock)
    digest, _ = blob(24)
    lost, down = BlobNotFoundError("no such blob"), StoreUnavailableError("it is down")
    ledger.record("a", digest, lost)
    ledger.record("a", digest, lost)
    ledger.record("a", digest, down)
    ledger.record("b", digest, lost)
    clock.now += REPEAT_SECONDS - 0.1
    ledger.record("a", digest, lost)
    clock.now += 0.1
    ledger.record("a", digest, lost)

    assert [(line["path"], line["code"]) for line in lines_of(tmp_path / "errors")] == [
        ("a", "E_NOT_FOUND"), ("a", "E_NETWORK"), ("b", "E_NOT_FOUND"), ("a", "E_NOT_FOUND"),
    ]  # fmt: skip


def test_a_read_that_is_refused_is_asked_for_again_at_once_and_not_tried_again(
    rig: Rig, served: Serve, monkeypatch: pytest.MonkeyPatch, expected_events: set[str]
) -> None:
    """The kernel asks a second time for what it could not read ahead; the reader asks once."""
    expected_events.add(events.MOUNT_READ_FAILED)
    monkeypatch.setattr(vfs.service, "SECOND_ASK_SECONDS", 60.0)
    digest, data = blob(27)
    rig.put(*blob(28))
    service, _ = served({"late.tx": digest})
    node = service.lookup(ROOT, b"late.tx")
    assert node is not None

    with pytest.raises(BlobNotFoundError):
        service.read(node, 0, 100, Cancellation())
    rig.put(digest, data)
    with pytest.raises(BlobNotFoundError):
        service.read(node, 0, 10, Cancellation())
    assert service.read(node, 0, 100, Cancellation()) == data[:100]


def test_the_ledger_does_not_grow_for_ever(tmp_path: Path) -> None:
    ledger = ErrorLedger(tmp_path / "errors")
    digest, _ = blob(25)
    for number in range(MOST_LINES + 10):
        ledger.record(f"{number}", digest, BlobNotFoundError("no such blob"))
    assert len(lines_of(tmp_path / "errors")) == MOST_LINES


def test_of_what_fails_after_somebody_was_told_the_ledger_has_a_line(tmp_path: Path) -> None:
    """Of a ledger that is full, too: otherwise the next task would seem to have read all."""
    errors, clock = tmp_path / "errors", Clock()
    ledger = ErrorLedger(errors, clock=clock)
    digest, lost = blob(24)[0], BlobNotFoundError("no such blob")
    for lines in (1, 2, 3):
        ledger.record("a", digest, lost)
        ledger.record("a", digest, lost)
        assert len(lines_of(errors)) == lines
        os.utime(errors, ns=(TOLD_NS, TOLD_NS))

    for number in range(MOST_LINES):
        ledger.record(f"{number}", digest, lost)
    os.utime(errors, ns=(TOLD_NS, TOLD_NS))
    ledger.record("a", digest, lost)
    ledger.record("b", digest, lost)
    assert len(lines_of(errors)) == MOST_LINES + 1


def test_a_ledger_that_can_not_be_written_is_logged_and_raises_nothing(
    tmp_path: Path, expected_events: set[str]
) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    ledger = ErrorLedger(tmp_path / "missing/errors")
    ledger.record("a", blob(26)[0], BlobNotFoundError("no such blob"))


def test_a_line_for_which_there_is_no_room_is_written_once_there_is(
    tmp_path: Path, expected_events: set[str]
) -> None:
    """Whoever has filled the disk may be about to clear up, and to have read all it seems."""
    expected_events.add(events.MOUNT_READ_FAILED)
    with tmpfs_mounted(tmp_path / "disk", size=64 * KIBIBYTE) as disk:
        ledger = ErrorLedger(disk / "errors")
        filler = fill(disk)
        for path in ("a", "b"):
            ledger.record(path, blob(26)[0], BlobNotFoundError("no such blob"))
        assert not (disk / "errors").exists() or (disk / "errors").stat().st_size == 0
        filler.unlink()
        until(lambda: [line["path"] for line in lines_of(disk / "errors")] == ["a"])


def test_a_line_that_no_thread_could_be_had_for_is_written_with_the_next(
    tmp_path: Path, expected_events: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: it raised, and no line was tried again."""

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    expected_events.add(events.MOUNT_READ_FAILED)
    errors = tmp_path / "later/errors"
    ledger = ErrorLedger(errors)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        ledger.record("a", blob(26)[0], BlobNotFoundError("no such blob"))
    errors.parent.mkdir()
    ledger.record("b", blob(26)[0], BlobNotFoundError("no such blob"))
    assert [line["path"] for line in lines_of(errors)] == ["a", "b"]


def test_no_line_of_the_ledger_is_left_in_part(tmp_path: Path, expected_events: set[str]) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    with tmpfs_mounted(tmp_path / "disk", size=64 * KIBIBYTE) as disk:
        ledger = ErrorLedger(disk / "errors")
        ledger.record("a", blob(26)[0], BlobNotFoundError("no such blob"))
        fill(disk)
        for number in range(40):
            ledger.record(f"{number}", blob(26)[0], BlobNotFoundError("no such blob"))
        assert lines_of(disk / "errors")[0]["path"] == "a"


# ------------------------------------------------------------------ large blobs

PARTS = 20
LARGE = PARTS * SMALL_PARTS.part_bytes - 777


def ranges_asked(proxy: FaultProxy, digest: Digest) -> list[int]:
    """Return the numbers of the parts that were asked for, in order."""
    found: list[int] = []
    for request in proxy.requests:
        if request.method == "GET" and digest.hex in request.key:
            bounds = request.headers["range"].removeprefix("bytes=").split("-")
            first, last = (int(bound) // SMALL_PARTS.part_bytes for bound in bounds)
            found.extend(range(first, last + 1))
    return found


@pytest.mark.usefixtures("large")
def test_of_a_large_blob_only_the_parts_that_are_read_are_fetched(
    s3_rig: Rig, fault_proxy: FaultProxy
) -> None:
    digest, data = blob(30, LARGE)
    s3_rig.put(digest, data)
    cache = s3_rig.cache()
    reader = s3_rig.reader(cache)
    part = SMALL_PARTS.part_bytes
    for offset, length in ((10 * part + 5, 100), (18 * part - 10, 20), (LARGE - 3, 3)):
        assert read(reader, digest, offset, length) == data[offset : offset + length]

    assert sorted(ranges_asked(fault_proxy, digest)) == [10, 17, 18, 19]
    assert s3_rig.count("bytes_fetched") == 4 * part - 777
    assert read_now(reader, digest, 10 * part, part) == data[10 * part : 11 * part]
    assert read_now(reader, digest, 3 * part, 10) is None
    assert not cache.contains(digest)


@pytest.mark.usefixtures("large")
def test_random_parts_of_a_large_blob_are_right_whatever_their_order(
    s3_rig: Rig, fault_proxy: FaultProxy
) -> None:
    digest, data = blob(31, LARGE)
    s3_rig.put(digest, data)
    reader = s3_rig.reader(s3_rig.cache())
    chance = random.Random(31)

    def one(_number: int) -> bool:
        offset = chance.randrange(LARGE)
        length = min(chance.randrange(1, 40_000), LARGE - offset)
        return read(reader, digest, offset, length) == data[offset : offset + length]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(100)))
    until(lambda: s3_rig.count("blobs_fetched") == 1)
    asked = ranges_asked(fault_proxy, digest)
    assert sorted(asked) == list(range(PARTS)), "each part is fetched once"


@pytest.mark.usefixtures("large")
def test_a_sequential_reader_has_more_and_more_fetched_ahead(
    s3_rig: Rig, fault_proxy: FaultProxy
) -> None:
    digest, data = blob(32, LARGE)
    s3_rig.put(digest, data)
    reader = s3_rig.reader(s3_rig.cache())
    part = SMALL_PARTS.part_bytes
    ahead = []
    for at in range(8):
        assert read(reader, digest, at * part, part) == data[at * part : (at + 1) * part]
        until(lambda: not reader._streamed[digest.hex]._under_way)
        ahead.append(max(ranges_asked(fault_proxy, digest)) - at)

    assert ahead[0] < ahead[2] < ahead[7]
    assert max(ahead) <= SMALL_PARTS.ahead_bytes // part + 1


@pytest.mark.usefixtures("large")
def test_what_is_missing_side_by_side_comes_with_few_requests(
    s3_rig: Rig, fault_proxy: FaultProxy
) -> None:
    digest, data = blob(64, LARGE)
    s3_rig.put(digest, data)
    reader = s3_rig.reader(s3_rig.cache())
    part = SMALL_PARTS.part_bytes
    read(reader, digest, 3 * part, 10)
    before = len(fault_proxy.requests)

    assert read(reader, digest, 0, 8 * part) == data[: 8 * part]
    asked = fault_proxy.requests[before:]
    assert sorted(request.headers["range"] for request in asked) == [
        f"bytes={first * part}-{last * part + part - 1}"
        for first, last in ((0, 1), (2, 2), (4, 5), (6, 7))
    ]


@pytest.mark.usefixtures("large")
def test_a_large_blob_that_is_complete_is_verified_and_published(rig: Rig) -> None:
    digest, data = blob(33, LARGE)
    rig.put(digest, data)
    cache = rig.cache()
    reader = rig.reader(cache)
    for offset in range(0, LARGE, 10_000):
        assert read(reader, digest, offset, min(10_000, LARGE - offset)) == data[offset:][:10_000]

    until(lambda: not reader._streamed)
    assert cache.contains(digest)
    assert rig.cached(digest).read_bytes() == data
    assert read_now(reader, digest, LARGE - 10, 10) == data[-10:]
    assert (rig.count("blobs_fetched"), rig.count("bytes_fetched")) == (1, LARGE)
    assert [path for path in rig.cache_dir.rglob("tmp/*") if path.is_file()] == []


@pytest.mark.usefixtures("large")
def test_a_large_blob_that_could_not_be_verified_is_verified_when_its_rest_comes_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caught: nothing counted the rest as missing, so all was read and nobody ever hashed it."""
    digest, data = blob(37, LARGE)
    rig.put(digest, data)
    cache = rig.cache()
    reader = rig.reader(cache)
    hashed: list[int] = []

    def hash_later(fd: int) -> Digest:
        hashed.append(fd)
        if len(hashed) == 1:
            raise MemoryError
        return hash_fd(fd)

    monkeypatch.setattr(vfs.streaming, "hash_fd", hash_later)
    with pytest.raises(MemoryError):
        read(reader, digest)
    # Whichever of them it was that came last.
    for part in range(PARTS):
        flip_a_bit(rig.home / "store" / blob_key(digest), part * SMALL_PARTS.part_bytes)
    told: list[PropmasterError] = []
    reader.on_corrupt = lambda _digest, error: told.append(error)

    with pytest.raises(BlobCorruptError):
        read(reader, digest)
    assert [type(error) for error in told] == [BlobCorruptError]
    assert not cache.contains(digest)


@pytest.mark.usefixtures("large")
def test_a_large_blob_streams_without_a_cache(rig: Rig) -> None:
    digest, data = blob(34, LARGE)
    rig.put(digest, data)
    reader = rig.reader(None)
    assert read(reader, digest) == data
    until(lambda: not reader._streamed)
    assert read_now(reader, digest, 5, 100) == data[5:105]
    assert list(rig.spool.iterdir()) == []


@pytest.mark.usefixtures("large")
def test_a_large_blob_that_does_not_fit_into_the_cache_streams_through_the_spool(
    rig: Rig, expected_events: set[str]
) -> None:
    expected_events.add(events.CACHE_BYPASSED)
    digest, data = blob(35, LARGE)
    rig.put(digest, data)
    cache = rig.cache(max_bytes=1000)
    assert read(rig.reader(cache), digest) == data
    assert not cache.contains(digest)


@pytest.mark.usefixtures("large")
def test_a_large_blob_is_read_whole_if_it_may_not_be_read_unverified(
    s3_rig: Rig, fault_proxy: FaultProxy
) -> None:
    digest, data = blob(36, LARGE)
    s3_rig.put(digest, data)
    reader = s3_rig.reader(s3_rig.cache(), policy=replace(SMALL_PARTS, may_stream=False))
    assert read(reader, digest, 0, 10) == data[:10]
    assert s3_rig.count("blobs_fetched") == 1
    assert fault_proxy.count("GET", digest.hex) == 1


@pytest.mark.usefixtures("large")
def test_a_corrupt_large_blob_fails_once_it_is_complete_and_is_not_published(
    rig: Rig, served: Serve, expected_events: set[str]
) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    digest, data = blob(37, LARGE)
    rig.put(digest, data)
    flip_a_bit(rig.home / "store" / blob_key(digest), LARGE - 1)
    cache = rig.cache()
    reader = rig.reader(cache)
    service, errors = served({"big.abc": digest, "copies/big.abc": digest}, reader)
    node = service.lookup(ROOT, b"big.abc")
    assert node is not None

    assert service.read(node, 0, 1000, Cancellation()) == data[:1000], "that much is known later"
    with pytest.raises(BlobCorruptError):
        service.read(node, 0, LARGE, Cancellation())
    for offset in (0, LARGE - 10):
        assert service.read_now(node, offset, memoryview(bytearray(10))) == -1
        with pytest.raises(BlobCorruptError):
            service.read(node, offset, 10, Cancellation())
    assert not cache.contains(digest)
    assert rig.count("blobs_fetched") == 0
    assert {line["code"] for line in lines_of(errors)} == {"E_CHECKSUM"}


@pytest.mark.usefixtures("large")
def test_what_came_wrong_is_verified_whole_before_it_is_read_again(
    rig: Rig, served: Serve, monkeypatch: pytest.MonkeyPatch, expected_events: set[str]
) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    digest, data = blob(39, LARGE)
    rig.put(digest, data)
    stored = rig.home / "store" / blob_key(digest)
    flip_a_bit(stored, 0)
    service, _ = served({"big.abc": digest}, rig.reader(rig.cache()))
    node = service.lookup(ROOT, b"big.abc")
    assert node is not None
    with pytest.raises(BlobCorruptError):
        service.read(node, 0, LARGE, Cancellation())
    flip_a_bit(stored, 0)
    for _ in range(3):
        with pytest.raises(BlobCorruptError):
            service.read(node, LARGE - 10, 10, Cancellation())
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + WRONG_SECONDS)
    flip_a_bit(stored, 0)
    with pytest.raises(BlobCorruptError):
        service.read(node, 0, 10, Cancellation())
    flip_a_bit(stored, 0)
    with suppress(BlobCorruptError):  # The kernel's second ask.
        service.read(node, 0, 10, Cancellation())
    assert service.read(node, 0, LARGE, Cancellation()) == data


def test_what_was_read_ahead_of_one_reader_is_not_refused_to_the_next(
    rig: Rig, served: Serve, monkeypatch: pytest.MonkeyPatch, expected_events: set[str]
) -> None:
    """Seen to fail when a refusal is told to whoever asks next for any part of the file."""
    expected_events.add(events.MOUNT_READ_FAILED)
    monkeypatch.setattr(vfs.service, "SECOND_ASK_SECONDS", 60.0)
    digest, data = blob(45, 64 * KIBIBYTE)
    service, _ = served({"a": digest}, rig.reader(rig.cache()))
    node = service.lookup(ROOT, b"a")
    assert node is not None
    half = digest.size // 2
    for offset, length in ((0, half), (half, half), (0, 4096)):
        with pytest.raises(PropmasterError):
            service.read(node, offset, length, Cancellation())
    rig.put(digest, data)
    for offset in (0, half):
        assert service.read(node, offset, half, Cancellation()) == data[offset : offset + half]


@pytest.mark.usefixtures("large")
def test_what_came_wrong_is_not_kept(rig: Rig, served: Serve, expected_events: set[str]) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    digest, data = blob(43, LARGE)
    rig.put(digest, data)
    flip_a_bit(rig.home / "store" / blob_key(digest), 0)
    service, _ = served({"big.abc": digest}, rig.reader(rig.cache()))
    node = service.lookup(ROOT, b"big.abc")
    assert node is not None
    for _ in range(3):
        with pytest.raises(BlobCorruptError):
            service.read(node, 0, LARGE, Cancellation())

    def is_open() -> bool:
        gc.collect()
        found = False
        for fd in Path("/proc/self/fd").iterdir():
            # Closed meanwhile.
            with suppress(FileNotFoundError):
                in_cache = str(rig.cache_dir / "") in os.fspath(fd.readlink())
                found = found or (in_cache and fd.stat().st_size == LARGE)
        return found

    until(lambda: not is_open())


@pytest.mark.usefixtures("large")
def test_more_large_blobs_are_read_than_a_process_may_have_open(rig: Rig) -> None:
    blobs = [blob(seed, LARGE) for seed in range(100, 180)]
    for digest, data in blobs:
        rig.put(digest, data)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 64, limits[1]))
    try:
        reader = rig.reader(rig.cache())
        for digest, data in blobs:
            assert read(reader, digest, 100, 50) == data[100:150]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("large")
def test_what_was_read_before_it_turned_out_wrong_is_in_the_ledger_for_each_of_its_files(
    rig: Rig, served: Serve, monkeypatch: pytest.MonkeyPatch, expected_events: set[str]
) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    bring, missing, may_come = Streamed._bring, 2, threading.Event()

    def bring_later(self: Streamed, first: int, count: int) -> None:
        assert first != missing or may_come.wait(20)
        bring(self, first, count)

    monkeypatch.setattr(Streamed, "_bring", bring_later)
    digest, data = blob(38, LARGE)
    rig.put(digest, data)
    flip_a_bit(rig.home / "store" / blob_key(digest), 0)
    reader = rig.reader(rig.cache())
    service, errors = served({"big.abc": digest, "copies/big.abc": digest}, reader)
    node = service.lookup(ROOT, b"big.abc")
    assert node is not None
    part = SMALL_PARTS.part_bytes
    # From the end on, so that nothing is fetched ahead, but in the end the one that is missing.
    for at in range(PARTS - 1, missing, -1):
        service.read(node, at * part, part, Cancellation())
    service.read(node, 0, 100, Cancellation())
    service.read(node, part, part, Cancellation())
    # Its last part may come, and show that it is wrong, before a read is answered that wants it.
    assert service.read(node, 100, part - 100, Cancellation()) == data[100:part]
    may_come.set()

    until(lambda: errors.exists() and len(lines_of(errors)) == 2)
    assert {line["path"] for line in lines_of(errors)} == {"big.abc", "copies/big.abc"}


@pytest.mark.usefixtures("large")
def test_a_damaged_large_blob_in_the_cache_is_found_beside_the_reading(
    rig: Rig, served: Serve, expected_events: set[str]
) -> None:
    expected_events.update({events.CACHE_QUARANTINED, events.MOUNT_READ_FAILED})
    digest, data = blob(39, LARGE)
    rig.put(digest, data)
    cache = rig.cache()
    cache.add(digest, data)
    flip_a_bit(rig.cached(digest), LARGE // 2)
    reader = rig.reader(cache)
    service, errors = served({"big.abc": digest}, reader)
    node = service.lookup(ROOT, b"big.abc")
    assert node is not None

    assert service.read(node, 0, 100, Cancellation()) == data[:100]
    until(lambda: rig.count("blobs_quarantined") == 1)
    until(errors.exists)
    assert service.read(node, LARGE // 2 - 5, 10, Cancellation()) == data[LARGE // 2 - 5 :][:10]
    assert [line["path"] for line in lines_of(errors)] == ["big.abc"]


@pytest.mark.usefixtures("large")
def test_a_damaged_large_blob_that_stays_in_its_place_is_read_no_more(
    rig: Rig, served: Serve, expected_events: set[str]
) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    digest, data = blob(46, LARGE)
    rig.put(digest, data)
    cache = rig.cache()
    cache.add(digest, data)
    flip_a_bit(rig.cached(digest), LARGE // 2)
    [quarantine] = rig.cache_dir.rglob("quarantine")
    quarantine.rmdir()
    service, errors = served({"big.abc": digest}, rig.reader(cache))
    node = service.lookup(ROOT, b"big.abc")
    assert node is not None

    assert service.read(node, 0, 100, Cancellation()) == data[:100]
    until(errors.exists)
    for at in range(0, LARGE, 10_000):
        assert service.read(node, at, 10_000, Cancellation()) == data[at : at + 10_000]
    assert rig.count("bytes_fetched") == digest.size


@pytest.mark.usefixtures("large")
def test_a_large_blob_is_not_passed_through_before_it_is_verified(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vfs.reader, "VERIFY_SECONDS", 0.05)
    digest, data = blob(40, LARGE)
    rig.cache().add(digest, data)
    reader = rig.reader(rig.cache())
    may_go_on = threading.Event()
    for _ in range(vfs.reader.LARGE_LOOKS_AT_ONCE):
        reader._large.submit(may_go_on.wait, 20)
    try:
        assert reader.verified_cached(digest) is None
        assert reader.verified_now(digest) is None
        assert read_now(reader, digest, 0, 100) == data[:100]
    finally:
        may_go_on.set()
    until(lambda: reader.verified_now(digest) is not None)
    passed = reader.verified_cached(digest)
    assert passed is not None
    assert hash_fd(passed.fd) == digest


@pytest.mark.usefixtures("large")
def test_a_part_that_could_not_be_had_fails_its_readers_and_is_asked_for_again(
    s3_rig: Rig, fault_proxy: FaultProxy, expected_events: set[str]
) -> None:
    expected_events.add(events.REQUEST_RETRIED)
    digest, data = blob(40, LARGE)
    s3_rig.put(digest, data)
    fault_proxy.inject(Fault.UNAVAILABLE)
    reader = s3_rig.reader(s3_rig.cache())
    with pytest.raises(StoreUnavailableError):
        read(reader, digest, 100_000, 10)

    fault_proxy.clear()
    assert read(reader, digest, 100_000, 10) == data[100_000:100_010]


@pytest.mark.usefixtures("large")
def test_a_disk_that_fills_while_a_large_blob_comes_is_an_error_of_this_host(
    rig: Rig, served: Serve, expected_events: set[str]
) -> None:
    expected_events.add(events.MOUNT_READ_FAILED)
    digest, data = blob(41, LARGE)
    rig.put(digest, data)
    with tmpfs_mounted(rig.home / "disk", size=64 * KIBIBYTE) as disk:
        rig.spool = disk
        reader = rig.reader(None)
        service, errors = served({"big.abc": digest}, reader)
        node = service.lookup(ROOT, b"big.abc")
        assert node is not None
        assert service.read(node, 0, 10, Cancellation()) == data[:10]
        with pytest.raises(PropmasterError, match="space"):
            service.read(node, 0, LARGE, Cancellation())
        assert [line["code"] for line in lines_of(errors)] == ["E_NO_SPACE"]
        rig.close()
        reader._streamed.clear()


@pytest.mark.usefixtures("large")
def test_a_killed_waiter_of_a_large_blob_goes_and_the_part_still_comes(
    s3_rig: Rig, fault_proxy: FaultProxy
) -> None:
    digest, data = blob(42, LARGE)
    s3_rig.put(digest, data)
    stall = fault_proxy.inject(Fault.STALL)
    reader = s3_rig.reader(s3_rig.cache())
    gone = Cancellation()
    with ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(reader.read, digest, 200_000, 10, gone)
        until(lambda: stall.hits == 1)
        gone.cancel()
        with pytest.raises(CancelledError):
            waiter.result(20)
    fault_proxy.release()
    until(lambda: read_now(reader, digest, 200_000, 10) == data[200_000:200_010])
    assert ranges_asked(fault_proxy, digest).count(200_000 // SMALL_PARTS.part_bytes) == 1


def test_descriptors_are_closed_when_the_last_reader_lets_go(rig: Rig) -> None:
    reader = rig.reader(rig.cache())
    reader._most_open = 3
    blobs = [blob(50 + number) for number in range(10)]
    for digest, data in blobs:
        rig.put(digest, data)
        assert read(reader, digest) == data
    assert len(reader._open) == 3
    assert sum(read_now(reader, digest, 0, 1) is not None for digest, _ in blobs) == 3
    digest, data = blobs[0]
    kept = reader.open(digest, Cancellation())
    for other, _ in blobs[1:]:
        read(reader, other, 0, 10)
    assert hash_fd(kept.fd) == digest
    fd = kept.fd
    del kept
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ------------------------------------------------------------------ beside others on the host


@pytest.mark.usefixtures("large")
def test_a_large_blob_that_another_server_has_completed_is_fetched_no_further(
    s3_rig: Rig, fault_proxy: FaultProxy
) -> None:
    digest, data = blob(60, LARGE)
    s3_rig.put(digest, data)
    first, second = (s3_rig.reader(s3_rig.cache()) for _ in range(2))
    part = SMALL_PARTS.part_bytes
    assert read(first, digest, 10 * part, 10) == data[10 * part :][:10]
    assert read(second, digest) == data
    until(lambda: not second._streamed)
    fetched = len(ranges_asked(fault_proxy, digest))

    assert read(first, digest) == data
    until(lambda: not first._streamed)
    assert len(ranges_asked(fault_proxy, digest)) == fetched == PARTS + 1
    assert s3_rig.count("bytes_fetched") == LARGE + part


def test_what_is_read_is_used_and_stays_when_others_need_room(rig: Rig) -> None:
    """Seen to fail without `note_uses`: what was opened long ago goes first."""
    used, unused, kept = (blob(seed, 40_000) for seed in (61, 62, 63))
    cache = rig.cache(max_bytes=150_000)
    reader = rig.reader(cache)
    for number, (digest, data) in enumerate((used, unused, kept)):
        rig.put(digest, data)
        assert read(reader, digest, 0, 10) == data[:10]
        long_ago = 1_600_000_000 + number
        os.utime(rig.cached(digest), (long_ago, long_ago))
    assert read_now(reader, used[0], 0, 10) == used[1][:10]
    reader.note_uses()
    another = rig.cache(max_bytes=150_000)
    another.collect(room=100_000)

    assert another.contains(used[0])
    assert not another.contains(unused[0])
    assert read_now(reader, unused[0], 5, 10) == unused[1][5:15], "who has it open goes on"
    assert rig.count("blobs_fetched") == 3


@pytest.mark.usefixtures("large")
def test_a_large_blob_is_begun_once_and_holds_nobody_else_up(rig: Rig) -> None:
    digest, data = blob(64, LARGE)
    small, small_data = blob(65)
    rig.put(digest, data)
    rig.put(small, small_data)
    may_open, opened = threading.Event(), []

    def open_store() -> Store:
        opened.append(threading.current_thread().name)
        assert may_open.wait(20)
        return rig.store

    cache = rig.cache()
    cache.add(small, small_data)
    reader = BlobReader(cache, open_store, rig.spool, rig.statistics, policy=StreamPolicy())
    rig.readers.append(reader)
    with ThreadPoolExecutor(4) as threads:
        firsts = [threads.submit(read, reader, digest, at, 10) for at in range(4)]
        until(lambda: len(opened) == 1)
        try:
            assert read(reader, small, 0, 10) == small_data[:10]
            assert read_now(reader, small, 0, 10) == small_data[:10]
            assert read_now(reader, digest, 0, 10) is None
        finally:
            may_open.set()
        assert [first.result(20) for first in firsts] == [data[at : at + 10] for at in range(4)]
    assert len(opened) == 1


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("may_stream", [True, False])
def test_large_blobs_that_are_hashed_for_long_hold_up_no_small_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, may_stream: bool
) -> None:
    """Seen to fail with one set of threads for all. The slow disk is a hash that waits."""
    cache = rig.cache()
    small, small_data = blob(70)
    cache.add(small, small_data)
    blobs = [blob(71 + number, LARGE) for number in range(12)]
    for digest, data in blobs:
        cache.add(digest, data)
    may_hash = threading.Event()

    def slowly(fd: int) -> Digest:
        if os.fstat(fd).st_size > LARGE_BYTES:
            assert may_hash.wait(60)
        return hash_fd(fd)

    monkeypatch.setattr(vfs.whole_blobs, "hash_fd", slowly)
    reader = rig.reader(cache, policy=replace(SMALL_PARTS, may_stream=may_stream))
    with ThreadPoolExecutor(12) as threads:
        reads = [threads.submit(read, reader, digest, 0, 10) for digest, _ in blobs]
        try:
            until(lambda: len(reader._open if may_stream else reader._under_way) == 12)
            with ThreadPoolExecutor(1) as another:
                assert another.submit(read, reader, small).result(20) == small_data
        finally:
            may_hash.set()
        assert [done.result(20) for done in reads] == [data[:10] for _, data in blobs]


@pytest.mark.usefixtures("large")
def test_a_large_blob_that_a_garbage_collection_finds_holds_nobody_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to hang: its room was given back by who was just counting, and so had the lock.

    The error that a reader was given keeps the blob, and is kept by what its traceback has.
    """
    rig.put(*blob(91))
    missing, _ = blob(92, LARGE)
    cache = BlobCache.open(rig.cache_dir, store_url="s3://a/b", max_bytes=PLENTY, min_free_bytes=0)
    reader = rig.reader(cache)
    counted = UsageCounter.read

    def collect_and_read(counter: UsageCounter) -> Usage | None:
        gc.collect()
        return counted(counter)

    gc.disable()
    try:
        with suppress(BlobNotFoundError):
            read(reader, missing, 0, 10)
        is_there = weakref.ref(reader._streamed.pop(missing.hex))
        assert is_there() is not None
        with monkeypatch.context() as collecting:
            collecting.setattr(UsageCounter, "read", collect_and_read)
            counting = threading.Thread(target=cache.make_room, args=(1,), daemon=True)
            counting.start()
            counting.join(20)
    finally:
        gc.enable()
    assert not counting.is_alive()
    assert is_there() is None
    until(lambda: not list(cache.path.glob("v1/tmp/*")))
    cache.close()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("size", [5000, LARGE])
def test_a_blob_for_which_there_was_no_thread_is_read_when_there_is_one_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Seen to wait for ever for a thread that had never begun."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    digest, data = blob(90, size)
    rig.put(digest, data)
    reader = rig.reader(rig.cache())
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        with pytest.raises(LocalReadError, match="no further thread"):
            read(reader, digest, 0, 10)

    gone = Cancellation()
    with ThreadPoolExecutor(1) as threads:
        again = threads.submit(reader.read, digest, 0, 10, gone)
        try:
            assert again.result(20) == data[:10]
        finally:
            gone.cancel()


def test_what_comes_from_the_disk_is_not_kept_in_memory_twice(tmp_path: Path) -> None:
    data = random.Random(50).randbytes(1 << 20)
    (tmp_path / "blob").write_bytes(data)
    opened = OpenBlob(os.open(tmp_path / "blob", os.O_RDONLY))
    os.fsync(opened.fd)
    buffer = memoryview(bytearray(4096))

    def is_in_memory() -> bool:
        try:
            return opened.part_now(0, buffer) > 0
        except BlockingIOError:
            # Asking may have had the kernel fetch it.
            os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return False

    os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if is_in_memory():
        pytest.skip("this file system keeps in memory what it is asked to drop")
    assert opened.part(0, len(data)) == data
    assert not is_in_memory()
