"""Mounts of this host: started as processes of their own, known by a directory each, and ended.

What is known of a mount is in `<state>/mounts/<name>/`: its spec, its manifest, the error ledger,
the control socket, what the process wrote, and (when it serves) who it is. So a later command ends
a mount that an earlier one began, and one whose process was killed is found and cleared by the
kernel's table, without touching what may hang.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.content import events
from agent_plugin.content.digest import hash_name
from agent_plugin.content.errors import (
    LocalWriteError,
    MountFailedError,
    NotAllowedError,
    PropmasterError,
    SessionStateError,
    local_write_error,
)
from agent_plugin.content.fuse_connection import FuseConnection
from agent_plugin.content.leftovers import remove_path
from agent_plugin.content.lock_holder import take_flock
from agent_plugin.content.log_file import LogPlace
from agent_plugin.content.mount_probe import AUTO
from agent_plugin.content.mount_spec import (
    TOLD_NS,
    VERSION,
    Layer,
    MountSpec,
    Ready,
    StoreLimits,
    leave_only_upper,
    read_spec,
    write_spec,
)
from agent_plugin.content.mount_table import is_mounted, read_mounts, unmount_all
from agent_plugin.content.store import Cancellation
from agent_plugin.session.mount_control import ask_whoever_serves
from agent_plugin.session.mount_process import (
    LAST_READERS_SECONDS,
    await_ready,
    end_process,
    end_servers,
    last_error,
    lives,
    servers_of,
    spawn,
    told_holders,
)
from agent_plugin.session.mount_request import (
    CachePlace,
    MountRequest,
    SpoolPlace,
    called,
    keep_manifest,
)
from agent_plugin.transfer.ledger import lease_owner

_POLL_SECONDS: Final = 0.02
# Whoever has the lock ends a mount perhaps, which takes END_SECONDS and some more.
LOCK_SECONDS: Final = 30.0
# For what others left, which is no reason to keep a session waiting for long.
STALE_LOCK_SECONDS: Final = 10.0

log = events.get_logger()


class MountRecord(msgspec.Struct, frozen=True, rename="camel"):
    """Who serves a mount: process id and start time, and what was chosen."""

    process: str
    ready: Ready


class FailedRead(msgspec.Struct, frozen=True):
    """A line of a mount's error ledger; see docs/PROTOCOL.md.

    Attributes:
        hash: Of the content; empty where nobody knows it.
        object, version: Of an input source, `s3://bucket/key` and the object's version.
    """

    time: float
    path: str
    size: int
    code: str
    reference: str
    reason: str
    hash: str = ""
    object: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A mount that is gone.

    Attributes:
        holders: Who had something of it in use until then: `pid name (what)`.
    """

    holders: list[str]


class Mounts:
    """The mounts that one state directory knows.

    Args:
        state_dir: Private to this user.
        cache: The host's.
        strict: Of what is mounted from now on, verify all of a blob before any of it is read.
        xattrs: Have extended attributes below overlayfs too; elsewhere they cost nothing.
        store_limits: How mounts talk to their store; None for what is so by default.
        spool_on: Given a directory, how much a mount keeps there of what was read and the cache
            does not take.
        transport: Of what is mounted from now on: `auto`, `fusepy` or `kernel`.
        passthrough: Whether the kernel reads cached blobs itself: `auto`, `on` or `off`.
        log_place: Where events go, by the key of a session or `mount-` and the mount's name.
        user_id: The user whose mounts alone are known; None for all. Others' are as if they were
            not there, and nothing is mounted in the place of one.
    """

    def __init__(
        self,
        state_dir: Path,
        cache: CachePlace,
        *,
        strict: bool = False,
        xattrs: bool = False,
        store_limits: StoreLimits | None = None,
        transport: str = AUTO,
        passthrough: str = "auto",
        log_place: Callable[[str], LogPlace | None] = lambda _name: None,
        user_id: int | None = None,
        spool_on: Callable[[Path], SpoolPlace] = lambda _directory: SpoolPlace(),
    ) -> None:
        self._spool_on = spool_on
        self._directory = state_dir / "mounts"
        self._cache = cache
        self._strict = strict
        self._xattrs = xattrs
        self._store_limits = store_limits
        self._transport = transport
        self._passthrough = passthrough
        self._log_place = log_place
        self._user_id = user_id

    @property
    def store_limits(self) -> StoreLimits | None:
        """How mounts talk to their store; None for what is so by default."""
        return self._store_limits

    def start(
        self,
        request: MountRequest,
        *,
        cancellation: Cancellation,
        environment: Mapping[str, str] = os.environ,
    ) -> Ready:
        """Mount, and return when the mount can be used.

        Raises:
            MountFailedError: The host can not, or did not within READY_SECONDS; nothing is left.
            ManifestInvalidError: The manifest is none; nothing is left.
            SessionStateError: Something is mounted there already.
            NotAllowedError: Another user's mount there has not ended.
            CancelledError: Cancellation was wished; nothing is left.
            NoSpaceError, LocalWriteError: The state could not be written, also because another
                process, which is named, keeps it locked.
        """
        place = self._place(request.mountpoint)
        if is_mounted(request.mountpoint):
            raise SessionStateError(
                f"something is mounted at {request.mountpoint}",
                hint="`propmaster unmount` it, or use another directory",
            )
        try:
            self._note_start(place, request.mountpoint, cancellation)
            try:
                keep_manifest(request.manifest, place / "manifest")
            except PropmasterError:
                self._forget(place)
                raise
        except OSError as error:
            raise local_write_error(error, os.fspath(place)) from error
        spec = self._spec(request, place)
        write_spec(spec, place / "spec.json")
        pid, stdout = spawn(place, environment)
        process = lease_owner(pid) or ""
        try:
            ready = await_ready(stdout, place, request.mountpoint, cancellation)
            if ready.pid != pid:
                # With an owner it goes on in a process that is nobody's child.
                os.waitpid(pid, 0)
            record = MountRecord(lease_owner(ready.pid) or "", ready)
            (place / "record.json").write_bytes(msgspec.json.encode(record))
        except BaseException:
            end_process(pid, process)
            for left in servers_of(place / "spec.json"):
                end_process(left, lease_owner(left) or "")
            _clear(spec)
            self._forget(place)
            raise
        finally:
            os.close(stdout)
        return ready

    def _note_start(self, place: Path, mountpoint: Path, cancellation: Cancellation) -> None:
        """Note that this process is about to mount, once what was there before has ended."""
        with self._locked(LOCK_SECONDS, cancellation):
            if self._is_starting(place):
                raise SessionStateError(f"another command is mounting {mountpoint} now")
            if place.exists():
                self._refuse_anothers(place, mountpoint)
                self._end(place)
            place.mkdir(mode=0o700)
            (place / "starter").write_text(lease_owner() or "", encoding="ascii")

    def add(self, mountpoint: Path, layer: Layer, cancellation: Cancellation) -> None:
        """Add a manifest's files to what is mounted, without anybody who uses it noticing more.

        Raises:
            MountFailedError: Nothing is mounted there, its server does not answer, or the files can
                not be where others are; then none is there.
            SessionStateError, NoSpaceError, LocalWriteError: What is known of the mount could not
                be read or written.
            CancelledError: Cancellation was wished; the files are there, or come with the next
                server.
        """
        path = self._place(mountpoint) / "spec.json"
        if not self.is_served(mountpoint):
            raise MountFailedError(
                f"{mountpoint} is not mounted any more",
                hint="start the session again: it keeps what was written",
            )
        before = read_spec(path)
        write_spec(msgspec.structs.replace(before, layers=[*before.layers, layer]), path)
        # A server that is killed now is replaced by one that reads the spec.
        answer = json.loads(ask_whoever_serves(before.control, {"ask": "add"}, cancellation))
        if "error" in answer:
            write_spec(before, path)
            raise MountFailedError(f"nothing can be added to {mountpoint}: {answer['error']}")

    def work_dir(self, mountpoint: Path) -> Path:
        """Return where a mount that nothing is written to keeps what its cache can not take."""
        return self._place(mountpoint) / "work"

    def end(self, mountpoint: Path) -> Ended | None:
        """Unmount; return None if there was nothing.

        Raises:
            SessionStateError: Something else is mounted there.
            NotAllowedError: It is another user's.
            LocalWriteError: The kernel does not let it go.
        """
        place = self._place(mountpoint)
        if not place.exists():
            if is_mounted(mountpoint):
                raise SessionStateError(
                    f"what is mounted at {mountpoint} is no mount of this state directory",
                    hint="umount it with the program that mounted it",
                )
            return None
        self._refuse_anothers(place, mountpoint)
        return Ended(self._end(place))

    def forget_ended(self, mountpoint: Path, ready: Ready) -> str:
        """Clear what is left of a mount whose process is gone, unless somebody else does or did.

        Args:
            mountpoint: Where it was.
            ready: What its process said of itself.

        Returns:
            Why the process gave the mount up, or left it; empty if somebody took the mount away.

        Raises:
            LocalWriteError: Another process, which is named, keeps the state locked; or the kernel
                does not let it go.
        """
        place = self._place(mountpoint)
        until = time.monotonic() + LAST_READERS_SECONDS
        # Whoever ends a mount has a little to do after its process is gone.
        while is_ours := _is_record_of(place, ready):
            if time.monotonic() > until:
                break
            time.sleep(_POLL_SECONDS)
        if not is_ours:
            return ""
        with self._locked(LOCK_SECONDS):
            if not _is_record_of(place, ready) or self._is_served(place):
                return ""
            told = last_error(place)
            was_left = self.is_there(mountpoint)
            self._end(place)
        if told:
            return told[1]
        return f"the process that served {mountpoint} was killed" if was_left else ""

    def spec_of(self, mountpoint: Path) -> tuple[MountSpec, str] | None:
        """Return what was begun at a path and not ended, and which process mounted it.

        The process is `pid:start-time`, and empty as long as nothing is mounted.

        Raises:
            SessionStateError: What is known of it can not be read.
        """
        place = self._place(mountpoint)
        if not (place / "spec.json").exists():
            return None
        spec, record = read_spec(place / "spec.json"), _read_record(place)
        if not self._may_have(spec, mountpoint):
            return None
        return spec, record.process if record is not None else ""

    def clear_stale(self, cancellation: Cancellation | None = None) -> list[Path]:
        """End the mounts whose process is gone; return where they were.

        Those that another process keeps us from looking at, and one that the kernel does not let
        go, are told (event `mount.stale_left`) and left to whoever comes next: they are of other
        sessions than the one that is about to start. Whoever mounts in such a place is refused.

        Raises:
            CancelledError: Cancellation was wished.
        """
        cleared: list[Path] = []
        self._make_directory()
        for place in sorted(self._directory.iterdir()):
            # One at a time: ending a mount takes seconds, and others may want to begin theirs.
            with ExitStack() as lock:
                try:
                    lock.enter_context(self._locked(STALE_LOCK_SECONDS, cancellation))
                except LocalWriteError as error:
                    log.warning(events.MOUNT_STALE_LEFT, extra={"reason": error.message})
                    break
                # In this order: whoever is starting may have noted the mount down meanwhile.
                if place.exists() and not self._is_starting(place) and not self._is_served(place):
                    at = None
                    with suppress(SessionStateError):
                        at = Path(read_spec(place / "spec.json").mountpoint)
                    try:
                        self._end(place)
                    except LocalWriteError as error:
                        log.warning(events.MOUNT_STALE_LEFT, extra={"reason": error.message})
                        continue
                    if at is not None:
                        cleared.append(at)
        return cleared

    def control_of(self, mountpoint: Path) -> str:
        """Return the path of a mount's control socket."""
        return os.fspath(self._place(mountpoint) / "control")

    def errors(self, mountpoint: Path) -> list[FailedRead]:
        """Return the failed reads of a mount, oldest first."""
        try:
            lines = (self._place(mountpoint) / "errors").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [msgspec.convert(json.loads(line), FailedRead) for line in lines]

    def errors_to_tell(self, mountpoint: Path) -> list[FailedRead]:
        """Return the same, and have what fails from now on in lines of its own."""
        with suppress(FileNotFoundError):
            # Before it is read: what fails in between is among what is read, or told the next time.
            os.utime(self._place(mountpoint) / "errors", ns=(TOLD_NS, TOLD_NS))
        return self.errors(mountpoint)

    def knows(self, mountpoint: Path) -> bool:
        """Whether a mount was begun there and not ended, whoever may have been told of it."""
        place = self._place(mountpoint)
        if self._user_id is None:
            return place.exists()
        with suppress(SessionStateError):
            return self._may_have(read_spec(place / "spec.json"), mountpoint)
        # Of one that is being made nothing says for whom.
        return place.exists() and not self._is_starting(place)

    def is_there(self, mountpoint: Path) -> bool:
        """Whether our mount is the one at a path; its supervisor may be gone."""
        return is_mounted(mountpoint, f"propmaster:{self._place(mountpoint).name}")

    def is_served(self, mountpoint: Path) -> bool:
        """Whether a process of ours serves what is mounted there."""
        return self._is_served(self._place(mountpoint)) and is_mounted(mountpoint)

    def _place(self, mountpoint: Path) -> Path:
        return self._directory / hash_name(os.fspath(mountpoint))[:16]

    def _may_have(self, spec: MountSpec, mountpoint: Path) -> bool:
        """Whether a mount is one of the user's, and the one that is meant."""
        # Whoever chooses the name of a directory might find one with the hash of another's.
        is_meant = spec.mountpoint == os.fspath(mountpoint)
        return is_meant and self._user_id in (None, spec.uid)

    def _refuse_anothers(self, place: Path, mountpoint: Path) -> None:
        """See that what is known at a place is the user's, or damaged and so nobody's."""
        with suppress(SessionStateError):
            if not self._may_have(read_spec(place / "spec.json"), mountpoint):
                raise NotAllowedError(f"the mount at {mountpoint} is another user's")

    def _spec(self, request: MountRequest, place: Path) -> MountSpec:
        spool = self._spool_on(request.work_dir.parent)
        return MountSpec(
            version=VERSION,
            name=f"propmaster:{place.name}",
            mountpoint=os.fspath(request.mountpoint),
            manifests=[os.fspath(place / "manifest")],
            called=called(request.manifest),
            store_url=request.store_url,
            account_id=request.account_id,
            # What has no hash must not get among what is found by one.
            cache_dir="" if request.snapshot else os.fspath(self._cache.directory),
            cache_max_bytes=self._cache.max_bytes,
            cache_min_free_bytes=self._cache.min_free_bytes,
            cache_shared=self._cache.shared,
            work_dir=os.fspath(request.work_dir),
            writes=request.writes,
            writes_reason=request.writes_reason,
            uid=request.uid,
            gid=request.gid,
            stream=not (self._strict or request.strict),
            xattrs=self._xattrs or request.writes != "overlayfs",
            errors=os.fspath(place / "errors"),
            control=os.fspath(place / "control"),
            passthrough=self._passthrough,
            owner_pid=request.owner_pid,
            gives_back=request.gives_back,
            layers=[*request.layers],
            store_limits=self._store_limits,
            transport=self._transport,
            cache_scope=self._cache.scope,
            log=self._log_place(request.session or f"mount-{place.name}"),
            snapshot=request.snapshot,
            spool_max_bytes=spool.max_bytes,
            spool_min_free_bytes=spool.min_free_bytes,
        )

    def _is_served(self, place: Path) -> bool:
        record = _read_record(place)
        return record is not None and lives(record.ready.pid, record.process)

    def _make_directory(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def _locked(self, seconds: float, cancellation: Cancellation | None = None) -> Iterator[None]:
        """Keep other commands from judging a mount that is being noted down, for a moment.

        Raises:
            LocalWriteError: Another process has kept us from it for so many seconds.
            CancelledError: Cancellation was wished.
        """
        self._make_directory()
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            shown = os.fspath(self._directory)
            take_flock(fd, shown, seconds=seconds, cancellation=cancellation)
            yield
        finally:
            os.close(fd)

    def _is_starting(self, place: Path) -> bool:
        """Whether a command that lives is about to mount; in this process, that is another one."""
        try:
            starter = (place / "starter").read_text(encoding="ascii")
        except OSError:
            return False
        pid = starter.partition(":")[0]
        return (
            pid.isdecimal()
            and int(pid) != os.getpid()
            and lease_owner(int(pid)) == starter
            and _read_record(place) is None
        )

    def _end(self, place: Path) -> list[str]:
        """End what a place knows of; return who held it."""
        record = _read_record(place)
        if record is not None:
            end_process(record.ready.pid, record.process)
        connections: list[FuseConnection] = []
        with suppress(SessionStateError):
            spec = read_spec(place / "spec.json")
            connections = [
                FuseConnection(mount.device) for mount in read_mounts() if mount.source == spec.name
            ]
            _clear(spec)
        end_servers(place / "spec.json")
        for connection in connections:
            # As a supervisor ends one, whoever still has the device open.
            connection.abort()
        holders = told_holders(place / "log")
        self._forget(place)
        return holders

    def _forget(self, place: Path) -> None:
        if place.exists():
            remove_path(place)


def _clear(spec: MountSpec) -> None:
    """Take away what is mounted by this spec and no process serves any more."""
    # By its name: a job may have moved the directory that it is in. What is above comes later.
    for mount in reversed(read_mounts()):
        if mount.source == spec.name:
            at = Path(mount.mountpoint)
            try:
                unmount_all(at)
            except OSError as error:
                raise LocalWriteError(f"{at} can not be unmounted: {error.strerror}") from error
    leave_only_upper(spec)


def _read_record(place: Path) -> MountRecord | None:
    try:
        return msgspec.json.decode((place / "record.json").read_bytes(), type=MountRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _is_record_of(place: Path, ready: Ready) -> bool:
    record = _read_record(place)
    return record is not None and record.ready == ready
