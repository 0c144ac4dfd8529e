"""Input sources that are mounted: what is read moves, and is of the state that was listed."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import MountReadFailedError, UnsafePathError
from agent_plugin.content.mount_table import read_mounts
from agent_plugin.session import virtual
from agent_plugin.session.input_sources import SourceResult
from agent_plugin.session.mount_control import ask_mount
from agent_plugin.sources.parts import share_of
from agent_plugin.transfer.plan import SPARE_BYTES
from tests.mount.conftest import by_each_transport_in_time
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import Host, action
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.source_jobs import (
    content_below,
    job_with_sources,
    source_of,
    store_objects,
    times_in_store,
)
from tests.servers.trees import files_below

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1024 * 1024


@pytest.fixture
def transport() -> str:
    return "kernel"


@pytest.fixture
def host(tmp_path: Path, s3: S3Server, transport: str) -> Iterator[Host]:
    host = Host(
        tmp_path / "host",
        f"file://{tmp_path}/store",
        environment=s3.environment,
        settings={"mounts": {"transport": transport}},
    )
    yield host
    end_mounts(host, tmp_path)


@pytest.fixture
def proxied(tmp_path: Path, s3: S3Server, fault_proxy: FaultProxy) -> Iterator[Host]:
    """A host that reaches the objects by way of the proxy."""
    host = Host(
        tmp_path / "host",
        f"file://{tmp_path}/store",
        environment=s3.environment_at(fault_proxy.url),
    )
    yield host
    end_mounts(host, tmp_path)


def end_mounts(host: Host, directory: Path) -> None:
    """End what a test has mounted below a directory, also one that failed."""
    for mount in reversed(read_mounts()):
        if mount.mountpoint.startswith(f"{directory}/"):
            host.mounts.end(Path(mount.mountpoint))
    assert [m for m in read_mounts() if m.mountpoint.startswith(f"{directory}/")] == []


@pytest.fixture
def session_dir(tmp_path: Path) -> Path:
    return tmp_path / "sessions" / "session-1"


def mounted(host: Host, session_dir: Path, *sources: Mapping[str, object]) -> list[SourceResult]:
    told = host.start(job_with_sources(host, *sources), session_dir, file_system="VIRTUAL").sources
    assert [(each.file_system, each.reason) for each in told] == [("VIRTUAL", "")] * len(told)
    return told


def fetched(host: Host, root: Path) -> int:
    answer = ask_mount(host.mounts.control_of(root), {"ask": "status"})
    count: int = json.loads(answer)["counts"]["bytes_fetched"]
    return count


def forget_pages(root: Path) -> None:
    """Have the kernel ask the server again for what it has been given before."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@by_each_transport_in_time
def test_s6_a_mounted_source_is_the_copied_one_and_only_what_is_read_moves(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, tmp_path: Path
) -> None:
    """Caught: a tree whose times are when it was mounted; a whole object for each part of it."""
    content = store_objects(
        s3,
        s3_prefix,
        {
            "plates/0001.exr": 30_000,
            "plates/deep/er/ref.txt": b"a reference",
            "empty": b"",
            "\u00e9 + %25 #?.bin": 700,
            "large.abc": 20 * MIB + 7,
        },
    )
    source = source_of(s3, s3_prefix, Target="/in/shots")

    [told] = mounted(host, session_dir, source)

    root = session_dir / "in/shots"
    assert (told.files, told.bytes_fetched) == (5, 0)
    assert {
        path.relative_to(root).as_posix(): path.stat().st_mtime_ns // 1000
        for path in root.rglob("*")
        if path.is_file()
    } == times_in_store(s3, s3_prefix)
    assert fetched(host, root) == 0
    with (root / "large.abc").open("rb") as file:
        assert os.pread(file.fileno(), 1000, 9 * MIB) == content["large.abc"][9 * MIB :][:1000]
    assert 0 < fetched(host, root) <= 2 * MIB
    assert content_below(root) == content
    assert not list(host.cache_dir.rglob("?" * 32))
    copied = tmp_path / "copied"
    host.start(job_with_sources(host, source), copied, file_system="COPIED")
    assert files_below(root) == files_below(copied / "in/shots")
    assert str(root) in host.end(session_dir).removed
    assert list(session_dir.iterdir()) == []
    host.end(copied)


@pytest.mark.expected_events(events.MOUNT_READ_FAILED)
@by_each_transport_in_time
def test_s6_an_object_that_is_overwritten_is_an_error_and_the_task_has_failed(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """Caught: parts that are asked for without If-Match, so that a file is of two states.

    And the name that stands for a hash here, told as if it were one.
    """
    content = store_objects(s3, s3_prefix, {"whole.exr": 5000, "large.abc": 8 * MIB, "gone": 10})
    [told] = mounted(host, session_dir, source_of(s3, s3_prefix))
    root = Path(told.local_root)
    with (root / "large.abc").open("rb") as file:
        assert file.read(1000) == content["large.abc"][:1000]
        store_objects(s3, s3_prefix, {"whole.exr": b"new", "large.abc": b"new" * 3 * MIB})
        s3.client().delete_object(Bucket=s3.bucket, Key=f"{s3_prefix}/gone")

        for offset in (7 * MIB, 4 * MIB):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), 1000, offset)
    for name in ("whole.exr", "gone"):
        with pytest.raises(OSError, match="Input/output error"):
            (root / name).read_bytes()

    errors = host.mounts.errors(root)
    assert {(error.path, error.code) for error in errors} == {
        (name, "E_SOURCE_CHANGED") for name in ("whole.exr", "large.abc", "gone")
    }
    urls = [f"s3://{s3.bucket}/{s3_prefix}/{error.path}" for error in errors]
    assert [(error.object, error.hash) for error in errors] == [(url, "") for url in urls]
    assert all(url in error.reason for url, error in zip(urls, errors, strict=True))
    [log] = (host.state_dir / "mounts").glob("*/log")
    written = log.read_text()
    assert all(f'"object": "{url}"' in written for url in urls)
    assert '"hash"' not in written
    with pytest.raises(MountReadFailedError, match=r"large\.abc in .*/inputs and 2 more") as caught:
        host.finish_task(session_dir, action())
    assert caught.value.exit_code == 87
    assert host.finish_task(session_dir, action()).files == 0


@pytest.mark.expected_events(events.MOUNT_READ_FAILED)
def test_s6_an_object_whose_sha256_is_demanded_is_read_when_all_of_it_is_verified(
    proxied: Host, s3: S3Server, s3_prefix: str, session_dir: Path, fault_proxy: FaultProxy
) -> None:
    """Caught: an object of 3 MiB that is given out part by part, and so unverified."""
    data = bytes(3 * MIB)
    answer = s3.client().put_object(
        Bucket=s3.bucket, Key=f"{s3_prefix}/one", Body=data, ChecksumAlgorithm="SHA256"
    )
    source = {
        "Bucket": s3.bucket,
        "Key": f"{s3_prefix}/one",
        "ChecksumSHA256": answer["ChecksumSHA256"],
    }
    [told] = mounted(proxied, session_dir, source)
    path = Path(told.local_root) / "one"
    fault_proxy.inject(Fault.WRONG_BYTES, key="/one$")

    with path.open("rb") as file, pytest.raises(OSError, match="Input/output error"):
        file.read(10)

    [error] = proxied.mounts.errors(path.parent)
    assert error.code == "E_CHECKSUM"
    fault_proxy.clear()
    until(lambda: readable(path))
    assert path.read_bytes() == data


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_s6_what_was_read_stays_what_it_was(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    content = store_objects(s3, s3_prefix, {"a": 5000, "large": 3 * MIB})
    [told] = mounted(host, session_dir, source_of(s3, s3_prefix))
    root = Path(told.local_root)
    assert content_below(root) == content
    store_objects(s3, s3_prefix, {"a": b"new", "large": b"new"})
    forget_pages(root)

    assert content_below(root) == content


def test_s6_a_start_that_is_killed_or_done_again_mounts_what_was_listed_first(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """Caught: a mount whose snapshot is resolved anew, and shows what has come since."""
    content = store_objects(s3, s3_prefix, {f"{at}": 100 + at for at in range(20)})
    job = job_with_sources(host, source_of(s3, s3_prefix))
    process = host.popen(*host.start_arguments(job, session_dir), "--file-system", "VIRTUAL")
    sources = host.state_dir / "sessions"
    until(lambda: bool(list(sources.glob("*.sources/*"))))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store_objects(s3, s3_prefix, {"later": b"not in the snapshot"})

    [told] = host.start(job, session_dir, file_system="VIRTUAL").sources
    root = Path(told.local_root)
    host.start(job, session_dir, file_system="COPIED")

    assert told.file_system == "VIRTUAL"
    assert content_below(root) == content
    status = json.loads(ask_mount(host.mounts.control_of(root), {"ask": "status"}))
    os.kill(status["pid"], signal.SIGKILL)
    forget_pages(root)
    assert content_below(root) == content
    host.end(session_dir)
    assert list(session_dir.iterdir()) == []


def test_s9_an_open_bucket_is_mounted_without_credentials(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    s3.client().put_object(Bucket=s3.open_bucket, Key=f"{s3_prefix}/a", Body=b"for everybody")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del host.environment[name]

    mounted(host, session_dir, {"Bucket": s3.open_bucket, "Key": f"{s3_prefix}/", "NoSign": True})

    assert content_below(session_dir / "inputs") == {"a": b"for everybody"}


def test_s6_what_a_job_writes_over_a_source_is_there_and_no_output(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    content = store_objects(s3, s3_prefix, {"a": 5000, "b": 5000})
    [told] = mounted(host, session_dir, source_of(s3, s3_prefix))
    root = Path(told.local_root)
    with (root / "a").open("r+b") as file:
        file.write(b"changed")
    (root / "new").write_bytes(b"new")
    (root / "b").unlink()

    result = host.finish_task(session_dir, action())

    assert (result.files, result.deleted) == (0, [])
    assert content_below(root) == {"a": b"changed" + content["a"][7:], "new": b"new"}
    client = s3.client()
    stored = client.get_object(Bucket=s3.bucket, Key=f"{s3_prefix}/a")["Body"].read()
    assert stored == content["a"]


def test_s6_sources_are_mounted_or_copied_each_as_it_says(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    store_objects(s3, s3_prefix, {"a/1": b"1", "b/2": b"2", "c/3": b"3"})
    sources = [
        source_of(s3, f"{s3_prefix}/a", Target="a", Mode="copied"),
        source_of(s3, f"{s3_prefix}/b", Target="b", Mode="virtual"),
        source_of(s3, f"{s3_prefix}/c", Target="c"),
    ]

    told = host.start(job_with_sources(host, *sources), session_dir, file_system="AUTO").sources

    assert [each.file_system for each in told] == ["COPIED", "VIRTUAL", "COPIED"]
    assert "are few" in told[2].reason
    assert [content_below(session_dir / each) for each in "abc"] == [
        {"1": b"1"},
        {"2": b"2"},
        {"3": b"3"},
    ]
    host.end(session_dir)
    assert list(session_dir.iterdir()) == []


def test_s6_a_source_is_copied_where_it_can_not_be_mounted_and_says_why(
    host: Host,
    s3: S3Server,
    s3_prefix: str,
    session_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = store_objects(s3, s3_prefix, {"a": 5000})
    monkeypatch.setattr(virtual, "kernel_obstacle", lambda: "there is no /dev/fuse")
    monkeypatch.setattr(virtual, "fusepy_obstacle", lambda: "there is no /dev/fuse")

    [told] = host.start(
        job_with_sources(host, source_of(s3, s3_prefix, Mode="VIRTUAL")), session_dir
    ).sources

    assert (told.file_system, told.reason) == ("COPIED", "there is no /dev/fuse")
    assert content_below(session_dir / "inputs") == content


def test_s7_auto_mounts_what_does_not_fit_and_says_so(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = store_objects(s3, s3_prefix, {"a": 5000, "b": 6000})
    real = os.statvfs

    def nearly_full(path: object) -> os.statvfs_result:
        fields = list(real(path))  # type: ignore[arg-type]
        # f_bavail, in blocks.
        fields[4] = 2
        return os.statvfs_result(fields)

    job = job_with_sources(host, source_of(s3, s3_prefix))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", nearly_full)
        [told] = host.start(job, session_dir, file_system="AUTO").sources

    assert told.file_system == "VIRTUAL"
    assert told.reason == "11000 bytes do not fit where 8192 are free"
    assert content_below(session_dir / "inputs") == content


def test_s7_auto_copies_only_what_fits_beside_all_else_that_is_copied(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that fit singly, and not together. Caught: each compared with all of the free space.

    The last in the list is copied whatever AUTO does, so that its bytes count for the others.
    """
    sizes = {"a": 5000, "b": 6000, "c": 7000}
    content = store_objects(s3, s3_prefix, {f"{name}/1": size for name, size in sizes.items()})
    sources = [
        source_of(s3, f"{s3_prefix}/a", Target="a"),
        source_of(s3, f"{s3_prefix}/b", Target="b"),
        source_of(s3, f"{s3_prefix}/c", Target="c", Mode="copied"),
    ]
    real = os.statvfs
    free = SPARE_BYTES + 13_000

    def nearly_full(path: object) -> os.statvfs_result:
        fields = list(real(path))  # type: ignore[arg-type]
        # f_frsize and f_bavail: blocks of one byte.
        fields[1], fields[4] = 1, free
        return os.statvfs_result(fields)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", nearly_full)
        job = job_with_sources(host, *sources)
        first, second, third = host.start(job, session_dir, file_system="AUTO").sources

    assert (first.file_system, first.reason) == ("COPIED", "1 files of 5000 bytes are few")
    assert second.file_system == "VIRTUAL"
    assert (
        second.reason == "6000 bytes do not fit beside 12000 of other inputs and of the blob cache"
        f" where {free} are free"
    )
    assert (third.file_system, third.reason) == ("COPIED", "")
    for name in sizes:
        assert content_below(session_dir / name) == {"1": content[f"{name}/1"]}


@pytest.mark.slow
def test_s8_a_mounted_part_takes_the_place_of_the_one_before(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """Caught: what a task wrote over its part shown over the next one; a mount that stays."""
    content = store_objects(s3, s3_prefix, {f"{at:02}": 1000 + at for at in range(12)})
    # By the names alone, since the prefix is another in each run: each part has some of them.
    by_name = {"Type": "substring", "StartIndex": 0, "EndIndex": 2}
    partition = {**by_name, "Count": 3, "IndexParameter": "Part"}
    job = job_with_sources(host, source_of(s3, s3_prefix, Partition=partition))
    share = share_of(job.input_sources[0], 0)
    key = job.input_sources[0].key
    parts = [
        {name: data for name, data in content.items() if share.part_of(f"{key}{name}") == part}
        for part in range(3)
    ]
    root = session_dir / "inputs"
    host.start(job, session_dir, file_system="VIRTUAL")
    assert not root.exists()

    [first] = host.begin_task(session_dir, Part="0").sources
    assert (first.file_system, first.reason, first.part) == ("VIRTUAL", "", 0)
    assert (first.files, first.bytes_fetched) == (len(parts[0]), 0)
    name = min(parts[0])
    assert (root / name).read_bytes() == parts[0][name]
    assert fetched(host, root) == len(parts[0][name])
    (root / name).write_bytes(b"a task's")
    (root / "own").write_bytes(b"a task's")
    assert host.finish_task(session_dir, action()).files == 0
    with (root / max(parts[0])).open("rb") as left_open:
        host.begin_task(session_dir, Part="2")
        with pytest.raises(OSError, match=r"not connected|Input/output"):
            os.pread(left_open.fileno(), 10, 0)
    assert content_below(root) == parts[2]
    host.begin_task(session_dir, Part="2")
    assert fetched(host, root) == sum(map(len, parts[2].values())), "it is the same mount"
    host.begin_task(session_dir, Part="0")
    assert content_below(root) == parts[0]
    assert host.finish_task(session_dir, action()).files == 0

    [again] = host.start(job, session_dir, file_system="VIRTUAL").sources
    assert (again.file_system, again.part, root.exists()) == ("", None, False)
    host.begin_task(session_dir, Part="1")
    host.end(session_dir)
    assert list(session_dir.iterdir()) == []


def test_s8_a_mounted_part_does_not_go_where_a_planted_link_leads(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path, tmp_path: Path
) -> None:
    """Caught: no look at what is above the place when a task begins; a moved mount left behind."""
    content = store_objects(s3, s3_prefix, {f"{at:02}": 1000 for at in range(12)})
    by_name = {"Type": "substring", "StartIndex": 0, "EndIndex": 2}
    partition = {**by_name, "Count": 3, "IndexParameter": "Part"}
    job = job_with_sources(host, source_of(s3, s3_prefix, Partition=partition, Target="in/plates"))
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "plates").mkdir(parents=True)
    host.start(job, session_dir, file_system="VIRTUAL")
    host.begin_task(session_dir, Part="0")
    assert content_below(session_dir / "in/plates").items() < content.items()
    (session_dir / "in").rename(session_dir / "away")
    (session_dir / "in").symlink_to(elsewhere)

    with pytest.raises(UnsafePathError, match="behind a symbolic link"):
        host.begin_task(session_dir, Part="1")

    assert [m for m in read_mounts() if m.mountpoint.startswith(f"{tmp_path}/")] == []
    assert content_below(session_dir / "away") == {}
    host.end(session_dir)
    assert list(elsewhere.iterdir()) == [elsewhere / "plates"]
    assert list((elsewhere / "plates").iterdir()) == []


def test_s8_a_part_whose_mount_has_died_is_mounted_again(
    host: Host, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """Caught: a part taken for in place because the state says so."""
    content = store_objects(s3, s3_prefix, {"a": 1000})
    partition = {"Type": "object", "Count": 1, "IndexParameter": "Part"}
    job = job_with_sources(host, source_of(s3, s3_prefix, Partition=partition))
    host.start(job, session_dir, file_system="VIRTUAL")
    host.begin_task(session_dir, Part="0")
    host.mounts.end(session_dir / "inputs")

    host.begin_task(session_dir, Part="0")

    assert content_below(session_dir / "inputs") == content


@pytest.mark.slow
def test_s6_two_thousand_objects_are_the_same_tree_mounted_and_copied(
    host: Host, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    content = store_objects(
        s3, s3_prefix, {f"shot {at % 20:02}/{at:05}.exr": 3000 + at for at in range(2000)}
    )
    source = source_of(s3, s3_prefix)
    virtual_dir, copied_dir = tmp_path / "virtual", tmp_path / "copied"

    [seen] = mounted(host, virtual_dir, source)
    [copied] = host.start(job_with_sources(host, source), copied_dir, file_system="COPIED").sources

    root = Path(seen.local_root)
    few = sorted(content)[:20]
    assert all((root / name).read_bytes() == content[name] for name in few)
    assert fetched(host, root) == sum(len(content[name]) for name in few)
    assert (seen.files, copied.files) == (2000, 2000)
    assert copied.bytes_fetched == sum(map(len, content.values()))
    facts = files_below(Path(copied.local_root))
    assert facts == files_below(root)
    assert {name: fact.mtime_us for name, fact in facts.items()} == times_in_store(s3, s3_prefix)
    host.end(virtual_dir)
    host.end(copied_dir)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.expected_events(events.MOUNT_READ_FAILED)
def test_s6_of_two_thousand_objects_one_that_is_overwritten_is_the_documented_error_in_both(
    proxied: Host, s3: S3Server, s3_prefix: str, tmp_path: Path, fault_proxy: FaultProxy
) -> None:
    """Mounted, the read and the task fail; copied, the start does, and nothing is in place.

    Caught: an answer that another object is there taken for one that makes no sense.
    """
    content = store_objects(
        s3, s3_prefix, {f"shot {at % 20:02}/{at:05}.exr": 3000 + at for at in range(2000)}
    )
    source = source_of(s3, s3_prefix)
    virtual_dir, copied_dir = tmp_path / "virtual", tmp_path / "copied"
    [seen] = mounted(proxied, virtual_dir, source)
    # Few enough a second that the last has not come when it is overwritten.
    fault_proxy.inject(Fault.DRIP, key=r"/[0-9]{5}\.exr$", bytes_per_second=10_000)
    process = proxied.popen(
        *proxied.start_arguments(job_with_sources(proxied, source), copied_dir),
        *("--file-system", "COPIED"),
    )
    until(lambda: fault_proxy.count("GET", r"\.exr$") >= 3)

    last = max(content)
    store_objects(s3, s3_prefix, {last: b"another"})
    fault_proxy.clear()
    _, stderr = process.communicate(timeout=100)

    assert process.returncode == 92, stderr
    assert "error[object-changed]" in stderr
    assert f"s3://{s3.bucket}/{s3_prefix}/{last}" in stderr
    assert not (copied_dir / "inputs").exists()
    root = Path(seen.local_root)
    with pytest.raises(OSError, match="Input/output error"):
        (root / last).read_bytes()
    others = {name: data for name, data in content.items() if name != last}
    assert all((root / name).read_bytes() == data for name, data in others.items())
    [error] = proxied.mounts.errors(root)
    assert (error.path, error.code) == (last, "E_SOURCE_CHANGED")
    with pytest.raises(MountReadFailedError, match=f"{last} in {root}"):
        proxied.finish_task(virtual_dir, action())
    for directory in (virtual_dir, copied_dir):
        proxied.end(directory)


def kept_bytes(host: Host, root: Path) -> int:
    """Return how much of the disk the server of a mount has in files without a name."""
    pid = json.loads(ask_mount(host.mounts.control_of(root), {"ask": "status"}))["pid"]
    sizes = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            status = fd.stat()
            is_ours = "/spool/" in str(fd.readlink()) and status.st_nlink == 0
        except FileNotFoundError:
            continue
        if is_ours:
            sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def test_s6_what_a_mounted_source_keeps_on_the_disk_is_bounded(
    tmp_path: Path, s3: S3Server, s3_prefix: str, session_dir: Path
) -> None:
    """Caught: no limit; one for whole objects only; one that forgets an object in parts."""
    content = store_objects(
        s3,
        s3_prefix,
        {**{f"whole-{at}": MIB for at in range(12)}, **{f"parts-{at}": 6 * MIB for at in range(4)}},
    )
    host = Host(
        tmp_path / "host",
        f"file://{tmp_path}/store",
        environment=s3.environment,
        settings={"mounts": {"source_bytes": "4 MiB"}},
    )
    try:
        [told] = mounted(host, session_dir, source_of(s3, s3_prefix))
        root = Path(told.local_root)
        for name in ("parts-0", "parts-1", "parts-2", "parts-3"):
            with (root / name).open("rb") as file:
                # Backwards and with gaps, so that no object ever comes to its end.
                for offset in range(6 * MIB - MIB // 2, 0, -MIB // 2):
                    data = os.pread(file.fileno(), 1000, offset)
                    assert data == content[name][offset : offset + 1000]
            until(lambda: kept_bytes(host, root) <= 6 * MIB)
        for _ in range(2):
            for name in sorted(content):
                assert (root / name).read_bytes() == content[name]
                # What is fetched with one request comes on top.
                until(lambda: kept_bytes(host, root) <= 8 * MIB)
            forget_pages(root)

        assert fetched(host, root) > sum(map(len, content.values())), "what went came again"
    finally:
        end_mounts(host, tmp_path)
