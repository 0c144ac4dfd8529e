"""`propmaster handle-url`: what a desktop starts when somebody clicks on "download outputs"."""

import os
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

import click

from agent_plugin.cli.options import common_options, print_json, say, say_error
from agent_plugin.cli.outputs_sync import conflict_option
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.named_file import open_named
from agent_plugin.content.s3_environment import Keys
from agent_plugin.content.store import Cancellation
from agent_plugin.farm import Farm
from agent_plugin.services import ask_store, open_services
from agent_plugin.session.download_url import DownloadUrl, parse_url
from agent_plugin.session.outputs import OutputsResult, get_outputs, list_outputs
from agent_plugin.settings import Settings, load
from agent_plugin.transfer.conflicts import Conflict
from agent_plugin.transfer.progress import format_bytes

# A profile in the URL is the one that is meant, whatever keys the desktop's environment has.
_KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# Of the file that has it.
_MAX_BYTES: Final = 64 * 1024
_DOWNLOADS: Final = re.compile(r'^XDG_DOWNLOAD_DIR="(\$HOME/|/)([^"\n]*)"$', re.MULTILINE)


@click.command(name="handle-url")
@click.argument("url")
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where the files go, a directory for each root; otherwise to the job's own root paths.",
)
@click.option("--yes", is_flag=True, help="Do not ask before the download.")
@conflict_option(Conflict.CREATE_COPY)
@click.option("--prompt-when-complete", is_flag=True, help="Wait for a key at the end.")
@common_options
def command(
    url: str,
    to: Path | None,
    yes: bool,
    conflict_resolution: str,
    prompt_when_complete: bool,
    as_json: bool,
    config: Path | None,
) -> int:
    """Download the outputs that a deadline:// or propmaster:// URL names.

    Says what would come and where it would go, and asks.
    """
    try:
        return _handle(url, load(config), to, yes, Conflict(conflict_resolution.lower()), as_json)
    except PropmasterError as error:
        # Told here, before the terminal that was opened for this is gone.
        say_error(error)
        return error.exit_code
    finally:
        if prompt_when_complete and _is_interactive():
            say("press Enter to close", err=True)
            sys.stdin.readline()


def _handle(
    url: str, settings: Settings, to: Path | None, yes: bool, conflict: Conflict, as_json: bool
) -> int:
    wanted = parse_url(url)
    if not yes and not _is_interactive():
        raise CancelledError(
            "nobody can be asked whether to download", hint="say so in advance, with --yes"
        )
    job = (wanted.farm_id, wanted.queue_id, wanted.job_id)
    which = {"step_id": wanted.step_id, "task_id": wanted.task_id}
    queue_id = wanted.queue_id
    with cancel_on_signals() as cancellation:
        store_url, environment, keys = _store(wanted, cancellation)
        asking = ask_store(
            settings,
            store_url,
            cancellation=cancellation,
            queue_id=queue_id,
            environment=environment,
            keys=keys,
        )
        found = list_outputs(asking, job, **which)
    to = to or _otherwise(wanted, found)
    # Outside of the block: a signal has to end the question.
    if not yes and not _agreed(wanted, found, store_url, to):
        raise CancelledError("nothing was downloaded: it was not wished")
    with (
        cancel_on_signals() as cancellation,
        open_services(
            settings,
            store_url,
            cancellation=cancellation,
            queue_id=queue_id,
            environment=environment,
            keys=keys,
        ) as context,
    ):
        result = get_outputs(context, job, to, by_root=to is not None, conflict=conflict, **which)
    if as_json:
        print_json(result)
    else:
        _show(result)
    return 0


def _store(
    wanted: DownloadUrl, cancellation: Cancellation
) -> tuple[str, Mapping[str, str], Keys | None]:
    """Return where the outputs are, and environment and keys for it."""
    environment = dict(os.environ)
    if wanted.profile:
        environment = {name: v for name, v in environment.items() if name not in _KEYS}
        environment["AWS_PROFILE"] = wanted.profile
    if wanted.store:
        return wanted.store, environment, None
    farm = Farm(wanted.farm_id, environment, cancellation)
    keys = partial(farm.queue_keys, wanted.queue_id)
    return farm.store_url(wanted.queue_id), farm.store_environment, keys


def _otherwise(wanted: DownloadUrl, found: OutputsResult) -> Path | None:
    """Return where files go whose own place is not to be had; None for their own place.

    Whoever made a URL with a store has perhaps made that store as well, and chooses no path here.
    """
    paths = [Path(root.root_path) for root in found.roots]
    if not wanted.store and all(path.is_absolute() and ".." not in path.parts for path in paths):
        return None
    return downloads_directory(os.environ) / "propmaster" / wanted.job_id


def downloads_directory(environment: Mapping[str, str]) -> Path:
    """Return the user's directory for downloads, as the desktop has it.

    Source: https://www.freedesktop.org/wiki/Software/xdg-user-dirs/
    """
    home = Path(environment.get("HOME") or Path.home())
    configured = environment.get("XDG_CONFIG_HOME", "")
    config = Path(configured) if configured.startswith("/") else home / ".config"
    try:
        with open_named(config / "user-dirs.dirs", regular=True) as file:
            text = os.fsdecode(file.read(_MAX_BYTES))
    except OSError:
        return home / "Downloads"
    found = _DOWNLOADS.search(text)
    if found is None:
        return home / "Downloads"
    return home / found[2] if found[1] != "/" else Path("/") / found[2]


def _agreed(wanted: DownloadUrl, found: OutputsResult, store_url: str, to: Path | None) -> bool:
    if not found.files:
        # Nothing to ask: the result says so.
        return True
    named = ", which the URL names" if wanted.store else ""
    say(f"outputs in {store_url}{named}: {found.files} files, {format_bytes(found.bytes)}")
    if wanted.profile:
        say(f"  with the AWS profile {wanted.profile}, which the URL names")
    for root in found.roots:
        say(f"  {len(root.files)} files would go below {to or root.root_path}")
    # No farm vouches for such a store: whoever only presses Enter gets nothing of it.
    return click.confirm("Download them?", default=not wanted.store)


def _is_interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _show(result: OutputsResult) -> None:
    for root in result.roots:
        say(f"root {root.root_path} -> {root.local_root}: {len(root.files)} files")
    for copy in result.copies:
        say(f"copy {copy}")
    if result.left:
        say(f"{result.left} files left out: something stands at their path")
    say(f"done: {result.files} files, {format_bytes(result.bytes)}, {result.seconds} s")
