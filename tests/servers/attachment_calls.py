"""What the worker agent does around its attachment scripts, with propmaster's drop-ins as these.

The agent's part (local roots, local manifests, the JSON files, what becomes of the lines) is played
as deadline-cloud-worker-agent 0.33 does it. A drop-in runs in this process, through the runner that
its own processes use, so that a test can look at what is shared; as a process of its own it is what
tests/e2e/test_same_as_worker_scripts.py runs.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from agent_plugin.content.digest import hash_name
from agent_plugin.content.manifest import Manifest, decode, encode, merge
from agent_plugin.content.store import Cancellation
from agent_plugin.session.finish_task import TaskAction
from agent_plugin.session.job import JobDocument, ManifestProperties
from agent_plugin.session.manifests import find_outputs
from agent_plugin.session.roots import session_directory_name
from agent_plugin.workers.call import (
    ATTACHMENT_DOWNLOAD,
    ATTACHMENT_UPLOAD,
    Call,
    JobUser,
    Run,
    carry_out,
)
from agent_plugin.workers.deadline import attachment_download, attachment_upload
from tests.servers.hooks import Host

RUNS: dict[str, Run] = {
    ATTACHMENT_DOWNLOAD: attachment_download.run,
    ATTACHMENT_UPLOAD: attachment_upload.run,
}
DIRECTIVE = re.compile(r"^(openjd_[a-z_]+|ja_snapshot|ja_upload): (.+)$")


@dataclass
class Said:
    """What a call printed, and the code that it ended with."""

    lines: list[str] = field(default_factory=list)
    exit_code: int = -1

    def told(self, word: str) -> list[str]:
        """Return what the lines of one directive say."""
        found = [DIRECTIVE.match(line) for line in self.lines]
        return [match[2] for match in found if match and match[1] == word]

    @property
    def plain(self) -> list[str]:
        """The lines that are no directives."""
        return [line for line in self.lines if not DIRECTIVE.match(line)]

    @property
    def snapshots(self) -> list[dict[str, str]]:
        return [json.loads(text) for text in self.told("ja_snapshot")]

    @property
    def uploads(self) -> list[dict[str, str]]:
        return [upload for text in self.told("ja_upload") for upload in json.loads(text)]


class AgentSession:
    """A session of the agent on a host, of a job.

    Args:
        host: The host; its store is the queue's.
        job: The job, with the rules that map its roots.
        directory: The session directory; made.
        job_user: Whose the files are to be.
        known_as: The session directory as the agent spells it.
    """

    def __init__(
        self,
        host: Host,
        job: JobDocument,
        directory: Path,
        *,
        job_user: JobUser | None = None,
        known_as: Path | None = None,
    ) -> None:
        self.host = host
        self.job = job
        self.directory = directory
        self.job_user = job_user
        if not directory.exists():
            directory.mkdir(parents=True)
            if job_user is not None:
                os.chown(directory, -1, job_user.gid)
            directory.chmod(0o700 if job_user is None else 0o770)
        known = known_as or directory
        rules = {rule.source_path: rule.destination_path for rule in job.path_mapping_rules}
        # By local root, as the agent keeps them: of two manifests with one root the last.
        self.roots: dict[str, dict[str, Any]] = {}
        for properties in job.attachments.manifests:
            local = os.fspath(known / session_directory_name(properties.root_path))
            if properties.file_system_location_name is not None:
                local = rules.get(properties.root_path, local)
            self.roots[local] = {
                "manifestProperties": msgspec.to_builtins(properties),
                "localManifestPaths": [],
                "localRootPath": local,
                "localInputManifestPath": None,
            }

    def root(self, index: int = 0) -> Path:
        """Return a local root."""
        return Path([*self.roots][index])

    # ------------------------------------------------------------------------ what the agent does

    def sync_job(self, **changes: Any) -> Said:
        """Write the input manifests and have the job's inputs brought in."""
        groups: dict[str, list[Manifest]] = {}
        with self.host.services() as context:
            store = context.open_store()
            for properties in self.job.attachments.manifests:
                if properties.input_manifest_path:
                    document = store.get_document(properties.input_manifest_path, max_bytes=1 << 26)
                    manifest = decode(document.data, source=properties.input_manifest_path)
                    groups.setdefault(self._local_of(properties), []).append(manifest)
        return self.bring_in(groups, "job", **changes)

    def sync_step(self, *steps: str, **changes: Any) -> Said:
        """Write what steps have left and have it brought in."""
        groups: dict[str, list[Manifest]] = {}
        with self.host.services() as context:
            for step_id in steps:
                for output in find_outputs(context, self.job, step_id=step_id):
                    local = next(
                        root["localRootPath"]
                        for root in self.roots.values()
                        if root["manifestProperties"]["rootPath"] == output.root_path
                    )
                    groups.setdefault(local, []).append(output.manifest)
        return self.bring_in(groups, "step", **changes)

    def bring_in(
        self, groups: Mapping[str, Sequence[Manifest]], suffix: str, **changes: Any
    ) -> Said:
        """Write manifests by their local roots, and have them brought in."""
        wanted = []
        for local, manifests in groups.items():
            root = self.roots[local]
            name = f"{hash_name(root['manifestProperties']['rootPath'])}_{suffix}"
            path = self.directory / "manifests" / name
            path.parent.mkdir(exist_ok=True)
            merged = merge(manifests)
            assert merged is not None
            path.write_bytes(encode(merged))
            root["localManifestPaths"].append(os.fspath(path))
            root["localInputManifestPath"] = os.fspath(path)
            wanted.append(root)
        return self.call(ATTACHMENT_DOWNLOAD, wanted, {}, **changes)

    def finish(self, action: TaskAction, **changes: Any) -> Said:
        """Have uploaded what a task has left, and take note of what is said of it."""
        environment = {
            "DEADLINE_STEP_ID": action.step_id,
            "DEADLINE_SESSIONACTION_ID": action.session_action_id,
            "DEADLINE_SESSIONACTION_START_TIME": str(action.started_at),
        }
        if action.task_id is not None:
            environment["DEADLINE_TASK_ID"] = action.task_id
        said = self.call(ATTACHMENT_UPLOAD, [*self.roots.values()], environment, **changes)
        for snapshot in said.snapshots:
            self.roots[snapshot["root"]]["localManifestPaths"].append(snapshot["manifest"])
        return said

    @contextmanager
    def as_if_never_asked(self) -> Iterator[None]:
        """Have the state know nothing of what is done meanwhile: the agent's own scripts did it."""
        with self.host.state(self.directory) as state_file:
            before = state_file.read()
        yield
        assert before is not None
        with self.host.state(self.directory) as state_file:
            state_file.write(before)

    def rename_last_snapshot(self) -> None:
        """Give the last manifest that an upload has left a name of the agent's own script."""
        [root] = self.roots.values()
        path = self.directory / root["localManifestPaths"][-1]
        path = path.rename(path.with_name("output-0123-2026-11-26T06-00-00.manifest"))
        root["localManifestPaths"][-1] = os.fspath(path.relative_to(self.directory))

    def call(
        self,
        kind: str,
        roots: object,
        environment: Mapping[str, str],
        *,
        arguments: Sequence[str] | None = None,
        cancellation: Cancellation | None = None,
        say: Callable[[str], None] = lambda _line: None,
        variables: Mapping[str, str] | None = None,
    ) -> Said:
        """Run a drop-in with a file of roots; `variables` come after those that the agent sets."""
        if arguments is None:
            arguments = ["-s3", self.job.store_url, "-wp", os.fspath(self.write(roots))]
        said = Said()

        def take(line: str) -> None:
            said.lines.append(line)
            say(line)

        call = Call(
            kind=kind,
            arguments=arguments,
            session_dir=self.directory,
            environment={
                "DEADLINE_FARM_ID": self.job.farm_id,
                "DEADLINE_QUEUE_ID": self.job.queue_id,
                "DEADLINE_JOB_ID": self.job.job_id,
                # Known, so that nobody asks STS.
                "AWS_ACCOUNT_ID": "000000000000",
                **self.host.environment,
                **environment,
                **(variables or {}),
            },
            job_user=self.job_user,
            say=take,
            cancellation=cancellation or Cancellation(),
        )
        said.exit_code = carry_out(call, self.host.settings, RUNS[kind])
        return said

    def write(self, roots: object) -> Path:
        """Write a file of roots as the agent does, readable for the job's user."""
        folder = self.directory / "embedded_files1"
        folder.mkdir(exist_ok=True)
        path = folder / f"roots-{len([*folder.iterdir()])}"
        path.write_text(json.dumps(roots, indent=2))
        if self.job_user is not None:
            os.chown(path, -1, self.job_user.gid)
        path.chmod(0o640)
        return path

    def _local_of(self, properties: ManifestProperties) -> str:
        rules = {rule.source_path: rule.destination_path for rule in self.job.path_mapping_rules}
        if properties.file_system_location_name is not None and rules:
            return rules[properties.root_path]
        name = session_directory_name(properties.root_path)
        return next(local for local in self.roots if Path(local).name == name)
