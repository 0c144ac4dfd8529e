"""Many readers at once: what hangs for some is no matter to the others, and nothing comes twice."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from tests.mount.conftest import Mounter, by_each_transport
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import write_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

HUNG = 100
# Each thread reads one file; the process is killed.
READ_EACH = """
import sys, threading
for path in sys.argv[1:]:
    threading.Thread(target=lambda path=path: open(path, "rb").read()).start()
"""
# Reads a file in pieces of 1 MiB, in order or not, and tells its hash.
READ_ALL = """
import os, random, sys, xxhash
path, seed = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDONLY)
offsets = list(range(0, os.fstat(fd).st_size, 1 << 20))
if seed:
    random.Random(seed).shuffle(offsets)
    for offset in offsets:
        os.pread(fd, 1 << 20, offset)
    offsets.sort()
digest = xxhash.xxh3_128()
for offset in offsets:
    digest.update(os.pread(fd, 1 << 20, offset))
print(digest.hexdigest())
"""


@pytest.fixture
def slow(
    tmp_path: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, transport: str
) -> Iterator[Mounter]:
    """Mounts from the S3 server, behind the proxy."""
    environment = s3.environment_at(fault_proxy.url)
    url = f"s3://{s3.bucket}/{s3_prefix}"
    mounter = Mounter(tmp_path, url, environment=environment, transport=transport)
    yield mounter
    fault_proxy.refuse(0)
    fault_proxy.clear()
    mounter.close()


@by_each_transport
def test_what_is_cached_is_read_while_a_hundred_reads_hang(
    slow: Mounter, s3: S3Server, fault_proxy: FaultProxy
) -> None:
    """Seen to fail with 64 threads that wait, and where those that fetch look into the cache.

    By fusepy, where no thread was made for one that waits, and with 64 requests at once.
    """
    source = slow.home / "source"
    files: dict[str | bytes, bytes | int] = {
        f"cached/{at}": b"cached %d" % at * 9999 for at in range(10)
    }
    write_files(source, files | {f"hung/{at}": b"hung %d" % at * 999 for at in range(HUNG)},
                mtime_ns=0)  # fmt: skip
    manifest = slow.stored(source, past_the_proxy=s3)
    first = slow.mount(manifest, name="first")
    for path, data in files.items():
        assert (first / os.fsdecode(path)).read_bytes() == data
    assert slow.host.mounts.end(first)
    at = slow.mount(manifest)
    fault_proxy.inject(Fault.STALL)
    hung = [os.fspath(at / f"hung/{number}") for number in range(HUNG)]
    reader = subprocess.Popen([sys.executable, "-c", READ_EACH, *hung])
    try:
        until(lambda: slow.status(at)["counts"]["reads_waited"] >= HUNG)
        cached = [at / os.fsdecode(path) for path in files]
        done = subprocess.run(["cat", *cached], capture_output=True, timeout=30, check=False)
        assert done.stdout == b"".join(data for data in files.values() if isinstance(data, bytes))
        assert reader.poll() is None, "those go on waiting"
    finally:
        reader.send_signal(signal.SIGKILL)
        reader.wait(30)


@pytest.mark.slow
def test_eight_processes_that_read_a_gibibyte_fetch_it_once_and_memory_is_bounded(
    slow: Mounter, s3: S3Server, fault_proxy: FaultProxy
) -> None:
    source = slow.home / "source"
    source.mkdir()
    block = os.urandom(1 << 20)
    whole = xxhash.xxh3_128()
    with (source / "big.abc").open("wb") as file:
        for number in range(1024):
            piece = number.to_bytes(8, "little") + block[8:]
            file.write(piece)
            whole.update(piece)
    manifest = slow.stored(source, past_the_proxy=s3)
    [entry] = manifest.entries
    (source / "big.abc").unlink()
    at = slow.mount(manifest)
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READ_ALL, at / "big.abc", str(seed // 2)],
            stdout=subprocess.PIPE,
        )
        for seed in range(8)
    ]
    hashes = {reader.communicate(timeout=280)[0].strip() for reader in readers}

    assert hashes == {whole.hexdigest().encode()}
    ranges = Counter(
        request.headers.get("range")
        for request in fault_proxy.requests
        if request.method == "GET" and entry.hash in request.key
    )
    assert set(ranges.values()) == {1}, "each range once"
    assert slow.status(at)["counts"]["bytes_fetched"] == entry.size
    server = Path(f"/proc/{slow.status(at)['pid']}/status").read_text()
    [peak] = [int(line.split()[1]) for line in server.splitlines() if line.startswith("VmHWM")]
    assert peak < 400 * 1024, f"{peak} KiB"
