"""Whatever keys a bucket has: what comes of them stays below the target, or is refused whole."""

import posixpath

from hypothesis import given
from hypothesis import strategies as st

from agent_plugin.content.errors import InputError
from agent_plugin.content.object_snapshot import ObjectSnapshot, SnapshotEntry
from agent_plugin.content.objects import ObjectAccess, ObjectInfo
from agent_plugin.sources.mapping import path_of, prefix_of
from agent_plugin.sources.partition import Partition, Share

NAMES = st.sampled_from(
    ["..", ".", "", "a", "b", "c:", "a-", "\\", "\0", "é", "e\u0301", "x" * 256]
)
KEYS = st.lists(st.one_of(NAMES, st.text(max_size=3)), min_size=1, max_size=4).map("/".join)


@given(prefix=KEYS, rest=st.lists(KEYS, max_size=6), twice=st.booleans())
def test_s3_no_key_leaves_the_target(prefix: str, rest: list[str], *, twice: bool) -> None:
    """Caught: the check of paths taken out, of duplicates, and of a file above another."""
    prefix = prefix_of(f"{prefix}*")
    names = [*rest, *rest[:1]] if twice else rest
    infos = [ObjectInfo("show", prefix + each, 1, '"e"', "", 0.0) for each in names]
    entries = [SnapshotEntry.of(info, path_of(info.key, prefix)) for info in infos]
    try:
        snapshot = ObjectSnapshot(ObjectAccess(), "show", entries)
    except InputError:
        return

    found = [entry.path for entry in snapshot.entries]
    files = {posixpath.normpath(posixpath.join("/target", path)) for path in found}
    assert files == {f"/target/{path}" for path in found}
    assert len(files) == len(entries), "each object has a file of its own"
    directories = {above for file in files for above in _above(file)}
    assert not files & directories, "no file stands where a directory has to be"
    # Only what ends the prefix's directories is left away.
    assert all(entry.key.endswith(entry.path) for entry in snapshot.entries)
    again = ObjectSnapshot.decode(snapshot.encode(), source="x")
    assert (again, again.digest) == (snapshot, snapshot.digest)


def _above(file: str) -> list[str]:
    parts = file.split("/")
    return ["/".join(parts[:end]) for end in range(2, len(parts))]


PARTITIONS = st.one_of(
    st.builds(Partition, type=st.just("object"), count=st.integers(1, 9)),
    st.builds(
        Partition,
        type=st.just("regex"),
        pattern=st.sampled_from([r"\d", "(a)|(b)", "()", "."]),
        count=st.integers(1, 9),
    ),
    st.builds(
        Partition,
        type=st.just("substring"),
        start_index=st.integers(0, 3),
        end_index=st.integers(4, 6),
        count=st.integers(1, 9),
    ),
    st.builds(
        Partition,
        type=st.just("date"),
        date_format=st.sampled_from(["%Y", "2006-01-02", "15:04", "Jan"]),
        count=st.integers(1, 9),
    ),
)


@given(partition=PARTITIONS, key=KEYS, prefix=st.sampled_from(["", "a", "a/"]))
def test_s8_each_object_is_in_one_part(partition: Partition, key: str, prefix: str) -> None:
    """Caught: the modulo taken out, and a part that is not told apart from the next."""
    count = partition.count or 1
    having = [index for index in range(count) if Share(partition, prefix, index).has(prefix + key)]

    assert len(having) == 1
