"""What one hook leaves for the next: a typed JSON file in the state directory, one per session.

It is not in the session directory, because the job may write there. The file is replaced whole by
rename, 0600, and a lock beside it is held by the one hook that works on the session. Its form is in
docs/PROTOCOL.md (state file).
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.content.digest import hash_name
from agent_plugin.content.errors import LocalWriteError, SessionStateError, local_write_error
from agent_plugin.content.leftovers import remove_path
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.mount_spec import Layer
from agent_plugin.publish.result_documents import (
    ExcludedOutputs,
    Published,
    PublishFailure,
    Result,
)
from agent_plugin.publish.spec import Publishers
from agent_plugin.session.job import JobDocument
from agent_plugin.sources.spec import InputSource

VERSION: Final = 1

COPIED: Final = "COPIED"
VIRTUAL: Final = "VIRTUAL"

_LOCK_SUFFIX: Final = ".lock"


class BaselineFile(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What a file in an output directory was before the tasks ran.

    Attributes:
        hash: xxh128 of its content, 32 hex digits.
        size: Bytes.
        mtime: Microseconds since the epoch, as its manifest has it.
        mtime_ns, ctime_ns, inode: As the file system has it; all equal means untouched. All -1 for
            a file whose content must be looked at, whatever the file system says.
        owner: The task of this session that left it behind, or the session action of a chunk of
            tasks; empty for what was there before.
    """

    hash: str
    size: int
    mtime: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    owner: str = ""


class RootState(msgspec.Struct, rename="camel"):
    """One local root.

    Attributes:
        local_root: The directory.
        manifests: Indices into the job's list of manifests; several may share a root.
        output_directories: Relative to the root, `/` separated; `.` is the root itself.
        baseline: Files of the output directories by path; of a mounted root those that tasks of
            this session have left.
        written_to: Of a mounted root, where what is written goes; else empty.
        control: Of a mounted root, the socket that tells of its inputs; else empty.
        gone: Of a mounted root, the inputs that are not at their path any more.
        errors_told: Of a mounted root, how many failed reads finish-task has told of.
        layers: Of a mounted root, the outputs of other steps that were added to it.
        source: Of an input source, what the job says of it; else None.
        snapshot: Of an input source, the file that says which objects it is, in which state; empty
            until it is resolved. Nothing of the session asks for them by listing ever after.
        part: Of an input source that is parted, the part that is in place; None if none is.
        served_by: Of a root that was mounted for the session by another command, the process of
            its mount, `pid:start-time`; else empty.
        heard: By its path, each manifest of the worker agent's whose files are known, and which
            file it was then.
    """

    local_root: str
    root_path: str
    file_system: str
    manifests: list[int]
    output_directories: list[str]
    baseline: dict[str, BaselineFile] = {}
    written_to: str = ""
    control: str = ""
    gone: list[str] = []
    errors_told: int = 0
    layers: list[Layer] = []
    served_by: str = ""
    source: InputSource | None = None
    snapshot: str = ""
    part: int | None = None
    heard: dict[str, str] = {}

    @property
    def is_parted(self) -> bool:
        """Whether it is an input source of which each task has its part, by a parameter of it."""
        return self.source is not None and self.source.index_parameter != ""


class OutputManifestResult(msgspec.Struct, rename="camel", omit_defaults=True):
    """Where a root's output manifest is; both empty, and so left out, when it has no outputs."""

    output_manifest_path: str = ""
    output_manifest_hash: str = ""


class FinishResult(msgspec.Struct, rename="camel"):
    """What finish-task did; printed by `session finish-task --json`.

    Attributes:
        manifests: Parallel to the job's list of manifests.
        files: Files in all output manifests.
        bytes_uploaded, bytes_reused: Of their distinct content, what the store lacked and had.
        deleted: Paths of the output directories, below their local roots, that are gone.
        results: What publishers have published, the job's and then the host's, in their order.
        publish_failures: Why others have not; none of them is required.
        publish_excluded: What of the outputs was not published because people have excluded it.
    """

    manifests: list[OutputManifestResult]
    files: int
    bytes_uploaded: int
    bytes_reused: int
    deleted: list[str]
    seconds: float
    results: list[Result] = []
    publish_failures: list[PublishFailure] = []
    publish_excluded: list[ExcludedOutputs] = []


class AnsweredAction(msgspec.Struct, rename="camel"):
    """What finish-task answered a session action; `seconds` is left open.

    Attributes:
        publishing_since: When its outputs began to be published, seconds since the epoch; 0 before.
        publishers: Those that were to publish them, the job's and then the host's.
        published: What became of those that had their turn.
        is_published: Whether publishing is over, so that nothing is left to be done.
    """

    step_id: str
    task_id: str | None
    session_action_id: str
    result: FinishResult
    publishing_since: float = 0.0
    publishers: Publishers = ()
    published: list[Published] = []
    is_published: bool = False

    def is_of(self, step_id: str, task_id: str | None, session_action_id: str) -> bool:
        """Whether it is the answer to this action."""
        own = (self.step_id, self.task_id, self.session_action_id)
        return own == (step_id, task_id, session_action_id)


class LeftRoot(msgspec.Struct, rename="camel"):
    """What an action left below one local root; see `publish.outputs.RootOutputs`."""

    local_root: str
    follow: bool
    directory: str
    entries: list[FileEntry]


class LeftPublication(msgspec.Struct, rename="camel"):
    """An action of which not all is published: its end is tried again when the session ends.

    Attributes:
        action: The action, with what became of its publishers.
        roots: What it left.
    """

    action: AnsweredAction
    roots: list[LeftRoot]


class SessionState(msgspec.Struct, rename="camel"):
    """A session between two hooks.

    Attributes:
        ready: Whether start has finished; until then there is nothing to work with.
        account_id: Of the bucket's owner; empty: not to be had; None: not asked yet.
        was_ready: The session had started once when it was started again: tasks may have run.
        unfinished_steps: The steps whose sync has begun and not finished.
        wished: How inputs are to be brought in, `COPIED`, `VIRTUAL` or `AUTO`.
        answered: The last action that stored anything, for whom the answer did not reach.
        left: Of actions that are over, what is published at the session's end.
    """

    version: int
    session_id: str
    session_dir: str
    ready: bool
    job: JobDocument
    roots: list[RootState]
    account_id: str | None = None
    was_ready: bool = False
    unfinished_steps: list[str] = []
    answered: AnsweredAction | None = None
    wished: str = COPIED
    left: list[LeftPublication] = []

    def owns(self, root: RootState) -> bool:
        """Whether a root is a directory of the session: no link, and removed when it ends.

        A job may put links in the session's directory, and hooks may run with rights that it has
        not. A root that a rule maps elsewhere is the host's own matter. An input source may be
        further down.
        """
        above, inside = Path(root.local_root).parent, os.path.realpath(self.session_dir)
        if root.source is not None:
            inside = os.fspath(Path(inside, above.relative_to(self.session_dir)))
        return os.path.realpath(above) == inside


def session_id(session_dir: Path) -> str:
    """Return the key of a session: its directory's name and a hash of its real path."""
    real = os.path.realpath(session_dir)
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in os.path.basename(real))  # noqa: PTH119
    return f"{name[:40]}-{hash_name(real)[:16]}"


class StateFile:
    """The state file of one session, locked; made by `locked_state`."""

    def __init__(self, path: Path, session_dir: Path) -> None:
        self._path = path
        self._session_dir = session_dir

    @property
    def exists(self) -> bool:
        """Whether there is one, readable or not."""
        return self._path.exists()

    def read(self) -> SessionState | None:
        """Return the state, or None when there is none.

        Raises:
            SessionStateError: The file is damaged or of another version.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            state = _decode(data)
        except (msgspec.DecodeError, ValueError) as error:
            raise SessionStateError(
                f"{self._path} can not be read: {error}",
                hint="end the session (`propmaster session end`) and start it again",
            ) from error
        if state.version != VERSION:
            raise SessionStateError(
                f"{self._path} is of version {state.version}, this program writes {VERSION}",
                hint="finish running sessions before propmaster is updated",
            )
        return state

    def read_ready(self) -> SessionState:
        """Return the state of a session that has started.

        Raises:
            SessionStateError: It has not, or its start did not finish.
        """
        state = self.read()
        if state is None:
            raise SessionStateError(
                f"no session was started in {self._session_dir}",
                hint="run `propmaster session start` with the same --session-dir first",
            )
        if not state.ready:
            raise SessionStateError(
                f"the start of the session in {self._session_dir} did not finish",
                hint="run `propmaster session start` again; it goes on where it stopped",
            )
        return state

    def write(self, state: SessionState) -> None:
        """Replace the state.

        Raises:
            NoSpaceError, LocalWriteError: It can not be written; the old state stays.
        """
        temporary = self._path.with_suffix(".new")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(_encode(state))
            temporary.replace(self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise local_write_error(error, os.fspath(self._path)) from error

    def keep_layer(self, manifest: bytes) -> str:
        """Keep a manifest for as long as the session is known; return its path.

        Raises:
            NoSpaceError, LocalWriteError: It can not be written.
        """
        return _keep(manifest, self._layers)

    def keep_snapshot(self, snapshot: bytes) -> str:
        """Keep a source's snapshot for as long as the session is known; return its path.

        Raises:
            NoSpaceError, LocalWriteError: It can not be written.
        """
        return _keep(snapshot, self._snapshots)

    def remove(self) -> None:
        """Forget the session; nothing happens when it is forgotten already."""
        remove_path(self._layers)
        remove_path(self._snapshots)
        self._path.unlink(missing_ok=True)

    @property
    def _layers(self) -> Path:
        return self._path.with_suffix(".layers")

    @property
    def _snapshots(self) -> Path:
        return self._path.with_suffix(".sources")


def _keep(data: bytes, directory: Path) -> str:
    """Write a new file, closed to others; return its path."""
    path = directory / secrets.token_hex(8)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error
    return os.fspath(path)


def _encode(state: SessionState) -> bytes:
    try:
        return msgspec.json.encode(state)
    except UnicodeEncodeError:
        # A name that is not UTF-8 has lone surrogates; msgspec refuses them, json escapes them.
        return json.dumps(msgspec.to_builtins(state)).encode("ascii")


def _decode(data: bytes) -> SessionState:
    try:
        return msgspec.json.decode(data, type=SessionState)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return msgspec.convert(json.loads(data), SessionState)


@contextmanager
def locked_state(state_dir: Path, session_dir: Path) -> Iterator[StateFile]:
    """Lock a session's state for one hook.

    Raises:
        SessionStateError: Another hook works on the session right now.
        LocalWriteError: The state directory can not be written.
    """
    directory = state_dir / "sessions"
    state = directory / f"{session_id(session_dir)}.json"
    lock_path = state.with_suffix(_LOCK_SUFFIX)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        lock = _lock(lock_path)
    except BlockingIOError as error:
        raise SessionStateError(
            f"another command works on the session in {session_dir} right now",
            hint="wait until it has finished",
        ) from error
    except OSError as error:
        raise LocalWriteError(
            f"{directory}: {error.strerror}", hint="check the state directory's owner and mode"
        ) from error
    try:
        yield StateFile(state, session_dir)
    finally:
        try:
            # There is no such session: a mistyped directory must leave nothing.
            if not state.exists():
                _unlink_lock(lock_path, lock)
        finally:
            os.close(lock)


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock.

    Raises:
        BlockingIOError: Somebody else holds it.
        OSError: It can not be opened.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        # An ending session removed the file between the two calls: the lock is on nothing.
        os.close(fd)


def _unlink_lock(path: Path, held: int) -> None:
    # If somebody else removed ours, the one that stands there now is another hook's.
    if _is_at(path, held):
        path.unlink(missing_ok=True)


def _is_at(path: Path, fd: int) -> bool:
    """Whether the file that is open still stands there."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False
