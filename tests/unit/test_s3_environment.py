"""Which variables and files decide where S3 is and who we are there."""

import stat
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from agent_plugin.content.errors import SettingsInvalidError, StoreAccessError
from agent_plugin.content.open_store import build_store
from agent_plugin.content.s3_environment import Credentials, locate

KEYS = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK"}
URL = "http://127.0.0.1:9000"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "https://bucket.s3.us-east-1.amazonaws.com"),
        ({"AWS_REGION": "eu-west-1"}, "https://bucket.s3.eu-west-1.amazonaws.com"),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "https://bucket.s3.eu-west-1.amazonaws.com"),
        (
            {"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "us-west-2"},
            "https://bucket.s3.eu-west-1.amazonaws.com",
        ),
        ({"AWS_REGION": "cn-north-1"}, "https://bucket.s3.cn-north-1.amazonaws.com.cn"),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "https://bucket.s3-fips.us-east-1.amazonaws.com"),
        (
            {"AWS_USE_DUALSTACK_ENDPOINT": "true"},
            "https://bucket.s3.dualstack.us-east-1.amazonaws.com",
        ),
        ({"AWS_ENDPOINT_URL_S3": f"{URL}/"}, f"{URL}/bucket"),
        ({"AWS_ENDPOINT_URL": URL}, f"{URL}/bucket"),
        ({"AWS_ENDPOINT_URL_S3": URL, "AWS_ENDPOINT_URL": "http://x"}, f"{URL}/bucket"),
        (
            {"AWS_ENDPOINT_URL_S3": URL, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "True"},
            "https://bucket.s3.us-east-1.amazonaws.com",
        ),
    ],
)
def test_the_environment_says_where_a_bucket_is(environment: dict[str, str], expected: str) -> None:
    assert locate("bucket", "prefix", environment).bucket_url == expected


@pytest.mark.parametrize(
    "region", ["x@127.0.0.1:9000/", "evil.example/?", "evil.example", "a b", "-x", "x" * 64, "é"]
)
def test_a_region_can_name_no_server(region: str) -> None:
    """It becomes a part of the server's name, and a job may say it."""
    with pytest.raises(SettingsInvalidError, match="is no region"):
        locate("bucket", "prefix", {"AWS_REGION": region})


def test_a_bucket_with_dots_is_not_part_of_the_host_name() -> None:
    """The certificate would not cover it."""
    assert locate("my.bucket", "p", {}).bucket_url == (
        "https://s3.us-east-1.amazonaws.com/my.bucket"
    )


def test_a_profile_says_where_a_bucket_is(config: Path) -> None:
    config.write_text(
        "[default]\nregion = eu-north-1\n"
        f"[profile farm]\nregion = us-west-2\nendpoint_url = {URL}\n"
        "[profile studio]\nendpoint_url = http://general\nservices = mine\n"
        f"[services mine]\ns3 =\n  endpoint_url = {URL}/s3\n"
        "[profile quiet]\nignore_configured_endpoint_urls = true\nendpoint_url = http://general\n"
    )

    def at(**environment: str) -> tuple[str, str]:
        location = locate("bucket", "p", {"AWS_CONFIG_FILE": str(config), **environment})
        return location.region, location.bucket_url

    assert at() == ("eu-north-1", "https://bucket.s3.eu-north-1.amazonaws.com")
    assert at(AWS_PROFILE="farm") == ("us-west-2", f"{URL}/bucket")
    assert at(AWS_PROFILE="farm", AWS_REGION="x-1") == ("x-1", f"{URL}/bucket")
    assert at(AWS_PROFILE="farm", AWS_ENDPOINT_URL="http://e") == ("us-west-2", "http://e/bucket")
    assert at(AWS_PROFILE="studio") == ("us-east-1", f"{URL}/s3/bucket")
    assert at(AWS_PROFILE="quiet")[1] == "https://bucket.s3.us-east-1.amazonaws.com"
    assert at(AWS_PROFILE="farm", AWS_IGNORE_CONFIGURED_ENDPOINT_URLS="true")[1] == (
        "https://bucket.s3.us-west-2.amazonaws.com"
    )
    with pytest.raises(SettingsInvalidError, match="nobody"):
        at(AWS_PROFILE="nobody")


@pytest.mark.parametrize(
    "endpoint",
    ["127.0.0.1:9000", "ftp://x", "http://", "http://x/?a=b", "http://[::1", "http://x:70000"],
)
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(SettingsInvalidError, match="endpoint"):
        locate("bucket", "p", {"AWS_ENDPOINT_URL_S3": endpoint})


@pytest.mark.parametrize(
    ("prefix", "place"),
    [
        ("root", "root/Data/x"),
        ("a/b", "a/b/Data/x"),
        ("a/", "a//Data/x"),
        ("/a", "/a/Data/x"),
        ("", "Data/x"),
    ],
)
def test_a_prefix_is_joined_with_a_plain_slash(prefix: str, place: str) -> None:
    location = locate("bucket", prefix, {})
    assert location.key("Data/x") == place
    assert location.url == (f"s3://bucket/{prefix}" if prefix else "s3://bucket")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "bucket/prefix",
        "s3:/bucket",
        "s3://",
        "s3:///prefix",
        "s3://ab",
        "s3://-bucket/x",
        "s3://user@bucket/x",
        "s3://bucket/a/../b",
        "s3://bucket/./b",
        "s3://bucket/a?x",
        "s3://bucket/a#x",
        "s3://bucket/a\nb",
        "s3://bucket/\udc80",
        "http://bucket/x",
        "file://host/dir",
        "file:dir",
        "file:///a%00b",
        "file:///a?b",
    ],
)
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(SettingsInvalidError):
        build_store(url, environment=KEYS, account_id="")


def test_keys_from_the_environment_need_no_botocore() -> None:
    """Importing it costs most of what a finish-task may take."""
    program = (
        "import sys\n"
        "from agent_plugin.content.open_store import build_store\n"
        f"build_store('s3://bucket/x', environment={KEYS}, account_id='123456789012')\n"
        "print(sorted({'botocore', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_keys_from_the_environment_come_before_a_profile() -> None:
    """As in botocore's own chain."""
    credentials = Credentials(KEYS | {"AWS_SESSION_TOKEN": "T", "AWS_PROFILE": "other"})
    assert credentials.fixed
    assert credentials.provide() == {
        "access_key_id": "AK",
        "secret_access_key": "SK",
        "token": "T",
        "expires_at": None,
    }


def test_no_credentials_at_all_are_an_error() -> None:
    with pytest.raises(StoreAccessError, match="no AWS credentials"):
        build_store("s3://bucket/x", environment={}, account_id="")


def test_a_process_of_the_profile_is_asked_for_credentials(tmp_path: Path, config: Path) -> None:
    """The Deadline worker agent hands out queue credentials in this way."""
    process = tmp_path / "credentials.sh"
    process.write_text(
        "#!/bin/sh\n"
        'echo \'{"Version": 1, "AccessKeyId": "PAK", "SecretAccessKey": "PSK",'
        ' "SessionToken": "PT", "AccountId": "123456789012",'
        ' "Expiration": "2100-01-01T00:00:00Z"}\'\n'
    )
    process.chmod(stat.S_IRWXU)
    config.write_text(f"[profile queue]\ncredential_process = {process}\n")
    credentials = Credentials({"AWS_PROFILE": "queue", "AWS_CONFIG_FILE": str(config)})

    keys = credentials.provide()
    assert (keys["access_key_id"], keys["secret_access_key"]) == ("PAK", "PSK")
    assert keys.get("token") == "PT"
    assert keys["expires_at"] is not None
    assert credentials.account_id == "123456789012"
    assert not credentials.fixed
    # Of several buckets, or of S3 and STS.
    clients = [
        boto3.session.Session(botocore_session=credentials.session()).client("s3", region_name="x")
        for _ in range(2)
    ]
    assert all(
        "PAK" in c.generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "k"})
        for c in clients
    )

    process.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(StoreAccessError, match="no credentials"):
        Credentials({"AWS_PROFILE": "queue", "AWS_CONFIG_FILE": str(config)})
