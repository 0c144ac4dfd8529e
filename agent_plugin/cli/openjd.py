"""`propmaster openjd`: what the OpenJD environment templates, and job templates, call."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from agent_plugin.cli.options import (
    config_option,
    escaped,
    parameters_option,
    session_dir_option,
)
from agent_plugin.cli.signals import cancel_on_signals
from agent_plugin.content import events
from agent_plugin.content.errors import JobInvalidError, LocalReadError, PropmasterError
from agent_plugin.content.named_file import open_named
from agent_plugin.session.job import MAX_JOB_BYTES
from agent_plugin.settings import load
from agent_plugin.workers.openjd import hooks
from agent_plugin.workers.openjd.document import complete, is_named_by_service
from agent_plugin.workers.openjd.wrapped_command import Ended, run_wrapped

# What an expression without a value is in a format string.
_NO_VALUE = ("", "null", "None")


def _number(_ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None or value in _NO_VALUE:
        return None
    try:
        return float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no number of seconds", param=param) from error


@click.group(name="openjd")
def command() -> None:
    """What environment templates of Open Job Description call: enter, run, exit."""
    # Standard error is in the session's log as well, and the lines for the runtime say it all.
    events.configure(level=logging.WARNING)


@command.command(name="enter")
@session_dir_option
@click.option(
    "--job",
    "job_file",
    type=click.Path(path_type=Path),
    help="A file with the job document; one without content is none.",
)
@click.option(
    "--job-file",
    "other_file",
    type=click.Path(path_type=Path),
    help="Another, which is read when the first has none.",
)
@click.option(
    "--path-mapping-rules",
    "rules_file",
    type=click.Path(path_type=Path),
    help="The runtime's path mapping rules, pathmapping-1.0.",
)
@config_option
def enter_command(
    session_dir: Path,
    job_file: Path | None,
    other_file: Path | None,
    rules_file: Path | None,
    config: Path | None,
) -> None:
    """Bring the inputs of a job to its session, and say where they are; without a document nothing.

    The document may leave out ids and store where the runtime has them.
    """
    data, source = b"", ""
    for file in (job_file, other_file):
        if not data and file is not None and os.fspath(file) not in ("", "."):
            data, source = _read(file).strip(), os.fspath(file)
    if not data:
        _say("openjd_status: the job has no propmaster document: nothing is brought in")
        return
    with _told():
        rules = _read(rules_file) if rules_file is not None else b""
        job = complete(data, source, os.environ, rules=rules)
        with cancel_on_signals() as cancellation:
            hooks.enter(job, session_dir, load(config), cancellation=cancellation, say=_say)


@command.command(
    name="run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("--step", "step_name", metavar="NAME", default="", help="The name of the step.")
@click.option("--no-outputs", is_flag=True, help="Run the command, and store nothing after it.")
@click.option(
    "--timeout", callback=_number, metavar="SECONDS", help="What the command may take; empty: all."
)
@click.option(
    "--notify-period",
    callback=_number,
    metavar="SECONDS",
    help="What it has between SIGTERM and SIGKILL when it is cancelled; empty: SIGKILL at once.",
)
@parameters_option
@config_option
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def run_command(
    step_name: str,
    no_outputs: bool,
    timeout: float | None,
    notify_period: float | None,
    parameters: Mapping[str, str],
    config: Path | None,
    argv: tuple[str, ...],
) -> None:
    """Run a task's command, and store what it left behind; exit with its code.

    Outside of a session that `openjd enter` started, the command is run, and that is all. Within
    another `openjd run`, a wrap hook's, only the parts of sources come that --parameter says.
    """
    session = os.environ.get(hooks.SESSION_VARIABLE)
    run = partial(_run, argv, seconds=timeout, notify_seconds=notify_period or 0.0)
    if no_outputs or not session:
        raise click.exceptions.Exit(_code_of(run()))
    is_within = os.environ.get(hooks.RUN_VARIABLE) == session
    if not is_within and not step_name and not is_named_by_service(os.environ):
        raise click.UsageError("--step NAME: this runtime does not say which step the task is of")
    session_dir, settings = Path(session), load(config)
    started_at = time.time()
    with _told(), cancel_on_signals() as cancellation:
        if not is_within:
            hooks.sync_before_task(
                session_dir, step_name, settings, os.environ, cancellation=cancellation, say=_say
            )
        if parameters or not is_within:
            hooks.begin(session_dir, parameters, settings, cancellation=cancellation, say=_say)
    os.environ[hooks.RUN_VARIABLE] = session
    ended = run()
    code = _code_of(ended)
    if ended.cancelled or is_within:
        raise click.exceptions.Exit(code)
    try:
        with _told(), cancel_on_signals() as cancellation:
            hooks.finish(
                session_dir,
                step_name,
                settings,
                os.environ,
                started_at=started_at,
                failed=code != 0,
                cancellation=cancellation,
                say=_say,
            )
    except PropmasterError as error:
        if not code:
            raise
        # The command's own failure came first, and is what the farm is to hear of.
        _say(f"error[{error.reference}]: {error.message}")
    raise click.exceptions.Exit(code)


def _run(argv: tuple[str, ...], *, seconds: float | None, notify_seconds: float) -> Ended:
    with cancel_on_signals() as cancellation:
        return run_wrapped(
            argv, seconds=seconds, notify_seconds=notify_seconds, cancellation=cancellation
        )


@command.command(name="exit")
@session_dir_option
@click.option(
    "--outputs",
    type=click.Choice(["TASK", "SESSION"]),
    default="TASK",
    show_default=True,
    help="SESSION: first store what stands in output directories and no `openjd run` has stored.",
)
@config_option
def exit_command(session_dir: Path, outputs: str, config: Path | None) -> None:
    """End the session: unmount, remove, forget. Without one, nothing."""
    with _told(), cancel_on_signals() as cancellation:
        hooks.leave(
            session_dir,
            load(config),
            os.environ,
            upload=outputs == "SESSION",
            cancellation=cancellation,
            say=_say,
        )


@contextmanager
def _told() -> Iterator[None]:
    """Tell the runtime of an expected failure, which then goes on its way."""
    try:
        yield
    except PropmasterError as error:
        _say(f"openjd_fail: {error.message}")
        raise


def _code_of(ended: Ended) -> int:
    if ended.reason:
        _say(f"openjd_fail: {ended.reason}")
    return ended.code


def _read(file: Path) -> bytes:
    try:
        with open_named(file) as opened:
            return opened.read(MAX_JOB_BYTES + 1)
    except FileNotFoundError as error:
        raise JobInvalidError(f"{file}: there is no such file") from error
    except OSError as error:
        raise LocalReadError(f"{file}: {error.strerror}") from error


def _say(line: str) -> None:
    print(escaped(line), flush=True)
