"""`propmaster cat`: one result file of a job, on standard output."""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from agent_plugin.cli.job_results import (
    allow_endpoint_option,
    by_root_option,
    check_by_root,
    check_ids,
    chosen,
    job_and_path,
    no_such_result,
    of_a_job,
    published_option,
    result_servers,
)
from agent_plugin.cli.options import config_option
from agent_plugin.content.errors import JobInvalidError
from agent_plugin.content.safe_path import split
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.get_published import PublishedWish, get_published
from agent_plugin.publish.publications import read_publications
from agent_plugin.publish.published import is_below
from agent_plugin.publish.reading import choose, read_out
from agent_plugin.publish.result_documents import ResultsDocument
from agent_plugin.publish.results import files_of, find_either, find_job
from agent_plugin.publish.servers import ResultServers
from agent_plugin.publish.unpack import UnpackLimits
from agent_plugin.services import ask_store, open_services
from agent_plugin.settings import load
from agent_plugin.transfer.context import TransferContext


@click.command(name="cat")
@of_a_job("JOB/PATH")
@by_root_option
@published_option
@allow_endpoint_option
@config_option
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
    config: Path | None,
) -> None:
    """Print the result file PATH of JOB as it is, verified; JOB may be the beginning of an id."""
    settings = load(config)
    check_ids(farm_id, queue_id, step_id, task_id)
    check_by_root(by_root=by_root, published=published)
    name, given = job_and_path(job)
    path = "/".join(split(given))
    # Signals raise in this thread, which may be waiting for whoever reads our output.
    cancellation = Cancellation()
    asking = ask_store(settings, store_url, cancellation=cancellation, queue_id=queue_id)
    where = (farm_id, queue_id)
    try:
        job_id = find_job(asking, *where, name)
        of_job = (*where, job_id)
        executions, documents = find_either(
            asking, of_job, published=published, step_id=step_id, task_id=task_id
        )
        if documents or published:
            wanted = chosen(job_id, documents, only, without, published=True)
            documents = {name: found for name, found in documents.items() if name in wanted}
            servers = result_servers(settings, queue_id, endpoints)
            with open_services(
                settings, store_url, cancellation=Cancellation(), queue_id=queue_id, quiet=True
            ) as context:
                _print_published(documents, path, job_id, servers, context)
            return
        there = [each.id for each in executions]
        wanted = chosen(job_id, there, only, without, published=False)
        files = {
            each.id: files_of(each, path, by_root=by_root)
            for each in executions
            if each.id in wanted
        }
        read_out(asking, choose(files, path).digest, sys.stdout.buffer.write)
    finally:
        cancellation.cancel()


def _insist_file(
    documents: Mapping[str, ResultsDocument], path: str, context: TransferContext
) -> None:
    """Refuse a directory before all that is below it comes, as far as lists tell of one.

    Raises:
        JobInvalidError, ObjectNotFoundError: As `choose`.
        PropmasterError: As `read_publications`.
    """
    publications = read_publications(documents, context, every=False)
    listed = {each.origin.execution: each.files for each in publications}
    files = {
        execution: {at: entry for at, entry in found.items() if is_below(at, path)}
        for execution, found in listed.items()
        if found is not None
    }
    is_known = len(files) == len(listed)
    if is_known and not any(path in found for found in files.values()):
        choose(files, path)


def _print_published(
    documents: Mapping[str, ResultsDocument],
    path: str,
    job_id: str,
    servers: ResultServers,
    context: TransferContext,
) -> None:
    """Print a file that publishers published; all of its result comes first, and is verified."""
    _insist_file(documents, path, context)
    wish = PublishedWish(
        path,
        merge=True,
        raw=False,
        overwrite=False,
        limits=UnpackLimits(),
        clash_hint="say which one is meant: --execution ID",
    )
    with tempfile.TemporaryDirectory(prefix="propmaster-cat-") as directory:
        to = Path(directory, "results")
        result = get_published(documents, context, servers, job_id, to, wish)
        if not result.files:
            raise no_such_result(job_id, path)
        if not (to / path).is_file():
            what = path or "the whole of a job"
            raise JobInvalidError(f"{what} is a directory of results", hint="name a file")
        with (to / path).open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
