"""What a job waits for in the real worker agent, with its own scripts and with propmaster.

Same agent, same machine, sudo and a job user. Two times of a job whose
one task writes 200 files:

- *session start to first task*: from the moment at which the service hands out the session, to the
  agent's log line that the task's process has started;
- *task end to upload done*: from the agent's log line that the task's process has ended, to the
  `endedAt` that the agent reports for the task.

Of each, `script_s` is what the attachment script took, from the log line that it has started to
the one that it has ended, sudo, Python's start and imports included; `agent_s` is the rest, which
is the agent's own work and the same in both: credentials, manifests decoded, merged and written
for the script, its looking every 0.1 s for something to do.

`propmaster` begins with an empty cache in every round, `propmaster-cached` has run the same job
once.
"""

import functools
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from tests.benchmarks import datasets
from tests.benchmarks.farm import ROUNDS
from tests.benchmarks.rounds import Turn, interleave
from tests.servers.deadline_command import job_template, step
from tests.servers.deadline_jobs import Job
from tests.servers.deadline_peers import AGENT_PYTHON
from tests.servers.deadline_service import Queue
from tests.servers.hooks import Host
from tests.servers.host_service import PropmasterHost
from tests.servers.role_store import RoleStore
from tests.servers.worker_agent import WorkerAgent
from tests.servers.worker_host import WorkerHost, open_host
from tests.servers.worker_rig import BUCKET, QUEUE_ID, Rig, open_rig

OUTPUTS: Final = 200
_RENDER: Final = f"""
mkdir -p renders
for at in $(seq {OUTPUTS}); do head -c 4096 /dev/urandom > renders/$at.exr; done
"""
# The incumbent's download of 100,000 files took ten minutes here.
_JOB_SECONDS: Final = 3600.0
_PROCESS: Final = re.compile(
    r"^([-0-9]+ [:0-9]+,[0-9]+) \w+ (?:Command started as pid: |Process pid [0-9]+ exited with)",
    re.MULTILINE,
)
_START: Final = "session start to first task"
_UPLOAD: Final = "task end to upload done"


@dataclass(frozen=True)
class _Scene:
    """What is there for all rounds of one size."""

    rig: Rig
    attachments: Mapping[str, Any]
    inputs: Path
    agent_python: Path
    propmaster_python: Path
    service: PropmasterHost


def run(only: str = "", inputs: int = 0, rounds: int = ROUNDS) -> Iterator[dict[str, object]]:
    """Yield the results.

    Args:
        only: `deadline` or `propmaster`, to measure nothing else.
        inputs: Of the job; 0: one job of SMALL_FILES, and one of MANY_FILES.
        rounds: How often.
    """
    sizes = [inputs] if inputs else [datasets.SMALL_FILES, datasets.MANY_FILES]
    with ExitStack() as stack:
        try:
            host = stack.enter_context(open_host())
        except pytest.skip.Exception as reason:
            yield {"bench": "agent", "skipped": str(reason)}
            return
        # Everything is removed at the end, and not before.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="propmaster-bench-")))
        store = stack.enter_context(RoleStore(scratch / "s3"))
        store.create_bucket(BUCKET)
        for files in sizes:
            root = scratch / f"frames-{files}"
            datasets.make_frames(root, files)
            measured = _measure(store, host, root, only, rounds)
            yield from _lines(measured, f"{files:,} inputs")


def _measure(
    store: RoleStore, host: WorkerHost, root: Path, only: str, rounds: int
) -> Mapping[str, Sequence[float]]:
    service = PropmasterHost(host, user="root", environment=store.endpoints)
    queue = Queue(QUEUE_ID, root.name, (host.job, host.job))
    home = root.with_name(f"{root.name}-home")
    with open_rig(
        store, host, home, queues=[queue], job_environment=service.job_environment
    ) as rig:
        scene = _Scene(
            rig,
            _submit(store, root, home),
            root,
            host.agent_python(AGENT_PYTHON),
            host.agent_python(AGENT_PYTHON),
            service,
        )
        service.install_into(scene.propmaster_python)
        turns: Mapping[str, Turn] = {
            "deadline": functools.partial(_with_scripts, scene),
            "propmaster": functools.partial(_with_propmaster, scene),
        }
        wanted = [turn for peer, turn in turns.items() if only in ("", peer)]
        return interleave(wanted, rounds=rounds)


def _submit(store: RoleStore, root: Path, home: Path) -> Mapping[str, Any]:
    submitter = Host(
        home / "submitter", f"s3://{BUCKET}/{root.name}", environment=store.environment
    )
    result, _ = submitter.submit(root, output_directories=["renders"])
    attachments: Mapping[str, Any] = msgspec.to_builtins(result.attachments)
    return {**attachments, "fileSystem": "COPIED"}


def _with_scripts(scene: _Scene, _round: int) -> dict[str, float]:
    with _agent(scene, scene.agent_python) as agent:
        return _times(scene, agent, "deadline")


def _with_propmaster(scene: _Scene, _round: int) -> dict[str, float]:
    scene.service.forget()
    with scene.service, _agent(scene, scene.propmaster_python) as agent:
        return {
            **_times(scene, agent, "propmaster"),
            **_times(scene, agent, "propmaster-cached"),
        }


def _agent(scene: _Scene, python: Path) -> WorkerAgent:
    return scene.rig.agent(python, arguments=["--retain-session-dir"])


def _times(scene: _Scene, agent: WorkerAgent, peer: str) -> dict[str, float]:
    """Run the job once; return its seconds by `what/peer`."""
    created = scene.rig.service.create(
        QUEUE_ID,
        job_template(step("Render", _RENDER)),
        attachments=dict(scene.attachments),
        parameters={"DataDir": {"path": str(scene.inputs)}},
    )
    job = scene.rig.service.wait_for(created.job_id, seconds=_JOB_SECONDS)
    log = agent.session_log(QUEUE_ID, job.sessions[0].session_id)
    if job.status != "SUCCEEDED":
        raise RuntimeError(f"the job has {job.status}: {log}")
    return {f"{what}/{peer}": seconds for what, seconds in _seconds_of(job, log).items()}


def _seconds_of(job: Job, log: str) -> dict[str, float]:
    moments = [_moment(found) for found in _PROCESS.findall(log)]
    download, ended, task, task_ended, upload, upload_ended = moments[:6]
    [run] = job.task_runs
    return {
        _START: task - job.sessions[0].assigned_at,
        f"{_START} script": ended - download,
        _UPLOAD: run.ended_at - task_ended,
        f"{_UPLOAD} script": upload_ended - upload,
    }


def _moment(text: str) -> float:
    """Return what the agent's log gives in local time, to the millisecond."""
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()


def _lines(measured: Mapping[str, Sequence[float]], size: str) -> Iterator[dict[str, object]]:
    for what in (_START, _UPLOAD):
        reference = measured.get(f"{what}/deadline")
        for name, seconds in measured.items():
            action, _, peer = name.partition("/")
            if action != what:
                continue
            script = statistics.median(measured[f"{what} script/{peer}"])
            median = statistics.median(seconds)
            yield {
                "bench": f"{what}, {size}",
                "peer": peer,
                "rounds": len(seconds),
                "median_s": round(median, 3),
                "spread_s": round(max(seconds) - min(seconds), 3),
                "script_s": round(script, 3),
                "agent_s": round(median - script, 3),
                **(
                    {"ratio_to_deadline": round(statistics.median(reference) / median, 2)}
                    if reference
                    else {}
                ),
            }
