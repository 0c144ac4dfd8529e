"""A job whose tasks publish, and a user on another machine who wants what they published.

Each has prefixes of its own in the shared bucket. What is hostile is put there by hand.
"""

import json
import subprocess
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.publish.get_published import PublishedWish, get_published
from agent_plugin.publish.getting import GetResult
from agent_plugin.publish.results import find_documents
from agent_plugin.publish.servers import ResultServers
from agent_plugin.publish.unpack import UnpackLimits
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from tests.servers.hooks import FARM, JOB, QUEUE, Host, action
from tests.servers.s3_server import S3Server
from tests.servers.sessions import MTIME_NS, Sessions
from tests.servers.trees import write_files

# Results are asked for once: what fails here fails for good.
ONCE = RetryPolicy(attempts=1)


class Published:
    """A job whose tasks published, and a user on another machine."""

    def __init__(self, s3: S3Server, tmp_path: Path) -> None:
        self.s3 = s3
        self.bucket = s3.bucket
        self.prefix = f"published-{uuid.uuid4().hex}"
        url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
        self.sessions = Sessions(tmp_path, Host(tmp_path / "host", url, environment=s3.environment))
        self.user = Host(tmp_path / "user", url, environment=s3.environment)
        self.to = tmp_path / "user/results"
        # By what may be asked: a client of its own for each call is what took the time.
        self._servers: dict[frozenset[str], ResultServers] = {}

    def ran(
        self,
        publisher: Mapping[str, Any],
        *runs: dict[str | bytes, bytes | int],
        again: bool = False,
        besides: Sequence[Mapping[str, Any]] = (),
    ) -> list[str]:
        """Have tasks, or one task again, leave and publish files; return the executions.

        Args:
            publisher: The parameters of the job's publisher.
            runs: What each leaves.
            again: Whether they are runs of one task.
            besides: The parameters of further publishers.
        """
        publishers = []
        for each in (publisher, *besides):
            params = {"Bucket": self.bucket, "Key": self.prefix, **each}
            if "Key" in each:
                params["Key"] = f"{self.prefix}/{each['Key']}"
            publishers.append({"Type": "s3", "Params": params})
        job = self.sessions.submitted({"in": b"in"}, publishers=publishers)
        root = self.sessions.started(job)
        ids = []
        for number, files in enumerate(runs):
            write_files(root, files, mtime_ns=MTIME_NS)
            of_task = 0 if again else number
            run = action(1, of_task, started_at=1_700_000_000.0 + number, number=number)
            result = self.sessions.host.finish_task(self.sessions.session_dir, run)
            assert result.publish_failures == []
            ids.append(run.session_action_id)
        return ids

    def arguments(self, command: str, *arguments: str | Path) -> list[str | Path]:
        where = ["--store", self.user.store_url, "--farm-id", FARM, "--queue-id", QUEUE]
        return [command, *arguments, *where]

    def run(
        self, *arguments: str | Path, code: int = 0, keys: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = self.user.run(*self.arguments(*map(str, arguments)), **(keys or {}))
        assert done.returncode == code, done.stderr
        return done

    def get(
        self,
        path: str = "",
        *,
        merge: bool = False,
        raw: bool = False,
        overwrite: bool = False,
        limits: UnpackLimits | None = None,
        only: Collection[str] = (),
        without: Collection[str] = (),
        allowed: Collection[str] = (),
    ) -> GetResult:
        """Bring published results, as `get --published` does, but in this process."""
        wish = PublishedWish(path, merge, raw, overwrite, limits or UnpackLimits())
        servers = self._servers.setdefault(
            frozenset(allowed), ResultServers(self.user.environment, ONCE, Bandwidth(), allowed)
        )
        with self.user.services() as context:
            documents = {
                name: document
                for name, document in find_documents(context, (FARM, QUEUE, JOB)).items()
                if (not only or name in only) and name not in without
            }
            return get_published(documents, context, servers, JOB, self.to, wish)

    def results(self, *options: str) -> Any:
        return json.loads(self.run("results", JOB, "--json", *options).stdout)

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.to).as_posix(): path.read_bytes()
            for path in sorted(self.to.rglob("*"))
            if path.is_file()
        }

    def nothing_is_there(self) -> bool:
        partials = [path.name for path in self.to.parent.iterdir() if is_partial(path.name)]
        return not self.to.exists() and partials == []

    def put(self, key: str, data: bytes) -> None:
        self.s3.client().put_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}", Body=data)

    def delete(self, *keys: str) -> None:
        for key in keys:
            self.s3.client().delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}")

    def documents(self) -> dict[str, dict[str, Any]]:
        """Return what the store tells of the results, by the key of the object."""
        client = self.s3.client()
        below = f"Manifests/{FARM}/{QUEUE}/Results/"
        prefix = f"{self.user.store_url.partition(self.bucket + '/')[2]}/{below}"
        found = client.list_objects_v2(Bucket=self.s3.bucket, Prefix=prefix)["Contents"]
        return {
            entry["Key"]: json.loads(
                client.get_object(Bucket=self.s3.bucket, Key=entry["Key"])["Body"].read()
            )
            for entry in found
            if entry["Key"].endswith(".json")
        }

    def rewrite(self, execution: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the result document of an execution, as anybody may who can write there."""
        for key, document in self.documents().items():
            if document["executionId"] == execution:
                change(document)
                data = json.dumps(document).encode()
                self.s3.client().put_object(Bucket=self.s3.bucket, Key=key, Body=data)


def set_get_tasks(host: Host, names: Sequence[str], status: TaskStatus) -> None:
    """Say of files of a get, by a part of where they go, what a person says."""
    with Ledger.open(host.state_dir / "ledger.db") as ledger:
        [row] = [row for row in ledger.transfers() if row.kind == "get"]
        ids = [
            task.id for task in ledger.tasks(row.id) if any(n in task.destination for n in names)
        ]
        assert len(ids) == len(names)
        ledger.set_tasks(row.id, {task: {"status": status} for task in ids}, "0:somebody")


def waits(host: Host) -> bool:
    """Whether a get of a host has begun, and all that is left of it is held."""
    [row] = [row for row in host.transfers() if row.kind == "get"]
    return bool(row.lease_owner) and row.status is TransferStatus.PAUSED
