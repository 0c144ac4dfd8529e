"""Small files of ours are replaced whole."""

import os
import stat
from pathlib import Path

import pytest

from agent_plugin.content.errors import LocalWriteError, PathClashError
from agent_plugin.content.private_file import replace_private_file


def test_a_file_is_made_and_replaced_and_is_ours_alone(tmp_path: Path) -> None:
    """Seen to fail with mode 0644, and when what is there is written to."""
    path = tmp_path / "file.json"
    replace_private_file(path, b"first, and longer")
    with path.open("rb") as reader:
        replace_private_file(path, b"second")

        assert reader.read() == b"first, and longer", "who reads it goes on with what was there"
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file.json"]  # noqa: PTH208 - names


def test_what_can_not_be_written_leaves_all_as_it_was(tmp_path: Path) -> None:
    """Seen to fail when the new file is not removed."""
    (tmp_path / "taken").mkdir()

    with pytest.raises(PathClashError, match="taken"):
        replace_private_file(tmp_path / "taken", b"x")
    with pytest.raises(LocalWriteError, match="absent/file"):
        replace_private_file(tmp_path / "absent/file", b"x")

    assert os.listdir(tmp_path) == ["taken"]  # noqa: PTH208 - names


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"somebody's")
    (tmp_path / "file").symlink_to("elsewhere")

    replace_private_file(tmp_path / "file", b"ours")

    assert (tmp_path / "elsewhere").read_bytes() == b"somebody's"
    assert not (tmp_path / "file").is_symlink()


def test_what_has_to_last_is_on_the_disk_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail without either of the two, and when the file is synced after its rename."""
    path = tmp_path / "file"
    seen: list[tuple[bool, bool]] = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        seen.append((stat.S_ISDIR(os.fstat(fd).st_mode), path.exists()))
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    replace_private_file(path, b"passing")
    path.unlink()
    assert seen == []

    replace_private_file(path, b"lasting", durable=True)

    assert seen == [(False, False), (True, True)]
