"""Play one session of the real worker agent; run by the agent's Python.

The agent's own `attachment_download.py` and `attachment_upload.py` run as it runs them: one process
each, in the session directory, with the agent's arguments and environment. What the agent does in
its own process between them (merging and writing the local manifests, reading the scripts' output)
is done here with the agent's library. Reads one JSON request on stdin, writes one answer on stdout:

    {"farmId": "…", "queueId": "…", "jobId": "…", "jobAttachmentSettings": {…}, "attachments": {…},
     "sessionDirectory": "/abs/dir", "actions": [
        {"kind": "syncJob", "download": true},
        {"kind": "syncStep", "dependsOn": ["step-…"]},
        {"kind": "task", "command": "shell text", "environment": {…}, "stepId": "step-…",
         "taskId": "task-…-0" or null, "sessionActionId": "sessionaction-…-1",
         "startedAt": 1.5}],
     "scripts": {"attachment_download.py": ["argv", …], …} or null, "scriptEnvironment": {…},
     "pathMapping": {"/root/path": "/local/directory", …}}

`scripts` are run in place of the agent's own, with `scriptEnvironment` on top of this process's.
`pathMapping` is where the queue's storage profile has roots with a file system location.

The answer's `actions` are parallel to the request's: `seconds` for each script's whole process,
`output` with what it printed, and what the agent has understood of it: `snapshots`, `progress`,
`statuses` and `failures`, and `uploads`, which it then reports as a task's outputs. In a command
$ROOT_0 is the first root's local directory, $ROOT_1 the second's.
"""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deadline_worker_agent.sessions.actions.scripts
from deadline.job_attachments._utils import _get_unique_dest_dir_name
from deadline.job_attachments.asset_sync import AssetSync
from deadline.job_attachments.models import (
    Attachments,
    JobAttachmentS3Settings,
    ManifestProperties,
    PathFormat,
)
from deadline_worker_agent.sessions.attachment_models import WorkerManifestProperties
from deadline_worker_agent.sessions.log_config import (
    ActionOutputCaptureFilter,
    ActionOutputMessageKind,
)
from deadline_worker_agent.sessions.session import Session as AgentSession
from openjd.sessions._action_filter import ActionMessageKind, ActionMonitoringFilter

SCRIPTS = Path(deadline_worker_agent.sessions.actions.scripts.__file__).parent


@dataclass
class Session:
    """One session of the agent: its directory, its roots, and the manifests it has written."""

    request: dict[str, Any]
    roots: list[WorkerManifestProperties] = field(default_factory=list)
    # What the agent's session would report as a task's outputs; it is never emptied between tasks.
    reported: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(_upload_manifest_list=[])
    )

    def __post_init__(self) -> None:
        self.directory = Path(self.request["sessionDirectory"])
        self.settings = JobAttachmentS3Settings(**self.request["jobAttachmentSettings"])
        self.manifests = [
            ManifestProperties(**{**entry, "rootPathFormat": PathFormat(entry["rootPathFormat"])})
            for entry in self.request["attachments"]["manifests"]
        ]
        self.rules = AssetSync.generate_dynamic_path_mapping(
            session_dir=self.directory, attachments=Attachments(manifests=self.manifests)
        )
        # What the agent does where its queue maps nothing.
        self.mapped: dict[str, str] = self.request.get("pathMapping") or {
            entry.rootPath: str(self.directory / _get_unique_dest_dir_name(entry.rootPath))
            for entry in self.manifests
            if entry.fileSystemLocationName
        }
        self.sync = AssetSync(farm_id=self.request["farmId"])
        self.roots = [
            WorkerManifestProperties(
                manifest_properties=entry,
                local_root_path=AssetSync.get_local_destination(entry, self.rules, self.mapped),
            )
            for entry in self.manifests
        ]

    def sync_inputs(self, action: dict[str, Any]) -> dict[str, Any]:
        """Sync the job's inputs, or the outputs of the steps that this step depends on."""
        depends_on = action.get("dependsOn")
        merged = self.sync._aggregate_asset_root_manifests(
            session_dir=self.directory,
            s3_settings=self.settings,
            queue_id=self.request["queueId"],
            job_id=self.request["jobId"],
            attachments=Attachments(manifests=self.manifests if depends_on is None else []),
            step_dependencies=depends_on or [],
            dynamic_mapping_rules=self.rules,
            storage_profiles_path_mapping_rules=self.mapped,
        )
        written = self.sync._check_and_write_local_manifests(
            merged_manifests_by_root=merged,
            manifest_write_dir=str(self.directory),
            manifest_name_suffix="job" if depends_on is None else "step",
        )
        wanted = []
        for root in self.roots:
            if manifest := written.get(root.local_root_path):
                root.local_manifest_paths.append(manifest)
                root.local_input_manifest_path = manifest
                wanted.append(root)
        if not wanted or not action.get("download", True):
            return {"seconds": 0.0, "output": "", **understood("", self.reported)}
        return self._run_script("attachment_download.py", wanted, {})

    def run_task(self, action: dict[str, Any]) -> dict[str, Any]:
        """Run the task's command, then upload what it left behind."""
        roots = {f"ROOT_{at}": root.local_root_path for at, root in enumerate(self.roots)}
        subprocess.run(
            ["/bin/bash", "-euc", action["command"]],
            cwd=self.directory,
            env={**os.environ, **roots, **action["environment"]},
            stdout=sys.stderr,
            check=True,
        )
        environment = {
            "DEADLINE_SESSIONACTION_ID": action["sessionActionId"],
            "DEADLINE_SESSIONACTION_START_TIME": str(action["startedAt"]),
            "DEADLINE_STEP_ID": action["stepId"],
        }
        if action["taskId"]:
            environment["DEADLINE_TASK_ID"] = action["taskId"]
        result = self._run_script("attachment_upload.py", self.roots, environment)
        for snapshot in result["snapshots"]:
            [root] = [one for one in self.roots if one.local_root_path == snapshot["root"]]
            root.local_manifest_paths.append(str(self.directory / snapshot["manifest"]))
        return result

    def _run_script(
        self, name: str, roots: list[WorkerManifestProperties], environment: dict[str, str]
    ) -> dict[str, Any]:
        properties = self.directory / f"roots-{time.time_ns()}.json"
        properties.write_text(json.dumps([root.to_dict() for root in roots]))
        own = [sys.executable, str(SCRIPTS / name)]
        argv = [*(self.request.get("scripts") or {name: own})[name], "-s3"]
        argv.append(self.settings.to_s3_root_uri())
        started = time.perf_counter()
        done = subprocess.run(
            [*argv, "-wp", str(properties)],
            cwd=self.directory,
            env={
                **os.environ,
                "DEADLINE_FARM_ID": self.request["farmId"],
                "DEADLINE_QUEUE_ID": self.request["queueId"],
                "DEADLINE_JOB_ID": self.request["jobId"],
                "PYTHONIOENCODING": "utf-8",
                **environment,
                **(self.request.get("scriptEnvironment") or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{name} exited with {done.returncode}:\n{done.stdout}")
        return {"seconds": seconds, "output": done.stdout, **understood(done.stdout, self.reported)}


def understood(output: str, reported: SimpleNamespace) -> dict[str, list[Any]]:
    """Return what the agent's own filters make of what a script has printed.

    Args:
        output: Of the script.
        reported: What the agent's session knows of uploads before it, and then after it.
    """
    found: dict[str, list[Any]] = {
        name: [] for name in ("snapshots", "progress", "statuses", "failures")
    }
    words = {
        ActionMessageKind.PROGRESS: "progress",
        ActionMessageKind.STATUS: "statuses",
        ActionMessageKind.FAIL: "failures",
    }

    def on_action(kind: ActionMessageKind, value: Any, _cancel: bool) -> None:
        found[words[kind]].append(value)

    def on_attachments(kind: ActionOutputMessageKind, value: Any) -> None:
        if kind == ActionOutputMessageKind.JA_SNAPSHOT:
            found["snapshots"].append(value)
        else:
            AgentSession._action_output_log_filter_callback(reported, kind, value)

    filters = [
        ActionMonitoringFilter(session_id="session", callback=on_action),
        ActionOutputCaptureFilter(session_id="session", callback=on_attachments),
    ]
    for line in output.splitlines():
        record = logging.makeLogRecord({"msg": line, "session_id": "session"})
        for one in filters:
            one.filter(record)
    return {"uploads": [asdict(one) for one in reported._upload_manifest_list], **found}


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    Path(request["sessionDirectory"]).mkdir(parents=True, exist_ok=True)
    session = Session(request)
    results = []
    for action in request["actions"]:
        if action["kind"] == "task":
            results.append(session.run_task(action))
        else:
            results.append(session.sync_inputs(action))
    roots = {root.root_path: root.local_root_path for root in session.roots}
    json.dump({"roots": roots, "actions": results}, sys.stdout)


if __name__ == "__main__":
    main()
