"""A server of the view by hash: given /dev/fuse, the file of its nodes, the store and a directory.

Writes a line when it serves. With `again` it takes the place of a killed one.
"""

import os
import sys
from pathlib import Path

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.open_store import build_store
from vfs.by_hash import ByHash
from vfs.error_ledger import ErrorLedger
from vfs.reader import BlobReader
from vfs.service import NodeService, Ownership
from vfs.statistics import Statistics
from vfs.streaming import StreamPolicy
from vfs.transports.kernel_transport import KernelTransport

if __name__ == "__main__":
    fd, told, url, place, *again = sys.argv[1:]
    home = Path(place)
    statistics = Statistics()
    reader = BlobReader(
        BlobCache.open(home / "cache", store_url=url, max_bytes=1 << 40, min_free_bytes=0),
        lambda: build_store(url, account_id=""),
        home,
        statistics,
        policy=StreamPolicy(),
    )
    errors = ErrorLedger(home / "errors")
    service = NodeService(ByHash(int(told)), reader, errors, statistics, Ownership(0, 0))
    transport = KernelTransport(int(fd), service)
    service.notifier = transport
    if again:
        transport.ask_again()
    os.write(1, b"serves\n")
    transport.serve()
