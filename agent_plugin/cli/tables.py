"""Tables for people: columns as wide as what is in them, the last one as wide as there is room."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agent_plugin.cli.options import escaped

_GAP: Final = "  "
_LEAST_COLUMNS: Final = 40


def room() -> int | None:
    """Return how many columns standard output has; None if it is no terminal, and has any."""
    if not sys.stdout.isatty():
        return None
    return max(_LEAST_COLUMNS, shutil.get_terminal_size().columns)


def lines(titles: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None) -> list[str]:
    """Return a table as lines, the titles first; control characters are escaped.

    Args:
        titles: One for each column; those that begin with `>` are of numbers, and stand at the
            right.
        rows: Cells, one for each title.
        width: Columns of the screen; what does not fit is cut. None: nothing is cut.
    """
    cells = [[escaped(cell) for cell in row] for row in rows]
    heads = [title.removeprefix(">") for title in titles]
    widths = [
        max(len(head), *(wide(row[at]) for row in cells)) if cells else len(head)
        for at, head in enumerate(heads)
    ]
    before = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    if width is not None:
        widths[-1] = max(1, min(widths[-1], width - before))
    made = []
    for row in [heads, *cells]:
        parts = [
            _filled(cell, size, right=title.startswith(">"))
            for cell, size, title in zip(row, widths, titles, strict=True)
        ]
        made.append(_GAP.join(parts).rstrip())
    return made


def with_errors(
    titles: Sequence[str], rows: Sequence[Sequence[str]], found: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return a table as wide as the screen, with the error of a row below it.

    Args:
        titles: As for `lines`.
        rows: As for `lines`.
        found: What the rows are of, with `error` and `error_code`; an empty `error` is none.
    """
    width = room()
    table = lines(titles, rows, width=width)
    made = table[:1]
    for line, each in zip(table[1:], found, strict=True):
        made.append(line)
        if each["error"]:
            why = escaped(f"      {each['error_code']}: {each['error']}")
            made.append(why if width is None else cut(why, width))
    return made


def cut(text: str, size: int) -> str:
    """Return a text that takes so many columns at most; of a longer one the middle is left out.

    Names begin with what a thing is, and end with what tells it from others.
    """
    if wide(text) <= size:
        return text
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while (head or tail) and wide(head) + wide(tail) > size - 1:
        if wide(head) > wide(tail):
            head = head[:-1]
        else:
            tail = tail[1:]
    return f"{head}…{tail}"


def wide(text: str) -> int:
    """Return how many columns a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 - 20 ms, for names that are not ASCII

    return cell_len(text)


def _filled(text: str, size: int, *, right: bool) -> str:
    text = cut(text, size)
    fill = " " * (size - wide(text))
    return fill + text if right else text + fill
