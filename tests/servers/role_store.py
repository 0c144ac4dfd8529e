"""The S3 server with a role that can be assumed: temporary credentials with a session token.

The Deadline service hands out nothing else, the agent refuses credentials without a token, and the
server verifies the token, so what forgets it on the way is refused here as it is by AWS. The same
endpoint answers STS.

Source: https://github.com/seaweedfs/seaweedfs/wiki/AWS-IAM-CLI (the advanced configuration)
"""

import base64
import json
import secrets
from typing import Final

import boto3
from botocore.config import Config

from agent_plugin.cli.demo_store import REGION, DemoStore
from tests.servers.deadline_service import Credentials

_ROLE: Final = "arn:aws:iam::123456789012:role/queue"
_MAY_ASSUME: Final = {
    "Effect": "Allow",
    "Principal": {"AWS": "*"},
    "Action": ["sts:AssumeRole"],
}
_MAY: Final = [
    {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*", "arn:aws:s3:::*/*"]},
    {"Effect": "Allow", "Action": ["sts:*"], "Resource": ["*"]},
]


class RoleStore(DemoStore):
    """A DemoStore whose buckets a queue's role may use."""

    def assume_role(self) -> Credentials:
        """Return credentials of the role, for an hour."""
        client = boto3.client(
            "sts",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"total_max_attempts": 1}),
        )
        keys = client.assume_role(RoleArn=_ROLE, RoleSessionName="tests")["Credentials"]
        return Credentials(keys["AccessKeyId"], keys["SecretAccessKey"], keys["SessionToken"])

    @property
    def endpoints(self) -> dict[str, str]:
        """The variables by which clients find it, without credentials."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ENDPOINT_URL_STS": self.endpoint_url,
            "AWS_DEFAULT_REGION": REGION,
        }

    def _prepare_directory(self) -> None:
        super()._prepare_directory()
        policy = {"Version": "2012-10-17", "Statement": _MAY}
        trust = {"Version": "2012-10-17", "Statement": [_MAY_ASSUME]}
        role = {"roleName": "queue", "roleArn": _ROLE, "trustPolicy": trust}
        settings = {
            "sts": {
                "tokenDuration": "1h",
                "maxSessionLength": "12h",
                "issuer": "tests",
                "signingKey": base64.b64encode(secrets.token_bytes(32)).decode(),
            },
            "policy": {"defaultEffect": "Deny", "storeType": "memory"},
            "providers": [],
            "roles": [{**role, "attachedPolicies": ["queue"]}],
            "policies": [{"name": "queue", "document": policy}],
        }
        with self._create("iam.json") as file:
            file.write(json.dumps(settings).encode())

    def _arguments(self) -> list[str]:
        return [*super()._arguments(), "-s3.iam.config=iam.json"]
