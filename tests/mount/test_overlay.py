"""Our own overlay in this process: what comes to lie in the upper directory, and what fails."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_plugin.content import events
from agent_plugin.content.digest import EMPTY_HASH
from agent_plugin.content.errors import BlobNotFoundError, LocalWriteError
from agent_plugin.content.manifest import FileEntry, Manifest
from agent_plugin.content.overlay_marks import TRUSTED_MARKS, USER_MARKS, Marks, marks_of
from agent_plugin.content.store import Cancellation
from tests.mount.conftest import Mounter
from tests.mount.file_operations import RENAME_NOREPLACE, Operations
from tests.mount.overlay_rig import MTIME_NS, US, OverlayRig, seen_by_overlay, seen_on_disk
from tests.servers.disks import tmpfs_mounted
from tests.servers.trees import files_below, write_files
from vfs.nodes import NOW, RENAME_EXCHANGE, Caller, Changes
from vfs.overlay_upper import Upper
from vfs.tree import ROOT

FILES: dict[str | bytes, bytes | int] = {
    "a": b"an input",
    "large": 9_000_001,
    "d/a": b"in a directory",
    "d/b": b"another",
    "d/c/b": b"below it",
    "empty": b"",
}


@pytest.fixture(params=[True, False], ids=["privileged", "unprivileged"])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OverlayRig]:
    if request.param and os.geteuid() != 0:
        pytest.skip("trusted attributes need root")
    rig = OverlayRig(tmp_path, FILES, privileged=request.param)
    yield rig
    rig.close()


def marks(rig: OverlayRig) -> Marks:
    return marks_of(rig.upper)


# ------------------------------------------------------------------ the upper directory


def test_nothing_lies_in_the_upper_directory_before_something_is_changed(rig: OverlayRig) -> None:
    inputs = seen_on_disk(rig.inputs)
    assert {path: facts[2:] for path, facts in seen_by_overlay(rig).items()} == {
        path: facts[2:] for path, facts in inputs.items()
    }
    assert list(rig.upper.iterdir()) == []


def test_a_removed_input_is_a_whiteout(rig: OverlayRig) -> None:
    rig.overlay.unlink(rig.find("d"), b"a")

    status = (rig.upper / "d/a").lstat()
    if marks(rig) == TRUSTED_MARKS:
        assert (stat.S_ISCHR(status.st_mode), status.st_rdev) == (True, 0)
    else:
        assert (stat.S_ISREG(status.st_mode), status.st_size) == (True, 0)
        assert os.getxattr(rig.upper / "d/a", USER_MARKS.whiteout) == b"y"
        assert os.getxattr(rig.upper / "d", USER_MARKS.opaque) == b"x"


def test_a_directory_made_anew_is_opaque(rig: OverlayRig) -> None:
    for path in ("d/a", "d/b", "d/c/b"):
        above, _, name = path.rpartition("/")
        rig.overlay.unlink(rig.find(above), name.encode())
    rig.overlay.rmdir(rig.find("d"), b"c")
    rig.overlay.rmdir(ROOT, b"d")
    made = rig.overlay.mkdir(ROOT, b"d", 0o755, US)

    assert rig.overlay.listing(made) == []
    assert os.getxattr(rig.upper / "d", marks(rig).opaque) == b"y"


def test_a_renamed_directory_of_inputs_says_which_it_was(rig: OverlayRig) -> None:
    node = rig.find("d")
    rig.overlay.rename(ROOT, b"d", ROOT, b"moved")

    assert os.getxattr(rig.upper / "moved", marks(rig).redirect) == b"/d"
    assert rig.find("moved") == node
    assert rig.read(rig.find("moved/c/b")) == b"below it"
    assert list((rig.upper / "moved").iterdir()) == []


def test_an_input_whose_mode_changes_has_no_content_of_its_own(rig: OverlayRig) -> None:
    node = rig.find("large")
    rig.overlay.setattr(node, Changes(mode=0o600))

    status = (rig.upper / "large").stat()
    assert os.getxattr(rig.upper / "large", marks(rig).metacopy) == b""
    assert (status.st_size, status.st_blocks) == (9_000_001, 0)
    assert status.st_mtime_ns == rig.overlay.attributes(node).mtime_ns
    assert rig.find("large") == node


@pytest.mark.skipif(os.geteuid() != 0, reason="overlayfs needs root")
def test_overlayfs_goes_on_with_what_our_overlay_wrote(mounter: Mounter, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a", "d/b", "d/c/e", "f/g"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() * 100)
    inputs = mounter.stored(source)
    at = mounter.mount(inputs, writes="overlay")
    (at / "a").chmod(0o600)
    (at / "a").rename(at / "d/a")
    (at / "d").rename(at / "moved")
    (at / "moved/b").unlink()
    with (at / "moved/c/e").open("ab") as file:
        file.write(b"more")
    os.link(at / "f/g", at / "linked")
    (at / "new").write_bytes(b"new")
    left = files_below(at)
    assert mounter.host.mounts.end(at)

    at = mounter.mount(inputs, writes="overlayfs")
    assert files_below(at) == left
    assert (at / "linked").samefile(at / "f/g")
    assert (at / "moved/a").stat().st_mode & 0o777 == 0o600


# ------------------------------------------------------------------ failures


@pytest.mark.expected_events(events.MOUNT_READ_FAILED)
def test_an_input_that_can_not_be_had_is_not_changed(rig: OverlayRig) -> None:
    blob = rig.blob("large")
    blob.rename(blob.with_name("away"))
    node = rig.find("large")
    with pytest.raises(BlobNotFoundError):
        rig.overlay.prepare(node, Cancellation())

    assert list(rig.upper.iterdir()) == []
    [line] = rig.ledger.read_text().splitlines()
    assert json.loads(line)["path"] == "large"
    blob.with_name("away").rename(blob)
    rig.write("large", b"changed", 5)
    assert rig.read(node)[5:12] == b"changed"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_an_input_as_it_was(tmp_path: Path) -> None:
    with tmpfs_mounted(tmp_path / "disk", size=1 << 20) as disk:
        rig = OverlayRig(tmp_path / "rig", {"large": 900_000})
        for name in ("upper", "work"):
            (disk / name).mkdir()
        (disk / "filler").write_bytes(bytes(500_000))
        rig.upper, rig.work = disk / "upper", disk / "work"
        rig.mount_again()
        node, right = rig.find("large"), (rig.inputs / "large").read_bytes()
        with pytest.raises(OSError, match="No space left"):
            rig.write("large", b"x")

        assert rig.read(node) == right
        assert rig.overlay.attributes(node).mtime_ns == MTIME_NS
        assert (disk / "upper/large").stat().st_blocks == 0
        (disk / "filler").unlink()
        rig.write("large", b"x")
        assert rig.read(node) == b"x" + right[1:]
        rig.close()
        del rig


def test_a_cancelled_change_leaves_an_input_as_it_was(rig: OverlayRig) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Exception, match="stopped on request"):
        rig.overlay.prepare(rig.find("large"), cancellation)
    assert list(rig.upper.iterdir()) == []


def test_marks_of_another_kind_are_not_mixed(tmp_path: Path) -> None:
    rig = OverlayRig(tmp_path, FILES, privileged=False)
    rig.overlay.mkdir(ROOT, b"new", 0o755, US)
    rig.close()
    with pytest.raises(LocalWriteError, match="can not read"):
        Upper(rig.upper, rig.work)


# ------------------------------------------------------------------ what users see


def test_names_of_256_bytes_are_too_long(rig: OverlayRig) -> None:
    name = b"x" * 256
    for make in (
        lambda: rig.overlay.mkdir(ROOT, name, 0o755, US),
        lambda: rig.overlay.mknod(ROOT, name, stat.S_IFREG, US),
        lambda: rig.overlay.symlink(ROOT, name, b"a", US),
        lambda: rig.overlay.link(rig.find("a"), ROOT, name),
        lambda: rig.overlay.rename(ROOT, b"a", ROOT, name),
    ):
        with pytest.raises(OSError, match="name too long"):
            make()
    rig.overlay.rename(ROOT, b"a", ROOT, name[:255])
    assert rig.read(rig.find("x" * 255)) == b"an input"


def test_exchanging_is_refused_and_changes_nothing(rig: OverlayRig) -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        rig.overlay.rename(ROOT, b"a", ROOT, b"d", flags=RENAME_EXCHANGE)
    assert caught.value.errno == errno.EINVAL
    assert list(rig.upper.iterdir()) == []


def test_what_our_overlay_refuses_and_passes_over_is_what_is_said_of_it(
    mounter: Mounter, tmp_path: Path
) -> None:
    """So that what test_twin.py passes over, and docs/SEMANTICS.md names, is no more than that."""
    write_files(tmp_path / "source", {"a": b"an input", "d/a": b"another"}, mtime_ns=MTIME_NS)
    at = mounter.mount(mounter.stored(tmp_path / "source"), writes="overlay")
    operations = Operations()
    a, d = os.fspath(at / "a"), os.fspath(at / "d")
    with pytest.raises(OSError, match="Invalid argument"):
        operations.rename_with(a, d, RENAME_EXCHANGE)
    with pytest.raises(OSError, match="exists"):
        operations.rename_with(a, d, RENAME_NOREPLACE)
    with pytest.raises(OSError, match="not supported"):
        operations.open_nameless(1, os.fspath(at))
    (at / "a").chmod(0o4755)
    os.chown(at / "a", -1, -1)
    assert stat.S_IMODE((at / "a").stat().st_mode) == 0o4755, "a disk takes it away"
    assert files_below(at) == files_below(tmp_path / "source")


def test_nobody_makes_a_whiteout_or_a_mark(rig: OverlayRig) -> None:
    with pytest.raises(PermissionError):
        rig.overlay.mknod(ROOT, b"hidden", stat.S_IFCHR | 0o600, US, rdev=0)
    for name in (b"user.overlay.opaque", b"user.propmaster.node", b"user.propmaster.hash"):
        with pytest.raises(PermissionError):
            rig.overlay.setxattr(rig.find("d"), name, b"y", 0)
        with pytest.raises(PermissionError):
            rig.overlay.removexattr(rig.find("d"), name)
    with pytest.raises(OSError, match=r"not supported|not permitted"):
        rig.overlay.setxattr(rig.find("d"), b"trusted.overlay.opaque", b"y", 0)
    rig.overlay.setattr(rig.find("a"), Changes(mode=0o600))
    assert rig.overlay.listxattr(rig.find("a")) == []
    assert rig.overlay.getxattr(rig.find("a"), b"user.overlay.metacopy") is None


def test_a_link_has_attributes_of_its_own(rig: OverlayRig) -> None:
    """Of the kinds that a disk lets it have: none of users."""
    link = rig.overlay.symlink(ROOT, b"link", b"a", US)
    with pytest.raises(PermissionError):
        rig.overlay.setxattr(link, b"user.a", b"x", 0)
    assert rig.overlay.getxattr(link, b"user.a") is None
    if marks(rig).space == "trusted":
        rig.overlay.setxattr(link, b"trusted.a", b"x", 0)
        rig.overlay.hold(link)
        rig.overlay.unlink(ROOT, b"link")
        rig.restart()
        assert rig.overlay.listxattr(link) == [b"trusted.a"]
        assert rig.overlay.getxattr(link, b"trusted.a") == b"x"
        rig.overlay.removexattr(link, b"trusted.a")
    assert rig.overlay.listxattr(link) == []
    assert rig.overlay.listxattr(rig.find("a")) == []


def test_times_are_set_kept_or_those_of_now(rig: OverlayRig) -> None:
    node = rig.find("a")
    before = rig.overlay.attributes(node)
    after = rig.overlay.setattr(node, Changes(mtime_ns=-5_000_000_001))
    assert (after.atime_ns, after.mtime_ns) == (before.atime_ns, -5_000_000_001)
    rig.write("a", b"x")
    rig.overlay.setattr(node, Changes(atime_ns=7, mtime_ns=NOW))
    now = rig.overlay.attributes(node)
    assert now.atime_ns == 7
    assert now.mtime_ns > MTIME_NS


def test_a_size_that_is_set_to_what_it_is_changes_the_time_and_fetches_nothing(
    rig: OverlayRig,
) -> None:
    node = rig.find("large")
    rig.overlay.setattr(node, Changes(size=9_000_001))
    assert rig.overlay.attributes(node).mtime_ns > MTIME_NS
    assert not rig.overlay.can_write(node)
    assert rig.read(node) == (rig.inputs / "large").read_bytes()


def test_an_empty_input_grows(rig: OverlayRig) -> None:
    node = rig.find("empty")
    rig.overlay.prepare(node, Cancellation())
    rig.overlay.setattr(node, Changes(size=5))
    assert rig.read(node) == bytes(5)


def test_bringing_an_input_in_changes_no_time_of_it_or_its_directory(rig: OverlayRig) -> None:
    rig.overlay.mkdir(rig.find("d"), b"sub", 0o755, US)
    before = rig.overlay.attributes(rig.find("d"))
    file = rig.overlay.attributes(rig.find("d/a"))
    rig.overlay.prepare(rig.find("d/a"), Cancellation())
    assert rig.overlay.can_write(rig.find("d/a"))
    assert rig.overlay.attributes(rig.find("d")).mtime_ns == before.mtime_ns
    assert (
        rig.overlay.attributes(rig.find("d/a"))[:10]
        == file._replace(blocks=rig.overlay.attributes(rig.find("d/a")).blocks)[:10]
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_a_file_is_its_makers_and_of_a_setgid_directory_its_group(tmp_path: Path) -> None:
    rig = OverlayRig(tmp_path, FILES)
    node = rig.overlay.mknod(ROOT, b"theirs", stat.S_IFREG | 0o640, Caller(12, 34))
    found = rig.overlay.attributes(node)
    assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (12, 34, 0o640)
    directory = rig.overlay.mkdir(ROOT, b"team", 0o755, Caller(12, 34))
    rig.overlay.setattr(directory, Changes(gid=56, mode=0o2775))
    below = rig.overlay.mkdir(directory, b"sub", 0o755, Caller(78, 90))
    found = rig.overlay.attributes(below)
    assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (78, 56, 0o2755)
    rig.close()


def test_set_user_id_goes_with_a_write(rig: OverlayRig) -> None:
    node = rig.overlay.mknod(ROOT, b"tool", stat.S_IFREG | 0o6755, US)
    rig.overlay.write(node, 0, b"x")
    assert stat.S_IMODE(rig.overlay.attributes(node).mode) == 0o6755
    rig.overlay.write(node, 0, b"y", kills_privileges=True)
    assert stat.S_IMODE(rig.overlay.attributes(node).mode) == 0o755


def test_a_listing_goes_on_where_it_was_while_names_come_and_go(rig: OverlayRig) -> None:
    directory = rig.overlay.mkdir(ROOT, b"many", 0o755, US)
    for number in range(100):
        rig.overlay.mknod(directory, b"%d" % number, stat.S_IFREG | 0o644, US)
    first = rig.overlay.listing(directory)[:50]
    for _, name, _ in first:
        rig.overlay.unlink(directory, name)
    rig.restart()
    after = [listed for listed in rig.overlay.listing(directory) if listed[0] > first[-1][0]]
    assert len(after) == 50
    assert {name for _, name, _ in (*first, *after)} == {b"%d" % number for number in range(100)}


def test_what_is_added_counts_among_a_directorys_links(rig: OverlayRig) -> None:
    """As the outputs of other steps are, and then brought to their places."""
    before = rig.overlay.attributes(ROOT).nlink
    rig.tree.add(Manifest.of([FileEntry(EMPTY_HASH, 0, "new/deep/file", 0)]), "layer")
    assert rig.overlay.attributes(ROOT).nlink == before + 1
    rig.overlay.rename(rig.find("layer"), b"new", ROOT, b"new")
    assert rig.overlay.attributes(ROOT).nlink == before + 2
    rig.overlay.rmdir(ROOT, b"layer")
    assert rig.overlay.attributes(ROOT).nlink == before + 1


def test_an_input_that_an_earlier_mount_has_touched_stays_what_the_kernel_knows(
    rig: OverlayRig,
) -> None:
    """A successor that had another node for it would give the input's bytes, and lose writes."""
    for path in ("a", "d/a", "d/b"):
        rig.overlay.setattr(rig.find(path), Changes(mode=0o600))
    rig.mount_again()
    nodes = {path: rig.find(path) for path in ("a", "d/a", "d/b")}
    rig.write("a", b"My")
    rig.overlay.setattr(nodes["d/a"], Changes(size=0))
    rig.overlay.hold(nodes["d/b"])
    rig.overlay.unlink(rig.find("d"), b"b")
    rig.overlay.setattr(nodes["d/b"], Changes(mode=0o640))
    rig.restart()

    assert {path: rig.find(path) for path in ("a", "d/a")} == {
        path: nodes[path] for path in ("a", "d/a")
    }
    assert rig.read(nodes["a"]) == b"My input"
    assert rig.overlay.attributes(nodes["d/a"]).size == 0
    gone = rig.overlay.attributes(nodes["d/b"])
    assert (gone.mode & 0o777, gone.nlink) == (0o640, 0)
    assert rig.read(nodes["d/b"]) == b"another"
    rig.overlay.forget(nodes["d/b"])
    assert list(rig.work.iterdir()) == []


def test_an_input_that_was_removed_while_open_has_no_name_for_a_successor_either(
    rig: OverlayRig,
) -> None:
    """Whoever asks whether the file was replaced (`tail -F`, a lock's owner) sees that it was."""
    nodes = {path: rig.find(path) for path in ("a", "d/a", "d/b", "empty")}
    for node in nodes.values():
        rig.overlay.hold(node)
    rig.overlay.unlink(ROOT, b"a")
    rig.overlay.mknod(ROOT, b"a", stat.S_IFREG | 0o600, US)
    rig.overlay.rename(rig.find("d"), b"b", ROOT, b"b")
    rig.overlay.unlink(rig.find("d"), b"a")
    rig.overlay.unlink(rig.find("d/c"), b"b")
    rig.overlay.rmdir(rig.find("d"), b"c")
    rig.overlay.rmdir(ROOT, b"d")
    rig.overlay.mkdir(ROOT, b"d", 0o755, US)
    rig.restart()

    links = {path: rig.overlay.attributes(node).nlink for path, node in nodes.items()}
    assert links == {"a": 0, "d/a": 0, "d/b": 1, "empty": 1}
    assert rig.read(nodes["d/a"]) == b"in a directory"


def test_what_is_removed_goes_from_the_disk_when_the_last_lets_go(rig: OverlayRig) -> None:
    node = rig.overlay.mknod(ROOT, b"tmp", stat.S_IFREG | 0o600, US)
    rig.overlay.write(node, 0, b"temporary")
    rig.overlay.hold(node, 2)
    rig.overlay.unlink(ROOT, b"tmp")
    rig.overlay.forget(node)
    assert rig.read(node) == b"temporary"
    assert rig.overlay.attributes(node).nlink == 0
    rig.restart()
    assert rig.read(node) == b"temporary"
    rig.overlay.forget(node)
    assert list(rig.work.iterdir()) == []
    with pytest.raises(OSError, match="no such node"):
        rig.overlay.attributes(node)


def test_everything_seems_to_be_the_user_who_is_served(tmp_path: Path) -> None:
    """Who is not root can give nothing away."""
    served = Caller(61_001, 61_002)
    rig = OverlayRig(tmp_path, FILES, privileged=False, shown_owner=served)
    made = rig.overlay.mknod(ROOT, b"made", 0o640, served)
    rig.write("d/a", b"changed")

    nodes = [made, rig.find("d"), rig.find("d/a"), ROOT]
    owners = {
        (rig.overlay.attributes(node).uid, rig.overlay.attributes(node).gid) for node in nodes
    }
    assert owners == {served}
    assert {path.stat().st_uid for path in rig.upper.rglob("*")} == {os.geteuid()}
    rig.overlay.setattr(made, Changes(uid=served.uid, gid=served.gid, mode=0o600))
    with pytest.raises(PermissionError):
        rig.overlay.setattr(made, Changes(uid=0))
    rig.close()
