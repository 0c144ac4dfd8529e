"""`propmaster cache`: look at the blob caches of this host, check them, make room.

All of it concerns whole cache directories, the blobs of all stores, and whatever uses a cache at
the same time goes on. A cache that is not there yet is not made: who makes it owns it.

`show`, `verify` and `collect` go over the general directory and those that queues have of their
own; what removes more than limits ask for (`clear`, `collect --to`) is about one directory.
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
from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.store import Cancellation
from agent_plugin.session.job import check_id
from agent_plugin.session_logs import collect_logs
from agent_plugin.settings import Settings, load
from agent_plugin.sizes import Size
from agent_plugin.transfer.progress import format_bytes

# What a cache has in its directory, and nothing else (docs/PROTOCOL.md, The cache directory).
_LAYOUT: Final = "v1"

P = ParamSpec("P")
R = TypeVar("R")


class Shown(msgspec.Struct, rename="camel"):
    """What is in a cache directory; sizes in bytes, `free_bytes` of its file system."""

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


class ShowResult(Shown):
    """What `cache show` prints: the general cache, or the one of `--queue`, and the other ones."""

    others: list[Shown]


class Quarantined(msgspec.Struct):
    """A file that was taken out of the cache, where it was and why."""

    path: str
    reason: str


class Verified(msgspec.Struct):
    """Blobs and bytes of a cache directory that were read, and what was wrong."""

    directory: str
    blobs: int
    bytes: int
    quarantined: list[Quarantined]


class VerifyResult(Verified):
    """What `cache verify` prints: as of ShowResult."""

    others: list[Verified]


class Collected(msgspec.Struct, rename="camel"):
    """What was removed from a cache directory; `blobs` and `bytes` are left."""

    directory: str
    within_limits: bool
    blobs: int
    bytes: int
    evicted_blobs: int
    evicted_bytes: int


class CollectResult(Collected):
    """What `cache collect` and `cache clear` print: as of ShowResult; `clear` has no others."""

    others: list[Collected]


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Size | None:
    try:
        return None if value is None else Size.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _queue_option(text: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    return click.option("--queue", "queue_id", metavar="QUEUE", help=text)


_only_queue = _queue_option("Only the cache directory that holds for QUEUE.")


def _caches(config: Path | None, queue_id: str | None) -> list[Settings]:
    """Return the settings of each cache directory, the general one first; or of the queue's."""
    settings = load(config)
    if queue_id:
        return [settings.for_queue(check_id(queue_id, "queue"))]
    caches = {settings.paths.cache_dir: settings}
    for queue in settings.queues:
        of_queue = settings.for_queue(queue)
        caches.setdefault(of_queue.paths.cache_dir, of_queue)
    return list(caches.values())


def _each(caches: list[Settings], work: Callable[[Settings], R]) -> list[R]:
    """Return what was done with each cache; one that fails keeps nobody from the others.

    Raises:
        PropmasterError: Of the first that failed, after all were tried.
    """
    done: list[R] = []
    failed: list[PropmasterError] = []
    for settings in caches:
        try:
            done.append(work(settings))
        except CancelledError:
            raise
        except PropmasterError as error:
            failed.append(error)
    for other in failed[1:]:
        say(f"error[{other.reference}]: {other.message}", err=True)
    if failed:
        raise failed[0]
    return done


@click.group(name="cache")
def command() -> None:
    """Look at the blob caches of this host, check them, make room.

    A cache holds verified content by its hash, so that sessions need not fetch it again. Nothing in
    it is needed: what is removed is fetched again when a job wants it.
    """


@command.command(name="show")
@_only_queue
@common_options
def show_command(queue_id: str | None, as_json: bool, config: Path | None) -> None:
    """Print what is in each cache directory, and what it may use."""
    first, *others = _each(_caches(config, queue_id), _shown)
    if as_json:
        print_json(ShowResult(**msgspec.structs.asdict(first), others=others))
        return
    for shown in (first, *others):
        _say_shown(shown)


def _shown(settings: Settings) -> Shown:
    with _opened(settings) as cache:
        usage = cache.usage() if cache is not None else CacheUsage(0, 0, 0, 0, 0, 0)
    directory = settings.paths.cache_dir
    return Shown(
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


def _say_shown(shown: Shown) -> None:
    say(f"{shown.directory}{'' if shown.exists else ' (no cache is there yet)'}")
    say(
        f"{shown.blobs} blobs, {format_bytes(shown.bytes)} of {format_bytes(shown.max_bytes)};"
        f" the disk has {format_bytes(shown.free_bytes)} free, of which the cache leaves"
        f" {format_bytes(shown.min_free_bytes)}"
    )
    say(
        f"{shown.leases} leases of running sessions, {shown.temporary} files being written,"
        f" {shown.quarantined} in quarantine"
    )


@command.command(name="verify")
@_only_queue
@common_options
def verify_command(queue_id: str | None, as_json: bool, config: Path | None) -> None:
    """Read every blob again, and quarantine each one that is not what its name says.

    Exits with 1 if there was one. Jobs go on meanwhile, and fetch again what is gone.
    """
    with cancel_on_signals() as cancellation:
        first, *others = _each(
            _caches(config, queue_id), lambda settings: _verified(settings, cancellation)
        )
    if as_json:
        print_json(VerifyResult(**msgspec.structs.asdict(first), others=others))
    else:
        for verified in (first, *others):
            _say_verified(verified)
    if any(verified.quarantined for verified in (first, *others)):
        raise click.exceptions.Exit(1)


def _verified(settings: Settings, cancellation: Cancellation) -> Verified:
    with _quarantined() as quarantined, _opened(settings) as cache:
        report = VerifyReport(0, 0, ())
        if cache is not None:
            report = cache.verify(cancellation)
    directory = os.fspath(settings.paths.cache_dir)
    return Verified(directory, report.blobs, report.bytes, quarantined)


def _say_verified(verified: Verified) -> None:
    for one in verified.quarantined:
        say(f"quarantined {one.path}: {one.reason}")
    say(
        f"{verified.directory}: {verified.blobs} blobs, {format_bytes(verified.bytes)} read,"
        f" {len(verified.quarantined)} quarantined"
    )


@command.command(name="collect")
@click.option(
    "--to",
    callback=_size,
    metavar="SIZE",
    help="Leave at most this much: bytes, '20 GiB', or '5 %' of the disk. It is about one"
    " directory, the general one or that of --queue.",
)
@_only_queue
@common_options
def collect_command(
    to: Size | None, queue_id: str | None, as_json: bool, config: Path | None
) -> None:
    """Remove what is stale, and the blobs least recently used until each cache keeps its limits.

    Logs of sessions that are older than they are kept go as well.
    """
    caches = _caches(config, queue_id)
    if to is not None:
        caches = caches[:1]
    collect_logs(caches[0])
    _print_collected(_each(caches, lambda settings: _collected(settings, to)), as_json=as_json)


def _collected(settings: Settings, to: Size | None) -> Collected | None:
    to_bytes = None if to is None else to.on(settings.paths.cache_dir)
    with _opened(settings) as cache:
        report = CollectReport(within_limits=True)
        if cache is not None:
            report = cache.collect(to_bytes=to_bytes)
    return _result_of(settings, report)


@command.command(name="clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_queue_option("The cache directory that holds for QUEUE, not the general one.")
@common_options
def clear_command(yes: bool, queue_id: str | None, as_json: bool, config: Path | None) -> None:
    """Remove every blob of one cache directory but those that running sessions hold a lease on."""
    settings = _caches(config, queue_id)[0]
    if not yes:
        _ask(f"Remove all blobs from {settings.paths.cache_dir}?")
    with _opened(settings) as cache:
        report = cache.clear() if cache is not None else CollectReport(within_limits=True)
    _print_collected([_result_of(settings, report)], as_json=as_json)


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


def _result_of(settings: Settings, report: CollectReport) -> Collected | None:
    """Return what to print of a cache; None, and it is said, if another process makes room."""
    directory = os.fspath(settings.paths.cache_dir)
    if report.busy:
        say(f"{directory}: another process is making room just now", err=True)
        return None
    return Collected(
        directory,
        report.within_limits,
        report.blobs,
        report.bytes,
        report.evicted_blobs,
        report.evicted_bytes,
    )


def _print_collected(results: list[Collected | None], *, as_json: bool) -> None:
    collected = [result for result in results if result is not None]
    if len(collected) < len(results):
        raise click.exceptions.Exit(1)
    first, *others = collected
    if as_json:
        print_json(CollectResult(**msgspec.structs.asdict(first), others=others))
        return
    for result in collected:
        say(
            f"{result.directory}: {result.evicted_blobs} blobs,"
            f" {format_bytes(result.evicted_bytes)} removed;"
            f" {result.blobs} blobs, {format_bytes(result.bytes)} left"
        )
        if not result.within_limits:
            say("it is still beyond its limits: sessions hold leases, or the disk is full")
