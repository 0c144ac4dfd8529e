"""Uploads killed at random moments and run again: what the store has by then is not sent again.

Also of a blob that is sent in parts: what may be sent twice is what was under way when the process
was killed, and what came in the half second that the ledger had not written yet.
"""

import http
import random
import signal
import subprocess
import time
import uuid
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.parts import PART_BYTES, WINDOW_PARTS
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action, job_with_outputs
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import write_files

PARTS = 14
FILES: dict[str | bytes, bytes | int] = {
    "renders/beauty.exr": PARTS * PART_BYTES - 7,
    **{f"renders/{at:02}.exr": 3_000 + at for at in range(30)},
}
# For so long each is under way at least; six parts are at once.
PART_SECONDS = 1.0
KILLS = 20
# One kill in five comes while the command starts, the others when this many answers have come, or
# fewer, and up to the time of another part later.
EARLY_SHARE = 0.2
EARLY_SECONDS = 1.5
MOST_ANSWERS = 5
# Longer than any run takes, so that only a hang meets it.
RUN_SECONDS = 600.0


class Uploads:
    """Rounds of one upload each, killed until it has come to its end."""

    def __init__(self, tmp_path: Path, s3: S3Server, proxy: FaultProxy) -> None:
        self.tmp_path = tmp_path
        self.s3 = s3
        self.proxy = proxy
        self.chance = random.Random(20_261_125)
        self.kills = 0

    def sent(self) -> Counter[tuple[str, str]]:
        """Return how often each blob, or part of one, was sent."""
        return Counter(
            (
                request.key.rpartition("/")[2][:32],
                parse_qs(request.query).get("partNumber", [""])[0],
            )
            for request in self.proxy.requests
            if request.method == "PUT" and "/Data/" in request.key
        )

    def known(self, ledger_path: Path) -> set[tuple[str, str]]:
        """Return the blobs, and the parts of blobs, that the ledger has as sent."""
        found: set[tuple[str, str]] = set()
        with Ledger.open(ledger_path) as ledger:
            for row in ledger.transfers():
                for task in ledger.tasks(row.id):
                    if task.status is TaskStatus.DONE:
                        found.add((task.destination, ""))
                    numbers = {part.number for part in ledger.upload_of(task.id)[1]}
                    found |= {(task.destination, str(number)) for number in numbers}
        return found

    def await_moment(self, process: "subprocess.Popen[str]") -> None:
        """Wait until an upload is to be killed: when some of what it has sent was answered.

        Not by the clock alone: on a busy machine no part might come to its end before, for ever.
        """
        if self.chance.random() < EARLY_SHARE:
            time.sleep(self.chance.uniform(0, EARLY_SECONDS))
            return
        answers = self.answered() + self.chance.randrange(MOST_ANSWERS)
        begun = sum(self.sent().values())
        until(
            lambda: (
                process.poll() is not None
                or (sum(self.sent().values()) > begun and self.answered() >= answers)
            ),
            seconds=RUN_SECONDS,
        )
        time.sleep(self.chance.uniform(0, PART_SECONDS))

    def answered(self) -> int:
        """Return how many blobs, or parts of one, the store has taken."""
        return sum(
            request.method == "PUT" and request.status == http.HTTPStatus.OK
            for request in self.proxy.requests
        )

    def prepare(self, files: dict[str | bytes, bytes | int]) -> tuple[Host, list[str], Path, str]:
        """Return a host, the command that stores what a task has left, its root, and the prefix."""
        prefix = f"root-{uuid.uuid4().hex}"
        url = f"s3://{self.s3.bucket}/{prefix}"
        home = self.tmp_path / prefix
        host = Host(home, url, environment=self.s3.environment_at(self.proxy.url))
        session = home / "session"
        started = host.start(job_with_outputs(url, "/show", "renders"), session)
        root = Path(started.roots[0].local_root)
        write_files(root, files, mtime_ns=1_600_000_000 * 10**9)
        run = action(started_at=1_700_000_000.0)
        assert run.task_id
        arguments = [
            "session", "finish-task", "--session-dir", str(session), "--step-id", run.step_id,
            "--task-id", run.task_id, "--session-action-id", run.session_action_id,
            "--started-at", repr(run.started_at),
        ]  # fmt: skip
        return host, arguments, root, prefix

    def play(self) -> None:
        host, arguments, root, prefix = self.prepare(FILES)
        self.proxy.forget()
        kills = 0
        while True:
            before, sent = self.known(host.state_dir / "ledger.db"), self.sent()
            process = host.popen(*arguments)
            self.await_moment(process)
            process.kill()
            _, errors = process.communicate()
            until(lambda: not self.proxy._open_connections())
            again = {what: times for what, times in (self.sent() - sent).items() if what in before}
            assert again == {}, "the ledger knew that it was there"
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, errors
                break
            kills += 1
        self.kills += kills
        print(f"{kills} kills: {sum(self.sent().values())} sent of {PARTS + len(FILES) - 1}")
        self.see_whole(host, root, prefix)
        large = Digest.of((root / "renders/beauty.exr").read_bytes())
        parts = sum(times for (name, _), times in self.sent().items() if name == large.hex)
        # Twice the window: what was under way, and what came in the half second before.
        assert PARTS <= parts <= PARTS + kills * 2 * WINDOW_PARTS

    def see_whole(self, host: Host, root: Path, prefix: str) -> None:
        """See that the store has every file, that no upload is left, and the ledger knows it."""
        client = self.s3.client()
        for path in root.rglob("*.exr"):
            made = Digest.of(path.read_bytes())
            key = f"{prefix}/Data/{made.hex}.xxh128"
            stored = client.get_object(Bucket=self.s3.bucket, Key=key)["Body"].read()
            assert Digest.of(stored) == made
        uploads = client.list_multipart_uploads(Bucket=self.s3.bucket, Prefix=prefix)
        assert uploads.get("Uploads", []) == []
        [row] = [row for row in host.transfers() if row.kind == "sync-out"]
        assert (row.status, row.done) == (TransferStatus.DONE, row.size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_t1_twenty_kills_of_an_upload_lose_nothing_and_send_nothing_twice(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Seen to fail when the memory of an upload is not recalled."""
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="Data/", seconds=PART_SECONDS)
    uploads = Uploads(tmp_path, s3, fault_proxy)
    while uploads.kills < KILLS:
        uploads.play()


def test_an_upload_that_is_killed_when_it_has_just_begun_is_gone_on_with(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Seen to fail when the ledger learns at the next beat that an upload has begun."""
    uploads = Uploads(tmp_path, s3, fault_proxy)
    host, arguments, root, prefix = uploads.prepare({"renders/a.exr": 2 * PART_BYTES + 1})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key="Data/")
    process = host.popen(*arguments)
    until(lambda: process.poll() is not None or bool(uploads.sent()))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    fault_proxy.release()
    until(lambda: not fault_proxy._open_connections())

    assert host.run(*arguments).returncode == 0

    uploads.see_whole(host, root, prefix)
    begun = [
        request
        for request in fault_proxy.requests
        if request.method == "POST" and request.query.startswith("uploads")
    ]
    assert len(begun) == 1
