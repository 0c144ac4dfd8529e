"""`mimeapps.list` is changed where it has to be, and to the byte nowhere else."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_plugin.mime_apps import Defaults

KIND = "x-scheme-handler/deadline"
OURS = "ours.desktop"

LINES = st.sampled_from(
    [
        b"[Default Applications]\n",
        b"[Added Associations]\n",
        b"[Default Applications]\r\n",
        b"x-scheme-handler/deadline=theirs.desktop;\n",
        b"x-scheme-handler/deadline=theirs.desktop;other.desktop\r\n",
        b"x-scheme-handler/deadline = theirs.desktop\n",
        b"x-scheme-handler/deadlines=ours.desktop;\n",
        b"text/html=firefox.desktop;\n",
        b"# a comment\n",
        b"\n",
        b"\xff\xfe no UTF-8\n",
        b"text/plain=vim.desktop",
    ]
)
FILES = st.lists(LINES, max_size=10).map(b"".join)


@given(FILES)
@example(b"")
@example(b"[Default Applications]\nx-scheme-handler/deadline=theirs.desktop")
def test_our_line_comes_and_all_others_stay_in_their_order(data: bytes) -> None:
    """Seen to fail when a line of another group is taken, and when a last line gets no end."""
    changed = Defaults(data).preferring(KIND, OURS)

    assert Defaults(changed).first(KIND) == OURS
    assert Defaults(changed).names(KIND)[1:] == [
        name for name in Defaults(data).names(KIND) if name != OURS
    ]
    assert Defaults(changed).preferring(KIND, OURS) == changed
    old, new = data.splitlines(), changed.splitlines()
    ours = f"{KIND}={OURS};".encode()
    rest = [line for line in new if not line.startswith(ours)]
    line = Defaults(data).line(KIND)
    if line is not None:
        replaced = line.rstrip(b"\r\n")
        assert any(rest == old[:at] + old[at + 1 :] for at in _all(old, replaced))
    elif b"[Default Applications]" in [each.strip() for each in old]:
        assert rest == old
    else:
        assert rest == [*old, b"[Default Applications]"]


def _all(lines: list[bytes], line: bytes) -> list[int]:
    return [at for at, each in enumerate(lines) if each == line]


@given(FILES)
def test_taking_our_entry_out_again_leaves_what_was_there(data: bytes) -> None:
    """Seen to fail when the line is removed that was another's before."""
    changed = Defaults(data).preferring(KIND, OURS)

    undone = Defaults(changed).without(KIND, OURS, Defaults(data))

    assert Defaults(undone).names(KIND) == Defaults(data).names(KIND)
    kept = [line for line in undone.splitlines() if line.strip() != b"[Default Applications]"]
    assert kept == [line for line in data.splitlines() if line.strip() != b"[Default Applications]"]


def test_what_a_user_has_chosen_since_stays_the_choice() -> None:
    before = b"[Default Applications]\nx-scheme-handler/deadline=theirs.desktop;\n"
    since = b"[Default Applications]\nx-scheme-handler/deadline=new.desktop;ours.desktop;\n"

    undone = Defaults(since).without(KIND, OURS, Defaults(before))

    assert undone == b"[Default Applications]\nx-scheme-handler/deadline=new.desktop;\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x-scheme-handler/deadline=a.desktop\n",
        b"[Default Applications]\n[Added Associations]\nx-scheme-handler/deadline=a.desktop\n",
    ],
)
def test_a_file_without_defaults_has_none(data: bytes) -> None:
    assert (Defaults(data).first(KIND), Defaults(data).line(KIND)) == ("", None)
