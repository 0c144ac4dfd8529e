"""What publishers have published, found again: which objects a result stands for.

Result documents and buckets may be written by others. So a server is asked only if it is allowed
(servers.py), a key becomes a path only as safe_path allows, and what a document or an object's
metadata promise of the bytes is compared with them.

Objects are known by the list of their files (contents.py): what else is below a key is nobody's
result. With Overwrite a later execution takes the keys of an earlier one; each object's metadata
tell whose it is now.
"""

import base64
import binascii
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final

import msgspec

from agent_plugin.content.errors import (
    JobInvalidError,
    ObjectChangedError,
    ObjectNotFoundError,
    PropmasterError,
    UnsafePathError,
)
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.manifest import MAX_ENTRIES, FileEntry
from agent_plugin.content.objects import SHA256, ObjectInfo
from agent_plugin.content.s3_objects import S3Objects
from agent_plugin.content.safe_path import split
from agent_plugin.publish.destination import EXECUTION, HASH
from agent_plugin.publish.publications import Publication, Refusing
from agent_plugin.publish.result_documents import Result
from agent_plugin.publish.servers import ResultServers
from agent_plugin.transfer.asking import Asking

_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class PublishedObject:
    """One object of a result.

    Attributes:
        info: The object, as it is now.
        path: Of plain objects, in the results; of an archive the last component of its key.
        entry: What a plain object has to be; None if nobody says.
        sha256: What all of an archive has to have, 64 hex digits; empty if unknown.
        is_archive: Whether it holds the files.
    """

    info: ObjectInfo
    path: str
    entry: FileEntry | None = None
    sha256: str = ""
    is_archive: bool = False

    def is_like(self, other: "PublishedObject") -> bool:
        """Whether both surely have the same content."""
        if self.entry is not None and other.entry is not None:
            return self.entry.digest == other.entry.digest
        return bool(self.sha256) and self.sha256 == other.sha256


class Replaced(msgspec.Struct):
    """What a later execution has published in the place of an earlier one's.

    Attributes:
        execution: The earlier one.
        by: The later one.
        place: Where both have published, `s3://bucket/key`.
        files: How many files of the earlier one are gone; 0 if nobody knows.
        of: How many it had, of those that were asked for.
    """

    execution: str
    by: str
    place: str
    files: int
    of: int


@dataclass(slots=True, eq=False)
class PublishedResult:
    """One result of an execution, with its objects and who asks for them.

    Attributes:
        publication: As its document tells of it.
        objects: Who asks for them.
        found: Those that are there.
        replaced: By path in the results (of an archive: its name), the id of the execution that
            has published something else there since.
        lost: By path, why an object that was published can not be had any more.
    """

    publication: Publication
    objects: S3Objects
    found: list[PublishedObject] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)
    lost: dict[str, PropmasterError] = field(default_factory=dict)

    @property
    def execution(self) -> str:
        """What the execution is called."""
        return self.publication.origin.execution

    @property
    def result(self) -> Result:
        """The result."""
        return self.publication.result

    def files(self, path: str) -> dict[str, FileEntry] | None:
        """Return the files that it brings by path; None if that is not known before they come.

        Args:
            path: Only this one, or those below it; normalised, empty for all.
        """
        listed = self.publication.files
        if self.publication.is_archive:
            if self.replaced:
                return {}
            if listed is None:
                return None
        elif listed is None:
            if any(each.entry is None for each in self.found):
                return None
            listed = {each.path: each.entry for each in self.found if each.entry is not None}
        return {
            below: entry
            for below, entry in listed.items()
            if is_below(below, path) and below not in self.replaced
        }

    def forget_lost(self, kept: AbstractSet[str], path: str) -> None:
        """Forget lost objects whose files are in place already.

        Args:
            kept: The paths of these files.
            path: As for `files`.
        """
        if self.publication.is_archive:
            files = self.files(path)
            if files is not None and not files.keys() - kept:
                self.lost.clear()
            return
        for below in self.lost.keys() & kept:
            del self.lost[below]

    def told_replaced(self, path: str) -> list[Replaced]:
        """Return what of it is another execution's by now; `path` as for `files`."""
        if not self.replaced:
            return []
        listed = self.publication.files
        of = sum(is_below(below, path) for below in listed or ())
        if self.publication.is_archive:
            [by] = self.replaced.values()
            return [Replaced(self.execution, by, self.result.url, of, of)]
        counted = Counter(self.replaced.values())
        return [
            Replaced(self.execution, by, self.result.url, files, of)
            for by, files in counted.items()
        ]


def find_published(
    publications: Sequence[Publication], servers: ResultServers, asking: Asking, path: str = ""
) -> list[PublishedResult]:
    """Return the objects that results stand for.

    Args:
        publications: Those that are wanted together: what one of them has replaced of another is
            told, and is no failure.
        servers: Where they are asked for.
        asking: Whose threads ask.
        path: Of plain objects only this one, or those below it; normalised, empty for all.

    Raises:
        PropmasterError: Something of them can not be asked for; the message names the executions
            and their documents.
    """
    refusing = Refusing()
    running = []
    for publication in publications:
        with refusing.catching(publication.origin):
            running.append(_Finding(publication, servers, asking, path))
    found = []
    for finding in running:
        with refusing.catching(finding.publication.origin):
            found.append(finding.result())
    refusing.refuse()
    _insist_replaced_by(found)
    return found


def refuse_lost(results: Sequence[PublishedResult]) -> None:
    """Do nothing if no object is lost.

    Args:
        results: What was found, without what is needed no more.

    Raises:
        PropmasterError: Some are; the message names executions, documents and objects.
    """
    refusing = Refusing()
    for each in results:
        if not each.lost:
            continue
        with refusing.catching(each.publication.origin):
            first = next(iter(each.lost.values()))
            if len(each.lost) == 1:
                raise first
            shown = "; ".join(error.message for error in [*each.lost.values()][:_SHOWN])
            more = f"; and {len(each.lost) - _SHOWN} more" if len(each.lost) > _SHOWN else ""
            raise type(first)(f"{len(each.lost)} objects: {shown}{more}", hint=first.hint)
    refusing.refuse()


def _insist_replaced_by(results: Sequence[PublishedResult]) -> None:
    """Take what was replaced by none of these results for lost."""
    places: dict[str, set[tuple[str, str, str]]] = {}
    for each in results:
        places.setdefault(each.publication.origin.document.execution_id, set()).add(
            each.publication.place
        )
    for each in results:
        place = each.publication.place
        for path, by in [*each.replaced.items()]:
            if place not in places.get(by, ()):
                del each.replaced[path]
                at = each.result.url + ("" if each.publication.is_archive else path)
                each.lost[path] = ObjectChangedError(
                    f"{at} was replaced: execution {by[:200]} has published there since",
                    hint="ask for that execution, too; or leave --published out: the store may"
                    " have these files still",
                )


class _Finding:
    """Asks for the objects of one result; several are asked for at once.

    Raises:
        PropmasterError: On creation and by `result`; no server may be asked, or it can not be.
    """

    def __init__(
        self, publication: Publication, servers: ResultServers, asking: Asking, path: str
    ) -> None:
        self.publication = publication
        self._asking = asking
        self._path = path
        self._own = publication.origin.document.execution_id
        self._objects = asking.lanes.run(
            partial(servers.objects, publication.result), asking.cancellation
        )
        self._found = PublishedResult(publication, self._objects)
        self._asked: dict[str, Future[ObjectInfo]] = {}
        params = publication.result.params
        if publication.is_archive:
            self._name = _path(publication.result.url, params.key.rpartition("/")[2])
            self._sha256 = _sha256_of(publication.result)
            self._ask(self._name, params.key, params.version_id)
        elif publication.files is None:
            for key in self._list():
                below = key.removeprefix(params.key)
                if is_below(below, path):
                    self._ask(_path(f"s3://{params.bucket}/{key}", below), key)
        else:
            for below in publication.files:
                if is_below(below, path):
                    self._ask(_path(publication.result.url + below, below), params.key + below)

    def _ask(self, path: str, key: str, version: str = "") -> None:
        bucket = self.publication.result.params.bucket
        head = partial(self._objects.head, bucket, key, version=version)
        self._asked[path] = self._asking.lanes.submit(head)

    def _list(self) -> list[str]:
        """Return the keys below a result's of which nobody has written down the files."""
        params = self.publication.result.params
        listed = self._objects.list(
            params.bucket, params.key, cancellation=self._asking.cancellation
        )
        infos = self._asking.lanes.run(
            lambda: [*islice(listed, MAX_ENTRIES + 1)], self._asking.cancellation
        )
        if len(infos) > MAX_ENTRIES:
            raise JobInvalidError(
                f"{self.publication.result.url}: more than {MAX_ENTRIES} objects are below it",
                hint="the result document was changed, or others write below that key",
            )
        return [info.key for info in infos if not info.key.endswith("/")]

    def result(self) -> PublishedResult:
        """Return what was found."""
        for path, future in self._asked.items():
            try:
                info = self._asking.lanes.result(future, self._asking.cancellation)
            except ObjectNotFoundError as error:
                self._found.lost[path] = ObjectNotFoundError(
                    error.message, hint="somebody deleted what was published"
                )
                continue
            if self.publication.is_archive:
                self._take_archive(info)
            elif self.publication.files is None:
                self._take_unlisted(path, info)
            else:
                self._take_plain(path, info, self.publication.files[path])
        return self._found

    def _take_archive(self, info: ObjectInfo) -> None:
        by = info.metadata.get(EXECUTION, self._own)
        is_same = bool(self._sha256) and info.metadata.get(SHA256) == self._sha256
        if by != self._own and not is_same:
            self._found.replaced[self._name] = by
            return
        self._found.found.append(
            PublishedObject(info, self._name, sha256=self._sha256, is_archive=True)
        )

    def _take_plain(self, path: str, info: ObjectInfo, entry: FileEntry) -> None:
        by = info.metadata.get(EXECUTION, self._own)
        if by != self._own and info.metadata.get(HASH) != entry.hash:
            self._found.replaced[path] = by
        elif info.size != entry.size:
            self._found.lost[path] = ObjectChangedError(
                f"{info.url} has {info.size} bytes, not {entry.size} as it was published",
                hint="somebody changed the object; the store may have the file still",
            )
        else:
            self._found.found.append(PublishedObject(info, path, entry))

    def _take_unlisted(self, path: str, info: ObjectInfo) -> None:
        if info.metadata.get(EXECUTION) != self._own:
            return
        hashed = info.metadata.get(HASH, "")
        entry = FileEntry(hashed, int(info.modified * 1_000_000), path, info.size)
        self._found.found.append(PublishedObject(info, path, entry if hashed else None))


def is_below(path: str, wanted: str) -> bool:
    """Tell whether a path is the one that is wanted, or below it; all are below an empty one."""
    return not wanted or path == wanted or path.startswith(f"{wanted}/")


def _path(url: str, below: str) -> str:
    """Return the path that an object becomes, which is spelled as its key is."""
    parts = split(below)
    if "/".join(parts) != below or not parts or any(is_partial(part) for part in parts):
        raise UnsafePathError(
            f"{url!r} can not become a file of that name",
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
