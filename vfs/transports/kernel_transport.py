"""Our own server on /dev/fuse: the kernel asks little, and is told to remember everything.

Nodes never change, so names, attributes, missing names and pages are valid for ever, or until the
kernel is told to forget some (kernel_notify.py). OPENDIR is answered with ENOSYS once, and OPEN as
well where no open file is to cost a message (FUSE_NO_OPEN_SUPPORT; otherwise see passthrough.py). A
server therefore has no state that its successor needs, but for what is open how, which they share:
when it is killed, the next one asks the kernel to send again what was not answered.

One thread reads requests and answers all that can be answered at once. A read that has to wait for
the store goes to a thread that answers later; if its reader is killed meanwhile the kernel sends
INTERRUPT, and the read is answered with EINTR at once, which lets the process go. It sends that at
other signals as well, and only at the first: who is not about to end of it (ending.py) waits on, as
it would for a disk, and is looked at again and again.

The errno boundary: what leaves here is a positive errno of the operating system, never an
exception.
"""

import errno
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from agent_plugin.content import events
from agent_plugin.content.store import Cancellation
from vfs.nodes import Nodes
from vfs.threads import Threads
from vfs.transports import kernel_protocol as protocol
from vfs.transports.ending import is_ending
from vfs.transports.failures import errno_of
from vfs.transports.kernel_entries import PAGE_BYTES, Listings, attr_out, dirent, entry_out
from vfs.transports.kernel_notify import Notifier
from vfs.transports.kernel_protocol import FOREVER, Feature, Opcode
from vfs.transports.passthrough import Passthrough

MAX_READ_BYTES: Final = 1024 * 1024
MAX_WRITE_BYTES: Final = 1024 * 1024
# Larger than any request but those that write.
REQUEST_BYTES: Final = 128 * 1024
NAME_BYTES: Final = 255
# Reads that wait for the store at once, each with a thread that mostly sleeps. When three quarters
# of MAX_BACKGROUND hang, the kernel reads nothing ahead any more, cached files neither.
WAITING_READS: Final = 1024
MAX_BACKGROUND: Final = 1024
# Files of this host that are read at once; a disk that is slow for one must not stop all others.
READING_DISK: Final = 16
# How often those are looked at that had a signal and wait on, in seconds.
LOOK_SECONDS: Final = 0.1
# Of the thread that answers, as nice(1) counts. A render takes all cores with threads that wait for
# each other; whoever answers them must not queue behind them. Eight readers were at 0.46 of ext4
# without and at 0.82 with it (docs/BENCHMARKS.md, mount).
ANSWERING_NICENESS: Final = -10

WANTED: Final = (
    Feature.ASYNC_READ
    | Feature.BIG_WRITES
    | Feature.DO_READDIRPLUS
    | Feature.NO_OPEN_SUPPORT
    | Feature.PARALLEL_DIROPS
    | Feature.MAX_PAGES
    | Feature.CACHE_SYMLINKS
    | Feature.NO_OPENDIR_SUPPORT
    | Feature.EXPLICIT_INVAL_DATA
    | Feature.INIT_EXT
    | Feature.HAS_RESEND
)

# Set-user-ID goes with a write: otherwise the kernel asks before each whether it has to.
WANTED_FOR_WRITES: Final = Feature.HANDLE_KILLPRIV_V2

_XATTR_NAME: Final = protocol.GETXATTR.size
_XATTR_OURS: Final = b"user."
_T = TypeVar("_T")

log = events.get_logger()


class ProtocolError(Exception):
    """The kernel speaks a protocol that is too old, or something else."""


@dataclass(frozen=True, slots=True)
class Session:
    """What was agreed on at INIT."""

    minor: int
    features: Feature

    @property
    def can_resend(self) -> bool:
        """Whether the kernel sends again what a killed server had read and not answered."""
        return Feature.HAS_RESEND in self.features


def negotiate(fd: int, *, stack_depth: int = 0, writable: bool = False) -> Session:
    """Read the kernel's first request, INIT, and answer it.

    Args:
        fd: /dev/fuse, right after mount(2).
        stack_depth: How many file systems on each other the mount may count as, 1 or 2, when files
            are to be passed through; 0 if not.
        writable: Whether the kernel will ask for changes.

    Raises:
        ProtocolError: The kernel is older than protocol 7.31, or lacks what no server can do
            without here.
    """
    request = os.read(fd, REQUEST_BYTES)
    _, opcode, unique, *_ = protocol.IN_HEADER.unpack_from(request)
    if opcode != Opcode.INIT:
        raise ProtocolError(f"the first request is {opcode}, not INIT")
    body = protocol.IN_HEADER.size
    major, minor, readahead, flags = protocol.INIT_IN.unpack_from(request, body)
    offered = Feature(flags)
    if Feature.INIT_EXT in offered:
        [high] = protocol.INIT_IN_FLAGS2.unpack_from(request, body + protocol.INIT_IN.size)
        offered |= Feature(high << 32)
    wanted = WANTED
    if stack_depth:
        wanted |= Feature.PASSTHROUGH
    if writable:
        wanted |= WANTED_FOR_WRITES
    agreed = wanted & offered
    session = Session(min(minor, protocol.MINOR), agreed)
    if major != protocol.MAJOR or minor < protocol.OLDEST_MINOR:
        os.write(fd, protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, -errno.EPROTO, unique))
        raise ProtocolError(f"the kernel speaks FUSE {major}.{minor}, which is too old")
    answer = protocol.INIT_OUT.pack(
        protocol.MAJOR,
        session.minor,
        max(readahead, 8 * MAX_READ_BYTES),
        agreed & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        MAX_WRITE_BYTES if writable else PAGE_BYTES,
        1,
        MAX_READ_BYTES // PAGE_BYTES,
        0,
        agreed >> 32,
        stack_depth if Feature.PASSTHROUGH in agreed else 0,
    )
    header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(answer), 0, unique)
    os.write(fd, header + answer)
    return session


def answer_before_others() -> None:
    """Have the calling thread go before others on busy cores, if it may (CAP_SYS_NICE).

    It alone: threads that it starts, which fetch and hash, are as everybody is (sched(7),
    SCHED_RESET_ON_FORK).
    """
    try:
        # In this order: what is started in between would go before others for ever.
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, ANSWERING_NICENESS)
    except OSError:
        return


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that is answered later.

    Attributes:
        caller: The thread that made it; 0 if it is not seen from here.
        cancellation: Of what it waits for.
    """

    caller: int
    cancellation: Cancellation


class KernelTransport:
    """Serves one mount.

    Args:
        fd: /dev/fuse, after `negotiate`.
        nodes: What is served.
        xattrs: Tell hash and state of files as extended attributes. It costs a message for each
            file that is looked up through overlayfs, which asks for an attribute of its own;
            without, the kernel is told once that there are none.
        passthrough: What is open how; None when no opening is to cost a message.
    """

    def __init__(
        self,
        fd: int,
        nodes: Nodes,
        *,
        xattrs: bool = False,
        passthrough: Passthrough | None = None,
    ) -> None:
        self._fd = fd
        self._nodes = nodes
        self._notifier = Notifier(fd)
        self._listings = Listings(nodes)
        # Who made the request that is being carried out.
        self._uid = self._gid = self._caller_thread = 0
        self._waiting: dict[int, Waiting] = {}
        # Those of them whose caller had a signal that did not end it.
        self._signalled: set[int] = set()
        self._were_signalled = threading.Event()
        self._lock = threading.Lock()
        self._threads = Threads(WAITING_READS, thread_name_prefix="wait")
        self._buffer = memoryview(bytearray(MAX_READ_BYTES))
        self._handlers: dict[int, Callable[[int, int, memoryview], None]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.READ: self._read,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.STATFS: self._statfs,
            Opcode.INTERRUPT: self._interrupt,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._forget,
            Opcode.DESTROY: self._destroy,
        }
        self._disk = Threads(READING_DISK, thread_name_prefix="disk")
        if passthrough is not None:
            self._handlers[Opcode.OPEN] = partial(self._open, passthrough)
            self._handlers[Opcode.RELEASE] = partial(self._release, passthrough)
        if xattrs:
            self._handlers[Opcode.GETXATTR] = self._getxattr
        if nodes.writable is not None:
            self._handlers[Opcode.LISTXATTR] = self._listxattr

    @property
    def passes_through(self) -> bool:
        """Whether the kernel reads files of this host itself."""
        return Opcode.OPEN in self._handlers

    def ask_again(self) -> None:
        """Have the kernel send again what a killed server had read and not answered.

        Raises:
            OSError: It can not, or the mount is gone.
        """
        size = protocol.OUT_HEADER.size
        os.write(self._fd, protocol.OUT_HEADER.pack(size, protocol.NOTIFY_RESEND, 0))

    def forget_names(self, names: Sequence[tuple[int, bytes]]) -> None:
        """Have names, each with its directory's node, looked up again; never waits."""
        # Whatever is encoded at this moment, of the names as they were, counts for no longer.
        self._listings.forget()
        self._notifier.forget_names(names)

    def forget_content(self, nodes: Iterable[int]) -> None:
        """Have all that was read of files read again; never waits."""
        self._notifier.forget_content(nodes)

    def serve(self) -> None:
        """Answer requests until the mount is gone."""
        self._start_threads()
        answer_before_others()
        most = REQUEST_BYTES + (MAX_WRITE_BYTES if self._nodes.writable else 0)
        buffer = memoryview(bytearray(most))
        unpack = protocol.IN_HEADER.unpack_from
        body = protocol.IN_HEADER.size
        while True:
            try:
                length = os.readv(self._fd, [buffer])
            except OSError as error:
                if error.errno == errno.ENODEV:
                    break
                # ENOENT: the request was interrupted before anybody read it.
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                raise
            _, opcode, unique, node, self._uid, self._gid, self._caller_thread, *_ = unpack(buffer)
            handler = self._handlers.get(opcode)
            if handler is None:
                self._refuse(unique, errno.ENOSYS)
                continue
            try:
                handler(unique, node, buffer[body:length])
            except Exception as error:  # noqa: BLE001 - the errno boundary: nothing may pass
                self._refuse(unique, errno_of(error))
        for waiting in list(self._waiting.values()):
            waiting.cancellation.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._disk.shutdown(wait=False, cancel_futures=True)

    def _start_threads(self) -> None:
        """Have one thread for each kind of work: later the host may give none.

        Raises:
            RuntimeError, LocalReadError: It gives none now.
        """
        threading.Thread(target=self._look_at_signalled, name="signal", daemon=True).start()
        for threads in (self._threads, self._disk):
            threads.submit(bool)

    # ------------------------------------------------------------------ requests

    def _lookup(self, unique: int, node: int, body: memoryview) -> None:
        if len(body) - 1 > NAME_BYTES:
            self._refuse(unique, errno.ENAMETOOLONG)
            return
        found = self._nodes.lookup(node, bytes(body[:-1]))
        if found is None:
            self._answer_missing(unique)
        else:
            self._answer(unique, entry_out(self._nodes.attributes(found)))

    def _getattr(self, unique: int, node: int, _body: memoryview) -> None:
        self._answer(unique, attr_out(self._nodes.attributes(node)))

    def _read(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, size, *_ = protocol.READ_IN.unpack_from(body)
        count = self._nodes.read_now(node, offset, self._buffer[:size])
        if count >= 0:
            self._answer(unique, self._buffer[:count])
            return
        self._later(
            self._threads,
            unique,
            partial(self._nodes.read, node, offset, size),
            partial(self._answer, unique),
        )

    def _open(self, files: Passthrough, unique: int, node: int, _body: memoryview) -> None:
        blob = files.whole_now(node)
        if blob is not None or files.is_decided(node):
            self._answer(unique, files.opened(unique, node, blob))
            return
        self._later(
            self._disk,
            unique,
            lambda _: files.whole(node),
            lambda blob: self._answer(unique, files.opened(unique, node, blob)),
        )

    def _release(self, files: Passthrough, unique: int, node: int, _body: memoryview) -> None:
        files.released(unique, node)
        self._refuse(unique, 0)

    def _later(
        self,
        threads: Threads,
        unique: int,
        obtain: Callable[[Cancellation], _T],
        answer: Callable[[_T], None],
    ) -> None:
        """Answer a request with what takes its time, unless it is interrupted before that."""
        cancellation = Cancellation()
        with self._lock:
            self._waiting[unique] = Waiting(self._caller_thread, cancellation)
        threads.submit(self._work, unique, obtain, answer, cancellation)

    def _work(
        self,
        unique: int,
        obtain: Callable[[Cancellation], _T],
        answer: Callable[[_T], None],
        cancellation: Cancellation,
    ) -> None:
        try:
            obtained = obtain(cancellation)
        except BaseException as error:  # noqa: BLE001 - the errno boundary: nothing may pass
            if self._is_wanted(unique):
                self._refuse(unique, errno_of(error))
            return
        if not self._is_wanted(unique):
            return  # It was answered with EINTR.
        try:
            answer(obtained)
        except BaseException as error:  # noqa: BLE001 - the errno boundary: nothing may pass
            self._refuse(unique, errno_of(error))

    def _is_wanted(self, unique: int) -> bool:
        with self._lock:
            return self._waiting.pop(unique, None) is not None

    def _interrupt(self, _unique: int, _node: int, body: memoryview) -> None:
        [interrupted] = protocol.INTERRUPT_IN.unpack_from(body)
        if self._gives_up(interrupted):
            return
        with self._lock:
            self._signalled.add(interrupted)
        self._were_signalled.set()

    def _gives_up(self, unique: int) -> bool:
        """Answer a request whose caller is to end; False if that waits on."""
        with self._lock:
            waiting = self._waiting.get(unique)
        if waiting is not None and not is_ending(waiting.caller):
            return False
        if waiting is not None and self._is_wanted(unique):
            waiting.cancellation.cancel()
            self._refuse(unique, errno.EINTR)
        return True

    def _look_at_signalled(self) -> None:
        """See whether those who wait on have had another signal since."""
        while True:
            self._were_signalled.wait()
            self._were_signalled.clear()
            while self._signalled:
                time.sleep(LOOK_SECONDS)
                gone = {unique for unique in list(self._signalled) if self._gives_up(unique)}
                with self._lock:
                    self._signalled -= gone

    def _readdirplus(self, unique: int, node: int, body: memoryview) -> None:
        _, offset, size, *_ = protocol.READ_IN.unpack_from(body)
        listing = self._listings.get(node)
        if offset == 0:
            self._listings.begin(node)
        ends = listing.ends
        # Offsets are positions in the listing: the n-th entry ends where n is.
        start = ends[offset - 1] if 0 < offset <= len(ends) else 0
        last = bisect_right(ends, start + size)
        end = ends[last - 1] if last > offset else start
        self._answer(unique, memoryview(listing.encoded)[start:end] if offset < len(ends) else b"")
        if last == len(ends) and offset < last:
            # With the last of it the kernel is busy for a while.
            self._listings.encode_ahead()

    def _readdir(self, unique: int, node: int, body: memoryview) -> None:
        """For kernels that do not ask for attributes as well."""
        _, offset, size, *_ = protocol.READ_IN.unpack_from(body)
        answer = b""
        for position, (name, found) in enumerate(self._names(node)[offset:], start=offset + 1):
            mode = self._nodes.attributes(found).mode
            entry = dirent(position, name, found, mode)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        self._answer(unique, answer)

    def _statfs(self, unique: int, _node: int, _body: memoryview) -> None:
        block, blocks, free, available, files, files_free = self._nodes.statvfs()
        self._answer(
            unique,
            protocol.STATFS_OUT.pack(
                blocks, free, available, files, files_free, block, NAME_BYTES, block, 0
            ),
        )

    def _getxattr(self, unique: int, node: int, body: memoryview) -> None:
        name = bytes(body[_XATTR_NAME:-1])
        if self._nodes.writable is None and not name.startswith(_XATTR_OURS):
            # Not ENODATA: who lists files then asks for labels and ACLs once for the file system.
            self._refuse(unique, errno.EOPNOTSUPP)
            return
        [size, _] = protocol.GETXATTR.unpack_from(body)
        value = self._nodes.getxattr(node, name)
        if value is None:
            self._refuse(unique, errno.ENODATA)
        else:
            self._answer_xattr(unique, value, size)

    def _listxattr(self, unique: int, node: int, body: memoryview) -> None:
        [size, _] = protocol.GETXATTR.unpack_from(body)
        names = b"".join(name + b"\0" for name in self._nodes.listxattr(node))
        self._answer_xattr(unique, names, size)

    def _answer_xattr(self, unique: int, value: bytes, size: int) -> None:
        if size == 0:
            self._answer(unique, protocol.GETXATTR.pack(len(value), 0))
        elif len(value) > size:
            self._refuse(unique, errno.ERANGE)
        else:
            self._answer(unique, value)

    def _forget(self, _unique: int, _node: int, _body: memoryview) -> None:
        """Nodes stay; the kernel expects no answer."""

    def _destroy(self, unique: int, _node: int, _body: memoryview) -> None:
        self._refuse(unique, 0)

    # ------------------------------------------------------------------ their parts

    def _names(self, node: int) -> list[tuple[bytes, int]]:
        return [
            (b".", node),
            (b"..", self._nodes.parent(node)),
            *((name, found) for _, name, found in self._nodes.listing(node)),
        ]

    def _answer_missing(self, unique: int) -> None:
        """Have the kernel remember that there is nothing of that name: it is node 0."""
        missing = protocol.ENTRY.pack(0, 0, FOREVER, 0, 0, 0)
        self._answer(unique, missing + bytes(protocol.ATTR.size))

    def _answer(self, unique: int, data: bytes | memoryview) -> None:
        header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(data), 0, unique)
        self._send([header, data])

    def _refuse(self, unique: int, error: int) -> None:
        self._send([protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size, -error, unique)])

    def _send(self, pieces: list[bytes | memoryview]) -> None:
        try:
            os.writev(self._fd, pieces)
        except OSError as error:
            # ENOENT: the request was interrupted, nobody waits. ENODEV: the mount is gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
