"""`propmaster unmount`: the end of a mount, orderly or not."""

from pathlib import Path

import click

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.mounting import open_mounts, path_of_mount
from agent_plugin.settings import load


@click.command(name="unmount")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@common_options
def command(mountpoint: Path, as_json: bool, config: Path | None) -> None:
    """End the mount at MOUNTPOINT; nothing happens if there is none."""
    settings = load(config)
    place = path_of_mount(mountpoint)
    ended = open_mounts(settings).end(place)
    if as_json:
        print_json({"ended": ended is not None, "holders": [] if ended is None else ended.holders})
    elif ended is None:
        say(f"nothing of ours is mounted at {place}")
    else:
        say(f"unmounted {place}")
        for holder in ended.holders:
            say(f"it was in use by {holder}")
