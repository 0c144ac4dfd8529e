"""Where a job's roots are: several of them, mapped ones, Windows ones, and those of other steps."""

from pathlib import Path

import msgspec
import pytest

from agent_plugin.content.errors import (
    PathMappingError,
)
from agent_plugin.session.job import JobDocument
from agent_plugin.session.roots import session_directory_name
from tests.servers.hooks import Host, action, job_with_outputs, step
from tests.servers.sessions import MTIME_NS, Sessions, paths_of
from tests.servers.trees import files_below, write_files


def test_two_roots_have_a_manifest_each(any_sessions: Sessions) -> None:
    s = any_sessions
    first = s.submitted({"a": b"1"}, "out", root="one")
    second = s.submitted({"b": b"2"}, "out", root="two")
    manifests = (*first.attachments.manifests, *second.attachments.manifests)
    job = msgspec.structs.replace(
        first, attachments=msgspec.structs.replace(first.attachments, manifests=manifests)
    )

    started = s.host.start(job, s.session_dir)
    roots = [Path(root.local_root) for root in started.roots]
    assert [sorted(files_below(root)) for root in roots] == [["a"], ["b"]]
    (roots[1] / "out").mkdir()
    (roots[1] / "out/x").write_bytes(b"3")
    result = s.finish()

    assert paths_of(s.host, result) == [[], ["out/x"]]
    assert [root.root_path for root in s.host.outputs().roots] == [str(s.tmp_path / "two")]
    assert len(s.host.end(s.session_dir).removed) == 2


def test_two_manifests_of_one_root_are_merged_and_each_gets_its_outputs(
    sessions: Sessions,
) -> None:
    first = sessions.submitted({"a": b"old", "b": b"1"}, "out/a")
    write_files(sessions.source, {"a": b"newer"}, mtime_ns=MTIME_NS)
    second = sessions.submitted({"c": b"2"}, "out/b")
    located = msgspec.structs.replace(
        second.attachments.manifests[0], file_system_location_name="Other"
    )
    manifests = (*first.attachments.manifests, located)
    job = msgspec.structs.replace(
        first, attachments=msgspec.structs.replace(first.attachments, manifests=manifests)
    )

    started = sessions.host.start(job, sessions.session_dir)
    [root] = [Path(root.local_root) for root in started.roots]
    assert sorted(files_below(root)) == ["a", "b", "c"]
    assert (root / "a").read_bytes() == b"newer", "the later manifest wins"
    for name in ("out/a/x", "out/b/y"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(name.encode())
    result = sessions.finish()

    assert paths_of(sessions.host, result) == [["out/a/x"], ["out/b/y"]]
    # In no order: the two were stored in one tick of the disk's clock perhaps.
    assert {(r.location, r.root_path) for r in sessions.host.outputs().roots} == {
        (None, str(sessions.source)), ("Other", str(sessions.source)),
    }  # fmt: skip


def test_spaces_at_the_end_of_a_root_and_its_location_survive_the_store(
    any_sessions: Sessions,
) -> None:
    """S3 cuts them off, and then nobody would find the root that the outputs belong to."""
    s = any_sessions
    job = job_with_outputs(s.host.store_url, "/nowhere/on this host ", "renders")
    located = msgspec.structs.replace(
        job.attachments.manifests[0], file_system_location_name="My Projects "
    )
    job = msgspec.structs.replace(
        job, attachments=msgspec.structs.replace(job.attachments, manifests=(located,))
    )
    root = s.started(job)
    (root / "renders").mkdir()
    (root / "renders/x").write_bytes(b"x")
    s.finish()

    [found] = s.host.outputs().roots
    assert (found.location, found.root_path) == ("My Projects ", "/nowhere/on this host ")
    (root / "renders/x").unlink()
    s.host.sync_step(s.session_dir, step(2), [step(1)])
    assert (root / "renders/x").read_bytes() == b"x"


def test_a_root_without_inputs_is_made_and_its_outputs_are_found(any_sessions: Sessions) -> None:
    s = any_sessions
    job = job_with_outputs(s.host.store_url, "/nowhere/on this host", "renders", "logs")

    root = s.started(job)
    assert list(root.iterdir()) == []
    (root / "logs").mkdir()
    (root / "logs/x").write_bytes(b"1")

    assert paths_of(s.host, s.finish()) == [["logs/x"]]


def test_a_windows_root_has_a_directory_here_and_keeps_its_spelling(sessions: Sessions) -> None:
    submitted = sessions.submitted({"tex/a": b"1"}, "renders")
    windows = msgspec.structs.replace(
        submitted.attachments.manifests[0],
        root_path="C:\\Users\\Kim\\Show",
        root_path_format="windows",
        output_relative_directories=("renders\\final", "logs"),
    )
    job = msgspec.structs.replace(
        submitted, attachments=msgspec.structs.replace(submitted.attachments, manifests=(windows,))
    )

    root = sessions.started(job)
    assert root.name == session_directory_name("C:\\Users\\Kim\\Show")
    assert sorted(files_below(root)) == ["tex/a"]
    (root / "renders/final").mkdir(parents=True)
    (root / "renders/final/x").write_bytes(b"1")
    (root / "renders/draft").write_bytes(b"2")

    assert paths_of(sessions.host, sessions.finish()) == [["renders/final/x"]]
    [found] = sessions.host.outputs().roots
    assert found.root_path == "C:\\Users\\Kim\\Show"


def test_a_mapped_root_is_used_where_it_is_and_what_was_there_stays(
    any_sessions: Sessions,
) -> None:
    s = any_sessions
    shared = s.tmp_path / "mnt/shared"
    write_files(
        shared,
        {"renders/older.exr": b"of another job", "tex/wood.tx": b"another wood", "notes": b"mine"},
        mtime_ns=MTIME_NS,
    )
    submitted = s.submitted()
    located = msgspec.structs.replace(
        submitted.attachments.manifests[0], file_system_location_name="Shared"
    )
    rule = {
        "sourcePathFormat": "posix",
        "sourcePath": located.root_path,
        "destinationPath": str(shared),
    }
    job = JobDocument.decode(
        msgspec.json.encode(
            msgspec.to_builtins(
                msgspec.structs.replace(
                    submitted,
                    attachments=msgspec.structs.replace(
                        submitted.attachments, manifests=(located,)
                    ),
                )
            )
            | {"pathMappingRules": [rule]}
        ),
        "job",
    )

    assert s.started(job) == shared
    assert files_below(shared).items() >= files_below(s.source).items()
    (shared / "renders/0001.exr").write_bytes(b"new")
    result = s.finish()

    assert paths_of(s.host, result) == [["renders/0001.exr"]], "what was there before is no output"
    assert s.host.end(s.session_dir).removed == []
    assert (shared / "notes").read_bytes() == b"mine"
    assert (shared / "renders/older.exr").read_bytes() == b"of another job"


def test_a_location_that_no_rule_maps_is_refused(sessions: Sessions) -> None:
    submitted = sessions.submitted()
    located = msgspec.structs.replace(
        submitted.attachments.manifests[0], file_system_location_name="Shared"
    )
    rule = {"sourcePathFormat": "posix", "sourcePath": "/x", "destinationPath": "/y"}
    document = msgspec.to_builtins(submitted) | {"pathMappingRules": [rule]}
    document["attachments"]["manifests"] = [msgspec.to_builtins(located)]
    job = JobDocument.decode(msgspec.json.encode(document), "job")

    with pytest.raises(PathMappingError, match="Shared"):
        sessions.host.start(job, sessions.session_dir)


# ------------------------------------------------------------ dependencies


def test_what_a_step_depends_on_overwrites_what_is_there(any_sessions: Sessions) -> None:
    s = any_sessions
    job = s.submitted(stepDependencies={step(3): [step(1), step(2)]})
    root = s.started(job)
    for number, content in ((1, b"by step 1"), (2, b"by step 2")):
        (root / "renders/both").write_bytes(content)
        (root / f"renders/of step {number}").write_bytes(content)
        s.host.finish_task(s.session_dir, action(number, 0))
    (root / "renders/both").write_bytes(b"changed by hand")
    (root / "renders/of step 1").unlink()

    result = s.host.sync_step(s.session_dir, step(3))

    assert (root / "renders/both").read_bytes() == b"by step 2"
    assert (root / "renders/of step 1").read_bytes() == b"by step 1"
    assert result.roots[0].files == 3
    (root / "renders/of step 3").write_bytes(b"3")
    finished = s.host.finish_task(s.session_dir, action(3, 0))
    assert paths_of(s.host, finished) == [["renders/of step 3"]]


def test_another_host_gets_what_a_step_left(any_sessions: Sessions) -> None:
    s = any_sessions
    job = s.submitted()
    root = s.started(job)
    write_files(root, {"renders/beauty.exr": 4000}, mtime_ns=MTIME_NS)
    s.finish()
    other = Host(s.tmp_path / "other host", s.host.store_url, environment=s.host.environment)
    elsewhere = s.tmp_path / "elsewhere"
    started = other.start(job, elsewhere)
    local = Path(started.roots[0].local_root)
    assert not (local / "renders/beauty.exr").exists()

    result = other.sync_step(elsewhere, step(2), [step(1)])

    assert result.roots[0].bytes_fetched == 4000
    assert files_below(local) == files_below(root)


def test_a_step_without_dependencies_syncs_nothing(any_sessions: Sessions) -> None:
    any_sessions.started(any_sessions.submitted())

    assert any_sessions.host.sync_step(any_sessions.session_dir, step(1)).roots == []
