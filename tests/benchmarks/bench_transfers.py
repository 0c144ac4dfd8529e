"""What the ledger takes for a large transfer, and how soon a transfer in flight obeys.

A transfer of 100,000 tasks is created; then transfers are found by their status, its failed tasks
are found and excluded, and it is archived. The same number of files, in 100 directories, is given
to `propmaster transfer create`, as one directory and each by itself in a document; measured is the
whole command. A session start of 400 blobs, whose store answers each
request after 0.3 s, is paused, resumed and aborted by another process: measured is how long after
the change was written the last request began (pause), the first one began (resume), and the process
was gone (abort, which includes the end of the interpreter).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent_plugin.cli.demo_store import DemoStore
from agent_plugin.transfer.entities import Found
from agent_plugin.transfer.find import Search, find
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
from agent_plugin.transfer.query import parse
from agent_plugin.transfer.states import TransferStatus
from tests.benchmarks.farm import BUCKET, ROUNDS
from tests.benchmarks.rounds import lines
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, job_of
from tests.servers.trees import write_files

TASKS: Final = 100_000
DIRECTORIES: Final = 100
TRANSFERS: Final = 200
EXCLUDED: Final = 1000
BLOBS: Final = 400
ANSWER_SECONDS: Final = 0.3
# After a pause nothing further is asked for; longer than a reaction may take.
WATCH_SECONDS: Final = 2.5
POLL_SECONDS: Final = 0.005
WHO: Final = "0:bench"

STEER = """
import sys, time
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TransferStatus
with Ledger.open(Path(sys.argv[1])) as ledger:
    ledger.set_transfer(int(sys.argv[2]), status=TransferStatus(sys.argv[3]))
    print(time.monotonic())
"""


def run() -> Iterator[dict[str, object]]:
    """Yield what the ledger takes, then how soon a session start obeys."""
    measured: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as directory:
            for name, seconds in _ledger(Path(directory)):
                measured.setdefault(name, []).append(seconds)
    yield from lines("ledger, 100,000 tasks", measured, reference="create")
    yield from _commands()
    reactions: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory, DemoStore(Path(directory) / "s3") as store:
        store.create_bucket(BUCKET)
        credentials = (store.access_key, store.secret_key)
        with FaultProxy(store.endpoint_url, seed=0, credentials=credentials) as proxy:
            for number in range(ROUNDS):
                home = Path(directory) / f"round-{number}"
                for name, seconds in _steer(home, store, proxy):
                    reactions.setdefault(name, []).append(seconds)
            proxy.clear()
    yield from lines("steered from another process", reactions, reference="pause")


def _commands() -> Iterator[dict[str, object]]:
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        source = home / "files"
        for at in range(DIRECTORIES):
            (source / f"set-{at}").mkdir(parents=True)
        names = [f"{source}/set-{at % DIRECTORIES}/{at}.tx" for at in range(TASKS)]
        for name in names:
            Path(name).touch()
        document = home / "document.json"
        document.write_text(json.dumps({"tasks": names, "destination": "s3://bucket/to/"}))
        for number in range(ROUNDS):
            for what, words in (
                ("of a directory", (f"{source}/", "s3://bucket/to/")),
                ("of a document", ("--spec", os.fspath(document))),
            ):
                host = Host(home / f"{what} {number}", f"file://{home}/store")
                begun = time.perf_counter()
                done = host.run("transfer", "create", *words)
                measured.setdefault(what, []).append(time.perf_counter() - begun)
                assert done.returncode == 0, done.stderr
    yield from lines(
        "transfer create, 100,000 files", measured, reference="of a directory", files=TASKS
    )


def _ledger(directory: Path) -> Iterator[tuple[str, float]]:
    tasks = [
        TaskSpec(f"{at:032x}", f"textures/set-{at % 100}/{at}.tx", 1000 + at) for at in range(TASKS)
    ]
    path = directory / "ledger.db"
    with Ledger.open(path) as ledger:
        for at in range(TRANSFERS):
            ledger.create(TransferSpec("copy", "/from", f"/to/{at}"), tasks[:1])
        begun = time.perf_counter()
        row = ledger.create(TransferSpec("copy", "/from", "/to"), tasks)
        yield "create", time.perf_counter() - begun
        begun = time.perf_counter()
        assert len(_find(path, "transfer WHERE status=waiting")) == TRANSFERS + 1
        yield "find transfers by status", time.perf_counter() - begun
        begun = time.perf_counter()
        assert _find(path, f"task WHERE job.id={row.id} AND status=failed") == []
        yield "find failed tasks, none", time.perf_counter() - begun
        ids = [*ledger.news(row.id).tasks][:EXCLUDED]
        begun = time.perf_counter()
        ledger.set_tasks(row.id, {task: {"status": "excluded"} for task in ids}, WHO)
        yield "exclude 1,000 tasks", time.perf_counter() - begun
        begun = time.perf_counter()
        ledger.set_transfer(row.id, status=TransferStatus.PAUSED, modifier=WHO)
        yield "pause", time.perf_counter() - begun
        ledger.set_transfer(row.id, status=TransferStatus.ABORTED, modifier=WHO)
        begun = time.perf_counter()
        ledger.archive(row.id)
        yield "archive", time.perf_counter() - begun


def _find(ledger: Path, text: str) -> list[Found]:
    return find(ledger, Search(query=parse(text), now=time.time()))


def _steer(home: Path, store: DemoStore, proxy: FaultProxy) -> Iterator[tuple[str, float]]:
    url = f"s3://{BUCKET}/{home.name}"
    write_files(home / "source", {str(at): 1000 + at for at in range(BLOBS)}, mtime_ns=10**18)
    submitter = Host(home / "submitter", url, environment=store.environment)
    job = job_of(submitter.submit(home / "source")[0])
    host = Host(
        home / "host", url, environment={**store.environment, "AWS_ENDPOINT_URL_S3": proxy.url}
    )
    proxy.clear()
    proxy.inject(Fault.STALL, key="Data/", seconds=ANSWER_SECONDS)
    process = host.popen(*host.start_arguments(job, home / "session"))
    ledger = host.state_dir / "ledger.db"
    while not (ledger.exists() and any(row.done for row in host.transfers())):
        time.sleep(0.02)
    [row] = host.transfers()
    written = _set(host, ledger, row.id, "paused")
    # None may have begun after it; what is looked at this often can not be told to be less.
    yield "pause", max(POLL_SECONDS, _last_request(proxy, written) - written)
    before = proxy.count("GET", "Data/")
    written = _set(host, ledger, row.id, "waiting")
    while proxy.count("GET", "Data/") == before:
        time.sleep(0.005)
    yield "resume", time.monotonic() - written
    written = _set(host, ledger, row.id, "aborted")
    process.communicate(timeout=60)
    yield "abort, until the process is gone", time.monotonic() - written
    assert process.returncode == 100


def _set(host: Host, ledger: Path, transfer: int, status: str) -> float:
    """Set a state by another process; return when it was written."""
    done = subprocess.run(
        [sys.executable, "-c", STEER, ledger, str(transfer), status],
        env={**os.environ, **host.process_environment()},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def _last_request(proxy: FaultProxy, written: float) -> float:
    """Return when the last request arrived, of those that come within WATCH_SECONDS."""
    count, last = proxy.count("GET", "Data/"), written
    while time.monotonic() < written + WATCH_SECONDS:
        time.sleep(POLL_SECONDS)
        if (now := proxy.count("GET", "Data/")) != count:
            count, last = now, time.monotonic()
    return last
