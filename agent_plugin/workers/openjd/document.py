"""The job document of an OpenJD job, completed with what its runtime knows.

A job carries what `propmaster submit` printed. Deadline Cloud's ids are in its environment
variables; another runtime has none, so there the document says farm, queue and job, steps are known
by their names, and ids are made of those.
"""

import json
import os
import uuid
from collections.abc import Mapping
from typing import Final

from agent_plugin.content.digest import hash_name
from agent_plugin.content.errors import JobInvalidError
from agent_plugin.session.job import MAX_JOB_BYTES, JobDocument

_IDS: Final = {
    "farmId": "DEADLINE_FARM_ID",
    "queueId": "DEADLINE_QUEUE_ID",
    "jobId": "DEADLINE_JOB_ID",
}
_BUCKET: Final = "DEADLINE_JA_S3_BUCKET"
_ROOT_PREFIX: Final = "DEADLINE_JA_ROOT_PREFIX"
_STEP_ID: Final = "DEADLINE_STEP_ID"
_TASK_ID: Final = "DEADLINE_TASK_ID"
_ACTION_ID: Final = "DEADLINE_SESSIONACTION_ID"
_STEP: Final = "step-"


def complete(
    data: bytes, source: str, environment: Mapping[str, str], *, rules: bytes = b""
) -> JobDocument:
    """Return the job that a document and a runtime describe together.

    Args:
        data: The document; ids, store and path mapping rules may be left out where the runtime has
            them, and ids of the runtime win.
        source: What to call it in messages.
        environment: Of the runtime's action.
        rules: What stands in the runtime's path mapping rules file, `pathmapping-1.0`.

    Raises:
        JobInvalidError: Together they break the schema of a job document.
    """
    if len(data) > MAX_JOB_BYTES:
        raise JobInvalidError(f"{source}: {len(data)} bytes, more than {MAX_JOB_BYTES}")
    document = _parsed(data, source)
    if not isinstance(document, dict):
        raise JobInvalidError(f"{source}: not a JSON object")
    for key, variable in _IDS.items():
        if environment.get(variable):
            document[key] = environment[variable]
    if environment.get(_BUCKET) and not document.keys() & {"store", "jobAttachmentSettings"}:
        document["jobAttachmentSettings"] = {
            "s3BucketName": environment[_BUCKET],
            "rootPrefix": environment.get(_ROOT_PREFIX, ""),
        }
    if rules and "pathMappingRules" not in document:
        document["pathMappingRules"] = _rules(rules)
    dependencies = document.get("stepDependencies")
    if isinstance(dependencies, dict) and not environment.get(_IDS["jobId"]):
        job_id = str(document.get("jobId", ""))
        document["stepDependencies"] = {
            _id_of_step(job_id, step): [_id_of_step(job_id, each) for each in needed]
            if isinstance(needed, list)
            else needed
            for step, needed in dependencies.items()
        }
    return JobDocument.decode(json.dumps(document).encode(), source)


def step_id(job_id: str, name: str, environment: Mapping[str, str]) -> str:
    """Return the id of the step that a task belongs to; without the service's, one of its name."""
    return environment.get(_STEP_ID) or _made_of(job_id, name)


def task_id(environment: Mapping[str, str]) -> str | None:
    """Return the task's id, or None where the runtime has none: then it is a chunk's run."""
    return environment.get(_TASK_ID) or None


def session_action_id(environment: Mapping[str, str]) -> str:
    """Return the id of the action that runs now; without the service's, one that is never again."""
    return environment.get(_ACTION_ID) or f"sessionaction-{uuid.uuid4().hex}-0"


def is_named_by_service(environment: Mapping[str, str]) -> bool:
    """Whether the runtime says which step a task is of."""
    return bool(environment.get(_STEP_ID))


def _parsed(data: bytes, source: str) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise JobInvalidError(
            f"{source}: not a JSON document: {error}",
            hint="what `propmaster submit` printed is meant",
        ) from error


def _rules(data: bytes) -> list[dict[str, str]]:
    document = _parsed(data, "the path mapping rules")
    # Without rules the file holds an empty object.
    found = document.get("path_mapping_rules", []) if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(isinstance(rule, dict) for rule in found):
        raise JobInvalidError("the runtime's path mapping rules are not of pathmapping-1.0")
    return [
        {
            "sourcePathFormat": str(rule.get("source_path_format")).lower(),
            "sourcePath": rule.get("source_path"),
            "destinationPath": rule.get("destination_path"),
        }
        for rule in found
        # There are others, of no path of a manifest.
        if str(rule.get("source_path_format")).lower() in ("posix", "windows")
    ]


def _id_of_step(job_id: str, named: object) -> object:
    return _made_of(job_id, named) if isinstance(named, str) else named


def _made_of(job_id: str, name: str) -> str:
    is_id = name.startswith(_STEP) and len(name) == len(_STEP) + 32
    return name if is_id else f"{_STEP}{hash_name(os.path.join(job_id, name))}"  # noqa: PTH118
