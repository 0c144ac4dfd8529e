r"""JSON with lone surrogates, for a parser that refuses them.

Names on Linux that are not UTF-8 stand in JSON as `\udc80` to `\udcff`. The json module reads that
and msgspec does not; but json would build whatever a hostile document holds before anyone can look
at it. So `mark` rewrites the document for msgspec, and `unmark` gives each string back as it was.

A hostile document may consist of escapes and be as large as it may be. So nothing here is done
escape by escape in Python, and what the work needs besides its result is that of one slice.
"""

import json
import re
import threading
from collections.abc import Iterator
from typing import Final, TypeVar

import msgspec

# The mark and a surrogate's four hexadecimal digits stand for the surrogate; the mark and four
# zeros for itself. It is the last code point but two, for private use, and so rare.
MARK: Final = "\U0010fffd"
_MARK_UTF8: Final = MARK.encode()
_ITSELF: Final = "0000"
_ITSELF_UTF8: Final = _MARK_UTF8 + _ITSELF.encode()
_MARKED_CHARACTERS: Final = len(MARK) + len(_ITSELF)

_MARK_ESCAPE: Final = re.compile(rb"\\u[dD][bB][fF]{2}\\u[dD][fF]{2}[dD]")
# The `\u` of a high surrogate that no low one follows, or of a low one that follows no high one.
# To be looked for where each backslash begins an escape.
_LONE: Final = re.compile(
    rb"\\u(?=[dD](?:"
    rb"[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2}"
    rb"))"
)
# At the end of a slice: a high surrogate, whose low one may follow; half an escape; half the mark.
_UNFINISHED: Final = re.compile(
    rb"(?:\\u[dD][89abAB][0-9a-fA-F]{2})?(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z|\xf4(?:\x8f\xbf?)?\Z"
)
_UNFINISHED_BYTES: Final = 11
# A byte that is nowhere in UTF-8; takes the place of an escaped backslash.
_BACKSLASH: Final = b"\xff"
# In bytes of a document, and characters of a string. A slice full of escapes takes some 5 MiB while
# it is worked on; larger ones are no faster.
_SLICE: Final = 256 * 1024

_ONE_AT_A_TIME: Final = threading.Lock()

_Shape = TypeVar("_Shape")


class LoneSurrogateReader:
    """Decodes one document as msgspec would if it took lone surrogates.

    Args:
        document: JSON in UTF-8.

    Attributes:
        is_marked: Whether the strings in what was decoded last are to be unmarked.
    """

    def __init__(self, document: bytes) -> None:
        self._document: bytes | bytearray = document
        self.is_marked = False

    def decode(self, shape: type[_Shape]) -> _Shape:
        """Return the document, or those parts of it that the shape has.

        Raises:
            msgspec.ValidationError: It has not got the shape.
            msgspec.DecodeError, UnicodeDecodeError, RecursionError: It is no JSON in UTF-8.
        """
        try:
            return _decoder_of(shape).decode(self._document)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            if self.is_marked:
                raise
            marked = mark(self._document)
            if marked is self._document:
                raise
        self._document, self.is_marked = marked, True
        return _decoder_of(shape).decode(marked)

    def restored(self, text: str) -> str:
        """Return a string of what was decoded last as it stands in the document."""
        return unmark(text) if self.is_marked else text


def _decoder_of(shape: type[_Shape]) -> msgspec.json.Decoder[_Shape]:
    """Return a shape's decoder, made by one thread at a time.

    Documents are decoded by many threads. msgspec 0.22 builds what it knows of a type at first use,
    and a second thread that comes meanwhile uses the half that is there: the process crashes.
    """
    with _ONE_AT_A_TIME:
        return msgspec.json.Decoder(shape)


def mark(document: bytes | bytearray) -> bytes | bytearray:
    """Return JSON with a mark in place of each lone surrogate; of the same validity otherwise.

    A document without lone surrogates is returned itself, and so is one that can not be UTF-8.
    """
    if _BACKSLASH in document:
        return document
    marked = bytearray()
    lone = 0
    for piece in _slices(document):
        kept = _MARK_ESCAPE.sub(_ITSELF_UTF8, piece.replace(_MARK_UTF8, _ITSELF_UTF8))
        replaced, found = _LONE.subn(_MARK_UTF8, kept)
        lone += found
        marked += replaced.replace(_BACKSLASH, rb"\\")
    return marked if lone else document


def _slices(document: bytes | bytearray) -> Iterator[bytes]:
    """Yield a document in pieces that cut no escape, surrogate pair or mark.

    Each escaped backslash has become one byte, so that any other backslash begins an escape.
    """
    unfinished = b""
    for start in range(0, len(document), _SLICE):
        piece = unfinished + document[start : start + _SLICE]
        piece = piece.replace(rb"\\", _BACKSLASH)
        tail = _UNFINISHED.search(piece, max(0, len(piece) - _UNFINISHED_BYTES))
        end = tail.start() if tail else len(piece)
        unfinished = piece[end:]
        yield piece[:end]
    yield unfinished


def unmark(text: str) -> str:
    """Return a string of a marked document as it was before."""
    if MARK not in text:
        return text
    return "".join(map(_unmark_piece, _pieces(text)))


def _pieces(text: str) -> Iterator[str]:
    """Yield a string in pieces that keep each mark and its digits together."""
    start = 0
    while start < len(text):
        end = start + _SLICE
        if end < len(text) and (cut := text.rfind(MARK, end - _MARKED_CHARACTERS + 1, end)) > start:
            end = cut
        yield text[start:end]
        start = end


def _unmark_piece(piece: str) -> str:
    # As JSON, because its module decodes escapes at the speed of C, and takes lone surrogates.
    escaped = piece.replace("\\", r"\\").replace('"', r"\"")
    escaped = escaped.replace(MARK + _ITSELF, r"\udbff\udffd").replace(MARK, r"\u")
    text: str = json.loads(f'"{escaped}"', strict=False)
    return text
