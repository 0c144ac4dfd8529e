"""Each object is in one part, the same for every task, and the same as with Bacalhau."""

from collections.abc import Sequence

import pytest

from agent_plugin.content.errors import SourceInvalidError
from agent_plugin.sources.partition import MAX_COUNT, Partition, Share, fnv1a_32
from agent_plugin.sources.spec import decode_source

ROOT = "integration-tests-do-not-delete/"


def shared_out(partition: Partition, prefix: str, names: Sequence[str]) -> list[list[str]]:
    """Return what each part has of the names below a prefix."""
    count = partition.count or 1
    parts: list[list[str]] = []
    for index in range(count):
        share = Share(partition, prefix, index)
        parts.append([name for name in names if share.has(prefix + name)])
    assert sorted(name for part in parts for name in part) == sorted(names), "each is in one part"
    return parts


@pytest.mark.parametrize(
    ("data", "value"),
    [
        # http://www.isthe.com/chongo/tech/comp/fnv/, test vectors.
        (b"", 0x811C9DC5),
        (b"a", 0xE40C292C),
        (b"foobar", 0xBF9CF968),
    ],
)
def test_s8_the_hash_is_fnv_1a_with_32_bits(data: bytes, value: int) -> None:
    assert fnv1a_32(data) == value


@pytest.mark.parametrize(
    ("partition", "prefix", "parts"),
    [
        (
            Partition("object", count=2),
            f"{ROOT}set1/",
            [["002.txt", "101.txt"], ["001.txt", "102.txt"]],
        ),
        (
            Partition("regex", r"\d0", count=2),
            f"{ROOT}set1/",
            [["101.txt", "102.txt"], ["001.txt", "002.txt"]],
        ),
        (
            Partition("substring", start_index=2, end_index=3, count=2),
            f"{ROOT}set1/",
            [["001.txt", "101.txt"], ["002.txt", "102.txt"]],
        ),
        (
            Partition("regex", r"nested/\d0", count=3),
            f"{ROOT}set2/",
            [["201.txt", "202.txt"], [], ["nested/301.txt", "nested/302.txt"]],
        ),
        (
            Partition("object", count=5),
            "",
            [[], ["file1.txt"], [], ["file2.txt"], ["file3.txt"]],
        ),
        (
            Partition("object", count=3),
            "prefix/",
            [
                ["\u0444\u0430\u0439\u043b2.txt"],
                ["ファイル4.txt"],
                ["文件1.txt", "파일3.txt", "ملف5.txt"],
            ],
        ),
        (
            Partition("object", count=2),
            "prefix/",
            [["escaped\\slash.txt", "newline\nin name.txt"], ["spaces in name.txt"]],
        ),
        (
            Partition("regex", r"user(\d+)", count=4),
            "prefix/",
            [["user456/3", "invalid/5"], ["user789/4"], [], ["user123/1", "user123/2"]],
        ),
        (
            Partition("regex", r"user(\d+)-group(\d+)", count=3),
            "prefix/",
            [
                ["invalid.txt"],
                ["user123-group999.txt", "user123-group999.log"],
                ["user123-group456.txt", "user789-group012.txt"],
            ],
        ),
        (
            Partition("regex", r"00\d", count=3),
            "prefix/",
            [["abc.txt", "001.txt", "002.txt"], ["003.txt"], []],
        ),
        (Partition("regex", "()", count=2), "prefix/", [["data1.txt", "data2.txt"], []]),
        (
            Partition("substring", start_index=0, end_index=10, count=3),
            "prefix/",
            [["short.txt", "medium-name.txt"], ["very-long-name.txt"], []],
        ),
        (
            Partition("substring", start_index=0, end_index=1, count=3),
            "prefix/",
            [["户用456.txt"], [], ["用户123.txt", "用户789.txt"]],
        ),
        (
            Partition("substring", start_index=0, end_index=3, count=2),
            "prefix/user-",
            [["456-def.txt", "456-another.txt"], ["123-abc.txt", "789-ghi.txt"]],
        ),
        (
            Partition("date", date_format="2006-01-02", count=2),
            "prefix/",
            [
                ["2023-01-01-a.txt", "2023-01-03-a.txt", "invalid-date.txt"],
                ["2023-01-02-a.txt", "2023-01-02-b.txt"],
            ],
        ),
        (
            Partition("date", date_format="2006-01", count=2),
            "prefix/",
            [["2023-01/a", "2023-03/a", "invalid/a"], ["2023-02/a", "2023-02/b"]],
        ),
        (
            Partition("date", date_format="2006", count=2),
            "prefix/",
            [["2021/a", "2023/a", "invalid/a"], ["2022/a", "2022/b"]],
        ),
        (
            # `T1` ends with the month again.
            Partition("date", date_format="2006-01-02T1", count=2),
            "prefix/",
            [
                ["2023-01-02T01:00:00+09:00", "2023-01-02T05:00:00+09:00", "invalid.txt"],
                ["2023-01-01T15:30:00-07:00", "2023-01-01T10:00:00Z"],
            ],
        ),
        (
            Partition("date", date_format="200601", count=3),
            "prefix/",
            [["2023-01-02.txt", "invalid.txt"], ["20230103.txt", "20230101.txt"], []],
        ),
        (
            Partition("date", date_format="2006.01.02", count=2),
            "prefix/",
            [["2023.01.01.txt", "2023.01.03.txt"], ["2023.01.02.txt", "2023.01.02.log"]],
        ),
    ],
)
def test_s8_parts_are_the_same_as_bacalhaus(
    partition: Partition, prefix: str, parts: list[list[str]]
) -> None:
    names = [name for part in parts for name in part]

    found = shared_out(partition, prefix, names)

    assert [sorted(part) for part in found] == [sorted(part) for part in parts]


def test_s8_seven_days_do_not_spread_over_seven_parts() -> None:
    share = Share(Partition("date", date_format="%Y-%m-%d", count=7, index=0), "days/")

    parts = [share.part_of(f"days/2024-01-{day:02}.exr") for day in range(1, 8)]

    assert parts == [5, 4, 2, 6, 4, 3, 1]


def test_s8_a_thousand_frames_spread_over_eight_parts() -> None:
    names = [f"beauty.{number:04}.exr" for number in range(1000)]

    parts = shared_out(Partition("object", count=8), "shot/", names)

    assert all(100 < len(part) < 150 for part in parts)


@pytest.mark.parametrize(
    "partition",
    [None, Partition(), Partition("none", count=3, index=1), Partition("object", count=1, index=0)],
)
def test_s8_without_a_partition_everything_is_taken(partition: Partition | None) -> None:
    share = Share(partition, "d/")

    assert all(share.has(f"d/{number}") for number in range(9))


def test_s8_the_slash_behind_a_prefix_is_no_part_of_what_is_looked_at() -> None:
    """The prefix of `d*` is `d`; the rest of `d/1` is taken for `1`."""
    partition = Partition("substring", start_index=0, end_index=1, count=50, index=0)

    assert Share(partition, "d").part_of("d/1") == Share(partition, "d/").part_of("d/1")
    assert Share(partition, "d").part_of("d/1") == fnv1a_32(b"1") % 50


def test_s8_groups_that_found_nothing_do_not_count() -> None:
    share = Share(Partition("regex", r"(x)?(\d)(y*)", count=50, index=0), "")

    assert share.part_of("7") == fnv1a_32(b"7") % 50
    assert share.part_of("x7yy") == fnv1a_32(b"x\x1f7\x1fyy") % 50


PARTITION = {"Type": "object", "Count": 2, "Index": 0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"Type": "regex"}, "Pattern: empty"),
        ({"Type": "regex", "Pattern": "[a"}, "Pattern: no regular expression: unterminated"),
        (
            {"Type": "substring", "StartIndex": -1, "EndIndex": 5},
            "StartIndex: -1 is negative",
        ),
        (
            {"Type": "substring", "StartIndex": 5, "EndIndex": 5},
            "EndIndex: 5 is not greater than StartIndex, 5",
        ),
        (
            {"Type": "substring", "StartIndex": 10, "EndIndex": 5},
            "EndIndex: 5 is not greater than StartIndex, 10",
        ),
        ({"Type": "date"}, "DateFormat: empty"),
        ({"Type": "date", "DateFormat": "YYYY"}, "DateFormat: nothing in it is part of a date"),
        ({"Type": "date", "DateFormat": "%Q"}, "DateFormat: %Q is not known"),
        ({"Count": None}, "Count: missing"),
        ({"Index": None}, "Index: missing, and so is IndexParameter"),
        ({"Index": 2}, "Index: 2 is not one of the 2 parts"),
        ({"IndexParameter": "Frame"}, "IndexParameter: there is Index as well"),
        ({"Count": MAX_COUNT + 1}, "Count: expected `int` <= 100000"),
        ({"Index": -1}, "Index: expected `int` >= 0"),
        ({"Index": None, "IndexParameter": "1st"}, "IndexParameter: expected `str` matching"),
        ({"StartIndex": 1.5}, "StartIndex: expected `int`, got `float`"),
    ],
)
def test_s8_what_is_wrong_with_a_partition_is_told(
    changed: dict[str, object], message: str
) -> None:
    fields = {name: value for name, value in (PARTITION | changed).items() if value is not None}

    with pytest.raises(SourceInvalidError) as caught:
        decode_source({"Bucket": "show", "Partition": fields}, source="x")

    assert caught.value.message.startswith(f"x: Partition.{message}")


def test_s8_what_a_type_has_no_use_for_may_stand_there() -> None:
    """A published result has all of the fields."""
    partition = {**PARTITION, "Pattern": "[", "StartIndex": 9, "EndIndex": 1, "DateFormat": ""}

    decode_source({"Bucket": "show", "Partition": partition}, source="x")
    decode_source({"Bucket": "show", "Partition": {"Type": "", "Pattern": ""}}, source="x")


def test_s8_a_part_may_be_said_by_a_parameter_of_the_task() -> None:
    partition = Partition("object", count=4, index_parameter="Part")

    assert Share(partition, "", 3).index == 3
    assert Share(partition, "").index is None
    assert all(Share(partition, "").has(key) for key in "abcdef"), "and without it all of them"
    for index in (-1, 4):
        with pytest.raises(SourceInvalidError, match=f"{index} is not one of the 4 parts"):
            Share(partition, "", index)
    with pytest.raises(SourceInvalidError, match="there is no Partition to take part 0 of"):
        Share(None, "", 0)


def test_s8_a_pattern_that_takes_too_long_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_plugin.content.pattern.MAX_SEARCH_SECONDS", 0.05)
    share = Share(Partition("regex", "(a+)+$", count=2, index=0), "")

    with pytest.raises(SourceInvalidError, match=r"Partition\.Pattern: .* was not done"):
        share.has("a" * 1000 + "b")
