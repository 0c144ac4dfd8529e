"""Download a job's outputs with the real client library; run by the client's Python.

Reads one JSON request on stdin and writes one JSON answer on stdout:

    {"jobAttachmentSettings": {…}, "farmId": "…", "queueId": "…", "jobId": "…", "attachments": {…},
     "stepId": null, "taskId": null, "sessionActionId": null,
     "roots": {"/root/of/job": "/where/to"}, "conflict": "OVERWRITE", "scanKeys": false}

`scanKeys` also runs the key scan of `deadline queue sync-output`, which refuses a key it can not
attribute to a root of the job.
"""

import contextlib
import json
import sys
from typing import Any

import boto3
from deadline.job_attachments._incremental_downloads._manifest_s3_downloads import (
    _add_output_manifests_from_s3,
)
from deadline.job_attachments.download import OutputDownloader
from deadline.job_attachments.models import FileConflictResolution, JobAttachmentS3Settings


def scan_keys(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every session action of the job with the manifests the key scan finds for it."""
    settings = request["jobAttachmentSettings"]
    session = boto3.session.Session()
    ids = (request["farmId"], request["queueId"], request["jobId"])
    prefix = "/".join([settings["rootPrefix"], "Manifests", *ids, ""])
    pages = session.client("s3").get_paginator("list_objects_v2")
    keys = [
        found["Key"]
        for page in pages.paginate(Bucket=settings["s3BucketName"], Prefix=prefix)
        for found in page.get("Contents", [])
    ]
    actions = [
        {"sessionActionId": action}
        for action in sorted({key.split("/")[-2].partition("_")[2] for key in keys})
    ]
    _add_output_manifests_from_s3(
        request["farmId"],
        {"queueId": request["queueId"], "jobAttachmentSettings": settings},
        {"jobId": request["jobId"], "name": "job", "attachments": request["attachments"]},
        session,
        actions,
    )
    return actions


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        downloader = OutputDownloader(
            s3_settings=JobAttachmentS3Settings(**request["jobAttachmentSettings"]),
            farm_id=request["farmId"],
            queue_id=request["queueId"],
            job_id=request["jobId"],
            step_id=request["stepId"],
            task_id=request["taskId"],
            session_action_id=request["sessionActionId"],
        )
        found = downloader.get_paths_by_root()
        for root in found:
            downloader.set_root_path(root, request["roots"][root])
        summary = downloader.download(
            file_conflict_resolution=FileConflictResolution[request["conflict"]]
        )
        answer = {
            "paths": {root: sorted(paths) for root, paths in found.items()},
            "files": summary.processed_files,
            "bytes": summary.processed_bytes,
            "sessionActions": scan_keys(request) if request["scanKeys"] else [],
        }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
