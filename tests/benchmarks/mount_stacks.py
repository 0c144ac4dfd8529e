"""What the mount benchmark compares: the same files on ext4, and through mounts of every kind."""

import contextlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.content.mount_table import unmount
from agent_plugin.content.parts import write_all
from tests.benchmarks.datasets import MIB
from tests.benchmarks.farm import Farm
from tests.servers.worker_session import Propmaster

MTIME_US = 1_700_000_000_000_000
# What no benchmark reaches; the default is a part of the disk, which others may have filled.
CACHE_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Stack:
    """One way of mounting.

    Attributes:
        name: The peer, as the results call it.
        transport, writes: As `propmaster mount` takes them.
        passthrough: The setting `mounts.passthrough`.
    """

    name: str
    transport: str = "kernel"
    writes: str = "none"
    passthrough: str = "off"


PASSTHROUGH = Stack("kernel, passthrough", passthrough="on")
PASSTHROUGH_OVERLAYFS = Stack("kernel, passthrough, overlayfs", "kernel", "overlayfs", "on")
NO_OPEN = Stack("kernel, no-open")
NO_OPEN_OVERLAYFS = Stack("kernel, no-open, overlayfs", "kernel", "overlayfs")
OVERLAY = Stack("kernel, overlay", "kernel", "overlay")
FUSEPY = Stack("fusepy", "fusepy")
BINDFS = "bindfs"
PLAIN_OVERLAYFS = "overlayfs over ext4"


@dataclass(frozen=True, slots=True)
class View:
    """Where the files of a tree can be read: on ext4, or through a mount.

    Attributes:
        root: A directory.
        names: Paths below it; the n-th is the same file in every view of the tree.
    """

    root: Path
    names: tuple[str, ...]

    def paths(self) -> list[Path]:
        """Return the paths of all files, absolute."""
        return [self.root / name for name in self.names]

    def listed(self, at: Path, count: int) -> Path:
        """Write a file that names some files, a line each, the same ones for every view."""
        chosen = random.Random("order").sample(range(len(self.names)), count)
        at.write_text("".join(f"{self.names[number]}\n" for number in chosen))
        return at


@dataclass(frozen=True, slots=True)
class Tree:
    """Files on ext4, and the manifest of the same files.

    Attributes:
        native: On ext4.
        manifest: The manifest's file.
        names: The paths in it, parallel to those of `native`.
        sizes: Of the files, in bytes.
    """

    native: View
    manifest: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]


class MountHost:
    """A host with `propmaster`, its blob cache, and mounts of trees.

    Args:
        farm: The scratch directory.
    """

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._store_url = f"file://{farm.fresh('store')}"
        Path(self._store_url.removeprefix("file://")).mkdir()
        self._home = farm.fresh("home")
        self._propmaster = Propmaster(aws={}, home=self._home)

    def cached_tree(self, name: str, files: Sequence[tuple[str, int]]) -> Tree:
        """Make files of random bytes as blobs in the cache, which are the native tree as well.

        So both sides of a comparison read the same blocks of the same disk.

        Args:
            name: The tree's.
            files: Relative paths and sizes in bytes, 1 or more.
        """
        generator = random.Random(name)
        entries: list[FileEntry] = []
        blobs: list[Path] = []
        with BlobCache.open(
            self._home / "cache", store_url=self._store_url, max_bytes=CACHE_BYTES, min_free_bytes=0
        ) as cache:
            for path, size in files:
                digest = _add(cache, generator, size)
                entries.append(FileEntry(digest.hex, MTIME_US, path, size))
                blobs.append(_path_of(cache, digest))
        # Blobs are in directories of their first digits, all of them in one.
        above = blobs[0].parents[1]
        native = View(above, tuple(os.fspath(blob.relative_to(above)) for blob in blobs))
        return self.tree(name, native, entries)

    def tree(self, name: str, native: View, entries: Sequence[FileEntry]) -> Tree:
        """Return a tree of these entries, parallel to the names of `native`."""
        manifest = self._farm.fresh(f"{name}.manifest")
        manifest.write_bytes(encode(Manifest.of(entries)))
        paths = tuple(entry.path for entry in entries)
        return Tree(native, manifest, paths, tuple(entry.size for entry in entries))

    @contextlib.contextmanager
    def mounted(self, stack: Stack, tree: Tree) -> Iterator[View]:
        """Mount a tree; yield it as it is there."""
        at = self._farm.fresh("mount")
        self.mount(stack, tree.manifest, at)
        try:
            yield View(at, tree.names)
        finally:
            self.unmount(at)

    def mount(self, stack: Stack, manifest: Path, at: Path) -> dict[str, Any]:
        """Mount and return what the command prints."""
        config = at.with_name(f"{at.name}.toml")
        # The blobs that `cached_tree` makes are nobody's in particular.
        cache = "[cache]\nshared_between_queues = true\n"
        config.write_text(f'[mounts]\npassthrough = "{stack.passthrough}"\n{cache}')
        arguments = ["--transport", stack.transport, "--writes", stack.writes]
        if stack.writes != "none":
            arguments += ["--work-dir", str(at.with_name(f"{at.name}-work"))]
        arguments += ["--store", self._store_url, "--config", str(config)]
        owner = ["--owner-pid", str(os.getpid())]
        printed = self._propmaster.run("mount", manifest, at, *arguments, *owner)
        ready: dict[str, Any] = json.loads(printed)
        return ready

    def unmount(self, at: Path) -> None:
        """End a mount."""
        self._propmaster.run("unmount", at)


@contextlib.contextmanager
def bound(farm: Farm, tree: Tree) -> Iterator[View]:
    """Mount what is on ext4 with bindfs; yield it as it is there."""
    at = farm.fresh("bindfs")
    at.mkdir()
    subprocess.run([BINDFS, "-r", tree.native.root, at], check=True)
    try:
        yield View(at, tree.native.names)
    finally:
        unmount(at)


@contextlib.contextmanager
def plain_overlay(farm: Farm) -> Iterator[View]:
    """Mount overlayfs with nothing of ours below it; yield it, empty."""
    place = farm.fresh("plain")
    for name in ("lower", "upper", "work", "mount"):
        (place / name).mkdir(parents=True)
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    at = place / "mount"
    subprocess.run(["mount", "-t", "overlay", "plain", "-o", options, at], check=True)
    try:
        yield View(at, ())
    finally:
        unmount(at)


def missing_peer() -> str:
    """Return why bindfs can not be measured, empty if it can."""
    return "" if shutil.which(BINDFS) else "bindfs is not installed"


def _add(cache: BlobCache, generator: random.Random, size: int) -> Digest:
    if size <= MIB:
        data = generator.randbytes(size)
        digest = Digest.of(data)
        cache.add(digest, data)
        return digest
    pieces = [generator.randbytes(MIB) for _ in range(size // MIB)]
    digest = Digest.of(*pieces)
    with cache.staging(size) as staged:
        for at, piece in enumerate(pieces):
            write_all(staged.fd, piece, at * MIB)
        staged.publish(digest)
    return digest


def _path_of(cache: BlobCache, digest: Digest) -> Path:
    fd = cache.open_blob(digest)
    if fd is None:
        raise FileNotFoundError(f"{digest} is not in the cache")
    try:
        return Path(f"/proc/self/fd/{fd}").readlink()
    finally:
        os.close(fd)
