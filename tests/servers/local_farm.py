"""A job in a directory store, and hosts to start it on, wherever their directories are."""

from pathlib import Path

from agent_plugin.session.job import JobDocument
from tests.servers.hooks import Host, job_of
from tests.servers.trees import files_below, write_files

FILES: dict[str | bytes, bytes | int] = {f"tex/{at}.tx": 30_000 + at for at in range(20)}
LARGE: dict[str | bytes, bytes | int] = {"big.abc": 9_000_000}


class Farm:
    """A job in a directory store, and hosts to start it on."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.store_url = f"file://{tmp_path}/store"
        self.source = tmp_path / "source"

    def submit(self, files: dict[str | bytes, bytes | int]) -> JobDocument:
        write_files(self.source, files, mtime_ns=1_600_000_000 * 10**9)
        submitter = Host(self.tmp_path / "submitter", self.store_url)
        return job_of(submitter.submit(self.source, output_directories=["renders"])[0])

    def host(self, home: Path | None = None, **paths: Path) -> Host:
        """Return a fresh host; `cache_dir` and `state_dir` may be somewhere else."""
        home = home or self.tmp_path / "worker"
        settings = {
            "paths": {
                "cache_dir": str(paths.get("cache_dir", home / "cache")),
                "state_dir": str(paths.get("state_dir", home / "state")),
            }
        }
        host = Host(home, self.store_url, settings=settings)
        host.cache_dir = Path(settings["paths"]["cache_dir"])
        host.state_dir = Path(settings["paths"]["state_dir"])
        return host

    def assert_starts(self, host: Host, job: JobDocument, session: str = "session") -> Path:
        root = Path(host.start(job, self.tmp_path / session).roots[0].local_root)
        assert files_below(root) == files_below(self.source)
        return root
