"""A real renderer in the middle: the real client submits a scene and downloads its picture."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from agent_plugin.content.mount_table import is_mounted
from tests.servers.deadline_peers import DeadlinePeers, TaskRun, new_job_id
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below
from tests.servers.worker_session import Propmaster, WorkerSession

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

# From Debian's povray and povray-examples (Makefile, `system`); a second at this size. The scene
# includes a file of its own directory, reads a texture from it, and needs the shared includes.
POVRAY = Path("/usr/bin/povray")
SCENE = Path("/usr/share/doc/povray/examples/advanced/drums2")
INCLUDES = Path("/usr/share/povray-3.7/include")
WIDTH, HEIGHT = 160, 120

# Wherever the session is, POV-Ray may read below $HOME and write in the current directory:
# [Permitted Paths] of Debian's /etc/povray/3.7/povray.conf. -D: there is no display.
RENDER = f"""
    mkdir -p "$ROOT_0/renders"; cd "$ROOT_0/renders"
    HOME="$ROOT_0" {POVRAY} -D -GA +I../drums2/drums.pov +L../drums2 +L../include \\
        +Odrums.png +FN +W{WIDTH} +H{HEIGHT}
"""


def show(root: Path) -> Path:
    """Lay out the scene with all that it needs."""
    shutil.copytree(SCENE, root / "drums2")
    shutil.copytree(INCLUDES, root / "include")
    return root


def pixels(picture: Path) -> bytes:
    """Return the picture without what differs from run to run: a PNG has the time in it."""
    with Image.open(picture) as image:
        assert image.size == (WIDTH, HEIGHT)
        return image.convert("RGB").tobytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The pixels of the same scene rendered on a plain directory, without any of this."""
    root = show(tmp_path_factory.mktemp("plain") / "show")
    environment = {**os.environ, "ROOT_0": str(root)}
    subprocess.run(["/bin/bash", "-euc", RENDER], env=environment, check=True, capture_output=True)
    return pixels(root / "renders/drums.png")


@pytest.mark.parametrize("file_system", ["COPIED", "VIRTUAL"])
def test_a_scene_submitted_by_the_client_comes_back_as_the_same_picture(
    peers: DeadlinePeers,
    propmaster: Propmaster,
    s3: S3Server,
    s3_prefix: str,
    tmp_path: Path,
    expected: bytes,
    file_system: str,
) -> None:
    if file_system == "VIRTUAL" and os.geteuid() != 0:
        pytest.skip("mounting needs root")
    root = show(tmp_path / "show")
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["renders"]
    )
    job_id = new_job_id()
    session = WorkerSession(
        propmaster, directory=tmp_path / "session", submission=submission, job_id=job_id
    )
    step = "step-" + "1" * 32
    task = TaskRun(
        command=RENDER,
        step_id=step,
        task_id=f"task-{'1' * 32}-0",
        session_action_id=f"sessionaction-{'3' * 32}-1",
        started_at=1_719_848_200.25,
    )

    [started] = session.start(file_system=file_system).roots
    mounted = is_mounted(Path(started.local_root))
    session.run_task(task)
    session.end()
    downloaded = peers.download(submission, job_id, to={str(root): root})

    assert (started.file_system, mounted) == (file_system, file_system == "VIRTUAL")
    assert started.files == len(files_below(root)) - 1
    assert downloaded.paths == {str(root): ["renders/drums.png"]}
    found = pixels(root / "renders/drums.png")
    assert found == expected
    colours = {found[at : at + 3] for at in range(0, len(found), 3)}
    assert len(colours) > 1000, "a rendered picture, not one flat colour"
    assert not is_mounted(Path(started.local_root))
