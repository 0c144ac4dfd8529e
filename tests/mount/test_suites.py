"""What others have made to find fault with file systems and with what is kept in them, in mounts.

Each runs for minutes, in every stack; `make test-mount` installs what they need. Where a suite says
no more than that it failed, it also runs on the disk that is below the mount, and has to say the
same there.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree as ET

import pytest

from tests.mount.conftest import Mounter
from tests.mount.stacks import Stack
from tests.servers.trees import files_below, write_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FILES: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "tex/wood.tx": 50_000,
    "geo/big.abc": 32 * 1024 * 1024,
    **{f"shots/{at:03}/plate.exr": 3000 + at for at in range(200)},
}
# Those that Python's own tests of files are in, and what is built on files.
PYTHON_SUITES = [
    *("test_os", "test_shutil", "test_tempfile", "test_mmap", "test_pathlib", "test_zipfile"),
    "test_sqlite3",
]
# Of the class `filesystem` of stress-ng; the reasons hold on ext4 as well.
NOT_STRESSED = {
    "bind-mount": "stress-ng itself says that it may hang the machine",
    "binderfs": "is about Android's binder, which kernels of servers do not have",
    "verity": "needs a file system that was made with fs-verity",
}
STRESS_SECONDS = 2


@pytest.fixture
def transport(stack: Stack) -> str:
    return stack.transport


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_files(source, FILES, mtime_ns=1_600_000_000_123_456_000)
    return source


@pytest.fixture
def mnt(mounter: Mounter, source: Path, stack: Stack) -> Iterator[Path]:
    """A writable mount, of which no read has failed when the test is over."""
    at = mounter.mount(mounter.stored(source), writes=stack.writes)
    yield at
    assert mounter.errors(at) == []
    assert mounter.host.mounts.end(at)
    mounter.assert_nothing_is_left()


def run(
    argv: Sequence[str | Path],
    *,
    at: Path,
    environment: Mapping[str, str] | None = None,
    must_succeed: bool = True,
) -> str:
    """Run a program in a directory; return what it wrote."""
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed; `make test-mount` does it")
    done = subprocess.run(
        argv,
        cwd=at,
        env=os.environ | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    assert done.returncode == 0 or not must_succeed, done.stdout[-4000:]
    return done.stdout


# ------------------------------------------------------------------ Python


def python_results(scratch: Path, report: Path) -> dict[str, list[str]]:
    """Run Python's tests in a directory; return what became of each."""
    # The environment's Python has the tests of the one it was made from.
    python: str = getattr(sys, "_base_executable", sys.executable)
    there = [name for name in PYTHON_SUITES if _has_test(python, name)]
    if not set(PYTHON_SUITES) - {"test_sqlite3"} <= set(there):
        pytest.skip("this Python came without its tests; `make test-mount` installs them")
    arguments = ["-m", "test", "--tempdir", str(scratch), "--junit-xml", str(report), *there]
    environment = {"TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    run([python, *arguments], at=scratch, environment=environment, must_succeed=False)
    results: dict[str, list[str]] = {}
    for case in ET.parse(report).iter("testcase"):
        outcome = [child.tag for child in case if not child.tag.startswith("system")]
        results.setdefault(case.attrib["name"], []).append("".join(outcome) or "passed")
    return results


def _has_test(python: str, name: str) -> bool:
    command = [
        python,
        "-c",
        f"import importlib.util as i, sys; sys.exit(not i.find_spec('test.{name}'))",
    ]
    return subprocess.run(command, check=False).returncode == 0


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    with TemporaryDirectory(prefix="disk") as scratch:
        return python_results(Path(scratch), tmp_path_factory.mktemp("python") / "disk.xml")


@pytest.fixture
def short(source: Path, stack: Stack) -> Iterator[Path]:
    """A mount with a short path: some tests make sockets, whose paths have 107 bytes at most."""
    with TemporaryDirectory(prefix="m") as home:
        mounter = Mounter(Path(home), f"file://{home}/store", transport=stack.transport)
        yield mounter.mount(mounter.stored(source), writes=stack.writes)
        mounter.close()


def test_pythons_own_tests_have_the_same_results_as_on_the_disk(
    short: Path, tmp_path: Path, on_disk: dict[str, list[str]]
) -> None:
    (short / "scratch").mkdir()
    in_mount = python_results(short / "scratch", tmp_path / "mount.xml")
    print(Counter(outcome for outcomes in in_mount.values() for outcome in outcomes))
    assert len(in_mount) > 1000
    assert {
        name: outcomes for name, outcomes in in_mount.items() if outcomes != on_disk[name]
    } == {}
    assert in_mount.keys() == on_disk.keys()


# ------------------------------------------------------------------ programs


def git(at: Path, *arguments: str | Path) -> str:
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "A"), ("EMAIL", "a@b.c"), ("DATE", "1600000000 +0000"))
    }
    return run(["git", *arguments], at=at, environment=identity)


def make_history(at: Path) -> None:
    """Make a repository with 60 commits, a branch and a merge."""
    git(at, "init", "--quiet", "--initial-branch", "main")
    for number in range(60):
        for name in range(number % 7 + 1):
            file = at / f"d{number % 5}/f{name}"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"line %d\n" % number * (100 + number * name))
        git(at, "add", "--all")
        git(at, "commit", "--quiet", "--message", f"commit {number}")
        if number == 30:
            git(at, "checkout", "--quiet", "-b", "branch")
        elif number == 40:
            git(at, "checkout", "--quiet", "main")
    git(at, "merge", "--quiet", "--strategy-option", "theirs", "--message", "merge", "branch")


def check_repository(at: Path) -> None:
    assert git(at, "fsck", "--full", "--strict") in ("", "notice: HEAD points to an unborn branch")
    assert git(at, "status", "--porcelain") == ""


def test_git_works_on_a_repository(mnt: Path, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", mnt / "ours"
    for repository in (theirs, ours):
        repository.mkdir()
        make_history(repository)
    assert git(ours, "rev-parse", "HEAD") == git(theirs, "rev-parse", "HEAD")
    check_repository(ours)
    git(mnt, "clone", "--quiet", theirs, "copied")
    git(mnt, "clone", "--quiet", "--no-hardlinks", "ours", "clone")
    git(mnt, "clone", "--quiet", "ours", "linked")
    revisions = git(theirs, "rev-parse", "main~20", "main").split()
    for name in ("copied", "clone", "linked", "ours"):
        repository = mnt / name
        git(repository, "repack", "--quiet", "-a", "-d")
        git(repository, "gc", "--quiet", "--aggressive", "--prune=now")
        for revision in revisions:
            git(repository, "checkout", "--quiet", "--detach", revision)
            git(theirs, "checkout", "--quiet", "--detach", revision)
            check_repository(repository)
            shutil.copytree(repository, tmp_path / "seen", ignore=shutil.ignore_patterns(".git"))
            run(["diff", "--recursive", "--exclude=.git", theirs, tmp_path / "seen"], at=tmp_path)
            shutil.rmtree(tmp_path / "seen")
    git(mnt / "clone", "worktree", "add", "--quiet", "../worktree", revisions[0])
    check_repository(mnt / "worktree")


def test_git_keeps_the_inputs(mnt: Path) -> None:
    """A repository around what is there: all inputs are read, and none has changed."""
    git(mnt, "init", "--quiet", "--initial-branch", "main")
    git(mnt, "add", "--all")
    git(mnt, "commit", "--quiet", "--message", "inputs")
    check_repository(mnt)
    shutil.rmtree(mnt / "shots")
    (mnt / "tex").rename(mnt / "textures")
    git(mnt, "reset", "--quiet", "--hard")
    git(mnt, "clean", "--quiet", "--force", "-d")
    check_repository(mnt)
    assert sorted(path.name for path in mnt.iterdir()) == [
        *(".git", "geo", "scene.usd", "shots", "tex")
    ]


def test_rsync_finds_nothing_to_do_where_it_has_been(mnt: Path, source: Path) -> None:
    flags = ["--archive", "--hard-links", "--checksum", "--itemize-changes", "--delete"]
    assert run(["rsync", *flags, "--dry-run", f"{source}/geo/", "geo/"], at=mnt).split("\n")[
        1:
    ] == [""]
    run(["rsync", *flags, f"{source}/", "copy/"], at=mnt)
    assert run(["rsync", *flags, f"{source}/", "copy/"], at=mnt) == ""
    assert files_below(mnt / "copy") == files_below(source)
    (mnt / "copy/tex/wood.tx").write_bytes(b"changed")
    (mnt / "copy/more").touch()
    run(["rsync", *flags, "--inplace", f"{source}/", "copy/"], at=mnt)
    assert files_below(mnt / "copy") == files_below(source)


# ------------------------------------------------------------------ stress


@pytest.mark.parametrize("engine", ["psync", "mmap", "libaio", "splice"])
@pytest.mark.parametrize("file", ["new", "geo/big.abc"])
def test_fio_reads_what_it_wrote(mnt: Path, engine: str, file: str) -> None:
    """Of a new file, and of an input of 32 MiB that is copied up under way."""
    for pattern in ("randrw", "write", "randwrite"):
        run(
            [
                *("fio", "--name=verify", f"--filename={file}", f"--rw={pattern}"),
                *(f"--ioengine={engine}", "--bs=4k", "--size=32m", "--iodepth=8"),
                *("--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_backlog=1024"),
                *("--randseed=5", "--allrandrepeat=1", "--fallocate=none", "--overwrite=0"),
            ],
            at=mnt,
        )


def test_many_jobs_of_fio_verify_their_files_at_once(mnt: Path) -> None:
    run(
        [
            *("fio", "--name=many", "--directory=.", "--rw=randrw", "--ioengine=psync", "--bs=16k"),
            *("--size=8m", "--nrfiles=16", "--numjobs=4", "--fsync=64", "--verify=crc32c"),
            *("--do_verify=1", "--verify_fatal=1", "--randseed=7", "--allrandrepeat=1"),
        ],
        at=mnt,
    )


def test_stress_ng_finds_nothing(mnt: Path) -> None:
    (mnt / "scratch").mkdir()
    said = run(
        [
            *("stress-ng", "--class", "filesystem", "--sequential", "1", "--verify"),
            *("--exclude", ",".join(NOT_STRESSED), "--timeout", str(STRESS_SECONDS)),
            *("--temp-path", ".", "--hdd-bytes", "16M", "--seed", "1"),
        ],
        at=mnt / "scratch",
    )
    assert re.findall(r"stress-ng: (?:fail|error): .*", said) == []
    assert list((mnt / "scratch").iterdir()) == []
