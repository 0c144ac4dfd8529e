"""A process of its own that uses a blob cache: `python -m tests.servers.cache_worker MODE DIR …`.

Prints one line when it is ready, and then does what its mode says until it is done or killed.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest, hash_fd
from agent_plugin.content.store import Cancellation

STORE_URL: Final = "s3://bucket/prefix"
ROOT: Final = Path(__file__).resolve().parents[2]
# Nobody runs this long: the tests kill their workers, and a forgotten one ends by itself.
LIFETIME_SECONDS: Final = 60


def blob(seed: int, size: int = 16384) -> tuple[Digest, bytes]:
    """Return the blob of a number, the same in every process."""
    data = random.Random(seed).randbytes(size)
    return Digest.of(data), data


def open_cache(directory: Path, *, max_bytes: int = 1 << 40) -> BlobCache:
    """Return the cache that workers and tests share."""
    return BlobCache.open(directory, store_url=STORE_URL, max_bytes=max_bytes, min_free_bytes=0)


def start(*arguments: str | Path | int) -> subprocess.Popen[str]:
    """Start a worker and return it when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.cache_worker", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _fetch(cache: BlobCache, log: str) -> None:
    """Get blob 1 as the transfer engine does; each real fetch is a line in the log."""
    digest, data = blob(1)
    sys.stdin.readline()
    for _ in range(100):
        if cache.contains(digest):
            return
        claim = cache.claim(digest)
        if claim is None:
            cache.wait_for(digest, 10, Cancellation())
            continue
        with claim:
            if cache.contains(digest):
                return
            with Path(log).open("a", encoding="ascii") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.3)  # as long as a fetch takes; the others come in meanwhile
            cache.add(digest, data)
            return
    raise SystemExit("no blob after 100 tries")


def _hold(cache: BlobCache, kind: str) -> None:
    """Hold a claim or a lease on blob 1, or a staged file, until killed."""
    digest, _data = blob(1)
    if kind == "claim":
        held: object = cache.claim(digest)
    elif kind == "lease":
        held = cache.lease("worker", [digest])
    else:
        held = cache.staging(digest.size)
    assert held is not None
    sys.stdout.write("held\n")
    sys.stdout.flush()
    time.sleep(LIFETIME_SECONDS)


def _add(cache: BlobCache, first: str) -> None:
    """Add blobs until killed: small ones whole, each fourth through a staged file."""
    for number in range(int(first), int(first) + 100_000):
        digest, data = blob(number)
        if number % 4:
            cache.add(digest, data)
            continue
        with cache.staging(digest.size) as staged:
            for offset in range(0, digest.size, 4096):
                os.write(staged.fd, data[offset : offset + 4096])
            staged.publish(digest)


def _read(cache: BlobCache, count: str) -> None:
    """Read blobs 0 to count - 1 over and over, and fetch what is gone, until stdin closes."""
    blobs = [blob(number) for number in range(int(count))]
    os.set_blocking(0, False)
    reads = 0
    while os.getppid() != 1:
        for digest, data in blobs:
            fd = cache.open_blob(digest)
            if fd is None:
                cache.add(digest, data)
                continue
            assert hash_fd(fd) == digest
            os.close(fd)
            reads += 1
        try:
            if os.read(0, 1) == b"":
                break
        except BlockingIOError:
            continue
    sys.stdout.write(f"{reads}\n")


def main() -> None:
    """Run one mode."""
    mode, directory, *arguments = sys.argv[1:]
    with open_cache(Path(directory)) as cache:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        {"fetch": _fetch, "hold": _hold, "add": _add, "read": _read}[mode](cache, *arguments)


if __name__ == "__main__":
    main()
