"""Faults of this host under a session: full disks, damaged state, few descriptors.

Index and ledger may be lost at any time.
"""

import json
import os
import re
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import LocalWriteError, NoSpaceError
from agent_plugin.transfer.plan import SPARE_BYTES
from tests.servers.disks import (
    MEBIBYTE,
    fill,
    image_mounted,
    tmpfs_mounted,
    use_up_inodes,
)
from tests.servers.hooks import action
from tests.servers.local_farm import FILES, LARGE, Farm
from tests.servers.trees import files_below


def test_a_session_that_does_not_fit_is_refused_before_anything_is_written(farm: Farm) -> None:
    job = farm.submit(LARGE)
    host = farm.host()
    with tmpfs_mounted(farm.tmp_path / "disk", size=4 * MEBIBYTE) as disk:
        with pytest.raises(NoSpaceError, match="9000000 bytes are needed and") as caught:
            host.start(job, disk / "session")
        assert caught.value.exit_code == 72
        assert files_below(disk) == {}


@pytest.mark.parametrize("cached", [False, True])
def test_a_large_file_that_can_not_be_finished_is_told_by_name_and_is_not_there(
    farm: Farm, cached: bool
) -> None:
    """A limit on file sizes stands for every disk that says it has room and then has none."""
    job = farm.submit(LARGE)
    host = farm.host()
    if cached:
        farm.assert_starts(host, job, "earlier")
    session = farm.tmp_path / "session"
    limited = [
        "prlimit",
        f"--fsize={5 * MEBIBYTE}",
        *host.argv(*host.start_arguments(job, session)),
    ]

    done = subprocess.run(
        limited,
        env=host.process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 72, done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error[no-space]"))
    assert re.search(r"big\.abc: .*File too large$", error)
    assert files_below(session) == {}
    farm.assert_starts(host, job)


@pytest.mark.parametrize("cached", [False, True])
def test_a_disk_that_runs_out_in_the_middle_is_told_and_what_is_there_is_right(
    farm: Farm, cached: bool
) -> None:
    """It has bytes enough, so the session begins; what it runs out of is inodes."""
    job = farm.submit(FILES)
    host = farm.host()
    if cached:
        farm.assert_starts(host, job, "earlier")
    size = SPARE_BYTES + 40 * MEBIBYTE
    with image_mounted("ext4", farm.tmp_path / "image", farm.tmp_path / "disk", size=size) as disk:
        use_up_inodes(disk, leave=12)
        with pytest.raises(NoSpaceError, match=r"/tex/\d+\.tx: No space left") as caught:
            host.start(job, disk / "session")
        assert caught.value.exit_code == 72
        placed = files_below(disk / "session")
        assert placed
        facts = files_below(farm.source)
        for path, found in placed.items():
            assert found == facts[path.partition("/")[2]]
        for spare in disk.glob("i*"):
            spare.unlink()
        root = Path(host.start(job, disk / "session").roots[0].local_root)
        assert files_below(root) == facts


# ------------------------------------------------------------ state, index, ledger


def test_a_full_state_disk_is_told_and_once_there_is_room_the_session_starts(
    farm: Farm, expected_events: set[str]
) -> None:
    expected_events.add(events.INDEX_DISABLED)
    job = farm.submit(FILES)
    with tmpfs_mounted(farm.tmp_path / "disk", size=2 * MEBIBYTE) as disk:
        host = farm.host(state_dir=disk / "state")
        with host.services():
            pass
        filler = fill(disk)

        done = host.run(*host.start_arguments(job, farm.tmp_path / "session"))
        assert done.returncode == 72, done.stderr
        assert "error[no-space]" in done.stderr
        assert str(disk / "state") in done.stderr
        filler.unlink()
        farm.assert_starts(host, job)


def test_a_state_disk_that_was_never_written_and_is_full_is_told(farm: Farm) -> None:
    job = farm.submit(FILES)
    with image_mounted("ext4", farm.tmp_path / "image", farm.tmp_path / "disk") as disk:
        use_up_inodes(disk)
        host = farm.host(state_dir=disk / "state")

        done = host.run(*host.start_arguments(job, farm.tmp_path / "session"))

    assert done.returncode in (72, 80), done.stderr
    assert str(disk / "state") in done.stderr


def test_a_state_directory_that_others_could_write_is_refused(farm: Farm) -> None:
    job = farm.submit(FILES)
    host = farm.host()
    host.state_dir.mkdir(parents=True)
    host.state_dir.chmod(0o777)

    done = host.run(*host.start_arguments(job, farm.tmp_path / "session"))

    assert done.returncode == 80, done.stderr
    assert "is not private" in done.stderr


def _garbage(path: Path) -> None:
    path.write_bytes(b"garbage " * 1000)


def _garbage_behind_the_first_page(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))


def _cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _deleted(path: Path) -> None:
    path.unlink()


def _of_another_version(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 42")
    connection.close()


@pytest.mark.parametrize("name", ["index.db", "ledger.db"])
@pytest.mark.parametrize(
    "damage",
    [
        _garbage, _garbage_behind_the_first_page, _cut_off, _emptied, _deleted,
        _of_another_version,
    ],
    ids=lambda damage: damage.__name__.strip("_"),
)  # fmt: skip
def test_a_damaged_index_or_ledger_costs_one_failed_command_at_most(
    farm: Farm, name: str, damage: Callable[[Path], None], expected_events: set[str]
) -> None:
    expected_events.update(
        {events.INDEX_QUARANTINED, events.INDEX_DISABLED, events.LEDGER_QUARANTINED}
    )
    job = farm.submit(FILES)
    host = farm.host()
    root = farm.assert_starts(host, job)
    (root / "renders").mkdir()
    (root / "renders/x").write_bytes(b"1")
    damage(host.state_dir / name)

    run = action()
    if name == "ledger.db":
        # Damage that shows only when a page is needed: the ledger is set aside then.
        with suppress(LocalWriteError):
            host.finish_task(farm.tmp_path / "session", run)
            run = action()
            (root / "renders/x").write_bytes(b"2")
    finished = host.finish_task(farm.tmp_path / "session", run)

    assert finished.files == 1
    farm.assert_starts(host, job, "second")


# ------------------------------------------------------------ descriptors


def test_sixty_four_descriptors_are_enough(farm: Farm) -> None:
    """A tree of many directories, each of which is held open while files are put there."""
    files: dict[str | bytes, bytes | int] = {f"d{at}/e{at % 7}/f": 100 + at for at in range(150)}
    job = farm.submit(files | LARGE)
    host = farm.host()
    arguments = host.start_arguments(job, farm.tmp_path / "session")

    done = subprocess.run(
        ["prlimit", "--nofile=64:64", *host.argv(*arguments)],
        env=host.process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    root = Path(json.loads(done.stdout)["roots"][0]["localRoot"])
    assert files_below(root) == files_below(farm.source)
