"""`propmaster worker install`, `status` and `uninstall`: propmaster in the worker agent's place."""

import os
import sys
from pathlib import Path

import click
import msgspec

from agent_plugin import __version__
from agent_plugin.cli.options import common_options, escaped, print_json, say
from agent_plugin.services import state_directory
from agent_plugin.settings import load
from agent_plugin.workers.deadline.agent_environment import find_agent
from agent_plugin.workers.deadline.agent_status import (
    Check,
    Record,
    examine,
    read_record,
    write_record,
)
from agent_plugin.workers.deadline.installer import ScriptStatus, install, uninstall
from agent_plugin.workers.deadline.vfs_prefix import remove_prefix, write_prefix


class InstallResult(msgspec.Struct, rename="camel"):
    """What `worker install` and `worker uninstall` print: what stands in the agent now."""

    agent_python: str
    agent_version: str
    scripts: list[ScriptStatus]
    vfs_prefix: str | None = None


_agent_option = click.option(
    "--agent-python",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="The Python of the worker agent's environment; otherwise where it was installed.",
)


@click.command(name="install")
@click.option(
    "--agent-python",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="The Python of the worker agent's environment.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Also replace a script that is not the one of the agent's package.",
)
@click.option(
    "--vfs-prefix",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write the tree in which the agent finds deadline_vfs, for VIRTUAL jobs.",
)
@common_options
def install_command(
    agent_python: Path, force: bool, vfs_prefix: Path | None, as_json: bool, config: Path | None
) -> None:
    """Have a worker agent call propmaster where it calls its attachment scripts.

    The agent's own scripts are kept beside ours, and run whenever propmaster can not.
    """
    directory = state_directory(load(config))
    agent = find_agent(agent_python)
    agent.require_supported()
    before = read_record(directory)
    prefix = None if vfs_prefix is None else os.path.abspath(vfs_prefix)  # noqa: PTH100 - no links
    if prefix is None and before is not None and before.agent_python == os.fspath(agent.python):
        # Installing again is to mend, not to forget.
        prefix = before.vfs_prefix
    if prefix is not None:
        write_prefix(Path(prefix), Path(sys.executable))
    scripts = install(agent, Path(sys.executable), __version__, force=force)
    write_record(directory, Record(os.fspath(agent.python), prefix))
    _print_installed(
        InstallResult(os.fspath(agent.python), agent.version, scripts, prefix), as_json
    )


@click.command(name="uninstall")
@_agent_option
@common_options
def uninstall_command(agent_python: Path | None, as_json: bool, config: Path | None) -> None:
    """Give the worker agent its own scripts back, and remove the tree for deadline_vfs."""
    directory = state_directory(load(config))
    record = read_record(directory)
    agent = find_agent(_named(agent_python, record))
    scripts = uninstall(agent)
    if record is not None and record.agent_python == os.fspath(agent.python):
        if record.vfs_prefix is not None:
            remove_prefix(Path(record.vfs_prefix))
        write_record(directory, None)
    _print_installed(InstallResult(os.fspath(agent.python), agent.version, scripts), as_json)


@click.command(name="status")
@_agent_option
@click.option(
    "--same-user",
    is_flag=True,
    help="Jobs run as the agent's user, and so need no service.",
)
@common_options
def status_command(
    agent_python: Path | None, same_user: bool, as_json: bool, config: Path | None
) -> None:
    """Say whether the worker agent works with propmaster; exit with 1 if anything is not right."""
    settings = load(config)
    # Whoever names the agent need not be the one who installed.
    record = None if agent_python is not None else read_record(state_directory(settings))
    status = examine(
        find_agent(_named(agent_python, record)),
        Path(sys.executable),
        service=None if same_user else settings.worker.socket,
        vfs_prefix=Path(record.vfs_prefix) if record is not None and record.vfs_prefix else None,
    )
    if as_json:
        print_json(status)
    else:
        for check in status.checks:
            _print_check(check)
    if not status.ok:
        raise click.exceptions.Exit(1)


def _named(agent_python: Path | None, record: Record | None) -> Path:
    if agent_python is not None:
        return agent_python
    if record is None:
        raise click.UsageError("propmaster was installed to no worker agent: give --agent-python")
    return Path(record.agent_python)


def _print_installed(result: InstallResult, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    say(f"agent {result.agent_version or 'is not installed'} ({result.agent_python})")
    for script in result.scripts:
        say(f"{script.state} {script.path}{f': {script.reason}' if script.reason else ''}")
    if result.vfs_prefix is not None:
        say(f"deadline_vfs {result.vfs_prefix}")


def _print_check(check: Check) -> None:
    mark, colour = ("ok", "green") if check.ok else ("FAILS", "red")
    click.echo(f"{click.style(f'{mark:<8}', fg=colour)}{check.name:<22} {escaped(check.reason)}")
    if not check.ok:
        click.echo(f"{'':<30} -> {escaped(check.advice)}")
