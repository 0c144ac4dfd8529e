"""Both sides of the e2e tests: the real client and agent, and our command, on one S3 server."""

from pathlib import Path

import pytest

from tests.servers.deadline_peers import DeadlinePeers
from tests.servers.s3_server import S3Server
from tests.servers.worker_session import Propmaster


@pytest.fixture
def peers(s3: S3Server, tmp_path: Path) -> DeadlinePeers:
    """The real client and the real agent's scripts, with empty caches."""
    return DeadlinePeers(aws=s3.environment, home=tmp_path / "home-of-peers")


@pytest.fixture
def propmaster(s3: S3Server, tmp_path: Path) -> Propmaster:
    """The command on a host that has never run it."""
    return Propmaster(aws=s3.environment, home=tmp_path / "home-of-worker")
