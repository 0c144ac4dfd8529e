"""`propmaster results`: what became of a job's executions, and links to their files."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import msgspec

from agent_plugin.cli.job_results import (
    allow_endpoint_option,
    check_ids,
    chosen,
    count_files,
    of_a_job,
    result_servers,
    say_replaced,
)
from agent_plugin.cli.options import common_options, print_json, say
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.publish.presigning import PresignedResult, parse_duration, presign, presign_files
from agent_plugin.publish.publications import read_publications
from agent_plugin.publish.published import Replaced, find_published, refuse_lost
from agent_plugin.publish.result_documents import (
    Contents,
    ExcludedOutputs,
    PublishFailure,
    Result,
    ResultsDocument,
)
from agent_plugin.publish.results import (
    JobExecution,
    files_of,
    find_documents,
    find_executions,
    find_job,
)
from agent_plugin.publish.servers import ResultServers
from agent_plugin.services import ask_store
from agent_plugin.settings import load
from agent_plugin.transfer.asking import Asking
from agent_plugin.transfer.progress import format_bytes

# What signing all links may take, in seconds: a shorter life than asked for has another reason.
SIGNING_SECONDS: Final = 60
SHOWN_PATHS: Final = 10


class ExecutionResults(msgspec.Struct, rename="camel"):
    """What there is of one execution; `files` and `bytes` are those in the store.

    Attributes:
        contents: Of each of the results, which files it has; empty where nobody tells.
    """

    execution: str
    step: str
    task: str
    node: str
    files: int
    bytes: int
    results: list[Result] = []
    failures: list[PublishFailure] = []
    excluded: list[ExcludedOutputs] = []
    contents: list[Contents] = []

    @classmethod
    def of(
        cls, execution: JobExecution | None, name: str, document: ResultsDocument | None
    ) -> "ExecutionResults":
        """Return what the store and the result document tell; either may be missing."""
        step, task, sizes = "", "", list[int]()
        if document is not None:
            step, task = document.step_id, document.task_id or ""
        if execution is not None:
            step, task = execution.step, execution.task
            sizes = [e.size for output in execution.manifests for e in output.manifest.entries]
        told = cls(name, step, task, "", len(sizes), sum(sizes))
        if document is not None:
            told.node = document.node_id
            told.results, told.failures = document.results, document.failures
            told.excluded, told.contents = document.excluded, document.contents
        return told


class JobResults(msgspec.Struct):
    """What `results` prints; the keys in upper case are those of Bacalhau's answer.

    Attributes:
        results: Each a Result, or with links a PresignedResult.
        expires: When the first of the links ends, seconds since the epoch.
        replaced: Of what links were asked for, what later executions have replaced.
    """

    job: str
    executions: list[ExecutionResults]
    results: list[object] = msgspec.field(name="Results")
    next_token: str = msgspec.field(name="NextToken", default="")
    expires: float | None = None
    replaced: list[Replaced] = []


class _Duration(click.ParamType[int, str]):
    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(name="results")
@of_a_job("JOB")
@click.option(
    "--presign",
    "seconds",
    type=_Duration(),
    metavar="DURATION",
    help="Give links that work for so long, such as 1h or 30m; 7d at most.",
)
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
    seconds: int | None,
    endpoints: tuple[str, ...],
    as_json: bool,
    config: Path | None,
) -> None:
    """Tell what JOB's executions left and where it was published; JOB may be cut short."""
    check_ids(farm_id, queue_id, step_id, task_id)
    settings = load(config)
    with cancel_on_signals() as cancellation:
        asking = ask_store(settings, store_url, cancellation=cancellation, queue_id=queue_id)
        job_id = find_job(asking, farm_id, queue_id, job)
        where = (farm_id, queue_id, job_id)
        executions = find_executions(asking, where, step_id=step_id, task_id=task_id)
        documents = find_documents(asking, where, step_id=step_id, task_id=task_id)
        there = [*(each.id for each in executions), *documents]
        wanted = chosen(job_id, there, only, without, published=True)
        executions = [each for each in executions if each.id in wanted]
        documents = {name: found for name, found in documents.items() if name in wanted}
        result = JobResults(
            job_id,
            _executions(executions, documents),
            [each for document in documents.values() for each in document.results],
        )
        if seconds is not None:
            servers = result_servers(settings, queue_id, endpoints)
            links, result.replaced = _links(executions, documents, seconds, asking, servers)
            result.results = [*links]
            result.expires = min((link.expires for link in links), default=None)
    if as_json:
        print_json(result)
    elif seconds is not None:
        say_replaced(result.replaced)
        _print_links([r for r in result.results if isinstance(r, PresignedResult)], seconds)
    else:
        _print(result)


def _executions(
    executions: Sequence[JobExecution], documents: dict[str, ResultsDocument]
) -> list[ExecutionResults]:
    """Return every execution that left something, or of which something was published."""
    known = {execution.id: execution for execution in executions}
    names = [*known, *(name for name in documents if name not in known)]
    return [ExecutionResults.of(known.get(name), name, documents.get(name)) for name in names]


def _links(
    executions: Sequence[JobExecution],
    documents: Mapping[str, ResultsDocument],
    seconds: int,
    asking: Asking,
    servers: ResultServers,
) -> tuple[list[PresignedResult], list[Replaced]]:
    """Return links to what was published, and to the store's files of executions without that.

    And what later executions have replaced, to which there are none.
    """
    found = find_published(read_publications(documents, asking, every=True), servers, asking)
    refuse_lost(found)
    links = [link for each in found for link in presign(each, seconds, asking)]
    replaced = [told for each in found for told in each.told_replaced("")]
    published = {each.execution for each in found}
    for execution in executions:
        if execution.id not in published:
            links += presign_files(execution.id, files_of(execution), seconds, asking)
    return links, replaced


def _print(result: JobResults) -> None:
    if not result.executions:
        say(f"no results of {result.job}")
        return
    for execution in result.executions:
        say(f"execution {execution.execution}:")
        say(f"  of {execution.task or execution.step}")
        if execution.files:
            say(f"  {count_files(execution.files)}, {format_bytes(execution.bytes)}, in the store")
        _print_published(execution)


def _print_published(execution: ExecutionResults) -> None:
    for index, result in enumerate(execution.results):
        say(f"  published: {result.url}")
        if execution.contents:
            contents = execution.contents[index]
            say(f"    {count_files(contents.files)}, {format_bytes(contents.bytes)}")
    for excluded in execution.excluded:
        say(f"  excluded by hand from {excluded.url}: {count_files(excluded.files)}")
        for path in excluded.paths[:SHOWN_PATHS]:
            say(f"    {path}")
        if excluded.files > SHOWN_PATHS:
            say(f"    and {excluded.files - len(excluded.paths[:SHOWN_PATHS])} more")
    for failure in execution.failures:
        say(f"  not published: s3://{failure.bucket}/{failure.key}")
        say(f"    {failure.error}: {failure.message}")
        if failure.hint:
            say(f"    hint: {failure.hint}")
        if failure.later:
            say("    to be tried again when the session ends")


def _print_links(links: Sequence[PresignedResult], seconds: int) -> None:
    if not links:
        say("nothing to give links to")
        return
    execution = ""
    for link in links:
        if link.execution != execution:
            execution = link.execution
            say(f"execution {execution}:")
        say(f"  {link.path}")
        say(f"    {link.params.presigned_url}")
    ends = min(link.expires for link in links)
    moment = datetime.fromtimestamp(ends, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    lasting = ends - datetime.now(UTC).timestamp()
    # A request or two lies between signing and now.
    shorter = lasting < seconds - SIGNING_SECONDS
    say(f"links work until {moment}" + (", when the keys end that signed them" if shorter else ""))
