"""`propmaster doctor` says what the host can do, changes nothing, and tells no secret."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.directory_store import DirectoryStore
from agent_plugin.doctor_files import file_system_of
from tests.servers.command import CALL_SECONDS, Command, Done
from tests.servers.disks import read_only
from tests.servers.s3_server import S3Server

NAMES = {
    *("platform", "python", "libraries", "settings", "clock", "open_files", "state_directory"),
    *("cache_directory", "cache_space", "session_directory", "name_folding", "o_tmpfile"),
    *("user_xattr", "reflink", "copy_file_range", "credentials", "endpoint"),
    *("dev_fuse", "cap_sys_admin", "fusermount", "user_allow_other", "user_namespaces"),
    *("kernel_transport", "fusepy_transport", "overlayfs", "passthrough", "virtual"),
}
STORE_NAMES = {"store", "store_list", "store_get", "store_put", "store_owner"}


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    directory = tmp_path / "sessions"
    directory.mkdir()
    return directory


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "host")


def _probes(done: Done) -> dict[str, dict[str, Any]]:
    return {probe["name"]: probe for probe in done.json["probes"]}


def test_a_fresh_host_is_fit_and_is_left_as_it_was(
    command: Command, sessions: Path, tmp_path: Path
) -> None:
    done = command("doctor", "--session-dir", sessions, "--json")

    assert (done.code, done.json["copied"]) == (0, True)
    probes = _probes(done)
    assert set(probes) == NAMES
    assert all(probe["reason"] and probe["consequence"] for probe in probes.values())
    assert {probe["ok"] for probe in probes.values()} <= {True, False, "unknown"}
    assert probes["copy_file_range"]["ok"] is True
    assert done.json["virtual"] == probes["virtual"]["ok"]
    if os.geteuid() == 0:
        mounting = ("kernel_transport", "overlayfs", "virtual")
        assert [probes[name]["ok"] for name in mounting] == [True, True, True]
        assert "a file was mounted and read" in probes["kernel_transport"]["reason"]
        assert probes["virtual"]["reason"].startswith("transport kernel (it is the faster one")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["sessions"]


def test_the_text_gives_each_probe_a_line_and_the_verdict_last(
    command: Command, sessions: Path
) -> None:
    done = command("doctor", "--session-dir", sessions)

    lines = done.text.splitlines()
    assert lines[-2] == "COPIED sessions can run here."
    assert lines[-1].startswith("VIRTUAL sessions ")
    assert {line.split()[1] for line in lines[:-2] if line and not line.startswith(" ")} == NAMES


def test_a_state_directory_that_others_can_write_fails(command: Command, sessions: Path) -> None:
    command.state_dir.mkdir(parents=True)
    command.state_dir.chmod(0o777)
    done = command("doctor", "--session-dir", sessions, "--json")

    probe = _probes(done)["state_directory"]
    assert (done.code, probe["ok"], probe["needed"]) == (1, False, True)
    assert "mode 0777" in probe["reason"]


def test_a_cache_directory_that_is_a_link_fails(
    command: Command, sessions: Path, tmp_path: Path
) -> None:
    command.cache_dir.parent.mkdir()
    command.cache_dir.symlink_to(tmp_path)
    done = command("doctor", "--session-dir", sessions)

    assert done.code == 1
    assert "FAILS   cache_directory" in done.text
    assert "No session can run here" in done.text


def test_a_wrong_settings_file_is_named_and_the_other_probes_go_on(
    command: Command, sessions: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("[paths]\ncache_dri = '/x'\n")
    done = command("doctor", "--session-dir", sessions, "--config", settings, "--json")

    probes = _probes(done)
    assert (done.code, probes["settings"]["ok"]) == (1, False)
    assert "cache_dri" in probes["settings"]["reason"]
    assert probes["endpoint"]["ok"] is True


def test_too_few_open_files_fail(sessions: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent_plugin", "doctor", "--session-dir", sessions],
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)),
    )

    assert done.returncode == 1
    assert "FAILS   open_files" in done.stdout


def test_a_session_directory_on_a_read_only_place_fails(command: Command) -> None:
    done = command("doctor", "--session-dir", "/proc/sessions", "--json")

    probes = _probes(done)
    assert (done.code, probes["session_directory"]["ok"]) == (1, False)
    assert "reflink" not in probes


def test_a_store_in_s3_may_be_listed_and_read_and_is_not_written(
    s3: S3Server, s3_prefix: str, sessions: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "host", s3.environment)
    url = f"s3://{s3.bucket}/{s3_prefix}"
    done = command("doctor", "--session-dir", sessions, "--store", url, "--json")

    probes = _probes(done)
    assert (done.code, set(probes)) == (0, NAMES | STORE_NAMES)
    assert {name: probes[name]["ok"] for name in STORE_NAMES} == {
        "store": True,
        "store_list": True,
        "store_get": True,
        "store_put": "unknown",
        "store_owner": "unknown",
    }
    assert s3.endpoint_url in probes["endpoint"]["reason"]
    listed = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix=s3_prefix)
    assert listed["KeyCount"] == 0


def test_no_secret_is_told_only_where_it_comes_from(
    s3: S3Server, s3_prefix: str, sessions: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "host", s3.environment)
    url = f"s3://{s3.bucket}/{s3_prefix}"
    done = command("doctor", "--session-dir", sessions, "--store", url)

    assert "from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in done.text
    told = done.text + done.stderr
    assert (s3.secret_key in told, s3.access_key in told) == (False, False)


def test_keys_of_a_profile_are_told_by_botocores_name(
    s3: S3Server, sessions: Path, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text(
        f"[farm]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    command = Command(
        tmp_path / "host",
        {"AWS_SHARED_CREDENTIALS_FILE": str(credentials), "AWS_PROFILE": "farm"},
    )
    done = command("doctor", "--session-dir", sessions, "--json")

    probe = _probes(done)["credentials"]
    assert (probe["ok"], probe["reason"]) == (
        True,
        "from shared-credentials-file, found by botocore",
    )


def test_the_write_probe_stores_one_document_where_it_may(
    s3: S3Server, s3_prefix: str, sessions: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "host", s3.environment)
    url = f"s3://{s3.bucket}/{s3_prefix}"
    for _ in range(2):
        done = command(
            "doctor", "--session-dir", sessions, "--store", url, "--write-probe", "--json"
        )
        assert (done.code, _probes(done)["store_put"]["ok"]) == (0, True)

    listed = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix=s3_prefix)
    assert [item["Key"] for item in listed["Contents"]] == [
        f"{s3_prefix}/Manifests/propmaster-doctor/write-probe"
    ]


def test_credentials_that_may_only_read_fail_the_write_probe(
    s3: S3Server, s3_prefix: str, sessions: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "host", s3.read_only_environment)
    url = f"s3://{s3.bucket}/{s3_prefix}"
    done = command("doctor", "--session-dir", sessions, "--store", url, "--write-probe", "--json")

    probes = _probes(done)
    assert (done.code, probes["store_get"]["ok"], probes["store_put"]["ok"]) == (1, True, False)


def test_a_store_that_nobody_serves_fails_and_needs_no_credentials_if_it_is_a_directory(
    sessions: Path, tmp_path: Path
) -> None:
    unreachable = Command(
        tmp_path / "host",
        {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        },
    )
    done = unreachable("doctor", "--session-dir", sessions, "--store", "s3://bucket/p", "--json")
    assert (done.code, _probes(done)["store_list"]["ok"]) == (1, False)

    store = DirectoryStore(tmp_path / "store")
    store.make()
    command = Command(tmp_path / "host")
    done = command("doctor", "--session-dir", sessions, "--store", store.url, "--json")
    assert (done.code, _probes(done)["store_get"]["ok"]) == (0, True)

    absent = f"file://{tmp_path}/not/mounted"
    done = command("doctor", "--session-dir", sessions, "--store", absent, "--json")
    assert (done.code, _probes(done)["store"]["ok"]) == (1, False)


@pytest.mark.slow
def test_a_store_that_hangs_is_asked_once(sessions: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        command = Command(tmp_path / "host", {**keys, "AWS_ENDPOINT_URL_S3": endpoint})
        done = command("doctor", "--session-dir", sessions, "--store", "s3://bucket/p", "--json")

    probes = _probes(done)
    assert (done.code, probes["store_list"]["ok"]) == (1, False)
    assert {probes[name]["ok"] for name in ("store_get", "store_put")} == {"unknown"}
    assert "does not answer" in probes["store_get"]["reason"]


def test_a_store_in_a_directory_that_can_still_be_made_is_well_and_is_not_made(
    command: Command, sessions: Path, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/new%20store"
    done = command("doctor", "--session-dir", sessions, "--store", url, "--json")

    probes = _probes(done)
    assert (done.code, probes["store"]["ok"]) == (0, True)
    assert "is not there yet" in probes["store"]["reason"]
    assert "store_list" not in probes
    assert not (tmp_path / "new store").exists()
    probed = command("doctor", "--session-dir", sessions, "--store", url, "--write-probe", "--json")
    assert (probed.code, _probes(probed)["store_put"]["ok"]) == (0, True)


@pytest.mark.parametrize("which", ["state_directory", "store"])
def test_what_can_not_be_written_fails(
    command: Command, sessions: Path, tmp_path: Path, which: str
) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    if which == "state_directory":
        command.state_dir.mkdir(parents=True)
        place = command.state_dir
    url = f"file://{place}/store"
    with read_only(place):
        done = command("doctor", "--session-dir", sessions, "--store", url, "--json")

    probe = _probes(done)[which]
    assert (done.code, probe["ok"], probe["needed"]) == (1, False, True)
    assert "may not be written" in probe["reason"]


def test_directories_that_others_can_read_but_not_write_are_said_to_be_that(
    command: Command, sessions: Path
) -> None:
    for directory in (command.state_dir, command.cache_dir):
        directory.mkdir(mode=0o755, parents=True)
    probes = _probes(command("doctor", "--session-dir", sessions, "--json"))

    for name in ("state_directory", "cache_directory"):
        assert probes[name]["ok"] is True
        assert "can be written by this user alone" in probes[name]["reason"]


def test_the_file_system_of_a_path_is_told_even_if_it_is_not_there(tmp_path: Path) -> None:
    assert file_system_of(Path("/proc/self")) == "proc"
    assert file_system_of(tmp_path / "absent" / "too") == file_system_of(tmp_path)
