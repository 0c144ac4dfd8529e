"""Both sides of the e2e tests: the real client and agent, and our command, on one S3 server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.deadline_peers import DeadlinePeers
from tests.servers.role_store import RoleStore
from tests.servers.s3_server import S3Server
from tests.servers.worker_host import WorkerHost, open_host
from tests.servers.worker_rig import BUCKET
from tests.servers.worker_session import Propmaster


@pytest.fixture
def peers(s3: S3Server, tmp_path: Path) -> DeadlinePeers:
    """The real client and the real agent's scripts, with empty caches."""
    return DeadlinePeers(aws=s3.environment, home=tmp_path / "home-of-peers")


@pytest.fixture
def propmaster(s3: S3Server, tmp_path: Path) -> Propmaster:
    """The command on a host that has never run it."""
    return Propmaster(aws=s3.environment, home=tmp_path / "home-of-worker")


@pytest.fixture(scope="session")
def worker_host() -> Iterator[WorkerHost]:
    """Users for the agent and for jobs; skips without root, sudo or a Python for everybody."""
    with open_host() as host:
        yield host


@pytest.fixture(scope="session")
def role_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoleStore]:
    """An S3 server with temporary credentials, and a bucket in it."""
    directory = tmp_path_factory.mktemp("role-store")
    with RoleStore(directory) as store:
        store.create_bucket(BUCKET)
        yield store
    shutil.rmtree(directory, ignore_errors=True)
