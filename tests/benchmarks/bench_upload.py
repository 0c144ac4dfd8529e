"""A task's 5,000 new files of 16 KiB into the store, which has none of them.

Every turn uploads below a root prefix of its own, so that all content is new to it. `deadline` and
`deadline-process` are the worker agent's upload script, without and with Python's start and
imports; s5cmd and rclone copy the files to keys of their own; `propmaster` is the whole process of
`session finish-task`: find what is new, hash, ask what the store lacks, upload, write the manifest.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import datasets
from tests.benchmarks.farm import BUCKET, ROUNDS, Farm, deadline_seconds, open_farm, seconds_of
from tests.benchmarks.rounds import interleave, lines
from tests.servers.deadline_peers import Submission, SyncJob, new_job_id

RENDER = 'mkdir -p "$ROOT_0"; cp -r "$SOURCE" "$ROOT_0/renders"'


def run() -> Iterator[dict[str, object]]:
    """Yield the results."""
    with open_farm() as farm:
        source = farm.dataset("small", datasets.make_small)
        root = farm.fresh("show")
        root.mkdir()
        submission = farm.submit(root, output_directories=("renders",))
        turns = [
            functools.partial(_deadline, farm, submission, source),
            functools.partial(_s5cmd, farm, source),
            functools.partial(_rclone, farm, source),
            functools.partial(_propmaster, farm, submission, source),
        ]
        yield from lines(
            "upload 5,000 x 16 KiB",
            interleave(turns, rounds=ROUNDS),
            reference="deadline",
            files=datasets.SMALL_FILES,
            megabytes=datasets.SMALL_FILES * datasets.SMALL_BYTES / 1e6,
        )


def _deadline(farm: Farm, submission: Submission, source: Path, number: int) -> dict[str, float]:
    directory = farm.fresh("session")
    worked = farm.peers.work(
        submission.under_prefix(f"deadline-{number}"),
        new_job_id(),
        session_directory=directory,
        actions=[SyncJob(), farm.task(RENDER, SOURCE=source)],
    )
    farm.remove(directory)
    return deadline_seconds(worked.actions[1])


def _s5cmd(farm: Farm, source: Path, number: int) -> dict[str, float]:
    key = f"s3://{BUCKET}/s5cmd-{number}/"
    return {"s5cmd": seconds_of(lambda: farm.s5cmd(f"{source}/", key))}


def _rclone(farm: Farm, source: Path, number: int) -> dict[str, float]:
    key = f"store:{BUCKET}/rclone-{number}"
    return {"rclone": seconds_of(lambda: farm.rclone(str(source), key))}


def _propmaster(farm: Farm, submission: Submission, source: Path, number: int) -> dict[str, float]:
    host = farm.new_host()
    session = farm.session(host, submission.under_prefix(f"propmaster-{number}"))
    task = farm.task(RENDER, SOURCE=source)
    session.start()
    session.run_command(task)
    seconds = seconds_of(lambda: session.finish_task(task))
    farm.discard(session, host)
    return {"propmaster": seconds}
