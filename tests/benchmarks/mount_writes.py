"""Writing through mounts that take writes, each time against ext4 right before and after."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from tests.benchmarks.datasets import KIB, MIB
from tests.benchmarks.farm import Farm
from tests.benchmarks.file_client import FileClient, Operation
from tests.benchmarks.mount_stacks import View
from tests.benchmarks.rounds import ratio_line, sandwich

ROUNDS = 5
# Below what makes the kernel write back at once: a tenth of the memory, or of 20 GiB.
LONG_BYTES = 256 * MIB
NEW_FILES, NEW_BYTES = 5000, 16 * KIB

WRITE = Operation("write", (str(LONG_BYTES),), touch_mib=2 * LONG_BYTES // MIB)
CREATE = Operation("create", (str(NEW_FILES), str(NEW_BYTES)), touch_mib=256)


class Writing:
    """One way of mounting that takes writes, measured.

    Args:
        peer: Its name.
        mounting: Does it.
        client: Writes.
        farm: The scratch directory.
    """

    def __init__(
        self,
        peer: str,
        mounting: Callable[[], AbstractContextManager[View]],
        client: FileClient,
        farm: Farm,
    ) -> None:
        self._peer = peer
        self._mounting = mounting
        self._client = client
        self._farm = farm
        self._numbers = itertools.count()

    def lines(self) -> Iterator[dict[str, object]]:
        """Yield what a long file and many small ones give."""
        native = self._farm.fresh("native")
        native.mkdir()
        with self._mounting() as view:
            yield self._line("write 256 MiB", self._long, native, view.root)
            yield self._line("create 5,000 x 16 KiB", self._many, native, view.root)

    def _line(
        self, bench: str, write: Callable[[Path], float], native: Path, mounted: Path
    ) -> dict[str, object]:
        measured = sandwich(lambda: write(native), lambda: write(mounted), rounds=ROUNDS)
        return ratio_line(f"mount: {bench}", self._peer, measured, reference="native")

    def _long(self, below: Path) -> float:
        path = below / f"{next(self._numbers)}.bin"
        seconds = self._client.seconds(WRITE, path, moved=LONG_BYTES)
        path.unlink()
        return seconds

    def _many(self, below: Path) -> float:
        # They stay until the end: ext4 would look past those that were removed (farm.py, remove).
        directory = below / f"{next(self._numbers)}"
        directory.mkdir()
        os.sync()
        return self._client.seconds(CREATE, directory, moved=NEW_FILES)
