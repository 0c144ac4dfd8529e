"""`python -m vfs SPEC`: mount, say so in one line on stdout, serve until unmounted."""

import gc
import os
import resource
import secrets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    LocalError,
    LocalReadError,
    ManifestInvalidError,
    MountFailedError,
    PropmasterError,
    local_write_error,
)
from agent_plugin.content.fusermount import may_administer
from agent_plugin.content.leftovers import remove_path
from agent_plugin.content.log_file import LogFile
from agent_plugin.content.manifest import MAX_MANIFEST_BYTES, decode
from agent_plugin.content.mount_probe import LIBFUSE2, TransportChoice
from agent_plugin.content.mount_spec import (
    INPUTS,
    NO_WRITES,
    OVERLAY,
    Layer,
    MountSpec,
    read_spec,
)
from agent_plugin.content.open_store import build_store
from agent_plugin.content.pinned import own_directory
from agent_plugin.content.snapshot_store import SnapshotStore, open_snapshot_store
from agent_plugin.content.store import BlobSource
from vfs.control import ControlSocket
from vfs.error_ledger import ErrorLedger
from vfs.mount import FUSE_KIND
from vfs.nodes import Caller, Nodes
from vfs.overlay import Overlay
from vfs.overlay_reveal import Revealing
from vfs.overlay_upper import Upper
from vfs.reader import FETCHES_AT_ONCE, STRICT_BYTES, BlobReader
from vfs.server_process import SERVES
from vfs.service import NodeService, Ownership
from vfs.statistics import Statistics
from vfs.streaming import StreamPolicy
from vfs.supervisor import Supervisor, tell_on_stdout
from vfs.transports.kernel_transport import KernelTransport, Session
from vfs.transports.kernel_writes import WritableKernelTransport
from vfs.transports.open_files import OpenFiles
from vfs.transports.passthrough import Plan, make_plan, start_passthrough
from vfs.tree import Tree

if TYPE_CHECKING:
    from vfs.transports.fusepy_transport import FusepyTransport

# Descriptors are needed by large blobs that come in parts, and by each level of what is written.
MOST_DESCRIPTORS: Final = 1 << 16
# Up to here an object of a snapshot comes with one request; larger ones in parts, as they are read.
OBJECT_WHOLE_BYTES: Final = 1024 * 1024

log = events.get_logger()


def main(arguments: list[str]) -> int:
    """Run the mount process; return its exit code."""
    started = time.monotonic()
    events.configure()
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m vfs SPEC\n")
        return 2
    try:
        _raise_descriptor_limit()
        path = Path(arguments[0])
        spec = read_spec(path)
        if spec.owner_pid and os.fork():
            # What ends all processes of the owner, by who started whom, is not to end this.
            os._exit(0)
        if spec.log is not None:
            events.get_logger().addHandler(LogFile(spec.log))
        server = Server(spec, path)
        supervisor = Supervisor(
            spec, server.serve, started=started, stack_depth=server.plan.stack_depth
        )
        code = supervisor.run(tell_on_stdout, server.size, server.prepare)
        if supervisor.abandoned:
            _forget(path.parent)
    except PropmasterError as error:
        sys.stderr.write(f"error[{error.reference}]: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return error.exit_code
    return code


def _forget(place: Path) -> None:
    """Remove what is known of a mount that nobody is left to ask for."""
    with suppress(OSError):
        remove_path(place)


class Server:
    """What is served of a spec; the tree is made before any server is forked, and shared.

    What is added while it is served goes to the spec first, so that a server which replaces a
    killed one adds it as well, in the same order, and gives it the same nodes.

    Attributes:
        plan: Whether the kernel is to read cached blobs itself.

    Args:
        spec: The spec.
        path: Its file, which is read again for what was added.
    """

    def __init__(self, spec: MountSpec, path: Path) -> None:
        self._spec = spec
        self._path = path
        self._instance = secrets.token_hex(8)
        self._layers = 0
        self._tree = Tree()
        self._opening = threading.Lock()
        self._opened: BlobSource | None = None
        for manifest in spec.manifests:
            self._tree.add(decode(_read(manifest), source=spec.called or manifest))
        self._open_files = OpenFiles()
        # Decided before anything is added to the tree, for all servers.
        directory = Path(spec.cache_dir or spec.work_dir)
        self.plan = (
            Plan(0, "the server keeps what is written", directory)
            if spec.writes == OVERLAY
            else make_plan(
                spec.passthrough,
                files=self._tree.files,
                total=self._tree.bytes,
                directory=directory,
                writable=spec.writes != NO_WRITES,
            )
        )
        self._add(spec.layers)
        # The tree stays as it is: nothing of it is ever garbage, and looking would unshare it.
        gc.freeze()

    def size(self) -> tuple[int, int]:
        """Return how many files and bytes there are."""
        return self._tree.files, self._tree.bytes

    def prepare(self) -> None:
        """Have what was written over other inputs hide none that came since.

        Raises:
            NoSpaceError, LocalWriteError: What is written can not be kept there.
        """
        spec = self._spec
        if not spec.gives_back or spec.writes == NO_WRITES:
            return
        try:
            with own_directory(Path(spec.work_dir)) as work_dir:
                place = Path(f"/proc/self/fd/{work_dir}")
                inputs = Path(spec.manifests[0]).read_bytes()
                before = _read_inputs(place / INPUTS)
                if before not in (None, inputs):
                    self._reveal(place, before or b"")
                _write_inputs(place / INPUTS, inputs)
        except OSError as error:
            raise local_write_error(error, spec.work_dir) from error

    def _reveal(self, place: Path, inputs: bytes) -> None:
        def before() -> Tree:
            tree = Tree()
            tree.add(decode(inputs, source="the inputs of the mount before"))
            return tree

        owner = Caller(self._spec.uid, self._spec.gid)
        upper = Upper(place / "upper", place / "work", shown_owner=_shown_owner(self._spec))
        try:
            Revealing(upper, before, self._tree, owner).run()
        except ManifestInvalidError as error:
            # Whose they are in between may have changed them: then nothing is known to be new.
            log.warning(
                events.MOUNT_CHANGE_DROPPED, extra={"path": INPUTS, "reason": error.message}
            )

    def serve(
        self, fd: int, session: Session | None, choice: TransportChoice, again: bool, tell: int
    ) -> None:
        """Serve until the mount is gone; without a session, it is libfuse that mounts."""
        spec = self._spec
        missed = self._add(read_spec(self._path).layers)
        statistics = Statistics()
        reader = BlobReader(
            self._cache(),
            self._store,
            Path(spec.work_dir, "spool"),
            statistics,
            policy=_stream_policy(spec),
            fetches_at_once=_fetches_at_once(spec),
            most_bytes=spec.spool_max_bytes or None,
            min_free_bytes=spec.spool_min_free_bytes,
        )
        service = NodeService(
            self._tree,
            reader,
            ErrorLedger(Path(spec.errors)),
            statistics,
            Ownership(spec.uid, spec.gid),
            by_hash=not spec.snapshot,
            object_of=self._object_of,
        )
        # The kernel knows the nodes of a killed server only where the mount did not die with it.
        resumes = again and session is not None and session.can_resend
        overlay = self._overlay(service, again=resumes)
        transport, why = self._transport(fd, session, service, overlay, statistics, again=again)
        used = isinstance(transport, KernelTransport) and transport.passes_through
        log.info(events.MOUNT_PASSTHROUGH, extra={"used": used, "reason": why})
        service.notifier = transport
        # Whoever was killed may have told the kernel or not.
        transport.forget_names(missed)

        def status(_question: Mapping[str, object]) -> dict[str, object]:
            return {
                "name": spec.name,
                "mountpoint": spec.mountpoint,
                "pid": os.getpid(),
                "supervisor": os.getppid(),
                "transport": choice.transport,
                "reason": choice.reason,
                "protocol": "libfuse 2" if session is None else f"7.{session.minor}",
                "writes": spec.writes,
                "passthrough": {"used": used, "reason": why},
                "writesReason": spec.writes_reason,
                "files": self._tree.files,
                "bytes": self._tree.bytes,
                "counts": statistics.snapshot(),
            }

        def files(question: Mapping[str, Any]) -> list[list[dict[str, object]]]:
            return [
                [msgspec.to_builtins(entry) for entry in self._tree.at_or_below(path)]
                for path in question["paths"]
            ]

        def add(_question: Mapping[str, object]) -> dict[str, object]:
            layers = read_spec(self._path).layers
            if session is None and not all(layer.at for layer in layers):
                return {"error": "libfuse can not be told that a name means something else now"}
            try:
                transport.forget_names(self._add(layers))
            except PropmasterError as error:
                return {"error": error.message}
            return {"layers": self._layers}

        ControlSocket(Path(spec.control), {"status": status, "files": files, "add": add})

        def ready() -> None:
            os.write(tell, SERVES)
            os.close(tell)

        try:
            if isinstance(transport, KernelTransport):
                if resumes:
                    transport.ask_again()
                    transport.forget_content(self._read_unverified())
                ready()
                transport.serve()
            else:
                transport.serve(ready)
        finally:
            reader.close()
            if overlay is not None:
                overlay.close()

    def _read_unverified(self) -> list[int]:
        """Return the files of which a killed server may have given what it had not verified."""
        # What comes from a snapshot is of the same state of its object whoever fetches it.
        may_be_wrong = self._spec.stream and not self._spec.snapshot
        return self._tree.larger_than(STRICT_BYTES) if may_be_wrong else []

    def _transport(
        self,
        fd: int,
        session: Session | None,
        service: NodeService,
        overlay: Overlay | None,
        statistics: Statistics,
        *,
        again: bool,
    ) -> "tuple[KernelTransport | FusepyTransport, str]":
        """Return what serves, and why it passes files through, or none."""
        spec = self._spec
        if session is None:
            at = spec.staged if again and may_administer() else spec.lower
            return _fusepy_transport(overlay or service, spec, at), "the transport is fusepy"
        if overlay is not None:
            return WritableKernelTransport(fd, overlay), self.plan.reason
        passthrough, why = start_passthrough(
            fd, session.features, self.plan, service, self._open_files, statistics
        )
        return KernelTransport(fd, service, xattrs=spec.xattrs, passthrough=passthrough), why

    def _overlay(self, service: NodeService, *, again: bool) -> Overlay | None:
        spec = self._spec
        if spec.writes != OVERLAY:
            return None
        # A file has the mode that whoever makes it wishes, less what the kernel took off for them.
        os.umask(0)
        upper = Upper(spec.upper, Path(spec.work_dir, "work"), shown_owner=_shown_owner(spec))
        return Overlay(service, upper, self._instance, again=again)

    def _add(self, layers: Sequence[Layer]) -> list[tuple[int, bytes]]:
        """Add the layers that are not there yet; return the names that mean something else now."""
        changed = []
        for layer in layers[self._layers :]:
            changed += self._tree.add(
                decode(_read(layer.manifest), source=layer.manifest), layer.at
            )
            self._layers += 1
        return changed

    def _cache(self) -> BlobCache | None:
        spec = self._spec
        if not spec.cache_dir:
            return None
        try:
            return BlobCache.open(
                Path(spec.cache_dir),
                store_url=spec.store_url,
                max_bytes=spec.cache_max_bytes,
                min_free_bytes=spec.cache_min_free_bytes,
                shared=spec.cache_shared,
                scope=spec.cache_scope,
            )
        except LocalError as error:
            if error.code == "E_CACHE_UNSAFE":
                raise
            log.warning(events.CACHE_BYPASSED, extra={"reason": error.message})
            return None

    def _object_of(self, digest: Digest) -> tuple[str, str] | None:
        """Return of a source's object URL and version, empty if not known; None for a blob."""
        if not self._spec.snapshot:
            return None
        with self._opening:
            store = self._opened
        info = store.object_of(digest) if isinstance(store, SnapshotStore) else None
        return ("", "") if info is None else (info.url, info.version)

    def _store(self) -> BlobSource:
        with self._opening:
            if self._opened is None:
                self._opened = self._open_store()
            return self._opened

    def _open_store(self) -> BlobSource:
        spec = self._spec
        limits = spec.store_limits
        policy = limits.retry_policy() if limits else None
        bandwidth = limits.bandwidth() if limits else None
        if spec.snapshot:
            return open_snapshot_store(
                _read(spec.snapshot),
                source=spec.snapshot,
                environment=os.environ,
                policy=policy,
                bandwidth=bandwidth,
            )
        return build_store(
            spec.store_url,
            account_id=spec.account_id,
            policy=policy,
            concurrency=limits.concurrency if limits else FETCHES_AT_ONCE,
            bandwidth=bandwidth,
        )


def _stream_policy(spec: MountSpec) -> StreamPolicy:
    if not spec.snapshot:
        return StreamPolicy(may_stream=spec.stream)
    # There is no hash by which the whole could be judged, so nothing is gained by having it all.
    return StreamPolicy(may_stream=spec.stream, above_bytes=OBJECT_WHOLE_BYTES, by_hash=False)


def _fetches_at_once(spec: MountSpec) -> int:
    """Return how many threads fetch: what they bring is waited for by readers, one by one."""
    limits = spec.store_limits
    return FETCHES_AT_ONCE if limits is None else min(2 * limits.concurrency, FETCHES_AT_ONCE)


def _fusepy_transport(nodes: Nodes, spec: MountSpec, at: Path) -> "FusepyTransport":
    # Or fusepy would start other programs to look for it.
    os.environ.setdefault("FUSE_LIBRARY_PATH", LIBFUSE2)
    try:
        # Here: importing it loads libfuse, which only this process needs.
        from vfs.transports.fusepy_transport import FusepyTransport  # noqa: PLC0415
    except (ImportError, OSError) as error:
        raise MountFailedError(f"libfuse 2 can not be loaded: {error}") from error
    return FusepyTransport(nodes, at, spec.name, FUSE_KIND, xattrs=spec.xattrs, seen_at=spec.lower)


def _shown_owner(spec: MountSpec) -> Caller | None:
    """Return whose everything is to seem, if this process can not make it theirs."""
    if os.geteuid() == 0 or spec.uid == os.geteuid():
        return None
    return Caller(spec.uid, spec.gid)


def _read_inputs(path: Path) -> bytes | None:
    """Return what was kept of the mount before; None if there was none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def _write_inputs(path: Path, inputs: bytes) -> None:
    new = path.with_suffix(".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
        file.write(inputs)
    new.replace(path)


def _raise_descriptor_limit() -> None:
    """Have as many descriptors as the host gives; the usual 1024 are for who uses select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # RLIM_INFINITY is below 0.
    most = MOST_DESCRIPTORS if hard < 0 else min(hard, MOST_DESCRIPTORS)
    if 0 <= soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LocalReadError(f"{path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
