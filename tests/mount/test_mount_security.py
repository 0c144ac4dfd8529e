"""Who may what with a mount: jobs that plant links, other users, hostile manifests, secrets.

A job may write in the session directory, and its mounts are made by root.
"""

import errno
import itertools
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import LocalWriteError, PropmasterError, UnsafePathError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.mount_table import read_mounts
from agent_plugin.session.job import JobDocument
from agent_plugin.session.virtual import work_dir_name
from tests.mount.conftest import Mounter
from tests.servers.hooks import Host, action
from tests.servers.mount_reader import read_all
from tests.servers.other_user import NOBODY
from tests.servers.proxied_object import until
from tests.servers.scripted_answers import ScriptedAnswers
from tests.servers.sessions import Sessions, hash_of
from tests.servers.trees import write_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

SECRET = b"what a job may not read " * 100


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that everybody may enter; pytest's own are closed to others."""
    home = Path(tempfile.mkdtemp(prefix="propmaster-"))
    home.chmod(0o755)
    yield home
    for mount in reversed(read_mounts()):
        if mount.mountpoint.startswith(f"{home}/"):
            subprocess.run(["umount", "--lazy", mount.mountpoint], check=False)
    shutil.rmtree(home)


@pytest.fixture
def sessions(home: Path) -> Iterator[Sessions]:
    """A session whose directory is the job user's."""
    host = Host(home / "host", f"file://{home}/store")
    sessions = Sessions(home, host)
    sessions.session_dir.mkdir(parents=True)
    os.chown(sessions.session_dir, NOBODY, NOBODY)
    yield sessions
    for mount in reversed(read_mounts()):
        if mount.mountpoint.startswith(f"{sessions.session_dir}/"):
            host.mounts.end(Path(mount.mountpoint))


def started(sessions: Sessions, job: JobDocument) -> tuple[str, Path]:
    [root] = sessions.host.start(job, sessions.session_dir, file_system="VIRTUAL").roots
    return root.file_system, Path(root.local_root)


def as_nobody(script: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a shell script as the job's user."""
    return subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sh", "-c", script,
         "sh", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )  # fmt: skip


def stored_hashes(home: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (home / "store/Data").iterdir()}


# ------------------------------------------------------------ links that a job plants


@pytest.mark.expected_events(events.MOUNT_FELL_BACK, events.SESSION_START_FAILED)
@pytest.mark.parametrize(
    "planted",
    ["root", "work directory", pytest.param("directory for writes", marks=pytest.mark.slow)],
)
def test_nothing_is_mounted_or_given_away_where_a_planted_link_leads(
    sessions: Sessions, home: Path, planted: str
) -> None:
    job = sessions.submitted({"scene.usd": b"#usda"}, "renders")
    _, root = started(sessions, job)
    sessions.host.end(sessions.session_dir)
    victim = home / "victim"
    (victim / "upper").mkdir(parents=True, mode=0o700)
    work = root.with_name(work_dir_name(root))
    assert not work.exists()
    match planted:
        case "root":
            root.symlink_to(victim)
        case "work directory":
            work.symlink_to(victim)
        case _:
            work.mkdir()
            os.chown(work, NOBODY, NOBODY)
            (work / "upper").symlink_to(victim / "upper")

    refused = file_system = ""
    try:
        file_system, _ = started(sessions, job)
    except (UnsafePathError, LocalWriteError) as error:
        refused = error.message

    assert [m for m in read_mounts() if m.mountpoint.startswith(str(victim))] == []
    assert [path.name for path in victim.iterdir()] == ["upper"]
    for directory in (victim, victim / "upper"):
        assert directory.stat().st_uid == 0
        assert list((victim / "upper").iterdir()) == []
    assert stat.S_IMODE((victim / "upper").stat().st_mode) == 0o700
    # What was not mounted was copied, or nothing was.
    if refused:
        assert "symbolic link" in refused or "not this user's alone" in refused
    else:
        assert file_system == "COPIED"
        assert (root / "scene.usd").read_bytes() == b"#usda"


@pytest.mark.expected_events(events.FILE_SKIPPED)
def test_a_directory_that_becomes_a_link_out_of_the_root_gives_nothing_away(
    sessions: Sessions, home: Path
) -> None:
    job = sessions.submitted({"renders/old/1.exr": b"an input", "scene.usd": b"#usda"}, "renders")
    (home / "secrets").mkdir(mode=0o700)
    (home / "secrets/1.exr").write_bytes(SECRET)
    _, root = started(sessions, job)
    script = """
        rm -r "$1/renders/old"
        ln -s "$2" "$1/renders/old"
        ln -s "$2/1.exr" "$1/renders/2.exr"
        ln "$2/1.exr" "$1/renders/3.exr"
        echo done > "$1/renders/4.exr"
    """
    done = as_nobody(script, root, home / "secrets")
    assert "Permission denied" in done.stderr or "cross-device" in done.stderr

    before = stored_hashes(home)
    result = sessions.host.finish_task(sessions.session_dir, action())

    assert result.files == 1
    assert sessions.outputs().keys() == {"renders/4.exr"}
    assert hash_of(SECRET) not in stored_hashes(home) - before


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.expected_events(events.FILE_SKIPPED, events.FILE_REREAD)
def test_directories_that_are_swapped_for_links_while_outputs_are_stored_give_nothing_away(
    sessions: Sessions, home: Path
) -> None:
    job = sessions.submitted({"scene.usd": b"#usda"}, "renders")
    secrets = home / "secrets"
    secrets.mkdir(mode=0o700)
    for number in range(20):
        (secrets / f"{number}.exr").write_bytes(SECRET + b"%d" % number)
    _, root = started(sessions, job)
    script = """
        cd "$1"; mkdir renders; cd renders; ln -s "$2" link; n=0
        while :; do
            mkdir d; for i in $(seq 0 19); do echo $n > d/$i.exr; done
            mv d away; mv link d; mv d link; mv away d
            n=$((n+1)); rm -r d
        done
    """
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    swapping = subprocess.Popen(
        [*words, "sh", "-c", script, "sh", root, secrets], stderr=subprocess.DEVNULL
    )
    try:
        until((root / "renders").exists)
        for number in range(40):
            try:
                sessions.host.finish_task(sessions.session_dir, action(1, number))
            except Exception as error:  # noqa: BLE001 - torn files and the like are told
                assert getattr(error, "exit_code", 0), error  # noqa: PT017 - either is fine
    finally:
        swapping.kill()
        swapping.wait()
    # All of them may have met torn files. Of the shell a command may go on for a moment.
    (root / "renders/last.exr").write_bytes(b"nobody changes it")
    further = itertools.count(40)

    def is_stored() -> bool:
        with suppress(PropmasterError):
            run = action(1, next(further))
            return sessions.host.finish_task(sessions.session_dir, run).files > 0
        return False

    until(is_stored)
    secret = {hash_of(SECRET + b"%d" % number) for number in range(20)}
    assert not secret & stored_hashes(home)


# ------------------------------------------------------------ other users


def test_the_jobs_user_reaches_nothing_but_the_mount(sessions: Sessions, home: Path) -> None:
    job = sessions.submitted({"scene.usd": b"#usda", "tex/a.tx": 5000}, "renders")
    other = Sessions(home / "other", sessions.host)
    other.session_dir.mkdir(parents=True)
    root = Path()
    for session in (other, sessions):
        file_system, root = started(session, job)
        assert file_system == "VIRTUAL"
        assert (root / "tex/a.tx").stat().st_size == 5000
        done = as_nobody('cat "$1/tex/a.tx" > /dev/null && echo x > "$1/new"', root)
        # The other session's directory is root's.
        assert (done.returncode == 0) == (session is sessions), done.stderr
    work = root.with_name(work_dir_name(root))
    (root / "written").write_bytes(SECRET)
    assert (work / "upper/written").read_bytes() == SECRET
    control = sessions.host.mounts.control_of(root)
    blob = next(path for path in sessions.host.cache_dir.rglob("*") if len(path.name) == 32)
    forbidden = {
        'cat "$1"': [work / "upper/written", blob, Path(control).with_name("spec.json"),
                     Path(control).with_name("log"), Path(control).with_name("manifest")],
        'ls "$1"': [work, work / "upper", work / "lower", sessions.host.cache_dir,
                    sessions.host.state_dir, Path(control).parent],
        'echo x > "$1/x"': [work / "upper", work / "lower", sessions.host.cache_dir, blob.parent],
        'echo x >> "$1"': [blob, work / "upper/written"],
        'rm -f "$1" && test ! -e "$1"': [blob],
        'kill "$1"': [Path(str(json.loads(_asked(control))["supervisor"]))],
    }  # fmt: skip
    for script, paths in forbidden.items():
        for path in paths:
            assert as_nobody(script, path).returncode != 0, (script, path)
    assert blob.exists()
    for mount in read_mounts():
        if mount.mountpoint.startswith(f"{home}/"):
            [line] = [
                line
                for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if line.split()[4] == mount.mountpoint
            ]
            assert {"nosuid", "nodev"} <= set(line.split()[5].split(",")), line
    other.host.end(other.session_dir)


def _asked(control: str) -> bytes:
    from agent_plugin.session.mount_control import ask_mount  # noqa: PLC0415 - as the plugin asks

    return ask_mount(control, {"ask": "status"})


# ------------------------------------------------------------ secrets

STORE = "s3://bucket/show"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAMARKEDMARKED1111",
    "AWS_SECRET_ACCESS_KEY": "marked/secret+key/of/40/characters/xxxxx",
    "AWS_SESSION_TOKEN": "marked-token-that-is-long-in-reality",
}
# What S3 adds to a refused signature: what it was given, the token's header included.
ECHO = (
    f"<AWSAccessKeyId>{SECRETS['AWS_ACCESS_KEY_ID']}</AWSAccessKeyId>"
    f"<StringToSign>{SECRETS['AWS_SECRET_ACCESS_KEY']}</StringToSign>"
    f"<CanonicalRequest>x-amz-security-token:{SECRETS['AWS_SESSION_TOKEN']}</CanonicalRequest>"
)
LOUD = {"RUST_LOG": "trace", "RUST_BACKTRACE": "full", "PYTHONDEVMODE": "1", "PYTHONWARNINGS": ""}


def test_no_credential_is_in_anything_that_a_mount_tells_or_keeps(tmp_path: Path) -> None:
    with ScriptedAnswers() as server:
        server.error(403, "SignatureDoesNotMatch", more=ECHO)
        environment = {"AWS_ENDPOINT_URL_S3": server.url, **SECRETS, **LOUD}
        mounter = Mounter(
            tmp_path, STORE, environment=environment, store={"attempts": 2, "deadline_seconds": 1.0}
        )
        try:
            digest = Digest.of(SECRET)
            at = mounter.mount(
                Manifest.of([FileEntry(digest.hex, 0, "a", digest.size)]), writes="overlayfs"
            )
            [seen] = read_all(at, ["a"]).values()
            assert seen.errno == errno.EIO
            (at / "new").write_bytes(b"x")
            mounter.kill_server(at)
            kept = [
                path.read_bytes()
                for place in (mounter.host.state_dir, mounter.host.cache_dir, tmp_path / "mnt-work")
                for path in place.rglob("*")
                if path.is_file() and "lower" not in path.parts
            ]
            kept += [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in mounter.processes()]
            kept += [Path("/proc/self/mountinfo").read_bytes()]
            kept += [json.dumps(mounter.status(at)).encode()]
            assert [code for _, code in mounter.errors(at)] == ["E_ACCESS"]
            assert any(b"mount.read_failed" in data for data in kept), "the log is among them"
            assert mounter.host.mounts.end(at)
        finally:
            mounter.close()
    for name, secret in SECRETS.items():
        assert [data for data in kept if secret.encode() in data] == [], name


# ------------------------------------------------------------ hostile manifests


def test_sizes_that_no_disk_has_cost_nothing_and_are_told_when_read(mounter: Mounter) -> None:
    honest = Digest.of(b"honest")
    write_files(mounter.home / "source", {"honest": b"honest"}, mtime_ns=0)
    mounter.stored(mounter.home / "source")
    sizes = {f"{power}": 2**power for power in (33, 40, 44, 50)}
    entries = [FileEntry("ab" * 16, 0, name, size) for name, size in sizes.items()]
    at = mounter.mount(Manifest.of([*entries, FileEntry(honest.hex, 0, "honest", 6)]))
    for name, size in sizes.items():
        assert (at / name).stat().st_size == size
        fd = os.open(at / name, os.O_RDONLY)
        try:
            for offset in (0, size // 2, size - 10):
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(fd, 10, offset)
        finally:
            os.close(fd)
    assert {path for path, _ in mounter.errors(at)} == sizes.keys()
    status = Path(f"/proc/{mounter.server(at)}/status").read_text()
    [peak] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    assert peak < 500_000, "KiB"
    assert [e for e in mounter.log_of(at) if e["event"] == "mount.server_died"] == []
    assert (at / "honest").read_bytes() == b"honest"
    assert mounter.host.mounts.end(at)
    mounter.assert_nothing_is_left()


def _manifest(*paths: str, **changes: Any) -> bytes:
    document = {
        "hashAlg": "xxh128",
        "manifestVersion": "2023-03-03",
        "paths": [
            {"hash": "ab" * 16, "mtime": 0, "path": path, "size": 1} | changes for path in paths
        ],
        "totalSize": len(paths),
    }
    return json.dumps(document).encode()


HOSTILE = {
    "leads above": _manifest("../../etc/passwd"),
    "leads above in the middle": _manifest("a/../../b"),
    "is absolute": _manifest("/etc/passwd"),
    "has a NUL": _manifest("a\0b"),
    "is the root": _manifest("."),
    "is a file and a directory": _manifest("a", "a/b"),
    "is too long": _manifest("x" * 256),
    "has a negative size": _manifest("a", size=-1),
    "has a size of 64 bits": _manifest("a", size=2**64),
    "has a hash that is a path": _manifest("a", hash="../../../etc/passwd"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_manifest_is_not_mounted(mounter: Mounter, how: str) -> None:
    manifest = mounter.home / "hostile.manifest"
    manifest.write_bytes(HOSTILE[how])
    host = mounter.host
    Path(host.store_url.removeprefix("file://")).mkdir(parents=True, exist_ok=True)
    done = host.run("mount", manifest, mounter.home / "mnt", "--store", host.store_url)
    assert done.returncode == 65, done.stderr
    assert "Traceback" not in done.stderr
    mounter.assert_nothing_is_left()


def test_names_that_overlayfs_has_a_use_for_are_names(mounter: Mounter) -> None:
    names = [".wh.scene", ".wh..wh..opq", ".wh..wh.plnk", "trusted.overlay.opaque", "work", "index"]
    write_files(mounter.home / "source", {f"d/{name}": name.encode() for name in names}, mtime_ns=0)
    at = mounter.mount(mounter.stored(mounter.home / "source"), writes="overlayfs")
    assert {path.name: path.read_bytes() for path in (at / "d").iterdir()} == {
        name: name.encode() for name in names
    }


# ------------------------------------------------------------ the control socket


def test_who_can_reach_the_control_socket_is_not_answered_for_that(
    mounter: Mounter, home: Path
) -> None:
    at = mounter.mount(Manifest.of([FileEntry("ab" * 16, 0, "a", 1)]))
    control = Path(mounter.host.mounts.control_of(at))
    reachable = home / "control"
    os.link(control, reachable)
    reachable.chmod(0o666)
    ask = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])
try:
    s.sendall(b'{"ask": "status"}\\n')
    print(s.recv(100))
except (ConnectionResetError, BrokenPipeError): print(b"")
"""
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    asked: list[str | Path] = ["/usr/bin/env", "python3", "-c", ask, reachable]
    told = [
        subprocess.run([*who, *asked], capture_output=True, text=True, timeout=30, check=False)
        for who in ([], words)
    ]
    if told[1].returncode:
        pytest.skip(f"others can not run Python here: {told[1].stderr}")
    assert "name" in told[0].stdout
    assert told[1].stdout.strip() == "b''"
