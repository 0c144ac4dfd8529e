"""The trees that are measured: the same bytes on every machine, made from a seed.

Random content, so that nothing in the way can gain by compressing it or by writing holes.
"""

import random
from pathlib import Path

KIB = 1024
MIB = 1024 * KIB

SMALL_FILES, SMALL_BYTES = 5000, 16 * KIB
LARGE_FILES, LARGE_BYTES = 4, 256 * MIB
# Inputs of a big job, of few contents, so that bringing them in is not what takes the time.
MANY_FILES, MANY_CONTENTS, MANY_BYTES = 100_000, 100, 64
FRAME_BYTES = 4 * KIB

_FILES_IN_DIRECTORY = 100


def make_small(root: Path) -> None:
    """Make 5,000 files of 16 KiB below `root`, 100 to a directory."""
    generator = random.Random("small")
    for at in range(SMALL_FILES):
        _path(root, at).write_bytes(generator.randbytes(SMALL_BYTES))


def make_large(root: Path) -> None:
    """Make 4 files of 256 MiB below `root`."""
    generator = random.Random("large")
    for at in range(LARGE_FILES):
        with _path(root, at).open("wb") as file:
            for _ in range(LARGE_BYTES // MIB):
                file.write(generator.randbytes(MIB))


def make_many(root: Path) -> None:
    """Make 100,000 files of 64 bytes below `root`, of 100 contents, 100 to a directory."""
    generator = random.Random("many")
    contents = [generator.randbytes(MANY_BYTES) for _ in range(MANY_CONTENTS)]
    for at in range(MANY_FILES):
        _path(root, at).write_bytes(contents[at % MANY_CONTENTS])


def make_frames(root: Path, files: int) -> None:
    """Make files of 4 KiB below `root`, all different, 100 to a directory."""
    generator = random.Random("frames")
    for at in range(files):
        _path(root, at).write_bytes(generator.randbytes(FRAME_BYTES))


def _path(root: Path, at: int) -> Path:
    directory = root / f"{at // _FILES_IN_DIRECTORY:04}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{at:06}.bin"
