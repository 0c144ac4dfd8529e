"""Manifests: which files, with which content, stand below a root.

One version is in use, `2023-03-03`; `encode` writes it byte for byte as the Deadline Cloud client
does, `decode` reads it and holds it to our own rules, since a manifest may come from anybody who
can write to the store. A `Manifest` that exists has passed them: there is no other way to make
one, and it never changes.

Speed matters here: a million files are one manifest, read at each session start. So entries are
structs that the garbage collector does not track, and are checked in bulk (manifest_rules.py).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Final, Self, TypeVar

import msgspec
import xxhash

from agent_plugin.content import manifest_rules as rules
from agent_plugin.content.digest import HASH_ALGORITHM, Digest
from agent_plugin.content.errors import ManifestInvalidError, PathClashError, UnsafePathError
from agent_plugin.content.lone_surrogates import MARK, LoneSurrogateReader
from agent_plugin.content.manifest_rules import find_folding_clashes

__all__ = [
    "MAX_ENTRIES",
    "MAX_MANIFEST_BYTES",
    "VERSION",
    "FileEntry",
    "Manifest",
    "ManifestDiff",
    "decode",
    "diff",
    "encode",
    "find_folding_clashes",
    "merge",
    "subtree",
]

VERSION: Final = "2023-03-03"
# Our own limits, so that a hostile manifest can not use up the host's memory: a million entries
# take some 130 MiB as a document and 300 MiB in memory (docs/BENCHMARKS.md, manifest). There is
# room for paths of 400 letters, or 70 that JSON escapes; the worst of documents takes nine times
# its size in memory while it is refused, and a second for each 14 MiB.
MAX_ENTRIES: Final = 1_000_000
MAX_MANIFEST_BYTES: Final = 512 * 1024 * 1024

# What is checked or encoded at a time: about 1 MiB of entries, which stays in the cache.
_CHUNK_ENTRIES: Final = 4096
_SHOWN_CHARACTERS: Final = 200

_HEAD: Final = f'{{"hashAlg":"{HASH_ALGORITHM}","manifestVersion":"{VERSION}","paths":['.encode()
_BOM: Final = b"\xef\xbb\xbf"
_DEL: Final = b"\x7f"
_ASTRAL: Final = re.compile("[\U00010000-\U0010ffff]")
_PLACE: Final = re.compile(
    r"(?:\.paths\[(?P<index>[0-9]{1,9})\](?:\.(?P<entry_key>[a-z]+))?|\.(?P<key>[A-Za-z]+))`"
)
_HINT: Final = (
    "the manifest was damaged, or written by a program that breaks the format; "
    "submit the job, or run the task that wrote it, again"
)
# What to do about a file of this host, by the first word of what is wrong with it.
_NEW: Final = "the new manifest"
_NEW_HINTS: Final = {
    "path": "rename the file",
    "mtime": "touch the file: its time is not of the years 1 to 9999",
}


class FileEntry(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """One file of a manifest. The fields stand in the order of the canonical encoding.

    Attributes:
        hash: xxh128 of the content, 32 lower-case hexadecimal digits.
        mtime: Microseconds since the epoch, rounded down; negative before 1970.
        path: Relative to the manifest's root, separated by `/`; bytes that are not UTF-8 stand in
            it as U+DC80 to U+DCFF, as `os.fsdecode` gives them.
        size: Bytes.
    """

    hash: str
    mtime: Annotated[int, msgspec.Meta(ge=rules.MIN_MTIME_US, le=rules.MAX_MTIME_US)]
    path: str
    size: Annotated[int, msgspec.Meta(ge=0, le=rules.MAX_SIZE_BYTES)]

    @property
    def digest(self) -> Digest:
        """What blob the file's content is."""
        return Digest(self.hash, self.size)


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Manifest:
    """At least one file below a root; valid and immutable. A root without files has no manifest.

    Args:
        entries: In any order.
        source: What to call the manifest in messages.
        are_parsed: Whether msgspec made the entries, and so checked their types and numbers.

    Attributes:
        entries: Ascending by the UTF-16 big-endian bytes of their paths, which is not the order of
            `str`: characters outside the BMP come before U+E000.
        total_bytes: The sum of the sizes.

    Raises:
        ManifestInvalidError: On creation, when an entry breaks a rule, or two can not stand
            together, or there are none or more than MAX_ENTRIES. It names the first one by its
            place in `entries`, its path and the reason.
    """

    entries: Sequence[FileEntry]
    total_bytes: int

    def __init__(
        self,
        entries: Iterable[FileEntry],
        *,
        source: str = _NEW,
        are_parsed: bool = False,
    ) -> None:
        given = tuple(entries)
        if not given:
            raise _invalid(source, "paths is empty; a root without files has no manifest")
        if len(given) > MAX_ENTRIES:
            raise _invalid(source, f"{len(given)} entries are more than {MAX_ENTRIES}")
        if not are_parsed:
            _check_numbers(given, source)
        total_bytes = _check_paths_and_hashes(given, source)
        if total_bytes > rules.MAX_SIZE_BYTES:
            raise _invalid(source, f"the sizes add up to more than {rules.MAX_SIZE_BYTES}")
        object.__setattr__(self, "entries", _canonical_order(given, source))
        object.__setattr__(self, "total_bytes", total_bytes)

    @classmethod
    def of(cls, entries: Iterable[FileEntry]) -> Self:
        """Return the manifest of these entries, sorted and checked.

        Raises:
            ManifestInvalidError: As on creation.
        """
        return cls(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"<Manifest of {len(self.entries)} files, {self.total_bytes} bytes>"

    def by_path(self) -> dict[str, FileEntry]:
        """Return a new dictionary of the entries by their paths, in their order."""
        return {entry.path: entry for entry in self.entries}


@dataclass(frozen=True, slots=True)
class ManifestDiff:
    """What became of a tree; each part is ascending as in a manifest.

    Attributes:
        new: Entries of `after` whose path is not in `before`.
        changed: Entries of `after` whose content (hash and size) is not that in `before`.
        deleted: Entries of `before` whose path is not in `after`.
        touched: Entries of `after` with the same content and another mtime.
    """

    new: tuple[FileEntry, ...]
    changed: tuple[FileEntry, ...]
    deleted: tuple[FileEntry, ...]
    touched: tuple[FileEntry, ...]


class _Document(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, rename="camel"):
    hash_alg: str
    manifest_version: str
    paths: tuple[FileEntry, ...]
    total_size: int


class _VersionOnly(msgspec.Struct, rename="camel"):
    manifest_version: str


class _PathOnly(msgspec.Struct, gc=False):
    path: str | int | float | bool | None = None


class _PathsOnly(msgspec.Struct):
    paths: list[_PathOnly]


_Shape = TypeVar("_Shape")


def decode(data: bytes, *, source: str, expected_hash: str | None = None) -> Manifest:
    """Return the manifest that a document holds, in whatever order and layout its JSON is.

    Of a key that stands twice in one object the last counts, as with the client. Names that differ
    in case or composition alone are valid; see find_folding_clashes.

    Args:
        data: The whole document.
        source: Where it comes from, for messages; a key or a file name.
        expected_hash: The xxh128 that the job gives for the document, 32 hexadecimal digits.

    Raises:
        ManifestInvalidError: It is not the expected document, not one of version 2023-03-03, or
            breaks a rule. The message has the source, the entry's place and path, and the reason.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise _invalid(source, f"{len(data)} bytes are more than {MAX_MANIFEST_BYTES}")
    if expected_hash is not None:
        actual_hash = xxhash.xxh3_128_hexdigest(data)
        if actual_hash != expected_hash.lower():
            raise _invalid(source, f"its xxh128 is {actual_hash}, but the job says {expected_hash}")
    if data.startswith(_BOM):
        raise _invalid(source, "it starts with a byte order mark")
    document = _parse(data, source)
    if document.manifest_version != VERSION:
        raise _wrong_version(source, document.manifest_version)
    if document.hash_alg != HASH_ALGORITHM:
        raise _invalid(source, f"hashAlg is {_show(document.hash_alg)}, not {HASH_ALGORITHM!r}")
    manifest = Manifest(document.paths, source=source, are_parsed=True)
    if document.total_size != manifest.total_bytes:
        raise _invalid(
            source,
            f"totalSize is {_show(document.total_size)}, but the sizes add up to "
            f"{manifest.total_bytes}",
        )
    return manifest


def encode(manifest: Manifest) -> bytes:
    """Return the canonical bytes, equal to those of the client for the same files.

    They are ASCII: `json.dumps` with sorted keys and without white space. Whatever `decode` would
    refuse can not get here, since no Manifest can hold it.
    """
    parts = [
        _encode_entries(manifest.entries[start : start + _CHUNK_ENTRIES])
        for start in range(0, len(manifest.entries), _CHUNK_ENTRIES)
    ]
    # Into the first and the last part, so that the whole is put together only once.
    parts[0] = _HEAD + parts[0]
    parts[-1] += b'],"totalSize":%d}' % manifest.total_bytes
    return b",".join(parts)


def merge(manifests: Iterable[Manifest]) -> Manifest | None:
    """Return one manifest of all entries; of those with one path the last manifest's counts.

    One manifest is returned unchanged, and None for none.

    Raises:
        PathClashError: One manifest has a file where another needs a directory.
        ManifestInvalidError: Together they have more than MAX_ENTRIES entries.
    """
    given = tuple(manifests)
    if len(given) <= 1:
        return given[0] if given else None
    merged: dict[str, FileEntry] = {}
    for manifest in given:
        merged.update(manifest.by_path())
    for file, below in rules.iter_clashes(sorted(merged)):
        raise PathClashError(
            f"{_show(file)} is a file in one manifest, and a directory in another, which has "
            f"{_show(below)}",
            hint="give the outputs of one of the steps another path",
        )
    return Manifest(merged.values(), source="the merged manifest")


def diff(before: Manifest | None, after: Manifest | None) -> ManifestDiff:
    """Return what became of a tree between two manifests; None stands for no files at all."""
    old = {} if before is None else before.by_path()
    new, changed, touched = [], [], []
    for entry in () if after is None else after.entries:
        known = old.pop(entry.path, None)
        if known is None:
            new.append(entry)
        elif (known.hash, known.size) != (entry.hash, entry.size):
            changed.append(entry)
        elif known.mtime != entry.mtime:
            touched.append(entry)
    return ManifestDiff(tuple(new), tuple(changed), tuple(old.values()), tuple(touched))


def subtree(manifest: Manifest, directory: str) -> Manifest | None:
    """Return the entries below a directory under their own paths, or None when there are none.

    Args:
        manifest: The whole.
        directory: Relative to the manifest's root, separated by `/`; `.` or empty means all.

    Raises:
        UnsafePathError: The directory is absolute or has the component `..`.
    """
    names = [name for name in directory.split("/") if name not in ("", ".")]
    if directory.startswith("/") or ".." in names:
        raise UnsafePathError(
            f"the directory {_show(directory)} is not below the manifest's root",
            hint="name a directory relative to the root, without '..'",
        )
    if not names:
        return manifest
    prefix = "/".join(names) + "/"
    below = [entry for entry in manifest.entries if entry.path.startswith(prefix)]
    return Manifest.of(below) if below else None


def _invalid(source: str, reason: str, hint: str = _HINT) -> ManifestInvalidError:
    return ManifestInvalidError(f"{source}: {reason}", hint=hint)


def _wrong_version(source: str, version: str) -> ManifestInvalidError:
    return _invalid(source, f"manifestVersion is {_show(version)}, not {VERSION!r}")


def _invalid_entry(source: str, index: int, path: str, reason: str) -> ManifestInvalidError:
    hint = _NEW_HINTS.get(reason.partition(" ")[0], _HINT) if source == _NEW else _HINT
    return _invalid(source, f"entry {index} ({_show(path)}): {reason}", hint)


def _show(value: str | int) -> str:
    # ASCII, because a message goes to logs; cut first, because a hostile name may be huge.
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else f"an integer of {value.bit_length()} bits"
    shown = ascii(value[:_SHOWN_CHARACTERS])
    if len(shown) <= _SHOWN_CHARACTERS:
        return shown
    return f"{shown[:_SHOWN_CHARACTERS]}... of {len(value)} characters"


def _check_numbers(entries: tuple[FileEntry, ...], source: str) -> None:
    sizes = [entry.size for entry in entries]
    if not rules.are_numbers(sizes, [entry.mtime for entry in entries]):
        _find_unsound(entries, 0, source)


def _check_paths_and_hashes(entries: tuple[FileEntry, ...], source: str) -> int:
    """Return the sum of the sizes, which is found on the way."""
    total_bytes = 0
    for start in range(0, len(entries), _CHUNK_ENTRIES):
        chunk = entries[start : start + _CHUNK_ENTRIES]
        sizes = [entry.size for entry in chunk]
        total_bytes += sum(sizes)
        if not rules.are_sound(
            [entry.path for entry in chunk], [entry.hash for entry in chunk], sizes
        ):
            _find_unsound(chunk, start, source)
    return total_bytes


def _find_unsound(chunk: Sequence[FileEntry], start: int, source: str) -> None:
    for index, entry in enumerate(chunk, start):
        reason = rules.entry_defect(entry.path, entry.hash, entry.size, entry.mtime)
        if reason is not None:
            raise _invalid_entry(source, index, entry.path, reason)


def _canonical_order(entries: tuple[FileEntry, ...], source: str) -> tuple[FileEntry, ...]:
    paths = [entry.path for entry in entries]
    is_ascending = rules.is_strictly_ascending(paths)
    ascending = paths if is_ascending else sorted(paths)
    if not is_ascending and (duplicate := rules.find_duplicate(ascending)):
        first = paths.index(duplicate)
        again = paths.index(duplicate, first + 1)
        raise _invalid_entry(source, again, duplicate, f"path is that of entry {first}, too")
    for file, below in rules.iter_clashes(ascending):
        reason = f"is a file, but entry {paths.index(below)} ({_show(below)}) is below it"
        raise _invalid_entry(source, paths.index(file), file, reason)
    # Without characters outside the BMP, the order of str is that of UTF-16, and far cheaper.
    if not all(map(str.isascii, paths)) and any(map(_ASTRAL.search, paths)):
        return tuple(sorted(entries, key=_utf16_path))
    return entries if is_ascending else tuple(sorted(entries, key=attrgetter("path")))


def _utf16_path(entry: FileEntry) -> bytes:
    return entry.path.encode("utf-16-be", "surrogatepass")


def _encode_entries(entries: Sequence[FileEntry]) -> bytes:
    try:
        encoded = msgspec.json.encode(entries)
    except UnicodeEncodeError:  # lone surrogates, which msgspec does not write
        encoded = _DEL
    # msgspec escapes ASCII as json does, but for DEL, and leaves everything above as it is.
    if not encoded.isascii() or _DEL in encoded:
        encoded = json.dumps(msgspec.to_builtins(entries), separators=(",", ":")).encode()
    return encoded[1:-1]


def _parse(data: bytes, source: str) -> _Document:
    reader = LoneSurrogateReader(data)
    try:
        document = reader.decode(_Document)
    except msgspec.ValidationError as error:
        raise _explain(error, reader, source) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(source, f"it is not JSON in UTF-8: {error}") from error
    if not reader.is_marked:
        return document
    paths = tuple(
        msgspec.structs.replace(entry, path=reader.restored(entry.path))
        if MARK in entry.path
        else entry
        for entry in document.paths
    )
    return msgspec.structs.replace(document, paths=paths)


def _explain(
    error: msgspec.ValidationError, reader: LoneSurrogateReader, source: str
) -> ManifestInvalidError:
    version = _peek(reader, _VersionOnly)
    if version is not None and version.manifest_version != VERSION:
        return _wrong_version(source, version.manifest_version)
    # msgspec says "Expected `int`, got `bool` - at `$.paths[3].size`"; no place means the top. An
    # extra key of a hostile document can look like a place, so the index need not exist.
    complaint, _, place = str(error).rpartition(" - at `$")
    found = _PLACE.fullmatch(place)
    reason = ascii((complaint if found else str(error))[:_SHOWN_CHARACTERS])[1:-1]
    if found is None or found["index"] is None:
        return _invalid(source, f"{found['key'] if found else 'the document'}: {reason}")
    index = int(found["index"])
    if found["entry_key"]:
        reason = f"{found['entry_key']}: {reason}"
    listed = _peek(reader, _PathsOnly)
    path = listed.paths[index].path if listed and index < len(listed.paths) else None
    if not isinstance(path, str):
        return _invalid(source, f"entry {index}: {reason}")
    return _invalid_entry(source, index, reader.restored(path), reason)


def _peek(reader: LoneSurrogateReader, shape: type[_Shape]) -> _Shape | None:
    """Return those parts of a document that has failed already, or None when they fail as well."""
    try:
        return reader.decode(shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
