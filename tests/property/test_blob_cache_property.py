"""Whatever is done with a blob cache: its bytes are right, its quota holds, leases are honoured."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent_plugin.content import events
from agent_plugin.content.blob_cache import BlobCache, Lease
from agent_plugin.content.blob_cache_directory import namespace_of
from agent_plugin.content.digest import Digest
from agent_plugin.content.errors import NoSpaceError

URL: Final = "s3://bucket/prefix"
QUOTA: Final = 8000
SIZES: Final = (1, 500, 900, 1000, 1100, 1500, 2000, 2500, 3000, 4000)
DATA: Final = {
    Digest.of(data): data for data in (bytes([number]) * size for number, size in enumerate(SIZES))
}
# A use is noted when the last one is this old, so this much time passes between any two.
RESOLUTION_SECONDS: Final = 61

blobs = st.sampled_from(list(DATA))
some_blobs = st.lists(blobs, min_size=1, max_size=6, unique=True)


class BlobCacheMachine(RuleBasedStateMachine):
    """Evictions follow the quota, the leases and the order of use; nothing else removes a blob.

    Seen to catch, each alone: evicting without asking `leased.holds`; sorting the newest first;
    forgetting `room` in `_excess`; stopping one blob early (`evicted + size >= excess`);
    `open_blob` that does not note the use; `Leases.release` that leaves the files; `Lease.close`
    that does nothing; not counting `room` in `fits`, or in whether to collect.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.ahead = 0.0
        # What must be there, with its last use; a collection may take the unleased from it.
        self.present: dict[Digest, float] = {}
        self.leases: list[tuple[Lease, frozenset[Digest], bool]] = []

    def teardown(self) -> None:
        for lease, _digests, _kept in self.leases:
            lease.release()
        self.cache.close()
        shutil.rmtree(self.directory)

    @initialize()
    def open(self) -> None:
        self.cache = BlobCache.open(
            self.directory / "cache",
            store_url=URL,
            max_bytes=QUOTA,
            min_free_bytes=0,
            clock=lambda: time.time() + self.ahead,
        )

    @property
    def leased(self) -> frozenset[Digest]:
        return frozenset().union(*(digests for _lease, digests, _kept in self.leases))

    def place(self, digest: Digest) -> Path:
        namespace = namespace_of(URL, "", shared=False)
        return self.directory / "cache" / "v1" / namespace / digest.hex[:2] / digest.hex

    @rule(digests=some_blobs, staged=st.booleans())
    def add(self, digests: list[Digest], staged: bool) -> None:
        for digest in digests:
            if digest in self.present:
                self.cache.add(digest, DATA[digest])
                continue
            self.ahead += RESOLUTION_SECONDS
            if staged and sum(one.size for one in self.present) + digest.size <= QUOTA:
                with self.cache.staging(digest.size) as file:
                    os.write(file.fd, DATA[digest])
                    file.publish(digest)
            else:
                self.cache.add(digest, DATA[digest])
            # The file system's clock is not ahead; the cache's is.
            self.present[digest] = time.time() + self.ahead
            os.utime(self.place(digest), (self.present[digest],) * 2)

    @rule(digests=some_blobs)
    def read(self, digests: list[Digest]) -> None:
        for digest in digests:
            self.ahead += RESOLUTION_SECONDS
            fd = self.cache.open_blob(digest)
            assert (fd is not None) == (digest in self.present)
            if fd is not None:
                with os.fdopen(fd, "rb") as file:
                    assert file.read() == DATA[digest]
                self.present[digest] = time.time() + self.ahead

    @rule(digests=some_blobs, kept=st.booleans())
    def lease(self, digests: list[Digest], kept: bool) -> None:
        lease = self.cache.lease("session", digests, keep_seconds=10**9 if kept else None)
        if kept:
            lease.close()
        self.leases.append((lease, frozenset(digests), kept))

    @rule()
    def end_a_lease(self) -> None:
        for lease, digests, kept in self.leases:
            if not kept:
                lease.close()
                self.leases.remove((lease, digests, kept))
                break

    @rule()
    def end_all_leases(self) -> None:
        assert self.cache.release_lease("session") == len(self.leases)
        for lease, _digests, _kept in self.leases:
            lease.close()
        self.leases.clear()

    @precondition(lambda self: self.present)
    @rule(digest=blobs)
    def quarantine(self, digest: Digest) -> None:
        there = self.present.pop(digest, None) is not None
        assert self.cache.quarantine(digest, "test") == there

    @rule(room=st.integers(0, QUOTA))
    def collect(self, room: int) -> None:
        before = dict(self.present)
        report = self.cache.collect(room=room)
        self.check_evictions(before, room)
        assert report.blobs == len(self.present)
        assert report.bytes == sum(digest.size for digest in self.present)

    @rule(size=st.integers(0, QUOTA))
    def make_room(self, size: int) -> None:
        before = dict(self.present)
        try:
            self.cache.make_room(size)
        except NoSpaceError:
            assert sum(one.size for one in self.leased & before.keys()) + size > QUOTA
        self.check_evictions(before, size)

    def check_evictions(self, before: dict[Digest, float], room: int) -> None:
        kept = {digest for digest in before if self.cache.contains(digest)}
        evicted = before.keys() - kept
        unleased = kept - self.leased
        assert not evicted & self.leased, "a leased blob is never evicted"
        assert sum(one.size for one in kept) + room <= QUOTA or not unleased, "the quota holds"
        for gone in evicted:
            for stays in unleased:
                assert before[gone] < before[stays], "the oldest go first"
        if sum(one.size for one in before) + room <= QUOTA:
            assert not evicted, "nothing goes without need"
        for gone in evicted:
            del self.present[gone]

    @invariant()
    def what_must_be_there_is_there_and_nothing_else(self) -> None:
        for digest in DATA:
            assert self.cache.contains(digest) == (digest in self.present)
        usage = self.cache.usage()
        assert usage.blobs == len(self.present)
        assert usage.bytes == sum(digest.size for digest in self.present)
        assert (usage.leases, usage.temporary) == (len(self.leases), 0)


TestBlobCache = pytest.mark.expected_events(events.CACHE_QUARANTINED)(BlobCacheMachine.TestCase)
