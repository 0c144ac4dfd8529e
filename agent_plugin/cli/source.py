"""`propmaster source`: objects of any bucket as a job's inputs."""

import json
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import click
import msgspec

from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.errors import SourceInvalidError
from agent_plugin.content.object_snapshot import SnapshotEntry
from agent_plugin.services import store_limits
from agent_plugin.settings import load
from agent_plugin.sources.access import SourceServers
from agent_plugin.sources.command_line import parse_source
from agent_plugin.sources.resolve import resolve
from agent_plugin.sources.spec import InputSource, decode_source
from agent_plugin.transfer.progress import format_bytes


class ResolveResult(msgspec.Struct):
    """What `source resolve` prints; `digest` is that of the snapshot, `entries` its objects."""

    bucket: str
    endpoint: str
    target: str
    files: int
    bytes: int
    digest: str
    entries: Sequence[SnapshotEntry]


@click.group(name="source")
def command() -> None:
    """Look at input sources: objects of any bucket that a job wants as files."""


@command.command(name="resolve")
@click.argument("spec")
@click.option(
    "--partition-index",
    type=click.IntRange(min=0),
    help="Which part of the source's Partition, from 0; otherwise what it says itself.",
)
@click.option("--limit", type=click.IntRange(min=0), help="List at most this many files.")
@common_options
def resolve_command(
    spec: str, partition_index: int | None, limit: int | None, as_json: bool, config: Path | None
) -> None:
    """Print which files SPEC would bring, how many bytes they have, and the snapshot's digest.

    SPEC is s3://bucket/key[:target][,opt=name=value]…, or a source in JSON as a job document has
    it. A key may end with / or *; nothing is fetched.
    """
    source = _read(spec)
    policy = store_limits(load(config)).retry_policy()
    servers = SourceServers(os.environ, policy=policy)
    with cancel_on_signals() as cancellation:
        snapshot = resolve(source, servers, index=partition_index, cancellation=cancellation)
    shown = list(islice(snapshot.entries, limit))
    if as_json:
        print_json(
            ResolveResult(
                bucket=snapshot.bucket,
                endpoint=snapshot.access.endpoint,
                target=source.target_path,
                files=len(snapshot),
                bytes=snapshot.total_bytes,
                digest=snapshot.digest,
                entries=shown,
            )
        )
        return
    say(
        f"{len(snapshot)} files, {format_bytes(snapshot.total_bytes)}"
        f" ({snapshot.total_bytes} bytes), for {source.target_path}; sha256 {snapshot.digest}"
    )
    if source.index_parameter and source.partition is not None and partition_index is None:
        say(
            f"each task has one of {source.partition.count} parts, by its parameter"
            f" {source.index_parameter}; --partition-index shows one"
        )
    say(f"{'bytes':>14} {'modified (us)':>17} path")
    for entry in shown:
        say(f"{entry.size:>14} {entry.mtime:>17} {entry.path}")
    if len(shown) < len(snapshot):
        say(f"{len(snapshot) - len(shown)} more files; leave out --limit to see them")


def _read(spec: str) -> InputSource:
    if not spec.lstrip().startswith("{"):
        return parse_source(spec)
    try:
        document = json.loads(spec)
    except (ValueError, RecursionError) as error:
        raise SourceInvalidError(
            f"the source: not a JSON object: {error}", hint="or write it as s3://bucket/key"
        ) from error
    return decode_source(document, source="the source")
