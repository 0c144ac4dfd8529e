"""The timed operations on files: a C program (file_client.c), compiled when it is needed."""

import dataclasses
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

SOURCE = Path(__file__).with_name("file_client.c")
# Far above anything measured, so that only a hang meets it.
RUN_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Operation:
    """What the client does; its arguments follow, paths first.

    Attributes:
        name: See file_client.c.
        after: Arguments that come after the path.
        cold: Nothing of the host's files is in memory when it begins.
        warm: It was done once just before.
        times: How often within the timed part.
        touch_mib: Memory to touch first and give back. A virtual machine that gives free memory to
            its host pays for it when it takes it again; whoever runs first would pay for all.
    """

    name: str
    after: tuple[str, ...] = ()
    cold: bool = False
    warm: bool = False
    times: int = 1
    touch_mib: int = 0

    def plain(self) -> Self:
        """Return the same, done once and with whatever is in memory."""
        return dataclasses.replace(self, cold=False, warm=False, times=1, touch_mib=0)


class FileClient:
    """The compiled client.

    Args:
        directory: Where the program is put.

    Raises:
        FileNotFoundError: There is no C compiler.
        subprocess.CalledProcessError: It does not compile.
    """

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise FileNotFoundError("the mount benchmark's client needs a C compiler: `cc`")
        directory.mkdir()
        self._program = directory / "file_client"
        argv = [compiler, "-O2", "-pthread", "-o", os.fspath(self._program), os.fspath(SOURCE)]
        subprocess.run(argv, check=True)

    def seconds(self, operation: Operation, *paths: Path, moved: int) -> float:
        """Do it and return the wall seconds.

        Args:
            operation: What to do.
            paths: With what.
            moved: What it has to say that it moved: bytes, files or reads.

        Raises:
            ValueError: It moved something else.
            subprocess.CalledProcessError: It failed, with its own words on stderr.
        """
        flags = ["-d"] * operation.cold + ["-w"] * operation.warm
        flags += ["-t", str(operation.touch_mib), "-n", str(operation.times)]
        done = subprocess.run(
            [self._program, *flags, operation.name, *paths, *operation.after],
            stdout=subprocess.PIPE,
            timeout=RUN_SECONDS,
            check=True,
        )
        seconds, said = done.stdout.split()
        if int(said) != moved:
            raise ValueError(f"{operation.name} moved {int(said)}, not {moved}: {paths}")
        return float(seconds)
