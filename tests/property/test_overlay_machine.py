"""Whatever is done to an overlay, a plain directory to which the same is done looks the same."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agent_plugin.content.digest import Digest
from agent_plugin.content.manifest import FileEntry
from agent_plugin.content.store import Cancellation
from agent_plugin.session.written import find_written
from tests.mount.mortal_server import KilledError, mortal_server
from tests.mount.overlay_rig import US, OverlayRig, seen_by_overlay, seen_on_disk
from vfs.nodes import RENAME_NOREPLACE, Changes

FILES: Final[dict[str | bytes, bytes | int]] = {
    "a": b"an input",
    "b": 9000,
    "d/a": b"in a directory",
    "d/c/b": b"below it",
    "d/c/c": b"",
    "c/a": b"an input",
}

names = st.sampled_from(["a", "b", "c", "d"])
paths = st.sampled_from(
    ["a", "b", "c", "d", "d/a", "d/c", "d/c/b", "d/c/c", "c/a", "b/a", "d/d", "c/d", "c/c/b"]
)
modes = st.sampled_from([0o600, 0o644, 0o755, 0o400])
contents = st.sampled_from([b"x", b"hello", b"0123456789"])
moments = st.integers(min_value=1, max_value=12)


class OverlayMachine(RuleBasedStateMachine):
    """Names, contents, modes, links and attributes; open files; servers killed at any change.

    Seen to catch, each alone: a name that is there, or gone, is refused to a request that comes
    again; a directory that is made over a whiteout is not opaque; what is removed leaves no
    whiteout; the mark that a file shows an input goes before its content is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        # Open files: the node, and the twin's descriptor.
        self.open: list[tuple[int, int]] = []

    @initialize(privileged=st.booleans())
    def begin(self, privileged: bool) -> None:
        self.rig = OverlayRig(self.home, FILES, privileged=privileged)
        self.twin = self.home / "twin"
        shutil.copytree(self.rig.inputs, self.twin)
        for folder, _, files in os.walk(self.twin):
            Path(folder).chmod(0o755)
            for name in files:
                Path(folder, name).chmod(0o644)

    def teardown(self) -> None:
        for _, fd in self.open:
            os.close(fd)
        if hasattr(self, "rig"):
            self.rig.close()
        shutil.rmtree(self.home)

    # ------------------------------------------------------------------ what is done to both

    @rule(path=paths, mode=modes, kill=moments)
    def make(self, path: str, mode: int, kill: int) -> None:
        def on_disk(at: Path) -> None:
            os.close(os.open(at, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

        self._both(
            kill,
            lambda: on_disk(self.twin / path),
            lambda again: self.rig.overlay.mknod(
                *self._split(path), stat.S_IFREG | mode, US, again=again
            ),
        )

    @rule(path=paths, kill=moments)
    def make_directory(self, path: str, kill: int) -> None:
        self._both(
            kill,
            lambda: (self.twin / path).mkdir(0o755),
            lambda again: self.rig.overlay.mkdir(*self._split(path), 0o755, US, again=again),
        )

    @rule(path=paths, kill=moments)
    def make_link(self, path: str, kill: int) -> None:
        self._both(
            kill,
            lambda: (self.twin / path).symlink_to("nowhere"),
            lambda again: self.rig.overlay.symlink(*self._split(path), b"nowhere", US, again=again),
        )

    @rule(path=paths, to=paths, kill=moments)
    def link(self, path: str, to: str, kill: int) -> None:
        self._both(
            kill,
            lambda: os.link(self.twin / path, self.twin / to, follow_symlinks=False),
            lambda again: self.rig.overlay.link(self.rig.find(path), *self._split(to), again=again),
        )

    @rule(path=paths, kill=moments)
    def unlink(self, path: str, kill: int) -> None:
        self._unlink(path, kill)

    @rule(path=paths, kill=moments)
    def remove_directory(self, path: str, kill: int) -> None:
        self._rmdir(path, kill)

    @rule(path=paths, kill=moments)
    def remove_all(self, path: str, kill: int) -> None:
        """As `rm -r` does."""
        below = [path]
        if (self.twin / path).is_dir() and not (self.twin / path).is_symlink():
            found = sorted(seen_on_disk(self.twin / path), reverse=True)
            below = [*(f"{path}/{name}" for name in found), path]
        for each in below:
            place = self.twin / each
            if place.is_dir() and not place.is_symlink():
                self._rmdir(each, kill)
            else:
                self._unlink(each, kill)

    def _rmdir(self, path: str, kill: int) -> None:
        self._both(
            kill,
            (self.twin / path).rmdir,
            lambda again: self.rig.overlay.rmdir(*self._split(path), again=again),
        )

    def _unlink(self, path: str, kill: int) -> None:
        self._both(
            kill,
            (self.twin / path).unlink,
            lambda again: self.rig.overlay.unlink(*self._split(path), again=again),
        )

    @rule(path=paths, to=paths, replaces=st.booleans(), kill=moments)
    def rename(self, path: str, to: str, replaces: bool, kill: int) -> None:
        def on_disk() -> None:
            if not replaces and os.path.lexists(self.twin / to):
                (self.twin / path).lstat()
                raise FileExistsError(errno.EEXIST, "there")
            (self.twin / path).rename(self.twin / to)

        if to.startswith(f"{path}/") or path.startswith(f"{to}/"):
            return  # The kernel itself refuses it.
        self._both(
            kill,
            on_disk,
            lambda again: self.rig.overlay.rename(
                *self._split(path),
                *self._split(to),
                flags=0 if replaces else RENAME_NOREPLACE,
                again=again,
            ),
        )

    @rule(path=paths, offset=st.sampled_from([0, 3, 20_000]), data=contents, kill=moments)
    def write(self, path: str, offset: int, data: bytes, kill: int) -> None:
        if not self._is_file(path):
            return

        def on_disk() -> None:
            fd = os.open(self.twin / path, os.O_WRONLY)
            os.pwrite(fd, data, offset)
            os.close(fd)

        self._both(kill, on_disk, lambda _again: self.rig.write(path, data, offset))

    @rule(path=paths, size=st.sampled_from([0, 0, 4, 9000, 50_000]), kill=moments)
    def truncate(self, path: str, size: int, kill: int) -> None:
        if not self._is_file(path):
            return

        def on_overlay(_again: bool) -> None:
            node = self.rig.find(path)
            if size and size != self.rig.overlay.attributes(node).size:
                self.rig.overlay.prepare(node, Cancellation())
            self.rig.overlay.setattr(node, Changes(size=size))

        self._both(kill, lambda: os.truncate(self.twin / path, size), on_overlay)

    @rule(path=paths, mode=modes, kill=moments)
    def change_mode(self, path: str, mode: int, kill: int) -> None:
        if (self.twin / path).is_symlink():
            return
        mode = mode | 0o700 if (self.twin / path).is_dir() else mode
        self._both(
            kill,
            lambda: (self.twin / path).chmod(mode),
            lambda _again: self.rig.overlay.setattr(self.rig.find(path), Changes(mode=mode)),
        )

    @rule(path=paths, name=names, value=contents, kill=moments)
    def set_attribute(self, path: str, name: str, value: bytes, kill: int) -> None:
        if (self.twin / path).is_symlink():
            return
        xattr, value = f"user.{name}".encode(), value[:100]
        self._both(
            kill,
            lambda: os.setxattr(self.twin / path, xattr, value),
            lambda _again: self.rig.overlay.setxattr(self.rig.find(path), xattr, value, 0),
        )

    # ------------------------------------------------------------------ open files

    @rule(path=paths)
    def open_file(self, path: str) -> None:
        if self._is_file(path) and len(self.open) < 5:
            node = self.rig.find(path)
            self.rig.overlay.hold(node)
            self.open.append((node, os.open(self.twin / path, os.O_RDWR)))

    @precondition(lambda self: self.open)
    @rule(at=st.integers(min_value=0), data=contents, kill=moments)
    def write_open(self, at: int, data: bytes, kill: int) -> None:
        node, fd = self.open[at % len(self.open)]

        def on_overlay(_again: bool) -> None:
            self.rig.overlay.prepare(node, Cancellation())
            self.rig.overlay.write(node, 5, data)

        self._both(kill, lambda: os.pwrite(fd, data, 5), on_overlay)

    @precondition(lambda self: self.open)
    @rule(at=st.integers(min_value=0))
    def close_file(self, at: int) -> None:
        node, fd = self.open.pop(at % len(self.open))
        os.close(fd)
        self.rig.overlay.forget(node)

    # ------------------------------------------------------------------ servers

    @rule()
    def restart(self) -> None:
        self.rig.restart()

    @precondition(lambda self: not self.open)
    @rule()
    def mount_again(self) -> None:
        self.rig.mount_again()

    # ------------------------------------------------------------------ what has to be so

    @invariant()
    def looks_the_same(self) -> None:
        if not hasattr(self, "rig"):
            return
        assert seen_by_overlay(self.rig) == seen_on_disk(self.twin)
        for node, fd in self.open:
            status = os.fstat(fd)
            attributes = self.rig.overlay.attributes(node)
            assert self.rig.read(node) == os.pread(fd, status.st_size, 0)
            assert (attributes.mode, attributes.size) == (status.st_mode, status.st_size)

    @invariant()
    def what_was_written_is_found(self) -> None:
        if hasattr(self, "rig"):
            assert_found(self.rig, self.twin)

    # ------------------------------------------------------------------ how

    def _both(
        self,
        kill: int,
        on_disk: Callable[[], object],
        on_overlay: Callable[[bool], object],
    ) -> None:
        """Do something to both; what goes well is begun by a server that is killed."""
        refused = _errno(on_disk)
        if refused:
            told = _errno(lambda: on_overlay(False))
            # Which of the two it is the kernel decides on the way.
            assert told == refused or {told, refused} == {errno.ENOENT, errno.ENOTDIR}
            return
        with mortal_server(kill) as mortal, suppress(KilledError):
            on_overlay(False)
        if mortal.lives <= 0:  # At 0 it was killed before it could answer.
            self.rig.restart()
            on_overlay(True)

    def _is_file(self, path: str) -> bool:
        with suppress(OSError):
            return stat.S_ISREG((self.twin / path).lstat().st_mode)
        return False

    def _split(self, path: str) -> tuple[int, bytes]:
        """Return a directory's node and a name in it, as the kernel comes by them."""
        above, _, name = path.rpartition("/")
        node = self.rig.find(above)
        mode = self.rig.overlay.attributes(node).mode
        if stat.S_ISLNK(mode):
            raise FileNotFoundError(errno.ENOENT, "the link leads nowhere")
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        return node, name.encode()


def _errno(act: Callable[[], object]) -> int:
    try:
        act()
    except OSError as error:
        return error.errno or 0
    return 0


def assert_found(rig: OverlayRig, twin: Path) -> None:
    """What the upper directory says of outputs is what the twin has against the inputs."""

    def inputs(asked: Sequence[str]) -> list[list[FileEntry]]:
        return [rig.tree.at_or_below(path) for path in asked]

    written = find_written(rig.upper, ["."], inputs, Cancellation())
    before = {entry.path: entry.hash for entry in rig.tree.walk()}
    after = {
        path: Digest.of(facts[3]).hex
        for path, facts in seen_on_disk(twin).items()
        if isinstance(facts[3], bytes) and stat.S_ISREG(int(str(facts[0])))
    }
    assert written.gone.keys() == before.keys() - after.keys()
    changed = {path for path, hash_ in after.items() if before.get(path) != hash_}
    told = written.files.keys() | written.moved.keys()
    assert changed <= told <= after.keys()
    assert all(entry.hash == after[path] for path, entry in written.moved.items())


def test_what_an_overlay_leaves_is_what_is_found_in_it() -> None:
    run_state_machine_as_test(
        OverlayMachine, settings=settings(max_examples=15, stateful_step_count=30, deadline=None)
    )
