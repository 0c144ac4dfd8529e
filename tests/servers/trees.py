"""Directory trees for tests: deterministic content, and what two trees must have in common."""

import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_CHUNK_BYTES = 1024 * 1024


class FileFacts(NamedTuple):
    """What a manifest keeps of a file, so what must survive a round trip."""

    size: int  # bytes
    mtime_us: int  # microseconds since the epoch
    sha256: str


def write_files(root: Path, files: Mapping[str | bytes, bytes | int], *, mtime_ns: int) -> None:
    """Make files below `root`, with the directories they need.

    Args:
        root: Made when missing.
        files: By relative name (bytes for names that are not UTF-8) the content, or its size in
            bytes; then it is pseudo-random, a function of name and size.
        mtime_ns: Modification time of the first file; each next file's is 1.000001 s later, so
            that no two are equal and all have microseconds.
    """
    for at, (name, content) in enumerate(files.items()):
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write_random(path, content, seed=f"{name!r} {content}")
        moment = mtime_ns + at * 1_000_001_000
        os.utime(path, ns=(moment, moment))


def write_random(path: Path, size: int, *, seed: str) -> None:
    """Write `size` bytes that are a function of `seed`."""
    generator = random.Random(seed)
    with path.open("wb") as file:
        for start in range(0, size, _CHUNK_BYTES):
            file.write(generator.randbytes(min(_CHUNK_BYTES, size - start)))


def files_below(root: Path) -> dict[str, FileFacts]:
    """Return every regular file below `root`, by its relative path with `/`."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            status = path.stat()
            found[path.relative_to(root).as_posix()] = FileFacts(
                size=status.st_size, mtime_us=status.st_mtime_ns // 1000, sha256=content
            )
    return found
