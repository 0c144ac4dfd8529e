"""The worker agent's environment: its version, its attachment scripts, and which of them we know.

The environment's own Python is asked, isolated from whoever asks, and nothing of the agent is
imported: the answer stands in what pip wrote when it installed the agent.
"""

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent_plugin.content.errors import AgentUnsupportedError, LocalReadError

DOWNLOAD: Final = "attachment_download.py"
UPLOAD: Final = "attachment_upload.py"
SCRIPTS: Final = (DOWNLOAD, UPLOAD)

# SHA-256 of the scripts as pip installs them from the packages of these versions.
_DOWNLOAD_SHA256: Final = "4f7d6d60b9dee72108fc928cf860fcda84073428c1d4d4344072c84d61265077"
_UPLOAD_SHA256_0_29_0: Final = "d9917e651bf30e48f7b1607e8e3f640ad43f784e065d6a99ca85582832327c92"
_UPLOAD_SHA256: Final = "b9c9e6720df4a6488da0dc67ebe86fdfff2da19d0620b6b9797609feb14c7a34"
_VERSIONS: Final = (
    *("0.29.1", "0.29.2", "0.30.0", "0.30.1", "0.30.2", "0.31.0", "0.31.1", "0.32.0"),
    *("0.33.0", "0.33.1", "0.33.2", "0.33.3", "0.33.4", "0.33.5", "0.33.6"),
)
KNOWN_SHA256: Final = {
    "0.29.0": {DOWNLOAD: _DOWNLOAD_SHA256, UPLOAD: _UPLOAD_SHA256_0_29_0},
    **{each: {DOWNLOAD: _DOWNLOAD_SHA256, UPLOAD: _UPLOAD_SHA256} for each in _VERSIONS},
}
SUPPORTED: Final = "0.29.0 to 0.33.6"

_QUESTION: Final = """
import json, os, sysconfig
from importlib import metadata
try:
    agent = metadata.distribution("deadline-cloud-worker-agent")
except metadata.PackageNotFoundError:
    version, where = "", sysconfig.get_path("purelib")
else:
    version, where = agent.version, str(agent.locate_file(""))
scripts = os.path.join(where, "deadline_worker_agent/sessions/actions/scripts")
print(json.dumps([version, scripts]))
"""
# A Python starts in 0.1 s; from a network file system that sleeps it may take long.
_ANSWER_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class AgentEnvironment:
    """Where a worker agent is installed.

    Attributes:
        python: Its environment's Python, not resolved: in a virtual environment it is a link.
        version: Of deadline-cloud-worker-agent; empty when it is not installed there.
        scripts: The directory of its attachment scripts.
    """

    python: Path
    version: str
    scripts: Path

    @property
    def supported(self) -> bool:
        """Whether propmaster was made for this version."""
        return self.version in KNOWN_SHA256

    def knows(self, name: str, sha256: str) -> bool:
        """Whether that is what this version's script `name` has to be."""
        return KNOWN_SHA256.get(self.version, {}).get(name) == sha256

    def require_supported(self) -> None:
        """Refuse a version that propmaster was not made for.

        Raises:
            AgentUnsupportedError: Naming the version and those that are supported.
        """
        if not self.version:
            raise AgentUnsupportedError(
                f"there is no deadline-cloud-worker-agent in the environment of {self.python}",
                hint="give the Python of the agent's own environment to --agent-python",
            )
        if not self.supported:
            raise AgentUnsupportedError(
                f"deadline-cloud-worker-agent {self.version} ({self.python}) is not supported",
                hint=f"supported are {SUPPORTED}; the agent goes on with its own scripts",
            )


def find_agent(python: Path) -> AgentEnvironment:
    """Ask a Python which worker agent its environment has.

    Raises:
        LocalReadError: It can not be run.
        AgentUnsupportedError: It did not answer, so it is no Python, or a broken one.
    """
    python = Path(os.path.abspath(python))  # noqa: PTH100 - resolve() would leave the environment
    try:
        done = subprocess.run(  # noqa: S603 - what the operator named, no shell
            # -B: the agent's environment is not ours to leave bytecode in.
            [python, "-I", "-B", "-c", _QUESTION],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except OSError as error:
        raise LocalReadError(
            f"{python} can not be run: {error.strerror}",
            hint="give the Python of the agent's environment: bin/python beside its"
            " bin/deadline-worker-agent",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise AgentUnsupportedError(
            f"{python} gave no answer in {_ANSWER_SECONDS:.0f} s", hint="see whether it starts"
        ) from error
    try:
        version, scripts = json.loads(done.stdout)
    except ValueError as error:
        told = done.stderr.decode(errors="replace").strip().splitlines()
        raise AgentUnsupportedError(
            f"{python} could not tell which worker agent it has: {told[-1] if told else 'nothing'}",
            hint="a Python 3.9 or newer is meant, the one that the agent runs with",
        ) from error
    return AgentEnvironment(python, str(version), Path(str(scripts)))


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of some bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()
