"""Nodes of an overlay: a server's successor goes on with them as the kernel knows them."""

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import pytest
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

from agent_plugin.content.store import Cancellation
from tests.mount.mortal_server import KilledError, mortal_server
from tests.mount.overlay_rig import US, OverlayRig, seen_by_overlay
from vfs.nodes import Changes
from vfs.overlay import Overlay
from vfs.tree import ROOT

FILES: Final[dict[str | bytes, bytes | int]] = {
    "d/x": b"input x",
    "d/s/y": b"yy",
    "d/s/z": b"zz",
    "e/q": b"e",
    "f": b"ff",
    "em": b"",
}
# What most often does something, more often.
OF_NAMES: Final = ("make", "mkdir", "unlink", "unlink", "rmdir", "rename", "rename", "link")
MAKING: Final = ("make", "mkdir", "symlink")
OF_FILES: Final = ("write", "truncate", "chmod")
# Always the same walks, so that a failure is of the change at hand; larger ones differ each time.
GATE: Final = settings(
    derandomize=True, database=None, deadline=None, max_examples=30, stateful_step_count=30
)
# More changes than any request takes.
MANY: Final = 1_000_000
LARGER: Final = settings(deadline=None, max_examples=300, stateful_step_count=60, print_blob=True)

names = st.sampled_from([b"a", b"d", b"e", b"em", b"f", b"s", b"x", b"y"])
# Which of the names, directories, or open files that there are then.
places = st.integers(min_value=0, max_value=23)
numbers = st.integers(min_value=0, max_value=4)
# After which of its changes a server is killed, of those that a request takes; None for never.
moments = st.one_of(st.none(), *[st.integers(min_value=0, max_value=11)] * 4)


class Request(NamedTuple):
    """What a kernel asks for, by the nodes that it knows.

    Attributes:
        kind: One of OF_NAMES, OF_FILES, and "symlink".
        directory, name: Where.
        to_directory, to_name: Where to, of "rename" and "link".
        node: What has the name; 0 for nothing.
        number: An offset; the choice of a size and of a mode.
    """

    kind: str
    directory: int
    name: bytes
    to_directory: int
    to_name: bytes
    node: int
    number: int


class Choice(NamedTuple):
    """What a request is made of: `at` and `to` are among what there is then."""

    at: int
    name: bytes
    to: int
    to_name: bytes
    number: int


choices = st.builds(Choice, places, names, places, names, numbers)


def carry_out(overlay: Overlay, request: Request, *, again: bool = False) -> int:
    """Do what is asked for; return the error's number, 0 for none."""
    kind, directory, name, to_directory, to_name, node, number = request
    try:
        if kind == "make":
            overlay.mknod(directory, name, stat.S_IFREG | _mode(number), US, again=again)
        elif kind == "mkdir":
            overlay.mkdir(directory, name, 0o755, US, again=again)
        elif kind == "symlink":
            overlay.symlink(directory, name, b"nowhere", US, again=again)
        elif kind == "unlink":
            overlay.unlink(directory, name, again=again)
        elif kind == "rmdir":
            overlay.rmdir(directory, name, again=again)
        elif kind == "rename":
            overlay.rename(directory, name, to_directory, to_name, again=again)
        elif kind == "link" and node:
            overlay.link(node, to_directory, to_name, again=again)
        elif node and stat.S_ISREG(overlay.attributes(node).mode):
            _change(overlay, kind, node, number)
    except OSError as error:
        return error.errno or -1
    return 0


def _change(overlay: Overlay, kind: str, node: int, number: int) -> None:
    if kind == "write":
        overlay.prepare(node, Cancellation())
        overlay.write(node, number, b"W%d" % number)
    elif kind == "truncate":
        size = _size(number)
        if size:
            overlay.prepare(node, Cancellation())
        overlay.setattr(node, Changes(size=size))
    else:
        overlay.setattr(node, Changes(mode=_mode(number)))


def _size(number: int) -> int:
    return 3 if number > 2 else 0


def _mode(number: int) -> int:
    return (0o600, 0o444, 0o644)[number % 3]


def nodes_of(overlay: Overlay) -> dict[str, int]:
    """Return all there is, by path; directories end with a slash, and the root is the first."""
    found = {"": ROOT}
    pending = [""]
    while pending:
        above = pending.pop()
        for _, name, node in overlay.listing(found[above]):
            path = f"{above}{os.fsdecode(name)}"
            if stat.S_ISDIR(overlay.attributes(node).mode):
                path += "/"
                pending.append(path)
            found[path] = node
    return found


def touch_all(rig: OverlayRig) -> None:
    """Have a mount before this one have brought in all files."""
    for path, node in nodes_of(rig.overlay).items():
        if path and not path.endswith("/"):
            rig.overlay.setattr(node, Changes(mode=0o640))
    rig.mount_again()


def asked(rig: OverlayRig, kind: str, choice: Choice) -> Request:
    """Return a request: about a name that is there, or that one may be given."""
    overlay = rig.overlay
    nodes = nodes_of(overlay)
    directories = sorted(path for path in nodes if not path or path.endswith("/"))
    above, name = directories[choice.at % len(directories)], choice.name
    there = sorted(path for path in nodes if path)
    if kind != "rename":
        there = [path for path in there if path.endswith("/") == (kind == "rmdir")]
    if there and kind not in MAKING:
        above, _, last = there[choice.at % len(there)].rstrip("/").rpartition("/")
        name = os.fsencode(last)
    directory = rig.find(above)
    to_directory = nodes[directories[choice.to % len(directories)]]
    node = overlay.lookup(directory, name) or 0
    return Request(kind, directory, name, to_directory, choice.to_name, node, choice.number)


class ResentMachine(RuleBasedStateMachine):
    """A server that is killed at any change, and asked again, against one that is never killed.

    What it is asked again names the nodes that the kernel knew before.

    Seen to catch, each alone: a name that is there is refused to a request that comes again; a name
    that is gone is.
    """

    @initialize(privileged=st.booleans(), is_touched=st.booleans())
    def begin(self, privileged: bool, is_touched: bool) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.rigs: list[OverlayRig] = []
        for name in ("killed", "twin"):
            (self.home / name).mkdir()
            rig = OverlayRig(self.home / name, FILES, privileged=privileged)
            self.rigs.append(rig)
            if is_touched:
                touch_all(rig)

    def teardown(self) -> None:
        if hasattr(self, "home"):
            for rig in self.rigs:
                rig.close()
            shutil.rmtree(self.home)

    @rule(kind=st.sampled_from((*OF_NAMES, "symlink", *OF_FILES)), choice=choices, kill=moments)
    def ask(self, kind: str, choice: Choice, kill: int | None) -> None:
        killed, twin = self.rigs
        with mortal_server(MANY) as counted:
            refused = carry_out(twin.overlay, asked(twin, kind, choice))
        changes = MANY - counted.lives
        request = asked(killed, kind, choice)
        told = 0
        with (
            mortal_server(MANY if kill is None else kill % (changes + 1)) as mortal,
            suppress(KilledError),
        ):
            told = carry_out(killed.overlay, request)
        # With none left it was killed before it could answer.
        if mortal.lives < 0 or (mortal.lives == 0 and not refused):
            killed.restart()
            told = carry_out(killed.overlay, request, again=True)
        assert told == refused

    @rule(mounts=st.booleans())
    def serve(self, mounts: bool) -> None:
        """Have a killed server's successor, or another mount's servers."""
        if mounts:
            for rig in self.rigs:
                rig.mount_again()
        else:
            self.rigs[0].restart()

    @invariant()
    def looks_the_same(self) -> None:
        if hasattr(self, "rigs"):
            killed, twin = map(seen_by_overlay, self.rigs)
            assert killed == twin


class HeldNodesMachine(RuleBasedStateMachine):
    """Files that are held open, whatever becomes of their names and of their server.

    Whatever has a name is the same node in a killed server's successor.

    Seen to catch, each alone: a file gets content of its own and no mark of its node; the successor
    does not know which input it was that lies there as gone; it does not know which inputs were
    removed; what is held is destroyed with its last name.
    """

    @initialize(privileged=st.booleans(), is_touched=st.booleans())
    def begin(self, privileged: bool, is_touched: bool) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.rig = OverlayRig(self.home, FILES, privileged=privileged)
        if is_touched:
            touch_all(self.rig)
        # By node: what its content and its mode have to be.
        self.held: dict[int, tuple[bytes, int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()
            shutil.rmtree(self.home)

    @rule(kind=st.sampled_from(OF_NAMES), choice=choices)
    def ask(self, kind: str, choice: Choice) -> None:
        carry_out(self.rig.overlay, asked(self.rig, kind, choice))

    @rule(kind=st.sampled_from(OF_FILES), at=places, number=numbers, is_held=st.booleans())
    def change(self, kind: str, at: int, number: int, is_held: bool) -> None:
        nodes = list(self.held) if is_held else [node for _, node in self._files()]
        if nodes:
            self._change(kind, nodes[at % len(nodes)], number)

    @rule(at=places, is_removed=st.booleans())
    def hold(self, at: int, is_removed: bool) -> None:
        """Open a file; what is temporary is removed at once."""
        overlay = self.rig.overlay
        found = [(path, node) for path, node in self._files() if node not in self.held]
        if found:
            path, node = found[at % len(found)]
            overlay.hold(node)
            self.held[node] = self.rig.read(node), stat.S_IMODE(overlay.attributes(node).mode)
            if is_removed:
                above, _, name = path.rpartition("/")
                overlay.unlink(self.rig.find(above), name.encode())

    @precondition(lambda self: self.held)
    @rule(at=places)
    def let_go(self, at: int) -> None:
        node = list(self.held)[at % len(self.held)]
        del self.held[node]
        self.rig.overlay.forget(node)

    @rule(mounts=st.sampled_from([False, False, False, True]))
    def serve(self, mounts: bool) -> None:
        """Have a killed server's successor, or another mount's server."""
        seen, nodes = seen_by_overlay(self.rig), nodes_of(self.rig.overlay)
        if mounts:
            self.held.clear()
            self.rig.mount_again()
            assert list(self.rig.work.iterdir()) == []
        else:
            self.rig.restart()
            assert nodes_of(self.rig.overlay) == nodes
        assert seen_by_overlay(self.rig) == seen

    @invariant()
    def is_what_it_was(self) -> None:
        if not hasattr(self, "rig"):
            return
        named = list(nodes_of(self.rig.overlay).values())
        for node, (content, mode) in self.held.items():
            attributes = self.rig.overlay.attributes(node)
            assert (self.rig.read(node), stat.S_IMODE(attributes.mode)) == (content, mode)
            assert attributes.nlink == named.count(node)

    # ------------------------------------------------------------------ how

    def _files(self) -> list[tuple[str, int]]:
        overlay = self.rig.overlay
        found = sorted(nodes_of(overlay).items())
        return [each for each in found if stat.S_ISREG(overlay.attributes(each[1]).mode)]

    def _change(self, kind: str, node: int, number: int) -> None:
        _change(self.rig.overlay, kind, node, number)
        if node not in self.held:
            return
        content, mode = self.held[node]
        if kind == "write":
            written = b"W%d" % number
            before = content[:number].ljust(number, b"\0")
            content = before + written + content[number + len(written) :]
        elif kind == "truncate":
            content = content[: _size(number)].ljust(_size(number), b"\0")
        else:
            mode = _mode(number)
        self.held[node] = content, mode


def test_what_is_asked_again_of_a_successor_is_done_once() -> None:
    run_state_machine_as_test(ResentMachine, settings=GATE)


def test_what_is_held_open_stays_what_it_is_whoever_serves_it() -> None:
    run_state_machine_as_test(HeldNodesMachine, settings=GATE)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [ResentMachine, HeldNodesMachine])
def test_nodes_stay_what_they_are_for_long(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=LARGER)
