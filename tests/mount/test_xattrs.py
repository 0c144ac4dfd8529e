"""A file's hash and state as extended attributes, and that nobody pays who does not ask."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import Manifest
from agent_plugin.content.mount_table import read_mounts
from tests.mount.conftest import Mounter, by_each_transport
from tests.servers.hooks import Host
from tests.servers.sessions import Sessions
from tests.servers.trees import write_files

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

HASH = "user.propmaster.hash"
STATE = "user.propmaster.state"
FILES: dict[str | bytes, bytes | int] = {"tex/wood.tx": b"wood", "tex/stone.tx": 9000, "empty": b""}


@pytest.fixture
def inputs(mounter: Mounter, tmp_path: Path) -> Manifest:
    write_files(tmp_path / "source", FILES, mtime_ns=1_600_000_000_000_000_000)
    return mounter.stored(tmp_path / "source")


def error_of(path: Path, name: str) -> str:
    """Return the name of the error that asking for an attribute is."""
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        os.getxattr(path, name)
    return errno.errorcode[caught.value.errno or 0]


@by_each_transport
def test_hash_and_state_of_a_file_are_told(mounter: Mounter, inputs: Manifest) -> None:
    at = mounter.mount(inputs)
    wood = at / "tex/wood.tx"

    assert os.getxattr(wood, HASH).decode() == Digest.of(b"wood").hex
    assert os.getxattr(wood, STATE) == b"remote"
    assert wood.read_bytes() == b"wood"
    assert os.getxattr(wood, STATE) == b"local"
    assert os.getxattr(at / "tex/stone.tx", STATE) == b"remote"
    with pytest.raises(OSError, match="Operation not supported"):
        os.listxattr(wood)
    assert error_of(wood, "user.other") == "ENODATA"
    assert error_of(at / "tex", HASH) == "ENODATA"


@by_each_transport
def test_labels_and_acls_are_not_supported_so_that_listing_asks_for_them_once(
    mounter: Mounter, inputs: Manifest
) -> None:
    """Seen to fail with ENODATA, which has `ls -l` ask for each file."""
    at = mounter.mount(inputs)

    for name in ("security.selinux", "security.capability", "system.posix_acl_access"):
        assert error_of(at / "tex/wood.tx", name) == "ENOTSUP"


def test_overlayfs_lets_them_through_when_asked_to(mounter: Mounter, inputs: Manifest) -> None:
    at, host = mounter.home / "mnt", mounter.host
    arguments: list[str | Path] = [
        "mount",
        mounter.manifest_file(inputs),
        at,
        "--store",
        host.store_url,
    ]
    arguments += ["--work-dir", mounter.home / "work"]
    assert host.run(*arguments).returncode == 0
    assert error_of(at / "tex/wood.tx", HASH) == "ENOTSUP"
    assert host.mounts.end(at)
    assert host.run(*arguments, "--xattrs").returncode == 0
    try:
        assert os.getxattr(at / "tex/wood.tx", HASH).decode() == Digest.of(b"wood").hex
        assert os.getxattr(at / "tex/wood.tx", STATE) == b"remote"
        os.setxattr(at / "tex/stone.tx", "user.own", b"x")
        assert os.listxattr(at / "tex/stone.tx") == ["user.own"]
        (at / "tex/wood.tx").write_bytes(b"changed")
        assert error_of(at / "tex/wood.tx", HASH) == "ENODATA"
        (at / "tex").rename(at / "textures")
        assert (at / "textures/stone.tx").stat().st_size == 9000
    finally:
        assert host.mounts.end(at)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(
        tmp_path / "host", f"file://{tmp_path}/store", settings={"mounts": {"xattrs": True}}
    )
    yield host
    for mount in reversed(read_mounts()):
        if mount.mountpoint.startswith(f"{tmp_path}/"):
            host.mounts.end(Path(mount.mountpoint))


def test_a_session_has_them_if_the_settings_say_so(tmp_path: Path, host: Host) -> None:
    sessions = Sessions(tmp_path, host)
    job = sessions.submitted(dict(FILES), "renders")
    [root] = host.start(job, sessions.session_dir, file_system="VIRTUAL").roots

    wood = Path(root.local_root, "tex/wood.tx")
    assert os.getxattr(wood, HASH).decode() == Digest.of(b"wood").hex
    host.end(sessions.session_dir)
