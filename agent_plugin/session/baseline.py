"""What is in a root's output directories before a task runs, by which its outputs are told."""

from pathlib import Path

from agent_plugin.content.manifest import Manifest
from agent_plugin.content.snapshot import walk
from agent_plugin.session.state import BaselineFile, RootState, SessionState
from agent_plugin.transfer.context import TransferContext


def baseline_of(
    root: RootState,
    manifest: Manifest | None,
    state: SessionState,
    context: TransferContext,
    *,
    only_known: bool,
) -> dict[str, BaselineFile]:
    """Return what is in the root's output directories now, with the manifest's hashes.

    A file that the manifest does not name (a mapped root may hold some) was there before the task
    as well; it gets no hash and counts as changed as soon as anything about it changes.
    """
    if not root.output_directories:
        return {}
    entries = manifest.by_path() if manifest is not None else {}
    baseline = {}
    for found in walk(
        Path(root.local_root),
        root.output_directories,
        follow_root=not state.owns(root),
        owner=context.owner,
        cancellation=context.cancellation,
    ):
        entry = entries.get(found.path)
        if entry is not None and (found.size, found.mtime_ns) != (entry.size, entry.mtime * 1000):
            # Somebody has written to it since it was placed, or the file system can not keep such
            # a time: content must decide, so nothing that stat() says is that of a known file.
            baseline[found.path] = BaselineFile(entry.hash, entry.size, entry.mtime, -1, -1, -1)
        elif entry is not None or not only_known:
            baseline[found.path] = BaselineFile(
                hash=entry.hash if entry else "",
                size=found.size,
                mtime=found.mtime_us,
                mtime_ns=found.mtime_ns,
                ctime_ns=found.ctime_ns,
                inode=found.inode,
            )
    return baseline
