"""Queries by the thousand: every text is a query or is refused, and values stay values.

Each property was seen to catch the mutation that its docstring names.
"""

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_plugin.content.errors import QueryInvalidError
from agent_plugin.transfer.query import (
    AllOf,
    AnyOf,
    Comparison,
    Condition,
    Entity,
    Operator,
    Place,
    Value,
    parse,
)
from agent_plugin.transfer.query_attributes import TASK, TRANSFER
from agent_plugin.transfer.query_sql import prepare, translate

NOW = 1_772_366_400.0
HERE = Place(1, 1)
INJECTIONS = [
    "'; DROP TABLE transfer; --",
    '" OR 1=1 --',
    "x') OR ('1'='1",
    "%' OR name LIKE '%",
    ":q0",
    "?1",
    "\\",
    "%_*",
    "/* x */",
    "UNION SELECT sql FROM sqlite_master",
    "char(0)",
]

# What parses often enough to get beyond the first word.
FRAGMENTS = [
    *("job", "task", "WHERE", "where", "AND", "or", "not", "IN", "contains", "MATCHES", "(", ")"),
    *("=", "!=", "<>", "<", ">", "<=", ">=", ",", ".", "*", "'", '"', "''", "\n", " ", "\t"),
    *("status", "size", "created", "metadata.x", "code", "done", "5MB", "2026-03-01", "'a b'"),
    *INJECTIONS,
]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map(" ".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map(
        lambda rest: "job WHERE " + " ".join(rest)
    ),
)


@given(texts)
@example("job WHERE \ud800=5")
@example("job WHERE code=\x1c5")
def test_t3_any_text_is_a_query_or_is_refused_with_a_place_in_it(text: str) -> None:
    """Caught: UnexpectedCharacters of the parser let through, and the column counted from 0."""
    refused: QueryInvalidError | None = None
    sql = "1"
    try:
        sql = translate(parse(text), NOW).sql
    except QueryInvalidError as error:
        refused = error

    assert sqlite3.complete_statement(f"SELECT {sql};")
    if refused is not None:
        lines = text.split("\n")
        assert 1 <= refused.line <= len(lines)
        assert 1 <= refused.column <= len(lines[refused.line - 1]) + 1
        assert refused.message.startswith("query, ")


# ------------------------------------------------------------------------------------ round trip

names = st.builds(str.__add__, st.sampled_from("aZ_é"), st.text("bY9_-", max_size=4))
plain = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    attribute = tuple(draw(st.lists(names, min_size=1, max_size=3)))
    operator = draw(st.sampled_from(Operator))
    most = 3 if operator in (Operator.IN, Operator.NOT_IN) else 1
    values = draw(st.lists(plain, min_size=1, max_size=most))
    return Comparison(
        attribute, HERE, operator, HERE, tuple(Value(value, HERE) for value in values)
    )


conditions: st.SearchStrategy[Condition] = st.recursive(
    comparisons(),
    lambda below: st.one_of(
        st.lists(below, min_size=2, max_size=3).map(lambda parts: AllOf(tuple(parts))),
        st.lists(below, min_size=2, max_size=3).map(lambda parts: AnyOf(tuple(parts))),
    ),
    max_leaves=8,
)


def written(condition: Condition, quote: str) -> str:
    """Write a condition with no more parentheses than it needs."""
    if isinstance(condition, Comparison):
        values = [
            f"{quote}{value.text.replace(quote, quote * 2)}{quote}" for value in condition.values
        ]
        return f"{'.'.join(condition.attribute)} {condition.operator} {', '.join(values)}"
    word = " AND " if isinstance(condition, AllOf) else " OR "
    parts = [
        f"({written(part, quote)})"
        if type(part) is type(condition)
        or (isinstance(part, AnyOf) and isinstance(condition, AllOf))
        else written(part, quote)
        for part in condition.parts
    ]
    return word.join(parts)


def placeless(condition: Condition) -> Condition:
    if isinstance(condition, Comparison):
        values = tuple(Value(value.text, HERE) for value in condition.values)
        return Comparison(condition.attribute, HERE, condition.operator, HERE, values)
    return type(condition)(tuple(placeless(part) for part in condition.parts))


@given(conditions, st.sampled_from(["'", '"']))
def test_t3_a_condition_that_is_written_down_is_read_as_it_was(
    condition: Condition, quote: str
) -> None:
    """Caught: OR binding closer than AND; a doubled quotation mark kept as two."""
    query = parse(f"task WHERE {written(condition, quote)}")

    assert query.entity is Entity.TASK
    assert query.condition is not None
    assert placeless(query.condition) == condition


# ------------------------------------------------------------------------- values stay values

_TEXTS = ["code", "source", "error", "metadata.shot", "session", "user"]


@given(
    st.sampled_from(_TEXTS),
    st.sampled_from(["=", "<>", "<", "contains", "not contains", "in"]),
    st.one_of(plain, st.sampled_from(INJECTIONS)),
)
def test_t3_no_value_changes_the_sql_it_is_only_a_parameter(
    attribute: str, operator: str, value: str
) -> None:
    """Caught: a value, and the key of a document, put into the SQL as quoted text."""
    quoted = "'" + value.replace("'", "''") + "'"
    wildcard = "*" if "*" in value and operator in ("=", "<>") else ""
    sql = translate(parse(f"job WHERE {attribute} {operator} {quoted}"), NOW).sql
    # A number is compared with numbers of documents as well.
    other = "77" if re.fullmatch(r"[+-]?\d+(\.\d+)?", value, re.ASCII) else "x"
    expected = translate(parse(f"job WHERE {attribute} {operator} {wildcard}{other}"), NOW).sql

    assert sql == expected


@given(names, plain)
def test_t3_no_key_of_a_document_gets_into_the_sql(key: str, value: str) -> None:
    """Caught: the path of a document's key put into the SQL."""
    quoted = "'" + value.replace("'", "''") + "'"
    translated = translate(parse(f"job WHERE metadata.{key} contains {quoted}"), NOW)

    assert translated.sql == translate(parse("job WHERE metadata.k contains x"), NOW).sql
    assert json.dumps([key], ensure_ascii=False) in map(str, translated.parameters.values())


# ---------------------------------------------------------------------------- against a model


@pytest.fixture(scope="module")
def rows() -> Iterator[sqlite3.Connection]:
    """A table of transfers, as wide as the model below needs it."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        prepare(connection)
        connection.execute(
            "CREATE TABLE transfer (id INTEGER PRIMARY KEY, name, size, finished, metadata)"
        )
        yield connection


file_names = st.one_of(
    st.text("aAbBßsS%_*\\. äÄ'\"", max_size=8),
    st.binary(max_size=6).filter(lambda raw: b"\0" not in raw),
)
found_in = st.lists(
    st.tuples(
        file_names,
        st.integers(-1, 4000),
        st.one_of(st.none(), st.integers(int(NOW) - 200_000, int(NOW))),
    ),
    min_size=1,
    max_size=6,
)


def text_of(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")


def stored(name: str | bytes) -> str | bytes:
    text = text_of(name)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")
    return text


def selected(connection: sqlite3.Connection, condition: str) -> set[int]:
    translated = translate(parse(f"job WHERE {condition}"), NOW)
    sql = f"SELECT id FROM transfer WHERE {translated.sql}"
    return {id_ for (id_,) in connection.execute(sql, translated.parameters)}


def fill(connection: sqlite3.Connection, found: list[tuple[str | bytes, int, int | None]]) -> None:
    connection.execute("DELETE FROM transfer")
    connection.executemany(
        "INSERT INTO transfer VALUES (?, ?, ?, ?, '{}')",
        [(at, stored(name), size, end) for at, (name, size, end) in enumerate(found)],
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern in which * stands for anything; by splitting alone."""
    name, pattern = name.casefold(), pattern.casefold()
    first, *rest = pattern.split("*")
    if not rest:
        return name == first
    if not name.startswith(first):
        return False
    at = len(first)
    for part in rest[:-1]:
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(name) - at >= len(rest[-1]) and name.endswith(rest[-1])


@given(found_in, st.data())
def test_t3_a_text_is_compared_as_the_model_compares_it(
    rows: sqlite3.Connection, found: list[tuple[str | bytes, int, int | None]], data: st.DataObject
) -> None:
    """Caught: % and _ not escaped, NOCASE in place of folding, bytes that are not UTF-8 ignored."""
    fill(rows, found)
    pieces = st.sampled_from([text_of(name) for name, _, _ in found])
    others = (pieces.map(str.upper), pieces.map("*".join), st.text("aAb%_*\\ ßs", max_size=6))
    value = data.draw(st.one_of(pieces, *others))
    names = {at: text_of(name) for at, (name, _, _) in enumerate(found)}
    quoted = "'" + value.replace("'", "''") + "'"

    equal = {at for at, name in names.items() if matches(name, value)}
    assert selected(rows, f"code = {quoted}") == equal
    assert selected(rows, f"code <> {quoted}") == names.keys() - equal
    folded = value.casefold()
    holding = {at for at, name in names.items() if folded in name.casefold()}
    assert selected(rows, f"code contains {quoted}") == holding
    assert selected(rows, f"code not contains {quoted}") == names.keys() - holding
    same = {at for at, name in names.items() if name.casefold() == folded}
    assert selected(rows, f"code in ({quoted}, 'no such name')") == same


@given(found_in, st.integers(-2, 4001), st.integers(int(NOW) - 200_001, int(NOW) + 1))
def test_t3_numbers_and_times_are_ordered_and_not_is_the_exact_opposite(
    rows: sqlite3.Connection,
    found: list[tuple[str | bytes, int, int | None]],
    size: int,
    moment: int,
) -> None:
    """Caught: sizes compared as texts; `<>` that leaves out what has no value."""
    fill(rows, found)
    everything = set(range(len(found)))
    sizes = {at: row[1] for at, row in enumerate(found)}
    ends = {at: row[2] for at, row in enumerate(found) if row[2] is not None}

    assert selected(rows, f"size < {size}") == {at for at, own in sizes.items() if own < size}
    assert selected(rows, f"size >= {size}") == {at for at, own in sizes.items() if own >= size}
    same = {at for at, own in sizes.items() if own == size}
    assert selected(rows, f"size = {size}") == same
    assert selected(rows, f"size <> {size}") == everything - same
    assert selected(rows, f"size not in ({size}, 4002)") == everything - same
    assert selected(rows, f"finished > {moment}") == {
        at for at, end in ends.items() if end > moment
    }
    at_once = {at for at, end in ends.items() if end == moment}
    assert selected(rows, f"finished = {moment}") == at_once
    assert selected(rows, f"finished <> {moment}") == everything - at_once


ids = st.integers(0, 4).map(lambda id_: (f"id={id_}", frozenset({id_})))
Nested = tuple[str, frozenset[int]]


def both(parts: list[Nested]) -> Nested:
    texts, sets = zip(*parts, strict=True)
    return f"({' AND '.join(texts)})", frozenset.intersection(*sets)


def either(parts: list[Nested]) -> Nested:
    texts, sets = zip(*parts, strict=True)
    return f"({' OR '.join(texts)})", frozenset.union(*sets)


nested: st.SearchStrategy[Nested] = st.recursive(
    st.one_of(ids, ids.map(lambda of: (of[0].replace("=", "<>"), frozenset(range(5)) - of[1]))),
    lambda below: st.one_of(
        st.lists(below, min_size=2, max_size=4).map(both),
        st.lists(below, min_size=2, max_size=4).map(either),
    ),
    max_leaves=20,
)


@given(nested)
def test_t3_what_is_nested_is_asked_as_it_is_written(
    rows: sqlite3.Connection, condition: Nested
) -> None:
    """Caught: the parentheses of an OR within an AND left out."""
    fill(rows, [("", 0, None)] * 5)
    text, expected = condition

    assert selected(rows, text) == expected


def test_every_attribute_has_a_name_of_its_own() -> None:
    for attributes in (TRANSFER, TASK):
        taken = [name for each in attributes for name in (each.name, *each.aliases)]
        assert len(taken) == len(set(taken))
