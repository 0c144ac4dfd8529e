"""A kernel that can not ask a successor again what it had asked a killed server (before 6.9)."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.mount_table import is_mounted
from agent_plugin.session.mount_control import ask_mount
from tests.mount.conftest import END_SECONDS, Mounter
from tests.mount.prepared_mount import Prepared
from tests.servers.proxied_object import until
from tests.servers.trees import files_below

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
# No server but the first one comes to serve.
ONE_SERVER = (
    """
import os, sys
from vfs.__main__ import Server
serve = Server.serve
Server.serve = lambda self, *given: os._exit(9) if given[3] else serve(self, *given)
"""
    + WITHOUT_RESEND
)


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


def test_a_mount_that_can_not_be_made_again_leaves_what_was_written_and_nothing_else(
    mounter: Mounter, tmp_path: Path
) -> None:
    mount = Prepared(mounter, tmp_path, "overlayfs")
    with mount.served_by(ONE_SERVER) as process:
        (mount.at / "new").write_bytes(b"written before")
        os.kill(json.loads(ask_mount(mount.control, {"ask": "status"}))["pid"], signal.SIGKILL)
        process.wait(END_SECONDS)
    assert process.returncode == MountFailedError.exit_code
    assert mounter.mounted() == []
    assert [path.name for path in (mounter.home / "work").iterdir()] == ["upper"]
    assert (mounter.home / "work/upper/new").read_bytes() == b"written before"


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
