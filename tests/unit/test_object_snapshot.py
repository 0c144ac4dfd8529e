"""A snapshot is what it says, reads back as it was, and its identities are no hashes."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from agent_plugin.content import object_snapshot as module
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import (
    PathClashError,
    PropmasterError,
    SourceInvalidError,
    UnsafePathError,
)
from agent_plugin.content.object_snapshot import ObjectIdentity, ObjectSnapshot, SnapshotEntry
from agent_plugin.content.objects import ARCHIVED, RESTORING, ObjectAccess, ObjectInfo
from agent_plugin.content.s3_copy import info_of_head

ACCESS = ObjectAccess(endpoint="http://127.0.0.1:9000", region="eu-west-1")


def entry(path: str = "a", **changed: Any) -> SnapshotEntry:
    fields = {"path": path, "size": 3, "mtime": 7, "key": f"d/{path}", "etag": '"1"'} | changed
    return msgspec.convert(
        {"checksumSha256" if name == "checksum_sha256" else name: fields[name] for name in fields},
        SnapshotEntry,
    )


def test_s2_a_snapshot_reads_back_as_it_was() -> None:
    access = replace(ACCESS, profile="vendor")
    snapshot = ObjectSnapshot(
        access,
        "show",
        [entry("b/ü"), entry("a", version="v1", checksum_sha256="x"), entry("b/\n")],
    )

    again = ObjectSnapshot.decode(snapshot.encode(), source="x")

    assert again == snapshot
    assert again.digest == snapshot.digest
    assert [each.path for each in again.entries] == ["a", "b/\n", "b/ü"]
    assert (len(again), again.total_bytes, again.access) == (3, 9, access)


def test_s2_an_object_without_etag_and_version_is_refused() -> None:
    """Caught: requests without a condition, which give whatever the object is by then."""
    for version in ("", "null"):
        with pytest.raises(SourceInvalidError, match="neither ETag nor version of s3://show/d/a"):
            ObjectSnapshot(ACCESS, "show", [entry("a", etag="", version=version), entry("b")])

    snapshot = ObjectSnapshot(
        ACCESS, "show", [entry("a", etag="", version="v1"), entry("b", etag="", size=0)]
    )
    assert len(snapshot) == 2


def test_s2_the_order_in_which_objects_came_is_not_in_a_snapshot() -> None:
    entries = [entry("c"), entry("a"), entry("b")]

    assert (
        ObjectSnapshot(ACCESS, "show", entries).encode()
        == ObjectSnapshot(ACCESS, "show", reversed(entries)).encode()
    )


def test_the_document_is_this_one() -> None:
    """Sessions that began before an update read theirs after it."""
    snapshot = ObjectSnapshot(ACCESS, "show", [entry("a", version="v1"), entry("b", size=0)])

    assert snapshot.encode() == (
        b'{"version":1,"bucket":"show","entries":['
        b'{"path":"a","size":3,"mtime":7,"key":"d/a","etag":"\\"1\\"","version":"v1"},'
        b'{"path":"b","size":0,"mtime":7,"key":"d/b","etag":"\\"1\\""}],'
        b'"endpoint":"http://127.0.0.1:9000","region":"eu-west-1"}'
    )
    digest = "e186b78de884d76ba5f4dd77f11ed192341ff745c01753c05940c71f11c024cd"
    assert snapshot.digest == digest


def test_s2_an_entry_names_the_object_that_was_listed() -> None:
    info = ObjectInfo("show", "d/a", 3, '"1"', "v1", 1_700_000_000.25)
    snapshot = ObjectSnapshot(ACCESS, "show", [SnapshotEntry.of(info, "a")])

    assert snapshot.info(snapshot.entries[0]) == info
    assert snapshot.entries[0].mtime == 1_700_000_000_250_000


def test_a_time_that_no_file_can_have_becomes_the_nearest_that_one_can() -> None:
    info = ObjectInfo("show", "d/a", 3, '"1"', "", 1e15)

    assert SnapshotEntry.of(info, "a").mtime == 253_402_300_800 * 1_000_000 - 1


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "d/b"},
        {"size": 4},
        {"version": "v2"},
        {"etag": '"2"'},
        {"version": '1","', "etag": ""},
    ],
)
def test_another_object_or_state_has_another_identity(changed: dict[str, Any]) -> None:
    one, other = (
        ObjectSnapshot(ACCESS, "show", [each]).identity(each)
        for each in (entry(), entry(**changed))
    )

    assert one != other


def test_another_server_or_bucket_has_another_identity_and_another_way_there_has_not() -> None:
    def identity(access: ObjectAccess, bucket: str = "show") -> ObjectIdentity:
        return ObjectSnapshot(access, bucket, [entry()]).identity(entry())

    assert identity(ACCESS) != identity(replace(ACCESS, endpoint="http://127.0.0.1:9001"))
    assert identity(ACCESS) != identity(ACCESS, "shop")
    assert identity(ACCESS) == identity(replace(ACCESS, profile="vendor", region=""))
    assert identity(ACCESS) == identity(replace(ACCESS, anonymous=True))


def test_an_identity_can_not_be_taken_for_a_digest() -> None:
    identity = ObjectSnapshot(ACCESS, "show", [entry()]).identity(entry())

    assert str(identity) == f"object:{identity.hex} (3 bytes)"
    with pytest.raises(ValueError, match="not a digest"):
        Digest(identity.hex, identity.size)
    with pytest.raises(ValueError, match="not the identity of an object"):
        ObjectIdentity(Digest.of(b"abc").hex, 3)


GOOD = json.loads(ObjectSnapshot(ACCESS, "show", [entry("a"), entry("b")]).encode())


def _with(changed: dict[str, object]) -> dict[str, object]:
    return {**GOOD, "entries": [GOOD["entries"][0] | changed, GOOD["entries"][1]]}


@pytest.mark.parametrize(
    ("document", "failure", "reason"),
    [
        ([], SourceInvalidError, "Expected `object`, got `array`"),
        ({**GOOD, "version": 2}, SourceInvalidError, "a snapshot of version 2, not 1"),
        ({**GOOD, "more": 1}, SourceInvalidError, "unknown field `more`"),
        (_with({"size": -1}), SourceInvalidError, "Expected `int` >= 0"),
        (_with({"size": True}), SourceInvalidError, "Expected `int`, got `bool`"),
        (_with({"size": 2**63 - 1}), SourceInvalidError, "the sizes add up to more than"),
        (_with({"mtime": 2**62}), SourceInvalidError, "Expected `int` <= "),
        (_with({"path": "../a"}), UnsafePathError, "path holds the component '..'"),
        (_with({"path": "a" * 256}), UnsafePathError, "path holds a component of 256 bytes"),
        (_with({"path": "b/c"}), PathClashError, "becomes a file where"),
        (_with({"path": "b"}), PathClashError, "both become 'b'"),
    ],
)
def test_a_document_that_was_changed_is_refused(
    document: object, failure: type[PropmasterError], reason: str
) -> None:
    with pytest.raises(failure, match=re.escape(reason)):
        ObjectSnapshot.decode(json.dumps(document).encode(), source="snapshot.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"version":1}'])
def test_what_is_no_document_is_refused_by_its_name(data: bytes) -> None:
    with pytest.raises(SourceInvalidError, match=r"^snapshot.json: not the snapshot of a source: "):
        ObjectSnapshot.decode(data, source="snapshot.json")


@pytest.mark.parametrize("field", ["path", "key", "etag", "version"])
def test_text_that_is_not_utf_8_is_refused(field: str) -> None:
    """A path may hold such bytes in a manifest; a key of S3 can not."""
    with pytest.raises(SourceInvalidError, match="its key is not UTF-8"):
        ObjectSnapshot(ACCESS, "show", [msgspec.structs.replace(entry(), **{field: "\udc80"})])


def test_more_objects_than_a_root_can_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OBJECTS", 1)

    with pytest.raises(SourceInvalidError, match="more than 1 objects"):
        ObjectSnapshot(ACCESS, "show", [entry("a"), entry("b")])


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({}, ""),
        ({"StorageClass": "GLACIER_IR"}, ""),
        ({"StorageClass": "INTELLIGENT_TIERING"}, ""),
        ({"StorageClass": "INTELLIGENT_TIERING", "ArchiveStatus": "DEEP_ARCHIVE_ACCESS"}, ARCHIVED),
        ({"StorageClass": "GLACIER"}, ARCHIVED),
        ({"StorageClass": "DEEP_ARCHIVE", "Restore": 'ongoing-request="true"'}, RESTORING),
        (
            {
                "StorageClass": "GLACIER",
                "Restore": 'ongoing-request="false", expiry-date="Fri, 21 Dec 2012 00:00:00 GMT"',
            },
            "",
        ),
    ],
)
def test_s2_what_head_says_of_archives_is_understood(head: dict[str, str], expected: str) -> None:
    """As the API reference has the headers; moto knows no tiers of INTELLIGENT_TIERING.

    The mutation that was caught: the tier overlooked.
    """
    answer = {"ContentLength": 1, "LastModified": datetime.now(UTC), **head}

    assert info_of_head("bucket", "key", answer).archive == expected
