"""The API in the accsyn spelling: found, made, changed and put away, with nobody else around."""

import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.errors import (
    JobInvalidError,
    LocalReadError,
    QueryInvalidError,
    ReadOnlyAttributeError,
    TransferStateError,
)
from agent_plugin.transfer import find
from agent_plugin.transfer.api import Session
from agent_plugin.transfer.entities import value_of
from agent_plugin.transfer.ledger import Ledger, TaskSpec
from agent_plugin.transfer.query_attributes import Attribute

NOON = 1_772_366_400.0
HOUR = 3600.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def expand(wanted: Iterable[TaskSpec], settings: Mapping[str, Any]) -> Iterable[TaskSpec]:
    """Every source is a file of as many bytes as its name has letters; trees have two."""
    assert "unknown" not in settings
    for task in wanted:
        if task.source.endswith("/"):
            for name in ("one.exr", "two.exr"):
                source, destination = task.source + name, task.destination + name
                yield replace(task, source=source, destination=destination, size=len(name), uri="")
        else:
            target = task.destination
            if target.endswith("/"):
                target += task.source.rpartition("/")[2]
            yield replace(task, destination=target, size=len(task.source))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def session(tmp_path: Path, clock: Clock) -> Session:
    return Session(tmp_path / "ledger.db", expand=expand, user="1000:anna", clock=clock)


@pytest.fixture
def job(session: Session) -> dict[str, Any]:
    """A transfer of three files."""
    return session.create("job", {"tasks": [
        {"source": f"/in/{name}", "destination": f"/out/{name}"} for name in ("a", "bb", "ccc")
    ]})  # fmt: skip


def tasks(session: Session, job: dict[str, Any]) -> list[tuple[str, str]]:
    found = session.find(f"task WHERE job.id={job['id']}", entityid=job["id"])
    return [(task["source"]["path"], task["status"]) for task in found]


# ---------------------------------------------------------------------------------------- create


def test_t4_a_job_of_the_seeds_form_is_made_paused_and_stays_so(session: Session) -> None:
    job = session.create(
        "Job",
        {
            "source": "/projects/thefilm/latest_edit.mov",
            "destination": "s3://client/in/",
            "status": "paused",
        },
    )

    assert (job["status"], job["code"], job["size"]) == ("paused", "latest_edit.mov", 33)
    assert (job["source"], job["destination"]) == (
        *("/projects/thefilm/latest_edit.mov", "s3://client/in/"),
    )
    assert (job["user"], job["modifier"], job["priority"]) == ("1000:anna", "1000:anna", 500)
    assert session.find_one("Job where status=paused") == job
    [task] = session.find("task", entityid=job["id"])
    assert task["destination"]["path"] == "s3://client/in/latest_edit.mov"


@pytest.mark.parametrize("form", ["dict", "json", "path", "name of a file"])
def test_t4_a_document_can_be_a_dict_json_or_a_file(
    session: Session, tmp_path: Path, form: str
) -> None:
    document = {"tasks": {"0": "/in/a", "1": {"source": "/in/b", "destination": "/x"}},
                "destination": "/out/", "name": "two", "metadata": {"é": [1]}}  # fmt: skip
    file = tmp_path / "job.json"
    file.write_text(json.dumps(document))
    given: dict[str, Any] = {
        "dict": document, "json": json.dumps(document), "path": file, "name of a file": str(file),
    }  # fmt: skip

    job = session.create("transfer", given[form])

    assert (job["name"], job["metadata"]) == ("two", {"é": [1]})
    assert [task["uri"] for task in session.find("task", entityid=job["id"])] == ["0", "1"]
    found = session.find("task", entityid=job["id"])
    assert [(task["source"]["path"], task["destination"]["path"]) for task in found] == [
        *(("/in/a", "/out/a"), ("/in/b", "/x")),
    ]


def test_t4_tasks_are_called_as_they_are_given_and_the_rest_is_numbered(session: Session) -> None:
    """Seen to fail when the keys are dropped, and when numbers do not mind them."""
    job = session.create("job", {
        "tasks": {'left "eye"': "/in/a", "0": "/in/b", "tree": "/in/", "1": "/in/c"},
        "destination": "/out/",
    })  # fmt: skip
    uris = {task["source"]["path"]: task["uri"] for task in session.find("task")}
    assert uris == {
        "/in/a": 'left "eye"', "/in/b": "0", "/in/one.exr": "2", "/in/two.exr": "3", "/in/c": "1",
    }  # fmt: skip

    [held] = session.update_many("task", job["id"], [{"uri": 'left "eye"', "status": "onhold"}])
    added = session.create("task", {"tasks": [{"source": "/x", "uri": "right"}, "/y"]}, job["id"])

    assert held["source"]["path"] == "/in/a"
    assert [task["uri"] for task in added["tasks"]] == ["right", "5"]
    with pytest.raises(TransferStateError, match="has the uri 'right' already; nothing was added"):
        session.create("task", {"tasks": ["/z", {"source": "/w", "uri": "right"}]}, job["id"])
    twice = [{"source": name, "uri": "a"} for name in ("/x", "/y")]
    with pytest.raises(JobInvalidError, match="2 tasks have the uri 'a'"):
        session.create("job", {"tasks": twice, "destination": "/out/"})
    for uri in ("a\nb", "\udce9", "x" * 256):
        with pytest.raises(JobInvalidError, match="no uri of a task"):
            session.create("job", {"tasks": {uri: "/x"}, "destination": "/out/"})
    assert len(session.find("task")) == 7


def test_t4_a_source_that_is_no_place_is_refused_before_it_has_a_destination(
    session: Session,
) -> None:
    """As the accsyn form `share=…` is; seen to fail when it is looked at only when it is copied."""
    with pytest.raises(JobInvalidError, match="'share=projects/latest_edit' is no place"):
        session.create("Job", {"source": "share=projects/latest_edit"})
    assert session.find("Job") == []


def test_t4_without_a_destination_it_is_pending_until_it_has_one(session: Session) -> None:
    job = session.create("job", {"source": "/in/", "status": "waiting"})
    assert (job["status"], job["destination"]) == ("pending", "")
    with pytest.raises(TransferStateError, match="has no destination"):
        session.update("job", job["id"], {"status": "waiting"})

    ready = session.update("job", job["id"], {"destination": "/out/", "status": "waiting"})

    assert (ready["status"], ready["destination"], ready["size"]) == ("waiting", "/out/", 14)
    assert tasks(session, job) == [("/in/one.exr", "queued"), ("/in/two.exr", "queued")]
    with pytest.raises(ReadOnlyAttributeError, match="which is waiting, can not be changed"):
        session.update("job", job["id"], {"destination": "/elsewhere/"})


def test_t5_a_new_destination_is_for_all_that_was_to_go_below_the_old_one(
    session: Session,
) -> None:
    """And what was to go to a place of its own goes there."""
    own = {"source": "/in/c", "destination": "/own/c"}
    first = {"source": "/in/a", "priority": 7}
    second = {"source": "/in/b", "priority": 9, "metadata": {"shot": "sc010"}}
    job = session.create(
        "job",
        {"tasks": [first, second, "/in/deep/", own], "destination": "/out/", "status": "pending"},
    )

    session.update("job", job["id"], {"destination": "/new/"})

    found = session.find("task WHERE status=pending", entityid=job["id"])
    assert sorted((each["destination"]["path"], each["priority"]) for each in found) == [
        ("/new/a", 7),
        ("/new/b", 9),
        ("/new/one.exr", 500),
        ("/new/two.exr", 500),
        ("/own/c", 500),
    ]
    with pytest.raises(JobInvalidError, match="several things"):
        session.update("job", job["id"], {"destination": "/one-file"})


def test_t5_a_destination_that_comes_with_what_is_not_allowed_changes_nothing(
    session: Session,
) -> None:
    job = session.create("job", {"source": "/in/a"})

    with pytest.raises(TransferStateError, match="not for people"):
        session.update("job", job["id"], {"destination": "/out/a", "status": "running"})
    with pytest.raises(JobInvalidError, match="has to be a text"):
        session.update("job", job["id"], {"destination": 5})
    with pytest.raises(JobInvalidError, match="has to be an object"):
        session.update("job", job["id"], {"metadata": 5})

    assert tasks(session, job) == []


@pytest.mark.parametrize(
    "forbidden", [{"status": "paused"}, {"priority": "urgent"}, {"status": "running"}]
)
def test_t5_a_destination_and_what_is_forbidden_change_nothing_together(
    session: Session, forbidden: dict[str, str]
) -> None:
    """Seen to fail when the tasks were redirected in a transaction of their own."""
    job = session.create("job", {"source": "/in/", "destination": "/out/", "status": "pending"})
    before = session.find("task", entityid=job["id"])

    with pytest.raises((TransferStateError, JobInvalidError)):
        session.update("job", job["id"], {"destination": "/new/", **forbidden})

    assert session.get("job", job["id"]) == job
    assert session.find("task", entityid=job["id"]) == before


def test_t5_a_new_destination_keeps_what_people_have_said_of_tasks(session: Session) -> None:
    """Seen to fail when held tasks keep the old place, and when excluded ones come again."""
    job = session.create("job", {"source": "/in/", "destination": "/out/"})
    session.update_many("task", job["id"], [
        {"uri": "0", "status": "onhold", "priority": 7}, {"uri": "1", "status": "excluded"},
    ])  # fmt: skip

    session.update("job", job["id"], {"status": "pending", "destination": "/new/"})

    found = session.find("task", entityid=job["id"])
    assert [(t["uri"], t["destination"]["path"], t["status"], t["priority"]) for t in found] == [
        ("0", "/new/one.exr", "onhold", 7),
        ("1", "/new/two.exr", "excluded", 500),
    ]


def test_t5_what_an_engine_has_begun_is_left_to_it_at_the_old_destination(
    session: Session, job: dict[str, Any], tmp_path: Path
) -> None:
    """It aborts the upload of a task that is excluded; seen to fail when the row is redirected."""
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as ledger, ledger:
        ledger.execute("UPDATE transfer SET destination = '/out/'")
        ledger.execute("UPDATE task SET upload_id = 'u', priority = 7 WHERE uri = '0'")

    session.update("job", job["id"], {"status": "pending", "destination": "/new/"})

    found = session.find("task", entityid=job["id"])
    assert [(t["destination"]["path"], t["status"], t["priority"]) for t in found] == [
        ("/out/a", "excluded", 7),
        ("/new/bb", "pending", 500),
        ("/new/ccc", "pending", 500),
        ("/new/a", "pending", 7),
    ]


@pytest.mark.parametrize("days", [0, 2])
def test_t5_a_package_is_sent_again_to_another_place(
    session: Session, clock: Clock, tmp_path: Path, days: int
) -> None:
    """As the seed resends it: set to pending; also when its tasks have been packed meanwhile."""
    job = session.create("job", {"source": "/in/a", "destination": "/out/"})
    session.update("job", job["id"], {"status": "done"})
    session.update_many("task", job["id"], [{"uri": "0", "status": "queued"}])
    session.update_many("task", job["id"], [{"uri": "0", "status": "done"}])
    assert session.get("job", job["id"], ["status", "done"]) == {"status": "done", "done": 5}
    clock.now += days * 24 * HOUR
    with Ledger.open(tmp_path / "ledger.db", clock=clock) as ledger:
        ledger.housekeep()
        assert len(ledger.tasks(job["id"])) == (0 if days else 1)

    again = session.update("job", job["id"], {"status": "pending"})
    assert (again["status"], again["finished"], again["done"]) == ("pending", None, 0)
    sent = session.update("job", job["id"], {"destination": "/new/", "status": "waiting"})

    assert (sent["status"], sent["size"]) == ("waiting", 5)
    [task] = session.find("task", entityid=job["id"])
    assert (task["uri"], task["status"], task["destination"]["path"]) == ("0", "queued", "/new/a")


@pytest.mark.parametrize("name", ["id", "uri"])
def test_t6_a_change_of_one_task_reads_no_others(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of a hundred thousand it would take seconds."""
    names = [{"source": f"/in/{at}", "destination": f"/out/{at}"} for at in range(50)]
    job = session.create("job", {"tasks": names})
    [task] = session.find("task WHERE uri=30", entityid=job["id"])
    read: list[object] = []

    def reading(attribute: Attribute, raw: object) -> object:
        if attribute.name == "id":
            read.append(raw)
        return value_of(attribute, raw)

    monkeypatch.setattr(find, "value_of", reading)

    [changed] = session.update_many("task", job["id"], [{name: task[name], "priority": 9}])

    assert (changed["id"], changed["priority"]) == (task["id"], 9)
    assert len(read) < 10


@pytest.mark.parametrize(
    ("document", "error", "words"),
    [
        ({}, JobInvalidError, "either a source or tasks"),
        ({"source": "/a", "tasks": ["/b"]}, JobInvalidError, "either a source or tasks"),
        ({"sorce": "/a"}, JobInvalidError, 'no attribute "sorce"; did you mean source?'),
        ({"source": "/a", "size": 5}, ReadOnlyAttributeError, '"size" of a transfer can not be'),
        ({"source": 5}, JobInvalidError, r"got `int` - at `\$.source`"),
        ({"tasks": [{"source": ""}]}, JobInvalidError, r"at `\$.tasks\[0\].source`"),
        (
            {"tasks": [{"source": "/a", "destination": "/x"}, "/b"]},
            JobInvalidError,
            "where /b goes",
        ),
        ({"source": "/a", "destination": "/b", "priority": 1001}, JobInvalidError, "1001"),
        ({"source": "/a", "destination": "/b", "status": "moving"}, JobInvalidError, "moving"),
        ({"source": "/a", "destination": "/b", "status": "done"}, TransferStateError, "be done"),
        ("{", JobInvalidError, "no JSON object"),
        ("[]", JobInvalidError, "no JSON object"),
        ("/no/such/file", JobInvalidError, "there is no such file"),
        ("/", LocalReadError, "/"),
    ],
)
def test_t4_a_document_that_makes_no_sense_makes_nothing(
    session: Session, document: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        session.create("job", document)
    assert session.find("job") == []


# ---------------------------------------------------------------------------------------- update


def test_t5_a_job_is_paused_resumed_and_aborted(session: Session, job: dict[str, Any]) -> None:
    """As the seed does it, with ids as text and as numbers."""
    assert session.update("job", str(job["id"]), {"status": "paused"})["status"] == "paused"
    assert session.update("job", job["id"], {"status": "waiting"})["status"] == "waiting"
    aborted = session.update("Job", job["id"], {"status": "ABORTED"})

    assert (aborted["status"], aborted["finished"]) == ("aborted", aborted["modified"])
    assert session.update("job", job["id"], {"status": "waiting"})["finished"] is None


def test_t5_priority_and_metadata_can_be_changed(session: Session, job: dict[str, Any]) -> None:
    changed = session.update("job", job["id"], {"priority": "high", "metadata": {"a": 1}})

    assert (changed["priority"], changed["uri"], changed["metadata"]) == (999, "high", {"a": 1})
    with pytest.raises(JobInvalidError):
        session.update("job", job["id"], {"priority": 5000})


@pytest.mark.parametrize("name", ["id", "code", "source", "size", "progress", "user", "created"])
def test_t5_what_can_not_be_changed_is_told_with_what_can(
    session: Session, job: dict[str, Any], name: str
) -> None:
    with pytest.raises(ReadOnlyAttributeError, match=f'"{name}" of a transfer can not be') as error:
        session.update("job", job["id"], {name: "x", "priority": 1})

    assert error.value.hint == "what can be changed: status, priority, destination, metadata"
    assert session.get("job", job["id"]) == job


def test_t5_a_state_that_is_not_allowed_is_told(session: Session, job: dict[str, Any]) -> None:
    with pytest.raises(TransferStateError, match="running is not for people to set"):
        session.update("job", job["id"], {"status": "running"})
    with pytest.raises(TransferStateError, match="no status 'pausd'; did you mean paused"):
        session.update("job", job["id"], {"status": "pausd"})
    session.update("job", job["id"], {"status": "done"})
    with pytest.raises(TransferStateError, match="transfer 1 is done, and can not become paused"):
        session.update("job", job["id"], {"status": "paused"})


@pytest.mark.parametrize("id_", [99, "99", "614d660de50d45bb027c9bdd", "-1", "1; DROP", 2**70])
def test_t5_what_is_not_there_is_told_and_no_ledger_is_made(
    session: Session, tmp_path: Path, id_: int | str
) -> None:
    with pytest.raises(TransferStateError):
        session.update("job", id_, {"status": "paused"})
    with pytest.raises(TransferStateError):
        session.delete_one("job", id_)
    with pytest.raises(TransferStateError):
        session.update_many("task", id_, [{"id": 1, "status": "excluded"}])
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------- update_many


@pytest.mark.parametrize("order", ["seed", "3.2", "keywords", "entityid", "text"])
def test_t6_tasks_are_changed_in_any_order_of_the_arguments(
    session: Session, job: dict[str, Any], order: str
) -> None:
    [first, *_] = session.find("task", entityid=job["id"])
    id_, data = job["id"], [{"id": first["id"], "status": "excluded"}]

    changed = {
        "seed": lambda: session.update_many("task", data, entityid=id_),
        "3.2": lambda: session.update_many("task", id_, data),
        "keywords": lambda: session.update_many("task", entityid=id_, data=data),
        "entityid": lambda: session.update_many("task", id_, data=data),
        "text": lambda: session.update_many("Task", str(id_), data),
    }[order]()

    assert [(task["id"], task["status"]) for task in changed] == [(first["id"], "excluded")]
    assert session.get("job", id_, ["size"]) == {"size": len("/in/bb") + len("/in/ccc")}


def test_t6_tasks_can_be_named_by_their_uri(session: Session, job: dict[str, Any]) -> None:
    changed = session.update_many("task", job["id"], [
        {"uri": "1", "status": "onhold", "priority": "low"}, {"uri": 2, "metadata": {"why": "x"}},
    ])  # fmt: skip

    assert [(task["uri"], task["status"], task["priority"]) for task in changed] == [
        *(("1", "onhold", 1), ("2", "queued", 500)),
    ]
    assert changed[1]["metadata"] == {"why": "x"}


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"uri": "7", "status": "excluded"}, TransferStateError),
        ({"id": 999, "status": "excluded"}, TransferStateError),
        ({"status": "excluded"}, TransferStateError),
        ({"uri": "1", "status": "executing"}, TransferStateError),
        ({"uri": "1", "destination": "/x"}, ReadOnlyAttributeError),
        ({"uri": "1", "size": 5}, ReadOnlyAttributeError),
        ({"uri": "1", "priority": "x"}, JobInvalidError),
    ],
)
def test_t6_all_tasks_are_changed_or_none(
    session: Session, job: dict[str, Any], bad: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        session.update_many("task", job["id"], [{"uri": "0", "status": "excluded"}, bad])

    assert [status for _, status in tasks(session, job)] == ["queued"] * 3


def test_t6_a_task_is_named_once_however_it_is_named(session: Session, job: dict[str, Any]) -> None:
    """Seen to fail when the last one counts."""
    [first, *_] = session.find("task", entityid=job["id"])

    with pytest.raises(JobInvalidError, match=f"task {first['id']} is named twice"):
        session.update_many("task", job["id"], [
            {"id": first["id"], "status": "excluded"}, {"uri": first["uri"], "priority": 9},
        ])  # fmt: skip

    assert session.find("task", entityid=job["id"])[0] == first


def test_t6_transfers_are_not_changed_by_the_dozen_nor_tasks_one_by_one(
    session: Session, job: dict[str, Any]
) -> None:
    with pytest.raises(JobInvalidError, match="only tasks"):
        session.update_many("job", job["id"], [])
    with pytest.raises(JobInvalidError, match="needs a transfer's id and a list"):
        session.update_many("task", job["id"])
    with pytest.raises(ReadOnlyAttributeError, match="together"):
        session.update("task", 1, {"status": "excluded"})
    with pytest.raises(QueryInvalidError, match='no entity "jobs"; did you mean job'):
        session.update("jobs", 1, {})


# ------------------------------------------------------------------------------------ delete_one


def test_t7_only_what_has_ended_is_put_away_and_tasks_never(
    session: Session, job: dict[str, Any]
) -> None:
    with pytest.raises(TransferStateError, match="only one that has ended"):
        session.delete_one("job", job["id"])
    with pytest.raises(ReadOnlyAttributeError, match="never deleted"):
        session.delete_one("task", 1)
    session.update("job", job["id"], {"status": "aborted"})

    assert session.delete_one("job", job["id"]) is True

    assert session.find("job") == session.find("job", finished=True) == []
    [archived] = session.find("job where status=aborted", archived=True)
    assert archived["id"] == job["id"]
    assert session.get("job", job["id"]) == archived
    assert len(session.find("task", entityid=job["id"])) == 3


# ------------------------------------------------------------------------- tasks that are added


def test_t8_a_file_is_added_to_go_where_the_rest_goes(session: Session) -> None:
    job = session.create("job", {"source": "/in/", "destination": "/out/"})

    told = session.create("task", {"tasks": ["/volumes/reel.mov"]}, job["id"])

    assert told["success"] is True
    assert [task["destination"]["path"] for task in told["tasks"]] == ["/out/reel.mov"]
    session.create("task", '{"tasks": [{"source": "/a", "destination": "/b"}]}', job["id"])
    assert [task["uri"] for task in session.find("task", entityid=job["id"])] == list("0123")


def test_t8_what_is_there_is_tried_again_rejected_or_replaced(
    session: Session, job: dict[str, Any]
) -> None:
    session.update_many("task", job["id"], [{"uri": "0", "status": "failed"}])
    pair = {"tasks": [{"source": "/in/a", "destination": "/out/a"}]}
    with pytest.raises(TransferStateError, match="nothing was added"):
        session.create(
            "task",
            {"tasks": [{"source": "/new", "destination": "/new"}, *pair["tasks"]]},
            job["id"],
            allow_duplicates=False,
        )
    assert len(tasks(session, job)) == 3

    told = session.create("task", pair, job["id"])

    assert [(task["uri"], task["status"]) for task in told["tasks"]] == [("0", "queued")]
    session.create("task", pair, job["id"], replace_duplicates=True)
    assert len(tasks(session, job)) == 3


def test_t8_a_transfer_that_had_ended_is_revived(session: Session, job: dict[str, Any]) -> None:
    assert session.update("job", job["id"], {"status": "done"})["status"] == "done"

    session.create("task", {"tasks": [{"source": "/new", "destination": "/n"}]}, job["id"])

    revived = session.get("job", job["id"])
    assert revived is not None
    assert (revived["status"], revived["finished"]) == ("waiting", None)


def test_t8_tasks_need_a_transfer(session: Session) -> None:
    with pytest.raises(JobInvalidError, match="none is named"):
        session.create("task", {"tasks": ["/a"]})
    with pytest.raises(TransferStateError, match="there is no transfer 7"):
        session.create("task", {"tasks": ["/a"]}, 7)


# ------------------------------------------------------------------------------------------ find


def test_t3_the_ten_queries_of_the_seed_are_answered(
    session: Session, clock: Clock, job: dict[str, Any]
) -> None:
    named = session.create("job", {"source": "/x", "destination": "/y", "name": "x and y.png"})
    mine = session.create("job", {"source": "/x", "destination": "/y", "name": "my_transfer"})
    session.update("job", mine["id"], {"status": "aborted"})

    assert [each["id"] for each in session.find("Job")] == [job["id"], named["id"], mine["id"]]
    found = session.find_one('Job where code="x and y.png"')
    assert found is not None
    assert found["id"] == named["id"]
    assert session.find_one("Job where user=user@mail.com") is None
    assert session.find_one('Job where destination="stockholm"') is None
    assert session.find_one("Job where source=hq") is None
    assert session.find("task WHERE job.id=5a7325f8b7ef72f5f9d74bf4") == []
    assert session.find("task WHERE job.id=5a7325f8b7ef72f5f9d74bf4 AND status<>executing") == []
    assert [each["id"] for each in session.find('job WHERE code="my_transfer"')] == [mine["id"]]
    clock.now += 2 * HOUR
    assert [e["id"] for e in session.find("Job where status=aborted", finished=True)] == [
        mine["id"]
    ]
    assert session.find("Job where status=done", archived=True) == []
    assert session.find("Job where status=aborted", inactive=True, attributes=["id", "code"]) == [
        {"id": mine["id"], "code": "my_transfer"}
    ]


@pytest.mark.parametrize("more", [{"limit": -1}, {"skip": -1}, {"limit": 2**63}])
def test_t3_a_page_that_can_not_be_is_refused(session: Session, more: dict[str, int]) -> None:
    with pytest.raises(QueryInvalidError, match="is no number of dicts"):
        session.find("job", **more)  # type: ignore[arg-type]


def test_t3_what_was_found_can_be_printed(job: dict[str, Any]) -> None:
    text = Session.str([job])

    assert json.loads(text)[0]["created"] == "2026-03-01T12:00:00+00:00"
    assert "\n    " in text


def test_t3_sessions_are_used_by_many_threads(session: Session, job: dict[str, Any]) -> None:
    errors: list[BaseException] = []

    def work(uri: str) -> None:
        try:
            for status in ("onhold", "queued") * 5:
                session.update_many("task", job["id"], [{"uri": uri, "status": status}])
                assert len(session.find("task WHERE status<>done", entityid=job["id"])) == 3
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(uri,)) for uri in ("0", "1", "2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
