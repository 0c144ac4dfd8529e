"""Dates at the beginning of names, in both spellings of a layout."""

import re

import pytest

from agent_plugin.sources.date_layout import DateLayout


@pytest.mark.parametrize(
    ("layout", "name", "found"),
    [
        ("2006-01-02", "2024-02-29-beauty.exr", "2024-02-29"),
        ("2006-01-02", "2023-02-29-beauty.exr", None),
        ("2006-01-02", "2023-13-01", None),
        ("2006-01-02", "2023-00-01", None),
        ("2006-01-02", "2023-01-00", None),
        ("2006-01-02", "2023-1-02", None),
        ("2006-01-02", "2023-01", None),
        ("2006-01-02", "", None),
        ("01-02", "02-29", "02-29"),
        ("1/2/2006", "1/2/2024x", "1/2/2024"),
        ("1/2/2006", "12/3/2024", None),
        ("2006 Jan _2", "2024 FEB  3", "2024 Feb  3"),
        ("2006 Jan _2", "2024 Feb 13", "2024 Feb 13"),
        ("January 2006", "march 2024 ", None),
        ("2006January", "2024march..", None),
        ("2006Jan", "2024mar", "2024Mar"),
        # The day of the week is not heeded, and written as it is: of the first of a year 0, too.
        ("Mon 2006-01-02", "Sun 2024-01-01", "Mon 2024-01-01"),
        ("Monday", "Tuesday", None),
        ("Monday", "Sundays", "Saturday"),
        ("2006-002", "2024-366", "2024-366"),
        ("2006-002", "2023-366", None),
        ("2006-002", "2023-000", None),
        ("20060102T150405", "20240102T235959", "20240102T235959"),
        ("20060102T150405", "20240102T240000", None),
        ("20060102T150405", "20240102T236000", None),
        ("20060102T150405", "20240102T235960", None),
        ("2006-01-02 03:04PM", "2024-01-02 12:00AM", "2024-01-02 12:00AM"),
        ("2006-01-02 03:04PM", "2024-01-02 13:00AM", None),
        ("03pm", "11pm", "11pm"),
        ("06-01", "68-01", "68-01"),
        ("06-01", "69-01", "69-01"),
        ("2006-01-02T15:04:05Z07:00", "2024-01-02T03:04:05+00:00", "2024-01-02T03:04:05Z"),
        ("2006-01-02T15:04:05Z07:00", "2024-01-02T03:04:05-07:00", "2024-01-02T03:04:05-07:00"),
        ("15-0700", "03-2500", None),
        ("15-0700", "03+0060", None),
        ("15-0700", "03-0000", "03+0000"),
        ("15-07:0000", "03-01:0000", "03-01:0000"),
        ("shot_2006_01", "shot_2024_12.exr", "shot_2024_12"),
        ("shot_2006", "Shot_2024", None),
        ("2006 01", "2024   1", None),
        ("ü2006", "ü2024x", "ü2024"),
        ("2006-01-02T1", "2023-05-01T1", "2023-01-01T1"),
        ("2006-01-02T1", "2023-13-01T1", None),
    ],
)
def test_s8_a_layout_in_the_spelling_of_go(layout: str, name: str, found: str | None) -> None:
    assert DateLayout(layout).date_in(name) == found


@pytest.mark.parametrize(
    ("layout", "name", "found"),
    [
        ("%Y-%m-%d", "2024-02-29-beauty.exr", "2024-02-29"),
        ("%Y%m%d", "20240230", None),
        ("%d%b%y", "03FEB24_x", "03Feb24"),
        ("%Y-%j", "2024-060", "2024-060"),
        ("%H%M%S", "235959.exr", "235959"),
        ("%I%p", "03AM", "03AM"),
        ("%Y%%", "2024%x", "2024%"),
        # What is no directive is text, also what Go would take for an element.
        ("v2_%Y", "v2_2024", "v2_2024"),
        ("%Y%z", "2024+0100", "2024+0100"),
        ("%A", "Mondayy", "Saturday"),
    ],
)
def test_s8_a_layout_in_the_spelling_of_strftime(layout: str, name: str, found: str | None) -> None:
    assert DateLayout(layout).date_in(name) == found


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("", "nothing in it is part of a date"),
        ("day", "nothing in it is part of a date"),
        ("%%", "nothing in it is part of a date"),
        ("%Y-%Q", "%Q is not known; known are %Y %y"),
        ("%Y%", "% is not known"),
        ("15:04:05 MST", "MST is not supported"),
        ("15:04:05.000", r".000 is not supported"),
    ],
)
def test_s8_a_layout_that_is_none_is_refused(layout: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        DateLayout(layout)
