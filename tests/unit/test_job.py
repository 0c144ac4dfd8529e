"""The job document is read strictly, and refused with the key's path and what is allowed."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from agent_plugin.content.errors import JobInvalidError
from agent_plugin.session.job import MAX_JOB_BYTES, IdKind, JobDocument, PathMappingRule, check_id

HEX = "0123456789abcdef0123456789abcdef"
STEP, OTHER_STEP = f"step-{HEX}", f"step-{HEX[::-1]}"

Document = dict[str, Any]
Change = Callable[[Document], object]


def document() -> Document:
    return {
        "farmId": f"farm-{HEX}",
        "queueId": f"queue-{HEX}",
        "jobId": f"job-{HEX}",
        "jobAttachmentSettings": {"s3BucketName": "bucket", "rootPrefix": "Deadline/root"},
        "attachments": {
            "manifests": [
                {
                    "rootPath": "/mnt/show",
                    "rootPathFormat": "posix",
                    "inputManifestPath": f"farm-{HEX}/queue-{HEX}/Inputs/{HEX}/{HEX}_input",
                    "inputManifestHash": HEX,
                    "outputRelativeDirectories": ["renders", "."],
                    "fileSystemLocationName": "Projects",
                }
            ],
            "fileSystem": "VIRTUAL",
        },
        "pathMappingRules": [
            {
                "sourcePathFormat": "posix",
                "sourcePath": "/mnt/show",
                "destinationPath": "/local/show",
            }
        ],
        "stepDependencies": {STEP: [OTHER_STEP]},
        "inputSources": [],
        "publishers": [],
        "artifacts": {},
    }


def decode(value: object) -> JobDocument:
    return JobDocument.decode(json.dumps(value).encode(), "job.json")


def refused(change: Change) -> JobInvalidError:
    changed = document()
    change(changed)
    with pytest.raises(JobInvalidError) as caught:
        decode(changed)
    return caught.value


def manifest_of(job: Document) -> Document:
    manifest: Document = job["attachments"]["manifests"][0]
    return manifest


def set_in_manifest(**values: object) -> Change:
    return lambda job: manifest_of(job).update(values)


def test_a_whole_document_is_decoded() -> None:
    job = decode(document())
    [manifest] = job.attachments.manifests

    assert (job.farm_id, job.queue_id, job.job_id) == (f"farm-{HEX}", f"queue-{HEX}", f"job-{HEX}")
    assert job.attachments.file_system == "VIRTUAL"
    assert job.store_url == "s3://bucket/Deadline/root"
    assert manifest.root_path == "/mnt/show"
    assert manifest.input_manifest_hash == HEX
    assert manifest.output_directories == ("renders", ".")
    assert manifest.file_system_location_name == "Projects"
    assert job.path_mapping_rules == (PathMappingRule("posix", "/mnt/show", "/local/show"),)
    assert job.step_dependencies == {STEP: (OTHER_STEP,)}


def test_the_least_document_has_no_more_than_ids_store_and_one_root() -> None:
    job = decode(
        {
            "farmId": f"farm-{HEX}",
            "queueId": f"queue-{HEX}",
            "jobId": f"job-{HEX}",
            "store": "file:///srv/store",
            "attachments": {"manifests": [{"rootPath": "/a", "rootPathFormat": "posix"}]},
        }
    )

    assert job.store_url == "file:///srv/store"
    assert job.attachments.file_system == "COPIED"
    assert job.attachments.manifests[0].output_directories == ()
    assert job.attachments.manifests[0].input_manifest_path is None


def test_a_decoded_document_survives_being_written_and_read() -> None:
    job = decode(document())

    assert JobDocument.decode(msgspec.json.encode(job), "state") == job


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JSON document"),
        (b"{", "not a JSON document"),
        (b"\xff", "not a JSON document"),
        (b"[" * 100_000, "not a JSON document"),
        (b"[]", "the document: expected `object`, got `array`"),
        (b" " * (MAX_JOB_BYTES + 1), "more than"),
    ],
)
def test_what_is_no_document_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(JobInvalidError, match=r"job.json: ") as caught:
        JobDocument.decode(data, "job.json")
    assert reason in caught.value.message


def test_an_unknown_key_is_named_with_the_nearest_known_one() -> None:
    error = refused(lambda job: job.update(farmID="x"))
    assert error.message == "job.json: farmID: unknown key"
    assert error.hint.startswith("did you mean farmId? known: farmId, queueId, ")

    error = refused(set_in_manifest(rootPathFormt="posix"))
    assert error.message == "job.json: attachments.manifests[0].rootPathFormt: unknown key"
    assert error.hint.startswith("did you mean rootPathFormat? known: rootPath, rootPathFormat, ")

    error = refused(lambda job: job["jobAttachmentSettings"].update(zzz=1))
    assert error.message == "job.json: jobAttachmentSettings.zzz: unknown key"
    assert error.hint == "known: s3BucketName, rootPrefix"


def test_a_missing_key_is_named() -> None:
    error = refused(lambda job: manifest_of(job).pop("rootPath"))

    assert error.message == "job.json: attachments.manifests[0].rootPath: missing"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (
            set_in_manifest(rootPathFormat="dos"),
            "attachments.manifests[0].rootPathFormat: 'dos' is not allowed",
            "allowed: posix, windows",
        ),
        (
            lambda job: job["attachments"].update(fileSystem="copied"),
            "attachments.fileSystem: 'copied' is not allowed",
            "allowed: COPIED, VIRTUAL",
        ),
        (
            lambda job: job.update(jobId="job-1"),
            "jobId: expected `str` matching regex",
            "",
        ),
        (
            lambda job: job.update(queueId=f"queue-{HEX}\n"),
            "queueId: expected `str` matching regex",
            "",
        ),
        (
            lambda job: job.update(stepDependencies={STEP: ["step-1"]}),
            "stepDependencies[...][0]: expected `str` matching regex",
            "",
        ),
        (
            lambda job: job.update(stepDependencies={"step-1": []}),
            "stepDependencies: expected `str` matching regex",
            "",
        ),
        (
            set_in_manifest(rootPath="/" + "x" * 1024),
            "attachments.manifests[0].rootPath: expected `str` of length <= 1024",
            "",
        ),
        (
            set_in_manifest(rootPath=""),
            "attachments.manifests[0].rootPath: expected `str` of length >= 1",
            "",
        ),
        (
            set_in_manifest(outputRelativeDirectories=["x"] * 101),
            "attachments.manifests[0].outputRelativeDirectories: expected `array` of length <= 100",
            "",
        ),
        (
            lambda job: job["attachments"].update(
                manifests=[
                    {"rootPath": f"/{number}", "rootPathFormat": "posix"} for number in range(11)
                ]
            ),
            "attachments.manifests: expected `array` of length <= 10",
            "",
        ),
        (
            set_in_manifest(inputManifestHash="abc"),
            "attachments.manifests[0].inputManifestHash: expected `str` matching regex",
            "",
        ),
        (
            set_in_manifest(fileSystemLocationName="Pro/jects"),
            "attachments.manifests[0].fileSystemLocationName: expected `str` matching regex",
            "",
        ),
        (
            lambda job: job["jobAttachmentSettings"].update(s3BucketName="a/b"),
            "jobAttachmentSettings.s3BucketName: expected `str` matching regex",
            "",
        ),
        (
            lambda job: job["jobAttachmentSettings"].update(rootPrefix="a b"),
            "jobAttachmentSettings.rootPrefix: expected `str` matching regex",
            "",
        ),
        (
            lambda job: job["jobAttachmentSettings"].update(rootPrefix="my-task-force"),
            "jobAttachmentSettings.rootPrefix: 'my-task-force' holds 'task-'",
            "use another prefix",
        ),
        (
            lambda job: (
                job.pop("jobAttachmentSettings"),
                job.update(store="s3://bucket/my-step-1"),
            ),
            "store: 'my-step-1' holds 'step-'",
            "use another prefix",
        ),
        (
            lambda job: job.update(store="file:///srv"),
            "store: there is jobAttachmentSettings as well",
            "give either jobAttachmentSettings or store",
        ),
        (
            lambda job: job.pop("jobAttachmentSettings"),
            "jobAttachmentSettings: missing, and so is store",
            "give either jobAttachmentSettings or store",
        ),
        (
            lambda job: (job.pop("jobAttachmentSettings"), job.update(store="/srv/store")),
            "store: '/srv/store' is no store",
            "allowed: file:///dir or s3://bucket/prefix",
        ),
        (
            lambda job: job["attachments"]["manifests"].append(dict(manifest_of(job))),
            "attachments.manifests[1].rootPath: '/mnt/show' is also the rootPath of manifests[0]",
            "within one file system location, give each root once",
        ),
        (
            lambda job: job.update(stepDependencies={STEP: [OTHER_STEP, STEP]}),
            f"stepDependencies.{STEP}: the step would depend on itself",
            "name the steps whose outputs it needs",
        ),
        (
            lambda job: job.update(artifacts={"limit": 1}),
            "artifacts: not supported by this version",
            "leave it empty",
        ),
        (
            lambda job: manifest_of(job).pop("inputManifestPath"),
            "attachments.manifests[0].inputManifestHash: there is no inputManifestPath",
            "",
        ),
        (
            set_in_manifest(rootPath="/a\0b"),
            "attachments.manifests[0].rootPath: it has a NUL character",
            "",
        ),
        (
            lambda job: job["pathMappingRules"][0].update(destinationPath="/a\0"),
            "pathMappingRules[0].destinationPath: it has a NUL character",
            "",
        ),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(change: Change, message: str, hint: str) -> None:
    error = refused(change)

    assert error.message.startswith(f"job.json: {message}")
    assert error.hint == hint


def test_s1_a_source_that_breaks_a_rule_is_an_error_of_the_job() -> None:
    error = refused(lambda job: job.update(inputSources=[{"bucket": "show", "Rgion": "here"}]))

    assert error.message == "job.json: inputSources[0].Rgion: unknown key"
    assert error.hint.startswith("did you mean Region? ")


@pytest.mark.parametrize("path", ["/a", "a//b", "a/../b", "..", "a/.", "a/", "a\0"])
def test_an_input_manifest_path_that_is_no_key_is_refused(path: str) -> None:
    error = refused(set_in_manifest(inputManifestPath=path))

    assert error.message.startswith("job.json: attachments.manifests[0].inputManifestPath: ")


@pytest.mark.parametrize(
    ("path_format", "directory"),
    [
        ("posix", "/renders"),
        ("posix", "../renders"),
        ("posix", "a/../../b"),
        ("posix", "a\0b"),
        ("windows", "C:\\renders"),
        ("windows", "C:renders"),
        ("windows", "\\renders"),
        ("windows", "/renders"),
        ("windows", "a\\..\\..\\b"),
        ("windows", "a/../b"),
        ("windows", "\\\\server\\share\\a"),
    ],
)
def test_an_output_directory_outside_the_root_is_refused(path_format: str, directory: str) -> None:
    error = refused(
        set_in_manifest(rootPathFormat=path_format, outputRelativeDirectories=["ok", directory])
    )

    assert "outputRelativeDirectories[1]: " in error.message
    assert error.hint == f"give a relative {path_format} path without `..`"


@pytest.mark.parametrize(
    ("path_format", "given", "ours"),
    [
        ("posix", "renders/beauty", "renders/beauty"),
        ("posix", "a//b/./c/", "a/b/c"),
        ("posix", ".", "."),
        ("posix", "back\\slash", "back\\slash"),
        ("windows", "renders\\beauty", "renders/beauty"),
        ("windows", "renders/beauty", "renders/beauty"),
        ("windows", ".", "."),
    ],
)
def test_output_directories_become_paths_of_this_host(
    path_format: str, given: str, ours: str
) -> None:
    changed = document()
    manifest_of(changed).update(rootPathFormat=path_format, outputRelativeDirectories=[given])

    assert decode(changed).attachments.manifests[0].output_directories == (ours,)


def test_one_root_may_be_in_several_locations() -> None:
    changed = document()
    other = {**manifest_of(changed), "fileSystemLocationName": "Other"}
    changed["attachments"]["manifests"].append(other)

    assert len(decode(changed).attachments.manifests) == 2


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("farm", f"farm-{HEX}"),
        ("step", STEP),
        ("task", f"task-{HEX}-0"),
        ("sessionaction", f"sessionaction-{HEX}-4294967295"),
    ],
)
def test_ids_of_the_service_are_taken(kind: IdKind, value: str) -> None:
    assert check_id(value, kind) == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("step", f"step-{HEX}\n"),
        ("step", f"step-{HEX.upper()}"),
        ("step", f"xstep-{HEX}"),
        ("task", f"task-{HEX}"),
        ("task", f"task-{HEX}-01"),
        ("task", f"task-{HEX}-0/../x"),
        ("sessionaction", f"task-{HEX}-1"),
    ],
)
def test_other_ids_are_refused(kind: IdKind, value: str) -> None:
    with pytest.raises(JobInvalidError, match=f"is not a {kind} id"):
        check_id(value, kind)
