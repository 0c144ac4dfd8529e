"""Which of several tasks takes which object: by a hash of something in its key.

The part of a key that is hashed is the object's whole key, what a regular expression finds in it, a
substring, or a date at its beginning. The hash is FNV-1a with 32 bits, modulo the number of parts;
what has no such part goes to part 0. So each object is in exactly one part, whoever asks, and the
same as with other programs that partition so. Few keys do not spread evenly.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from agent_plugin.content.errors import SourceInvalidError
from agent_plugin.content.pattern import Pattern, PatternInvalidError, PatternTooSlowError
from agent_plugin.sources.date_layout import DateLayout

NONE: Final = "none"
# Where what can not be told apart goes.
FALLBACK: Final = 0
MAX_COUNT: Final = 100_000

# http://www.isthe.com/chongo/tech/comp/fnv/
_FNV_OFFSET: Final = 0x811C9DC5
_FNV_PRIME: Final = 0x01000193
_32_BITS: Final = 0xFFFFFFFF
# ASCII's unit separator, between groups: `a`, `bc` is not `ab`, `c`.
_BETWEEN_GROUPS: Final = "\x1f"

_PARAMETER: Final = r"^[A-Za-z_][A-Za-z0-9_]{0,63}\Z"

Kind = Literal["none", "object", "regex", "substring", "date"]
Defect = tuple[str, str, str]
# Returns what of a key is hashed, given the whole key and the rest of it; None for nothing.
_PartOfKey = Callable[[str, str], str | None]


class Partition(
    msgspec.Struct, frozen=True, rename="pascal", forbid_unknown_fields=True, omit_defaults=True
):
    """How the objects of a source are shared out.

    Attributes:
        type: What is hashed; `none` for all objects in each part.
        pattern: For `regex`: what it finds in the rest of a key, by its groups if it has any.
        start_index, end_index: For `substring`: characters of the rest of a key, from 0.
        date_format: For `date`: what the rest of a key begins with, as `%Y-%m-%d` or `2006-01-02`.
        count: How many parts there are.
        index: Which one is taken, from 0; or else `index_parameter`.
        index_parameter: The task parameter that says which one, of type INT.
    """

    type: Kind = "none"
    pattern: str = ""
    start_index: int = 0
    end_index: int = 0
    date_format: str = ""
    count: Annotated[int, Meta(ge=1, le=MAX_COUNT)] | None = None
    index: Annotated[int, Meta(ge=0)] | None = None
    index_parameter: Annotated[str, Meta(pattern=_PARAMETER)] | None = None


def partition_defects(partition: Partition) -> Iterator[Defect]:
    """Yield what is wrong with a partition: the field, the reason, and what to do."""
    if partition.type == NONE:
        return
    yield from _kind_defects(partition)
    if partition.count is None:
        yield "Count", "missing", "say into how many parts the objects are shared out"
    elif partition.index is not None and partition.index >= partition.count:
        yield "Index", *_beyond(partition.index, partition.count)
    if partition.index is not None and partition.index_parameter is not None:
        yield "IndexParameter", "there is Index as well", "give one of them"
    if partition.index is None and partition.index_parameter is None:
        yield "Index", "missing, and so is IndexParameter", "say which part is taken, from 0"


def _kind_defects(partition: Partition) -> Iterator[Defect]:
    if partition.type == "regex":
        if not partition.pattern:
            yield "Pattern", "empty", "give the regular expression whose match is hashed"
            return
        try:
            Pattern(partition.pattern)
        except PatternInvalidError as error:
            yield "Pattern", str(error), "it has the syntax of Python's re"
    elif partition.type == "substring":
        if partition.start_index < 0:
            yield "StartIndex", f"{partition.start_index} is negative", "the first character is 0"
        if partition.end_index <= partition.start_index:
            yield (
                "EndIndex",
                f"{partition.end_index} is not greater than StartIndex, {partition.start_index}",
                "it is the first character that is not taken any more",
            )
    elif partition.type == "date":
        if not partition.date_format:
            yield "DateFormat", "empty", "give it as %Y-%m-%d or as 2006-01-02"
            return
        try:
            DateLayout(partition.date_format)
        except ValueError as error:
            yield "DateFormat", str(error), "give it as %Y-%m-%d or as 2006-01-02"


def _beyond(index: int, count: int) -> tuple[str, str]:
    return f"{index} is not one of the {count} parts", f"they are 0 to {count - 1}"


class Share:
    """Decides for each object whether one part has it.

    Args:
        partition: Has passed `partition_defects`; None for all objects.
        prefix: What all keys begin with, as the source says it: the rest is what is looked at.
        index: Which part, from 0; None for what the partition itself says, and for all objects
            where a task parameter says it.

    Attributes:
        count: How many parts there are.
        index: Which of them; None for all of them together.

    Raises:
        SourceInvalidError: There is no such part.
    """

    def __init__(self, partition: Partition | None, prefix: str, index: int | None = None) -> None:
        self.count = 1
        self.index: int | None = 0
        self.prefix = prefix
        if partition is None and index is not None:
            raise SourceInvalidError(
                f"there is no Partition to take part {index} of",
                hint="give the source a Partition, or take all of it",
            )
        if partition is None or partition.type == NONE or partition.count is None:
            self._part_of: _PartOfKey = _whole_key
            return
        self.count = partition.count
        self.index = partition.index if index is None else index
        if self.index is not None and not 0 <= self.index < self.count:
            reason, hint = _beyond(self.index, self.count)
            raise SourceInvalidError(f"Partition: {reason}", hint=hint)
        self._part_of = _part_of_key(partition)

    def has(self, key: str) -> bool:
        """Say whether the part has the object of a key.

        Raises:
            SourceInvalidError: The regular expression takes too long.
        """
        return self.count == 1 or self.index is None or self.part_of(key) == self.index

    def part_of(self, key: str) -> int:
        """Return which part has the object of a key.

        Raises:
            SourceInvalidError: As for `has`.
        """
        rest = key.removeprefix(self.prefix).removeprefix("/")
        part = self._part_of(key, rest)
        return FALLBACK if part is None else fnv1a_32(part.encode()) % self.count


def _part_of_key(partition: Partition) -> _PartOfKey:
    if partition.type == "regex":
        pattern = Pattern(partition.pattern)
        return lambda _key, rest: _found(pattern, rest)
    if partition.type == "substring":
        start, end = partition.start_index, partition.end_index
        return lambda _key, rest: rest[start:end] if len(rest) >= end else None
    if partition.type == "date":
        layout = DateLayout(partition.date_format)
        return lambda _key, rest: layout.date_in(rest)
    return _whole_key


def _whole_key(key: str, _rest: str) -> str:
    return key


def _found(pattern: Pattern, rest: str) -> str | None:
    try:
        match = pattern.search(rest)
    except PatternTooSlowError as error:
        raise SourceInvalidError(
            f"Partition.Pattern: {error}", hint="use a simpler regular expression"
        ) from error
    if match is None or not match[0]:
        return None
    groups = [group for group in match.groups() if group]
    return _BETWEEN_GROUPS.join(groups) if groups else match[0]


def fnv1a_32(data: bytes) -> int:
    """Return the 32 bit FNV-1a hash of bytes."""
    value = _FNV_OFFSET
    for byte in data:
        value = (value ^ byte) * _FNV_PRIME & _32_BITS
    return value
