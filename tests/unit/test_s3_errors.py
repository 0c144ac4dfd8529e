"""What S3's answers mean, taken from the exceptions that obstore and boto3 really raise."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import boto3
import obstore
import obstore.store
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import BaseError

from agent_plugin.content.errors import (
    PropmasterError,
    SettingsInvalidError,
    StoreAccessError,
    StoreProtocolError,
    StoreThrottledError,
    StoreUnavailableError,
)
from agent_plugin.content.s3_environment import boto_errors
from agent_plugin.content.s3_errors import (
    BucketAbsentError,
    ConditionRacedError,
    DamagedAnswerError,
    ExpiredCredentialsError,
    ObjectAbsentError,
    ObjectExistsError,
    RangeUnsatisfiableError,
    RequestRefusedError,
    UnsupportedByStoreError,
    UploadGoneError,
    error_of_boto,
    error_of_obstore,
)
from tests.servers.scripted_answers import ScriptedAnswers

if TYPE_CHECKING:
    from obstore.store import S3Credential

SECRET = "wJalrXUtnFEMI-the-secret"
KEY_ID = "AKIAEXAMPLE"


@pytest.fixture
def server() -> Iterator[ScriptedAnswers]:
    with ScriptedAnswers() as answers:
        yield answers


def keys() -> "S3Credential":
    return {
        "access_key_id": KEY_ID,
        "secret_access_key": SECRET,
        "token": None,
        "expires_at": None,
    }


def error_of_get(
    url: str,
    *,
    whole: bool = True,
    read_timeout: str = "10s",
    provide: "Callable[[], S3Credential]" = keys,
) -> PropmasterError:
    store = obstore.store.S3Store(
        "bucket",
        config={"endpoint": url, "region": "us-east-1"},
        client_options={"allow_http": True, "timeout": "10s", "read_timeout": read_timeout},
        retry_config={"max_retries": 0},
        credential_provider=provide,
    )
    with pytest.raises((BaseError, FileNotFoundError)) as raised:
        obstore.get(store, "key", options={} if whole else {"range": (10, 20)}).bytes()
    return error_of_obstore(raised.value, "get s3://bucket/key")


def error_of_boto_get(url: str) -> PropmasterError:
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=2),
    )
    with pytest.raises((BotoCoreError, ClientError)) as raised:
        client.get_object(Bucket="bucket", Key="key")
    return error_of_boto(raised.value, "get s3://bucket/key")  # type: ignore[arg-type]  # is one of them


ANSWERS: list[tuple[int, str, type[PropmasterError]]] = [
    (404, "NoSuchKey", ObjectAbsentError),
    (404, "NoSuchBucket", BucketAbsentError),
    (404, "NoSuchUpload", UploadGoneError),
    (404, "SomethingElse", StoreProtocolError),
    (403, "AccessDenied", StoreAccessError),
    (403, "InvalidAccessKeyId", StoreAccessError),
    (403, "SignatureDoesNotMatch", StoreAccessError),
    (403, "RequestTimeTooSkewed", StoreAccessError),
    (401, "Unauthorized", StoreAccessError),
    (400, "ExpiredToken", ExpiredCredentialsError),
    (403, "ExpiredToken", ExpiredCredentialsError),
    (400, "InvalidArgument", RequestRefusedError),
    (400, "NotImplemented", UnsupportedByStoreError),
    (400, "RequestTimeout", StoreUnavailableError),
    (400, "IncompleteBody", StoreUnavailableError),
    (400, "AuthorizationHeaderMalformed", StoreProtocolError),
    (503, "SlowDown", StoreThrottledError),
    (503, "ServiceUnavailable", StoreThrottledError),
    (429, "TooManyRequests", StoreThrottledError),
    (408, "RequestTimeout", StoreUnavailableError),
    (500, "InternalError", StoreUnavailableError),
    (502, "BadGateway", StoreUnavailableError),
    (504, "GatewayTimeout", StoreUnavailableError),
    (501, "NotImplemented", UnsupportedByStoreError),
    (409, "ConditionalRequestConflict", ConditionRacedError),
    (412, "PreconditionFailed", ObjectExistsError),
    (416, "InvalidRange", RangeUnsatisfiableError),
    (418, "Teapot", StoreProtocolError),
]


@pytest.mark.parametrize(("status", "code", "expected"), ANSWERS)
def test_an_answer_means_the_same_through_both_clients(
    server: ScriptedAnswers, status: int, code: str, expected: type[PropmasterError]
) -> None:
    secrets = f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId><StringToSign>{SECRET}</StringToSign>"
    server.error(status, code, "in plain words", secrets)

    for error in [error_of_get(server.url), error_of_boto_get(server.url)]:
        assert type(error) is expected
        assert error.message.startswith(f"get s3://bucket/key: {status} {code}: in plain words")
        assert KEY_ID not in error.message + error.hint
        assert SECRET not in error.message + error.hint


def test_only_throttling_and_outages_are_worth_another_try() -> None:
    retryable = {code for _, code, kind in ANSWERS if kind.retryable}
    assert retryable == {
        "RequestTimeout",
        "IncompleteBody",
        "SlowDown",
        "ServiceUnavailable",
        "TooManyRequests",
        "InternalError",
        "BadGateway",
        "GatewayTimeout",
    }


def test_a_missing_bucket_says_so(server: ScriptedAnswers) -> None:
    server.error(404, "NoSuchBucket")
    assert "the bucket itself is missing" in error_of_get(server.url).message


def test_an_error_page_of_a_proxy_is_understood_by_its_status(server: ScriptedAnswers) -> None:
    server.status, server.body = 503, b"<html><h1>Sorry</h1></html>"
    assert type(error_of_get(server.url)) is StoreThrottledError
    server.status = 403
    assert type(error_of_get(server.url)) is StoreAccessError


def test_the_wrong_region_is_named(server: ScriptedAnswers) -> None:
    server.error(400, "AuthorizationHeaderMalformed", more="<Region>eu-west-1</Region>")
    error = error_of_get(server.url)
    assert type(error) is StoreProtocolError
    assert error.hint == "Set AWS_REGION to eu-west-1."


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_means_another_region(server: ScriptedAnswers, status: int) -> None:
    server.error(status, "PermanentRedirect" if status == 301 else "TemporaryRedirect")
    error = error_of_get(server.url)
    assert type(error) is StoreProtocolError
    assert "another region" in error.message


def test_a_redirect_that_leads_in_a_circle_is_not_followed_for_ever(
    server: ScriptedAnswers,
) -> None:
    server.status, server.headers = 307, {"Location": f"{server.url}/bucket/key"}
    assert type(error_of_get(server.url)) is StoreProtocolError


def test_long_and_odd_messages_are_shortened_to_a_line(server: ScriptedAnswers) -> None:
    server.error(403, "AccessDenied", "two\n\n  lines \x07" + "x" * 5000)
    message = error_of_get(server.url).message
    assert "403 AccessDenied: two lines x" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {}),
        (206, {"Content-Range": "bytes 11-20/100"}),
        (206, {}),
        (206, {"Content-Range": "nonsense"}),
    ],
    ids=["whole", "other", "none", "nonsense"],
)
def test_another_range_than_wanted_is_damage(
    server: ScriptedAnswers, status: int, headers: dict[str, str]
) -> None:
    server.status, server.headers, server.body = status, headers, b"0123456789"
    assert type(error_of_get(server.url, whole=False)) is DamagedAnswerError


def test_nobody_listening_is_an_outage_with_its_cause() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        error = error_of_get(url)
        assert type(error) is StoreUnavailableError
        assert error.message == "get s3://bucket/key: no connection (Connection refused)"
        assert type(error_of_boto_get(url)) is StoreUnavailableError


def test_an_unknown_host_is_an_outage_with_its_cause() -> None:
    error = error_of_get("http://nobody.invalid")
    assert type(error) is StoreUnavailableError
    assert "lookup" in error.message
    assert type(error_of_boto_get("http://nobody.invalid")) is StoreUnavailableError


def test_plain_http_where_tls_is_expected_is_an_outage(server: ScriptedAnswers) -> None:
    error = error_of_get(server.url.replace("http:", "https:"))
    assert type(error) is StoreUnavailableError


@contextlib.contextmanager
def saying(words: bytes | None) -> Iterator[str]:
    """Somebody who answers a request with these words and hangs up; None: says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        done = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.recv(65_536)
                if words is None:
                    done.wait(10)
                else:
                    connection.sendall(words)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        thread.join(10)


HEAD = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n'


@pytest.mark.parametrize(
    "words",
    [b"", HEAD, HEAD + b"Content-Length: 10\r\n\r\nhalf", b"\x15\x03\x03\x00\x02\x02\x28"],
    ids=["nothing", "half a head", "half a body", "not HTTP"],
)
def test_an_answer_that_breaks_off_is_an_outage(words: bytes) -> None:
    with saying(words) as url:
        assert type(error_of_get(url)) is StoreUnavailableError


def test_silence_is_an_outage() -> None:
    with saying(None) as url:
        error = error_of_get(url, read_timeout="200ms")
    assert type(error) is StoreUnavailableError
    assert error.message == "get s3://bucket/key: timed out"


def test_an_unknown_profile_is_a_wrong_setting() -> None:
    with (
        pytest.raises(SettingsInvalidError, match="nobody"),
        boto_errors("find credentials"),
    ):
        boto3.session.Session(profile_name="nobody").client("s3")


def test_no_credentials_are_a_matter_of_access(server: ScriptedAnswers) -> None:
    with pytest.raises(StoreAccessError, match="no credentials"), boto_errors("get s3://b/k"):
        boto3.client("s3", endpoint_url=server.url, region_name="x").get_object(
            Bucket="b", Key="key"
        )


def test_credentials_that_can_not_be_read_are_a_matter_of_access(server: ScriptedAnswers) -> None:
    def provide() -> "S3Credential":
        raise StoreAccessError("the process that knows them failed")

    error = error_of_get(server.url, provide=provide)
    assert type(error) is StoreAccessError
    assert "the process that knows them failed" in error.message
    assert server.requests == []
