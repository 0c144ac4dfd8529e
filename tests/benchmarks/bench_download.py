"""Job inputs into an empty session directory, from empty caches, against one S3 server.

`deadline` is the worker agent's own script by its own account, without Python's start and imports;
`deadline-process` is that script's whole process. s5cmd and rclone copy the same objects, without
placing or verifying anything. `propmaster` is `session start` by its own account, and
`propmaster-process` its whole process: read the manifest, fetch, verify, put in place, fill the
blob cache.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks import datasets
from tests.benchmarks.farm import BUCKET, ROUNDS, Farm, deadline_seconds, open_farm, seconds_of
from tests.benchmarks.rounds import interleave, lines
from tests.servers.deadline_peers import Submission, SyncJob, new_job_id
from tests.servers.worker_session import Started


def run() -> Iterator[dict[str, object]]:
    """Yield the results for small and for large files."""
    with open_farm() as farm:
        small = _measure(farm, "small", datasets.make_small)
        yield from lines(
            "download 5,000 x 16 KiB",
            small,
            reference="deadline",
            files=datasets.SMALL_FILES,
            megabytes=datasets.SMALL_FILES * datasets.SMALL_BYTES / 1e6,
        )
        large = _measure(farm, "large", datasets.make_large)
        yield from lines(
            "download 4 x 256 MiB",
            large,
            reference="deadline",
            megabytes=datasets.LARGE_FILES * datasets.LARGE_BYTES / 1e6,
        )


def _measure(farm: Farm, name: str, make: Callable[[Path], None]) -> dict[str, list[float]]:
    submission = farm.submit(farm.dataset(name, make))
    data = f"{BUCKET}/{submission.job_attachment_settings['rootPrefix']}/Data"
    turns = [
        functools.partial(_deadline, farm, submission),
        functools.partial(_s5cmd, farm, data),
        functools.partial(_rclone, farm, data),
        functools.partial(_propmaster, farm, submission),
    ]
    return interleave(turns, rounds=ROUNDS)


def _deadline(farm: Farm, submission: Submission, _round: int) -> dict[str, float]:
    directory = farm.fresh("session")
    worked = farm.peers.work(
        submission, new_job_id(), session_directory=directory, actions=[SyncJob()]
    )
    farm.remove(directory)
    return deadline_seconds(worked.actions[0])


def _s5cmd(farm: Farm, data: str, _round: int) -> dict[str, float]:
    directory = farm.fresh("s5cmd")
    seconds = seconds_of(lambda: farm.s5cmd(f"s3://{data}/*", f"{directory}/"))
    farm.remove(directory)
    return {"s5cmd": seconds}


def _rclone(farm: Farm, data: str, _round: int) -> dict[str, float]:
    directory = farm.fresh("rclone")
    seconds = seconds_of(lambda: farm.rclone(f"store:{data}", str(directory)))
    farm.remove(directory)
    return {"rclone": seconds}


def _propmaster(farm: Farm, submission: Submission, _round: int) -> dict[str, float]:
    host = farm.new_host()
    session = farm.session(host, submission)
    started: list[Started] = []
    seconds = seconds_of(lambda: started.append(session.start()))
    farm.discard(session, host)
    return {"propmaster": started[0].seconds, "propmaster-process": seconds}
