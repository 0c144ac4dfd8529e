"""The process that serves a mount: forked, waited for until it serves, and ended with it."""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NoReturn, Self

from agent_plugin.content import events
from agent_plugin.content.errors import CancelledError, LocalWriteError, PropmasterError

# End a mount; those who serve it do not heed them.
END_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
# What a server writes when it serves.
SERVES: Final = b"1"
# How long a server may go on for those who still read from a mount that is out of the tree.
LAST_READERS_SECONDS: Final = 2.0

log = events.get_logger()


class ServerProcess:
    """A server that serves; made by `start`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    @classmethod
    def start(cls, serve: Callable[[int], None], *, wake: int, mountpoint: Path) -> Self:
        """Fork a server and wait until it serves.

        Args:
            serve: Given a descriptor to write SERVES to, serves until the mount is gone.
            wake: A descriptor that can be read once there was a signal.
            mountpoint: For messages.

        Raises:
            LocalWriteError: It ended before that.
            CancelledError: A signal came before that; it was ended.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            _serve(serve, reader, writer)
        os.close(writer)
        try:
            poll = select.poll()
            for fd in (reader, wake):
                poll.register(fd, select.POLLIN)
            if reader not in {fd for fd, _ in poll.poll()}:
                cls(pid).kill()
                raise CancelledError(f"{mountpoint} is not wanted any more")
            told = os.read(reader, select.PIPE_BUF)
        finally:
            os.close(reader)
        if told != SERVES:
            code = cls(pid).exit_code()
            why = told.decode("utf-8") or f"exit code {code}"
            raise LocalWriteError(
                f"the server of {mountpoint} ended before it served: {why}",
                hint="see what it wrote before this",
            )
        return cls(pid)

    @contextmanager
    def watched(self) -> Iterator[int]:
        """Lend a descriptor that can be read once it has ended."""
        ended = os.pidfd_open(self._pid)
        try:
            yield ended
        finally:
            os.close(ended)

    def exit_code(self) -> int:
        """Wait until it has ended; return its exit code, or the number of a signal, negative."""
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """End it at once."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def end(self) -> None:
        """Wait until it has ended, its mount being out of the tree; kill it if that takes long."""
        until = time.monotonic() + LAST_READERS_SECONDS
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                self.kill()
                break
            time.sleep(0.02)


def _serve(serve: Callable[[int], None], reader: int, tell: int) -> NoReturn:
    """Be the server."""
    code = 1
    try:
        os.close(reader)
        signal.set_wakeup_fd(-1)
        # Blocked in all threads to come, not ignored: libfuse and fusepy put handlers of
        # their own, which would end the mount.
        signal.pthread_sigmask(signal.SIG_BLOCK, {*END_SIGNALS, signal.SIGHUP})
        serve(tell)
        code = 0
    except PropmasterError as error:
        sys.stderr.write(f"error[{error.reference}]: {error.message}\n")
        with suppress(OSError):
            os.write(tell, error.message.encode("utf-8", "replace"))
        code = error.exit_code
    except BaseException:
        log.exception(events.MOUNT_REQUEST_CRASHED)
    finally:
        sys.stderr.flush()
        os._exit(code)
