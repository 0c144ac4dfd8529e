"""`propmaster doctor`: what this host can do, each thing with its reason, and what follows."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from agent_plugin import __version__
from agent_plugin.cli.options import common_options, escaped, print_json
from agent_plugin.doctor import Probe, examine
from agent_plugin.doctor_agent import Installation, agent_probes
from agent_plugin.services import state_directory
from agent_plugin.settings import load
from agent_plugin.workers.deadline.agent_status import read_record

# Where the worker agent makes sessions by default.
AGENT_SESSIONS = Path("/sessions")


class DoctorResult(msgspec.Struct, omit_defaults=True):
    """What `doctor` prints.

    Attributes:
        copied, virtual: Whether such sessions can run here.
        agent: Whether the worker agent's jobs reach propmaster; only if that was asked.
    """

    version: str
    copied: bool
    virtual: bool
    probes: list[Probe]
    agent: bool | None = None


@click.command(name="doctor")
@click.option(
    "--session-dir",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where sessions are made; otherwise /sessions, or the directory for temporary files.",
)
@click.option(
    "--store", "store_url", metavar="URL", help="Ask this store as well: reading and listing."
)
@click.option("--write-probe", is_flag=True, help="Store one small document in --store, too.")
@click.option(
    "--agent", "of_agent", is_flag=True, help="Look at the installation to a worker agent as well."
)
@click.option(
    "--agent-python",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="The Python of the agent's environment; otherwise where it was installed.",
)
@click.option(
    "--job-user", metavar="USER", help="A user that jobs run as; none if it is the agent's."
)
@common_options
def command(
    session_dir: Path | None,
    store_url: str | None,
    write_probe: bool,
    of_agent: bool,
    agent_python: Path | None,
    job_user: str | None,
    as_json: bool,
    config: Path | None,
) -> None:
    """Try what propmaster uses on this host, and say what was found and what follows.

    Exits with 0 if all is well that a COPIED session needs, and with --agent that the agent's jobs
    need, otherwise with 1. Changes nothing, and tells no credential, only where it comes from.
    """
    if write_probe and store_url is None:
        raise click.UsageError("--write-probe needs --store")
    if not of_agent and (agent_python or job_user):
        raise click.UsageError("--agent-python and --job-user go with --agent")
    if session_dir is None:
        session_dir = AGENT_SESSIONS if AGENT_SESSIONS.is_dir() else Path(tempfile.gettempdir())
    result = DoctorResult(__version__, True, False, [])
    examined = examine(
        config, session_dir=session_dir, store_url=store_url, write_probe=write_probe
    )
    result.probes = list(_printed(examined, quiet=as_json))
    result.copied = not any(probe.needed and probe.ok is False for probe in result.probes)
    found = {probe.name: probe for probe in result.probes}
    result.virtual = result.copied and found["virtual"].ok is True
    if of_agent:
        agent = list(
            _printed(_agent_probes(config, session_dir, agent_python, job_user), quiet=as_json)
        )
        result.probes += agent
        result.agent = not any(probe.needed and probe.ok is False for probe in agent)
    if as_json:
        print_json(result)
    elif result.copied:
        click.echo("\nCOPIED sessions can run here.")
        reason = escaped(found["virtual"].reason)
        can = "can run here" if result.virtual else "are COPIED here"
        click.echo(f"VIRTUAL sessions {can}: {reason}.")
    else:
        click.echo("\nNo session can run here: see what is marked FAILS.")
    if not as_json and result.agent is not None:
        says = "reach propmaster" if result.agent else "do not all reach propmaster: see FAILS"
        click.echo(f"The worker agent's jobs {says}.")
    if not result.copied or result.agent is False:
        raise click.exceptions.Exit(1)


def _agent_probes(
    config: Path | None, session_dir: Path, agent_python: Path | None, job_user: str | None
) -> Iterator[Probe]:
    settings = load(config)
    record = read_record(state_directory(settings))
    if agent_python is None:
        if record is None:
            raise click.UsageError(
                "propmaster was installed to no worker agent: give --agent-python"
            )
        agent_python = Path(record.agent_python)
    prefix = Path(record.vfs_prefix) if record is not None and record.vfs_prefix else None
    installation = Installation(agent_python, config, session_dir, job_user, prefix)
    yield from agent_probes(installation, settings)


def _printed(probes: Iterator[Probe], *, quiet: bool) -> Iterator[Probe]:
    for probe in probes:
        if not quiet:
            _print(probe)
        yield probe


def _print(probe: Probe) -> None:
    if probe.ok is True:
        mark, colour = "ok", "green"
    elif probe.ok == "unknown":
        mark, colour = "unknown", "yellow"
    elif probe.needed:
        mark, colour = "FAILS", "red"
    else:
        mark, colour = "no", "yellow"
    click.echo(f"{click.style(f'{mark:<8}', fg=colour)}{probe.name:<18} {escaped(probe.reason)}")
    if probe.ok is not True:
        click.echo(f"{'':<26} -> {escaped(probe.consequence)}")
