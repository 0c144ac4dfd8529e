"""Jobs of the real OpenJD runtime, staged by our environment templates."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.servers.command import Command
from tests.servers.deadline_peers import FARM_ID, QUEUE_ID, DeadlinePeers, new_job_id
from tests.servers.openjd_runtime import (
    COMMAND,
    PLAIN,
    RUN_SECONDS,
    WRAP,
    OpenJDRuntime,
    bash_step,
    session_of,
)
from tests.servers.s3_server import S3Server
from tests.servers.source_jobs import source_of, store_objects
from tests.servers.trees import write_files

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

RENDER = 'mkdir -p "$PROPMASTER_ROOT_0/renders"; cd "$PROPMASTER_ROOT_0"; '
FRAME = RENDER + "tr a-z A-Z < scene.usd > renders/{{Task.Param.Frame}}.exr"

LIST_PART = (
    'mkdir -p "$PROPMASTER_ROOT_0/renders"; '
    'ls "$PROPMASTER_SOURCE_0" > "$PROPMASTER_ROOT_0/renders/$0"'
)


class Farm:
    """A job in a directory store, and a host with the runtime to run it on."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = f"file://{tmp_path}/store"
        self.runtime = OpenJDRuntime(tmp_path / "worker")
        self.command = Command(tmp_path / "artist")
        self.job_id = new_job_id()
        self.source = tmp_path / "show"
        write_files(self.source, {"scene.usd": b"a scene"}, mtime_ns=1_700_000_000 * 10**9)
        done = self.command(
            *("submit", self.source, "--store", self.store, "--output-dir", "renders", "--json"),
            *("--farm-id", FARM_ID, "--queue-id", QUEUE_ID),
        )
        assert done.code == 0, done.stderr
        ids = {"farmId": FARM_ID, "queueId": QUEUE_ID, "jobId": self.job_id}
        self.document: dict[str, Any] = {**done.json, **ids}

    @property
    def outputs(self) -> dict[str, int]:
        """What readers find: the size of each output by its path."""
        done = self.command(
            *("outputs", "list", self.job_id, "--store", self.store, "--json"),
            *("--farm-id", FARM_ID, "--queue-id", QUEUE_ID),
        )
        assert done.code == 0, done.stderr
        return {file["path"]: file["size"] for root in done.json["roots"] for file in root["files"]}


@pytest.fixture
def farm(tmp_path: Path) -> Farm:
    return Farm(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("template", [WRAP, PLAIN])
@pytest.mark.parametrize("mode", ["copied", "virtual"])
def test_s8_tasks_take_their_parts_of_a_source(
    tmp_path: Path, s3: S3Server, s3_prefix: str, template: str, mode: str
) -> None:
    """The worked example of docs/PROTOCOL.md, in a real runtime.

    The mutation that was caught: an inner `openjd run` that stores outputs once more.
    """
    names = [f"{at:02}" for at in range(12)]
    store_objects(s3, s3_prefix, dict.fromkeys(names, 100))
    # By the names alone, since the prefix is another in each run: each part has some of them.
    by_name = {"Type": "substring", "StartIndex": 0, "EndIndex": 2}
    partition = {**by_name, "Count": 3, "IndexParameter": "Part"}
    source = source_of(s3, s3_prefix, Partition=partition, Target="plates", Mode=mode)
    job_id, store = new_job_id(), f"file://{tmp_path}/store"
    document = {
        "farmId": FARM_ID,
        "queueId": QUEUE_ID,
        "jobId": job_id,
        "store": store,
        "attachments": {
            "manifests": [
                {
                    "rootPath": "/mnt/show",
                    "rootPathFormat": "posix",
                    "outputRelativeDirectories": ["renders"],
                }
            ]
        },
        "inputSources": [source],
    }
    part = {"name": "Part", "type": "INT", "range": "0-2"}
    command = {
        "command": str(COMMAND),
        "args": [
            *("openjd", "run", "--step=Render", "--parameter=Part={{Task.Param.Part}}", "--"),
            *("sh", "-euc", LIST_PART, "{{Task.Param.Part}}"),
        ],
    }
    step = {
        "name": "Render",
        "parameterSpace": {"taskParameterDefinitions": [part]},
        "script": {"actions": {"onRun": command}},
    }
    runtime = OpenJDRuntime(tmp_path / "worker", s3.environment)

    ended = runtime.run(
        template, {"name": "Show", "steps": [step]}, "Render", PropmasterJob=json.dumps(document)
    )
    got = Command(tmp_path / "artist")(
        *("outputs", "get", job_id, "--store", store, "--json"),
        *("--farm-id", FARM_ID, "--queue-id", QUEUE_ID, "--to", tmp_path / "got"),
    )

    assert ended.succeeded, ended.log
    assert ended.log.count("output files") == (3 if template == WRAP else 4)
    assert got.code == 0, got.stderr
    listed = [(tmp_path / "got/renders" / str(number)).read_text().split() for number in range(3)]
    assert sorted(name for part in listed for name in part) == names
    assert all(listed)
    assert runtime.state_files() == []


# ------------------------------------------------------------------------------------ with hooks


def test_with_wrap_hooks_a_job_of_the_real_client_is_staged_and_its_outputs_are_the_clients(
    peers: DeadlinePeers, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    source = tmp_path / "show"
    write_files(
        source, {"scene.usd": b"a scene", "tex/wood.tx": 70_000}, mtime_ns=1_700_000_000 * 10**9
    )
    submission = peers.submit(
        source, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["renders"]
    )
    job_id = new_job_id()
    runtime = OpenJDRuntime(tmp_path / "worker", s3.environment)
    job = {
        "name": "Show",
        "steps": [bash_step("Render", FRAME + "; cp tex/wood.tx renders", frames="1-2")],
    }

    ended = runtime.run(WRAP, job, "Render", PropmasterJob=json.dumps(submission.of_job(job_id)))
    downloaded = peers.download(
        submission, job_id, to={str(source): tmp_path / "client"}, scan_keys=True
    )
    got = Command(tmp_path / "artist", s3.environment)(
        *("outputs", "get", job_id, "--store", f"s3://{s3.bucket}/{s3_prefix}"),
        *("--farm-id", FARM_ID, "--queue-id", QUEUE_ID, "--to", tmp_path / "ours"),
    )

    assert ended.succeeded, ended.log
    assert ended.codes == [0, 0, 0, 0]
    assert "openjd_progress: 100" in ended.log
    assert downloaded.paths == {str(source): ["renders/1.exr", "renders/2.exr", "renders/wood.tx"]}
    # The second task left wood.tx as it was.
    assert len(downloaded.session_actions) == 2
    assert got.code == 0, got.stderr
    for directory in ("client", "ours"):
        assert (tmp_path / directory / "renders/2.exr").read_text() == "A SCENE"
        assert (tmp_path / directory / "renders/wood.tx").stat().st_size == 70_000
    assert runtime.state_files() == []


def test_with_wrap_hooks_a_task_that_fails_keeps_its_exit_code_and_stores_nothing(
    farm: Farm,
) -> None:
    job = {
        "name": "Show",
        "steps": [bash_step("Render", f"{RENDER} echo bad > renders/a; exit 37")],
    }

    ended = farm.runtime.run(WRAP, job, "Render", PropmasterJob=json.dumps(farm.document))

    assert not ended.succeeded
    assert ended.codes == [0, 37, 0]
    assert farm.outputs == {}
    assert farm.runtime.state_files() == []


@pytest.mark.slow
def test_with_wrap_hooks_outputs_of_failed_tasks_are_stored_where_the_settings_say_so(
    farm: Farm,
) -> None:
    config = farm.runtime.home / "config.toml"
    config.write_text("[outputs]\nupload_failed = true\n")
    config.chmod(0o600)
    farm.runtime.environment["PROPMASTER_CONFIG"] = str(config)
    job = {
        "name": "Show",
        "steps": [bash_step("Render", f"{RENDER} echo bad > renders/a; exit 37")],
    }

    ended = farm.runtime.run(WRAP, job, "Render", PropmasterJob=json.dumps(farm.document))

    assert ended.codes == [0, 37, 0]
    assert farm.outputs == {"renders/a": 4}


@pytest.mark.slow
def test_with_wrap_hooks_a_step_has_what_the_steps_before_it_have_left(farm: Farm) -> None:
    farm.document["stepDependencies"] = {"Comp": ["Render"]}
    job = {
        "name": "Show",
        "steps": [
            bash_step("Render", FRAME, frames="1-2"),
            bash_step(
                "Comp",
                'cd "$PROPMASTER_ROOT_0"; cat renders/1.exr renders/2.exr > renders/comp.exr',
                depends_on=["Render"],
            ),
        ],
    }
    document = json.dumps(farm.document)

    assert farm.runtime.run(WRAP, job, "Render", PropmasterJob=document).succeeded
    ended = farm.runtime.run(WRAP, job, "Comp", PropmasterJob=document)

    assert ended.succeeded, ended.log
    assert "openjd_status: 2 files of other steps in place" in ended.log
    assert farm.outputs == {"renders/1.exr": 7, "renders/2.exr": 7, "renders/comp.exr": 14}


@pytest.mark.slow
def test_with_wrap_hooks_other_environments_do_what_they_do_without_them(
    farm: Farm, tmp_path: Path
) -> None:
    inner = tmp_path / "inner.json"
    actions = {
        name: {"command": "bash", "args": ["-c", f"echo {name} $INNER $0 'a  b'; {more}", "x y"]}
        for name, more in (("onEnter", "echo openjd_env: INNER=set"), ("onExit", "true"))
    }
    environment = {"name": "Inner", "script": {"actions": actions}}
    inner.write_text(
        json.dumps({"specificationVersion": "environment-2023-09", "environment": environment})
    )
    job = {"name": "Show", "steps": [bash_step("Render", "echo INNER is $INNER")]}

    ended = farm.runtime.run(
        WRAP,
        job,
        "Render",
        environments=[inner],
        PropmasterJob=json.dumps(farm.document),
    )

    assert ended.succeeded, ended.log
    assert "onEnter x y a  b" in ended.log
    assert "INNER is set" in ended.log
    assert "onExit set x y a  b" in ended.log
    assert ended.codes == [0] * 5


@pytest.mark.slow
@pytest.mark.parametrize("template", [WRAP, PLAIN])
def test_libraries_and_the_python_of_other_environments_are_their_tasks_alone(
    farm: Farm, tmp_path: Path, template: str
) -> None:
    """As those of render applications are; seen to keep propmaster from starting."""
    theirs = tmp_path / "of-the-application"
    theirs.mkdir()
    for name in ("sqlite3.so.0", "z.so.1", "expat.so.1", "crypto.so.3", "ssl.so.3", "ffi.so.8"):
        (theirs / f"lib{name}").write_text("for another program\n")
    told = "; ".join(
        f"echo openjd_env: {name}={theirs}" for name in ("LD_LIBRARY_PATH", "PYTHONHOME")
    )
    inner = tmp_path / "inner.json"
    enter = {"onEnter": {"command": "bash", "args": ["-c", told]}}
    inner.write_text(
        json.dumps(
            {
                "specificationVersion": "environment-2023-09",
                "environment": {"name": "Inner", "script": {"actions": enter}},
            }
        )
    )
    render = RENDER + "echo 1 > renders/1.exr; echo has $LD_LIBRARY_PATH $PYTHONHOME"
    job = {"name": "Show", "steps": [bash_step("Render", render)]}

    ended = farm.runtime.run(
        template, job, "Render", environments=[inner], PropmasterJob=json.dumps(farm.document)
    )

    assert ended.succeeded, ended.log
    assert f"has {theirs} {theirs}" in ended.log
    assert farm.outputs == {"renders/1.exr": 2}


@pytest.mark.slow
def test_with_wrap_hooks_the_tasks_time_limit_is_kept_and_its_processes_are_gone(
    farm: Farm,
) -> None:
    script = f"{RENDER} echo bad > renders/a; (sleep 98765; true) & wait"
    job = {"name": "Show", "steps": [bash_step("Render", script, timeout=3)]}

    ended = farm.runtime.run(WRAP, job, "Render", PropmasterJob=json.dumps(farm.document))

    assert ended.codes == [0, 124, 0]
    assert "openjd_fail: the task's command took longer than 3 s" in ended.log
    assert farm.outputs == {}
    assert not _processes("sleep\x0098765")


def _processes(command_line: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if command_line in path.read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("template", [WRAP, PLAIN])
def test_a_job_without_a_document_runs_as_it_would_without_us(farm: Farm, template: str) -> None:
    job = {"name": "Show", "steps": [bash_step("Render", "echo rendered; exit 3")]}

    ended = farm.runtime.run(template, job, "Render")

    assert "the job has no propmaster document" in ended.log
    assert "rendered" in ended.log
    assert ended.codes == [0, 3, 0]
    assert not (farm.runtime.home / "cache").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_with_wrap_hooks_inputs_may_be_mounted(farm: Farm) -> None:
    farm.document["attachments"]["fileSystem"] = "VIRTUAL"
    script = f'{FRAME}; grep -c " $PROPMASTER_ROOT_0 " /proc/self/mountinfo'
    job = {"name": "Show", "steps": [bash_step("Render", script, frames="1")]}

    ended = farm.runtime.run(WRAP, job, "Render", PropmasterJob=json.dumps(farm.document))

    assert ended.succeeded, ended.log
    assert farm.outputs == {"renders/1.exr": 7}
    assert str(farm.runtime.home) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.slow
def test_the_runtimes_path_mapping_rules_lead_to_the_root_of_a_location(
    farm: Farm, tmp_path: Path
) -> None:
    [manifest] = farm.document["attachments"]["manifests"]
    manifest["fileSystemLocationName"] = "Projects"
    here = tmp_path / "projects"
    rules = tmp_path / "rules.json"
    rule = {
        "source_path_format": "POSIX",
        "source_path": manifest["rootPath"],
        "destination_path": str(here),
    }
    rules.write_text(json.dumps({"version": "pathmapping-1.0", "path_mapping_rules": [rule]}))
    job = {"name": "Show", "steps": [bash_step("Render", FRAME, frames="1")]}

    ended = farm.runtime.run(
        WRAP, job, "Render", rules=rules, PropmasterJob=json.dumps(farm.document)
    )

    assert ended.succeeded, ended.log
    assert (here / "renders/1.exr").read_text() == "A SCENE"
    assert farm.outputs == {"renders/1.exr": 7}


# --------------------------------------------------------------------------------- without hooks


def test_without_wrap_hooks_outputs_are_stored_when_the_session_ends(
    farm: Farm, tmp_path: Path
) -> None:
    file = tmp_path / "document.json"
    file.write_text(json.dumps(farm.document))
    job = {"name": "Show", "steps": [bash_step("Render", FRAME, frames="1-2")]}

    ended = farm.runtime.run(PLAIN, job, "Render", PropmasterJobFile=str(file))

    assert ended.succeeded, ended.log
    assert farm.outputs == {"renders/1.exr": 7, "renders/2.exr": 7}
    assert farm.runtime.state_files() == []


@pytest.mark.slow
def test_without_wrap_hooks_a_job_template_may_have_each_task_stored(farm: Farm) -> None:
    run = {
        "command": "{{Param.PropmasterCommand}}",
        "args": ["openjd", "run", "--step=Render", "--", "bash", "-euc", FRAME],
    }
    step = bash_step("Render", "", frames="1-2")
    step["script"]["actions"]["onRun"] = run
    parameter = {"name": "PropmasterCommand", "type": "STRING"}
    job = {"name": "Show", "parameterDefinitions": [parameter], "steps": [step]}
    document = json.dumps(farm.document)

    ended = farm.runtime.run(PLAIN, job, "Render", PropmasterJob=document, PropmasterOutputs="TASK")
    assert ended.succeeded, ended.log
    assert farm.outputs == {"renders/1.exr": 7, "renders/2.exr": 7}
    assert ended.log.count("openjd_status: 1 output files") == 2

    # What was stored after a task is not stored once more at the end.
    again = farm.runtime.run(PLAIN, job, "Render", PropmasterJob=document)
    assert "openjd_status: 0 output files" in again.log


@pytest.mark.slow
def test_a_document_that_breaks_a_rule_fails_the_session_and_says_why(farm: Farm) -> None:
    del farm.document["jobId"]
    job = {"name": "Show", "steps": [bash_step("Render", FRAME, frames="1")]}

    ended = farm.runtime.run(PLAIN, job, "Render", PropmasterJob=json.dumps(farm.document))

    assert not ended.succeeded
    assert ended.codes == [66, 0]
    assert "openjd_fail: " in ended.log
    assert "jobId" in ended.log


@pytest.mark.slow
def test_a_cancelled_session_is_left_in_order(farm: Farm) -> None:
    script = f"{RENDER} echo bad > renders/a; echo started; sleep 87654"
    job = {"name": "Show", "steps": [bash_step("Render", script)]}
    with farm.runtime.popen(
        WRAP, job, "Render", PropmasterJob=json.dumps(farm.document)
    ) as process:
        assert process.stdout is not None
        before = []
        for line in process.stdout:
            before.append(line)
            if line.endswith("\tstarted\n"):
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=RUN_SECONDS)
    ended = session_of("".join(before) + rest, process.returncode)

    assert not ended.succeeded
    assert not _processes("sleep\x0087654")
    assert farm.outputs == {}
    assert farm.runtime.state_files() == [], ended.log
