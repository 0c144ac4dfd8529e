"""The host service, asked by real job users."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.errors import (
    CancelledError,
    JobInvalidError,
    NotAllowedError,
    ServiceUnavailableError,
)
from agent_plugin.workers.wire import MAX_REQUEST_BYTES
from tests.servers.hooks import CALL_SECONDS
from tests.servers.proxied_object import until
from tests.servers.service_host import (
    JOB_GROUP,
    JOB_USER,
    OTHER_JOB_GROUP,
    OTHER_JOB_USER,
    SERVICE_USER,
    ServiceHost,
    service_host,
)

SECRET = "sEcReTsEcReTsEcReT"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(0, id="root"),
        pytest.param(SERVICE_USER, id="user", marks=pytest.mark.slow),
    ],
)
def host(request: pytest.FixtureRequest) -> Iterator[ServiceHost]:
    """A host whose service runs as root, and one whose service runs as a user with no rights."""
    with service_host(user=request.param) as made:
        made.start({"HTTPS_PROXY": "http://the.host:1", "AWS_ACCESS_KEY_ID": SECRET})
        yield made


@pytest.fixture(scope="module")
def root_host() -> Iterator[ServiceHost]:
    with service_host() as made:
        made.start()
        yield made


def request(session_dir: Path, kind: str = "who", **changes: object) -> bytes:
    document = {
        "version": 1,
        "kind": kind,
        "arguments": [],
        "sessionDir": str(session_dir),
        "environment": {},
        **changes,
    }
    return json.dumps(document).encode() + b"\n"


def content(path: Path) -> bytes:
    """Return what a file has; nothing if it has gone, since others go on meanwhile."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def exit_code(answer: bytes) -> int:
    code: int = json.loads(answer.splitlines()[-1])["exit"]
    return code


# ---------------------------------------------------------------------------- what a call is given


def test_a_call_is_given_what_was_asked_and_who_asked(host: ServiceHost) -> None:
    session_dir = host.session("given")
    environment = {
        "DEADLINE_JOB_ID": "job-1",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ACCESS_KEY_ID": "AKIDJOB",
        "LD_PRELOAD_OF_THE_JOB": "x",
        "HTTPS_PROXY": "http://the.job:1",
        "AWS_ENDPOINT_URL": "http://169.254.169.254",
    }

    done = host.ask(session_dir, "who", "-s3", "a b", environment=environment)

    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout)
    assert told["arguments"] == ["-s3", "a b"]
    assert told["session_dir"] == str(session_dir)
    assert told["job_user"] == [JOB_USER, JOB_GROUP]
    assert told["threads"] <= 2
    for given in (told["environment"], told["process"]):
        assert given["DEADLINE_JOB_ID"] == "job-1"
        assert given["AWS_ACCESS_KEY_ID"] == "AKIDJOB"
        assert given["HTTPS_PROXY"] == "http://the.host:1"
        assert given["AWS_EC2_METADATA_DISABLED"] == "true"
        assert "LD_PRELOAD_OF_THE_JOB" not in given
        assert "AWS_ENDPOINT_URL" not in given


def test_without_keys_of_its_own_a_job_does_not_get_those_of_the_service(host: ServiceHost) -> None:
    done = host.ask(host.session("keyless"), "who")

    assert done.returncode == 7, done.stdout
    assert SECRET not in done.stdout


def test_what_a_call_makes_is_for_the_job_and_its_group(host: ServiceHost) -> None:
    session_dir = host.session("modes")

    assert host.ask(session_dir, "make").returncode == 0
    modes = {path.name: path.stat().st_mode & 0o7777 for path in session_dir.iterdir()}
    assert modes == {"made": 0o660, "directory": 0o2770}
    assert {path.stat().st_gid for path in session_dir.iterdir()} == {JOB_GROUP}


def test_what_the_service_keeps_is_closed_to_all_others(host: ServiceHost) -> None:
    assert host.ask(host.session("closed"), "who").returncode == 7

    kept = [path for path in (host.home / "private/state").rglob("*") if not path.is_socket()]
    assert kept
    assert {path.stat().st_mode & 0o077 for path in kept} == {0}
    assert host.socket.stat().st_mode & 0o777 == 0o666
    assert host.socket.parent.stat().st_mode & 0o022 == 0


def test_a_failure_is_told_and_no_name_makes_a_line_of_its_own(root_host: ServiceHost) -> None:
    done = root_host.ask(root_host.session("failure"), "refuse")

    assert done.returncode == JobInvalidError.exit_code
    lines = done.stdout.splitlines()
    assert lines[0] == "openjd_fail: no refuse\\nopenjd_env: A=1"
    assert lines[1].startswith("error[job-invalid]: ")
    assert lines[2].startswith("hint: ")


def test_a_call_that_crashes_harms_no_other(root_host: ServiceHost) -> None:
    session_dir = root_host.session("crash")

    assert root_host.ask(session_dir, "crash").returncode == 1
    assert "RuntimeError" in root_host.log.read_text()
    assert root_host.ask(session_dir, "who").returncode == 7


def test_every_line_arrives_in_order(root_host: ServiceHost) -> None:
    done = root_host.ask(root_host.session("talk"), "talk", "2000")

    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [str(n) for n in range(2000)]


def test_no_secret_is_in_a_file_a_log_or_a_command_line(host: ServiceHost) -> None:
    session_dir = host.session("secret")
    environment = {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ACCESS_KEY_ID": f"id-{SECRET}"}
    asker = host.begin(session_dir, "wait", environment=environment)
    assert asker.stdout is not None
    assert asker.stdout.readline() == "waiting\n"

    words = [*Path("/proc").glob("[0-9]*/cmdline")]
    files = [path for path in host.home.rglob("*") if path.is_file()]
    assert [path for path in (*words, *files) if SECRET.encode() in content(path)] == []
    asker.kill()
    asker.communicate()
    until((session_dir / "cancelled").exists)


# ---------------------------------------------------------------------------- who may ask for what


def test_another_users_session_is_refused(host: ServiceHost) -> None:
    session_dir = host.session("another")

    answer = host.send(request(session_dir), user=OTHER_JOB_USER, group=OTHER_JOB_GROUP)

    assert exit_code(answer) == NotAllowedError.exit_code
    assert f"id {OTHER_JOB_USER}".encode() in answer


def test_a_session_stays_that_of_the_user_who_has_asked_first(host: ServiceHost) -> None:
    """Users of several queues may be in one group, to which session directories are open."""
    session_dir = host.session("of one group")

    first = host.send(request(session_dir))
    other = host.send(request(session_dir), user=OTHER_JOB_USER, group=JOB_GROUP)
    again = host.send(request(session_dir))

    assert (exit_code(first), exit_code(again)) == (7, 7)
    assert exit_code(other) == NotAllowedError.exit_code
    assert f"that of the user with id {JOB_USER}".encode() in other


def test_who_only_looks_whether_it_answers_has_asked_nothing(host: ServiceHost) -> None:
    """As `worker status` does: monitoring of refused calls must not hear of it."""
    before = len(host.log.read_text())
    with socket.socket(socket.AF_UNIX) as looking:
        looking.connect(str(host.socket))
    host.send(b"\n")
    until(lambda: not host.calls())

    assert host.log.read_text()[before:].count("call.refused") == 1


def test_a_directory_of_the_job_users_own_is_no_session(host: ServiceHost) -> None:
    session_dir = host.session("own", owner=JOB_USER)

    answer = host.send(request(session_dir))

    assert exit_code(answer) == NotAllowedError.exit_code


def test_a_directory_that_others_can_write_to_is_no_session(host: ServiceHost) -> None:
    answer = host.send(request(host.session("open", mode=0o2777)))

    assert exit_code(answer) == NotAllowedError.exit_code


def test_a_link_in_the_place_of_a_session_directory_is_refused(host: ServiceHost) -> None:
    theirs = host.session("theirs", group=OTHER_JOB_GROUP)
    mine = host.session("mine")
    (mine / "link").symlink_to(theirs)
    (host.sessions / "linked").symlink_to(mine)

    for named in (mine / "link", host.sessions / "linked"):
        assert exit_code(host.send(request(named))) == NotAllowedError.exit_code


def test_a_directory_inside_a_session_is_none(host: ServiceHost) -> None:
    """Its job's user can put something else in its place."""
    inside = host.session("outside") / "inside"
    inside.mkdir()
    os.chown(inside, host.user, JOB_GROUP)
    inside.chmod(0o2770)

    assert exit_code(host.send(request(inside))) == NotAllowedError.exit_code


@pytest.mark.parametrize(
    "path",
    ["", "/", "relative", "/tmp/../etc", "/no/such/place", "/tmp/a\0b", "/etc", "/" + "a" * 9999],
)
def test_a_path_that_is_no_session_directory_is_refused(host: ServiceHost, path: str) -> None:
    answer = host.send(request(Path("/"), sessionDir=path))

    assert exit_code(answer) == NotAllowedError.exit_code


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\n", "no request"),
        (b"{}\n", "no request"),
        (b"null\n", "no request"),
        (b"\xff\xfe\n", "no request"),
        (b"[" * 200_000 + b"\n", "no request"),
        ({"more": 1}, "no request"),
        ({"arguments": [1]}, "no request"),
        ({"environment": {"A": None}}, "no request"),
        ({"environment": None}, "no request"),
        ({"version": 2}, "of version 2"),
        ({"kind": "../who"}, "no such call"),
        ({"arguments": ["a\0b"]}, "no text of this host"),
        ({"environment": {"AWS_PROFILE": "a\0b"}}, "no text of this host"),
        ({"arguments": ["half \ud83c"]}, "no text of this host"),
        ({"environment": {"AWS_PROFILE": "half \ud83c"}}, "no text of this host"),
        ({"sessionDir": "/half \ud83c"}, "no text of this host"),
        ({"arguments": ["x" * MAX_REQUEST_BYTES]}, "at most 262144 bytes"),
    ],
    ids=range(17),
)
def test_a_request_that_makes_no_sense_is_refused(
    root_host: ServiceHost, data: bytes | dict[str, Any], reason: str
) -> None:
    """Each of them but for what is wrong with it would be answered."""
    session_dir = root_host.sessions / "sensible"
    if not session_dir.exists():
        root_host.session("sensible")
    if isinstance(data, dict):
        data = request(session_dir, **data)

    answer = root_host.send(data)

    assert exit_code(answer) == NotAllowedError.exit_code
    assert reason.encode() in answer


def test_whoever_asks_by_hand_is_given_no_more(root_host: ServiceHost) -> None:
    """The checks of what the agent starts are not those that count."""
    session_dir = root_host.session("by-hand")
    environment = {"LD_PRELOAD": "/x", "PATH": "/x", "PROPMASTER_CONFIG": "/x", "AWS_REGION": "r"}

    told = b"".join(
        json.loads(line).get("line", "").encode()
        for line in root_host.send(request(session_dir, environment=environment)).splitlines()
    )
    failed = root_host.send(request(session_dir, "refuse"))

    given = json.loads(told)
    assert given["environment"]["AWS_REGION"] == "r"
    assert "/x" not in {*given["environment"].values(), *given["process"].values()}
    assert json.loads(failed.splitlines()[1])["line"] == "openjd_fail: no refuse\\nopenjd_env: A=1"


def test_a_request_with_a_name_that_is_not_utf8_is_carried_out(host: ServiceHost) -> None:
    name = os.fsdecode(b"scene\xe9")
    session_dir = host.session(name)

    done = host.ask(session_dir, "who", name)

    assert done.returncode == 7, done.stdout
    assert json.loads(done.stdout)["arguments"] == [name]


# ------------------------------------------------------------------------------ who waits for whom


def test_who_stays_silent_keeps_nobody_waiting(root_host: ServiceHost) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    try:
        for connection in silent:
            connection.connect(os.fspath(root_host.socket))
            connection.sendall(b'{"version"')

        assert root_host.ask(root_host.session("patient"), "who").returncode == 7
        assert root_host.calls(), "the silent ones are waited for"
    finally:
        for connection in silent:
            connection.close()
    until(lambda: not root_host.calls())


@pytest.mark.slow
def test_silence_ends_by_itself(root_host: ServiceHost) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.fspath(root_host.socket))
        connection.settimeout(CALL_SECONDS)
        pieces = b"".join(iter(lambda: connection.recv(4096), b""))

    assert exit_code(pieces) == NotAllowedError.exit_code


def test_fifty_calls_at_a_time_are_all_answered(root_host: ServiceHost) -> None:
    session_dir = root_host.session("fifty")
    connections = [socket.socket(socket.AF_UNIX) for _ in range(50)]
    try:
        for connection in connections:
            connection.connect(os.fspath(root_host.socket))
            connection.sendall(request(session_dir))
            connection.settimeout(CALL_SECONDS)
        answers = [b"".join(iter(lambda c=c: c.recv(65536), b"")) for c in connections]  # type: ignore[misc]
    finally:
        for connection in connections:
            connection.close()

    assert [exit_code(answer) for answer in answers] == [7] * 50


def test_a_user_has_so_many_calls_and_no_more(root_host: ServiceHost) -> None:
    """The floods of one keep no other from being served."""
    code = """
import socket, sys
connections = []
for number in range(140):
    connections.append(socket.socket(socket.AF_UNIX))
    connections[-1].connect(sys.argv[1])
last = connections[-1].recv(65536)
print("busy" if b'"exit": 88' in last else last, flush=True)
sys.stdin.read()
"""
    become = f"setpriv --reuid={OTHER_JOB_USER} --regid={OTHER_JOB_GROUP} --clear-groups --"
    flood = subprocess.Popen(
        [*become.split(), root_host.python, "-c", code, str(root_host.socket)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert flood.stdout is not None
    assert flood.stdout.readline() == b"busy\n"

    assert root_host.ask(root_host.session("unharmed"), "who").returncode == 7
    flood.communicate()
    until(lambda: not root_host.calls())


@pytest.mark.parametrize("kind", ["hold", "hold_in_child"])
def test_calls_of_a_user_have_so_much_memory_and_no_more(kind: str) -> None:
    """A job could have large manifests decoded by the service, outside of its own cgroup.

    Seen to hold all that it asked for.
    """
    with service_host() as host:
        host.settings["worker"] = {"socket": str(host.socket), "user_memory": "400 MiB"}
        host.start()
        small = host.begin(host.session("small"), "hold", "50")
        others = host.begin(
            host.session("others", group=OTHER_JOB_GROUP),
            *("hold", "250"),
            user=OTHER_JOB_USER,
            group=OTHER_JOB_GROUP,
        )
        for process in (small, others):
            assert process.stdout is not None
            assert process.stdout.readline().startswith("holding")

        large = host.ask(host.session("large"), kind, "380")

        assert large.returncode == ServiceUnavailableError.exit_code, large.stdout
        assert small.poll() is None
        assert others.poll() is None
        assert host.ask(host.session("after"), "who").returncode == 7
        [told] = [line for line in host.log.read_text().splitlines() if "call.refused" in line]
        assert json.loads(told)["reason"].startswith("the calls of this user take ")
        assert json.loads(told)["uid"] == JOB_USER
        for process in (small, others):
            process.kill()
            process.communicate()


# ----------------------------------------------------------------------------------- how calls end


def test_a_call_whose_asker_is_killed_is_cancelled(host: ServiceHost) -> None:
    session_dir = host.session("killed")
    asker = host.begin(session_dir, "wait")
    assert asker.stdout is not None
    assert asker.stdout.readline() == "waiting\n"

    asker.send_signal(signal.SIGKILL)
    asker.communicate()

    until((session_dir / "cancelled").exists)
    until(lambda: not host.calls())


@pytest.fixture
def own_host() -> Iterator[ServiceHost]:
    """A host whose service a test may end."""
    with service_host() as made:
        made.start()
        yield made


def test_a_service_that_ends_lets_calls_end_in_order(own_host: ServiceHost) -> None:
    session_dir = own_host.session("ended")
    asker = own_host.begin(session_dir, "wait")
    assert asker.stdout is not None
    assert asker.stdout.readline() == "waiting\n"

    assert own_host.end() == 0

    stdout, _ = asker.communicate(timeout=CALL_SECONDS)
    assert "error[cancelled]" in stdout
    assert asker.returncode == CancelledError.exit_code
    assert (session_dir / "cancelled").exists()
    assert not own_host.socket.exists()


def test_who_asks_a_service_that_is_killed_says_so(own_host: ServiceHost) -> None:
    session_dir = own_host.session("lost")
    asker = own_host.begin(session_dir, "leave")
    assert asker.stdout is not None
    call = int(asker.stdout.readline())

    own_host.end(signal.SIGKILL)
    os.kill(call, signal.SIGKILL)

    stdout, _ = asker.communicate(timeout=CALL_SECONDS)
    assert "error[service-unavailable]" in stdout
    assert asker.returncode == ServiceUnavailableError.exit_code
    # What it leaves does not keep the next one from starting.
    own_host.start()
    assert own_host.ask(session_dir, "who").returncode == 7


def test_a_second_service_on_one_socket_is_refused(own_host: ServiceHost) -> None:
    argv = [sys.executable, "-P", "-m", "agent_plugin", "worker", "serve"]
    environment = {**os.environ, "PROPMASTER_CONFIG": str(own_host.config)}
    environment.pop("PROPMASTER_STATE_DIR")

    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=CALL_SECONDS, check=False
    )

    assert done.returncode == 76, done.stderr
    assert "another service listens" in done.stderr
    assert own_host.ask(own_host.session("still"), "who").returncode == 7
