"""`propmaster queue`: what the operator of this host chooses for the jobs of a queue."""

from pathlib import Path
from typing import Final, get_args

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.queue_settings import Explained, explain
from agent_plugin.services import state_directory
from agent_plugin.session.queues import (
    FileSystem,
    QueueSettings,
    read_queue,
    read_queues,
    write_queue,
)
from agent_plugin.settings import load, load_explained

_AS_SAID: Final = {None: "as the settings file says", "JOB": "as each job says"}


class QueuesResult(msgspec.Struct):
    """What `queue show` prints."""

    queues: list[QueueSettings]


class ExplainResult(msgspec.Struct, rename="camel"):
    """What `queue explain` prints."""

    queue_id: str
    settings: list[Explained]


@click.group(name="queue")
def command() -> None:
    """Show or set what this host does for the jobs of a queue, whatever they say themselves."""


@command.command(name="show")
@click.argument("queue", required=False)
@common_options
def show_command(queue: str | None, as_json: bool, config: Path | None) -> None:
    """Show what was set for QUEUE, or for all queues, by `queue set`."""
    directory = state_directory(load(config))
    result = QueuesResult([read_queue(directory, queue)] if queue else read_queues(directory))
    if as_json:
        print_json(result)
        return
    for settings in result.queues:
        _say(settings)
    if not result.queues:
        say("nothing was set for any queue")


@command.command(name="set")
@click.argument("queue")
@click.option(
    "--file-system",
    type=click.Choice(get_args(FileSystem)),
    help="How inputs of its jobs are brought in; JOB for what each job says.",
)
@click.option("--reset", is_flag=True, help="Set nothing: the settings file counts again.")
@common_options
def set_command(
    queue: str, file_system: FileSystem | None, reset: bool, as_json: bool, config: Path | None
) -> None:
    """Set what sessions of QUEUE that start from now on do, whatever the settings file says."""
    if reset == (file_system is not None):
        raise click.UsageError("give either --file-system or --reset")
    settings = QueueSettings(queue, file_system)
    write_queue(state_directory(load(config)), settings)
    if as_json:
        print_json(settings)
    else:
        _say(settings)


@command.command(name="explain")
@click.argument("queue")
@common_options
def explain_command(queue: str, as_json: bool, config: Path | None) -> None:
    """Show every setting that holds for sessions of QUEUE, and where each comes from."""
    result = ExplainResult(queue, explain(load_explained(config), queue))
    if as_json:
        print_json(result)
        return
    for setting in result.settings:
        # As the settings file would have it.
        value = msgspec.json.encode(setting.value).decode()
        say(f"{setting.key} = {value}  ({setting.source})")


def _say(settings: QueueSettings) -> None:
    chosen = settings.file_system
    say(f"{settings.queue_id}: {_AS_SAID.get(chosen, chosen)}")
