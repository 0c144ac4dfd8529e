"""The real worker agent works jobs that the real client submits; the real client downloads.

The agent runs as its own user, and becomes the job's user by sudo. With propmaster that means:
`propmaster worker install` into a copy of the agent, `propmaster worker serve` as root or as the
agent's user, and nothing else.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from agent_plugin.content.leftovers import is_partial
from agent_plugin.workers.deadline.vfs_prefix import write_prefix
from tests.servers.deadline_command import job_template, step, write_bundle
from tests.servers.deadline_jobs import Job
from tests.servers.deadline_peers import AGENT_PYTHON, OLDEST_AGENT_PYTHON
from tests.servers.host_service import PropmasterHost
from tests.servers.role_store import RoleStore
from tests.servers.secret_watch import ArgumentWatch, files_with
from tests.servers.trees import FileFacts, files_below, write_files
from tests.servers.unprivileged import fuse_for_all
from tests.servers.worker_agent import WorkerAgent
from tests.servers.worker_host import WorkerHost
from tests.servers.worker_rig import JOB_SECONDS, QUEUE_ID, Rig, open_rig

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

MTIME_NS: Final = 1_719_848_112_123_456_789
INPUTS: Final[dict[str | bytes, bytes | int]] = {
    "shared.txt": b"as submitted",
    "scene.usd": 5000,
    "same content.usd": 5000,
    "empty": b"",
    ".hidden/.rc": b"dots",
    "sub/\u00e9 \U0001f3ac.bin": b"not ASCII",
}
# What the task sees: names, sizes and times to the microsecond, and all content.
SEE: Final = """
id -un
grep " $PWD" /proc/self/mountinfo || true
"$PYTHON" - <<'END'
import hashlib, os
for folder, _, names in os.walk("."):
    for name in names:
        path = os.path.join(folder, name)
        status = os.stat(path)
        content = hashlib.sha256(open(path, "rb").read()).hexdigest()
        print("SEEN", path[2:], status.st_size, status.st_mtime_ns // 1000, content)
END
"""
SIMULATE: Final = """
echo "frame $FRAME" > "frame $FRAME.txt"
echo simulated > shared.txt
mkdir -p .cache "\u00f6ut"
echo "state $FRAME" > ".cache/state.$FRAME"
echo "$FRAME" > "\u00f6ut/\U0001f3ac.$FRAME"
echo "openjd_progress: 50"
"""
RENDER: Final = """
ls -A . > listing
cat shared.txt frame*.txt .cache/state.* > rendered
"""
COPY: Final = "mkdir out; cp -r 00 01 out"
OUTPUTS: Final = {
    **{f"frame {frame}.txt": f"frame {frame}\n" for frame in (1, 2)},
    **{f".cache/state.{frame}": f"state {frame}\n" for frame in (1, 2)},
    **{f"\u00f6ut/\U0001f3ac.{frame}": f"{frame}\n" for frame in (1, 2)},
    "shared.txt": "simulated\n",
    "rendered": "simulated\nframe 1\nframe 2\nstate 1\nstate 2\n",
}
# Nothing but a hang meets it; the host service looks for ended sessions every ten seconds.
SETTLE_SECONDS: Final = 60.0


def two_steps(directory: Path, *, first: str = SIMULATE, second: str = RENDER) -> Path:
    """Write a bundle whose second step needs what the first one makes, and what it changes."""
    write_files(directory / "data", INPUTS, mtime_ns=MTIME_NS)
    steps = [step("Simulate", first, frames="1-2"), step("Render", second, depends_on="Simulate")]
    return write_bundle(directory, job_template(*steps))


@dataclass
class Worker:
    """A worker with propmaster, ready for jobs.

    Attributes:
        mounts: The kernel's list of what is mounted there.
    """

    rig: Rig
    agent: WorkerAgent
    service: PropmasterHost
    argv: ArgumentWatch
    mounts: Path

    def submit(self, bundle: Path, *, file_system: str = "COPIED", queue: str = QUEUE_ID) -> str:
        return self.rig.client.submit(bundle, queue, file_system=file_system)

    def work(self, job_id: str) -> Job:
        """Wait for a job that succeeds."""
        job = self.rig.service.wait_for(job_id, seconds=JOB_SECONDS)
        assert job.status == "SUCCEEDED", f"{self.log(job)}\n{self.service.log}"
        return job

    def log(self, job: Job) -> str:
        return "".join(
            self.agent.session_log(session.queue_id, session.session_id) for session in job.sessions
        )

    def assert_nothing_left(self) -> None:
        """Wait until nothing of any session is left on the host."""
        host = self.rig.host
        found: list[str] = []
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            found = [*self._left()]
            if not found:
                return
            time.sleep(0.2)
        pytest.fail(f"left in {host.directory}: {found}\n{self.service.log}")

    def _left(self) -> Iterator[str]:
        host = self.rig.host
        for line in self.mounts.read_text().splitlines():
            mountpoint = line.split()[4]
            if mountpoint.startswith(f"{host.directory}/"):
                yield f"mount {mountpoint}"
        yield from (f"session {path}" for path in self.agent.sessions.iterdir())
        yield from (f"process {words}" for words in host.processes_of(host.job).values())
        for path in self.service.root.rglob("*"):
            if is_partial(path.name):
                yield f"temporary {path}"
        for path in (self.service.state_dir / "sessions").glob("*"):
            yield f"state {path}"


@dataclass
class Setting:
    """How a worker is set up.

    Attributes:
        service_user: Whom the service runs as.
        more: For `open_rig`.
        tables: For the settings' file.
        mounts: A service without root is to be able to mount, which this host may keep for root.
        peer: Whose copy the agent is: the Python of its environment.
    """

    service_user: Literal["root", "agent"] = "root"
    more: dict[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mounts: bool = False
    peer: Path = AGENT_PYTHON


OpenWorker = Callable[..., Any]


@pytest.fixture
def open_worker(role_store: RoleStore, worker_host: WorkerHost, tmp_path: Path) -> OpenWorker:
    """Return what opens a worker with propmaster."""

    @contextmanager
    def opened(setting: Setting | None = None) -> Iterator[Worker]:
        how = setting or Setting()
        with ExitStack() as stack:
            namespace = "self"
            within: tuple[str, ...] = ()
            if how.mounts and how.service_user == "agent":
                fuse = worker_host.directory / f"fuse-{tmp_path.name}"
                fuse.mkdir()
                namespace = str(stack.enter_context(fuse_for_all(fuse, allow_other=True)))
                within = ("nsenter", f"--mount=/proc/{namespace}/ns/mnt")
            service = PropmasterHost(
                worker_host,
                user="root" if how.service_user == "root" else worker_host.agent,
                environment=role_store.endpoints,
                tables=how.tables,
                within=within,
            )
            agent_python = worker_host.agent_python(how.peer)
            service.install_into(agent_python)
            prefix = service.root / "deadline_vfs"
            write_prefix(prefix, worker_host.own_python())
            environment = {**service.job_environment, "PYTHON": str(worker_host.base_python)}
            home = tmp_path / "home"
            rig = stack.enter_context(
                open_rig(role_store, worker_host, home, job_environment=environment, **how.more)
            )
            more = {"DEADLINE_VFS_PATH": str(prefix)}
            agent = rig.agent(agent_python, more=more, within=within)
            argv = ArgumentWatch(secrets_of(rig))
            for entered in (service, argv, agent):
                stack.enter_context(entered)
            yield Worker(rig, agent, service, argv, Path("/proc", namespace, "mountinfo"))

    return opened


def secrets_of(rig: Rig) -> list[str]:
    keys = rig.service.credentials
    return [keys.secret_key, keys.session_token, rig.store.secret_key]


def assert_outputs(data: Path) -> None:
    """Everything that the tasks wrote has come, and what they did not write is as it was."""
    assert {path: (data / path).read_text() for path in OUTPUTS} == OUTPUTS
    listing = (data / "listing").read_text().splitlines()
    first = {path.partition("/")[0] for path in files_below(data)} - {"rendered"}
    assert set(listing) == first, "nothing twice, and nothing missing, where the second step ran"


def assert_downloads(worker: Worker, job: Job, data: Path) -> dict[str, tuple[int, str]]:
    """Both of the client's commands bring the same tree; return its sizes and hashes.

    Their times may be a microsecond apart, which is the client's.
    """
    client = worker.rig.client
    downloads: list[Callable[[], str]] = [
        lambda: client.download_output(job.job_id, QUEUE_ID),
        lambda: client.sync_output(QUEUE_ID),
    ]
    found = []
    for download in downloads:
        shutil.rmtree(data)
        data.mkdir()
        download()
        found.append({path: (one.size, one.sha256) for path, one in files_below(data).items()})
    by_download, by_sync = found
    assert by_sync == by_download
    return by_download


def assert_manifests(job: Job) -> None:
    for run in job.task_runs:
        assert run.manifests is not None
        [manifest] = run.manifests
        assert manifest["outputManifestPath"].endswith("_output")
        assert len(manifest["outputManifestHash"]) == 32


def assert_no_secret(worker: Worker) -> None:
    rig = worker.rig
    secrets = secrets_of(rig)
    assert worker.argv.found == set()
    # The agent keeps the credentials of its queues there, for the job users.
    found = files_with(secrets, rig.host.directory, except_below=worker.agent.persistence)
    assert list(found) == []
    lines = [line for stream in rig.logs.lines.values() for line in stream]
    assert not [line for line in lines if any(secret in line for secret in secrets)]


@pytest.mark.slow
def test_what_the_agents_own_scripts_lose(
    role_store: RoleStore, worker_host: WorkerHost, tmp_path: Path
) -> None:
    """The baseline, and the test of the rig itself: names with a dot, and a dependency's file."""
    bundle = two_steps(tmp_path / "bundle", second="ls -A . > listing; cp shared.txt rendered")
    with open_rig(role_store, worker_host, tmp_path / "home") as rig, rig.agent() as agent:
        job_id = rig.client.submit(bundle, QUEUE_ID)
        job = rig.service.wait_for(job_id, seconds=JOB_SECONDS)
        rig.client.download_output(job_id, QUEUE_ID)

    log = "".join(agent.session_log(QUEUE_ID, one.session_id) for one in job.sessions)
    assert job.status == "SUCCEEDED", log
    data = bundle / "data"
    assert (data / "frame 1.txt").read_text() == "frame 1\n"
    assert (data / "\u00f6ut/\U0001f3ac.2").read_text() == "2\n"
    assert not (data / ".cache").exists()
    assert "shared (1).txt" in (data / "listing").read_text().splitlines()
    assert (data / "shared.txt").read_text() == "as submitted"


def test_a_job_of_two_steps_goes_through_the_agent_and_back_to_the_client(
    open_worker: OpenWorker, tmp_path: Path
) -> None:
    bundle = two_steps(tmp_path / "bundle")
    with open_worker() as worker:
        job = worker.work(worker.submit(bundle))
        worker.rig.client.download_output(job.job_id, QUEUE_ID)
        worker.assert_nothing_left()
        log = worker.log(job)

    assert_outputs(bundle / "data")
    assert_manifests(job)
    assert_no_secret(worker)
    [first, *_] = job.actions
    assert first.percents[-1] == 100
    assert first.messages
    assert worker.rig.logs.refused == []
    assert "the agent's own script runs" not in log


@pytest.mark.slow
@pytest.mark.parametrize("file_system", ["COPIED", "VIRTUAL"])
def test_the_oldest_agent_that_is_supported_works_the_same_job(
    open_worker: OpenWorker, tmp_path: Path, file_system: str
) -> None:
    if not OLDEST_AGENT_PYTHON.exists():
        pytest.skip("the oldest agent is not here: `make test-slow` makes it")
    bundle = two_steps(tmp_path / "bundle", first=SEE + SIMULATE)
    submitted = files_below(bundle / "data")
    with open_worker(Setting(peer=OLDEST_AGENT_PYTHON)) as worker:
        job = worker.work(worker.submit(bundle, file_system=file_system))
        worker.rig.client.download_output(job.job_id, QUEUE_ID)
        worker.assert_nothing_left()
        log = worker.log(job)

    assert_seen(log, submitted)
    assert_outputs(bundle / "data")
    assert_manifests(job)
    assert_no_secret(worker)


@pytest.mark.slow
def test_a_task_that_leaves_nothing_is_reported_with_no_manifest(
    open_worker: OpenWorker, tmp_path: Path
) -> None:
    write_files(tmp_path / "bundle" / "data", INPUTS, mtime_ns=MTIME_NS)
    template = job_template(step("Once", '[ "$FRAME" = 2 ] || echo 1 > first', frames="1-2"))
    bundle = write_bundle(tmp_path / "bundle", template)
    with open_worker() as worker:
        job = worker.work(worker.submit(bundle))
        worker.rig.client.sync_output(QUEUE_ID)

    [first], second = [run.manifests or [] for run in job.task_runs]
    assert first["outputManifestPath"].endswith("_output")
    assert second == [{}]
    assert (bundle / "data" / "first").read_text() == "1\n"


@pytest.mark.slow
@pytest.mark.parametrize("service_user", ["root", "agent"])
@pytest.mark.parametrize("session_per", ["step", "job"])
@pytest.mark.parametrize("file_system", ["COPIED", "VIRTUAL"])
def test_every_way_gives_the_same_trees(
    open_worker: OpenWorker,
    tmp_path: Path,
    service_user: Literal["root", "agent"],
    session_per: str,
    file_system: str,
) -> None:
    setting = Setting(service_user, {"session_per": session_per}, mounts=file_system == "VIRTUAL")
    bundle = two_steps(tmp_path / "bundle", first=SEE + SIMULATE)
    submitted = files_below(bundle / "data")
    with open_worker(setting) as worker:
        job = worker.work(worker.submit(bundle, file_system=file_system))
        worker.assert_nothing_left()
        worker.rig.client.download_output(job.job_id, QUEUE_ID)
        assert_outputs(bundle / "data")
        assert set(assert_downloads(worker, job, bundle / "data")) == {*OUTPUTS, "listing"}
        log = worker.log(job)

    assert_seen(log, submitted)
    assert_manifests(job)
    assert_no_secret(worker)
    assert ("VFS launched" in log) == (file_system == "VIRTUAL")


@pytest.mark.slow
@pytest.mark.parametrize("file_system", ["VIRTUAL", "AUTO"])
def test_the_queues_choice_counts_for_jobs_that_ask_for_copies(
    open_worker: OpenWorker, tmp_path: Path, file_system: str
) -> None:
    bundle = two_steps(tmp_path / "bundle", first=SEE + SIMULATE)
    submitted = files_below(bundle / "data")
    with open_worker() as worker:
        worker.service.run("queue", "set", QUEUE_ID, "--file-system", file_system)
        job = worker.work(worker.submit(bundle))
        worker.assert_nothing_left()
        worker.rig.client.sync_output(QUEUE_ID)
        log = worker.log(job)

    assert_seen(log, submitted)
    assert_outputs(bundle / "data")
    mounted = any(" - overlay " in line or " - fuse" in line for line in log.splitlines())
    assert mounted == (file_system == "VIRTUAL")


def assert_seen(log: str, submitted: Mapping[str, FileFacts]) -> None:
    """The first task saw the tree as it was submitted, by names, sizes, times and content."""
    seen = [line.partition(" INFO SEEN ")[2] for line in log.splitlines() if " INFO SEEN " in line]
    facts = [
        f"{path} {entry.size} {entry.mtime_us} {entry.sha256}" for path, entry in submitted.items()
    ]
    assert sorted(seen[: len(facts)]) == sorted(facts)


@pytest.mark.slow
@pytest.mark.parametrize("file_system", ["COPIED", "VIRTUAL"])
def test_a_job_of_five_thousand_inputs(
    open_worker: OpenWorker, tmp_path: Path, file_system: str
) -> None:
    files: dict[str | bytes, bytes | int] = {
        f"{at % 50:02}/{at:04}.exr": 1000 + at for at in range(5000)
    }
    directory = tmp_path / "bundle"
    write_files(directory / "data", files, mtime_ns=MTIME_NS)
    submitted = files_below(directory / "data")
    bundle = write_bundle(directory, job_template(step("Look", SEE + COPY)))
    with open_worker() as worker:
        job = worker.work(worker.submit(bundle, file_system=file_system))
        worker.assert_nothing_left()
        outputs = assert_downloads(worker, job, bundle / "data")
        log = worker.log(job)

    assert_seen(log, submitted)
    copied = {f"out/{path}": one for path, one in submitted.items() if path < "02"}
    assert outputs == {path: (one.size, one.sha256) for path, one in copied.items()}
    [sync] = [action for action in job.actions if action.kind == "syncInputJobAttachments"]
    if file_system == "COPIED":
        assert sync.percents == sorted(sync.percents)
        assert sync.percents[-1] == 100


@pytest.mark.slow
@pytest.mark.parametrize("file_system", ["COPIED", "VIRTUAL"])
@pytest.mark.parametrize("service_user", ["root", "agent"])
def test_a_job_that_is_cancelled_in_its_task_leaves_nothing(
    open_worker: OpenWorker,
    tmp_path: Path,
    file_system: str,
    service_user: Literal["root", "agent"],
) -> None:
    bundle = two_steps(tmp_path / "bundle", first="cat scene.usd > /dev/null; sleep 600")
    setting = Setting(service_user, mounts=file_system == "VIRTUAL")
    with open_worker(setting) as worker:
        job_id = worker.submit(bundle, file_system=file_system)
        job = worker.rig.service.job(job_id)
        worker.rig.service.wait_until(
            lambda: any(run.status == "RUNNING" for run in job.task_runs),
            seconds=JOB_SECONDS,
            what="a running task",
        )
        worker.rig.service.cancel(job_id)
        worker.rig.service.wait_for(job_id, seconds=JOB_SECONDS)
        worker.assert_nothing_left()

    assert [run.status for run in job.task_runs] == ["CANCELED", "NEVER_ATTEMPTED"]


@pytest.mark.slow
def test_a_job_that_is_cancelled_while_its_inputs_come_leaves_nothing(
    open_worker: OpenWorker, tmp_path: Path
) -> None:
    files: dict[str | bytes, bytes | int] = {f"{at:04}.exr": 200_000 + at for at in range(3000)}
    directory = tmp_path / "bundle"
    write_files(directory / "data", files, mtime_ns=MTIME_NS)
    bundle = write_bundle(directory, job_template(step("Look", "true")))
    with open_worker() as worker:
        job_id = worker.submit(bundle)
        job = worker.rig.service.job(job_id)
        worker.rig.service.wait_until(
            lambda: any(action.percents for action in job.actions),
            seconds=JOB_SECONDS,
            what="a sync with progress",
        )
        worker.rig.service.cancel(job_id)
        worker.rig.service.wait_for(job_id, seconds=JOB_SECONDS)
        worker.assert_nothing_left()

    assert job.actions[0].status == "CANCELED"
