"""`cat`: the bytes of one result file, verified.

A file of one request's size is verified before anybody gets a byte of it. A larger one is given
while it comes, since it may be larger than memory and disk; it is hashed meanwhile, and if it was
not what it should have been, that is told when all of it has been given.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Final

import xxhash

from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import BlobCorruptError, JobInvalidError, ObjectNotFoundError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.store import WHOLE_BLOB_BYTES
from agent_plugin.publish.clashes import Clash, refuse
from agent_plugin.transfer.asking import Asking

PART_BYTES: Final = WHOLE_BLOB_BYTES
# Parts that are asked for before the one that is being given has gone: they bound the memory.
PARTS_AHEAD: Final = 4

_SHOWN: Final = 5


def choose(files: Mapping[str, Mapping[str, FileEntry]], path: str) -> FileEntry:
    """Return the one file that a path stands for.

    Args:
        files: By execution, its files by path.
        path: In their results, normalised.

    Raises:
        ObjectNotFoundError: No execution has anything of that path.
        JobInvalidError: It is a directory.
        ResultClashError: Several have, and they differ.
    """
    found = {execution: had[path] for execution, had in files.items() if path in had}
    if not found:
        below = sorted({at for had in files.values() for at in had})
        if below:
            shown = ", ".join(below[:_SHOWN]) + (", …" if len(below) > _SHOWN else "")
            raise JobInvalidError(
                f"{path or 'the whole of a job'} is a directory of results, with {shown}",
                hint="name a file",
            )
        raise ObjectNotFoundError(
            f"there is no result {path}", hint="`propmaster ls JOB` lists those that there are"
        )
    digests = {entry.digest for entry in found.values()}
    if len(digests) > 1:
        refuse(
            [Clash(path, tuple(sorted(found)))],
            "executions have different files of that path",
            "say which one is meant: --execution ID",
        )
    return next(iter(found.values()))


def read_out(asking: Asking, digest: Digest, give: Callable[[bytes], object]) -> None:
    """Give the bytes of a blob, in order.

    Args:
        asking: Of the store.
        digest: The blob.
        give: Called with each piece; what it raises ends the reading.

    Raises:
        BlobCorruptError: The store has other bytes; of a blob of more than PART_BYTES they were
            given by then.
        BlobNotFoundError, StoreAccessError, StoreUnavailableError: It can not be had.
    """
    if digest.size <= WHOLE_BLOB_BYTES:
        give(asking.ask(lambda store: store.get(digest)))
        return
    hashing = xxhash.xxh3_128()
    ahead: deque[Future[bytes]] = deque()
    offsets = iter(range(0, digest.size, PART_BYTES))
    while True:
        while len(ahead) < PARTS_AHEAD and (offset := next(offsets, None)) is not None:
            ahead.append(asking.lanes.submit(partial(_read_part, asking, digest, offset)))
        if not ahead:
            break
        part = asking.lanes.result(ahead.popleft(), asking.cancellation)
        hashing.update(part)
        give(part)
    if hashing.hexdigest() != digest.hex:
        raise BlobCorruptError(
            f"what was printed is not {digest}, but xxh128:{hashing.hexdigest()}",
            hint="throw away what was printed, and try again",
        )


def _read_part(asking: Asking, digest: Digest, offset: int) -> bytes:
    return asking.open_store().read_range(digest, offset, PART_BYTES)
