"""propmaster leaves in S3 exactly what the real worker agent's scripts leave for the same task.

Each case is submitted twice by the real client, below two root prefixes, and worked on once by the
agent's own scripts and once by propmaster, with the same job, task and session action ids. Keys,
metadata and bytes must then be equal. What propmaster does better on purpose has its own test:
the scripts overlook names that start with a dot. The last test has propmaster's drop-ins in the
place of the scripts, and the agent's own classes read what they print.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from tests.servers.deadline_peers import (
    FARM_ID,
    QUEUE_ID,
    ActionResult,
    DeadlinePeers,
    Submission,
    SyncJob,
    SyncStep,
    TaskRun,
    WorkerRun,
    new_job_id,
)
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files
from tests.servers.worker_session import Propmaster, WorkerSession

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

STEP = "step-" + "1" * 32
TASK = f"task-{'1' * 32}-0"
MTIME_NS = 1_719_848_112_123_456_789
STAMP = "2024-07-01 12:34:56"

INPUTS: dict[str | bytes, bytes | int] = {
    "scene.usd": b"scene",
    "cache/kept.vdb": b"kept",
    "cache/changed.vdb": b"changed",
    "cache/touched.vdb": b"touched",
    "cache/removed.vdb": b"removed",
    "emoji 🎬/é.tx": b"texture",
}


class StoredObject(NamedTuple):
    metadata: dict[str, str]
    content: bytes


def stored_below(s3: S3Server, root_prefix: str) -> dict[str, StoredObject]:
    """Return every object below the prefix, by its key without the prefix."""
    client = s3.client()
    found = {}
    pages = client.get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=s3.bucket, Prefix=f"{root_prefix}/"):
        for item in page.get("Contents", []):
            answer = client.get_object(Bucket=s3.bucket, Key=item["Key"])
            found[item["Key"].removeprefix(f"{root_prefix}/")] = StoredObject(
                metadata=answer["Metadata"], content=answer["Body"].read()
            )
    return found


def outputs_below(s3: S3Server, root_prefix: str) -> dict[str, StoredObject]:
    """Leave out the input manifests: each submission gives them a key of its own."""
    stored = stored_below(s3, root_prefix)
    return {key: found for key, found in stored.items() if "/Inputs/" not in key}


def tasks_of(commands: Sequence[str], *, task_id: str | None = TASK) -> list[TaskRun]:
    """Return a task for each command; of a chunk there is none, and of a task no second run."""
    return [
        TaskRun(
            command=command,
            step_id=STEP,
            task_id=task_id and f"{task_id.rpartition('-')[0]}-{at}",
            session_action_id=f"sessionaction-{'3' * 32}-{at}",
            # The second fraction is cut, not rounded, on its way into the key.
            started_at=1_719_848_112.000001 + at * 10.7,
        )
        for at, command in enumerate(commands)
    ]


def work_twice(
    *,
    peers: DeadlinePeers,
    propmaster: Propmaster,
    submit: Callable[[str], Submission],
    s3_prefix: str,
    tmp_path: Path,
    tasks: Sequence[TaskRun],
) -> tuple[str, str]:
    """Return the root prefixes that the agent's scripts and propmaster have worked below."""
    job_id = new_job_id()
    by_scripts, by_us = f"{s3_prefix}-scripts", f"{s3_prefix}-propmaster"
    peers.work(
        submit(by_scripts),
        job_id,
        session_directory=tmp_path / "session-of-scripts",
        actions=[SyncJob(), *tasks],
    )
    session = WorkerSession(
        propmaster,
        directory=tmp_path / "session-of-propmaster",
        submission=submit(by_us),
        job_id=job_id,
    )
    session.start()
    for task in tasks:
        session.run_task(task)
    session.end()
    return by_scripts, by_us


RENDER = f"""
    mkdir -p "$ROOT_0/renders/deep/er"; cd "$ROOT_0/renders"
    printf beauty > beauty.exr; printf beauty > 'same content.exr'; : > empty.exr
    printf 1 > 'deep/er/😀.exr'; printf 2 > $'deep/\\xe9t\\xe9.exr'
    printf 3 > $'tab\\t and "quote".exr'
    ln -s beauty.exr link.exr; ln -s nowhere broken.exr
    mkdir empty-directory
    find . -type f -exec touch -d '{STAMP}.123456789' {{}} +
"""
REWORK = f"""
    cd "$ROOT_0/cache"; printf more >> changed.vdb; rm removed.vdb
    touch -d '{STAMP}.5' changed.vdb
"""
TOUCH = f"""touch -d '{STAMP}.5' "$ROOT_0/cache/touched.vdb\""""
FRAMES = [
    f"""mkdir -p "$ROOT_0/renders"; cd "$ROOT_0/renders"
        printf {frame} > {frame}.exr; touch -d '{STAMP}.{frame}' {frame}.exr"""
    for frame in (1, 2)
]
RENDER_AGAIN = f"""
    cd "$ROOT_0/renders"; printf again > 1.exr; touch -d '{STAMP}.3' 1.exr
"""
MOST_OF_A_BLOCK = f"""
    mkdir -p "$ROOT_0/renders"; head -c 20000001 /dev/zero > "$ROOT_0/renders/zero.vdb"
    touch -d '{STAMP}' "$ROOT_0/renders/zero.vdb"
"""

ODD_TIMES_AND_NAMES = """
import os
os.makedirs("renders/x")
os.makedirs("renders/" + "d" * 250 + "/" + "e" * 250 + "/" + "f" * 250)
os.mkdir("[a] *")
last_of_a_second, last_of_a_microsecond = 1719848112_999999999, 1719848112_123456999
times = [last_of_a_second, last_of_a_microsecond, 0, 999, -1, -999, -1001, -86400_000000001]
times += [-2208988800_123456789, 4102444800_999999999]
names = [b"a" * 255, b"\\x01\\x1f\\x7f", b"line\\nline\\r", b" lead", b"trail ", b"dot."]
names += [b"\\xff\\xfe", b"\\xed\\xa0\\xbd\\xed\\xb8\\x80", b"\\xc2\\x85\\xe2\\x80\\xa8"]
names += [b"\\xef\\xbb\\xbfmark", b"\\xef\\xbf\\xbf", b"\\xf4\\x8f\\xbf\\xbf"]
names += [b"back\\\\slash", b"star*?[x]", b"C:", b"~", b"-rf", b"%41+"]
deepest = b"/".join(letter * 250 for letter in (b"d", b"e", b"f"))
paths = [b"renders/" + name for name in names]
paths += [b"renders/" + deepest + b"/leaf", b"renders/x/1", b"[a] */2"]
for at, path in enumerate(paths):
    with open(path, "wb") as file:
        file.write(path)
    os.utime(path, ns=(0, times[at % len(times)]))
"""
ODD = f"""
    cd "$ROOT_0"; python3 -c '{ODD_TIMES_AND_NAMES}'
    mkdir -p renders/a/b elsewhere renders/empty/empty; printf x > renders/a/b/x
    printf y > elsewhere/y; mkfifo renders/fifo
    touch -d '{STAMP}.25' elsewhere/y renders/a/b/x; ln renders/a/b/x renders/hard
    ln -s a renders/linked; ln -s ../elsewhere renders/other; ln -s ../scene.usd renders/scene
    ln -s a/b/x renders/one; ln -s one renders/two
"""

CASES: dict[str, tuple[list[str], list[str]]] = {
    "times, names, links and spellings that are odd": (
        ["renders/", "./renders/x", "renders//a", "[a] *", "not there"],
        [ODD],
    ),
    "names and links": (["renders"], [RENDER]),
    "inputs changed in place": (["cache"], [REWORK]),
    "two output directories": (["cache", "renders"], [REWORK + RENDER]),
    "a directory within another": (["renders", "renders/deep"], [RENDER]),
    "the root itself": (["."], [RENDER + REWORK]),
    "three tasks of one session": (["renders"], [*FRAMES, RENDER_AGAIN]),
    "a large file": (["renders"], [MOST_OF_A_BLOCK]),
    "nothing": (["renders"], ["true"]),
    "a file that is no output": (["renders"], ['echo > "$ROOT_0/elsewhere.txt"']),
}


@pytest.mark.parametrize("case", CASES)
def test_keys_metadata_and_bytes_are_those_of_the_scripts(
    peers: DeadlinePeers,
    propmaster: Propmaster,
    s3: S3Server,
    s3_prefix: str,
    tmp_path: Path,
    case: str,
) -> None:
    output_directories, commands = CASES[case]
    root = tmp_path / "shöt 010"
    write_files(root, INPUTS, mtime_ns=MTIME_NS)

    def submit(root_prefix: str) -> Submission:
        return peers.submit(
            root,
            bucket=s3.bucket,
            root_prefix=root_prefix,
            output_directories=output_directories,
        )

    by_scripts, by_us = work_twice(
        peers=peers,
        propmaster=propmaster,
        submit=submit,
        s3_prefix=s3_prefix,
        tmp_path=tmp_path,
        tasks=tasks_of(commands),
    )

    assert outputs_below(s3, by_us) == outputs_below(s3, by_scripts)


def test_an_input_that_was_only_touched_is_an_output_of_the_scripts_and_none_of_ours(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = tmp_path / "show"
    write_files(root, INPUTS, mtime_ns=MTIME_NS)

    def submit(root_prefix: str) -> Submission:
        return peers.submit(
            root, bucket=s3.bucket, root_prefix=root_prefix, output_directories=["cache"]
        )

    by_scripts, by_us = work_twice(
        peers=peers,
        propmaster=propmaster,
        submit=submit,
        s3_prefix=s3_prefix,
        tmp_path=tmp_path,
        tasks=tasks_of([TOUCH]),
    )

    def manifests(prefix: str) -> list[str]:
        return [key for key in outputs_below(s3, prefix) if key.endswith("_output")]

    assert len(manifests(by_scripts)) == 1
    assert manifests(by_us) == []


def test_a_chunk_has_no_task_in_its_keys(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = tmp_path / "show"
    write_files(root, INPUTS, mtime_ns=MTIME_NS)

    def submit(root_prefix: str) -> Submission:
        return peers.submit(
            root, bucket=s3.bucket, root_prefix=root_prefix, output_directories=["renders"]
        )

    by_scripts, by_us = work_twice(
        peers=peers,
        propmaster=propmaster,
        submit=submit,
        s3_prefix=s3_prefix,
        tmp_path=tmp_path,
        tasks=tasks_of(FRAMES, task_id=None),
    )
    ours = outputs_below(s3, by_us)

    assert ours == outputs_below(s3, by_scripts)
    assert not any("task-" in key for key in ours)


@pytest.mark.slow
def test_a_root_of_outputs_only_and_an_ascii_root_are_named_as_the_scripts_name_them(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    write_files(inputs, INPUTS, mtime_ns=MTIME_NS)
    outputs.mkdir()

    def submit(root_prefix: str) -> Submission:
        first, second = (
            peers.submit(
                root, bucket=s3.bucket, root_prefix=root_prefix, output_directories=["out", "logs"]
            )
            for root in (inputs, outputs)
        )
        return first.joined_with(second)

    command = f"""mkdir -p "$ROOT_0/out" "$ROOT_1/logs"; cp "$ROOT_0/scene.usd" "$ROOT_1/logs"
                  echo > "$ROOT_0/out/a"; touch -d '{STAMP}' "$ROOT_0/out/a" "$ROOT_1/logs/"*"""
    by_scripts, by_us = work_twice(
        peers=peers,
        propmaster=propmaster,
        submit=submit,
        s3_prefix=s3_prefix,
        tmp_path=tmp_path,
        tasks=tasks_of([command]),
    )

    assert outputs_below(s3, by_us) == outputs_below(s3, by_scripts)


@pytest.mark.slow
def test_names_that_start_with_a_dot_come_on_top_of_what_the_scripts_find(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = tmp_path / "show"
    write_files(root, INPUTS, mtime_ns=MTIME_NS)

    def submit(root_prefix: str) -> Submission:
        return peers.submit(
            root, bucket=s3.bucket, root_prefix=root_prefix, output_directories=["out"]
        )

    command = f"""mkdir -p "$ROOT_0/out/.cache"; cd "$ROOT_0/out"
                  printf seen > seen; printf 1 > .dotfile; printf 2 > .cache/below
                  touch -d '{STAMP}' seen .dotfile .cache/below"""
    by_scripts, by_us = work_twice(
        peers=peers,
        propmaster=propmaster,
        submit=submit,
        s3_prefix=s3_prefix,
        tmp_path=tmp_path,
        tasks=tasks_of([command]),
    )
    theirs, ours = (
        {key: stored for key, stored in outputs_below(s3, prefix).items() if "Manifests/" in key}
        for prefix in (by_scripts, by_us)
    )

    assert ours.keys() == theirs.keys()
    [of_scripts], [of_us] = (
        [json.loads(stored.content)["paths"] for stored in found.values()]
        for found in (theirs, ours)
    )
    assert [entry["path"] for entry in of_scripts] == ["out/seen"]
    assert [entry["path"] for entry in of_us] == ["out/.cache/below", "out/.dotfile", "out/seen"]
    assert of_us[-1:] == of_scripts


def test_submit_uploads_what_the_clients_submit_uploads(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    root = tmp_path / "shöt 010"
    names: dict[str | bytes, bytes | int] = {
        **INPUTS,
        b"\xe9t\xe9.txt": b"not UTF-8",
        ".hidden/file": b"hidden",
        "twice/a": b"twice",
        "twice/b": b"twice",
        "empty": b"",
        "large.vdb": 20_000_001,
        "\ue000 after 😀": b"order is by UTF-16",
        "😀": b"order is by UTF-16",
    }
    write_files(root, names, mtime_ns=MTIME_NS)
    (root / "link.usd").symlink_to("scene.usd")
    by_client, by_us = f"{s3_prefix}-client", f"{s3_prefix}-propmaster"

    theirs = peers.submit(
        root, bucket=s3.bucket, root_prefix=by_client, output_directories=[".", "renders"]
    )
    ours = propmaster.submit(
        root,
        store=f"s3://{s3.bucket}/{by_us}",
        farm_id=FARM_ID,
        queue_id=QUEUE_ID,
        output_directories=[".", "renders"],
    )

    assert without_guids(ours.attachments) == without_guids(theirs.attachments)
    assert by_last_name(stored_below(s3, by_us)) == by_last_name(stored_below(s3, by_client))


def without_guids(attachments: dict[str, object]) -> object:
    """Blank the one part of an input manifest's path that is random."""
    text = json.dumps(attachments, sort_keys=True)
    document = json.loads(text)
    for manifest in document["manifests"]:
        folders = manifest["inputManifestPath"].split("/")
        assert len(folders[3]) == 32
        manifest["inputManifestPath"] = "/".join([*folders[:3], "guid", *folders[4:]])
    return document


def by_last_name(stored: dict[str, StoredObject]) -> dict[str, StoredObject]:
    return {key.rpartition("/")[2]: found for key, found in stored.items()}


OTHER_STEP = "step-" + "2" * 32
LOG = f"""mkdir -p "$ROOT_1/logs"; ls -A "$ROOT_0/renders" > "$ROOT_1/logs/list"
          touch -d '{STAMP}.75' "$ROOT_1/logs/list\""""


@pytest.mark.slow
def test_the_drop_ins_leave_and_tell_what_the_scripts_do(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    """A session of one step with tasks and a chunk, and one of a step that depends on it."""
    root, outputs = tmp_path / "shöt 010", tmp_path / "outputs"
    write_files(root, INPUTS, mtime_ns=MTIME_NS)
    outputs.mkdir()
    tasks = [*tasks_of([RENDER, "true", FRAMES[0]]), *tasks_of([LOG], task_id=None)]
    later = msgspec.structs.replace(tasks_of([f"{LOG}\n{FRAMES[1]}"])[0], step_id=OTHER_STEP)
    sessions: dict[str, list[SyncJob | SyncStep | TaskRun]] = {
        "session-1": [SyncJob(), *tasks],
        "session-2": [SyncJob(), SyncStep(depends_on=[STEP]), later],
    }
    job_id = new_job_id()

    def work(by: str, scripts: Mapping[str, Sequence[str]] | None) -> list[WorkerRun]:
        first, second = (
            peers.submit(
                place,
                bucket=s3.bucket,
                root_prefix=f"{s3_prefix}-{by}",
                output_directories=["renders", "logs"],
            )
            for place in (root, outputs)
        )
        submission = first.joined_with(second)
        return [
            peers.work(
                submission,
                job_id,
                session_directory=tmp_path / by / name,
                actions=actions,
                scripts=scripts,
                script_environment=propmaster.drop_in_environment if scripts else None,
            )
            for name, actions in sessions.items()
        ]

    theirs = work("scripts", None)
    ours = work("drop-ins", propmaster.drop_ins)

    of_scripts, of_us = (outputs_below(s3, f"{s3_prefix}-{by}") for by in ("scripts", "drop-ins"))
    assert of_us == of_scripts
    assert len([key for key in of_us if key.endswith("_output")]) == 5
    for name, their_root in theirs[1].roots.items():
        assert_same_files(Path(ours[1].roots[name]), Path(their_root))
    for their_run, our_run in zip(theirs, ours, strict=True):
        for their_action, our_action in zip(their_run.actions, our_run.actions, strict=True):
            told = "\nja_upload: " in their_action.output
            assert our_action.uploads == (their_action.uploads if told else [])
            assert told_manifests(our_run, our_action) == told_manifests(their_run, their_action)
            assert our_action.failures == []
    rendered, nothing = theirs[0].actions[1:3]
    assert nothing.uploads == rendered.uploads != [], "the scripts let the agent repeat itself"
    syncs = [ours[0].actions[0], *ours[1].actions[:2]]
    assert [sync.progress[-1] for sync in syncs] == [100.0] * 3
    assert all(sync.statuses for sync in syncs)


STEPS = ["step-" + digit * 32 for digit in "123"]
WINDOWS = {
    "rootPath": "C:\\Users\\mé\\show",
    "rootPathFormat": "windows",
    "outputRelativeDirectories": ["renders\\beauty", "renders\\b c\\d"],
}
SPELLED = {
    "rootPath": "/mnt/projects/shot01/",
    "fileSystemLocationName": "Projects X",
    "outputRelativeDirectories": ["out"],
}
BELOW = {"rootPath": "/mnt/projects/shot01/sub", "outputRelativeDirectories": ["o/p", "o"]}
SHARE = {
    "rootPath": "\\\\server\\share",
    "rootPathFormat": "windows",
    "fileSystemLocationName": "L",
    "outputRelativeDirectories": ["."],
}


def one_task(step_id: str, command: str, *, number: int) -> TaskRun:
    return TaskRun(
        command=command,
        step_id=step_id,
        task_id=f"task-{step_id.removeprefix('step-')}-0",
        session_action_id=f"sessionaction-{'3' * 32}-{number}",
        started_at=1_719_848_112.5 + number,
    )


def with_roots(submissions: Sequence[Submission], *roots: Mapping[str, object]) -> Submission:
    """Return one job of several submissions, whose roots are called otherwise."""
    job = submissions[0]
    for other in submissions[1:]:
        job = job.joined_with(other)
    manifests = [
        {**manifest, **root}
        for manifest, root in zip(job.attachments["manifests"], roots, strict=True)
    ]
    return msgspec.structs.replace(job, attachments={**job.attachments, "manifests": manifests})


def by_both(
    work: Callable[[str, dict[str, Any]], list[WorkerRun]], propmaster: Propmaster, s3_prefix: str
) -> tuple[list[WorkerRun], list[WorkerRun]]:
    """Have the scripts work below `<prefix>-scripts`, and the drop-ins below `<prefix>-drop-ins`.

    Args:
        work: Runs sessions of a job below a root prefix, with what the peers are to run.
        propmaster: Whose the drop-ins are.
        s3_prefix: Of this test.
    """
    drop_ins = {
        "scripts": propmaster.drop_ins,
        "script_environment": propmaster.drop_in_environment,
    }
    return work(f"{s3_prefix}-scripts", {}), work(f"{s3_prefix}-drop-ins", drop_ins)


@pytest.mark.slow
def test_a_chain_of_steps_with_roots_of_all_kinds(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    """The third step depends on the two before, of which the second has changed the first's."""
    places = [tmp_path / f"root-{number}" for number in range(4)]
    for number, place in enumerate(places[:3]):
        files: dict[str | bytes, bytes | int] = {"scene": b"%d" % number, "deep/empty": b""}
        write_files(place, files, mtime_ns=MTIME_NS)
    places[3].mkdir()
    first = f"""
        mkdir -p "$ROOT_0/renders/beauty" "$ROOT_1/out" "$ROOT_2/o/p" "$ROOT_3"
        cd "$ROOT_1/out"; printf one > both; printf one > first
        printf a > "$ROOT_0/renders/beauty/a"; printf n > "$ROOT_0/renders/no output"
        printf c > "$ROOT_2/o/p/c"; : > "$ROOT_3/empty"
        touch -d '{STAMP}.25' both first "$ROOT_0/renders/"{{beauty/a,"no output"}} \\
            "$ROOT_2/o/p/c" "$ROOT_3/empty"
    """
    second = f"""cd "$ROOT_1/out"; printf two > both; touch -d '{STAMP}.5' both"""
    third = f"""cd "$ROOT_1/out"; cat both first > "$ROOT_3/seen"
                touch -d '{STAMP}.75' "$ROOT_3/seen"
    """
    sessions: list[list[SyncJob | SyncStep | TaskRun]] = [
        [SyncJob(), one_task(STEPS[0], first, number=1)],
        [SyncJob(), SyncStep(depends_on=STEPS[:1]), one_task(STEPS[1], second, number=2)],
        [SyncJob(), SyncStep(depends_on=STEPS[:2]), one_task(STEPS[2], third, number=3)],
    ]
    job_id = new_job_id()

    def work(root_prefix: str, scripts: dict[str, Any]) -> list[WorkerRun]:
        job = with_roots(
            [
                peers.submit(
                    place, bucket=s3.bucket, root_prefix=root_prefix, output_directories=["out"]
                )
                for place in places
            ],
            *(WINDOWS, SPELLED, BELOW, SHARE),
        )
        at = tmp_path / root_prefix
        return [
            peers.work(job, job_id, session_directory=at / f"{n}", actions=actions, **scripts)
            for n, actions in enumerate(sessions)
        ]

    theirs, ours = by_both(work, propmaster, s3_prefix)

    assert outputs_below(s3, f"{s3_prefix}-drop-ins") == outputs_below(s3, f"{s3_prefix}-scripts")
    for their_run, our_run in zip(theirs, ours, strict=True):
        for name, their_root in their_run.roots.items():
            assert_same_files(Path(our_run.roots[name]), Path(their_root))
        their_last, our_last = their_run.actions[-1], our_run.actions[-1]
        assert our_last.uploads == their_last.uploads != []
        assert told_manifests(our_run, our_last) == told_manifests(their_run, their_last)
    seen = Path(ours[2].roots[SHARE["rootPath"]]) / "seen"  # type: ignore[index]  # of several types
    assert seen.read_text() == "twoone"


@pytest.mark.slow
def test_mapped_roots_of_which_one_is_in_the_other(
    peers: DeadlinePeers, propmaster: Propmaster, s3: S3Server, s3_prefix: str, tmp_path: Path
) -> None:
    """A root of Windows and one of POSIX, on a host that has both in one tree."""
    places = [tmp_path / f"root-{number}" for number in range(3)]
    for number, place in enumerate(places):
        write_files(place, {"scene": b"%d" % number, "deep/x": b"x"}, mtime_ns=MTIME_NS)
    show = {**SHARE, "outputRelativeDirectories": ["renders", "shots\\s1\\o"]}
    shots = {**SPELLED, "outputRelativeDirectories": ["o", "deep"]}
    command = f"""
        mkdir -p "$ROOT_0/renders" "$ROOT_1/o" "$ROOT_2/o"; printf changed > "$ROOT_1/deep/x"
        printf a > "$ROOT_0/renders/a"; printf b > "$ROOT_1/o/b"; printf c > "$ROOT_2/o/c"
        touch -d '{STAMP}.25' "$ROOT_0/renders/a" "$ROOT_1/o/b" "$ROOT_2/o/c" "$ROOT_1/deep/x"
    """
    job_id = new_job_id()

    def work(root_prefix: str, scripts: dict[str, Any]) -> list[WorkerRun]:
        job = with_roots(
            [peers.submit(place, bucket=s3.bucket, root_prefix=root_prefix) for place in places],
            *(show, shots, BELOW),
        )
        at = tmp_path / root_prefix
        mapping = {f"{show['rootPath']}": at / "show", f"{shots['rootPath']}": at / "show/shots/s1"}
        mapping[f"{shots['rootPath']}"].mkdir(parents=True)
        write_files(at / "show", {"of others": b"", "shots/s2/x": b""}, mtime_ns=MTIME_NS)
        run = peers.work(
            job,
            job_id,
            session_directory=at / "session",
            actions=[SyncJob(), one_task(STEPS[0], command, number=1)],
            path_mapping=mapping,
            **scripts,
        )
        return [run]

    [theirs], [ours] = by_both(work, propmaster, s3_prefix)

    assert outputs_below(s3, f"{s3_prefix}-drop-ins") == outputs_below(s3, f"{s3_prefix}-scripts")
    for name, their_root in theirs.roots.items():
        assert_same_files(Path(ours.roots[name]), Path(their_root))
    assert ours.actions[-1].uploads == theirs.actions[-1].uploads
    assert len(ours.actions[-1].uploads) == 3


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Times may differ by the microsecond that the scripts lose."""
    our_files, their_files = files_below(ours), files_below(theirs)
    assert our_files.keys() == their_files.keys()
    for path, found in our_files.items():
        expected = their_files[path]
        assert (found.size, found.sha256) == (expected.size, expected.sha256), path
        assert abs(found.mtime_us - expected.mtime_us) <= 1, path


def told_manifests(run: WorkerRun, action: ActionResult) -> dict[str, bytes]:
    """Return the manifests that an upload has left for later calls, by the job's root."""
    roots = {local: root for root, local in run.roots.items()}
    found = {}
    for snapshot in action.snapshots:
        directory = Path(snapshot["root"]).parent
        found[roots[snapshot["root"]]] = (directory / snapshot["manifest"]).read_bytes()
    return found
