"""What the agent starts: in this process, by the service, or as if propmaster were not there."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.errors import (
    LocalWriteError,
    ServiceUnavailableError,
    SettingsInvalidError,
)
from agent_plugin.content.store import Cancellation
from agent_plugin.transfer.ledger import lease_owner
from agent_plugin.workers import front
from agent_plugin.workers.call import VFS_UNMOUNT, Call, JobUser
from agent_plugin.workers.deadline.vfs import run_unmount
from agent_plugin.workers.listener import listen, notify_systemd
from tests.servers.hooks import CALL_SECONDS, REPOSITORY, Host
from tests.servers.service_host import JOB_USER, ServiceHost, service_host

_RUN_TEST_CALL = """
import sys
from agent_plugin.workers import front
from tests.servers.worker_calls import KINDS
front.DROP_INS = {**KINDS, "half": "agent_plugin.workers.no_such_module:run"}
sys.exit(front.main(sys.argv[1], sys.argv[2:]))
"""
ORIGINAL = "import os, sys; print('original', sys.argv[1:], 'PROPMASTER_X' in os.environ)\n"


def run_here(
    session_dir: Path, *words: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-c", _RUN_TEST_CALL, *words],
        cwd=session_dir,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )


def test_whose_session_it_is_runs_it_itself(tmp_path: Path) -> None:
    done = run_here(tmp_path, "who", "a", AWS_PROFILE="p", SOMETHING="else")

    assert done.returncode == 7, done.stderr
    told = json.loads(done.stdout)
    assert told["job_user"] is None
    assert told["arguments"] == ["a"]
    assert told["environment"] == {"AWS_PROFILE": "p"}
    assert done.stderr == ""


def test_a_failure_here_is_told_in_the_same_words(tmp_path: Path) -> None:
    done = run_here(tmp_path, "refuse")

    assert done.returncode == 66
    assert done.stdout.splitlines()[0] == "openjd_fail: no refuse\\nopenjd_env: A=1"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("utf-8", "\u00e9 \U0001f3ac \\udce9"), ("latin-1", "\u00e9 \\U0001f3ac \\udce9")],
)
def test_what_the_job_users_encoding_has_not_is_spelled(
    tmp_path: Path, encoding: str, printed: str
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            _RUN_TEST_CALL,
            "repeat",
            os.fsdecode(b"\xc3\xa9 \xf0\x9f\x8e\xac \xe9"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=CALL_SECONDS,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding) == f"{printed}\n"


def test_half_of_a_propmaster_runs_the_agents_own_script(tmp_path: Path) -> None:
    original = tmp_path / "original.py"
    original.write_text(ORIGINAL)
    environment = {
        "PROPMASTER_ORIGINAL": str(original),
        "PROPMASTER_ORIGINAL_PYTHON": sys.executable,
    }

    done = run_here(tmp_path, "half", "a", **environment)

    assert done.returncode == 0, done.stderr
    assert "no_such_module" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-1] == "original ['a'] False"


def test_who_only_asks_loads_no_engine() -> None:
    """Each call of the agent's costs what it loads, while a job waits."""
    code = """
import sys
import agent_plugin.workers.deadline.start_download, agent_plugin.workers.__main__
print([name for name in ("obstore", "botocore", "agent_plugin.session", "agent_plugin.transfer")
       if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout == "[]\n", done.stderr


def test_a_mount_that_is_being_made_is_taken_away_by_nobody_else(tmp_path: Path) -> None:
    host = Host(tmp_path / "host", f"file://{tmp_path}/store")
    mountpoint = tmp_path / "session" / "root"
    place = host.mounts._place(mountpoint)
    place.mkdir(parents=True)
    (place / "starter").write_text(lease_owner() or "")
    user = JobUser(JOB_USER, JOB_USER)
    call = Call(
        VFS_UNMOUNT, ("-u", str(mountpoint)), mountpoint.parent, {}, user, print, Cancellation()
    )

    assert run_unmount(call, host.settings) == 0
    assert place.exists()


def test_a_signal_cancels_what_runs_here(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _RUN_TEST_CALL, "wait"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.terminate()

    stdout, _ = process.communicate(timeout=CALL_SECONDS)
    assert process.returncode == 77
    assert "error[cancelled]" in stdout
    assert (tmp_path / "cancelled").exists()


@pytest.fixture(scope="module")
def idle_host() -> Iterator[ServiceHost]:
    """A host whose service does not run."""
    with service_host() as made:
        made.write_config()
        yield made


def test_a_job_user_without_a_service_runs_the_agents_own_script(idle_host: ServiceHost) -> None:
    original = idle_host.home / "attachment_download.py"
    original.write_text(ORIGINAL)
    environment = {
        "PROPMASTER_ORIGINAL": str(original),
        "PROPMASTER_ORIGINAL_PYTHON": idle_host.python,
        "PROPMASTER_X": "1",
    }

    done = idle_host.ask(
        idle_host.session("fallback"), "attachment-download", "-s3", "b", environment=environment
    )

    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("propmaster: no propmaster service answers at ")
    assert lines[1].startswith("openjd_status: propmaster is not running on this host")
    assert lines[2] == "original ['-s3', 'b'] False"


def test_who_finds_many_before_it_waits_for_its_turn(tmp_path: Path) -> None:
    """Seen to go on without the service at once, which had only much to do."""
    path = tmp_path / "worker.socket"
    with ExitStack() as opened, ThreadPoolExecutor(1) as threads:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(1)
        others = [opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(5)]
        for other in others:
            other.setblocking(False)
        assert errno.EAGAIN in [other.connect_ex(str(path)) for other in others]
        asking = threads.submit(front._connect, path)
        assert wait([asking], timeout=0.2).not_done
        opened.enter_context(listener.accept()[0])
        with asking.result(20) as connection:
            assert connection.gettimeout()


def test_without_a_script_to_fall_back_on_the_call_fails(idle_host: ServiceHost) -> None:
    done = idle_host.ask(idle_host.session("nothing"), "vfs-mount", "/mnt")

    assert done.returncode == ServiceUnavailableError.exit_code
    assert done.stdout.startswith("openjd_fail: no propmaster service answers at ")


def test_a_job_user_never_runs_a_call_itself(idle_host: ServiceHost) -> None:
    """It could make a state directory of its own, and lose what the host shares."""
    home = idle_host.home / "job-home"
    home.mkdir()
    os.chown(home, JOB_USER, JOB_USER)

    done = idle_host.ask(
        idle_host.session("itself"),
        "attachment-download",
        environment={"HOME": str(home), "PROPMASTER_STATE_DIR": str(home / "state")},
    )

    assert done.returncode == ServiceUnavailableError.exit_code
    assert list(home.iterdir()) == []


def test_what_somebody_else_has_put_in_the_services_place_is_told_nothing(
    idle_host: ServiceHost,
) -> None:
    """Credentials are sent: only root, and whose the directory is, may listen."""
    with socket.socket(socket.AF_UNIX) as impostor:
        os.seteuid(JOB_USER + 5)
        try:
            os.seteuid(0)
            impostor.bind(os.fspath(idle_host.socket))
            idle_host.socket.chmod(0o666)
            os.seteuid(JOB_USER + 5)
            impostor.listen()
        finally:
            os.seteuid(0)

        done = idle_host.ask(idle_host.session("impostor"), "attachment-download")

    idle_host.socket.unlink()
    assert done.returncode == ServiceUnavailableError.exit_code
    assert f"belongs to the user with id {JOB_USER + 5}" in done.stdout


def test_it_starts_without_home_and_says_how_it_is_used(idle_host: ServiceHost) -> None:
    """Of a process that sudo started, sudo's rules decide whether it has one."""
    become = "setpriv --reuid=65534 --regid=65534 --clear-groups -- env -u HOME PROPMASTER_CONFIG="
    argv = [*become.split(), idle_host.python, "-P", "-m", "agent_plugin.workers"]
    session_dir = idle_host.session("homeless")
    options: dict[str, Any] = {
        "cwd": session_dir,
        "env": idle_host.environment(),
        "text": True,
    }

    asked = subprocess.run([*argv, "vfs-mount"], capture_output=True, check=False, **options)
    bare = subprocess.run(argv, capture_output=True, check=False, **options)

    # 89 where a service happens to run.
    assert asked.returncode in (88, 89), asked.stdout
    assert bare.returncode == 1
    assert "attachment-download|attachment-upload|vfs-mount|vfs-unmount" in bare.stderr


# ------------------------------------------------------------------------------------- the socket


def test_a_socket_of_systemds_is_taken(tmp_path: Path) -> None:
    # As descriptor 3 of the child alone: in this process that is somebody's already.
    code = """
import os, sys
from pathlib import Path
os.dup2(int(sys.argv[1]), 3)
from agent_plugin.workers.listener import listen
os.environ["LISTEN_PID"] = str(os.getpid())
with listen(Path("/no/such/place")) as listener:
    print(listener.getsockname(), "LISTEN_FDS" in os.environ, os.get_inheritable(3))
"""
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(os.fspath(tmp_path / "s"))
        given.listen()
        done = subprocess.run(
            [sys.executable, "-c", code, str(given.fileno())],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "LISTEN_FDS": "1"},
            pass_fds=[given.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )

    assert done.stdout == f"{tmp_path / 's'} False False\n", done.stderr


def test_what_is_no_socket_that_listens_is_refused(tmp_path: Path) -> None:
    environment = {"LISTEN_FDS": "2", "LISTEN_PID": str(os.getpid())}

    with (
        pytest.raises(SettingsInvalidError, match="gave 2 sockets"),
        listen(tmp_path / "run/s", environment),
    ):
        pass


def test_systemds_variables_for_another_process_are_not_ours(tmp_path: Path) -> None:
    environment = {"LISTEN_FDS": "1", "LISTEN_PID": "1"}

    with listen(tmp_path / "run/s", environment) as listener:
        assert listener.getsockname().endswith("/s")
    assert not (tmp_path / "run/s").exists()
    assert environment == {}


def test_a_directory_where_others_could_listen_instead_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)

    with (
        pytest.raises(LocalWriteError, match="others could listen there"),
        listen(tmp_path / "open/s", {}),
    ):
        pass


def test_a_long_path_is_no_matter_for_the_service(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / "worker.socket"

    with listen(path, {}):
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o666


def test_systemd_is_told_if_it_wants_to_know(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(tmp_path / "notify"))

        notify_systemd("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(100) == b"READY=1"
    notify_systemd("READY=1", {})
