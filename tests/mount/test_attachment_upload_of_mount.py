"""The agent's upload of what a task wrote to a root that our `deadline_vfs` has mounted."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.manifest import decode
from agent_plugin.session.roots import session_directory_name
from tests.servers.attachment_calls import AgentSession
from tests.servers.hooks import action, job_with_outputs
from tests.servers.s3_server import S3Server
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
