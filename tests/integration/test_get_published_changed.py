"""`get --published` when what was published is not as it was: replaced, deleted, joined, in place.

And when result documents are not what they were. What others do is done by hand.
"""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent_plugin.content.errors import (
    ArchiveUnsafeError,
    NotAllowedError,
    ObjectChangedError,
    ObjectNotFoundError,
    ResultClashError,
    StoreAccessError,
)
from agent_plugin.content.manifest import FileEntry, Manifest, encode
from agent_plugin.publish.published import Replaced
from agent_plugin.transfer.states import TaskStatus
from tests.servers.hooks import JOB
from tests.servers.published import Published, set_get_tasks, waits
from tests.servers.publishing import await_that, in_background
from tests.servers.s3_server import S3Server


@pytest.fixture
def published(s3: S3Server, tmp_path: Path) -> Published:
    return Published(s3, tmp_path)


# ------------------------------------------------------------ replaced


@pytest.mark.parametrize(
    "publisher",
    [
        {"Key": "run.tar.zst", "Encoding": "zstd"},
        pytest.param({"Key": "run"}, marks=pytest.mark.slow),
    ],
    ids=["zstd", "plain"],
)
def test_o7_what_a_later_execution_has_replaced_is_left_out_and_told(
    published: Published, publisher: dict[str, Any]
) -> None:
    """Seen to fail when an object's execution is not looked at: its hash is another one then."""
    p = published
    one, two = p.ran(
        {**publisher, "Overwrite": True}, {"renders/1": b"old"}, {"renders/1": b"new"}, again=True
    )

    result = p.get()
    listed = p.run("ls", JOB, "--published").stdout

    place = f"s3://{p.bucket}/{p.documents().popitem()[1]['results'][0]['Params']['Key']}"
    assert p.files() == {"renders/1": b"new"}
    assert [each.execution for each in result.executions] == [two]
    assert result.replaced == [Replaced(one, two, place, 1, 1)]
    told = (
        f"left out: all of what execution {one} published to {place}, replaced by execution {two}"
    )
    assert told in listed
    assert "1 file, 3 bytes" in listed
    with pytest.raises(ObjectChangedError, match=f"{one} .*was replaced: execution {two}"):
        p.get(only=[one])


def test_o7_of_a_plain_publication_only_what_was_replaced_is_left_out(published: Published) -> None:
    p = published
    one, two = p.ran(
        {"Key": "all", "Overwrite": True},
        {"renders/1": b"1", "renders/log": b"one"},
        {"renders/2": b"2", "renders/log": b"two"},
    )

    result = p.get()

    assert p.files() == {
        f"{one}/renders/1": b"1",
        f"{two}/renders/2": b"2",
        f"{two}/renders/log": b"two",
    }
    assert result.replaced == [Replaced(one, two, f"s3://{p.bucket}/{p.prefix}/all/", 1, 2)]
    with pytest.raises(ObjectChangedError, match=f"all/renders/log was replaced: execution {two}"):
        p.get(only=[one])


# ------------------------------------------------------------ missing, and too much


def test_o7_an_object_that_was_deleted_is_missed_and_one_that_was_added_is_not_taken(
    published: Published,
) -> None:
    """Seen to fail when what is below the key counts, and not the list of what was published."""
    p = published
    [execution] = p.ran({"Key": "all"}, {"renders/1": b"1", "renders/2": b"2", "renders/3": b"3"})
    p.put("all/renders/stray", b"nobody's")

    assert p.get("renders/1").files == 1
    assert p.get().files == 3
    assert p.files().keys() == {"renders/1", "renders/2", "renders/3"}

    (p.to / "renders/2").unlink()
    p.delete("all/renders/1", "all/renders/2")
    with pytest.raises(ObjectNotFoundError, match=f"{execution} .*all/renders/2") as missed:
        p.get()
    assert "renders/1" not in missed.value.message, "that one is in place"
    assert p.files().keys() == {"renders/1", "renders/3"}


@pytest.mark.slow
def test_o5_a_document_of_an_earlier_version_is_what_the_objects_say(published: Published) -> None:
    """Before there were lists; seen to fail when an object without an execution counts."""
    p = published
    [execution] = p.ran({"Key": "all"}, {"renders/1": b"1", "renders/2": b"2"})
    p.put("all/renders/stray", b"nobody's")
    p.rewrite(execution, lambda document: document.pop("contents"))

    assert p.get().files == 2
    assert p.files() == {"renders/1": b"1", "renders/2": b"2"}
    assert p.get().bytes_fetched == 0


# ------------------------------------------------------------ documents


def test_o7_executions_that_can_not_be_had_are_named_and_the_others_come_without_them(
    published: Published,
) -> None:
    """Seen to fail when the first failure ends the search for further ones."""
    p = published
    runs: list[dict[str | bytes, bytes | int]] = [{f"renders/{n}": b"x"} for n in range(4)]
    ids = p.ran({"Key": "{executionID}"}, *runs)

    def in_bucket(document: dict[str, Any]) -> None:
        document["results"][0]["Params"]["Bucket"] = "no-such-bucket"

    def in_region(document: dict[str, Any]) -> None:
        document["results"][0]["Params"]["Region"] = "evil.example/"

    p.rewrite(ids[0], in_bucket)
    p.rewrite(ids[2], in_region)

    with pytest.raises(StoreAccessError) as refused:
        p.get()
    error = refused.value
    keys = {document["executionId"]: key for key, document in p.documents().items()}

    for execution in (ids[0], ids[2]):
        assert execution in error.message
        assert keys[execution][keys[execution].index("Manifests/") :] in error.message
    assert ids[1] not in error.message
    assert f"--without {ids[0]} --without {ids[2]}" in error.hint
    assert p.nothing_is_there()
    without = ["--without", ids[0], "--without", ids[2]]
    p.run("get", JOB, "--published", "--to", p.to, *without)
    assert p.files() == {f"{ids[1]}/renders/1": b"x", f"{ids[3]}/renders/3": b"x"}

    with pytest.raises(StoreAccessError, match="no-such-bucket") as alone:
        p.get(only=[ids[0]])
    assert "--without" not in alone.value.hint


@pytest.mark.slow
def test_o7_a_list_that_was_changed_is_refused(published: Published) -> None:
    p = published
    [execution] = p.ran({"Key": "all"}, {"renders/1": b"1", "renders/2": b"2"})
    [(key, document)] = p.documents().items()
    beside = f"{key.removesuffix('.json')}.{document['contents'][0]['hash']}.files"
    shorter = encode(Manifest.of([FileEntry("0" * 32, 0, "renders/1", 1)]))
    p.s3.client().put_object(Bucket=p.s3.bucket, Key=beside, Body=shorter)

    done = p.run("get", JOB, "--published", "--to", p.to, code=65)

    assert f"what execution {execution} (Manifests/" in done.stderr
    assert "is not the list that the result document tells of" in done.stderr
    assert p.nothing_is_there()


class _Foreign:
    """A server that somebody else has, which notes who asks it."""

    def __init__(self) -> None:
        asked = self.asked = list[str | None]()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                asked.append(self.headers["Authorization"])
                self.send_response(404)
                self.end_headers()

            do_GET = do_HEAD  # noqa: N815 - http.server's name

            def log_message(self, *_: object) -> None:
                """Be quiet."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def foreign() -> Iterator[_Foreign]:
    server = _Foreign()
    yield server
    server.close()


def at(endpoint: str) -> Callable[[dict[str, Any]], None]:
    """Return what has a result document name a server."""

    def change(document: dict[str, Any]) -> None:
        document["results"][0]["Params"]["Endpoint"] = endpoint

    return change


def test_o7_a_server_that_only_a_document_names_is_not_asked(
    published: Published, foreign: _Foreign
) -> None:
    """Seen to fail, with a signed request at the other server, when endpoints are not looked at."""
    p = published
    one, _ = p.ran({"Key": "{executionID}"}, {"renders/1": b"1"}, {"renders/2": b"2"})
    p.rewrite(one, at(foreign.url))

    with pytest.raises(NotAllowedError, match=f"what execution {one} ") as refused:
        p.get()

    assert foreign.asked == []
    assert f"--allow-endpoint {foreign.url}" in refused.value.hint
    assert f"--without {one}" in refused.value.hint
    assert p.get(without=[one]).files == 1
    with pytest.raises(ObjectNotFoundError):
        p.get(only=[one], allowed=[f"{foreign.url}/"])
    assert p.s3.access_key in (foreign.asked[0] or "")


@pytest.mark.slow
def test_o7_servers_are_allowed_by_an_option_or_by_the_settings(
    published: Published, foreign: _Foreign
) -> None:
    """Seen to fail when a command does not hand on what was allowed."""
    p = published
    [one] = p.ran({"Key": "{executionID}"}, {"renders/1": b"1"})
    p.rewrite(one, at(foreign.url))
    commands: list[list[str | Path]] = [
        ["get", JOB, "--published", "--to", p.to],
        ["ls", JOB, "--published"],
        ["cat", f"{JOB}/renders/1", "--published"],
        ["results", JOB, "--presign", "1h"],
    ]

    for command in commands:
        p.run(*command, code=89)
    assert foreign.asked == []
    for number, command in enumerate(commands):
        p.run(*command, "--allow-endpoint", foreign.url, code=91)
        assert len(foreign.asked) > number
    p.user.config.write_text(
        p.user.config.read_text().replace(
            "[store]\n", f'[store]\nresult_endpoints = ["{foreign.url}"]\n'
        )
    )
    asked = len(foreign.asked)
    p.run(*commands[1], code=91)
    assert len(foreign.asked) > asked


# ------------------------------------------------------------ in place


@pytest.mark.parametrize(
    ("publisher", "raw"),
    [
        ({}, False),
        pytest.param({"Encoding": "zstd", "ByRoot": True}, False, marks=pytest.mark.slow),
        pytest.param({"Encoding": "gzip", "Mtime": "zero"}, False, marks=pytest.mark.slow),
        pytest.param({"Encoding": "gzip"}, True, marks=pytest.mark.slow),
    ],
    ids=["plain", "zstd-by-root", "gzip", "raw"],
)
def test_o7_what_is_in_place_is_not_fetched_again(
    published: Published, publisher: dict[str, Any], raw: bool
) -> None:
    """Seen to fail when nothing is known of what is in place."""
    p = published
    publisher = {"Key": "{executionID}", **publisher}
    p.ran(publisher, {"renders/1": 20_000, "renders/log": b"1"}, {"renders/log": b"2"})
    first = p.get(raw=raw)
    files = p.files()

    again = p.get(raw=raw)

    assert first.bytes_fetched > 0
    assert again.bytes_fetched == 0
    assert (again.files, again.bytes) == (first.files, first.bytes)
    assert again.executions == first.executions
    damaged = next(path for path in files if path.endswith(("/log", ".gz")))
    (p.to / damaged).write_bytes(b"!")
    with pytest.raises(ResultClashError, match=damaged):
        p.get(raw=raw)
    mended = p.get(raw=raw, overwrite=True)
    assert p.files() == files
    assert 0 < mended.bytes_fetched < first.bytes_fetched


@pytest.mark.slow
def test_o7_results_that_clash_are_known_before_a_byte_has_come(published: Published) -> None:
    """Seen to fail, by the missing object, when only what has come is compared."""
    p = published
    p.ran({"Key": "{executionID}"}, {"renders/log": b"one"}, {"renders/log": b"two"})
    p.delete(*(each["results"][0]["Params"]["Key"].removeprefix(f"{p.prefix}/") + "renders/log"
               for each in p.documents().values()))  # fmt: skip

    with pytest.raises(ResultClashError, match="1 path: renders/log"):
        p.get(merge=True)
    told = p.run("cat", f"{JOB}/renders/log", "--published", code=101).stderr
    assert "executions have different files of one path: 1 path: renders/log" in told
    assert "hint: say which one is meant: --execution ID" in told


@pytest.mark.slow
def test_o5_what_was_published_is_listed_beside_the_document(published: Published) -> None:
    """Seen to fail when no list is stored, when a count is wrong, and when `ls` lists all of it."""
    p = published
    [execution] = p.ran({"Key": "a", "Encoding": "zstd"}, {"renders/1": b"one", "renders/2": b"2"})

    [(key, document)] = p.documents().items()
    beside = f"{key.removesuffix('.json')}.{document['contents'][0]['hash']}.files"
    listed = p.s3.client().get_object(Bucket=p.s3.bucket, Key=beside)["Body"].read()

    assert [(each["path"], each["size"]) for each in json.loads(listed)["paths"]] == [
        ("renders/1", 3),
        ("renders/2", 1),
    ]
    assert [(each["files"], each["bytes"]) for each in document["contents"]] == [(2, 4)]
    assert p.run("cat", f"{JOB}/renders/1", "--published").stdout == "one"
    text = p.run("ls", f"{JOB}/renders/2", "--published", "--json").stdout
    [listed_execution] = json.loads(text)["executions"]
    assert listed_execution["execution"] == execution
    assert [(each["path"], each["size"]) for each in listed_execution["files"]] == [
        ("renders/2", 1)
    ]


def test_o7_cat_prints_a_file_and_has_no_directory_come(published: Published) -> None:
    """Seen to fail, by the missing object, when what comes shows that it is a directory."""
    p = published
    p.ran({"Key": "all"}, {"renders/1": b"1", "renders/2": b"2"})
    p.delete("all/renders/1", "all/renders/2")

    whole = p.run("cat", f"{JOB}/", "--published", code=66).stderr
    part = p.run("cat", f"{JOB}/renders", "--published", code=66).stderr
    none = p.run("cat", f"{JOB}/none", "--published", code=91).stderr
    by_root = p.run("cat", f"{JOB}/renders/1", "--published", "--by-root", code=2).stderr

    assert "the whole of a job is a directory of results, with renders/1, renders/2" in whole
    assert "renders is a directory of results, with renders/1, renders/2" in part
    assert "there is no result none" in none
    assert "publishers have ByRoot" in by_root


# ------------------------------------------------------------ excluded and held


def damage(published: Published, name: str) -> Callable[[], object]:
    """Have an object of other bytes than its metadata say; return what mends it."""
    client = published.s3.client()
    key = f"{published.prefix}/{name}"
    found = client.get_object(Bucket=published.bucket, Key=key)
    data, metadata = found["Body"].read(), found["Metadata"]

    def put(body: bytes) -> object:
        return client.put_object(Bucket=published.bucket, Key=key, Body=body, Metadata=metadata)

    put(b"!" * len(data))
    return lambda: put(data)


def test_t10_a_published_object_that_is_held_is_waited_for_and_an_excluded_one_is_left_out(
    published: Published,
) -> None:
    """Seen to fail when a get took no notice of what people change of its tasks."""
    p = published
    p.ran({"Key": "all"}, {"renders/1": b"1", "renders/2": b"2", "renders/3": b"3"})
    damage(p, "all/renders/2")
    mend = damage(p, "all/renders/3")
    with pytest.raises(ObjectChangedError):
        p.get()
    mend()
    set_get_tasks(p.user, ["renders/2", "renders/3"], TaskStatus.ONHOLD)
    waiting = in_background(p.get)
    await_that(lambda: waits(p.user))
    assert not p.to.exists()

    set_get_tasks(p.user, ["renders/3"], TaskStatus.QUEUED)
    set_get_tasks(p.user, ["renders/2"], TaskStatus.EXCLUDED)
    result = waiting()

    assert p.files() == {"renders/1": b"1", "renders/3": b"3"}
    assert result.files == 2
    assert result.excluded == [f"s3://{p.bucket}/{p.prefix}/all/renders/2"]
    assert [each.files for each in result.executions] == [2]


@pytest.mark.slow
def test_t10_of_an_archive_that_is_excluded_nothing_comes(published: Published) -> None:
    p = published
    one, two = p.ran(
        {"Key": "{executionID}", "Encoding": "gzip"}, {"renders/1": b"1"}, {"renders/2": b"2"}
    )
    damage(p, f"{one}.tar.gz")
    with pytest.raises(ArchiveUnsafeError):
        p.get()
    set_get_tasks(p.user, [f"archive-{one}"], TaskStatus.ONHOLD)
    waiting = in_background(p.get)
    await_that(lambda: waits(p.user))

    set_get_tasks(p.user, [f"archive-{one}"], TaskStatus.EXCLUDED)
    result = waiting()

    assert p.files() == {"renders/2": b"2"}
    assert [each.execution for each in result.executions] == [two]
    assert result.excluded == [f"s3://{p.bucket}/{p.prefix}/{one}.tar.gz"]
