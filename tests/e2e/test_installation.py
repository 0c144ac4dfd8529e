"""docs/OPERATING.md's steps, followed on a host that has nothing of ours.

The host is this one's files with an empty layer above, in namespaces of its own: packages, users
and units are written to the layer and are gone with it. Where a test says so systemd runs there, as
its first process, with nothing but what the units need.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
# As the document says it goes on, and who then runs what. The agent's unit is the operator's.
_START = """
cat > /etc/systemd/system/deadline-worker.service <<'END'
[Service]
ExecStart=/bin/sh -c 'echo $DEADLINE_VFS_PATH > /told; exec sleep 600'
END
systemctl daemon-reload
systemctl start propmaster.socket propmaster-collect.timer
systemctl restart deadline-worker
"""
_STATES = """
echo "socket $(systemctl is-active propmaster.socket)"
echo "timer $(systemctl is-active propmaster-collect.timer)"
echo "service $(systemctl is-active propmaster.service)"
systemctl start propmaster-collect.service
echo "collected $(systemctl show --property=Result --value propmaster-collect.service)"
echo "agent told $(cat /told)"
"""
# A mount that the unit's rights suffice for, as the service's calls make it.
_MOUNT = """
mkdir /data /store /mnt/at; echo prop > /data/a
number=0123456789abcdef0123456789abcdef
/opt/propmaster/bin/propmaster submit /data --store file:///store --farm-id farm-$number \
  --queue-id queue-$number > /dev/null 2>&1
cp $(find /store/Manifests -type f) /manifest
cat > /etc/systemd/system/mount-it.service <<'END'
[Service]
Type=oneshot
ExecStart=/opt/propmaster/bin/propmaster mount /manifest /mnt/at --store file:///store --json
StandardOutput=file:/mounted
StandardError=file:/mounted
KillMode=process
END
grep ^CapabilityBoundingSet= /etc/systemd/system/propmaster.service \
  >> /etc/systemd/system/mount-it.service
systemctl daemon-reload; systemctl start mount-it.service || { cat /mounted; exit 1; }
cat /mnt/at/a
pid=$(python3 -c 'import json; print(json.load(open("/mounted"))["pid"])')
for one in /proc/[0-9]*/cmdline; do
  grep -qzx vfs "$one" || continue
  echo "niceness $(cut -d ' ' -f 19 "${one%cmdline}stat")"
done
/opt/propmaster/bin/propmaster unmount /mnt/at > /dev/null
"""
_DOCTOR = (
    "/opt/propmaster/bin/propmaster doctor --agent --session-dir /sessions --job-user job-user"
)


_ROOT = """
set -eu
cd {home}
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
cd root
mount -t proc proc proc
for at in dev sys; do mount --rbind /$at $at; done
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
cp {wheel} srv/
"""
# https://systemd.io/CONTAINER_INTERFACE: /sys read-only, control groups of its own, `container`.
_BOOT = """
umount -R sys; mount -t sysfs -o ro sysfs sys
if [ -e /sys/fs/cgroup/cgroup.procs ]; then
  mount -t cgroup2 cgroup2 sys/fs/cgroup
else
  mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
  mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
  mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
  mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
fi
exec chroot . env -i container=test PATH="$PATH" /lib/systemd/systemd --unit=script.service
"""
# Of this host's own units; they would reach for its devices and its log.
_NOT_HERE = (
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-journald-dev-log.socket",
    "systemd-journal-flush.service",
    "systemd-remount-fs.service",
    "network-online.target",
)


class Layer:
    """A root directory above this host's own."""

    def __init__(self, home: Path, wheel: Path) -> None:
        self._home = home
        self._wheel = wheel

    def run(self, script: str, *, booted: bool = False) -> str:
        """Run a shell script there, with what earlier ones have written; processes end with it.

        Args:
            script: What to run.
            booted: systemd runs there, and starts it.
        """
        (self._home / "upper" / "script").write_text(script)
        exported = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        # What pip needs to know is all that a host's administrator would have set.
        environment = {**exported, "HOME": "/root", "PATH": _PATH}
        environment["WHEEL"] = f"/srv/{self._wheel.name}"
        inside = _ROOT.format(home=self._home, wheel=self._wheel)
        spaces = ["--mount", "--pid", "--fork", "--kill-child"]
        if booted:
            self._write_units(environment)
            inside += _BOOT
            spaces += ["--cgroup", "--ipc", "--uts"]
        else:
            inside += "chroot . bash /script\n"
        with _own_control_group() if booted else nullcontext() as enter:
            done = subprocess.run(
                [
                    "sh",
                    "-c",
                    f'{enter or ":"}; exec unshare "$@"',
                    "sh",
                    *spaces,
                    "bash",
                    "-c",
                    inside,
                ],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
        told = done.stdout
        if booted:
            told = (self._home / "upper" / "script.out").read_text()
        assert done.returncode == 0, told + done.stdout + done.stderr
        return told

    def _write_units(self, environment: dict[str, str]) -> None:
        units = self._home / "upper" / "etc" / "systemd" / "system"
        units.mkdir(parents=True, exist_ok=True)
        for name in _NOT_HERE:
            (units / name).unlink(missing_ok=True)
            (units / name).symlink_to("/dev/null")
        set_ = "".join(f'Environment="{name}={value}"\n' for name, value in environment.items())
        (units / "script.service").write_text(
            f"[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\n{set_}"
            "ExecStart=/bin/sh -c 'bash /script > /script.out 2>&1; systemctl exit $$?'\n"
        )


@contextmanager
def _own_control_group() -> Iterator[str]:
    """Make a control group for a systemd; yield the command by which a shell enters it."""
    root = Path("/sys/fs/cgroup")
    groups = [root] if (root / "cgroup.procs").exists() else [root / "systemd", root / "unified"]
    ours = [group / f"propmaster-test-{os.getpid()}" for group in groups if group.exists()]
    for group in ours:
        group.mkdir()
    try:
        yield " && ".join(f"echo $$ > {group}/cgroup.procs" for group in ours)
    finally:
        for group in ours:
            # From the innermost: the kernel's own files in them go by themselves.
            for path in sorted(group.rglob("*/"), reverse=True):
                path.rmdir()
            group.rmdir()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(directory)]
    subprocess.run([*argv, str(REPOSITORY)], check=True, capture_output=True)
    [found] = directory.glob("propmaster-*.whl")
    return found


@pytest.fixture
def layer(tmp_path: Path, wheel: Path) -> Iterator[Layer]:
    needed = ("unshare", "sudo", "useradd", "systemctl")
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
    told = layer.run(f"{steps('install')}\n{_START}\n{_MOUNT}\n{_DOCTOR}\n{_STATES}", booted=True)

    lines = told.splitlines()
    assert "The worker agent's jobs reach propmaster." in lines
    for state in ("socket active", "timer active", "service active", "collected success"):
        assert state in lines, told
    assert "agent told /opt/propmaster/deadline_vfs" in lines
    assert "prop" in lines
    assert sorted(line for line in lines if line.startswith("niceness")) == [
        "niceness -10",
        f"niceness {os.nice(0)}",  # as whoever runs these tests
    ]
    assert not [line for line in told.splitlines() if line.startswith("FAILS")]
    assert "vfs                /opt/propmaster/deadline_vfs" in told

    stop = "systemctl stop propmaster.socket propmaster.service propmaster-collect.timer"
    layer.run(
        f"{stop}\n{steps('uninstall')}\nbash /sum /after\ncmp /before /after\n"
        "! ls -d /opt/propmaster /etc/propmaster /var/lib/propmaster /var/cache/propmaster"
        " /etc/systemd/system/*propmaster*\n",
        booted=True,
    )


def test_the_host_configuration_script_does_the_same_and_may_run_twice(layer: Layer) -> None:
    script = (REPOSITORY / "packaging/host-configuration.sh").read_text(encoding="utf-8")
    once = f"bash -c {_quoted(script)}\n"

    told = layer.run(f"set -eu\n{once}{once}{_STATES}", booted=True)

    assert told.count("propmaster: done\n") == 2
    assert "service active" in told.splitlines()
    assert told.count("The worker agent's jobs reach propmaster.") == 2


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
