"""What is to be mounted, and what of the host's disks a mount may use."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import LocalReadError, ManifestInvalidError
from agent_plugin.content.manifest import MAX_MANIFEST_BYTES, Manifest, encode
from agent_plugin.content.mount_spec import Layer

_COPIED_AT_ONCE: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """A manifest that only the mount's process looks into: that it is one turns out there.

    Attributes:
        fd: The file, open; all of it counts.
        name: What it is called in messages.
    """

    fd: int
    name: str


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What is to be mounted.

    Attributes:
        manifest: The tree.
        mountpoint: An existing, empty directory.
        work_dir: Where writes go: made here, on a local disk.
        writes: As MountSpec has it.
        writes_reason: Why.
        uid, gid: Whose the files are.
        owner_pid: The process without which the mount goes away; 0 for none.
        layers: What was added to the last mount with this work directory.
        gives_back: As MountSpec has it.
        session: The key of the session that it is for; empty if it is for none.
        snapshot: As MountSpec has it.
        strict: Verify all of a file before any of it is read, whatever else is so.
    """

    manifest: Manifest | ManifestFile
    mountpoint: Path
    work_dir: Path
    store_url: str
    account_id: str
    writes: str
    uid: int
    gid: int
    owner_pid: int = 0
    layers: Sequence[Layer] = ()
    writes_reason: str = ""
    gives_back: bool = False
    session: str = ""
    snapshot: str = ""
    strict: bool = False


@dataclass(frozen=True, slots=True)
class CachePlace:
    """The blob cache that mounts use, as BlobCache.open takes it; sizes in bytes."""

    directory: Path
    max_bytes: int
    min_free_bytes: int
    shared: bool
    scope: str = ""


@dataclass(frozen=True, slots=True)
class SpoolPlace:
    """What a mount may take of a disk for what was read and the cache does not take; in bytes.

    Attributes:
        max_bytes: The most; 0 for no limit.
        min_free_bytes: What the disk is left, as far as keeping less does it.
    """

    max_bytes: int = 0
    min_free_bytes: int = 0


def called(manifest: Manifest | ManifestFile) -> str:
    """Return what a manifest is called in messages; empty for its own path."""
    return manifest.name if isinstance(manifest, ManifestFile) else ""


def keep_manifest(manifest: Manifest | ManifestFile, path: Path) -> None:
    """Keep what is mounted, for servers to come.

    Raises:
        ManifestInvalidError: The file is larger than any manifest.
        LocalReadError: It can not be read.
        OSError: It can not be kept.
    """
    path.touch(mode=0o600)
    if isinstance(manifest, Manifest):
        path.write_bytes(encode(manifest))
        return
    size = os.fstat(manifest.fd).st_size
    if size > MAX_MANIFEST_BYTES:
        raise ManifestInvalidError(
            f"{manifest.name}: {size} bytes are more than {MAX_MANIFEST_BYTES}"
        )
    with path.open("wb") as file:
        for offset in range(0, size, _COPIED_AT_ONCE):
            try:
                data = os.pread(manifest.fd, _COPIED_AT_ONCE, offset)
            except OSError as error:
                raise LocalReadError(f"{manifest.name}: {error.strerror}") from error
            file.write(data)
