"""The worker agent's part in a mount: it starts the launch script, looks for the mount, unmounts.

As the agent does it: one shell command in which nothing is quoted, in the session directory, with
the session's variables and no others.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.content.mount_table import is_mounted, read_mounts, unmount
from agent_plugin.content.open_store import build_store
from agent_plugin.content.store import Cancellation
from agent_plugin.session.mount_control import ask_mount
from agent_plugin.workers.call import VFS_MOUNT, VFS_UNMOUNT, Call, JobUser, carry_out
from agent_plugin.workers.deadline.vfs import run_mount, run_unmount
from agent_plugin.workers.deadline.vfs_prefix import write_prefix
from tests.servers.hooks import CALL_SECONDS, QUEUE, REPOSITORY, Host
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server

MTIME_US = 1_622_505_600_123_457


class Here(threading.Thread):
    """A mounting call that is carried out in this process.

    Attributes:
        said: The lines for the agent's log.
        code: The exit code, None while it stays.
        cancellation: Ends it.
    """

    def __init__(
        self,
        drop_in: "DropIn",
        arguments: Sequence[str],
        job_user: JobUser | None,
        environment: Mapping[str, str],
    ) -> None:
        super().__init__(daemon=True)
        self.said: list[str] = []
        self.code: int | None = None
        self.cancellation = Cancellation()
        self._settings = drop_in.host.settings
        self._call = Call(
            kind=VFS_MOUNT,
            arguments=arguments,
            session_dir=drop_in.session_dir,
            environment=environment,
            job_user=job_user,
            say=self.said.append,
            cancellation=self.cancellation,
        )

    def run(self) -> None:
        self.code = carry_out(self._call, self._settings, run_mount)

    def ended(self) -> int:
        """Return the exit code when it has one."""
        self.join(CALL_SECONDS)
        assert self.code is not None
        return self.code


class DropIn:
    """A host whose agent finds our `deadline_vfs`, and one session on it.

    Attributes:
        host: Of which the settings are; all of it is below `home`.
        session_dir: The session's.
        root: The local root of the job.
        environment: The session's variables.
    """

    def __init__(self, home: Path, s3: S3Server, root_prefix: str) -> None:
        self.home = home.resolve()
        self.root_prefix = root_prefix
        self.bucket = s3.bucket
        self.host = Host(
            self.home / "host", f"s3://{s3.bucket}/{root_prefix}", environment=s3.environment
        )
        self.session_dir = self.home / "session"
        self.session_dir.mkdir(mode=0o700)
        self.root = self.session_dir / "assetroot-0123456789abcdef0123"
        self.prefix = self.home / "prefix"
        write_prefix(self.prefix, self._python())
        self.environment = {**s3.environment, "DEADLINE_QUEUE_ID": QUEUE}
        self._launched: list[subprocess.Popen[str]] = []
        self._here: list[Here] = []
        self._manifests = 0

    def _python(self) -> Path:
        """Return a Python as that of an installed propmaster: it knows where all is."""
        python = self.home / "python"
        python.write_text(
            "#!/bin/sh\n"
            f"export PYTHONPATH={REPOSITORY} PROPMASTER_CONFIG={self.host.config}\n"
            f'exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        return python

    def stored(self, files: Mapping[str, bytes]) -> Manifest:
        """Store files; return their manifest."""
        store = build_store(self.host.store_url, environment=self.host.environment, account_id="")
        entries = []
        for number, (path, data) in enumerate(files.items()):
            digest = Digest.of(data)
            if data:
                store.put(digest, data)
            entries.append(FileEntry(digest.hex, MTIME_US + number, path, digest.size))
        return Manifest.of(entries)

    def manifest_file(self, manifest: Manifest) -> Path:
        """Write a manifest where the agent does, each time under another name."""
        self._manifests += 1
        directory = self.session_dir / ".vfs_manifests"
        directory.mkdir(exist_ok=True)
        path = directory / f"deadline-merged-manifest-{self._manifests}.json"
        path.write_bytes(encode(manifest))
        return path

    def arguments(self, manifest: Path, root: Path | None = None) -> list[str]:
        """Return what the agent gives the launch script."""
        return [
            str(root or self.root),
            "-f",
            "--clienttype=deadline",
            f"--bucket={self.bucket}",
            f"--manifest={manifest}",
            "--region=us-east-1",
            "-oallow_other",
            f"--casprefix={self.root_prefix}/Data",
            f"--cachedir={self.session_dir}/.vfs_object_cache",
        ]

    def launch(self, arguments: Iterable[str], **more: str) -> "subprocess.Popen[str]":
        """Start the launch script as the agent does."""
        self.root.mkdir(mode=0o777, exist_ok=True)
        script = f"{self.prefix}/scripts/production/al2/run_deadline_vfs_al2.sh"
        process = subprocess.Popen(
            " ".join([script, *arguments]),
            shell=True,
            executable="/bin/bash",
            cwd=self.session_dir,
            env={
                "PATH": f"{self.prefix}/bin/../link:/usr/bin:/bin",
                "LD_LIBRARY_PATH": f"{self.prefix}/lib",
                **self.environment,
                **more,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._launched.append(process)
        return process

    def here(
        self,
        arguments: Sequence[str],
        *,
        job_user: JobUser | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> "Here":
        """Carry out a mount in a thread of this process; wait until it is there or refused."""
        self.root.mkdir(mode=0o777, exist_ok=True)
        here = Here(self, arguments, job_user, environment or self.environment)
        self._here.append(here)
        here.start()
        until(lambda: bool(here.said) or here.code is not None)
        return here

    def unmount_here(self, *, job_user: JobUser | None = None) -> int:
        """Carry out an unmount in this process; return the exit code."""
        call = Call(
            VFS_UNMOUNT, ["-u", str(self.root)], self.session_dir, {}, job_user, print,
            Cancellation(),
        )  # fmt: skip
        return carry_out(call, self.host.settings, run_unmount)

    def new_session(self, name: str) -> None:
        """Begin another session of this host."""
        self.session_dir = self.home / name
        self.session_dir.mkdir(mode=0o700)
        self.root = self.session_dir / self.root.name

    def mount(self, manifest: Manifest, **more: str) -> "subprocess.Popen[str]":
        """Have a manifest mounted; return the launch script, which stays."""
        process = self.launch(self.arguments(self.manifest_file(manifest)), **more)
        until(lambda: is_mounted(self.root) or process.poll() is not None)
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        return process

    def unmount(self) -> "subprocess.CompletedProcess[str]":
        """Unmount as the agent does: from anywhere, and without the session's variables."""
        return subprocess.run(
            [f"{self.prefix}/bin/../link/fusermount3", "-u", self.root],
            cwd="/",
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=CALL_SECONDS,
            check=False,
        )

    def is_found(self) -> bool:
        """Whether the agent finds the mount."""
        done = subprocess.run(["findmnt", self.root], capture_output=True, check=False)
        return done.returncode == 0

    def processes(self) -> list[int]:
        """Return what runs for this host and this session."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.fsencode(self.home) in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found

    def status(self) -> dict[str, Any]:
        """Ask the server of the mount."""
        asked = ask_mount(self.host.mounts.control_of(self.root), {"ask": "status"})
        found: dict[str, Any] = json.loads(asked)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._launched:
            process.communicate()
        for here in self._here:
            here.join(CALL_SECONDS)
        for mount in reversed(read_mounts()):
            if mount.mountpoint.startswith(f"{self.home}/"):
                with suppress(OSError):
                    unmount(Path(mount.mountpoint), lazily=True)
        shutil.rmtree(self.session_dir, ignore_errors=True)
