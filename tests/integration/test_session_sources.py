"""Input sources that are copied: objects of a bucket, as they were when the session started."""

import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import (
    JobInvalidError,
    NoSpaceError,
    ObjectChangedError,
    PathClashError,
    SessionStateError,
    SourceEmptyError,
    SourceInvalidError,
    StoreAccessError,
    StoreUnavailableError,
    UnsafePathError,
)
from agent_plugin.session.start_result import StartResult
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TransferStatus
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action
from tests.servers.proxied_object import until, until_unchanged
from tests.servers.s3_server import S3Server
from tests.servers.source_jobs import (
    content_below,
    job_with_sources,
    source_of,
    store_objects,
    times_in_store,
)

OBJECTS: dict[str, bytes | int] = {
    "plates/0001.exr": 30_000,
    "plates/0002.exr": 30_001,
    "plates/deep/er/ref.txt": b"a reference",
    "empty": b"",
    "\u00e9 + %25 #?.bin": 700,
    "large.abc": 20_000_000,
}


@pytest.fixture
def host(tmp_path: Path, s3: S3Server) -> Host:
    return Host(tmp_path / "host", f"file://{tmp_path}/store", environment=s3.environment)


@pytest.fixture
def proxied(tmp_path: Path, s3: S3Server, fault_proxy: FaultProxy) -> Host:
    """A host that reaches the objects by way of the proxy."""
    return Host(
        tmp_path / "host",
        f"file://{tmp_path}/store",
        environment=s3.environment_at(fault_proxy.url),
        store={"attempts": 1},
    )


@pytest.fixture
def session_dir(tmp_path: Path) -> Path:
    return tmp_path / "sessions" / "session-1"


def start_to_fail(host: Host, job: object, session_dir: Path, expected_events: set[str]) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    host.start(job, session_dir)  # type: ignore[arg-type]


def test_s5_a_source_comes_with_names_sizes_times_and_bytes_and_goes_with_the_session(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    content = store_objects(s3, s3_prefix, OBJECTS)
    source = source_of(s3, s3_prefix, Target="/in/shots", Alias="shots")

    result = host.start(job_with_sources(host, source), session_dir)

    [told] = result.sources
    target = session_dir / "in/shots"
    size = sum(map(len, content.values()))
    assert told.source == f"s3://{s3.bucket}/{s3_prefix}/"
    assert (told.alias, told.local_root, told.file_system) == ("shots", str(target), "COPIED")
    assert (told.files, told.bytes, told.bytes_fetched) == (len(OBJECTS), size, size)
    assert content_below(target) == content
    assert {path: (target / path).stat().st_mtime_ns // 1000 for path in content} == times_in_store(
        s3, s3_prefix
    )
    [row] = [row for row in host.transfers() if row.kind == "source"]
    assert (row.status, row.source) == (TransferStatus.DONE, told.source)
    with Ledger.open(host.state_dir / "ledger.db") as ledger:
        assert {task.source for task in ledger.tasks(row.id)} == {
            f"s3://{s3.bucket}/{s3_prefix}/{name}" for name in content
        }
    (target / "left by the job").write_bytes(b"no output")
    assert host.finish_task(session_dir, action()).files == 0
    assert str(target) in host.end(session_dir).removed
    assert list(session_dir.iterdir()) == []
    assert list((host.state_dir / "sessions").iterdir()) == []


def test_s5_what_an_end_leaves_is_what_others_have_beside_a_source(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    store_objects(s3, s3_prefix, {"a": b"a"})
    host.start(job_with_sources(host, source_of(s3, s3_prefix, Target="in/shots")), session_dir)
    (session_dir / "in/notes").write_bytes(b"the job's own")

    host.end(session_dir)

    assert content_below(session_dir) == {"in/notes": b"the job's own"}


def test_s5_a_session_ends_whatever_a_job_put_on_the_way_to_a_source(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """Caught: an end that never comes to one, since a file is where a directory was."""
    store_objects(s3, s3_prefix, {"a": b"a"})
    host.start(job_with_sources(host, source_of(s3, s3_prefix, Target="in/shots")), session_dir)
    (session_dir / "in").rename(session_dir / "moved")
    (session_dir / "in").write_bytes(b"the job's own")

    host.end(session_dir)

    assert (session_dir / "in").read_bytes() == b"the job's own"
    assert list(host.state_dir.glob("sessions/*.json")) == []


def test_s5_a_session_is_ended_by_another_spelling_of_its_directory(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, tmp_path: Path
) -> None:
    store_objects(s3, s3_prefix, {"a": b"a"})
    host.start(job_with_sources(host, source_of(s3, s3_prefix, Target="in/shots")), session_dir)
    link = tmp_path / "link"
    link.symlink_to(session_dir)

    host.end(link)

    assert list(session_dir.iterdir()) == []


def test_s5_a_damaged_snapshot_says_what_helps(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, expected_events: set[str]
) -> None:
    """Caught: the advice to start the session again, which reads the same file again."""
    expected_events.add(events.SESSION_START_FAILED)
    store_objects(s3, s3_prefix, {"a": b"a"})
    job = job_with_sources(host, source_of(s3, s3_prefix))
    host.start(job, session_dir)
    [snapshot] = host.state_dir.glob("sessions/*.sources/*")
    snapshot.write_bytes(snapshot.read_bytes()[:-9])

    with pytest.raises(SourceInvalidError, match="not the snapshot of a source") as caught:
        host.start(job, session_dir)

    assert caught.value.hint is not None
    assert "session end" in caught.value.hint
    host.end(session_dir)
    host.start(job, session_dir)
    assert content_below(session_dir / "inputs") == {"a": b"a"}


def test_s5_an_end_leaves_what_others_put_where_a_source_was_never_brought(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, expected_events: set[str]
) -> None:
    """Caught: an end that removes the place of a source of which nothing was ever there."""
    expected_events |= {events.SOURCE_SKIPPED, events.SESSION_START_FAILED}
    host.start(
        job_with_sources(host, source_of(s3, s3_prefix, Target="in/shots", Required=False)),
        session_dir,
    )
    (session_dir / "in/shots").mkdir(parents=True)
    (session_dir / "in/shots/own").write_bytes(b"the job's own")

    host.end(session_dir)

    assert content_below(session_dir) == {"in/shots/own": b"the job's own"}
    job = job_with_sources(host, source_of(s3, s3_prefix))
    with pytest.raises(SourceEmptyError):
        host.start(job, session_dir)
    (session_dir / "inputs").mkdir()
    (session_dir / "inputs/a").write_bytes(b"somebody's")
    store_objects(s3, s3_prefix, {"a": b"a"})
    with pytest.raises(PathClashError, match="is there already, and not empty"):
        host.start(job, session_dir)
    host.end(session_dir)
    assert (session_dir / "inputs/a").read_bytes() == b"somebody's"


def test_s5_nothing_of_a_source_gets_into_the_cache_or_is_remembered_of_a_store(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """Caught: a plan with an origin that looks for its digests in the cache, and leases them."""
    store_objects(s3, s3_prefix, OBJECTS)

    host.start(job_with_sources(host, source_of(s3, s3_prefix)), session_dir)

    cached = [path for path in host.cache_dir.rglob("*") if path.is_file() and len(path.name) == 32]
    assert cached == []
    again = host.start(job_with_sources(host, source_of(s3, s3_prefix)), session_dir).sources[0]
    assert (again.bytes_fetched, again.bytes_reused) == (0, again.bytes)


def test_s5_an_object_overwritten_since_it_was_listed_is_an_error_and_no_file(
    proxied: Host,
    s3: S3Server,
    s3_prefix: str,
    session_dir: Path,
    fault_proxy: FaultProxy,
    expected_events: set[str],
) -> None:
    """Caught: a snapshot that is resolved anew at each start."""
    content = store_objects(s3, s3_prefix, {"a": 5000, "b": 5000, "c": 5000})
    job = job_with_sources(proxied, source_of(s3, s3_prefix))
    fault_proxy.inject(Fault.INTERNAL_ERROR, key="/[abc]$")
    with pytest.raises(StoreUnavailableError):
        start_to_fail(proxied, job, session_dir, expected_events)
    fault_proxy.clear()
    store_objects(s3, s3_prefix, {"b": 5001})

    with pytest.raises(ObjectChangedError, match=rf"b: .*{s3_prefix}/b") as caught:
        start_to_fail(proxied, job, session_dir, expected_events)

    assert (caught.value.code, caught.value.exit_code) == ("E_SOURCE_CHANGED", 92)
    assert not (session_dir / "inputs").exists()
    there = [path for path in session_dir.rglob("*") if path.is_file()]
    assert all(path.read_bytes() == content[path.name] for path in there)
    with pytest.raises(SessionStateError):
        proxied.finish_task(session_dir, action())
    proxied.end(session_dir)
    assert proxied.start(job, session_dir).sources[0].bytes == 15_001


def test_s5_an_object_overwritten_while_others_come_is_an_error_and_no_file(
    proxied: Host,
    s3: S3Server,
    s3_prefix: str,
    session_dir: Path,
    fault_proxy: FaultProxy,
    expected_events: set[str],
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    store_objects(s3, s3_prefix, {f"{at:02}": 20_000 for at in range(40)})
    job = job_with_sources(proxied, source_of(s3, s3_prefix))
    # None comes before the last one has been overwritten.
    fault_proxy.inject(Fault.STALL, key="/[0-9]{2}$")
    process = proxied.popen(*proxied.start_arguments(job, session_dir))
    until(lambda: fault_proxy.count("GET", "/0[0-9]$") >= 3)

    store_objects(s3, s3_prefix, {"39": b"new"})
    fault_proxy.release()
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 92, stderr
    assert "error[object-changed]" in stderr
    assert f"s3://{s3.bucket}/{s3_prefix}/39" in stderr
    assert not (session_dir / "inputs").exists()
    [row] = [row for row in proxied.transfers() if row.kind == "source"]
    assert (row.status, row.error_code) == (TransferStatus.FAILED, "E_SOURCE_CHANGED")


@pytest.mark.slow
def test_s5_a_start_that_was_killed_goes_on_with_the_same_objects_and_fetches_none_again(
    proxied: Host, s3: S3Server, s3_prefix: str, session_dir: Path, fault_proxy: FaultProxy
) -> None:
    """Caught: presence told by hashing, so that everything was fetched again."""
    content = store_objects(s3, s3_prefix, {f"{at:03}": 20_000 for at in range(200)})
    job = job_with_sources(proxied, source_of(s3, s3_prefix))
    fault_proxy.inject(Fault.DRIP, key="/[0-9]{3}$", bytes_per_second=200_000)
    process = proxied.popen(*proxied.start_arguments(job, session_dir))
    built = session_dir / ".propmaster-inputs.partial"
    until(lambda: built.is_dir() and len(list(built.iterdir())) > 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    asked_before = fault_proxy.count("GET", "/[0-9]{3}$")
    store_objects(s3, f"{s3_prefix}/later", {"x": b"not in the snapshot"})
    fault_proxy.clear()
    fault_proxy.forget()

    [told] = proxied.start(job, session_dir).sources

    assert asked_before > 60
    assert content_below(session_dir / "inputs") == content
    assert told.bytes_reused >= 60 * 20_000
    assert told.bytes_fetched + told.bytes_reused == told.bytes
    assert fault_proxy.count("GET", "/[0-9]{3}$") == told.bytes_fetched // 20_000
    assert not any("list-type" in request.query for request in fault_proxy.requests)


def test_s5_a_session_that_is_started_again_brings_back_what_a_task_changed(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    content = store_objects(s3, s3_prefix, {"a": 5000, "b": 5000, "c": 5000})
    job = job_with_sources(host, source_of(s3, s3_prefix))
    host.start(job, session_dir)
    (session_dir / "inputs/a").write_bytes(b"changed")
    (session_dir / "inputs/b").unlink()

    [told] = host.start(job, session_dir).sources

    assert (told.bytes_fetched, told.bytes_reused) == (10_000, 5000)
    assert content_below(session_dir / "inputs") == content


def test_s5_the_sha256_that_a_source_demands_is_that_of_the_bytes_that_came(
    proxied: Host,
    s3: S3Server,
    s3_prefix: str,
    session_dir: Path,
    fault_proxy: FaultProxy,
    expected_events: set[str],
) -> None:
    """What the store says of itself is not all: here it says so and sends other bytes."""
    expected_events.add(events.SESSION_START_FAILED)
    data = b"the content" * 500
    answer = s3.client().put_object(
        Bucket=s3.bucket, Key=f"{s3_prefix}/one", Body=data, ChecksumAlgorithm="SHA256"
    )
    source = {
        "Bucket": s3.bucket,
        "Key": f"{s3_prefix}/one",
        "ChecksumSHA256": answer["ChecksumSHA256"],
    }
    job = job_with_sources(proxied, source)
    fault_proxy.inject(Fault.WRONG_BYTES, key="/one$")

    failed = proxied.run(*proxied.start_arguments(job, session_dir))
    fault_proxy.clear()
    proxied.start(job, session_dir)

    assert failed.returncode == 71, failed.stderr
    assert "SHA-256" in failed.stderr
    assert content_below(session_dir / "inputs") == {"one": data}


def test_s5_targets_stay_in_the_session_and_apart(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, tmp_path: Path
) -> None:
    store_objects(s3, s3_prefix, {"a": b"a"})
    for target in ("/", "../up", "a/../../b", "/a//b", "a\0b"):
        with pytest.raises(JobInvalidError, match="Target"):
            job_with_sources(host, source_of(s3, s3_prefix, Target=target))
    with pytest.raises(JobInvalidError, match="Target"):
        job_with_sources(
            host, source_of(s3, s3_prefix, Target="in"), source_of(s3, s3_prefix, Target="in/a")
        )
    rule = {
        "sourcePathFormat": "posix",
        "sourcePath": "/mnt/show",
        "destinationPath": str(session_dir / "mapped/show"),
    }
    mapped = job_with_sources(host, source_of(s3, s3_prefix, Target="mapped"))
    document = json.loads(msgspec.json.encode(mapped))
    document["pathMappingRules"] = [rule]
    document["attachments"]["manifests"][0]["fileSystemLocationName"] = "Projects"
    mapped = type(mapped).decode(json.dumps(document).encode(), "the test's job")
    for job in (
        mapped,
        job_with_sources(host, source_of(s3, s3_prefix, Target="assetroot-0123456789")),
        job_with_sources(host, source_of(s3, s3_prefix, Target="a/.propmaster-x.partial")),
    ):
        with pytest.raises(PathClashError):
            host.start(job, session_dir)
    (session_dir / "taken").mkdir()
    (session_dir / "taken/file").write_bytes(b"somebody's")
    with pytest.raises(PathClashError, match="there already"):
        host.start(job_with_sources(host, source_of(s3, s3_prefix, Target="taken")), session_dir)
    (session_dir / "out").symlink_to(tmp_path)
    with pytest.raises(UnsafePathError, match="symbolic link"):
        host.start(job_with_sources(host, source_of(s3, s3_prefix, Target="out/in")), session_dir)
    assert host.read_state(session_dir) is None
    assert not (tmp_path / "in").exists()


def test_s5_a_link_that_a_job_puts_on_the_way_to_a_source_is_not_followed(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, tmp_path: Path
) -> None:
    store_objects(s3, s3_prefix, {"a": b"a"})
    job = job_with_sources(host, source_of(s3, s3_prefix, Target="in/shots"))
    host.start(job, session_dir)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "shots").mkdir(parents=True)
    (elsewhere / "shots/kept").write_bytes(b"the host's")
    (session_dir / "in").rename(session_dir / "moved")
    (session_dir / "in").symlink_to(elsewhere)

    with pytest.raises(UnsafePathError):
        host.start(job, session_dir)
    host.end(session_dir)

    assert content_below(elsewhere) == {"shots/kept": b"the host's"}


def test_s5_a_source_that_is_not_required_is_done_without_and_its_reason_is_told(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, expected_events: set[str]
) -> None:
    expected_events.update({events.SOURCE_SKIPPED, events.SESSION_START_FAILED})
    store_objects(s3, s3_prefix, {"a": b"a"})
    missing = source_of(s3, f"{s3_prefix}/none", Target="none")
    with pytest.raises(SourceEmptyError):
        host.start(job_with_sources(host, missing), session_dir)
    job = job_with_sources(host, {**missing, "Required": False}, source_of(s3, s3_prefix))

    result = host.start(job, session_dir)

    without, there = result.sources
    assert (without.file_system, without.files) == ("", 0)
    assert f"{s3_prefix}/none" in without.reason
    assert (there.file_system, there.files) == ("COPIED", 1)
    told = host.run(*host.start_arguments(job, session_dir)[:-1])
    assert "done without" in told.stdout + told.stderr


def test_s5_a_source_that_is_not_required_is_done_without_also_when_started_again(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, expected_events: set[str]
) -> None:
    """Caught: a start that fails for a snapshot that it could have done without."""
    expected_events.add(events.SOURCE_SKIPPED)
    content = store_objects(s3, s3_prefix, {"a": b"a"})
    job = job_with_sources(host, source_of(s3, s3_prefix, Required=False))
    host.start(job, session_dir)
    [snapshot] = host.state_dir.glob("sessions/*.sources/*")
    snapshot.unlink()

    [told] = host.start(job, session_dir).sources

    assert told.file_system == ""
    assert "No such file" in told.reason
    assert content_below(session_dir / "inputs") == content


def test_s5_a_source_that_may_be_empty_is_an_empty_directory(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    job = job_with_sources(host, source_of(s3, f"{s3_prefix}/none", OnEmpty="ok"))

    [told] = host.start(job, session_dir, file_system="VIRTUAL").sources

    assert (told.files, told.file_system) == (0, "COPIED")
    assert list((session_dir / "inputs").iterdir()) == []


def test_s5_a_session_keeps_the_source_it_was_started_with(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    store_objects(s3, s3_prefix, {"one/a": b"a", "two/b": b"b"})
    host.start(job_with_sources(host, source_of(s3, f"{s3_prefix}/one")), session_dir)

    with pytest.raises(SessionStateError, match="another source"):
        host.start(job_with_sources(host, source_of(s3, f"{s3_prefix}/two")), session_dir)

    assert content_below(session_dir / "inputs") == {"a": b"a"}
    state = next((host.state_dir / "sessions").glob("*.sources"))
    assert state.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in state.iterdir()] == [0o600]


def test_s5_sources_are_added_by_hand(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    content = store_objects(s3, s3_prefix, {"a": b"a", "sub/b": b"b"})
    job = job_with_sources(host, source_of(s3, f"{s3_prefix}/sub", Target="sub"))
    url = f"s3://{s3.bucket}/{s3_prefix}/"

    done = host.run(*host.start_arguments(job, session_dir), "--input", f"{url}:/all/of/it")
    clash = host.run(*host.start_arguments(job, session_dir), "--input", f"{url}:sub/way")

    result = msgspec.json.decode(done.stdout, type=StartResult)
    assert [source.local_root for source in result.sources] == [
        str(session_dir / "sub"),
        str(session_dir / "all/of/it"),
    ]
    assert content_below(session_dir / "all/of/it") == content
    assert clash.returncode == 66
    assert "give each source a directory of its own" in clash.stderr


def test_s7_what_does_not_fit_is_refused_before_the_first_byte(
    proxied: Host,
    s3: S3Server,
    s3_prefix: str,
    session_dir: Path,
    fault_proxy: FaultProxy,
    expected_events: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    store_objects(s3, s3_prefix, {"a": 5000, "b": 6000})
    job = job_with_sources(proxied, source_of(s3, s3_prefix))
    real = os.statvfs

    def nearly_full(path: object) -> os.statvfs_result:
        found = real(path)  # type: ignore[arg-type]
        fields = list(found)
        # f_bavail, in blocks.
        fields[4] = 64 * 1024 * 1024 // found.f_frsize
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(NoSpaceError, match="11000 bytes are needed"):
        proxied.start(job, session_dir)

    assert fault_proxy.count("GET", "/[ab]$") == 0
    assert not (session_dir / "inputs").exists()


def test_t10_a_file_of_a_source_is_excluded_and_a_paused_source_waits(
    proxied: Host, s3: S3Server, s3_prefix: str, session_dir: Path, fault_proxy: FaultProxy
) -> None:
    """Caught: tasks that are looked for by a hash, which a source's have not."""
    content = store_objects(s3, s3_prefix, {f"{at:02}": 20_000 for at in range(60)})
    job = job_with_sources(proxied, source_of(s3, s3_prefix))
    fault_proxy.inject(Fault.STALL, key="/[0-9]{2}$")
    process = proxied.popen(*proxied.start_arguments(job, session_dir))
    until(lambda: fault_proxy.count("GET", "/0[0-9]$") >= 3)
    with Ledger.open(proxied.state_dir / "ledger.db") as ledger:
        [row] = [row for row in ledger.transfers() if row.kind == "source"]
        last = next(task.id for task in ledger.tasks(row.id) if task.destination == "59")
        ledger.set_tasks(row.id, {last: {"status": "excluded"}}, "0:somebody")
        ledger.set_transfer(row.id, status=TransferStatus.PAUSED, modifier="0:somebody")
        _await_beats(ledger, row.id)
        asked = until_unchanged(lambda: fault_proxy.count("GET", "/[0-9]{2}$"), seconds=0.5)
        # That comes now, and nothing further is asked for.
        fault_proxy.release()

        assert until_unchanged(lambda: fault_proxy.count("GET", "/[0-9]{2}$")) == asked < 60
        assert process.poll() is None
        ledger.set_transfer(row.id, status=TransferStatus.WAITING, modifier="0:somebody")
    stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 0, stderr
    [told] = msgspec.json.decode(stdout, type=StartResult).sources
    assert (told.files, told.bytes) == (59, 59 * 20_000)
    del content["59"]
    assert content_below(session_dir / "inputs") == content


def _await_beats(ledger: Ledger, transfer: int) -> None:
    """Wait until a transfer's engine has read what people want of it by now.

    It does so at each beat, after it has renewed its lease: at the second it has.
    """
    for _ in range(2):
        before = ledger.transfer(transfer).lease_until
        until(lambda before=before: ledger.transfer(transfer).lease_until != before)  # type: ignore[misc]


def test_s5_openjd_tasks_find_sources_by_variables(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    store_objects(s3, s3_prefix, {"a": b"a"})
    sources = [
        source_of(s3, f"{s3_prefix}/none", Target="none", Required=False),
        source_of(s3, s3_prefix, Target="plates"),
    ]
    file = host.job_file(job_with_sources(host, *sources))

    entered = host.run("openjd", "enter", "--session-dir", session_dir, "--job", file)

    assert entered.returncode == 0, entered.stdout + entered.stderr
    assert f"openjd_env: PROPMASTER_SOURCE_1={session_dir}/plates" in entered.stdout
    assert "PROPMASTER_SOURCE_0" not in entered.stdout
    assert content_below(session_dir / "plates") == {"a": b"a"}


@pytest.mark.parametrize("key", ["one object", "several"])
def test_s9_an_open_bucket_is_read_without_credentials_and_no_other(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, expected_events: set[str], key: str
) -> None:
    """By a server that verifies signatures, on a host that has no keys at all.

    The mutation that was caught: a request of an anonymous access that is signed.
    """
    client = s3.client()
    for bucket in (s3.open_bucket, s3.bucket):
        client.put_object(Bucket=bucket, Key=f"{s3_prefix}/a", Body=b"for everybody")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del host.environment[name]
    what = f"{s3_prefix}/a" if key == "one object" else f"{s3_prefix}/"
    source = {"Bucket": s3.open_bucket, "Key": what, "NoSign": True}

    [told] = host.start(job_with_sources(host, source), session_dir).sources

    assert (told.files, told.bytes_fetched) == (1, 13)
    assert content_below(session_dir / "inputs") == {"a": b"for everybody"}
    host.end(session_dir)
    for refused in ({**source, "Bucket": s3.bucket}, {**source, "NoSign": False}):
        with pytest.raises(StoreAccessError):
            start_to_fail(host, job_with_sources(host, refused), session_dir, expected_events)
