"""Cached blobs that the kernel reads itself (FUSE passthrough, kernel 6.9, CAP_SYS_ADMIN).

A file whose blob is here, whole and verified, is opened with that blob's descriptor behind it;
reads, maps and read-ahead of it then never come to the server, and there is one copy of it in
memory. Another file is opened to be read through the server, and stays so until its last close: the
kernel refuses (EIO) to have a file open in two ways, or by two numbers of the same blob. Who opens
it after that gets the blob, if it has come. What is open stays readable whatever becomes of the
cache.

The kernel can not be told to forget what it reads itself, so nothing is passed through that is not
verified. A blob that may be read before that, since it is large, is read through the server as long
as hashing it takes; who opens it waits a moment for that (reader.py).

Passthrough needs the kernel to ask for each opening. Where files are small that costs more than it
gains, and the kernel is told once that nobody need be asked: chosen for a mount, by the mean size
of its files, since one mount can not have both.

Concurrency: any thread may call anything.
"""

import fcntl
import struct
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.mount_table import kind_of_file_system
from vfs.open_blob import OpenBlob
from vfs.service import NodeService
from vfs.statistics import Statistics
from vfs.transports.kernel_protocol import Feature
from vfs.transports.open_files import MOST_NODES, NOT_OPEN, PASSES, SERVES, Opened, OpenFiles

# Files of this size on average gain by passthrough as much as asking costs; measured, see
# docs/decisions/0011-passthrough-or-no-open.md.
LEAST_MEAN_BYTES: Final = 1024 * 1024
_OPEN_OUT: Final = struct.Struct("<QIi")  # struct fuse_open_out: fh, open_flags, backing_id.
_KEEP_CACHE: Final = 1 << 1
_NO_FLUSH: Final = 1 << 5
_PASSTHROUGH: Final = 1 << 7
# _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t).
_BACKING_OPEN: Final = 0x4010E501
_BACKING_CLOSE: Final = 0x4004E502
_BACKING_MAP: Final = struct.Struct("<iIQ")  # fd, flags, padding.
_BACKING_ID: Final = struct.Struct("<I")

log = events.get_logger()


@dataclass(frozen=True, slots=True)
class Plan:
    """Whether a mount is to pass files through, before the kernel has been asked.

    Attributes:
        stack_depth: How many file systems on each other the mount may count as; 0 for no
            passthrough.
        reason: Why.
        directory: Where the blobs are, or others on the same file system.
    """

    stack_depth: int
    reason: str
    directory: Path


def make_plan(wish: str, *, files: int, total: int, directory: Path, writable: bool) -> Plan:
    """Decide by what is to be mounted.

    The kernel stacks two file systems on another at most. An overlayfs above takes one, so below
    it a cache on another overlayfs (in a container) can not be passed through; alone it can.

    Args:
        wish: `on`, `off`, or `auto` to go by the mean size of the files.
        files: In the tree.
        total: Their bytes.
        directory: Where blobs are kept.
        writable: An overlayfs comes above.
    """
    if wish == "auto":
        used = total >= files * LEAST_MEAN_BYTES
        reason = f"files of {total / max(1, files) / 1024**2:.2f} MiB on average"
    else:
        used, reason = wish == "on", "the settings say so"
    deep = not writable and kind_of_file_system(directory) == "overlay"
    return Plan((2 if deep else 1) if used else 0, reason, directory)


def start_passthrough(
    fd: int,
    features: Feature,
    plan: Plan,
    service: NodeService,
    table: OpenFiles,
    statistics: Statistics,
) -> tuple["Passthrough | None", str]:
    """Return what passes files through, None if nothing does; and why.

    Args:
        fd: /dev/fuse, after INIT.
        features: That were agreed on.
        plan: What was planned.
        service: Whose files they are.
        table: Shared with the servers before and after this one.
        statistics: What is counted.
    """
    if not plan.stack_depth:
        return None, plan.reason
    if Feature.PASSTHROUGH not in features:
        return None, "the kernel has no passthrough (Linux 6.9)"
    passthrough = Passthrough(fd, service, table, statistics)
    refused = passthrough.probe(plan.directory)
    if refused:
        return None, refused
    passthrough.recover()
    return passthrough, plan.reason


def open_backing(fd: int, blob: int) -> int:
    """Have the kernel take a descriptor as something to read from; return its number of it.

    Args:
        fd: /dev/fuse.
        blob: Of a regular file; may be closed afterwards.

    Raises:
        OSError: EPERM: without CAP_SYS_ADMIN. ELOOP: too many file systems on each other.
    """
    # A bytearray: for `bytes` fcntl returns the buffer, not the number.
    number: int = fcntl.ioctl(fd, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(blob, 0, 0)))
    return number


def close_backing(fd: int, backing: int) -> None:
    """Give a number back; whoever has it open reads on. One that is not known is passed over."""
    with suppress(OSError):
        fcntl.ioctl(fd, _BACKING_CLOSE, bytearray(_BACKING_ID.pack(backing)))


class Passthrough:
    """The open files of a mount whose kernel asks for each opening.

    Args:
        fd: /dev/fuse, after INIT.
        service: Whose files they are.
        table: Shared with the servers before and after this one.
        statistics: What is counted.
    """

    def __init__(
        self, fd: int, service: NodeService, table: OpenFiles, statistics: Statistics
    ) -> None:
        self._fd = fd
        self._service = service
        self._table = table
        self._statistics = statistics
        self._lock = threading.Lock()
        self._was_refused = False

    def probe(self, directory: Path) -> str:
        """Find out whether blobs in a directory can be passed through; return why not, or nothing.

        What the first server of a mount finds holds for all.
        """
        if self._table.mode == PASSES:
            return ""
        reason = ""
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                close_backing(self._fd, open_backing(self._fd, file.fileno()))
        except OSError as error:
            reason = f"{directory}: {error.strerror}"
        self._table.mode = SERVES if reason or self._table.mode == SERVES else PASSES
        return reason or ("" if self._table.mode == PASSES else "it was not possible before")

    def recover(self) -> None:
        """Take over from a server that was killed, if there was one."""
        with self._lock:
            backing = self._table.recover()
            if backing:
                close_backing(self._fd, backing)

    def whole_now(self, node: int) -> OpenBlob | None:
        """Return what a file could be passed through to, if that is known at once."""
        return self._service.whole_now(node)

    def whole(self, node: int) -> OpenBlob | None:
        """Return what a file can be passed through to, None if nothing; may read all of it."""
        return self._service.whole(node) if node < MOST_NODES else None

    def is_decided(self, node: int) -> bool:
        """Whether a node is open, so that who opens it now has to get it in the same way."""
        return self._table[node] != NOT_OPEN

    def opened(self, request: int, node: int, blob: OpenBlob | None) -> bytes:
        """Count an opening; return its answer.

        Args:
            request: The kernel's number of it.
            node: A file.
            blob: To be read by the kernel itself, if nobody has the file open in another way.
        """
        with self._lock:
            before = self._table[node]
            if node < MOST_NODES and not self._table.was_counted(request):
                backing = before.backing if before.opens else self._back(blob)
                self._table.change(request, node, Opened(before.opens + 1, backing))
            backing = self._table[node].backing
        flags = _NO_FLUSH | (_PASSTHROUGH if backing else _KEEP_CACHE)
        return _OPEN_OUT.pack(0, flags, backing)

    def released(self, request: int, node: int) -> None:
        """Count a closing."""
        with self._lock:
            before = self._table[node]
            if not before.opens or self._table.was_counted(request):
                return
            after = before._replace(opens=before.opens - 1) if before.opens > 1 else NOT_OPEN
            self._table.change(request, node, after)
            if before.backing and not after.backing:
                close_backing(self._fd, before.backing)

    def _back(self, blob: OpenBlob | None) -> int:
        if blob is None:
            return 0
        try:
            backing = open_backing(self._fd, blob.fd)
        except OSError as error:
            # Through the server it can be read all the same; told once, not for each file.
            if not self._was_refused:
                log.warning(events.MOUNT_PASSTHROUGH_REFUSED, extra={"reason": error.strerror})
            self._was_refused = True
            return 0
        self._statistics.count(files_passed_through=1)
        return backing
