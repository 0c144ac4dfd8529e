"""`propmaster submit`: a directory becomes a job's inputs."""

from pathlib import Path
from typing import Literal

import click
import msgspec

from agent_plugin.cli.options import (
    common_options,
    farm_option,
    print_json,
    queue_option,
    say,
    store_option,
)
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.errors import JobInvalidError
from agent_plugin.publish.spec import parse_all
from agent_plugin.services import open_services
from agent_plugin.session.job import check_id
from agent_plugin.session.submit import submit
from agent_plugin.settings import load
from agent_plugin.transfer.progress import format_bytes


@click.command(name="submit")
@click.argument("root", type=click.Path(path_type=Path, file_okay=False, exists=True))
@store_option
@farm_option
@queue_option
@click.option(
    "--output-dir",
    "output_dirs",
    multiple=True,
    metavar="REL",
    help="A directory below ROOT where tasks will write; may be given more than once.",
)
@click.option(
    "--file-system",
    type=click.Choice(["COPIED", "VIRTUAL"]),
    default="COPIED",
    show_default=True,
    help="How workers are to bring the inputs in.",
)
@click.option(
    "-p",
    "--publisher",
    "publishers",
    multiple=True,
    metavar="s3://BUCKET/KEY[,opt=NAME=VALUE]…",
    help="Where tasks' outputs are published as well (docs/PROTOCOL.md); may be given more than"
    " once.",
)
@click.option(
    "--force-store-check",
    is_flag=True,
    help="Trust no memory of what the store has; for when blobs were deleted from it.",
)
@common_options
def command(
    root: Path,
    store_url: str,
    farm_id: str,
    queue_id: str,
    output_dirs: tuple[str, ...],
    file_system: Literal["COPIED", "VIRTUAL"],
    publishers: tuple[str, ...],
    force_store_check: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Upload the files of ROOT, only what the store lacks, and print the job's attachments.

    What is printed is the part of a job document (docs/PROTOCOL.md) that belongs to the inputs.
    """
    check_id(farm_id, "farm")
    check_id(queue_id, "queue")
    for directory in output_dirs:
        # Nothing is more often a variable that was not set than the whole of ROOT.
        if not directory or Path(directory).is_absolute() or ".." in Path(directory).parts:
            raise JobInvalidError(
                f"--output-dir {directory!r} is not below ROOT",
                hint="give a relative path; `.` is ROOT itself",
            )
    parsed = parse_all(publishers, "--publisher")
    settings = load(config)
    with (
        cancel_on_signals() as cancellation,
        open_services(
            settings,
            store_url,
            cancellation=cancellation,
            queue_id=queue_id,
            existence_max_age=0 if force_store_check else None,
        ) as context,
    ):
        result, summary = submit(
            root,
            context,
            farm_id=farm_id,
            queue_id=queue_id,
            output_directories=output_dirs,
            file_system=file_system,
        )
    result = msgspec.structs.replace(result, publishers=parsed)
    say(
        f"{summary.files} files, {format_bytes(summary.bytes)};"
        f" {format_bytes(summary.bytes_uploaded)} uploaded,"
        f" {format_bytes(summary.bytes_reused)} were in the store; {summary.seconds} s",
        err=as_json,
    )
    # The document is the result either way: it is what the next command reads.
    print_json(result)
