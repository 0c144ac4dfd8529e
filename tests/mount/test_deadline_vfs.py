"""The worker agent's `deadline_vfs`: what the agent asks, as it asks it, and what jobs see."""

import glob
import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    CancelledError,
    LocalWriteError,
    MountFailedError,
    MountReadFailedError,
    NotAllowedError,
)
from agent_plugin.content.manifest import FileEntry, Manifest, decode
from agent_plugin.content.mount_table import is_mounted
from agent_plugin.mounting import open_mounts
from agent_plugin.session.adopt import adopt_mounts
from agent_plugin.session.finish_task import finish_task
from agent_plugin.session.job import JobDocument
from agent_plugin.session.state import VERSION, RootState, SessionState, session_id
from agent_plugin.workers.call import JobUser
from tests.servers.attachment_calls import AgentSession
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import CALL_SECONDS, FARM, JOB, QUEUE, Host, action, job_of
from tests.servers.other_user import NOBODY
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import write_files
from tests.servers.vfs_dropin import MTIME_US, DropIn

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

FILES = {"scene.usd": b"#usda 1.0\n", "tex/wood.tx": b"w" * 50_000, "tex/old.tx": b"old", "e": b""}


@pytest.fixture
def drop_in(tmp_path: Path, s3: S3Server, s3_prefix: str) -> Iterator[DropIn]:
    with DropIn(tmp_path, s3, s3_prefix) as drop_in:
        yield drop_in


def descendants(pid: int) -> list[int]:
    """Return a process and all that it started, as far as they still are its."""
    found = [pid]
    for above in found:
        for children in Path(f"/proc/{above}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def left(drop_in: DropIn) -> list[str]:
    """Return what is left of the mount: mounts, processes, files of ours in the session."""
    return [
        *(["a mount"] if is_mounted(drop_in.root) else []),
        *map(str, drop_in.processes()),
        *(path.name for path in drop_in.session_dir.glob(".propmaster*")),
        *(path.name for path in drop_in.host.state_dir.glob("mounts/*")),
    ]


def test_a_root_is_mounted_until_the_agent_unmounts_it(drop_in: DropIn) -> None:
    script = drop_in.mount(drop_in.stored(FILES))

    assert drop_in.is_found()
    found = {
        path.relative_to(drop_in.root).as_posix(): path.read_bytes()
        for path in drop_in.root.rglob("*")
        if path.is_file()
    }
    assert found == FILES
    times = {path: (drop_in.root / path).stat().st_mtime_ns for path in FILES}
    assert times == {path: (MTIME_US + n) * 1000 for n, path in enumerate(FILES)}
    assert script.poll() is None

    done = drop_in.unmount()
    said = script.communicate(timeout=CALL_SECONDS)[0].splitlines()

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert script.returncode == 0
    assert (drop_in.is_found(), left(drop_in)) == (False, [])
    assert len(said) == 2, said
    assert all(line.startswith("propmaster: ") for line in said)


def test_what_was_written_is_there_when_the_root_is_mounted_again_with_more_inputs(
    drop_in: DropIn,
) -> None:
    manifest = drop_in.stored(FILES)
    more = drop_in.stored({**FILES, "tex/new.tx": b"of another step", "scene.usd": b"#newer\n"})
    first = drop_in.here(drop_in.arguments(drop_in.manifest_file(manifest)))
    root = drop_in.root
    (root / "renders").mkdir()
    (root / "renders/1.exr").write_bytes(b"made")
    with (root / "tex/wood.tx").open("ab") as file:
        file.write(b"more")
    (root / "tex/old.tx").unlink()
    assert drop_in.unmount_here() == 0
    assert first.ended() == 0
    assert list(root.iterdir()) == []

    second = drop_in.here(drop_in.arguments(drop_in.manifest_file(more)))

    assert (root / "renders/1.exr").read_bytes() == b"made"
    assert (root / "tex/wood.tx").read_bytes() == FILES["tex/wood.tx"] + b"more"
    assert not (root / "tex/old.tx").exists()
    assert (root / "tex/new.tx").read_bytes() == b"of another step"
    assert (root / "scene.usd").read_bytes() == b"#newer\n"
    assert drop_in.unmount_here() == 0
    assert second.ended() == 0


@pytest.mark.parametrize("kept_by", ["overlayfs", "overlay"])
def test_what_came_since_is_not_hidden_by_what_was_written_before(
    drop_in: DropIn, kept_by: str
) -> None:
    if kept_by == "overlay":
        # Which overlayfs takes for its own among its options.
        drop_in.new_session("a,b")
    inputs = {name: name.encode() for name in ("cut/a", "cut/b", "cut/c/d", "new/a", "x/a", "y")}
    others = {"made/2": b"m", "cut/e": b"e", "cut/b": b"b2", "cut/c/f": b"f", "new/b": b"n"}
    others |= {"made/deep/er": b"d", "y": b"y2", "x/b": b"b"}
    root = drop_in.root
    drop_in.here(drop_in.arguments(drop_in.manifest_file(drop_in.stored(inputs))))
    assert drop_in.status()["writes"] == kept_by
    # A directory where none was; one that takes the place of inputs; what is removed, or touched.
    (root / "made/deep").mkdir(parents=True)
    (root / "made/1").write_bytes(b"1")
    shutil.rmtree(root / "cut")
    shutil.rmtree(root / "new")
    (root / "new").mkdir()
    (root / "new/own").write_bytes(b"own")
    (root / "x/a").unlink()
    (root / "y").chmod(0o600)
    assert drop_in.unmount_here() == 0

    drop_in.here(drop_in.arguments(drop_in.manifest_file(drop_in.stored(inputs | others))))

    found = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }
    assert found == {**others, "made/1": b"1", "new/own": b"own"}
    assert drop_in.unmount_here() == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"manifest": "nothing.json"}, "error[local-read-failed]: {session}/nothing.json: No such"),
        ({"manifest": "bad.json"}, "error[manifest-invalid]: {session}/bad.json: "),
        ({"bucket": "no-such-bucket-here"}, "error[store-access-denied]: "),
        ({"bucket": ""}, "error[job-invalid]: deadline_vfs: --bucket is missing"),
        ({"turbo": "on"}, "error[job-invalid]: deadline_vfs: unknown option '--turbo'"),
        ({"casprefix": "a/b"}, "error[job-invalid]: deadline_vfs: --casprefix=a/b does not end"),
        ({"region": "in a file"}, "error[local-write-failed]: {root} is not empty"),
    ],
)
def test_what_can_not_be_mounted_is_told_in_one_line_at_once(
    drop_in: DropIn, change: dict[str, str], expected: str
) -> None:
    (drop_in.session_dir / "bad.json").write_text('{"hashAlg": "xxh128"}')
    arguments = drop_in.arguments(drop_in.manifest_file(drop_in.stored({"a": b"content"})))
    arguments += [f"--{name}={value}" for name, value in change.items()]
    drop_in.root.mkdir()
    if "region" in change:
        (drop_in.root / "file").touch()

    here = drop_in.here(arguments)

    errors = [line for line in here.said if line.startswith("error[")]
    assert here.ended() != 0
    wanted = expected.format(session=drop_in.session_dir, root=drop_in.root)
    assert [line[: len(wanted)] for line in errors] == [wanted]
    assert left(drop_in) == []


def test_a_path_of_any_characters_can_be_mounted(drop_in: DropIn) -> None:
    drop_in.new_session('it\'s a "session": \\ $HOME,\n\u00e9')
    manifest = drop_in.manifest_file(drop_in.stored(FILES))
    here = drop_in.here(drop_in.arguments(manifest))

    assert (drop_in.root / "tex/wood.tx").read_bytes() == FILES["tex/wood.tx"]
    (drop_in.root / "new").write_bytes(b"made")
    assert drop_in.unmount_here() == 0
    assert here.ended() == 0


def test_a_second_session_fetches_nothing(drop_in: DropIn) -> None:
    manifest = drop_in.stored(FILES)
    fetched = []
    for name in ("session-1", "session-2"):
        drop_in.new_session(name)
        drop_in.here(drop_in.arguments(drop_in.manifest_file(manifest)))
        assert (drop_in.root / "tex/wood.tx").read_bytes() == FILES["tex/wood.tx"]
        fetched.append(drop_in.status()["counts"]["bytes_fetched"])
        assert drop_in.unmount_here() == 0

    assert fetched == [50_000, 0]


def test_killing_all_that_the_agent_started_ends_the_mount(drop_in: DropIn) -> None:
    script = drop_in.mount(drop_in.stored(FILES))

    for pid in descendants(script.pid):
        os.kill(pid, signal.SIGKILL)

    assert script.wait(CALL_SECONDS) == -signal.SIGKILL
    until(lambda: left(drop_in) == [])


def test_a_mount_whose_process_was_killed_is_told_and_taken_away(drop_in: DropIn) -> None:
    here = drop_in.here(drop_in.arguments(drop_in.manifest_file(drop_in.stored(FILES))))
    status = drop_in.status()

    for pid in (status["supervisor"], status["pid"]):
        os.kill(pid, signal.SIGKILL)

    assert here.ended() == MountFailedError.exit_code
    assert f"the process that served {drop_in.root} was killed" in here.said[-2]
    assert left(drop_in) == []


def test_who_is_cancelled_leaves_nothing(drop_in: DropIn) -> None:
    here = drop_in.here(drop_in.arguments(drop_in.manifest_file(drop_in.stored(FILES))))

    here.cancellation.cancel()

    assert here.ended() == CancelledError.exit_code
    assert left(drop_in) == []


def test_reads_that_fail_are_told_in_the_agents_log(drop_in: DropIn, s3: S3Server) -> None:
    manifest = drop_in.stored({"a": b"is there", "b": b"will be gone"})
    here = drop_in.here(drop_in.arguments(drop_in.manifest_file(manifest)))
    gone = f"{drop_in.root_prefix}/Data/{Digest.of(b'will be gone').hex}.xxh128"
    s3.client().delete_object(Bucket=s3.bucket, Key=gone)

    with pytest.raises(OSError, match="Input/output"):
        (drop_in.root / "b").read_bytes()

    until(lambda: len(here.said) > 1)
    assert here.said[1].startswith("propmaster: b could not be read: ")
    assert drop_in.unmount_here() == 0
    assert here.ended() == 0


def test_credentials_are_asked_for_again_when_they_have_expired(
    drop_in: DropIn, s3: S3Server, fault_proxy: FaultProxy
) -> None:
    asked = drop_in.home / "asked"
    answer = {
        "Version": 1,
        "AccessKeyId": s3.access_key,
        "SecretAccessKey": s3.secret_key,
        "SessionToken": "",
    }
    process = drop_in.home / "credentials"
    process.write_text(
        f"#!/bin/sh\necho >> {asked}\n"
        "soon=$(date -u -d '+3 seconds' +%Y-%m-%dT%H:%M:%SZ)\n"
        f"echo '{json.dumps(answer)[:-1]},' '\"Expiration\":' \\\"$soon\\\" '}}'\n"
    )
    process.chmod(0o755)
    config = drop_in.home / "aws_config"
    config.write_text(f"[profile queue]\nregion = us-east-1\ncredential_process = {process}\n")
    environment = {
        "AWS_PROFILE": "queue",
        "AWS_CONFIG_FILE": str(config),
        "AWS_SHARED_CREDENTIALS_FILE": str(drop_in.home / "none"),
        "AWS_ENDPOINT_URL_S3": fault_proxy.url,
    }
    manifest = drop_in.manifest_file(drop_in.stored(FILES))
    drop_in.here(drop_in.arguments(manifest), environment=environment)
    assert (drop_in.root / "scene.usd").read_bytes() == FILES["scene.usd"]
    before = len(asked.read_text())
    fault_proxy.inject(Fault.EXPIRED_TOKEN, times=1)

    assert (drop_in.root / "tex/wood.tx").read_bytes() == FILES["tex/wood.tx"]

    assert len(asked.read_text()) > before
    assert drop_in.unmount_here() == 0


JOB_USER = JobUser(NOBODY, NOBODY)


def as_user(uid: int, command: str) -> int:
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", "sh", "-c"]
    return subprocess.run([*become, command], capture_output=True, check=False).returncode


@pytest.fixture
def of_another_user(s3: S3Server, s3_prefix: str) -> Iterator[DropIn]:
    """A session of a job user; pytest's own directories are closed to others."""
    home = Path(tempfile.mkdtemp(prefix="propmaster-vfs-"))
    home.chmod(0o755)
    with DropIn(home, s3, s3_prefix) as drop_in:
        drop_in.session_dir.chmod(0o770)
        os.chown(drop_in.session_dir, 0, NOBODY)
        yield drop_in
    shutil.rmtree(home)


def test_files_are_the_job_users_who_alone_may_write_them(of_another_user: DropIn) -> None:
    drop_in = of_another_user
    manifest = drop_in.manifest_file(drop_in.stored(FILES))
    here = drop_in.here(drop_in.arguments(manifest), job_user=JOB_USER)
    drop_in.session_dir.chmod(0o777)

    statuses = [path.stat() for path in (drop_in.root, *drop_in.root.rglob("*"))]
    assert {(status.st_uid, status.st_gid) for status in statuses} == {(NOBODY, NOBODY)}
    assert not any(status.st_mode & stat.S_IWOTH for status in statuses)
    edit = f"cd {drop_in.root} && echo x >> scene.usd && mkdir renders && echo y > renders/1"
    assert as_user(NOBODY + 1, edit) != 0
    assert as_user(NOBODY, edit) == 0
    assert drop_in.unmount_here(job_user=JobUser(NOBODY + 1, NOBODY)) == NotAllowedError.exit_code
    assert drop_in.unmount_here(job_user=JOB_USER) == 0
    assert here.ended() == 0
    # The agent has the job's user remove what is in the session directory.
    assert as_user(NOBODY, f"rm -rf {drop_in.session_dir}/.propmaster*") == 0
    assert list(drop_in.session_dir.glob(".propmaster*")) == []


def test_what_a_job_did_to_its_writes_between_two_mounts_leads_nowhere(
    of_another_user: DropIn,
) -> None:
    drop_in = of_another_user
    manifest = drop_in.manifest_file(drop_in.stored(FILES))
    secret = drop_in.home / "secret"
    secret.mkdir()
    for planted in (f"mv upper kept && ln -s {secret} upper", f"rm -r upper; ln -s {secret} work"):
        here = drop_in.here(drop_in.arguments(manifest), job_user=JOB_USER)
        assert as_user(NOBODY, f"echo made > {drop_in.root}/new") == 0
        assert drop_in.unmount_here(job_user=JOB_USER) == 0
        assert here.ended() == 0
        [kept] = drop_in.session_dir.glob(".propmaster*")
        assert as_user(NOBODY, f"cd {kept} && {planted}") == 0

        drop_in.here(drop_in.arguments(manifest), job_user=JOB_USER)

        assert (kept.stat().st_uid, stat.S_IMODE(kept.stat().st_mode)) == (0, 0o700)
        assert as_user(NOBODY, f"echo made > {drop_in.root}/other") == 0
        assert list(secret.iterdir()) == []
        assert drop_in.unmount_here(job_user=JOB_USER) == 0


@pytest.mark.parametrize("how", ["outside", "link", "hard link"])
def test_a_job_user_has_only_manifests_of_its_session_read(
    of_another_user: DropIn, how: str
) -> None:
    drop_in = of_another_user
    secret = drop_in.home / "secret.json"
    drop_in.manifest_file(drop_in.stored(FILES)).rename(secret)
    named = drop_in.session_dir / "named.json"
    if how == "outside":
        named = secret
    elif how == "link":
        named.symlink_to(secret)
    else:
        named.hardlink_to(secret)

    here = drop_in.here(drop_in.arguments(named), job_user=JOB_USER)

    assert here.ended() == NotAllowedError.exit_code
    assert not is_mounted(drop_in.root)


def test_a_mount_point_behind_a_name_of_the_jobs_is_refused(of_another_user: DropIn) -> None:
    """A job that swaps links there had directories made in those of root's."""
    drop_in = of_another_user
    manifest = drop_in.manifest_file(drop_in.stored(FILES))
    assert as_user(NOBODY, f"mkdir {drop_in.session_dir}/jobs-own") == 0
    behind = drop_in.session_dir / "jobs-own" / "new"

    here = drop_in.here(drop_in.arguments(manifest, behind), job_user=JOB_USER)

    assert here.ended() == NotAllowedError.exit_code
    assert not behind.exists()


def test_a_mount_point_is_made_with_the_job_users_rights(
    of_another_user: DropIn, s3: S3Server
) -> None:
    drop_in = of_another_user
    manifest = drop_in.manifest_file(drop_in.stored(FILES))
    shown, closed = drop_in.home / "shown", drop_in.home / "shown" / "new"
    shown.mkdir(mode=0o755)
    drop_in.host = Host(
        drop_in.home / "host",
        drop_in.host.store_url,
        environment=s3.environment,
        settings={"worker": {"mapped_roots": [str(shown)]}},
    )

    here = drop_in.here(drop_in.arguments(manifest, closed), job_user=JOB_USER)

    assert here.ended() == LocalWriteError.exit_code
    assert [*shown.iterdir()] == []


def test_nothing_is_mounted_over_a_directory_that_is_for_all(of_another_user: DropIn) -> None:
    drop_in = of_another_user
    manifest = drop_in.manifest_file(drop_in.stored(FILES))
    for_all = drop_in.home / "tmp"
    for_all.mkdir()
    for_all.chmod(0o1777)

    here = drop_in.here(drop_in.arguments(manifest, for_all), job_user=JOB_USER)

    assert here.code == NotAllowedError.exit_code
    assert not is_mounted(for_all)


@pytest.mark.expected_events("session.start_failed")
def test_another_users_mount_is_as_if_it_were_not_there(
    of_another_user: DropIn, s3: S3Server, tmp_path: Path
) -> None:
    """Where the operator lets several users have their files."""
    drop_in = of_another_user
    manifest = drop_in.manifest_file(drop_in.stored(FILES))
    here = drop_in.here(drop_in.arguments(manifest), job_user=JOB_USER)
    host = Host(
        drop_in.home / "host",
        drop_in.host.store_url,
        environment=s3.environment,
        settings={"worker": {"mapped_roots": [str(drop_in.root)]}},
    )
    write_files(tmp_path / "source", {"scene.usd": b"another"}, mtime_ns=MTIME_US * 1000)
    document = msgspec.to_builtins(job_of(host.submit(tmp_path / "source")[0]))
    document["attachments"]["manifests"][0]["fileSystemLocationName"] = "Projects"
    document["pathMappingRules"] = [
        {
            "sourcePathFormat": "posix",
            "sourcePath": str(tmp_path / "source"),
            "destinationPath": str(drop_in.root),
        }
    ]
    job = JobDocument.decode(msgspec.json.encode(document), "the test's job")
    user = JobUser(NOBODY + 1, NOBODY + 1)
    other = AgentSession(host, job, drop_in.home / "other", job_user=user)

    assert other.sync_job().exit_code != 0
    mounts = open_mounts(host.settings, user_id=user.uid)

    assert is_mounted(drop_in.root)
    assert here.code is None
    assert (mounts.knows(drop_in.root), mounts.spec_of(drop_in.root)) == (False, None)
    with pytest.raises(NotAllowedError):
        mounts.end(drop_in.root)
    assert open_mounts(host.settings, user_id=NOBODY).knows(drop_in.root)
    assert drop_in.unmount_here(job_user=JOB_USER) == 0


def test_what_a_task_wrote_to_the_mount_is_its_output_and_nothing_else_is(
    drop_in: DropIn, s3: S3Server
) -> None:
    def read_what_is_gone(path: str, content: bytes) -> None:
        key = f"{drop_in.root_prefix}/Data/{Digest.of(content).hex}.xxh128"
        s3.client().delete_object(Bucket=s3.bucket, Key=key)
        with pytest.raises(OSError, match="Input/output"):
            (drop_in.root / path).read_bytes()

    inputs = {**FILES, "tex/gone.tx": b"will be gone"}
    drop_in.here(drop_in.arguments(drop_in.manifest_file(drop_in.stored(inputs))))
    with drop_in.host.state(drop_in.session_dir) as state_file:
        state_file.write(state_of(drop_in))

    (drop_in.root / "renders").mkdir()
    (drop_in.root / "renders/1.exr").write_bytes(b"first")
    (drop_in.root / "tex/old.tx").unlink()
    assert finished(drop_in, 0) == (["renders/1.exr"], ["tex/old.tx"])
    assert drop_in.status()["counts"]["bytes_fetched"] == 0
    read_what_is_gone("tex/gone.tx", b"will be gone")
    with pytest.raises(MountReadFailedError, match=r"tex/gone\.tx"):
        finished(drop_in, 1)
    # Unmounted and mounted with more, as before the task of another step.
    assert drop_in.unmount_here() == 0
    more = drop_in.stored({**inputs, "tex/0.tx": b"of another step"})
    drop_in.here(drop_in.arguments(drop_in.manifest_file(more)))
    (drop_in.root / "renders/2.exr").write_bytes(b"second")
    read_what_is_gone("tex/0.tx", b"of another step")
    with pytest.raises(MountReadFailedError, match=r"tex/0\.tx"):
        finished(drop_in, 2)
    assert finished(drop_in, 3) == (["renders/2.exr"], [])
    assert drop_in.unmount_here() == 0


@pytest.mark.slow
def test_a_million_inputs_are_mounted_before_the_agent_gives_up(drop_in: DropIn) -> None:
    digest = Digest.of(b"never read")
    entries = [
        FileEntry(digest.hex, MTIME_US + n, f"d{n // 1000}/f{n % 1000}.exr", digest.size)
        for n in range(1_000_000)
    ]
    manifest = drop_in.manifest_file(Manifest.of(entries))

    begun = time.monotonic()
    drop_in.launch(drop_in.arguments(manifest))
    until(drop_in.is_found)
    seconds = time.monotonic() - begun

    assert (drop_in.root / "d999/f7.exr").stat().st_mtime_ns == (MTIME_US + 999_007) * 1000
    # The agent's limit, however busy the machine is; two to three seconds on an idle one.
    assert seconds < 60, seconds
    print(f"a mount of 1,000,000 files was found after {seconds:.1f} s")
    assert drop_in.unmount().returncode == 0


@pytest.mark.slow
def test_ten_thousand_files_are_found_as_the_agents_upload_looks_for_them(
    drop_in: DropIn,
) -> None:
    files = {f"renders/{n // 100}/{n}.exr": b"%d" % n for n in range(10_000)}
    drop_in.here(drop_in.arguments(drop_in.manifest_file(drop_in.stored(files))))
    root = str(drop_in.root)
    seconds, times = [], dict[str, int]()
    for _ in range(2):
        begun = time.monotonic()
        found = [p for p in glob.glob(f"{root}/renders/**", recursive=True) if os.path.isfile(p)]  # noqa: PTH113, PTH207 - as the agent's script does it
        times = {path[len(root) + 1 :]: os.stat(path).st_mtime_ns // 1000 for path in found}  # noqa: PTH116 - as above
        seconds.append(time.monotonic() - begun)

    assert times == {path: MTIME_US + n for n, path in enumerate(files)}
    print(f"10,000 files were found and looked at in {seconds[0]:.2f} s, then {seconds[1]:.2f} s")
    assert drop_in.unmount_here() == 0


@pytest.mark.slow
def test_a_host_without_dev_fuse_says_so(drop_in: DropIn) -> None:
    arguments = drop_in.arguments(drop_in.manifest_file(drop_in.stored(FILES)))
    script = drop_in.prefix / "scripts/production/al2/run_deadline_vfs_al2.sh"
    hide = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9"
    drop_in.root.mkdir()

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{hide} && exec "$@"', "sh", script, *arguments],
        cwd=drop_in.session_dir,
        env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", **drop_in.environment},
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )

    assert done.returncode == MountFailedError.exit_code, done
    errors = [line for line in done.stdout.splitlines() if line.startswith("error[")]
    assert len(errors) == 1
    assert "there is no /dev/fuse" in errors[0]
    assert left(drop_in) == []


def state_of(drop_in: DropIn) -> SessionState:
    """Return the state of a session whose roots the agent has brought in."""
    document = {
        "farmId": FARM,
        "queueId": QUEUE,
        "jobId": JOB,
        "store": drop_in.host.store_url,
        "attachments": {
            "manifests": [
                {
                    "rootPath": "/show",
                    "rootPathFormat": "posix",
                    "outputRelativeDirectories": ["renders", "tex"],
                }
            ]
        },
    }
    return SessionState(
        version=VERSION,
        session_id=session_id(drop_in.session_dir),
        session_dir=str(drop_in.session_dir),
        ready=True,
        job=JobDocument.decode(json.dumps(document).encode(), "the test's job"),
        roots=[RootState(str(drop_in.root), "/show", "COPIED", [0], ["renders", "tex"])],
    )


def finished(drop_in: DropIn, task: int) -> tuple[list[str], list[str]]:
    """Finish a task; return the paths of its outputs, and of what it removed."""
    manifests: list[bytes] = []
    with (
        drop_in.host.state(drop_in.session_dir) as state_file,
        drop_in.host.services() as context,
    ):
        state = state_file.read_ready()
        mounts = drop_in.host.mounts
        if adopt_mounts(state, mounts):
            state_file.write(state)
        result = finish_task(
            action(1, task),
            context,
            state_file,
            mounts=mounts,
            on_manifest=lambda _index, data: manifests.append(data),
        )
    paths = [entry.path for data in manifests for entry in decode(data, source="it").entries]
    return paths, result.deleted
