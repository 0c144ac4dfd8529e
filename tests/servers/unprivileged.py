"""A host whose only user is not root, and on which that user may use /dev/fuse.

The machine of the tests may keep /dev/fuse for root, so commands run in a mount namespace with a
device of its own, and with the /etc/fuse.conf that a test wants; nothing outside of it changes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from agent_plugin.content.fusermount import find
from agent_plugin.content.mount_table import read_mounts
from tests.servers.hooks import CALL_SECONDS, REPOSITORY, Host
from tests.servers.other_user import NOBODY

# stat(2): makedev(10, 229) is /dev/fuse, of linux/miscdevice.h.
_FUSE_DEVICE = ("c", "10", "229")
_PYTHONPATH = f"{REPOSITORY}:{sysconfig.get_paths()['purelib']}"
_HOLD = """
mount --bind "$1/device" /dev/fuse && mount --bind "$1/fuse.conf" /etc/fuse.conf || exit 1
echo ready; read end
"""


# What a mount does: starts its own Python again, with the program's libraries.
_LOOK = """
import agent_plugin, msgspec, os, sys
os.stat(sys.argv[1])
pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


class Unprivileged:
    """Runs commands as nobody, all in one mount namespace.

    Attributes:
        home: Belongs to nobody, and everybody may enter it.
        host: A host below it.
    """

    def __init__(self, home: Path, namespace: int) -> None:
        self.home = home
        self.host = Host(home / "host", f"file://{home}/store")
        self.own()
        self._python = sys.executable
        self._argv = ["nsenter", f"--mount=/proc/{namespace}/ns/mnt", f"--wd={home}"]

    def own(self) -> None:
        """Give all of home to the user."""
        for path in (self.home, *self.home.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)

    def run(self, *argv: str | Path, user: int = NOBODY) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        process = self.popen(*argv, user=user)
        stdout, stderr = process.communicate(timeout=CALL_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def popen(self, *argv: str | Path, user: int = NOBODY) -> "subprocess.Popen[str]":
        """Start a command whose output is read later."""
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
        return subprocess.Popen(
            [*self._argv, *become, *map(str, argv)],
            env={**self.host.process_environment(), "PYTHONPATH": _PYTHONPATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def words(self) -> str:
        """Return how a shell of the user calls propmaster."""
        return f"{self._python} -m agent_plugin"

    def propmaster(self, *words: str | Path, user: int = NOBODY) -> str:
        """Run a propmaster command that succeeds; return what it printed."""
        done = self.run(self._python, *self.host.argv(*words)[1:], user=user)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def find_python(self) -> bool:
        """Find a Python that the user may run; that of the tests may be below a closed home."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for python in (sys.executable, shutil.which(version, path=os.defpath)):
            if python and self.run(python, "-c", _LOOK, self.host.config).returncode == 0:
                self._python = python
                return True
        return False

    def python(self, code: str) -> str:
        """Run Python code that succeeds; return what it printed."""
        done = self.run(self._python, "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def mounts(self) -> list[str]:
        """Return the types of what is mounted below home, as the user sees it."""
        done = self.run("cat", "/proc/self/mounts")
        lines = [line.split() for line in done.stdout.splitlines()]
        return [line[2] for line in lines if line[1].startswith(f"{self.home}/")]


@contextmanager
def unprivileged(*, allow_other: bool) -> Iterator[Unprivileged]:
    """Make such a host, and take it away with everything that is mounted there."""
    home = Path(tempfile.mkdtemp(prefix="propmaster-unprivileged-"))
    # pytest's own directories are closed to others.
    home.chmod(0o755)
    try:
        with fuse_for_all(home, allow_other=allow_other) as namespace:
            host = Unprivileged(home, namespace)
            if not host.find_python():
                pytest.skip("there is no Python of this version that others may run")
            yield host
    finally:
        assert not any(mount.mountpoint.startswith(f"{home}/") for mount in read_mounts())
        shutil.rmtree(home)


@contextmanager
def fuse_for_all(home: Path, *, allow_other: bool) -> Iterator[int]:
    """Have a mount namespace in which everybody may use /dev/fuse; yield a process that is in it.

    Args:
        home: Everything that is mounted is below it; the processes of mounts are ended.
        allow_other: Whether mounts without root may let others in.
    """
    if os.geteuid() != 0 or find() is None:
        pytest.skip("needs root, to become somebody else, and a setuid fusermount3 or fusermount")
    device = home / "device"
    if subprocess.run(["mknod", "-m", "666", device, *_FUSE_DEVICE], check=False).returncode:
        pytest.skip("devices can not be made here")
    (home / "fuse.conf").write_text("user_allow_other\n" if allow_other else "")
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "sh", "-c", _HOLD, "sh", home],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield holder.pid
    finally:
        _kill(home)
        holder.communicate()


def _kill(home: Path) -> None:
    """End the mounts' processes that are left: their namespace, and all in it, goes with them."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"vfs" in words and any(os.fsencode(home) in word for word in words):
                os.kill(int(process.name), 9)
