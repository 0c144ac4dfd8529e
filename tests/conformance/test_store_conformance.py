"""What every kind of store does, in one suite for all of them; the docstrings are the contract."""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from agent_plugin.content import layout
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    BlobCorruptError,
    BlobNotFoundError,
    CancelledError,
    DocumentNotFoundError,
    FileChangedError,
    ManifestInvalidError,
    StoreAccessError,
    UnsafePathError,
)
from agent_plugin.content.open_store import build_store
from agent_plugin.content.retry import RetryPolicy
from agent_plugin.content.store import WHOLE_BLOB_BYTES, Cancellation, Store
from tests.servers.promptness import STOP_SECONDS
from tests.servers.s3_server import S3Server

MIB = 1024 * 1024
LARGE_BYTES = 40 * MIB
# What can not succeed shall not be tried for long.
IMPATIENT = RetryPolicy(attempts=3, initial_seconds=0.01, cap_seconds=0.05)


class Behind(Protocol):
    """The store as somebody sees it who goes around it."""

    def write(self, name: str, data: bytes) -> None: ...

    def read(self, name: str) -> bytes: ...

    def names(self) -> list[str]:
        """Everything that is there, unfinished uploads included."""


@dataclass
class BehindDirectory:
    root: Path

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def names(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()
        )


@dataclass
class BehindS3:
    s3: S3Server
    prefix: str

    def write(self, name: str, data: bytes) -> None:
        self.s3.client().put_object(Bucket=self.s3.bucket, Key=f"{self.prefix}/{name}", Body=data)

    def read(self, name: str) -> bytes:
        key = f"{self.prefix}/{name}"
        return self.s3.client().get_object(Bucket=self.s3.bucket, Key=key)["Body"].read()

    def names(self) -> list[str]:
        client = self.s3.client()
        start = f"{self.prefix}/"
        listing = client.list_objects_v2(Bucket=self.s3.bucket, Prefix=start)
        uploads = client.list_multipart_uploads(Bucket=self.s3.bucket, Prefix=start)
        return sorted(
            [entry["Key"].removeprefix(start) for entry in listing.get("Contents", [])]
            + [f"upload of {upload['Key']}" for upload in uploads.get("Uploads", [])]
        )


@dataclass
class Subject:
    """A store and what is behind it."""

    store: Store
    behind: Behind
    progress: list[int] = field(default_factory=list)
    hashed: bytearray = field(default_factory=bytearray)

    def put_file(
        self, digest: Digest, data: bytes, cancellation: Cancellation | None = None
    ) -> bool:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            return self.store.put_file(
                digest,
                file.fileno(),
                cancellation=cancellation or Cancellation(),
                progress=self.progress.append,
            )

    def fetch(self, digest: Digest, cancellation: Cancellation | None = None) -> bytes:
        with tempfile.TemporaryFile() as file:
            self.store.fetch(
                digest,
                file.fileno(),
                cancellation=cancellation or Cancellation(),
                progress=self.progress.append,
                hashed=self.take,
            )
            return os.pread(file.fileno(), digest.size + 1, 0)

    def take(self, piece: memoryview, offset: int) -> None:
        assert offset in (0, len(self.hashed)), "in order, or from the start"
        self.hashed[offset:] = bytes(piece)


@pytest.fixture(params=["directory", "s3"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    if request.param == "directory":
        root = tmp_path / "a store"
        root.mkdir()
        return Subject(build_store(f"file://{tmp_path}/a%20store"), BehindDirectory(root))
    s3: S3Server = request.getfixturevalue("s3")
    prefix: str = request.getfixturevalue("s3_prefix")
    store = build_store(
        f"s3://{s3.bucket}/{prefix}", environment=s3.environment, policy=IMPATIENT, account_id=""
    )
    return Subject(store, BehindS3(s3, prefix))


@pytest.fixture(scope="module")
def large() -> bytes:
    return os.urandom(LARGE_BYTES)


@pytest.mark.parametrize(
    "size", [0, 1, 16_384, WHOLE_BLOB_BYTES - 1, WHOLE_BLOB_BYTES, WHOLE_BLOB_BYTES + 1]
)
def test_what_was_put_is_what_is_got(subject: Subject, size: int) -> None:
    """Whichever way it went in and comes out, at the sizes where the way changes."""
    data = os.urandom(size)
    digest = Digest.of(data)
    assert subject.store.find_missing([digest]) == {digest}

    assert subject.put_file(digest, data)

    assert subject.behind.names() == [layout.blob_key(digest)]
    assert subject.behind.read(layout.blob_key(digest)) == data
    assert subject.store.find_missing([digest]) == set()
    assert subject.store.get(digest) == data
    assert subject.fetch(digest) == data
    assert subject.hashed == data
    assert sum(subject.progress) == 2 * size


def test_a_blob_of_many_parts_makes_the_round_trip(subject: Subject, large: bytes) -> None:
    """Progress tells each byte once, in each direction."""
    digest = Digest.of(large)

    assert subject.put_file(digest, large)
    assert sum(subject.progress) == LARGE_BYTES
    assert subject.fetch(digest) == large
    assert subject.hashed == large
    assert sum(subject.progress) == 2 * LARGE_BYTES
    assert subject.behind.names() == [layout.blob_key(digest)]


def test_a_blob_that_is_there_is_not_stored_again(subject: Subject) -> None:
    data = b"once is enough"
    digest = Digest.of(data)

    assert subject.store.put(digest, data) is True
    assert subject.store.put(digest, data) is False
    assert subject.put_file(digest, data) is False
    assert subject.progress == []


def test_a_large_blob_that_is_there_is_not_stored_again(subject: Subject) -> None:
    data = os.urandom(WHOLE_BLOB_BYTES + 1)
    digest = Digest.of(data)

    assert subject.put_file(digest, data) is True
    assert subject.put_file(digest, data) is False


def test_an_object_that_was_cut_off_is_missing_and_is_healed_by_put(subject: Subject) -> None:
    data = b"the whole of it"
    digest = Digest.of(data)
    subject.behind.write(layout.blob_key(digest), data[:4])
    assert subject.store.find_missing([digest]) == {digest}

    assert subject.store.put(digest, data) is True

    assert subject.store.get(digest) == data
    assert subject.behind.names() == [layout.blob_key(digest)]


def test_a_large_object_that_was_cut_off_is_healed_by_put_file(subject: Subject) -> None:
    data = os.urandom(WHOLE_BLOB_BYTES + 1)
    digest = Digest.of(data)
    subject.behind.write(layout.blob_key(digest), data[:100])

    assert subject.put_file(digest, data) is True
    assert subject.fetch(digest) == data


def test_only_missing_blobs_are_missing(subject: Subject) -> None:
    there = [Digest.of(b"there"), Digest.of(b"")]
    absent = [Digest.of(str(number).encode()) for number in range(40)]
    subject.store.put(there[0], b"there")
    subject.store.put(there[1], b"")

    assert subject.store.find_missing([*there, *absent, *absent]) == set(absent)
    assert subject.store.find_missing([]) == set()


@pytest.mark.parametrize("size", [5, WHOLE_BLOB_BYTES + 5], ids=["small", "large"])
def test_wrong_bytes_are_refused_and_leave_no_trace(subject: Subject, size: int) -> None:
    """Of the same length or another, neither an object nor an unfinished upload stays."""
    digest = Digest.of(b"p" * size)
    for wrong in [b"d" * size, b"d" * (size - 1), b"p" * (size + 1)]:
        with pytest.raises(FileChangedError):
            subject.put_file(digest, wrong)
        if size < WHOLE_BLOB_BYTES:
            with pytest.raises(FileChangedError):
                subject.store.put(digest, wrong)

    assert subject.behind.names() == []
    assert subject.store.find_missing([digest]) == {digest}


@pytest.mark.parametrize("size", [64, 2 * WHOLE_BLOB_BYTES], ids=["small", "large"])
def test_a_corrupt_object_is_never_delivered(subject: Subject, size: int) -> None:
    """Neither other bytes of the same length, nor fewer, nor more."""
    data = os.urandom(size)
    digest = Digest.of(data)
    for stored in [data[:-1] + bytes([data[-1] ^ 1]), data[:-1], data[:1], b"", data + b"x"]:
        subject.behind.write(layout.blob_key(digest), stored)

        with pytest.raises(BlobCorruptError):
            subject.fetch(digest)
        if size < WHOLE_BLOB_BYTES:
            with pytest.raises(BlobCorruptError):
                subject.store.get(digest)


def test_an_absent_blob_is_not_found_by_its_name(subject: Subject) -> None:
    small, large = Digest.of(b"nobody has this"), Digest("0" * 32, 2 * WHOLE_BLOB_BYTES)
    calls: list[Callable[[], object]] = [
        lambda: subject.store.get(small),
        lambda: subject.fetch(small),
        lambda: subject.fetch(large),
        lambda: subject.store.read_range(small, 0, 1),
    ]
    for call in calls:
        with pytest.raises(BlobNotFoundError):
            call()
    with pytest.raises(BlobNotFoundError, match=small.hex):
        subject.store.get(small)


@pytest.mark.parametrize("size", [100, 2 * WHOLE_BLOB_BYTES], ids=["small", "large"])
def test_a_blob_is_read_where_old_clients_stored_it(subject: Subject, size: int) -> None:
    """Read only: for uploads it counts as missing, since not every reader looks there."""
    data = os.urandom(size)
    digest = Digest.of(data)
    subject.behind.write(f"Data/{digest.hex}", data)

    assert subject.fetch(digest) == data
    assert subject.store.read_range(digest, 10, 20) == data[10:30]
    assert subject.store.find_missing([digest]) == {digest}
    if size < WHOLE_BLOB_BYTES:
        assert subject.store.get(digest) == data


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 10, b"0123456789"),
        (0, 1, b"0"),
        (3, 4, b"3456"),
        (9, 1, b"9"),
        (8, 100, b"89"),
        (10, 1, b""),
        (11, 5, b""),
        (0, 0, b""),
    ],
)
def test_a_range_is_read_as_posix_does(
    subject: Subject, offset: int, length: int, expected: bytes
) -> None:
    data = b"0123456789"
    subject.store.put(Digest.of(data), data)

    assert subject.store.read_range(Digest.of(data), offset, length) == expected


def test_a_range_of_an_object_of_another_size_is_refused(subject: Subject) -> None:
    digest = Digest.of(b"0123456789")
    for stored in [b"01234", b"0123456789ab"]:
        subject.behind.write(layout.blob_key(digest), stored)
        for offset in [0, 7]:
            with pytest.raises(BlobCorruptError):
                subject.store.read_range(digest, offset, 2)


def test_many_may_put_one_blob_at_once(subject: Subject) -> None:
    """All succeed, at least one of them stored it, and it is whole."""
    data = os.urandom(100_000)
    digest = Digest.of(data)
    start = threading.Barrier(12)
    stored = []

    def put() -> None:
        start.wait(10)
        stored.append(subject.store.put(digest, data))

    threads = [threading.Thread(target=put) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(stored) == 12
    assert any(stored)
    assert subject.store.get(digest) == data
    assert subject.behind.names() == [layout.blob_key(digest)]


def test_a_cancelled_transfer_ends_at_once_and_leaves_nothing(
    subject: Subject, large: bytes
) -> None:
    """Cancelled before it begins, and in the middle."""
    digest = Digest.of(large)
    for after in [0, 1]:
        cancellation = Cancellation()
        begun = time.monotonic()

        def tell(_bytes: int, cancellation: Cancellation = cancellation) -> None:
            nonlocal begun
            begun = time.monotonic()
            cancellation.cancel()

        if after == 0:
            cancellation.cancel()
        with tempfile.TemporaryFile() as file:
            file.write(large)
            file.flush()
            with pytest.raises(CancelledError):
                subject.store.put_file(
                    digest, file.fileno(), cancellation=cancellation, progress=tell
                )
        assert time.monotonic() - begun < STOP_SECONDS
        assert subject.behind.names() == []


def test_a_cancelled_fetch_ends_at_once_and_the_next_one_succeeds(
    subject: Subject, large: bytes
) -> None:
    digest = Digest.of(large)
    subject.behind.write(layout.blob_key(digest), large)
    cancellation = Cancellation()
    begun = 0.0

    def tell(_bytes: int) -> None:
        nonlocal begun
        begun = begun or time.monotonic()
        cancellation.cancel()

    with tempfile.TemporaryFile() as file, pytest.raises(CancelledError):
        subject.store.fetch(digest, file.fileno(), cancellation=cancellation, progress=tell)
    assert time.monotonic() - begun < STOP_SECONDS
    assert subject.fetch(digest) == large


def test_blobs_are_listed_without_what_else_is_there(subject: Subject) -> None:
    digests = {Digest.of(data) for data in (b"", b"a", b"bc")}
    assert list(subject.store.list_blobs()) == []
    for data in (b"", b"a", b"bc"):
        subject.store.put(Digest.of(data), data)
    for name in ("readme.txt", "0" * 32, f"{'A' * 32}.xxh128", f"{'0' * 32}.xxh128/x"):
        subject.behind.write(f"Data/{name}", b"something else")

    assert set(subject.store.list_blobs()) == digests


KEYS = [
    "farm-1/queue-1/Inputs/0a/11_input",
    "farm-1/queue-1/job-1/step-1/task-1/2024_sa-1/11_output",
    "Ünïcode/日本語/a b+c&d=e%41/🎬_output",
    "x" * 200,
    ".hidden/.also.hidden",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_document_is_got_as_it_was_put(subject: Subject, key: str) -> None:
    metadata = {"asset-root": "/mnt/a  b", "asset-root-json": '"\\ud83c\\udfac"'}

    subject.store.put_document(key, b"{}", metadata)
    document = subject.store.get_document(key, max_bytes=100)

    assert (document.data, document.metadata) == (b"{}", metadata)
    assert (document.info.key, document.info.size) == (key, 2)
    assert abs(document.info.last_modified - time.time()) < 60
    [listed] = subject.store.list_documents("")
    assert (listed.key, listed.size) == (key, 2)
    assert abs(listed.last_modified - document.info.last_modified) <= 1


def test_a_document_replaces_another_with_its_metadata(subject: Subject) -> None:
    subject.store.put_document("a/b", b"first", {"asset-root": "/one"})
    subject.store.put_document("a/b", b"second", {"file-system-location-name": "Two"})
    assert subject.store.get_document("a/b", max_bytes=6).metadata == {
        "file-system-location-name": "Two"
    }

    subject.store.put_document("a/b", b"third", {})
    document = subject.store.get_document("a/b", max_bytes=6)
    assert (document.data, document.metadata) == (b"third", {})


@pytest.mark.parametrize("value", ["", " ", "/trailing ", " /leading", "/a\tb", "/日本"])
def test_metadata_that_a_header_would_change_are_refused(subject: Subject, value: str) -> None:
    """Whoever writes them has to say them otherwise: as JSON, for instance."""
    with pytest.raises(ValueError, match="asset-root"):
        subject.store.put_document("a/b", b"{}", {"asset-root": value})
    assert subject.behind.names() == []


def test_a_document_of_many_parts_makes_the_round_trip(subject: Subject, large: bytes) -> None:
    subject.store.put_document("large", large, {"asset-root": "/mnt"})

    document = subject.store.get_document("large", max_bytes=LARGE_BYTES)
    assert document.data == large
    assert document.metadata == {"asset-root": "/mnt"}


def test_a_document_larger_than_wanted_is_not_read(subject: Subject) -> None:
    subject.store.put_document("a/b", b"12345", {})

    assert subject.store.get_document("a/b", max_bytes=5).data == b"12345"
    with pytest.raises(ManifestInvalidError, match="a/b"):
        subject.store.get_document("a/b", max_bytes=4)


def test_an_absent_document_is_not_found_by_its_name(subject: Subject) -> None:
    with pytest.raises(DocumentNotFoundError, match="no/such"):
        subject.store.get_document("no/such", max_bytes=100)


def test_documents_are_listed_ascending_by_key(subject: Subject) -> None:
    """By whole keys, as S3 has it: a slash comes after a hyphen, whatever the directories are."""
    keys = ["a-b/x", "a/y", "a/b/c", "a.b", "a0", "B", "é", "a/b-c", "日", "a/b/C"]
    for key in keys:
        subject.store.put_document(key, b"", {"asset-root": "/"})

    assert [info.key for info in subject.store.list_documents("")] == sorted(keys)
    assert [info.key for info in subject.store.list_documents("a/b/")] == ["a/b/C", "a/b/c"]
    assert [info.key for info in subject.store.list_documents("nothing/here/")] == []


def test_a_listing_prefix_is_a_plain_string(subject: Subject) -> None:
    for key in ["q/job-1/x", "q/job-10/x", "q/job-2/x"]:
        subject.store.put_document(key, b"", {})

    def listed(prefix: str) -> list[str]:
        return [info.key for info in subject.store.list_documents(prefix)]

    assert listed("q/job-1") == ["q/job-1/x", "q/job-10/x"]
    assert listed("q/job-1/") == ["q/job-1/x"]
    assert listed("q/j") == ["q/job-1/x", "q/job-10/x", "q/job-2/x"]


HOSTILE = [
    "",
    "/a",
    "a/",
    "a//b",
    "../a",
    "a/../b",
    "a/..",
    "./a",
    "a\0b",
    "a\nb",
    "\udc80",
    "é" * 512,
]


@pytest.mark.parametrize("key", HOSTILE, ids=range(len(HOSTILE)))
def test_a_key_that_could_lead_elsewhere_is_refused(subject: Subject, key: str) -> None:
    with pytest.raises(UnsafePathError):
        subject.store.put_document(key, b"", {})
    with pytest.raises(UnsafePathError):
        subject.store.get_document(key, max_bytes=1)
    assert subject.behind.names() == []


@pytest.mark.parametrize("prefix", ["/a", "a//b", "../a", "a/../b", "a\0b"])
def test_a_listing_prefix_that_could_lead_elsewhere_is_refused(
    subject: Subject, prefix: str
) -> None:
    with pytest.raises(UnsafePathError):
        list(subject.store.list_documents(prefix))


def test_who_may_not_write_is_told_so(s3: S3Server, s3_prefix: str) -> None:
    """Never that something is absent or present. (The directory: unit/test_directory_store.py)."""
    data = os.urandom(WHOLE_BLOB_BYTES + 1)
    behind = BehindS3(s3, s3_prefix)
    behind.write("Manifests/key", b"")
    store = build_store(
        f"s3://{s3.bucket}/{s3_prefix}",
        environment=s3.read_only_environment,
        policy=IMPATIENT,
        account_id="",
    )

    with pytest.raises(StoreAccessError):
        store.put(Digest.of(b"x"), b"x")
    with pytest.raises(StoreAccessError):
        Subject(store, behind).put_file(Digest.of(data), data)
    with pytest.raises(StoreAccessError):
        store.put_document("key", b"other", {})
    assert store.get_document("key", max_bytes=1).data == b""
    assert behind.names() == ["Manifests/key"]


@pytest.mark.parametrize("secret_key", ["wrong", ""])
def test_who_is_not_known_is_told_so(s3: S3Server, s3_prefix: str, secret_key: str) -> None:
    """Whatever is asked, and also where the answer has no body; nothing counts as absent."""
    environment = s3.environment | {"AWS_SECRET_ACCESS_KEY": secret_key or "x" * 40}
    url = f"s3://{s3.bucket}/{s3_prefix}"
    store = build_store(url, environment=environment, policy=IMPATIENT, account_id="")
    digest = Digest.of(b"x")
    calls: list[Callable[[], object]] = [
        lambda: store.get(digest),
        lambda: store.find_missing([digest]),
        lambda: store.put(digest, b"x"),
        lambda: store.read_range(digest, 0, 1),
        lambda: store.get_document("key", max_bytes=1),
        lambda: list(store.list_documents("")),
        lambda: list(store.list_blobs()),
    ]
    for call in calls:
        with pytest.raises(StoreAccessError):
            call()


def test_a_missing_bucket_is_not_a_store_without_blobs(s3: S3Server) -> None:
    """S3 answers 404 for it too, and to HEAD without a word of explanation."""
    store = build_store(
        "s3://no-such-bucket/x", environment=s3.environment, policy=IMPATIENT, account_id=""
    )
    digest = Digest.of(b"x")
    calls: list[Callable[[], object]] = [
        lambda: store.find_missing([digest]),
        lambda: store.get(digest),
        lambda: store.put(digest, b"x"),
        lambda: store.get_document("key", max_bytes=1),
        lambda: list(store.list_documents("")),
    ]
    for call in calls:
        with pytest.raises(StoreAccessError, match="bucket itself is missing"):
            call()


def test_a_prefix_is_joined_as_it_is(s3: S3Server, s3_prefix: str) -> None:
    """With a plain slash, as the Deadline client does: a trailing slash gives two."""
    for prefix in [f"{s3_prefix}/deeper/still", f"{s3_prefix}/a b+é"]:
        store = build_store(
            f"s3://{s3.bucket}/{prefix}",
            environment=s3.environment,
            policy=IMPATIENT,
            account_id="",
        )
        store.put(Digest.of(b"x"), b"x")
        store.put_document("a/b", b"", {})

        behind = BehindS3(s3, prefix)
        assert behind.names() == [layout.blob_key(Digest.of(b"x")), "Manifests/a/b"]
        assert [info.key for info in store.list_documents("")] == ["a/b"]
        assert list(store.list_blobs()) == [Digest.of(b"x")]
        assert store.url == f"s3://{s3.bucket}/{prefix}"
