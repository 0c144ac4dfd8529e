"""Files that arrive together: what comes in between stays, and then none of them has moved."""

import os
from collections import UserDict
from collections.abc import Callable, ItemsView
from pathlib import Path

import pytest

from agent_plugin.content.errors import PathClashError, ResultClashError
from agent_plugin.content.rename import Place, rename_new, rename_new_by_link
from agent_plugin.publish.arrival import arriving


class _Meanwhile(UserDict[str, str]):
    """Moves before which somebody writes a file: after all looks, before the first rename."""

    def __init__(self, moves: dict[str, str], write: Callable[[], object]) -> None:
        super().__init__(moves)
        self._write = write

    def items(self) -> ItemsView[str, str]:
        self._write()
        return super().items()


def _contents(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_o7_what_comes_between_the_look_and_the_move_stays_and_nothing_has_moved(
    tmp_path: Path,
) -> None:
    """Seen to fail when the move replaces, and when what was moved before it is not moved back."""
    to = tmp_path / "to"
    (to / "there").mkdir(parents=True)
    moves = {"a/b/1": "1", "there/2": "2", "3": "3"}

    with arriving(to) as arrival:
        for name in moves.values():
            (arrival.hidden / name).write_text("new")
        meanwhile = _Meanwhile(moves, lambda: (to / "3").write_text("somebody's"))
        with pytest.raises(ResultClashError, match="3: something else is there"):
            arrival.move_in(meanwhile, overwrite=False)

        assert _contents(arrival.hidden) == {"1": "new", "2": "new", "3": "new"}
        arrival.remove()
    assert _contents(to) == {"3": "somebody's"}
    assert [path.name for path in to.iterdir() if path.is_dir()] == ["there"]


@pytest.mark.parametrize("is_directory", [False, True])
def test_o7_a_directory_that_comes_to_the_place_of_a_new_one_stays(
    tmp_path: Path, is_directory: bool
) -> None:
    """An empty directory too, which rename(2) replaces: seen to fail with that."""
    to = tmp_path / "to"
    with arriving(to) as arrival:
        (arrival.hidden / "1").write_text("new")
        if is_directory:
            to.mkdir()
        else:
            to.write_text("somebody's")
        with pytest.raises(PathClashError, match="has come into being meanwhile"):
            arrival.reveal()
        arrival.remove()

    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    assert list(to.iterdir()) == [] if is_directory else to.read_text() == "somebody's"


@pytest.mark.parametrize("rename", [rename_new, rename_new_by_link])
@pytest.mark.parametrize("what", ["file", "link", "directory"])
def test_o7_a_new_name_is_nobodys_with_and_without_the_kernels_help(
    tmp_path: Path, rename: Callable[[Place, Place], None], what: str
) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        (tmp_path / "taken").symlink_to("nowhere")
        if what == "directory":
            (tmp_path / "old").mkdir()
        elif what == "link":
            (tmp_path / "old").symlink_to("somewhere")
        else:
            (tmp_path / "old").write_text("x")

        with pytest.raises(FileExistsError):
            rename((fd, "old"), (fd, "taken"))
        rename((fd, "old"), (fd, "new"))
    finally:
        os.close(fd)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "taken"]
    assert (tmp_path / "taken").is_symlink()
