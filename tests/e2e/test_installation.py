"""docs/OPERATING.md's steps, followed on a host that has nothing of ours.

The host is this one's files with an empty layer above, in a mount namespace: packages, users and
units are written to the layer and are gone with it. systemd does not run there; the service is
started by its own socket activation, with the unit's command.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.deadline_peers import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(900)]

AGENT_VERSION = "0.33.6"
# Not the one of the tests' own Python, which others may not run.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BLOCK = re.compile(r"^```sh (install|uninstall)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a host with the agent has before: the agent, its user, and a user for jobs.
_BEFORE = f"""
set -eu
useradd --create-home deadline-worker
useradd --create-home job-user
usermod --append --groups job-user deadline-worker
echo 'deadline-worker ALL=(job-user) NOPASSWD:SETENV: ALL' > /etc/sudoers.d/deadline-worker
chmod 440 /etc/sudoers.d/deadline-worker
python3 -m venv /opt/deadline/worker
/opt/deadline/worker/bin/pip install -q deadline-cloud-worker-agent=={AGENT_VERSION}
mkdir -p /sessions
chown deadline-worker: /sessions
"""
_SUM = """
find /opt/deadline/worker/lib -name __pycache__ -prune -o -printf '%p %m %u %g %T@ ' \\
  \\( -type f -exec md5sum -b {} \\; -o -printf '\\n' \\) | sort > "$1"
"""
# As systemd does with the socket's unit: listens, and gives the socket to the service's command.
_SERVE = """
set -eu
socket=$(sed -n 's/^ListenStream=//p' /etc/systemd/system/propmaster.socket)
command=$(sed -n 's/^ExecStart=//p' /etc/systemd/system/propmaster.service)
systemd-socket-activate --listen="$socket" $command > /serve.log 2>&1 &
for _ in $(seq 100); do [ -S "$socket" ] && break; sleep 0.1; done
chmod 666 "$socket"
"""
_DOCTOR = (
    "/opt/propmaster/bin/propmaster doctor --agent --session-dir /sessions --job-user job-user"
)


class Layer:
    """A root directory above this host's own."""

    def __init__(self, home: Path, wheel: Path) -> None:
        self._home = home
        self._wheel = wheel

    def run(self, script: str) -> str:
        """Run a shell script there, with what earlier ones have written; processes end with it."""
        (self._home / "upper" / "script").write_text(script)
        inside = f"""
        set -eu
        cd {self._home}
        mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
        cd root
        mount -t proc proc proc
        for at in dev sys; do mount --rbind /$at $at; done
        mount -t tmpfs tmpfs run
        mount -t tmpfs -o mode=1777 tmpfs tmp
        cp {self._wheel} tmp/
        export WHEEL=/tmp/{self._wheel.name}
        chroot . bash /script
        """
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", inside],
            capture_output=True,
            text=True,
            # What pip needs to know is all that a host's administrator would have set.
            env={
                **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
                "HOME": "/root",
                "PATH": _PATH,
            },
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(directory)]
    subprocess.run([*argv, str(REPOSITORY)], check=True, capture_output=True)
    [found] = directory.glob("propmaster-*.whl")
    return found


@pytest.fixture
def layer(tmp_path: Path, wheel: Path) -> Iterator[Layer]:
    needed = ("unshare", "sudo", "useradd", "systemctl", "systemd-socket-activate")
    if missing := [name for name in needed if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("a root directory of its own needs root")
    # An upper directory must not be on overlayfs, which a container's root may be.
    home = tmp_path / "host"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", home], check=True)
    try:
        for name in ("upper", "work", "root"):
            (home / name).mkdir()
        made = Layer(home, wheel)
        made.run(_BEFORE + "cat > /sum <<'END'\n" + _SUM + "END\nbash /sum /before\n")
        yield made
    finally:
        subprocess.run(["umount", "--lazy", home], check=True)


def steps(name: str) -> str:
    """Return a block of the document's."""
    text = (REPOSITORY / "docs/OPERATING.md").read_text(encoding="utf-8")
    [block] = [block for kind, block in _BLOCK.findall(text) if kind == name]
    return f"set -eu\n{block}"


def test_the_steps_of_the_document_install_all_and_take_all_away(layer: Layer) -> None:
    told = layer.run(f"{steps('install')}\n{_SERVE}\n{_DOCTOR}\n")

    assert told.splitlines()[-1] == "The worker agent's jobs reach propmaster."
    assert not [line for line in told.splitlines() if line.startswith("FAILS")]
    assert "vfs                /opt/propmaster/deadline_vfs" in told

    layer.run(
        f"{steps('uninstall')}\nbash /sum /after\ncmp /before /after\n"
        "! ls -d /opt/propmaster /etc/propmaster /var/lib/propmaster /var/cache/propmaster"
        " /etc/systemd/system/*propmaster*\n"
    )


def test_the_host_configuration_script_does_the_same_and_may_run_twice(layer: Layer) -> None:
    script = (REPOSITORY / "packaging/host-configuration.sh").read_text(encoding="utf-8")
    once = f"bash -c {_quoted(script)}\n"

    told = layer.run(f"set -eu\n{once}{once}")

    assert told.splitlines()[-1] == "propmaster: done"
    assert told.count("The worker agent's jobs reach propmaster.") == 2


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
