"""What publishers have published, found again: which objects a result stands for.

Result documents and buckets may be written by others. So a key becomes a path only as safe_path
allows, and what a document or an object's metadata promise of the bytes is compared with them.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from agent_plugin.content.bandwidth import Bandwidth
from agent_plugin.content.errors import JobInvalidError, UnsafePathError
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.manifest import MAX_ENTRIES
from agent_plugin.content.objects import ObjectAccess, ObjectInfo
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.s3_objects import S3Objects, open_objects
from agent_plugin.content.safe_path import split
from agent_plugin.publish.destination import EXECUTION, HASH
from agent_plugin.publish.result_documents import Result, ResultsDocument
from agent_plugin.transfer.asking import Asking


@dataclass(frozen=True, slots=True)
class PublishedObject:
    """One object of a result.

    Attributes:
        info: The object, as it is now.
        path: Of plain objects, in the results; of an archive the last component of its key.
        hash: The xxh128 that the publisher gave it, 32 hex digits; empty if unknown.
        sha256: What all of it has to have, 64 hex digits; empty if unknown.
        is_archive: Whether it holds the files.
    """

    info: ObjectInfo
    path: str
    hash: str = ""
    sha256: str = ""
    is_archive: bool = False


@dataclass(frozen=True, slots=True)
class PublishedResult:
    """One result of an execution, with its objects and who asks for them."""

    execution: str
    result: Result
    objects: S3Objects
    found: tuple[PublishedObject, ...]


class ResultServers:
    """The servers that results are on, each asked as the environment says.

    Args:
        environment: AWS variables.
        policy: When requests are sent again.
        bandwidth: How much may move.
    """

    def __init__(
        self, environment: Mapping[str, str], policy: RetryPolicy, bandwidth: Bandwidth
    ) -> None:
        self._environment = environment
        self._policy = policy
        self._bandwidth = bandwidth
        self._opened: dict[ObjectAccess, S3Objects] = {}

    def objects(self, result: Result) -> S3Objects:
        """Return what asks for a result's objects.

        Raises:
            SettingsInvalidError: Its endpoint makes no sense.
            StoreAccessError: There are no credentials.
        """
        access = ObjectAccess(endpoint=result.params.endpoint, region=result.params.region)
        if access not in self._opened:
            self._opened[access] = open_objects(
                access,
                environment=self._environment,
                policy=self._policy,
                bandwidth=self._bandwidth,
            )
        return self._opened[access]


def find_published(
    execution: str,
    document: ResultsDocument,
    result: Result,
    servers: ResultServers,
    asking: Asking,
) -> PublishedResult:
    """Return the objects that one result of an execution stands for.

    Plain objects are those below its key that the execution published, or nobody says who; several
    executions may publish below one key.

    Args:
        execution: What to call the execution; one component of a path.
        document: The execution's.
        result: One of its results.
        servers: Where it is asked for.
        asking: Whose threads ask.

    Raises:
        ObjectNotFoundError: The archive is not there, or not that version of it.
        UnsafePathError: A key can not become a path.
        JobInvalidError: The result's checksum is none.
        StoreError: Any other that a request ended with.
    """
    objects = asking.lanes.run(partial(servers.objects, result), asking.cancellation)
    params = result.params
    if not params.key.endswith("/"):
        info = asking.lanes.run(
            partial(objects.head, params.bucket, params.key, version=params.version_id),
            asking.cancellation,
        )
        name = _path(info, params.key.rpartition("/")[2])
        sha256 = _sha256_of(result)
        archive = PublishedObject(info, name, sha256=sha256, is_archive=True)
        return PublishedResult(execution, result, objects, (archive,))
    found_below = objects.list(params.bucket, params.key, cancellation=asking.cancellation)
    listed = asking.lanes.run(lambda: [*islice(found_below, MAX_ENTRIES + 1)], asking.cancellation)
    if len(listed) > MAX_ENTRIES:
        raise JobInvalidError(
            f"{result.url}: more than {MAX_ENTRIES} objects are below it",
            hint="the result document was changed, or others write below that key",
        )
    keys = [info.key for info in listed if not info.key.endswith("/")]
    asked = [asking.lanes.submit(partial(objects.head, params.bucket, key)) for key in keys]
    found = []
    for future in asked:
        info = asking.lanes.result(future, asking.cancellation)
        if info.metadata.get(EXECUTION, document.execution_id) == document.execution_id:
            path = _path(info, info.key.removeprefix(params.key))
            found.append(PublishedObject(info, path, hash=info.metadata.get(HASH, "")))
    return PublishedResult(execution, result, objects, tuple(found))


def choose_results(document: ResultsDocument, *, every: bool) -> Sequence[Result]:
    """Return which of an execution's results are brought: all, or the first, plain before others.

    All publishers publish the same files; plain ones can be had without the rest.
    """
    if every:
        return document.results
    return sorted(document.results, key=lambda result: not result.params.key.endswith("/"))[:1]


def _path(info: ObjectInfo, below: str) -> str:
    """Return the path that an object becomes, which is spelled as its key is."""
    parts = split(below)
    if "/".join(parts) != below or not parts or any(is_partial(part) for part in parts):
        raise UnsafePathError(
            f"{info.url!r} can not become a file of that name",
            hint="see who else publishes below that key, and remove the object",
        )
    return below


def _sha256_of(result: Result) -> str:
    """Return the SHA-256 that a result promises in hexadecimal digits, empty if it promises none.

    One of an object in parts (`…-2`), as other publishers give it, is none of the whole content.
    """
    checksum = result.params.checksum_sha256
    if not checksum or "-" in checksum:
        return ""
    try:
        digest = base64.b64decode(checksum, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != 32:  # noqa: PLR2004 - the length of a SHA-256
        raise JobInvalidError(
            f"{result.url}: {checksum[:80]!r} is no SHA-256 in base64",
            hint="the result document was damaged, or written by another program",
        )
    return digest.hex()
