"""`propmaster cache` looks at the blobs of all stores, checks them, and makes room."""

from pathlib import Path

import pytest

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.digest import Digest
from tests.servers.command import Command
from tests.servers.hooks import QUEUE

BLOBS = [f"blob {number}".encode() * 1000 for number in range(4)]
DIGESTS = [Digest.of(data) for data in BLOBS]
BYTES = sum(len(data) for data in BLOBS)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "host")


def _opened(command: Command, store_url: str) -> BlobCache:
    return BlobCache.open(command.cache_dir, store_url=store_url, max_bytes=10**9, min_free_bytes=0)


@pytest.fixture
def filled(command: Command) -> None:
    """Two blobs of each of two stores."""
    for store_url, chosen in (("s3://one/show", BLOBS[:2]), ("file:///two", BLOBS[2:])):
        with _opened(command, store_url) as cache:
            for data in chosen:
                cache.add(Digest.of(data), data)


def _blob_file(command: Command, digest: Digest) -> Path:
    return next(command.cache_dir.glob(f"v1/*/{digest.hex[:2]}/{digest.hex}"))


@pytest.mark.usefixtures("filled")
def test_show_counts_the_blobs_of_all_stores(command: Command) -> None:
    shown = command("cache", "show", "--json").json

    assert (shown["directory"], shown["exists"]) == (str(command.cache_dir), True)
    assert (shown["blobs"], shown["bytes"]) == (4, BYTES)
    assert (shown["leases"], shown["quarantined"], shown["temporary"]) == (0, 0, 0)
    assert shown["maxBytes"] > 0
    assert "4 blobs, 24.0 kB of " in command("cache", "show").text


@pytest.mark.parametrize("verb", [["show"], ["verify"], ["collect"], ["clear", "--yes"]])
def test_a_cache_that_is_not_there_is_empty_and_stays_away(
    command: Command, verb: list[str]
) -> None:
    done = command("cache", *verb, "--json")

    assert (done.code, done.json["blobs"], done.json["bytes"]) == (0, 0, 0)
    assert not command.cache_dir.exists()


@pytest.mark.parametrize("verb", [["show"], ["verify"], ["collect"], ["clear", "--yes"]])
def test_a_directory_that_is_no_cache_is_left_as_it_is(command: Command, verb: list[str]) -> None:
    command.cache_dir.mkdir(parents=True)
    (command.cache_dir / "letter.txt").write_text("not ours")
    done = command("cache", *verb, "--json")

    assert (done.code, done.json["blobs"]) == (0, 0)
    assert [path.name for path in command.cache_dir.iterdir()] == ["letter.txt"]


@pytest.mark.usefixtures("filled")
def test_verify_reads_everything_and_is_content(command: Command) -> None:
    done = command("cache", "verify", "--json")

    assert done.code == 0
    assert (done.json["blobs"], done.json["bytes"], done.json["quarantined"]) == (4, BYTES, [])


@pytest.mark.usefixtures("filled")
def test_verify_quarantines_what_is_wrong_in_any_store_and_names_it(command: Command) -> None:
    damaged = _blob_file(command, DIGESTS[3])
    damaged.chmod(0o600)
    damaged.write_bytes(BLOBS[3][::-1])
    damaged.chmod(0o400)
    misplaced = damaged.with_name("not-a-blob")
    misplaced.write_bytes(b"?")
    done = command("cache", "verify", "--json")

    assert done.code == 1
    assert sorted((one["path"], one["reason"]) for one in done.json["quarantined"]) == sorted(
        [(str(damaged), "wrong content"), (str(misplaced), "unexpected name")]
    )
    assert not damaged.exists()
    again = command("cache", "verify")
    assert (again.code, "3 blobs" in again.text) == (0, True)
    assert command("cache", "show", "--json").json["quarantined"] == 2


@pytest.mark.usefixtures("filled")
def test_collect_leaves_at_most_what_is_asked_for(command: Command) -> None:
    kept = command("cache", "collect", "--json").json
    assert (kept["blobs"], kept["evictedBlobs"], kept["withinLimits"]) == (4, 0, True)

    done = command("cache", "collect", "--to", "12 kB", "--json").json
    assert (done["blobs"], done["bytes"]) == (2, 12_000)
    assert (done["evictedBlobs"], done["evictedBytes"]) == (2, BYTES - 12_000)


def test_collect_refuses_a_size_that_is_none(command: Command) -> None:
    done = command("cache", "collect", "--to", "much")

    assert (done.code, "'much' is no size" in done.stderr) == (2, True)


@pytest.mark.usefixtures("filled")
def test_clear_removes_all_but_what_a_session_holds(command: Command) -> None:
    with (
        _opened(command, "s3://one/show") as cache,
        cache.lease("session-1", [DIGESTS[0]]),
    ):
        done = command("cache", "clear", "--yes", "--json")
        assert (done.code, done.json["blobs"]) == (0, 1)
        assert cache.contains(DIGESTS[0])

    assert command("cache", "clear", "--yes", "--json").json["blobs"] == 0


@pytest.mark.usefixtures("filled")
def test_clear_asks_first(command: Command) -> None:
    for answer, said in ((b"n\n", "on request"), (b"\n", "on request"), (b"", "hint: say yes")):
        refused = command("cache", "clear", stdin=answer)
        assert (refused.code, said in refused.stderr) == (77, True)
    assert command("cache", "show", "--json").json["blobs"] == 4

    done = command("cache", "clear", stdin=b"y\n")
    assert (done.code, [event["event"] for event in done.events]) == (0, ["cache.collected"])
    assert done.stderr.startswith(f"Remove all blobs from {command.cache_dir}? [y/N]: \n")
    assert command("cache", "show", "--json").json["blobs"] == 0


@pytest.mark.usefixtures("filled")
def test_a_cache_that_others_can_write_is_refused(command: Command) -> None:
    command.cache_dir.chmod(0o777)
    done = command("cache", "show")

    assert (done.code, "error[cache-unsafe]" in done.stderr) == (75, True)


@pytest.fixture
def two_caches(tmp_path: Path) -> list[str]:
    """Options for a host with a general cache of four blobs, and a queue's with as many."""
    directories = [tmp_path / "general", tmp_path / "fast"]
    for directory in directories:
        with BlobCache.open(
            directory, store_url="s3://one", max_bytes=10**9, min_free_bytes=0
        ) as cache:
            for data in BLOBS:
                cache.add(Digest.of(data), data)
    config = tmp_path / "config.toml"
    config.write_text(f"""
        paths = {{cache_dir = "{directories[0]}", state_dir = "{tmp_path}/state"}}
        [queues."{QUEUE}"]
        paths.cache_dir = "{directories[1]}"
        cache.max_bytes = 12000
        cache.min_free = 0
        [queues."{QUEUE[:-1]}f"]
        store.concurrency = 2
        """)
    return ["--json", "--config", str(config)]


def test_collect_brings_each_queues_own_cache_within_its_limits(
    tmp_path: Path, two_caches: list[str]
) -> None:
    command = Command(tmp_path / "host", caches_by_environment=False)
    shown = command("cache", "show", *two_caches).json
    assert [shown["blobs"], *(other["blobs"] for other in shown["others"])] == [4, 4]
    assert [other["maxBytes"] for other in shown["others"]] == [12_000]

    done = command("cache", "collect", *two_caches).json

    assert (done["directory"], done["evictedBlobs"]) == (str(tmp_path / "general"), 0)
    [other] = done["others"]
    assert other["directory"] == str(tmp_path / "fast")
    assert (other["withinLimits"], other["bytes"] <= 12_000) == (True, True)
    verified = command("cache", "verify", *two_caches).json
    assert (verified["blobs"], verified["others"][0]["blobs"]) == (4, other["blobs"])
    assert command("cache", "show", "--queue", QUEUE, *two_caches).json["others"] == []


def test_what_removes_more_than_limits_ask_for_is_about_one_cache(
    tmp_path: Path, two_caches: list[str]
) -> None:
    command = Command(tmp_path / "host", caches_by_environment=False)
    made = command("cache", "collect", "--to", "6 kB", *two_caches).json
    assert (made["blobs"], made["others"]) == (1, [])
    cleared = command("cache", "clear", "--yes", *two_caches).json
    assert (cleared["blobs"], cleared["others"]) == (0, [])
    assert command("cache", "show", "--queue", QUEUE, *two_caches).json["blobs"] == 4

    cleared = command("cache", "clear", "--yes", "--queue", QUEUE, *two_caches).json

    assert (cleared["directory"], cleared["blobs"]) == (str(tmp_path / "fast"), 0)


def test_a_cache_that_is_refused_keeps_nobody_from_the_others(
    tmp_path: Path, two_caches: list[str]
) -> None:
    command = Command(tmp_path / "host", caches_by_environment=False)
    (tmp_path / "general").chmod(0o777)

    done = command("cache", "collect", *two_caches)

    assert (done.code, "error[cache-unsafe]" in done.stderr) == (75, True)
    left = command("cache", "show", "--queue", QUEUE, *two_caches).json
    assert left["bytes"] <= 12_000
