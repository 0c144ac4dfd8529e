"""What the ledger says of an upload while it is under way: how far it is, and what it is trying."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import CancelledError
from agent_plugin.content.parts import PART_BYTES, WINDOW_PARTS
from agent_plugin.content.store import Cancellation
from agent_plugin.session.finish_task import TaskAction
from agent_plugin.transfer.ledger import Ledger, TaskRow, TransferRow
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action, job_with_outputs
from tests.servers.s3_server import S3Server

LARGE = b"large" * (PART_BYTES // 2)  # two parts and a half
# The first part has arrived before more than WINDOW_PARTS are sent.
HUGE = b"huge" * (PART_BYTES // 4 * WINDOW_PARTS + 1000)


class Uploading:
    """A finish-task that runs in a thread, and what the ledger says meanwhile."""

    def __init__(self, host: Host, session_dir: Path, root: Path) -> None:
        self.host = host
        self.session_dir = session_dir
        self.renders = root / "renders"
        self.renders.mkdir()
        self._cancellation = Cancellation()
        self._thread = threading.Thread(target=lambda: None)
        self._ledger = Ledger.open(host.state_dir / "ledger.db")

    def write(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            (self.renders / name).write_bytes(data)

    def finish(self, run: TaskAction) -> None:
        self.host.finish_task(self.session_dir, run)

    def start(self, run: TaskAction) -> None:
        cancellation = self._cancellation = Cancellation()

        def finish() -> None:
            with suppress(CancelledError):
                self.host.finish_task(self.session_dir, run, cancellation=cancellation)

        self._thread = threading.Thread(target=finish)
        self._thread.start()

    def stop(self) -> None:
        self._cancellation.cancel()
        self.join()

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def transfer(self) -> TransferRow:
        return [row for row in self._ledger.transfers() if row.kind == "sync-out"][-1]

    @property
    def tasks(self) -> dict[str, TaskRow]:
        rows = self._ledger.tasks(self.transfer.id)
        return {row.source.removeprefix("renders/"): row for row in rows}

    def wait_until(self, so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while True:
            with_rows = any(row.kind == "sync-out" for row in self._ledger.transfers())
            if with_rows and so():
                return
            assert time.monotonic() < deadline, self.tasks
            time.sleep(0.02)

    def close(self) -> None:
        self.join()
        self._ledger.close()


@pytest.fixture
def uploading(s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path) -> Iterator[Uploading]:
    url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
    host = Host(tmp_path / "host", url, environment=s3.environment_at(fault_proxy.url))
    session_dir = tmp_path / "session"
    root = Path(host.start(job_with_outputs(url, "/show"), session_dir).roots[0].local_root)
    made = Uploading(host, session_dir, root)
    yield made
    # What hangs is sent again, and ends well: no upload in parts has to be aborted.
    fault_proxy.clear()
    fault_proxy.refuse(0)
    fault_proxy.clear()
    made.close()


@pytest.fixture(autouse=True)
def _an_upload_may_be_left(expected_events: set[str]) -> None:
    """Aborting an upload in parts can fail by the same fault that made it necessary."""
    expected_events.add(events.UPLOAD_LEFT)


def key(data: bytes) -> str:
    return Digest.of(data).hex


def test_bytes_are_done_while_a_large_blob_is_under_way(
    uploading: Uploading, fault_proxy: FaultProxy
) -> None:
    uploading.write({"huge.exr": HUGE})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=key(HUGE), skip=WINDOW_PARTS)

    uploading.start(action())
    uploading.wait_until(lambda: uploading.transfer.done >= PART_BYTES)

    assert uploading.transfer.done % PART_BYTES == 0
    assert uploading.transfer.done < len(HUGE)
    assert uploading.transfer.status is TransferStatus.RUNNING
    assert uploading.tasks["huge.exr"].status is TaskStatus.EXECUTING


def test_bytes_that_are_sent_again_are_done_once(
    uploading: Uploading, fault_proxy: FaultProxy
) -> None:
    uploading.write({"large.exr": LARGE})
    fault_proxy.inject(Fault.REPLY_LOST, methods={"PUT"}, key=key(LARGE), times=2)
    fault_proxy.inject(Fault.STALL, methods={"POST"}, key=key(LARGE), skip=1)

    uploading.start(action())
    uploading.wait_until(lambda: fault_proxy.count("POST", key(LARGE)) == 2)
    uploading.wait_until(lambda: uploading.transfer.done > 2 * PART_BYTES)

    # All was sent, and is not there yet: the upload in parts is being completed.
    assert uploading.transfer.done == len(LARGE) - 1
    assert uploading.tasks["large.exr"].tries == 3


def test_every_file_counts_whether_its_content_was_sent_or_was_there(
    uploading: Uploading, fault_proxy: FaultProxy
) -> None:
    known, twice, slow = b"known" * 100, b"twice" * 200, b"slow" * 300
    uploading.write({"known": known})
    uploading.finish(action(1, 0))
    uploading.write({"again": known, "twice": twice, "same": twice, "slow": slow})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=key(slow))

    uploading.start(action(1, 1))
    there = len(known) + 2 * len(twice)
    uploading.wait_until(lambda: uploading.transfer.done == there)
    # Its thread may come to it later than another one has sent what there is to send.
    uploading.wait_until(lambda: uploading.tasks["slow"].status is TaskStatus.EXECUTING)

    assert uploading.transfer.size == there + len(slow)
    assert {name: row.status for name, row in uploading.tasks.items()} == {
        "again": TaskStatus.DONE, "twice": TaskStatus.DONE, "same": TaskStatus.DONE,
        "slow": TaskStatus.EXECUTING,
    }  # fmt: skip
    assert {name: row.tries for name, row in uploading.tasks.items()} == {
        "again": 0, "twice": 1, "same": 0, "slow": 1,
    }  # fmt: skip


def test_what_was_done_before_an_interruption_is_done_once(
    uploading: Uploading, fault_proxy: FaultProxy
) -> None:
    fast, slow = b"fast" * 100, b"slow" * 300
    uploading.write({"fast": fast, "slow": slow, "large.exr": LARGE})
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=f"{key(slow)}|{key(LARGE)}")
    run = action()
    uploading.start(run)
    uploading.wait_until(lambda: uploading.transfer.done == len(fast))
    uploading.stop()
    assert uploading.transfer.status is TransferStatus.WAITING
    fault_proxy.clear()
    fault_proxy.inject(Fault.STALL, methods={"PUT"}, key=key(slow))

    uploading.start(run)
    uploading.wait_until(lambda: uploading.tasks["large.exr"].status is TaskStatus.DONE)

    assert uploading.transfer.done == len(fast) + len(LARGE)
    uploading.stop()
    fault_proxy.clear()
    uploading.finish(run)
    assert (uploading.transfer.status, uploading.transfer.done) == (
        TransferStatus.DONE, len(fast) + len(slow) + len(LARGE),
    )  # fmt: skip


def test_a_task_tells_how_often_it_was_tried_and_when_it_will_be_again(
    uploading: Uploading, fault_proxy: FaultProxy
) -> None:
    uploading.write({"well": b"well", "badly": b"badly"})
    fault_proxy.inject(Fault.UNAVAILABLE, methods={"PUT"}, key=key(b"badly"))

    uploading.start(action())
    uploading.wait_until(lambda: uploading.tasks["badly"].tries >= 3)
    uploading.wait_until(lambda: uploading.tasks["well"].status is TaskStatus.DONE)

    badly, well = uploading.tasks["badly"], uploading.tasks["well"]
    assert (badly.status, badly.error_code) == (TaskStatus.EXECUTING, "E_THROTTLED")
    assert "503 ServiceUnavailable" in badly.error
    assert badly.not_before > time.time() - 30
    assert (well.status, well.tries, well.not_before) == (TaskStatus.DONE, 1, 0.0)
    fault_proxy.clear()
    uploading.join()
    tried = uploading.tasks["badly"]
    assert (tried.status, tried.error_code, tried.error, tried.not_before) == (
        TaskStatus.DONE, "", "", 0.0,
    )  # fmt: skip
    assert tried.tries == fault_proxy.count("PUT", key(b"badly"))
