"""A call: what a drop-in was asked to do, whoever runs it.

A drop-in is a function `run(call, settings) -> exit code`. It takes all that it needs from the
call and never touches sys.argv, the standard streams, os.environ or the working directory itself,
so that it runs alike in the process that the agent started and in a child of the host service.
Expected failures (PropmasterError) leave it as exceptions; `carry_out` tells them.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agent_plugin.content import events
from agent_plugin.content.errors import PropmasterError
from agent_plugin.content.log_file import writing_to
from agent_plugin.content.store import Cancellation
from agent_plugin.settings import Settings

ATTACHMENT_DOWNLOAD: Final = "attachment-download"
ATTACHMENT_UPLOAD: Final = "attachment-upload"
VFS_MOUNT: Final = "vfs-mount"
VFS_UNMOUNT: Final = "vfs-unmount"

EXIT_CRASHED: Final = 1

# C0, DEL and C1.
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# Who the job is, where its session is, and which credentials it has. A service takes nothing else
# of an asker's environment.
_OF_THE_JOB: Final = (
    *("DEADLINE_FARM_ID", "DEADLINE_QUEUE_ID", "DEADLINE_JOB_ID", "DEADLINE_SESSION_ID"),
    *("DEADLINE_FLEET_ID", "DEADLINE_WORKER_ID", "DEADLINE_STEP_ID", "DEADLINE_TASK_ID"),
    *("DEADLINE_SESSIONACTION_ID", "DEADLINE_SESSIONACTION_START_TIME"),
    *("DEADLINE_JA_S3_BUCKET", "DEADLINE_JA_ROOT_PREFIX", "OPENJD_SESSION_WORKING_DIR"),
    *("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCOUNT_ID"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_USE_DUALSTACK_ENDPOINT", "AWS_USE_FIPS_ENDPOINT"),
)
# Where the host talks to. In a service these are the service's own: a job that named them could
# have the service ask servers that only the service may reach.
OF_THE_HOST: Final = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL_STS"),
    *("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_CA_BUNDLE"),
    *("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy"),
)
FORWARDED: Final = frozenset((*_OF_THE_JOB, *OF_THE_HOST))


@dataclass(frozen=True, slots=True)
class JobUser:
    """Whose the files of a session are.

    Attributes:
        uid: The job's user.
        gid: The group of the session directory.
    """

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Call:
    """What a drop-in was asked.

    Attributes:
        kind: Which drop-in: one of the constants above.
        arguments: Its command line without the program.
        session_dir: Where the agent started it; of VFS_UNMOUNT the directory above the mount point,
            which nobody has looked at.
        environment: Of FORWARDED, what is set; os.environ says the same, and in a service nothing
            else of AWS.
        job_user: None where the files are this process's user's.
        say: Prints one line into the agent's log at once; control characters are escaped.
        cancellation: Wished when whoever asked is gone, and on SIGTERM and SIGINT.
        keys: The job's, to begin with, as `s3_environment.keys_of` has them; None where the
            environment alone says where they come from.
    """

    kind: str
    arguments: Sequence[str]
    session_dir: Path
    environment: Mapping[str, str]
    job_user: JobUser | None
    say: Callable[[str], None]
    cancellation: Cancellation
    keys: Mapping[str, object] | None = field(default=None, repr=False)


Run = Callable[[Call, Settings], int]

# Kind of call -> module and function, imported when they are called.
DROP_INS: Final = {
    ATTACHMENT_DOWNLOAD: "agent_plugin.workers.deadline.attachment_download:run",
    ATTACHMENT_UPLOAD: "agent_plugin.workers.deadline.attachment_upload:run",
    VFS_MOUNT: "agent_plugin.workers.deadline.vfs:run_mount",
    VFS_UNMOUNT: "agent_plugin.workers.deadline.vfs:run_unmount",
}


def find_drop_in(named: str) -> Run:
    """Return the function that `module:function` names."""
    module, _, function = named.partition(":")
    run: Run = getattr(importlib.import_module(module), function)
    return run


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a call has of an environment."""
    return {name: environment[name] for name in sorted(FORWARDED & environment.keys())}


def one_line(text: str) -> str:
    r"""Return a text in which each control character is spelled: `\n`, `\t`, `\x1b`.

    The agent obeys lines like `openjd_env: A=1`; a file's name must not make one.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def carry_out(call: Call, settings: Settings, run: Run) -> int:
    """Run a drop-in; a failure is told in the agent's words and in ours, and is its exit code."""
    # Whoever only asks a service for it does not need them.
    from agent_plugin.session.state import session_id  # noqa: PLC0415
    from agent_plugin.session_logs import log_place  # noqa: PLC0415

    try:
        # Whose directory it is that something is to be unmounted from, nobody has looked at.
        is_known = call.kind != VFS_UNMOUNT
        with writing_to(log_place(settings, session_id(call.session_dir)) if is_known else None):
            return run(call, settings)
    except PropmasterError as error:
        return tell(error, call.say)
    except Exception:  # noqa: BLE001 - a door: told as a defect, with its trace
        events.get_logger().exception(events.COMMAND_CRASHED)
        call.say("openjd_fail: propmaster crashed; this is a defect of it")
        return EXIT_CRASHED


def tell(error: PropmasterError, say: Callable[[str], None]) -> int:
    """Say an expected failure; return its exit code."""
    say(f"openjd_fail: {error.message}")
    say(f"error[{error.reference}]: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
    return error.exit_code
