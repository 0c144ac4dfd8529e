"""The socket that job users ask: from systemd, or made here, and only by one service at a time.

It is 0666, since to be asked by job users is what it is for; who asks is looked at call by call
(rights.py). The directory that it is in is closed to others, so that nobody can put a socket of
their own in its place and be given the credentials of jobs.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import (
    LocalWriteError,
    SessionStateError,
    SettingsInvalidError,
    local_write_error,
)

# sd_listen_fds(3).
_FIRST_FD: Final = 3
# As many as may ask while all of the host's cores are busy.
_BACKLOG: Final = 128


@contextmanager
def listen(
    path: Path, environment: MutableMapping[str, str] = os.environ
) -> Iterator[socket.socket]:
    """Lend a socket that listens: the one that systemd gave this process, or one at a path.

    Args:
        path: Where it is made unless systemd has made one.
        environment: Of this process; what systemd says there is taken out.

    Raises:
        SessionStateError: Another service listens at the path.
        SettingsInvalidError: What systemd gave is no such socket.
        LocalWriteError: The socket can not be made, or its directory is open to others.
    """
    count = environment.pop("LISTEN_FDS", "")
    of_whom = environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    if count and of_whom == str(os.getpid()):
        with _given(count) as listener:
            yield listener
        return
    directory = _open_directory(path.parent)
    try:
        lock = _lock(directory, path)
        try:
            with _made(directory, path) as listener:
                yield listener
        finally:
            os.close(lock)
    finally:
        os.close(directory)


def notify_systemd(state: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell systemd something, such as READY=1, if it wants to know.

    Source: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
    """
    if address := environment.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            try:
                notifier.connect(f"\0{address[1:]}" if address.startswith("@") else address)
                notifier.sendall(state.encode("ascii"))
            except OSError as error:
                raise local_write_error(error, address) from error


def _given(count: str) -> socket.socket:
    if count != "1":
        raise SettingsInvalidError(f"systemd gave {count} sockets; the service has one")
    try:
        listener = socket.socket(fileno=_FIRST_FD)
        is_right = listener.family == socket.AF_UNIX and listener.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        )
    except OSError as error:
        raise SettingsInvalidError(f"what systemd gave is no socket: {error.strerror}") from error
    if not is_right or listener.type != socket.SOCK_STREAM:
        raise SettingsInvalidError(
            "what systemd gave is no stream socket that listens",
            hint="ListenStream= takes a path",
        )
    os.set_inheritable(_FIRST_FD, False)
    return listener


def _open_directory(path: Path) -> int:
    try:
        if not path.exists():
            path.mkdir(parents=True)
            path.chmod(0o755)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error
    status = os.fstat(fd)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise LocalWriteError(
            f"{path} is not this user's alone: others could listen there in the service's place",
            hint="set [worker] socket to a path in a directory of its own, such as /run/propmaster",
        )
    return fd


def _lock(directory: int, path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(f"{path.name}.lock", flags, 0o600, dir_fd=directory)
    except OSError as error:
        raise local_write_error(error, f"{path}.lock") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise SessionStateError(
            f"another service listens at {path}", hint="`systemctl status propmaster`"
        ) from error
    return lock


@contextmanager
def _made(directory: int, path: Path) -> Iterator[socket.socket]:
    # Of a service that was killed; whoever holds the lock may remove it.
    _unlink(directory, path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o111)
        try:
            # By its directory's descriptor: a socket's path has 107 bytes at most.
            listener.bind(f"/proc/self/fd/{directory}/{path.name}")
            listener.listen(_BACKLOG)
        except OSError as error:
            raise local_write_error(error, os.fspath(path)) from error
        finally:
            os.umask(before)
        try:
            yield listener
        finally:
            _unlink(directory, path)


def _unlink(directory: int, path: Path) -> None:
    try:
        os.unlink(path.name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise local_write_error(error, os.fspath(path)) from error
