"""Sessions of one job on a fresh host, with a store in a directory or on S3."""

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content import events
from tests.servers.fault_proxy import FaultProxy
from tests.servers.hooks import Host
from tests.servers.local_farm import Farm
from tests.servers.publishing import Publishing, host_of
from tests.servers.s3_server import S3Server
from tests.servers.sessions import Sessions


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path, Host(tmp_path / "host", f"file://{tmp_path}/store"))


@pytest.fixture(params=["directory", "s3"])
def any_sessions(request: pytest.FixtureRequest, tmp_path: Path) -> Sessions:
    if request.param == "directory":
        return Sessions(tmp_path, Host(tmp_path / "host", f"file://{tmp_path}/store"))
    s3: S3Server = request.getfixturevalue("s3")
    url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
    return Sessions(tmp_path, Host(tmp_path / "host", url, environment=s3.environment))


@pytest.fixture
def farm(tmp_path: Path, expected_events: set[str]) -> Farm:
    expected_events.add(events.SESSION_START_FAILED)
    return Farm(tmp_path)


@pytest.fixture
def open_farm(expected_events: set[str]) -> Iterator[Farm]:
    """A farm in a directory that every user may enter: pytest closes its own to others."""
    expected_events.add(events.SESSION_START_FAILED)
    with tempfile.TemporaryDirectory(prefix="open-farm-") as directory:
        Path(directory).chmod(0o755)
        yield Farm(Path(directory).resolve())


@pytest.fixture
def publishing(s3: S3Server, tmp_path: Path) -> Publishing:
    return Publishing(s3, tmp_path, host_of(s3, tmp_path / "host"))


@pytest.fixture
def watched(s3: S3Server, tmp_path: Path, fault_proxy: FaultProxy) -> Publishing:
    """As `publishing`, with every request seen by the proxy."""
    return Publishing(s3, tmp_path, host_of(s3, tmp_path / "host", fault_proxy.url))


@pytest.fixture
def declined(expected_events: set[str]) -> None:
    expected_events.add(events.PUBLISH_FAILED)
