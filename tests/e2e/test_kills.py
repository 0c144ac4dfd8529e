"""Commands killed at random moments and run again: the same result, and nothing fetched twice.

The moment is drawn from the time that a whole run takes here, the shortest so far, as the machine
may be busy with others at any time; the seed is fixed. A kill counts only if it met a process that
was still at work, and there are as many as a test's name says.
"""

import json
import math
import random
import re
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.manifest import decode
from agent_plugin.session.finish_task import TaskAction
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action, job_of, job_with_outputs, step
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files

FILES: dict[str | bytes, bytes | int] = {
    **{f"tex/{at % 5}/{at}.tx": 20_000 + at for at in range(60)},
    "twice/a": 30_000,
    "twice/b": 30_000,
    "empty": b"",
    "big.abc": 20_000_000,
}
# Below this a blob comes slowly, so that a command is mostly fetching: a sixth of a second each.
SLOW_BYTES_PER_SECOND = 120_000
MTIME_NS = 1_600_000_000_123_457_000

# Of the start that is killed again and again, and how long any run of it may take.
MANY = 4000
KILLS = 20
START_SECONDS = 600.0

Round = Callable[[str, list[float]], None]


@dataclass
class Killer:
    """Who runs commands behind the proxy, each time on a fresh host, and kills them.

    Attributes:
        url: Of a store that nobody else has.
        seconds: The least that a command took which was not killed.
        hits: How many kills met a process that was still at work.
    """

    tmp_path: Path
    proxy: FaultProxy
    s3: S3Server
    url: str
    seconds: float = math.inf
    hits: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(20_261_122))

    def host(self, name: str) -> Host:
        return Host(
            self.tmp_path / name, self.url, environment=self.s3.environment_at(self.proxy.url)
        )

    def until_hit(self, kills: int, play: Round) -> None:
        """Play rounds until so many kills have hit; every fourth is killed a second time."""
        play("unharmed", [])
        rounds = 0
        while self.hits < kills:
            assert rounds < 10 * kills, "the kills come too late to show anything"
            moments = [self.chance.uniform(0, self.seconds) for _ in range(1 + (rounds % 4 == 3))]
            play(f"round-{rounds}", moments)
            rounds += 1

    def kill_and_resume(
        self,
        host: Host,
        arguments: Sequence[str],
        moments: list[float],
        *,
        look: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Kill a command after each of the moments, let it finish at last; return what it prints.

        Whatever it fetches is fetched once, by whichever run. `look` is called after each kill.
        """
        finished: set[str] = set()
        self.proxy.forget()
        for at, moment in enumerate(moments):
            process = host.popen(*arguments)
            time.sleep(moment)
            process.kill()
            process.communicate()
            if process.returncode == -signal.SIGKILL:
                self.hits += 1
            elif at == 0:
                self.seconds = min(self.seconds, moment)
            # What the killed process had sent is still being read.
            until(lambda: not self.proxy._open_connections())
            self.assert_fetched_none_of(finished)
            finished = finished_blobs(host)
            look()
            self.proxy.forget()
        begun = time.monotonic()
        done = host.run(*arguments)
        if not moments:
            self.seconds = min(self.seconds, time.monotonic() - begun)
        assert done.returncode == 0, done.stderr
        self.assert_fetched_none_of(finished)
        twice = [blob for blob, count in self.fetched().items() if count > 1]
        assert twice == [], "fetched twice in one run"
        # More than one if a kill came between the last file and the end of the command.
        assert {row.status for row in host.transfers()} == {TransferStatus.DONE}
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed

    def is_beyond(self, process: "subprocess.Popen[str]", goal: int) -> bool:
        """Tell whether a process has asked for so many blobs, or is at its end."""
        # Not more often: it costs the process its time.
        time.sleep(0.1)
        return process.poll() is not None or self.proxy.count("GET", "/Data/") >= goal

    def assert_fetched_none_of(self, finished: set[str]) -> None:
        again = finished & {blob for blob, _ in self.fetched()}
        assert not again, "a finished blob was fetched again"

    def fetched(self) -> Counter[tuple[str, str]]:
        """Return how often each range of each blob was asked for."""
        return Counter(
            (request.key.rpartition("/")[2][:32], request.headers.get("range", ""))
            for request in self.proxy.requests
            if request.method == "GET" and "/Data/" in request.key
        )


def finished_blobs(host: Host) -> set[str]:
    """Return the hashes of the blobs that the cache has under their names."""
    return {
        path.name
        for path in host.cache_dir.glob("v1/*/??/*")
        if re.fullmatch("[0-9a-f]{32}", path.name)
    }


@pytest.fixture
def killer(s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path) -> Killer:
    return Killer(tmp_path, fault_proxy, s3, f"s3://{s3.bucket}/root-{uuid.uuid4().hex}")


def make_slow(proxy: FaultProxy, root: Path) -> None:
    """Let each blob of a tree but the large one come slowly."""
    big = Digest.of((root / "big.abc").read_bytes()).hex
    proxy.inject(Fault.DRIP, key=f"Data/(?!{big})", bytes_per_second=SLOW_BYTES_PER_SECOND)


# ------------------------------------------------------------------------------------------- start


@pytest.fixture
def starts(killer: Killer) -> Round:
    """Return how a session of one job is started, killed and started again."""
    source = killer.tmp_path / "source"
    write_files(source, FILES, mtime_ns=MTIME_NS)
    (source / "twice/b").write_bytes((source / "twice/a").read_bytes())
    submitter = Host(killer.tmp_path / "submitter", killer.url, environment=killer.s3.environment)
    job = job_of(submitter.submit(source)[0])
    facts = files_below(source)
    make_slow(killer.proxy, source)

    def play(name: str, moments: list[float]) -> None:
        host, session = killer.host(name), killer.tmp_path / f"{name}-session"
        printed = killer.kill_and_resume(host, host.start_arguments(job, session), moments)
        root = Path(printed["roots"][0]["localRoot"])
        assert files_below(root) == facts
        assert [path.name for path in session.iterdir()] == [root.name]

    return play


@pytest.mark.timeout(600)
def test_five_kills_of_a_start_lose_nothing(killer: Killer, starts: Round) -> None:
    killer.until_hit(5, starts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_of_a_start_lose_nothing(killer: Killer, starts: Round) -> None:
    killer.until_hit(50, starts)


def noted(host: Host) -> set[str]:
    """Return the hashes of the blobs whose files the ledger has as done."""
    with Ledger.open(host.state_dir / "ledger.db") as ledger:
        return {
            task.source
            for row in ledger.transfers()
            for task in ledger.tasks(row.id)
            if task.status is TaskStatus.DONE
        }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_t1_twenty_kills_of_one_start_of_thousands_of_files_lose_nothing(killer: Killer) -> None:
    """One start, killed again and again: what is in the cache, or noted, is never asked for again.

    What was asked for and is in neither was under way: in a request, or in memory.
    """
    source = killer.tmp_path / "source"
    files: dict[str | bytes, bytes | int] = {
        f"tex/{at % 40}/{at}.tx": 1000 + at for at in range(MANY)
    }
    write_files(
        source, files | {"big.abc": 20_000_000, "tex/big.abc": 30_000_000}, mtime_ns=MTIME_NS
    )
    submitter = Host(killer.tmp_path / "submitter", killer.url, environment=killer.s3.environment)
    job = job_of(submitter.submit(source)[0])
    facts = files_below(source)
    host, session = killer.host("host"), killer.tmp_path / "session"
    arguments = host.start_arguments(job, session)
    finished: set[str] = set()
    lost = 0

    # Not the last ones, which come faster than anybody could kill.
    for goal in sorted(killer.chance.randrange(MANY * 4 // 5) for _ in range(KILLS)):
        killer.proxy.forget()
        process = host.popen(*arguments)
        try:
            until(
                partial(killer.is_beyond, process, max(1, goal - len(finished))),
                seconds=START_SECONDS,
            )
            time.sleep(killer.chance.uniform(0, 0.05))
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL, "it came to its end before it was killed"
        until(lambda: not killer.proxy._open_connections())
        killer.assert_fetched_none_of(finished)
        finished = finished_blobs(host) | noted(host)
        lost += len({blob for blob, _ in killer.fetched()} - finished)

    killer.proxy.forget()
    process = host.popen(*arguments)
    output, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, errors
    killer.assert_fetched_none_of(finished)
    print(f"{MANY} files, {KILLS} kills: {lost} blobs were under way when they came")
    root = Path(json.loads(output)["roots"][0]["localRoot"])
    assert files_below(root) == facts
    assert [path.name for path in session.iterdir()] == [root.name]
    assert {row.status for row in host.transfers()} == {TransferStatus.DONE}


# --------------------------------------------------------------------------------------- sync-step


@pytest.fixture
def syncs(killer: Killer) -> Round:
    """Return how a step's dependencies are brought to a fresh session, killed and brought again."""
    job = job_with_outputs(killer.url, "/show", ".")
    before = Host(killer.tmp_path / "before", killer.url, environment=killer.s3.environment)
    started = before.start(job, killer.tmp_path / "session-before")
    made = Path(started.roots[0].local_root)
    write_files(made, FILES, mtime_ns=MTIME_NS)
    (made / "twice/b").write_bytes((made / "twice/a").read_bytes())
    before.finish_task(killer.tmp_path / "session-before", action(1, 0))
    facts = files_below(made)
    make_slow(killer.proxy, made)

    def play(name: str, moments: list[float]) -> None:
        host, session = killer.host(name), killer.tmp_path / f"{name}-session"
        root = Path(host.start(job, session).roots[0].local_root)
        # Not empty, so that it is changed in place.
        write_files(root, {"tex/0/0.tx": b"older"}, mtime_ns=MTIME_NS)
        arguments = ["session", "sync-step", "--session-dir", str(session), "--json"]
        killer.kill_and_resume(
            host, [*arguments, "--step-id", step(2), "--depends-on", step(1)], moments
        )
        assert files_below(root) == facts
        assert not [path for path in session.rglob("*") if is_partial(path.name)]
        finished = host.finish_task(session, action(2, 0))
        assert (finished.files, finished.deleted) == (0, []), "what was brought is no output"

    return play


@pytest.mark.timeout(600)
def test_five_kills_of_a_sync_lose_nothing(killer: Killer, syncs: Round) -> None:
    killer.until_hit(5, syncs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_of_a_sync_lose_nothing(killer: Killer, syncs: Round) -> None:
    killer.until_hit(50, syncs)


# ------------------------------------------------------------------------------------- finish-task


def outputs_are_whole(s3: S3Server, url: str) -> list[list[str]]:
    """See that every output manifest names only blobs that are there; return their paths."""
    client = s3.client()
    prefix = url.rpartition("/")[2]
    keys = [
        found["Key"]
        for found in client.list_objects_v2(Bucket=s3.bucket, Prefix=f"{prefix}/").get(
            "Contents", []
        )
    ]
    manifests = []
    for key in keys:
        if key.endswith("_output"):
            data = client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()
            manifests.append(decode(data, source=key).entries)
            assert all(f"{prefix}/Data/{entry.hash}.xxh128" in keys for entry in manifests[-1])
    return [[entry.path for entry in entries] for entries in manifests]


def finishes(killer: Killer, run: TaskAction) -> Round:
    """Return how what a task left is stored, killed and stored again."""
    outputs = sorted(f"renders/{n}.exr" for n in range(60))

    def play(name: str, moments: list[float]) -> None:
        killer.url = f"s3://{killer.s3.bucket}/root-{uuid.uuid4().hex}"
        host, session = killer.host(name), killer.tmp_path / f"{name}-session"
        started = host.start(job_with_outputs(killer.url, "/show", "renders"), session)
        root = Path(started.roots[0].local_root)
        write_files(root, {name: 20_000 + at for at, name in enumerate(outputs)}, mtime_ns=MTIME_NS)
        task = ["--task-id", run.task_id] if run.task_id else []
        arguments = [
            "session", "finish-task", "--session-dir", str(session), "--step-id", run.step_id,
            *task, "--session-action-id", run.session_action_id,
            "--started-at", repr(run.started_at), "--json",
        ]  # fmt: skip
        look = partial(outputs_are_whole, killer.s3, killer.url)
        printed = killer.kill_and_resume(host, arguments, moments, look=look)
        assert printed["files"] == 60, "also if it was killed after all was stored and noted"
        assert printed["bytesUploaded"] + printed["bytesReused"] == sum(
            found.size for found in files_below(root).values()
        )
        assert outputs_are_whole(killer.s3, killer.url) == [outputs]
        assert sorted(files_below(root)) == outputs
        again = json.loads(host.run(*arguments).stdout)
        assert again | {"seconds": 0} == printed | {"seconds": 0}

    return play


@pytest.mark.timeout(600)
def test_five_kills_of_a_finish_lose_nothing(killer: Killer) -> None:
    killer.until_hit(5, finishes(killer, action(started_at=1_700_000_000.0)))


@pytest.mark.timeout(600)
def test_five_kills_of_the_finish_of_a_chunk_lose_nothing(killer: Killer) -> None:
    killer.until_hit(5, finishes(killer, action(1, None, started_at=1_700_000_000.0)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task_number", [0, None], ids=["task", "chunk"])
def test_fifty_kills_of_a_finish_lose_nothing(killer: Killer, task_number: int | None) -> None:
    killer.until_hit(50, finishes(killer, action(1, task_number, started_at=1_700_000_000.0)))
