"""Regular expressions of others: Python's syntax, and never without end."""

import pytest

from agent_plugin.content import pattern as module
from agent_plugin.content.pattern import Pattern, PatternInvalidError, PatternTooSlowError


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        (r"\d0", "a/10.exr", "10"),
        (r"^beauty", "shot/beauty", None),
        (r"\.exr$", "a.exr", ".exr"),
        (r"(?i)EXR", "a.exr", "exr"),
        (r"shot\d{3}|plate", "a/plate", "plate"),
        (r"\w+", "größe", "größe"),
        (r"\{\d\}", "a{1}", "{1}"),
        (r"a{,2}b", "aab", "aab"),
        (r"(.)\1", "abb", "bb"),
        ("", "anything", ""),
    ],
)
def test_s4_a_pattern_is_searched_anywhere(text: str, name: str, found: str | None) -> None:
    match = Pattern(text).search(name)

    assert (match[0] if match else None) == found


def test_s4_an_anchored_pattern_has_to_match_all_of_a_name() -> None:
    pattern = Pattern(r"\d+", anchored=True)

    assert [name for name in ("12", "a12", "12\n", "12b") if pattern.search(name)] == ["12"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "no regular expression: unterminated character set at position 0"),
        ("(a", "no regular expression: missing ), unterminated subpattern at position 0"),
        ("*", "no regular expression: nothing to repeat at position 0"),
        (r"\p{L}", r"no regular expression: bad escape \p at position 0"),
        ("[[:alpha:]]", "no regular expression: Possible nested set at position 1"),
        ("a{99999999999}", "no regular expression: the repetition number is too large"),
        ("(?:foo){e<=1}", r"a brace that is no repetition has to be written as \{"),
        ("a{2}b{e}", r"a brace that is no repetition has to be written as \{"),
        ("a" * 201, "201 characters are more than 200"),
    ],
)
def test_s4_a_pattern_that_can_not_be_used_is_refused(text: str, reason: str) -> None:
    with pytest.raises(PatternInvalidError) as caught:
        Pattern(text)

    assert str(caught.value) == reason


@pytest.mark.parametrize("text", [r"(a+)+$", r"(a|aa)+$", r"(.*)(.*)(.*)(.*)(.*)[^a]$"])
def test_s4_a_pattern_that_backtracks_without_end_is_given_up(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SEARCH_SECONDS", 0.1)
    pattern = Pattern(text)

    with pytest.raises(PatternTooSlowError, match=r"was not done with 'aaaa.* after 0\.1 s"):
        pattern.search("a" * 1000 + "b" * ("[^a]" not in text))


def test_s4_many_searches_that_are_each_in_time_are_bounded_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_TOTAL_SECONDS", 0.0)

    with pytest.raises(PatternTooSlowError, match="took more than 0 s"):
        Pattern("a").search("a" * 1000)
