"""The local index remembers what is still true, answers "unknown" otherwise, and never fails."""

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import EMPTY_HASH, Digest
from agent_plugin.content.local_index import (
    EXISTENCE_KEPT_SECONDS,
    HASHES_KEPT_SECONDS,
    SCHEMA_VERSION,
    LocalIndex,
)

URL = "s3://bucket/prefix"
ROOT = Path(__file__).resolve().parents[2]
LONG_AGO_NS = 1_700_000_000_123_456_789


class Clock:
    """Now, and as much later as the test says; or the moment at which the test has stopped it."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.stopped_at: float | None = None

    def __call__(self) -> float:
        return self.ahead + (time.time() if self.stopped_at is None else self.stopped_at)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "index.db"


@pytest.fixture
def index(path: Path, clock: Clock) -> Iterator[LocalIndex]:
    with LocalIndex.open(path, clock=clock) as index:
        assert index.enabled
        yield index


def numbered(number: int) -> Digest:
    return Digest.of(number.to_bytes(4, "big"))


def old_file(path: Path, data: bytes = b"content") -> Path:
    path.write_bytes(data)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return path


def remember(index: LocalIndex, file: Path) -> Digest:
    digest = Digest.of(file.read_bytes())
    index.remember_hashes([(os.fsencode(file), file.stat(), digest)])
    return digest


def look_up(index: LocalIndex, file: Path) -> Digest | None:
    return index.lookup_hashes([(os.fsencode(file), file.stat())]).get(os.fsencode(file))


def reasons(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [
        str(events.fields_of(record)["reason"])
        for record in caplog.records
        if record.getMessage() == event
    ]


def test_a_file_that_did_not_change_has_the_digest_it_had(
    index: LocalIndex, path: Path, tmp_path: Path
) -> None:
    file = old_file(tmp_path / "file")

    digest = remember(index, file)

    assert look_up(index, file) == digest
    index.close()
    with LocalIndex.open(path) as again:
        assert look_up(again, file) == digest


def test_a_file_that_nobody_remembered_is_unknown(index: LocalIndex, tmp_path: Path) -> None:
    assert look_up(index, old_file(tmp_path / "file")) is None


def _grow(file: Path) -> None:
    old_file(file, b"content!")


def _touch(file: Path) -> None:
    os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS + 1))


def _replace(file: Path) -> None:
    old_file(file.with_name("new"), b"CONTENT").replace(file)


def _edit_and_restore_time(file: Path) -> None:
    old_file(file, b"CONTENT")


CHANGES = {
    "another size, same times": _grow,
    "another modification time": _touch,
    "another file of the same size and time": _replace,
    "an edit of the same size whose time was set back": _edit_and_restore_time,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_unknown(index: LocalIndex, tmp_path: Path, change: str) -> None:
    file = old_file(tmp_path / "file")
    remember(index, file)
    before = file.stat()
    # The change time has the granularity of the kernel's tick, 10 ms at most.
    changed = False
    for _ in range(100):
        CHANGES[change](file)
        changed = file.stat().st_ctime_ns != before.st_ctime_ns
        if changed:
            break
        time.sleep(0.005)

    assert changed
    assert look_up(index, file) is None


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev"])
def test_each_part_of_a_files_state_counts(index: LocalIndex, field: str) -> None:
    state = {"st_size": 4, "st_mtime_ns": 10**18, "st_ctime_ns": 10**18, "st_ino": 7, "st_dev": 8}
    index.remember_hashes([(b"/file", described(**state), numbered(1))])
    assert index.lookup_hashes([(b"/file", described(**state))]) == {b"/file": numbered(1)}

    state[field] += 1

    assert index.lookup_hashes([(b"/file", described(**state))]) == {}


def described(
    *, st_size: int, st_mtime_ns: int, st_ctime_ns: int, st_ino: int = 1, st_dev: int = 1
) -> os.stat_result:
    """Return a stat that no file here may have: inodes, devices and times beyond 63 bits."""
    return os.stat_result(
        (stat.S_IFREG, st_ino, st_dev, 1, 0, 0, st_size, 0, 0, 0),
        {"st_mtime_ns": st_mtime_ns, "st_ctime_ns": st_ctime_ns},
    )


def test_inodes_and_devices_may_take_64_bits(index: LocalIndex) -> None:
    largest = described(
        st_size=4, st_mtime_ns=10**18, st_ctime_ns=10**18, st_ino=2**64 - 1, st_dev=2**64 - 1
    )

    index.remember_hashes([(b"/file", largest, numbered(1))])

    assert index.lookup_hashes([(b"/file", largest)]) == {b"/file": numbered(1)}
    assert index.enabled


@pytest.mark.parametrize("mtime_ns", [-(2**70), -(2**63), -1, 0, 2**63 - 1, 2**63, 2**70])
def test_no_time_that_somebody_set_breaks_it(index: LocalIndex, mtime_ns: int) -> None:
    info = described(st_size=4, st_mtime_ns=mtime_ns, st_ctime_ns=10**18)

    index.remember_hashes([(b"/file", info, numbered(1))])

    expected = {b"/file": numbered(1)} if -(2**63) <= mtime_ns <= time.time_ns() else {}
    assert index.lookup_hashes([(b"/file", info)]) == expected
    assert index.enabled


@pytest.mark.parametrize(
    ("age_seconds", "known"), [(-3600, False), (0, False), (1.9, False), (2.1, True)]
)
def test_a_file_modified_within_two_seconds_is_not_remembered(
    index: LocalIndex, clock: Clock, age_seconds: float, known: bool
) -> None:
    clock.stopped_at = 1_700_000_000.0
    mtime_ns = int((clock.stopped_at - age_seconds) * 1e9)
    info = described(st_size=4, st_mtime_ns=mtime_ns, st_ctime_ns=10**18)

    index.remember_hashes([(b"/file", info, numbered(1))])

    assert (index.lookup_hashes([(b"/file", info)]) != {}) == known


def test_a_digest_of_another_size_is_not_remembered(index: LocalIndex) -> None:
    info = described(st_size=5, st_mtime_ns=10**18, st_ctime_ns=10**18)

    index.remember_hashes([(b"/file", info, numbered(1))])

    assert index.lookup_hashes([(b"/file", info)]) == {}


@pytest.mark.parametrize(
    "name", [b"\xe9t\xe9", b"new\nline", b"a'b\"c", "ä€😀".encode(), b"\xff" * 200]
)
def test_names_are_bytes_and_need_not_be_text(
    index: LocalIndex, tmp_path: Path, name: bytes
) -> None:
    file = old_file(tmp_path / os.fsdecode(name))

    digest = remember(index, file)

    assert look_up(index, file) == digest


def test_names_that_differ_in_unicode_form_are_two_files(index: LocalIndex, tmp_path: Path) -> None:
    composed = old_file(tmp_path / "\N{LATIN SMALL LETTER A WITH DIAERESIS}", b"one")
    decomposed = old_file(tmp_path / "a\N{COMBINING DIAERESIS}", b"two")

    digests = remember(index, composed), remember(index, decomposed)

    assert (look_up(index, composed), look_up(index, decomposed)) == digests


def test_many_files_are_looked_up_and_remembered_at_once(index: LocalIndex) -> None:
    info = described(st_size=4, st_mtime_ns=10**18, st_ctime_ns=10**18)
    rows = [(f"/files/{number}".encode(), info, numbered(number)) for number in range(5000)]

    index.remember_hashes(iter(rows))
    found = index.lookup_hashes((path, info) for path, _info, _digest in rows)

    assert found == {path: digest for path, _info, digest in rows}


def test_the_last_digest_of_a_file_counts(index: LocalIndex) -> None:
    info = described(st_size=4, st_mtime_ns=10**18, st_ctime_ns=10**18)

    for number in (1, 2, 3):
        index.remember_hashes([(b"/file", info, numbered(number))])

    assert index.lookup_hashes([(b"/file", info)]) == {b"/file": numbered(3)}


def test_time_zones_and_summer_time_make_no_difference(
    index: LocalIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Within the hour that is there twice in Berlin, when summer time ended in 2023.
    repeated_hour_ns = 1_698_539_400 * 10**9
    files = [old_file(tmp_path / name) for name in ("first", "second")]
    for file, hours in zip(files, (0, 1), strict=True):
        os.utime(file, ns=(0, repeated_hour_ns + hours * 3600 * 10**9))
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    index.remember_present(URL, [numbered(1)])
    digests = [remember(index, file) for file in files]

    try:
        for zone in ("UTC", "Asia/Kolkata", "Pacific/Kiritimati", "America/Los_Angeles"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert [look_up(index, file) for file in files] == digests
            assert index.known(URL, [numbered(1)], 60) == {numbered(1)}
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_a_store_was_seen_to_have_is_known_until_it_is_too_old(
    index: LocalIndex, clock: Clock
) -> None:
    seen = [numbered(number) for number in range(2000)]
    index.remember_present(URL, iter(seen))
    asked = [*seen, numbered(5000)]

    assert index.known(URL, asked, 3600) == set(seen)
    clock.ahead = 3590
    assert index.known(URL, asked, 3600) == set(seen)
    clock.ahead = 3610
    assert index.known(URL, asked, 3600) == set()
    assert index.known(URL, asked, float("inf")) == set(seen)

    index.remember_present(URL, seen[:10])
    assert index.known(URL, asked, 3600) == set(seen[:10])


def test_stores_are_kept_apart(index: LocalIndex) -> None:
    index.remember_present(URL, [numbered(1)])

    assert index.known("s3://bucket/other", [numbered(1)], 3600) == set()


def test_a_blob_of_another_size_is_another_blob(index: LocalIndex) -> None:
    digest = numbered(1)
    index.remember_present(URL, [digest])

    assert index.known(URL, [Digest(digest.hex, digest.size + 1)], 3600) == set()


def test_what_is_forgotten_is_unknown(index: LocalIndex) -> None:
    index.remember_present(URL, [numbered(1), numbered(2)])

    index.forget(URL, numbered(1))
    index.forget(URL, numbered(3))

    assert index.known(URL, [numbered(1), numbered(2)], 3600) == {numbered(2)}


def test_what_was_seen_in_the_future_is_unknown(index: LocalIndex, clock: Clock) -> None:
    clock.ahead = 100_000
    index.remember_present(URL, [numbered(1)])
    clock.ahead = 0

    assert index.known(URL, [numbered(1)], 3600) == set()


def test_asking_for_nothing_gives_nothing(index: LocalIndex) -> None:
    index.remember_hashes([])
    index.remember_present(URL, [])

    assert index.lookup_hashes([]) == {}
    assert index.known(URL, [], 3600) == set()


def test_old_rows_expire_a_bounded_number_at_a_time(index: LocalIndex, clock: Clock) -> None:
    info = described(st_size=4, st_mtime_ns=10**18, st_ctime_ns=10**18)
    index.remember_hashes([(f"/{n}".encode(), info, numbered(n)) for n in range(10)])
    index.remember_present(URL, [numbered(n) for n in range(10)])
    assert index.expire() == 0

    clock.ahead = EXISTENCE_KEPT_SECONDS + 60
    index.remember_present(URL, [numbered(9)])
    assert index.expire(max_rows=6) == 6
    assert index.expire(max_rows=6) == 3
    clock.ahead = HASHES_KEPT_SECONDS + 60
    assert index.expire() == 11
    assert index.lookup_hashes([(b"/1", info)]) == {}


def test_everything_is_closed_to_others(index: LocalIndex, path: Path) -> None:
    index.remember_present(URL, [numbered(1)])

    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    assert modes == {"index.db": 0o600, "index.db-wal": 0o600, "index.db-shm": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def _write_garbage(path: Path) -> None:
    path.write_bytes(b"this is no database, " * 500)


def _write_few_bytes(path: Path) -> None:
    path.write_bytes(b"short")


def _set_version(version: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with sqlite3.connect(path) as connection:
            connection.execute(f"PRAGMA user_version = {version}")
        connection.close()

    return change


def _drop_a_table(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE existence_cache")
        connection.execute("DROP TABLE hash_cache")
    connection.close()


def _be_another_programs(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE hash_cache (theirs)")
    connection.close()


def _truncate(path: Path) -> None:
    os.truncate(path, 4096 + 100)


def _overwrite_pages(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))


def _link_elsewhere(path: Path) -> None:
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _open_to_others(path: Path) -> None:
    path.chmod(0o666)


def _set_hashes(value: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with sqlite3.connect(path) as connection:
            connection.execute(f"UPDATE hash_cache SET hash = {value}")
        connection.close()

    return change


DAMAGE = {
    "garbage": _write_garbage,
    "a few bytes": _write_few_bytes,
    "an older version": _set_version(-1),
    "a newer version": _set_version(SCHEMA_VERSION + 1),
    "another program's": _be_another_programs,
    "missing tables": _drop_a_table,
    "cut short": _truncate,
    "overwritten": _overwrite_pages,
    "a link": _link_elsewhere,
    "a directory": _make_directory,
    "a FIFO": _make_fifo,
    "writable by others": _open_to_others,
    "hashes cut short": _set_hashes("x'00'"),
    "hashes that are no bytes": _set_hashes("'15ae74710b17ad13fd43bec74e3c3fcd'"),
    "hashes that are text but not UTF-8": _set_hashes("CAST(x'ff' AS TEXT)"),
    "numbers for hashes": _set_hashes("1.5"),
    "the hash of no bytes": _set_hashes(f"x'{EMPTY_HASH}'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_set_aside_and_begun_anew(
    path: Path,
    tmp_path: Path,
    damage: str,
    expected_events: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected_events.add(events.INDEX_QUARANTINED)
    file = old_file(tmp_path / "file")
    many = [numbered(number) for number in range(1000)]
    with LocalIndex.open(path) as index:
        digest = remember(index, file)
        index.remember_present(URL, many)
    DAMAGE[damage](path)

    with LocalIndex.open(path) as index:
        # Damage deep in the file shows only when it is read.
        assert look_up(index, file) in (None, digest)
        assert index.known(URL, many, 3600) in (set(), set(many))
        remember(index, file)
        index.remember_present(URL, many)
        assert index.enabled
        remember(index, file)
        index.remember_present(URL, many)

        assert look_up(index, file) == digest
        assert index.known(URL, many, 3600) == set(many)
    assert len(reasons(caplog, events.INDEX_QUARANTINED)) == 1
    assert os.path.lexists(path.with_name("index.db.quarantined"))


@pytest.mark.parametrize("column", ["hash", "size", "last_seen"])
@pytest.mark.parametrize("value", ["x'00'", "'text'", "1e300"])
def test_rows_of_blobs_seen_that_make_no_sense_are_unknown(
    path: Path, column: str, value: str
) -> None:
    with LocalIndex.open(path) as index:
        index.remember_present(URL, [numbered(1)])
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE existence_cache SET {column} = {value}")
    connection.close()

    with LocalIndex.open(path) as index:
        assert index.known(URL, [numbered(1)], 3600) == set()
        index.forget(URL, numbered(1))
        index.remember_present(URL, [numbered(1)])
        assert index.known(URL, [numbered(1)], 3600) == {numbered(1)}


def test_at_most_one_damaged_file_is_kept(path: Path, expected_events: set[str]) -> None:
    expected_events.add(events.INDEX_QUARANTINED)
    LocalIndex.open(path).close()
    for _ in range(3):
        _write_garbage(path)
        LocalIndex.open(path).close()

    assert {file.name for file in path.parent.iterdir()} == {"index.db", "index.db.quarantined"}


def test_an_index_that_was_deleted_under_us_does_not_matter(
    index: LocalIndex, path: Path, tmp_path: Path
) -> None:
    file = old_file(tmp_path / "file")
    shutil.rmtree(path.parent)

    digest = remember(index, file)

    assert look_up(index, file) in (None, digest)
    with LocalIndex.open(path) as again:
        assert again.enabled


def test_a_directory_that_others_can_write_turns_it_off(
    path: Path, tmp_path: Path, expected_events: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected_events.add(events.INDEX_DISABLED)
    path.parent.mkdir()
    path.parent.chmod(0o777)

    with LocalIndex.open(path) as index:
        answers_unknown(index, tmp_path)

    [reason] = reasons(caplog, events.INDEX_DISABLED)
    assert "0777" in reason
    assert not path.exists()


def answers_unknown(index: LocalIndex, tmp_path: Path) -> None:
    file = old_file(tmp_path / "file")
    remember(index, file)
    index.remember_present(URL, [numbered(1)])
    index.forget(URL, numbered(1))
    assert not index.enabled
    assert look_up(index, file) is None
    assert index.known(URL, [numbered(1)], 3600) == set()
    assert index.expire() == 0


def test_a_place_where_no_file_can_be_turns_it_off(
    tmp_path: Path, expected_events: set[str]
) -> None:
    expected_events.add(events.INDEX_DISABLED)
    (tmp_path / "state").write_bytes(b"")

    with LocalIndex.open(tmp_path / "state" / "index.db") as index:
        answers_unknown(index, tmp_path)


def mounted(target: Path, *options: str) -> None:
    command = ["mount", "-o", ",".join(options), "-t", "tmpfs", "tmpfs", str(target)]
    subprocess.run(command, check=True, timeout=30)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    target = tmp_path / "disk"
    target.mkdir()
    mounted(target, "size=256k", "mode=0700")
    yield target
    subprocess.run(["umount", str(target)], check=True, timeout=30)


def test_a_full_disk_turns_it_off_with_one_warning(
    small_disk: Path,
    tmp_path: Path,
    expected_events: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected_events.add(events.INDEX_DISABLED)
    with LocalIndex.open(small_disk / "index.db") as index:
        for start in range(0, 20_000, 2000):
            index.remember_present(URL, [numbered(start + number) for number in range(2000)])

        answers_unknown(index, tmp_path)
    assert len(reasons(caplog, events.INDEX_DISABLED)) == 1


def test_a_full_disk_at_the_start_turns_it_off(
    small_disk: Path, tmp_path: Path, expected_events: set[str]
) -> None:
    expected_events.add(events.INDEX_DISABLED)
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        for _ in range(1000):
            filler.write(bytes(4096))

    with LocalIndex.open(small_disk / "index.db") as index:
        answers_unknown(index, tmp_path)


def test_a_read_only_disk_turns_it_off(
    small_disk: Path, tmp_path: Path, expected_events: set[str]
) -> None:
    expected_events.add(events.INDEX_DISABLED)
    with LocalIndex.open(small_disk / "index.db") as index:
        index.remember_present(URL, [numbered(1)])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=30)

    with LocalIndex.open(small_disk / "index.db") as index:
        index.remember_present(URL, [numbered(2)])
        answers_unknown(index, tmp_path)


def test_closing_twice_is_fine_and_afterwards_nothing_is_known(
    index: LocalIndex, tmp_path: Path
) -> None:
    index.remember_present(URL, [numbered(1)])

    index.close()
    index.close()

    answers_unknown(index, tmp_path)


def test_a_locked_index_waits(index: LocalIndex, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as threads:
        remembering = threads.submit(index.remember_present, URL, [numbered(1)])
        assert wait([remembering], timeout=0.3).not_done
        other.execute("COMMIT")
        remembering.result(60)
    other.close()

    assert index.known(URL, [numbered(1)], 3600) == {numbered(1)}


def test_a_reader_does_not_wait_for_a_writer(index: LocalIndex, path: Path) -> None:
    index.remember_present(URL, [numbered(1)])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    # Who waits in vain knows nothing.
    assert index.known(URL, [numbered(1)], 3600) == {numbered(1)}
    other.close()


def test_threads_take_turns(index: LocalIndex) -> None:
    def work(first: int) -> None:
        for start in range(first, first + 1000, 100):
            digests = [numbered(number) for number in range(start, start + 100)]
            index.remember_present(URL, digests)
            assert index.known(URL, digests, 3600) == set(digests)

    threads = [threading.Thread(target=work, args=(number * 1000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(index.known(URL, [numbered(number) for number in range(8000)], 3600)) == 8000


WRITER = """
import sys
from pathlib import Path
from agent_plugin.content.digest import Digest
from agent_plugin.content.local_index import LocalIndex
path, first = Path(sys.argv[1]), int(sys.argv[2])
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
for start in range(first, first + 5000, 100):
    with LocalIndex.open(path) as index:
        index.remember_present(
            "s3://bucket/prefix",
            [Digest.of(number.to_bytes(4, "big")) for number in range(start, start + 100)],
        )
        assert index.enabled
"""


@pytest.mark.parametrize("begun_as", ["absent", "garbage"])
def test_processes_that_open_and_write_at_once_lose_nothing(
    path: Path, begun_as: str, expected_events: set[str]
) -> None:
    expected_events.add(events.INDEX_QUARANTINED)
    path.parent.mkdir(mode=0o700)
    if begun_as == "garbage":
        _write_garbage(path)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, str(number * 5000)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"

    outputs = []
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    outputs = [writer.communicate(timeout=60) for writer in writers]

    assert [writer.returncode for writer in writers] == [0] * 4, outputs
    with LocalIndex.open(path) as index:
        asked = [numbered(number) for number in range(20_000)]
        assert len(index.known(URL, asked, 3600)) == 20_000


def test_a_writer_that_is_killed_leaves_a_whole_index(path: Path) -> None:
    for attempt in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, "0"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
        writer.stdin.write("go\n")
        writer.stdin.flush()
        time.sleep(0.02 * attempt)
        writer.kill()
        writer.communicate()

        with LocalIndex.open(path) as index:
            index.remember_present(URL, [numbered(1_000_000)])
            assert index.known(URL, [numbered(1_000_000)], 3600) == {numbered(1_000_000)}


def test_importing_the_index_does_not_import_sqlite() -> None:
    program = "import sys, agent_plugin.content.local_index; sys.exit('sqlite3' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
