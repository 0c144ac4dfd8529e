"""Reading through mounts, each time against ext4 right before or after, on the same files."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.datasets import KIB, MIB
from tests.benchmarks.farm import Farm
from tests.benchmarks.file_client import FileClient, Operation
from tests.benchmarks.mount_stacks import MountHost, Tree, View
from tests.benchmarks.rounds import ratio_line, sandwich

ROUNDS = 5
# Above 64 MiB, where a blob may be read before all of it was verified.
LONG_BYTES = 512 * MIB
PART_BYTES, PARTS = 64 * MIB, 8
SMALL_BYTES, SMALL_FILES = 16 * KIB, 10_000
COLD_FILES = 4000
FIRST_FILES, FIRST_BYTES = 200, 4 * KIB
MANY_FILES = 100_000
RANDOM_READS = 200_000
# What a cold reading fills: the blob's pages, and the mount's own where it keeps a second copy.
TOUCH_MIB = 2 * LONG_BYTES // MIB + 128
TOUCH_FEW_MIB = 512

WARM = Operation("read", warm=True, times=4)
COLD = Operation("read", cold=True, touch_mib=TOUCH_MIB)
RANDOM = Operation("random", after=(str(RANDOM_READS),), warm=True)
MAP = Operation("map", warm=True, times=4)
SMALL = Operation("open", warm=True)
SMALL_COLD = Operation("open", cold=True, touch_mib=TOUCH_FEW_MIB)
FIRST = Operation("first", cold=True, touch_mib=TOUCH_FEW_MIB)
LIST = Operation("list", cold=True, touch_mib=TOUCH_FEW_MIB)

# Mounts a tree anew; what it yields is gone when the block ends.
Mounting = Callable[[Tree], AbstractContextManager[View]]
# The paths that an operation is given, of those of a view.
Choose = Callable[[View], list[Path]]


@dataclass(frozen=True, slots=True)
class Trees:
    """One long file and eight shorter ones, many small ones, and a tree of 100,000 names."""

    large: Tree
    small: Tree
    many: Tree


def make_trees(host: MountHost, many: Tree) -> Trees:
    """Fill the host's blob cache."""
    names = [f"part-{number}.bin" for number in range(PARTS)]
    large = [("long.bin", LONG_BYTES), *((name, PART_BYTES) for name in names)]
    small = [(f"{at // 100:04}/{at:06}.bin", SMALL_BYTES) for at in range(SMALL_FILES)]
    return Trees(host.cached_tree("large", large), host.cached_tree("small", small), many)


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        bench: What it is called.
        operation: What the client does.
        choose: With what.
        moved: What the client then has to say.
        anew: Mount for each time, so that the mount has never seen the files.
    """

    bench: str
    operation: Operation
    choose: Choose
    moved: int
    anew: bool = False


class Reading:
    """One way of mounting, measured.

    Args:
        peer: Its name.
        mounting: Does it.
        trees: What is read.
        client: Reads.
        farm: The scratch directory.
    """

    def __init__(
        self, peer: str, mounting: Mounting, trees: Trees, client: FileClient, farm: Farm
    ) -> None:
        self._peer = peer
        self._mounting = mounting
        self._trees = trees
        self._client = client
        self._farm = farm

    def large(self) -> Iterator[dict[str, object]]:
        """Yield what large files give, from memory and from the blob cache's disk."""
        yield from self._measure(
            self._trees.large,
            [
                Case("sequential, warm", WARM, _long, LONG_BYTES),
                Case("sequential, from disk", COLD, _long, LONG_BYTES),
                Case("sequential, from disk, mounted anew", COLD, _long, LONG_BYTES, anew=True),
                Case("random 4 KiB, warm", RANDOM, _long, RANDOM_READS),
                Case("mmap, warm", MAP, _long, LONG_BYTES),
                Case("8 readers, from disk", COLD, _parts, PARTS * PART_BYTES),
            ],
        )

    def small(self) -> Iterator[dict[str, object]]:
        """Yield what many small files give; the client opens, reads and closes each."""
        yield from self._measure(
            self._trees.small,
            [
                self._small_files("16 KiB files, warm", SMALL, SMALL_FILES),
                self._small_files("16 KiB files, from disk", SMALL_COLD, COLD_FILES),
                Case(
                    "first 4 KiB of 200 files, from disk, mounted anew",
                    FIRST,
                    self._listing(FIRST_FILES),
                    FIRST_FILES * FIRST_BYTES,
                    anew=True,
                ),
            ],
        )

    def names(self) -> Iterator[dict[str, object]]:
        """Yield what a recursive listing with all attributes gives."""
        case = Case("list 100,000 files, mounted anew", LIST, _root, MANY_FILES, anew=True)
        yield from self._measure(self._trees.many, [case])

    def _measure(self, tree: Tree, cases: Sequence[Case]) -> Iterator[dict[str, object]]:
        for case in cases:
            if case.anew:
                yield self._line(case, tree, functools.partial(self._mounted_anew, case, tree))
        kept = [case for case in cases if not case.anew]
        if not kept:
            return
        with self._mounting(tree) as view:
            for case in kept:
                # Whatever a mount does once for a file, such as verify it, is then over.
                self._run(dataclasses.replace(case, operation=case.operation.plain()), view)
                yield self._line(case, tree, functools.partial(self._run, case, view))

    def _line(self, case: Case, tree: Tree, mounted: Callable[[], float]) -> dict[str, object]:
        measured = sandwich(lambda: self._run(case, tree.native), mounted, rounds=ROUNDS)
        return ratio_line(f"mount: {case.bench}", self._peer, measured, reference="native")

    def _mounted_anew(self, case: Case, tree: Tree) -> float:
        with self._mounting(tree) as view:
            return self._run(case, view)

    def _run(self, case: Case, view: View) -> float:
        return self._client.seconds(case.operation, *case.choose(view), moved=case.moved)

    def _small_files(self, bench: str, operation: Operation, count: int) -> Case:
        return Case(bench, operation, self._listing(count), count * SMALL_BYTES)

    def _listing(self, count: int) -> Choose:
        return lambda view: [view.root, view.listed(self._farm.fresh("names"), count)]


def _long(view: View) -> list[Path]:
    return view.paths()[:1]


def _parts(view: View) -> list[Path]:
    return view.paths()[1:]


def _root(view: View) -> list[Path]:
    return [view.root]
