"""The unmodified client's `queue sync-output` and `outputs sync`, side by side."""

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers.deadline_command import DeadlineCommand
from tests.servers.deadline_service import FARM_ID, DeadlineService, Queue
from tests.servers.farm_work import FarmWork
from tests.servers.hooks import Host
from tests.servers.role_store import RoleStore
from tests.servers.trees import files_below
from tests.servers.worker_rig import BUCKET

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

QUEUE_ID = "queue-" + "b" * 32
OURS, THEIRS = (f"sp-{digit * 32}" for digit in "01")


@dataclass
class Side:
    """The queue, its worker, the client and our command on two hosts that share a file system."""

    service: DeadlineService
    work: FarmWork
    client: DeadlineCommand
    artist: Host

    def sync(self, *words: str) -> Any:
        ids = ("--farm-id", FARM_ID, "--queue-id", QUEUE_ID)
        return self.artist.call("outputs", "sync", *ids, *words)


@pytest.fixture
def side(role_store: RoleStore, tmp_path: Path) -> Iterator[Side]:
    prefix = f"root-{uuid.uuid4().hex[:12]}"
    credentials = role_store.assume_role()
    service = DeadlineService(
        bucket=BUCKET,
        credentials=credentials,
        queues=[Queue(QUEUE_ID, prefix)],
        storage_profiles={
            OURS: _profile("linux", tmp_path / "mapped"),
            THEIRS: _profile("windows", "S:\\Projects"),
        },
    )
    with service:
        environment = {
            **role_store.environment,
            **role_store.endpoints,
            **service.environment,
        }
        store = {
            **environment,
            "AWS_ACCESS_KEY_ID": credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
            "AWS_SESSION_TOKEN": credentials.session_token,
        }
        worker = Host(tmp_path / "worker", f"s3://{BUCKET}/{prefix}", environment=store)
        yield Side(
            service,
            FarmWork(tmp_path / "sessions", service, QUEUE_ID, worker),
            DeadlineCommand(tmp_path / "client", environment),
            Host(tmp_path / "artist", worker.store_url, environment=environment),
        )


def _profile(family: str, path: Path | str) -> dict[str, Any]:
    location = {"name": "Projects", "path": str(path), "type": "LOCAL"}
    return {"displayName": family, "osFamily": family, "fileSystemLocations": [location]}


def _moved(root: Path, to: Path) -> Path:
    """Put a tree aside, so that the other side makes it anew."""
    return root.rename(to)


def test_sync_brings_what_the_clients_own_sync_brings(side: Side, tmp_path: Path) -> None:
    show = tmp_path / "show"
    first = side.work.job(str(show), 3)
    second = side.work.job(str(show / "nested"), 1)
    side.work.work(
        {
            first.job_id: [
                {"a/1.exr": 3000, "same.txt": b"one", "\u00e9 \U0001f3ac/.dots": b"hidden"},
                {"a/2.exr": 9_000_000, "empty": b""},
                {"a/3.exr": b"three", "both": b"one root"},
            ],
            second.job_id: [{"b.exr": b"nested", "deeper/c.exr": 2_000_000}],
        }
    )
    side.client.sync_output(QUEUE_ID)
    theirs = _moved(show, tmp_path / "theirs")

    result = side.sync("--bootstrap-lookback-minutes", "600")

    assert _rounded(show) == _rounded(theirs)
    assert result["files"] == len(files_below(theirs)) == 9
    ours = _moved(show, tmp_path / "ours")

    third = side.work.job(str(show), 2)
    side.work.work({third.job_id: [{"a/1.exr": b"again"}, {"new": b"new"}]})
    side.client.sync_output(QUEUE_ID)
    theirs = _moved(show, tmp_path / "theirs again")
    result = side.sync()

    assert _rounded(show) == _rounded(theirs)
    assert sorted(files_below(show)) == ["a/1.exr", "new"]
    assert result["files"] == 2
    assert sorted(files_below(ours)) != sorted(files_below(show))


@pytest.mark.slow
def test_sync_maps_paths_as_the_client_does(side: Side, tmp_path: Path) -> None:
    job = side.work.job("s:\\projects\\Shot 1", 2, path_format="windows", profile=THEIRS)
    side.work.work({job.job_id: [{"a/1.exr": b"1"}, {"a/2.exr": b"2"}]})
    side.client.sync_output(QUEUE_ID, storage_profile_id=OURS)
    theirs = _moved(tmp_path / "mapped", tmp_path / "theirs")
    # Its notes for other programs, in each location.
    shutil.rmtree(theirs / ".deadline")

    side.sync("--bootstrap-lookback-minutes", "600", "--storage-profile-id", OURS)

    assert sorted(files_below(theirs)) == ["Shot 1/a/1.exr", "Shot 1/a/2.exr"]
    assert _rounded(tmp_path / "mapped") == _rounded(theirs)


def _rounded(root: Path) -> dict[str, tuple[int, int, str]]:
    """Return the files; the client sets times through a float, perhaps a microsecond off."""
    return {
        path: (facts.size, (facts.mtime_us + 5) // 10, facts.sha256)
        for path, facts in files_below(root).items()
    }
