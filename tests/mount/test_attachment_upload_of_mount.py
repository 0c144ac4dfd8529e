"""The agent's attachment scripts, as propmaster has them, and roots that are mounted."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.manifest import decode
from agent_plugin.session.roots import session_directory_name
from agent_plugin.workers.call import JobUser
from tests.servers.attachment_calls import AgentSession
from tests.servers.hooks import Host, action, job_of, job_with_outputs
from tests.servers.other_user import NOBODY
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files
from tests.servers.vfs_dropin import DropIn

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

FILES = {"scene.usd": b"#usda 1.0\n", "tex/wood.tx": b"w" * 50_000, "renders/old.exr": b"old"}


@pytest.fixture
def drop_in(tmp_path: Path, s3: S3Server, s3_prefix: str) -> Iterator[DropIn]:
    with DropIn(tmp_path, s3, s3_prefix) as drop_in:
        drop_in.root = drop_in.session_dir / session_directory_name("/show")
        yield drop_in


def test_what_was_written_to_a_mount_is_uploaded_and_no_input_is_read(drop_in: DropIn) -> None:
    """Nobody of ours has started the session: the agent says what its roots are."""
    manifest = drop_in.stored(FILES)
    drop_in.here(drop_in.arguments(drop_in.manifest_file(manifest)))
    job = job_with_outputs(drop_in.host.store_url, "/show", "renders", "tex")
    session = AgentSession(drop_in.host, job, drop_in.session_dir)
    (drop_in.session_dir / "manifests").mkdir()
    path = drop_in.session_dir / "manifests" / "show_job"
    path.write_bytes(drop_in.manifest_file(manifest).read_bytes())
    session.roots[os.fspath(drop_in.root)]["localManifestPaths"].append(os.fspath(path))

    (drop_in.root / "renders/1.exr").write_bytes(b"first")
    said = session.finish(action(1, 0))
    fetched = drop_in.status()["counts"]["bytes_fetched"]
    nothing = session.finish(action(1, 1))

    assert said.exit_code == 0, said.lines
    [snapshot] = said.snapshots
    stored = decode((drop_in.session_dir / snapshot["manifest"]).read_bytes(), source="it")
    assert [entry.path for entry in stored.entries] == ["renders/1.exr"]
    assert fetched == 0
    assert nothing.snapshots == []
    assert "no outputs to upload" in nothing.plain
    assert drop_in.unmount_here() == 0


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others can get to: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="propmaster-mounted-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


def as_job(script: str, root: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("becoming another user needs setpriv")
    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    done = subprocess.run(
        [*argv, "/bin/bash", "-euc", script],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_queue_whose_inputs_are_mounted_for_the_job_user(
    s3: S3Server, s3_prefix: str, tmp_path: Path, place: Path
) -> None:
    """Outputs of another step come over the mount, as over a copy."""
    url = f"s3://{s3.bucket}/{s3_prefix}"
    host = Host(
        tmp_path / "worker",
        url,
        environment=s3.environment,
        settings={"inputs": {"file_system": "VIRTUAL"}},
    )
    files: dict[str | bytes, bytes | int] = {}
    files.update(FILES.items())
    write_files(tmp_path / "source", files, mtime_ns=1_600_000_000 * 10**9)
    job = job_of(host.submit(tmp_path / "source", output_directories=["renders"])[0])
    first, second = (
        AgentSession(host, job, place / name, job_user=JobUser(NOBODY, NOBODY))
        for name in ("first", "second")
    )
    try:
        started = [first.sync_job(), second.sync_job()]
        as_job("echo better > renders/old.exr; mkdir renders/a; echo > renders/a/b", first.root())
        stored = first.finish(action(1))
        synced = second.sync_step(action(1).step_id)
        as_job("cat renders/old.exr >> renders/a/b; chmod 600 renders/a/b", second.root())
        later = second.finish(action(2))

        assert [said.exit_code for said in (*started, stored, synced, later)] == [0] * 5
        assert os.path.ismount(first.root())
        assert (second.root() / "renders/old.exr").read_text() == "better\n"
        assert second.root().joinpath("renders/a/b").stat().st_uid == NOBODY
        assert files_below(first.root()).keys() == {*FILES, "renders/a/b"}
        paths = [
            [entry.path for entry in decode(data, source="it").entries]
            for session, said in ((first, stored), (second, later))
            for data in [(session.directory / said.snapshots[0]["manifest"]).read_bytes()]
        ]
        assert paths == [["renders/a/b", "renders/old.exr"], ["renders/a/b"]]
    finally:
        for session in (first, second):
            host.end(session.directory)


def test_a_task_on_a_mount_whose_outputs_the_agents_own_script_has_uploaded(
    s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    """It reads through the mount; the next task's outputs are that task's alone."""
    host = Host(
        tmp_path / "worker",
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment,
        settings={"inputs": {"file_system": "VIRTUAL"}},
    )
    write_files(tmp_path / "source", {"renders/old.exr": b"old"}, mtime_ns=10**18)
    job = job_of(host.submit(tmp_path / "source", output_directories=["renders"])[0])
    session = AgentSession(host, job, tmp_path / "session")
    try:
        session.sync_job()
        assert os.path.ismount(session.root())
        (session.root() / "renders/old.exr").write_bytes(b"better")
        (session.root() / "renders/1.exr").write_bytes(b"one")
        with session.as_if_never_asked():
            session.finish(action(1, 0))
        session.rename_last_snapshot()
        (session.root() / "renders/2.exr").write_bytes(b"two")

        said = session.finish(action(1, 1))

        [snapshot] = said.snapshots
        data = (session.directory / snapshot["manifest"]).read_bytes()
        assert [entry.path for entry in decode(data, source="it").entries] == ["renders/2.exr"]
    finally:
        host.end(session.directory)
