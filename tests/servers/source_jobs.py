"""Objects that are no blobs, and jobs that have them as inputs."""

import json
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agent_plugin.session.job import JobDocument
from tests.servers.hooks import FARM, JOB, QUEUE, Host
from tests.servers.s3_server import S3Server

SENDERS = 8


def store_objects(
    s3: S3Server, prefix: str, objects: Mapping[str, bytes | int]
) -> dict[str, bytes]:
    """Store objects below a prefix; sizes stand for pseudo-random bytes. Return their content."""
    content = {
        name: random.Random(f"{name} {data}").randbytes(data) if isinstance(data, int) else data
        for name, data in objects.items()
    }
    client = s3.client()
    with ThreadPoolExecutor(SENDERS) as senders:
        list(
            senders.map(
                lambda item: client.put_object(
                    Bucket=s3.bucket, Key=f"{prefix}/{item[0]}", Body=item[1]
                ),
                content.items(),
            )
        )
    return content


def source_of(s3: S3Server, prefix: str, **fields: Any) -> dict[str, Any]:
    """Return the description of a source: all objects below a prefix."""
    return {"Bucket": s3.bucket, "Key": f"{prefix}/", **fields}


def job_with_sources(host: Host, *sources: Mapping[str, Any], **changes: Any) -> JobDocument:
    """Return a job that has input sources and one root that takes outputs."""
    document = {
        "farmId": FARM,
        "queueId": QUEUE,
        "jobId": JOB,
        "store": host.store_url,
        "attachments": {
            "manifests": [
                {
                    "rootPath": "/mnt/show",
                    "rootPathFormat": "posix",
                    "outputRelativeDirectories": ["renders"],
                }
            ]
        },
        "inputSources": list(sources),
        **changes,
    }
    return JobDocument.decode(json.dumps(document).encode(), "the test's job")


def content_below(directory: Path) -> dict[str, bytes]:
    """Return the content of every file by its path below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def times_in_store(s3: S3Server, prefix: str) -> dict[str, int]:
    """Return when each object was stored, in microseconds, by its key without the prefix."""
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=s3.bucket, Prefix=prefix)
    return {
        entry["Key"].removeprefix(f"{prefix}/"): round(entry["LastModified"].timestamp() * 1e6)
        for page in pages
        for entry in page.get("Contents", ())
    }
