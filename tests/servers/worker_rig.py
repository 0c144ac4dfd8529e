"""Everything around a worker agent at once: S3, the service, the logs, the host, the client.

Tests and benchmarks open a `Rig`, start an agent in it, submit with the real client, wait for the
job's end and look at what there is.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from tests.servers.cloudwatch_logs import CloudWatchLogs
from tests.servers.deadline_command import DeadlineCommand
from tests.servers.deadline_jobs import JSON
from tests.servers.deadline_peers import AGENT_PYTHON
from tests.servers.deadline_service import DeadlineService, Queue
from tests.servers.role_store import RoleStore
from tests.servers.worker_agent import WorkerAgent
from tests.servers.worker_host import WorkerHost

BUCKET: Final = "worker-tests"
QUEUE_ID: Final = "queue-" + "b" * 32
OTHER_QUEUE_ID: Final = "queue-" + "e" * 32

# Generous, for a busy machine: a job of a few files takes five seconds on an idle one.
JOB_SECONDS: Final = 240.0


@dataclass(frozen=True)
class Rig:
    """What `open_rig` has opened.

    Attributes:
        environment: Where the services are, with credentials to register a worker or to submit.
    """

    store: RoleStore
    host: WorkerHost
    service: DeadlineService
    logs: CloudWatchLogs
    client: DeadlineCommand
    environment: Mapping[str, str]

    def agent(
        self,
        python: Path | None = None,
        *,
        peer: Path = AGENT_PYTHON,
        user: str | None = None,
        arguments: Sequence[str] = (),
        more: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> WorkerAgent:
        """Return an agent, not yet started.

        Args:
            python: Its Python; by default a new copy of the peer, as it was installed.
            peer: Whose copy that is.
            user: Whom it runs as, by default the agent's user.
            arguments: More for its command line.
            more: Variables that only its process has.
            within: A command that runs it, in another namespace for instance.
        """
        return WorkerAgent(
            self.host,
            python or self.host.agent_python(peer),
            self.environment,
            user=user,
            arguments=arguments,
            more=more,
            within=within,
        )


@contextmanager
def open_rig(
    store: RoleStore,
    host: WorkerHost,
    home: Path,
    *,
    queues: Sequence[Queue] | None = None,
    environments: Sequence[JSON] = (),
    host_configuration: str | None = None,
    session_per: Literal["step", "job"] = "step",
    job_environment: Mapping[str, str] | None = None,
) -> Iterator[Rig]:
    """Start the services for one test.

    Args:
        store: Where BUCKET is.
        host: The worker.
        home: The submitter's.
        queues: By default two, with a root prefix of the test's own and a job user each.
        environments: See DeadlineService.
        host_configuration: See DeadlineService.
        session_per: See DeadlineService.
        job_environment: More for the environment that sudo gives to what the agent runs.
    """
    prefix = f"root-{uuid.uuid4().hex[:12]}"
    queues = queues or (
        Queue(QUEUE_ID, prefix, (host.job, host.job)),
        Queue(OTHER_QUEUE_ID, prefix, (host.other_job, host.other_job)),
    )
    credentials = store.assume_role()
    service = DeadlineService(
        bucket=BUCKET,
        credentials=credentials,
        queues=queues,
        environments=environments,
        host_configuration=host_configuration,
        session_per=session_per,
    )
    with service, CloudWatchLogs() as logs:
        host.begin(
            {
                **store.endpoints,
                "DEADLINE_CLOUD_TELEMETRY_OPT_OUT": "true",
                "AWS_EC2_METADATA_DISABLED": "true",
                **(job_environment or {}),
            }
        )
        environment = {
            **store.environment,
            **store.endpoints,
            **service.environment,
            **logs.environment,
        }
        yield Rig(store, host, service, logs, DeadlineCommand(home, environment), environment)
