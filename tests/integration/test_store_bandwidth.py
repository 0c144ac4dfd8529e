"""What moves from and to a store is taken from the bandwidth first, byte for byte."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from agent_plugin.content.bandwidth import Allowance, Bandwidth
from agent_plugin.content.digest import Digest
from agent_plugin.content.open_store import build_store
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Store
from tests.servers.hooks import QUEUE, Host, job_of
from tests.servers.s3_server import S3Server
from tests.servers.trees import write_files

KIB = 1024
SMALL = os.urandom(100_000)
LARGE = os.urandom(WHOLE_BLOB_BYTES + 1_000_000)


class Counted(Allowance):
    """As much as there is, and how much was taken."""

    def __init__(self) -> None:
        super().__init__(None)
        self.taken: list[int] = []

    def take(self, count: int, cancellation: Cancellation | None = None) -> float:
        # Appending is atomic; the parts of a blob are taken by several threads.
        self.taken += [count] if count else []
        return super().take(count, cancellation)

    def told(self) -> int:
        taken, self.taken = sum(self.taken), []
        return taken


class Moved:
    """A store, and what it has taken of either direction."""

    def __init__(self, store: Store, download: Counted, upload: Counted) -> None:
        self.store = store
        self._download = download
        self._upload = upload

    def told(self) -> tuple[int, int]:
        """Return what was downloaded and uploaded since it was asked before."""
        return self._download.told(), self._upload.told()


@pytest.fixture(params=["directory", "s3"])
def moved(request: pytest.FixtureRequest, tmp_path: Path) -> Moved:
    download, upload = Counted(), Counted()
    bandwidth = Bandwidth(download, upload)
    if request.param == "directory":
        return Moved(build_store(f"file://{tmp_path}/s", bandwidth=bandwidth), download, upload)
    s3: S3Server = request.getfixturevalue("s3")
    url = f"s3://{s3.bucket}/{request.getfixturevalue('s3_prefix')}"
    store = build_store(url, environment=s3.environment, account_id="", bandwidth=bandwidth)
    return Moved(store, download, upload)


def test_each_byte_that_moves_is_taken_once(moved: Moved) -> None:
    store, stop = moved.store, Cancellation()
    small, large = Digest.of(SMALL), Digest.of(LARGE)

    assert store.put(small, SMALL)
    assert moved.told() == (0, len(SMALL))
    with tempfile.TemporaryFile() as file:
        file.write(LARGE)
        file.flush()
        assert store.put_file(large, file.fileno(), cancellation=stop)
    assert moved.told() == (0, len(LARGE))
    assert store.get(small) == SMALL
    assert moved.told() == (len(SMALL), 0)
    for digest in (small, large):
        with tempfile.TemporaryFile() as file:
            store.fetch(digest, file.fileno(), cancellation=stop)
        assert moved.told() == (digest.size, 0)
    assert store.read_range(large, 1000, 5000) == LARGE[1000:6000]
    assert moved.told() == (5000, 0)
    store.put_document("farm-1/a", SMALL, {})
    assert moved.told() == (0, len(SMALL))
    assert store.get_document("farm-1/a", max_bytes=1 << 20).data == SMALL
    assert moved.told() == (len(SMALL), 0)
    assert store.find_missing([small, large]) == set()
    assert moved.told() == (0, 0)


def test_a_session_moves_as_fast_as_it_may(tmp_path: Path) -> None:
    """1.25 MiB at 512 KiB/s; without the limit it takes a tenth of that."""
    store: dict[str, float | str] = {"download_limit": "512 KiB", "upload_limit": 4_000_000}
    host = Host(tmp_path / "host", f"file://{tmp_path}/store", store=store)
    files: dict[str | bytes, bytes | int] = {f"{at}.tx": 64 * KIB for at in range(20)}
    write_files(tmp_path / "show", files, mtime_ns=1_600_000_000 * 10**9)
    submitted, _ = host.submit(tmp_path / "show")

    begun = time.monotonic()
    result = host.start(job_of(submitted), tmp_path / "session")

    # A busy machine takes longer, none takes less.
    assert time.monotonic() - begun >= 2.2
    assert result.roots[0].bytes_fetched == 20 * 64 * KIB
    assert sorted(path.name for path in (host.state_dir / "limits").iterdir()) == [
        "download",
        "upload",
    ]


def test_a_queue_with_a_limit_of_its_own_has_an_account_of_its_own(tmp_path: Path) -> None:
    host = Host(tmp_path / "host", f"file://{tmp_path}/store", store={"upload_limit": "50 MiB"})
    with host.config.open("a") as file:
        file.write(f'[queues."{QUEUE}".store]\ndownload_limit = "50 MiB"\n')
    (tmp_path / "show").mkdir()
    (tmp_path / "show/a").write_bytes(b"a")
    submitted, _ = host.submit(tmp_path / "show")
    host.start(job_of(submitted), tmp_path / "session")

    accounts = sorted(path.name for path in (host.state_dir / "limits").iterdir())
    assert accounts == [f"download-{QUEUE}", "upload"]
