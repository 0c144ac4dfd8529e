"""Calls that only tests make, and a service that answers them: `python -m … SOCKET CONFIG`.

They show what a drop-in is given, and do what one can do wrong.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from agent_plugin.content import events
from agent_plugin.content.errors import JobInvalidError
from agent_plugin.content.s3_environment import Credentials
from agent_plugin.settings import Settings, load
from agent_plugin.workers.call import Call
from agent_plugin.workers.listener import listen
from agent_plugin.workers.service import Service

KINDS = {
    kind: f"tests.servers.worker_calls:{kind}"
    for kind in (
        *("who", "wait", "keys", "late", "renewed_keys", "crash", "refuse", "talk", "make"),
        *("leave", "repeat", "hold", "hold_in_child"),
    )
}


def who(call: Call, settings: Settings) -> int:
    """Say what the call is given."""
    del settings
    user = call.job_user
    told = {
        "arguments": list(call.arguments),
        "session_dir": os.fspath(call.session_dir),
        "job_user": None if user is None else [user.uid, user.gid],
        "environment": dict(call.environment),
        "process": dict(os.environ),
        "threads": len([*Path("/proc/self/task").iterdir()]),
    }
    call.say(json.dumps(told))
    return 7


def repeat(call: Call, settings: Settings) -> int:
    """Say what the call is given in words."""
    del settings
    call.say(" ".join(call.arguments))
    return 0


def wait(call: Call, settings: Settings) -> int:
    """Wait to be cancelled, and leave a file that says so."""
    del settings
    call.say("waiting")
    try:
        call.cancellation.sleep(600)
    finally:
        (call.session_dir / "cancelled").touch()
    return 0


def leave(call: Call, settings: Settings) -> int:
    """Take no notice of a cancellation."""
    del settings
    call.say(str(os.getpid()))
    time.sleep(600)
    return 0


def hold(call: Call, settings: Settings) -> int:
    """Take so many MiB of memory, and wait to be cancelled."""
    taken = b"x" * (int(call.arguments[0]) * 1024 * 1024)
    call.say(f"holding {len(taken)}")
    return wait(call, settings)


def hold_in_child(call: Call, settings: Settings) -> int:
    """Have a process of its own do the same, as a job's credential process could."""
    pid = os.fork()
    if not pid:
        try:
            hold(call, settings)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return 0


def keys(call: Call, settings: Settings) -> int:
    """Say the key's id and the region that a store would be asked with."""
    del settings
    provided = Credentials(call.environment, call.keys).provide()
    call.say(f"{provided['access_key_id']} {call.environment.get('AWS_REGION')}")
    return 0


def renewed_keys(call: Call, settings: Settings) -> int:
    """Say the same when the first keys have expired."""
    expired = {**(call.keys or {}), "Expiration": "2020-01-01T00:00:00Z"}
    return keys(replace(call, keys=expired), settings)


def late(call: Call, settings: Settings) -> int:
    """Do the same, as soon as there is a file `go`."""
    call.say("waiting")
    while not (call.session_dir / "go").exists():
        call.cancellation.sleep(0.02)
    return keys(call, settings)


def crash(call: Call, settings: Settings) -> int:
    """Have a defect."""
    raise RuntimeError(f"{call.kind} {settings.worker.socket}")


def refuse(call: Call, settings: Settings) -> int:
    """Fail as expected."""
    raise JobInvalidError(f"no {call.kind}\nopenjd_env: A=1", hint=str(settings.worker.socket))


def talk(call: Call, settings: Settings) -> int:
    """Say more than a pipe and a socket hold."""
    del settings
    for number in range(int(call.arguments[0])):
        call.say(f"{number} " + "x" * 1000)
    return 0


def make(call: Call, settings: Settings) -> int:
    """Make a file and a directory with the modes that one asks for by default."""
    del settings
    (call.session_dir / "made").touch()
    (call.session_dir / "directory").mkdir()
    return 0


def serve(socket: str, config: str) -> None:
    """Be a service that answers these calls."""
    events.configure()
    with listen(Path(socket)) as listener:
        Service(listener, load(Path(config)), drop_ins=KINDS).serve(
            lambda: print("ready", flush=True)
        )


if __name__ == "__main__":
    serve(*sys.argv[1:])
