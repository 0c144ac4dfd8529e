"""The servers that results are on, and which of them are asked.

A result document names its server, and whoever may write to the store may write such a document. A
request carries the access key's id and, of temporary keys, the session token, and what answers may
be inside of somebody's network. So only the server that the environment says is asked, and those
that the user or the operator has named.
"""

import re
import shlex
from collections.abc import Collection, Mapping
from typing import Final
from urllib.parse import urlsplit

from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.errors import JobInvalidError, NotAllowedError
from agent_plugin.content.objects import ObjectAccess
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_environment import endpoint_of
from agent_plugin.content.s3_objects import S3Objects, open_objects
from agent_plugin.publish.result_documents import Result

# It becomes part of a host's name.
_REGION: Final = re.compile(r"[a-z0-9-]{0,32}")
_PORTS: Final = {"http": 80, "https": 443}


class ResultServers:
    """The servers that results are on, each asked as the environment says.

    Args:
        environment: AWS variables.
        policy: When requests are sent again.
        bandwidth: How much may move.
        allowed: Endpoints that may be asked besides the environment's.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        policy: RetryPolicy,
        bandwidth: Bandwidth,
        allowed: Collection[str] = (),
    ) -> None:
        self._environment = environment
        self._policy = policy
        self._bandwidth = bandwidth
        self._allowed = {_spelled(endpoint) for endpoint in allowed}
        self._opened: dict[ObjectAccess, S3Objects] = {}

    def objects(self, result: Result) -> S3Objects:
        """Return what asks for a result's objects.

        Raises:
            NotAllowedError: Its server is not one that may be asked.
            JobInvalidError: Its region is none.
            SettingsInvalidError: Its endpoint makes no sense.
            StoreAccessError: There are no credentials.
        """
        params = result.params
        if not _REGION.fullmatch(params.region):
            raise JobInvalidError(
                f"{result.url}: {params.region[:80]!r} is no region",
                hint="the result document was changed, or written by another program",
            )
        if params.endpoint:
            self._insist_allowed(result)
        access = ObjectAccess(endpoint=params.endpoint, region=params.region)
        if access not in self._opened:
            self._opened[access] = open_objects(
                access,
                environment=self._environment,
                policy=self._policy,
                bandwidth=self._bandwidth,
            )
        return self._opened[access]

    def _insist_allowed(self, result: Result) -> None:
        endpoint = result.params.endpoint
        own = endpoint_of(self._environment)
        if _spelled(endpoint) in self._allowed | {_spelled(own)}:
            return
        shown = endpoint[:200] if endpoint.isprintable() else repr(endpoint[:200])
        raise NotAllowedError(
            f"{result.url} is at {shown}, which is not asked with your keys: your S3 server is"
            f" {own or 'that of AWS'}",
            # Whoever wrote the document knows that people paste this into a shell.
            hint="if you trust that server, say --allow-endpoint"
            f" {shlex.quote(shown)}, or have it in store.result_endpoints of the settings",
        )


def _spelled(endpoint: str) -> str:
    """Return an endpoint in the one way in which all spellings of it are equal."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        return endpoint
    if not parts.hostname or parts.username or parts.password or parts.query or parts.fragment:
        return endpoint
    return f"{parts.scheme}://{parts.hostname}:{port}{parts.path.rstrip('/')}"
