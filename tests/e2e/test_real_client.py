"""The unmodified Deadline client submits; propmaster works; the unmodified client downloads."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.servers.deadline_peers import DeadlinePeers, Submission, TaskRun, new_job_id
from tests.servers.s3_server import S3Server
from tests.servers.trees import FileFacts, files_below, write_files
from tests.servers.worker_session import Propmaster, WorkerSession

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

MIB = 1024 * 1024
# 2024-07-01, with microseconds and a rest below them, which a manifest drops.
MTIME_NS = 1_719_848_112_123_456_789
STEP = "step-" + "1" * 32
NEXT_STEP = "step-" + "2" * 32

HARD_TO_CARRY: dict[str | bytes, bytes | int] = {
    "scene.usd": 4000,
    "same content.usd": b"twice",
    "same content, elsewhere/same.usd": b"twice",
    "empty.lock": b"",
    ".hidden/.deeper/.dotfile": b"hidden",
    "/".join(["deep"] * 40) + "/down.txt": b"forty directories down",
    "emoji 🎬/😀.exr": 100,
    "emoji 🎬/\ue000 after surrogates.exr": 100,
    "decomposed e\u0301 and composed \u00e9.txt": b"e",
    b"latin-1 \xe9t\xe9/\xe9t\xe9.txt": b"not UTF-8",
    "quotes ' \" and \\ and \t and \n.txt": b"names may hold anything but / and NUL",
    "$HOME %20 & <b>.txt": b"shell, URL and markup",
}


def root_named(name: str, parent: Path, files: Mapping[str | bytes, bytes | int]) -> Path:
    root = parent / name
    root.mkdir()
    write_files(root, files, mtime_ns=MTIME_NS)
    return root


def task_run(
    command: str,
    *,
    number: int,
    action: int,
    step_id: str = STEP,
    environment: Mapping[str, Path] | None = None,
) -> TaskRun:
    return TaskRun(
        command=command,
        step_id=step_id,
        task_id=f"task-{step_id.removeprefix('step-')}-{number}",
        session_action_id=f"sessionaction-{'3' * 32}-{action}",
        started_at=1_719_848_200.25 + action,
        environment={name: str(path) for name, path in (environment or {}).items()},
    )


def assert_same_files(actual: Path, expected: Mapping[str, FileFacts]) -> None:
    """The client sets times through a float, which may be a microsecond off."""
    found = files_below(actual)
    assert found.keys() == expected.keys()
    for path, facts in expected.items():
        assert found[path][::2] == facts[::2], path
        assert abs(found[path].mtime_us - facts.mtime_us) <= 1, path


def test_every_kind_of_file_goes_in_and_comes_out_unchanged(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    files = {**HARD_TO_CARRY, "large.vdb": 300 * MIB, "just over one part.vdb": 8 * MIB + 1}
    root = root_named("shöt 010 🎬", tmp_path, files)
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["renders"]
    )
    job_id = new_job_id()
    session = WorkerSession(
        propmaster, directory=tmp_path / "session", submission=submission, job_id=job_id
    )
    submitted = files_below(root)

    [started] = session.start().roots

    assert files_below(Path(started.local_root)) == submitted
    assert started.root_path == str(root)
    assert started.files == submission.files == len(submitted)
    assert started.bytes == sum(facts.size for facts in submitted.values())

    rendered = {**HARD_TO_CARRY, "beauty.exr": 300 * MIB}
    source = root_named("rendered", tmp_path, rendered)
    task = task_run(
        'cp -a "$RENDERED" "$ROOT_0/renders"', number=0, action=1, environment={"RENDERED": source}
    )
    finished = session.run_task(task)
    session.end()
    downloaded = peers.download(
        submission, job_id, to={str(root): tmp_path / "downloaded"}, scan_keys=True
    )

    assert_same_files(tmp_path / "downloaded" / "renders", files_below(source))
    assert finished.files == downloaded.files == len(rendered)
    assert len(downloaded.session_actions) == 1


def test_o5_the_client_downloads_the_outputs_of_a_job_whose_results_are_kept_beside_them(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = root_named("show", tmp_path, {"scene.usd": b"scene"})
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["renders"]
    )
    job_id = new_job_id()
    session = WorkerSession(
        propmaster,
        directory=tmp_path / "session",
        submission=submission,
        job_id=job_id,
        publishers=[
            {"Type": "s3", "Params": {"Bucket": s3.bucket, "Key": f"{s3_prefix}-output/{{taskID}}"}}
        ],
    )
    session.start()
    for number in range(2):
        session.run_task(
            task_run(
                f'mkdir -p "$ROOT_0/renders"; printf %s > "$ROOT_0/renders/{number}.exr" {number}',
                number=number,
                action=number + 1,
            )
        )
    session.end()
    listed = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix=f"{s3_prefix}/Manifests")
    keys = [entry["Key"] for entry in listed["Contents"]]
    assert sum(f"/Results/{job_id}/" in key and key.endswith(".json") for key in keys) == 2

    downloaded = peers.download(
        submission, job_id, to={str(root): tmp_path / "downloaded"}, scan_keys=True
    )

    assert downloaded.files == 2
    assert files_below(tmp_path / "downloaded").keys() == {"renders/0.exr", "renders/1.exr"}


def test_outputs_of_all_tasks_are_downloaded_and_a_task_run_again_replaces_its_own(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = root_named("show", tmp_path, {"scene.usd": b"scene"})
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["renders"]
    )
    job_id = new_job_id()
    session = WorkerSession(
        propmaster, directory=tmp_path / "session", submission=submission, job_id=job_id
    )
    render = 'mkdir -p "$ROOT_0/renders"; printf %s'
    session.start()

    first = session.run_task(
        task_run(f'{render} one > "$ROOT_0/renders/1.exr"', number=0, action=1)
    )
    second = session.run_task(
        task_run(f'{render} two > "$ROOT_0/renders/2.exr"', number=1, action=2)
    )
    again = session.run_task(
        task_run(f'{render} again > "$ROOT_0/renders/1.exr"', number=0, action=3)
    )
    session.end()
    downloaded = peers.download(
        submission, job_id, to={str(root): tmp_path / "downloaded"}, scan_keys=True
    )

    assert [run.files for run in (first, second, again)] == [1, 1, 1]
    assert downloaded.paths == {str(root): ["renders/1.exr", "renders/2.exr"]}
    assert (tmp_path / "downloaded/renders/1.exr").read_text() == "again"
    assert (tmp_path / "downloaded/renders/2.exr").read_text() == "two"
    assert len(downloaded.session_actions) == 3

    of_first_action = peers.download(
        submission,
        job_id,
        to={str(root): tmp_path / "first"},
        step_id=STEP,
        task_id=f"task-{'1' * 32}-0",
        session_action_id=f"sessionaction-{'3' * 32}-1",
    )
    assert of_first_action.files == 1
    assert (tmp_path / "first/renders/1.exr").read_text() == "one"


def test_a_task_run_again_keeps_the_files_that_came_out_the_same(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    """Readers take only the last run's manifest of each task, so it must name all its files."""
    root = root_named("show", tmp_path, {"scene.usd": b"scene"})
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["renders"]
    )
    job_id = new_job_id()
    session = WorkerSession(
        propmaster, directory=tmp_path / "session", submission=submission, job_id=job_id
    )
    render = 'mkdir -p "$ROOT_0/renders"; cd "$ROOT_0/renders"; printf mask > mask.exr; printf'
    session.start()

    session.run_task(task_run(f"{render} first > beauty.exr", number=0, action=1))
    session.run_task(task_run(f"{render} again > beauty.exr", number=0, action=2))
    session.end()
    downloaded = peers.download(submission, job_id, to={str(root): tmp_path / "downloaded"})

    assert downloaded.paths == {str(root): ["renders/beauty.exr", "renders/mask.exr"]}


def test_only_changed_inputs_leave_a_directory_that_is_input_and_output(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    files: dict[str | bytes, bytes | int] = {
        f"cache/{name}": name.encode() for name in ("kept", "changed", "touched", "removed")
    }
    root = root_named("show", tmp_path, files)
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["cache"]
    )
    job_id = new_job_id()
    session = WorkerSession(
        propmaster, directory=tmp_path / "session", submission=submission, job_id=job_id
    )
    command = 'cd "$ROOT_0/cache"; printf more >> changed; touch touched; rm removed; echo > new'
    session.start()

    finished = session.run_task(task_run(command, number=0, action=1))
    session.end()
    downloaded = peers.download(submission, job_id, to={str(root): root})

    assert downloaded.paths == {str(root): ["cache/changed", "cache/new"]}
    assert (root / "cache/changed").read_text() == "changedmore"
    assert sorted(files_below(root)) == [
        f"cache/{name}" for name in ("changed", "kept", "new", "removed", "touched")
    ]
    assert finished.bytes_reused == 0
    assert finished.deleted == ["cache/removed"]


def test_the_root_itself_can_be_the_output_directory(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = root_named("show", tmp_path, {"scene.usd": b"scene", "textures/wood.tx": b"wood"})
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["."]
    )
    job_id = new_job_id()
    session = WorkerSession(
        propmaster, directory=tmp_path / "session", submission=submission, job_id=job_id
    )
    command = 'cd "$ROOT_0"; echo rendered > scene.exr; mkdir logs; echo fine > logs/render.log'
    session.start()

    session.run_task(task_run(command, number=0, action=1))
    session.end()
    downloaded = peers.download(submission, job_id, to={str(root): tmp_path / "downloaded"})

    assert submission.attachments["manifests"][0]["outputRelativeDirectories"] == ["."]
    assert downloaded.paths == {str(root): ["logs/render.log", "scene.exr"]}


def test_a_root_that_has_only_outputs_stands_beside_one_with_inputs(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    inputs, outputs = root_named("inputs", tmp_path, {"a": b"a"}), root_named("öut", tmp_path, {})
    submissions = [
        peers.submit(root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=words)
        for root, words in ((inputs, []), (outputs, ["frames", "logs"]))
    ]
    submission = submissions[0].joined_with(submissions[1])
    job_id = new_job_id()
    session = WorkerSession(
        propmaster, directory=tmp_path / "session", submission=submission, job_id=job_id
    )
    started = session.start()

    finished = session.run_task(
        task_run('mkdir -p "$ROOT_1/frames"; cp "$ROOT_0/a" "$ROOT_1/frames"', number=0, action=1)
    )
    session.end()
    downloaded = peers.download(
        submission, job_id, to={str(outputs): tmp_path / "downloaded"}, scan_keys=True
    )

    assert [root.files for root in started.roots] == [1, 0]
    assert finished.manifests[0] == {}
    assert set(finished.manifests[1]) == {"outputManifestPath", "outputManifestHash"}
    assert downloaded.paths == {str(outputs): ["frames/a"]}
    [action] = downloaded.session_actions
    assert action["manifests"][0] == {}
    assert (
        action["manifests"][1]["outputManifestPath"] == finished.manifests[1]["outputManifestPath"]
    )


def test_a_step_gets_what_the_step_before_left_in_place_of_the_jobs_own_inputs(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = root_named("show", tmp_path, {"sim/cache.vdb": b"rest pose", "scene.usd": b"scene"})
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["sim", "renders"]
    )
    job_id = new_job_id()

    simulate(propmaster, submission, job_id, tmp_path / "first")
    session = WorkerSession(
        propmaster, directory=tmp_path / "second", submission=submission, job_id=job_id
    )
    [started] = session.start().roots
    session.sync_step(NEXT_STEP, depends_on=[STEP])
    simulated = sorted(files_below(Path(started.local_root)))
    finished = session.run_task(
        task_run(
            'mkdir "$ROOT_0/renders"; cp "$ROOT_0/sim/cache.vdb" "$ROOT_0/renders/frame.exr"',
            number=0,
            action=2,
            step_id=NEXT_STEP,
        )
    )
    session.end()
    peers.download(submission, job_id, to={str(root): root})

    assert simulated == ["scene.usd", "sim/cache.vdb", "sim/frame.vdb"], "no copy beside it"
    assert finished.files == 1, "what the step before made is not this step's output"
    assert (root / "renders/frame.exr").read_text() == "simulated"
    assert (root / "sim/cache.vdb").read_text() == "simulated"


def simulate(propmaster: Propmaster, submission: Submission, job_id: str, directory: Path) -> None:
    """Run the first step, in a session of its own as on another worker."""
    session = WorkerSession(propmaster, directory=directory, submission=submission, job_id=job_id)
    session.start()
    command = 'cd "$ROOT_0/sim"; printf simulated > cache.vdb; printf new > frame.vdb'
    session.run_task(task_run(command, number=0, action=1))
    session.end()


def test_nothing_is_uploaded_for_a_failed_task_and_nothing_for_one_without_output(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = root_named("show", tmp_path, {"scene.usd": b"scene"})
    submission = peers.submit(
        root, bucket=s3.bucket, root_prefix=s3_prefix, output_directories=["renders"]
    )
    job_id = new_job_id()
    session = WorkerSession(
        propmaster, directory=tmp_path / "session", submission=submission, job_id=job_id
    )
    half = task_run('mkdir "$ROOT_0/renders"; echo half > "$ROOT_0/renders/1"', number=0, action=2)
    session.start()

    nothing = session.run_task(task_run("true", number=1, action=1))
    session.run_command(half)
    failed = session.finish_task(half, failed=True)
    session.end()
    downloaded = peers.download(submission, job_id, to={})

    assert nothing.files == failed.files == 0
    assert nothing.manifests == [{}]
    assert downloaded.files == 0
