"""A session for a job user: what is made in its directory is that user's, who can work there.

The drop-ins run as root here, as in the host service, and the job as another user's process.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from agent_plugin.session.job import JobDocument
from agent_plugin.session.outputs import list_outputs
from agent_plugin.session.submit import SubmitResult
from agent_plugin.workers.call import JobUser
from tests.servers.attachment_calls import AgentSession
from tests.servers.hooks import Host, action, job_of, step
from tests.servers.other_user import NOBODY
from tests.servers.s3_server import S3Server
from tests.servers.trees import files_below, write_files

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="becoming another user needs root and setpriv",
)

MTIME_NS = 1_622_505_600_123_457_000
INPUTS: dict[str | bytes, bytes | int] = {
    "scene.usd": b"scene",
    "deep/er/texture.tx": 5000,
    "large.vdb": 9_000_000,
    "twice large.vdb": b"",
    "renders/reference.exr": b"an input in an output directory",
}
# What a job does with its inputs: change, chmod, utime, rename, delete, and make others.
WORK = """
import os, sys
root = sys.argv[1]
for folder, _, names in os.walk(root):
    for name in names:
        path = os.path.join(folder, name)
        with open(path, "r+b") as file:
            file.write(b"JOB")
        os.chmod(path, 0o600)
        os.utime(path, (1, 1))
        os.rename(path, path + ".renamed")
    os.chmod(folder, 0o700)
    os.makedirs(os.path.join(folder, "made"), exist_ok=True)
os.remove(os.path.join(root, "scene.usd.renamed"))
with open(os.path.join(root, "renders", "new.exr"), "w") as file:
    file.write("new")
"""


def as_job(*arguments: str | Path) -> None:
    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    done = subprocess.run(
        [*argv, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr


def run_python(script: str, *arguments: str | Path) -> None:
    python = Path(sys.executable).resolve()
    as_job(python, "-I", "-c", script, *arguments)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others can get to: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="propmaster-job-user-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("submitter") / "source"
    write_files(source, INPUTS, mtime_ns=MTIME_NS)
    shutil.copy2(source / "large.vdb", source / "twice large.vdb")
    return source


@pytest.fixture(scope="module")
def submitted(s3: S3Server, source: Path) -> SubmitResult:
    """What is submitted once for all tests, of which each has a job of its own."""
    store_url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
    host = Host(source.with_name("home"), store_url, environment=s3.environment)
    return host.submit(source, output_directories=["renders"])[0]


@pytest.fixture
def job(submitted: SubmitResult) -> JobDocument:
    return job_of(submitted, jobId=f"job-{uuid.uuid4().hex}")


@pytest.fixture
def host(s3: S3Server, job: JobDocument, tmp_path: Path) -> Host:
    """A worker that has seen nothing yet."""
    return Host(tmp_path / "worker", job.store_url, environment=s3.environment)


def outputs(session: AgentSession) -> set[str]:
    """Return the paths that a reader finds."""
    job = session.job
    with session.host.services() as context:
        found = list_outputs(context, (job.farm_id, job.queue_id, job.job_id))
    return {entry.path for root in found.roots for entry in root.files}


@pytest.fixture
def session(host: Host, job: JobDocument, place: Path) -> AgentSession:
    return AgentSession(host, job, place / "session", job_user=JobUser(NOBODY, NOBODY))


def modes(paths: Sequence[Path]) -> dict[tuple[int, int, str, str], int]:
    """Return how many have each owner, group, kind and mode."""
    found: dict[tuple[int, int, str, str], int] = {}
    for path in paths:
        status = path.lstat()
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "file"
        fact = (status.st_uid, status.st_gid, kind, oct(stat.S_IMODE(status.st_mode)))
        found[fact] = found.get(fact, 0) + 1
    return found


@pytest.mark.parametrize("warm", [False, True], ids=["fetched", "from the cache"])
def test_all_that_is_made_is_the_job_users_who_can_do_anything_with_it(
    session: AgentSession, source: Path, host: Host, place: Path, warm: bool
) -> None:
    if warm:
        AgentSession(host, session.job, place / "other", job_user=session.job_user).sync_job()

    said = session.sync_job()

    root = session.root()
    assert said.exit_code == 0, said.lines
    assert files_below(root) == files_below(source)
    assert modes([root, *root.rglob("*")]) == {
        (NOBODY, NOBODY, "directory", "0o770"): 4,
        (NOBODY, NOBODY, "file", "0o660"): 5,
    }
    run_python(WORK, root)
    assert (root / "large.vdb.renamed").read_bytes()[:3] == b"JOB"
    finished = session.finish(action())
    assert finished.exit_code == 0, finished.lines
    assert outputs(session) == {"renders/new.exr", "renders/reference.exr.renamed"}
    [snapshot] = finished.snapshots
    path = session.directory / snapshot["manifest"]
    assert modes([path, path.parent]) == {
        (NOBODY, NOBODY, "directory", "0o770"): 1,
        (NOBODY, NOBODY, "file", "0o660"): 1,
    }
    as_job("rm", "-rf", root, path.parent)
    assert not root.exists()


def test_what_a_job_does_to_its_files_does_not_reach_the_cache(
    session: AgentSession, source: Path, host: Host, place: Path
) -> None:
    session.sync_job()
    run_python(WORK, session.root())
    other = AgentSession(host, session.job, place / "other", job_user=session.job_user)

    said = other.sync_job()

    assert "0 bytes fetched" in said.plain[-1]
    assert files_below(other.root()) == files_below(source)


def test_what_other_steps_left_is_the_job_users_too(
    session: AgentSession, host: Host, place: Path
) -> None:
    session.sync_job()
    write = "import os, sys; os.makedirs(sys.argv[1] + '/renders/a/b');"
    write += "open(sys.argv[1] + '/renders/a/b/c', 'w').write('c')"
    run_python(write, session.root())
    session.finish(action(1))
    other = AgentSession(host, session.job, place / "other", job_user=session.job_user)
    other.sync_job()

    said = other.sync_step(step(1))

    made = other.root() / "renders" / "a"
    assert said.exit_code == 0, said.lines
    assert modes([made, *made.rglob("*")]) == {
        (NOBODY, NOBODY, "directory", "0o770"): 2,
        (NOBODY, NOBODY, "file", "0o660"): 1,
    }


def mapped(job: JobDocument, source: Path, to: Path) -> JobDocument:
    document = msgspec.to_builtins(job)
    document["attachments"]["manifests"][0]["fileSystemLocationName"] = "Projects"
    rule = {"sourcePathFormat": "posix", "sourcePath": f"{source}", "destinationPath": f"{to}"}
    document["pathMappingRules"] = [rule]
    return JobDocument.decode(msgspec.json.encode(document), "the test's job")


def test_a_mapped_root_that_the_job_user_may_write_to(
    host: Host, job: JobDocument, source: Path, place: Path
) -> None:
    show = place / "show"
    show.mkdir()
    os.chown(show, NOBODY, NOBODY)
    session = AgentSession(
        host, mapped(job, source, show), place / "session", job_user=JobUser(NOBODY, NOBODY)
    )

    said = session.sync_job()

    assert said.exit_code == 0, said.lines
    assert files_below(show) == files_below(source)
    assert modes([*show.rglob("*")]) == {
        (NOBODY, NOBODY, "directory", "0o755"): 3,
        (NOBODY, NOBODY, "file", "0o644"): 5,
    }


def test_a_mapped_root_that_the_job_user_may_not_write_to_is_refused(
    host: Host, job: JobDocument, source: Path, place: Path
) -> None:
    (place / "show").mkdir()
    session = AgentSession(
        host,
        mapped(job, source, place / "show"),
        place / "session",
        job_user=JobUser(NOBODY, NOBODY),
    )

    said = session.sync_job()

    assert said.exit_code == 89
    assert "may not write to" in said.told("openjd_fail")[0]
    assert [*(place / "show").iterdir()] == []


def test_a_root_that_is_mapped_behind_a_name_of_the_jobs_is_refused(
    host: Host, job: JobDocument, source: Path, place: Path
) -> None:
    """A job that swaps links there had files placed in directories of root's."""
    behind = place / "session" / "jobs-own" / "root"
    session = AgentSession(
        host,
        mapped(job, source, behind),
        place / "session",
        job_user=JobUser(NOBODY, NOBODY),
    )
    behind.mkdir(parents=True)
    for path in (behind.parent, behind):
        os.chown(path, NOBODY, NOBODY)

    said = session.sync_job()

    assert said.exit_code == 89
    assert [*behind.iterdir()] == []


def test_the_roots_file_is_read_with_the_job_users_rights(session: AgentSession) -> None:
    secret = session.directory / "secret"
    secret.write_text("a secret of root's")
    secret.chmod(0o600)
    named = ["-s3", session.job.store_url, "-wp", os.fspath(secret)]

    said = session.call("attachment-download", [], {}, arguments=named)

    assert said.exit_code == 85
    assert "secret of" not in "".join(said.lines)


def test_an_output_that_links_to_what_the_job_user_may_not_read_is_not_uploaded(
    session: AgentSession, place: Path
) -> None:
    """Where the kernel does not protect hard links, a job can make one to anything."""
    session.sync_job()
    (place / "secret").write_text("secret")
    (place / "secret").chmod(0o600)
    os.link(place / "secret", session.root() / "renders" / "linked")

    said = session.finish(action())

    assert said.exit_code == 85
    assert outputs(session) == set()
