"""`propmaster worker`: what a render worker's host runs and installs."""

import click


@click.group(name="worker")
def command() -> None:
    """Serve the worker agents of this host."""
