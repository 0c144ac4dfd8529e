"""The view by hash, mounted: any blob of the store by its name, with the code that serves trees."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.mount_table import unmount
from agent_plugin.content.open_store import build_store
from agent_plugin.content.store import Cancellation
from tests.mount import by_hash_server
from tests.servers.hooks import REPOSITORY
from vfs.mount import mount_fuse
from vfs.transports.kernel_transport import negotiate

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

BLOBS = [b"x" * size for size in (1, 5000, 300_000)]


class Mounted:
    """A mount whose servers come and go."""

    def __init__(self, home: Path) -> None:
        self.home, self.url = home, f"file://{home}/store"
        self.at = home / "mnt"
        self.at.mkdir()
        self.told = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with the mount
        self.fd = mount_fuse(self.at, "propmaster:by-hash")
        negotiate(self.fd)
        self.server = self.serve()

    def serve(self, *again: str) -> "subprocess.Popen[bytes]":
        fds = (self.fd, self.told.fileno())
        words = [by_hash_server.__name__, *map(str, fds), self.url, str(self.home), *again]
        server = subprocess.Popen(
            [sys.executable, "-m", *words], pass_fds=fds, cwd=REPOSITORY, stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        assert server.stdout.readline() == b"serves\n"
        return server

    def kill(self) -> None:
        self.server.kill()
        self.server.communicate()

    def path(self, digest: Digest) -> Path:
        return self.at / digest.hex[:2] / f"{digest.hex}.{digest.size}"

    def close(self) -> None:
        unmount(self.at, lazily=True)
        self.kill()
        os.close(self.fd)
        self.told.close()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    store = build_store(f"file://{tmp_path}/store", account_id="")
    for data in BLOBS:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            store.put_file(Digest.of(data), file.fileno(), cancellation=Cancellation())
    mounted = Mounted(tmp_path)
    yield mounted
    mounted.close()


def test_a_blob_is_read_by_its_hash_before_and_after_the_death_of_a_server(
    mounted: Mounted,
) -> None:
    digests = [Digest.of(data) for data in BLOBS]
    # Once answered the kernel asks no more to FLUSH: whoever closes a file, as each process does
    # that is started, would wait for a server.
    mounted.path(digests[0]).read_bytes()
    with mounted.path(digests[1]).open("rb", buffering=0) as held:
        assert held.read(10) == BLOBS[1][:10]
        nodes = [mounted.path(digest).stat().st_ino for digest in digests]
        mounted.kill()
        mounted.server = mounted.serve("again")
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert held.read() == BLOBS[1][10:]
    for digest, data in zip(digests, BLOBS, strict=True):
        assert mounted.path(digest).stat().st_size == digest.size
        assert mounted.path(digest).read_bytes() == data
    assert nodes == [mounted.path(digest).stat().st_ino for digest in digests]
    assert len(list(mounted.at.iterdir())) == 256
    assert list(mounted.path(digests[0]).parent.iterdir()) == []
    assert not (mounted.at / "ab" / "no-hash").exists()
    assert not (mounted.home / "errors").exists()


def test_a_blob_that_the_store_has_not_got_is_found_and_can_not_be_read(mounted: Mounted) -> None:
    missing = Digest.of(b"missing")
    path = mounted.path(missing)
    assert path.stat().st_size == 7
    with pytest.raises(OSError, match="Input/output error"):
        path.read_bytes()
    [line] = [json.loads(line) for line in (mounted.home / "errors").read_text().splitlines()]
    assert (line["path"], line["hash"]) == (f"{missing.hex[:2]}/{missing.hex}.7", missing.hex)
    # A size that is not that of the blob is that of another one.
    wrong = Digest(Digest.of(BLOBS[0]).hex, 2)
    with pytest.raises(OSError, match="Input/output error"):
        mounted.path(wrong).read_bytes()
