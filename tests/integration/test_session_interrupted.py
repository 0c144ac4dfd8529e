"""A start that is stopped or killed, and goes on."""

import json
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.store import Cancellation
from agent_plugin.session.inputs import materialise
from agent_plugin.session.job import JobDocument
from agent_plugin.transfer.download import TransferResult
from agent_plugin.transfer.states import TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action
from tests.servers.promptness import STOP_SECONDS, seconds_until_end
from tests.servers.s3_server import S3Server
from tests.servers.sessions import Sessions
from tests.servers.trees import files_below


@pytest.fixture
def behind_proxy(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> Callable[[], tuple[Sessions, JobDocument]]:
    """Return sessions on a fresh host behind the proxy, and a job that was submitted past it."""

    def make() -> tuple[Sessions, JobDocument]:
        url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
        sessions = Sessions(tmp_path, Host(tmp_path / "host", url, environment=s3.environment))
        files: dict[str | bytes, bytes | int] = {f"tex/{at}.tx": 20_000 + at for at in range(60)}
        files["big.abc"] = 20_000_000
        job = sessions.submitted(files)
        sessions.host = Host(
            tmp_path / "worker", url, environment=s3.environment_at(fault_proxy.url)
        )
        return sessions, job

    return make


def await_requests(proxy: FaultProxy, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while proxy.count("GET", "Data/") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the command asked for nothing"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stalled", [False, True], ids=["at work", "while the store hangs"])
def test_a_signal_stops_a_start_within_a_second_and_it_goes_on_later(
    behind_proxy: Callable[[], tuple[Sessions, JobDocument]],
    fault_proxy: FaultProxy,
    number: signal.Signals,
    stalled: bool,
) -> None:
    sessions, job = behind_proxy()
    fault = Fault.STALL if stalled else Fault.DRIP
    fault_proxy.inject(fault, key="Data/", bytes_per_second=10_000)
    process = sessions.host.popen(*sessions.host.start_arguments(job, sessions.session_dir))
    await_requests(fault_proxy, 10, process)

    seconds = seconds_until_end(process, number)
    _, stderr = process.communicate()

    assert process.returncode == 77, stderr
    assert "error[cancelled]: stopped on request" in stderr
    assert seconds < STOP_SECONDS
    state = sessions.host.read_state(sessions.session_dir)
    assert state is not None
    assert not state.ready
    facts = files_below(sessions.source)
    for path, found in files_below(sessions.session_dir).items():
        assert found == facts.get(path.partition("/")[2])
    assert list((sessions.host.cache_dir / "v1/tmp").iterdir()) == []
    [row] = sessions.host.transfers()
    assert row.status is TransferStatus.WAITING
    fault_proxy.clear()
    root = sessions.started(job)
    assert files_below(root) == facts
    assert [row.status for row in sessions.host.transfers()] == [TransferStatus.DONE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_finish_that_hashes_a_large_file(
    sessions: Sessions, number: signal.Signals
) -> None:
    """Hashing the whole file, a hole in the disk, takes 20 s and more."""
    root = sessions.started(sessions.submitted())
    with (root / "renders/huge.exr").open("xb") as file:
        file.truncate(64 * 1024**3)
    run = action(1, 0)
    process = sessions.host.popen(
        *("session", "finish-task", "--session-dir", str(sessions.session_dir)),
        *("--step-id", run.step_id, "--session-action-id", run.session_action_id),
    )
    await_bytes_read(process, 100_000_000)

    seconds = seconds_until_end(process, number)
    _, stderr = process.communicate()

    assert process.returncode == 77, stderr
    assert "error[cancelled]: stopped on request" in stderr
    assert seconds < STOP_SECONDS
    assert sessions.outputs() == {}
    (root / "renders/huge.exr").unlink()
    (root / "renders/small.exr").write_bytes(b"small")
    assert sessions.finish().files == 1


def await_bytes_read(process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 30
    counters = Path(f"/proc/{process.pid}/io")
    while int(counters.read_text().split()[1]) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the command read nothing"
        time.sleep(0.005)


def test_a_wish_to_stop_that_comes_first_stops_everything(
    sessions: Sessions, expected_events: set[str]
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    job = sessions.submitted()
    cancellation = Cancellation()
    cancellation.cancel()

    with pytest.raises(PropmasterError) as caught:
        sessions.host.start(job, sessions.session_dir, cancellation=cancellation)
    assert caught.value.exit_code == 77


def test_a_wish_to_stop_that_comes_when_all_is_in_place_stops_the_start(
    sessions: Sessions, expected_events: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the output directories is looked at then, on a shared disk perhaps for long."""
    expected_events.add(events.SESSION_START_FAILED)
    job = sessions.submitted()
    cancellation = Cancellation()

    def materialising(*args: Any, **options: Any) -> list[TransferResult]:
        results = materialise(*args, **options)
        cancellation.cancel()
        return results

    with monkeypatch.context() as patch:
        patch.setattr("agent_plugin.session.bring.materialise", materialising)
        with pytest.raises(CancelledError):
            sessions.host.start(job, sessions.session_dir, cancellation=cancellation)

    assert files_below(sessions.started(job)) == files_below(sessions.source)


def test_a_start_that_was_killed_goes_on_where_it_was(
    behind_proxy: Callable[[], tuple[Sessions, JobDocument]], fault_proxy: FaultProxy
) -> None:
    sessions, job = behind_proxy()
    fault_proxy.inject(Fault.DRIP, key="Data/", bytes_per_second=100_000, skip=40)
    arguments = sessions.host.start_arguments(job, sessions.session_dir)
    process = sessions.host.popen(*arguments)
    await_requests(fault_proxy, 50, process)

    process.kill()
    process.communicate()
    finished = {blob.name for blob in sessions.host.cache_dir.rglob("*") if len(blob.name) == 32}
    assert finished
    fault_proxy.clear()
    fault_proxy.forget()
    resumed = sessions.host.run(*arguments)

    assert resumed.returncode == 0, resumed.stderr
    root = Path(json.loads(resumed.stdout)["roots"][0]["localRoot"])
    assert files_below(root) == files_below(sessions.source)
    fetched = {request.key.rpartition("/")[2][:32] for request in fault_proxy.requests}
    assert not fetched & finished, "a finished blob was fetched again"
    [row] = sessions.host.transfers()
    total = sum(facts.size for facts in files_below(root).values())
    assert (row.status, row.done, row.size) == (TransferStatus.DONE, total, total)
