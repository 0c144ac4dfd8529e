"""A session whose task publishes: for tests to walk through, with a real S3 server.

The job has one root with the output directory `renders`; each test has a prefix of its own in the
shared bucket, for what is published and for the store.
"""

import json
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from agent_plugin.session.finish_task import TaskAction
from agent_plugin.session.state import FinishResult
from tests.servers.hooks import QUEUE, Host, action
from tests.servers.s3_server import S3Server
from tests.servers.sessions import MTIME_NS, Sessions
from tests.servers.trees import write_files

T = TypeVar("T")

MEBIBYTE = 1024 * 1024
# Two parts, and some.
LARGE = 12 * MEBIBYTE
# Far above anything measured, so that only a hang meets it.
WAIT_SECONDS = 30.0


class Publishing:
    """A session whose task publishes to a prefix of its own.

    Attributes:
        sessions: The host and the job.
        prefix: What all published keys begin with, without a slash at the end.
        root: Where the task's outputs go.
    """

    def __init__(self, s3: S3Server, tmp_path: Path, host: Host) -> None:
        self.s3 = s3
        self.tmp_path = tmp_path
        self.prefix = f"published-{uuid.uuid4().hex}"
        self.sessions = Sessions(tmp_path, host)
        self.root = Path()

    @property
    def host(self) -> Host:
        return self.sessions.host

    @host.setter
    def host(self, host: Host) -> None:
        self.sessions.host = host

    def publisher(self, key: str = "", **params: Any) -> dict[str, Any]:
        """Return a publisher whose key is below the prefix."""
        key = f"{self.prefix}/{key}" if key else self.prefix
        return {"Type": "s3", "Params": {"Bucket": self.s3.bucket, "Key": key, **params}}

    def give(self, *publishers: dict[str, Any], queue: str = QUEUE) -> int:
        """Give a queue publishers, or all for ""; return the line where the first begins."""
        table = f'queues."{queue}".outputs' if queue else "outputs"
        text = self.host.config.read_text()
        for publisher in publishers:
            params = ", ".join(f"{k} = {json.dumps(v)}" for k, v in publisher["Params"].items())
            text += f'[[{table}.publishers]]\nType = "s3"\nParams = {{{params}}}\n'
        line = self.host.config.read_text().count("\n") + 1
        self.host.config.write_text(text)
        return line

    def start(self, *publishers: dict[str, Any]) -> None:
        job = self.sessions.submitted({"scene": b"usd"}, publishers=list(publishers))
        self.root = self.sessions.started(job)

    def write(self, files: dict[str | bytes, bytes | int]) -> None:
        write_files(
            self.root, {_below(name): data for name, data in files.items()}, mtime_ns=MTIME_NS
        )

    def finish(self, run: TaskAction | None = None, **options: Any) -> FinishResult:
        run = run or action(1, 0, started_at=1_700_000_000.0)
        return self.host.finish_task(self.sessions.session_dir, run, **options)

    def published(self) -> list[str]:
        """Return the published keys below the prefix."""
        pages = (
            self.s3.client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.s3.bucket, Prefix=f"{self.prefix}")
        )
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key.removeprefix(f"{self.prefix}/") for key in found]

    def get(self, key: str) -> bytes:
        found = self.s3.client().get_object(Bucket=self.s3.bucket, Key=f"{self.prefix}/{key}")
        return found["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.s3.client().put_object(Bucket=self.s3.bucket, Key=f"{self.prefix}/{key}", Body=data)

    def metadata(self, key: str) -> dict[str, str]:
        head = self.s3.client().head_object(Bucket=self.s3.bucket, Key=f"{self.prefix}/{key}")
        return head["Metadata"]

    def uploads(self) -> list[str]:
        """Return the keys of uploads in parts that nobody has ended."""
        answer = self.s3.client().list_multipart_uploads(Bucket=self.s3.bucket, Prefix=self.prefix)
        return [upload["Key"] for upload in answer.get("Uploads", [])]

    def await_beats(self) -> None:
        """Wait until the publication that is under way has read what people want of it by now.

        It does so at each beat, after it has renewed its lease: at the second it has.
        """

        def lease() -> float | None:
            [row] = [row for row in self.host.transfers() if row.kind == "publish"]
            return row.lease_until

        seen = [lease()]
        for _ in range(2):
            await_that(lambda: lease() != seen[-1])
            seen.append(lease())

    def arguments(self, run: TaskAction) -> list[str]:
        """Return the arguments of `session finish-task` for an action."""
        assert run.task_id is not None
        return [
            *("session", "finish-task", "--session-dir", str(self.sessions.session_dir)),
            *("--step-id", run.step_id, "--task-id", run.task_id),
            *("--session-action-id", run.session_action_id, "--json"),
        ]


def _below(name: str | bytes) -> str | bytes:
    return b"renders/" + name if isinstance(name, bytes) else f"renders/{name}"


def host_of(s3: S3Server, home: Path, endpoint_url: str | None = None) -> Host:
    url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
    return Host(home, url, environment=s3.environment_at(endpoint_url or s3.endpoint_url))


def params_of(result: FinishResult, index: int = 0) -> Any:
    return result.results[index].params


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def in_background(work: Callable[[], T]) -> Callable[[], T]:
    """Start work on a thread of its own; return what awaits its result."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return lambda: future.result(WAIT_SECONDS)
