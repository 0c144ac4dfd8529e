"""A queue whose tasks leave outputs by real sessions, and an artist's host that syncs them."""

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from agent_plugin.content.errors import PropmasterError
from agent_plugin.session.path_rules import JobRules, PathRules
from agent_plugin.session.state import FinishResult
from agent_plugin.session.sync import SyncedJob, SyncRequest, SyncResult, sync
from agent_plugin.session.sync_checkpoint import VERSION, Header, open_checkpoint
from agent_plugin.transfer.conflicts import Conflict
from tests.servers.hooks import FARM, QUEUE, Host, action, job_with_outputs
from tests.servers.trees import write_files

MTIME_NS = 1_650_000_000_123_456_000


def job_id(number: int) -> str:
    """Return the id of a job."""
    return f"job-{number:032x}"


@dataclass(frozen=True)
class Synced:
    """What a sync has returned."""

    result: SyncResult
    failures: list[PropmasterError]

    @property
    def files(self) -> int:
        return self.result.files

    @property
    def jobs(self) -> dict[str, SyncedJob]:
        return {job.job_id: job for job in self.result.jobs}

    def of(self, number: int) -> SyncedJob:
        return self.jobs[job_id(number)]


class RenderQueue:
    """A store with the outputs of a queue.

    Args:
        directory: Everything local is below it.
        store_url: The store.
        environment: AWS variables.

    Attributes:
        worker, artist: Two hosts.
        show: The root of all jobs unless another one is given; a path of the artist's host.
    """

    def __init__(
        self, directory: Path, store_url: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.store_url = store_url
        self.worker = Host(directory / "worker", store_url, environment=environment)
        self.artist = Host(directory / "artist", store_url, environment=environment)
        self.show = directory / "show"

    def render(
        self,
        number: int,
        files: Mapping[str | bytes, bytes | int],
        *,
        task: int | None = 0,
        root: str | None = None,
    ) -> FinishResult:
        """Run a task of a job in a session of its own; `files` are below its root."""
        job = msgspec.structs.replace(
            job_with_outputs(self.store_url, root or str(self.show), "."), job_id=job_id(number)
        )
        session = self.directory / "sessions" / uuid.uuid4().hex
        local = Path(self.worker.start(job, session).roots[0].local_root)
        write_files(local, files, mtime_ns=MTIME_NS)
        run = action(1, task, started_at=time.time())
        finished = self.worker.finish_task(session, run)
        self.worker.end(session)
        return finished

    def sync(
        self,
        *job_ids: str,
        lookback: float = math.inf,
        anew: bool = False,
        conflict: str = "overwrite",
        rules: PathRules | None = None,
        dry_run: bool = False,
    ) -> Synced:
        """Sync to the artist's host, in this process; by default all that there is."""
        request = SyncRequest(
            farm_id=FARM,
            queue_id=QUEUE,
            rules_for=lambda _job_id, _known: JobRules(rules or PathRules(None)),
            job_ids=job_ids,
            conflict=Conflict(conflict),
            dry_run=dry_run,
        )
        since = max(0.0, time.time() - lookback)
        header = Header(VERSION, self.store_url, FARM, QUEUE, "own", since)
        with (
            open_checkpoint(self.checkpoint, header, anew=anew, keep=dry_run) as checkpoint,
            self.artist.services() as context,
        ):
            return Synced(*sync(context, checkpoint, request, self.checkpoint))

    def argv(self, *words: str | Path) -> tuple[str | Path, ...]:
        """Return `outputs sync` with the queue's options, and more words."""
        ids = ("--farm-id", FARM, "--queue-id", QUEUE)
        return ("outputs", "sync", *words, "--store", self.store_url, *ids, "--json")

    def command(self, *words: str | Path, code: int = 0) -> Any:
        """Run the command on the artist's host; return what is printed."""
        done = self.artist.run(*self.argv(*words))
        assert done.returncode == code, done.stderr
        return msgspec.json.decode(done.stdout) if done.stdout else done.stderr

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of syncs without rules."""
        return self.artist.state_dir / "sync" / f"{QUEUE}_own.jsonl"

    @property
    def manifests(self) -> set[Path]:
        """Those of outputs, in a store in a directory."""
        return set((self.directory / "store").rglob("*_output"))
