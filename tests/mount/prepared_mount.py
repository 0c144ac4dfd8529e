"""A mount of a small tree whose mount process is another program than ours."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mount.conftest import Mounter
from tests.mount.overlay_rig import MTIME_NS
from tests.servers.hooks import REPOSITORY
from tests.servers.trees import write_files


class Prepared:
    """A mount of a small tree that is about to be made by a changed mount process."""

    def __init__(self, mounter: Mounter, tmp_path: Path, kept: str) -> None:
        source = tmp_path / "source"
        source.mkdir()
        write_files(source, {"a": b"an input", "d/b": 9000}, mtime_ns=MTIME_NS)
        inputs = mounter.stored(source)
        self.at = mounter.mount(inputs, writes=kept)
        place = Path(mounter.host.mounts.control_of(self.at)).parent
        spec = json.loads((place / "spec.json").read_bytes())
        mounter.host.mounts.end(self.at)
        self.control = f"{mounter.home}/control"
        self.errors = mounter.home / "errors"
        self._log = mounter.home / "log"
        self._spec = mounter.home / "spec.json"
        self._environment = mounter.host.process_environment()
        spec |= {"errors": os.fspath(self.errors), "control": self.control}
        spec |= {"workDir": f"{mounter.home}/work"}
        spec["manifests"] = [os.fspath(mounter.manifest_file(inputs))]
        self._spec.write_text(json.dumps(spec))

    @contextmanager
    def begun_by(self, code: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A mount process that may not have mounted yet."""
        with (
            self._log.open("wb") as log,
            subprocess.Popen(
                [sys.executable, "-c", code, self._spec, *arguments],
                cwd=REPOSITORY,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def served_by(self, code: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A mount process whose mount can be used."""
        with self.begun_by(code) as process:
            assert process.stdout
            ready, _, _ = select.select([process.stdout], [], [], 20)
            assert ready, "it hangs"
            assert json.loads(process.stdout.readline())["transport"] == "kernel"
            yield process

    def told(self, event: str) -> int:
        return self._log.read_text().count(f'"{event}"')
