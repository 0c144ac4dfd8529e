"""`propmaster get`: the result files of a job, on this host."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from agent_plugin.cli.job_results import (
    allow_endpoint_option,
    by_root_option,
    check_by_root,
    check_ids,
    chosen,
    count_files,
    job_and_path,
    no_such_result,
    of_a_job,
    published_option,
    result_servers,
    say_replaced,
)
from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.errors import BlobNotFoundError
from agent_plugin.publish.get_published import PublishedWish, get_published
from agent_plugin.publish.getting import GetResult, get
from agent_plugin.publish.results import find_documents, find_either, find_job
from agent_plugin.publish.unpack import FILE_BYTES, TOTAL_BYTES, UnpackLimits
from agent_plugin.services import open_services
from agent_plugin.settings import load
from agent_plugin.sizes import Size
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.progress import format_bytes

P = ParamSpec("P")
R = TypeVar("R")


class _Bytes(click.ParamType[int, str]):
    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            size = Size.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size.percent or not size.bytes:
            self.fail(f"{value!r} is no limit; it is like 500 GiB", param, ctx)
        return size.bytes


def _of_published(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command the options that are about what publishers made."""
    for decorate in (
        click.option(
            "--max-total-size",
            type=_Bytes(),
            default=TOTAL_BYTES,
            metavar="SIZE",
            help="The most that an archive may become; 1 TiB.",
        ),
        click.option(
            "--max-file-size",
            type=_Bytes(),
            default=FILE_BYTES,
            metavar="SIZE",
            help="The most that a file of an archive may have; 100 GiB.",
        ),
        click.option("--raw", is_flag=True, help="As --published, and archives as they are."),
        allow_endpoint_option,
        published_option,
    ):
        function = decorate(function)
    return function


@click.command(name="get")
@of_a_job("JOB[/PATH]")
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where the files go; otherwise ./JOB, with the whole id.",
)
@click.option(
    "--merge",
    is_flag=True,
    help="Have the files of several executions in one directory; none if any differ.",
)
@click.option("--overwrite", is_flag=True, help="Replace other files that stand there.")
@by_root_option
@_of_published
@common_options
def command(
    job: str,
    store_url: str,
    farm_id: str,
    queue_id: str,
    step_id: str | None,
    task_id: str | None,
    only: tuple[str, ...],
    without: tuple[str, ...],
    to: Path | None,
    merge: bool,
    overwrite: bool,
    by_root: bool,
    published: bool,
    endpoints: tuple[str, ...],
    raw: bool,
    max_file_size: int,
    max_total_size: int,
    as_json: bool,
    config: Path | None,
) -> None:
    """Download the result files of JOB, or those below PATH; JOB may be the beginning of an id.

    Each execution's files go to a directory of its own where there are several. They come from the
    store, or with --published from where publishers put them.
    """
    check_ids(farm_id, queue_id, step_id, task_id)
    check_by_root(by_root=by_root, published=published or raw)
    name, path = job_and_path(job)
    settings = load(config)
    with (
        cancel_on_signals() as cancellation,
        open_services(settings, store_url, cancellation=cancellation, queue_id=queue_id) as context,
    ):
        job_id = find_job(context, farm_id, queue_id, name)
        where = (farm_id, queue_id, job_id)
        place = to or Path.cwd() / job_id
        executions, documents = find_either(
            context, where, published=published or raw, step_id=step_id, task_id=task_id
        )
        if documents or published or raw:
            wanted = chosen(job_id, documents, only, without, published=True)
            limits = UnpackLimits(max_file_size, max_total_size)
            wish = PublishedWish(path, merge, raw, overwrite, limits)
            result = get_published(
                {name: found for name, found in documents.items() if name in wanted},
                context,
                result_servers(settings, queue_id, endpoints),
                job_id,
                place,
                wish,
            )
        else:
            there = [execution.id for execution in executions]
            wanted = chosen(job_id, there, only, without, published=False)
            with _telling_of_published(context, where):
                result = get(
                    [execution for execution in executions if execution.id in wanted],
                    context,
                    job_id,
                    place,
                    path=path,
                    merge=merge,
                    by_root=by_root,
                    overwrite=overwrite,
                )
    if path and not (result.files or result.excluded):
        raise no_such_result(job_id, path)
    if as_json:
        print_json(result)
        return
    _print(result)


@contextmanager
def _telling_of_published(context: TransferContext, job: tuple[str, str, str]) -> Iterator[None]:
    """Say of content that the store has not any more where else it may be."""
    try:
        yield
    except BlobNotFoundError as error:
        if not find_documents(context, job):
            raise
        hint = "What publishers published may be there still: try --published."
        raise BlobNotFoundError(error.message, hint=hint) from error


def _print(result: GetResult) -> None:
    say_replaced(result.replaced)
    for what in result.excluded:
        say(f"left out, since somebody excluded it from the transfer: {what}")
    if not result.files:
        say(f"no results of {result.job}")
        return
    for execution in result.executions if len(result.executions) > 1 else ():
        say(f"execution {execution.execution}: {count_files(execution.files)}")
    say(f"to {result.to}:")
    say(
        f"{count_files(result.files)}, {format_bytes(result.bytes)},"
        f" {format_bytes(result.bytes_fetched)} fetched, {result.seconds} s"
    )
