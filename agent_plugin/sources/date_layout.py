"""Dates at the beginning of names, by a layout in either of two spellings.

`%Y-%m-%d` is spelled as strftime has it, `2006-01-02` as the programming language Go has it: by how
it would write the second of January 2006, 15:04:05. Both are read as Go's time.Parse reads, and
written back as its Format writes, so that a date falls into the same part as it does there:
https://pkg.go.dev/time#pkg-constants
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

_MONTHS: Final = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# In this order: the longest that fits is meant.
_ELEMENTS: Final = re.compile(
    r"January|Jan(?![a-z])|Monday|Mon(?![a-z])|MST|002|0[1-6]|15|1|2006|_(?=2006)|__2|_2|2|3|4|5"
    r"|PM|pm|[-Z](?:07:00:00|070000|07:00|0700|07)|[.,](?:0+|9+)(?![0-9])"
)
_STRFTIME: Final = re.compile(r"%(.?)", re.DOTALL)
_OF_STRFTIME: Final = {
    "Y": "2006",
    "y": "06",
    "m": "01",
    "d": "02",
    "e": "_2",
    "j": "002",
    "H": "15",
    "I": "03",
    "M": "04",
    "S": "05",
    "p": "PM",
    "b": "Jan",
    "B": "January",
    "a": "Mon",
    "A": "Monday",
    "z": "-0700",
}

# What an element reads, by name, as a regular expression; names are read in any case.
_TWO: Final = "[0-9]{2}"
_ONE_OR_TWO: Final = "[0-9]{1,2}+"
_READ: Final[Mapping[str, tuple[str, str]]] = {
    "2006": ("year", "[0-9]{4}"),
    "06": ("short_year", _TWO),
    "January": ("month_name", "|".join(_MONTHS)),
    "Jan": ("month_abbreviation", "|".join(name[:3] for name in _MONTHS)),
    "01": ("month", _TWO),
    "1": ("month", _ONE_OR_TWO),
    "02": ("day", _TWO),
    "2": ("day", _ONE_OR_TWO),
    "_2": ("day", " ?[0-9]{1,2}+"),
    "002": ("day_of_year", "[0-9]{3}"),
    "__2": ("day_of_year", " {0,2}+[0-9]{1,3}+"),
    "Monday": ("day_name", "|".join(_DAYS)),
    "Mon": ("day_abbreviation", "|".join(name[:3] for name in _DAYS)),
    "15": ("hour", _ONE_OR_TWO),
    "03": ("hour_of_12", _TWO),
    "3": ("hour_of_12", _ONE_OR_TWO),
    "04": ("minute", _TWO),
    "4": ("minute", _ONE_OR_TWO),
    "05": ("second", _TWO),
    "5": ("second", _ONE_OR_TWO),
    "PM": ("half", "AM|PM"),
    "pm": ("half", "am|pm"),
}
_CASELESS: Final = ("January", "Jan", "Monday", "Mon")
_ZONES: Final = {
    "07": r"[0-9]{2}",
    "0700": r"[0-9]{4}",
    "07:00": r"[0-9]{2}:[0-9]{2}",
    "070000": r"[0-9]{6}",
    "07:00:00": r"[0-9]{2}:[0-9]{2}:[0-9]{2}",
}
# As Go has it for years of two digits.
_FIRST_SHORT_YEAR: Final = 69
# The days of the week come again after 400 years. The year 0, which names without a year have, is
# one that Python lacks.
_CYCLE_YEARS: Final = 400
_NOON: Final = 12
_LAST_HOUR: Final = 23
_SIXTY: Final = 60
# The widest offsets that Go takes.
_ZONE_HOURS: Final = 24


@dataclass(frozen=True, slots=True)
class _Moment:
    """What a name said; not more of it than a layout asks for."""

    day: date
    hour: int
    minute: int
    second: int
    zone: str

    @property
    def hour_of_12(self) -> int:
        return self.hour % _NOON or _NOON

    @property
    def year(self) -> int:
        return self.day.year - _CYCLE_YEARS


_WRITE: Final[Mapping[str, Callable[[_Moment], str]]] = {
    "2006": lambda moment: f"{moment.year:04}",
    "06": lambda moment: f"{moment.year % 100:02}",
    "January": lambda moment: _MONTHS[moment.day.month - 1],
    "Jan": lambda moment: _MONTHS[moment.day.month - 1][:3],
    "01": lambda moment: f"{moment.day.month:02}",
    "1": lambda moment: f"{moment.day.month}",
    "02": lambda moment: f"{moment.day.day:02}",
    "2": lambda moment: f"{moment.day.day}",
    "_2": lambda moment: f"{moment.day.day:2}",
    "002": lambda moment: f"{moment.day.timetuple().tm_yday:03}",
    "__2": lambda moment: f"{moment.day.timetuple().tm_yday:3}",
    "Monday": lambda moment: _DAYS[moment.day.weekday()],
    "Mon": lambda moment: _DAYS[moment.day.weekday()][:3],
    "15": lambda moment: f"{moment.hour:02}",
    "03": lambda moment: f"{moment.hour_of_12:02}",
    "3": lambda moment: f"{moment.hour_of_12}",
    "04": lambda moment: f"{moment.minute:02}",
    "4": lambda moment: f"{moment.minute}",
    "05": lambda moment: f"{moment.second:02}",
    "5": lambda moment: f"{moment.second}",
    "PM": lambda moment: "PM" if moment.hour >= _NOON else "AM",
    "pm": lambda moment: "pm" if moment.hour >= _NOON else "am",
}


class DateLayout:
    """How a date stands at the beginning of a name.

    Args:
        text: With a `%` in it as strftime has it, otherwise as Go has it.

    Raises:
        ValueError: It names nothing of a date, one thing twice, or something that is not supported:
            names of time zones and fractions of a second.
    """

    def __init__(self, text: str) -> None:
        self._elements = list(_of_strftime(text) if "%" in text else _of_go(text))
        # What a date can take of a name is as long as the layout is in Go's spelling, in bytes.
        self._bytes = sum(len(element.encode()) for element, _ in self._elements)
        self._names: list[str] = []
        self._pattern = re.compile("".join(self._read_all()), re.DOTALL)

    def _read_all(self) -> Iterator[str]:
        for element, is_text in self._elements:
            if is_text:
                # A run of blanks stands for any other.
                yield re.sub(r"(?:\\ )+", " +", re.escape(element))
                continue
            name, pattern = _reading_of(element)
            self._names.append(name)
            yield f"({pattern})"
        if not self._names:
            raise ValueError("nothing in it is part of a date")

    def date_in(self, name: str) -> str | None:
        """Return the date that a name begins with, as the layout writes it; None if it has none."""
        data = name.encode()[: self._bytes]
        match = self._pattern.fullmatch(data.decode("utf-8", "replace"))
        if match is None:
            return None
        moment = _moment_of(list(zip(self._names, match.groups(), strict=True)))
        if moment is None:
            return None
        return "".join(
            element if is_text else _written(element, moment) for element, is_text in self._elements
        )


def _reading_of(element: str) -> tuple[str, str]:
    if element in _READ:
        name, pattern = _READ[element]
        return name, f"(?i:{pattern})" if element in _CASELESS else pattern
    if element[0] == "Z":
        return "zone", f"Z|[+-]{_ZONES[element[1:]]}"
    return "zone", f"[+-]{_ZONES[element[1:]]}"


def _written(element: str, moment: _Moment) -> str:
    if element in _WRITE:
        return _WRITE[element](moment)
    is_utc = set(moment.zone) <= set("Z+-0:")
    if element[0] == "Z" and is_utc:
        return "Z"
    return f"+{moment.zone[1:]}" if is_utc else moment.zone


def _of_go(layout: str) -> Iterator[tuple[str, bool]]:
    """Yield the elements of a layout, and the text between them."""
    end = 0
    for match in _ELEMENTS.finditer(layout):
        element = match[0]
        if element == "_":
            continue
        if element == "MST" or element[0] in ".,":
            raise ValueError(f"{element} is not supported: give the numbers of a date alone")
        if match.start() > end:
            yield layout[end : match.start()], True
        yield element, False
        end = match.end()
    if end < len(layout):
        yield layout[end:], True


def _of_strftime(layout: str) -> Iterator[tuple[str, bool]]:
    end = 0
    for match in _STRFTIME.finditer(layout):
        if match.start() > end:
            yield layout[end : match.start()], True
        end = match.end()
        if match[1] == "%":
            yield "%", True
        elif match[1] in _OF_STRFTIME:
            yield _OF_STRFTIME[match[1]], False
        else:
            known = " ".join(f"%{letter}" for letter in _OF_STRFTIME)
            raise ValueError(f"{match[0]} is not known; known are {known} %%")
    if end < len(layout):
        yield layout[end:], True


def _moment_of(read: Sequence[tuple[str, str]]) -> _Moment | None:
    """Return what was read, or None when there is no such time. Of what is said twice, the last."""
    if any(name == "month" and not 1 <= int(text) <= len(_MONTHS) for name, text in read):
        return None
    found = dict(read)
    day, hour = _day_of(found), _hour_of(found)
    minute, second = int(found.get("minute", 0)), int(found.get("second", 0))
    zone = found.get("zone", "Z")
    if day is None or hour is None or max(minute, second) >= _SIXTY or not _is_zone(zone):
        return None
    return _Moment(day, hour, minute, second, zone)


def _day_of(found: Mapping[str, str]) -> date | None:
    """Return the day, 400 years later than it is."""
    year = _year_of(found) + _CYCLE_YEARS
    month = int(found.get("month", 1))
    if name := found.get("month_name", found.get("month_abbreviation")):
        month = [each[:3].lower() for each in _MONTHS].index(name[:3].lower()) + 1
    try:
        if "day_of_year" not in found:
            return date(year, month, int(found.get("day", 1)))
        told = date(year, 1, 1) + timedelta(days=int(found["day_of_year"]) - 1)
    except (ValueError, OverflowError):
        return None
    says_month = "month" in found or "month_name" in found or "month_abbreviation" in found
    fits = (
        told.year == year
        and (not says_month or told.month == month)
        and told.day == int(found.get("day", told.day))
    )
    return told if fits else None


def _year_of(found: Mapping[str, str]) -> int:
    if "short_year" in found:
        short = int(found["short_year"])
        return short + (1900 if short >= _FIRST_SHORT_YEAR else 2000)
    return int(found.get("year", 0))


def _hour_of(found: Mapping[str, str]) -> int | None:
    hour = int(found.get("hour_of_12", found.get("hour", 0)))
    if hour > (_NOON if "hour_of_12" in found else _LAST_HOUR):
        return None
    half = found.get("half", "").lower()
    if half == "pm" and hour < _NOON:
        return hour + _NOON
    return 0 if half == "am" and hour == _NOON else hour


def _is_zone(zone: str) -> bool:
    digits = zone.lstrip("Z+-").replace(":", "")
    pairs = [int(digits[start : start + 2]) for start in range(0, len(digits), 2)]
    return not pairs or (pairs[0] <= _ZONE_HOURS and max(pairs[1:], default=0) < _SIXTY)
