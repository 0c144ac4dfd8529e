"""Transfers that people create: files and objects copied, steered, killed and gone on with."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from agent_plugin.content import events, parts
from agent_plugin.content.errors import (
    CancelledError,
    JobInvalidError,
    LocalReadError,
    PathClashError,
    UnsafePathError,
)
from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.objects import ObjectAccess, ObjectInfo
from agent_plugin.content.s3_objects import S3Objects, open_objects
from agent_plugin.content.store import Cancellation
from agent_plugin.services import open_copying
from agent_plugin.settings import Settings, load
from agent_plugin.transfer.copy_places import Place, plan_copies
from agent_plugin.transfer.copy_settings import CopySettings, NameFilter
from agent_plugin.transfer.copying import BEAT_SECONDS, CONCURRENCY, Copying, CopyResult, retry_wait
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec, lease_owner
from agent_plugin.transfer.progress import Progress, describe_transfer
from agent_plugin.transfer.states import TaskStatus, TransferStatus
from agent_plugin.transfers import open_session
from tests.servers.command import Command, Done
from tests.servers.disks import image_mounted
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault, Rule
from tests.servers.s3_server import S3Server

MIB = 1024 * 1024


class Farm:
    """A host with a ledger, and a server that it sees through a proxy."""

    def __init__(self, directory: Path, s3: S3Server, proxy: FaultProxy, prefix: str) -> None:
        self.directory = directory
        self.proxy = proxy
        self.s3 = s3
        self.prefix = prefix
        self.environment = s3.environment_at(proxy.url)
        variables = {"HOME": str(directory), "PROPMASTER_STATE_DIR": str(directory)}
        self.settings: Settings = load(None, environment=variables)
        self.ledger = Ledger.open(directory / "ledger.db")
        self.objects = open_objects(ObjectAccess(), environment=s3.environment)

    def url(self, name: str) -> str:
        return f"s3://{self.s3.bucket}/{self.prefix}/{name}"

    def stored(self, name: str) -> bytes:
        answer = self.s3.client().get_object(Bucket=self.s3.bucket, Key=f"{self.prefix}/{name}")
        return answer["Body"].read()

    def store(self, name: str, data: bytes) -> str:
        self.objects.put(self.s3.bucket, f"{self.prefix}/{name}", data, overwrite=True)
        return self.url(name)

    def file(self, name: str, data: bytes) -> Path:
        path = self.directory / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def create(
        self,
        pairs: Sequence[tuple[str | Path, str | Path]],
        *,
        status: TransferStatus = TransferStatus.WAITING,
        priority: int = 500,
        priorities: Sequence[int] = (),
        **settings: Any,
    ) -> int:
        told = CopySettings.read(settings)
        planned = list(
            plan_copies(
                [TaskSpec(os.fspath(source), os.fspath(target), 0) for source, target in pairs],
                told,
                lambda _: self.objects,
                Cancellation(),
            )
        )
        if priorities:
            planned = [
                replace(task, priority=priority)
                for task, priority in zip(planned, priorities, strict=True)
            ]
        spec = TransferSpec("copy", os.fspath(pairs[0][0]), os.fspath(pairs[0][1]))
        return self.ledger.create(
            spec, planned, status=status, priority=priority, settings=told.document()
        ).id

    def copying(self, cancellation: Cancellation | None = None, **changes: Any) -> Copying:
        return open_copying(
            self.settings,
            self.ledger,
            cancellation=cancellation or Cancellation(),
            environment=self.environment,
            **changes,
        )

    def run(self) -> CopyResult:
        return self.copying().run()

    def uploads(self) -> list[str]:
        answer = self.s3.client().list_multipart_uploads(Bucket=self.s3.bucket, Prefix=self.prefix)
        return [upload["Key"] for upload in answer.get("Uploads", [])]

    def tasks(self, transfer: int) -> dict[str, str]:
        """Return the state of each task by the last component of its source."""
        return {task.source.rpartition("/")[2]: task.status for task in self.ledger.tasks(transfer)}

    def tell(self, transfer: int, status: TransferStatus) -> None:
        """Set a transfer's state from another process, as a person does."""
        self.elsewhere(f"set_transfer({transfer}, status=TransferStatus('{status}'))")

    def tell_task(self, transfer: int, name: str, status: TaskStatus) -> None:
        """Set a task's state, by the last component of its source."""
        self.elsewhere_task(transfer, name, {"status": str(status)})

    def elsewhere_task(self, transfer: int, name: str, change: dict[str, str | int]) -> None:
        [task] = [
            task.id for task in self.ledger.tasks(transfer) if task.source.endswith(f"/{name}")
        ]
        self.elsewhere(f"set_tasks({transfer}, {{{task}: {change}}})")

    def elsewhere(self, call: str) -> None:
        """Have another process call a method of the ledger."""
        program = f"""
import sys
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger
from agent_plugin.transfer.states import TransferStatus
with Ledger.open(Path(sys.argv[1], "ledger.db")) as ledger:
    ledger.{call}
"""
        arguments = [sys.executable, "-c", program, os.fspath(self.directory)]
        subprocess.run(arguments, check=True)


@pytest.fixture
def farm(tmp_path: Path, s3: S3Server, fault_proxy: FaultProxy, s3_prefix: str) -> Iterator[Farm]:
    (tmp_path / "state").mkdir(mode=0o700)
    host = Farm(tmp_path / "state", s3, fault_proxy, s3_prefix)
    yield host
    host.ledger.close()


@pytest.fixture
def running(farm: Farm) -> Iterator[Callable[..., threading.Thread]]:
    """Starts the engine on a thread of its own; it ends with the test."""
    cancellation = Cancellation()
    threads: list[threading.Thread] = []

    def start(concurrency: int = CONCURRENCY) -> threading.Thread:
        def run() -> None:
            copying = farm.copying(cancellation)
            copying._concurrency = concurrency
            with suppress(CancelledError):
                copying.run()

        thread = threading.Thread(target=run)
        thread.start()
        threads.append(thread)
        return thread

    yield start
    cancellation.cancel()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------------ places


def test_t4_each_side_may_be_a_file_or_an_object(farm: Farm) -> None:
    data = {name: os.urandom(size) for name, size in (("a b", 10), ("é#?%20", 9 * MIB), ("c", 0))}
    pairs = []
    for name, content in data.items():
        path = farm.file(name, content)
        os.utime(path, (1_000_000, 1_000_000))
        pairs.append((path, farm.url(f"up/{name}")))
    up = farm.create(pairs)
    farm.run()
    over = farm.create([(farm.url(f"up/{name}"), farm.url(f"over/{name}")) for name in data])
    farm.run()
    down = farm.create(
        [(farm.url(f"over/{name}"), farm.directory / "down" / name) for name in data]
    )
    local = farm.create(
        [(farm.directory / "files" / name, f"{farm.directory}/local/") for name in data]
    )
    farm.run()

    for name, content in data.items():
        assert (farm.directory / "down" / name).read_bytes() == content
        assert (farm.directory / "local" / name).read_bytes() == content
        assert (farm.directory / "local" / name).stat().st_mtime == 1_000_000
        assert farm.stored(f"over/{name}") == content
    for transfer in (up, over, down, local):
        row = farm.ledger.transfer(transfer)
        assert (row.status, row.size, row.done) == (
            TransferStatus.DONE,
            *[sum(map(len, data.values()))] * 2,
        )
        assert set(farm.tasks(transfer).values()) == {"done"}
    assert farm.uploads() == []
    assert not [path for path in farm.directory.rglob("*") if is_partial(path.name)]


def test_t4_a_tree_goes_to_its_own_places_below_the_destination(farm: Farm) -> None:
    for name in ("a/b", "a/c/d", "a-e"):
        farm.store(f"tree/{name}", name.encode())
    (farm.directory / "link").symlink_to("/etc/passwd")
    down = farm.create([(farm.url("tree/"), f"{farm.directory}/tree/")])
    farm.run()
    (farm.directory / "tree/a/link").symlink_to("/etc/passwd")
    up = farm.create([(f"{farm.directory}/tree/", farm.url("back/"))])
    farm.run()

    assert [(farm.directory / "tree" / name).read_text() for name in ("a/b", "a/c/d", "a-e")] == [
        "a/b",
        "a/c/d",
        "a-e",
    ]
    assert sorted(task.destination for task in farm.ledger.tasks(up)) == [
        farm.url(f"back/{name}") for name in ("a-e", "a/b", "a/c/d")
    ]
    assert farm.ledger.transfer(down).size == len("a/ba/c/da-e")
    assert farm.ledger.transfer(up).status is TransferStatus.DONE


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a//b", "a/../b", "./x", "x" * 256, ""])
def test_t4_no_name_leads_out_of_the_destination(name: str) -> None:
    with pytest.raises(UnsafePathError):
        Place.parse("/directory/").below(name)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("relative/path", "/a"),
        ("ftp://host/a", "/a"),
        ("s3://", "/a"),
        ("file://host/a", "/a"),
        ("/a/", "/b"),
        ("file:///a?b", "/c"),
    ],
)
def test_t4_what_is_no_place_is_refused(source: str, destination: str) -> None:
    with pytest.raises(JobInvalidError) as refused:
        list(_planned(source, destination))
    assert refused.value.hint


def _planned(source: str, destination: str) -> Iterator[TaskSpec]:
    """Return what a copy from this host is planned to be."""

    def no_objects(_access: ObjectAccess) -> S3Objects:
        raise AssertionError

    wanted = [TaskSpec(source, destination, 0)]
    return plan_copies(wanted, CopySettings(), no_objects, Cancellation())


def test_t4_what_is_below_a_directory_comes_in_the_order_of_the_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files before directories, names as they are, nothing by a link.

    Seen to fail when names are not sorted, when links to directories are entered, and when a
    name that is not UTF-8 is replaced.
    """
    names = [b"b", b"a-z/x", b"a/z", b"a/\xff%", b"a\xff/\xe9", b"A", "é#".encode()]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), b"in", name)  # noqa: PTH118 - bytes
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - bytes
        Path(os.fsdecode(path)).write_bytes(name)
    (tmp_path / "in" / "to-directory").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "in" / "to-file").symlink_to("b")
    os.mkfifo(tmp_path / "in" / "a" / "fifo")

    with caplog.at_level("INFO", logger=events.LOGGER_NAME):
        found = list(_planned(f"{tmp_path}/in/", f"{tmp_path}/out/"))
    skipped = {vars(record)["path"] for record in caplog.records}
    in_bucket = list(_planned(f"{tmp_path}/in/a-z/", "s3://bucket/to/"))

    ordered = ["A", "b", "%C3%A9%23", "a/z", "a/%FF%25", "a-z/x", "a%FF/%E9"]
    below = f"file://{tmp_path}/"
    assert [task.source for task in found] == [f"{below}in/{name}" for name in ordered]
    assert [task.destination for task in found] == [f"{below}out/{name}" for name in ordered]
    assert [task.size for task in found] == [1, 1, 3, 3, 4, 5, 4]
    assert skipped == {f"{tmp_path}/in/{name}" for name in ("to-directory", "to-file", "a/fifo")}
    assert [task.destination for task in in_bucket] == ["s3://bucket/to/x"]


def test_t4_a_tree_may_be_deeper_than_calls_may_be(tmp_path: Path) -> None:
    """Calls, those of `os.walk` too, end at a depth of about a thousand."""
    deep = tmp_path / "deep"
    try:
        for _ in range(1_010):
            deep.mkdir()
            deep = deep / "d"
        deep.write_bytes(b"x")
        assert [task.size for task in _planned(f"{tmp_path}/deep/", f"{tmp_path}/out/")] == [1]
    finally:
        # What removes a test's directory is a recursion.
        subprocess.run(["rm", "-r", tmp_path / "deep"], check=True)


def test_t4_a_directory_that_becomes_a_link_meanwhile_is_not_entered(tmp_path: Path) -> None:
    """Seen to fail when directories are opened by names that are followed."""
    (tmp_path / "in" / "directory").mkdir(parents=True)
    (tmp_path / "in" / "first").write_bytes(b"")
    planned = _planned(f"{tmp_path}/in/", f"{tmp_path}/out/")
    assert next(planned).source.endswith("/first")
    (tmp_path / "in" / "directory").rmdir()
    (tmp_path / "in" / "directory").symlink_to("/etc")

    with pytest.raises(LocalReadError, match=f"{tmp_path}/in/directory"):
        next(planned)


@pytest.mark.parametrize("name", ["..", ".", "a//b", "a/../b", "x" * 256, "a/" + "x" * 256])
def test_t4_no_key_of_a_listing_leads_out_of_the_destination(farm: Farm, name: str) -> None:
    """Also of a directory of which another file is to be copied.

    Seen to fail when only the first name in a directory is looked at.
    """
    listed = [
        ObjectInfo("bucket", f"from/{key}", 1, "", "", 0.0)
        for key in ("first", "a/first", f"a/{name}")
    ]
    objects = farm.objects
    objects.list = lambda *_arguments, **_named: iter(listed)  # type: ignore[method-assign]
    wanted = [TaskSpec("s3://bucket/from/", f"{farm.directory}/", 0)]
    planned = plan_copies(wanted, CopySettings(), lambda _: objects, Cancellation())

    assert [next(planned).size, next(planned).size] == [1, 1]
    with pytest.raises(UnsafePathError):
        next(planned)


@pytest.mark.parametrize("names", [("a", "A"), ("Tex/a", "tex/a"), ("é", "É")])
def test_t4_names_that_the_destination_does_not_keep_apart_are_refused(
    farm: Farm, names: tuple[str, str]
) -> None:
    """Of trees and of single files. Seen to fail when the one that came last stood for both."""
    first, second = [farm.file(f"in/{name}", name.encode()) for name in names]
    image, at = farm.directory / "image", farm.directory / "disk"
    with image_mounted("exfat", image, at, size=64 * MIB) as disk:
        for pairs in (
            [(f"{farm.directory}/files/in/", f"{disk}/out/")],
            [(first, disk / "out" / names[0]), (second, disk / "out" / names[1])],
        ):
            with pytest.raises(PathClashError, match="are one name on the file system"):
                farm.create(pairs)
        assert list(disk.iterdir()) == []
        farm.create([(first, f"{disk}/out/"), (first, f"{disk}/out/")])
        farm.run()
        assert [path.read_bytes() for path in (disk / "out").iterdir()] == [names[0].encode()]

    farm.create([(f"{farm.directory}/files/in/", f"{farm.directory}/out/")])
    farm.run()
    for name in names:
        assert (farm.directory / "out" / name).read_bytes() == name.encode()


def test_t4_two_servers_are_a_stream(farm: Farm) -> None:
    """Nothing is kept here, metadata and headers go along, and the range is that of the ETag."""
    data = os.urandom(9 * MIB)
    headers: dict[str, Any] = {
        "CacheControl": "max-age=60",
        "ContentDisposition": "inline",
        "ContentEncoding": "gzip",
        "ContentLanguage": "de",
        "ContentType": "text/x",
    }
    farm.s3.client().put_object(
        Bucket=farm.s3.bucket,
        Key=f"{farm.prefix}/a",
        Body=data,
        Metadata={"who": "me"},
        **headers,
    )
    transfer = farm.create(
        [(farm.url("a"), farm.url("b"))], destination={"endpoint": farm.s3.endpoint_url}
    )

    farm.run()

    assert farm.ledger.transfer(transfer).status is TransferStatus.DONE
    assert farm.stored("b") == data
    head = farm.s3.client().head_object(Bucket=farm.s3.bucket, Key=f"{farm.prefix}/b")
    assert head["Metadata"] == {"who": "me"}
    assert {name: head.get(name) for name in headers} == headers
    got = [request for request in farm.proxy.requests if request.method == "GET"]
    assert len(got) == 2
    assert all(request.headers["if-match"] for request in got)


# ---------------------------------------------------------------------------------- failures


def test_t10_what_is_missing_fails_alone_and_can_be_excluded(farm: Farm) -> None:
    good = farm.file("good", b"x" * 10)
    gone = farm.file("gone", b"y" * 20)
    transfer = farm.create([(good, farm.url("good")), (gone, farm.url("gone"))])
    gone.unlink()

    result = farm.run()

    row = farm.ledger.transfer(transfer)
    assert (result.files, result.failed) == (1, 1)
    assert (row.status, row.error_code, row.size, row.done) == (
        TransferStatus.FAILED,
        "E_READ",
        30,
        10,
    )
    assert farm.tasks(transfer) == {"good": "done", "gone": "failed"}
    farm.tell_task(transfer, "gone", TaskStatus.EXCLUDED)
    farm.tell(transfer, TransferStatus.WAITING)
    farm.run()
    row = farm.ledger.transfer(transfer)
    assert (row.status, row.size, row.done) == (TransferStatus.DONE, 10, 10)


def test_t13_what_may_pass_is_tried_again_and_not_for_ever(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_plugin.transfer.copying.RETRY_FIRST_SECONDS", 0.05)
    heals = farm.create([(farm.file("a", b"a"), farm.url("heals"))])
    stays = farm.create([(farm.file("a", b"a"), farm.url("stays"))], max_tries=2)
    never = farm.create([(farm.file("a", b"a"), farm.url("never"))])
    farm.proxy.inject(Fault.INTERNAL_ERROR, methods={"PUT"}, key="heals", times=7)
    farm.proxy.inject(Fault.INTERNAL_ERROR, methods={"PUT"}, key="stays")
    farm.proxy.inject(Fault.FORBIDDEN, methods={"PUT"}, key="never")

    farm.run()

    def told(transfer: int) -> tuple[str, str, int]:
        [task] = farm.ledger.tasks(transfer)
        return task.status, task.error_code, task.tries

    assert told(heals) == ("done", "", 3)
    assert told(stays) == ("failed", "E_NETWORK", 2)
    assert told(never) == ("failed", "E_ACCESS", 1)
    assert farm.proxy.count("PUT", "never") == 1


def test_t13_waits_grow_to_half_a_minute() -> None:
    assert [retry_wait(tries, 0.5) for tries in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert retry_wait(1, 0.0) == 0.75


@pytest.mark.parametrize("to", ["object", "file"])
def test_t9_no_object_is_brought_in_parts_of_which_nobody_knows_that_they_are_of_one(
    farm: Farm, to: str
) -> None:
    """From a server without ETags. Seen to fail when what came was half of each object."""
    farm.proxy.inject(Fault.NO_ETAG, methods={"GET", "HEAD"}, key="/a$")
    stall = farm.proxy.inject(
        Fault.STALL, what=re.compile(f"bytes={16 * MIB}-"), key="/a$", times=1
    )
    farm.proxy.faults.reverse()
    target = farm.url("got") if to == "object" else farm.directory / "got"
    transfer = farm.create([(farm.store("a", bytes(20 * MIB)), target)], stream=True)

    def replaced() -> None:
        until(lambda: stall.hits or farm.ledger.transfer(transfer).finished)
        farm.store("a", os.urandom(20 * MIB))
        stall.released.set()

    replacing = threading.Thread(target=replaced)
    replacing.start()

    farm.run()
    replacing.join()

    [task] = farm.ledger.tasks(transfer)
    assert (task.status, task.error_code) == ("failed", "E_PROTOCOL")
    assert "neither ETag nor version" in task.error
    assert list(farm.objects.list(farm.s3.bucket, f"{farm.prefix}/got")) == []
    assert not (farm.directory / "got").exists()


def _edit(path: Path, data: bytes) -> None:
    """Write a file in its place, and give it the time back that it had."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("to", ["object", "file"])
def test_t9_what_was_brought_of_a_file_is_not_gone_on_with_when_it_was_edited(
    farm: Farm, to: str
) -> None:
    """Also if that keeps its size and modification time.

    Seen to fail when the time of the inode was not looked at: what came of it was half of each.
    """
    path = farm.file("a", os.urandom(48 * MIB))
    target = farm.url("got") if to == "object" else farm.directory / "got"
    transfer = farm.create([(path, target)], speed_limit=20 * MIB if to == "file" else 0)
    stall = farm.proxy.inject(Fault.STALL, methods={"PUT"}, what=re.compile("4$"))
    wish = Cancellation()

    def stop() -> None:
        until(lambda: stall.hits if to == "object" else farm.ledger.transfer(transfer).done)
        wish.cancel()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(CancelledError):
        farm.copying(wish).run()
    stopping.join()
    farm.proxy.release()
    assert farm.uploads() or _partials(farm.directory)
    data = os.urandom(48 * MIB)
    _edit(path, data)

    farm.run()

    assert farm.ledger.transfer(transfer).status is TransferStatus.DONE
    assert (farm.stored("got") if isinstance(target, str) else target.read_bytes()) == data
    assert (farm.uploads(), _partials(farm.directory)) == ([], [])


@pytest.mark.parametrize("keeps", ["nothing", "its time"])
def test_t9_a_source_that_changes_while_it_is_sent_is_not_stored(farm: Farm, keeps: str) -> None:
    path = farm.file("a", os.urandom(20 * MIB))
    transfer = farm.create([(path, farm.url("a"))])
    stall = farm.proxy.inject(Fault.STALL, methods={"PUT"}, times=1)

    def change() -> None:
        until(lambda: stall.hits)
        if keeps == "nothing":
            path.write_bytes(bytes(20 * MIB))
        else:
            _edit(path, bytes(20 * MIB))
        farm.proxy.release()

    changing = threading.Thread(target=change)
    changing.start()

    farm.run()
    changing.join()

    [task] = farm.ledger.tasks(transfer)
    assert (task.status, task.error_code) == ("failed", "E_SOURCE_CHANGED")
    until(lambda: farm.uploads() == [])
    assert list(farm.objects.list(farm.s3.bucket, f"{farm.prefix}/a")) == []


# ---------------------------------------------------------------------------------- steering


def _slow(farm: Farm, kind: str) -> tuple[int, str]:
    """Create a transfer of a large thing, of which a part moves; return it and the method.

    The others wait until the proxy is released.
    """
    data = os.urandom(26 * MIB)
    if kind == "up":
        farm.proxy.inject(Fault.STALL, methods={"PUT"}, skip=1)
        return farm.create([(farm.file("a", data), farm.url("a"))]), "PUT"
    farm.store("a", data)
    farm.proxy.inject(Fault.STALL, methods={"GET"}, skip=1, offset=MIB)
    return farm.create([(farm.url("a"), farm.directory / "a")]), "GET"


@pytest.mark.parametrize("kind", ["up", "down"])
def test_t9_a_pause_from_another_process_is_heeded_whatever_the_server_does(
    farm: Farm, running: Callable[[], threading.Thread], kind: str
) -> None:
    """And what was moved before is not moved again after it.

    Seen to fail when what a download has is not read, and when the parts of an upload are not.
    """
    transfer, method = _slow(farm, kind)
    engine = running()
    until(lambda: _moved(farm, method))
    farm.tell(transfer, TransferStatus.PAUSED)
    engine.join(30)
    assert not engine.is_alive(), "it waits for the server"
    row = farm.ledger.transfer(transfer)
    assert row.status is TransferStatus.PAUSED
    farm.proxy.release()
    until(lambda: all(request.status for request in farm.proxy.requests))
    before = Counter(_parts(farm, method))
    farm.proxy.forget()

    farm.tell(transfer, TransferStatus.WAITING)
    farm.run()

    assert farm.ledger.transfer(transfer).status is TransferStatus.DONE
    again = before & Counter(_parts(farm, method))
    # What was under way when it was paused, all but one; an upload's parts arrive all the same.
    assert sum(again.values()) <= (0 if kind == "up" else sum(before.values()) - 1)
    data = farm.stored("a")
    path = farm.directory / ("files/a" if kind == "up" else "a")
    assert path.read_bytes() == data
    assert farm.uploads() == []


@pytest.mark.parametrize("kind", ["up", "down"])
@pytest.mark.parametrize("word", ["aborted", pytest.param("failed", marks=pytest.mark.slow)])
def test_t9_what_is_aborted_leaves_nothing(
    farm: Farm, running: Callable[[], threading.Thread], kind: str, word: str
) -> None:
    transfer, method = _slow(farm, kind)
    engine = running()
    until(lambda: _moved(farm, method))
    if word == "aborted":
        farm.tell(transfer, TransferStatus.ABORTED)
    else:
        farm.tell_task(transfer, "a", TaskStatus.FAILED)
    engine.join(30)
    assert not engine.is_alive()

    farm.proxy.release()
    until(lambda: farm.uploads() == [])
    assert farm.ledger.transfer(transfer).status == word
    assert not [path for path in farm.directory.rglob("*") if is_partial(path.name)]
    with farm.ledger.file.read() as connection:
        left = connection.execute("SELECT upload_id, parts FROM task").fetchall()
    assert left == [("", "[]")]
    if kind == "up":
        assert list(farm.objects.list(farm.s3.bucket, f"{farm.prefix}/a")) == []
    else:
        assert not (farm.directory / "a").exists()


def _steer(farm: Farm, *words: str) -> Done:
    """Run a command of `propmaster` on the host."""
    done = Command(farm.directory.parent, farm.environment)(*words)
    assert done.code == 0, done.stderr
    return done


@pytest.mark.parametrize("kind", ["up", pytest.param("down", marks=pytest.mark.slow)])
def test_t9_what_was_paused_and_then_aborted_leaves_nothing(
    farm: Farm, running: Callable[[], threading.Thread], kind: str
) -> None:
    """No engine runs any more: the command removes it; if it can not it says so, and the next does.

    Seen to fail when the command only sets the state, and when what could not be removed is
    forgotten.
    """
    transfer, method = _slow(farm, kind)
    engine = running()
    until(lambda: _moved(farm, method))
    farm.tell(transfer, TransferStatus.PAUSED)
    engine.join(30)
    farm.proxy.release()
    assert farm.uploads() or _partials(farm.directory)
    if kind == "up":
        farm.proxy.inject(Fault.INTERNAL_ERROR, methods={"DELETE"})
        done = _steer(farm, "transfer", "abort", str(transfer))
        assert done.text.startswith(f"transfer {transfer} is aborted")
        assert "something half-written is left: abort the upload of " in done.stderr
        assert farm.uploads()
        farm.proxy.clear()

    done = _steer(farm, "transfer", "abort", str(transfer))

    assert "half-written" not in done.stderr
    assert (farm.uploads(), _partials(farm.directory)) == ([], [])
    assert farm.ledger.transfer(transfer).status is TransferStatus.ABORTED
    assert farm.ledger.transfer(transfer).done == 0


@pytest.mark.parametrize("noun", ["job", "task"])
def test_t9_what_a_program_aborts_or_excludes_leaves_nothing(farm: Farm, noun: str) -> None:
    """Where no engine has it any more. Seen to fail when only the commands remove it."""
    pairs = [(farm.file("a", b"a"), farm.url("a"))]
    transfer = farm.create(pairs, status=TransferStatus.PAUSED)
    upload = farm.s3.client().create_multipart_upload(
        Bucket=farm.s3.bucket, Key=f"{farm.prefix}/a"
    )["UploadId"]
    with farm.ledger.file.write() as connection:
        connection.execute("UPDATE task SET upload_id = ?, parts = '{\"a\": 1}'", (upload,))
    session = open_session(farm.settings, environment=farm.environment)
    session.update("job", transfer, {"priority": 7})
    assert farm.uploads()

    if noun == "job":
        session.update("job", transfer, {"status": "aborted"})
    else:
        session.update_many("task", transfer, [{"uri": "0", "status": "excluded"}])

    assert farm.uploads() == []
    assert farm.ledger.transfer(transfer).status == ("aborted" if noun == "job" else "done")


def _slow_here(farm: Farm, name: str, size: int = 48 * MIB, seconds: int = 10) -> int:
    """Create a transfer of a file to another, which takes so long."""
    source = farm.file(name, random.Random(name).randbytes(size))
    return farm.create([(source, farm.directory / name)], speed_limit=size // seconds)


@pytest.mark.parametrize(
    "word", ["paused", "aborted", pytest.param("excluded", marks=pytest.mark.slow)]
)
def test_t9_t12_a_copy_from_file_to_file_is_steered_and_seen_while_it_goes(
    farm: Farm, running: Callable[..., threading.Thread], word: str
) -> None:
    """Within one file. Paused, the next run copies what is missing and nothing else.

    Seen to fail when its progress is not written down before its end, and when the next run begins
    at its beginning.
    """
    transfer = _slow_here(farm, "a")
    engine = running()
    until(lambda: farm.ledger.transfer(transfer).done > 0)
    until(lambda: described(farm, transfer).etr)
    assert 0 < described(farm, transfer).percent < 100
    if word == "excluded":
        farm.tell_task(transfer, "a", TaskStatus.EXCLUDED)
    else:
        farm.tell(transfer, TransferStatus(word))
    engine.join(5)
    assert not engine.is_alive(), "it does not wait for the end of the file"

    row = farm.ledger.transfer(transfer)
    left = _partials(farm.directory)
    if word != "paused":
        assert (row.status, left) == ("done" if word == "excluded" else word, [])
        assert (row.size, row.done) == ((0, 0) if word == "excluded" else (row.size, 0))
        assert not (farm.directory / "a").exists()
        return
    assert (row.status, len(left)) == (TransferStatus.PAUSED, 1)
    with farm.ledger.file.write() as connection:
        connection.execute("UPDATE transfer SET settings = '{}'")
    farm.tell(transfer, TransferStatus.WAITING)
    result = farm.run()
    assert 0 < row.done < row.size
    assert (result.bytes, result.files) == (row.size - row.done, 1)
    assert (farm.directory / "a").read_bytes() == (farm.directory / "files/a").read_bytes()
    assert not _partials(farm.directory)


def described(farm: Farm, transfer: int) -> Progress:
    """Return how far a transfer is, as `transfer show` tells."""
    with farm.ledger.file.read() as connection:
        samples = connection.execute(
            "SELECT time, bytes FROM sample WHERE transfer = ? ORDER BY time", (transfer,)
        ).fetchall()
    return describe_transfer(farm.ledger.transfer(transfer), samples, time.time())


@pytest.mark.slow
def test_t9_what_is_resumed_goes_on_in_the_engine_that_had_it(
    farm: Farm, running: Callable[..., threading.Thread]
) -> None:
    """Which is kept by another transfer meanwhile."""
    other = _slow_here(farm, "other", seconds=100)
    transfer = _slow_here(farm, "a", seconds=5)
    engine = running()
    until(lambda: farm.ledger.transfer(transfer).done > 0)
    farm.tell(transfer, TransferStatus.PAUSED)
    until(lambda: farm.ledger.transfer(transfer).lease_owner == "")
    before = farm.ledger.transfer(transfer).done

    farm.tell(transfer, TransferStatus.WAITING)

    until(lambda: farm.ledger.transfer(transfer).status is TransferStatus.DONE)
    assert before > 0
    assert farm.ledger.tasks(transfer)[0].tries == 2
    farm.tell(other, TransferStatus.ABORTED)
    engine.join(5)
    assert not engine.is_alive()
    assert (farm.directory / "a").read_bytes() == (farm.directory / "files/a").read_bytes()


def test_t9_a_run_that_is_stopped_goes_on_in_the_next(farm: Farm) -> None:
    transfer, method = _slow(farm, "up")
    cancellation = Cancellation()

    def cancel() -> None:
        until(lambda: _moved(farm, method))
        cancellation.cancel()

    threading.Thread(target=cancel).start()

    with pytest.raises(CancelledError):
        farm.copying(cancellation).run()

    assert farm.ledger.transfer(transfer).status is TransferStatus.WAITING
    assert farm.tasks(transfer) == {"a": "queued"}
    farm.proxy.release()
    farm.run()
    assert farm.ledger.transfer(transfer).status is TransferStatus.DONE


def test_t10_a_task_under_way_that_is_queued_by_hand_begins_anew_when_it_has_stopped(
    farm: Farm, running: Callable[[], threading.Thread]
) -> None:
    """And not beside itself: the engine had two attempts of one task, and fell over the second."""
    transfer, method = _slow(farm, "up")
    engine = running()
    until(lambda: _moved(farm, method))

    farm.tell_task(transfer, "a", TaskStatus.QUEUED)

    until(lambda: farm.ledger.tasks(transfer)[0].tries > 1)
    farm.proxy.release()
    engine.join(30)
    [task] = farm.ledger.tasks(transfer)
    assert (task.status, task.tries) == (TaskStatus.DONE, 2)
    assert farm.stored("a") == (farm.directory / "files/a").read_bytes()
    assert farm.uploads() == []


def test_t1_an_engine_that_has_lost_its_transfer_leaves_it_to_the_other(
    farm: Farm, running: Callable[[], threading.Thread]
) -> None:
    """Neither what was sent nor a row of it: the other one goes on with both."""
    transfer, method = _slow(farm, "up")
    engine = running()
    until(lambda: _moved(farm, method))

    def kept() -> list[tuple[str, str]]:
        with farm.ledger.file.read() as connection:
            return connection.execute("SELECT status, upload_id FROM task").fetchall()

    until(lambda: kept()[0][1])
    before = kept()
    # As whoever takes over does, when this process stood still for longer than its lease.
    with farm.ledger.file.write() as connection:
        connection.execute("UPDATE transfer SET lease_owner = ?", (lease_owner(os.getppid()),))

    engine.join(30)

    assert not engine.is_alive()
    assert farm.ledger.transfer(transfer).status is TransferStatus.RUNNING
    assert len(farm.uploads()) == 1
    assert kept() == before


def _partials(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if is_partial(path.name)]


def _moved(farm: Farm, method: str) -> bool:
    """Whether a part has moved, and others are about to."""
    asked = [request.status for request in farm.proxy.requests if request.method == method]
    if method == "PUT":
        return len(asked) > 1 and any(asked)
    # Of an answer that has begun nothing need have come yet.
    with farm.ledger.file.read() as connection:
        [[done]] = connection.execute("SELECT max(done) FROM task").fetchall()
    return len(asked) > 1 and done > 0


def _parts(farm: Farm, method: str) -> list[str]:
    """Return which parts have moved."""
    if method == "GET":
        return [
            request.headers["range"]
            for request in farm.proxy.requests
            if request.method == "GET" and "range" in request.headers and request.status == 206
        ]
    return [
        parse_qs(request.query)["partNumber"][0]
        for request in farm.proxy.requests
        if "partNumber" in request.query and request.status == 200 and request.method == "PUT"
    ]


def test_t11_tasks_are_taken_by_priority_of_transfer_then_of_task_then_age(farm: Farm) -> None:
    path = farm.file("a", b"a")
    farm.create([(path, farm.url(f"low-{n}")) for n in range(3)], priority=1)
    farm.create(
        [(path, farm.url(f"high-{n}")) for n in range(3)], priority=999, priorities=[1, 500, 999]
    )
    farm.create([(path, farm.url(f"middle-{n}")) for n in range(3)])

    copying = farm.copying()
    copying._concurrency = 1
    copying.run()

    assert [request.key.rpartition("/")[2] for request in farm.proxy.requests] == [
        *(f"high-{n}" for n in (2, 1, 0)),
        *(f"middle-{n}" for n in range(3)),
        *(f"low-{n}" for n in range(3)),
    ]


@pytest.mark.parametrize("way", ["made", pytest.param("set", marks=pytest.mark.slow)])
def test_t11_a_copy_under_way_gives_way_at_its_next_part(
    farm: Farm, running: Callable[..., threading.Thread], way: str
) -> None:
    """Of seven parts six are under way when another transfer, or another's priority, comes.

    Seen to fail when nothing under way is told to pause.
    """
    low = farm.create([(farm.file("low", os.urandom(7 * parts.PART_BYTES)), farm.url("low"))])
    low_stands = farm.proxy.inject(Fault.STALL, methods={"PUT"}, key="low")
    first_stand = farm.proxy.inject(Fault.STALL, methods={"PUT"}, key="high-[01]")
    last_stand = farm.proxy.inject(Fault.STALL, methods={"PUT"}, key="high-[23]")
    high = [(farm.file(f"high-{n}", b"x"), farm.url(f"high-{n}")) for n in range(4)]
    other = farm.create(high, priority=1) if way == "set" else 0
    engine = running(concurrency=2)
    until(lambda: farm.proxy.count("PUT", "low") == 6)
    if way == "set":
        farm.elsewhere(f"set_transfer({other}, priority=501)")
    else:
        other = farm.create(high, priority=501)

    until(lambda: farm.ledger.transfer(low).status is TransferStatus.WAITING)
    until(lambda: farm.proxy.count("PUT", "high") == 2)
    low_stands.released.set()
    until(lambda: all(each.status for each in farm.proxy.requests if each.key.endswith("low")))
    # For so long a seventh has had room.
    time.sleep(2 * BEAT_SECONDS)
    first_stand.released.set()
    # What pauses goes on when none of these waits for a place, and may overtake one that has it.
    until(lambda: farm.proxy.count("PUT", "high") == 4)
    last_stand.released.set()
    engine.join(30)

    assert farm.ledger.transfer(low).status is TransferStatus.DONE
    assert farm.ledger.transfer(other).status is TransferStatus.DONE
    asked = [
        request.key.rpartition("/")[2].partition("-")[0]
        for request in farm.proxy.requests
        if request.method == "PUT"
    ]
    assert asked == ["low"] * 6 + ["high"] * 4 + ["low"]
    assert farm.stored("low") == (farm.directory / "files/low").read_bytes()


def test_t11_a_task_takes_the_place_of_one_of_lower_priority(
    farm: Farm, running: Callable[..., threading.Thread]
) -> None:
    """With one place, `b` comes between the parts of `a`.

    Seen to fail when what is under way is not ranked, and when it is not told to pause.
    """
    pairs = [
        (farm.file("a", os.urandom(7 * parts.PART_BYTES)), farm.url("a")),
        (farm.file("b", b"b"), farm.url("b")),
        (farm.file("c", b"c"), farm.url("c")),
    ]
    transfer = farm.create(pairs)
    lower = farm.proxy.inject(Fault.STALL, methods={"PUT"}, key="/a")
    farm.proxy.inject(Fault.STALL, methods={"PUT"}, key="/b")
    engine = running(concurrency=1)
    until(lambda: farm.proxy.count("PUT", "/a") == 6)

    farm.elsewhere_task(transfer, "b", {"priority": 501})
    until(lambda: farm.proxy.count("PUT", "/b") == 1)
    lower.released.set()
    until(lambda: all(each.status for each in farm.proxy.requests if each.key.endswith("/a")))
    # For so long a seventh has had room.
    time.sleep(2 * BEAT_SECONDS)
    assert farm.proxy.count("PUT", "/a") == 6
    farm.proxy.release()
    engine.join(30)

    order = [request.key[-1] for request in farm.proxy.requests if request.method == "PUT"]
    assert order == [*"aaaaaabac"]
    assert set(farm.tasks(transfer).values()) == {"done"}


HIGHER = """
import sys
from pathlib import Path
from agent_plugin.transfer.ledger import Ledger, TaskSpec, TransferSpec
with Ledger.open(Path(sys.argv[1], "ledger.db")) as ledger:
    row = ledger.begin(TransferSpec("sync-in", "/x", "/y"), [TaskSpec("x", "y", 1)])
    ledger.set_transfer(row.id, priority=501)
    print("begun", flush=True)
    sys.stdin.read()
    ledger.finish(row.id)
"""


def test_t11_copies_give_way_to_what_another_process_moves(
    farm: Farm, running: Callable[[], threading.Thread]
) -> None:
    """And wait for its end, rather than end themselves. Seen to fail without either."""
    arguments = [sys.executable, "-c", HIGHER, os.fspath(farm.directory)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        transfer = farm.create([(farm.file("a", b"a"), farm.url("a"))])
        engine = running()
        until(lambda: farm.ledger.transfer(transfer).lease_owner)
        until(lambda: farm.ledger.transfer(transfer).status is TransferStatus.WAITING)
        engine.join(1)
        assert engine.is_alive()
        assert farm.proxy.count("PUT") == 0
        other.stdin.close()
        engine.join(20)

    assert farm.ledger.transfer(transfer).status is TransferStatus.DONE


# ---------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("include", "exclude", "admitted"),
    [
        ([], [], {"a.exr", "A.EXR", "b.exr.tmp", "c.txt", "[x]?"}),
        (["*.exr"], [], {"a.exr", "A.EXR"}),
        (["a*"], [], {"a.exr", "A.EXR"}),
        (["*exr*"], [], {"a.exr", "A.EXR", "b.exr.tmp"}),
        (["b*tmp"], [], {"b.exr.tmp"}),
        (["c.txt"], [], {"c.txt"}),
        (["re('^[ab]')"], [], {"a.exr", "A.EXR", "b.exr.tmp"}),
        ([], ["*.exr"], {"b.exr.tmp", "c.txt", "[x]?"}),
        (["a.exr"], ["*.exr"], {"a.exr", "A.EXR", "b.exr.tmp", "c.txt", "[x]?"}),
        (["[x]?"], [], {"[x]?"}),
    ],
)
def test_t15_patterns_say_what_is_copied_and_include_wins(
    include: list[str], exclude: list[str], admitted: set[str]
) -> None:
    names = NameFilter(include, exclude)
    every = ["a.exr", "A.EXR", "b.exr.tmp", "c.txt", "[x]?"]

    assert {name for name in every if names.admits(f"s3://exr/exr/{name}")} == admitted


@pytest.mark.parametrize("pattern", ["", "x" * 201, "re('(')"])
def test_t15_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(JobInvalidError):
        CopySettings.read({"include": [pattern]})
    with pytest.raises(JobInvalidError, match="unknown"):
        CopySettings.read({"unknown": 1})


def test_t15_a_pattern_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_plugin.content.pattern.MAX_SEARCH_SECONDS", 0.05)
    names = NameFilter(["re('(.*)(.*)(.*)(.*)(.*)[^!]$')"], [])

    with pytest.raises(JobInvalidError, match="was not done"):
        names.admits(f"/{'a' * 200}!")


def test_t15_what_patterns_leave_out_is_excluded(farm: Farm) -> None:
    """Also of tasks that somebody adds to the transfer afterwards."""
    for name in ("a.exr", "b.tmp"):
        farm.file(name, b"x")
    transfer = farm.create([(f"{farm.directory}/files/", farm.url("up/"))], exclude=["*.tmp"])
    assert list(farm.tasks(transfer)) == ["a.exr"]
    farm.ledger.add_tasks(
        transfer, [TaskSpec(f"{farm.directory}/files/b.tmp", farm.url("up/b.tmp"), 1)]
    )

    farm.run()

    assert farm.tasks(transfer) == {"a.exr": "done", "b.tmp": "excluded"}
    assert farm.ledger.transfer(transfer).size == 1


def test_t15_what_exists_is_ignored_or_refused_as_is_told(farm: Farm) -> None:
    path = farm.file("a", b"new")
    there = farm.directory / "there"
    there.write_bytes(b"old")
    farm.store("there", b"old")
    pairs: list[tuple[str | Path, str | Path]] = [
        (path, farm.url("there")),
        (path, there),
        (farm.store("new", b"new"), there),
    ]
    ignoring = farm.create(pairs, ignore_existing=True)
    refusing = farm.create(pairs, overwrite=False)
    farm.run()

    assert farm.ledger.transfer(ignoring).status is TransferStatus.DONE
    assert {task.error_code for task in farm.ledger.tasks(refusing)} == {"E_KEY_EXISTS"}
    assert (there.read_bytes(), farm.stored("there")) == (b"old", b"old")
    farm.create(pairs)
    farm.run()
    assert (there.read_bytes(), farm.stored("there")) == (b"new", b"new")


@pytest.mark.parametrize("kind", ["up", "down", "here"])
def test_t15_a_transfer_keeps_its_speed_limit(farm: Farm, kind: str) -> None:
    """Seen to fail when a copy from file to file takes nothing of what is allowed."""
    size = 9 * MIB
    data = os.urandom(size)
    source = farm.store("a", data) if kind == "down" else farm.file("a", data)
    pair = (source, farm.url("a") if kind == "up" else farm.directory / "a")
    farm.create([pair], speed_limit=6 * MIB)

    begun = time.monotonic()
    farm.run()

    # Whatever else keeps the machine busy makes it slower.
    assert time.monotonic() - begun > 0.8 * size / (6 * MIB)


# -------------------------------------------------------------------------------------- kills

ENGINE = """
import json, sys
from pathlib import Path
from agent_plugin.content.store import Cancellation
from agent_plugin.services import open_copying
from agent_plugin.settings import load
from agent_plugin.transfer.ledger import Ledger
directory, environment = sys.argv[1], json.loads(sys.argv[2])
settings = load(None, environment={"HOME": directory, "PROPMASTER_STATE_DIR": directory})
with Ledger.open(Path(directory, "ledger.db")) as ledger:
    open_copying(settings, ledger, cancellation=Cancellation(), environment=environment).run()
"""


@pytest.mark.parametrize("kind", ["up", "down", "copy", "file"])
def test_t1_what_a_killed_engine_had_made_and_not_noted_is_done(farm: Farm, kind: str) -> None:
    """Also where nothing may be replaced: it is no other's.

    Seen to fail when what is there is taken for somebody else's, whatever it is, and when it is
    taken for our own, whatever it is.
    """
    data = b"made and not noted"
    source = farm.file("a", data) if kind in ("up", "file") else farm.store("a", data)
    target = farm.directory / "got" if kind in ("down", "file") else farm.url("got")
    transfer = farm.create([(source, target)], overwrite=False)
    farm.run()
    _forget_done(farm)

    farm.run()
    assert farm.ledger.transfer(transfer).status is TransferStatus.DONE

    _forget_done(farm)
    if isinstance(target, Path):
        target.write_bytes(b"others had made it")
    else:
        farm.store("got", b"others had made it")
    farm.run()
    [task] = farm.ledger.tasks(transfer)
    assert (task.status, task.error_code) == (TaskStatus.FAILED, "E_KEY_EXISTS")


def test_t1_hosts_whose_tasks_have_one_number_keep_out_of_each_others_way(
    farm: Farm, tmp_path: Path
) -> None:
    """In a directory that they share.

    Seen to fail when the number alone named what grows there: the first file was done, and had of
    the second what had come by then.
    """
    (tmp_path / "other").mkdir(mode=0o700)
    other = Farm(tmp_path / "other", farm.s3, farm.proxy, farm.prefix)
    hosts = {"a": farm, "b": other}
    data = {name: os.urandom(20 * MIB) for name in hosts}

    def begin(name: str, host: Farm) -> tuple[int, threading.Thread, Rule]:
        """Have a file brought, until its last part has been asked for."""
        transfer = host.create([(host.store(name, data[name]), tmp_path / "shared" / name)])
        what = re.compile(f"bytes={16 * MIB}-")
        stall = farm.proxy.inject(Fault.STALL, key=f"/{name}$", what=what, times=1)
        thread = threading.Thread(target=host.run)
        thread.start()
        until(lambda: stall.hits)
        return transfer, thread, stall

    begun = {name: begin(name, host) for name, host in hosts.items()}
    for _, thread, stall in begun.values():
        stall.released.set()
        thread.join(60)

    for name, host in hosts.items():
        [task] = host.ledger.tasks(begun[name][0])
        assert (task.id, task.status) == (1, TaskStatus.DONE)
        assert (tmp_path / "shared" / name).read_bytes() == data[name]
    other.ledger.close()


@pytest.mark.parametrize("kind", ["up", "copy", "others"])
def test_t1_an_object_of_parts_that_a_killed_engine_had_completed_is_done(
    farm: Farm, kind: str
) -> None:
    """Killed after the store has made the object, and before the engine has heard of it.

    Seen to fail when the object is not looked at, when the last parts are not written down before
    it is completed, and when what has the same size is taken for it.
    """
    data = os.urandom(9 * MIB)
    source = farm.store("a", data) if kind == "copy" else farm.file("a", data)
    transfer = farm.create([(source, farm.url("got"))], overwrite=kind == "copy", stream=True)
    # The first POST begins the upload.
    farm.proxy.inject(Fault.STALL, methods={"POST"}, skip=1, offset=0)
    with _engine(farm) as engine:
        until(lambda: list(farm.objects.list(farm.s3.bucket, f"{farm.prefix}/got")))
        engine.kill()
        engine.wait()
    farm.proxy.release()
    if kind == "others":
        farm.store("got", bytes(9 * MIB))
    farm.proxy.forget()

    farm.run()

    [task] = farm.ledger.tasks(transfer)
    if kind == "others":
        assert (task.status, task.error_code) == (TaskStatus.FAILED, "E_KEY_EXISTS")
        assert farm.stored("got") == bytes(9 * MIB)
        return
    assert (task.status, task.done) == (TaskStatus.DONE, len(data))
    assert [request for request in farm.proxy.requests if request.method in ("PUT", "POST")] == []
    assert farm.stored("got") == data
    assert farm.uploads() == []


def _forget_done(farm: Farm) -> None:
    """Leave the ledger as a kill does that comes before the engine notes what it has made."""
    with farm.ledger.file.write() as connection:
        connection.execute(
            "UPDATE transfer SET status = 'running', lease_owner = '1:1', lease_until = 9e9,"
            " finished = NULL"
        )
        connection.execute(
            "UPDATE task SET status = 'executing', done = 0, finished = NULL, parts = ?",
            (json.dumps({"partial": os.fspath(farm.directory / "nowhere")}),),
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["up", "down", "copy"])
def test_t1_an_engine_that_is_killed_again_and_again_moves_nothing_twice(
    farm: Farm, kind: str
) -> None:
    """At 20 random moments: what is done again is at most what was under way then."""
    chance = random.Random(kind)
    data = {f"large-{n}": os.urandom(56 * MIB) for n in range(2)}
    data |= {f"small-{n}": os.urandom(1000 + n) for n in range(100)}
    method = "GET" if kind == "down" else "PUT"
    pairs: list[tuple[str | Path, str | Path]] = []
    for name, content in data.items():
        source = farm.file(name, content) if kind == "up" else farm.store(name, content)
        target = farm.directory / "got" / name if kind == "down" else farm.url(f"got/{name}")
        pairs.append((source, target))
    transfer = farm.create(pairs, stream=kind == "copy")
    farm.proxy.inject(Fault.STALL, methods={method}, seconds=0.05)
    farm.proxy.forget()
    under_way = 0

    for _ in range(20):
        before = len(farm.proxy.requests)
        with _engine(farm) as engine:
            _await_start(farm, engine, before)
            time.sleep(chance.uniform(0, 0.4))
            engine.kill()
            engine.wait()
        until(lambda: not farm.proxy._open_connections())
        # Of a small file the one request, of a large one the parts of a window.
        under_way += sum(
            parts.WINDOW_PARTS if "large" in task.source else 1
            for task in farm.ledger.tasks(transfer)
            if task.status == "executing"
        )
    with _engine(farm) as engine:
        assert engine.wait(300) == 0

    row = farm.ledger.transfer(transfer)
    assert (row.status, row.done) == (TransferStatus.DONE, sum(map(len, data.values())))
    for name, content in data.items():
        got = (
            (farm.directory / "got" / name).read_bytes()
            if kind == "down"
            else farm.stored(f"got/{name}")
        )
        assert got == content
    assert farm.uploads() == []
    assert not [path for path in farm.directory.rglob("*") if is_partial(path.name)]
    again = sum(count - 1 for count in Counter(_moves(farm, method)).values())
    print(f"{kind}: {again} moved again of {len(_moves(farm, method))}, {under_way} were under way")
    assert again <= under_way


def _await_start(farm: Farm, engine: "subprocess.Popen[bytes]", before: int) -> None:
    """Wait until an engine asks for something: starting takes longer than most of what it does."""
    until(lambda: len(farm.proxy.requests) > before or engine.poll() is not None)


def _moves(farm: Farm, method: str) -> list[tuple[str, ...]]:
    """Return what was moved, whole objects and parts, each as often as it was moved."""
    return [
        (
            request.key,
            request.headers.get("range", ""),
            *parse_qs(request.query).get("partNumber", []),
        )
        for request in farm.proxy.requests
        if request.method == method and request.status in (200, 206)
    ]


@contextmanager
def _engine(farm: Farm) -> Iterator["subprocess.Popen[bytes]"]:
    arguments = [os.fspath(farm.directory), json.dumps(farm.environment)]
    with subprocess.Popen([sys.executable, "-c", ENGINE, *arguments]) as engine:
        try:
            yield engine
        finally:
            engine.kill()
