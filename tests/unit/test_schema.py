"""What breaks a schema is told by the key's path, with what is allowed there."""

from typing import Literal

import msgspec
import pytest

from agent_plugin.content.errors import InputError, JobInvalidError
from agent_plugin.schema import conform, spelled


class Leaf(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    kind_of_leaf: Literal["oak", "elm"] = "oak"


class Tree(msgspec.Struct, forbid_unknown_fields=True):
    leaves: dict[str, tuple[Leaf, ...]] = {}
    top: Leaf | None = None
    number: int = 0


def test_a_document_that_conforms_is_returned_typed() -> None:
    tree = conform({"leaves": {"a": [{}]}}, Tree, source="x", failure=InputError)

    assert tree == Tree(leaves={"a": (Leaf(),)})


@pytest.mark.parametrize(
    ("document", "message", "hint"),
    [
        (
            [],
            "x: the document: expected `object`, got `array`",
            "allowed: an object of leaves, top, number",
        ),
        (
            {"numbers": 1},
            "x: numbers: unknown key",
            "did you mean number? known: leaves, top, number",
        ),
        ({"a`b": 1}, "x: a`b: unknown key", "known: leaves, top, number"),
        ({"number": "1"}, "x: number: expected `int`, got `str`", "allowed: a whole number"),
        (
            {"leaves": {"a": [{}, {"kindOfLeaf": "fir"}]}},
            "x: leaves[...][1].kindOfLeaf: 'fir' is not allowed",
            "allowed: elm, oak",
        ),
        (
            {"top": {"kind": 1}},
            "x: top.kind: unknown key",
            "known: kindOfLeaf",
        ),
    ],
)
def test_what_is_wrong_is_told(document: object, message: str, hint: str) -> None:
    with pytest.raises(JobInvalidError) as caught:
        conform(document, Tree, source="x", failure=JobInvalidError)

    assert caught.value.message == message
    assert caught.value.hint == hint


def test_the_line_is_told_when_it_can_be_found() -> None:
    with pytest.raises(InputError, match=r"x, line 7: number: ") as caught:
        conform(
            {"number": "1"},
            Tree,
            source="x",
            failure=InputError,
            line_of={"number": 7}.get,
        )
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"TOP": {"KINDOFLEAF": "oak"}}, {"top": {"kindOfLeaf": "oak"}}),
        ({"Leaves": {"A": [{"KindOfLeaf": "oak"}]}}, {"leaves": {"A": [{"KindOfLeaf": "oak"}]}}),
        ({"number": 1, "Number": 2}, {"number": 1, "Number": 2}),
        ({"Number": 1, "NUMBER": 2}, {"number": 1, "NUMBER": 2}),
        ({"other": 1, 3: 4}, {"other": 1, 3: 4}),
        ({"Top": 5}, {"top": 5}),
        ([1], [1]),
    ],
)
def test_keys_are_spelled_as_the_schema_spells_them_unless_that_hides_one(
    document: object, expected: object
) -> None:
    """Lists are left alone: whoever has a list of documents goes through it."""
    assert spelled(document, Tree) == expected
