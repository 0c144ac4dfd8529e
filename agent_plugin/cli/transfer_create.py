"""`propmaster transfer create` and `run`: copies that somebody asked for, made and carried out."""

import sys
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.cli.steering import absent, pairs
from agent_plugin.content.errors import JobInvalidError
from agent_plugin.settings import load
from agent_plugin.sizes import Size
from agent_plugin.transfer.create import MAX_DOCUMENT_BYTES
from agent_plugin.transfer.entities import Found
from agent_plugin.transfer.progress import format_bytes
from agent_plugin.transfers import open_session, run_copies

_NEXT_STEPS: Final = {
    "waiting": "run {}",
    "paused": "resume {}",
    "pending": "set {} --destination PLACE --status waiting",
}


class CreateResult(msgspec.Struct):
    """What `transfer create` prints."""

    transfer: Found


def _speed(_ctx: click.Context, _param: click.Parameter, text: str | None) -> int:
    if text is None:
        return 0
    try:
        size = Size.parse(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no size, such as 10MB") from error
    if size.percent:
        raise click.BadParameter("bytes a second are meant, such as 10MB")
    return size.bytes


@click.command(name="create", short_help="Make a transfer that copies SOURCE to DESTINATION.")
@click.argument("source", required=False)
@click.argument("destination", required=False)
@click.option("--spec", metavar="JSON|FILE", help="The whole document instead; - is stdin.")
@click.option("--name", help="A line for people; otherwise the name of the first file.")
@click.option("--paused", is_flag=True, help="Do not begin before it is resumed.")
@click.option("--priority", metavar="N", help="0 to 1000, higher first; or high, medium, low.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Copy what has such a name.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Do not copy it.")
@click.option("--ignore-existing", is_flag=True, help="Leave what is at the destination already.")
@click.option(
    *("--speed-limit",),
    callback=_speed,
    metavar="SIZE",
    help="A second, such as 10MB; not of copies within a store.",
)
@click.option("--metadata", multiple=True, callback=pairs, metavar="K=V", help="Kept with it.")
@common_options
def create_command(
    source: str | None,
    destination: str | None,
    spec: str | None,
    name: str | None,
    paused: bool,
    priority: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    ignore_existing: bool,
    speed_limit: int,
    metadata: dict[str, str],
    as_json: bool,
    config: Path | None,
) -> None:
    """Make a transfer that copies SOURCE to DESTINATION; `transfer run` carries it out.

    Both are s3://bucket/key, file:///path or an absolute path; with a slash at the end, all that is
    below. Without a DESTINATION it is pending until it has one. A PATTERN is w, *w, w*, *w*, a*b or
    re('…'), and --include wins.
    """
    if (spec is None) == (source is None):
        raise click.UsageError("give SOURCE and DESTINATION, or --spec")
    if source is not None and source.lstrip().startswith("{"):
        raise click.UsageError("a whole document is given by --spec")
    told = {
        "include": include,
        "exclude": exclude,
        "ignore_existing": ignore_existing,
        "speed_limit": speed_limit,
    }
    given = {
        "source": source,
        "destination": destination,
        "name": name,
        "status": "paused" if paused else None,
        "priority": priority,
        "metadata": metadata,
        "settings": {key: value for key, value in told.items() if value},
    }
    document: dict[str, Any] | str | Path = {key: value for key, value in given.items() if value}
    if spec is not None:
        document = _spec(spec)
    with cancel_on_signals() as cancellation:
        session = open_session(load(config), cancellation=cancellation)
        made = session.create("transfer", document)
    if as_json:
        print_json(CreateResult(made))
        return
    size = f", {format_bytes(made['size'])}" if made["destination"] else ""
    say(f"transfer {made['id']} is {made['status']}: {made['code']}{size}")
    if next_step := _NEXT_STEPS.get(made["status"]):
        say(f"hint: `propmaster transfer {next_step.format(made['id'])}`", err=True)


def _spec(spec: str) -> str | Path:
    if spec != "-":
        return spec
    text = sys.stdin.read(MAX_DOCUMENT_BYTES + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        raise JobInvalidError("standard input has too much", hint="make several transfers")
    return text


class RunResult(msgspec.Struct):
    """What `transfer run` prints; sizes in bytes, `seconds` of the run.

    Attributes:
        transfers: What was worked on, as it is afterwards.
        files, bytes: That were copied.
        failed: Tasks that gave up.
    """

    transfers: list[Found]
    files: int
    bytes: int
    failed: int
    seconds: float


@click.command(name="run", short_help="Carry out the copies that wait.")
@click.argument("transfers", type=int, nargs=-1, metavar="[TRANSFER]...")
@common_options
def run_command(transfers: tuple[int, ...], as_json: bool, config: Path | None) -> None:
    """Carry out the copies that were made, all that wait or those that are named.

    Goes on where another run was stopped or killed. Exits with 1 if one of them has not become
    done; what is paused meanwhile is left for the next run.
    """
    settings = load(config)
    session = open_session(settings)
    for transfer in transfers:
        if session.get("transfer", transfer, ["id"]) is None:
            raise absent(transfer)
    with cancel_on_signals() as cancellation:
        done = run_copies(settings, cancellation=cancellation, only=transfers or None)
    found = [session.get("transfer", id_) for id_ in sorted({*done.transfers, *transfers})]
    after = [each for each in found if each is not None]
    if as_json:
        print_json(RunResult(after, done.files, done.bytes, done.failed, round(done.seconds, 3)))
    else:
        for each in after:
            why = f": {each['error']}" if each["error"] else ""
            say(f"transfer {each['id']} is {each['status']}{why}")
        files = "1 file" if done.files == 1 else f"{done.files} files"
        say(f"{files}, {format_bytes(done.bytes)}, {done.failed} failed")
    if any(each["status"] != "done" for each in after):
        raise click.exceptions.Exit(1)
