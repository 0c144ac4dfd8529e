"""What the agent tells its attachment scripts: arguments, variables, and a JSON file of roots.

The arguments and the file come from whoever makes the call, a job's user perhaps, and so may say
anything. They are read with that user's rights, from the session directory only; what they name is
checked here, or is below the session directory and opened as everything there is.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Final, NoReturn
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from agent_plugin import schema
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    JobInvalidError,
    LocalReadError,
    PathMappingError,
    UnsafePathError,
)
from agent_plugin.content.manifest import MAX_MANIFEST_BYTES, Manifest, decode, merge
from agent_plugin.content.owner import Owner, acting
from agent_plugin.content.safe_path import Root
from agent_plugin.session.finish_task import TaskAction
from agent_plugin.session.job import JobDocument, ManifestProperties, check_id
from agent_plugin.session.roots import LAST_SECOND, session_directory_name

# Each task of a session adds the path of a manifest to each root.
MAX_PROPERTIES_BYTES: Final = 64 * 1024 * 1024
# How the agent names the local copy of what other steps left, and of the job's own inputs.
OF_STEPS: Final = "_step"
OF_JOB: Final = "_job"

_Path = Annotated[str, Meta(min_length=1, max_length=4096)]


class _Element(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """One root of the file, as the agent (0.29 to 0.33) writes it."""

    manifest_properties: ManifestProperties
    local_root_path: _Path
    local_manifest_paths: tuple[_Path, ...] = ()
    local_input_manifest_path: _Path | None = None


class _File(msgspec.Struct, frozen=True):
    """The file's list, so that what is wrong has a name."""

    roots: Annotated[tuple[_Element, ...], Meta(max_length=10)]


@dataclass(frozen=True, slots=True)
class WorkerRoot:
    """A root of the session, as the agent has it.

    Attributes:
        properties: The job's manifest.
        shown: The local root in the agent's spelling, by which it knows the root.
        local_root: The same as the session has it.
        manifests: The agent's local manifests, those merged later win: paths that it wrote down.
        input_manifest: The one of them that is to be brought in now, if any.
    """

    properties: ManifestProperties
    shown: str
    local_root: Path
    manifests: tuple[str, ...]
    input_manifest: str | None

    @property
    def brings_step_outputs(self) -> bool:
        """Whether what is to be brought in is what other steps have left."""
        return self.input_manifest is not None and self.input_manifest.endswith(OF_STEPS)


@dataclass(frozen=True, slots=True)
class Arguments:
    """A script's command line.

    Attributes:
        bucket, root_prefix: Where the queue keeps its attachments.
        properties: Path of the file with the roots.
    """

    bucket: str
    root_prefix: str
    properties: str


class SessionDirectory:
    """The directory that a call is about, read with the rights of whose files are in it.

    Args:
        path: The directory, absolute.
        owner: Whose its files are; None: this process's user.
    """

    def __init__(self, path: Path, owner: Owner | None) -> None:
        self.path = path
        self._owner = owner

    def read(self, named: str, *, most: int) -> bytes:
        """Return the content of a file in it.

        Args:
            named: Its path, absolute or relative to the directory.
            most: Bytes that it may have.

        Raises:
            UnsafePathError: It is not in the directory.
            LocalReadError: It is not there, or may not be read.
            JobInvalidError: It is larger.
        """
        with self._open(named) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise JobInvalidError(f"{named}: more than {most} bytes")
        return data

    def mark(self, named: str) -> str:
        """Return by what a file in it is told from another one that has had its name.

        Raises:
            UnsafePathError, LocalReadError: As for `read`.
        """
        with self._open(named) as file:
            status = os.fstat(file.fileno())
        return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"

    def read_manifests(self, paths: Sequence[str]) -> Manifest | None:
        """Return manifests as one, later ones winning, and each where it is named last.

        Raises:
            ManifestInvalidError: One is none.
            UnsafePathError, LocalReadError, JobInvalidError: As for `read`.
        """
        return merge(
            [
                decode(self.read(path, most=MAX_MANIFEST_BYTES), source=path)
                for path in reversed(dict.fromkeys(reversed(paths)))
            ]
        )

    def _open(self, named: str) -> BinaryIO:
        relative = self._relative(named)
        try:
            with Root(self.path, owner=self._owner) as opened:
                return os.fdopen(opened.open_file(relative), "rb")
        except FileNotFoundError as error:
            raise LocalReadError(f"{named}: there is no such file") from error

    def _relative(self, named: str) -> str:
        if "\0" in named:
            raise UnsafePathError(f"{named!r} has a NUL character")
        if not named.startswith("/"):
            return named
        with acting(self._owner):
            # The agent may know the directory by another name: links lead to it, or above it.
            base = os.path.realpath(self.path)
            path = Path(os.path.realpath(os.path.dirname(named)), os.path.basename(named))  # noqa: PTH119, PTH120 - may end in anything
        if not path.is_relative_to(base):
            raise UnsafePathError(
                f"{named} is not in the session directory {self.path}",
                hint="the agent keeps what it tells its scripts in there",
            )
        return os.fspath(path.relative_to(base))


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Return what a script's command line says.

    Raises:
        JobInvalidError: An argument is missing, unknown, or no S3 address.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, prog="attachments")
    parser.add_argument("-s3", "--s3-uri", required=True)
    parser.add_argument("-wp", "--worker-properties", required=True)
    parsed = parser.parse_args(list(arguments))
    try:
        address = urlsplit(parsed.s3_uri)
    except ValueError as error:
        raise JobInvalidError(f"-s3 {parsed.s3_uri!r}: {error}") from error
    bucket, prefix = address.netloc, address.path[1:]
    if address.scheme != "s3" or not bucket or not prefix or address.query or address.fragment:
        raise JobInvalidError(
            f"-s3 {parsed.s3_uri!r} is no address of a queue's attachments",
            hint="its form is s3://bucket/root-prefix",
        )
    return Arguments(bucket, prefix, parsed.worker_properties)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise JobInvalidError(
            f"command line: {message}",
            hint="the agent calls its scripts with -s3 s3://bucket/root-prefix -wp FILE",
        )


def read_roots(directory: SessionDirectory, named: str) -> list[WorkerRoot]:
    """Return the roots that the file of a call lists; one that is listed twice once.

    Raises:
        JobInvalidError: It breaks its schema, names the key; or two roots are one directory.
        PathMappingError: A root is not where this session has it.
        UnsafePathError, LocalReadError: The file, or a local root, is not where it may be.
    """
    data = directory.read(named, most=MAX_PROPERTIES_BYTES)
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise JobInvalidError(f"{named}: not a JSON document: {error}") from error
    if not isinstance(document, list):
        raise JobInvalidError(f"{named}: not a list of roots")
    file = schema.conform({"roots": document}, _File, source=named, failure=JobInvalidError)
    roots: dict[Path, WorkerRoot] = {}
    for element in file.roots:
        root = _root_of(element, directory.path)
        if (same := roots.setdefault(root.local_root, root)) != root:
            raise JobInvalidError(
                f"{named}: {root.shown} is the local root of both {same.properties.root_path!r}"
                f" and {root.properties.root_path!r}",
                hint="the agent lists each local root once",
            )
    return list(roots.values())


def _root_of(element: _Element, session_dir: Path) -> WorkerRoot:
    shown, properties = element.local_root_path, element.manifest_properties
    local = Path(shown)
    if not local.is_absolute() or os.path.normpath(shown) != shown or "\0" in shown:
        raise UnsafePathError(
            f"local root {shown!r} is no absolute path without `.` and `..`",
            hint="the agent writes them so",
        )
    if os.path.realpath(local.parent) == os.path.realpath(session_dir):
        expected = session_directory_name(properties.root_path)
        if local.name != expected:
            raise PathMappingError(
                f"the local root of {properties.root_path!r} is {shown}, and not {expected}",
                hint="this version of the agent names its directories otherwise; propmaster does"
                " not know it",
            )
        local = session_dir / expected
    elif properties.file_system_location_name is None:
        raise PathMappingError(
            f"the local root of {properties.root_path!r} is {shown}, outside of the session"
            " directory, and the root has no file system location",
            hint="only roots of a storage profile's locations are mapped",
        )
    return WorkerRoot(
        properties=properties,
        shown=shown,
        local_root=local,
        manifests=element.local_manifest_paths,
        input_manifest=element.local_input_manifest_path,
    )


def job_of(
    roots: Sequence[WorkerRoot],
    arguments: Arguments,
    environment: Mapping[str, str],
    session_dir: Path,
) -> JobDocument:
    """Return the job that a call is about, as far as the call tells.

    Raises:
        JobInvalidError: A variable is missing, or something breaks the job's rules.
    """
    mapped = [root for root in roots if root.local_root.parent != session_dir]
    document = {
        "farmId": variable(environment, "DEADLINE_FARM_ID"),
        "queueId": variable(environment, "DEADLINE_QUEUE_ID"),
        "jobId": variable(environment, "DEADLINE_JOB_ID"),
        "jobAttachmentSettings": {
            "s3BucketName": arguments.bucket,
            "rootPrefix": arguments.root_prefix,
        },
        "attachments": {"manifests": [msgspec.to_builtins(root.properties) for root in roots]},
        "pathMappingRules": [
            {
                "sourcePathFormat": root.properties.root_path_format,
                "sourcePath": root.properties.root_path,
                "destinationPath": os.fspath(root.local_root),
            }
            # With any rule, each root with a location has to have one.
            for root in (roots if mapped else ())
            if root.properties.file_system_location_name is not None
        ],
    }
    return JobDocument.decode(json.dumps(document).encode("ascii"), "the call")


def given_inputs(roots: Sequence[WorkerRoot], directory: SessionDirectory) -> dict[int, Manifest]:
    """Return what the agent's copies of input manifests hold, where they are not the job's own.

    Where two of a job's manifests share a directory, the agent tells of the last one, and merges
    all of them into its copy. A copy that is the job's own manifest is not looked into: that one is
    fetched by its key, and compared with its hash.

    Raises:
        ManifestInvalidError: One is none.
        UnsafePathError, LocalReadError, JobInvalidError: As for `SessionDirectory.read`.
    """
    given = {}
    for index, root in enumerate(roots):
        if root.input_manifest is None:
            continue
        data = directory.read(root.input_manifest, most=MAX_MANIFEST_BYTES)
        if Digest.of(data).hex != root.properties.input_manifest_hash:
            given[index] = decode(data, source=root.input_manifest)
    return given


def task_action(environment: Mapping[str, str]) -> TaskAction:
    """Return the session action that a call is about.

    Raises:
        JobInvalidError: A variable is missing, or is not what it has to be.
    """
    # Of a chunk of tasks there is none.
    task_id = environment.get("DEADLINE_TASK_ID") or None
    return TaskAction(
        step_id=check_id(variable(environment, "DEADLINE_STEP_ID"), "step"),
        task_id=task_id and check_id(task_id, "task"),
        session_action_id=check_id(
            variable(environment, "DEADLINE_SESSIONACTION_ID"), "sessionaction"
        ),
        started_at=_seconds(environment, "DEADLINE_SESSIONACTION_START_TIME"),
    )


def variable(environment: Mapping[str, str], name: str) -> str:
    """Return what a variable says.

    Raises:
        JobInvalidError: It is not set.
    """
    value = environment.get(name, "")
    if not value:
        raise JobInvalidError(f"{name} is not set", hint="the agent sets it for its scripts")
    return value


def _seconds(environment: Mapping[str, str], name: str) -> float:
    text = variable(environment, name)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LAST_SECOND:
        raise JobInvalidError(f"{name} is {text!r}, no time", hint="seconds since the epoch")
    return value
