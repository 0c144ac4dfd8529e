"""The prefix in which the worker agent finds `deadline_vfs`, and what the agent may ask of it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agent_plugin.content.errors import JobInvalidError, SettingsInvalidError
from agent_plugin.workers.deadline.vfs import MountArguments, parse_unmount
from agent_plugin.workers.deadline.vfs_prefix import prefix_status, remove_prefix, write_prefix

PYTHON = Path(sys.executable)
ARGUMENTS = [
    "/sessions/a/assetroot-1",
    "-f",
    "--clienttype=deadline",
    "--bucket=studio",
    "--manifest=/sessions/a/.vfs_manifests/m.json",
    "--region=us-west-2",
    "-oallow_other",
]


def test_what_the_agent_writes_is_read() -> None:
    more = ["--casprefix=show/jobs/Data", "--cachedir=/sessions/a/.vfs_object_cache"]

    assert MountArguments.parse([*ARGUMENTS, *more]) == MountArguments(
        "/sessions/a/assetroot-1",
        "/sessions/a/.vfs_manifests/m.json",
        "s3://studio/show/jobs",
        "us-west-2",
    )


def test_prefix_and_region_may_be_missing() -> None:
    parsed = MountArguments.parse([*ARGUMENTS[:-2], "--region=None"])

    assert (parsed.store_url, parsed.region) == ("s3://studio/", "")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--turbo=on"], "'--turbo'"),
        (["--bucket"], "'--bucket'"),
        (["-d"], "'-d'"),
        (["-oro"], "'-oro'"),
        (["b/assetroot-1"], "'b/assetroot-1'"),
        (["--casprefix=show"], "--casprefix=show"),
        (["--manifest="], "--manifest"),
    ],
)
def test_what_is_not_known_is_refused_by_name(more: list[str], named: str) -> None:
    with pytest.raises(JobInvalidError, match=named):
        MountArguments.parse([*ARGUMENTS, *more])


@pytest.mark.parametrize("missing", [0, 3, 4])
def test_what_is_needed_and_missing_is_named(missing: int) -> None:
    with pytest.raises(JobInvalidError, match="missing"):
        MountArguments.parse([*ARGUMENTS[:missing], *ARGUMENTS[missing + 1 :]])


@pytest.mark.parametrize("arguments", [["-u"], ["/a"], ["-u", "/a", "/b"], ["-u", "-o", "/a"]])
def test_only_to_unmount_one_place_is_understood(arguments: list[str]) -> None:
    assert parse_unmount(["-u", "/a b"]) == "/a b"
    with pytest.raises(JobInvalidError):
        parse_unmount(arguments)


def test_a_prefix_is_written_told_and_removed(tmp_path: Path) -> None:
    directory = tmp_path / "opt/vfs"
    before = os.umask(0o077)
    try:
        write_prefix(directory, PYTHON)
        write_prefix(directory, PYTHON)
    finally:
        os.umask(before)

    assert (prefix_status(directory).python, prefix_status(directory).defect) == (str(PYTHON), "")
    programs = ("bin/deadline_vfs", "link/fusermount3", "lib")
    assert {stat.S_IMODE((directory / name).stat().st_mode) for name in programs} == {0o755}
    assert remove_prefix(directory)
    assert not directory.exists()
    assert not remove_prefix(directory)


def test_what_is_not_right_in_a_prefix_is_told(tmp_path: Path) -> None:
    write_prefix(tmp_path, tmp_path / "gone")
    assert "gone" in prefix_status(tmp_path).defect
    write_prefix(tmp_path, PYTHON)
    (tmp_path / "link/fusermount3").write_text("another")
    assert "link/fusermount3" in prefix_status(tmp_path).defect


def test_a_directory_of_somebody_else_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/deadline_vfs").touch()

    with pytest.raises(SettingsInvalidError, match="not empty"):
        write_prefix(tmp_path, PYTHON)

    assert not prefix_status(tmp_path).installed
    assert not remove_prefix(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["bin", "deadline_vfs"]


def test_a_prefix_that_the_agents_shell_would_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalidError, match="quotes no paths"):
        write_prefix(tmp_path / "a b", PYTHON)


def test_a_prefix_whose_python_is_gone_says_so(tmp_path: Path) -> None:
    write_prefix(tmp_path, tmp_path / "gone")
    script = tmp_path / "scripts/production/al2/run_deadline_vfs_al2.sh"

    done = subprocess.run([script, "/mnt"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout.count("install the prefix again")) == (1, 1)
