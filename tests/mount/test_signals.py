"""Signals that come while the mount's process is at an answer: only what ends a process does."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from agent_plugin.content.manifest import Manifest
from tests.mount.conftest import Mounter
from tests.mount.prepared_mount import Prepared
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

# To be hashed takes longer than to be interrupted.
BYTES = 40 * 1024 * 1024
# By C's functions: Python's own calls again when it is interrupted.
CALLS = """
import ctypes, os, signal, sys

libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *_: None)
call, path = sys.argv[1], os.fsencode(sys.argv[2])
if call == "fsync":
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(20_000_000))
elif call == "pwrite":
    fd = os.open(path, os.O_WRONLY)
print("begins", flush=True)
sys.stdin.readline()
if call == "open":
    done = libc.open(path, os.O_RDONLY)
elif call == "fsync":
    done = libc.fsync(fd)
else:
    done = libc.pwrite(fd, b"hello", 5, ctypes.c_long(3))
print(done >= 0, os.strerror(ctypes.get_errno()), flush=True)
"""


@contextmanager
def server_stopped(mounter: Mounter, at: Path) -> Iterator[None]:
    server = mounter.status(at)["pid"]
    os.kill(server, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server, signal.SIGCONT)


def waits_for_an_answer(pid: int) -> bool:
    return "request_wait_answer" in Path(f"/proc/{pid}/stack").read_text()


def has_pending(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return any(
        line.startswith(("SigPnd", "ShdPnd")) and int(line.split()[1], 16)
        for line in status.splitlines()
    )


@pytest.fixture
def stored(mounter: Mounter) -> Manifest:
    source = mounter.home / "source"
    source.mkdir()
    (source / "a.vdb").write_bytes(os.urandom(BYTES))
    return mounter.stored(source)


@pytest.mark.parametrize(
    ("call", "writes", "name"),
    [
        ("open", "none", "a.vdb"),
        ("open", "overlayfs", "a.vdb"),
        ("fsync", "overlay", "new"),
        ("pwrite", "overlay", "a.vdb"),
    ],
)
def test_a_signal_that_a_process_handles_interrupts_no_call(
    mounter: Mounter, stored: Manifest, call: str, writes: str, name: str
) -> None:
    at = mounter.mount(stored, name="before")
    assert len((at / "a.vdb").read_bytes()) == BYTES
    # It is in the cache now, and has to be hashed again.
    at = mounter.mount(stored, writes=writes)
    (at / "a.vdb").stat()
    command = [sys.executable, "-c", CALLS, call, f"{at}/{name}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        said = _lines(process.stdout)
        assert said.readline() == b"begins\n"
        with server_stopped(mounter, at):
            assert process.stdin
            process.stdin.write(b"\n")
            process.stdin.flush()
            until(lambda: waits_for_an_answer(process.pid))
            process.send_signal(signal.SIGUSR1)
            until(lambda: has_pending(process.pid))
        assert said.readline() == b"True Success\n"


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT])
def test_who_has_had_a_signal_can_still_be_killed(
    tmp_path: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy, by: int
) -> None:
    url = f"s3://{s3.bucket}/{s3_prefix}"
    mounter = Mounter(tmp_path, url, environment=s3.environment_at(fault_proxy.url))
    source = mounter.home / "source"
    source.mkdir()
    (source / "a.tx").write_bytes(os.urandom(50_000))
    try:
        at = mounter.mount(mounter.stored(source, past_the_proxy=s3))
        stall = fault_proxy.inject(Fault.STALL)
        command = ["dd", f"if={at}/a.tx", "of=/dev/null", "bs=4096", "iflag=direct"]
        # It says how far it is at SIGUSR1, and goes on.
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as reader:
            try:
                until(lambda: stall.hits == 1)
                for _ in range(2):
                    reader.send_signal(signal.SIGUSR1)
                    with pytest.raises(subprocess.TimeoutExpired):
                        reader.wait(0.5)
                reader.send_signal(by)
                assert reader.wait(20) == -by
            finally:
                reader.kill()
        until(lambda: mounter.status(at)["counts"]["reads_interrupted"] == 1)
        assert mounter.errors(at) == []
    finally:
        fault_proxy.refuse(0)
        fault_proxy.clear()
        mounter.close()


def _lines(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe
    return pipe


# A read that waits until nobody wants it, and from then on no thread to be had.
WITHOUT_THREADS = """
import sys, threading, time
from vfs.service import NodeService
def refused(self):
    raise RuntimeError("can't start new thread")
def hang(self, node, offset, length, cancellation):
    threading.Thread.start = refused
    print("waits", flush=True, file=sys.stderr)
    while True:
        cancellation.check()
        time.sleep(0.05)
NodeService.read_now = lambda *_: -1
NodeService.read = hang
from vfs.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_who_has_had_a_signal_can_be_ended_where_the_host_gives_no_thread(
    mounter: Mounter, tmp_path: Path
) -> None:
    """Seen to hang: there was no thread that looked at whoever had had a signal."""
    mount = Prepared(mounter, tmp_path, "none")
    with mount.served_by(WITHOUT_THREADS) as process:
        command = ["dd", f"if={mount.at}/a", "of=/dev/null", "bs=4096", "iflag=direct"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as reader:
            try:
                until(lambda: "waits" in (mounter.home / "log").read_text())
                reader.send_signal(signal.SIGUSR1)
                until(lambda: has_pending(reader.pid))
                with pytest.raises(subprocess.TimeoutExpired):
                    reader.wait(0.5)
                reader.send_signal(signal.SIGTERM)
                assert reader.wait(20) == -signal.SIGTERM
            finally:
                reader.kill()
                process.terminate()
