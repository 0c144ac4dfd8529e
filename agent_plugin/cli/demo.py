"""`propmaster demo`: the whole main job on this machine, with the real commands and a real store.

Each command is a process of its own, as a worker agent would run it, in a directory of its own
with settings, caches and state of its own: nothing of the user's is touched, the input is only
read, and at the end nothing is left.
"""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import click

from agent_plugin.cli.demo_screen import DemoResult, Mounted, Screen, Step
from agent_plugin.cli.demo_store import DemoStore
from agent_plugin.cli.options import escaped, print_json
from agent_plugin.content import events
from agent_plugin.content.errors import (
    BlobCorruptError,
    JobInvalidError,
    NoSpaceError,
    PropmasterError,
    local_write_error,
)
from agent_plugin.content.mount_spec import read_spec
from agent_plugin.content.safe_path import Root
from agent_plugin.content.snapshot import walk
from agent_plugin.mounting import open_mounts
from agent_plugin.session.mount_control import ask_mount
from agent_plugin.session.mounts import Mounts
from agent_plugin.session.state import VIRTUAL
from agent_plugin.settings import CACHE_VARIABLE, load
from agent_plugin.transfer.progress import format_bytes

BUCKET: Final = "demo"
STORE: Final = f"s3://{BUCKET}/show"
FARM: Final = "farm-" + "0" * 31 + "1"
QUEUE: Final = "queue-" + "0" * 31 + "2"
JOB: Final = "job-" + "0" * 31 + "3"
STEP: Final = "step-" + "0" * 31 + "4"
TASK: Final = "task-" + "0" * 31 + "5"
ACTION: Final = "sessionaction-" + "0" * 31 + "6"

_IN_STORE: Final = ["--store", STORE, "--farm-id", FARM, "--queue-id", QUEUE]
# The input is copied, stored, cached and placed; the fifth is for outputs and room to spare.
_SPACE_FACTOR: Final = 5
_COMMAND_SECONDS: Final = 3600.0
_SETTINGS: Final = "propmaster.toml"
# Of the inputs, what the task of the VIRTUAL session reads: 6 %.
_EVERY: Final = 16
_PART_COPIED: Final = "part-copied"
_COMPARED_BYTES: Final = 1024 * 1024
_SKIPPED_SHOWN: Final = 3
# Other people's packages, compiled files, and tests, which are more than half of the library.
_NOT_COPIED: Final = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "*.a")


@click.command(name="demo")
@click.option(
    "--input",
    "input_dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True, resolve_path=True),
    help="Submit this directory, which is only read; otherwise Python's standard library.",
)
@click.option("--keep", is_flag=True, help="Leave all files to look at, and say how to go on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(input_dir: Path | None, keep: bool, as_json: bool) -> None:
    """Show the whole main job on this machine: no account, no network, nothing left behind.

    Starts a real S3 server on loopback, submits a directory, runs a task on it in each of two
    copied sessions and one that is mounted, downloads what they left, and compares and counts it
    all.
    """
    # The commands' own events are read from them, and told in words.
    events.configure(level=logging.ERROR)
    begun = time.monotonic()
    with _directory(keep=keep) as directory:
        screen = Screen(silent=as_json)
        screen.say(
            "A render farm in one directory: an artist's machine that submits a job, a worker that"
            " runs its\ntasks, and between them a real S3 server (SeaweedFS) on 127.0.0.1. Nothing"
            " leaves this machine."
        )
        with DemoStore(directory / "s3") as store:
            store.create_bucket(BUCKET)
            demo = _Demo(directory, _write_environment(directory, store), screen)
            result = demo.run(input_dir)
            result.seconds = round(time.monotonic() - begun, 1)
            result.directory = os.fspath(directory) if keep else None
            screen.table(result)
            if as_json:
                print_json(result)
            elif keep:
                screen.how_to_repeat(directory, store.endpoint_url)


@dataclass(frozen=True, slots=True)
class _Output:
    """What a command printed, and the events it logged."""

    step: Step
    document: Any
    events: Sequence[Mapping[str, Any]]


class _Demo:
    """The story, command after command.

    Args:
        directory: Where all of it happens, and what the commands' paths are relative to.
        environment: Of the commands.
        screen: Tells it.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], screen: Screen) -> None:
        self._directory = directory
        self._environment = environment
        self._screen = screen
        self._result = DemoResult("")

    def run(self, input_dir: Path | None) -> DemoResult:
        """Run all of it, and return what was found.

        Raises:
            JobInvalidError: The directory has no files.
            PropmasterError: A command failed; what it said is on standard error.
            BlobCorruptError: A file did not arrive as it was.
        """
        root = input_dir or _copy_standard_library(self._directory / "project")
        output_dir = _unused_name(root)
        self._measure(root)
        self._screen.title("The artist submits the job: only content that the store lacks is sent")
        self._submit(root, output_dir, "submit")
        local_root = self._session(root, output_dir, 1)
        self._screen.title("The artist downloads what the task left")
        self._get_outputs(local_root, output_dir)
        self._session(root, output_dir, 2)
        self._virtual_session(output_dir)
        self._screen.title("The artist submits the same files again: the store has their content")
        self._submit(root, output_dir, "submit again")
        return self._result

    def _measure(self, root: Path) -> None:
        sizes = [found.size for found in walk(root)]
        if not sizes:
            raise JobInvalidError(
                f"{root} has no files that could be submitted",
                hint="give a directory with some to --input; links that lead out of it count as"
                " none",
            )
        self._result.input = os.fspath(root)
        self._result.files, self._result.bytes = len(sizes), sum(sizes)
        free = shutil.disk_usage(self._directory).free
        if self._result.bytes * _SPACE_FACTOR > free:
            raise NoSpaceError(
                f"{self._directory}: the demonstration needs {_SPACE_FACTOR} times the input,"
                f" {self._result.bytes * _SPACE_FACTOR} bytes, and {free} are free",
                hint="give a smaller --input, or set TMPDIR to a directory on a larger disk",
            )
        self._screen.say(
            f"The job's input is {root}: {len(sizes)} files, {format_bytes(self._result.bytes)}."
        )

    def _submit(self, root: Path, output_dir: str, title: str) -> None:
        output = self._propmaster(
            title, "submit", self._shown(root), *_IN_STORE, "--output-dir", output_dir
        )
        moved = next(
            event for event in output.events if event["event"] == events.TRANSFER_COMPLETED
        )
        output.step.files = self._result.files
        output.step.bytes_moved = moved["bytes_uploaded"]
        output.step.bytes_saved = moved["bytes_reused"]
        job = {"farmId": FARM, "queueId": QUEUE, "jobId": JOB, **output.document}
        (self._directory / "job.json").write_text(json.dumps(job, indent=2))
        self._tell(output.step, "uploaded", "in the store already")
        self._tell_skipped(output.events)

    def _session(self, root: Path, output_dir: str, number: int) -> Path:
        """Run a session with one task, and return its local root, which the first one keeps."""
        session = ["--session-dir", f"session-{number}"]
        again = " again" if number > 1 else ""
        self._screen.title(
            "A worker starts a session: the inputs come from the store, each verified by its hash"
            if number == 1
            else "The worker starts another session of the job: the inputs come from its cache"
        )
        output = self._propmaster(
            f"session start{again}", "session", "start", *session, "--job", "job.json"
        )
        started = output.document["roots"][0]
        output.step.files = started["files"]
        output.step.bytes_moved = started["bytesFetched"]
        output.step.bytes_saved = started["bytesReused"]
        self._tell(output.step, "fetched", "in the cache already")
        local_root = Path(started["localRoot"])
        self._result.inputs_identical = compare(root, local_root)
        self._screen.say(f"  {self._result.inputs_identical} files are identical to the input.")
        if number > 1:
            self._screen.say(f"  A task that reads one file in {_EVERY}, to compare with later:")
            self._run_part(local_root, Path(_PART_COPIED))
        self._task(local_root, output_dir, number)
        self._finish_task(session, number)
        if number > 1:
            self._screen.title("The worker ends its sessions: their files go, the cache stays")
            for session_dir in ("session-1", "session-2"):
                self._propmaster("session end", "session", "end", "--session-dir", session_dir)
        return local_root

    def _task(self, local_root: Path, output_dir: str, number: int) -> None:
        self._screen.title(
            "The task runs: here a program that reads all inputs, and writes a report and a picture"
            if number == 1
            else "The task runs again, and writes the same bytes again"
        )
        where = self._shown(local_root)
        words = ["-m", "agent_plugin.cli.demo_task", where, f"{where}/{output_dir}"]
        output = self._run("task" + " again" * (number > 1), ["python", *words], words)
        output.step.files = self._result.files

    def _finish_task(self, session: Sequence[str], number: int) -> None:
        self._screen.title(
            "The worker stores what the task left: found by comparison, content first, manifest"
            " last"
            if number == 1
            else "The worker stores what the task left: its content is in the store already"
            if number == 2  # noqa: PLR2004 - the second session
            else "The worker stores what the task left: only what was written is looked at"
        )
        ids = ["--step-id", STEP, "--task-id", f"{TASK}-{number}"]
        output = self._propmaster(
            ("finish-task", "finish-task again", "finish-task VIRTUAL")[number - 1],
            *("session", "finish-task", *session, *ids),
            *("--session-action-id", f"{ACTION}-{number}"),
        )
        output.step.files = output.document["files"]
        output.step.bytes_moved = output.document["bytesUploaded"]
        output.step.bytes_saved = output.document["bytesReused"]
        self._tell(output.step, "uploaded", "in the store already")

    def _virtual_session(self, output_dir: str) -> None:
        """Run a session of the job with an empty cache, and a task that needs a part of it."""
        self._screen.title(
            "A worker with an empty cache starts the job VIRTUAL: what a task reads comes when it"
            " is read"
        )
        copied = next(step for step in self._result.steps if step.title == "session start")
        used = self._environment
        self._environment = {**used, CACHE_VARIABLE: os.fspath(self._directory / "cache-2")}
        session = ["--session-dir", "session-3"]
        output = self._propmaster(
            "session start VIRTUAL",
            *("session", "start", *session, "--job", "job.json", "--file-system", "VIRTUAL"),
        )
        [started] = output.document["roots"]
        self._result.virtual = virtual = Mounted(
            started["fileSystem"],
            started["reason"],
            output.step.seconds,
            copied.seconds,
            started["bytesFetched"],
            copied.bytes_moved,
        )
        local_root = Path(started["localRoot"])
        output.step.files, output.step.bytes_moved = started["files"], started["bytesFetched"]
        self._tell(output.step, "fetched", "in the cache already")
        if virtual.file_system == VIRTUAL:
            self._screen.title(f"A task reads one file in {_EVERY}: nothing else moves")
        else:
            self._screen.say(f"  This host can not mount: {virtual.reason}. It was copied.")
        step = self._run_part(local_root, local_root / output_dir)
        if virtual.file_system == VIRTUAL:
            virtual.bytes_moved = step.bytes_moved = self._fetched(local_root)
            self._tell(step, "fetched", "in the cache already")
        virtual.outputs_identical = self._compare_part(local_root / output_dir)
        self._screen.say(
            f"  {virtual.outputs_identical} outputs are identical to those of a copied session."
        )
        self._finish_task(session, 3)
        self._propmaster("session end", "session", "end", *session)
        self._environment = used

    def _run_part(self, inputs: Path, outputs: Path) -> Step:
        where = [self._shown(inputs), self._shown(outputs), str(_EVERY)]
        words = ["-m", "agent_plugin.cli.demo_task", *where]
        step = self._run(f"task, 1 file in {_EVERY}", ["python", *words], words).step
        step.files = -(-self._result.files // _EVERY)
        return step

    def _fetched(self, local_root: Path) -> int:
        control = _mounts_below(self._directory).control_of(local_root)
        status = json.loads(ask_mount(control, {"ask": "status"}))
        count: int = status["counts"]["bytes_fetched"]
        return count

    def _compare_part(self, outputs: Path) -> int:
        expected = self._directory / _PART_COPIED
        names = sorted(path.name for path in expected.iterdir())
        for name in names:
            if (expected / name).read_bytes() != (outputs / name).read_bytes():
                raise BlobCorruptError(
                    f"{outputs}/{name} is not what a copied session has",
                    hint="this is a defect of propmaster",
                )
        return len(names)

    def _get_outputs(self, local_root: Path, output_dir: str) -> None:
        output = self._propmaster(
            "outputs get", "outputs", "get", JOB, *_IN_STORE, "--to", "downloaded"
        )
        got = output.document
        output.step.files = got["files"]
        output.step.bytes_moved = got["bytesFetched"]
        output.step.bytes_saved = got["bytes"] - got["bytesFetched"]
        self._tell(output.step, "fetched", "in the cache already")
        compared = compare(local_root, self._directory / "downloaded", (output_dir,))
        self._result.outputs_identical = compared
        self._screen.say(f"  {compared} files are identical to what the task wrote.")

    def _propmaster(self, title: str, *words: str) -> _Output:
        return self._run(title, ["propmaster", *words], ["-m", "agent_plugin", *words, "--json"])

    def _run(self, title: str, shown: Sequence[str], arguments: Sequence[str]) -> _Output:
        """Run a command of this Python, and return what it printed.

        Raises:
            PropmasterError: It failed.
        """
        self._screen.command(shown)
        begun = time.monotonic()
        done = subprocess.run(  # noqa: S603 - our own argv, no shell
            [sys.executable, *arguments],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        if done.returncode:
            print(done.stderr.decode(errors="backslashreplace"), end="", file=sys.stderr)
            raise PropmasterError(
                f"`{shlex.join(shown)}` exited with {done.returncode}",
                hint="what it said stands above; `propmaster doctor` tells what this host can do",
            )
        step = Step(title, shlex.join(shown), round(time.monotonic() - begun, 3))
        self._result.steps.append(step)
        document = json.loads(done.stdout) if shown[0] == "propmaster" else None
        if document is None:
            self._screen.say(f"  {done.stdout.decode(errors='backslashreplace').strip()}")
        lines = done.stderr.splitlines()
        return _Output(step, document, [json.loads(line) for line in lines if line[:1] == b"{"])

    def _tell(self, step: Step, moved: str, saved: str) -> None:
        parts = [f"{format_bytes(step.bytes_moved)} {moved}"]
        if step.bytes_saved:
            parts.append(f"{format_bytes(step.bytes_saved)} {saved}")
        self._screen.say(f"  {step.files} files: {', '.join(parts)}; {step.seconds:.1f} s.")

    def _tell_skipped(self, logged: Sequence[Mapping[str, Any]]) -> None:
        skipped = [event for event in logged if event["event"] == events.FILE_SKIPPED]
        for event in skipped[:_SKIPPED_SHOWN]:
            path, reason = escaped(event["path"]), escaped(event["reason"])
            self._screen.say(f"  skipped {path}: {reason}", "yellow")
        if len(skipped) > _SKIPPED_SHOWN:
            self._screen.say(f"  and {len(skipped) - _SKIPPED_SHOWN} more like it", "yellow")

    def _shown(self, path: Path) -> str:
        if path.is_relative_to(self._directory):
            return os.fspath(path.relative_to(self._directory))
        return os.fspath(path)


def compare(expected: Path, actual: Path, directories: Sequence[str] = (".",)) -> int:
    """Return how many files are below `expected`; each is in `actual` with these bytes and time.

    Raises:
        BlobCorruptError: One is not; names it.
    """
    compared = 0
    with Root(expected) as wanted, Root(actual) as arrived:
        for found in walk(expected, directories):
            if not _is_same(wanted, arrived, found.path):
                raise BlobCorruptError(
                    f"{actual}/{found.path} is not what {expected}/{found.path} is",
                    hint="if nothing changed the input meanwhile, this is a defect of propmaster",
                )
            compared += 1
    return compared


def _is_same(wanted: Root, arrived: Root, path: str) -> bool:
    with ExitStack() as opened:
        first = wanted.open_file(path)
        opened.callback(os.close, first)
        try:
            second = arrived.open_file(path)
        except FileNotFoundError:
            return False
        opened.callback(os.close, second)
        return _is_same_content(first, second) and (
            os.fstat(first).st_mtime_ns // 1000 == os.fstat(second).st_mtime_ns // 1000
        )


def _is_same_content(first: int, second: int) -> bool:
    for offset in count(0, _COMPARED_BYTES):
        chunk = os.pread(first, _COMPARED_BYTES, offset)
        if chunk != os.pread(second, _COMPARED_BYTES, offset):
            return False
        if not chunk:
            break
    return True


@contextmanager
def _directory(*, keep: bool) -> Iterator[Path]:
    try:
        directory = Path(tempfile.mkdtemp(prefix="propmaster-demo-")).resolve()
    except OSError as error:
        raise local_write_error(error, tempfile.gettempdir()) from error
    try:
        yield directory
    finally:
        _end_mounts(directory)
        if not keep:
            shutil.rmtree(directory)


def _mounts_below(directory: Path) -> Mounts:
    return open_mounts(load(directory / _SETTINGS, environment={}))


def _end_mounts(directory: Path) -> None:
    """End what a demonstration that was stopped has left mounted."""
    for spec in (directory / "state" / "mounts").glob("*/spec.json"):
        with suppress(PropmasterError):
            _mounts_below(directory).end(Path(read_spec(spec).mountpoint))


def _write_environment(directory: Path, store: DemoStore) -> dict[str, str]:
    """Return the commands' environment, and write down what differs from the user's."""
    settings = directory / _SETTINGS
    paths = {"cache_dir": directory / "cache", "state_dir": directory / "state"}
    lines = [f"{key} = {json.dumps(os.fspath(path))}\n" for key, path in paths.items()]
    settings.write_text("[paths]\n" + "".join(lines))
    own = {
        **store.environment,
        "AWS_CONFIG_FILE": os.fspath(directory / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": os.fspath(directory / "no-aws-credentials"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        "PROPMASTER_CONFIG": os.fspath(settings),
    }
    foreign = [
        name
        for name in os.environ
        if name.startswith(("AWS_", "PROPMASTER_")) or name.lower().endswith("_proxy")
    ]
    kept = directory / "environment"
    kept.touch(mode=0o600)
    kept.write_text(
        "".join(f"unset {name}\n" for name in foreign)
        + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in own.items())
    )
    return {name: value for name, value in os.environ.items() if name not in foreign} | own


def _copy_standard_library(target: Path) -> Path:
    library = sysconfig.get_paths()["stdlib"]
    shutil.copytree(library, target, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    return target


def _unused_name(root: Path) -> str:
    names = ("report" if number == 1 else f"report-{number}" for number in count(1))
    return next(name for name in names if not os.path.lexists(root / name))
