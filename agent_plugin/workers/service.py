"""The host service: runs drop-ins for job users, who may not touch the cache and the states.

What a job user can do: connect, and ask for a drop-in for a session directory that it may write to
(rights.py). What is done then, is done in that directory, in the mapped roots that it may write to
or that the operator listed, and with the job's own credentials (credentials.py); files become the
job user's. It can have at most CALLS_OF_A_USER calls at a time, which take as much memory as the
operator gives them, and cancel its own.

What it can not do: name another user, who is whom the kernel says; reach another user's session
directory, another queue's or user's cached content, or any path outside of its directory by a link
or `..`; have anything executed with the service's rights, or with its credentials; choose which
servers the service asks; keep others from being served, by silence, by floods, or by stopping in
the middle; write to the cache, the states, the socket's directory, or read them.

Who is trusted beside root and the service's user: the agent's user. It owns the session
directories and the directory they are in, and could put a link in the place of one.

Concurrency: the service has one thread, and forks a child for each connection. So a call finds all
modules loaded, crashes alone, and has umask, environment and signals for itself. Until it forks
nothing may start a thread or ask a store: obstore's threads would be missing in the child. Between
two looks at its descriptors the service only accepts, forks and reaps; whatever may wait (a silent
asker, a path on a dead file system) waits in a child.
"""

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from agent_plugin import __version__
from agent_plugin.content import events
from agent_plugin.content.errors import (
    CancelledError,
    NotAllowedError,
    PropmasterError,
    ServiceUnavailableError,
)
from agent_plugin.content.s3_environment import preload
from agent_plugin.content.store import Cancellation
from agent_plugin.services import state_directory
from agent_plugin.settings import Settings
from agent_plugin.workers.call import (
    DROP_INS,
    EXIT_CRASHED,
    OF_THE_HOST,
    VFS_UNMOUNT,
    Call,
    JobUser,
    carry_out,
    find_drop_in,
    forwarded,
    one_line,
    tell,
)
from agent_plugin.workers.credentials import Found, find_credentials
from agent_plugin.workers.memory import family_of, own_memory
from agent_plugin.workers.notes import note_session, place_of
from agent_plugin.workers.rights import Peer, check_session_directory, peer_of
from agent_plugin.workers.sweep import sweep
from agent_plugin.workers.wire import Answer, Reply, Request, encode, read_request

# A mounted root keeps its call for as long as the session lasts; a job has 10 roots at most.
CALLS_OF_A_USER: Final = 128
CALLS: Final = 1024
SWEEP_SECONDS: Final = 10.0
# A process takes some GiB a second at most; who watches must not take the host's time either.
MEMORY_SECONDS: Final = 0.5
# A sweep unmounts what may be in use; one that takes longer hangs.
SWEEP_PATIENCE_SECONDS: Final = 300.0
# What a call has to end in order when its asker is gone or the service ends; then it is killed,
# as it may be at any moment.
CANCEL_SECONDS: Final = 60.0
END_SECONDS: Final = 20.0
# Files of a session are for the job's user and its group.
UMASK: Final = 0o007

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class _Child:
    """A process of the service's: a call of a user, or a sweep."""

    uid: int
    until: float | None = None


class Service:
    """Serves one socket until it is told to end.

    Args:
        listener: Bound, listening, and where job users may connect.
        settings: The host's.
        drop_ins: Kind of call -> `module:function`.
        environment: The service's own, of which calls get what is not AWS's.
    """

    def __init__(
        self,
        listener: socket.socket,
        settings: Settings,
        *,
        drop_ins: Mapping[str, str] = DROP_INS,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._listener = listener
        self._settings = settings
        self._drop_ins = drop_ins
        self._environment = dict(environment)
        self._children: dict[int, _Child] = {}
        self._ending = False
        self._user_memory = settings.worker.user_memory_bytes()
        self._next_sweep = time.monotonic()
        self._next_look = time.monotonic()

    def serve(self, ready: Callable[[], None]) -> None:
        """Answer calls until SIGTERM or SIGINT, then end those that are under way.

        Args:
            ready: Called once, when whoever connects is answered.

        Raises:
            LocalWriteError: The state directory can not be made, or others could write to it.
        """
        state_directory(self._settings)
        self._preload()
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._listener.setblocking(False)
        # With handlers that do nothing signals only wake the loop up.
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        log.info(events.SERVICE_STARTED, extra={"version": __version__})
        ready()
        while not self._ending:
            full = len(self._children) >= CALLS
            watched = [reader] if full else [reader, self._listener]
            next_event = (
                min(self._next_sweep, self._next_look) if self._children else self._next_sweep
            )
            wait = max(next_event - time.monotonic(), 0)
            readable, _, _ = select.select(watched, [], [], wait)
            if reader in readable:
                reader.recv(4096)
            self._reap()
            if self._listener in readable:
                self._accept()
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + MEMORY_SECONDS
                self._bound_memory()
            if time.monotonic() >= self._next_sweep:
                self._next_sweep = time.monotonic() + SWEEP_SECONDS
                self._begin_sweep()
        self._end_children()
        signal.set_wakeup_fd(-1)
        log.info(events.SERVICE_ENDED, extra={"calls": len(self._children)})

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._ending = True

    def _preload(self) -> None:
        """Load what calls need, so that none of them has to."""
        preload()
        for named in self._drop_ins.values():
            find_drop_in(named)
        # What is there now is never freed: a child that looked for garbage in it would copy it.
        gc.collect()
        gc.freeze()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # Whoever connected has gone again.
            return
        with connection:
            try:
                peer = peer_of(connection)
            except OSError:
                return
            mine = Counter(child.uid for child in self._children.values())[peer.uid]
            if mine >= CALLS_OF_A_USER:
                _refuse(connection, peer, f"{mine} calls of this user are under way")
                return
            try:
                self._fork(lambda: self._answer(connection, peer), _Child(peer.uid))
            except OSError as error:
                _refuse(connection, peer, f"no process can be started: {error.strerror}")

    def _begin_sweep(self) -> None:
        now = time.monotonic()
        sweeps = {pid: child for pid, child in self._children.items() if child.until is not None}
        for pid, child in sweeps.items():
            if child.until is not None and child.until < now:
                _kill(pid, signal.SIGKILL)
        state_dir = state_directory(self._settings)
        kept = (state_dir / "sessions", state_dir / "workers")
        if sweeps or not any(place.is_dir() and any(place.iterdir()) for place in kept):
            return
        with suppress(OSError):
            self._fork(self._sweep, _Child(os.geteuid(), until=now + SWEEP_PATIENCE_SECONDS))

    def _bound_memory(self) -> None:
        """Kill the largest calls of each user whose calls take too much memory together.

        What is in a manifest is for the job to say, and the cgroup that its own processes are
        bounded by does not bound what is done here.
        """
        calls: dict[int, list[int]] = {}
        for pid, child in self._children.items():
            if child.until is None and child.uid not in (0, os.geteuid()):
                calls.setdefault(child.uid, []).append(pid)
        for uid, pids in calls.items() if self._user_memory else ():
            own = dict(own_memory(pids, above=self._user_memory))
            while (taken := sum(own.values())) > self._user_memory:
                largest = max(own, key=own.__getitem__)
                reason = (
                    f"the calls of this user take {taken} bytes of memory, of {self._user_memory};"
                    f" the one that is ended takes {own.pop(largest)}"
                )
                _kill_family(largest)
                log.warning(events.CALL_REFUSED, extra={"kind": "", "uid": uid, "reason": reason})

    def _fork(self, work: Callable[[], int], child: _Child) -> None:
        """Do something in a child, whose exit code it is.

        Raises:
            OSError: There can be no further process.
        """
        # A signal must find either the parent's handlers or the child's.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if not pid:
                code = EXIT_CRASHED
                try:
                    self._become_child()
                    code = work()
                except BaseException:
                    log.exception(events.COMMAND_CRASHED)
                finally:
                    sys.stderr.flush()
                    # Not sys.exit(): threads that wait for a store must not hold the process up.
                    os._exit(code)
            self._children[pid] = child
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _become_child(self) -> None:
        signal.set_wakeup_fd(-1)
        self._listener.close()
        self._children.clear()
        # So that a child can be killed with what it has started.
        os.setsid()
        os.umask(UMASK)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _sweep(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        sweep(self._settings)
        return 0

    def _answer(self, connection: socket.socket, peer: Peer) -> int:
        """Answer one connection; in the child."""
        begun = time.monotonic()
        cancellation = Cancellation()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: cancellation.cancel())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        answer = Answer(connection)

        def say(line: str) -> None:
            answer.say(one_line(line))

        kind = ""
        try:
            request = read_request(connection)
            if request is None:
                answer.begin(__version__)
                return 0
            kind = request.kind if request.kind in self._drop_ins else ""
            answer.begin(__version__)
            call = self._call(request, peer, connection, say, cancellation)
        except PropmasterError as error:
            log.warning(
                events.CALL_REFUSED,
                extra={"kind": kind, "uid": peer.uid, "reason": error.message},
            )
            code = tell(error, say)
        else:
            threading.Thread(target=_watch, args=(connection, cancellation), daemon=True).start()
            code = carry_out(call, self._settings, find_drop_in(self._drop_ins[kind]))
            log.info(
                events.CALL_FINISHED,
                extra={
                    "kind": kind,
                    "uid": peer.uid,
                    "session_dir": os.fspath(call.session_dir),
                    "exit_code": code,
                    "seconds": round(time.monotonic() - begun, 3),
                },
            )
        answer.end(code)
        return code

    def _call(
        self,
        request: Request,
        peer: Peer,
        connection: socket.socket,
        say: Callable[[str], None],
        cancellation: Cancellation,
    ) -> Call:
        """Return the call that a peer may make.

        Raises:
            NotAllowedError: It may not.
            CancelledError: The asker is gone.
        """
        keys: Mapping[str, object] | None = None
        if request.kind not in self._drop_ins:
            raise NotAllowedError("there is no such call")
        _refuse_no_text(request.session_dir, *request.arguments, *request.environment.values())
        if request.kind == VFS_UNMOUNT:
            # A mapped root is in no session directory; whose the mount is, is looked at instead.
            job_user: JobUser | None = JobUser(peer.uid, peer.gid)
            environment: dict[str, str] = {}
        else:
            job_user, found = self._check(request, peer, connection)
            environment, keys = found.environment, found.keys
        environment |= {
            name: value for name, value in self._environment.items() if name in OF_THE_HOST
        }
        kept = {
            name: value
            for name, value in self._environment.items()
            if not name.startswith(("AWS_", "LISTEN_")) and name != "NOTIFY_SOCKET"
        }
        os.environ.clear()
        os.environ.update(kept | environment)
        return Call(
            kind=request.kind,
            arguments=tuple(request.arguments),
            session_dir=Path(request.session_dir),
            environment=environment,
            job_user=job_user,
            say=say,
            cancellation=cancellation,
            keys=keys,
        )

    def _check(
        self, request: Request, peer: Peer, connection: socket.socket
    ) -> tuple[JobUser | None, Found]:
        """Return whose the files of a session are, and what of the asker's environment counts."""
        job_user = check_session_directory(request.session_dir, peer, self._settings.worker)
        session_dir = Path(request.session_dir)
        state_dir = state_directory(self._settings)
        note_session(state_dir, session_dir, peer.uid)
        given = forwarded(request.environment)
        place = place_of(state_dir, session_dir)
        return job_user, find_credentials(given, peer, job_user, place, asker=connection)

    def _reap(self) -> None:
        while self._children:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._children.clear()
                return
            if not pid:
                return
            self._children.pop(pid, None)

    def _end_children(self) -> None:
        """Tell calls that are under way to end, wait for them, and kill those that do not."""
        # Nobody is accepted any more; whoever waits in the queue is refused by the kernel.
        self._listener.close()
        for pid in self._children:
            _kill(pid, signal.SIGTERM, group=False)
        until = time.monotonic() + END_SECONDS
        while self._children and time.monotonic() < until:
            self._reap()
            time.sleep(0.02)
        for pid in self._children:
            _kill(pid, signal.SIGKILL)


def _watch(connection: socket.socket, cancellation: Cancellation) -> None:
    """Cancel a call when its asker is gone; end the process if that takes too long."""
    poll = select.poll()
    # Nothing more is to come, so whatever comes is as good as an end.
    poll.register(connection, select.POLLIN | select.POLLRDHUP)
    poll.poll()
    cancellation.cancel()
    time.sleep(CANCEL_SECONDS)
    os._exit(CancelledError.exit_code)


def _refuse_no_text(*texts: str) -> None:
    """Refuse what the kernel can be given neither as a path nor as a variable."""
    for text in texts:
        try:
            is_text = b"\0" not in os.fsencode(text)
        except UnicodeEncodeError:
            # Half a character, which JSON can spell, and which stands for no byte.
            is_text = False
        if not is_text:
            # Not the text: it may be a secret.
            raise NotAllowedError("a path, an argument or a variable is no text of this host")


def _refuse(connection: socket.socket, peer: Peer, reason: str) -> None:
    """Tell who can not be answered by a child, as far as that needs no waiting."""
    log.warning(events.CALL_REFUSED, extra={"kind": "", "uid": peer.uid, "reason": reason})
    lines: list[str] = []
    code = tell(ServiceUnavailableError(f"the host service is busy: {reason}"), lines.append)
    replies = [Reply(begun=__version__), *(Reply(line=line) for line in lines), Reply(exit=code)]
    connection.setblocking(False)
    with suppress(OSError):
        connection.send(b"".join(map(encode, replies)))


def _kill_family(pid: int) -> None:
    """Kill a call with what it has started, in whatever group that is."""
    for each in reversed([*family_of(pid)]):
        _kill(each, signal.SIGKILL)


def _kill(pid: int, number: int, *, group: bool = True) -> None:
    # Without root what is setuid can not be ended: fusermount3, which ends by itself.
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
    if group:
        # It has no group of its own yet if it has just begun.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
