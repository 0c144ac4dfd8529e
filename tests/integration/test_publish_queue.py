"""Publishers that the operator gives to the jobs of a queue, whoever runs their tasks."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from agent_plugin.content.errors import StoreAccessError
from agent_plugin.publish.destination import EXECUTION
from agent_plugin.publish.result_documents import find_results
from agent_plugin.workers.call import JobUser
from tests.servers.attachment_calls import AgentSession
from tests.servers.hooks import FARM, JOB, QUEUE, action
from tests.servers.publishing import Publishing, params_of
from tests.servers.trees import write_files

NOBODY = 65534


def agent_session(
    publishing: Publishing, above: Path | None = None, job_user: JobUser | None = None
) -> AgentSession:
    """Return a session of the worker agent that has started, and whose task has left a file."""
    job = publishing.sessions.submitted({"scene": b"usd"})
    directory = (above or publishing.tmp_path / "agent") / "session"
    session = AgentSession(publishing.host, job, directory, job_user=job_user)
    assert session.sync_job().exit_code == 0
    write_files(session.root(), {"renders/0001.exr": b"pixels"}, mtime_ns=0)
    return session


# ------------------------------------------------------------------------------ finish-task


def test_o1_a_queues_publishers_have_their_turn_after_the_jobs_own(publishing: Publishing) -> None:
    publishing.give(publishing.publisher("general"), queue="")
    publishing.give(publishing.publisher("queue/{taskID}"))
    publishing.start(publishing.publisher("job"))
    publishing.write({"0001.exr": 10})

    result = publishing.finish()

    run = action(1, 0).task_id
    assert [params_of(result, index).key for index in range(len(result.results))] == [
        f"{publishing.prefix}/job/",
        f"{publishing.prefix}/queue/{run}/",
    ]
    assert publishing.published() == ["job/renders/0001.exr", f"queue/{run}/renders/0001.exr"]


@pytest.mark.usefixtures("declined")
def test_o1_a_required_publisher_of_the_queue_is_tried_again_as_the_operator_has_it_now(
    publishing: Publishing,
) -> None:
    """Seen to fail when what had its turn was known by its place in the list alone."""
    publishing.start(publishing.publisher("job"))
    wrong = publishing.publisher("queue", Required=True)
    wrong["Params"]["Bucket"] = "no-such-bucket"
    text = publishing.host.config.read_text()
    publishing.give(publishing.publisher("right"), wrong)
    publishing.write({"0001.exr": 10})
    run = action(1, 0)

    with pytest.raises(StoreAccessError, match=r"publishers\[2\]: "):
        publishing.finish(run)
    publishing.host.config.write_text(text)
    publishing.give(publishing.publisher("queue", Required=True), publishing.publisher("right"))
    result = publishing.finish(run)

    assert [params_of(result, index).key for index in range(3)] == [
        f"{publishing.prefix}/{key}/" for key in ("job", "queue", "right")
    ]
    assert result.publish_failures == []
    assert publishing.published() == [
        f"{key}/renders/0001.exr" for key in ("job", "queue", "right")
    ]


def test_o1_queue_explain_shows_publishers_and_their_line(publishing: Publishing) -> None:
    line = publishing.give(publishing.publisher("queue/{taskID}", Encoding="gzip"))

    done = publishing.host.run("queue", "explain", QUEUE, "--json")

    settings = {each["key"]: each for each in json.loads(done.stdout)["settings"]}
    assert settings["outputs.publishers"] == {
        "key": "outputs.publishers",
        "value": [publishing.publisher("queue/{taskID}", Encoding="gzip") | {"Type": "s3"}],
        "source": f"{publishing.host.config}:{line}",
    }


# ------------------------------------------------------------- the worker agent of the service


def test_o1_a_job_of_the_worker_agent_has_the_publishers_of_its_queue(
    publishing: Publishing,
) -> None:
    publishing.give(
        publishing.publisher("{jobID}/{executionID}"), publishing.publisher("all", Encoding="zstd")
    )
    session = agent_session(publishing)
    run = action(1, 0)

    said = session.finish(run)

    assert said.exit_code == 0, said.lines
    assert len(said.uploads) == 1
    key = f"{JOB}/{run.session_action_id}"
    assert publishing.get(f"{key}/renders/0001.exr") == b"pixels"
    assert publishing.metadata("all.tar.zst")[EXECUTION] == run.session_action_id
    place = f"s3://{publishing.s3.bucket}/{publishing.prefix}"
    assert [line for line in said.plain if "published" in line] == [
        f"propmaster: published {place}/{key}/",
        f"propmaster: published {place}/all.tar.zst",
    ]
    with publishing.host.services() as context:
        [document] = find_results(context, (FARM, QUEUE, JOB))
    assert len(document.results) == 2


@pytest.mark.usefixtures("declined")
@pytest.mark.parametrize("required", [False, True])
def test_o4_a_publisher_of_the_queue_that_fails_is_told_to_the_worker_agent(
    publishing: Publishing, required: bool
) -> None:
    """Its outputs are stored either way."""
    publishing.give(publishing.publisher("taken", Required=required))
    publishing.put("taken/renders/0001.exr", b"somebody's")
    session = agent_session(publishing)

    said = session.finish(action(1, 0))

    taken = f"s3://{publishing.s3.bucket}/{publishing.prefix}/taken/renders/0001.exr exists already"
    if required:
        assert said.exit_code == 93
        assert said.told("openjd_fail") == [f"publishers[0]: {taken}"]
    else:
        assert said.exit_code == 0
        assert len(said.uploads) == 1
        assert f"propmaster: not published (E_KEY_EXISTS): publishers[0]: {taken}" in said.plain
        assert [line for line in said.plain if line.startswith("propmaster: hint: Put {exec")]
    assert list(publishing.sessions.outputs()) == ["renders/0001.exr"]
    assert publishing.get("taken/renders/0001.exr") == b"somebody's"


@pytest.mark.usefixtures("declined")
def test_s9_a_profile_is_not_looked_up_in_the_files_of_a_job_user(
    publishing: Publishing, tmp_path: Path
) -> None:
    """A job user could give the operator's name to any keys, or to a program.

    Seen to fail when the call opened objects as any command does.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files to a job user")
    config = tmp_path / "aws-config"
    config.write_text(
        "[profile publisher]\n"
        f"aws_access_key_id = {publishing.s3.access_key}\n"
        f"aws_secret_access_key = {publishing.s3.secret_key}\n"
    )
    publishing.host.environment["AWS_CONFIG_FILE"] = str(config)
    publishing.give(publishing.publisher("own", Profile="publisher"), publishing.publisher("role"))
    # A directory that others can get to: pytest's own are closed to them.
    with tempfile.TemporaryDirectory(prefix="propmaster-profile-") as above:
        Path(above).chmod(0o755)
        session = agent_session(publishing, Path(above), JobUser(NOBODY, NOBODY))
        said = session.finish(action(1, 0))

    assert said.exit_code == 0, said.lines
    assert publishing.published() == ["role/renders/0001.exr"]
    [refused] = [line for line in said.plain if "not published" in line]
    assert "(E_CONFIG): publishers[0]: profile 'publisher'" in refused
