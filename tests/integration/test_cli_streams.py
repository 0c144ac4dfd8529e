"""Standard streams that are closed, full or of another encoding than UTF-8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.command import CALL_SECONDS, Command
from tests.servers.trees import write_files

# Each is more than ASCII, and the last not even UTF-8.
NAMES: dict[str | bytes, bytes | int] = {"é.txt": b"1", "日本.txt": b"2", b"\xe9.txt": b"3"}


def shell(
    line: str, *arguments: str | Path, directory: Path, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash, in which `$@` is `propmaster <arguments>`."""
    words = [sys.executable, "-m", "agent_plugin", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", line, "bash", *words],
        env={**os.environ, **variables, "PROPMASTER_CACHE_DIR": str(directory / "cache")},
        capture_output=True,
        timeout=CALL_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "<&-", "<&- 1>&- 2>&-"])
@pytest.mark.parametrize("words", ["--version", "--help", "cache show", "cache show --json"])
def test_a_closed_stream_is_taken_as_empty(tmp_path: Path, words: str, closed: str) -> None:
    done = shell(f'"$@" {closed}', *words.split(), directory=tmp_path)

    assert (done.returncode, done.stderr) == (0, b"")
    assert bool(done.stdout) == ("1>&-" not in closed)


@pytest.mark.parametrize(
    ("words", "code"),
    [("cache clear", 77), ("manifest show -", 65), ("nothing", 2), ("manifest show /absent", 85)],
)
def test_a_failure_has_its_code_without_any_stream(tmp_path: Path, words: str, code: int) -> None:
    done = shell('"$@" <&- >&- 2>&-', *words.split(), directory=tmp_path)

    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize("words", ["--version", "--help", "cache show", "cache show --json"])
def test_output_that_finds_no_space_is_told_with_its_code(tmp_path: Path, words: str) -> None:
    done = shell('"$@" >/dev/full', *words.split(), directory=tmp_path)

    assert done.returncode == 72
    first, *rest = done.stderr.decode().splitlines()
    assert first == "error[no-space]: standard output: No space left on device"
    assert len(rest) == 1, "a hint, and no complaint of Python's"


def test_output_that_can_not_be_written_is_told_with_its_code(tmp_path: Path) -> None:
    done = shell('"$@" 1</dev/null', "cache", "show", directory=tmp_path)

    assert done.returncode == 80
    assert b"error[local-write-failed]: standard output: Bad file descriptor" in done.stderr


@pytest.mark.parametrize("words", ["--help", "manifest show MANIFEST"])
def test_a_reader_who_has_gone_is_no_trouble(tmp_path: Path, words: str) -> None:
    """Help fits into the buffer and is written at the end, the listing of many files is not."""
    write_files(tmp_path / "tree", {f"{at:0200}": b"" for at in range(500)}, mtime_ns=0)
    manifest = tmp_path / "manifest"
    command = Command(tmp_path / "host")
    assert command("manifest", "snapshot", tmp_path / "tree", "--output", manifest).code == 0
    arguments = words.replace("MANIFEST", str(manifest)).split()
    # The pipe is closed at its other end before the command begins.
    line = 'exec 3> >(exec true); wait $!; "$@" >&3'
    done = shell(line, *arguments, directory=tmp_path)

    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("broken", ["2>/dev/full", "2</dev/null"])
def test_a_failure_that_can_not_be_told_has_its_code(tmp_path: Path, broken: str) -> None:
    done = shell(f'"$@" {broken}', "manifest", "show", "/absent", directory=tmp_path)

    assert done.returncode == 85


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_json_is_utf8_whatever_the_encoding_of_the_locale(tmp_path: Path, encoding: str) -> None:
    write_files(tmp_path / "é", NAMES, mtime_ns=0)
    manifest = tmp_path / "é" / "manifest"
    variables = {"PYTHONIOENCODING": encoding, "PROPMASTER_STATE_DIR": str(tmp_path / "state")}
    arguments = ("manifest", "snapshot", tmp_path / "é", "--output", manifest, "--json")
    written = shell('"$@"', *arguments, directory=tmp_path, **variables)
    shown = shell('"$@"', "manifest", "show", manifest, "--json", directory=tmp_path, **variables)

    assert json.loads(written.stdout.decode("utf-8"))["output"] == str(manifest)
    paths = [entry["path"] for entry in json.loads(shown.stdout.decode("utf-8"))["paths"]]
    assert sorted(os.fsencode(path) for path in paths) == sorted(
        name if isinstance(name, bytes) else name.encode() for name in NAMES
    )


@pytest.mark.parametrize("words", ["", "session", "manifest", "cache", "outputs"])
def test_without_a_command_the_help_is_printed_as_it_is(tmp_path: Path, words: str) -> None:
    done = shell('"$@"', *words.split(), directory=tmp_path)

    assert done.returncode == 2
    lines = done.stderr.decode().splitlines()
    assert lines[0] == " ".join(f"Usage: propmaster {words} [OPTIONS] COMMAND [ARGS]...".split())
    assert "Commands:" in lines
    assert not [line for line in lines if "\\n" in line]
