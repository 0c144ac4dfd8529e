"""The worker agent's `deadline_vfs`: one call mounts a root and stays, another one unmounts it.

The agent starts the first for each root of a VIRTUAL job, waits until the kernel knows the mount,
and prints what the call says. It has the second one unmount at the end of the session, and before
it mounts again with the outputs of other steps. What was written to the mount is there again then;
it lies in the session directory, not in the cache directory that the agent names: content that was
fetched is the host's, for all sessions.
"""

import os
import re
import select
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobNotFoundError,
    JobInvalidError,
    LocalReadError,
    LocalWriteError,
    MountFailedError,
    NotAllowedError,
    SettingsInvalidError,
    StoreAccessError,
    StoreError,
    StoreProtocolError,
    UnsafePathError,
)
from agent_plugin.content.mount_spec import Ready
from agent_plugin.content.mount_table import is_mounted
from agent_plugin.content.open_store import build_store
from agent_plugin.content.owner import Owner, acting
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.safe_path import Root
from agent_plugin.content.writes_probe import AUTO, choose_writes
from agent_plugin.mounting import open_mounts, path_of_mount
from agent_plugin.queue_settings import settings_of_queue
from agent_plugin.session.adopt import kept_writes, take_back
from agent_plugin.session.mount_request import ManifestFile, MountRequest
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.state import session_id
from agent_plugin.settings import Settings
from agent_plugin.workers.call import Call
from agent_plugin.workers.rights import check_mount_point, owner_of

_OPTIONS: Final = frozenset({"clienttype", "bucket", "manifest", "region", "casprefix", "cachedir"})
_FLAGS: Final = frozenset({"-f", "-oallow_other"})
# Content is at `<root prefix>/Data/<hash>.xxh128`; the agent names all of that but the last part.
_DATA: Final = "Data"
# What the agent writes when its credentials know no region.
_NO_REGION: Final = frozenset({"", "None"})
# Lines about reads that failed; each line costs money in the service's log.
MOST_FAILURES_TOLD: Final = 20
_LOOK_SECONDS: Final = 1.0
_POLL_MILLISECONDS: Final = 200
# The agent waits 60 s for the mount, and what is wrong for good is answered at once.
_FIRST_LOOK: Final = RetryPolicy(
    attempts=1, deadline_seconds=10.0, connect_timeout=3.0, read_timeout=5.0
)
_FIRST_ENTRIES_BYTES: Final = 64 * 1024
# The canonical form of an entry, which is what the agent writes.
_ENTRY: Final = re.compile(
    rb'\{"hash":"([0-9a-f]{32})","mtime":-?\d{1,19},"path":"[^"\\]*","size":(\d{1,19})\}'
)


@dataclass(frozen=True, slots=True)
class MountArguments:
    """What the agent asks to be mounted.

    Attributes:
        mountpoint, manifest: As they were given.
        store_url: Where content is.
        region: Of the bucket; empty if it is not known.
    """

    mountpoint: str
    manifest: str
    store_url: str
    region: str

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "MountArguments":
        """Return what a command line says.

        Raises:
            JobInvalidError: It has what is not known, or lacks what is needed; names it.
        """
        values: dict[str, str] = {}
        places: list[str] = []
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if name.startswith("--") and equals and name[2:] in _OPTIONS:
                values[name[2:]] = value
            elif argument.startswith("-") and argument not in _FLAGS:
                raise _refused(f"unknown option {name!r}")
            elif argument not in _FLAGS:
                places.append(argument)
        if not places or not places[0]:
            raise _refused("the mount point is missing")
        if len(places) > 1:
            raise _refused(
                f"unexpected argument {places[1]!r}",
                hint="the agent quotes no paths: its session root must have no spaces",
            )
        for name in ("bucket", "manifest"):
            if not values.get(name):
                raise _refused(f"--{name} is missing")
        above, _, last = values.get("casprefix", _DATA).rpartition("/")
        if last != _DATA:
            raise _refused(f"--casprefix={values['casprefix']} does not end in /{_DATA}")
        store_url = f"s3://{values['bucket']}/{above}"
        region = values.get("region", "")
        region = "" if region in _NO_REGION else region
        return cls(places[0], values["manifest"], store_url, region)


def parse_unmount(arguments: Sequence[str]) -> str:
    """Return the mount point that a command line of fusermount3 names.

    Raises:
        JobInvalidError: It asks for anything but to unmount.
    """
    asked = [argument for argument in arguments if argument not in ("-u", "-z", "-q", "--")]
    unknown = next((argument for argument in asked if argument.startswith("-")), None)
    if unknown is not None:
        raise _refused(f"unknown option {unknown!r}")
    if "-u" not in arguments or len(asked) != 1 or not asked[0]:
        raise _refused("one mount point to unmount has to be named: -u MOUNTPOINT")
    return asked[0]


def run_mount(call: Call, settings: Settings) -> int:
    """Mount a root, and stay until it is unmounted.

    Args:
        call: The agent's: `MOUNTPOINT -f --bucket=… --manifest=… …`.
        settings: The host's.

    Returns:
        0 when the mount was taken away.

    Raises:
        JobInvalidError: The arguments are not what is known.
        NotAllowedError: The mount point or the manifest is not the session's.
        ManifestInvalidError: The manifest is none.
        StoreAccessError: There is no such bucket, or it may not be read.
        MountFailedError: It can not be mounted, or its server died again and again.
        CancelledError: It was wished; the mount is gone.
        PropmasterError: Any other of the tree. Nothing is mounted then.
    """
    arguments = MountArguments.parse(call.arguments)
    session_dir = Path(os.path.realpath(call.session_dir))
    place = path_of_mount(session_dir / arguments.mountpoint)
    if place == session_dir or place in session_dir.parents:
        raise NotAllowedError(f"{place} holds the session directory: it can be no mount point")
    check_mount_point(place, session_dir, call.job_user, settings.worker)
    queue_id = call.environment.get("DEADLINE_QUEUE_ID", "")
    mounts = open_mounts(
        settings_of_queue(settings, queue_id) if queue_id else settings,
        queue_id=queue_id,
        user_id=None if call.job_user is None else call.job_user.uid,
    )
    mounts.clear_stale(call.cancellation)
    environment = _environment(call, arguments)
    owner = owner_of(call.job_user)
    with _open_manifest(arguments.manifest, session_dir, owner) as manifest:
        _see_mount_point(place, owner)
        account_id = _see_store(arguments.store_url, manifest.fd, environment, call)
        request = _request(call, arguments, manifest, place, session_dir, account_id)
        ready = mounts.start(request, cancellation=call.cancellation, environment=environment)
    call.say(
        f"propmaster: mounted {place}: {ready.files} files, {ready.bytes} bytes, in"
        f" {ready.seconds:.1f} s; {ready.transport}, writes by {ready.writes}"
    )
    return _stay(call, mounts, place, ready)


def run_unmount(call: Call, settings: Settings) -> int:
    """Unmount what `run_mount` mounted; what is not mounted is well.

    Args:
        call: The agent's: `-u MOUNTPOINT`.
        settings: The host's.

    Returns:
        0 when nothing is mounted there any more.

    Raises:
        JobInvalidError: The arguments are not what is known.
        NotAllowedError: The mount is another user's.
        SessionStateError: What is mounted there is none of ours.
        LocalWriteError: The kernel does not let it go.
    """
    place = path_of_mount(call.session_dir / parse_unmount(call.arguments))
    mounts = open_mounts(settings)
    known = mounts.spec_of(place)
    if call.job_user is not None and known is None and mounts.knows(place):
        # It is being made, and nothing says for whom yet.
        return 0
    if call.job_user is not None and known is not None and known[0].uid != call.job_user.uid:
        raise NotAllowedError(
            f"{place} was mounted for user {known[0].uid}, not for user {call.job_user.uid}"
        )
    ended = mounts.end(place)
    for holder in ended.holders if ended is not None else ():
        call.say(f"propmaster: {place} was in use by {holder}")
    return 0


def _refused(reason: str, *, hint: str = "") -> JobInvalidError:
    return JobInvalidError(
        f"deadline_vfs: {reason}",
        hint=hint or "this propmaster may be older than the worker agent that asks it",
    )


def _environment(call: Call, arguments: MountArguments) -> dict[str, str]:
    """Return what the mount's process gets: this one's, and the region that the agent found."""
    environment = {**os.environ, **call.environment}
    if arguments.region:
        environment["AWS_REGION"] = arguments.region
    return environment


@contextmanager
def _open_manifest(named: str, session_dir: Path, owner: Owner | None) -> Iterator[ManifestFile]:
    """Open the manifest; for another user what it may read in the session directory, by no link."""
    path = session_dir / named
    try:
        if owner is None:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        else:
            fd = _open_of_session(path, session_dir, owner)
    except OSError as error:
        raise LocalReadError(f"{path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise LocalReadError(f"{path} is no file")
        if owner is not None and status.st_nlink != 1:
            # Without root it is read with this process's rights: a link to what its maker may not.
            raise NotAllowedError(f"{path} has other names, perhaps outside of the session")
        yield ManifestFile(fd, os.fspath(path))
    finally:
        os.close(fd)


def _open_of_session(path: Path, session_dir: Path, owner: Owner) -> int:
    with owner.acting():
        real = Path(os.path.realpath(path.parent), path.name)
    if not real.is_relative_to(session_dir):
        raise NotAllowedError(f"the manifest {path} is not in the session directory {session_dir}")
    with Root(session_dir, owner=owner) as root:
        try:
            return root.open_file(real.relative_to(session_dir).as_posix())
        except UnsafePathError as error:
            raise NotAllowedError(error.message, hint=error.hint) from error


def _see_mount_point(place: Path, owner: Owner | None) -> None:
    """See that a directory is there, with nothing in it that a mount would hide."""
    # What is mounted is not looked at: its server may hang. Whoever mounts refuses it.
    if is_mounted(place):
        return
    try:
        with acting(owner):
            place.mkdir(exist_ok=True)
            if not stat.S_ISDIR(place.lstat().st_mode):
                raise LocalWriteError(f"{place} is a link", hint="a job may have put it there")
            is_empty = not any(place.iterdir())
    except OSError as error:
        raise LocalWriteError(f"{place}: {error.strerror}") from error
    if not is_empty:
        raise LocalWriteError(
            f"{place} is not empty", hint="what is in it would be hidden by the mount"
        )


def _see_store(url: str, manifest: int, environment: Mapping[str, str], call: Call) -> str:
    """Read a byte of the first file, and return the account that owns the bucket, if it is known.

    What no later try would mend is told before anything is mounted, and what a later try may mend
    is no reason not to mount.

    Raises:
        StoreAccessError, StoreProtocolError, SettingsInvalidError: See there.
    """
    store = build_store(
        url, environment=environment, policy=_FIRST_LOOK, concurrency=1, keys=call.keys
    )
    digest = _first_blob(manifest)
    try:
        if digest is not None:
            store.read_range(digest, 0, 1)
    except (StoreAccessError, StoreProtocolError, SettingsInvalidError):
        raise
    except BlobNotFoundError as error:
        call.say(f"propmaster: the store lacks content of this job: {error.message}")
    except StoreError as error:
        call.say(f"propmaster: the store does not answer now: {error.message}")
    return getattr(store, "account_id", None) or ""


def _first_blob(manifest: int) -> Digest | None:
    """Return some content that a manifest names, if that is found without decoding it all."""
    for entry in _ENTRY.finditer(os.pread(manifest, _FIRST_ENTRIES_BYTES, 0)):
        with suppress(ValueError):
            digest = Digest(entry[1].decode("ascii"), int(entry[2]))
            if digest.size:
                return digest
    return None


def _request(
    call: Call,
    arguments: MountArguments,
    manifest: ManifestFile,
    place: Path,
    session_dir: Path,
    account_id: str,
) -> MountRequest:
    user = call.job_user
    uid = os.geteuid() if user is None else user.uid
    gid = session_dir.stat().st_gid if user is None else user.gid
    work_dir = kept_writes(place, session_dir)
    take_back(work_dir, uid)
    writes = choose_writes(AUTO, work_dir)
    return MountRequest(
        manifest=manifest,
        mountpoint=place,
        work_dir=work_dir,
        store_url=arguments.store_url,
        account_id=account_id,
        writes=writes.writes,
        writes_reason=writes.reason,
        uid=uid,
        gid=gid,
        owner_pid=os.getpid(),
        gives_back=True,
        session=session_id(session_dir),
    )


def _stay(call: Call, mounts: Mounts, place: Path, ready: Ready) -> int:
    """Return when the mount is gone; end it when that is wished."""
    failures = _Failures(call, mounts, place)
    try:
        process = os.pidfd_open(ready.pid)
    except ProcessLookupError:
        process = -1
    if process >= 0:
        try:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            while not poll.poll(_POLL_MILLISECONDS):
                if call.cancellation.wished:
                    mounts.end(place)
                    call.cancellation.check()
                failures.tell()
        finally:
            os.close(process)
    reason = mounts.forget_ended(place, ready)
    if reason:
        raise MountFailedError(reason, hint="the job has to run again")
    call.say(f"propmaster: {place} is unmounted")
    return 0


class _Failures:
    """Tells of the reads that a mount has failed: the agent's own upload does not ask for them."""

    def __init__(self, call: Call, mounts: Mounts, place: Path) -> None:
        self._call = call
        self._mounts = mounts
        self._place = place
        self._told = 0
        self._next = 0.0

    def tell(self) -> None:
        """Say what is new, once in a while and up to a limit."""
        if self._told >= MOST_FAILURES_TOLD or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LOOK_SECONDS
        for failed in self._mounts.errors(self._place)[self._told : MOST_FAILURES_TOLD]:
            self._told += 1
            self._call.say(f"propmaster: {failed.path} could not be read: {failed.reason}")
        if self._told == MOST_FAILURES_TOLD:
            self._call.say("propmaster: there may be more; the mount's error ledger has all")
