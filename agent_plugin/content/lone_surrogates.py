r"""JSON with lone surrogates, for a parser that refuses them.

Names on Linux that are not UTF-8 stand in JSON as `\udc80` to `\udcff`. The json module reads that
and msgspec does not; but json would build whatever a hostile document holds before anyone can look
at it. So `mark` rewrites the document for msgspec, and `unmark` gives each string back as it was.
"""

import re
from typing import Final

# The mark and a surrogate's four hexadecimal digits stand for the surrogate; the mark and four
# zeros for itself. It is the last code point but two, for private use, and so rare.
MARK: Final = "\U0010fffd"
_MARK_ESCAPE: Final = rb"\udbff\udffd"
_ITSELF: Final = "0000"
_MARKED: Final = re.compile(MARK + "([0-9a-f]{4})")
# Marks, surrogate pairs, lone surrogates and all other escapes: a search that takes each of them
# whole never starts in the middle of one.
_ESCAPES: Final = re.compile(
    rb"(?P<mark>\\u[dD][bB][fF]{2}\\u[dD][fF]{2}[dD]|\xf4\x8f\xbf\xbd)"
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|\\u(?P<lone>[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\.",
    re.DOTALL,
)


def mark(document: bytes) -> bytes:
    """Return JSON with a mark in place of each lone surrogate; of the same validity otherwise."""
    return _ESCAPES.sub(_mark_one, document)


def _mark_one(escape: re.Match[bytes]) -> bytes:
    if escape["mark"]:
        return _MARK_ESCAPE + _ITSELF.encode()
    if lone := escape["lone"]:
        return _MARK_ESCAPE + lone.lower()
    return escape[0]


def unmark(text: str) -> str:
    """Return the string that stood in a document before it was marked."""
    return _MARKED.sub(_unmark_one, text) if MARK in text else text


def _unmark_one(marked: re.Match[str]) -> str:
    return MARK if marked[1] == _ITSELF else chr(int(marked[1], 16))
