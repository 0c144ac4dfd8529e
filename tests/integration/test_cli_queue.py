"""What an operator sets for a queue holds for its sessions, above what the jobs say."""

import json
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.servers.hooks import QUEUE, Host, action
from tests.servers.sessions import Sessions


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path, Host(tmp_path / "host", f"file://{tmp_path}/store"))


def shown(host: Host) -> list[dict[str, str | None]]:
    queues: list[dict[str, str | None]] = json.loads(host.run("queue", "show", "--json").stdout)[
        "queues"
    ]
    return queues


def test_what_is_set_for_a_queue_is_shown_until_it_is_set_again(sessions: Sessions) -> None:
    host = sessions.host
    assert shown(host) == []
    for chosen in ("VIRTUAL", "AUTO", "JOB"):
        assert host.run("queue", "set", QUEUE, "--file-system", chosen).returncode == 0
        assert shown(host) == [{"queueId": QUEUE, "fileSystem": chosen}]
    [file] = (host.state_dir / "queues").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert host.run("queue", "set", QUEUE, "--reset").returncode == 0
    assert shown(host) == [{"queueId": QUEUE, "fileSystem": None}]
    assert host.run("queue", "set", QUEUE).returncode == 2
    file.write_bytes(b"{")
    assert host.run("queue", "show").returncode == 76


@pytest.mark.parametrize("named", ["nope", "../queue", QUEUE.upper()])
def test_the_form_of_a_queues_id_is_told_in_words(sessions: Sessions, named: str) -> None:
    done = sessions.host.run("queue", "show", named)

    assert done.returncode == 66
    hint = done.stderr.partition("hint: ")[2]
    assert hint.startswith("its form is `queue-` and 32 hexadecimal digits in lower case: queue-0")
    assert "[" not in hint


def test_what_is_set_wins_over_the_file_and_the_file_over_the_job(
    tmp_path: Path, sessions: Sessions
) -> None:
    host = sessions.host
    job = tmp_path / "job.json"
    job.write_bytes(msgspec.json.encode(sessions.submitted({"a": b"a"}, "renders")))
    start = ["session", "start", "--session-dir", str(sessions.session_dir), "--job", str(job)]
    auto = "1 files of 1 bytes are few"

    def reason(*more: str) -> str:
        done = host.run(*start, "--json", *more)
        assert done.returncode == 0, done.stderr
        told: str = json.loads(done.stdout)["roots"][0]["reason"]
        assert host.run("session", "end", *start[2:4]).returncode == 0
        return told

    def explained() -> tuple[str, str]:
        done = host.run("queue", "explain", QUEUE, "--json")
        assert done.returncode == 0, done.stderr
        settings = {one["key"]: one for one in json.loads(done.stdout)["settings"]}
        found = settings["inputs.file_system"]
        return found["value"], found["source"]

    assert (reason(), explained()) == ("", ("JOB", "the job"))
    general = host.config.read_text().count("\n") + 2
    host.config.write_text(f'{host.config.read_text()}[inputs]\nfile_system = "AUTO"\n')
    assert (reason(), explained()) == (auto, ("AUTO", f"{host.config}:{general}"))
    host.config.write_text(
        f'{host.config.read_text()}[queues."{QUEUE}"]\ninputs.file_system = "COPIED"\n'
    )
    assert (reason(), explained()) == ("", ("COPIED", f"{host.config}:{general + 2}"))
    assert host.run("queue", "set", QUEUE, "--file-system", "AUTO").returncode == 0
    assert (reason(), explained()) == (auto, ("AUTO", "queue set"))
    assert reason("--file-system", "COPIED") == ""
    assert host.run("queue", "set", QUEUE, "--reset").returncode == 0
    assert explained() == ("COPIED", f"{host.config}:{general + 2}")


def test_a_percentage_is_explained_as_what_it_is_of(sessions: Sessions) -> None:
    """Seen to be explained as 0."""
    done = sessions.host.run("queue", "explain", QUEUE, "--json")

    assert done.returncode == 0, done.stderr
    settings = {one["key"]: one["value"] for one in json.loads(done.stdout)["settings"]}
    assert settings["mounts.source_bytes"] == "10 %", "of the disk of a session that is not yet"
    assert settings["worker.user_memory"] == psutil.virtual_memory().total // 2


def test_what_a_queues_table_says_holds_for_its_commands(
    tmp_path: Path, sessions: Sessions
) -> None:
    host = sessions.host
    own = tmp_path / "own cache"
    host.config.write_text(
        f'{host.config.read_text()}[queues."{QUEUE}"]\npaths.cache_dir = "{own}"\n'
        "cache.min_free = 0\noutputs.upload_failed = true\n"
    )
    job = sessions.submitted({"a": b"a"}, "renders")
    (tmp_path / "job.json").write_bytes(msgspec.json.encode(job))
    session = ["--session-dir", str(sessions.session_dir)]
    done = host.run("session", "start", *session, "--job", str(tmp_path / "job.json"), "--json")
    assert done.returncode == 0, done.stderr
    [root] = json.loads(done.stdout)["roots"]
    renders = Path(root["localRoot"], "renders")
    renders.mkdir()
    (renders / "1.exr").write_bytes(b"half of it")
    run = action()
    done = host.run(
        *("session", "finish-task", *session, "--step-id", run.step_id, "--failed", "--json"),
        *("--session-action-id", run.session_action_id),
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 1
    shown = json.loads(host.run("cache", "show", "--queue", QUEUE, "--json").stdout)
    assert (shown["directory"], shown["blobs"]) == (str(own), 2)
    assert json.loads(host.run("cache", "show", "--json").stdout)["blobs"] == 0
    assert host.run("session", "end", *session).returncode == 0
