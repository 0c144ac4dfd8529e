"""`propmaster transfer watch`: transfers as they go, in a terminal or as lines.

In a terminal the picture is drawn once a second over the one before. Elsewhere a line is written
whenever something has changed. Either way the ledger is looked at and nothing is written to it.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import click

from agent_plugin.cli.options import common_options, escaped, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.cli.steering import Choice, absent, chosen, reading
from agent_plugin.cli.tables import cut
from agent_plugin.content.errors import CancelledError
from agent_plugin.transfer.api import Session
from agent_plugin.transfer.entities import Found
from agent_plugin.transfer.find import Scopes
from agent_plugin.transfer.progress import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

_KEYS: Final = (
    *("id", "code", "status", "progress", "size", "done", "speed", "etr"),
    *("error_code", "error", "finished"),
)
# In the order in which a screen that is too small leaves them out.
_ORDER: Final = (*("running", "init", "waiting", "paused", "pending", "failed", "aborted", "done"),)
_STYLES: Final = {
    "running": "bold green",
    "done": "green",
    "failed": "bold red",
    "aborted": "red",
    "paused": "yellow",
    "pending": "yellow",
}
# Narrower screens show fewer columns, so that a bar has room.
_WIDE_COLUMNS: Final = 70
_NARROW_COLUMNS: Final = 50
_ENDED_BADLY: Final = frozenset({"failed", "aborted"})
_TROUBLED: Final = "status IN (booting, executing, queued, failed) AND error_code<>''"


class _View(Protocol):
    def show(self, found: Sequence[Found]) -> None:
        """Show how transfers are; each has `files` and, if something is wrong, `trouble`."""


@click.command(name="watch")
@click.argument("transfers", type=int, nargs=-1, metavar="[TRANSFER]...")
@click.option("--where", "condition", metavar="QUERY", help="Those that it finds.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    metavar="SECONDS",
    help="How often to look; 1 if not given.",
)
@common_options
def watch_command(
    transfers: tuple[int, ...],
    condition: str | None,
    interval: float,
    as_json: bool,
    config: Path | None,
) -> None:
    """Show transfers as they go: progress, speed, time left, errors.

    Named ones until they have ended; otherwise all active ones, until Ctrl-C.
    """
    session = reading(config)
    ids: list[int] | None = None
    if transfers or condition is not None:
        ids = chosen(session, Choice(transfers, condition))
    for transfer in transfers:
        if session.get("transfer", transfer, ["id"]) is None:
            raise absent(transfer)
    found: list[Found] = []
    with cancel_on_signals() as cancellation, _view(as_json=as_json) as view:
        try:
            while True:
                found = _look(session, ids)
                view.show(found)
                if ids is not None and all(each["finished"] is not None for each in found):
                    break
                cancellation.sleep(interval)
        except CancelledError:
            # Who watches has seen enough.
            return
    if any(each["status"] in _ENDED_BADLY for each in found):
        raise click.exceptions.Exit(1)


def _look(session: Session, ids: Sequence[int] | None) -> list[Found]:
    if ids is None:
        found = session.search("transfer", scopes=Scopes(), attributes=_KEYS)
    else:
        looked = [session.get("transfer", id_, _KEYS) for id_ in ids]
        found = [each for each in looked if each is not None]
    running = [each["id"] for each in found if each["status"] == "running"]
    troubles = _troubles(session, running)
    counts = session.counts([each["id"] for each in found])
    for each in found:
        each["files"] = counts.get(each["id"], {})
        each["trouble"] = troubles.get(each["id"], "")
        if each["error"]:
            each["trouble"] = f"{each['error_code']}: {each['error']}"
    return found


def _troubles(session: Session, running: Sequence[int]) -> dict[int, str]:
    """Return what went wrong last in each transfer that is under way."""
    latest: dict[int, tuple[float, str]] = {}
    for transfer in running:
        tasks = session.search(
            f"task WHERE {_TROUBLED}",
            scopes=Scopes(),
            transfer=transfer,
            attributes=("error", "error_code", "not_before", "finished"),
            limit=1000,
        )
        for task in tasks:
            times = [task[key].timestamp() for key in ("not_before", "finished") if task[key]]
            when = max(times, default=0.0)
            if when >= latest.get(transfer, (0.0, ""))[0]:
                latest[transfer] = (when, f"{task['error_code']}: {task['error']}")
    return {transfer: text for transfer, (_, text) in latest.items()}


@contextmanager
def _view(*, as_json: bool) -> Iterator[_View]:
    if as_json:
        yield _JsonLines()
    elif sys.stdout.isatty():
        with _Screen() as screen:
            yield screen
    else:
        yield _Lines()


def files_of(counts: dict[str, int]) -> str:
    """Return how many files are in place, and what is with the others."""
    total = sum(number for status, number in counts.items() if status != "excluded")
    parts = [f"{counts.get('done', 0)} of {total} file{'s' * (total != 1)}"]
    parts += [
        f"{counts[status]} {words}"
        for status, words in (("failed", "failed"), ("onhold", "on hold"), ("excluded", "excluded"))
        if counts.get(status)
    ]
    return ", ".join(parts)


# ------------------------------------------------------------------------------ without a screen


class _Lines:
    """Writes a line for each transfer that has changed."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[Any, ...]] = {}

    def show(self, found: Sequence[Found]) -> None:
        for each in found:
            now = (each["status"], each["progress"], each["trouble"])
            if self._told.get(each["id"]) != now:
                self._told[each["id"]] = now
                say(_line(each))
        sys.stdout.flush()


def _line(each: Found) -> str:
    parts = [f"{each['progress']} %", _amount(each)]
    if each["files"]:
        parts.append(files_of(each["files"]))
    if each["status"] == "running":
        parts.append(f"{each['speed']:.1f} MB/s")
        if each["etr"]:
            parts.append(f"{each['etr']} left")
    if each["trouble"]:
        parts.append(each["trouble"])
    return f"transfer {each['id']} {each['status']}: {', '.join(parts)}; {each['code']}"


def _amount(each: Found) -> str:
    if each["size"] < 0:
        return "size unknown"
    return f"{format_bytes(each['done'])} of {format_bytes(each['size'])}"


class _JsonLines:
    """Prints an object on a line whenever anything has changed."""

    def __init__(self) -> None:
        self._told: list[Found] | None = None

    def show(self, found: Sequence[Found]) -> None:
        if self._told != found:
            self._told = list(found)
            print_json({"transfers": found})
            sys.stdout.flush()


# ------------------------------------------------------------------------------------- a screen


class _Screen:
    """Draws transfers over what was drawn before."""

    def __init__(self) -> None:
        # Imported here: rich takes 60 ms, and only a screen needs it.
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415

        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, found: Sequence[Found]) -> None:
        self._live.update(self._picture(found), refresh=True)

    def _picture(self, found: Sequence[Found]) -> "RenderableType":
        from rich.console import Group  # noqa: PLC0415

        ordered = sorted(found, key=lambda each: (_ORDER.index(each["status"]), each["id"]))
        # One line for the sum below, one for the cursor.
        left, shown = self._console.height - 2, []
        for each in ordered:
            lines = 3 if each["trouble"] else 2
            if left < lines:
                break
            left -= lines
            shown.append(each)
        made: list[RenderableType] = []
        for each in shown:
            made += [self._measures(each), self._name(each)]
            if each["trouble"]:
                made.append(self._text(f"      {each['trouble']}", "red"))
        made.append(self._text(_sum(ordered, len(shown)), "dim"))
        return Group(*made)

    def _measures(self, each: Found) -> "RenderableType":
        """Draw the line with the bar."""
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415

        status, running = each["status"], each["status"] == "running"
        right = [
            (5, f"{each['progress']} %"),
            (19, _short_amount(each)),
            (10, f"{each['speed']:.1f} MB/s" if running else ""),
            (8, each["etr"] if running else ""),
        ]
        # The time that is left, and how much of it all, say most.
        for least, dropped in ((_WIDE_COLUMNS, 1), (_NARROW_COLUMNS, -2)):
            if self._console.width < least:
                del right[dropped]
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=max(4, len(str(each["id"]))), justify="right", no_wrap=True)
        grid.add_column(width=7, no_wrap=True)
        grid.add_column(ratio=1)
        for width, _ in right:
            grid.add_column(width=width, justify="right", no_wrap=True)
        grid.add_row(
            str(each["id"]),
            self._text(status, _STYLES.get(status, "")),
            ProgressBar(total=100, completed=each["progress"]),
            *(text for _, text in right),
        )
        return grid

    def _name(self, each: Found) -> "RenderableType":
        files = f"{files_of(each['files'])}  " if each["files"] else ""
        name = cut(escaped(each["code"]), max(1, self._console.width - len(f"      {files}")))
        return self._text(f"      {files}{name}", "dim")

    def _text(self, text: str, style: str) -> "RenderableType":
        from rich.text import Text  # noqa: PLC0415

        return Text(cut(escaped(text), self._console.width), style=style, no_wrap=True)


def _short_amount(each: Found) -> str:
    """Return the same as `_amount`, with one unit where that says it all."""
    if each["size"] < 0:
        return ""
    done, size = format_bytes(each["done"]), format_bytes(each["size"])
    if each["status"] == "done":
        return size
    number, _, unit = done.partition(" ")
    return f"{number if size.endswith(f' {unit}') else done} / {size}"


def _sum(found: Sequence[Found], shown: int) -> str:
    counts = [
        f"{number} {status}"
        for status in _ORDER
        if (number := sum(each["status"] == status for each in found))
    ]
    hidden = f", {len(found) - shown} not shown" if shown < len(found) else ""
    transfers = "1 transfer" if len(found) == 1 else f"{len(found)} transfers"
    clock = time.strftime("%H:%M:%S", time.gmtime())
    return f"{transfers}: {', '.join(counts) or 'none is active'}{hidden}; {clock} UTC"
