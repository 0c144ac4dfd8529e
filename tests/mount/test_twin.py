"""A mount and a directory of ext4 are told the same, and every answer and the end are the same.

Two users do it, root and one with few rights, each in a process of its own. What differs and may is
left out of the answers (`file_operations.facts`) or is not asked (`Stack.lacks`), and stands in
docs/SEMANTICS.md. When all is done the mount is made again, and has to show the same once more.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)

from agent_plugin.content.manifest import FileEntry, Manifest
from tests.mount.conftest import Mounter
from tests.mount.file_operations import (
    GROUP,
    NOBODY,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    Worker,
)
from tests.mount.stacks import Stack
from tests.servers.trees import write_files

# How many trees of inputs one mount has: each example begins in one that nobody has touched.
TREES = 400
MTIME_NS = 1_600_000_000_123_456_000
INPUTS: dict[str | bytes, bytes | int] = {
    "scene.usd": b"#usda 1.0\n",
    "empty": b"",
    "tex/wood.tx": 5000,
    "tex/stone.tx": 70_000,
    "tex/deep/er/fur.tx": 4096,
    "tex/deep/er/hair.tx": b"hair",
    "geo/big.abc": 300_000,
    "geo/far/low.abc": 12_345,
    "\u00e9/\u540d.bin": b"by another name",
}
DIRECTORIES = [
    *(".", "tex", "tex/deep", "tex/deep/er", "geo", "geo/far", "\u00e9"),
    *("pub", "pub/sticky", "pub/group", "pub/theirs"),
]
NEW = [
    *("new", "new/x", "new/x/y", "tex/new", "tex/deep/new", "tex2", "geo/new", "geo/far/new"),
    *("pub/a", "pub/b", "pub/a/x", "pub/link", "pub/link/wood.tx", "pub/link/new"),
    *("pub/sticky/a", "pub/sticky/b", "pub/group/a", "pub/theirs/a", "pub/theirs/b"),
]
ODD = ["scene.usd/x", "missing/x", "tex/../scene.usd", "tex/", "n" * 255, "n" * 256, "pub/\n"]
FILES = [os.fsdecode(name) for name in INPUTS]


@dataclass(frozen=True)
class Existing:
    """What is there when it is asked for: the file or directory of that number."""

    number: int
    directory: bool = False


Name = str | Existing
NUMBER = st.integers(0, 40)
EXISTING_FILE = st.builds(Existing, NUMBER)
EXISTING_DIRECTORY = st.builds(Existing, NUMBER, st.just(True))
FILE = st.one_of(EXISTING_FILE, EXISTING_FILE, EXISTING_FILE, st.sampled_from([*FILES, *NEW]))
DIRECTORY = st.one_of(
    EXISTING_DIRECTORY, EXISTING_DIRECTORY, st.sampled_from([*DIRECTORIES, "new", "tex2"])
)
PATH = st.one_of(FILE, FILE, DIRECTORY, st.sampled_from(ODD))
TARGET = st.one_of(st.sampled_from(NEW), st.sampled_from(NEW), PATH)
# Root more often: it is refused less, so more comes of it.
USER = st.sampled_from(["root", "root", "nobody"])
SIZE = st.sampled_from([0, 1, 10, 100, 4095, 4096, 4097, 65_536, 70_000, 131_073])
OFFSET = st.sampled_from([0, 1, 9, 4095, 4096, 4999, 5000, 69_999, 300_000, 1 << 20])
SEED = st.integers(0, 250)
MODE = st.sampled_from([0o644, 0o600, 0o666, 0o444, 0, 0o755, 0o4755, 0o2755, 0o640])
DIRECTORY_MODE = st.sampled_from([0o755, 0o777, 0o1777, 0o2775, 0o700, 0o555, 0o711])
OWNER = st.sampled_from([-1, 0, 1, NOBODY])
OWNING_GROUP = st.sampled_from([-1, 0, GROUP, NOBODY])
XATTR = st.sampled_from(["user.a", "user.b", "trusted.a", "nonsense"])
# -1 is now, -2 leaves it as it is.
MOMENT = st.sampled_from([-1, -2, 0, 1, 1_500_000_000_123_456_789, 1_000_000_000_999_999_999])
OPENING = st.sampled_from(
    [
        *(os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND),
        *(os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL),
        *(os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT | os.O_TRUNC),
        *(os.O_RDONLY | os.O_NOFOLLOW, os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT),
        *(os.O_RDONLY | os.O_DIRECTORY, os.O_RDWR | os.O_DSYNC, os.O_RDWR | os.O_DIRECTORY),
    ]
)
KEEP_SIZE, PUNCH, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32
ALLOCATION = st.sampled_from([0, KEEP_SIZE, PUNCH | KEEP_SIZE, ZERO, ZERO | KEEP_SIZE, PUNCH])


def apart(here: tuple[str, object], there: tuple[str, object]) -> str:
    """Return what a mount answered and a disk did not."""
    trees = here[1], there[1]
    if not (isinstance(trees[0], dict) and isinstance(trees[1], dict)):
        return f"in the mount: {here}\non the disk:  {there}"
    return "\n".join(
        f"{path!r} in the mount: {trees[0].get(path)}\n{path!r} on the disk:  {trees[1].get(path)}"
        for path in sorted({*trees[0], *trees[1]})
        if trees[0].get(path) != trees[1].get(path)
    )


class Twins:
    """A mount with many trees of the same inputs, and what a directory of ext4 made of each.

    Args:
        mounter: With nothing mounted.
        stack: How to mount.
    """

    def __init__(self, mounter: Mounter, stack: Stack) -> None:
        self.stack = stack
        self._mounter = mounter
        source = mounter.home / "source"
        write_files(source, INPUTS, mtime_ns=MTIME_NS)
        inputs = mounter.stored(source).entries
        self._manifest = Manifest.of(
            FileEntry(entry.hash, entry.mtime, f"{number}/{entry.path}", entry.size)
            for number in range(TREES)
            for entry in inputs
        )
        self._mounts = 0
        self._at: Path | None = None
        # By the directory in the mount, what its twin was in the end.
        self._ended: dict[Path, object] = {}
        self.workers = {
            user: (Worker(uid), Worker(uid)) for user, uid in (("root", 0), ("nobody", NOBODY))
        }

    def begin(self) -> tuple[Path, Path]:
        """Send all workers to a tree of inputs and its twin; return where those are."""
        if self._at is None or len(self._ended) == TREES:
            if self._at:
                self.check_again()
            self._mounts += 1
            self._at = self._mount()
            self._ended = {}
        number = len(self._ended)
        mounted, twin = self._at / str(number), self._mounter.home / "twin"
        twin = twin / f"{self._mounts}-{number}"
        write_files(twin, INPUTS, mtime_ns=MTIME_NS)
        # Manifests have no times of directories.
        for folder, _, _ in os.walk(twin):
            os.utime(folder, ns=(0, 0))
        self._ended[mounted] = None
        touched = frozenset[int]()
        if self.stack.differs:
            touched = frozenset(path.stat().st_ino for path in twin.rglob("*"))
        for in_mount, on_disk in self.workers.values():
            in_mount.enter(mounted)
            on_disk.enter(twin, touched=touched)
        return mounted, twin

    def end(self, mounted: Path, tree: object) -> None:
        self._ended[mounted] = tree

    def check_again(self) -> None:
        """Make the mount again: it must show in every tree what was there."""
        assert self._at
        for pair in self.workers.values():
            for worker in pair:
                worker.enter(Path("/"))
        assert self._mounter.host.mounts.end(self._at)
        self._at = self._mount()
        root = self.workers["root"][0]
        for mounted, tree in self._ended.items():
            if tree is not None:
                root.enter(mounted)
                root.ask("tree")
                assert root.answer() == ("is", tree)
        root.enter(Path("/"))
        assert self._mounter.errors(self._at) == []
        assert self._mounter.host.mounts.end(self._at)

    def close(self) -> None:
        for pair in self.workers.values():
            for worker in pair:
                worker.close()

    def _mount(self) -> Path:
        return self._mounter.mount(
            self._manifest, writes=self.stack.writes, name=f"mnt{self._mounts}"
        )


class TwinMachine(RuleBasedStateMachine):
    """Rules are what programs do; the twin is what they find on a disk.

    Mutations seen to fail here: inputs that their group may write; times of whole seconds; an
    upper directory that keeps overlayfs's notes of inputs when it is mounted again (by fusepy,
    ESTALE). What it found in our own overlay: empty inputs that could not grow, attributes of root
    that were refused, times of directories that changed with what was brought into them.
    """

    files: "Bundle[tuple[str, int]]" = Bundle("files")
    folders: "Bundle[tuple[str, int]]" = Bundle("folders")

    def __init__(self, twins: Twins) -> None:
        super().__init__()
        self.twins = twins
        self.numbers = 0

    def both(self, user: str, what: str, *arguments: object, **named: object) -> tuple[str, object]:
        """Say the same to both; return what both answered."""
        if any(isinstance(argument, Existing) for argument in arguments):
            arguments = self.found(arguments)
        mounted, twin = self.twins.workers[user]
        if what.endswith("_open") and self.lacks("open below what was removed"):
            mounted.ask("stat_open", arguments[0])
            if (answer := mounted.answer()) == ("stat_open", "ENOENT"):
                return answer
        for worker in (mounted, twin):
            worker.ask(what, *arguments, **named)
        here, there = mounted.answer(), twin.answer()
        assert here == there, f"{user}: {what}{arguments}{named or ''}\n{apart(here, there)}"
        return there

    def found(self, arguments: tuple[object, ...]) -> tuple[object, ...]:
        """Put the names of what is there now into the arguments."""
        _, twin = self.twins.workers["root"]
        twin.ask("names")
        _, names = twin.answer()
        files, directories = cast("tuple[list[str], list[str]]", names)
        return tuple(
            (among := directories if argument.directory else files or ["none"])[
                argument.number % len(among)
            ]
            if isinstance(argument, Existing)
            else argument
            for argument in arguments
        )

    def lacks(self, what: str) -> bool:
        return what in self.twins.stack.lacks

    @initialize()
    def begin(self) -> None:
        self.mounted, _ = self.twins.begin()
        for path, mode in (("pub", 0o777), ("pub/sticky", 0o1777), ("pub/group", 0o2777)):
            self.both("root", "mkdir", path, 0o755)
            self.both("root", "chmod", path, mode)
        self.both("root", "chown", "pub/group", 0, GROUP, follow=True)
        self.both("root", "create", "pub/sticky/a", 0, 0o666, 1, 10)
        self.both("root", "chmod", "tex/deep", 0o777)
        self.both("root", "chown", "geo", NOBODY, NOBODY, follow=True)
        self.both("root", "chmod", "tex/stone.tx", 0o666)
        self.both("nobody", "mkdir", "pub/theirs", 0o700)

    # ------------------------------------------------------------------ whole files

    @rule(user=USER, path=FILE, mode=MODE, seed=SEED, size=SIZE)
    def create(self, user: str, path: Name, mode: int, seed: int, size: int) -> None:
        self.both(user, "create", path, os.O_TRUNC, mode, seed, size)

    @rule(user=USER, path=TARGET, mode=MODE, seed=SEED, size=SIZE)
    def create_exclusively(self, user: str, path: Name, mode: int, seed: int, size: int) -> None:
        self.both(user, "create", path, os.O_EXCL, mode, seed, size)

    @rule(user=USER, path=FILE, offset=OFFSET, seed=SEED, size=SIZE)
    def write_at(self, user: str, path: Name, offset: int, seed: int, size: int) -> None:
        self.both(user, "write_at", path, offset, seed, size)

    @rule(user=USER, path=PATH, seed=SEED, size=SIZE)
    def append(self, user: str, path: Name, seed: int, size: int) -> None:
        self.both(user, "append", path, seed, size)

    @rule(user=USER, path=PATH, size=st.one_of(SIZE, OFFSET))
    def truncate(self, user: str, path: Name, size: int) -> None:
        self.both(user, "truncate", path, size)

    @rule(user=USER, path=PATH)
    def read(self, user: str, path: Name) -> None:
        self.both(user, "read", path)

    @rule(user=USER, path=FILE, offset=OFFSET, size=SIZE)
    def read_at(self, user: str, path: Name, offset: int, size: int) -> None:
        self.both(user, "read_at", path, offset, size)

    @rule(user=USER, path=FILE, offset=OFFSET, sizes=st.lists(SIZE, min_size=1, max_size=3))
    def read_into_many_buffers(self, user: str, path: Name, offset: int, sizes: list[int]) -> None:
        self.both(user, "read_into", path, offset, sizes)

    @rule(user=USER, path=FILE, seed=SEED, size=SIZE)
    def replace(self, user: str, path: Name, seed: int, size: int) -> None:
        self.both(user, "replace", path, seed, size)

    @rule(
        user=USER,
        path=FILE,
        offset=OFFSET,
        seed=SEED,
        size=SIZE,
        how=st.sampled_from(["shared", "flushed", "private"]),
    )
    def write_through_a_map(
        self, user: str, path: Name, offset: int, seed: int, size: int, how: str
    ) -> None:
        self.both(user, "map_and_write", path, offset, seed, size, how)

    @rule(user=USER, path=FILE)
    def read_through_a_map(self, user: str, path: Name) -> None:
        self.both(user, "map_and_read", path)

    @rule(user=USER, path=FILE, mode=ALLOCATION, offset=OFFSET, size=SIZE)
    def allocate(self, user: str, path: Name, mode: int, offset: int, size: int) -> None:
        if not self.lacks("fallocate"):
            self.both(user, "allocate", path, mode, offset, size)

    @rule(
        user=USER,
        path=FILE,
        to=FILE,
        offsets=st.tuples(OFFSET, OFFSET),
        size=SIZE,
        how=st.sampled_from(["sendfile", "copy_file_range"]),
    )
    def copy_a_range(
        self, user: str, path: Name, to: Name, offsets: tuple[int, int], size: int, how: str
    ) -> None:
        self.both(user, "copy_range", path, to, *offsets, size, how)

    @rule(user=USER, path=FILE, offset=OFFSET)
    def seek_data_and_holes(self, user: str, path: Name, offset: int) -> None:
        self.both(user, "seek", path, offset)

    # ------------------------------------------------------------------ names

    @rule(user=USER, path=PATH, to=TARGET)
    def rename(self, user: str, path: Name, to: Name) -> None:
        self.both(user, "rename", path, to)

    @rule(user=USER, path=DIRECTORY, to=TARGET)
    def rename_a_directory(self, user: str, path: Name, to: Name) -> None:
        self.both(user, "rename", path, to)

    @rule(user=USER, path=PATH, to=TARGET)
    def rename_without_replacing(self, user: str, path: Name, to: Name) -> None:
        if not self.lacks("renameat2"):
            self.both(user, "rename_with", path, to, RENAME_NOREPLACE)

    @rule(user=USER, path=PATH, to=PATH)
    def exchange(self, user: str, path: Name, to: Name) -> None:
        if not (self.lacks("renameat2") or self.lacks("exchange")):
            self.both(user, "rename_with", path, to, RENAME_EXCHANGE)

    @rule(user=USER, path=PATH, to=TARGET, follow=st.booleans())
    def link(self, user: str, path: Name, to: Name, follow: bool) -> None:
        self.both(user, "link", path, to, follow=follow)

    @rule(user=USER, leads_to=st.sampled_from(["../tex", "a", "scene.usd", "."]), path=TARGET)
    def symlink(self, user: str, leads_to: str, path: Name) -> None:
        self.both(user, "symlink", leads_to, path)

    @rule(user=USER, path=PATH)
    def readlink(self, user: str, path: Name) -> None:
        self.both(user, "readlink", path)

    @rule(user=USER, path=PATH)
    def unlink(self, user: str, path: Name) -> None:
        self.both(user, "unlink", path)

    @rule(user=USER, path=PATH)
    def rmdir(self, user: str, path: Name) -> None:
        self.both(user, "rmdir", path)

    @rule(user=USER, path=TARGET, mode=DIRECTORY_MODE)
    def mkdir(self, user: str, path: Name, mode: int) -> None:
        self.both(user, "mkdir", path, mode)

    @rule(
        user=USER,
        path=TARGET,
        kind=st.sampled_from([stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK]),
        mode=MODE,
    )
    def make_node(self, user: str, path: Name, kind: int, mode: int) -> None:
        self.both(user, "make_node", path, kind, mode)

    @rule(user=USER, path=st.sampled_from([*NEW, "tex/deep", "geo", "pub/sticky"]))
    def remove_a_tree(self, user: str, path: Name) -> None:
        self.both(user, "remove_tree", path)

    # ------------------------------------------------------------------ attributes

    @rule(user=USER, path=PATH, follow=st.booleans())
    def stat(self, user: str, path: Name, follow: bool) -> None:
        self.both(user, "stat", path, follow=follow)

    @rule(user=USER, path=PATH, mode=st.integers(0, 7), effective=st.booleans())
    def access(self, user: str, path: Name, mode: int, effective: bool) -> None:
        self.both(user, "access", path, mode, effective=effective)

    @rule(user=USER, path=FILE, mode=MODE)
    def chmod(self, user: str, path: Name, mode: int) -> None:
        self.both(user, "chmod", path, mode)

    @rule(user=USER, path=DIRECTORY, mode=DIRECTORY_MODE)
    def chmod_a_directory(self, user: str, path: Name, mode: int) -> None:
        self.both(user, "chmod", path, mode)

    @rule(user=USER, path=PATH, uid=OWNER, gid=OWNING_GROUP, follow=st.booleans())
    def chown(self, user: str, path: Name, uid: int, gid: int, follow: bool) -> None:
        if (uid, gid) == (-1, -1) and self.lacks("chown to nobody"):
            return
        self.both(user, "chown", path, uid, gid, follow=follow)

    @rule(user=USER, path=PATH, times=st.tuples(MOMENT, MOMENT), follow=st.booleans())
    def utime(self, user: str, path: Name, times: tuple[int, int], follow: bool) -> None:
        self.both(user, "utime", path, times, follow=follow)

    @rule(
        user=USER,
        path=PATH,
        name=XATTR,
        value=st.sampled_from([b"", b"x", b"\0" * 100]),
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
        follow=st.booleans(),
    )
    def set_xattr(
        self, user: str, path: Name, name: str, value: bytes, flags: int, follow: bool
    ) -> None:
        self.both(user, "set_xattr", path, name, value, flags, follow=follow)

    @rule(user=USER, path=PATH, name=XATTR, follow=st.booleans())
    def get_xattr(self, user: str, path: Name, name: str, follow: bool) -> None:
        self.both(user, "get_xattr", path, name, follow=follow)

    @rule(user=USER, path=PATH, name=XATTR, follow=st.booleans())
    def remove_xattr(self, user: str, path: Name, name: str, follow: bool) -> None:
        self.both(user, "remove_xattr", path, name, follow=follow)

    @rule(user=USER, path=PATH)
    def list_xattrs(self, user: str, path: Name) -> None:
        self.both(user, "list_xattrs", path)

    @rule(user=USER, path=PATH)
    def limits(self, user: str, path: Name) -> None:
        self.both(user, "limits", path)

    @rule(user=USER, mask=st.sampled_from([0, 0o002, 0o022, 0o077, 0o777]))
    def umask(self, user: str, mask: int) -> None:
        self.both(user, "umask", mask)

    # ------------------------------------------------------------------ directories

    @rule(user=USER, path=PATH)
    def list_a_directory(self, user: str, path: Name) -> None:
        self.both(user, "listing", path)

    @rule(user=USER, path=DIRECTORY)
    def scan_a_directory(self, user: str, path: Name) -> None:
        self.both(user, "scan", path)

    @rule(user=USER, path=DIRECTORY)
    def walk(self, user: str, path: Name) -> None:
        self.both(user, "walk", path)

    @rule()
    def look_at_everything(self) -> None:
        self.both("root", "tree")

    # ------------------------------------------------------------------ what is open

    def opened(self, user: str, what: str, *arguments: object) -> "MultipleResults[Any] | Any":
        self.numbers += 1
        kind, answer = self.both(user, what, self.numbers, *arguments)
        return (user, self.numbers), isinstance(answer, tuple) and str(answer[0])[0], kind == "is"

    @rule(target=files, user=USER, path=FILE, flags=OPENING, mode=MODE)
    def open_a_file(self, user: str, path: Name, flags: int, mode: int) -> Any:
        handle, kind, done = self.opened(user, "open", path, flags, mode)
        if done and kind == "d":
            self.both(user, "close", handle[1])
        return handle if done and kind != "d" else multiple()

    @rule(target=folders, user=USER, path=DIRECTORY)
    def open_a_directory(self, user: str, path: Name) -> Any:
        handle, _, done = self.opened(user, "open", path, os.O_RDONLY | os.O_DIRECTORY, 0)
        return handle if done else multiple()

    @rule(target=files, above=folders, path=st.sampled_from(["a", "new", "wood.tx", ".."]))
    def open_below(self, above: tuple[str, int], path: Name) -> Any:
        handle, kind, done = self.opened(above[0], "open_below", above[1], path, os.O_RDONLY)
        if done and kind == "d":
            self.both(above[0], "close", handle[1])
        return handle if done and kind != "d" else multiple()

    @rule(target=files, user=USER, path=DIRECTORY)
    def open_without_a_name(self, user: str, path: Name) -> Any:
        if self.lacks("O_TMPFILE"):
            return multiple()
        handle, _, done = self.opened(user, "open_nameless", path)
        return handle if done else multiple()

    @rule(handle=files, path=TARGET)
    def give_a_name(self, handle: tuple[str, int], path: Name) -> None:
        if not self.lacks("O_TMPFILE"):
            self.both(handle[0], "name", handle[1], path)

    @rule(target=files, handle=files)
    def duplicate(self, handle: tuple[str, int]) -> Any:
        self.numbers += 1
        self.both(handle[0], "duplicate", self.numbers, handle[1])
        return handle[0], self.numbers

    @rule(handle=st.one_of(consumes(files), consumes(folders)))
    def close(self, handle: tuple[str, int]) -> None:
        self.both(handle[0], "close", handle[1])

    @rule(handle=files, size=SIZE)
    def read_on(self, handle: tuple[str, int], size: int) -> None:
        self.both(handle[0], "read_on", handle[1], size)

    @rule(handle=files, seed=SEED, size=SIZE)
    def write_on(self, handle: tuple[str, int], seed: int, size: int) -> None:
        self.both(handle[0], "write_on", handle[1], seed, size)

    @rule(handle=files, offset=st.sampled_from([0, 1, -1, 5000, 1 << 20]), whence=st.integers(0, 2))
    def move_to(self, handle: tuple[str, int], offset: int, whence: int) -> None:
        self.both(handle[0], "move_to", handle[1], offset, whence)

    @rule(handle=files, offset=OFFSET, size=SIZE)
    def read_open_at(self, handle: tuple[str, int], offset: int, size: int) -> None:
        self.both(handle[0], "read_open_at", handle[1], offset, size)

    @rule(handle=files, offset=OFFSET, seed=SEED, size=SIZE)
    def write_open_at(self, handle: tuple[str, int], offset: int, seed: int, size: int) -> None:
        self.both(handle[0], "write_open_at", handle[1], offset, seed, size)

    @rule(handle=files, size=st.one_of(SIZE, OFFSET))
    def truncate_open(self, handle: tuple[str, int], size: int) -> None:
        self.both(handle[0], "truncate_open", handle[1], size)

    @rule(handle=st.one_of(files, folders))
    def stat_open(self, handle: tuple[str, int]) -> None:
        self.both(handle[0], "stat_open", handle[1])

    @rule(handle=folders)
    def list_open(self, handle: tuple[str, int]) -> None:
        self.both(handle[0], "list_open", handle[1])

    @rule(handle=files, mode=MODE, uid=OWNER, gid=OWNING_GROUP)
    def change_open(self, handle: tuple[str, int], mode: int, uid: int, gid: int) -> None:
        if (uid, gid) == (-1, -1) and self.lacks("chown to nobody"):
            return
        self.both(handle[0], "change_open", handle[1], mode, uid, gid)

    @rule(handle=st.one_of(files, folders), ns=MOMENT.filter(lambda ns: ns >= 0))
    def utime_open(self, handle: tuple[str, int], ns: int) -> None:
        self.both(handle[0], "utime_open", handle[1], ns)

    @rule(handle=st.one_of(files, folders), name=XATTR, value=st.sampled_from([b"", b"open"]))
    def xattr_open(self, handle: tuple[str, int], name: str, value: bytes) -> None:
        self.both(handle[0], "xattr_open", handle[1], name, value)

    @rule(handle=st.one_of(files, folders), data_only=st.booleans())
    def sync(self, handle: tuple[str, int], data_only: bool) -> None:
        self.both(handle[0], "sync", handle[1], data_only=data_only)

    @rule(
        handle=files,
        held=st.sampled_from(["read", "write", "write", "none"]),
        start=st.sampled_from([0, 5]),
        length=st.sampled_from([0, 1, 10]),
    )
    def lock_a_range(self, handle: tuple[str, int], held: str, start: int, length: int) -> None:
        self.both(handle[0], "lock_range", handle[1], held, start, length)

    @rule(handle=files, held=st.sampled_from(["read", "write"]), start=st.sampled_from([0, 5]))
    def ask_who_holds_a_range(self, handle: tuple[str, int], held: str, start: int) -> None:
        self.both(handle[0], "lock_holder", handle[1], held, start, 10)

    @rule(handle=files, how=st.sampled_from([LOCK_SH, LOCK_EX, LOCK_EX, LOCK_UN]))
    def lock(self, handle: tuple[str, int], how: int) -> None:
        self.both(handle[0], "lock", handle[1], how)

    def teardown(self) -> None:
        if hasattr(self, "mounted"):
            self.twins.end(self.mounted, self.both("root", "tree")[1])


@pytest.fixture
def transport(stack: Stack) -> str:
    return stack.transport


@contextmanager
def twins_of(mounter: Mounter, stack: Stack) -> Iterator[Twins]:
    with closing(Twins(mounter, stack)) as twins:
        yield twins


def run(twins: Twins, *, examples: int, steps: int, shrinks: bool) -> None:
    run_state_machine_as_test(
        # It says that it wants a class, and calls it.
        cast("type[TwinMachine]", partial(TwinMachine, twins)),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            # The same examples each time: what a gate finds must not depend on its luck.
            derandomize=True,
            # Shrinking takes minutes; a test that is ended meanwhile tells nothing.
            phases=[Phase.generate, Phase.shrink] if shrinks else [Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    twins.check_again()


def test_programs_find_in_a_mount_what_they_find_on_a_disk(mounter: Mounter, stack: Stack) -> None:
    with twins_of(mounter, stack) as twins:
        run(twins, examples=12, steps=30, shrinks=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_programs_find_in_a_mount_what_they_find_on_a_disk_for_long(
    mounter: Mounter, stack: Stack
) -> None:
    with twins_of(mounter, stack) as twins:
        run(twins, examples=300, steps=100, shrinks=True)
