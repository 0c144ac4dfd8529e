"""A worker's host on which propmaster mounts: its service runs, and its prefix is written."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from agent_plugin.workers.deadline.vfs_prefix import write_prefix
from tests.servers.hooks import CALL_SECONDS
from tests.servers.worker_host import WorkerHost

_NUMBERS: Final = count()


@dataclass(frozen=True)
class MountingHost:
    """What `mounting_host` has made.

    Attributes:
        prefix: Where the agent finds `deadline_vfs`.
        config, python: The settings, and a Python that knows them.
        state_dir: The service's.
        log: What the service has written.
    """

    prefix: Path
    config: Path
    python: Path
    state_dir: Path
    log: Path

    def known_mounts(self) -> list[str]:
        """Return the mounts that the service has and has not ended."""
        mounts = self.state_dir / "mounts"
        return [path.name for path in mounts.iterdir()] if mounts.exists() else []


@contextmanager
def mounting_host(
    host: WorkerHost,
    endpoints: Mapping[str, str],
    *,
    user: str = "root",
    within: tuple[str, ...] = (),
) -> Iterator[MountingHost]:
    """Run the host service, and write a prefix.

    Args:
        host: The worker.
        endpoints: Where the service finds the store.
        user: Whom the service runs as: root, or the agent's user.
        within: A command that runs the service, in another namespace for instance.
    """
    home = host.directory / f"vfs-service-{next(_NUMBERS)}"
    private, run = home / "private", home / "run"
    for directory in (home, private, run):
        directory.mkdir(mode=0o755)
    config = home / "config.toml"
    tables = {
        "paths": {"cache_dir": str(private / "cache"), "state_dir": str(private / "state")},
        "worker": {"socket": str(run / "worker.socket"), "agent_user": host.agent},
    }
    config.write_text(
        "".join(
            f"[{name}]\n"
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
            for name, table in tables.items()
        )
    )
    python = home / "python"
    python.write_text(
        f'#!/bin/sh\nPROPMASTER_CONFIG={config} exec {host.own_python()} "$@"\n', encoding="utf-8"
    )
    python.chmod(0o755)
    prefix = home / "deadline_vfs"
    write_prefix(prefix, python)
    if user != "root":
        subprocess.run(["chown", f"{user}:{user}", private, run], check=True)
    private.chmod(0o700)
    log = home / "service.log"
    with log.open("wb") as written:
        service = subprocess.Popen(
            [*within, *host.argv_as(user, [python, "-P", "-m", "agent_plugin", "worker", "serve"])],
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(home), **endpoints},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=written,
        )
    try:
        assert service.stdout is not None
        assert service.stdout.readline().startswith(b"ready"), log.read_text()
        yield MountingHost(prefix, config, python, private / "state", log)
    finally:
        service.terminate()
        service.wait(CALL_SECONDS)
        assert service.stdout is not None
        service.stdout.close()
