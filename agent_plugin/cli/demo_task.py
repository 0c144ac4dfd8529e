"""The task of `propmaster demo`, in the place of a render: reads every input, writes outputs.

    python -m agent_plugin.cli.demo_task INPUT OUTPUT [EVERY]

With EVERY it reads one file in so many, as a task that needs a part of its job's inputs.

It writes a table of all files, the words that are used most, and a picture. What it writes depends
on the inputs alone, so that a second run leaves the same bytes.
"""

import math
import os
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

_TOP_WORDS: Final = 20
_BLOCK_PIXELS: Final = 8
_BRIGHTNESS_PER_DOUBLING: Final = 10
_WHITE: Final = 255


def main(inputs: Path, outputs: Path, every: int = 1) -> None:
    """Read one file in `every` below `inputs` but those below `outputs`, and write the outputs."""
    outputs.mkdir(parents=True, exist_ok=True)
    words: Counter[bytes] = Counter()
    rows: list[bytes] = [b"lines,words,bytes,path"]
    sizes: list[int] = []
    for path in islice(_files(inputs, outputs), 0, None, every):
        data = path.read_bytes()
        split = data.split() if b"\0" not in data else []
        words.update(split)
        name = os.fsencode(path.relative_to(inputs))
        rows.append(b"%d,%d,%d,%s" % (data.count(b"\n"), len(split), len(data), name))
        sizes.append(len(data))
    (outputs / "files.csv").write_bytes(b"\n".join(rows) + b"\n")
    common = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:_TOP_WORDS]
    lines = [b"%8d %s\n" % (count, word[:80]) for word, count in common]
    (outputs / "words.txt").write_bytes(b"".join(lines))
    (outputs / "sizes.png").write_bytes(_picture(sizes))
    print(f"read {len(sizes)} files, {sum(sizes)} bytes; wrote files.csv, words.txt, sizes.png")


def _files(inputs: Path, outputs: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(inputs):
        folders[:] = sorted(name for name in folders if Path(folder, name) != outputs)
        yield from (path for name in sorted(names) if (path := Path(folder, name)).is_file())


def _picture(sizes: list[int]) -> bytes:
    """Return a square grey PNG, one block of pixels a file, brighter for larger files."""
    side = max(1, math.isqrt(max(0, len(sizes) - 1)) + 1)
    shades = bytes(
        min(_WHITE, _BRIGHTNESS_PER_DOUBLING * size.bit_length()) for size in sizes
    ).ljust(side * side, b"\0")
    rows = []
    for start in range(0, side * side, side):
        row = b"".join(bytes([shade]) * _BLOCK_PIXELS for shade in shades[start : start + side])
        # Each row begins with its filter, 0 for none: https://www.w3.org/TR/png-3/#9Filters
        rows.append((b"\0" + row) * _BLOCK_PIXELS)
    pixels = side * _BLOCK_PIXELS
    header = struct.pack(">IIBBBBB", pixels, pixels, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(b"".join(rows), 9)),
            (b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
