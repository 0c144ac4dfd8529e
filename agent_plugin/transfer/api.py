"""Transfers and tasks for programs: find, make, change and put away, as the accsyn API spells it.

    session = Session(ledger)
    for job in session.find("Job WHERE status=failed"):
        session.update("job", job["id"], {"status": "waiting"})

What is found are dicts with the attributes of query_attributes.py. What is changed is written to
the ledger, where the engine that carries the transfer out sees it within a second. Nothing is kept
open between calls, so a session may be used from any thread and needs no closing.
"""

import json
import os
import pwd
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from agent_plugin.content.errors import (
    JobInvalidError,
    QueryInvalidError,
    ReadOnlyAttributeError,
    TransferStateError,
)
from agent_plugin.transfer.create import (
    Expand,
    TaskDocument,
    TransferDocument,
    redirected,
    task_specs,
)
from agent_plugin.transfer.entities import Found
from agent_plugin.transfer.find import EVERYWHERE, Scopes, Search, count_tasks, find, find_events
from agent_plugin.transfer.ledger import Ledger, TaskSpec
from agent_plugin.transfer.query import ENTITY_WORDS, MAX_QUERY_BYTES, Entity, nearest, parse
from agent_plugin.transfer.query_attributes import ATTRIBUTES, named
from agent_plugin.transfer.states import DROPPED, TransferStatus

Id = int | str
Data = Mapping[str, Any] | str | Path

_SQLITE_INTEGERS: Final = 2**63
_ASKED_FOR_BY_NAME: Final = 200


def _no_expansion(wanted: Iterable[TaskSpec], settings: Mapping[str, Any]) -> NoReturn:
    del wanted, settings
    raise TypeError("this session was made without `expand`, and can make no transfers")


class Session:
    """The transfers of a host.

    Args:
        ledger: The file; reading does not make it.
        expand: Finds what is below a source that is to be copied; only `create` needs it.
        clear: Told the number of a transfer of which, or of whose tasks, somebody has just said
            that nobody is to go on with it; removes what is half-written.
        user: `uid:name` of who changes something; this process's user if it is empty.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        ledger: Path,
        *,
        expand: Expand = _no_expansion,
        clear: Callable[[int], None] = lambda _transfer: None,
        user: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = ledger
        self._expand = expand
        self._clear = clear
        self._user = user or _this_user()
        self._clock = clock

    # ----------------------------------------------------------------------------- finding

    def find(
        self,
        query: str,
        entityid: Id | None = None,
        attributes: Sequence[str] | None = None,
        finished: bool = False,
        inactive: bool = False,
        archived: bool = False,
        limit: int | None = None,
        skip: int | None = None,
    ) -> list[Found]:
        """Return what a query finds, oldest first.

        Args:
            query: `entity`, or `entity WHERE condition` (docs/PROTOCOL.md, Queries).
            entityid: The transfer whose tasks are meant, whenever it ended.
            attributes: The keys that the dicts are to have; all of them if None.
            finished: Look for what ended more than an hour ago, not for what is active.
            inactive: The same, as later versions of the accsyn API call it.
            archived: Look for what was put away, two weeks after its end; may take long.
            limit: How many dicts at most.
            skip: How many to leave out before.

        Raises:
            QueryInvalidError: The query, or another argument, makes no sense.
            LocalReadError: The ledger can not be read.
        """
        scopes = Scopes(
            active=not (finished or inactive or archived),
            finished=finished or inactive,
            archived=archived,
        )
        if entityid is not None and scopes.active:
            scopes = EVERYWHERE
        return self.search(
            query,
            scopes=scopes,
            transfer=entityid,
            attributes=attributes,
            limit=limit,
            skip=skip or 0,
        )

    def find_one(
        self,
        query: str,
        entityid: Id | None = None,
        attributes: Sequence[str] | None = None,
        finished: bool = False,
        inactive: bool = False,
        archived: bool = False,
    ) -> Found | None:
        """Return the first dict that `find` would, or None if there is none."""
        found = self.find(query, entityid, attributes, finished, inactive, archived, limit=1)
        return found[0] if found else None

    def get(
        self, entitytype: str, entityid: Id, attributes: Sequence[str] | None = None
    ) -> Found | None:
        """Return one transfer or task by its id, whenever it ended; None if there is none."""
        entity = _entity(entitytype)
        query = f"{entity} WHERE id={_number(entityid)}"
        # The archive costs time.
        for scopes in (Scopes(), EVERYWHERE):
            if found := self.search(query, scopes=scopes, attributes=attributes):
                # Of several lives of a ledger the last one counts.
                return found[-1]
        return None

    def search(
        self,
        query: str,
        *,
        scopes: Scopes,
        transfer: Id | None = None,
        attributes: Sequence[str] | None = None,
        limit: int | None = None,
        skip: int = 0,
    ) -> list[Found]:
        """Return what a query finds, oldest first; `find` with several scopes together.

        Raises:
            QueryInvalidError: The query, or another argument, makes no sense.
            LocalReadError: The ledger can not be read.
        """
        for name, number in (("limit", limit), ("skip", skip)):
            if number is not None and not 0 <= number < _SQLITE_INTEGERS // 2:
                raise QueryInvalidError(f"{name} {number} is no number of dicts")
        search = Search(
            query=parse(query),
            now=self._clock(),
            scopes=scopes,
            transfer=None if transfer is None else _number(transfer),
            attributes=attributes,
            limit=limit,
            skip=skip,
        )
        return find(self._path, search)

    def counts(self, transfers: Sequence[Id]) -> dict[int, dict[str, int]]:
        """Return of each transfer how many tasks have which status.

        Raises:
            LocalReadError: The ledger can not be read.
        """
        return count_tasks(self._path, [_number(transfer) for transfer in transfers])

    def events(self, transfer: Id) -> list[Found]:
        """Return what people have changed of a transfer, oldest first.

        Returns:
            Dicts of `time`, `task` (its id; None: the transfer itself), `what` (`attribute=value`)
            and `who` (`uid:name`).

        Raises:
            LocalReadError: The ledger can not be read.
        """
        return find_events(self._path, _number(transfer))

    # ---------------------------------------------------------------------------- changing

    def create(
        self,
        entitytype: str,
        data: Data,
        entityid: Id | None = None,
        allow_duplicates: bool = True,
        replace_duplicates: bool = False,
    ) -> Found:
        """Make a transfer, or add tasks to one.

        Args:
            entitytype: `transfer` (`job`) or `task`.
            data: A dict, the same as JSON, or the path of a file with it. For a transfer `source`
                and `destination`, or `tasks`; for tasks `tasks` (docs/PROTOCOL.md, The API).
            entityid: The transfer that tasks are added to.
            allow_duplicates: Whether a task that is there already is tried again; otherwise all are
                refused.
            replace_duplicates: Whether it is tried again with the new size and metadata.

        Returns:
            The transfer; of tasks `{"success": True, "tasks": […]}`, those that were added or are
            tried again.

        Raises:
            JobInvalidError: The data makes no sense.
            ReadOnlyAttributeError: An attribute that can not be given.
            TransferStateError: There is no such transfer, or there is a duplicate.
        """
        entity = _entity(entitytype)
        document = TransferDocument.read(data, entity)
        if entity is Entity.TRANSFER:
            return self._create_transfer(document)
        if entityid is None:
            raise JobInvalidError(
                "tasks are added to a transfer, and none is named", hint="give its id as entityid"
            )
        return self._add_tasks(document, _number(entityid), allow_duplicates, replace_duplicates)

    def _create_transfer(self, document: TransferDocument) -> Found:
        spec, tasks = document.plan(self._expand)
        with Ledger.open(self._path, clock=self._clock) as ledger:
            row = ledger.create(
                spec,
                tasks,
                status=document.status,
                priority=document.priority,
                settings=document.settings,
                metadata=document.metadata,
                modifier=self._user,
            )
        return self._transfer(row.id)

    def _add_tasks(
        self, document: TransferDocument, transfer_id: int, allow: bool, replace: bool
    ) -> Found:
        transfer = self._transfer(transfer_id)
        settings, destination = transfer["settings"], transfer["destination"]
        tasks = list(task_specs(document.entries, destination, settings, self._expand))
        with Ledger.open(self._path, clock=self._clock) as ledger:
            ids = ledger.add_tasks(
                transfer_id,
                tasks,
                duplicates="replace" if replace else "retry" if allow else "reject",
                modifier=self._user,
            )
        return {"success": True, "tasks": self._tasks(transfer_id, ids)}

    def update(self, entitytype: str, entityid: Id, data: Mapping[str, Any]) -> Found:
        """Change a transfer; its engine obeys within a second.

        Args:
            entitytype: `transfer` or `job`.
            entityid: Its id.
            data: `status`, `priority`, `metadata`, and `destination` while it is pending.

        Returns:
            The transfer afterwards.

        Raises:
            ReadOnlyAttributeError: Another attribute.
            TransferStateError: There is no such transfer, or its state does not allow it.
            JobInvalidError: The priority is none.
        """
        entity = _entity(entitytype)
        if entity is not Entity.TRANSFER:
            raise ReadOnlyAttributeError(
                "tasks are changed together", hint="use update_many, with the transfer's id"
            )
        transfer_id = _number(entityid)
        changes = _changes(entity, data)
        before = self._transfer(transfer_id)
        if "status" in changes:
            changes["status"] = _status(changes["status"])
        if "destination" in changes:
            becomes = changes.get("status", TransferStatus.PENDING)
            if TransferStatus.PENDING in (before["status"], becomes):
                changes |= self._redirection(before, changes["destination"])
        with Ledger.open(self._path, clock=self._clock) as ledger:
            ledger.set_transfer(transfer_id, modifier=self._user, **changes)
        return self._cleared(transfer_id, [self._transfer(transfer_id)])[0]

    def _redirection(self, transfer: Found, destination: object) -> dict[str, Any]:
        """Return what the ledger has to know to have a transfer go to another place."""
        if not isinstance(destination, str) or not destination:
            raise JobInvalidError("the destination of a transfer has to be a text")
        redirect = partial(redirected, before=transfer["destination"], after=destination)
        if self.find_one("task", transfer["id"], ["id"]) is not None:
            return {"redirect": redirect}
        entry = TaskDocument(transfer["source"])
        return {"tasks": list(task_specs([entry], destination, transfer["settings"], self._expand))}

    def update_many(
        self,
        entitytype: str,
        *positional: Id | Sequence[Mapping[str, Any]],
        entityid: Id | None = None,
        data: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Found]:
        """Change tasks of a transfer, all or none; its engine obeys within a second.

        `update_many("task", id, changes)`, `update_many("task", changes, id)`, and either of them
        by keyword, `entityid=` and `data=`: versions of the accsyn API differ in the order.

        Args:
            entitytype: `task`.
            positional: The transfer's id and the changes.
            entityid: The transfer's id.
            data: For each task its `id` or its `uri`, and `status`, `priority` or `metadata`.

        Returns:
            The tasks afterwards.

        Raises:
            ReadOnlyAttributeError: Another attribute.
            TransferStateError: There is no such transfer or task, or a state does not allow it.
            JobInvalidError: An argument makes no sense, or a task is named twice.
        """
        if _entity(entitytype) is not Entity.TASK:
            raise JobInvalidError(f"only tasks are changed together, not a {entitytype}")
        for given in positional:
            if isinstance(given, int | str):
                entityid = given
            else:
                data = given
        if entityid is None or data is None:
            raise JobInvalidError("update_many needs a transfer's id and a list of changes")
        transfer_id = _number(entityid)
        self._transfer(transfer_id)
        changes = self._task_changes(transfer_id, data)
        with Ledger.open(self._path, clock=self._clock) as ledger:
            ledger.set_tasks(transfer_id, changes, modifier=self._user)
        return self._cleared(transfer_id, self._tasks(transfer_id, list(changes)))

    def _cleared(self, transfer_id: int, changed: list[Found]) -> list[Found]:
        """Return what was changed, when nothing half-written is left of it, or no more can be."""
        if any(each["status"] in DROPPED for each in changed):
            self._clear(transfer_id)
        return changed

    def _task_changes(
        self, transfer_id: int, data: Sequence[Mapping[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        uris = {str(each["uri"]) for each in data if "id" not in each and "uri" in each}
        ids = self._ids_of(transfer_id, uris) if uris else {}
        changes: dict[int, dict[str, Any]] = {}
        for each in data:
            named_by = {key: value for key, value in each.items() if key in ("id", "uri")}
            if "id" in named_by:
                task_id = _number(named_by["id"])
            elif str(named_by.get("uri")) in ids:
                task_id = ids[str(named_by["uri"])]
            else:
                raise TransferStateError(
                    f"transfer {transfer_id} has no task {named_by.get('uri', '')!r}",
                    hint="each change names its task by id or by uri",
                )
            if task_id in changes:
                raise JobInvalidError(
                    f"task {task_id} is named twice", hint="give all that is to change at once"
                )
            rest = {key: value for key, value in each.items() if key not in ("id", "uri")}
            changes[task_id] = _changes(Entity.TASK, rest)
        return changes

    def delete_one(self, entitytype: str, entityid: Id) -> bool:
        """Put a transfer that has ended into the archive, with its tasks.

        Returns:
            True.

        Raises:
            ReadOnlyAttributeError: A task is meant; tasks are never deleted.
            TransferStateError: There is no such transfer, or it has not ended.
        """
        if _entity(entitytype) is not Entity.TRANSFER:
            raise ReadOnlyAttributeError(
                "tasks are never deleted",
                hint="set the status of a task to excluded, so that it is ignored",
            )
        transfer_id = _number(entityid)
        self._transfer(transfer_id)
        with Ledger.open(self._path, clock=self._clock) as ledger:
            ledger.archive(transfer_id)
        return True

    # ------------------------------------------------------------------------------ inside

    def _transfer(self, transfer_id: int) -> Found:
        """Return a transfer that can be changed."""
        query = f"transfer WHERE id={transfer_id}"
        found = self.search(query, scopes=Scopes(active=True, finished=True))
        if not found and self.search(query, scopes=EVERYWHERE, attributes=["id"]):
            raise TransferStateError(
                f"transfer {transfer_id} is in the archive, and can not be changed any more",
                hint="make a new one",
            )
        if not found:
            raise TransferStateError(
                f"there is no transfer {transfer_id}",
                hint="`propmaster transfer find --all` lists those that there are",
            )
        return found[0]

    def _tasks(self, transfer_id: int, ids: Sequence[int]) -> list[Found]:
        wanted = set(ids)
        tasks = self.find(_few("id", ids), entityid=transfer_id)
        return [task for task in tasks if task["id"] in wanted]

    def _ids_of(self, transfer_id: int, uris: Collection[str]) -> dict[str, int]:
        query = _few("uri", ['"{}"'.format(uri.replace('"', '""')) for uri in sorted(uris)])
        tasks = self.find(query, entityid=transfer_id, attributes=["id", "uri"])
        return {task["uri"]: task["id"] for task in tasks}

    @staticmethod
    def str(found: Found | Sequence[Found]) -> str:
        """Return what was found as JSON for people."""
        return json.dumps(found, indent=4, default=_plain)


def _entity(word: str) -> Entity:
    entity = ENTITY_WORDS.get(word.lower())
    if entity not in (Entity.TRANSFER, Entity.TASK):
        raise QueryInvalidError(
            f'there is no entity "{word}"{nearest(word, ("transfer", "job", "task"))}',
            hint="expected transfer, job or task",
        )
    return entity


def _number(entityid: Id) -> int:
    text = str(entityid)
    if not (text.isascii() and text.isdigit()) or int(text[:20]) >= _SQLITE_INTEGERS:
        raise TransferStateError(
            f"{text[:40]!r} is no id of a transfer or task", hint="ids are numbers"
        )
    return int(text)


def _few(attribute: str, values: Collection[object]) -> str:
    """Return a query for these tasks if they are few, else for all: reading them takes seconds."""
    query = f"task WHERE {attribute} IN ({', '.join(map(str, values))})"
    few = 0 < len(values) <= _ASKED_FOR_BY_NAME and len(query.encode()) <= MAX_QUERY_BYTES
    return query if few else "task"


def _status(word: object) -> TransferStatus:
    try:
        return TransferStatus(str(word).lower())
    except ValueError as error:
        raise TransferStateError(
            f"a transfer has no status {word!r}{nearest(str(word), list(TransferStatus))}"
        ) from error


def _changes(entity: Entity, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is to be changed.

    Raises:
        ReadOnlyAttributeError: It is more than can be changed.
    """
    can = [attribute.name for attribute in ATTRIBUTES[entity] if attribute.update]
    for name in data:
        if name not in can:
            known = named(entity, name) is not None
            what = "can not be changed" if known else f"is no attribute{nearest(name, can)}"
            raise ReadOnlyAttributeError(
                f'"{name}" of a {entity} {what}', hint=f"what can be changed: {', '.join(can)}"
            )
    if not isinstance(data.get("metadata", {}), Mapping):
        raise JobInvalidError(
            f"the metadata of a {entity} has to be an object", hint='give something like {"a": 1}'
        )
    return dict(data)


def _this_user() -> str:
    uid = os.getuid()
    try:
        return f"{uid}:{pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"{uid}:"


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(type(value).__name__)
