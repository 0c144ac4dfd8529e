r"""Laws of marking lone surrogates: as simple as it could be said, and as the json module reads.

Each law names the mutation of the code that it was seen to catch.
"""

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_plugin.content import lone_surrogates
from agent_plugin.content.lone_surrogates import MARK, mark, unmark

# Marks, surrogate pairs, lone surrogates and all other escapes: a search that takes each of them
# whole never starts in the middle of one.
ESCAPES = re.compile(
    rb"(?P<mark>\\u[dD][bB][fF]{2}\\u[dD][fF]{2}[dD]|\xf4\x8f\xbf\xbd)"
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|\\u(?P<lone>[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\.",
    re.DOTALL,
)

digits = st.sampled_from("0189aAfF")
escapes = st.builds("\\u{}{}{}{}".format, st.sampled_from("dD0"), digits, digits, digits)
pieces = st.one_of(
    escapes,
    st.sampled_from(
        [
            r"\udbff\udffd",
            r"\uDBFF\uDFFD",
            MARK,
            r"\udc80",
            r"\ud83d",
            r"\ud83d\ude00",
            "\U0001f600",
        ]
    ),
    st.sampled_from([r"\\", r"\"", r"\n", r"\/", "u", "d", "0000", "dc80", "x", "\u00e9"]),
)
# What no JSON has: half escapes, and escapes of something else.
broken = st.sampled_from([r"\u", r"\ud8", r"\udc8", r"\q", '"'])
strings = st.lists(pieces, max_size=12).map("".join)
texts = st.lists(pieces | broken, max_size=12).map("".join).map(str.encode)
slices = st.integers(1, 40)


def simple_mark(document: bytes) -> bytes:
    """Mark escape by escape; nothing if there is no lone surrogate."""
    found = False

    def mark_one(escape: re.Match[bytes]) -> bytes:
        nonlocal found
        if escape["mark"]:
            return MARK.encode() + b"0000"
        if escape["lone"]:
            found = True
            return MARK.encode() + escape["lone"]
        return escape[0]

    marked = ESCAPES.sub(mark_one, document)
    return marked if found else document


@given(texts, slices)
@example(rb"\ud83d\ud83d\ude00\ude00", 6)
@example(rb"\\\\\udc80\\udc80\\\ud800", 1)
@example(MARK.encode() + rb"\udc80" + MARK.encode(), 2)
@example(rb"\ud83d\udbff\udffd\udffd", 12)
def test_marking_in_slices_is_marking_escape_by_escape(text: bytes, size: int) -> None:
    r"""Caught: a pair, a mark or an escape cut in two; `\\` looked at as an escape's beginning."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lone_surrogates, "_SLICE", size)
        assert mark(text) == simple_mark(text)


@given(strings, st.integers(lone_surrogates._MARKED_CHARACTERS, 40))
@example(r"xxxx\udc80", 8)
@example(r"\ud83d\udbff\udffd\udffd", 5)
def test_what_is_marked_is_read_and_unmarked_as_the_json_module_reads_it(
    string: str, size: int
) -> None:
    """Caught: a mark and its digits cut in two; quotes not escaped; the mark left doubled."""
    document = f'"{string}x\\udc80"'.encode()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lone_surrogates, "_SLICE", size)
        assert unmark(json.loads(mark(document))) == json.loads(document)


@given(st.binary(max_size=60))
@example(rb"\udc80")
def test_what_can_not_be_utf8_is_left_alone(noise: bytes) -> None:
    """Caught: the byte that stands in for a backslash taken for one."""
    document = noise + b"\xff"

    assert mark(document) is document
