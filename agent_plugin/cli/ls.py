"""`propmaster ls`: the result files of a job."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

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
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.safe_path import split
from agent_plugin.publish.publications import read_publications
from agent_plugin.publish.published import (
    PublishedResult,
    Replaced,
    find_published,
    is_below,
    refuse_lost,
)
from agent_plugin.publish.result_documents import ResultsDocument
from agent_plugin.publish.results import files_of, find_either, find_job
from agent_plugin.publish.servers import ResultServers
from agent_plugin.services import ask_store
from agent_plugin.settings import load
from agent_plugin.transfer.asking import Asking
from agent_plugin.transfer.progress import format_bytes


class ListedExecution(msgspec.Struct):
    """The files of one execution; `task` is empty for a chunk of tasks.

    Attributes:
        started: When it began; of what was published, when that was.
        files: With an empty hash where nobody has told it.
    """

    execution: str
    step: str
    task: str
    started: str
    files: list[FileEntry]


class ListResult(msgspec.Struct):
    """What `ls` prints; `files` and `bytes` are those of all executions.

    Attributes:
        replaced: Of published results, what later executions have replaced; it is not listed.
    """

    job: str
    executions: list[ListedExecution]
    files: int
    bytes: int
    replaced: list[Replaced]


@click.command(name="ls")
@of_a_job("JOB[/PATH]")
@by_root_option
@published_option
@allow_endpoint_option
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
    by_root: bool,
    published: bool,
    endpoints: tuple[str, ...],
    as_json: bool,
    config: Path | None,
) -> None:
    """List the result files of JOB, or those below PATH; JOB may be the beginning of an id."""
    settings = load(config)
    check_ids(farm_id, queue_id, step_id, task_id)
    check_by_root(by_root=by_root, published=published)
    name, path = job_and_path(job)
    with cancel_on_signals() as cancellation:
        asking = ask_store(settings, store_url, cancellation=cancellation, queue_id=queue_id)
        job_id = find_job(asking, farm_id, queue_id, name)
        where = (farm_id, queue_id, job_id)
        executions, documents = find_either(
            asking, where, published=published, step_id=step_id, task_id=task_id
        )
        there = [*(each.id for each in executions), *documents]
        wanted = chosen(job_id, there, only, without, published=not executions)
        servers = result_servers(settings, queue_id, endpoints)
        documents = {name: found for name, found in documents.items() if name in wanted}
        listed, replaced = _published(documents, path, servers, asking)
    listed += [
        ListedExecution(
            execution.id,
            execution.step,
            execution.task,
            execution.started,
            [
                msgspec.structs.replace(entry, path=at)
                for at, entry in files_of(execution, path, by_root=by_root).items()
            ],
        )
        for execution in executions
        if execution.id in wanted
    ]
    listed = [execution for execution in listed if execution.files]
    entries = [entry for execution in listed for entry in execution.files]
    if path and not entries:
        raise no_such_result(job_id, path)
    size = sum(entry.size for entry in entries)
    result = ListResult(job_id, listed, len(entries), size, replaced)
    if as_json:
        print_json(result)
        return
    _print(result)


def _published(
    documents: Mapping[str, ResultsDocument], path: str, servers: ResultServers, asking: Asking
) -> tuple[list[ListedExecution], list[Replaced]]:
    """Return what executions published and what of it later ones have replaced.

    Of an archive of which nobody has written down the files, that is the archive.
    """
    below = "/".join(split(path))
    publications = read_publications(documents, asking, every=False)
    found = find_published(publications, servers, asking, below)
    refuse_lost(found)
    listed = []
    for each in found:
        document = documents[each.execution]
        moment = datetime.fromtimestamp(document.published_at, UTC)
        files = each.files(below)
        listed.append(
            ListedExecution(
                each.execution,
                document.step_id,
                document.task_id or "",
                moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                _as_objects(each, below) if files is None else [*files.values()],
            )
        )
    return listed, [told for each in found for told in each.told_replaced(below)]


def _as_objects(result: PublishedResult, below: str) -> list[FileEntry]:
    return [
        FileEntry("", int(each.info.modified * 1_000_000), each.path, each.info.size)
        for each in result.found
        if is_below(each.path, below)
    ]


def _print(result: ListResult) -> None:
    say_replaced(result.replaced)
    if not result.files:
        say(f"no results of {result.job}")
        return
    for execution in result.executions:
        if len(result.executions) > 1:
            say(f"execution {execution.execution}:")
        for entry in execution.files:
            say(f"  {format_bytes(entry.size):>10}  {entry.path}")
    say(f"{count_files(result.files)}, {format_bytes(result.bytes)}, of {result.job}")
