"""Real mounts by libfuse through fusepy: its traps, and what becomes of a mount that dies.

What is the same by either transport is in test_kernel_mount.py, run by each.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path

import pytest

from agent_plugin.content.errors import MountFailedError, MountReadFailedError
from agent_plugin.content.layout import blob_key
from agent_plugin.content.manifest import Manifest
from agent_plugin.content.mount_table import is_mounted, unmount
from agent_plugin.session.mount_control import ask_mount
from tests.mount import failing_server
from tests.mount.conftest import END_SECONDS, Mounter, by_each_transport
from tests.mount.failing_server import FAILURES
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.hooks import REPOSITORY, Host
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.sessions import Sessions
from tests.servers.trees import files_below, write_files

FILES: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "tex/wood.tx": 5_000_001,
    b"latin-\xe9/\xff.tx": b"not UTF-8",
    **{f"shots/{at:02}/plate.exr": 3000 + at for at in range(20)},
}


@pytest.fixture
def transport() -> str:
    return "fusepy"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_files(source, FILES, mtime_ns=1_600_000_000_000_000_000)
    return source


@pytest.fixture
def inputs(mounter: Mounter, source: Path) -> Manifest:
    return mounter.stored(source)


# ------------------------------------------------------------------ fusepy's traps


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount whose content fails in each way."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    at = tmp_path_factory.mktemp("failing")
    server = subprocess.Popen(
        [sys.executable, "-m", failing_server.__name__, at],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        yield at
    finally:
        server.kill()
        server.communicate()
        if is_mounted(at):
            unmount(at, lazily=True)


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_of_any_kind_is_an_input_output_error(failing: Path, how: str) -> None:
    """Without our `_wrapper` fusepy answers with garbage, EINVAL, or by ending the mount."""
    for ask in ((failing / how).read_bytes, (failing / f"stat {how}").stat):
        with pytest.raises(OSError, match="Input/output error"):
            ask()
    assert (failing / "well").read_bytes() == failing_server.CONTENT


@by_each_transport
def test_a_blob_that_is_cut_short_is_an_error_and_never_shortens_a_file(
    mounter: Mounter, inputs: Manifest, source: Path
) -> None:
    at = mounter.mount(inputs)
    file = at / "tex/wood.tx"
    right = (source / "tex/wood.tx").read_bytes()
    assert file.read_bytes() == right
    [blob] = [
        p for p in mounter.host.cache_dir.rglob("*") if p.is_file() and _size(p) == len(right)
    ]
    os.truncate(blob, 1_000_000)
    # It would be fetched anew.
    [digest] = {entry.digest for entry in inputs.entries if entry.path == "tex/wood.tx"}
    (mounter.home / "store" / blob_key(digest)).unlink()
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match="Input/output error"):
            _read_on(opened)
    assert file.stat().st_size == len(right)
    assert [path for path, _ in mounter.errors(at)] == ["tex/wood.tx"]


def _read_on(opened: FileIO) -> None:
    while opened.read(1 << 20):
        pass


def _size(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize(
    "by",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_server_is_not_the_end_of_the_mount(
    mounter: Mounter, inputs: Manifest, by: int
) -> None:
    """libfuse, left alone, ends the mount by each of them."""
    at = mounter.mount(inputs)
    server = mounter.status(at)["pid"]
    os.kill(server, by)
    os.kill(server, by)
    assert (at / "scene.usd").read_bytes() == b"#usda 1.0\n"
    assert mounter.status(at)["pid"] == server


@pytest.fixture
def slow(
    tmp_path: Path, s3: S3Server, s3_prefix: str, fault_proxy: FaultProxy
) -> Iterator[Mounter]:
    """Mounts from the S3 server, behind the proxy."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    environment = s3.environment_at(fault_proxy.url)
    mounter = Mounter(
        tmp_path,
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=environment,
        transport="fusepy",
    )
    yield mounter
    mounter.close()


def is_waiting(pid: int, command: str) -> bool:
    """Whether a process has become that command and sleeps; source: proc_pid_stat(5)."""
    name, state = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].split(") ", 1)
    return name == command and state[0] in "DS"


def test_opening_waits_for_no_store_and_a_reader_that_waits_can_be_killed(
    slow: Mounter, source: Path, s3: S3Server, fault_proxy: FaultProxy
) -> None:
    at = slow.mount(slow.stored(source, past_the_proxy=s3))
    stall = fault_proxy.inject(Fault.STALL)
    with (at / "tex/wood.tx").open("rb"):
        assert os.listdir(at / "shots")  # noqa: PTH208 - names
    assert stall.hits == 0
    for end in (signal.SIGKILL, signal.SIGINT):
        # Whoever runs the tests in the background has SIGINT ignored, and so have its children.
        command = ["env", "--default-signal=INT", "cat", f"{at}/tex/wood.tx"]
        reader = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            until(lambda: stall.hits >= 1)
            until(partial(is_waiting, reader.pid, "cat"))
            reader.send_signal(end)
            reader.wait(20)
        finally:
            reader.kill()
            reader.wait()


def test_a_missing_libfuse_is_said_and_breaks_nothing_else(
    mounter: Mounter, inputs: Manifest
) -> None:
    host, at = mounter.host, mounter.home / "mnt"
    host.environment["FUSE_LIBRARY_PATH"] = "/no/such/libfuse.so.2"
    command: list[str | Path] = [
        "mount",
        mounter.manifest_file(inputs),
        at,
        "--store",
        host.store_url,
    ]

    refused = host.run(*command, "--transport", "fusepy")
    assert refused.returncode == MountFailedError.exit_code
    assert "libfuse2" in refused.stderr
    assert "Traceback" not in refused.stderr
    mounter.assert_nothing_is_left()
    # By the other transport nothing of it is needed.
    assert host.run(*command, "--transport", "auto").returncode == 0
    assert (at / "scene.usd").read_bytes() == b"#usda 1.0\n"


# ------------------------------------------------------------------ which transport, and why


@pytest.mark.parametrize("wished", ["auto", "fusepy", "kernel"])
def test_a_mount_says_by_which_transport_it_is_and_why(
    mounter: Mounter, inputs: Manifest, wished: str
) -> None:
    host, at = mounter.host, mounter.home / "mnt"
    manifest = mounter.manifest_file(inputs)
    done = host.run(
        "mount", manifest, at, "--store", host.store_url, "--transport", wished, "--json"
    )
    assert done.returncode == 0, done.stderr
    ready = json.loads(done.stdout)
    chosen = "fusepy" if wished == "fusepy" else "kernel"
    why = "it is the faster one" if wished == "auto" else "it was asked for"
    assert ready["transport"] == chosen
    assert why in ready["reason"]
    status = mounter.status(at)
    assert status["transport"] == chosen
    assert why in status["reason"]
    [started] = [event for event in mounter.log_of(at) if event["event"] == "mount.started"]
    assert (started["transport"], why in started["reason"]) == (chosen, True)


def test_a_kernel_whose_protocol_is_too_old_is_mounted_by_libfuse(
    mounter: Mounter, inputs: Manifest, source: Path
) -> None:
    at = mounter.home / "mnt"
    mounter.mount(inputs).is_dir()
    place = Path(mounter.host.mounts.control_of(at)).parent
    spec = json.loads((place / "spec.json").read_bytes())
    mounter.host.mounts.end(at)
    for name in ("errors", "control"):
        spec[name] = f"{mounter.home}/{name}"
    (mounter.home / "job.manifest").write_bytes(mounter.manifest_file(inputs).read_bytes())
    spec["manifests"] = [f"{mounter.home}/job.manifest"]
    spec["workDir"] = f"{mounter.home}/work"
    path = mounter.home / "spec.json"
    code = (
        "import sys\n"
        "from vfs.transports import kernel_protocol\n"
        "kernel_protocol.OLDEST_MINOR = 1000\n"
        "from vfs.__main__ import main\n"
        "sys.exit(main([sys.argv[1]]))\n"
    )
    for wished, chosen in (("auto", "fusepy"), ("kernel", "")):
        path.write_text(json.dumps({**spec, "transport": wished}))
        with subprocess.Popen(
            [sys.executable, "-c", code, path],
            cwd=REPOSITORY,
            env=mounter.host.process_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            if chosen:
                ready = json.loads(line)
                assert ready["transport"] == chosen
                assert "too old" in ready["reason"]
                assert files_below(at) == files_below(source)
                process.terminate()
            told = process.communicate(timeout=END_SECONDS)[1]
        if not chosen:
            assert (line, process.returncode) == ("", MountFailedError.exit_code)
            assert "too old" in told
        assert not is_mounted(at)


# ------------------------------------------------------------------ a server that dies


def _kill_server(mounter: Mounter, at: Path, *, deaths: int) -> None:
    """Kill the server; tell how long it took until the mount was back."""
    begun = time.monotonic()
    os.kill(mounter.status(at)["pid"], signal.SIGKILL)
    until(lambda: len(_events(mounter, at, "mount.remade")) == deaths, seconds=20)
    assert (at / "scene.usd").read_bytes() == b"#usda 1.0\n"
    print(f"back after {time.monotonic() - begun:.3f} s")


class Tries:
    """Something that is done again and again beside a mount that dies.

    Attributes:
        done: How often it went well.
        refused: The errors by which it did not.
    """

    def __init__(self, do: Callable[[int], object]) -> None:
        self.done: list[int] = []
        self.refused: set[int | None] = set()
        self._do = do
        self._halt = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._future = self._thread.submit(self._run)

    def _run(self) -> None:
        number = 0
        while not self._halt.is_set():
            number += 1
            try:
                self._do(number)
            except OSError as error:
                self.refused.add(error.errno)
            else:
                self.done.append(number)

    def end(self) -> None:
        self._halt.set()
        self._thread.shutdown()
        self._future.result(20)


# What a mount without a server answers: never that something is missing.
DEAD = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}


def test_a_mount_that_died_is_back_and_nothing_seemed_to_be_missing(
    mounter: Mounter, inputs: Manifest, source: Path
) -> None:
    """Seen to fail when the dead mount is taken away before the next one is there."""
    at = mounter.mount(inputs)
    right = (source / "tex/wood.tx").read_bytes()

    def read(_number: int) -> None:
        assert (at / "tex/wood.tx").read_bytes() == right

    readers = [Tries(read), Tries(lambda _: (at / "shots/07/plate.exr").stat())]
    try:
        for deaths in (1, 2, 3):
            _kill_server(mounter, at, deaths=deaths)
    finally:
        for reader in readers:
            reader.end()

    for reader in readers:
        assert reader.done
        assert reader.refused <= DEAD
    assert files_below(at) == files_below(source)
    assert mounter.errors(at) == [(".", "E_MOUNT")] * 3
    assert len(_events(mounter, at, "mount.server_died")) == 3
    assert mounter.host.mounts.end(at)
    mounter.assert_nothing_is_left()


def test_what_was_written_outlives_a_mount_that_died(
    mounter: Mounter, inputs: Manifest, source: Path
) -> None:
    """Seen to fail when the dead mount is taken away before the next one is there."""
    at = mounter.mount(inputs, writes="overlayfs")
    upper = mounter.home / "mnt-work/upper"
    (at / "before").write_bytes(b"written before")
    (at / "shots/03").rename(at / "renamed")
    (at / "scene.usd").chmod(0o600)
    (at / "shots/04/plate.exr").unlink()
    writer = Tries(lambda number: (at / f"new-{number}").write_bytes(b"%d" % number))
    try:
        for deaths in (1, 2, 3):
            _kill_server(mounter, at, deaths=deaths)
    finally:
        writer.end()

    assert writer.done
    assert writer.refused <= DEAD
    for number in writer.done:
        assert (at / f"new-{number}").read_bytes() == b"%d" % number
        assert (upper / f"new-{number}").is_file()
    assert (at / "before").read_bytes() == b"written before"
    assert files_below(at / "renamed") == files_below(source / "shots/03")
    assert files_below(at / "tex") == files_below(source / "tex")
    assert (at / "scene.usd").stat().st_mode & 0o777 == 0o600
    assert not (at / "shots/04/plate.exr").exists()
    assert mounter.host.mounts.end(at)
    assert list(at.iterdir()) == [], "nothing was written to what is below"
    mounter.assert_nothing_is_left()


def _events(mounter: Mounter, at: Path, name: str) -> list[object]:
    return [event for event in mounter.log_of(at) if event["event"] == name]


def test_a_server_that_dies_again_and_again_is_not_replaced_for_ever(
    mounter: Mounter, inputs: Manifest
) -> None:
    at = mounter.mount(inputs, writes="overlayfs")
    for _ in range(11):
        server = mounter.status(at)["pid"]
        os.kill(server, signal.SIGKILL)
        until(lambda: _next_server(mounter, at, server), seconds=20)  # noqa: B023 - within
        if not mounter.host.mounts.is_served(at):
            break
    until(lambda: mounter.processes() == [], seconds=END_SECONDS)
    assert mounter.mounted() == []


def _next_server(mounter: Mounter, at: Path, before: int) -> bool:
    """Whether another server answers, or none will any more."""
    if not mounter.processes():
        return True
    try:
        return bool(mounter.status(at)["pid"] != before)
    except MountFailedError:
        return False


def test_a_task_whose_mount_died_has_failed_and_can_run_again(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    settings = {"mounts": {"transport": "fusepy"}}
    host = Host(tmp_path / "host", f"file://{tmp_path}/store", settings=settings)
    sessions = Sessions(tmp_path, host)
    job = sessions.submitted(dict(FILES), "renders")
    [root] = host.start(job, sessions.session_dir, file_system="VIRTUAL").roots
    at = Path(root.local_root)
    try:
        status = json.loads(ask_mount(host.mounts.control_of(at), {"ask": "status"}))
        assert (root.file_system, status["transport"]) == ("VIRTUAL", "fusepy")
        (at / "renders").mkdir()
        (at / "renders/1.exr").write_bytes(b"pixels")
        os.kill(status["pid"], signal.SIGKILL)
        until(lambda: _is_read(at / "scene.usd"), seconds=20)

        with pytest.raises(MountReadFailedError, match="server died"):
            sessions.finish()
        assert sessions.finish(1).files == 1
    finally:
        host.end(sessions.session_dir)


def _is_read(path: Path) -> bool:
    try:
        return path.read_bytes() != b""
    except OSError as error:
        if error.errno not in DEAD:
            raise
        return False
