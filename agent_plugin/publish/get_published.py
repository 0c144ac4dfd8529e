"""`get --published`: what publishers made of a job's results, as files on this host.

Plain objects become files; archives are verified, unpacked and thrown away, or brought as they are.
As for results in the store nothing is seen before all of it has come. Where executions are merged,
each has a hidden directory of its own first; their contents are compared when all are there, and
moved together only if none clashes.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent_plugin.content.errors import (
    ArchiveUnsafeError,
    InputError,
    LocalError,
    LocalReadError,
    local_write_error,
)
from agent_plugin.content.leftovers import (
    is_partial,
    partial_name,
    remove_partials,
    remove_tree,
)
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.safe_path import Root, split
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.arrival import Arrival, arriving, move
from agent_plugin.publish.clashes import Clash, find_clashes, refuse
from agent_plugin.publish.fetching import Wanted, fetch
from agent_plugin.publish.getting import GetResult, GotExecution
from agent_plugin.publish.in_place import content_of, find_kept, is_archive_kept
from agent_plugin.publish.publications import read_publications
from agent_plugin.publish.published import (
    PublishedObject,
    PublishedResult,
    find_published,
    is_below,
    refuse_lost,
)
from agent_plugin.publish.result_documents import ResultsDocument
from agent_plugin.publish.servers import ResultServers
from agent_plugin.publish.unpack import UnpackLimits, unpack
from agent_plugin.transfer.context import TransferContext
from agent_plugin.transfer.ledger import TransferSpec


@dataclass(frozen=True, slots=True)
class PublishedWish:
    """What of published results is wanted, and how.

    Attributes:
        path: Only this file, or those in this directory; empty for all.
        merge: Have the files of all executions in one directory.
        raw: Bring archives as they are.
        overwrite: Whether other files that stand there give way.
        limits: How much an archive may become.
        clash_hint: What to do if executions have different files of one path.
    """

    path: str
    merge: bool
    raw: bool
    overwrite: bool
    limits: UnpackLimits
    clash_hint: str = "leave --merge out, or take one execution with --execution"

    @property
    def below(self) -> str:
        """The path as results are spelled."""
        return "/".join(split(self.path))


@dataclass(slots=True)
class _Had:
    """An execution's files with their size, by path in its results.

    Attributes:
        at: Where they arrive, below the hidden directory.
        files: Those that have arrived.
        kept: Those that are in place already.
    """

    at: str
    files: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    def below(self, path: str) -> str:
        return f"{self.at}/{path}" if self.at else path

    @property
    def sizes(self) -> dict[str, int]:
        return self.kept | self.files


def get_published(
    documents: Mapping[str, ResultsDocument],
    context: TransferContext,
    servers: ResultServers,
    job_id: str,
    to: Path,
    wish: PublishedWish,
) -> GetResult:
    """Bring what result documents tell of, verified; what is in place already stays.

    Of each execution one result comes, or all that are raw. What a later execution has replaced of
    an earlier one is left out, and told.

    Args:
        documents: By execution.
        context: The services.
        servers: Where results are asked for.
        job_id: The job.
        to: Where the files go; absolute.
        wish: What is wanted, and how.

    Raises:
        ResultClashError: Files that are to be in one place differ, or something else is there;
            nothing was moved.
        ArchiveUnsafeError: An archive is not what was published, or not safe to unpack.
        PropmasterError: Any other of the tree; of an object it names the execution.
    """
    begun = time.monotonic()
    publications = read_publications(documents, context, every=wish.raw)
    result = GetResult(
        job=job_id,
        to=os.fspath(to),
        merged=False,
        executions=[],
        files=0,
        bytes=0,
        bytes_fetched=0,
        seconds=0.0,
    )
    if not publications:
        return result
    with arriving(to) as arrival:
        try:
            found = find_published(publications, servers, context, wish.below)
            had, result.bytes_fetched, result.excluded = _bring(
                found, context, job_id, arrival, wish
            )
            placed = _placed(had, arrival, context.cancellation, wish)
        except (InputError, LocalError):
            # Trying again changes nothing before somebody has done something.
            arrival.remove()
            raise
        except BaseException:
            arrival.remove_empty()
            raise
        if placed.moves and (arrival.fresh or placed.moves.keys() - placed.kept):
            _place(placed, arrival, overwrite=wish.overwrite)
        else:
            arrival.remove()
    apart = _are_apart(had, wish)
    result.merged = len(had) > 1 and wish.merge
    result.executions = [
        GotExecution(
            execution,
            os.fspath(to / execution if apart else to),
            len(each.sizes),
            sum(each.sizes.values()),
        )
        for execution, each in had.items()
    ]
    sizes = {
        _target(execution, path, apart=apart): size
        for execution, each in had.items()
        for path, size in each.sizes.items()
    }
    result.files, result.bytes = len(sizes), sum(sizes.values())
    result.replaced = [told for each in found for told in each.told_replaced(wish.below)]
    result.seconds = round(time.monotonic() - begun, 3)
    return result


def _target(execution: str, path: str, *, apart: bool) -> str:
    return f"{execution}/{path}" if apart else path


def _bring(
    results: Sequence[PublishedResult],
    context: TransferContext,
    job_id: str,
    arrival: Arrival,
    wish: PublishedWish,
) -> tuple[dict[str, _Had], int, list[str]]:
    """Return what executions have in place or in the hidden directory, and the bytes that came.

    And the URLs of the objects that people have excluded.

    Raises:
        PropmasterError: As get_published.
    """
    results = [each for each in results if _has_any(each, wish)]
    several = len({each.execution for each in results}) > 1
    # No result can have such a name, so that moving one out of it meets none.
    had = {
        each.execution: _Had(partial_name(each.execution) if several else "") for each in results
    }
    _note_kept(results, had, arrival, context, wish)
    refuse_lost(results)
    archives = [] if wish.raw else [*_packed(results, had, wish)]
    wanted = [*_wanted(results, had, wish), *archives]
    _keep_only(arrival, wanted)
    if not wanted:
        return had, 0, []
    spec = TransferSpec(
        kind="get",
        source=results[0].result.url,
        destination=os.fspath(arrival.target),
        job=job_id,
    )
    with Root(arrival.hidden, follow=False) as root:
        fetched, excluded = fetch(wanted, root, context, spec)
        for each in excluded - {*archives}:
            del had[each.of.execution].files[each.published.path]
        for archive in (each for each in archives if each not in excluded):
            try:
                _unpack(archive, had[archive.of.execution], root, context.cancellation, wish)
            except ArchiveUnsafeError as error:
                raise archive.of.publication.origin.blamed(error) from error
    had = {execution: each for execution, each in had.items() if each.sizes}
    return had, fetched, sorted(each.published.info.url for each in excluded)


def _packed(
    results: Sequence[PublishedResult], had: Mapping[str, _Had], wish: PublishedWish
) -> Iterator[Wanted]:
    """Yield the archives that have to be unpacked; an execution has one at most."""
    for each in results:
        files = each.files(wish.below)
        if files is None or files.keys() - had[each.execution].kept.keys():
            for found in each.found:
                if found.is_archive:
                    yield Wanted(each, found, partial_name(f"archive-{each.execution}"))


def _wanted(
    results: Sequence[PublishedResult], had: Mapping[str, _Had], wish: PublishedWish
) -> Iterator[Wanted]:
    """Yield the objects that become files as they are, and note them.

    Raises:
        ResultClashError: Two publishers of one execution have published different ones of one name.
    """
    first: dict[str, PublishedObject] = {}
    for each in results:
        of_execution = had[each.execution]
        for found in each.found:
            is_file = not found.is_archive or (wish.raw and is_below(found.path, wish.below))
            if not is_file or found.path in of_execution.kept:
                continue
            at = f"{each.execution}/{found.path}"
            if (other := first.setdefault(at, found)) is not found:
                if not found.is_like(other):
                    refuse(
                        [Clash(at, (other.info.url, found.info.url))],
                        "publishers of one execution have published different files of one name",
                        "leave --raw out; `propmaster results JOB` tells where each is",
                    )
                continue
            of_execution.files[found.path] = found.info.size
            yield Wanted(each, found, of_execution.below(found.path))


def _has_any(result: PublishedResult, wish: PublishedWish) -> bool:
    """Tell whether a result has anything that is wanted, as far as that is known."""
    if not result.found and not result.lost:
        return False
    if result.publication.is_archive and wish.raw:
        return any(is_below(each.path, wish.below) for each in result.found) or bool(result.lost)
    return result.files(wish.below) != {}


def _note_kept(
    results: Sequence[PublishedResult],
    had: Mapping[str, _Had],
    arrival: Arrival,
    context: TransferContext,
    wish: PublishedWish,
) -> None:
    """Note what is in place already, and is needed from nowhere.

    Raises:
        ResultClashError: Files that are to be in one place differ.
        PropmasterError: As `find_kept`.
    """
    if (known := _known_files(results, wish)) is None:
        return
    apart = _are_apart(had, wish)
    if not apart:
        _refuse_clashes(
            {
                execution: {path: entry.digest for path, entry in files.items()}
                for execution, files in known.items()
            },
            wish.clash_hint,
        )
    places = {
        (execution, path): _target(execution, path, apart=apart)
        for execution, files in known.items()
        for path in files
    }
    in_place = find_kept(
        {at: known[execution][path] for (execution, path), at in places.items()}, arrival, context
    )
    for (execution, path), at in places.items():
        if at in in_place:
            had[execution].kept[path] = known[execution][path].size
    for each in results:
        if each.publication.is_archive and wish.raw:
            for archive in each.found:
                at = _target(each.execution, archive.path, apart=apart)
                if is_archive_kept(archive, at, arrival, context.cancellation):
                    had[each.execution].kept[archive.path] = archive.info.size
        else:
            each.forget_lost(had[each.execution].kept.keys(), wish.below)


def _known_files(
    results: Sequence[PublishedResult], wish: PublishedWish
) -> dict[str, dict[str, FileEntry]] | None:
    """Return the files that executions have; None if that is not known before they have come.

    Then where they go is not known either: of several executions some may have nothing.
    """
    known: dict[str, dict[str, FileEntry]] = {each.execution: {} for each in results}
    for each in results:
        if each.publication.is_archive and wish.raw:
            continue
        files = each.files(wish.below)
        if files is None:
            return None
        known[each.execution] |= files
    return known


def _refuse_clashes(contents: Mapping[str, Mapping[str, object]], hint: str) -> None:
    refuse(
        find_clashes(contents),
        "executions have different files of one path",
        hint,
    )


def _keep_only(arrival: Arrival, wanted: Sequence[Wanted]) -> None:
    """Remove what an earlier run has unpacked, which archives are anew; fetched data stay."""
    keep = {each.at for each in wanted}
    try:
        with os.scandir(arrival.hidden) as entries:
            keep.update(
                entry.name
                for entry in entries
                if entry.is_file(follow_symlinks=False) and is_partial(entry.name)
            )
    except OSError as error:
        raise local_write_error(error, os.fspath(arrival.hidden)) from error
    arrival.keep_only(keep)


def _unpack(
    archive: Wanted, had: _Had, root: Root, cancellation: Cancellation, wish: PublishedWish
) -> None:
    try:
        fd = os.open(archive.at, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root.fd)
    except OSError as error:
        raise LocalReadError(f"{root.path}/{archive.at}: {error.strerror}") from error
    with os.fdopen(fd, "rb") as data:
        made = unpack(
            data,
            root,
            wish.limits,
            source=archive.published.info.url,
            below=had.at,
            only=wish.path,
            cancellation=cancellation,
        )
    had.files.update(made.files)
    had.files.update({path: len(os.fsencode(target)) for path, target in made.links.items()})


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where everything goes.

    Attributes:
        moves: By path below the target, that below the hidden directory.
        kept: Paths in the target that have what is to be there.
    """

    moves: Mapping[str, str]
    kept: frozenset[str]

    @property
    def as_it_is(self) -> bool:
        """Whether everything is where it is to be, once the hidden directory gets its name."""
        return all(path == at for path, at in self.moves.items())


def _placed(
    arrived: Mapping[str, _Had],
    arrival: Arrival,
    cancellation: Cancellation,
    wish: PublishedWish,
) -> _Placed:
    """Return where everything goes, if nothing stands in the way.

    Raises:
        ResultClashError: Results differ, or something else is there and may not be replaced.
    """
    moves: dict[str, str] = {}
    with Root(arrival.hidden, follow=False) as root:
        if wish.merge and len(arrived) > 1:
            _refuse_clashes(
                {
                    execution: {
                        path: content_of(root, had.below(path), cancellation) for path in had.files
                    }
                    for execution, had in arrived.items()
                },
                wish.clash_hint,
            )
        for execution, had in arrived.items():
            above = f"{execution}/" if _are_apart(arrived, wish) else ""
            moves.update({above + path: had.below(path) for path in had.files})
        kept: set[str] = set()
        if not arrival.fresh:
            with Root(arrival.target) as target:
                for path, at in moves.items():
                    if content_of(target, path, cancellation) == content_of(root, at, cancellation):
                        kept.add(path)
    arrival.refuse_standing([path for path in moves if path not in kept], overwrite=wish.overwrite)
    return _Placed(moves, frozenset(kept))


def _are_apart(arrived: Mapping[str, _Had], wish: PublishedWish) -> bool:
    return len(arrived) > 1 and not wish.merge


def _place(placed: _Placed, arrival: Arrival, *, overwrite: bool) -> None:
    moves = {path: at for path, at in placed.moves.items() if path not in placed.kept}
    if not arrival.fresh:
        arrival.move_in(moves, overwrite=overwrite)
        arrival.remove()
        return
    try:
        with Root(arrival.hidden, follow=False) as root:
            if not placed.as_it_is:
                # Into one directory while it is still hidden.
                move(moves, root, root)
                for at in {at.partition("/")[0] for at in placed.moves.values()}:
                    remove_tree(root.fd, at)
            # Archives, and what was left of objects that have changed.
            remove_partials(root.fd, exclusive=True)
    except OSError as error:
        raise local_write_error(error, os.fspath(arrival.hidden)) from error
    arrival.reveal()
