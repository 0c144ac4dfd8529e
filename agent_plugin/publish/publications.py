"""What executions published, as their result documents tell of it, and how a failure names them.

What can not be had is told of all executions at once, each with its document, and with the option
that brings the others: nothing is left out without having been named.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from agent_plugin.content.errors import CancelledError, PropmasterError
from agent_plugin.content.manifest import FileEntry
from agent_plugin.publish.contents import read_contents
from agent_plugin.publish.result_documents import Result, ResultsDocument
from agent_plugin.transfer.asking import Asking

_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Origin:
    """The execution that something is of.

    Attributes:
        execution: What it is called; one component of a path.
        document: Its result document.
        of: How many executions are wanted in all.
    """

    execution: str
    document: ResultsDocument
    of: int

    @property
    def when(self) -> tuple[float, str]:
        """By what executions are ordered."""
        return self.document.published_at, self.execution

    def __str__(self) -> str:
        return f"{self.execution} (Manifests/{self.document.key})"

    def blamed(self, error: PropmasterError) -> PropmasterError:
        """Return an error that names execution and document, and how to do without them."""
        without = f"the other executions come with --without {self.execution}"
        hints = (error.hint.rstrip("."), without if self.of > 1 else "")
        blamed = type(error)(
            f"what execution {self} published can not be had: {error.message}",
            hint="; ".join(filter(None, hints)),
        )
        blamed.__cause__ = error
        return blamed


@dataclass(frozen=True, slots=True)
class Publication:
    """One result of an execution, as its document tells of it.

    Attributes:
        origin: The execution.
        result: One of its results.
        files: Those that it has by path; None if nobody has written them down.
    """

    origin: Origin
    result: Result
    files: Mapping[str, FileEntry] | None

    @property
    def is_archive(self) -> bool:
        """Whether one object holds all files."""
        return not self.result.params.key.endswith("/")

    @property
    def place(self) -> tuple[str, str, str]:
        """What another result has in common that was published to the same place."""
        params = self.result.params
        return params.endpoint, params.bucket, params.key


def read_publications(
    documents: Mapping[str, ResultsDocument], asking: Asking, *, every: bool
) -> list[Publication]:
    """Return which results of executions are brought, with the lists of their files.

    All publishers of an execution publish the same files, but for those that people excluded of
    one; plain ones can be had without the rest.

    Args:
        documents: By execution.
        asking: Of the job's store.
        every: All of an execution's results, not only the one with most files, plain before others.

    Raises:
        PropmasterError: A list can not be had; the message names execution and document.
    """
    chosen = [
        (execution, index)
        for execution, document in documents.items()
        for index in chosen_results(document, every=every)
    ]
    of = len({execution for execution, _ in chosen})
    refusing = Refusing()
    asked = [
        asking.lanes.submit(partial(_read_contents, asking, documents[execution], index))
        for execution, index in chosen
    ]
    publications = []
    for (execution, index), future in zip(chosen, asked, strict=True):
        origin = Origin(execution, documents[execution], of)
        with refusing.catching(origin):
            files = asking.lanes.result(future, asking.cancellation)
            publications.append(Publication(origin, origin.document.results[index], files))
    refusing.refuse()
    return publications


def _read_contents(
    asking: Asking, document: ResultsDocument, index: int
) -> Mapping[str, FileEntry] | None:
    return read_contents(asking.open_store(), document, index)


def chosen_results(document: ResultsDocument, *, every: bool) -> Sequence[int]:
    """Return which of a document's results are brought; see `read_publications`."""
    results = document.results
    if every:
        return range(len(results))
    if not results:
        return []
    files = [contents.files for contents in document.contents] or [0] * len(results)
    return [
        min(
            range(len(results)),
            key=lambda at: (-files[at], not results[at].params.key.endswith("/")),
        )
    ]


class Refusing:
    """Gathers why executions can not be had, so that all are told at once."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[Origin, PropmasterError]] = {}

    @contextmanager
    def catching(self, origin: Origin) -> Iterator[None]:
        """Note a failure of the block as that of an execution, and go on after it."""
        try:
            yield
        except CancelledError:
            raise
        except PropmasterError as error:
            self._failures.setdefault(origin.execution, (origin, error))

    def refuse(self) -> None:
        """Do nothing if there was no failure.

        Raises:
            PropmasterError: There was; all are named.
        """
        if not self._failures:
            return
        failures = sorted(self._failures.values(), key=lambda failure: failure[0].when)
        origin, first = failures[0]
        if len(failures) == 1:
            raise origin.blamed(first)
        reasons = [f"{origin}: {error.message}" for origin, error in failures]
        more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        options = " ".join(f"--without {origin.execution}" for origin, _ in failures)
        without = f"the other executions come with {options}"
        hints = (first.hint.rstrip("."), without if len(failures) < origin.of else "")
        raise type(first)(
            f"what {len(reasons)} executions published can not be had: "
            + "; ".join(reasons[:_SHOWN])
            + more,
            hint="; ".join(filter(None, hints)),
        ) from first
