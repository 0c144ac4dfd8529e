"""A signal ends each command within a second, with 77, whatever it waits for."""

import fcntl
import os
import signal
import sqlite3
import statistics
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from tests.servers.command import Command
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import FARM, QUEUE
from tests.servers.promptness import STOP_SECONDS, seconds_until_end
from tests.servers.s3_server import S3Server
from tests.servers.sessions import Sessions
from tests.servers.trees import write_files

SIGNALS = [signal.SIGINT, signal.SIGTERM]
PIPE_BYTES = 4096


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "host")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest whose listing is larger than a pipe."""
    path = tmp_path / "manifest"
    digest = Digest.of(b"content")
    path.write_bytes(
        encode(
            Manifest.of(
                FileEntry(hash=digest.hex, mtime=0, path=f"textures/{at:08}", size=digest.size)
                for at in range(2000)
            )
        )
    )
    return path


def in_pipe(stream: IO[bytes] | None) -> int:
    """Return how many bytes of a pipe are not read yet; either end tells."""
    assert stream is not None
    (count,) = struct.unpack("i", fcntl.ioctl(stream.fileno(), termios.FIONREAD, b"\0" * 4))
    return int(count)


def sleeps(pid: int) -> bool:
    """Whether a process waits for something; source: proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("S")


def await_that(truth: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not truth():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the command did not get that far"
        time.sleep(0.005)


def stopped_by(number: signal.Signals, process: "subprocess.Popen[bytes]") -> float:
    """Send a signal, which has to stop the command; return the seconds until its end."""
    seconds = seconds_until_end(process, number)
    code = process.returncode
    stderr = process.communicate()[1].decode()

    assert (code, "error[cancelled]: stopped on request" in stderr) == (77, True), stderr
    assert "Traceback" not in stderr
    assert seconds < STOP_SECONDS
    return seconds


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "words",
    [
        "manifest show -",
        "manifest verify -",
        "manifest diff - MANIFEST",
        "session start --session-dir SESSION --job -",
        "cache clear",
    ],
)
def test_a_command_that_waits_for_its_input_is_stopped(
    command: Command, manifest: Path, words: str, number: signal.Signals
) -> None:
    with BlobCache.open(command.cache_dir, store_url="", max_bytes=1, min_free_bytes=0):
        pass
    places = {"MANIFEST": str(manifest), "SESSION": str(manifest.parent / "session")}
    with command.popen(*(places.get(word, word) for word in words.split())) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"half a line')
        process.stdin.flush()
        await_that(lambda: in_pipe(process.stdin) == 0, process)
        await_that(lambda: sleeps(process.pid), process)

        stopped_by(number, process)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_whose_output_nobody_takes_is_stopped(
    command: Command, manifest: Path, number: signal.Signals
) -> None:
    # Sized before there is anything in it: a pipe is not made smaller than what it holds.
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with os.fdopen(reads, "rb") as stdout:
        with os.fdopen(writes, "wb"):
            process = command.popen("manifest", "show", manifest, stdout=writes)
        with process:
            await_that(lambda: in_pipe(stdout) == PIPE_BYTES, process)

            stopped_by(number, process)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("words", ["manifest verify MANIFEST", "doctor --session-dir SESSIONS"])
def test_a_command_that_asks_a_store_which_hangs_is_stopped(
    s3: S3Server,
    s3_prefix: str,
    fault_proxy: FaultProxy,
    manifest: Path,
    words: str,
    number: signal.Signals,
) -> None:
    fault_proxy.inject(Fault.STALL, methods={"GET", "HEAD"}, key="Data/")
    environment = s3.environment_at(fault_proxy.url) | {"AWS_ACCOUNT_ID": "000000000000"}
    command = Command(manifest.parent / "host", environment)
    places = {"MANIFEST": str(manifest), "SESSIONS": str(manifest.parent)}
    arguments = [places.get(word, word) for word in words.split()]
    store = f"s3://{s3.bucket}/{s3_prefix}"
    with command.popen(*arguments, "--store", store) as process:
        await_that(lambda: any("Data/" in request.key for request in fault_proxy.requests), process)

        stopped_by(number, process)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_is_stopped_within_a_second(
    s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, manifest: Path, number: signal.Signals
) -> None:
    """The median of several, so that a moment in which the machine is busy does not count."""
    fault_proxy.inject(Fault.STALL, methods={"GET", "HEAD"}, key="Data/")
    command = Command(manifest.parent / "host", s3.environment_at(fault_proxy.url))
    store = f"s3://{s3.bucket}/{s3_prefix}"
    seconds = []
    for _ in range(7):
        fault_proxy.forget()
        with command.popen("manifest", "verify", manifest, "--store", store) as process:
            await_that(lambda: fault_proxy.count("HEAD", "Data/") > 0, process)

            seconds.append(stopped_by(number, process))

    assert statistics.median(seconds) < 1, seconds


@pytest.mark.parametrize("number", SIGNALS)
def test_a_submission_that_asks_a_store_which_hangs_is_stopped(
    s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, tmp_path: Path, number: signal.Signals
) -> None:
    write_files(tmp_path / "tree", {"scene.usd": b"a scene"}, mtime_ns=0)
    environment = s3.environment_at(fault_proxy.url) | {"AWS_ACCOUNT_ID": "000000000000"}
    command = Command(tmp_path / "host", environment)
    words = ("submit", tmp_path / "tree", "--store", f"s3://{s3.bucket}/{s3_prefix}")
    arguments = (*words, "--farm-id", FARM, "--queue-id", QUEUE)
    assert command(*arguments).code == 0
    # What the store is remembered to have is asked for before anything is sent.
    fault_proxy.inject(Fault.STALL, methods={"HEAD"}, key=Digest.of(b"a scene").hex)
    with command.popen(*arguments) as process:
        await_that(lambda: fault_proxy.count("HEAD", Digest.of(b"a scene").hex) > 0, process)

        stopped_by(number, process)


def test_an_end_that_has_begun_goes_on_to_its_end(sessions: Sessions) -> None:
    sessions.started(sessions.submitted())
    ledger = sqlite3.connect(sessions.host.state_dir / "ledger.db", isolation_level=None)
    # An end forgets the session's transfers when its files are gone; so long it waits for us.
    ledger.execute("BEGIN IMMEDIATE")
    arguments = ["session", "end", "--session-dir", str(sessions.session_dir)]
    with sessions.host.popen(*arguments) as process:
        deadline = time.monotonic() + 30
        while list(sessions.session_dir.glob("assetroot-*")):
            assert time.monotonic() < deadline, "the command removed nothing"
            time.sleep(0.005)

        process.send_signal(signal.SIGTERM)
        ledger.execute("ROLLBACK")
        ledger.close()
        _, stderr = process.communicate(timeout=30)

    assert process.returncode == 0, stderr
    assert sessions.host.read_state(sessions.session_dir) is None


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("install", ["cancel_on_signals()", "nullcontext(raise_on_signals())"])
def test_a_second_signal_of_either_kind_ends_the_process(
    install: str, second: signal.Signals
) -> None:
    program = f"""
import time
from contextlib import nullcontext
from agent_plugin.cli.signals import cancel_on_signals, raise_on_signals
with {install} as lent:
    try:
        print("ready", flush=True)
        lent.sleep(60) if lent else time.sleep(60)
    finally:
        print("first", flush=True)
        time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"first\n"
        process.send_signal(second)

        assert process.wait(30) == -second


def test_a_wish_is_over_when_its_work_is() -> None:
    program = """
import os, signal
from agent_plugin.cli.signals import cancel_on_signals
with cancel_on_signals() as cancellation:
    os.kill(os.getpid(), signal.SIGTERM)
    print(cancellation.wished)
try:
    os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    print("raised")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=30, check=False
    )

    assert (done.returncode, done.stdout) == (0, b"True\nraised\n"), os.fsdecode(done.stderr)
