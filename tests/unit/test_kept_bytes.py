"""What a mount without a cache keeps: at most so much, and what was used last."""

from pathlib import Path

import pytest

from vfs import kept_bytes
from vfs.kept_bytes import KeptBytes


@pytest.fixture
def gone() -> list[str]:
    return []


@pytest.fixture
def kept(tmp_path: Path, gone: list[str]) -> KeptBytes:
    return KeptBytes(100, 0, tmp_path, gone.append)


def test_what_was_used_least_recently_goes_first(kept: KeptBytes, gone: list[str]) -> None:
    for name in "abc":
        kept.grew(name, 30)
    kept.used("a")

    kept.grew("d", 40)

    assert gone == ["b"]
    kept.grew("a", 10)
    assert gone == ["b", "c"]


def test_what_grows_is_used(kept: KeptBytes, gone: list[str]) -> None:
    for name, length in (("a", 30), ("b", 30), ("a", 10), ("c", 40)):
        kept.grew(name, length)

    assert gone == ["b"]


def test_what_comes_in_parts_goes_itself_when_nothing_else_is_left(
    kept: KeptBytes, gone: list[str]
) -> None:
    kept.grew("a", 90)
    kept.grew("b", 101)
    assert gone == ["a", "b"]

    kept.grew("b", 100)
    assert gone == ["a", "b"]


def test_what_can_only_be_had_whole_stays_until_the_next_comes(
    kept: KeptBytes, gone: list[str]
) -> None:
    kept.grew("a", 500, stays=True)
    assert gone == []

    kept.grew("b", 1)
    assert gone == ["a"]


def test_what_is_gone_does_not_count(kept: KeptBytes, gone: list[str]) -> None:
    kept.grew("a", 90)
    kept.gone("a")
    kept.gone("a")

    kept.grew("b", 100)

    assert gone == []


def test_a_disk_that_is_nearly_full_is_left_its_space(
    tmp_path: Path, gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_bytes, "_LEAST_BYTES", 10)
    kept = KeptBytes(10**12, 10**18, tmp_path, gone.append)

    kept.grew("a", 8)
    kept.grew("b", 16 * 1024 * 1024)

    assert gone == ["a", "b"], "no disk has so much free"
