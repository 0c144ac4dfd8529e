"""The process that holds a mount while servers come and go.

It mounts, answers the kernel's first request, and forks the server, which inherits /dev/fuse. A
server that dies, however it dies, is replaced: requests wait in the kernel meanwhile, and those
that were read and not answered are sent again, so a reader sees nothing but a pause. Where libfuse
mounts, or the kernel is older than that, the mount dies with the server, and is made again at once,
over what was written before. The
mount goes away with a signal, with the process it was made for, or when somebody else unmounts it.

One thread, since it forks; it reads no file of the mount.
"""

import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from agent_plugin.content import events
from agent_plugin.content.digest import EMPTY_HASH, Digest
from agent_plugin.content.errors import (
    CancelledError,
    LocalWriteError,
    MountFailedError,
    PropmasterError,
)
from agent_plugin.content.fuse_connection import FuseConnection
from agent_plugin.content.fusermount import may_administer
from agent_plugin.content.mount_probe import FUSEPY, TransportChoice, choose_transport
from agent_plugin.content.mount_spec import (
    OVERLAY,
    OVERLAYFS,
    MountSpec,
    Ready,
    leave_only_upper,
)
from agent_plugin.content.mount_table import is_mounted, read_mounts, unmount
from vfs.error_ledger import ErrorLedger
from vfs.mount import (
    FUSE_KIND,
    device_of,
    end_mount,
    mount_fuse,
    mount_overlay,
    raise_read_ahead,
    swap_in,
)
from vfs.server_process import END_SIGNALS, ServerProcess
from vfs.transports.kernel_transport import ProtocolError, Session, negotiate
from vfs.work_directory import make_work_directory

# A server that dies this often within a minute dies of something that a new one will not mend.
RESTARTS_A_MINUTE: Final = 10
# After one could not be started: what the host lacked, such as a process, it may have again.
NEXT_START_SECONDS: Final = 1.0
# Given /dev/fuse and what was agreed on (-1 and None where libfuse mounts), the transport, whether
# a server was killed before, and what to write SERVES to: serves until the mount is gone.
Serve = Callable[[int, Session | None, TransportChoice, bool, int], None]

log = events.get_logger()


class Supervisor:
    """One mount.

    Attributes:
        abandoned: Whether the process that it was made for is gone, so that nobody asks for it.

    Args:
        spec: What is mounted, and where.
        serve: The server; called in a process of its own.
        started: When the process began, monotonic seconds.
        stack_depth: As `negotiate` has it.
    """

    def __init__(
        self, spec: MountSpec, serve: Serve, *, started: float, stack_depth: int = 0
    ) -> None:
        self._spec = spec
        self._serve = serve
        self._started = started
        self._stack_depth = stack_depth
        self.abandoned = False
        self._deaths: deque[float] = deque(maxlen=RESTARTS_A_MINUTE)
        self._fd = -1
        self._connection: FuseConnection | None = None
        self._session: Session | None = None
        self._choice = TransportChoice("", "")
        self._server: ServerProcess | None = None
        self._mountpoint = Path(spec.mountpoint)
        # Can be read once there was a signal.
        self._wake = -1

    def run(
        self,
        tell: Callable[[Ready], None],
        size: Callable[[], tuple[int, int]],
        prepare: Callable[[], None],
    ) -> int:
        """Mount, serve, and return the exit code when the mount is gone.

        Args:
            tell: Called once, when the mount can be used.
            size: Returns how many files and bytes there are.
            prepare: Called before anything is mounted, when the directories are there.

        Raises:
            PropmasterError: It could not be mounted, or lost its servers; nothing is left.
        """
        os.chdir("/")
        self._wake = self._listen()
        try:
            make_work_directory(self._spec)
            prepare()
            self._choose()
            self._start(again=False)
            raise_read_ahead(self._spec.lower)
            if self._spec.writes == OVERLAYFS:
                self._mount_overlay(self._mountpoint)
        except BaseException:
            self._end()
            raise
        files, total = size()
        tell(
            Ready(
                pid=os.getpid(),
                transport=self._choice.transport,
                reason=self._choice.reason,
                writes=self._spec.writes,
                writes_reason=self._spec.writes_reason,
                files=files,
                bytes=total,
                seconds=round(time.monotonic() - self._started, 3),
            )
        )
        log.info(
            events.MOUNT_STARTED,
            extra={
                "mountpoint": self._spec.mountpoint,
                "files": files,
                "transport": self._choice.transport,
                "reason": self._choice.reason,
            },
        )
        try:
            return self._watch()
        except CancelledError:
            return 0
        finally:
            self._end()
            log.info(events.MOUNT_ENDED, extra={"mountpoint": self._spec.mountpoint})

    def _choose(self) -> None:
        """Choose the transport, and mount if it is ours; libfuse mounts by itself.

        Raises:
            MountFailedError: None can be used, or not the one that was asked for.
            LocalWriteError: It could not be mounted.
        """
        self._choice = choose_transport(self._spec.transport)
        if self._choice.transport == FUSEPY:
            return
        try:
            self._mount_ours(self._spec.lower)
        except ProtocolError as error:
            self._take_away(self._spec.lower)
            self._close_device()
            self._choice = choose_transport(self._spec.transport, kernel_refused=str(error))

    def _mount_ours(self, at: Path) -> None:
        writable = self._spec.writes == OVERLAY
        self._fd = mount_fuse(at, self._spec.name, writable=writable)
        self._connection = FuseConnection(device_of(at))
        self._session = negotiate(self._fd, stack_depth=self._stack_depth, writable=writable)

    def _mount_overlay(self, at: Path) -> None:
        """Mount overlayfs by a process of its own: the kernel asks the server for it.

        If the server is killed just then, this one has to be there to replace it.

        Raises:
            LocalWriteError: It could not be mounted.
            CancelledError: A signal came before that.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        mounting = os.fork()
        if mounting == 0:
            try:
                signal.set_wakeup_fd(-1)
                if self._fd >= 0:
                    os.close(self._fd)
                spec = self._spec
                mount_overlay(spec.lower, spec.upper, Path(spec.work_dir, "work"), at, spec.name)
            except BaseException as error:  # noqa: BLE001 - it is raised again by who waits
                os.write(writer, str(error).encode("utf-8", "replace")[: select.PIPE_BUF])
            finally:
                os._exit(0)
        os.close(writer)
        try:
            self._keep_a_server_until(reader)
            told = os.read(reader, select.PIPE_BUF)
        except CancelledError:
            # It waits for a server, which may be stopped, and is refused.
            if self._server:
                self._server.kill()
                self._server = None
            self._close_device()
            raise
        finally:
            os.close(reader)
            os.waitpid(mounting, 0)
        if told:
            raise LocalWriteError(
                told.decode("utf-8", "replace"),
                hint="`propmaster doctor` says what this host can do",
            )

    def _keep_a_server_until(self, ready: int) -> None:
        """Replace servers that die before a descriptor is ready, if the kernel asks them again.

        Raises:
            CancelledError: A signal came before that.
        """
        while self._server:
            with self._server.watched() as ended:
                poll = select.poll()
                for fd in (ready, ended, self._wake):
                    poll.register(fd, select.POLLIN)
                are_ready = {fd for fd, _ in poll.poll()}
            if self._wake in are_ready:
                raise CancelledError(f"{self._mountpoint} is not wanted any more")
            if ended not in are_ready:
                return
            code = self._lost(self._server)
            if not self._resumes or not self._replace(code):
                # Whoever waits for it is refused.
                self._close_device()

    def _lost(self, server: ServerProcess) -> int:
        """Take down that a server has ended; return its exit code."""
        self._server = None
        return server.exit_code()

    def _close_device(self) -> None:
        """Have whoever waits for an answer refused, if there is no server any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._connection is not None:
            # What a server has started may have the device open, and wait as well.
            self._connection.abort()
            self._connection = None

    @property
    def _resumes(self) -> bool:
        """Whether a server's successor is asked again what was not answered."""
        return self._session is not None and self._session.can_resend

    def _take_away(self, at: Path) -> None:
        """Take a mount of ours that nobody serves out of the tree."""
        if is_mounted(at, self._spec.name):
            unmount(at, lazily=True)

    def _listen(self) -> int:
        """Have signals wake `poll`; return the descriptor that tells of them."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in END_SIGNALS:
            signal.signal(number, lambda *_: None)
        return reader

    def _start(self, *, again: bool) -> None:
        """Have a server, which serves.

        Raises:
            LocalWriteError: It ended before that.
            CancelledError: A signal came before that; it was ended.
        """

        def serve(tell: int) -> None:
            self._serve(self._fd, self._session, self._choice, again, tell)

        self._server = ServerProcess.start(serve, wake=self._wake, mountpoint=self._mountpoint)

    def _watch(self) -> int:
        """Return when the mount is to go away.

        Raises:
            CancelledError: So it is, while a server is about to be replaced.
            MountFailedError: It has no server any more.
        """
        owner = _pidfd(self._spec.owner_pid)
        mounts = os.open("/proc/self/mounts", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while (server := self._server) and self._is_in_place():
                with server.watched() as ended:
                    ready = _poll([self._wake, ended, *([owner] if owner >= 0 else [])], mounts)
                self.abandoned = owner >= 0 and owner in ready
                if self._wake in ready or self.abandoned:
                    return 0
                if ended not in ready:
                    continue
                code = self._lost(server)
                if code == 0:
                    return 0
                if not self._replace(code):
                    raise MountFailedError(
                        f"{self._mountpoint}: the server died, and could not be replaced",
                        hint="see what it wrote before this",
                    )
            return 0  # Somebody unmounted it; of two mounts, the upper one.
        finally:
            os.close(mounts)
            if owner >= 0:
                os.close(owner)

    def _is_in_place(self) -> bool:
        """Whether what the job sees is mounted; perhaps a directory above was renamed."""
        kind = "overlay" if self._spec.writes == OVERLAYFS else f"fuse.{FUSE_KIND}"
        return any(
            mount.source == self._spec.name and mount.kind == kind for mount in read_mounts()
        )

    def _replace(self, code: int) -> bool:
        log.warning(
            events.MOUNT_SERVER_DIED,
            extra={"mountpoint": self._spec.mountpoint, "exit_code": code},
        )
        while self._may_be_replaced():
            try:
                if self._resumes:
                    self._start(again=True)
                else:
                    self._mount_again(self._deaths[-1])
            except CancelledError:
                raise
            except (PropmasterError, ProtocolError, OSError) as error:
                log.error(  # noqa: TRY400 - an expected failure: its text says all
                    events.MOUNT_SERVER_DIED,
                    extra={"mountpoint": self._spec.mountpoint, "reason": str(error)},
                )
                # Killed before it served, perhaps; what is half mounted is not mounted again.
                if not self._resumes:
                    return False
                if select.select([self._wake], [], [], NEXT_START_SECONDS)[0]:
                    raise CancelledError(f"{self._mountpoint} is not wanted any more") from error
            else:
                return True
        return False

    def _may_be_replaced(self) -> bool:
        """Count a death; whether there were not too many of late."""
        now = time.monotonic()
        many = len(self._deaths) == RESTARTS_A_MINUTE and now - self._deaths[0] < 60  # noqa: PLR2004
        self._deaths.append(now)
        return not many

    def _mount_again(self, since: float) -> None:
        """Take away what died with its server, and mount in its place what is as before.

        So does what libfuse mounts, and what we do where the kernel can not ask again (Linux 6.9).

        Args:
            since: When the server was found dead, monotonic seconds.

        Raises:
            PropmasterError, OSError: That is not possible.
        """
        spec = self._spec
        # Readers are refused meanwhile, and nobody else can tell their task.
        error = MountFailedError("the mount's server died, and reads failed until it was replaced")
        ErrorLedger(Path(spec.errors)).record(".", Digest(EMPTY_HASH, 0), error)
        if may_administer():
            # The dead one stays until then: nobody is to see, or write to, the directory below it.
            spec.staged.mkdir(mode=0o700, exist_ok=True)
            self._serve_again(spec.staged)
            raise_read_ahead(spec.staged)
            swap_in(spec.staged, spec.lower)
        else:
            self._take_away(spec.lower)
            self._serve_again(spec.lower)
        if spec.writes == OVERLAYFS:
            self._mount_overlay(spec.staged)
            swap_in(spec.staged, self._mountpoint)
        with suppress(FileNotFoundError):
            spec.staged.rmdir()
        seconds = round(time.monotonic() - since, 3)
        log.warning(events.MOUNT_REMADE, extra={"mountpoint": spec.mountpoint, "seconds": seconds})

    def _serve_again(self, at: Path) -> None:
        """Have a server whose mount the kernel knows nothing of; libfuse's mounts by itself."""
        if self._session is not None:
            # Whoever waits for the dead one is refused now.
            self._close_device()
            self._mount_ours(at)
        self._start(again=True)

    def _end(self) -> None:
        """Take all mounts away, give last readers a moment, and end the server."""
        for at in self._spec.mounted:
            with suppress(OSError):
                end_mount(at, self._spec.name)
        if self._server:
            self._server.end()
            self._server = None
        self._close_device()
        # Where the server was gone, the first try may have failed.
        for at in self._spec.mounted:
            with suppress(OSError):
                if is_mounted(at, self._spec.name):
                    unmount(at, lazily=True)
        leave_only_upper(self._spec)


def _pidfd(pid: int) -> int:
    if not pid:
        return -1
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        # Gone already: a pipe without a writer is ready at once.
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.close(writer)
        return reader


def _poll(descriptors: list[int], mounts: int) -> set[int]:
    """Return those that are ready; perhaps none, when the kernel's mounts have changed.

    Source: proc_pid_mounts(5).
    """
    poll = select.poll()
    poll.register(mounts, select.POLLPRI)
    for fd in descriptors:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll()}


def tell_on_stdout(ready: Ready) -> None:
    """Print the line by which the mount is known to be ready, and let go of stdout."""
    os.write(1, msgspec.json.encode(ready) + b"\n")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
