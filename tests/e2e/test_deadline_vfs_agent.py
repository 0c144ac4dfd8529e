"""The real worker agent's own mounting code, and the real agent, with our `deadline_vfs`."""

import grp
import json
import os
import pwd
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.content.open_store import build_store
from tests.servers.deadline_command import job_template, step, write_bundle
from tests.servers.deadline_peers import AGENT_PYTHON, SCRIPTS
from tests.servers.hooks import QUEUE
from tests.servers.role_store import RoleStore
from tests.servers.s3_server import S3Server
from tests.servers.trees import write_files
from tests.servers.unprivileged import fuse_for_all
from tests.servers.worker_host import WorkerHost
from tests.servers.worker_rig import JOB_SECONDS, QUEUE_ID, open_rig
from tests.servers.worker_vfs import MountingHost, mounting_host

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

MTIME_US = 1_622_505_600_123_457
FILES = {"scene.usd": b"#usda 1.0\n", "tex/wood.tx": b"w" * 50_000, "tex/old.tx": b"old"}
MORE = {"renders/2.exr": b"of another worker", "tex/new.tx": b"new"}

WRITE = (
    "cat scene.usd && mkdir renders && echo 1 > renders/1.exr && rm tex/old.tx"
    " && stat -c '%U %.6Y' tex/wood.tx"
)


def manifest_of(s3: S3Server, prefix: str, files: dict[str, bytes]) -> bytes:
    """Store files; return the manifest."""
    url = f"s3://{s3.bucket}/{prefix}"
    store = build_store(url, environment=s3.environment, account_id="")
    entries = []
    for number, (path, data) in enumerate(files.items()):
        store.put(Digest.of(data), data)
        entries.append(FileEntry(Digest.of(data).hex, MTIME_US + number, path, len(data)))
    return encode(Manifest.of(entries))


def session_of(host: WorkerHost, name: str) -> Path:
    """Make a session directory as the agent does."""
    directory = host.directory / f"sessions-{name}"
    directory.mkdir(mode=0o755)
    session = directory / "session-1"
    session.mkdir()
    owner, group = pwd.getpwnam(host.agent).pw_uid, grp.getgrnam(host.job).gr_gid
    os.chown(directory, owner, -1)
    os.chown(session, owner, group)
    session.chmod(0o770)
    return session


def credentials_of(host: WorkerHost, s3: S3Server, session: Path) -> dict[str, str]:
    """Write the queue's profile as the agent does; return the variables that name it."""
    keys = f"aws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    directory = session.parent / "queue"
    directory.mkdir(exist_ok=True)
    config, credentials = directory / "config", directory / "credentials"
    config.write_text("[profile queue]\nregion = us-east-1\n")
    credentials.write_text(f"[queue]\n{keys}")
    for path, mode in ((directory, 0o750), (config, 0o640), (credentials, 0o640)):
        os.chown(path, pwd.getpwnam(host.agent).pw_uid, grp.getgrnam(host.job).gr_gid)
        path.chmod(mode)
    return {
        "AWS_PROFILE": "queue",
        "AWS_CONFIG_FILE": str(config),
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "DEADLINE_QUEUE_ID": QUEUE,
    }


def mount_as_the_agent(
    host: WorkerHost, ours: MountingHost, request: dict[str, Any], *within: str
) -> dict[str, Any]:
    """Have the agent's library mount and unmount, as the agent's user."""
    script = host.directory / "mounting.py"
    script.write_bytes((SCRIPTS / "mounting.py").read_bytes())
    done = subprocess.run(
        [*within, *host.argv_as(host.agent, [host.agent_python(AGENT_PYTHON), script])],
        input=json.dumps(request),
        env={
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(host.home(host.agent)),
            "DEADLINE_VFS_PATH": str(ours.prefix),
            "AWS_EC2_METADATA_DISABLED": "true",
        },
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:] + ours.log.read_text()
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def request_of(host: WorkerHost, s3: S3Server, s3_prefix: str) -> dict[str, Any]:
    """Make a session; return what the agent is to do in it."""
    session = session_of(host, s3_prefix)
    manifests = []
    for name, files in (("first", FILES), ("second", FILES | MORE)):
        path = session.parent / name
        path.write_bytes(manifest_of(s3, s3_prefix, files))
        manifests.append(str(path))
    return {
        "sessionDirectory": str(session),
        "root": str(session / "assetroot-0123456789abcdef0123"),
        "jobUser": host.job,
        "group": host.job,
        "bucket": s3.bucket,
        "rootPrefix": s3_prefix,
        "environment": credentials_of(host, s3, session),
        "manifests": manifests,
        "commands": [WRITE, "cat renders/* tex/new.tx && ls tex && findmnt -n -o FSTYPE ."],
    }


def remove_as_the_agent(host: WorkerHost, session: Path) -> None:
    """Empty the session directory as the agent does: as the job's user, and then as itself."""
    for user in (host.job, host.agent):
        argv = host.argv_as(user, ["sh", "-c", f"rm -rf {session}/* {session}/.[!.]*"])
        subprocess.run(argv, check=False, capture_output=True)
    assert list(session.iterdir()) == []


def test_the_agents_own_code_mounts_mounts_again_and_unmounts(
    s3: S3Server, s3_prefix: str, worker_host: WorkerHost
) -> None:
    request = request_of(worker_host, s3, s3_prefix)

    with mounting_host(worker_host, {"AWS_ENDPOINT_URL_S3": s3.endpoint_url}) as ours:
        answer = mount_as_the_agent(worker_host, ours, request)

        assert answer["launched"] == [True, True], answer["log"]
        assert answer["outputs"] == [
            f"#usda 1.0\n{worker_host.job} 1622505600.123458\n",
            "1\nof another workernewnew.tx\nwood.tx\noverlay\n",
        ], answer["log"]
        assert answer["isMounted"] is False
        assert "error[" not in answer["log"]
        assert ours.known_mounts() == []
    remove_as_the_agent(worker_host, Path(request["sessionDirectory"]))


@pytest.mark.slow
def test_a_service_without_root_mounts_for_job_users_too(
    s3: S3Server, s3_prefix: str, worker_host: WorkerHost
) -> None:
    request = request_of(worker_host, s3, s3_prefix)
    home = Path(request["sessionDirectory"]).parent

    with fuse_for_all(home, allow_other=True) as namespace:
        within = ("nsenter", f"--mount=/proc/{namespace}/ns/mnt")
        endpoints = {"AWS_ENDPOINT_URL_S3": s3.endpoint_url}
        user = worker_host.agent
        with mounting_host(worker_host, endpoints, user=user, within=within) as ours:
            answer = mount_as_the_agent(worker_host, ours, request, *within)

            assert answer["launched"] == [True, True], answer["log"] + ours.log.read_text()
            assert answer["outputs"] == [
                f"#usda 1.0\n{worker_host.job} 1622505600.123458\n",
                "1\nof another workernewnew.tx\nwood.tx\nfuse.propmaster\n",
            ], answer["log"]
            assert answer["isMounted"] is False
            assert ours.known_mounts() == []
    for name in ("device", "fuse.conf"):
        (home / name).unlink()
    remove_as_the_agent(worker_host, Path(request["sessionDirectory"]))


SIMULATE = """
findmnt -n -o FSTYPE .
mkdir -p frames && echo "frame $FRAME" > frames/$FRAME.txt
cat shared.txt && echo simulated > shared.txt
"""
RENDER = """
cat frames/*.txt shared.txt > rendered
rm scene.usd && ls > listing
"""


@pytest.mark.slow
@pytest.mark.parametrize("scripts", ["the agent's", "ours"])
@pytest.mark.parametrize("user", ["root", "agent"])
def test_the_agent_works_a_virtual_job_in_one_session(
    role_store: RoleStore, worker_host: WorkerHost, tmp_path: Path, user: str, scripts: str
) -> None:
    bundle = tmp_path / "bundle"
    inputs: dict[str | bytes, bytes | int] = {"shared.txt": b"as submitted\n", "scene.usd": 5000}
    write_files(bundle / "data", inputs, mtime_ns=MTIME_US * 1000)
    steps = [
        step("Simulate", SIMULATE, frames="1-2"),
        step("Render", RENDER, depends_on="Simulate"),
    ]
    write_bundle(bundle, job_template(*steps))
    service_user = worker_host.agent if user == "agent" else "root"
    fuse = worker_host.directory / f"fuse-{tmp_path.name}"
    fuse.mkdir()
    python = worker_host.agent_python(AGENT_PYTHON)

    with ExitStack() as stack:
        namespace = stack.enter_context(fuse_for_all(fuse, allow_other=True))
        within = ("nsenter", f"--mount=/proc/{namespace}/ns/mnt")
        ours = stack.enter_context(
            mounting_host(worker_host, role_store.endpoints, user=service_user, within=within)
        )
        if scripts == "ours":
            install = [
                "-P",
                "-m",
                "agent_plugin",
                "worker",
                "install",
                "--agent-python",
                str(python),
            ]
            subprocess.run([ours.python, *install], check=True, capture_output=True)
        rig = stack.enter_context(
            open_rig(
                *(role_store, worker_host, tmp_path / "home"),
                session_per="job",
                job_environment={"PROPMASTER_CONFIG": str(ours.config)},
            )
        )
        agent = rig.agent(python, more={"DEADLINE_VFS_PATH": str(ours.prefix)}, within=within)
        with agent:
            job_id = rig.client.submit(bundle, QUEUE_ID, file_system="VIRTUAL")
            job = rig.service.wait_for(job_id, seconds=JOB_SECONDS)
            [session] = job.sessions
            log = agent.session_log(QUEUE_ID, session.session_id)
            assert job.status == "SUCCEEDED", log + agent.output + ours.log.read_text()
            rig.service.wait_until(
                lambda: list(agent.sessions.iterdir()) == [],
                seconds=JOB_SECONDS,
                what="the session directory is removed",
            )
            log = agent.session_log(QUEUE_ID, session.session_id)
        assert ours.known_mounts() == []
        rig.client.download_output(job_id, QUEUE_ID)

    assert log.count("propmaster: mounted ") == 2, log
    assert ("propmaster: 2 files, " in log) == (scripts == "ours"), log
    assert ("overlay" if user == "root" else "fuse.propmaster") in log
    data = bundle / "data"
    assert (data / "rendered").read_text() == "frame 1\nframe 2\nsimulated\n"
    assert (data / "listing").read_text().split() == ["frames", "listing", "rendered", "shared.txt"]
