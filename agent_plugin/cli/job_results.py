"""What `ls`, `cat`, `get` and `results` have in common: how a job and a path in it are named."""

import os
from collections.abc import Callable, Collection, Sequence
from typing import ParamSpec, TypeVar

import click

from agent_plugin.cli.options import farm_option, queue_option, say, store_option
from agent_plugin.content.errors import ObjectNotFoundError
from agent_plugin.publish.published import Replaced
from agent_plugin.publish.results import check_only
from agent_plugin.publish.servers import ResultServers
from agent_plugin.services import store_limits
from agent_plugin.session.job import check_id
from agent_plugin.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")

by_root_option = click.option(
    "--by-root", is_flag=True, help="Have each root's files in a directory of its own."
)


published_option = click.option(
    "--published", is_flag=True, help="Take what publishers published, not what is in the store."
)

allow_endpoint_option = click.option(
    "--allow-endpoint",
    "endpoints",
    multiple=True,
    metavar="URL",
    help="Ask this S3 server with your keys, too, if a result is there; several times for several.",
)


def of_a_job(metavar: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a command the arguments that say which job and which of its executions are meant.

    They are `job`, `store_url`, `farm_id`, `queue_id`, `step_id`, `task_id`, `only` and `without`.

    Args:
        metavar: How the first argument is shown.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        for option in (
            click.option(
                "--without",
                multiple=True,
                metavar="ID",
                help="Not of this execution; may be given several times.",
            ),
            click.option(
                *("--execution", "only"),
                multiple=True,
                metavar="ID",
                help="Only of this execution (session action); may be given several times.",
            ),
            click.option("--task-id", metavar="TASK", help="Only of this task; needs --step-id."),
            click.option("--step-id", metavar="STEP", help="Only of this step."),
            queue_option,
            farm_option,
            store_option,
            click.argument("job", metavar=metavar),
        ):
            function = option(function)
        return function

    return decorate


def check_ids(farm_id: str, queue_id: str, step_id: str | None, task_id: str | None) -> None:
    """Refuse what is no id before the store is asked.

    Raises:
        JobInvalidError: One is none.
        click.UsageError: A task without its step.
    """
    check_id(farm_id, "farm")
    check_id(queue_id, "queue")
    if step_id is not None:
        check_id(step_id, "step")
    if task_id is not None:
        check_id(task_id, "task")
        if step_id is None:
            raise click.UsageError("--task-id needs --step-id")


def count_files(number: int) -> str:
    """Return a number of files in words."""
    return "1 file" if number == 1 else f"{number} files"


def no_such_result(job_id: str, path: str) -> ObjectNotFoundError:
    """Return the error for a path that no execution has."""
    return ObjectNotFoundError(
        f"there is no result {path} of {job_id}", hint="`propmaster ls JOB` lists what there is"
    )


def job_and_path(argument: str) -> tuple[str, str]:
    """Return the two parts of `JOB/path`; the path is empty when there is none."""
    job, _, path = argument.partition("/")
    return job, path


def check_by_root(*, by_root: bool, published: bool) -> None:
    """Refuse an option that means nothing for what publishers published.

    Raises:
        click.UsageError: Both are wished.
    """
    if by_root and published:
        raise click.UsageError("--by-root is for results in the store; publishers have ByRoot")


def chosen(
    job_id: str,
    there: Collection[str],
    only: Collection[str],
    without: Collection[str],
    *,
    published: bool,
) -> set[str]:
    """Return which of a job's executions are meant.

    Args:
        job_id: The job.
        there: Those that there are.
        only: Those that were asked for; empty for all.
        without: Those that are to be left out.
        published: Whether those that published something are there as well.

    Raises:
        JobInvalidError: One of those that were named is not there.
    """
    check_only(job_id, there, [*only, *without], published=published)
    return (set(only) or set(there)) - set(without)


def say_replaced(replaced: Sequence[Replaced]) -> None:
    """Tell what was left out, because a later execution has published in its place."""
    for each in replaced:
        what = "all" if each.files == each.of else f"{each.files} of {count_files(each.of)}"
        say(
            f"left out: {what} of what execution {each.execution} published to {each.place},"
            f" replaced by execution {each.by} since"
        )


def result_servers(
    settings: Settings, queue_id: str, endpoints: Collection[str] = ()
) -> ResultServers:
    """Return the servers that results are on, asked with the rights of whoever runs the command.

    Args:
        settings: The host's.
        queue_id: The job's queue.
        endpoints: Those that may be asked besides the environment's and those of the settings.
    """
    limits = store_limits(settings, queue_id)
    allowed = [*settings.for_queue(queue_id).store.result_endpoints, *endpoints]
    return ResultServers(os.environ, limits.retry_policy(), limits.bandwidth(), allowed)
