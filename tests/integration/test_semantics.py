"""Promises of docs/SEMANTICS.md that are about whole commands, on a store in a directory."""

import json
import os
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobNotFoundError,
    PathClashError,
    SessionStateError,
    UnsafePathError,
)
from agent_plugin.session.job import JobDocument
from agent_plugin.session.state import FinishResult
from tests.servers.disks import MEBIBYTE, image_mounted
from tests.servers.hooks import Host, action, job_of, step, task
from tests.servers.trees import files_below, write_files

MTIME_NS = 1_600_000_000_123_456_000
INPUTS: dict[str | bytes, bytes | int] = {
    "scene.usd": b"a scene",
    "textures/wood.tx": b"wood",
    "textures/oak.tx": b"wood",
    "renders/plate.exr": b"a plate among the outputs",
    ".hidden/rig": b"rig",
}


class Farm:
    """A host, a submitted job and where its session is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.host = Host(directory / "host", f"file://{self.store}")
        self.source = directory / "show"
        self.session_dir = directory / "session"
        write_files(self.source, INPUTS, mtime_ns=MTIME_NS)
        submitted, _ = self.host.submit(self.source, output_directories=["renders"])
        self.job = job_of(submitted, stepDependencies={step(2): [step(1)]})

    def start(self) -> Path:
        """Start the session; return its local root."""
        result = self.host.start(self.job, self.session_dir)
        return Path(result.roots[0].local_root)

    def finish(self, number: int = 0, *, of_step: int = 1) -> FinishResult:
        return self.host.finish_task(self.session_dir, action(of_step, number, number=number))

    def blob_of(self, path: str) -> Path:
        """Return where the store has a file's content."""
        wanted = (self.source / path).read_bytes()
        return next(blob for blob in self.store.glob("Data/*") if blob.read_bytes() == wanted)

    def output_paths(self) -> list[str]:
        return [entry.path for root in self.host.outputs().roots for entry in root.files]


@pytest.fixture
def farm(tmp_path: Path) -> Farm:
    return Farm(tmp_path)


# --------------------------------------------------------------------------------------- inputs


def test_a_start_that_fails_leaves_no_root_under_its_name(
    farm: Farm, expected_events: set[str]
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    farm.blob_of("scene.usd").unlink()

    with pytest.raises(BlobNotFoundError) as caught:
        farm.start()
    assert "scene.usd" in caught.value.message
    assert "Data/" in caught.value.message
    assert list(farm.session_dir.glob("assetroot-*")) == []
    with pytest.raises(SessionStateError):
        farm.finish()


def test_a_start_that_did_not_finish_can_be_ended_and_nothing_else(
    farm: Farm, expected_events: set[str]
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    farm.blob_of("scene.usd").unlink()
    with pytest.raises(BlobNotFoundError):
        farm.start()

    with pytest.raises(SessionStateError, match="did not finish"):
        farm.finish()
    with pytest.raises(SessionStateError, match="did not finish"):
        farm.host.sync_step(farm.session_dir, step(2))

    farm.host.end(farm.session_dir)
    assert farm.host.read_state(farm.session_dir) is None
    assert files_below(farm.session_dir) == {}


def test_writing_to_a_file_changes_neither_its_twin_nor_what_is_cached(farm: Farm) -> None:
    root = farm.start()
    with (root / "textures/wood.tx").open("r+b") as file:
        file.write(b"iron")

    assert (root / "textures/oak.tx").read_bytes() == b"wood"
    cached = Digest.of(b"wood").hex
    assert [blob.read_bytes() for blob in farm.host.cache_dir.rglob(cached)] == [b"wood"]


def test_names_that_the_file_system_does_not_keep_apart_are_refused_before_the_first_write(
    farm: Farm, expected_events: set[str]
) -> None:
    expected_events.add(events.SESSION_START_FAILED)
    write_files(farm.source, {"Textures/WOOD.tx": b"another wood"}, mtime_ns=MTIME_NS)
    submitted, _ = farm.host.submit(farm.source, output_directories=["renders"])
    image, at = farm.directory / "image", farm.directory / "exfat"
    with image_mounted("exfat", image, at, size=128 * MEBIBYTE) as folding:
        with pytest.raises(PathClashError, match=r"extures/.* are one name on the file system"):
            farm.host.start(job_of(submitted), folding / "refused")
        assert files_below(folding) == {}

        started = farm.host.start(farm.job, folding / "session")
        found = files_below(Path(started.roots[0].local_root))
    assert sorted(found) == sorted(str(path) for path in INPUTS)


def test_starting_a_started_session_again_puts_the_inputs_back(farm: Farm) -> None:
    root = farm.start()
    (root / "scene.usd").write_bytes(b"changed by a task")
    (root / "renders/new.exr").write_bytes(b"not uploaded yet")
    untouched = (root / "textures/wood.tx").stat()

    farm.start()

    assert (root / "scene.usd").read_bytes() == b"a scene"
    assert (root / "renders/new.exr").read_bytes() == b"not uploaded yet"
    after = (root / "textures/wood.tx").stat()
    assert (after.st_ino, after.st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)
    assert farm.finish().files == 1, "what the task had left is its output still"


# --------------------------------------------------------------------------------- mapped roots


def mapped(farm: Farm) -> Path:
    """Give the job's root a location, and map it to a directory of the host; return that."""
    place = farm.directory / "local" / "show"
    place.mkdir(parents=True)
    document = json.loads(farm.host.job_file(farm.job).read_bytes())
    document["attachments"]["manifests"][0]["fileSystemLocationName"] = "Projects"
    rule = {"sourcePathFormat": "posix", "sourcePath": str(farm.source)}
    document["pathMappingRules"] = [rule | {"destinationPath": str(place)}]
    farm.job = JobDocument.decode(json.dumps(document).encode(), "the changed job")
    return place


def test_outputs_of_a_step_come_to_the_mapped_root(farm: Farm) -> None:
    place = mapped(farm)
    farm.start()
    (place / "renders/1.exr").write_bytes(b"one")
    farm.finish()
    (place / "renders/1.exr").unlink()

    farm.host.sync_step(farm.session_dir, step(2))

    assert (place / "renders/1.exr").read_bytes() == b"one"


# ---------------------------------------------------------------------------- step dependencies


def test_outputs_of_a_step_replace_inputs_and_are_no_outputs_of_the_next(farm: Farm) -> None:
    root = farm.start()
    (root / "renders/plate.exr").write_bytes(b"a better plate")
    farm.finish()
    elsewhere = farm.directory / "another session"
    other = Path(farm.host.start(farm.job, elsewhere).roots[0].local_root)
    assert (other / "renders/plate.exr").read_bytes() == b"a plate among the outputs"

    farm.host.sync_step(elsewhere, step(2))

    assert (other / "renders/plate.exr").read_bytes() == b"a better plate"
    finished = farm.host.finish_task(elsewhere, action(2, 0))
    assert (finished.files, finished.deleted) == (0, [])


def test_of_two_steps_the_one_named_last_wins(farm: Farm) -> None:
    root = farm.start()
    for number, content in ((1, b"of step 1"), (3, b"of step 3")):
        (root / "renders/both.exr").write_bytes(content)
        farm.host.finish_task(farm.session_dir, action(number, 0))
    elsewhere = farm.directory / "another session"
    other = Path(farm.host.start(farm.job, elsewhere).roots[0].local_root)

    for order, content in (([3, 1], b"of step 1"), ([1, 3], b"of step 3")):
        farm.host.sync_step(elsewhere, step(2), [step(number) for number in order])
        assert (other / "renders/both.exr").read_bytes() == content


def test_a_step_gets_all_runs_of_chunks_and_of_each_task_the_last_by_its_folders_name(
    farm: Farm,
) -> None:
    root = farm.start()
    plate = root / "renders/plate.exr"

    def run(task_number: int | None, started_at: float, name: str) -> None:
        plate.write_bytes(f"as {name} left it".encode())
        (root / f"renders/{name}").write_bytes(name.encode())
        chosen = action(1, task_number, started_at=started_at)
        farm.host.finish_task(farm.session_dir, chosen)
        (root / f"renders/{name}").unlink()

    # By name the second chunk comes before the first, and the task's second run before its first.
    run(None, 1_700_000_002.0, "chunk.exr")
    run(None, 1_700_000_001.0, "other chunk.exr")
    run(7, 1_700_000_004.0, "last run.exr")
    run(7, 1_700_000_003.0, "run before.exr")
    run(None, 1_700_000_000.0, "latest.exr")
    elsewhere = farm.directory / "another session"
    other = Path(farm.host.start(farm.job, elsewhere).roots[0].local_root)
    farm.host.sync_step(elsewhere, step(2))

    assert sorted(path.name for path in (other / "renders").iterdir()) == [
        *("chunk.exr", "last run.exr", "latest.exr", "other chunk.exr", "plate.exr"),
    ]
    assert (other / "renders/plate.exr").read_bytes() == b"as latest.exr left it"


def test_a_root_that_only_a_dependency_has_is_a_directory_of_the_session(farm: Farm) -> None:
    other = farm.directory / "other"
    write_files(other, {"a": b"a"}, mtime_ns=MTIME_NS)
    second, _ = farm.host.submit(other, output_directories=["out"])
    first = farm.directory / "session of the step before"
    both = farm.host.start(job_of(second), first)
    made = Path(both.roots[0].local_root) / "out"
    made.mkdir()
    (made / "cache.abc").write_bytes(b"simulated")
    farm.host.finish_task(first, action(1, 0))
    farm.start()

    result = farm.host.sync_step(farm.session_dir, step(2))

    [root] = result.roots
    assert Path(root.local_root).parent == farm.session_dir
    assert (Path(root.local_root) / "out/cache.abc").read_bytes() == b"simulated"


# -------------------------------------------------------------------------------------- outputs


def test_new_and_changed_files_are_outputs_hidden_ones_too(farm: Farm) -> None:
    root = farm.start()
    (root / "renders/plate.exr").write_bytes(b"changed")
    (root / "renders/.render.log").write_bytes(b"log")
    (root / "renders/deep/er").mkdir(parents=True)
    (root / "renders/deep/er/1.exr").write_bytes(b"one")
    (root / "renders/empty directory").mkdir()
    (root / "elsewhere.exr").write_bytes(b"not below an output directory")

    assert farm.finish().files == 3
    assert farm.output_paths() == [
        "renders/.render.log",
        "renders/deep/er/1.exr",
        "renders/plate.exr",
    ]


def test_one_content_under_two_names_is_sent_once(farm: Farm) -> None:
    root = farm.start()
    for name in ("a", "b"):
        (root / "renders" / name).write_bytes(b"the same")
    (root / "renders/c").write_bytes(b"wood")

    result = farm.finish()

    assert (result.files, result.bytes_uploaded, result.bytes_reused) == (3, 8, 4)


def test_a_file_where_a_dependency_needs_a_directory_is_a_clash(farm: Farm) -> None:
    root = farm.start()
    (root / "renders/x").mkdir()
    (root / "renders/x/1.exr").write_bytes(b"one")
    farm.finish()
    (root / "renders/x/1.exr").unlink()
    (root / "renders/x").rmdir()
    (root / "renders/x").write_bytes(b"a file now")

    with pytest.raises(PathClashError):
        farm.host.sync_step(farm.session_dir, step(2))


def test_a_link_that_a_task_planted_leads_no_dependency_out(farm: Farm) -> None:
    root = farm.start()
    (root / "renders/x").mkdir()
    (root / "renders/x/1.exr").write_bytes(b"one")
    farm.finish()
    outside = farm.directory / "outside"
    outside.mkdir()
    (root / "renders/x/1.exr").unlink()
    (root / "renders/x").rmdir()
    (root / "renders/x").symlink_to(outside)

    with pytest.raises(UnsafePathError):
        farm.host.sync_step(farm.session_dir, step(2))
    assert list(outside.iterdir()) == []


# ----------------------------------------------------------------------- outputs for the artist


def test_outputs_get_brings_what_list_names_and_a_second_time_nothing(farm: Farm) -> None:
    root = farm.start()
    (root / "renders/1.exr").write_bytes(b"one")
    farm.finish()
    (root / "renders/2.exr").write_bytes(b"two")
    farm.finish(1)
    to = farm.directory / "to"

    got = farm.host.get_outputs(to)

    assert (got.files, sorted(files_below(to))) == (2, farm.output_paths())
    assert farm.host.get_outputs(to).bytes_fetched == 0
    only = farm.host.outputs(step_id=step(1), task_id=task(1))
    assert [entry.path for entry in only.roots[0].files] == ["renders/2.exr"]


def of_two_roots(farm: Farm) -> tuple[Path, Path]:
    """Start a session of a job with two roots, and return these."""
    other = farm.directory / "other"
    write_files(other, {"a": b"a"}, mtime_ns=MTIME_NS)
    second, _ = farm.host.submit(other, output_directories=["renders"])
    first, _ = farm.host.submit(farm.source, output_directories=["renders"])
    started = farm.host.start(job_of(first, second), farm.session_dir)
    one, two = (Path(root.local_root) for root in started.roots)
    (two / "renders").mkdir()
    return one, two


@pytest.mark.parametrize("by_root", [False, True])
def test_outputs_of_a_second_root_do_not_move_those_of_the_first(farm: Farm, by_root: bool) -> None:
    one, two = of_two_roots(farm)
    to = farm.directory / "to"
    (one / "renders/1.exr").write_bytes(b"one")
    farm.finish()
    farm.host.get_outputs(to, by_root=by_root)
    before = files_below(to)
    (two / "renders/2.exr").write_bytes(b"two")
    farm.finish(1)

    result = farm.host.get_outputs(to, by_root=by_root)

    names = {"renders/1.exr", "renders/2.exr"}
    if by_root:
        names = {f"{one.name}/renders/1.exr", f"{two.name}/renders/2.exr"}
    after = files_below(to)
    assert set(after) == names
    assert {path: after[path] for path in before} == before
    assert (result.files, result.bytes, result.bytes_fetched) == (2, 6, 3)
    assert farm.host.get_outputs(to, by_root=by_root).bytes_fetched == 0


def test_two_roots_with_a_file_of_one_path_are_refused_unless_each_has_its_directory(
    farm: Farm,
) -> None:
    one, two = of_two_roots(farm)
    for root in (one, two):
        (root / "renders/same.exr").write_bytes(os.fsencode(root))
    farm.finish()
    to = farm.directory / "to"

    with pytest.raises(PathClashError, match=f"of {farm.source} and of .*/other|of .*/other and"):
        farm.host.get_outputs(to)
    assert not to.exists()
    farm.host.get_outputs(to, by_root=True)
    for root in (one, two):
        assert (to / root.name / "renders/same.exr").read_bytes() == os.fsencode(root)
