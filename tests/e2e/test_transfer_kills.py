"""A transfer of 100,000 tasks, whose engine is killed at 20 random moments and run again.

Most tasks copy a file to a file, which is quickest and so has the engine change states most often;
every fortieth is an upload, and a few of those are sent in parts. What is moved is counted where it
arrives: by the proxy in front of the store, and by what a file's inode says of its last change.
"""

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
import uuid
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from agent_plugin.content.leftovers import is_partial
from agent_plugin.content.parts import PART_BYTES, WINDOW_PARTS
from agent_plugin.transfer.copying import CONCURRENCY
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault, Request
from tests.servers.hooks import Host
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server

# Each of 1,000 tasks, in the order in which they are carried out.
DIRECTORIES = 100
FILES = 975
UPLOADS = 25
# Every so many directories one upload is large: three parts, each of which takes a second.
LARGE_EVERY = 10
LARGE_BYTES = 2 * PART_BYTES + 7
PART_SECONDS = 1.0
KILLS = 20
# Every so many kills come while the engine starts, which takes a second or two.
EARLY_EVERY = 5
EARLY_SECONDS = 1.5
# Longer than any step takes, so that only a hang meets it.
RUN_SECONDS = 900.0


def content(number: int) -> bytes:
    """Return what a small file has: a function of its number, of 2 to 43 bytes."""
    return b"%d\n" % number * (1 + number % 7)


@dataclass
class Moved:
    """A transfer, and what was seen of it after each kill.

    Attributes:
        files: What the inodes of the files said that the ledger had as done, by their path.
        under_way: How often a task was under way when its engine was killed, by its destination.
        done: Of each kill, how many requests there had been, and which objects were done.
    """

    host: Host
    proxy: FaultProxy
    target: Path
    url: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    under_way: Counter[str] = field(default_factory=Counter)
    done: list[tuple[int, set[str]]] = field(default_factory=list)

    def query(self, sql: str) -> list[tuple[str, ...]]:
        """Return rows of the ledger, which the engine goes on writing."""
        ledger = f"file:{self.host.state_dir / 'ledger.db'}?mode=ro"
        with closing(sqlite3.connect(ledger, uri=True, timeout=60)) as connection:
            return connection.execute(sql).fetchall()

    def count_done(self) -> int:
        return int(self.query("SELECT count(*) FROM task WHERE status = 'done'")[0][0])

    def has_done(self, goal: int, engine: "subprocess.Popen[str]") -> bool:
        """Tell whether so many tasks are done, or the engine is at its end."""
        # Not more often: it costs the engine its time.
        time.sleep(0.1)
        return engine.poll() is not None or self.count_done() >= goal

    def look(self) -> None:
        """See, after a kill, that nothing is moved but what the ledger knows of."""
        rows = self.query("SELECT status, destination FROM task WHERE status != 'queued'")
        done = {place for status, place in rows if status == "done"}
        under_way = {place for status, place in rows if status == "executing"}
        assert done | under_way == {place for _, place in rows}
        assert len(under_way) <= CONCURRENCY
        self.under_way.update(under_way)
        there = dict(self.walk())
        assert {place for place in done if not place.startswith("s3:")} <= there.keys()
        assert there.keys() <= done | under_way, "moved, and the ledger does not know of it"
        for path in there.keys() & done:
            before = self.files.setdefault(path, there[path])
            assert before == there[path], f"{path}: what was done was moved again"
        objects = {place.removeprefix(self.url) for place in done if place.startswith("s3:")}
        self.done.append((len(self.proxy.requests), objects))

    def walk(self) -> list[tuple[str, tuple[int, int]]]:
        """Return the files that are there under their names, with what their inodes say."""
        found = []
        for directory, _, names in os.walk(self.target):
            for name in names:
                if not is_partial(name):
                    path = f"{directory}/{name}"
                    status = Path(path).stat()
                    found.append((f"file://{path}", (status.st_ino, status.st_ctime_ns)))
        return found

    def puts(self) -> list[tuple[int, str, str]]:
        """Return position, key below the prefix, and part of each PUT that was not refused."""
        return [
            (at, key_of(request), parse_qs(request.query).get("partNumber", [""])[0])
            for at, request in enumerate(self.proxy.requests)
            if request.method == "PUT" and (request.status or 200) < 400
        ]


def key_of(request: Request) -> str:
    return request.key.partition("/")[2]


def make_files(source: Path) -> dict[str, bytes]:
    """Make the sources; return what the uploads have, by key below the prefix."""
    uploads = {}
    number = 0
    for directory in range(DIRECTORIES):
        for kind, count in (("file", FILES), ("up", UPLOADS)):
            folder = source / kind / f"{directory:03}"
            folder.mkdir(parents=True)
            for at in range(count):
                data = content(number)
                if kind == "up" and at == 0 and directory % LARGE_EVERY == LARGE_EVERY // 2:
                    data = random.Random(number).randbytes(LARGE_BYTES)
                (folder / f"{number}").write_bytes(data)
                if kind == "up":
                    uploads[f"{directory:03}/{number}"] = data
                number += 1
    return uploads


def create(moved: Moved, source: Path) -> float:
    """Have the transfer made by the command, files and uploads in turn; return the seconds."""
    spec = moved.host.home / "transfer.json"
    pairs = [
        (f"{source}/{kind}/{directory:03}/", f"{target}{directory:03}/")
        for directory in range(DIRECTORIES)
        for kind, target in (("file", f"{moved.target}/"), ("up", moved.url))
    ]
    document = {"tasks": [{"source": one, "destination": other} for one, other in pairs]}
    spec.write_text(json.dumps(document))
    begun = time.monotonic()
    made = moved.host.popen("transfer", "create", "--spec", str(spec))
    _, errors = made.communicate(timeout=RUN_SECONDS)
    assert made.returncode == 0, errors
    return time.monotonic() - begun


def kill_again_and_again(moved: Moved, tasks: int) -> None:
    """Kill the engine at KILLS moments that are spread over the run."""
    chance = random.Random(20_261_126)
    # Not the last ones, which are done faster than anybody could kill.
    moments = sorted(chance.randrange(tasks * 9 // 10) for _ in range(KILLS))
    for at, moment in enumerate(moments):
        goal = max(moment, moved.count_done() + 1)
        engine = moved.host.popen("transfer", "run")
        try:
            if at % EARLY_EVERY == EARLY_EVERY - 1:
                time.sleep(chance.uniform(0, EARLY_SECONDS))
            else:
                until(partial(moved.has_done, goal, engine), seconds=RUN_SECONDS)
                time.sleep(chance.uniform(0, 0.3))
        finally:
            engine.kill()
            engine.communicate()
        assert engine.returncode == -signal.SIGKILL, "it came to its end before it was killed"
        until(lambda: not moved.proxy._open_connections())
        moved.look()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_t1_twenty_kills_of_a_transfer_of_100_000_tasks_lose_nothing_and_move_nothing_twice(
    s3: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """What was done is never touched again; what is moved again was under way at a kill."""
    prefix = f"root-{uuid.uuid4().hex}"
    url = f"s3://{s3.bucket}/{prefix}/"
    host = Host(tmp_path / "host", url, environment=s3.environment_at(fault_proxy.url))
    moved = Moved(host, fault_proxy, tmp_path / "target", url)
    uploads = make_files(tmp_path / "source")
    tasks = DIRECTORIES * (FILES + UPLOADS)
    seconds = create(moved, tmp_path / "source")
    large = [key for key, data in uploads.items() if len(data) == LARGE_BYTES]
    fault_proxy.inject(
        Fault.STALL, methods={"PUT"}, key=f"/({'|'.join(large)})$", seconds=PART_SECONDS
    )
    fault_proxy.forget()

    begun = time.monotonic()
    kill_again_and_again(moved, tasks)
    engine = host.popen("transfer", "run", "--json")
    output, errors = engine.communicate(timeout=RUN_SECONDS)
    run = time.monotonic() - begun

    assert engine.returncode == 0, errors
    [row] = json.loads(output)["transfers"]
    assert (row["status"], row["progress"]) == ("done", 100)
    see_all(moved, s3, prefix, uploads)
    again = see_nothing_twice(moved, set(large))
    print(
        f"{tasks} tasks: made in {seconds:.1f} s, moved in {run:.0f} s with {KILLS} kills,"
        f" {sum(moved.under_way.values())} were under way, {again} uploads or parts sent again"
    )


def see_all(moved: Moved, s3: S3Server, prefix: str, uploads: dict[str, bytes]) -> None:
    """See that everything is at its destination, with its bytes, and nothing else is."""
    assert moved.query("SELECT DISTINCT status FROM task") == [("done",)]
    names = [
        f"{directory:03}/{directory * (FILES + UPLOADS) + at}"
        for directory in range(DIRECTORIES)
        for at in range(FILES)
    ]
    for name in names:
        assert (moved.target / name).read_bytes() == content(int(name[4:])), name
    assert sum(len(files) for _, _, files in os.walk(moved.target)) == len(names)
    client = s3.client()
    stored = {
        entry["Key"].removeprefix(f"{prefix}/"): (entry["Size"], entry["ETag"])
        for page in client.get_paginator("list_objects_v2").paginate(
            Bucket=s3.bucket, Prefix=f"{prefix}/"
        )
        for entry in page.get("Contents", [])
    }
    assert stored.keys() == uploads.keys()
    for key, data in uploads.items():
        size, etag = stored[key]
        assert size == len(data)
        if size < PART_BYTES:
            assert etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
        else:
            answer = client.get_object(Bucket=s3.bucket, Key=f"{prefix}/{key}")
            assert answer["Body"].read() == data
    left = client.list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix)
    assert left.get("Uploads", []) == []


def see_nothing_twice(moved: Moved, large: set[str]) -> int:
    """See that only what was under way at a kill was moved again; return how often."""
    now = dict(moved.walk())
    changed = [path for path, before in moved.files.items() if now[path] != before]
    assert changed == [], "what was done was moved again"
    puts = moved.puts()
    for position, done in moved.done:
        assert not done & {key for at, key, _ in puts if at >= position}, "asked for when done"
    times = Counter((key, part) for _, key, part in puts)
    again = {what: count - 1 for what, count in times.items() if count > 1}
    for (key, _), more in again.items():
        assert more <= moved.under_way[f"{moved.url}{key}"], key
    assert sum(again.values()) <= sum(
        count * (WINDOW_PARTS if place.removeprefix(moved.url) in large else 1)
        for place, count in moved.under_way.items()
        if place.startswith("s3:")
    )
    tries = moved.query("SELECT destination, tries FROM task WHERE destination LIKE 'file:%'")
    for place, tried in tries:
        assert int(tried) <= 1 + moved.under_way[place], f"{place} was begun for no reason"
    return sum(again.values())
