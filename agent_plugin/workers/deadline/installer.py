"""Puts propmaster in place of the worker agent's attachment scripts, and takes it away again.

In the agent's `scripts` directory each script is replaced by our stub (script_stub.py), and the
agent's own is kept beside it: the same file, under another name. RECORD is left alone: pip removes
and replaces by its names and compares no hashes, so that an update of the agent simply puts its own
scripts back. Nothing else of the agent is touched; bytecode in `__pycache__` is not used for a
script that is run by its path, and an import finds that it is older than the stub.

The order makes every moment a whole one. Install: note the directory's time, in the name of an
empty file; link the original to its second name; rename the stub over the first. Uninstall: rename
the second name over the first; give the directory its time; forget that. So a script is always
there, and always either one of the two; whatever a killed run has left, the next one, of either
kind, takes up. Runs on one environment wait for each other, a minute at most.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NoReturn

import msgspec

from agent_plugin.content.errors import (
    AgentUnsupportedError,
    LocalReadError,
    LocalWriteError,
    PropmasterError,
    local_write_error,
)
from agent_plugin.content.lock_holder import take_flock
from agent_plugin.workers.deadline.agent_environment import (
    DOWNLOAD,
    SCRIPTS,
    UPLOAD,
    AgentEnvironment,
    sha256_of,
)

MODULES: Final = {
    DOWNLOAD: "agent_plugin.workers.deadline.start_download",
    UPLOAD: "agent_plugin.workers.deadline.start_upload",
}

_STUB: Final = Path(__file__).with_name("script_stub.py")
_FIRST_LINE: Final = "# Put here by propmaster in place of the worker agent's own script"
_INSTALLED: Final = re.compile(r"^INSTALLED = (\{.*\})$", re.MULTILINE)
_KEPT: Final = ".propmaster-original"
_PARTIAL: Final = ".propmaster-partial"
# Of the `scripts` directory: `.propmaster-time-<nanoseconds since the epoch>`.
_TIME: Final = ".propmaster-time-"
_PACKAGE: Final = "deadline_worker_agent"
_MAX_SCRIPT_BYTES: Final = 4 * 1024 * 1024

# Those who go on need seconds.
_LOCK_SECONDS: Final = 60.0

State = Literal["ours", "original", "changed", "missing"]


class Installed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stub says of itself; a line of its text.

    Attributes:
        python: Propmaster's.
        module: What is run with it.
        original: The name of the agent's own script, beside the stub.
        sha256: Of the agent's own script.
        agent: The agent's version.
        propmaster: The version that wrote the stub.
    """

    python: str
    module: str
    original: str
    sha256: str
    agent: str
    propmaster: str


class ScriptStatus(msgspec.Struct, rename="camel"):
    """One of the agent's scripts.

    Attributes:
        state: `ours`; `original`; `changed`: neither; `missing`.
        propmaster: The Python that runs ours; else empty.
        reason: What is not right; empty if it is as the state says and nothing more.
    """

    name: str
    path: str
    state: State
    propmaster: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Script:
    """One of the agent's scripts, as it was found.

    Attributes:
        state: As in ScriptStatus.
        sha256: Of what stands in its place; empty when nothing does.
        kept_sha256: Of what is kept beside it; empty when nothing is.
        installed: Of a stub.
        text: Of a stub.
    """

    path: Path
    state: State
    sha256: str = ""
    kept_sha256: str = ""
    installed: Installed | None = None
    text: str = ""

    @property
    def kept(self) -> Path:
        return self.path.with_name(self.path.name + _KEPT)

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + _PARTIAL)

    @property
    def stale(self) -> bool:
        """Whether what is kept is of before an update of the agent."""
        return self.state in ("original", "changed") and self.kept_sha256 not in ("", self.sha256)


def install(
    agent: AgentEnvironment, python: Path, propmaster: str, *, force: bool = False
) -> list[ScriptStatus]:
    """Have the agent call propmaster; done already, it mends what is not as it should be.

    Args:
        agent: Of a supported version.
        python: Propmaster's, which the stubs start.
        propmaster: Its version.
        force: Also replace a script that is not the one of the agent's package; it is kept.

    Raises:
        AgentUnsupportedError: The version is not supported, or a script is not the package's.
        LocalWriteError: Rights are missing; or another of the tree, by what the disk says.
    """
    agent.require_supported()
    with _scripts_directory(agent) as directory:
        scripts = [_look(agent, name) for name in SCRIPTS]
        for script in scripts:
            _refuse_unknown(agent, script, force=force)
        _note_time(directory, begin_anew=any(script.stale for script in scripts))
        for script in scripts:
            if script.state not in ("ours", "missing"):
                _keep(script)
            stub = _stub_text(agent, script, python, propmaster)
            if script.text != stub:
                _replace(script, stub)
            _remove(script.partial)
        _sync(directory)
        return [_told(_look(agent, name), agent) for name in SCRIPTS]


def uninstall(agent: AgentEnvironment) -> list[ScriptStatus]:
    """Give the agent its own scripts back, and leave nothing; twice does no harm.

    What an update of the agent has put into their place stays, and what was kept of the version
    before goes.

    Raises:
        AgentUnsupportedError: A script is ours and the agent's own is not kept, or is of another
            version; that one is left as it is.
        LocalWriteError: Rights are missing; or another of the tree, by what the disk says.
    """
    if not agent.version and not agent.scripts.is_dir():
        return []
    with _scripts_directory(agent) as directory:
        scripts = [_look(agent, name) for name in SCRIPTS]
        for script in scripts:
            if script.state == "ours":
                _refuse_lost(agent, script)
        as_before = agent.version != "" and not any(script.stale for script in scripts)
        for script in scripts:
            _give_back(agent, script)
        _restore_time(directory, wanted=as_before)
        _sync(directory)
        found = [_told(_look(agent, name), agent) for name in SCRIPTS]
    if not agent.version:
        _remove_empty(directory)
    return found


def look_at_scripts(agent: AgentEnvironment) -> list[ScriptStatus]:
    """Return what stands in the place of each of the agent's scripts.

    Raises:
        LocalReadError: One can not be read.
    """
    return [_told(_look(agent, name), agent) for name in SCRIPTS]


# ------------------------------------------------------------------------------------- looking


def _look(agent: AgentEnvironment, name: str) -> _Script:
    path = agent.scripts / name
    kept = _read(path.with_name(name + _KEPT))
    kept_sha256 = "" if kept is None else sha256_of(kept)
    data = _read(path)
    if data is None:
        return _Script(path, "missing", kept_sha256=kept_sha256)
    sha256 = sha256_of(data)
    if data.startswith(_FIRST_LINE.encode()):
        text = data.decode(errors="replace")
        installed = _installed(text)
        if installed is not None:
            return _Script(path, "ours", sha256, kept_sha256, installed, text)
    state: State = "original" if agent.knows(name, sha256) else "changed"
    return _Script(path, state, sha256, kept_sha256)


def _installed(text: str) -> Installed | None:
    line = _INSTALLED.search(text)
    try:
        return msgspec.json.decode(line[1], type=Installed) if line else None
    except msgspec.DecodeError:
        return None


def _read(path: Path) -> bytes | None:
    """Return a file's bytes; None when there is none, nothing of it when it is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if stat.S_ISLNK(path.lstat().st_mode):
            return b""
        raise LocalReadError(f"{path}: {error.strerror}, as {_whom()}") from error
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        return file.read(_MAX_SCRIPT_BYTES)


def _told(script: _Script, agent: AgentEnvironment) -> ScriptStatus:
    status = ScriptStatus(script.path.name, os.fspath(script.path), script.state)
    if script.installed is not None:
        status.propmaster = script.installed.python
        if script.installed.sha256 != script.kept_sha256:
            status.reason = "the agent's own script is not beside it: reinstall the agent"
        elif script.installed.agent != agent.version:
            status.reason = f"it was put there for agent {script.installed.agent}: reinstall it"
        elif script.text != _stub_text_of(script.installed):
            status.reason = "another version of propmaster put it there: install again"
    elif script.state == "original" and script.stale:
        status.reason = "an update of the agent has taken ours away: install again"
    elif script.state == "changed":
        status.reason = f"neither ours nor of agent {agent.version or 'any'}"
    return status


def _refuse_unknown(agent: AgentEnvironment, script: _Script, *, force: bool) -> None:
    """Refuse to replace what is not known, or can not be given back.

    Raises:
        AgentUnsupportedError: Naming the script and what to do.
    """
    if script.state == "ours":
        _refuse_lost(agent, script)
        return
    regular = script.state != "missing" and stat.S_ISREG(script.path.lstat().st_mode)
    if script.state == "original" or (force and regular) or _is_kept(agent, script):
        return
    reinstall = _reinstall(agent)
    if script.state == "missing":
        raise AgentUnsupportedError(f"{script.path} is missing", hint=reinstall)
    if not regular:
        raise AgentUnsupportedError(f"{script.path} is no regular file", hint=reinstall)
    raise AgentUnsupportedError(
        f"{script.path} is not the one of deadline-cloud-worker-agent {agent.version}: its SHA-256"
        f" is {script.sha256}",
        hint=f"{reinstall}; or replace it all the same with --force, it is kept",
    )


def _is_kept(agent: AgentEnvironment, script: _Script) -> bool:
    """Whether a script is missing, but the agent's own is kept beside its place."""
    return script.state == "missing" and agent.knows(script.path.name, script.kept_sha256)


def _refuse_lost(agent: AgentEnvironment, script: _Script) -> None:
    """Refuse to go on with a stub whose original is not there.

    Raises:
        AgentUnsupportedError: Naming the original and what to do.
    """
    installed = script.installed
    if installed is None or installed.sha256 != script.kept_sha256:
        raise AgentUnsupportedError(
            f"{script.kept} is not the agent's own script any more", hint=_reinstall(agent)
        )
    if installed.agent != agent.version:
        raise AgentUnsupportedError(
            f"{script.kept} is of agent {installed.agent}, and the agent is {agent.version}",
            hint=_reinstall(agent),
        )


def _reinstall(agent: AgentEnvironment) -> str:
    return (
        f"have its own scripts again: {agent.python} -m pip install --force-reinstall --no-deps"
        f" deadline-cloud-worker-agent=={agent.version}"
    )


# ------------------------------------------------------------------------------------- changing


def _keep(script: _Script) -> None:
    """Give the agent's own script its second name; the one that had it before is an old one."""
    with _told_as_write_error(script.kept):
        _remove(script.partial)
        try:
            # The same file: bytes, mode, owner and times, whoever we are.
            os.link(script.path, script.partial, follow_symlinks=False)
        except OSError:
            # A file system without links, or a file of another user (fs.protected_hardlinks).
            _copy(script.path, script.partial)
        if script.kept_sha256 and script.kept.samefile(script.partial):
            # Renaming a name of a file to another name of it does nothing.
            _remove(script.partial)
        else:
            script.partial.replace(script.kept)


def _copy(source: Path, target: Path) -> None:
    """Copy a file with its mode, owner and times."""
    shutil.copy2(source, target, follow_symlinks=False)
    status = source.stat()
    os.chown(target, status.st_uid, status.st_gid)
    # chown takes set-user-ID away, and copy2 came before it.
    target.chmod(stat.S_IMODE(status.st_mode))
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _replace(script: _Script, stub: str) -> None:
    with _told_as_write_error(script.path):
        status = (script.kept if script.state == "missing" else script.path).stat()
        _remove(script.partial)
        fd = os.open(script.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(stub.encode())
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
            file.flush()
            # An empty script after a power cut would fail every job.
            os.fsync(fd)
        script.partial.replace(script.path)


def _give_back(agent: AgentEnvironment, script: _Script) -> None:
    with _told_as_write_error(script.path):
        _remove(script.partial)
        if script.state == "ours" or _is_kept(agent, script):
            script.kept.replace(script.path)
        else:
            _remove(script.kept)


def _stub_text(agent: AgentEnvironment, script: _Script, python: Path, propmaster: str) -> str:
    name = script.path.name
    sha256 = script.installed.sha256 if script.installed is not None else script.sha256
    sha256 = sha256 or script.kept_sha256
    return _stub_text_of(
        Installed(
            python=os.fspath(python),
            module=MODULES[name],
            original=name + _KEPT,
            sha256=sha256,
            agent=agent.version,
            propmaster=propmaster,
        )
    )


def _stub_text_of(installed: Installed) -> str:
    # ASCII, and a literal of Python as well.
    line = json.dumps(msgspec.to_builtins(installed))
    return _INSTALLED.sub(lambda _: f"INSTALLED = {line}", _STUB.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------- the directory


@contextmanager
def _scripts_directory(agent: AgentEnvironment) -> Iterator[Path]:
    """Lend the scripts' directory, locked where its file system has locks.

    Raises:
        AgentUnsupportedError: It is not there.
        LocalWriteError: This user may not write to it, or another process keeps it locked.
    """
    directory = agent.scripts
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise AgentUnsupportedError(
            f"{directory}: {error.strerror}, as {_whom()}", hint=_reinstall(agent)
        ) from error
    try:
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            _refuse(directory, "no right to write to it")
        # NFS locks no file that is open for reading only.
        with suppress(OSError):
            take_flock(fd, os.fspath(directory), seconds=_LOCK_SECONDS)
        yield directory
    finally:
        os.close(fd)


def _note_time(directory: Path, *, begin_anew: bool) -> None:
    """Note the directory's time before it changes; an earlier note stays, if it is of use."""
    with _told_as_write_error(directory):
        before = _noted_times(directory)
        if before and not begin_anew:
            return
        name = f"{_TIME}{directory.stat().st_mtime_ns}"
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.close(fd)
        for old in before:
            if old != name:
                _remove(directory / old)


def _restore_time(directory: Path, *, wanted: bool) -> None:
    with _told_as_write_error(directory):
        noted = _noted_times(directory)
        for name in noted:
            _remove(directory / name)
        if noted and wanted:
            mtime_ns = int(noted[0].removeprefix(_TIME))
            os.utime(directory, ns=(directory.stat().st_atime_ns, mtime_ns))


def _noted_times(directory: Path) -> Sequence[str]:
    pattern = re.compile(re.escape(_TIME) + "[0-9]{1,19}")
    return sorted(name for name in os.listdir(directory) if pattern.fullmatch(name))  # noqa: PTH208


def _remove_empty(scripts: Path) -> None:
    """Remove what pip left because our files were in it, up to the agent's package."""
    for directory in (scripts, *scripts.parents):
        with suppress(OSError):
            directory.rmdir()
        if directory.name == _PACKAGE:
            return


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _told_as_write_error(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        _refuse(path, error.strerror or "no right")
    except OSError as error:
        raise _write_error(error, path) from error


def _write_error(error: OSError, path: Path) -> PropmasterError:
    return local_write_error(error, os.fspath(path))


def _refuse(path: Path, reason: str) -> NoReturn:
    owner = path.parent.stat().st_uid
    raise LocalWriteError(
        f"{path}: {reason}, as {_whom()}",
        hint=f"run it as root, or as the owner of the agent's environment, uid {owner}",
    )


def _whom() -> str:
    return f"uid {os.geteuid()}"
