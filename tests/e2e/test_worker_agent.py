"""The real worker agent works jobs that the real client submits; the real client downloads."""

from pathlib import Path

import pytest

from tests.servers.deadline_command import job_template, step, write_bundle
from tests.servers.role_store import RoleStore
from tests.servers.trees import write_files
from tests.servers.worker_host import WorkerHost
from tests.servers.worker_rig import JOB_SECONDS, QUEUE_ID, open_rig

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

MTIME_NS = 1_719_848_112_123_456_789
INPUTS: dict[str | bytes, bytes | int] = {
    "shared.txt": b"as submitted",
    "scene.usd": 5000,
    ".hidden/.rc": b"dots",
    "sub/\u00e9 \U0001f3ac.bin": b"not ASCII",
}
SIMULATE = """
id -un
test "$(cat shared.txt)" = 'as submitted' || grep -q '^simulated' shared.txt
echo "frame $FRAME" > "frame $FRAME.txt"
echo "simulated" > shared.txt
mkdir -p .cache && echo "state $FRAME" > ".cache/state.$FRAME"
mkdir -p "\u00f6ut" && echo "$FRAME" > "\u00f6ut/\U0001f3ac.$FRAME"
echo "openjd_progress: 50"
"""
RENDER = """
ls -A . > listing
cp shared.txt rendered
cat frame*.txt >> rendered
"""


def bundle_in(directory: Path) -> Path:
    write_files(directory / "data", INPUTS, mtime_ns=MTIME_NS)
    steps = [
        step("Simulate", SIMULATE, frames="1-2"),
        step("Render", RENDER, depends_on="Simulate"),
    ]
    return write_bundle(directory, job_template(*steps))


@pytest.mark.slow
def test_what_the_agents_own_scripts_lose(
    role_store: RoleStore, worker_host: WorkerHost, tmp_path: Path
) -> None:
    """The baseline, and the test of the rig itself: names with a dot, and a dependency's file."""
    bundle = bundle_in(tmp_path / "bundle")
    with open_rig(role_store, worker_host, tmp_path / "home") as rig, rig.agent() as agent:
        job_id = rig.client.submit(bundle, QUEUE_ID)
        job = rig.service.wait_for(job_id, seconds=JOB_SECONDS)

        log = "".join(agent.session_log(QUEUE_ID, one.session_id) for one in job.sessions)
        assert job.status == "SUCCEEDED", log
        assert worker_host.job in log.splitlines()[-1] + log
        rig.client.download_output(job_id, QUEUE_ID)

    data = bundle / "data"
    assert (data / "frame 1.txt").read_text() == "frame 1\n"
    assert (data / "\u00f6ut/\U0001f3ac.2").read_text() == "2\n"
    assert not (data / ".cache").exists()
    assert "shared (1).txt" in (data / "listing").read_text().splitlines()
    assert (data / "shared.txt").read_text() == "as submitted"
