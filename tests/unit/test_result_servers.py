"""Which servers are asked for results; nothing here is asked."""

import shlex

import pytest

from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.errors import JobInvalidError, NotAllowedError
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.publish.result_documents import Result, ResultParams
from agent_plugin.publish.servers import ResultServers

KEYS = {
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_CONFIG_FILE": "/dev/null",
}
OWN = "https://s3.studio.example"


def servers(endpoint: str = OWN, *allowed: str) -> ResultServers:
    environment = {**KEYS, **({"AWS_ENDPOINT_URL": endpoint} if endpoint else {})}
    return ResultServers(environment, RetryPolicy(), Bandwidth(), allowed)


def result(endpoint: str, region: str = "") -> Result:
    return Result("s3", ResultParams("bucket", "key", endpoint=endpoint, region=region))


@pytest.mark.parametrize("endpoint", ["", OWN, f"{OWN}/", "https://S3.Studio.example:443"])
def test_o7_the_environments_own_server_is_asked_however_it_is_spelled(endpoint: str) -> None:
    assert servers().objects(result(endpoint)).endpoint.lower().startswith(OWN)


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://s3.evil.example",
        "http://s3.studio.example",
        "https://s3.studio.example:9000",
        "https://s3.studio.example/elsewhere",
        "https://s3.studio.example@s3.evil.example",
        "https://s3.studio.example:443@s3.evil.example",
        "https://s3.studio.example?x=.evil.example",
        "https://s3.studio.example#.evil.example",
        "https://s3.studio.example:port",
        "https://s3.studio.example.evil.example",
        "//s3.studio.example",
        "\thttps://s3.evil.example",
    ],
)
def test_o7_another_server_is_not_asked_unless_it_was_named(endpoint: str) -> None:
    """Seen to fail when endpoints are compared by how they begin, or by host alone."""
    with pytest.raises(NotAllowedError, match="which is not asked with your keys") as refused:
        servers().objects(result(endpoint))
    assert "--allow-endpoint" in refused.value.hint
    with pytest.raises(NotAllowedError, match="your S3 server is that of AWS"):
        servers("").objects(result(endpoint))


def test_o7_what_a_document_says_is_quoted_where_it_is_to_be_pasted() -> None:
    """Seen to fail when the hint had the endpoint as it is."""
    endpoint = "http://x;$(touch here)'"

    with pytest.raises(NotAllowedError) as refused:
        servers().objects(result(endpoint))

    assert shlex.split(refused.value.hint.partition(", or")[0])[-1] == endpoint


def test_o7_a_server_that_was_named_is_asked() -> None:
    other = "http://10.0.0.1:9000"

    assert servers(OWN, f"{other}/").objects(result(other)).endpoint == other


@pytest.mark.parametrize("region", ["evil.example/", "x" * 33, "us-east-1\n", "a@b"])
def test_o7_a_region_is_no_way_to_another_server(region: str) -> None:
    """It is part of the host's name at AWS: seen to fail when it is taken as it is."""
    with pytest.raises(JobInvalidError, match="is no region"):
        servers("").objects(result("", region))
