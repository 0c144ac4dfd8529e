"""What goes into a session and what comes out of it: outputs are told by their content.

Most tests use a store in a directory, since what they are about is this host; `any_sessions` runs
on S3 as well.
"""

import dataclasses
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.local_index import LocalIndex
from agent_plugin.session.roots import session_directory_name
from tests.servers.disks import MEBIBYTE, image_mounted, tmpfs_mounted
from tests.servers.hooks import action, job_of, step
from tests.servers.sessions import INPUTS, MTIME_NS, Sessions, hash_of, manifest_at, paths_of
from tests.servers.trees import files_below, write_files

NS = 1_000_000_000


def test_inputs_come_outputs_go_and_nothing_stays(any_sessions: Sessions) -> None:
    s = any_sessions
    root = s.started(s.submitted())
    assert files_below(root) == files_below(s.source)

    write_files(root, {"renders/0001.exr": 3000, "tex/not an output": 5}, mtime_ns=MTIME_NS)
    result = s.finish()

    assert (result.files, result.bytes_uploaded, result.deleted) == (1, 3000, [])
    assert paths_of(s.host, result) == [["renders/0001.exr"]]
    [found] = result.manifests
    data = manifest_at(s.host, found.output_manifest_path)
    assert data.entries[0].mtime == MTIME_NS // 1000
    assert s.host.end(s.session_dir).removed == [str(root)]
    assert list(s.session_dir.iterdir()) == []
    assert s.host.read_state(s.session_dir) is None
    s.host.get_outputs(s.tmp_path / "got")
    assert files_below(s.tmp_path / "got") == {
        "renders/0001.exr": files_below_of(3000, "renders/0001.exr", s.tmp_path)
    }


def files_below_of(size: int, name: str, tmp_path: Path) -> object:
    """Return the facts of a file as write_files makes it."""
    write_files(tmp_path / "again", {name: size}, mtime_ns=MTIME_NS)
    return files_below(tmp_path / "again")[name]


def test_a_second_session_of_the_job_fetches_nothing(any_sessions: Sessions) -> None:
    s = any_sessions
    job = s.submitted()
    s.started(job)
    s.host.end(s.session_dir)

    result = s.host.start(job, s.tmp_path / "sessions/session-2")

    assert result.roots[0].bytes_fetched == 0
    assert result.roots[0].bytes_reused == sum(
        {facts.sha256: facts.size for facts in files_below(s.source).values()}.values()
    )
    assert files_below(Path(result.roots[0].local_root)) == files_below(s.source)


def test_the_result_says_where_the_root_is_and_maps_its_path(sessions: Sessions) -> None:
    result = sessions.host.start(sessions.submitted(), sessions.session_dir)

    [root] = result.roots
    local = sessions.session_dir / session_directory_name(str(sessions.source))
    assert (root.root_path, root.local_root) == (str(sessions.source), str(local))
    [rule] = result.path_mapping_rules
    assert (rule.source_path, rule.destination_path) == (str(sessions.source), str(local))


# ------------------------------------------------------------ what is an output


def test_an_input_that_is_written_anew_is_an_output(any_sessions: Sessions) -> None:
    """Input and output in one place: what tasks leave behind of an input is told by its content."""
    s = any_sessions
    root = s.started(s.submitted(dict(INPUTS), "."))
    (root / "scene.usd").write_bytes(b"#usda 1.1\n")
    (root / "tex/wood.tx").write_bytes((root / "tex/wood.tx").read_bytes())

    result = s.finish()

    assert paths_of(s.host, result) == [["scene.usd"]]
    assert s.outputs() == {"scene.usd": hash_of(b"#usda 1.1\n")}


def test_when_the_root_itself_is_an_output_directory_everything_new_is_an_output(
    sessions: Sessions,
) -> None:
    root = sessions.started(sessions.submitted(dict(INPUTS), "."))
    (root / "new").write_bytes(b"1")
    (root / "deep/er").mkdir(parents=True)
    (root / "deep/er/new").write_bytes(b"2")

    assert paths_of(sessions.host, sessions.finish()) == [["deep/er/new", "new"]]


def test_a_file_that_was_only_touched_is_no_output(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    touched = root / "renders/reference.exr"
    os.utime(touched, (1, 1))

    result = sessions.finish()

    assert (result.files, result.bytes_uploaded) == (0, 0)
    assert paths_of(sessions.host, result) == [[]]


@pytest.mark.parametrize("seconds", [-2_500_000_000, -11_644_473_600], ids=["1890", "1601"])
def test_an_input_whose_time_the_file_system_can_not_keep_is_no_output(
    sessions: Sessions, seconds: int
) -> None:
    """The submitter's disk has the year; ext4 has nothing before 1901."""
    s = sessions
    image, disk = s.tmp_path / "image", s.tmp_path / "disk"
    with (
        tmpfs_mounted(s.tmp_path / "from", size=MEBIBYTE) as before_1901,
        image_mounted("ext4", image, disk, size=100 * MEBIBYTE) as ext4,
    ):
        s.source, s.session_dir = before_1901 / "source", ext4 / "session"
        write_files(s.source, {"renders/a": b"a", "renders/b": b"b"}, mtime_ns=seconds * NS)
        root = s.started(job_of(s.host.submit(s.source, output_directories=["renders"])[0]))
        assert (root / "renders/a").stat().st_mtime_ns > seconds * NS
        (root / "renders/b").unlink()

        result = s.finish(0)

        assert (result.files, result.deleted) == (0, ["renders/b"])
        (root / "renders/a").write_bytes(b"written")
        assert paths_of(s.host, s.finish(1)) == [["renders/a"]]


def test_what_two_tasks_write_within_one_tick_of_the_file_system_is_of_both(
    sessions: Sessions,
) -> None:
    """Of one size, on a disk whose times are whole seconds.

    Seen to fail when whatever has the times that it had counted as untouched.
    """
    s = sessions
    image = s.tmp_path / "image"
    image.touch()
    os.truncate(image, 100 * MEBIBYTE)
    # So small inodes have no room for parts of a second.
    subprocess.run(["mkfs.ext4", "-q", "-F", "-I", "128", image], check=True, capture_output=True)
    job = s.submitted({"a": b"a"})
    with image_mounted("ext4", image, s.tmp_path / "disk") as disk:
        s.session_dir = disk / "session"
        written = s.started(job) / "renders/written"
        written.parent.mkdir(exist_ok=True)
        times: list[int] = []
        for number in range(2):
            while not number and time.time() % 1 > 0.1:
                time.sleep(0.01)
            written.write_bytes(b"%d" % number)
            times.append(written.stat().st_ctime_ns)

            found = paths_of(s.host, s.finish(number))

            assert found == [["renders/written"]], times
        assert times[0] == times[1], "this host is too slow for the test to say anything"


def test_an_edit_that_keeps_size_and_time_is_found(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    edited = root / "renders/reference.exr"
    before = edited.stat()
    edited.write_bytes(edited.read_bytes()[::-1])
    os.utime(edited, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert edited.stat().st_mtime_ns == before.st_mtime_ns

    assert paths_of(sessions.host, sessions.finish()) == [["renders/reference.exr"]]


def test_a_file_replaced_by_its_copy_is_no_output(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    old = root / "renders/reference.exr"
    new = root / "renders/new"
    new.write_bytes(old.read_bytes())
    new.rename(old)

    assert sessions.finish().files == 0


def test_a_deletion_is_reported_once(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/reference.exr").unlink()

    assert sessions.finish(0).deleted == ["renders/reference.exr"]
    assert sessions.finish(1).deleted == []


def test_an_output_that_a_later_task_deletes_is_reported_too(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/0001.exr").write_bytes(b"1")
    assert sessions.finish(0).files == 1
    (root / "renders/0001.exr").unlink()

    assert sessions.finish(1).deleted == ["renders/0001.exr"]


def test_hidden_files_and_names_that_are_not_utf8_are_outputs(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    names = [".a", ".b/.c", os.fsdecode(b"\xff\xfe"), "snow \u2603", "new\nline"]
    for name in names:
        path = root / "renders" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.fsencode(name))

    result = sessions.finish()

    assert sorted(paths_of(sessions.host, result)[0]) == sorted(f"renders/{n}" for n in names)
    sessions.host.get_outputs(sessions.tmp_path / "got")
    for name in names:
        assert (sessions.tmp_path / "got/renders" / name).read_bytes() == os.fsencode(name)


def test_a_link_inside_the_root_is_followed(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/linked").symlink_to("../scene.usd")
    (root / "renders/textures").symlink_to("../tex")

    assert paths_of(sessions.host, sessions.finish()) == [
        ["renders/linked", "renders/textures/copy of wood.tx", "renders/textures/wood.tx"]
    ]


def test_a_link_that_leaves_the_root_is_skipped_with_a_warning(
    sessions: Sessions, expected_events: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected_events.add(events.FILE_SKIPPED)
    root = sessions.started(sessions.submitted())
    (root / "renders/passwords").symlink_to("/etc/passwd")
    (root / "renders/etc").symlink_to("/etc")
    (root / "renders/right").write_bytes(b"1")

    result = sessions.finish()

    assert paths_of(sessions.host, result) == [["renders/right"]]
    skipped = [record for record in caplog.records if record.msg == events.FILE_SKIPPED]
    assert sorted(Path(events.fields_of(r)["path"]).name for r in skipped) == ["etc", "passwords"]  # type: ignore[arg-type] # a str


def test_a_task_that_left_nothing_has_no_manifest(any_sessions: Sessions) -> None:
    any_sessions.started(any_sessions.submitted())

    result = any_sessions.finish()

    assert (result.files, result.manifests[0].output_manifest_path) == (0, "")
    assert json.loads(msgspec.json.encode(result))["manifests"] == [{}]
    assert any_sessions.outputs() == {}


# ------------------------------------------------------------ several tasks


def test_each_task_stores_only_what_it_changed(any_sessions: Sessions) -> None:
    s = any_sessions
    root = s.started(s.submitted())
    (root / "renders/0.exr").write_bytes(b"zero")
    first = s.finish(0)
    (root / "renders/1.exr").write_bytes(b"one")
    (root / "renders/0.exr").write_bytes(b"zero again")
    second = s.finish(1)

    assert paths_of(s.host, first) == [["renders/0.exr"]]
    assert paths_of(s.host, second) == [["renders/0.exr", "renders/1.exr"]]
    assert s.outputs() == {
        "renders/0.exr": hash_of(b"zero again"), "renders/1.exr": hash_of(b"one"),
    }  # fmt: skip


def test_content_that_the_store_has_is_not_sent_again(any_sessions: Sessions) -> None:
    s = any_sessions
    root = s.started(s.submitted())
    (root / "renders/0.exr").write_bytes(b"same")
    s.finish(0)
    (root / "renders/1.exr").write_bytes(b"same")

    result = s.finish(1)

    assert (result.files, result.bytes_uploaded, result.bytes_reused) == (1, 0, 4)


def test_a_file_that_vanishes_before_it_is_read_does_not_fail_the_task(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = sessions
    root = s.started(s.submitted())
    for name in ("0.exr", ".0.exr.tmp", "reference.exr"):
        (root / "renders" / name).write_bytes(b"of the task")
    look_up = LocalIndex.lookup_hashes

    def looking_up(index: LocalIndex, files: Any) -> dict[bytes, Digest]:
        # After the walk and before the first file is read.
        (root / "renders/.0.exr.tmp").unlink(missing_ok=True)
        (root / "renders/reference.exr").unlink(missing_ok=True)
        return look_up(index, files)

    with monkeypatch.context() as patch:
        patch.setattr(LocalIndex, "lookup_hashes", looking_up)
        result = s.finish(0)

    assert paths_of(s.host, result) == [["renders/0.exr"]]
    assert result.deleted == ["renders/reference.exr"], "an input, not the temporary file"
    again = s.finish(1)
    assert (again.files, again.deleted) == (0, [])


def test_a_task_that_is_run_again_has_what_it_left_both_times(any_sessions: Sessions) -> None:
    """Readers take only the last manifest of a task, so that has to have all."""
    s = any_sessions
    root = s.started(s.submitted())
    for name in ("0.exr", "1.exr", "2.exr"):
        (root / "renders" / name).write_bytes(b"first run")
    s.host.finish_task(s.session_dir, action(1, 0, started_at=1_700_000_000.0))
    (root / "renders/0.exr").write_bytes(b"second run")
    (root / "renders/1.exr").unlink()

    second = action(1, 0, started_at=1_700_000_001.0, number=1)
    result = s.host.finish_task(s.session_dir, second)

    assert s.outputs() == {
        "renders/0.exr": hash_of(b"second run"), "renders/2.exr": hash_of(b"first run"),
    }  # fmt: skip
    assert result.deleted == ["renders/1.exr"]


def test_a_failed_task_uploads_nothing(any_sessions: Sessions) -> None:
    s = any_sessions
    root = s.started(s.submitted())
    (root / "renders/half.exr").write_bytes(b"ha")

    result = s.finish(0, failed=True)

    assert (result.files, result.bytes_uploaded, len(result.manifests)) == (0, 0, 1)
    assert s.outputs() == {}


def test_a_failed_task_uploads_when_that_is_wished(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/log.txt").write_bytes(b"why")

    sessions.host.finish_task(sessions.session_dir, action(), failed=True, upload_failed=True)

    assert sessions.outputs() == {"renders/log.txt": hash_of(b"why")}


def test_a_chunk_of_tasks_has_its_manifest_below_the_step(any_sessions: Sessions) -> None:
    s = any_sessions
    root = s.started(s.submitted())
    (root / "renders/0.exr").write_bytes(b"chunk")
    run = action(1, None, started_at=1_700_000_000.0)

    result = s.host.finish_task(s.session_dir, run)

    [found] = result.manifests
    assert f"/{step(1)}/2023-11-14T22:13:20.000000Z_{run.session_action_id}/" in (
        found.output_manifest_path
    )
    assert s.outputs() == {"renders/0.exr": hash_of(b"chunk")}


# ------------------------------------------------------------ an answer that was lost


@pytest.mark.parametrize("task_number", [0, None], ids=["task", "chunk"])
def test_an_action_that_is_finished_again_gets_the_same_answer(
    any_sessions: Sessions, task_number: int | None
) -> None:
    s = any_sessions
    root = s.started(s.submitted())
    (root / "renders/0.exr").write_bytes(b"zero")
    (root / "renders/reference.exr").unlink()
    run = action(1, task_number, started_at=1_700_000_000.0)
    first = s.host.finish_task(s.session_dir, run)
    assert (first.files, first.bytes_uploaded, first.deleted) == (1, 4, ["renders/reference.exr"])
    transfers = len(s.host.transfers())

    # As from a command line without --started-at.
    again = s.host.finish_task(s.session_dir, dataclasses.replace(run, started_at=time.time()))

    assert msgspec.structs.replace(again, seconds=first.seconds) == first
    assert len(s.host.transfers()) == transfers, "nothing is stored again"
    failed = s.host.finish_task(s.session_dir, run, failed=True)
    assert (failed.files, failed.deleted) == (0, [])


def test_an_answer_survives_a_second_start(sessions: Sessions) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    (root / "renders/0.exr").write_bytes(b"zero")
    run = action(1, 0)
    first = sessions.host.finish_task(sessions.session_dir, run)
    sessions.started(job)

    again = sessions.host.finish_task(sessions.session_dir, run)

    assert msgspec.structs.replace(again, seconds=first.seconds) == first
    assert again.bytes_uploaded == 4, "not what a second upload would have said"


@pytest.mark.parametrize("task_number", [0, None], ids=["task", "chunk"])
def test_an_action_that_is_finished_again_after_a_change_has_all_that_it_left(
    sessions: Sessions, task_number: int | None
) -> None:
    """Both manifests have one key, so the second one must have what the first one had."""
    root = sessions.started(sessions.submitted())
    for name in ("0.exr", "1.exr", "2.exr"):
        (root / "renders" / name).write_bytes(name.encode())
    run = action(1, task_number, started_at=1_700_000_000.0)
    sessions.host.finish_task(sessions.session_dir, run)
    (root / "renders/1.exr").write_bytes(b"1 is written late")
    (root / "renders/2.exr").touch()

    again = sessions.host.finish_task(sessions.session_dir, run)

    assert paths_of(sessions.host, again) == [["renders/0.exr", "renders/1.exr", "renders/2.exr"]]
    assert sessions.outputs()["renders/1.exr"] == hash_of(b"1 is written late")
    assert len(sessions.outputs()) == 3


def test_another_chunk_does_not_have_what_one_before_it_left(sessions: Sessions) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/0.exr").write_bytes(b"zero")
    first = action(1, None)
    sessions.host.finish_task(sessions.session_dir, first)
    (root / "renders/1.exr").write_bytes(b"one")

    second = sessions.host.finish_task(sessions.session_dir, action(1, None))

    assert paths_of(sessions.host, second) == [["renders/1.exr"]]
    # The state has room for one answer, but whose a file is stays known.
    again = sessions.host.finish_task(sessions.session_dir, first)
    assert paths_of(sessions.host, again) == [["renders/0.exr"]]
