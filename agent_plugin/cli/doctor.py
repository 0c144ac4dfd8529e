"""`propmaster doctor`: what this host can do, each thing with its reason, and what follows."""

import tempfile
from pathlib import Path

import click
import msgspec

from agent_plugin import __version__
from agent_plugin.cli.options import common_options, escaped, print_json
from agent_plugin.doctor import Probe, examine

# Where the worker agent makes sessions by default.
AGENT_SESSIONS = Path("/sessions")


class DoctorResult(msgspec.Struct):
    """What `doctor` prints; `copied` and `virtual` are whether such sessions can run here."""

    version: str
    copied: bool
    virtual: bool
    probes: list[Probe]


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
@common_options
def command(
    session_dir: Path | None,
    store_url: str | None,
    write_probe: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Try what propmaster uses on this host, and say what was found and what follows.

    Exits with 0 if all is well that a COPIED session needs, otherwise with 1. Changes nothing, and
    tells no credential, only where it comes from.
    """
    if write_probe and store_url is None:
        raise click.UsageError("--write-probe needs --store")
    if session_dir is None:
        session_dir = AGENT_SESSIONS if AGENT_SESSIONS.is_dir() else Path(tempfile.gettempdir())
    result = DoctorResult(__version__, True, False, [])
    for probe in examine(
        config, session_dir=session_dir, store_url=store_url, write_probe=write_probe
    ):
        result.probes.append(probe)
        if not as_json:
            _print(probe)
    result.copied = not any(probe.needed and probe.ok is False for probe in result.probes)
    found = {probe.name: probe for probe in result.probes}
    result.virtual = result.copied and found["virtual"].ok is True
    if as_json:
        print_json(result)
    elif result.copied:
        click.echo("\nCOPIED sessions can run here.")
        reason = escaped(found["virtual"].reason)
        can = "can run here" if result.virtual else "are COPIED here"
        click.echo(f"VIRTUAL sessions {can}: {reason}.")
    else:
        click.echo("\nNo session can run here: see what is marked FAILS.")
    if not result.copied:
        raise click.exceptions.Exit(1)


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
