"""The `publishers` of a job document, and how one is spelled on a command line.

The form is that of Bacalhau's publishers: `{"Type": "s3", "Params": {…}}`. Names are taken in any
case, and `Compress`, the older spelling, as what it stands for.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from agent_plugin import schema
from agent_plugin.content.errors import JobInvalidError, PlaceholderUnknownError
from agent_plugin.content.layout import MAX_KEY_BYTES
from agent_plugin.publish.placeholders import NAMES, fill

Encoding = Literal["plain", "gzip", "zstd"]

# How the names of archives end, the first of each is appended where none is there.
SUFFIXES: Final = {"gzip": (".tar.gz", ".tgz"), "zstd": (".tar.zst", ".tzst")}

_SCHEME: Final = "s3://"
# A key may hold commas, so only these begin an option.
_OPTION: Final = re.compile(r",(?:opt|option)=", re.IGNORECASE)
_TRUTH: Final = {"true": True, "false": False}
_SWITCHES: Final = frozenset({"compress", "overwrite", "required", "byroot"})
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


class PublisherParams(
    msgspec.Struct, frozen=True, rename="pascal", forbid_unknown_fields=True, omit_defaults=True
):
    """Where a task's outputs are published, and in which form.

    Attributes:
        bucket: Its name.
        key: With placeholders. Of plain objects the prefix, of an archive its whole name.
        endpoint: URL of another S3 server than the environment's.
        region: Other than the environment's.
        profile: Of the AWS configuration, for other credentials than the environment's.
        encoding: `plain`, or an archive that is compressed so; None is plain.
        compress: The older spelling of gzip and plain, kept only where it contradicts `encoding`.
        overwrite: Replace what stands at a key.
        required: The task has failed if it can not be published.
        by_root: Each root's files are below a name of its own.
        mtime: Of the files in an archive: as the outputs have it, or 0.
    """

    bucket: str
    key: Annotated[str, Meta(max_length=MAX_KEY_BYTES)]
    endpoint: Annotated[str, Meta(max_length=1024)] = ""
    region: Annotated[str, Meta(pattern=r"^[a-z0-9-]{0,32}\Z")] = ""
    profile: Annotated[str, Meta(max_length=128)] = ""
    encoding: Encoding | None = None
    compress: bool | None = None
    overwrite: bool = False
    required: bool = False
    by_root: bool = False
    mtime: Literal["keep", "zero"] = "keep"


class Publisher(msgspec.Struct, frozen=True, rename="pascal", forbid_unknown_fields=True):
    """One publisher of a job."""

    type: Literal["s3"]
    params: PublisherParams

    @property
    def encoding(self) -> Encoding:
        """In which form the outputs are published."""
        return self.params.encoding or "plain"

    @property
    def key_template(self) -> str:
        """The key with what an archive's name has to end in, or with a prefix's slash."""
        key = self.params.key
        if self.encoding == "plain":
            return key if key.endswith("/") else f"{key}/"
        suffixes = SUFFIXES[self.encoding]
        return key if key.endswith(suffixes) else key + suffixes[0]


Publishers = Annotated[tuple[Publisher, ...], Meta(max_length=10)]


def spelled(publishers: object) -> object:
    """Return the publishers of a decoded document with names and words in their own spelling.

    What is no publisher stays as it is, for the schema to refuse.
    """
    if not isinstance(publishers, list | tuple):
        return publishers
    return [_spelled(publisher) for publisher in publishers]


def _spelled(publisher: object) -> object:
    document = schema.spelled(publisher, Publisher)
    if not isinstance(document, dict):
        return document
    _lower(document, "Type")
    if isinstance(params := document.get("Params"), dict):
        for word in ("Encoding", "Mtime"):
            _lower(params, word)
        if isinstance(compress := params.get("Compress"), bool):
            meant = "gzip" if compress else "plain"
            if params.setdefault("Encoding", meant) == meant:
                del params["Compress"]
    return document


def _lower(document: dict[str, Any], name: str) -> None:
    if isinstance(document.get(name), str):
        document[name] = document[name].lower()


def defects(publishers: Sequence[Publisher], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield (key, reason, hint) for what the schema of publishers can not tell.

    Args:
        publishers: Of one job.
        prefix: The path of the list in the document.

    Raises:
        PlaceholderUnknownError: Naming the key's path and the column.
    """
    seen: dict[tuple[str, str, str], int] = {}
    for index, publisher in enumerate(publishers):
        params, key = publisher.params, f"{prefix}[{index}].Params"
        if params.compress is not None:
            yield (
                f"{key}.Encoding",
                f"{params.encoding} is not what Compress: {str(params.compress).lower()} says",
                "leave Compress out: it is the older spelling of gzip (true) and plain (false)",
            )
        if not _BUCKET.fullmatch(params.bucket):
            yield (
                f"{key}.Bucket",
                f"{params.bucket[:100]!r} is no bucket's name",
                "it has 3 to 63 letters of ASCII, digits, `.`, `_`, `-`, these not at its ends",
            )
        yield from _endpoint_defects(params.endpoint, f"{key}.Endpoint")
        yield from _key_defects(publisher, f"{key}.Key")
        place = (params.endpoint, params.bucket, publisher.key_template)
        if (first := seen.setdefault(place, index)) != index:
            yield (
                f"{key}.Key",
                f"{params.key!r} is also where publishers[{first}] publishes to",
                "give each publisher a key of its own",
            )


def _endpoint_defects(endpoint: str, key: str) -> Iterator[tuple[str, str, str]]:
    if not endpoint:
        return
    try:
        parts = urlsplit(endpoint)
        # Reading the port is what checks it.
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        parts, sound = urlsplit(""), False
    if not sound or parts.query or parts.fragment or parts.username or not endpoint.isprintable():
        # A name and password in it must not be told again.
        yield key, "it is no endpoint", "it is like https://s3.example.com:9000"


def _key_defects(publisher: Publisher, key: str) -> Iterator[tuple[str, str, str]]:
    template = publisher.params.key
    if not template:
        yield key, "it is empty", "give a prefix, such as results/{jobID}, or an archive's name"
        return
    try:
        shape = fill(template, dict.fromkeys(NAMES, "x"))
    except PlaceholderUnknownError as error:
        raise PlaceholderUnknownError(f"{key}, {error.message}", hint=error.hint) from error
    components = shape.split("/")
    if publisher.encoding == "plain" and not components[-1]:
        components.pop()
    if not components or set(components) & {"", ".", ".."}:
        yield (
            key,
            f"{template[:200]!r} has an empty, `.` or `..` component",
            "of an archive it is the whole name; only a prefix of plain objects may end in /",
        )
    elif _CONTROL.search(shape):
        yield key, f"{template[:200]!r} has a control character", ""
    else:
        try:
            shape.encode()
        except UnicodeEncodeError:
            yield key, f"{template[:200]!r} is not valid Unicode", ""


def parse_all(texts: Sequence[str], source: str) -> tuple[Publisher, ...]:
    """Return the publishers that a command line spells: `s3://bucket/key[,opt=name=value]…` each.

    The key is taken as it is, up to the first `,opt=`.

    Args:
        texts: The spellings.
        source: What to call them in messages, the option's name for example.

    Raises:
        JobInvalidError: One is none, or they break a rule for publishers.
        PlaceholderUnknownError: A key names a placeholder that there is not.
    """
    publishers: tuple[Publisher, ...] = schema.conform(
        spelled([_split(text, source) for text in texts]),
        Publishers,
        source=source,
        failure=JobInvalidError,
        prefix="publishers",
    )
    for where, reason, hint in defects(publishers, "publishers"):
        raise JobInvalidError(f"{source}: {where}: {reason}", hint=hint)
    return publishers


def _split(text: str, source: str) -> dict[str, object]:
    place, *options = _OPTION.split(text)
    if not place.lower().startswith(_SCHEME):
        raise JobInvalidError(
            f"{source}: {text[:200]!r} is no publisher",
            hint="it is like s3://bucket/results/{jobID},opt=encoding=gzip,opt=region=us-east-1",
        )
    bucket, _, key = place[len(_SCHEME) :].partition("/")
    params: dict[str, object] = {"Bucket": bucket, "Key": key}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name.lower() in ("bucket", "key"):
            raise JobInvalidError(
                f"{source}: opt={option[:200]} is no option", hint="it is like opt=region=us-east-1"
            )
        is_switch = name.lower() in _SWITCHES
        params[name] = _TRUTH.get(value.lower(), value) if is_switch else value
    return {"Type": "s3", "Params": params}
