"""VIRTUAL sessions from an S3 server: what a job moves, how long it waits, what its end takes."""

import functools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from agent_plugin.session.mount_control import ask_mount
from agent_plugin.session.mount_request import CachePlace
from agent_plugin.session.mounts import Mounts
from tests.benchmarks.datasets import KIB, MIB
from tests.benchmarks.farm import BUCKET, Farm, seconds_of
from tests.benchmarks.file_client import FileClient, Operation
from tests.benchmarks.rounds import interleave, lines
from tests.servers.deadline_peers import FARM_ID, QUEUE_ID, Submission
from tests.servers.worker_session import Propmaster, WorkerSession

# A scene: many small files, and textures of which a frame needs a part.
SMALL_FILES, LARGE_FILES, LARGE_BYTES = 1500, 8, 96 * MIB
SMALL_BYTES = (4 * KIB, 256 * KIB)
# Of the small files a frame reads every fourth. Of each texture it reads the header, and one level
# of detail, tile by tile.
EVERY = 4
HEADER_BYTES, TILE_BYTES, LEVEL_BYTES = 64 * KIB, 64 * KIB, 2 * MIB
FIRST_FILES = 50

DIFF_ROUNDS = 7
# Ten changes to what the session has: six new files, two changed, one renamed, one removed.
CHANGES = """
cd "$ROOT_0"; mkdir -p renders
for at in 1 2 3 4 5 6; do echo {number} $at > renders/{number}-$at.exr; done
for at in 1 2; do echo {number} >> 0000/00000$at.bin; done
mv 0000/0000{renamed}.bin renders/{number}.bin; rm 0000/0000{removed}.bin
"""
DIFF_DIRECTORIES = ("renders", "0000")


def lazy_lines(farm: Farm, client: FileClient) -> Iterator[dict[str, object]]:
    """Yield what a job that reads a part of its inputs moves, and what its first reads take."""
    source = farm.dataset("scene", _make_scene)
    host = farm.new_host()
    session = farm.session(host, _submit(host, source))
    root = Path(session.start(file_system="VIRTUAL").roots[0].local_root)
    files = {path.relative_to(source): path.stat().st_size for path in source.rglob("*.*")}
    small = sorted(path for path in files if path.suffix == ".bin")
    large = sorted(path for path in files if path.suffix == ".tx")

    used = sum(_read_level(root / path) for path in large)
    used += sum(len((root / path).read_bytes()) for path in small[::EVERY])
    moved = _bytes_fetched(host, root)
    total = sum(files.values())
    yield {
        "bench": "mount: a job that reads a part of its inputs",
        "peer": "propmaster",
        "tree_bytes": total,
        "read_percent": round(100 * used / total, 2),
        "moved_percent": round(100 * moved / total, 2),
    }
    names = farm.fresh("names")
    chosen = small[1::EVERY][:FIRST_FILES]
    names.write_text("".join(f"{path}\n" for path in chosen))
    moved = sum(min(files[path], 4 * KIB) for path in chosen)
    seconds = client.seconds(Operation("first"), root, names, moved=moved)
    yield {
        "bench": "mount: first 4 KiB of a small file, from the store",
        "peer": "propmaster",
        "rounds": FIRST_FILES,
        "mean_s": round(seconds / FIRST_FILES, 5),
    }
    farm.discard(session, host)


def diff_lines(farm: Farm, many: Path) -> Iterator[dict[str, object]]:
    """Yield what finish-task takes after ten changes, by the number of files in the session."""
    host = farm.new_host()
    sessions = {}
    for name, source in (
        ("100 files", farm.dataset("few", lambda root: _copy_first(many, root))),
        ("100,000 files", many),
    ):
        submission = _submit(host, source, *DIFF_DIRECTORIES)
        sessions[name] = farm.session(host, submission)
        sessions[name].start(file_system="VIRTUAL")
    turns = [functools.partial(_finish, farm, name, at) for name, at in sessions.items()]
    measured = interleave(turns, rounds=DIFF_ROUNDS)
    yield from lines(
        "mount: finish-task, 10 changes in a VIRTUAL session", measured, reference="100 files"
    )
    for session in sessions.values():
        farm.discard(session)


def _finish(farm: Farm, name: str, session: WorkerSession, number: int) -> dict[str, float]:
    command = CHANGES.format(number=number, renamed=number + 10, removed=number + 30)
    task = farm.task(command)
    session.run_command(task)
    return {name: seconds_of(lambda: session.finish_task(task))}


def _submit(host: Propmaster, source: Path, *output_directories: str) -> Submission:
    return host.submit(
        source,
        store=f"s3://{BUCKET}/{source.name}",
        farm_id=FARM_ID,
        queue_id=QUEUE_ID,
        output_directories=output_directories,
    )


def _bytes_fetched(host: Propmaster, root: Path) -> int:
    place = CachePlace(host.home / "cache", max_bytes=0, min_free_bytes=0, shared=False)
    mounts = Mounts(host.home / "state", place)
    status = json.loads(ask_mount(mounts.control_of(root), {"ask": "status"}))
    fetched: int = status["counts"]["bytes_fetched"]
    return fetched


def _make_scene(root: Path) -> None:
    generator = random.Random("scene")
    for at in range(SMALL_FILES):
        path = root / f"geo/{at // 100:02}/{at:04}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generator.randbytes(generator.randint(*SMALL_BYTES)))
    for at in range(LARGE_FILES):
        with (root / f"{at}.tx").open("wb") as file:
            for _ in range(LARGE_BYTES // MIB):
                file.write(generator.randbytes(MIB))


def _copy_first(many: Path, root: Path) -> None:
    shutil.copytree(many / "0000", root / "0000")


def _read_level(path: Path) -> int:
    """Read the header of a texture and the tiles of one level of detail; return the bytes."""
    level = LARGE_BYTES * 3 // 4
    tiles = [*range(level, level + LEVEL_BYTES, TILE_BYTES)]
    random.Random(path.name).shuffle(tiles)
    with path.open("rb", buffering=0) as file:
        used = len(file.read(HEADER_BYTES))
        for tile in tiles:
            file.seek(tile)
            used += len(file.read(TILE_BYTES))
    return used
