"""Mount as the real worker agent does; run by the agent's Python, as the agent's user.

The agent's library finds `deadline_vfs`, mounts a root, mounts it again with more inputs, and takes
it away, each time with a command of the job's user in between. Reads one JSON request on stdin:

    {"sessionDirectory": "/abs", "root": "/abs/assetroot-…", "jobUser": "…", "group": "…",
     "bucket": "…", "rootPrefix": "…", "environment": {…}, "manifests": ["/abs", …],
     "commands": ["shell text", …]}

and writes one answer, as its last line: `launched`, `outputs` and `seconds`, parallel to the
manifests; `isMounted`, when the session was cleaned up; and `log`, what the agent would log.
"""

import io
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
from deadline.job_attachments.asset_manifests.decode import decode_manifest
from deadline.job_attachments.asset_sync import AssetSync
from deadline.job_attachments.models import JobAttachmentS3Settings
from deadline.job_attachments.os_file_permission import PosixFileSystemPermissionSettings
from deadline.job_attachments.vfs import VFSProcessManager


def main() -> None:
    request = json.load(sys.stdin)
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.INFO, format="%(message)s")
    directory = Path(request["sessionDirectory"])
    sync = AssetSync(
        farm_id="farm-" + "a" * 32, boto3_session=boto3.Session(region_name="us-east-1")
    )
    settings = JobAttachmentS3Settings(request["bucket"], request["rootPrefix"])
    answer: dict[str, Any] = {"launched": [], "outputs": [], "seconds": []}
    for manifest, command in zip(request["manifests"], request["commands"], strict=True):
        begun = time.monotonic()
        launched = sync._launch_vfs(
            s3_settings=settings,
            session_dir=directory,
            merged_manifests_by_root={request["root"]: decode_manifest(Path(manifest).read_text())},
            os_env_vars=request["environment"],
            fs_permission_settings=PosixFileSystemPermissionSettings(
                os_user=request["jobUser"], os_group=request["group"], dir_mode=0o20, file_mode=0o20
            ),
        )
        answer["seconds"].append(time.monotonic() - begun)
        answer["launched"].append(launched)
        done = subprocess.run(
            ["sudo", "-u", request["jobUser"], "sh", "-c", f"cd {request['root']} && {command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        answer["outputs"].append(done.stdout)
    sync.cleanup_session(session_dir=directory, file_system="VIRTUAL", os_user=request["jobUser"])
    answer["isMounted"] = VFSProcessManager.is_mount(request["root"])
    answer["log"] = log.getvalue()
    # After what findmnt has printed.
    sys.stdout.write("\n" + json.dumps(answer))


main()
