"""Copies of the real worker agent's package to install to, and what a whole tree of files is."""

import hashlib
import os
import shutil
import stat
import venv
from pathlib import Path
from typing import NamedTuple

from tests.servers.deadline_peers import AGENT_PYTHON, PeerFailedError

_PACKAGES = ("deadline_worker_agent", "deadline_cloud_worker_agent-*.dist-info")
SCRIPTS = "deadline_worker_agent/sessions/actions/scripts"


class PathFacts(NamedTuple):
    """All that is to be as it was before; `content` is a hash, or where a link leads."""

    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: str


class AgentCopy:
    """An environment that has the agent's package as pip installed it, and nothing that it needs.

    Attributes:
        python: Its Python.
        site: Its directory of packages.
        scripts: The agent's scripts.
    """

    def __init__(self, directory: Path) -> None:
        venv.create(directory, with_pip=False, symlinks=True)
        self.python = directory / "bin" / "python"
        [self.site] = directory.glob("lib/python3*/site-packages")
        [peer] = AGENT_PYTHON.parents[1].glob("lib/python3*/site-packages")
        sources = [path for pattern in _PACKAGES for path in peer.glob(pattern)]
        if len(sources) != len(_PACKAGES):
            raise PeerFailedError(f"{peer} has no worker agent: `make peers` makes it")
        for source in sources:
            shutil.copytree(source, self.site / source.name)
        self.scripts = self.site / SCRIPTS

    @property
    def version(self) -> str:
        return self._metadata.parent.name.split("-")[1].removesuffix(".dist")

    def say_version(self, version: str) -> None:
        """Have the environment say that it has another version of the same agent."""
        text = self._metadata.read_text()
        self._metadata.write_text(
            text.replace(f"\nVersion: {self.version}\n", f"\nVersion: {version}\n")
        )

    @property
    def _metadata(self) -> Path:
        [metadata] = self.site.glob("deadline_cloud_worker_agent-*.dist-info/METADATA")
        return metadata


def tree_of(directory: Path) -> dict[str, PathFacts]:
    """Return everything below a directory, and itself, by relative path."""
    return {
        os.fspath(path.relative_to(directory)): _facts(path)
        for path in (directory, *directory.rglob("*"))
    }


def _facts(path: Path) -> PathFacts:
    status = path.lstat()
    content = ""
    if stat.S_ISLNK(status.st_mode):
        content = os.fspath(path.readlink())
    elif stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    owner = (status.st_uid, status.st_gid)
    return PathFacts(status.st_mode, owner, status.st_mtime_ns, content)
