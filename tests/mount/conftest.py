"""A host that mounts: what is stored, mounted, asked, and in the end gone."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.content.mount_spec import Ready
from agent_plugin.content.mount_table import is_mounted, read_mounts, unmount
from agent_plugin.content.open_store import build_store
from agent_plugin.content.store import Cancellation
from agent_plugin.session.mount_control import ask_mount
from agent_plugin.session.mount_request import MountRequest
from tests.mount.stacks import STACKS, Stack
from tests.servers.hooks import Host
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server

# Far above anything measured: 2 s for leavers, 5 s for last readers.
END_SECONDS = 20.0


class Mounter:
    """A host with one store, whose mounts are all below `home`.

    Attributes:
        host: Whose cache and state they use.
        ready: What each mount said of itself, by mount point.
    """

    def __init__(
        self,
        home: Path,
        store_url: str,
        *,
        environment: dict[str, str] | None = None,
        store: Mapping[str, float | str] | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
        transport: str = "auto",
    ) -> None:
        tables = dict(settings or {})
        tables["mounts"] = {"transport": transport, **tables.get("mounts", {})}
        # The kernel's table has no links in it.
        self.home = home.resolve()
        self.host = Host(
            self.home / "host", store_url, environment=environment, store=store, settings=tables
        )
        self.ready: dict[Path, Ready] = {}

    def stored(
        self, source: Path, *, past_the_proxy: S3Server | None = None, without: str = ""
    ) -> Manifest:
        """Store the files of a directory, but for one; return their manifest."""
        environment = past_the_proxy.environment if past_the_proxy else self.host.environment
        store = build_store(self.host.store_url, environment=environment, account_id="")
        entries: list[FileEntry] = []
        known: set[Digest] = set()
        for folder, _, names in os.walk(source):
            for name in names:
                path = Path(folder, name)
                status, data = path.stat(), path.read_bytes()
                digest = Digest.of(data)
                relative = path.relative_to(source).as_posix()
                if data and relative != without and digest not in known:
                    with tempfile.TemporaryFile() as file:
                        file.write(data)
                        file.flush()
                        store.put_file(digest, file.fileno(), cancellation=Cancellation())
                    known.add(digest)
                mtime = status.st_mtime_ns // 1000
                entries.append(FileEntry(digest.hex, mtime, relative, digest.size))
        return Manifest.of(entries)

    def request(self, manifest: Manifest, at: Path, writes: str, owner_pid: int) -> MountRequest:
        work_dir = at.with_name(f"{at.name}-work")
        if writes == "none":
            work_dir = self.host.mounts.work_dir(at)
        return MountRequest(
            manifest=manifest,
            mountpoint=at,
            work_dir=work_dir,
            store_url=self.host.store_url,
            account_id="",
            writes=writes,
            uid=os.geteuid(),
            gid=os.getegid(),
            owner_pid=owner_pid,
        )

    def mount(
        self, manifest: Manifest, *, writes: str = "none", name: str = "mnt", owner_pid: int = 0
    ) -> Path:
        """Mount a manifest; return where."""
        at = self.home / name
        at.mkdir(exist_ok=True)
        self.ready[at] = self.host.mounts.start(
            self.request(manifest, at, writes, owner_pid),
            cancellation=Cancellation(),
            environment=self.host.process_environment(),
        )
        return at

    def manifest_file(self, manifest: Manifest) -> Path:
        path = self.home / "job.manifest"
        path.write_bytes(encode(manifest))
        return path

    def status(self, at: Path) -> dict[str, Any]:
        """Ask the server of a mount."""
        found: dict[str, Any] = json.loads(
            ask_mount(self.host.mounts.control_of(at), {"ask": "status"})
        )
        return found

    def server(self, at: Path) -> int:
        """Return the process id of the server of a mount, 0 while there is none."""
        try:
            pid: int = self.status(at)["pid"]
        except MountFailedError:
            return 0
        return pid

    def kill_server(self, at: Path, number: int = signal.SIGKILL) -> None:
        """Kill the server of a mount, and wait until another one answers."""
        before = self.server(at)
        assert before
        os.kill(before, number)
        until(lambda: self.server(at) not in (0, before))

    def fetched(self, at: Path) -> int:
        """Return how many bytes came from the store."""
        count: int = self.status(at)["counts"]["bytes_fetched"]
        return count

    def errors(self, at: Path) -> list[tuple[str, str]]:
        """Return the paths and codes in the error ledger."""
        return [(error.path, error.code) for error in self.host.mounts.errors(at)]

    def log_of(self, at: Path) -> list[dict[str, Any]]:
        """Return the events that supervisor and server have logged so far."""
        log = Path(self.host.mounts.control_of(at)).with_name("log")
        return [json.loads(line) for line in log.read_text().splitlines() if line[:1] == "{"]

    def processes(self) -> list[int]:
        """Return the supervisors and servers that run for this host."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"vfs" in words and any(os.fsencode(self.home) in word for word in words):
                    found.append(int(process.name))
        return found

    def mounted(self) -> list[str]:
        """Return what is mounted below this host's home."""
        return [m.mountpoint for m in read_mounts() if m.mountpoint.startswith(f"{self.home}/")]

    def assert_nothing_is_left(self) -> None:
        """No mount, no process, and of the state no file."""
        assert self.mounted() == []
        until(lambda: self.processes() == [], seconds=END_SECONDS)
        known = self.host.state_dir / "mounts"
        assert not known.exists() or list(known.iterdir()) == []

    def close(self) -> None:
        """End everything, however it is left; nothing here looks at a mount."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for mountpoint in reversed(self.mounted()):
            with suppress(OSError):
                unmount(Path(mountpoint), lazily=True)
        for ready in self.ready.values():
            # Supervisors are children of this process.
            with suppress(ChildProcessError):
                os.waitpid(ready.pid, 0)
        assert self.mounted() == []


# Of a test that is the same by either way to the kernel.
by_each_transport = pytest.mark.parametrize("transport", ["kernel", "fusepy"])
# The same, where it takes long.
by_each_transport_in_time = pytest.mark.parametrize(
    "transport", ["kernel", pytest.param("fusepy", marks=pytest.mark.slow)]
)


@pytest.fixture
def transport() -> str:
    """Of the mounts; `by_each_transport` has the test run with both."""
    return "kernel"


@pytest.fixture
def mounter(tmp_path: Path, transport: str) -> Iterator[Mounter]:
    """Mounts from a store in a directory."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounter = Mounter(tmp_path, f"file://{tmp_path}/store", transport=transport)
    yield mounter
    mounter.close()


@pytest.fixture(params=["none", "overlayfs", pytest.param("overlay", marks=pytest.mark.slow)])
def writes(request: pytest.FixtureRequest) -> str:
    """What becomes of writing."""
    value: str = request.param
    return value


@pytest.fixture(params=["overlayfs", "overlay"])
def kept_by(request: pytest.FixtureRequest) -> str:
    """What keeps what is written."""
    value: str = request.param
    return value


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(stack, id=str(stack), marks=[pytest.mark.slow] if number else [])
        for number, stack in enumerate(STACKS)
    ],
)
def stack(request: pytest.FixtureRequest) -> Stack:
    """How a writable mount is made; only the first one is in the gate."""
    value: Stack = request.param
    return value


def gone(at: Path) -> bool:
    """Whether nothing is mounted at a path."""
    return not is_mounted(at)


def open_files() -> int:
    """Return how many descriptors this process has, but for sockets, which are the proxy's."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += not os.fspath(fd.readlink()).startswith("socket:")
    return found
