"""`propmaster ls`: the result files of a job."""

from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from agent_plugin.cli.job_results import (
    by_root_option,
    check_ids,
    count_files,
    job_and_path,
    no_such_result,
    of_a_job,
    published_option,
    result_servers,
)
from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.safe_path import split
from agent_plugin.publish.published import ResultServers, choose_results, find_published
from agent_plugin.publish.result_documents import ResultsDocument
from agent_plugin.publish.results import check_only, files_of, find_either, find_job
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
    """What `ls` prints; `files` and `bytes` are those of all executions."""

    job: str
    executions: list[ListedExecution]
    files: int
    bytes: int


@click.command(name="ls")
@of_a_job("JOB[/PATH]")
@by_root_option
@published_option
@common_options
def command(
    job: str,
    store_url: str,
    farm_id: str,
    queue_id: str,
    step_id: str | None,
    task_id: str | None,
    only: tuple[str, ...],
    by_root: bool,
    published: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """List the result files of JOB, or those below PATH; JOB may be the beginning of an id."""
    settings = load(config)
    check_ids(farm_id, queue_id, step_id, task_id)
    name, path = job_and_path(job)
    with cancel_on_signals() as cancellation:
        asking = ask_store(settings, store_url, cancellation=cancellation, queue_id=queue_id)
        job_id = find_job(asking, farm_id, queue_id, name)
        where = (farm_id, queue_id, job_id)
        executions, documents = find_either(
            asking, where, published=published, step_id=step_id, task_id=task_id
        )
        check_only(job_id, [*(each.id for each in executions), *documents], only)
        servers = result_servers(settings, queue_id)
        listed = [
            _published(execution, document, path, servers, asking)
            for execution, document in documents.items()
            if not only or execution in only
        ]
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
        if not only or execution.id in only
    ]
    listed = [execution for execution in listed if execution.files]
    entries = [entry for execution in listed for entry in execution.files]
    if path and not entries:
        raise no_such_result(job_id, path)
    result = ListResult(job_id, listed, len(entries), sum(entry.size for entry in entries))
    if as_json:
        print_json(result)
        return
    _print(result)


def _published(
    execution: str,
    document: ResultsDocument,
    path: str,
    servers: ResultServers,
    asking: Asking,
) -> ListedExecution:
    """Return the plain files that an execution published, or its archive."""
    wanted = "/".join(split(path))
    found = [
        FileEntry(each.hash, int(each.info.modified * 1_000_000), each.path, each.info.size)
        for result in choose_results(document, every=False)
        for each in find_published(execution, document, result, servers, asking).found
        if not wanted or each.path == wanted or each.path.startswith(f"{wanted}/")
    ]
    moment = datetime.fromtimestamp(document.published_at, UTC)
    return ListedExecution(
        execution,
        document.step_id,
        document.task_id or "",
        moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        found,
    )


def _print(result: ListResult) -> None:
    if not result.files:
        say(f"no results of {result.job}")
        return
    for execution in result.executions:
        if len(result.executions) > 1:
            say(f"execution {execution.execution}:")
        for entry in execution.files:
            say(f"  {format_bytes(entry.size):>10}  {entry.path}")
    say(f"{count_files(result.files)}, {format_bytes(result.bytes)}, of {result.job}")
