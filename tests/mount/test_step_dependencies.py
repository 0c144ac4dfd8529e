"""Outputs of other steps come over a mounted root as over a copied one, but for their bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.errors import (
    MountFailedError,
    MountReadFailedError,
    PathClashError,
    UnsafePathError,
)
from agent_plugin.content.mount_table import read_mounts
from agent_plugin.session.job import JobDocument
from agent_plugin.session.mount_control import ask_mount
from agent_plugin.session.state import FinishResult
from tests.servers.hooks import Host, action, step
from tests.servers.proxied_object import until
from tests.servers.sessions import Sessions, manifest_at
from tests.servers.trees import files_below, write_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

INPUTS: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "renders/reference.exr": b"an input in an output directory",
    "renders/old/1.exr": 4000,
    "renders/old/2.exr": 5000,
    "renders/kept/a.exr": 300,
    b"renders/latin-\xe9/\xff": b"not UTF-8",
}
# What step 1 leaves: in new directories, over inputs, and where the next job will have been busy.
OUTPUTS: dict[str | bytes, bytes] = {
    "renders/reference.exr": b"of step 1, over an input",
    "renders/old/1.exr": b"of step 1, over an input that the job removes",
    "renders/old/2.exr": b"of step 1, over an input that the job changes",
    "renders/old/3.exr": b"of step 1, beside inputs",
    "renders/gone/b.exr": b"of step 1, over what the job makes",
    "renders/new/deep/1.exr": b"of step 1, where nothing was",
    "renders/new/deep/2.exr": b"of step 1, where nothing was either",
    "renders/new/3.exr": b"of step 1, one more",
    "renders/kept/b.exr": b"of step 1, in a directory that was renamed",
    b"renders/latin-\xe9/\xfe": b"of step 1, under a name that is not UTF-8",
}


@pytest.fixture
def transport() -> str:
    return "kernel"


@pytest.fixture
def writes() -> str:
    return "overlayfs"


@pytest.fixture
def hosts(tmp_path: Path, transport: str) -> Iterator[dict[str, Host]]:
    settings = {"mounts": {"transport": transport}}
    hosts = {
        kind: Host(tmp_path / kind, f"file://{tmp_path}/store", settings=settings)
        for kind in ("V", "C")
    }
    yield hosts
    for mount in reversed(read_mounts()):
        if mount.mountpoint.startswith(f"{tmp_path}/"):
            hosts["V"].mounts.end(Path(mount.mountpoint))
    assert [m for m in read_mounts() if m.mountpoint.startswith(f"{tmp_path}/")] == []


@pytest.fixture
def job(tmp_path: Path, hosts: dict[str, Host]) -> JobDocument:
    """A job whose first step has run."""
    first = Sessions(tmp_path / "first", hosts["C"])
    job = first.submitted(dict(INPUTS), "renders")
    root = first.started(job)
    for path, data in OUTPUTS.items():
        place = root / os.fsdecode(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    assert first.finish().files == len(OUTPUTS)
    hosts["C"].end(first.session_dir)
    return job


@pytest.fixture
def virtual(tmp_path: Path, hosts: dict[str, Host], writes: str) -> Sessions:
    # A comma is overlayfs's own, so that our own overlay takes its place.
    name = "virtual" if writes == "overlayfs" else "virtual, with our own overlay"
    return Sessions(tmp_path / name, hosts["V"])


@pytest.fixture
def copied(tmp_path: Path, hosts: dict[str, Host]) -> Sessions:
    return Sessions(tmp_path / "copied", hosts["C"])


def start(sessions: Sessions, job: JobDocument, file_system: str = "VIRTUAL") -> Path:
    [root] = sessions.host.start(job, sessions.session_dir, file_system=file_system).roots
    assert root.file_system == file_system
    return Path(root.local_root)


def sync(sessions: Sessions, number: int = 2, *, of: int = 1) -> None:
    sessions.host.sync_step(sessions.session_dir, step(number), [step(of)])


def told(host: Host, result: FinishResult) -> object:
    outputs = {
        entry.path: (entry.hash, entry.size)
        for found in result.manifests
        if found.output_manifest_path
        for entry in manifest_at(host, found.output_manifest_path).entries
    }
    return outputs, result.deleted


def status(sessions: Sessions, root: Path) -> dict[str, object]:
    answer = ask_mount(sessions.host.mounts.control_of(root), {"ask": "status"})
    found: dict[str, object] = json.loads(answer)
    return found


def fetched(sessions: Sessions, root: Path) -> object:
    counts = status(sessions, root)["counts"]
    assert isinstance(counts, dict)
    return counts["bytes_fetched"]


def before_the_sync(root: Path) -> None:
    """What a task of the next step's session did already."""
    for missing in ("renders/new", "renders/old/3.exr", "renders/gone/b.exr"):
        assert not (root / missing).exists(), "and the kernel remembers"
    assert sum(1 for _ in root.rglob("*")) > len(INPUTS), "and lists what was there"
    (root / "renders/old/1.exr").unlink()
    (root / "renders/old/2.exr").write_bytes(b"changed by the job")
    (root / "renders/gone").mkdir()
    (root / "renders/gone/b.exr").write_bytes(b"made by the job")
    (root / "renders/kept").rename(root / "renders/moved")
    (root / "renders/kept").mkdir()


def after_the_sync(root: Path) -> None:
    """What the task that needs the outputs does with them."""
    (root / "renders/new/deep/1.exr").write_bytes(b"changed by the next step")
    (root / "renders/new/deep/2.exr").unlink()
    (root / "renders/new/3.exr").chmod(0o600)
    (root / "renders/old/3.exr").rename(root / "renders/old/4.exr")
    os.utime(root / "renders/reference.exr")
    (root / "renders/new").rename(root / "renders/newer")
    shutil.copy(root / "renders/gone/b.exr", root / "renders/copy.exr")
    (root / "scene.usd").unlink()


@pytest.mark.parametrize(
    ("transport", "writes"),
    [("kernel", "overlayfs"), ("fusepy", "overlayfs"), ("kernel", "overlay")],
)
def test_a_steps_outputs_come_as_to_a_copied_session_and_are_nobodys(
    virtual: Sessions, copied: Sessions, job: JobDocument, transport: str, writes: str
) -> None:
    results: list[list[object]] = []
    for at, (sessions, kind) in enumerate(((virtual, "VIRTUAL"), (copied, "COPIED"))):
        root = start(sessions, job, kind)
        before_the_sync(root)
        first = sessions.host.finish_task(sessions.session_dir, action(2, 10 + at))
        found: list[object] = [told(sessions.host, first)]
        sync(sessions)
        if kind == "VIRTUAL":
            assert fetched(sessions, root) == 0
            assert (status(sessions, root)["transport"], status(sessions, root)["writes"]) == (
                transport,
                writes,
            )
        found.append(files_below(root))
        for number, edit in enumerate((None, after_the_sync, None)):
            if edit is not None:
                edit(root)
            run = action(2, 20 + 10 * number + at)
            found.append(told(sessions.host, sessions.host.finish_task(sessions.session_dir, run)))
            found.append(files_below(root).keys())
        results.append(found)

    for virtually, as_copied in zip(*results, strict=True):
        assert virtually == as_copied
    assert results[0][2] == ({}, []), "what came is nobody's output"


def test_the_bytes_of_a_steps_outputs_come_when_they_are_read(
    virtual: Sessions, job: JobDocument
) -> None:
    root = start(virtual, job)
    old = b"an input in an output directory"
    with (root / "renders/reference.exr").open("rb", buffering=0) as held:
        sync(virtual)
        assert fetched(virtual, root) == 0
        assert (root / "renders/new/3.exr").stat().st_size == len(OUTPUTS["renders/new/3.exr"])
        assert fetched(virtual, root) == 0
        assert (root / "renders/new/3.exr").read_bytes() == OUTPUTS["renders/new/3.exr"]
        assert fetched(virtual, root) == len(OUTPUTS["renders/new/3.exr"])
        assert held.read() == old, "whoever has the old file open goes on reading it"
    assert sorted(path.name for path in root.iterdir()) == ["renders", "scene.usd"]


def test_what_came_is_there_after_the_death_of_the_server_and_of_all_processes(
    virtual: Sessions, job: JobDocument
) -> None:
    root = start(virtual, job)
    sync(virtual)
    (root / "renders/new/deep/1.exr").write_bytes(b"changed")
    os.kill(int(str(status(virtual, root)["pid"])), signal.SIGKILL)
    whole = files_below(root)
    expected = {os.fsencode(path): data for path, data in {**INPUTS, **OUTPUTS}.items()}
    assert {os.fsencode(path) for path in whole} == set(expected)
    for name in ("renders/reference.exr", "renders/new/3.exr", "renders/old/2.exr"):
        assert (root / name).read_bytes() == OUTPUTS[name]

    for process in ("supervisor", "pid"):
        os.kill(int(str(status(virtual, root)[process])), signal.SIGKILL)
        if process == "supervisor":
            until(lambda: not virtual.host.mounts.is_served(root))
    # Another session's start clears what is stale.
    virtual.host.mounts.clear_stale()
    assert start(virtual, job) == root
    assert files_below(root) == whole
    sync(virtual, 3)
    assert (root / "renders/new/deep/1.exr").read_bytes() == OUTPUTS["renders/new/deep/1.exr"]
    assert virtual.finish().files == 0
    virtual.host.end(virtual.session_dir)
    assert list((virtual.host.state_dir / "sessions").iterdir()) == []


def test_what_can_not_come_is_told_and_then_nothing_has_come(
    virtual: Sessions, job: JobDocument
) -> None:
    root = start(virtual, job)
    before = files_below(root)
    (root / "renders/old/3.exr").mkdir()
    with pytest.raises(PathClashError, match=r"renders/old/3\.exr is a directory"):
        sync(virtual)
    (root / "renders/old/3.exr").rmdir()
    (root / "renders/new").write_bytes(b"a file")
    with pytest.raises(PathClashError, match="renders/new is a file"):
        sync(virtual)
    (root / "renders/new").unlink()
    (root / "renders/new").symlink_to("/tmp")
    with pytest.raises(UnsafePathError, match="renders/new is a symbolic link"):
        sync(virtual)
    (root / "renders/new").unlink()
    assert files_below(root).keys() >= before.keys()
    assert {path: files_below(root)[path] for path in before} == before

    (root / "renders/reference.exr").unlink()
    (root / "renders/reference.exr").symlink_to("../scene.usd")
    sync(virtual)
    assert (root / "renders/reference.exr").read_bytes() == OUTPUTS["renders/reference.exr"]
    assert (root / "scene.usd").read_bytes() == INPUTS["scene.usd"]
    assert sorted(path.name for path in root.iterdir()) == ["renders", "scene.usd"]
    assert virtual.finish().files == 0


@pytest.mark.expected_events(events.MOUNT_READ_FAILED)
def test_an_output_that_can_not_be_had_is_named_as_the_job_knows_it(
    tmp_path: Path, virtual: Sessions, job: JobDocument
) -> None:
    root = start(virtual, job)
    sync(virtual)
    for blob in (tmp_path / "store/Data").iterdir():
        if blob.read_bytes() == OUTPUTS["renders/new/3.exr"]:
            blob.unlink()
    with pytest.raises(OSError, match="Input/output error"):
        (root / "renders/new/3.exr").read_bytes()
    with pytest.raises(
        MountReadFailedError, match=r"^renders/new/3\.exr in /\S+ could not be read"
    ):
        virtual.finish()


def test_a_session_that_lost_its_mount_is_not_written_to(
    virtual: Sessions, job: JobDocument
) -> None:
    root = start(virtual, job)
    virtual.host.mounts.end(root)
    with pytest.raises(MountFailedError, match="not mounted any more"):
        sync(virtual)
    assert list(root.iterdir()) == []
    start(virtual, job)
    sync(virtual)
    assert (root / "renders/new/3.exr").read_bytes() == OUTPUTS["renders/new/3.exr"]
    assert virtual.finish().files == 0


@pytest.mark.slow
def test_twenty_kills_of_a_sync_lose_nothing(
    tmp_path: Path, virtual: Sessions, hosts: dict[str, Host]
) -> None:
    first = Sessions(tmp_path / "first", hosts["C"])
    job = first.submitted(dict(INPUTS), "renders")
    root = first.started(job)
    outputs: dict[str | bytes, bytes | int] = {
        f"renders/{at % 7}/{at % 3}/{at}.exr": b"%d" % at for at in range(2000)
    }
    write_files(root, outputs | {"renders/old/1.exr": b"of step 1"}, mtime_ns=1_000_000_000)
    assert first.finish().files == 2001
    expected = files_below(root)
    at = start(virtual, job)
    (at / "renders/old/1.exr").unlink()
    command = (
        "session", "sync-step", "--session-dir", virtual.session_dir, "--step-id", step(2),
        "--depends-on", step(1),
    )  # fmt: skip
    chance = random.Random(7)
    killed = 0
    for _ in range(20):
        process = virtual.host.popen(*command)
        try:
            process.wait(chance.uniform(0.3, 2.0))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate(timeout=60)
        # Half of it is in place, perhaps, and a server died as well.
        if chance.random() < 0.2:
            os.kill(int(str(status(virtual, at)["pid"])), signal.SIGKILL)
            until(lambda: virtual.host.mounts.is_served(at))
    done = virtual.host.run(*command)

    assert done.returncode == 0, done.stderr
    assert killed > 0
    assert files_below(at) == expected
    assert sorted(path.name for path in at.iterdir()) == ["renders", "scene.usd"]
    assert virtual.finish().files == 0
