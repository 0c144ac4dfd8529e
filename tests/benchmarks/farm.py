"""What a benchmark works on: one S3 server, a scratch directory, and every contender's command."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent_plugin.cli.demo_store import DemoStore
from tests.servers.deadline_peers import ActionResult, DeadlinePeers, Submission, TaskRun
from tests.servers.worker_session import Propmaster, WorkerSession

BUCKET = "benchmarks"
ROUNDS = 3
STEP = "step-" + "1" * 32

# Chosen, not tuned: rclone's own default is 4, s5cmd's is 256 workers, and s5cmd runs with its own.
RCLONE_TRANSFERS = 32

FEW_FILES = 500

_BIN = Path(sys.executable).parent
_INSIDE = re.compile(r"^Finished (?:downloading )?after ([0-9.]+) seconds$", re.MULTILINE)


class Farm:
    """One S3 server and everything that is compared against it.

    Args:
        scratch: An empty directory; sources, sessions, caches and the server's data go there.
        store: The server, running.
    """

    def __init__(self, scratch: Path, store: DemoStore) -> None:
        self._scratch = scratch
        self._numbers = itertools.count()
        self._environment = store.environment
        store.create_bucket(BUCKET)
        self.peers = DeadlinePeers(aws=store.environment, home=scratch / "home-of-peers")

    def fresh(self, name: str) -> Path:
        """Return a path that nothing was ever at."""
        return self._scratch / f"{name}-{next(self._numbers)}"

    def dataset(self, name: str, make: Callable[[Path], None]) -> Path:
        """Make a dataset once, and return its directory."""
        root = self._scratch / "datasets" / name
        if not root.exists():
            make(root)
        return root

    def submit(self, root: Path, *, output_directories: tuple[str, ...] = ()) -> Submission:
        """Submit with the real client, below a root prefix of the directory's name."""
        return self.peers.submit(
            root,
            bucket=BUCKET,
            root_prefix=root.name,
            output_directories=output_directories,
        )

    def new_host(self) -> Propmaster:
        """Return the command on a host with empty caches."""
        return Propmaster(aws=self._environment, home=self.fresh("home"))

    def session(self, host: Propmaster, submission: Submission) -> WorkerSession:
        """Return a session of `submission`, not yet started."""
        return WorkerSession(
            host,
            directory=self.fresh("session"),
            submission=submission,
            job_id=f"job-{next(self._numbers):032x}",
        )

    def discard(self, session: WorkerSession, host: Propmaster | None = None) -> None:
        """End a session and remove what it left, and with it the host's caches if given."""
        session.end(keep_files=True)
        self.remove(session.directory)
        if host is not None:
            self.remove(host.home)

    def remove(self, directory: Path) -> None:
        """Remove a tree of few files; others stay until the end.

        Whenever ext4 makes a file it looks past each inode that was freed in the last five minutes
        (fs/ext4/ialloc.c, recently_deleted), so whoever ran after thousands of files were removed
        would pay for that: here a file then took 1 ms instead of 0.1 ms.
        """
        if sum(len(names) for _, _, names in os.walk(directory)) < FEW_FILES:
            shutil.rmtree(directory)

    def task(self, command: str, **environment: Path) -> TaskRun:
        """Return a task that runs `command`, with ids that no other has."""
        number = next(self._numbers)
        return TaskRun(
            command=command,
            step_id=STEP,
            task_id=f"task-{'1' * 32}-{number}",
            session_action_id=f"sessionaction-{'3' * 32}-{number}",
            started_at=1_719_848_200.25 + number,
            environment={name: str(path) for name, path in environment.items()},
        )

    def s5cmd(self, source: str, destination: str) -> None:
        """Copy with s5cmd; the S3 side is `s3://…`."""
        endpoint = self._environment["AWS_ENDPOINT_URL_S3"]
        argv = ["--log", "error", "--endpoint-url", endpoint, "cp", source, destination]
        subprocess.run([_BIN / "s5cmd", *argv], env=self._environment, check=True)

    def rclone(self, source: str, destination: str) -> None:
        """Copy with rclone; the S3 side is `store:<bucket>/<prefix>`."""
        aws = self._environment
        remote = {
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_CONFIG_STORE_TYPE": "s3",
            "RCLONE_CONFIG_STORE_PROVIDER": "SeaweedFS",
            "RCLONE_CONFIG_STORE_ACCESS_KEY_ID": aws["AWS_ACCESS_KEY_ID"],
            "RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY": aws["AWS_SECRET_ACCESS_KEY"],
            "RCLONE_CONFIG_STORE_REGION": aws["AWS_DEFAULT_REGION"],
            "RCLONE_CONFIG_STORE_ENDPOINT": aws["AWS_ENDPOINT_URL_S3"],
            "RCLONE_S3_NO_CHECK_BUCKET": "true",
        }
        transfers = ["--transfers", str(RCLONE_TRANSFERS)]
        argv = [str(_BIN / "rclone"), "copy", *transfers, source, destination]
        subprocess.run(argv, env={"PATH": os.defpath, **remote}, check=True)


@contextlib.contextmanager
def open_farm() -> Iterator[Farm]:
    """Start the S3 server in a scratch directory (TMPDIR decides where); all is gone afterwards."""
    scratch = Path(tempfile.mkdtemp(prefix="propmaster-bench-"))
    try:
        with DemoStore(scratch / "s3") as store:
            yield Farm(scratch, store)
    finally:
        shutil.rmtree(scratch)


def seconds_of(step: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def deadline_seconds(result: ActionResult) -> dict[str, float]:
    """Return what the agent's script says it took, imports excluded, and its whole process.

    Raises:
        ValueError: The script did not say.
    """
    found = _INSIDE.search(result.output)
    if found is None:
        raise ValueError(f"the script does not say what it took: {result.output}")
    return {"deadline": float(found[1]), "deadline-process": result.seconds}
