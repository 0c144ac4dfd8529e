"""What tests know of the S3 server that the run shares."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@dataclass(frozen=True, slots=True)
class S3Server:
    """An S3 endpoint that verifies signatures, with one shared bucket.

    A new bucket's first object costs 0.2 s, so tests share `bucket` and keep apart by prefix
    (fixture `s3_prefix`). Everybody may read `open_bucket`, without a signature.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    read_only_access_key: str
    read_only_secret_key: str
    bucket: str
    region: str = "us-east-1"
    open_bucket: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables for a process or for monkeypatch; no AWS_ACCOUNT_ID among them."""
        return self.environment_at(self.endpoint_url)

    def environment_at(self, endpoint_url: str) -> dict[str, str]:
        """Return `environment` with another endpoint, a fault proxy's for instance."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL_S3": endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def read_only_environment(self) -> dict[str, str]:
        """`environment` of the identity that may only list and read."""
        return self.environment | {
            "AWS_ACCESS_KEY_ID": self.read_only_access_key,
            "AWS_SECRET_ACCESS_KEY": self.read_only_secret_key,
        }

    def client(
        self,
        *,
        endpoint_url: str | None = None,
        read_only: bool = False,
        secret_key: str | None = None,
    ) -> "S3Client":
        """Return a boto3 client that tries once, for looking behind what is tested."""
        return boto3.client(
            "s3",
            endpoint_url=endpoint_url or self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.read_only_access_key if read_only else self.access_key,
            aws_secret_access_key=secret_key
            or (self.read_only_secret_key if read_only else self.secret_key),
            config=Config(
                retries={"total_max_attempts": 1},
                connect_timeout=5,
                read_timeout=10,
                # Presigned URLs would be of version 2 otherwise, for an endpoint that is not AWS.
                signature_version="s3v4",
                s3={"addressing_style": "path"},
            ),
        )
