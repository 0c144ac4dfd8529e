"""What `doctor --agent` looks at: whether a worker agent's jobs reach propmaster on this host.

Everything is tried as it is used: what job users do is done as the job user, what the agent does as
the agent's user. That needs root; what can not be tried is `unknown`.
"""

import grp
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from agent_plugin.content.errors import PropmasterError
from agent_plugin.doctor_files import Probe
from agent_plugin.settings import Settings
from agent_plugin.workers.deadline.agent_environment import find_agent
from agent_plugin.workers.deadline.agent_status import examine

_TRY_SECONDS: Final = 60.0
_SYSTEMD: Final = Path("/run/systemd/system")
_UNITS: Final = ("propmaster.socket", "propmaster-collect.timer")
# As a drop-in does before it asks: loads propmaster and its settings, and connects.
_CONNECT: Final = """
import socket, sys
from pathlib import Path
from agent_plugin.settings import load
from agent_plugin.workers import front
path = load(Path(sys.argv[1]) if sys.argv[1] else None).worker.socket
with socket.socket(socket.AF_UNIX) as asking:
    asking.settimeout(5)
    asking.connect(str(path))
print(f"it connects to {path}")
"""

Answer = tuple[bool | Literal["unknown"], str]


@dataclass(frozen=True, slots=True)
class Installation:
    """What is to be looked at.

    Attributes:
        agent_python: The Python of the agent's environment.
        config: The settings file that was named, if one was.
        session_dir: Where the agent makes sessions.
        job_user: A user that jobs run as; None: jobs run as the agent's user.
        vfs_prefix: Of the tree in which the agent finds `deadline_vfs`; None if none was installed.
    """

    agent_python: Path
    config: Path | None
    session_dir: Path
    job_user: str | None
    vfs_prefix: Path | None = None


def agent_probes(installation: Installation, settings: Settings) -> Iterator[Probe]:
    """Yield the probes one by one; the installation is whole if no needed one is not ok.

    Args:
        installation: What is to be looked at.
        settings: The host's.
    """
    yield from _scripts(installation, settings)
    yield _session_root(installation.session_dir, settings)
    if installation.job_user is None:
        return
    yield _agent_user(settings)
    job = _account(installation.job_user)
    if job is None:
        reason = f"there is no user {installation.job_user!r}"
        yield Probe("job_user", False, reason, "jobs of its queue fail", needed=True)
        return
    yield _job_user(job, installation.config)
    yield from _agent_as_job_user(settings, job)
    yield _units()


def _scripts(installation: Installation, settings: Settings) -> Iterator[Probe]:
    service = settings.worker.socket if installation.job_user is not None else None
    try:
        agent = find_agent(installation.agent_python)
        status = examine(
            agent, Path(sys.executable), service=service, vfs_prefix=installation.vfs_prefix
        )
    except PropmasterError as error:
        yield Probe("agent", False, error.message, error.hint or "give --agent-python", needed=True)
        return
    for check in status.checks:
        name = check.name.removesuffix(".py").replace(" ", "_")
        needed = name != "vfs"
        yield Probe(name, check.ok, check.reason, check.advice or "nothing", needed=needed)
    if installation.job_user is not None and installation.vfs_prefix is None:
        reason = "no tree for deadline_vfs was installed"
        advice = "VIRTUAL jobs are COPIED: `propmaster worker install` with --vfs-prefix"
        yield Probe("vfs", False, reason, advice)


def _session_root(directory: Path, settings: Settings) -> Probe:
    name, consequence = "session_root", "calls for sessions there are refused, or not safe"
    try:
        status = directory.stat()
    except OSError as error:
        return Probe(name, False, f"{directory}: {error.strerror}", consequence, needed=True)
    reason = f"{directory} belongs to {_user_name(status.st_uid)}"
    ok = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or bool(status.st_mode & stat.S_ISVTX)
    if not ok:
        reason += ", and others may write to it"
    roots = settings.worker.session_roots
    if roots and not any(directory.is_relative_to(root) for root in roots):
        ok, reason = False, f"{directory} is in none of [worker] session_roots"
    return Probe(name, ok, reason, consequence, needed=True)


def _agent_user(settings: Settings) -> Probe:
    name, wished = "agent_user", settings.worker.agent_user
    consequence = "set [worker] agent_user to the user that runs the agent, who owns the sessions"
    if not wished:
        return Probe(
            name, "unknown", "the service's own user, or root, is taken for it", consequence
        )
    ok = _account(wished) is not None
    reason = f"{wished}, as the settings say" if ok else f"there is no user {wished!r}"
    return Probe(name, ok, reason, consequence, needed=True)


def _job_user(job: pwd.struct_passwd, config: Path | None) -> Probe:
    argv = [sys.executable, "-P", "-c", _CONNECT, os.fspath(config) if config else ""]
    ok, reason = _run_as(job, argv)
    return Probe(
        "job_user",
        ok,
        f"{job.pw_name}: {reason}",
        "its jobs run with the agent's own scripts: it must be able to run propmaster, read the"
        " settings, and connect to the service",
        needed=True,
    )


def _agent_as_job_user(settings: Settings, job: pwd.struct_passwd) -> Iterator[Probe]:
    agent = _account(settings.worker.agent_user or "root")
    if agent is None:
        return
    group = grp.getgrgid(job.pw_gid).gr_name
    member = agent.pw_uid == 0 or job.pw_gid in os.getgrouplist(agent.pw_name, agent.pw_gid)
    yield Probe(
        "job_group",
        member,
        f"{agent.pw_name} is {'' if member else 'not '}in {group}, the group of {job.pw_name}",
        f"the agent can not give {job.pw_name} its session directory: usermod -aG {group}"
        f" {agent.pw_name}",
        needed=True,
    )
    sudo = shutil.which("sudo")
    if sudo is None:
        yield Probe("sudo", False, "there is no sudo", "the agent runs no job", needed=True)
        return
    for name, option, consequence, needed in (
        ("sudo", "-i", "the agent runs no job of that user", True),
        ("sudo_environment", "-E", "the agent mounts nothing: VIRTUAL jobs fail", False),
    ):
        ok, reason = _run_as(agent, [sudo, "-n", "-u", job.pw_name, option, "true"])
        found = (
            f"{agent.pw_name} may run `sudo {option} -u {job.pw_name}`" if ok is True else reason
        )
        yield Probe(name, ok, found, consequence, needed=needed)


def _units() -> Probe:
    consequence = "see docs/OPERATING.md, A worker host, step by step"
    if not _SYSTEMD.is_dir():
        return Probe("systemd", "unknown", "this host does not run systemd", consequence)
    off = [
        unit for unit in _UNITS if _run(["systemctl", "is-enabled", "--quiet", unit])[0] is not True
    ]
    reason = f"not enabled: {', '.join(off)}" if off else f"enabled: {', '.join(_UNITS)}"
    return Probe("systemd", not off, reason, consequence)


def _run_as(user: pwd.struct_passwd, argv: Sequence[str]) -> Answer:
    if user.pw_uid == os.geteuid():
        return _run(argv)
    if os.geteuid() != 0:
        return "unknown", f"only root, or {user.pw_name}, can try it"
    return _run(argv, user)


def _run(argv: Sequence[str], user: pwd.struct_passwd | None = None) -> Answer:
    path = os.environ.get("PATH", os.defpath)
    try:
        done = subprocess.run(  # noqa: S603 - our own argv, no shell
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TRY_SECONDS,
            check=False,
            cwd="/",
            user=user.pw_uid if user else None,
            group=user.pw_gid if user else None,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid) if user else None,
            env={"PATH": path, **({"HOME": user.pw_dir} if user else {})},
        )
    except OSError as error:
        return False, f"{argv[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return False, f"{argv[0]} did not end in {_TRY_SECONDS:.0f} s"
    told = (done.stdout if done.returncode == 0 else done.stderr).decode(errors="replace")
    lines = told.strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def _account(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
