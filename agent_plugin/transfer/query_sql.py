"""A condition as SQL: what is asked of the ledger, with every value as a parameter.

Nothing of a query's text gets into the SQL itself: attributes are looked up and stand there by
expressions of our own (query_attributes.py), values and the keys of documents are parameters.

Texts compare whatever their case, also beyond ASCII, which SQLite's own NOCASE does not; regular
expressions have a limit of time (content/pattern.py). `!=` and the NOT of an operator are the exact
opposite of it, also for what has no value.
"""

import os
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec

from agent_plugin.content.pattern import Pattern, PatternInvalidError
from agent_plugin.transfer.ledger_file import place_of
from agent_plugin.transfer.query import (
    AnyOf,
    Comparison,
    Condition,
    Operator,
    Query,
    Value,
    nearest,
    refuse,
)
from agent_plugin.transfer.query_attributes import Attribute, Kind, resolve
from agent_plugin.transfer.query_values import (
    parse_bytes,
    parse_duration,
    parse_flag,
    parse_number,
    parse_priority,
    parse_time,
)

T = TypeVar("T")

_CHAIN: Final = 64
_OPPOSITES: Final = {
    Operator.DIFFERENT: Operator.EQUAL,
    Operator.NOT_IN: Operator.IN,
    Operator.NOT_CONTAINS: Operator.CONTAINS,
    Operator.NOT_MATCHES: Operator.MATCHES,
}
_ORDERS: Final = (Operator.LESS, Operator.MORE, Operator.AT_MOST, Operator.AT_LEAST)
_SAME: Final = (Operator.EQUAL, Operator.IN)
_TEXTUAL: Final = (*_SAME, Operator.CONTAINS, Operator.MATCHES)
_ALLOWED: Final[Mapping[Kind, Sequence[Operator]]] = {
    Kind.TEXT: (*_TEXTUAL, *_ORDERS),
    Kind.USER: (*_TEXTUAL, *_ORDERS),
    Kind.DOCUMENT: (*_TEXTUAL, *_ORDERS),
    Kind.STATUS: _TEXTUAL,
    Kind.FLAG: _SAME,
    Kind.ID: (*_SAME, *_ORDERS),
    Kind.NUMBER: (*_SAME, *_ORDERS),
    Kind.PRIORITY: (*_SAME, *_ORDERS),
    Kind.BYTES: (*_SAME, *_ORDERS),
    Kind.DURATION: (*_SAME, *_ORDERS),
    Kind.TIME: (*_SAME, *_ORDERS),
}
_NUMBERS: Final[Mapping[Kind, tuple[Callable[[str], float], str]]] = {
    Kind.NUMBER: (parse_number, "a number"),
    Kind.PRIORITY: (parse_priority, "a number, high, medium or low"),
    Kind.BYTES: (parse_bytes, "a size such as 5000, 10MB or 1.5GiB"),
    Kind.DURATION: (parse_duration, "a duration such as 90s, 5m, 2h or 1:30:00"),
    Kind.FLAG: (parse_flag, "true or false"),
}
_TIMES: Final = 'a time such as 2026-03-01, "2026-03-01 18:30" or -15m'


@dataclass(slots=True)
class Translation:
    """A condition as SQL, over the tables and functions that the query's entity has.

    Attributes:
        sql: The condition; `1` if there is none.
        parameters: By name, each of them in the SQL as `:name`.
    """

    sql: str = "1"
    parameters: dict[str, str | float] = field(default_factory=dict)


def translate(query: Query, now: float) -> Translation:
    """Return the condition of a query as SQL.

    Args:
        query: What is asked.
        now: Seconds since the epoch, from which `-15m` counts.

    Raises:
        QueryInvalidError: An attribute that there is not, or an operator or a value that an
            attribute does not take.
    """
    translation = Translation()
    if query.condition is not None:
        translation.sql = _Translator(query, now, translation.parameters).condition(query.condition)
    return translation


class _Translator:
    def __init__(self, query: Query, now: float, parameters: dict[str, str | float]) -> None:
        self._entity = query.entity
        self._now = now
        self._parameters = parameters

    def condition(self, condition: Condition) -> str:
        if isinstance(condition, Comparison):
            return self._comparison(condition)
        # What is nested deepest comes first: SQLite's parser has a stack of a hundred symbols, and
        # remembers all that stands before what it is reading.
        parts = sorted(condition.parts, key=_depth, reverse=True)
        if isinstance(condition, AnyOf):
            return _joined([self.condition(part) for part in parts], "OR")
        each = [self.condition(part) for part in parts]
        return _joined(
            [
                f"({sql})" if isinstance(part, AnyOf) else sql
                for part, sql in zip(parts, each, strict=True)
            ],
            "AND",
        )

    def _comparison(self, comparison: Comparison) -> str:
        attribute, keys = resolve(self._entity, comparison)
        operator = _OPPOSITES.get(comparison.operator, comparison.operator)
        if operator not in _ALLOWED[attribute.kind]:
            takes = _operators(attribute.kind)
            refuse(
                f"{attribute.name} can not be compared by {comparison.operator}; expected {takes}",
                comparison.operator_place,
            )
        sql = self._positive(attribute, keys, operator, comparison.values)
        return sql if operator is comparison.operator else f"NOT coalesce({sql}, 0)"

    def _positive(
        self,
        attribute: Attribute,
        keys: Sequence[str],
        operator: Operator,
        values: Sequence[Value],
    ) -> str:
        if operator is Operator.IN:
            each = [self._positive_one(attribute, keys, operator, value) for value in values]
            return each[0] if len(each) == 1 else f"({_joined(each, 'OR')})"
        return self._positive_one(attribute, keys, operator, values[0])

    def _positive_one(
        self, attribute: Attribute, keys: Sequence[str], operator: Operator, value: Value
    ) -> str:
        if operator is Operator.MATCHES:
            of_user = attribute.kind is Kind.USER
            what = self._who(attribute, value) if of_user else self._document(attribute, keys)
            return f"matches({what}, {self._parameter(_checked_expression(value))})"
        if attribute.kind in _NUMBERS:
            parse, wanted = _NUMBERS[attribute.kind]
            return self._number(attribute, operator, _parsed(attribute, value, parse, wanted))
        if attribute.kind is Kind.DOCUMENT and keys:
            return self._member(self._document(attribute, keys), operator, value)
        others = {
            Kind.ID: self._id,
            Kind.TIME: self._time,
            Kind.STATUS: self._status,
            Kind.USER: self._user,
        }
        if attribute.kind in others:
            return others[attribute.kind](attribute, operator, value)
        return self._text(attribute.sql, operator, value)

    def _document(self, attribute: Attribute, keys: Sequence[str]) -> str:
        if not keys:
            return attribute.sql
        path = msgspec.json.encode(list(keys)).decode()
        return f"member({attribute.sql}, {self._parameter(path)})"

    def _text(self, what: str, operator: Operator, value: Value) -> str:
        if operator is Operator.EQUAL and "*" in value.text:
            pattern = re.sub(r"[\\%_]", r"\\\g<0>", _folded(value.text)).replace("*", "%")
            return f"fold({what}) LIKE {self._parameter(pattern)} ESCAPE '\\'"
        wanted = self._parameter(_folded(value.text))
        if operator is Operator.CONTAINS:
            return f"instr(fold({what}), {wanted}) > 0"
        return f"fold({what}) {_sign(operator)} {wanted}"

    def _member(self, what: str, operator: Operator, value: Value) -> str:
        as_text = self._text(what, operator, value)
        try:
            number = self._parameter(parse_number(value.text))
        except ValueError:
            # Numbers come before texts in SQLite's order; they are not to be compared at all.
            return f"(typeof({what}) = 'text' AND {as_text})" if operator in _ORDERS else as_text
        if operator in _ORDERS:
            return f"(typeof({what}) <> 'text' AND {what} {operator} {number})"
        if operator in _SAME:
            return f"({as_text} OR {what} = {number})"
        return as_text

    def _status(self, attribute: Attribute, operator: Operator, value: Value) -> str:
        plain = operator is Operator.IN or (operator is Operator.EQUAL and "*" not in value.text)
        word = value.text.lower()
        if not plain:
            return self._text(attribute.sql, operator, value)
        if word not in attribute.words:
            refuse(
                f'there is no status "{value.text}"{nearest(word, attribute.words)}',
                value.place,
                hint=f"expected {', '.join(attribute.words)}, or * for a part of one",
            )
        # Not folded, so that the index can be used.
        return f"{attribute.sql} = {self._parameter(word)}"

    def _user(self, attribute: Attribute, operator: Operator, value: Value) -> str:
        return self._text(self._who(attribute, value), operator, value)

    def _who(self, attribute: Attribute, value: Value) -> str:
        """Return `uid:name` if a value has a colon, else the name alone."""
        has_colon = f"instr({self._parameter(_encodable(value.text))}, ':') > 0"
        name = f"substr({attribute.sql}, instr({attribute.sql}, ':') + 1)"
        return f"CASE WHEN {has_colon} THEN {attribute.sql} ELSE {name} END"

    def _number(self, attribute: Attribute, operator: Operator, number: float) -> str:
        return f"{attribute.sql} {_sign(operator)} {self._parameter(number)}"

    def _id(self, attribute: Attribute, operator: Operator, value: Value) -> str:
        if operator in _SAME and not re.fullmatch("[0-9]{1,18}", value.text):
            return "0"
        return self._number(
            attribute, operator, _parsed(attribute, value, parse_number, "a number")
        )

    def _time(self, attribute: Attribute, operator: Operator, value: Value) -> str:
        """Compare with a span: a day is a day long, and what is after it is after all of it."""
        span = _parsed(attribute, value, lambda text: parse_time(text, self._now), _TIMES)
        begin, end = self._parameter(span.begin), self._parameter(span.end)
        if span.begin == span.end:
            return f"{attribute.sql} {_sign(operator)} {begin}"
        return {
            Operator.LESS: f"{attribute.sql} < {begin}",
            Operator.AT_LEAST: f"{attribute.sql} >= {begin}",
            Operator.MORE: f"{attribute.sql} >= {end}",
            Operator.AT_MOST: f"{attribute.sql} < {end}",
        }.get(operator, f"({attribute.sql} >= {begin} AND {attribute.sql} < {end})")

    def _parameter(self, value: str | float) -> str:
        name = f"q{len(self._parameters)}"
        self._parameters[name] = value
        return f":{name}"


def _parsed(attribute: Attribute, value: Value, parse: Callable[[str], T], wanted: str) -> T:
    try:
        return parse(value.text)
    except ValueError:
        refuse(
            f'{attribute.name}: expected {wanted}; found "{value.text}"',
            value.place,
        )


def _sign(operator: Operator) -> str:
    return Operator.EQUAL if operator is Operator.IN else operator


def _operators(kind: Kind) -> str:
    """Return the operators that a kind takes, for people."""
    allowed = _ALLOWED[kind]
    opposites = [opposite for opposite, positive in _OPPOSITES.items() if positive in allowed]
    return ", ".join([*allowed, *opposites])


def _depth(condition: Condition) -> int:
    """Return how deep conditions are nested in a condition."""
    if isinstance(condition, Comparison):
        return 0
    return 1 + max(_depth(part) for part in condition.parts)


def _joined(conditions: Sequence[str], word: str) -> str:
    """Join conditions, many of them in groups: SQLite takes a chain of a thousand for too deep."""
    while len(conditions) > _CHAIN:
        groups = [conditions[at : at + _CHAIN] for at in range(0, len(conditions), _CHAIN)]
        conditions = [f"({f' {word} '.join(group)})" for group in groups]
    return f" {word} ".join(conditions)


# ------------------------------------------------------------------------- functions of the SQL


def prepare(connection: sqlite3.Connection) -> None:
    """Give a connection the functions that translated conditions call."""
    connection.create_function("fold", 1, fold, deterministic=True)
    connection.create_function("matches", 2, _Matcher(), deterministic=True)
    connection.create_function("member", 2, _member, deterministic=True)
    connection.create_function("place_of", 1, place_of, deterministic=True)


def fold(value: str | bytes | float | None) -> str | None:
    """Return a value as a text that is the same whatever the case; None stays None."""
    if value is None:
        return None
    return _folded(os.fsdecode(value) if isinstance(value, bytes) else str(value))


def _folded(text: str) -> str:
    return _encodable(text.casefold())


def _encodable(text: str) -> str:
    """Return a text in which bytes that are not UTF-8 are characters that SQLite takes.

    They are the last ones of the last private plane, one for each byte.
    """
    if text.isascii():
        return text
    return "".join(
        chr(0x10FF00 + (ord(char) & 0xFF)) if "\ud800" <= char <= "\udfff" else char
        for char in text
    )


class _Matcher:
    """The function `matches`; one for each connection, since patterns count their time."""

    def __init__(self) -> None:
        self._patterns: dict[str, Pattern] = {}

    def __call__(self, value: str | bytes | float | None, expression: str) -> bool | None:
        """Return whether an expression is found in a value.

        Raises:
            PatternTooSlowError: It takes too long; SQLite makes an error of its own of that.
        """
        if value is None:
            return None
        if expression not in self._patterns:
            self._patterns[expression] = Pattern(expression, ignore_case=True)
        text = os.fsdecode(value) if isinstance(value, bytes) else str(value)
        return self._patterns[expression].search(_encodable(text)) is not None


def _checked_expression(value: Value) -> str:
    """Return a regular expression that can be searched for."""
    text = _encodable(value.text)
    try:
        Pattern(text, ignore_case=True)
    except PatternInvalidError as error:
        refuse(f'expected a regular expression; "{value.text}": {error}', value.place)
    return text


def _member(document: str | None, path: str) -> str | float | None:
    """Return what stands in a JSON document below some keys; what is no text or number, as JSON."""
    if not document or document == "{}":
        return None
    try:
        found = msgspec.json.decode(document)
    except msgspec.DecodeError:
        return None
    for key in msgspec.json.decode(path, type=list[str]):
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    if found is None or (isinstance(found, str | int | float) and not isinstance(found, bool)):
        return found
    return msgspec.json.encode(found).decode()
