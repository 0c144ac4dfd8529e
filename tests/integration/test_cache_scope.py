"""Content that was fetched for one queue and job user serves no other, unless the operator says so.

Whatever comes from the cache does not come from the store: so the store has it taken away.
"""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.store import Cancellation
from agent_plugin.mounting import open_mounts
from agent_plugin.services import open_cache, open_services
from agent_plugin.session.mount_request import MountRequest
from agent_plugin.settings import Settings
from agent_plugin.transfer.context import TransferContext
from tests.servers.hooks import QUEUE, Host

OTHER_QUEUE = "queue-" + "8" * 32
BLOB = b"content of one queue"
STORES = ("s3://one/prefix", "s3://other/prefix")


def host_with(tmp_path: Path, **cache: bool) -> Host:
    host = Host(tmp_path / "host", f"file://{tmp_path}/store", settings={"cache": {**cache}})
    # A quarter of a small test disk is not what this is about.
    text = host.config.read_text().replace("[cache]\n", '[cache]\nmax_bytes = "1 GiB"\n')
    host.config.write_text(text.replace("[cache]\n", "[cache]\nmin_free = 0\n"))
    return host


def sees(settings: Settings, store_url: str, queue_id: str, user_id: int | None) -> bool:
    cache = open_cache(settings, store_url, queue_id=queue_id, user_id=user_id)
    assert cache is not None
    with closing(cache):
        return cache.contains(Digest.of(BLOB))


@pytest.mark.parametrize("by_stores", [False, True])
@pytest.mark.parametrize("by_queues", [False, True])
def test_what_was_fetched_for_one_serves_no_other_unless_told_so(
    tmp_path: Path, by_queues: bool, by_stores: bool
) -> None:
    settings = host_with(
        tmp_path, shared_between_queues=by_queues, shared_between_stores=by_stores
    ).settings
    cache = open_cache(settings, STORES[0], queue_id=QUEUE, user_id=1001)
    assert cache is not None
    with closing(cache):
        cache.add(Digest.of(BLOB), BLOB)

    assert sees(settings, STORES[0], QUEUE, 1001)
    assert sees(settings, STORES[0], OTHER_QUEUE, 1001) == by_queues
    assert sees(settings, STORES[0], QUEUE, 1002) == by_queues
    assert sees(settings, STORES[0], "", 1001) == by_queues
    assert sees(settings, STORES[1], QUEUE, 1001) == by_stores
    assert sees(settings, STORES[1], OTHER_QUEUE, 1002) == (by_queues and by_stores)


def test_without_a_job_user_it_is_the_user_who_asks(tmp_path: Path) -> None:
    settings = host_with(tmp_path).settings
    cache = open_cache(settings, STORES[0], queue_id=QUEUE)
    assert cache is not None
    with closing(cache):
        cache.add(Digest.of(BLOB), BLOB)

    assert sees(settings, STORES[0], QUEUE, None)
    assert not sees(settings, STORES[0], QUEUE, 1001)


def test_a_queue_with_a_cache_directory_of_its_own_uses_that(tmp_path: Path) -> None:
    host = host_with(tmp_path)
    with host.config.open("a") as file:
        file.write(f'[queues."{QUEUE}".paths]\ncache_dir = "{tmp_path}/own"\n')

    for queue_id, expected in ((QUEUE, tmp_path / "own"), (OTHER_QUEUE, host.cache_dir)):
        cache = open_cache(host.settings, STORES[0], queue_id=queue_id)
        assert cache is not None
        with closing(cache):
            assert cache.path == expected


@contextmanager
def services(host: Host, store_url: str, queue_id: str, user_id: int) -> Iterator[TransferContext]:
    with open_services(
        host.settings,
        store_url,
        cancellation=Cancellation(),
        queue_id=queue_id,
        user_id=user_id,
        account_id="",
        quiet=True,
        environment={"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "HOME": "/"},
    ) as context:
        yield context


def test_what_was_seen_for_one_proves_nothing_to_another(tmp_path: Path) -> None:
    host, digest = host_with(tmp_path), Digest.of(BLOB)

    def known(queue_id: str, user_id: int) -> bool:
        with services(host, STORES[0], queue_id, user_id) as context:
            return bool(context.index.known(context.remembered_as, [digest], 3600))

    with services(host, STORES[0], QUEUE, 1001) as context:
        context.remember_present([digest])

    assert known(QUEUE, 1001)
    assert not known(OTHER_QUEUE, 1001)
    assert not known(QUEUE, 1002)


def test_a_mount_reads_from_the_cache_only_what_its_queue_has_fetched(tmp_path: Path) -> None:
    host = host_with(tmp_path)
    with services(host, host.store_url, QUEUE, 1001) as context:
        context.open_store().put(Digest.of(BLOB), BLOB)
        assert context.cache is not None
        context.cache.add(Digest.of(BLOB), BLOB)
    shutil.rmtree(tmp_path / "store" / "Data")
    entry = FileEntry(hash=Digest.of(BLOB).hex, mtime=1_700_000_000_000_000, path="f", size=20)
    manifest = Manifest.of([entry])

    def read(queue_id: str, user_id: int) -> bytes:
        mounts = open_mounts(host.settings, queue_id=queue_id, user_id=user_id)
        place = tmp_path / "mount"
        place.mkdir(exist_ok=True)
        mounts.start(
            MountRequest(
                manifest=manifest,
                mountpoint=place,
                work_dir=mounts.work_dir(place),
                store_url=host.store_url,
                account_id="",
                writes="none",
                uid=user_id,
                gid=user_id,
            ),
            cancellation=Cancellation(),
        )
        try:
            return (place / "f").read_bytes()
        finally:
            mounts.end(place)

    assert read(QUEUE, 1001) == BLOB
    for queue_id, user_id in ((OTHER_QUEUE, 1001), (QUEUE, 1002)):
        with pytest.raises(OSError, match=r"\[Errno"):
            read(queue_id, user_id)
