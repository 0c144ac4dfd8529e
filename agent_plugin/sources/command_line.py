"""Sources on a command line: `[src=]s3://bucket/key[:dst][,dst=PATH][,opt=name=value]…`.

Parts are separated by commas, as in a line of CSV: one that has a comma in it stands in double
quotes, in which `""` is one. The key is taken as it stands: it is no part of a URL, and so `?`, `#`
and `%` mean themselves. In the first part, what follows the last colon is the target; a key with a
colon in it is given as `src=`, which has no target in it.
"""

from collections.abc import Iterator
from typing import Final

from agent_plugin.content.errors import SourceInvalidError
from agent_plugin.sources.spec import InputSource, decode_source, field_name

SCHEME: Final = "s3://"

_SOURCE_NAMES: Final = ("source", "src")
_TARGET_NAMES: Final = ("target", "dst", "destination")
_OPTION_NAMES: Final = ("opt", "option")
# By the names of options without `-` and `_`, in lower case: what they set.
_FIELDS: Final = {
    name.replace("_", ""): field_name(name)
    for name in InputSource.__struct_fields__
    if name not in ("bucket", "key", "target", "partition")
} | {"checksum256": "ChecksumSHA256"}
_SWITCHES: Final = {"Anchored", "Required", "NoSign"}
_WORDS: Final = {"true": True, "1": True, "false": False, "0": False}
_FORM: Final = (
    "its form is s3://bucket/key:/inputs,opt=region=us-east-1; a part with a comma in it stands in"
    " double quotes"
)


def parse_source(text: str) -> InputSource:
    """Return the source that an argument describes.

    Raises:
        SourceInvalidError: It has not the form, or what it says breaks a rule; names the part or
            the field.
    """
    fields: dict[str, object] = {}
    for index, part in enumerate(_parts(text)):
        name, equals, value = part.partition("=")
        key = name.strip().lower()
        if index == 0 and part[: len(SCHEME)].lower() == SCHEME:
            _take_place(*_split_target(part), fields)
        elif index == 0 and not equals:
            raise _failed(part, f"it does not begin with {SCHEME}", _FORM)
        elif not equals:
            raise _failed(part, "it is no name=value", _FORM)
        elif key in _SOURCE_NAMES:
            _take_place(value, None, fields)
        elif key in _TARGET_NAMES:
            fields["Target"] = value
        elif key in _OPTION_NAMES:
            _take_option(part, value, fields)
        else:
            known = ", ".join((*_SOURCE_NAMES, *_TARGET_NAMES, *_OPTION_NAMES))
            raise _failed(part, f"{key!r} is not known", f"known: {known}")
    if "Bucket" not in fields:
        raise _failed(text, "it names no bucket", _FORM)
    return decode_source(fields, source="the source")


def _parts(text: str) -> Iterator[str]:
    """Yield what the commas separate, without its quotes."""
    rest: str | None = text
    while rest is not None:
        if rest.startswith('"'):
            part, rest = _quoted(text, rest)
        else:
            part, comma, below = rest.partition(",")
            rest = below if comma else None
        yield part


def _quoted(text: str, rest: str) -> tuple[str, str | None]:
    end = 1
    while (end := rest.find('"', end)) >= 0 and rest[end + 1 : end + 2] == '"':
        end += 2
    if end < 0:
        raise _failed(text, "a quote is not closed", 'write "…"')
    part, after = rest[1:end].replace('""', '"'), rest[end + 1 :]
    if after and not after.startswith(","):
        raise _failed(text, f"{after[:40]!r} follows a closing quote", 'write "…",')
    return part, after[1:] if after else None


def _split_target(part: str) -> tuple[str, str | None]:
    place, colon, target = part[len(SCHEME) :].rpartition(":")
    return (f"{SCHEME}{place}", target) if colon else (part, None)


def _take_place(place: str, target: str | None, fields: dict[str, object]) -> None:
    if "Bucket" in fields:
        raise _failed(place, "the source is said twice", _FORM)
    if place[: len(SCHEME)].lower() != SCHEME:
        raise _failed(place, "it is no s3:// place", _FORM)
    fields["Bucket"], _, fields["Key"] = place[len(SCHEME) :].partition("/")
    if target is not None:
        fields["Target"] = target


def _take_option(part: str, option: str, fields: dict[str, object]) -> None:
    name, equals, value = option.partition("=")
    field = _FIELDS.get(name.strip().lower().replace("-", "").replace("_", ""))
    if field is None or not equals:
        known = ", ".join(dict.fromkeys(_FIELDS.values()))
        reason = "it is no opt=name=value" if field else f"no option is called {name[:100]!r}"
        raise _failed(part, reason, f"known: {known}")
    if field in fields:
        raise _failed(part, f"{field} is said twice", "say it once")
    if field in _SWITCHES:
        if value.lower() not in _WORDS:
            raise _failed(part, f"{field} is neither true nor false", "allowed: true, false")
        fields[field] = _WORDS[value.lower()]
    else:
        fields[field] = value


def _failed(part: str, reason: str, hint: str) -> SourceInvalidError:
    return SourceInvalidError(f"source {part[:200]!r}: {reason}", hint=hint)
