"""`get --published`: what publishers made of a job's results, as files on this host.

Plain objects become files; archives are verified, unpacked and thrown away, or brought as they are.
As for results in the store nothing is seen before all of it has come. Where executions are merged,
each has a hidden directory of its own first; their contents are compared when all are there, and
moved together only if none clashes.
"""

import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent_plugin.content.digest import hash_fd
from agent_plugin.content.errors import InputError, LocalError, LocalReadError, local_write_error
from agent_plugin.content.leftovers import (
    is_partial,
    partial_name,
    remove_partials,
    remove_tree,
)
from agent_plugin.content.safe_path import Root, split
from agent_plugin.content.store import Cancellation
from agent_plugin.publish.arrival import Arrival, arriving, move
from agent_plugin.publish.clashes import find_clashes, refuse
from agent_plugin.publish.fetching import Wanted, fetch
from agent_plugin.publish.getting import GetResult, GotExecution
from agent_plugin.publish.published import (
    PublishedResult,
    ResultServers,
    choose_results,
    find_published,
)
from agent_plugin.publish.result_documents import ResultsDocument
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
    """

    path: str
    merge: bool
    raw: bool
    overwrite: bool
    limits: UnpackLimits


@dataclass(slots=True)
class _Arrived:
    """An execution's files below the hidden directory, with their size, by path in its results."""

    at: str
    files: dict[str, int] = field(default_factory=dict)

    def below(self, path: str) -> str:
        return f"{self.at}/{path}" if self.at else path


def get_documents(
    documents: Mapping[str, ResultsDocument],
    context: TransferContext,
    servers: ResultServers,
    job_id: str,
    to: Path,
    wish: PublishedWish,
) -> GetResult:
    """Bring what result documents tell of: of each execution one result, or all that are raw.

    Args:
        documents: By execution.
        context: The services.
        servers: Where results are asked for.
        job_id: The job.
        to: Where the files go; absolute.
        wish: What is wanted, and how.

    Raises:
        PropmasterError: As find_published and get_published.
    """
    found = [
        find_published(name, document, result, servers, context)
        for name, document in documents.items()
        for result in choose_results(document, every=wish.raw)
    ]
    return get_published(found, context, job_id, to, wish)


def get_published(
    results: Sequence[PublishedResult],
    context: TransferContext,
    job_id: str,
    to: Path,
    wish: PublishedWish,
) -> GetResult:
    """Bring the files of published results, verified.

    Args:
        results: Of one job; several may be of one execution.
        context: The services.
        job_id: The job.
        to: Where they go; absolute.
        wish: What is wanted, and how.

    Raises:
        ResultClashError: Files that are to be in one place differ, or something else is there;
            nothing was moved.
        ArchiveUnsafeError: An archive is not what was published, or not safe to unpack.
        PropmasterError: Any other of the tree.
    """
    begun = time.monotonic()
    if not results:
        return GetResult(
            job=job_id,
            to=os.fspath(to),
            merged=False,
            executions=[],
            files=0,
            bytes=0,
            bytes_fetched=0,
            seconds=0.0,
        )
    with arriving(to) as arrival:
        try:
            arrived, fetched = _bring(results, context, job_id, arrival, wish)
            placed = _placed(arrived, arrival, context.cancellation, wish)
        except (InputError, LocalError):
            # Trying again changes nothing before somebody has done something.
            arrival.remove()
            raise
        except BaseException:
            arrival.remove_empty()
            raise
        if placed.moves:
            _place(placed, arrival, overwrite=wish.overwrite)
        else:
            arrival.remove()
    sizes = {had.below(path): size for had in arrived.values() for path, size in had.files.items()}
    return GetResult(
        job=job_id,
        to=os.fspath(to),
        merged=len(arrived) > 1 and wish.merge,
        executions=[
            GotExecution(
                execution,
                os.fspath(to / execution if _are_apart(arrived, wish) else to),
                len(had.files),
                sum(had.files.values()),
            )
            for execution, had in arrived.items()
        ],
        files=len(placed.moves),
        bytes=sum(sizes[at] for at in placed.moves.values()),
        bytes_fetched=fetched,
        seconds=round(time.monotonic() - begun, 3),
    )


def _bring(
    results: Sequence[PublishedResult],
    context: TransferContext,
    job_id: str,
    arrival: Arrival,
    wish: PublishedWish,
) -> tuple[dict[str, _Arrived], int]:
    """Return what has arrived in the hidden directory by execution, and the bytes that came."""
    several = len({result.execution for result in results}) > 1
    arrived: dict[str, _Arrived] = {}
    wanted: list[Wanted] = []
    archives: list[tuple[_Arrived, Wanted]] = []
    path = "/".join(split(wish.path))
    for result in results:
        execution = result.execution
        # No result can have such a name, so that moving one out of it meets none.
        had = arrived.setdefault(execution, _Arrived(partial_name(execution) if several else ""))
        for published in result.found:
            if published.is_archive and not wish.raw:
                place = partial_name(f"archive-{execution}-{len(archives)}")
                archive = Wanted(result.objects, published, place)
                archives.append((had, archive))
                wanted.append(archive)
            elif not path or published.path == path or published.path.startswith(f"{path}/"):
                had.files[published.path] = published.info.size
                wanted.append(Wanted(result.objects, published, had.below(published.path)))
    _keep_only(arrival, wanted)
    spec = TransferSpec(
        kind="get",
        source=results[0].result.url,
        destination=os.fspath(arrival.target),
        job=job_id,
    )
    with Root(arrival.hidden, follow=False) as root:
        fetched = fetch(wanted, root, context, spec)
        for had, archive in archives:
            _unpack(archive, had, root, context.cancellation, wish)
    return {execution: had for execution, had in arrived.items() if had.files}, fetched


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
    archive: Wanted, had: _Arrived, root: Root, cancellation: Cancellation, wish: PublishedWish
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
    arrived: Mapping[str, _Arrived],
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
            contents = {
                execution: {
                    path: _content(root, had.below(path), cancellation) for path in had.files
                }
                for execution, had in arrived.items()
            }
            refuse(
                find_clashes(contents),
                "results can not stand in one directory",
                "leave --merge out, or take one execution with --execution",
            )
        for execution, had in arrived.items():
            above = f"{execution}/" if _are_apart(arrived, wish) else ""
            moves.update({above + path: had.below(path) for path in had.files})
        kept: set[str] = set()
        if not arrival.fresh:
            with Root(arrival.target) as target:
                for path, at in moves.items():
                    if _content(target, path, cancellation) == _content(root, at, cancellation):
                        kept.add(path)
    arrival.refuse_standing([path for path in moves if path not in kept], overwrite=wish.overwrite)
    return _Placed(moves, frozenset(kept))


def _are_apart(arrived: Mapping[str, _Arrived], wish: PublishedWish) -> bool:
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


def _content(root: Root, path: str, cancellation: Cancellation) -> object:
    """Return something that is equal for equal content only; None if nothing is there."""
    parent, _, name = path.rpartition("/")
    try:
        with root.holding(parent, create=False) as directory:
            mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                return ("link", os.readlink(name, dir_fd=directory))
            if not stat.S_ISREG(mode):
                return ("other", path)
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalReadError(f"{root.path}/{path}: {error.strerror}") from error
    try:
        return hash_fd(fd, cancellation=cancellation)
    finally:
        os.close(fd)
