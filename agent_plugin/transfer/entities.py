"""What dicts of transfers and tasks have: their keys, and each value as Python has it. Pure.

The keys are the names of query_attributes.py and, of transfers, what the accsyn API says twice:
for programs, and for people (`…_hr`).
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from agent_plugin.content.errors import QueryInvalidError
from agent_plugin.transfer.ledger_file import from_sql
from agent_plugin.transfer.ledger_rows import from_json
from agent_plugin.transfer.progress import format_duration
from agent_plugin.transfer.query import Entity, nearest
from agent_plugin.transfer.query_attributes import ATTRIBUTES, Attribute, Kind, named

Found = dict[str, Any]


def end_of_task(path: str, place: str) -> dict[str, str]:
    """Return one end of a task: its path, and the whole one where that is a file of this host."""
    end = {"path": path}
    if path.startswith("/") or "://" in path:
        end["path_abs_final"] = path
    elif place.startswith("/"):
        end["path_abs_final"] = f"{place.rstrip('/')}/{path}"
    return end


def _readable(place: str) -> str:
    """Return a place with the word for what it is before it."""
    scheme, separator, rest = place.partition("://")
    if separator:
        return f"{'bucket' if scheme == 's3' else 'directory'}:{rest}"
    return f"directory:{place}" if place else ""


def _readable_user(user: str) -> str:
    return user.partition(":")[2] or user


def _same(text: str) -> str:
    return text


# By key: from which attribute, and how.
DERIVED: Final[Mapping[Entity, Mapping[str, tuple[str, Callable[[Any], Any]]]]] = {
    Entity.TRANSFER: {
        "name": ("code", _same),
        "job": ("parent", _same),
        "source_hr": ("source", _readable),
        "destination_hr": ("destination", _readable),
        "parent_hr": ("parent", lambda parent: f"job:{parent}" if parent else ""),
        "user_hr": ("user", _readable_user),
    }
}


def keys_of(entity: Entity, wanted: Sequence[str] | None) -> list[str]:
    """Return the keys that dicts of an entity get, in order.

    Raises:
        QueryInvalidError: One that is wanted is none of them.
    """
    keys: list[str] = []
    derived = DERIVED.get(entity, {})
    for attribute in ATTRIBUTES[entity]:
        keys += [attribute.name, *(key for key, (of, _) in derived.items() if of == attribute.name)]
    if wanted is None:
        return keys
    for key in wanted:
        if key not in keys:
            raise QueryInvalidError(
                f'{entity} has no attribute "{key}"{nearest(key, keys)}',
                hint=f"its attributes: {', '.join(keys)}",
            )
    return list(dict.fromkeys(wanted))


def attributes_for(entity: Entity, keys: Sequence[str]) -> list[Attribute]:
    """Return the attributes that some keys are made of."""
    derived = DERIVED.get(entity, {})
    names = dict.fromkeys(derived[key][0] if key in derived else key for key in keys)
    return [found for name in names if (found := named(entity, name))]


def value_of(attribute: Attribute, raw: Any) -> Any:  # noqa: ANN401 - whatever SQLite has
    """Return what a dict has for what SQLite gave."""
    if attribute.kind is Kind.TIME:
        return None if raw is None else datetime.fromtimestamp(raw, UTC)
    if attribute.kind is Kind.FLAG:
        return bool(raw)
    if attribute.kind is Kind.DOCUMENT:
        return from_json(raw)
    if attribute.name == "etr":
        return "" if raw is None else format_duration(int(raw))
    if isinstance(raw, float):
        return round(raw, 3)
    return from_sql(raw) if isinstance(raw, bytes) else raw
