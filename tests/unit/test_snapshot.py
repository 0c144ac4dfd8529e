"""What counts as a file of a directory, and which digest it has."""

import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import READ_BYTES, Digest
from agent_plugin.content.errors import (
    CancelledError,
    FileChangedError,
    LocalReadError,
    UnsafePathError,
)
from agent_plugin.content.local_index import LocalIndex
from agent_plugin.content.safe_path import Root
from agent_plugin.content.snapshot import FoundFile, hash_files, walk
from agent_plugin.content.store import Cancellation
from tests.servers.descriptors import open_below

NOBODY = 65534
LONG_AGO_NS = 1_000_000_000_000_000_000


def paths(root: Path, *directories: str) -> list[str]:
    return sorted(found.path for found in walk(root, directories or (".",)))


def skipped(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    fields = [
        events.fields_of(record)
        for record in caplog.records
        if record.getMessage() == events.FILE_SKIPPED
    ]
    return {Path(str(field["path"])).name: str(field["reason"]) for field in fields}


@contextmanager
def without_rights() -> Iterator[None]:
    """Be a user that may not read everything, if we are root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def test_an_entry_says_what_stat_says(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "file"
    file.parent.mkdir()
    file.write_bytes(b"12345")
    file.chmod(0o640)
    os.utime(file, ns=(0, 1_700_000_000_123_456_789))
    status = file.stat()

    [found] = walk(tmp_path)

    assert found == FoundFile(
        path="sub/file",
        size=5,
        mtime_us=1_700_000_000_123_456,
        mtime_ns=1_700_000_000_123_456_789,
        ctime_ns=status.st_ctime_ns,
        inode=status.st_ino,
        device=status.st_dev,
        mode=0o640,
    )


def test_a_time_before_the_epoch_is_rounded_down(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.utime(tmp_path / "file", ns=(0, -1))

    [found] = walk(tmp_path)

    assert found.mtime_us == -1


def test_hidden_files_are_found_and_directories_are_not(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / ".file").touch()
    (tmp_path / "empty").mkdir()

    assert paths(tmp_path) == [".hidden/.file"]


def test_names_that_are_not_utf8_are_found_and_can_be_opened(tmp_path: Path) -> None:
    name = os.fsdecode(b"x\xe9")
    (tmp_path / name).write_bytes(b"content")

    with Root(tmp_path) as root:
        [(found, digest)] = hash_files(root, walk(tmp_path), None)

    assert found.path == "x\udce9"
    assert digest == Digest.of(b"content")


def test_a_directory_that_is_not_there_holds_no_files(tmp_path: Path) -> None:
    assert paths(tmp_path, "missing", "missing/below") == []
    assert paths(tmp_path / "missing") == []


def test_overlapping_directories_yield_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "ab").mkdir()
    for path in ("a/1", "a/b/2", "ab/3", "4"):
        (tmp_path / path).touch()

    assert paths(tmp_path, "a/b", "a", "./a/", "a") == ["a/1", "a/b/2"]
    assert paths(tmp_path, "a/b", "ab") == ["a/b/2", "ab/3"]
    assert paths(tmp_path, "a", ".") == ["4", "a/1", "a/b/2", "ab/3"]


@pytest.mark.parametrize("directory", ["/", "..", "a/../..", "/etc"])
def test_a_directory_outside_the_root_is_refused(tmp_path: Path, directory: str) -> None:
    with pytest.raises(UnsafePathError):
        list(walk(tmp_path, [directory]))


def test_a_root_that_may_be_no_link_is_refused_if_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").touch()
    (tmp_path / "root").symlink_to("outside")

    with pytest.raises(UnsafePathError, match="root is a symbolic link"):
        list(walk(tmp_path / "root", follow_root=False))
    assert [found.path for found in walk(tmp_path / "root")] == ["secret"]


def test_500_nested_directories_are_walked_without_their_descriptors_held(tmp_path: Path) -> None:
    deep = "/".join(["directory-with-a-name"] * 500)
    with Root(tmp_path) as root:
        os.close(os.open("file", os.O_CREAT, dir_fd=root.directory(deep)))
    before = open_below(tmp_path)

    walking = walk(tmp_path)
    assert next(walking).path == f"{deep}/file"
    assert open_below(tmp_path) <= before + 260
    assert list(walking) == []
    assert open_below(tmp_path) == before


def test_links_inside_the_root_are_recorded_under_their_own_path(tmp_path: Path) -> None:
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "sub" / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("real/sub/file")
    (tmp_path / "absolute").symlink_to(tmp_path / "real" / "sub" / "file")
    (tmp_path / "directory").symlink_to("real")

    found = {file.path: file for file in walk(tmp_path)}

    assert sorted(found) == ["absolute", "directory/sub/file", "link", "real/sub/file"]
    target = (tmp_path / "real" / "sub" / "file").stat()
    assert {(file.inode, file.size, file.mtime_ns) for file in found.values()} == {
        (target.st_ino, 7, target.st_mtime_ns)
    }
    with Root(tmp_path) as root:
        digests = {digest for _, digest in hash_files(root, found.values(), None)}
    assert digests == {Digest.of(b"content")}


def test_an_output_directory_may_be_a_link_inside_the_root(tmp_path: Path) -> None:
    (tmp_path / "v002").mkdir()
    (tmp_path / "v002" / "file").touch()
    (tmp_path / "latest").symlink_to("v002")

    assert paths(tmp_path, "latest") == ["latest/file"]


def test_links_that_leave_break_or_loop_are_skipped_with_an_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected_events: set[str]
) -> None:
    expected_events.add(events.FILE_SKIPPED)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "file").touch()
    (root / "leaving").symlink_to("../outside/secret")
    (root / "leaving-directory").symlink_to(outside)
    (root / "broken").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    (root / "sub" / "up").symlink_to("..")
    (root / "sub" / "itself").symlink_to(".")

    assert paths(root) == ["sub/file"]
    reasons = skipped(caplog)
    assert set(reasons) == {"leaving", "leaving-directory", "broken", "loop", "up", "itself"}
    assert "leads out" in reasons["leaving"]
    assert "broken" in reasons["broken"]
    assert "it is in" in reasons["up"]


def test_a_loop_is_the_same_loop_wherever_the_walk_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected_events: set[str]
) -> None:
    expected_events.add(events.FILE_SKIPPED)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "a" / "b" / "up").symlink_to("../../a")

    assert paths(tmp_path, "a/b") == ["a/b/file"]
    assert list(skipped(caplog)) == ["up"]
    assert paths(tmp_path, "a/b/up") == []


def test_two_directories_that_link_to_each_other_are_each_seen_through_the_other(
    tmp_path: Path, expected_events: set[str]
) -> None:
    expected_events.add(events.FILE_SKIPPED)
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        (tmp_path / name / "other").symlink_to(f"../{other}")

    assert paths(tmp_path) == ["a/file", "a/other/file", "b/file", "b/other/file"]


def test_what_is_no_file_is_skipped_with_an_event_and_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected_events: set[str]
) -> None:
    expected_events.add(events.FILE_SKIPPED)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to("fifo")
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))

        assert paths(tmp_path) == ["file"]
    assert set(skipped(caplog)) == {"fifo", "to-fifo", "socket"}


def test_a_temporary_file_that_a_killed_run_left_is_skipped_with_an_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=events.LOGGER_NAME)
    (tmp_path / "file").touch()
    (tmp_path / ".propmaster-notes").touch()
    (tmp_path / ".propmaster-7-5f5e100.partial").touch()
    (tmp_path / ".propmaster-link.partial").symlink_to("file")

    assert paths(tmp_path) == [".propmaster-notes", "file"]
    assert set(skipped(caplog)) == {".propmaster-7-5f5e100.partial", ".propmaster-link.partial"}


def test_an_output_directory_that_is_a_file_is_skipped_with_an_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected_events: set[str]
) -> None:
    expected_events.add(events.FILE_SKIPPED)
    (tmp_path / "file").touch()

    assert paths(tmp_path, "file", "file/below") == []
    assert skipped(caplog) == {"file": "not a directory"}


def test_a_directory_that_vanishes_during_the_walk_is_passed_over(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()

    walking = walk(tmp_path)
    first = next(walking)
    for name in {"a", "b", "c"} - {first.path[0]}:
        (tmp_path / name / "file").unlink()
        (tmp_path / name).rmdir()

    assert list(walking) == []


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that another user reaches; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
        (directory / "closed").chmod(0o755)


def test_a_directory_that_may_not_be_read_is_an_error_that_names_it(open_to_all: Path) -> None:
    (open_to_all / "closed").mkdir()
    (open_to_all / "closed").chmod(0o000)

    with without_rights(), pytest.raises(LocalReadError, match="/closed can not be opened"):
        list(walk(open_to_all))


def test_a_link_into_a_directory_that_may_not_be_read_leads_out_and_is_skipped(
    open_to_all: Path, caplog: pytest.LogCaptureFixture, expected_events: set[str]
) -> None:
    expected_events.add(events.FILE_SKIPPED)
    (open_to_all / "closed" / "deeper").mkdir(parents=True)
    (open_to_all / "closed").chmod(0o000)
    (open_to_all / "root").mkdir()
    (open_to_all / "root").chmod(0o755)
    (open_to_all / "root" / "link").symlink_to("../closed/deeper/file")

    with without_rights():
        assert paths(open_to_all / "root") == []
    assert "leads out" in skipped(caplog)["link"]


class DictCache:
    """A hash cache that keeps what it is told, and counts what it was asked."""

    def __init__(self) -> None:
        self.rows: dict[tuple[object, ...], Digest] = {}
        self.asked = 0

    @staticmethod
    def key(path: bytes, status: os.stat_result) -> tuple[object, ...]:
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return (path, status.st_size, *times, status.st_ino, status.st_dev)

    def lookup_hashes(self, files: Iterable[tuple[bytes, os.stat_result]]) -> dict[bytes, Digest]:
        self.asked += 1
        keys = {path: self.key(path, status) for path, status in files}
        return {path: self.rows[key] for path, key in keys.items() if key in self.rows}

    def remember_hashes(self, rows: Iterable[tuple[bytes, os.stat_result, Digest]]) -> None:
        for path, status, digest in rows:
            self.rows[self.key(path, status)] = digest


def far_in_the_future() -> int:
    return 4_000_000_000_000_000_000


def test_files_come_with_their_digests_in_the_order_given(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"f{number}").write_bytes(b"x" * number)
    files = sorted(walk(tmp_path), key=lambda found: found.path)

    with Root(tmp_path) as root:
        hashed = list(hash_files(root, iter(files), None))

    assert hashed == [(found, Digest.of(b"x" * number)) for number, found in enumerate(files)]


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    cache = DictCache()
    files = list(walk(tmp_path))
    with Root(tmp_path) as root:
        list(hash_files(root, files, cache, clock=far_in_the_future))
        [digest] = cache.rows.values()
        cache.rows = dict.fromkeys(cache.rows, Digest.of(b"as remembered"))

        [(_, again)] = hash_files(root, files, cache)

    assert digest == Digest.of(b"content")
    assert again == Digest.of(b"as remembered")


def test_the_real_index_answers_for_an_unchanged_file_and_not_for_a_changed_one(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "root"
    directory.mkdir()
    file = directory / os.fsdecode(b"\xff")
    file.write_bytes(b"before")
    os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))
    key = os.fsencode(os.path.realpath(file))
    with LocalIndex.open(tmp_path / "index.db") as index, Root(directory) as root:
        list(hash_files(root, walk(directory), index, clock=far_in_the_future))
        known = index.lookup_hashes([(key, file.stat())])
        file.write_bytes(b"after!")
        os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))

        [(_, digest)] = hash_files(root, walk(directory), index)

    assert known == {key: Digest.of(b"before")}
    assert digest == Digest.of(b"after!")


def test_the_digest_of_a_file_changed_just_now_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    os.utime(tmp_path / "file", ns=(LONG_AGO_NS, LONG_AGO_NS))
    cache = DictCache()

    with Root(tmp_path) as root:
        list(hash_files(root, walk(tmp_path), cache))

    assert cache.asked == 1
    assert cache.rows == {}


def test_digests_are_kept_when_the_caller_stops_early(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").write_bytes(b"content")
    cache = DictCache()

    with Root(tmp_path) as root:
        hashing = hash_files(root, walk(tmp_path), cache, clock=far_in_the_future)
        next(hashing)
        del hashing

    assert list(cache.rows.values()) == [Digest.of(b"content")]


@contextmanager
def changing_while_read(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int], None]
) -> Iterator[None]:
    """Do `change(n)` after the n-th piece of a file was read, from the real pread's place."""
    pread, count = os.pread, 0

    def reading(fd: int, length: int, offset: int) -> bytes:
        nonlocal count
        data = pread(fd, length, offset)
        if data:
            count += 1
            change(count)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", reading)
        yield


def test_a_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected_events: set[str],
) -> None:
    expected_events.add(events.FILE_REREAD)
    file = tmp_path / "file"
    file.write_bytes(b"before")

    def change(count: int) -> None:
        if count == 1:
            file.write_bytes(b"after!!")
            os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))

    with Root(tmp_path) as root, changing_while_read(monkeypatch, change):
        [(found, digest)] = hash_files(root, walk(tmp_path), None)

    assert digest == Digest.of(b"after!!")
    assert (found.size, found.mtime_ns) == (7, LONG_AGO_NS)
    assert [record.getMessage() for record in caplog.records] == [events.FILE_REREAD]


def test_a_file_that_keeps_changing_is_refused_and_nothing_is_kept_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_events: set[str]
) -> None:
    expected_events.add(events.FILE_REREAD)
    file = tmp_path / "file"
    file.write_bytes(b"content")
    cache = DictCache()

    def change(count: int) -> None:
        os.utime(file, ns=(count, count))

    with (
        Root(tmp_path) as root,
        changing_while_read(monkeypatch, change),
        pytest.raises(FileChangedError, match="/file changed each of the 4 times"),
    ):
        list(hash_files(root, walk(tmp_path), cache, clock=far_in_the_future))
    assert cache.rows == {}


def test_a_file_that_has_become_a_directory_before_it_was_read_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail the task."""
    caplog.set_level("INFO", events.LOGGER_NAME)
    for name in ("1", "2"):
        (tmp_path / name).write_text(name)
    files = sorted(walk(tmp_path), key=lambda found: found.path)
    (tmp_path / "1").unlink()
    (tmp_path / "1").mkdir()

    with Root(tmp_path) as root:
        hashed = [found.path for found, _ in hash_files(root, files, None)]

    assert hashed == ["2"]
    [record] = caplog.records
    assert events.fields_of(record) == {"path": f"{tmp_path}/1", "reason": "it vanished"}


def test_a_file_that_vanished_before_it_was_read_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", events.LOGGER_NAME)
    for name in ("1", "2", "3"):
        (tmp_path / name).write_text(name)
    files = sorted(walk(tmp_path), key=lambda found: found.path)
    (tmp_path / "2").unlink()

    with Root(tmp_path) as root:
        hashed = [found.path for found, _ in hash_files(root, files, None)]

    assert hashed == ["1", "3"]
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ("INFO", events.FILE_SKIPPED)
    assert events.fields_of(record) == {"path": f"{tmp_path}/2", "reason": "it vanished"}


def test_a_wish_to_stop_ends_hashing_within_a_file_and_keeps_what_was_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1").write_bytes(b"small")
    (tmp_path / "2").write_bytes(bytes(5 * READ_BYTES))
    files = sorted(walk(tmp_path), key=lambda found: found.path)
    cancellation, cache, read = Cancellation(), DictCache(), []

    def change(count: int) -> None:
        read.append(count)
        if count == 3:
            cancellation.cancel()

    with (
        Root(tmp_path) as root,
        changing_while_read(monkeypatch, change),
        pytest.raises(CancelledError),
    ):
        list(hash_files(root, files, cache, cancellation=cancellation, clock=far_in_the_future))
    assert read == [1, 2, 3]
    assert list(cache.rows.values()) == [Digest.of(b"small")]


def test_a_wish_to_stop_ends_a_walk_at_the_next_directory(tmp_path: Path) -> None:
    (tmp_path / "deep/deeper").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "deep/deeper/file").touch()
    cancellation = Cancellation()
    walking = walk(tmp_path, cancellation=cancellation)

    assert next(walking).path == "file"
    cancellation.cancel()
    with pytest.raises(CancelledError):
        next(walking)


def test_a_file_that_can_not_be_read_is_an_error_that_names_it() -> None:
    # Reading the first page of a process's memory, which is never mapped, gives EIO.
    memory = FoundFile("mem", 0, 0, 0, 0, 0, 0, 0)

    with (
        Root(Path("/proc/self")) as root,
        pytest.raises(LocalReadError, match="self/mem can not be read: Input/output error"),
    ):
        list(hash_files(root, [memory], None))
