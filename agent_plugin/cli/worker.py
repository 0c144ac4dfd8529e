"""`propmaster worker`: what a render worker's host runs and installs."""

import click

from agent_plugin.cli.worker_install import install_command, status_command, uninstall_command
from agent_plugin.cli.worker_serve import serve_command


@click.group(name="worker")
def command() -> None:
    """Serve the worker agents of this host."""


command.add_command(serve_command)
command.add_command(install_command)
command.add_command(status_command)
command.add_command(uninstall_command)
