"""Regular expressions that others write, searched in names that others chose.

They have the syntax of Python's `re`. Its matcher can need hours for a few hundred characters, and
can not be stopped; so `regex` matches, which stops when it is told to. What one of them takes for
special and the other does not is refused.

Thread-safe: a pattern is immutable, but for the sum of its time, which need not be exact.
"""

import re
import time
import warnings
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PATTERN_CHARACTERS: Final = 200
# A name has at most some thousand characters, which takes microseconds; a pattern that backtracks
# without end needs many powers of ten more, so that a busy machine is no matter.
MAX_SEARCH_SECONDS: Final = 2.0
MAX_TOTAL_SECONDS: Final = 60.0

# `regex` reads `(?:…){e<=1}` as "about the same as", `re` as text.
_BRACE: Final = re.compile(r"(?:\\.|[^\\{]|\{\d*,?\d*\})*+\{", re.DOTALL)


class PatternInvalidError(ValueError):
    """A pattern is no regular expression, or not one that may be used; says why."""


class PatternTooSlowError(ValueError):
    """A search took too long and was given up."""


class Pattern:
    """A regular expression with bounded time.

    Args:
        text: In the syntax of `re`, at most MAX_PATTERN_CHARACTERS.
        anchored: Whether all of a name has to match, and not any part of it.
        ignore_case: Whether the case of letters makes no difference.

    Raises:
        PatternInvalidError: It can not be used.
    """

    def __init__(self, text: str, *, anchored: bool = False, ignore_case: bool = False) -> None:
        _check(text)
        # Loaded here: 40 ms that only a source with a pattern needs.
        import regex  # noqa: PLC0415

        try:
            flags = regex.VERSION0 | (regex.IGNORECASE if ignore_case else 0)
            compiled = regex.compile(text, flags)
        except (regex.error, OverflowError, RecursionError) as error:
            raise PatternInvalidError(f"no regular expression: {error}") from error
        self.text = text
        self._search: Callable[..., re.Match[str] | None] = (
            compiled.fullmatch if anchored else compiled.search
        )
        self._seconds = 0.0

    def search(self, name: str) -> "re.Match[str] | None":
        """Return the first match in a name, or None.

        Raises:
            PatternTooSlowError: It took MAX_SEARCH_SECONDS, or all searches together
                MAX_TOTAL_SECONDS.
        """
        begun = time.monotonic()
        try:
            found = self._search(name, timeout=MAX_SEARCH_SECONDS)
        except TimeoutError as error:
            raise PatternTooSlowError(
                f"{self.text!r} was not done with {name[:100]!r} after {MAX_SEARCH_SECONDS:g} s"
            ) from error
        self._seconds += time.monotonic() - begun
        if self._seconds > MAX_TOTAL_SECONDS:
            raise PatternTooSlowError(f"{self.text!r} took more than {MAX_TOTAL_SECONDS:g} s")
        return found


def _check(text: str) -> None:
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise PatternInvalidError(f"{len(text)} characters are more than {MAX_PATTERN_CHARACTERS}")
    try:
        with warnings.catch_warnings():
            # Of what may mean something else one day, `[[` for example.
            warnings.simplefilter("error", FutureWarning)
            re.compile(text)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise PatternInvalidError(f"no regular expression: {error}") from error
    if _BRACE.match(text):
        raise PatternInvalidError("a brace that is no repetition has to be written as \\{")
