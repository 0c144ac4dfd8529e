"""Who may ask the host service for what.

The kernel says who asks (SO_PEERCRED, SO_PEERGROUPS); nothing that the asker says of itself is
believed. A job user may ask for a session directory that the kernel would let it write to, which
the agent's user, the service's or root made, and which nobody but them can put something else in
the place of: every directory on the way is theirs, closed to others, and no link. So what was found
when a call began holds until it ends, and the path may be used by its name.

What is inside the session directory is the job user's, who may change it at any moment; whoever
works there follows no link (agent_plugin/content/safe_path.py).
"""

import errno
import os
import pwd
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import NotAllowedError, SettingsInvalidError
from agent_plugin.content.owner import Owner
from agent_plugin.settings import WorkerSettings
from agent_plugin.workers.call import JobUser

# unix(7): pid, uid and gid of who connected. The groups are asked for by a number that Python does
# not name: asm-generic/socket.h, Linux 4.13.
_CREDENTIALS: Final = struct.Struct("3i")
_SO_PEERGROUPS: Final = 59
# What Python lets be asked for, at most.
_MOST_GROUPS: Final = 256

# PATH_MAX of Linux, in bytes.
_MOST_CHARACTERS: Final = 4095

_READ: Final = 4
_WRITE: Final = 2
_ENTER: Final = 1
_WAY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a socket, as the kernel has it."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()

    def may(self, wanted: int, status: os.stat_result) -> bool:
        """Whether mode bits let it do something: 4 read, 2 write, 1 enter, or sums of them."""
        if self.uid == 0:
            return True
        if self.uid == status.st_uid:
            given = status.st_mode >> 6
        elif status.st_gid == self.gid or status.st_gid in self.groups:
            given = status.st_mode >> 3
        else:
            given = status.st_mode
        return given & wanted == wanted


def peer_of(connection: socket.socket) -> Peer:
    """Return who made a connection, or who listens where this process connected to.

    Raises:
        OSError: The other end is gone.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    size = struct.calcsize("I")
    try:
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * size)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        return Peer(pid, uid, gid, peer_of_user(JobUser(uid, gid)).groups)
    return Peer(pid, uid, gid, frozenset(struct.unpack(f"{len(groups) // size}I", groups)))


def peer_of_user(user: JobUser) -> Peer:
    """Return what a job's user is to the kernel, with the groups that the host says it has."""
    primary, groups = user.gid, [user.gid]
    with suppress(KeyError):
        entry = pwd.getpwuid(user.uid)
        primary, groups = entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Peer(0, user.uid, primary, frozenset(groups))


def owner_of(user: JobUser | None) -> Owner | None:
    """Return for whom files are placed and read; None: for this process's user."""
    if user is None:
        return None
    return Owner(user.uid, user.gid, tuple(sorted(peer_of_user(user).groups)))


def check_session_directory(
    session_dir: str, peer: Peer, settings: WorkerSettings
) -> JobUser | None:
    """Return whose the files of a session are to be; None if they are the service's user's.

    Raises:
        NotAllowedError: The peer may not ask for this directory, or it is none.
        SettingsInvalidError: There is no such agent user.
    """
    owners = _owners_of_sessions(settings)
    trusted = owners | {0, os.geteuid()}
    path = _plain_path(session_dir)
    roots = settings.session_roots
    if roots and not any(root in path.parents for root in roots):
        raise NotAllowedError(
            f"{path} is in none of the directories that sessions are in",
            hint="list the agent's session root in [worker] session_roots",
        )
    *way, (last, status) = _walk(path)
    for directory, above in way:
        _check_way(directory, above, trusted)
    if last != path:
        raise NotAllowedError(f"{path} is not there")
    if status.st_uid not in owners or status.st_mode & stat.S_IWOTH:
        raise NotAllowedError(
            f"{last} is no session directory: it has to belong to the agent's user, closed to"
            " others",
            hint="[worker] agent_user names who runs the worker agent",
        )
    if not peer.may(_READ | _WRITE | _ENTER, status):
        raise NotAllowedError(f"the user with id {peer.uid} may not write to {last}")
    return None if peer.uid == os.geteuid() else JobUser(peer.uid, status.st_gid)


def check_mapped_root(
    root: Path, session_dir: Path, job_user: JobUser | None, settings: WorkerSettings
) -> None:
    """See that a job may have its files in a directory: right in the session's, or outside of it.

    A service works there with rights that the job's user has not, so nobody else may be able to
    put a link in the place of the directory, or of one above it. That is so right in the session
    directory, though not deeper in it, where all is the job's; outside of it, if all above is
    closed to the job's user, or if the operator says so.

    Args:
        root: The local root; it need not exist.
        session_dir: The session's, which nobody can put something else in the place of.
        job_user: Of the call; None may do all that this process may.
        settings: The host's.

    Raises:
        NotAllowedError: It may not.
    """
    path = _plain_path(os.fspath(root))
    if job_user is None or path.parent == session_dir or path in settings.mapped_roots:
        return
    if session_dir in path.parents:
        raise NotAllowedError(
            f"{path} is below a directory that the job can put a link in the place of",
            hint=f"a root in the session is right in {session_dir}: the agent has each of them so",
        )
    hint = f"add {path} to [worker] mapped_roots, if jobs are meant to have their files there"
    peer = peer_of_user(job_user)
    trusted = {0, os.geteuid(), *_owners_of_sessions(settings)}
    listed = any(allowed in path.parents for allowed in settings.mapped_roots)
    shared = False
    for directory, status in _walk(path):
        if directory != path:
            _check_way(directory, status, trusted, hint=hint)
            shared = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        elif shared and status.st_uid not in trusted:
            # Its owner can put a link in its place, sticky as the directory above may be.
            raise NotAllowedError(f"{path} is in a directory of many users", hint=hint)
        elif listed or peer.may(_READ | _WRITE | _ENTER, status):
            return
    if not listed:
        raise NotAllowedError(
            f"the job's user, with id {peer.uid}, may not write to {path}", hint=hint
        )


def check_mount_point(
    place: Path, session_dir: Path, job_user: JobUser | None, settings: WorkerSettings
) -> None:
    """See that a job may have something mounted at a place, whose content becomes that of a job.

    A directory such as /var/tmp all may write to, but whoever mounts there has it for himself.

    Args:
        place: The mount point; it need not exist.
        session_dir: The session's.
        job_user: Of the call; None may do all that this process may.
        settings: The host's.

    Raises:
        NotAllowedError: It may have no files there; or the directory is neither the job user's nor
            listed by the operator.
    """
    check_mapped_root(place, session_dir, job_user, settings)
    if job_user is None or place.parent == session_dir:
        return
    if any(allowed in (place, *place.parents) for allowed in settings.mapped_roots):
        return
    owner = place.lstat().st_uid
    if owner != job_user.uid:
        raise NotAllowedError(
            f"{place} belongs to user {owner}, and others would lose it to what is mounted there",
            hint=f"add {place} to [worker] mapped_roots, if jobs are meant to have it mounted over",
        )


def check_given_file(path: str, job_user: JobUser, peer: Peer) -> None:
    """See that a file is one that the agent has made for the sessions of a job's user.

    The agent gives such a file, and the directory that it is in, to the job user's group and closes
    both to others. What all may read, such as the agent's own ~/.aws/config, was made for nobody in
    particular: a job that names it would have its programs run as the agent.

    Raises:
        NotAllowedError: Not so, or others than this user and root can change it, or it is no file.
    """
    trusted = {0, os.geteuid()}
    wanted = _plain_path(path)
    *way, (last, status) = _walk(wanted)
    for directory, above in way:
        _check_way(directory, above, trusted)
        if not peer.may(_ENTER, above):
            raise NotAllowedError(f"the user with id {peer.uid} may not enter {directory}")
    if last != wanted or not stat.S_ISREG(status.st_mode):
        raise NotAllowedError(f"{wanted} is no file")
    if status.st_uid not in trusted or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotAllowedError(f"{last} could be changed by others than the service's user")
    if not peer.may(_READ, status):
        raise NotAllowedError(f"the user with id {peer.uid} may not read {last}")
    for place, found in (way[-1], (last, status)):
        if found.st_gid != job_user.gid or found.st_mode & stat.S_IRWXO:
            raise NotAllowedError(
                f"{place} was not made for the sessions of the user with id {peer.uid}",
                hint="it has to be of the session directory's group, and closed to others",
            )


def _owners_of_sessions(settings: WorkerSettings) -> set[int]:
    """Return who makes session directories: the agent's user, if it is known."""
    if not settings.agent_user:
        return {0, os.geteuid()}
    try:
        return {pwd.getpwnam(settings.agent_user).pw_uid}
    except KeyError as error:
        raise SettingsInvalidError(
            f"[worker] agent_user: there is no user {settings.agent_user!r}"
        ) from error


def _plain_path(text: str) -> Path:
    plain = text.startswith("/") and text != "/" and os.path.normpath(text) == text
    if not plain or "\0" in text or len(text) > _MOST_CHARACTERS:
        raise NotAllowedError(f"{text[:200]!r} is no absolute path without `.` and `..`")
    return Path(text)


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield what is on the way to a path, from the top, and the path itself, as far as it is.

    Raises:
        NotAllowedError: A link is on the way, or what is no directory.
    """
    way = Path(path.anchor)
    fd = os.open(way, _WAY | os.O_DIRECTORY)
    try:
        yield way, os.fstat(fd)
        for name in path.parts[1:]:
            way /= name
            try:
                below = os.open(name, _WAY, dir_fd=fd)
            except FileNotFoundError:
                return
            except OSError as error:
                raise NotAllowedError(f"{way}: {error.strerror}") from error
            os.close(fd)
            fd = below
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode) or (way != path and not stat.S_ISDIR(status.st_mode)):
                raise NotAllowedError(f"{way} is no directory")
            yield way, status
    finally:
        os.close(fd)


def _check_way(
    directory: Path, status: os.stat_result, trusted: set[int], *, hint: str = ""
) -> None:
    """See that nobody but the trusted can put something else in the place of what is below."""
    open_to_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid not in trusted or (open_to_others and not status.st_mode & stat.S_ISVTX):
        raise NotAllowedError(
            f"{directory} could be changed by others than the agent's and the service's user",
            hint=hint or f"chown it to the agent's user, and chmod go-w {directory}",
        )
