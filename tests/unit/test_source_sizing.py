"""Whether a source fits is known before its first byte is fetched."""

import pytest

from agent_plugin.content.errors import NoSpaceError
from agent_plugin.sources.sizing import Placement, Wished, fit

FREE = 1000
RESERVE = 100


@pytest.mark.parametrize(
    ("wished", "needed", "file_system", "reason"),
    [
        ("COPIED", 0, "COPIED", ""),
        ("COPIED", 900, "COPIED", ""),
        ("AUTO", 900, "COPIED", ""),
        ("AUTO", 901, "VIRTUAL", "901 bytes do not fit where 1000 are free"),
        ("VIRTUAL", 1, "VIRTUAL", ""),
        ("VIRTUAL", 10**15, "VIRTUAL", ""),
    ],
)
def test_s7_what_does_not_fit_is_mounted_if_that_may_be_chosen(
    wished: Wished, needed: int, file_system: str, reason: str
) -> None:
    placement = fit(wished, needed, free=FREE, reserve=RESERVE, where="/sessions")

    assert placement == Placement(file_system, reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wished", "obstacle", "also"),
    [
        ("COPIED", "", ""),
        ("COPIED", "there is no /dev/fuse", ""),
        (
            "AUTO",
            "there is no /dev/fuse",
            "; nothing can be mounted instead: there is no /dev/fuse",
        ),
    ],
)
def test_s7_what_has_to_be_copied_and_does_not_fit_is_refused(
    wished: Wished, obstacle: str, also: str
) -> None:
    with pytest.raises(NoSpaceError) as caught:
        fit(wished, 901, free=FREE, reserve=RESERVE, where="/sessions", obstacle=obstacle)

    assert caught.value.code == "E_NO_SPACE"
    assert caught.value.message == (
        "/sessions: 901 bytes are needed and 1000 are free, of which 100 are to be left" + also
    )


def test_s7_a_full_disk_has_room_for_nothing_at_all() -> None:
    assert fit("COPIED", 0, free=0, reserve=RESERVE, where="/x").file_system == "COPIED"
