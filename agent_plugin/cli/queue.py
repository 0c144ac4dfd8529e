"""`propmaster queue`: what the operator of this host chooses for the jobs of a queue."""

from pathlib import Path
from typing import Final

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.services import state_directory
from agent_plugin.session.queues import (
    FileSystem,
    QueueSettings,
    read_queue,
    read_queues,
    write_queue,
)
from agent_plugin.settings import load

_CHOICES: Final[dict[str, FileSystem | None]] = {
    "COPIED": "COPIED",
    "VIRTUAL": "VIRTUAL",
    "AUTO": "AUTO",
    "JOB": None,
}


class QueuesResult(msgspec.Struct):
    """What `queue show` prints."""

    queues: list[QueueSettings]


@click.group(name="queue")
def command() -> None:
    """Show or set what this host does for the jobs of a queue, whatever they say themselves."""


@command.command(name="show")
@click.argument("queue", required=False)
@common_options
def show_command(queue: str | None, as_json: bool, config: Path | None) -> None:
    """Show what was set for QUEUE, or for all queues."""
    directory = state_directory(load(config))
    result = QueuesResult([read_queue(directory, queue)] if queue else read_queues(directory))
    if as_json:
        print_json(result)
        return
    for settings in result.queues:
        say(f"{settings.queue_id}: {settings.file_system or 'as each job says'}")
    if not result.queues:
        say("nothing was set for any queue")


@command.command(name="set")
@click.argument("queue")
@click.option(
    "--file-system",
    required=True,
    type=click.Choice(list(_CHOICES)),
    help="How inputs of its jobs are brought in; JOB for what each job says.",
)
@common_options
def set_command(queue: str, file_system: str, as_json: bool, config: Path | None) -> None:
    """Set what sessions of QUEUE that start from now on do."""
    chosen = _CHOICES[file_system]
    settings = QueueSettings(queue, chosen)
    write_queue(state_directory(load(config)), settings)
    if as_json:
        print_json(settings)
    else:
        say(f"{queue}: {chosen or 'as each job says'}")
