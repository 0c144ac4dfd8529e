"""Rules lead where they say and nowhere else, whatever roots and names a manifest has."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_plugin.content.errors import PathMappingError, UnsafePathError
from agent_plugin.session.job import PathMappingRule
from agent_plugin.session.path_rules import PathRules, checked_rules, format_of

# Absolute paths, `.` and empty names are refused where manifests are decoded; so is `..`, which is
# here nevertheless.
NAMES = st.sampled_from(["a", "A", "b", "show", "..", "C:", "x\\y", "..\\..", "é"])
ENTRIES = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
POSIX = st.lists(st.sampled_from(["a", "A", "b", "show"]), max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)
WINDOWS = st.tuples(
    st.sampled_from(["C:\\", "c:/", "\\\\host\\share\\", "C:"]),
    st.lists(st.sampled_from(["a", "A", "b", ".."]), max_size=3).map("\\".join),
).map("".join)


@st.composite
def rules(draw: st.DrawFn) -> list[PathMappingRule]:
    sources = draw(st.lists(st.tuples(st.booleans(), POSIX, WINDOWS), max_size=4))
    return [
        PathMappingRule(
            "windows" if windows else "posix", theirs if windows else posix, f"/here/{at}"
        )
        for at, (windows, posix, theirs) in enumerate(sources)
        if ".." not in theirs and not (windows and PureWindowsPath(theirs).root == "")
    ]


@given(rules(), st.one_of(POSIX, WINDOWS), ENTRIES)
@example([PathMappingRule("windows", "C:\\", "/here/0")], "C:\\a", "..\\..\\x")
@example([PathMappingRule("posix", "/a", "/here/0")], "/a/../b", "c")
@example(
    [PathMappingRule("posix", "/a", "/here/0"), PathMappingRule("posix", "/a/b", "/here/1")],
    *("/a", "b/c"),
)
def test_what_is_placed_is_below_the_destination_of_the_longest_rule(
    given_rules: list[PathMappingRule], root: str, entry: str
) -> None:
    """Seen to fail when `..` is let through for Windows, and when the first rule wins."""
    place = PathRules(checked_rules(given_rules)).below(root)
    try:
        found = place(entry)
    except UnsafePathError:
        assert format_of(root) == "windows"
        assert ".." in entry or ":" in entry
        return
    kind = PureWindowsPath if format_of(root) == "windows" else PurePosixPath
    matching = [
        rule
        for rule in given_rules
        if rule.source_path_format == format_of(root)
        and kind(root, entry).parent.is_relative_to(kind(rule.source_path))
    ]
    if found is None:
        assert ".." in kind(root).parts or not kind(root).is_absolute() or not matching
        return
    directory, path = found
    best = max(len(kind(rule.source_path).parts) for rule in matching)
    longest = [rule for rule in matching if len(kind(rule.source_path).parts) == best]
    if ".." not in entry.replace("\\", "/").split("/"):
        assert os.fspath(directory) == longest[0].destination_path
    assert not path.startswith("/")
    if format_of(root) == "windows":
        assert ".." not in path.split("/")
        assert "\\" not in path


@given(POSIX, ENTRIES)
def test_without_rules_a_root_is_at_its_own_path(root: str, entry: str) -> None:
    assert PathRules(None).below(root)(entry) == (Path(root), entry)


@pytest.mark.parametrize("root", ["C:\\show", "\\\\host\\share", "relative", "/a/../b", "", "/\0"])
def test_without_rules_other_roots_are_nowhere(root: str) -> None:
    assert PathRules(None).below(root)("a") is None


def test_windows_paths_are_compared_without_case_and_keep_it() -> None:
    mapped = PathRules([PathMappingRule("windows", "z:\\SHOW", "/here")])

    assert mapped.below("Z:\\show\\Shot")("Tex/A.tx") == (Path("/here"), "Shot/Tex/A.tx")
    assert mapped.below("Z:/show")("a\\b.tx") == (Path("/here"), "a/b.tx")
    assert mapped.below("Z:\\shower")("a") is None


def test_a_drive_alone_is_the_whole_drive() -> None:
    mapped = PathRules(checked_rules([PathMappingRule("windows", "z:", "/here")]))

    assert mapped.below("Z:\\show")("a") == (Path("/here"), "show/a")


@pytest.mark.parametrize("source", ["z:show", "\\show", "show", "C:\\a\\..\\b"])
def test_a_rule_from_no_absolute_path_is_refused(source: str) -> None:
    with pytest.raises(PathMappingError, match="no absolute path"):
        checked_rules([PathMappingRule("windows", source, "/here")])
