"""What `create` is given: the document of a new transfer, or of tasks for one that there is.

A document is a dict, the same as JSON, or the path of a file with it. What stands in it is checked
here; what is below a source, and how large it is, is found by whoever copies (copy_places.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Final, Self

import msgspec
from msgspec import Meta

from agent_plugin.content.errors import (
    JobInvalidError,
    LocalReadError,
    ReadOnlyAttributeError,
)
from agent_plugin.content.named_file import open_named
from agent_plugin.transfer.copy_places import Place
from agent_plugin.transfer.ledger import TaskSpec, TransferSpec
from agent_plugin.transfer.ledger_rows import COPY
from agent_plugin.transfer.query import Entity, nearest
from agent_plugin.transfer.query_attributes import named
from agent_plugin.transfer.states import DEFAULT_PRIORITY, TransferStatus, priority_of

# Returns the tasks that copy each source to its destination, with their sizes: (what is wanted,
# settings of the transfer).
Expand = Callable[[Iterable[TaskSpec], Mapping[str, Any]], Iterable[TaskSpec]]

# A million tasks, as JSON.
MAX_DOCUMENT_BYTES: Final = 512 * 1024 * 1024
MAX_URI_CHARACTERS: Final = 255


class TaskDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task to be made.

    Attributes:
        source: A path or a URL; with a slash at its end, all below it.
        destination: The same; empty: below the transfer's destination.
        priority: 0 to 1000, or high, medium, low.
        metadata: Whatever its owner wants to keep with it.
        uri: Its name within the transfer; of a tree, whose files are numbered, it is none.
    """

    source: Annotated[str, Meta(min_length=1)]
    destination: str = ""
    priority: int | str = DEFAULT_PRIORITY
    metadata: dict[str, Any] = {}
    uri: str = ""


class TransferDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A transfer to be made; see `Attribute.create` for what each key means."""

    source: str = ""
    destination: str = ""
    tasks: list[str | TaskDocument] | dict[str, str | TaskDocument] = []
    code: str = ""
    name: str = ""
    status: TransferStatus = TransferStatus.WAITING
    priority: int | str = DEFAULT_PRIORITY
    settings: dict[str, Any] = {}
    metadata: dict[str, Any] = {}

    @classmethod
    def read(cls, data: Mapping[str, Any] | str | Path, entity: Entity) -> Self:
        """Return what a document says.

        Args:
            data: A dict, JSON, or the path of a file with JSON.
            entity: What is to be made; tasks are given by `tasks` alone.

        Raises:
            JobInvalidError: It says something that makes no sense, or a uri twice.
            ReadOnlyAttributeError: It gives an attribute that can not be given.
            LocalReadError: The file can not be read.
        """
        keys = _decoded(data)
        known = {"tasks"} if entity is Entity.TASK else set(cls.__struct_fields__)
        for key in keys:
            if key not in known:
                _refuse(key, entity, known)
        try:
            document = msgspec.convert(keys, cls)
        except msgspec.ValidationError as error:
            raise JobInvalidError(
                f"the {entity} to be made: {error}", hint="docs/PROTOCOL.md, The API"
            ) from error
        priority_of(document.priority)
        _check_uris([entry.uri for entry in document.entries if entry.uri])
        return document

    @property
    def entries(self) -> list[TaskDocument]:
        """The tasks; what they are called in an object is their uri."""
        if isinstance(self.tasks, dict):
            return [_entry(each, uri) for uri, each in self.tasks.items()]
        return [_entry(each) for each in self.tasks]

    def plan(self, expand: Expand) -> tuple[TransferSpec, Iterable[TaskSpec]]:
        """Return the transfer and its tasks.

        Raises:
            JobInvalidError: There is nothing to move, it is not said where to, or a place is none.
        """
        entries = self.entries
        if bool(self.source) == bool(entries):
            raise JobInvalidError(
                "a transfer has either a source or tasks",
                hint='give "source" and "destination", or "tasks"',
            )
        first = entries[0] if entries else TaskDocument(self.source, self.destination)
        destination = self.destination or first.destination
        title = self.name or self.code or first.source.rstrip("/").rpartition("/")[2]
        spec = TransferSpec(kind=COPY, source=first.source, destination=destination, title=title)
        if not entries and not destination:
            # Its tasks are made when it is said where they go.
            Place.parse(self.source)
            return spec, ()
        # All of them, before anything is written.
        wanted = entries or [first]
        return spec, _numbered(task_specs(wanted, self.destination, self.settings, expand))


def task_specs(
    entries: Sequence[TaskDocument],
    destination: str,
    settings: Mapping[str, Any],
    expand: Expand,
) -> Iterable[TaskSpec]:
    """Return the tasks of some entries.

    Args:
        entries: What is to be copied.
        destination: Of those that do not say where to; empty if there is none.
        settings: Of the transfer.
        expand: Finds what is below a source.

    Raises:
        JobInvalidError: It is not said where something goes.
    """
    return expand(_wanted(entries, destination), settings)


def _wanted(entries: Iterable[TaskDocument], destination: str) -> Iterator[TaskSpec]:
    for entry in entries:
        target = entry.destination or destination
        if not target:
            raise JobInvalidError(
                f"it is not said where {entry.source} goes",
                hint="give the task, or its transfer, a destination",
            )
        number = priority_of(entry.priority)
        yield TaskSpec(entry.source, target, 0, number, entry.metadata, entry.uri)


def _entry(given: str | TaskDocument, uri: str = "") -> TaskDocument:
    if isinstance(given, str):
        return TaskDocument(given, uri=uri)
    return given if given.uri else msgspec.structs.replace(given, uri=uri)


def _check_uris(uris: Sequence[str]) -> None:
    for uri, times in Counter(uris).items():
        if times > 1:
            raise JobInvalidError(f"{times} tasks have the uri {uri!r}", hint="give each its own")
        if len(uri) > MAX_URI_CHARACTERS or not uri.isprintable():
            raise JobInvalidError(
                f"{uri[:40]!r} is no uri of a task",
                hint=f"it has up to {MAX_URI_CHARACTERS} characters that can be printed",
            )


def _numbered(tasks: Iterable[TaskSpec]) -> list[TaskSpec]:
    """Give those that have no uri the next number that is none."""
    made = list(tasks)
    given = {task.uri for task in made if task.uri}
    if not given:
        return made
    numbers = (str(number) for number in count() if str(number) not in given)
    return [task if task.uri else replace(task, uri=next(numbers)) for task in made]


def redirected(source: str, place: str, *, before: str, after: str) -> str | None:
    """Return where a task goes whose transfer was to go to one place, and is to go to another.

    Args:
        source: The task's.
        place: Where it was to go.
        before: Where the transfer was to go.
        after: Where that goes now.

    Returns:
        None if the task was to go to a place of its own.

    Raises:
        JobInvalidError: It is no place, or there is nothing below it.
    """
    tree = Place.parse(after).is_tree
    # The ledger has them as URLs, whatever was said.
    for old, new in ((before, after), (_url(before), _url(after))):
        if place == old:
            return new + source.rpartition("/")[2] if tree else new
        if old.endswith("/") and place.startswith(old):
            if not tree:
                raise JobInvalidError(
                    f"several things can not all go to {after}",
                    hint="end the destination with a slash",
                )
            return new + place.removeprefix(old)
    return None


def _url(place: str) -> str:
    return Place.parse(place).url if place else ""


def _decoded(data: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return dict(data)
    text: str | bytes = data if isinstance(data, str) else b""
    if isinstance(data, Path) or not data.lstrip().startswith(("{", "[")):
        text = _read(Path(data))
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise JobInvalidError(
            f"what is to be made is no JSON object: {error}",
            hint="give an object, or the path of a file with one",
        ) from error


def _read(path: Path) -> bytes:
    try:
        with open_named(path) as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except FileNotFoundError as error:
        raise JobInvalidError(
            f"{path}: there is no such file", hint="give JSON, or the path of a file with it"
        ) from error
    except (OSError, ValueError) as error:
        raise LocalReadError(f"{path}: {error}") from error
    if len(data) > MAX_DOCUMENT_BYTES:
        raise JobInvalidError(
            f"{path} has more than {MAX_DOCUMENT_BYTES} bytes", hint="make several transfers"
        )
    return data


def _refuse(key: str, entity: Entity, known: Iterable[str]) -> None:
    expected = ", ".join(sorted(known))
    if named(entity, key) is not None:
        raise ReadOnlyAttributeError(
            f'"{key}" of a {entity} can not be given', hint=f"what can be: {expected}"
        )
    raise JobInvalidError(
        f'a {entity} has no attribute "{key}"{nearest(key, known)}', hint=f"it has: {expected}"
    )
