"""What every test gets: an environment of its own, and log events that must be declared."""

import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from agent_plugin.cli.demo_store import DemoStore
from agent_plugin.content import events
from agent_plugin.content.s3_upload import ABORT_SECONDS, ABORT_THREAD
from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3_server import S3Server

SHARED_BUCKET = "propmaster-tests"
OPEN_BUCKET = "propmaster-open"

# No deadline anywhere, and no judgement of how long an example takes to be drawn: the machines are
# shared, and time says nothing there.
settings.register_profile(
    "dev", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "ci", settings.get_profile("dev"), max_examples=200, derandomize=True, print_blob=True
)
settings.register_profile(
    "nightly", settings.get_profile("dev"), max_examples=5000, print_blob=True
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "expected_events(*names): warnings and errors that the test may cause; others fail it",
    )


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(autouse=True)
def _isolated_environment(_homes: Path) -> Iterator[None]:
    """An empty home directory, and none of the AWS, XDG and PROPMASTER settings of whoever runs."""
    home = Path(tempfile.mkdtemp(dir=_homes))
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in list(os.environ):
            if name.startswith(("AWS_", "XDG_", "PROPMASTER_")) or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # Root's directories are the host's own, whatever HOME says.
        monkeypatch.setenv("PROPMASTER_CACHE_DIR", str(home / "cache"))
        monkeypatch.setenv("PROPMASTER_STATE_DIR", str(home / "state"))
        yield
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def expected_events() -> set[str]:
    """The warnings and errors that the test may cause: `expected_events.add(events.NAME)`.

    A test that hypothesis drives declares them with the marker of the same name instead.
    """
    return set()


class _Watch(logging.Filter):
    """A filter, since `events.configure` replaces the handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.records.append(record)
        return True


@pytest.fixture(autouse=True)
def _no_undeclared_events(
    request: pytest.FixtureRequest, expected_events: set[str]
) -> Iterator[None]:
    logger = events.get_logger()
    before = (logger.level, logger.propagate, logger.handlers[:])
    watch = _Watch()
    logger.addFilter(watch)
    yield
    logger.removeFilter(watch)
    logger.setLevel(before[0])
    logger.propagate = before[1]
    logger.handlers[:] = before[2]
    for marker in request.node.iter_markers("expected_events"):
        expected_events.update(marker.args)
    undeclared = [
        f"{record.levelname} {record.getMessage()} {dict(events.fields_of(record))}"
        for record in watch.records
        if record.getMessage() not in expected_events
    ]
    if undeclared:
        pytest.fail("the test did not declare these events:\n" + "\n".join(undeclared))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for the whole run; it is gone when pytest is, in whichever way pytest ends."""
    directory = tmp_path_factory.mktemp("s3")
    with DemoStore(directory, open_buckets=[OPEN_BUCKET]) as store:
        store.create_bucket(SHARED_BUCKET)
        store.create_bucket(OPEN_BUCKET)
        yield S3Server(
            endpoint_url=store.endpoint_url,
            access_key=store.access_key,
            secret_key=store.secret_key,
            read_only_access_key=store.read_only_access_key,
            read_only_secret_key=store.read_only_secret_key,
            bucket=SHARED_BUCKET,
            open_bucket=OPEN_BUCKET,
        )
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def s3_prefix() -> str:
    """A root prefix in the shared bucket that no other test has; no slash at its ends."""
    return f"root-{uuid.uuid4().hex}"


@pytest.fixture
def fault_proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy in front of the shared server, that breaks what it is told to."""
    credentials = (s3.access_key, s3.secret_key)
    with FaultProxy(s3.endpoint_url, seed=0, credentials=credentials) as proxy:
        yield proxy
        # A cancelled upload is aborted once more when its last part has ended, by a stall perhaps.
        # Without the proxy that fails, and its warning would be put down to the next test.
        proxy.refuse(0)
        proxy.clear()
        _await_aborts()


def _await_aborts() -> None:
    deadline = time.monotonic() + ABORT_SECONDS
    for thread in threading.enumerate():
        if thread.name == ABORT_THREAD:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "an abort does not end"


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The URL of a moto server, for what SeaweedFS lacks: STS, archive classes, ACLs.

    It keeps everything in memory and accepts any signature.
    """
    # Imported here because it takes seconds and few tests need it.
    from moto.server import ThreadedMotoServer  # noqa: PLC0415

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
