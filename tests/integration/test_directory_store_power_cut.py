"""What of a store in a directory is on the disk, as a power cut would show."""

import os
import shutil
from pathlib import Path

import pytest

from agent_plugin.content import directory_files
from agent_plugin.content.digest import Digest
from agent_plugin.content.directory_store import DirectoryStore
from tests.servers.disks import image_mounted

BLOBS = [os.urandom(20_000) for _ in range(3)]


@pytest.mark.parametrize("how", ["unnamed", "named"])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_with_a_document_the_disk_has_the_blobs_that_were_put_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    """A disk's image is copied as it is at that moment, and mounted as after a power cut.

    Blobs and documents are on two file systems, since syncing one name of most of them happens to
    sync all names before.
    """
    if how == "named":
        # As a kernel answers that does not know files without names: EISDIR.
        monkeypatch.setattr(directory_files, "_UNNAMED", os.O_RDWR | os.O_DIRECTORY)
    root = tmp_path / "store"
    disk, cut_off = tmp_path / "disk", tmp_path / "cut off"
    with image_mounted(kind, disk, root / "Data"):
        store = DirectoryStore(root)
        for blob in BLOBS:
            store.put(Digest.of(blob), blob)
        store.put_document("a/b", b"{}", {})
        shutil.copyfile(disk, cut_off)
    with image_mounted(kind, cut_off, root / "Data"):
        for blob in BLOBS:
            assert store.get(Digest.of(blob)) == blob
