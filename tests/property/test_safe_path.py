"""Whatever links somebody plants, a Root reads and makes nothing outside its directory.

The model is the tree of real directories and files inside the root. Links point anywhere: inside,
outside, at each other, up. Mutations seen to fail here: opening directories, or files, without
O_NOFOLLOW; accepting `..` in a path.
"""

import itertools
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from agent_plugin.content.errors import (
    LocalReadError,
    LocalWriteError,
    PathClashError,
    UnsafePathError,
)
from agent_plugin.content.safe_path import Root
from agent_plugin.content.snapshot import walk

NAMES = ["a", "b", "file"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=2).map("/".join)
# All that are tried after each step, which hypothesis is not left to find.
TRIED = [
    *NAMES,
    *("/".join(names) for names in itertools.product(NAMES, repeat=2)),
    *("a/a/file", "a/b/file", "b/a/file", "b/b/file"),
    *("..", "../file", "a/../file", "a/../../file", "/etc/passwd", "", "."),
]
# Where links lead; {top} is the directory above the root, full of what must not be touched.
TARGETS = st.sampled_from(
    [
        *(".", "a", "b", "file", "a/file", "b/file"),
        *("..", "../..", "../a", "../b", "../file", "../../file", "../root-too/file"),
        *("{top}", "{top}/a", "{top}/file", "{top}/root-too", "{top}/root-too/file"),
        *("{top}/root", "{top}/root/a", "{top}/root/a/file", "nowhere", "../nowhere"),
    ]
)
INSIDE, OUTSIDE = b"inside", b"outside"


class PlantedLinks(RuleBasedStateMachine):
    """Rules are what a hostile job does to the directory, and what we then do with it."""

    @initialize()
    def begin(self) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="planted-links-"))
        self.directory = self.top / "root"
        self.directory.mkdir()
        for outside in (self.top, self.top / "root-too", self.top / "a"):
            outside.mkdir(exist_ok=True)
            (outside / "file").write_bytes(OUTSIDE)
        self.outside = self.survey()
        self.root = Root(self.directory, max_directories=2)

    def survey(self) -> dict[str, int]:
        """Return all that is outside the root, with its time of last change."""
        found = {}
        for above, directories, files in os.walk(self.top):
            if Path(above) == self.top:
                directories.remove("root")
            for name in [*directories, *files]:
                path = Path(above, name)
                found[str(path)] = path.lstat().st_mtime_ns
        return found

    def clear(self, path: Path) -> bool:
        """Make room for something at a path; False when its parent is no directory."""
        if not path.parent.is_dir():
            return False
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        return True

    def inside(self, path: str) -> Path | None:
        """Return where a path is on disk if no link is on the way there."""
        above = (self.directory / path).parent
        return self.directory / path if os.path.realpath(above) == str(above) else None

    @rule(path=PATHS)
    def somebody_writes_a_file(self, path: str) -> None:
        place = self.inside(path)
        if place is not None and self.clear(place):
            place.write_bytes(INSIDE)

    @rule(path=PATHS)
    def somebody_makes_a_directory(self, path: str) -> None:
        place = self.inside(path)
        if place is not None and self.clear(place):
            place.mkdir()

    @rule(path=PATHS, leads_to=TARGETS)
    def somebody_plants_a_link(self, path: str, leads_to: str) -> None:
        place = self.inside(path)
        if place is not None and self.clear(place):
            place.symlink_to(leads_to.format(top=self.top))

    @rule(path=PATHS, other=PATHS)
    def somebody_moves_something_over_another(self, path: str, other: str) -> None:
        first, second = self.inside(path), self.inside(other)
        if first is None or second is None or not (os.path.lexists(first) and first != second):
            return
        nested = first.is_relative_to(second) or second.is_relative_to(first)
        if not nested and self.clear(second):
            first.rename(second)

    @invariant()
    def we_read_what_is_a_file_inside_and_nothing_else(self) -> None:
        with Root(self.directory) as root:
            readable = [path for path in TRIED if self.read(root, path) is not None]
        assert readable == [path for path in TRIED if self.is_file_inside(path)]

    @rule()
    def we_read_through_directories_opened_before(self) -> None:
        for path in TRIED:
            self.read(self.root, path)

    def read(self, root: Root, path: str) -> bytes | None:
        try:
            fd = root.open_file(path)
        except (FileNotFoundError, UnsafePathError, LocalReadError):
            return None
        with os.fdopen(fd, "rb") as file:
            data = file.read()
        assert data == INSIDE
        return data

    def is_file_inside(self, path: str) -> bool:
        """Whether the kernel finds a file there, inside, and the path is one that we allow."""
        if ".." in path.split("/") or path.startswith("/"):
            return False
        real = os.path.realpath(self.directory / path)
        return Path(real).is_relative_to(self.directory) and os.path.isfile(real)  # noqa: PTH113

    @rule(path=st.sampled_from(TRIED), create=st.booleans(), fresh=st.booleans())
    def we_use_a_directory(self, path: str, create: bool, fresh: bool) -> None:
        with ExitStack() as stack:
            root = stack.enter_context(Root(self.directory)) if fresh else self.root
            try:
                fd = stack.enter_context(root.holding(path, create=create))
                os.close(os.open("written", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
                os.unlink("written", dir_fd=fd)
            except (FileNotFoundError, UnsafePathError, PathClashError, LocalWriteError):
                return
            place = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - as the kernel says it
        assert Path(place).is_relative_to(self.directory)

    @rule()
    def we_walk(self) -> None:
        for found in walk(self.directory):
            assert found.size == len(INSIDE)

    @invariant()
    def nothing_outside_has_changed(self) -> None:
        assert self.survey() == self.outside

    def teardown(self) -> None:
        if hasattr(self, "root"):
            self.root.close()
            shutil.rmtree(self.top)


@pytest.mark.expected_events("file.skipped")
def test_nothing_outside_the_root_is_read_or_changed() -> None:
    run_state_machine_as_test(PlantedLinks, settings=settings(stateful_step_count=20))
