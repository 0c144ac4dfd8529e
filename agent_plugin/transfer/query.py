"""The query language of transfers and tasks: from a text to a condition. Pure.

The grammar is query.lark. What attributes there are, and how a condition is asked of the ledger,
is elsewhere (query_attributes.py, query_sql.py): this module knows the language alone. Everything
wrong with a query is told with its place and with what could have stood there instead.

May be used from any thread.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from agent_plugin.content.errors import QueryInvalidError

if TYPE_CHECKING:
    from lark import Lark, Token

MAX_QUERY_BYTES: Final = 8 * 1024
# Of parentheses. SQLite refuses expressions that are nested a thousand deep.
MAX_DEPTH: Final = 64
_SHOWN_CHARACTERS: Final = 24


class Entity(StrEnum):
    """What a query is about."""

    TRANSFER = "transfer"
    TASK = "task"
    ARTIFACT = "artifact"
    ATTRIBUTES = "attributes"
    ENTITYTYPES = "entitytypes"


# A transfer is what the accsyn API calls a job.
ENTITY_WORDS: Final = {"job": Entity.TRANSFER} | {entity.value: entity for entity in Entity}


class Operator(StrEnum):
    """How an attribute is compared; `<>` is `!=`."""

    EQUAL = "="
    DIFFERENT = "!="
    LESS = "<"
    MORE = ">"
    AT_MOST = "<="
    AT_LEAST = ">="
    IN = "IN"
    NOT_IN = "NOT IN"
    CONTAINS = "CONTAINS"
    NOT_CONTAINS = "NOT CONTAINS"
    MATCHES = "MATCHES"
    NOT_MATCHES = "NOT MATCHES"


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands in a query: line and column, both from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Value:
    """What an attribute is compared with; a quotation without its marks."""

    text: str
    place: Place


@dataclass(frozen=True, slots=True)
class Comparison:
    """One attribute, compared.

    Attributes:
        attribute: Its name, part by part, as it was written.
        place: Where it stands.
        operator: How it is compared.
        operator_place: Where that stands.
        values: One, or several for IN.
    """

    attribute: tuple[str, ...]
    place: Place
    operator: Operator
    operator_place: Place
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class AllOf:
    """Conditions that hold together; two or more."""

    parts: tuple["Condition", ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Conditions of which one holds; two or more."""

    parts: tuple["Condition", ...]


Condition = Comparison | AllOf | AnyOf


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked for; no condition asks for everything."""

    entity: Entity
    condition: Condition | None


def parse(text: str) -> Query:
    """Return what a query asks.

    Raises:
        QueryInvalidError: It breaks the grammar or a limit; the place and what was expected there.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_QUERY_BYTES:
        raise QueryInvalidError(
            f"the query has {size} bytes",
            hint=f"{MAX_QUERY_BYTES} are allowed; ask for less at once",
        )
    if (nul := text.find("\0")) >= 0:
        refuse("a NUL character stands in no name", _place(text, nul))
    return _parsed(text)


def _parsed(text: str) -> Query:
    from lark import UnexpectedCharacters, UnexpectedToken  # noqa: PLC0415 - 60 ms, and only here

    interactive = _parser().parse_interactive(text)
    depth = 0
    try:
        # Token by token, because parentheses are counted before they are nested.
        for token in interactive.iter_parse():
            depth += {"LPAR": 1, "RPAR": -1}.get(token.type, 0)
            if depth > MAX_DEPTH:
                refuse(f"parentheses are nested more than {MAX_DEPTH} deep", _place_of(token))
        return cast("Query", interactive.feed_eof())  # type: ignore[no-untyped-call] # lark's
    except (UnexpectedCharacters, UnexpectedToken) as error:
        ended = isinstance(error, UnexpectedToken) and error.token.type == "$END"
        position: Any = len(text) if ended else error.pos_in_stream
        _refuse_unexpected(text, position)


@cache
def _parser() -> "Lark":
    from lark import Lark, Transformer  # noqa: PLC0415 - as above

    class Build(Transformer[Any, Any], _Rules):
        """Makes the condition while the text is parsed."""

    grammar = Path(__file__).with_name("query.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", lexer="contextual", start="query", transformer=Build())


class _Rules:
    """What each rule of the grammar becomes; called by lark, innermost first."""

    def query(self, found: Sequence[Any]) -> Query:
        entity, condition = found
        return Query(ENTITY_WORDS[entity.lower()], condition)

    def expression(self, found: Sequence[Condition]) -> Condition:
        return found[0] if len(found) == 1 else AnyOf(tuple(found))

    def term(self, found: Sequence[Condition]) -> Condition:
        return found[0] if len(found) == 1 else AllOf(tuple(found))

    def factor(self, found: Sequence[Condition]) -> Condition:
        return found[0]

    def comparison(self, found: Sequence[Any]) -> Comparison:
        names, *operator, values = found
        words: list[Token] = [word for word in operator if word is not None]
        sign = " ".join(word.upper() for word in words)
        return Comparison(
            tuple(str(name) for name in names),
            _place_of(names[0]),
            Operator("!=" if sign == "<>" else sign),
            _place_of(words[0]),
            values if isinstance(values, tuple) else (values,),
        )

    def attribute(self, found: "Sequence[Token]") -> "Sequence[Token]":
        return found

    def values(self, found: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(found)

    def value(self, found: "Sequence[Token]") -> Value:
        [token] = found
        text = str(token)
        if token.type == "QUOTED":
            text = text[1:-1].replace(text[0] * 2, text[0])
        return Value(text, _place_of(token))


# ------------------------------------------------------------------------------------ refusals

_NAMED: Final = {
    "ENTITY": tuple(ENTITY_WORDS),
    "_WHERE": ("WHERE",),
    "_AND": ("AND",),
    "_OR": ("OR",),
    "NOT": ("NOT",),
    "IN": ("IN",),
    "CONTAINS": ("CONTAINS",),
    "MATCHES": ("MATCHES",),
    "OPERATOR": ("=", "!=", "<>", "<", ">", "<=", ">="),
    "NAME": ("an attribute",),
    "BARE": ("a value",),
    "LPAR": ("(",),
    "RPAR": (")",),
    "COMMA": ("a comma",),
    "DOT": (".",),
    "$END": ("the end",),
}


def where(place: Place) -> str:
    """Return a place of a query for people; a query is mostly one line."""
    line = f"line {place.line}, " if place.line > 1 else ""
    return f"query, {line}column {place.column}"


def refuse(message: str, place: Place, *, hint: str = "") -> NoReturn:
    """Refuse a query for what stands at a place.

    Raises:
        QueryInvalidError: Always.
    """
    raise QueryInvalidError(
        f"{where(place)}: {message}", hint=hint, line=place.line, column=place.column
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` if a known word looks much like this one, else nothing."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _accepted(text: str, position: int) -> set[str]:
    """Return which tokens could stand at a position, up to which the text is right."""
    from lark import UnexpectedInput  # noqa: PLC0415 - as above

    # Once more: what was there has been reduced by the time that the next token is refused.
    interactive = _parser().parse_interactive(text)
    with suppress(UnexpectedInput):
        for token in interactive.iter_parse():
            if token.start_pos is not None and token.start_pos >= position:
                break
    return set(interactive.accepts())  # type: ignore[no-untyped-call] # lark's


def _refuse_unexpected(text: str, position: int) -> NoReturn:
    accepted = _accepted(text, position)
    expected = [word for token, words in _NAMED.items() if token in accepted for word in words]
    while position < len(text) and text[position].isspace():
        position += 1
    rest = text[position:]
    place = _place(text, position)
    if rest[:1] in ("'", '"') and "QUOTED" in accepted:
        refuse(
            f"the quotation that begins here does not end with {rest[0]}",
            place,
            hint="a quotation mark inside a quotation is written twice",
        )
    found = f"found {_shown(rest)}" if rest else "the query ends"
    close = nearest(_word(rest), [word.lower() for word in expected])
    more_of_a_value = "_AND" in accepted and rest[:1] not in (*"()<>=!,",)
    hint = "a value with blanks needs quotation marks" if rest and more_of_a_value else ""
    refuse(f"expected {_listed(expected)}; {found}{close}", place, hint=hint)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _word(text: str) -> str:
    match = re.match(r"[\w-]+", text)
    return match[0] if match else ""


def _shown(text: str) -> str:
    word = text.split(maxsplit=1)[0]
    return f'"{word[:_SHOWN_CHARACTERS]}…"' if len(word) > _SHOWN_CHARACTERS else f'"{word}"'


def _place(text: str, position: int) -> Place:
    line = text.count("\n", 0, position) + 1
    return Place(line, position - text.rfind("\n", 0, position))


def _place_of(token: "Token") -> Place:
    return Place(token.line or 1, token.column or 1)
