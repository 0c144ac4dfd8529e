"""VIRTUAL: mounts against ext4 on the same files, how soon they are ready, and what moves.

Each ratio is of a run through a mount and the runs on ext4 right before and after it. bindfs, which
mirrors a directory in C, stands beside ours where it is strong: at names and small files.
"""

import functools
import os
from collections.abc import Iterator

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry
from tests.benchmarks.bench_manifest import make_million
from tests.benchmarks.farm import Farm, open_farm
from tests.benchmarks.file_client import FileClient, Operation
from tests.benchmarks.mount_reads import MANY_FILES, Reading, Trees, make_trees
from tests.benchmarks.mount_session import diff_lines, lazy_lines
from tests.benchmarks.mount_stacks import (
    BINDFS,
    FUSEPY,
    MTIME_US,
    NO_OPEN,
    NO_OPEN_OVERLAYFS,
    OVERLAY,
    PASSTHROUGH,
    PASSTHROUGH_OVERLAYFS,
    PLAIN_OVERLAYFS,
    MountHost,
    Tree,
    View,
    bound,
    missing_peer,
    plain_overlay,
)
from tests.benchmarks.mount_start import ready_lines
from tests.benchmarks.mount_writes import Writing

# What of each is measured: `large`, `small` and `names` are methods of Reading.
READ = (
    (PASSTHROUGH, ("large",)),
    (PASSTHROUGH_OVERLAYFS, ("large",)),
    (NO_OPEN, ("names", "small", "large")),
    (NO_OPEN_OVERLAYFS, ("names", "small")),
    (OVERLAY, ("small",)),
    (FUSEPY, ("names", "small", "large")),
)
WRITTEN = (NO_OPEN_OVERLAYFS, OVERLAY)


def run(only: str = "") -> Iterator[dict[str, object]]:
    """Yield the results; of one peer alone if it is named, and then only of reading and writing."""
    with open_farm() as farm:
        client = FileClient(farm.fresh("client"))
        host = MountHost(farm)
        trees = make_trees(host, _many(farm, host, client))
        # From here on what is read is on the disk, so that it can be dropped from memory.
        os.sync()
        for stack, parts in READ:
            if only not in ("", stack.name):
                continue
            mounting = functools.partial(host.mounted, stack)
            reading = Reading(stack.name, mounting, trees, client, farm)
            for part in parts:
                yield from getattr(reading, part)()
        if only in ("", BINDFS):
            yield from _bindfs(farm, trees, client)
        for stack in WRITTEN:
            if only not in ("", stack.name):
                continue
            written = functools.partial(host.mounted, stack, trees.small)
            yield from Writing(stack.name, written, client, farm).lines()
        if only in ("", PLAIN_OVERLAYFS):
            plain = functools.partial(plain_overlay, farm)
            yield from Writing(PLAIN_OVERLAYFS, plain, client, farm).lines()
        if only:
            return
        million = farm.fresh("million.manifest")
        make_million(million)
        manifests = {"100,000 files": trees.many.manifest, "1,000,000 files": million}
        yield from ready_lines(farm, host, NO_OPEN, manifests)
        yield from lazy_lines(farm, client)
        yield from diff_lines(farm, trees.many.native.root)


def _bindfs(farm: Farm, trees: Trees, client: FileClient) -> Iterator[dict[str, object]]:
    if reason := missing_peer():
        yield {"bench": "mount", "peer": BINDFS, "skipped": reason}
        return
    reading = Reading(BINDFS, functools.partial(bound, farm), trees, client, farm)
    yield from reading.names()
    yield from reading.small()


def _many(farm: Farm, host: MountHost, client: FileClient) -> Tree:
    native = farm.fresh("many")
    native.mkdir()
    client.seconds(Operation("create", (str(MANY_FILES), "64")), native, moved=MANY_FILES)
    # What the client writes.
    digest = Digest.of(b"\1" * 64)
    names = [f"{at // 100:04}/{at:06}.bin" for at in range(MANY_FILES)]
    entries = [FileEntry(digest.hex, MTIME_US, name, digest.size) for name in names]
    return host.tree("many", View(native, tuple(names)), entries)
