"""Laws of manifests, for names of all kinds and documents damaged in all ways.

Each law names the mutation of the code that it was seen to catch.
"""

import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent_plugin.content import manifest as manifests
from agent_plugin.content import manifest_rules as rules
from agent_plugin.content.digest import EMPTY_HASH, Digest
from agent_plugin.content.errors import ManifestInvalidError, PathClashError
from agent_plugin.content.manifest import FileEntry, Manifest, ManifestDiff

HASHES = [Digest.of(bytes([number])).hex for number in range(4)]


def _is_fine(name: str) -> bool:
    return rules.path_defect(name) is None


# Names as an operating system has them: any bytes but NUL and the slash; and text of all planes.
os_names = st.binary(min_size=1, max_size=12).map(
    lambda raw: raw.replace(b"\0", b"0").replace(b"/", b"-").decode("utf-8", "surrogateescape")
)
text_names = st.text(
    st.one_of(
        st.sampled_from('ab."\\\x7f\x1f\u00e9\ue000\uffff\U0001f600\U0010fffd'),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0/"),
    ),
    min_size=1,
    max_size=6,
)
# Few letters, so that paths are often prefixes of each other.
short_names = st.text("ab-", min_size=1, max_size=2)
names = st.one_of(os_names, text_names, short_names).filter(_is_fine)
paths = st.lists(names, min_size=1, max_size=4).map("/".join).filter(_is_fine)


@st.composite
def entries(draw: st.DrawFn, path: str) -> FileEntry:
    size = draw(st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 2**53)))
    mtime = draw(st.one_of(st.just(5), st.integers(rules.MIN_MTIME_US, rules.MAX_MTIME_US)))
    return FileEntry(draw(st.sampled_from(HASHES)) if size else EMPTY_HASH, mtime, path, size)


@st.composite
def valid_manifests(draw: st.DrawFn) -> Manifest:
    kept: list[str] = []
    for path in draw(st.lists(paths, min_size=1, max_size=8, unique=True)):
        if not any(path.startswith(f"{k}/") or k.startswith(f"{path}/") for k in kept):
            kept.append(path)
    return Manifest.of([draw(entries(path)) for path in kept])


def canonical(manifest: Manifest) -> bytes:
    """Encode as the specification's one-liner does."""
    listed = [
        {"hash": e.hash, "mtime": e.mtime, "path": e.path, "size": e.size} for e in manifest.entries
    ]
    listed.sort(key=lambda entry: str(entry["path"]).encode("utf-16-be", "surrogatepass"))
    document = {
        "hashAlg": "xxh128",
        "manifestVersion": "2023-03-03",
        "paths": listed,
        "totalSize": sum(e.size for e in manifest.entries),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@given(valid_manifests())
@example(Manifest.of([FileEntry(HASHES[0], 5, path, 1) for path in ("\U0001f600", "\ue000")]))
@example(Manifest.of([FileEntry(HASHES[0], 5, "del\x7f", 1)]))
@example(Manifest.of([FileEntry(HASHES[0], 5, "\udce9\U0010fffddce9", 1)]))
def test_encoding_is_that_of_the_json_module_and_reads_back_the_same(manifest: Manifest) -> None:
    """Caught: sorting by str where a path is astral; DEL left raw; a surrogate not unmarked."""
    data = manifests.encode(manifest)

    assert data == canonical(manifest)
    assert manifests.decode(data, source="itself") == manifest


@given(valid_manifests(), st.randoms(use_true_random=False))
def test_the_order_and_layout_of_a_document_do_not_matter(
    manifest: Manifest, source: random.Random
) -> None:
    """Caught: entries left in the document's order when that is not ascending."""
    document = json.loads(manifests.encode(manifest))
    source.shuffle(document["paths"])
    # Raw UTF-8 where that exists; lone surrogates can only be escapes.
    is_utf8 = all("\\ud" not in ascii(entry.path) for entry in manifest.entries)

    data = json.dumps(document, indent=1, ensure_ascii=not is_utf8).encode()

    assert manifests.decode(data, source="shuffled") == manifest


@given(st.none() | valid_manifests(), st.none() | valid_manifests())
def test_a_diff_applied_to_what_was_gives_what_is(
    before: Manifest | None, after: Manifest | None
) -> None:
    """Caught: new entries given as deleted ones; touched entries left out; sizes not compared."""
    difference = manifests.diff(before, after)

    assert applied(before, difference) == ({} if after is None else after.by_path())
    assert manifests.diff(after, after) == ManifestDiff((), (), (), ())


@given(valid_manifests(), st.data())
def test_a_diff_tells_what_was_done_to_a_tree(before: Manifest, data: st.DataObject) -> None:
    """Caught: a file with another mtime counted as changed; one of another size as touched."""
    after = {}
    done: dict[str, set[str]] = {"deleted": set(), "changed": set(), "touched": set(), "": set()}
    for path, entry in before.by_path().items():
        edit = data.draw(st.sampled_from(sorted(done)))
        done[edit].add(path)
        if edit == "touched":
            after[path] = FileEntry(entry.hash, (entry.mtime + 1) // 2 + 1, path, entry.size)
        elif edit == "changed":
            after[path] = FileEntry(HASHES[0], entry.mtime, path, entry.size + 1)
        elif edit == "":
            after[path] = entry
    done["touched"] -= {path for path, entry in after.items() if entry == before.by_path()[path]}

    difference = manifests.diff(before, Manifest.of(after.values()) if after else None)

    assert difference.new == ()
    assert {entry.path for entry in difference.deleted} == done["deleted"]
    assert {entry.path for entry in difference.changed} == done["changed"]
    assert {entry.path for entry in difference.touched} == done["touched"]


def applied(before: Manifest | None, difference: ManifestDiff) -> dict[str, FileEntry]:
    result = {} if before is None else before.by_path()
    for entry in difference.deleted:
        assert result.pop(entry.path) == entry
    for entry in difference.new:
        assert result.setdefault(entry.path, entry) is entry
    for entry in (*difference.changed, *difference.touched):
        assert result.pop(entry.path) != entry
        result[entry.path] = entry
    return result


@given(st.lists(valid_manifests(), max_size=4))
def test_of_merged_manifests_the_last_one_with_a_path_counts(given: list[Manifest]) -> None:
    """Caught: the first manifest counting; the clash check left out."""
    expected = {path: entry for manifest in given for path, entry in manifest.by_path().items()}
    clash = naive_clash(list(expected))

    if clash:
        with pytest.raises(PathClashError):
            manifests.merge(given)
        return
    merged = manifests.merge(given)

    assert (merged.by_path() if merged else {}) == expected
    assert (merged.total_bytes if merged else 0) == sum(e.size for e in expected.values())


@given(valid_manifests(), st.one_of(names, paths, st.just("."), st.just("")))
def test_a_subtree_is_what_starts_with_the_directory(manifest: Manifest, directory: str) -> None:
    """Caught: the slash behind the directory left out, so that `a` had what is below `ab`."""
    prefix = [] if directory in ("", ".") else directory.split("/")

    below = manifests.subtree(manifest, directory)

    found = [] if below is None else [entry.path for entry in below.entries]
    assert found == [
        entry.path
        for entry in manifest.entries
        if entry.path.split("/")[: len(prefix)] == prefix and entry.path != directory
    ]


# What breaks rules, and what only looks like it.
PIECES = [
    *["", ".", "..", "...", "a", "b", "/", "//", "\\", ":", "C:", "c:a", "\0", "\n", "\x7f"],
    *["\u00e9", "\u65e5", "\U0001f600", "\ud800", "\udc2e", "\udc80", "\udce9", "\udcc3\udca9"],
]
LONG_PATHS = [
    *["x" * 255, "x" * 256, "\u00e9" * 127, "\u00e9" * 128, "\udce9" * 255, "\udce9" * 256],
    *["d/" * 2047 + "nn", "d/" * 2048 + "n", "\u00e9/" * 1365 + "n", "\u00e9/" * 1365 + "nn"],
    *["d/" * 50 + "x" * 255, "d/" * 50 + "x" * 256, "\U0001f600/" * 20 + "x" * 256],
]
hostile_paths = st.one_of(
    st.text("./a", max_size=6),
    st.text("/a:C\0\\", max_size=5),
    st.text("a\u00e9\ud800\udc2e\udc80\udcc3\udca9", max_size=4),
    st.lists(st.sampled_from(PIECES), max_size=5).map("".join),
    st.sampled_from(LONG_PATHS),
)
hostile_hashes = st.one_of(
    st.sampled_from([*HASHES, EMPTY_HASH, HASHES[0].upper(), HASHES[0][1:], HASHES[0] + "0", ""]),
    st.sampled_from(["\0".join(HASHES[:2]), "0" * 31 + "\0", "\u0661" * 32, "g" * 32]),
)
hostile_numbers = st.sampled_from(
    [0, 1, -1, 2**53, 2**63 - 1, 2**63, -(2**63), rules.MAX_MTIME_US + 1, True, False, 1.0]
)
Row = tuple[str, str, Any, Any]
GOOD_ROW: Row = ("a/b", HASHES[0], 1, 5)


@st.composite
def rows_with_bad_columns(draw: st.DrawFn) -> list[Row]:
    """Return good rows with one or two columns of anything."""
    columns = [[value] * draw(st.shared(st.integers(1, 3), key="rows")) for value in GOOD_ROW]
    hostile = (hostile_paths, hostile_hashes, hostile_numbers, hostile_numbers)
    for place in draw(st.sets(st.integers(0, 3), min_size=1, max_size=2)):
        columns[place] = [draw(hostile[place]) for _ in columns[place]]
    return list(zip(*columns, strict=True))


# What they look for is rare.
many = settings(max_examples=max(1000, 5 * settings().max_examples))


@many
@given(rows_with_bad_columns())
@example([("a", HASHES[0] + "0", 1, 5), ("b", HASHES[0][1:], 1, 5)])
@example([("a", "\udce9" * 32, 1, 5)])
def test_the_checks_in_bulk_let_nothing_through_that_the_rules_refuse(rows: list[Row]) -> None:
    """Caught: each single condition of are_paths, _are_hashes and _are_integers taken out."""
    listed, hashes, sizes, mtimes = (list(column) for column in zip(*rows, strict=True))

    defects = [rules.entry_defect(*row) for row in rows]

    if rules.are_numbers(sizes, mtimes) and rules.are_sound(listed, hashes, sizes):
        assert defects == [None] * len(rows)


@many
@given(st.lists(hostile_paths, min_size=1, max_size=3))
def test_the_check_of_paths_in_bulk_agrees_with_the_rules_on_short_ones(listed: list[str]) -> None:
    """Caught: any condition of are_paths taken out, or made to refuse too much."""
    expected = all(rules.path_defect(path) is None for path in listed)
    hashes, sizes = [HASHES[0]] * len(listed), [1] * len(listed)

    if max(map(len, listed)) <= rules.MAX_PATH_BYTES // 4:
        assert rules.are_sound(listed, hashes, sizes) == expected


@many
@given(hostile_paths)
def test_a_path_without_defect_stays_below_its_root(path: str) -> None:
    """Caught: the rules for `..`, absolute paths and NUL, each taken out."""
    if rules.path_defect(path) is None:
        assert_stays_below_its_root(path)


@given(
    st.lists(st.one_of(short_names, st.lists(short_names, min_size=1).map("/".join)), unique=True)
)
def test_a_clash_is_found_wherever_there_is_one(listed: list[str]) -> None:
    """Caught: only the direct successor looked at; bisect with the file, not the directory."""
    found = list(rules.iter_clashes(sorted(listed)))

    assert {file for file, _ in found} == {file for file, _ in naive_clash(listed)}
    assert all(below.startswith(f"{file}/") for file, below in found)


def naive_clash(listed: list[str]) -> list[tuple[str, str]]:
    return [(a, b) for a in listed for b in listed if b.startswith(f"{a}/")]


BASE = manifests.encode(
    Manifest.of(
        FileEntry(HASHES[number % 4], number * 1000 - 1, path, number + 1)
        for number, path in enumerate(
            [
                "a/b.txt",
                "a/c.txt",
                "a-b",
                "..a/x",
                "d/.e/f",
                "\u00e9/\U0001f600",
                "l\udce9",
                'q"\\\n\x7f',
            ]
        )
    )
)


def mutations(count: int) -> Iterator[tuple[int, bytes]]:
    for seed in range(count):
        source = random.Random(seed)
        data = bytearray(BASE)
        for _ in range(source.choice([1, 1, 1, 2, 5])):
            start = source.randrange(len(data))
            end = min(len(data), start + source.randint(1, 40))
            match source.randrange(6):
                case 0:
                    data[start] = source.randrange(256)
                case 1:
                    data[start] ^= 1 << source.randrange(8)
                case 2:
                    data[start] = source.choice(b'0123456789"\\/.,:{}[]-+eu\0\x7f')
                case 3:
                    del data[start:end]
                case 4:
                    data[start:start] = data[start:end]
                case _:
                    data[start:start] = source.choice(
                        [b"/", b"..", b"../", b"\\u0000", b"\\udc2e", b"\\ud800", b"\\", b'"', b"{"]
                    )
        yield seed, bytes(data)


@pytest.mark.timeout(60)
def test_damaged_bytes_are_refused_or_harmless() -> None:
    """Caught: UnicodeDecodeError not converted; the rule for `..` taken out."""
    messages = {}
    for seed, data in mutations(2000):
        try:
            manifest = manifests.decode(data, source=f"mutation {seed}")
        except ManifestInvalidError as error:
            messages[seed] = error.message
            continue
        for entry in manifest.entries:
            assert_stays_below_its_root(entry.path)
        assert manifests.decode(manifests.encode(manifest), source="again") == manifest

    assert [s for s, text in messages.items() if not text.startswith(f"mutation {s}: ")] == []
    assert 1500 < len(messages) < 2000, "the mutations should neither all miss nor all hit"


@given(st.one_of(st.just(0), st.integers(0, len(BASE) - 3)), st.binary(max_size=200))
@example(BASE.index(b"a/b.txt"), b'\xff",')
def test_noise_is_refused(start: int, data: bytes) -> None:
    """Caught: msgspec's UnicodeDecodeError let through."""
    with pytest.raises(ManifestInvalidError, match=r"^noise: "):
        manifests.decode(BASE[:start] + data, source="noise")


@pytest.mark.parametrize("percent", range(100))
def test_a_document_cut_short_is_refused(percent: int) -> None:
    with pytest.raises(ManifestInvalidError, match=r"^cut: it is not JSON"):
        manifests.decode(BASE[: len(BASE) * percent // 100], source="cut")


def assert_stays_below_its_root(path: str) -> None:
    raw = os.fsencode(path)
    joined = os.path.normpath(os.path.join(b"/root/of/session", raw))  # noqa: PTH118 - bytes
    assert joined == b"/root/of/session/" + raw
    assert b"\0" not in raw
    assert max(map(len, raw.split(b"/"))) <= 255
