"""Documents that people and other programs write: typed, strict, and refused with a useful reason.

A document's schema is a msgspec struct that forbids unknown fields. What is wrong is told by the
key's path in the document, with what is allowed there.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from agent_plugin.content.errors import InputError

_T = TypeVar("_T")

_FAILED_AT: Final = re.compile(
    r"(?P<reason>.*?)(?: - at (?:`key` in )?`\$\.?(?P<place>.*)`)?", re.DOTALL
)
_NAMED: Final = re.compile(r"(?P<what>.*) `(?P<name>.*)`", re.DOTALL)
# Of what values are made whose types say nothing more.
_SHAPES: Final = (("str", 'text: "…"'), ("array", 'a list: ["…", "…"]'))
_STEP: Final = re.compile(r"\[(?P<index>\d+|\.\.\.)\]|\.?(?P<name>[^.\[\]]+)")


def conform(
    document: object,
    schema: type[_T],
    *,
    source: str,
    failure: type[InputError],
    decode: Callable[[type, Any], Any] | None = None,
    line_of: Callable[[str], int | None] = lambda _key: None,
    prefix: str = "",
    place_of: Callable[[str], str] = lambda key: key,
) -> _T:
    """Return a decoded document (dicts, lists, strings, numbers) as what its schema says.

    Args:
        document: As a JSON or TOML parser returned it.
        schema: A msgspec struct.
        source: What the document is called in messages, its file name for example.
        failure: The class of error to raise.
        decode: Makes a value of a type that msgspec does not know, or raises ValueError.
        line_of: Finds the line of a key, given as its path; None when it can not be found.
        prefix: Put before the paths of keys in messages, when this is a part of a document.
        place_of: Returns the path of a key as the document has it, when what is decoded was made
            of it in another form.

    Raises:
        InputError: As `failure`: an unknown or missing key or a value that is not allowed. The
            message names `source`, the key's path and the reason; the hint says what is allowed.
    """
    try:
        return msgspec.convert(document, schema, dec_hook=decode)
    except msgspec.ValidationError as error:
        key, reason, hint = _explain(str(error), schema)
        line = line_of(key)
        place = f"{source}, line {line}" if line else source
        shown = f"{prefix}{place_of(key)}".rstrip(".") or "the document"
        raise failure(f"{place}: {shown}: {reason}", hint=hint) from error


def spelled(document: object, schema: type) -> object:
    """Return a decoded document with the keys that a struct has spelled as the struct spells them.

    For documents whose keys may be in any case. Other keys stay as they are, and so does one that
    is there twice in different cases: `conform` refuses them.
    """
    return _spelled(document, list(_alternatives(inspect.type_info(schema))))


def _spelled(value: object, kinds: list[inspect.Type]) -> object:
    fields = {
        field.encode_name.lower(): field
        for kind in kinds
        if isinstance(kind, inspect.StructType)
        for field in kind.fields
    }
    if not isinstance(value, dict) or not fields:
        return value
    written: dict[object, object] = {}
    for key, below in value.items():
        field = fields.get(key.lower()) if isinstance(key, str) else None
        if field is None or (field.encode_name != key and field.encode_name in value):
            written[key] = below
        else:
            name = key if field.encode_name in written else field.encode_name
            written[name] = _spelled(below, list(_alternatives(field.type)))
    return written


def _explain(text: str, schema: type) -> tuple[str, str, str]:
    """Return the key's path, what is wrong with it, and what is allowed."""
    match = _FAILED_AT.fullmatch(text)
    reason, place = (match["reason"], match["place"] or "") if match else (text, "")
    named = _NAMED.fullmatch(reason)
    if named and named["what"] == "Object contains unknown field":
        return _explain_unknown(named["name"], place, schema)
    if named and named["what"] == "Object missing required field":
        return _join(place, named["name"]), "missing", ""
    if reason.startswith("Invalid enum value"):
        reason = f"{reason.removeprefix('Invalid enum value ')} is not allowed"
        return place, reason, f"allowed: {', '.join(_allowed_values(schema, place))}"
    words = [_allowed(kind) for kind in _types_at(schema, place)]
    if not any(words):
        words = [text for shape, text in _SHAPES if reason.startswith(f"Expected `{shape}`, got ")]
    allowed = " or ".join(dict.fromkeys(filter(None, words)))
    reason = f"{reason[:1].lower()}{reason[1:]}"
    return place, reason, f"allowed: {allowed}" if allowed else ""


def _allowed(kind: inspect.Type) -> str:
    """Return in words what a value of a type may be; empty when its own decoder says it."""
    match kind:
        case inspect.BoolType():
            return "true, false"
        case inspect.LiteralType():
            return ", ".join(map(str, kind.values))
        case inspect.IntType():
            return f"a whole number{_bounds(kind)}"
        case inspect.FloatType():
            return f"a number{_bounds(kind)}"
        case inspect.StructType():
            return f"an object of {', '.join(field.encode_name for field in kind.fields)}"
        case _:
            return ""


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    words = [
        f" {word} {bound:g}" if isinstance(bound, float) else f" {word} {bound}"
        for word, bound in (
            ("above", kind.gt),
            ("from", kind.ge),
            ("below", kind.lt),
            ("to" if kind.ge is not None else "up to", kind.le),
        )
        if bound is not None
    ]
    return "".join(words)


def _explain_unknown(name: str, place: str, schema: type) -> tuple[str, str, str]:
    # Loaded here: 4 ms that only a failure needs.
    from difflib import get_close_matches  # noqa: PLC0415

    known = _known_keys(schema, place)
    nearest = get_close_matches(name, known, n=1)
    if not nearest:
        nearest = [
            f"{above}.{name}" for above in known if name in _known_keys(schema, _join(place, above))
        ]
    guess = f"did you mean {nearest[0]}? " if nearest else ""
    return _join(place, name), "unknown key", f"{guess}known: {', '.join(known)}"


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _known_keys(schema: type, place: str) -> list[str]:
    return [
        field.encode_name
        for kind in _types_at(schema, place)
        if isinstance(kind, inspect.StructType)
        for field in kind.fields
    ]


def _allowed_values(schema: type, place: str) -> list[str]:
    return [
        str(value)
        for kind in _types_at(schema, place)
        if isinstance(kind, inspect.LiteralType)
        for value in kind.values
    ]


def _types_at(schema: type, place: str) -> list[inspect.Type]:
    kinds = list(_alternatives(inspect.type_info(schema)))
    for step in _STEP.finditer(place):
        kinds = [
            alternative
            for kind in kinds
            for below in _below(kind, step["name"])
            for alternative in _alternatives(below)
        ]
    return kinds


def _below(kind: inspect.Type, name: str | None) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.StructType) and name is not None:
        yield from (field.type for field in kind.fields if field.encode_name == name)
    elif isinstance(kind, inspect.VarTupleType | inspect.ListType):
        yield kind.item_type
    elif isinstance(kind, inspect.DictType):
        yield kind.value_type


def _alternatives(kind: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.UnionType):
        yield from kind.types
    elif isinstance(kind, inspect.Metadata):
        yield kind.type
    else:
        yield kind
