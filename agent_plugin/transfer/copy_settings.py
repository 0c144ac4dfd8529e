"""What a copying transfer is told besides where from and where to: the ledger's `settings`.

A pattern names what the last component of a source has to be, in any case: `w`, `*w`, `w*`, `*w*`,
`a*b`, or `re('…')` for an expression that is searched for. What `include` names is copied, whatever
`exclude` says; what `exclude` names is not; the rest is, unless there are only patterns to include.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Self

import msgspec
from msgspec import Meta

from agent_plugin.content.errors import JobInvalidError
from agent_plugin.content.objects import ObjectAccess
from agent_plugin.content.pattern import (
    MAX_PATTERN_CHARACTERS,
    Pattern,
    PatternInvalidError,
    PatternTooSlowError,
)

_EXPRESSION: Final = re.compile(r"""re\((['"])(.*)\1\)""", re.DOTALL)


class AccessSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How objects are reached; see ObjectAccess."""

    endpoint: str = ""
    region: str = ""
    profile: str = ""
    anonymous: bool = False

    @property
    def access(self) -> ObjectAccess:
        """The same for the store."""
        return ObjectAccess(self.endpoint, self.region, self.profile, self.anonymous)


class CopySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a copying transfer is told.

    Attributes:
        source, destination: How objects are reached there.
        include, exclude: Patterns of names.
        ignore_existing: Whether a task whose destination is there counts as done.
        overwrite: Whether what is at a destination may be replaced.
        stream: Whether objects go through this host also where the store could copy them.
        speed_limit: Bytes a second that come here or go from here; 0 for none.
        max_tries: How often a task is tried whose error may pass.
    """

    source: AccessSettings = AccessSettings()
    destination: AccessSettings = AccessSettings()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ignore_existing: bool = False
    overwrite: bool = True
    stream: bool = False
    speed_limit: Annotated[int, Meta(ge=0)] = 0
    max_tries: Annotated[int, Meta(ge=1, le=100)] = 6

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Return what the ledger has of a transfer.

        Raises:
            JobInvalidError: Something in it is unknown or not allowed.
        """
        try:
            settings = msgspec.convert(document, cls)
        except msgspec.ValidationError as error:
            raise JobInvalidError(
                f"the settings of a transfer: {error}",
                hint=f"What can be set: {', '.join(cls.__struct_encode_fields__)}.",
            ) from error
        # Refused here, and not when the first task is looked at.
        settings.names  # noqa: B018 - see above
        return settings

    def document(self) -> dict[str, Any]:
        """Return what `read` is given."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document

    @property
    def names(self) -> "NameFilter":
        """Which names are copied."""
        return NameFilter(self.include, self.exclude)


class NameFilter:
    """Decides by its name whether something is copied.

    Args:
        include, exclude: Patterns.

    Raises:
        JobInvalidError: One of them is none.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include = [_matching(pattern) for pattern in include]
        self._exclude = [_matching(pattern) for pattern in exclude]

    def admits(self, source: str) -> bool:
        """Return whether what a path or URL leads to is copied.

        Raises:
            JobInvalidError: A pattern takes too long to be searched for.
        """
        if not self._include and not self._exclude:
            return True
        name = source.rstrip("/").rpartition("/")[2]
        try:
            if any(matches(name) for matches in self._include):
                return True
            if any(matches(name) for matches in self._exclude):
                return False
        except PatternTooSlowError as error:
            raise JobInvalidError(
                f"a pattern of the transfer: {error}", hint="Write it without nested repetitions."
            ) from error
        return not self._include or bool(self._exclude)


def _matching(pattern: str) -> Callable[[str], bool]:
    """Return what decides whether a name is as a pattern says."""
    if not 0 < len(pattern) <= MAX_PATTERN_CHARACTERS:
        raise JobInvalidError(
            f"{pattern[:60]!r} is no pattern of names",
            hint=f"A pattern has 1 to {MAX_PATTERN_CHARACTERS} characters.",
        )
    expression = _EXPRESSION.fullmatch(pattern)
    if expression is None:
        # Only the asterisk means something; what fnmatch makes of several needs no backtracking.
        literal = pattern.replace("[", "[[]").replace("?", "[?]")
        name_of = re.compile(fnmatch.translate(literal), re.IGNORECASE)
        return lambda name: name_of.match(name) is not None
    try:
        searched = Pattern(expression[2], ignore_case=True)
    except PatternInvalidError as error:
        raise JobInvalidError(f"{pattern!r}: {error}", hint="Correct it.") from error
    return lambda name: searched.search(name) is not None
