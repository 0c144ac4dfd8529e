"""The kernel transport for who is not root: mounted by fusermount, served like any other."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from string import ascii_letters

import psutil
import pytest

from agent_plugin.content.digest import Digest
from tests.mount.conftest import END_SECONDS, Mounter
from tests.servers.hooks import FARM, JOB, QUEUE, step, task
from tests.servers.other_user import NOBODY
from tests.servers.proxied_object import until
from tests.servers.trees import write_files
from tests.servers.unprivileged import Unprivileged, unprivileged

SOMEBODY_ELSE = NOBODY - 1
SIZE = 300_000
ACTION = f"sessionaction-{1:032x}-0"
LETTERS = ascii_letters


@pytest.fixture
def user() -> Iterator[Unprivileged]:
    """A host where users may not let others into their mounts."""
    with unprivileged(allow_other=False) as user:
        yield user


def mounted(user: Unprivileged) -> Path:
    """Mount a few files as the user; return where."""
    (user.home / "source/tex").mkdir(parents=True)
    for number in range(20):
        (user.home / f"source/tex/{number}.tx").write_text(LETTERS[number] * SIZE)
    mounter = Mounter(user.home, user.host.store_url)
    manifest, at = mounter.manifest_file(mounter.stored(user.home / "source")), user.home / "mnt"
    user.own()
    store = user.host.store_url
    told = json.loads(user.propmaster("mount", manifest, at, "--store", store, "--json"))
    assert (told["transport"], told["writes"], told["files"]) == ("kernel", "none", 20)
    return at


def servers(user: Unprivileged) -> list[int]:
    """Return the processes that serve, the supervisor first."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "vfs" in words and any(str(user.home) in word for word in words):
                found.append((process.ppid(), process.pid))
    pids = {pid for _, pid in found}
    return [pid for _, pid in sorted(found, key=lambda both: both[0] in pids)]


def is_replaced(user: Unprivileged, server: int) -> bool:
    """Whether another process serves now."""
    return len(servers(user)) == 2 and server not in servers(user)


def test_a_user_mounts_reads_and_unmounts_without_root(user: Unprivileged) -> None:
    at = mounted(user)

    assert user.mounts() == ["fuse.propmaster"]
    assert user.run("cat", at / "tex/7.tx").stdout == LETTERS[7] * SIZE
    # Nobody is asked to go before others who may not.
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in servers(user)} == {os.nice(0)}
    assert user.run("touch", at / "new").returncode != 0
    asked = f"import os; print(os.getxattr({str(at / 'tex/7.tx')!r}, 'user.propmaster.hash'))"
    assert Digest.of(LETTERS[7].encode() * SIZE).hex in user.python(asked)
    # Not even root enters what /etc/fuse.conf does not let others into.
    assert "Permission denied" in user.run("ls", at, user=0).stderr
    assert user.propmaster("unmount", at).startswith("unmounted")
    assert (user.mounts(), servers(user)) == ([], [])


@pytest.mark.slow
def test_the_root_of_a_user_namespace_mounts_and_writes(
    user: Unprivileged,
) -> None:
    at = mounted(user)
    user.propmaster("unmount", at)
    inside = " ".join(
        [
            f"cd {user.home}; export PROPMASTER_CONFIG={user.host.config}; exec 2>&1",
            f'; p() {{ {user.words()} "$@"; }}',
            f"; p mount job.manifest {at} --store {user.host.store_url} --work-dir work",
            f"&& rm -r {at}/tex && mkdir {at}/tex && echo new > {at}/tex/new && ls {at}/tex",
            f"; p unmount {at}",
        ]
    )
    done = user.run("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside)

    lines = done.stdout.splitlines()
    assert "writable" in lines[0], done.stdout
    assert lines[1:] == ["new", f"unmounted {at}"]


def test_the_doctor_of_who_is_not_root_tries_it(user: Unprivileged) -> None:
    told = json.loads(user.propmaster("doctor", "--session-dir", user.home, "--json"))

    found = {probe["name"]: probe for probe in told["probes"]}
    assert found["kernel_transport"]["ok"] is True
    assert (told["virtual"], "writes overlay;" in found["virtual"]["reason"]) == (True, True)
    for absent in ("cap_sys_admin", "overlayfs", "user_allow_other"):
        assert found[absent]["ok"] is False
    assert (user.mounts(), servers(user)) == ([], [])


def start(user: Unprivileged) -> dict[str, str]:
    """Start a VIRTUAL session of two files; return what is told of its root."""
    write_files(
        user.home / "show", {"tex/wood.tx": SIZE, "tex/old.tx": b"old", "a": b"a"}, mtime_ns=0
    )
    user.own()
    ids = ["--store", user.host.store_url, "--farm-id", FARM, "--queue-id", QUEUE]
    told = user.propmaster(
        "submit",
        user.home / "show",
        *ids,
        "--output-dir",
        "renders",
        "--output-dir",
        "tex",
        "--json",
    )
    job = {"farmId": FARM, "queueId": QUEUE, "jobId": JOB, **json.loads(told)}
    (user.home / "job.json").write_text(json.dumps(job))
    user.own()
    job_file = user.home / "job.json"
    words: list[str | Path] = [
        "session",
        "start",
        "--session-dir",
        user.home / "session",
        "--job",
        job_file,
    ]
    told = user.propmaster(*words, "--file-system", "VIRTUAL", "--json")
    root: dict[str, str] = json.loads(told)["roots"][0]
    return root


def test_a_virtual_session_of_who_is_not_root_is_written_to_and_stores_its_outputs(
    user: Unprivileged,
) -> None:
    root = start(user)
    assert (root["fileSystem"], root["reason"]) == ("VIRTUAL", "")
    at = root["localRoot"]
    edits = f"cd {at} && cat tex/wood.tx >/dev/null && echo done > renders/1.exr"
    edits += " && rm tex/old.tx && mv tex/wood.tx renders/w.tx && echo more >> a"
    # Closed to its own user, and where no output can be.
    edits += " && mkdir -p kept/d && echo key > kept/key && : > kept/lock && touch kept/d/file"
    edits += " && chmod 0 kept/key kept/lock kept/d"
    done = user.run("sh", "-c", f"mkdir -p {at}/renders && {edits}")
    assert done.returncode == 0, done.stderr

    session: list[str | Path] = ["--session-dir", user.home / "session"]
    ids = ["--step-id", step(1), "--task-id", task(1), "--session-action-id", ACTION]
    result = json.loads(user.propmaster("session", "finish-task", *session, *ids, "--json"))

    assert (result["files"], sorted(result["deleted"])) == (2, ["tex/old.tx", "tex/wood.tx"])
    user.propmaster("session", "end", *session)
    assert (user.mounts(), servers(user)) == ([], [])
    assert not any((user.home / "session").iterdir())


def test_a_session_that_others_are_to_enter_is_copied_where_a_mount_would_keep_them_out(
    user: Unprivileged,
) -> None:
    (user.home / "session").mkdir()
    (user.home / "session").chmod(0o2770)
    root = start(user)

    assert root["fileSystem"] == "COPIED"
    assert "user_allow_other" in root["reason"]


def test_others_enter_where_fuse_conf_lets_them() -> None:
    with unprivileged(allow_other=True) as user:
        at = mounted(user)

        assert user.run("cat", at / "tex/7.tx", user=SOMEBODY_ELSE).stdout == LETTERS[7] * SIZE
        user.propmaster("unmount", at)


@pytest.mark.slow
def test_a_busy_mount_goes_and_its_reader_with_an_error(user: Unprivileged) -> None:
    at = mounted(user)
    holder = user.popen("sh", "-c", f"exec < {at}/tex/1.tx; echo open; exec sleep 600")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    try:
        user.propmaster("unmount", at)
        assert user.mounts() == []
        until(lambda: servers(user) == [], seconds=END_SECONDS)
    finally:
        holder.kill()
        holder.communicate()


def test_a_killed_server_is_replaced_without_root_and_readers_see_a_pause(
    user: Unprivileged,
) -> None:
    at = mounted(user)
    reader = user.popen("sh", "-c", f"for i in 1 2 3 4 5; do cat {at}/tex/*.tx; sleep 0.1; done")
    try:
        for _ in range(3):
            _, server = servers(user)
            os.kill(server, signal.SIGKILL)
            until(partial(is_replaced, user, server))
        stdout, stderr = reader.communicate(timeout=60)
    finally:
        reader.kill()
        reader.communicate()

    assert stderr == ""
    assert stdout == "".join(LETTERS[number] * SIZE for number in sorted(range(20), key=str)) * 5
    user.propmaster("unmount", at)


def test_what_killed_processes_left_is_cleared_without_root(user: Unprivileged) -> None:
    at = mounted(user)
    for pid in servers(user):
        os.kill(pid, signal.SIGKILL)
    until(lambda: servers(user) == [])
    assert user.mounts() == ["fuse.propmaster"]

    user.propmaster("mount", user.home / "job.manifest", at, "--store", user.host.store_url)
    assert user.run("cat", at / "tex/7.tx").stdout == LETTERS[7] * SIZE
    user.propmaster("unmount", at)
    assert user.mounts() == []


# What a user does with modes that shut themselves out, and finds afterwards.
_SHUTS = """
cd $1
mkdir -m 300 box && echo in > box/file; echo $?
mkdir -m 555 fixed && rmdir fixed; echo $?
mkdir shut && echo in > shut/file && chmod 0 shut; echo $?
mkdir -p gone/in && chmod 555 gone/in && rm -r gone; echo $?
: > empty && chmod 0 empty; echo $?
chmod 555 tex && echo more >> tex/1.tx; echo $?
chmod 444 geo/1.abc && mv geo/1.abc geo/9.abc && ln geo/9.abc geo/8.abc; echo $?
exec 3>> geo/2.abc && chmod 444 geo/2.abc && echo more >&3; echo $?
chmod 555 mov && mv mov moved; echo $?
rm -r rib && mkdir -m 555 rib; echo $?
mkdir -m 555 made && rm -r ass && mv made ass; echo $?
chmod 200 geo/3.abc; echo $?
"""
_LOOKS = """
cd $1
stat -c '%a %n %s' box shut empty tex/1.tx | sed 's/ [0-9]*$//'
stat -c '%a %n' * geo/*; cat geo/*; ls -R moved rib ass
chmod 644 geo/3.abc; cat geo/3.abc; ls shut
chmod 755 shut; cat shut/file; cat box/file; tail -c 5 tex/1.tx
rm -r box shut empty; echo $?
"""


def test_a_user_who_shuts_files_to_himself_finds_what_he_finds_on_a_disk(
    user: Unprivileged,
) -> None:
    """The mount's process is that user as well, and goes on, also after it was killed."""
    paths = ("tex/1.tx", "geo/1.abc", "geo/2.abc", "geo/3.abc", "mov/1", "rib/1", "ass/1")
    write_files(user.home / "source", {path: path.encode() for path in paths}, mtime_ns=0)
    mounter = Mounter(user.home, user.host.store_url)
    manifest = mounter.manifest_file(mounter.stored(user.home / "source"))
    disk, at = user.home / "source", user.home / "mnt"
    user.own()
    command: list[str | Path] = ["mount", manifest, at, "--store", user.host.store_url, "--json"]
    work = user.home / "work"
    mount = partial(user.propmaster, *command, "--writes", "overlay", "--work-dir", work)
    assert json.loads(mount())["writes"] == "overlay"

    found = [user.run("sh", "-c", _SHUTS, "sh", place) for place in (disk, at)]
    assert found[1].stdout == found[0].stdout == "0\n" * 12
    _, server = servers(user)
    os.kill(server, signal.SIGKILL)
    until(partial(is_replaced, user, server))
    assert user.run("cat", at / "box/file").stdout == "in\n"
    user.propmaster("unmount", at)
    mount()
    found = [user.run("sh", "-c", _LOOKS, "sh", place) for place in (disk, at)]
    assert found[1].stdout == found[0].stdout
    assert found[1].stderr.replace(str(at), str(disk)) == found[0].stderr
    user.propmaster("unmount", at)
