"""Every fault of an object store under a mount: survived with the right bytes, or told.

Told means: the reader gets an input/output error, soon and never a short file, and the error ledger
has the file's path, its hash and the cause. The mount is none the worse: other files are read
meanwhile, and the same file is as soon as the fault is gone, without anybody doing anything.
"""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_plugin.content.blob_cache import BlobCache
from agent_plugin.content.manifest import Manifest
from tests.mount.conftest import Mounter, by_each_transport, open_files
from tests.servers.fault_proxy import FaultProxy
from tests.servers.faults import Fault
from tests.servers.mount_reader import Seen, read_all
from tests.servers.proxied_object import until
from tests.servers.s3_server import S3Server
from tests.servers.trees import FileFacts, files_below, write_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

MIB = 1024 * 1024
SMALL: dict[str | bytes, bytes | int] = {
    **{f"shots/{at % 3}/plate-{at}.exr": 2000 + at for at in range(20)},
    "twice/a": b"the same in two places" * 20,
    "twice/b": b"the same in two places" * 20,
    "empty": b"",
    b"latin-\xe9.tx": 500,
}
# Fetched whole, in two ranges.
MIDDLE: dict[str | bytes, bytes | int] = {"big.abc": 9_000_000, "little.txt": 700}
# Read while it comes, in 17 parts of 4 MiB, the last of them short.
LARGE: dict[str | bytes, bytes | int] = {"big.abc": 65 * MIB, "little.txt": 700}
TREES = {"small": SMALL, "middle": MIDDLE, "large": LARGE}
# Requests that all of a tree takes when nothing fails.
WANTED = {"small": 22, "middle": 3, "large": 18}

# As few tries and as little patience as there can be, for faults that last.
DEADLINE_SECONDS = 3.0
IMPATIENT = {"attempts": 3, "deadline_seconds": DEADLINE_SECONDS, "connect_timeout": 1.0}
# Only of a store that stalls: a busy machine may take longer for any answer.
NOTICED_SOON = {"read_timeout": 0.8}
NOTICED = {"read_timeout": 2.0}
# What a machine that is shared with others may take besides.
SLACK_SECONDS = 20.0


@dataclass(frozen=True)
class Stored:
    """A tree in the bucket."""

    manifest: Manifest
    facts: dict[str, FileFacts]
    store_url: str


@pytest.fixture(scope="module")
def stored(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    """Return one of the trees, stored once for all tests."""
    made: dict[str, Stored] = {}

    def get(name: str) -> Stored:
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            write_files(home / "source", TREES[name], mtime_ns=1_600_000_000 * 10**9)
            url = f"s3://{s3.bucket}/root-{uuid.uuid4().hex}"
            mounter = Mounter(home, url, environment=s3.environment)
            made[name] = Stored(mounter.stored(home / "source"), files_below(home / "source"), url)
        return made[name]

    return get


@dataclass
class Case:
    """A mount of a tree on a fresh host, behind a proxy."""

    mounter: Mounter
    proxy: FaultProxy
    tree: Stored
    at: Path
    descriptors: int

    def read(self, *paths: str, threads: int = 4) -> dict[str, Seen]:
        """Read those files, or all."""
        return read_all(self.at, paths or sorted(self.tree.facts), threads=threads)

    def refused(self, path: str) -> Seen:
        """Read a file that can not be had; see that nothing of it came but right bytes."""
        [seen] = self.read(path).values()
        assert seen.errno == errno.EIO
        return seen

    def assert_reads_right(self, *paths: str) -> None:
        for path, seen in self.read(*paths).items():
            facts = self.tree.facts[path]
            assert (seen.errno, seen.size, seen.sha256) == (0, facts.size, facts.sha256), path

    def key_of(self, path: str) -> str:
        [entry] = [entry for entry in self.tree.manifest.entries if entry.path == path]
        return f"{entry.hash}.xxh128"

    def assert_nothing_failed(self) -> None:
        assert self.mounter.errors(self.at) == []
        assert self.mounter.status(self.at)["counts"]["reads_failed"] == 0

    def assert_sound(self) -> None:
        """The fault is gone: all is read, the cache is right, and in the end nothing is left."""
        self.proxy.refuse(0)
        self.proxy.clear()
        self.assert_reads_right()
        work = self.mounter.host.mounts.work_dir(self.at)
        assert list((work / "spool").iterdir()) == []
        assert self.mounter.host.mounts.end(self.at)
        self.mounter.assert_nothing_is_left()
        cache = self.mounter.host.cache_dir
        assert [path for path in (cache / "v1/tmp").iterdir() if path.is_file()] == []
        with BlobCache.open(
            cache, store_url=self.tree.store_url, max_bytes=1 << 40, min_free_bytes=0
        ) as opened:
            assert opened.verify().corrupt == ()
        assert open_files() <= self.descriptors


@pytest.fixture
def make_case(
    stored: Callable[[str], Stored],
    fault_proxy: FaultProxy,
    s3: S3Server,
    tmp_path: Path,
    transport: str,
) -> Iterator[Callable[..., Case]]:
    """Return a mount of a tree by name, with the settings of its store as keywords."""
    made: list[Case] = []

    def make(name: str, **store: float) -> Case:
        tree = stored(name)
        environment = s3.environment_at(fault_proxy.url)
        descriptors = open_files()
        mounter = Mounter(
            tmp_path,
            tree.store_url,
            environment=environment,
            store=store,
            transport=transport,
        )
        case = Case(mounter, fault_proxy, tree, mounter.mount(tree.manifest), descriptors)
        made.append(case)
        return case

    yield make
    # Whoever is held up by the proxy is let go first.
    fault_proxy.refuse(0)
    fault_proxy.clear()
    for case in made:
        case.mounter.close()


# ------------------------------------------------------------ faults that pass

TRANSIENT = [
    Fault.UNAVAILABLE, Fault.SLOW_DOWN, Fault.INTERNAL_ERROR, Fault.EMPTY_OK, Fault.XML_OK,
    Fault.RESET, Fault.NOT_HTTP, Fault.REPLY_LOST, Fault.RESET_MID_BODY, Fault.SHORT_BODY,
    Fault.SHORT_OBJECT, Fault.LONG_OBJECT, Fault.TRAILING_BYTES, Fault.WRONG_BYTES,
    Fault.FLIPPED_BIT, Fault.STALL, Fault.DUPLICATE_LENGTH, Fault.GZIP_HEADER, Fault.WRONG_RANGE,
]  # fmt: skip


def survives(make_case: Callable[..., Case], fault: Fault, rate: float) -> None:
    case = make_case("small", **(NOTICED if fault is Fault.STALL else {}))
    rule = case.proxy.inject(fault, rate=rate, key="Data/")

    case.assert_reads_right()

    assert rule.hits or rate < 0.1
    assert case.proxy.count("GET", "Data/") <= 2.2 * WANTED["small"]
    case.assert_nothing_failed()
    case.assert_sound()


@pytest.mark.parametrize("fault", [Fault.FLIPPED_BIT])
def test_faults_of_a_third_of_all_requests_are_survived(
    make_case: Callable[..., Case], fault: Fault
) -> None:
    survives(make_case, fault, 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3])
def test_faults_of_any_share_of_all_requests_are_survived(
    make_case: Callable[..., Case], fault: Fault, rate: float
) -> None:
    survives(make_case, fault, rate)


# A part of a large blob has no checksum of its own: these are found when all of it is here.
UNSEEN_IN_PARTS = {Fault.FLIPPED_BIT, Fault.WRONG_BYTES}


@pytest.mark.slow
@by_each_transport
@pytest.mark.parametrize("fault", [*TRANSIENT, Fault.WHOLE_FOR_RANGE, Fault.ETAG_CHANGED])
@pytest.mark.parametrize("name", ["middle", "large"])
def test_a_blob_some_of_whose_parts_fail_at_first_is_read_right(
    make_case: Callable[..., Case], name: str, fault: Fault
) -> None:
    if name == "large" and fault in UNSEEN_IN_PARTS:
        pytest.skip("test_a_large_blob_that_came_wrong_is_refused_until_it_comes_right")
    case = make_case(name, **(NOTICED if fault is Fault.STALL else {}))
    rule = case.proxy.inject(fault, times=2, key=case.key_of("big.abc"))

    case.assert_reads_right("big.abc")

    assert rule.hits == 2
    # Of a blob that is fetched whole, all parts come again when the whole was wrong.
    parts = WANTED[name] - 1
    assert case.proxy.count("GET", "Data/") <= max(3 * parts, parts + 4)
    case.assert_nothing_failed()
    case.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["middle", "large"])
@pytest.mark.parametrize("kibibytes", [0, 64, 128, 1024, 3968, 4032])
def test_a_blob_cut_off_at_any_place_is_read_right(
    make_case: Callable[..., Case], name: str, kibibytes: int
) -> None:
    case = make_case(name)
    case.proxy.inject(
        Fault.RESET_MID_BODY, times=2, offset=kibibytes * 1024, key=case.key_of("big.abc")
    )

    case.assert_reads_right()
    case.assert_nothing_failed()
    case.assert_sound()


@pytest.mark.slow
def test_a_body_that_stands_still_and_goes_on_is_waited_for(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("large", read_timeout=10.0)
    case.proxy.inject(Fault.STALL, offset=100_000, seconds=0.3, key="Data/")

    case.assert_reads_right()
    asked = [
        (request.path, request.headers.get("range"))
        for request in case.proxy.requests
        if request.method == "GET" and "Data/" in request.path
    ]
    assert sorted(asked) == sorted(set(asked)), "no request was sent again"
    case.assert_sound()


@pytest.mark.slow
def test_a_slow_store_is_waited_for(make_case: Callable[..., Case]) -> None:
    case = make_case("small", read_timeout=3.0)
    case.proxy.inject(Fault.DRIP, bytes_per_second=512, key="Data/", times=3)

    case.assert_reads_right()
    assert case.proxy.count("GET", "Data/") == WANTED["small"]
    case.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "large"])
def test_a_store_that_refuses_connections_for_half_a_minute_is_waited_for(
    make_case: Callable[..., Case], name: str
) -> None:
    case = make_case(name)
    case.proxy.inject(Fault.REFUSE, times=1, seconds=30, key="Data/")

    case.assert_reads_right()
    case.assert_nothing_failed()
    case.assert_sound()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["small", "large"])
def test_a_store_that_throttles_for_a_minute_is_waited_for(
    make_case: Callable[..., Case], name: str
) -> None:
    case = make_case(name)
    case.proxy.inject(Fault.SLOW_DOWN, for_seconds=60, key="Data/")

    for path, seen in read_all(case.at, sorted(case.tree.facts), hang_seconds=200).items():
        assert (seen.errno, seen.sha256) == (0, case.tree.facts[path].sha256)
    case.assert_nothing_failed()
    case.assert_sound()


# ------------------------------------------------------------ faults that last


def is_told(case: Case, path: str, code: str, cause: str) -> None:
    """Read a file that can not be had, and see what is told of it."""
    seen = case.refused(path)

    assert seen.size == 0
    assert seen.seconds < 1.1 * DEADLINE_SECONDS + SLACK_SECONDS
    [error] = case.mounter.host.mounts.errors(case.at)
    assert (error.path, error.code) == (path, code), error.reason
    assert error.hash in case.key_of(path)
    assert cause in error.reason
    # Others are read meanwhile, and it is told once.
    others = sorted(case.tree.facts.keys() - {path})
    case.assert_reads_right(*others)
    assert len(case.mounter.errors(case.at)) == 1
    case.assert_sound()


def impatient_with(fault: Fault) -> dict[str, float]:
    return {**IMPATIENT, **(NOTICED_SOON if fault is Fault.STALL else {})}


LASTING = [
    (Fault.UNAVAILABLE, "E_THROTTLED", "503 ServiceUnavailable"),
    (Fault.SLOW_DOWN, "E_THROTTLED", "503 SlowDown"),
    (Fault.INTERNAL_ERROR, "E_NETWORK", "500 InternalError"),
    (Fault.FORBIDDEN, "E_ACCESS", "403 AccessDenied"),
    (Fault.EXPIRED_TOKEN, "E_ACCESS", "400 ExpiredToken"),
    (Fault.NOT_FOUND, "E_NOT_FOUND", "404 NoSuchKey"),
    (Fault.RANGE_NOT_SATISFIABLE, "E_PROTOCOL", "416 InvalidRange"),
    (Fault.REDIRECT_301, "E_PROTOCOL", "another region"),
    (Fault.REDIRECT_307, "E_PROTOCOL", "another region"),
    (Fault.EMPTY_OK, "E_CHECKSUM", "is stored as 0 bytes"),
    (Fault.XML_OK, "E_CHECKSUM", "is stored as 166 bytes"),
    (Fault.RESET, "E_NETWORK", "Connection reset by peer"),
    (Fault.NOT_HTTP, "E_NETWORK", "the connection was lost"),
    (Fault.REPLY_LOST, "E_NETWORK", "Connection reset by peer"),
    (Fault.RESET_MID_BODY, "E_NETWORK", "Connection reset by peer"),
    (Fault.SHORT_BODY, "E_NETWORK", "the connection was cut"),
    (Fault.SHORT_OBJECT, "E_CHECKSUM", "is stored as 1003 bytes"),
    (Fault.LONG_OBJECT, "E_CHECKSUM", "is stored as 2014 bytes"),
    (Fault.WRONG_BYTES, "E_CHECKSUM", "is stored as xxh128:"),
    (Fault.FLIPPED_BIT, "E_CHECKSUM", "is stored as xxh128:"),
    (Fault.WRONG_RANGE, "E_CHECKSUM", "is stored as xxh128:"),
    (Fault.STALL, "E_NETWORK", "timed out"),
    (Fault.DUPLICATE_LENGTH, "E_NETWORK", "the connection was lost"),
]


@pytest.mark.parametrize(("fault", "code", "cause"), [LASTING[19]])
def test_a_fault_that_lasts_is_told_soon_and_the_read_succeeds_once_it_is_gone(
    make_case: Callable[..., Case], fault: Fault, code: str, cause: str
) -> None:
    case = make_case("small", **impatient_with(fault))
    path = "shots/1/plate-7.exr"
    case.proxy.inject(fault, key=case.key_of(path))
    is_told(case, path, code, cause)


@pytest.mark.slow
@by_each_transport
@pytest.mark.parametrize(("fault", "code", "cause"), LASTING)
def test_any_fault_that_lasts_is_told_soon_and_the_read_succeeds_once_it_is_gone(
    make_case: Callable[..., Case], fault: Fault, code: str, cause: str
) -> None:
    case = make_case("small", **impatient_with(fault))
    path = "shots/1/plate-7.exr"
    case.proxy.inject(fault, key=case.key_of(path))
    is_told(case, path, code, cause)


LASTING_ON_PARTS = [
    (Fault.UNAVAILABLE, "E_THROTTLED", "503 ServiceUnavailable"),
    (Fault.FORBIDDEN, "E_ACCESS", "403 AccessDenied"),
    (Fault.EXPIRED_TOKEN, "E_ACCESS", "400 ExpiredToken"),
    (Fault.NOT_FOUND, "E_NOT_FOUND", "404 NoSuchKey"),
    # How many is where the part begins that was refused first.
    (Fault.RANGE_NOT_SATISFIABLE, "E_CHECKSUM", " bytes or less"),
    (Fault.REDIRECT_307, "E_PROTOCOL", "another region"),
    (Fault.EMPTY_OK, "E_PROTOCOL", "non-partial response"),
    (Fault.XML_OK, "E_PROTOCOL", "non-partial response"),
    (Fault.WHOLE_FOR_RANGE, "E_PROTOCOL", "non-partial response"),
    (Fault.RESET, "E_NETWORK", "Connection reset by peer"),
    (Fault.RESET_MID_BODY, "E_NETWORK", "Connection reset by peer"),
    (Fault.SHORT_BODY, "E_NETWORK", "the connection was cut"),
    (Fault.SHORT_OBJECT, "E_PROTOCOL", ""),
    (Fault.LONG_OBJECT, "E_PROTOCOL", ""),
    (Fault.WRONG_RANGE, "E_PROTOCOL", ""),
    (Fault.GZIP_HEADER, "E_PROTOCOL", "coded as 'gzip'"),
    (Fault.STALL, "E_NETWORK", "timed out"),
    (Fault.DUPLICATE_LENGTH, "E_NETWORK", "the connection was lost"),
]


@pytest.mark.slow
@by_each_transport
@pytest.mark.parametrize(("fault", "code", "cause"), LASTING_ON_PARTS)
@pytest.mark.parametrize("name", ["middle", "large"])
def test_any_fault_that_lasts_on_parts_is_told_soon_and_the_read_succeeds_once_it_is_gone(
    make_case: Callable[..., Case], name: str, fault: Fault, code: str, cause: str
) -> None:
    case = make_case(name, **impatient_with(fault))
    case.proxy.inject(fault, key=case.key_of("big.abc"))
    is_told(case, "big.abc", code, cause)


def came_wrong(case: Case) -> None:
    """Without telling the kernel, half of it would be read again from memory."""
    case.proxy.inject(Fault.FLIPPED_BIT, times=1, offset=100, key=case.key_of("big.abc"))
    assert case.refused("big.abc").size < 65 * MIB
    assert case.mounter.errors(case.at) == [("big.abc", "E_CHECKSUM")]
    case.proxy.inject(Fault.FORBIDDEN, key=case.key_of("big.abc"))
    until(lambda: case.refused("big.abc").size == 0)


def test_a_large_blob_that_came_wrong_is_refused_from_its_first_byte_on(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("large", **IMPATIENT)
    came_wrong(case)


@pytest.mark.slow
@by_each_transport
def test_a_large_blob_that_came_wrong_is_read_when_it_comes_right(
    make_case: Callable[..., Case],
) -> None:
    case = make_case("large", **IMPATIENT)
    came_wrong(case)
    case.proxy.clear()
    until(lambda: case.read("big.abc")["big.abc"].errno == 0)
    case.assert_sound()


@pytest.mark.slow
def test_an_object_that_is_replaced_while_it_is_read_is_refused(
    make_case: Callable[..., Case], s3: S3Server
) -> None:
    case = make_case("large", **IMPATIENT)
    client, key = s3.client(), ""
    for page in client.get_paginator("list_objects_v2").paginate(
        Bucket=s3.bucket, Prefix=case.tree.store_url.rpartition("/")[2]
    ):
        key = next((o["Key"] for o in page["Contents"] if o["Size"] == 65 * MIB), key)
    original = client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()
    with (case.at / "big.abc").open("rb", buffering=0) as file:
        assert len(file.read(100)) == 100
        client.put_object(Bucket=s3.bucket, Key=key, Body=bytes(len(original)))
        try:
            assert case.refused("big.abc").size < len(original)
            until(lambda: case.refused("big.abc").size == 0)
        finally:
            client.put_object(Bucket=s3.bucket, Key=key, Body=original)
    assert ("big.abc", "E_CHECKSUM") in case.mounter.errors(case.at)
    until(lambda: case.read("big.abc")["big.abc"].errno == 0)
    case.assert_sound()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoint", "cause"),
    [("http://no-such-host.invalid:8333", "lookup"), ("http://127.0.0.1:9", "refused")],
)
def test_a_store_that_can_not_be_reached_is_told(
    stored: Callable[[str], Stored], s3: S3Server, tmp_path: Path, endpoint: str, cause: str
) -> None:
    tree = stored("small")
    mounter = Mounter(
        tmp_path, tree.store_url, environment=s3.environment_at(endpoint), store=dict(IMPATIENT)
    )
    try:
        at = mounter.mount(tree.manifest)
        [seen] = read_all(at, ["twice/a"]).values()
        assert (seen.errno, seen.size) == (errno.EIO, 0)
        assert seen.seconds < 1.1 * DEADLINE_SECONDS + SLACK_SECONDS
        [error] = mounter.host.mounts.errors(at)
        assert (error.path, error.code) == ("twice/a", "E_NETWORK")
        assert cause in error.reason
        assert mounter.host.mounts.end(at)
        mounter.assert_nothing_is_left()
    finally:
        mounter.close()
