"""`propmaster openjd run`: the command in it, whatever becomes of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent_plugin.content.errors import JobInvalidError
from agent_plugin.content.store import Cancellation
from agent_plugin.workers.openjd.document import complete, step_id
from agent_plugin.workers.openjd.wrapped_command import run_wrapped

# Far above anything measured, so that only a hang meets it.
CALL_SECONDS = 100.0
FARM = "farm-" + "a" * 32
QUEUE = "queue-" + "b" * 32
JOB = "job-" + "c" * 32
IDS = f'"farmId": "{FARM}", "queueId": "{QUEUE}", "jobId": "{JOB}"'
ATTACHMENTS = '"attachments": {"manifests": []}'


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "agent_plugin", "openjd", "run", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def await_end(pid: int) -> None:
    deadline = time.monotonic() + CALL_SECONDS
    while alive(pid):
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.02)


def test_outside_of_a_session_the_command_is_run_and_that_is_all(tmp_path: Path) -> None:
    with start("--step=x", "--timeout=", "--", "sh", "-c", 'echo "$1"; exit 9', "-", "a  b") as run:
        assert run.communicate(timeout=CALL_SECONDS)[0] == "a  b\n"
    assert run.returncode == 9
    with start("--", str(tmp_path / "absent")) as run:
        assert "openjd_fail: " in run.communicate(timeout=CALL_SECONDS)[0]
    assert run.returncode == 127
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_takes_too_long_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    script = f"sh -c 'echo $$ > {tmp_path}/child; sleep 86399; true' & sleep 86399"

    ended = run_wrapped(
        ["sh", "-c", script], seconds=2.6, notify_seconds=0, cancellation=Cancellation()
    )

    assert ended.code == 124
    assert "longer than 3 s" in ended.reason
    await_end(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize(("period", "heard"), [("60", True), ("", False), ("null", False)])
def test_a_cancelled_command_has_its_period_and_no_more(
    tmp_path: Path, period: str, heard: bool
) -> None:
    script = "trap 'touch heard; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    run = start(
        "--no-outputs", f"--notify-period={period}", "--", "sh", "-c", f"cd {tmp_path}; {script}"
    )
    with run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGTERM)
        told, _ = run.communicate(timeout=CALL_SECONDS)

    assert run.returncode == 128 + signal.SIGTERM
    assert "openjd_fail: the task was cancelled" in told
    assert (tmp_path / "heard").exists() is heard


def test_a_task_of_no_known_step_is_refused() -> None:
    with start("--", "true", PROPMASTER_SESSION_DIR="/nowhere") as run:
        assert "--step NAME" in run.communicate(timeout=CALL_SECONDS)[0]
    assert run.returncode == 2


# ------------------------------------------------------------------------------------ the document


@pytest.mark.parametrize(
    ("document", "environment", "farm", "store"),
    [
        (f'{{{IDS}, "store": "file:///s", {ATTACHMENTS}}}', {}, FARM, "file:///s"),
        (
            f'{{"store": "file:///s", {ATTACHMENTS}}}',
            {
                "DEADLINE_FARM_ID": FARM,
                "DEADLINE_QUEUE_ID": QUEUE,
                "DEADLINE_JOB_ID": JOB,
                "DEADLINE_JA_S3_BUCKET": "bucket",
                "DEADLINE_JA_ROOT_PREFIX": "prefix",
            },
            FARM,
            "file:///s",
        ),
        (
            f"{{{IDS}, {ATTACHMENTS}}}",
            {
                "DEADLINE_FARM_ID": "farm-" + "f" * 32,
                "DEADLINE_JA_S3_BUCKET": "bucket",
                "DEADLINE_JA_ROOT_PREFIX": "prefix",
            },
            "farm-" + "f" * 32,
            "s3://bucket/prefix",
        ),
    ],
    ids=["its-own", "ids-of-the-runtime", "the-runtime-wins"],
)
def test_a_document_is_completed_with_what_the_runtime_knows(
    document: str, environment: Mapping[str, str], farm: str, store: str
) -> None:
    job = complete(document.encode(), "the test's", environment)

    assert (job.farm_id, job.queue_id, job.job_id, job.store_url) == (farm, QUEUE, JOB, store)


def test_steps_are_named_where_the_runtime_has_no_ids_and_only_there() -> None:
    step = "step-" + "d" * 32
    document = (
        f'{{{IDS}, "store": "file:///s", {ATTACHMENTS},'
        f' "stepDependencies": {{"Comp": ["Render", "{step}"]}}}}'
    ).encode()

    job = complete(document, "the test's", {})

    assert job.step_dependencies == {step_id(JOB, "Comp", {}): (step_id(JOB, "Render", {}), step)}
    assert step_id(JOB, "Comp", {"DEADLINE_STEP_ID": step}) == step
    with pytest.raises(JobInvalidError, match="stepDependencies"):
        complete(document, "the test's", {"DEADLINE_JOB_ID": JOB})


@pytest.mark.parametrize("document", [b"[]", b"{", b"{}", b'{"attachments": 1}', b"\xff"])
def test_what_is_no_document_is_refused_by_name(document: bytes) -> None:
    with pytest.raises(JobInvalidError, match="the test's"):
        complete(document, "the test's", {})


@pytest.mark.parametrize("rules", [b"[]", b'{"path_mapping_rules": [1]}', b"{"])
def test_rules_that_are_none_are_refused(rules: bytes) -> None:
    document = f'{{{IDS}, "store": "file:///s", {ATTACHMENTS}}}'.encode()

    with pytest.raises(JobInvalidError, match="rules"):
        complete(document, "the test's", {}, rules=rules)
    assert complete(document, "the test's", {}, rules=b"{}").path_mapping_rules == ()
