"""Which files a publication has, kept beside its result document in the form of a manifest.

Published objects can be deleted, replaced, or joined by others, and of an archive nobody sees from
outside what is in it. So what was published is known by this list alone: what of it is missing,
what is somebody else's, and what is in place already.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from agent_plugin.content.digest import hash_of
from agent_plugin.content.errors import DocumentNotFoundError, ManifestInvalidError
from agent_plugin.content.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    decode,
    encode,
)
from agent_plugin.content.store import Store
from agent_plugin.publish.outputs import RootOutputs, published_path, shown_path
from agent_plugin.publish.result_documents import Contents, Published, ResultsDocument
from agent_plugin.publish.spec import Publisher


def list_contents(
    document: ResultsDocument,
    turns: Sequence[Published],
    publishers: Sequence[Publisher],
    roots: Sequence[RootOutputs],
) -> tuple[ResultsDocument, dict[str, bytes]]:
    """Return a document that tells of its results' files, and the lists of them by key.

    Args:
        document: Of an execution, without contents.
        turns: What became of the publishers' turns, of which the document is.
        publishers: Those whose turns they were.
        roots: What the execution left; with files.
    """
    contents: list[Contents] = []
    lists: dict[str, bytes] = {}
    for turn in turns:
        if turn.result is None:
            continue
        excluded = frozenset(turn.excluded.paths if turn.excluded is not None else ())
        manifest = _listed(roots, excluded, by_root=publishers[turn.publisher].params.by_root)
        data = encode(manifest)
        contents.append(Contents(len(manifest), manifest.total_bytes, hash_of(data)))
        lists[document.contents_key(contents[-1])] = data
    return msgspec.structs.replace(document, contents=contents), lists


def _listed(roots: Sequence[RootOutputs], excluded: AbstractSet[str], *, by_root: bool) -> Manifest:
    entries = (
        msgspec.structs.replace(entry, path=published_path(root, entry, by_root=by_root))
        for root in roots
        for entry in root.entries
    )
    return Manifest.of(entry for entry in entries if shown_path(entry.path) not in excluded)


def read_contents(
    store: Store, document: ResultsDocument, index: int
) -> Mapping[str, FileEntry] | None:
    """Return the files of a result by path; None if its document does not tell.

    Args:
        store: The job's.
        document: The execution's.
        index: Of the result in the document.

    Raises:
        DocumentNotFoundError: The list is not there.
        ManifestInvalidError: It is not the one that the document tells of.
        StoreAccessError, StoreUnavailableError: It can not be had.
    """
    if not document.contents:
        return None
    contents = document.contents[index]
    key = document.contents_key(contents)
    try:
        data = store.get_document(key, max_bytes=MAX_MANIFEST_BYTES).data
    except DocumentNotFoundError as error:
        raise DocumentNotFoundError(
            f"the list of the published files, {key}, is not there",
            hint="results are kept in the store: see which lifecycle rule removes them",
        ) from error
    if (actual := hash_of(data)) != contents.hash:
        raise ManifestInvalidError(
            f"{key} is not the list that the result document tells of: its xxh128 is {actual},"
            f" not {contents.hash}",
            hint="somebody changed it",
        )
    return decode(data, source=key).by_path()
