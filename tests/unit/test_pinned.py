"""A directory that is held is the one that was meant, or there is an error."""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from agent_plugin.content.pinned import own_directory, pinned
from tests.servers.other_user import NOBODY

HOLD: list[Callable[[Path], AbstractContextManager[object]]] = [pinned, own_directory]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path.resolve() / "above" / "place"
    place.mkdir(parents=True, mode=0o700)
    return place


@pytest.mark.parametrize("hold", HOLD)
def test_a_link_in_its_place_or_above_it_is_refused(
    place: Path, hold: Callable[[Path], AbstractContextManager[object]]
) -> None:
    away = place.parent.with_name("away")
    place.parent.rename(away)
    place.parent.symlink_to(away)
    with pytest.raises(OSError, match="symbolic links"), hold(place):
        pass
    place.parent.unlink()
    place.parent.mkdir()
    place.symlink_to(away / "place")
    with pytest.raises(OSError, match="symbolic links"), hold(place):
        pass


def test_what_is_held_is_led_to_whatever_takes_its_name(place: Path) -> None:
    with pinned(place) as held:
        place.rename(place.with_name("moved"))
        place.symlink_to("/etc")
        (held / "file").write_bytes(b"")
    assert (place.with_name("moved") / "file").exists()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_what_others_could_write_is_not_ours(place: Path, mode: int) -> None:
    place.chmod(mode)
    with pytest.raises(OSError, match="not this user's alone") as caught, own_directory(place):
        pass
    assert caught.value.errno == errno.EPERM


@pytest.mark.skipif(os.geteuid() != 0, reason="giving away needs root")
def test_what_is_somebody_elses_is_not_ours(place: Path) -> None:
    os.chown(place, NOBODY, NOBODY)
    with pytest.raises(OSError, match="not this user's alone"), own_directory(place):
        pass


def test_what_is_ours_is_given(place: Path) -> None:
    with own_directory(place) as fd:
        os.mkdir("below", dir_fd=fd)
    assert (place / "below").is_dir()
