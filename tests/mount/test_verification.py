"""What a job gets of content that is not what its name says: never silently, and never for long."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from agent_plugin.content.errors import MountFailedError
from agent_plugin.content.layout import blob_key
from agent_plugin.content.manifest import Manifest
from tests.mount.conftest import Mounter, by_each_transport_in_time
from tests.servers.proxied_object import until
from vfs.reader import STRICT_BYTES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

SIZE = STRICT_BYTES + 1_000_000


def flip_last_bit(path: Path) -> None:
    """Change a file's content and nothing else that a cache could notice."""
    before = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    path.chmod(before.st_mode & 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def large(mounter: Mounter) -> Manifest:
    """One file that is large enough to be read while it comes."""
    source = mounter.home / "source"
    source.mkdir()
    (source / "big.abc").write_bytes(bytes(SIZE - 4) + b"tail")
    return mounter.stored(source)


def in_the_store(mounter: Mounter, manifest: Manifest) -> Path:
    return mounter.home / "store" / blob_key(manifest.entries[0].digest)


def test_a_strict_mount_gives_no_byte_of_a_large_file_that_is_wrong(
    mounter: Mounter, large: Manifest
) -> None:
    flip_last_bit(in_the_store(mounter, large))
    at, host = mounter.home / "mnt", mounter.host
    done = host.run(
        "mount", mounter.manifest_file(large), at, "--store", host.store_url, "--verify", "strict"
    )
    assert done.returncode == 0, done.stderr
    fd = os.open(at / "big.abc", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, 10, 0)
    finally:
        os.close(fd)
    assert mounter.errors(at) == [("big.abc", "E_CHECKSUM")]
    assert host.mounts.end(at)


def test_a_strict_mount_gives_no_byte_of_a_large_file_that_is_damaged_in_the_cache(
    tmp_path: Path, mounter: Mounter, large: Manifest
) -> None:
    with mounter.host.services() as context:
        assert context.cache is not None
        [entry] = large.entries
        context.cache.add(entry.digest, in_the_store(mounter, large).read_bytes())
    [cached] = mounter.host.cache_dir.rglob(entry.hash)
    flip_last_bit(cached)
    in_the_store(mounter, large).unlink()
    strict = Mounter(tmp_path, mounter.host.store_url, settings={"mounts": {"verify": "strict"}})
    at = strict.mount(large)
    try:
        with pytest.raises(OSError, match="Input/output error"), (at / "big.abc").open("rb") as f:
            f.read(10)
        assert strict.status(at)["counts"]["blobs_quarantined"] == 1
        assert strict.errors(at) == [("big.abc", "E_NOT_FOUND")]
    finally:
        strict.close()


@by_each_transport_in_time
def test_what_was_read_of_a_large_file_before_it_turned_out_wrong_is_not_read_again(
    mounter: Mounter, large: Manifest, writes: str
) -> None:
    """Seen to fail without the notification: the kernel gives what it keeps for ever."""
    flip_last_bit(in_the_store(mounter, large))
    at = mounter.mount(large, writes=writes)
    fd = os.open(at / "big.abc", os.O_RDONLY)
    try:
        assert os.pread(fd, 10, 0) == bytes(10), "that much is known later"
        with pytest.raises(OSError, match="Input/output error"):
            _read_all(fd)
        until(lambda: _is_refused(fd))
    finally:
        os.close(fd)
    assert mounter.errors(at) == [("big.abc", "E_CHECKSUM")]


def test_what_was_read_of_a_large_file_from_a_killed_server_is_asked_for_again(
    mounter: Mounter, large: Manifest
) -> None:
    """Seen to fail without it: the pages stayed, and nobody would have noticed a wrong blob."""
    at = mounter.mount(large)
    fd = os.open(at / "big.abc", os.O_RDONLY)
    try:
        assert os.pread(fd, 10, 0) == bytes(10)
        server = mounter.status(at)["pid"]
        os.kill(server, signal.SIGKILL)

        def is_asked_again() -> bool:
            return os.pread(fd, 10, 0) == bytes(10) and mounter.fetched(at) > 0

        until(lambda: _pid_of_server(mounter, at) not in (0, server))
        until(is_asked_again)
    finally:
        os.close(fd)


def _pid_of_server(mounter: Mounter, at: Path) -> int:
    with suppress(MountFailedError):
        pid: int = mounter.status(at)["pid"]
        return pid
    return 0


def test_what_was_read_of_a_large_file_that_is_damaged_in_the_cache_is_mended(
    tmp_path: Path, mounter: Mounter, large: Manifest
) -> None:
    """What is passed through was verified before; this is what is read through the server."""
    mounter = Mounter(tmp_path, mounter.host.store_url, settings={"mounts": {"passthrough": "off"}})
    with mounter.host.services() as context:
        assert context.cache is not None
        [entry] = large.entries
        context.cache.add(entry.digest, in_the_store(mounter, large).read_bytes())
    [cached] = mounter.host.cache_dir.rglob(entry.hash)
    flip_last_bit(cached)
    at = mounter.mount(large)
    fd = os.open(at / "big.abc", os.O_RDONLY)
    try:
        os.pread(fd, 4, SIZE - 4)
        until(lambda: os.pread(fd, 4, SIZE - 4) == b"tail")
    finally:
        os.close(fd)
    assert mounter.status(at)["counts"]["blobs_quarantined"] == 1
    assert mounter.errors(at) == [("big.abc", "E_CHECKSUM")]


def _read_all(fd: int) -> None:
    for offset in range(0, SIZE, 1 << 20):
        os.pread(fd, 1 << 20, offset)


def _is_refused(fd: int) -> bool:
    try:
        os.pread(fd, 10, 0)
    except OSError:
        return True
    return False
