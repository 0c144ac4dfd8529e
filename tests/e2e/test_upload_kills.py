"""Uploads killed at random moments and run again: what the store has by then is not sent again.

Also of a blob that is sent in parts: what may be sent twice is what was under way when the process
was killed, and what came in the half second that the ledger had not written yet.
"""

import random
import signal
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

PARTS = 24
FILES: dict[str | bytes, bytes | int] = {
    "renders/beauty.exr": PARTS * PART_BYTES - 7,
    **{f"renders/{at:02}.exr": 3_000 + at for at in range(30)},
}
# Six parts at once, so that all of them take six seconds.
PART_SECONDS = 1.5
KILLS = 20


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

    def play(self) -> None:
        prefix = f"root-{uuid.uuid4().hex}"
        url = f"s3://{self.s3.bucket}/{prefix}"
        home = self.tmp_path / prefix
        host = Host(home, url, environment=self.s3.environment_at(self.proxy.url))
        session = home / "session"
        started = host.start(job_with_outputs(url, "/show", "renders"), session)
        root = Path(started.roots[0].local_root)
        write_files(root, FILES, mtime_ns=1_600_000_000 * 10**9)
        run = action(started_at=1_700_000_000.0)
        assert run.task_id
        arguments = [
            "session", "finish-task", "--session-dir", str(session), "--step-id", run.step_id,
            "--task-id", run.task_id, "--session-action-id", run.session_action_id,
            "--started-at", repr(run.started_at),
        ]  # fmt: skip
        self.proxy.forget()
        kills = 0
        while True:
            before, sent = self.known(host.state_dir / "ledger.db"), self.sent()
            process = host.popen(*arguments)
            time.sleep(self.chance.uniform(0.5, 4.0))
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
        self.see_whole(host, root, prefix, kills)

    def see_whole(self, host: Host, root: Path, prefix: str, kills: int) -> None:
        client = self.s3.client()
        large = Digest.of((root / "renders/beauty.exr").read_bytes())
        stored = client.get_object(Bucket=self.s3.bucket, Key=f"{prefix}/Data/{large.hex}.xxh128")[
            "Body"
        ].read()
        assert Digest.of(stored) == large
        uploads = client.list_multipart_uploads(Bucket=self.s3.bucket, Prefix=prefix)
        assert uploads.get("Uploads", []) == []
        parts = sum(times for (name, _), times in self.sent().items() if name == large.hex)
        # Twice the window: what was under way, and what came in the half second before.
        assert PARTS <= parts <= PARTS + kills * 2 * WINDOW_PARTS
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
