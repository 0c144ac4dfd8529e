"""`propmaster submit` refuses what can not be right before it reads the files."""

import os
from pathlib import Path

import pytest

from agent_plugin.content.errors import StoreAccessError
from agent_plugin.transfer.ledger import Ledger
from tests.servers.command import Command, Done
from tests.servers.hooks import FARM, QUEUE, Host, action, job_with_outputs
from tests.servers.s3_server import S3Server
from tests.servers.trees import write_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    write_files(root, {"scene.usd": b"a scene", "tex/wood.tx": b"wood"}, mtime_ns=0)
    # A walk tells of it.
    os.mkfifo(root / "fifo")
    return root


def submit(command: Command, tree: Path, store: str, *options: str) -> Done:
    ids = ("--farm-id", FARM, "--queue-id", QUEUE)
    return command("submit", tree, "--store", store, *ids, *options)


@pytest.mark.parametrize(
    ("store", "code", "cause"),
    [
        ("ftp://bucket/show", 67, "'ftp://bucket/show' is not a store"),
        ("file:///absent/show", 70, "/absent/show: No such file or directory"),
        ("s3://no-such-bucket/show", 70, "the bucket itself is missing"),
    ],
)
def test_a_wrong_store_is_told_before_the_files_are_read_and_none_is_blamed(
    s3: S3Server, tree: Path, tmp_path: Path, store: str, code: int, cause: str
) -> None:
    command = Command(tmp_path / "host", s3.environment)
    done = submit(command, tree, store)

    assert done.code == code, done.stderr
    assert (cause in done.stderr, "scene.usd" in done.stderr) == (True, False)
    assert "wood.tx" not in done.stderr
    assert "file.skipped" not in [event["event"] for event in done.events], "no file was looked at"
    with Ledger.open(command.state_dir / "ledger.db") as ledger:
        assert ledger.transfers() == []


def test_without_credentials_no_file_is_blamed(tree: Path, tmp_path: Path) -> None:
    done = submit(Command(tmp_path / "host"), tree, "s3://bucket/show")

    assert done.code == 70
    assert "error[store-access-denied]: there are no AWS credentials" in done.stderr
    assert done.text == ""


@pytest.mark.parametrize(
    ("store", "cause"),
    [("s3://bucket/show", "there are no AWS credentials"), ("file:///absent/show", "/absent/show")],
)
def test_a_task_that_can_not_open_its_store_blames_no_output(
    tmp_path: Path, store: str, cause: str
) -> None:
    host = Host(tmp_path / "host", store, environment={"HOME": str(tmp_path)})
    job = job_with_outputs(host.store_url, "/projects/show")
    root = Path(host.start(job, tmp_path / "session").roots[0].local_root)
    write_files(root, {"renders/1.exr": b"one"}, mtime_ns=0)

    with pytest.raises(StoreAccessError, match=f"^{cause}"):
        host.finish_task(tmp_path / "session", action(1, 0))


@pytest.mark.parametrize("directory", ["", "/absolute", "a/../b"])
def test_an_output_directory_that_is_none_is_refused(
    tree: Path, tmp_path: Path, directory: str
) -> None:
    store = f"file://{tmp_path}/store"
    done = submit(Command(tmp_path / "host"), tree, store, "--output-dir", directory)

    assert done.code == 66
    assert f"error[job-invalid]: --output-dir {directory!r} is not below ROOT" in done.stderr
    assert not (tmp_path / "store").exists()
