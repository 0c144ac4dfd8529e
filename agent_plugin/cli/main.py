"""The command's door: finds the command, runs it, and turns a failure into words and an exit code.

Commands are imported when they are called, not before: a finish-task has 0.3 s in all.
"""

import importlib
import platform
import sys
from collections.abc import Sequence
from typing import Final

import click

from agent_plugin import __version__
from agent_plugin.cli import streams
from agent_plugin.cli.options import escaped, say_error
from agent_plugin.cli.signals import raise_on_signals
from agent_plugin.content import events
from agent_plugin.content.errors import (
    CancelledError,
    PropmasterError,
    UnsupportedPlatformError,
)

EXIT_CRASHED: Final = 1
EXIT_USAGE: Final = 2
SUPPORTED_MACHINES: Final = frozenset({"x86_64", "aarch64"})

# Command -> module and one line of help, so that `--help` imports none of them.
COMMANDS: Final = {
    "cache": ("agent_plugin.cli.cache", "Look at the shared blob cache, check it, make room."),
    "cat": ("agent_plugin.cli.cat", "Print one result file of a job."),
    "demo": ("agent_plugin.cli.demo", "Show the whole main job on this machine."),
    "doctor": ("agent_plugin.cli.doctor", "Say what this host can do, and what follows."),
    "get": ("agent_plugin.cli.get", "Download the result files of a job."),
    "handle-url": ("agent_plugin.cli.handle_url", "Download the outputs that a URL names."),
    "ls": ("agent_plugin.cli.ls", "List the result files of a job."),
    "manifest": ("agent_plugin.cli.manifest", "Show, check, compare and make manifests."),
    "mount": ("agent_plugin.cli.mount", "Mount a manifest as a file system that fetches lazily."),
    "openjd": ("agent_plugin.cli.openjd", "What OpenJD environment and job templates call."),
    "outputs": ("agent_plugin.cli.outputs", "List or download what a job's tasks left behind."),
    "queue": ("agent_plugin.cli.queue", "Show or set what this host does for a queue's jobs."),
    "results": (
        "agent_plugin.cli.results",
        "Tell what a job's executions left, and give links to it.",
    ),
    "session": ("agent_plugin.cli.session", "What the worker agent calls around tasks."),
    "source": ("agent_plugin.cli.source", "Show what objects of a bucket would come as inputs."),
    "submit": ("agent_plugin.cli.submit", "Upload a directory as a job's inputs."),
    "url-handler": ("agent_plugin.cli.url_handler", "Open such URLs from a web browser."),
    "task": ("agent_plugin.cli.task", "Look at and steer single files of transfers."),
    "transfer": ("agent_plugin.cli.transfer", "Look at and steer what moves bytes on this host."),
    "unmount": ("agent_plugin.cli.unmount", "End a mount."),
    "worker": ("agent_plugin.cli.worker", "What a render worker's host runs and installs."),
}


class _Commands(click.Group):
    """The commands, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="propmaster")
def propmaster() -> None:
    """Bring a render job's inputs to the worker, verified, and its outputs back to the store.

    Credentials and endpoints come from the standard AWS variables and files; settings from
    --config, PROPMASTER_CONFIG or /etc/propmaster/config.toml.
    """


def check_platform(system: str, machine: str) -> None:
    """Refuse what the program was not made for.

    Raises:
        UnsupportedPlatformError: Naming what this host is.
    """
    if system != "Linux" or machine not in SUPPORTED_MACHINES:
        raise UnsupportedPlatformError(
            f"this host is {system} on {machine}",
            hint="propmaster runs on Linux, on x86-64 and arm64",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit the process; the only place where failures become exit codes."""
    streams.prepare()
    events.configure()
    raise_on_signals()
    try:
        code = _run(arguments)
        # Here, because a full disk and a reader who has gone are told as failures, too.
        sys.stdout.flush()
    except click.ClickException as error:
        # The help that stands for a missing command is no message about anybody's names.
        if not isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.message = escaped(error.message)  # type: ignore[misc] # show() reads it
        error.show()
        code = EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        # Writing what was printed could take for ever: a pipe that nobody empties.
        streams.drop_output()
        print("error[cancelled]: stopped on request", file=sys.stderr)
        code = CancelledError.exit_code
    except PropmasterError as error:
        say_error(error)
        code = error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone.
        code = EXIT_CRASHED
    except Exception:  # noqa: BLE001 - the last door: told as a defect, with its trace
        events.get_logger().exception(events.COMMAND_CRASHED)
        print(
            "error[crashed]: this is a defect of propmaster\n"
            "hint: report it with the event above and the output of `propmaster doctor --json`",
            file=sys.stderr,
        )
        code = EXIT_CRASHED
    streams.flush_output()
    # Threads that still wait for a store are daemons; they must not hold the process up.
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    check_platform(platform.system(), platform.machine())
    code = propmaster.main(
        args=list(arguments) if arguments is not None else None,
        prog_name="propmaster",
        standalone_mode=False,
    )
    return code if isinstance(code, int) else 0
