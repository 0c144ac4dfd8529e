"""The credentials of a job are looked up with the job user's rights, and nothing is with more."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from agent_plugin.content.errors import NotAllowedError, SettingsInvalidError, StoreAccessError
from agent_plugin.content.mount_table import unmount
from tests.servers.hooks import CALL_SECONDS
from tests.servers.service_host import (
    JOB_GROUP,
    JOB_USER,
    OTHER_JOB_GROUP,
    OTHER_JOB_USER,
    SERVICE_USER,
    ServiceHost,
    service_host,
)
from vfs.mount import mount_fuse
from vfs.transports.kernel_transport import REQUEST_BYTES, negotiate

SECRET = "pLaNtEdSeCrEt"
KEYS = {
    "Version": 1,
    "AccessKeyId": "AKIDPROCESS",
    "SecretAccessKey": SECRET,
    "SessionToken": "token",
    "Expiration": "2099-01-01T00:00:00Z",
}
# The pipe for the answer, and those to what it has started.
OWN_FILES = 3


@pytest.fixture(scope="module")
def root_host() -> Iterator[ServiceHost]:
    with service_host() as made:
        made.start({"AWS_PROFILE": "of-the-service", "AWS_CONFIG_FILE": "/no/such/file"})
        yield made


@pytest.fixture(scope="module")
def user_host() -> Iterator[ServiceHost]:
    with service_host(user=SERVICE_USER) as made:
        made.start()
        yield made


def queue_files(
    host: ServiceHost, name: str, *, owner: int, group: int = JOB_GROUP, mode: int = 0o640
) -> dict[str, str]:
    """Make a profile with a credential process; return the variables that name it."""
    directory = host.home / name
    directory.mkdir()
    script = directory / "get_aws_credentials.sh"
    script.write_text(f"#!/bin/sh\nid -u >{directory}/ran\necho '{json.dumps(KEYS)}'\n")
    config = directory / "config"
    config.write_text(f"[profile deadline-q]\ncredential_process = {script}\nregion = eu-north-1\n")
    credentials = directory / "credentials"
    credentials.touch()
    for path in (directory, script, config, credentials):
        os.chown(path, owner, group)
    directory.chmod(0o770 if owner == JOB_USER else 0o750)
    script.chmod(0o750)
    config.chmod(mode)
    credentials.chmod(mode)
    return {
        "AWS_PROFILE": "deadline-q",
        "AWS_CONFIG_FILE": str(config),
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
    }


def ran_as(host: ServiceHost, name: str) -> int | None:
    try:
        return int((host.home / name / "ran").read_text())
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("call", ["keys", "renewed_keys"])
def test_a_planted_credential_process_runs_as_the_job_user(
    root_host: ServiceHost, call: str
) -> None:
    """It does when the call begins, and when its first keys have expired."""
    environment = queue_files(root_host, f"planted-{call}", owner=JOB_USER)

    done = root_host.ask(root_host.session(f"planted-{call}"), call, environment=environment)

    assert done.stdout == "AKIDPROCESS eu-north-1\n", root_host.log.read_text()
    assert ran_as(root_host, f"planted-{call}") == JOB_USER


def test_who_shares_a_group_is_not_given_the_credentials_of_others(root_host: ServiceHost) -> None:
    """Whose they are was written into one file, which a call reads when it needs some."""
    environment = queue_files(root_host, "theirs", owner=JOB_USER)
    session_dir = root_host.session("theirs-1")
    root_host.ask(session_dir, "keys", environment=environment)

    other = root_host.begin(session_dir, "late", user=OTHER_JOB_USER)
    assert other.stdout is not None
    first = other.stdout.readline()
    root_host.ask(session_dir, "keys", environment=environment)
    (session_dir / "go").touch()
    said = first + other.communicate(timeout=CALL_SECONDS)[0]

    assert "AKIDPROCESS" not in said
    assert other.returncode == NotAllowedError.exit_code, said


@pytest.mark.slow
def test_the_agents_credential_process_runs_as_the_job_user(root_host: ServiceHost) -> None:
    environment = queue_files(root_host, "agents", owner=0)
    (root_host.home / "agents").chmod(0o770)

    done = root_host.ask(root_host.session("agents-1"), "keys", environment=environment)

    assert done.stdout == "AKIDPROCESS eu-north-1\n", root_host.log.read_text()
    assert ran_as(root_host, "agents") == JOB_USER


def test_files_that_the_job_user_may_not_read_are_not_read(root_host: ServiceHost) -> None:
    environment = queue_files(root_host, "closed", owner=0, group=OTHER_JOB_GROUP)

    done = root_host.ask(root_host.session("closed-1"), "keys", environment=environment)

    assert done.returncode in (SettingsInvalidError.exit_code, StoreAccessError.exit_code)
    assert ran_as(root_host, "closed") is None


def test_not_even_the_region_is_read_from_a_closed_file(root_host: ServiceHost) -> None:
    environment = queue_files(root_host, "region", owner=0, mode=0o600)
    environment |= {"AWS_ACCESS_KEY_ID": "AKIDGIVEN", "AWS_SECRET_ACCESS_KEY": SECRET}

    done = root_host.ask(root_host.session("region-1"), "keys", environment=environment)

    assert done.returncode != 0
    assert "eu-north-1" not in done.stdout


def test_a_file_of_secrets_is_not_quoted(root_host: ServiceHost) -> None:
    """Whatever a job names as its AWS file is read with the job user's rights, if at all."""
    secret = root_host.home / "private/secret"
    secret.write_text(f"region {SECRET}\n")
    environment = {"AWS_PROFILE": "x", "AWS_CONFIG_FILE": str(secret)}

    done = root_host.ask(root_host.session("quoted-1"), "keys", environment=environment)

    assert done.returncode != 0
    assert SECRET not in done.stdout
    assert SECRET not in root_host.log.read_text()


def test_a_job_without_credentials_has_none(root_host: ServiceHost) -> None:
    done = root_host.ask(root_host.session("none-1"), "keys")

    assert done.returncode == StoreAccessError.exit_code
    assert "of-the-service" not in done.stdout


def test_keys_of_the_environment_come_first(root_host: ServiceHost) -> None:
    environment = queue_files(root_host, "first", owner=JOB_USER)
    environment |= {"AWS_ACCESS_KEY_ID": "AKIDGIVEN", "AWS_SECRET_ACCESS_KEY": SECRET}

    done = root_host.ask(root_host.session("first-1"), "keys", environment=environment)

    assert done.stdout == "AKIDGIVEN eu-north-1\n"
    assert ran_as(root_host, "first") is None


def test_what_is_written_for_a_credential_process_holds_no_secret(root_host: ServiceHost) -> None:
    environment = queue_files(root_host, "unwritten", owner=JOB_USER)
    done = root_host.ask(root_host.session("unwritten-1"), "keys", environment=environment)
    assert done.returncode == 0

    state = root_host.home / "private/state"
    files = [path for path in state.rglob("*") if path.is_file()]
    assert any(path.name == "aws-config" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in root_host.log.read_text()


@contextmanager
def looking_up(
    host: ServiceHost, name: str, call: str
) -> Iterator[tuple["subprocess.Popen[str]", int, int]]:
    """Yield who asks, who looks its credentials up, and what that has started: it hangs."""
    environment = queue_files(host, name, owner=JOB_USER)
    script = host.home / name / "get_aws_credentials.sh"
    pids = host.home / name / "pids"
    hang = f"echo $PPID $$ >{pids}.new\nmv {pids}.new {pids}\nexec sleep 600\n"
    first = f"[ -e {pids}.first ] || {{ touch {pids}.first; echo '{json.dumps(KEYS)}'; exit; }}\n"
    if call == "keys":
        first = ""
    script.write_text(f"#!/bin/sh\n{first}{hang}")
    asker = host.begin(host.session(name), call, environment=environment)
    started = 0
    try:
        while not pids.exists():
            assert asker.poll() is None, asker.communicate()
        parent, started = map(int, pids.read_text().split())
        yield asker, parent, started
    finally:
        asker.kill()
        asker.communicate()
        if started:
            with suppress(ProcessLookupError):
                os.kill(started, signal.SIGKILL)


@pytest.mark.parametrize("call", ["keys", "renewed_keys"])
def test_the_process_that_becomes_the_job_user_can_not_be_looked_into(
    root_host: ServiceHost, call: str
) -> None:
    """What it inherits from the service is no matter for other processes of that user."""
    with looking_up(root_host, f"closed-{call}", call) as (_, parent, started):
        status = Path(f"/proc/{parent}/status").read_text()
        assert f"Uid:\t{JOB_USER}\t{JOB_USER}\t{JOB_USER}\t{JOB_USER}\n" in status
        assert f"Gid:\t{JOB_GROUP}\t{JOB_GROUP}\t{JOB_GROUP}\t{JOB_GROUP}\n" in status
        groups = status.partition("Groups:")[2].partition("\n")[0].split()
        assert set(groups) <= {str(JOB_GROUP)}
        assert "CapPrm:\t0000000000000000\n" in status
        look = f"setpriv --reuid={JOB_USER} --regid={JOB_GROUP} --clear-groups -- cat"
        for name in ("environ", "maps", "mem"):
            seen = subprocess.run(
                [*look.split(), f"/proc/{parent}/{name}"], capture_output=True, check=False
            )
            assert (seen.returncode, seen.stdout) == (1, b""), name
        # What it has started is the job's, and has nothing of the service.
        assert b"of-the-service" not in Path(f"/proc/{started}/environ").read_bytes()
        opened = [path.readlink() for path in Path(f"/proc/{started}/fd").iterdir()]
        assert not [path for path in opened if root_host.home in path.parents]


def test_a_call_starts_no_other_program_for_its_first_keys(root_host: ServiceHost) -> None:
    with looking_up(root_host, "forked", "keys") as (_, parent, _started):
        call = call_of(root_host, parent)
        assert Path(f"/proc/{parent}/cmdline").read_bytes() == (
            Path(f"/proc/{call}/cmdline").read_bytes()
        )
        links = [path.readlink() for path in Path(f"/proc/{parent}/fd").iterdir()]
        assert len([path for path in links if not path.match("/dev/null")]) <= OWN_FILES


@pytest.mark.parametrize("call", ["keys", "renewed_keys"])
def test_a_look_up_ends_with_its_call(root_host: ServiceHost, call: str) -> None:
    with looking_up(root_host, f"ended-{call}", call) as (_, parent, started):
        os.kill(call_of(root_host, parent), signal.SIGKILL)
        wait_for_end(parent, started)


def test_a_look_up_ends_with_its_asker(root_host: ServiceHost) -> None:
    with looking_up(root_host, "gone", "keys") as (asker, parent, started):
        asker.kill()
        wait_for_end(parent, started)


_READ = """
import socket, sys
from agent_plugin.content.errors import SettingsInvalidError
from agent_plugin.workers import credentials
from agent_plugin.workers.rights import Peer
credentials.LOOK_UP_SECONDS = 0.5
asker, _service = socket.socketpair()
user = int(sys.argv[2])
try:
    credentials.ask_as(Peer(0, user, user), lambda: {"text": open(sys.argv[1]).read()}, asker)
except SettingsInvalidError as error:
    print(error.message)
"""


def test_a_look_up_on_a_file_system_that_does_not_answer_is_given_up(
    root_host: ServiceHost,
) -> None:
    """Seen to wait for ever: who waits for an answer of FUSE can not even be killed."""
    at = root_host.home / "silent"
    at.mkdir()
    device = mount_fuse(at, "propmaster-silent")
    try:
        negotiate(device)
        asking = subprocess.Popen(
            [sys.executable, "-c", _READ, str(at / "config"), str(JOB_USER)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with asking:
            try:
                # The request is taken, and never answered.
                assert select.select([device], [], [], 20)[0]
                os.read(device, REQUEST_BYTES)
                told, _ = asking.communicate(timeout=20)
            finally:
                asking.kill()
    finally:
        unmount(at, lazily=True)
        os.close(device)
    assert told == "the job's AWS files could not be read in 0 s\n"


def call_of(host: ServiceHost, pid: int) -> int:
    """Return the call that has started a process, of all that the service does meanwhile."""
    children = host.calls()
    while pid not in children:
        pid = psutil.Process(pid).ppid()
    return pid


def wait_for_end(*pids: int) -> None:
    until = time.monotonic() + 40
    for pid in pids:
        while is_running(pid):
            assert time.monotonic() < until, Path(f"/proc/{pid}/status").read_text()
            time.sleep(0.02)


def is_running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_without_root_a_planted_file_is_refused(user_host: ServiceHost) -> None:
    environment = queue_files(user_host, "planted", owner=JOB_USER)

    done = user_host.ask(user_host.session("planted-1"), "keys", environment=environment)

    assert done.returncode == NotAllowedError.exit_code, done.stdout
    assert ran_as(user_host, "planted") is None


def test_without_root_the_agents_files_are_taken(user_host: ServiceHost) -> None:
    environment = queue_files(user_host, "agents", owner=SERVICE_USER)

    done = user_host.ask(user_host.session("agents-1"), "keys", environment=environment)

    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("AKIDPROCESS ")
    assert ran_as(user_host, "agents") == SERVICE_USER


@pytest.mark.parametrize(
    ("group", "mode"), [(JOB_GROUP, 0o660), (OTHER_JOB_GROUP, 0o640), (JOB_GROUP, 0o600)]
)
def test_without_root_files_of_others_or_open_ones_are_refused(
    user_host: ServiceHost, group: int, mode: int
) -> None:
    """Another queue's profile is for another queue's job user, though the agent may read both."""
    name = f"refused-{group}-{mode}"
    environment = queue_files(user_host, name, owner=SERVICE_USER, group=group, mode=mode)

    done = user_host.ask(user_host.session(name), "keys", environment=environment)

    assert done.returncode == NotAllowedError.exit_code, done.stdout
    assert ran_as(user_host, name) is None


def test_without_root_a_link_to_a_file_of_others_is_refused(user_host: ServiceHost) -> None:
    environment = queue_files(user_host, "other-queue", owner=SERVICE_USER, group=OTHER_JOB_GROUP)
    session_dir = user_host.session("linked-1")
    link = session_dir / "config"
    link.symlink_to(environment["AWS_CONFIG_FILE"])
    environment["AWS_CONFIG_FILE"] = str(link)

    done = user_host.ask(session_dir, "keys", environment=environment)

    assert done.returncode == NotAllowedError.exit_code, done.stdout
    assert ran_as(user_host, "other-queue") is None


@pytest.mark.parametrize("of", ["files", "directory"])
def test_without_root_files_of_the_agents_that_all_may_read_are_refused(
    user_host: ServiceHost, of: str
) -> None:
    """Such are its own, for instance ~/.aws/config, whose programs would run as the agent.

    Seen to run one.
    """
    name = f"its-own-{of}"
    environment = queue_files(user_host, name, owner=SERVICE_USER, group=SERVICE_USER, mode=0o644)
    directory = user_host.home / name
    directory.chmod(0o755)
    if of == "directory":
        for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            os.chown(environment[variable], SERVICE_USER, JOB_GROUP)
            Path(environment[variable]).chmod(0o640)

    done = user_host.ask(user_host.session(name), "keys", environment=environment)

    assert done.returncode == NotAllowedError.exit_code, done.stdout
    assert ran_as(user_host, name) is None
