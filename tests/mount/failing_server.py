"""A mount by libfuse whose content fails in all ways in which Python can: `MOUNTPOINT`.

Says `ready` when it is served. A process of its own, since that is what libfuse wants.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import StoreUnavailableError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.open_store import build_store
from vfs.error_ledger import ErrorLedger
from vfs.reader import BlobReader
from vfs.service import NodeService, Ownership
from vfs.statistics import Statistics
from vfs.streaming import StreamPolicy
from vfs.transports.fusepy_transport import FusepyTransport
from vfs.tree import Tree

CONTENT = b"right"
FAILURES: dict[str, BaseException] = {
    "an error without a number": OSError("no errno"),
    "an error with a wrong number": OSError(-5, "negative"),
    "a timeout": TimeoutError(),
    "a defect": ZeroDivisionError("a defect"),
    "an interrupt": KeyboardInterrupt(),
    "an exit": SystemExit(3),
    "an end of the memory": MemoryError(),
    "a store that is gone": StoreUnavailableError("gone"),
}


class FailingNodes(NodeService):
    """Nodes that raise what a file's name says, when it is read or looked up."""

    def read_now(self, node: int, offset: int, buffer: memoryview) -> int:  # noqa: ARG002
        name = self.tree.entry(node).path
        if name in FAILURES:
            raise FAILURES[name]
        buffer[: len(CONTENT)] = CONTENT
        return len(CONTENT)

    def lookup(self, directory: int, name: bytes) -> int | None:
        kind, _, rest = name.decode().partition(" ")
        if kind == "stat":
            raise FAILURES[rest]
        return super().lookup(directory, name)


def main(at: Path, told: Callable[[], None]) -> None:
    """Mount and serve until unmounted."""
    events.configure()
    digest = Digest.of(CONTENT)
    tree = Tree()
    tree.add(Manifest.of(FileEntry(digest.hex, 0, n, digest.size) for n in [*FAILURES, "well"]))
    # Beside the mount: whoever ends this process may not let it tidy up.
    spool = at.with_name(f"{at.name}-spool")
    spool.mkdir()
    statistics = Statistics()
    reader = BlobReader(
        None,
        lambda: build_store(f"file://{spool}/store"),
        spool,
        statistics,
        policy=StreamPolicy(),
    )
    ledger = ErrorLedger(spool / "errors")
    nodes = FailingNodes(tree, reader, ledger, statistics, Ownership(0, 0))
    FusepyTransport(nodes, at, "propmaster:failing", "propmaster", xattrs=False).serve(told)
    reader.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), lambda: print("ready", flush=True))
