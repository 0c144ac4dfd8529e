"""What is added to a mount while it is in use: seen at once, and by nobody who has the old open."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.manifest import Manifest, encode
from agent_plugin.content.mount_spec import Layer
from agent_plugin.content.store import Cancellation
from agent_plugin.session.mount_control import ask_mount
from tests.mount.conftest import Mounter
from tests.mount.prepared_mount import Prepared
from tests.servers.proxied_object import until
from tests.servers.trees import write_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def stored(mounter: Mounter, name: str, files: dict[str | bytes, bytes | int]) -> Manifest:
    source = mounter.home / name
    write_files(source, files, mtime_ns=1_600_000_000_000_000_000)
    return mounter.stored(source)


def add(mounter: Mounter, at: Path, manifest: Manifest, below: str = "") -> None:
    path = mounter.home / f"layer-{len(list(mounter.home.glob('layer-*')))}"
    path.write_bytes(encode(manifest))
    mounter.host.mounts.add(at, Layer(str(path), below), Cancellation())


def listed(at: Path) -> list[str]:
    return sorted(path.name for path in at.iterdir())


def test_a_layer_is_seen_at_once_and_an_open_file_keeps_its_content(mounter: Mounter) -> None:
    """Seen to fail without `forget_names`, and without the version of listings."""
    at = mounter.mount(stored(mounter, "a", {"same": b"same", "d/old": b"old", "d/kept": b"kept"}))
    with pytest.raises(FileNotFoundError):
        (at / "d/new").stat()
    with pytest.raises(FileNotFoundError):
        (at / "e").stat()
    assert (listed(at), listed(at / "d")) == (["d", "same"], ["kept", "old"])
    with (at / "d/old").open("rb", buffering=0) as held, (at / "d/kept").open("rb") as kept:
        assert held.read(1) == b"o"
        layer: dict[str | bytes, bytes | int] = {
            "same": b"same",
            "d/old": b"newer",
            "d/new": b"new",
            "e/f/g": b"deep",
        }
        add(mounter, at, stored(mounter, "b", layer))

        def is_seen() -> bool:
            return listed(at / "d") == ["kept", "new", "old"] and listed(at) == ["d", "e", "same"]

        until(is_seen)
        until(lambda: (at / "d/old").read_bytes() == b"newer")
        assert (at / "d/new").read_bytes() == b"new"
        assert (at / "e/f/g").read_bytes() == b"deep"
        assert held.read() == b"ld"
        assert os.pread(held.fileno(), 10, 0) == b"old"
        assert kept.read() == b"kept"
    # Whoever replaces the server has it as well, with the same nodes.
    nodes = [(at / name).stat().st_ino for name in ("d/old", "d/new", "e/f/g")]
    server = mounter.status(at)["pid"]
    os.kill(server, signal.SIGKILL)
    assert (at / "d/old").read_bytes() == b"newer"
    until(lambda: mounter.status(at)["pid"] != server)
    assert nodes == [(at / name).stat().st_ino for name in ("d/old", "d/new", "e/f/g")]
    add(mounter, at, stored(mounter, "c", {"d/third": b"third"}))
    until(lambda: "third" in listed(at / "d"))
    assert (at / "d/third").read_bytes() == b"third"


def test_what_can_not_be_where_something_is_is_refused_and_leaves_no_trace(
    mounter: Mounter,
) -> None:
    at = mounter.mount(stored(mounter, "a", {"d/old": b"old"}))
    with pytest.raises(MountFailedError, match="d is a file here"):
        add(mounter, at, stored(mounter, "b", {"d": b"a file", "other": b"x"}))
    assert listed(at) == ["d"]
    os.kill(mounter.status(at)["pid"], signal.SIGKILL)
    until(lambda: listed(at) == ["d"])
    assert mounter.host.mounts.end(at)
    with pytest.raises(MountFailedError, match="not mounted"):
        add(mounter, at, stored(mounter, "c", {"other": b"x"}))


# A server that leaves the first read of a file without an answer, and then has the kernel forget
# that file, which the kernel does when the read is answered.
FORGETTING = """
import os, sys
from vfs.transports.kernel_transport import KernelTransport
read = KernelTransport._read
def hold(self, unique, node, body):
    try:
        os.mkdir(sys.argv[1] + "-held")
    except FileExistsError:
        return read(self, unique, node, body)
    self.forget_content([node])
KernelTransport._read = hold
from vfs.__main__ import main
sys.exit(main([sys.argv[1]]))
"""


def is_stuck(pid: int) -> bool:
    """Whether a thread or child of a process waits in the kernel, uninterruptibly."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    # One of them may end meanwhile.
    with suppress(FileNotFoundError, ProcessLookupError):
        children = " ".join((task / "children").read_text() for task in tasks).split()
        stats = [task / "stat" for task in tasks]
        stats += [Path(f"/proc/{child}/stat") for child in children]
        return any(stat.read_text().rpartition(") ")[2][0] == "D" for stat in stats)
    return False


def test_a_server_that_is_killed_while_the_kernel_forgets_is_replaced(
    mounter: Mounter, tmp_path: Path
) -> None:
    """Seen to fail with the messages written by a thread: the killed server never ended."""
    mount = Prepared(mounter, tmp_path, "none")
    with mount.served_by(FORGETTING) as process:
        try:
            server = json.loads(ask_mount(mount.control, {"ask": "status"}))["pid"]
            with subprocess.Popen(["cat", mount.at / "a"], stdout=subprocess.PIPE) as reader:
                try:
                    until(partial(is_stuck, server))
                    os.kill(server, signal.SIGKILL)
                    assert reader.communicate(timeout=20)[0] == b"an input"
                finally:
                    reader.kill()
        finally:
            process.terminate()


def test_a_mount_that_is_ended_while_the_kernel_forgets_fails_its_readers(
    mounter: Mounter, tmp_path: Path
) -> None:
    """Seen to fail: what carried the message kept the mount, and its reader, for ever."""
    mount = Prepared(mounter, tmp_path, "none")
    with mount.served_by(FORGETTING) as process:
        server = json.loads(ask_mount(mount.control, {"ask": "status"}))["pid"]
        with subprocess.Popen(["cat", mount.at / "a"], stdout=subprocess.PIPE) as reader:
            try:
                until(partial(is_stuck, server))
                carriers = psutil.Process(server).children()
                assert len(carriers) == 1
                process.terminate()
                assert process.wait(20) == 0
                assert reader.communicate(timeout=20)[0] == b""
                assert reader.returncode == 1
            finally:
                reader.kill()
        until(lambda: not carriers[0].is_running())
