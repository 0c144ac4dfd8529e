"""What an operator wants to know of an installation: each part looked at, and what to do about it.

Also keeps which environment was installed to, `worker.json` of the state directory, so that
`worker status` and `worker uninstall` need not be told again.
"""

import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin import __version__
from agent_plugin.content.errors import NotAllowedError, SessionStateError, local_write_error
from agent_plugin.content.private_file import replace_private_file
from agent_plugin.workers.call import DROP_INS
from agent_plugin.workers.deadline.agent_environment import SUPPORTED, AgentEnvironment
from agent_plugin.workers.deadline.installer import MODULES, ScriptStatus, look_at_scripts
from agent_plugin.workers.deadline.vfs_prefix import DEFAULT_PREFIX, prefix_status
from agent_plugin.workers.wire import Reply, read_replies

_RECORD: Final = "worker.json"
_START_SECONDS: Final = 60.0
# systemd starts the service when it is asked the first time, which takes it a second.
_ANSWER_SECONDS: Final = 30.0
_START: Final = "start it: `systemctl start propmaster`, or `propmaster worker serve`"
_LOOK: Final = "look why it does not start: `systemctl status propmaster`"
_DROP_IN_MODULES: Final = sorted({named.partition(":")[0] for named in DROP_INS.values()})
_TRY: Final = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
from agent_plugin import __version__
print(__version__)
"""


class Record(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Where propmaster was installed to.

    Attributes:
        agent_python: The Python of the agent's environment.
        vfs_prefix: Of the deadline_vfs tree; None where there is none.
    """

    agent_python: str
    vfs_prefix: str | None = None


class Check(msgspec.Struct):
    """One part of an installation.

    Attributes:
        reason: What was found.
        advice: What to do if it is not right.
    """

    name: str
    ok: bool
    reason: str
    advice: str = ""


class WorkerStatus(msgspec.Struct, rename="camel"):
    """What `worker status` tells; `ok` is whether every check is."""

    ok: bool
    agent_python: str
    agent_version: str
    scripts: list[ScriptStatus]
    vfs_prefix: str | None
    checks: list[Check]


def read_record(state_dir: Path) -> Record | None:
    """Return where propmaster was installed to, if it was.

    Raises:
        SessionStateError: The file is damaged.
    """
    path = state_dir / _RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise SessionStateError(
            f"{path} can not be read: {error}", hint="`propmaster worker install` writes it anew"
        ) from error


def write_record(state_dir: Path, record: Record | None) -> None:
    """Keep where propmaster is installed to; None forgets it.

    Raises:
        NoSpaceError, LocalWriteError: It can not be written; what was kept before stays.
    """
    path = state_dir / _RECORD
    if record is not None:
        replace_private_file(path, msgspec.json.encode(record), durable=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error


def examine(
    agent: AgentEnvironment,
    python: Path,
    *,
    service: Path | None,
    vfs_prefix: Path | None = None,
) -> WorkerStatus:
    """Look at an installation; change nothing.

    Args:
        agent: Where it is, or should be.
        python: Propmaster's, for when no script says which one.
        service: The host service's socket; None where jobs run as the agent's user, and so need
            neither the service nor a propmaster that others can run.
        vfs_prefix: Of the deadline_vfs tree, if there is to be one.

    Raises:
        LocalReadError: One of the agent's scripts can not be read.
    """
    scripts = look_at_scripts(agent)
    started = Path(next((each.propmaster for each in scripts if each.propmaster), python))
    checks = [_agent(agent), *map(_script, scripts), _starts(started)]
    if service is not None:
        checks += [_others_may_run(started), answers(service)]
    if vfs_prefix is not None:
        checks.append(_vfs(vfs_prefix))
    return WorkerStatus(
        ok=all(check.ok for check in checks),
        agent_python=os.fspath(agent.python),
        agent_version=agent.version,
        scripts=scripts,
        vfs_prefix=None if vfs_prefix is None else os.fspath(vfs_prefix),
        checks=checks,
    )


def _agent(agent: AgentEnvironment) -> Check:
    found = f"deadline-cloud-worker-agent {agent.version or 'is not installed'}"
    advice = f"supported are {SUPPORTED}; another goes on with its own scripts"
    return Check("agent", agent.supported, f"{found} ({agent.python})", advice)


def _script(script: ScriptStatus) -> Check:
    found = {
        "ours": f"propmaster's, run by {script.propmaster}",
        "original": "the agent's own",
        "changed": "somebody else's",
        "missing": "there is none",
    }[script.state]
    reason = f"{found}: {script.reason}" if script.reason else found
    ok = script.state == "ours" and not script.reason
    force = " --force" if script.state == "changed" else ""
    advice = f"jobs run without propmaster: `propmaster worker install{force}`"
    return Check(script.name, ok, reason, advice)


def _starts(python: Path) -> Check:
    try:
        done = subprocess.run(  # noqa: S603 - our own argv, no shell
            [python, "-P", "-c", _TRY, *MODULES.values(), *_DROP_IN_MODULES],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_START_SECONDS,
            check=False,
        )
    except OSError as error:
        reason, ok = f"{python}: {error.strerror}", False
    except subprocess.TimeoutExpired:
        reason, ok = f"{python} does not start in {_START_SECONDS:.0f} s", False
    else:
        ok = done.returncode == 0
        told = (done.stdout if ok else done.stderr).decode(errors="replace").strip().splitlines()
        last = told[-1] if told else f"exit code {done.returncode}"
        reason = f"propmaster {last} ({python})" if ok else f"{python}: {last}"
    advice = "jobs run with the agent's own scripts until it does: install propmaster again"
    return Check("propmaster", ok, reason, advice)


def _others_may_run(python: Path) -> Check:
    """Look at modes alone, since who the job users are is not known here."""
    real = Path(os.path.realpath(python))
    closed = [
        path
        for start in (Path(python), real)
        for path, needed in ((start, 0), *((parent, stat.S_IXOTH) for parent in start.parents))
        if _mode(path) & needed != needed
    ]
    if not _mode(real) & stat.S_IXOTH:
        closed.append(real)
    reason = f"{closed[0]} is closed to them" if closed else "every user may run it"
    advice = "put propmaster where job users can run it, below /opt for example"
    return Check("job users", not closed, reason, advice)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def answers(path: Path) -> Check:
    """See who answers at a socket, and not only that one can connect: systemd lets everybody."""

    def check(reason: str, *, ok: bool = False, advice: str = _START) -> Check:
        return Check("service", ok, reason, advice)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_ANSWER_SECONDS)
        try:
            asking.connect(os.fspath(path))
            # Who asks for nothing is told who would answer.
            asking.shutdown(socket.SHUT_WR)
            reply = next(read_replies(asking), Reply())
        except TimeoutError:
            return check(f"nobody has answered at {path} for {_ANSWER_SECONDS:.0f} s", advice=_LOOK)
        except (OSError, NotAllowedError) as error:
            return check(f"{path}: {getattr(error, 'strerror', None) or error}")
    if reply.begun is None:
        return check(f"who listens at {path} does not answer", advice=_LOOK)
    if reply.begun != __version__:
        return check(
            f"propmaster {reply.begun} answers at {path}, and {__version__} is installed",
            advice="restart it: `systemctl restart propmaster`",
        )
    return check(f"propmaster {reply.begun} answers at {path}", ok=True)


def _vfs(prefix: Path) -> Check:
    found = prefix_status(prefix)
    if prefix == DEFAULT_PREFIX:
        hint = "where the agent looks by itself"
    else:
        hint = f"the agent needs DEADLINE_VFS_PATH={prefix} in its environment"
    missing = "" if found.installed else f"{prefix} is no prefix of ours"
    defect = found.defect or missing
    advice = "VIRTUAL jobs are COPIED: `propmaster worker install` with the same --vfs-prefix"
    return Check("vfs", not defect, defect or f"{prefix}, {hint}", advice)
