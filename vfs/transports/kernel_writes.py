"""The part of our server on /dev/fuse that only a writable mount has.

Nobody but the kernel changes what it was told, so names and attributes stay valid for ever here,
too: it follows its own requests. Opening a file is no message (see kernel_transport.py), nor is
closing it: a file that was removed is kept until the kernel forgets its node, which it does when
the last process has closed it. Locks are the kernel's own affair, since nothing else looks at the
files.

One thread carries out what changes names, in the kernel's order, so of all requests at most one
can have been carried out and not answered when a server is killed. Its successor gets that one
marked, as all that were read.
"""

import errno
import stat
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Final

from agent_plugin.content.store import Cancellation
from vfs.nodes import NOW, Caller, Changes, Listed, WritableNodes, listed_for
from vfs.transports import kernel_protocol as protocol
from vfs.transports.kernel_entries import NOTHING, attr_out, dirent, entry_out
from vfs.transports.kernel_protocol import Opcode, Valid
from vfs.transports.kernel_transport import NAME_BYTES, KernelTransport

_NS: Final = 1_000_000_000
# "." and ".." stand before a directory's names.
_DOTS: Final = 2


class WritableKernelTransport(KernelTransport):
    """Serves one writable mount.

    Args:
        fd: /dev/fuse, after `negotiate`.
        nodes: What is served.
    """

    def __init__(self, fd: int, nodes: WritableNodes) -> None:
        super().__init__(fd, nodes, xattrs=True)
        self._writable = nodes
        self._handlers |= {
            Opcode.READLINK: self._readlink,
            Opcode.SETATTR: self._setattr,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.SYMLINK: self._symlink,
            Opcode.LINK: self._link,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.WRITE: self._write,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.FSYNC: self._fsync,
            Opcode.FSYNCDIR: self._fsync,
            Opcode.SETXATTR: self._setxattr,
            Opcode.REMOVEXATTR: self._removexattr,
            Opcode.BATCH_FORGET: self._batch_forget,
        }

    # ------------------------------------------------------------------ names

    def _lookup(self, unique: int, node: int, body: memoryview) -> None:
        if len(body) - 1 > NAME_BYTES:
            self._refuse(unique, errno.ENAMETOOLONG)
            return
        found = self._writable.lookup(node, bytes(body[:-1]))
        if found is None:
            self._answer_missing(unique)
        else:
            self._answer_entry(unique, found)

    def _readdirplus(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, size, *_ = protocol.READ_IN.unpack_from(body)
        pieces: list[bytes] = []
        left = size
        for position, name, found in self._from(node, offset, size // protocol.ENTRY_ATTR.size):
            attributes = self._writable.attributes(found)
            is_dots = position <= _DOTS
            known = NOTHING if is_dots else entry_out(attributes)
            piece = known + dirent(position, name, found, attributes.mode)
            if len(piece) > left:
                break
            left -= len(piece)
            pieces.append(piece)
            if not is_dots:
                self._writable.hold(found)
        self._answer(unique, b"".join(pieces))

    def _readdir(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, size, *_ = protocol.READ_IN.unpack_from(body)
        answer = b""
        for position, name, found in self._from(node, offset, size // protocol.DIRENT.size):
            mode = self._writable.attributes(found).mode
            entry = dirent(position, name, found, mode)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        self._answer(unique, answer)

    def _from(self, node: int, offset: int, most: int) -> list[Listed]:
        """Return so many of a directory's names after a position, dots first."""
        listing = self._writable.listing(node)
        first = bisect_right(listing, offset - _DOTS, key=lambda listed: listed[0])
        some = [
            (position + _DOTS, name, found)
            for position, name, found in listing[first : first + most]
        ]
        dots = [(1, b".", node), (2, b"..", self._writable.parent(node))]
        return [*dots[offset:], *some] if offset < _DOTS else some

    def _mknod(self, unique: int, node: int, body: memoryview) -> None:
        mode, rdev, _, _ = protocol.MKNOD_IN.unpack_from(body)
        [name] = _names(body[protocol.MKNOD_IN.size :])
        made = self._writable.mknod(
            node, name, mode, self._caller, rdev=rdev, again=bool(unique & protocol.RESENT)
        )
        self._answer_entry(unique, made)

    def _mkdir(self, unique: int, node: int, body: memoryview) -> None:
        mode, _ = protocol.MKDIR_IN.unpack_from(body)
        [name] = _names(body[protocol.MKDIR_IN.size :])
        again = bool(unique & protocol.RESENT)
        made = self._writable.mkdir(node, name, mode, self._caller, again=again)
        self._answer_entry(unique, made)

    def _symlink(self, unique: int, node: int, body: memoryview) -> None:
        name, target = _names(body)
        again = bool(unique & protocol.RESENT)
        made = self._writable.symlink(node, name, target, self._caller, again=again)
        self._answer_entry(unique, made)

    def _link(self, unique: int, node: int, body: memoryview) -> None:
        [old] = protocol.LINK_IN.unpack_from(body)
        [name] = _names(body[protocol.LINK_IN.size :])
        self._writable.link(old, node, name, again=bool(unique & protocol.RESENT))
        self._answer_entry(unique, old)

    def _unlink(self, unique: int, node: int, body: memoryview) -> None:
        [name] = _names(body)
        self._writable.unlink(node, name, again=bool(unique & protocol.RESENT))
        self._refuse(unique, 0)

    def _rmdir(self, unique: int, node: int, body: memoryview) -> None:
        [name] = _names(body)
        self._writable.rmdir(node, name, again=bool(unique & protocol.RESENT))
        self._refuse(unique, 0)

    def _rename(self, unique: int, node: int, body: memoryview) -> None:
        [to] = protocol.RENAME_IN.unpack_from(body)
        self._rename_to(unique, node, to, 0, body[protocol.RENAME_IN.size :])

    def _rename2(self, unique: int, node: int, body: memoryview) -> None:
        to, flags, _ = protocol.RENAME2_IN.unpack_from(body)
        self._rename_to(unique, node, to, flags, body[protocol.RENAME2_IN.size :])

    def _rename_to(self, unique: int, node: int, to: int, flags: int, names: memoryview) -> None:
        name, to_name = _names(names)
        again = bool(unique & protocol.RESENT)
        self._writable.rename(node, name, to, to_name, flags=flags, again=again)
        self._refuse(unique, 0)

    def _forget(self, _unique: int, node: int, body: memoryview) -> None:
        [count] = protocol.FORGET_IN.unpack_from(body)
        self._writable.forget(node, count)

    def _batch_forget(self, _unique: int, _node: int, body: memoryview) -> None:
        many, _ = protocol.BATCH_FORGET_IN.unpack_from(body)
        size = protocol.BATCH_FORGET_IN.size
        for at in range(size, size + many * protocol.FORGET_ONE.size, protocol.FORGET_ONE.size):
            self._writable.forget(*protocol.FORGET_ONE.unpack_from(body, at))

    # ------------------------------------------------------------------ content

    def _write(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, size, flags, *_ = protocol.WRITE_IN.unpack_from(body)
        data = body[protocol.WRITE_IN.size :][:size]
        kills = bool(flags & protocol.WRITE_KILL_SUIDGID)
        # The buffer is another request's as soon as this one waits.
        kept = data if self._writable.can_write(node) else bytes(data)

        def write() -> bytes:
            count = self._writable.write(node, offset, kept, kills_privileges=kills)
            return protocol.WRITE_OUT.pack(count, 0)

        self._change_content(unique, node, write)

    def _setattr(self, unique: int, node: int, body: memoryview) -> None:
        (
            given, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _,
        ) = protocol.SETATTR_IN.unpack_from(body)  # fmt: skip
        valid = Valid(given & _ALL_VALID)
        changes = Changes(
            mode=stat.S_IMODE(mode) if Valid.MODE in valid else None,
            uid=uid if Valid.UID in valid else None,
            gid=gid if Valid.GID in valid else None,
            size=size if Valid.SIZE in valid else None,
            atime_ns=_time(valid, Valid.ATIME, Valid.ATIME_NOW, atime * _NS + atime_ns),
            mtime_ns=_time(valid, Valid.MTIME, Valid.MTIME_NOW, mtime * _NS + mtime_ns),
            kills_privileges=Valid.KILL_SUIDGID in valid,
        )

        def change() -> bytes:
            return attr_out(self._writable.setattr(node, changes))

        if changes.size and changes.size != self._writable.attributes(node).size:
            self._change_content(unique, node, change)
        else:
            self._answer(unique, change())

    def _fallocate(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, length, mode, _ = protocol.FALLOCATE_IN.unpack_from(body)

        def change() -> bytes:
            self._writable.fallocate(node, mode, offset, length)
            return b""

        self._change_content(unique, node, change)

    def _change_content(self, unique: int, node: int, change: Callable[[], bytes]) -> None:
        """Answer with what a change returns; an input is fetched first, on another thread."""
        if self._writable.can_write(node):
            self._answer(unique, change())
            return

        def prepare(cancellation: Cancellation) -> bytes:
            self._writable.prepare(node, cancellation)
            return change()

        self._later(self._threads, unique, prepare, partial(self._answer, unique))

    def _fsync(self, unique: int, node: int, body: memoryview) -> None:
        _, flags, _ = protocol.FSYNC_IN.unpack_from(body)
        data_only = bool(flags & protocol.FSYNC_DATA_ONLY)

        def sync(_cancellation: Cancellation) -> bytes:
            self._writable.fsync(node, data_only=data_only)
            return b""

        self._later(self._disk, unique, sync, partial(self._answer, unique))

    def _lseek(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, whence, _ = protocol.LSEEK_IN.unpack_from(body)
        found = self._writable.lseek(node, offset, whence)
        self._answer(unique, protocol.LSEEK_OUT.pack(found))

    def _readlink(self, unique: int, node: int, _body: memoryview) -> None:
        self._answer(unique, self._writable.readlink(node))

    # ------------------------------------------------------------------ extended attributes

    def _setxattr(self, unique: int, node: int, body: memoryview) -> None:
        size, flags = protocol.SETXATTR_IN.unpack_from(body)
        name, _, value = bytes(body[protocol.SETXATTR_IN.size :]).partition(b"\0")
        value = value[:size]
        try:
            self._writable.setxattr(node, name, value, flags)
        except FileExistsError:
            if not unique & protocol.RESENT or self._writable.getxattr(node, name) != value:
                raise
        self._refuse(unique, 0)

    def _listxattr(self, unique: int, node: int, body: memoryview) -> None:
        [size, _] = protocol.GETXATTR.unpack_from(body)
        names = listed_for(self._uid, self._writable.listxattr(node))
        self._answer_xattr(unique, b"".join(name + b"\0" for name in names), size)

    def _removexattr(self, unique: int, node: int, body: memoryview) -> None:
        [name] = _names(body)
        try:
            self._writable.removexattr(node, name)
        except OSError as error:
            if error.errno != errno.ENODATA or not unique & protocol.RESENT:
                raise
        self._refuse(unique, 0)

    # ------------------------------------------------------------------ their parts

    @property
    def _caller(self) -> Caller:
        return Caller(self._uid, self._gid)

    def _answer_entry(self, unique: int, node: int) -> None:
        answer = entry_out(self._writable.attributes(node))
        self._writable.hold(node)
        self._answer(unique, answer)


_ALL_VALID: Final = int(~Valid(0))


def _names(body: memoryview) -> list[bytes]:
    """Return names that each end with a zero."""
    return bytes(body).split(b"\0")[:-1]


def _time(valid: Valid, given: Valid, now: Valid, time_ns: int) -> int | None:
    if now in valid:
        return NOW
    return time_ns if given in valid else None
