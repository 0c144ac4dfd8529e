"""What both attachment drop-ins need for a call: the session's lock and state, and the services."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent_plugin.content.errors import SessionStateError, SettingsInvalidError
from agent_plugin.content.objects import ObjectAccess
from agent_plugin.content.owner import Owner
from agent_plugin.content.store import Cancellation
from agent_plugin.mounting import open_mounts
from agent_plugin.services import open_services, state_directory
from agent_plugin.session.adopt import adopt_mounts
from agent_plugin.session.job import JobDocument
from agent_plugin.session.known_roots import baseline_of, know_roots, started_elsewhere
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.state import (
    VIRTUAL,
    RootState,
    SessionState,
    StateFile,
    locked_state,
)
from agent_plugin.settings import Settings
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.progress import View
from agent_plugin.workers.call import Call
from agent_plugin.workers.deadline.properties import (
    OF_JOB,
    OF_STEPS,
    Arguments,
    SessionDirectory,
    WorkerRoot,
    job_of,
    parse_arguments,
    read_roots,
)
from agent_plugin.workers.rights import check_mapped_root, owner_of

if TYPE_CHECKING:
    from agent_plugin.content.s3_objects import S3Objects

# A call whose asker was killed goes on for a second at most, and holds the session's lock so long.
LOCK_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1
# The copies that our own uploads leave, which are named by the action.
_OURS: Final = re.compile(r"-sessionaction-[0-9a-f]{32}-[0-9]+\.manifest\Z")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call is about, read and checked.

    Attributes:
        directory: The session directory.
        owner: Whose the session's files are; None: this process's user.
        arguments: Of the command line.
        roots: That the call tells of.
        job: As far as the call tells; its manifests are those of `roots`, in their order.
    """

    directory: SessionDirectory
    owner: Owner | None
    arguments: Arguments
    roots: Sequence[WorkerRoot]
    job: JobDocument


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A session, locked, and what is needed to work on it."""

    state_file: StateFile
    context: TransferContext
    mounts: Mounts


def read_call(call: Call, settings: Settings) -> Asked:
    """Return what a call is about.

    Raises:
        JobInvalidError, PathMappingError, UnsafePathError, LocalReadError: It says what it may not.
        NotAllowedError: A root is where the job may have none.
    """
    arguments = parse_arguments(call.arguments)
    owner = owner_of(call.job_user)
    directory = SessionDirectory(call.session_dir, owner)
    roots = read_roots(directory, arguments.properties)
    for root in roots:
        check_mapped_root(root.local_root, call.session_dir, call.job_user, settings.worker)
    job = job_of(roots, arguments, call.environment, call.session_dir)
    return Asked(directory, owner, arguments, roots, job)


@contextmanager
def open_session(
    call: Call,
    settings: Settings,
    asked: Asked,
    *,
    view: Callable[[str], View],
    expect: Callable[[int, int], None] = lambda _files, _bytes: None,
) -> Iterator[OpenSession]:
    """Lock the session of a call, and open what is needed to work on it.

    Raises:
        SessionStateError: Another call works on the session, and does not end.
        PropmasterError: Any other of the tree.
    """
    with ExitStack() as stack:
        state_file = _lock(stack, state_directory(settings), call.session_dir, call.cancellation)
        state = state_file.read()
        queue_id = asked.job.queue_id
        user_id = asked.owner.uid if asked.owner is not None else None
        context = stack.enter_context(
            open_services(
                settings,
                asked.job.store_url,
                cancellation=call.cancellation,
                queue_id=queue_id,
                user_id=user_id,
                account_id=state.account_id if state is not None else None,
                environment=call.environment,
                keys=call.keys,
                owner=asked.owner,
                view=view,
                expect=expect,
            )
        )
        if call.job_user is not None:
            context = replace(context, open_objects=_of_the_job(context.open_objects))
        mounts = open_mounts(settings, queue_id=queue_id, user_id=user_id)
        yield OpenSession(state_file, context, mounts)


def _of_the_job(
    open_objects: "Callable[[ObjectAccess], S3Objects]",
) -> "Callable[[ObjectAccess], S3Objects]":
    """Return what opens objects with the job's own credentials alone.

    A profile is looked up in the job's files, where its user could give that name to anything.
    """

    def opened(access: ObjectAccess) -> "S3Objects":
        if access.profile:
            raise SettingsInvalidError(
                f"profile {access.profile!r}: a job user's calls have the job's credentials alone",
                hint="leave Profile out, and allow the queue's role to write to the bucket",
            )
        return open_objects(access)

    return opened


def _lock(
    stack: ExitStack, state_dir: Path, session_dir: Path, cancellation: Cancellation
) -> StateFile:
    tries = int(LOCK_SECONDS / _POLL_SECONDS)
    for _ in range(tries):
        try:
            return stack.enter_context(locked_state(state_dir, session_dir))
        except SessionStateError:
            cancellation.sleep(_POLL_SECONDS)
    return stack.enter_context(locked_state(state_dir, session_dir))


def know_session(asked: Asked, session: OpenSession, *, brings: bool) -> SessionState:
    """Return the state of a session that knows the roots of a call, whoever has started it.

    What is in the output directories of its roots as the agent's manifests say, other than by us,
    is known then, too: the agent's own scripts have worked wherever the host service was not there.

    Args:
        asked: What the call is about.
        session: The session.
        brings: What other steps have left is to be brought in now; else, if the agent has such
            manifests, its own script has brought it.

    Raises:
        SessionStateError: Its start did not finish; or the call is about another job.
        PropmasterError: Any other of the tree.
    """
    state = session.state_file.read()
    if state is None:
        state = started_elsewhere(asked.job, asked.directory.path)
    elif not state.ready:
        session.state_file.read_ready()
    added = know_roots(state, asked.job, [root.local_root for root in asked.roots])
    adopt_mounts(state, session.mounts)
    known = {root.local_root: root for root in state.roots}
    for index, worker_root in enumerate(asked.roots):
        root = known[os.fspath(worker_root.local_root)]
        _hear(root, worker_root, asked.directory, is_new=index in added, brings=brings)
    session.state_file.write(state)
    return state


def _hear(
    root: RootState,
    worker_root: WorkerRoot,
    directory: SessionDirectory,
    *,
    is_new: bool,
    brings: bool,
) -> None:
    """Have a root know what the agent's manifests say, as far as it does not by itself."""
    is_mounted = root.file_system == VIRTUAL
    unheard = []
    for path in dict.fromkeys(worker_root.manifests):
        if path.endswith(OF_JOB) and (is_mounted or not is_new):
            continue
        # What the agent has mounted has been made of both.
        if path.endswith(OF_STEPS) and root.served_by:
            continue
        if _OURS.search(path) and not is_new:
            continue
        mark = directory.mark(path)
        if not is_new and root.heard.get(path) == mark:
            continue
        root.heard[path] = mark
        if not (brings and worker_root.brings_step_outputs and path == worker_root.input_manifest):
            unheard.append(path)
    if is_new and not is_mounted:
        manifest = directory.read_manifests(
            [path for path in worker_root.manifests if path in unheard]
        )
        root.baseline = {**baseline_of(manifest, root), **root.baseline}
        return
    # The agent's download leaves alone what stands there; its upload tells what does.
    brought = directory.read_manifests([path for path in unheard if path.endswith(OF_STEPS)])
    uploaded = directory.read_manifests([path for path in unheard if not path.endswith(OF_STEPS)])
    root.baseline = {
        **baseline_of(brought, root),
        **root.baseline,
        **baseline_of(uploaded, root),
    }


def summary(files: int, *parts: str, seconds: float) -> str:
    """Return the one line that a call ends with."""
    return f"propmaster: {files} files, {', '.join(parts)}, {seconds:.1f} s"
