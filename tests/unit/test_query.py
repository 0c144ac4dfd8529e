"""The query language: what is a query, what it asks, and what is said of one that is none."""

import pytest

from agent_plugin.content.errors import QueryInvalidError
from agent_plugin.transfer.query import (
    AllOf,
    AnyOf,
    Comparison,
    Condition,
    Entity,
    Operator,
    parse,
)

# Of the document that the language comes from, word for word.
SEED = [
    "Job",
    'Job where code="x and y.png"',
    "Job where user=user@mail.com",
    'Job where destination="stockholm"',
    "Job where source=hq",
    "Job where status=aborted",
    "Job where status=done",
    "task WHERE job.id=5a7325f8b7ef72f5f9d74bf4",
    "task WHERE job.id=5a7325f8b7ef72f5f9d74bf4 AND status<>executing",
    'job WHERE code="my_transfer"',
]


def told(condition: Condition | None) -> str:
    """Return a condition with all its parentheses, and values in brackets."""
    if condition is None:
        return ""
    if isinstance(condition, Comparison):
        values = ",".join(f"[{value.text}]" for value in condition.values)
        return f"{'.'.join(condition.attribute)} {condition.operator} {values}"
    word = " AND " if isinstance(condition, AllOf) else " OR "
    return f"({word.join(told(part) for part in condition.parts)})"


def asked(text: str) -> tuple[str, str]:
    query = parse(text)
    return query.entity, told(query.condition)


def refused(text: str) -> QueryInvalidError:
    with pytest.raises(QueryInvalidError) as caught:
        parse(text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    list(
        zip(
            SEED,
            [
                ("transfer", ""),
                ("transfer", "code = [x and y.png]"),
                ("transfer", "user = [user@mail.com]"),
                ("transfer", "destination = [stockholm]"),
                ("transfer", "source = [hq]"),
                ("transfer", "status = [aborted]"),
                ("transfer", "status = [done]"),
                ("task", "job.id = [5a7325f8b7ef72f5f9d74bf4]"),
                ("task", "(job.id = [5a7325f8b7ef72f5f9d74bf4] AND status != [executing])"),
                ("transfer", "code = [my_transfer]"),
            ],
            strict=True,
        )
    ),
)
def test_t3_the_ten_queries_of_the_seed_are_understood(
    text: str, expected: tuple[str, str]
) -> None:
    assert asked(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("job\nWHERE\n status = done", ("transfer", "status = [done]")),
        ("  Task  ", ("task", "")),
        ("job where code='x and y.png'", ("transfer", "code = [x and y.png]")),
        ("job where code='say \"hi\"'", ("transfer", 'code = [say "hi"]')),
        ('job where code="say ""hi"""', ("transfer", 'code = [say "hi"]')),
        ("job where code='it''s'", ("transfer", "code = [it's]")),
        ("task where source=/Shots/MyFile.MOV", ("task", "source = [/Shots/MyFile.MOV]")),
        (r"task where source=X:\A001\a.mov", ("task", r"source = [X:\A001\a.mov]")),
        ("job where status<>done", ("transfer", "status != [done]")),
        ("job where status!=done", ("transfer", "status != [done]")),
        ("job where size>=5MB", ("transfer", "size >= [5MB]")),
        ("job where size < 5", ("transfer", "size < [5]")),
        ("job where STATUS in done, failed", ("transfer", "STATUS IN [done],[failed]")),
        ("job where status not in (done,failed)", ("transfer", "status NOT IN [done],[failed]")),
        ("job where code contains 'a b'", ("transfer", "code CONTAINS [a b]")),
        ("job where code NOT Contains x", ("transfer", "code NOT CONTAINS [x]")),
        ("job where code not matches '^a'", ("transfer", "code NOT MATCHES [^a]")),
        ("job where metadata.shot.name=sh010", ("transfer", "metadata.shot.name = [sh010]")),
        ("job where source=s3://b/k=1&x", ("transfer", "source = [s3://b/k=1&x]")),
        ("attributes WHERE entitytype=task", ("attributes", "entitytype = [task]")),
        ("entitytypes", ("entitytypes", "")),
        ("artifact", ("artifact", "")),
        ("job where code=''", ("transfer", "code = []")),
    ],
)
def test_t3_what_a_query_asks(text: str, expected: tuple[str, str]) -> None:
    assert asked(text) == expected


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("a=1 and b=2 or c=3", "((a = [1] AND b = [2]) OR c = [3])"),
        ("a=1 or b=2 and c=3", "(a = [1] OR (b = [2] AND c = [3]))"),
        ("(a=1 or b=2) and c=3", "((a = [1] OR b = [2]) AND c = [3])"),
        ("((a=1))", "a = [1]"),
        ("a=1 AND b=2 AND c=3", "(a = [1] AND b = [2] AND c = [3])"),
    ],
)
def test_t3_and_binds_closer_than_or(condition: str, expected: str) -> None:
    assert asked(f"job where {condition}")[1] == expected


def test_t3_a_word_of_the_language_can_be_a_value_and_an_attribute() -> None:
    assert asked("job where and=or and not = in")[1] == "(and = [or] AND not = [in])"
    assert asked("job where in in (in, and) or contains contains matches")[1] == (
        "(in IN [in],[and] OR contains CONTAINS [matches])"
    )


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 1, "expected job, transfer, task, artifact, attributes or entitytypes; the query"),
        ("jobs", 1, 'found "jobs"; did you mean job?'),
        ("job having status=done", 5, 'expected WHERE or the end; found "having"'),
        ("job where", 10, "expected an attribute or (; the query ends"),
        ("job whereid=5", 5, 'expected WHERE or the end; found "whereid=5"'),
        ("job where =5", 11, 'expected an attribute or (; found "=5"'),
        ("job where status", 17, "NOT, IN, CONTAINS, MATCHES, =, !=, <>, <, >, <=, >= or .; the"),
        ("job where status done", 18, 'found "done"'),
        ("job where status=", 18, "expected a value; the query ends"),
        ("job where status==done", 18, 'expected a value; found "=done"'),
        ("job where status=done adn size>5", 23, 'expected AND, OR or the end; found "adn"'),
        ("job where status=done adn size>5", 23, "did you mean and?"),
        ("job where (status=done", 23, "expected AND, OR or ); the query ends"),
        ("job where status=done)", 22, 'expected AND, OR or the end; found ")"'),
        ("job where status not done", 22, "expected IN, CONTAINS or MATCHES"),
        ("job where status in ()", 22, 'expected a value; found ")"'),
        ("job where status in (done", 26, "expected ) or a comma; the query ends"),
        ('job where code="x and', 16, 'the quotation that begins here does not end with "'),
        ("job where code='x", 16, "does not end with '"),
        ("job where size=5 MB", 18, 'expected AND, OR or the end; found "MB"'),
        ("job where a=b,c", 14, 'expected AND, OR or the end; found ",c"'),
        ("job where metadata.=5", 20, 'expected an attribute; found "=5"'),
        ("job where code=a\0b", 17, "a NUL character"),
        ("job; DROP TABLE transfer", 4, 'expected WHERE or the end; found ";"'),
    ],
)
def test_t3_an_error_has_the_column_and_what_was_expected(
    text: str, column: int, words: str
) -> None:
    error = refused(text)

    assert (error.line, error.column) == (1, column), error.message
    assert error.message.startswith(f"query, column {column}: ")
    assert words in error.message


@pytest.mark.parametrize(
    ("text", "hinted"),
    [
        ("job where size=5 MB", True),
        ("job where (size=5))", False),
        ("job were size=5", False),
    ],
)
def test_t3_quotation_marks_are_advised_where_they_help(text: str, hinted: bool) -> None:
    with pytest.raises(QueryInvalidError) as caught:
        parse(text)
    assert ("quotation marks" in caught.value.hint) == hinted


def test_t3_an_error_on_a_later_line_has_its_line() -> None:
    error = refused("job\nWHERE status=done\n  adn size>5")

    assert (error.line, error.column) == (3, 3)
    assert error.message.startswith("query, line 3, column 3: expected AND, OR or the end")


def test_t3_a_hundred_parentheses_are_refused_where_they_are_too_many() -> None:
    assert asked("job where " + "(" * 64 + "id=1" + ")" * 64)[1] == "id = [1]"
    error = refused("job where " + "(" * 65 + "id=1" + ")" * 65)

    assert error.column == len("job where ") + 65
    assert "nested more than 64 deep" in error.message


def test_t3_a_query_has_at_most_8_kib() -> None:
    longest = "job where code=" + "x" * (8 * 1024 - len("job where code="))

    assert len(told(parse(longest).condition)) > 8000
    assert "8193 bytes" in refused(longest + "x").message
    assert "the query has" in refused("job where code=" + "é" * 5000).message


def test_t3_as_many_comparisons_as_fit_are_one_list() -> None:
    condition = parse("job where " + " OR ".join(["id=1"] * 1000)).condition

    assert isinstance(condition, AnyOf)
    assert len(condition.parts) == 1000
    assert parse("job").entity is Entity.TRANSFER
    assert condition.parts[0].operator is Operator.EQUAL  # type: ignore[union-attr]
