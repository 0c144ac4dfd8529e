"""A host for the real worker agent: its own user, users for the jobs, and Pythons they may run.

The agent runs a job's actions as the job user by `sudo -u <user> -i`, and the VFS by `sudo -E` with
an environment of a few variables, so what the agent itself was started with reaches neither the
job, nor the attachment scripts, nor a mount. Endpoints come to them by sudo: `env_file` in its
configuration (sudoers(5)) sets variables for whatever the agent's user runs by it. Credentials are
not in it: they come by the profile that the agent writes and names in AWS_CONFIG_FILE.

The users are the host's real ones for as long as `open_host` is open, with a line each in
/etc/sudoers.d; their names carry the process id, so that test runs beside each other do not meet.
Their directories are below the temporary directory and not pytest's, which are closed to others.
"""

import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from agent_plugin.content.mount_table import read_mounts
from tests.servers.deadline_peers import REPOSITORY

_SUDOERS: Final = Path("/etc/sudoers.d")
_PREFIX: Final = "pm"
_COMMAND_SECONDS: Final = 60.0
_VERSION: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
# Nothing may reach the outside: what is not on the loopback interface is asked of a proxy on the
# discard port, which refuses at once. The agent looks for EC2's metadata service without a limit
# of time otherwise.
_NOWHERE: Final = "http://127.0.0.1:9"
OFFLINE: Final = {
    "http_proxy": _NOWHERE,
    "https_proxy": _NOWHERE,
    "no_proxy": "127.0.0.1,localhost",
    "AWS_EC2_METADATA_DISABLED": "true",
    "DEADLINE_CLOUD_TELEMETRY_OPT_OUT": "true",
}


@dataclass(frozen=True)
class WorkerHost:
    """Users and directories of a worker.

    Attributes:
        directory: Everybody may enter it; everything of the host is below.
        agent: The agent's user; it is in the job users' groups, and may be them by sudo.
        job: The user of one queue's jobs; its group has the same name.
        other_job: The user of another queue's jobs.
        base_python: A Python that all of them may run.
    """

    directory: Path
    agent: str
    job: str
    other_job: str
    base_python: Path

    def home(self, user: str) -> Path:
        """Return the home directory of a user."""
        return self.directory / "home" / user

    def begin(self, environment: Mapping[str, str]) -> None:
        """Empty all homes; from now on sudo sets `environment` for what the agent runs by it."""
        lines = [f"{name}={value}\n" for name, value in environment.items()]
        _environment_file(self.directory).write_text("".join(lines))
        for user in (self.agent, self.job, self.other_job):
            home = self.home(user)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True, mode=0o750)
            shutil.chown(home, user, user)

    def make_python(self, name: str, *, packages: Sequence[Path], copies: Sequence[Path]) -> Path:
        """Make an environment that all users may run, and that may be changed.

        Args:
            name: Of its directory.
            packages: Directories of importable packages, used where they are.
            copies: Packages and their metadata that are copied, so that what changes them leaves
                the originals as they are.

        Returns:
            Its Python.
        """
        root = self.directory / name
        site_packages = root / "lib" / _VERSION / "site-packages"
        site_packages.mkdir(parents=True)
        (root / "pyvenv.cfg").write_text(f"home = {self.base_python.parent}\n")
        (site_packages / "packages.pth").write_text("".join(f"{path}\n" for path in packages))
        for path in copies:
            shutil.copytree(path, site_packages / path.name)
        (root / "bin").mkdir()
        python = root / "bin" / "python3"
        python.symlink_to(self.base_python)
        return python

    def agent_python(self, peer: Path) -> Path:
        """Return a Python with a copy of a peer's worker agent; `peer` is the peer's Python."""
        [packages] = (peer.parents[1] / "lib").glob("*/site-packages")
        copies = [packages / "deadline_worker_agent"]
        copies += packages.glob("deadline_cloud_worker_agent-*.dist-info")
        return self.make_python(
            f"agent-{len(list(self.directory.iterdir()))}", packages=[packages], copies=copies
        )

    def own_python(self) -> Path:
        """Return a Python with this repository's packages, as installed on the host."""
        root = self.directory / "propmaster"
        if root.exists():
            return root / "bin" / "python3"
        packages = Path(sysconfig.get_paths()["purelib"])
        return self.make_python("propmaster", packages=[REPOSITORY, packages], copies=[])

    def argv_as(self, user: str, argv: Sequence[str | Path]) -> list[str]:
        """Return a command that runs another as a user, with the environment that it is given."""
        if user == "root":
            return [str(word) for word in argv]
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]
        return [*become, *(str(word) for word in argv)]

    def processes_of(self, *users: str) -> dict[int, str]:
        """Return the command lines of the processes of users, by their ids."""
        uids = {pwd.getpwnam(user).pw_uid for user in users}
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if process.stat().st_uid in uids:
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    found[int(process.name)] = b" ".join(words).decode(errors="replace").strip()
            except OSError:
                continue
        return found


@contextmanager
def open_host() -> Iterator[WorkerHost]:
    """Make the users and the directory; take all away afterwards.

    Skips the test where that can not be: without root, sudo, or a Python for everybody.
    """
    if os.geteuid() != 0:
        pytest.skip("making users needs root")
    if missing := [name for name in ("sudo", "useradd", "setpriv") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    _remove_leftovers()
    directory = Path(tempfile.mkdtemp(prefix="propmaster-worker-"))
    directory.chmod(0o755)
    names = [f"{_PREFIX}-{role}-{os.getpid()}" for role in ("agent", "job", "queue2job")]
    agent, *jobs = names
    try:
        for name in names:
            home = directory / "home" / name
            _run("useradd", "--user-group", "--no-create-home", "--home-dir", home, name)
            _run("usermod", "--shell", "/bin/bash", name)
        for name in jobs:
            _run("usermod", "--append", "--groups", name, agent)
        rule = f"Defaults:{agent} env_file={_environment_file(directory)}\n"
        rule += f"{agent} ALL=({','.join([*jobs, 'root'])}) NOPASSWD:SETENV: ALL\n"
        _sudoers(agent).write_text(rule)
        _sudoers(agent).chmod(0o440)
        python = _find_python(directory, agent)
        host = WorkerHost(directory, agent, jobs[0], jobs[1], python)
        host.begin({})
        yield host
    finally:
        _remove_users(names)
        left = [
            one.mountpoint for one in read_mounts() if one.mountpoint.startswith(f"{directory}/")
        ]
        assert not left, f"still mounted: {left}"
        shutil.rmtree(directory)


def _environment_file(directory: Path) -> Path:
    return directory / "sudo.environment"


def _sudoers(agent: str) -> Path:
    # sudo reads no file there with a dot in its name.
    return _SUDOERS / agent


def _find_python(directory: Path, user: str) -> Path:
    """Find a Python of this version that others may run; that of the tests may be in a home."""
    look = "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, sys.argv[1:])))"
    version = [str(part) for part in sys.version_info[:2]]
    for found in (os.path.realpath(sys.executable), shutil.which(_VERSION, path=os.defpath)):
        if found is None:
            continue
        # By a shell: setpriv itself still has root's rights when it looks for its command.
        argv = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--", "sh"]
        argv += ["-c", 'exec "$0" "$@"']
        try_it = [*argv, found, "-c", look, *version]
        if subprocess.run(try_it, cwd=directory, capture_output=True, check=False).returncode == 0:
            packages = sysconfig.get_paths()["purelib"]
            for path in (packages, str(REPOSITORY / "agent_plugin"), str(REPOSITORY / ".peers")):
                if subprocess.run([*argv, "ls", path], capture_output=True, check=False).returncode:
                    pytest.skip(f"{path} is closed to other users")
            return Path(found)
    return pytest.skip(f"there is no {_VERSION} that others may run")


def _remove_leftovers() -> None:
    """Remove the users of test runs that were killed."""
    for entry in pwd.getpwall():
        found = re.fullmatch(rf"{_PREFIX}-(?:agent|job|queue2job)-(\d+)", entry.pw_name)
        if found and not Path("/proc", found[1]).exists():
            _remove_users([entry.pw_name])


def _remove_users(names: Sequence[str]) -> None:
    for name in names:
        _sudoers(name).unlink(missing_ok=True)
        # The group goes with the user, unless somebody else is in it.
        for argv in (["userdel", "--force", name], ["groupdel", name]):
            subprocess.run(argv, capture_output=True, check=False)


def _run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=_COMMAND_SECONDS)
