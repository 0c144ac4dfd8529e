"""What may stand in a manifest: the rules for one entry, in bulk, and between entries.

The rules for one entry (`entry_defect`, `path_defect`) are the authority and find the words. The
bulk check (`are_sound`) only says that none of them can be broken, some twenty times faster; where
it says no, the caller asks entry by entry. It may be too strict and must never be too lax; a
property test compares the two.

Paths are those of Linux: bytes that are not UTF-8 stand in a `str` as U+DC80 to U+DCFF (PEP 383),
and a backslash is an ordinary character. Nothing here looks at a disk.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, islice
from operator import eq, lt
from typing import Final

from agent_plugin.content.digest import EMPTY_HASH

# NAME_MAX and PATH_MAX: https://man7.org/linux/man-pages/man7/path_resolution.7.html, limits.h.
MAX_NAME_BYTES: Final = 255
MAX_PATH_BYTES: Final = 4096
# off_t: no file on Linux can be larger.
MAX_SIZE_BYTES: Final = 2**63 - 1
# The years 1 to 9999, which is what a date can say in most programs. Files have odd times that
# nobody looks at: 1601 where Windows has none. utimensat(2) takes all of them, and gives a file
# the nearest that its file system can keep: ext4 has 1901 to 2446, XFS ends in 2486.
MIN_MTIME_US: Final = -62_135_596_800 * 1_000_000
MAX_MTIME_US: Final = 253_402_300_800 * 1_000_000 - 1

_HASH: Final = re.compile(r"[0-9a-f]{32}")
_HEX_DIGITS: Final = b"0123456789abcdef"
_INTEGER: Final = {int}
_DRIVE: Final = re.compile(r"[A-Za-z]:")
_DRIVE_AFTER_NUL: Final = re.compile(rb"\0[A-Za-z]:")
# UTF-8 needs at most 4 bytes for a character.
_UTF8_BYTES: Final = 4


def path_defect(path: str) -> str | None:
    """Return why a path can not be one below a root on Linux, or None when it can."""
    if not path:
        return "path is empty"
    # First, because the names of a hostile path could take twenty times its memory.
    if len(path) > MAX_PATH_BYTES:
        return _length_defect(len(path.encode("utf-8", "replace")))
    if "\0" in path:
        return "path holds a NUL"
    if path.startswith("/"):
        return "path is absolute"
    if _DRIVE.match(path):
        return "path starts with a drive letter"
    return _names_defect(path) or _bytes_defect(path)


def _names_defect(path: str) -> str | None:
    names = path.split("/")
    if not names[-1]:
        return "path ends with a slash"
    if "" in names:
        return "path holds a double slash"
    if "." in names:
        return "path holds the component '.'"
    if ".." in names:
        return "path holds the component '..'"
    return None


def _bytes_defect(path: str) -> str | None:
    try:
        encoded = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        lone = ord(path[error.start])
        return f"path holds the lone surrogate U+{lone:04X}, which stands for no byte of a name"
    if encoded.decode("utf-8", "surrogateescape") != path:
        return "path holds lone surrogates that spell valid UTF-8, a second spelling of one name"
    if len(encoded) > MAX_PATH_BYTES:
        return _length_defect(len(encoded))
    longest = max(map(len, encoded.split(b"/")))
    if longest > MAX_NAME_BYTES:
        return f"path holds a component of {longest} bytes, more than {MAX_NAME_BYTES}"
    return None


def _length_defect(size: int) -> str:
    return f"path is {size} bytes long, more than {MAX_PATH_BYTES}"


def entry_defect(path: str, hash_hex: str, size: object, mtime: object) -> str | None:
    """Return which rule an entry breaks, in words, or None when it breaks none.

    Args:
        path: Relative to the manifest's root.
        hash_hex: The xxh128 of the content.
        size: Bytes.
        mtime: Microseconds since the epoch; may be negative.
    """
    return (
        path_defect(path)
        or _integer_defect("size", size, 0, MAX_SIZE_BYTES)
        or _integer_defect("mtime", mtime, MIN_MTIME_US, MAX_MTIME_US)
        or _hash_defect(hash_hex, is_empty=size == 0)
    )


def _integer_defect(key: str, value: object, lowest: int, highest: int) -> str | None:
    # bool is an int for isinstance, and not in a manifest.
    if type(value) is not int:
        return f"{key} is not an integer but {type(value).__name__}"
    if value < lowest:
        return f"{key} is less than {lowest}"
    if value > highest:
        return f"{key} is more than {highest}"
    return None


def _hash_defect(hash_hex: str, *, is_empty: bool) -> str | None:
    if not _HASH.fullmatch(hash_hex):
        return "hash is not 32 lower-case hexadecimal digits"
    if is_empty and hash_hex != EMPTY_HASH:
        return "size is 0, but hash is not that of an empty file"
    if not is_empty and hash_hex == EMPTY_HASH:
        return "hash is that of an empty file, but size is not 0"
    return None


def are_numbers(sizes: Sequence[int], mtimes: Sequence[int]) -> bool:
    """Say whether all sizes and mtimes are integers within their limits.

    Args:
        sizes: One or more, in bytes.
        mtimes: Parallel to it, in microseconds since the epoch.
    """
    return _are_integers(sizes, 0, MAX_SIZE_BYTES) and _are_integers(
        mtimes, MIN_MTIME_US, MAX_MTIME_US
    )


def _are_integers(values: Sequence[int], lowest: int, highest: int) -> bool:
    return set(map(type, values)) == _INTEGER and min(values) >= lowest and max(values) <= highest


def are_sound(paths: Sequence[str], hashes: Sequence[str], sizes: Sequence[int]) -> bool:
    """Say whether no entry breaks a rule of its own; False means: look at each.

    Args:
        paths: One or more; the other two are parallel to it. Some thousands at a time are
            fastest, because what is made of them then stays in the processor's cache.
        hashes: As in entry_defect.
        sizes: As in entry_defect; of them only which are 0 is looked at, see are_numbers.
    """
    return _are_hashes(hashes, sizes) and are_paths(paths)


def _are_hashes(hashes: Sequence[str], sizes: Sequence[int]) -> bool:
    joined = "\0".join(hashes)
    separators = "\0" * (len(hashes) - 1)
    # Each 33rd character is a separator, and nothing else is other than a digit: so all have 32.
    if len(joined) != 33 * len(hashes) - 1 or joined[32::33] != separators or not joined.isascii():
        return False
    if joined.encode().translate(None, _HEX_DIGITS) != separators.encode():
        return False
    if 0 not in sizes and EMPTY_HASH not in hashes:
        return True
    return all(
        (size == 0) == (hash_hex == EMPTY_HASH)
        for size, hash_hex in zip(sizes, hashes, strict=True)
    )


def are_paths(paths: Sequence[str]) -> bool:
    """Say whether each can be a path below a root; False means: ask path_defect of each.

    Args:
        paths: One or more, some thousands at most, as for are_sound.
    """
    # First, because several copies are made of them all.
    longest = max(map(len, paths))
    if longest > MAX_PATH_BYTES // _UTF8_BYTES:
        return False
    text = "\0".join(paths)
    try:
        encoded = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    is_ascii = text.isascii()
    names = b"\0%b\0" % encoded.replace(b"/", b"\0")
    if (
        text.count("\0") != len(paths) - 1
        or b"\0\0" in names
        # One search for the dot in front, because few names have it.
        or (b"\0." in names and (b"\0.\0" in names or b"\0..\0" in names))
        or (b":" in encoded and _DRIVE_AFTER_NUL.search(b"\0" + encoded))
        or not (is_ascii or encoded.decode("utf-8", "surrogateescape") == text)
    ):
        return False
    if longest * (1 if is_ascii else _UTF8_BYTES) <= MAX_NAME_BYTES:
        return True
    return max(map(len, names.split(b"\0"))) <= MAX_NAME_BYTES


def is_strictly_ascending(paths: Sequence[str]) -> bool:
    """Say whether each path is greater than the one before, by code points."""
    return all(map(lt, paths, islice(paths, 1, None)))


def find_duplicate(ascending: Sequence[str]) -> str | None:
    """Return a path that stands more than once in paths sorted by code points."""
    repeats = compress(ascending, map(eq, ascending, islice(ascending, 1, None)))
    return next(repeats, None)


def iter_clashes(ascending: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each file that another path needs to be a directory, and the first such path.

    What starts with a path follows it directly, so only a path whose successor starts with it is
    looked at closer: `a` before `a-b`. No directory is listed, because a hostile manifest can name
    a hundred million of them.

    Args:
        ascending: Paths sorted by code points, none twice.
    """
    followed = map(str.startswith, islice(ascending, 1, None), ascending)
    for file in compress(ascending, followed):
        directory = file + "/"
        position = bisect_left(ascending, directory)
        if position < len(ascending) and ascending[position].startswith(directory):
            yield file, ascending[position]


def folded(path: str) -> str:
    """Return what is equal for paths that a file system may take for one.

    Canonical caseless matching, section 3.13 of the Unicode standard.
    """
    # Imported here because its tables take longer to load than the rest of this module.
    from unicodedata import normalize  # noqa: PLC0415

    return normalize("NFC", normalize("NFD", path).casefold())


def find_folding_clashes(paths: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of paths that are one to a file system that ignores case or composition.

    Two paths fold together when they are equal after Unicode case folding and NFC; also a file and
    a path below what it folds to. Directories that fold together are no clash by themselves: what
    is below them lands in one. Meant for destinations such as ext4 with casefold, SMB, or macOS.

    Returns:
        For each path that folds to an earlier one: (earlier, it); then, for each file that a
        directory folds to: (file, one below the directory). Empty when all can exist together.
    """
    clashes: list[tuple[str, str]] = []
    by_folded: dict[str, str] = {}
    for path in paths:
        first = by_folded.setdefault(folded(path), path)
        if first is not path:
            clashes.append((first, path))
    clashes.extend(
        (by_folded[file], by_folded[below]) for file, below in iter_clashes(sorted(by_folded))
    )
    return clashes
