"""Jobs as the Deadline service keeps them: steps, tasks, and sessions with their actions.

Who schedules is here (`DeadlineJobs`), what the API answers is in `deadline_service.py`. Nothing
here locks: the service calls with its lock held.

Scheduling is the service's in small: a session begins with the sync of the job's inputs, enters the
queue environments, syncs what a step depends on before the step's first task, and exits the
environments. A step begins when those that it depends on have succeeded. There are no retries: one
task that does not succeed ends its job.
"""

import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

JSON = dict[str, Any]

# SessionActionStatus of the API, those that are final.
ENDED: Final = frozenset({"SUCCEEDED", "FAILED", "INTERRUPTED", "CANCELED", "NEVER_ATTEMPTED"})
_PARAMETER_KEYS: Final = {"INT": "int", "STRING": "string", "PATH": "path", "FLOAT": "float"}
_CHUNK: Final = "CHUNK[INT]"


@dataclass
class Task:
    """A task, or a chunk of tasks; `task_id` is None for a chunk, which has none."""

    task_id: str | None
    parameters: JSON
    status: str = "READY"
    latest_action: str | None = None


@dataclass
class Step:
    """A step of a job, by the names of its template."""

    step_id: str
    template: JSON
    depends_on: list[str]
    tasks: list[Task]

    @property
    def name(self) -> str:
        """The step's name in the template."""
        return str(self.template["name"])

    @property
    def succeeded(self) -> bool:
        """Whether all its tasks have."""
        return all(task.status == "SUCCEEDED" for task in self.tasks)


@dataclass(frozen=True)
class Update:
    """What a worker reported of an action, and when that arrived (seconds since the epoch)."""

    received: float
    body: JSON


@dataclass
class Action:
    """A session action and everything that was reported of it."""

    action_id: str
    definition: JSON
    task: Task | None = None
    status: str = "ASSIGNED"
    updates: list[Update] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """`syncInputJobAttachments`, `envEnter`, `taskRun` or `envExit`."""
        return next(iter(self.definition))

    @property
    def ended(self) -> bool:
        """Whether it will not be reported of again."""
        return self.status in ENDED

    @property
    def started_at(self) -> float:
        """When the agent began, by its own clock; seconds since the epoch."""
        return self._moment("startedAt")

    @property
    def ended_at(self) -> float:
        """When the agent had done it, by its own clock; seconds since the epoch."""
        return self._moment("endedAt")

    @property
    def manifests(self) -> list[JSON] | None:
        """The manifests of its outputs, parallel to the job's; None if none were reported."""
        return next((u.body["manifests"] for u in self.updates if "manifests" in u.body), None)

    @property
    def messages(self) -> list[str]:
        """The progress messages, in the order of their arrival."""
        return [u.body["progressMessage"] for u in self.updates if "progressMessage" in u.body]

    @property
    def percents(self) -> list[float]:
        """The progress in percent, in the order of its arrival."""
        return [u.body["progressPercent"] for u in self.updates if "progressPercent" in u.body]

    def _moment(self, key: str) -> float:
        found = next(u.body[key] for u in self.updates if key in u.body)
        return datetime.fromisoformat(found).timestamp()


@dataclass
class Session:
    """A session of a job, with the actions that were assigned so far."""

    session_id: str
    job_id: str
    queue_id: str
    assigned_at: float
    actions: list[Action] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)
    closed: bool = False
    ended_at: float | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing of it is left for the worker."""
        return self.ended_at is not None

    def add(self, definition: JSON, task: Task | None = None) -> None:
        """Append an action."""
        action_id = f"sessionaction-{self.session_id.removeprefix('session-')}-{len(self.actions)}"
        self.actions.append(Action(action_id, definition, task))

    def of_kind(self, kind: str) -> list[Action]:
        """Return its actions of one kind."""
        return [action for action in self.actions if action.kind == kind]


@dataclass
class Job:
    """A job as CreateJob got it, and what became of it.

    Attributes:
        released: The worker knows that its sessions have ended, and has cleaned up after them.
    """

    job_id: str
    queue_id: str
    request: JSON
    template: JSON
    steps: list[Step]
    created_at: float
    sessions: list[Session] = field(default_factory=list)
    ended_at: float | None = None
    cancelled: bool = False
    released: bool = False

    @property
    def ended(self) -> bool:
        """Whether no session of it runs or will run."""
        return self.ended_at is not None

    @property
    def failed(self) -> bool:
        """Whether an action did not succeed."""
        return any(action.ended and action.status != "SUCCEEDED" for action in self.actions)

    @property
    def status(self) -> str:
        """TaskRunStatus of the API."""
        if not self.ended:
            return "RUNNING"
        if self.cancelled:
            return "CANCELED"
        return "FAILED" if self.failed else "SUCCEEDED"

    @property
    def attachments(self) -> JSON | None:
        """`manifests` and `fileSystem`, if the job has any."""
        return self.request.get("attachments") or None

    @property
    def actions(self) -> list[Action]:
        """The actions of all sessions."""
        return [action for session in self.sessions for action in session.actions]

    @property
    def task_runs(self) -> list[Action]:
        """The task runs of all sessions."""
        return [action for action in self.actions if action.kind == "taskRun"]

    def step(self, step_id: str) -> Step:
        """Return a step by its id."""
        return next(step for step in self.steps if step.step_id == step_id)


class DeadlineJobs:
    """All jobs, and which of their actions the one worker gets next.

    Args:
        environments: Templates of queue environments, by their ids, in the order of entering.
        session_per: One session for each step, as if each ran on another worker, or one for all
            steps of a job.
        concurrent: Sessions that the worker has at once, at most.
    """

    def __init__(
        self,
        *,
        environments: Mapping[str, JSON],
        session_per: Literal["step", "job"],
        concurrent: int,
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self._environments = environments
        self._session_per = session_per
        self._concurrent = concurrent

    def create(self, queue_id: str, request: JSON, template: JSON) -> Job:
        """Make a job of what CreateJob got."""
        ids = {step["name"]: f"step-{uuid.uuid4().hex}" for step in template["steps"]}
        steps = [
            Step(
                step_id=ids[step["name"]],
                template=step,
                depends_on=[ids[one["dependsOn"]] for one in step.get("dependencies", [])],
                tasks=list(_tasks_of(step, ids[step["name"]])),
            )
            for step in template["steps"]
        ]
        job = Job(f"job-{uuid.uuid4().hex}", queue_id, request, template, steps, time.time())
        self.jobs[job.job_id] = job
        return job

    def update(self, updates: Mapping[str, JSON]) -> None:
        """Take what the worker reports, and see which sessions and jobs have ended."""
        now = time.time()
        for job in self.jobs.values():
            # The agent asks again when it has done all that the answer before made it do.
            job.released = job.ended
            for action in job.actions:
                if (body := updates.get(action.action_id)) is not None:
                    _apply(action, Update(now, body))
            for session in job.sessions:
                if not session.ended and all(action.ended for action in session.actions):
                    self._settle(job, session, now)
            if job.ended_at is None and _is_over(job) and all(one.ended for one in job.sessions):
                job.ended_at = now

    def assign(self) -> list[Session]:
        """Plan what can run now; return the sessions that the worker shall have."""
        for job in self.jobs.values():
            if not job.ended and not job.cancelled and not job.failed:
                self._plan(job)
        return [session for session in self._sessions() if not session.ended]

    def cancels(self) -> dict[str, list[str]]:
        """Return the actions to cancel, by their sessions."""
        return {
            session.session_id: [action.action_id for action in session.actions if not action.ended]
            for session in self._sessions()
            if not session.ended and self.jobs[session.job_id].cancelled
        }

    def _sessions(self) -> list[Session]:
        return [session for job in self.jobs.values() for session in job.sessions]

    def _plan(self, job: Job) -> None:
        begun = {a.definition["taskRun"]["stepId"] for a in job.task_runs}
        succeeded = {step.step_id for step in job.steps if step.succeeded}
        for step in job.steps:
            if step.step_id in begun or not succeeded.issuperset(step.depends_on):
                continue
            session = self._session_for(job)
            if session is None:
                return
            if step.depends_on and job.attachments:
                session.add({"syncInputJobAttachments": {"stepId": step.step_id}})
            for task in step.tasks:
                run = {"stepId": step.step_id, "parameters": task.parameters}
                if task.task_id is not None:
                    run["taskId"] = task.task_id
                session.add({"taskRun": run}, task)
            if self._session_per == "step":
                self._close(session)

    def _session_for(self, job: Job) -> Session | None:
        opened = [session for session in job.sessions if not session.closed]
        if self._session_per == "job" and opened:
            return opened[0]
        if sum(not session.ended for session in self._sessions()) >= self._concurrent:
            return None
        session = Session(f"session-{uuid.uuid4().hex}", job.job_id, job.queue_id, time.time())
        job.sessions.append(session)
        if job.attachments:
            session.add({"syncInputJobAttachments": {}})
        for environment_id in self._environments:
            session.add({"envEnter": {"environmentId": environment_id}})
            session.entered.append(environment_id)
        return session

    def _close(self, session: Session) -> None:
        for environment_id in reversed(session.entered):
            session.add({"envExit": {"environmentId": environment_id}})
        session.closed = True

    def _settle(self, job: Job, session: Session, now: float) -> None:
        """End a session none of whose actions is left, unless more will come."""
        if not session.closed:
            if not _is_over(job):
                return
            self._close(session)
        if all(action.ended for action in session.actions):
            session.ended_at = now


def _is_over(job: Job) -> bool:
    return job.failed or job.cancelled or all(step.succeeded for step in job.steps)


def _apply(action: Action, update: Update) -> None:
    action.updates.append(update)
    if status := update.body.get("completedStatus"):
        action.status = status
        if action.task is not None:
            action.task.status = status
            action.task.latest_action = action.action_id
    elif not action.ended:
        action.status = "RUNNING"


def _tasks_of(step: JSON, step_id: str) -> Iterable[Task]:
    """Yield the tasks of a step that has one parameter at most."""
    definitions = (step.get("parameterSpace") or {}).get("taskParameterDefinitions") or []
    if not definitions:
        yield Task(f"task-{step_id.removeprefix('step-')}-0", {})
        return
    [definition] = definitions
    name, values = definition["name"], _values_of(definition["range"])
    if definition["type"] == _CHUNK:
        size = int(definition["chunks"]["defaultTaskCount"])
        for at in range(0, len(values), size):
            chunk = values[at : at + size]
            yield Task(None, {name: {"chunkInt": f"{chunk[0]}-{chunk[-1]}"}})
        return
    key = _PARAMETER_KEYS[definition["type"]]
    for at, value in enumerate(values):
        yield Task(f"task-{step_id.removeprefix('step-')}-{at}", {name: {key: value}})


def _values_of(given: str | list[object]) -> list[str]:
    if isinstance(given, list):
        return [str(value) for value in given]
    if found := re.fullmatch(r"(\d+)-(\d+)", given):
        return [str(value) for value in range(int(found[1]), int(found[2]) + 1)]
    return [given]


def iso(moment: float) -> str:
    """Return a moment in seconds since the epoch as the API writes it."""
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
