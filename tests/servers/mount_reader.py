"""Who reads from a mount, as a process of its own, so that no test can be held up by a sick one.

`python mount_reader.py ROOT THREADS`, with relative paths as JSON on stdin: reads each file whole,
in order, and prints what it saw of it. Needs the standard library alone, so it starts in no time.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

_PIECE_BYTES = 1 << 20


class Seen(NamedTuple):
    """What a reader saw of a file.

    Attributes:
        size: Bytes that came, before the error if there was one.
        sha256: Of those bytes.
        errno: 0 when all went well.
        seconds: From open to close.
    """

    size: int
    sha256: str
    errno: int
    seconds: float


def read_all(
    root: Path, paths: Sequence[str], *, threads: int = 4, hang_seconds: float = 60.0
) -> dict[str, Seen]:
    """Return what a process of its own saw of each file below a root.

    Raises:
        AssertionError: It did not end within `hang_seconds`; it was killed.
    """
    reader = subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, root, str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with reader:
        try:
            told, _ = reader.communicate(json.dumps(list(paths)).encode(), hang_seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"reading below {root} hangs") from error
        finally:
            reader.kill()
    assert reader.returncode == 0
    return {path: Seen(*seen) for path, seen in json.loads(told).items()}


def _read(path: str) -> Seen:
    digest, size, number = hashlib.sha256(), 0, 0
    begun = time.monotonic()
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            while piece := os.read(fd, _PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
        finally:
            os.close(fd)
    except OSError as error:
        number = error.errno or -1
    return Seen(size, digest.hexdigest(), number, time.monotonic() - begun)


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    with ThreadPoolExecutor(int(sys.argv[2])) as pool:
        found = pool.map(_read, [os.path.join(sys.argv[1], path) for path in wanted])  # noqa: PTH118 - no import of pathlib
        json.dump(dict(zip(wanted, found, strict=True)), sys.stdout)
