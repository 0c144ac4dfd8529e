"""What copying transfers move bytes by: objects of servers, each within the limits that hold."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent_plugin.content.bandwidth import Allowance, Bandwidth, Both, Limit
from agent_plugin.content.objects import ObjectAccess
from agent_plugin.transfer.copy_places import OpenObjects
from agent_plugin.transfer.copy_settings import CopySettings

if TYPE_CHECKING:
    from agent_plugin.content.s3_objects import S3Objects


class Servers:
    """The objects that transfers see, and how fast each transfer may be.

    Args:
        open_objects: Returns the objects that an access sees, given what may move.
        bandwidth: What may move from and to stores, of all transfers together.
        account: Returns the file in which processes share a transfer's speed limit, by its number.
    """

    def __init__(
        self,
        open_objects: "Callable[[ObjectAccess, Bandwidth], S3Objects]",
        bandwidth: Bandwidth,
        account: Callable[[int], str],
    ) -> None:
        self._open = open_objects
        self._bandwidth = bandwidth
        self._account = account
        self._lock = threading.Lock()
        self._opened: dict[tuple[ObjectAccess, int], S3Objects] = {}
        self._limits: dict[tuple[int, int], Allowance] = {}

    def opener(self, transfer: int, settings: CopySettings) -> OpenObjects:
        """Return what opens the objects that an access sees, for a transfer."""
        limit = settings.speed_limit

        def open_objects(access: ObjectAccess) -> "S3Objects":
            # Without a limit of their own, transfers share connections.
            key = (access, transfer if limit else 0)
            own = self.limit(transfer, settings)
            with self._lock:
                if key not in self._opened:
                    self._opened[key] = self._open(access, self._allowed(own, limit))
                return self._opened[key]

        return open_objects

    def limit(self, transfer: int, settings: CopySettings) -> Allowance:
        """Return how fast a transfer may be, wherever its bytes go."""
        rate = settings.speed_limit
        with self._lock:
            if (transfer, rate) not in self._limits:
                own = Limit(rate, self._account(transfer)) if rate else None
                self._limits[transfer, rate] = Allowance(own)
            return self._limits[transfer, rate]

    def _allowed(self, own: Allowance, limit: int) -> Bandwidth:
        if not limit:
            return self._bandwidth
        return Bandwidth(
            download=Both(self._bandwidth.download, own), upload=Both(self._bandwidth.upload, own)
        )
