"""What the values of a query say: numbers, sizes, durations, times, yes and no. Pure.

Every function raises ValueError for a text that says nothing of its kind.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from agent_plugin.sizes import Size
from agent_plugin.transfer.states import PRIORITIES

# SQLite's integers have 64 bits; beyond, a number is only nearly what was written.
_INTEGER_LIMIT: Final = 2**63
_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,40}(?:\.[0-9]{1,40})?")
_COUNTED: Final = re.compile(r"([0-9]{1,9})([smhdw])", re.IGNORECASE)
_CLOCK: Final = re.compile(r"([0-9]{1,6}):([0-5][0-9]):([0-5][0-9])")
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_DAY_SECONDS: Final = 86_400.0
_MINUTE_SECONDS: Final = 60.0
# A date; then perhaps hours and minutes, perhaps seconds, perhaps parts of one, and a zone.
_TIME: Final = re.compile(
    r"\d{4}-\d{2}-\d{2}(?P<clock>[ T]\d{2}:\d{2}(?P<seconds>:\d{2}(?P<parts>[.,]\d{1,6})?)?"
    r"(?:Z|[+-]\d{2}:?\d{2})?)?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Span:
    """From when, and until before when, seconds since the epoch; one moment if both are equal."""

    begin: float
    end: float


def parse_number(text: str) -> float:
    """Return the number that a text says; an int if it is one and SQLite can hold it."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    if "." in text or abs(int(text)) >= _INTEGER_LIMIT:
        return float(text)
    return int(text)


def parse_priority(text: str) -> float:
    """Return a priority: a number, or the number that high, medium or low stands for."""
    word = PRIORITIES.get(text.lower())
    return parse_number(text) if word is None else word


def parse_bytes(text: str) -> float:
    """Return an amount of bytes: a number, also a negative one, or one with a unit."""
    try:
        return parse_number(text)
    except ValueError:
        size = Size.parse(text)
        if size.percent:
            raise
        return size.bytes


def parse_duration(text: str) -> float:
    """Return the seconds that `90`, `90s`, `5m`, `2h`, `1d`, `1w` or `1:30:00` say."""
    if counted := _COUNTED.fullmatch(text):
        return int(counted[1]) * _UNIT_SECONDS[counted[2].lower()]
    if clock := _CLOCK.fullmatch(text):
        return int(clock[1]) * 3600 + int(clock[2]) * 60 + int(clock[3])
    return parse_number(text)


def parse_time(text: str, now: float) -> Span:
    """Return the span that a time says.

    A date is a day, a time with minutes a minute, one with seconds a second. Without a zone it is
    UTC. `-15m` is that long before now; a number is seconds since the epoch.
    """
    if text.startswith("-") and _COUNTED.fullmatch(text, 1):
        moment = now - parse_duration(text[1:])
        return Span(moment, moment)
    found = _TIME.fullmatch(text)
    if found is None:
        moment = parse_number(text)
        return Span(moment, moment)
    time = datetime.fromisoformat(text.replace(",", ".").upper())
    begin = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()
    if found["parts"]:
        return Span(begin, begin)
    if found["seconds"]:
        return Span(begin, begin + 1)
    return Span(begin, begin + (_MINUTE_SECONDS if found["clock"] else _DAY_SECONDS))


def parse_flag(text: str) -> float:
    """Return 1 for true, yes and 1, and 0 for false, no and 0."""
    words = {"true": 1, "yes": 1, "1": 1, "false": 0, "no": 0, "0": 0}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]
