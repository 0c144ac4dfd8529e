"""A job of one root and its sessions, for tests to walk through."""

from pathlib import Path

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import Manifest, decode
from agent_plugin.session.job import JobDocument
from agent_plugin.session.state import FinishResult
from tests.servers.hooks import Host, action, job_of
from tests.servers.trees import write_files

MTIME_NS = 1_622_505_600_123_457_000
INPUTS: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "tex/wood.tx": 5000,
    "tex/copy of wood.tx": 5000,
    ".hidden/.rc": b"dots",
    "empty": b"",
    b"latin-\xe9/\xff": b"not UTF-8",
    "renders/reference.exr": b"an input in an output directory",
}


class Sessions:
    """A job of one root whose sessions a test walks through."""

    def __init__(self, tmp_path: Path, host: Host) -> None:
        self.tmp_path = tmp_path
        self.host = host
        self.source = tmp_path / "source"
        self.session_dir = tmp_path / "sessions" / "session-1"

    def submitted(
        self,
        files: dict[str | bytes, bytes | int] | None = None,
        *output_directories: str,
        root: str = "source",
        **changes: object,
    ) -> JobDocument:
        source = self.tmp_path / root
        write_files(source, files or dict(INPUTS), mtime_ns=MTIME_NS)
        result, _ = self.host.submit(source, output_directories=output_directories or ("renders",))
        return job_of(result, **changes)

    def started(self, job: JobDocument) -> Path:
        """Start the session and return its first local root."""
        return Path(self.host.start(job, self.session_dir).roots[0].local_root)

    def finish(self, number: int = 0, *, failed: bool = False) -> FinishResult:
        run = action(1, number, started_at=1_700_000_000.0 + number)
        return self.host.finish_task(self.session_dir, run, failed=failed)

    def outputs(self) -> dict[str, str]:
        """Return what a reader finds: by path the hash."""
        return {
            entry.path: entry.hash for root in self.host.outputs().roots for entry in root.files
        }


def hash_of(data: bytes) -> str:
    return Digest.of(data).hex


def manifest_at(host: Host, path: str) -> Manifest:
    with host.services() as context:
        data = context.open_store().get_document(path, max_bytes=1 << 20).data
    return decode(data, source=path)


def paths_of(host: Host, result: FinishResult) -> list[list[str]]:
    """Return the paths in each output manifest, parallel to the job's manifests."""
    return [
        [entry.path for entry in manifest_at(host, found.output_manifest_path).entries]
        if found.output_manifest_path
        else []
        for found in result.manifests
    ]
