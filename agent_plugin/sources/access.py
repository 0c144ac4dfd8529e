"""How sources are reached: one client for each server, region and identity.

The endpoint that a source does not say comes from the environment, as the AWS tools have it. It is
settled once, and stands in the snapshot: whoever reads the objects later, in another process
perhaps, asks the same server.

Thread-safe.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace

from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.objects import ObjectAccess
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_objects import S3Objects, open_objects
from agent_plugin.sources.spec import InputSource


class SourceServers:
    """The clients of a process, made when they are asked for and kept.

    Args:
        environment: The AWS variables: the queue's credentials, for sources that say none.
        policy: When requests are sent again; None for what it is by default.
        bandwidth: How much may move; None for as much as there is.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        policy: RetryPolicy | None = None,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        self._environment = environment
        self._policy = policy
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._opened: dict[ObjectAccess, S3Objects] = {}

    def access_of(self, source: InputSource) -> ObjectAccess:
        """Return how a source is reached; its endpoint is not left to the environment any more.

        Raises:
            SettingsInvalidError: Endpoint or profile make no sense.
            StoreAccessError: There are no credentials.
        """
        access = ObjectAccess(
            endpoint=source.endpoint.rstrip("/"),
            region=source.region,
            profile=source.profile,
            anonymous=source.no_sign,
        )
        objects = self.objects(access)
        settled = replace(access, endpoint=objects.endpoint)
        with self._lock:
            self._opened.setdefault(settled, objects)
        return settled

    def objects(self, access: ObjectAccess) -> S3Objects:
        """Return the client for what `access_of` or a snapshot says.

        Raises:
            SettingsInvalidError: Endpoint or profile make no sense.
            StoreAccessError: There are no credentials.
        """
        with self._lock:
            if access not in self._opened:
                self._opened[access] = open_objects(
                    access,
                    environment=self._environment,
                    policy=self._policy,
                    bandwidth=self._bandwidth,
                )
            return self._opened[access]
