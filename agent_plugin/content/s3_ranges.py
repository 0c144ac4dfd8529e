"""Ranges of one version of an object, whoever replaces it meanwhile.

Ranges go through obstore, which is three times as fast as boto3 (docs/decisions/0001-data-plane.md)
and knows conditions and versions. It can not express some keys, such as `a//b`; those go through
boto3. Servers that ignore conditions are found out by what they say of what they send.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import obstore

from agent_plugin.content import parts
from agent_plugin.content.errors import ObjectChangedError, PropmasterError
from agent_plugin.content.objects import ObjectInfo
from agent_plugin.content.s3_access import Clients
from agent_plugin.content.s3_buckets import Buckets
from agent_plugin.content.s3_errors import (
    DamagedAnswerError,
    ObjectAbsentError,
    ObjectExistsError,
    RangeUnsatisfiableError,
)
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from obstore import GetOptions
    from typing_extensions import Buffer

# In what pieces a range is taken off the network: memory of this size is used again and again.
PIECE_BYTES: Final = 256 * 1024
# What the paths of obstore can not hold, or mean something else there.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_SPECIAL: Final = frozenset({"", ".", ".."})
_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19})")


def read(buckets: Buckets, info: ObjectInfo, offset: int, length: int) -> bytes:
    """Return part of an object; see S3Objects.read."""
    length = min(length, info.size - offset)
    if length <= 0:
        return b""
    data = bytearray(length)
    view = memoryview(data)

    def write(piece: "Buffer", position: int) -> None:
        received = memoryview(piece)
        view[position - offset :][: received.nbytes] = received

    receive(buckets, info, offset, length, None, write)
    return bytes(data)


def fetch(
    buckets: Buckets,
    info: ObjectInfo,
    fd: int,
    *,
    have: Collection[int],
    cancellation: Cancellation,
    arrived: Callable[[int, int], None],
) -> None:
    """Write an object to a file; see S3Objects.fetch."""
    if info.size <= WHOLE_BLOB_BYTES:
        data = buckets.lanes.run(partial(_read_whole, buckets, info, cancellation), cancellation)
        os.ftruncate(fd, info.size)
        parts.write_all(fd, data, 0)
        arrived(0, info.size)
        return
    parts.reserve(fd, info.size)
    os.ftruncate(fd, info.size)
    # The other parts are stopped before the end of what they write is awaited.
    with parts.SharedFile(fd, cancellation) as file, parts.stopping(cancellation) as stop:

        def move(offset: int) -> None:
            length = min(parts.PART_BYTES, info.size - offset)
            receive(buckets, info, offset, length, stop, file.write)
            arrived(offset, length)

        tasks = (
            (offset, partial(move, offset))
            for offset in range(0, info.size, parts.PART_BYTES)
            if offset not in have
        )
        window = parts.WINDOW_PARTS
        for _ in parts.in_order(tasks, buckets.lanes, cancellation, window, deque()):
            pass


def _read_whole(buckets: Buckets, info: ObjectInfo, cancellation: Cancellation) -> bytes:
    if info.size:
        cancellation.check()
        return read(buckets, info, 0, info.size)
    # No range can be asked for, so that it is still that object is another question.
    head = buckets.head(info.bucket, info.key, version=info.version, cancellation=cancellation)
    _insist_same(info, head["ContentLength"], head.get("ETag"))
    return b""


def receive(
    buckets: Buckets,
    info: ObjectInfo,
    offset: int,
    length: int,
    stop: Cancellation | None,
    write: parts.Write,
) -> None:
    """Have exactly a range written, piece by piece, also when some of it comes twice.

    Raises:
        ObjectChangedError: It is another object by now, or gone.
    """
    requests = buckets.of(info.bucket)
    what = f"get {info.url} from {offset}"
    same: dict[str, Any] = {
        **({"IfMatch": info.etag} if info.etag else {}),
        **({"VersionId": info.version} if info.version else {}),
    }

    def ask(clients: Clients) -> None:
        options: GetOptions = {"range": (offset, offset + length)}
        if info.etag:
            options["if_match"] = info.etag
        if info.version:
            options["version"] = info.version
        answer = obstore.get(clients.reader_of(length), info.key, options=options)
        _insist_same(info, answer.meta["size"], answer.meta["e_tag"])
        _write(answer.stream(min_chunk_size=PIECE_BYTES), info, offset, length, write)

    def ask_boto(client: "S3Client", common: dict[str, Any]) -> None:
        span = f"bytes={offset}-{offset + length - 1}"
        answer = client.get_object(**common, Key=info.key, Range=span, **same)
        with closing(answer["Body"]) as body:
            said = _RANGE.fullmatch(answer.get("ContentRange", ""))
            if said is None:
                raise DamagedAnswerError(f"{what}: the answer is no range")
            _insist_same(info, int(said[2]), answer.get("ETag"))
            # A range of the same length that is somewhere else.
            if int(said[1]) != offset:
                raise DamagedAnswerError(f"{what}: the answer is from {said[1]}")
            _write(body.iter_chunks(PIECE_BYTES), info, offset, length, write)

    try:
        if is_plain(info.key):
            requests.make(ask, what, stop, receives=length)
        else:
            requests.bandwidth.download.take(length, stop)
            requests.boto(ask_boto, what, stop)
    except (ObjectExistsError, ObjectAbsentError, RangeUnsatisfiableError) as error:
        raise changed(info) from error


def is_plain(key: str) -> bool:
    """Return whether obstore takes a key as it is."""
    return not _CONTROL.search(key) and not _SPECIAL & set(key.split("/"))


def changed(info: ObjectInfo) -> PropmasterError:
    """Return the error for an object that is not there any more as it was."""
    return ObjectChangedError(
        f"{info.url}: it was replaced or deleted since it was looked at",
        hint="Look at it again: begin anew with what is there now.",
    )


def _insist_same(info: ObjectInfo, size: int, etag: str | None) -> None:
    if size != info.size or (info.etag and etag and etag != info.etag):
        raise changed(info)


def _write(
    pieces: "Iterable[Buffer]", info: ObjectInfo, offset: int, length: int, write: parts.Write
) -> None:
    received = 0
    for piece in pieces:
        count = memoryview(piece).nbytes
        if received + count <= length:
            write(piece, offset + received)
        received += count
    if received != length:
        raise DamagedAnswerError(f"{info.url}: {received} bytes instead of {length}")
