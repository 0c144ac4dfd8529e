"""The job document: what `session start` is told about a job, as the Deadline Cloud API says it.

Everything in it was written by others; once decoded it has passed the rules here. Limits are those
of the service model (botocore, deadline 2023-10-12):
https://docs.aws.amazon.com/deadline-cloud/latest/APIReference/API_ManifestProperties.html
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Final, Literal, Self

import msgspec
from msgspec import Meta

from agent_plugin import schema
from agent_plugin.content.errors import JobInvalidError
from agent_plugin.publish.spec import Publishers, spelled
from agent_plugin.publish.spec import defects as publisher_defects
from agent_plugin.sources.spec import InputSource, decode_sources

MAX_JOB_BYTES: Final = 16 * 1024 * 1024

_HEX: Final = "[0-9a-f]{32}"
_NUMBER: Final = "(0|[1-9][0-9]{0,9})"
# `\Z` and not `$`, which would let a final newline pass.
_ID_PATTERNS: Final = {
    "farm": rf"^farm-{_HEX}\Z",
    "queue": rf"^queue-{_HEX}\Z",
    "job": rf"^job-{_HEX}\Z",
    "step": rf"^step-{_HEX}\Z",
    "task": rf"^task-{_HEX}-{_NUMBER}\Z",
    "sessionaction": rf"^sessionaction-{_HEX}-{_NUMBER}\Z",
}

IdKind = Literal["farm", "queue", "job", "step", "task", "sessionaction"]
FileSystem = Literal["COPIED", "VIRTUAL"]
PathFormat = Literal["posix", "windows"]

_FarmId = Annotated[str, Meta(pattern=_ID_PATTERNS["farm"])]
_QueueId = Annotated[str, Meta(pattern=_ID_PATTERNS["queue"])]
_JobId = Annotated[str, Meta(pattern=_ID_PATTERNS["job"])]
_StepId = Annotated[str, Meta(pattern=_ID_PATTERNS["step"])]
_Path = Annotated[str, Meta(min_length=1, max_length=1024)]

_STORE_URL: Final = re.compile(r"file:///.+|s3://[^/]+/.+", re.DOTALL)
_NOT_YET: Final = ("artifacts",)


def check_id(value: str, kind: IdKind) -> str:
    """Return an id of the service, checked; keys in the store are made of them.

    Raises:
        JobInvalidError: It has not the form of its kind, `job-` and 32 hex digits for example.
    """
    if not re.match(_ID_PATTERNS[kind], value):
        raise JobInvalidError(f"{value!r} is not a {kind} id", hint=f"its form is {_form(kind)}")
    return value


def _form(kind: IdKind) -> str:
    example = f"{kind}-0123456789abcdef0123456789abcdef"
    if kind in ("task", "sessionaction"):
        return f"`{kind}-`, 32 hexadecimal digits in lower case, `-` and a number: {example}-0"
    return f"`{kind}-` and 32 hexadecimal digits in lower case: {example}"


class JobAttachmentSettings(
    msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True
):
    """Where the queue keeps its attachments.

    Attributes:
        s3_bucket_name: The bucket.
        root_prefix: Prefix of all keys, joined to them with one `/` as it is.
    """

    s3_bucket_name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,255}\Z")]
    root_prefix: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_/-]{1,63}\Z")]


class ManifestProperties(
    msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True
):
    """One asset root of the job.

    Attributes:
        root_path: The root in the submitter's spelling; an identity, not a path of this host.
        root_path_format: Whose path rules `root_path` and the output directories follow.
        input_manifest_path: Key below `Manifests/`; None when the root has only outputs.
        input_manifest_hash: xxh128 of the input manifest's bytes, 32 hex digits, if known.
        output_relative_directories: Below the root, in the submitter's spelling.
        file_system_location_name: The submitter's storage profile location, if the root is in one.
    """

    root_path: _Path
    root_path_format: PathFormat
    input_manifest_path: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    input_manifest_hash: Annotated[str, Meta(pattern=rf"^{_HEX}\Z")] | None = None
    output_relative_directories: Annotated[tuple[_Path, ...], Meta(max_length=100)] = ()
    file_system_location_name: Annotated[str, Meta(pattern=r"^[0-9A-Za-z ]{1,64}\Z")] | None = None

    @property
    def output_directories(self) -> tuple[str, ...]:
        """The output directories as paths of this host: relative, `/` separated, "." the root."""
        return tuple(
            _parse(directory, self.root_path_format).as_posix()
            for directory in self.output_relative_directories
        )


class Attachments(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The job's asset roots, and how its inputs get to the session directory."""

    manifests: Annotated[tuple[ManifestProperties, ...], Meta(max_length=10)]
    file_system: FileSystem = "COPIED"


class PathMappingRule(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """What stands at `source_path` on the submitter's host is at `destination_path` on this one."""

    source_path_format: PathFormat
    source_path: Annotated[str, Meta(min_length=1)]
    destination_path: Annotated[str, Meta(min_length=1)]


class JobDocument(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """A job as `session start` reads it; `decode` makes one.

    Attributes:
        farm_id, queue_id, job_id: Ids of the service.
        attachments: The job's asset roots.
        job_attachment_settings: Where the queue keeps attachments; or else `store` says it.
        store: URL of the store, `file:///dir` or `s3://bucket/prefix`.
        path_mapping_rules: The queue's rules, first match first.
        step_dependencies: For each step the steps whose outputs it needs, in their order.
        input_sources: Objects of any bucket that come to directories of their own.
        publishers: Where tasks' outputs are published, besides the store.
        artifacts: Reserved; empty in this version.
    """

    farm_id: _FarmId
    queue_id: _QueueId
    job_id: _JobId
    attachments: Attachments
    job_attachment_settings: JobAttachmentSettings | None = None
    store: str | None = None
    path_mapping_rules: tuple[PathMappingRule, ...] = ()
    step_dependencies: dict[_StepId, tuple[_StepId, ...]] = {}
    input_sources: tuple[InputSource, ...] = ()
    publishers: Publishers = ()
    artifacts: dict[str, Any] = {}

    @classmethod
    def decode(cls, data: bytes, source: str) -> Self:
        """Return the job that a JSON document describes.

        Args:
            data: The document, at most MAX_JOB_BYTES.
            source: What to call it in messages, its file name for example.

        Raises:
            JobInvalidError: It breaks the schema; names `source`, the key's path and the reason,
                and says in the hint what is allowed.
            PlaceholderUnknownError: A publisher's key names a placeholder that there is not.
        """
        if len(data) > MAX_JOB_BYTES:
            raise JobInvalidError(f"{source}: {len(data)} bytes, more than {MAX_JOB_BYTES}")
        try:
            document = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise JobInvalidError(f"{source}: not a JSON document: {error}") from error
        if isinstance(document, dict) and "publishers" in document:
            document["publishers"] = spelled(document["publishers"])
        # Their names count in any case, which the schema of a document can not say.
        sources = document.pop("inputSources", []) if isinstance(document, dict) else []
        job = schema.conform(document, cls, source=source, failure=JobInvalidError)
        decoded = decode_sources(sources, source=source, failure=JobInvalidError)
        job = msgspec.structs.replace(job, input_sources=decoded)
        defect = next(_defects(job), None)
        if defect is not None:
            key, reason, hint = defect
            raise JobInvalidError(f"{source}: {key}: {reason}", hint=hint)
        return job

    @property
    def store_url(self) -> str:
        """The store's URL, `s3://<bucket>/<root prefix as it is>` or what `store` says."""
        settings = self.job_attachment_settings
        if settings is not None:
            return f"s3://{settings.s3_bucket_name}/{settings.root_prefix}"
        return self.store or ""


def with_sources(job: JobDocument, further: Sequence[InputSource]) -> JobDocument:
    """Return a job with further input sources, as if its document had them.

    Raises:
        JobInvalidError: They are too many, or two want one target.
    """
    if not further:
        return job
    documents = msgspec.to_builtins([*job.input_sources, *further])
    sources = decode_sources(documents, source="the job with --input", failure=JobInvalidError)
    return msgspec.structs.replace(job, input_sources=sources)


_Defect = tuple[str, str, str]


def _defects(job: JobDocument) -> Iterator[_Defect]:
    yield from _store_defects(job)
    seen: dict[tuple[str | None, str], int] = {}
    for index, manifest in enumerate(job.attachments.manifests):
        key = f"attachments.manifests[{index}]"
        identity = (manifest.file_system_location_name, manifest.root_path)
        if (first := seen.setdefault(identity, index)) != index:
            yield (
                f"{key}.rootPath",
                f"{manifest.root_path!r} is also the rootPath of manifests[{first}]",
                "within one file system location, give each root once",
            )
        yield from _manifest_defects(key, manifest)
    for index, rule in enumerate(job.path_mapping_rules):
        for name, path in (
            ("sourcePath", rule.source_path),
            ("destinationPath", rule.destination_path),
        ):
            if "\0" in path:
                yield f"pathMappingRules[{index}].{name}", "it has a NUL character", ""
    for step, dependencies in job.step_dependencies.items():
        if step in dependencies:
            yield (
                f"stepDependencies.{step}",
                "the step would depend on itself",
                "name the steps whose outputs it needs",
            )
    yield from publisher_defects(job.publishers, "publishers")
    for field in _NOT_YET:
        if getattr(job, field):
            key = msgspec.structs.fields(job)[job.__struct_fields__.index(field)].encode_name
            yield key, "not supported by this version", "leave it empty"


def _store_defects(job: JobDocument) -> Iterator[_Defect]:
    settings = job.job_attachment_settings
    either = "give either jobAttachmentSettings or store"
    if settings is not None and job.store is not None:
        yield "store", "there is jobAttachmentSettings as well", either
    if settings is None and job.store is None:
        yield "jobAttachmentSettings", "missing, and so is store", either
    if job.store is not None and not _STORE_URL.fullmatch(job.store):
        yield "store", f"{job.store!r} is no store", "allowed: file:///dir or s3://bucket/prefix"
    if settings is None:
        prefix, key = (job.store or "").partition("://")[2].partition("/")[2], "store"
        if not (job.store or "").startswith("s3://"):
            return
    else:
        prefix, key = settings.root_prefix, "jobAttachmentSettings.rootPrefix"
    for word in ("task-", "step-"):
        if word in prefix:
            yield (
                key,
                f"{prefix!r} holds {word!r}, by which readers recognise the keys of outputs",
                "use another prefix",
            )


def _manifest_defects(key: str, manifest: ManifestProperties) -> Iterator[_Defect]:
    if "\0" in manifest.root_path:
        yield f"{key}.rootPath", "it has a NUL character", ""
    path = manifest.input_manifest_path
    if path is not None and (set(path.split("/")) & {"", ".", ".."} or "\0" in path):
        yield (
            f"{key}.inputManifestPath",
            f"{path!r} is not a key below Manifests/",
            "give it without a leading slash, empty components, `.` and `..`",
        )
    if manifest.input_manifest_hash is not None and path is None:
        yield f"{key}.inputManifestHash", "there is no inputManifestPath", ""
    for index, directory in enumerate(manifest.output_relative_directories):
        parsed = _parse(directory, manifest.root_path_format)
        if parsed.anchor or ".." in parsed.parts or "\0" in directory:
            yield (
                f"{key}.outputRelativeDirectories[{index}]",
                f"{directory!r} is not a directory below the root",
                f"give a relative {manifest.root_path_format} path without `..`",
            )


def _parse(path: str, path_format: PathFormat) -> PurePosixPath | PureWindowsPath:
    return PureWindowsPath(path) if path_format == "windows" else PurePosixPath(path)
