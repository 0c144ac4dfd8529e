"""What a host gains after the first session: the blob cache, and a finish-task that stays short.

The second session of a job finds every blob in the host's cache; `cp -r` of the same tree is the
floor, page cache warm for both. `finish-task` with one new file is measured in a job of 100,000
inputs, as whole processes; the agent's script gets its manifests written without downloading.
"""

import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks import datasets
from tests.benchmarks.farm import ROUNDS, Farm, deadline_seconds, open_farm, seconds_of
from tests.benchmarks.rounds import interleave, lines
from tests.servers.deadline_peers import Submission, SyncJob, new_job_id
from tests.servers.worker_session import Propmaster, WorkerSession

ONE_FILE = 'mkdir -p "$ROOT_0/renders"; head -c 16384 /dev/urandom > "$ROOT_0/renders/{number}.exr"'


def run() -> Iterator[dict[str, object]]:
    """Yield the results for sessions from the cache, then for finish-task."""
    with open_farm() as farm:
        small = _from_cache(farm, "small", datasets.make_small)
        yield from lines(
            "second session, 5,000 x 16 KiB cached",
            small,
            reference="cp",
            files=datasets.SMALL_FILES,
        )
        large = _from_cache(farm, "large", datasets.make_large)
        yield from lines(
            "second session, 4 x 256 MiB cached",
            large,
            reference="cp",
            megabytes=datasets.LARGE_FILES * datasets.LARGE_BYTES / 1e6,
        )
        yield from lines(
            "finish-task, 1 new file, 100,000 inputs", _finish_task(farm), reference="deadline"
        )


def _from_cache(farm: Farm, name: str, make: Callable[[Path], None]) -> dict[str, list[float]]:
    source = farm.dataset(name, make)
    submission = farm.submit(source)
    host = farm.new_host()
    first = farm.session(host, submission)
    first.start()
    turns = [
        functools.partial(_copy, farm, source),
        functools.partial(_start, farm, host, submission),
    ]
    measured = interleave(turns, rounds=ROUNDS)
    farm.discard(first, host)
    return measured


def _copy(farm: Farm, source: Path, _round: int) -> dict[str, float]:
    directory = farm.fresh("copy")
    seconds = seconds_of(lambda: subprocess.run(["/bin/cp", "-r", source, directory], check=True))
    farm.remove(directory)
    return {"cp": seconds}


def _start(farm: Farm, host: Propmaster, submission: Submission, _round: int) -> dict[str, float]:
    session = farm.session(host, submission)
    seconds = seconds_of(session.start)
    farm.discard(session)
    return {"propmaster": seconds}


def _finish_task(farm: Farm) -> dict[str, list[float]]:
    root = farm.dataset("many", datasets.make_many)
    submission = farm.submit(root, output_directories=("renders",))
    host = farm.new_host()
    session = farm.session(host, submission)
    session.start()
    turns = [
        functools.partial(_finish_by_script, farm, submission),
        functools.partial(_finish, farm, session),
    ]
    measured = interleave(turns, rounds=ROUNDS)
    farm.discard(session, host)
    return measured


def _finish_by_script(farm: Farm, submission: Submission, number: int) -> dict[str, float]:
    directory = farm.fresh("session")
    worked = farm.peers.work(
        submission,
        new_job_id(),
        session_directory=directory,
        actions=[SyncJob(download=False), farm.task(ONE_FILE.format(number=number))],
    )
    farm.remove(directory)
    return deadline_seconds(worked.actions[1])


def _finish(farm: Farm, session: WorkerSession, number: int) -> dict[str, float]:
    task = farm.task(ONE_FILE.format(number=number))
    session.run_command(task)
    return {"propmaster": seconds_of(lambda: session.finish_task(task))}
