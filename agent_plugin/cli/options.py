"""What the commands have in common: options, and how a result is printed."""

import functools
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Final, ParamSpec, TypeVar

import click
import msgspec

from agent_plugin.content.errors import PropmasterError
from agent_plugin.content.named_file import open_named

P = ParamSpec("P")
R = TypeVar("R")

# C0, DEL and C1: what could begin a line, or make a terminal do something.
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")

store_option = click.option(
    "--store",
    "store_url",
    required=True,
    metavar="URL",
    help="The content store: s3://bucket/prefix or file:///dir.",
)
farm_option = click.option("--farm-id", required=True, metavar="ID", help="farm-<32 hex digits>.")
queue_option = click.option(
    "--queue-id", required=True, metavar="ID", help="queue-<32 hex digits>."
)
session_dir_option = click.option(
    "--session-dir",
    required=True,
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="The session's directory; the same for all session commands.",
)


def _parameters(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    told: dict[str, str] = {}
    for each in values:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{each[:100]!r} is no NAME=VALUE")
        if told.setdefault(name, value) != value:
            raise click.BadParameter(f"{name} is said twice: {told[name]!r} and {value[:100]!r}")
    return told


parameters_option = click.option(
    "--parameter",
    "parameters",
    multiple=True,
    callback=_parameters,
    metavar="NAME=VALUE",
    help="A parameter of the task; those that no source asks for do not matter.",
)

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Settings file; otherwise PROPMASTER_CONFIG or /etc/propmaster/config.toml.",
)


def common_options(command: Callable[P, R]) -> Callable[P, R]:
    """Give a command --json (as `as_json`) and --config (as `config`)."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @config_option
    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        return command(*args, **kwargs)

    return wrapped


def open_document(path: Path) -> AbstractContextManager[IO[bytes]]:
    """Open what a command line names for reading; `-` is standard input.

    Raises:
        OSError: As open_named.
    """
    if os.fspath(path) == "-":
        return click.open_file("-", "rb")
    return open_named(path)


def escaped(text: str) -> str:
    r"""Return a text in which each control character is spelled: `\n`, `\t`, `\x1b`.

    Names come from jobs and tasks. One with a line break could put a line of its own into an
    output that others read by lines: Open Job Description obeys lines like `openjd_env: A=1`.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: str, *, err: bool = False) -> None:
    """Print one line for people, on stdout or stderr; control characters in it are escaped.

    It has to begin with a word of ours, not with a name, for the same reason.
    """
    print(escaped(text), file=sys.stderr if err else sys.stdout)


def say_error(error: PropmasterError) -> None:
    """Print an expected failure on stderr: what happened, and what to do."""
    say(f"error[{error.reference}]: {error.message}", err=True)
    if error.hint:
        say(f"hint: {error.hint}", err=True)


def print_json(result: object) -> None:
    """Print a result as one line of JSON, in UTF-8 whatever the locale's encoding is."""
    try:
        data = msgspec.json.encode(result)
    except UnicodeEncodeError:
        # A name that is not UTF-8: json escapes what msgspec refuses.
        import json  # noqa: PLC0415 - only then

        data = json.dumps(msgspec.to_builtins(result)).encode("ascii")
    # What was printed as text comes first.
    sys.stdout.flush()
    sys.stdout.buffer.write(data + b"\n")
