"""`propmaster mount`: any manifest of any store as a directory, fetched as it is read."""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import click

from agent_plugin.cli.options import common_options, print_json, say, store_option
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.errors import LocalReadError, LocalWriteError, SessionStateError
from agent_plugin.content.mount_probe import TRANSPORTS
from agent_plugin.content.mount_spec import NO_WRITES, OVERLAY, OVERLAYFS
from agent_plugin.content.mount_table import is_mounted
from agent_plugin.content.named_file import open_named
from agent_plugin.content.open_store import refuse_missing_store
from agent_plugin.content.writes_probe import WritesChoice, choose_writes
from agent_plugin.mounting import open_mounts, path_of_mount
from agent_plugin.session.mount_request import ManifestFile, MountRequest
from agent_plugin.settings import load
from agent_plugin.transfer.progress import format_bytes

# As a person is told what becomes of writing.
_KEPT: Final = {
    NO_WRITES: "read-only",
    OVERLAY: "writable by our own overlay",
    OVERLAYFS: "writable by overlayfs",
}


@click.command(name="mount")
@click.argument("manifest", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("mountpoint", type=click.Path(path_type=Path, file_okay=False))
@store_option
@click.option(
    "--writes",
    type=click.Choice(["auto", "overlayfs", "overlay", "none"]),
    default="auto",
    show_default=True,
    help="overlayfs keeps what is written in --work-dir, by way of the kernel; overlay does so in"
    " the mount's own process, which needs no privilege; none refuses writing; auto is none"
    " without --work-dir, overlayfs where it can be mounted, and overlay elsewhere.",
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where what is written is kept, `upper` in it; on a local disk.",
)
@click.option(
    "--verify",
    type=click.Choice(["stream", "strict"]),
    help="strict verifies a blob before any of it is read, whatever its size; stream lets a blob of"
    " more than 64 MiB be read while it comes.  [default: what the settings say]",
)
@click.option(
    "--xattrs",
    is_flag=True,
    help="Tell hash and state of files as extended attributes with --writes overlayfs, too; looking"
    " a file up then takes longer.",
)
@click.option(
    "--transport",
    type=click.Choice(TRANSPORTS),
    help="kernel is our own server on /dev/fuse; fusepy goes through libfuse 2; auto is the first"
    " of them that this host can.  [default: what the settings say]",
)
@click.option(
    "--owner-pid",
    type=click.IntRange(min=0),
    default=0,
    help="Unmount when this process is gone.",
)
@common_options
def command(
    manifest: Path,
    mountpoint: Path,
    store_url: str,
    writes: str,
    work_dir: Path | None,
    verify: str | None,
    xattrs: bool,
    transport: str | None,
    owner_pid: int,
    as_json: bool,
    config: Path | None,
) -> None:
    """Mount the files of MANIFEST at MOUNTPOINT, an empty directory."""
    settings = load(config)
    # Later it would be each reader who is told.
    refuse_missing_store(store_url)
    mounts = open_mounts(settings, verify=verify, xattrs=xattrs, transport=transport)
    mounts.clear_stale()
    if writes in (OVERLAYFS, OVERLAY) and work_dir is None:
        raise click.UsageError(f"--writes {writes} needs --work-dir")
    if work_dir is None:
        chosen = WritesChoice(NO_WRITES, "there is no --work-dir")
    else:
        chosen = choose_writes(writes, work_dir)
    place = _mountpoint(mountpoint)
    with _opened(manifest) as file, cancel_on_signals() as cancellation:
        request = MountRequest(
            manifest=ManifestFile(file.fileno(), os.fspath(manifest)),
            mountpoint=place,
            work_dir=work_dir or mounts.work_dir(place),
            store_url=store_url,
            account_id="",
            writes=chosen.writes,
            writes_reason=chosen.reason,
            uid=os.geteuid(),
            gid=os.getegid(),
            owner_pid=owner_pid,
        )
        ready = mounts.start(request, cancellation=cancellation)
    if as_json:
        print_json(ready)
    else:
        say(
            f"mounted {place}: {ready.files} files, {format_bytes(ready.bytes)},"
            f" {_KEPT[ready.writes]}; {ready.seconds:.1f} s;"
            f" {ready.transport}: {ready.reason}; writes: {ready.writes_reason}"
        )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with ExitStack() as files:
        try:
            file = files.enter_context(open_named(path, regular=True))
        except OSError as error:
            raise LocalReadError(f"{path}: {error.strerror}") from error
        yield file


def _mountpoint(path: Path) -> Path:
    """Return a directory's path without links; made when missing, and empty."""
    place = path_of_mount(path)
    if is_mounted(place):
        # Not looked at: its server may hang.
        raise SessionStateError(
            f"something is mounted at {place}", hint="`propmaster unmount` it, or use another"
        )
    try:
        place.mkdir(exist_ok=True)
        if not stat.S_ISDIR(place.lstat().st_mode):
            raise LocalWriteError(f"{place} is a link", hint="name the directory itself")
        empty = not any(place.iterdir())
    except OSError as error:
        raise LocalWriteError(f"{place}: {error.strerror}") from error
    if not empty:
        raise LocalWriteError(
            f"{place} is not empty", hint="what is in it would be hidden; use an empty directory"
        )
    return place
