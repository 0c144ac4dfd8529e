"""`outputs sync`: what is new comes once, whatever happens meanwhile."""

import json
import os
import shutil
import signal
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from agent_plugin.cli.outputs_sync import SKEW_SECONDS, sync_command
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobNotFoundError,
    InputError,
    StoreAccessError,
    TransferStateError,
    UnsafePathError,
)
from agent_plugin.session.job import PathMappingRule
from agent_plugin.session.path_rules import PathRules, checked_rules, read_rules
from tests.servers.disks import MEBIBYTE, image_mounted
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import FARM, QUEUE
from tests.servers.proxied_object import until
from tests.servers.render_queue import MTIME_NS, RenderQueue, job_id
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below

ALL = ("--bootstrap-lookback-minutes", "inf")


@pytest.fixture
def queue(tmp_path: Path) -> RenderQueue:
    return RenderQueue(tmp_path, f"file://{tmp_path}/store")


@pytest.fixture
def queue_in_memory(tmp_path: Path) -> Iterator[RenderQueue]:
    """A queue for tests that sync hundreds of files and do not ask what a power cut leaves.

    A disk that others write to may take half a second for each.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield RenderQueue(tmp_path, f"file://{tmp_path}/store")
        return
    with tempfile.TemporaryDirectory(prefix="propmaster-tests-", dir=memory) as directory:
        yield RenderQueue(Path(directory), f"file://{directory}/store")


@pytest.fixture(params=["directory", "s3"])
def any_queue(request: pytest.FixtureRequest, tmp_path: Path) -> RenderQueue:
    if request.param == "directory":
        return RenderQueue(tmp_path, f"file://{tmp_path}/store")
    s3: S3Server = request.getfixturevalue("s3")
    return RenderQueue(tmp_path, f"s3://{s3.bucket}/root-{uuid.uuid4().hex}", s3.environment)


def blob_of(queue: RenderQueue, data: bytes) -> Path:
    return queue.directory / "store/Data" / f"{Digest.of(data).hex}.xxh128"


def contents(root: Path) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in files_below(root)}


# ------------------------------------------------------------------------------------ incremental


def test_sync_brings_what_is_new_and_each_thing_once(any_queue: RenderQueue) -> None:
    q = any_queue
    q.render(1, {"a/1.exr": 3000, "a/2.exr": b"two"}, task=0)
    q.render(1, {"a/3.exr": b""}, task=1)
    q.render(2, {"b/1.exr": b"of job 2"}, task=None)

    first = q.sync()

    assert (first.files, first.failures, first.result.first) == (4, [], True)
    assert {at: job.manifests for at, job in first.jobs.items()} == {job_id(1): 2, job_id(2): 1}
    found = files_below(q.show)
    assert sorted(found) == ["a/1.exr", "a/2.exr", "a/3.exr", "b/1.exr"]
    assert found["a/2.exr"].mtime_us == MTIME_NS // 1000 + 1_000_001

    again = q.sync()
    assert (again.jobs, again.files, again.result.bytes_fetched) == ({}, 0, 0)

    q.render(2, {"b/2.exr": b"more"}, task=5)
    (q.show / "a/1.exr").unlink()
    third = q.sync()
    assert {at: job.files for at, job in third.jobs.items()} == {job_id(2): 1}
    # What was brought and taken away by its user does not come back.
    assert sorted(files_below(q.show)) == ["a/2.exr", "a/3.exr", "b/1.exr", "b/2.exr"]


def test_sync_takes_no_earlier_outputs_unless_they_are_asked_for(queue: RenderQueue) -> None:
    queue.render(1, {"old": b"old"})
    past = time.time() - 3600
    os.utime(next(iter(queue.manifests)), (past, past))

    first = queue.sync(lookback=1)
    queue.render(2, {"new": b"new"})
    second = queue.sync(lookback=7200)

    assert (first.jobs, first.result.first) == ({}, True)
    # Only a beginning looks back.
    assert contents(queue.show) == {"new": b"new"}
    assert (second.result.first, second.result.since) == (False, first.result.since)
    assert queue.sync(anew=True, lookback=1800).files == 1
    assert queue.sync(anew=True, lookback=7200).files == 2
    assert contents(queue.show) == {"old": b"old", "new": b"new"}


def test_sync_of_a_named_job_brings_all_of_it_and_nothing_else(queue: RenderQueue) -> None:
    for number in (1, 2):
        queue.render(number, {f"{number}": b"x"})
    past = time.time() - 3600
    for manifest in queue.manifests:
        os.utime(manifest, (past, past))
    queue.sync(lookback=1)

    named = queue.sync(job_id(1))

    assert [*named.jobs] == [job_id(1)]
    assert contents(queue.show) == {"1": b"x"}
    assert queue.sync(job_id(1)).jobs == {}
    assert queue.sync().jobs == {}


def test_sync_gives_each_place_to_the_newest_of_all_jobs(queue: RenderQueue) -> None:
    """Also to one that has come before: a job that comes late does not bring back what is older.

    Seen to fail when only new manifests have a say.
    """
    moments = iter(range(100))

    def render(number: int, files: dict[str | bytes, bytes | int]) -> None:
        before = queue.manifests
        queue.render(number, files, task=next(moments))
        [new] = queue.manifests - before
        moment = 1_700_000_000 + 10 * next(moments)
        os.utime(new, (moment, moment))

    render(1, {"p": b"1 first", "only 1": b"1"})
    render(2, {"p": b"2 second", "q": b"2 second"})
    render(1, {"q": b"1 third"})
    assert queue.sync().files == 3
    assert contents(queue.show) == {"p": b"2 second", "q": b"1 third", "only 1": b"1"}

    # The checkpoint of a sync that was killed when it had brought job 2 only.
    lines = queue.checkpoint.read_bytes().splitlines(keepends=True)
    queue.checkpoint.write_bytes(b"".join(line for line in lines if job_id(1).encode() not in line))
    assert [*queue.sync().jobs] == [job_id(1)]
    assert contents(queue.show) == {"p": b"2 second", "q": b"1 third", "only 1": b"1"}


def test_sync_forgets_what_the_store_has_no_longer(queue: RenderQueue) -> None:
    queue.render(1, {"1": b"1"})
    queue.render(2, {"2": b"2"})
    queue.sync()
    for path in queue.manifests:
        if job_id(1) in str(path):
            path.unlink()

    queue.sync()

    text = queue.checkpoint.read_text()
    assert job_id(1) not in text
    assert job_id(2) in text


def test_a_dry_run_tells_and_changes_nothing(queue: RenderQueue) -> None:
    queue.render(1, {"a": b"12345"})

    synced = queue.sync(dry_run=True)

    assert (synced.result.dry_run, synced.files, synced.result.bytes) == (True, 1, 5)
    assert synced.of(1).roots == [str(queue.show)]
    assert not queue.show.exists()
    assert not queue.checkpoint.parent.exists()
    assert queue.sync().files == 1


def test_the_command_syncs_tells_and_exits_with_the_first_failure(queue: RenderQueue) -> None:
    queue.render(1, {"bad": b"will be lost"})
    queue.render(2, {"good": b"stays"})
    blob_of(queue, b"will be lost").unlink()

    done = queue.artist.run(*queue.argv(*ALL))

    assert done.returncode == 69, done.stderr
    assert job_id(1) in done.stderr
    result = json.loads(done.stdout)
    assert {job["jobId"]: job["state"] for job in result["jobs"]} == {
        job_id(1): "failed",
        job_id(2): "synced",
    }
    assert (result["failed"], result["files"]) == (1, 1)
    assert contents(queue.show) == {"good": b"stays"}
    plain = queue.artist.run(*queue.argv(*ALL)[:-1])
    assert f"job {job_id(1)}: failed, 0 files: bad: " in plain.stdout
    assert "the task that made it has to run again" in plain.stderr
    assert "counts for the first sync only" in plain.stderr


def test_a_first_sync_allows_for_a_host_whose_clock_is_fast(queue: RenderQueue) -> None:
    (queue.directory / "store").mkdir()
    begun = queue.command()
    queue.render(1, {"early": b"by the store's clock"})
    queue.render(2, {"old": b"old"})
    early, old = (at for job in (1, 2) for at in queue.manifests if job_id(job) in str(at))
    for path, ago in ((early, 110), (old, 200)):
        moment = begun["since"] + SKEW_SECONDS - ago
        os.utime(path, (moment, moment))

    result = queue.command()

    assert (begun["first"], begun["files"]) == (True, 0)
    assert {job["jobId"]: job["files"] for job in result["jobs"]} == {job_id(1): 1}


# ------------------------------------------------------------------------------- kills, checkpoint


@pytest.mark.timeout(300)
def test_a_sync_that_is_killed_again_and_again_loses_nothing_and_brings_nothing_twice(
    queue_in_memory: RenderQueue,
) -> None:
    """Seen to fail when a job is noted before its files are in place, and when it never is."""
    kills = _Kills(queue_in_memory)

    checkpoint = queue_in_memory.checkpoint
    for jobs in (1, 2, 4, 6):
        kills.kill(lambda jobs=jobs: len(_jobs_in(checkpoint)) >= jobs)  # type: ignore[misc]

    assert kills.inodes
    kills.assert_all_came()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_a_checkpoint_names_survives_a_power_cut(
    queue: RenderQueue, tmp_path: Path, kind: str
) -> None:
    """Seen to leave empty files for good: the checkpoint was on its disk, and they on none.

    A disk's image is copied as it is at that moment, and mounted as after a power cut.
    """
    queue.render(1, {"a/1.exr": 30_000, "a/b/2.exr": b"two"})
    disk, cut_off = tmp_path / "disk", tmp_path / "cut off"
    shutil.rmtree(queue.show, ignore_errors=True)
    with image_mounted(kind, disk, queue.show, size=128 * MEBIBYTE):
        assert queue.sync().files == 2
        brought = contents(queue.show)
        shutil.copyfile(disk, cut_off)

    with image_mounted(kind, cut_off, queue.show):
        found = contents(queue.show)
        assert {path: found[path] for path in brought} == brought


def test_a_sync_may_be_killed_at_any_moment(queue: RenderQueue) -> None:
    """From before it has read anything to after it has brought the last file."""
    kills = _Kills(queue)
    begun = time.monotonic()
    queue.command("--dry-run")
    # What a sync takes until it brings something; all that differs between machines.
    seconds = time.monotonic() - begun

    for at in range(24):
        moment = time.monotonic() + seconds * (0.2 + 0.06 * at)
        kills.kill(lambda moment=moment: time.monotonic() >= moment)  # type: ignore[misc]

    kills.assert_all_came()


class _Kills:
    """Eight jobs, and syncs of them that are killed; what was noted must be in place and stay."""

    def __init__(self, queue: RenderQueue) -> None:
        self.queue = queue
        self.expected: dict[str, bytes] = {}
        self.inodes: dict[str, int] = {}
        self.killed = 0
        for number in range(1, 9):
            files: dict[str | bytes, bytes | int] = {}
            for at in range(25):
                files[f"{number}/{at}.exr"] = data = os.urandom(20_000)
                self.expected[f"{number}/{at}.exr"] = data
            queue.render(number, files)
        # Begins, and brings nothing: there is no such job.
        queue.sync(job_id(99))

    def kill(self, when: Callable[[], bool]) -> None:
        running = self.queue.artist.popen(*self.queue.argv())
        late = time.monotonic() + 60
        while not when() and running.poll() is None and time.monotonic() < late:
            time.sleep(0.001)
        # A sync that hangs tells where: the interpreter's own handler writes all stacks.
        running.send_signal(signal.SIGKILL if time.monotonic() < late else signal.SIGABRT)
        _, errors = running.communicate(timeout=30)
        assert running.returncode != -signal.SIGABRT, errors
        self.killed += running.returncode == -signal.SIGKILL
        self._check()

    def _check(self) -> None:
        for number in _jobs_in(self.queue.checkpoint):
            for name in (f"{number}/{at}.exr" for at in range(25)):
                path = self.queue.show / name
                assert path.read_bytes() == self.expected[name], "noted, and not in place"
                inode = path.stat().st_ino
                assert self.inodes.setdefault(name, inode) == inode, "brought twice"

    def assert_all_came(self) -> None:
        assert self.killed > 2
        self.queue.sync()
        self._check()
        assert contents(self.queue.show) == self.expected
        assert self.queue.sync().jobs == {}


def _jobs_in(checkpoint: Path) -> list[int]:
    if not checkpoint.exists():
        return []
    lines = checkpoint.read_bytes().split(b"\n")[1:-1]
    return [int(json.loads(line)["jobId"][4:], 16) for line in lines]


def test_the_checkpoint_is_private_versioned_and_of_one_store(queue: RenderQueue) -> None:
    queue.render(1, {"a": b"1"})
    queue.sync()

    [first, *lines] = [json.loads(line) for line in queue.checkpoint.read_text().splitlines()]
    assert stat.S_IMODE(queue.checkpoint.stat().st_mode) == 0o600
    assert (first["version"], first["queueId"], first["scope"]) == (1, QUEUE, "own")
    assert first["storeUrl"] == queue.store_url
    assert [line["jobId"] for line in lines] == [job_id(1)]
    assert sorted(path.name for path in queue.checkpoint.parent.iterdir()) == [
        f"{QUEUE}_own.jsonl",
        f"{QUEUE}_own.jsonl.lock",
    ]

    queue.store_url += "-other"
    with pytest.raises(TransferStateError, match="is of a sync with store url"):
        queue.sync()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text.replace('"taken"', '"token"'), "line 2"),
        (lambda text: text.replace('{"jobId"', '"jobId"'), "line 2"),
        (lambda text: text.replace('"version":1', '"version":2'), "of version 2"),
        (lambda text: text[30:], "line 1"),
        (lambda _: "", "no first line"),
        (lambda text: text.replace('"since"', '"hence"'), "line 1"),
        (lambda text: f"{text[:9]}\xff{text[9:]}", "line 1"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_left_as_it_is(
    queue: RenderQueue, damage: Any, told: str
) -> None:
    queue.render(1, {"a": b"1"})
    queue.sync()
    damaged = damage(queue.checkpoint.read_text()).encode("latin-1")
    queue.checkpoint.write_bytes(damaged)

    with pytest.raises(TransferStateError) as refused:
        queue.sync()

    assert told in refused.value.message
    assert "--force-bootstrap" in refused.value.hint
    assert queue.checkpoint.read_bytes() == damaged
    assert queue.sync(anew=True).result.bytes_fetched == 0


def test_a_line_that_a_kill_has_cut_short_counts_for_nothing(queue: RenderQueue) -> None:
    queue.render(1, {"a": b"1"})
    queue.sync()
    whole = queue.checkpoint.read_bytes()
    queue.checkpoint.write_bytes(whole[:-20])

    synced = queue.sync()

    assert (synced.of(1).files, synced.result.bytes_fetched) == (1, 0)
    assert queue.checkpoint.read_bytes() == whole


def test_two_syncs_at_once_are_refused_and_a_killed_one_leaves_no_lock(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    queue = RenderQueue(tmp_path, f"s3://{s3.bucket}/root-{uuid.uuid4().hex}", s3.environment)
    queue.artist.environment = {**s3.environment, "AWS_ENDPOINT_URL_S3": fault_proxy.url}
    queue.render(1, {"big": 20_000_000})
    stall = fault_proxy.inject(Fault.STALL, key="Data/")
    running = queue.artist.popen(*queue.argv(*ALL))
    lock = queue.checkpoint.with_name(queue.checkpoint.name + ".lock")
    until(lambda: stall.hits > 0)

    message = queue.command(code=83)

    running.kill()
    running.communicate()
    fault_proxy.clear()
    assert lock.exists()
    assert "another sync works with" in message
    assert queue.sync().failures == []
    assert (queue.show / "big").stat().st_size == 20_000_000


# ---------------------------------------------------------------------------------------- failures


def test_a_job_that_fails_leaves_the_others_alone_and_is_tried_again(queue: RenderQueue) -> None:
    queue.render(1, {"bad": b"will be lost"})
    queue.render(2, {"good": b"stays"})
    blob = blob_of(queue, b"will be lost")
    lost = blob.read_bytes()
    blob.unlink()

    synced = queue.sync()

    assert [type(failure) for failure in synced.failures] == [BlobNotFoundError]
    assert (synced.of(1).state, synced.of(2).state) == ("failed", "synced")
    assert contents(queue.show) == {"good": b"stays"}
    blob.write_bytes(lost)
    assert [*queue.sync().jobs] == [job_id(1)]
    assert contents(queue.show) == {"good": b"stays", "bad": b"will be lost"}


def test_after_five_tries_a_job_is_given_up_until_it_is_named(queue: RenderQueue) -> None:
    queue.render(1, {"bad": b"will be lost"})
    blob = blob_of(queue, b"will be lost")
    lost = blob.read_bytes()
    blob.unlink()
    assert [len(queue.sync().failures) for _ in range(6)] == [1, 1, 1, 1, 1, 0]

    given_up = queue.sync().of(1)
    queue.render(1, {"later": b"comes"}, task=1)
    later = queue.sync().of(1)
    blob.write_bytes(lost)
    named = queue.sync(job_id(1)).of(1)

    assert (given_up.state, given_up.given_up) == ("given-up", 1)
    assert (later.state, later.given_up) == ("synced", 1)
    assert named.state == "synced"
    assert contents(queue.show) == {"later": b"comes", "bad": b"will be lost"}
    assert queue.sync().jobs == {}


def test_a_damaged_manifest_keeps_only_itself_back(queue: RenderQueue) -> None:
    queue.render(1, {"first": b"1"}, task=0)
    [damaged] = queue.manifests
    queue.render(1, {"second": b"2"}, task=1)
    whole = damaged.read_bytes()
    damaged.write_bytes(b"{}")

    job = queue.sync().of(1)

    assert (job.state, job.files) == ("failed", 1)
    assert contents(queue.show) == {"second": b"2"}
    damaged.write_bytes(whole)
    assert queue.sync().files == 1
    assert contents(queue.show) == {"first": b"1", "second": b"2"}


@pytest.mark.parametrize(
    "metadata",
    ["no JSON", '{"asset-root": "/a\\nb"}', '{"asset-root-json": "\\"/\\\\ud800\\""}'],
)
def test_metadata_that_make_no_sense_keep_only_their_manifest_back(
    queue: RenderQueue, metadata: str
) -> None:
    """Seen to end the sync, and to crash it."""
    queue.render(1, {"first": b"1"}, task=0)
    [damaged] = queue.manifests
    queue.render(2, {"second": b"2"})
    damaged.with_name(f".{damaged.name}.metadata.json").write_text(metadata)

    synced = queue.sync()

    assert [failure.message.partition(":")[0] for failure in synced.failures] == [job_id(1)]
    assert (synced.of(1).state, synced.of(2).state) == ("failed", "synced")
    assert contents(queue.show) == {"second": b"2"}


def test_content_that_is_missing_keeps_only_its_tasks_files_back(queue: RenderQueue) -> None:
    for number in range(4):
        queue.render(1, {f"{number}": b"of %d" % number, f"more {number}": 100}, task=number)
    blob = blob_of(queue, b"of 1")
    lost = blob.read_bytes()
    blob.unlink()

    first = queue.sync()

    assert [type(failure) for failure in first.failures] == [BlobNotFoundError]
    assert (first.of(1).state, first.of(1).files) == ("failed", 6)
    assert {"0", "2", "3", "more 0", "more 2", "more 3"} <= contents(queue.show).keys()
    assert [len(queue.sync().failures) for _ in range(5)] == [1, 1, 1, 1, 0]
    assert queue.sync().of(1).given_up == 1
    blob.write_bytes(lost)
    assert queue.sync(job_id(1)).of(1).files == 2
    assert len(contents(queue.show)) == 8


@pytest.mark.parametrize("which", ["manifest", "content"])
def test_what_a_store_refuses_of_one_task_keeps_nobody_else_back_and_is_tried_by_every_sync(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path, which: str
) -> None:
    """Seen to fail when such an answer ends the sync, and when its tries are counted."""
    url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
    queue = RenderQueue(tmp_path, url, s3.environment)
    queue.artist.environment = {**s3.environment, "AWS_ENDPOINT_URL_S3": fault_proxy.url}
    queue.render(1, {"a": b"refused"}, task=0)
    queue.render(1, {"b": b"1"}, task=1)
    queue.render(2, {"c": b"2"})
    of_task = f"{job_id(1)}/step-[0-9a-f]*/task-[0-9a-f]*-0/"
    key = of_task if which == "manifest" else f"Data/{Digest.of(b'refused').hex}"
    fault_proxy.inject(Fault.FORBIDDEN, methods={"GET"}, key=key)

    first = queue.sync()

    assert [type(failure) for failure in first.failures] == [StoreAccessError]
    assert (first.of(1).state, first.of(2).state) == ("failed", "synced")
    assert contents(queue.show) == {"b": b"1", "c": b"2"}
    assert b'"tries"' not in queue.checkpoint.read_bytes()
    fault_proxy.clear()
    assert queue.sync().files == 1
    assert contents(queue.show) == {"a": b"refused", "b": b"1", "c": b"2"}


def test_a_store_that_refuses_all_ends_the_sync_and_no_try_is_counted(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Seen to fail when each job is taken to be at fault."""
    queue = RenderQueue(tmp_path, f"s3://{s3.bucket}/root-{uuid.uuid4().hex}", s3.environment)
    queue.artist.environment = {**s3.environment, "AWS_ENDPOINT_URL_S3": fault_proxy.url}
    queue.render(1, {"a": b"1"})
    queue.render(2, {"b": b"2"})
    # The keys end when the manifests were read.
    fault_proxy.inject(Fault.FORBIDDEN, key="Data/")
    fault_proxy.inject(Fault.FORBIDDEN, key="^$", skip=1)

    with pytest.raises(StoreAccessError):
        queue.sync()


def test_a_store_that_can_not_be_reached_ends_the_sync(queue: RenderQueue) -> None:
    queue.render(1, {"a": b"1"})
    queue.sync()
    (queue.directory / "store").rename(queue.directory / "elsewhere")
    before = queue.checkpoint.read_bytes()

    with pytest.raises(StoreAccessError):
        queue.sync()

    assert queue.checkpoint.read_bytes() == before


# --------------------------------------------------------------------------------------- conflicts


@pytest.mark.parametrize(
    ("rule", "found", "left", "copies"),
    [
        ("overwrite", {"a.exr": b"new", "b.exr": b"same"}, 0, []),
        ("skip", {"a.exr": b"mine", "b.exr": b"same"}, 1, []),
        (
            "create_copy",
            {"a.exr": b"mine", "a (1).exr": b"mine, too", "a (2).exr": b"new", "b.exr": b"same"},
            0,
            ["a (2).exr"],
        ),
    ],
)
def test_what_stands_in_the_way_is_treated_by_the_rule(
    queue: RenderQueue, rule: str, found: dict[str, bytes], left: int, copies: list[str]
) -> None:
    queue.render(1, {"a.exr": b"new", "b.exr": b"same"})
    queue.show.mkdir()
    (queue.show / "a.exr").write_bytes(b"mine")
    (queue.show / "b.exr").write_bytes(b"same")
    if copies:
        (queue.show / "a (1).exr").write_bytes(b"mine, too")

    job = queue.sync(conflict=rule).of(1)
    # As after a kill, when all was in place and nothing noted: no second copy.
    queue.sync(conflict=rule, anew=True)

    assert contents(queue.show) == found
    assert job.left == left
    assert job.copies == [str(queue.show / copy) for copy in copies]


def test_a_link_below_a_root_is_not_followed_out_of_it(queue: RenderQueue) -> None:
    queue.render(1, {"renders/a.exr": b"new"})
    outside = queue.directory / "outside"
    outside.mkdir()
    queue.show.mkdir()
    (queue.show / "renders").symlink_to(outside)

    [failure] = queue.sync().failures

    assert isinstance(failure, UnsafePathError)
    assert list(outside.iterdir()) == []


# ----------------------------------------------------------------------------------------- mapping


def test_rules_map_roots_of_other_hosts_and_what_none_maps_is_told(queue: RenderQueue) -> None:
    home = queue.directory / "here"
    queue.render(1, {"sub/a.exr": b"1", "b.exr": b"2"}, root="Z:\\Show\\shot")
    queue.render(2, {"c.exr": b"3"}, root="/elsewhere/show")
    queue.render(3, {"tex/d.exr": b"4", "e.exr": b"5"}, root="/mnt/show")
    rules = queue.directory / "rules.json"
    rules.write_text(
        json.dumps(
            {
                "version": "pathmapping-1.0",
                "path_mapping_rules": [
                    _rule("WINDOWS", "z:\\show", home / "z"),
                    _rule("POSIX", "/mnt", home / "mnt"),
                    _rule("POSIX", "/mnt/show/tex", home / "textures"),
                ],
            }
        )
    )

    result = queue.command("--path-mapping-rules", rules, *ALL)
    told = {job["jobId"]: job for job in result["jobs"]}

    assert contents(home) == {
        "z/shot/sub/a.exr": b"1",
        "z/shot/b.exr": b"2",
        "textures/d.exr": b"4",
        "mnt/show/e.exr": b"5",
    }
    assert not Path("/elsewhere/show").exists()
    unmapped = told[job_id(2)]
    assert (unmapped["unmappedFiles"], unmapped["unmapped"]) == (1, ["/elsewhere/show: c.exr"])
    assert told[job_id(3)]["roots"] == [str(home / "mnt"), str(home / "textures")]


def test_what_no_rule_maps_comes_when_one_does_and_nothing_else_comes_back(
    queue: RenderQueue,
) -> None:
    """Seen to fail when what has no place counts as brought."""
    home = queue.directory / "here"
    shown = PathRules(checked_rules([PathMappingRule("posix", "/show", str(home / "show"))]))
    both = PathRules(
        checked_rules(
            [
                PathMappingRule("posix", "/show", str(home / "show")),
                PathMappingRule("posix", "/more", str(home / "more")),
            ]
        )
    )
    queue.render(1, {"a": b"1"}, root="/show")
    queue.render(1, {"b": b"2"}, root="/more", task=1)
    assert queue.sync(rules=shown).of(1).unmapped_files == 1
    assert contents(home) == {"show/a": b"1"}
    (home / "show/a").unlink()

    assert queue.sync(rules=shown).jobs == {}
    named = queue.sync(job_id(1), rules=shown).of(1)
    assert (named.state, named.files, named.unmapped_files) == ("synced", 0, 1)
    assert queue.sync(rules=both).of(1).files == 1
    # What its user took away was brought.
    assert contents(home) == {"more/b": b"2"}
    assert queue.sync(rules=both).jobs == {}
    assert queue.sync(rules=shown).jobs == {}


def _rule(path_format: str, source: str, destination: Path) -> dict[str, str]:
    return {
        "source_path_format": path_format,
        "source_path": source,
        "destination_path": str(destination),
    }


@pytest.mark.parametrize(
    ("document", "code", "told"),
    [
        ([_rule("POSIX", "/a", Path("relative"))], 78, "not an absolute path"),
        ([_rule("POSIX", "/a", Path("/x/../etc"))], 78, "not an absolute path"),
        ([_rule("MAC", "/a", Path("/x"))], 66, "source_path_format"),
        ([{"source": "/a"}], 66, "unknown key"),
        ("text", 66, "rules.json"),
    ],
)
def test_rules_that_are_none_are_refused(document: object, code: int, told: str) -> None:
    with pytest.raises(InputError) as refused:
        read_rules(json.dumps(document).encode(), "rules.json")

    assert told in refused.value.message
    assert refused.value.exit_code == code


def test_a_root_of_windows_without_rules_has_no_place_here(queue: RenderQueue) -> None:
    queue.render(1, {"a": b"1"}, root="C:\\show")

    job = queue.sync().of(1)

    assert (job.state, job.files, job.unmapped_files) == ("synced", 0, 1)


def test_the_checkpoint_may_be_somewhere_else(queue: RenderQueue, tmp_path: Path) -> None:
    queue.render(1, {"a": b"1"})

    result = queue.command("--checkpoint-dir", tmp_path / "notes", *ALL)

    assert result["checkpoint"] == f"{tmp_path}/notes/{QUEUE}_own.jsonl"
    assert stat.S_IMODE((tmp_path / "notes").stat().st_mode) == 0o700
    assert not queue.checkpoint.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["job-1"], "not a job id"),
        (["--storage-profile-id", "x"], "not the id of a storage profile"),
        (["--storage-profile-id", f"sp-{'0' * 32}", "--ignore-storage-profiles"], "give one of"),
        (["--bootstrap-lookback-minutes", "nan"], "from 0"),
        (["--bootstrap-lookback-minutes", "-1"], "from 0"),
    ],
)
def test_ids_and_options_are_checked_before_anything_is_done(
    tmp_path: Path, words: list[str], told: str
) -> None:
    ids = ["--farm-id", FARM, "--queue-id", QUEUE, "--store", f"file://{tmp_path}/none"]

    with pytest.raises((click.UsageError, InputError)) as refused:
        sync_command.main([*words, *ids], standalone_mode=False)

    assert told in str(refused.value)
