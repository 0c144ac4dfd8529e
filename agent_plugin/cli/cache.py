"""`propmaster cache`: look at the shared blob cache, check it, make room.

All of it concerns the whole cache directory, the blobs of all stores, and whatever uses the cache
at the same time goes on. A cache that is not there yet is not made: who makes it owns it.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import click
import msgspec

from agent_plugin.cli.options import common_options, escaped, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache, CacheUsage, CollectReport, VerifyReport
from agent_plugin.content.errors import CancelledError
from agent_plugin.session.job import check_id
from agent_plugin.session_logs import collect_logs
from agent_plugin.settings import Settings, load
from agent_plugin.sizes import Size
from agent_plugin.transfer.progress import format_bytes

# What a cache has in its directory, and nothing else (docs/PROTOCOL.md, The cache directory).
_LAYOUT: Final = "v1"

P = ParamSpec("P")
R = TypeVar("R")


class ShowResult(msgspec.Struct, rename="camel"):
    """What `cache show` prints; sizes in bytes, `free_bytes` of the cache's file system."""

    directory: str
    exists: bool
    blobs: int
    bytes: int
    max_bytes: int
    min_free_bytes: int
    free_bytes: int
    leases: int
    quarantined: int
    temporary: int


class Quarantined(msgspec.Struct):
    """A file that was taken out of the cache, where it was and why."""

    path: str
    reason: str


class VerifyResult(msgspec.Struct):
    """What `cache verify` prints: blobs and bytes that were read, and what was wrong."""

    directory: str
    blobs: int
    bytes: int
    quarantined: list[Quarantined]


class CollectResult(msgspec.Struct, rename="camel"):
    """What `cache collect` and `cache clear` print; `blobs` and `bytes` are left."""

    directory: str
    within_limits: bool
    blobs: int
    bytes: int
    evicted_blobs: int
    evicted_bytes: int


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Size | None:
    try:
        return None if value is None else Size.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _queue_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option(
        "--queue",
        "queue_id",
        metavar="QUEUE",
        help="The cache directory of QUEUE, if the settings give it one of its own.",
    )(command)


def _settings(config: Path | None, queue_id: str | None) -> Settings:
    settings = load(config)
    return settings.for_queue(check_id(queue_id, "queue")) if queue_id else settings


@click.group(name="cache")
def command() -> None:
    """Look at the shared blob cache of this host, check it, make room.

    The cache holds verified content by its hash, so that sessions need not fetch it again. Nothing
    in it is needed: what is removed is fetched again when a job wants it.
    """


@command.command(name="show")
@_queue_option
@common_options
def show_command(queue_id: str | None, as_json: bool, config: Path | None) -> None:
    """Print what is in the cache, and what it may use."""
    settings = _settings(config, queue_id)
    with _opened(settings) as cache:
        usage = cache.usage() if cache is not None else CacheUsage(0, 0, 0, 0, 0, 0)
    directory = settings.paths.cache_dir
    result = ShowResult(
        directory=os.fspath(directory),
        exists=cache is not None,
        blobs=usage.blobs,
        bytes=usage.bytes,
        max_bytes=settings.cache.max_bytes_on(directory),
        min_free_bytes=settings.cache.min_free_bytes_on(directory),
        free_bytes=_free_bytes(directory),
        leases=usage.leases,
        quarantined=usage.quarantined,
        temporary=usage.temporary,
    )
    if as_json:
        print_json(result)
        return
    say(f"{directory}{'' if result.exists else ' (no cache is there yet)'}")
    say(
        f"{result.blobs} blobs, {format_bytes(result.bytes)} of {format_bytes(result.max_bytes)};"
        f" the disk has {format_bytes(result.free_bytes)} free, of which the cache leaves"
        f" {format_bytes(result.min_free_bytes)}"
    )
    say(
        f"{result.leases} leases of running sessions, {result.temporary} files being written,"
        f" {result.quarantined} in quarantine"
    )


@command.command(name="verify")
@_queue_option
@common_options
def verify_command(queue_id: str | None, as_json: bool, config: Path | None) -> None:
    """Read every blob again, and quarantine each one that is not what its name says.

    Exits with 1 if there was one. Jobs go on meanwhile, and fetch again what is gone.
    """
    settings = _settings(config, queue_id)
    with (
        cancel_on_signals() as cancellation,
        _quarantined() as quarantined,
        _opened(settings) as cache,
    ):
        report = VerifyReport(0, 0, ())
        if cache is not None:
            report = cache.verify(cancellation)
    directory = os.fspath(settings.paths.cache_dir)
    result = VerifyResult(directory, report.blobs, report.bytes, quarantined)
    if as_json:
        print_json(result)
    else:
        for one in quarantined:
            say(f"quarantined {one.path}: {one.reason}")
        say(
            f"{directory}: {result.blobs} blobs, {format_bytes(result.bytes)} read,"
            f" {len(quarantined)} quarantined"
        )
    if quarantined:
        raise click.exceptions.Exit(1)


@command.command(name="collect")
@click.option(
    "--to",
    callback=_size,
    metavar="SIZE",
    help="Leave at most this much: bytes, '20 GiB', or '5 %' of the disk.",
)
@_queue_option
@common_options
def collect_command(
    to: Size | None, queue_id: str | None, as_json: bool, config: Path | None
) -> None:
    """Remove what is stale, and the blobs least recently used until the cache keeps its limits.

    Logs of sessions that are older than they are kept go as well.
    """
    settings = _settings(config, queue_id)
    to_bytes = None if to is None else to.on(settings.paths.cache_dir)
    with _opened(settings) as cache:
        report = CollectReport(within_limits=True)
        if cache is not None:
            report = cache.collect(to_bytes=to_bytes)
    collect_logs(settings)
    _print_collected(settings, report, as_json=as_json)


@command.command(name="clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_queue_option
@common_options
def clear_command(yes: bool, queue_id: str | None, as_json: bool, config: Path | None) -> None:
    """Remove every blob but those that running sessions hold a lease on."""
    settings = _settings(config, queue_id)
    if not yes:
        _ask(f"Remove all blobs from {settings.paths.cache_dir}?")
    with _opened(settings) as cache:
        report = cache.clear() if cache is not None else CollectReport(within_limits=True)
    _print_collected(settings, report, as_json=as_json)


def _ask(question: str) -> None:
    """Go on only if the answer is yes.

    Raises:
        CancelledError: There is nobody to answer.
        click.Abort: The answer is another.
    """
    print(f"{escaped(question)} [y/N]: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not (answer and sys.stdin.isatty()):
        # Nobody has ended the line by pressing Enter, and an event would stand behind it.
        print(file=sys.stderr)
    if not answer:
        raise CancelledError("there is nobody to answer", hint="say yes in advance: --yes")
    if answer.strip().lower() not in ("y", "yes"):
        raise click.Abort


def _opened(settings: Settings) -> AbstractContextManager[BlobCache | None]:
    """Open the cache if there is one; which namespace is open makes no difference here.

    Opening makes what a cache consists of, and the directory may be a wrong one.
    """
    directory = settings.paths.cache_dir
    if not os.path.lexists(directory / _LAYOUT):
        return nullcontext()
    return BlobCache.open(
        directory,
        store_url="",
        max_bytes=settings.cache.max_bytes_on(directory),
        min_free_bytes=settings.cache.min_free_bytes_on(directory),
        shared=True,
    )


@contextmanager
def _quarantined() -> Iterator[list[Quarantined]]:
    """Collect what the cache says that it quarantined, of blobs and of files that are none."""
    found: list[Quarantined] = []

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == events.CACHE_QUARANTINED:
                fields = events.fields_of(record)
                found.append(Quarantined(str(fields["path"]), str(fields["reason"])))

    logger, handler = events.get_logger(), Collecting()
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _free_bytes(directory: Path) -> int:
    for place in (directory, *directory.parents):
        with suppress(OSError):
            filesystem = os.statvfs(place)
            return filesystem.f_bavail * filesystem.f_frsize
    return 0


def _print_collected(settings: Settings, report: CollectReport, *, as_json: bool) -> None:
    directory = os.fspath(settings.paths.cache_dir)
    if report.busy:
        say(f"{directory}: another process is making room just now", err=True)
        raise click.exceptions.Exit(1)
    result = CollectResult(
        directory,
        report.within_limits,
        report.blobs,
        report.bytes,
        report.evicted_blobs,
        report.evicted_bytes,
    )
    if as_json:
        print_json(result)
        return
    say(
        f"{directory}: {result.evicted_blobs} blobs, {format_bytes(result.evicted_bytes)} removed;"
        f" {result.blobs} blobs, {format_bytes(result.bytes)} left"
    )
    if not result.within_limits:
        say("the cache is still beyond its limits: sessions hold leases, or the disk is full")
