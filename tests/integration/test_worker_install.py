"""`propmaster worker install`, `status` and `uninstall`, on the real agent's package."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent_plugin import __version__
from agent_plugin.content.errors import AgentUnsupportedError, LocalReadError, LocalWriteError
from agent_plugin.workers.deadline.agent_environment import (
    KNOWN_SHA256,
    SCRIPTS,
    AgentEnvironment,
    find_agent,
    sha256_of,
)
from agent_plugin.workers.deadline.agent_status import examine
from agent_plugin.workers.deadline.installer import install, look_at_scripts, uninstall
from agent_plugin.workers.wire import Reply, encode
from tests.servers.agent_copies import AgentCopy, PathFacts, tree_of
from tests.servers.command import Command
from tests.servers.deadline_peers import AGENT_PYTHON
from tests.servers.lock_keeper import kept_locked
from tests.servers.other_user import being_nobody

pytestmark = pytest.mark.peers

PYTHON = Path(sys.executable)
CALL_SECONDS = 100.0
# What audit hooks are told of before it happens: all that changes a file or a directory.
CHANGES = {
    *("os.link", "os.rename", "os.remove", "os.utime", "os.chmod", "os.chown", "os.rmdir"),
    *("os.mkdir", "os.truncate", "shutil.copyfile"),
}
# A package that stands for propmaster, with what a drop-in is started with.
TELLS = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ["PROPMASTER_ORIGINAL"],
                  os.environ["PROPMASTER_ORIGINAL_PYTHON"], os.getcwd(), __name__]))
sys.exit(7)
"""


@pytest.fixture
def agent(tmp_path: Path) -> AgentCopy:
    return AgentCopy(tmp_path / "agent")


@pytest.fixture
def run(tmp_path: Path) -> Command:
    return Command(tmp_path / "host")


def states(run: Command, *arguments: str | Path) -> dict[str, str]:
    done = run("worker", *arguments, "--json")
    assert done.code == 0, done.stderr
    return {script["name"]: script["state"] for script in done.json["scripts"]}


def no_link(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def checks(status: Any) -> dict[str, bool]:
    return {check["name"]: check["ok"] for check in status["checks"]}


# --------------------------------------------------------------------------- there and back again


def test_uninstall_leaves_the_agent_as_it_was_to_the_byte_and_the_time(
    agent: AgentCopy, run: Command
) -> None:
    before = tree_of(agent.site)

    installed = states(run, "install", "--agent-python", agent.python)
    status = run("worker", "status", "--same-user", "--json").json
    between = tree_of(agent.site)
    given_back = states(run, "uninstall")

    assert installed == dict.fromkeys(SCRIPTS, "ours")
    assert status["agentVersion"] == agent.version
    assert {name: checks(status)[name] for name in ("agent", *SCRIPTS)} == dict.fromkeys(
        ("agent", *SCRIPTS), True
    )
    assert given_back == dict.fromkeys(SCRIPTS, "original")
    assert tree_of(agent.site) == before
    changed = {path for path, facts in before.items() if between[path] != facts}
    directory = "deadline_worker_agent/sessions/actions/scripts"
    assert changed == {directory, *(f"{directory}/{name}" for name in SCRIPTS)}
    for name in SCRIPTS:
        kept = between[f"{directory}/{name}.propmaster-original"]
        assert kept == before[f"{directory}/{name}"]


def test_installing_and_uninstalling_twice_does_no_harm(agent: AgentCopy) -> None:
    found = find_agent(agent.python)
    before = tree_of(agent.site)

    install(found, PYTHON, "1")
    once = tree_of(agent.site)
    install(found, PYTHON, "1")
    assert tree_of(agent.site) == once

    install(found, PYTHON, "2")
    assert [script.reason for script in look_at_scripts(found)] == ["", ""]
    uninstall(found)
    uninstall(found)
    assert tree_of(agent.site) == before


def test_an_installation_that_was_stopped_is_named_and_not_waited_for_for_ever(
    agent: AgentCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to wait for ever."""
    monkeypatch.setattr("agent_plugin.workers.deadline.installer._LOCK_SECONDS", 0.1)
    found = find_agent(agent.python)
    before = tree_of(agent.site)
    with kept_locked(agent.scripts) as pid:
        with pytest.raises(LocalWriteError, match=rf": process {pid} \(python.*, stopped\)$"):
            install(found, PYTHON, "1")
        with pytest.raises(LocalWriteError, match="another process has kept"):
            uninstall(found)
    assert tree_of(agent.site) == before


def test_the_hashes_that_are_known_are_those_of_the_real_package(agent: AgentCopy) -> None:
    found = find_agent(agent.python)

    assert found.supported
    for name in SCRIPTS:
        assert found.knows(name, sha256_of((agent.scripts / name).read_bytes()))


def test_a_kept_script_is_a_copy_where_there_are_no_links(
    agent: AgentCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have none, and the kernel may keep links to other users' files back."""
    found = find_agent(agent.python)
    before = tree_of(agent.site)
    monkeypatch.setattr(os, "link", no_link)
    install(found, PYTHON, "1")

    between = tree_of(agent.scripts)
    for name in SCRIPTS:
        assert (
            between[f"{name}.propmaster-original"]
            == before[f"deadline_worker_agent/sessions/actions/scripts/{name}"]
        )
    uninstall(found)
    assert tree_of(agent.site) == before


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("version", [pytest.param("0.28.21", marks=pytest.mark.slow), "0.34.0"])
def test_a_version_that_propmaster_was_not_made_for_is_refused_by_name(
    agent: AgentCopy, version: str
) -> None:
    agent.say_version(version)
    before = tree_of(agent.site)

    found = find_agent(agent.python)
    with pytest.raises(AgentUnsupportedError) as refused:
        install(found, PYTHON, "1", force=True)

    assert f"deadline-cloud-worker-agent {version}" in refused.value.message
    assert "0.29.0 to 0.33.6" in refused.value.hint
    assert tree_of(agent.site) == before
    assert not examine(found, PYTHON, service=None).ok


def test_a_script_that_is_not_the_packages_is_refused_and_with_force_kept(
    agent: AgentCopy, run: Command
) -> None:
    mine = agent.scripts / SCRIPTS[1]
    mine.write_text(mine.read_text() + "\n# a local patch\n")
    before = tree_of(agent.site)

    refused = run("worker", "install", "--agent-python", agent.python)
    assert refused.code == AgentUnsupportedError.exit_code
    assert str(mine) in refused.stderr
    assert tree_of(agent.site) == before

    forced = states(run, "install", "--agent-python", agent.python, "--force")
    assert forced == dict.fromkeys(SCRIPTS, "ours")
    uninstall(find_agent(agent.python))
    assert tree_of(agent.site) == before


def test_a_link_in_a_scripts_place_is_never_replaced(agent: AgentCopy, tmp_path: Path) -> None:
    script = agent.scripts / SCRIPTS[0]
    elsewhere = tmp_path / "elsewhere.py"
    script.rename(elsewhere)
    script.symlink_to(elsewhere)
    before = tree_of(agent.site)

    with pytest.raises(AgentUnsupportedError, match="no regular file"):
        install(find_agent(agent.python), PYTHON, "1", force=True)
    assert tree_of(agent.site) == before


def test_an_environment_without_an_agent_is_refused(tmp_path: Path, run: Command) -> None:
    refused = run("worker", "install", "--agent-python", sys.executable)
    assert refused.code == AgentUnsupportedError.exit_code
    assert "there is no deadline-cloud-worker-agent" in refused.stderr

    with pytest.raises(LocalReadError, match=f"{tmp_path}/python"):
        find_agent(tmp_path / "python")
    with pytest.raises(AgentUnsupportedError, match="could not tell"):
        find_agent(Path("/bin/true"))
    assert run("worker", "uninstall").code == 2, "nobody said where"


def test_who_has_no_right_is_told_which_file_and_as_whom() -> None:
    with tempfile.TemporaryDirectory() as name:
        # pytest's own directories are closed to others.
        Path(name).chmod(0o755)
        agent = AgentCopy(Path(name) / "agent")
        found = find_agent(agent.python)
        before = tree_of(agent.site)

        with being_nobody(), pytest.raises(LocalWriteError) as refused:
            install(found, PYTHON, "1")

        assert str(agent.scripts) in refused.value.message
        assert "uid 65534" in refused.value.message
        assert "as root" in refused.value.hint
        assert tree_of(agent.site) == before
        install(found, PYTHON, "1")
        with being_nobody(), pytest.raises(LocalWriteError, match="uid 65534"):
            uninstall(found)
        assert [script.state for script in look_at_scripts(found)] == ["ours", "ours"]


# ---------------------------------------------------------------------------------- interruption


class Step:
    """One change to the disk, at which the run is killed."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.event = ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event not in CHANGES and not writes:
            return
        if self.left == 0:
            os.write(2, event.encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def killed_at(number: int, change: Callable[[], object]) -> str | None:
    """Run a change in a process that dies before its `number`th step; return which step it was.

    None when it had fewer steps, and so was not killed.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(tell, 2)
        sys.addaudithook(Step(number))
        change()
        os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        event = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), event
    return event if status else None


def bare(tmp_path: Path, agent: AgentCopy, number: int) -> AgentEnvironment:
    """Return an agent of which there are only the scripts."""
    scripts = tmp_path / f"bare-{number}"
    shutil.copytree(agent.scripts, scripts)
    return AgentEnvironment(agent.python, agent.version, scripts)


def but_for_its_own_time(tree: dict[str, PathFacts]) -> dict[str, PathFacts]:
    return {path: facts for path, facts in tree.items() if path != "."}


@pytest.mark.parametrize(
    ("first", "links"),
    [
        pytest.param("install", True, id="install"),
        pytest.param("install", False, id="install-without-links", marks=pytest.mark.slow),
        pytest.param("uninstall", True, id="uninstall"),
    ],
)
def test_a_run_that_is_killed_at_any_step_leaves_a_whole_agent_and_the_next_mends_it(
    tmp_path: Path,
    agent: AgentCopy,
    first: str,
    links: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    steps = []
    for number in range(100):
        found = bare(tmp_path, agent, number)
        before = tree_of(found.scripts)
        if first == "uninstall":
            install(found, PYTHON, "1")
        change = {
            "install": lambda found=found: install(found, PYTHON, "1"),
            "uninstall": lambda found=found: uninstall(found),
        }[first]
        step = killed_at(number, change)
        if step is None:
            break
        steps.append(step)

        for name in SCRIPTS:
            stands = (found.scripts / name).read_bytes()
            own = before[name].content == sha256_of(stands)
            assert own or stands.startswith(b"# Put here by propmaster"), step
            assert (found.scripts / name).stat().st_mode == before[name].mode
        if number % 2:
            install(found, PYTHON, "1")
            assert [script.state for script in look_at_scripts(found)] == ["ours", "ours"]
            assert [script.reason for script in look_at_scripts(found)] == ["", ""]
        uninstall(found)
        after = tree_of(found.scripts)
        assert but_for_its_own_time(after) == but_for_its_own_time(before), step
        # Before the very last step, the note of the directory's time is gone already.
        if step != "os.utime" or first == "install":
            assert after == before, step
        shutil.rmtree(found.scripts)
    assert len(steps) > 5, steps


# -------------------------------------------------------------------------------------- updates


def pip_puts(path: Path, data: bytes) -> None:
    """Do what pip does: remove what stands there, and write a new file."""
    path.unlink()
    path.write_bytes(data)


def test_an_update_of_the_agent_is_told_taken_up_and_never_undone(agent: AgentCopy) -> None:
    names = {name: (agent.scripts / name).read_bytes() for name in SCRIPTS}
    found = find_agent(agent.python)
    install(found, PYTHON, "1")
    # As if the version before had had other scripts.
    for name in SCRIPTS:
        kept = agent.scripts / f"{name}.propmaster-original"
        pip_puts(kept, b"of the version before")
        pip_puts(agent.scripts / name, names[name])
    updated = tree_of(agent.scripts)

    status = examine(found, PYTHON, service=None)
    assert not status.ok
    assert [script.state for script in status.scripts] == ["original"] * 2
    assert "update of the agent" in status.scripts[0].reason

    install(found, PYTHON, "1")
    uninstall(found)
    once = tree_of(agent.scripts)
    ours = {path for path in updated if "propmaster" in path}
    assert once == {path: facts for path, facts in updated.items() if path not in ours}

    # And without the installation in between.
    for name in SCRIPTS:
        (agent.scripts / f"{name}.propmaster-original").write_bytes(b"of the version before")
    uninstall(found)
    assert but_for_its_own_time(tree_of(agent.scripts)) == but_for_its_own_time(once)


def test_an_original_that_is_lost_is_told_and_nothing_is_put_in_its_place(
    agent: AgentCopy,
) -> None:
    found = find_agent(agent.python)
    install(found, PYTHON, "1")
    kept = agent.scripts / f"{SCRIPTS[0]}.propmaster-original"
    kept.write_bytes(b"somebody else's")

    assert not examine(found, PYTHON, service=None).ok
    changes: list[Callable[[], object]] = [
        lambda: install(found, PYTHON, "1", force=True),
        lambda: uninstall(found),
    ]
    for change in changes:
        with pytest.raises(AgentUnsupportedError) as refused:
            change()
        assert "pip install --force-reinstall" in refused.value.hint
        assert kept.read_bytes() == b"somebody else's"


def test_a_script_that_was_removed_is_given_back(agent: AgentCopy) -> None:
    found = find_agent(agent.python)
    before = tree_of(agent.site)
    install(found, PYTHON, "1")
    (agent.scripts / SCRIPTS[0]).unlink()

    install(found, PYTHON, "1")
    assert [script.state for script in look_at_scripts(found)] == ["ours", "ours"]
    (agent.scripts / SCRIPTS[0]).unlink()
    uninstall(found)
    assert tree_of(agent.site) == before


def test_what_pip_leaves_of_an_agent_that_it_removes_is_cleared_away(agent: AgentCopy) -> None:
    install(find_agent(agent.python), PYTHON, "1")
    record = next(agent.site.glob("*.dist-info")) / "RECORD"
    for line in record.read_text().splitlines():
        (agent.site / line.split(",")[0]).unlink(missing_ok=True)
    for path in sorted(agent.site.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    assert [path.name for path in agent.site.iterdir()] == ["deadline_worker_agent"]

    uninstall(find_agent(agent.python))

    assert list(agent.site.iterdir()) == []


# --------------------------------------------------------------------------------- the stub itself


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script of a copy with the Python of the real agent, which has all that it needs."""

    def asking(
        script: Path, *arguments: str, python: Path = AGENT_PYTHON, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, script, *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            timeout=CALL_SECONDS,
            check=False,
        )

    return asking


def test_the_stub_becomes_propmaster_with_the_agents_arguments(
    agent: AgentCopy,
    tmp_path: Path,
    ask: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    package = tmp_path / "elsewhere" / "agent_plugin"
    for name in ("", "workers", "workers/deadline"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    for name in SCRIPTS:
        (package / "workers/deadline" / name.replace("attachment", "start")).write_text(
            f"if __name__ == '__main__':\n {TELLS}".replace("\n", "\n ")
        )
    install(find_agent(agent.python), PYTHON, "1")
    hard = ["-s3", "s3://bucket/prefix", "-wp", "a file, 'quoted' \"twice\"", "", "--\n$HOME"]

    for name in SCRIPTS:
        done = ask(agent.scripts / name, *hard, PYTHONPATH=str(package.parent))

        assert done.returncode == 7, done.stderr
        assert json.loads(done.stdout) == [
            hard,
            str(agent.scripts / f"{name}.propmaster-original"),
            str(AGENT_PYTHON),
            str(tmp_path),
            "__main__",
        ]
        assert done.stderr == ""


@pytest.mark.parametrize("gone", [pytest.param("python", marks=pytest.mark.slow), "package"])
def test_the_agents_own_script_runs_when_propmaster_is_gone(
    agent: AgentCopy,
    tmp_path: Path,
    ask: Callable[..., subprocess.CompletedProcess[str]],
    gone: str,
) -> None:
    python = tmp_path / "no/bin/python"
    if gone == "package":
        # A Python that has no propmaster.
        python = agent.python
    install(find_agent(agent.python), python, "1")

    done = ask(agent.scripts / SCRIPTS[0], "--help")

    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    assert first.startswith("openjd_status: propmaster can not start (")
    assert first.endswith("the agent's own script runs")
    assert "--worker-properties" in rest


def test_bytecode_of_the_agents_own_script_is_not_taken_for_ours(agent: AgentCopy) -> None:
    code = (
        "import sys; from importlib.machinery import SourceFileLoader as L;"
        "print('INSTALLED' in L('x', sys.argv[1]).get_code('x').co_names)"
    )

    def ours() -> list[str]:
        argv = [str(agent.python), "-I", "-c", code]
        return [
            subprocess.check_output([*argv, str(agent.scripts / name)], text=True).strip()
            for name in SCRIPTS
        ]

    found = find_agent(agent.python)
    assert list((agent.scripts / "__pycache__").glob("attachment_*.pyc"))
    assert ours() == ["False", "False"]
    install(found, PYTHON, "1")
    assert ours() == ["True", "True"]
    uninstall(found)
    assert ours() == ["False", "False"]


# --------------------------------------------------------------------------------------- status


def test_status_tells_what_is_not_right_and_exits_with_1(
    agent: AgentCopy, run: Command, tmp_path: Path
) -> None:
    found = find_agent(agent.python)
    words = ("worker", "status", "--agent-python", agent.python, "--same-user")
    absent = run(*words, "--json")
    assert absent.code == 1
    assert checks(absent.json)[SCRIPTS[0]] is False

    install(found, tmp_path / "no" / "python", "1")
    status = examine(found, PYTHON, service=tmp_path / "socket", vfs_prefix=tmp_path)

    assert not status.ok
    wrong = {check.name: check.reason for check in status.checks if not check.ok}
    assert set(wrong) == {"propmaster", "job users", "service", "vfs"}
    assert f"{tmp_path}/no/python" in wrong["propmaster"]
    assert f"{tmp_path}/socket" in wrong["service"]

    install(found, PYTHON, "1")
    with socket.socket(socket.AF_UNIX) as serving:
        serving.bind(str(tmp_path / "socket"))
        serving.listen()
        reasons = {}
        with ThreadPoolExecutor() as pool:
            for version in (__version__, "0.0.1"):
                asked = pool.submit(examine, found, PYTHON, service=tmp_path / "socket")
                connection, _ = serving.accept()
                with connection:
                    connection.sendall(encode(Reply(begun=version)))
                reasons[version] = next(
                    check for check in asked.result().checks if check.name == "service"
                )
    assert reasons[__version__].ok
    # As after an update that was not followed by a restart.
    assert not reasons["0.0.1"].ok
    assert f"propmaster 0.0.1 answers at {tmp_path}/socket" in reasons["0.0.1"].reason


def test_the_tree_for_deadline_vfs_comes_and_goes_with_the_scripts(
    agent: AgentCopy, run: Command, tmp_path: Path
) -> None:
    prefix = tmp_path / "vfs"
    words = ("worker", "install", "--agent-python", agent.python)
    assert run(*words, "--vfs-prefix", prefix).code == 0
    # To mend is not to forget.
    (prefix / "bin/deadline_vfs").unlink()
    assert run(*words, "--json").json["vfsPrefix"] == str(prefix)
    status = run("worker", "status", "--same-user", "--json").json
    assert checks(status) == dict.fromkeys(("agent", *SCRIPTS, "propmaster", "vfs"), True)
    assert f"DEADLINE_VFS_PATH={prefix}" in status["checks"][-1]["reason"]

    (prefix / "bin/deadline_vfs").unlink()
    broken = examine(find_agent(agent.python), PYTHON, service=None, vfs_prefix=prefix)
    assert [check.name for check in broken.checks if not check.ok] == ["vfs"]
    assert run("worker", "uninstall").code == 0
    assert not prefix.exists()


def test_every_version_that_is_named_as_supported_has_its_hashes() -> None:
    assert min(KNOWN_SHA256) == "0.29.0"
    assert max(KNOWN_SHA256) == "0.33.6"
    assert all(set(hashes) == set(SCRIPTS) for hashes in KNOWN_SHA256.values())
