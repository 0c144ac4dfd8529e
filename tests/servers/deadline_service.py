"""As much of the Deadline API as the worker agent and the `deadline` command need, on loopback.

The agent registers, gets sessions and reports; the client submits jobs, follows them and downloads
their outputs. Clients find it by AWS_ENDPOINT_URL_DEADLINE, with
AWS_DISABLE_HOST_PREFIX_INJECTION=true; signatures are not looked at. Credentials that it hands out
are those it was given, so a real S3 server can verify them.

The handler's threads and the tests share one lock; `wait_until` sleeps on its condition and is
woken by every request.

Source: https://docs.aws.amazon.com/deadline-cloud/latest/APIReference/ (2023-10-12)
"""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.deadline_jobs import ENDED, JSON, DeadlineJobs, Job, Session, Step, Task, iso

FARM_ID: Final = "farm-" + "a" * 32
FLEET_ID: Final = "fleet-" + "c" * 32
WORKER_ID: Final = "worker-" + "d" * 32
LOG_GROUP: Final = "/deadline/tests"

_ROLE: Final = "arn:aws:iam::123456789012:role/queue"
_CREDENTIALS_SECONDS: Final = 3600.0
# The real service asks for more patience; the agent reports at once when it has nothing to do.
_UPDATE_SECONDS: Final = 1
_COUNTED: Final = (
    "PENDING READY ASSIGNED STARTING SCHEDULED INTERRUPTING RUNNING SUSPENDED CANCELED FAILED "
    "SUCCEEDED NOT_COMPATIBLE"
)
_FARM: Final = r"/2023-10-12/farms/[^/]+"
_WORKER: Final = rf"{_FARM}/fleets/[^/]+/workers/[^/]+"
_QUEUE: Final = rf"{_FARM}/queues/([^/]+)"
_JOB: Final = rf"{_QUEUE}/jobs/([^/]+)"


@dataclass(frozen=True)
class Credentials:
    """What every role of the service gets; S3 must know them."""

    access_key: str
    secret_key: str
    session_token: str


@dataclass(frozen=True)
class Queue:
    """A queue of the farm.

    Attributes:
        root_prefix: Of its job attachments.
        job_user: `(user, group)`; without it jobs run as the agent's user.
        path_mapping_rules: What a storage profile would give to its jobs.
    """

    queue_id: str
    root_prefix: str
    job_user: tuple[str, str] | None = None
    path_mapping_rules: Sequence[JSON] = ()


@dataclass(frozen=True)
class Exchange:
    """A request and its answer."""

    received: float  # seconds since the epoch
    method: str
    path: str
    request: JSON
    status: int
    answer: JSON


@dataclass(frozen=True)
class _Call:
    words: Sequence[str]
    query: Mapping[str, list[str]]
    body: JSON


class _NotFoundError(Exception):
    """The API has no such resource or operation."""


@dataclass
class DeadlineService:
    """The service; entered it answers.

    Attributes:
        bucket: Of the job attachments of all queues.
        queues: By default none.
        environments: Templates of queue environments, as the files that users write; all queues'.
        host_configuration: A shell script that the agent runs as root before its first session.
        session_per, concurrent: See DeadlineJobs.
        storage_profiles: By their ids, `displayName`, `osFamily` and `fileSystemLocations`.
        exchanges: Every request since the start, with its answer.
        ending: What the first role that is assumed has: other credentials, for so many seconds.
        stopping: Tell the worker that it shall stop once it has nothing to do.
    """

    bucket: str
    credentials: Credentials
    queues: Sequence[Queue] = ()
    environments: Sequence[JSON] = ()
    host_configuration: str | None = None
    session_per: Literal["step", "job"] = "step"
    concurrent: int = 4
    storage_profiles: Mapping[str, JSON] = field(default_factory=dict)
    ending: tuple[Credentials, float] | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._environments = {
            f"QUEUE:queueenv-{at:032x}": template for at, template in enumerate(self.environments)
        }
        self._jobs = DeadlineJobs(
            environments=self._environments,
            session_per=self.session_per,
            concurrent=self.concurrent,
        )
        self._routes: Sequence[tuple[str, str, Callable[[_Call], JSON]]] = (
            ("POST", rf"{_FARM}/fleets/[^/]+/workers", lambda _: {"workerId": WORKER_ID}),
            ("GET", rf"{_WORKER}/(?:fleet|queue)-roles", self._assume_role),
            ("PATCH", rf"{_WORKER}/schedule", self._update_schedule),
            ("POST", rf"{_WORKER}/batchGetJobEntity", self._get_entities),
            ("PATCH", _WORKER, self._update_worker),
            ("GET", _FARM, self._get_farm),
            ("POST", rf"{_FARM}/search/jobs", self._search_jobs),
            ("GET", _QUEUE, self._get_queue),
            ("GET", rf"{_QUEUE}/(?:user|read)-roles", self._assume_role),
            ("GET", rf"{_QUEUE}/environments", lambda _: {"environments": []}),
            ("GET", rf"{_QUEUE}/storage-profiles/([^/]+)", self._get_storage_profile),
            ("POST", rf"{_QUEUE}/jobs", self._create_job),
            ("GET", _JOB, self._get_job),
            ("GET", rf"{_JOB}/sessions", self._list_sessions),
            ("GET", rf"{_JOB}/session-actions", self._list_actions),
            ("GET", rf"{_JOB}/steps", self._list_steps),
            ("GET", rf"{_JOB}/steps/([^/]+)", self._get_step),
            ("GET", rf"{_JOB}/steps/([^/]+)/dependencies", self._list_dependencies),
            ("GET", rf"{_JOB}/steps/([^/]+)/tasks", self._list_tasks),
            ("GET", rf"{_JOB}/steps/([^/]+)/tasks/([^/]+)", self._get_task),
        )
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._answer))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    @property
    def endpoint_url(self) -> str:
        """`http://127.0.0.1:<port>`."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which the agent and the client find it."""
        return {
            "AWS_ENDPOINT_URL_DEADLINE": self.endpoint_url,
            "AWS_DISABLE_HOST_PREFIX_INJECTION": "true",
        }

    def job(self, job_id: str) -> Job:
        """Return a job; it changes while the worker works."""
        return self._jobs.jobs[job_id]

    def create(
        self,
        queue_id: str,
        template: JSON,
        *,
        attachments: JSON,
        parameters: JSON | None = None,
        storage_profile_id: str | None = None,
    ) -> Job:
        """Make a job whose inputs somebody has uploaded, without the client."""
        request: JSON = {"attachments": attachments, "parameters": parameters or {}}
        if storage_profile_id is not None:
            request["storageProfileId"] = storage_profile_id
        with self._changed:
            return self._jobs.create(queue_id, request, template)

    def cancel(self, job_id: str) -> None:
        """Have all actions of a job cancelled that have not ended."""
        with self._changed:
            self._jobs.jobs[job_id].cancelled = True

    def wait_until(self, condition: Callable[[], bool], *, seconds: float, what: str) -> None:
        """Wait until a condition is true after some request.

        Raises:
            AssertionError: It is not, after `seconds`.
        """
        with self._changed:
            done = self._changed.wait_for(condition, seconds)
        assert done, f"{what}: not within {seconds:.0f} s"

    def wait_for(self, job_id: str, *, seconds: float) -> Job:
        """Wait until a job has ended, and its worker has ended its sessions.

        An agent that is told to end at that moment may never do so.
        """
        job = self.job(job_id)
        self.wait_until(lambda: job.released, seconds=seconds, what=f"the end of {job_id}")
        return job

    # ------------------------------------------------------------------------------- the worker

    def _assume_role(self, _call: _Call) -> JSON:
        keys, seconds = self.credentials, _CREDENTIALS_SECONDS
        if self.ending is not None:
            (keys, seconds), self.ending = self.ending, None
        return {
            "credentials": {
                "accessKeyId": keys.access_key,
                "secretAccessKey": keys.secret_key,
                "sessionToken": keys.session_token,
                "expiration": iso(time.time() + seconds),
            }
        }

    def _update_worker(self, call: _Call) -> JSON:
        self.statuses.append(call.body.get("status", ""))
        answer: JSON = {"log": _log_configuration("worker")}
        if self.host_configuration is not None:
            script = {"scriptBody": self.host_configuration, "scriptTimeoutSeconds": 300}
            answer["hostConfiguration"] = script
        return answer

    def _update_schedule(self, call: _Call) -> JSON:
        self._jobs.update(call.body.get("updatedSessionActions") or {})
        return {
            "assignedSessions": {
                session.session_id: {
                    "queueId": session.queue_id,
                    "jobId": session.job_id,
                    "sessionActions": [
                        {"sessionActionId": action.action_id, "definition": action.definition}
                        for action in session.actions
                        if not action.ended
                    ],
                    "logConfiguration": _log_configuration(session.session_id),
                }
                for session in self._jobs.assign()
            },
            "cancelSessionActions": self._jobs.cancels(),
            "updateIntervalSeconds": _UPDATE_SECONDS,
        }

    def _get_entities(self, call: _Call) -> JSON:
        return {"entities": [self._entity(one) for one in call.body["identifiers"]], "errors": []}

    def _entity(self, identifier: JSON) -> JSON:
        [(kind, given)] = identifier.items()
        job = self._jobs.jobs[given["jobId"]]
        found: JSON = {"jobId": job.job_id, "schemaVersion": "jobtemplate-2023-09"}
        match kind:
            case "jobDetails":
                found |= self._job_details(job)
            case "jobAttachmentDetails":
                found = {"jobId": job.job_id, "attachments": job.attachments}
            case "stepDetails":
                step = job.step(given["stepId"])
                found |= {
                    "stepId": step.step_id,
                    "template": step.template,
                    "dependencies": step.depends_on,
                    **_extensions(job.template),
                }
            case "environmentDetails":
                template = self._environments[given["environmentId"]]
                found |= {
                    "schemaVersion": "environment-2023-09",
                    "environmentId": given["environmentId"],
                    "template": template["environment"],
                    **_extensions(template),
                }
            case _:
                raise _NotFoundError(kind)
        return {kind: found}

    def _job_details(self, job: Job) -> JSON:
        queue = self._queue(job.queue_id)
        run_as: JSON = {"runAs": "WORKER_AGENT_USER"}
        if queue.job_user is not None:
            user, group = queue.job_user
            run_as = {"runAs": "QUEUE_CONFIGURED_USER", "posix": {"user": user, "group": group}}
        return {
            "logGroupName": LOG_GROUP,
            "queueRoleArn": _ROLE,
            "jobAttachmentSettings": self._attachment_settings(queue),
            "jobRunAsUser": run_as,
            "parameters": job.request.get("parameters") or {},
            "pathMappingRules": list(queue.path_mapping_rules),
            **_extensions(job.template),
        }

    # ------------------------------------------------------------------------------- the client

    def _get_farm(self, _call: _Call) -> JSON:
        return {"farmId": FARM_ID, "displayName": "tests", "kmsKeyArn": "", **_created(0.0)}

    def _get_queue(self, call: _Call) -> JSON:
        queue = self._queue(call.words[0])
        return {
            "farmId": FARM_ID,
            "queueId": queue.queue_id,
            "displayName": "tests",
            "status": "IDLE",
            "defaultBudgetAction": "NONE",
            "jobAttachmentSettings": self._attachment_settings(queue),
            "roleArn": _ROLE,
            **_created(0.0),
        }

    def _get_storage_profile(self, call: _Call) -> JSON:
        if (profile := self.storage_profiles.get(call.words[1])) is None:
            raise _NotFoundError(call.words[1])
        return {"storageProfileId": call.words[1], **profile}

    def _create_job(self, call: _Call) -> JSON:
        # The tests' bundles are JSON; the client passes a template on as it is.
        template = json.loads(call.body["template"])
        return {"jobId": self._jobs.create(call.words[0], call.body, template).job_id}

    def _search_jobs(self, _call: _Call) -> JSON:
        found = [_summary(job) for job in self._jobs.jobs.values()]
        return {"jobs": found, "totalResults": len(found)}

    def _get_job(self, call: _Call) -> JSON:
        job = self._job_of(call)
        more = {"attachments": job.attachments} if job.attachments else {}
        if profile := job.request.get("storageProfileId"):
            more["storageProfileId"] = profile
        return {**_summary(job), **more, "parameters": job.request.get("parameters") or {}}

    def _list_sessions(self, call: _Call) -> JSON:
        return {"sessions": [_session(one) for one in self._job_of(call).sessions]}

    def _list_actions(self, call: _Call) -> JSON:
        [wanted] = call.query["sessionId"]
        [session] = [one for one in self._job_of(call).sessions if one.session_id == wanted]
        found = []
        for action in session.actions:
            summary: JSON = {
                "sessionActionId": action.action_id,
                "status": action.status,
                "definition": action.definition,
            }
            if action.manifests is not None:
                summary["manifests"] = action.manifests
            if action.status in ENDED - {"NEVER_ATTEMPTED"}:
                summary["endedAt"] = iso(action.ended_at)
            found.append(summary)
        return {"sessionActions": found}

    def _list_steps(self, call: _Call) -> JSON:
        job = self._job_of(call)
        return {"steps": [_step(job, step) for step in job.steps]}

    def _get_step(self, call: _Call) -> JSON:
        job = self._job_of(call)
        return _step(job, job.step(call.words[2]))

    def _list_dependencies(self, call: _Call) -> JSON:
        step = self._job_of(call).step(call.words[2])
        found = [{"stepId": one, "status": "RESOLVED"} for one in step.depends_on]
        return {"dependencies": found}

    def _list_tasks(self, call: _Call) -> JSON:
        job = self._job_of(call)
        return {"tasks": [_task(job, task) for task in job.step(call.words[2]).tasks]}

    def _get_task(self, call: _Call) -> JSON:
        job = self._job_of(call)
        tasks = {task.task_id: task for task in job.step(call.words[2]).tasks}
        return _task(job, tasks[call.words[3]])

    # ----------------------------------------------------------------------------------- both

    def _queue(self, queue_id: str) -> Queue:
        return next(queue for queue in self.queues if queue.queue_id == queue_id)

    def _job_of(self, call: _Call) -> Job:
        if (job := self._jobs.jobs.get(call.words[1])) is None:
            raise _NotFoundError(call.words[1])
        return job

    def _attachment_settings(self, queue: Queue) -> JSON:
        return {"s3BucketName": self.bucket, "rootPrefix": queue.root_prefix}

    def _answer(self, method: str, target: str, body: JSON) -> tuple[int, JSON]:
        received = time.time()
        address = urlsplit(target)
        path = unquote(address.path)
        with self._changed:
            try:
                status, answer = 200, self._routed(method, path, parse_qs(address.query), body)
            except _NotFoundError as error:
                status, answer = 404, {"message": f"{method} {path}: {error}"}
            self.exchanges.append(Exchange(received, method, path, body, status, answer))
            self._changed.notify_all()
        return status, answer

    def _routed(self, method: str, path: str, query: Mapping[str, list[str]], body: JSON) -> JSON:
        for verb, pattern, answer in self._routes:
            if verb == method and (found := re.fullmatch(pattern, path)):
                return answer(_Call(found.groups(), query, body))
        raise _NotFoundError("no such operation")


def _handler(
    answer: Callable[[str, str, JSON], tuple[int, JSON]],
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are two writes, and the second would wait for the first's acknowledgement.
        disable_nagle_algorithm = True

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):
                return self.serve
            raise AttributeError(name)

        def serve(self) -> None:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, found = answer(self.command, self.path, json.loads(data or b"{}"))
            encoded = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            if status != 200:
                self.send_header("x-amzn-errortype", "ResourceNotFoundException")
            self.send_header("content-length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    return Handler


def _log_configuration(stream: str) -> JSON:
    options = {"logGroupName": LOG_GROUP, "logStreamName": stream}
    return {"logDriver": "awslogs", "parameters": {"interval": "15"}, "options": options}


def _extensions(template: JSON) -> JSON:
    """Return nothing where there are none: agent 0.29 refuses the key."""
    return {"extensions": template["extensions"]} if template.get("extensions") else {}


def _created(moment: float) -> JSON:
    return {"createdAt": iso(moment), "createdBy": "tests"}


def _counts(tasks: Sequence[Task]) -> dict[str, int]:
    return {name: sum(task.status == name for task in tasks) for name in _COUNTED.split()}


def _summary(job: Job) -> JSON:
    found: JSON = {
        "jobId": job.job_id,
        "queueId": job.queue_id,
        "name": job.template["name"],
        "lifecycleStatus": "CREATE_COMPLETE",
        "lifecycleStatusMessage": "",
        "priority": job.request.get("priority", 50),
        "taskRunStatus": job.status,
        "taskRunStatusCounts": _counts([task for step in job.steps for task in step.tasks]),
        "taskFailureRetryCount": 0,
        **_created(job.created_at),
    }
    if job.sessions:
        found["startedAt"] = iso(job.sessions[0].assigned_at)
    if job.ended_at is not None:
        found["endedAt"] = iso(job.ended_at)
    return found


def _session(session: Session) -> JSON:
    found: JSON = {
        "sessionId": session.session_id,
        "fleetId": FLEET_ID,
        "workerId": WORKER_ID,
        "startedAt": iso(session.assigned_at),
        "lifecycleStatus": "ENDED" if session.ended else "STARTED",
    }
    if session.ended_at is not None:
        found["endedAt"] = iso(session.ended_at)
    return found


def _step(job: Job, step: Step) -> JSON:
    return {
        "stepId": step.step_id,
        "name": step.name,
        "lifecycleStatus": "CREATE_COMPLETE",
        "taskRunStatus": "SUCCEEDED" if step.succeeded else job.status,
        "taskRunStatusCounts": _counts(step.tasks),
        **_created(job.created_at),
    }


def _task(job: Job, task: Task) -> JSON:
    found: JSON = {
        "taskId": task.task_id or "",
        "runStatus": task.status,
        "parameters": task.parameters,
        **_created(job.created_at),
    }
    if task.latest_action is not None:
        found["latestSessionActionId"] = task.latest_action
    return found
