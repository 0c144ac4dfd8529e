"""What attributes transfers and tasks have: their names, their kinds, what may be done with them.

One list for all that speaks of attributes: queries, the dicts that the API returns, what `create`
and `update` accept, and the answers to `attributes WHERE entitytype=…`. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from agent_plugin.transfer.query import Comparison, Entity, nearest, refuse
from agent_plugin.transfer.states import PRIORITIES, TaskStatus, TransferStatus


class Kind(StrEnum):
    """How the values of an attribute are written and compared."""

    TEXT = "text"  # any, whatever the case
    USER = "user"  # `uid:name`, or the name alone
    STATUS = "status"  # one of a few words
    ID = "id"  # a number; that of another system is nothing's here
    NUMBER = "number"
    PRIORITY = "priority"  # a number, or high, medium, low
    BYTES = "bytes"  # 5000, 10MB, "1.5 GiB"
    DURATION = "duration"  # seconds, 90s, 5m, 2h, 1:30:00
    TIME = "time"  # a date, a date and a time, seconds since the epoch, or -15m: ago
    FLAG = "flag"  # true or false
    DOCUMENT = "document"  # JSON; its keys follow, each after a dot


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of an entity.

    Attributes:
        name: As dicts have it.
        kind: How it is compared.
        sql: Its value, over the tables of the entity and the functions of query_sql.py.
        about: A line for people.
        create: Whether it can be given when the thing is made.
        update: Whether it can be changed afterwards.
        words: The only values that it has; empty when there are others.
        aliases: Other names that queries may use.
    """

    name: str
    kind: Kind
    sql: str
    about: str
    create: bool = False
    update: bool = False
    words: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_WORDS: Final = " ".join(f"WHEN {number} THEN '{word}'" for word, number in PRIORITIES.items())
_URI: Final = f"CASE transfer.priority {_WORDS} ELSE CAST(transfer.priority AS TEXT) END"
_USER: Final = "user_of(transfer.id, transfer.created)"

_K = Kind


def _priority(table: str) -> Attribute:
    about = "0 to 1000, higher first"
    sql = f"{table}.priority"
    return Attribute("priority", _K.PRIORITY, sql, about, create=True, update=True)


def _metadata(table: str) -> Attribute:
    about = "whatever its owner keeps with it"
    sql = f"{table}.metadata"
    return Attribute("metadata", _K.DOCUMENT, sql, about, create=True, update=True)


def _failure(table: str) -> tuple[Attribute, Attribute]:
    return (
        Attribute("error_code", _K.TEXT, f"{table}.error_code", "why it failed, for programs"),
        Attribute("error", _K.TEXT, f"{table}.error", "why it failed, for people"),
    )


TRANSFER: Final = (
    Attribute("id", _K.ID, "transfer.id", "its number", aliases=("entityid",)),
    Attribute("code", _K.TEXT, "transfer.name", "its name", create=True, aliases=("name",)),
    Attribute("uri", _K.TEXT, _URI, "where it is queued: high, medium, low or its priority"),
    Attribute("kind", _K.TEXT, "transfer.kind", "what it is for: sync-in, sync-out, copy, …"),
    Attribute(
        *("status", _K.STATUS, "transfer.status", "what it is doing"),
        create=True,
        update=True,
        words=tuple(TransferStatus),
    ),
    _priority("transfer"),
    Attribute("required", _K.FLAG, "transfer.required", "whether its session waits for it"),
    Attribute("source", _K.TEXT, "transfer.source", "where from", create=True),
    Attribute(
        *("destination", _K.TEXT, "transfer.destination", "where to; can be set while pending"),
        create=True,
        update=True,
    ),
    Attribute("session", _K.TEXT, "transfer.session", "the session it belongs to"),
    Attribute("parent", _K.TEXT, "transfer.job", "the farm's job it belongs to", aliases=("job",)),
    Attribute("step", _K.TEXT, "transfer.step", "the farm's step it belongs to"),
    Attribute("task", _K.TEXT, "transfer.task", "the farm's task it belongs to"),
    Attribute("size", _K.BYTES, "transfer.size", "bytes in all; -1 until that is known"),
    Attribute("done", _K.BYTES, "transfer.done", "bytes in place"),
    Attribute(
        *("progress", _K.NUMBER, "progress_of(transfer.status, transfer.size, transfer.done)"),
        "percent, rounded down; 100 only when it is done",
    ),
    Attribute("speed", _K.NUMBER, "speed_of(transfer.id)", "MB/s over the last minute"),
    Attribute("etr", _K.DURATION, "etr_of(transfer.id)", "time left, H:MM:SS; empty if unknown"),
    *_failure("transfer"),
    Attribute("user", _K.USER, _USER, "who made it", aliases=("user_hr",)),
    Attribute("modifier", _K.USER, "transfer.modifier", "who changed it last by hand"),
    Attribute("created", _K.TIME, "transfer.created", "when it was made"),
    Attribute("modified", _K.TIME, "transfer.modified", "when it changed last"),
    Attribute("finished", _K.TIME, "transfer.finished", "when it ended; null while it has not"),
    _metadata("transfer"),
    Attribute(
        "settings", _K.DOCUMENT, "transfer.settings", "what its engine is to heed", create=True
    ),
)

TASK: Final = (
    Attribute("id", _K.ID, "task.id", "its number"),
    Attribute("uri", _K.TEXT, "task.uri", 'its name within the transfer: "0", "1", …', create=True),
    Attribute("job", _K.ID, "task.transfer", "its transfer", aliases=("transfer", "entityid")),
    Attribute(
        *("status", _K.STATUS, "task.status", "what it is doing"),
        update=True,
        words=tuple(TaskStatus),
    ),
    Attribute(
        *("source", _K.TEXT, "place_of(task.source)", "where from: a hash, a path or a URL"),
        create=True,
        aliases=("source.path",),
    ),
    Attribute(
        *("destination", _K.TEXT, "place_of(task.destination)"),
        "where to: a path, a hash or a URL",
        create=True,
        aliases=("destination.path",),
    ),
    _priority("task"),
    Attribute("size", _K.BYTES, "task.size", "bytes"),
    Attribute("done", _K.BYTES, "task.done", "bytes of it in place"),
    Attribute("tries", _K.NUMBER, "task.tries", "attempts begun"),
    Attribute("not_before", _K.TIME, "nullif(task.not_before, 0)", "when it is tried again"),
    *_failure("task"),
    Attribute("modifier", _K.USER, "task.modifier", "who set its status by hand"),
    Attribute("created", _K.TIME, "nullif(task.created, 0)", "when it was made"),
    Attribute("started", _K.TIME, "task.started", "when it was tried first"),
    Attribute("finished", _K.TIME, "task.finished", "when it ended; null while it has not"),
    Attribute("time", _K.DURATION, "(task.finished - task.started)", "seconds that it took"),
    _metadata("task"),
)

_OF_ATTRIBUTES: Final = (
    Attribute("entitytype", _K.TEXT, "attribute.entitytype", "of what it is an attribute"),
    Attribute("name", _K.TEXT, "attribute.name", "its name"),
    Attribute("type", _K.TEXT, "attribute.type", "how it is compared"),
    Attribute("create", _K.FLAG, 'attribute."create"', "whether it can be given to create"),
    Attribute("update", _K.FLAG, 'attribute."update"', "whether it can be changed"),
    Attribute("about", _K.TEXT, "attribute.about", "a line for people"),
)
_OF_ENTITYTYPES: Final = (
    Attribute("entitytype", _K.TEXT, "entitytype.entitytype", "what queries can be about"),
    Attribute("about", _K.TEXT, "entitytype.about", "a line for people"),
)

ATTRIBUTES: Final[Mapping[Entity, Sequence[Attribute]]] = {
    Entity.TRANSFER: TRANSFER,
    Entity.TASK: TASK,
    Entity.ARTIFACT: TASK,
    Entity.ATTRIBUTES: _OF_ATTRIBUTES,
    Entity.ENTITYTYPES: _OF_ENTITYTYPES,
}
ABOUT: Final[Mapping[str, str]] = {
    "transfer": "one movement of one tree of files",
    "job": "the same: what the accsyn API calls a transfer",
    "task": "one file of a transfer",
    "artifact": "one file of a transfer whose kind is artifact",
    "attributes": "the attributes that there are",
    "entitytypes": "this list",
}

_BY_NAME: Final = {
    entity: {name: each for each in attributes for name in (each.name, *each.aliases)}
    for entity, attributes in ATTRIBUTES.items()
}
_OF_THE_TRANSFER: Final = frozenset({"job", "transfer"})


def named(entity: Entity, name: str) -> Attribute | None:
    """Return the attribute of an entity by its name or one of its other names, in any case."""
    return _BY_NAME[entity].get(name.lower())


def resolve(entity: Entity, comparison: Comparison) -> tuple[Attribute, tuple[str, ...]]:
    """Return the attribute that is compared, and the keys into it if it is a document.

    Raises:
        QueryInvalidError: There is no such attribute; those that there are.
    """
    parts = comparison.attribute
    if found := named(entity, ".".join(parts)):
        return found, ()
    document = named(entity, parts[0])
    if document is not None and document.kind is Kind.DOCUMENT:
        return document, parts[1:]
    of_task = entity in (Entity.TASK, Entity.ARTIFACT)
    if not (of_task and len(parts) > 1 and parts[0].lower() in _OF_THE_TRANSFER):
        name, names = ".".join(parts), [each.name for each in ATTRIBUTES[entity]]
        refuse(
            f'{entity} has no attribute "{name}"{nearest(name, _BY_NAME[entity])}',
            comparison.place,
            hint=f"its attributes: {', '.join(names)}",
        )
    return resolve(Entity.TRANSFER, replace(comparison, attribute=parts[1:]))
