"""Outputs brought with the help of the Deadline API: a queue's store and keys, and profiles."""

import os
import pty
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.servers.deadline_jobs import JSON
from tests.servers.deadline_service import FARM_ID, Credentials, DeadlineService, Queue
from tests.servers.farm_work import FarmWork
from tests.servers.hooks import CALL_SECONDS, Host
from tests.servers.s3_server import S3Server
from tests.servers.secret_watch import files_with
from tests.servers.trees import files_below

QUEUE_ID = "queue-" + "b" * 32
OURS, LINUX, WINDOWS, STRANGE = (f"sp-{digit * 32}" for digit in "0123")
ALL = ("--bootstrap-lookback-minutes", "inf")


def profile(family: str, **locations: str) -> JSON:
    return {
        "displayName": f"{family} of {len(locations)}",
        "osFamily": family,
        "fileSystemLocations": [
            {"name": name, "path": path, "type": "LOCAL"} for name, path in locations.items()
        ],
    }


@dataclass
class Farm:
    """A farm with one queue, its worker, and an artist who has no key of the store."""

    service: DeadlineService
    work: FarmWork
    artist: Host
    here: Path

    def sync(self, *words: str | Path, code: int = 0) -> Any:
        ids = ("--farm-id", FARM_ID, "--queue-id", QUEUE_ID)
        return self.artist.call("outputs", "sync", *words, *ids, code=code)

    def url(self, job_id: str, scheme: str = "deadline", more: str = "") -> str:
        ids = f"farm-id={FARM_ID}&queue-id={QUEUE_ID}&job-id={job_id}"
        return f"{scheme}://download-output?{ids}{more}"

    @property
    def operations(self) -> list[str]:
        return [exchange.path.rpartition("/")[2] for exchange in self.service.exchanges]


@pytest.fixture
def farm(s3: S3Server, tmp_path: Path) -> Iterator[Farm]:
    prefix = f"root-{uuid.uuid4().hex}"
    here = tmp_path / "here"
    service = DeadlineService(
        bucket=s3.bucket,
        credentials=Credentials(s3.access_key, s3.secret_key, ""),
        queues=[Queue(QUEUE_ID, prefix)],
        storage_profiles={
            OURS: profile("linux", Show=str(here / "show"), Tex=str(here / "tex")),
            LINUX: profile("linux", Show="/mnt/show", Other="/mnt/other"),
            WINDOWS: profile("windows", Show="S:\\", Tex="T:\\Shared\\Tex"),
            STRANGE: profile("linux", Nothing="/mnt"),
        },
    )
    with service:
        # Keys that the store does not know: what it answers comes by the queue's role.
        environment = {
            **s3.environment,
            **service.environment,
            "AWS_ACCESS_KEY_ID": "AKIDOFTHEARTIST",
            "AWS_SECRET_ACCESS_KEY": "not known to the store",
        }
        store_url = f"s3://{s3.bucket}/{prefix}"
        worker = Host(tmp_path / "worker", store_url, environment=s3.environment)
        yield Farm(
            service,
            FarmWork(tmp_path / "sessions", service, QUEUE_ID, worker),
            Host(tmp_path / "artist", store_url, environment=environment),
            here,
        )


def contents(root: Path) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in files_below(root)}


def test_the_store_and_its_keys_come_from_the_farm(farm: Farm) -> None:
    job = farm.work.job(str(farm.here / "own"), 2)
    farm.work.work({job.job_id: [{"a": b"1"}, {"b": b"2"}]})

    ids = ("--farm-id", FARM_ID, "--queue-id", QUEUE_ID)
    done = farm.artist.run("outputs", "sync", *ALL, *ids, "--json")

    assert done.returncode == 0, done.stderr
    result = msgspec.json.decode(done.stdout)
    assert (result["files"], result["failed"]) == (2, 0)
    # They are in no file.
    secrets = [farm.service.credentials.secret_key]
    assert list(files_with(secrets, farm.artist.home, except_below=farm.here)) == []
    assert contents(farm.here / "own") == {"a": b"1", "b": b"2"}
    assert "user-roles" in farm.operations
    # Job states and session actions are not asked for.
    assert {"sessions", "session-actions", "jobs"}.isdisjoint(farm.operations)


def test_the_keys_of_a_queue_are_renewed_before_they_end(farm: Farm) -> None:
    """Seen to fail when they are taken as they were at the start."""
    job = farm.work.job(str(farm.here / "own"), 1)
    farm.work.work({job.job_id: [{"a": b"1"}]})
    ended = Credentials("AKIDTHATENDS", "not known to the store any more", "token")
    farm.service.ending = (ended, 60.0)

    result = farm.sync(*ALL)

    assert (result["files"], result["failed"]) == (1, 0)
    assert farm.operations.count("user-roles") == 2


def test_storage_profiles_map_each_jobs_paths(farm: Farm) -> None:
    jobs = {
        "same": farm.work.job(str(farm.here / "own"), 1, profile=OURS),
        "linux": farm.work.job("/mnt/show/b", 1, profile=LINUX),
        "windows": farm.work.job("T:\\shared\\tex", 1, path_format="windows", profile=WINDOWS),
        "elsewhere": farm.work.job("/mnt/other", 1, profile=LINUX),
        "strange": farm.work.job("/mnt/c", 1, profile=STRANGE),
        "none": farm.work.job(str(farm.here / "show/d"), 1),
    }
    farm.work.work({job.job_id: [{f"d/{name}": name.encode()}] for name, job in jobs.items()})

    result = farm.sync("--storage-profile-id", OURS, *ALL)

    assert contents(farm.here) == {
        # In none of the profile's locations, and on the same host.
        "own/d/same": b"same",
        "show/b/d/linux": b"linux",
        "tex/d/windows": b"windows",
    }
    told = {job["jobId"]: job for job in result["jobs"]}
    assert told[jobs["elsewhere"].job_id]["unmapped"] == ["/mnt/other: d/elsewhere"]
    assert "no file system location in common" in told[jobs["strange"].job_id]["reason"]
    assert "no storage profile" in told[jobs["none"].job_id]["reason"]
    assert told[jobs["none"].job_id]["state"] == "skipped"


def test_what_had_no_place_comes_when_a_profile_gives_it_one_and_is_told_when_named(
    farm: Farm,
) -> None:
    """Seen to fail when what was skipped counts as brought, and when it is asked for each time."""
    jobs = {
        "elsewhere": farm.work.job("/mnt/other", 1, profile=LINUX),
        "strange": farm.work.job("/mnt/c", 1, profile=STRANGE),
        "none": farm.work.job("/mnt/show/d", 1),
    }
    farm.work.work({job.job_id: [{f"d/{name}": name.encode()}] for name, job in jobs.items()})
    profile_of_this_host = ("--storage-profile-id", OURS)
    assert farm.sync(*profile_of_this_host, *ALL)["files"] == 0

    asked = len(farm.operations)
    assert farm.sync(*profile_of_this_host)["jobs"] == []
    # Whose profile is known is not asked for again.
    assert [each for each in jobs.values() if each.job_id in farm.operations[asked:]] == []
    again = farm.sync(*profile_of_this_host, jobs["none"].job_id, jobs["strange"].job_id)
    assert {job["jobId"]: job["state"] for job in again["jobs"]} == {
        jobs["none"].job_id: "skipped",
        jobs["strange"].job_id: "skipped",
    }

    farm.service.storage_profiles = {
        **farm.service.storage_profiles,
        OURS: profile("linux", Other=str(farm.here / "other"), Nothing=str(farm.here / "n")),
    }
    came = farm.sync(*profile_of_this_host)

    assert {job["jobId"] for job in came["jobs"]} == {
        jobs["elsewhere"].job_id,
        jobs["strange"].job_id,
    }
    assert contents(farm.here) == {"other/d/elsewhere": b"elsewhere", "n/c/d/strange": b"strange"}


def test_a_profile_or_queue_that_the_farm_does_not_know_is_told(farm: Farm) -> None:
    unknown = f"sp-{'f' * 32}"

    assert f"storage profile {unknown}" in farm.sync("--storage-profile-id", unknown, code=66)


def test_a_farm_that_does_not_answer_is_told(farm: Farm) -> None:
    farm.artist.environment["AWS_ENDPOINT_URL_DEADLINE"] = "http://127.0.0.1:9"

    assert "ask the farm for queue" in farm.sync(code=68)


# --------------------------------------------------------------------------------------- the URLs


@pytest.mark.slow
def test_a_url_of_the_monitor_brings_the_outputs_to_the_jobs_own_paths(farm: Farm) -> None:
    job = farm.work.job(str(farm.here / "own"), 2)
    farm.work.work({job.job_id: [{"a": b"1"}, {"b": b"2"}]})
    (farm.here / "own").mkdir(parents=True)
    (farm.here / "own/a").write_bytes(b"mine")
    task = job.steps[0].tasks[0]
    only = f"&step-id={job.steps[0].step_id}&task-id={task.task_id}"

    of_task = farm.artist.run("handle-url", "--yes", "--json", farm.url(job.job_id, more=only))

    assert of_task.returncode == 0, of_task.stderr
    # What is there is nobody's to replace but its user's.
    assert contents(farm.here / "own") == {"a": b"mine", "a (1)": b"1"}
    assert msgspec.json.decode(of_task.stdout)["copies"] == [str(farm.here / "own/a (1)")]
    elsewhere = farm.artist.run(
        *("handle-url", "--yes", "--to", farm.here / "to", farm.url(job.job_id, more=only))
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    [root] = (farm.here / "to").iterdir()
    assert contents(root) == {"a": b"1"}
    whole = farm.artist.run("handle-url", farm.url(job.job_id), "--yes")
    assert whole.returncode == 0, whole.stderr
    assert "done: 2 files" in whole.stdout
    assert contents(farm.here / "own") == {"a": b"mine", "a (1)": b"1", "b": b"2"}


@pytest.mark.slow
def test_a_profile_in_a_url_is_the_one_that_is_used(farm: Farm) -> None:
    job = farm.work.job(str(farm.here / "own"), 1)
    farm.work.work({job.job_id: [{"a": b"1"}]})
    url = farm.url(job.job_id, more="&profile=studio+monitor")

    without = farm.artist.run("handle-url", "--yes", url)
    (farm.artist.home / ".aws").mkdir()
    (farm.artist.home / ".aws/credentials").write_text(
        "[studio monitor]\naws_access_key_id = AKID\naws_secret_access_key = secret\n"
    )
    with_it = farm.artist.run("handle-url", "--yes", url)

    assert without.returncode == 67
    assert "studio monitor" in without.stderr
    assert with_it.returncode == 0, with_it.stderr
    assert contents(farm.here / "own") == {"a": b"1"}


@pytest.mark.parametrize(
    ("answer", "code", "files", "scheme"),
    [
        ("\n", 0, 1, "deadline"),
        pytest.param("n\n", 77, 0, "deadline", marks=pytest.mark.slow),
        ("\n", 77, 0, "propmaster"),
    ],
)
def test_who_clicks_is_asked_and_the_terminal_stays_until_a_key(
    farm: Farm, answer: str, code: int, files: int, scheme: str
) -> None:
    """Of a store that the URL names nothing comes to whoever only presses Enter."""
    job = farm.work.job(str(farm.here / "own"), 1)
    farm.work.work({job.job_id: [{"a": b"1"}]})
    more, place = "", str(farm.here / "own")
    if scheme == "propmaster":
        farm.artist.environment |= {
            "AWS_ACCESS_KEY_ID": farm.service.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": farm.service.credentials.secret_key,
        }
        more = f"&store={farm.artist.store_url}"
        place = f"{farm.artist.home}/Downloads/propmaster/{job.job_id}"
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        farm.artist.argv(
            "handle-url", "--prompt-when-complete", farm.url(job.job_id, scheme, more)
        ),
        env=farm.artist.process_environment(),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    assert running.stdout is not None
    told = ""
    while "press Enter to close" not in told and (line := running.stdout.readline()):
        told += line
    assert running.poll() is None, told
    assert len(contents(Path(place)) if Path(place).exists() else {}) == files
    os.write(ours, b"\n")
    running.communicate(timeout=CALL_SECONDS)
    os.close(ours)

    assert running.returncode == code, told
    assert f"1 files would go below {place}" in told
    assert ("which the URL names" in told) == (scheme == "propmaster")


def test_where_nobody_can_be_asked_nothing_is_downloaded(farm: Farm) -> None:
    done = farm.artist.run("handle-url", farm.url("job-" + "0" * 32))

    assert done.returncode == 77
    assert "--yes" in done.stderr
    assert farm.service.exchanges == []


def test_a_url_with_a_store_writes_to_the_downloads_only(farm: Farm) -> None:
    """Whoever made the store chose its root paths, too."""
    own = farm.here / "own"
    job = farm.work.job(str(own), 1)
    farm.work.work({job.job_id: [{"a": b"1"}]})
    farm.artist.environment |= {
        "AWS_ACCESS_KEY_ID": farm.service.credentials.access_key,
        "AWS_SECRET_ACCESS_KEY": farm.service.credentials.secret_key,
    }
    (farm.artist.home / ".config").mkdir()
    (farm.artist.home / ".config/user-dirs.dirs").write_text(
        '# written by xdg-user-dirs\nXDG_DESKTOP_DIR="$HOME/D"\nXDG_DOWNLOAD_DIR="$HOME/Mine"\n'
    )
    url = farm.url(job.job_id, "propmaster", f"&store={farm.artist.store_url}")

    done = farm.artist.run("handle-url", "--yes", "--json", url)

    assert done.returncode == 0, done.stderr
    assert not own.exists()
    [root] = msgspec.json.decode(done.stdout)["roots"]
    assert root["localRoot"].startswith(
        f"{farm.artist.home}/Mine/propmaster/{job.job_id}/assetroot-"
    )
    assert contents(Path(root["localRoot"])) == {"a": b"1"}
    # The farm was not asked.
    assert [each for each in farm.service.exchanges if each.method == "GET"] == []
