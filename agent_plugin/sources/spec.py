"""Input sources: what a job says of objects that it wants as inputs, wherever they are.

A source stands in the job document's `inputSources`, or on a command line (`parse_source`). What is
decoded here has passed the rules that need no server; which objects it names is found by
`resolve`. The names of fields count in any case, because they are written by hand.

Three shapes are one: the fields by themselves; `{"Type": "s3", "Params": {…}}`, which is also what
a published result looks like; and that as `Source`, with `Target` and `Alias` beside it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from agent_plugin import schema
from agent_plugin.content import manifest_rules as rules
from agent_plugin.content.errors import InputError, SourceInvalidError
from agent_plugin.content.objects import MAX_KEY_BYTES
from agent_plugin.content.pattern import Pattern, PatternInvalidError
from agent_plugin.sources.mapping import names_one_object
from agent_plugin.sources.partition import NONE, Defect, Partition, partition_defects

DEFAULT_TARGET: Final = "/inputs"
MAX_SOURCES: Final = 100
S3: Final = "s3"

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html, and the upper case
# and underscores of other servers.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
# 32 bytes in base64; behind it, of an object uploaded in parts, how many there were.
_SHA256: Final = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=(?:-[1-9][0-9]{0,4})?")

_SPELLINGS: Final = {"version_id": "VersionID", "checksum_sha256": "ChecksumSHA256"}


def field_name(name: str) -> str:
    """Return how a field is spelled in documents."""
    return _SPELLINGS.get(name) or name.title().replace("_", "")


class InputSource(
    msgspec.Struct, frozen=True, rename=field_name, forbid_unknown_fields=True, omit_defaults=True
):
    """Objects that a job wants as files; `decode_source` and `parse_source` make one.

    Attributes:
        bucket: The bucket.
        key: An object; what several begin with, up to a `/` or before a `*`; empty for all.
        filter: A regular expression that the rest of a key has to match, anywhere in it; ignored
            for one object.
        anchored: Whether `filter` has to match the whole of that rest.
        region, endpoint: Where the bucket is; empty for what the environment says.
        version_id: Of the one object; ignored for several.
        checksum_sha256: What S3 has to have stored for the one object, in base64; ignored for
            several.
        partition: Which of the objects are taken; None for all.
        target: The directory that they come to, below the session's; `/inputs` is its `inputs`.
        alias: What to call the source in messages.
        mode: `copied` or `virtual`; None for what the job says of its other inputs.
        required: Whether the session can not start without it.
        on_empty: Whether a source without objects is an `error`, or `ok`.
        no_sign: Whether requests are not signed, for buckets that are open to everybody.
        profile: The profile whose credentials are used; empty for those of the queue.
    """

    bucket: str
    key: str = ""
    filter: str = ""
    anchored: bool = False
    region: str = ""
    endpoint: str = ""
    version_id: str = ""
    checksum_sha256: str = ""
    partition: Partition | None = None
    target: str = DEFAULT_TARGET
    alias: Annotated[str, Meta(max_length=200)] = ""
    mode: Literal["copied", "virtual"] | None = None
    required: bool = True
    on_empty: Literal["error", "ok"] = "error"
    no_sign: bool = False
    profile: Annotated[str, Meta(max_length=200)] = ""

    @property
    def url(self) -> str:
        """`s3://bucket/key`, as people write it."""
        return f"s3://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.alias or self.url

    @property
    def target_path(self) -> str:
        """The target relative to the session's directory, without slashes around it."""
        return self.target.removeprefix("/").removesuffix("/")

    @property
    def index_parameter(self) -> str:
        """The task parameter that says which part a task takes; empty if none does."""
        partition = self.partition
        if partition is None or partition.type == NONE:
            return ""
        return partition.index_parameter or ""

    @property
    def is_single(self) -> bool:
        """Whether it names one object."""
        return names_one_object(self.key)


def decode_sources(
    documents: object,
    *,
    source: str,
    failure: type[InputError] = SourceInvalidError,
    prefix: str = "inputSources",
) -> tuple[InputSource, ...]:
    """Return the sources of a list.

    Args:
        documents: The list, as a JSON parser returned it.
        source: What the document is called in messages, its file name for example.
        failure: The class of error to raise.
        prefix: The path of the list in the document.

    Raises:
        InputError: As `failure`: as for decode_source, or two sources want one target.
    """
    if not isinstance(documents, Sequence) or isinstance(documents, str | bytes):
        raise failure(f"{source}: {prefix}: expected a list", hint="allowed: a list of sources")
    if len(documents) > MAX_SOURCES:
        raise failure(f"{source}: {prefix}: {len(documents)} sources, more than {MAX_SOURCES}")
    sources = tuple(
        decode_source(document, source=source, failure=failure, prefix=f"{prefix}[{index}]")
        for index, document in enumerate(documents)
    )
    for (first, one), (second, other) in combinations(enumerate(sources), 2):
        if is_below(one.target_path, other.target_path):
            raise failure(
                f"{source}: {prefix}[{second}].Target: {other.target} is also in or above the"
                f" Target of {prefix}[{first}], {one.target}",
                hint="give each source a directory of its own",
            )
    return sources


def is_below(one: str, other: str) -> bool:
    """Say whether of two relative paths one is the other, or below it."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def decode_source(
    document: object,
    *,
    source: str,
    failure: type[InputError] = SourceInvalidError,
    prefix: str = "",
) -> InputSource:
    """Return the source that an object of a document describes.

    Args:
        document: As a JSON parser returned it.
        source: What the document is called in messages, its file name for example.
        failure: The class of error to raise.
        prefix: The path of this object in the document; empty if it is the whole.

    Raises:
        InputError: As `failure`: it breaks the schema or a rule. The message names the path of the
            field and the reason; the hint says what is allowed.
    """
    flattening = _Flattening(source, failure, prefix)
    flattening.take(document, "")
    decoded = schema.conform(
        flattening.values,
        InputSource,
        source=source,
        failure=failure,
        place_of=flattening.place_of,
    )
    for field, reason, hint in source_defects(decoded):
        raise failure(f"{source}: {flattening.place_of(field)}: {reason}", hint=hint)
    return decoded


class _Flattening:
    """Makes one object of the shapes that a source may have, and remembers what stood where."""

    def __init__(self, source: str, failure: type[InputError], prefix: str) -> None:
        self.values: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self._source = source
        self._failure = failure
        self._prefix = prefix

    def place_of(self, key: str) -> str:
        """Return the path in the document of a key of `values`, itself perhaps a path."""
        name, dot, below = key.partition(".")
        return self._join(self._places.get(name, name)) + dot + below

    def take(
        self, document: object, place: str, wrappers: Sequence[str] = ("Type", "Params", "Source")
    ) -> None:
        """Add an object's fields, and those of the objects that it wraps.

        Args:
            document: The object.
            place: Its path below the source's.
            wrappers: What it may have besides the fields of a source.
        """
        fields = self._named(document, place, (*_FIELDS, *wrappers))
        kind = fields.pop("Type", S3)
        if not isinstance(kind, str) or kind.lower() != S3:
            raise self._failed(
                _below(place, "Type"),
                f"{str(kind)[:100]!r} is no source of objects",
                "allowed: s3; of a result of Type s3PreSigned, give its SourceSpec",
            )
        if "Source" in fields:
            self.take(fields.pop("Source"), _below(place, "Source"), ("Type", "Params"))
        if "Params" in fields:
            self.take(fields.pop("Params"), _below(place, "Params"), ())
        for name, value in fields.items():
            where = _below(place, name)
            if name in self.values:
                raise self._failed(where, f"it is also said by {self._places[name]}", "say it once")
            self._places[name] = where
            self.values[name] = self._value(name, value, where)

    def _value(self, name: str, value: object, place: str) -> object:
        if name in ("Mode", "OnEmpty") and isinstance(value, str):
            return value.lower()
        if name == "Partition" and isinstance(value, Mapping):
            partition = self._named(value, place, _PARTITION_FIELDS)
            if isinstance(kind := partition.get("Type"), str):
                partition["Type"] = kind.lower() or "none"
            return partition
        return value

    def _named(self, document: object, place: str, known: Sequence[str]) -> dict[str, Any]:
        """Return an object with its keys as they are spelled."""
        if not isinstance(document, Mapping):
            raise self._failed(place, "expected an object", f"an object of {', '.join(known)}")
        spelled = {name.lower(): name for name in known}
        named: dict[str, Any] = {}
        for key, value in document.items():
            name = spelled.get(str(key).lower())
            if name is None:
                hint = f"{_nearest(str(key), known)}known: {', '.join(known)}"
                raise self._failed(_below(place, str(key)), "unknown key", hint)
            if name in named:
                raise self._failed(_below(place, name), "it stands there twice", "say it once")
            named[name] = value
        return named

    def _failed(self, place: str, reason: str, hint: str) -> InputError:
        shown = self._join(place) or "the source"
        return self._failure(f"{self._source}: {shown}: {reason}", hint=hint)

    def _join(self, place: str) -> str:
        return _below(self._prefix, place) if place else self._prefix


def _below(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _nearest(name: str, known: Sequence[str]) -> str:
    # Loaded here: 4 ms that only a failure needs.
    from difflib import get_close_matches  # noqa: PLC0415

    spelled = {each.lower(): each for each in known}
    nearest = get_close_matches(name.lower(), spelled, n=1)
    return f"did you mean {spelled[nearest[0]]}? " if nearest else ""


_FIELDS: Final = tuple(field_name(name) for name in InputSource.__struct_fields__)
_PARTITION_FIELDS: Final = tuple(field.encode_name for field in msgspec.structs.fields(Partition))


def source_defects(source: InputSource) -> Iterator[Defect]:
    """Yield what is wrong with a source: the field, the reason, and what to do."""
    if not _BUCKET.fullmatch(source.bucket):
        yield (
            "Bucket",
            f"{source.bucket[:100]!r} is not a bucket name" if source.bucket else "empty",
            "a bucket has 3 to 63 letters, digits, dots, hyphens",
        )
    yield from _key_defects(source.key)
    if source.filter:
        try:
            Pattern(source.filter)
        except PatternInvalidError as error:
            yield "Filter", str(error), "it has the syntax of Python's re"
    elif source.anchored:
        yield "Anchored", "there is no Filter", "give Filter, or leave it out"
    yield from _place_defects(source)
    if source.checksum_sha256 and not _SHA256.fullmatch(source.checksum_sha256):
        yield (
            "ChecksumSHA256",
            f"{source.checksum_sha256[:100]!r} is not a SHA-256 in base64",
            "give it as S3 does: 44 characters, and behind them -N for an upload in N parts",
        )
    if source.partition is not None:
        for field, reason, hint in partition_defects(source.partition):
            yield f"Partition.{field}", reason, hint


def _key_defects(key: str) -> Iterator[Defect]:
    hint = "give the key as the bucket has it"
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        yield "Key", "it is not UTF-8", hint
        return
    if size > MAX_KEY_BYTES:
        yield "Key", f"it has {size} bytes, more than {MAX_KEY_BYTES}", hint
    if "\0" in key:
        yield "Key", "it has a NUL character", hint


def _place_defects(source: InputSource) -> Iterator[Defect]:
    """Yield what is wrong with where objects come from and go to."""
    if source.endpoint and (reason := _endpoint_defect(source.endpoint)):
        yield "Endpoint", reason, "it is like https://s3.example.com:9000"
    for field, value in (
        ("Region", source.region),
        ("VersionID", source.version_id),
        ("Profile", source.profile),
        ("Alias", source.alias),
    ):
        if _CONTROL.search(value) or len(value) > MAX_KEY_BYTES:
            yield field, "it has control characters, or is too long", "write it as it is"
    if source.no_sign and source.profile:
        yield "Profile", "there is NoSign as well", "requests are signed by Profile, or not at all"
    if reason := rules.path_defect(source.target_path) or _text_defect(source.target):
        yield (
            "Target",
            f"{source.target[:200]!r} is no directory of the session: its {reason}",
            "give it as /inputs or as inputs/plates",
        )


def _text_defect(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "path is not UTF-8"
    return ""


def _endpoint_defect(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        _port = parts.port
    except ValueError as error:
        return f"it is no URL: {error}"
    if parts.username is not None or parts.password is not None:
        # Not shown: it may be one that is in use.
        return "it holds a user or a password"
    if parts.scheme not in ("http", "https") or not parts.hostname or _CONTROL.search(endpoint):
        return f"{endpoint[:200]!r} is no endpoint"
    if parts.query or parts.fragment:
        return f"{endpoint[:200]!r} has more than a path"
    return ""
