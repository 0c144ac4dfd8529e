"""Sessions that are started again, by the same job or another, and syncs that did not finish."""

import json
import shutil
from pathlib import Path

import pytest

from agent_plugin.content.errors import PropmasterError, SessionStateError
from agent_plugin.session.job import JobDocument
from tests.servers.hooks import action, step
from tests.servers.s3_server import S3Server
from tests.servers.sessions import Sessions, hash_of


def test_what_a_task_left_before_a_second_start_is_its_output_still(sessions: Sessions) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    (root / "renders/beauty.exr").write_bytes(b"rendered, and not finished")

    sessions.started(job)
    result = sessions.finish()

    assert result.files == 1
    assert sessions.outputs() == {"renders/beauty.exr": hash_of(b"rendered, and not finished")}


def test_a_second_start_counts_what_it_keeps_in_output_directories(sessions: Sessions) -> None:
    job = sessions.submitted({"a": b"a", "renders/plate.exr": b"a plate"}, "renders", ".")
    first, second = (sessions.host.start(job, sessions.session_dir).roots[0] for _ in range(2))

    assert (second.files, second.bytes) == (first.files, first.bytes) == (2, 8)


def test_an_input_that_a_task_changed_in_an_output_directory_survives_a_second_start(
    sessions: Sessions,
) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    (root / "renders/reference.exr").write_bytes(b"reworked")

    sessions.started(job)
    sessions.finish()

    assert sessions.outputs() == {"renders/reference.exr": hash_of(b"reworked")}


def test_a_task_that_runs_again_after_a_second_start_keeps_what_its_first_run_left(
    sessions: Sessions,
) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    (root / "renders/1.exr").write_bytes(b"one")
    sessions.host.finish_task(sessions.session_dir, action(1, 0, started_at=1_700_000_000.0))
    sessions.started(job)
    (root / "renders/2.exr").write_bytes(b"two")

    again = action(1, 0, started_at=1_700_000_009.0, number=1)
    sessions.host.finish_task(sessions.session_dir, again)

    assert sorted(sessions.outputs()) == ["renders/1.exr", "renders/2.exr"]


def test_another_job_is_refused_where_a_session_was_not_ended(sessions: Sessions) -> None:
    job = sessions.submitted()
    root = sessions.started(job)
    document = json.loads(sessions.host.job_file(job).read_bytes())
    other = JobDocument.decode(json.dumps(document | {"jobId": f"job-{'9' * 32}"}).encode(), "job")

    with pytest.raises(SessionStateError, match=f"not of job-{'9' * 32}"):
        sessions.host.start(other, sessions.session_dir)

    assert (root / "scene.usd").exists()
    sessions.host.end(sessions.session_dir)
    sessions.host.start(other, sessions.session_dir)


def test_after_a_sync_that_failed_no_task_is_finished_until_it_succeeds(
    sessions: Sessions, tmp_path: Path
) -> None:
    root = sessions.started(sessions.submitted())
    (root / "renders/0.exr").write_bytes(b"of the first step")
    sessions.finish(0)
    data = tmp_path / "store" / "Data"
    shutil.move(data, tmp_path / "Data")
    (root / "renders/0.exr").unlink()
    shutil.rmtree(sessions.host.cache_dir)
    with pytest.raises(PropmasterError):
        sessions.host.sync_step(sessions.session_dir, step(2), [step(1)])

    with pytest.raises(SessionStateError, match="did not finish"):
        sessions.finish(1)

    shutil.rmtree(data, ignore_errors=True)
    shutil.move(tmp_path / "Data", data)
    sessions.host.sync_step(sessions.session_dir, step(2), [step(1)])
    assert sessions.finish(1).files == 0


def test_the_sync_of_another_step_does_not_make_up_for_one_that_failed(
    sessions: Sessions, tmp_path: Path
) -> None:
    root = sessions.started(sessions.submitted())
    for name in ("0.exr", "1.exr"):
        (root / "renders" / name).write_bytes(name.encode())
    sessions.finish(0)
    for name in ("0.exr", "1.exr"):
        (root / "renders" / name).unlink()
    sessions.host.finish_task(sessions.session_dir, action(9, 0))
    shutil.rmtree(sessions.host.cache_dir)
    [last] = (tmp_path / "store/Data").glob(f"{hash_of(b'1.exr')}*")
    last.rename(tmp_path / "away")
    with pytest.raises(PropmasterError):
        sessions.host.sync_step(sessions.session_dir, step(2), [step(1)])
    # The copy of this one may have been stopped by the other's failure.
    (root / "renders/0.exr").write_bytes(b"0.exr")

    sessions.host.sync_step(sessions.session_dir, step(3), [])
    with pytest.raises(SessionStateError, match=f"the sync of {step(2)} did not finish"):
        sessions.host.finish_task(sessions.session_dir, action(3, 0))

    (tmp_path / "away").rename(last)
    sessions.host.sync_step(sessions.session_dir, step(2), [step(1)])
    assert sessions.host.finish_task(sessions.session_dir, action(3, 0)).files == 0


def test_a_store_that_was_emptied_is_filled_again_by_the_next_submission(
    any_sessions: Sessions, s3: S3Server
) -> None:
    s = any_sessions
    s.submitted()
    if s.host.store_url.startswith("s3:"):
        client = s3.client()
        prefix = s.host.store_url.partition(f"s3://{s3.bucket}/")[2]
        for found in client.list_objects_v2(Bucket=s3.bucket, Prefix=f"{prefix}/Data/")["Contents"]:
            client.delete_object(Bucket=s3.bucket, Key=found["Key"])
    else:
        shutil.rmtree(s.tmp_path / "store" / "Data")

    job = s.submitted()
    assert s.host.start(job, s.session_dir).roots[0].files == 7
