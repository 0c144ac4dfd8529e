"""What `ls`, `cat`, `get` and `results` have in common: how a job and a path in it are named."""

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

from agent_plugin.cli.options import farm_option, queue_option, store_option
from agent_plugin.content.errors import ObjectNotFoundError
from agent_plugin.publish.published import ResultServers
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


def of_a_job(metavar: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a command the arguments that say which job and which of its executions are meant.

    They are `job`, `store_url`, `farm_id`, `queue_id`, `step_id`, `task_id` and `only`.

    Args:
        metavar: How the first argument is shown.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        for option in (
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


def result_servers(settings: Settings, queue_id: str) -> ResultServers:
    """Return the servers that results are on, asked with the rights of whoever runs the command."""
    limits = store_limits(settings, queue_id)
    return ResultServers(os.environ, limits.retry_policy(), limits.bandwidth())
