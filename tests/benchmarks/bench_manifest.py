"""A manifest of a million files: decoded and checked, and encoded.

Each bench runs in a process of its own, which reads the document from a file, measures, and says
the largest memory it ever had: interpreter, document, entries and all. Rounds follow each other in
that process, warm, with nothing kept from one to the next.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from agent_plugin.content import manifest as manifests
from agent_plugin.content.manifest import FileEntry, Manifest

ENTRIES = 1_000_000
ROUNDS = 5
CHILD_SECONDS = 300
# A directory of the cache of one shot, with so many frames.
FRAMES = 1000
SHOTS_IN_SEQUENCE = 200


def run() -> Iterator[dict[str, object]]:
    """Yield the results."""
    with tempfile.TemporaryDirectory(prefix="bench-manifest-") as directory:
        file = Path(directory, "million.manifest")
        make_million(file)
        for bench in MEASURED:
            yield json.loads(_child(bench, file))


def make_million(file: Path) -> None:
    """Write a manifest of a million files, in a process of its own."""
    _child("make", file)


def _child(task: str, file: Path) -> bytes:
    # The peak of a process never falls, so each bench needs a fresh one.
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_manifest", task, str(file)],
        stdout=subprocess.PIPE,
        timeout=CHILD_SECONDS,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout


def _make(file: Path) -> None:
    file.write_bytes(manifests.encode(Manifest.of(map(_entry, range(ENTRIES)))))


def _entry(number: int) -> FileEntry:
    shot, frame = divmod(number, FRAMES)
    sequence, shot = divmod(shot, SHOTS_IN_SEQUENCE)
    path = f"shots/seq{sequence + 1:02}/sh{shot * 10:04}/cache/geo.{frame:04}.abc"
    hash_hex = xxhash.xxh3_128_hexdigest(path.encode())
    return FileEntry(hash_hex, 1_700_000_000_000_000 + number * 1007, path, number + 1)


def _decode(data: bytes) -> Iterator[float]:
    for _ in range(ROUNDS):
        started = time.perf_counter()
        manifest = manifests.decode(data, source="the benchmark")
        yield time.perf_counter() - started
        del manifest


def _encode(data: bytes) -> Iterator[float]:
    manifest = manifests.decode(data, source="the benchmark")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        encoded = manifests.encode(manifest)
        yield time.perf_counter() - started
        if encoded != data:
            raise RuntimeError("the canonical encoding did not come back")
        del encoded


MEASURED: dict[str, Callable[[bytes], Iterator[float]]] = {
    "manifest.decode": _decode,
    "manifest.encode": _encode,
}


def _measure(bench: str, file: Path) -> dict[str, object]:
    data = file.read_bytes()
    seconds = list(MEASURED[bench](data))
    return {
        "bench": bench,
        "entries": ENTRIES,
        "document_mib": round(len(data) / 2**20, 1),
        "rounds": len(seconds),
        "median_s": round(statistics.median(seconds), 3),
        "spread_s": round(max(seconds) - min(seconds), 3),
        "peak_rss_mib": round(_peak_kib() / 1024, 1),
    }


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def main(arguments: list[str]) -> None:
    """Print all results, one JSON line each; or, as a child, do one task."""
    match arguments:
        case []:
            for result in run():
                print(json.dumps(result), flush=True)
        case ["make", file]:
            _make(Path(file))
        case [bench, file]:
            print(json.dumps(_measure(bench, Path(file))))
        case _:
            sys.exit("usage: python -m tests.benchmarks.bench_manifest")


if __name__ == "__main__":
    main(sys.argv[1:])
