"""An overlay in this process, above inputs in a store in a directory; no kernel asks it."""

import errno
import os
import stat
from pathlib import Path

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.open_store import build_store
from agent_plugin.content.store import Cancellation, Store
from tests.servers.trees import write_files
from vfs.error_ledger import ErrorLedger
from vfs.nodes import Caller
from vfs.overlay import Overlay
from vfs.overlay_upper import Upper
from vfs.reader import BlobReader
from vfs.service import NodeService, Ownership
from vfs.statistics import Statistics
from vfs.streaming import StreamPolicy
from vfs.tree import ROOT, Tree

MTIME_NS = 1_600_000_000_123_456_000
US = Caller(os.geteuid(), os.getegid())


class OverlayRig:
    """Inputs, an upper directory, and overlays that come after each other.

    Attributes:
        overlay: The one in use.
        inputs: A directory with the inputs' files, as a disk would have them.
        upper, work: The overlay's directories.

    Args:
        home: An empty directory.
        files: As `write_files` takes them.
        privileged: Whether the upper directory's marks are those of root.
        shown_owner: As Upper has it.
    """

    def __init__(
        self,
        home: Path,
        files: dict[str | bytes, bytes | int],
        *,
        privileged: bool = True,
        shown_owner: Caller | None = None,
    ) -> None:
        self.home = home
        self.inputs = home / "inputs"
        self._privileged = privileged
        self._shown_owner = shown_owner
        self._instance = 0
        write_files(self.inputs, files, mtime_ns=MTIME_NS)
        self.work = home / "work"
        for name in ("work", "spool"):
            (home / name).mkdir()
        self.upper = home / "upper"
        self.upper.mkdir(mode=0o755)
        self.store = build_store(f"file://{home}/store", account_id="")
        self.tree = Tree()
        self.tree.add(Manifest.of(self._stored(self.inputs)))
        self.ledger = home / "errors"
        self.reader = BlobReader(
            None, self._open_store, home / "spool", Statistics(), policy=StreamPolicy()
        )
        service = NodeService(
            self.tree, self.reader, ErrorLedger(self.ledger), Statistics(), Ownership(*US)
        )
        self._service = service
        self.overlay = self._begin(again=False)

    def close(self) -> None:
        """Stop fetching."""
        self.reader.close()

    def restart(self) -> None:
        """Have a successor of a killed server in the overlay's place."""
        self.overlay = self._begin(again=True)

    def mount_again(self) -> None:
        """Have another mount's server in the overlay's place."""
        self._instance += 1
        self.overlay = self._begin(again=False)

    def blob(self, path: str) -> Path:
        """Return where the store has an input's content."""
        [found] = (self.home / "store").rglob(
            f"{Digest.of((self.inputs / path).read_bytes()).hex}*"
        )
        return found

    def find(self, path: str) -> int:
        """Return the node at a path."""
        node = ROOT
        for name in path.encode().split(b"/"):
            if name:
                found = self.overlay.lookup(node, name)
                if found is None:
                    raise FileNotFoundError(errno.ENOENT, "no such file", path)
                node = found
        return node

    def write(self, path: str, data: bytes, offset: int = 0) -> None:
        """Write to a file, as the kernel has it done."""
        node = self.find(path)
        self.overlay.prepare(node, Cancellation())
        assert self.overlay.write(node, offset, data) == len(data)

    def read(self, node: int) -> bytes:
        """Return the content of a file."""
        size = self.overlay.attributes(node).size
        buffer = memoryview(bytearray(size))
        count = self.overlay.read_now(node, 0, buffer) if size else 0
        return self.overlay.read(node, 0, size, Cancellation()) if count < 0 else bytes(buffer)

    def _begin(self, *, again: bool) -> Overlay:
        upper = Upper(
            self.upper, self.work, privileged=self._privileged, shown_owner=self._shown_owner
        )
        return Overlay(self._service, upper, str(self._instance), again=again)

    def _open_store(self) -> Store:
        return self.store

    def _stored(self, source: Path) -> list[FileEntry]:
        entries = []
        for folder, _, names in os.walk(source):
            for name in names:
                path = Path(folder, name)
                digest = Digest.of(path.read_bytes())
                if digest.size:
                    with path.open("rb") as file:
                        self.store.put_file(digest, file.fileno(), cancellation=Cancellation())
                mtime = path.stat().st_mtime_ns // 1000
                entries.append(
                    FileEntry(digest.hex, mtime, path.relative_to(source).as_posix(), digest.size)
                )
        return entries


def seen_by_overlay(rig: OverlayRig) -> dict[str, tuple[object, ...]]:
    """Return all that is in an overlay, by path: what a user can see of each."""
    found: dict[str, tuple[object, ...]] = {}
    pending = [("", ROOT)]
    while pending:
        above, directory = pending.pop()
        for _, name, node in rig.overlay.listing(directory):
            path = f"{above}{os.fsdecode(name)}"
            attributes = rig.overlay.attributes(node)
            assert rig.overlay.lookup(directory, name) == node
            content: object = None
            if stat.S_ISDIR(attributes.mode):
                assert rig.overlay.parent(node) == directory
                pending.append((f"{path}/", node))
            elif stat.S_ISLNK(attributes.mode):
                content = rig.overlay.readlink(node)
            elif stat.S_ISREG(attributes.mode):
                content = rig.read(node)
            xattrs = {
                name: rig.overlay.getxattr(node, name) for name in rig.overlay.listxattr(node)
            }
            size = 0 if stat.S_ISDIR(attributes.mode) else attributes.size
            found[path] = (attributes.mode, attributes.nlink, size, content, xattrs)
    return found


def seen_on_disk(root: Path) -> dict[str, tuple[object, ...]]:
    """Return the same of a directory."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, directories, names in os.walk(root):
        for name in (*directories, *names):
            path = Path(folder, name)
            status = path.lstat()
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.fsencode(path.readlink())
            elif stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
            xattrs = {
                os.fsencode(xattr): os.getxattr(path, xattr, follow_symlinks=False)
                for xattr in os.listxattr(path, follow_symlinks=False)
                if xattr.startswith("user.")
            }
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            facts = (status.st_mode, status.st_nlink, size, content, xattrs)
            found[path.relative_to(root).as_posix()] = facts
    return found
