"""Who reads and writes on a mount without end, each in a process of its own, and checks each byte.

`python mount_load.py ROOT reader|mapper|writer SEED`, with {path: sha256} as a line of JSON; ends
when stdin does, and prints what it did. A mapper reads through memory maps. Needs the standard
library alone, so it starts in no time.
"""

import hashlib
import json
import mmap
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# How long a process may go on that was told to stop: it finishes what it is about.
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Done:
    """What a process did.

    Attributes:
        rounds: Files read or written, each whole.
        wrong: What was not as it should be, in words.
        longest: The longest round, in seconds.
    """

    rounds: int
    wrong: list[str]
    longest: float


class Load:
    """Readers and writers, that run until they are stopped.

    Args:
        root: Of the mount.
        facts: By relative path the SHA-256 of what readers find; nobody may change those.
        readers, mappers, writers: How many; writers make files of their own, and change no input.
    """

    def __init__(
        self,
        root: Path,
        facts: Mapping[str, str],
        *,
        readers: int = 2,
        mappers: int = 1,
        writers: int = 0,
    ) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        for number, what in enumerate(
            ["reader"] * readers + ["mapper"] * mappers + ["writer"] * writers
        ):
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", __file__, root, what, str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps(facts).encode() + b"\n")
            process.stdin.flush()
            self._processes.append(process)

    def stop(self) -> list[Done]:
        """Have all of them finish, and return what they did.

        Raises:
            AssertionError: One of them hangs or has crashed.
        """
        found = []
        try:
            for process in self._processes:
                try:
                    told, errors = process.communicate(timeout=_STOP_SECONDS)
                except subprocess.TimeoutExpired as error:
                    raise AssertionError("a reader or writer hangs") from error
                assert process.returncode == 0, errors.decode()
                found.append(Done(**json.loads(told)))
        finally:
            self.kill()
        return found

    def kill(self) -> None:
        """End all of them, whatever they are about."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()


class _Worker:
    def __init__(self, root: str, facts: Mapping[str, str], seed: str) -> None:
        self.root = root
        self.facts = facts
        self.seed = seed
        self.chance = random.Random(seed)
        self.paths = sorted(facts)
        self.rounds = 0
        self.wrong: list[str] = []
        self.longest = 0.0

    def run(self, what: str) -> dict[str, Any]:
        one_round = {
            "reader": self.read,
            "mapper": lambda: self.read(mapped=True),
            "writer": self.write,
        }[what]
        while not select.select([sys.stdin], [], [], 0)[0]:
            begun = time.monotonic()
            try:
                one_round()
            except OSError as error:
                self.wrong.append(f"{error!r} {error.filename}")
                # A mount that is gone gives thousands a second.
                time.sleep(0.01)
            self.longest = max(self.longest, time.monotonic() - begun)
            self.rounds += 1
        return {"rounds": self.rounds, "wrong": self.wrong[:20], "longest": self.longest}

    def read(self, *, mapped: bool = False) -> None:
        path = self.chance.choice(self.paths)
        fd = os.open(os.path.join(self.root, path), os.O_RDONLY)  # noqa: PTH118 - no import of more
        try:
            size = os.fstat(fd).st_size
            if mapped and size:
                with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages:
                    found = hashlib.sha256(pages).hexdigest()
            else:
                digest = hashlib.sha256()
                while piece := os.read(fd, 1 << 17):
                    digest.update(piece)
                found = digest.hexdigest()
            # So that the next one asks the server again.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        if found != self.facts[path]:
            self.wrong.append(f"wrong bytes: {path}")

    def write(self) -> None:
        directory = os.path.join(self.root, f"written-{self.seed}")  # noqa: PTH118 - as above
        os.makedirs(directory, exist_ok=True)  # noqa: PTH103 - as above
        path = f"{directory}/{self.chance.randrange(10)}"
        data = self.chance.randbytes(self.chance.randrange(1, 200_000))
        with open(f"{path}.new", "wb") as file:  # noqa: PTH123 - as above
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)  # noqa: PTH105 - as above
        with open(path, "rb") as file:  # noqa: PTH123 - as above
            if file.read() != data:
                self.wrong.append(f"wrong bytes: {path}")


if __name__ == "__main__":
    worker = _Worker(sys.argv[1], json.loads(sys.stdin.readline()), sys.argv[3])
    json.dump(worker.run(sys.argv[2]), sys.stdout)
