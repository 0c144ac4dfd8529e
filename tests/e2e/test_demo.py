"""`propmaster demo` shows the whole main job, and what it shows is true."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers.command import Command, Done
from tests.servers.trees import files_below, write_files

NOT_UTF8 = b"shots/cup\xe9.exr"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "my project"
    write_files(
        root,
        {
            "scene.ma": b"create scene\ncreate light\n",
            "textures/wood.tx": 300_000,
            "textures/copy of wood.tx": b"wood" * 1000,
            "textures/wood again.tx": b"wood" * 1000,
            "shots/empty": b"",
            "report": b"has the name of the demonstration's output directory",
            NOT_UTF8: b"not UTF-8",
        },
        mtime_ns=1_700_000_000_123_456_789,
    )
    (root / "leak").symlink_to("/etc/hostname")
    return root


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    directory = tmp_path / "tmp"
    directory.mkdir()
    return directory


def _demo(tree: Path, temporary: Path, *options: str) -> Done:
    command = Command(temporary / "users", {"TMPDIR": str(temporary)})
    return command("demo", "--input", tree, *options)


def test_the_second_time_nothing_moves_and_nothing_is_left_behind(
    tree: Path, temporary: Path
) -> None:
    before = files_below(tree)
    done = _demo(tree, temporary, "--json")

    assert done.code == 0, done.stderr
    told = done.json
    assert (told["files"], told["inputsIdentical"], told["outputsIdentical"]) == (7, 7, 3)
    steps = {step["title"]: step for step in told["steps"]}
    wanted = told["bytes"] - 4000
    moved = {title: (step["bytesMoved"], step["bytesSaved"]) for title, step in steps.items()}
    outputs = steps["finish-task"]["bytesMoved"]
    assert moved["submit"] == (wanted, 0)
    assert moved["session start"][0] == wanted
    assert moved["session start again"][0] == 0
    assert moved["submit again"] == (0, wanted)
    assert outputs > 0
    assert moved["finish-task again"] == (0, outputs)
    virtual = told["virtual"]
    assert (virtual["outputsIdentical"], virtual["bytesMovedCopied"]) == (3, wanted)
    assert virtual["fileSystem"] == ("VIRTUAL" if os.geteuid() == 0 else virtual["fileSystem"])
    if virtual["fileSystem"] == "VIRTUAL":
        # One of the seven files, the first by name.
        only = (tree / "report").stat().st_size
        assert (virtual["reason"], virtual["bytesMoved"]) == ("", only)
        assert steps["session start VIRTUAL"]["bytesMoved"] == 0
    assert (told["directory"], list(temporary.iterdir())) == (None, [])
    assert files_below(tree) == before


def test_it_tells_a_newcomer_each_command_and_how_it_went(tree: Path, temporary: Path) -> None:
    done = _demo(tree, temporary)

    assert done.code == 0, done.stderr
    for verb in ("submit", "session start", "session finish-task", "outputs get", "session end"):
        assert f"$ propmaster {verb} " in done.text
    assert "skipped" in done.text
    assert "--output-dir report-2" in done.text
    if os.geteuid() == 0:
        assert "--file-system VIRTUAL" in done.text
        assert re.search(r"VIRTUAL: after .* moved \(", done.text)
    assert re.search(r"All well: 7 inputs and 3 outputs arrived byte for byte", done.text)
    assert done.stderr == ""


def test_what_is_kept_is_private_and_can_be_looked_at(tree: Path, temporary: Path) -> None:
    done = _demo(tree, temporary, "--keep")

    assert done.code == 0, done.stderr
    (directory,) = temporary.iterdir()
    assert f"Everything is kept in {directory}" in done.text
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "environment").stat().st_mode & 0o777 == 0o600
    picture = next((directory / "downloaded").rglob("sizes.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    sourced = subprocess.run(
        ["bash", "-euc", 'source environment && propmaster cache show && echo "$AWS_CONFIG_FILE"'],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"{directory}/cache" in sourced.stdout


@pytest.mark.parametrize("link", [None, "/etc/hostname"])
def test_a_directory_without_files_is_refused(
    tmp_path: Path, temporary: Path, link: str | None
) -> None:
    empty = tmp_path / "empty"
    (empty / "directory").mkdir(parents=True)
    if link:
        (empty / "leak").symlink_to(link)
    done = _demo(empty, temporary)

    assert done.code == 66
    assert f"error[job-invalid]: {empty} has no files that could be submitted" in done.stderr
    assert list(temporary.iterdir()) == []


@contextmanager
def _running(tree: Path, temporary: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "agent_plugin", "demo", "--input", tree],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_leaves_nothing(
    tree: Path, temporary: Path, number: signal.Signals
) -> None:
    with _running(tree, temporary) as process:
        deadline = time.monotonic() + 60
        while not list(temporary.glob("*/job.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait(60)

    assert (code, list(temporary.iterdir())) == (77, [])
