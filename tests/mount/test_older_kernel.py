"""A kernel that can not ask a successor again what it had asked a killed server (before 6.9)."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from agent_plugin.content.mount_table import is_mounted
from agent_plugin.session.mounts import ask_mount
from tests.mount.conftest import END_SECONDS, Mounter
from tests.mount.overlay_rig import MTIME_NS
from tests.servers.hooks import REPOSITORY
from tests.servers.proxied_object import until
from tests.servers.trees import files_below, write_files

# A server that dies while overlayfs is mounted, which asks it for the space that there is.
DYING = """
import os, sys
from vfs.transports.kernel_transport import KernelTransport, Opcode
statfs = KernelTransport._statfs
def die(self, unique, node, body):
    try:
        os.mkdir(sys.argv[1] + "-died")
    except FileExistsError:
        return statfs(self, unique, node, body)
    os._exit(9)
KernelTransport._statfs = die
from vfs.__main__ import main
sys.exit(main([sys.argv[1]]))
"""
WITHOUT_RESEND = """
import sys
from vfs.transports import kernel_transport
kernel_transport.WANTED &= ~kernel_transport.Feature.HAS_RESEND
from vfs.__main__ import main
sys.exit(main([sys.argv[1]]))
"""


class Prepared:
    """A mount of a small tree that is about to be made by a changed mount process."""

    def __init__(self, mounter: Mounter, tmp_path: Path, kept: str) -> None:
        source = tmp_path / "source"
        source.mkdir()
        write_files(source, {"a": b"an input", "d/b": 9000}, mtime_ns=MTIME_NS)
        inputs = mounter.stored(source)
        self.at = mounter.mount(inputs, writes=kept)
        place = Path(mounter.host.mounts.control_of(self.at)).parent
        spec = json.loads((place / "spec.json").read_bytes())
        mounter.host.mounts.end(self.at)
        self.control = f"{mounter.home}/control"
        self.errors = mounter.home / "errors"
        self._log = mounter.home / "log"
        self._spec = mounter.home / "spec.json"
        self._environment = mounter.host.process_environment()
        spec |= {"errors": os.fspath(self.errors), "control": self.control}
        spec |= {"workDir": f"{mounter.home}/work"}
        spec["manifests"] = [os.fspath(mounter.manifest_file(inputs))]
        self._spec.write_text(json.dumps(spec))

    @contextmanager
    def served_by(self, code: str) -> Iterator["subprocess.Popen[bytes]"]:
        with (
            self._log.open("wb") as log,
            subprocess.Popen(
                [sys.executable, "-c", code, self._spec],
                cwd=REPOSITORY,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
            ) as process,
        ):
            assert process.stdout
            ready, _, _ = select.select([process.stdout], [], [], 20)
            assert ready, "it hangs"
            assert json.loads(process.stdout.readline())["transport"] == "kernel"
            yield process

    def told(self, event: str) -> int:
        return self._log.read_text().count(f'"{event}"')


@pytest.mark.parametrize("kept", ["none", "overlayfs", "overlay"])
def test_a_mount_whose_kernel_can_not_ask_again_is_made_again(
    mounter: Mounter, tmp_path: Path, kept: str
) -> None:
    mount = Prepared(mounter, tmp_path, kept)
    at = mount.at
    with mount.served_by(WITHOUT_RESEND) as process:
        try:
            if kept != "none":
                (at / "a").rename(at / "renamed")
                (at / "new").write_bytes(b"written before")
            before = files_below(at)
            for deaths in (1, 2):
                dead = json.loads(ask_mount(mount.control, {"ask": "status"}))["pid"]
                os.kill(dead, signal.SIGKILL)
                until(partial(_has, mount, deaths))
                assert files_below(at) == before
        finally:
            process.terminate()
            process.wait(END_SECONDS)
    assert process.returncode == 0
    assert len(mount.errors.read_bytes().splitlines()) == 2, "each is told of the task"
    assert not is_mounted(at)
    assert not (mounter.home / "work/staged").exists()


def _has(mount: Prepared, remade: int) -> bool:
    return mount.told("mount.remade") == remade


def test_a_server_that_dies_while_overlayfs_is_mounted_is_replaced(
    mounter: Mounter, tmp_path: Path
) -> None:
    """Seen to hang when the supervisor mounts by itself: it waits for who it is to replace."""
    mount = Prepared(mounter, tmp_path, "overlayfs")
    with mount.served_by(DYING) as process:
        assert (mount.at / "a").read_bytes() == b"an input"
        process.terminate()
        process.wait(END_SECONDS)
    assert mount.told("mount.server_died") == 1
    assert not is_mounted(mount.at)
