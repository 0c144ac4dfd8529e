"""A worker in small: it gets sessions from the stub of the Deadline API and works them itself.

What tasks leave goes through real sessions of propmaster, and the service is told as the agent
tells it, so that the real client finds the outputs.
"""

import json
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from agent_plugin.session.finish_task import TaskAction
from agent_plugin.session.job import JobDocument
from tests.servers.deadline_command import job_template, step
from tests.servers.deadline_jobs import JSON, Job, iso
from tests.servers.deadline_service import FARM_ID, FLEET_ID, WORKER_ID, DeadlineService
from tests.servers.hooks import Host
from tests.servers.trees import write_files

MTIME_NS = 1_650_000_000_123_456_000
Files = Mapping[str | bytes, bytes | int]


class FarmWork:
    """Jobs of one queue, and their only worker.

    Args:
        directory: For sessions.
        service: Running.
        queue_id: One of its queues.
        host: The worker's, with the queue's store.
    """

    def __init__(
        self, directory: Path, service: DeadlineService, queue_id: str, host: Host
    ) -> None:
        self._directory = directory
        self._service = service
        self._queue_id = queue_id
        self._host = host

    def job(
        self, root: str, tasks: int, *, path_format: str = "posix", profile: str | None = None
    ) -> Job:
        """Make a job of one step whose tasks leave outputs below a root."""
        attachments: JSON = {
            "manifests": [
                {
                    "rootPath": root,
                    "rootPathFormat": path_format,
                    "outputRelativeDirectories": ["."],
                }
            ],
            "fileSystem": "COPIED",
        }
        template = job_template(step("Render", "true", frames=f"1-{tasks}"))
        return self._service.create(
            self._queue_id, template, attachments=attachments, storage_profile_id=profile
        )

    def work(self, outputs: Mapping[str, Sequence[Files]]) -> None:
        """Run all tasks that wait; each leaves the files given for its job, in order."""
        left = {job_id: iter(files) for job_id, files in outputs.items()}
        updates: JSON = {}
        while assigned := self._report(updates)["assignedSessions"]:
            updates = {}
            for session in assigned.values():
                for action in session["sessionActions"]:
                    begun = time.time()
                    if run := action["definition"].get("taskRun"):
                        files = next(left[session["jobId"]])
                        self._run(session["jobId"], action["sessionActionId"], run, files)
                    updates[action["sessionActionId"]] = {
                        "completedStatus": "SUCCEEDED",
                        "processExitCode": 0,
                        "startedAt": iso(begun),
                        "endedAt": iso(time.time()),
                    }

    def _run(self, job_id: str, action_id: str, run: JSON, files: Files) -> None:
        job = self._service.job(job_id)
        document = {
            "farmId": FARM_ID,
            "queueId": self._queue_id,
            "jobId": job_id,
            "store": self._host.store_url,
            "attachments": job.attachments,
        }
        decoded = JobDocument.decode(json.dumps(document).encode(), "the test's job")
        session = self._directory / uuid.uuid4().hex
        local = Path(self._host.start(decoded, session).roots[0].local_root)
        write_files(local, files, mtime_ns=MTIME_NS)
        action = TaskAction(
            step_id=run["stepId"],
            task_id=run.get("taskId"),
            session_action_id=action_id,
            started_at=time.time(),
        )
        self._host.finish_task(session, action)
        self._host.end(session)

    def _report(self, updates: JSON) -> JSON:
        request = urllib.request.Request(
            f"{self._service.endpoint_url}/2023-10-12/farms/{FARM_ID}/fleets/{FLEET_ID}"
            f"/workers/{WORKER_ID}/schedule",
            data=json.dumps({"updatedSessionActions": updates}).encode(),
            method="PATCH",
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: JSON = json.load(answer)
        return found
