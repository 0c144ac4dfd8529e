"""Which file an object becomes, and which objects can not become files."""

import pytest

from agent_plugin.content.errors import PathClashError, PropmasterError, UnsafePathError
from agent_plugin.content.object_snapshot import ObjectSnapshot, SnapshotEntry
from agent_plugin.content.objects import ObjectAccess, ObjectInfo
from agent_plugin.sources.mapping import names_one_object, path_of, prefix_of

ROOT = "plates/2024/"
SET_1 = [f"{ROOT}set1/{name}.txt" for name in ("001", "002", "101", "102")]
SET_2 = [f"{ROOT}set2/{name}.txt" for name in ("201", "202", "nested/301", "nested/302")]


def snapshot_of(key: str, *keys: str) -> ObjectSnapshot:
    prefix = key if names_one_object(key) else prefix_of(key)
    infos = [ObjectInfo("show", each, 4, '"e"', "", 1.5) for each in keys]
    entries = [SnapshotEntry.of(info, path_of(info.key, prefix)) for info in infos]
    return ObjectSnapshot(ObjectAccess(), "show", entries)


@pytest.mark.parametrize(
    ("key", "paths"),
    [
        (f"{ROOT}set1/001.txt", ["001.txt"]),
        (f"{ROOT}set1/", ["001.txt", "002.txt", "101.txt", "102.txt"]),
        (f"{ROOT}set1/*", ["001.txt", "002.txt", "101.txt", "102.txt"]),
        (f"  {ROOT}set1/*", ["001.txt", "002.txt", "101.txt", "102.txt"]),
        (f"{ROOT}set2/", ["201.txt", "202.txt", "nested/301.txt", "nested/302.txt"]),
        (f"{ROOT}set1/00*", ["001.txt", "002.txt"]),
        (
            f"{ROOT}set*",
            [
                *("set1/001.txt", "set1/002.txt", "set1/101.txt", "set1/102.txt"),
                *("set2/201.txt", "set2/202.txt", "set2/nested/301.txt", "set2/nested/302.txt"),
            ],
        ),
        ("", [*SET_1, *SET_2]),
        ("*", [*SET_1, *SET_2]),
    ],
)
def test_s3_directories_that_the_key_names_are_left_away(key: str, paths: list[str]) -> None:
    single = names_one_object(key)
    prefix = key if single else prefix_of(key)
    keys = [each for each in (*SET_1, *SET_2) if each.startswith(prefix)]

    snapshot = snapshot_of(key, *keys)

    assert [entry.path for entry in snapshot.entries] == paths
    assert [entry.key for entry in snapshot.entries] == keys


@pytest.mark.parametrize(
    ("key", "found", "path"),
    [
        ("d/s*", "d/s/e/f", "s/e/f"),
        ("d/s/*", "d/s/e/f", "e/f"),
        ("/d/", "/d/e", "e"),
        ("a//b", "a//b", "b"),
        ("a//", "a//b", "b"),
        ("a/x", "a/x/b", "x/b"),
        ("a*b", "a*b", "a*b"),
        ("a**", "a*b", "a*b"),
    ],
)
def test_s3_only_whole_names_are_left_away(key: str, found: str, path: str) -> None:
    prefix = key if names_one_object(key) else prefix_of(key)

    assert path_of(found, prefix) == path


@pytest.mark.parametrize(
    ("key", "found", "reason"),
    [
        ("d/", "d/../../../etc/passwd", "path holds the component '..'"),
        ("d/", "d/./a", "path holds the component '.'"),
        ("d/", "d/a/..", "path holds the component '..'"),
        ("d/", "d//etc/passwd", "path is absolute"),
        ("d/", "d/a//b", "path holds a double slash"),
        ("", "/etc/passwd", "path is absolute"),
        ("", "C:/a", "path starts with a drive letter"),
        ("d/..", "d/..", "path holds the component '..'"),
        ("d/", "d/a\0b", "path holds a NUL"),
        ("d/", f"d/{'é' * 128}", "path holds a component of 256 bytes, more than 255"),
    ],
)
def test_s3_what_can_not_be_a_file_below_the_target_is_refused(
    key: str, found: str, reason: str
) -> None:
    with pytest.raises(UnsafePathError) as caught:
        snapshot_of(key, f"{prefix_of(key)}good", found)

    assert caught.value.message.endswith(f" can not become a file: its {reason}")
    assert caught.value.message.startswith(f"s3://show/{found[:20]}")
    assert caught.value.code == "E_BAD_PATH"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["d/a", "d/a/b"],
            "s3://show/d/a becomes a file where s3://show/d/a/b needs a directory",
        ),
        (
            ["d/a/b/c", "d/a-x", "d/a"],
            "s3://show/d/a becomes a file where s3://show/d/a/b/c needs a directory",
        ),
        (["d/a", "d/a"], "s3://show/d/a and s3://show/d/a both become 'a'"),
    ],
)
def test_s3_objects_that_want_one_place_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(PathClashError) as caught:
        snapshot_of("d/", *keys)

    assert caught.value.message == message
    assert caught.value.code == "E_PATH_CLASH"


@pytest.mark.parametrize("name", ["a\\b", "..a", "a b", "tab\there", "é", "e\u0301", "c:x"])
def test_s3_odd_names_are_names(name: str) -> None:
    assert [entry.path for entry in snapshot_of("d/", f"d/x{name}").entries] == [f"x{name}"]


def test_s3_a_long_hostile_key_is_told_in_a_short_line() -> None:
    with pytest.raises(PropmasterError) as caught:
        snapshot_of("", "../" * 341)

    assert len(caught.value.message) < 300
