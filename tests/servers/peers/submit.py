"""Upload a directory as job inputs with the real client library; run by the client's Python.

Reads one JSON request on stdin and writes one JSON answer on stdout:

    {"root": "/abs/dir", "bucket": "…", "rootPrefix": "…", "farmId": "…", "queueId": "…",
     "outputDirectories": ["renders"], "fileSystem": "COPIED", "cacheDirectory": "/abs/dir"}

The steps are those of `deadline bundle submit`: walk, group by root, hash, upload. The control
plane is never asked, so what CreateJob would be given is the answer. With no file at all below
`root` the job has an output-only root.
"""

import json
import os
import sys
from pathlib import Path

from deadline.job_attachments.models import JobAttachmentS3Settings
from deadline.job_attachments.upload import S3AssetManager


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    root = Path(request["root"])
    inputs = [
        os.path.join(folder, name)  # noqa: PTH118 - the client's own spelling of a path
        for folder, _, names in os.walk(root)
        for name in names
    ]
    manager = S3AssetManager(
        farm_id=request["farmId"],
        queue_id=request["queueId"],
        job_attachment_settings=JobAttachmentS3Settings(request["bucket"], request["rootPrefix"]),
    )
    group = manager.prepare_paths_for_upload(
        input_paths=inputs,
        output_paths=[os.path.normpath(root / output) for output in request["outputDirectories"]],
        # Keeps the root where it is when all the inputs are in one directory below it.
        referenced_paths=[str(root / "not-there")],
    )
    _, manifests = manager.hash_assets_and_create_manifest(
        asset_groups=group.asset_groups,
        total_input_files=group.total_input_files,
        total_input_bytes=group.total_input_bytes,
        hash_cache_dir=request["cacheDirectory"],
    )
    summary, attachments = manager.upload_assets(
        manifests=manifests, s3_check_cache_dir=request["cacheDirectory"]
    )
    answer = {
        "farmId": request["farmId"],
        "queueId": request["queueId"],
        "jobAttachmentSettings": {
            "s3BucketName": request["bucket"],
            "rootPrefix": request["rootPrefix"],
        },
        "attachments": {**attachments.to_dict(), "fileSystem": request["fileSystem"]},
        "files": summary.total_files,
        "filesUploaded": summary.processed_files,
        "seconds": summary.total_time,
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
