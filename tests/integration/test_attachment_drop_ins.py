"""The drop-ins for the agent's attachment scripts: what they do for a session of the agent."""

import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.layout import blob_key
from agent_plugin.content.manifest import Manifest, decode, encode
from agent_plugin.content.store import Cancellation
from agent_plugin.services import state_directory
from agent_plugin.session.job import JobDocument
from agent_plugin.session.outputs import list_outputs
from agent_plugin.session.queues import QueueSettings, write_queue
from agent_plugin.session.submit import SubmitResult
from agent_plugin.workers.call import ATTACHMENT_DOWNLOAD
from tests.servers.attachment_calls import AgentSession, Said
from tests.servers.hooks import Host, action, job_of, step
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files

MTIME_NS = 1_622_505_600_123_457_000
# A name that is not UTF-8.
LATIN = os.fsdecode(b"latin-\xe9.exr")
SCENE = b"#usda 1.0\n"
INPUTS: dict[str | bytes, bytes | int] = {
    "scene.usd": SCENE,
    "tex/wood.tx": 5000,
    "tex/copy of wood.tx": 5000,
    ".hidden/.rc": b"dots",
    "empty": b"",
    b"latin-\xe9/\xff": b"not UTF-8",
    "renders/reference.exr": b"an input in an output directory",
}


class Submitted(NamedTuple):
    """What is submitted once for all tests, of which each has a job of its own."""

    source: Path
    host: Host
    results: dict[str, SubmitResult]


@pytest.fixture(scope="module")
def submitted(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    place = tmp_path_factory.mktemp("submitter")
    store_url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
    host = Host(place / "home", store_url, environment=s3.environment)
    write_files(place / "source", INPUTS, mtime_ns=MTIME_NS)
    (place / "out").mkdir()
    return Submitted(
        place / "source",
        host,
        {
            "inputs": host.submit(place / "source", output_directories=["renders"])[0],
            "only inputs": host.submit(place / "source")[0],
            "only outputs": host.submit(place / "out", output_directories=["logs"])[0],
        },
    )


def job_with(submitted: Submitted, *names: str) -> JobDocument:
    results = [submitted.results[name] for name in names]
    return job_of(*results, jobId=f"job-{uuid.uuid4().hex}")


@pytest.fixture
def host(s3: S3Server, submitted: Submitted, tmp_path: Path) -> Host:
    """A worker that has seen nothing yet."""
    return Host(tmp_path / "worker", submitted.host.store_url, environment=s3.environment)


@pytest.fixture
def source(submitted: Submitted) -> Path:
    return submitted.source


@pytest.fixture
def job(submitted: Submitted) -> JobDocument:
    return job_with(submitted, "inputs")


@pytest.fixture
def session(host: Host, job: JobDocument, tmp_path: Path) -> AgentSession:
    return AgentSession(host, job, tmp_path / "sessions" / "abc12345")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def outputs(session: AgentSession) -> dict[str, str]:
    """Return what a reader finds: by path the hash."""
    job = session.job
    with session.host.services() as context:
        found = list_outputs(context, (job.farm_id, job.queue_id, job.job_id))
    return {entry.path: entry.hash for root in found.roots for entry in root.files}


def hash_of(text: str) -> str:
    return Digest.of(text.encode()).hex


def test_inputs_arrive_and_the_agent_is_told_how_far_it_is(
    session: AgentSession, source: Path
) -> None:
    said = session.sync_job()

    assert said.exit_code == 0, said.lines
    assert files_below(session.root()) == files_below(source)
    assert said.told("openjd_progress")[-1] == "100.0"
    assert said.told("openjd_status")[-1].startswith("7 of 7 files, ")
    assert said.told("openjd_fail") == []
    assert said.plain[-1].startswith("propmaster: 7 files, 10.1 kB fetched, 0 bytes reused, ")


def test_a_second_session_fetches_nothing(
    session: AgentSession, host: Host, job: JobDocument, source: Path, tmp_path: Path
) -> None:
    session.sync_job()
    other = AgentSession(host, job, tmp_path / "sessions" / "other")

    said = other.sync_job()

    assert files_below(other.root()) == files_below(source)
    assert "0 bytes fetched, 10.1 kB reused" in said.plain[-1]


def test_what_a_task_leaves_is_stored_and_told_and_dotfiles_are_part_of_it(
    session: AgentSession,
) -> None:
    session.sync_job()
    write(session.root() / "renders" / "frame.exr", "frame")
    write(session.root() / "renders" / ".cache" / ".dot", "dot")
    write(session.root() / "renders" / LATIN, "latin")
    run = action(started_at=1_719_848_112.5)

    said = session.finish(run)

    [snapshot], [upload] = said.snapshots, said.uploads
    data = (session.directory / snapshot["manifest"]).read_bytes()
    stored = decode(data, source=snapshot["manifest"])
    assert said.exit_code == 0, said.lines
    assert snapshot["root"] == os.fspath(session.root())
    assert not snapshot["manifest"].startswith("/")
    assert encode(stored) == data
    assert [entry.path for entry in stored.entries] == [
        "renders/.cache/.dot",
        "renders/frame.exr",
        f"renders/{LATIN}",
    ]
    assert upload == {
        "output_manifest_path": upload["output_manifest_path"],
        "output_manifest_hash": Digest.of(data).hex,
        "source_path": session.job.attachments.manifests[0].root_path,
    }
    assert f"/{run.task_id}/2024-07-01T15:35:12.500000Z_" in upload["output_manifest_path"]
    assert outputs(session) == {
        "renders/.cache/.dot": hash_of("dot"),
        "renders/frame.exr": hash_of("frame"),
        f"renders/{LATIN}": hash_of("latin"),
    }
    assert said.plain[-1].startswith("propmaster: 3 files, 13 bytes uploaded, ")


def test_a_task_that_leaves_nothing_says_so_and_no_more(session: AgentSession) -> None:
    session.sync_job()

    said = session.finish(action())

    assert (said.exit_code, said.snapshots, said.told("ja_upload")) == (0, [], ["[]"])
    assert said.plain[0] == "no outputs to upload"


def test_the_next_task_uploads_only_what_is_new(session: AgentSession) -> None:
    session.sync_job()
    write(session.root() / "renders" / "1.exr", "one")
    session.finish(action(1, 0))
    write(session.root() / "renders" / "2.exr", "two")

    said = session.finish(action(1, 1))

    [snapshot] = said.snapshots
    manifest = decode((session.directory / snapshot["manifest"]).read_bytes(), source="it")
    assert [entry.path for entry in manifest.entries] == ["renders/2.exr"]
    assert len(session.roots[os.fspath(session.root())]["localManifestPaths"]) == 3


def test_an_action_that_is_run_again_gets_the_same_answer(session: AgentSession) -> None:
    session.sync_job()
    write(session.root() / "renders" / "1.exr", "one")
    run = action(1, None)
    first = session.finish(run)
    (session.directory / first.snapshots[0]["manifest"]).unlink()

    again = session.finish(run)

    assert (again.snapshots, again.uploads) == (first.snapshots, first.uploads)
    assert (session.directory / again.snapshots[0]["manifest"]).exists()


def test_a_chunk_has_no_task_in_its_key(session: AgentSession) -> None:
    session.sync_job()
    write(session.root() / "renders" / "1.exr", "one")
    run = action(1, None)

    [upload] = session.finish(run).uploads

    assert "task-" not in upload["output_manifest_path"]
    assert upload["output_manifest_path"].split("/")[3] == run.step_id


def test_what_other_steps_left_replaces_inputs(session: AgentSession, host: Host) -> None:
    """The agent's own script puts `reference (1).exr` beside the input."""
    session.sync_job()
    write(session.root() / "renders" / "reference.exr", "better")
    write(session.root() / "renders" / "new.exr", "new")
    session.finish(action(1))
    other = AgentSession(host, session.job, session.directory.with_name("other"))
    other.sync_job()

    said = other.sync_step(step(1))
    found = files_below(other.root())
    nothing = other.finish(action(2))

    assert said.exit_code == 0, said.lines
    assert [path for path in found if "(" in path] == []
    assert (other.root() / "renders" / "reference.exr").read_text() == "better"
    assert (other.root() / "renders" / "new.exr").read_text() == "new"
    assert nothing.snapshots == [], "what came from another step is no output of this one"
    assert "2 files, " in said.plain[-1]


def test_a_root_without_inputs_is_known_when_it_has_outputs(
    host: Host, submitted: Submitted, tmp_path: Path
) -> None:
    job = job_with(submitted, "inputs", "only outputs")
    session = AgentSession(host, job, tmp_path / "session")
    session.sync_job()
    write(session.root(1) / "logs" / "a.log", "a")
    write(session.root(0) / "renders" / "a.exr", "exr")

    said = session.finish(action())

    assert [upload["source_path"] for upload in said.uploads] == [
        manifest.root_path for manifest in job.attachments.manifests
    ]
    assert outputs(session) == {"logs/a.log": hash_of("a"), "renders/a.exr": hash_of("exr")}


def test_a_job_without_inputs(host: Host, submitted: Submitted, tmp_path: Path) -> None:
    session = AgentSession(host, job_with(submitted, "only outputs"), tmp_path / "session")

    started = session.sync_job()
    write(session.root() / "logs" / "deep" / "a.log", "a")
    said = session.finish(action())

    assert started.exit_code == 0, started.lines
    assert started.told("openjd_progress") == ["100.0"]
    assert said.snapshots[0]["root"] == os.fspath(session.root())
    assert outputs(session) == {"logs/deep/a.log": hash_of("a")}


def test_a_root_without_output_directories(
    host: Host, submitted: Submitted, tmp_path: Path
) -> None:
    session = AgentSession(host, job_with(submitted, "only inputs"), tmp_path / "session")
    session.sync_job()
    write(session.root() / "renders" / "1.exr", "one")

    said = session.finish(action())

    assert said.plain[:2] == [f"{session.root()}: no output directories", "no outputs to upload"]
    assert said.exit_code == 0


def in_windows(job: JobDocument) -> JobDocument:
    document = msgspec.to_builtins(job)
    manifest = document["attachments"]["manifests"][0]
    manifest |= {
        "rootPath": "C:\\Users\\me\\shöw",
        "rootPathFormat": "windows",
        "outputRelativeDirectories": ["renders\\beauty", "."],
    }
    return JobDocument.decode(json.dumps(document).encode(), "the test's job")


def test_roots_of_windows(host: Host, job: JobDocument, source: Path, tmp_path: Path) -> None:
    session = AgentSession(host, in_windows(job), tmp_path / "session")
    session.sync_job()
    write(session.root() / "renders" / "beauty" / "1.exr", "one")

    said = session.finish(action())

    assert files_below(source).items() <= files_below(session.root()).items()
    assert said.uploads[0]["source_path"] == "C:\\Users\\me\\shöw"
    assert outputs(session) == {"renders/beauty/1.exr": hash_of("one")}


def test_a_root_that_a_storage_profile_maps(
    host: Host, job: JobDocument, source: Path, tmp_path: Path
) -> None:
    document = msgspec.to_builtins(job)
    document["attachments"]["manifests"][0]["fileSystemLocationName"] = "Projects"
    document["pathMappingRules"] = [
        {
            "sourcePathFormat": "posix",
            "sourcePath": os.fspath(source),
            "destinationPath": os.fspath(tmp_path / "mnt" / "show"),
        }
    ]
    mapped = JobDocument.decode(json.dumps(document).encode(), "the test's job")
    session = AgentSession(host, mapped, tmp_path / "session")
    write(tmp_path / "mnt" / "show" / "renders" / "older.exr", "was there before")

    started = session.sync_job()
    write(tmp_path / "mnt" / "show" / "renders" / "1.exr", "one")
    said = session.finish(action())

    assert started.exit_code == 0, started.lines
    assert files_below(source).items() <= files_below(tmp_path / "mnt" / "show").items()
    assert said.snapshots[0]["root"] == os.fspath(tmp_path / "mnt" / "show")
    assert outputs(session) == {"renders/1.exr": hash_of("one")}


def test_two_manifests_in_one_directory(
    host: Host, submitted: Submitted, source: Path, tmp_path: Path
) -> None:
    """The agent tells of the last one, and its copy of the manifest has the files of both."""
    write_files(tmp_path / "two", {"two.txt": b"two"}, mtime_ns=MTIME_NS)
    second, _ = host.submit(tmp_path / "two", output_directories=["renders"])
    document = msgspec.to_builtins(job_of(submitted.results["inputs"], second))
    one, two = document["attachments"]["manifests"]
    two |= {"rootPath": one["rootPath"], "fileSystemLocationName": "Projects"}
    job = JobDocument.decode(json.dumps(document).encode(), "the test's job")
    session = AgentSession(host, job, tmp_path / "session")

    said = session.sync_job()

    assert said.exit_code == 0, said.lines
    assert files_below(session.root()).keys() == {"two.txt", *files_below(source)}


def test_a_copy_of_the_input_manifest_is_not_believed(session: AgentSession, source: Path) -> None:
    """Less than the job's own manifest never comes, whatever a copy says."""
    local = os.fspath(session.root())
    nearly_none = Manifest.of([entry for entry in [_any_entry(session)] if entry])

    said = session.bring_in({local: [nearly_none]}, "job")

    assert said.exit_code == 0, said.lines
    assert files_below(session.root()).keys() == files_below(source).keys()


def _any_entry(session: AgentSession) -> Any:
    properties = session.job.attachments.manifests[0]
    assert properties.input_manifest_path is not None
    with session.host.services() as context:
        document = context.open_store().get_document(
            properties.input_manifest_path, max_bytes=1 << 20
        )
    return decode(document.data, source="it").entries[0]


def test_an_agent_that_knows_the_directory_by_a_link(
    host: Host, job: JobDocument, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    known_as = tmp_path / "linked" / "abc"
    session = AgentSession(host, job, tmp_path / "real" / "abc", known_as=known_as)
    session.sync_job()
    write(session.root() / "renders" / "1.exr", "one")

    said = session.finish(action())

    assert files_below(source).items() <= files_below(session.root()).items()
    assert said.snapshots[0]["root"] == os.fspath(known_as / session.root().name)


def test_a_session_that_the_agents_own_script_has_started(
    session: AgentSession, host: Host
) -> None:
    """When the host service was not there, the original script brings the inputs."""
    session.sync_job()
    with host.state(session.directory) as state_file:
        state_file.remove()
    write(session.root() / "renders" / "1.exr", "one")

    said = session.finish(action())

    assert said.exit_code == 0, said.lines
    assert outputs(session) == {"renders/1.exr": hash_of("one")}, "inputs are no outputs"


def test_a_session_whose_step_outputs_the_agents_own_script_has_brought(
    session: AgentSession,
) -> None:
    """What came from another step would be this one's output, and of later date."""
    session.sync_job()
    write(session.root() / "renders" / "of step 1.exr", "one")
    session.finish(action(1))
    other = AgentSession(session.host, session.job, session.directory.with_name("other"))
    other.sync_job()
    other.sync_step(step(1))
    with session.host.state(other.directory) as state_file:
        state_file.remove()
    write(other.root() / "renders" / "of step 2.exr", "two")

    said = other.finish(action(2))

    assert told_paths(other, said) == ["renders/of step 2.exr"]


def test_a_step_that_the_agents_own_script_has_synced_in_between(session: AgentSession) -> None:
    """The host service may be gone for one call, while it is updated for instance."""
    session.sync_job()
    write(session.root() / "renders" / "of step 1.exr", "one")
    session.finish(action(1))
    other = AgentSession(session.host, session.job, session.directory.with_name("other"))
    other.sync_job()
    with other.as_if_never_asked():
        other.sync_step(step(1))
    write(other.root() / "renders" / "of step 2.exr", "two")

    assert told_paths(other, other.finish(action(2, 0))) == ["renders/of step 2.exr"]
    write(other.root() / "renders" / "of step 1.exr", "changed")
    assert told_paths(other, other.finish(action(2, 1))) == ["renders/of step 1.exr"]


def test_a_task_whose_outputs_the_agents_own_script_has_uploaded(session: AgentSession) -> None:
    session.sync_job()
    write(session.root() / "renders" / "1.exr", "one")
    write(session.root() / "renders" / "reference.exr", "better")
    with session.as_if_never_asked():
        session.finish(action(1, 0))
    session.rename_last_snapshot()
    write(session.root() / "renders" / "2.exr", "two")

    assert told_paths(session, session.finish(action(1, 1))) == ["renders/2.exr"]
    write(session.root() / "renders" / "1.exr", "again")
    assert told_paths(session, session.finish(action(1, 2))) == ["renders/1.exr"]


def told_paths(session: AgentSession, said: Said) -> list[str]:
    """Return the paths of the one manifest that was told of."""
    assert said.exit_code == 0, said.lines
    [snapshot] = said.snapshots
    data = (session.directory / snapshot["manifest"]).read_bytes()
    return [entry.path for entry in decode(data, source="the snapshot").entries]


def test_a_task_reads_none_of_the_agents_manifests(session: AgentSession) -> None:
    """The agent's own script merges all of them after each task: 25 s for a million inputs."""
    session.sync_job()
    session.finish(action(1, 0))
    for path in (session.directory / "manifests").iterdir():
        path.write_bytes(b"no manifest")
    write(session.root() / "renders" / "1.exr", "one")

    said = session.finish(action(1, 1))

    assert said.exit_code == 0, said.lines
    assert outputs(session) == {"renders/1.exr": hash_of("one")}


class Harmed(NamedTuple):
    """A session of a job of its own, whose blobs may be harmed."""

    session: AgentSession
    s3: S3Server
    key: str

    def delete(self) -> None:
        self.s3.client().delete_object(Bucket=self.s3.bucket, Key=self.key)

    def put(self, content: bytes) -> None:
        self.s3.client().put_object(Bucket=self.s3.bucket, Key=self.key, Body=content)


@pytest.fixture
def harmed(s3: S3Server, s3_prefix: str, source: Path, tmp_path: Path) -> Harmed:
    host = Host(
        tmp_path / "worker",
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.environment,
        store={"attempts": 1},
    )
    job = job_of(host.submit(source, output_directories=["renders"])[0])
    key = f"{s3_prefix}/{blob_key(Digest.of(SCENE))}"
    return Harmed(AgentSession(host, job, tmp_path / "session"), s3, key)


@pytest.mark.parametrize(("missing", "code"), [(True, 69), (False, 71)])
def test_a_download_that_fails_tells_why_and_leaves_nothing_half_written(
    harmed: Harmed, source: Path, expected_events: set[str], missing: bool, code: int
) -> None:
    expected_events |= {events.SESSION_START_FAILED}
    session = harmed.session
    if missing:
        harmed.delete()
    else:
        harmed.put(b"x" * len(SCENE))

    said = session.sync_job()
    [failure] = said.told("openjd_fail")
    half = session.root().exists()
    harmed.put(SCENE)
    again = session.sync_job()

    assert said.exit_code == code, said.lines
    assert failure.startswith("scene.usd: ")
    assert not half
    assert "100.0" not in said.told("openjd_progress")
    assert again.exit_code == 0, "asked again it goes on"
    assert files_below(session.root()) == files_below(source)


def test_a_cancelled_call_ends(session: AgentSession, expected_events: set[str]) -> None:
    expected_events |= {events.SESSION_START_FAILED}
    cancellation = Cancellation()
    cancellation.cancel()

    said = session.sync_job(cancellation=cancellation)

    assert said.exit_code == 77
    assert not session.root().exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "-s3"),
        (["-s3", "s3://bucket/prefix"], "-wp"),
        (["-s3", "https://bucket/prefix", "-wp", "x"], "no address"),
        (["-s3", "file:///etc", "-wp", "x"], "no address"),
        (["-s3", "s3://bucket", "-wp", "x"], "no address"),
        (["-s3", "s3://bucket/a b", "-wp", "{wp}"], "rootPrefix"),
        (["-s3", "s3://bucket/prefix", "-wp", "x"], "no such file"),
        (["-s3", "s3://bucket/prefix", "-wp", "/etc/passwd"], "not in the session directory"),
        (["-s3", "s3://bucket/prefix", "-wp", "../x"], "not a path below"),
        (["-s3", "s3://bucket/prefix", "-wp", "link"], "leads out of"),
        (["-s3", "s3://bucket/prefix", "-wp", "{wp}", "--more"], "--more"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_by_name(
    session: AgentSession, arguments: list[str], reason: str
) -> None:
    (session.directory / "link").symlink_to("/etc/passwd")
    named = [argument.format(wp=session.write([])) for argument in arguments]

    said = session.call(ATTACHMENT_DOWNLOAD, [], {}, arguments=named)

    [failure] = said.told("openjd_fail")
    assert said.exit_code in (66, 73, 85)
    assert reason in failure


def test_the_long_options_are_understood(session: AgentSession) -> None:
    named = [f"--s3-uri={session.job.store_url}", "--worker-properties", f"{session.write([])}"]

    assert session.call(ATTACHMENT_DOWNLOAD, [], {}, arguments=named).exit_code == 0


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("DEADLINE_FARM_ID", "", "DEADLINE_FARM_ID is not set"),
        ("DEADLINE_QUEUE_ID", "queue-../../x", "queueId"),
        ("DEADLINE_STEP_ID", "", "DEADLINE_STEP_ID is not set"),
        ("DEADLINE_TASK_ID", "task-1/../..", "'task-1/../..' is not a task id"),
        ("DEADLINE_SESSIONACTION_ID", "x", "'x' is not a sessionaction id"),
        ("DEADLINE_SESSIONACTION_START_TIME", "nan", "'nan'"),
        ("DEADLINE_SESSIONACTION_START_TIME", "1e400", "'1e400'"),
    ],
)
def test_a_variable_that_makes_no_sense_is_refused_by_name(
    session: AgentSession, name: str, value: str, reason: str
) -> None:
    said = session.finish(action(), variables={name: value})

    assert said.exit_code == 66
    assert reason in said.told("openjd_fail")[0]


def test_the_queues_file_system_counts(session: AgentSession, host: Host) -> None:
    queue = QueueSettings(session.job.queue_id, "AUTO")
    write_queue(state_directory(host.settings), queue)

    said = session.sync_job()

    assert f"{session.root()}: COPIED, 7 files of 10054 bytes are few" in said.plain


def test_a_call_for_another_job_is_refused(session: AgentSession) -> None:
    session.sync_job()
    other = f"job-{uuid.uuid4().hex}"

    said = session.finish(action(), variables={"DEADLINE_JOB_ID": other})

    assert said.exit_code == 76


def test_a_call_waits_for_the_one_before_which_is_ending(session: AgentSession, host: Host) -> None:
    session.sync_job()
    said: list[Said] = []
    thread = threading.Thread(target=lambda: said.append(session.finish(action())))

    with host.state(session.directory):
        thread.start()
        thread.join(0.3)
        waits = thread.is_alive()
    thread.join(60)

    assert waits
    assert said[0].exit_code == 0, said[0].lines
