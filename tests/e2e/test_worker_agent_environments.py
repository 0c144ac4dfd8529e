"""Our environment templates as queue environments of the real worker agent.

The job has no attachments of the service's, and so the agent no part in what propmaster stages: it
only runs the environment's actions, as the job's user, with that user's cache and state. Nor has
the client: its command fetches outputs of jobs with attachments only.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.servers.command import Command
from tests.servers.deadline_command import job_template
from tests.servers.deadline_jobs import JSON
from tests.servers.deadline_peers import AGENT_PYTHON, PeerFailedError
from tests.servers.deadline_service import FARM_ID
from tests.servers.openjd_runtime import PLAIN, TEMPLATES, WRAP, bash_step
from tests.servers.role_store import RoleStore
from tests.servers.trees import write_files
from tests.servers.worker_host import WorkerHost
from tests.servers.worker_rig import BUCKET, JOB_SECONDS, QUEUE_ID, Rig, open_rig

pytestmark = [pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(500)]

RENDER = """
mkdir -p "$PROPMASTER_ROOT_0/renders" && cd "$PROPMASTER_ROOT_0"
tr a-z A-Z < 'a scene.usd' > renders/{{Task.Param.Frame}}.exr
"""


def template_of(name: str) -> JSON:
    """Return one of our templates, as the agent's Python reads it: the service does it for it."""
    code = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"
    with (TEMPLATES / name).open() as file:
        done = subprocess.run(
            [AGENT_PYTHON, "-c", code], stdin=file, capture_output=True, check=True
        )
    template: JSON = json.loads(done.stdout)
    return template


def propmaster_for_everybody(host: WorkerHost) -> Path:
    """Return a command that job users may run."""
    command = host.directory / "propmaster-command"
    command.write_text(f'#!/bin/sh\nexec {host.own_python()} -P -m agent_plugin "$@"\n')
    command.chmod(0o755)
    return command


def submit(rig: Rig, source: Path, home: Path, steps: list[JSON], **parameters: str) -> str:
    """Submit without the client: it knows no queue environment's parameters from the stub."""
    queue = rig.service.queues[0]
    store = ("--store", f"s3://{BUCKET}/{queue.root_prefix}")
    ids = ("--farm-id", FARM_ID, "--queue-id", queue.queue_id)
    done = Command(home, rig.environment)(
        "submit", source, *store, *ids, "--output-dir", "renders", "--json"
    )
    assert done.code == 0, done.stderr
    document = {key: value for key, value in done.json.items() if key == "attachments"}
    values: dict[str, Any] = {name: {"string": value} for name, value in parameters.items()}
    values |= {
        "PropmasterJob": {"string": json.dumps(document)},
        "PropmasterJobFile": {"path": ""},
        "PropmasterCommand": {"string": str(propmaster_for_everybody(rig.host))},
    }
    template = {**job_template(*steps), "extensions": ["WRAP_ACTIONS", "EXPR"]}
    return rig.service.create(queue.queue_id, template, attachments={}, parameters=values).job_id


def get_outputs(rig: Rig, job_id: str, home: Path, *, to: Path) -> dict[str, str]:
    """Return the texts of a job's outputs by their paths, as our own command fetches them."""
    queue = rig.service.queues[0]
    done = Command(home, rig.environment)(
        *("outputs", "get", job_id, "--store", f"s3://{BUCKET}/{queue.root_prefix}"),
        *("--farm-id", FARM_ID, "--queue-id", queue.queue_id, "--to", to),
    )
    assert done.code == 0, done.stderr
    files = [path for path in to.rglob("*") if path.is_file()]
    return {str(path.relative_to(to)): path.read_text() for path in files}


@pytest.mark.parametrize("template", [WRAP, PLAIN])
def test_a_queue_environment_stages_a_job_that_has_no_attachments(
    role_store: RoleStore, worker_host: WorkerHost, tmp_path: Path, template: str
) -> None:
    source = tmp_path / "show"
    write_files(source, {"a scene.usd": b"a scene"}, mtime_ns=1_700_000_000 * 10**9)
    environment = template_of(template)
    steps = [bash_step("Render", RENDER, frames="1-2")]
    outputs = {} if template == WRAP else {"PropmasterOutputs": "SESSION"}
    with (
        open_rig(role_store, worker_host, tmp_path / "home", environments=[environment]) as rig,
        rig.agent() as agent,
    ):
        job_id = submit(rig, source, tmp_path / "artist", steps, **outputs)
        job = rig.service.wait_for(job_id, seconds=JOB_SECONDS)
        log = "".join(agent.session_log(QUEUE_ID, one.session_id) for one in job.sessions)
        assert job.status == "SUCCEEDED", log
        with pytest.raises(PeerFailedError, match="No root path format found"):
            rig.client.download_output(job_id, QUEUE_ID)
        files = get_outputs(rig, job_id, tmp_path / "artist", to=tmp_path / "outputs")
        states = worker_host.home(worker_host.job) / ".local/state/propmaster/sessions"
        left = [path.name for path in states.iterdir()]

    assert [action.kind for action in job.actions] == ["envEnter", "taskRun", "taskRun", "envExit"]
    assert files == {"renders/1.exr": "A SCENE", "renders/2.exr": "A SCENE"}
    [enter, *_] = job.actions
    assert enter.percents[-1] == 100
    assert left == []
