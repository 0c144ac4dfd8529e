"""Whether a file system folds names: asked once for each, and not for each directory."""

import struct
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.transfer import folding
from agent_plugin.transfer.folding import KeptApart


def test_t4_a_device_is_tried_once_however_many_directories_files_go_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are not there yet. Seen to fail when each was tried."""
    tried: list[int] = []

    def folds_names(directory: int) -> bool:
        tried.append(directory)
        return False

    monkeypatch.setattr(folding, "folds_names", folds_names)
    (tmp_path / "there").mkdir()
    apart = KeptApart()

    folds = [apart.folds(f"{tmp_path}/{name}/") for name in ("there", "new", "new/deeper")]

    assert folds == [False] * 3
    assert len(tried) == 1


def test_t4_a_directory_that_says_that_it_folds_names_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of ext4 with `chattr +F`, which only some kernels can have.

    Seen to fail when its device's answer was taken for its own.
    """

    def ioctl(_fd: int, _request: int, _room: Any) -> bytes:
        return struct.pack("=Q", 0x40000000 | 0x80000)

    apart = KeptApart()
    assert not apart.folds(f"{tmp_path}/")
    monkeypatch.setattr("fcntl.ioctl", ioctl)

    assert apart.folds(f"{tmp_path}/new/")
    assert list(tmp_path.iterdir()) == []
