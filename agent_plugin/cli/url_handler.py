"""`propmaster url-handler`: whether a web browser's click on such a URL comes here."""

import os

import click

from agent_plugin.cli.options import print_json, say
from agent_plugin.session.download_url import SCHEMES, Scheme
from agent_plugin.url_handler import (
    Desktop,
    HandlerStatus,
    command_line,
    install,
    status,
    uninstall,
)

_system_option = click.option(
    "--system", is_flag=True, help="For all users of this host who have chosen nothing else."
)
_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)


@click.group(name="url-handler")
def command() -> None:
    """Open deadline:// and propmaster:// URLs with propmaster, on a Linux desktop."""


@command.command(name="install")
@click.option(
    "--scheme",
    "schemes",
    type=click.Choice(SCHEMES),
    multiple=True,
    help="Only URLs of this scheme; may be given more than once.",
)
@_system_option
@_json_option
def install_command(schemes: tuple[Scheme, ...], system: bool, as_json: bool) -> None:
    """Make propmaster the default for the URLs; all other defaults stay as they are."""
    _tell(install(_desktop(system), schemes or SCHEMES, command_line()), as_json)


@command.command(name="uninstall")
@_system_option
@_json_option
def uninstall_command(system: bool, as_json: bool) -> None:
    """Take it out again; what was the default before is so again."""
    _tell(uninstall(_desktop(system)), as_json)


@command.command(name="status")
@_system_option
@_json_option
def status_command(system: bool, as_json: bool) -> None:
    """Say what opens the URLs."""
    _tell(status(_desktop(system)), as_json)


def _desktop(system: bool) -> Desktop:
    return Desktop.of_system() if system else Desktop.of_user(os.environ)


def _tell(found: HandlerStatus, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    say(f"state: {found.state}")
    for scheme, default in found.defaults.items():
        before = f", before {found.before[scheme]}" if found.before.get(scheme) else ""
        say(f"default for {scheme}: {default or 'none'}{before}")
    if found.command:
        say(f"entry: {found.desktop_file}")
        say(f"command: {found.command}")
    if found.overridden_by:
        say(f"overridden by {found.overridden_by}: remove the line there that names the scheme")
    if found.damage:
        say(f"damage: {found.damage}")
