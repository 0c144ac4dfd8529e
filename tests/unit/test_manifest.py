"""The rules for manifests: every one of them broken once, and what must stay allowed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import xxhash

from agent_plugin.content import manifest as manifests
from agent_plugin.content.digest import EMPTY_HASH, Digest
from agent_plugin.content.errors import ManifestInvalidError, PathClashError, UnsafePathError
from agent_plugin.content.manifest import FileEntry, Manifest, ManifestDiff
from agent_plugin.content.manifest_rules import MAX_MTIME_US, MIN_MTIME_US

HASH = "15ae74710b17ad13fd43bec74e3c3fcd"
OTHER_HASH = "ef1356bdd61104cde5d51f9319697e02"
SOURCE = "Manifests/farm/queue/Inputs/1/2_input"


def entry(path: object = "a/b.txt", **changes: object) -> dict[str, object]:
    """Return an entry as JSON has it; a value of None leaves its key out."""
    values = {"hash": HASH, "mtime": 1_700_000_000_123_456, "path": path, "size": 3} | changes
    return {key: value for key, value in values.items() if value is not None}


def document(*entries: object, **changes: object) -> bytes:
    """Return a document with the right total of the sizes, unless it is among the changes."""
    listed = list(entries) or [entry()]
    sizes = [each.get("size", 0) for each in listed if isinstance(each, dict)]
    values = {
        "hashAlg": "xxh128",
        "manifestVersion": "2023-03-03",
        "paths": listed,
        "totalSize": sum(size for size in sizes if isinstance(size, int)),
    } | changes
    kept = {key: value for key, value in values.items() if value is not None}
    return json.dumps(kept, separators=(",", ":")).encode()


def bad_path(path: str) -> bytes:
    return document(entry("fine"), entry(path))


def with_text(old: str, new: str) -> bytes:
    """Return a document with something in it that json.dumps would not write."""
    changed = document().replace(old.encode(), new.encode())
    assert changed != document()
    return changed


# The name, the document, and what the message must hold besides the source.
BAD_DOCUMENTS: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("nothing", b"", ("not JSON",)),
    ("white space", b"  \n", ("not JSON",)),
    ("no JSON", b"hello", ("not JSON",)),
    ("a byte order mark", b"\xef\xbb\xbf" + document(), ("byte order mark",)),
    ("UTF-16", document().decode().encode("utf-16"), ("not JSON",)),
    ("something behind", document() + b"x", ("not JSON",)),
    ("two documents", document() * 2, ("not JSON",)),
    ("bytes that are not UTF-8", with_text("a/b", "a/@").replace(b"@", b"\xe9"), ("not JSON",)),
    ("raw surrogates", with_text("a/b", "@").replace(b"@", b"\xed\xb3\xa9"), ("not JSON",)),
    ("a raw control character", with_text("a/b", "a\x01b"), ("not JSON",)),
    ("an unknown escape", with_text("a/b", "a\\qb"), ("not JSON",)),
    ("half an escape", with_text("a/b", "a\\udc"), ("not JSON",)),
    ("a lone surrogate outside strings", b"\\udce9" + document(), ("not JSON",)),
    ("single quotes", document().replace(b'"', b"'"), ("not JSON",)),
    ("NaN", with_text('"size":3', '"size":NaN'), ("not JSON",)),
    ("a leading zero", with_text('"size":3', '"size":03'), ("not JSON",)),
    ("a trailing comma", with_text("}]", "},]"), ("not JSON",)),
    ("an array", b"[]", ("the document", "array")),
    ("a string", b'"manifest"', ("the document", "str")),
    ("null", b"null", ("the document", "null")),
    ("arrays nested deeply", b"[" * 200_000, ("the document", "array")),
    ("nesting in an extra key", b'{"x":' + b"[" * 200_000, ("`x`",)),
    (
        "nesting behind another version",
        b'{"hashAlg":1,"x":' + b'{"x":' * 200_000,
        ("hashAlg", "`int`"),
    ),
    ("no version", document(manifestVersion=None), ("the document", "`manifestVersion`")),
    ("another version", document(manifestVersion="2022-01-01"), ("'2022-01-01'", "'2023-03-03'")),
    ("a later version", document(manifestVersion="2025-12-04-beta", manifestType="x", hashAlg=1),
     ("manifestVersion is '2025-12-04-beta'",)),
    ("a version that is no string", document(manifestVersion=2023), ("manifestVersion", "`int`")),
    ("no hashAlg", document(hashAlg=None), ("`hashAlg`",)),
    ("another hashAlg", document(hashAlg="sha256"), ("hashAlg is 'sha256'", "'xxh128'")),
    ("hashAlg in upper case", document(hashAlg="XXH128"), ("hashAlg is 'XXH128'",)),
    ("no paths", document(paths=None), ("`paths`",)),
    ("no files", document(paths=[], totalSize=0), ("paths is empty",)),
    ("paths that is an object", document(paths={}), ("paths", "`object`")),
    ("no totalSize", document(totalSize=None), ("`totalSize`",)),
    ("a totalSize too large", document(totalSize=4), ("totalSize is 4", "add up to 3")),
    ("a totalSize too small", document(totalSize=0), ("totalSize is 0", "add up to 3")),
    ("a negative totalSize", document(totalSize=-3), ("totalSize is -3",)),
    ("a huge totalSize", document(totalSize=10**400), ("totalSize is an integer of 1329 bits",)),
    ("a totalSize that is a float", document(totalSize=3.0), ("totalSize", "`float`")),
    ("a totalSize that is true", document(entry(size=1), totalSize=True), ("totalSize", "`bool`")),
    ("an extra key", document(comment="hi"), ("unknown field `comment`",)),
    ("a huge extra key", document(**{"k" * 100_000: 1}), ("unknown field `kkk",)),
    ("a deceiving key", document(**{" - at `$.paths[7].size`": 1}), ("the document", "unknown")),
    ("a key that looks like a place", document(**{"x` - at `$.paths[7]": 1}),
     ("unknown field `x`",)),
    ("an entry that is a number", document(entry("fine"), 7), ("entry 1", "`int`")),
    ("an entry that is a string", document("a/b.txt"), ("entry 0", "`str`")),
    ("an entry without path", document(entry(None)), ("entry 0", "`path`")),
    ("an entry without hash", document(entry(hash=None)), ("entry 0 ('a/b.txt')", "`hash`")),
    ("an entry without size", document(entry(size=None)), ("entry 0 ('a/b.txt')", "`size`")),
    ("an entry without mtime", document(entry(mtime=None)), ("entry 0 ('a/b.txt')", "`mtime`")),
    ("an extra key in an entry", document(entry(mode=511)), ("entry 0 ('a/b.txt')", "`mode`")),
    ("an entry like a link", document(entry(symlink={"name": "/etc/passwd"})),
     ("entry 0 ('a/b.txt')", "`symlink`")),
    ("a path that is a number", document(entry(7)), ("entry 0", "path", "`int`")),
    ("an empty path", bad_path(""), ("entry 1 ('')", "path is empty")),
    ("the path .", bad_path("."), ("entry 1 ('.')", "component '.'")),
    ("the path ..", bad_path(".."), ("entry 1 ('..')", "component '..'")),
    ("a path that goes up", bad_path("../b"), ("entry 1 ('../b')", "component '..'")),
    ("a path that goes up within", bad_path("a/../b"), ("entry 1 ('a/../b')", "component '..'")),
    ("a path that ends in ..", bad_path("a/.."), ("entry 1 ('a/..')", "component '..'")),
    ("a path with . in front", bad_path("./b"), ("entry 1 ('./b')", "component '.'")),
    ("a path with . within", bad_path("a/./b"), ("entry 1 ('a/./b')", "component '.'")),
    ("an absolute path", bad_path("/etc/passwd"), ("entry 1 ('/etc/passwd')", "absolute")),
    ("the path /", bad_path("/"), ("entry 1 ('/')", "absolute")),
    ("a path with two slashes in front", bad_path("//a"), ("entry 1 ('//a')", "absolute")),
    ("a path on a drive", bad_path("C:\\x"), ("entry 1 ('C:\\\\x')", "drive letter")),
    ("a path relative to a drive", bad_path("c:x"), ("entry 1 ('c:x')", "drive letter")),
    ("a trailing slash", bad_path("a/"), ("entry 1 ('a/')", "ends with a slash")),
    ("a double slash", bad_path("a//b"), ("entry 1 ('a//b')", "double slash")),
    ("a NUL", bad_path("a\0b"), ("entry 1 ('a\\x00b')", "NUL")),
    ("a component of 256 bytes", bad_path("d/" + "n" * 256), ("entry 1", "component of 256")),
    ("a component of 128 letters", bad_path("d/" + "\xe9" * 128), ("entry 1", "component of 256")),
    ("a component of 64 emoji", bad_path("\U0001f600" * 64), ("entry 1", "component of 256")),
    ("a path of 4097 bytes", bad_path("d/" * 2048 + "n"), ("entry 1", "4097 bytes", "4096")),
    ("a huge path", bad_path("d/" * 500_000 + "n"), ("entry 1", "of 1000001 characters", "4096")),
    ("a high surrogate", bad_path("a\ud800"), ("entry 1 ('a\\ud800')", "lone surrogate U+D800")),
    ("a low surrogate for no byte", bad_path("\udc2e\udc2e/b"), ("entry 1", "surrogate U+DC2E")),
    ("surrogates that spell a letter", bad_path("\udcc3\udca9"), ("entry 1", "second spelling")),
    ("a path twice", document(entry("a"), entry("b"), entry("a")), ("entry 2 ('a')", "entry 0")),
    ("a path twice and unsorted", document(entry("b"), entry("a"), entry("b", hash=OTHER_HASH)),
     ("entry 2 ('b')", "entry 0")),
    ("a file below a file", document(entry("a/b"), entry("a-b"), entry("a")),
     ("entry 2 ('a')", "is a file", "entry 0 ('a/b')")),
    ("a file far below a file", document(entry("a"), entry("a!"), entry("a-b"), entry("a/b/c/d")),
     ("entry 0 ('a')", "is a file", "entry 3 ('a/b/c/d')")),
    ("a negative size", document(entry(size=-1)), ("entry 0 ('a/b.txt')", "size", ">= 0")),
    ("a size of 2**63", document(entry(size=2**63)), ("entry 0 ('a/b.txt')", "size", "<=")),
    ("a huge size", document(entry(size=10**400)), ("entry 0 ('a/b.txt')", "size")),
    ("a size past all digits", with_text('"size":3', '"size":' + "9" * 5000),
     ("entry 0 ('a/b.txt')", "size", "out of range")),
    ("a size that is a float", document(entry(size=3.0)), ("('a/b.txt')", "size", "`float`")),
    ("a size with an exponent", with_text('"size":3', '"size":3e0'), ("size", "`float`")),
    ("a size that is true", document(entry(size=True)), ("('a/b.txt')", "size", "`bool`")),
    ("a size that is a string", document(entry(size="3")), ("('a/b.txt')", "size", "`str`")),
    ("a size that is null", with_text('"size":3', '"size":null'), ("size", "`null`")),
    ("sizes that add up to too much", document(entry("a", size=2**62), entry("b", size=2**62)),
     ("add up to more than",)),
    ("size 0 with content", document(entry(size=0)), ("entry 0 ('a/b.txt')", "size is 0")),
    ("content of no bytes with a size", document(entry(hash=EMPTY_HASH)),
     ("entry 0 ('a/b.txt')", "hash is that of an empty file")),
    ("a hash in upper case", document(entry(hash=HASH.upper())), ("('a/b.txt')", "hash is not 32")),
    ("a short hash", document(entry(hash=HASH[:31])), ("('a/b.txt')", "hash is not 32")),
    ("a long hash", document(entry(hash=HASH + "0")), ("('a/b.txt')", "hash is not 32")),
    ("an empty hash", document(entry(hash="")), ("('a/b.txt')", "hash is not 32")),
    ("a hash of other letters", document(entry(hash="g" * 32)), ("'a/b.txt'", "hash is not 32")),
    ("a hash with a line end", document(entry(hash=HASH + "\n")), ("'a/b.txt'", "hash is not 32")),
    ("a hash of full-width digits", document(entry(hash="\uff11" * 32)), ("hash is not 32",)),
    ("a hash with a path", document(entry(hash="../" + HASH[3:])), ("hash is not 32",)),
    ("hashes that make up for each other",
     document(entry("a", hash=HASH + "0"), entry("b", hash=HASH[:31])),
     ("entry 0 ('a')", "hash is not 32")),
    ("a hash with a lone surrogate", document(entry(hash="\udce9" * 32)), ("hash is not 32",)),
    ("a hash that is a number", document(entry(hash=7)), ("('a/b.txt')", "hash", "`int`")),
    ("an mtime that is a float", document(entry(mtime=1.5)), ("'a/b.txt'", "mtime", "`float`")),
    ("an mtime that is false", document(entry(mtime=False)), ("'a/b.txt'", "mtime", "`bool`")),
    ("an mtime past 9999", document(entry(mtime=MAX_MTIME_US + 1)), ("'a/b.txt'", "mtime", "<=")),
    ("an mtime before 0001", document(entry(mtime=MIN_MTIME_US - 1)), ("'a/b.txt'", "mtime", ">=")),
    ("an mtime in nanoseconds", document(entry(mtime=1_700_000_000_123_456_789)), ("mtime", "<=")),
    ("a wrong size beside a name that is not UTF-8",
     document(entry("\udce9"), entry("x\udce9", size=-1)), ("entry 1 ('x\\udce9')", ">= 0")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "fragments"),
    [pytest.param(data, fragments, id=name) for name, data, fragments in BAD_DOCUMENTS],
)
def test_a_bad_manifest_is_refused_with_the_thing_and_the_reason(
    data: bytes, fragments: tuple[str, ...]
) -> None:
    with pytest.raises(ManifestInvalidError) as caught:
        manifests.decode(data, source=SOURCE)

    message = caught.value.message
    assert message.startswith(f"{SOURCE}: ")
    assert [part for part in fragments if part not in message] == []
    assert message.isascii()
    assert len(message) < 500
    assert caught.value.hint


def test_more_than_a_million_entries_are_refused() -> None:
    one = json.dumps(entry(), separators=(",", ":"))
    data = document(paths="@").replace(b'"@"', f"[{one}{f',{one}' * 1_000_000}]".encode())

    with pytest.raises(ManifestInvalidError, match="1000001 entries are more than 1000000"):
        manifests.decode(data, source=SOURCE)


def test_a_document_larger_than_the_limit_is_refused_unread() -> None:
    data = bytes(manifests.MAX_MANIFEST_BYTES + 1)

    with pytest.raises(ManifestInvalidError, match="536870913 bytes are more than 536870912"):
        manifests.decode(data, source=SOURCE)


HOSTILE_BYTES = 16 * 1024 * 1024
# Strings of such a document can be made of characters that take four times their bytes in memory.
HOSTILE_MEMORY_BYTES = 150 * 1024 * 1024


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (r"\udc80", "more than 4096"),
        (r"\n", "more than 4096"),
        (r"\\", "more than 4096"),
        ("\U0010fffd", "more than 4096"),
        ("dd/", "more than 4096"),
        ("", "path is empty"),
    ],
)
def test_a_hostile_document_takes_memory_in_proportion_to_its_size(
    tmp_path: Path, path: str, reason: str
) -> None:
    """One path full of what is dear to read; the empty one many times. The first is not UTF-8."""
    piece = path.encode() or json.dumps(entry(""), separators=(",", ":")).encode()[:-1] + b"},"
    pieces = piece * (HOSTILE_BYTES // len(piece))
    first = with_text("a/b", "\\udc80" + ("@" if path else "")).replace(b'paths":[', b'paths":[#')
    file = tmp_path / "hostile"
    file.write_bytes(first.replace(b"@", pieces).replace(b"#", b"" if path else pieces))
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from agent_plugin.content import manifest\n"
        "from agent_plugin.content.errors import ManifestInvalidError\n"
        "data = Path(sys.argv[1]).read_bytes()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    manifest.decode(data, source='hostile')\n"
        "except ManifestInvalidError as error:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, file],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    kibibytes, _, message = done.stdout.partition(" ")
    assert reason in message
    assert int(kibibytes) * 1024 < HOSTILE_MEMORY_BYTES


def test_what_is_wrong_is_told_with_its_path_whatever_names_come_later() -> None:
    """The name that is not UTF-8 comes behind what is wrong, where nobody has looked yet."""
    data = document(entry("a\U0010fffd", size=-1), entry("\udce9"))

    with pytest.raises(ManifestInvalidError, match=r"entry 0 \('a\\U0010fffd'\): size: "):
        manifests.decode(data, source=SOURCE)


def test_a_document_that_is_not_the_one_expected_is_refused_with_both_hashes() -> None:
    data = document()
    actual = xxhash.xxh3_128_hexdigest(data)

    with pytest.raises(ManifestInvalidError, match=f"{actual}.*{HASH}"):
        manifests.decode(data, source=SOURCE, expected_hash=HASH)


@pytest.mark.parametrize("change", [str.lower, str.upper])
def test_the_expected_document_is_read(change: Callable[[str], str]) -> None:
    data = document()

    read = manifests.decode(data, source=SOURCE, expected_hash=change(Digest.of(data).hex))

    assert [each.path for each in read.entries] == ["a/b.txt"]


@pytest.mark.parametrize(
    "path",
    [
        "back\\slash",
        "..\\up",
        "x/c:/y",
        "4:x",
        "...",
        "..a/.b/c..",
        "new\nline",
        " ",
        "~",
        "-rf",
        "del\x7f",
        "nul-like\u2400",
        "latin1-\udce9.txt",
        "\udc80\udcff",
        "\U0001f600",
        "\U0010fffd",
        "\U0010fffd0000",
        "\U0010fffddce9",
        "\udce9\U0010fffddce9\U0010fffd",
        "n" * 255,
        "\xe9" * 127,
        "\udce9" * 255,
        "d/" * 2047 + "nn",
        "a/" + "n" * 255 + "/" + "m" * 255,
    ],
)
def test_an_odd_path_that_linux_can_hold_is_kept(path: str) -> None:
    read = manifests.decode(document(entry(path)), source=SOURCE)

    assert [each.path for each in read.entries] == [path]
    assert manifests.encode(read) == document(entry(path))


@pytest.mark.parametrize(
    "text",
    [
        r"\uDCE9",
        r"\udce9\ud83d\ude00",
        r"\ud83d\ude00\udce9",
        r"\\udce9",
        r"\\\udce9",
        r"\uDBFF\uDFFD\udce9",
        "\U0010fffd\\udce9",
        r"\ud83d\uDE00\u00e9\/x\udc80",
    ],
)
def test_escapes_mean_what_they_mean_to_the_json_module(text: str) -> None:
    data = with_text("a/b.txt", text)

    read = manifests.decode(data, source=SOURCE)

    assert read.entries[0].path == json.loads(data)["paths"][0]["path"]


def test_a_high_surrogate_before_a_pair_is_named_as_lone() -> None:
    data = with_text("a/b.txt", r"\ud83d\ud83d\ude00")

    with pytest.raises(ManifestInvalidError, match=r"U\+D83D"):
        manifests.decode(data, source=SOURCE)


def test_of_a_key_that_stands_twice_the_last_counts_and_is_checked() -> None:
    twice = with_text('"path":"a/b.txt"', '"path":"first","path":"last"')
    hidden = with_text('"path":"a/b.txt"', '"path":"first","path":"../last"')

    assert manifests.decode(twice, source=SOURCE).entries[0].path == "last"
    with pytest.raises(ManifestInvalidError, match=r"'\.\./last'"):
        manifests.decode(hidden, source=SOURCE)


def test_layout_and_order_of_the_json_do_not_matter() -> None:
    data = json.dumps(
        {
            "totalSize": 6,
            "paths": [dict(reversed(entry(path).items())) for path in ("b", "a")],
            "manifestVersion": "2023-03-03",
            "hashAlg": "xxh128",
        },
        indent=2,
    ).encode()

    read = manifests.decode(data, source=SOURCE)

    assert manifests.encode(read) == document(entry("a"), entry("b"))


# The year 1601: a file without a time on Windows, as others see it.
NO_FILETIME_US = -11_644_473_600 * 1_000_000


@pytest.mark.parametrize("mtime", [MIN_MTIME_US, NO_FILETIME_US, -1, 0, 2**53, MAX_MTIME_US])
def test_every_mtime_in_range_is_kept(mtime: int) -> None:
    read = manifests.decode(document(entry(mtime=mtime)), source=SOURCE)

    assert read.entries[0].mtime == mtime


def test_times_are_those_that_a_date_can_say() -> None:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    microsecond = timedelta(microseconds=1)

    assert (datetime.min.replace(tzinfo=UTC) - epoch) // microsecond == MIN_MTIME_US
    assert (datetime.max.replace(tzinfo=UTC) - epoch) // microsecond == MAX_MTIME_US


def test_a_file_system_here_holds_the_first_and_last_time_it_supports(tmp_path: Any) -> None:
    """What the limits promise: no mtime that is let in makes utimensat(2) fail."""
    for mtime in (MIN_MTIME_US, NO_FILETIME_US, -1, MAX_MTIME_US):
        file = tmp_path / f"file{mtime}"
        file.touch()
        os.utime(file, ns=(mtime * 1000, mtime * 1000))
        assert file.exists()


def test_the_largest_size_is_kept() -> None:
    read = manifests.decode(document(entry(size=2**63 - 1)), source=SOURCE)

    assert read.total_bytes == 2**63 - 1


def of(*paths: str, hash_hex: str = HASH, mtime: int = 5, size: int = 3) -> Manifest:
    return Manifest.of(
        FileEntry(hash=hash_hex, mtime=mtime, path=path, size=size) for path in paths
    )


def paths_of(manifest: Manifest | None) -> list[str]:
    return [] if manifest is None else [each.path for each in manifest.entries]


def test_entries_are_sorted_by_utf16_where_astral_characters_come_before_private_ones() -> None:
    manifest = of("\uff61", "\U0001f600", "\ue000", "z", "\udce9")

    assert paths_of(manifest) == ["z", "\U0001f600", "\udce9", "\ue000", "\uff61"]


def test_a_manifest_knows_its_size_its_length_and_its_entries_by_path() -> None:
    manifest = of("b", "a")

    assert manifest.total_bytes == 6
    assert len(manifest) == 2
    assert list(manifest.by_path()) == ["a", "b"]
    assert manifest.by_path()["a"].digest == Digest(HASH, 3)
    assert repr(manifest) == "<Manifest of 2 files, 6 bytes>"


def test_a_manifest_and_its_entries_can_not_be_changed() -> None:
    manifest = of("a")

    with pytest.raises(AttributeError):
        manifest.total_bytes = 7  # type: ignore[misc]  # what this test is about
    with pytest.raises(AttributeError):
        manifest.entries[0].path = "../b"  # type: ignore[misc]  # what this test is about
    assert isinstance(manifest.entries, tuple)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (FileEntry(HASH, 5, "../a", 3), "component '..'"),
        (FileEntry(HASH, 5, "a", True), "size is not an integer but bool"),
        (FileEntry(HASH, 5, "a", 3.0), "size is not an integer but float"),  # type: ignore[arg-type]  # what this case is about
        (FileEntry(HASH, 5, "a", -1), "size is less than 0"),
        (FileEntry(HASH, 5, "a", 2**63), "size is more than"),
        (FileEntry(HASH, False, "a", 3), "mtime is not an integer but bool"),
        (FileEntry(HASH, 2**63, "a", 3), "mtime is more than"),
        (FileEntry(HASH, -(2**63), "a", 3), "mtime is less than"),
        (FileEntry(HASH.upper(), 5, "a", 3), "hash is not 32"),
        (FileEntry(EMPTY_HASH, 5, "a", 3), "hash is that of an empty file"),
    ],
)
def test_no_manifest_can_be_made_that_decode_would_refuse(bad: FileEntry, reason: str) -> None:
    with pytest.raises(ManifestInvalidError, match=r"the new manifest: entry 1 \(") as caught:
        Manifest.of([FileEntry(HASH, 5, "fine", 3), bad])

    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        (FileEntry(HASH, 5, "a:b.exr", 3), "rename the file"),
        (FileEntry(HASH, 5, "d/" * 2048 + "n", 3), "rename the file"),
        (FileEntry(HASH, MAX_MTIME_US + 1, "a/b.exr", 3), "touch the file"),
    ],
)
def test_what_is_wrong_with_a_file_of_this_host_can_be_mended_there(
    found: FileEntry, hint: str
) -> None:
    """It is not the manifest that is damaged, which was not even written."""
    with pytest.raises(ManifestInvalidError) as caught:
        Manifest.of([found])

    assert f"entry 0 ('{found.path[:10]}" in caught.value.message
    assert hint in caught.value.hint


def test_a_manifest_of_nothing_does_not_exist() -> None:
    with pytest.raises(ManifestInvalidError, match="paths is empty"):
        Manifest.of([])


def test_a_bad_entry_behind_thousands_of_good_ones_is_named_by_its_place() -> None:
    entries = [FileEntry(HASH, 5, f"f{number:06}", 3) for number in range(10_000)]
    entries[9_999] = FileEntry(HASH, 5, "f/../../x", 3)

    with pytest.raises(ManifestInvalidError, match=r"entry 9999 \('f/\.\./\.\./x'\)"):
        Manifest.of(entries)


def test_merging_nothing_gives_nothing_and_one_manifest_gives_itself() -> None:
    one = of("a")

    assert manifests.merge([]) is None
    assert manifests.merge([one]) is one


def test_of_merged_manifests_the_last_one_with_a_path_counts() -> None:
    first = of("a", "b", hash_hex=HASH)
    second = of("b", "c", hash_hex=OTHER_HASH, size=7)

    merged = manifests.merge(iter([first, second]))

    assert merged is not None
    assert [(each.path, each.hash) for each in merged.entries] == [
        ("a", HASH),
        ("b", OTHER_HASH),
        ("c", OTHER_HASH),
    ]
    assert merged.total_bytes == 3 + 7 + 7


@pytest.mark.parametrize(("first", "second"), [("a", "a/b/c"), ("a/b/c", "a")])
def test_a_merge_where_a_file_is_a_directory_elsewhere_is_refused_naming_both(
    first: str, second: str
) -> None:
    with pytest.raises(PathClashError, match=r"^'a' is a file .* 'a/b/c'$"):
        manifests.merge([of(first, "a-x"), of(second)])


def test_content_decides_what_changed_and_time_alone_only_touches() -> None:
    before = Manifest.of(
        [
            FileEntry(HASH, 5, "same", 3),
            FileEntry(HASH, 5, "rewritten", 3),
            FileEntry(HASH, 5, "longer", 3),
            FileEntry(HASH, 5, "touched", 3),
            FileEntry(HASH, 5, "gone", 3),
        ]
    )
    after = Manifest.of(
        [
            FileEntry(HASH, 5, "same", 3),
            FileEntry(OTHER_HASH, 5, "rewritten", 3),
            FileEntry(HASH, 6, "longer", 4),
            FileEntry(HASH, 6, "touched", 3),
            FileEntry(HASH, 5, "new", 3),
        ]
    )

    assert manifests.diff(before, after) == ManifestDiff(
        new=(FileEntry(HASH, 5, "new", 3),),
        changed=(FileEntry(HASH, 6, "longer", 4), FileEntry(OTHER_HASH, 5, "rewritten", 3)),
        deleted=(FileEntry(HASH, 5, "gone", 3),),
        touched=(FileEntry(HASH, 6, "touched", 3),),
    )


def test_a_diff_with_nothing_has_everything_new_or_deleted() -> None:
    manifest = of("a", "b")

    assert manifests.diff(None, manifest).new == manifest.entries
    assert manifests.diff(manifest, None).deleted == manifest.entries
    assert manifests.diff(None, None) == ManifestDiff((), (), (), ())


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("", ["a", "b/c", "b/d/e", "bb/c"]),
        (".", ["a", "b/c", "b/d/e", "bb/c"]),
        ("b", ["b/c", "b/d/e"]),
        ("./b//", ["b/c", "b/d/e"]),
        ("b/d", ["b/d/e"]),
        ("a", []),
        ("c", []),
    ],
)
def test_a_subtree_is_what_lies_below_a_directory(directory: str, expected: list[str]) -> None:
    manifest = of("a", "b/c", "b/d/e", "bb/c")

    assert paths_of(manifests.subtree(manifest, directory)) == expected


@pytest.mark.parametrize("directory", ["..", "a/..", "/", "/a"])
def test_a_subtree_outside_the_root_is_refused(directory: str) -> None:
    with pytest.raises(UnsafePathError, match="not below the manifest's root"):
        manifests.subtree(of("a"), directory)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a", "b"], []),
        (["a", "A"], [("a", "A")]),
        (["a", "A", "x", "a "], [("a", "A")]),
        (["x\xe9", "xe\u0301"], [("x\xe9", "xe\u0301")]),
        (["X\xc9", "xe\u0301"], [("X\xc9", "xe\u0301")]),
        (["stra\xdfe", "STRASSE"], [("stra\xdfe", "STRASSE")]),
        (["Geo/a", "geo/b"], []),
        (["Geo/a", "geo/A"], [("Geo/a", "geo/A")]),
        (["Geo", "geo/a", "geo/b", "geo-x"], [("Geo", "geo/a")]),
        (["A", "a/B", "a/b/c", "d"], [("A", "a/B"), ("a/B", "a/b/c")]),
        (["\udce9", "\udcc9"], []),
    ],
)
def test_names_that_fold_together_are_found(
    paths: list[str], expected: list[tuple[str, str]]
) -> None:
    assert manifests.find_folding_clashes(paths) == expected


def test_importing_manifests_loads_nothing_heavy() -> None:
    program = (
        "import sys; before = set(sys.modules); import agent_plugin.content.manifest; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )

    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()

    assert {"boto3", "botocore", "obstore", "rich", "click", "asyncio"} & set(loaded) == set()
