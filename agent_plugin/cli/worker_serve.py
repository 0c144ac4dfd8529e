"""`propmaster worker serve`: the host service."""

import os
from pathlib import Path

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.streams import flush_output
from agent_plugin.settings import load
from agent_plugin.workers.listener import listen, notify_systemd
from agent_plugin.workers.service import Service


class ServeResult(msgspec.Struct):
    """What `worker serve` prints when it can be asked.

    Attributes:
        ready: The socket's path.
    """

    ready: str


@click.command(name="serve")
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path, dir_okay=False, resolve_path=True),
    help="Where it is asked; otherwise [worker] socket. A socket that systemd gives comes first.",
)
@common_options
def serve_command(socket_path: Path | None, as_json: bool, config: Path | None) -> None:
    """Run what worker agents start as job users, with the rights of this user, until SIGTERM."""
    settings = load(config)
    path = socket_path or settings.worker.socket

    def ready() -> None:
        if as_json:
            print_json(ServeResult(os.fspath(path)))
        else:
            say(f"ready: {path}")
        flush_output()
        notify_systemd("READY=1")

    with listen(path) as listener:
        Service(listener, settings).serve(ready)
